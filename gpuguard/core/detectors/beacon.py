"""Regular calls: one end calls the same destination at even intervals, in new connections or within one.

Malware phones home by a timer, with a jitter so that the timer does not show (Cobalt Strike: up to 50 % is usual); so
do health checks, metrics exporters, leases, NTP, MQTT and package updates, and on a server they are nearly all of it.
By timing alone the two are the same thing, so the label says what is seen, with its period, and accuses nobody; who
may call whom is for policy, and for whoever reads the list.

A beat is a call at least a second after the last to the same place. Of the last 16 intervals three quarters must lie
within a quarter of their median: timers do so up to a jitter of a half. Intervals of independent calls (a Poisson
process) lie there with probability 0.17 each, so that twelve of sixteen happen by chance once in 600,000.

A beat begins a connection (by its start, which a table of bounded size keeps for each destination), is one message of
a slow TLS connection, or one that the far side begins. Not seen: a clear conversation whose beats this host begins.
"""

from __future__ import annotations

import itertools
from collections import deque
from typing import TYPE_CHECKING

from gpuguard._attempts import Recent, apart
from gpuguard.core.addresses import address_bytes
from gpuguard.core.bounded import BoundedTable
from gpuguard.core.evidence import Evidence
from gpuguard.core.flows import closed_flows
from gpuguard.core.observations import Exchange, FlowClosed, FlowsClosed, TlsTalk

if TYPE_CHECKING:
    from gpuguard.core.host import Host
    from gpuguard.core.observations import Observation
    from gpuguard.core.records import Block
    from gpuguard.core.subjects import FlowId

PLACES_MAX = 8_192
TALKS_MAX = 1_024
INTERVALS = 16
EVEN_MIN = 12
EVEN_RATIO = 0.25
APART_NS = 1_000_000_000

#: Places of dull flows: who is called for the first time, or again within a second, costs no more than a look-up. What
#: is forgotten of them is that they were called once: their next call is the first again.
SEEN_MAX = 131_072

# Chance is not the rival (ln 600,000 = 13): other names are. Whoever knows more than the pace should name the flow.
EVEN_NATS = 3.2

_SPOTS = ("a jitter above one half", "fewer than 17 calls", "calls to ever new destinations")

#: Who called whom, as it lies in a row: namespace, initiator, responder, its port, protocol.
ENDS_BYTES = 43

Place = tuple[int, bytes, bytes, int, int]


