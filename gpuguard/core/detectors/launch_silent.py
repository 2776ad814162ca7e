"""Launch-silent activity: a process computes, say the counters, and the launch eye, open all the while, sees nothing.

Whoever evades the probe (a driver of its own making, a jump past the probed bytes) ends here: the GPU is still busy. So
do honest programs, and each innocent explanation is excluded or said:

- a replayed graph: excluded, for a replay is a call (cuGraphLaunch) that the eye sees;
- a persistent kernel, which was launched once and runs for hours: excluded for a process that was watched from its
  start and never launched; where it did launch, or began before the eye, this is likely, and the rest next to nothing;
- OpenCL and Vulkan: excluded where the work goes through their loaders, which the eye sees; past them, and by OptiX,
  cannot be excluded, and is said;
- video decoding, fills and copies of memory, which the driver does by kernels of its own: not excluded, and said;
- work of others done in its name (an MPS server): such a server launches nothing of its own, and is said;
- an eye that was blind: any gap of the whole eye stops the clock for `BLIND_NS`.

This supports what other eyes saw: by itself it is far below suspect, and with all that counters can say far below
confirmed. When launches are seen after all it is taken back.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec import Struct, field

from gpuguard.core.bounded import BoundedTable
from gpuguard.core.evidence import Evidence
from gpuguard.core.launching import ALIVE_NS, Stretch, launchers
from gpuguard.core.records import (
    Gap,
    KernelName,
    Launches,
    ModuleImage,
    ProcessExited,
    ProcessSample,
    ProcessStarted,
)
from gpuguard.core.subjects import ProcessId

if TYPE_CHECKING:
    import numpy as np

    from gpuguard.core.host import Host
    from gpuguard.core.observations import Observation
    from gpuguard.core.records import Block

SECOND_NS = 1_000_000_000
BUSY_RATIO = 0.3
SILENT_NS = 60 * SECOND_NS
BLIND_NS = 600 * SECOND_NS
#: Miners that a probe of libcuda cannot see (OpenCL, Vulkan, evasion) against such work that does not mine: few have
#: measured it. ln(4.5), and next to nothing where a persistent kernel would explain it.
NEVER_NATS, PERSISTENT_NATS = 1.5, 0.25
PROCESSES_MAX = 8_192
SERVERS = ("nvidia-cuda-mps",)

BLIND_SPOTS = (
    "OptiX, and OpenCL or Vulkan past their loaders, are not seen to launch",
    "a persistent kernel is launched once and runs on",
    "an MPS server computes for its clients",
    "video is decoded, and memory filled and copied, by kernels of the driver's own",
)


class Standing(Struct):
    """One process: since when it is busy, when it last launched (0: never seen), and what was said."""

    process: ProcessId | None = None
    started_ns: int = 0
    stretch: Stretch = field(default_factory=Stretch)
    launched_ns: int = 0
    nats: float = 0.0
    said_ns: int = 0


class Detector:
    """See the head of this file."""

    takes = (Launches, KernelName, ModuleImage, Gap, ProcessStarted, ProcessExited, ProcessSample)

    def __init__(self) -> None:
        self._standings: BoundedTable[tuple[int, int], Standing] = BoundedTable(PROCESSES_MAX)
        self._opened_ns = self._alive_ns = self._blind_until_ns = 0

    def evicted(self) -> dict[str, int]:
        """Return how much was forgotten because a table was full, by what it was."""
        return {"processes that may compute unseen": self._standings.evicted}

    def receive(self, item: Block | Observation, host: Host) -> list[Evidence]:
        """Return what this item adds."""
        match item:
            case Launches():
                self._alive(item.time_ns)
                return self._launched(item.rows, item.time_ns) if len(item.rows) else []
            case KernelName() | ModuleImage():
                self._alive(item.time_ns)
            case Gap() if item.sensor == "launches" and item.process is None:
                self._blind_until_ns = max(self._blind_until_ns, item.time_ns + BLIND_NS)
                self._opened_ns = 0
            case ProcessStarted():
                self._standing(_key(item.process)).started_ns = item.time_ns
            case ProcessExited():
                self._standings.pop(_key(item.process))
            case ProcessSample() if item.sm_ratio is not None:
                return self._sampled(item, item.sm_ratio, host)
            case _:
                pass
        return []

    def _alive(self, time_ns: int) -> None:
        self._alive_ns = time_ns
        self._opened_ns = self._opened_ns or time_ns

    def _standing(self, key: tuple[int, int]) -> Standing:
        standing = self._standings.get(key)
        if standing is None:
            standing = self._standings[key] = Standing()
        return standing

    def _launched(self, rows: np.ndarray, time_ns: int) -> list[Evidence]:
        evidence = []
        for key in launchers(rows):
            standing = self._standing(key)
            standing.launched_ns, standing.stretch.busy_since_ns = time_ns, 0
            if standing.nats and standing.process:
                text = "it launches after all"
                evidence.append(_evidence(time_ns, standing.process, -standing.nats, standing.said_ns, text))
                standing.nats = 0.0
        return evidence

    def _sampled(self, item: ProcessSample, sm_ratio: float, host: Host) -> list[Evidence]:
        standing = self._standing(_key(item.process))
        standing.process = item.process
        if not standing.stretch.take(item.time_ns, sm_ratio, BUSY_RATIO):
            return []
        awake = 0 <= item.time_ns - self._alive_ns <= ALIVE_NS and self._opened_ns
        since_ns = max(standing.stretch.busy_since_ns, self._blind_until_ns, self._opened_ns)
        if standing.nats or not awake or item.time_ns - since_ns < SILENT_NS:
            return []
        if host.processes.brief(item.process).name.startswith(SERVERS):
            return []
        watched = standing.started_ns >= self._opened_ns and standing.started_ns > 0
        never = watched and not standing.launched_ns
        standing.nats, standing.said_ns = NEVER_NATS if never else PERSISTENT_NATS, item.time_ns
        seconds = (item.time_ns - since_ns) // SECOND_NS
        text = f"busy for {seconds} s (SMs {sm_ratio:.0%}), no launch seen; {_why(standing, never=never)}"
        return [_evidence(item.time_ns, item.process, standing.nats, since_ns, text)]


def _key(process: ProcessId) -> tuple[int, int]:
    return process.pid, process.start_ticks


def _why(standing: Standing, *, never: bool) -> str:
    if never:
        return "it never launched a kernel since it began"
    before = "it launched before" if standing.launched_ns else "it may have launched before the eye was open"
    return f"{before}: a persistent kernel would explain it"


def _evidence(time_ns: int, process: ProcessId, nats: float, start_ns: int, text: str) -> Evidence:
    return Evidence(time_ns, process, "mining", "launch", "launch-silent-activity", nats, text, start_ns,
                    blind_spots=BLIND_SPOTS)
