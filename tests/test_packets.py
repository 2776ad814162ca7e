"""Frames to rows and facts: the compiled parser against the naive one, and against bytes written by hand."""

from __future__ import annotations

import itertools
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuguard._packets import Parser, row_layout
from gpuguard.core.records import PACKET, DnsMessage, Fact, SshBanner, SshKexInit, SshNewKeys, TlsClientHello

sys.path.insert(0, str(Path(__file__).parent))
import reference_packets as reference

LINKS = (0, 1, 12, 14, 101, 108, 113, 228, 229, 276)
A, B = bytes([10, 0, 0, 1]), bytes([10, 0, 0, 2])


# -- bytes as the wire has them ----------------------------------------------------------------------------------------


def tcp(data: bytes, sequence: int = 1, flags: int = 0x18, ports: tuple[int, int] = (40000, 22)) -> bytes:
    return struct.pack(">HHIIBBHHH", *ports, sequence % 2**32, 7, 5 << 4, flags, 1000, 0, 0) + data


def udp(data: bytes, ports: tuple[int, int] = (40000, 53)) -> bytes:
    return struct.pack(">HHHH", *ports, 8 + len(data), 0) + data


def ipv4(data: bytes, protocol: int = 6, *, total: int | None = None, fragment: int = 0) -> bytes:
    total = 20 + len(data) if total is None else total
    return struct.pack(">BBHHHBBH", 0x45, 0, total & 0xFFFF, 1, fragment, 64, protocol, 0) + A + B + data


def ipv6(data: bytes, kind: int = 6) -> bytes:
    return struct.pack(">IHBB", 6 << 28, len(data) & 0xFFFF, kind, 64) + bytes(15) + b"\1" + bytes(15) + b"\2" + data


def ethernet(data: bytes, kind: int = 0x0800) -> bytes:
    return bytes(12) + struct.pack(">H", kind) + data


def ssh_packet(payload: bytes) -> bytes:
    padding = 8 - (5 + len(payload)) % 8 + 8
    return struct.pack(">IB", 1 + len(payload) + padding, padding) + payload + bytes(padding)


def kexinit(*lists: str) -> bytes:
    body = b"".join(struct.pack(">I", len(one)) + one.encode() for one in (*lists, "", ""))
    return ssh_packet(b"\x14" + bytes(16) + body + bytes(5))


def client_hello(name: str, alpn: tuple[str, ...] = (), ballast: int = 0) -> bytes:
    host = name.encode()
    protocols = b"".join(bytes([len(one)]) + one.encode() for one in alpn)
    values = [(51, bytes(ballast)), (0, struct.pack(">HBH", len(host) + 3, 0, len(host)) + host),
              (16, struct.pack(">H", len(protocols)) + protocols)]
    extensions = b"".join(struct.pack(">HH", kind, len(value)) + value for kind, value in values)
    body = b"\3\3" + bytes(32) + b"\0" + b"\0\2\x13\1" + b"\1\0" + struct.pack(">H", len(extensions)) + extensions
    return b"\1" + len(body).to_bytes(3, "big") + body


def tls_record(data: bytes) -> bytes:
    return b"\x16\3\1" + struct.pack(">H", len(data)) + data


LISTS = ("curve25519-sha256,ext-info-c", "ssh-ed25519", "chacha20-poly1305@openssh.com,aes128-ctr", "aes256-ctr",
         "hmac-sha2-256", "hmac-sha1", "none", "none,zlib")
NEWKEYS = ssh_packet(b"\x15")
EXCHANGE = ssh_packet(b"\x1e" + bytes(1200))
SSH_STREAM = b"SSH-2.0-OpenSSH_9.2\r\n" + kexinit(*LISTS) + EXCHANGE + NEWKEYS


def exact(data: bytes) -> np.ndarray:
    """The same bytes in memory of exactly their size, so that a sanitizer sees a read past the end."""
    return np.array(bytearray(data), dtype=np.uint8)


