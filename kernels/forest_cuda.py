"""The CUDA form of forest.py: rows to bytes, then a thread a row down all trees in shared memory.

A first kernel turns rows into bytes, four columns a word. The second is launched once for each run of trees that fits
into the 48 KiB of shared memory that every GPU gives a block: each block reads its run once, goes through as many rows
as there are, and adds to their scores. A row's words lie a block's width apart, so that threads of a warp never contend
for a bank over their own rows; only nodes are read at random. To import this is to import Numba.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import numba.cuda
import numpy as np

from gpuguard.kernels import device as gpu
from gpuguard.kernels.forest import LEAF, OnGpu

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gpuguard.kernels.forest import Packed

cuda: Any = numba.cuda
SHARED_BYTES = 48 * 1024
#: What lies in shared memory, which is one array under two types.
WORD, SCORE = np.dtype(np.uint32), np.dtype(np.float32)
#: Enough blocks for any GPU to be full; each goes on to further rows.
BLOCKS_MAX = 132 * 16


def taken(packed: Packed, device: int | None) -> OnGpu:
    """Return a forest on the GPU. It is there when this returns, so whatever stream reads it need not wait."""
    with gpu.chosen_device(device):
        runs = tuple(tuple(cuda.to_device(array) for array in run) for run in runs_of(packed))
        there = OnGpu(packed, device, cuda.to_device(packed.source), cuda.to_device(packed.edges), runs)
        cuda.synchronize()
    return there


def scores(matrix: Any, forest: OnGpu) -> Any:
    """Return float32[rows, classes] of float32[rows, features], where the rows were."""
    rows, packed = len(matrix), forest.packed
    with gpu.chosen_device(forest.device):
        stream = gpu.stream_of(matrix)
        out = gpu.room((rows, packed.classes), np.float32, stream)
        if rows:
            words, threads = words_of(packed), threads_of(packed)
            bins = gpu.room((words, rows), np.uint32, stream)
            _bins[gpu.blocks_of(rows), gpu.THREADS, stream](
                gpu.put(matrix, np.float32, stream), forest.source, forest.edges, np.float32(packed.base), bins, out)
            blocks = min(gpu.blocks_of(rows, threads), BLOCKS_MAX)
            for run in forest.runs:
                shared = 4 * (words * threads + sum(array.size for array in run))
                walk_of(threads)[blocks, threads, stream, shared](bins, *run, out)
        return gpu.give(out, matrix, stream)


def words_of(packed: Packed) -> int:
    """Return how many words hold the bytes of a row."""
    return max(1, -(-len(packed.source) // 4))


def threads_of(packed: Packed) -> int:
    """Return how many threads a block has, so that their rows take no more than half of its shared memory."""
    return next(threads for threads in (512, 256, 128, 64) if 4 * words_of(packed) * threads <= SHARED_BYTES // 2)


def runs_of(packed: Packed) -> Iterator[tuple[np.ndarray, ...]]:
    """Give runs of trees that fit into shared memory beside the rows of a block.

    A run is nodes, leaves, and of each tree its first node and leaf in the run, its class, and how many nodes
    it has: uint32[trees, 4].
    """
    free = SHARED_BYTES // 4 - words_of(packed) * threads_of(packed)
    sizes = np.diff(packed.first) + np.diff(packed.first_leaf) + 4
    begin = 0
    while begin < len(sizes):
        end = begin + int(np.searchsorted(np.cumsum(sizes[begin:]), free, side="right"))
        node, leaf = packed.first[begin:end + 1], packed.first_leaf[begin:end + 1]
        trees = np.stack([node[:-1] - node[0], leaf[:-1] - leaf[0], packed.class_of[begin:end], np.diff(node)], axis=1)
        yield (packed.nodes[node[0]:node[-1]], packed.leaves[leaf[0]:leaf[-1]], np.ascontiguousarray(trees, np.uint32))
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


@functools.cache
def walk_of(threads: int) -> Any:
    """Return the kernel that adds the leaves of some trees to the scores of all rows, for blocks of so many threads.

    Indices are unsigned and of 32 bits wherever a thread computes one for itself: signed ones are looked at for
    counting from the end, and wide ones take two registers and two instructions each.
    """
    wide, leaf, byte = np.uint32(threads), np.uint32(LEAF), np.uint32(255)

    @cuda.jit
    def _walk(bins: Any, nodes: Any, leaves: Any, trees: Any, out: Any) -> None:
        shared = cuda.shared.array(0, WORD)
        values = cuda.shared.array(0, SCORE)
        thread = np.uint32(cuda.threadIdx.x)
        at_nodes = np.uint32(bins.shape[0]) * wide
        at_leaves = np.uint32(at_nodes + np.uint32(nodes.shape[0]))
        at_trees = np.uint32(at_leaves + np.uint32(leaves.shape[0]))
        end = np.uint32(at_trees + np.uint32(4 * trees.shape[0]))
        for i in range(thread, nodes.shape[0], wide):
            shared[np.uint32(at_nodes + i)] = nodes[i]
        for i in range(thread, leaves.shape[0], wide):
            values[np.uint32(at_leaves + i)] = leaves[i]
        for i in range(thread, 4 * trees.shape[0], wide):
            shared[np.uint32(at_trees + i)] = trees[i >> 2, i & 3]
        cuda.syncthreads()
        for row in range(cuda.grid(1), out.shape[0], cuda.gridsize(1)):
            for word in range(bins.shape[0]):
                shared[np.uint32(np.uint32(word) * wide + thread)] = bins[word, row]
            total, last, tree = np.float32(0), np.uint32(0), at_trees
            while tree < end:
                begin, ends = np.uint32(at_nodes + shared[tree]), np.uint32(at_leaves + shared[np.uint32(tree + 1)])
                one, node = shared[np.uint32(tree + 2)], np.uint32(0 if shared[np.uint32(tree + 3)] else leaf)
                while node < leaf:
                    four_at = shared[np.uint32(begin + node)]
                    four = shared[np.uint32(np.uint32((four_at & byte) >> np.uint32(2)) * wide + thread)]
                    mine = np.uint32(four >> np.uint32((four_at & np.uint32(3)) << np.uint32(3))) & byte
                    over = mine > np.uint32(four_at >> np.uint32(8)) & byte
                    node = np.uint32(np.uint32(four_at >> (np.uint32(24) if over else np.uint32(16))) & byte)
                if one != last:
                    out[row, last] += total
                    total, last = np.float32(0), one
                total += values[np.uint32(ends + node - leaf)]
                tree = np.uint32(tree + np.uint32(4))
            out[row, last] += total

    return _walk
