"""``gpuguard disarm``: turn enforcement off and undo everything."""

from __future__ import annotations

import sys

import click

from gpuguard.cli.acting import exit_status, or_say, output_option, reason_option, show
from gpuguard.cli.output import EXIT_CLEAR, EXIT_UNREADABLE, write_line


@click.command()
@click.option("--lift", is_flag=True, help="Let the guard act again.")
@reason_option
@output_option
def command(*, lift: bool, reason: str, output: str) -> None:
    """Keep the guard from acting, from now on and across restarts, and undo everything that is in force.

    \b
    Examples:
      gpuguard disarm --reason "maintenance"
      gpuguard disarm --lift

    The guard goes on watching and says what it would have done. `gpuguard stop` still works: that is a person.
    Exit status 0: done, 2: wrong usage, 3: something could not be undone.
    """
    from gpuguard import paths
    from gpuguard.broker import control

    if paths.guarded_by_another():
        click.echo("not disarmed: the guard of this host is root's: ask as root", err=True)
        sys.exit(EXIT_UNREADABLE)
    with or_say("not disarmed"):
        if lift:
            lifted = control.lift()
            if output == "json":
                write_line({"lifted": lifted})
            else:
                click.echo("lifted: a guard that is started from now on may act; one that runs stays disarmed until "
                           "then" if lifted else "it was not disarmed")
            sys.exit(EXIT_CLEAR)
        with control.session() as session:
            outcomes = session.disarm(reason or f"disarmed by {control.operator()}")
    show(outcomes, output,
         lambda one: f"{one.action}  {one.outcome}  {one.process or ''}: {one.text}".replace("  : ", ": "))
    sys.exit(exit_status(outcomes, "done", "undone"))
