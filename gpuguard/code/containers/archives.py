"""Archives and packed files, read forward, member by member; nothing is ever written and no name is ever opened.

tar (POSIX.1-2017 ustar and pax, GNU long names), ar (SysV and BSD names), zip (PKWARE APPNOTE 6.3.10, through the
standard library, which needs to seek), and gzip, xz, bzip2 and Zstandard around anything. An image of a container is a
tar of layers that are tars, packed or not, so the OCI and docker layouts need no reader of their own: what a layer is
called is not needed to read it.
"""

from __future__ import annotations

import bz2
import io
import lzma
import struct
import zipfile
import zlib
from typing import TYPE_CHECKING, cast

import msgspec
import zstandard

from gpuguard.code.containers.images import Budget, Malformed, printable
from gpuguard.code.containers.stream import Stream

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import IO

    from gpuguard.code.containers.stream import File

#: A zip inside another archive is read whole, since its table of contents comes last.
NESTED_ZIP_BYTES_MAX = 128 << 20
ZIP_MEMBERS_MAX = 200_000
_LONG_NAME_BYTES_MAX = 1 << 20
_LZMA_MEMORY_MAX = 128 << 20
_ZSTD_WINDOW_MAX = 128 << 20
_UNPACKED_CHUNK = 1 << 20
_PACKED_PIECE, _ZSTD_PIECE = 1 << 16, 1 << 9
_BLOCK = 512
# What zipfile lets through of what its modules raise on bytes that they did not expect.
_ZIP_ERRORS = (zipfile.BadZipFile, struct.error, ValueError, OSError, EOFError, IndexError, KeyError, OverflowError)
_AR_MAGIC, _AR_HEADER = b"!<arch>\n", 60
HEAD_BYTES = 265

_PACKED = {b"\x1f\x8b\x08": "gzip", b"\xfd7zXZ\0": "xz", b"BZh": "bzip2", b"\x28\xb5\x2f\xfd": "zstd"}


class Member(msgspec.Struct):
    """A file in an archive: ``stream`` ends where it ends. ``size_bytes`` is None where the archive does not say."""

    name: str
    size_bytes: int | None
    stream: Stream


class Unread(Exception):
    """A member or archive that this reader does not open; the text says why."""


# Unpack these bytes to at most so many; and whether the frame is over, and what followed it.
_Unpack = tuple["Callable[[bytes, int], bytes]", "Callable[[], tuple[bool, bytes]]"]


def kind_of(head: bytes) -> str:
    """Return "tar", "ar", "zip", "gzip", "xz", "bzip2" or "zstd" by the first 265 bytes; "" if it is none."""
    for magic, name in _PACKED.items():
        if head.startswith(magic):
            return name
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return "zip"
    if head.startswith(_AR_MAGIC):
        return "ar"
    return "tar" if head[257:262] == b"ustar" else ""


def head_of(stream: Stream) -> bytes:
    """Return what `kind_of` wants to see."""
    return stream.peek(HEAD_BYTES)


# -- packed files -----------------------------------------------------------------------------------------------------


def unpacked(kind: str, stream: Stream, budget: Budget) -> Stream:
    """Return the unpacked bytes of a packed stream. Reading it raises `Malformed` or `Exhausted`."""
    make = {"gzip": _gzip, "xz": _xz, "bzip2": _bzip2, "zstd": _zstd}[kind]
    frames = _Frames(stream, make, _ZSTD_PIECE if kind == "zstd" else _PACKED_PIECE)
    return Stream(_counted(_named(kind, frames.read), budget))


def _gzip() -> _Unpack:
    one = zlib.decompressobj(wbits=31)
    return (lambda packed, limit: one.decompress(one.unconsumed_tail + packed, limit)), (
        lambda: (one.eof, one.unused_data))


def _xz() -> _Unpack:
    one = lzma.LZMADecompressor(memlimit=_LZMA_MEMORY_MAX)
    return one.decompress, lambda: (one.eof, one.unused_data)


def _bzip2() -> _Unpack:
    one = bz2.BZ2Decompressor()
    return one.decompress, lambda: (one.eof, one.unused_data)


