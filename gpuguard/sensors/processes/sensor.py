"""From events to records: who was started, by whom, and when it ended.

A forked process that never executes anything matters as a link between others and as an owner of sockets: it is read
a moment after its fork, or named when it dials or a descendant of it is.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import TYPE_CHECKING, NamedTuple, Protocol

import msgspec

from gpuguard.core.records import Block, Connects, Gap, ProcessExited, ProcessStarted
from gpuguard.core.subjects import ProcessId
from gpuguard.messages import Answer, Found, ListProcesses, ReadProcess, Refused, Request
from gpuguard.sensors import is_due
from gpuguard.sensors.processes.events import EVENTS_MAX, Event, Kind

if TYPE_CHECKING:
    import numpy as np

    from gpuguard.sensors.processes.connects import Connections
    from gpuguard.sensors.processes.events import Source

NAME = "processes"
FORKS_MAX = 8192
SETTLE_NS = 50_000_000
#: As long as the guard's own tick, so that both wake it once.
SETTLE_PERIOD_NS = 250_000_000
USERS_MAX = 4096
#: What could not be read of single processes is told at most this often, with its count.
UNREAD_PERIOD_NS = 10_000_000_000


class Broker(Protocol):
    """What this sensor needs of the broker's client."""

    def ask(self, request: Request) -> tuple[Answer, tuple[int, ...]]:
        """Send one request and return its answer with the descriptors beside it."""
        ...


class _Known(NamedTuple):
    """A process that a record named, and its parent at the fork: after that parent's end /proc names another."""

    process: ProcessId
    parent: ProcessId | None


