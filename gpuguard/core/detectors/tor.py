"""Tor, named by its cells: TLS records that hold one to four of them, 514 bytes each, and nothing else so often.

Relays and clients write whole cells (tor-spec, 3; a record then has 514 bytes for each and what its cipher adds), from
the first handshake on; names in the ClientHello and certificates are random and change, ports are any. The parser looks
at the lengths of the first 64 records of either side: three, and a quarter of all, that hold whole cells under an AEAD
cipher; or eight, and half of all, under CBC, whose padding lets other messages have that size too.

Benign look-alikes: protocols of fixed messages of other lengths; chunks of 512 bytes under CBC (block devices), which
are named Tor if they are most of what is said. The name accuses nobody.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gpuguard.core.evidence import Evidence
from gpuguard.core.observations import Spoke

if TYPE_CHECKING:
    from gpuguard.core.host import Host
    from gpuguard.core.observations import Observation
    from gpuguard.core.records import Block

# A length is a cell's by chance once in a thousand, where messages are of about that size once in fifty: three of the
# first twelve are so with 220 / 50**3, one in 570.
CELLS_NATS = 6.3

_SPOTS = ("bridges (obfs4, meek, snowflake)", "a connection whose opening was not seen", "padding of records")


class Detector:
    """Names Tor."""

    takes = (Spoke,)

    def receive(self, item: Block | Observation, host: Host) -> list[Evidence]:  # noqa: ARG002 whose end it is is all one
        """Return the name as evidence."""
        if not isinstance(item, Spoke) or item.what != "tor":
            return []
        return [Evidence(
            time_ns=item.time_ns,
            subject=item.flow,
            label="tor",
            evidence_class="network",
            kind="tor-cells",
            nats=CELLS_NATS,
            text=f"the {item.speaker} sends TLS records that hold whole cells of 514 bytes",
            start_ns=item.flow.start_ns,
            carrier="tls",
            blind_spots=_SPOTS,
        )]
