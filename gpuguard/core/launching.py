"""What detectors of launches, and of their absence, share: who launched, and since when a process is busy."""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec import Struct

if TYPE_CHECKING:
    import numpy as np

#: Samples further apart than this do not tell what was between them.
APART_NS = 10_000_000_000
#: The launch eye says at least this often that it is open, by a block without rows if need be.
ALIVE_NS = 30_000_000_000


def launchers(rows: np.ndarray) -> list[tuple[int, int]]:
    """Return (pid, start_ticks) of everybody in these LAUNCH rows, once each, in order of the first."""
    return list(dict.fromkeys(zip(rows["pid"].tolist(), rows["start_ticks"].tolist(), strict=True)))


class Stretch(Struct):
    """Since when a process is busy, as far as samples tell: 0 while it is not."""

    busy_since_ns: int = 0
    sampled_ns: int = 0

    def take(self, time_ns: int, sm_ratio: float, busy_ratio: float) -> bool:
        """Add a sample; return whether it is a busy one."""
        apart = time_ns - self.sampled_ns > APART_NS
        self.sampled_ns = time_ns
        if sm_ratio < busy_ratio:
            self.busy_since_ns = 0
            return False
        if apart or not self.busy_since_ns:
            self.busy_since_ns = time_ns
        return True
