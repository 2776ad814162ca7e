"""What is written is what was trained, and what is measured is what the detector does."""

from __future__ import annotations

import platform
from importlib.resources import files

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuguard.core import counter_features as cf
from gpuguard.core.counter_classes import model_from
from gpuguard.core.counter_jobs import JOBS_PER_GPU_YEAR, MEMORY, Honest
from gpuguard.core.detectors.counters import Level, Look
from gpuguard.counters import evaluation, honest, jobs, train
from gpuguard.counters.shipped import shipped_model
from gpuguard.lab import telemetry


def table(rows, seed=0):
    random = np.random.default_rng(seed)
    label = random.integers(0, len(train.CLASSES), rows)
    features = random.random((rows, len(cf.FEATURES))).astype(np.float32)
    features[:, 0] += label
    features[random.random(features.shape) < 0.1] = cf.ABSENT
    names = np.array(["x"] * rows)
    return train.Table(features, label, np.arange(rows), names, names, names)


def test_the_arrays_say_what_the_trainer_says(tmp_path):
    lightgbm = pytest.importorskip("lightgbm")
    some = table(3000)
    weight, mining = train.weights(some.label), train.is_mining(some.label)
    hidden = np.where(train.NOT_RHYTHM, np.float32(cf.ABSENT), some.features)
    families = lightgbm.train(train.PARAMETERS, lightgbm.Dataset(some.features, some.label, weight=weight), 4)
    rhythm = lightgbm.train(train.RHYTHM_PARAMETERS, lightgbm.Dataset(hidden, mining, weight=weight), 4)
    train.write_model(tmp_path / "m.npz", train.fit(some, 4), (0.4, 0.7, 0.1))
    with np.load(tmp_path / "m.npz") as arrays:
        model = model_from(dict(arrays))
    odds, probabilities = model.odds(some.features)
    np.testing.assert_allclose(probabilities, families.predict(some.features), atol=1e-4)
    np.testing.assert_allclose(odds[:, 1], rhythm.predict(hidden, raw_score=True), atol=1e-4)
    nats, told = model.judge(some.features)
    np.testing.assert_allclose(nats, np.clip(odds @ [0.4, 0.7] + 0.1, model.nats_least, model.nats_most))
    np.testing.assert_allclose(told.sum(axis=1), 1.0)
    is_mining = [name.startswith("mining:") for name in model.classes]
    np.testing.assert_allclose(told[:, is_mining].sum(axis=1), 1 / (1 + np.exp(-(odds @ [0.4, 0.7] + 0.1))))


def test_rhythm_does_not_see_what_the_pipes_do():
    pytest.importorskip("lightgbm")
    some = table(3000)
    model, changed = train.raw(train.fit(some, 2)), some.features.copy()
    changed[:, train.NOT_RHYTHM] = np.random.default_rng(1).random((3000, train.NOT_RHYTHM.sum()))
    (families, rhythm), (other, same) = (model.odds(one)[0].T for one in (some.features, changed))
    assert np.array_equal(rhythm, same)
    assert not np.array_equal(families, other)


def test_a_model_of_other_features_is_refused(tmp_path):
    pytest.importorskip("lightgbm")
    train.write_model(tmp_path / "m.npz", train.fit(table(800), 1), (1.0, 0.0, 0.0))
    with np.load(tmp_path / "m.npz") as arrays:
        held = dict(arrays)
    held["feature_names"] = held["feature_names"][::-1]
    with pytest.raises(ValueError, match="other features"):
        model_from(held)


def test_a_line_is_found_where_there_is_one_and_else_nothing_is_made_of_it():
    random = np.random.default_rng(5)
    odds, weight = 3 * random.normal(size=(30_000, 2)), np.ones(30_000)
    chance = 1 / (1 + np.exp(-(odds @ [0.7, 0.4] - 0.5)))
    found = train.line_through(odds, random.random(30_000) < chance, weight)
    assert found == pytest.approx((0.7, 0.4, -0.5), abs=0.05)
    with pytest.raises(ArithmeticError, match="no line"):
        train.line_through(odds, odds[:, 0] > 0, weight)


def test_each_half_of_the_weight_is_one_side():
    label = np.repeat(np.arange(len(train.CLASSES)), np.arange(1, len(train.CLASSES) + 1))
    weight = train.weights(label)
    assert weight[train.is_mining(label)].sum() == pytest.approx(weight.sum() / 2)


def test_the_same_seed_draws_the_same_jobs_and_looks():
    drawn = [list(jobs.draw(telemetry.MINERS, telemetry.EVASIONS, 12, np.random.default_rng(4))) for _ in range(2)]
    assert drawn[0] == drawn[1]
    looks = [jobs.look_at(drawn[0], 100, 1.0, np.random.default_rng(4)) for _ in range(2)]
    assert np.array_equal(looks[0].features, looks[1].features)
    assert looks[0].features.shape == (12, 5, len(cf.FEATURES))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.floats(-4, 6), st.booleans()), min_size=1, max_size=MEMORY + 40))
def test_heights_that_are_measured_are_those_of_the_detector(steps):
    level, want = Level(start_ns=0), []
    for nats, at_work in steps:
        if at_work:
            level.take(Look(0, 1, True, nats, (), (), (), 0.0), 2.0)
        want.append(level.height)
    nats, at_work = (np.array([column]) for column in zip(*steps, strict=True))
    np.testing.assert_allclose(evaluation.heights_of(nats, at_work, 2.0)[0], want, atol=1e-12)


