"""What the commands share that act by hand: ``stop``, ``release`` and ``disarm``."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import click

from gpuguard.cli.output import EXIT_CLEAR, EXIT_UNREADABLE, complain, write_line
from gpuguard.ui.markup import visible

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from gpuguard.core.records import ActionOutcome

output_option = click.option("-o", "--output", type=click.Choice(["text", "json"]), default="text",
                             help="Form of the output.")
reason_option = click.option("--reason", default="", help="Why, for the audit log.")


@contextlib.contextmanager
def or_say(failure: str) -> Iterator[None]:
    """Make of whatever keeps a person from acting one line on stderr, which begins so, and exit status 3."""
    from gpuguard.broker.audit import AuditFailed
    from gpuguard.broker.journal import JournalFailed, JournalLocked
    from gpuguard.broker_client import BrokerGone
    from gpuguard.proctree import Refusal

    try:
        yield
    except (Refusal, BrokerGone, JournalLocked, JournalFailed, AuditFailed, OSError) as error:
        complain(f"{failure}: {error}")
        raise SystemExit(EXIT_UNREADABLE) from error


def show(outcomes: Sequence[ActionOutcome], output: str, line: Callable[[ActionOutcome], str]) -> None:
    """Print what became of each act: as JSON, or as ``line`` puts it."""
    for one in outcomes:
        if output == "json":
            write_line(one)
        else:
            click.echo(visible(line(one)))


def exit_status(outcomes: Sequence[ActionOutcome], *good: str) -> int:
    """Return 0 if every act came out as one of these."""
    return EXIT_CLEAR if all(one.outcome in good for one in outcomes) else EXIT_UNREADABLE
