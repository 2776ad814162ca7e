"""Packet rows as columns that compress well, and back, exactly.

A packet costs 66 bytes as a row. Most of it repeats: the two ends are few (an index into the distinct ones), time and
sequence numbers move in small steps. Steps of sequence and acknowledgement numbers are taken along each direction of
a conversation, where they are the sizes of the packets before; they wrap at 2**32, and so does their sum.
"""

from __future__ import annotations

import msgspec
import numpy as np

from gpuguard.core.records import PACKET

_ENDS = ["source", "destination", "source_port", "destination_port", "protocol", "ip_version", "packet_type"]
_STEPS = ["sequence", "acknowledgement"]
_PLAIN = ["payload_bytes", "frame_bytes", "tcp_flags"]
_END = np.dtype([(name, PACKET[name]) for name in _ENDS])


class PacketColumns(msgspec.Struct, frozen=True):
    """``count`` packets; every bytes field holds whole columns, high bytes apart from low ones."""

    count: int
    ends: bytes
    which_end: bytes
    time_steps: bytes
    columns: list[bytes]


def to_columns(rows: np.ndarray) -> PacketColumns:
    """Return rows of PACKET as columns."""
    ends = np.zeros(len(rows), _END)
    for name in _ENDS:
        ends[name] = rows[name]
    distinct, which = np.unique(ends.view((np.void, _END.itemsize)), return_inverse=True)
    which = which.reshape(-1).astype(np.uint32)
    order = np.argsort(which, kind="stable")
    steps = [np.diff(rows[name][order], prepend=np.uint32(0)) for name in _STEPS]
    return PacketColumns(
        count=len(rows),
        ends=distinct.tobytes(),
        which_end=_apart(which),
        time_steps=_apart(np.diff(rows["time_ns"], prepend=0)),
        columns=[_apart(column) for column in (*steps, *(rows[name] for name in _PLAIN))],
    )


def from_columns(columns: PacketColumns) -> np.ndarray:
    """Return the rows again. Raises ValueError where the columns do not fit each other."""
    count = columns.count
    if len(columns.ends) % _END.itemsize or len(columns.columns) != len(_STEPS) + len(_PLAIN):
        raise ValueError("packet columns are not whole")
    distinct = np.frombuffer(columns.ends, _END)
    which = _together(columns.which_end, np.dtype("<u4"), count)
    if count and int(which.max(initial=0)) >= len(distinct):
        raise ValueError("a packet names an end that is not there")
    rows = np.zeros(count, PACKET)
    for name in _ENDS:
        rows[name] = distinct[name][which]
    rows["time_ns"] = np.cumsum(_together(columns.time_steps, np.dtype("<i8"), count))
    order = np.argsort(which, kind="stable")
    for name, data in zip(_STEPS, columns.columns, strict=False):
        steps = _together(data, np.dtype("<u4"), count)
        rows[name][order] = np.cumsum(steps, dtype=np.uint32)
    for name, data in zip(_PLAIN, columns.columns[len(_STEPS):], strict=True):
        rows[name] = _together(data, PACKET[name], count)
    return rows


def _apart(column: np.ndarray) -> bytes:
    """Return a column with all first bytes, then all second bytes, and so on."""
    flat = np.ascontiguousarray(column).view(np.uint8).reshape(len(column), column.dtype.itemsize)
    return np.ascontiguousarray(flat.T).tobytes()


def _together(data: bytes, dtype: np.dtype, count: int) -> np.ndarray:
    """Return the column that `_apart` took apart."""
    if count < 0 or len(data) != count * dtype.itemsize:
        raise ValueError(f"a column of {count} values does not fit {len(data)} bytes")
    flat = np.frombuffer(data, np.uint8).reshape(dtype.itemsize, count)
    return np.ascontiguousarray(flat.T).reshape(-1).view(dtype)
