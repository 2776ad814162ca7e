"""Who runs on this host, below whom, and for whom: processes, their ancestry, and what they belong to.

A process that ended is remembered for what its children inherited from it: a shell's child outlives the shell, and is
still the agent's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gpuguard.core.bounded import BoundedTable
from gpuguard.core.events import ProcessBrief
from gpuguard.core.subjects import NO_CONTEXT, Context, ProcessId, context_of

if TYPE_CHECKING:
    from gpuguard.core.records import ProcessExited, ProcessStarted

PROCESSES_MAX = 32_768
ENDED_MAX = 8_192
#: Of a longer line the nearest are looked up and the eldest were inherited: whoever forks deeper is not rid of the
#: agent that he is below, only of some between.
ANCESTORS_MAX, ELDEST_MAX = 64, 32

#: Processes, each the parent of the next or of the one before.
Line = tuple[ProcessId, ...]


class Processes:
    """Everybody who was heard to start, until a while after he was heard to end."""

    def __init__(self) -> None:
        #: The boot that the records are of.
        self.boot_id = ""
        self.started: BoundedTable[ProcessId, ProcessStarted] = BoundedTable(PROCESSES_MAX)
        #: Never full: whoever ended is forgotten within a minute, and of more than half as many at once (see `guard`).
        self.exited: BoundedTable[ProcessId, ProcessExited] = BoundedTable(PROCESSES_MAX)
        #: Of processes that run, so not full before `started` is, which has them and those that just ended.
        self._current: BoundedTable[int, ProcessId] = BoundedTable(PROCESSES_MAX)
        #: Nearly all that ran fills it in the end. Whoever outlives a parent by so many others is judged all the same,
        #: and no longer has what it inherited.
        self._ended: BoundedTable[ProcessId, tuple[ProcessId | None, Context, Line]] = BoundedTable(ENDED_MAX)
        #: The eldest of those that each process is below, itself among them if they are few. As full as `started`.
        self._lines: BoundedTable[ProcessId, Line] = BoundedTable(PROCESSES_MAX)

    def start(self, item: ProcessStarted) -> None:
        """Take in that a process runs."""
        self.started[item.process] = item
        self._current[item.process.pid] = item.process
        above = self._line(item.parent, item.process)
        self._lines[item.process] = above if len(above) == ELDEST_MAX else (*above, item.process)

    def exit(self, gone: ProcessExited) -> None:
        """Take in that a process ended."""
        self.exited[gone.process] = gone
        if self._current.get(gone.process.pid) == gone.process:
            self._current.pop(gone.process.pid)

    def forget(self, process: ProcessId) -> None:
        """Drop a process that is long gone, but for what its children inherited from it."""
        self._ended[process] = (self.parent(process), self.own_context(process), self._lines.pop(process) or ())
        self.exited.pop(process)
        self.started.pop(process)

    def current(self, pid: int) -> ProcessId | None:
        """Return the process that has this pid now, None if none is known."""
        return self._current.get(pid)

    def named(self, pid: int, start_ticks: int) -> ProcessId:
        """Return the process of this pid and start, known or not: of rows, in which no boot is told."""
        current = self._current.get(pid)
        return current if current and current.start_ticks == start_ticks else ProcessId(self.boot_id, pid, start_ticks)

    def has_ended(self, process: ProcessId) -> bool:
        """Return whether the process is known to have ended, be it that another has its pid now."""
        now = self._current.get(process.pid)
        return process in self.exited or process in self._ended or (now is not None and now != process)

    def parent(self, process: ProcessId) -> ProcessId | None:
        """Return who started the process, None if that is not known."""
        started = self.started.get(process)
        if started:
            return started.parent
        ended = self._ended.get(process)
        return ended[0] if ended else None

    def ancestors(self, process: ProcessId) -> tuple[ProcessId, ...]:
        """Return the known ancestors, nearest first. A parent that started later than its child is a reused pid."""
        found: list[ProcessId] = []
        below, parent = process, self.parent(process)
        while parent and len(found) < ANCESTORS_MAX:
            if parent.start_ticks > below.start_ticks:
                return tuple(found)
            if parent.start_ticks == below.start_ticks and parent in found:
                break  # in a circle, which only those of one moment can be
            found.append(parent)
            below, parent = parent, self.parent(parent)
        line = self._line(self.parent(process), process)
        if line and found[-1] != line[0]:
            found += [one for one in dict.fromkeys(reversed(line)) if one not in found]
        return tuple(found)

    def are_related(self, one: ProcessId, other: ProcessId) -> bool:
        """Return whether one of the two is below the other."""
        return one in self.ancestors(other) or other in self.ancestors(one)

    def head(self, some: tuple[ProcessId, ...]) -> ProcessId | None:
        """Return the one that all others are below, None if there is none such."""
        if len(some) == 1:
            return some[0]
        for one in some:
            others = [other for other in some if other != one]
            if others and all(one in self.ancestors(other) for other in others):
                return one
        return None

    def context(self, process: ProcessId) -> Context:
        """Return what the process belongs to; what it does not say itself is taken from its nearest ancestor."""
        return self._context((process, *self.ancestors(process)))

    def own_context(self, process: ProcessId) -> Context:
        """Return what its own cgroup and environment say that the process belongs to."""
        started = self.started.get(process)
        if started:
            return context_of(started.cgroup, started.environ)
        ended = self._ended.get(process)
        return ended[1] if ended else NO_CONTEXT

    def brief(self, process: ProcessId) -> ProcessBrief:
        """Return what to show of a process."""
        started = self.started.get(process)
        if started is None:
            return ProcessBrief(process=process, name="", argv=(), user="", cgroup="", cgroup_id=0, context=NO_CONTEXT)
        ancestors = self.ancestors(process)
        return ProcessBrief(
            process=process,
            name=started.name,
            argv=started.argv,
            user=started.user,
            cgroup=started.cgroup,
            cgroup_id=started.cgroup_id,
            context=self._context((process, *ancestors)),
            ancestors=ancestors,
            executable=started.executable,
        )

    def evicted(self) -> dict[str, int]:
        """Return how many entries left because their table was full, by what they are, since the beginning."""
        return {"processes": self.started.evicted}

    def _context(self, line: Line) -> Context:
        merged = NO_CONTEXT
        for one in line:
            said = self.own_context(one)
            if said != NO_CONTEXT:
                merged = _merge(merged, said)
        return merged

    def _line(self, parent: ProcessId | None, child: ProcessId) -> Line:
        """Return the eldest that a parent is below, or is itself, if it is the child's and no later user of its pid."""
        if parent is None or parent.start_ticks > child.start_ticks:
            return ()
        ended = self._ended.get(parent)
        return self._lines.get(parent) or (ended[2] if ended else ()) or (parent,)


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
