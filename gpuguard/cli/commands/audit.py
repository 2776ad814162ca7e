"""``gpuguard audit``: is the log whole, and what does it say."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from gpuguard.cli.arguments import TO_READ
from gpuguard.cli.output import EXIT_CLEAR, EXIT_FOUND, EXIT_UNREADABLE, complain, reason_of, write_line

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from gpuguard.broker.audit import Entry


@click.group()
def command() -> None:
    """Check and show the audit log.

    \b
    Examples:
      gpuguard audit verify
      gpuguard audit verify /backup/gpuguard/
      gpuguard audit show -o json --last 100
    """


@command.command()
@click.argument("path", required=False, type=TO_READ)
@click.option("-o", "--output", type=click.Choice(["text", "json"]), default="text", help="Form of the output.")
def verify(path: Path | None, output: str) -> None:
    """Check the chain of PATH: a log folder (the host's own, if not given), or one file of it by itself.

    Exit status 0: whole, 1: broken (says where), 3: cannot be read. Keep the printed head elsewhere: with it, even
    somebody who may rewrite the whole log cannot do so unseen.
    """
    from gpuguard.broker import audit

    path = _place(path)
    try:
        report = audit.verify(path)
    except OSError as error:
        complain(f"gpuguard: {_why_not(path, error)}")
        sys.exit(EXIT_UNREADABLE)
    if output == "json":
        write_line(report)
    elif report.ok:
        span = f"{report.first_seq} to {report.last_seq}"
        click.echo(f"whole: {report.entries} entries, {span}, head {report.head_sha256}" if report.entries
                   else f"whole: no entry in {path}")
    else:
        where = f"{report.file} line {report.line}" if report.line else report.file
        click.echo(f"broken at {where}: {report.problem}; {report.entries} entries before it are whole")
    sys.exit(EXIT_CLEAR if report.ok else EXIT_FOUND)


@command.command()
@click.argument("path", required=False, type=TO_READ)
@click.option("--last", type=click.IntRange(1, 100_000), default=50, show_default=True, help="How many entries.")
@click.option("-o", "--output", type=click.Choice(["table", "json"]), default="table", help="Form of the output.")
def show(path: Path | None, last: int, output: str) -> None:
    """Show the last entries, oldest first. Exit status 0: the log is whole, 1: broken, 3: cannot be read."""
    from collections import deque

    from gpuguard.broker import audit

    path = _place(path)
    try:
        entries = deque(audit.read(path), maxlen=last)
        report = audit.verify(path)
    except OSError as error:
        complain(f"gpuguard: {_why_not(path, error)}")
        sys.exit(EXIT_UNREADABLE)
    if output == "json":
        for entry in entries:
            write_line(entry)
    else:
        _print(entries)
    if not report.ok:
        complain(f"gpuguard: {path}: broken, and shown as far as it can be read: gpuguard audit verify")
        sys.exit(EXIT_FOUND)


def _print(entries: Iterable[Entry]) -> None:
    from rich.console import Console
    from rich.table import Table

    from gpuguard.cli.tables import day_and_time, escape

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("no.", "time (UTC)", "by", "what", "about", "text"):
        table.add_column(name, overflow="fold")
    for entry in entries:
        body = entry.body
        about = body.get("decision_id") or body.get("id") or ""
        text = body.get("text") or body.get("reason") or ""
        table.add_row(str(entry.seq), day_and_time(entry.time_ns), entry.source, escape(entry.kind), escape(str(about)),
                      escape(str(text)))
    Console().print(table)


def _why_not(path: Path, error: OSError) -> str:
    from gpuguard import paths

    others = isinstance(error, FileNotFoundError) and path == paths.log_dir() and paths.guarded_by_another()
    return "the guard of this host is root's: ask as root" if others else reason_of(path, error)


def _place(path: Path | None) -> Path:
    from gpuguard import paths

    return path or paths.log_dir()