def parse(frames: list[tuple[int, bytes, int]], rows_max: int = 8192) -> tuple[np.ndarray, list[Fact]]:
    """Parse all; the rows of facts count over all blocks."""
    parser = Parser(rows_max=rows_max)
    blocks, facts, before = [], [], 0
    for link, data, wire_bytes in frames:
        if parser.full:
            rows, more = parser.take()
            blocks.append(rows)
            facts += [type(fact)(**{**_fields(fact), "row": fact.row + before}) for fact in more]
            before += len(rows)
        parser.frame(link, exact(data), 0, wire_bytes=wire_bytes)
    rows, more = parser.take()
    facts += [type(fact)(**{**_fields(fact), "row": fact.row + before}) for fact in more]
    return np.concatenate([*blocks, rows]), facts


def _fields(fact: Fact) -> dict:
    return {name: getattr(fact, name) for name in fact.__struct_fields__}


def same(frames: list[tuple[int, bytes, int]]) -> None:
    rows, facts = parse(frames)
    expected, expected_facts = reference.read_frames(frames)
    assert [as_dict(row) for row in rows] == expected
    assert facts == expected_facts


def as_dict(row: np.void) -> dict:
    return {name: row[name].tobytes() if name in {"source", "destination"} else int(row[name]) for name in PACKET.names}


# -- layout -----------------------------------------------------------------------------------------------------------


def test_the_c_row_is_the_dtype() -> None:
    size, offsets = row_layout()
    assert size == PACKET.itemsize == 64
    assert offsets == {name: PACKET.fields[name][1] for name in PACKET.names}


# -- link layers and IP ------------------------------------------------------------------------------------------------

SEGMENT = ipv4(tcp(b"hello"))


@pytest.mark.parametrize(("link", "head", "packet_type"), [
    (1, bytes(12) + b"\x08\0", 255),
    (1, bytes(12) + b"\x81\0\0\x05\x08\0", 255),
    (1, bytes(12) + b"\x88\xa8\0\x05\x81\0\0\x06\x08\0", 255),
    (113, b"\0\4" + bytes(12) + b"\x08\0", 4),
    (276, b"\x08\0" + bytes(8) + b"\3" + bytes(9), 3),
    (0, b"\2\0\0\0", 255), (108, b"\0\0\0\2", 255), (101, b"", 255), (12, b"", 255), (228, b"", 255),
])
def test_each_link_layer(link: int, head: bytes, packet_type: int) -> None:
    frame = head + SEGMENT
    rows, _ = parse([(link, frame, len(frame))])
    assert len(rows) == 1
    row = rows[0]
    assert (row["source_port"], row["destination_port"], row["payload_bytes"]) == (40000, 22, 5)
    assert row["source"].tobytes() == bytes(10) + b"\xff\xff" + A
    assert row["frame_bytes"] == len(frame)
    assert row["packet_type"] == packet_type
    same([(link, frame, len(frame))])


def test_segmentation_offload_leaves_no_length() -> None:
    frame = ethernet(ipv4(tcp(bytes(30000)), total=0))
    rows, _ = parse([(1, frame, len(frame))])
    assert rows["payload_bytes"].tolist() == [30000]


def test_payload_is_the_headers_not_the_captures() -> None:
    frame = ethernet(ipv4(tcp(bytes(1000))))
    rows, _ = parse([(1, frame[:60], len(frame))])
    assert rows["payload_bytes"].tolist() == [1000]
    assert rows["frame_bytes"].tolist() == [len(frame)]


def test_ethernet_padding_is_not_payload() -> None:
    frame = ethernet(ipv4(tcp(b""))) + bytes(6)
    rows, _ = parse([(1, frame, len(frame))])
    assert rows["payload_bytes"].tolist() == [0]


def test_ipv6_extension_headers() -> None:
    # Hop-by-hop (8 bytes), destination options (16), AH ((2 + 2) * 4), first fragment (8): each length in its own unit.
    chain = b"\x3c\0" + bytes(6) + b"\x33\1" + bytes(14) + b"\x2c\2" + bytes(14) + b"\6\0\0\1" + bytes(4)
    first = ipv6(chain + tcp(b"hello, world"), 0)
    later = ipv6(b"\6\0\0\x20" + bytes(4) + bytes(9), 44)
    other = ipv6(b"\6\0\0\x20" + bytes(3) + b"\1" + bytes(8), 44)
    rows, _ = parse([(101, one, len(one)) for one in (first, other, later)])
    assert rows["protocol"].tolist() == [6]
    assert rows["destination_port"].tolist() == [22]
    assert rows["payload_bytes"].tolist() == [21]
    same([(101, first, len(first)), (101, later, len(later))])


