"""How good the counter model is: by splits, by detection and delay, and by alarms in replay. All of it *simulated*."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from gpuguard.core import counter_features as cf
from gpuguard.core.detectors.counters import CEILING, LOOKS_PER_YEAR, threshold_nats
from gpuguard.counters import jobs
from gpuguard.lab import telemetry

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gpuguard.core.counter_classes import Model
    from gpuguard.counters.jobs import Job
    from gpuguard.lab.telemetry import Evasion, Workload

HOURS_PER_YEAR = 8_766.0
FPR = 1e-3
BATCH = 96
VISIBLE: tuple[telemetry.Visible, ...] = ("gpm", "dcgm", "nvml")


class Played(NamedTuple):
    """One replay, (jobs, looks) each: weights less the allowance, the sums of them, and which looks were at work."""

    steps: np.ndarray
    sums: np.ndarray
    at_work: np.ndarray


def auc(odds: np.ndarray, mining: np.ndarray) -> float:
    """Return the area under the ROC curve, ties broken by order."""
    rank = np.argsort(np.argsort(odds))
    positives, negatives = int(mining.sum()), int((~mining).sum())
    return float((rank[mining].sum() - positives * (positives - 1) / 2) / positives / negatives)


def scores(odds: np.ndarray, mining: np.ndarray) -> dict[str, float]:
    """Return AUC, and recall of looks at a false positive rate of `FPR`."""
    cut = float(np.quantile(odds[~mining], 1 - FPR))
    return {"auc": round(auc(odds, mining), 4), "recall_at_fpr_1e-3": round(float((odds[mining] > cut).mean()), 4)}


def play(model: Model, some: Sequence[Job], seconds: float, rate_hz: float, seed: int) -> Played:
    """Simulate jobs, weigh each look and add them up as the detector does."""
    random, steps, sums, at_work = np.random.default_rng(seed), [], [], []
    for begin in range(0, len(some), BATCH):
        looks = jobs.look_at(some[begin:begin + BATCH], seconds, rate_hz, random)
        count, length = looks.at_work.shape
        nats = model.judge(looks.features.reshape(-1, len(cf.FEATURES)))[0].reshape(count, length)
        steps.append(nats - model.allowance)
        sums.append(added_up(nats, looks.at_work, model.allowance, threshold_nats(1e-3)))
        at_work.append(looks.at_work)
    return Played(np.concatenate(steps), np.concatenate(sums), np.concatenate(at_work))


def added_up(nats: np.ndarray, at_work: np.ndarray, allowance: float, threshold: float) -> np.ndarray:
    """Return the sums that `detectors.counters.Level` would hold after each look."""
    out, held = np.zeros_like(nats), np.zeros(len(nats))
    for k in range(nats.shape[1]):
        moved = np.clip(held + nats[:, k] - allowance, 0.0, CEILING * threshold)
        held = np.where(at_work[:, k], moved, held)
        out[:, k] = held
    return out


def delays(played: Played, threshold: float) -> np.ndarray:
    """Return seconds from the first look to the alarm, NaN where there was none."""
    reached = played.sums >= threshold
    first = np.where(reached.any(axis=1), reached.argmax(axis=1) + 1, np.nan)
    out: np.ndarray = first * cf.LOOK_S
    return out


def detection(some: np.ndarray, seconds: float) -> dict[str, float | int | None]:
    """Return rate and delay (p50, p95, p99 of those detected) of some jobs."""
    found = some[~np.isnan(some)]
    quantiles = np.percentile(found, [50, 95, 99]).tolist() if len(found) else [None] * 3
    return {"jobs": len(some), "watched_s": int(seconds), "detected": round(len(found) / max(1, len(some)), 3),
            **dict(zip(("delay_p50_s", "delay_p95_s", "delay_p99_s"), quantiles, strict=True))}


def jobs_of(workloads: Sequence[Workload], evasions: Sequence[Evasion], each: int,
            random: np.random.Generator) -> list[Job]:
    """Return so many jobs of each workload and evasion for each source of counters, on boards that have it."""
    some = []
    for visible in VISIBLE:
        boards = [one for one in telemetry.BOARDS if visible in one.visible]
        some += [jobs.Job(workload, boards[int(random.integers(len(boards)))], visible, evasion)
                 for workload in workloads for evasion in evasions for _ in range(each)]
    return some


def detections(model: Model, per_cell: int, seconds: float, rates: Sequence[float], seed: int) -> dict[str, Any]:
    """Return detection by workload, by evasion and by what the board tells, at the thresholds of some alarm rates."""
    some = jobs_of(telemetry.MINERS, telemetry.EVASIONS, per_cell, np.random.default_rng(seed))
    played = play(model, some, seconds, 1.0, seed)
    out: dict[str, Any] = {}
    for rate in rates:
        after = delays(played, threshold_nats(rate))
        table: dict[str, Any] = {}
        for visible in VISIBLE:
            of = np.array([job.visible == visible for job in some])
            full = of & np.array([job.evasion.name == "none" for job in some])
            table[visible] = {
                "by workload, unhidden": {one.name: detection(after[full & _named(some, one.name)], seconds)
                                          for one in telemetry.MINERS},
                "by evasion": {one.name: detection(after[of & _evading(some, one.name)], seconds)
                               for one in telemetry.EVASIONS},
                "by workload and evasion, detected": {
                    one.name: {two.name: detection(after[of & _named(some, one.name) & _evading(some, two.name)],
                                                   seconds)["detected"] for two in telemetry.EVASIONS}
                    for one in telemetry.MINERS}}
        out[f"{rate:g} alarms per GPU-year"] = table
    return out


def _named(some: Sequence[Job], name: str) -> np.ndarray:
    return np.array([job.workload.name == name for job in some])


def _evading(some: Sequence[Job], name: str) -> np.ndarray:
    return np.array([job.evasion.name == name for job in some])


def alarms(model: Model, per_workload: int, seconds: float, rates: Sequence[float], seed: int) -> dict[str, Any]:
    """Return alarms per GPU-year of benign jobs, by kind and by what the board tells: counted, and modelled.

    The model is Lundberg's: a sum of independent steps ever passes h with a probability of at most exp(-r h), where r
    solves E exp(r step) = 1, and it may begin anew at each look. The steps are those replayed, and in place of a share
    of them, which is the rule of three of as many looks, the largest step there can be: what was not seen is thereby
    not taken to be impossible. Jobs that look like mining throughout break the independence; they are what is counted.
    Jobs are independent, so what is proven is `at_most` for the count of them, at 95 %, in the GPU-years replayed.
    """
    some = jobs_of(telemetry.BENIGN, telemetry.EVASIONS[:1], per_workload, np.random.default_rng(seed))
    played = play(model, some, seconds, 1.0, seed)
    highest = played.sums.max(axis=1)
    out: dict[str, Any] = {}
    for visible in VISIBLE:
        for kind in ("training", "inference", "compute", "idle"):
            of = np.array([job.visible == visible and job.workload.kind == kind for job in some])
            steps = played.steps[of][played.at_work[of]]
            out[f"{visible}, {kind}"] = _rate(highest[of], steps, model.nats_most - model.allowance, seconds, rates)
        worst = {one.name: round(float((highest[_named(some, one.name) & np.array(
            [job.visible == visible for job in some])] >= threshold_nats(rates[0])).mean()), 4)
            for one in telemetry.BENIGN}
        out[f"{visible}, share of jobs that alarm"] = {name: share for name, share in worst.items() if share}
    return out


def _rate(
    highest: np.ndarray, steps: np.ndarray, largest: float, seconds: float, rates: Sequence[float],
) -> dict[str, Any]:
    """Return counted and modelled alarms per GPU-year at the threshold of each rate."""
    years = len(highest) * seconds / 3600 / HOURS_PER_YEAR
    exponent = lundberg(steps, largest)
    out: dict[str, Any] = {"gpu_years": round(years, 4), "jobs": len(highest), "looks_at_work": len(steps),
                           "looks_above_allowance": int((steps > 0).sum()),
                           "highest_nats": round(float(highest.max()), 2), "exponent": round(exponent, 3)}
    for rate in rates:
        threshold = threshold_nats(rate)
        counted = int((highest >= threshold).sum())
        modelled = LOOKS_PER_YEAR * np.exp(-exponent * threshold) if len(steps) else 0.0
        out[f"{rate:g}"] = {"threshold_nats": round(threshold, 2), "alarms": counted,
                            "counted_per_gpu_year": round(counted / years, 1),
                            "at_most_per_gpu_year": round(at_most(counted) / years, 1),
                            "modelled_per_gpu_year": float(f"{modelled:.2g}")}
    return out


def at_most(counted: int) -> float:
    """Return the mean of a Poisson count that shows so few, or fewer, one time in twenty: 3 for none."""

    def chance(mean: float) -> float:
        return sum(math.exp(k * math.log(mean) - mean - math.lgamma(k + 1)) for k in range(counted + 1))

    low, high = 1e-9, 10.0 + 4 * counted
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if chance(middle) > 0.05 else (low, middle)
    return high


def lundberg(steps: np.ndarray, largest: float) -> float:
    """Return the r that solves E exp(r step) = 1, 0 where the steps do not fall on average."""
    unseen = min(1.0, 3 / max(1, len(steps)))

    def excess(r: float) -> float:
        seen = float(np.exp(r * steps).mean()) if len(steps) else 0.0
        return float((1 - unseen) * seen + unseen * np.exp(r * largest) - 1)

    low, high = 0.0, 20.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if excess(middle) < 0 else (low, middle)
    return low
