"""Packets of capture files: pcap and pcapng, gzipped or not, whatever they claim."""

from __future__ import annotations

import gzip
import io
import os
import zlib
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, cast

from gpuguard._packets import CaptureFile, Parser
from gpuguard.core.records import Gap, Packets
from gpuguard.sensors.packets.parsed import MISSED, taken

if TYPE_CHECKING:
    from collections.abc import Iterator

ROWS_MAX = 8192
_READ_BYTES = 256 * 1024


class CaptureError(Exception):
    """A capture file could not be read on. ``offset`` counts bytes from its start, unpacked if it is compressed."""

    def __init__(self, name: str, offset: int, reason: str) -> None:
        super().__init__(f"{name}: {reason} at byte {offset}" if offset else f"{name}: {reason}")
        self.name = name
        self.offset = offset
        self.reason = reason


def read_capture(source: str | os.PathLike[str] | BinaryIO, rows_max: int = ROWS_MAX, *,
                 brief: bool = False) -> Iterator[Packets | Gap]:
    """Yield the packets of a pcap or pcapng file, gzipped or not, in blocks of at most ``rows_max`` rows.

    ``source`` is a path, or a binary file that need not seek. Memory stays bounded whatever the file claims. What was
    passed over is a `Gap` at the end. A file that breaks off or breaks the format yields all packets before that, a
    `Gap`, and then raises `CaptureError`. ``brief``: facts that nobody here reads are a mark in the row, see `Parser`.
    """
    parser = Parser(rows_max=rows_max, brief=brief)
    capture = CaptureFile(parser)
    name = getattr(source, "name", "capture") if hasattr(source, "read") else os.fspath(cast("str", source))
    time_ns = 0
    error: CaptureError | None = None
    try:
        for block in _blocks(str(name), source, parser, capture):
            time_ns = block.time_ns
            yield block
    except CaptureError as caught:
        error = caught
    if len(parser):
        block = taken(parser, 0)
        time_ns = block.time_ns
        yield block
    if capture.unsupported:
        yield Gap(time_ns, "packets", "frames of a link type that is not read", lost=capture.unsupported)
    parser.finish()
    counts = parser.counts()
    for name, reason in MISSED.items():
        if counts[name]:
            yield Gap(time_ns, "packets", reason, lost=counts[name])
    if error is not None:
        yield Gap(time_ns, "packets", str(error))
        raise error


def _blocks(name: str, source: str | os.PathLike[str] | BinaryIO, parser: Parser, capture: CaptureFile,
            ) -> Iterator[Packets]:
    """Yield full blocks; what remains is in ``parser``."""
    window = bytearray(_READ_BYTES)
    have = 0
    with _opened(name, source, capture) as file:
        while got := file.readinto1(memoryview(window)[have:]):  # what comes before a break is not lost
            have += got
            at = 0
            while True:
                at += _feed(name, capture, window, at, have)
                if not parser.full:
                    break
                yield taken(parser, 0)
            if at:
                window[:have - at] = window[at:have]
                have -= at
            if have == len(window):
                window.extend(bytes(len(window)))
    if have or not capture.offset:
        raise CaptureError(name, capture.offset, "the file ends within a record" if have else "the file is empty")


def _feed(name: str, capture: CaptureFile, window: bytearray, start: int, end: int) -> int:
    try:
        return capture.feed(window, start, end)
    except ValueError as error:
        raise CaptureError(name, capture.offset, str(error)) from error


@contextmanager
def _opened(name: str, source: str | os.PathLike[str] | BinaryIO, capture: CaptureFile) -> Iterator[io.BufferedIOBase]:
    """Open ``source``, unpack it if need be, and turn every failure to read into a `CaptureError`."""
    with ExitStack() as stack:
        try:
            if hasattr(source, "read"):
                raw = io.BufferedReader(cast("io.RawIOBase", source))
                stack.callback(raw.detach)
            else:
                raw = io.BufferedReader(stack.enter_context(Path(source).open("rb", buffering=0)))
            packed = raw.peek(2)[:2] == b"\x1f\x8b"
            yield gzip.GzipFile(fileobj=raw) if packed else raw
        except EOFError as error:
            raise CaptureError(name, capture.offset, "the compressed file breaks off") from error
        except (OSError, zlib.error) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise CaptureError(name, capture.offset, reason) from error
