from __future__ import annotations

import errno
import os
import zlib
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuguard.core.records import (
    LAUNCH,
    PACKET,
    Block,
    DnsMessage,
    Gap,
    HostInfo,
    Launches,
    Packets,
    SshBanner,
    Tick,
    TlsRecords,
)
from gpuguard.recording import writer
from gpuguard.recording.codec import PREFIX, RecordingError, decode_frame, encode_frame, encode_header
from gpuguard.recording.columns import from_columns, to_columns
from gpuguard.recording.reader import read_recording
from gpuguard.recording.writer import Recorder, recording_files
from tests.core.builders import BOOT, SECOND, T0, call, flow, pid, socket_of, sockets, started

INFO = HostInfo(time_ns=T0, schema_version=1, boot_id=BOOT, hostname="node", clock_ticks_per_s=100)


def packets(count: int, time_ns: int = T0) -> Packets:
    rows = np.zeros(count, PACKET)
    rows["time_ns"] = time_ns + np.arange(count)
    rows["payload_bytes"] = np.arange(count)
    return Packets(time_ns=time_ns, netns=7, rows=rows, facts=(SshBanner(row=0, text="SSH-2.0-x"),) if count else ())


def some_blocks() -> list[Block]:
    launches = Launches(time_ns=T0 + 5, rows=np.ones(3, LAUNCH))
    return [INFO, packets(40), started(pid(5), pid(1)), sockets(socket_of(flow(), pid(5))), call(), launches,
            Gap(time_ns=T0 + 6, sensor="nvml", reason="no driver"), Tick(time_ns=T0 + 7)]


def same(one: Block, other: Block) -> bool:
    if isinstance(one, Packets | Launches) and isinstance(other, Packets | Launches):
        return (one.rows.tobytes() == other.rows.tobytes() and one.rows.dtype == other.rows.dtype
                and getattr(one, "facts", ()) == getattr(other, "facts", ()))
    return one == other


def record(directory: Path, blocks: list[Block], *, file_bytes_max: int = 1 << 20,
           total_bytes_max: int = 1 << 24) -> list[Gap]:
    recorder = Recorder(directory, file_bytes_max=file_bytes_max, total_bytes_max=total_bytes_max)
    gaps = [gap for block in blocks for gap in recorder.write(block)]
    return gaps + recorder.close(blocks[-1].time_ns)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    assert record(tmp_path, some_blocks()) == []
    read = list(read_recording(tmp_path))
    assert len(read) == len(some_blocks())
    assert all(same(a, b) for a, b in zip(some_blocks(), read, strict=True))


def test_empty_rows_survive(tmp_path: Path) -> None:
    record(tmp_path, [packets(0)])
    (read,) = read_recording(tmp_path)
    assert isinstance(read, Packets)
    assert len(read.rows) == 0


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 60), st.integers(1, 8))
def test_columns_give_back_the_same_rows(seed: int, count: int, distinct: int) -> None:
    rng = np.random.default_rng(seed)
    pool = rng.integers(0, 256, (distinct, PACKET.itemsize), dtype=np.uint8)
    rows = np.ascontiguousarray(pool[rng.integers(0, distinct, count)]).reshape(-1).view(PACKET)
    rows["sequence"] = rng.integers(0, 2**32, count)
    rows["time_ns"] = rng.integers(-2**62, 2**62, count)
    assert from_columns(to_columns(rows)).tobytes() == rows.tobytes()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_cut_at_any_byte_it_reads_up_to_the_cut_and_says_so(data: st.DataObject) -> None:
    frames = [encode_frame([block]) for block in some_blocks()]
    whole = encode_header() + b"".join(frames)
    cut = data.draw(st.integers(len(encode_header()), len(whole)))
    ends = np.cumsum([len(encode_header())] + [len(frame) for frame in frames])
    kept = int(np.searchsorted(ends, cut, side="right")) - 1
    with TemporaryDirectory() as folder:
        path = Path(folder) / "one.ggrec"
        path.write_bytes(whole[:cut])
        read = list(read_recording(path))
    assert all(same(a, b) for a, b in zip(some_blocks()[:kept], read, strict=False))
    if cut in ends:
        assert len(read) == kept
    else:
        assert len(read) == kept + 1
        lost = read[-1]
        assert isinstance(lost, Gap)
        assert lost.sensor == "recording"
        assert "cut" in lost.reason


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**31), st.binary(min_size=1, max_size=4))
def test_damage_anywhere_is_reported_never_a_crash(position: int, patch: bytes) -> None:
    whole = bytearray(encode_header() + b"".join(encode_frame([block]) for block in some_blocks()))
    start = len(encode_header()) + position % (len(whole) - len(encode_header()))
    changed = bytes(whole[:start]) + patch + bytes(whole[start + len(patch):])
    with TemporaryDirectory() as folder:
        path = Path(folder) / "one.ggrec"
        path.write_bytes(changed)
        read = list(read_recording(path))
    intact = changed[:len(whole)] == bytes(whole)
    assert intact or any(isinstance(b, Gap) and b.sensor == "recording" for b in read)


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=300))
def test_frames_of_any_bytes_never_crash(noise: bytes) -> None:
    import zlib

    body = zlib.compress(noise)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "one.ggrec"
        path.write_bytes(encode_header() + PREFIX.pack(len(body), zlib.crc32(body)) + body)
        read = list(read_recording(path))
    assert len(read) == 1


