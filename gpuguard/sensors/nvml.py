"""The counter eye: what NVML says of each GPU and of each process on it, through NVIDIA's own binding.

Names, units and limits are those of nvml.h as nvidia-ml-py declares them. Each reader below says its unit, when it is
absent, and the call it comes from. Every field is asked for by itself: what this driver or board does not have is
None in every sample and one `Gap` for that device and field, and is not asked for again until the driver was reopened.

A sick driver answers late or never, so all calls are made on a thread of their own: `read` waits for it a moment, and
what comes later is handed out by a later `read`. A call that does not return is a `Gap`, not a guard that hangs. Who a
pid is (start time, boot) is asked of the broker, on the caller's thread.
"""

from __future__ import annotations

import importlib
import logging
import queue
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from msgspec import Struct, field

from gpuguard.core.records import Block, Device, DeviceSample, Gap, ProcessSample
from gpuguard.messages import Answer, Found, ReadProcess, Request
from gpuguard.sensors import EyeClosed

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gpuguard.config import Config
    from gpuguard.core.subjects import ProcessId

log = logging.getLogger(__name__)

NAME = "nvml"
SECOND_NS = 1_000_000_000
RATE_MIN_HZ, RATE_MAX_HZ = 0.1, 10.0

#: The driver itself measures a process every 1/6 s to 1 s, so asking more often learns nothing.
PROCESS_PERIOD_NS = SECOND_NS
#: A call of nvmlDeviceGetPcieThroughput takes the 20 ms that it measures over: one direction of one device each time.
THROUGHPUT_PERIOD_NS = SECOND_NS
OPEN_TIMEOUT_S = 15.0
ANSWER_WAIT_S = 0.05
HUNG_NS = 5 * SECOND_NS
BACK_OFF_MIN_NS, BACK_OFF_MAX_NS = SECOND_NS, 60 * SECOND_NS
#: A pid that nobody could name is asked about again, in case it had only just begun.
UNNAMED_RETRY_NS = 10 * SECOND_NS
DEVICES_MAX = 64
PIDS_MAX = 4_096

# nvmlReturn_t of nvml.h.
UNINITIALIZED, NOT_SUPPORTED, NO_PERMISSION, NOT_FOUND, INSUFFICIENT_SIZE = 1, 3, 4, 6, 7
DRIVER_NOT_LOADED, LIBRARY_NOT_FOUND, FUNCTION_NOT_FOUND, GPU_IS_LOST, RESET_REQUIRED = 9, 12, 13, 15, 16
LIB_RM_VERSION_MISMATCH, ARGUMENT_VERSION_MISMATCH, DEPRECATED = 18, 25, 26

ABSENT = frozenset({NOT_SUPPORTED, NO_PERMISSION, FUNCTION_NOT_FOUND, ARGUMENT_VERSION_MISMATCH, DEPRECATED})
DEVICE_GONE = frozenset({GPU_IS_LOST, RESET_REQUIRED})
DRIVER_GONE = frozenset({UNINITIALIZED, DRIVER_NOT_LOADED, LIB_RM_VERSION_MISMATCH})

REMEDIES = {
    LIBRARY_NOT_FOUND: "libnvidia-ml.so.1 is not here: install the NVIDIA driver, or start the container with --gpus",
    DRIVER_NOT_LOADED: "the NVIDIA kernel driver is not loaded: modprobe nvidia",
    LIB_RM_VERSION_MISMATCH: "library and kernel driver are of different versions: reboot, or reload the module",
    NO_PERMISSION: "no right to open /dev/nvidiactl and /dev/nvidia*: see the device's owner and mode",
}

Values = dict[str, int | float | None]


class Broker(Protocol):
    """What this sensor needs of the broker's client."""

    def ask(self, request: Request) -> tuple[Answer, Sequence[int]]:
        """Send one request and return its answer."""
        ...


# -- one reader a call: (binding, handle) -> fields of DeviceSample --------------------------------------------------


