"""Ticks for packets that were recorded: time passes where the packets say that it did.

What nobody answered is told of at a tick, and so is what fell idle. If ticks came when a block ends, it would depend on
how many packets a reader puts into one whether an attempt in vain is weighed before or after what succeeded meanwhile.
So blocks are cut where a second begins, whatever their size: the same packets give the same events, however they came.
A time before that of an earlier packet does not turn the clock back.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from gpuguard.core.names import part
from gpuguard.core.records import Gap, Packets, Tick

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_S = 1_000_000_000


def ticked(blocks: Iterable[Packets | Gap]) -> Iterator[Packets | Gap | Tick]:
    """Yield the blocks, cut before each packet that is the first of its second, with a tick before it.

    The first packet of all needs none, and seconds without a packet have none.
    """
    now_ns: int | None = None
    for block in blocks:
        if isinstance(block, Gap) or not len(block.rows):
            yield block
            continue
        # As numbers of Python: times are whatever a capture says, and rounding one down may leave what 63 bits hold.
        times = np.maximum.accumulate(block.rows["time_ns"])
        seconds = times // _S
        if now_ns is None:
            now_ns = int(times[0])
        cuts = [int(at) + 1 for at in np.flatnonzero(seconds[1:] != seconds[:-1])]
        first_fact = 0
        for start, end in zip((0, *cuts), (*cuts, len(times)), strict=True):
            if int(times[start]) // _S > now_ns // _S:
                yield Tick(time_ns=int(times[start]) // _S * _S)
            now_ns = max(now_ns, int(times[end - 1]))
            last = end == len(times)
            next_fact = len(block.facts) if last else _facts_before(block, first_fact, end)
            yield block if last and not start else part(block, start, end, first_fact, next_fact)
            first_fact = next_fact


def _facts_before(block: Packets, first: int, row: int) -> int:
    while first < len(block.facts) and block.facts[first].row < row:
        first += 1
    return first
