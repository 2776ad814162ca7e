"""Reading a recording back: every whole frame, then the truth about what is missing."""

from __future__ import annotations

from typing import TYPE_CHECKING, BinaryIO

from gpuguard.core.records import Block, Gap
from gpuguard.recording.codec import (
    FRAME_BYTES_MAX,
    HEADER_BYTES_MAX,
    PREFIX,
    RecordingError,
    decode_frame,
    decode_header,
)
from gpuguard.recording.writer import recording_files

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def read_recording(path: Path) -> Iterator[Block]:
    """Yield the blocks of a recording: one file, or a directory of them in order.

    A file that ends inside a frame, or is damaged, yields all before it and then a `Gap` of sensor "recording" that
    says what was lost, at the time of the last record read. Raises RecordingError if nothing here is a recording,
    OSError if it cannot be opened.
    """
    files = recording_files(path) if path.is_dir() else [path]
    if not files:
        message = f"no recording in {path}"
        raise RecordingError(message)
    time_ns = 0
    for one in files:
        with one.open("rb") as stream:
            for block in read_stream(stream, one.name):
                if isinstance(block, Gap) and block.time_ns == 0:
                    yield Gap(time_ns=time_ns, sensor=block.sensor, reason=block.reason)
                    continue
                time_ns = block.time_ns
                yield block


def read_stream(stream: BinaryIO, name: str) -> Iterator[Block]:
    """Yield the blocks of one open file; a loss is a last Gap with time_ns 0. Raises RecordingError on a bad header."""
    decode_header(stream.readline(HEADER_BYTES_MAX))
    while prefix := stream.read(PREFIX.size):
        offset = stream.tell() - len(prefix)
        try:
            blocks = _next_frame(stream, prefix)
        except RecordingError as error:
            yield Gap(time_ns=0, sensor="recording", reason=f"{name} is cut or damaged at byte {offset}: {error}")
            return
        yield from blocks


def _next_frame(stream: BinaryIO, prefix: bytes) -> list[Block]:
    if len(prefix) < PREFIX.size:
        message = "the file ends inside a frame"
        raise RecordingError(message)
    length, crc = PREFIX.unpack(prefix)
    if length > FRAME_BYTES_MAX:
        message = f"a frame of {length} bytes is above the limit"
        raise RecordingError(message)
    body = stream.read(length)
    if len(body) < length:
        message = "the file ends inside a frame"
        raise RecordingError(message)
    return decode_frame(body, crc)