def first_of(*names: str) -> Callable[[Any, Any], Any]:
    """Return a reader that makes the first of these calls that binding and driver have: newest name first."""

    def reader(nvml: Any, handle: Any) -> Any:
        for name in names:
            try:
                return getattr(nvml, name)(handle)
            except AttributeError:
                continue  # newer than the installed binding
            except nvml.NVMLError as error:
                if error.value != FUNCTION_NOT_FOUND:
                    raise
        raise nvml.NVMLError(FUNCTION_NOT_FOUND)

    return reader


def utilization(nvml: Any, handle: Any) -> Values:
    """Time with at least one kernel, and with memory traffic, 0..1.

    Absent with MIG. One tiny kernel is 1.0. Source: nvmlDeviceGetUtilizationRates, %; nvidia-smi utilization.gpu.
    """
    rates = nvml.nvmlDeviceGetUtilizationRates(handle)
    return {"gpu_ratio": ratio(rates.gpu), "memory_ratio": ratio(rates.memory)}


def memory(nvml: Any, handle: Any) -> Values:
    """Memory in use, bytes, without what the driver keeps for itself where the driver tells the two apart.

    Source: nvmlDeviceGetMemoryInfo_v2, else nvmlDeviceGetMemoryInfo, bytes; nvidia-smi memory.used.
    """
    return {"memory_used_bytes": int(memory_info(nvml, handle).used)}


def memory_info(nvml: Any, handle: Any) -> Any:
    """Return the driver's memory struct, version 2 where there is one."""
    try:
        return nvml.nvmlDeviceGetMemoryInfo(handle, nvml.nvmlMemory_v2)
    except nvml.NVMLError as error:
        if error.value not in ABSENT:
            raise
        return nvml.nvmlDeviceGetMemoryInfo(handle)


def power(nvml: Any, handle: Any) -> Values:
    """Power of the board, W; a 1 s mean on Ampere and later except GA100.

    Absent in most vGPU guests. Source: nvmlDeviceGetPowerUsage, mW; nvidia-smi power.draw.
    """
    return {"power_w": nvml.nvmlDeviceGetPowerUsage(handle) / 1000}


def energy(nvml: Any, handle: Any) -> Values:
    """Energy since the driver was loaded, J.

    Absent before Volta. Source: nvmlDeviceGetTotalEnergyConsumption, mJ.
    """
    return {"energy_j": nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000}


def temperature(nvml: Any, handle: Any) -> Values:
    """Temperature of the GPU die, degrees Celsius.

    Source: nvmlDeviceGetTemperature, sensor NVML_TEMPERATURE_GPU; nvidia-smi temperature.gpu.
    """
    return {"temperature_c": float(nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU))}


def sm_clock(nvml: Any, handle: Any) -> Values:
    """Clock of the multiprocessors, Hz. Source: nvmlDeviceGetClockInfo, NVML_CLOCK_SM, MHz; nvidia-smi clocks.sm."""
    return {"sm_clock_hz": nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM) * 1_000_000}


def memory_clock(nvml: Any, handle: Any) -> Values:
    """Clock of the memory, Hz. Source: nvmlDeviceGetClockInfo, NVML_CLOCK_MEM, MHz; nvidia-smi clocks.mem."""
    return {"memory_clock_hz": nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM) * 1_000_000}


def throttle_reasons(nvml: Any, handle: Any) -> Values:
    """Why the clocks are where they are, as a bit mask of nvmlClocksEventReason* (4 SW power cap, 8 HW slowdown, ...).

    Source: nvmlDeviceGetCurrentClocksEventReasons, before R535 nvmlDeviceGetCurrentClocksThrottleReasons.
    """
    return {"throttle_reasons": int(_CLOCKS_REASONS(nvml, handle))}


_CLOCKS_REASONS = first_of("nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons")

#: Every kind of context holds the GPU: an MPS client and a Vulkan program compute as well as a CUDA one.
PROCESS_LISTS = {
    "compute processes": first_of(
        "nvmlDeviceGetComputeRunningProcesses_v3", "nvmlDeviceGetComputeRunningProcesses_v2"),
    "MPS processes": first_of(
        "nvmlDeviceGetMPSComputeRunningProcesses_v3", "nvmlDeviceGetMPSComputeRunningProcesses_v2"),
    "graphics processes": first_of(
        "nvmlDeviceGetGraphicsRunningProcesses_v3", "nvmlDeviceGetGraphicsRunningProcesses_v2"),
}

