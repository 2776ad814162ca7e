"""`ssh -R` inside TLS or a WebSocket: the far side opens channels on a connection that this host dialled.

The records of SSH itself are read by their grammar (`core.ssh`). A wrapping hides what is in a packet, not how long it
is. A channel (RFC 4254, 5 and 7.2) in the usual ciphers, with a length field, blocks of 8 or 16 bytes and a tag of 16
(OpenSSH's PROTOCOL.chacha20poly1305, RFC 5647), costs: OPEN of a "forwarded-tcpip" 84 bytes and more, in whole blocks;
its CONFIRMATION 44 or 52; CLOSE 36. TLS adds 22 to each (RFC 8446, 5.2; 1.2 adds 29 with AES-GCM, RFC 5288, and 21 with
ChaCha20, RFC 7905), a WebSocket its frame (RFC 6455, 5.2: masked by whoever dialled), and where it compresses 6 more
(RFC 7692: random bytes do not shrink). When somebody comes through the port, the far side breaks the silence with an
OPEN, this host answers with a CONFIRMATION, and before the next visitor it has said CLOSE.

Benign look-alikes, and what keeps them out:

- the agent and the X11 display of this host, used from a session's far end: those OPEN at 68 bytes; `ssh -L`: this side
  opens; typing through a tunnel or not: 36 bytes each way;
- whatever else asks and is answered in lengths of its own: of three lengths, one is a multiple of eight by chance one
  time in eight, and two are one of 128 each. Services with three constant lengths exist, so all three are asked for,
  several times, in one and the same wrapping.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from gpuguard.core.bounded import BoundedTable
from gpuguard.core.evidence import Evidence
from gpuguard.core.observations import Exchange, FlowClosed

if TYPE_CHECKING:
    from gpuguard.core.host import Host
    from gpuguard.core.observations import Observation
    from gpuguard.core.records import Block
    from gpuguard.core.subjects import FlowId

FLOWS_MAX = 4_096

OPEN_BYTES_MIN = 84
#: A confirmation, by the size of blocks.
CONFIRMED_BYTES = {8: 44, 16: 52}
CLOSE_BYTES = 36
#: A length field and a tag, which are no part of blocks.
AROUND_BYTES = 20

OPENS_MIN = 4
CLOSES_MIN = 2
# P(seen | no SSH): none of 1,864 captures of ordinary programs, nor of 2,520 conversations drawn at random, has even
# two such exchanges with a CLOSE before one: ln 1,460 at the rule-of-three bound. Three constant lengths of a service
# are those of channels one time in 8,000 (one in 8, in 64 and in 128, in one of eight wrappings), but a service may
# have more: of 6,000 drawn with two to five kinds of messages 12 are suspect in the end.
NATS = 7.0

FRAME_BYTES, LONG_FRAME_BYTES, MASK_BYTES, SHORT_MAX = 2, 4, 4, 125
DEFLATED_BYTES = 6

_SPOTS = ("SSH's other ciphers", "compressed SSH", "several visitors at a time", "TLS in TLS, padded records",
          "a port that is asked for and used by fewer than four visitors")


class _Wrap(NamedTuple):
    """What a packet of SSH is wrapped in: bytes of TLS, and of a WebSocket's compression where there are frames."""

    tls: int
    frames: bool = False
    more: int = 0

    def near(self, said: int) -> int:
        """Return how long the packet was that this host said, in so many bytes; it has dialled and masks."""
        return said - self.tls - self.more - (FRAME_BYTES + MASK_BYTES if self.frames else 0)

    def far(self, said: int) -> int:
        """Return how long the far side's was."""
        rest = said - self.tls
        frame = FRAME_BYTES if rest - FRAME_BYTES <= SHORT_MAX else LONG_FRAME_BYTES
        return rest - self.more - (frame if self.frames else 0)

    def opens(self, item: Exchange) -> bool:
        """Return whether the far side opened a channel, and this host confirmed."""
        asked, answered = self.far(item.question_bytes), self.near(item.answer_bytes)
        return asked >= OPEN_BYTES_MIN and any(
            answered == confirmed and (asked - AROUND_BYTES) % block == 0
            for block, confirmed in CONFIRMED_BYTES.items())


_FRAMED = ((True, 0), (True, DEFLATED_BYTES))
_WRAPS = {
    "tls": (_Wrap(22), _Wrap(29), _Wrap(21), *(_Wrap(22, *one) for one in _FRAMED)),
    "tcp": tuple(_Wrap(0, *one) for one in _FRAMED),
}


class _Seen:
    """How often the far side opened a channel, and this host had closed one before, in each wrapping."""

    __slots__ = ("closes", "opens", "told")

    def __init__(self) -> None:
        self.opens: dict[_Wrap, int] = {}
        self.closes: dict[_Wrap, int] = {}
        self.told = False


class Detector:
    """Counts what has the lengths of channels that the far side opens."""

    takes = (Exchange, FlowClosed)

    def __init__(self) -> None:
        self._flows: BoundedTable[FlowId, _Seen] = BoundedTable(FLOWS_MAX)

    def evicted(self) -> dict[str, int]:
        """Return how much was forgotten because a table was full, by what it was."""
        return {"connections that may carry channels": self._flows.evicted}

    def receive(self, item: Block | Observation, host: Host) -> list[Evidence]:
        """Return the evidence with the visitor that makes it enough."""
        match item:
            case Exchange(first="responder") if item.carrier in _WRAPS:
                return self._exchange(item, host)
            case FlowClosed():
                self._flows.pop(item.flow)
            case _:
                pass
        return []

    def _exchange(self, item: Exchange, host: Host) -> list[Evidence]:
        wraps = [wrap for wrap in _WRAPS[item.carrier] if wrap.opens(item)]
        flow = item.flow
        if not wraps or not host.network.dialled_out(flow):
            return []
        seen = self._flows[flow] = self._flows.get(flow) or _Seen()
        for wrap in wraps:
            seen.opens[wrap] = seen.opens.get(wrap, 0) + 1
            seen.closes[wrap] = seen.closes.get(wrap, 0) + (wrap.near(item.before_bytes) == CLOSE_BYTES)
        enough = [wrap for wrap in wraps if seen.opens[wrap] >= OPENS_MIN and seen.closes[wrap] >= CLOSES_MIN]
        if seen.told or not enough:
            return []
        seen.told = True
        wrap = enough[0]
        return [Evidence(
            time_ns=item.time_ns,
            subject=flow,
            label="ssh-reverse-tunnel",
            evidence_class="network",
            kind="channels-opened-from-afar",
            nats=NATS,
            text=(f"on a connection that this host opened the far side broke the silence {seen.opens[wrap]} times with "
                  f"{item.question_bytes} bytes or so and was answered with {item.answer_bytes}, "
                  f"{seen.closes[wrap]} times after this host had said {CLOSE_BYTES - wrap.near(0)}: the lengths of "
                  "SSH's channels, opened, confirmed and closed, within "
                  f"{'a WebSocket' if wrap.frames else 'TLS'}"),
            start_ns=flow.start_ns,
            carrier=item.carrier,
            blind_spots=_SPOTS,
        )]
