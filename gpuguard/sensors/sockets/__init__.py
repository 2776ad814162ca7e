"""The socket eye: every TCP and UDP socket with its owners, byte counts and lowest round-trip time.

The kernel's own tables are asked by NETLINK_SOCK_DIAG (sock_diag(7), linux/inet_diag.h). It does not say who has a
socket open; that is read from the links in /proc/PID/fd, for all processes at once and only when there is a socket
whose owners are not known, an owner is gone, or what is known has aged: a socket is inherited and handed on soonest
when it is young, so it is looked at again after a quarter of a second and then at doubling ages.

The netlink socket of another network namespace is opened by a thread of its own that ends there
(`netlink.open_netlink`), so nothing else of the broker is ever in a foreign namespace.

Not shown, because nobody can own them: TIME_WAIT, half-open requests, and closed sockets that the kernel still drains.
A connection that came in has an owner from accept(2) on. What opens and closes between two looks is not seen; the
packet eye sees it, without its owner.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import socket
import struct
import time
from collections import OrderedDict
from typing import TYPE_CHECKING, NamedTuple, Protocol

import msgspec

from gpuguard.core.records import Block, Gap, ProcessExited, ProcessStarted, Socket, Sockets
from gpuguard.core.subjects import ProcessId
from gpuguard.messages import MESSAGE_BYTES_MAX, Answer, ReadSockets, Refused, Request, SocketsRead
from gpuguard.netlink import NETLINK_SOCK_DIAG, open_netlink
from gpuguard.sealing import sealed
from gpuguard.sensors.processes.procfs import PROC, STAT_BYTES_MAX, boot_id, parse_namespace, parse_stat, read_stat

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from gpuguard.config import Config

NAME = "sockets"
SOCKETS_MAX = 32_768
ANSWER_BYTES_MAX = 32 * 1024 * 1024
RECEIVE_BYTES = 256 * 1024
OWNERS_MAX = 64
LOOK_AGAIN_MIN_NS, LOOK_AGAIN_MAX_NS = 250_000_000, 30_000_000_000
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


# -- sock_diag, pure --------------------------------------------------------------------------------------------------

_SOCK_DIAG_BY_FAMILY, _NLMSG_ERROR, _NLMSG_DONE = 20, 2, 3
_NLM_F_REQUEST_DUMP = 0x301
_INET_DIAG_INFO = 2
_HEADER = struct.Struct("=IHHII")
_DIAG = struct.Struct("=BBBB2s2s16s16sI8sIIIII")
_ATTRIBUTE = struct.Struct("=HH")
# struct tcp_info of linux/tcp.h: tcpi_bytes_acked, tcpi_bytes_received, and tcpi_min_rtt after three words more.
_BYTES_OFFSET, _BYTES = 120, struct.Struct("=QQ")
_RTT_OFFSET, _RTT = 148, struct.Struct("=I")
_NO_RTT = 0xFFFF_FFFF
# Numbers of net/tcp_states.h. UDP sockets without a peer are "closed" (7).
_TIME_WAIT, _CLOSED, _SYN_RECEIVED, _NEW_SYN_RECEIVED = 6, 7, 3, 12
_TCP_STATES = 0x1FFE & ~(1 << _TIME_WAIT | 1 << _CLOSED | 1 << _SYN_RECEIVED | 1 << _NEW_SYN_RECEIVED)
_UDP_STATES = 1 << 1 | 1 << _CLOSED
_MAPPED = bytes(10) + b"\xff\xff"
TABLES = tuple(
    (family, protocol, states)
    for protocol, states in ((socket.IPPROTO_TCP, _TCP_STATES), (socket.IPPROTO_UDP, _UDP_STATES))
    for family in (socket.AF_INET, socket.AF_INET6)
)


def dump_request(family: int, protocol: int, states: int) -> bytes:
    """Return the message that asks for one table: struct inet_diag_req_v2."""
    body = struct.pack("=BBBBI48x", family, protocol, 1 << (_INET_DIAG_INFO - 1), 0, states)
    return _HEADER.pack(_HEADER.size + len(body), _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST_DUMP, 1, 0) + body


def split_messages(datagram: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield (type, body) of each netlink message; raises `OSError` for one that the kernel could not have sent."""
    offset = 0
    while offset + _HEADER.size <= len(datagram):
        length, kind, _, _, _ = _HEADER.unpack_from(datagram, offset)
        if length < _HEADER.size or offset + length > len(datagram):
            raise OSError(errno.EBADMSG, "malformed netlink message")
        yield kind, datagram[offset + _HEADER.size:offset + length]
        offset += length + (-length % 4)


