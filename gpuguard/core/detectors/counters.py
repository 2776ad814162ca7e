"""Counters as support for mining: a GPU held flat out, at one power, with hardly a byte from or to the host.

Ordinary CUDA work looks like mining to counters. Of 20 common CUDA programs measured on a V100 (NV-DVFS set), 19 keep
the SMs at 0.7 and above and none uses a tensor core; a long simulation that stays on the device cannot be told from a
hash search here. So this detector only ever supports what another eye saw: its sum stays below `CAP_NATS`, which alone
is not even suspect, and what speaks against (phases, copies, shared GPUs) takes it away again.

The records are strongly correlated: lag-1 autocorrelation of power at 10 Hz is 0.1 to 0.99 on H100s (NVML smooths it).
A series with autocorrelation rho is worth (1 - rho) / (1 + rho) of its samples, so at the worst, 0.99 at 10 Hz, one
independent look takes 0.1 s * 1.99 / 0.01 = 20 s. That is the window: one decision each, whatever the sampling rate.

Windows of one job are not independent either: a job that was flat for an hour will be flat for the next minute. So the
weight follows how long the stretch is, not how many windows it has. If benign stretches have a Pareto tail of index 1
and scale `SCALE_S` (an assumption: nobody has published such stretches; the H100 training and inference runs at hand
have none of one window), P(longer than T) = 1 / (1 + T / SCALE_S), and a miner goes on: the log-likelihood ratio grows
as ln(1 + T / SCALE_S).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from msgspec import Struct, field

from gpuguard.core.evidence import Evidence
from gpuguard.core.host import BoundedTable
from gpuguard.core.records import DeviceSample, ProcessExited, ProcessSample
from gpuguard.core.subjects import ProcessId

if TYPE_CHECKING:
    from gpuguard.core.host import Host
    from gpuguard.core.observations import Observation
    from gpuguard.core.records import Block

SECOND_NS = 1_000_000_000
WINDOW_NS = 20 * SECOND_NS
SAMPLES_MIN = 8

#: The fusion layer says suspect at 6 nats; from the floor to the cap is 5.5, so counters alone never get there.
CAP_NATS = 3.5
FLOOR_NATS = -2.0
FIRST_NATS = 0.5
SCALE_S = 60.0
PHASED_NATS = -0.5
#: A stretch this long outlives what was held against the process before: miners too load, and change jobs.
FORGIVEN_WINDOWS = 30
#: Less is not worth an event.
TOLD_NATS = 0.25

BUSY_RATIO, BUSY_MIN_RATIO, WORKING_RATIO = 0.9, 0.8, 0.2
STEADY_POWER, PHASED_POWER = 0.03, 0.1
#: An idle H100 with a monitor on it moves up to 4 MB/s over PCIe.
QUIET_BYTES_PER_S, BURST_BYTES_PER_S = 16e6, 100e6
SHARED_RATIO = 0.1

DEVICES_MAX = 256
PROCESSES_MAX = 4_096
PROCESSES_PER_DEVICE_MAX = 256

BLIND_SPOTS = (
    "ordinary CUDA programs look the same (19 of 20 measured ones)",
    "a miner that pauses, copies or shares its GPU on purpose does not look like this",
)

Look = Literal["steady", "phased", "mixed", "unknown"]


class Series(Struct):
    """Sums over one window of one quantity."""

    count: int = 0
    total: float = 0.0
    squares: float = 0.0
    lowest: float = math.inf
    highest: float = 0.0

    def add(self, value: float | None) -> None:
        """Take one value; None is no value."""
        if value is None:
            return
        self.count += 1
        self.total += value
        self.squares += value * value
        self.lowest = min(self.lowest, value)
        self.highest = max(self.highest, value)

    @property
    def mean(self) -> float:
        """Mean; 0 of nothing."""
        return self.total / self.count if self.count else 0.0

    @property
    def variation(self) -> float:
        """Coefficient of variation: standard deviation over mean; 0 of nothing."""
        if not self.total:
            return 0.0
        return math.sqrt(max(0.0, self.squares / self.count - self.mean**2)) / self.mean


class Window(Struct):
    """What one device and the processes on it did since ``start_ns``."""

    start_ns: int
    power_w: Series = field(default_factory=Series)
    gpu_ratio: Series = field(default_factory=Series)
    pcie_bytes_per_s: Series = field(default_factory=Series)
    processes: dict[ProcessId, Series] = field(default_factory=dict)

    def add(self, sample: DeviceSample) -> None:
        """Take one sample of the device."""
        self.power_w.add(sample.power_w)
        self.gpu_ratio.add(sample.gpu_ratio)
        sent, received = sample.pcie_tx_bytes_per_s, sample.pcie_rx_bytes_per_s
        if sent is not None or received is not None:
            self.pcie_bytes_per_s.add((sent or 0) + (received or 0))

    def users(self) -> list[ProcessId]:
        """Return who computed; where no share was told, a process that holds the device alone."""
        told = [process for process, share in self.processes.items() if share.mean > SHARED_RATIO]
        return told or (list(self.processes) if len(self.processes) == 1 else [])


class Stretch(Struct):
    """How one process stands on one device."""

    start_ns: int
    windows: int = 0
    certain: float = 1.0
    held_against: float = 0.0
    nats: float = 0.0

    def take(self, look: Look, certain: float, start_ns: int) -> None:
        """Add one window."""
        if look == "steady":
            self.start_ns = start_ns if self.windows == 0 else self.start_ns
            self.windows += 1
            self.certain = min(self.certain, certain) if self.windows > 1 else certain
            self.held_against = 0.0 if self.windows >= FORGIVEN_WINDOWS else self.held_against
        elif look != "unknown":
            self.windows = 0
            self.start_ns = start_ns
            self.held_against += PHASED_NATS if look == "phased" else 0.0
        self.nats = max(FLOOR_NATS, min(CAP_NATS, self.certain * stretch_nats(self.windows) + self.held_against))


class Standing(Struct):
    """What was said of one process so far, and how it stands on each device."""

    stretches: dict[str, Stretch] = field(default_factory=dict)
    told_nats: float = 0.0


def stretch_nats(windows: int) -> float:
    """Return the weight of an unbroken stretch of steady windows."""
    return FIRST_NATS + math.log1p((windows - 1) * WINDOW_NS / SECOND_NS / SCALE_S) if windows else 0.0


def look_of(window: Window, share: Series) -> tuple[Look, float]:
    """Return what one process did in a window that it had to itself, and how certain that is, 0..1.

    Where its own share was not told, the device's stands in for it; where PCIe was not told, its quiet is not known:
    each halves the weight.
    """
    busy = share if share.count else window.gpu_ratio
    certain = (1.0 if share.count else 0.5) * (1.0 if window.pcie_bytes_per_s.count else 0.5)
    if window.power_w.count < SAMPLES_MIN or not busy.count or busy.mean < WORKING_RATIO:
        return "unknown", 0.0
    traffic = window.pcie_bytes_per_s
    if traffic.highest >= BURST_BYTES_PER_S or window.power_w.variation >= PHASED_POWER or busy.lowest < WORKING_RATIO:
        return "phased", certain
    flat = busy.mean >= BUSY_RATIO and busy.lowest >= BUSY_MIN_RATIO and window.power_w.variation <= STEADY_POWER
    return ("steady" if flat and traffic.mean <= QUIET_BYTES_PER_S else "mixed"), certain


class Detector:
    """Windows by device, stretches by process."""

    takes = (DeviceSample, ProcessSample, ProcessExited)

    def __init__(self) -> None:
        self._windows: BoundedTable[str, Window] = BoundedTable(DEVICES_MAX)
        self._standings: BoundedTable[ProcessId, Standing] = BoundedTable(PROCESSES_MAX)

    def receive(self, item: Block | Observation, host: Host) -> list[Evidence]:  # noqa: ARG002
        """Return what a window that this record ends says."""
        match item:
            case DeviceSample():
                evidence = self._turn(item.uuid, item.time_ns)
                self._window(item.uuid, item.time_ns).add(item)
                return evidence
            case ProcessSample():
                evidence = self._turn(item.uuid, item.time_ns)
                processes = self._window(item.uuid, item.time_ns).processes
                if item.process in processes or len(processes) < PROCESSES_PER_DEVICE_MAX:
                    processes.setdefault(item.process, Series()).add(item.sm_ratio)
                return evidence
            case ProcessExited():
                self._standings.pop(item.process)
        return []

    def _window(self, uuid: str, time_ns: int) -> Window:
        window = self._windows.get(uuid)
        if window is None:
            window = Window(start_ns=time_ns)
            self._windows[uuid] = window
        return window

    def _turn(self, uuid: str, time_ns: int) -> list[Evidence]:
        window = self._windows.get(uuid)
        if window is None or 0 <= time_ns - window.start_ns < WINDOW_NS:
            return []
        self._windows.pop(uuid)
        users = window.users()
        if len(users) != 1:
            return []  # nobody's, or everybody's: power and PCIe are the device's, and cannot be shared out
        return self._judge(users[0], uuid, window, time_ns)

    def _judge(self, process: ProcessId, uuid: str, window: Window, time_ns: int) -> list[Evidence]:
        share = window.processes[process]
        look, certain = look_of(window, share)
        standing = self._standings.get(process) or Standing()
        self._standings[process] = standing
        if look == "unknown" and uuid not in standing.stretches:
            return []
        stretch = standing.stretches.setdefault(uuid, Stretch(start_ns=window.start_ns))
        stretch.take(look, certain, window.start_ns)
        # One process on eight GPUs is one job: its devices do not add up.
        levels = [one.nats for one in standing.stretches.values()]
        change = sum(levels) / len(levels) - standing.told_nats
        if abs(change) < TOLD_NATS:
            return []
        standing.told_nats += change
        seconds = (time_ns - stretch.start_ns) / SECOND_NS
        text = _text(window, share)
        steady = change > 0
        return [Evidence(
            time_ns=time_ns,
            subject=process,
            label="mining",
            evidence_class="counter",
            kind="counters-steady" if steady else "counters-phased",
            nats=change,
            text=f"{text}; so for {seconds:.0f} s" if steady else text,
            start_ns=stretch.start_ns if steady else window.start_ns,
            blind_spots=BLIND_SPOTS,
        )]


def _text(window: Window, share: Series) -> str:
    busy, traffic = share if share.count else window.gpu_ratio, window.pcie_bytes_per_s
    pcie = "PCIe unknown"
    if traffic.count:
        pcie = f"{traffic.mean / 1e6:.1f} MB/s over PCIe (peak {traffic.highest / 1e6:.0f})"
    power = f"{window.power_w.mean:.0f} W within {window.power_w.variation:.1%}"
    return f"SMs {busy.mean:.0%} busy (least {busy.lowest:.0%}), {power}, {pcie}"
