"""A person's answer to a decision: what ``approve`` and ``reject`` have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import click

from gpuguard.cli.asking import matching, running_guard, said_of, socket_option, waiting
from gpuguard.cli.output import EXIT_UNREADABLE, complain

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from gpuguard.core.events import Decision, Incident


def answer_options(command: Callable[..., None]) -> Callable[..., None]:
    """Let a command be told which decision is meant, why, by whom, and where the guard is asked."""
    command = socket_option(command)
    command = click.option("--by", default="", help="Who answers; your user name if not given.")(command)
    command = click.option("--reason", default="", help="Why; goes into the audit log.")(command)
    return click.argument("decision", metavar="ID")(command)


def answer(wanted: str, word: Literal["approve", "reject"], reason: str, by: str, socket: Path | None) -> None:
    """Give the answer, and say what it was about. An incident's id answers nothing: it may hold several decisions."""
    with running_guard(socket) as guard:
        decision = _named(guard.incidents(), wanted)
        if word == "approve":
            _tell_broker(decision, by, reason)
        guard.decide(decision.id, word, reason=reason, by=by)
    done = "approved" if word == "approve" else "rejected"
    click.echo(f"{done} {decision.id}: {said_of(decision)}")


def _tell_broker(decision: Decision, by: str, reason: str) -> None:
    """Give the approval to who acts on it. The guard reads what strangers send: its word alone kills nobody."""
    from gpuguard.broker.control import approve
    from gpuguard.broker_client import BrokerGone

    if decision.target is None:
        return
    try:
        approve(decision.id, decision.target.process, reason, by)
    except (BrokerGone, OSError) as error:
        complain(f"gpuguard: the broker did not take the approval: {error}")
        raise SystemExit(EXIT_UNREADABLE) from error


def _named(incidents: list[Incident], wanted: str) -> Decision:
    found = [one for incident in incidents for one in waiting(incident) if one.id == wanted]
    if found:
        return found[0]
    meant = [one for incident in matching(incidents, wanted) for one in waiting(incident)]
    lines = [f"  {one.id}  {said_of(one)}" for one in meant or [d for i in incidents for d in waiting(i)]]
    said = f"gpuguard: no decision {wanted} waits for an answer" + ("; these do:" if lines else ", nor does any other")
    for line in (said, *lines):
        complain(line)
    raise SystemExit(EXIT_UNREADABLE)
