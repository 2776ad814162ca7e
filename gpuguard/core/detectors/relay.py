"""One process holds both ends of a relay: a connection out of this host, and one into a service of it.

`ssh -R` and every other reverse tunnel end in the same picture: the process that dialled out opens, while the outer
connection is in use, a connection to a port of this host or of its private network, and carries bytes between the two.
It is seen in the kernel's socket lists alone (INET_DIAG and /proc/PID/fd), whatever the outer carrier, and it says
whose doing it is. No name, port or key is asked.

Benign look-alikes: a client that also talks to a local database, resolver, cache or agent (nearly every process with a
remote connection has some local one). So a local socket alone says nothing: the inner connection must open after the
outer one was led by the far side, moments after bytes from there, as an answer to them; and both must carry like
amounts. A load balancer or proxy of this host is entered from outside: its outer connection was not dialled by it.
Where the guard came too late to see who dialled, `Network.dialler` says it by the sockets, and little is left to say:
of its rare mistakes, accepted connections whose listener is gone, a proxy looks just like this.
"""

from __future__ import annotations

import ipaddress
from collections import deque
from functools import lru_cache
from typing import TYPE_CHECKING

from gpuguard.core.addresses import address_bytes
from gpuguard.core.bounded import BoundedTable
from gpuguard.core.evidence import Evidence
from gpuguard.core.observations import Exchange, FlowClosed, FlowsOpened, FlowUse
from gpuguard.core.records import Sockets

if TYPE_CHECKING:
    import numpy as np

    from gpuguard.core.host import Host
    from gpuguard.core.observations import Observation
    from gpuguard.core.records import Block, Socket
    from gpuguard.core.subjects import FlowId, ProcessId

FLOWS_MAX = 1_024
#: Of connections that were opened, the last so many are looked through.
OPENED_MAX = 65_536

#: How far bytes from the far side, or the confirmation of its channel, and the inner connection opened for them lie
#: apart: a connect(2) on this host, with a poll loop before it.
OPENS_WITHIN_NS = 50_000_000
LED_MAX = 64
#: One or two exchanges led from outside are nothing; below this a flow is not looked up.
LED_MIN = 3
#: The socket list comes every few seconds; what was led longer ago was looked up then.
LOOKED_BACK_NS = 30_000_000_000

# P(an inner connection of the same process opens within 50 ms of bytes from the far side | no relay): a client that
# asks a remote service and then a local one, over and over, may do so one time in ten; that it is a connection which
# the far side leads makes it one in a hundred flows more. H1: every channel does so.
OPENED_NATS = 6.5
# What came in on the outer connection went out on the inner one, within the factor of four that key exchange, framing
# and other channels may add: two unrelated connections of one process do so by chance once in five.
LIKE_AMOUNTS_NATS = 1.6
# Who dialled was read from the sockets. `reverse_shell` weighs that already, up to the chance that the connection was
# accepted all the same; there the far side leads by right, and one service in ten asks another for each of its clients,
# with like amounts if it is a proxy: ln 10, and nothing for the amounts.
UNSEEN_OPENED_NATS = 2.3
AMOUNT_BYTES_MIN = 256
AMOUNT_FACTOR = 4

_SPOTS = ("a helper process that holds the inner end", "a Unix-domain socket or a file as the inner end")


class _Outer:
    """One connection out of this host in which the far side was seen to lead."""

    __slots__ = ("carrier", "flow", "label", "led_ns", "said")

    def __init__(self, flow: FlowId, carrier: str) -> None:
        self.flow = flow
        self.carrier = carrier
        self.label = "reverse-shell"
        self.led_ns: list[int] = []
        self.said: set[str] = set()