def test_a_frame_that_expands_without_end_is_refused(tmp_path: Path) -> None:
    import zlib

    body = zlib.compress(bytes(80 * 1024 * 1024), 9)
    path = tmp_path / "bomb.ggrec"
    path.write_bytes(encode_header() + PREFIX.pack(len(body), zlib.crc32(body)) + body)
    (gap,) = read_recording(path)
    assert isinstance(gap, Gap)
    assert "expands" in gap.reason


@pytest.mark.parametrize("content", [b"", b"\n", b"{}", b'{"format":"x","schema":1}\n',
                                     b'{"format":"gpuguard-recording","schema":99}\n', b"\xff" * 9000])
def test_what_is_no_recording_is_an_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.ggrec"
    path.write_bytes(content)
    with pytest.raises(RecordingError):
        list(read_recording(path))
    with pytest.raises(RecordingError):
        list(read_recording(tmp_path / "nothing-here") if (tmp_path / "nothing-here").mkdir() is None else ())


def test_files_rotate_each_says_whose_it_is_and_the_oldest_leave(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    blocks: list[Block] = [INFO]
    for number in range(40):
        block = packets(200, T0 + number * 2 * SECOND)
        block.rows["sequence"] = rng.integers(0, 2**32, 200)
        blocks.append(block)
    record(tmp_path, blocks, file_bytes_max=8_000, total_bytes_max=30_000)
    files = recording_files(tmp_path)
    assert len(files) > 2
    assert sum(path.stat().st_size for path in files) <= 30_000
    assert files[0].name != "00000001.ggrec"
    first = next(iter(read_recording(files[0])))
    assert first == INFO
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in files)


def test_a_disk_that_refuses_loses_that_frame_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, refuse = os.write, [False]

    def write(descriptor: int, data: bytes) -> int:
        if refuse[0]:
            real(descriptor, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, data)

    monkeypatch.setattr(writer.os, "write", write)
    recorder = Recorder(tmp_path, file_bytes_max=1 << 20, total_bytes_max=1 << 24)
    recorder.write(packets(10))
    assert recorder.flush(T0) == []
    refuse[0] = True
    recorder.write(packets(20))
    (gap,) = recorder.flush(T0)
    assert "No space left" in gap.reason
    assert gap.lost == 1
    refuse[0] = False
    recorder.write(packets(30))
    assert recorder.close(T0) == []
    assert [len(b.rows) for b in read_recording(tmp_path) if isinstance(b, Packets)] == [10, 30]


def test_a_disk_that_is_full_at_the_beginning_leaves_a_file_that_can_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    real, refuse = os.write, [True]

    def write(descriptor: int, data: bytes) -> int:
        if refuse[0]:
            real(descriptor, data[:7])
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, data)

    monkeypatch.setattr(writer.os, "write", write)
    recorder = Recorder(tmp_path, file_bytes_max=1 << 20, total_bytes_max=1 << 24)
    recorder.write(packets(10))
    (gap,) = recorder.flush(T0)
    assert "No space left" in gap.reason
    refuse[0] = False
    recorder.write(packets(30))
    assert recorder.close(T0) == []
    assert [len(b.rows) for b in read_recording(tmp_path) if isinstance(b, Packets)] == [30]


