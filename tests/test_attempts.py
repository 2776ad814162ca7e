"""The compiled memory of attempts and the one written for the eye agree on every input, cut anywhere."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuguard import _attempts
from gpuguard.core.events import FlowReport
from gpuguard.core.observations import CLOSED_FLOW
from gpuguard.core.records import PACKET, HostInfo, Packets
from gpuguard.recording.codec import RecordingError
from gpuguard.replaying import guard_for

sys.path.insert(0, str(Path(__file__).parent))
import reference_attempts as reference
from conversation import ACK, FIN, MAPPED, Conversation

NEAR = (10, 200, 0, 1)
EDGES = (0, 1, -1, 999_999_999, 1_000_000_000, 10**18, 2**63 - 1, -(2**63))
times = st.sampled_from(EDGES) | st.integers(-(2**63), 2**63 - 1) | st.integers(0, 5_000_000_000)
counts = st.sampled_from((0, 1, 4, 5, 2**64 - 1))
seeds = st.sampled_from((0, 1, 2**64 - 1)) | st.integers(0, 2**64 - 1)
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
       st.sampled_from((0, 1, 10**9, 2**63 - 1)), seeds)
def test_calls_apart(some, cut, size_max, apart_ns, seed):
    rows = rows_of(some)
    expected = reference.apart(rows, kept := reference.Recent(43, size_max, seed), apart_ns)
    seen, cut = _attempts.Recent(43, size_max, seed), min(cut, len(rows) - 1)
    found = _attempts.apart(rows[:cut], seen, apart_ns)
    found += [(at + cut, before_ns) for at, before_ns in _attempts.apart(rows[cut:], seen, apart_ns)]
    assert found == expected
    assert len(seen) == len(kept)
    assert all(seen.get(key) == value for one in kept.sets for key, value in one.items())


def judged(module, rows, held, strangers, seed):
    """Return where somebody has to look, and what is left in the end."""
    places, sources = module.Places({bytes(15) + b"\x01": 1, bytes(15) + b"\x03": 63}, {2379: 2}), {}
    for near, nats in held.items():
        key = bytes(8) + bytes([near]) * 16
        sources[key] = 0 if near in strangers else module.Tried(seed=seed)
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
       st.sets(st.integers(0, 3), max_size=1), seeds)
def test_successes(some, held, strangers, seed):
    rows = rows_of(some)
    assert judged(_attempts, rows, held, strangers, seed) == judged(reference, rows, held, strangers, seed)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, 99), times), max_size=300),
       st.sampled_from((8, 16, 32, 128)), st.integers(1, 48), seeds)
def test_what_was_used_last_is_kept(used, size_max, key_bytes, seed):
    ours, plain = _attempts.Recent(key_bytes, size_max, seed), reference.Recent(key_bytes, size_max, seed)
    for number, value in used:
        key = bytes([number]) * key_bytes
        ours.put(key, value)
        plain.put(key, value)
        assert ours.get(key) == value
    assert len(ours) == len(plain)
    assert all((bytes([number]) * key_bytes in ours) == (bytes([number]) * key_bytes in plain) for number in range(100))


def places_that_meet(count, seed):
    """Addresses whose services meet in one set of every table of this seed."""
    beside = {}
    for number in range(1 << 20):
        address = bytes((10, *number.to_bytes(3, "big")))
        key = bytes(8) + MAPPED + bytes(NEAR) + MAPPED + address + (22).to_bytes(2, "little") + b"\x06"
        met = beside.setdefault(reference.hash_of(key, seed) & 0x3fff, [])
        met.append((address, key))
        if len(met) == count:
            return met
    raise AssertionError


def test_who_knows_no_seed_cannot_crowd_a_set():
    met = [key for _, key in places_that_meet(2 * reference.WAYS, 0)]
    for seed, known in ((0, reference.WAYS), (1, len(met)), (0x9e3779b97f4a7c15, len(met))):
        seen = _attempts.Recent(43, 1 << 17, seed)
        for key in met:
            seen.put(key, 7)
        assert sum(key in seen for key in met) == known


def called(place, port, start_ns):
    talk = Conversation(port=port, start_ns=start_ns, near=NEAR, far=place)
    talk.say(0, 40)
    talk.say(1, 40)
    talk.packet(0, 0, ACK | FIN)
    talk.packet(1, 0, ACK | FIN)
    return talk.rows


@pytest.mark.parametrize(("settings_of_run", "told"), [({}, False), ({"seed": "0"}, False), ({"seed": "77"}, True)])
def test_a_guard_with_a_seed_sees_the_beat_between_places_chosen_to_hide_it(settings_of_run, told):
    (place, _), *others = places_that_meet(2 * reference.WAYS, 0)
    guard = guard_for(HostInfo(0, 1, "", "", 100, settings=settings_of_run))
    labels, now_ns = [], 10**18
    for beat in range(20):
        rows = called(place, 20_000 + beat, now_ns)
        for other, _ in others:
            rows += called(other, 30_000 + beat, now_ns + 10**9)
        now_ns += 60 * 10**9
        events = guard.receive(Packets(now_ns, 0, np.array(rows, PACKET)))
        labels += [event.finding.label for event in events if isinstance(event, FlowReport)]
    assert len(labels) == 20 * 2 * reference.WAYS
    assert ("beacon" in labels) == told


@pytest.mark.parametrize("seed", [str(1 << 64), "-1", "", "x", "9" * 5000])
def test_a_recording_with_no_such_seed_is_refused(seed):
    with pytest.raises(RecordingError):
        guard_for(HostInfo(0, 1, "", "", 100, settings={"seed": seed}))


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
