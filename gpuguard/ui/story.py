"""Events put in the order in which a person wants to be told of them; the same for every screen and page."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
from msgspec import Struct

from gpuguard.core.events import Decision, Event, Finding, FlowReport, Incident, ProcessBrief
from gpuguard.core.labels import LABELS, Verdict
from gpuguard.core.records import ActionOutcome, Gap, ToolCall
from gpuguard.core.subjects import FlowId

if TYPE_CHECKING:
    from collections.abc import Iterable

ARGUMENTS_SHOWN = 160

RUNG_WORDS = {
    "observe": "write down", "notify": "tell", "isolate": "cut off from the network", "throttle": "throttle",
    "pause": "pause", "kill": "kill", "hand_over": "hand over",
}

#: What a label's subject did, for a sentence; the table of labels says it at length.
DEEDS = {
    "ssh-reverse-tunnel": "opened a reverse tunnel", "ssh-reverse-shell": "let the far side type in a shell",
    "ssh-role-swap": "dialled out and served SSH", "ssh-tun": "tunnelled a network device",
    "ssh-bruteforce": "tried SSH passwords", "reverse-shell": "took commands from the far side",
    "dns-tunnel": "carried data in DNS", "icmp-tunnel": "carried data in ICMP",
    "mining-pool": "spoke to a mining pool", "mining": "mined on a GPU", "scan": "probed the network",
    "launches-withheld": "withheld its launches",
    "reverse-proxy": "connected elsewhere for the far side",
}


class Turn(Struct, frozen=True):
    """A finding reached a verdict it did not have before."""

    time_ns: int
    finding_id: str
    label: str
    verdict: Verdict


class Story(Struct, frozen=True):
    """What the events amount to: newest standing of each incident that accuses, and how it came to it."""

    incidents: tuple[Incident, ...]
    turns: tuple[Turn, ...]
    gaps: tuple[Gap, ...]
    flows: tuple[FlowReport, ...]

    def turns_of(self, incident: Incident) -> list[Turn]:
        """Return the turns of the findings of one incident, in order of time."""
        mine = {finding.id for finding in incident.findings}
        return [turn for turn in self.turns if turn.finding_id in mine]


def told_by(events: Iterable[Event]) -> Story:
    """Put events, in the order in which they were made, together."""
    incidents: dict[str, Incident] = {}
    standing: dict[str, Verdict] = {}
    turns: list[Turn] = []
    gaps: dict[tuple[str, str], Gap] = {}
    flows: list[FlowReport] = []
    for event in events:
        match event:
            case Incident():
                incidents[event.id] = event
            case Finding() if standing.get(event.id) != event.verdict:
                standing[event.id] = event.verdict
                turns.append(Turn(event.time_ns, event.id, event.label, event.verdict))
            case Gap():
                gaps.setdefault((event.sensor, event.reason), event)
            case FlowReport():
                flows.append(event)
            case _:
                pass
    accusing = sorted((i for i in incidents.values() if accused(i)), key=lambda i: i.start_ns)
    return Story(tuple(accusing), tuple(turns), tuple(gaps.values()), tuple(flows))


def accuses(finding: Finding) -> bool:
    """Return whether a finding is one that an operator must see."""
    return finding.verdict in ("suspect", "confirmed") and LABELS[finding.label].accuses


def accused(incident: Incident) -> list[Finding]:
    """Return the findings of an incident that accuse, in order of time."""
    def order(finding: Finding) -> tuple[int, int, str]:
        began_ns = min((e.start_ns for e in finding.evidence), default=finding.start_ns)
        return began_ns, min((e.time_ns for e in finding.evidence), default=finding.time_ns), finding.label

    return sorted((f for f in incident.findings if accuses(f)), key=order)


def headline(incident: Incident) -> str:
    """Return what happened in one sentence: who, and what was done, in order of time."""
    found = accused(incident)
    deeds = list(dict.fromkeys(DEEDS.get(f.label, f"showed {f.label}") for f in found))
    names = list(dict.fromkeys(f.process.name for f in found if f.process and f.process.name))
    agents = sorted({call.agent_name for call in incident.tool_calls if call.agent_name})
    if incident.tool_calls:
        who = f"Tool calls of {' and '.join(agents)}" if agents else "Tool calls of an agent"
    else:
        who = listed(names) or "A process not known"
    return f"{who} {listed(deeds)}" if deeds else incident.title


def listed(words: list[str]) -> str:
    """Return words as a list in a sentence."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}" if words else ""


def span_ns(incident: Incident) -> tuple[int, int]:
    """Return when the first tool call or thing held against somebody began, and when the last was heard of it."""
    evidence = [one for finding in accused(incident) for one in finding.evidence]
    starts = [*(call.start_ns for call in incident.tool_calls), *(one.start_ns for one in evidence)]
    return min(starts, default=incident.start_ns), max([incident.time_ns, *(one.time_ns for one in evidence)])


def process_words(process: ProcessBrief | None) -> str:
    """Return a process in a few words."""
    if process is None:
        return "process unknown"
    return f"{process.name or '?'} (pid {process.process.pid})"


def call_words(call: ToolCall | None) -> str:
    """Return a tool call in a few words."""
    return f"{call.tool_name}: {argument_words(call)}".strip(": ") if call else "no tool call known"


def argument_words(call: ToolCall) -> str:
    """Return what a tool was asked: of a JSON object with one text in it only that text."""
    try:
        values = msgspec.json.decode(call.arguments.encode(errors="replace"), type=dict[str, str])
    except msgspec.DecodeError:
        values = {}
    said = next(iter(values.values())) if len(values) == 1 else call.arguments
    return said[:ARGUMENTS_SHOWN]


def subject_words(finding: Finding) -> str:
    """Return what a finding is about, as far as it is not its process."""
    if isinstance(finding.subject, FlowId):
        return str(finding.subject)
    return LABELS[finding.label].description


def outcomes_of(incident: Incident, decision: Decision) -> list[ActionOutcome]:
    """Return what became of a decision, in order of time."""
    return [outcome for outcome in incident.outcomes if outcome.decision_id == decision.id]


def decision_words(incident: Incident, decision: Decision) -> str:
    """Return what became of a decision, in one line."""
    outcomes = outcomes_of(incident, decision)
    if outcomes:
        return outcomes[-1].text
    return "waits for a person's approval" if decision.needs_approval else "nothing reported yet"
