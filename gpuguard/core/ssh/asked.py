"""What the client asked for before a channel was open, segment by segment, and what may stand in each."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from gpuguard.core.ssh.peers import Peers
    from gpuguard.core.ssh.sizes import Sizes

ASKED_MAX = 16


class Asked(NamedTuple):
    """One segment of the client's; ``opening``: written in one go with the login, or with the one before it."""

    time_ns: int
    size: int
    opening: bool


def forwards_in(one: Asked, asked: list[Asked], sizes: Sizes, peers: Peers) -> int:
    """Return how many requests for forwards a segment may hold."""
    if not one.opening:
        return 0
    first = one is asked[0]
    if first and one.size in sizes.forward_path:
        return 1
    if first and not peers.gathers:
        return int(sizes.with_forward.get(one.size) == 1)
    return sizes.with_forward.get(one.size, 0)


def forwards(asked: list[Asked], sizes: Sizes, peers: Peers) -> list[Asked]:
    """Return the segments that the opening began with and that may hold requests for forwards."""
    return list(itertools.takewhile(lambda one: forwards_in(one, asked, sizes, peers), asked))


def in_doubt(asked: list[Asked], unread: int, sizes: Sizes) -> bool:
    """Return whether what is answered next may be a command, on what was opened and confirmed in so many bytes."""
    if not sizes.exact or unread < sizes.confirm:
        return False
    return any(one.size in sizes.opens_session or one.size in sizes.opens_onwards for one in asked)


def may_answer(answers: int, asked: list[Asked], sizes: Sizes) -> bool:
    """Return whether so much was asked for as is answered: some segments hold one request and no more."""
    if not sizes.exact:
        return True
    single = {*sizes.session, *sizes.forward}
    return any(one.size not in single for one in asked) or answers <= len(asked)
