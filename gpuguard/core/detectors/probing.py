"""Scans: one process, or one address of this host, tries many places that it never tried before, most of them in vain.

A sequential test over first contacts, after Jung, Paxson, Berger, Balakrishnan 2004, "Fast Portscan Detection Using
Sequential Hypothesis Testing": whoever knows where its services are mostly succeeds, whoever looks for them mostly
fails. A target is an address and port; what counts is the first attempt on each.

No target accuses by its number alone, but some are known to everybody: where a cloud tells an instance of its keys, and
where containers and clusters are administered (`PLACES`). A program has business with one or two kinds of them, whoever
looks for a way out tries them in turn. So the first failure at a further kind weighs as much as three elsewhere, and
the first answer of a kind takes nothing away, for finding it took no knowledge.

Benign look-alikes, and what keeps them out:

- rendezvous of a training job (NCCL, torchrun, Gloo: hundreds of new addresses and ports within a second), crawlers,
  package mirrors, load balancers, service meshes: they succeed, and a success takes more away than a failure gives;
- waiting for a master that does not listen yet: one target, however often;
- monitoring with half a rack down (Prometheus, health checks): the same targets again and again; a repeat takes away;
- a cluster whose workers are gone (Ray, Dask): ports of one machine that systems hand out weigh a fifth;
- health checks that open and close without a word: they were answered;
- names, time, logs and figures by UDP for a server that is down, tunnels whose peer is gone: few ports of a machine,
  from sockets of their own or to the same port as theirs, or streams; traces of routes go to ports handed out;
- connections that are older than what is seen of them: their segments carry ACK, those of a scan by FIN, NULL or Xmas
  do not;
- libraries of clouds (boto3, google-auth, all of them in one program), off a cloud: many addresses, one kind;
- agents of nodes and monitoring of clusters: two or three kinds, that answer on most of many nodes;
- peers of file sharing and coins, mail, candidates of connections, many of which are gone: public addresses weigh half,
  and a sixth where they lie apart, on ports of their own less still; what sweeps a range or a machine does not;
- what comes in from outside: the host that is scanned did nothing.

An attempt has failed when its flow ended without payload and without a full closing handshake, or when no packet
answered it for four seconds; one of UDP in the latter way only, for that a port is closed comes by ICMP. If it speaks
after all, that is taken back. On a live host the kernel says who dialled what was refused; what nobody answers waits
for the next list of sockets, so that it is known whose it was.
"""

from __future__ import annotations

import ipaddress
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from gpuguard._attempts import Places, Tried, succeed
from gpuguard.core.addresses import address_bytes
from gpuguard.core.bounded import BoundedTable
from gpuguard.core.evidence import Evidence
from gpuguard.core.flows import closed_flows
from gpuguard.core.fusion import SUSPECT_NATS
from gpuguard.core.network import CLOSED_KEPT_NS
from gpuguard.core.observations import Exchange, FlowClosed, FlowsClosed, FlowsUnanswered, FlowUse
from gpuguard.core.records import Sockets, Tick

if TYPE_CHECKING:
    from gpuguard.core.host import Host
    from gpuguard.core.observations import Observation
    from gpuguard.core.records import Block
    from gpuguard.core.subjects import FlowId, ProcessId, Subject

ATTEMPTS_MAX = 16_384
SOURCES_MAX = 1_024
TARGETS_MAX = 1_024
NAMESPACES_MAX = 256