class Detector:
    """Joins connections that the far side leads with the inner ones of the same process."""

    takes = (FlowsOpened, FlowUse, Exchange, Sockets, FlowClosed)

    def __init__(self) -> None:
        self._outer: BoundedTable[FlowId, _Outer] = BoundedTable(FLOWS_MAX)
        self._opened: deque[np.ndarray] = deque()
        self._passed = 0

    def evicted(self) -> dict[str, int]:
        """Return how much was forgotten because a table was full, by what it was."""
        return {"connections led from afar": self._outer.evicted, "openings of connections": self._passed}

    def receive(self, item: Block | Observation, host: Host) -> list[Evidence]:
        """Return what ties an outer connection to an inner one."""
        match item:
            case FlowsOpened():
                self._opened.append(item.rows)
                while sum(map(len, self._opened)) > OPENED_MAX and len(self._opened) > 1:
                    # Later than that, nobody looks for most of them.
                    gone = self._opened.popleft()
                    self._passed += int((gone["start_ns"] > item.time_ns - LOOKED_BACK_NS).sum())
            case FlowUse() if item.use.startswith("ssh-reverse"):
                outer = self._of(item.flow, item.carrier)
                outer.label = "ssh-reverse-tunnel"
                if item.use == "ssh-reverse-channel-open":
                    self._led(outer, item.time_ns)
            case Exchange() if host.network.dialler(item.flow) not in (None, item.first):
                self._led(self._of(item.flow, item.carrier), item.time_ns - item.answer_delay_ns)
            case Sockets():
                return self._join(item, host)
            case FlowClosed():
                self._outer.pop(item.flow)
            case _:
                pass
        return []

    def _of(self, flow: FlowId, carrier: str) -> _Outer:
        outer = self._outer.get(flow) or _Outer(flow, carrier)
        self._outer[flow] = outer
        return outer

    @staticmethod
    def _led(outer: _Outer, time_ns: int) -> None:
        outer.led_ns = [*outer.led_ns, time_ns][-LED_MAX:]

    def _join(self, seen: Sockets, host: Host) -> list[Evidence]:
        found: list[Evidence] = []
        for outer in self._outer.values():
            flow = outer.flow
            known = outer.label == "ssh-reverse-tunnel" or len(outer.led_ns) >= LED_MIN
            late = not outer.led_ns or seen.time_ns - outer.led_ns[-1] > LOOKED_BACK_NS
            if not known or late or flow.netns != seen.netns:
                continue
            dialler = host.network.dialler(flow)
            if dialler is None or host.network.stays_inside(flow, dialler):
                continue
            owner = host.network.owner(flow)
            socket = host.network.socket(flow, dialler)
            if owner is not None and socket is not None:
                found += self._inner(seen, outer, owner, socket, host)
        return found

    def _inner(self, seen: Sockets, outer: _Outer, owner: ProcessId, socket: Socket, host: Host) -> list[Evidence]:
        found: list[Evidence] = []
        for netns, inner in host.network.sockets_of(owner):
            delay_ns = self._opened_after_ns(outer, socket, netns, inner)
            if delay_ns is None:
                continue
            where = f"{inner.remote}:{inner.remote_port}"
            if "opened" not in outer.said:
                outer.said.add("opened")
                moment = f"{abs(delay_ns) / 1e6:.1f} ms {'after' if delay_ns >= 0 else 'before'}"
                text = f"{owner} holds this connection and, opened {moment} bytes from its far side, one to {where}"
                nats = OPENED_NATS if outer.flow.initiator_known else UNSEEN_OPENED_NATS
                found.append(_evidence(seen, outer, "one-process-both-ends", nats, text))
            less, more = sorted((socket.received_bytes, inner.sent_bytes))
            like = outer.flow.initiator_known and "amounts" not in outer.said
            if like and less >= AMOUNT_BYTES_MIN and more <= less * AMOUNT_FACTOR:
                outer.said.add("amounts")
                text = (f"{socket.received_bytes} bytes came in from the far side and {inner.sent_bytes} went on to "
                        f"{where}")
                found.append(_evidence(seen, outer, "like-amounts", LIKE_AMOUNTS_NATS, text))
        return found

    def _opened_after_ns(self, outer: _Outer, socket: Socket, netns: int, inner: Socket) -> int | None:
        """Return how long after the far side spoke on the outer connection an inner one was opened for it, if it was.

        It may have been before: a channel's confirmation goes out when the inner connection stands.
        """
        if inner.protocol != 6 or not _is_private(inner.remote):
            return None
        if (inner.local, inner.local_port) == (socket.local, socket.local_port):
            return None
        opened_ns = self._opened_ns(netns, inner)
        if opened_ns is None or not outer.led_ns:
            return None
        delay_ns = min((opened_ns - led for led in outer.led_ns), key=abs)
        return delay_ns if abs(delay_ns) <= OPENS_WITHIN_NS else None

    def _opened_ns(self, netns: int, inner: Socket) -> int | None:
        """Return when a connection was last seen to be opened from the one end of a socket to the other."""
        ends = (address_bytes(inner.local), address_bytes(inner.remote))
        for rows in reversed(self._opened):
            same = (rows["initiator_port"] == inner.local_port) & (rows["responder_port"] == inner.remote_port)
            for row in rows[same & (rows["netns"] == netns)][::-1]:
                if (row["initiator"].tobytes(), row["responder"].tobytes()) == ends:
                    return int(row["start_ns"])
        return None


def _evidence(seen: Sockets, outer: _Outer, kind: str, nats: float, text: str) -> Evidence:
    return Evidence(
        time_ns=seen.time_ns,
        subject=outer.flow,
        label=outer.label,
        evidence_class="process",
        kind=kind,
        nats=nats,
        text=text,
        start_ns=outer.flow.start_ns,
        carrier=outer.carrier,
        blind_spots=_SPOTS,
    )


@lru_cache(maxsize=16_384)
def _is_private(address: str) -> bool:
    """Return whether an address is this host's or its site's: loopback, RFC 1918, RFC 4193, link-local."""
    one = ipaddress.ip_address(address)
    return one.is_loopback or one.is_private or one.is_link_local
