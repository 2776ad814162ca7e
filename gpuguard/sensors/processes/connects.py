"""Who dialled which TCP connection, by the raw tracepoint inet_sock_set_state (ext/bpf/processes.bpf.c).

The list of sockets names who has a socket open when it is read: a connection that is refused is over within a
millisecond, and is on none. Here the kernel says it at the dial itself, in whatever network and pid namespace that was,
and nothing has to be looked up afterwards.

One process is told with some 950 connections a second, and counted beyond that, so that a scan costs little and takes
nobody else's room. Nobody is woken for a connection: the ring is read with the process events, and before each block
of packets.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np

from gpuguard.core.records import CONNECT
from gpuguard.sensors.processes.procfs import boot_ns, ticks_per_s

if TYPE_CHECKING:
    from collections.abc import Iterable

#: Rows taken in one read: more than the ring holds.
ROWS_MAX = 16_384
TCP = 6

#: struct connect
RING_ROW = np.dtype([
    ("time_ns", "<u8"),
    ("start_ns", "<u8"),
    ("lost", "<u8"),
    ("pid", "<u4"),
    ("netns", "<u4"),
    ("dialled", "<u4"),
    ("in_vain", "<u4"),
    ("withheld", "<u4"),
    ("error", "<u2"),
    ("state", "<u2"),
    ("local", "u1", (16,)),
    ("remote", "u1", (16,)),
    ("local_port", "<u2"),
    ("remote_port", "<u2"),
    ("waited_us", "<u4"),
])
#: What a row of CONNECT takes over as it is; the times are by another clock.
_SAME = [name for name in CONNECT.names or () if name in (RING_ROW.names or ()) and name != "time_ns"]
NOTHING = np.zeros(0, CONNECT)


class Connections(Protocol):
    """Where connections come from."""

    def read(self) -> tuple[np.ndarray, int]:
        """Return some rows of CONNECT, and how many were lost since the last call."""
        ...

    def close(self) -> None:
        """Give the handles back."""
        ...


class ConnectRing:
    """The ring as the guard reads it; its descriptor may be closed once this exists."""

    def __init__(self, ring: int, ring_bytes: int) -> None:
        from gpuguard._processes import Ring

        self._ring = Ring(ring, ring_bytes)
        self._lost = 0

    def read(self) -> tuple[np.ndarray, int]:
        """Return some rows of CONNECT, and how many were lost since the last call."""
        records = self._ring.read(ROWS_MAX)
        if not records:
            return NOTHING, 0
        rows, lost = parse_connects(records, boot_ns())
        new = max(0, lost - self._lost)
        self._lost = max(lost, self._lost)
        return rows, new

    def close(self) -> None:
        """Unmap the ring."""
        self._ring.close()


def parse_connects(records: Iterable[bytes], booted_ns: int) -> tuple[np.ndarray, int]:
    """Return the rows of ring records (struct connect), and how many were lost since the ring was made."""
    seen = np.frombuffer(b"".join(one for one in records if len(one) == RING_ROW.itemsize), RING_ROW)
    rows = np.zeros(len(seen), CONNECT)
    rows["time_ns"] = seen["time_ns"].astype(np.int64) + booted_ns
    rows["start_ticks"] = seen["start_ns"] // (1_000_000_000 // ticks_per_s())
    rows["protocol"] = TCP
    for name in _SAME:
        rows[name] = seen[name]
    return rows, int(seen["lost"].max(initial=0))
