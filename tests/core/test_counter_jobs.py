"""What a height is worth follows from how many honest jobs were seen, and from no more of them than were."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuguard.core.counter_jobs import JOBS_PER_GPU_YEAR, MEMORY, NONE_SEEN, Honest, highest
from gpuguard.core.detectors.counters import Level, Look

heights = st.lists(st.floats(0, 3) | st.just(0.0), min_size=1, max_size=200).map(lambda some: np.sort(np.array(some)))
rates = st.floats(1e-6, 1e5)


def exponential(count=4000, scale=0.3):
    """Return jobs with an exponential tail above 1, which one in a hundred exceeds."""
    some = np.sort(np.random.default_rng(1).uniform(0, 1, count))
    return Honest(some, math.inf, 1.0, np.full(3, 0.01), np.array([0.0, -0.1, 0.1]), np.full(3, scale))


@given(heights, st.floats(0, 4))
def test_the_chance_is_the_share_of_jobs_that_came_as_high_the_next_one_counted_in(some, height):
    naive = (1 + sum(one >= height for one in some.tolist())) / (1 + len(some))
    assert Honest(some).chance(height) == pytest.approx(naive)
    assert Honest(some).nats(height) == pytest.approx(-math.log(naive))


@given(heights, rates)
def test_a_limit_that_is_counted_keeps_its_rate_and_no_lower_one_does(some, rate):
    honest = Honest(some)
    limit = honest.limit(rate)
    if limit.counted:
        assert limit.alarms == pytest.approx(honest.chance(limit.height) * JOBS_PER_GPU_YEAR)
        assert limit.alarms <= max(rate, honest.supported) + 1e-9
        below = some[some < limit.height]
        if len(below) and rate < JOBS_PER_GPU_YEAR:
            assert honest.chance(float(below[-1])) * JOBS_PER_GPU_YEAR > rate * (1 - 1e-9)
    else:
        assert rate < honest.supported
        assert limit.height == math.inf


@given(st.lists(st.floats(0.01, 4000), min_size=2, max_size=6))
def test_a_stricter_rate_is_never_a_lower_limit(some):
    limits = [exponential().limit(rate).height for rate in sorted(some)]
    assert limits == sorted(limits, reverse=True)


def test_counting_supports_one_in_as_many_jobs_as_were_seen_and_one():
    honest = Honest(np.zeros(999))
    assert honest.supported == pytest.approx(JOBS_PER_GPU_YEAR / 1000)
    assert honest.limit(honest.supported).counted
    assert not honest.limit(0.99 * honest.supported).counted


def test_where_no_job_was_seen_nobody_is_suspect():
    assert NONE_SEEN.limit(0.1).height == math.inf
    assert NONE_SEEN.chance(3.0) == 1.0


def test_below_what_is_counted_a_tail_is_followed_and_its_bounds_are_told():
    honest = exponential()
    limit = honest.limit(0.1)
    # 0.01 exp(-(h - 1) / 0.3) jobs of a year are 0.1.
    assert limit.height == pytest.approx(1 + 0.3 * math.log(0.01 * JOBS_PER_GPU_YEAR / 0.1), rel=1e-4)
    assert limit.alarms == pytest.approx(0.1, rel=1e-3)
    assert limit.least < 0.1 < limit.most
    assert not limit.counted


def test_a_limit_that_is_counted_is_bounded_by_kinds_drawn_anew_where_a_tail_reaches_it():
    bare = np.sort(np.random.default_rng(1).uniform(0, 1, 4000))
    tailed = exponential()._replace(above=0.9)
    for rate in (1000.0, 10.0):
        counted, bounded = Honest(bare).limit(rate), tailed.limit(rate)
        assert counted.counted
        assert bounded.counted
        assert (bounded.height, bounded.alarms) == (counted.height, counted.alarms)
        assert counted.least == pytest.approx(counted.alarms) == counted.most
        assert (bounded.least < bounded.most) == (bounded.height > tailed.above)


@given(st.floats(0.01, 5), st.integers(1, 500))
def test_no_job_comes_higher_than_its_steps_allow(step, looks):
    level = Level(start_ns=0)
    for _ in range(looks):
        level.take(Look(0, 1, True, step, (), (), (), 0.0), 0.0)
    assert level.height <= highest(step) * (1 + 1e-9)
    if looks >= MEMORY:
        assert level.height == pytest.approx(highest(step))


def test_a_limit_that_no_job_can_reach_is_none():
    limit = exponential()._replace(most=1.5).limit(0.1)
    assert limit.height == math.inf
    assert not limit.counted