# The paper takes P(success) as 0.8 for users and 0.2 for scanners: 1.4 nats either way, if attempts were independent.
# They are not: a rack or a route is down for all its addresses at once. So a failure is granted a third of that, and
# half of it again towards public addresses, where whole lists of peers are stale; a success keeps nearly all.
FAILED_NATS = 0.5
FAILED_PUBLIC_NATS = 0.25
#: That much is for a sweep: a port that failed before at a neighbour, or one more port of one address. Whoever was told
#: where to go goes to places that have nothing to do with each other, and of peers elsewhere most are gone.
APART_NATS = 0.25
APART_PUBLIC_NATS = 0.08
APART_PUBLIC_NEW_PORT_NATS = 0.04
#: One more port of one address that systems hand out and nobody is assigned: where workers, candidates of a connection
#: and peers listen. When their machine starts anew they fail together. Scans of these are long.
HANDED_OUT_NATS = 0.1
HANDED_OUT_MIN = 10_000
#: So many ports of a machine may leave datagrams unanswered: names, time, logs, figures of a server that is down.
UNHEARD_MIN = 4
ANSWERED_NATS = -1.2
#: A target tried before: monitors and retries do little else, scanners hardly ever.
AGAIN_NATS = -0.25
NATS_MAX = 40.0
#: A failure at a place of another kind than those tried before, in failures elsewhere: five kinds are suspect.
FURTHER_KIND = 3.0

FAILED_OF_PROCESS_MIN = 3
#: A list of sockets is read when a connection is opened, and every few seconds.
LISTED_WITHIN_NS = 12_000_000_000
FORGOTTEN_AFTER_NS = 600_000_000_000
#: SYN and RST with one repeat of each: nobody was there, or only a half-open look was taken.
REFUSED_PACKETS_MAX = 4


class Place(NamedTuple):
    """A kind of place that everybody knows, and what ATT&CK calls looking there."""

    name: str
    attack: str
    ports: tuple[int, ...] = ()
    addresses: tuple[str, ...] = ()


#: EC2, Azure, Google, Oracle and OpenStack share 169.254.169.254; then ECS, EKS, IPv6 of EC2, EKS and Google, Azure's
#: WireServer, Alibaba and Tencent. Ports are of Docker, of the kubelet when it may only be read, and else of
#: https://kubernetes.io/docs/reference/networking/ports-and-protocols.
PLACES = (
    Place("cloud metadata", "T1552.005", addresses=(
        "169.254.169.254", "169.254.170.2", "169.254.170.23", "fd00:ec2::254", "fd00:ec2::23", "fd20:ce::254",
        "168.63.129.16", "100.100.100.200", "169.254.0.23")),
    Place("container runtime", "T1613", (2375, 2376)),
    Place("kubelet", "T1613", (10250, 10255)),
    Place("etcd", "T1613", (2379, 2380)),
    Place("Kubernetes control plane", "T1613", (6443, 10257, 10259)),
)
_PLACES = Places(
    {address_bytes(address): kind for kind, place in enumerate(PLACES, 1) for address in place.addresses},
    {port: kind for kind, place in enumerate(PLACES, 1) for port in place.ports},
)

_TCP, _UDP, _ICMP, _ICMPV6 = 6, 17, 1, 58
_CARRIERS = {_TCP: "tcp", _UDP: "udp"}
_MAPPED = b"\0" * 10 + b"\xff\xff"
#: What a failure weighs where the first byte of an IPv4 address says it: the others hold networks of several kinds
#: (IANA IPv4 Special-Purpose Address Registry), or no machine's.
_BY_FIRST_BYTE = {"10": FAILED_NATS} | {
    str(byte): FAILED_PUBLIC_NATS for byte in range(1, 224) if byte not in (10, 100, 127, 169, 172, 192, 198, 203)}
_SPOTS = ("less than one new target in ten minutes", "neighbours on the same link that nobody answers for (ARP only)",
          "a scan that only tries what is known to answer", "UDP to one port of many machines from ever new sockets")

Target = bytes


class _Unit(NamedTuple):
    """Who is judged: a process where it is known, else one address in one network namespace.

    ``several`` are the known processes of an address that failed once or twice each: a loop that starts one for each
    attempt is a scan all the same.
    """

    source: bytes
    process: ProcessId | None
    several: bool = False

    @property
    def key(self) -> _Unit | bytes:
        """What the unit is known by: where nobody knows the process, what lies in a row says it all."""
        return self if self.process or self.several else self.source


class _Judged(NamedTuple):
    """An attempt that may still be answered, and what was added for it: nothing where its target was tried before."""

    unit: _Unit
    nats: float