def _zstd() -> _Unpack:
    """Return one that takes no limit, and is therefore given small pieces.

    A block of 3 bytes or more makes at most 128 KiB (RFC 8878, section 3.1.1.2).
    """
    one = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW_MAX).decompressobj()
    return (lambda packed, _: one.decompress(packed) if packed else b""), lambda: (one.eof, one.unused_data)


class _Frames:
    """Reads one packed frame after the other; what follows the last one is padding or rubbish and ends the reading."""

    def __init__(self, stream: Stream, make: Callable[[], _Unpack], piece: int) -> None:
        self._stream = stream
        self._piece = piece
        self._make = make
        self._unpack, self._state = make()
        self._waiting = b""
        self._ended = False

    def read(self, count: int) -> bytes:
        """Return up to ``count`` unpacked bytes, b"" at the end."""
        while not self._ended:
            got = self._unpack(self._waiting, count)
            self._waiting = b""
            done, rest = self._state()
            if done:
                self._next(rest)
            elif not got:
                self._waiting = self._stream.read(self._piece)
                if not self._waiting:
                    raise Malformed("ends in the middle of its packed data")
            if got:
                return got
        return b""

    def _next(self, rest: bytes) -> None:
        """Begin the next frame if one follows."""
        self._waiting = (rest or self._stream.read(self._piece)).lstrip(b"\0")
        self._ended = not any(self._waiting.startswith(magic[:len(self._waiting)] or b"-") for magic in _PACKED)
        self._unpack, self._state = self._make()


def _named(kind: str, read: Callable[[int], bytes]) -> Callable[[int], bytes]:
    """Give the errors of the libraries one name."""

    def reading(count: int) -> bytes:
        try:
            return read(count)
        except (zlib.error, lzma.LZMAError, OSError, EOFError, zstandard.ZstdError, ValueError) as error:
            if isinstance(error, Malformed):
                raise
            raise Malformed(f"{kind}: {error}") from error

    return reading


def _counted(read: Callable[[int], bytes], budget: Budget) -> Callable[[int], bytes]:
    def reading(count: int) -> bytes:
        part = read(min(count, _UNPACKED_CHUNK))
        budget.expand(len(part))
        return part

    return reading


# -- archives ---------------------------------------------------------------------------------------------------------


def _bounded(stream: Stream, size: int) -> Stream:
    """Return the next ``size`` bytes of a stream as a stream of their own."""
    left = size

    def read(count: int) -> bytes:
        nonlocal left
        part = stream.read(min(count, left))
        left -= len(part)
        return part

    return Stream(read)


def members(kind: str, stream: Stream, file: File | None, budget: Budget) -> Iterator[Member | Unread]:
    """Yield the members of an archive; each must be read before the next is asked for.

    Raises `Malformed`. ``file`` is what the stream reads, where it can seek.
    """
    if kind == "tar":
        yield from _tar(stream)
    elif kind == "ar":
        yield from _ar(stream)
    else:
        yield from _zip(stream, file, budget)


def _tar(stream: Stream) -> Iterator[Member]:
    name, size = "", None
    while True:
        block = stream.peek(_BLOCK)
        if not block.strip(b"\0"):
            return  # the end, or the padding behind it
        block = stream.take(_BLOCK)
        if sum(block) - sum(block[148:156]) + 8 * 0x20 != _tar_number(block[148:156]):
            raise Malformed("a tar header with a wrong sum")
        kind = block[156:157]
        length = _tar_number(block[124:136])
        if kind in b"Lx" and kind:
            note = stream.take(_limited(length))
            stream.skip(-length % _BLOCK)
            name, size = (printable(note.rstrip(b"\0")), size) if kind == b"L" else _pax(note, name, size)
            continue
        length = size if size is not None else length
        end = stream.offset + length + -length % _BLOCK
        if kind in b"07" or kind == b"\0":
            yield Member(name or _tar_name(block), length, _bounded(stream, length))
        _pass_to(stream, end - -length % _BLOCK)
        stream.skip(-length % _BLOCK)
        name, size = "", None


def _pass_to(stream: Stream, end: int) -> None:
    """Pass over what nobody read of a member."""
    left = end - stream.offset
    if stream.skip(max(0, left)) < left:
        raise Malformed("ends within a member")


def _limited(length: int) -> int:
    if length > _LONG_NAME_BYTES_MAX:
        raise Malformed(f"a tar note of {length} bytes")
    return length


