"""Capture files: every format by hand, other people's captures against dpkt, broken and hostile files."""

from __future__ import annotations

import gzip
import io
import os
import random
import struct
from pathlib import Path
from typing import TYPE_CHECKING

import dpkt
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gpuguard._packets import CaptureFile, Parser
from gpuguard.core.records import DnsMessage, Fact, Gap, Packets, SshBanner, SshKexInit, SshNewKeys, TlsClientHello
from gpuguard.sensors.packets import CaptureError, read_capture

if TYPE_CHECKING:
    from collections.abc import Iterator

DATA = os.environ.get("GPUGUARD_DATA_DIR", "")
CAPTURES = sorted(Path(DATA, "captures").glob("*/*")) if DATA else []
needs_data = pytest.mark.skipif(not CAPTURES, reason="GPUGUARD_DATA_DIR names no folder with captures/")


# -- files written by hand ---------------------------------------------------------------------------------------------


def segment(data: bytes = b"hello", source_port: int = 40000) -> bytes:
    tcp = struct.pack(">HHIIBBHHH", source_port, 22, 1, 7, 5 << 4, 0x18, 1000, 0, 0) + data
    head = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(tcp), 1, 0, 64, 6, 0)
    return head + bytes([10, 0, 0, 1]) + bytes([10, 0, 0, 2]) + tcp


def query(name: bytes) -> bytes:
    data = struct.pack(">HHHHHH", 7, 0x100, 1, 0, 0, 0) + bytes([len(name)]) + name + b"\0\0\x10\0\1"
    udp = struct.pack(">HHHH", 40000, 53, 8 + len(data), 0) + data
    return struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(udp), 1, 0, 64, 17, 0) + bytes(8) + udp


FRAMES = [b if i % 3 else query(b"name%d" % i) for i, b in enumerate(segment(b"x" * i, 1000 + i) for i in range(60))]


def pcap(frames: list[bytes], order: str = "<", magic: int = 0xA1B2C3D4, link: int = 101) -> bytes:
    extra = struct.pack(order + "IHBB", 1, 0x0800, 4, 0) if magic == 0xA1B2CD34 else b""
    out = struct.pack(order + "IHHiIII", magic, 2, 4, 0, 0, 65535, link)
    for i, data in enumerate(frames):
        out += struct.pack(order + "IIII", 1_700_000_000 + i, 123_456, len(data), len(data)) + extra + data
    return out


def block(order: str, kind: int, body: bytes) -> bytes:
    body += bytes(-len(body) % 4)
    size = len(body) + 12
    return struct.pack(order + "II", kind, size) + body + struct.pack(order + "I", size)


def option(order: str, code: int, value: bytes) -> bytes:
    return struct.pack(order + "HH", code, len(value)) + value + bytes(-len(value) % 4)


def section(order: str) -> bytes:
    return block(order, 0x0A0D0D0A, struct.pack(order + "IHHq", 0x1A2B3C4D, 1, 0, -1))


def interface(order: str, link: int = 101, options: bytes = b"") -> bytes:
    return block(order, 1, struct.pack(order + "HHI", link, 0, 0) + options)


def enhanced(order: str, data: bytes, ticks: int, index: int = 0, options: bytes = b"") -> bytes:
    head = struct.pack(order + "IIIII", index, ticks >> 32, ticks & 0xFFFFFFFF, len(data), len(data))
    return block(order, 6, head + data + bytes(-len(data) % 4) + options)


def pcapng(frames: list[bytes], order: str = "<") -> bytes:
    packets = b"".join(enhanced(order, data, (1_700_000_000 + i) * 10**6) for i, data in enumerate(frames))
    return section(order) + interface(order) + packets


def read(data: bytes, rows_max: int = 8192) -> tuple[np.ndarray, list[Fact], list[Gap]]:
    """Everything of one file; the rows of facts count over all blocks."""
    return gather(read_capture(io.BytesIO(data), rows_max))


def gather(blocks: Iterator[Packets | Gap]) -> tuple[np.ndarray, list[Fact], list[Gap]]:
    rows: list[np.ndarray] = []
    facts: list[Fact] = []
    gaps: list[Gap] = []
    before = 0
    for one in blocks:
        if isinstance(one, Gap):
            gaps.append(one)
            continue
        assert one.time_ns == one.rows["time_ns"][-1]
        assert [fact.row for fact in one.facts] == sorted(fact.row for fact in one.facts)
        for fact in one.facts:
            values = {name: getattr(fact, name) for name in fact.__struct_fields__}
            facts.append(type(fact)(**{**values, "row": fact.row + before}))
        before += len(one.rows)
        rows.append(one.rows)
    return np.concatenate(rows) if rows else np.empty(0), facts, gaps


