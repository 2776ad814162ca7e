"""Events as JSON lines, one `core.events` object each: what other programs follow, and what reports are made of."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import structlog

if TYPE_CHECKING:
    from pathlib import Path

    from gpuguard.core.events import Event

FILE_BYTES_MAX = 64 * 1024 * 1024

log = structlog.get_logger("gpuguard")


class EventLog:
    """Appends to ``path`` (mode 0640); a full file becomes ``path``.1. A full disk loses events, never the guard."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._encoder = msgspec.json.Encoder()
        self._stream = path.open("ab", buffering=0)
        path.chmod(0o640)
        self._failing = False

    def write(self, event: Event) -> None:
        """Write one event as one line."""
        line = self._encoder.encode(event) + b"\n"
        try:
            if self._stream.tell() + len(line) > FILE_BYTES_MAX:
                self._rotate()
            self._stream.write(line)
            self._failing = False
        except OSError as error:
            if not self._failing:
                log.error("events are not being written", path=str(self._path), reason=str(error))
            self._failing = True

    def close(self) -> None:
        """Close the file."""
        self._stream.close()

    def _rotate(self) -> None:
        self._stream.close()
        self._path.replace(self._path.with_suffix(self._path.suffix + ".1"))
        self._stream = self._path.open("ab", buffering=0)
        self._path.chmod(0o640)
