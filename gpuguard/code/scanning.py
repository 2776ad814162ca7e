"""Reads files with workers side by side, and gives their kernels in the order of the files.

Memory is bounded: a worker that is ahead of the file whose turn it is may be so many bytes ahead, then its pipe fills
and it waits. A large file is shared out among the workers, image by image, and put together again by number.
"""

from __future__ import annotations

import os
import selectors
import signal
import socket
import stat
import subprocess
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from gpuguard.code import verdicts
from gpuguard.code.allow import default_path
from gpuguard.code.containers.finding import holds_nothing
from gpuguard.code.containers.images import shown_path
from gpuguard.code.reader import worker_command
from gpuguard.code.verdicts import FileVerdict, KernelVerdict
from gpuguard.code.worker import MESSAGE_BYTES_MAX, REGIONS_MAX, REQUEST_BYTES_MAX, Ended, Job, Part

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from typing import Self

SHARED_FROM_BYTES = 32 << 20
#: A worker holds some 95 MB of its own in a file of gigabytes: shared out, one would take more memory than is promised.
SHARED_TO_BYTES = 1 << 30
#: Up to this size a file is searched for the marks of code here: a child for each of ten thousand source files would
#: take minutes. Nothing is parsed.
LOOKED_AT_BYTES_MAX = 1 << 20
#: Files whose verdict waits for that of the one before.
WAITING_FILES_MAX = 256
AHEAD_BYTES_MAX = 32 << 20
FLAWS_SHOWN_MAX = 100
FILES_MAX = 5_000_000
_PIPE_BYTES = 1 << 20


class Target(msgspec.Struct, frozen=True):
    """What to read, and how it is called. ``regions``: a memory, and which parts of it.

    ``descriptor``: of a file that is open already, closed once it is read; -1: it is opened by its path.
    """

    path: str
    opened: str = ""  # where it is opened, if that is another path
    regions: tuple[tuple[int, int], ...] = ()
    descriptor: int = -1


class Progress(msgspec.Struct, frozen=True):
    """How far the file at hand is."""

    path: str
    read_bytes: int
    size_bytes: int


class NoWorker(RuntimeError):
    """The worker's program did not start, or is gone."""


Event = KernelVerdict | FileVerdict | Progress


def files_below(path: Path) -> Iterator[Target]:
    """Yield the regular files at or below a path, in order; links are followed only where they are named.

    A folder that cannot be listed is yielded itself: opening it will say why.
    """
    if not path.is_dir():
        yield Target(str(path))
        return
    count = 0
    refused: list[OSError] = []
    for folder, folders, names in os.walk(path, onerror=refused.append):
        folders.sort()
        for name in sorted(names):
            one = Path(folder, name)
            try:
                regular = stat.S_ISREG(one.lstat().st_mode)
            except OSError:
                regular = True  # opening it will say why
            if regular:
                count += 1
                if count > FILES_MAX:
                    raise ValueError(f"more than {FILES_MAX} files below {path}")
                yield Target(str(one))
    yield from (Target(os.fsdecode(error.filename)) for error in refused)


def scan_targets(targets: Iterable[Target], *, workers: int | None = None, allow: Path | None = None,
                 sm: int | None = None) -> Iterator[Event]:
    """Yield the kernels of each file, then its verdict. Raise `NoWorker`.

    ``allow``: an allow list. ``sm``: only code that a GPU of this compute capability runs.
    """
    with _Pool(workers or min(8, os.cpu_count() or 1), allow, sm) as pool:
        yield from pool.run(targets)


def scan_as_they_come(targets: Iterable[Target], *, allow: Path | None = None,
                      peer: socket.socket | None = None) -> Iterator[Event]:
    """Yield what `scan_targets` does, each file to its end before the next is asked for, by one worker.

    ``peer``: our end of the socket of a worker's program that runs already, with an allow list of its own.
    """
    with _Pool(1, allow, None, peer) as pool:
        for target in targets:
            yield from pool.run([target])


