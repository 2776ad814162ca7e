"""The process eye: who was started, by whom, and when it ended.

Three sources, best first. *bpf*: raw tracepoints at fork, exec and exit (ext/bpf/processes.bpf.c), which carry start
times and arguments, so that even a process that is gone at once is named. *connector*: the kernel's proc connector
(linux/cn_proc.h), root in the first pid and network namespace only; an event there has no start time, and a process
that is gone before its /proc was read is counted in a `Gap` and not guessed. *polling*: /proc is listed again and
again; what lives shorter than the interval is not seen, and a `Gap` says so from the start.

Everything is read through a descriptor of /proc/PID itself: once that is open, the kernel answers for this very
process or not at all, also when the pid was given to another meanwhile. Formats: proc(5).

Pids are those of the broker's pid namespace: bpf translates, in the kernel; the connector refuses any but the first.
A forked process that never executes anything matters as a link between others and as an owner of sockets: it is read
a moment after its fork, or named when a descendant of it is.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import select
import socket
import struct
import time
from collections import OrderedDict, deque
from enum import IntEnum
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

import msgspec

from gpuguard.core.records import Block, Gap, ProcessExited, ProcessStarted
from gpuguard.core.subjects import ENVIRON_LISTED, ProcessId
from gpuguard.messages import (
    MESSAGE_BYTES_MAX,
    Answer,
    Found,
    ListProcesses,
    Opened,
    OpenProcesses,
    ReadProcess,
    Refused,
    Request,
)
from gpuguard.redaction import printable, redact_argv
from gpuguard.sensors import EyeClosed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from gpuguard._processes import Programs, Ring
    from gpuguard.config import Config

NAME = "processes"
PROC = Path("/proc")
OBJECT = Path(__file__).parents[2] / "bpf" / "processes.bpf.o"
PAGE_BYTES = MESSAGE_BYTES_MAX * 2 // 3
STAT_BYTES_MAX = 4096
CMDLINE_BYTES_MAX = 8192
ENVIRON_BYTES_MAX = 256 * 1024
ENVIRON_VALUE_CHARS_MAX = 256
#: Inode of the first pid namespace, PROC_PID_INIT_INO of linux/proc_ns.h.
FIRST_PID_NAMESPACE = 0xEFFF_FFFC
#: Events taken in one `read`; the rest wait in the kernel's ring, where what does not fit is counted.
EVENTS_MAX = 256
FORKS_MAX = 8192
ANCESTORS_MAX = 32
SETTLE_NS = 50_000_000
SETTLE_PERIOD_NS = 200_000_000
CONNECTOR_BYTES = 1024 * 1024
CONNECTOR_ANSWER_S = 0.5
USERS_MAX = 4096
#: What could not be read of single processes is told at most this often, with its count.
UNREAD_PERIOD_NS = 10_000_000_000


class Broker(Protocol):
    """What this sensor needs of the broker's client."""

    def ask(self, request: Request) -> tuple[Answer, tuple[int, ...]]:
        """Send one request and return its answer with the descriptors beside it."""
        ...


# -- /proc, pure ------------------------------------------------------------------------------------------------------


class Stat(NamedTuple):
    """The fields of /proc/PID/stat that are used here."""

    name: str
    state: str
    parent_pid: int
    threads: int
    start_ticks: int

    @property
    def is_gone(self) -> bool:
        """A zombie runs nothing; one whose first thread ended while others go on is none, though it is shown as Z."""
        return self.state in "ZXx" and self.threads <= 1


def parse_stat(text: str) -> Stat:
    """Return what a stat line says; raises `ValueError`. The name may hold anything: the last parenthesis ends it."""
    head, opened, rest = text.partition("(")
    name, closed, tail = rest.rpartition(")")
    fields = tail.split()
    if not (head and opened and closed) or len(fields) < 20:
        raise ValueError("not a line of /proc/PID/stat")
    return Stat(printable(name), fields[0], int(fields[1]), int(fields[17]), int(fields[19]))


