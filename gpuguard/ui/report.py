"""Incidents as one HTML file that needs nothing else: no network, no script, light or dark, fit to print.

`render` is pure: the same events give the same page. Its parts are small functions that later pages reuse, and all of
them build on `markup.tag`, so that no name or argument of a process can become markup.
"""

from __future__ import annotations

from datetime import UTC, datetime
from importlib.resources import files
from typing import TYPE_CHECKING

from msgspec import Struct, structs

from gpuguard.core.fusion import likelihood
from gpuguard.core.labels import LABELS
from gpuguard.core.processes import ANCESTORS_MAX, ELDEST_MAX
from gpuguard.ui import story
from gpuguard.ui.markup import Markup, join, tag
from gpuguard.ui.timeline import timeline

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from gpuguard.core.events import Decision, Event, Finding, Incident, ProcessBrief
    from gpuguard.core.evidence import Evidence
    from gpuguard.core.records import Gap
    from gpuguard.core.subjects import ProcessId
    from gpuguard.ui.story import Story

#: From so many incidents on a page has contents, and says once what would fool each kind of evidence.
MANY = 4
#: The longest bar of an evidence table, in nats: a million to one.
NATS_FULL = 14.0
FLOWS_SHOWN = 40

_READING = (
    ("A weight is a log-likelihood ratio in nats: how much likelier the thing seen is if the label is true than if the "
    "process is one of the benign alternatives. 3 nats are 20 to 1, 7 nats 1,000 to 1; weights add up, and those "
    "below zero speak for the process."),
    ("The class names the probe that a piece of evidence came from. What comes from one probe is one class, however "
    "often it speaks: two classes are two independent witnesses."),
    ("Suspect and confirmed are thresholds on the sum; the one for confirmed follows from the rate of false alarms "
    "that the operator has set. What was not seen weighs nothing: unknown is never innocence."),
    "Policy in mode observe writes down what it would have done and does nothing. A kill always waits for a person.",
)


class Measure(Struct, frozen=True):
    """A delay that was measured, and what was asked for."""

    what: str
    value_s: float | None
    target_s: float


class LeftAlone(Struct, frozen=True):
    """Somebody who was watched and accused of nothing."""

    who: str
    what: str
    said: str


def render(
    events: Iterable[Event],
    *,
    host: str = "",
    measures: Sequence[Measure] = (),
    left_alone: Sequence[LeftAlone] = (),
    notes: Sequence[str] = (),
    marks: Mapping[str, str] | None = None,
) -> str:
    """Return the page about these events, given in the order in which the guard made them.

    Parameters
    ----------
    host
        Name of the host; "" is left out.
    measures, left_alone, notes
        What the caller knows beyond the events: delays against targets, who was not accused, and plain remarks that
        stand at the head (which half was a stand-in).
    marks
        A word beside an incident's id, by id: where it came from if not from this host now.
    """
    told = story.told_by(events)
    title = story.headline(told.incidents[0]) if len(told.incidents) == 1 else f"{len(told.incidents)} incidents"
    many = len(told.incidents) >= MANY
    body = tag(
        "main",
        remarks(notes) if notes else None,
        join(tag("h1", title), contents(told.incidents)) if many else None,
        *(incident_section(told, incident, host, (marks or {}).get(incident.id, ""), many=many)
          for incident in told.incidents),
        None if told.incidents else tag("h1", "Nothing to report"),
        _section("Blind spots", blind_spots_table(told.incidents)) if many else None,
        _section("Delays", measures_table(measures)) if measures else None,
        _section("Watched and left alone", left_alone_table(left_alone, told)),
        _section("Where the guard could not look", gaps_list(told.gaps)),
        _section("How to read this", tag("div", *(tag("p", text) for text in _READING), class_="card")),
        tag("footer", "Made by GPUGuard from its own event log. This file loads nothing from anywhere."),
    )
    return page(f"GPUGuard: {title}", body)


def incident_page(incident: Incident) -> str:
    """Return the page about one incident by itself. It says nothing of the rest of its host."""
    # A finding bears the time of its last word; its mark stands where it was decided, as policy followed that.
    decided = [structs.replace(one, time_ns=one.start_ns + round(one.decided_after_s * 1e9))
               for one in incident.findings]
    told = story.told_by([*decided, incident])
    gaps = {(gap.sensor, gap.reason): gap for finding in incident.findings for gap in finding.gaps}
    body = tag(
        "main",
        *(incident_section(told, one) for one in told.incidents),
        None if told.incidents else tag("h1", f"Incident {incident.id}: nothing in it stands accused"),
        _section("Where the guard could not look", gaps_list(list(gaps.values()))) if gaps else None,
        _section("How to read this", tag("div", *(tag("p", text) for text in _READING), class_="card")),
        tag("footer", "Made by GPUGuard from one incident. This file loads nothing from anywhere."),
    )
    return page(f"GPUGuard: {story.headline(incident) if told.incidents else incident.id}", body)