class _Reading:
    """One job that runs: its pipe, and the frames that came through it."""

    def __init__(self, pipe: int) -> None:
        self.pipe = pipe
        self.parts: deque[tuple[Part, int]] = deque()
        self.waiting_bytes = 0
        self.last = False
        self.open = True
        self.status: int | None = None
        self.broken = ""
        self._buffer = bytearray()

    def receive(self) -> None:
        """Take what the pipe holds."""
        content = os.read(self.pipe, _PIPE_BYTES)
        if not content:
            self.open = False
            os.close(self.pipe)
            return
        self._buffer += content
        while len(self._buffer) >= 4 and not self.broken:
            length = int.from_bytes(self._buffer[:4], "little")
            if length > MESSAGE_BYTES_MAX:
                self.broken = "its reader wrote nonsense"
            elif len(self._buffer) < 4 + length:
                return
            else:
                self._take(bytes(self._buffer[4:4 + length]))
                del self._buffer[:4 + length]
        self._buffer.clear()

    def _take(self, content: bytes) -> None:
        try:
            part = msgspec.msgpack.decode(content, type=Part)
        except msgspec.DecodeError:
            self.broken = "its reader wrote nonsense"
            return
        self.last = self.last or part.last
        self.parts.append((part, len(content)))
        self.waiting_bytes += len(content)

    def next(self) -> Part | None:
        if not self.parts:
            return None
        part, size = self.parts.popleft()
        self.waiting_bytes -= size
        return part

    def failure(self) -> str:
        """Return why the reading did not come to its end, "" if it did."""
        if self.broken:
            return self.broken
        if self.last and self.status == 0:
            return ""
        return _REASONS.get(self.status or 0, f"its reader ended with status {self.status}")


_REASONS = {
    -signal.SIGSYS: "its reader did what a reader does not do, and was killed",
    -signal.SIGSEGV: "its reader crashed",
    -signal.SIGKILL: "its reader was killed",
    -signal.SIGXCPU: "it takes longer to read than any honest file",
    70: "its reader failed",
    71: "it needs more memory than reading is given",
    0: "its reader ended early",
}


class _File:
    """One target: its jobs, and what was gathered of it."""

    def __init__(self, target: Target, size_bytes: int, shares: int, error: str = "") -> None:
        self.path = shown_path(target.path)
        self.size_bytes = size_bytes
        self.shares = shares
        self.readings: list[_Reading] = []
        self.error = error
        self.tally = verdicts.Tally()
        self.images = self.unopened = self.code_bytes = 0
        self.malformed: dict[str, int] = {}
        self.gaps: dict[str, int] = {error: 1} if error else {}

    def complete(self) -> bool:
        return bool(self.error) or (len(self.readings) == self.shares and all(
            not one.open and one.status is not None and not one.parts for one in self.readings))

    def take(self) -> Part | None:
        """Return the next part in the order of the images, None while a share that may have it has not spoken."""
        if len(self.readings) < self.shares or any(not one.parts and one.open for one in self.readings):
            return None
        spoken = [one for one in self.readings if one.parts]
        return min(spoken, key=lambda one: one.parts[0][0].image).next() if spoken else None

    def add(self, part: Part) -> None:
        self.tally.add(part.kernels)
        self.images += part.code_bytes > 0
        self.unopened += part.unopened
        self.code_bytes += part.code_bytes
        for flaw in part.flaws:
            where = f"{flaw.path.removeprefix(self.path)} at {flaw.offset}: {flaw.reason}".lstrip()
            kept = self.malformed if flaw.kind == "malformed" else self.gaps
            where = where if len(kept) < FLAWS_SHOWN_MAX else "and more of the kind"
            kept[where] = kept.get(where, 0) + 1

    def verdict(self) -> FileVerdict:
        for failure in {one.failure() for one in self.readings} - {""}:
            self.gaps[failure] = 1
        notes = (f"{self.unopened} pieces of encrypted intermediate code (LTO)",) if self.unopened else ()
        return verdicts.of_file(
            self.path, self.tally, images=self.images, malformed=_texts(self.malformed), gaps=_texts(self.gaps),
            notes=notes, size_bytes=self.size_bytes, code_bytes=self.code_bytes)


