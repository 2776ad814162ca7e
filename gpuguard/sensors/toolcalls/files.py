"""Files of lines, followed as ``tail -F`` does: what was there before is not read, a rotated or truncated one anew."""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

LINE_BYTES_MAX = 64 * 1024
FILE_BYTES_PER_READ = 1024 * 1024


class Follower:
    """Reads the lines that are appended to a file, also when it is truncated, or replaced by another of its name.

    ``trouble`` says why it cannot be read now, "" if it can.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.trouble = ""
        self._rest = b""
        self._skips = False
        self._descriptor = self._open()
        if self._descriptor is not None:
            os.lseek(self._descriptor, 0, os.SEEK_END)

    def lines(self) -> tuple[list[bytes], int]:
        """Return the whole lines since the last call, and how many were too long to be kept."""
        if self._descriptor is None:
            self._descriptor = self._open()
        if self._descriptor is None:
            return [], 0
        try:
            return self._split(self._read(self._descriptor))
        except OSError as error:
            self.trouble = str(error.strerror)
            self.close()
            return [], 0

    def close(self) -> None:
        """Close the file."""
        if self._descriptor is not None:
            os.close(self._descriptor)
        self._descriptor = None

    def _read(self, descriptor: int) -> bytes:
        status = os.fstat(descriptor)
        if os.lseek(descriptor, 0, os.SEEK_CUR) > status.st_size:
            os.lseek(descriptor, 0, os.SEEK_SET)
            self._rest, self._skips = b"", False
        data = os.read(descriptor, FILE_BYTES_PER_READ)
        if data or not self._was_replaced(status):
            return data
        self.close()
        self._descriptor = self._open()
        self._rest, self._skips = b"", False
        return os.read(self._descriptor, FILE_BYTES_PER_READ) if self._descriptor is not None else b""

    def _split(self, data: bytes) -> tuple[list[bytes], int]:
        *whole, self._rest = (self._rest + data).split(b"\n")
        too_long = 0
        if whole and self._skips:
            whole, self._skips = whole[1:], False
        if len(self._rest) > LINE_BYTES_MAX:
            too_long += not self._skips
            self._rest, self._skips = b"", True
        kept = [line for line in whole if len(line) <= LINE_BYTES_MAX]
        too_long += len(whole) - len(kept)
        return [line for line in kept if line.strip()], too_long

    def _open(self) -> int | None:
        try:
            # O_NONBLOCK: a FIFO of this name must not hold the guard up.
            descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            self.trouble = str(error.strerror)
            return None
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            self.trouble = "Not a regular file"
            return None
        self.trouble = ""
        return descriptor

    def _was_replaced(self, open_status: os.stat_result) -> bool:
        try:
            there = self.path.stat()
        except OSError:
            return False
        return (there.st_dev, there.st_ino) != (open_status.st_dev, open_status.st_ino)
