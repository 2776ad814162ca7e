"""Who has a socket open, from the links in /proc/PID/fd.

They are read for all processes at once and only when there is a socket whose owners are not known, an owner is gone, or
what is known has aged: a socket is inherited and handed on soonest when it is young, so it is looked at again after a
quarter of a second and then at doubling ages.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, NamedTuple

from gpuguard.core.subjects import ProcessId
from gpuguard.sensors.processes.procfs import PROC, STAT_BYTES_MAX, boot_id, parse_namespace, parse_stat, read_stat

if TYPE_CHECKING:
    from pathlib import Path

LOOK_AGAIN_MIN_NS, LOOK_AGAIN_MAX_NS = 250_000_000, 30_000_000_000


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
