"""How good the counter model is: by splits, by detection and delay, and by alarms in replay. All of it *simulated*."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from gpuguard.core import counter_features as cf
from gpuguard.core.counter_jobs import HOURS_PER_YEAR, JOBS_PER_GPU_YEAR, MEMORY, SHRINK
from gpuguard.core.detectors.counters import NEAR_NATS
from gpuguard.counters import jobs
from gpuguard.lab import telemetry

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gpuguard.core.counter_classes import Model
    from gpuguard.counters.jobs import Job
    from gpuguard.lab.telemetry import Evasion, Workload

FPR = 1e-3
BATCH = 96
VISIBLE: tuple[telemetry.Visible, ...] = ("gpm", "dcgm", "nvml")


def auc(odds: np.ndarray, mining: np.ndarray) -> float:
    """Return the area under the ROC curve, ties broken by order."""
    rank = np.argsort(np.argsort(odds))
    positives, negatives = int(mining.sum()), int((~mining).sum())
    return float((rank[mining].sum() - positives * (positives - 1) / 2) / positives / negatives)


def scores(odds: np.ndarray, mining: np.ndarray) -> dict[str, float]:
    """Return AUC, and recall of looks at a false positive rate of `FPR`."""
    cut = float(np.quantile(odds[~mining], 1 - FPR))
    return {"auc": round(auc(odds, mining), 4), "recall_at_fpr_1e-3": round(float((odds[mining] > cut).mean()), 4)}


def play(model: Model, some: Sequence[Job], seconds: float, seed: int | Sequence[int]) -> np.ndarray:
    """Return float64[jobs, looks]: heights of simulated jobs, sampled at 1 Hz and added up as the detector does."""
    random, heights = np.random.default_rng(seed), []
    for begin in range(0, len(some), BATCH):
        looks = jobs.look_at(some[begin:begin + BATCH], seconds, 1.0, random)
        count, length = looks.at_work.shape
        nats = model.judge(looks.features.reshape(-1, len(cf.FEATURES)))[0].reshape(count, length)
        heights.append(heights_of(nats, looks.at_work, model.allowance))
    return np.concatenate(heights)


def heights_of(nats: np.ndarray, at_work: np.ndarray, allowance: float) -> np.ndarray:
    """Return the heights that `detectors.counters.Level` would have after each look."""
    out, held, looks = np.zeros_like(nats), np.zeros(len(nats)), np.zeros(len(nats))
    for k in range(nats.shape[1]):
        faded = np.where(looks == MEMORY, held * (1 - 1 / MEMORY), held)
        moved = np.maximum(0.0, faded + nats[:, k] - allowance)
        count = np.minimum(MEMORY, np.where((moved == 0) | (held == 0), 0, looks) + 1)
        held, looks = np.where(at_work[:, k], moved, held), np.where(at_work[:, k], count, looks)
        out[:, k] = held / (looks + SHRINK)
    return out


def delays(heights: np.ndarray, limit: float) -> np.ndarray:
    """Return seconds from the first look to the alarm, NaN where there was none."""
    reached = heights >= limit
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
    """Return detection by workload, by evasion and by what the board tells, at the limits of some alarm rates.

    Last comes the weight that adds up most with what other eyes see (`NEAR_NATS`), and how soon it is reached.
    """
    some = jobs_of(telemetry.MINERS, telemetry.EVASIONS, per_cell, np.random.default_rng(seed))
    heights = play(model, some, seconds, seed)
    alone = np.array([job.evasion.share == 1 for job in some])
    limits = {f"{rate:g} alarms per GPU-year": model.honest.limit(rate).height for rate in rates}
    limits[f"{NEAR_NATS} nats for other eyes"] = model.honest.limit(JOBS_PER_GPU_YEAR * math.exp(-NEAR_NATS)).height
    out: dict[str, Any] = {}
    for name, limit in limits.items():
        after = delays(heights, limit)
        table: dict[str, Any] = {}
        for visible in VISIBLE:
            of = np.array([job.visible == visible for job in some])
            full = of & np.array([job.evasion.name == "none" for job in some])
            table[visible] = {
                "with a GPU of its own": detection(after[of & alone], seconds),
                "by workload, unhidden": {one.name: detection(after[full & _named(some, one.name)], seconds)
                                          for one in telemetry.MINERS},
                "by workload": {one.name: detection(after[of & alone & _named(some, one.name)], seconds)
                                for one in telemetry.MINERS},
                "by evasion": {one.name: detection(after[of & _evading(some, one.name)], seconds)
                               for one in telemetry.EVASIONS},
                "by workload and evasion, detected": {
                    one.name: {two.name: detection(after[of & _named(some, one.name) & _evading(some, two.name)],
                                                   seconds)["detected"] for two in telemetry.EVASIONS}
                    for one in telemetry.MINERS}}
        out[name] = table
    return out


def _named(some: Sequence[Job], name: str) -> np.ndarray:
    return np.array([job.workload.name == name for job in some])


def _evading(some: Sequence[Job], name: str) -> np.ndarray:
    return np.array([job.evasion.name == name for job in some])


def alarms(model: Model, per_workload: int, seconds: float, rates: Sequence[float], seed: int) -> dict[str, Any]:
    """Return alarms per GPU-year of benign jobs, by kind and by what the board tells, and of searches that do not mine.

    Jobs are independent, so what a count proves is `at_most` of it, at 95 %, in the GPU-years replayed.
    """
    some = jobs_of((*telemetry.BENIGN, *telemetry.SEARCHES), telemetry.EVASIONS[:1], per_workload,
                   np.random.default_rng(seed))
    highest = play(model, some, seconds, seed).max(axis=1)
    searches = [one.name for one in telemetry.SEARCHES]
    kinds = np.array(["search" if job.workload.name in searches else job.workload.kind for job in some])
    out: dict[str, Any] = {}
    for visible in VISIBLE:
        sees = np.array([job.visible == visible for job in some])
        for kind in ("training", "inference", "compute", "idle", "search"):
            out[f"{visible}, {kind}"] = counted(highest[sees & (kinds == kind)], seconds, model, rates)
        limit = model.honest.limit(rates[0]).height
        share = {one.name: round(float((highest[sees & _named(some, one.name)] >= limit).mean()), 4)
                 for one in (*telemetry.BENIGN, *telemetry.SEARCHES)}
        out[f"{visible}, share of jobs that alarm"] = {name: one for name, one in share.items() if one}
    return out


def counted(highest: np.ndarray, seconds: float, model: Model, rates: Sequence[float]) -> dict[str, Any]:
    """Return alarms of some jobs at the limit of each rate."""
    years = len(highest) * seconds / 3600 / HOURS_PER_YEAR
    out: dict[str, Any] = {"gpu_years": round(years, 4), "jobs": len(highest),
                           "highest": round(float(highest.max()), 3)}
    for rate in rates:
        alarms = int((highest >= model.honest.limit(rate).height).sum())
        out[f"{rate:g}"] = {"alarms": alarms, "counted_per_gpu_year": round(alarms / years, 1),
                            "at_most_per_gpu_year": round(at_most(alarms) / years, 1)}
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
