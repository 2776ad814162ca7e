"""``gpuguard explain``: one incident in full."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from gpuguard.cli.arguments import TO_READ
from gpuguard.cli.asking import matching, recorded_incidents, running_guard, socket_option
from gpuguard.cli.output import EXIT_UNREADABLE, complain, write_line

if TYPE_CHECKING:
    from pathlib import Path

    from gpuguard.core.events import Incident


@click.command()
@click.argument("wanted", metavar="ID")
@click.option("--recording", type=TO_READ, help="Ask a recording instead of a guard.")
@socket_option
@click.option("-o", "--output", type=click.Choice(["text", "json", "html"]), default="text", show_default=True,
              help="json: the incident as one line; html: a page on standard output.")
def command(wanted: str, recording: Path | None, socket: Path | None, output: str) -> None:
    """Explain an incident: timeline, verdicts, evidence and counter-evidence, gaps, decisions.

    ID is an incident's, or that of a finding or decision in it; its beginning is enough.

    \b
    Examples:
      gpuguard explain I-3f2a
      gpuguard explain D-91c0 --recording incident/ -o json
      gpuguard explain I-3f2a -o html > incident.html
    """
    if recording:
        incidents = recorded_incidents(recording)
    else:
        with running_guard(socket) as guard:
            incidents = guard.incidents()
    incident = _only(matching(incidents, wanted), wanted)
    if output == "json":
        write_line(incident)
        return
    if output == "html":
        from gpuguard.ui.report import incident_page

        click.echo(incident_page(incident), nl=False)
        return
    from rich.console import Console

    from gpuguard.cli.incident_view import print_incident

    print_incident(incident, Console())


def _only(found: list[Incident], wanted: str) -> Incident:
    if len(found) == 1:
        return found[0]
    which = ", ".join(one.id for one in found[:8])
    said = f"{wanted} could be any of {which}" if found else f"no incident, finding or decision {wanted}"
    complain(f"gpuguard: {said}; see `gpuguard incidents`")
    raise SystemExit(EXIT_UNREADABLE)
