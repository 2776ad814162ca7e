"""A pool of connections that this host dialled in advance, for visitors who come from the far side: localtunnel's way.

The client of such a tunnel keeps some connections open and says nothing on them. When somebody comes, the far side
picks one and speaks first; this host answers at once, and dials another. In clear what the visitor says is read
(`proxies`). In TLS 1.3 it still shows that this host's first word behind its Finished answers the far side's first
word, which broke a silence of a second and more ("tls-answered-first"): nobody had been asked for anything.

Benign look-alikes, and what keeps them out:

- clients of all kinds ask first, also polls that are answered late; connections that a browser keeps ready speak first
  when they are used, and those that are not are closed without a word, or by a server's (408, GOAWAY) that is answered
  by an alert;
- servers that greet (mail, files, databases) do so at once; those that make their callers wait (postscreen) do so for
  the same time, and slow ones are answered in one length each time: the client's name, its login. Visitors come when
  they like, and what they fetch has all lengths.

Workers that dial once for each job, say nothing and are asked, are built the same way: no more than a suspicion.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, NamedTuple

from gpuguard.core.bounded import BoundedTable
from gpuguard.core.evidence import Evidence
from gpuguard.core.observations import Spoke
from gpuguard.core.shell_talk import ALIKE_BYTES, MOSTLY
from gpuguard.core.turns import variation

if TYPE_CHECKING:
    from gpuguard.core.host import Host
    from gpuguard.core.observations import Observation
    from gpuguard.core.records import Block

PLACES_MAX = 1_024
RECENT_MAX = 32
WITHIN_NS = 3_600_000_000_000

#: A close_notify of TLS 1.3 (RFC 8446, 5.2 and 6).
ALERT_BYTES = 19
VISITS_MIN = 5
#: Visitors in turn on ten connections (localtunnel's most) come after waits that vary by a third, or less where they
#: come evenly; a server that makes its callers wait does so by a timer.
TIMER_MAX = 0.05

# P(five such connections to one place within an hour, with varied waits and answers | no tunnel): of some 1,000 in TLS
# of ordinary programs none has this even once: ln 330 at the rule-of-three bound, and little more for the other four,
# which one program makes alike.
NATS = 6.5

_SPOTS = ("TLS 1.2, client certificates", "tunnels that say who they are before they wait (frp, rathole)",
          "one connection for all visitors", "fewer than five visitors an hour")


class _Visit(NamedTuple):
    """When the far side was answered on a connection, how long that had been open, and with how many bytes."""

    time_ns: int
    waited_ns: int
    size: int


class _Place:
    """The last such connections to one place, how many there were, and of how many it was told."""

    __slots__ = ("count", "told", "visits")

    def __init__(self) -> None:
        self.visits: deque[_Visit] = deque(maxlen=RECENT_MAX)
        self.count = 0
        self.told = 0

    def add(self, visit: _Visit) -> bool:
        """Count a connection; return whether there are enough of them to be told of, or twice as many as before."""
        self.visits.append(visit)
        while visit.time_ns - self.visits[0].time_ns > WITHIN_NS:
            self.visits.popleft()
        self.count = self.count + 1 if len(self.visits) > 1 else 1
        self.told = self.told if len(self.visits) > 1 else 0
        if len(self.visits) < VISITS_MIN or self.count < 2 * self.told or not _by_chance(self.visits):
            return False
        self.told = self.count
        return True


class Detector:
    """Counts connections on which the far side spoke first, by whither they were dialled."""

    takes = (Spoke,)

    def __init__(self) -> None:
        self._places: BoundedTable[tuple[int, str, str, int], _Place] = BoundedTable(PLACES_MAX)

    def evicted(self) -> dict[str, int]:
        """Return how much was forgotten because a table was full, by what it was."""
        return {"places that connections wait at": self._places.evicted}

    def receive(self, item: Block | Observation, host: Host) -> list[Evidence]:
        """Return the evidence, told of the connection at hand, and again when there are twice as many."""
        if (not isinstance(item, Spoke) or item.what != "tls-answered-first" or item.speaker != "initiator"
                or item.size == ALERT_BYTES):
            return []
        flow = item.flow
        if not host.network.dialled_out(flow):
            return []
        key = (flow.netns, flow.initiator, flow.responder, flow.responder_port)
        self._places.make_room(lambda one: item.time_ns - one.visits[-1].time_ns > WITHIN_NS)
        place = self._places[key] = self._places.get(key) or _Place()
        if not place.add(_Visit(item.time_ns, item.time_ns - flow.start_ns, item.size)):
            return []
        return [Evidence(
            time_ns=item.time_ns,
            subject=flow,
            label="reverse-proxy",
            evidence_class="network",
            kind="pool-dialled-in-advance",
            nats=NATS,
            text=(f"on {place.count} connections that this host dialled to one place it said nothing in TLS until the "
                  "far side spoke first, after different times, and was answered at once, in different lengths: as "
                  "visitors of a tunnel are"),
            start_ns=flow.start_ns,
            carrier="tls",
            blind_spots=_SPOTS,
        )]


def _by_chance(visits: deque[_Visit]) -> bool:
    """Return whether neither the waits nor the answers are mostly alike."""
    alike = max(sum(abs(one.size - other.size) <= ALIKE_BYTES for other in visits) for one in visits)
    return alike <= MOSTLY * len(visits) and variation([one.waited_ns for one in visits]) > TIMER_MAX
