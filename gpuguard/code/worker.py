"""The processes that read hostile files: one that starts clean and stays clean, and one for each file.

``python -m gpuguard.code.worker`` imports all that reading needs, then only forks: each child gets one open file and
one pipe, closes its cell (`sandbox`), reads, and ends. A child that is taken over can say wrong things of its own file
and nothing else; one that crashes or is killed leaves the others alone. The clean one is a program of its own since the
caller may have threads and GPU memory, which do not survive a fork.

Requests come over a socket (SOCK_SEQPACKET, one MessagePack map each, the descriptors beside it), answers go back as
`Ended`. A child writes frames into its pipe: four bytes of length, little-endian, then one MessagePack map.
"""

from __future__ import annotations

import argparse
import bisect
import codecs
import io
import os
import selectors
import signal
import socket
import struct
import sys
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from gpuguard import confine
from gpuguard.code import allow, decode, judge, sandbox
from gpuguard.code.containers.finding import find_images
from gpuguard.code.containers.images import Budget, Flaw, Image, make_image
from gpuguard.code.verdicts import KernelVerdict

if TYPE_CHECKING:
    from collections.abc import Callable

    from gpuguard.code.containers.stream import File

MESSAGE_BYTES_MAX = 64 << 20
REQUEST_BYTES_MAX = 1 << 16
REGIONS_MAX = 1_500
COMPILED_FROM_BYTES = 2 << 20
_BATCH_KERNELS = 512


class Job(msgspec.Struct, frozen=True):
    """Read a file, or every ``shares``-th image of it. ``regions``: only these (start, end) of it, as of a memory."""

    number: int
    path: str
    size_bytes: int
    share: int = 0
    shares: int = 1
    sm: int | None = None
    regions: tuple[tuple[int, int], ...] = ()


class Ended(msgspec.Struct, frozen=True):
    """The child of a job has ended: its exit status as `os.waitstatus_to_exitcode` gives it."""

    number: int
    status: int


class Part(msgspec.Struct, frozen=True):
    """What was found in one image. ``image`` counts the images of the file; ``read_bytes`` is how far we are."""

    image: int
    read_bytes: int
    code_bytes: int = 0
    kernels: tuple[KernelVerdict, ...] = ()
    flaws: tuple[Flaw, ...] = ()
    unopened: int = 0  # 1 for intermediate code that is not opened
    last: bool = False  # of the whole job


def main() -> None:
    """Serve until the other end closes."""
    parser = argparse.ArgumentParser()
    for name in ("--fd", "--parent"):
        parser.add_argument(name, type=int, required=True)
    parser.add_argument("--allow", type=Path)
    parser.add_argument("--confined", action="store_true", help="give up all privileges before the first request")
    for name in ("--uid", "--gid"):
        parser.add_argument(name, type=int)
    given = parser.parse_args()
    allowed = allow.load(given.allow) if given.allow else allow.AllowList()
    warm_up()
    if given.confined:
        _compile()  # afterwards no module may be readable
        confine.drop(None if given.uid is None else (given.uid, given.gid), given.parent)
    with socket.socket(fileno=given.fd) as peer:
        serve(peer, allowed)


def warm_up() -> None:
    """Have everything loaded that is loaded at first use: in the cell no module can be imported."""
    for sm in range(decode.SM_MIN, decode.SM_MAX + 1):
        decode.decoder(sm)
    for codec in ("cp437", "latin-1", "ascii", "utf-8", "unicode_escape", "raw_unicode_escape"):
        codecs.lookup(codec)
    text = b".version 8.0\n.target sm_90\n.visible .entry a()\n{ xor.b32 %r1, %r2, 305419896; ret; }\n"
    for one in find_images(text, "warm-up"):
        if isinstance(one, Image):
            list(judge.judge_image(one))
    list(judge.judge_image(_small_image()))


@cache
def _compile() -> None:
    """Compile the loops that large files are judged by: that takes seconds, and cannot be done in a cell."""
    list(judge.judge_image(_small_image(), compiled=True))


def is_large(size_bytes: int) -> bool:
    """Return whether a file is judged by compiled loops: small ones are done before a compiler has begun."""
    if size_bytes < COMPILED_FROM_BYTES:
        return False
    _compile()
    return True


def _small_image() -> Image:
    return make_image("warm-up", "", 0, "cubin", "sm_90", empty_cubin())


def empty_cubin() -> bytes:
    """Return a cubin of one kernel of 256 instructions, enough for a window, all of them EXIT."""
    names = b"\0.text.a\0.names\0"
    code = bytes.fromhex("4d790000000000000000800300ea0f00") * 256
    at = 64 + len(code)
    table = at + len(names)
    sections = [(0, 0, 0, 0), (1, 1, 64, len(code)), (9, 3, at, len(names))]
    header = struct.pack("<16sHHIQQQIHHHHHH", b"\x7fELF\x02\x01\x01\x33\x07", 2, 190, 1, 0, 0, table, 90, 64, 0, 0, 64,
                         len(sections), 2)
    rows = [struct.pack("<IIQQQQIIQQ", name, kind, 0, 0, start, size, 0, 0, 1, 0)
            for name, kind, start, size in sections]
    return header + code + names + b"".join(rows)