def until_error(data: bytes, rows_max: int = 8192) -> tuple[int, CaptureError | None]:
    """How many rows come before the error, if there is one, and that a Gap says the same."""
    rows, gaps = 0, []
    try:
        for one in read_capture(io.BytesIO(data), rows_max):
            if isinstance(one, Gap):
                gaps.append(one.reason)
            else:
                rows += len(one.rows)
    except CaptureError as error:
        assert str(error) in gaps
        assert 0 <= error.offset <= max(len(data), error.offset)
        return rows, error
    return rows, None


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(("magic", "time_ns", "packet_type"), [
    (0xA1B2C3D4, 123_456_000, 255), (0xA1B23C4D, 123_456, 255), (0xA1B2CD34, 123_456_000, 4)])
def test_pcap(order: str, magic: int, time_ns: int, packet_type: int) -> None:
    rows, facts, gaps = read(pcap(FRAMES, order, magic))
    assert len(rows) == len(FRAMES)
    assert rows["time_ns"].tolist() == [(1_700_000_000 + i) * 10**9 + time_ns for i in range(len(FRAMES))]
    assert set(rows["packet_type"].tolist()) == {packet_type}
    assert [fact.name for fact in facts] == [f"name{i}" for i in range(0, 60, 3)]
    assert gaps == []


@pytest.mark.parametrize("order", ["<", ">"])
def test_pcapng_blocks_sections_and_resolutions(order: str) -> None:
    data, other = segment(), ">" if order == "<" else "<"
    shifted = option(order, 9, b"\x09") + option(order, 14, struct.pack(order + "q", 1_000_000_000)) + bytes(4)
    old = struct.pack(order + "HHIIII", 2, 0, 0, 2 << 9, len(data), len(data)) + data
    capture = (
        section(order) + interface(order) + interface(order, options=shifted)
        + interface(order, options=option(order, 9, b"\x89") + bytes(4))
        + interface(order, 105)
        + block(order, 0xBAD, bytes(100))
        + enhanced(order, data, 5_000_000)
        + enhanced(order, data, 7, 1, option(order, 2, struct.pack(order + "I", 2)) + bytes(4))
        + enhanced(order, data, 3, 3)
        + block(order, 3, struct.pack(order + "I", len(data)) + data)
        + block(order, 2, old)
        + section(other) + interface(other, 1) + enhanced(other, bytes(12) + b"\x08\0" + data, 9_000_000)
    )
    rows, _, gaps = read(capture)
    second = 10**9
    # The simple packet block has no time of its own and takes that of the block before it, read or not.
    assert rows["time_ns"].tolist() == [5 * second, second * second + 7, 3000, 2 * second, 9 * second]
    assert rows["packet_type"].tolist() == [255, 4, 255, 255, 255]
    assert rows["payload_bytes"].tolist() == [5] * 5
    assert [(gap.reason, gap.lost) for gap in gaps] == [("frames of a link type that is not read", 1)]


@pytest.mark.parametrize("resolution", [0, 3, 6, 9, 12, 19, 127, 128, 0x80 | 10, 0x80 | 63, 0x80 | 64, 255])
def test_any_resolution(resolution: int) -> None:
    ticks = 0x1234_5678_9ABC
    face = interface("<", options=option("<", 9, bytes([resolution])))
    rows, _, _ = read(section("<") + face + enhanced("<", segment(), ticks))
    n = resolution & 0x7F
    exact = ticks * 10**9 // (2**n if resolution & 0x80 else 10**n)
    assert rows["time_ns"].tolist() == [(exact + 2**63) % 2**64 - 2**63]


def test_gzip_and_files_and_streams_that_cannot_seek(tmp_path: Path) -> None:
    plain = pcap(FRAMES)
    expected = read(plain)[0].tobytes()
    packed = tmp_path / "one.pcap.gz"
    packed.write_bytes(gzip.compress(plain[:500]) + gzip.compress(plain[500:]))
    assert gather(read_capture(packed))[0].tobytes() == expected
    with packed.open("rb") as file:
        assert gather(read_capture(file))[0].tobytes() == expected
        assert not file.closed
    reading, writing = os.pipe()
    os.write(writing, plain)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        assert gather(read_capture(pipe))[0].tobytes() == expected


@pytest.mark.parametrize("make", [pcap, pcapng])
def test_a_file_cut_anywhere_loses_nothing_before_the_cut(make: object) -> None:
    whole = make(FRAMES[:6])
    ends = [len(make(FRAMES[:i])) for i in range(7)]
    for cut in range(len(whole)):
        rows, error = until_error(whole[:cut])
        assert rows == max((i for i, end in enumerate(ends) if end <= cut), default=0)
        assert (error is None) == (cut in ends or (make is pcapng and cut == len(section("<"))))
        if error is not None:
            assert error.offset <= cut


