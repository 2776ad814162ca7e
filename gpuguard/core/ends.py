"""Open flows by their ends: what is read from a packet names its source and destination, and no flow."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gpuguard.core.bounded import BoundedTable

if TYPE_CHECKING:
    from gpuguard.core.subjects import FlowId

End = tuple[str, int]


class FlowsByEnds:
    """Flows from when they are known until the next one ends, at most ``size_max``."""

    def __init__(self, size_max: int) -> None:
        self._flows: BoundedTable[tuple[int, End, End], FlowId] = BoundedTable(size_max)
        self._ended: FlowId | None = None

    @property
    def evicted(self) -> int:
        """How many were forgotten because there were too many."""
        return self._flows.evicted

    def know(self, flow: FlowId) -> None:
        """Remember a flow."""
        self._flows[_ends(flow)] = flow

    def end(self, flow: FlowId) -> None:
        """Forget the flow that ended before this one: what is read from the last packet of one comes after its end."""
        if self._ended and self._flows.get(_ends(self._ended)) == self._ended:
            self._flows.pop(_ends(self._ended))
        self._ended = flow

    def find(self, netns: int, one: End, other: End) -> FlowId | None:
        """Return the flow between two ends, whoever opened it."""
        return self._flows.get((netns, one, other)) or self._flows.get((netns, other, one))


def _ends(flow: FlowId) -> tuple[int, End, End]:
    return flow.netns, (flow.initiator, flow.initiator_port), (flow.responder, flow.responder_port)
