"""``gpuguard stop``: the red button. Pause an agent, a job or a process tree at once, by hand."""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING

import click

from gpuguard.cli.acting import exit_status, or_say, output_option, reason_option, show

if TYPE_CHECKING:
    from gpuguard.core.subjects import ProcessId

ROOTS_MAX = 256
_SPAN = re.compile(r"^(\d{1,9})(s|m|h)?$")
_SECONDS = {None: 1, "s": 1, "m": 60, "h": 3600}


def seconds(_: click.Context, __: click.Parameter, value: str) -> int:
    """Return a span such as 90s, 30m or 2h in seconds."""
    found = _SPAN.match(value)
    if not found or int(found.group(1)) == 0:
        raise click.BadParameter(f"{value!r} is not a span such as 90s, 30m or 2h")
    return int(found.group(1)) * _SECONDS[found.group(2)]


@click.command()
@click.option("--agent", help="Sandbox id, container id (12 digits or more), or name of a cgroup.")
@click.option("--job", help="Slurm or Ray job id.")
@click.option("--pid", type=click.IntRange(min=2), help="One process and all that it started.")
@click.option("--for", "ttl_s", default="1h", callback=seconds, show_default=True, help="Let go after so long.")
@reason_option
@output_option
def command(*, agent: str | None, job: str | None, pid: int | None, ttl_s: int, reason: str, output: str) -> None:
    """Pause a whole tree at once. Works with and without a running guard, also when enforcement is disarmed.

    \b
    Examples:
      gpuguard stop --agent sandbox-42
      gpuguard stop --job 31337 --for 30m --reason "talks to a mining pool"
      gpuguard stop --pid 4242

    Nothing is lost: `gpuguard release ID` lets it go on where it stood. Exit status 0: stopped, 2: wrong usage,
    3: something could not be stopped.
    """
    if sum(one is not None for one in (agent, job, pid)) != 1 or "" in (agent, job):
        raise click.UsageError("name one of --agent, --job and --pid")
    from gpuguard.broker import control

    with or_say("not stopped"):
        roots = _roots(agent, job, pid)
        with control.session() as session:
            outcomes = [one for root in roots
                        for one in session.stop(control.request_for(root, ttl_s, reason or "stopped by hand"))]
            has_broker = session.has_broker
    show(outcomes, output, lambda one: f"{one.decision_id}  {one.outcome}  {one.process}: {one.text}")
    if output == "text" and not has_broker and any(one.outcome == "done" for one in outcomes):
        click.echo("no guard is running: nothing lets them go by itself before one does; `gpuguard release ID` does")
    sys.exit(exit_status(outcomes, "done"))


def _roots(agent: str | None, job: str | None, pid: int | None) -> list[ProcessId]:
    from gpuguard import proctree

    if pid is not None:
        return [proctree.identify(pid)]
    roots = proctree.agent_roots(agent) if agent else proctree.job_roots(job or "")
    if not roots:
        raise proctree.Refusal(f"no process belongs to {'agent ' + agent if agent else 'job ' + str(job)}")
    if len(roots) > ROOTS_MAX:
        raise proctree.Refusal(f"{len(roots)} trees match, more than {ROOTS_MAX}: name it more narrowly")
    return roots
