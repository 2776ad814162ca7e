"""What must be undone, on disk before it is done: append-only JSON lines, each synced before anybody acts on it.

``intent`` before the act (with everything that its undo needs), ``grown`` when more processes turn out to be in it,
``completed`` after it was verified, ``ended`` after its undo. What has an intent and no end is in force, or half done:
undoing either is safe, because every undo checks whom it meets. A line that was cut (power loss, full disk) was never
acted on; it is reported and dropped. Without a journal there is no act: a full disk makes `append` raise.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from typing import TYPE_CHECKING, Literal

import msgspec
from msgspec import Struct

from gpuguard.broker.boxes import Box
from gpuguard.core.subjects import ProcessId

if TYPE_CHECKING:
    from pathlib import Path

NAME = "journal.jsonl"
COMPACT_BYTES = 512 * 1024
FILE_BYTES_MAX = 8 * 1024 * 1024
HOUR_NS = 3_600_000_000_000
RECENT_MAX = 4096


class JournalLocked(Exception):
    """Another process holds the journal: a running broker, or another command."""


class JournalFailed(Exception):
    """It cannot be written. Nothing may be done that would have to be undone."""


class Plan(Struct, frozen=True):
    """Everything an undo needs: boxes to empty, and (pid, start_ticks) of processes that we stopped."""

    boxes: tuple[Box, ...] = ()
    stopped: tuple[tuple[int, int], ...] = ()


class Intent(Struct, frozen=True, tag="intent"):
    """About to act. ``deadline_ns`` is by CLOCK_BOOTTIME, which nobody can set; ``expires_ns`` is for people."""

    time_ns: int
    id: str
    boot_id: str
    action: str
    process: ProcessId
    by_hand: bool
    approved_by: str
    reason: str
    expires_ns: int
    deadline_ns: int
    plan: Plan


class Grown(Struct, frozen=True, tag="grown"):
    """The act takes in more than its intent said."""

    time_ns: int
    id: str
    plan: Plan


class Completed(Struct, frozen=True, tag="completed"):
    """The act was done and verified."""

    time_ns: int
    id: str
    text: str


class Ended(Struct, frozen=True, tag="ended"):
    """Nothing of the act is left to undo."""

    time_ns: int
    id: str
    outcome: Literal["done", "undone", "expired", "failed"]
    text: str


class Recent(Struct, frozen=True, tag="recent"):
    """Acts of the last hour, kept through compaction: a restart must not reset the rate limit."""

    time_ns: int
    acts: tuple[tuple[int, str], ...]


Line = Intent | Grown | Completed | Ended | Recent


class State(Struct):
    """What the lines say together."""

    in_force: dict[str, Intent]
    completed: dict[str, str]
    recent: list[tuple[int, str]]

    def take(self, line: Line) -> None:
        """Take one line in. Lines about an unknown act say nothing that could be undone."""
        if isinstance(line, Intent):
            self.in_force[line.id] = line
            if not line.by_hand:
                self.recent = [*self.recent, (line.time_ns, line.action)][-RECENT_MAX:]
        elif isinstance(line, Recent):
            self.recent = list(line.acts)
        elif isinstance(line, Ended):
            self.in_force.pop(line.id, None)
            self.completed.pop(line.id, None)
        elif line.id in self.in_force and isinstance(line, Grown):
            before = self.in_force[line.id]
            plan = Plan(before.plan.boxes + line.plan.boxes, before.plan.stopped + line.plan.stopped)
            self.in_force[line.id] = msgspec.structs.replace(before, plan=plan)
        elif line.id in self.in_force and isinstance(line, Completed):
            self.completed[line.id] = line.text


def replay(data: bytes) -> tuple[State, list[str]]:
    """Return what a journal says, and what is damaged in it. Every readable line counts: undoing too much is safe."""
    state, damage = State({}, {}, []), []
    decoder = msgspec.json.Decoder(Line)
    for number, raw in enumerate(data.split(b"\n"), 1):
        if not raw:
            continue
        try:
            state.take(decoder.decode(raw))
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            damage.append(f"line {number} ({len(raw)} bytes) cannot be read: {error}")
    return state, damage


class Journal:
    """The journal of one state folder, held by an exclusive lock for as long as this lives."""

    def __init__(self, directory: Path) -> None:
        """Take the lock, read, and drop what is done with. Raises `JournalLocked`, `JournalFailed` or `OSError`."""
        self.path = directory / NAME
        self._lock = os.open(directory / "journal.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._lock)
            raise JournalLocked(f"{self.path} is held by another process") from error
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        data = self.path.read_bytes()
        self._size = data.rfind(b"\n") + 1
        self._failed = ""
        self.state, self.damage = replay(data[: self._size])
        self.unreadable = tuple(self.damage)
        if len(data) > self._size:
            # Nobody acted on a line that was not synced to its end. Taken off, it cannot swallow the next one.
            os.ftruncate(self._file, self._size)
            self.damage.append(f"the last {len(data) - self._size} bytes are a line that was cut: taken off")

    def append(self, line: Line) -> None:
        """Write one line and sync it; raises `JournalFailed`, and then it is as if it had never been tried."""
        if self._failed:
            raise JournalFailed(self._failed)
        if self._size > COMPACT_BYTES:
            self.compact(line.time_ns)
        data = msgspec.json.encode(line) + b"\n"
        if self._size + len(data) > FILE_BYTES_MAX:
            raise JournalFailed(f"{self.path} is full: {len(self.state.in_force)} acts in force")
        self._write(data)
        self.state.take(line)

    def _write(self, data: bytes) -> None:
        try:
            written = os.write(self._file, data)
            if written != len(data):
                raise OSError(f"{written} of {len(data)} bytes written")
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, self._size)
            raise JournalFailed(f"{self.path}: {error}") from error
        try:
            os.fsync(self._file)
        except OSError as error:
            # After a failed sync the kernel may drop the page and say nothing the next time: trust it no more.
            self._failed = f"{self.path} could not be synced: {error}"
            raise JournalFailed(self._failed) from error
        self._size += len(data)

    def acts_since(self, time_ns: int, action: str = "") -> int:
        """Return how many acts (of one kind) were begun since then, not counting those made by hand."""
        return sum(1 for when, what in self.state.recent if when >= time_ns and action in ("", what))

    def compact(self, now_ns: int) -> None:
        """Write what is in force into a new file and put it in the old one's place; on failure keep the old one."""
        recent = tuple(one for one in self.state.recent if one[0] >= now_ns - HOUR_NS)
        lines: list[Line] = [*self.state.in_force.values()]
        lines += [Completed(now_ns, key, text) for key, text in self.state.completed.items()]
        # Last, for it replaces what the intents above counted again.
        lines.append(Recent(now_ns, recent))
        data = b"".join(msgspec.json.encode(line) + b"\n" for line in lines)
        fresh = self.path.with_suffix(".new")
        fresh.unlink(missing_ok=True)
        try:
            descriptor = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o600)
            try:
                if os.write(descriptor, data) != len(data):
                    raise OSError("short write")
                os.fsync(descriptor)
                fresh.rename(self.path)
            except OSError:
                os.close(descriptor)
                raise
        except OSError:
            # The old file still says all: go on with it until FILE_BYTES_MAX stops us.
            fresh.unlink(missing_ok=True)
            return
        _sync_folder(self.path.parent)
        os.close(self._file)
        self._file, self._size = descriptor, len(data)
        self.state.recent = list(recent)

    def close(self) -> None:
        """Give the lock back."""
        os.close(self._file)
        os.close(self._lock)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
