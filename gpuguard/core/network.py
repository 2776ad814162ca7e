"""This host's ends of the network: its addresses and sockets, who dialled, and so whose a flow is and where it leads.

Two things tell it. The kernel says who dials at that moment, where it lets us hear (`Connects`); lists of sockets say
every few seconds who holds what, also of what began before we did (`Sockets`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from gpuguard.core.addresses import address_bytes
from gpuguard.core.bounded import BoundedTable
from gpuguard.core.records import CONNECT, Connects, Socket, Sockets

if TYPE_CHECKING:
    from gpuguard.core.observations import Speaker
    from gpuguard.core.processes import Processes
    from gpuguard.core.subjects import FlowId, ProcessId

SOCKETS_MAX = 32_768
NAMESPACES_MAX = 256
DIALLERS_MAX = 32_768
#: A flow's owner is asked for within seconds if at all, or is on a list of sockets.
DIALS_MAX, DIALS_KEPT_NS = 65_536, 60_000_000_000
#: Dials between one pair of ends that are remembered: a source port that a program chose is soon dialled from again.
DIALS_OF_ENDS_MAX = 4
#: A connection's first packet leaves between the dial and its answer; the clocks of packets and dials are read apart.
DIAL_APART_NS = 1_000_000
#: Lists of sockets come every few seconds. What was on none for so long, nobody misses: a socket; a listener, whose
#: connections go on without it, or an address.
CLOSED_KEPT_NS, LISTED_KEPT_NS = 60_000_000_000, 86_400_000_000_000
LISTEN_STATE = 10
#: From here on Linux takes the port of a connection that it opens (ip_local_port_range, ip(7)).
EPHEMERAL_PORT_MIN = 32_768

SocketKey = tuple[int, int, str, int, str, int]

#: Where the ends of a connection begin in a row of CONNECT; they are the rest of it.
_ENDS_AT = CONNECT.itemsize - 37


class Dial(NamedTuple):
    """Who dialled a connection, from which network namespace, when, and when that was answered or in vain."""

    time_ns: int
    answered_ns: int
    netns: int
    process: ProcessId


class Dialled(NamedTuple):
    """How many TCP connections a process dialled since it was met first, and how many of them came to nothing.

    ``withheld`` are those that came too fast to be told one by one.
    """

    connections: int
    in_vain: int
    withheld: int


class Network:
    """Every end of a connection on this host, in any network namespace, and whose it is."""

    def __init__(self, processes: Processes) -> None:
        self._processes = processes
        #: Those of the host itself, known before any socket is listed.
        self.addresses: tuple[str, ...] = ()
        #: The kernel tells here who dials.
        self.knows_diallers = False
        self._sockets: BoundedTable[SocketKey, tuple[int, Socket]] = BoundedTable(SOCKETS_MAX)
        #: What was owned in each namespace when it was last listed. Containers come and go.
        self._owned: BoundedTable[int, tuple[int, dict[ProcessId, list[Socket]]]] = BoundedTable(NAMESPACES_MAX)
        #: Addresses, and ports that listened, with when they were last listed: of every container of a day.
        self._local: BoundedTable[tuple[int, str], int] = BoundedTable(SOCKETS_MAX)
        self._listening: BoundedTable[tuple[int, int, int], int] = BoundedTable(SOCKETS_MAX)
        self._dials: BoundedTable[bytes, tuple[Dial, ...]] = BoundedTable(DIALS_MAX)
        self._dialled: BoundedTable[ProcessId, Dialled] = BoundedTable(DIALLERS_MAX)
        #: What is forgotten here is looked for again, among dials and sockets; what was told of its flow stays.
        self._flow_owner: BoundedTable[FlowId, ProcessId] = BoundedTable(SOCKETS_MAX)

    def is_local(self, netns: int, address: str) -> bool:
        """Return whether the address is one of this host's, as its sockets and the host record say."""
        if address.startswith("127.") or address == "::1":
            return True
        return address in self.addresses or (netns, address) in self._local

    def houses(self, address: str) -> bool:
        """Return whether an address is one of this host's in any of its namespaces: a container's is."""
        return any((netns, address) in self._local for netns in self._owned.entries)

    def is_inbound(self, flow: FlowId) -> bool:
        """Return whether a flow was opened from elsewhere to this host: what its initiator does is not done here."""
        return self.is_local(flow.netns, flow.responder) and not self.is_local(flow.netns, flow.initiator)

    def dialled_out(self, flow: FlowId) -> bool:
        """Return whether a flow was seen to begin, and leads elsewhere."""
        return flow.initiator_known and not self.is_local(flow.netns, flow.responder)

    def dialler(self, flow: FlowId) -> Speaker | None:
        """Return which end of a flow this host dialled from, None if it was called, or that is not certain.

        Where the opening was not seen its sockets tell: one whose port was ever seen to listen was accepted, and one
        with a port that Linux gives to outgoing connections was dialled, unless its listener ended before we looked.
        """
        if flow.initiator_known:
            return None if self.is_inbound(flow) else "initiator"
        near = self._sockets.get(_key(flow, "initiator")) is not None
        far = self._sockets.get(_key(flow, "responder")) is not None
        port = flow.initiator_port if near else flow.responder_port
        if near == far or port < EPHEMERAL_PORT_MIN or (flow.netns, flow.protocol, port) in self._listening:
            return None
        return "initiator" if near else "responder"

    def stays_inside(self, flow: FlowId, dialler: Speaker) -> bool:
        """Return whether a flow never leaves the host: what this end of it dialled is this host's own."""
        return self.is_local(flow.netns, flow.responder if dialler == "initiator" else flow.initiator)

    def owner(self, flow: FlowId) -> ProcessId | None:
        """Return the process that holds the local end of a flow, None when that is not certain.

        It is who dialled, as the kernel said at that moment. Else the lists of sockets tell: of a flow inside the host
        it is the initiator's; a socket inherited by a child belongs to the process among its owners that is an
        ancestor of all others; unrelated owners are nobody's. Of one that has ended it may be a child's, or a parent's.
        """
        if not (len(self._sockets) or len(self._dials)):
            return None
        known = self._flow_owner.get(flow) or self.who_dialled(flow)
        owner = known
        if known is None or self._processes.has_ended(known):
            socket = self.socket(flow, "initiator") or self.socket(flow, "responder") or self._carried(flow)
            holder = self._processes.head(socket.owners) if socket else None
            is_heir = known is None or (holder is not None and self._processes.are_related(known, holder))
            owner = holder if is_heir else known
        if owner:
            self._flow_owner[flow] = owner
        return owner

    def who_dialled(self, flow: FlowId) -> ProcessId | None:
        """Return who dialled a flow, by the kernel's word at that moment, None if that was not told, or two may have.

        What begins after the answer is another connection between these ends, whose dial was not told. Where its
        namespace only carries the flow, or is called by a container, the dial was in another.
        """
        if not flow.initiator_known or not len(self._dials):
            return None
        dials = [one for one in self._dials.get(_ends(flow)) or ()
                 if one.time_ns - DIAL_APART_NS <= flow.start_ns <= one.answered_ns + DIAL_APART_NS]
        here = [one for one in dials if one.netns == flow.netns]
        if not here and self.is_local(flow.netns, flow.initiator):
            return None
        found = {(one.netns, one.process) for one in here or dials}
        return found.pop()[1] if len(found) == 1 else None

    def dialled(self, process: ProcessId) -> Dialled | None:
        """Return how many connections a process dialled, None where nobody counts, or it dialled none."""
        return self._dialled.get(process)

    def socket(self, flow: FlowId, end: Speaker) -> Socket | None:
        """Return the socket of one end of a flow, None if it was not seen since the flow began."""
        seen_ns, socket = self._sockets.get(_key(flow, end)) or (0, None)
        # A list that is older than the flow shows whoever had these ends before: ports are used again.
        return socket if seen_ns >= flow.start_ns else None

    def sockets_of(self, process: ProcessId) -> list[tuple[int, Socket]]:
        """Return (netns, socket) of every socket that the process owned when its namespace was last looked at."""
        return [(netns, socket) for netns, (_, owned) in self._owned.entries.items()
                for socket in owned.get(process, ())]

    def take_sockets(self, seen: Sockets) -> None:
        """Take in what one namespace has, and who holds it."""
        owned: dict[ProcessId, list[Socket]] = {}
        for socket in seen.sockets:
            for owner in socket.owners:
                owned.setdefault(owner, []).append(socket)
            if socket.state == LISTEN_STATE:
                self._listening.make_room(lambda listed_ns: seen.time_ns - listed_ns > LISTED_KEPT_NS)
                self._listening[seen.netns, socket.protocol, socket.local_port] = seen.time_ns
                continue
            self._local.make_room(lambda listed_ns: seen.time_ns - listed_ns > LISTED_KEPT_NS)
            self._local[seen.netns, socket.local] = seen.time_ns
            key = (seen.netns, socket.protocol, socket.local, socket.local_port, socket.remote, socket.remote_port)
            _, before = self._sockets.get(key) or (0, None)
            # Whose owner is no longer readable stays whose it was.
            kept = socket if before is None or before.inode != socket.inode or socket.owners else before
            self._sockets.make_room(lambda listed: seen.time_ns - listed[0] > CLOSED_KEPT_NS)
            self._sockets[key] = (seen.time_ns, kept)
        self._owned.make_room(lambda listed: seen.time_ns - listed[0] > CLOSED_KEPT_NS)
        self._owned[seen.netns] = (seen.time_ns, owned)

    def take_connects(self, seen: Connects) -> None:
        """Keep who dialled, by the ends as they lie in a row; the last row of a process has its count."""
        self.knows_diallers = True
        processes: dict[tuple[int, int], ProcessId] = {}
        raw, size = seen.rows.tobytes(), CONNECT.itemsize
        columns = ("time_ns", "waited_us", "netns", "pid", "start_ticks", "dialled", "in_vain", "withheld", "state")
        for at, row in enumerate(zip(*(seen.rows[name].tolist() for name in columns), strict=True)):
            time_ns, waited_us, netns, pid, start_ticks, dialled, in_vain, withheld, state = row
            process = processes.get((pid, start_ticks))
            if process is None:
                process = processes[pid, start_ticks] = self._processes.named(pid, start_ticks)
            self._dialled[process] = Dialled(dialled, in_vain, withheld)
            if state:
                ends = raw[at * size + _ENDS_AT:(at + 1) * size]
                before = self._dials.get(ends) or ()
                dial = Dial(time_ns, time_ns + waited_us * 1000, netns, process)
                self._dials[ends] = (*before, dial)[-DIALS_OF_ENDS_MAX:]
        # One that is further ahead is of before the clock was set back.
        while (oldest := self._dials.oldest) and abs(seen.time_ns - oldest[1][-1].answered_ns) > DIALS_KEPT_NS:
            self._dials.pop(oldest[0])

    def forget(self, process: ProcessId) -> None:
        """Drop the count of a process that is long gone. Whose its flows were is still asked."""
        self._dialled.pop(process)

    def evicted(self) -> dict[str, int]:
        """Return how many entries left because their table was full, by what they are, since the beginning."""
        return {
            "sockets": self._sockets.evicted,
            "sockets' namespaces": self._owned.evicted,
            "addresses of this host": self._local.evicted,
            "ports that listened": self._listening.evicted,
            "dials": self._dials.evicted,
            "counts of dials": self._dialled.evicted,
        }

    def _carried(self, flow: FlowId) -> Socket | None:
        """Return the initiator's socket of a flow that its namespace only carries: one other namespace alone has it.

        So a container's connections are named where its bridge is watched, before their addresses are translated.
        """
        if self.is_local(flow.netns, flow.initiator) or self.is_local(flow.netns, flow.responder):
            return None
        ends = _key(flow, "initiator")[1:]
        seen = [self._sockets.get((netns, *ends)) for netns in self._owned.entries if netns != flow.netns]
        found = [one[1] for one in seen if one and one[0] >= flow.start_ns]
        return found[0] if len(found) == 1 else None


def _key(flow: FlowId, end: Speaker) -> SocketKey:
    near, far = (flow.initiator, flow.initiator_port), (flow.responder, flow.responder_port)
    local, remote = (near, far) if end == "initiator" else (far, near)
    return (flow.netns, flow.protocol, *local, *remote)


def _ends(flow: FlowId) -> bytes:
    """Return the ends of a flow as they lie in a row of CONNECT that its initiator dialled."""
    ports = flow.initiator_port.to_bytes(2, "little") + flow.responder_port.to_bytes(2, "little")
    return address_bytes(flow.initiator) + address_bytes(flow.responder) + ports + bytes([flow.protocol])