@pytest.mark.parametrize(("data", "reason"), [
    (b"", "the file is empty"),
    (b"hello, this is not a capture file", "not a pcap or pcapng file"),
    (pcap([], link=105), "link type not supported"),
    (pcap([]) + struct.pack("<IIII", 1, 0, 2**31, 2**31), "packet record longer than 16 MiB"),
    (section("<") + enhanced("<", segment(), 1), "packet block names an interface that was not described"),
    (section("<") + struct.pack("<II", 6, 13) + bytes(40), "block length impossible"),
    (section("<") + block("<", 1, bytes(4)), "interface block too short"),
    (section("<") + block("<", 5, bytes(8))[:-1] + b"\1", "block lengths before and after differ"),
    (section("<") + interface("<") * 1025, "more than 1024 interfaces in one section"),
    (section("<") + interface("<") + block("<", 6, struct.pack("<5I", 0, 0, 0, 9, 9)), "packet longer than its block"),
    (section("<") + interface("<") + block("<", 6, bytes(8)), "packet block too short"),
    (struct.pack("<IIII", 0x0A0D0D0A, 28, 1, 1) + bytes(12), "section header without byte-order magic"),
    (gzip.compress(pcap(FRAMES))[:-20], "the compressed file breaks off"),
    (b"\x1f\x8b\x08" + bytes(40), None),
])
def test_what_cannot_be_read_says_why_and_where(data: bytes, reason: str | None) -> None:
    _, error = until_error(data)
    assert error is not None
    assert reason is None or error.reason == reason


def test_a_missing_file_is_a_capture_error(tmp_path: Path) -> None:
    for path in (tmp_path / "none.pcap", tmp_path):
        with pytest.raises(CaptureError):
            list(read_capture(path))


def test_what_was_read_before_the_break_is_kept() -> None:
    rows, error = until_error(pcap(FRAMES) + struct.pack("<IIII", 1, 0, 2**31, 2**31), rows_max=7)
    assert rows == len(FRAMES)
    assert error is not None
    assert error.offset == len(pcap(FRAMES))


@given(st.integers(1, 70), st.sampled_from([pcap, pcapng]))
@settings(max_examples=40, deadline=None)
def test_block_size_changes_nothing(rows_max: int, make: object) -> None:
    data = make(FRAMES)
    whole, facts, _ = read(data)
    cut, cut_facts, _ = read(data, rows_max)
    assert cut.tobytes() == whole.tobytes()
    assert cut_facts == facts


@given(st.sampled_from([pcap(FRAMES[:8]), pcapng(FRAMES[:8]), pcapng(FRAMES[:8], ">"), gzip.compress(pcap(FRAMES))]),
       st.lists(st.tuples(st.integers(0, 900), st.binary(min_size=1, max_size=4)), max_size=4), st.integers(0, 2000))
@settings(max_examples=400, deadline=None)
def test_a_mutated_file_never_fails_otherwise(data: bytes, edits: list[tuple[int, bytes]], cut: int) -> None:
    for at, new in edits:
        data = data[:at] + new + data[at + len(new):]
    until_error(data[:cut] if cut > 900 else data, rows_max=3)


@given(st.binary(max_size=300), st.sampled_from([b"", pcap([])[:24], section("<") + interface("<"), b"\x1f\x8b\x08"]))
@example(b"\x0a\x0d\x0d\x0a", b"")
@settings(max_examples=400, deadline=None)
def test_noise_never_fails_otherwise(data: bytes, head: bytes) -> None:
    until_error(head + data)


@given(st.sampled_from([pcap(FRAMES[:8]), pcapng(FRAMES[:8]), pcapng(FRAMES[:8], ">")]),
       st.lists(st.tuples(st.integers(0, 900), st.binary(min_size=1, max_size=4)), max_size=4), st.integers(0, 1200))
@settings(max_examples=400, deadline=None)
def test_nothing_is_read_past_the_end(data: bytes, edits: list[tuple[int, bytes]], cut: int) -> None:
    """In memory of exactly that size, so that a sanitizer would see it."""
    for at, new in edits:
        data = data[:at] + new + data[at + len(new):]
    exact = np.array(bytearray(data[:cut]), dtype=np.uint8)
    parser = Parser()
    capture = CaptureFile(parser)
    try:
        took = capture.feed(exact, 0, len(exact))
    except ValueError:
        took = capture.offset
    assert took == capture.offset <= len(exact)
    with pytest.raises(IndexError):
        capture.feed(exact, 0, len(exact) + 1)


