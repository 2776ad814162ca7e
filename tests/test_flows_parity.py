"""The compiled flow table tells what the plain one tells, on random and degenerate packets, however they are cut."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuguard import _flows
from gpuguard.core.observations import CLOSED_FLOW, OPENED_FLOW
from gpuguard.core.records import PACKET

sys.path.insert(0, str(Path(__file__).parent))
import reference_flows

MAPPED = b"\0" * 10 + b"\xff\xff"
ADDRESSES = (MAPPED + bytes([10, 0, 0, 1]), MAPPED + bytes([10, 0, 0, 2]), b"\xfe" * 16)

BY_ROW = {reference_flows.DULL: CLOSED_FLOW, reference_flows.UNANSWERED: CLOSED_FLOW,
          reference_flows.BEGUN: OPENED_FLOW}

packet = st.tuples(
    st.integers(-2, 200) | st.integers(0, 100_000_000),  # gap in ms
    st.integers(0, 2),
    st.integers(0, 2),
    st.sampled_from((22, 4000, 0)),
    st.sampled_from((22, 4000, 2048, 0)),
    st.sampled_from((0, 1, 100, 150, 250, 2**24 + 300, 2**32 - 1, 2**32 - 100, 2**31)) | st.integers(0, 400),
    st.sampled_from((0, 1, 36, 50, 100, 512, 513, 1448, 70_000)),
    st.sampled_from((6, 6, 6, 6, 17, 1, 58)),
    st.sampled_from((16, 16, 24, 16, 2, 18, 17, 4, 32, 0, 1, 41)),
    st.sampled_from((4, 4, 4, 6, 4 | 2 << 4, 6 | 3 << 4)),
)


def rows_of(packets):
    rows = np.zeros(len(packets), PACKET)
    now = 10**18
    for row, one in zip(rows, packets, strict=True):
        gap_ms, source, destination, near, far, sequence, size, protocol, flags, version = one
        now += gap_ms * 1_000_000 + 123
        row["time_ns"] = now
        row["source"] = np.frombuffer(ADDRESSES[source], "u1")
        row["destination"] = np.frombuffer(ADDRESSES[destination], "u1")
        row["source_port"], row["destination_port"] = near, far
        row["sequence"], row["payload_bytes"] = sequence, size
        row["protocol"], row["tcp_flags"], row["ip_version"] = protocol, flags, version
        row["acknowledgement"] = 3 * size
    return rows


def same(told):
    return [tuple(x if isinstance(x, bytes | tuple) else int(x) for x in one) for one in spread(told)]


def spread(told):
    """One tuple a dull flow, as the plain table has it."""
    for one in told:
        kind = one[0]
        if kind not in BY_ROW or not isinstance(one[1], bytes):
            yield one
            continue
        rows = np.frombuffer(one[1], BY_ROW[kind])
        if kind == reference_flows.DULL:
            assert one[2] == ((rows["payload_bytes_responder"] == 0) | (rows["missed"] != 0)).sum()
        for row in rows:
            yield (kind, *(
                bytes(row[name]) if name in ("initiator", "responder") else row[name] for name in rows.dtype.names))


def both(size_max, **options):
    return _flows.Table(size_max, **options), reference_flows.Table(size_max, **options)


def check(fast, plain, rows, cuts, watch, mark=0):
    now = 10**18
    last = 0
    for number, cut in enumerate( [*cuts, len(rows)]):
        assert same(fast.run(rows, last, cut, 7)) == same(plain.run(rows, last, cut, 7))
        if cut < len(rows):
            if mark:
                assert fast.mark(rows, cut, 7, mark) == plain.mark(rows, cut, 7, mark)
            if mark == 2 and number == 1:
                assert same(fast.listen()) == same(plain.listen())
        if cut < len(rows) and (watch or not mark):
            assert fast.touch(rows, cut, 7) == plain.touch(rows, cut, 7)
            slot, side, _ = plain.touch(rows, cut, 7)
            if watch:
                fast.watch(slot, side, (int(rows["sequence"][cut]) + 3) & 0xFFFFFFFF)
                plain.watch(slot, side, (int(rows["sequence"][cut]) + 3) & 0xFFFFFFFF)
            (netns, protocol, low, high), _ = plain.key(rows[cut], 7)
            for ends in ((*low, *high), (*high, *low)):
                assert fast.packets_of(netns, protocol, *ends) == plain.packets_of(netns, protocol, *ends)
        last = cut
        if len(rows):
            now = int(rows["time_ns"][: max(1, cut)].max())
        assert same(fast.tick(now)) == same(plain.tick(now))
    assert same(fast.tick(now + 5 * 10**9)) == same(plain.tick(now + 5 * 10**9))
    assert same(fast.tick(now + 11 * 10**9)) == same(plain.tick(now + 11 * 10**9))
    assert same(fast.close(now + 10**12)) == same(plain.close(now + 10**12))
    assert fast.evicted == plain.evicted
    assert fast.size == len(plain.flows) == 0


@settings(max_examples=400, deadline=None, derandomize=True)
@given(
    st.lists(packet, max_size=80),
    st.sampled_from((1, 2, 3, 64)),
    st.lists(st.integers(0, 80), max_size=4),
    st.booleans(),
)
def test_random(packets, size_max, cuts, watch):
    rows = rows_of(packets)
    check(*both(size_max), rows, sorted(min(cut, len(rows)) for cut in cuts), watch)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(
    st.lists(packet, max_size=80),
    st.sampled_from((1, 2, 3, 64)),
    st.lists(st.integers(0, 80), max_size=4),
    st.booleans(),
    st.integers(0, 2),
    st.sampled_from(({"quiet_flows": True}, {"quiet_exchanges": True}, {"quiet_flows": True, "quiet_exchanges": True})),
)
def test_random_quiet(packets, size_max, cuts, watch, mark, options):
    rows = rows_of(packets)
    check(*both(size_max, **options), rows, sorted(min(cut, len(rows)) for cut in cuts), watch, mark)


segment = st.tuples(
    st.sampled_from((1, 20, 20, 21, 90, 300, 1200)),
    st.booleans(),
    st.integers(0, 12),
    st.sampled_from((1, 36, 76, 600, 1448)),
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(segment, max_size=200), st.integers(0, 2**32 - 1))
def test_conversation(segments, first_sequence):
    """One long conversation whose numbers wrap, with losses, late arrivals and repeats."""
    packets, numbers = [], [first_sequence, (first_sequence * 7) & 0xFFFFFFFF]
    for gap_ms, back, fault, size in segments:
        sequence = numbers[back]
        if fault == 1:  # sent again
            sequence = (sequence - size) & 0xFFFFFFFF
        elif fault == 2:  # one was lost before it
            sequence = (sequence + 100) & 0xFFFFFFFF
        elif fault == 3:  # a late one, over a hole
            sequence = (sequence - 150) & 0xFFFFFFFF
        if fault in (0, 2) or fault > 3:
            numbers[back] = (sequence + size) & 0xFFFFFFFF
        ends = (1, 0, 22, 4000) if back else (0, 1, 4000, 22)
        packets.append((gap_ms, *ends, sequence, size, 6, 16, 4))
    rows = rows_of(packets)
    check(*both(8), rows, [0, len(rows) // 2], watch=bool(len(rows) > 1))
    check(*both(8, quiet_flows=True, quiet_exchanges=True), rows, [len(rows) // 2], watch=False, mark=1)


moved = st.tuples(
    st.sampled_from((0, 1, 1, 30, 90, 700, 1200)),
    st.booleans(),
    st.integers(0, 12),  # how many places it comes late
    st.integers(0, 20),  # 0: lost
    st.sampled_from((1, 36, 36, 600, 1448)),
    st.sampled_from((0, 0, 0, 100, 40_000)),  # how far behind the acknowledgement is
)


def moved_rows(segments, first_sequence, *, loss=True):
    """Packets of a conversation whose segments come in another order than they were sent in."""
    numbers = [first_sequence, (first_sequence * 7) & 0xFFFFFFFF]
    packets, places, acknowledgements = [], [], []
    for at, (gap_ms, back, late, kept, size, behind) in enumerate(segments):
        sequence, numbers[back] = numbers[back], (numbers[back] + size) & 0xFFFFFFFF
        if kept or not loss:
            ends = (1, 0, 22, 4000) if back else (0, 1, 4000, 22)
            packets.append((gap_ms, *ends, sequence, size, 6, 16, 4))
            places.append(at + (late if late > 2 else 0))
            acknowledgements.append((numbers[not back] - behind) & 0xFFFFFFFF)
    rows = rows_of(packets)
    rows["acknowledgement"] = acknowledgements
    moved = rows[np.argsort(places, kind="stable")]
    moved["time_ns"] = rows["time_ns"]
    return moved


@settings(max_examples=400, deadline=None, derandomize=True)
@given(st.lists(moved, min_size=3, max_size=120), st.integers(0, 2**32 - 1))
def test_another_order(segments, first_sequence):
    rows = moved_rows(segments, first_sequence)
    cuts = [0, 1, 2, len(rows) // 2]
    check(*both(8), rows, sorted(min(cut, len(rows)) for cut in cuts), watch=True)


def watched(rows):
    """What is told of the segments of a flow both of whose sides are watched from their first byte on."""
    table = _flows.Table(8)
    for side in (0, 1):
        slot, *_ = table.touch(rows, 0, 7)
        table.watch(slot, side, int(rows["sequence"][0]) if side == 0 else 0)
    told = [*table.run(rows, 0, len(rows), 7), *table.close(2 * 10**18)]
    return [one[1:] for one in told if one[0] == reference_flows.SEGMENT]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.sampled_from((1, 36, 600, 1000)), st.integers(0, 2)), min_size=1, max_size=60),
       st.integers(0, 2**32 - 1))
def test_a_stream_is_told_of_in_its_order_however_it_came(segments, first_sequence):
    """Segments that come up to four places late (2: in their own) leave no hole, and no time runs backwards."""
    sizes = [36, *(size for size, _ in segments)]
    rows = moved_rows([(1, False, 0 if at == 0 else 2 + late, 1, size, 0) for at, (size, late) in
                       enumerate([(36, 0), *segments])], first_sequence)
    told = watched(rows)
    assert [one[3] for one in told] == sizes
    assert [one[4] for one in told] == np.cumsum(sizes).tolist()
    assert [one[6:] for one in told] == [(0, 0)] * len(sizes)
    assert [one[0] for one in told] == sorted(one[0] for one in told)


def test_what_never_came_is_a_hole_when_the_other_side_has_it_or_a_second_has_passed():
    first = (1, False, 0, 1, 36, 0)
    lost = (1, False, 0, 0, 100, 0)
    behind = (1, False, 0, 1, 50, 0)
    for after, when in (((5, True, 0, 1, 20, 0), 1), ((5, True, 0, 1, 20, 1000), 2), ((1200, True, 0, 1, 20, 1000), 1)):
        told = watched(moved_rows([first, lost, behind, after], 1000))
        assert [one[3] for one in told].index(50) == when
        assert told[when][6:] == (1, 0)


def test_what_comes_when_its_hole_was_given_up_is_not_told():
    segments = [(1, False, 0, 1, 36, 0), (1, False, 4, 1, 100, 0), (1, False, 0, 1, 50, 0), (1, True, 0, 1, 20, 0),
                (1, False, 3, 1, 10, 0)]
    told = watched(moved_rows(segments, 1000))
    assert [one[3] for one in told] == [36, 50, 20, 10]
    assert told[-1][4] == 196


def test_of_more_than_eight_segments_behind_a_hole_all_are_told():
    segments = [(1, False, 0, at != 1, 10 + at, 0) for at in range(11)]
    told = watched(moved_rows(segments, 2**32 - 50))
    assert [one[3] for one in told] == [10, *range(12, 21)]
    assert [one[6] for one in told] == [0] + [1] * 9
    assert told[1][5] == 10


echo = st.tuples(st.sampled_from((20, 200, 1000, 5000)), st.integers(0, 2), st.sampled_from((0, 1, 36, 56, 512, 513)),
                 st.sampled_from((0, 1, 36, 56, 57, 120, 512, 513)), st.integers(0, 9))


@settings(max_examples=400, deadline=None, derandomize=True)
@given(st.lists(echo, max_size=50), st.lists(st.integers(0, 150), max_size=3), st.booleans(),
       st.sampled_from(({}, {"quiet_flows": True}, {"quiet_flows": True, "quiet_exchanges": True})))
def test_echoes(echoes, cuts, version_6, options):
    """Three conversations of echoes: answered alike or not, late, twice, asked by the other side, from nobody."""
    protocol, kinds = (58, (128 << 8, 129 << 8)) if version_6 else (1, (8 << 8, 0))
    packets = []
    for gap_ms, number, asked, answered, fault in echoes:
        back = fault == 1
        for side, size in ((0, asked), (1, answered), (1, answered)) if fault == 2 else ((0, asked), (1, answered)):
            ends = (1, 0) if back != side else (0, 1)
            delay_ms = gap_ms if side == 0 else 1100 if fault == 3 else 2
            packets.append((delay_ms, *ends, kinds[side] if fault < 9 else 3 << 8, number, 0, size, protocol, 16, 4))
    rows = rows_of(packets)
    check(*both(64, **options), rows, sorted(min(cut, len(rows)) for cut in cuts), watch=False)


paired = st.tuples(st.booleans(), st.integers(0, 24), st.sampled_from((0, 8, 56, 57, 543, 544, 552)),
                   st.sampled_from((0, 1, 56, 57, 70, 560, 1400)), st.sampled_from((1, 5, 200)))


@settings(max_examples=400, deadline=None, derandomize=True)
@given(st.lists(paired, max_size=120), st.booleans(), st.sampled_from((0, 65_530)), st.booleans())
def test_echoes_and_their_own_questions(echoes, version_6, first, quiet):
    """Questions and answers of some sequence numbers in any order: late, lost, twice, never asked."""
    protocol, kinds = (58, (128 << 8, 129 << 8)) if version_6 else (1, (8 << 8, 0))
    packets = [(gap_ms, int(not back), int(back), kinds[back], 7, (first + number) % 2**16, answer if back else asked,
                protocol, 16, 4) for back, number, asked, answer, gap_ms in echoes]
    rows = rows_of(packets)
    check(*both(64, quiet_flows=quiet), rows, [len(rows) // 2], watch=False, mark=1)


def test_answers_longer_than_their_questions_are_told_at_the_fourth_and_doubled():
    sizes = [(0, 0), (56, 56), *[(0, 3 + count) for count in range(16)]]
    rows = rows_of([(200, 1 - back, back, 0 if back else 8 << 8, 7, number, size[back], 1, 16, 4)
                    for number, size in enumerate(sizes) for back in (0, 1)])
    fast, plain = both(4, quiet_flows=True)
    told = fast.run(rows, 0, len(rows), 7)
    assert same(told) == same(plain.run(rows, 0, len(rows), 7))
    assert [one[4:6] for one in told if one[0] == reference_flows.NOT_ECHOES] == [(4, 18), (8, 52), (16, 168)]


sent = st.tuples(st.integers(0, 60_000), st.sampled_from((0, 4, 12, 56, 100)), st.sampled_from((1, 200)))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(sent, min_size=10, max_size=140), st.sampled_from((8, 0, 13, 15, 17, 3, 128, 129)), st.booleans(),
       st.sampled_from((0, 0, 0, 5)), st.integers(0, 140), st.booleans())
def test_what_goes_one_way_in_icmp(packets, kind, back, stray, cut, quiet):
    """One type for long, of sizes that vary or not, and what ends it."""
    protocol = 58 if kind > 100 else 1
    rows = rows_of([(gap_ms, int(back), int(not back), (kind if at != 40 or not stray else stray) << 8, 7, at,
                     size if size % 3 else room, protocol, 16, 4) for at, (size, room, gap_ms) in enumerate(packets)])
    check(*both(64, quiet_flows=quiet), rows, [min(cut, len(rows))], watch=False, mark=1)


def test_questions_of_many_sizes_that_nobody_answers_are_told_when_they_double():
    rows = rows_of([(200, 1, 0, 8 << 8, 7, at, 200 + at * 379 % 700, 1, 16, 4) for at in range(200)])
    fast, plain = both(4, quiet_flows=True)
    told = fast.run(rows, 0, len(rows), 7)
    assert same(told) == same(plain.run(rows, 0, len(rows), 7))
    assert [one[3:5] for one in told if one[0] == reference_flows.NOT_ECHOES] == [(2, 32), (2, 64), (2, 128)]


def test_of_more_dull_echoes_than_are_kept_each_is_told():
    flows = reference_flows.ECHOES_MAX + 20
    asked = [(1, 0, 1, 8 << 8, number, 0, 56, 1, 16, 4) for number in range(flows)]
    answered = [(0, 1, 0, 0, number, 0, 57, 1, 16, 4) for number in range(flows)]
    rows = rows_of([*asked[:1], (100, *asked[1][1:]), *asked[2:], *answered, *asked, *answered])
    rows["time_ns"] = 10**18 + np.arange(len(rows)) * 200_000
    rows["time_ns"][2 * flows:] += 10**9
    fast, plain = both(4096, quiet_flows=True, quiet_exchanges=True)
    told = fast.run(rows, 0, len(rows), 7)
    assert same(told) == same(plain.run(rows, 0, len(rows), 7))
    assert sum(one[0] == reference_flows.EXCHANGE for one in told) == 20
    assert same(fast.close(2 * 10**18)) == same(plain.close(2 * 10**18))
