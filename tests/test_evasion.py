"""What a sender can do so that a session is read otherwise than its receiver reads it (Ptacek and Newsham, 1998).

Every play gives the facts of the plain session, or a count that says that something could not be read; never a fact
that the plain session does not give.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuguard._packets import Parser
from gpuguard.core.records import PACKET, Packets, SshBanner, SshKexInit, SshNewKeys
from gpuguard.sensors.packets import read_capture
from gpuguard.sensors.packets.parsed import MISSED

sys.path.insert(0, str(Path(__file__).parent))
import reference_packets as reference
from conversation import ACK, FIN, SYN
from test_packets import (
    LISTS,
    NEWKEYS,
    SSH_STREAM,
    client_hello,
    exact,
    ipv4,
    ipv6,
    kexinit,
    ssh_packet,
    tcp,
    tls_record,
)
from test_packets_fragments import piece4, piece6
from test_reordered import SAMPLE, verdicts

RST, URG = 4, 32
FIRST = 4_294_967_000  # soon wraps
STREAMS = {
    "ssh": SSH_STREAM,
    "text before it": b"hello\r\nyou\r\n" + SSH_STREAM,
    "no key exchange": b"SSH-2.0-x\r\n" + ssh_packet(b"\x02" + bytes(20)) + kexinit(*LISTS) + NEWKEYS,
    "tls": tls_record(client_hello("pool.example", ("h2",), 2000)),
}


def frame(data: bytes, at: int, flags: int = 0x18, first: int = FIRST) -> bytes:
    return ipv4(tcp(data, first + at, flags))


def segments(stream: bytes, cuts: list[int]) -> list[bytes]:
    edges = sorted({0, len(stream), *(cut % len(stream) for cut in cuts)})
    return [frame(stream[a:b], a) for a, b in itertools.pairwise(edges)]


def read(frames: list[bytes], link: int = 101) -> tuple[list[dict], dict[str, int]]:
    """The facts, without their rows, and what was counted as missed."""
    parser = Parser()
    for number, data in enumerate(frames):
        parser.frame(link, exact(data), number * 10**6)
    _, facts = parser.take()
    parser.finish()
    return [told(fact) for fact in facts], {name: parser.counts()[name] for name in MISSED if parser.counts()[name]}


def told(fact) -> dict:
    return {**{name: getattr(fact, name) for name in fact.__struct_fields__}, "row": type(fact).__name__}


PLAIN = {name: read([frame(b"", -1, SYN), frame(stream, 0)])[0] for name, stream in STREAMS.items()}
OTHERS = b"GET / HTTP/1.1\r\n"
FAR = st.sampled_from([2**20, 2**24 + 1, 2**30, 2**31 - 1, 2**31, 2**31 + 1, -(2**30), -(2**20), -2, -40])
PLAYS = st.one_of(
    st.tuples(st.just("stray"), FAR, st.sampled_from([0x18, 0x10, 0x11])),
    st.tuples(st.just("unacknowledged"), st.sampled_from([0, 8, 1]), st.integers(1, 1500)),
    st.tuples(st.just("reset"), st.sampled_from([RST, RST | ACK]), st.integers(0, 1500)),
    st.tuples(st.just("syn"), FAR, st.sampled_from([SYN, SYN | ACK])),
    st.tuples(st.just("again"), st.integers(0, 3000), st.integers(1, 1500)),
    st.tuples(st.just("keepalive"), st.just(0), st.integers(0, 1)),
    st.tuples(st.just("probe"), st.just(0), st.just(0)),
    st.tuples(st.just("half a datagram"), st.sampled_from([4, 6]), st.integers(1, 40)),
    st.tuples(st.just("overlap"), st.sampled_from([4, 6]), st.integers(1, 40)),
)


def play(kind: str, one: int, two: int, at: int, stream: bytes, number: int) -> list[bytes]:
    """Packets that the receiver takes nothing new from, sent when it has ``at`` bytes of the stream."""
    garbage = b"\0garbage" * 200
    if kind == "stray":
        size = -one - 1 if -len(OTHERS) < one < 0 else len(OTHERS)  # what would reach beyond `at` would be taken
        return [frame(OTHERS[:size], at + one, two)]
    if kind == "unacknowledged":
        return [frame(garbage[:two], at, one)]
    if kind == "reset":
        return [frame(garbage[:two], at, one), frame(b"", at + 5, one)]
    if kind == "syn":  # before any data nobody can know that it is not the true one, as after a refusal
        return [frame(b"", at + one, two)] if at else []
    if kind == "again":  # with other contents
        return [frame(garbage[:max(0, min(at, two))], max(0, at - two))]
    if kind == "keepalive":
        return [frame(garbage[:two], at - 1, ACK)]
    if kind == "probe":
        return [frame(stream[at:at + 1], at, ACK)]
    make = piece4 if one == 4 else piece6
    data = tcp(garbage[:two * 8 + 4], FIRST + at)
    first = make(data, 0, True, protocol=6, number=number)
    return [first] if kind == "half a datagram" else [first, make(bytes(16), len(data) - 8, True, protocol=6,
                                                                  number=number)]


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(list(STREAMS)), st.lists(st.integers(0, 4000), max_size=14),
       st.lists(st.tuples(st.integers(0, 14), PLAYS), max_size=6), st.lists(st.integers(0, 12), max_size=16))
def test_whatever_is_sent_between(name, cuts, plays, places):
    stream = STREAMS[name]
    late = segments(stream, cuts)
    order = sorted(range(len(late)), key=lambda number: number + (places[number] if number < len(places) else 0))
    frames = [frame(b"", -1, SYN)]
    for number, place in enumerate(order):
        lacking = min(order[number:])
        at = sum(len(one) - 40 for one in late[:lacking])
        for when, some in plays:
            if when == number:
                frames += play(*some, at, stream, len(frames))
        frames.append(late[place])
    facts, missed = read(frames)
    assert facts == PLAIN[name] or missed
    # Where more waited than may, what comes again in its place is read, and the stream is told as lost.
    assert all(fact in PLAIN[name] for fact in facts) or "streams_lost" in missed


@pytest.mark.parametrize("name", STREAMS)
@pytest.mark.parametrize("step", [1, 2, 7, 100])
def test_a_byte_at_a_time(name, step):
    stream = STREAMS[name]
    assert read([frame(b"", -1, SYN), *segments(stream, list(range(0, len(stream), step)))]) == (PLAIN[name], {})


@pytest.mark.parametrize("pieces", [9, 20])
def test_more_pieces_than_may_wait_are_told(pieces):
    step = len(SSH_STREAM) // (pieces + 1)
    syn, first, *rest = [frame(b"", -1, SYN), *segments(SSH_STREAM, list(range(0, len(SSH_STREAM), step)))]
    facts, missed = read([syn, *rest, first])
    assert facts != PLAIN["ssh"]
    assert missed == {"streams_lost": 1}


def test_what_never_came_is_told():
    syn, _, *rest = [frame(b"", -1, SYN), *segments(SSH_STREAM, [21, 400])]
    assert read([syn, *rest]) == ([], {"streams_lost": 1})


def test_data_of_a_syn_that_was_refused():
    """RFC 7413, 4.2: they come again, and may be others."""
    frames = [frame(OTHERS, -1, SYN), *segments(SSH_STREAM, [21])]
    assert read(frames)[0] == PLAIN["ssh"]
    assert read([frame(SSH_STREAM[:21], -1, SYN), *segments(SSH_STREAM, [21])[1:]])[0] == PLAIN["ssh"]
    assert read([frames[0], frames[0], frames[2], frames[1]])[0] == PLAIN["ssh"]
    expected = reference.read_frames([(101, one, len(one)) for one in frames])[1]
    assert [told(fact) for fact in expected] == PLAIN["ssh"]


def test_urgent_data_are_told():
    """RFC 6093: a byte that the receiver's program is not given among the others."""
    urgent = bytearray(frame(b"X", 0, 0x18 | URG))
    urgent[20 + 19] = 1
    shifted = [frame(SSH_STREAM, 1)]
    assert read([frame(b"", -1, SYN), bytes(urgent), *shifted])[1] == {"urgent": 1}