def test_icmp_says_type_code_identifier_and_sequence() -> None:
    frame = ipv4(struct.pack(">BBHHH", 8, 0, 0, 0x1234, 7) + bytes(56), 1)
    rows, _ = parse([(101, frame, len(frame))])
    names = ["source_port", "destination_port", "sequence", "payload_bytes"]
    assert [int(rows[0][name]) for name in names] == [0x800, 0x1234, 7, 56]


def test_what_is_not_ip_is_counted_and_has_no_row() -> None:
    parser = Parser()
    parser.frame(1, ethernet(bytes(28), 0x0806), 0)
    parser.frame(1, ethernet(b"\x45" + bytes(5)), 0)
    parser.frame(101, b"\x50" + bytes(30), 0)
    parser.frame(1, b"", 0)
    assert len(parser) == 0
    seen = {name: count for name, count in parser.counts().items() if count}
    assert seen == {"frames": 4, "other": 2, "malformed": 2}


def test_a_full_parser_refuses() -> None:
    parser = Parser(rows_max=1)
    parser.frame(101, SEGMENT, 0)
    assert parser.full
    with pytest.raises(BufferError):
        parser.frame(101, SEGMENT, 0)
    with pytest.raises(ValueError, match="link type 105"):
        Parser().frame(105, SEGMENT, 0)


@pytest.mark.parametrize("taken", [1, 25, 26, 99, 100])
def test_rows_that_were_taken_stay_as_they_were(taken: int) -> None:
    """Few are copied, many are handed over, and what holds them is written to again once nobody has them."""
    parser = Parser(rows_max=100)
    held = []
    for number in range(12):
        for at in range(taken):
            parser.frame(101, SEGMENT, 1000 * number + at)
        held = [*held[-5:], (number, parser.take()[0])]
        for before, rows in held:
            assert rows["time_ns"].tolist() == [1000 * before + at for at in range(taken)]


# -- facts of TCP ------------------------------------------------------------------------------------------------------


def tcp_frames(stream: bytes, cuts: list[int], first: int = 5000, *, syn: bool = True) -> list[tuple[int, bytes, int]]:
    edges = [0, *sorted({cut for cut in cuts if 0 < cut < len(stream)}), len(stream)]
    packets = [tcp(b"", first - 1, 2)] if syn else []
    packets += [tcp(stream[a:b], first + a) for a, b in itertools.pairwise(edges)]
    return [(101, ipv4(packet), 20 + len(packet)) for packet in packets]


def test_ssh_in_one_segment() -> None:
    _, facts = parse(tcp_frames(SSH_STREAM, []))
    expected = SshKexInit(1, *(tuple(one.split(",")) for one in LISTS))
    end = 5000 + len(SSH_STREAM)
    assert facts == [SshBanner(1, "SSH-2.0-OpenSSH_9.2"), expected, SshNewKeys(1, end)]


@pytest.mark.parametrize("step", [1, 2, 3, 5, 7, 100])
@pytest.mark.parametrize("syn", [True, False])
def test_ssh_in_pieces(step: int, syn: bool) -> None:
    cuts = list(range(step, len(SSH_STREAM), step)) if syn else list(range(21, len(SSH_STREAM), step))
    frames = tcp_frames(SSH_STREAM, cuts, first=2**32 - 40, syn=syn)
    _, facts = parse(frames)
    assert [type(fact) for fact in facts] == [SshBanner, SshKexInit, SshNewKeys]
    assert facts[-1].end_sequence == (2**32 - 40 + len(SSH_STREAM)) % 2**32
    same(frames)


def test_nothing_is_read_after_newkeys() -> None:
    frames = tcp_frames(SSH_STREAM + b"SSH-2.0-forged\r\n" + kexinit(*LISTS) + NEWKEYS, [len(SSH_STREAM)])
    _, facts = parse(frames)
    assert len(facts) == 3