def page(title: str, body: Markup) -> str:
    """Return a whole document around ``body``. Its policy forbids it to load or run anything."""
    css = Markup(files("gpuguard.ui").joinpath("report.css").read_text("utf-8"))
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", http_equiv="Content-Security-Policy", content="default-src 'none'; style-src 'unsafe-inline'"),
        tag("title", title),
        tag("style", css),
    )
    return f"<!doctype html>\n{tag('html', head, tag('body', body), lang='en')}\n"


def contents(incidents: Sequence[Incident]) -> Markup:
    """Return the list of a page's incidents, each with a link to it."""
    rows = [
        tag("tr", tag("td", badge(incident.verdict)), tag("td", utc(story.span_ns(incident)[0])),
            tag("td", tag("a", story.headline(incident), href=f"#{incident.id}")))
        for incident in incidents
    ]
    return tag("div", _table(("Verdict", "Began", "Incident"), rows), class_="card contents", id="contents")


def blind_spots_table(incidents: Sequence[Incident]) -> Markup:
    """Return what would have fooled each kind of evidence that speaks in these incidents."""
    spots: dict[str, set[str]] = {}
    for one in (e for incident in incidents for finding in story.accused(incident) for e in finding.evidence):
        spots.setdefault(one.kind, set()).update(one.blind_spots)
    rows = [tag("tr", tag("td", tag("code", kind)), tag("td", _list(sorted(said))))
            for kind, said in sorted(spots.items()) if said]
    return tag("div", _table(("Evidence", "What would have fooled it"), rows), class_="card")


def incident_section(told: Story, incident: Incident, host: str = "", mark: str = "", *, many: bool = False) -> Markup:
    """Return everything about one incident; of ``many`` on a page the blind spots stand at its end."""
    found = story.accused(incident)
    start_ns, end_ns = story.span_ns(incident)
    classes = sorted({e.evidence_class for f in found for e in f.evidence})
    facts = {
        "Verdict": badge(incident.verdict),
        "Began": tag("span", utc(start_ns)),
        "Seen for": tag("span", f"{(end_ns - start_ns) / 1e9:.1f} s"),
        "Host": tag("span", host) if host and not mark else None,
        "Evidence from": join(*(join(chip(name), " ") for name in classes)),
        "Story": tag("code", incident.story or "one subject"),
    }
    return tag(
        "article",
        tag("div", f"Incident {incident.id}{', ' if mark else ''}{mark}",
            join(" · ", tag("a", "contents", href="#contents")) if many else None, class_="eyebrow"),
        tag("h2", story.headline(incident), class_="headline") if many else tag("h1", story.headline(incident)),
        tag("dl", *(tag("div", tag("dt", key), tag("dd", value)) for key, value in facts.items() if value),
            class_="facts"),
        _section("Who asked for what", join_grid(found)),
        _section("Timeline", tag("div", timeline(told, incident), class_="card")),
        _section("Findings", *(finding_card(finding, start_ns, spots=not many) for finding in found)),
        _section("Processes", tag("div", process_tree(incident), class_="card")),
        _section("What policy did", decisions_table(incident, start_ns)),
        id=incident.id if many else None,
    )


def join_grid(found: Sequence[Finding]) -> Markup:
    """Return tool call, process, deed and verdict of each finding, side by side."""
    cells = [tag("div", name, class_="head") for name in ("Tool call", "Process", "Flow or GPU work", "Verdict")]
    for finding in found:
        call, process = finding.tool_call, finding.process
        cells += [
            tag("div", tag("strong", call.tool_name if call else "none known"),
                tag("span", story.argument_words(call) if call else "no span names it", class_="mono")),
            tag("div", tag("strong", process.name if process else "not certain"),
                tag("span", _process_facts(process), class_="mono")),
            tag("div", tag("strong", finding.label), tag("span", story.subject_words(finding), class_="mono")),
            tag("div", badge(finding.verdict), class_="last"),
        ]
    return tag("div", *cells, class_="join")