def parse_uid(status: str) -> int:
    """Return the real uid of /proc/PID/status, -1 where there is none."""
    found = re.search(r"^Uid:\t(\d+)", status, re.MULTILINE)
    return int(found.group(1)) if found else -1


def parse_cgroup(text: str) -> tuple[str, str]:
    """Return (hierarchy, path) of /proc/PID/cgroup, cgroups(7): hierarchy "" is v2.

    On a hybrid host whose containers live in the v1 hierarchies only, v2 says "/" of everybody: then systemd's own
    hierarchy is taken, if that says more.
    """
    paths = {}
    for line in text.splitlines():
        _, _, rest = line.partition(":")
        controllers, separator, path = rest.partition(":")
        if separator:
            paths[controllers] = printable(path)
    unified, systemd = paths.get(""), paths.get("name=systemd", "/")
    if unified is None or (unified == "/" and systemd != "/"):
        return "name=systemd", systemd if paths else ""
    return "", unified


def parse_namespace(link: str) -> int:
    """Return the inode of a namespace link such as ``net:[4026531833]``, namespaces(7), 0 for anything else."""
    found = re.fullmatch(r"[a-z_]+:\[(\d{1,20})\]", link)
    return int(found.group(1)) if found else 0


def parse_cmdline(raw: bytes) -> tuple[str, ...]:
    """Return the redacted arguments. What a process wrote over its arguments (setproctitle) is one argument."""
    if not raw:
        return ()
    return redact_argv(raw.rstrip(b"\0").decode(errors="replace").split("\0"))


def parse_environ(raw: bytearray) -> dict[str, str]:
    """Return the listed variables. Nothing else of the buffer is ever copied, and the buffer is wiped."""
    found = {}
    for name in ENVIRON_LISTED:
        key = name.encode() + b"="
        start = 0 if raw.startswith(key) else raw.find(b"\0" + key) + 1
        if start == 0 and not raw.startswith(key):
            continue
        start += len(key)
        end = raw.find(b"\0", start)
        value = bytes(raw[start:min(end if end >= 0 else len(raw), start + ENVIRON_VALUE_CHARS_MAX)])
        found[name] = printable(value.decode(errors="replace"))
    raw[:] = bytes(len(raw))
    return found


def parse_users(passwd: str) -> dict[int, str]:
    """Return the name of each uid of passwd(5); the first of several names is taken, as the C library does."""
    users: dict[int, str] = {}
    for line in passwd.splitlines():
        fields = line.split(":")
        if len(fields) > 2 and fields[2].isdecimal():
            users.setdefault(int(fields[2]), fields[0])
    return users


# -- /proc, read by the broker ----------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def ticks_per_s() -> int:
    """Return USER_HZ, the unit of start times in /proc."""
    return os.sysconf("SC_CLK_TCK")


def boot_ns() -> int:
    """Return the Unix time of boot: what to add to CLOCK_BOOTTIME."""
    return time.time_ns() - time.clock_gettime_ns(time.CLOCK_BOOTTIME)


@lru_cache(maxsize=4)
def _users(path: Path, _changed_ns: int) -> dict[int, str]:
    return parse_users(path.read_text(errors="replace"))


def user_of(uid: int, passwd: Path = Path("/etc/passwd")) -> str:
    """Return the name of a user, "" if this host's own file has none.

    Not by getpwuid(3): that loads modules and may ask a directory server, which a privileged process must not wait for.
    """
    try:
        return _users(passwd, passwd.stat().st_mtime_ns).get(uid, "")
    except OSError:
        return ""


@lru_cache(maxsize=8)
def boot_id(proc_root: Path = PROC) -> str:
    """Return the id of this boot, random(4)."""
    return (proc_root / "sys/kernel/random/boot_id").read_text().strip()


