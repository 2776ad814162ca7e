"""What an SSH connection is used for, as its record grammar says: the names that accuse nobody, and the swapped roles.

A session, a command, a copy, a forward to the far side and a jump are what SSH is for. They are named so that a reader
sees what was cleared and why. A host that dials out and then acts as the server is not: `core.ssh` reads it from the
key exchange.

SSH within a WebSocket in clear is named by its banner (RFC 4253, 4.2) in a binary message: chisel speaks so, and
whoever gets to a server of his own through a proxy that lets nothing else pass. What it is for is not read from its
records, which lie in the frames of the WebSocket; who asks and who answers on it is told as of any connection.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gpuguard.core.evidence import Evidence, of_use
from gpuguard.core.labels import LABELS
from gpuguard.core.observations import FlowUse, Spoke

if TYPE_CHECKING:
    from gpuguard.core.host import Host
    from gpuguard.core.observations import Observation
    from gpuguard.core.records import Block


# What was seen beside a use is told under its label and weighs nothing: "ssh-nested-in-jump".
_IN = "-in-"
_REFUSED = "ssh-login-refused"
# What is true of a connection whatever it is for.
_NOTES = ("authenticated", "keepalive", "ssh-channel", "ssh-forwarding")

# Four letters, a line and its end, at the head of a binary message: text of people goes in others.
WEBSOCKET_NATS = 8.0


class Detector:
    """Hands uses that are labels on as evidence, and what else was seen beside them."""

    takes = (FlowUse, Spoke)

    def receive(self, item: Block | Observation, host: Host) -> list[Evidence]:
        """Return the use as evidence under its own name; an inbound role swap is nobody's on this host."""
        if isinstance(item, Spoke) and item.what == "ssh-in-websocket":
            return [_in_websocket(item)]
        if not isinstance(item, FlowUse):
            return []
        flow = item.flow
        if item.use.startswith(_NOTES):
            return [of_use(item, "")]
        label = "ssh" if item.use == _REFUSED else item.use
        if _IN in label:
            label = "ssh-" + label.partition(_IN)[2]
        elif item.nats <= 0 and item.use != _REFUSED:
            return []
        if label not in LABELS or (LABELS[label].accuses and host.network.is_inbound(flow)):
            return []
        return [of_use(item, label)]


def _in_websocket(item: Spoke) -> Evidence:
    return Evidence(
        time_ns=item.time_ns,
        subject=item.flow,
        label="ssh",
        evidence_class="network",
        kind=item.what,
        nats=WEBSOCKET_NATS,
        text=f"the {item.speaker} sent a banner of SSH in a WebSocket",
        start_ns=item.flow.start_ns,
        carrier="websocket",
        blind_spots=("what SSH in a WebSocket is used for",),
    )
