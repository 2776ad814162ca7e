"""Train the forest of `gpuguard.code.classify` from a table of kernels and our own modules; write model and card.

    make fixtures-matrix
    python -m gpuguard.code.train --data kernels.csv.gz --own build/matrix --out models/

Needs the extra `train` (LightGBM). The table has one row a kernel: project, source_unit, label, group, and the columns
that `classify` reads. Labels are per project, so helpers of a miner count as hashing; groups are projects, with forks
that share code merged. The same table and seeds give the same model.

Choices, and why:

- Whole groups are left out: the nine folds hold one hashing group each, and benign groups dealt by size. Random folds
  would only show that a kernel resembles its neighbour in the same source tree.
- Our own modules (`gpuguard.code.modules`) are trained on too, each family in one fold: look-alikes that the table
  lacks, and families of mining of which it has but one project. They are few, and each stands for a kind of code, so
  they weigh more. Figures on the table and on them are kept apart.
- Hashing kernels are also shown with dead float code, at a third of the weight: what costs the miner next to nothing
  must not help him.
- NVIDIA's own libraries can be put on the allow list, so they are not scored on: neither thresholds nor figures are
  read off them. They are trained on, at less weight, since not everybody has such a list, and a forest that has seen
  what integer work is there needs fewer look-alikes to know it elsewhere.
- Signs are constrained where the direction is known (more xor, rotates and straight-line work cannot make a kernel
  more innocent; more float work, compares and branches cannot make it guiltier). What is constrained cannot be learnt
  the wrong way round from one project, and cannot be gamed that way.
- Each kernel is also shown thinned to a window's length, so that the forest holds for parts and does not lean on shares
  that only long kernels give exactly.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gpuguard.code import dataset, evaluation, modules
from gpuguard.code.classify import Calibration
from gpuguard.code.rows import WINDOW_INSTRUCTIONS
from gpuguard.kernels import opcodes
from gpuguard.kernels.opcodes import COLUMN, FEATURE_NAMES, MNEMONICS, Forest

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gpuguard.code.dataset import Kernels

SEEDS = (0, 1)
THINNED_COPIES = 1
#: How much a hashing kernel with dead float code counts in training, and between which shares the code lies.
DILUTED_WEIGHT = 0.3
DILUTED_SHARES = (0.25, 2.5)
#: How much a kernel of an allow-listed library counts, a look-alike of ours, and a hashing kernel of ours.
LISTED_WEIGHT = 0.5
LOOK_ALIKE_WEIGHT = 3.0
OWN_HASHING_WEIGHT = 6.0
ROUNDS = 400
PARAMETERS = {
    "objective": "binary", "verbosity": -1, "learning_rate": 0.04, "num_leaves": 12, "min_data_in_leaf": 10,
    "feature_fraction": 0.15, "bagging_fraction": 0.8, "bagging_freq": 1, "lambda_l2": 10.0, "path_smooth": 5.0,
    "deterministic": True, "force_row_wise": True, "monotone_constraints_method": "intermediate", "num_threads": 1,
}

_MORE_IS_HASHING = ("xor", "rotate", "mix", "choose", "logic", "lop3_op", "rot_", "lop_xor", "lop_ch", "lop_maj",
                    "prmt_rot", "prmt_swap", "arithmetic", "shf_and")
_MORE_IS_OTHER = ("float", "compare", "control", "tensor", "convert", "memory_ratio", "memory_against", "bra_", "isetp",
                  "ffma", "fadd", "fmul", "mufu", "n_ctrl", "sync", "warp_", "global_load", "global_store")


def constraints(names: Sequence[str]) -> list[int]:
    """Return +1, -1 or 0 for each feature: the direction in which it may move the score."""
    return [-1 if name.startswith(_MORE_IS_OTHER) else 1 if name.startswith(_MORE_IS_HASHING) else 0 for name in names]


def balanced(hashing: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Return weights of which both classes have the same sum, so that the score has no prior in it."""
    out = weight.astype(float)
    for label in (False, True):
        out[hashing == label] *= 0.5 * len(hashing) / max(out[hashing == label].sum(), 1)
    return out


def weights(kernels: Kernels) -> np.ndarray:
    """Return how much each kernel counts in training, before classes are balanced."""
    own = np.where(kernels.hashing, OWN_HASHING_WEIGHT, LOOK_ALIKE_WEIGHT)
    return np.where(kernels.own(), own, np.where(kernels.listed(), LISTED_WEIGHT, 1.0))


