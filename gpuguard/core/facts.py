"""What was read from payload and is no business of the flow table, in its place among what the table tells.

DNS messages that may hold data (see `names`) and the first lines of mining pools are handed to the detectors: the block
is cut behind them, which changes nothing for the flow table.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec.structs import replace

from gpuguard.core.addresses import address_text, is_nowhere
from gpuguard.core.names import may_carry
from gpuguard.core.observations import DnsSeen, Observation, StratumSeen
from gpuguard.core.records import DnsMessage, Packets, Stratum

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gpuguard.core.flows import FlowTable


def observations_of(flows: FlowTable, block: Packets) -> Iterator[Observation]:
    """Yield what the flow table makes of a block, with each fact that detectors want right after its packet."""
    rows, facts = block.rows, block.facts
    done, first = 0, 0
    for index, fact in enumerate(facts):
        if not isinstance(fact, DnsMessage | Stratum) or not len(rows):
            continue
        if isinstance(fact, DnsMessage) and not may_carry(fact):
            continue
        row = min(max(fact.row, done), len(rows) - 1)
        yield from flows.receive(part(block, done, row + 1, first, index + 1))
        yield _seen(block, row, fact)
        done, first = row + 1, index + 1
        if done == len(rows):
            return
    yield from flows.receive(part(block, done, len(rows), first, len(facts)) if done else block)


def part(block: Packets, start: int, end: int, first: int, last: int) -> Packets:
    """Return rows[start:end] of a block with facts[first:last], which are of these rows."""
    facts = tuple(replace(fact, row=max(0, fact.row - start)) for fact in block.facts[first:last])
    return Packets(time_ns=block.time_ns, netns=block.netns, rows=block.rows[start:end], facts=facts,
                   met_again=0 if start else block.met_again)


def _seen(block: Packets, row: int, fact: DnsMessage | Stratum) -> Observation:
    one = block.rows[row]
    time_ns = int(one["time_ns"])
    ends = [(address_text(one[side].tobytes()), int(one[f"{side}_port"])) for side in ("source", "destination")]
    if isinstance(fact, Stratum):
        return StratumSeen(time_ns, block.netns, *ends[0], *ends[1], fact.method)
    client, server = ends[::-1] if fact.is_response else ends
    nowhere = tuple(one[:4] for one in fact.addresses if is_nowhere(one))
    return DnsSeen(time_ns, block.netns, *client, *server, fact.is_response, fact.name, fact.query_type,
                   fact.answer_bytes, nowhere)
