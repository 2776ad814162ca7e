"""The scores of a forest of decision trees (random or gradient-boosted), for one row at once and for millions.

An `opcodes.Forest` is what training makes and models/*.npz hold: flat arrays of nodes, of any shape and depth. `pack`
makes of it what all forms but the plain one walk. Each threshold of a feature becomes a number below 255, so that a row
is first turned into bytes (how many thresholds of each column lie below the value), and then compared byte by byte.
Nothing is lost by that: a tree can only ask on which side of a threshold a value is. A feature with more than 255
thresholds becomes several columns. A node is one word: column, threshold, and both children.

A row goes left where its feature is <= the threshold, so right where it is NaN. A trainer that wants a missing value
to go left at some nodes gives the feature twice, once with -inf for what is missing.

The CPU form has no walk at all: for 256 rows at a time each node, children before parents, selects of its children's
leaves by comparing one column, 32 rows an instruction. Of a lone row all trees step down together, level by level.
The CUDA form walks, a thread a row, through nodes in shared memory. On one core that is the fastest that is known of
a scalar language; a byte-permuting form in C is at 0.5 us a row where this one needs about one.

Scores are sums of float32 leaves, in double precision but for CUDA: equal to the plain form within TOLERANCE of the
sum of the leaves' sizes.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from gpuguard.kernels import chosen

if TYPE_CHECKING:
    from collections.abc import Callable

    from gpuguard.kernels.opcodes import Forest

TOLERANCE = 1e-5

#: Thresholds of one column: the bytes 0..254 are their numbers, and 255 is above all.
EDGES = 255
COLUMNS_MAX = 256
#: Leaves of one tree. A child below LEAF is a node of its tree, from LEAF on a leaf.
LEAF = 128


class Packed(NamedTuple):
    """A forest as the fast forms walk it. See `pack`."""

    features: int
    source: np.ndarray  # int32[columns]: the feature that a column is made of
    edges: np.ndarray  # float32[columns, EDGES]: ascending, filled up with inf
    nodes: np.ndarray  # uint32[nodes]: column, threshold << 8, left << 16, right << 24
    first: np.ndarray  # int32[trees + 1]: the first node of each tree
    leaves: np.ndarray  # float32[leaves]
    first_leaf: np.ndarray  # int32[trees + 1]
    class_of: np.ndarray  # int32[trees]
    classes: int
    depth: int
    base: float


class OnGpu(NamedTuple):
    """A forest that is on a GPU, as the CUDA form walks it: made once by `on_gpu`, read there by every call."""

    packed: Packed
    device: int | None
    source: Any  # int32[columns]
    edges: Any  # float32[columns, EDGES]
    runs: tuple[tuple[Any, ...], ...]  # see `forest_cuda.runs_of`


def pack(forest: Forest, features: int, class_of: np.ndarray | None = None) -> Packed:
    """Return a forest over so many features as the fast forms walk it; ``class_of`` says whose score a tree adds to.

    Raises `ValueError` for one that cannot be walked (`Forest.check`), for thresholds that are no numbers, classes that
    do not fit, a tree of more than 128 leaves, and more than 256 columns.
    """
    forest.check(features)
    inner = forest.feature >= 0
    if not np.all(np.isfinite(forest.threshold[inner])):
        raise ValueError("a forest with thresholds that are no numbers")
    classes = np.zeros(len(forest.root), np.int32) if class_of is None else class_of.astype(np.int32)
    if classes.shape != forest.root.shape or np.any(classes < 0):
        raise ValueError("a forest whose classes do not fit its trees")
    source, edges, columns, numbers = _edges(forest)
    nodes: list[int] = []
    leaves: list[float] = []
    first, first_leaf, depth = [0], [0], 0
    for root in forest.root.tolist():
        words, own, levels = _tree(forest, root, columns, numbers)
        nodes += words
        leaves += own
        depth = max(depth, levels)
        first.append(len(nodes))
        first_leaf.append(len(leaves))
    return Packed(features, source, edges, np.array(nodes, np.uint32), np.array(first, np.int32),
                  np.array(leaves, np.float32), np.array(first_leaf, np.int32), classes,
                  int(classes.max(initial=0)) + 1, depth, float(forest.base))


def _edges(forest: Forest) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return source and edges of the columns, and for each node the column and the number of its threshold."""
    source: list[int] = []
    rows: list[np.ndarray] = []
    columns, numbers = np.zeros(len(forest.feature), np.int64), np.zeros(len(forest.feature), np.int64)
    for feature in np.unique(forest.feature[forest.feature >= 0]):
        of = np.flatnonzero(forest.feature == feature)
        thresholds, at = np.unique(forest.threshold[of].astype(np.float32), return_inverse=True)
        columns[of], numbers[of] = len(rows) + at // EDGES, at % EDGES
        for begin in range(0, len(thresholds), EDGES):
            row = np.full(EDGES, np.inf, np.float32)
            row[:len(thresholds) - begin] = thresholds[begin:begin + EDGES]
            source.append(int(feature))
            rows.append(row)
    if len(rows) > COLUMNS_MAX:
        raise ValueError(f"a forest of {len(rows)} columns, more than {COLUMNS_MAX}")
    return np.array(source, np.int32), np.array(rows, np.float32).reshape(-1, EDGES), columns, numbers


