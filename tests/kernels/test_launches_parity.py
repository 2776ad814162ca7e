"""The compiled form of the launch features equals the plain one, and both hold what their names say."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuguard.core.records import LAUNCH
from gpuguard.kernels.launches import COMPILED_ROWS_MIN, FEATURE, compiled, features, reference


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
    plain, fast = reference(table), compiled(table)
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
    assert features(row(launches=1), "numba")[1] == "numba"
    assert features(np.repeat(row(launches=1), COMPILED_ROWS_MIN))[1] == "numba"
    assert len(features(np.zeros(0, LAUNCH), "numba")[0]) == 0


def test_numba_is_not_loaded_before_it_is_needed():
    code = "import sys, gpuguard.core.detectors as d; d.new_detectors(); print('numba' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