@lru_cache(maxsize=8)
def _hierarchies(proc_root: Path) -> dict[str, Path]:
    """Return where each cgroup hierarchy is mounted, by its name in /proc/PID/cgroup; "" is v2."""
    mounts: dict[str, Path] = {}
    for line in (proc_root / "self/mounts").read_text(errors="replace").splitlines():
        fields = line.split(" ")
        if len(fields) > 3 and fields[2] == "cgroup2":
            mounts.setdefault("", Path(fields[1]))
        elif len(fields) > 3 and fields[2] == "cgroup" and "name=systemd" in fields[3].split(","):
            mounts.setdefault("name=systemd", Path(fields[1]))
    return mounts


def cgroup_id(hierarchy: str, path: str, proc_root: Path = PROC) -> int:
    """Return the inode of a cgroup's folder, which is its id in the kernel; 0 where it cannot be seen."""
    try:
        mount = _hierarchies(proc_root).get(hierarchy)
        return (mount / path.lstrip("/")).stat().st_ino if mount and ".." not in path.split("/") else 0
    except OSError:
        return 0


def _read(folder: int, name: str, bytes_max: int) -> bytearray:
    descriptor = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=folder)
    try:
        data = bytearray(os.read(descriptor, bytes_max))
        while data and len(data) < bytes_max:
            more = os.read(descriptor, bytes_max - len(data))
            if not more:
                break
            data += more
        return data
    finally:
        os.close(descriptor)


def _text(folder: int, name: str) -> str:
    return _read(folder, name, STAT_BYTES_MAX).decode(errors="replace")


def _optional(folder: int, name: str, bytes_max: int) -> bytearray:
    """Return what may be closed to us; that the process is gone is found by who reads its stat last."""
    try:
        return _read(folder, name, bytes_max)
    except OSError:
        return bytearray()


def _link(folder: int, name: str) -> str:
    try:
        return printable(os.readlink(name, dir_fd=folder))
    except OSError:
        return ""


def read_stat(pid: int, proc_root: Path = PROC) -> Stat | None:
    """Return the stat of a pid, None if there is no such process."""
    try:
        with (proc_root / str(pid) / "stat").open("rb") as file:
            return parse_stat(file.read(STAT_BYTES_MAX).decode(errors="replace"))
    except (OSError, ValueError):
        return None


def identify(pid: int, proc_root: Path = PROC) -> ProcessId | None:
    """Return who has this pid now, None if nobody has."""
    stat = read_stat(pid, proc_root)
    return ProcessId(boot_id(proc_root), pid, stat.start_ticks) if stat else None


