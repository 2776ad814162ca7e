"""One process and all that it started, named so that nothing else can be meant: pidfd, start time, cgroup.

A pid alone names nobody (pids are reused within seconds), so each is opened as a pidfd first, pidfd_open(2), and its
start time is compared afterwards: if both agree, the descriptor is that process for as long as it is held.
Field numbers are those of proc(5), ``/proc/PID/stat``.
"""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec import Struct

from gpuguard.core.subjects import ENVIRON_LISTED, Context, ProcessId, context_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

PROC = Path("/proc")
BOX_PREFIX = "gpuguard-"
PASSES_MAX = 64
ENVIRON_BYTES_MAX = 256 * 1024
_PF_KTHREAD = 0x0020_0000


class Refusal(Exception):
    """It may not be done; the message says why, for people. Nothing was touched."""


class Member(Struct, frozen=True):
    """One process as ``/proc/PID/stat`` showed it at one moment."""

    pid: int
    start_ticks: int
    parent: int
    state: str
    flags: int
    threads: int = 1

    @property
    def is_kernel_thread(self) -> bool:
        """PF_KTHREAD of linux/sched.h."""
        return bool(self.flags & _PF_KTHREAD)

    @property
    def is_gone(self) -> bool:
        """A zombie runs nothing any more; one whose first thread ended while others go on is shown as Z and is none."""
        return self.state in "ZX" and self.threads <= 1


def lines_of(path: Path, errors: str = "replace") -> list[str]:
    """Return the lines of a file of /proc.

    Only a newline ends one, which the kernel keeps out of names: proc(5), seq_path() of the kernel, cgroup_mkdir(). A
    tenant may put all else that Python takes for an end (carriage return, U+001C, U+0085 ...) into the name of a file,
    a mount, a cgroup or a process, and with it a line of his own.
    """
    text = path.read_bytes().decode(errors=errors)
    return text.removesuffix("\n").split("\n") if text else []


def boot_id() -> str:
    """Return the id of this boot, random(4)."""
    return (PROC / "sys/kernel/random/boot_id").read_text().strip()


def parse_stat(text: str) -> Member:
    """Return what a line of ``/proc/PID/stat`` says. The name may hold spaces and parentheses: the last one ends it."""
    head, _, tail = text.rpartition(")")
    fields = tail.split()
    return Member(pid=int(head.split(" ", 1)[0]), state=fields[0], parent=int(fields[1]), flags=int(fields[6]),
                  start_ticks=int(fields[19]), threads=int(fields[17]))


def member(pid: int) -> Member | None:
    """Return the process that has this pid now, None if there is none."""
    try:
        return parse_stat((PROC / str(pid) / "stat").read_text(errors="replace"))
    except (FileNotFoundError, ProcessLookupError):
        return None


def everybody() -> dict[int, Member]:
    """Return all processes by pid, as one pass over /proc saw them."""
    found = (member(int(name)) for name in os.listdir(PROC) if name.isdigit())
    return {one.pid: one for one in found if one is not None}


def identify(pid: int) -> ProcessId:
    """Return who has this pid now; raises `Refusal` if nobody has."""
    seen = member(pid)
    if seen is None:
        raise Refusal(f"there is no process {pid}")
    return ProcessId(boot_id(), pid, seen.start_ticks)


@contextlib.contextmanager
def held(process: ProcessId) -> Iterator[int]:
    """Open exactly this process as a pidfd; raises `Refusal` if it is gone or the pid is another's by now."""
    if process.boot_id != boot_id():
        raise Refusal(f"pid {process.pid} was meant in another boot of this host")
    try:
        descriptor = os.pidfd_open(process.pid)
    except (ProcessLookupError, OverflowError, OSError) as error:
        raise Refusal(f"there is no process {process.pid} any more: {error}") from error
    try:
        seen = member(process.pid)
        if seen is None or seen.is_gone:
            raise Refusal(f"process {process.pid} has ended")
        if seen.start_ticks != process.start_ticks:
            raise Refusal(f"pid {process.pid} is another process by now: it started at tick {seen.start_ticks}, "
                          f"not {process.start_ticks}")
        yield descriptor
    finally:
        os.close(descriptor)


def send(one: Member, number: signal.Signals, boot: str) -> bool:
    """Send a signal to exactly this process; return whether it was still there."""
    try:
        with held(ProcessId(boot, one.pid, one.start_ticks)) as descriptor:
            signal.pidfd_send_signal(descriptor, number)
    except (Refusal, ProcessLookupError):
        return False
    return True