def _tar_number(field: bytes) -> int:
    """Octal text, or with the top bit set a big-endian number (GNU)."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    try:
        number = int(field.strip(b" \0") or b"0", 8)
    except ValueError as error:
        raise Malformed("a tar number that is none") from error
    if number < 0:
        raise Malformed("a tar number below zero")
    return number


def _tar_name(block: bytes) -> str:
    prefix = block[345:500].partition(b"\0")[0] if block[257:263] == b"ustar\0" else b""
    name = block[:100].partition(b"\0")[0]
    return printable(prefix + b"/" + name if prefix else name)


def _pax(note: bytes, name: str, size: int | None) -> tuple[str, int | None]:
    """Read "LENGTH KEY=VALUE\\n" records; only path and size matter."""
    while note:
        length, _, rest = note.partition(b" ")
        if not length.isdigit() or len(length) > 8 or not len(length) + 1 < int(length) <= len(note):
            raise Malformed("a pax record that does not add up")
        key, _, value = rest[:int(length) - len(length) - 1].rstrip(b"\n").partition(b"=")
        if key == b"path":
            name = printable(value)
        elif key == b"size":
            if not value.isdigit() or len(value) > 20:
                raise Malformed("a pax size that is none")
            size = int(value)
        note = note[int(length):]
    return name, size


def _ar(stream: Stream) -> Iterator[Member]:
    stream.take(len(_AR_MAGIC))
    names = b""
    while header := stream.peek(_AR_HEADER):
        header = stream.take(_AR_HEADER)
        length = header[48:58].strip()
        if header[58:60] != b"`\n" or not length.isdigit():
            raise Malformed("an ar header that is none")
        size = int(length)
        end = stream.offset + size + size % 2
        name = header[:16].rstrip()
        if name == b"//":
            names = stream.take(_limited(size))
        elif name not in (b"/", b"/SYM64/"):
            shown = _ar_name(name, names, stream, size)
            left = end - size % 2 - stream.offset
            yield Member(shown, left, _bounded(stream, left))
        _pass_to(stream, end - size % 2)
        stream.skip(size % 2)


def _ar_name(name: bytes, names: bytes, stream: Stream, size: int) -> str:
    if name.startswith(b"/") and name[1:].isdigit():
        at = int(name[1:])
        return printable(names[at:at + 4096].partition(b"/\n")[0])
    if name.startswith(b"#1/") and name[3:].isdigit() and int(name[3:]) <= min(size, 4096):
        return printable(stream.take(int(name[3:])).rstrip(b"\0"))
    return printable(name.rstrip(b"/"))


def _zip(stream: Stream, file: File | None, budget: Budget) -> Iterator[Member | Unread]:
    if file is None:
        # One byte more tells whether it is too much.
        content = stream.peek(NESTED_ZIP_BYTES_MAX + 1)
        if len(content) > NESTED_ZIP_BYTES_MAX:
            raise Unread(f"a zip of more than {NESTED_ZIP_BYTES_MAX >> 20} MB inside another archive")
        file = io.BytesIO(content)
    try:
        archive = zipfile.ZipFile(cast("IO[bytes]", file))
        entries = archive.infolist()
    except (*_ZIP_ERRORS, NotImplementedError) as error:
        raise Malformed(f"zip: {error}") from error
    if len(entries) > ZIP_MEMBERS_MAX:
        raise Unread(f"a zip of {len(entries)} members")
    for entry in entries:
        if not entry.filename.endswith("/"):
            yield _zip_member(archive, entry, budget)


def _zip_member(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, budget: Budget) -> Member | Unread:
    name = printable(entry.filename)
    if entry.flag_bits & 0x1:
        return Unread(f"{name} is encrypted")
    try:
        member = archive.open(entry)
    except NotImplementedError as error:
        return Unread(f"{name}: {error}")
    except (*_ZIP_ERRORS, RuntimeError) as error:
        return Unread(f"{name}: {error}")

    def read(count: int) -> bytes:
        try:
            return member.read(count)
        except (*_ZIP_ERRORS, zlib.error, lzma.LZMAError) as error:
            raise Malformed(f"zip: {error}") from error

    return Member(name, entry.file_size, Stream(_counted(read, budget)))
