"""The launch eye: every kernel launch on the host, seen without the process's cooperation.

In the broker, `LaunchProbe` places one uprobe_multi link of each kind (single perf uprobes on kernels before 6.6) on
every CUDA driver library (an inode) that it is told of, that the linker's cache names, or that any process maps. In the
guard, `LaunchSensor` reads what the probes left: a table with one row for each (process, kernel, geometry), and a ring
of names and images.

New libraries. A probe sits on an inode, so whoever maps a known library later is seen from the first launch. Only an
inode never seen before (a copy in a container image, a memfd) must be found: at every scan (0.7 s) the broker reads
/proc/PID/statm of each process, and only where the address space changed its maps; each file is examined once. The
guard also asks about processes that were just executed, at once and a few times more. What such a process launched
before it was found stays unseen, and kernels that it looked up before stay without a name: never guessed.

Who launched is told by the kernel (pid and start time), so no row can be given to a process that reused the pid.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import itertools
import mmap
import os
import re
import select
import socket
import stat
import struct
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, cast

import numpy as np
from msgspec import Struct, field

from gpuguard import boundary, capture
from gpuguard.core.host import BoundedTable
from gpuguard.core.records import LAUNCH, LAUNCH_APIS, Block, Gap, KernelName, Launches, ModuleImage, ProcessStarted
from gpuguard.core.subjects import ProcessId
from gpuguard.libcuda import (
    CALL_ALIAS,
    CALL_CREATE,
    CALL_FILE,
    CALL_GRAPH,
    CALL_IMAGE,
    CALL_LINK,
    CALL_LOOKUP,
    CALL_NAMED,
    CALL_POINTER,
    CALL_UNLOAD,
    Library,
    NotProbeable,
    Site,
    read_library,
)
from gpuguard.messages import Answer, Opened, OpenLaunches, OpenReader, ReadImage, Refused, Request, ScanLaunches
from gpuguard.sensors import EyeClosed

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from gpuguard._launches import Programs, Ring
    from gpuguard.capture import CooperativeSensor
    from gpuguard.config import Config

NAME = "launches"
SECOND_NS = 1_000_000_000
OBJECT = Path(__file__).parents[2] / "bpf" / "launches.bpf.o"
INITIAL_PID_NAMESPACE = 0xEFFFFFFC  # PROC_PID_INIT_INO, linux/proc_ns.h

SCAN_PERIOD_NS = 700_000_000
#: After its exec a process is looked at this often: it maps libcuda when its imports get there.
YOUNG_LOOKS_NS = (30_000_000, 120_000_000, 300_000_000)
YOUNG_MAX = 256
SWEEP_PERIOD_S = 10.0
IDLE_S, IDLE_WHEN_FULL_S, FULL_RATIO = 60.0, 5.0, 0.75
MAPS_PER_SCAN = 128
#: So many more are read though nothing changed: who maps one file in the place of another keeps his size.
MAPS_IN_TURN = 4
#: What examining new files may take, in all and for one process: nobody keeps the others waiting.
SCAN_S, SCAN_EACH_S = 0.35, 0.1
PIDS_PER_REQUEST = 1_024
FILES_MAX = 16_384
#: A mapped file is not opened again for this long; then it is, since inode numbers are reused.
SEEN_S = 30.0
LIBRARIES_MAX = 64
#: No program needs more copies of the driver and the loaders; one that has them takes no room from others.
LIBRARIES_EACH_MAX = 8
#: When all are taken, those that nobody maps are looked for at most this often.
DROP_PERIOD_S = 30.0

IMAGE_BYTES_MAX = 64 * 1024 * 1024
IMAGE_CHUNK_BYTES = 1024 * 1024
PTX_BYTES_MAX = 4 * 1024 * 1024
IMAGES_PER_READ = 8
IMAGES_WAITING_MAX, IMAGES_WAITING_EACH_MAX = 512, 256
HANDLES_MAX = 65_536
#: Names that wait for the digest of their module, which is read within moments.
MODULES_WAITING_MAX, NAMES_PER_MODULE_MAX = 256, 2_048
EVENTS_PER_READ = 4_096
#: A row is looked at again when it was touched at most this long before the last read.
SLACK_NS = SECOND_NS
PRUNE_PERIOD_NS = 60 * SECOND_NS
ALIVE_PERIOD_NS = 10 * SECOND_NS

# struct launch_key, launch_value and launch_event of ext/bpf/launches.h.
KEY = np.dtype([
    ("start_ns", "<u8"), ("kernel", "<u8"), ("pid", "<u4"), ("api", "<u4"), ("grid", "<u4", (3,)),
    ("block", "<u4", (3,)), ("shared_bytes", "<u4"), ("zero", "<u4"),
])
VALUE = np.dtype([("launches", "<u8"), ("first_ns", "<i8"), ("last_ns", "<i8"), ("gaps_log2", "<u4", (40,))])
EVENT = np.dtype([
    ("time_ns", "<i8"), ("start_ns", "<u8"), ("handle", "<u8"), ("parent", "<u8"), ("address", "<u8"),
    ("bytes", "<u8"), ("pid", "<u4"), ("form", "<u4"), ("text", "S384"),
])
HEADER_BYTES = 64
COUNTERS = (
    "launches not counted: the table of kernels is full",
    "arguments not readable in the memory of the process",
    "names or images lost: the ring is full, or one process sends too many",
    "launches of processes that this pid namespace does not show",
    "launches counted without their geometry: one process launches too many kinds",
    "names or images lost: too many calls at once",
)
LOST_PERIOD_NS = 60 * SECOND_NS

#: Of a file with one of these in its name it is told why it is not probed; of all others it goes without saying.
LIBRARY_NAMES = ("libcuda.so", "libOpenCL.so", "libvulkan.so")
#: Calls whose handle is a queue or a graph and has no name of its own to be looked up.
NAMELESS_APIS = ("cuGraphLaunch", "vkQueueSubmit")

ELF_MACHINE_CUDA = 190  # EM_CUDA of elf.h
FATBIN_MAGIC = 0xBA55ED50  # fatbinary_section.h: magic u32, version u16, header bytes u16, payload bytes u64
ImageKind = Literal["cubin", "fatbin", "ptx", "unknown"]


def image_extent(header: bytes) -> tuple[ImageKind, int]:
    """Return the kind of a GPU code image and its size in bytes as its first 64 bytes tell; 0 where they do not.

    An ELF file ends where its last table of headers ends, which is how NVIDIA's tools write cubins. PTX is text that
    ends with NUL, so its header says no size.
    """
    if header[:6] == b"\x7fELF\x02\x01" and len(header) >= HEADER_BYTES:
        machine, = struct.unpack_from("<H", header, 18)
        programs, sections = struct.unpack_from("<QQ", header, 32)
        _, program_bytes, program_count, section_bytes, section_count = struct.unpack_from("<5H", header, 52)
        size = max(HEADER_BYTES, programs + program_bytes * program_count, sections + section_bytes * section_count)
        return ("cubin", size) if machine == ELF_MACHINE_CUDA else ("unknown", 0)
    if len(header) >= 16 and struct.unpack_from("<I", header)[0] == FATBIN_MAGIC:
        header_bytes, payload_bytes = struct.unpack_from("<HQ", header, 6)
        return "fatbin", header_bytes + payload_bytes
    text = header.split(b"\0", 1)[0].lstrip()
    if text.startswith((b"//", b".version", b".target")) and all(32 <= c < 127 or c in b"\t\r\n" for c in text):
        return "ptx", 0
    return "unknown", 0


def start_ticks_of(pid: int) -> int:
    """Return field 22 of /proc/PID/stat, proc(5). OSError if there is no such process."""
    text = Path(f"/proc/{pid}/stat").read_bytes()
    return int(text[text.rindex(b")") + 2:].split()[19])


# -- the broker's half ------------------------------------------------------------------------------------------------


#: Device, inode, time of change and size: one state of one file.
FileKey = tuple[int, int, int, int]


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


class LaunchProbe:
    """The loaded programs and every library that they watch. Closing it, or the end of the process, detaches all."""

    def __init__(self, programs: Programs) -> None:
        self._programs = programs
        self.boundary = boundary.Boundary(programs.quotas_fd, programs.quotas_held_fd)
        self._examined: BoundedTable[FileKey, None] = BoundedTable(FILES_MAX)
        self._watched: dict[tuple[object, ...], Watched] = {}
        self._seen: set[tuple[str, str, str]] = set()
        self._seen_since_s = time.monotonic()
        self._dropped_s = -DROP_PERIOD_S
        self._sizes: dict[int, bytes] = {}
        self._turn = 0
        self._swept_s = time.monotonic()
        self._rows: tuple[np.ndarray, np.ndarray] | None = None
        self.refused: dict[str, str] = {}

    @property
    def watched(self) -> list[Watched]:
        """Return every library that is probed now."""
        return list(self._watched.values())

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
        sites = [site for one in self.watched for site in (*one.library.launches, *one.library.calls)]
        slow = sorted({site.symbol for site in sites if site.cost == "single-step"})
        how = "perf uprobes one by one, seconds to detach" if self._programs.single else "uprobe_multi"
        text = f"{how}, {len(self._watched)} libraries, {len(sites)} sites"
        if slow:
            text += f"; single-stepped, some 20 us a call: {', '.join(slow)}"
        refused = [f"{path}: {reason}" for path, reason in self.refused.items()]
        return "; ".join([text, *refused])

    def scan(self, pids: Iterable[int]) -> Opened:
        """Look for libraries in the maps of these processes; none named: of all whose address space changed."""
        chosen = list(itertools.islice(pids, PIDS_PER_REQUEST)) or self._changed()
        if time.monotonic() - self._seen_since_s > SEEN_S or len(self._seen) > FILES_MAX:
            self._seen.clear()
            self._seen_since_s = time.monotonic()
        end_s = time.monotonic() + SCAN_S
        for pid in chosen:
            if not self._look(pid, min(end_s, time.monotonic() + SCAN_EACH_S)):
                self._sizes.pop(pid, None)  # the rest at the next scan
        self._sweep()
        return Opened((), self.describe(), self._counts())

    def _look(self, pid: int, end_s: float) -> bool:
        """Examine what this process maps, what is called like a driver first; return whether there was time for all."""
        fresh = [(path, mapped) for path, mapped in _executable_maps(pid) if mapped not in self._seen]
        fresh.sort(key=lambda one: not any(name in one[1][2] for name in LIBRARY_NAMES))
        remote: dict[str, str] | None = None
        for done, (path, mapped) in enumerate(fresh):
            if done and time.monotonic() > end_s:
                return False
            remote = _fuse_mounts(pid) if remote is None else remote
            if mapped[0] in remote:
                self._refuse(mapped[2], f"it lies on {remote[mapped[0]]}, whose server could let us wait")
                self._seen.add(mapped)
            elif self.add(path, mapped[2], pid=pid):
                self._seen.add(mapped)
        return True

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
            if stat.S_ISREG(found.st_mode) and _file_key(found) not in self._examined:
                self._examined[_file_key(found)] = None
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
            self._watched[key].files.add(_file_key(found))
            self.refused.pop(shown, None)
        except _Full as error:
            self._refuse(shown, str(error), named=False)
            self._examined.pop(_file_key(found))  # there may be room for it later
        except (NotProbeable, OSError) as error:
            self._refuse(shown, str(error))

    def _refuse(self, shown: str, reason: str, *, named: bool = True) -> None:
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
            in_use = _mapped_files()
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

    def _changed(self) -> list[int]:
        """Return the processes whose address space changed size since their maps were last read."""
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

    def _sweep(self) -> None:
        """Delete rows that nobody added to for long, so that gone processes and one-time kernels leave room."""
        from gpuguard import _launches

        if time.monotonic() - self._swept_s < SWEEP_PERIOD_S:
            return
        self._swept_s = time.monotonic()
        if self._rows is None:
            self._rows = _new_buffers(self._programs.rows_max)
        keys, values = self._rows
        count = _launches.read_rows(self._programs.rows_fd, _bytes_of(keys), _bytes_of(values))
        idle_s = IDLE_WHEN_FULL_S if count > FULL_RATIO * self._programs.rows_max else IDLE_S
        idle = values["last_ns"][:count] < time.clock_gettime_ns(time.CLOCK_BOOTTIME) - idle_s * 1e9
        if idle.any():
            _launches.delete_rows(self._programs.rows_fd, keys[:count][idle].tobytes())
        kept = keys[:count][~idle]
        held = Counter(zip(kept["start_ns"].tolist(), kept["pid"].tolist(), strict=True))
        for start_ns, pid in _launches.shares_of(self._programs.shares_fd):
            _launches.set_rows(self._programs.shares_fd, start_ns, pid, held[start_ns, pid])
        _launches.say_held(self._programs.rows_held_fd, len(kept))

    def _counts(self) -> dict[str, int]:
        return {"libraries": len(self._watched), "refused": len(self.refused)}

    def close(self) -> None:
        """Detach everything and unload; nobody stays slowed."""
        self.boundary.close()
        for one in self._watched.values():
            for link in one.links:
                os.close(link)
        self._watched.clear()
        self._programs.close()


class _Held:
    """What this process holds for the guard: at most one probe."""

    probe: LaunchProbe | None = None


def grant(request: Request) -> tuple[Answer, list[int]]:
    """Answer what the launch sensor asks of the broker; the descriptors are the caller's to send and close."""
    match request:
        case OpenLaunches():
            return _open(request)
        case ScanLaunches():
            if _Held.probe is None:
                return Refused("the launch eye is not open"), []
            return _Held.probe.scan(request.pids), []
        case ReadImage():
            return _read_image(request)
        case _:
            return Refused(f"not for the launch eye: {type(request).__name__}"), []


