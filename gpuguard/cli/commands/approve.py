"""``gpuguard approve``: a person's yes to what policy asked."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from gpuguard.cli.answering import answer, answer_options

if TYPE_CHECKING:
    from pathlib import Path


@click.command()
@answer_options
def command(decision: str, reason: str, by: str, socket: Path | None) -> None:
    """Let a decision be carried out that waits for a person.

    Only what still stands is carried out: the process alive, the finding confirmed.

    \b
    Example:
      gpuguard approve D-91c0 --reason "seen with the owner of the job"
    """
    answer(decision, "approve", reason, by, socket)
