"""Sensors read the host and yield records, one file or folder each; their list is the list of sensors.

A sensor has two halves. ``grant(request)`` runs in the broker, opens what needs privileges, narrows it, and
returns the answer with its descriptors. ``open_sensor(broker, config)`` runs in the guard and returns a `Sensor`, or
raises `EyeClosed` with a reason that a person can act on. Parsing is pure, and apart from reading.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from gpuguard.core.records import Block


class EyeClosed(Exception):
    """This sensor cannot look here; the message says why and what would open it."""


def is_due(now_ns: int, since_ns: int, period_ns: int) -> bool:
    """Return whether so much time has passed by the host's clock; also where that was set back, and nobody knows."""
    return not since_ns <= now_ns < since_ns + period_ns


def next_ns(now_ns: int, period_ns: int) -> int:
    """Return the next multiple of a period, of CLOCK_MONOTONIC: what falls due together wakes the guard once."""
    return now_ns - now_ns % period_ns + period_ns


class Sensor(Protocol):
    """What the daemon drives: it waits on ``descriptor`` if there is one, and calls `read` at each `next_ns`, or later.

    A sensor that also has ``notice(block)`` is shown every block of the others, to know where to look next.
    """

    name: str
    descriptor: int | None
    period_ns: int | None

    def read(self, now_ns: int) -> list[Block]:
        """Return what was seen since the last call. Failures to look are `Gap` records, never exceptions."""
        ...

    def close(self) -> None:
        """Give every handle back."""
        ...