def release() -> None:
    """Detach every probe: the guard is gone, or wants no more."""
    if _Held.probe:
        _Held.probe.close()
    _Held.probe = None
    boundary.opened(None)


def _open(request: OpenLaunches) -> tuple[Answer, list[int]]:
    release()
    try:
        probe = new_probe()
    except (EyeClosed, OSError) as error:
        return Refused(str(error)), []
    for path in itertools.chain(request.libraries[:LIBRARIES_MAX], _cached_libraries()):
        probe.add(path, kept=True)
    probe.scan(())
    _Held.probe = probe
    boundary.opened(probe.boundary)
    return probe.open_handles()


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


def _read_file(fd: int) -> Library:
    # Never mapped: whoever shortens a mapped file kills the reader.
    return read_library(lambda at, size: os.pread(fd, size, at))


def _cached_libraries() -> list[str]:
    """Return the driver libraries that the dynamic linker would find, by its own cache."""
    try:
        text = Path("/etc/ld.so.cache").read_bytes()
    except OSError:
        return []
    return sorted({found.decode() for found in re.findall(rb"/[\x21-\x7e]{0,512}/libcuda\.so\.1(?=\0)", text)})


def _file_key(found: os.stat_result) -> FileKey:
    return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size


def _mapped_files() -> set[FileKey]:
    """Return every file that any process maps to execute. It reads all maps: not for every day."""
    found: set[FileKey] = set()
    for name in os.listdir("/proc"):
        if name.isdigit():
            for path, _ in _executable_maps(int(name)):
                with contextlib.suppress(OSError):
                    found.add(_file_key(os.stat(path)))  # noqa: PTH116 - a link that leads to no path
    return found


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


