"""Fatbins: one piece of GPU code in many forms, each packed for itself.

NVIDIA publishes no description; what is read here was found in what nvcc 11.8 to 13.0 writes, and every entry of some
thirty vendor libraries reads so. A header of 16 bytes (magic, u16 version 1, u16 header size, u64 size of the entries),
then entries: u16 kind at 0, u32 header size at 4, u64 payload size at 8, u32 packed size at 16, u32 architecture at 28,
u64 flags at 40, u64 unpacked size at 56. Flag 0x2000: one LZ4 block; 0x8000: one Zstandard frame. The payload may be
padded behind its packed size.
"""

from __future__ import annotations

import struct

import lz4.block
import msgspec
import zstandard

from gpuguard.code.containers.images import IMAGE_BYTES_MAX, Kind, Malformed

MAGIC = b"\x50\xed\x55\xba"
HEADER_BYTES = 16
ENTRY_BYTES_MIN = 64
_ENTRY_BYTES_MAX = 4096
_FLAG_LZ4, _FLAG_ZSTD = 0x2000, 0x8000
_KINDS: dict[int, Kind] = {1: "ptx", 2: "cubin"}


class Entry(msgspec.Struct, frozen=True):
    """The header of one entry."""

    kind: Kind
    arch: str
    header_bytes: int
    payload_bytes: int
    packed_bytes: int
    unpacked_bytes: int
    packing: str  # "", "lz4" or "zstd"


def entries_bytes(header: bytes) -> int | None:
    """Return the size of the entries, or None where these 16 bytes are no header but a chance hit of the magic."""
    magic, version, header_bytes, size = struct.unpack("<4sHHQ", header)
    if magic != MAGIC or version != 1 or header_bytes != HEADER_BYTES:
        return None
    return int(size)


def read_entry(header: bytes) -> Entry:
    """Read the first 64 bytes of an entry. Raise `Malformed` where its sizes cannot be."""
    kind, header_bytes, payload_bytes, packed_bytes = struct.unpack_from("<H2xIQI", header)
    arch, = struct.unpack_from("<I", header, 28)
    flags, = struct.unpack_from("<Q", header, 40)
    unpacked_bytes, = struct.unpack_from("<Q", header, 56)
    if not ENTRY_BYTES_MIN <= header_bytes <= _ENTRY_BYTES_MAX:
        raise Malformed(f"a header of {header_bytes} bytes")
    packing = {0: "", _FLAG_LZ4: "lz4", _FLAG_ZSTD: "zstd"}.get(flags & (_FLAG_LZ4 | _FLAG_ZSTD))
    if packing is None:
        raise Malformed("packed in two ways at once")
    if packing and not 0 < packed_bytes <= payload_bytes:
        raise Malformed(f"{packed_bytes} packed bytes in a payload of {payload_bytes}")
    known: Kind = _KINDS.get(kind, "other")
    name = f"{'compute' if known == 'ptx' else 'sm'}_{arch}"
    return Entry(known, name, header_bytes, payload_bytes, packed_bytes, unpacked_bytes, packing)


def unpack(entry: Entry, payload: bytes) -> bytes:
    """Return the code of an entry, at most as large as it says. Raise `Malformed` where it is not what it says."""
    if not entry.packing:
        return payload
    if not 0 < entry.unpacked_bytes <= IMAGE_BYTES_MAX:
        raise Malformed(f"says that it unpacks to {entry.unpacked_bytes} bytes")
    packed = memoryview(payload)[:entry.packed_bytes]
    unpacked = _lz4(packed, entry.unpacked_bytes) if entry.packing == "lz4" else _zstd(packed, entry.unpacked_bytes)
    if len(unpacked) != entry.unpacked_bytes:
        raise Malformed(f"unpacks to {len(unpacked)} bytes, not to {entry.unpacked_bytes}")
    return unpacked


def _lz4(packed: memoryview, size_max: int) -> bytes:
    try:
        unpacked: bytes = lz4.block.decompress(packed, uncompressed_size=size_max)
    except (lz4.block.LZ4BlockError, ValueError) as error:
        raise Malformed(f"LZ4: {error}") from error
    return unpacked


def _zstd(packed: memoryview, size_max: int) -> bytes:
    """The frame may state a size of its own; the library would allocate it unasked."""
    try:
        stated = zstandard.frame_content_size(packed)
        if stated > size_max:
            raise Malformed(f"a Zstandard frame of {stated} bytes, not of {size_max}")
        return zstandard.ZstdDecompressor().decompress(packed, max_output_size=size_max)
    except zstandard.ZstdError as error:
        raise Malformed(f"Zstandard: {error}") from error
