"""How arrays come to a GPU and how results leave: what all CUDA forms share. To import this is to import Numba.

An array that is on the GPU already is read in place, on the stream that its ``__cuda_array_interface__`` names
(CuPy's: the current one), and nothing waits for anything: the result is there when the stream has got so far. It is
CuPy's again where the argument was. A NumPy array is copied there, and its result back.
"""

from __future__ import annotations

import contextlib
from typing import Any

import numba.cuda
import numpy as np

# numba-cuda up to 0.30 overloads a function that NumPy 2.5 no longer has, and without it compiles nothing at all.
if not hasattr(np, "row_stack"):
    setattr(np, "row_stack", np.vstack)  # noqa: B010 no stub knows it

cuda: Any = numba.cuda

#: Threads of one block, unless a kernel says otherwise.
THREADS = 256


def chosen_device(device: int | None) -> Any:
    """Return a context in which a device is the current one: the allotted one, or the one that is current already."""
    return contextlib.nullcontext() if device is None else cuda.gpus[device]


def is_there(array: Any) -> bool:
    """Say whether an array is on a GPU."""
    return hasattr(array, "__cuda_array_interface__") or bool(getattr(array, "__cuda_ndarray__", False))


def stream_of(array: Any) -> Any:
    """Return the stream on which an array may be read; the default one of what is not there yet."""
    number = getattr(array, "__cuda_array_interface__", {}).get("stream")
    return 0 if number is None else cuda.external_stream(number)


def put(array: Any, dtype: Any, stream: Any) -> Any:
    """Return an array as Numba's kernels take it. Raises `ValueError` for one on the GPU that is of another kind."""
    if not is_there(array):
        return cuda.to_device(np.ascontiguousarray(array, dtype), stream=stream)
    there = array if getattr(array, "__cuda_ndarray__", False) else cuda.as_cuda_array(array, sync=False)
    if there.dtype != np.dtype(dtype) or not there.is_c_contiguous():
        raise ValueError(f"an array on the GPU of {there.dtype} where a contiguous one of {np.dtype(dtype)} is needed")
    return there


def room(shape: tuple[int, ...], dtype: Any, stream: Any) -> Any:
    """Return an array on the current device."""
    return cuda.device_array(shape, dtype, stream=stream)


def give(made: Any, like: Any, stream: Any) -> Any:
    """Return a result where and as its argument ``like`` was."""
    if not is_there(like):
        return made.copy_to_host(stream=stream)
    if type(like).__module__.partition(".")[0] == "cupy":
        import cupy

        return cupy.asarray(made)
    return made


def blocks_of(count: int, threads: int = THREADS) -> int:
    """Return how many blocks hold so many threads."""
    return -(-count // threads)