def _is_plain(source: int, size: int) -> bool:
    """Return whether there is nothing in a small file; one that cannot be read is a reader's to tell."""
    try:
        return holds_nothing(os.pread(source, size + 1, 0))
    except OSError:
        return False


def _texts(counts: dict[str, int]) -> tuple[str, ...]:
    return tuple(text if count == 1 else f"{text} ({count} times)" for text, count in counts.items())


class _Pool:
    """The clean process, and the jobs it was given."""

    def __init__(self, workers: int, allow: Path | None, sm: int | None, peer: socket.socket | None = None) -> None:
        self._workers = workers
        self._sm = sm
        self._numbers = 0
        self._running: dict[int, _Reading] = {}
        self._ready = selectors.DefaultSelector()
        self._paused: set[_Reading] = set()
        self._process: subprocess.Popen[bytes] | None = None
        self._peer = peer or self._start_worker(allow)
        self._ready.register(self._peer, selectors.EVENT_READ)

    def _start_worker(self, allow: Path | None) -> socket.socket:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [*worker_command(theirs.fileno()), *(["--allow", str(allow)] if allow else [])]
        try:
            self._process = subprocess.Popen(command, pass_fds=(theirs.fileno(),), stdin=subprocess.DEVNULL)
        except OSError as error:
            ours.close()
            raise NoWorker(f"the reader cannot be started: {error}") from error
        finally:
            theirs.close()
        return ours

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._peer.close()
        self._ready.close()
        for one in self._running.values():
            if one.open:
                os.close(one.pipe)
        if self._process:
            self._process.wait()

    def run(self, targets: Iterable[Target]) -> Iterator[Event]:
        """Keep all workers busy; yield in order."""
        waiting = iter(targets)
        files: deque[_File] = deque()
        more = True
        while True:
            while more and len(self._running) < self._workers and len(files) < WAITING_FILES_MAX:
                started = next(waiting, None)
                more = started is not None
                if started is not None:
                    files.append(self._open(started))
            while files:
                yield from self._drain(files[0])
                if not files[0].complete():
                    break
                yield files.popleft().verdict()
            if not files and not more:
                return
            if files and (not more or len(self._running) >= self._workers or len(files) == WAITING_FILES_MAX):
                self._wait(files[0])

    def _drain(self, file: _File) -> Iterator[Event]:
        read_bytes = 0
        while part := file.take():
            file.add(part)
            yield from part.kernels
            read_bytes = max(read_bytes, part.read_bytes)
        if read_bytes:
            yield Progress(file.path, min(read_bytes, file.size_bytes), file.size_bytes)

    def _open(self, target: Target) -> _File:
        """Open a target and hand it to as many workers as it is worth."""
        try:
            flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
            source = target.descriptor if target.descriptor >= 0 else os.open(target.opened or target.path, flags)
        except OSError as error:
            return _File(target, 0, 0, f"could not be opened: {error.strerror}")
        try:
            status = os.fstat(source)
            size = sum(end - start for start, end in target.regions) or status.st_size
            if not target.regions and not stat.S_ISREG(status.st_mode):
                return _File(target, 0, 0, "no regular file")
            if size <= LOOKED_AT_BYTES_MAX and not target.regions and _is_plain(source, size):
                return _File(target, size, 0)
            shared = SHARED_FROM_BYTES <= size <= SHARED_TO_BYTES and not target.regions and target.descriptor < 0
            shares = self._workers if shared else 1
            file = _File(target, size, shares)
            for share in range(shares):
                # Of its own: descriptors that were passed on share one position.
                own = source if share == 0 else os.open(f"/proc/self/fd/{source}", os.O_RDONLY | os.O_CLOEXEC)
                try:
                    file.readings.append(self._start(target, own, size, share, shares))
                finally:
                    if own != source:
                        os.close(own)
        finally:
            os.close(source)
        return file

    def _start(self, target: Target, source: int, size: int, share: int, shares: int) -> _Reading:
        ours, theirs = os.pipe2(os.O_CLOEXEC)
        self._numbers += 1
        job = Job(self._numbers, shown_path(target.path), size, share, shares, self._sm, target.regions[:REGIONS_MAX])
        try:
            request = msgspec.msgpack.encode(job)
            if len(request) > REQUEST_BYTES_MAX:
                raise NoWorker(f"a request of {len(request)} bytes")
            socket.send_fds(self._peer, [request], [source, theirs])
        except OSError as error:
            os.close(ours)
            raise NoWorker(f"the reader is gone: {error.strerror}") from error
        finally:
            os.close(theirs)
        reading = _Reading(ours)
        self._running[self._numbers] = reading
        self._ready.register(ours, selectors.EVENT_READ, reading)
        return reading

    def _wait(self, first: _File) -> None:
        """Take what came; whoever is far ahead of the file whose turn it is waits."""
        self._resume(first)
        for key, _ in self._ready.select():
            if key.fileobj is self._peer:
                self._ended()
                continue
            reading: _Reading = key.data
            reading.receive()
            if not reading.open or reading.broken:
                self._ready.unregister(key.fileobj)
                if reading.open:
                    reading.open = False
                    os.close(reading.pipe)
            elif reading.waiting_bytes > AHEAD_BYTES_MAX:
                self._ready.unregister(key.fileobj)
                self._paused.add(reading)

    def _resume(self, first: _File) -> None:
        for reading in list(self._paused):
            if reading.waiting_bytes < AHEAD_BYTES_MAX // 2 or (reading in first.readings and not reading.parts):
                self._paused.discard(reading)
                self._ready.register(reading.pipe, selectors.EVENT_READ, reading)

    def _ended(self) -> None:
        try:
            message = self._peer.recv(REQUEST_BYTES_MAX)
        except ConnectionError:
            message = b""
        if not message:
            status = f" with status {self._process.wait()}" if self._process else ""
            raise NoWorker(f"the reader ended{status}")
        ended = msgspec.msgpack.decode(message, type=Ended)
        self._running.pop(ended.number).status = ended.status


