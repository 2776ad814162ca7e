"""The CUDA form of the event aggregator; a module of its own, for Numba's simulator needs `cuda` to be a global name.

One thread an event, over events sorted by key: by the host, or by CuPy where they are on the GPU. See
`gpuguard.kernels.launches.event_rows`.
"""

from __future__ import annotations

from typing import Any

import numba.cuda
import numpy as np

from gpuguard.kernels import device as gpu
from gpuguard.kernels.launches import GAP_BUCKETS, Aggregates, empty

cuda: Any = numba.cuda


def event_rows(times_ns: np.ndarray, keys: np.ndarray, count: int, device: int | None) -> Aggregates:
    """Return the aggregates of each key."""
    launches, first, last, gaps = empty(count)
    if len(keys):
        order = np.argsort(keys, kind="stable")
        with gpu.chosen_device(device):
            _kernel[gpu.blocks_of(len(keys)), gpu.THREADS](times_ns[order], keys[order], first, last, gaps)
        launches[:] = np.bincount(keys, minlength=count)
    return launches, first, last, gaps


def event_rows_there(times_ns: Any, keys: Any, count: int, device: int | None) -> Any:
    """Return the same of arrays on the GPU, as CuPy arrays. Raises `ValueError` as `launches.event_rows` does."""
    import cupy

    with gpu.chosen_device(device):
        times_ns, keys = cupy.asarray(times_ns), cupy.asarray(keys)
        if len(times_ns) != len(keys) or (len(keys) and not 0 <= int(keys.min()) <= int(keys.max()) < count):
            raise ValueError(f"{len(times_ns)} times, {len(keys)} keys of 0..{count - 1}")
        _, first, last, gaps = (cupy.asarray(part) for part in empty(count))
        if len(keys):
            order, stream = cupy.argsort(keys, kind="stable"), gpu.stream_of(keys)
            kinds = np.int64, np.int32, np.int64, np.int64, np.uint32
            own = [gpu.put(array, kind, stream)
                   for array, kind in zip((times_ns[order], keys[order], first, last, gaps), kinds, strict=True)]
            _kernel[gpu.blocks_of(len(keys)), gpu.THREADS, stream](*own)
        return cupy.bincount(keys, minlength=count).astype(np.uint64), first, last, gaps


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
