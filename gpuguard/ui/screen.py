"""Incidents on a terminal: the same story as the page, in a hundred columns."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gpuguard.ui import story
from gpuguard.ui.markup import visible

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gpuguard.core.events import Finding, Incident
    from gpuguard.core.evidence import Evidence
    from gpuguard.ui.report import LeftAlone, Measure

WIDTH = 100
BAR = 12
NATS_FULL = 14.0

#: A line below the head, nothing else.
_HEAD = box.Box("    \n    \n ── \n    \n    \n    \n    \n    \n")

VERDICT_STYLES = {"confirmed": "bold red", "suspect": "bold yellow", "clear": "green", "unknown": "dim"}
CLASS_STYLES = {
    "network": "cyan", "launch": "magenta", "code": "magenta", "counter": "yellow", "process": "blue",
    "toolcall": "blue", "external": "white",
}


def console_for_people() -> Console:
    """Return a console as wide as the terminal, but no wider than can be read at a glance."""
    return Console(width=min(WIDTH, shutil.get_terminal_size((WIDTH, 24)).columns), highlight=False)


def show_incident(console: Console, incident: Incident) -> None:
    """Write one incident: headline, who asked for what, evidence for and against, and what policy did."""
    found = story.accused(incident)
    zero_ns, _ = story.span_ns(incident)
    console.print()
    console.rule(style="dim")
    console.print(_line(("Incident ", "dim"), (incident.id, "dim"), ("  ", ""), verdict(incident.verdict)))
    console.print(Text(visible(story.headline(incident)), style="bold"))
    heading(console, "Who asked for what")
    console.print(_join(found))
    heading(console, "Evidence", "seconds since the first tool call" if incident.tool_calls else "")
    for number, finding in enumerate(found):
        if number:
            console.print()
        console.print(_line((f" {finding.label} ", "bold"), verdict(finding.verdict),
                            (f"  {finding.nats:.1f} nats, {finding.id}", "dim")))
        console.print(_evidence(finding, zero_ns))
    heading(console, "What policy did")
    console.print(_decisions(incident, zero_ns))


def heading(console: Console, text: str, remark: str = "") -> None:
    """Write a heading."""
    console.print()
    console.print(_line((text, "bold underline"), ("  ", ""), (remark, "dim")))


def verdict(word: str) -> Text:
    """Return a verdict in its colour."""
    return Text(word, style=VERDICT_STYLES.get(word, ""))


def show_measures(console: Console, measures: Sequence[Measure]) -> None:
    """Write measured delays beside their targets."""
    heading(console, "Delays")
    table = _table()
    table.add_column(ratio=1)
    table.add_column(justify="right")
    table.add_column(justify="right", style="dim")
    table.add_column()
    for one in measures:
        met = one.value_s is not None and one.value_s <= one.target_s
        value = "not seen" if one.value_s is None else f"{one.value_s:.2f} s"
        said = Text("met", "green") if met else Text("missed", "bold red")
        table.add_row(one.what, value, f"≤ {one.target_s:g} s", said)
    console.print(table)


def show_left_alone(console: Console, rows: Sequence[LeftAlone]) -> None:
    """Write who was watched and accused of nothing."""
    heading(console, "Watched and left alone")
    table = _table()
    for style in ("", "dim", "green"):
        table.add_column(style=style, overflow="fold")
    for one in rows:
        table.add_row(Text(visible(one.who)), Text(visible(one.what)), Text(visible(one.said)))
    console.print(table)


def _join(found: Sequence[Finding]) -> Table:
    table = _table(header=True)
    for name, ratio in (("Tool call", 5), ("Process", 3), ("Flow or GPU work", 5)):
        table.add_column(name, ratio=ratio, overflow="fold")
    table.add_column("Verdict", no_wrap=True)
    for finding in found:
        call = finding.tool_call
        table.add_row(
            _two(call.tool_name if call else "none known", story.argument_words(call) if call else "no span names it"),
            _two(finding.process.name, f"pid {finding.process.process.pid}") if finding.process
            else Text("not certain", style="dim"),
            _two(finding.label, story.subject_words(finding)),
            verdict(finding.verdict),
        )
    return table


def _evidence(finding: Finding, zero_ns: int) -> Table:
    table = _table()
    table.add_column(no_wrap=True, width=8, justify="right", style="dim")
    table.add_column(no_wrap=True, width=8)
    table.add_column(ratio=1, overflow="fold")
    table.add_column(no_wrap=True, justify="right", width=6)
    table.add_column(no_wrap=True, width=BAR)
    for one in sorted(finding.evidence, key=lambda e: -e.nats):
        table.add_row(*_evidence_row(one, zero_ns))
    for one in finding.counter_evidence:
        table.add_row(*_evidence_row(one, zero_ns), style="dim")
    if not finding.counter_evidence:
        table.add_row("", "", Text("no counter-evidence was seen", style="dim italic"), "", "")
    return table


def _evidence_row(evidence: Evidence, zero_ns: int) -> tuple[Text, ...]:
    style = CLASS_STYLES.get(evidence.evidence_class, "")
    filled = min(BAR, max(1, round(abs(evidence.nats) / NATS_FULL * BAR)))
    return (
        Text(f"{(evidence.time_ns - zero_ns) / 1e9:.2f} s"),
        Text(evidence.evidence_class, style=style),
        Text(visible(evidence.text)),
        Text(f"{evidence.nats:+.1f}"),
        Text("━" * filled, style=style if evidence.nats > 0 else "dim"),
    )


def _decisions(incident: Incident, zero_ns: int) -> Table | Text:
    if not incident.decisions:
        return Text("  Nothing was asked for.", style="dim")
    table = _table()
    table.add_column(no_wrap=True, width=8, justify="right", style="dim")
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    table.add_column(ratio=1, overflow="fold", style="dim")
    for decision in incident.decisions:
        table.add_row(
            f"{(decision.time_ns - zero_ns) / 1e9:.2f} s",
            Text(story.RUNG_WORDS.get(decision.rung, decision.rung), style="bold"),
            Text(visible(story.process_words(decision.target))),
            Text(visible(story.decision_words(incident, decision))),
        )
    return table


def _table(*, header: bool = False) -> Table:
    return Table(box=_HEAD if header else None, show_header=header, header_style="dim", expand=True,
                 padding=(0, 1), pad_edge=True)


def _two(first: str, second: str) -> Text:
    return _line((visible(first), "bold"), ("\n", ""), (visible(second), "dim"))


def _line(*parts: tuple[str, str] | Text) -> Text:
    return Text.assemble(*parts)
