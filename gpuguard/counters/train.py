"""Train the forest of `gpuguard.core.counter_classes` on simulated jobs, and write the model with its card.

    gpuguard train counters --out models/

Needs the extra `train` (LightGBM). The same seed gives the same model. Nothing is trained on recordings: those at hand
are few, and serve to measure. Choices, and why:

- Mining that hides in training jobs at less than a third of their time is measured, not trained on: what can be learnt
  of it is the training job.
- A look at a paused miner is labelled by what the device then did, not by who owns it.
- Mining and the rest weigh alike, so that the score has no prior in it; each family and each kind weighs alike in its
  half, but other compute, which is what looks like mining, weighs as much as training and inference together.
- Trees of rhythm do not see pipes, power and memory: then they hold for families that they were not shown
  (`core.counter_classes`). With families and other work left out (`held_out`) they find what the others do not.
- Columns are hidden at random, so that the forest holds for files and boards that tell less, and is less certain there.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from gpuguard.code.train import not_above
from gpuguard.core import counter_features as cf
from gpuguard.core import counter_jobs as core
from gpuguard.core.counter_classes import MINING, OTHER, PRIORS, Line, Model
from gpuguard.core.counter_jobs import NONE_SEEN, Honest
from gpuguard.counters import evaluation, honest, jobs
from gpuguard.kernels.forest import pack
from gpuguard.kernels.opcodes import Forest
from gpuguard.lab import telemetry

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from gpuguard.counters.jobs import Job

SEED = 20_261_121
JOBS, BATCH = 14_400, 160
#: Samples a second, a sensor's and an exporter's, which collects every 5 to 30 s; there a look takes minutes, and the
#: longest job is none too long.
LENGTHS_S, RATES_HZ = (600.0, 900.0, 2400.0), (10.0, 1.0, 1.0, 1.0, 0.5, 0.2, 1 / 15, 1 / 30)
LOOKS_PER_JOB = 7
#: Looks that the forest is fitted to, and that each split is scored on: one forest for each group left out.
FIT_ROWS, SPLIT_ROWS = 80_000, 16_000
#: The split by time: three driver updates later, in another season (`telemetry.drifted`).
LATER_WEEKS, LATER_JOBS_MIN = 40.0, 400
#: Alarms a GPU-year of which the card tells what they take.
RATES = (10.0, 1.0, 0.1, 0.001)
#: Programs that run on for hours without a break are the likeliest to be taken for a search: they are drawn so often.
LONG_DRAWS = 4

FAMILIES = tuple(dict.fromkeys(one.family for one in telemetry.MINERS))
CLASSES = (*(MINING + name for name in FAMILIES), "training", "inference", "compute")
#: With which family of mining a kind of work is left out: kinds of one nature together, else none would be unknown.
_NATURES = tuple(dict.fromkeys(one.family or one.name for one in telemetry.BENIGN))
GROUPS = ({one.name: FAMILIES.index(one.family) for one in telemetry.MINERS}
          | {one.name: _NATURES.index(one.family or one.name) % len(FAMILIES) for one in telemetry.BENIGN})
#: What trees of rhythm are not shown: which pipes work and how much, and what a job takes of power and memory.
NOT_RHYTHM = np.array(["mix_" in name or name in ("memory", "power_level", "power_of_busy") for name in cf.FEATURES])
#: A line whose last step was no longer than this is found.
LINE_EXACT = 1e-6

ROUNDS = 28
PARAMETERS = {
    "objective": "multiclass", "num_class": len(CLASSES), "verbosity": -1, "learning_rate": 0.18, "num_leaves": 20,
    "max_depth": 6, "min_data_in_leaf": 40, "feature_fraction": 0.5, "bagging_fraction": 0.7, "bagging_freq": 1,
    "lambda_l2": 5.0, "use_missing": False, "deterministic": True, "force_row_wise": True, "num_threads": 2, "seed": 0,
}
RHYTHM_PARAMETERS = {**PARAMETERS, "objective": "binary", "num_class": 1}
#: One look weighs no more than this, whatever the forest says: what a thousand jobs of other compute would bear out of
#: which none looks so (rule of three): ln(1000 / 3). Some thousands are drawn, but of few kinds.
NATS_MOST, NATS_LEAST = 5.8, -4.0
#: What a look must beat for a sum to rise, in nats. By 3 and not 2 more miners are told from the highest in 300 and in
#: 1,000 of other jobs whose nature was not shown, and as many from the highest in 100.
ALLOWANCE = 3.0


class Table(NamedTuple):
    """Looks, one a row: features, class, and the job (its number, workload, board and evasion)."""

    features: np.ndarray
    label: np.ndarray
    number: np.ndarray
    workload: np.ndarray
    board: np.ndarray
    evasion: np.ndarray

    def some(self, use: np.ndarray) -> Table:
        """Return these rows only."""
        return Table(*(column[use] for column in self))


def trained_on(one: telemetry.Evasion) -> bool:
    """Return whether a miner that hides so is trained on."""
    return one.share >= 0.3


def collect(seed: int = SEED, count: int = JOBS, weeks: float = 0.0) -> Table:
    """Simulate jobs, so many weeks after the first, and return looks at them: as much mining as other work."""
    return Table(*(np.concatenate(column) for column in zip(*batches(seed, count, weeks), strict=True)))


def batches(seed: int, count: int, weeks: float = 0.0) -> Iterator[Table]:
    """Yield the looks of `collect`, `BATCH` jobs at a time."""
    random = np.random.default_rng(seed)
    evasions = [one for one in telemetry.EVASIONS if trained_on(one)]
    # An unhidden miner is the commonest.
    miners = jobs.draw(telemetry.MINERS, [telemetry.EVASIONS[0], *evasions], count // 2, random)
    benign = [one for one in telemetry.BENIGN for _ in range(LONG_DRAWS if one.rhythm is telemetry.LONG else 1)]
    others = jobs.draw(benign, evasions, count - count // 2, random)
    drawn = [job._replace(weeks=weeks) for job in (*miners, *others)]
    drawn = [drawn[i] for i in random.permutation(len(drawn))]
    for begin in range(0, len(drawn), BATCH):
        some = drawn[begin:begin + BATCH]
        length, rate = random.choice(LENGTHS_S), random.choice(RATES_HZ)
        length = LENGTHS_S[0] if rate > 1 else LENGTHS_S[-1] if rate < 1 else length
        yield _rows(some, begin, jobs.look_at(some, length, rate, random), random)


def digest_of(table: Table) -> str:
    """Return SHA-256, in hex, of what looks show and what they are called."""
    return hashlib.sha256(table.features.tobytes() + table.label.tobytes()).hexdigest()


def _rows(some: Sequence[Job], begin: int, looks: jobs.Looks, random: np.random.Generator) -> Table:
    columns: dict[str, list[Any]] = {name: [] for name in Table._fields}
    for i, job in enumerate(some):
        usable = np.flatnonzero(looks.at_work[i])
        # A look that was mining for a moment only is neither.
        mined = looks.mining[i] > 0.5 * job.evasion.intensity * min(job.evasion.share, 1.0)
        if job.workload.kind == "mining":
            clear = mined | ((looks.mining[i] == 0.0) & job.evasion.idle_only)
            usable = usable[clear[usable]]
        for k in random.permutation(usable)[:LOOKS_PER_JOB].tolist():
            mines = job.workload.kind == "mining" and bool(mined[k])
            label = MINING + job.workload.family if mines else (
                "training" if job.workload.kind == "mining" else job.workload.kind)
            if label == "idle":
                continue
            for name, value in zip(Table._fields, (looks.features[i, k], CLASSES.index(label), begin + i,
                                                   job.workload.name, job.board.name, job.evasion.name), strict=True):
                columns[name].append(value)
    return Table(*(np.array(columns[name]) for name in Table._fields))


def weights(label: np.ndarray) -> np.ndarray:
    """Return the weight of each row: mining and the rest alike."""
    out = np.zeros(len(label))
    for i, name in enumerate(CLASSES):
        share = PRIORS.get(name, PRIORS["mining"] / len(FAMILIES))
        out[label == i] = share / max(1, int((label == i).sum()))
    out *= len(label) / out.sum()
    return out


def fit(table: Table, rounds: int = ROUNDS) -> Forest:
    """Train a forest: in each round a tree for each class, and one of rhythm."""
    import lightgbm

    weight, rhythm = weights(table.label), np.where(NOT_RHYTHM, np.float32(cf.ABSENT), table.features)
    families, other = (
        [tree["tree_structure"] for tree in lightgbm.train(
            parameters, lightgbm.Dataset(features, label, weight=weight), rounds).dump_model()["tree_info"]]
        for parameters, features, label in ((PARAMETERS, table.features, table.label),
                                            (RHYTHM_PARAMETERS, rhythm, is_mining(table.label))))
    nested = []
    for i, tree in enumerate(other):
        nested += [*families[i * len(CLASSES):(i + 1) * len(CLASSES)], tree]
    return flatten(nested)


def flatten(nested: Sequence[dict[str, Any]]) -> Forest:
    """Return LightGBM's nested trees, class by class in turn, as flat arrays, parents before children."""
    nodes: list[tuple[int, float, int, int, float]] = []

    def add(tree: dict[str, Any]) -> int:
        at = len(nodes)
        nodes.append((-1, 0.0, -1, -1, tree.get("leaf_value", 0.0)))
        if "leaf_value" not in tree:
            left, right = add(tree["left_child"]), add(tree["right_child"])
            nodes[at] = (tree["split_feature"], not_above(tree["threshold"]), left, right, 0.0)
        return at

    root = [add(tree) for tree in nested]
    feature, threshold, left, right, value = zip(*nodes, strict=True)
    return Forest(np.array(feature, np.int32), np.array(threshold, np.float32), np.array(left, np.int32),
                  np.array(right, np.int32), np.array(value, np.float64), np.array(root, np.int32), 0.0)


