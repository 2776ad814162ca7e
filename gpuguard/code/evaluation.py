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

from gpuguard.code import structures
from gpuguard.code.classify import AES_WORDS_MIN, Model, best_parts, grey_class, judge_kernels, table_hits
from gpuguard.code.classify import Kernels as Scored
from gpuguard.code.dataset import ALLOW_LISTED, Kernels, folds
from gpuguard.kernels.opcodes import Forest

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from gpuguard.code.classify import Calibration

FPR_MAX = 1e-3
#: Dead float code that a hashing kernel is given, as shares of its length.
DEAD_FLOAT_SHARES = (0.5, 2.0)
DRAWS = 500
TARGETS = {"auc": 0.985, "module_recall": 0.95, "masked_module_recall": 0.88, "projects_missed": 1,
           "dilution_points": 5.0}
#: Prefix of a figure's name: with constants, with grey names, with crossed thresholds.
_WAYS = (("", True, True, False), ("masked_", False, True, False), ("no_grey_masked_", False, False, False),
         ("crossed_", True, True, True), ("crossed_masked_", False, True, True))


class Judged(NamedTuple):
    """What is known before a threshold of each kernel of the table that is not allow-listed.

    Score, constants, structures, grey or not.
    """

    score: np.ndarray
    hits: np.ndarray
    borne: np.ndarray
    grey: np.ndarray
    grey_masked: np.ndarray
    hashing: np.ndarray
    group: np.ndarray
    project: np.ndarray
    module: np.ndarray
    fold: np.ndarray


def of_table(kernels: Kernels) -> np.ndarray:
    """Return which kernels are of the table, and not allow-listed."""
    out: np.ndarray = ~kernels.listed() & ~kernels.own()
    return out


def judged(kernels: Kernels, score: np.ndarray, suspicious_score: float = 0.0) -> Judged:
    """Return the kernels that are not allow-listed, with all but the threshold applied.

    ``suspicious_score`` is the score that weighs nothing: above it shape alone may name a grey class. Before
    calibration it is 0, since both classes weigh the same in training.
    """
    use = np.flatnonzero(of_table(kernels))
    borne = np.array([bool(some) for some in structures.found(kernels.table[use])])
    hits, grey, masked = [], [], []
    for i in use:
        suspicious = bool(score[i] > suspicious_score)
        tables = kernels.facts[i].tables
        hits.append(bool(table_hits(tables)))
        grey.append(not hits[-1] and _is_grey(tables, kernels.table[i], suspicious=suspicious))
        masked.append(_is_grey({} if kernels.hashing[i] else tables, kernels.table[i], suspicious=suspicious))
    return Judged(score[use], np.array(hits), borne, np.array(grey), np.array(masked), kernels.hashing[use],
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
    hits = of.hits | of.borne
    return threshold(np.where(of.grey | hits, -np.inf, of.score)[~of.hashing], int((hits & ~of.hashing).sum()))


def accuse(of: Judged, *, constants: bool, grey: bool, crossed: bool) -> np.ndarray:
    """Return which kernels are accused."""
    named = (of.grey if constants else of.grey_masked) if grey else np.zeros(len(of.score), bool)
    # Masked: an attacker hides his words; benign hashing code does not, and is accused for it.
    hits = of.borne | (of.hits if constants else of.hits & ~of.hashing)
    own = np.where(named | hits, -np.inf, of.score)
    if not crossed:
        pooled: np.ndarray = (own > threshold(own[~of.hashing], int((hits & ~of.hashing).sum()))) | hits
        return pooled
    out: np.ndarray = hits.copy()
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


def evaluate(kernels: Kernels, scores: dict[str, np.ndarray], owners: np.ndarray,
             curves: Mapping[str, Calibration]) -> dict[str, Any]:
    """Return all figures with their intervals, a table per project, and what was found of our own modules.

    ``owners`` is the kernel of each part that was scored.
    """
    of = judged(kernels, scores["whole"], -curves["whole"].intercept / curves["whole"].slope)
    table = of_table(kernels)
    small = of._replace(score=scores["thinned"][table])
    measures: dict[str, Callable[[Judged], float]] = {"auc": auc}
    for name, constants, grey, crossed in _WAYS:
        accused = functools.partial(accuse, constants=constants, grey=grey, crossed=crossed)
        measures[f"{name}module_recall"] = functools.partial(_module_recall, accused)
        measures[f"{name}kernel_recall"] = functools.partial(_kernel_recall, accused)
        measures[f"{name}fpr"] = functools.partial(_fpr, accused)
        measures[f"{name}nats"] = functools.partial(_nats, accused)
    dice = np.random.default_rng(0)
    draws = [drawn(of, dice) for _ in range(DRAWS)]
    figures = {name: with_interval(measure, of, draws) for name, measure in measures.items()}
    figures["window_sized_auc"] = with_interval(auc, small, [])
    figures["window_sized_masked_module_recall"] = with_interval(measures["masked_module_recall"], small, [])
    for share in DEAD_FLOAT_SHARES:
        late = of._replace(score=np.where(of.hashing, scores[f"float_{share}"][table], of.score))
        figures[f"masked_module_recall_float_{share}"] = with_interval(measures["masked_module_recall"], late, [])
    plain = of._replace(borne=np.zeros(len(of.borne), bool))
    for name in ("module_recall", "masked_module_recall"):
        figures[f"{name}_without_structures"] = with_interval(measures[name], plain, [])
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
        "structures": structures_found(kernels), "own": own_modules(kernels, scores, owners, curves),
    }