def address_text(family: int, raw: bytes) -> str:
    """Return an address as a `FlowId` writes it: IPv4 in IPv6 (RFC 4291, section 2.5.5.2) as IPv4."""
    if family == socket.AF_INET:
        return socket.inet_ntop(socket.AF_INET, raw[:4])
    if raw.startswith(_MAPPED):
        return socket.inet_ntop(socket.AF_INET, raw[12:])
    return socket.inet_ntop(socket.AF_INET6, raw)


def parse_socket(protocol: int, body: bytes) -> Socket | None:
    """Return one struct inet_diag_msg with its attributes; None for what has no owner, or is cut short."""
    if len(body) < _DIAG.size:
        return None
    row = _DIAG.unpack_from(body)
    family, state, _, _, local_port, remote_port, local, remote, _, _, _, _, _, uid, inode = row
    if inode == 0 or family not in (socket.AF_INET, socket.AF_INET6):
        return None
    rtt_us, sent, received = _tcp_info(body) if protocol == socket.IPPROTO_TCP else (None, 0, 0)
    return Socket(
        protocol=protocol,
        local=address_text(family, local),
        local_port=int.from_bytes(local_port, "big"),
        remote=address_text(family, remote),
        remote_port=int.from_bytes(remote_port, "big"),
        state=state,
        inode=inode,
        uid=uid,
        min_rtt_us=rtt_us,
        sent_bytes=sent,
        received_bytes=received,
    )


def _tcp_info(body: bytes) -> tuple[int | None, int, int]:
    """Return (min RTT, bytes acknowledged, bytes received); an older kernel's shorter struct gives less."""
    offset = _DIAG.size
    while offset + _ATTRIBUTE.size <= len(body):
        length, kind = _ATTRIBUTE.unpack_from(body, offset)
        if length < _ATTRIBUTE.size:
            break
        if kind == _INET_DIAG_INFO:
            info = body[offset + _ATTRIBUTE.size:offset + length]
            sent, received = _BYTES.unpack_from(info, _BYTES_OFFSET) if len(info) >= _BYTES_OFFSET + 16 else (0, 0)
            rtt_us = _RTT.unpack_from(info, _RTT_OFFSET)[0] if len(info) >= _RTT_OFFSET + 4 else _NO_RTT
            return (None if rtt_us in (0, _NO_RTT) else rtt_us), sent, received
        offset += length + (-length % 4)
    return None, 0, 0


def _dump(opened: socket.socket, family: int, protocol: int, states: int) -> Iterator[Socket]:
    opened.send(dump_request(family, protocol, states))
    while True:
        for kind, body in split_messages(opened.recv(RECEIVE_BYTES)):
            if kind == _NLMSG_DONE:
                return
            if kind == _NLMSG_ERROR:
                number = -struct.unpack_from("=i", body)[0]
                raise OSError(number, f"sock_diag: {os.strerror(number)}")
            found = parse_socket(protocol, body)
            if found:
                yield found


# -- owners, read by the broker ---------------------------------------------------------------------------------------


class _Known(NamedTuple):
    owners: tuple[ProcessId, ...]
    first_ns: int
    due_ns: int


def walk(inodes: set[int], proc_root: Path = PROC) -> tuple[dict[int, list[ProcessId]], bool]:
    """Return who has each of these sockets open, and whether every process could be looked into."""
    owners: dict[int, list[ProcessId]] = {}
    complete = True
    for name in os.listdir(proc_root):
        if not name.isdecimal():
            continue
        try:
            found = _sockets_of(proc_root / name, inodes)
        except PermissionError:
            complete = False
            continue
        except (OSError, ValueError):
            continue
        for inode, start_ticks in found.items():
            owners.setdefault(inode, []).append(ProcessId(boot_id(proc_root), int(name), start_ticks))
    return owners, complete


def _sockets_of(path: Path, inodes: set[int]) -> dict[int, int]:
    """Return {inode: start of the process}, through one descriptor: what it answers is of one process."""
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        descriptors = os.open("fd", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=folder)
        try:
            held = set()
            for name in os.listdir(descriptors):
                with contextlib.suppress(FileNotFoundError):
                    held.add(parse_namespace(os.readlink(name, dir_fd=descriptors)))
        finally:
            os.close(descriptors)
        held &= inodes
        if not held:
            return {}
        stat = os.open("stat", os.O_RDONLY | os.O_CLOEXEC, dir_fd=folder)
        with open(stat, "rb") as file:  # noqa: PTH123  a descriptor, not a path
            start_ticks = parse_stat(file.read(STAT_BYTES_MAX).decode(errors="replace")).start_ticks
        return dict.fromkeys(held, start_ticks)
    finally:
        os.close(folder)


