"""``gpuguard train``: make a model of models/ anew."""

from __future__ import annotations

from pathlib import Path

import click

from gpuguard.cli.output import EXIT_UNREADABLE


@click.group()
def command() -> None:
    """Train a model on recorded or simulated data, score it held out, and write it with its card.

    Needs the extra `train`. The same data and seed give the same model.

    \b
    gpuguard train counters --out models/
    gpuguard train code --data kernels.csv.gz --out models/
    """
    try:
        import lightgbm  # noqa: F401
    except ImportError as error:
        click.echo(f"gpuguard: {error.name} is missing: pip install 'gpuguard[train]'", err=True)
        raise SystemExit(EXIT_UNREADABLE) from error


@command.command()
@click.option("--out", type=click.Path(exists=True, file_okay=False, path_type=Path), required=True,
              help="Where the model and its card go.")
@click.option("--jobs", type=click.IntRange(min=400), help="How many jobs to simulate.")
def counters(out: Path, jobs: int | None) -> None:
    """Train the forest that weighs counters, on simulated jobs: some thirteen minutes of CPU time."""
    from gpuguard.counters import train

    train.main(out, jobs or train.JOBS)


@command.command(context_settings={"ignore_unknown_options": True}, add_help_option=False)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def code(arguments: tuple[str, ...]) -> None:
    """Train the forest that ranks GPU code, on a table of kernels; --help says what it takes."""
    from gpuguard.code import train

    train.main(arguments)