READERS = (utilization, memory, power, energy, temperature, sm_clock, memory_clock, throttle_reasons)


def ratio(percent: int) -> float | None:
    """Return a percentage as 0..1; None where the driver gives a number that is none (seen with MPS)."""
    return percent / 100 if 0 <= percent <= 100 else None


# -- what the thread hands over --------------------------------------------------------------------------------------


class Use(Struct, frozen=True):
    """What one pid used of one device, before the pid has a name."""

    uuid: str
    pid: int
    memory_used_bytes: int | None
    sm_ratio: float | None
    memory_ratio: float | None


class Sweep(Struct):
    """All that one round of calls learnt. ``uses`` is None in a round that did not ask for processes."""

    time_ns: int
    blocks: list[Block] = field(default_factory=list)
    uses: list[Use] | None = None


class BackOff:
    """When to try again: after 1, 2, 4, ... 60 s."""

    def __init__(self) -> None:
        self._wait_ns = BACK_OFF_MIN_NS
        self.until_ns = 0

    def failed(self, now_ns: int) -> None:
        """Set the next try."""
        self.until_ns = now_ns + self._wait_ns
        self._wait_ns = min(2 * self._wait_ns, BACK_OFF_MAX_NS)


class Gpu:
    """One device: its handle, what it lacks, and the counters whose difference is a rate."""

    def __init__(self, index: int, uuid: str, handle: Any) -> None:
        self.index = index
        self.uuid = uuid
        self.handle = handle
        self.absent: set[str] = set()
        self.failing: dict[str, tuple[int, int]] = {}
        self.pcie_before: tuple[int, int, int] | None = None
        self.use_seen_us = 0
        self.lost: BackOff | None = None
        self.lost_since_ns = 0


class DriverGone(Exception):
    """The driver answers nothing any more."""


class DeviceGone(Exception):
    """This device answers nothing any more."""


