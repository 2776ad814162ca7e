"""``gpuguard doctor``: which eyes are open, why not, and what would open them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from gpuguard.doctor import Check

STYLES = {"open": "green", "degraded": "yellow", "closed": "bold red", "off": "dim"}
KINDS = {"eye": "eyes", "act": "acts", "store": "host"}


@click.command()
@click.option("-o", "--output", type=click.Choice(["table", "json"]), default="table", help="Form of the output.")
@click.pass_context
def command(ctx: click.Context, *, output: str) -> None:
    """Try everything that the guard needs here, and say what is missing. Changes nothing.

    Exit status 0: every eye is open; 1: some are closed or see less than they could; 3: the guard cannot run.

    \b
    Examples:
      gpuguard doctor
      sudo gpuguard doctor -o json | jq -r '.checks[] | select(.state == "closed") | .remedy'
    """
    import msgspec

    from gpuguard import doctor
    from gpuguard.config_sources import ConfigError, load_config

    checks = doctor.examine()
    try:
        enforcing = load_config().config.guard.mode == "enforce"
    except ConfigError:
        enforcing = False
    status = doctor.exit_status(checks, enforcing=enforcing)
    if output == "json":
        summary = {"exit_status": status, "closed": [one.name for one in checks if one.state == "closed"],
                   "degraded": [one.name for one in checks if one.state == "degraded"]}
        click.echo(msgspec.json.encode({"checks": checks, "summary": summary}).decode())
    else:
        _print(checks, status)
    ctx.exit(status)


def _print(checks: list[Check], status: int) -> None:
    from rich.console import Console
    from rich.table import Table

    from gpuguard.cli.tables import escape

    console = Console()
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("", "what", "state", "found, and what would open it"):
        table.add_column(title, overflow="fold")
    for kind, title in KINDS.items():
        for index, one in enumerate(check for check in checks if check.kind == kind):
            said = f"[{STYLES[one.state]}]{one.state}[/]"
            remedy = f"\n[bold]→[/] {escape(one.remedy)}" if one.remedy else ""
            table.add_row("" if index else title, one.name, said, escape(one.detail) + remedy)
    console.print(table)
    console.print({0: "every eye is open", 1: "some eyes are closed or see less: the guard runs with the others",
                   3: "[bold red]the guard cannot run[/]"}[status])