class _Source(Tried):
    """What one unit tried."""

    __slots__ = ("addresses", "failed", "last_ns", "neighbours", "ports", "start_ns", "told", "told_failed",
                 "unheard")

    def __init__(self, start_ns: int, *, seed: int) -> None:  # noqa: ARG002 `Tried` takes the seed
        self.start_ns = start_ns
        self.last_ns = start_ns
        self.failed = 0
        self.told = 0.0
        self.told_failed = 0
        # Who tried more than these hold is at `NATS_MAX`, or was answered by most: what is forgotten of them, and among
        # `targets`, is new once more and weighs as such.
        self.addresses: BoundedTable[str, None] = BoundedTable(TARGETS_MAX)
        self.ports: BoundedTable[int, None] = BoundedTable(TARGETS_MAX)
        #: Links on which a port failed, with the port; of datagrams with the sender's as well.
        self.neighbours: BoundedTable[bytes, None] = BoundedTable(TARGETS_MAX)
        #: On how many ports of an address datagrams were not answered.
        self.unheard: BoundedTable[str, int] = BoundedTable(TARGETS_MAX)

    def add(self, nats: float) -> None:
        self.nats = min(max(0.0, self.nats + nats), NATS_MAX)

    def meet(self, kind: int) -> float:
        """Note that a place of this kind was tried, 0 being any other; return what that multiplies the weight by."""
        further = kind and self.kinds and not self.kinds >> kind & 1
        self.kinds |= bool(kind) << kind
        return FURTHER_KIND if further else 1.0

    def fail(self, flow: FlowId, target: Target) -> float:
        """Note a failure at a target that was not tried before; return what it adds."""
        if flow.protocol == _UDP:
            return self.fail_unheard(flow, target)
        address, port, link = flow.responder, flow.responder_port if flow.protocol == _TCP else 0, _link(target)
        again, neighbour = address in self.addresses, link in self.neighbours
        known_port, kind, swept_nats = port in self.ports, _PLACES.kind(target), _weight(address)
        self.addresses[address] = None
        self.ports[port] = None
        self.neighbours[link] = None
        self.failed += 1
        if kind or neighbour:
            nats = swept_nats
        elif again:
            nats = HANDED_OUT_NATS if port >= HANDED_OUT_MIN else swept_nats
        elif swept_nats == FAILED_NATS:
            nats = APART_NATS
        else:
            nats = APART_PUBLIC_NATS if known_port else APART_PUBLIC_NEW_PORT_NATS
        nats *= self.meet(kind)
        self.add(nats)
        return nats

    def fail_unheard(self, flow: FlowId, target: Target) -> float:
        """Note a datagram that nobody answered, as most are not meant to be; return what it adds.

        Only what scanners do weighs: one more port of a machine, or from one socket the same port of a neighbour.
        """
        neighbours = _link(target) + flow.initiator_port.to_bytes(2, "little")
        ports = self.unheard.get(flow.responder) or 0
        swept = ports >= UNHEARD_MIN or neighbours in self.neighbours
        self.unheard[flow.responder] = ports + 1
        self.neighbours[neighbours] = None
        if not swept:
            return 0.0
        self.addresses[flow.responder] = None
        self.ports[flow.responder_port] = None
        self.failed += 1
        nats = _weight(flow.responder)
        self.add(nats)
        return nats

    def known(self) -> str:
        """Return which places it tried that everybody knows, as the end of a sentence."""
        tried = [f"{place.name} ({place.attack})" for kind, place in enumerate(PLACES, 1) if self.kinds >> kind & 1]
        return f"; it tried {', '.join(tried)}" if tried else ""


