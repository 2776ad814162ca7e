"""Scores of kernels, windows and loops straight from a decoder's counts, for whoever has a hundred thousand of them.

The same numbers as `opcodes.features` and `opcodes.scores` give, bit for bit, in one pass over each row. Two things
make it fast. A window has some twenty different opcodes of two hundred, so each count that is not 0 is added to the
groups that it belongs to, rather than each group summed over its columns; sums of counts are exact in any order. And a
forest is not walked node by node, each step waiting for the one before: for each feature its thresholds are passed in
order, as long as the value is above them, and each takes the leaves away that lie to the left of its node; what stays
lowest is the leaf that counts (QuickScorer: Lucchese et al., SIGIR 2015). Most features of a row are 0, and pass none.

The floor, measured on 115 features and 800 trees of 12 leaves: 400 additions and 2,000 leaf masks a row, 800 leaves to
add up; about 3 us, against 15 us of the two loops of opcodes.py. `scores_reference` is those two, on rows as dicts.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from gpuguard.kernels import opcodes
from gpuguard.kernels.opcodes import COLUMN, COLUMNS, FEATURES, MNEMONICS, RATIO, Forest

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

LEAVES_MAX = 64
#: The lowest set bit of a word, times this, has its number in the upper six bits (de Bruijn sequence).
_SEQUENCE = 0x03F79D71B4CB0A89


class Masks(NamedTuple):
    """The nodes of a forest by feature and threshold, and its leaves by tree.

    ``limits``: where the nodes of a feature begin; ``thresholds``, ``trees`` and ``masks``: theirs, and which leaves
    are left where the value is above it. ``leaves`` and ``values``: where those of a tree begin, what each counts.
    """

    limits: np.ndarray  # int32[features + 1]
    thresholds: np.ndarray  # float32[nodes]
    trees: np.ndarray  # int32[nodes]
    masks: np.ndarray  # uint64[nodes]
    leaves: np.ndarray  # int32[trees + 1]
    values: np.ndarray  # float64[leaves]


class Program(NamedTuple):
    """A forest and its features, over rows whose columns are a decoder's: first ``names`` mnemonics, then others.

    ``starts``, ``sums`` and ``signs``: what a count of a column, then of total, top and top3, is added to.
    ``firsts``, ``seconds``, ``forms``: the two sums of each feature, and what is made of them.
    """

    columns: np.ndarray  # int32[columns of the row]: which of COLUMNS it is, -1 for none
    names: int
    starts: np.ndarray
    sums: np.ndarray
    signs: np.ndarray
    firsts: np.ndarray
    seconds: np.ndarray
    forms: np.ndarray
    masks: Masks
    base: float


def program(forest: Forest, names: Sequence[str], others: Sequence[str]) -> Program:
    """Return what `scores` and `rows` need, for rows of counts of mnemonics, then of what was derived.

    A mnemonic that is not of `MNEMONICS` counts as unknown. Raise ValueError for a tree of more than 64 leaves.
    """
    known = frozenset(MNEMONICS)
    columns = [COLUMN[name] if name in known else COLUMN["unknown"] for name in names]
    columns += [COLUMN.get(name, -1) for name in others]
    groups = sorted({group for _, _, *both in FEATURES for group in both})
    members: list[list[tuple[int, float]]] = [[] for _ in COLUMNS]
    for number, group in enumerate(groups):
        for name in group.split():
            members[COLUMN[name.removeprefix("-")]].append((number, -1.0 if name.startswith("-") else 1.0))
    used = [members[column] if column >= 0 else [] for column in (*columns, COLUMN["total"], *_TOPS)]
    flat = [one for some in used for one in some]
    return Program(
        np.array(columns, np.int32), len(names), np.cumsum([0, *map(len, used)]).astype(np.int32),
        np.array([number for number, _ in flat], np.int32), np.array([sign for _, sign in flat]),
        np.array([groups.index(first) for _, _, first, _ in FEATURES], np.int32),
        np.array([groups.index(second) for *_, second in FEATURES], np.int32),
        np.array([form for _, form, *_ in FEATURES], np.int32), _masks(forest), float(forest.base))


_TOPS = (COLUMN["top"], COLUMN["top3"])


def _masks(forest: Forest) -> Masks:
    nodes: list[list[tuple[float, int, int]]] = [[] for _ in FEATURES]
    leaves, values = [0], []
    for tree, root in enumerate(forest.root.tolist()):
        found = _leaves(forest, root, tree, nodes)
        if len(found) > LEAVES_MAX:
            raise ValueError(f"a tree of {len(found)} leaves: at most {LEAVES_MAX} fit into a mask")
        values += found
        leaves.append(len(values))
    ordered = [sorted(some) for some in nodes]
    flat = [one for some in ordered for one in some]
    return Masks(
        np.cumsum([0, *map(len, ordered)]).astype(np.int32),
        np.array([threshold for threshold, _, _ in flat], np.float32),
        np.array([tree for _, tree, _ in flat], np.int32), np.array([mask for *_, mask in flat], np.uint64),
        np.array(leaves, np.int32), np.array(values, np.float64))


def _leaves(forest: Forest, root: int, tree: int, nodes: list[list[tuple[float, int, int]]]) -> list[float]:
    """Return what the leaves of a tree count, from left to right, and note the mask of each node."""
    values: list[float] = []

    def visit(node: int) -> None:
        if forest.feature[node] < 0:
            values.append(float(forest.value[node]))
            return
        first = len(values)
        visit(int(forest.left[node]))
        gone = ((1 << min(len(values), LEAVES_MAX)) - 1) & ~((1 << first) - 1)
        nodes[forest.feature[node]].append((float(forest.threshold[node]), tree, ~gone & (1 << LEAVES_MAX) - 1))
        visit(int(forest.right[node]))

    visit(root)
    return values


def rows(counts: np.ndarray, made: Program) -> np.ndarray:
    """Return float64[rows, COLUMNS] of uint32[rows, columns], as `opcodes.counts` does of dicts."""
    out = np.zeros((len(counts), len(COLUMNS)))
    unknown = COLUMN["unknown"]
    plain = np.flatnonzero((made.columns >= 0) & (made.columns != unknown))
    out[:, made.columns[plain]] = counts[:, plain]
    out[:, unknown] = counts[:, made.columns == unknown].sum(1, dtype=np.float64)
    names = counts[:, :made.names]
    out[:, 0] = names.sum(1, dtype=np.float64)
    top = np.partition(names, made.names - 3, axis=1)[:, -3:]
    out[:, _TOPS[0]], out[:, _TOPS[1]] = top.max(1), top.sum(1, dtype=np.float64)
    return out


def scores_reference(counts: np.ndarray, made: Program, forest: Forest) -> np.ndarray:
    """Return float64[rows], the plain way: `opcodes.features` and `opcodes.scores` of the same rows."""
    return opcodes.scores_reference(opcodes.features_reference(rows(counts, made)), forest)


def scores(counts: np.ndarray, made: Program) -> np.ndarray:
    """Return float64[rows] of uint32[rows, columns]: the forest's score of each row, by a compiled loop."""
    out = np.zeros(len(counts))
    if len(counts):
        _compiled()(np.ascontiguousarray(counts, np.uint32), *made[1:-2], *made.masks, made.base, _table(),
                    out)
    return out