def class_of(forest: Forest) -> np.ndarray:
    """Return whose score each tree adds to: one tree a class in turn, the last for `OTHER`."""
    return np.arange(len(forest.root), dtype=np.int32) % (len(CLASSES) + 1)


def raw(forest: Forest, line: Line = (1.0, 0.0, 0.0)) -> Model:
    """Return the model whose looks are not bounded."""
    return Model(pack(forest, len(cf.FEATURES), class_of(forest)), (*CLASSES, OTHER), line, -30.0, 30.0, 0.0)


def bounded(forest: Forest, line: Line) -> Model:
    """Return the model whose looks weigh what those of the shipped one do."""
    return raw(forest, line)._replace(nats_least=NATS_LEAST, nats_most=NATS_MOST, allowance=ALLOWANCE)


def left_out(table: Table) -> dict[int, Forest]:
    """Return for each group of `GROUPS` the forest that was shown nothing of it."""
    groups = by_workload(table)
    return {int(one): fit(table.some(groups != one)) for one in np.unique(groups)}


def is_mining(label: np.ndarray) -> np.ndarray:
    """Return which labels are of mining."""
    return label < len(FAMILIES)


def held_out(table: Table, groups: np.ndarray) -> np.ndarray:
    """Return the log-odds of mining of every row, by family and by rhythm, by forests that saw none of its group.

    Groups of a miner and of other work are left out together where there are as many of both.
    """
    odds = np.zeros((len(table.label), 2))
    for one in np.unique(groups):
        rest = groups == one
        odds[rest] = raw(fit(table.some(~rest))).odds(table.features[rest])[0]
    return odds


