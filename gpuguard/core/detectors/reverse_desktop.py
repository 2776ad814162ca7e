"""A desktop of this host, given to the far side of a connection that this host opened: VNC turned round.

A VNC server speaks first, with its version; the viewer answers with one of the same form (RFC 6143, 7.1.1). Viewers
dial. Where the side that dialled sends its version before it was sent one, it is the server: `x11vnc -connect`,
`vncconfig -connect` and implants do so to get past a firewall, and the far side then types and moves the mouse here.
The order of two lines says so, before any use and whatever the ports.

Benign look-alikes: viewers, who answer a version; a server that is dialled, however it is used; a capture that lost
the server's first line, which is why the viewer's has to be seen as well, and after it. People who ask for help on
their own desktop do the same on purpose: on a host without people it is for an operator to know, so that it is
suspect, no more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gpuguard.core.evidence import Evidence
from gpuguard.core.host import BoundedTable
from gpuguard.core.observations import FlowClosed, Spoke

if TYPE_CHECKING:
    from gpuguard.core.host import Host
    from gpuguard.core.observations import Observation
    from gpuguard.core.records import Block
    from gpuguard.core.subjects import FlowId

FLOWS_MAX = 1_024

# Twelve bytes of fixed form on each side, in the order that only a server on the dialling side makes: what is left of
# doubt is help that was asked for.
NATS = 8.0

_SPOTS = ("VNC inside TLS, SSH or WebSockets", "repeaters that speak first", "a connection whose opening was not seen")


class Detector:
    """Tells of VNC servers that dial."""

    takes = (Spoke, FlowClosed)

    def __init__(self) -> None:
        self._first: BoundedTable[FlowId, str] = BoundedTable(FLOWS_MAX)

    def receive(self, item: Block | Observation, host: Host) -> list[Evidence]:
        """Return the evidence when the second of two versions is the called side's."""
        if isinstance(item, FlowClosed):
            self._first.pop(item.flow)
        if not isinstance(item, Spoke) or item.what != "rfb-version":
            return []
        flow = item.flow
        first = self._first.get(flow)
        self._first[flow] = first or item.speaker
        turned = (first, item.speaker) == ("initiator", "responder")
        if not turned or not flow.initiator_known or host.is_local(flow.netns, flow.responder):
            return []
        return [Evidence(
            time_ns=item.time_ns,
            subject=flow,
            label="reverse-shell",
            evidence_class="network",
            kind="desktop-served-outward",
            nats=NATS,
            text="the side that dialled sent its VNC version first, as servers do, and was answered with a viewer's: "
                 "the far side sees and steers a desktop of this host",
            start_ns=flow.start_ns,
            carrier="tcp",
            blind_spots=_SPOTS,
        )]