def _executable_maps(pid: int) -> Iterator[tuple[str, tuple[str, str, str]]]:
    """Yield every executable mapping of a file: the path that opens it, and its device, inode and path as shown.

    A mapped file may be deleted, a memfd, or in another mount namespace: /proc/PID/map_files leads to it all the same.
    """
    try:
        lines = Path(f"/proc/{pid}/maps").read_text(errors="surrogateescape").splitlines()
    except OSError:
        return
    for line in lines:
        fields = line.split(None, 5)
        if len(fields) == 6 and "x" in fields[1] and fields[4] != "0":
            yield f"/proc/{pid}/map_files/{fields[0]}", (fields[3], fields[4], fields[5])


def _fuse_mounts(pid: int) -> dict[str, str]:
    """Return the type by device, as maps has it, of what this process sees of file systems served by programs."""
    try:
        lines = Path(f"/proc/{pid}/mountinfo").read_text(errors="replace").splitlines()
    except OSError:
        return {}
    found: dict[str, str] = {}
    for line in lines:
        before, _, after = line.partition(" - ")
        if after.startswith("fuse"):
            major, _, minor = before.split(" ", 3)[2].partition(":")
            found[f"{int(major):02x}:{int(minor):02x}"] = after.split(" ", 1)[0]
    return found