def read_process(pid: int, proc_root: Path = PROC, booted_ns: int | None = None) -> ProcessStarted | None:
    """Return a process as /proc shows it, its time that of its start; None if there is none, or it only awaits burial.

    Parameters
    ----------
    pid
        In the pid namespace of ``proc_root``.
    proc_root
        A mounted procfs, or a recorded tree.
    booted_ns
        Unix time of boot; None: this host's.
    """
    try:
        folder = os.open(proc_root / str(pid), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        stat = parse_stat(_text(folder, "stat"))
        if stat.is_gone:
            return None
        found = _describe(folder, pid, stat, proc_root, boot_ns() if booted_ns is None else booted_ns)
        after = parse_stat(_text(folder, "stat"))
    except (OSError, ValueError):
        return None
    finally:
        os.close(folder)
    return found if after.start_ticks == stat.start_ticks and not after.is_gone else None


def _describe(folder: int, pid: int, stat: Stat, proc_root: Path, booted_ns: int) -> ProcessStarted:
    hierarchy, cgroup = parse_cgroup(_text(folder, "cgroup"))
    uid = parse_uid(_text(folder, "status"))
    parent = identify(stat.parent_pid, proc_root) if stat.parent_pid else None
    return ProcessStarted(
        time_ns=booted_ns + stat.start_ticks * 1_000_000_000 // ticks_per_s(),
        process=ProcessId(boot_id(proc_root), pid, stat.start_ticks),
        parent=parent if parent and parent.start_ticks <= stat.start_ticks else None,
        name=stat.name,
        argv=parse_cmdline(bytes(_optional(folder, "cmdline", CMDLINE_BYTES_MAX))),
        executable=_link(folder, "exe"),
        uid=uid,
        user=user_of(uid) if uid >= 0 else "",
        cgroup=cgroup,
        cgroup_id=cgroup_id(hierarchy, cgroup, proc_root),
        netns=parse_namespace(_link(folder, "ns/net")),
        environ=parse_environ(_optional(folder, "environ", ENVIRON_BYTES_MAX)),
    )


def list_processes(after_pid: int, proc_root: Path = PROC, page_bytes: int = PAGE_BYTES) -> Found:
    """Return one page of the processes with a pid above ``after_pid``, as many as fit into ``page_bytes``."""
    pids = sorted(int(name) for name in os.listdir(proc_root) if name.isdecimal())
    page: list[ProcessStarted] = []
    size = 0
    booted_ns = boot_ns()
    for pid in pids:
        if pid <= after_pid:
            continue
        if size >= page_bytes:
            return Found(tuple(page), more=page[-1].process.pid)
        found = read_process(pid, proc_root, booted_ns)
        if found:
            page.append(found)
            size += len(msgspec.msgpack.encode(found))
    return Found(tuple(page))


# -- the broker's half ------------------------------------------------------------------------------------------------

_attached: list[Programs] = []


def grant(request: OpenProcesses | ListProcesses | ReadProcess) -> tuple[Answer, tuple[int, ...]]:
    """Answer what the guard asks about processes. Whoever sends the answer closes the descriptors afterwards.

    The ring can only be read and the epoll descriptor only be waited on. The connector's socket hears process events
    and, like any netlink socket, may speak to the kernel with the rights of who holds it.
    """
    match request:
        case ReadProcess():
            found = read_process(request.pid)
            return Found((found,) if found else ()), ()
        case ListProcesses():
            return list_processes(request.after_pid), ()
        case OpenProcesses():
            return _open(request.source)


def release() -> None:
    """Detach the programs; they would also end with this process."""
    while _attached:
        _attached.pop().close()


def _open(source: str) -> tuple[Answer, tuple[int, ...]]:
    reasons: list[str] = []
    for name, opener in _OPENERS.items():
        if source not in ("auto", name):
            continue
        try:
            return opener(reasons)
        except (OSError, ImportError) as error:
            reasons.append(f"{name}: {error}")
    return Refused("; ".join(reasons) or f"no such source of process events: {source}"), ()


def _open_bpf(_reasons: list[str]) -> tuple[Opened, tuple[int, ...]]:
    from gpuguard._processes import Programs

    release()
    programs = Programs(str(OBJECT), Path("/proc/self/ns/pid").stat().st_ino)
    _attached.append(programs)
    ring = os.dup(programs.ring_fd)
    with select.epoll() as waiting:
        waiting.register(ring, select.EPOLLIN)
        descriptors = (ring, os.dup(waiting.fileno()))
    return Opened(("ring", "epoll"), "bpf", {"ring_bytes": programs.ring_bytes}), descriptors


def _open_connector(_reasons: list[str]) -> tuple[Opened, tuple[int, ...]]:
    if Path("/proc/self/ns/pid").stat().st_ino != FIRST_PID_NAMESPACE:
        raise OSError(errno.EPERM, "only in the first pid namespace")
    opened = socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC, _NETLINK_CONNECTOR)
    try:
        opened.settimeout(CONNECTOR_ANSWER_S)
        with contextlib.suppress(PermissionError):
            opened.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, CONNECTOR_BYTES)
        opened.bind((0, _CN_IDX_PROC))
        opened.send(_LISTEN)
        while True:
            acknowledged = parse_acknowledgement(opened.recv(STAT_BYTES_MAX))
            if acknowledged is not None:
                break
        if acknowledged:
            raise OSError(acknowledged, os.strerror(acknowledged))
    except TimeoutError as error:
        opened.close()
        raise OSError(errno.ETIMEDOUT, "the kernel's proc connector does not answer") from error
    except OSError:
        opened.close()
        raise
    opened.setblocking(False)
    return Opened(("netlink",), "connector"), (opened.detach(),)