def fit(kernels: Kernels, use: np.ndarray, seeds: Sequence[int] = SEEDS) -> Forest:
    """Train on some kernels, their thinned and diluted copies; return the mean of one forest a seed as one forest."""
    import lightgbm

    table, hashing, counts = kernels.table[use], kernels.hashing[use], weights(kernels)[use]
    shown = np.concatenate([table, *(thinned(table, copy) for copy in range(THINNED_COPIES)), diluted(table[hashing])])
    told = np.concatenate([np.tile(hashing, 1 + THINNED_COPIES), np.ones(int(hashing.sum()), bool)])
    weight = np.concatenate([np.tile(counts, 1 + THINNED_COPIES), DILUTED_WEIGHT * counts[hashing]])
    data = lightgbm.Dataset(opcodes.features_reference(shown), told.astype(int), weight=balanced(told, weight),
                            free_raw_data=False)
    boosters = [lightgbm.train({**PARAMETERS, "seed": seed, "monotone_constraints": constraints(FEATURE_NAMES)},
                               data, ROUNDS) for seed in seeds]
    return flatten([tree["tree_structure"] for one in boosters for tree in one.dump_model()["tree_info"]],
                   1 / len(seeds))


def flatten(trees: Sequence[dict[str, Any]], scale: float) -> Forest:
    """Return LightGBM's nested trees as flat arrays, parents before children."""
    nodes: list[tuple[int, float, int, int, float]] = []
    roots = []
    for tree in trees:
        roots.append(len(nodes))
        waiting = [(tree, -1, "left")]
        links: dict[tuple[int, str], int] = {}
        first = len(nodes)
        while waiting:
            node, parent, side = waiting.pop()
            links[parent, side] = len(nodes)
            if "leaf_value" in node:
                nodes.append((-1, 0.0, -1, -1, node["leaf_value"] * scale))
                continue
            if node["decision_type"] != "<=":
                raise ValueError(f"a split by {node['decision_type']}")
            waiting += [(node["left_child"], len(nodes), "left"), (node["right_child"], len(nodes), "right")]
            nodes.append((node["split_feature"], not_above(node["threshold"]), -1, -1, 0.0))
        for at in range(first, len(nodes)):
            if nodes[at][0] >= 0:
                nodes[at] = (*nodes[at][:2], links[at, "left"], links[at, "right"], 0.0)
    feature, threshold, left, right, value = zip(*nodes, strict=True)
    return Forest(np.array(feature, np.int32), np.array(threshold, np.float32), np.array(left, np.int32),
                  np.array(right, np.int32), np.array(value, np.float64), np.array(roots, np.int32), 0.0)


def not_above(threshold: float) -> float:
    """Return the largest float32 not above a threshold: x <= it then means the same for every float32 x."""
    near = np.float32(threshold)
    return float(near if near <= threshold else np.nextafter(near, np.float32(-np.inf)))


def thinned(table: np.ndarray, seed: int) -> np.ndarray:
    """Return each kernel's counts as a sample of a window's length would have them."""
    dice = np.random.default_rng(seed)
    keep = np.minimum(1.0, WINDOW_INSTRUCTIONS / np.maximum(table[:, :1], 1))
    out = dice.binomial(table.astype(np.int64), keep).astype(np.float64)
    return _summed(out)


def diluted(table: np.ndarray) -> np.ndarray:
    """Return the counts of kernels with dead float code of a random share of their length each."""
    return with_dead_float(table, np.random.default_rng(0).uniform(*DILUTED_SHARES, len(table)))


def with_dead_float(table: np.ndarray, share: float | np.ndarray) -> np.ndarray:
    """Return the counts of kernels to which float instructions were added, a share of their length."""
    out = table.copy()
    out[:, COLUMN["FFMA"]] += np.round(share * table[:, COLUMN["total"]])
    return _summed(out)


def _summed(table: np.ndarray) -> np.ndarray:
    """Return counts with their sums made anew, in place."""
    own = table[:, 1:2 + len(MNEMONICS)]
    table[:, COLUMN["total"]] = own.sum(axis=1)
    commonest = np.sort(own, axis=1)
    table[:, COLUMN["top"]], table[:, COLUMN["top3"]] = commonest[:, -1], commonest[:, -3:].sum(axis=1)
    return table


