"""One incident for people: who asked, what ran, where it went, what it did to the GPU, and how sure we are of it.

And one process or GPU, be it in an incident or not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec.structs import replace
from rich.table import Table
from rich.tree import Tree

from gpuguard.cli.asking import said_of, waiting
from gpuguard.cli.tables import STYLES, day_and_time, escape
from gpuguard.core.fusion import likelihood
from gpuguard.core.subjects import DeviceId, FlowId, ProcessId

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from rich.console import Console

    from gpuguard.core.events import Decision, Finding, Incident, ProcessBrief
    from gpuguard.core.evidence import Evidence
    from gpuguard.core.guard import Explanation
    from gpuguard.core.records import Gap, ToolCall

Moment = tuple[int, str, str]


def print_incident(incident: Incident, console: Console) -> None:
    """Print all that an incident says."""
    print_story(incident, console)
    for finding in incident.findings:
        _print_finding(finding, console)
    _print_gaps((gap for finding in incident.findings for gap in finding.gaps), console)
    _print_decisions(incident, console)


def print_explanation(told: Explanation, console: Console) -> None:
    """Print how one process or GPU stands, and what is known of those that it is told with."""
    console.print(f"[bold]{escape(_process(told.process) if told.process else f'GPU {told.subject}')}[/]")
    if told.process:
        console.print(f"[dim]{escape(' '.join(told.process.argv))}[/]", soft_wrap=True)
        console.print(f"[dim]started {told.process.process.start_ticks} clock ticks after boot[/]")
    silence = "" if told.findings else ": nothing is held for or against it"
    console.print(f"at {day_and_time(told.time_ns)} UTC{silence}")
    for finding in told.findings:
        whose = finding.process if isinstance(finding.subject, ProcessId) else None
        of = _process(whose) if whose else f"{_kind(finding)} {finding.subject}"
        _print_finding(finding, console, "" if finding.subject == told.subject else f" of {of}")
    if told.left_out:
        console.print(f"\nand {told.left_out} more")
    _print_gaps(told.gaps, console)


def print_story(incident: Incident, console: Console) -> None:
    """Print what happened, in order: who led to what, and when."""
    console.print(f"{_verdict(incident.verdict)} [bold]{escape(incident.title)}[/]")
    console.print(f"incident {incident.id}, {incident.state}, since {day_and_time(incident.start_ns)} UTC, "
                  f"last change {day_and_time(incident.time_ns)}\n")
    console.print(_chain(incident))
    _print_timeline(incident, console)


def incidents_table(incidents: Sequence[Incident]) -> Table:
    """Return one row an incident; what waits for a person has a column where anything does."""
    answers = [", ".join(f"{decision.rung} {decision.id}" for decision in waiting(one)) for one in incidents]
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("id", "since (UTC)", "state", "verdict", "what", *(["waits for"] if any(answers) else [])):
        table.add_column(name, overflow="fold")
    for one, answer in zip(incidents, answers, strict=True):
        cells = [one.id, day_and_time(one.start_ns), one.state, _verdict(one.verdict), escape(one.title), answer]
        table.add_row(*cells[:len(table.columns)])
    return table


def moments(incident: Incident) -> list[Moment]:
    """Return the incident's timeline: (time_ns, kind, words), in order."""
    found: list[Moment] = [(c.start_ns, "tool call", _call(c)) for c in incident.tool_calls]
    for finding in incident.findings:
        found.append((finding.start_ns, _kind(finding), f"first record of {finding.subject}"))
        found += [(e.time_ns, e.evidence_class, f"{e.text} ({e.nats:+.1f} nats)") for e in _all_evidence(finding)]
        if finding.verdict in ("suspect", "confirmed"):
            decided_ns = finding.start_ns + round(finding.decided_after_s * 1e9)
            found.append((decided_ns, "verdict", f"{finding.label} {finding.verdict}: {finding.subject}"))
    found += [(d.time_ns, "policy", _decision(_in_short(d))) for d in incident.decisions]
    found += [(o.time_ns, "action", f"{o.action} {o.outcome}: {o.text}") for o in incident.outcomes]
    return sorted(dict.fromkeys(found), key=lambda moment: moment[0])  # two findings of one flow share what was seen


def _verdict(word: str) -> str:
    return f"[{STYLES[word]}]{word}[/]"


def _kind(finding: Finding) -> str:
    match finding.subject:
        case FlowId():
            return "flow"
        case DeviceId():
            return "GPU"
        case _:
            return "process"


def _all_evidence(finding: Finding) -> Iterator[Evidence]:
    yield from finding.evidence
    yield from finding.counter_evidence


