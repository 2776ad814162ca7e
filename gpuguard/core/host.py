"""The world as the records tell it: processes and their ancestry, sockets and their owners, kernels and their names.

Detectors ask it; it concludes nothing about guilt. Every table is bounded: the oldest entry leaves, and is counted.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import TYPE_CHECKING, Generic, Literal, NamedTuple, TypeVar

from gpuguard.core.events import ProcessBrief
from gpuguard.core.flows import address_bytes
from gpuguard.core.records import (
    CONNECT,
    Connects,
    Device,
    DeviceSample,
    HostInfo,
    KernelName,
    ModuleImage,
    Packets,
    ProcessExited,
    ProcessSample,
    ProcessStarted,
    Socket,
    Sockets,
    Tick,
)
from gpuguard.core.subjects import Context, FlowId, ProcessId, context_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from gpuguard.core.records import Block

K = TypeVar("K")
V = TypeVar("V")

PROCESSES_MAX = 32_768
ENDED_MAX = 8_192
SOCKETS_MAX = 32_768
NAMERS_MAX = 1_024
KERNELS_MAX = 65_536
SAMPLES_MAX = 4_096
#: Of a longer line the nearest are looked up and the eldest were inherited: whoever forks deeper is not rid of the
#: agent that he is below, only of some between.
ANCESTORS_MAX, ELDEST_MAX = 64, 32
IMAGES_MAX = 256
NAMESPACES_MAX = 256
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
#: Processes, eldest first, each the parent of the next.
Line = tuple[ProcessId, ...]

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


class BoundedTable(Generic[K, V]):
    """A dict that forgets its oldest entry when full, and counts what it forgot."""

    def __init__(self, size_max: int) -> None:
        self._entries: OrderedDict[K, V] = OrderedDict()
        self._size_max = size_max
        self.evicted = 0

    def __setitem__(self, key: K, value: V) -> None:
        self._entries[key] = value
        self._entries.move_to_end(key)
        while len(self._entries) > self._size_max:
            self._entries.popitem(last=False)
            self.evicted += 1

    def __contains__(self, key: K) -> bool:
        return key in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def make_room(self, is_over: Callable[[V], bool]) -> None:
        """Remove the oldest entry of a full table if its time is over, and so nothing is lost that is to be counted."""
        if len(self._entries) == self._size_max and is_over(next(iter(self._entries.values()))):
            self._entries.popitem(last=False)

    def counted(self) -> str:
        """Return how many entries there were, in words: where some were forgotten, who knows how many came again."""
        return f"at least {len(self)}" if self.evicted else str(len(self))

    def get(self, key: K) -> V | None:
        """Return the entry, None if there is none."""
        return self._entries.get(key)

    def pop(self, key: K) -> V | None:
        """Remove the entry and return it, None if there was none."""
        return self._entries.pop(key, None)

    @property
    def entries(self) -> dict[K, V]:
        """All entries as they lie here, to be looked into by compiled code and changed by nobody."""
        return self._entries

    @property
    def oldest(self) -> tuple[K, V] | None:
        """The entry that would leave first, None if there is none."""
        return next(iter(self._entries.items()), None)

    def values(self) -> list[V]:
        """Return all entries, oldest first."""
        return list(self._entries.values())


class Host:
    """Everything that the records said of this host so far."""

    def __init__(self) -> None:
        self.info: HostInfo | None = None
        self.now_ns = 0
        #: The kernel tells here who dials.
        self.knows_diallers = False
        self.processes: BoundedTable[ProcessId, ProcessStarted] = BoundedTable(PROCESSES_MAX)
        #: Never full: whoever ended is forgotten within a minute, and of more than half as many at once (see `guard`).
        self.exited: BoundedTable[ProcessId, ProcessExited] = BoundedTable(PROCESSES_MAX)
        self.devices: BoundedTable[str, Device] = BoundedTable(SAMPLES_MAX)
        self.device_samples: BoundedTable[str, DeviceSample] = BoundedTable(SAMPLES_MAX)
        self.process_samples: BoundedTable[tuple[ProcessId, str], ProcessSample] = BoundedTable(SAMPLES_MAX)
        #: Of processes that run, so not full before `processes` is, which has them and those that just ended.
        self._current: BoundedTable[int, ProcessId] = BoundedTable(PROCESSES_MAX)
        self._sockets: BoundedTable[SocketKey, tuple[int, Socket]] = BoundedTable(SOCKETS_MAX)
        #: What was owned in each namespace when it was last listed. Containers come and go.
        self._owned: BoundedTable[int, tuple[int, dict[ProcessId, list[Socket]]]] = BoundedTable(NAMESPACES_MAX)
        #: Addresses, and ports that listened, with when they were last listed: of every container of a day.
        self._local: BoundedTable[tuple[int, str], int] = BoundedTable(SOCKETS_MAX)
        self._listening: BoundedTable[tuple[int, int, int], int] = BoundedTable(SOCKETS_MAX)
        self._dials: BoundedTable[bytes, tuple[Dial, ...]] = BoundedTable(DIALS_MAX)
        self._dialled: BoundedTable[ProcessId, Dialled] = BoundedTable(PROCESSES_MAX)
        #: What is forgotten here is looked for again, among dials and sockets; what was told of its flow stays.
        self._flow_owner: BoundedTable[FlowId, ProcessId] = BoundedTable(SOCKETS_MAX)
        self._kernels: BoundedTable[ProcessId, dict[int, KernelName]] = BoundedTable(NAMERS_MAX)
        self._names_evicted = 0
        #: Nearly all that ran fills it in the end. Whoever outlives a parent by so many others is judged all the same,
        #: and no longer has what it inherited.
        self._ended: BoundedTable[ProcessId, tuple[ProcessId | None, Context, Line]] = BoundedTable(ENDED_MAX)
        #: The eldest of those that each process is below, itself among them if they are few. As full as `processes`.
        self._lines: BoundedTable[ProcessId, Line] = BoundedTable(PROCESSES_MAX)
        self._images: BoundedTable[ProcessId, deque[ModuleImage]] = BoundedTable(PROCESSES_MAX)

    def receive(self, item: Block) -> None:
        """Take one record in; of what it has no use for, it takes the time."""
        self.now_ns = max(self.now_ns, item.time_ns)
        match item:
            case Packets() | Tick():
                pass  # most blocks: not compared with all others first
            case ProcessStarted():
                self.processes[item.process] = item
                self._current[item.process.pid] = item.process
                above = self._line(item.parent, item.process)
                self._lines[item.process] = above if len(above) == ELDEST_MAX else (*above, item.process)
            case ProcessExited():
                self._exit(item)
            case Sockets():
                self._take_sockets(item)
            case Connects():
                self._take_connects(item)
            case KernelName():
                self._take_name(item)
            case ModuleImage():
                held = self._images.get(item.process)
                self._images[item.process] = deque([*(held or ()), item], maxlen=IMAGES_MAX)
            case Device():
                self.devices[item.uuid] = item
            case DeviceSample():
                self.device_samples[item.uuid] = item
            case ProcessSample():
                self.process_samples[item.process, item.uuid] = item
            case HostInfo():
                self.info = item
            case _:
                pass

    def process(self, pid: int) -> ProcessId | None:
        """Return the process that has this pid now, None if none is known."""
        return self._current.get(pid)

    def ancestors(self, process: ProcessId) -> tuple[ProcessId, ...]:
        """Return the known ancestors, nearest first. A parent that started later than its child is a reused pid."""
        found: list[ProcessId] = []
        below, parent = process, self.parent(process)
        while parent and len(found) < ANCESTORS_MAX and parent not in found:
            if parent.start_ticks > below.start_ticks:
                return tuple(found)
            found.append(parent)
            below, parent = parent, self.parent(parent)
        line = self._line(self.parent(process), process)
        if line and found[-1] != line[0]:
            found += [one for one in dict.fromkeys(reversed(line)) if one not in found]
        return tuple(found)

    def parent(self, process: ProcessId) -> ProcessId | None:
        """Return who started the process, None if that is not known."""
        return self._origin(process)[0]

    def context(self, process: ProcessId) -> Context:
        """Return what the process belongs to; what it does not say itself is taken from its nearest ancestor."""
        merged = Context()
        for one in (process, *self.ancestors(process)):
            merged = _merge(merged, self._origin(one)[1])
        return merged

    def own_context(self, process: ProcessId) -> Context:
        """Return what the process itself says it belongs to."""
        return self._origin(process)[1]

    def brief(self, process: ProcessId) -> ProcessBrief:
        """Return what to show of a process."""
        started = self.processes.get(process)
        if started is None:
            return ProcessBrief(process=process, name="", argv=(), user="", cgroup="", cgroup_id=0, context=Context())
        return ProcessBrief(
            process=process,
            name=started.name,
            argv=started.argv,
            user=started.user,
            cgroup=started.cgroup,
            cgroup_id=started.cgroup_id,
            context=self.context(process),
            ancestors=self.ancestors(process),
            executable=started.executable,
        )

    def kernel_name(self, process: ProcessId, kernel: int) -> KernelName | None:
        """Return what the process called this kernel handle, None if it was looked up before we watched."""
        names = self._kernels.get(process)
        return names.get(kernel) if names else None

    def images(self, process: ProcessId) -> deque[ModuleImage]:
        """Return the GPU code that the process was seen to load, oldest first."""
        return self._images.get(process) or deque()

    def is_local(self, netns: int, address: str) -> bool:
        """Return whether the address is one of this host's, as its sockets and the host record say."""
        if address.startswith("127.") or address == "::1":
            return True
        if self.info and address in self.info.addresses:
            return True
        return (netns, address) in self._local

    def is_inbound(self, flow: FlowId) -> bool:
        """Return whether a flow was opened from elsewhere to this host: what its initiator does is not done here."""
        return self.is_local(flow.netns, flow.responder) and not self.is_local(flow.netns, flow.initiator)

    def dialled_out(self, flow: FlowId) -> bool:
        """Return whether a flow was seen to begin, and leads elsewhere."""
        return flow.initiator_known and not self.is_local(flow.netns, flow.responder)

    def houses(self, address: str) -> bool:
        """Return whether an address is one of this host's in any of its namespaces: a container's is."""
        return any((netns, address) in self._local for netns in self._owned.entries)

    def dialler(self, flow: FlowId) -> Literal["initiator", "responder"] | None:
        """Return which end of a flow this host dialled from, None if it was called, or that is not certain.

        Where the opening was not seen its sockets tell: one whose port was ever seen to listen was accepted, and one
        with a port that Linux gives to outgoing connections was dialled, unless its listener ended before we looked.
        """
        if flow.initiator_known:
            return None if self.is_inbound(flow) else "initiator"
        near = self._sockets.get(_key(flow, initiator=True)) is not None
        far = self._sockets.get(_key(flow, initiator=False)) is not None
        port = flow.initiator_port if near else flow.responder_port
        if near == far or port < EPHEMERAL_PORT_MIN or (flow.netns, flow.protocol, port) in self._listening:
            return None
        return "initiator" if near else "responder"

    def socket(self, flow: FlowId, *, initiator: bool) -> Socket | None:
        """Return the socket of one end of a flow, None if it was not seen since the flow began."""
        seen_ns, socket = self._sockets.get(_key(flow, initiator=initiator)) or (0, None)
        # A list that is older than the flow shows whoever had these ends before: ports are used again.
        return socket if seen_ns >= flow.start_ns else None

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
        if known is None or self.has_ended(known):
            socket = self.socket(flow, initiator=True) or self.socket(flow, initiator=False) or self._carried(flow)
            holder = self._head(socket.owners) if socket else None
            owner = holder if known is None or (holder and self._are_related(known, holder)) else known
        if owner:
            self._flow_owner[flow] = owner
        return owner

    def dialled(self, process: ProcessId) -> Dialled | None:
        """Return how many connections a process dialled, None where nobody counts, or it dialled none."""
        return self._dialled.get(process)

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

    def _are_related(self, one: ProcessId, other: ProcessId) -> bool:
        return one in self.ancestors(other) or other in self.ancestors(one)

    def _carried(self, flow: FlowId) -> Socket | None:
        """Return the initiator's socket of a flow that its namespace only carries: one other namespace alone has it.

        So a container's connections are named where its bridge is watched, before their addresses are translated.
        """
        if self.is_local(flow.netns, flow.initiator) or self.is_local(flow.netns, flow.responder):
            return None
        ends = _key(flow, initiator=True)[1:]
        seen = [self._sockets.get((netns, *ends)) for netns in self._owned.entries if netns != flow.netns]
        found = [one[1] for one in seen if one and one[0] >= flow.start_ns]
        return found[0] if len(found) == 1 else None

    def sockets_of(self, process: ProcessId) -> list[tuple[int, Socket]]:
        """Return (netns, socket) of every socket that the process owned when its namespace was last looked at."""
        return [(netns, socket) for netns, (_, owned) in self._owned.entries.items()
                for socket in owned.get(process, ())]

    def forget(self, process: ProcessId) -> None:
        """Drop a process that is long gone, but for what its children inherited from it."""
        self._ended[process] = (*self._origin(process), self._lines.pop(process) or ())
        self.exited.pop(process)
        self.processes.pop(process)
        self._dialled.pop(process)
        self._images.pop(process)
        self._kernels.pop(process)
        for device in self.devices.values():
            self.process_samples.pop((process, device.uuid))

    def has_ended(self, process: ProcessId) -> bool:
        """Return whether the process is known to have ended, be it that another has its pid now."""
        now = self._current.get(process.pid)
        return process in self.exited or process in self._ended or (now is not None and now != process)

    def evicted(self) -> dict[str, int]:
        """Return how many entries left because their table was full, by what they are, since the beginning."""
        return {
            "processes": self.processes.evicted,
            "devices": self.devices.evicted + self.device_samples.evicted,
            "sockets": self._sockets.evicted,
            "sockets' namespaces": self._owned.evicted,
            "addresses of this host": self._local.evicted,
            "ports that listened": self._listening.evicted,
            "dials": self._dials.evicted,
            "counts of dials": self._dialled.evicted,
            "processes' kernel names": self._kernels.evicted,
            "kernel names": self._names_evicted,
            "processes' GPU code": self._images.evicted,
            "samples of processes": self.process_samples.evicted,
        }

    def _origin(self, process: ProcessId) -> tuple[ProcessId | None, Context]:
        """Return the parent of a process and what its own cgroup and environment say."""
        started = self.processes.get(process)
        if started:
            return started.parent, context_of(started.cgroup, started.environ)
        parent, context, _ = self._ended.get(process) or (None, Context(), ())
        return parent, context

    def _line(self, parent: ProcessId | None, child: ProcessId) -> Line:
        """Return the eldest that a parent is below, or is itself, if it is the child's and no later user of its pid."""
        if parent is None or parent.start_ticks > child.start_ticks:
            return ()
        _, _, ended = self._ended.get(parent) or (None, None, ())
        return self._lines.get(parent) or ended or (parent,)

    def _head(self, owners: tuple[ProcessId, ...]) -> ProcessId | None:
        if len(owners) == 1:
            return owners[0]
        for one in owners:
            others = [other for other in owners if other != one]
            if others and all(one in self.ancestors(other) for other in others):
                return one
        return None

    def _take_name(self, item: KernelName) -> None:
        """Keep a kernel's name. When there are too many, whoever has most loses his oldest, and nobody else."""
        names = self._kernels.get(item.process) or {}
        names[item.kernel] = item
        self._kernels[item.process] = names
        held = self._kernels.values()
        if sum(map(len, held)) > KERNELS_MAX:
            most = max(held, key=len)
            del most[next(iter(most))]
            self._names_evicted += 1

    def _take_sockets(self, seen: Sockets) -> None:
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
            kept = socket if before is None or before.inode != socket.inode or socket.owners else before
            self._sockets.make_room(lambda listed: seen.time_ns - listed[0] > CLOSED_KEPT_NS)
            self._sockets[key] = (seen.time_ns, kept)
        self._owned.make_room(lambda listed: seen.time_ns - listed[0] > CLOSED_KEPT_NS)
        self._owned[seen.netns] = (seen.time_ns, owned)

    def _take_connects(self, seen: Connects) -> None:
        """Keep who dialled, by the ends as they lie in a row; the last row of a process has its count."""
        self.knows_diallers = True
        boot_id = self.info.boot_id if self.info else ""
        processes: dict[tuple[int, int], ProcessId] = {}
        raw, size = seen.rows.tobytes(), CONNECT.itemsize
        columns = ("time_ns", "waited_us", "netns", "pid", "start_ticks", "dialled", "in_vain", "withheld", "state")
        for at, row in enumerate(zip(*(seen.rows[name].tolist() for name in columns), strict=True)):
            time_ns, waited_us, netns, pid, start_ticks, dialled, in_vain, withheld, state = row
            process = processes.get((pid, start_ticks))
            if process is None:
                process = processes[pid, start_ticks] = ProcessId(boot_id, pid, start_ticks)
            self._dialled[process] = Dialled(dialled, in_vain, withheld)
            if state:
                ends = raw[at * size + _ENDS_AT:(at + 1) * size]
                before = self._dials.get(ends) or ()
                dial = Dial(time_ns, time_ns + waited_us * 1000, netns, process)
                self._dials[ends] = (*before, dial)[-DIALS_OF_ENDS_MAX:]
        # One that is further ahead is of before the clock was set back.
        while (oldest := self._dials.oldest) and abs(seen.time_ns - oldest[1][-1].answered_ns) > DIALS_KEPT_NS:
            self._dials.pop(oldest[0])

    def _exit(self, gone: ProcessExited) -> None:
        self.exited[gone.process] = gone
        if self._current.get(gone.process.pid) == gone.process:
            self._current.pop(gone.process.pid)


def _key(flow: FlowId, *, initiator: bool) -> SocketKey:
    near, far = (flow.initiator, flow.initiator_port), (flow.responder, flow.responder_port)
    local, remote = (near, far) if initiator else (far, near)
    return (flow.netns, flow.protocol, *local, *remote)


def _ends(flow: FlowId) -> bytes:
    """Return the ends of a flow as they lie in a row of CONNECT that its initiator dialled."""
    ports = flow.initiator_port.to_bytes(2, "little") + flow.responder_port.to_bytes(2, "little")
    return address_bytes(flow.initiator) + address_bytes(flow.responder) + ports + bytes([flow.protocol])


def _merge(near: Context, far: Context) -> Context:
    """Return ``near`` with its empty fields taken from ``far``; a span is only meaningful with its own trace."""
    trace = near if near.trace_id else far
    return Context(
        container_id=near.container_id or far.container_id,
        pod_uid=near.pod_uid or far.pod_uid,
        slurm_job_id=near.slurm_job_id or far.slurm_job_id,
        sandbox_id=near.sandbox_id or far.sandbox_id,
        trace_id=trace.trace_id,
        span_id=trace.span_id,
    )