def test_payload_is_in_no_record() -> None:
    """Neither what is sent before and after the key exchange, nor cookies, key shares, and UDP data."""
    secret = b"SECRET-of-a-tenant"
    stream = secret + b"\r\n" + SSH_STREAM.replace(bytes(1200), (secret * 67)[:1200]).replace(bytes(16), secret[:16], 1)
    some = tcp_frames(stream + secret, list(range(7, len(stream), 90)))
    datagram = ipv4(udp(secret), 17)
    rows, facts = parse([*some, (101, datagram, len(datagram))])
    assert len(facts) == 3
    assert b"SECRET" not in rows.tobytes()
    assert "SECRET" not in repr(facts)


def test_lines_before_the_banner() -> None:
    stream = b"Welcome\r\nno SSH- here\r\n" + SSH_STREAM
    for step in (1, 4, 9, 50):
        frames = tcp_frames(stream, list(range(step, len(stream), step)))
        assert parse(frames)[1][0].text == "SSH-2.0-OpenSSH_9.2"
        same(frames)
    assert parse(tcp_frames(b"x" * 20000 + b"\n" + SSH_STREAM, []))[1] == []


def test_a_banner_is_printable_and_short() -> None:
    (banner,) = parse(tcp_frames(b"SSH-1.5-\x1b[2J\xff" + b"a" * 300 + b"\n", []))[1]
    assert banner.text == "SSH-1.5-?[2J?" + "a" * 242


def test_a_key_exchange_cut_by_the_snap_length_loses_the_lists_only() -> None:
    end = len(SSH_STREAM) - len(NEWKEYS)
    parser = Parser()
    for link, data, wire in tcp_frames(SSH_STREAM, [21, end - len(EXCHANGE), end]):
        parser.frame(link, exact(data[:96]), 0, wire_bytes=wire)
    _, facts = parser.take()
    assert facts == (SshBanner(1, "SSH-2.0-OpenSSH_9.2"), SshNewKeys(4, 5000 + len(SSH_STREAM)))
    assert parser.counts()["streams_lost"] == 1


def test_tls_client_hello_split_over_segments_and_records() -> None:
    hello = client_hello("pool.example.org", ("h2", "http/1.1"), ballast=3000)
    one = tls_record(hello)
    two = tls_record(hello[:2]) + tls_record(hello[2:1500]) + tls_record(hello[1500:])
    for stream in (one, two):
        for step in (1, 500, 1448, 9999):
            frames = tcp_frames(stream, list(range(step, len(stream), step)))
            _, facts = parse(frames)
            assert facts == [TlsClientHello(len(frames) - 1, "pool.example.org", ("h2", "http/1.1"))]
            same(frames)


@pytest.mark.parametrize(("data", "flags", "lost"), [(b"SSH-2.0-x\r\n", 0x18, 40000 - 8192), (b"", 2, 0)])
def test_the_table_of_streams_is_bounded_and_says_what_it_lost(data: bytes, flags: int, lost: int) -> None:
    """A flood of SYNs fills the table too, but loses nothing: a banner is known without its SYN."""
    parser = Parser()
    segment = tcp(data, 1, flags)
    for address in range(40000):
        if parser.full:
            parser.take()
        parser.frame(101, ipv4(segment)[:12] + struct.pack(">I", address) + B + segment, 0)
    assert parser.counts()["streams_lost"] == lost


C1, C3 = (number.to_bytes(8, "little") for number in (0xE7037ED1A0B428DB, 0x589965CC75374CC3))
#: Of each half of both addresses: what a factor of their hash has beside the seed, against that of the other address.
APART = bytes(a ^ b for a, b in zip(struct.pack("<QQ", 0xA0761D6478BD642F, 0xE7037ED1A0B428DB),
                                    struct.pack("<QQ", 0x8EBC6AF09C88C6E3, 0x589965CC75374CC3), strict=True))