def _open_polling(reasons: list[str]) -> tuple[Opened, tuple[int, ...]]:
    return Opened((), f"polling ({'; '.join(reasons)})" if reasons else "polling"), ()


_OPENERS: Mapping[str, Callable[[list[str]], tuple[Opened, tuple[int, ...]]]] = {
    "bpf": _open_bpf,
    "connector": _open_connector,
    "polling": _open_polling,
}


# -- events, pure -----------------------------------------------------------------------------------------------------


class Kind(IntEnum):
    """As in ext/bpf/processes.bpf.c."""

    FORK = 1
    EXEC = 2
    EXIT = 3


class Event(NamedTuple):
    """What a source says of one moment. None: this source cannot say."""

    kind: Kind
    time_ns: int
    pid: int
    start_ticks: int | None = None
    parent_pid: int = 0
    parent_start_ticks: int | None = None
    exit_status: int | None = None
    #: False for an exit of the connector that may be of one thread only.
    whole: bool = True
    name: str = ""
    uid: int = -1
    netns: int = 0
    cgroup_id: int = 0
    #: Redacted.
    argv: tuple[str, ...] = ()


_RECORD, _ARGV = struct.Struct("<QQQQQIIIIII16s"), struct.Struct("<II")


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


# linux/connector.h, linux/cn_proc.h
_NETLINK_CONNECTOR, _CN_IDX_PROC, _CN_VAL_PROC, _NLMSG_DONE, _SO_RCVBUFFORCE = 11, 1, 1, 3, 33
_MESSAGE = struct.Struct("=IHHIIIIIIHHIIQ")
_LISTEN = struct.pack("=IHHIIIIIIHHI", 40, _NLMSG_DONE, 0, 0, 0, _CN_IDX_PROC, _CN_VAL_PROC, 0, 0, 4, 0, 1)
_NONE, _FORK, _EXEC, _EXIT = 0, 1, 2, 0x8000_0000


def _connector_head(datagram: bytes) -> tuple[int, int] | None:
    """Return (what, time) of a proc connector message, None if it is another's or cut."""
    if len(datagram) < _MESSAGE.size + 16:
        return None
    _, kind, _, _, _, index, value, _, _, _, _, what, _, at_ns = _MESSAGE.unpack_from(datagram)
    return (what, at_ns) if (kind, index, value) == (_NLMSG_DONE, _CN_IDX_PROC, _CN_VAL_PROC) else None


def parse_acknowledgement(datagram: bytes) -> int | None:
    """Return the error number with which the connector answered to listening, None if this is another message."""
    head = _connector_head(datagram)
    return int(struct.unpack_from("=I", datagram, _MESSAGE.size)[0]) if head and head[0] == _NONE else None


def parse_connector(datagram: bytes, monotonic_zero_ns: int) -> Event | None:
    """Return the event of one connector message, None for those of threads and those not asked for.

    ``monotonic_zero_ns`` is the Unix time at which CLOCK_MONOTONIC was 0.
    """
    head = _connector_head(datagram)
    if head is None:
        return None
    first, second, third, fourth = struct.unpack_from("=IIII", datagram, _MESSAGE.size)
    time_ns = monotonic_zero_ns + head[1]
    match head[0]:
        case 1:
            return Event(Kind.FORK, time_ns, third, parent_pid=second) if third == fourth else None
        case 2:
            return Event(Kind.EXEC, time_ns, second)
        case 0x8000_0000:
            return Event(Kind.EXIT, time_ns, second, exit_status=third if first == second else None, whole=False)
    return None


# -- the guard's half -------------------------------------------------------------------------------------------------


class Source(Protocol):
    """Where events come from."""

    descriptor: int | None

    def events(self) -> tuple[list[Event], int | None]:
        """Return some events, and how many were lost since the last call (None: some)."""
        ...

    def close(self) -> None:
        """Give the handles back."""
        ...


