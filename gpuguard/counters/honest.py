"""Honest jobs of kinds that no forest was shown: what the height of a job is held against (`core.counter_jobs`).

Other compute only. Training and inference come nowhere near (docs/counters-measured.md), and a device that does
nothing but compute of unknown kinds is the worst that a site has: so the rate is that of such a device, and no mean
over a mix that nobody knows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from gpuguard.core.counter_jobs import JOB_HOURS, Honest
from gpuguard.counters import evaluation
from gpuguard.lab import telemetry

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gpuguard.core.counter_classes import Model

#: Jobs of each kind and source of counters: as many as show one alarm a GPU-year. The share of the highest that a tail
#: is fitted to.
JOBS_EACH, TAIL_SHARE = 43, 0.02
RESAMPLES = 200
#: Fewer jobs than these are no tail.
TAIL_MIN = 30


class Replayed(NamedTuple):
    """The highest that each honest job came, and its kind."""

    heights: np.ndarray
    kind: np.ndarray


def replay(models: Mapping[int, Model], group_of: Mapping[str, int], each: int, seed: int) -> Replayed:
    """Replay jobs of every kind of other compute, each by the model that was not shown its group."""
    parts = []
    for group, model in models.items():
        kinds = [one for one in telemetry.COMPUTE if group_of[one.name] == group]
        some = evaluation.jobs_of(kinds, telemetry.EVASIONS[:1], each, np.random.default_rng([seed, group]))
        heights = evaluation.play(model, some, JOB_HOURS * 3600, [seed, group, 1])
        parts.append((heights.max(axis=1), np.array([job.workload.name for job in some])))
    return Replayed(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def honest_of(replayed: Replayed, most: float, seed: int) -> Honest:
    """Return what jobs are held against: their heights, at most ``most``, and a tail, fitted anew to kinds at random.

    Jobs of one kind are alike, so kinds are drawn and not jobs: what the bounds tell is how much hangs on the kinds
    that there happen to be.
    """
    random, heights = np.random.default_rng(seed), np.sort(replayed.heights)
    above = float(heights[-max(2, round(TAIL_SHARE * len(heights)))])
    if (heights > above).sum() < TAIL_MIN:
        return Honest(heights, most)
    by_kind = [replayed.heights[replayed.kind == name] for name in np.unique(replayed.kind)]
    tails = [_tail(heights, above)]
    while len(tails) <= RESAMPLES:
        drawn = np.concatenate([by_kind[i] for i in random.integers(len(by_kind), size=len(by_kind))])
        if (drawn > above).sum() > 1:
            tails.append(_tail(drawn, above))
    return Honest(heights, most, above, *np.array(tails).T)


def _tail(heights: np.ndarray, above: float) -> tuple[float, float, float]:
    """Return the share of heights above a bound, and shape and scale of a generalised Pareto distribution of the rest.

    By probability-weighted moments (Hosking and Wallis 1987): for some hundred values as good as maximum likelihood,
    and in closed form.
    """
    over = np.sort(heights[heights > above]) - above
    rank = (np.arange(1, len(over) + 1) - 0.35) / len(over)
    first, second = float(over.mean()), float(((1 - rank) * over).mean())
    return len(over) / len(heights), 2 - first / (first - 2 * second), 2 * first * second / (first - 2 * second)
