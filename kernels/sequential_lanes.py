"""What the compiled forms of sequential.py do for one subject: the same text for CPU and GPU, in double precision.

A CUSUM adds up millions of small steps, and capital is a product of as many factors: float32 would drift.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from gpuguard.kernels.sequential import CAPITAL_MAX


def cusum_of(samples: Any, i: Any, mean: Any, std: Any, rho: Any, shift: Any, threshold: Any, value: Any, before: Any,
             ticks: Any, alarm: Any) -> None:
    """Move the CUSUM of subject ``i`` on through all ticks."""
    worth = shift * math.sqrt((1 - rho) / (1 + rho))
    scale, drift = worth / (std * math.sqrt(1 - rho * rho)), worth * worth / 2
    nats, last, first = value[i, 0], before[i], alarm[i]
    for t in range(len(samples)):
        x = np.float64(samples[t, i])
        x = x if abs(x) < math.inf else np.float64(math.nan)
        step = scale * (x - mean - rho * (last - mean)) - drift
        if step == step:  # noqa: PLR0124 -- NaN alone is not itself: this sample or the one before is missing
            nats = max(nats + step, 0.0)
            if nats >= threshold and first < 0:
                first = ticks[0] + t
        last = x
    value[i, 0], before[i], alarm[i] = nats, last, first


def bets_of(samples: Any, i: Any, mean: Any, rho: Any, stakes: Any, enough: Any, value: Any, before: Any, ticks: Any,
            alarm: Any) -> None:
    """Move the bets against subject ``i`` on through all ticks."""
    last, first = before[i], alarm[i]
    for t in range(len(samples)):
        x = np.float64(samples[t, i])
        x = np.float64(min(max(x, 0.0), 1.0) if abs(x) < math.inf else math.nan)
        new = x - mean - rho * (last - mean)
        if new == new:  # noqa: PLR0124
            capital = 0.0
            for k in range(len(stakes)):
                held = (value[i, k] + 1.0) * (1.0 + stakes[k] * new)
                held = min(max(held, 0.0), CAPITAL_MAX)
                value[i, k] = held
                capital += held
            if capital >= enough * len(stakes) and first < 0:
                first = ticks[0] + t
        last = x
    before[i], alarm[i] = last, first
