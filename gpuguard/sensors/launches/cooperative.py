"""The cooperative tier, read: rings of processes that were given ``libgpuguard_capture.so`` (ext/inject/shim.c).

For hosts where probes cannot be placed, such as a guard without root. It sees only who cooperates, and says so. Nothing
in a ring is trusted: it is a tenant's file. It is read with pread, never mapped (whoever shortens a mapped file kills
the reader); sizes are ours; a record counts only for the process that maps that very file; times are held between the
last read and now; what is no record is counted and dropped. A process can lie about itself here, and only about itself.
"""

from __future__ import annotations

import os
import stat
import time
from pathlib import Path

import numpy as np
from msgspec import Struct, field

from gpuguard.core.bounded import BoundedTable
from gpuguard.core.records import LAUNCH, LAUNCH_APIS, Block, Gap, KernelName, Launches
from gpuguard.core.subjects import ProcessId
from gpuguard.kernels.launches import event_rows
from gpuguard.proctree import boot_id, lines_of, member
from gpuguard.sensors.processes.procfs import steady_boot_ns

NAME = "launches"
LIBRARY = Path(__file__).parents[2] / "libgpuguard_capture.so"
FOLDER_VARIABLE = "GPUGUARD_CAPTURE_DIR"
#: CAPTURE_MAGIC, CAPTURE_SLOTS and CAPTURE_HEADER_BYTES of ext/inject/capture.h.
MAGIC, SLOTS, HEADER_BYTES = 0x3145525554504143, 16_384, 4_096
HEAD_AT, TAIL_AT = 64, 128
KIND_LAUNCH, KIND_NAME, KIND_ALIAS = range(3)
RINGS_MAX = 256
#: So many files that are no rings of ours yet are looked at in one read: a folder may be full of anything.
FILES_PER_LOOK, REFUSED_MAX = 32, 4_096
#: What a ring says of itself is repeated this often at most, with all that came together meanwhile.
TELL_PERIOD_NS = 60 * 1_000_000_000
#: As often it is said again that others are not seen.
BLIND_PERIOD_NS = 300 * 1_000_000_000
ALIVE_PERIOD_NS = 10 * 1_000_000_000
REFUSED_NS = 2 * 1_000_000_000
KEYS_MAX = 16_384
HANDLES_MAX = 65_536

#: struct capture_record of ext/inject/capture.h.
RECORD = np.dtype([
    ("sequence", "<u8"), ("time_ns", "<u8"), ("kernel", "<u8"), ("kind", "<u4"), ("api", "<u4"), ("grid", "<u4", (3,)),
    ("block", "<u4", (3,)), ("shared_bytes", "<u4"), ("zero", "<u4"), ("text", "S64"),
])
FILE_BYTES = HEADER_BYTES + SLOTS * RECORD.itemsize
_KEY_BYTES = slice(16, 64)  # kernel to zero


def folder() -> Path | None:
    """Return where rings are looked for, None where neither variable says so."""
    if told := os.environ.get(FOLDER_VARIABLE):
        return Path(told)
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    return Path(runtime, "gpuguard", "capture") if runtime else None


class Ring(Struct):
    """One process's file, and what was taken from it."""

    process: ProcessId
    descriptor: int
    tail: int = 0
    lost: int = 0
    unwrapped: int = 0
    last_ns: int = 0
    malformed: int = 0
    told_ns: dict[str, int] = field(default_factory=dict)
    last_of_key: BoundedTable[bytes, int] = field(default_factory=lambda: BoundedTable(KEYS_MAX))


