"""How soon a program answers, how far apart people type, and how evenly: what a shell is known by, on any carrier.

`detectors.reverse_shell` goes by who breaks a silence, `ssh.visitor` by the order of records inside one connection.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

#: A local program echoes or answers in a millisecond or two; a loaded host, or a command that runs, in some tens.
AT_ONCE_NS = 40_000_000
#: No program is woken, reads, runs something and writes sooner: shells here took 125 microseconds and more. What comes
#: faster was written before, and TCP held it back until the far side's segment acknowledged what went out (RFC 896).
NO_PROGRAM_NS = 40_000
#: Lines lie as far apart as it takes a person to type one.
LINE_GAP_NS = 500_000_000


def variation(gaps: Sequence[int]) -> float:
    """Return the coefficient of variation of gaps, one at least: 0 of a clock, 1 of what comes by chance."""
    mean = sum(gaps) / len(gaps)
    variance: float = sum((gap - mean) ** 2 for gap in gaps) / len(gaps)
    return variance**0.5 / mean if mean > 0 else 0.0