def structures_found(kernels: Kernels) -> list[dict[str, Any]]:
    """Return of each signature how many kernels bear it, of the table (allow-listed ones too) and of our own.

    ``nats`` is the log-likelihood ratio on all of them, half a kernel added to each count, with the 95 % interval that
    counts so small allow (Katz); kernels of one project are alike, so it is too narrow.
    """
    own, hashing = kernels.own(), kernels.hashing
    out = []
    for one in structures.STRUCTURES:
        bears = one.test(kernels.table)
        yes, no = int((bears & hashing).sum()) + 0.5, int((bears & ~hashing).sum()) + 0.5
        of_yes, of_no = int(hashing.sum()) + 1, int((~hashing).sum()) + 1
        nats, width = np.log(yes / of_yes / (no / of_no)), 1.96 * np.sqrt(1 / yes - 1 / of_yes + 1 / no - 1 / of_no)
        out.append({
            "name": one.name, "hashing": int((bears & hashing & ~own).sum()),
            "benign": int((bears & ~hashing & ~own).sum()), "own_hashing": int((bears & hashing & own).sum()),
            "own_benign": int((bears & ~hashing & own).sum()), "nats": round(float(nats), 2),
            "low": round(float(nats - width), 2), "high": round(float(nats + width), 2)})
    return out


