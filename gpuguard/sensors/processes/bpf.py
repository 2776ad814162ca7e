"""Process events by raw tracepoints at fork, exec and exit (ext/bpf/processes.bpf.c): start times and arguments."""

from __future__ import annotations

import os
import select
import struct
from pathlib import Path
from typing import TYPE_CHECKING

from gpuguard.messages import Opened
from gpuguard.redaction import printable
from gpuguard.sensors.processes.events import EVENTS_MAX, Event, Kind
from gpuguard.sensors.processes.procfs import boot_ns, parse_cmdline, ticks_per_s

if TYPE_CHECKING:
    from collections.abc import Iterable

    from gpuguard._processes import Programs

OBJECT = Path(__file__).parents[2] / "bpf" / "processes.bpf.o"
_RECORD, _ARGV = struct.Struct("<QQQQQIIIIII16s"), struct.Struct("<II")

_attached: list[Programs] = []


def attach() -> tuple[Opened, tuple[int, ...]]:
    """Load and attach the programs; return their ring, and what to wait on. For the broker."""
    from gpuguard._processes import Programs

    detach()
    programs = Programs(str(OBJECT), Path("/proc/self/ns/pid").stat().st_ino)
    _attached.append(programs)
    ring = os.dup(programs.ring_fd)
    with select.epoll() as waiting:
        waiting.register(ring, select.EPOLLIN)
        descriptors = (ring, os.dup(waiting.fileno()))
    values = {"ring_bytes": programs.ring_bytes}
    if programs.undialled:
        return Opened(("ring", "epoll"), f"bpf (connections: {programs.undialled})", values), descriptors
    values["connects_bytes"] = programs.connects_bytes
    return Opened(("ring", "epoll", "connects"), "bpf", values), (*descriptors, os.dup(programs.connects_fd))


def detach() -> None:
    """Detach the programs; they would also end with this process."""
    while _attached:
        _attached.pop().close()


class BpfSource:
    """The ring as the guard reads it; its descriptor may be closed once this exists."""

    def __init__(self, ring: int, ring_bytes: int, waiting: int) -> None:
        from gpuguard._processes import Ring

        self._ring = Ring(ring, ring_bytes)
        self._lost = 0
        self.descriptor: int | None = waiting

    def events(self) -> tuple[list[Event], int | None]:
        """Return some events, and how many were lost since the last call."""
        records = self._ring.read(EVENTS_MAX)
        if not records:
            return [], 0
        events, lost = parse_ring(records, boot_ns())
        new = max(0, lost - self._lost)
        self._lost = max(lost, self._lost)
        return events, new

    def close(self) -> None:
        """Unmap the ring."""
        self._ring.close()
        if self.descriptor is not None:
            os.close(self.descriptor)
        self.descriptor = None


def parse_ring(records: Iterable[bytes], booted_ns: int) -> tuple[list[Event], int]:
    """Return the events of ring records (struct event) and how many the ring had no room for since it was made."""
    tick_ns = 1_000_000_000 // ticks_per_s()
    events: list[Event] = []
    lost = 0
    for record in records:
        if len(record) < _RECORD.size:
            continue
        row = _RECORD.unpack_from(record)
        at_ns, start_ns, parent_start_ns, cgroup, lost, kind, pid, parent_pid, uid, netns, status, name = row
        if kind not in (1, 2, 3):
            continue
        events.append(Event(
            Kind(kind), booted_ns + at_ns, pid, start_ns // tick_ns, parent_pid, parent_start_ns // tick_ns,
            status if kind == Kind.EXIT else None, True,
            printable(name.partition(b"\0")[0].decode(errors="replace")), uid, netns, cgroup,
            parse_ring_argv(record[_RECORD.size:]),
        ))
    return events, lost


def parse_ring_argv(data: bytes) -> tuple[str, ...]:
    """Return the redacted arguments of an exec; an argument that the record cuts off is left out, half a secret too."""
    if len(data) < _ARGV.size:
        return ()
    size, _ = _ARGV.unpack_from(data)
    kept = data[_ARGV.size:_ARGV.size + size]
    if size <= len(data) - _ARGV.size:
        return parse_cmdline(kept)
    return (*parse_cmdline(kept[:kept.rfind(b"\0") + 1]), "\u2026")
