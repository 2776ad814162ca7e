"""``gpuguard reject``: a person's no to what policy asked."""

from __future__ import annotations

from pathlib import Path

import click

from gpuguard.cli.answering import answer


@click.command()
@click.argument("decision", metavar="ID")
@click.option("--reason", default="", help="Why; goes into the audit log.")
@click.option("--by", default="", help="Who answers; your user name if not given.")
@click.option("--socket", type=click.Path(path_type=Path), help="The guard's socket, if not the usual one.")
def command(decision: str, reason: str, by: str, socket: Path | None) -> None:
    """Say no to a decision that waits for a person.

    The finding stays; what was decided is not done.

    \b
    Example:
      gpuguard reject D-91c0 --reason "a benchmark, agreed"
    """
    answer(decision, "reject", reason, by, socket)
