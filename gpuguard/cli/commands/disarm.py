"""``gpuguard disarm``: turn enforcement off and undo everything."""

from __future__ import annotations

import sys

import click

from gpuguard.cli.output import EXIT_CLEAR, EXIT_UNREADABLE, write_line


@click.command()
@click.option("--lift", is_flag=True, help="Let the guard act again.")
@click.option("--reason", default="", help="Why, for the audit log.")
@click.option("-o", "--output", type=click.Choice(["text", "json"]), default="text", help="Form of the output.")
def command(*, lift: bool, reason: str, output: str) -> None:
    """Keep the guard from acting, from now on and across restarts, and undo everything that is in force.

    \b
    Examples:
      gpuguard disarm --reason "maintenance"
      gpuguard disarm --lift

    The guard goes on watching and says what it would have done. `gpuguard stop` still works: that is a person.
    Exit status 0: done, 2: wrong usage, 3: something could not be undone.
    """
    from gpuguard import control
    from gpuguard.audit import AuditFailed
    from gpuguard.broker_client import BrokerGone
    from gpuguard.journal import JournalFailed, JournalLocked

    try:
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
    except (BrokerGone, JournalLocked, JournalFailed, AuditFailed, OSError) as error:
        click.echo(f"not disarmed: {error}", err=True)
        sys.exit(EXIT_UNREADABLE)
    for one in outcomes:
        if output == "json":
            write_line(one)
        else:
            click.echo(f"{one.action}  {one.outcome}  {one.process or ''}: {one.text}".replace("  : ", ": "))
    sys.exit(EXIT_CLEAR if all(one.outcome in {"done", "undone"} for one in outcomes) else EXIT_UNREADABLE)
