"""The one output form of ``pcap``, ``classify``, ``scan`` and ``replay``.

JSON lines, one object a subject, then one last line ``{"summary": {...}}``. Exit status: 0 clear, 1 found, 2 wrong
usage (click's own), 3 could not read.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, TextIO

import click
import msgspec

from gpuguard.core.labels import VERDICTS, Verdict
from gpuguard.ui.markup import visible

if TYPE_CHECKING:
    from collections.abc import Mapping

EXIT_CLEAR = 0
EXIT_FOUND = 1
EXIT_USAGE = 2
EXIT_UNREADABLE = 3


class Summary(msgspec.Struct):
    """The last line. ``counts`` is subjects by verdict; ``gaps`` says what could not be looked at."""

    verdict: Verdict
    label: str
    probability: float
    evidence: list[dict[str, object]]
    counts: dict[str, int]
    gaps: list[str]


def write_line(line: object, stream: TextIO | None = None) -> None:
    """Write one object as one JSON line."""
    (stream or sys.stdout).write(msgspec.json.encode(line).decode() + "\n")


def complain(text: str) -> None:
    """Write one line for people to standard error; whatever names are in it move no terminal's cursor."""
    click.echo(visible(text), err=True)


def reason_of(path: object, error: Exception) -> str:
    """Return a path and why it cannot be read, each once."""
    return f"{path}: {error.strerror}" if isinstance(error, OSError) and error.strerror else f"{path}: {error}"


def write_summary(summary: Summary, stream: TextIO | None = None) -> None:
    """Write the last line."""
    write_line({"summary": summary}, stream)


def worst(lines: list[Mapping[str, object]]) -> Mapping[str, object] | None:
    """Return the line that an operator should read first: highest verdict, then probability."""

    def rank(line: Mapping[str, object]) -> tuple[int, float]:
        return VERDICTS.index(line["verdict"]), float(line["probability"])  # type: ignore[arg-type]

    return max(lines, key=rank, default=None)


def exit_status(summary: Summary, *, unreadable: bool) -> int:
    """Return the exit status: a finding outweighs a file that could not be read."""
    if summary.verdict in ("suspect", "confirmed"):
        return EXIT_FOUND
    return EXIT_UNREADABLE if unreadable else EXIT_CLEAR
