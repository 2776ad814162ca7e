"""``gpuguard release``: undo what is in force, with or without a running guard."""

from __future__ import annotations

import sys

import click

from gpuguard.cli.acting import exit_status, or_say, output_option, show


@click.command()
@click.argument("decision", metavar="ID", required=False)
@click.option("--all", "everything", is_flag=True, help="Undo everything.")
@click.option("--leftovers", is_flag=True, help="Undo what a guard that was killed left in force.")
@click.option("--list", "listing", is_flag=True, help="Only say what is in force.")
@output_option
def command(*, decision: str | None, everything: bool, leftovers: bool, listing: bool, output: str) -> None:
    """Undo one act or all of them, as the journal knows them; also those of a guard that was killed.

    \b
    Examples:
      gpuguard release --list
      gpuguard release stop-1a2b3c4d
      gpuguard release --all

    Only processes that GPUGuard stopped go on; --leftovers leaves alone what a person stopped. Exit status 0: undone,
    2: wrong usage, 3: something could not be.
    """
    if sum((decision is not None, everything, leftovers, listing)) != 1:
        raise click.UsageError("name an ID, --all, --leftovers or --list")
    from gpuguard import paths
    from gpuguard.broker import control

    if paths.guarded_by_another():
        click.echo("what the guard of this host holds in force is not told here: it is root's, ask as root", err=True)
    with or_say("not released"), control.session() as session:
        if listing:
            outcomes = session.in_force()
        elif leftovers:
            outcomes = session.recover()
        else:
            outcomes = session.release(decision or "", f"released by {control.operator()}")
    show(outcomes, output,
         lambda one: f"{one.decision_id}  {one.action}  {one.outcome}{f'  {one.process}' if one.process else ''}: "
                     f"{one.text}")
    if not outcomes and output == "text":
        click.echo("nothing is in force")
    sys.exit(exit_status(outcomes, "done", "undone"))