def test_long_heights_are_those_of_the_detector():
    random = np.random.default_rng(3)
    nats, at_work = random.normal(2.2, 2.0, (1, 1500)), random.random((1, 1500)) < 0.9
    level, want = Level(start_ns=0), []
    for one, busy in zip(nats[0].tolist(), at_work[0].tolist(), strict=True):
        if busy:
            level.take(Look(0, 1, True, one, (), (), (), 0.0), 2.0)
        want.append(level.height)
    np.testing.assert_allclose(evaluation.heights_of(nats, at_work, 2.0)[0], want, atol=1e-12)


def test_a_count_of_none_proves_the_rule_of_three():
    assert evaluation.at_most(0) == pytest.approx(3.0, rel=0.002)
    assert [round(evaluation.at_most(k), 2) for k in (1, 5)] == [4.74, 10.51]  # half the 95 % quantile of chi square


def test_delays_are_of_the_first_crossing():
    heights = np.array([[1.0, 9.0, 1.0], [1.0, 2.0, 3.0]])
    assert evaluation.delays(heights, 5.0).tolist() == pytest.approx([40.0, np.nan], nan_ok=True)


def test_a_job_of_later_weeks_is_the_same_job_under_another_driver():
    some = [jobs.Job(one, telemetry.BOARDS[0], "gpm") for one in (*telemetry.MINERS[:2], *telemetry.TRAINING[:2])]
    now, later, same = (jobs.look_at([job._replace(weeks=weeks) for job in some], 60, 1.0, np.random.default_rng(4))
                        for weeks in (0.0, 40.0, 40.0))
    assert np.array_equal(later.features, same.features)
    assert np.array_equal(now.mining, later.mining)
    assert not np.array_equal(now.features, later.features)
    trace = telemetry.simulate(telemetry.MINERS[0], telemetry.BOARDS[0], 60, np.random.default_rng(1))
    old = telemetry.drifted(trace, 40.0)
    assert np.abs(old.shares / np.maximum(trace.shares, 1e-9) - 1)[trace.shares > 0.01].max() <= 0.05 + 1e-9
    assert ((old.shares >= 0) & (old.shares <= 1)).all()


def test_kinds_of_one_nature_are_left_out_together():
    for group in set(train.GROUPS.values()):
        out = {name for name, one in train.GROUPS.items() if one == group}
        for one in (*telemetry.MINERS, *telemetry.BENIGN):
            if one.family and one.name in out:
                assert {other.name for other in (*telemetry.MINERS, *telemetry.BENIGN)
                        if other.family == one.family} <= out


def replayed(random, kinds=20, each=90):
    """Return jobs whose heights are exponential, a tenth of them above nothing."""
    heights = np.where(random.random(kinds * each) < 0.1, random.exponential(0.2, kinds * each), 0.0)
    return honest.Replayed(heights, np.repeat(np.arange(kinds), each).astype(str))


def test_a_tail_of_a_known_shape_is_found_and_its_bounds_hold_the_truth():
    inside = 0
    for seed in range(20):
        seen = honest.honest_of(replayed(np.random.default_rng(seed)), 50.0, seed)
        limit = seen.limit(0.5)
        assert not limit.counted
        assert limit.height >= seen.heights[-1]
        inside += limit.least <= 0.1 * np.exp(-limit.height / 0.2) * JOBS_PER_GPU_YEAR <= limit.most
    assert inside >= 15


def test_what_is_written_of_honest_jobs_is_read(tmp_path):
    pytest.importorskip("lightgbm")
    seen = honest.honest_of(replayed(np.random.default_rng(0)), train.NATS_MOST - train.ALLOWANCE, 0)
    train.write_model(tmp_path / "m.npz", train.fit(table(800), 1), (1.0, 0.0, 0.0), seen)
    with np.load(tmp_path / "m.npz") as arrays:
        read = model_from(dict(arrays)).honest
    assert isinstance(read, Honest)
    for rate in (1000.0, 10.0, 0.5):
        assert read.limit(rate) == seen.limit(rate)


def test_the_card_tells_the_honest_jobs_of_the_model_beside_it():
    told = files("gpuguard.models").joinpath("counter_forest.md").read_text()
    assert train.of_honest_jobs(shipped_model().honest) in told
    assert f"Nats are {[round(one, 3) for one in shipped_model().line]}: " in told


@pytest.mark.skipif(platform.machine() != "x86_64", reason="logarithms round otherwise elsewhere")
def test_the_model_was_made_of_looks_that_are_simulated_today():
    told = files("gpuguard.models").joinpath("counter_forest.md").read_text()
    first = next(train.batches(train.SEED, train.JOBS))
    assert train.digest_of(first) in told, "the simulator or the features have changed: gpuguard train counters"


def test_too_few_jobs_are_no_tail_and_nothing_is_extrapolated():
    for heights in (np.zeros(60), np.linspace(0, 1, 60)):
        seen = honest.honest_of(honest.Replayed(heights, np.repeat("a", 60)), 2.8, 0)
        assert seen.limit(1000.0).counted
        assert seen.limit(1.0).height == np.inf