class _BpfSource:
    def __init__(self, ring: Ring, waiting: int) -> None:
        self._ring = ring
        self._lost = 0
        self.descriptor: int | None = waiting

    def events(self) -> tuple[list[Event], int | None]:
        events, lost = parse_ring(self._ring.read(EVENTS_MAX), boot_ns())
        new = max(0, lost - self._lost)
        self._lost = max(lost, self._lost)
        return events, new

    def close(self) -> None:
        self._ring.close()
        if self.descriptor is not None:
            os.close(self.descriptor)
        self.descriptor = None


class _ConnectorSource:
    def __init__(self, descriptor: int) -> None:
        self._socket = socket.socket(fileno=descriptor)
        self._socket.setblocking(False)
        self.descriptor: int | None = descriptor

    def events(self) -> tuple[list[Event], int | None]:
        zero_ns = time.time_ns() - time.monotonic_ns()
        events: list[Event] = []
        lost: int | None = 0
        while len(events) < EVENTS_MAX:
            try:
                event = parse_connector(self._socket.recv(STAT_BYTES_MAX), zero_ns)
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                lost = None
                continue
            if event:
                events.append(event)
        return events, lost

    def close(self) -> None:
        self._socket.close()
        self.descriptor = None


class _PollingSource:
    descriptor: int | None = None

    def events(self) -> tuple[list[Event], int | None]:
        return [], 0

    def close(self) -> None:
        pass


class _Known(NamedTuple):
    """A process that a record named, and its parent at the fork: after that parent's end /proc names another."""

    process: ProcessId
    parent: ProcessId | None