def finding_card(finding: Finding, zero_ns: int, *, spots: bool = True) -> Markup:
    """Return one finding: its evidence, what speaks against it, and, with ``spots``, what would have fooled it."""
    label = LABELS[finding.label]
    blind = sorted({spot for evidence in finding.evidence for spot in evidence.blind_spots}) if spots else ()
    return tag(
        "section",
        tag("div", tag("h3", finding.label), badge(finding.verdict),
            tag("span", f"probability {likelihood(finding.probability)}, {finding.nats:.1f} nats", class_="soft"),
            tag("span", f"{finding.id} · {', '.join(label.attack)}", class_="faint end mono"), class_="finding-head"),
        tag("p", _sentence(finding, label.description), class_="soft"),
        evidence_table(finding.evidence, zero_ns),
        tag("h3", "Counter-evidence"),
        evidence_table(finding.counter_evidence, zero_ns) if finding.counter_evidence
        else tag("p", "None was seen. That is not the same as none.", class_="soft"),
        join(tag("h3", "Blind spots"), _list(blind)) if blind else None,
        class_="card",
    )


def evidence_table(evidence: Sequence[Evidence], zero_ns: int) -> Markup:
    """Return evidence, heaviest first, each with a bar as long as its weight."""
    rows = [
        tag("tr",
            tag("td", _after(one.time_ns, zero_ns)),
            tag("td", chip(one.evidence_class)),
            tag("td", one.text, tag("div", one.kind, class_="faint mono")),
            tag("td", f"{one.nats:+.1f}", class_="number"),
            tag("td", weight_bar(one)))
        for one in sorted(evidence, key=lambda e: -abs(e.nats))
    ]
    heads = ("After", "Class", "What was seen", "Nats", "")
    return _table(heads, rows, numbers=("Nats",), kind="events evidence")


def weight_bar(evidence: Evidence) -> Markup:
    """Return a bar: as long as the weight, in the colour of the class; a lighter rail is the full length."""
    share = min(1.0, abs(evidence.nats) / NATS_FULL)
    against = " against" if evidence.nats < 0 else ""
    return tag("i", class_=f"weight tone-{evidence.evidence_class}{against}", style=f"--share:{share:.0%}")


def process_tree(incident: Incident) -> Markup:
    """Return the processes of an incident below their ancestors; of an ancestor only the pid may be known."""
    briefs = {p.process: p for p in incident.processes}
    guilty = {f.process.process for f in story.accused(incident) if f.process}
    agents = {call.process: call.agent_name or "agent" for call in incident.tool_calls if call.process}
    below: dict[ProcessId | None, list[ProcessId]] = {}
    for brief in incident.processes:
        lineage = [*reversed(brief.ancestors), brief.process]
        for parent, child in zip([None, *lineage], lineage, strict=False):
            if child not in below.setdefault(parent, []):
                below[parent].append(child)

    def branch(parent: ProcessId | None, depth: int) -> Markup | None:
        children = below.get(parent, [])
        if not children or depth > ANCESTORS_MAX + ELDEST_MAX:
            return None
        items = [
            tag("li", _process_line(child, briefs.get(child), agents.get(child), accused=child in guilty),
                branch(child, depth + 1))
            for child in children
        ]
        return tag("ul", *items, class_="tree" if parent is None else None)

    return branch(None, 0) or tag("p", "No process is known.", class_="soft")


def decisions_table(incident: Incident, zero_ns: int) -> Markup:
    """Return what policy asked for, why, and what became of it."""
    if not incident.decisions:
        return tag("div", tag("p", "Nothing was asked for."), class_="card")
    rows = [
        tag("tr",
            tag("td", _after(decision.time_ns, zero_ns)),
            tag("td", tag("strong", story.RUNG_WORDS.get(decision.rung, decision.rung))),
            tag("td", _target(decision)),
            tag("td", decision.reason, tag("div", f"rule {decision.rule}, mode {decision.mode}", class_="faint mono")),
            tag("td", story.decision_words(incident, decision)))
        for decision in incident.decisions
    ]
    heads = ("After", "Step", "To", "Because", "What became of it")
    return tag("div", _table(heads, rows, kind="events decisions"), class_="card")


