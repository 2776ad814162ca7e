"""Hashing code that is launched, whatever it is called: the machine code of a kernel, judged where it was loaded.

A library may carry hashing kernels that nobody runs (cuDF maps SHA columns into every process), so code weighs only
once it is launched, and only while it is a good part of what the process launches. Its weight is the classifier's own,
calibrated on projects that it had not seen; several accused kernels of one process are not independent, so the
heaviest counts and the others do not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gpuguard.core.bounded import BoundedTable
from gpuguard.core.evidence import Evidence
from gpuguard.core.records import KernelCode, Launches, ModuleVerdict

if TYPE_CHECKING:
    import numpy as np

    from gpuguard.core.host import Host
    from gpuguard.core.observations import Observation
    from gpuguard.core.records import Block
    from gpuguard.core.subjects import ProcessId

MODULES_MAX = 4_096
PROCESSES_MAX = 4_096

#: Fewer launches are a self-test or a start-up, not work.
LAUNCHES_MIN = 16
#: Below this share of its launches hashing is not what a process is there for (a checksum, a shuffle).
SHARE_MIN_RATIO = 0.1


class _Seen:
    """What one process launched so far: all of it, and of each accused kernel."""

    def __init__(self, start_ns: int) -> None:
        self.start_ns = start_ns
        self.launches = 0
        self.accused: dict[str, int] = {}
        self.told_nats = 0.0


class Detector:
    """Holds accused modules against launches."""

    takes = (ModuleVerdict, Launches)

    def __init__(self) -> None:
        self._modules: BoundedTable[str, dict[str, KernelCode]] = BoundedTable(MODULES_MAX)
        self._seen: BoundedTable[ProcessId, _Seen] = BoundedTable(PROCESSES_MAX)

    def evicted(self) -> dict[str, int]:
        """Return how much was forgotten because a table was full, by what it was."""
        return {"modules that hash": self._modules.evicted,
                "processes' launches beside hashing code": self._seen.evicted}

    def receive(self, item: Block | Observation, host: Host) -> list[Evidence]:
        """Return evidence of class code for processes that launch what their code says is mining."""
        if isinstance(item, ModuleVerdict):
            mining = {one.name: one for one in item.accused if one.label == "mining" and one.nats > 0}
            if mining:
                self._modules[item.sha256] = mining
            return []
        if not isinstance(item, Launches) or len(self._modules) == 0:
            return []
        found = [self._take(row, host) for row in item.rows]
        return [one for one in found if one]

    def _take(self, row: np.void, host: Host) -> Evidence | None:
        process = host.processes.named(int(row["pid"]), int(row["start_ticks"]))
        seen = self._seen.get(process) or _Seen(int(row["first_ns"]))
        self._seen[process] = seen
        seen.launches += int(row["launches"])
        named = host.kernel_name(process, int(row["kernel"]))
        code = (self._modules.get(named.code_sha256) or {}).get(named.name) if named else None
        if code is None:
            return None
        count = seen.accused.get(code.name, 0) + int(row["launches"])
        seen.accused[code.name] = count
        if count < LAUNCHES_MIN or count < SHARE_MIN_RATIO * seen.launches or code.nats <= seen.told_nats:
            return None
        nats, seen.told_nats = code.nats - seen.told_nats, code.nats
        share = count / seen.launches
        return Evidence(
            time_ns=int(row["last_ns"]),
            subject=process,
            label="mining",
            evidence_class="code",
            kind="code-hashing",
            nats=nats,
            text=f"{share:.0%} of the launches run {code.name}, whose machine code is that of hashing: {code.text}",
            start_ns=seen.start_ns,
            blind_spots=("memory-hard proof of work whose main loop hashes nothing", "code diluted inside its loops"),
        )
