"""Features of counter windows: what their names say, and every form equal to the plain one, also by the tick."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuguard.kernels import windows
from gpuguard.kernels.windows import FEATURES, SCALES, TOLERANCE, Scales, features, levels

sample = st.one_of(
    st.floats(-100, 100, width=32),
    st.sampled_from([0.0, 1.0, 1e6, -1e6, 1e15, 2e15, 1e-30, math.nan, math.inf, -math.inf]))
shapes = st.tuples(st.integers(1, 3), st.one_of(st.integers(1, 64), st.sampled_from([4, 8, 64])), st.integers(1, 16))


@st.composite
def some_windows(draw):
    shape = draw(shapes)
    dice = np.random.default_rng(draw(st.integers(0, 2**32)))
    kinds = np.array(draw(st.lists(sample, min_size=1, max_size=6)), np.float32)
    x = dice.choice(kinds, shape) if draw(st.booleans()) else dice.normal(draw(st.sampled_from([0, 1e4])), 1, shape)
    x = np.where(dice.random(shape) < draw(st.sampled_from([0, 0.05, 0.9])), np.nan, x).astype(np.float32)
    if draw(st.booleans()):
        x[:, :, 0] = kinds[0]
    return x


def agree(made, plain, x):
    """Hold each feature to what the head of the module promises of it."""
    largest = np.where(np.abs(x) <= windows.VALUE_MAX, np.abs(x.astype(np.float64)), 0).max(axis=1)
    for k, name in enumerate(FEATURES):
        one, other = made[:, k].astype(np.float64), plain[:, k].astype(np.float64)
        np.testing.assert_array_equal(np.isnan(one), np.isnan(other), err_msg=name)
        near = TOLERANCE * np.where(name in {"mean", "std", "min", "max", "slope", "roughness"}, largest, 1.0)
        if name == "slope":
            near = 16 * near
        if name == "lag1":
            # As far as the deviation stands above the rounding of the largest value; below, it is noise over noise.
            deviation = np.maximum(np.nan_to_num(plain[:, 2].astype(np.float64)), 1e-18)
            near = np.where(deviation < 1e-17, 2, 1e-3 + 64 * (TOLERANCE * largest / deviation))
        off = np.abs(np.nan_to_num(one) - np.nan_to_num(other)) - near - 1e-18
        assert (off <= 0).all(), (name, off.max())


@settings(max_examples=120, deadline=None)
@given(some_windows())
def test_every_form_equals_the_plain_one(x):
    held = levels(x.shape[2], 0.0, 1.0, 0.5)
    plain, form = features(x, held, "reference")
    assert form == "reference"
    assert plain.dtype == np.float32
    for backend in ("numpy", "cpu"):
        made, form = features(x, held, backend)
        assert form == backend
        assert made.shape == plain.shape == (len(x), len(FEATURES), x.shape[2])
        agree(made, plain, x)


@settings(max_examples=60, deadline=None)
@given(some_windows(), st.integers(0, 64))
def test_two_stretches_merge_into_what_both_are(x, cut):
    held, cut = levels(x.shape[2], 0.0, 1.0, 0.5), min(cut, x.shape[1])
    parts = [windows.summarise(part, held) if part.shape[1] else windows.nothing(len(x), x.shape[2])
             for part in (x[:, :cut], x[:, cut:])]
    agree(windows.finish(windows.merge(*parts, held.flat)), windows.reference(x, held), x)


@pytest.mark.parametrize("backend", ["numpy", "cpu"])
def test_windows_by_the_tick_equal_those_of_the_history(backend):
    dice = np.random.default_rng(2)
    x = dice.normal(100, 1, (4_700, 2, 3)).astype(np.float32)
    x[300:500, 0, 1], x[::5, 1, 2], x[:, 0, 2] = np.nan, np.inf, 7.0
    held = levels(3, 99.0, 101.0, 0.1)
    plain, fast = Scales(2, held, "reference"), Scales(2, held, backend)
    assert fast.backend == backend
    at = 0
    for count in (3, 5, 0, 1, 60, 400, 4_000, 231):
        plain.run(x[at:at + count])
        fast.run(x[at:at + count])
        at += count
        made, wanted = fast.features(), plain.features()
        assert made.shape == (2, len(SCALES), len(FEATURES), 3)
        np.testing.assert_allclose(made, wanted, rtol=1e-4, atol=100 * TOLERANCE)
        assert (made[0, :, FEATURES.index("std"), 2] == 0).all() or at < 512
    assert at % 8 == 4
    assert plain.ticks == fast.ticks == at
    whole, _ = features(x[at - 68:at - 4].swapaxes(0, 1), held, backend)
    np.testing.assert_allclose(fast.features()[:, 0], whole, rtol=1e-5, atol=100 * TOLERANCE)


def of(samples, **held):
    window = np.array(samples, np.float32)[None, :, None]
    return dict(zip(FEATURES, features(window, levels(1, **held), "reference")[0][0, :, 0].tolist(), strict=True))


def test_features_say_what_their_names_say():
    got = of([1, 2, 3, math.nan, 5, 5, 5, 4], low=2, high=4.5)
    assert (got["count"], got["min"], got["max"], got["flat_run"]) == (7, 1, 5, 3)
    assert got["mean"] == pytest.approx(25 / 7)
    assert got["std"] == pytest.approx(np.std([1, 2, 3, 5, 5, 5, 4]))
    assert got["slope"] == pytest.approx(np.polyfit([0, 1, 2, 4, 5, 6, 7], [1, 2, 3, 5, 5, 5, 4], 1)[0])
    assert got["below"] == pytest.approx(1 / 7)
    assert got["above"] == pytest.approx(3 / 7)
    assert got["roughness"] == pytest.approx(3 / 5)  # 1, 1, 0, 0, 1: no pair goes over the gap


def test_what_is_not_there_is_absent_and_a_constant_deviates_by_exactly_nothing():
    got = of([math.nan, math.inf, 1e16])
    assert (got["count"], got["flat_run"]) == (0, 0)
    assert all(math.isnan(value) for name, value in got.items() if name not in {"count", "flat_run"})
    for backend in ("reference", "numpy", "cpu"):
        constant = np.full((1, 64, 1), 0.1, np.float32)
        made = features(constant, levels(1), backend)[0][0, :, 0]
        assert made[FEATURES.index("std")] == 0
        assert made[FEATURES.index("lag1")] == 0
        assert made[FEATURES.index("flat_run")] == 64


def test_an_alternating_signal_is_its_own_opposite():
    assert of([1, -1] * 32)["lag1"] == -1
    assert of([1, 1, 1, 1, -1, -1, -1, -1])["lag1"] > 0.5


@pytest.mark.parametrize("shape", [(1, 0, 1), (1, 65, 1), (1, 8, 17), (1, 8, 0), (8, 1)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match="windows of shape"):
        features(np.zeros(shape, np.float32), levels(shape[-1]))


def test_no_gpu_is_touched_that_was_not_allotted():
    x, held = np.zeros((1, 8, 1), np.float32), levels(1)
    assert features(x, held)[1] == "numpy"
    with pytest.raises(ValueError, match="which uses none"):
        features(x, held, "numpy", device=0)
    with pytest.raises(ValueError, match="none of"):
        features(x, held, "numba")
    with pytest.raises(ValueError, match="no cuda form"):
        Scales(1, held, "cuda")
    code = """
import sys
import numpy as np
from gpuguard.kernels import forest, launches, opcodes, sequential, windows
windows.features(np.zeros((1, 8, 1), np.float32), windows.levels(1))
print(sys.modules.keys() & {"numba", "cupy"})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