class Scan(msgspec.Struct, frozen=True):
    """What `scan` found: all files, and of their kernels those that an operator should see."""

    verdict: str
    label: str
    probability: float
    files: tuple[FileVerdict, ...]
    kernels: tuple[KernelVerdict, ...]


def scan(path: str | Path, *, every_kernel: bool = True, allow: Path | None = None, sm: int | None = None,
         workers: int | None = None) -> Scan:
    """Judge the GPU code in a file or folder: libraries, wheels, archives, images of containers, caches.

    Returns all kernels, or with ``every_kernel`` False only those that are suspect or confirmed. ``allow``: an allow
    list, if not the one of this host. Raises `NoWorker`; a file that cannot be read is no error but has gaps.
    """
    kernels: list[KernelVerdict] = []
    files: list[FileVerdict] = []
    for event in scan_targets(files_below(Path(path)), workers=workers, allow=allow or default_path(), sm=sm):
        if isinstance(event, FileVerdict):
            files.append(event)
        elif isinstance(event, KernelVerdict) and (every_kernel or event.verdict in ("suspect", "confirmed")):
            kernels.append(event)
    rank: Callable[[FileVerdict], tuple[int, float]] = verdicts.rank
    worst = max(files, key=rank, default=None)
    return Scan(worst.verdict if worst else "unknown", worst.label if worst else "",
                worst.probability if worst else 0.0, tuple(files), tuple(kernels))
