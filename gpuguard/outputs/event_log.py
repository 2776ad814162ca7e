"""Events as JSON lines, one `core.events` object each: what other programs follow, and what reports are made of."""

from __future__ import annotations

import contextlib
import errno
import os
from typing import TYPE_CHECKING

import msgspec
import structlog

from gpuguard.core.records import Gap

if TYPE_CHECKING:
    from io import FileIO
    from pathlib import Path

    from gpuguard.core.events import Event

FILE_BYTES_MAX = 64 * 1024 * 1024

log = structlog.get_logger("gpuguard")


class EventLog:
    """Appends to ``path`` (mode 0640); a full file becomes ``path``.1. A full disk loses events, never the guard.

    Every line is whole: one that the disk takes in part is taken back. How many were lost is the next line, a `Gap`.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._encoder = msgspec.json.Encoder()
        self._stream = _open(path)
        self._lost = 0
        self._last_ns = 0

    def write(self, event: Event) -> None:
        """Write one event as one line."""
        lines = self._encoder.encode(event) + b"\n"
        self._last_ns = event.time_ns
        if self._lost:
            lines = self._loss() + lines
        try:
            self._append(lines)
            self._lost = 0
        except OSError as error:
            if not self._lost:
                log.error("events are not being written", path=str(self._path), reason=str(error))
            self._lost += 1

    def close(self) -> None:
        """Close the file; a loss that no later event told is its last line."""
        if self._lost:
            with contextlib.suppress(OSError):  # still full: it was logged when it began
                self._append(self._loss())
        self._stream.close()

    def _loss(self) -> bytes:
        gap = Gap(time_ns=self._last_ns, sensor="events", reason="events could not be written", lost=self._lost)
        return self._encoder.encode(gap) + b"\n"

    def _append(self, lines: bytes) -> None:
        size = self._stream.seek(0, os.SEEK_END)
        if size + len(lines) > FILE_BYTES_MAX:
            self._rotate()
            size = 0
        try:
            written = self._stream.write(lines)
            if written != len(lines):
                raise OSError(errno.ENOSPC, f"{written} of {len(lines)} bytes written")
        except OSError:
            self._stream.truncate(size)
            raise

    def _rotate(self) -> None:
        with contextlib.suppress(FileNotFoundError):  # moved before, when no new one could be made
            self._path.replace(self._path.with_suffix(self._path.suffix + ".1"))
        fresh = _open(self._path)
        self._stream.close()
        self._stream = fresh


def _open(path: Path) -> FileIO:
    stream = path.open("ab", buffering=0)
    path.chmod(0o640)
    return stream
