"""IP fragments: what they make a datagram of, and what hostile ones cost.

The compiled parser against the naive one on random pieces, and what is wanted of it on pieces written by hand.
"""

from __future__ import annotations

import itertools
import random
import struct
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuguard._packets import Parser
from gpuguard.core.flows import FlowTable
from gpuguard.core.observations import FlowClosed
from gpuguard.core.records import DnsMessage, Packets, SshBanner, SshKexInit, SshNewKeys

sys.path.insert(0, str(Path(__file__).parent))
import reference_packets as reference
from test_packets import SSH_STREAM, A, B, as_dict, exact, question, tcp, udp

MS = 10**6


def piece4(data, offset, more, *, number=7, protocol=17, ends=(A, B)):
    place = offset // 8 | more << 13
    head = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(data), number, place, 64, protocol, 0)
    return head + ends[0] + ends[1] + data


def piece6(data, offset, more, *, number=7, protocol=17, before=b""):
    head = struct.pack(">BBHI", protocol, 0, offset | more, number)
    size = len(before) + 8 + len(data)
    return (struct.pack(">IHBB", 6 << 28, size, 60 if before else 44, 64) + bytes(15) + b"\1" + bytes(15) + b"\2"
            + before + head + data)


def pieces(data, cuts, make=piece4, **options):
    """A datagram's pieces, in order; ``cuts`` are where they end, but for the last."""
    edges = [0, *cuts, len(data)]
    return [make(data[a:b], a, b < len(data), **options) for a, b in itertools.pairwise(edges)]


def echo(size, sequence=1, kind=8):
    return struct.pack(">BBHHH", kind, 0, 0, 77, sequence) + bytes(size)


def read(packets, times_ns=None):
    """Rows, facts and what was counted of fragments."""
    parser = Parser()
    for number, data in enumerate(packets):
        parser.frame(101, exact(data), times_ns[number] if times_ns else number * MS)
    counts = {name: count for name, count in parser.counts().items() if "fragment" in name or "datagram" in name}
    return *parser.take(), counts


def same(packets, times_ns=None):
    times_ns = times_ns or [number * MS for number in range(len(packets))]
    rows, facts, counts = read(packets, times_ns)
    fragments = reference.Fragments()
    expected, expected_facts = reference.read_frames([(101, one, len(one)) for one in packets], times_ns, fragments)
    assert [as_dict(row) for row in rows] == expected
    assert list(facts) == expected_facts
    assert counts == fragments.counts


DATAGRAM = udp(bytes(3000), (40000, 4500))


@pytest.mark.parametrize("make", [piece4, piece6])
@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_a_datagram_is_one_row_with_its_last_fragment_whatever_the_order(make, order):
    some = pieces(DATAGRAM, [1480, 2960], make)
    rows, _, counts = read([some[at] for at in order])
    assert rows["time_ns"].tolist() == [2 * MS]
    assert rows[["source_port", "destination_port", "payload_bytes"]].tolist() == [(40000, 4500, 3000)]
    assert rows["frame_bytes"].tolist() == [sum(map(len, some))]
    assert not any(counts.values())


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_of_what_is_never_whole_nothing_is_told_but_that(lost):
    """Its receiver drops it after a while: nobody was given a byte of it."""
    some = pieces(DATAGRAM, [1480, 2960])
    del some[lost]
    parser = Parser()
    for data in some:
        parser.frame(101, exact(data), 0)
    parser.finish()
    assert len(parser) == 0
    assert parser.counts()["datagrams_unfinished"] == 1


def test_fragments_that_come_too_late_are_of_another_datagram():
    some = pieces(DATAGRAM, [1480, 2960])
    for after_s, whole in ((29, [3000]), (31, [])):
        rows, _, counts = read(some, [0, 0, after_s * 10**9])
        assert rows["payload_bytes"].tolist() == whole
        assert counts["datagrams_unfinished"] == 1 - len(whole)


def test_a_number_is_used_again():
    """At once too: a stack that numbers all alike is understood as long as what it sends is in order."""
    one, two = pieces(DATAGRAM, [1480, 2960]), pieces(udp(bytes(1600), (40000, 4500)), [1480])
    for gap_ns in (0, 1, 20 * MS):
        times_ns = [0, 0, 0, gap_ns, gap_ns]
        rows, _, counts = read(one + two, times_ns)
        assert rows["payload_bytes"].tolist() == [3000, 1600]
        assert counts["datagrams_spoiled"] == 0
        same(one + two, times_ns)


def test_what_is_met_again_counts_once():
    """On another interface."""
    some = pieces(DATAGRAM, [1480, 2960])
    for met in ([one for one in some for _ in range(2)], some + some):
        rows, _, counts = read(met, [number * 1000 for number in range(6)])
        assert rows[["payload_bytes", "frame_bytes"]].tolist() == [(3000, sum(map(len, some)))]
        assert not any(counts.values())


