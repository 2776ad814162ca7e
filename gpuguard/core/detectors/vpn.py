"""VPNs, named by their handshakes: WireGuard, OpenVPN, IKE with ESP. None of them accuses anybody.

Handshakes have fixed sizes and bytes in fixed places (see ext/packets.pyx), whatever the port; WireGuard's data has
four bytes, a receiver that stays and a number that grows. ESP and AH (RFC 4303, 4302) are protocols of IP.

Benign look-alikes: none that carries the same bytes is known; one handshake is enough to be named. Many sites run
their clusters over WireGuard, which is why policy has to say whether that is allowed here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gpuguard.core.evidence import Evidence
from gpuguard.core.observations import FlowOpened, Spoke

if TYPE_CHECKING:
    from gpuguard.core.host import Host
    from gpuguard.core.observations import Observation
    from gpuguard.core.records import Block

# Seven fixed bytes and a size at least (WireGuard's first message): beyond what chance offers.
HANDSHAKE_NATS = 12.0

_NAMES = {"wireguard": "WireGuard", "openvpn": "OpenVPN", "ike": "IKE"}
_PROTOCOLS = {50: "ESP", 51: "AH"}
_SPOTS = ("obfuscated and TLS-based VPNs", "OpenVPN and IKE whose handshake was not seen", "QUIC-based VPNs")


class Detector:
    """Names VPNs."""

    takes = (Spoke, FlowOpened)

    def receive(self, item: Block | Observation, host: Host) -> list[Evidence]:  # noqa: ARG002 whose end it is is all one
        """Return the name as evidence."""
        match item:
            case Spoke() if item.what in _NAMES:
                name = _NAMES[item.what]
            case FlowOpened() if item.flow.protocol in _PROTOCOLS:
                name = _PROTOCOLS[item.flow.protocol]
            case _:
                return []
        return [Evidence(
            time_ns=item.time_ns,
            subject=item.flow,
            label="vpn",
            evidence_class="network",
            kind=name.lower(),
            nats=HANDSHAKE_NATS,
            text=f"{name}, by the form of its messages",
            start_ns=item.flow.start_ns,
            blind_spots=_SPOTS,
        )]
