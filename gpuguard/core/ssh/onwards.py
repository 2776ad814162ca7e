"""Connections that this side opens onwards through the far one (direct-tcpip, RFC 4254 section 7.2): -L, -D, -W."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gpuguard.core.ssh.asked import Asked, forwards_in
from gpuguard.core.ssh.uses import NAME_FIRM_NATS, NAME_NATS

if TYPE_CHECKING:
    from gpuguard.core.ssh.connection import Seen, Terms
    from gpuguard.core.ssh.uses import Use


def local(size: int, terms: Terms, seen: Seen) -> list[Use]:
    """Say that a connection onwards was opened; from names of two lengths on these are -D's."""
    seen.directs.add(size)
    uses = seen.told.once("ssh-local-forward", NAME_NATS, f"this side opened a connection onwards ({size} bytes) and "
                          "it was confirmed")
    if len(seen.directs) >= 2 and terms.sizes.exact:
        uses += seen.told.once("ssh-dynamic-forward", NAME_NATS + 1, "connections onwards to names of several lengths: "
                               f"{sorted(seen.directs)} bytes")
    return uses


def jump(first: Asked, seen: Seen) -> list[Use]:
    """Say that the connection is for another one within it."""
    return seen.told.once("ssh-jump", NAME_FIRM_NATS, f"the first record, {first.size} bytes, opens a connection "
                          "onwards and nothing else")


def is_jump(first: Asked, terms: Terms, seen: Seen, *, answered: int | None = None) -> bool:
    """Return whether a session opened with direct-tcpip (-W), alone or with no-more-sessions.

    Requests for forwards may cost as much, but are ``answered`` before anything is confirmed. Libraries open
    connections onwards for all sorts of uses.
    """
    sizes = terms.sizes
    at_once = first.time_ns - terms.since_ns <= terms.go_ns()
    alone = at_once and first.size in sizes.opens_onwards
    other = forwards_in(first, seen.asked, sizes, terms.peers) > 0 if answered is None else answered > 0
    return terms.peers.familiar and sizes.exact and alone and not other and first.opening