class ProcessSensor:
    """Turns events into records: `ProcessStarted` at each exec and for each fork that lasts, `ProcessExited`."""

    name = NAME

    def __init__(self, broker: Broker, source: Source, mode: str, poll_interval_ns: int) -> None:
        self._broker = broker
        self._source = source
        self._polls = mode.startswith("polling")
        self.mode = mode
        self.descriptor = source.descriptor
        self.period_ns: int | None = poll_interval_ns if self._polls else SETTLE_PERIOD_NS
        self._boot_id = ""
        self._users: dict[int, str] = {}
        self._known: dict[int, _Known] = {}
        self._born: OrderedDict[int, Event] = OrderedDict()
        self._settling: deque[Event] = deque(maxlen=FORKS_MAX)
        self._ending: dict[int, Event] = {}
        self._must_list = True
        self._unread: dict[str, int] = {}
        self._unread_told_ns = 0
        self._told_polling = False

    def read(self, now_ns: int) -> list[Block]:
        """Return what started and ended since the last call."""
        blocks: list[Block] = []
        if self._polls:
            blocks += self._poll_gap(now_ns)
        try:
            events, lost = self._source.events()
        except OSError as error:
            return [Gap(now_ns, NAME, f"process events: {error}", since_ns=now_ns)]
        if lost is None or lost > 0:
            blocks.append(Gap(now_ns, NAME, "more process events than could be kept: listing anew", lost=lost))
        if self._must_list or self._polls:
            blocks += self._list(now_ns)
        for event in events:
            blocks += self._take(event)
        if lost != 0:
            # After the events: whose end was lost is known by now, and missing from the list.
            blocks += self._list(now_ns)
        return blocks + self._settle(now_ns) + self._unread_gaps(now_ns)

    def close(self) -> None:
        """Give every handle back."""
        self._source.close()
        self.descriptor = None

    def _unread_gaps(self, now_ns: int) -> list[Block]:
        if not self._unread or now_ns - self._unread_told_ns < UNREAD_PERIOD_NS:
            return []
        gaps: list[Block] = [Gap(now_ns, NAME, reason, lost=count) for reason, count in self._unread.items()]
        self._unread.clear()
        self._unread_told_ns = now_ns
        return gaps

    # -- listing ------------------------------------------------------------------------------------------------------

    def _poll_gap(self, now_ns: int) -> list[Block]:
        if self._told_polling:
            return []
        self._told_polling = True
        period_ms = (self.period_ns or 0) // 1_000_000
        return [Gap(now_ns, NAME, f"{self.mode}: processes that live less than {period_ms} ms are not seen, "
                                  "nor how any of them ended", since_ns=now_ns)]

    def _list(self, now_ns: int) -> list[Block]:
        """Compare /proc with what is known; only who was known before the listing began can be missing from it."""
        before = dict(self._known)
        listed: dict[int, ProcessStarted] = {}
        after_pid = 0
        while True:
            answer, _ = self._broker.ask(ListProcesses(after_pid))
            if not isinstance(answer, Found):
                return [Gap(now_ns, NAME, f"listing processes: {_why(answer)}", since_ns=now_ns)]
            listed.update({found.process.pid: found for found in answer.processes})
            if answer.more <= after_pid:
                break
            after_pid = answer.more
        self._must_list = False
        gone = [one.process for pid, one in before.items() if pid not in listed or listed[pid].process != one.process]
        blocks: list[Block] = [ProcessExited(now_ns, one) for one in gone]
        for one in gone:
            self._known.pop(one.pid, None)
        # Parents before their children, so that a reader finds each ancestor when it meets the child.
        for found in sorted(listed.values(), key=lambda found: (found.process.start_ticks, found.process.pid)):
            if not self._knows(found.process):
                blocks += self._emit(found)
        return blocks

    # -- events -------------------------------------------------------------------------------------------------------

    def _take(self, event: Event) -> list[Block]:
        match event.kind:
            case Kind.FORK:
                if event.start_ticks is not None and self._knows(self._id(event)):
                    return []
                self._born[event.pid] = event
                self._born.move_to_end(event.pid)
                if len(self._born) > FORKS_MAX:
                    self._born.popitem(last=False)
                self._settling.append(event)
                return []
            case Kind.EXEC:
                return self._start(event)
            case Kind.EXIT:
                return self._end(event)

    def _start(self, event: Event) -> list[Block]:
        found = self._ask(event.pid)
        if found and event.start_ticks in (None, found.process.start_ticks):
            return self._emit(msgspec.structs.replace(found, time_ns=event.time_ns, argv=found.argv or event.argv))
        if event.start_ticks is None:
            self._count("processes gone before they could be read; this source does not say when they started")
            return []
        self._count("processes gone before their environment and cgroup path could be read; the rest is known")
        return self._emit(self._bare(event))

    def _count(self, reason: str) -> None:
        self._unread[reason] = self._unread.get(reason, 0) + 1

    def _knows(self, process: ProcessId) -> bool:
        known = self._known.get(process.pid)
        return known is not None and known.process == process

    def _id(self, event: Event) -> ProcessId:
        return ProcessId(self._boot_id, event.pid, event.start_ticks or 0)

    def _bare(self, event: Event) -> ProcessStarted:
        """What the event alone says of a process that is gone by now."""
        return ProcessStarted(
            time_ns=event.time_ns,
            process=self._id(event),
            parent=self._parent(event),
            name=event.name,
            argv=event.argv,
            uid=event.uid,
            user=self._users.get(event.uid, ""),
            cgroup_id=event.cgroup_id,
            netns=event.netns,
        )

    def _parent(self, event: Event) -> ProcessId | None:
        if not event.parent_pid:
            return None
        if event.parent_start_ticks is not None:
            return ProcessId(self._boot_id, event.parent_pid, event.parent_start_ticks)
        known = self._known.get(event.parent_pid)
        return known.process if known else None

    def _emit(self, started: ProcessStarted) -> list[Block]:
        """Return the record, its parent as it was at the fork, after those of ancestors that no record named yet."""
        process = started.process
        self._boot_id = self._boot_id or process.boot_id
        if started.user and len(self._users) < USERS_MAX:
            self._users[started.uid] = started.user
        known, born = self._known.get(process.pid), self._born.pop(process.pid, None)
        if known and known.process == process:
            started = msgspec.structs.replace(started, parent=known.parent)
        elif born and born.start_ticks in (None, process.start_ticks):
            started = msgspec.structs.replace(started, parent=self._parent(born) or started.parent)
        self._known[process.pid] = _Known(process, started.parent)
        return [*self._ancestors(started.parent), started]

    def _ancestors(self, parent: ProcessId | None) -> list[Block]:
        """Return records of the parent and its ancestors as far as they forked, ran nothing, and have none yet."""
        blocks: list[Block] = []
        while parent and len(blocks) < ANCESTORS_MAX:
            born = self._born.get(parent.pid)
            if born is None or born.start_ticks != parent.start_ticks:
                break
            bare = self._bare(self._born.pop(parent.pid))
            self._known.setdefault(parent.pid, _Known(parent, bare.parent))
            blocks.insert(0, bare)
            parent = bare.parent
        return blocks

    def _end(self, event: Event) -> list[Block]:
        known = self._known.get(event.pid)
        if not event.whole:
            return self._end_thread(event) if known else []
        if known is None or event.start_ticks not in (None, known.process.start_ticks):
            return []
        del self._known[event.pid]
        return [ProcessExited(event.time_ns, known.process, event.exit_status)]

    def _end_thread(self, event: Event) -> list[Block]:
        """A thread of the connector ended: the process did if its first thread did too and nothing runs any more."""
        before = self._ending.get(event.pid)
        if event.exit_status is None and before is None:
            return []
        status = event.exit_status if event.exit_status is not None else before.exit_status if before else None
        self._ending[event.pid] = event._replace(exit_status=status)
        return self._end_if_gone(event.pid)

    def _end_if_gone(self, pid: int) -> list[Block]:
        known, found = self._known.get(pid), self._ask(pid)
        if known and found and found.process == known.process:
            return []
        event = self._ending.pop(pid)
        return self._end(event._replace(whole=True))

    def _settle(self, now_ns: int) -> list[Block]:
        """Read the forks that lasted, and end the processes whose first thread went before the others."""
        blocks: list[Block] = []
        for pid in list(self._ending):
            blocks += self._end_if_gone(pid)
        for _ in range(min(len(self._settling), EVENTS_MAX)):
            if self._settling[0].time_ns > now_ns - SETTLE_NS:
                break
            event = self._settling.popleft()
            if self._born.get(event.pid) is not event:
                continue
            found = self._ask(event.pid)
            if found and event.start_ticks in (None, found.process.start_ticks):
                blocks += self._emit(msgspec.structs.replace(found, time_ns=event.time_ns))
        return blocks

    def _ask(self, pid: int) -> ProcessStarted | None:
        answer, _ = self._broker.ask(ReadProcess(pid))
        return answer.processes[0] if isinstance(answer, Found) and answer.processes else None


