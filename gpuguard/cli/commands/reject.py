"""``gpuguard reject``: a person's no to what policy asked."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from gpuguard.cli.answering import answer, answer_options

if TYPE_CHECKING:
    from pathlib import Path


@click.command()
@answer_options
def command(decision: str, reason: str, by: str, socket: Path | None) -> None:
    """Say no to a decision that waits for a person.

    The finding stays; what was decided is not done.

    \b
    Example:
      gpuguard reject D-91c0 --reason "a benchmark, agreed"
    """
    answer(decision, "reject", reason, by, socket)
