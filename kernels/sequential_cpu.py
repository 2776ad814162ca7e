"""The Numba CPU form of sequential.py: subject by subject through all ticks. To import this is to import Numba."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numba

from gpuguard.kernels import sequential_lanes as lanes
from gpuguard.kernels.sequential import Cusum

if TYPE_CHECKING:
    import numpy as np

    from gpuguard.kernels.sequential import Bets, State

_cusum_of: Any = numba.njit(error_model="numpy")(lanes.cusum_of)
_bets_of: Any = numba.njit(error_model="numpy")(lanes.bets_of)


def run(samples: np.ndarray, test: Cusum | Bets, state: State) -> None:
    """Move on by float[ticks, subjects]."""
    if isinstance(test, Cusum):
        _cusum(samples, test.mean, test.std, test.rho, test.shift, test.threshold_nats, *state)
    else:
        _bets(samples, test.mean, test.rho, test.stakes, math.exp(test.threshold_nats), *state)


@numba.njit(error_model="numpy", nogil=True, cache=False)
def _cusum(samples: Any, mean: Any, std: Any, rho: Any, shift: Any, threshold: Any, value: Any, before: Any,
           ticks: Any, alarm: Any) -> None:
    for i in range(len(before)):
        _cusum_of(samples, i, mean[i], std[i], rho[i], shift, threshold, value, before, ticks, alarm)


@numba.njit(error_model="numpy", nogil=True, cache=False)
def _bets(samples: Any, mean: Any, rho: Any, stakes: Any, enough: Any, value: Any, before: Any, ticks: Any,
          alarm: Any) -> None:
    for i in range(len(before)):
        _bets_of(samples, i, mean[i], rho[i], stakes, enough, value, before, ticks, alarm)
