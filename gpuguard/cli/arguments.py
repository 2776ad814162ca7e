"""What click does not check of an argument."""

from __future__ import annotations

import math
from pathlib import Path

import click

#: What a command reads and reports on by itself: that it is missing or not ours to read is exit status 3, not 2.
TO_READ = click.Path(readable=False, path_type=Path)


def finite(_: click.Context, __: click.Parameter, value: float | None) -> float | None:
    """Return the number. ``nan`` is within any range, as click compares, and a span of ``inf`` never ends."""
    if value is not None and not math.isfinite(value):
        raise click.BadParameter(f"{value} is not a finite number")
    return value
