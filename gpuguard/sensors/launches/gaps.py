"""What the launch eye could not see, until the sensor hands it out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gpuguard.core.records import Gap

if TYPE_CHECKING:
    from gpuguard.core.subjects import ProcessId

NAME = "launches"


class Gaps:
    """Filled by each part of the sensor, and emptied by each read."""

    def __init__(self) -> None:
        self._told: list[Gap] = []

    def tell(self, time_ns: int, reason: str, *, lost: int | None = None, process: ProcessId | None = None) -> None:
        """Say what could not be seen, of how many where that is known, and of whom."""
        self._told.append(Gap(time_ns=time_ns, sensor=NAME, reason=reason, lost=lost, process=process))

    def take(self) -> list[Gap]:
        """Return what was told since the last call."""
        told, self._told = self._told, []
        return told