def serve(peer: socket.socket, allowed: allow.AllowList) -> None:
    """Fork a child for each job; tell when it has ended."""
    running: dict[int, tuple[int, int]] = {}  # descriptor of the child -> (number of its job, pid)
    ready = selectors.DefaultSelector()
    ready.register(peer, selectors.EVENT_READ)
    try:
        while True:
            for key, _ in ready.select():
                if key.fileobj is peer:
                    if not _start(peer, allowed, running, ready):
                        return
                else:
                    _reap(peer, key.fd, running, ready)
    finally:
        for _, pid in running.values():
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def _start(peer: socket.socket, allowed: allow.AllowList, running: dict[int, tuple[int, int]],
           ready: selectors.BaseSelector) -> bool:
    request, descriptors, _, _ = socket.recv_fds(peer, REQUEST_BYTES_MAX, 2)
    if not request:
        return False
    job = msgspec.msgpack.decode(request, type=Job)
    parent, compiled = os.getpid(), is_large(job.size_bytes)
    pid = os.fork()
    if pid == 0:
        _child(job, descriptors[0], descriptors[1], parent, partial(read, allowed=allowed, compiled=compiled))
    for descriptor in descriptors:
        os.close(descriptor)
    child = os.pidfd_open(pid)
    running[child] = (job.number, pid)
    ready.register(child, selectors.EVENT_READ)
    return True


def _reap(peer: socket.socket, child: int, running: dict[int, tuple[int, int]], ready: selectors.BaseSelector) -> None:
    number, pid = running.pop(child)
    ready.unregister(child)
    os.close(child)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    peer.send(msgspec.msgpack.encode(Ended(number, status)))


def _child(job: Job, source: int, out: int, parent: int, reading: Callable[[Job, File, int], None]) -> None:
    """Close the cell, read, end; never returns."""
    status = 70
    try:
        file = _Regions(source, job.regions) if job.regions else io.FileIO(source, "rb", closefd=False)
        try:
            sandbox.close_cell((source, out), job.size_bytes, parent)
        except sandbox.CellOpen as error:
            # Nothing has been read: the pipe carries our own words.
            _send(out, Part(0, 0, flaws=(Flaw(job.path, "", 0, "unread", str(error.strerror)),), last=True))
            os._exit(0)
        reading(job, file, out)
        status = 0
    except MemoryError:
        status = 71
    except BaseException as error:  # noqa: BLE001 - whatever it is, this process ends here, and says so
        reason = f"its reader failed: {type(error).__name__}: {error}"[:500]
        _send(out, Part(0, 0, flaws=(Flaw(job.path, "", 0, "unread", reason),)))
    finally:
        os._exit(status)


class _Regions:
    """Parts of a memory, one after the other, as a file; a page that cannot be read ends its part."""

    def __init__(self, descriptor: int, regions: tuple[tuple[int, int], ...]) -> None:
        self._descriptor = descriptor
        self._left = list(reversed(regions))
        self._passed = 0
        self._read: list[tuple[int, int]] = [(0, 0)]  # from which offset on, in order, which address

    def tell(self) -> int:
        return self._passed

    def address(self, offset: int) -> int:
        """Return where in the memory a byte of what was read lies."""
        at = bisect.bisect_right(self._read, (offset, sys.maxsize)) - 1
        return self._read[at][1] + offset - self._read[at][0]

    def seek(self, _offset: int, _whence: int = 0) -> int:
        raise io.UnsupportedOperation("a memory is read once")

    def seekable(self) -> bool:
        return False

    def read(self, size: int = -1) -> bytes:
        while self._left:
            start, end = self._left.pop()
            want = min(end - start, size if size > 0 else 1 << 20)
            try:
                part = os.pread(self._descriptor, want, start)
            except OSError:
                part = b""
            if part and start + len(part) < end:
                self._left.append((start + len(part), end))
            if part:
                if start != self.address(self._passed):
                    self._read.append((self._passed, start))
                self._passed += len(part)
                return part
        return b""


def read(job: Job, file: File, out: int, allowed: allow.AllowList, *, compiled: bool) -> None:
    """Read a file and write what it holds: one frame or more for each image, in their order."""
    budget = Budget(job.size_bytes, share=job.share, shares=job.shares)
    for one in find_images(file, job.path, budget):
        if isinstance(one, Flaw):
            _send(out, Part(budget.images, file.tell(), flaws=(one,)))
            continue
        if not judge.runs_on(one.arch, job.sm):
            continue
        if isinstance(file, _Regions) and one.path == job.path:
            one = msgspec.structs.replace(one, offset=file.address(one.offset))  # noqa: PLW2901
        _send(out, Part(budget.images, file.tell(), len(one.data), unopened=int(one.kind == "other")))
        for kernels, flaws in judge.judge_image(one, allowed, compiled=compiled):
            for at in range(0, max(1, len(kernels)), _BATCH_KERNELS):
                _send(out, Part(budget.images, file.tell(), 0, tuple(kernels[at:at + _BATCH_KERNELS]),
                                () if at else tuple(flaws)))
        del one  # before the next is unpacked: two of the largest would be too much
    _send(out, Part(budget.images, file.tell(), last=True))


def _send(out: int, part: Part) -> None:
    content = msgspec.msgpack.encode(part)
    frame = memoryview(struct.pack("<I", len(content)) + content)
    while frame:
        frame = frame[os.write(out, frame):]


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
