"""The broker's half: the loaded programs, the libraries that they watch, and the search for new ones."""

from __future__ import annotations

import itertools
import os
import select
import time
from pathlib import Path
from typing import TYPE_CHECKING

from gpuguard.broker import boundary
from gpuguard.messages import Opened
from gpuguard.sensors import EyeClosed
from gpuguard.sensors.launches.libraries import LIBRARY_NAMES, Libraries
from gpuguard.sensors.launches.maps import ChangedMaps, Mapped, executable_maps, fuse_mounts, read_maps
from gpuguard.sensors.launches.rows import Sweeper

if TYPE_CHECKING:
    from collections.abc import Iterable

    from gpuguard._launches import Programs

OBJECT = Path(__file__).parents[2] / "bpf" / "launches.bpf.o"
INITIAL_PID_NAMESPACE = 0xEFFFFFFC  # PROC_PID_INIT_INO, linux/proc_ns.h

#: What examining new files may take, in all and for one process: nobody keeps the others waiting.
SCAN_S, SCAN_EACH_S = 0.35, 0.1
PIDS_PER_REQUEST = 1_024
SEEN_MAX = 16_384
#: A mapped file is not opened again for this long; then it is, since inode numbers are reused.
SEEN_S = 30.0


class LaunchProbe:
    """The loaded programs and every library that they watch. Closing it, or the end of the process, detaches all."""

    def __init__(self, programs: Programs) -> None:
        self._programs = programs
        self.boundary = boundary.Boundary(programs.quotas_fd, programs.quotas_held_fd)
        self.libraries = Libraries(programs)
        self._changed = ChangedMaps()
        self._seen: set[Mapped] = set()
        #: What each process mapped, by its hash, where all of that is among what was seen.
        self._nothing_new: dict[int, int] = {}
        self._seen_since_s = time.monotonic()
        self._sweeper = Sweeper(programs)

    def open_handles(self) -> tuple[Opened, list[int]]:
        """Return what the guard gets: the ring, and rows and counters that it can only read."""
        from gpuguard import _launches

        epoll = select.epoll()
        epoll.register(self._programs.ring_fd, select.EPOLLIN)
        descriptors = [
            os.dup(self._programs.ring_fd),
            _launches.read_only(self._programs.rows_fd),
            _launches.read_only(self._programs.counters_fd),
            os.dup(epoll.fileno()),
        ]
        epoll.close()
        values = {"ring_bytes": self._programs.ring_bytes, "rows_max": self._programs.rows_max}
        answer = Opened(("events", "rows", "counters", "epoll"), self.describe(), values | self._counts())
        return answer, descriptors

    def describe(self) -> str:
        """Say what is probed and at which cost, for people."""
        watched = self.libraries.watched
        sites = [site for one in watched for site in (*one.library.launches, *one.library.calls)]
        slow = sorted({site.symbol for site in sites if site.cost == "single-step"})
        how = "perf uprobes one by one, seconds to detach" if self._programs.single else "uprobe_multi"
        text = f"{how}, {len(watched)} libraries, {len(sites)} sites"
        if slow:
            text += f"; single-stepped, some 20 us a call: {', '.join(slow)}"
        refused = [f"{path}: {reason}" for path, reason in self.libraries.refused.items()]
        return "; ".join([text, *refused])

    def scan(self, pids: Iterable[int], rows_read_ns: int = 0) -> Opened:
        """Look for libraries in the maps of these processes; none named: of all whose address space changed.

        Idle rows that were read, at ``rows_read_ns`` of CLOCK_BOOTTIME or before, are swept.
        """
        chosen = list(itertools.islice(pids, PIDS_PER_REQUEST)) or self._changed.take()
        if time.monotonic() - self._seen_since_s > SEEN_S or max(len(self._seen), len(self._nothing_new)) > SEEN_MAX:
            self._seen.clear()
            self._nothing_new.clear()
            self._seen_since_s = time.monotonic()
        end_s = time.monotonic() + SCAN_S
        for pid in chosen:
            if not self._look(pid, min(end_s, time.monotonic() + SCAN_EACH_S)):
                self._changed.again(pid)  # the rest at the next scan
        self._sweeper.sweep(rows_read_ns)
        return Opened((), self.describe(), self._counts())

    def _look(self, pid: int, end_s: float) -> bool:
        """Examine what this process maps, what is called like a driver first; return whether there was time for all."""
        maps = read_maps(pid)
        if self._nothing_new.get(pid) == hash(maps):
            return True
        fresh = [(path, mapped) for path, mapped in executable_maps(pid, maps) if mapped not in self._seen]
        if maps and not fresh:
            self._nothing_new[pid] = hash(maps)
        fresh.sort(key=lambda one: not any(name in one[1][2] for name in LIBRARY_NAMES))
        remote: dict[str, str] | None = None
        for done, (path, mapped) in enumerate(fresh):
            if done and time.monotonic() > end_s:
                return False
            device, _, shown = mapped
            remote = fuse_mounts(pid) if remote is None else remote
            if device in remote:
                self.libraries.refuse(shown, f"it lies on {remote[device]}, whose server could let us wait")
                self._seen.add(mapped)
            elif self.libraries.add(path, shown, pid=pid):
                self._seen.add(mapped)
        return True

    def _counts(self) -> dict[str, int]:
        return {"libraries": len(self.libraries.watched), "refused": len(self.libraries.refused)}

    def close(self) -> None:
        """Detach everything and unload; nobody stays slowed."""
        self.boundary.close()
        self.libraries.close()
        self._programs.close()


def new_probe() -> LaunchProbe:
    """Load the programs; nothing is probed yet.

    Raises
    ------
    EyeClosed
        If this build lacks the loader or the object.
    OSError
        If the kernel refuses.
    """
    try:
        from gpuguard import _launches
    except ImportError as error:
        raise EyeClosed(f"built without libbpf, or libbpf.so.1 is missing: {error}") from error
    if not OBJECT.is_file():
        raise EyeClosed(f"{OBJECT.name} is missing: this build was made without clang")
    namespace = os.stat("/proc/self/ns/pid").st_ino  # noqa: PTH116 - a link that leads to no path
    namespace = 0 if namespace == INITIAL_PID_NAMESPACE else namespace
    programs = _launches.Programs(str(OBJECT), namespace)
    if not _has_multi(programs):
        programs.close()
        programs = _launches.Programs(str(OBJECT), namespace, single=True)
    return LaunchProbe(programs)


def _has_multi(programs: Programs) -> bool:
    return programs.has_multi()
