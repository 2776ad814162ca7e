"""What the processes of this host map, and where that lies: /proc as the broker reads it."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from gpuguard.proctree import lines_of
from gpuguard.redaction import printable

if TYPE_CHECKING:
    from collections.abc import Iterator

MAPS_PER_SCAN = 128
#: So many more are read though nothing changed: who maps one file in the place of another keeps his size.
MAPS_IN_TURN = 2

#: Device, inode, time of change and size: one state of one file.
FileKey = tuple[int, int, int, int]
#: Device, inode and path of a mapped file, as /proc/PID/maps shows them.
Mapped = tuple[str, str, str]


class ChangedMaps:
    """Which processes may map something new: those whose address space changed its size, and a few more in turn."""

    def __init__(self) -> None:
        self._sizes: dict[int, bytes] = {}
        self._turn = 0

    def take(self) -> list[int]:
        """Return the processes whose address space changed size since they were last returned."""
        sizes: dict[int, bytes] = {}
        changed: list[int] = []
        pids = sorted(int(name) for name in os.listdir("/proc") if name.isdigit())
        # Begun where the last one ended, so that a host with too many changes is looked through all the same.
        pids = [*(pid for pid in pids if pid > self._turn), *(pid for pid in pids if pid <= self._turn)]
        in_turn = set(pids[:MAPS_IN_TURN])
        self._turn = pids[min(MAPS_IN_TURN, len(pids)) - 1]
        for pid in pids:
            size = _address_space(pid)
            before = self._sizes.get(pid)
            if (size == before and pid not in in_turn) or size in (b"", b"0"):
                sizes[pid] = size
            elif len(changed) < MAPS_PER_SCAN:
                changed.append(pid)
                sizes[pid] = size
            elif before is not None:
                sizes[pid] = before
        self._sizes = sizes
        return changed

    def again(self, pid: int) -> None:
        """Return this process the next time, changed or not."""
        self._sizes.pop(pid, None)


def start_ticks_of(pid: int) -> int:
    """Return field 22 of /proc/PID/stat, proc(5). OSError if there is no such process."""
    text = Path(f"/proc/{pid}/stat").read_bytes()
    return int(text[text.rindex(b")") + 2:].split()[19])


def read_maps(pid: int) -> bytes:
    """Return what /proc/PID/maps says, b"" if there is no such process."""
    try:
        return Path(f"/proc/{pid}/maps").read_bytes()
    except OSError:
        return b""


def executable_maps(pid: int, maps: bytes) -> Iterator[tuple[str, Mapped]]:
    """Yield every executable mapping of a file: the path that opens it, and its device, inode and path as shown.

    A mapped file may be deleted, a memfd, or in another mount namespace: /proc/PID/map_files leads to it all the same.
    Only a newline ends a line, see `proctree.lines_of`.
    """
    for line in maps.decode(errors="replace").split("\n"):
        fields = line.split(None, 5)
        if len(fields) == 6 and "x" in fields[1] and fields[4] != "0":
            yield f"/proc/{pid}/map_files/{fields[0]}", (fields[3], fields[4], printable(fields[5]))


def mapped_files() -> set[FileKey]:
    """Return every file that any process maps to execute. It reads all maps: not for every day."""
    found: set[FileKey] = set()
    for name in os.listdir("/proc"):
        if name.isdigit():
            for path, _ in executable_maps(int(name), read_maps(int(name))):
                with contextlib.suppress(OSError):
                    found.add(file_key(os.stat(path)))  # noqa: PTH116 - a link that leads to no path
    return found


def file_key(found: os.stat_result) -> FileKey:
    """Return which state of which file this is."""
    return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size


def _address_space(pid: int) -> bytes:
    """Return the size of the address space in pages as /proc/PID/statm says it, b"" if there is no such process."""
    try:
        fd = os.open(f"/proc/{pid}/statm", os.O_RDONLY | os.O_CLOEXEC)
        try:
            return os.read(fd, 64).split(b" ", 1)[0]
        finally:
            os.close(fd)
    except OSError:
        return b""


def fuse_mounts(pid: int) -> dict[str, str]:
    """Return the type by device, as maps has it, of what this process sees of file systems served by programs."""
    try:
        lines = lines_of(Path(f"/proc/{pid}/mountinfo"))
    except OSError:
        return {}
    found: dict[str, str] = {}
    for line in lines:
        before, _, after = line.partition(" - ")
        if after.startswith("fuse"):
            major, _, minor = before.split(" ", 3)[2].partition(":")
            found[f"{int(major):02x}:{int(minor):02x}"] = after.split(" ", 1)[0]
    return found


def file_system(pid: int, fd: int) -> str:
    """Return the type of the file system that a file of this process lies on, "" if its mount is not shown."""
    fields = dict(line.split(":", 1) for line in lines_of(Path(f"/proc/self/fdinfo/{fd}")))
    mount = fields["mnt_id"].strip()
    for line in lines_of(Path(f"/proc/{pid}/mountinfo")):
        before, _, after = line.partition(" - ")
        if before.split(" ", 1)[0] == mount:
            return after.split(" ", 1)[0]
    return ""


def cached_libraries() -> list[str]:
    """Return the driver libraries that the dynamic linker would find, by its own cache."""
    try:
        text = Path("/etc/ld.so.cache").read_bytes()
    except OSError:
        return []
    return sorted({found.decode() for found in re.findall(rb"/[\x21-\x7e]{0,512}/libcuda\.so\.1(?=\0)", text)})
