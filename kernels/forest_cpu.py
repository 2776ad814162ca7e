"""The Numba CPU form of forest.py: 256 rows at a time without a walk, or one row with all trees stepping together.

To import this is to import Numba; the first call of each form compiles it, which takes seconds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numba
import numpy as np

from gpuguard.kernels.forest import COLUMNS_MAX, LEAF, ROWS

if TYPE_CHECKING:
    from gpuguard.kernels.forest import Packed

#: Below this many rows each is better scored by itself.
BLOCK_MIN = 48

#: Where the bytes of a node lie.
_BYTE, _NUMBER, _LEFT, _RIGHT = np.uint64(255), np.uint64(8), np.uint64(16), np.uint64(24)

_loop = numba.njit(error_model="numpy", nogil=True, cache=False)


def scores(matrix: np.ndarray, packed: Packed) -> np.ndarray:
    """Return float64[rows, classes] of float32[rows, features]."""
    out = np.empty((len(matrix), packed.classes))
    form: Any = _one_by_one if len(matrix) < BLOCK_MIN else _by_blocks
    form(matrix, packed.source, packed.edges, packed.nodes, packed.first, packed.leaves, packed.first_leaf,
         packed.class_of, packed.base, out, packed.depth)
    return out


@_loop
def _one_by_one(matrix: Any, source: Any, edges: Any, nodes: Any, first: Any, leaves: Any, first_leaf: Any,
                class_of: Any, base: Any, out: Any, depth: Any) -> None:
    """Step all trees down together, level by level: a step waits for the one above it and for no other."""
    bins, at = np.empty(len(source), np.uint8), np.empty(len(class_of), np.uint8)
    out[:] = base
    for i in range(len(matrix)):
        for column in range(len(source)):
            bins[column] = _bin(matrix[i, source[column]], edges, column)
        for tree in range(len(class_of)):
            at[tree] = 0 if first[tree + 1] > first[tree] else LEAF
        for _ in range(depth):
            for tree in range(len(class_of)):
                node = np.uint64(at[tree])
                ended = node >= np.uint64(LEAF)
                word = np.uint64(nodes[np.uint64(0) if ended else np.uint64(first[tree]) + node])
                over = np.uint64(bins[word & _BYTE]) > (word >> _NUMBER & _BYTE)
                # Not a choice, or it becomes a branch that is guessed wrong every other time.
                child = word >> (_LEFT + np.uint64(8) * np.uint64(over)) & _BYTE
                at[tree] = node if ended else child
        for tree in range(len(class_of)):
            leaf = np.uint64(first_leaf[tree]) + np.uint64(at[tree]) - np.uint64(LEAF)
            out[i, class_of[tree]] += leaves[leaf]


@_loop
def _by_blocks(matrix: Any, source: Any, edges: Any, nodes: Any, first: Any, leaves: Any, first_leaf: Any,
               class_of: Any, base: Any, out: Any, _: Any) -> None:
    """Take many rows through one node, its children first: each node's row of bytes are the leaves that it leads to."""
    bins = np.empty((COLUMNS_MAX, ROWS), np.uint8)
    reached = np.empty((LEAF, ROWS), np.uint8)
    out[:] = base
    for begin in range(0, len(matrix), ROWS):
        count = min(ROWS, len(matrix) - begin)
        for column in range(len(source)):
            for i in range(count):
                bins[column, i] = _bin(matrix[begin + i, source[column]], edges, column)
        for tree in range(len(class_of)):
            size = first[tree + 1] - first[tree]
            if not size:
                reached[0] = LEAF
            for node in range(size - 1, -1, -1):
                _select(bins, np.uint64(nodes[first[tree] + node]), reached, np.uint64(node))
            for i in range(count):
                leaf = np.uint64(first_leaf[tree]) + np.uint64(reached[0, i]) - np.uint64(LEAF)
                out[begin + i, class_of[tree]] += leaves[leaf]


@numba.njit(error_model="numpy")
def _bin(value: Any, edges: Any, column: Any) -> Any:
    """Return how many of a column's thresholds a value is not at or below, by halves."""
    at, step = np.uint64(0), np.uint64(128)
    while step:
        at += np.uint64(0) if value <= edges[column, at + step - np.uint64(1)] else step
        step >>= np.uint64(1)
    return np.uint8(at)


@numba.njit(error_model="numpy")
def _select(bins: Any, word: Any, reached: Any, node: Any) -> None:
    """Fill in the leaves that a node leads to: of each row its child's, or the child itself if that is a leaf.

    Indices are unsigned, for a negative one would count from the end, and to look for that costs the vectors.
    """
    column, number = word & _BYTE, np.uint8(word >> _NUMBER & _BYTE)
    left, right = word >> _LEFT & _BYTE, word >> _RIGHT & _BYTE
    here, there = np.uint8(left), np.uint8(right)
    if left < LEAF and right < LEAF:
        for i in range(ROWS):
            a, b = reached[left, i], reached[right, i]
            reached[node, i] = b if bins[column, i] > number else a
    elif left < LEAF:
        for i in range(ROWS):
            a = reached[left, i]
            reached[node, i] = there if bins[column, i] > number else a
    elif right < LEAF:
        for i in range(ROWS):
            b = reached[right, i]
            reached[node, i] = b if bins[column, i] > number else here
    else:
        for i in range(ROWS):
            reached[node, i] = there if bins[column, i] > number else here
