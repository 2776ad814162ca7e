"""Whether anything of a lab is still there: its processes, its network namespaces, its files.

Asked after every demo. Firewall tables, devices and mounts live in the namespaces and go with them; so what has to be
looked for is what could keep a namespace alive, and what the lab could have written outside of its own mounts.
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

from msgspec import Struct

from gpuguard.lab.namespaces import ROOT

WAIT_S = 3.0


class Footprint(Struct, frozen=True):
    """What a lab consists of, seen from outside: (pid, start time in ticks) and the inodes of its namespaces.

    ``boxes`` are the control groups of other guards that were there before: the only thing that a lab makes outside of
    its namespaces, and only where its guard acts; None where it does not.
    """

    processes: tuple[tuple[int, str], ...]
    namespaces: tuple[str, ...]
    boxes: tuple[str, ...] | None = None


def footprint(first: int, *, acts: bool = False) -> Footprint:
    """Return what runs below process ``first`` now, itself included. Ask before the lab's guard acts, if it may."""
    waiting, found = [first], []
    while waiting:
        pid = waiting.pop()
        with contextlib.suppress(OSError):
            found.append((pid, _start_of(pid)))
            waiting += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
    ours = _namespaces_of("self")
    theirs = {name for pid, _ in found for name in _namespaces_of(str(pid))} - ours
    return Footprint(tuple(found), tuple(sorted(theirs)), tuple(_boxes()) if acts else None)


def remaining(before: Footprint, wait_s: float = WAIT_S) -> list[str]:
    """Return what is left of it, in words; waits a moment, since the kernel tears namespaces down by and by."""
    deadline = time.monotonic() + wait_s
    while (left := _left(before)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


def _left(before: Footprint) -> list[str]:
    left = []
    for pid, start in before.processes:
        with contextlib.suppress(OSError):
            if _start_of(pid) == start:
                left.append(f"process {pid}")
    used = {name for path in Path("/proc").glob("[0-9]*") for name in _namespaces_of(path.name)}
    left += [f"namespace {name}" for name in before.namespaces if name in used]
    if before.boxes is not None:
        left += [f"control group {path}" for path in sorted(_boxes() - set(before.boxes))]
    if str(ROOT) in Path("/proc/self/mountinfo").read_text() or ROOT.exists():
        left.append(f"files in {ROOT}")
    return left


def _start_of(pid: int | str) -> str:
    """Return field 22 of /proc/PID/stat, proc(5); a zombie that its parent has yet to reap counts as gone."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    if fields[0] == "Z":
        raise ProcessLookupError(pid)
    return fields[19]


def _boxes() -> set[str]:
    """Return the control groups that guards have put somebody into (broker/actions/isolate.py)."""
    return {str(path) for path in Path("/sys/fs/cgroup").rglob("gpuguard-*") if path.is_dir()}


def _namespaces_of(process: str) -> set[str]:
    """Return the namespaces of a process; none of one that has ended and only waits to be reaped."""
    found: set[str] = set()
    with contextlib.suppress(OSError):
        _start_of(process)
        for kind in ("net", "pid", "mnt", "user"):
            found.add(str(Path(f"/proc/{process}/ns/{kind}").readlink()))
    return found
