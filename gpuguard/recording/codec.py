"""Blocks to frames and back. Pure; every length is checked, since a recording may come from anyone."""

from __future__ import annotations

import struct
import zlib
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from gpuguard.core.flows import CARRIERS
from gpuguard.core.records import CONNECT, LAUNCH, PACKET, SCHEMA_VERSION, Block, Connects, Launches, Packets
from gpuguard.recording.columns import PacketColumns, from_columns, to_columns

if TYPE_CHECKING:
    from collections.abc import Sequence

FRAME_BYTES_MAX = 16 * 1024 * 1024
LAUNCHES_MAX = 1 << 40
EXPANDED_BYTES_MAX = 64 * 1024 * 1024
HEADER_BYTES_MAX = 4_096
PREFIX = struct.Struct("<II")


class RecordingError(Exception):
    """The bytes are not a recording that this version can read; the message says where and why."""


class _Header(msgspec.Struct):
    format: str
    schema: int


class _Frame(msgspec.Struct):
    """The rows of all `Packets` of a frame lie together in ``packets``; ``counts`` says how many belong to each."""

    blocks: list[Block]
    counts: list[int]
    packets: PacketColumns | None


def _encode_rows(rows: object) -> object:
    """Rows as they are; packet rows went into the frame's columns."""
    if not isinstance(rows, np.ndarray):
        raise NotImplementedError(f"cannot record a {type(rows).__name__}")
    return b"" if rows.dtype == PACKET else rows.tobytes()


def _decode_rows(kind: type, value: Any) -> np.ndarray:
    """Bytes as they are: what rows they hold is known from their block."""
    if kind is not np.ndarray or not isinstance(value, bytes):
        raise ValueError(f"cannot read a {kind.__name__} from a {type(value).__name__}")
    return np.frombuffer(value, np.uint8)


_encoder = msgspec.msgpack.Encoder(enc_hook=_encode_rows)
_decoder = msgspec.msgpack.Decoder(_Frame, dec_hook=_decode_rows)


def encode_header() -> bytes:
    """Return the first bytes of a file."""
    return msgspec.json.encode(_Header(format="gpuguard-recording", schema=SCHEMA_VERSION)) + b"\n"


def decode_header(line: bytes) -> None:
    """Check the first line of a file. Raises RecordingError if this version cannot read it."""
    try:
        header = msgspec.json.decode(line, type=_Header)
    except msgspec.MsgspecError as error:
        raise RecordingError("not a recording: its first line is not a header") from error
    if header.format != "gpuguard-recording" or header.schema != SCHEMA_VERSION:
        message = f"format {header.format!r} schema {header.schema}: this version reads schema {SCHEMA_VERSION}"
        raise RecordingError(message)


def encode_frame(blocks: Sequence[Block]) -> bytes:
    """Return one frame with its prefix."""
    rows = [block.rows for block in blocks if isinstance(block, Packets)]
    frame = _Frame(
        blocks=list(blocks),
        counts=[len(part) for part in rows],
        packets=to_columns(np.concatenate(rows)) if rows else None,
    )
    body = zlib.compress(_encoder.encode(frame), 6)
    return PREFIX.pack(len(body), zlib.crc32(body)) + body


def decode_frame(body: bytes, crc: int) -> list[Block]:
    """Return the blocks of one frame body. Raises RecordingError if it is damaged or not ours."""
    if zlib.crc32(body) != crc:
        raise RecordingError("the checksum of a frame does not match")
    try:
        return _with_rows(_decoder.decode(_expand(body)))
    except (zlib.error, msgspec.MsgspecError, ValueError) as error:
        raise RecordingError(f"a frame cannot be read: {error}") from error


def _expand(body: bytes) -> bytes:
    expand = zlib.decompressobj()
    expanded = expand.decompress(body, EXPANDED_BYTES_MAX)
    if expand.unconsumed_tail or not expand.eof:
        raise RecordingError(f"a frame expands beyond {EXPANDED_BYTES_MAX} bytes or is not whole")
    return expanded


def _with_rows(frame: _Frame) -> list[Block]:
    """Return the blocks, each with its own rows again."""
    for block in frame.blocks:
        if isinstance(block, Launches | Connects):
            block.rows = block.rows.view(LAUNCH if isinstance(block, Launches) else CONNECT).copy()
        if isinstance(block, Launches) and (block.rows["launches"] >= LAUNCHES_MAX).any():
            raise ValueError("more launches than a process can make between two blocks")
    takers = [block for block in frame.blocks if isinstance(block, Packets)]
    rows = from_columns(frame.packets) if frame.packets else np.zeros(0, PACKET)
    if len(takers) != len(frame.counts) or sum(frame.counts) != len(rows) or min(frame.counts, default=0) < 0:
        raise ValueError("packet rows do not fit the blocks")
    for block, part in zip(takers, np.split(rows, np.cumsum(frame.counts)[:-1]) if takers else (), strict=True):
        if any(not 0 <= fact.row < len(part) for fact in block.facts):
            raise ValueError("a fact names a packet that is not there")
        if not 0 <= block.netns < 1 << 32 or (part["ip_version"] >> 4 >= len(CARRIERS)).any():
            raise ValueError("packets of no namespace, or of no protocol")
        block.rows = part
    return frame.blocks
