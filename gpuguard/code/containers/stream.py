"""A forward-only view of bytes that come from anywhere: a file, a member of an archive, an unpacker, a memory.

Everything is read through this, a megabyte at a time, so that a library of two gigabytes costs no more memory than its
largest image. Nothing is ever read twice; whoever takes bytes and cannot make sense of them searches what he took.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from gpuguard.code.containers.images import Malformed

if TYPE_CHECKING:
    from collections.abc import Callable

CHUNK_BYTES = 1 << 20


class File(Protocol):
    """What is read: of an open file these four; a memory or an unpacker is not seekable."""

    def read(self, size: int = ..., /) -> bytes | None:
        """Return up to ``size`` bytes, none at the end."""

    def tell(self) -> int:
        """Return how far we are."""

    def seek(self, offset: int, whence: int = ..., /) -> int:
        """Go elsewhere."""

    def seekable(self) -> bool:
        """Return whether `seek` can be called."""


class Stream:
    """Bytes from ``read``, which returns at most as many as asked and b"" at the end."""

    def __init__(self, read: Callable[[int], bytes]) -> None:
        self.offset = 0
        self._read = read
        self._buffer = b""
        self._at = 0
        self._ended = False
        # Where each needle was last found, and up to where it was sought: no byte is searched twice for one needle,
        # else a file that repeats one needle would make the search for the others quadratic.
        self._hits: dict[bytes, tuple[int, int]] = {}

    def peek(self, count: int) -> bytes:
        """Return the next ``count`` bytes without taking them; fewer only at the end."""
        self._fill(count)
        return self._buffer[self._at:self._at + count]

    def take(self, count: int) -> bytes:
        """Return the next ``count`` bytes. Raise `Malformed` if there are fewer; they are then still there."""
        self._fill(count)
        if len(self._buffer) - self._at < count:
            raise Malformed(f"ends {count - (len(self._buffer) - self._at)} bytes early")
        taken = self._buffer[self._at:self._at + count]
        self._advance(count)
        return taken

    def read(self, count: int) -> bytes:
        """Return up to ``count`` bytes, b"" at the end: what other readers call."""
        if self._at == len(self._buffer):
            self._fill(1)
        taken = self._buffer[self._at:self._at + count]
        self._advance(len(taken))
        return taken

    def skip(self, count: int) -> int:
        """Pass over up to ``count`` bytes; return how many there were."""
        left = count
        while left:
            passed = len(self.read(min(left, CHUNK_BYTES)))
            if not passed:
                break
            left -= passed
        return count - left

    def seek_to(self, needles: tuple[bytes, ...]) -> bytes | None:
        """Advance to the next of the needles and return it; at the end None."""
        longest = max(map(len, needles))
        while True:
            found = [(at, needle) for needle in needles if (at := self._find(needle)) >= 0]
            if found:
                at, needle = min(found)
                self._advance(at - self.offset)
                return needle
            left = len(self._buffer) - self._at
            self._advance(max(0, left - longest + 1))
            if self._ended:
                self._advance(len(self._buffer) - self._at)
                return None
            self._fill(longest + CHUNK_BYTES // 2)

    def _find(self, needle: bytes) -> int:
        """Return where in the whole the needle is next in the buffer, -1 if it is not."""
        at, sought = self._hits.get(needle, (-1, 0))
        if at >= self.offset:
            return at
        base = self.offset - self._at
        found = self._buffer.find(needle, max(self.offset, sought) - base)
        if found >= 0:
            self._hits[needle] = (base + found, base + found)
            return base + found
        self._hits[needle] = (-1, max(self.offset, base + len(self._buffer) - len(needle) + 1))
        return -1

    def _advance(self, count: int) -> None:
        self._at += count
        self.offset += count

    def _fill(self, count: int) -> None:
        """Have ``count`` bytes in the buffer if there are as many."""
        held = len(self._buffer) - self._at
        if held >= count or self._ended:
            return
        parts = [self._buffer[self._at:]]
        while held < count:
            part = self._read(max(CHUNK_BYTES, min(count - held, 16 * CHUNK_BYTES)))
            if not part:
                self._ended = True
                break
            parts.append(part)
            held += len(part)
        self._buffer = b"".join(parts)
        self._at = 0