class ProcessSensor:
    """Turns events into records: `ProcessStarted` at each exec and for each fork that lasts, `ProcessExited`.

    And `Connects`, where ``connects`` hears who dials.
    """

    name = NAME

    def __init__(self, broker: Broker, source: Source, mode: str, poll_interval_ns: int,
                 connects: Connections | None = None) -> None:
        self._broker = broker
        self._source = source
        self._connects = connects
        self._polls = mode.startswith("polling")
        self.mode = mode
        self.descriptor = source.descriptor
        self.period_ns: int | None = poll_interval_ns if self._polls else SETTLE_PERIOD_NS
        self._boot_id = ""
        self._users: dict[int, str] = {}
        self._known: dict[int, _Known] = {}
        self._born: OrderedDict[int, Event] = OrderedDict()
        #: Ends of those born here that no record named yet: a connection or a child may still call for one.
        self._over: OrderedDict[int, Event] = OrderedDict()
        self._settling: deque[Event] = deque(maxlen=FORKS_MAX)
        self._ending: dict[int, Event] = {}
        self._must_list = True
        self._unread: dict[str, int] = {}
        self._unread_told_ns = 0
        self._told_limits = False

    def read(self, now_ns: int) -> list[Block]:
        """Return what started and ended since the last call."""
        blocks = self._limits(now_ns)
        try:
            # First: whoever dialled was forked before, and ends later, so his end is not taken before his dial.
            dialled, undialled = self._connects.read() if self._connects else (None, 0)
            events, lost = self._source.events()
        except OSError as error:
            return [*blocks, Gap(now_ns, NAME, f"process events: {error}", since_ns=now_ns)]
        if lost is None or lost > 0:
            blocks.append(Gap(now_ns, NAME, "more process events than could be kept: listing anew", lost=lost))
        if self._must_list or self._polls:
            blocks += self._list(now_ns)
        blocks += self._take_all(events, _diallers(dialled))
        if undialled:
            blocks.append(Gap(now_ns, NAME, "more connections than could be kept: who dialled them is not told",
                              lost=undialled))
        if dialled is not None and len(dialled):
            blocks.append(Connects(now_ns, dialled))
        if lost != 0:
            # After the events: whose end was lost is known by now, and missing from the list.
            blocks += self._list(now_ns)
        return blocks + self._settle(now_ns) + self._unread_gaps(now_ns)

    def close(self) -> None:
        """Give every handle back."""
        self._source.close()
        if self._connects:
            self._connects.close()
        self.descriptor = None

    def _limits(self, now_ns: int) -> list[Block]:
        """Tell once what the source of events cannot see at all."""
        told, self._told_limits = self._told_limits, True
        blocks: list[Block] = []
        if self._polls and not told:
            period_ms = (self.period_ns or 0) // 1_000_000
            blocks.append(Gap(now_ns, NAME, f"{self.mode}: processes that live less than {period_ms} ms are not seen, "
                                            "nor how any of them ended", since_ns=now_ns))
        if self._connects is None and not told:
            blocks.append(Gap(now_ns, NAME, f"{self.mode}: whose a connection was is not told where it is over before "
                                            "the sockets are listed", since_ns=now_ns))
        return blocks

    def _unread_gaps(self, now_ns: int) -> list[Block]:
        if not self._unread or not is_due(now_ns, self._unread_told_ns, UNREAD_PERIOD_NS):
            return []
        gaps: list[Block] = [Gap(now_ns, NAME, reason, lost=count) for reason, count in self._unread.items()]
        self._unread.clear()
        self._unread_told_ns = now_ns
        return gaps

    # -- listing ------------------------------------------------------------------------------------------------------

    def _list(self, now_ns: int) -> list[Block]:
        """Compare /proc with what is known; only who was known before the listing began can be missing from it."""
        before = dict(self._known)
        listed: dict[int, ProcessStarted] = {}
        after_pid = 0
        while True:
            answer, _ = self._broker.ask(ListProcesses(after_pid))
            if not isinstance(answer, Found):
                return [Gap(now_ns, NAME, f"listing processes: {why(answer)}", since_ns=now_ns)]
            listed.update({found.process.pid: found for found in answer.processes})
            if answer.more <= after_pid:
                break
            after_pid = answer.more
        self._must_list = False
        gone = [one.process for pid, one in before.items() if pid not in listed or listed[pid].process != one.process]
        blocks: list[Block] = [ProcessExited(now_ns, one) for one in gone]
        for one in gone:
            self._known.pop(one.pid, None)
        # Parents before their children, so that a reader finds each ancestor when it meets the child.
        for found in sorted(listed.values(), key=lambda found: (found.process.start_ticks, found.process.pid)):
            if not self._knows(found.process):
                blocks += self._emit(found)
        return blocks

    # -- events -------------------------------------------------------------------------------------------------------

    def _take_all(self, events: list[Event], dialling: set[tuple[int, int]]) -> list[Block]:
        """Take events in; whoever of ``dialling``, (pid, start), forked and ran nothing is named before his end."""
        blocks: list[Block] = []
        for pid, start_ticks in sorted(dialling):
            blocks += self._name_fork(pid, start_ticks)
        for event in events:
            blocks += self._take(event)
            if event.kind == Kind.FORK and (event.pid, event.start_ticks) in dialling:
                blocks += self._name_fork(event.pid, event.start_ticks or 0)
        return blocks

    def _take(self, event: Event) -> list[Block]:
        match event.kind:
            case Kind.FORK:
                if event.start_ticks is not None and self._knows(self._id(event)):
                    return []
                self._born[event.pid] = event
                self._born.move_to_end(event.pid)
                if len(self._born) > FORKS_MAX:
                    self._born.popitem(last=False)
                self._settling.append(event)
                return []
            case Kind.EXEC:
                return self._start(event)
            case Kind.EXIT:
                return self._end(event)

    def _start(self, event: Event) -> list[Block]:
        found = self._ask(event.pid)
        if found and event.start_ticks in (None, found.process.start_ticks):
            return self._emit(msgspec.structs.replace(found, time_ns=event.time_ns, argv=found.argv or event.argv))
        if event.start_ticks is None:
            self._count("processes gone before they could be read; this source does not say when they started")
            return []
        self._count("processes gone before their environment and cgroup path could be read; the rest is known")
        return self._emit(self._bare(event))

    def _count(self, reason: str) -> None:
        self._unread[reason] = self._unread.get(reason, 0) + 1

    def _knows(self, process: ProcessId) -> bool:
        known = self._known.get(process.pid)
        return known is not None and known.process == process

    def _id(self, event: Event) -> ProcessId:
        return ProcessId(self._boot_id, event.pid, event.start_ticks or 0)

    def _bare(self, event: Event) -> ProcessStarted:
        """What the event alone says of a process that is gone by now."""
        return ProcessStarted(
            time_ns=event.time_ns,
            process=self._id(event),
            parent=self._parent(event),
            name=event.name,
            argv=event.argv,
            uid=event.uid,
            user=self._users.get(event.uid, ""),
            cgroup_id=event.cgroup_id,
            netns=event.netns,
        )

    def _parent(self, event: Event) -> ProcessId | None:
        if not event.parent_pid:
            return None
        if event.parent_start_ticks is not None:
            return ProcessId(self._boot_id, event.parent_pid, event.parent_start_ticks)
        known = self._known.get(event.parent_pid)
        return known.process if known else None

    def _emit(self, started: ProcessStarted) -> list[Block]:
        """Return the record, its parent as it was at the fork, after those of ancestors that no record named yet."""
        process = started.process
        self._boot_id = self._boot_id or process.boot_id
        if started.user and len(self._users) < USERS_MAX:
            self._users[started.uid] = started.user
        known, born = self._known.get(process.pid), self._born.pop(process.pid, None)
        if known and known.process == process:
            started = msgspec.structs.replace(started, parent=known.parent)
        elif born and born.start_ticks in (None, process.start_ticks):
            started = msgspec.structs.replace(started, parent=self._parent(born) or started.parent)
        self._known[process.pid] = _Known(process, started.parent)
        return [*self._ancestors(started.parent), started]

    def _ancestors(self, parent: ProcessId | None) -> list[Block]:
        """Return records of the parent and its ancestors as far as they forked, ran nothing, and have none yet.

        Each fork is told once, so however deep they are, they cost no more than they are.
        """
        blocks: list[list[Block]] = []
        while parent:
            born = self._born.get(parent.pid)
            if born is None or born.start_ticks != parent.start_ticks:
                break
            bare = self._bare(self._born.pop(parent.pid))
            self._known.setdefault(parent.pid, _Known(parent, bare.parent))
            blocks.append([bare, *self._end_before(parent)])
            parent = bare.parent
        return [block for told in reversed(blocks) for block in told]

    def _name_fork(self, pid: int, start_ticks: int) -> list[Block]:
        """Return the record of a forked process that has none yet, from what it was at its fork if it is gone."""
        born = self._born.get(pid)
        if born is None or born.start_ticks != start_ticks:
            return []
        found = self._ask(pid)
        if found and found.process.start_ticks == start_ticks:
            return self._emit(msgspec.structs.replace(found, time_ns=born.time_ns))
        return [*self._emit(self._bare(born)), *self._end_before(self._id(born))]

    def _end_before(self, process: ProcessId) -> list[Block]:
        """Return the end of a process that is named only now, where that was before: nobody else tells of it."""
        over = self._over.pop(process.pid, None)
        return self._end(over) if over and over.start_ticks == process.start_ticks else []

    def _end(self, event: Event) -> list[Block]:
        known = self._known.get(event.pid)
        if not event.whole:
            return self._end_thread(event) if known else []
        if known is None or event.start_ticks not in (None, known.process.start_ticks):
            if event.pid in self._born:
                self._over[event.pid] = event
            if len(self._over) > FORKS_MAX:
                self._over.popitem(last=False)
            return []
        del self._known[event.pid]
        return [ProcessExited(event.time_ns, known.process, event.exit_status)]

    def _end_thread(self, event: Event) -> list[Block]:
        """A thread of the connector ended: the process did if its first thread did too and nothing runs any more."""
        before = self._ending.get(event.pid)
        if event.exit_status is None and before is None:
            return []
        status = event.exit_status if event.exit_status is not None else before.exit_status if before else None
        self._ending[event.pid] = event._replace(exit_status=status)
        return self._end_if_gone(event.pid)

    def _end_if_gone(self, pid: int) -> list[Block]:
        known, found = self._known.get(pid), self._ask(pid)
        if known and found and found.process == known.process:
            return []
        event = self._ending.pop(pid)
        return self._end(event._replace(whole=True))

    def _settle(self, now_ns: int) -> list[Block]:
        """Read the forks that lasted, and end the processes whose first thread went before the others."""
        blocks: list[Block] = []
        for pid in list(self._ending):
            blocks += self._end_if_gone(pid)
        for _ in range(min(len(self._settling), EVENTS_MAX)):
            # One that is further ahead is of before the clock was set back.
            if abs(self._settling[0].time_ns - now_ns) < SETTLE_NS:
                break
            event = self._settling.popleft()
            if self._born.get(event.pid) is not event:
                continue
            found = self._ask(event.pid)
            if found and event.start_ticks in (None, found.process.start_ticks):
                blocks += self._emit(msgspec.structs.replace(found, time_ns=event.time_ns))
        return blocks

    def _ask(self, pid: int) -> ProcessStarted | None:
        answer, _ = self._broker.ask(ReadProcess(pid))
        return answer.processes[0] if isinstance(answer, Found) and answer.processes else None


def _diallers(rows: np.ndarray | None) -> set[tuple[int, int]]:
    """Return (pid, start) of whoever dialled."""
    if rows is None or not len(rows):
        return set()
    return set(zip(rows["pid"].tolist(), rows["start_ticks"].tolist(), strict=True))


def why(answer: Answer) -> str:
    """Return the broker's reason in words."""
    return answer.reason if isinstance(answer, Refused) else f"the broker answered {type(answer).__name__}"