@pytest.mark.parametrize("pair", [
    lambda number: (bytes([number] * 8) + C1, bytes(16)),
    lambda number: (bytes(16), bytes([number] * 8) + C3),
    lambda number: (bytes([number] * 16), bytes(number ^ one for one in APART)),
], ids=["near half", "far half", "both ends"])
def test_addresses_alone_cannot_crowd_a_set_of_streams(pair) -> None:
    parser = Parser(seed=0x9E3779B97F4A7C15)
    for part, flags in ((b"", 2), (b"SSH-2.0-", 0x18), (b"OpenSSH_9.2\r\n", 0x18)):
        for number in range(20):
            near, far = pair(number)
            segment = tcp(part, 9 if part.startswith(b"O") else 1 if part else 0, flags)
            parser.frame(101, exact(struct.pack(">IHBB", 6 << 28, len(segment), 6, 64) + near + far + segment), 0)
    _, facts = parser.take()
    assert facts == tuple(SshBanner(row, "SSH-2.0-OpenSSH_9.2") for row in range(40, 60))


def test_held_messages_are_bounded() -> None:
    parser = Parser()
    for port in range(3000):
        parser.frame(101, ipv4(tcp(b"SSH-2.0-slow", 1, 0x18, (port, 22))), 0)
    assert parser.counts()["streams_lost"] == 3000 - 1024


# -- DNS ---------------------------------------------------------------------------------------------------------------


def question(*labels: bytes, flags: int = 0x0100, answers: bytes = b"", count: int = 0, kind: int = 16) -> bytes:
    name = b"".join(bytes([len(label)]) + label for label in labels) + b"\0"
    return struct.pack(">HHHHHH", 7, flags, 1, count, 0, 0) + name + struct.pack(">HH", kind, 1) + answers


def test_dns_question_and_answer() -> None:
    record = b"\xc0\x0c" + struct.pack(">HHIH", 16, 1, 0, 200) + bytes(200)
    query = ipv4(udp(question(b"a.b", b"\xc3x", b"example")), 17)
    answer = ipv4(udp(question(b"t", b"example", flags=0x8180, answers=record * 3, count=3), (53, 40000)), 17)
    frames = [(101, query, len(query)), (101, answer, len(answer))]
    _, facts = parse(frames)
    assert facts == [DnsMessage(0, False, "a\\.b.\\195x.example", 16, 0), DnsMessage(1, True, "t.example", 16, 600)]
    same(frames)


def test_dns_on_another_port_is_read_and_noise_is_not() -> None:
    query = ipv4(udp(question(b"data", b"example"), (40000, 53531)), 17)
    noise = ipv4(udp(bytes(range(200)), (40000, 53531)), 17)
    _, facts = parse([(101, query, len(query)), (101, noise, len(noise))])
    assert facts == [DnsMessage(0, False, "data.example", 16, 0)]


# -- parity ------------------------------------------------------------------------------------------------------------

PORTS = st.tuples(st.sampled_from([22, 53, 5353, 40000]), st.sampled_from([22, 53, 443, 8080]))
DNS_MESSAGES = st.builds(
    lambda labels, flags, count, answers, kind: question(*labels, flags=flags, count=count, answers=answers, kind=kind),
    st.lists(st.binary(min_size=1, max_size=63), max_size=5), st.sampled_from([0x100, 0x8180, 0x40, 0x2800]),
    st.integers(0, 4), st.binary(max_size=60), st.integers(0, 65535))
UDP = st.builds(udp, st.one_of(st.binary(max_size=80), DNS_MESSAGES), PORTS)
TCP = st.builds(tcp, st.binary(max_size=60), st.integers(0, 2**32 - 1), st.integers(0, 255), PORTS)
BODIES = st.one_of(st.tuples(TCP, st.just(6)), st.tuples(UDP, st.just(17)), st.tuples(st.binary(max_size=60),
                   st.sampled_from([1, 58, 6, 17, 47, 50, 0, 44, 60])))
IP = st.one_of(
    st.builds(lambda body, total, fragment: ipv4(*body, total=total, fragment=fragment), BODIES,
              st.one_of(st.none(), st.integers(0, 200)), st.sampled_from([0, 0, 0, 0x2000, 5, 0x4000])),
    st.builds(lambda body: ipv6(*body), BODIES),
    st.builds(lambda head, body: ipv6(bytes([body[1], head % 4]) + bytes(6 + head % 4 * 8) + body[0], 60),
              st.integers(0, 3), BODIES),
    st.binary(max_size=80),
)


