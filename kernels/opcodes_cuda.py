"""The CUDA form of opcodes.py: the same text of each loop's body, one thread a row.

Of its own file since a kernel finds `cuda` among its module's globals, and the simulator replaces it only there; to
import it is to import Numba.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numba.cuda
import numpy as np

from gpuguard.kernels import device as gpu
from gpuguard.kernels.opcodes import FEATURES, feature_of, program, score_of

if TYPE_CHECKING:
    from gpuguard.kernels.opcodes import Forest

cuda: Any = numba.cuda
_feature_of: Any = cuda.jit(device=True)(feature_of)
_score_of: Any = cuda.jit(device=True)(score_of)


@cuda.jit
def _all_features(table: Any, forms: Any, ends: Any, columns: Any, weights: Any, out: Any) -> None:
    i, j = cuda.grid(2)
    if i < len(table) and j < len(forms):
        out[i, j] = _feature_of(table[i], forms[j], ends, columns, weights, j)


@cuda.jit
def _all_scores(matrix: Any, feature: Any, threshold: Any, left: Any, right: Any, value: Any, root: Any, base: Any,
                out: Any) -> None:
    i = cuda.grid(1)
    if i < len(matrix):
        out[i] = _score_of(matrix[i], feature, threshold, left, right, value, root, base)


def features(table: Any, device: int | None) -> Any:
    """Return the features by one thread a row and feature, where the table was."""
    with gpu.chosen_device(device):
        stream = gpu.stream_of(table)
        out = gpu.room((len(table), len(FEATURES)), np.float32, stream)
        if len(table):
            own = [gpu.put(part, part.dtype, stream) for part in program()]
            blocks = gpu.blocks_of(len(table), 32), gpu.blocks_of(len(FEATURES), 8)
            _all_features[blocks, (32, 8), stream](gpu.put(table, np.float64, stream), *own, out)
        return gpu.give(out, table, stream)


def scores(matrix: Any, forest: Forest, device: int | None) -> Any:
    """Return the scores by one thread a row, where the matrix was."""
    with gpu.chosen_device(device):
        stream = gpu.stream_of(matrix)
        out = gpu.room((len(matrix),), np.float64, stream)
        if len(matrix):
            own = [gpu.put(part, part.dtype, stream) for part in forest[:6]]
            _all_scores[gpu.blocks_of(len(matrix), 64), 64, stream](
                gpu.put(matrix, np.float32, stream), *own, forest.base, out)
        return gpu.give(out, matrix, stream)