def line_through(odds: np.ndarray, mining: np.ndarray, weight: np.ndarray) -> Line:
    """Return the line from both log-odds to nats, by Newton's method; classes weigh alike, so it has no prior in it.

    Raises `ArithmeticError` where the method does not come to rest.
    """
    design = np.column_stack([odds, np.ones(len(odds))])
    line = np.array([0.5, 0.5, 0.0])
    for _ in range(50):
        p = 1 / (1 + np.exp(-np.clip(design @ line, -30, 30)))
        hessian = (design * (weight * p * (1 - p))[:, None]).T @ design + 1e-9 * np.eye(3)
        step = np.linalg.solve(hessian, design.T @ (weight * (mining - p)))
        line += step
    if np.abs(step).max() > LINE_EXACT:
        raise ArithmeticError(f"no line to nats was found: its last step was {step.tolist()}")
    return float(line[0]), float(line[1]), float(line[2])


def write_model(path: Path, forest: Forest, line: Line, jobs_seen: Honest = NONE_SEEN) -> None:
    """Write the model as plain arrays."""
    arrays = {name: value for name, value in forest._asdict().items() if name != "base"}
    np.savez_compressed(path, feature_names=np.array(cf.FEATURES), classes=np.array([*CLASSES, OTHER]),
                        line=np.array(line), class_of=class_of(forest),
                        bounds=np.array([NATS_LEAST, NATS_MOST, ALLOWANCE]),
                        honest_heights=jobs_seen.heights, honest_above=np.array(jobs_seen.above),
                        honest_tails=np.stack([jobs_seen.share, jobs_seen.shape, jobs_seen.scale]), **arrays)


