"""Sequential tests: every form equal to the plain one, and thresholds that mean what they say, against simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuguard.kernels import sequential
from gpuguard.kernels.sequential import Bets, Cusum, cusum_arl, cusum_delay, cusum_threshold, cusum_ticks, run, start


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 6), st.sampled_from([0.1, 1.0, 3.0]), st.sampled_from([np.float32, float]))
def test_every_form_equals_the_plain_one(seed, subjects, shift, kind):
    dice = np.random.default_rng(seed)
    rho, mean = dice.choice([0, 0.3, 0.99], subjects), dice.uniform(0, 0.9, subjects)
    stakes = np.array([0.1, 0.5, 1.0]) * min(1, sequential.stake_max(mean, rho).min(initial=1))
    x = dice.normal(0.5, 1, (40, subjects))
    odd = dice.choice([np.nan, np.inf, -np.inf, 1e30], x.shape)
    x = np.where(dice.random(x.shape) < 0.1, odd, x).astype(kind)
    for test in (Cusum(mean, np.exp(dice.normal(size=subjects)), rho, shift, 2.0), Bets(mean, rho, stakes, 1.5)):
        states = {backend: start(test) for backend in ("reference", "numpy", "cpu")}
        for backend, state in states.items():
            for piece in (x[:13], x[13:13], x[13:]):
                assert run(piece, test, state, backend) == backend
        for backend in ("numpy", "cpu"):
            assert states[backend].alarm.tolist() == states["reference"].alarm.tolist()
            for one, other in zip(states["reference"], states[backend], strict=True):
                np.testing.assert_allclose(other, one, rtol=1e-9, atol=1e-12)
        assert not np.isnan(sequential.evidence_nats(test, states["cpu"])).any()


def autoregression(dice, rho, ticks, subjects):
    noise = dice.normal(size=(ticks, subjects))
    x = np.empty_like(noise)
    x[0] = noise[0]
    for t in range(1, ticks):
        x[t] = rho * x[t - 1] + math.sqrt(1 - rho * rho) * noise[t]
    return x


@pytest.mark.parametrize("rho", [0.0, 0.8])
def test_false_alarms_and_delays_are_those_computed(rho):
    subjects, shift = 3_000, 1.0
    worth = sequential.whitened(shift, rho)
    threshold = cusum_threshold(worth, 300)
    test = Cusum(np.zeros(subjects), np.ones(subjects), np.full(subjects, rho), shift, threshold)
    x = autoregression(np.random.default_rng(3), rho, 4_000, subjects)
    for true, wanted in ((0.0, cusum_ticks(worth, threshold, 0.0)), (shift, cusum_ticks(worth, threshold, worth))):
        state = start(test)
        run(x + true, test, state)
        assert (state.alarm >= 0).all()
        # The first tick has no predecessor; 3,000 runs tell the mean to 2 %.
        assert state.alarm.mean() == pytest.approx(wanted, rel=0.08)
    assert cusum_arl(worth, threshold) == pytest.approx(cusum_ticks(worth, threshold, 0.0), rel=0.05)
    assert cusum_delay(worth, threshold) == pytest.approx(cusum_ticks(worth, threshold, worth), rel=0.03)


@pytest.mark.parametrize(("shift", "delay_s"), [(0.5, 13.2), (1.0, 3.58), (2.0, 0.96)])
def test_one_false_alarm_a_gpu_year_at_ten_hertz(shift, delay_s):
    apart = sequential.ticks_between_alarms(1, 10)
    threshold = cusum_threshold(shift, apart)
    assert cusum_arl(shift, threshold) == pytest.approx(apart)
    assert cusum_ticks(shift, threshold, 0.0) == pytest.approx(apart, rel=0.06)
    assert cusum_delay(shift, threshold) / 10 == pytest.approx(delay_s, abs=0.02)


def test_a_shift_by_half_of_what_is_looked_for_takes_long_and_no_less():
    threshold = cusum_threshold(1.0, 1e6)
    by_shift = [cusum_ticks(1.0, threshold, shift) for shift in (0.0, 0.5, 1.0, 2.0)]
    assert by_shift == sorted(by_shift, reverse=True)


@pytest.mark.parametrize("rho", [0.0, 0.9])
def test_bets_alarm_no_more_often_than_they_may(rho):
    """Scores that are no normal noise: mostly 0, sometimes 1, and under rho in long runs of either."""
    dice, subjects, mean, ticks = np.random.default_rng(4), 600, 0.1, 600
    stays = dice.random((ticks, subjects)) < rho
    fresh = (dice.random((ticks, subjects)) < mean).astype(float)
    x = fresh.copy()
    for t in range(1, ticks):
        x[t] = np.where(stays[t], x[t - 1], fresh[t])
    test = Bets(np.full(subjects, mean), np.full(subjects, rho), np.array([0.2, 0.5, 1.0]), math.log(2_000))
    quiet, loud = start(test), start(test)
    run(x, test, quiet)
    # At 2,000 ticks apart on average, not above 600 in 2,000 can have alarmed by now.
    assert (quiet.alarm >= 0).mean() <= 0.33
    run(np.maximum(x, dice.random((ticks, subjects)) < 0.9), test, loud)
    assert (loud.alarm >= 0).all()


def test_the_delay_of_bets_is_about_threshold_over_growth():
    dice = np.random.default_rng(5)
    scores, stakes = (dice.random(4_000) < 0.6).astype(float), np.array([1.0, 3.0])
    test = Bets(np.full(400, 0.2), np.zeros(400), stakes, math.log(1e6))
    state = start(test)
    run((dice.random((400, 400)) < 0.6).astype(float), test, state)
    assert state.alarm.mean() == pytest.approx(sequential.bets_delay(scores, 0.2, 0.0, stakes, math.log(1e6)), rel=0.25)
    assert sequential.bets_delay(np.zeros(50), 0.2, 0.0, stakes, 1.0) == math.inf


def test_what_cannot_be_tested_is_refused():
    ones = np.ones(2)
    for test in (Cusum(ones, 0 * ones, 0 * ones, 1, 1), Cusum(ones, ones, ones, 1, 1),
                 Cusum(ones, ones, 0 * ones, 0, 1),
                 Bets(ones / 2, 0 * ones, np.array([2.1]), 1), Bets(ones / 2, -ones, np.array([0.5]), 1)):
        with pytest.raises(ValueError, match="need"):
            start(test)
    good = Bets(ones / 2, 0 * ones, np.array([2.0]), 1)
    with pytest.raises(ValueError, match="for 2 subjects"):
        run(np.zeros((3, 1)), good, start(good))