@pytest.mark.parametrize("make", [piece4, piece6])
@pytest.mark.parametrize("link", [1, 113, 276])
def test_a_session_in_fragments_behind_tags(make, link):
    """Ethernet with two VLAN tags, and both of Linux's cooked headers."""
    frames = [ipv4(tcp(b"", FIRST - 1, SYN)) if make is piece4 else ipv6(tcp(b"", FIRST - 1, SYN))]
    for number, at in enumerate(range(0, len(SSH_STREAM), 500)):
        data = tcp(SSH_STREAM[at:at + 500], FIRST + at)
        frames += [make(data[a:a + 160], a, a + 160 < len(data), protocol=6, number=number)
                   for a in range(0, len(data), 160)]
    kind = b"\x08\0" if make is piece4 else b"\x86\xdd"
    head = {1: bytes(12) + b"\x88\xa8\0\1\x81\0\0\2" + kind, 113: bytes(14) + kind, 276: kind + bytes(18)}[link]
    assert read([head + one for one in frames], link) == (PLAIN["ssh"], {})


def test_an_atomic_fragment_and_options_around_it():
    """RFC 6946: whole packets, whatever else has their number; RFC 8200, 4.1: Destination Options before and behind."""
    options = bytes([44, 0, 1, 4, 0, 0, 0, 0])
    frames = [ipv6(tcp(b"", FIRST - 1, SYN))]
    for at in range(0, len(SSH_STREAM), 700):
        data = tcp(SSH_STREAM[at:at + 700], FIRST + at)
        frames += [piece6(data, 0, False, protocol=6), piece6(data, 0, False, protocol=6, before=options),
                   piece6(bytes([6, 0, 1, 4, 0, 0, 0, 0]) + data, 0, False, protocol=60)]
    assert read(frames) == (PLAIN["ssh"], {})


