"""The compiled form of the launch features equals the plain one, and both hold what their names say."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuguard.core.records import LAUNCH
from gpuguard.kernels.launches import (
    FEATURE,
    GAP_BUCKETS,
    VECTORISED_ROWS_MIN,
    compiled,
    event_rows,
    features,
    reference,
    vectorised,
)


def row(**values):
    one = np.zeros(1, LAUNCH)
    for name, value in values.items():
        one[name] = value
    return one


small = st.integers(0, 3)
rows = st.lists(
    st.builds(
        lambda pid, ticks, kernel, grid, shared, api, launches, first, span, gaps: (
            pid, ticks, kernel, grid, shared, api, launches, first, span, gaps),
        small, st.sampled_from([0, 5, 2**63]), st.sampled_from([0, 1, 2**64 - 1]), small, small, st.integers(0, 7),
        st.sampled_from([0, 1, 3, 2**40]), st.integers(-(2**60), 2**60), st.integers(0, 2**40),
        st.dictionaries(st.integers(0, 39), st.sampled_from([1, 2, 2**32 - 1]), max_size=4)),
    max_size=25)


def build(drawn):
    out = np.zeros(len(drawn), LAUNCH)
    for one, (pid, ticks, kernel, grid, shared, api, launches, first, span, gaps) in zip(out, drawn, strict=True):
        one["pid"], one["start_ticks"], one["kernel"], one["api"] = pid, ticks, kernel, api
        one["grid"], one["shared_bytes"], one["launches"] = (grid, 1, 1), shared, launches
        one["first_ns"], one["last_ns"] = first, first + span
        for bucket, count in gaps.items():
            one["gaps_log2"][bucket] = count
    return out


@settings(max_examples=150, deadline=None)
@given(rows)
def test_parity(drawn):
    table = build(drawn)
    for form in (vectorised, compiled):
        agree(reference(table), form(table))


def agree(plain, fast):
    assert plain.dtype == fast.dtype == FEATURE
    for name in FEATURE.names:
        if plain[name].dtype.kind == "f":
            np.testing.assert_allclose(fast[name], plain[name], rtol=1e-9, atol=1e-9, err_msg=name)
        else:
            np.testing.assert_array_equal(fast[name], plain[name], err_msg=name)


def test_features_of_one_search():
    gaps = np.zeros(40, "u4")
    gaps[24], gaps[25], gaps[30] = 60, 30, 10
    one, = reference(row(pid=3, start_ticks=4, kernel=9, launches=101, first_ns=5, last_ns=70, gaps_log2=gaps))
    assert (one["pid"], one["launches"], one["kernels"], one["geometries"]) == (3, 101, 1, 1)
    assert (one["top_ratio"], one["kernel_entropy_bits"], one["graph_ratio"]) == (1.0, 0.0, 0.0)
    assert one["cadence_ratio"] == pytest.approx(0.9)


def test_features_of_four_equal_kernels():
    table = np.concatenate([row(kernel=k, launches=10, api=4 * (k % 2), grid=(k // 2, 1, 1)) for k in range(4)])
    one, = reference(table)
    assert one["kernel_entropy_bits"] == pytest.approx(2.0)
    assert one["geometry_entropy_bits"] == pytest.approx(1.0)
    assert (one["top_ratio"], one["graph_ratio"], one["cadence_ratio"]) == (0.25, 0.5, 0.0)


def test_the_form_is_named():
    assert features(row(launches=1))[1] == "reference"
    assert features(row(launches=1), "cpu")[1] == "cpu"
    assert features(np.repeat(row(launches=1), VECTORISED_ROWS_MIN))[1] == "numpy"
    assert len(features(np.zeros(0, LAUNCH), "cpu")[0]) == 0


def test_numba_is_not_loaded_before_it_is_needed():
    code = "import sys, gpuguard.core.detectors as d; d.new_detectors(); print('numba' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_auto_never_loads_numba():
    code = """
import sys
import numpy as np
from gpuguard.core.records import LAUNCH
from gpuguard.kernels.launches import event_rows, features
assert features(np.zeros(100_000, LAUNCH))[1] == "numpy"
assert event_rows(np.arange(1_000_000), np.zeros(1_000_000, int), 1)[1] == "numpy"
assert "numba" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("error", ["ImportError", "PermissionError"])
def test_where_numba_cannot_be_read_the_plain_form_is_used_and_named(error):
    code = f"""
import builtins, sys
import numpy as np
before = builtins.__import__
def no_numba(name, *rest, **more):
    if name.split(".")[0] == "numba":
        raise {error}("not for us")
    return before(name, *rest, **more)
builtins.__import__ = no_numba
from gpuguard.core.records import LAUNCH
from gpuguard.kernels.launches import event_rows, features, reference
rows = np.zeros(50, LAUNCH)
rows["launches"] = 1
made, form = features(rows, "cpu")
assert form == "reference (cpu: {error})", form
assert (made == reference(rows)).all()
for backend in ("cpu", "cuda"):
    assert event_rows(np.arange(9), np.zeros(9, int), 1, backend)[1] == f"reference ({{backend}}: {error})"
"""
    subprocess.run([sys.executable, "-c", code], check=True)


# -- events -----------------------------------------------------------------------------------------------------------

events = st.lists(st.tuples(st.sampled_from([0, 1, 2, 3, 1000, 2**31, 2**40 - 1, 2**40, 2**52]), st.integers(0, 3)),
                  max_size=60)


@settings(max_examples=150, deadline=None)
@given(events, st.integers(-(2**60), 2**60), st.integers(4, 6))
def test_forms_of_events_agree(drawn, begin, count):
    times = begin + np.cumsum([0, *(gap for gap, _ in drawn)])[1:]
    keys = np.array([key for _, key in drawn], np.int32)
    plain, named = event_rows(times, keys, count, "reference")
    assert named == "reference"
    for backend in ("numpy", "cpu"):
        fast, named = event_rows(times, keys, count, backend)
        assert named == backend
        for one, other in zip(plain, fast, strict=True):
            np.testing.assert_array_equal(one, other)
            assert one.dtype == other.dtype


def test_aggregates_hold_what_they_say():
    (launches, first, last, gaps), _ = event_rows(np.array([5, 6, 10, 10, 1034]), np.array([1, 0, 1, 1, 1]), 3)
    assert (launches.tolist(), first.tolist(), last.tolist()) == ([1, 4, 0], [6, 5, 0], [6, 1034, 0])
    assert gaps.shape == (3, GAP_BUCKETS)
    assert {int(bucket): int(gaps[1, bucket]) for bucket in np.flatnonzero(gaps[1])} == {0: 1, 2: 1, 10: 1}


@pytest.mark.parametrize(("times", "keys"), [([1], []), ([1], [3]), ([1], [-1])])
def test_events_of_no_key_are_refused(times, keys):
    with pytest.raises(ValueError, match="keys"):
        event_rows(np.array(times), np.array(keys, int), 3)


def test_the_cuda_form_agrees_on_the_simulator():
    code = """
import numpy as np
from gpuguard.kernels.launches import event_rows
random = np.random.default_rng(3)
for count in (1, 7):
    keys = random.integers(0, count, 700)
    gaps = random.integers(0, 4, 700) * random.choice([0, 1, 1000, 2**39, 2**41], 700)
    times = np.cumsum(gaps) - 5
    plain, _ = event_rows(times, keys, count, "reference")
    fast, form = event_rows(times, keys, count, "cuda")
    assert form == "cuda", form
    for one, other in zip(plain, fast, strict=True):
        np.testing.assert_array_equal(one, other)
"""
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "NUMBA_ENABLE_CUDASIM": "1"})
