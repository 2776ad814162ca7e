"""The ring's blocks without a kernel: a file in memory is mapped instead, and says whatever a test wants it to say."""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuguard._packets import Parser, Ring

BLOCK = 4096
HEAD, LINK = 48, 48
KERNEL, USER = 0, 1


def udp(size: int = 10) -> bytes:
    datagram = struct.pack(">HHHH", 1000, 2000, 8 + size, 0) + bytes(size)
    return struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(datagram), 1, 0, 64, 17, 0) + bytes(8) + datagram


def packet(data: bytes, *, hatype: int = 1, kind: int = 0x0800, **claim: int) -> bytes:
    """struct tpacket3_hdr, struct sockaddr_ll, the packet, up to where the next one begins."""
    step = (80 + len(data) + 15) // 16 * 16
    header = struct.pack("=6IHH20x", claim.get("step", step), 7, 5, claim.get("snap", len(data)), len(data),
                         claim.get("status", 0), 0, claim.get("net", 80))
    link = struct.pack("=H2sIHBB8x", 17, kind.to_bytes(2, "big"), claim.get("interface", 1), hatype, 4, 6)
    return ((header + link).ljust(80, b"\0") + data).ljust(step, b"\0")


def block(packets: list[bytes], count: int | None = None, first: int = HEAD, status: int = USER) -> bytes:
    head = struct.pack("=5I", 1, 48, status, len(packets) if count is None else count, first)
    return (head.ljust(HEAD, b"\0") + b"".join(packets)).ljust(BLOCK, b"\0")


@contextmanager
def ring_of(blocks: list[bytes], *, many: bool = False) -> Iterator[tuple[Ring, mmap.mmap]]:
    descriptor = os.memfd_create("ring")
    try:
        os.write(descriptor, b"".join(blocks))
        ring = Ring(descriptor, BLOCK, len(blocks), many=many)
        with mmap.mmap(descriptor, 0) as memory:
            yield ring, memory
        ring.close()
    finally:
        os.close(descriptor)


def test_blocks_are_read_in_order_and_given_back() -> None:
    blocks = [block([packet(udp(i)), packet(udp(i + 1), hatype=65534)]) for i in (1, 3, 5)]
    blocks[2] = block([], status=KERNEL)
    with ring_of(blocks) as (ring, memory):
        parser = Parser()
        assert not ring.read(parser, 10)
        rows, _ = parser.take()
        assert rows["payload_bytes"].tolist() == [1, 2, 3, 4]
        assert rows["frame_bytes"].tolist() == [43, 30, 45, 32]  # with 14 bytes of Ethernet, or none
        assert rows["time_ns"].tolist() == [7_000_000_005] * 4
        assert rows["packet_type"].tolist() == [4] * 4
        assert [struct.unpack_from("=I", memory, i * BLOCK + 8)[0] for i in range(3)] == [KERNEL] * 3
        memory[2 * BLOCK:3 * BLOCK] = block([packet(udp(9))])
        memory[:BLOCK] = block([packet(udp(8))])
        assert not ring.read(parser, 10)
        assert parser.take()[0]["payload_bytes"].tolist() == [9, 8]


def test_a_full_parser_goes_on_within_the_block() -> None:
    with ring_of([block([packet(udp(i)) for i in range(5)])] * 2) as (ring, memory):
        parser = Parser(rows_max=2)
        seen = []
        while ring.read(parser, 10):
            seen += parser.take()[0]["payload_bytes"].tolist()
        seen += parser.take()[0]["payload_bytes"].tolist()
        assert seen == [0, 1, 2, 3, 4] * 2
        assert struct.unpack_from("=I", memory, 8)[0] == KERNEL


def test_a_tag_left_in_the_frame_is_passed_over() -> None:
    tagged = b"\0\5\x08\0" + udp(3)
    with ring_of([block([packet(tagged, kind=0x8100), packet(udp(4), kind=0x0806)])]) as (ring, _):
        parser = Parser()
        ring.read(parser, 1)
        assert parser.take()[0]["payload_bytes"].tolist() == [3]
        assert parser.counts()["other"] == 1