def _tree(forest: Forest, root: int, columns: np.ndarray, numbers: np.ndarray) -> tuple[list[int], list[float], int]:
    """Return the words, parents before children, the leaves and the depth of one tree."""
    order, level = [root], {root: 0}
    for node in order:
        if forest.feature[node] >= 0:
            children = int(forest.left[node]), int(forest.right[node])
            order += children
            level.update(dict.fromkeys(children, level[node] + 1))
    inner = [node for node in order if forest.feature[node] >= 0]
    ends = [node for node in order if forest.feature[node] < 0]
    if len(ends) > LEAF or len(set(order)) < len(order):
        raise ValueError(f"a tree of {len(ends)} leaves, more than {LEAF}, or with a node that has two parents")
    name = {node: i for i, node in enumerate(inner)} | {node: LEAF + i for i, node in enumerate(ends)}
    words = [int(columns[node]) | int(numbers[node]) << 8 | name[int(forest.left[node])] << 16
             | name[int(forest.right[node])] << 24 for node in inner]
    return words, forest.value[ends].tolist(), max(level.values())


def on_gpu(packed: Packed, device: int) -> OnGpu:
    """Take a forest to the GPU of this index, for as long as the result is kept; `scores` walks it there."""
    from gpuguard.kernels import forest_cuda

    return forest_cuda.taken(packed, device)


def scores(matrix: np.ndarray, forest: Packed | OnGpu, backend: str = "auto",
           device: int | None = None) -> tuple[np.ndarray, str]:
    """Return float64[rows, classes] of float32[rows, features], and the name of the form used; float32 from "cuda".

    ``backend`` and ``device`` as `gpuguard.kernels` says; by default whole columns ("numpy"), and "cuda" of a forest
    that is on a GPU: any other is taken there anew at each call. The plain form walks a `Forest` (`reference`). Raises
    `ValueError` for rows of another width, and where a forest on a GPU would have to be walked elsewhere.
    """
    if isinstance(forest, OnGpu):
        packed, backend = forest.packed, chosen(backend, device, "cuda")
        if backend != "cuda" or device not in (None, forest.device):
            raise ValueError(f"a forest on GPU {forest.device}, for backend {backend!r} and device {device}")
    else:
        packed, backend = forest, chosen(backend, device, "numpy")
    if matrix.ndim != 2 or matrix.shape[1] != packed.features:
        raise ValueError(f"rows of shape {matrix.shape} for a forest over {packed.features} features")
    if backend == "cuda":
        from gpuguard.kernels import forest_cuda

        there = forest if isinstance(forest, OnGpu) else forest_cuda.taken(forest, device)
        return forest_cuda.scores(matrix, there), backend
    matrix = np.ascontiguousarray(matrix, np.float32)
    if backend == "cpu":
        return _compiled()(matrix, packed), backend
    return {"numpy": vectorised, "reference": walked}[backend](matrix, packed), backend


