"""The audit log: append-only JSON lines, each holding the hash of the one before, so that no edit goes unseen.

``sha256`` of a line is SHA-256 over its canonical JSON without that field: keys sorted, no spaces, ASCII. The line's
``previous_sha256`` is part of it, so a changed, missing, added or moved line breaks the chain there. ``audit.head``
holds number and hash of the last line: a log that ends before it was cut. Who may write both files can forge both;
send the head elsewhere (it is in every `verify`) to be safe from root. After OCSF 1.9's ``record_integrity`` profile.

Files are named after their first line, ``audit-000000000001.jsonl``; a new one goes on with the chain.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import os
import re
import time
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

import msgspec
from msgspec import Struct

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

FILE_BYTES_MAX = 16 * 1024 * 1024
ENTRY_BYTES_MAX = 512 * 1024
HEAD_NAME = "audit.head"
GENESIS = "0" * 64
_FILE_NAME = re.compile(r"^audit-(\d{12})\.jsonl$")

Source = Literal["broker", "guard", "operator"]


class AuditFailed(Exception):
    """The entry could not be written. What was written before is untouched."""


class Entry(Struct, frozen=True):
    """One line. ``source`` is who said it, as the broker knows it: the guard cannot speak as the broker."""

    seq: int
    time_ns: int
    source: Source
    kind: str
    body: dict[str, Any]
    previous_sha256: str
    sha256: str


class Head(Struct, frozen=True):
    """Number and hash of the last line."""

    seq: int
    sha256: str


class Report(Struct, frozen=True):
    """What `verify` found. ``problem`` is "" where the chain is whole; ``file`` and ``line`` say where it is not."""

    ok: bool
    entries: int
    first_seq: int
    last_seq: int
    head_sha256: str
    problem: str = ""
    file: str = ""
    line: int = 0


def _canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def seal(unsealed: dict[str, object]) -> tuple[str, bytes]:
    """Return hash and line of one entry without its ``sha256``. Raises `AuditFailed` for what JSON cannot say."""
    try:
        entry = msgspec.to_builtins(unsealed, str_keys=True)
        digest = hashlib.sha256(_canonical(entry)).hexdigest()
        line = _canonical({**entry, "sha256": digest}) + b"\n"
    except (TypeError, ValueError, RecursionError, msgspec.MsgspecError) as error:
        raise AuditFailed(f"not an entry: {error}") from error
    if len(line) > ENTRY_BYTES_MAX:
        raise AuditFailed(f"an entry of {len(line)} bytes is too large")
    return digest, line


def files(folder: Path) -> list[Path]:
    """Return the files of a log in their order."""
    return sorted(path for path in folder.iterdir() if _FILE_NAME.match(path.name))


def read(path: Path) -> Iterator[Entry]:
    """Yield the entries of a folder or of one file, up to the first line that cannot be read (`verify` says which)."""
    for one in files(path) if path.is_dir() else [path]:
        with one.open("rb") as stream:
            for raw in _lines(stream):
                try:
                    yield msgspec.json.decode(raw, type=Entry)
                except (msgspec.MsgspecError, ValueError, RecursionError):
                    return


def _lines(stream: BinaryIO) -> Iterator[bytes]:
    """Yield lines with their ends; one that is longer than an entry can be comes in pieces, of which none is one."""
    return iter(functools.partial(stream.readline, ENTRY_BYTES_MAX + 1), b"")


class Log:
    """The writer. One at a time: it holds a lock on the folder's head file."""

    def __init__(self, folder: Path, *, file_bytes_max: int = FILE_BYTES_MAX) -> None:
        """Open the log and go on where it ended; a line cut by a crash is taken off, and that is entered."""
        self._folder = folder
        self._file_bytes_max = file_bytes_max
        self._head = os.open(folder / HEAD_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(self._head, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._head)
            raise AuditFailed(f"the audit log in {folder} is held by another process") from error
        self._failed = ""
        self._seq, self._previous, self._file, self._size = 0, GENESIS, -1, 0
        existing = files(folder)
        torn = self._resume(existing[-1]) if existing else b""
        self._join_head()
        if torn:
            self._recovered(torn)

    def _resume(self, path: Path) -> bytes:
        self._seq = int(path.name[6:18]) - 1
        self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW)
        data = path.read_bytes()
        self._size = data.rfind(b"\n") + 1
        last = data[: self._size].rstrip(b"\n").rpartition(b"\n")[2]
        try:
            entry = msgspec.json.decode(last, type=Entry)
            self._seq, self._previous = entry.seq, entry.sha256
        except (msgspec.MsgspecError, ValueError, RecursionError):
            # An empty last file goes on from the head. So does one that somebody wrote into: `verify` finds it.
            self._previous = ""
        return data[self._size :]

    def _join_head(self) -> None:
        """Go on from the head where it knows more than the files: hiding that would make a cut look whole again."""
        head = self._read_head()
        if head.seq >= self._seq and head.sha256 != self._previous:
            self._seq, self._previous = head.seq, head.sha256

    def _recovered(self, torn: bytes) -> None:
        os.ftruncate(self._file, self._size)
        os.fsync(self._file)
        body: dict[str, object] = {"cut_bytes": len(torn), "cut_sha256": hashlib.sha256(torn).hexdigest()}
        # Cut off by a full disk that is still full: the bytes were never acknowledged to anybody.
        with contextlib.suppress(AuditFailed):
            self.append(time.time_ns(), "broker", "audit.recovered", body)

    def _read_head(self) -> Head:
        try:
            return msgspec.json.decode(os.pread(self._head, 4096, 0), type=Head)
        except msgspec.MsgspecError:
            return Head(0, GENESIS)

    def append(self, time_ns: int, source: Source, kind: str, body: dict[str, object]) -> Head:
        """Write one entry, synced; raises `AuditFailed`, and then the log is as it was."""
        if self._failed:
            raise AuditFailed(self._failed)
        seq = self._seq + 1
        digest, line = seal({"seq": seq, "time_ns": time_ns, "source": source, "kind": kind, "body": body,
                             "previous_sha256": self._previous})
        try:
            if self._file < 0 or self._size + len(line) > self._file_bytes_max:
                self._rotate(seq)
            if os.write(self._file, line) != len(line):
                raise OSError("short write: no space left")
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, self._size)
            raise AuditFailed(f"audit log in {self._folder}: {error}") from error
        self._sync(self._file)
        self._seq, self._previous, self._size = seq, digest, self._size + len(line)
        self._anchor(Head(seq, digest))
        return Head(seq, digest)

    def _sync(self, descriptor: int) -> None:
        try:
            os.fsync(descriptor)
        except OSError as error:
            self._failed = f"audit log in {self._folder} could not be synced: {error}"
            raise AuditFailed(self._failed) from error

    def _anchor(self, head: Head) -> None:
        # Fixed width, rewritten in place: it needs no new space, so it cannot fail for a full disk.
        text = msgspec.json.encode({"seq": head.seq, "sha256": head.sha256}).ljust(127) + b"\n"
        try:
            os.pwrite(self._head, text, 0)
        except OSError as error:
            raise AuditFailed(f"head of the audit log in {self._folder}: {error}") from error
        self._sync(self._head)

    def _rotate(self, seq: int) -> None:
        name = self._folder / f"audit-{seq:012d}.jsonl"
        fresh = os.open(name, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        if self._file >= 0:
            os.close(self._file)
        self._file, self._size = fresh, os.fstat(fresh).st_size

    def close(self) -> None:
        """Close the log."""
        if self._file >= 0:
            os.close(self._file)
        os.close(self._head)


class _Chain:
    """Walks lines; `problem` is what the first bad one has."""

    def __init__(self) -> None:
        self.entries = 0
        self.first_seq = 0
        self.seq = 0
        self.previous = ""

    def step(self, raw: bytes) -> str:
        if len(raw) > ENTRY_BYTES_MAX:
            return "longer than an entry can be"
        if not raw.endswith(b"\n"):
            return "cut in the middle of a line"
        try:
            entry = msgspec.json.decode(raw, type=Entry)
            plain = json.loads(raw)
            claimed = plain.pop("sha256")
            digest = hashlib.sha256(_canonical(plain)).hexdigest()
            same = _canonical({**plain, "sha256": claimed}) + b"\n" == raw
        except (msgspec.MsgspecError, ValueError, RecursionError, KeyError, AttributeError) as error:
            return f"not an entry: {error}"
        if digest != claimed or not same:
            return "changed: its hash is not that of its content"
        if self.entries == 0:
            if entry.seq == 1 and entry.previous_sha256 != GENESIS:
                return "the first entry does not begin a chain"
        elif entry.seq != self.seq + 1:
            return f"entry {entry.seq} follows entry {self.seq}: lines are missing, added or out of order"
        elif entry.previous_sha256 != self.previous:
            return "does not follow from the line before: that one was replaced"
        self.first_seq = self.first_seq or entry.seq
        self.entries += 1
        self.seq, self.previous = entry.seq, digest
        return ""


def verify(path: Path) -> Report:
    """Check a log folder (all its files and the head), or one file by itself.

    Raises `OSError` if unreadable, and where there is no entry nor a head: nothing is no whole log, it may be a removed
    one.
    """
    chain, whole = _Chain(), path.is_dir()
    head = _stored_head(path) if whole else None
    anchored = head is None or head.seq == 0

    def report(problem: str = "", file: str = "", line: int = 0) -> Report:
        return Report(ok=not problem, entries=chain.entries, first_seq=chain.first_seq, last_seq=chain.seq,
                      head_sha256=chain.previous, problem=problem, file=file, line=line)

    for one in files(path) if whole else [path]:
        with one.open("rb") as stream:
            for number, raw in enumerate(_lines(stream), 1):
                problem = chain.step(raw)
                if not problem and whole and chain.entries == 1 and chain.seq != 1:
                    problem = f"the log begins at entry {chain.seq}: what came before is missing"
                if not problem and head is not None and chain.seq == head.seq:
                    anchored = chain.previous == head.sha256
                    problem = "" if anchored else "the head names another entry here: this part was rewritten"
                if problem:
                    return report(problem, one.name, number)
    if head is None and not chain.entries:
        raise FileNotFoundError(errno.ENOENT, "there is no audit log here", str(path))
    if whole and head is None:
        return report(f"{HEAD_NAME} is missing or unreadable: nothing says where the log ended", HEAD_NAME)
    if not anchored and head is not None:
        return report(f"truncated: the log ends at entry {chain.seq}, its head names entry {head.seq}", HEAD_NAME)
    return report()


def _stored_head(folder: Path) -> Head | None:
    try:
        data = (folder / HEAD_NAME).read_bytes()
        return msgspec.json.decode(data, type=Head) if data.strip() else Head(0, GENESIS)
    except (FileNotFoundError, msgspec.MsgspecError, ValueError):
        return None
