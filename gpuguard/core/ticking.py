"""Ticks for packets that were recorded: time passes where the packets say that it did.

What nobody answered is told of at a tick, and so is what fell idle. If ticks came when a block ends, it would depend on
how many packets a reader puts into one whether an attempt in vain is weighed before or after what succeeded meanwhile.
So blocks are cut where a second begins, whatever their size: the same packets give the same events, however they came.
A time before that of an earlier packet does not turn the clock back; a block bears the highest so far.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from gpuguard.core.facts import part
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
        start, first_fact, last_ns = 0, 0, int(times[-1])
        while start < len(times):
            second = int(times[start]) // _S
            if now_ns is not None and second > now_ns // _S:
                yield Tick(time_ns=second * _S)
            next_ns = (second + 1) * _S
            end = int(times.searchsorted(next_ns)) if next_ns <= last_ns else len(times)
            now_ns = int(times[end - 1]) if now_ns is None else max(now_ns, int(times[end - 1]))
            next_fact = _facts_before(block, first_fact, end) if end < len(times) else len(block.facts)
            one = part(block, start, end, first_fact, next_fact)
            one.time_ns = now_ns
            yield one
            start, first_fact = end, next_fact


def _facts_before(block: Packets, first: int, row: int) -> int:
    while first < len(block.facts) and block.facts[first].row < row:
        first += 1
    return first
