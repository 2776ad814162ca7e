"""The CUDA form of the event aggregator; a module of its own, for Numba's simulator needs `cuda` to be a global name.

One thread an event, over events that the host sorted by key. See `gpuguard.kernels.launches.event_rows`.
"""

from __future__ import annotations

from typing import Any

import numba.cuda
import numpy as np

from gpuguard.kernels.launches import GAP_BUCKETS, Aggregates, empty

cuda: Any = numba.cuda


def event_rows(times_ns: np.ndarray, keys: np.ndarray, count: int) -> Aggregates:
    """Return the aggregates of each key."""
    launches, first, last, gaps = empty(count)
    if len(keys):
        order = np.argsort(keys, kind="stable")
        _kernel[(len(keys) + 127) // 128, 128](times_ns[order], keys[order], first, last, gaps)
        launches[:] = np.bincount(keys, minlength=count)
    return launches, first, last, gaps


@cuda.jit
def _kernel(times_ns: Any, keys: Any, first: Any, last: Any, gaps: Any) -> None:
    i = cuda.grid(1)
    if i < len(keys):
        key = keys[i]
        if i == 0 or keys[i - 1] != key:
            first[key] = times_ns[i]
        else:
            gap = max(times_ns[i] - times_ns[i - 1], 1)
            bucket = 0
            while gap > 1 and bucket < GAP_BUCKETS - 1:
                gap >>= 1
                bucket += 1
            cuda.atomic.add(gaps, (key, bucket), 1)
        if i == len(keys) - 1 or keys[i + 1] != key:
            last[key] = times_ns[i]
