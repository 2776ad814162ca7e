"""The guard: records in, findings, incidents and decisions out.

One object that knows no clock, no file and no socket. The daemon, the library, replay, the tests and the lab are
drivers of it: they hand it blocks in order of arrival and carry out, or only show, what it returns. Time is what the
records say. The same blocks give the same events, bit for bit, however they are cut.

    block -> host (the world) -> flow table -> detectors -> fusion -> correlation -> incidents -> policy -> events
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Literal, cast, get_args

import msgspec
import numpy as np

from gpuguard.core.bounded import BoundedTable
from gpuguard.core.correlation import Correlation
from gpuguard.core.detectors import Detector, Telling, new_detectors
from gpuguard.core.events import Decision, Event, Finding, FlowReport, FlowReports, ProcessBrief
from gpuguard.core.evidence import Evidence, Paced
from gpuguard.core.facts import observations_of
from gpuguard.core.flows import FlowTable, closed_flows
from gpuguard.core.fusion import Fusion, Standing
from gpuguard.core.host import Host
from gpuguard.core.incidents import Incidents, short_id
from gpuguard.core.labels import LABELS, VERDICTS, Verdict
from gpuguard.core.observations import (
    Exchange,
    FlowClosed,
    FlowsClosed,
    FlowsUnanswered,
    FlowUse,
    NotEchoes,
    Observation,
    Spoke,
    TlsTalk,
)
from gpuguard.core.policy import DEFAULT_POLICY, Policy, decide
from gpuguard.core.records import (
    ActionOutcome,
    Approval,
    Block,
    Gap,
    Packets,
    ProcessExited,
    ProcessStarted,
    Sockets,
    Tick,
    ToolCall,
)
from gpuguard.core.subjects import DeviceId, FlowId, ProcessId, Subject
from gpuguard.core.unspoken import unspoken

if TYPE_CHECKING:
    from collections.abc import Iterable

    from gpuguard.core.counter_classes import Model
    from gpuguard.core.signatures import Signature

GAPS_MAX = 16
PENDING_MAX = 1_024
DECIDED_MAX = 16_384

#: How long the standing of a process outlives it: its last records may still be on their way.
EXITED_KEPT_NS = 60_000_000_000
EXITED_MAX = 16_384

#: What the flow table makes; of records the world learns, and some ask for an answer by themselves.
_OBSERVATIONS = frozenset(get_args(Observation))

#: Many flows in one, each with its own time.
_ROWS = frozenset({FlowsClosed, FlowsUnanswered})

#: Findings of one explanation: of a GPU on which thousands run, the worst.
EXPLAINED_MAX = 64

#: How often at most it is told that tables are full.
EVICTED_TOLD_NS = 60_000_000_000
FULL = "tables are full"


class ProcessVerdict(msgspec.Struct, frozen=True):
    """How one process stands, for schedulers and lists."""

    process: ProcessBrief
    verdict: Verdict
    label: str
    probability: float


class Explanation(msgspec.Struct, frozen=True):
    """How one process or GPU stands at a moment, also under labels by which nobody is accused (yet).

    ``process`` is None for a GPU. The worst of the findings comes first; ``left_out`` says how many more there are.
    """

    time_ns: int
    subject: Subject
    process: ProcessBrief | None
    findings: tuple[Finding, ...]
    left_out: int
    gaps: tuple[Gap, ...]


class Guard:
    """Judges what it is told: `receive` takes a block of records and returns the events that follow from it.

    It knows no clock, no file and no socket; time is what the records say.

    Parameters
    ----------
    policy
        What may be decided; `policy.check` it first.
    mode
        ``observe`` only writes down what would have been done; ``enforce`` asks for it.
    alarms_per_gpu_year
        The false-alarm rate that the thresholds are set for, see `fusion`. Raises ValueError if not sensible.
    counter_alarms_per_gpu_year
        The same for what counters say alone, see `counter_jobs`.
    signatures
        What is known of code and launches that mine; without them, mining by launches is not recognised.
    counter_model
        What counters are weighed by; without it, they are not judged.
    quiet
        Report dull flows by the row (`FlowReports`) instead of one by one, at a hundredth of the cost. The answers are
        the same, see `core.unspoken`; but for the owners of flows in which nothing was seen, whom nobody looks up.
    together
        With how many others at least they are reported, for captures, of which nobody waits for more than the end.
    seed
        Goes into the hashes of what is kept by address: a secret one of 64 bits where somebody may aim at a table. The
        events depend on it only where a table is full. Raises ValueError if it has more bits.
    """

    def __init__(
        self,
        policy: Policy = DEFAULT_POLICY,
        *,
        mode: Literal["observe", "enforce"] = "observe",
        alarms_per_gpu_year: float = 0.1,
        counter_alarms_per_gpu_year: float = 1.0,
        signatures: tuple[Signature, ...] = (),
        counter_model: Model | None = None,
        quiet: bool = False,
        together: int = 0,
        seed: int = 0,
    ) -> None:
        if not 0 <= seed < 1 << 64:
            raise ValueError(f"a seed has 64 bits: {seed}")
        self.host = Host()
        self.incidents = Incidents()
        self._policy = policy
        self._mode: Literal["observe", "enforce"] = mode
        # Egress policy wants each flow by its name.
        self._flows = FlowTable(seed=seed, quiet=quiet and not policy.egress, together=together, exchanges=False,
                                names=bool(policy.egress))
        self._listed = False
        self._detectors = new_detectors(signatures, counter_model, counter_alarms_per_gpu_year, policy.egress,
                                        seed)
        self._telling = [one for one in self._detectors if isinstance(one, Telling)]
        self._asked: dict[type, list[Detector]] = {}
        self._fusion = Fusion(alarms_per_gpu_year)
        self._correlation = Correlation()
        #: Shown with findings, the last so many; each was an event.
        self._gaps: deque[Gap] = deque(maxlen=GAPS_MAX)
        self._pending: BoundedTable[str, Decision] = BoundedTable(PENDING_MAX)
        self._decided: BoundedTable[str, None] = BoundedTable(DECIDED_MAX)
        self._gone: deque[ProcessExited] = deque()
        self._started: set[ProcessId] = set()
        self._gone_early = 0
        self._evicted = self._evictions()
        self._evicted_told_ns = 0

    def receive(self, block: Block) -> list[Event]:
        """Take one block in and return what follows from it, in order."""
        self.host.receive(block)
        match block:
            case Packets():
                items: Iterable[Block | Observation] = observations_of(self._flows, block)
            case Tick():
                items = [block, *self._flows.tick(block.time_ns)]
            case Sockets() if not self._listed:
                self._listed = True
                items = [*self._flows.listen(), block]
            case _:
                items = [block]
        return [event for item in items for event in self._take(item)]

    def close(self, time_ns: int) -> list[Event]:
        """Return what follows from the end of the input: what was lost, and a report for every flow still open."""
        lost = self._tell_evicted(time_ns, every_ns=0)
        return lost + [event for item in self._flows.close(time_ns) for event in self._take(item)]

    def processes(self) -> list[ProcessVerdict]:
        """Return how every process stands that evidence was given about, or that uses a GPU."""
        spoken = {s for s in self._fusion.subjects() if isinstance(s, ProcessId)}
        users = {sample.process for sample in self.host.process_samples.values()}
        spoken |= {process for process in users if not self.host.processes.has_ended(process)}
        return [self._process_verdict(process) for process in sorted(spoken)]

    def explain(self, of: int | str) -> Explanation | None:
        """Return how a process (by its pid) or a GPU (by its UUID) stands, None if it is not known; it changes nothing.

        The GPUs that a process uses are told with it, and who uses a GPU with that: counters judge the one or the
        other. So are connections that stand accused.
        """
        subject = self._meant(of)
        if subject is None:
            return None
        uses = [(process, DeviceId(uuid)) for process, uuid in self.host.process_samples.entries]
        subjects = {subject, *(use[1] for use in uses if use[0] == subject),
                    *(use[0] for use in uses if use[1] == subject)}
        held: dict[str, Finding | Standing] = {
            one.id: one for one in self.incidents.findings()
            if one.subject in subjects or (one.process and one.process.process in subjects)}
        for standing in (standing for one in subjects for standing in self._fusion.of(one)):
            held[short_id("F", standing.subject, standing.label)] = standing
        worst = sorted(held, key=lambda one: (-VERDICTS.index(held[one].verdict), -held[one].nats, one))
        # Only those that are told are put together: whoever asks has the guard wait.
        told = [held[one] for one in worst[:EXPLAINED_MAX]]
        return Explanation(
            time_ns=self.host.now_ns,
            subject=subject,
            process=self.host.processes.brief(subject) if isinstance(subject, ProcessId) else None,
            findings=tuple(self._finding(one, self.host.now_ns) if isinstance(one, Standing) else one for one in told),
            left_out=max(0, len(worst) - EXPLAINED_MAX),
            gaps=tuple(self._gaps),
        )

    def pending(self) -> list[Decision]:
        """Return the decisions that wait for a person."""
        return self._pending.values()

    def _take(self, item: Block | Observation) -> list[Event]:
        kind = type(item)
        spoken = False
        events = [] if kind in _OBSERVATIONS else self._answer(cast("Block", item))
        asked = self._asked.get(kind)
        if asked is None:
            asked = self._asked[kind] = [one for one in self._detectors if kind in getattr(one, "takes", (kind,))]
        for detector in asked:
            try:
                weighed = detector.receive(item, self.host)
            except Exception as error:  # noqa: BLE001 one blind detector must not blind the others; it is told, once
                self._detectors.remove(detector)
                self._asked = {}
                events += self._answer(_failed(detector, item, error))
                continue
            for one in weighed:
                evidence = one.evidence if isinstance(one, Paced) else one
                if isinstance(evidence, Gap):
                    events += self._answer(evidence)
                elif not evidence.label:
                    self._fusion.note(evidence)
                else:
                    # Piece by piece, not block by block: a block of launches that was cut in two tells the same.
                    events += self._weigh(item, evidence, paced=one.told if isinstance(one, Paced) else None)
                    spoken = True
        if isinstance(item, FlowClosed):
            events.append(self._report(item))
        elif isinstance(item, FlowsClosed):
            events += self._reports(item, spoken=spoken)
        return events

    def _weigh(self, item: Block | Observation, evidence: Evidence, *, paced: bool | None) -> list[Event]:
        """Add evidence up; return what is told of it now: where a verdict changes, or where its detector says so."""
        standing, changed = self._fusion.receive(evidence)
        if standing.decided_packets is None and standing.decided_ns:
            standing.decided_packets = self._packets_at(item, standing.subject)
        told = changed if paced is None else paced
        if not told or not LABELS[standing.label].accuses:
            return []
        return self._tell(self._finding(standing, evidence.time_ns if type(item) in _ROWS else item.time_ns))

    def _answer(self, item: Block) -> list[Event]:
        """Return what a record asks for by itself, apart from any evidence in it."""
        match item:
            case Tick():
                self._forget_exited(item.time_ns)
                return [*self._rejoin(item.time_ns, self._of_started()), *self._tell_evicted(item.time_ns)]
            case Gap():
                self._gaps.append(item)
                return [item]
            case ToolCall():
                self._correlation.receive(item)
                return self._rejoin(item.time_ns, self.incidents.findings())
            case Sockets():
                return self._rejoin(item.time_ns, [f for f in self.incidents.findings() if f.process is None])
            case ProcessStarted():
                # At the next tick: a busy host starts a thousand processes a second, and findings are many.
                self._started.add(item.process)
            case Approval():
                return self._approve(item)
            case ActionOutcome():
                return self._heard(item)
            case ProcessExited():
                self._gone.append(item)
            case _:
                pass
        return []

    def _finding(self, standing: Standing, time_ns: int) -> Finding:
        subject = standing.subject
        start_ns = self._start_ns(standing)
        process, call, trace_id = self._join(subject)
        return Finding(
            time_ns=time_ns,
            id=short_id("F", subject, standing.label),
            subject=subject,
            verdict=standing.verdict,
            label=standing.label,
            carrier=standing.carrier,
            probability=standing.probability,
            nats=standing.nats,
            start_ns=start_ns,
            decided_after_s=max(0, (standing.decided_ns or time_ns) - start_ns) / 1e9,
            decided_after_packets=standing.decided_packets,
            evidence=(*standing.evidence, *self._fusion.notes(subject, standing.label)),
            counter_evidence=tuple(standing.counter_evidence),
            process=process,
            tool_call=call,
            trace_id=trace_id,
            gaps=tuple(self._gaps),
        )

    def _packets_at(self, item: Block | Observation, subject: Subject) -> int | None:
        """Return how many packets of a flow had been seen when this item was told."""
        if not isinstance(subject, FlowId):
            return None
        if isinstance(item, FlowUse | Exchange | NotEchoes | Spoke | TlsTalk | FlowClosed) and item.flow == subject:
            return item.packets
        if isinstance(item, FlowsClosed | FlowsUnanswered):
            return next((one.packets for one in closed_flows(item.rows) if one.flow == subject), None)
        return self._flows.packets_of(subject)

    def _start_ns(self, standing: Standing) -> int:
        """Return when the subject began. A window of counters may begin before the process that it speaks of."""
        subject = standing.subject
        if isinstance(subject, FlowId):
            return subject.start_ns
        started = self.host.processes.started.get(subject) if isinstance(subject, ProcessId) else None
        return max(standing.start_ns, started.time_ns) if started else standing.start_ns

    def _join(self, subject: Subject) -> tuple[ProcessBrief | None, ToolCall | None, str]:
        """Return whose a subject is: process, tool call, trace."""
        process = subject if isinstance(subject, ProcessId) else None
        if isinstance(subject, FlowId):
            process = self.host.network.owner(subject)
        if process is None:
            return None, None, ""
        brief = self.host.processes.brief(process)
        call = self._correlation.tool_call(process, self.host)
        return brief, call, call.trace_id if call else brief.context.trace_id

    def _tell(self, finding: Finding) -> list[Event]:
        """Return a finding with the incident it belongs to and what policy asks for."""
        events: list[Event] = [finding, *self.incidents.receive(finding)]
        for step in decide(self._policy, finding):
            decision_id = short_id("D", finding.id, step.rule)
            if decision_id in self._decided:
                continue
            self._decided[decision_id] = None
            incident = self.incidents.of_finding(finding.id)
            decision = Decision(
                time_ns=finding.time_ns,
                id=decision_id,
                incident_id=incident.id if incident else "",
                finding_id=finding.id,
                rung=step.rung,
                mode=self._mode,
                needs_approval=step.needs_approval,
                target=finding.process,
                ttl_s=step.ttl_s,
                reason=step.reason,
                rule=step.rule,
            )
            events += self._ask(decision)
        return events

    def _ask(self, decision: Decision) -> list[Event]:
        if decision.needs_approval:
            self._pending[decision.id] = decision
        incident = self.incidents.decide(decision.finding_id, decision)
        return [decision, incident] if incident else [decision]

    def _approve(self, approval: Approval) -> list[Event]:
        """A yes counts only for what still stands: the process alive, the finding still confirmed."""
        decision = self._pending.pop(approval.decision_id)
        if decision is None:
            reason = f"{approval.answer} by {approval.by}: no decision {approval.decision_id} waits for an answer"
            return [Gap(time_ns=approval.time_ns, sensor="approval", reason=reason)]
        incident = self.incidents.of_finding(decision.finding_id)
        if approval.answer == "reject":
            return self._rejected(decision, approval)
        finding = next((f for f in incident.findings if f.id == decision.finding_id), None) if incident else None
        alive = decision.target is not None and not self.host.processes.has_ended(decision.target.process)
        if finding is None or finding.verdict != "confirmed" or not alive:
            reason = f"decision {decision.id} was approved by {approval.by}, but what it rests on no longer stands"
            return [Gap(time_ns=approval.time_ns, sensor="approval", reason=reason)]
        return self._ask(msgspec.structs.replace(
            decision, time_ns=approval.time_ns, needs_approval=False, approved_by=approval.by))

    def _heard(self, outcome: ActionOutcome) -> list[Event]:
        """File what became of a decision. That an act is over while its reason stands, somebody has to be told."""
        incident = self.incidents.outcome(outcome)
        if incident is None:
            return []
        decision = next(d for d in incident.decisions if d.id == outcome.decision_id)
        finding = next((f for f in incident.findings if f.id == decision.finding_id), None)
        alive = decision.target is not None and not self.host.processes.has_ended(decision.target.process)
        if outcome.outcome != "expired" or finding is None or finding.verdict != "confirmed" or not alive:
            return [incident]
        return [incident, *self._ask(msgspec.structs.replace(
            decision,
            time_ns=outcome.time_ns,
            id=short_id("D", decision.id, outcome.time_ns),
            rung="notify",
            needs_approval=False,
            reason=f"{decision.rung} is over, and {finding.label} still stands: nothing holds it now",
        ))]

    def _rejected(self, decision: Decision, approval: Approval) -> list[Event]:
        because = f": {approval.reason}" if approval.reason else ""
        incident = self.incidents.outcome(ActionOutcome(
            time_ns=approval.time_ns,
            decision_id=decision.id,
            action=decision.rung,
            outcome="refused",
            text=f"rejected by {approval.by}{because}",
            process=decision.target.process if decision.target else None,
        ))
        return [incident] if incident else []

    def _of_started(self) -> list[Finding]:
        """Return the findings that processes started since the last tick may say more about."""
        started, self._started = self._started, set()
        if not started:
            return []
        return [f for f in self.incidents.findings()
                if f.process is None or not started.isdisjoint((f.process.process, *f.process.ancestors))]

    def _rejoin(self, time_ns: int, findings: list[Finding]) -> list[Event]:
        """Return what changes now that a socket, a process or a tool call is better known."""
        events: list[Event] = []
        for finding in findings:
            process, call, trace_id = self._join(finding.subject)
            if process is None:
                continue
            before = finding.process
            if before and before.process == process.process and process.process not in self.host.processes.started:
                process = before  # it ended, and was forgotten: what was known of it stays
            if call is None and finding.tool_call is not None:
                call, trace_id = finding.tool_call, finding.trace_id
            if (process, call, trace_id) != (before, finding.tool_call, finding.trace_id):
                events += self._tell(msgspec.structs.replace(
                    finding, time_ns=time_ns, process=process, tool_call=call, trace_id=trace_id))
        return events

    def _report(self, closed: FlowClosed) -> FlowReport:
        standing = self._fusion.best(closed.flow) or unspoken(closed)
        finding = self._finding(standing, closed.time_ns)
        self._fusion.forget(closed.flow)
        return FlowReport(time_ns=closed.time_ns, closed=closed, finding=finding)

    def _reports(self, item: FlowsClosed, *, spoken: bool) -> list[Event]:
        """Return the report of dull flows; those that evidence was given about are not dull."""
        gaps = tuple(self._gaps)
        if not spoken and not (item.unanswered and item.rows["missed"].any()):
            return [FlowReports(item.time_ns, item, gaps)]
        dull = [self._fusion.best(closed.flow) is None for closed in closed_flows(item.rows)]
        events: list[Event] = [self._report(closed) for closed in closed_flows(item.rows[np.logical_not(dull)])]
        if any(dull):
            rows = item.rows[dull]
            unanswered = int((rows["payload_bytes_responder"] == 0).sum())
            events.append(FlowReports(item.time_ns, FlowsClosed(item.time_ns, rows, unanswered), gaps))
        return events

    def _meant(self, of: int | str) -> ProcessId | DeviceId | None:
        """Return whom a pid or a UUID names. A pid names who has it now, else the last that is known to have had it."""
        users, spoken = list(self.host.process_samples.entries), self._fusion.subjects()
        if isinstance(of, str):
            known = of in self.host.devices or DeviceId(of) in spoken or any(uuid == of for _, uuid in users)
            return DeviceId(of) if known else None
        had = [*self.host.processes.started.entries, *(process for process, _ in users),
               *(one for one in spoken if isinstance(one, ProcessId)),
               *(one.process.process for one in self.incidents.findings() if one.process)]
        return self.host.processes.current(of) or max(
            (one for one in had if one.pid == of), key=lambda one: one.start_ticks, default=None)

    def _process_verdict(self, process: ProcessId) -> ProcessVerdict:
        standing = self._fusion.best(process)
        return ProcessVerdict(
            process=self.host.processes.brief(process),
            verdict=standing.verdict if standing else "unknown",
            label=standing.label if standing else "",
            probability=standing.probability if standing else 0.0,
        )

    def _forget_exited(self, time_ns: int) -> None:
        while self._gone and (len(self._gone) > EXITED_MAX or self._gone[0].time_ns + EXITED_KEPT_NS < time_ns):
            gone = self._gone.popleft()
            self._gone_early += gone.time_ns + EXITED_KEPT_NS >= time_ns and self._fusion.best(gone.process) is not None
            self._fusion.forget(gone.process)
            self.host.forget(gone.process)

    def _tell_evicted(self, time_ns: int, every_ns: int = EVICTED_TOLD_NS) -> list[Event]:
        """Return what full tables lost since this was told last, once a minute at most."""
        evicted = self._evictions()
        if time_ns < self._evicted_told_ns + every_ns or evicted == self._evicted:
            return []
        lost = {name: count - self._evicted[name] for name, count in evicted.items()}
        since_ns, self._evicted_told_ns, self._evicted = self._evicted_told_ns or None, time_ns, evicted
        names = ", ".join(f"{count} {name}" for name, count in lost.items() if count)
        gap = Gap(time_ns=time_ns, sensor="core", reason=f"{FULL}; forgotten before their time: {names}",
                  since_ns=since_ns, lost=sum(lost.values()))
        # It may come every minute: only the last is shown with findings, beside gaps of other reasons.
        earlier = next((one for one in self._gaps if one.sensor == "core" and one.reason.startswith(FULL)), None)
        if earlier:
            self._gaps.remove(earlier)
        self._gaps.append(gap)
        return [gap]

    def _evictions(self) -> dict[str, int]:
        """Return how much full tables lost since the beginning, by what it was."""
        evicted = {"flows": self._flows.evicted, "standings": self._fusion.evicted,
                   "incidents": self.incidents.evicted, "decisions": self._decided.evicted,
                   "questions to people": self._pending.evicted, "tool calls": self._correlation.evicted,
                   "processes that ended and were spoken of": self._gone_early, **self.host.evicted()}
        for detector in self._telling:
            evicted |= detector.evicted()
        return evicted


def _failed(detector: Detector, item: Block | Observation, error: Exception) -> Gap:
    """Return what is said of a detector that stumbled: it does not look any more."""
    name = type(detector).__module__.rpartition(".")[2]
    reason = f"failed on {type(item).__name__} and is off until the next start: {type(error).__name__}: {error}"
    return Gap(time_ns=item.time_ns, sensor=f"detector {name}", reason=reason, since_ns=item.time_ns)
