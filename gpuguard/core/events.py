"""What comes out of `Guard.receive`: findings, incidents and decisions. Plain data; how it is shown is the outputs'."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

from gpuguard.core.evidence import Evidence
from gpuguard.core.labels import Verdict
from gpuguard.core.observations import FlowClosed, FlowsClosed
from gpuguard.core.records import ActionOutcome, Gap, ToolCall
from gpuguard.core.subjects import Context, ProcessId, Subject

Rung = Literal["observe", "notify", "isolate", "throttle", "pause", "kill", "hand_over"]


class ProcessBrief(Struct, frozen=True):
    """Enough of a process to show to a person."""

    process: ProcessId
    name: str
    argv: tuple[str, ...]
    user: str
    cgroup: str
    cgroup_id: int
    context: Context
    ancestors: tuple[ProcessId, ...] = ()
    executable: str = ""


class Finding(Struct, frozen=True, tag="finding"):
    """The standing of one subject under one label; a new one is made whenever its verdict changes.

    ``probability`` is 1 / (1 + exp(-(nats + prior))); ``process`` is whom the subject belongs to, None where that is
    not certain. ``decided_after_s`` counts from the first record about the subject, ``decided_after_packets`` a flow's
    packets; it is None for other subjects.
    """

    time_ns: int
    id: str
    subject: Subject
    verdict: Verdict
    label: str
    carrier: str
    probability: float
    nats: float
    start_ns: int
    decided_after_s: float
    evidence: tuple[Evidence, ...]
    counter_evidence: tuple[Evidence, ...]
    process: ProcessBrief | None
    tool_call: ToolCall | None
    trace_id: str
    gaps: tuple[Gap, ...] = ()
    decided_after_packets: int | None = None


class Decision(Struct, frozen=True, tag="decision"):
    """What policy asks for. ``mode`` observe: only to be written down; ``needs_approval``: wait for an `Approval`.

    After a person approved, the same decision is made again with ``needs_approval`` False and ``approved_by`` set.
    """

    time_ns: int
    id: str
    incident_id: str
    finding_id: str
    rung: Rung
    mode: Literal["observe", "enforce"]
    needs_approval: bool
    target: ProcessBrief | None
    ttl_s: float
    reason: str
    rule: str
    approved_by: str = ""


class Incident(Struct, frozen=True, tag="incident"):
    """All findings of one story, newest standing of each, with the tool calls behind them."""

    time_ns: int
    id: str
    state: Literal["open", "closed"]
    start_ns: int
    title: str
    story: str
    verdict: Verdict
    findings: tuple[Finding, ...]
    tool_calls: tuple[ToolCall, ...]
    processes: tuple[ProcessBrief, ...]
    decisions: tuple[Decision, ...]
    outcomes: tuple[ActionOutcome, ...] = ()


class FlowReport(Struct, frozen=True, tag="flow_report"):
    """A flow ended: what it was, and how it stood at the end."""

    time_ns: int
    closed: FlowClosed
    finding: Finding


class FlowReports(Struct, frozen=True, tag="flow_reports"):
    """Dull flows that ended: nothing was seen in them, and nobody accused them. `guard.reports` makes reports of it."""

    time_ns: int
    closed: FlowsClosed
    gaps: tuple[Gap, ...] = ()


Event = Finding | Decision | Incident | FlowReport | FlowReports | Gap