def _why(answer: Answer) -> str:
    return answer.reason if isinstance(answer, Refused) else f"the broker answered {type(answer).__name__}"


def _close_all(descriptors: Iterable[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def open_sensor(broker: Broker, config: Config) -> ProcessSensor:
    """Open the best source of process events that this host allows; raises `EyeClosed`."""
    settings = config.processes
    answer, descriptors = broker.ask(OpenProcesses(settings.source))
    if not isinstance(answer, Opened):
        _close_all(descriptors)
        raise EyeClosed(f"process events: {_why(answer)}")
    source: Source
    mode = answer.mode.partition(" ")[0]
    if mode == "bpf" and len(descriptors) == 2:
        try:
            from gpuguard._processes import Ring

            source = _BpfSource(Ring(descriptors[0], answer.values["ring_bytes"]), descriptors[1])
        except (ImportError, OSError, ValueError, KeyError) as error:
            os.close(descriptors[1])
            raise EyeClosed(f"process events: {error}") from error
        finally:
            os.close(descriptors[0])
    elif mode == "connector" and len(descriptors) == 1:
        source = _ConnectorSource(descriptors[0])
    elif mode == "polling" and not descriptors:
        source = _PollingSource()
    else:
        _close_all(descriptors)
        raise EyeClosed(f"process events: the broker answered {answer.mode} with {len(descriptors)} descriptors")
    return ProcessSensor(broker, source, answer.mode, settings.poll_interval_ms * 1_000_000)