def _call(call: ToolCall) -> str:
    agent = f" by {call.agent_name}" if call.agent_name else ""
    return f"{call.tool_name}{agent} {call.arguments}".rstrip()


def _decision(decision: Decision) -> str:
    asked = ", waits for a person" if decision.needs_approval else ""
    by = f", approved by {decision.approved_by}" if decision.approved_by else ""
    only = " (observe: only written down)" if decision.mode == "observe" else ""
    return f"rule {decision.rule}: {said_of(decision)}{asked}{by}{only}"


def _in_short(decision: Decision) -> Decision:
    """Return the decision with what it was about; the evidence behind it stands in a line of its own."""
    return replace(decision, reason=decision.reason.partition(": ")[0])


def _process(process: ProcessBrief) -> str:
    context = process.context
    where = [f"{name} {value}" for name, value in (
        ("user", process.user), ("job", context.slurm_job_id), ("pod", context.pod_uid),
        ("sandbox", context.sandbox_id), ("container", context.container_id[:12]), ("cgroup", process.cgroup),
    ) if value]
    return f"{process.name or 'process'} ({process.process})" + (f": {', '.join(where)}" if where else "")


def _chain(incident: Incident) -> Tree:
    """Return who led to what: tool call, process, flow or GPU."""
    tree = Tree("how it came about", guide_style="dim", highlight=False)
    calls = {call.span_id: tree.add(f"tool call [bold]{escape(_call(call))}[/]") for call in incident.tool_calls}
    processes: dict[object, Tree] = {}
    for finding in incident.findings:
        above = calls.get(finding.tool_call.span_id, tree) if finding.tool_call else tree
        if finding.process:
            key = finding.process.process
            if key not in processes:
                processes[key] = above.add(f"process {escape(_process(finding.process))}")
            above = processes[key]
        what = "GPU" if any(e.evidence_class in ("launch", "code", "counter") for e in finding.evidence) else ""
        what = {"flow": "flow ", "GPU": "GPU "}.get(_kind(finding), f"{what} " if what else "")
        subject = escape(str(finding.subject)) if _kind(finding) != "process" else ""
        above.add(f"{what}{subject} [bold]{finding.label}[/] {_verdict(finding.verdict)}".replace("  ", " ").strip())
    return tree


def _print_timeline(incident: Incident, console: Console) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold", title_justify="left")
    table.add_column("after", justify="right")
    table.add_column("what")
    table.add_column("", overflow="fold")
    for time_ns, kind, words in moments(incident):
        table.add_row(f"{(time_ns - incident.start_ns) / 1e9:+.3f} s", kind, escape(words))
    console.print("\n[bold]timeline[/]")
    console.print(table)


def _print_finding(finding: Finding, console: Console, of: str = "") -> None:
    carrier = f" over {finding.carrier}" if finding.carrier else ""
    decided = "undecided" if finding.verdict == "unknown" else "decided"
    console.print(f"\n{_verdict(finding.verdict)} [bold]{finding.label}[/]{escape(carrier + of)}, "
                  f"probability {likelihood(finding.probability)} ({finding.nats:+.1f} nats), "
                  f"{decided} after {finding.decided_after_s:.2f} s  [dim]{finding.id}[/]")
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(justify="right")
    table.add_column()
    table.add_column(overflow="fold")
    for evidence in finding.evidence:
        table.add_row(f"{evidence.nats:+.1f}", evidence.evidence_class, escape(evidence.text))
    for evidence in finding.counter_evidence:
        table.add_row(f"{evidence.nats:+.1f}", evidence.evidence_class, f"[green]against:[/] {escape(evidence.text)}")
    console.print(table)
    for spot in _unique(spot for evidence in _all_evidence(finding) for spot in evidence.blind_spots):
        console.print(f"[dim]blind spot:[/] {escape(spot)}")


def _print_gaps(gaps: Iterable[Gap], console: Console) -> None:
    told = _unique(f"{gap.sensor}: {gap.reason}" for gap in gaps)
    if told:
        console.print("\n[bold]what could not be looked at[/]")
    for gap in told:
        console.print(f"[yellow]gap[/] {escape(gap)}")


def _print_decisions(incident: Incident, console: Console) -> None:
    if incident.decisions:
        console.print("\n[bold]what policy did[/]")
    for decision in incident.decisions:
        console.print(f"{decision.id}  {escape(_decision(decision))}")
        for outcome in incident.outcomes:
            if outcome.decision_id == decision.id:
                console.print(f"    {outcome.outcome}: {escape(outcome.text)}")
    for decision in waiting(incident):
        console.print(f"\n[bold]waits for you:[/] gpuguard approve {decision.id}  |  gpuguard reject {decision.id}")


def _unique(items: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(items))