# -- other people's captures -------------------------------------------------------------------------------------------


def frames_of(path: Path) -> Iterator[tuple[int, float, bytes]]:
    """Link type, time, and frame, by dpkt."""
    with path.open("rb") as file:
        data = file.read()
    data = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
    reader = dpkt.pcapng.Reader if data[:4] == b"\x0a\x0d\x0d\x0a" else dpkt.pcap.Reader
    capture = reader(io.BytesIO(data))
    for time_s, frame in capture:
        yield capture.datalink(), float(time_s), bytes(frame)


def by_dpkt(link: int, frame: bytes) -> tuple | None:
    """(protocol, ports, sequence, payload) of one frame as dpkt reads it; None where it is not IP."""
    try:
        if link == 1:
            inner = dpkt.ethernet.Ethernet(frame).data
        elif link == 113:
            inner = dpkt.sll.SLL(frame).data
        elif link == 0:
            inner = dpkt.loopback.Loopback(frame).data
        else:
            inner = (dpkt.ip6.IP6 if frame[0] >> 4 == 6 else dpkt.ip.IP)(frame)
    except dpkt.UnpackError:
        return None
    if isinstance(inner, dpkt.ip.IP):
        size = (inner.len or len(inner)) - inner.hl * 4
        portless = inner.offset != 0
    elif isinstance(inner, dpkt.ip6.IP6):
        size = inner.plen - sum(len(header) for header in inner.all_extension_headers)
        portless = False
    else:
        return None
    part = inner.data
    if portless:
        return inner.p, 0, 0, 0, size
    if isinstance(part, dpkt.tcp.TCP):
        return 6, part.sport, part.dport, part.seq, size - part.off * 4
    if isinstance(part, dpkt.udp.UDP):
        return 17, part.sport, part.dport, 0, size - 8
    if isinstance(part, dpkt.icmp.ICMP):
        return 1, part.type << 8 | part.code, None, None, size - 8
    return (inner.p, None, None, None, None)


@needs_data
@pytest.mark.parametrize("path", CAPTURES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_rows_are_dpkts(path: Path) -> None:
    rows, _, _ = gather(read_capture(path, 1000))
    expected = [(time_s, row) for link, time_s, frame in frames_of(path) if (row := by_dpkt(link, frame)) is not None]
    assert len(rows) == len(expected)
    names = ("protocol", "source_port", "destination_port", "sequence", "payload_bytes")
    for row, (time_s, oracle) in zip(rows, expected, strict=True):
        ours = tuple(int(row[name]) for name in names)
        assert all(b is None or a == b for a, b in zip(ours, oracle, strict=True)), (ours, oracle)
        assert abs(int(row["time_ns"]) / 1e9 - time_s) < 1e-5


@needs_data
def test_ssh_facts_of_a_lab_session() -> None:
    _, facts, gaps = gather(read_capture(Path(DATA, "captures/lab/rev_innerssh_9_9.pcap")))
    assert [type(fact) for fact in facts].count(SshBanner) == 2
    client, server = [fact for fact in facts if isinstance(fact, SshKexInit)]
    assert "chacha20-poly1305@openssh.com" in client.encryption_client_to_server
    assert server.compression_server_to_client == ("none", "zlib@openssh.com")
    assert len([fact for fact in facts if isinstance(fact, SshNewKeys)]) == 2
    assert gaps == []


@needs_data
def test_names_of_real_sessions() -> None:
    _, facts, _ = gather(read_capture(Path(DATA, "captures/joy/firefox58.pcap")))
    hellos = [fact for fact in facts if isinstance(fact, TlsClientHello)]
    assert len(hellos) == 7
    assert all("." in hello.server_name and "h2" in hello.alpn for hello in hellos)
    _, facts, _ = gather(read_capture(Path(DATA, "captures/lab/iodine_ssh.pcap")))
    assert all(isinstance(fact, DnsMessage) for fact in facts)
    assert max(len(fact.name) for fact in facts) > 100
    assert max(fact.answer_bytes for fact in facts) > 100


@needs_data
@pytest.mark.parametrize("path", CAPTURES[::5], ids=lambda path: path.name)
def test_real_captures_in_any_blocks_and_mutated(path: Path) -> None:
    whole, facts, _ = gather(read_capture(path))
    for rows_max in (1, 17, 4096):
        cut, cut_facts, _ = gather(read_capture(path, rows_max))
        assert cut.tobytes() == whole.tobytes()
        assert cut_facts == facts
    data = bytearray(path.read_bytes()[:60000])
    dice = random.Random(7)
    for _ in range(10):
        for _ in range(20):
            data[dice.randrange(len(data))] = dice.randrange(256)
        until_error(bytes(data))