def by_workload(table: Table) -> np.ndarray:
    """Return the group of each row: a family of mining each, and with it a share of the other work."""
    return np.array([GROUPS[name] for name in table.workload.tolist()])


def drawn(table: Table, rows: int) -> Table:
    """Return so many rows at random, the same for the same table."""
    return table.some(np.random.default_rng(SEED).permutation(len(table.label))[:rows])


def splits(few: Table, later: Table) -> tuple[Line, dict[str, dict[str, float]]]:
    """Return the line, and the scores of forests that had not seen a row, job, board, kind of work, or later time."""
    mining, weight = is_mining(few.label), weights(few.label)
    boards = {name: i % 3 for i, name in enumerate(np.unique(few.board).tolist())}
    groups = {"job": few.number % 3, "workload (leave one family out)": by_workload(few),
              "random rows": np.arange(len(mining)) % 3,
              "GPU model": np.array([boards[name] for name in few.board.tolist()])}
    odds = {name: held_out(few, one) for name, one in groups.items()}
    # A job is of a kind that was known or of one that was not, evenly.
    both = odds["job"], odds["workload (leave one family out)"]
    line = line_through(np.concatenate(both), np.tile(mining, 2), np.tile(weight, 2))
    out = {name: evaluation.scores(one @ line[:2] + line[2], mining) for name, one in odds.items()}
    nats = raw(fit(few), line).judge(later.features)[0]
    return line, {**out, f"time (jobs {LATER_WEEKS:.0f} weeks later)": evaluation.scores(nats, is_mining(later.label))}