def _read_image(request: ReadImage) -> tuple[Answer, list[int]]:
    """Read GPU code from a process into a sealed memfd.

    /proc/PID/mem is bound at open to the address space of one process: the start time is checked after it was opened
    and again at the end, so that no byte of another process can be handed out. Only what begins like GPU code is read,
    and no more of it than its own header says: this is no way to read memory at large.
    """
    process = request.process
    if request.path:
        return _read_image_file(process, request.path)
    try:
        fd = os.open(f"/proc/{process.pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        return Refused(f"{process}: {error.strerror}"), []
    try:
        if start_ticks_of(process.pid) != process.start_ticks:
            return Refused(f"{process} is another process by now"), []
        kind, size = image_extent(os.pread(fd, HEADER_BYTES, request.address))
        if kind == "unknown":
            return Refused(f"no GPU code at {request.address:#x} of {process}"), []
        code = _read_memory(fd, request.address, min(size or PTX_BYTES_MAX, IMAGE_BYTES_MAX), text=kind == "ptx")
        if start_ticks_of(process.pid) != process.start_ticks:
            return Refused(f"{process} ended meanwhile"), []
    except (OSError, OverflowError) as error:
        return Refused(f"{process}: {error}"), []
    finally:
        os.close(fd)
    return Opened(("image",), kind, {"size_bytes": len(code), "claimed_bytes": size}), [_sealed(code)]


def _read_image_file(process: ProcessId, path: str) -> tuple[Answer, list[int]]:
    """Read a file of GPU code as the process named it, by its own root and folder, into a sealed memfd.

    The path was written by the tenant: it may lead anywhere below the process's root and nowhere else, and to a file on
    whose contents nobody can let us wait. As with memory, only what is GPU code is handed out.
    """
    from gpuguard import _launches

    try:
        root = os.open(f"/proc/{process.pid}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            where = str(Path(f"/proc/{process.pid}/cwd").readlink() / path)
            fd = _launches.open_in_root(root, os.fsencode(where))
        finally:
            os.close(root)
    except (OSError, ValueError) as error:
        return Refused(f"{process}: {path}: {error}"), []
    try:
        file_system = _file_system(process.pid, fd)
        if file_system.startswith("fuse"):
            return Refused(f"{process}: {path} lies on {file_system}, whose server could let us wait"), []
        if start_ticks_of(process.pid) != process.start_ticks:
            return Refused(f"{process} is another process by now"), []
        content = _content(fd)
    except OSError as error:
        return Refused(f"{process}: {path}: {error}"), []
    finally:
        os.close(fd)
    kind, size = image_extent(content[:HEADER_BYTES])
    if kind == "unknown" or (kind == "ptx" and (b".version" not in content or b".target" not in content)):
        return Refused(f"{path} of {process} is no GPU code"), []
    content = content[:size or PTX_BYTES_MAX]
    return Opened(("image",), kind, {"size_bytes": len(content), "claimed_bytes": size}), [_sealed(content)]


def _content(fd: int) -> bytes:
    """Return the first IMAGE_BYTES_MAX bytes of a regular file."""
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        return b""
    with os.fdopen(os.dup(fd), "rb") as stream:
        return stream.read(IMAGE_BYTES_MAX)


def _file_system(pid: int, fd: int) -> str:
    """Return the type of the file system that a file of this process lies on, "" if its mount is not shown."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines())
    mount = fields["mnt_id"].strip()
    for line in Path(f"/proc/{pid}/mountinfo").read_text(errors="replace").splitlines():
        before, _, after = line.partition(" - ")
        if before.split(" ", 1)[0] == mount:
            return after.split(" ", 1)[0]
    return ""


def _read_memory(fd: int, address: int, size: int, *, text: bool) -> bytes:
    """Return up to ``size`` bytes; less where memory ends before, or the text does."""
    chunks: list[bytes] = []
    done = 0
    while done < size:
        # Chunks end on page bounds, so that an unmapped page costs no byte before it.
        wanted = min(IMAGE_CHUNK_BYTES if not text else 4096, size - done)
        wanted = min(wanted, IMAGE_CHUNK_BYTES - (address + done) % 4096)
        try:
            chunk = os.pread(fd, wanted, address + done)
        except OSError:
            break
        if text and b"\0" in chunk:
            chunks.append(chunk[:chunk.index(b"\0")])
            break
        if not chunk:
            break
        chunks.append(chunk)
        done += len(chunk)
    return b"".join(chunks)


def _sealed(content: bytes) -> int:
    fd = os.memfd_create("gpu-code", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    view = memoryview(content)
    while view:
        view = view[os.write(fd, view):]
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
    return fd


# -- the guard's half -------------------------------------------------------------------------------------------------


class Broker(Protocol):
    """What this sensor needs of the broker's client."""

    def ask(self, request: Request) -> tuple[Answer, Sequence[int]]:
        """Send one request and return its answer and descriptors."""
        ...


class _Image(Struct):
    """One image that is still to be read."""

    time_ns: int
    process: ProcessId
    module: int
    address: int
    header: bytes
    kind: ImageKind
    size_bytes: int
    path: str = ""


def _new_buffers(rows_max: int) -> tuple[np.ndarray, np.ndarray]:
    # Untouched pages cost nothing, so room for a full table may be kept.
    return np.empty(rows_max, KEY), np.empty(rows_max, VALUE)


def _bytes_of(rows: np.ndarray) -> memoryview:
    return rows.view(np.uint8).reshape(-1).data


def open_sensor(broker: Broker, config: Config) -> LaunchSensor | CooperativeSensor:
    """Open the launch eye: by probes, else, where there is a folder for it, by what processes tell of themselves.

    Raises
    ------
    EyeClosed
        If the broker cannot place probes on this host, with what would be needed.
    """
    answer, descriptors = broker.ask(OpenLaunches(tuple(config.launches.libraries)))
    if not isinstance(answer, Opened):
        for fd in descriptors:
            os.close(fd)
        reason = answer.reason if isinstance(answer, Refused) else f"unexpected answer {answer}"
        cooperative = capture.open_sensor(config.launches.interval_ms * 1_000_000, reason)
        if cooperative is None:
            raise EyeClosed(f"{reason}; {capture.FOLDER_VARIABLE} would open it for processes that cooperate")
        return cooperative
    return LaunchSensor(broker, answer, list(descriptors), config.launches.interval_ms * 1_000_000)


class LaunchDeltas:
    """What each row gained since it was last read. Pure: rows in, rows out."""

    def __init__(self, ticks_per_s: int, clock_offset_ns: int) -> None:
        self._before: dict[bytes, np.void] = {}
        self._ticks_per_s = ticks_per_s
        self.clock_offset_ns = clock_offset_ns
        self._read_ns = 0
        self._pruned_ns = 0

    def take(self, keys: np.ndarray, values: np.ndarray, boot_ns: int) -> np.ndarray:
        """Return LAUNCH rows of what is new in these KEY and VALUE rows, which were read at ``boot_ns``.

        A row that was deleted and made anew has another ``first_ns`` and counts from zero. The first launch since the
        last read is known exactly for a new row only; else it is taken to lie where even spacing would put it.
        """
        if not len(keys):  # most hosts, most of the time
            self._before.clear()
            self._read_ns = boot_ns
            return np.zeros(0, LAUNCH)
        touched = values["last_ns"] >= self._read_ns - SLACK_NS
        keys, values, all_keys = keys[touched], values[touched].copy(), keys
        before = np.zeros(len(keys), VALUE)
        raw = keys.tobytes()
        for i, value in enumerate(values):
            key = raw[i * KEY.itemsize:(i + 1) * KEY.itemsize]
            known = self._before.get(key)
            if known is not None and known["first_ns"] == value["first_ns"]:
                before[i] = known
            self._before[key] = value
        self._read_ns = boot_ns
        self._prune(all_keys, boot_ns)
        gained = values["launches"] > before["launches"]
        return self._rows(keys[gained], values[gained], before[gained])

    def _rows(self, keys: np.ndarray, values: np.ndarray, before: np.ndarray) -> np.ndarray:
        rows = np.zeros(len(keys), LAUNCH)
        launches = values["launches"] - before["launches"]
        span = values["last_ns"] - before["last_ns"]
        even = before["last_ns"] + span // np.maximum(launches, 1).astype(np.int64)
        rows["first_ns"] = np.where(before["launches"] == 0, values["first_ns"], even) + self.clock_offset_ns
        rows["last_ns"] = np.maximum(values["last_ns"] + self.clock_offset_ns, rows["first_ns"])
        rows["launches"] = launches
        rows["gaps_log2"] = values["gaps_log2"] - before["gaps_log2"]
        # Field 22 of /proc/PID/stat: nsec_to_clock_t(start_boottime), fs/proc/array.c.
        rows["start_ticks"] = keys["start_ns"] // np.uint64(SECOND_NS // self._ticks_per_s)
        for name in ("kernel", "pid", "api", "grid", "block", "shared_bytes"):
            rows[name] = keys[name]
        return rows[np.argsort(rows["last_ns"], kind="stable")]

    def _prune(self, keys: np.ndarray, boot_ns: int) -> None:
        if boot_ns - self._pruned_ns < PRUNE_PERIOD_NS:
            return
        self._pruned_ns = boot_ns
        raw = keys.tobytes()
        alive = {raw[i:i + KEY.itemsize] for i in range(0, len(raw), KEY.itemsize)}
        self._before = {key: value for key, value in self._before.items() if key in alive}


class KernelNames:
    """Handles to names to code: what the ring's events say, joined. Pure, and bounded."""

    def __init__(self) -> None:
        #: (name, module, when it was looked up)
        self._names: BoundedTable[tuple[ProcessId, int], tuple[str, int, int]] = BoundedTable(HANDLES_MAX)
        self._unloaded: BoundedTable[tuple[ProcessId, int], int] = BoundedTable(HANDLES_MAX)
        self._code: BoundedTable[tuple[ProcessId, int], str] = BoundedTable(HANDLES_MAX)
        self._waiting: BoundedTable[tuple[ProcessId, int], list[tuple[int, str]]] = BoundedTable(MODULES_WAITING_MAX)

    def loaded(self, process: ProcessId, module: int) -> None:
        """A module was loaded; its code is not read yet."""
        self._code.pop((process, module))
        self._waiting[process, module] = []

    def unloaded(self, time_ns: int, process: ProcessId, module: int) -> None:
        """A module is gone: whoever is given one of its kernels' handles from now on is another kernel."""
        self._code.pop((process, module))
        self._waiting.pop((process, module))
        self._unloaded[process, module] = time_ns

    def looked_up(self, time_ns: int, process: ProcessId, handle: int, module: int, name: str) -> KernelName:
        """A kernel was looked up by name in a module or library."""
        self._names[process, handle] = (name, module, time_ns)
        waiting = self._waiting.get((process, module))
        if waiting is not None and len(waiting) < NAMES_PER_MODULE_MAX:
            waiting.append((handle, name))
        return KernelName(time_ns, process, handle, name, self._code.get((process, module)) or "")

    def asked(self, time_ns: int, process: ProcessId, handle: int, name: str) -> KernelName | None:
        """The driver said what a handle is called; None where that is known."""
        known = self._known(process, handle)
        return None if known and known[0] == name else self.looked_up(time_ns, process, handle, 0, name)

    def knows(self, process: ProcessId, handle: int) -> bool:
        """Return whether this handle's name is known."""
        return self._known(process, handle) is not None

    def forget(self, process: ProcessId, handle: int) -> bool:
        """Drop a name that is known no longer; return whether there was one."""
        return self._known(process, handle) is None and self._names.pop((process, handle)) is not None

    def _known(self, process: ProcessId, handle: int) -> tuple[str, int, int] | None:
        known = self._names.get((process, handle))
        return known if known and known[2] > (self._unloaded.get((process, known[1])) or 0) else None

    def aliased(self, time_ns: int, process: ProcessId, handle: int, original: int) -> KernelName | None:
        """The same kernel, or the same module, was given out under another handle."""
        known = self._known(process, original)
        if known:
            return self.looked_up(time_ns, process, handle, known[1], known[0])
        code = self._code.get((process, original))
        if code:
            self._code[process, handle] = code
        return None

    def read(self, time_ns: int, process: ProcessId, module: int, sha256: str) -> list[KernelName]:
        """The code of a module was read: name again what was looked up in it meanwhile."""
        self._code[process, module] = sha256
        waiting = self._waiting.pop((process, module)) or []
        return [KernelName(time_ns, process, handle, name, sha256) for handle, name in waiting]


def _name(event: np.void) -> str:
    return bytes(event["text"]).split(b"\0", 1)[0].decode("utf-8", "replace")


class LaunchSensor:
    """Reads the table each interval, and names and images as they come. See the head of this file."""

    name = NAME

    def __init__(self, broker: Broker, opened: Opened, descriptors: list[int], interval_ns: int) -> None:
        from gpuguard import _launches
        from gpuguard.code.eye import CodeEye

        self.period_ns: int | None = interval_ns
        self._code = CodeEye(self._open_reader)
        self._unjudged: BoundedTable[str, bool] = BoundedTable(IMAGES_WAITING_MAX)
        self.mode = opened.mode
        self._broker = broker
        handles = dict(zip(opened.descriptors, descriptors, strict=True))
        self._ring: Ring = _launches.Ring(handles["events"], opened.values["ring_bytes"])
        os.close(handles["events"])
        self.descriptor: int | None = handles["epoll"]
        self.rows_fd, self._counters_fd = handles["rows"], handles["counters"]
        self._keys, self._values = _new_buffers(opened.values["rows_max"])
        self._clock_offset_ns = capture.clock_offset_ns(0)
        self._ticks_per_s = os.sysconf("SC_CLK_TCK")
        self._boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        self._deltas = LaunchDeltas(self._ticks_per_s, self._clock_offset_ns)
        self._names = KernelNames()
        self._images: list[_Image] = []
        self._waiting: Counter[ProcessId] = Counter()
        self._dropped: Counter[ProcessId] = Counter()
        self._counted = list(_launches.read_counters(self._counters_fd))
        self._told_lost_ns = [0] * len(COUNTERS)
        self._refused = opened.values.get("refused", 0)
        self._young: list[tuple[int, int]] = []
        self._uncounted: BoundedTable[ProcessId, bool] = BoundedTable(HANDLES_MAX)
        self._nameless: BoundedTable[ProcessId, bool] = BoundedTable(HANDLES_MAX)
        self._scanned_ns = self._rows_read_ns = self._told_alive_ns = 0
        self._gaps: list[Block] = []
        if self._refused:
            self._gap(time.time_ns(), opened.mode)

    def _open_reader(self) -> socket.socket | None:
        """Have the broker start who reads images; None: the code eye starts it itself, if it can."""
        answer, descriptors = self._broker.ask(OpenReader())
        return socket.socket(fileno=descriptors[0]) if isinstance(answer, Opened) else None

    def notice(self, block: Block) -> None:
        """A process was executed: look at its maps soon, it may bring a driver library of its own."""
        if isinstance(block, ProcessStarted) and len(self._young) < YOUNG_MAX:
            self._young += [(block.time_ns + after_ns, block.process.pid) for after_ns in YOUNG_LOOKS_NS]

    def read(self, now_ns: int) -> list[Block]:
        """Return names, images, launches and gaps since the last call, in an order in which they can be judged."""
        self._scan(now_ns)
        self._clock_offset_ns = self._deltas.clock_offset_ns = capture.clock_offset_ns(self._clock_offset_ns)
        blocks = self._read_events()
        blocks += self._read_images()
        blocks += self._judged()
        if self.period_ns is None or now_ns - self._rows_read_ns >= self.period_ns // 2:
            self._rows_read_ns = now_ns
            blocks += self._read_rows(now_ns)
            self._count_gaps(now_ns)
        blocks += self._gaps
        self._gaps = []
        return blocks

    def close(self) -> None:
        """Give every handle back."""
        self._code.close()
        self._ring.close()
        for fd in (self.rows_fd, self._counters_fd, self.descriptor):
            if fd is not None and fd >= 0:
                os.close(fd)
        self.rows_fd = self._counters_fd = -1
        self.descriptor = None

    def _process(self, event: np.void) -> ProcessId:
        return ProcessId(self._boot_id, int(event["pid"]), int(event["start_ns"]) * self._ticks_per_s // SECOND_NS)

    def _gap(self, now_ns: int, reason: str, *, lost: int | None = None, process: ProcessId | None = None) -> None:
        self._gaps.append(Gap(time_ns=now_ns, sensor=NAME, reason=reason, lost=lost, process=process))

    def _scan(self, now_ns: int) -> None:
        due = tuple({pid for at_ns, pid in self._young if at_ns <= now_ns})
        self._young = [one for one in self._young if one[0] > now_ns]
        everywhere = now_ns - self._scanned_ns >= SCAN_PERIOD_NS
        if not due and not everywhere:
            return
        if everywhere:
            self._scanned_ns = now_ns
        answer, _ = self._broker.ask(ScanLaunches(() if everywhere else due))
        if not isinstance(answer, Opened):
            self._gap(now_ns, answer.reason if isinstance(answer, Refused) else "new libraries could not be looked for")
        elif answer.values.get("refused", 0) > self._refused:
            self._refused = answer.values["refused"]
            self._gap(now_ns, answer.mode)

    def _read_events(self) -> list[Block]:
        raw = self._ring.read(EVENTS_PER_READ)
        blocks: list[Block] = []
        for event in np.frombuffer(raw, EVENT):
            block = self._take_event(event)
            if block:
                blocks.append(block)
        return blocks

    def _take_event(self, event: np.void) -> Block | None:
        process, time_ns = self._process(event), int(event["time_ns"]) + self._clock_offset_ns
        handle, parent = int(event["handle"]), int(event["parent"])
        match int(event["form"]):
            case form if form in (CALL_LOOKUP, CALL_CREATE):
                return self._names.looked_up(time_ns, process, handle, parent, _name(event))
            case form if form == CALL_ALIAS:
                return self._names.aliased(time_ns, process, handle, parent)
            case form if form in (CALL_IMAGE, CALL_LINK):
                header = event["text"].tobytes()[:HEADER_BYTES].ljust(HEADER_BYTES, b"\0")
                self._names.loaded(process, handle)
                self._enqueue(_Image(time_ns, process, handle, int(event["address"]), header, *image_extent(header)))
            case form if form == CALL_FILE:
                path = os.fsdecode(bytes(event["text"]).split(b"\0", 1)[0])
                self._names.loaded(process, handle)
                self._enqueue(_Image(time_ns, process, handle, 0, b"", "unknown", 0, path))
            case form if form == CALL_UNLOAD:
                self._names.unloaded(time_ns, process, handle)
            case form if form == CALL_NAMED:
                return self._names.asked(time_ns, process, handle, _name(event))
            case form if form == CALL_POINTER:
                self._tell_uncounted(process, time_ns)
            case form if form == CALL_GRAPH:
                return self._names.looked_up(time_ns, process, handle, parent, f"graph of {event['bytes']} kernels")
            case _:
                self._gap(time_ns, f"unknown event form {event['form']}")
        return None

    def _tell_uncounted(self, process: ProcessId, time_ns: int) -> None:
        """Say once of a process that it can submit work past the loader.

        No probe is placed where its pointer leads: what it hands out could lead anywhere.
        """
        if process not in self._uncounted:
            self._uncounted[process] = True
            reason = "Vulkan work that it submits through pointers of the driver's own is not counted"
            self._gap(time_ns, reason, process=process)

    def _enqueue(self, image: _Image) -> None:
        # A flood of one process must not hide what another loads meanwhile.
        own = self._waiting[image.process]
        if len(self._images) >= IMAGES_WAITING_MAX or own >= IMAGES_WAITING_EACH_MAX:
            self._dropped[image.process] += 1
        else:
            self._images.append(image)
            self._waiting[image.process] += 1

    def _read_images(self) -> list[Block]:
        for process, lost in self._dropped.items():
            self._gap(time.time_ns(), "GPU code not read: too many images at once", lost=lost, process=process)
        self._dropped.clear()
        now, self._images = self._images[:IMAGES_PER_READ], self._images[IMAGES_PER_READ:]
        for image in now:
            self._waiting -= Counter([image.process])
        return [block for image in now for block in self._read_image(image)]

    def _read_image(self, image: _Image) -> list[Block]:
        answer, descriptors = self._broker.ask(ReadImage(image.process, image.address, image.size_bytes, image.path))
        if not isinstance(answer, Opened):
            reason = answer.reason if isinstance(answer, Refused) else str(answer)
            self._gap(image.time_ns, f"GPU code not read: {reason}", lost=1, process=image.process)
            return []
        fd = descriptors[0]
        try:
            size = os.fstat(fd).st_size
            if not size:
                self._gap(image.time_ns, "GPU code not read: the memory was gone", lost=1, process=image.process)
                return []
            if size < answer.values["claimed_bytes"]:
                reason = f"GPU code read in part: {size} of {answer.values['claimed_bytes']} bytes"
                self._gap(image.time_ns, reason, process=image.process)
            with mmap.mmap(fd, size, prot=mmap.PROT_READ) as code:
                if not code[:HEADER_BYTES].startswith(image.header[:size].rstrip(b"\0")):
                    reason = "GPU code not read: other code lies in its place by now"
                    self._gap(image.time_ns, reason, lost=1, process=image.process)
                    return []
                sha256 = hashlib.sha256(code).hexdigest()
            self._code.give(sha256, fd)
        finally:
            os.close(fd)
        names = self._names.read(image.time_ns, image.process, image.module, sha256)
        kind = cast("ImageKind", answer.mode)
        return [ModuleImage(image.time_ns, image.process, sha256, size, kind), *names]

    def _judged(self) -> list[Block]:
        """Return what the code eye made of images; why one could not be judged is told once for all of that reason."""
        verdicts = self._code.take()
        for one in verdicts:
            if one.reason and one.reason not in self._unjudged:
                self._unjudged[one.reason] = True
                self._gap(one.time_ns, f"GPU code not judged, or in part: {one.reason}")
        return list(verdicts)

    def _read_rows(self, now_ns: int) -> list[Block]:
        from gpuguard import _launches

        boot_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        try:
            count = _launches.read_rows(self.rows_fd, _bytes_of(self._keys), _bytes_of(self._values))
        except OSError as error:
            self._gap(now_ns, str(error))
            return []
        rows = self._deltas.take(self._keys[:count], self._values[:count], boot_ns)
        names = self._tell_nameless(rows, now_ns)
        if not len(rows) and now_ns - self._told_alive_ns < ALIVE_PERIOD_NS:
            return []
        # A block without rows says that the eye is open and saw nothing: silence must not look like blindness.
        self._told_alive_ns = now_ns
        return [*names, Launches(now_ns, rows)]

    def _tell_nameless(self, rows: np.ndarray, now_ns: int) -> list[Block]:
        """Say once of a process that it launches kernels whose look-up was not seen.

        Returns the handles whose name held before their module was unloaded, without a name. Nothing is said at the
        first sight: the name may be in the ring still, since the ring was read before the rows.
        """
        named = rows[~np.isin(rows["api"], [LAUNCH_APIS.index(api) for api in NAMELESS_APIS])]
        columns = (named[name].tolist() for name in ("pid", "start_ticks", "kernel"))
        nameless: set[ProcessId] = set()
        stale: list[Block] = []
        for pid, start_ticks, kernel in sorted(set(zip(*columns, strict=True))):
            process = ProcessId(self._boot_id, pid, start_ticks)
            if self._names.forget(process, kernel):
                stale.append(KernelName(now_ns, process, kernel, ""))
            if kernel and not self._names.knows(process, kernel):
                nameless.add(process)
        for process in nameless:
            told = self._nameless.get(process)
            if told is False:
                self._gap(now_ns, "kernels without a name: their look-up was not seen", process=process)
            self._nameless[process] = told is not None
        return stale

    def _count_gaps(self, now_ns: int) -> None:
        from gpuguard import _launches

        counted = _launches.read_counters(self._counters_fd)
        for i, (now, before) in enumerate(zip(counted, self._counted, strict=True)):
            # The first time at once; what goes on for long is said now and then, with all that was lost meanwhile.
            if now == before or now_ns - self._told_lost_ns[i] < LOST_PERIOD_NS:
                continue
            self._gap(now_ns, COUNTERS[i], lost=now - before)
            self._counted[i] = now
            self._told_lost_ns[i] = now_ns
