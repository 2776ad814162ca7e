"""One story, one incident: findings that belong together, with the tool calls, processes and decisions behind them.

Findings are of one story when the same trace asked for their processes; failing that when they share a sandbox, a
container, a pod or a job; failing that a control group. A finding whose process is learnt late moves to its story then.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from typing import TYPE_CHECKING

import msgspec

from gpuguard.core.events import Decision, Finding, Incident, ProcessBrief
from gpuguard.core.labels import VERDICTS

if TYPE_CHECKING:
    from gpuguard.core.records import ActionOutcome

INCIDENTS_MAX = 4_096
#: A story with more findings than this goes on in another incident: each is told whole whenever it changes.
FINDINGS_MAX = 128
#: Shown with an incident, the last so many: all of them were told and audited one by one.
DECISIONS_MAX = 256
OUTCOMES_MAX = 64
_ROOT_CGROUPS = ("", "/")


def short_id(prefix: str, *parts: object) -> str:
    """Return a stable short name for what the parts say: the same records always give the same ids."""
    digest = hashlib.blake2s(msgspec.json.encode(parts), digest_size=5).hexdigest()
    return f"{prefix}-{digest}"


def story_of(finding: Finding) -> str:
    """Return what binds a finding to others; "" if only itself is known."""
    if finding.trace_id:
        return f"trace {finding.trace_id}"
    process = finding.process
    if process is None:
        return ""
    context = process.context
    for kind, value in (
        ("sandbox", context.sandbox_id),
        ("container", context.container_id),
        ("pod", context.pod_uid),
        ("job", context.slurm_job_id),
        ("cgroup", "" if process.cgroup in _ROOT_CGROUPS else process.cgroup),
    ):
        if value:
            return f"{kind} {value}"
    return f"process {process.process.pid} {process.process.start_ticks}"


class Incidents:
    """All incidents, bounded: the one untouched for longest leaves, and is counted."""

    def __init__(self) -> None:
        self.evicted = 0
        self._incidents: OrderedDict[str, Incident] = OrderedDict()
        self._by_story: dict[str, str] = {}
        #: The other way about.
        self._stories: dict[str, set[str]] = {}
        self._by_finding: dict[str, str] = {}

    def receive(self, finding: Finding) -> list[Incident]:
        """File a finding; return the incidents that changed, the one it now belongs to last."""
        story = story_of(finding)
        changed = []
        held = self._by_finding.get(finding.id)
        home = self._by_story.get(story) if story else held
        if held and self._incidents[held].story == story:
            home = held
        if held and home and held != home:
            changed.append(self._without(self._incidents[held], finding))
        if home and home != held and len(self._incidents[home].findings) >= FINDINGS_MAX:
            home = short_id("I", story, finding.id)
        incident_id = home or held or short_id("I", story or finding.id, finding.start_ns)
        before = self._incidents.get(incident_id)
        incident = _with_finding(before, incident_id, story, finding)
        self._keep(incident)
        if story:
            self._stories.get(self._by_story.get(story, ""), set()).discard(story)
            self._stories.setdefault(incident_id, set()).add(story)
            self._by_story[story] = incident_id
        self._by_finding[finding.id] = incident_id
        return [*changed, incident]

    def decide(self, finding_id: str, decision: Decision) -> Incident | None:
        """Add or replace a decision; None if its incident is gone."""
        incident = self.of_finding(finding_id)
        if incident is None:
            return None
        decisions = tuple(d for d in incident.decisions if d.id != decision.id)
        return self._keep(msgspec.structs.replace(incident, time_ns=decision.time_ns,
                                                  decisions=(*decisions, decision)[-DECISIONS_MAX:]))

    def outcome(self, outcome: ActionOutcome) -> Incident | None:
        """Add what became of a decision; None if its incident is gone."""
        for incident in reversed(self._incidents.values()):
            if any(d.id == outcome.decision_id for d in incident.decisions):
                outcomes = (*incident.outcomes, outcome)[-OUTCOMES_MAX:]
                return self._keep(msgspec.structs.replace(incident, time_ns=outcome.time_ns, outcomes=outcomes))
        return None

    def of_finding(self, finding_id: str) -> Incident | None:
        """Return the incident that holds a finding."""
        return self._incidents.get(self._by_finding.get(finding_id, ""))

    def get(self, incident_id: str) -> Incident | None:
        """Return one incident."""
        return self._incidents.get(incident_id)

    def all(self) -> list[Incident]:
        """Return every incident kept, longest untouched first."""
        return list(self._incidents.values())

    def findings(self) -> list[Finding]:
        """Return the findings of all open incidents."""
        return [f for i in self._incidents.values() if i.state == "open" for f in i.findings]

    def _keep(self, incident: Incident) -> Incident:
        self._incidents[incident.id] = incident
        self._incidents.move_to_end(incident.id)
        while len(self._incidents) > INCIDENTS_MAX:
            _, gone = self._incidents.popitem(last=False)
            self.evicted += 1
            for story in self._stories.pop(gone.id, ()):
                del self._by_story[story]
            for finding in gone.findings:
                del self._by_finding[finding.id]
        return incident

    def _without(self, incident: Incident, finding: Finding) -> Incident:
        findings = tuple(f for f in incident.findings if f.id != finding.id)
        return self._keep(_derived(incident, finding.time_ns, findings))


def _with_finding(before: Incident | None, incident_id: str, story: str, finding: Finding) -> Incident:
    if before is None:
        before = Incident(time_ns=finding.time_ns, id=incident_id, state="open", start_ns=finding.start_ns, title="",
                          story=story, verdict="unknown", findings=(), tool_calls=(), processes=(), decisions=())
    findings = (*(f for f in before.findings if f.id != finding.id), finding)
    if story and not before.story:
        before = msgspec.structs.replace(before, story=story)
    return _derived(before, finding.time_ns, findings)


def _derived(incident: Incident, time_ns: int, findings: tuple[Finding, ...]) -> Incident:
    """Return the incident with everything that follows from its findings."""
    accused = [f for f in findings if f.verdict in ("suspect", "confirmed")]
    calls = {f.tool_call.span_id: f.tool_call for f in findings if f.tool_call}
    processes: dict[str, ProcessBrief] = {str(f.process.process): f.process for f in findings if f.process}
    return msgspec.structs.replace(
        incident,
        time_ns=time_ns,
        state="open" if accused else "closed",
        start_ns=min((f.start_ns for f in findings), default=incident.start_ns),
        title=_title(accused or list(findings)),
        verdict=max((f.verdict for f in findings), key=VERDICTS.index, default="unknown"),
        findings=findings,
        tool_calls=tuple(sorted(calls.values(), key=lambda c: (c.start_ns, c.span_id))),
        processes=tuple(processes.values()),
    )


def _title(findings: list[Finding]) -> str:
    """Return one line for a list: what, by whom, asked for by what."""
    labels = ", ".join(sorted({f.label for f in findings}))
    names = ", ".join(sorted({f.process.name for f in findings if f.process and f.process.name}))
    calls = ", ".join(sorted({f.tool_call.tool_name for f in findings if f.tool_call}))
    return labels + (f" by {names}" if names else "") + (f", asked for by tool call {calls}" if calls else "")
