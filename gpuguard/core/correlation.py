"""Who asked for this process: joining processes to the tool calls of an agent.

Strongest first. A process whose TRACEPARENT (its own, else the nearest ancestor's) names the span of a tool call was
started by it. A process below the agent's own that started while exactly one of that agent's calls ran was started by
it too. Two calls at once leave it open, and so does a span that is not reported yet of a trace that the agent uses: a
wrong name is worse than none. A trace that nobody reported is the process's own word, and hides nobody.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from gpuguard.core.bounded import BoundedTable

if TYPE_CHECKING:
    from gpuguard.core.host import Host
    from gpuguard.core.records import ToolCall
    from gpuguard.core.subjects import ProcessId

TOOL_CALLS_MAX = 16_384
CALLS_OF_AGENT_MAX = 256


class Correlation:
    """The tool calls heard of, and the join."""

    def __init__(self) -> None:
        self._calls: BoundedTable[tuple[str, str], ToolCall] = BoundedTable(TOOL_CALLS_MAX)
        self._by_agent: BoundedTable[ProcessId, tuple[ToolCall, ...]] = BoundedTable(TOOL_CALLS_MAX)
        self._dropped = 0

    @property
    def evicted(self) -> int:
        """How many tool calls were forgotten because there were too many, of all or of one agent."""
        return self._calls.evicted + self._by_agent.evicted + self._dropped

    def receive(self, call: ToolCall) -> None:
        """Take one tool call in; a later record of the same span replaces the earlier."""
        self._calls[call.trace_id, call.span_id] = call
        if call.process:
            held = tuple(c for c in self._by_agent.get(call.process) or () if c.span_id != call.span_id)
            self._dropped += len(held) >= CALLS_OF_AGENT_MAX
            self._by_agent[call.process] = (*held, call)[-CALLS_OF_AGENT_MAX:]

    def tool_call(self, process: ProcessId, host: Host) -> ToolCall | None:
        """Return the tool call that started the process, None where that is open."""
        lineage = (process, *host.processes.ancestors(process))
        for one in lineage:
            context = host.processes.own_context(one)
            call = self._calls.get((context.trace_id, context.span_id))
            if call:
                return call
        trace_id = host.processes.context(process).trace_id
        for below, agent in itertools.pairwise(lineage):
            calls = self._by_agent.get(agent)
            # In a long line some are not told between two neighbours.
            if calls and host.processes.parent(below) == agent:
                awaited = any(call.trace_id == trace_id for call in calls)
                return None if awaited else _only_call_during(calls, host, below)
        return None


def _only_call_during(calls: tuple[ToolCall, ...], host: Host, child: ProcessId) -> ToolCall | None:
    """Return the one call that ran when the agent's direct child started."""
    started = host.processes.started.get(child)
    if started is None:
        return None
    running = [c for c in calls if c.start_ns <= started.time_ns and (c.end_ns is None or started.time_ns <= c.end_ns)]
    return running[0] if len(running) == 1 else None
