"""``gpuguard incidents``: what the running guard found, or what a recording shows."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Literal

import click

from gpuguard.cli.arguments import TO_READ
from gpuguard.cli.asking import recorded_incidents, running_guard, socket_option
from gpuguard.cli.output import complain, write_line

if TYPE_CHECKING:
    from pathlib import Path

    from gpuguard.api.client import Client
    from gpuguard.core.events import Incident


@click.command()
@click.option("--state", type=click.Choice(["open", "closed", "all"]), default="all", show_default=True,
              help="Open: something in it still stands accused.")
@click.option("--limit", type=click.IntRange(1, 1000), default=100, show_default=True,
              help="At most so many, those that changed last.")
@click.option("-w", "--watch", is_flag=True, help="Go on, and print each as it changes.")
@click.option("--recording", type=TO_READ, help="Ask a recording instead of a guard.")
@socket_option
@click.option("-o", "--output", type=click.Choice(["table", "json"]), default="table", show_default=True,
              help="json: one incident a line.")
def command(*, state: str, limit: int, watch: bool, recording: Path | None, socket: Path | None, output: str) -> None:
    """List incidents: all findings of one story, with the tool call behind them.

    \b
    Examples:
      gpuguard incidents --state open
      gpuguard incidents --watch -o json | jq -r .title
      gpuguard incidents --recording incident/
    """
    if recording and watch:
        raise click.UsageError("--watch asks a running guard; a recording does not change")
    if recording:
        shown = [one for one in recorded_incidents(recording) if state in ("all", one.state)]
        _show(shown[-limit:], output)
        return
    with running_guard(socket) as guard:
        asked: Literal["", "open", "closed"] = "" if state == "all" else state  # type: ignore[assignment]
        shown, token = guard.incidents_and_token(asked, limit)
        _show(shown, output)
        if watch:
            _follow(guard, token, state, output)


def _show(incidents: list[Incident], output: str) -> None:
    if output == "json":
        for one in incidents:
            write_line(one)
        sys.stdout.flush()
        return
    from rich.console import Console

    from gpuguard.cli.incident_view import incidents_table

    Console().print(incidents_table(incidents) if incidents else "no incidents")


def _follow(guard: Client, token: str, state: str, output: str) -> None:
    from gpuguard.core.events import Incident

    try:
        for _, item in guard.watch(token):
            if not isinstance(item, Incident):
                complain(f"gap: {item.reason}")
            elif state in ("all", item.state):
                _show([item], output)
    except KeyboardInterrupt:
        return