def test_overlapping_fragments_spoil_their_datagram_once():
    """RFC 5722; RFC 1858, 4: the second writes over what was looked at."""
    some = [piece4(DATAGRAM[:1480], 0, True), piece4(DATAGRAM[8:2960], 8, True), piece4(DATAGRAM[2960:], 2960, False)]
    rows, _, counts = read(some)
    assert len(rows) == 0
    assert counts["datagrams_spoiled"] == 1


def test_the_first_first_fragment_counts():
    """RFC 1858: a second one with other ports is not taken."""
    some = pieces(DATAGRAM, [1480, 2960])
    decoy = piece4(udp(bytes(1472), (40000, 53)), 0, True)
    rows, _, _ = read([some[0], decoy, *some[1:]])
    assert rows[["destination_port", "payload_bytes"]].tolist() == [(4500, 3000)]


@pytest.mark.parametrize("data", [
    piece4(bytes(1480), 65528, False),              # the ping of death
    piece4(bytes(13), 1480, True),                  # no multiple of eight, and more to follow
])
def test_what_no_receiver_takes_spoils_a_datagram(data):
    rows, _, counts = read([piece4(DATAGRAM[:1480], 0, True), data, piece4(DATAGRAM[1480:], 1480, False)])
    assert len(rows) == 0
    assert counts["datagrams_spoiled"] == 1


def test_a_header_in_pieces_is_read_and_extension_headers_in_pieces_are_told():
    """RFC 1858, 3: eight bytes of TCP have ports but no flags. RFC 7112, 5: nobody may take the latter."""
    some = pieces(tcp(SSH_STREAM[:20], 77), [8, 16, 24], protocol=6)
    rows, facts, counts = read(some)
    assert rows[["sequence", "tcp_flags", "payload_bytes"]].tolist() == [(77, 24, 20)]
    assert not any(counts.values())
    assert len(facts) == len(read([*pieces(tcp(SSH_STREAM[:20], 77), [], protocol=6)])[1])
    same(some)
    some = [piece6(b"\x11\1" + bytes(6), 0, True, protocol=60), piece6(DATAGRAM[:8], 8, False, protocol=60)]
    rows, facts, counts = read(some)
    assert rows[["source_port", "payload_bytes"]].tolist() == [(0, 16)]
    assert counts["fragments_headless"] == 1
    assert facts == ()
    same(some)


def test_pieces_in_more_than_eight_places_are_not_waited_for():
    some = [piece4(bytes(8), 16 * number, True) for number in range(1, 40)]
    rows, _, counts = read([piece4(DATAGRAM[:8], 0, True), *some])
    assert counts["datagrams_spoiled"] == 1
    assert len(rows) == 0


def test_the_table_is_bounded_and_says_what_it_evicted():
    first = DATAGRAM[:1480]
    ends = [struct.pack(">I", number) for number in range(20_000)]
    parser = Parser()
    for one in ends:
        parser.frame(101, piece4(first, 0, True, ends=(one, B)), 0)
    assert parser.counts()["datagrams_unfinished"] == 20_000 - 1024
    # Those that are done make room first.
    parser = Parser(rows_max=50_000)
    for one in ends:
        parser.frame(101, piece4(first, 0, True, ends=(one, B)), 0)
        parser.frame(101, piece4(DATAGRAM[1480:], 1480, False, ends=(one, B)), 0)
    assert parser.counts()["datagrams_unfinished"] == 0
    assert parser.take()[0]["payload_bytes"].tolist() == [3000] * 20_000


def test_a_piece_of_a_whole_is_no_fragment():
    """RFC 6946: a fragment header with nothing before or behind it."""
    rows, _, _ = read([piece6(udp(b"hello"), 0, False)])
    assert rows["payload_bytes"].tolist() == [5]
    assert rows["tcp_flags"].tolist() == [0]


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (1, 3, 0, 2)])
def test_tcp_in_fragments_is_read_as_a_stream(order):
    some = pieces(tcp(SSH_STREAM, 5000), [24, 96, 1000], protocol=6)
    rows, facts, _ = read([some[at] for at in order])
    assert [type(fact) for fact in facts] == [SshBanner, SshKexInit, SshNewKeys]
    assert rows[["sequence", "payload_bytes", "tcp_flags"]].tolist() == [(5000, len(SSH_STREAM), 24)]
    assert facts[-1].end_sequence == 5000 + len(SSH_STREAM)


def test_beyond_what_is_held_bytes_count_and_are_not_read():
    """As beyond a snap length: 16,384 bytes of a datagram, header included, are there to be read."""
    line = b"SSH-2.0-x\r\n"
    for text, facts in ((line + bytes(40_000), 1), (bytes(16_400) + line, 0)):
        for some in (pieces(tcp(text, 5000), [2000, 16_400], protocol=6),
                     pieces(tcp(text, 5000), [2000, 16_400], piece6, protocol=6)[::-1]):
            rows, told, _ = read(some)
            assert rows["payload_bytes"].tolist() == [len(text)]
            assert len(told) == facts