def test_a_first_piece_that_is_never_followed_is_told():
    """Its receiver drops it after a while: what was read of it, nobody was given."""
    _, missed = read([piece4(tcp(OTHERS + bytes(4), FIRST), 0, True, protocol=6)])
    assert missed == {"datagrams_unfinished": 1}


# -- flows ------------------------------------------------------------------------------------------------------------

NAMES = [f"{name}.pcap.gz" for name in (
    "openssh-bookworm.reverse", "openssh-sid.reverse-shell", "dropbear-trixie.reverse", "openssh-bookworm.shell",
    "go.reverse", "openssh-bullseye.exec")]


@pytest.fixture(scope="module")
def sample():
    return {name: next(one for one in read_capture(SAMPLE / name) if isinstance(one, Packets)) for name in NAMES}


def false(row, flags, distance, size):
    """A packet of the same side that its receiver does not take."""
    made = row.copy()
    made["tcp_flags"], made["payload_bytes"] = flags, size
    made["sequence"] = (int(row["sequence"]) + distance) % 2**32
    return made


@pytest.mark.parametrize(("flags", "distance", "size"), [
    (RST, 100_000, 0), (RST | ACK, -5000, 0), (RST, 77, 100), (FIN | ACK, 2**30, 0), (FIN | ACK, -3000, 0), (FIN, 0, 0),
    (8, 0, 100), (0, 0, 1), (ACK, -1, 1), (ACK, -1, 0), (ACK, 2**31, 50), (ACK, -(2**30), 50),
])
def test_what_nobody_takes_changes_no_verdict(sample, flags, distance, size):
    for name, block in sample.items():
        plain = verdicts([block])
        rows, places = [], []
        for number, row in enumerate(block.rows):
            if number % 7 == 3 and row["protocol"] == 6 and row["payload_bytes"]:
                rows.append(false(row, flags, distance, size))
            places.append(len(rows))
            rows.append(row)
        facts = tuple(msgspec.structs.replace(fact, row=places[fact.row]) for fact in block.facts)
        other = msgspec.structs.replace(block, rows=np.array(rows, PACKET), facts=facts)
        assert verdicts([other])[0] == plain[0], name


def test_the_facts_here_are_those_of_a_session():
    assert [fact["row"] for fact in PLAIN["ssh"]] == [one.__name__ for one in (SshBanner, SshKexInit, SshNewKeys)]