class CooperativeSensor:
    """Reads all rings of one folder."""

    name = NAME
    descriptor: int | None = None

    def __init__(self, where: Path, interval_ns: int, reason: str) -> None:
        self.period_ns: int | None = interval_ns
        self.mode = f"cooperative, {where}"
        self._where = where
        self._boot_id = boot_id()
        self._offset_ns = steady_boot_ns(0)
        self._rings: dict[str, Ring] = {}
        self._refused: BoundedTable[str, tuple[str, int]] = BoundedTable(REFUSED_MAX)
        self._turn = 0
        self._told_full_ns = 0
        self._names: BoundedTable[tuple[ProcessId, int], str] = BoundedTable(HANDLES_MAX)
        self._blind = f"only launches of processes that were given {LIBRARY.name} are seen: {reason}"
        self._told_blind_ns = self._told_alive_ns = 0
        self._gaps: list[Block] = []

    def read(self, now_ns: int) -> list[Block]:
        """Return names, launches and gaps since the last call."""
        if now_ns - self._told_blind_ns >= BLIND_PERIOD_NS:
            self._told_blind_ns = now_ns
            self._gap(now_ns, self._blind, None)
        if now_ns - self._told_alive_ns >= ALIVE_PERIOD_NS:
            # A block without rows says that rings are read: silence must not look like blindness.
            self._told_alive_ns = now_ns
            self._gaps.append(Launches(now_ns, np.zeros(0, LAUNCH)))
        self._offset_ns = steady_boot_ns(self._offset_ns)
        self._find(now_ns)
        blocks: list[Block] = []
        for file, ring in list(self._rings.items()):
            ended = _ended(ring.process)
            blocks += self._drain(ring, now_ns)
            if ended:
                os.close(ring.descriptor)
                del self._rings[file]
                (self._where / file).unlink(missing_ok=True)
        blocks += self._gaps
        self._gaps = []
        return blocks

    def close(self) -> None:
        """Give every file back."""
        for ring in self._rings.values():
            os.close(ring.descriptor)
        self._rings.clear()

    def _gap(self, now_ns: int, reason: str, process: ProcessId | None, lost: int | None = None) -> None:
        self._gaps.append(Gap(now_ns, NAME, reason, lost=lost, process=process))

    def _find(self, now_ns: int) -> None:
        try:
            files = [one for one in os.listdir(self._where) if one.endswith(".ring") and one not in self._rings]
        except OSError as error:
            self._gap(now_ns, f"{self._where}: {error.strerror}", None)
            return
        due = [one for one in files if now_ns >= (self._refused.get(one) or ("", 0))[1]]
        # Begun where the last look ended.
        self._turn = self._turn % len(due) if due else 0
        due = (due[self._turn:] + due[:self._turn])[:FILES_PER_LOOK]
        self._turn += FILES_PER_LOOK
        shown = _shown_pids() if due else {}
        for file in due:
            if len(self._rings) >= RINGS_MAX:
                self._tell_full(now_ns)
                return
            self._try(file, shown.get(_pid_of(file), []), now_ns)

    def _tell_full(self, now_ns: int) -> None:
        if now_ns - self._told_full_ns >= TELL_PERIOD_NS:
            self._told_full_ns = now_ns
            self._gap(now_ns, f"{RINGS_MAX} rings are read already: what other processes launch is not seen", None)

    def _try(self, file: str, pids: list[int], now_ns: int) -> None:
        """Open one file as the ring of one of these processes, or keep why it is none."""
        refused, _ = self._refused.get(file) or ("", 0)
        try:
            ring = _open_ring(self._where / file, self._boot_id, pids)
            if any(one.process == ring.process for one in self._rings.values()):
                os.close(ring.descriptor)
                raise ValueError("its process has a ring already")
            self._rings[file] = ring
        except (OSError, ValueError) as error:
            if not pids:
                # It ended before anybody looked: whose it was cannot be told any more.
                (self._where / file).unlink(missing_ok=True)
            # One just begun is complete in a moment; whatever is none for longer is looked at again now and then.
            self._refused[file] = (str(error), now_ns + (REFUSED_NS if refused == str(error) else 0))
            if refused != str(error):
                self._gap(now_ns, f"{file} is not read: {error}", None)

    def _drain(self, ring: Ring, now_ns: int) -> list[Block]:
        boot_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        try:
            records = _records(ring)
        except (OSError, ValueError) as error:
            self._tell(ring, now_ns, f"its ring cannot be read: {error}")
            return []
        self._tell_counts(ring, now_ns)
        times = np.minimum(records["time_ns"], np.uint64(boot_ns)).astype(np.int64)
        records["time_ns"] = np.maximum.accumulate(np.maximum(times, ring.last_ns)) if len(times) else times
        ring.last_ns = int(records["time_ns"][-1]) if len(records) else ring.last_ns
        sane = (records["kind"] <= KIND_ALIAS) & (records["api"] < len(LAUNCH_APIS)) & (records["zero"] == 0)
        ring.malformed += int((~sane).sum())
        if ring.malformed and self._tell(ring, now_ns, "malformed records", ring.malformed):
            ring.malformed = 0
        records = records[sane]
        blocks: list[Block] = list(self._name(ring.process, records[records["kind"] != KIND_LAUNCH]))
        launched = records[records["kind"] == KIND_LAUNCH]
        return [*blocks, Launches(now_ns, self._rows(ring, launched))] if len(launched) else blocks

    def _tell_counts(self, ring: Ring, now_ns: int) -> None:
        header = os.pread(ring.descriptor, 32, 0).ljust(32, b"\0")
        lost, unwrapped = (min(int(value), 2**53) for value in np.frombuffer(header, "<u8")[2:])
        if lost > ring.lost and self._tell(ring, now_ns, "launches lost: its ring was full", lost - ring.lost):
            ring.lost = lost
        if unwrapped > ring.unwrapped and self._tell(
                ring, now_ns, "calls of its driver have an unknown shape and are not seen", unwrapped - ring.unwrapped):
            ring.unwrapped = unwrapped

    def _tell(self, ring: Ring, now_ns: int, reason: str, lost: int | None = None) -> bool:
        """Tell what a ring says of itself, unless that was told just now: whoever writes it could say it all day."""
        kind = reason[:16]
        if now_ns - ring.told_ns.get(kind, -TELL_PERIOD_NS) < TELL_PERIOD_NS:
            return False
        ring.told_ns[kind] = now_ns
        self._gap(now_ns, reason, ring.process, lost)
        return True

    def _name(self, process: ProcessId, records: np.ndarray) -> list[KernelName]:
        found = []
        for record in records:
            handle, raw = int(record["kernel"]), record["text"].ljust(64, b"\0")
            if record["kind"] == KIND_NAME:
                text: str | None = raw.split(b"\0", 1)[0].decode("utf-8", "replace")
            else:
                text = self._names.get((process, int.from_bytes(raw[:8], "little")))
            if text:
                self._names[process, handle] = text
                found.append(KernelName(int(record["time_ns"]) + self._offset_ns, process, handle, text))
        return found

    def _rows(self, ring: Ring, launched: np.ndarray) -> np.ndarray:
        """Return LAUNCH rows, as the table of the probes would have them."""
        raw = np.ascontiguousarray(launched).view(np.uint8).reshape(len(launched), RECORD.itemsize)[:, _KEY_BYTES]
        _, index, keys = np.unique(np.ascontiguousarray(raw).view("V48").reshape(-1), return_index=True,
                                   return_inverse=True)
        # The launch before of the same key, so that gaps reach across two reads.
        key_bytes = [raw[i].tobytes() for i in index]
        before = [(at, ring.last_of_key.get(key)) for at, key in enumerate(key_bytes)]
        known = np.array([at for at, last in before if last is not None], np.int32)
        lasts = np.array([last for _, last in before if last is not None], np.int64)
        times = np.concatenate([lasts, launched["time_ns"].astype(np.int64)])
        (launches, _, last, gaps), _ = event_rows(times, np.concatenate([known, keys.reshape(-1)]), len(index))
        launches[known] -= np.uint64(1)
        for at, key in enumerate(key_bytes):
            ring.last_of_key[key] = int(last[at])
        rows = np.zeros(len(index), LAUNCH)
        for name in ("kernel", "api", "grid", "block", "shared_bytes"):
            rows[name] = launched[name][index]
        rows["pid"], rows["start_ticks"] = ring.process.pid, ring.process.start_ticks
        rows["launches"], rows["gaps_log2"] = launches, gaps
        rows["first_ns"] = launched["time_ns"][index].astype(np.int64) + self._offset_ns
        rows["last_ns"] = last + self._offset_ns
        return rows[np.argsort(rows["last_ns"], kind="stable")]


