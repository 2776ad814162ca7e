"""The world as the records tell it, in three parts: processes, this host's ends of the network, and its GPUs.

Detectors ask it; it concludes nothing about guilt. Every table is bounded: the oldest entry leaves, and is counted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gpuguard.core.bounded import BoundedTable
from gpuguard.core.network import Network
from gpuguard.core.processes import Processes
from gpuguard.core.records import (
    Connects,
    Device,
    DeviceSample,
    HostInfo,
    KernelName,
    Packets,
    ProcessExited,
    ProcessSample,
    ProcessStarted,
    Sockets,
    Tick,
)

if TYPE_CHECKING:
    from gpuguard.core.records import Block
    from gpuguard.core.subjects import ProcessId

SAMPLES_MAX = 4_096
NAMERS_MAX = 1_024
KERNELS_MAX = 65_536


class Host:
    """Everything that the records said of this host so far."""

    def __init__(self) -> None:
        self.now_ns = 0
        self.processes = Processes()
        self.network = Network(self.processes)
        self.devices: BoundedTable[str, Device] = BoundedTable(SAMPLES_MAX)
        self.device_samples: BoundedTable[str, DeviceSample] = BoundedTable(SAMPLES_MAX)
        self.process_samples: BoundedTable[tuple[ProcessId, str], ProcessSample] = BoundedTable(SAMPLES_MAX)
        self._kernels: BoundedTable[ProcessId, dict[int, KernelName]] = BoundedTable(NAMERS_MAX)
        self._names_evicted = 0

    def receive(self, item: Block) -> None:
        """Take one record in; of what it has no use for, it takes the time."""
        self.now_ns = max(self.now_ns, item.time_ns)
        match item:
            case Packets() | Tick():
                pass  # most blocks: not compared with all others first
            case ProcessStarted():
                self.processes.start(item)
            case ProcessExited():
                self.processes.exit(item)
            case Sockets():
                self.network.take_sockets(item)
            case Connects():
                self.network.take_connects(item)
            case KernelName():
                self._take_name(item)
            case Device():
                self.devices[item.uuid] = item
            case DeviceSample():
                self.device_samples[item.uuid] = item
            case ProcessSample():
                self.process_samples[item.process, item.uuid] = item
            case HostInfo():
                self.processes.boot_id = item.boot_id
                self.network.addresses = item.addresses
            case _:
                pass

    def kernel_name(self, process: ProcessId, kernel: int) -> KernelName | None:
        """Return what the process called this kernel handle, None if it was looked up before we watched."""
        names = self._kernels.get(process)
        return names.get(kernel) if names else None

    def forget(self, process: ProcessId) -> None:
        """Drop a process that is long gone, but for what its children inherited from it."""
        self.processes.forget(process)
        self.network.forget(process)
        self._kernels.pop(process)
        for device in self.devices.values():
            self.process_samples.pop((process, device.uuid))

    def evicted(self) -> dict[str, int]:
        """Return how many entries left because their table was full, by what they are, since the beginning."""
        return {
            **self.processes.evicted(),
            "devices": self.devices.evicted + self.device_samples.evicted,
            **self.network.evicted(),
            "processes' kernel names": self._kernels.evicted,
            "kernel names": self._names_evicted,
            "samples of processes": self.process_samples.evicted,
        }

    def _take_name(self, item: KernelName) -> None:
        """Keep a kernel's name. When there are too many, whoever has most loses his oldest, and nobody else."""
        names = self._kernels.get(item.process) or {}
        names[item.kernel] = item
        self._kernels[item.process] = names
        held = self._kernels.values()
        if sum(map(len, held)) > KERNELS_MAX:
            most = max(held, key=len)
            del most[next(iter(most))]
            self._names_evicted += 1
