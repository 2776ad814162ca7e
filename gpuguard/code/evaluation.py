"""What the kernel classifier can do, measured on kernels of projects it has not seen.

Every score comes from a forest that saw no kernel of the same group (project, forks merged). Thresholds are read two
ways: *pooled*, off all benign out-of-fold scores, which is what a false positive rate on this very set means; and
*crossed*, for each fold off the benign scores of the other folds only, so that no threshold has seen what it is applied
to: the rate that then comes out is reported beside the recall. Intervals are 95 % bootstraps over groups, hashing and
benign ones drawn apart, since kernels of one project are alike; the threshold is read anew in each draw.

"Module" is one compiled file; it is found if any of its kernels is accused. "Masked" means that the attacker's
constants are gone: those of hashing kernels are ignored, benign code keeps its own.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from gpuguard.code.classify import AES_WORDS_MIN, grey_class, table_hits
from gpuguard.code.train import ALLOW_LISTED, DEAD_FLOAT_SHARES, FPR_MAX, Kernels, folds

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from gpuguard.code.classify import Calibration

DRAWS = 500
TARGETS = {"auc": 0.985, "module_recall": 0.95, "masked_module_recall": 0.88, "projects_missed": 1}


#: Prefix of a figure's name: with constants, with grey names, with crossed thresholds.
_WAYS = (("", True, True, False), ("masked_", False, True, False), ("no_grey_masked_", False, False, False),
         ("crossed_", True, True, True), ("crossed_masked_", False, True, True))


class Judged(NamedTuple):
    """What is known of each kernel outside the allow list before a threshold: score, constants, grey or not."""

    score: np.ndarray
    hits: np.ndarray
    grey: np.ndarray
    grey_masked: np.ndarray
    hashing: np.ndarray
    group: np.ndarray
    project: np.ndarray
    module: np.ndarray
    fold: np.ndarray


def judged(kernels: Kernels, score: np.ndarray, suspicious_score: float = 0.0) -> Judged:
    """Return the kernels that are not allow-listed, with all but the threshold applied.

    ``suspicious_score`` is the score that weighs nothing: above it shape alone may name a grey class. Before
    calibration it is 0, since both classes weigh the same in training.
    """
    use = np.flatnonzero(~kernels.listed())
    hits, grey, masked = [], [], []
    for i in use:
        suspicious = bool(score[i] > suspicious_score)
        tables = kernels.facts[i].tables
        hits.append(bool(table_hits(tables)))
        grey.append(not hits[-1] and _is_grey(tables, kernels.table[i], suspicious=suspicious))
        masked.append(_is_grey({} if kernels.hashing[i] else tables, kernels.table[i], suspicious=suspicious))
    return Judged(score[use], np.array(hits), np.array(grey), np.array(masked), kernels.hashing[use],
                  kernels.group[use], kernels.project[use], kernels.module[use], folds(kernels)[use])


def _is_grey(tables: Mapping[str, int], counts: np.ndarray, *, suspicious: bool) -> bool:
    # As of an accused kernel: what only names kernels below the threshold changes no accusation.
    return grey_class(tables, counts, accused=True, suspicious=suspicious) is not None


def threshold(benign: np.ndarray, spent: int) -> float:
    """Return the score above which at most FPR_MAX of benign scores lie, less those already spent on constants."""
    allowed = max(int(FPR_MAX * len(benign)) - spent, 0)
    return float(np.sort(benign)[::-1][allowed]) if len(benign) > allowed else -np.inf


def pooled_threshold(kernels: Kernels, score: np.ndarray) -> float:
    """Return the score above which at most FPR_MAX of the benign kernels lie: not listed, not of a grey class."""
    of = judged(kernels, score)
    return threshold(np.where(of.grey | of.hits, -np.inf, of.score)[~of.hashing], int((of.hits & ~of.hashing).sum()))


def accuse(of: Judged, *, constants: bool, grey: bool, crossed: bool) -> np.ndarray:
    """Return which kernels are accused."""
    named = (of.grey if constants else of.grey_masked) if grey else np.zeros(len(of.score), bool)
    # Masked: an attacker hides his words; benign hashing code does not, and is accused for it.
    hits = of.hits if constants else of.hits & ~of.hashing
    own = np.where(named | hits, -np.inf, of.score)
    if not crossed:
        pooled: np.ndarray = (own > threshold(own[~of.hashing], int((hits & ~of.hashing).sum()))) | hits
        return pooled
    out = hits.copy()
    for k in np.unique(of.fold):
        rest = ~of.hashing & (of.fold != k)
        here = of.fold == k
        out[here] |= own[here] > threshold(own[rest], int((hits & rest).sum()))
    return out


def auc(of: Judged) -> float:
    """Return the area under the ROC curve of the ranker alone: no constants, no grey names."""
    _, place, times = np.unique(of.score, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(times) - (times - 1) / 2)[place]
    hashing, benign = int(of.hashing.sum()), int((~of.hashing).sum())
    return float((ranks[of.hashing].sum() - hashing * (hashing + 1) / 2) / (hashing * benign))


def recall(of: Judged, accused: np.ndarray, names: np.ndarray) -> float:
    """Return the share of hashing modules, projects or kernels of which one kernel is accused."""
    every = set(names[of.hashing].tolist())
    return len(set(names[of.hashing & accused].tolist())) / len(every)


def drawn(of: Judged, dice: np.random.Generator) -> Judged:
    """Return a draw of whole groups with replacement; a group drawn twice counts twice."""
    picked, copies = [], []
    for side in (of.hashing, ~of.hashing):
        groups = np.unique(of.group[side])
        for n, name in enumerate(dice.choice(groups, len(groups))):
            at = np.flatnonzero(side & (of.group == name))
            picked.append(at)
            copies.append(np.full(len(at), n))
    at, copy = np.concatenate(picked), np.concatenate(copies)
    some = Judged(*(part[at] for part in of))
    module = np.char.add(some.module, np.char.add("#", copy.astype(str)))
    return some._replace(module=module)


def evaluate(kernels: Kernels, scores: dict[str, np.ndarray], curve: Calibration) -> dict[str, Any]:
    """Return all figures with their intervals, and a table per project."""
    of = judged(kernels, scores["whole"], -curve.intercept / curve.slope)
    small = of._replace(score=scores["thinned"][~kernels.listed()])
    measures: dict[str, Callable[[Judged], float]] = {"auc": auc}
    for name, constants, grey, crossed in _WAYS:
        accused = functools.partial(accuse, constants=constants, grey=grey, crossed=crossed)
        measures[f"{name}module_recall"] = functools.partial(_module_recall, accused)
        measures[f"{name}kernel_recall"] = functools.partial(_kernel_recall, accused)
        measures[f"{name}fpr"] = functools.partial(_fpr, accused)
    dice = np.random.default_rng(0)
    draws = [drawn(of, dice) for _ in range(DRAWS)]
    figures = {name: with_interval(measure, of, draws) for name, measure in measures.items()}
    figures["window_sized_auc"] = with_interval(auc, small, [])
    figures["window_sized_masked_module_recall"] = with_interval(measures["masked_module_recall"], small, [])
    for share in DEAD_FLOAT_SHARES:
        late = of._replace(score=np.where(of.hashing, scores[f"float_{share}"][~kernels.listed()], of.score))
        figures[f"masked_module_recall_float_{share}"] = with_interval(measures["masked_module_recall"], late, [])
    ciphers = of._replace(hits=of.hits | aes_hits(kernels))
    figures["module_recall_aes_as_hash"] = with_interval(measures["module_recall"], ciphers, [])
    return {
        "figures": figures, "targets": TARGETS, "allow_listed": list(ALLOW_LISTED),
        "allow_listed_above_threshold": vendor_fpr(kernels, scores["whole"], of),
        "kernels": {"hashing": int(of.hashing.sum()), "benign": int((~of.hashing).sum())},
        "groups": {"hashing": len(set(of.group[of.hashing])), "benign": len(set(of.group[~of.hashing]))},
        "modules": len(set(of.module[of.hashing])),
        "projects_missed": missed(of, constants=True), "projects_missed_masked": missed(of, constants=False),
        "modules_missed": sorted(set(of.module[of.hashing].tolist())
                                 - set(of.module[of.hashing & accuse(of, constants=True, grey=True, crossed=False)])),
        "projects": per_project(of), "false_positives": false_positives(of),
    }


def _module_recall(accused: Callable[[Judged], np.ndarray], of: Judged) -> float:
    return recall(of, accused(of), of.module)


def _kernel_recall(accused: Callable[[Judged], np.ndarray], of: Judged) -> float:
    return float(accused(of)[of.hashing].mean())


def _fpr(accused: Callable[[Judged], np.ndarray], of: Judged) -> float:
    return float(accused(of)[~of.hashing].mean())


def with_interval(measure: Callable[[Judged], float], of: Judged, draws: list[Judged]) -> dict[str, float]:
    """Return a figure with the middle 95 % of what draws of groups give, if there are any."""
    if not draws:
        return {"value": round(measure(of), 4)}
    low, high = np.percentile([measure(one) for one in draws], [2.5, 97.5])
    return {"value": round(measure(of), 4), "low": round(float(low), 4), "high": round(float(high), 4)}


def vendor_fpr(kernels: Kernels, score: np.ndarray, of: Judged) -> float:
    """Return the share of allow-listed kernels that would be above the threshold if a new build were not yet listed."""
    benign = np.where(of.grey | of.hits, -np.inf, of.score)[~of.hashing]
    return round(float((score[kernels.listed()] > threshold(benign, int((of.hits & ~of.hashing).sum()))).mean()), 5)


def missed(of: Judged, *, constants: bool) -> list[str]:
    """Return the hashing projects without an accused kernel."""
    found = of.hashing & accuse(of, constants=constants, grey=True, crossed=False)
    return sorted(set(of.project[of.hashing].tolist()) - set(of.project[found].tolist()))


def aes_hits(kernels: Kernels) -> np.ndarray:
    """Return which kernels outside the allow list carry AES tables: a hash for whoever does not call that grey."""
    use = np.flatnonzero(~kernels.listed())
    return np.array([kernels.facts[i].tables.get("aes", 0) >= AES_WORDS_MIN for i in use])


def false_positives(of: Judged) -> dict[str, int]:
    """Return how many benign kernels of each project are accused."""
    accused = accuse(of, constants=True, grey=True, crossed=False) & ~of.hashing
    names, counts = np.unique(of.project[accused], return_counts=True)
    return dict(zip(names.tolist(), counts.tolist(), strict=True))


def per_project(of: Judged) -> list[dict[str, Any]]:
    """Return what was found of each hashing project, by the mix alone and with constants."""
    ways = {"masked": accuse(of, constants=False, grey=True, crossed=False),
            "found": accuse(of, constants=True, grey=True, crossed=False)}
    out: list[dict[str, Any]] = []
    for name in sorted(set(of.project[of.hashing].tolist())):
        mine = of.hashing & (of.project == name)
        row: dict[str, Any] = {"project": name, "kernels": int(mine.sum()), "modules": len(set(of.module[mine]))}
        for way, accused in ways.items():
            row[f"kernels_{way}"] = int((mine & accused).sum())
            row[f"modules_{way}"] = len(set(of.module[mine & accused]))
        out.append(row)
    return out


def card(result: dict[str, Any]) -> str:
    """Return the model card."""
    figures = result["figures"]

    def line(text: str, name: str) -> str:
        one = figures[name]
        interval = f"{one['low']:.4f} to {one['high']:.4f}" if "low" in one else ""
        return f"| {text} | {one['value']:.4f} | {interval} |"

    columns = ("project", "kernels", "modules", "kernels_masked", "modules_masked", "kernels_found", "modules_found")
    rows = "\n".join(f"| {' | '.join(str(one[name]) for name in columns)} |" for one in result["projects"])
    lines = "\n".join(line(text, name) for text, name in _LINES)
    return _CARD.format(
        lines=lines, rows=rows, trained=result["trained"], allowed=", ".join(result["allow_listed"]),
        vendor=f"{result['allow_listed_above_threshold']:.2%}", **result["kernels"],
        hashing_groups=result["groups"]["hashing"], benign_groups=result["groups"]["benign"],
        modules=result["modules"], missed="\n".join(f"- {name}" for name in result["modules_missed"]),
        positives=", ".join(f"{name} {count}" for name, count in result["false_positives"].items()) or "none")


_LINES = (
    ("AUC of the whole-kernel ranker, mix alone", "auc"),
    ("module recall, constants included, at kernel FPR <= 1e-3", "module_recall"),
    ("kernel recall, the same", "kernel_recall"),
    ("FPR, the same", "fpr"),
    ("module recall, constants masked", "masked_module_recall"),
    ("kernel recall, constants masked", "masked_kernel_recall"),
    ("module recall, constants masked, no grey names", "no_grey_masked_module_recall"),
    ("module recall, thresholds crossed, constants included", "crossed_module_recall"),
    ("FPR that came out, the same", "crossed_fpr"),
    ("module recall, thresholds crossed, constants masked", "crossed_masked_module_recall"),
    ("FPR that came out, the same", "crossed_masked_fpr"),
    ("module recall, constants included, AES tables taken for a hash, not a cipher", "module_recall_aes_as_hash"),
    ("module recall, masked, dead float code of 0.5 x the kernel", "masked_module_recall_float_0.5"),
    ("module recall, masked, dead float code of 2 x the kernel", "masked_module_recall_float_2.0"),
    ("AUC on kernels thinned to 192 instructions", "window_sized_auc"),
    ("module recall of the same, constants masked", "window_sized_masked_module_recall"),
)

_CARD = """# code_forest: what GPU kernels are, by opcode counts