def own_modules(kernels: Kernels, scores: Mapping[str, np.ndarray], owners: np.ndarray,
                curves: Mapping[str, Calibration]) -> dict[str, Any]:
    """Return what is found of our own modules, each family by a forest that was trained without it.

    "whole", "parts" and "structures" are what each sees alone, before a grey name; "masked" and "found" are verdicts,
    without and with the constants of hashing kernels.
    """
    at = np.flatnonzero(kernels.own())
    if not len(at):
        return {}
    trained = Model(_NO_FOREST, curves["whole"], curves["part"])
    hashing, module, group = kernels.hashing[at], kernels.module[at], kernels.group[at]
    plain = _scored(kernels, at, scores, owners, constants=True)
    labels = {"masked": _labels(_scored(kernels, at, scores, owners), trained), "found": _labels(plain, trained),
              **{f"masked_float_{share}": _labels(_scored(kernels, at, scores, owners, f"float_{share}"), trained)
                 for share in DEAD_FLOAT_SHARES}}
    best = [-np.inf if one is None else one.nats for one in best_parts(plain, trained)]
    accused = {
        "whole": np.array([curves["whole"].nats(one) for one in plain.scores]) >= curves["whole"].accuse_nats,
        "parts": np.array(best) >= curves["part"].accuse_nats,
        "structures": np.array([bool(some) for some in structures.found(plain.counts)]),
        **{way: np.isin(some, ("mining", "cracking")) for way, some in labels.items()}}
    families = []
    for name in sorted(set(group[hashing])):
        mine = hashing & (group == name)
        families.append({"family": str(name).removeprefix("own-"), "modules": len(set(module[mine])),
                         **{way: len(set(module[mine & some])) for way, some in accused.items()}})
    named, counts = np.unique(labels["found"][~hashing], return_counts=True)
    return {
        "modules": len(set(module)), "hashing_modules": sum(one["modules"] for one in families), "families": families,
        "recall": {way: _by_family(families, way) for way in accused},
        "benign_kernels": int((~hashing).sum()),
        "benign_labels": dict(zip(named.tolist(), counts.tolist(), strict=True)),
        "false_positives": {way: sorted(set(module[some & ~hashing].tolist())) for way, some in accused.items()},
    }


_NO_FOREST = Forest(feature=np.empty(0), threshold=np.empty(0), left=np.empty(0), right=np.empty(0),
                    value=np.empty(0), root=np.empty(0), base=0.0)


def _scored(kernels: Kernels, at: np.ndarray, scores: Mapping[str, np.ndarray], owners: np.ndarray,
            form: str = "", *, constants: bool = False) -> Scored:
    """Return kernels as a scan hands them in; ``form``: hashing ones, and their parts, with float code."""
    whole, part = scores["whole"], scores["parts"]
    if form:
        whole = np.where(kernels.hashing, scores[form], whole)
        part = np.where(kernels.hashing[owners], scores[f"parts_{form}"], part)
    return Scored(
        counts=kernels.table[at], scores=whole[at],
        tables=[kernels.facts[i].tables if constants or not kernels.hashing[i] else {} for i in at.tolist()],
        part_scores=part, part_ends=np.cumsum(np.bincount(owners, minlength=len(kernels.facts))[at]),
        part_firsts=np.zeros(len(part), np.int64), part_loops=np.zeros(len(part), bool))


def _labels(some: Scored, trained: Model) -> np.ndarray:
    return np.array([one.label for one in judge_kernels(some, trained)])


def _by_family(families: Sequence[Mapping[str, Any]], way: str) -> dict[str, float]:
    """Return the share of modules found, with a bootstrap over families."""
    dice = np.random.default_rng(0)
    found = np.array([one[way] for one in families])
    every = np.array([one["modules"] for one in families])
    picks = dice.integers(0, len(families), (DRAWS, len(families)))
    low, high = np.percentile(found[picks].sum(1) / every[picks].sum(1), [2.5, 97.5])
    return {"value": round(float(found.sum() / every.sum()), 4), "low": round(float(low), 4),
            "high": round(float(high), 4)}


def _module_recall(accused: Callable[[Judged], np.ndarray], of: Judged) -> float:
    return recall(of, accused(of), of.module)


def _kernel_recall(accused: Callable[[Judged], np.ndarray], of: Judged) -> float:
    return float(accused(of)[of.hashing].mean())


def _fpr(accused: Callable[[Judged], np.ndarray], of: Judged) -> float:
    return float(accused(of)[~of.hashing].mean())


def _nats(accused: Callable[[Judged], np.ndarray], of: Judged) -> float:
    """Return the log-likelihood ratio of an accusation, half a kernel added to each count."""
    said, hashing = accused(of), of.hashing
    yes, no = (said & hashing).sum() + 0.5, (said & ~hashing).sum() + 0.5
    return float(np.log(yes / (hashing.sum() + 1) / (no / ((~hashing).sum() + 1))))


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
    use = np.flatnonzero(of_table(kernels))
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
