"""The guard's half: when the tables are asked for, and what of the answers is told."""

from __future__ import annotations

import contextlib
import ctypes
import os
import struct
import time
from typing import TYPE_CHECKING, Protocol

import msgspec

from gpuguard.core.records import Block, Gap, ProcessExited, ProcessStarted, Sockets
from gpuguard.messages import Answer, ReadSockets, Refused, Request, SocketsRead

if TYPE_CHECKING:
    from collections.abc import Iterable

    from gpuguard.core.subjects import ProcessId

NAME = "sockets"
ANSWER_BYTES_MAX = 32 * 1024 * 1024
NAMESPACES_MAX = 64
PROCESSES_PER_NAMESPACE_MAX = 16
#: A look that was asked for follows the one before no sooner than this, nor than so many times what that one took.
WAKE_MIN_NS = 80_000_000
WAKE_COST_FACTOR = 20
#: A connection that comes in is owned only when it was accepted: after its first packet, so there is a second look.
ACCEPT_NS = 150_000_000
UNCHANGED_MAX_NS = 10_000_000_000


class Broker(Protocol):
    """What this sensor needs of the broker's client."""

    def ask(self, request: Request) -> tuple[Answer, tuple[int, ...]]:
        """Send one request and return its answer with the descriptors beside it."""
        ...


def unpack(answer: SocketsRead, descriptors: Iterable[int]) -> Sockets:
    """Return the sockets of an answer, from the memfd if there is one, which is closed; raises `ValueError`."""
    seen = answer.sockets
    for descriptor in descriptors:
        try:
            size = os.fstat(descriptor).st_size
            if size > ANSWER_BYTES_MAX:
                raise ValueError(f"{size} bytes of sockets")
            seen = msgspec.msgpack.decode(os.pread(descriptor, size, 0), type=Sockets)
        finally:
            os.close(descriptor)
    return seen


class _Timer:
    """A timerfd(2), so that the next look is due on one descriptor, whatever called for it."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self.descriptor: int = self._libc.timerfd_create(time.CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)
        if self.descriptor < 0:
            number = ctypes.get_errno()
            raise OSError(number, f"timerfd: {os.strerror(number)}")

    def set(self, at_ns: int) -> None:
        """Become readable at this time of CLOCK_MONOTONIC."""
        timer = struct.pack("=4q", 0, 0, at_ns // 1_000_000_000, at_ns % 1_000_000_000)
        if self._libc.timerfd_settime(self.descriptor, 1, timer, None) != 0:
            number = ctypes.get_errno()
            raise OSError(number, f"timerfd: {os.strerror(number)}")

    def close(self) -> None:
        os.close(self.descriptor)


class SocketSensor:
    """Looks at each interval, and soon after `wake`; tells of a namespace when something in it changed."""

    name = NAME

    def __init__(self, broker: Broker, interval_ns: int) -> None:
        self._broker = broker
        self._interval_ns = interval_ns
        self._timer = _Timer()
        self._due_ns = 0
        self._looked_ns = 0
        self._cost_ns = 0
        self._again = False
        self._own: int | None = None
        self._namespaces: dict[int, dict[int, ProcessId]] = {}
        self._told: dict[int, Sockets] = {}
        self._gaps: dict[int, str] = {}
        self.descriptor: int | None = self._timer.descriptor
        self.period_ns: int | None = interval_ns
        self._timer.set(1)

    def wake(self) -> None:
        """Ask for a look now: a conversation began. Many calls make one look; a second follows for what is accepted."""
        wait_ns = max(WAKE_MIN_NS, WAKE_COST_FACTOR * self._cost_ns)
        self._again = True
        self._due_at(min(self._due_ns, max(time.monotonic_ns(), self._looked_ns + wait_ns)))

    def notice(self, block: Block) -> None:
        """Learn from the process eye which network namespaces there are, and who can show them."""
        match block:
            case ProcessStarted(process=process, netns=netns) if netns not in (0, self._own):
                if netns in self._namespaces or len(self._namespaces) < NAMESPACES_MAX:
                    inside = self._namespaces.setdefault(netns, {})
                    if len(inside) < PROCESSES_PER_NAMESPACE_MAX:
                        inside[process.pid] = process
            case ProcessExited(process=process):
                for inside in self._namespaces.values():
                    if inside.get(process.pid) == process:
                        del inside[process.pid]

    def read(self, now_ns: int) -> list[Block]:
        """Return the namespaces that changed, if a look is due; else nothing."""
        started_ns = time.monotonic_ns()
        if started_ns < self._due_ns:
            return []
        with contextlib.suppress(BlockingIOError):
            os.read(self._timer.descriptor, 8)
        own = self._ask(0)
        blocks = self._gap(0, own, now_ns) if isinstance(own, str) else self._tell(0, own, now_ns)
        self._own = self._own if isinstance(own, str) else own.netns
        for netns in list(self._namespaces):
            blocks += self._look_inside(netns, now_ns)
        self._looked_ns = time.monotonic_ns()
        self._cost_ns = self._looked_ns - started_ns
        self._due_at(self._looked_ns + (min(ACCEPT_NS, self._interval_ns) if self._again else self._interval_ns))
        self._again = False
        return blocks

    def close(self) -> None:
        """Give every handle back."""
        self._timer.close()
        self.descriptor = None

    def _due_at(self, at_ns: int) -> None:
        self._due_ns = at_ns
        self._timer.set(max(1, at_ns))

    def _look_inside(self, netns: int, now_ns: int) -> list[Block]:
        """Look through the first process that still is in this namespace."""
        inside = self._namespaces[netns]
        if netns == self._own or not inside:
            del self._namespaces[netns]
            self._told.pop(netns, None)
            self._gaps.pop(netns, None)
            return []
        pid = next(iter(inside))
        seen = self._ask(pid)
        if isinstance(seen, Sockets) and seen.netns == netns:
            return self._tell(netns, seen, now_ns)
        # It ended, or moved: nothing that was there goes unsaid as long as another can show it.
        del inside[pid]
        if inside:
            return self._look_inside(netns, now_ns)
        return [] if isinstance(seen, Sockets) else self._gap(netns, seen, now_ns)

    def _ask(self, pid: int) -> Sockets | str:
        """Return the sockets of the namespace that this process is in, or why there are none."""
        answer, descriptors = self._broker.ask(ReadSockets(pid))
        if not isinstance(answer, SocketsRead):
            return answer.reason if isinstance(answer, Refused) else f"the broker answered {type(answer).__name__}"
        try:
            return unpack(answer, descriptors)
        except (ValueError, OSError) as error:
            return f"sockets: {error}"

    def _tell(self, netns: int, seen: Sockets, now_ns: int) -> list[Block]:
        blocks: list[Block] = []
        if seen.complete:
            self._gaps.pop(netns, None)
        else:
            blocks += self._gap(netns, "some sockets or their owners could not be read", now_ns)
        before = self._told.get(seen.netns)
        if before and before.sockets == seen.sockets and seen.time_ns - before.time_ns < UNCHANGED_MAX_NS:
            return blocks
        self._told[seen.netns] = seen
        return [*blocks, seen]

    def _gap(self, netns: int, reason: str, now_ns: int) -> list[Block]:
        """Tell why, once for as long as it stays the reason."""
        if self._gaps.get(netns) == reason:
            return []
        self._gaps[netns] = reason
        return [Gap(now_ns, NAME, reason, since_ns=now_ns)]
