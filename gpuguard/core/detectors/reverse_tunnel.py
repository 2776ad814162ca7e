"""`ssh -R`: the far side was given a port into this host.

The request is seen before any use, from the sizes of the records after the login (`core.ssh`, RFC 4254 section 7.1);
so is the first channel that the far side opens. Who types in it is told by `reverse_shell`, whose is the other end of
it on this host by `relay`.

Left alone: a connection from outside into this host. There the client far away offers a port of its own network; this
host's sshd was meant to be dialled.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gpuguard.core.evidence import Evidence, of_use
from gpuguard.core.observations import FlowUse

if TYPE_CHECKING:
    from gpuguard.core.host import Host
    from gpuguard.core.observations import Observation
    from gpuguard.core.records import Block

_KINDS = ("ssh-reverse-forward-request", "ssh-reverse-channel-open")


class Detector:
    """Turns the grammar's steps towards a reverse tunnel into evidence."""

    takes = (FlowUse,)

    def receive(self, item: Block | Observation, host: Host) -> list[Evidence]:
        """Return what a request for, or the first use of, a reverse forward weighs."""
        if not isinstance(item, FlowUse) or item.use not in _KINDS or item.nats == 0:
            return []
        flow = item.flow
        if host.network.is_inbound(flow):
            return []
        return [of_use(item, "ssh-reverse-tunnel")]
