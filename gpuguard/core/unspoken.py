"""Flows of which no detector spoke, nearly all that there are: clear where they were looked at for long enough.

A guard tells them one by one, or by the row (`FlowReports`) at a hundredth of the cost. What a row says, and what a
report of that flow would have said, is here in both forms; a test holds them to each other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from gpuguard.core.events import Finding, FlowReport, FlowReports
from gpuguard.core.flows import closed_flows
from gpuguard.core.fusion import Standing
from gpuguard.core.incidents import short_id

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np

    from gpuguard.core.labels import Verdict
    from gpuguard.core.observations import FlowClosed

#: A flow with packets of both sides beyond this was looked at long enough to be called clear when nothing spoke up.
LOOKED_PACKETS = 8


def unspoken(closed: FlowClosed) -> Standing:
    """Return how a flow stands that no detector spoke of: looked at and clear, or not looked at for long enough."""
    label = "ssh" if closed.carrier == "ssh" else "other"
    standing = Standing(subject=closed.flow, label=label, start_ns=closed.flow.start_ns, carrier=closed.carrier)
    both = closed.payload_bytes_initiator and closed.payload_bytes_responder
    if closed.packets >= LOOKED_PACKETS and both and closed.flow.initiator_known:
        standing.verdict = "clear"
    return standing


def unspoken_clear(rows: np.ndarray) -> np.ndarray:
    """Return which of these `CLOSED_FLOW`, of which no detector spoke, are clear; the others are unknown."""
    looked = (rows["packets"] >= LOOKED_PACKETS) & (rows["initiator_known"] != 0)
    looked &= (rows["payload_bytes_initiator"] != 0) & (rows["payload_bytes_responder"] != 0)
    return cast("np.ndarray", looked)


def unspoken_verdicts(rows: np.ndarray) -> list[Verdict]:
    """Return the verdict of each of these `CLOSED_FLOW`, of which no detector spoke; all bear the label "other"."""
    return ["clear" if one else "unknown" for one in unspoken_clear(rows).tolist()]


def reports(quiet: FlowReports) -> Iterator[FlowReport]:
    """Yield the reports that a guard which is not quiet would have made, one by one."""
    for closed in closed_flows(quiet.closed.rows):
        standing = unspoken(closed)
        yield FlowReport(time_ns=closed.time_ns, closed=closed, finding=Finding(
            time_ns=closed.time_ns,
            id=short_id("F", closed.flow, standing.label),
            subject=closed.flow,
            verdict=standing.verdict,
            label=standing.label,
            carrier=standing.carrier,
            probability=standing.probability,
            nats=standing.nats,
            start_ns=closed.flow.start_ns,
            decided_after_s=max(0, closed.time_ns - closed.flow.start_ns) / 1e9,
            evidence=(),
            counter_evidence=(),
            process=None,
            tool_call=None,
            trace_id="",
            gaps=quiet.gaps,
        ))
