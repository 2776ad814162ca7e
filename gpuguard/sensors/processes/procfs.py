"""A process as /proc shows it: what its files say, and how the broker reads them, all of one and the same process.

Everything is read through a descriptor of /proc/PID itself: once that is open, the kernel answers for this very
process or not at all, also when the pid was given to another meanwhile. Formats: proc(5).
"""

from __future__ import annotations

import os
import re
import time
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import msgspec

from gpuguard.core.records import ProcessStarted
from gpuguard.core.subjects import ENVIRON_LISTED, ProcessId
from gpuguard.messages import MESSAGE_BYTES_MAX, Found
from gpuguard.proctree import lines_of
from gpuguard.redaction import printable, redact_argv

PROC = Path("/proc")
PAGE_BYTES = MESSAGE_BYTES_MAX * 2 // 3
STAT_BYTES_MAX = 4096
CMDLINE_BYTES_MAX = 8192
ENVIRON_BYTES_MAX = 256 * 1024
ENVIRON_VALUE_CHARS_MAX = 256
#: Two readings of one time of boot differ by less, unless the clock was set between them.
CLOCK_STEP_NS = 20_000_000


# -- what the files say, pure -----------------------------------------------------------------------------------------


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
    for line in text.split("\n"):  # names may hold all that `splitlines` takes for an end
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


# -- reading them -----------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def ticks_per_s() -> int:
    """Return USER_HZ, the unit of start times in /proc."""
    return os.sysconf("SC_CLK_TCK")


def boot_ns() -> int:
    """Return the Unix time of boot: what to add to CLOCK_BOOTTIME. A reading that was interrupted is not taken."""
    readings = []
    for _ in range(3):
        before_ns, now_ns, after_ns = (time.clock_gettime_ns(time.CLOCK_BOOTTIME), time.time_ns(),
                                       time.clock_gettime_ns(time.CLOCK_BOOTTIME))
        readings.append((after_ns - before_ns, now_ns - after_ns))
    return min(readings)[1]


def steady_boot_ns(before_ns: int) -> int:
    """Return the Unix time of boot as it was read before, unless somebody set the clock meanwhile."""
    now_ns = boot_ns()
    return before_ns if abs(now_ns - before_ns) < CLOCK_STEP_NS else now_ns


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
    for line in lines_of(proc_root / "self/mounts"):
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