def left_alone_table(left_alone: Sequence[LeftAlone], told: Story) -> Markup:
    """Return who was watched and not accused: as the caller knows it, and as the guard named their flows.

    A flow that nothing can be said of is only counted, and what belongs to an accused process is no part of this.
    """
    guilty = {f.process.process for i in told.incidents for f in story.accused(i) if f.process}
    flows = [f for f in told.flows if not story.accuses(f.finding)
             and (f.finding.process is None or f.finding.process.process not in guilty)]
    named = [f for f in flows if f.finding.verdict == "clear" and f.finding.label != "other"]
    rows = [tag("tr", tag("td", one.who), tag("td", one.what), tag("td", one.said)) for one in left_alone]
    rows += [
        tag("tr",
            tag("td", story.process_words(flow.finding.process)),
            tag("td", tag("span", str(flow.closed.flow), class_="mono")),
            tag("td", badge(flow.finding.verdict), f" {flow.finding.label}"))
        for flow in named[:FLOWS_SHOWN]
    ]
    rest = len(flows) - min(len(named), FLOWS_SHOWN)
    if rest:
        counted = f"and {rest} flow{'s' if rest > 1 else ''} more that nothing speaks against"
        rows.append(tag("tr", tag("td", counted, colspan="3", class_="soft")))
    table = _table(("Who", "What", "What the guard said"), rows)
    return tag("div", table if rows else tag("p", "Nobody else was seen at work."), class_="card")


def measures_table(measures: Sequence[Measure]) -> Markup:
    """Return measured delays beside their targets."""
    rows = []
    for one in measures:
        met = one.value_s is not None and one.value_s <= one.target_s
        value = "not seen" if one.value_s is None else f"{one.value_s:.2f} s"
        rows.append(tag("tr", tag("td", one.what), tag("td", value, class_="number"),
                        tag("td", f"≤ {one.target_s:g} s", class_="number"),
                        tag("td", "met" if met else "missed", class_="met" if met else "missed")))
    return tag("div", _table(("What", "Measured", "Target", ""), rows, numbers=("Measured", "Target")), class_="card")


def gaps_list(gaps: Sequence[Gap]) -> Markup:
    """Return what could not be looked at, and why."""
    rows = [tag("tr", tag("td", gap.sensor), tag("td", gap.reason)) for gap in gaps]
    none = tag("p", "Every eye was open, and nothing was dropped.")
    return tag("div", _table(("Sensor", "Why"), rows, kind="gaps") if rows else none, class_="card")


def remarks(notes: Sequence[str]) -> Markup:
    """Return plain remarks, for the head of a page."""
    return tag("aside", *(tag("p", note) for note in notes), class_="remarks")


def badge(verdict: str) -> Markup:
    """Return a verdict."""
    return tag("span", verdict, class_=f"badge {verdict}")


def chip(evidence_class: str) -> Markup:
    """Return an evidence class."""
    return tag("span", evidence_class, class_=f"chip {evidence_class}")


def utc(time_ns: int) -> str:
    """Return a time for people; times out of the calendar's reach are given as they are."""
    try:
        return datetime.fromtimestamp(time_ns / 1e9, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    except (ValueError, OverflowError, OSError):
        return f"{time_ns} ns"


def _section(name: str, *children: Markup) -> Markup:
    return tag("section", tag("h2", name), *children)


def _table(
    names: Sequence[str], rows: Sequence[Markup], numbers: Sequence[str] = (), kind: str | None = None,
) -> Markup:
    head = tag("tr", *(tag("th", name, class_="number" if name in numbers else None) for name in names))
    return tag("table", tag("thead", head), tag("tbody", *rows), class_=kind)


def _list(lines: Iterable[str]) -> Markup:
    return tag("ul", *(tag("li", line) for line in lines))


def _after(time_ns: int, zero_ns: int) -> str:
    return f"{(time_ns - zero_ns) / 1e9:.2f} s"


def _sentence(finding: Finding, description: str) -> str:
    carrier = f" It was carried by {finding.carrier}." if finding.carrier else ""
    after = f" Decided {finding.decided_after_s:.2f} s after the first record about it."
    return f"{description[:1].upper()}{description[1:]}.{carrier}{after}"


def _process_facts(process: ProcessBrief | None) -> str:
    if process is None:
        return ""
    by = f" · {process.user}" if process.user else ""
    where = f" · cgroup {process.cgroup}" if process.cgroup else ""
    return f"pid {process.process.pid}{by}{where}"


def _process_line(process: ProcessId, brief: ProcessBrief | None, agent: str | None, *, accused: bool) -> Markup:
    if brief is None:
        made = tag("span", f"{agent} ") if agent else None
        return join(made, tag("span", f"pid {process.pid}{', made the tool calls' if agent else ''}", class_="faint"))
    return join(
        tag("span", f"{brief.name} ", class_="accused" if accused else None),
        tag("span", f"{_process_facts(brief)} ", class_="soft"),
        tag("code", " ".join(brief.argv)),
    )


def _target(decision: Decision) -> str:
    return story.process_words(decision.target) if decision.target else "nobody: its process is not certain"
