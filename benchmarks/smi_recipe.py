"""The published recipe for telling mining from nvidia-smi (NVIDIA Morpheus, ABP) beside the counter eye, by NVML only.

Morpheus' model `abp-nvsmi-xgb` is a pointer in its repository, and its notebook says that the data cannot be published
that it was trained on. What is public is the recipe: XGBoost on absolute columns of nvidia-smi (memory used and free,
two utilisations, temperatures, power, clocks; `columns_fil.txt`), depth 5, learning rate 0.1, five rounds, a second is
mining from 0.5 on; some 1,000 rows, "deep learning and crypto mining workloads on a DGX", both alike in number, a
random fifth of them the test, on which it is right always. Here the same is done with jobs of our simulator
(gpuguard/lab/telemetry.py; no temperatures, which it does not have), both kinds of equal weight:

    one board   as published: a V100, training and miners; then other jobs, other work, other boards, real recordings
    all kinds   generous: all boards, and all kinds of work, 20 jobs each
    left out    the same, and each group of kinds judged by a forest that was not shown it (as `unseen` in counters.py)

A job of an hour is *accused* if most of its seconds are mining, *touched* if any 10 in a row are; a single second is
not counted. Ours are the same jobs, NVML only, at 10 and 1 alarms a GPU-year, judged by the shipped model, which knows
these kinds; for what it was not shown see counters.json. Recordings are real (GPUGUARD_DATA_DIR), all else simulated.
Needs xgboost (pip: xgboost-cpu); without it nothing is measured. Result: benchmarks/results/smi_recipe.json.
Run: make bench-smi-recipe (5 minutes)
"""

from __future__ import annotations

import csv
import gzip
import json
import os
import sys
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gpuguard.counters import evaluation, train
from gpuguard.counters.jobs import Job
from gpuguard.counters.shipped import shipped_model
from gpuguard.lab import telemetry

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

RESULT = Path(__file__).parent / "results" / "smi_recipe.json"
DATA = Path(os.environ.get("GPUGUARD_DATA_DIR", "/nonexistent")) / "telemetry"
PARAMETERS = {"objective": "binary:logistic", "max_depth": 5, "learning_rate": 0.1, "tree_method": "hist", "seed": 0}
BOOST_ROUNDS, MINING_FROM, IN_A_ROW = 5, 0.5, 10
MIB, HOUR_S, TRAIN_S = 2**20, 3600, 600
JOBS_EACH, TESTED_EACH = 20, 6
V100 = next(one for one in telemetry.BOARDS if one.name.startswith("V100"))
DEEP_LEARNING = telemetry.TRAINING
EVERY = (*telemetry.MINERS, *telemetry.BENIGN)


def columns(used: np.ndarray, free: np.ndarray, gpu: np.ndarray, memory: np.ndarray, power_w: np.ndarray,
            clock_mhz: np.ndarray, clock_mhz_max: np.ndarray) -> np.ndarray:
    """Return float32[seconds, 8] as nvidia-smi tells them: MiB, MiB, %, %, W, MHz (graphics and SM), MHz."""
    every = (used, free, np.round(100 * gpu), np.round(100 * memory), power_w, clock_mhz, clock_mhz, clock_mhz_max)
    return np.column_stack([np.asarray(one, np.float32) for one in every])


def told_of(job: Job, seconds: int, random: np.random.Generator) -> np.ndarray:
    """Return what nvidia-smi would have told of a simulated job each second."""
    trace = telemetry.simulate(job.workload, job.board, seconds, random, evasion=job.evasion, visible="nvml")
    used, board = trace.memory * job.board.memory_bytes / MIB, job.board
    dram = trace.shares[:, telemetry.SHARES.index("dram")]
    # As telemetry.samples: what NVML calls memory utilisation was 1.28 times DRAM's.
    return columns(used, board.memory_bytes / MIB - used, trace.gpu, np.minimum(1.0, 1.28 * dram), trace.power_w,
                   trace.clock_hz / 1e6, np.full(len(used), board.sm_clock_limit_hz / 1e6))


def forest(some: Sequence[Job], random: np.random.Generator) -> Any:  # xgboost has no types
    """Train as published on ten minutes of each job."""
    import xgboost

    rows = [told_of(job, TRAIN_S, random) for job in some]
    labels = np.concatenate([np.full(len(row), job.workload.kind == "mining")
                             for row, job in zip(rows, some, strict=True)])
    weight = np.where(labels, 0.5 / labels.mean(), 0.5 / (1 - labels.mean()))
    return xgboost.train(PARAMETERS, xgboost.DMatrix(np.concatenate(rows), labels, weight=weight), BOOST_ROUNDS)


def judged(model: Any, rows: np.ndarray) -> tuple[bool, bool]:
    """Return whether a job is accused, and whether it is touched."""
    import xgboost

    mining = model.predict(xgboost.DMatrix(rows)) >= MINING_FROM
    runs = np.convolve(mining, np.ones(IN_A_ROW), "valid") if len(mining) >= IN_A_ROW else np.zeros(1)
    return bool(mining.mean() > 0.5), bool(runs.max() >= IN_A_ROW)


def jobs(kinds: Iterable[telemetry.Workload], boards: Sequence[telemetry.Board], each: int,
         random: np.random.Generator) -> list[Job]:
    """Return so many jobs of each kind, each on a board drawn by chance."""
    return [Job(kind, boards[int(random.integers(len(boards)))], "nvml") for kind in kinds for _ in range(each)]


