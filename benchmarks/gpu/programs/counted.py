"""Launch a kernel of a known name exactly so many times from one of Python's ways to the GPU.

    counted.py WAY COUNT       WAY is torch, cupy, numba, triton or graph

Prints one JSON line: the name to look for and the launches made. What the library launches beside it is not counted.
"""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


def by_cupy(count: int) -> str:
    import cupy

    kernel = cupy.RawKernel('extern "C" __global__ void counted_by_cupy(int *x) { x[threadIdx.x] += 1; }',
                            "counted_by_cupy")
    x = cupy.zeros(32, cupy.int32)
    for _ in range(count):
        kernel((1,), (32,), (x,))
    cupy.cuda.runtime.deviceSynchronize()
    return "counted_by_cupy"


def by_numba(count: int) -> str:
    import numpy as np

    from gpuguard.kernels.device import cuda  # Numba's, made to go with NumPy 2.5

    @cuda.jit
    def counted_by_numba(x):  # noqa: ANN001, ANN202 numba infers them
        x[cuda.threadIdx.x] += 1

    x = cuda.to_device(np.zeros(32, np.int32))
    for _ in range(count):
        counted_by_numba[1, 32](x)
    cuda.synchronize()
    return "counted_by_numba"


def by_triton(count: int) -> str:
    import torch
    import triton
    import triton.language as tl

    @triton.jit
    def counted_by_triton(x):  # noqa: ANN001, ANN202 triton infers them
        at = x + tl.arange(0, 32)
        tl.store(at, tl.load(at) + 1)

    x = torch.zeros(32, dtype=torch.int32, device="cuda")
    for _ in range(count):
        counted_by_triton[(1,)](x)
    torch.cuda.synchronize()
    return "counted_by_triton"


def by_torch(count: int) -> str:
    import torch

    # An eigenvalue-free function that launches one kernel of a name that nothing else here uses.
    x = torch.rand(1024, device="cuda")
    for _ in range(count):
        torch.special.bessel_j0(x)
    torch.cuda.synchronize()
    return "bessel_j0"


def by_graph(count: int) -> str:
    import torch

    x = torch.rand(1024, device="cuda")
    torch.special.bessel_j1(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(8):
            torch.special.bessel_j1(x)
    for _ in range(count):
        graph.replay()
    torch.cuda.synchronize()
    return "graph of 8 kernels"


WAYS: dict[str, Callable[[int], str]] = {
    "torch": by_torch, "cupy": by_cupy, "numba": by_numba, "triton": by_triton, "graph": by_graph,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("way", choices=WAYS)
    parser.add_argument("count", type=int)
    arguments = parser.parse_args()
    name = WAYS[arguments.way](arguments.count)
    print(json.dumps({"name": name, "launches": arguments.count}))


if __name__ == "__main__":
    main()
