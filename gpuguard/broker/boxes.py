"""Boxes: a fresh cgroup below the one that a condemned process is in, holding its tree and nothing else.

Why a child of the old cgroup and not one of our own elsewhere: limits of the job go on to hold, its accounting stays
right, and whoever removes the job finds all of it (docs/adr/0002-isolate.md). Every box is filled while frozen: a
process that enters stops, so it can neither fork past us nor exit and orphan a child.
Source: Documentation/admin-guide/cgroup-v2.rst, sections 2.3 and 5.1 (cgroup.procs, cgroup.freeze, cgroup.events).
"""

from __future__ import annotations

import contextlib
import itertools
import secrets
import time
from pathlib import Path

from msgspec import Struct

from gpuguard import proctree
from gpuguard.proctree import BOX_PREFIX, PROC, Member

FREEZE_WAIT_S = 0.5
REMOVE_WAIT_S = 0.5
_POLL_S = 0.002


class Box(Struct, frozen=True):
    """One box. Its name holds 48 random bits, so that a path can only ever mean this one."""

    path: str
    origin: str


def mount() -> Path | None:
    """Return where the whole cgroup v2 hierarchy is mounted for writing, None if it is not."""
    for line in proctree.lines_of(PROC / "self/mountinfo", "surrogateescape"):
        before, _, after = line.partition(" - ")
        fields = before.split(" ")
        if after.startswith("cgroup2 ") and fields[3] == "/" and "rw" in fields[5].split(","):
            return Path(fields[4])
    return None


def folder(cgroup: str) -> Path:
    """Return the folder of a cgroup; raises `FileNotFoundError` where there is no v2 hierarchy to be written."""
    root = mount()
    if root is None:
        raise FileNotFoundError("no cgroup v2 hierarchy is mounted for writing")
    if not cgroup.startswith("/") or ".." in cgroup.split("/"):
        raise FileNotFoundError(f"cgroup {cgroup!r} lies outside of what is mounted here")
    return root / cgroup[1:]


def cgroup_id(cgroup: str) -> int:
    """Return the id (inode) of a cgroup, 0 if it cannot be known."""
    try:
        return folder(cgroup).stat().st_ino
    except OSError:
        return 0


def systemd_cgroup_id(cgroup: str) -> int:
    """Return the inode of a cgroup in systemd's own v1 hierarchy, 0 if there is none."""
    path = Path("/sys/fs/cgroup/systemd") / cgroup.lstrip("/")
    try:
        return path.stat().st_ino if cgroup and ".." not in cgroup.split("/") else 0
    except OSError:
        return 0


def level(cgroup: str) -> int:
    """Return how deep below the root a cgroup is, as nft's ``socket cgroupv2 level`` counts."""
    return len([part for part in cgroup.split("/") if part])


def plan(members: list[Member]) -> tuple[Box, ...]:
    """Return one box for each cgroup that the tree lives in. Nothing is made yet: this is for the journal."""
    origins = dict.fromkeys(proctree.cgroup_of(one.pid) for one in members)
    return tuple(Box(path=f"{origin.rstrip('/')}/{BOX_PREFIX}{secrets.token_hex(6)}", origin=origin)
                 for origin in origins if origin)


def fill(root: Member, boxes: tuple[Box, ...]) -> list[Member]:
    """Make the boxes, frozen, and put the tree of ``root`` in; return who is in. Raises `OSError`, half done."""
    for box in boxes:
        folder(box.path).mkdir()
        freeze(box, on=True)
    by_origin = {box.origin: box for box in boxes}

    def put(new: list[Member]) -> None:
        for one in new:
            origin = proctree.cgroup_of(one.pid)
            if origin in by_origin:
                _enter(one, by_origin[origin].path, origin)
            elif not any(_inside(origin, box) for box in boxes) and proctree.member(one.pid):
                raise OSError(f"process {one.pid} went to cgroup {origin} meanwhile")

    return proctree.each_of_tree(root, put)


def _inside(cgroup: str, box: Box) -> bool:
    return cgroup == box.path or cgroup.startswith(box.path + "/")


def _enter(one: Member, cgroup: str, origin: str) -> None:
    """Move one process. The file takes a pid, so look again afterwards: a stranger is put back at once."""
    try:
        (folder(cgroup) / "cgroup.procs").write_text(str(one.pid))
    except ProcessLookupError:
        return
    now = proctree.member(one.pid)
    if now is not None and now.start_ticks != one.start_ticks:
        (folder(origin) / "cgroup.procs").write_text(str(one.pid))


