"""One device as the sensor knows it: its handle, what is read of it, what it lacks, and what was told of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gpuguard.core.records import Device
from gpuguard.sensors import is_due

if TYPE_CHECKING:
    from collections.abc import Callable

    from gpuguard.sensors.nvml.fields import FieldReader, Values
    from gpuguard.sensors.nvml.gpm import Window
    from gpuguard.sensors.nvml.rounds import Plan

BACK_OFF_MIN_NS, BACK_OFF_MAX_NS = 1_000_000_000, 60_000_000_000


class BackOff:
    """When to try again: after 1, 2, 4, ... 60 s."""

    def __init__(self) -> None:
        self._failed_ns = self._wait_ns = 0

    def failed(self, now_ns: int) -> None:
        """Set the next try."""
        self._failed_ns = now_ns
        self._wait_ns = min(max(2 * self._wait_ns, BACK_OFF_MIN_NS), BACK_OFF_MAX_NS)

    def is_over(self, now_ns: int) -> bool:
        """Return whether to try now."""
        return is_due(now_ns, self._failed_ns, self._wait_ns)


class Gpu:
    """One device, or one MIG instance of ``parent``."""

    def __init__(
        self, index: int, uuid: str, handle: Any, parent: Gpu | None = None, instance: tuple[int, int] | None = None,
    ) -> None:
        self.index = index
        self.uuid = uuid
        self.handle = handle
        self.parent = parent
        #: GPU and compute instance. Performance metrics are of the former, and are kept with the board.
        self.instance = instance
        self.gpm_key = instance[0] if instance else None
        self.device = Device(0, uuid, index, "")
        self.instances: list[Gpu] = []
        self.absent: set[str] = set()
        self.failing: dict[str, tuple[int, int]] = {}
        #: What a board is asked at each tick; None where that is to be written down anew.
        self.plan: Plan | None = None
        #: Reads (total, used) bytes.
        self.memory: Callable[[], tuple[int, int]] | None = None
        #: What was read in the last full round.
        self.held: Values = {}
        self.context_ns = 0
        self.fields: FieldReader | None = None
        self.pcie_counters = False
        self.windows: dict[int | None, Window] = {}
        self.use_seen_us = 0
        self.accounted: dict[int, int] = {}
        self.lost: BackOff | None = None
        self.lost_since_ns = 0

    def __str__(self) -> str:
        return f"GPU {self.index} ({self.uuid})"