def _ended(process: ProcessId) -> bool:
    now = member(process.pid)
    return now is None or now.is_gone or now.start_ticks != process.start_ticks


def _open_ring(path: Path, boot: str, pids: list[int]) -> Ring:
    """Open the ring of that one of these processes which maps it.

    Raises `OSError`, and `ValueError` where it is none or nobody's.
    """
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode) or found.st_size != FILE_BYTES:
            raise ValueError("not a ring")
        if int.from_bytes(os.pread(fd, 8, 0), "little") != MAGIC:
            raise ValueError("not begun yet")
        pid = next((pid for pid in pids if _maps(pid, found)), 0)
        owner = member(pid)
        if owner is None:
            raise ValueError("the process that it is named after does not map it")
    except BaseException:
        os.close(fd)
        raise
    return Ring(ProcessId(boot, pid, owner.start_ticks), fd)


def _shown_pids() -> dict[int, list[int]]:
    """Return who may be meant by a pid: the process that has it here, and any that has it in a namespace below."""
    found: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            status = lines_of(Path("/proc", name, "status"))
        except OSError:
            continue
        own = next((line.split()[1:] for line in status if line.startswith("NSpid:")), [])
        for pid in {int(name), *map(int, own[-1:])}:
            # Whoever has it here comes first.
            found.setdefault(pid, []).insert(0 if pid == int(name) else len(found[pid]), int(name))
    return found