def counted(some: Sequence[Job], verdicts: Sequence[tuple[bool, bool]]) -> dict[str, dict[str, int]]:
    """Return, by kind of job, how many there were, were accused and were touched."""
    found: dict[str, list[tuple[bool, bool]]] = defaultdict(list)
    for job, verdict in zip(some, verdicts, strict=True):
        found[job.workload.kind].append(verdict)
    return {kind: {"jobs": len(each), "accused": sum(one[0] for one in each), "touched": sum(one[1] for one in each)}
            for kind, each in found.items()}


def ours(some: Sequence[Job]) -> dict[str, dict[str, dict[str, int]]]:
    """Return, by alarms a GPU-year and kind, how many of these jobs are suspect by counters alone within an hour."""
    model = shipped_model()
    highest = evaluation.play(model, some, HOUR_S, 23).max(axis=1)
    out = {}
    for rate in (10.0, 1.0):
        alarm = (highest >= model.honest.limit(rate).height).tolist()
        out[f"{rate:g}"] = {kind: {"jobs": one["jobs"], "suspect": one["accused"]}
                            for kind, one in counted(some, [(one, one) for one in alarm]).items()}
    return out


def one_board() -> dict[str, object]:
    """Train on a V100 with training and miners, and judge what else a GPU does."""
    random = np.random.default_rng(5)
    model = forest(jobs((*DEEP_LEARNING, *telemetry.MINERS), [V100], JOBS_EACH, random), random)
    found: dict[str, object] = {}
    others = [one for one in telemetry.BOARDS if one != V100]
    for name, boards in (("the same board", [V100]), ("other boards", others)):
        some = jobs(EVERY, boards, TESTED_EACH, random)
        found[name] = {"recipe": counted(some, [judged(model, told_of(job, HOUR_S, random)) for job in some]),
                       "ours": ours(some)}
    return found | {"recordings": recordings(model)}


def all_kinds() -> dict[str, object]:
    """Train on everything, and judge other jobs of the same kinds."""
    random = np.random.default_rng(6)
    model = forest(jobs(EVERY, telemetry.BOARDS, JOBS_EACH, random), random)
    some = jobs(EVERY, telemetry.BOARDS, TESTED_EACH, random)
    return {"recipe": counted(some, [judged(model, told_of(job, HOUR_S, random)) for job in some]),
            "ours": ours(some), "recordings": recordings(model)}


def left_out() -> dict[str, object]:
    """Judge the jobs of each group by a forest that was shown nothing of it."""
    random = np.random.default_rng(7)
    some: list[Job] = []
    verdicts: list[tuple[bool, bool]] = []
    for group in sorted(set(train.GROUPS.values())):
        of = [one for one in EVERY if train.GROUPS[one.name] == group]
        model = forest(jobs([one for one in EVERY if one not in of], telemetry.BOARDS, JOBS_EACH, random), random)
        tested = jobs(of, telemetry.BOARDS, TESTED_EACH, random)
        some += tested
        verdicts += [judged(model, told_of(job, HOUR_S, random)) for job in tested]
    return {"recipe": counted(some, verdicts)}


# -- real ones --------------------------------------------------------------------------------------------------------


def recordings(model: Any) -> dict[str, dict[str, int]]:
    """Return how many devices of each H100 recording, and programs on a V100, are accused; none of them mines."""
    found = {}
    for path in sorted(DATA.glob("h100-*.csv.gz")):
        devices: dict[str, list[list[float]]] = defaultdict(list)
        with gzip.open(path, "rt", newline="") as lines:
            for row in csv.DictReader(lines):
                devices[row["gpu"]].append([float(row[name]) for name in (
                    "mem_used_mib", "mem_total_mib", "gpu_util_pct", "mem_util_pct", "power_w")])
        verdicts = []
        for rows in devices.values():
            used, total, gpu, memory, power_w = np.array(rows).T
            unknown = np.full(len(used), np.nan)  # clocks were not recorded; XGBoost takes what is missing
            verdicts.append(judged(model, columns(used, total - used, gpu / 100, memory / 100, power_w, unknown,
                                                  unknown)))
        found[path.name] = _summed(verdicts)
    profile = DATA / "v100-dvfs-real-profile.csv"
    if profile.exists():
        by_name: dict[str, list[tuple[bool, bool]]] = defaultdict(list)
        with profile.open() as lines:
            for row in csv.DictReader(lines):
                by_name[row["benchmark"]].append(judged(model, _average(row)))
        found["20 programs on a V100, at any clock"] = _summed(
            [(any(one[0] for one in each), any(one[1] for one in each)) for each in by_name.values()])
    return found


def _average(row: dict[str, str]) -> np.ndarray:
    """Return ten seconds of a program whose average is known; how much memory it used is not."""
    constant = [float("nan"), float("nan"), float(row["SMACT"]), min(1.0, 1.28 * float(row["DRAMA"])),
                float(row["average_power"]), float(row["core_frequency"]), V100.sm_clock_limit_hz / 1e6]
    return columns(*(np.full(IN_A_ROW, one) for one in constant))


def _summed(verdicts: Sequence[tuple[bool, bool]]) -> dict[str, int]:
    return {"each": len(verdicts), "accused": sum(one[0] for one in verdicts),
            "touched": sum(one[1] for one in verdicts)}


def main() -> None:
    try:
        import xgboost
    except ImportError:
        sys.exit("not measured: xgboost is not installed (pip: xgboost-cpu)")
    result = {"xgboost": xgboost.__version__, "simulated": True, "one board": one_board(), "all kinds": all_kinds(),
              "left out": left_out()}
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