def strays(members: list[Member], boxes: tuple[Box, ...]) -> list[Member]:
    """Return those who live but have left the boxes (a delegated cgroup lets its owner do that)."""
    out = []
    for one in members:
        now = proctree.member(one.pid)
        alive = now is not None and now.start_ticks == one.start_ticks and not now.is_gone
        if alive and not any(_inside(proctree.cgroup_of(one.pid), box) for box in boxes):
            out.append(one)
    return out


def recapture(members: list[Member], boxes: tuple[Box, ...]) -> None:
    """Put strays back; each into the box nearest to where it went."""
    for one in members:
        now = proctree.cgroup_of(one.pid)
        nearest = max(boxes, key=lambda box: _shared_parts(box.origin, now))
        _enter(one, nearest.path, now)


def _shared_parts(one: str, other: str) -> int:
    pairs = zip(one.split("/"), other.split("/"), strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def freeze(box: Box, *, on: bool) -> None:
    """Ask the kernel to freeze or thaw a box."""
    (folder(box.path) / "cgroup.freeze").write_text("1" if on else "0")


def is_frozen(box: Box) -> bool:
    """Return whether every task in a box stands still, as cgroup.events says."""
    return "frozen 1" in (folder(box.path) / "cgroup.events").read_text().splitlines()


def wait_frozen(boxes: tuple[Box, ...]) -> bool:
    """Wait a bounded time for all boxes to stand still; return whether they do."""
    end = time.monotonic() + FREEZE_WAIT_S
    while not all(is_frozen(box) for box in boxes):
        if time.monotonic() > end:
            return False
        time.sleep(_POLL_S)
    return True


def pids(box: Box) -> list[int]:
    """Return who is directly in a box, [] if it does not exist."""
    try:
        return [int(line) for line in (folder(box.path) / "cgroup.procs").read_text().split()]
    except OSError:
        return []


def empty(box: Box, keep: frozenset[str]) -> str:
    """Thaw a box, put everybody back where they came from, remove it; return what was done.

    ``keep`` holds the paths of other boxes still in force. Where the old cgroup is itself a box no longer in force,
    they go to the one above it. Where the old cgroup is gone, the job it was is gone too: they stay one level up.
    """
    if not folder(box.path).is_dir():
        return "its box is gone"
    freeze(box, on=False)
    home = _home(box, keep)
    moved = 0
    for _ in range(proctree.PASSES_MAX):
        inside = pids(box)
        if not inside:
            break
        for pid in inside:
            with contextlib.suppress(ProcessLookupError):
                (folder(home) / "cgroup.procs").write_text(str(pid))
                moved += 1
    _remove(box.path, keep)
    return f"{moved} processes put back into cgroup {home}"


def empty_all(boxes: tuple[Box, ...], keep: frozenset[str]) -> str:
    """Empty all boxes and return what was done; one that fails does not keep the others shut. Raises `OSError`."""
    texts, errors = [], []
    for box in boxes:
        try:
            texts.append(empty(box, keep))
        except OSError as error:
            errors.append(f"{box.path}: {error}")
    if errors:
        raise OSError("; ".join(errors))
    return "; ".join(texts)


def _home(box: Box, keep: frozenset[str]) -> str:
    home = box.origin
    while home != "/" and (not folder(home).is_dir() or (_is_box(home) and home not in keep)):
        home = home.rpartition("/")[0] or "/"
    return home


def _is_box(cgroup: str) -> bool:
    return cgroup.rpartition("/")[2].startswith(BOX_PREFIX)


def _remove(cgroup: str, keep: frozenset[str]) -> None:
    """Remove a box and any box around it that is only there because this one was inside."""
    end = time.monotonic() + REMOVE_WAIT_S
    while _is_box(cgroup) and cgroup not in keep:
        try:
            folder(cgroup).rmdir()
        except FileNotFoundError:
            pass
        except OSError:
            # Dying tasks count for a moment still; a box of another act inside this one stays until that is undone.
            nested = any(entry.is_dir() for entry in folder(cgroup).iterdir())
            if nested or time.monotonic() > end:
                return
            time.sleep(_POLL_S)
            continue
        cgroup = cgroup.rpartition("/")[0] or "/"


def kill(box: Box) -> None:
    """Kill everything in a box at once, forks included (cgroup.kill, Linux 5.14)."""
    (folder(box.path) / "cgroup.kill").write_text("1")
