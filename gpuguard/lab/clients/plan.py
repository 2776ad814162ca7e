"""What a client of the lab is to do on its one connection, the same for every implementation.

The plan is one JSON argument. In order: connect; ask for the reverse forwards; open the session (a shell that is typed
in, commands, or a file sent over SFTP); open the connections onwards; hold the line until the time is over.
"""

from __future__ import annotations

import math
import random
import sys
from typing import TYPE_CHECKING

import msgspec

from gpuguard.lab.typist import GAP_MEDIAN_S, GAP_SIGMA

if TYPE_CHECKING:
    from collections.abc import Iterator


class Reverse(msgspec.Struct, frozen=True):
    """A forward of a port (or, where ``path`` is given, a socket) of the server to a port of this side."""

    bind: str
    port: int
    to_host: str
    to_port: int
    path: str = ""


class Plan(msgspec.Struct, frozen=True):
    """See the module."""

    host: str
    port: int
    user: str
    key: str
    seed: int
    hold_s: float
    cipher: str = ""
    mac: str = ""
    compressed: bool = False
    padded: bool = False
    keepalive_s: int = 0
    reverse: tuple[Reverse, ...] = ()
    reverse_after_s: float = 0.0
    shell: tuple[str, ...] = ()
    commands: tuple[str, ...] = ()
    put_bytes: int = 0
    local: tuple[tuple[str, int], ...] = ()


def read() -> Plan:
    """Return the plan given on the command line."""
    return msgspec.json.decode(sys.argv[1], type=Plan)


def keys(plan: Plan) -> Iterator[tuple[str, float]]:
    """Yield each key of the shell's lines, and how long a person waits after it; see `typist`."""
    noise = random.Random(plan.seed)
    for line in plan.shell:
        for key in line + "\r":
            yield key, GAP_MEDIAN_S * math.exp(noise.gauss(0, GAP_SIGMA))
