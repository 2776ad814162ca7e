"""What a process has in its memory: the files that it maps, each once, and on request the rest.

A file is opened through /proc/PID/map_files, which leads to the very inode that is mapped, also when its name is gone
or lies in another mount namespace; without the right to follow those links, by its name below /proc/PID/root. Sources:
proc_pid_maps(5), proc_pid_map_files(5), proc_pid_mem(5).
"""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

from gpuguard.code.scanning import Target
from gpuguard.code.worker import REGIONS_MAX
from gpuguard.proctree import PROC

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MAPS_LINES_MAX = 1_000_000


def targets_of(pid: int, *, memory: bool = False) -> Iterator[Target]:
    """Yield what to read of a process. Raise OSError where its maps cannot be read.

    ``memory``: also what it has in memory that is in no file, such as code that it unpacked itself.
    """
    folder = PROC / str(pid)
    seen: set[tuple[str, str]] = set()
    regions: list[tuple[int, int]] = []
    with (folder / "maps").open("rb") as lines:
        for number, line in enumerate(lines):
            if number >= MAPS_LINES_MAX:
                break
            span, rights, _, device, inode, *name = line.rstrip(b"\n").split(None, 5)
            if inode != b"0":
                key = (device.decode(), inode.decode())
                if key not in seen:
                    seen.add(key)
                    yield from _file(folder, span.decode(), os.fsdecode(name[0]) if name else "")
            elif rights.startswith(b"r") and not (name and name[0].startswith((b"[v", b"[sigpage"))):
                start, end = (int(part, 16) for part in span.split(b"-"))
                regions.append((start, end))
    if memory:
        for at in range(0, len(regions), REGIONS_MAX):
            yield Target(f"/proc/{pid}/mem", str(folder / "mem"), regions=tuple(regions[at:at + REGIONS_MAX]))


def _file(folder: Path, span: str, name: str) -> Iterator[Target]:
    """Yield the mapped file if it is one: devices are mapped too."""
    for opened in (folder / "map_files" / span, folder / "root" / name.lstrip("/")):
        try:
            if not stat.S_ISREG(opened.stat().st_mode):
                return
            opened.open("rb").close()
        except OSError:
            continue
        yield Target(name, str(opened))
        return
    yield Target(name, str(folder / "map_files" / span))