def _pid_of(file: str) -> int:
    stem = file.removesuffix(".ring").partition("-")[0]
    return int(stem) if stem.isascii() and stem.isdigit() and len(stem) < 10 else 0


def _maps(pid: int, found: os.stat_result) -> bool:
    device = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}"
    try:
        lines = lines_of(Path(f"/proc/{pid}/maps"))
    except OSError:
        return False
    return any(line.split()[3:5] == [device, str(found.st_ino)] for line in lines)


def _records(ring: Ring) -> np.ndarray:
    """Take every complete record in order, and tell the writer that there is room again."""
    head = int.from_bytes(os.pread(ring.descriptor, 8, HEAD_AT), "little")
    count = head - ring.tail
    if not 0 <= count <= SLOTS:
        raise ValueError(f"it claims {count} records")
    start = ring.tail % SLOTS
    parts = [(start, min(count, SLOTS - start)), (0, max(0, count - (SLOTS - start)))]
    data = b"".join(os.pread(ring.descriptor, size * RECORD.itemsize, HEADER_BYTES + at * RECORD.itemsize)
                    for at, size in parts if size)
    records = np.frombuffer(data[:len(data) // RECORD.itemsize * RECORD.itemsize], RECORD).copy()
    expected = np.arange(ring.tail + 1, ring.tail + 1 + len(records), dtype=np.uint64)
    wrong = np.flatnonzero(records["sequence"] != expected)
    records = records[:wrong[0]] if len(wrong) else records
    ring.tail += len(records)
    os.pwrite(ring.descriptor, ring.tail.to_bytes(8, "little"), TAIL_AT)
    return records


def open_sensor(interval_ns: int, reason: str) -> CooperativeSensor | None:
    """Open the tier where there is a folder for it; make the one that the variable names. None: there is none."""
    where = folder()
    if where is None:
        return None
    if FOLDER_VARIABLE in os.environ:
        where.mkdir(mode=0o700, parents=True, exist_ok=True)
    return CooperativeSensor(where, interval_ns, reason) if where.is_dir() else None
