"""The CUDA form of forest.py: rows to bytes, then a thread a row down all trees in shared memory.

A first kernel turns rows into bytes, four columns a word. The second is launched once for each part of the forest that
fits into the 48 KiB of shared memory that every GPU gives a block: each block reads its part once, goes through as
many rows as there are, and adds to their scores. A row's words lie a block's width apart, so that threads of a warp
never contend for a bank over their own rows; only nodes are read at random. To import this is to import Numba.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numba.cuda
import numpy as np

from gpuguard.kernels import device as gpu
from gpuguard.kernels.forest import LEAF

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gpuguard.kernels.forest import Packed

cuda: Any = numba.cuda
SHARED_BYTES = 48 * 1024
#: What lies in shared memory, which is one array under three types.
WORD, SCORE, NUMBER = np.dtype(np.uint32), np.dtype(np.float32), np.dtype(np.int32)
#: Enough blocks for any GPU to be full; each goes on to further rows.
BLOCKS_MAX = 132 * 16


def scores(matrix: Any, packed: Packed, device: int | None) -> Any:
    """Return float32[rows, classes] of float32[rows, features], where the rows were."""
    rows = len(matrix)
    with gpu.chosen_device(device):
        stream = gpu.stream_of(matrix)
        out = gpu.room((rows, packed.classes), np.float32, stream)
        if rows:
            words = max(1, -(-len(packed.source) // 4))
            bins = gpu.room((words, rows), np.uint32, stream)
            grid = gpu.blocks_of(rows), gpu.THREADS, stream
            source, edges = gpu.put(packed.source, np.int32, stream), gpu.put(packed.edges, np.float32, stream)
            _bins[grid](gpu.put(matrix, np.float32, stream), source, edges, np.float32(packed.base), bins, out)
            for threads, part in parts(packed, words):
                own = [gpu.put(array, array.dtype, stream) for array in part]
                shared = 4 * (words * threads + sum(array.size for array in part))
                blocks = min(gpu.blocks_of(rows, threads), BLOCKS_MAX)
                _walk[blocks, threads, stream, shared](bins, *own, out)
        return gpu.give(out, matrix, stream)


def parts(packed: Packed, words: int) -> Iterator[tuple[int, tuple[np.ndarray, ...]]]:
    """Give how many threads a block has, and runs of trees that fit beside their rows: nodes, leaves, and of each tree

    its first node and leaf in the run, its class, and whether it has nodes: int32[trees, 4].
    """
    threads = next(threads for threads in (512, 256, 128, 64) if 4 * words * threads <= SHARED_BYTES // 2)
    free = SHARED_BYTES // 4 - words * threads
    sizes = np.diff(packed.first) + np.diff(packed.first_leaf) + 4
    begin = 0
    while begin < len(sizes):
        fitting = int(np.searchsorted(np.cumsum(sizes[begin:]), free, side="right"))
        end = begin + fitting
        node, leaf = packed.first[begin:end + 1], packed.first_leaf[begin:end + 1]
        trees = np.stack([node[:-1] - node[0], leaf[:-1] - leaf[0], packed.class_of[begin:end], np.diff(node)], axis=1)
        yield threads, (packed.nodes[node[0]:node[-1]], packed.leaves[leaf[0]:leaf[-1]],
                        np.ascontiguousarray(trees, np.int32))
        begin = end


@cuda.jit
def _bins(matrix: Any, source: Any, edges: Any, base: Any, bins: Any, out: Any) -> None:
    """Write the bytes of one row, and the score that its trees will be added to."""
    row = cuda.grid(1)
    if row >= matrix.shape[0]:
        return
    for one in range(out.shape[1]):
        out[row, one] = base
    for word in range(bins.shape[0]):
        packed = np.uint32(0)
        for byte in range(4):
            column = 4 * word + byte
            if column < source.shape[0]:
                value, at, step = matrix[row, source[column]], np.int32(0), np.int32(128)
                while step:
                    if not value <= edges[column, at + step - 1]:
                        at += step
                    step >>= np.int32(1)
                packed |= np.uint32(at) << np.uint32(8 * byte)
        bins[word, row] = packed


@cuda.jit
def _walk(bins: Any, nodes: Any, leaves: Any, trees: Any, out: Any) -> None:
    """Add the leaves of some trees to the scores of all rows."""
    shared = cuda.shared.array(0, WORD)
    values = cuda.shared.array(0, SCORE)
    signed = cuda.shared.array(0, NUMBER)
    wide, thread = cuda.blockDim.x, cuda.threadIdx.x
    at_nodes = bins.shape[0] * wide
    at_leaves = at_nodes + nodes.shape[0]
    at_trees = at_leaves + leaves.shape[0]
    for i in range(thread, nodes.shape[0], wide):
        shared[at_nodes + i] = nodes[i]
    for i in range(thread, leaves.shape[0], wide):
        values[at_leaves + i] = leaves[i]
    for i in range(thread, trees.shape[0] * 4, wide):
        signed[at_trees + i] = trees[i >> 2, i & 3]
    cuda.syncthreads()
    for row in range(cuda.grid(1), out.shape[0], cuda.gridsize(1)):
        for word in range(bins.shape[0]):
            shared[word * wide + thread] = bins[word, row]
        total, last = np.float32(0), np.int32(0)
        for tree in range(at_trees, at_trees + 4 * trees.shape[0], 4):
            begin, one = at_nodes + signed[tree], signed[tree + 2]
            node = np.uint32(0 if signed[tree + 3] else LEAF)
            while node < LEAF:
                word = shared[begin + node]
                four = shared[((word & np.uint32(255)) >> np.uint32(2)) * wide + thread]
                mine = four >> ((word & np.uint32(3)) << np.uint32(3)) & np.uint32(255)
                over = mine > (word >> np.uint32(8) & np.uint32(255))
                node = word >> (np.uint32(24) if over else np.uint32(16)) & np.uint32(255)
            if one != last:
                out[row, last] += total
                total, last = np.float32(0), one
            total += values[at_leaves + signed[tree + 1] + np.int32(node) - LEAF]
        out[row, last] += total