@functools.cache
def _table() -> np.ndarray:
    table = np.zeros(64, np.int64)
    for bit in range(64):
        table[(_SEQUENCE << bit & (1 << 64) - 1) >> 58] = bit
    return table


@functools.cache
def _compiled() -> Callable[..., Any]:
    import numba

    @numba.njit
    def sums_of(row: Any, names: Any, starts: Any, sums: Any, signs: Any, held: Any) -> Any:
        held[:] = 0.0
        total, one, two, three = 0.0, 0.0, 0.0, 0.0
        for column in range(len(row)):
            count = float(row[column])
            if count == 0.0:
                continue
            for k in range(starts[column], starts[column + 1]):
                held[sums[k]] += signs[k] * count
            if column < names:
                total += count
                if count > three:
                    three = count
                    if three > two:
                        two, three = three, two
                    if two > one:
                        one, two = two, one
        for more, count in enumerate((total, one, one + two + three)):
            for k in range(starts[len(row) + more], starts[len(row) + more + 1]):
                held[sums[k]] += signs[k] * count
        return total

    @numba.njit
    def all_scores(table: Any, names: Any, starts: Any, sums: Any, signs: Any, firsts: Any, seconds: Any, forms: Any,
                   limits: Any, thresholds: Any, trees: Any, masks: Any, leaves: Any, values: Any, base: Any,
                   numbers: Any, out: Any) -> None:
        held = np.zeros(max(firsts.max(), seconds.max()) + 1)
        left = np.zeros(len(leaves) - 1, np.uint64)
        for i in range(len(table)):
            total = sums_of(table[i], names, starts, sums, signs, held)
            left[:] = np.uint64(0xFFFFFFFFFFFFFFFF)
            for j in range(len(forms)):
                a, b = max(held[firsts[j]], 0.0), max(held[seconds[j]], 0.0)
                ratio = a / max(b, 1.0) if forms[j] == RATIO else min(a, b) / max(total, 1.0)
                value = np.float32(min(ratio, 1.0))
                for k in range(limits[j], limits[j + 1]):
                    if value <= thresholds[k]:
                        break
                    left[trees[k]] &= masks[k]
            score = base
            for tree in range(len(left)):
                lowest = left[tree] & (~left[tree] + np.uint64(1))
                score += values[leaves[tree] + numbers[(lowest * np.uint64(_SEQUENCE)) >> np.uint64(58)]]
            out[i] = score

    loop: Callable[..., Any] = all_scores
    return loop
