"""Blocks to frames and back. Pure; every length is checked, since a recording may come from anyone."""

from __future__ import annotations

import struct
import zlib
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from gpuguard.core.records import LAUNCH, PACKET, SCHEMA_VERSION, Block

if TYPE_CHECKING:
    from collections.abc import Sequence

FRAME_BYTES_MAX = 16 * 1024 * 1024
EXPANDED_BYTES_MAX = 64 * 1024 * 1024
HEADER_BYTES_MAX = 4_096
PREFIX = struct.Struct("<II")

_DTYPES = {"packet": PACKET, "launch": LAUNCH}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class RecordingError(Exception):
    """The bytes are not a recording that this version can read; the message says where and why."""


class _Header(msgspec.Struct):
    format: str
    schema: int


def _encode_rows(rows: object) -> object:
    if not isinstance(rows, np.ndarray):
        message = f"cannot record a {type(rows).__name__}"
        raise NotImplementedError(message)
    flat = np.ascontiguousarray(rows).view(np.uint8).reshape(len(rows), rows.dtype.itemsize)
    return [_NAMES[rows.dtype], len(rows), np.ascontiguousarray(flat.T).tobytes()]


def _decode_rows(kind: type, value: Any) -> np.ndarray:
    if kind is not np.ndarray:
        message = f"cannot read a {kind.__name__}"
        raise NotImplementedError(message)
    if not (isinstance(value, list) and len(value) == 3):  # noqa: PLR2004
        message = "rows must be [dtype, count, bytes]"
        raise ValueError(message)
    name, count, data = value
    dtype = _DTYPES.get(name) if isinstance(name, str) else None
    if dtype is None or not isinstance(data, bytes) or len(data) != count * dtype.itemsize:
        message = f"rows of {name!r}: {count!r} rows do not fit the bytes given"
        raise ValueError(message)
    flat = np.frombuffer(data, np.uint8).reshape(dtype.itemsize, count)
    return np.ascontiguousarray(flat.T).reshape(-1).view(dtype)


_encoder = msgspec.msgpack.Encoder(enc_hook=_encode_rows)
_decoder = msgspec.msgpack.Decoder(list[Block], dec_hook=_decode_rows)


def encode_header() -> bytes:
    """Return the first bytes of a file."""
    return msgspec.json.encode(_Header(format="gpuguard-recording", schema=SCHEMA_VERSION)) + b"\n"


def decode_header(line: bytes) -> None:
    """Check the first line of a file. Raises RecordingError if this version cannot read it."""
    try:
        header = msgspec.json.decode(line, type=_Header)
    except msgspec.MsgspecError as error:
        message = "not a recording: its first line is not a header"
        raise RecordingError(message) from error
    if header.format != "gpuguard-recording" or header.schema != SCHEMA_VERSION:
        message = f"format {header.format!r} schema {header.schema}: this version reads schema {SCHEMA_VERSION}"
        raise RecordingError(message)


def encode_frame(blocks: Sequence[Block]) -> bytes:
    """Return one frame with its prefix."""
    body = zlib.compress(_encoder.encode(blocks), 6)
    return PREFIX.pack(len(body), zlib.crc32(body)) + body


def decode_frame(body: bytes, crc: int) -> list[Block]:
    """Return the blocks of one frame body. Raises RecordingError if it is damaged or not ours."""
    if zlib.crc32(body) != crc:
        message = "the checksum of a frame does not match"
        raise RecordingError(message)
    expand = zlib.decompressobj()
    try:
        expanded = expand.decompress(body, EXPANDED_BYTES_MAX)
        if expand.unconsumed_tail or not expand.eof:
            message = f"a frame expands beyond {EXPANDED_BYTES_MAX} bytes or is not whole"
            raise RecordingError(message)
        return _decoder.decode(expanded)
    except (zlib.error, msgspec.MsgspecError, ValueError) as error:
        message = f"a frame cannot be read: {error}"
        raise RecordingError(message) from error