def tree(roots: Iterable[int], known: dict[int, Member] | None = None) -> list[Member]:
    """Return these processes and all their descendants, parents before children, without the dead.

    A child that is older than its parent is no child: its parent's pid was reused.
    """
    processes = everybody() if known is None else known
    children: dict[int, list[Member]] = {}
    for one in processes.values():
        children.setdefault(one.parent, []).append(one)
    found: dict[int, Member] = {}
    queue = [processes[pid] for pid in roots if pid in processes]
    while queue:
        one = queue.pop(0)
        if one.pid in found:
            continue
        found[one.pid] = one
        queue.extend(c for c in children.get(one.pid, ()) if c.start_ticks >= one.start_ticks)
    return [one for one in found.values() if not one.is_gone]


def each_of_tree(root: Member, put: Callable[[list[Member]], None]) -> list[Member]:
    """Call ``put`` with the tree's new members until a pass over /proc finds no new one; return all of them.

    ``put`` stops them, so they cannot fork any more and the passes end. Raises `OSError` when they do not.
    """
    done: dict[tuple[int, int], Member] = {}
    for _ in range(PASSES_MAX):
        now = everybody()
        alive = [pid for pid, ticks in done if pid in now and now[pid].start_ticks == ticks]
        if root.pid in now and now[root.pid].start_ticks == root.start_ticks:
            alive.append(root.pid)
        new = [one for one in tree(alive, now) if (one.pid, one.start_ticks) not in done]
        if not new:
            return list(done.values())
        put(new)
        done.update({(one.pid, one.start_ticks): one for one in new})
    raise OSError(f"the tree of process {root.pid} grows faster than it can be stopped")


def cgroups_of(pid: int) -> tuple[str, str]:
    """Return the paths in the v2 hierarchy and in systemd's own of a v1 or hybrid host, "" for none, cgroups(7)."""
    try:
        lines = lines_of(PROC / str(pid) / "cgroup")
    except (FileNotFoundError, ProcessLookupError):
        return "", ""
    paths = {line.split(":", 2)[1]: line.split(":", 2)[2] for line in lines if line.count(":") >= 2}
    return paths.get("", ""), paths.get("name=systemd", "")


def cgroup_of(pid: int) -> str:
    """Return the path in the v2 hierarchy, systemd's on a v1 host, "" where there is neither."""
    unified, systemd = cgroups_of(pid)
    return unified or systemd


def without_boxes(cgroup: str) -> str:
    """Return the cgroup that a process was in before we put it into a box of ours."""
    while cgroup.rpartition("/")[2].startswith(BOX_PREFIX):
        cgroup = cgroup.rpartition("/")[0] or "/"
    return cgroup


def listed_environ(pid: int) -> dict[str, str]:
    """Return the listed variables of a process; nothing else leaves the buffer. Unreadable: none."""
    try:
        with (PROC / str(pid) / "environ").open("rb") as stream:
            raw = stream.read(ENVIRON_BYTES_MAX)
    except OSError:
        return {}
    found = {}
    for item in raw.split(b"\0"):
        name, _, value = item.partition(b"=")
        if name.decode(errors="replace") in ENVIRON_LISTED:
            found[name.decode()] = value.decode(errors="replace")
    return found


def _topmost(chosen: set[int], processes: dict[int, Member]) -> list[int]:
    """Return those whose ancestors are not chosen themselves."""
    top = []
    for pid in sorted(chosen):
        above, seen = processes[pid].parent, {pid}
        while above in processes and above not in seen and above not in chosen:
            seen.add(above)
            above = processes[above].parent
        if above not in chosen:
            top.append(pid)
    return top


def _roots(matches: Callable[[str, Context, dict[str, str]], bool]) -> list[ProcessId]:
    boot, processes, chosen = boot_id(), everybody(), set[int]()
    for one in processes.values():
        if one.is_kernel_thread or one.is_gone or one.pid == os.getpid():
            continue
        environ = listed_environ(one.pid)
        cgroup = cgroup_of(one.pid)
        if matches(cgroup, context_of(cgroup, environ), environ):
            chosen.add(one.pid)
    return [ProcessId(boot, pid, processes[pid].start_ticks) for pid in _topmost(chosen, processes)]


def agent_roots(name: str) -> list[ProcessId]:
    """Return the topmost processes of an agent: by sandbox id, container id (12 digits or more), or cgroup name."""

    def matches(cgroup: str, context: Context, _: dict[str, str]) -> bool:
        parts = {part.removesuffix(".scope").removesuffix(".service") for part in cgroup.split("/")}
        container = len(name) >= 12 and context.container_id.startswith(name)
        return context.sandbox_id == name or container or name.removesuffix(".scope").removesuffix(".service") in parts

    return _roots(matches) if name else []


def job_roots(job: str) -> list[ProcessId]:
    """Return the topmost processes of a Slurm or Ray job."""

    def matches(_: str, context: Context, environ: dict[str, str]) -> bool:
        return job in (context.slurm_job_id, environ.get("RAY_JOB_ID"))

    return _roots(matches) if job else []