def main(out: Path, count: int = JOBS) -> None:
    """Simulate, train, score held out and on jobs of a later time, count limits, and write the model and its card."""
    table, later = collect(SEED, count), collect(SEED + 1, max(LATER_JOBS_MIN, count // 9), LATER_WEEKS)
    few, some = drawn(table, SPLIT_ROWS), drawn(table, FIT_ROWS)
    line, scores = splits(few, later)
    unknowing = {group: bounded(forest, line) for group, forest in left_out(some).items()}
    replayed = honest.replay(unknowing, GROUPS, max(1, honest.JOBS_EACH * count // JOBS), SEED)
    seen = honest.honest_of(replayed, core.highest(NATS_MOST - ALLOWANCE), SEED)
    write_model(out / "counter_forest.npz", fit(some), line, seen)
    result = {"made with": {name: version(name) for name in ("LightGBM", "NumPy")}, "jobs": count,
              "looks": len(table.label), "fitted": len(some.label), "scored": len(few.label),
              "first looks": digest_of(table.some(table.number < BATCH)),
              "line": [round(one, 3) for one in line], "splits": scores}
    (out / "counter_forest.md").write_text(card(result, seen))
    sys.stdout.write(json.dumps(result, indent=2) + "\n")


def card(result: dict[str, Any], seen: Honest) -> str:
    """Return the model's card."""
    rows = "\n".join(f"| {name} | {one['auc']:.4f} | {one['recall_at_fpr_1e-3']:.3f} |"
                     for name, one in result["splits"].items())
    made_with = " and ".join(f"{name} {one}" for name, one in result["made with"].items())
    return f"""# counter_forest: what a job is, by its counters

`counter_forest.npz` holds gradient-boosted trees for {len(CLASSES)} classes, and for mining of any family by rhythm
alone, as plain arrays, the line from log-odds of mining to nats, and the bounds of a look.
With them are the heights of honest jobs. `gpuguard.core.counter_classes` and `counter_jobs` read it. Made by

    gpuguard train counters --out models/

with a fixed seed (extra `train`), by {made_with}: the same versions make the same bytes on the
same kind of processor. Every figure here is *simulated*.

## Data
{result['looks']} looks of 20 s at {result['jobs']} simulated jobs (`gpuguard/lab/telemetry.py`, where each number has
its source), of which {result['fitted']} are fitted to and {result['scored']} scored in each split:
{len(telemetry.MINERS)} miners under {len(telemetry.EVASIONS)} evasions, {len(telemetry.BENIGN)} kinds of other work,
{len(telemetry.BOARDS)} boards, with whole sources and single columns hidden at random. Nothing was recorded from a
miner. The recordings at hand (H100 training, inference, idle; V100 programs) were not trained on: they measure.

Looks at the first {BATCH} jobs have this SHA-256, so that a simulator that has changed since is noticed by a test:
{result['first looks']}

## Held out
Of single looks, before they are added up. Nats are {result['line']}: slopes of the log-odds by family and by rhythm,
and an offset, fitted to the log-odds of the first two rows together.

| left out | AUC | recall at a false positive rate of 1e-3 |
| --- | --- | --- |
{rows}

A random split shows what it always shows. The row of workloads is the honest one: a family of mining, and a seventh of
the other workloads, that the forest never saw. That of time is as good as its assumptions: no recording spans weeks.

{of_honest_jobs(seen)}
## What it does not show
- That a real miner looks as simulated. The ranges follow from the arithmetic of each algorithm, not from recordings.
- Mining at 5 or 10 % of a busy GPU's time: not trained on, measured in benchmarks/results/counters.json.
- Programs that run for hours without a copy and look just like a search: hash joins in a loop come highest.
- Searches that do not mine (passwords, primes) are not told from mining, and are in no figure here.
"""


def of_honest_jobs(seen: Honest) -> str:
    """Return what the card says of honest jobs."""
    rows = "\n".join(
        f"| {rate:g} | {limit.height:.2f} | {'counted' if limit.counted else 'extrapolated'} | "
        f"{limit.least:.2g} to {limit.most:.2g} |" if math.isfinite(limit.height) else f"| {rate:g} | none | - | - |"
        for rate, limit in ((rate, seen.limit(rate)) for rate in RATES))
    return f"""## Honest jobs
{len(seen.heights)} jobs of {core.JOB_HOURS:.0f} hours of other compute, {len(telemetry.COMPUTE)} kinds, each
judged by a forest that was shown nothing of its nature. Counted, so many support {seen.supported:.2g} alarms a GPU-year
and no fewer, of a GPU that does these kinds of work, each as often as any other. Jobs of one kind are alike, so the
bounds are of kinds drawn anew, by a tail: above a height of {seen.above:.2f} it has shape {seen.shape[0]:.2f} and scale
{seen.scale[0]:.2f}. A job is suspect from this height on:

| alarms a GPU-year | height | how | 95 %, by kinds |
| --- | --- | --- | --- |
{rows}

No height is above {core.highest(NATS_MOST - ALLOWANCE):.2f}: where more would be asked, no job is suspect by counters
alone. For a kind of work that is none of these the count shows little: of so many kinds the next may be the one that
always alarms, which bounds the rate at {core.JOBS_PER_GPU_YEAR / (1 + len(telemetry.COMPUTE)):.0f} and no lower.
"""
