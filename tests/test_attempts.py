"""The compiled memory of attempts and the one written for the eye agree on every input, cut anywhere."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuguard import _attempts
from gpuguard.core.observations import CLOSED_FLOW

sys.path.insert(0, str(Path(__file__).parent))
import reference_attempts as reference

EDGES = (0, 1, -1, 999_999_999, 1_000_000_000, 10**18, 2**63 - 1, -(2**63))
times = st.sampled_from(EDGES) | st.integers(-(2**63), 2**63 - 1) | st.integers(0, 5_000_000_000)
counts = st.sampled_from((0, 1, 4, 5, 2**64 - 1))
row = st.tuples(times, st.sampled_from((0, 0, 1, -1)), st.integers(0, 3), st.integers(0, 5),
                st.sampled_from((22, 443, 2379)), st.sampled_from((6, 6, 6, 17, 1, 58, 0, 255)), st.booleans(),
                st.integers(0, 3), st.booleans(), counts, counts, counts)


def rows_of(some):
    rows = np.zeros(len(some), CLOSED_FLOW)
    for at, (start_ns, netns, near, far, port, protocol, known, reason, missed, packets, sent, came) in enumerate(some):
        rows[at] = (0, start_ns, netns, bytes([near]) * 16, 1000 + at, bytes(15) + bytes([far]), port, protocol, known,
                    reason, 0, missed, packets, sent, came, 0, 0, 0, 0)
    return rows


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(row, min_size=1, max_size=60), st.integers(0, 59), st.sampled_from((8, 16, 64)),
       st.sampled_from((0, 1, 10**9, 2**63 - 1)))
def test_calls_apart(some, cut, size_max, apart_ns):
    rows = rows_of(some)
    expected = reference.apart(rows, kept := reference.Recent(43, size_max), apart_ns)
    seen, cut = _attempts.Recent(43, size_max), min(cut, len(rows) - 1)
    found = _attempts.apart(rows[:cut], seen, apart_ns)
    found += [(at + cut, before_ns) for at, before_ns in _attempts.apart(rows[cut:], seen, apart_ns)]
    assert found == expected
    assert len(seen) == len(kept)
    assert all(seen.get(key) == value for one in kept.sets for key, value in one.items())


def judged(module, rows, held, strangers):
    """Return where somebody has to look, and what is left in the end."""
    places, sources = module.Places({bytes(15) + b"\x01": 1, bytes(15) + b"\x03": 63}, {2379: 2}), {}
    for near, nats in held.items():
        key = bytes(8) + bytes([near]) * 16
        sources[key] = 0 if near in strangers else module.Tried()
        if near not in strangers:
            sources[key].nats = nats
            sources[key].targets.put(bytes(15) + b"\x02" + (22).to_bytes(2, "little") + b"\x06", 0)
    looked, at = [], 0
    while (at := module.succeed(rows, at, sources, places, -1.2, -0.25)) < len(rows):
        looked.append(at)
        at += 1
    return looked, [(one.nats, one.kinds, len(one.targets)) if one else None for one in sources.values()]


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(row, min_size=1, max_size=60), st.dictionaries(st.integers(0, 3), st.floats(0, 40)),
       st.sets(st.integers(0, 3), max_size=1))
def test_successes(some, held, strangers):
    rows = rows_of(some)
    assert judged(_attempts, rows, held, strangers) == judged(reference, rows, held, strangers)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, 99), times), max_size=300),
       st.sampled_from((8, 16, 32, 128)), st.integers(1, 48))
def test_what_was_used_last_is_kept(used, size_max, key_bytes):
    ours, plain = _attempts.Recent(key_bytes, size_max), reference.Recent(key_bytes, size_max)
    for number, value in used:
        key = bytes([number]) * key_bytes
        ours.put(key, value)
        plain.put(key, value)
        assert ours.get(key) == value
    assert len(ours) == len(plain)
    assert all((bytes([number]) * key_bytes in ours) == (bytes([number]) * key_bytes in plain) for number in range(100))


def test_of_many_targets_the_last_are_known():
    ours, plain = _attempts.Tried(), reference.Tried()
    nowhere = _attempts.Places({}, {})
    for number in (*range(6000), *range(3800, 4200), *range(4000, 6000)):
        ours.nats = plain.nats = 5.0
        target = number.to_bytes(19, "little")
        ours.succeed(target, nowhere, -1.2, -0.25)
        plain.succeed(target, reference.Places({}, {}), -1.2, -0.25)
        assert ours.nats == plain.nats
    assert len(ours.targets) == len(plain.targets) > 0.9 * reference.TARGETS_MAX


def test_what_is_no_table_no_key_and_no_row_is_refused():
    rows, nowhere = rows_of([(0, 0, 1, 2, 22, 6, True, 0, False, 9, 1, 1)] * 4), _attempts.Places({}, {})
    for key_bytes, size_max in ((0, 8), (49, 8), (19, 0), (19, 4), (19, 24), (19, 1 << 25)):
        with pytest.raises(ValueError, match="no table for"):
            _attempts.Recent(key_bytes, size_max)
    with pytest.raises(ValueError, match="43 bytes"):
        _attempts.Recent(43, 16).put(bytes(42), 0)
    for wrong in (rows[::2], rows["start_ns"], rows.reshape(2, 2), np.zeros(220, np.uint8), bytes(220)):
        with pytest.raises((ValueError, BufferError)):
            _attempts.apart(wrong, _attempts.Recent(43, 16), 1)
    assert _attempts.apart(rows[:0], _attempts.Recent(43, 16), 1) == []
    with pytest.raises(ValueError, match="43 bytes"):
        _attempts.apart(rows, _attempts.Recent(19, 16), 1)
    with pytest.raises(ValueError, match="begin before"):
        _attempts.apart(rows, _attempts.Recent(43, 16), -1)
    with pytest.raises(IndexError):
        _attempts.succeed(rows, -1, {}, nowhere, -1.2, -0.25)
    with pytest.raises(TypeError):
        _attempts.succeed(rows, 0, [], nowhere, -1.2, -0.25)
    with pytest.raises(TypeError):
        _attempts.succeed(rows, 0, {}, None, -1.2, -0.25)
    for addresses, ports in (({}, dict.fromkeys(range(17), 1)), ({bytes(15): 1}, {}), ({bytes(16): 0}, {}),
                             ({}, {22: 64}), ({}, {22: 0})):
        with pytest.raises(ValueError, match=r"at most 16|no place"):
            _attempts.Places(addresses, ports)
    with pytest.raises(OverflowError):
        _attempts.Places({}, {65_536: 1})
    with pytest.raises(ValueError, match="19 bytes"):
        nowhere.kind(bytes(18))
