"""Isolate: the tree keeps computing and reaches nobody but this host itself.

Order matters: a client whose connection is aborted reconnects at once, so (1) the tree goes into frozen boxes, (2) an
owned nftables table drops what the boxes send, (3) sockets that are older than their box, which the kernel goes on to
count to the old cgroup, get a mark that the table drops too, (4) established TCP connections to elsewhere are aborted,
(5) the boxes thaw. Loopback stays open: a training job talks to itself there, and its harness to it; what leaves the
host through a local proxy of somebody else is therefore not cut (docs/adr/0002-isolate.md). Sockets that somebody
outside the tree holds as well are left alone and counted. AF_PACKET sockets bypass netfilter's output hook.

Where no box can be made (no root, no cgroup v2), every five-tuple of the tree is dropped and aborted, again at each
`verify`: a new connection lives for a moment, and no stranger is ever hit.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import socket
from typing import TYPE_CHECKING

from msgspec import Struct, field

from gpuguard import proctree
from gpuguard.broker import boxes
from gpuguard.broker.actions import Effect, Namespace
from gpuguard.broker.journal import Plan
from gpuguard.netlink import Diagnosis, Flow, Table, cgroup_rule, flow_rule, mark_rule
from gpuguard.proctree import PROC, Member

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gpuguard.broker.actions import Job

SOCKETS_MAX = 65_536
FLOW_RULES_MAX = 1024
_LISTEN = 10
_PIDFD_GETFD = 438
_MARK_BASE = 0x6700_0000
#: Without the bits by which kube-proxy marks packets to be dropped or masqueraded (0x8000, 0x4000).
_MARK_FREE = 0x00FF_3FFF
#: PROC_CGROUP_INIT_INO of linux/proc_ns.h.
_FIRST_CGROUP_NAMESPACE = 0xEFFF_FFFB
_LOOPBACK_V6 = bytes(15) + b"\1"
_MAPPED = bytes(10) + b"\xff\xff"


class Cut(Struct):
    """What was done to the sockets of a tree."""

    aborted: int = 0
    marked: int = 0
    shared: int = 0
    unreadable: int = 0
    notes: list[str] = field(default_factory=list)


def apply(job: Job) -> Effect:
    """Cut the tree off."""
    mark = _MARK_BASE | secrets.randbits(24) & _MARK_FREE
    usable = boxes.mount() is not None and _counts_from_the_root()
    plan = Plan(boxes=boxes.plan(proctree.tree([job.root.pid])) if usable else ())
    job.record(plan)
    members, plan = _box(job, plan)
    effect = Effect(text="", plan=plan, members=members, mark=mark)
    try:
        rules = [cgroup_rule(boxes.cgroup_id(box.path), boxes.level(box.path)) for box in plan.boxes]
        for inode, pid in _namespaces(members).items():
            with _namespace(pid) as descriptor:
                table = Table(f"gpuguard-{mark:x}", [*rules, mark_rule(mark)], descriptor)
            effect.namespaces.append(Namespace(inode, table))
        boxes.wait_frozen(plan.boxes)
        cut = _cut(effect)
        for box in plan.boxes:
            boxes.freeze(box, on=False)
    except OSError:
        undo(plan, effect, job.keep)
        raise
    effect.text = _describe(effect, cut)
    return effect


def _counts_from_the_root() -> bool:
    """Return whether levels as we count them are the kernel's: before Linux 6.11 it ignored cgroup namespaces."""
    return (PROC / "self/ns/cgroup").stat().st_ino == _FIRST_CGROUP_NAMESPACE


def _box(job: Job, plan: Plan) -> tuple[list[Member], Plan]:
    """Put the tree into boxes; where this host allows none, go without."""
    if plan.boxes:
        try:
            return boxes.fill(job.root, plan.boxes), plan
        except OSError:
            boxes.empty_all(plan.boxes, job.keep)
    return proctree.tree([job.root.pid]), Plan()