def test_what_dns_answers_in_fragments_counts_in_full():
    record = b"\xc0\x0c" + struct.pack(">HHIH", 10, 1, 0, 3000) + bytes(3000)
    answer = udp(question(b"t", b"example", flags=0x8180, answers=record, count=1, kind=10), (53, 40000))
    _, facts, _ = read(pieces(answer, [1480, 2960]))
    assert facts == (DnsMessage(0, True, "t.example", 10, 3000),)


def closed(packets, gap_ns=MS):
    flows = FlowTable()
    rows, facts, _ = read(packets, [10**18 + number * gap_ns for number in range(len(packets))])
    told = [*flows.receive(Packets(10**18, 0, rows, facts)), *flows.close(2 * 10**18)]
    return [one for one in told if isinstance(one, FlowClosed)]


def test_a_flow_has_all_bytes_and_each_datagram_is_one_message():
    some = [one for number in range(10) for one in pieces(DATAGRAM, [1480, 2960], number=number)]
    (one,) = closed(some)
    assert (one.packets, one.payload_bytes_initiator) == (10, 30_000)
    assert one.flow.responder_port == 4500
    # Nobody speaks between the pieces of a datagram, however slowly they come.
    (one,) = closed(pieces(DATAGRAM, [1480, 2960]) + pieces(DATAGRAM, [1480, 2960], number=8), 90 * MS)
    assert one.initiator_first == 1


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_large_echoes_bring_back_what_was_sent(order):
    def asked(number):
        some = pieces(echo(2000, number), [1480], number=number, protocol=1)
        return [some[at] for at in order]

    def answered(number):
        return pieces(echo(2000, number, 0), [1480], number=number, protocol=1, ends=(B, A))

    (one,) = closed([one for number in range(20) for one in (*asked(number), *answered(number))])
    assert one.payload_bytes_initiator == one.payload_bytes_responder == 40_000


# -- parity -----------------------------------------------------------------------------------------------------------

BODIES = st.sampled_from([
    (17, udp(bytes(100))), (17, udp(question(b"data", b"example", flags=0x8180, answers=bytes(80), count=2))),
    (1, echo(90)), (1, echo(90, 2, 0)), (6, tcp(SSH_STREAM[:400])), (6, tcp(bytes(60), 1, 2)), (47, bytes(64)),
    (17, b"\1\0\0"), (6, tcp(bytes(90))[:12] + b"\xf0" + tcp(bytes(90))[13:]),
])


@st.composite
def cut_datagrams(draw):
    """Pieces of a few datagrams with few numbers, in any order, some lost, some twice, some of nowhere."""
    some = []
    for _ in range(draw(st.integers(1, 4))):
        protocol, data = draw(BODIES)
        cuts = sorted(draw(st.sets(st.integers(1, max(1, len(data) // 8)).map(lambda at: at * 8), max_size=4)))
        make = draw(st.sampled_from([piece4, piece4, piece6]))
        number = draw(st.integers(0, 1))
        some += pieces(data, [cut for cut in cuts if cut < len(data)], make, number=number, protocol=protocol)
    some += draw(st.lists(st.builds(
        lambda offset, size, more, make, number: make(bytes(size), offset * 8, more, number=number),
        st.integers(0, 20), st.integers(0, 40), st.booleans(), st.sampled_from([piece4, piece6]), st.integers(0, 1),
    ), max_size=3))
    if draw(st.booleans()):
        some = draw(st.permutations(some))
    kept = draw(st.lists(st.integers(0, 12), min_size=len(some), max_size=len(some)))
    return [one for one, times in zip(some, kept, strict=True) for _ in range(0 if times == 0 else 1 + (times == 1))]


@given(cut_datagrams(), st.lists(st.sampled_from([0, 1, 9 * MS, 11 * MS, 10**9, 31 * 10**9, -5 * MS]), max_size=20))
@settings(max_examples=400, deadline=None)
def test_fragments_are_the_references(packets, gaps):
    times_ns, now = [], 10**18
    for number in range(len(packets)):
        now += gaps[number] if number < len(gaps) else 0
        times_ns.append(now)
    same(packets, times_ns)


def test_many_random_datagrams_come_out_whole():
    dice = random.Random(3)
    packets = []
    for number in range(300):
        data = udp(bytes(dice.randrange(20, 5000)), (40000, dice.choice((53, 4500))))
        cuts = sorted({dice.randrange(1, len(data) // 8 + 1) * 8 for _ in range(dice.randrange(1, 6))})
        some = pieces(data, [cut for cut in cuts if cut < len(data)], number=number)
        packets += dice.sample(some, len(some))
    rows, _, counts = read(packets)
    assert not any(counts.values())
    assert len(rows) == 300
    headers = 20 * len(packets) + 8 * 300
    assert rows["payload_bytes"].sum() == rows["frame_bytes"].sum() - headers == sum(map(len, packets)) - headers
    same(packets)
