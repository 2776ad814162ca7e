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

    What cannot be read costs itself only: a file that ends inside a frame or is damaged yields all before it, and a
    `Gap` of sensor "recording", at the time of the last record read, says what was lost; so it is with a file of a
    directory that is missing or is no recording. Raises RecordingError if nothing here is a recording, OSError if it
    cannot be opened.
    """
    files = recording_files(path) if path.is_dir() else [path]
    if not files:
        message = "no recording in this folder"
        raise RecordingError(message)
    time_ns, is_recording = 0, False
    losses: list[str] = []
    for before, one in zip([None, *files[:-1]], files, strict=True):
        losses += _missing(before, one)
        try:
            with one.open("rb") as stream:
                for block in read_stream(stream, one.name):
                    if isinstance(block, Gap) and block.time_ns == 0:
                        losses.append(block.reason)
                        continue
                    # The first record says whose recording this is: nothing is said before it.
                    yield from _gaps(losses if time_ns else [], time_ns)
                    time_ns = block.time_ns
                    yield block
            is_recording = True
        except (RecordingError, FileNotFoundError) as error:
            if len(files) == 1:
                raise
            losses.append(f"{one.name}: {error}")
    if not is_recording:
        raise RecordingError("; ".join(losses))
    yield from _gaps(losses, time_ns)


def _gaps(losses: list[str], time_ns: int) -> Iterator[Gap]:
    while losses:
        yield Gap(time_ns=time_ns, sensor="recording", reason=losses.pop(0))


def _missing(before: Path | None, one: Path) -> list[str]:
    """Return what is said of files that are not there between two. The oldest may have been removed for space."""
    if before is None or not (before.stem.isdecimal() and one.stem.isdecimal()):
        return []
    first, last = int(before.stem) + 1, int(one.stem) - 1
    return [f"files {first} to {last} are missing"] if first <= last else []


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