def _describe(effect: Effect, cut: Cut) -> str:
    how = "cut off by cgroup" if effect.plan.boxes else "cut off by five-tuple (no cgroup v2 here: weaker)"
    parts = [f"{len(effect.members)} processes {how} in {len(effect.namespaces)} network namespaces, loopback open",
             f"{cut.aborted} connections aborted", f"{cut.marked} older sockets marked"]
    if cut.shared:
        parts.append(f"{cut.shared} sockets shared with processes outside the tree left alone")
    if cut.unreadable:
        parts.append(f"{cut.unreadable} processes whose sockets could not be read")
    return "; ".join(parts + cut.notes[:4])


def _namespaces(members: list[Member]) -> dict[int, int]:
    """Return one pid for each network namespace of the tree."""
    found: dict[int, int] = {}
    for one in members:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            found.setdefault((PROC / str(one.pid) / "ns/net").stat().st_ino, one.pid)
    return found


@contextlib.contextmanager
def _namespace(pid: int) -> Iterator[int | None]:
    """Open the network namespace of a process; None for our own, so that no privilege is needed to enter it."""
    if (PROC / str(pid) / "ns/net").stat().st_ino == (PROC / "self/ns/net").stat().st_ino:
        yield None
        return
    descriptor = os.open(PROC / str(pid) / "ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _sockets(pid: int) -> dict[int, int]:
    """Return descriptor by socket inode of one process; raises `OSError` if it may not be looked at."""
    found: dict[int, int] = {}
    folder = PROC / str(pid) / "fd"
    for name in os.listdir(folder):
        with contextlib.suppress(FileNotFoundError):
            link = str((folder / name).readlink())
            if link.startswith("socket:[") and len(found) < SOCKETS_MAX:
                found[int(link[8:-1])] = int(name)
    return found


def _owned(members: list[Member], cut: Cut) -> dict[int, tuple[int, int]]:
    """Return (pid, descriptor) by inode of the sockets that only the tree holds."""
    inside = {one.pid for one in members}
    owned: dict[int, tuple[int, int]] = {}
    for one in members:
        try:
            owned.update({inode: (one.pid, number) for inode, number in _sockets(one.pid).items()})
        except (FileNotFoundError, ProcessLookupError):
            continue
        except OSError:
            cut.unreadable += 1
    for name in os.listdir(PROC) if owned else []:
        if not name.isdigit() or int(name) in inside:
            continue
        try:
            foreign = _sockets(int(name)).keys() & owned.keys()
        except (FileNotFoundError, ProcessLookupError):
            continue
        except OSError:
            # Not even root may see into it. It could share a socket; that we do not know is said, and we go on.
            cut.unreadable += 1
            continue
        for inode in foreign:
            del owned[inode]
            cut.shared += 1
    return owned


def _cut(effect: Effect) -> Cut:
    """Mark and abort what the tree has open. Run again, it finds what is new."""
    cut = Cut()
    owned = _owned(effect.members, cut)
    for pid in {pid for pid, _ in owned.values()}:
        _mark(pid, [number for owner, number in owned.values() if owner == pid], effect.mark, cut)
    for space in effect.namespaces:
        inside = _namespaces(effect.members).get(space.inode)
        if inside is not None:
            with _namespace(inside) as descriptor:
                diagnosis = Diagnosis(descriptor)
            try:
                _abort(space, diagnosis, owned, cut, by_flow=not effect.plan.boxes)
            finally:
                diagnosis.close()
    return cut


def _mark(pid: int, numbers: list[int], mark: int, cut: Cut) -> None:
    """Mark sockets of another process through pidfd_getfd(2); those of other families are left as they are."""
    before = 0 if mark else None
    try:
        with _pidfd(pid) as pidfd:
            for number in numbers:
                cut.marked += _set_mark(pidfd, number, mark, before)
    except PermissionError as error:
        cut.notes.append(f"sockets of pid {pid} could not be marked: {error}")
    except ProcessLookupError:
        return


@contextlib.contextmanager
def _pidfd(pid: int) -> Iterator[int]:
    descriptor = os.pidfd_open(pid)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _set_mark(pidfd: int, number: int, mark: int, before: int | None) -> bool:
    """Set SO_MARK, unless the socket has a mark of somebody else; return whether it was set."""
    copy = ctypes.CDLL(None, use_errno=True).syscall(_PIDFD_GETFD, pidfd, number, 0)
    if copy < 0:
        error = ctypes.get_errno()
        if error in (1, 13):
            raise PermissionError(error, os.strerror(error))
        return False
    with socket.socket(fileno=copy) as opened:
        if opened.family not in (socket.AF_INET, socket.AF_INET6):
            return False
        now = opened.getsockopt(socket.SOL_SOCKET, socket.SO_MARK)
        if before is not None and now != before:
            return False
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
        return True


def _abort(space: Namespace, diagnosis: Diagnosis, owned: dict[int, tuple[int, int]], cut: Cut, *,
           by_flow: bool) -> None:
    protocols = (socket.IPPROTO_TCP, socket.IPPROTO_UDP) if by_flow else (socket.IPPROTO_TCP,)
    flows = [flow for protocol in protocols for flow in diagnosis.flows(protocol)
             if flow.inode in owned and flow.state != _LISTEN and not is_local(flow)]
    if by_flow:
        new = [flow for flow in flows if flow.id not in space.flows][: FLOW_RULES_MAX - len(space.flows)]
        space.table.add(flow_rule(flow) for flow in new)
        space.flows.update(flow.id for flow in new)
    for flow in flows:
        try:
            cut.aborted += flow.protocol == socket.IPPROTO_TCP and diagnosis.destroy(flow)
        except OSError as error:
            cut.notes.append(f"SOCK_DESTROY: {error}")
            return


def is_local(flow: Flow) -> bool:
    """Return whether both ends are this host (loopback, or an address of ours talking to itself)."""
    size = len(flow.addresses) // 2
    near, far = flow.addresses[:size], flow.addresses[size:]
    loopback = far[0] == 127 if size == 4 else far == _LOOPBACK_V6 or far[:13] == _MAPPED + b"\x7f"
    return loopback or (near == far and any(far))


def verify(effect: Effect) -> str:
    """Return what does not hold any more; strays are put back, and new connections are cut again."""
    gone = [space.inode for space in effect.namespaces if not space.table.is_there()]
    if gone:
        return f"the table in network namespace {gone[0]} is gone"
    if effect.plan.boxes:
        out = boxes.strays(effect.members, effect.plan.boxes)
        if out:
            boxes.recapture(out, effect.plan.boxes)
            _cut(effect)
            return f"{len(out)} processes had left the box and were put back"
        return ""
    effect.members = proctree.tree([one.pid for one in _still(effect.members)])
    cut = _cut(effect)
    return f"{cut.aborted} new connections aborted" if cut.aborted else ""


def _still(members: list[Member]) -> list[Member]:
    return [one for one in members if (now := proctree.member(one.pid)) and now.start_ticks == one.start_ticks]


def undo(plan: Plan, effect: Effect | None, keep: frozenset[str]) -> str:
    """Take the tables away, the marks off, and put everybody back. Aborted connections stay aborted."""
    texts = []
    if effect is not None:
        for space in effect.namespaces:
            space.table.close()
        _unmark(effect)
        texts.append(f"{len(effect.namespaces)} tables removed")
        effect.namespaces.clear()
    texts.append(boxes.empty_all(plan.boxes, keep))
    return "; ".join(filter(None, texts)) or "its table went with the process that held it"


def _unmark(effect: Effect) -> None:
    """Take our mark off. Without the table it drops nothing, but it should not stay behind."""
    boxed = [pid for box in effect.plan.boxes for pid in boxes.pids(box)]
    for pid in dict.fromkeys([*boxed, *(one.pid for one in _still(effect.members))]):
        try:
            numbers = list(_sockets(pid).values())
            with _pidfd(pid) as pidfd:
                for number in numbers:
                    _set_mark(pidfd, number, 0, effect.mark)
        except OSError:
            # Gone meanwhile, or not ours to look at: then we did not mark it either.
            continue
