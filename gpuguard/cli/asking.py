"""What the commands share that ask a running guard, or a recording in its place."""

from __future__ import annotations

import contextlib
import itertools
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gpuguard.cli.output import EXIT_UNREADABLE, complain, reason_of
from gpuguard.ui.markup import visible

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gpuguard.api.client import Client
    from gpuguard.core.events import Decision, Incident
    from gpuguard.core.guard import Explanation


socket_option = click.option("--socket", type=click.Path(path_type=Path),
                             help="The guard's socket, if not the usual one.")


@contextlib.contextmanager
def running_guard(socket: Path | None) -> Iterator[Client]:
    """Connect to the guard; whatever goes wrong is one line on stderr and exit status 3."""
    from gpuguard.api.client import NoGuard, NotThere, Refused, connect

    try:
        with connect(socket) as client:
            yield client
    except (NoGuard, NotThere, Refused) as error:
        complain(f"gpuguard: {error}")
        raise SystemExit(EXIT_UNREADABLE) from error


def recorded_incidents(path: Path) -> list[Incident]:
    """Return the incidents of a recording, the one that changed last at the end."""
    from gpuguard.core.events import Incident
    from gpuguard.replaying import replay

    found: dict[str, Incident] = {}
    with _readable(path):
        for event in replay(path):
            if isinstance(event, Incident):
                found.pop(event.id, None)
                found[event.id] = event
    return list(found.values())


def recorded_explanation(path: Path, of: int | str) -> Explanation:
    """Return how a process or GPU stood at the end of a recording, or of its last run that knew it."""
    from gpuguard.replaying import judged

    found: Explanation | None = None
    with _readable(path):
        for guard, steps in itertools.groupby(judged(path), key=lambda step: step[0]):
            for _ in steps:
                pass
            found = guard.explain(of) or found
    if found is None:
        complain(f"gpuguard: {path}: nothing is known of {'pid' if isinstance(of, int) else 'GPU'} {of}")
        raise SystemExit(EXIT_UNREADABLE)
    return found


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    from gpuguard.recording.codec import RecordingError

    try:
        yield
    except (RecordingError, OSError) as error:
        complain(f"gpuguard: {reason_of(path, error)}")
        raise SystemExit(EXIT_UNREADABLE) from error


def waiting(incident: Incident) -> list[Decision]:
    """Return the decisions of an incident that still ask for a person, as far as it tells."""
    settled = {outcome.decision_id for outcome in incident.outcomes}
    settled |= {decision.id for decision in incident.decisions if decision.approved_by}
    return [one for one in incident.decisions if one.needs_approval and one.id not in settled]


def matching(incidents: list[Incident], wanted: str) -> list[Incident]:
    """Return the incidents that an id, or the beginning of one, names: their own, a finding's or a decision's."""

    def names(incident: Incident) -> list[str]:
        return [incident.id, *(f.id for f in incident.findings), *(d.id for d in incident.decisions)]

    exact = [incident for incident in incidents if wanted in names(incident)]
    return exact or [one for one in incidents if any(name.startswith(wanted) for name in names(one))]


def said_of(decision: Decision) -> str:
    """Return a decision in a few words: what, to whom, why."""
    target = decision.target
    whom = f"{target.name} ({target.process})" if target else "nobody certain"
    return visible(f"{decision.rung} {whom}: {decision.reason}")
