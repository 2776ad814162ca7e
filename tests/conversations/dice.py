"""How long things take and how large they are: families of draws, of which each conversation takes one."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from random import Random

    Draw = Callable[[], float]


def log_normal(rng: Random, median: float, sigma: float, most: float = math.inf) -> Draw:
    """Return draws around a median: what people and programs take is skewed to the right."""
    return lambda: min(most, median * math.exp(rng.gauss(0, sigma)))


def sizes(rng: Random, least: int, most: int) -> Draw:
    """Return message sizes: all one, nearly so (a counter), a few kinds, or all sorts."""
    usual = rng.uniform(math.log(least), math.log(most))
    one = math.exp(usual)
    few = [math.exp(rng.uniform(math.log(least), math.log(most))) for _ in range(rng.randint(2, 5))]
    often = [0.5 ** i for i in range(len(few))]
    sigma = rng.uniform(0.2, 0.9)
    return rng.choice((
        lambda: one,
        lambda: one + rng.randint(0, 3),
        lambda: rng.choices(few, often)[0],
        lambda: rng.choices(few, often)[0] + rng.randint(0, 2),
        lambda: max(least, min(most, one * math.exp(rng.gauss(0, sigma)))),
    ))


def work(rng: Random, least_s: float = 0.001, most_s: float = 3.0) -> Draw:
    """Return what a program takes: always the same, all sorts, or short where it knows the answer already."""
    median = math.exp(rng.uniform(math.log(least_s), math.log(most_s)))
    slow = log_normal(rng, median, rng.uniform(0.1, 1.0), 20 * most_s)
    cached = rng.uniform(0.1, 0.9)
    return rng.choice((
        lambda: median * rng.uniform(0.97, 1.05),
        slow,
        lambda: least_s * rng.uniform(0.8, 2) if rng.random() < cached else slow(),
    ))


def thought(rng: Random) -> Draw:
    """Return how long a client waits between its requests: not at all, by a timer, or as people do."""
    median = rng.choice((0.05, 0.3, 1.0, 4.0))
    return rng.choice((lambda: 0.0, lambda: 0.0, lambda: rng.uniform(1e-4, 8e-3),
                       lambda: median * rng.uniform(0.99, 1.01), log_normal(rng, median, 0.8)))


def at_once(rng: Random) -> Draw:
    """Return how soon a program answers that has nothing to work on."""
    return log_normal(rng, rng.choice((1e-4, 3e-4, 1e-3, 4e-3)), rng.uniform(0.1, 0.7), 0.05)