class Detector:
    """Counts first contacts that failed, for each process or source."""

    takes = (Exchange, FlowUse, FlowClosed, FlowsClosed, FlowsUnanswered, Sockets, Tick)

    def __init__(self) -> None:
        # When the sockets of a namespace were last listed, and unanswered attempts that were not on a list yet.
        self._listed: BoundedTable[int, int] = BoundedTable(NAMESPACES_MAX)
        self._waiting: BoundedTable[FlowId, None] = BoundedTable(ATTEMPTS_MAX)
        self._judged: BoundedTable[FlowId, _Judged] = BoundedTable(ATTEMPTS_MAX)
        self._sources: BoundedTable[_Unit | bytes, _Source] = BoundedTable(SOURCES_MAX)
        # Addresses behind which something failed: what succeeds elsewhere is no business of ours. With the time at
        # which a process was last seen at it, 0 if none was.
        self._failing: BoundedTable[bytes, int] = BoundedTable(SOURCES_MAX)
        self._seed = 0

    def mix_by(self, seed: int) -> None:
        """Remember what is tried by this seed from now on."""
        self._seed = seed

    def evicted(self) -> dict[str, int]:
        """Return how much was forgotten because a table was full, by what it was."""
        return {"attempts before they were judged": self._waiting.evicted,
                "attempts that may yet be answered": self._judged.evicted,
                "sources of attempts": self._sources.evicted + self._failing.evicted,
                "namespaces that attempts are in": self._listed.evicted}

    def receive(self, item: Block | Observation, host: Host) -> list[Evidence]:
        """Return what an attempt that failed, or succeeded, adds."""
        match item:
            case FlowsUnanswered():
                return [one for closed in closed_flows(item.rows) if _is_attempt(closed)
                        for one in self._tried(closed.flow, item.time_ns, host)]
            case Exchange() | FlowUse():
                if item.flow in self._waiting or item.flow in self._judged:
                    self._answered(item.flow, host)
            case FlowClosed():
                return self._close(item, host)
            case FlowsClosed():
                return self._closed(item, host)
            case Sockets():
                self._listed.make_room(lambda listed_ns: item.time_ns - listed_ns > CLOSED_KEPT_NS)
                self._listed[item.netns] = item.time_ns
                return self._overdue(item.time_ns, host)
            case Tick():
                return self._overdue(item.time_ns, host)
            case _:
                pass
        return []

    def _closed(self, item: FlowsClosed, host: Host) -> list[Evidence]:
        """Take in the ends of dull flows: those in vain one by one, of which there are few but in a scan."""
        found: list[Evidence] = []
        # Where owners are known, it is looked up which process of an address was answered.
        owned = len(self._listed) or host.network.knows_diallers
        sources: dict[Any, Any] = self._failing.entries if owned else self._sources.entries
        at, rows = 0, item.rows
        while (at := succeed(rows, at, sources, _PLACES, ANSWERED_NATS, AGAIN_NATS)) < len(rows):
            found += self._close(next(closed_flows(rows[at:at + 1])), host, missed=bool(rows["missed"][at]))
            at += 1
        return found

    def _tried(self, flow: FlowId, time_ns: int, host: Host) -> list[Evidence]:
        """Judge an attempt that nobody answered in time, once the list of sockets had its chance to name its owner."""
        if not _weight(flow.responder) or _from_outside(flow, host):
            return []
        listed_ns = self._listed.get(flow.netns)
        if listed_ns is None or listed_ns >= flow.start_ns or not host.network.is_local(flow.netns, flow.initiator):
            return self._judge(flow, time_ns, host)
        self._waiting[flow] = None
        return []

    def _judge(self, flow: FlowId, time_ns: int, host: Host) -> list[Evidence]:
        unit = _unit(flow, host)
        nats, found = self._count(flow, unit, time_ns, host)
        self._judged[flow] = _Judged(unit, nats)
        return found

    def _count(self, flow: FlowId, unit: _Unit, time_ns: int, host: Host) -> tuple[float, list[Evidence]]:
        """Count a failure for its unit, and for all processes of its address together as long as this is a rare one.

        Return what it adds to the unit, and what is to be told.
        """
        nats = self._failed(flow, unit, time_ns)
        found = self._tell(flow, unit, time_ns, host) if nats else []
        if self._fails_rarely(unit) and self._failed(flow, _several(unit), time_ns):
            found += self._tell(flow, _several(unit), time_ns, host)
        return nats, found

    def _fails_rarely(self, unit: _Unit) -> bool:
        if unit.process is None:
            return False
        source = self._sources.get(unit.key)
        return source is None or source.failed < FAILED_OF_PROCESS_MIN

    def _answered(self, flow: FlowId, host: Host) -> None:
        self._waiting.pop(flow)
        if _source(flow) not in self._failing:
            return
        judged = self._judged.pop(flow) or _Judged(_unit(flow, host), 0.0)
        source = self._sources.get(judged.unit.key)
        if source and judged.nats:
            # It spoke late: what was held against it is taken back, and its success counts.
            source.failed -= 1
            source.add(ANSWERED_NATS - judged.nats)
        elif source:
            source.succeed(_target(flow), _PLACES, ANSWERED_NATS, AGAIN_NATS)
        several = self._sources.get(_several(judged.unit)) if self._fails_rarely(judged.unit) else None
        if several:
            several.succeed(_target(flow), _PLACES, ANSWERED_NATS, AGAIN_NATS)

    def _close(self, item: FlowClosed, host: Host, *, missed: bool = False) -> list[Evidence]:
        flow = item.flow
        silent = item.payload_bytes_initiator == 0 and item.payload_bytes_responder == 0
        if flow.protocol == _TCP:
            in_vain = silent and (item.reason != "closed" or item.packets <= REFUSED_PACKETS_MAX)
        elif flow.protocol in (_ICMP, _ICMPV6):
            in_vain = item.payload_bytes_responder == 0
        elif flow.protocol == _UDP and item.reason == "end" and item.payload_bytes_responder == 0:
            in_vain = True  # the capture ends before it would have been missed
        else:
            return []
        if not in_vain:
            self._answered(flow, host)
        elif self._judged.pop(flow) or (missed and flow not in self._waiting):
            pass  # counted when it was missed
        elif _is_attempt(item) and _weight(flow.responder) and not _from_outside(flow, host):
            self._waiting.pop(flow)
            return self._count(flow, _unit(flow, host), item.time_ns, host)[1]
        return []

    def _overdue(self, now_ns: int, host: Host) -> list[Evidence]:
        """Judge what waits for a list of sockets that came, or does not come."""
        found: list[Evidence] = []
        for flow in list(self._waiting.entries):
            if (self._listed.get(flow.netns) or 0) >= flow.start_ns or now_ns - flow.start_ns >= LISTED_WITHIN_NS:
                self._waiting.pop(flow)
                found += self._judge(flow, now_ns, host)
        return found

    def _of(self, unit: _Unit, tried_ns: int) -> _Source:
        source = self._sources.get(unit.key)
        if source is None or abs(tried_ns - source.last_ns) > FORGOTTEN_AFTER_NS:
            source = _Source(tried_ns, seed=self._seed)
            self._sources.make_room(lambda one: abs(tried_ns - one.last_ns) > FORGOTTEN_AFTER_NS)
        source.last_ns = max(source.last_ns, tried_ns)
        self._sources[unit.key] = source
        return source

    def _failed(self, flow: FlowId, unit: _Unit, time_ns: int) -> float:
        """Count a failure; return what it adds, nothing where its target was tried before."""
        source = self._of(unit, flow.start_ns)
        source.start_ns = min(source.start_ns, flow.start_ns)
        target = _target(flow)
        if target in source.targets:
            # Names, figures and logs are sent again whoever scans beside it.
            source.add(AGAIN_NATS if flow.protocol != _UDP else 0.0)
            return 0.0
        source.targets.put(target, 0)
        nats = source.fail(flow, target)
        if not nats:
            return 0.0
        seen_ns = self._failing.get(unit.source) or 0
        if unit.process is not None and source.failed >= FAILED_OF_PROCESS_MIN:
            seen_ns = time_ns
        self._failing[unit.source] = seen_ns
        return nats

    def _tell(self, flow: FlowId, unit: _Unit, time_ns: int, host: Host) -> list[Evidence]:
        """A process is told of as its weight grows; without one, the attempt at hand stands for all, at each doubling.

        So a scan of ten thousand addresses does not make ten thousand findings.
        """
        source = self._sources.get(unit.key)
        if source is None or source.nats < SUSPECT_NATS:
            return []
        seen_ns = self._failing.get(unit.source) or 0
        # Where a process was seen at it, what has no owner is most likely its. That is not certain enough to be added
        # to the process, and no other scan either.
        if unit.key == unit.source and seen_ns and time_ns - seen_ns < FORGOTTEN_AFTER_NS:
            return []
        subject: Subject = unit.process or flow
        change = source.nats - source.told if unit.process else source.nats
        grown = source.failed >= 2 * source.told_failed
        if change < 1.0 or not (grown or unit.process):
            return []
        source.told, source.told_failed = source.nats, source.failed
        ports = f"{source.ports.counted()} port{'s' if len(source.ports) != 1 else ''}"
        within_s = (source.last_ns - source.start_ns) / 1e9
        text = (f"{_name(flow, unit)} tried {source.failed} places in vain that it had not tried before, "
                f"on {source.addresses.counted()} addresses and {ports}, within {within_s:.0f} s{source.known()}"
                f"{_dialled(unit, host)}")
        return [Evidence(
            time_ns=time_ns,
            subject=subject,
            label="scan",
            evidence_class="network",
            kind="first-contacts-in-vain",
            nats=change,
            text=text,
            start_ns=source.start_ns,
            carrier=_CARRIERS.get(flow.protocol, "icmp"),
            blind_spots=_SPOTS,
        )]