def test_rows_that_are_no_bytes_are_damage(tmp_path: Path) -> None:
    import zlib

    import msgspec

    for rows in (7, "x", [1], None, {"a": 1}):
        block = {"type": "launches", "time_ns": 1, "rows": rows}
        body = zlib.compress(msgspec.msgpack.encode({"blocks": [block], "counts": [], "packets": None}))
        path = tmp_path / "one.ggrec"
        path.write_bytes(encode_header() + PREFIX.pack(len(body), zlib.crc32(body)) + body)
        (gap,) = read_recording(path)
        assert isinstance(gap, Gap)
        assert "cannot be read" in gap.reason


def test_a_recorded_packet_costs_less_than_40_bytes(tmp_path: Path) -> None:
    rng = np.random.default_rng(7)
    flows, count = 500, 20_000
    ends = np.zeros(2 * flows, PACKET)
    near, far = ends[:flows], ends[flows:]
    near["source"] = rng.integers(0, 256, (flows, 16))
    near["destination"] = rng.integers(0, 256, (flows, 16))
    near["source_port"] = rng.integers(1024, 65536, flows)
    near["destination_port"] = rng.choice([22, 443, 8443], flows)
    far["source"], far["destination"] = near["destination"], near["source"]
    far["source_port"], far["destination_port"] = near["destination_port"], near["source_port"]
    which = rng.integers(0, 2 * flows, count)
    rows = ends[which]
    rows["time_ns"] = T0 + np.cumsum(rng.exponential(2e6, count)).astype(np.int64)
    rows["payload_bytes"] = rng.choice([0, 36, 76, 1448, 28960], count)
    rows["frame_bytes"] = rows["payload_bytes"] + 66
    sent = rng.integers(0, 2**32, 2 * flows, dtype=np.uint32)
    for row, end in zip(rows, which, strict=True):
        row["sequence"], row["acknowledgement"] = sent[end], sent[(end + flows) % (2 * flows)]
        sent[end] += row["payload_bytes"]
    record(tmp_path, [Packets(time_ns=T0, netns=1, rows=part) for part in np.array_split(rows, 400)])
    size = sum(path.stat().st_size for path in recording_files(tmp_path))
    assert size / count < 40


def no_packet(mark: int = 0) -> np.ndarray:
    row = np.zeros(1, PACKET)
    row["ip_version"] = mark << 4 | 4
    return row


def launches(count: int) -> np.ndarray:
    rows = np.zeros(2, LAUNCH)
    rows["launches"] = count
    return rows


@pytest.mark.parametrize("block", [
    Packets(T0, -1, no_packet()), Packets(T0, 1 << 32, no_packet()), Packets(T0, 0, no_packet(mark=5)),
    Packets(T0, 0, no_packet(), (DnsMessage(0, True, "name." * 9, 1, 9, (b"",)),)), Launches(T0, launches(1 << 63)),
], ids=["namespace", "large namespace", "protocol", "address", "launches"])
def test_records_that_make_no_sense_are_refused(block: Block) -> None:
    frame = encode_frame([block])
    with pytest.raises(RecordingError):
        decode_frame(frame[PREFIX.size:], PREFIX.unpack(frame[:PREFIX.size])[1])


def test_records_of_tls_without_their_times_are_refused() -> None:
    talk = TlsRecords(0, (T0, T0 + SECOND), (40, 50))
    frame = encode_frame([Packets(T0, 0, no_packet(), (talk,))])
    body = zlib.decompress(frame[PREFIX.size:])
    sizes, none = msgspec.msgpack.encode((40, 50)), msgspec.msgpack.encode((40,))
    assert body.count(sizes) == 1
    damaged = zlib.compress(body.replace(sizes, none))
    with pytest.raises(RecordingError, match="times"):
        decode_frame(damaged, zlib.crc32(damaged))
