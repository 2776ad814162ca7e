"""Launches withheld: a process was given the capture library, computes on a GPU all the same, and shows no launch.

On hosts without probes a scheduler gives each job `libgpuguard_capture.so` (CUDA_INJECTION64_PATH), and launches are
seen of who cooperates only. Whoever takes the library out again, or the variable, is seen by what is missing. That is
no word on what it computes, hence a label of its own, and never more than suspect.

Innocent explanations first: the container lacks the library's file, OpenCL, Vulkan or OptiX, a driver whose calls have
an unknown shape (the library says so: a gap of that process, and nothing is held against it), a ring that was refused
(likewise), a persistent kernel of before the eye was opened, video decoding and long fills or copies of memory, which
the driver does by kernels of its own. A process is only judged where the eye was open all the
while, which it says by a block at least every `ALIVE_NS`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec import Struct, field

from gpuguard.core.bounded import BoundedTable
from gpuguard.core.evidence import Evidence
from gpuguard.core.launching import ALIVE_NS, Stretch, launchers
from gpuguard.core.records import Gap, Launches, ProcessExited, ProcessSample, ProcessStarted
from gpuguard.core.subjects import ProcessId

if TYPE_CHECKING:
    from gpuguard.core.host import Host
    from gpuguard.core.observations import Observation
    from gpuguard.core.records import Block

SECOND_NS = 1_000_000_000
VARIABLE, LIBRARY = "CUDA_INJECTION64_PATH", "libgpuguard_capture.so"
#: Starting a framework and filling memory launches kernels within seconds; a minute of computing without is no start.
BUSY_RATIO, SILENT_NS = 0.1, 60 * SECOND_NS
#: Suspect, and far from confirmed: the fact is certain, the intent is not.
WITHHELD_NATS = 7.0
PROCESSES_MAX = 8_192

BLIND_SPOTS = (
    "the library's file may be missing in its container",
    "OptiX, and OpenCL or Vulkan, do not launch through libcuda",
    "a variable that the process set itself looks the same",
    "video is decoded, and memory filled and copied, by kernels of the driver's own",
)


class Standing(Struct):
    """One process that was given the library: since when it computes unseen, when it was sampled, what was said."""

    process: ProcessId
    stretch: Stretch = field(default_factory=Stretch)
    said_ns: int = 0


class Detector:
    """See the head of this file."""

    takes = (Launches, Gap, ProcessStarted, ProcessExited, ProcessSample)

    def __init__(self) -> None:
        self._standings: BoundedTable[tuple[int, int], Standing] = BoundedTable(PROCESSES_MAX)
        self._opened_ns: int | None = None
        self._alive_ns = 0

    def evicted(self) -> dict[str, int]:
        """Return how much was forgotten because a table was full, by what it was."""
        return {"processes that were given the library": self._standings.evicted}

    def receive(self, item: Block | Observation, host: Host) -> list[Evidence]:  # noqa: ARG002
        """Return what this item adds."""
        match item:
            case ProcessStarted() if item.environ.get(VARIABLE, "").rpartition("/")[2] == LIBRARY:
                self._standings[item.process.pid, item.process.start_ticks] = Standing(item.process)
            case Launches():
                if self._opened_ns is None or item.time_ns - self._alive_ns > ALIVE_NS:
                    self._opened_ns = item.time_ns
                self._alive_ns = item.time_ns
                return self._shown(item)
            case Gap() if item.sensor == "launches" and item.process:
                self._standings.pop((item.process.pid, item.process.start_ticks))
            case ProcessExited():
                self._standings.pop((item.process.pid, item.process.start_ticks))
            case ProcessSample() if item.sm_ratio is not None:
                return self._sampled(item, item.sm_ratio)
            case _:
                pass
        return []

    def _shown(self, block: Launches) -> list[Evidence]:
        """Forget who shows launches, and take back what was said of it."""
        evidence = []
        for key in launchers(block.rows):
            standing = self._standings.pop(key)
            if standing and standing.said_ns:
                evidence.append(_evidence(block.time_ns, standing, -WITHHELD_NATS, "it shows launches after all"))
        return evidence

    def _sampled(self, sample: ProcessSample, sm_ratio: float) -> list[Evidence]:
        standing = self._standings.get((sample.process.pid, sample.process.start_ticks))
        if standing is None or standing.said_ns:
            return []
        if not standing.stretch.take(sample.time_ns, sm_ratio, BUSY_RATIO):
            return []
        if self._opened_ns is None or sample.time_ns - self._alive_ns > ALIVE_NS:
            return []
        since_ns = max(standing.stretch.busy_since_ns, self._opened_ns)
        if sample.time_ns - since_ns < SILENT_NS:
            return []
        standing.said_ns = since_ns
        seconds = (sample.time_ns - since_ns) // SECOND_NS
        text = f"it was given {LIBRARY}, computes for {seconds} s (SMs {sm_ratio:.0%}), and shows no launch"
        return [_evidence(sample.time_ns, standing, WITHHELD_NATS, text)]


def _evidence(time_ns: int, standing: Standing, nats: float, text: str) -> Evidence:
    return Evidence(time_ns, standing.process, "launches-withheld", "launch", "launches-withheld", nats, text,
                    standing.said_ns, blind_spots=BLIND_SPOTS)