def _is_attempt(closed: FlowClosed) -> bool:
    """Return whether a flow that nobody answered was opened; of datagrams, whether they look for a service.

    These are no stream, and not for a port that is handed out. Who calls has a port above the one that is called; peers
    have the same, and answers go the other way.
    """
    flow = closed.flow
    if flow.protocol != _UDP:
        return flow.initiator_known
    return closed.packets <= REFUSED_PACKETS_MAX and flow.responder_port < min(HANDED_OUT_MIN, flow.initiator_port)


def _from_outside(flow: FlowId, host: Host) -> bool:
    """Return whether this host was called from elsewhere; a container of its own that tries its ports is not."""
    network = host.network
    return network.is_inbound(flow) and not network.houses(flow.initiator) and network.who_dialled(flow) is None


def _unit(flow: FlowId, host: Host) -> _Unit:
    return _Unit(_source(flow), host.network.owner(flow))


def _several(unit: _Unit) -> _Unit:
    return _Unit(unit.source, None, several=True)


def _name(flow: FlowId, unit: _Unit) -> str:
    if unit.several:
        return f"processes of {flow.initiator} that tried once or twice each, taken as one,"
    return str(unit.process or flow.initiator)


def _dialled(unit: _Unit, host: Host) -> str:
    """Return what the kernel counted of a process, as the end of a sentence."""
    counted = host.network.dialled(unit.process) if unit.process else None
    return f"; of all its {counted.connections} connections {counted.in_vain} came to nothing" if counted else ""


