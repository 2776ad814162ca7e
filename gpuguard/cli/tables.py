"""Tables for people."""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape as escape_markup
from rich.table import Table

from gpuguard.ui.markup import visible

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gpuguard.core.events import Finding
    from gpuguard.core.records import Gap

#: In fewer columns what a finding rests on would stand one word a line.
WIDE_COLUMNS = 120
STYLES = {"confirmed": "bold red", "suspect": "yellow", "clear": "green", "unknown": "dim"}


def clock(time_ns: int) -> str:
    """Return a time of day to the millisecond, UTC."""
    return _written(time_ns, "%H:%M:%S.%f")[:-3]


def day_and_time(time_ns: int) -> str:
    """Return a date and a time of day to the second, UTC."""
    return _written(time_ns, "%Y-%m-%d %H:%M:%S")


def _written(time_ns: int, form: str) -> str:
    """Return a time in UTC; one out of the calendar's reach, which only a changed log holds, as it is."""
    try:
        return datetime.fromtimestamp(time_ns / 1e9, UTC).strftime(form)
    except (ValueError, OverflowError, OSError):
        return f"{time_ns} ns"


def escape(text: str) -> str:
    """Return text that others chose, safe to print: neither markup nor anything that moves a terminal's cursor."""
    return escape_markup(visible(text))


def print_findings(findings: Sequence[Finding], gaps: Sequence[Gap]) -> None:
    """Print one row a finding, how many flows there are beside them, then what could not be looked at."""
    console = Console()
    wide = console.width >= WIDE_COLUMNS
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("start (UTC)", "verdict", *(("label", "subject", "process", "because") if wide else ("what",))):
        table.add_column(name, overflow="fold")
    told = [finding for finding in findings if finding.label != "other"]
    for finding in told:
        strongest = max(finding.evidence, key=lambda e: e.nats, default=None)
        process = finding.process
        who = [finding.label, escape(str(finding.subject)),
               escape(f"{process.name} ({process.process.pid})") if process else ""]
        because = escape(strongest.text) if strongest else ""
        table.add_row(clock(finding.start_ns), f"[{STYLES[finding.verdict]}]{finding.verdict}[/]",
                      *([*who, because] if wide else [f"{', '.join(filter(None, who))}\n{because}".rstrip()]))
    console.print(table if told else "nothing seen")
    if dull := len(findings) - len(told):
        console.print(f"{dull} flows in which nothing was seen")
    for (sensor, reason), times in Counter((gap.sensor, gap.reason) for gap in gaps).items():
        often = f" ({times} times)" if times > 1 else ""
        console.print(f"[yellow]gap[/] {escape(sensor)}: {escape(reason)}{often}")
