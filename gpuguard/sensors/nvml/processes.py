"""What each pid holds and uses of a device, and what the driver's accounting says of its whole life."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

from msgspec import Struct

from gpuguard.sensors.nvml.calls import (
    ACCOUNT,
    NOT_FOUND,
    PROCESS,
    SUCCESS,
    USE,
    Library,
    Rows,
    RunningProcess,
    UseSample,
)
from gpuguard.sensors.nvml.fields import ratio

if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

PIDS_MAX = 4_096
SAMPLES_MAX = 16_384
#: A sample from further in the future than clocks drift would hide all that come after it.
AHEAD_US_MAX = 60_000_000
#: NVML_VALUE_NOT_AVAILABLE is 2**64 - 1; what is above these is no measurement.
BYTES_MAX, US_MAX, MS_MAX = 1 << 50, 1 << 53, 1 << 43

#: Every kind of context holds the GPU: an MPS client and a Vulkan program compute as well as a CUDA one.
LISTS = {
    "compute processes": "nvmlDeviceGetComputeRunningProcesses",
    "MPS processes": "nvmlDeviceGetMPSComputeRunningProcesses",
    "graphics processes": "nvmlDeviceGetGraphicsRunningProcesses",
}

Instance = tuple[int, int]


class Use(Struct, frozen=True):
    """What one pid used of one device, before the pid has a name."""

    uuid: str
    pid: int
    memory_used_bytes: int | None = None
    sm_ratio: float | None = None
    memory_ratio: float | None = None
    encoder_ratio: float | None = None
    decoder_ratio: float | None = None


class Account(Struct, frozen=True):
    """nvmlAccountingStats_t of one pid, before it has a name."""

    uuid: str
    pid: int
    started_ns: int
    running: bool
    gpu_ratio: float | None
    memory_ratio: float | None
    memory_max_bytes: int | None
    active_ns: int | None


class ProcessCalls:
    """The calls that list processes, with their buffers: one set for all devices."""

    def __init__(self, library: Library) -> None:
        self._lists = {what: Rows(library, (f"{name}_v3", f"{name}_v2"), PROCESS, rows=64, rows_max=PIDS_MAX)
                       for what, name in LISTS.items()}
        self._uses = Rows(library, ("nvmlDeviceGetProcessUtilization",), USE, rows=512, rows_max=SAMPLES_MAX)
        self._library = library

    def running(self, what: str, handle: Any) -> list[RunningProcess]:
        """Return one of `LISTS` of a device; raises NVMLError."""
        return [RunningProcess(*row) for row in PROCESS.iter_unpack(self._lists[what].read(handle))]

    def samples(self, handle: Any, since_us: int) -> list[UseSample]:
        """Return the driver's samples by process after ``since_us``; raises NVMLError."""
        try:
            rows = self._uses.read(handle, ctypes.c_ulonglong(since_us))
        except self._library.nvml.NVMLError as error:
            if error.value in (SUCCESS, NOT_FOUND):
                return []  # nobody ran
            raise
        return [UseSample(*row) for row in USE.iter_unpack(rows)]

    def account(self, handle: Any, pid: int) -> bytes:
        """Return the nvmlAccountingStats_t of a pid; raises NVMLError."""
        stats = ctypes.create_string_buffer(ACCOUNT.size)
        self._library.check(self._library.function("nvmlDeviceGetAccountingStats")(handle, ctypes.c_uint(pid), stats))
        return stats.raw


def held_by(
    lists: Iterable[RunningProcess], uuid: str, instances: dict[Instance, str],
) -> dict[tuple[str, int], int | None]:
    """Return the memory that each (device, pid) holds, bytes, None where the driver does not say.

    A process on a MIG instance belongs to that device: ``instances`` names it by its GPU and compute instance.
    """
    held: dict[tuple[str, int], int | None] = {}
    for one in lists:
        whose = instances.get((one.gpu_instance_id, one.compute_instance_id), uuid)
        if one.pid == 0 or (len(held) >= PIDS_MAX and (whose, one.pid) not in held):
            continue
        used = one.used_bytes if one.used_bytes <= BYTES_MAX else None
        before = held.get((whose, one.pid))
        held[whose, one.pid] = used if before is None else max(before, used or 0)
    return held


def shares_of(samples: Iterable[UseSample], since_us: int, now_us: int) -> tuple[dict[int, list[float | None]], int]:
    """Return (sm, memory, encoder, decoder) ratio of each pid, the mean of its new samples, and the newest's time.

    The driver gives a sample to a process that did something in a period; one without is idle or was not looked at.
    Entries that were not filled, are old, or from the future are passed over.
    """
    by_pid: dict[int, list[UseSample]] = {}
    newest_us = since_us
    for one in samples:
        if not since_us < one.time_us <= now_us + AHEAD_US_MAX or one.pid == 0:
            continue
        if one.pid in by_pid or len(by_pid) < PIDS_MAX:
            by_pid.setdefault(one.pid, []).append(one)
            newest_us = max(newest_us, one.time_us)
    return {pid: [_mean([ratio(one[column]) for one in seen]) for column in range(2, 6)]
            for pid, seen in by_pid.items()}, newest_us


def account(uuid: str, pid: int, stats: bytes) -> Account:
    """Return what an nvmlAccountingStats_t says."""
    gpu, memory, memory_max, active_ms, started_us, running = ACCOUNT.unpack(stats)
    return Account(
        uuid=uuid,
        pid=pid,
        started_ns=min(started_us, US_MAX) * 1_000,
        running=bool(running),
        gpu_ratio=ratio(gpu),
        memory_ratio=ratio(memory),
        memory_max_bytes=memory_max if memory_max <= BYTES_MAX else None,
        active_ns=active_ms * 1_000_000 if active_ms <= MS_MAX else None,
    )


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