class Driver:
    """Every NVML call, on one thread."""

    def __init__(self, nvml: Any) -> None:
        self._nvml = nvml
        self._gpus: list[Gpu] = []
        self._unopened: dict[int, BackOff] = {}
        self._version = ""
        self._told: set[tuple[str, str]] = set()
        self._gone: BackOff | None = None
        self._gone_since_ns = 0
        self._processes_ns = 0
        self._throughput_ns = 0
        self._throughput_turn = 0

    def open(self, now_ns: int) -> list[Block]:
        """Initialise NVML and name its devices; raises NVMLError."""
        nvml = self._nvml
        nvml.nvmlInit()
        self._version = str(nvml.nvmlSystemGetDriverVersion())
        self._gpus = []
        self._unopened = {index: BackOff() for index in range(min(nvml.nvmlDeviceGetCount(), DEVICES_MAX))}
        sweep = Sweep(time_ns=now_ns)
        self._open_rest(sweep)
        return sweep.blocks

    def _open_rest(self, sweep: Sweep) -> None:
        """Open every device that is not open yet, and is not to be left alone for a while."""
        nvml = self._nvml
        for index, back_off in list(self._unopened.items()):
            if sweep.time_ns < back_off.until_ns:
                continue
            try:
                handle = nvml.nvmlDeviceGetHandleByIndex(index)
                gpu = Gpu(index, str(nvml.nvmlDeviceGetUUID(handle)), handle)
                sweep.blocks.append(self._describe(gpu, sweep))
            except (nvml.NVMLError, DeviceGone) as error:
                sweep.blocks.append(_gap(sweep.time_ns, f"GPU {index} cannot be opened: {error}"))
                back_off.failed(sweep.time_ns)
                continue
            self._gpus.append(gpu)
            del self._unopened[index]

    @property
    def devices(self) -> int:
        """Return how many devices were opened."""
        return len(self._gpus)

    def sweep(self, now_ns: int) -> Sweep:
        """Ask every device for everything once. Never raises: what fails is a `Gap`."""
        sweep = Sweep(time_ns=now_ns)
        if self._gone and not self._reopen(self._gone, sweep):
            return sweep
        with_processes = now_ns - self._processes_ns >= PROCESS_PERIOD_NS
        if with_processes:
            self._processes_ns = now_ns
            sweep.uses = []
        try:
            self._open_rest(sweep)
            for gpu in self._gpus:
                self._sweep_gpu(gpu, sweep)
        except DriverGone as gone:
            sweep.blocks.append(_gap(now_ns, f"the driver does not answer any more: {gone}"))
            self._gone, self._gone_since_ns = BackOff(), now_ns
            self._gone.failed(now_ns)
            self._shutdown()
        return sweep

    def close(self) -> None:
        """Let go of the driver."""
        if not self._gone:
            self._shutdown()

    # -- one device ---------------------------------------------------------------------------------------------------

    def _sweep_gpu(self, gpu: Gpu, sweep: Sweep) -> None:
        now_ns = sweep.time_ns
        if gpu.lost and not self._find_again(gpu, gpu.lost, sweep):
            return
        try:
            values: Values = {}
            for reader in READERS:
                values.update(self._ask(gpu, sweep, reader.__name__, reader) or {})
            values.update(self._pcie(gpu, sweep))
            if any(value is not None for value in values.values()):
                sweep.blocks.append(DeviceSample(time_ns=now_ns, uuid=gpu.uuid, **values))  # type: ignore[arg-type]
            if sweep.uses is not None:
                sweep.uses += self._uses(gpu, sweep)
        except DeviceGone as gone:
            sweep.blocks.append(_gap(now_ns, f"GPU {gpu.index} ({gpu.uuid}) does not answer any more: {gone}"))
            gpu.lost, gpu.lost_since_ns = BackOff(), now_ns
            gpu.lost.failed(now_ns)

    def _ask(self, gpu: Gpu, sweep: Sweep, what: str, reader: Callable[[Any, Any], Any]) -> Any:
        """Return what the reader reads; None with a `Gap` where it cannot be read."""
        if what in gpu.absent:
            return None
        try:
            answer = reader(self._nvml, gpu.handle)
        except self._nvml.NVMLError as error:
            self._failed(gpu, sweep, what, error)
            return None
        except AttributeError as error:
            gpu.absent.add(what)
            self._tell_absent(gpu, sweep, what, f"the installed nvidia-ml-py is too old: {error}")
            return None
        if what in gpu.failing:
            since_ns, lost = gpu.failing.pop(what)
            reason = f"GPU {gpu.index} ({gpu.uuid}): {what} can be read again"
            sweep.blocks.append(_gap(sweep.time_ns, reason, since_ns=since_ns, lost=lost))
        return answer

    def _failed(self, gpu: Gpu, sweep: Sweep, what: str, error: Any) -> None:
        if error.value in DRIVER_GONE:
            raise DriverGone(str(error))
        if error.value in DEVICE_GONE:
            raise DeviceGone(str(error))
        if error.value in ABSENT:
            gpu.absent.add(what)
            self._tell_absent(gpu, sweep, what, error)
            return
        since_ns, lost = gpu.failing.get(what, (sweep.time_ns, 0))
        gpu.failing[what] = (since_ns, lost + 1)
        if not lost:
            sweep.blocks.append(_gap(sweep.time_ns, f"GPU {gpu.index} ({gpu.uuid}): {what} cannot be read: {error}"))

    def _tell_absent(self, gpu: Gpu, sweep: Sweep, what: str, error: object) -> None:
        if (gpu.uuid, what) not in self._told:
            self._told.add((gpu.uuid, what))
            sweep.blocks.append(_gap(sweep.time_ns, f"GPU {gpu.index} ({gpu.uuid}) has no {what}: {error}"))

    def _find_again(self, gpu: Gpu, lost: BackOff, sweep: Sweep) -> bool:
        """Return whether a lost device answers again, and take it back."""
        if sweep.time_ns < lost.until_ns:
            return False
        try:
            handle = self._nvml.nvmlDeviceGetHandleByIndex(gpu.index)
            if str(self._nvml.nvmlDeviceGetUUID(handle)) != gpu.uuid:
                raise self._nvml.NVMLError(NOT_FOUND)
        except self._nvml.NVMLError as error:
            if error.value in DRIVER_GONE:
                raise DriverGone(str(error)) from error
            lost.failed(sweep.time_ns)
            reason = f"GPU {gpu.index} ({gpu.uuid}) still does not answer: {error}"
            sweep.blocks.append(_gap(sweep.time_ns, reason, since_ns=gpu.lost_since_ns))
            return False
        gpu.handle, gpu.lost, gpu.pcie_before = handle, None, None
        reason = f"GPU {gpu.index} ({gpu.uuid}) answers again"
        sweep.blocks.append(_gap(sweep.time_ns, reason, since_ns=gpu.lost_since_ns))
        return True

    def _reopen(self, gone: BackOff, sweep: Sweep) -> bool:
        """Return whether a driver that was gone answers again, and take it back."""
        if sweep.time_ns < gone.until_ns:
            return False
        try:
            blocks = self.open(sweep.time_ns)
        except (self._nvml.NVMLError, DriverGone) as error:
            gone.failed(sweep.time_ns)
            reason = f"the driver still does not answer: {remedy(error)}"
            sweep.blocks.append(_gap(sweep.time_ns, reason, since_ns=self._gone_since_ns))
            return False
        self._gone = None
        sweep.blocks.append(_gap(sweep.time_ns, "the driver answers again", since_ns=self._gone_since_ns))
        sweep.blocks += blocks
        return True

    def _shutdown(self) -> None:
        try:
            self._nvml.nvmlShutdown()
        except self._nvml.NVMLError as error:
            # It is being given up because it fails; every handle is dropped and init is tried afresh.
            log.debug("nvmlShutdown: %s", error)

    def _describe(self, gpu: Gpu, sweep: Sweep) -> Device:
        limit_w = self._ask(gpu, sweep, "power_limit", lambda n, h: n.nvmlDeviceGetEnforcedPowerLimit(h) / 1000)
        total = self._ask(gpu, sweep, "memory_total", lambda n, h: int(memory_info(n, h).total))
        mhz = self._ask(gpu, sweep, "sm_clock_limit", lambda n, h: n.nvmlDeviceGetMaxClockInfo(h, n.NVML_CLOCK_SM))
        if self._mig(gpu):
            self._tell_absent(gpu, sweep, "utilization by instance", "MIG is on, and instances are not read one by one")
        return Device(
            time_ns=sweep.time_ns,
            uuid=gpu.uuid,
            index=gpu.index,
            name=str(self._ask(gpu, sweep, "name", lambda n, h: n.nvmlDeviceGetName(h)) or ""),
            memory_bytes=total,
            power_limit_w=limit_w,
            sm_clock_limit_hz=None if mhz is None else mhz * 1_000_000,
            driver_version=self._version,
        )

    def _mig(self, gpu: Gpu) -> bool:
        try:
            return bool(self._nvml.nvmlDeviceGetMigMode(gpu.handle)[0])
        except self._nvml.NVMLError:
            return False  # no MIG on this board: not a thing that is missing

    # -- PCIe ---------------------------------------------------------------------------------------------------------

    def _pcie(self, gpu: Gpu, sweep: Sweep) -> Values:
        """Bytes per second from the device (tx) and to it (rx), since the sample before.

        Absent in vGPU guests. Source: the byte counters NVML_FI_DEV_PCIE_COUNT_TX/RX_BYTES (drivers from R550), bytes.
        An older driver only has nvmlDeviceGetPcieThroughput, KB/s over the 20 ms that the call takes: one direction of
        one device is then asked each second, in turn, and the other samples have None.
        """
        if "PCIe byte counters" in gpu.absent:
            return self._throughput(gpu, sweep)
        counts = self._ask(gpu, sweep, "PCIe byte counters", pcie_counts)
        before, gpu.pcie_before = gpu.pcie_before, counts
        if counts is None or before is None or counts[0] <= before[0]:
            return {}
        passed_s = (counts[0] - before[0]) / 1e6
        tx, rx = counts[1] - before[1], counts[2] - before[2]
        # The counters may wrap, and then the difference says nothing.
        return {
            "pcie_tx_bytes_per_s": int(tx / passed_s) if tx >= 0 else None,
            "pcie_rx_bytes_per_s": int(rx / passed_s) if rx >= 0 else None,
        }

    def _throughput(self, gpu: Gpu, sweep: Sweep) -> Values:
        answering = [one for one in self._gpus if not one.lost]
        turn = self._throughput_turn % (2 * len(answering))
        if sweep.time_ns - self._throughput_ns < THROUGHPUT_PERIOD_NS or answering[turn // 2] is not gpu:
            return {}
        self._throughput_turn, self._throughput_ns = self._throughput_turn + 1, sweep.time_ns
        counter, name = ((0, "pcie_tx_bytes_per_s"), (1, "pcie_rx_bytes_per_s"))[turn % 2]
        kbytes = self._ask(gpu, sweep, "PCIe throughput", lambda n, h: n.nvmlDeviceGetPcieThroughput(h, counter))
        return {name: None if kbytes is None else kbytes * 1000}

    # -- processes ----------------------------------------------------------------------------------------------------

    def _uses(self, gpu: Gpu, sweep: Sweep) -> list[Use]:
        """Return what each pid holds and uses of a device.

        Memory, bytes: nvmlDeviceGetComputeRunningProcesses_v3 (or _v2), and the MPS and graphics lists; None where the
        driver does not say. SM and memory share, 0..1: mean of the samples of nvmlDeviceGetProcessUtilization since
        the last round; absent with MIG, and None for a pid without a sample: idle and not looked at are not told apart.
        """
        held: dict[int, int | None] = {}
        for what, reader in PROCESS_LISTS.items():
            for one in self._ask(gpu, sweep, what, reader) or ():
                if len(held) < PIDS_MAX:
                    known = held.get(one.pid)
                    held[one.pid] = one.usedGpuMemory if known is None else max(known, one.usedGpuMemory or 0)
        shares = self._shares(gpu, sweep)
        pids = sorted((held.keys() | shares) - {0})
        return [Use(gpu.uuid, pid, held.get(pid), *shares.get(pid, (None, None))) for pid in pids]

    def _shares(self, gpu: Gpu, sweep: Sweep) -> dict[int, tuple[float | None, float | None]]:
        since_us = gpu.use_seen_us
        samples = self._ask(gpu, sweep, "process utilization", lambda n, h: process_utilization(n, h, since_us)) or ()
        by_pid: dict[int, list[tuple[float | None, float | None]]] = {}
        for sample in samples:
            if sample.timeStamp > since_us and (sample.pid in by_pid or len(by_pid) < PIDS_MAX):
                by_pid.setdefault(sample.pid, []).append((ratio(sample.smUtil), ratio(sample.memUtil)))
                gpu.use_seen_us = max(gpu.use_seen_us, sample.timeStamp)
        return {pid: (_mean([one[0] for one in seen]), _mean([one[1] for one in seen])) for pid, seen in by_pid.items()}


def process_utilization(nvml: Any, handle: Any, since_us: int) -> Sequence[Any]:
    """Return the driver's samples by process after ``since_us`` (its own clock, microseconds); () if there are none."""
    try:
        return list(nvml.nvmlDeviceGetProcessUtilization(handle, since_us))
    except nvml.NVMLError as error:
        # A size query that finds no sample answers SUCCESS (0) on some drivers, which the binding raises too.
        if error.value in (0, NOT_FOUND):
            return ()
        raise


def pcie_counts(nvml: Any, handle: Any) -> tuple[int, int, int]:
    """Return (driver's time in us, bytes sent by the device, bytes received by it) since some moment in the past."""
    ids = [nvml.NVML_FI_DEV_PCIE_COUNT_TX_BYTES, nvml.NVML_FI_DEV_PCIE_COUNT_RX_BYTES]
    fields = nvml.nvmlDeviceGetFieldValues(handle, ids)
    for one in fields:
        if one.nvmlReturn:
            # INVALID_ARGUMENT is how a driver answers a field id that is newer than itself.
            raise nvml.NVMLError(NOT_SUPPORTED if one.nvmlReturn == 2 else one.nvmlReturn)
        if one.valueType not in (nvml.NVML_VALUE_TYPE_UNSIGNED_LONG, nvml.NVML_VALUE_TYPE_UNSIGNED_LONG_LONG):
            # 32 bits wrap within a tenth of a second on a busy link.
            raise nvml.NVMLError(NOT_SUPPORTED)
    return fields[0].timestamp, fields[0].value.ullVal, fields[1].value.ullVal


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _gap(time_ns: int, reason: str, *, since_ns: int | None = None, lost: int | None = None) -> Gap:
    return Gap(time_ns=time_ns, sensor=NAME, reason=reason, since_ns=since_ns, lost=lost)


def remedy(error: Any) -> str:
    """Return what an NVMLError means for a person."""
    return REMEDIES.get(getattr(error, "value", -1), str(error))


# -- who a pid is ----------------------------------------------------------------------------------------------------


class Names:
    """Pid to process, remembered while NVML lists the pid and its start time stays the same."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._known: dict[int, ProcessId] = {}
        self._unnamed_until_ns: dict[int, int] = {}

    def process(self, pid: int, now_ns: int, gaps: list[Gap]) -> ProcessId | None:
        """Return who has this pid, None with one `Gap` if nobody can say."""
        known = self._known.get(pid)
        if known and start_ticks(pid) == known.start_ticks:
            return known
        if self._unnamed_until_ns.get(pid, 0) > now_ns:
            return None
        answer, _ = self._broker.ask(ReadProcess(pid=pid))
        if isinstance(answer, Found) and answer.processes:
            self._unnamed_until_ns.pop(pid, None)
            self._known[pid] = answer.processes[0].process
            return self._known[pid]
        self._known.pop(pid, None)
        if pid not in self._unnamed_until_ns:
            why = getattr(answer, "reason", "") or "no such process here"
            gaps.append(_gap(now_ns, f"NVML lists pid {pid}, and nobody can say who that is: {why}"))
        self._unnamed_until_ns[pid] = now_ns + UNNAMED_RETRY_NS
        return None

    def keep(self, pids: set[int]) -> None:
        """Forget every pid that NVML does not list any more."""
        for table in (self._known, self._unnamed_until_ns):
            for pid in table.keys() - pids:
                table.pop(pid)


def start_ticks(pid: int) -> int | None:
    """Return field 22 of /proc/PID/stat, proc(5), None if it cannot be read."""
    try:
        with Path(f"/proc/{pid}/stat").open("rb") as file:
            return parse_start_ticks(file.read(4096))
    except OSError:
        return None


def parse_start_ticks(stat: bytes) -> int | None:
    """Return starttime of a line of /proc/PID/stat; the name is the process's own and may hold spaces and brackets."""
    fields = stat[stat.rfind(b")") + 1 :].split()
    return int(fields[19]) if len(fields) > 19 and fields[19].isdigit() else None


# -- the sensor ------------------------------------------------------------------------------------------------------


class NvmlSensor:
    """Answers at the configured rate; the calls themselves run on ``self._thread``."""

    name = NAME
    descriptor: int | None = None

    def __init__(self, driver: Driver, broker: Broker, rate_hz: float) -> None:
        self.period_ns: int | None = int(SECOND_NS / rate_hz)
        self._driver = driver
        self._names = Names(broker)
        self._asked: queue.SimpleQueue[Callable[[], Any] | None] = queue.SimpleQueue()
        self._answered: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._pending_since_ns = 0
        self._told_hung = False
        self._told_error = ""
        self._first: list[Block] = []
        self._thread = threading.Thread(target=self._work, name="gpuguard-nvml", daemon=True)
        self._thread.start()

    def open(self, now_ns: int) -> None:
        """Initialise NVML; raises `EyeClosed`."""
        self._asked.put(lambda: self._driver.open(now_ns))
        try:
            answer = self._answered.get(timeout=OPEN_TIMEOUT_S)
        except queue.Empty:
            self.close()
            why = f"nvmlInit has not returned for {OPEN_TIMEOUT_S:.0f} s: see dmesg for Xid messages"
            raise EyeClosed(why) from None
        if isinstance(answer, BaseException):
            self.close()
            raise EyeClosed(remedy(answer)) from answer
        if not self._driver.devices:
            self.close()
            raise EyeClosed("the NVIDIA driver is loaded and lists no GPU that can be opened")
        self._first = answer

    def read(self, now_ns: int) -> list[Block]:
        """Return the records of every round that has ended, and begin the next one."""
        blocks, self._first = self._first, []
        wait_s = 0.0
        if not self._pending_since_ns:
            self._pending_since_ns, wait_s = now_ns, ANSWER_WAIT_S
            self._asked.put(lambda: self._driver.sweep(now_ns))
        try:
            answer = self._answered.get(block=wait_s > 0, timeout=wait_s)
        except queue.Empty:
            return blocks + self._late(now_ns)
        if self._told_hung:
            self._told_hung = False
            blocks.append(_gap(now_ns, "NVML answers again", since_ns=self._pending_since_ns))
        self._pending_since_ns = 0
        if isinstance(answer, BaseException):
            return blocks + self._broken(answer, now_ns)
        blocks += answer.blocks
        return blocks + self._named(answer)

    def close(self) -> None:
        """Let go of the driver, as soon as it lets go of us."""
        self._asked.put(self._driver.close)
        self._asked.put(None)
        self._thread.join(timeout=ANSWER_WAIT_S)

    def _late(self, now_ns: int) -> list[Block]:
        if self._told_hung or now_ns - self._pending_since_ns < HUNG_NS:
            return []
        self._told_hung = True
        reason = "a call of NVML has not returned for 5 s: the driver hangs, see dmesg for Xid messages"
        return [_gap(now_ns, reason, since_ns=self._pending_since_ns)]

    def _broken(self, error: BaseException, now_ns: int) -> list[Block]:
        """Return a `Gap` for what no driver should make happen, once for each kind of it in a row."""
        told, self._told_error = self._told_error, type(error).__name__
        if told == self._told_error:
            return []
        log.error("a round of NVML calls failed", exc_info=error)
        return [_gap(now_ns, f"a round of NVML calls failed: {type(error).__name__}: {error}")]

    def _named(self, sweep: Sweep) -> list[Block]:
        if sweep.uses is None:
            return []
        gaps: list[Gap] = []
        samples: list[Block] = []
        for use in sweep.uses:
            process = self._names.process(use.pid, sweep.time_ns, gaps)
            if process is not None:
                used = (use.memory_used_bytes, use.sm_ratio, use.memory_ratio)
                samples.append(ProcessSample(sweep.time_ns, process, use.uuid, *used))
        self._names.keep({use.pid for use in sweep.uses})
        return [*gaps, *samples]

    def _work(self) -> None:
        while (task := self._asked.get()) is not None:
            try:
                self._answered.put(task())
            except Exception as error:  # noqa: BLE001 - whoever asked is told
                self._answered.put(error)


def open_sensor(broker: Broker, config: Config, *, now_ns: int = 0) -> NvmlSensor:
    """Return the running sensor; raises `EyeClosed` with what would open it."""
    rate_hz = config.nvml.rate_hz
    if not RATE_MIN_HZ <= rate_hz <= RATE_MAX_HZ:
        raise EyeClosed(f"nvml.rate_hz = {rate_hz} is not in {RATE_MIN_HZ} to {RATE_MAX_HZ:.0f}")
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError as error:
        raise EyeClosed(f"NVIDIA's binding is not installed ({error}): pip install nvidia-ml-py") from error
    sensor = NvmlSensor(Driver(nvml), broker, rate_hz)
    sensor.open(now_ns or time.time_ns())
    return sensor
