"""What each pid holds and uses of a device, and what the driver's accounting says of its whole life."""

from __future__ import annotations

import ctypes
import functools
from typing import TYPE_CHECKING

from gpuguard.sensors.nvml.calls import (
    ACCOUNT,
    INSTANCE_ANY,
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
from gpuguard.sensors.nvml.sweep import Account, Use

if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

    from gpuguard.sensors.nvml.asking import Asking
    from gpuguard.sensors.nvml.gpu import Gpu
    from gpuguard.sensors.nvml.sweep import Sweep

PIDS_MAX = 4_096
#: Accounting takes one call a pid, and keeps thousands.
ACCOUNTS_PER_ROUND = 64
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


class ProcessCalls:
    """Asks who is on a device; the buffers of its calls are one set for all devices."""

    def __init__(self, library: Library, asking: Asking) -> None:
        self._asking = asking
        self._lists = {what: Rows(library, (f"{name}_v3", f"{name}_v2"), PROCESS, rows=64, rows_max=PIDS_MAX)
                       for what, name in LISTS.items()}
        self._uses = Rows(library, ("nvmlDeviceGetProcessUtilization",), USE, rows=512, rows_max=SAMPLES_MAX)
        self._library = library

    def uses(self, gpu: Gpu, sweep: Sweep) -> list[Use]:
        """Return what each pid holds and uses of a device and of its MIG instances.

        Memory, bytes: the process lists. SM, memory and video share, 0..1: nvmlDeviceGetProcessUtilization since the
        last round; absent with MIG.
        """
        instances = {one.instance: one.uuid for one in gpu.instances if one.instance}
        held = held_by(self._running(gpu, sweep), gpu.uuid, instances)
        if gpu.use_seen_us > sweep.time_ns // 1_000 + AHEAD_US_MAX:
            gpu.use_seen_us = 0  # the clock was set back
        read = functools.partial(self._samples, gpu.handle, gpu.use_seen_us)
        samples = self._asking.ask(gpu, sweep, "process utilization", read) or ()
        shares, gpu.use_seen_us = shares_of(samples, gpu.use_seen_us, sweep.time_ns // 1_000)
        listed = {pid for _, pid in held}
        owners = [*held, *((gpu.uuid, pid) for pid in shares if pid not in listed)]
        return [Use(uuid, pid, held.get((uuid, pid)), *shares.get(pid, ())) for uuid, pid in sorted(owners)]

    def accounts(self, gpu: Gpu, sweep: Sweep) -> None:
        """Ask for the accounts of pids, a few a round; one that has ended is told once."""
        if not gpu.device.accounting_mode:
            return
        nvml = self._library.nvml
        pids = self._asking.ask(gpu, sweep, "accounting", lambda: nvml.nvmlDeviceGetAccountingPids(gpu.handle)) or []
        kept = set(pids)
        gpu.accounted = {pid: started for pid, started in gpu.accounted.items() if pid in kept}
        open_first = sorted(pids, key=lambda pid: pid in gpu.accounted)
        for pid in open_first[:ACCOUNTS_PER_ROUND]:
            read = functools.partial(self._account, gpu.handle, pid)
            stats = self._asking.ask(gpu, sweep, "accounting of a process", read)
            found = stats and account(gpu.uuid, pid, stats)
            if found is None or gpu.accounted.get(pid) == found.started_ns:
                continue
            if not found.running:
                gpu.accounted[pid] = found.started_ns
            sweep.accounts.append(found)

    def _running(self, gpu: Gpu, sweep: Sweep) -> Iterable[Any]:
        """Yield every process that a device lists, or where it does not, that its instances list."""
        for what in LISTS:
            found = self._asking.ask(gpu, sweep, what, functools.partial(self._listed, what, gpu.handle))
            if found is not None:
                yield from found
                continue
            for instance in gpu.instances:
                ids = instance.instance or (INSTANCE_ANY, INSTANCE_ANY)
                read = functools.partial(self._listed, what, instance.handle)
                for process in self._asking.ask(instance, sweep, what, read) or ():
                    yield process._replace(gpu_instance_id=ids[0], compute_instance_id=ids[1])

    def _listed(self, what: str, handle: Any) -> list[RunningProcess]:
        """Return one of `LISTS` of a device; raises NVMLError."""
        return [RunningProcess(*row) for row in PROCESS.iter_unpack(self._lists[what].read(handle))]

    def _samples(self, handle: Any, since_us: int) -> list[UseSample]:
        """Return the driver's samples by process after ``since_us``; raises NVMLError."""
        try:
            rows = self._uses.read(handle, ctypes.c_ulonglong(since_us))
        except self._library.nvml.NVMLError as error:
            if error.value in (SUCCESS, NOT_FOUND):
                return []  # nobody ran
            raise
        return [UseSample(*row) for row in USE.iter_unpack(rows)]

    def _account(self, handle: Any, pid: int) -> bytes:
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
