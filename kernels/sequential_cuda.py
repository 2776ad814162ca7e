"""The CUDA form of sequential.py: a thread a subject, the text of sequential_lanes.py. To import it imports Numba."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numba.cuda
import numpy as np

from gpuguard.kernels import device as gpu
from gpuguard.kernels import sequential_lanes as lanes
from gpuguard.kernels.sequential import Cusum

if TYPE_CHECKING:
    from gpuguard.kernels.sequential import Bets, State

cuda: Any = numba.cuda
_cusum_of: Any = cuda.jit(device=True)(lanes.cusum_of)
_bets_of: Any = cuda.jit(device=True)(lanes.bets_of)


def run(samples: Any, test: Cusum | Bets, state: State, device: int | None) -> None:
    """Move on by float32 or float64[ticks, subjects]. State on the GPU is moved on there, other state is brought back.

    Of a test or state of which some arrays are on the GPU, all must be.
    """
    subjects = samples.shape[1]
    with gpu.chosen_device(device):
        stream = gpu.stream_of(samples)
        own = [gpu.put(part, part.dtype, stream) for part in state]
        if subjects and len(samples):
            kind = samples.dtype if samples.dtype == np.float32 else np.float64
            read = gpu.put(samples, kind, stream)
            mean, rho = (gpu.put(part, np.float64, stream) for part in (test.mean, test.rho))
            grid = gpu.blocks_of(subjects), gpu.THREADS, stream
            if isinstance(test, Cusum):
                std = gpu.put(test.std, np.float64, stream)
                _cusum[grid](read, mean, std, rho, float(test.shift), float(test.threshold_nats), *own)
            else:
                stakes = gpu.put(test.stakes, np.float64, stream)
                _bets[grid](read, mean, rho, stakes, math.exp(test.threshold_nats), *own)
        _pass[1, 1, stream](own[2], len(samples))
        for part, there in zip(state, own, strict=True):
            if not gpu.is_there(part):
                there.copy_to_host(part, stream=stream)


@cuda.jit
def _pass(ticks: Any, more: Any) -> None:
    ticks[0] += more


@cuda.jit
def _cusum(samples: Any, mean: Any, std: Any, rho: Any, shift: Any, threshold: Any, value: Any, before: Any,
           ticks: Any, alarm: Any) -> None:
    i = cuda.grid(1)
    if i < len(before):
        _cusum_of(samples, i, mean[i], std[i], rho[i], shift, threshold, value, before, ticks, alarm)


@cuda.jit
def _bets(samples: Any, mean: Any, rho: Any, stakes: Any, enough: Any, value: Any, before: Any, ticks: Any,
          alarm: Any) -> None:
    i = cuda.grid(1)
    if i < len(before):
        _bets_of(samples, i, mean[i], rho[i], stakes, enough, value, before, ticks, alarm)