@functools.cache
def _compiled() -> Callable[[np.ndarray, Packed], np.ndarray]:
    """Return the Numba form. Once: an import statement costs a twentieth of a row, however often it was run before."""
    from gpuguard.kernels import forest_cpu

    return forest_cpu.scores


def reference(matrix: np.ndarray, forest: Forest, class_of: np.ndarray | None = None) -> np.ndarray:
    """Return float64[rows, classes], one row, one tree, one node of the unpacked forest at a time."""
    feature, threshold = forest.feature.tolist(), forest.threshold.tolist()
    left, right, value = forest.left.tolist(), forest.right.tolist(), forest.value.tolist()
    owner = [0] * len(forest.root) if class_of is None else class_of.tolist()
    out = np.full((len(matrix), max(owner, default=0) + 1), float(forest.base))
    for total, row in zip(out, matrix.tolist(), strict=True):
        for node, one in zip(forest.root.tolist(), owner, strict=True):
            while feature[node] >= 0:
                node = left[node] if row[feature[node]] <= threshold[node] else right[node]  # noqa: PLW2901
            total[one] += value[node]
    return out


def walked(matrix: np.ndarray, packed: Packed) -> np.ndarray:
    """Return the same of a packed forest, by its own thresholds."""
    out = np.full((len(matrix), packed.classes), packed.base)
    for total, row in zip(out, matrix, strict=True):
        for tree, one in enumerate(packed.class_of.tolist()):
            total[one] += packed.leaves[packed.first_leaf[tree] + _leaf(row, packed, tree)]
    return out


def _leaf(row: np.ndarray, packed: Packed, tree: int) -> int:
    begin, end = packed.first[tree:tree + 2].tolist()
    node = 0 if end > begin else LEAF
    while node < LEAF:
        column, number, left, right = int(packed.nodes[begin + node]).to_bytes(4, "little")
        node = left if row[packed.source[column]] <= packed.edges[column, number] else right
    return node - LEAF


def binned(matrix: np.ndarray, packed: Packed) -> np.ndarray:
    """Return uint8[rows, columns]: how many of the column's thresholds each value is not at or below; 255 for NaN."""
    out = np.empty((len(matrix), len(packed.source)), np.uint8)
    for column, feature in enumerate(packed.source):
        values = matrix[:, feature]
        out[:, column] = np.where(np.isnan(values), EDGES, np.searchsorted(packed.edges[column], values))
    return out


def vectorised(matrix: np.ndarray, packed: Packed) -> np.ndarray:
    """Return the scores by whole columns: all trees of all rows step down together."""
    out = np.full((len(matrix), packed.classes), packed.base)
    for begin in range(0, len(matrix), ROWS):
        rows = binned(matrix[begin:begin + ROWS], packed)
        start = np.where(packed.first[1:] > packed.first[:-1], 0, LEAF)
        node = np.broadcast_to(start, (len(rows), len(start)))
        for _ in range(packed.depth):
            word = packed.nodes[np.where(node < LEAF, packed.first[:-1] + node, 0)]
            over = np.take_along_axis(rows, (word & 255).astype(np.int64), axis=1) > (word >> 8 & 255)
            node = np.where(node < LEAF, np.where(over, word >> 24, word >> 16 & 255), node)
        values = packed.leaves[packed.first_leaf[:-1] + node.astype(np.int64) - LEAF].astype(np.float64)
        for one in range(packed.classes):
            out[begin:begin + ROWS, one] += values[:, packed.class_of == one].sum(axis=1)
    return out


#: Rows that the forms by whole columns take at once, so that what they work on stays in the cache.
ROWS = 256