class Owners:
    """Who owns the sockets of one network namespace, looked up as seldom as is honest."""

    def __init__(self, proc_root: Path = PROC) -> None:
        self._proc_root = proc_root
        self._known: dict[int, _Known] = {}
        self._complete = True

    def of(self, inodes: set[int], now_ns: int) -> tuple[dict[int, tuple[ProcessId, ...]], bool]:
        """Return the owners of each inode, () where there is none to be seen, and whether that is certain.

        It is not where a socket has no owner and there is a process that could not be looked into.

        ``now_ns`` is of any clock that does not go back.
        """
        self._known = {inode: known for inode, known in self._known.items() if inode in inodes}
        owners = {owner for known in self._known.values() for owner in known.owners}
        living = {owner: self._lives(owner) for owner in owners}
        if any(
            known is None or known.due_ns <= now_ns or not all(living[owner] for owner in known.owners)
            for known in (self._known.get(inode) for inode in inodes)
        ):
            self._look(inodes, now_ns)
        found = {inode: self._known[inode].owners for inode in inodes}
        return found, self._complete or all(found.values())

    def _look(self, inodes: set[int], now_ns: int) -> None:
        found, self._complete = walk(inodes, self._proc_root)
        for inode in inodes:
            known = self._known.get(inode)
            first_ns = known.first_ns if known else now_ns
            wait_ns = min(LOOK_AGAIN_MAX_NS, max(LOOK_AGAIN_MIN_NS, now_ns - first_ns))
            self._known[inode] = _Known(tuple(sorted(found.get(inode, ()))), first_ns, now_ns + wait_ns)

    def _lives(self, owner: ProcessId) -> bool:
        stat = read_stat(owner.pid, self._proc_root)
        return stat is not None and stat.start_ticks == owner.start_ticks and not stat.is_gone


_owners: OrderedDict[int, Owners] = OrderedDict()


def read_sockets(pid: int = 0, proc_root: Path = PROC) -> Sockets:
    """Return the sockets of the network namespace of ``pid`` (0: our own); raises `OSError`."""
    namespace = os.open(proc_root / (str(pid) if pid else "self") / "ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        netns = os.fstat(namespace).st_ino
        own = netns == (proc_root / "self/ns/net").stat().st_ino
        opened = open_netlink(NETLINK_SOCK_DIAG, None if own else namespace)
    finally:
        os.close(namespace)
    with opened:
        found, complete = _read_tables(opened)
    owners = _owners.setdefault(netns, Owners(proc_root))
    _owners.move_to_end(netns)
    if len(_owners) > OWNERS_MAX:
        _owners.popitem(last=False)
    known, all_read = owners.of({one.inode for one in found}, time.monotonic_ns())
    return Sockets(
        time_ns=time.time_ns(),
        netns=netns,
        sockets=tuple(msgspec.structs.replace(one, owners=known[one.inode]) for one in found),
        complete=complete and all_read,
    )


def _read_tables(opened: socket.socket) -> tuple[list[Socket], bool]:
    """Return all sockets; not complete where there are too many, or where UDP cannot be asked for (CONFIG_UDP_DIAG)."""
    found: list[Socket] = []
    complete = True
    for family, protocol, states in TABLES:
        try:
            for one in _dump(opened, family, protocol, states):
                if len(found) < SOCKETS_MAX:
                    found.append(one)
                else:
                    complete = False
        except FileNotFoundError:
            if protocol == socket.IPPROTO_TCP:
                raise
            complete = False
    return found, complete


def grant(request: ReadSockets) -> tuple[Answer, tuple[int, ...]]:
    """Answer with the sockets of a namespace; where they exceed a message, in a sealed memfd beside an empty list."""
    try:
        seen = read_sockets(request.pid)
    except OSError as error:
        return Refused(f"sockets: {error}"), ()
    answer = SocketsRead(seen)
    data = msgspec.msgpack.encode(answer)
    if len(data) <= MESSAGE_BYTES_MAX // 2:
        return answer, ()
    whole = sealed("gpuguard-sockets", msgspec.msgpack.encode(seen))
    return SocketsRead(msgspec.structs.replace(seen, sockets=())), (whole,)


# -- the guard's half -------------------------------------------------------------------------------------------------


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

    request_now = wake

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


def open_sensor(broker: Broker, config: Config) -> SocketSensor:
    """Return the socket eye. Whether the broker can look shows with the first look, as a `Gap` if not."""
    return SocketSensor(broker, config.sockets.interval_ms * 1_000_000)
