"""The CUDA form of opcodes.py: the same text of each loop's body, one thread a row.

Of its own file since a kernel finds `cuda` among its module's globals, and the simulator replaces it only there; to
import it is to import Numba.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numba.cuda
import numpy as np

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


def features(table: np.ndarray) -> np.ndarray:
    """Return the features by one thread a row and feature on the current CUDA device."""
    out = np.zeros((len(table), len(FEATURES)), np.float32)
    if len(table):
        blocks = ((len(table) + 31) // 32, (len(FEATURES) + 7) // 8)
        _all_features[blocks, (32, 8)](np.ascontiguousarray(table), *program(), out)
    return out


def scores(matrix: np.ndarray, forest: Forest) -> np.ndarray:
    """Return the scores by one thread a row on the current CUDA device."""
    out = np.zeros(len(matrix))
    if len(matrix):
        _all_scores[(len(matrix) + 63) // 64, 64](np.ascontiguousarray(matrix), *forest, out)
    return out
