"""What a device answered, read into numbers: the compiled readers and those written for the eye agree."""

from __future__ import annotations

import math
import struct
import sys
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gpuguard import _nvml
from gpuguard.core.records import Gpm
from gpuguard.sensors.nvml import gpm
from gpuguard.sensors.nvml.calls import FIELD, METRIC, METRICS_HEAD, WIDE
from gpuguard.sensors.nvml.fields import DIVISORS, HIGHEST, UNITS, WANTED

sys.path.insert(0, str(Path(__file__).parent.parent))
import reference_nvml as reference

TABLES = [{one: (Gpm.__struct_fields__.index(name), gpm.HIGHEST[one]) for one, name in table.items()}
          for table in (gpm.RATIOS, gpm.RATES, gpm.REQUESTS, gpm.CYCLES)]
PLACES = len(Gpm.__struct_fields__)
FIELDS = [(what, name, UNITS.get(name), DIVISORS.get(name, 1)) for what, _, _, name in WANTED]

exact = settings(max_examples=300, deadline=None, derandomize=True)
codes = st.sampled_from((0, 0, 0, 3, 2**32 - 1))
edges = st.sampled_from((-0.0, 100.0, 105.0, 1e8, 2.0**62, math.inf, math.nan, 5e-324))
levels = st.floats(0, 120) | edges | st.floats()
metrics = st.lists(st.tuples(st.sampled_from([*gpm.NAMES, 0, 400, 1023, 1024, 2**32 - 1]), codes, levels), max_size=40)


def same(one, other):
    """Return whether both are equal and of one type, NaN and the sign of 0 with them."""
    return repr(one) == repr(other)


@exact
@given(metrics, st.integers(1, 2**40), st.binary(max_size=METRICS_HEAD.size))
def test_metrics_are_those_read_for_the_eye(told, period_ns, short):
    answer = bytes(METRICS_HEAD.size) + b"".join(METRIC.pack(*one) for one in told)
    ours, theirs = _nvml.Metrics(TABLES, PLACES), reference.Metrics(TABLES, PLACES)
    assert same(ours.read(answer, period_ns), theirs.read(answer, period_ns))
    assert ours.read(short, period_ns) == [period_ns] + [None] * (PLACES - 1)


numbers = st.sampled_from((0, 1, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**64 - 1)) | st.integers(0, 2**64 - 1)
doubles = st.floats().map(lambda value: struct.unpack("<Q", struct.pack("<d", value))[0])
times = st.integers(0, 10) | st.integers(0, 2**50) | st.sampled_from((-(2**63), -1, 2**63 - 1))
field = st.tuples(times, st.sampled_from((0, 1, 2, 3, 4, 5, 6, 7, 2**32 - 1)), codes, numbers | doubles)
rounds = st.lists(st.lists(field, max_size=len(FIELDS)), max_size=6)


@exact
@given(rounds)
@example([[(1, 0, 0, 0xFFEFFFFFFFFFFFFF)] * 8, [(2, 0, 0, 0x7FEFFFFFFFFFFFFF)] * 8])  # by more than a double holds
def test_field_values_are_those_read_for_the_eye(told):
    """A counter is told by two reads, so all that came before counts."""
    ours, theirs = _nvml.FieldValues(FIELDS), reference.FieldValues(FIELDS)
    for fields in told:
        answer = b"".join(FIELD.pack(0, 0, time_us, 0, kind, code, bits) for time_us, kind, code, bits in fields)
        found, wanted = {}, {}
        assert ours.take(answer, found) == theirs.take(answer, wanted)
        assert same(found, wanted)


@exact
@given(st.lists(st.tuples(st.integers(1, 200_000), st.integers(0, 2**40)), min_size=2, max_size=8),
       st.sampled_from(sorted(WIDE)))
def test_counters_that_count_are_those_read_for_the_eye(steps, kind):
    ours, theirs = _nvml.FieldValues(FIELDS), reference.FieldValues(FIELDS)
    time_us, count = 1_760_000_000_000_000, 2**63
    for passed_us, counted in steps:
        time_us, count = time_us + passed_us, count + counted
        answer = FIELD.pack(0, 0, time_us, 0, kind, 0, count) * len(FIELDS)
        found, wanted = {}, {}
        assert ours.take(answer, found) == theirs.take(answer, wanted) == {}
        assert same(found, wanted)
    assert set(found) == {name for _, name, _, _ in FIELDS}


@exact
@given(st.integers(0, 7) | st.integers(0, 2**32 - 1), numbers | doubles)
def test_a_value_is_the_one_decoded_for_the_eye(kind, bits):
    assert same(_nvml.decode_value(kind, bits), reference.decode_value(kind, bits))


@exact
@given(st.floats(allow_nan=False), st.sampled_from((1e-9, 1, 1024)))
def test_a_rate_is_the_one_reckoned_for_the_eye(per_us, unit):
    assert same(_nvml.as_rate(per_us, unit), reference.as_rate(per_us, unit))


@exact
@given(st.dictionaries(st.sampled_from(sorted(HIGHEST)), st.none() | st.floats() | st.integers()))
def test_what_is_no_measurement_is_what_is_out_of_bounds(values):
    beyond = [name for name, value in values.items() if value is not None and not 0 <= value <= HIGHEST[name]]
    assert _nvml.beyond(values, HIGHEST) == beyond


calls = st.lists(st.integers(0, 20) | st.none(), max_size=8)


@exact
@given(calls, st.data())
def test_a_row_is_read_as_for_the_eye(sizes, data):
    at, asked = 8 * (1 + len(sizes)), []
    for size in sizes:
        asked.append((1, (0,), -1 if size is None else 0, 0 if size is None else at, size or 0, -1))
        at += size or 0
    turns = [(bytes(at), asked)] * 2
    row = data.draw(st.binary(min_size=at, max_size=at))
    assert _nvml.Calls(turns).read(row) == reference.Calls(turns).read(row)
    with pytest.raises(ValueError, match="a row of"):
        _nvml.Calls(turns).read(row + b"x")


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="no place"):
        _nvml.Metrics([{1024: (1, 1.0)}, {}, {}, {}], 2)
    with pytest.raises(ValueError, match="no place"):
        _nvml.Metrics([{1: (2, 1.0)}, {}, {}, {}], 2)
    with pytest.raises(ValueError, match="no place"):
        _nvml.Metrics([{}, {}, {}, {}, {1: (1, 1.0)}], 2)
    with pytest.raises(ValueError, match="65 fields"):
        _nvml.FieldValues(FIELDS[:1] * 65)
    with pytest.raises(ValueError, match="fields were answered"):
        _nvml.FieldValues(FIELDS[:1]).take(bytes(2 * FIELD.size), {})
