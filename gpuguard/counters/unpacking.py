"""A file that is unpacked as it is read, so that no more of it is held at once than is looked at.

A few megabytes of gzip may hold gigabytes: what is refused at its first line must not have been unpacked before.
"""

from __future__ import annotations

import io
import zlib
from typing import TYPE_CHECKING

from gpuguard.counters.table import Unreadable

if TYPE_CHECKING:
    from typing import BinaryIO

    from _typeshed import WriteableBuffer

BYTES_MAX = 2 * 1024**3
MAGIC = b"\x1f\x8b"
GZIP = zlib.MAX_WBITS | 16
#: Packed bytes that are unpacked at once: what is left of them is copied for each of many small members.
PIECE = 16 * 1024


class Unpacked(io.RawIOBase):
    """The bytes of a file, unpacked if it is gzip. ``cut`` says that it ended within a member, once that was met.

    Reading raises Unreadable beyond `BYTES_MAX` bytes, packed or not, and where they are no gzip.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._taken = self._given = 0
        self._ended = False
        self.cut = False
        self._piece = b""
        self._refill()
        self._member = zlib.decompressobj(GZIP) if self._piece.startswith(MAGIC) else None

    def readable(self) -> bool:
        """Say that it is for reading, as `io` asks."""
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        """Fill the whole buffer, or what is left."""
        room, filled = memoryview(buffer).cast("B"), 0
        while filled < len(room) and (some := self._some(len(room) - filled)):
            room[filled:filled + len(some)] = some
            filled += len(some)
        self._given += filled
        self._bound(self._given)
        return filled

    def _some(self, most: int) -> bytes:
        """Return some bytes, at most so many; none at the end."""
        if self._member is None:
            if not self._piece:
                self._refill()
            some, self._piece = self._piece[:most], self._piece[most:]
            return some
        while True:
            if not (self._piece or self._ended):
                self._refill()
            if self._member.eof:
                self._piece = self._piece.lstrip(b"\0")  # tapes are filled up with zeros
                if not self._piece:
                    if self._ended:
                        return b""
                    continue
                self._member = zlib.decompressobj(GZIP)
            try:
                some = self._member.decompress(self._piece, most)
            except zlib.error as error:
                raise Unreadable(str(error)) from error
            self._piece = self._member.unconsumed_tail or self._member.unused_data
            if some:
                return some
            if self._ended and not self._piece:
                self.cut = not self._member.eof  # one that is still written to has no end
                return b""

    def _refill(self) -> None:
        try:
            self._piece = self._file.read(PIECE)
        except OSError as error:
            raise Unreadable(str(error)) from error
        self._ended = not self._piece
        self._taken += len(self._piece)
        self._bound(self._taken)

    @staticmethod
    def _bound(count: int) -> None:
        if count > BYTES_MAX:
            raise Unreadable(f"more than {BYTES_MAX} bytes")
