"""The table that the probes count in: its rows as ext/bpf/launches.h lays them out, what they gained, what is swept."""

from __future__ import annotations

import time
from collections import Counter
from typing import TYPE_CHECKING

import numpy as np

from gpuguard.core.records import LAUNCH

if TYPE_CHECKING:
    from gpuguard._launches import Programs

SECOND_NS = 1_000_000_000
#: A row is looked at again when it was touched at most this long before the last read.
SLACK_NS = SECOND_NS
PRUNE_PERIOD_NS = 60 * SECOND_NS
SWEEP_PERIOD_S = 10.0
IDLE_S, IDLE_WHEN_FULL_S, FULL_RATIO = 60.0, 5.0, 0.75

# struct launch_key and launch_value.
KEY = np.dtype([
    ("start_ns", "<u8"), ("kernel", "<u8"), ("pid", "<u4"), ("api", "<u4"), ("grid", "<u4", (3,)),
    ("block", "<u4", (3,)), ("shared_bytes", "<u4"), ("zero", "<u4"),
])
VALUE = np.dtype([("launches", "<u8"), ("first_ns", "<i8"), ("last_ns", "<i8"), ("gaps_log2", "<u4", (40,))])


def new_buffers(rows_max: int) -> tuple[np.ndarray, np.ndarray]:
    """Return room for the keys and values of a full table: untouched pages cost nothing."""
    return np.empty(rows_max, KEY), np.empty(rows_max, VALUE)


def bytes_of(rows: np.ndarray) -> memoryview:
    """Return the rows as bytes that can be written to."""
    return rows.view(np.uint8).reshape(-1).data


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


class Sweeper:
    """Deletes rows that nobody added to for long, so that gone processes and one-time kernels leave room."""

    def __init__(self, programs: Programs) -> None:
        self._programs = programs
        self._swept_s = time.monotonic()
        self._rows: tuple[np.ndarray, np.ndarray] | None = None

    def sweep(self, read_ns: int) -> None:
        """Delete what is idle and was so when it was read, if it is time; set right how many rows each process holds.

        A guard that is kept waiting reads late: what was launched since ``read_ns`` stays until it comes.
        """
        from gpuguard import _launches

        if time.monotonic() - self._swept_s < SWEEP_PERIOD_S:
            return
        self._swept_s = time.monotonic()
        if self._rows is None:
            self._rows = new_buffers(self._programs.rows_max)
        keys, values = self._rows
        count = _launches.read_rows(self._programs.rows_fd, bytes_of(keys), bytes_of(values))
        idle_s = IDLE_WHEN_FULL_S if count > FULL_RATIO * self._programs.rows_max else IDLE_S
        idle_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME) - int(idle_s * SECOND_NS)
        idle = values["last_ns"][:count] < min(idle_ns, read_ns)
        if idle.any():
            _launches.delete_rows(self._programs.rows_fd, keys[:count][idle].tobytes())
        kept = keys[:count][~idle]
        held = Counter(zip(kept["start_ns"].tolist(), kept["pid"].tolist(), strict=True))
        for start_ns, pid in _launches.shares_of(self._programs.shares_fd):
            _launches.set_rows(self._programs.shares_fd, start_ns, pid, held[start_ns, pid])
        _launches.say_held(self._programs.rows_held_fd, len(kept))
