"""``gpuguard approve``: a person's yes to what policy asked."""

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
    """Let a decision be carried out that waits for a person.

    Only what still stands is carried out: the process alive, the finding confirmed.

    \b
    Example:
      gpuguard approve D-91c0 --reason "seen with the owner of the job"
    """
    answer(decision, "approve", reason, by, socket)
