"""What the compiled parser has taken in, as a block, and what it counts that a verdict may lack."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gpuguard.core.records import Packets

if TYPE_CHECKING:
    from gpuguard._packets import Parser

# What the parser counts and a verdict may lack.
MISSED = {
    "streams_lost": "SSH or TLS handshakes that could not be read to their end",
    "fragments_headless": "first IP fragments too short for their headers (RFC 7112)",
    "datagrams_spoiled": "datagrams in IP fragments that overlap or go too far, which nobody may take (RFC 5722)",
    "datagrams_unfinished": "datagrams in IP fragments that were not whole in 30 s, or when others took their place",
    "urgent": "TCP segments with urgent data, which programs are not given in its place: sizes may be wrong",
}


def taken(parser: Parser, netns: int, met_again: int = 0) -> Packets:
    """Return what the parser has, stamped with the time of its last row."""
    rows, facts = parser.take()
    return Packets(int(rows["time_ns"][-1]), netns, rows, facts, met_again)
