"""The guard's half: launches at each interval, names and images as they come, and what could not be seen.

In one read names come before the launches of what they name, so that a block can be judged when it is handed out.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gpuguard.core.bounded import BoundedTable
from gpuguard.core.records import LAUNCH_APIS, Block, KernelName, Launches, ProcessStarted
from gpuguard.core.subjects import ProcessId
from gpuguard.messages import Opened, Refused, ScanLaunches
from gpuguard.sensors import is_due
from gpuguard.sensors.launches import libcuda
from gpuguard.sensors.launches.gaps import NAME, Gaps
from gpuguard.sensors.launches.images import HEADER_BYTES
from gpuguard.sensors.launches.modules import Image, Modules
from gpuguard.sensors.launches.names import HANDLES_MAX, KernelNames
from gpuguard.sensors.launches.rows import SECOND_NS, LaunchDeltas, bytes_of, new_buffers
from gpuguard.sensors.processes.procfs import steady_boot_ns

if TYPE_CHECKING:
    from gpuguard._launches import Ring
    from gpuguard.sensors.launches.modules import Broker

SCAN_PERIOD_NS = 700_000_000
#: After its exec a process is looked at this often: it maps libcuda when its imports get there.
YOUNG_LOOKS_NS = (30_000_000, 120_000_000, 300_000_000)
YOUNG_MAX = 256
EVENTS_PER_READ = 4_096
ALIVE_PERIOD_NS = 10 * SECOND_NS
LOST_PERIOD_NS = 60 * SECOND_NS

# struct launch_event of ext/bpf/launches.h.
EVENT = np.dtype([
    ("time_ns", "<i8"), ("start_ns", "<u8"), ("handle", "<u8"), ("parent", "<u8"), ("address", "<u8"),
    ("bytes", "<u8"), ("pid", "<u4"), ("form", "<u4"), ("text", "S384"),
])
#: What each of `enum counter` there counts, but for the last, COUNT_BEGUN.
COUNTERS = (
    "launches not counted: the table of kernels is full",
    "arguments not readable in the memory of the process",
    "names or images lost: the ring is full, or one process sends too many",
    "launches of processes that this pid namespace does not show",
    "launches counted without their geometry: one process launches too many kinds",
    "names or images lost: too many calls at once",
)
#: Calls whose handle is a queue or a graph and has no name of its own to be looked up.
NAMELESS_APIS = ("cuGraphLaunch", "vkQueueSubmit")


class LaunchSensor:
    """Reads the table each interval, and names and images as they come."""

    name = NAME

    def __init__(self, broker: Broker, opened: Opened, descriptors: list[int], interval_ns: int) -> None:
        from gpuguard import _launches

        self.period_ns: int | None = interval_ns
        self.mode = opened.mode
        self._broker = broker
        handles = dict(zip(opened.descriptors, descriptors, strict=True))
        self._ring: Ring = _launches.Ring(handles["events"], opened.values["ring_bytes"])
        os.close(handles["events"])
        self.descriptor: int | None = handles["epoll"]
        self.rows_fd, self._counters_fd = handles["rows"], handles["counters"]
        self._keys, self._values = new_buffers(opened.values["rows_max"])
        self._clock_offset_ns = steady_boot_ns(0)
        self._ticks_per_s = os.sysconf("SC_CLK_TCK")
        self._boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        self._deltas = LaunchDeltas(self._ticks_per_s, self._clock_offset_ns)
        self._gaps = Gaps()
        self._names = KernelNames()
        self._modules = Modules(broker, self._names, self._gaps)
        self._counted = list(_launches.read_counters(self._counters_fd)[:-1])
        self._empty_since: int | None = None
        self._told_lost_ns = [0] * len(COUNTERS)
        self._refused = opened.values.get("refused", 0)
        self._young: list[tuple[int, int]] = []
        self._uncounted: BoundedTable[ProcessId, bool] = BoundedTable(HANDLES_MAX)
        self._nameless: BoundedTable[ProcessId, bool] = BoundedTable(HANDLES_MAX)
        self._scanned_ns = self._rows_read_ns = self._rows_read_boot_ns = self._told_alive_ns = 0
        if self._refused:
            self._gaps.tell(time.time_ns(), opened.mode)

    def notice(self, block: Block) -> None:
        """A process was executed: look at its maps soon, it may bring a driver library of its own."""
        if isinstance(block, ProcessStarted) and len(self._young) < YOUNG_MAX:
            self._young += [(block.time_ns + after_ns, block.process.pid) for after_ns in YOUNG_LOOKS_NS]

    def read(self, now_ns: int) -> list[Block]:
        """Return names, images, launches and gaps since the last call, in an order in which they can be judged."""
        self._scan(now_ns)
        self._clock_offset_ns = self._deltas.clock_offset_ns = steady_boot_ns(self._clock_offset_ns)
        blocks = self._read_events()
        blocks += self._modules.read()
        blocks += self._modules.judged()
        if self.period_ns is None or is_due(now_ns, self._rows_read_ns, self.period_ns // 2):
            self._rows_read_ns = now_ns
            blocks += self._read_rows(now_ns)
        return [*blocks, *self._gaps.take()]

    def close(self) -> None:
        """Give every handle back."""
        self._modules.close()
        self._ring.close()
        for fd in (self.rows_fd, self._counters_fd, self.descriptor):
            if fd is not None and fd >= 0:
                os.close(fd)
        self.rows_fd = self._counters_fd = -1
        self.descriptor = None

    def _process(self, event: np.void) -> ProcessId:
        return ProcessId(self._boot_id, int(event["pid"]), int(event["start_ns"]) * self._ticks_per_s // SECOND_NS)

    def _scan(self, now_ns: int) -> None:
        # What lies far ahead is of before the clock was set back.
        later_ns = range(now_ns + 1, now_ns + 2 * YOUNG_LOOKS_NS[-1])
        due = tuple({pid for at_ns, pid in self._young if at_ns not in later_ns})
        self._young = [one for one in self._young if one[0] in later_ns]
        everywhere = is_due(now_ns, self._scanned_ns, SCAN_PERIOD_NS)
        if not due and not everywhere:
            return
        if everywhere:
            self._scanned_ns = now_ns
        answer, _ = self._broker.ask(ScanLaunches(() if everywhere else due, self._rows_read_boot_ns))
        if not isinstance(answer, Opened):
            reason = answer.reason if isinstance(answer, Refused) else "new libraries could not be looked for"
            self._gaps.tell(now_ns, reason)
        elif answer.values.get("refused", 0) > self._refused:
            self._refused = answer.values["refused"]
            self._gaps.tell(now_ns, answer.mode)

    def _read_events(self) -> list[Block]:
        records = self._ring.read(EVENTS_PER_READ)
        if not records:  # most hosts, most of the time
            return []
        records = [one for one in records if len(one) == EVENT.itemsize]
        taken = [self._take_event(event) for event in np.frombuffer(b"".join(records), EVENT)]
        return [block for block in taken if block]

    def _take_event(self, event: np.void) -> Block | None:
        process, time_ns = self._process(event), int(event["time_ns"]) + self._clock_offset_ns
        handle, parent = int(event["handle"]), int(event["parent"])
        match int(event["form"]):
            case libcuda.CALL_LOOKUP | libcuda.CALL_CREATE:
                return self._names.looked_up(time_ns, process, handle, parent, _name(event))
            case libcuda.CALL_ALIAS:
                return self._names.aliased(time_ns, process, handle, parent)
            case libcuda.CALL_IMAGE | libcuda.CALL_LINK:
                header = event["text"].tobytes()[:HEADER_BYTES].ljust(HEADER_BYTES, b"\0")
                self._names.loaded(process, handle)
                self._modules.add(Image(time_ns, process, handle, int(event["address"]), header))
            case libcuda.CALL_FILE:
                path = bytes(event["text"]).split(b"\0", 1)[0]
                self._names.loaded(process, handle)
                self._modules.add(Image(time_ns, process, handle, 0, b"", path))
            case libcuda.CALL_UNLOAD:
                self._names.unloaded(time_ns, process, handle)
            case libcuda.CALL_NAMED:
                return self._names.asked(time_ns, process, handle, _name(event))
            case libcuda.CALL_POINTER:
                self._tell_uncounted(process, time_ns)
            case libcuda.CALL_GRAPH:
                return self._names.looked_up(time_ns, process, handle, parent, f"graph of {event['bytes']} kernels")
            case _:
                self._gaps.tell(time_ns, f"unknown event form {event['form']}")
        return None

    def _tell_uncounted(self, process: ProcessId, time_ns: int) -> None:
        """Say once of a process that it can submit work past the loader.

        No probe is placed where its pointer leads: what it hands out could lead anywhere.
        """
        if process not in self._uncounted:
            self._uncounted[process] = True
            reason = "Vulkan work that it submits through pointers of the driver's own is not counted"
            self._gaps.tell(time_ns, reason, process=process)

    def _read_rows(self, now_ns: int) -> list[Block]:
        from gpuguard import _launches

        boot_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        *lost, begun = _launches.read_counters(self._counters_fd)
        self._count_gaps(now_ns, lost)
        count = 0
        try:
            # To walk a table costs the same whatever is in it, and most of the time nothing is.
            if begun != self._empty_since:
                count = _launches.read_rows(self.rows_fd, bytes_of(self._keys), bytes_of(self._values))
        except OSError as error:
            self._gaps.tell(now_ns, str(error))
            return []
        self._empty_since = None if count else begun
        self._rows_read_boot_ns = boot_ns
        rows = self._deltas.take(self._keys[:count], self._values[:count], boot_ns)
        if not len(rows) and not is_due(now_ns, self._told_alive_ns, ALIVE_PERIOD_NS):
            return []
        # A block without rows says that the eye is open and saw nothing: silence must not look like blindness.
        self._told_alive_ns = now_ns
        return [*self._tell_nameless(rows, now_ns), Launches(now_ns, rows)]

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
                self._gaps.tell(now_ns, "kernels without a name: their look-up was not seen", process=process)
            self._nameless[process] = told is not None
        return stale

    def _count_gaps(self, now_ns: int, counted: list[int]) -> None:
        for i, (now, before) in enumerate(zip(counted, self._counted, strict=True)):
            # The first time at once; what goes on for long is said now and then, with all that was lost meanwhile.
            if now == before or not is_due(now_ns, self._told_lost_ns[i], LOST_PERIOD_NS):
                continue
            self._gaps.tell(now_ns, COUNTERS[i], lost=now - before)
            self._counted[i] = now
            self._told_lost_ns[i] = now_ns


def _name(event: np.void) -> str:
    return bytes(event["text"]).split(b"\0", 1)[0].decode("utf-8", "replace")