`code_forest.npz` holds gradient-boosted trees as plain arrays, and two lines from score to nats with the weight from
which on the mix accuses: for whole kernels, and for windows and loops. `gpuguard.code.classify` reads it. Made
{trained} by

    python -m gpuguard.code.train --data kernels.csv.gz --out models/

with fixed seeds (extra `train`: LightGBM); `make bench-code-ranker` measures it again.

## Data and split
Numbers only (opcode histograms, derived counts, constants found), no code: {hashing} hashing kernels of
{hashing_groups} groups ({modules} modules) and {benign} benign ones of {benign_groups} groups, each of 64 instructions
or more. A group is a project with its forks. Nine folds, whole groups left out, one hashing group in each. Labels are
per project: a miner's scan, memset and result checks count as hashing. Allow-listed, neither trained nor scored on:
{allowed}.

## Figures
Out of fold; intervals are 95 % bootstraps over groups. "Crossed": the threshold of each fold is read off the benign
scores of the other folds only. Elsewhere it is read off the pooled benign scores, which is optimistic.

| figure | value | 95 % |
| --- | --- | --- |
{lines}

False positives, constants included: {positives}.

Were the allow-listed libraries not listed, {vendor} of their kernels would lie above the threshold.

| project | kernels | modules | kernels, masked | modules, masked | kernels, constants | modules, constants |
| --- | --- | --- | --- | --- | --- | --- |
{rows}

Modules missed with constants included:

{missed}

## What it does not show
- Few groups: one family (ccminer) has two thirds of the modules, so the intervals are wide, and a change of seed moves
  module recall by two or three modules.
- Features, constraints and form were chosen among some twenty on figures like these (larger and smaller trees, random
  forests, other weights of groups, features of length): most came to AUC 0.984 to 0.990 and masked module recall 0.86
  to 0.94, so the choice is worth one or two points of optimism. Training on positives mixed with benign code was worse.
- The grey classes that shape alone names (bit-wise CRC, linear generators, table ciphers, unpacking) were bounded
  after looking at this data; the row "no grey names" is without any of them. `crc32`, `mt19937` and `chacha` words
  occur nowhere in it: those three rules are unmeasured.
- No windows and no loops are in the table: parts are measured on thinned counts, not on real parts, and the
  correction for the best of many parts is an upper bound, not a fit.
- Mining and cracking are told apart by tables of constants only; a mix that hashes is called mining.
- AES tables are a grey class: CryptoNight's main kernels are AES and are named `grey:cipher`.
- Cuckoo, Equihash, RandomX and Autolykos main loops look like sorting; what is found of them is the side kernels.
"""
