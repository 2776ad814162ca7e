"""Finds GPU code in anything: walks archives, and searches every other byte for the marks of fatbins, cubins and PTX.

Nothing is taken on trust: a host library's own table of sections is not asked where its fatbins lie, the whole file is
searched, since a program may keep its code anywhere and register it itself. What was taken for an image and cannot be
read is searched again from its second byte on, so that a false header hides nothing behind it.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from gpuguard.code.containers import archives, elf, fatbin, ptx
from gpuguard.code.containers.images import (
    IMAGE_BYTES_MAX,
    PTX_BYTES_MAX,
    Budget,
    Exhausted,
    Flaw,
    Image,
    Malformed,
    make_image,
)
from gpuguard.code.containers.stream import Stream

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from gpuguard.code.containers.stream import File

_NEEDLES = (fatbin.MAGIC, elf.MAGIC, ptx.NEEDLE)
_HEAD_BYTES = 2048
_FATBIN_BYTES_MAX = 1 << 36
Found = Image | Flaw


def holds_nothing(content: bytes) -> bool:
    """Return whether there is nothing to read in a file of this content: it is no archive, and has no mark of code."""
    return not archives.kind_of(content[:archives.HEAD_BYTES]) and not any(one in content for one in _NEEDLES)


class _Place:
    """Where we are: shown in every image and flaw."""

    def __init__(self, path: str, container: str, depth: int, budget: Budget) -> None:
        self.path = path
        self.container = container
        self.depth = depth
        self.budget = budget

    def within(self, container: str, member: str = "") -> _Place:
        return _Place(f"{self.path}!/{member}" if member else self.path, _joined(self.container, container),
                      self.depth + 1, self.budget)

    def turn(self, make: Callable[[], Found]) -> Iterator[Found]:
        """Yield what is made, if it falls to us: of several readers of one file each reads its share."""
        self.budget.image()
        if self.budget.falls_to_us():
            yield make()

    def complain(self, offset: int, reason: str, *, container: str = "", unread: bool = False) -> Iterator[Found]:
        """Yield a flaw, if it falls to us."""
        yield from self.turn(lambda: self.flaw(offset, reason, container=container, unread=unread))

    def image(self, container: str, offset: int, kind: str, arch: str, data: bytes) -> Image:
        return make_image(self.path, _joined(self.container, container), offset, kind, arch, data)  # type: ignore[arg-type]

    def flaw(self, offset: int, reason: str, *, container: str = "", unread: bool = False) -> Flaw:
        return Flaw(self.path, _joined(self.container, container), offset, "unread" if unread else "malformed", reason)


def _joined(*parts: str) -> str:
    return "/".join(part for part in parts if part)


def find_images(source: File | bytes, path: str, budget: Budget | None = None) -> Iterator[Found]:
    """Yield all GPU code in a file, and what could not be read, in the order of the file.

    Memory is bounded by the largest image; no file is opened and none is written. Never raises for what the bytes are.
    """
    if isinstance(source, bytes):
        size, source = len(source), io.BytesIO(source)
    elif source.seekable():
        size = source.seek(0, io.SEEK_END)
        source.seek(0)
    else:
        size = 0
    place = _Place(path, "", 0, budget or Budget(size))
    stream = Stream(_reading(source))
    try:
        yield from _any(stream, source if source.seekable() else None, place)
    except Exhausted as error:
        yield place.flaw(0, str(error))
    except MemoryError:
        yield place.flaw(0, "needs more memory than reading is given", unread=True)


def _reading(file: File) -> Callable[[int], bytes]:
    return lambda count: file.read(count) or b""


def _any(stream: Stream, file: File | None, place: _Place) -> Iterator[Found]:
    """Read a file or member: an archive by its members, all else by search."""
    kind = archives.kind_of(archives.head_of(stream))
    if kind and place.depth >= place.budget.depth_max:
        yield from place.complain(stream.offset, f"more than {place.budget.depth_max} archives in one another",
                                  unread=True)
        return
    at = stream.offset
    try:
        if kind in ("gzip", "xz", "bzip2", "zstd"):
            yield from _any(archives.unpacked(kind, stream, place.budget), None, place.within(kind))
            return
        if kind:
            yield from _members(kind, stream, file, place)
        else:
            yield from _search(stream, place)
    except Malformed as error:
        yield from place.complain(at, str(error), container=kind)
        yield from _rest(stream, place)
    except archives.Unread as error:
        yield from place.complain(at, str(error), container=kind, unread=True)


def _rest(stream: Stream, place: _Place) -> Iterator[Found]:
    """Search what is left of a file whose form broke; where even reading fails, that was said already."""
    try:
        yield from _search(stream, place)
    except Malformed:
        return


def _members(kind: str, stream: Stream, file: File | None, place: _Place) -> Iterator[Found]:
    for member in archives.members(kind, stream, file, place.budget):
        if isinstance(member, archives.Unread):
            yield from place.complain(stream.offset, str(member), container=kind, unread=True)
        else:
            yield from _any(member.stream, None, place.within(kind, member.name))


def _search(stream: Stream, place: _Place) -> Iterator[Found]:
    """Yield what lies in these bytes, whatever they are."""
    readers = {fatbin.MAGIC: _fatbin, elf.MAGIC: _cubin, ptx.NEEDLE: _ptx}
    while needle := stream.seek_to(_NEEDLES):
        yield from readers[needle](stream, place)


def _inner(data: bytes, offset: int, place: _Place) -> Iterator[Found]:
    """Search bytes that were taken for something else, from the second on."""
    stream = Stream(io.BytesIO(data).read)
    stream.skip(1)
    for one in _search(stream, place):
        yield _moved(one, offset)


def _moved(one: Found, offset: int) -> Found:
    if isinstance(one, Image):
        return Image(one.path, one.container, one.offset + offset, one.kind, one.arch, one.sha256, one.data)
    return Flaw(one.path, one.container, one.offset + offset, one.kind, one.reason)


def _fatbin(stream: Stream, place: _Place) -> Iterator[Found]:
    header = stream.peek(fatbin.HEADER_BYTES)
    left = fatbin.entries_bytes(header) if len(header) == fatbin.HEADER_BYTES else None
    if left is None:
        stream.skip(1)
        return
    stream.skip(fatbin.HEADER_BYTES)
    found = False
    while left > 0:
        at = stream.offset
        try:
            entry = fatbin.read_entry(stream.peek(fatbin.ENTRY_BYTES_MIN).ljust(fatbin.ENTRY_BYTES_MIN, b"\0"))
            if entry.header_bytes + entry.payload_bytes > left:
                raise Malformed("an entry that reaches beyond its fatbin")
            if entry.payload_bytes > IMAGE_BYTES_MAX:
                reason = f"an entry of {entry.payload_bytes} bytes"
                yield from place.complain(at, reason, container="fatbin", unread=True)
                return
            stream.take(entry.header_bytes)
            payload = stream.take(entry.payload_bytes)
        except Malformed as error:
            # The magic and the version also stand as constants in programs that make fatbins; no size follows there.
            if left <= _FATBIN_BYTES_MAX or found:
                yield from place.complain(at, str(error), container="fatbin")
            return  # the search goes on from here
        found = True
        left -= entry.header_bytes + entry.payload_bytes
        yield from _payload(entry, payload, at, place)


def _hidden(payload: bytes, offset: int, place: _Place) -> Iterator[Found]:
    if payload.find(fatbin.MAGIC, 1) >= 0 or payload.find(elf.MAGIC, 1) >= 0:
        yield from _inner(payload, offset, place)


def _payload(entry: fatbin.Entry, payload: bytes, at: int, place: _Place) -> Iterator[Found]:
    if entry.kind == "other":
        # Intermediate code for link-time optimisation: encrypted, and of no GPU's; what is made of it is loaded later.
        yield from place.turn(lambda: place.image("fatbin", at, "other", entry.arch, payload))
        yield from _hidden(payload, at + entry.header_bytes, place)
        return
    yield from place.turn(lambda: _unpacked(entry, payload, at, place))
    yield from _hidden(payload, at + entry.header_bytes, place)


def _unpacked(entry: fatbin.Entry, payload: bytes, at: int, place: _Place) -> Found:
    container = _joined("fatbin", entry.packing)
    if entry.unpacked_bytes > IMAGE_BYTES_MAX and entry.packing:
        reason = f"an entry that unpacks to {entry.unpacked_bytes} bytes"
        return place.flaw(at, reason, container=container, unread=True)
    try:
        data = fatbin.unpack(entry, payload)
    except Malformed as error:
        return place.flaw(at, str(error), container=container)
    if entry.packing:
        place.budget.expand(len(data))
    return place.image(container, at, entry.kind, entry.arch, data)


def _cubin(stream: Stream, place: _Place) -> Iterator[Found]:
    """A cubin on its own: its size follows from its headers."""
    head = stream.peek(elf.HEADER_BYTES)
    if not elf.is_cubin(head):
        stream.skip(1)
        return
    at, data = stream.offset, b""
    try:
        size = elf.tables_end(head)
        if size <= IMAGE_BYTES_MAX:
            data = stream.take(size)
            whole = elf.extent(data)
            data += stream.take(whole - size) if whole <= IMAGE_BYTES_MAX else b""
            size = whole
        if size > IMAGE_BYTES_MAX:
            yield from place.complain(at, f"a cubin of {size} bytes", unread=True)
        else:
            arch = f"sm_{elf.read_cubin(data).sm}"
            yield from place.turn(lambda: place.image("cubin", at, "cubin", arch, data))
            return
    except Malformed as error:
        yield from place.complain(at, str(error), container="cubin")
    if data:
        yield from _inner(data, at, place)
    else:
        stream.skip(1)


def _ptx(stream: Stream, place: _Place) -> Iterator[Found]:
    arch = ptx.architecture(stream.peek(_HEAD_BYTES))
    if not arch:
        stream.skip(1)
        return
    at = stream.offset
    size = _text_size(stream)
    if size > PTX_BYTES_MAX:
        yield from place.complain(at, f"PTX of more than {PTX_BYTES_MAX >> 20} MB", unread=True)
        stream.skip(1)
        return
    data = stream.take(size)
    yield from place.turn(lambda: place.image("ptx", at, "ptx", arch, data))


def _text_size(stream: Stream) -> int:
    """Return how long the text is, looking twice as far each time."""
    look = 1 << 16
    while True:
        data = stream.peek(look)
        size = ptx.text_extent(data)
        if size < len(data) or len(data) < look or size > PTX_BYTES_MAX:
            return size
        look *= 2
