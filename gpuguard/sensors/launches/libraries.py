"""The libraries that are probed: every file is examined once, and those in use have room.

A probe sits on an inode, so whoever maps a known library later is seen from the first launch. How many there are is
bounded, in all and for each process that brings them; those that nobody maps any more give way to new ones.
"""

from __future__ import annotations

import os
import stat
import time
from typing import TYPE_CHECKING

from msgspec import Struct, field

from gpuguard.core.bounded import BoundedTable
from gpuguard.sensors.launches.libcuda import Library, NotProbeable, Site, read_library
from gpuguard.sensors.launches.maps import FileKey, file_key, mapped_files

if TYPE_CHECKING:
    from gpuguard._launches import Programs

FILES_MAX = 16_384
LIBRARIES_MAX = 64
#: No program needs more copies of the driver and the loaders; one that has them takes no room from others.
LIBRARIES_EACH_MAX = 8
#: When all are taken, those that nobody maps are looked for at most this often.
DROP_PERIOD_S = 30.0
#: Of a file with one of these in its name it is told why it is not probed; of all others it goes without saying.
LIBRARY_NAMES = ("libcuda.so", "libOpenCL.so", "libvulkan.so")


class Watched(Struct):
    """One library that is probed, the descriptors of its links, and the files that it was found as."""

    path: str
    library: Library
    links: list[int]
    files: set[FileKey] = field(default_factory=set)
    kept: bool = False
    #: Who brought it, 0 for the operator.
    pid: int = 0


class _Full(Exception):
    """There is no room for one more library; the message says why."""


class Libraries:
    """Every library that the programs watch, and why others are not."""

    def __init__(self, programs: Programs) -> None:
        self._programs = programs
        self._examined: BoundedTable[FileKey, None] = BoundedTable(FILES_MAX)
        self._watched: dict[tuple[object, ...], Watched] = {}
        self._dropped_s = -DROP_PERIOD_S
        self.refused: dict[str, str] = {}

    @property
    def watched(self) -> list[Watched]:
        """Return every library that is probed now."""
        return list(self._watched.values())

    def add(self, path: str, shown: str = "", *, pid: int = 0, kept: bool = False) -> bool:
        """Probe the file if it is a library of launches not yet probed; return whether it could be opened at all.

        One that is ``kept`` stays probed while nobody maps it. ``pid`` is who maps it.
        """
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError:
            return False
        try:
            found = os.fstat(fd)
            if stat.S_ISREG(found.st_mode) and file_key(found) not in self._examined:
                self._examined[file_key(found)] = None
                self._add_file(fd, found, shown or path, pid, kept=kept)
        finally:
            os.close(fd)
        return True

    def _add_file(self, fd: int, found: os.stat_result, shown: str, pid: int, *, kept: bool) -> None:
        try:
            library = _read_file(fd)
            # Two overlay mounts of one lower file are one inode to the kernel but differ in st_dev.
            key = (library.build_id, found.st_ino & 0xFFFFFFFF, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
            if key not in self._watched:
                self._make_room(pid)
                self._watched[key] = Watched(shown, library, self._attach(fd, library), kept=kept, pid=pid)
            self._watched[key].files.add(file_key(found))
            self.refused.pop(shown, None)
        except _Full as error:
            self.refuse(shown, str(error), named=False)
            self._examined.pop(file_key(found))  # there may be room for it later
        except (NotProbeable, OSError) as error:
            self.refuse(shown, str(error))

    def refuse(self, shown: str, reason: str, *, named: bool = True) -> None:
        """Keep why a file is not probed; of most that need not be said, since they are no libraries of launches."""
        if (not named or any(one in shown for one in LIBRARY_NAMES)) and len(self.refused) < LIBRARIES_MAX:
            self.refused[shown] = reason

    def _make_room(self, pid: int) -> None:
        """Give up the libraries that no process maps any more: containers come and go, each with its own copy.

        Raises
        ------
        _Full
            If all that are probed are in use, or this process has its share.
        """
        if pid and sum(one.pid == pid for one in self._watched.values()) >= LIBRARIES_EACH_MAX:
            raise _Full(f"process {pid} has brought {LIBRARIES_EACH_MAX} libraries already")
        if len(self._watched) < LIBRARIES_MAX:
            return
        if time.monotonic() - self._dropped_s >= DROP_PERIOD_S:
            self._dropped_s = time.monotonic()
            in_use = mapped_files()
            for key, one in list(self._watched.items()):
                if not one.kept and one.files.isdisjoint(in_use):
                    self._drop(key)
        if len(self._watched) >= LIBRARIES_MAX:
            raise _Full(f"{LIBRARIES_MAX} libraries are probed already")

    def _drop(self, key: tuple[object, ...]) -> None:
        one = self._watched.pop(key)
        for link in one.links:
            os.close(link)
        for file in one.files:
            self._examined.pop(file)

    def _attach(self, fd: int, library: Library) -> list[int]:
        # This name leads to the very file that was examined, whatever became of its path.
        path = f"/proc/self/fd/{fd}".encode()
        links: list[int] = []
        plan: list[tuple[str, tuple[Site, ...], bool]] = [
            ("on_entry", (*library.calls, *library.launches), False),
            ("on_return", library.calls, True),
        ]
        try:
            for program, sites, returning in plan:
                if sites:
                    offsets, cookies = [s.offset for s in sites], [s.cookie for s in sites]
                    links += self._programs.attach(program, path, offsets, cookies, returning)
        except OSError:
            for link in links:
                os.close(link)
            raise
        return links

    def close(self) -> None:
        """Detach every probe; nobody stays slowed."""
        for one in self._watched.values():
            for link in one.links:
                os.close(link)
        self._watched.clear()


def _read_file(fd: int) -> Library:
    # Never mapped: whoever shortens a mapped file kills the reader.
    return read_library(lambda at, size: os.pread(fd, size, at))
