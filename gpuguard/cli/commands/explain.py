"""``gpuguard explain``: one incident in full, or how one process or GPU stands."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from gpuguard.cli.arguments import TO_READ
from gpuguard.cli.asking import matching, recorded_explanation, recorded_incidents, running_guard, socket_option
from gpuguard.cli.output import EXIT_CLEAR, EXIT_FOUND, EXIT_UNREADABLE, complain, write_line

if TYPE_CHECKING:
    from pathlib import Path

    from gpuguard.core.events import Incident
    from gpuguard.core.guard import Explanation

#: PID_MAX_LIMIT of the kernel's include/linux/threads.h.
PID_MAX = 1 << 22


@click.command()
@click.argument("wanted", metavar="[ID]", required=False)
@click.option("--pid", type=click.IntRange(1, PID_MAX), help="How this process stands, accused or not.")
@click.option("--gpu", metavar="UUID", help="How this GPU stands, and who uses it.")
@click.option("--recording", type=TO_READ, help="Ask a recording instead of a guard, of its end.")
@socket_option
@click.option("-o", "--output", type=click.Choice(["text", "json", "html"]), default="text", show_default=True,
              help="json: all of it as one line; html: an incident as a page on standard output.")
def command(
    *, wanted: str | None, pid: int | None, gpu: str | None, recording: Path | None, socket: Path | None, output: str,
) -> None:
    """Explain an incident: timeline, verdicts, evidence and counter-evidence, gaps, decisions.

    ID is an incident's, or that of a finding or decision in it; its beginning is enough.

    --pid and --gpu ask of one process or GPU why it is accused, or why it is not (yet): what speaks for and against
    it, under every label. Exit status then: 0 clear, 1 found, 3 not known.

    \b
    Examples:
      gpuguard explain I-3f2a
      gpuguard explain D-91c0 --recording incident/ -o json
      gpuguard explain I-3f2a -o html > incident.html
      gpuguard explain --pid 4711
    """
    if (wanted, pid, gpu).count(None) != 2:
        raise click.UsageError("one of ID, --pid and --gpu must be given")
    if wanted is None:
        _of_subject(pid or gpu or "", recording, socket, output)
    else:
        _of_incident(wanted, recording, socket, output)


def _of_subject(of: int | str, recording: Path | None, socket: Path | None, output: str) -> None:
    if output == "html":
        raise click.UsageError("only an incident is made into a page; -o text or json for a process or GPU")
    if recording:
        told = recorded_explanation(recording, of)
    else:
        with running_guard(socket) as guard:
            told = guard.explain(of)
    if output == "json":
        write_line(told)
    else:
        from rich.console import Console

        from gpuguard.cli.incident_view import print_explanation

        print_explanation(told, Console())
    raise SystemExit(_status(told))


def _status(told: Explanation) -> int:
    if any(finding.verdict in ("suspect", "confirmed") for finding in told.findings):
        return EXIT_FOUND
    return EXIT_UNREADABLE if any(gap.sensor == "recording" for gap in told.gaps) else EXIT_CLEAR


def _of_incident(wanted: str, recording: Path | None, socket: Path | None, output: str) -> None:
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