@pytest.mark.parametrize("control", [0x0005, 0x4005, 0x4505, 0x6005])
@pytest.mark.parametrize("more", [0, 2])
def test_a_second_tag_is_passed_over_though_the_kernel_says_what_follows_it(control: int, more: int) -> None:
    told = 0x10  # TP_STATUS_VLAN_VALID: the first tag lies beside the packet
    tags = struct.pack(">HH", control, 0x8100) * more + struct.pack(">H", control)
    six = struct.pack(">IHBB", 6 << 28, 8, 17, 64) + bytes(32) + struct.pack(">HHHH", 1000, 2000, 8, 0)
    packets = [packet(tags + b"\x08\0" + udp(3), status=told), packet(udp(4), status=told),
               packet(tags + b"\x86\xdd" + six, kind=0x86DD, status=told),
               # A header that looks like a tag (its length is 0x0800), with no header behind it.
               packet(udp(0x0800 - 28), status=told)]
    with ring_of([block(packets)]) as (ring, _):
        parser = Parser()
        ring.read(parser, 1)
        assert parser.take()[0]["payload_bytes"].tolist() == [3, 4, 0, 0x0800 - 28]
        assert parser.counts()["malformed"] == 0


@pytest.mark.parametrize("many", [False, True])
def test_a_packet_on_its_way_through_several_interfaces_counts_once(*, many: bool) -> None:
    question = bytes(4) + b"\0\1" + bytes(6) + b"\1a\0\0\x10\0\1"
    asked = struct.pack(">HHHH", 1000, 53, 8 + len(question), 0) + question
    asked = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(asked), 1, 0, 64, 17, 0) + bytes(8) + asked
    on_the_way = [packet(asked, interface=one) for one in (3, 2, 4)]
    others = [packet(udp(1), interface=3), packet(udp(1), interface=3), packet(udp(2), interface=2)]
    with ring_of([block([*on_the_way, *others, *on_the_way])], many=many) as (ring, _):
        parser = Parser()
        assert not ring.read(parser, 10)
        rows, facts = parser.take()
        sizes = [len(question), 1, 1, 2, len(question)]
        everything = [len(question)] * 3 + [1, 1, 2] + [len(question)] * 3
        assert rows["payload_bytes"].tolist() == (sizes if many else everything)
        assert [fact.row for fact in facts] == ([0, 4] if many else [0, 1, 2, 6, 7, 8])
        assert ring.duplicates == (4 if many else 0)


@pytest.mark.parametrize("claim", [
    {"step": 0}, {"step": 2**31}, {"step": 16}, {"net": 65535}, {"snap": 2**32 - 1}, {"snap": 4000},
])
def test_lengths_that_do_not_add_up_are_counted(claim: dict) -> None:
    with ring_of([block([packet(udp(), **claim), packet(udp())]), block([packet(udp(7))])]) as (ring, _):
        parser = Parser()
        assert not ring.read(parser, 10)
        assert parser.take()[0]["payload_bytes"].tolist()[-1] == 7
        assert ring.malformed_blocks + parser.counts()["malformed"] == 1


@given(st.binary(max_size=600), st.integers(0, 2**32 - 1), st.one_of(st.integers(0, 5000), st.integers(0, 2**32 - 1)))
@settings(max_examples=200, deadline=None)
def test_noise_never_fails(noise: bytes, count: int, first: int) -> None:
    with ring_of([block([noise], count, first), block([packet(udp(7))])]) as (ring, _):
        parser = Parser(rows_max=50)
        for _ in range(300):
            if not ring.read(parser, 10):
                break
            parser.take()
        assert parser.take()[0]["payload_bytes"].tolist()[-1:] == [7]


def test_what_cannot_be_mapped_is_an_error() -> None:
    reading, writing = os.pipe()
    with pytest.raises(OSError, match="could not be mapped: "):
        Ring(reading, BLOCK, 4)
    with pytest.raises(ValueError, match="out of range"):
        Ring(reading, 16, 4)
    os.close(reading)
    os.close(writing)
    with ring_of([block([])]) as (ring, _):
        ring.close()
        with pytest.raises(ValueError, match="closed"):
            ring.read(Parser(), 1)