@st.composite
def frames(draw: st.DrawFn) -> tuple[int, bytes, int]:
    link = draw(st.sampled_from(LINKS))
    data = draw(IP)
    if link == 1:
        tags = draw(st.integers(0, 5)) * b"\x81\0\0\1"
        data = bytes(12) + tags + draw(st.sampled_from([b"\x08\0", b"\x86\xdd", b"\x08\6"])) + data
    elif link == 113:
        data = bytes([0, draw(st.integers(0, 5))]) + bytes(12) + b"\x08\0" + data
    elif link == 276:
        data = b"\x86\xdd" + bytes(8) + b"\2" + bytes(9) + data
    elif link in {0, 108}:
        data = b"\2\0\0\0" + data
    wire = len(data)
    is_tcp = reference.packet(link, data, wire)
    if is_tcp and is_tcp[0]["protocol"] != 6:  # streams cut by the snap length are outside of what the reference does
        data = data[:draw(st.one_of(st.just(wire), st.integers(0, wire)))]
    return link, data, wire


@given(st.lists(frames(), max_size=8))
@settings(max_examples=400, deadline=None)
def test_rows_and_facts_are_the_references(some: list[tuple[int, bytes, int]]) -> None:
    if any(cut_stream(one) for one in some):
        some = [one for one in some if not cut_stream(one)]
    same(some)


def cut_stream(frame: tuple[int, bytes, int]) -> bool:
    """Whether the headers claim more TCP payload than there is."""
    seen = reference.packet(*frame)
    return bool(seen and seen[0]["protocol"] == 6 and seen[1] is not None and len(seen[1]) < seen[0]["payload_bytes"])


PIECES = st.sampled_from([
    b"SSH-2.0-x\r\n", b"SSH-1.99-y\n", b"SSH-1.5-z\n", b"SS", b"SSH", b"hello\r\n", b"\n", b"\0", b"SSH-2.0",
    kexinit(*LISTS), ssh_packet(b"\x02" + bytes(20)), ssh_packet(b"\x1f" + bytes(300)), NEWKEYS, ssh_packet(b"\x63"),
    kexinit(*LISTS)[:-30], tls_record(client_hello("a.example", ("h2",))), tls_record(client_hello("b")[:3]),
    tls_record(client_hello("b")[3:]), b"\x16\3\1", b"\x16",
])
STREAMS = st.one_of(
    st.lists(st.one_of(PIECES, st.binary(max_size=12)), max_size=7).map(b"".join),
    st.tuples(st.just(SSH_STREAM), st.integers(0, len(SSH_STREAM) - 1), st.integers(0, 255)).map(
        lambda it: it[0][:it[1]] + bytes([it[2]]) + it[0][it[1] + 1:]),
    st.tuples(st.just(tls_record(client_hello("long.example", ("h2", "x"), 40))), st.integers(0, 80),
              st.integers(0, 255)).map(lambda it: it[0][:it[1]] + bytes([it[2]]) + it[0][it[1] + 1:]),
)


@given(STREAMS, st.lists(st.integers(0, 1500), max_size=12), st.integers(0, 2**32 - 1), st.booleans(), st.data())
@settings(max_examples=600, deadline=None)
def test_streams_are_the_references(stream: bytes, cuts: list[int], first: int, syn: bool, data: st.DataObject) -> None:
    some = tcp_frames(stream, cuts, first, syn=syn)
    # What was sent before may come again at any time.
    again = data.draw(st.lists(st.tuples(st.integers(0, len(some) - 1), st.integers(0, len(some))), max_size=3))
    for index, place in sorted(again, key=lambda pair: -pair[1]):
        if place > index:
            some.insert(place, some[index])
    same(some)


@given(st.lists(st.integers(1, len(SSH_STREAM) - 1), max_size=8), st.data())
@settings(max_examples=200, deadline=None)
def test_any_order_gives_the_same_facts_once_all_was_sent_again(cuts: list[int], data: st.DataObject) -> None:
    syn, *rest = tcp_frames(SSH_STREAM, cuts)
    shuffled = data.draw(st.permutations(rest))
    _, facts = parse([syn, *shuffled, *rest * len(rest)])
    assert [type(fact) for fact in facts] == [SshBanner, SshKexInit, SshNewKeys]
    assert facts[-1].end_sequence == 5000 + len(SSH_STREAM)