def out_of_fold(kernels: Kernels, parts: tuple[np.ndarray, np.ndarray] | None = None, seeds: Sequence[int] = SEEDS,
                progress: Callable[[str], object] = print) -> dict[str, np.ndarray]:
    """Return scores of every kernel, whole, thinned and with dead float code, by forests that saw none of its group.

    ``parts``: counts of windows and loops and the kernel of each; scored as "parts", and as "parts_float_0.5" with
    float code interleaved.
    """
    fold = dataset.folds(kernels)
    forms = {"whole": kernels.table, "thinned": thinned(kernels.table, THINNED_COPIES),
             **{f"float_{share}": with_dead_float(kernels.table, share) for share in evaluation.DEAD_FLOAT_SHARES}}
    of_form = dict.fromkeys(forms, fold)
    if parts is not None:
        forms |= {"parts": parts[0], **{f"parts_float_{share}": with_dead_float(parts[0], share)
                                        for share in evaluation.DEAD_FLOAT_SHARES}}
        of_form |= {name: fold[parts[1]] for name in forms if name.startswith("parts")}
    out = {name: np.zeros(len(table)) for name, table in forms.items()}
    for k in range(fold.max() + 1):
        forest = fit(kernels, np.flatnonzero(fold != k), seeds)
        for name, table in forms.items():
            rest = of_form[name] == k
            out[name][rest] = opcodes.scores(opcodes.features_reference(table[rest]), forest, "cpu")[0]
        progress(f"fold {k + 1} of {fold.max() + 1}")
    return out


def calibrate(kernels: Kernels, score: np.ndarray, accuse_score: float) -> Calibration:
    """Return Platt's line through out-of-fold scores, classes balanced and each group weighing as the root of its size.

    Balanced classes make the line a log-likelihood ratio. Newton's method for two parameters.
    """
    use = ~kernels.listed()
    x, y, group = score[use], kernels.hashing[use].astype(float), kernels.group[use]
    weight = np.array([1 / math.sqrt((group == name).sum()) for name in group])
    for label in (0.0, 1.0):
        weight[y == label] *= 0.5 / weight[y == label].sum()
    design = np.stack([x, np.ones_like(x)], axis=1)
    line = np.zeros(2)
    for _ in range(50):
        p = 1 / (1 + np.exp(-design @ line))
        hessian = (design * (weight * p * (1 - p))[:, None]).T @ design + 1e-9 * np.eye(2)
        line += np.linalg.solve(hessian, design.T @ (weight * (y - p)))
    return Calibration(float(line[0]), float(line[1]), float(line[0] * accuse_score + line[1]))


def write_model(path: Path, forest: Forest, curves: dict[str, Calibration]) -> None:
    """Write the model as plain arrays."""
    arrays: dict[str, Any] = {f"{kind}_calibration": np.array(curve) for kind, curve in curves.items()}
    np.savez_compressed(path, feature_names=np.array(FEATURE_NAMES), **forest._asdict(), **arrays)


def measured(data: Path, own: Path, told: Path,
             progress: Callable[[str], object] = print) -> tuple[Kernels, dict[str, Calibration], dict[str, Any]]:
    """Return all kernels, the two calibrations, and the figures: everything but the model itself."""
    kernels = dataset.load(data).joined(modules.load(own, told))
    parts = kernels.parts()
    scores = out_of_fold(kernels, parts, progress=progress)
    curves = {name: calibrate(kernels, scores[form], evaluation.pooled_threshold(kernels, scores[form]))
              for name, form in (("whole", "whole"), ("part", "thinned"))}
    return kernels, curves, evaluation.evaluate(kernels, scores, parts[1], curves)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, evaluate, and write the model, its scores and its card."""
    from gpuguard.code.card import card

    parser = argparse.ArgumentParser(prog="python -m gpuguard.code.train", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="kernels.csv.gz")
    parser.add_argument("--own", type=Path, required=True, help="folder of our own cubins (make fixtures-matrix)")
    parser.add_argument("--families", type=Path, default=Path("tests/fixtures/cuda/families.csv"))
    parser.add_argument("--out", type=Path, required=True, help="folder of code_forest.npz and code_forest.md")
    asked = parser.parse_args(arguments)
    kernels, curves, result = measured(asked.data, asked.own, asked.families)
    write_model(asked.out / "code_forest.npz", fit(kernels, np.arange(len(kernels.facts))), curves)
    result["trained"] = datetime.now(UTC).date().isoformat()
    (asked.out / "code_forest.md").write_text(card(result))
    sys.stdout.write(json.dumps(result["figures"], indent=2) + "\n")


if __name__ == "__main__":
    main()
