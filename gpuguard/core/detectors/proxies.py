"""SOCKS and HTTP proxies, spoken to in clear; and this host serving as one on a connection that it opened itself.

A proxy is asked for a destination before anything else is said: SOCKS 4 and 5 (RFC 1928) in a few fixed bytes, HTTP by
CONNECT or by a whole address as the target (RFC 9112 section 3.2). Companies' hosts speak to proxies all day: that is
named, and accuses nobody. What they carry is read behind the request as if there were no proxy.

When the far side of a connection that this host opened asks *this host* for destinations, this host is the way into its
own network for somebody outside: a back-connecting proxy, as residential proxy kits and implants have it. No client
library does so. Its label is `reverse-proxy`, and so it is where the far side begins as a client of HTTP, or with the
preface of one of HTTP/2 (RFC 9113, 3.4): that is how visitors come through localtunnel, frp and the like, whose
connections wait for them. It may greet first (frp's StartWorkConn, bore's challenge), or speak in messages of a
WebSocket or in streams of yamux. Streams that the far side opens itself are those of a session turned round (revsocks,
ligolo-ng), and of Nomad, whose servers call their clients so: they are told, and what is asked in them accuses.

Benign look-alikes: binary protocols that begin with 5 or 4 (DCE/RPC, whose version is 5.0; the parser asks for
methods that exist), STOMP's CONNECT (no target, no HTTP version), requests with whole addresses to servers that are
no proxies (allowed, and named nonetheless); Docker's build sessions and reverse HTTP, which turn round what an
upgrade led to, and ICAP, whose answers hold requests (nothing is looked for behind a status line); text that quotes a
request; a file that begins with a request line, fetched over a connection of its own (FTP). One message alone is too
little for SOCKS to be named.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gpuguard.core.bounded import BoundedTable
from gpuguard.core.evidence import Evidence
from gpuguard.core.observations import FlowClosed, Spoke

if TYPE_CHECKING:
    from gpuguard.core.host import Host
    from gpuguard.core.observations import Observation
    from gpuguard.core.records import Block
    from gpuguard.core.subjects import FlowId

# What a message weighs against every other protocol whose first bytes are the same: each byte that the grammar fixes is
# worth ln 256 = 5.5 nats if first bytes were spread evenly. They are not (versions, lengths and zeros are common), so a
# third of it is granted. SOCKS 5: two bytes of a greeting, one or two of its answer, three and a length of a request.
# A request of HTTP has some twelve, but files hold such text as well: eight nats. Of those whose far side opens streams
# of yamux in clear, one in twenty is taken to be no tunnel but Nomad or its like.
_NATS = {
    "socks4-request": 4.0,
    "socks4-reply": 3.0,
    "socks5-greeting": 2.5,
    "socks5-choice": 2.0,
    "socks5-request": 6.0,
    "http-connect": 12.0,
    "http-absolute": 6.0,
    "http-backwards": 8.0,
    "yamux-backwards": 3.0,
}
# What the far side asks for behind its first request (a proxy of its own, through this one) is no further witness that
# this host is one: all that it says weighs no more than a CONNECT.
REVERSE_NATS_MAX = 12.0
FLOWS_MAX = 4_096

_ANSWERS = ("socks4-reply", "socks5-choice")
_ASKS = {"http-backwards": "asks it as a web server", "yamux-backwards": "opens streams of yamux"}
_SPOTS = ("proxies inside TLS or SSH, HTTP turned round in them too", "a connection whose opening was not seen")


class Detector:
    """Names proxies, and tells who is one for whom."""

    takes = (Spoke, FlowClosed)

    def __init__(self) -> None:
        #: What was told of a connection on which this host is the proxy.
        self._told: BoundedTable[FlowId, float] = BoundedTable(FLOWS_MAX)

    def evicted(self) -> dict[str, int]:
        """Return how much was forgotten because a table was full, by what it was."""
        return {"connections that this host is a proxy on": self._told.evicted}

    def receive(self, item: Block | Observation, host: Host) -> list[Evidence]:
        """Return what a message to or from a proxy weighs."""
        if isinstance(item, FlowClosed):
            self._told.pop(item.flow)
        if not isinstance(item, Spoke) or item.what not in _NATS:
            return []
        flow = item.flow
        answers = item.what in _ANSWERS
        asked_by_far = (item.speaker == "responder") != answers
        label = "socks-proxy" if item.what.startswith("socks") else "http-proxy"
        nats = _NATS[item.what]
        text = f"the {item.speaker} said {item.what}"
        if asked_by_far and flow.initiator_known:
            if host.network.is_local(flow.netns, flow.responder):
                return []
            told = self._told.get(flow) or 0.0
            nats = min(nats, REVERSE_NATS_MAX - told)
            if not nats:
                return []
            self._told[flow] = told + nats
            label = "reverse-proxy"
            what = _ASKS.get(item.what, "has it connect elsewhere")
            text += f": on a connection that this host opened, the far side {what}"
        elif item.what == "yamux-backwards":
            return []
        return [Evidence(
            time_ns=item.time_ns,
            subject=flow,
            label=label,
            evidence_class="network",
            kind=item.what,
            nats=nats,
            text=text,
            start_ns=flow.start_ns,
            carrier="tcp",
            blind_spots=_SPOTS,
        )]