def moved(some: list[tuple[int, bytes, int]], places: list[int]) -> list[tuple[int, bytes, int]]:
    """The same, each so many places later as it says; the first stays where it is."""
    late = [at + (places[at] if at < len(places) and at else 0) for at in range(len(some))]
    return [some[at] for at in sorted(range(len(some)), key=lambda at: (late[at], at))]


def without_rows(facts: list[Fact]) -> list[dict]:
    return [{**_fields(fact), "row": type(fact).__name__} for fact in facts]


@given(STREAMS, st.lists(st.integers(0, 1500), max_size=12), st.integers(0, 2**32 - 1),
       st.lists(st.integers(0, 5), max_size=14))
@settings(max_examples=400, deadline=None)
def test_another_order_gives_the_same_facts(stream: bytes, cuts: list[int], first: int, places: list[int]) -> None:
    """A stream is read in its own order: what came before the segment ahead of it waits."""
    some = tcp_frames(stream, cuts, first)
    other = moved(some, places)
    assert without_rows(parse(other)[1]) == without_rows(parse(some)[1])
    assert without_rows(parse(other)[1]) == without_rows(reference.read_frames(other)[1])


def test_facts_come_with_the_segment_that_lacked() -> None:
    frames = tcp_frames(SSH_STREAM, [21, 200, 900])
    _, facts = parse([frames[at] for at in (0, 2, 4, 3, 1)])
    assert [fact.row for fact in facts] == [4, 4, 4]
    assert facts[-1].end_sequence == 5000 + len(SSH_STREAM)


def test_of_more_than_eight_segments_ahead_the_rest_has_to_come_again() -> None:
    syn, first, *rest = tcp_frames(SSH_STREAM, list(range(100, len(SSH_STREAM), 100)))
    assert len(rest) > 10
    assert [type(fact) for fact in parse([syn, *rest, first])[1]] == [SshBanner, SshKexInit]
    assert [type(fact) for fact in parse([syn, *rest, first, *rest])[1]] == [SshBanner, SshKexInit, SshNewKeys]


@pytest.mark.parametrize("distance", [2**20, 2**31 - 1, 2**31, 2**31 + 1])
def test_a_segment_from_nowhere_is_left_where_it_is(distance: int) -> None:
    syn, *rest = tcp_frames(SSH_STREAM, [21])
    stray = ipv4(tcp(b"hello", 5000 + distance))
    for some in ([syn, (101, stray, len(stray)), *rest], [syn, rest[0], (101, stray, len(stray)), rest[1]]):
        assert [type(fact) for fact in parse(some)[1]] == [SshBanner, SshKexInit, SshNewKeys]


def test_what_waits_is_bounded_for_all_streams() -> None:
    """The oldest gives way: a flood does not keep others from being read, and holds no memory."""
    parser = Parser()
    for port in range(5000):
        if parser.full:
            parser.take()
        parser.frame(101, ipv4(tcp(b"", 4999, 2, (port, 22))), 0)
        for ahead in range(3):
            parser.frame(101, ipv4(tcp(bytes(1400), 6000 + 1400 * ahead, 0x18, (port, 22))), 0)
    parser.take()
    frames = tcp_frames(SSH_STREAM, [21])
    for at in (0, 2, 1):
        parser.frame(*frames[at][:2], 0)
    assert [type(fact) for fact in parser.take()[1]] == [SshBanner, SshKexInit, SshNewKeys]


@given(st.lists(frames(), max_size=30), st.integers(1, 5))
@settings(max_examples=100, deadline=None)
def test_block_size_changes_nothing(some: list[tuple[int, bytes, int]], rows_max: int) -> None:
    whole, facts = parse(some)
    cut, cut_facts = parse(some, rows_max)
    assert whole.tobytes() == cut.tobytes()
    assert facts == cut_facts


@given(st.sampled_from(LINKS), st.binary(max_size=200), st.integers(0, 2**32 - 1))
@settings(max_examples=500, deadline=None)
def test_noise_never_fails(link: int, data: bytes, wire_bytes: int) -> None:
    parser = Parser(rows_max=4)
    parser.frame(link, exact(data), -(2**63), wire_bytes=wire_bytes)
    rows, facts = parser.take()
    assert len(rows) <= 1
    assert all(fact.row == 0 for fact in facts)