def even(times_ns: list[int] | deque[int]) -> int:
    """Return the median interval of these times in ns if they are a timer's, else 0."""
    if len(times_ns) <= INTERVALS:
        return 0
    gaps = [later - earlier for earlier, later in itertools.pairwise(times_ns)][-INTERVALS:]
    median = sorted(gaps)[INTERVALS // 2]
    near = sum(abs(gap - median) <= EVEN_RATIO * median for gap in gaps)
    return median if near >= EVEN_MIN and median >= APART_NS else 0


class _Beats:
    """When something began again after a second's rest."""

    __slots__ = ("last_ns", "times_ns")

    def __init__(self) -> None:
        self.last_ns = 0
        self.times_ns: deque[int] = deque(maxlen=INTERVALS + 1)

    def add(self, time_ns: int) -> int:
        """Add a call; return the period if it is one more beat of a timer's."""
        apart = not self.times_ns or time_ns - self.last_ns >= APART_NS
        self.last_ns = time_ns
        if apart:
            self.times_ns.append(time_ns)
        return even(self.times_ns) if apart else 0


class Detector:
    """Remembers when each place was called."""

    takes = (FlowClosed, FlowsClosed, Exchange, TlsTalk)

    def __init__(self) -> None:
        # Of a busy server's clients these hold the last. Who is forgotten is named later, or not; it accuses nobody.
        self._calls: BoundedTable[Place, _Beats] = BoundedTable(PLACES_MAX)
        self._within: BoundedTable[FlowId, _Beats] = BoundedTable(PLACES_MAX)
        self._seen = Recent(ENDS_BYTES, SEEN_MAX)
        #: When who dialled sent something in TLS.
        self._asked: BoundedTable[FlowId, tuple[int, ...]] = BoundedTable(TALKS_MAX)

    def mix_by(self, seed: int) -> None:
        """Remember places by this seed, those of before no more."""
        self._seen = Recent(ENDS_BYTES, SEEN_MAX, seed)

    def evicted(self) -> dict[str, int]:
        """Return how much was forgotten because a table was full, by what it was."""
        return {"connections whose pace is watched": self._within.evicted + self._asked.evicted}

    def receive(self, item: Block | Observation, host: Host) -> list[Evidence]:  # noqa: ARG002 inside or out is all one
        """Return what is regular now."""
        match item:
            case FlowClosed():
                self._within.pop(item.flow)
                self._asked.pop(item.flow)
                return self._closed(item)
            case FlowsClosed():
                return self._ended(item)
            case Exchange() if item.first == "responder":
                return self._beat(item)
            case TlsTalk():
                return self._talk(item)
            case _:
                return []

    def _closed(self, item: FlowClosed) -> list[Evidence]:
        if not item.flow.initiator_known:
            return []
        ends, start_ns = _ends(item.flow), item.flow.start_ns
        before_ns = self._seen.get(ends)
        self._seen.put(ends, start_ns)
        if before_ns is None or start_ns - before_ns < APART_NS:
            return []
        flow = item.flow
        place = (flow.netns, address_bytes(flow.initiator), address_bytes(flow.responder), flow.responder_port,
                 flow.protocol)
        return _tell_call(item, self._call(place, before_ns, start_ns))

    def _ended(self, item: FlowsClosed) -> list[Evidence]:
        """Take in dull flows, of which nearly all are nobody's beat: a flow is made of those that are."""
        found: list[Evidence] = []
        for row, before_ns in apart(item.rows, self._seen, APART_NS):
            _, start_ns, netns, near, _, far, far_port, protocol, *_ = item.rows[row].item()
            period_ns = self._call((netns, near, far, far_port, protocol), before_ns, start_ns)
            if period_ns:
                found += _tell_call(next(closed_flows(item.rows[row:row + 1])), period_ns)
        return found

    def _call(self, place: Place, before_ns: int, start_ns: int) -> int:
        """Add a call to a place, and the one before if that was not kept; return the period if it is a beat."""
        beats = self._calls.get(place)
        if beats is None:
            beats = _Beats()
            beats.add(before_ns)
        self._calls[place] = beats
        return beats.add(start_ns)

    def _talk(self, item: TlsTalk) -> list[Evidence]:
        """Tell of messages at even intervals; who answers them within a second does not begin them."""
        if item.speaker == "initiator":
            self._asked[item.flow] = item.times_ns
        begun = [item.times_ns[0]]
        begun += [now for now in item.times_ns if now - begun[-1] >= APART_NS]
        period_ns = even(begun)
        if not period_ns:
            return []
        asked = self._asked.get(item.flow) or ()
        answers = sum(any(0 <= now - one < APART_NS for one in asked) for now in begun)
        who = "initiator" if 2 * answers > len(begun) else item.speaker
        return _tell(item.flow, item.time_ns, period_ns, f"the {who} sends")

    def _beat(self, item: Exchange) -> list[Evidence]:
        beats = self._within.get(item.flow) or _Beats()
        self._within[item.flow] = beats
        return _tell(item.flow, item.time_ns, beats.add(item.time_ns), "the far side speaks")


def _ends(flow: FlowId) -> bytes:
    """Return who called whom as it lies in a row."""
    near = flow.netns.to_bytes(8, "little", signed=True) + address_bytes(flow.initiator)
    return near + address_bytes(flow.responder) + flow.responder_port.to_bytes(2, "little") + bytes([flow.protocol])


def _tell_call(closed: FlowClosed, period_ns: int) -> list[Evidence]:
    if closed.carrier == "ssh":
        return []  # that it is SSH says more than its pace, be its use known or not
    return _tell(closed.flow, closed.time_ns, period_ns, f"{closed.flow.initiator} calls {closed.flow.responder}")


def _tell(flow: FlowId, time_ns: int, period_ns: int, what: str) -> list[Evidence]:
    if not period_ns:
        return []
    return [Evidence(
        time_ns=time_ns,
        subject=flow,
        label="beacon",
        evidence_class="network",
        kind="regular-calls",
        nats=EVEN_NATS,
        text=f"{what} every {period_ns / 1e9:.1f} s",
        start_ns=flow.start_ns,
        blind_spots=_SPOTS,
    )]
