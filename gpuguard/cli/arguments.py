"""What click does not check of an argument."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gpuguard.cli.output import EXIT_USAGE, complain

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gpuguard.core.policy import Policy

#: What a command reads and reports on by itself: that it is missing or not ours to read is exit status 3, not 2.
TO_READ = click.Path(readable=False, path_type=Path)


def finite(_: click.Context, __: click.Parameter, value: float | None) -> float | None:
    """Return the number. ``nan`` is within any range, as click compares, and a span of ``inf`` never ends."""
    if value is not None and not math.isfinite(value):
        raise click.BadParameter(f"{value} is not a finite number")
    return value


def policy_of(files: Sequence[Path] | None) -> Policy:
    """Return the policy of these files, or of this host. What is wrong with it is told, and ends the program."""
    from gpuguard.policies import PolicyError, load_policy

    try:
        return load_policy(files)
    except PolicyError as error:
        complain(f"gpuguard: {error}")
        raise SystemExit(EXIT_USAGE) from error