def _source(flow: FlowId) -> bytes:
    """Return a namespace and an address as they lie in a row."""
    return flow.netns.to_bytes(8, "little", signed=True) + address_bytes(flow.initiator)


def _target(flow: FlowId) -> Target:
    """Return what was tried; an echo's identifier is the sender's own and no part of it."""
    port = flow.responder_port if flow.protocol in (_TCP, _UDP) else 0
    return address_bytes(flow.responder) + port.to_bytes(2, "little") + bytes([flow.protocol])


def _link(target: Target) -> bytes:
    """Return the link that a target is on, as far as addresses tell (/24, /64), with its port and protocol."""
    return (target[:15] if target.startswith(_MAPPED) else target[:8]) + target[16:]


def _weight(address: str) -> float:
    """Return what a failure at an address weighs in a sweep, 0 if it is no machine's: a group's, or everybody's."""
    return _BY_FIRST_BYTE.get(address.partition(".")[0]) or _weight_of(address)


@lru_cache(maxsize=4096)
def _weight_of(address: str) -> float:
    one = ipaddress.ip_address(address)
    if one.is_multicast or one.is_unspecified or one.is_loopback or address == "255.255.255.255":
        return 0.0
    return FAILED_PUBLIC_NATS if one.is_global else FAILED_NATS
