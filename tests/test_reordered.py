"""What the network does to the order of packets changes no verdict on SSH: the committed sample of the lab's captures.

Of two segments that one side sent right after each other every second pair comes in the other order: no receiver could
have answered in between (RFC 9293 section 3.10.7.4), and none of its bytes is missing. After the key exchange the rows
that were read are moved, before it the packets themselves: what they hold is read in the order of the stream.
"""

from __future__ import annotations

import gzip
import io
import random
import struct
from pathlib import Path

import msgspec
import numpy as np
import pytest

from gpuguard.core.events import FlowReport
from gpuguard.core.guard import Guard
from gpuguard.core.records import Packets, SshNewKeys, Tick
from gpuguard.lab.judging import ACCUSING, read_labels
from gpuguard.sensors.packets import read_capture

SAMPLE = Path(__file__).resolve().parent / "fixtures" / "captures"
APART_NS = 30_000_000


def verdicts(blocks):
    """Return the label of every flow that is accused, and how much each flow carried."""
    guard, now_ns, events = Guard(), 0, []
    for block in blocks:
        now_ns = max(now_ns, int(block.rows["time_ns"].max(initial=0)))
        events += [*guard.receive(block), *guard.receive(Tick(time_ns=now_ns))]
    ends = [one for one in [*events, *guard.close(now_ns)] if isinstance(one, FlowReport)]
    accused = sorted((one.closed.flow.responder_port, one.finding.label) for one in ends
                     if one.finding.verdict in ACCUSING)
    carried = {one.closed.flow: (one.closed.payload_bytes_initiator, one.closed.payload_bytes_responder)
               for one in ends}
    return accused, carried


def swapped(rows, begin, end, dice):
    """Return an order with neighbours of one side swapped from row ``begin`` to ``end``, and how many were."""
    order = np.arange(len(rows))
    last, pairs = {}, 0
    for at in range(begin, end):
        row = rows[at]
        way = (bytes(row["source"]), int(row["source_port"]), bytes(row["destination"]), int(row["destination_port"]))
        flow = frozenset((way[:2], way[2:]))
        before, last[flow] = last.get(flow), (at, way)
        if (row["protocol"] == 6 and row["payload_bytes"] and before and before[1] == way
                and rows["payload_bytes"][before[0]] and row["time_ns"] - rows["time_ns"][before[0]] < APART_NS
                and dice.random() < 0.5):
            order[[before[0], at]] = order[[at, before[0]]]
            del last[flow]
            pairs += 1
    return order, pairs


def keyed(block):
    """Return the row behind the last key exchange."""
    return max((fact.row for fact in block.facts if isinstance(fact, SshNewKeys)), default=len(block.rows) - 1) + 1


def reordered(block, dice):
    """Return the block with segments after its key exchanges swapped, and how many pairs were."""
    rows = block.rows
    order, pairs = swapped(rows, keyed(block), len(rows), dice)
    moved = rows[order]
    moved["time_ns"] = rows["time_ns"]
    places = np.argsort(order)
    facts = tuple(sorted((msgspec.structs.replace(fact, row=int(places[fact.row])) for fact in block.facts),
                         key=lambda fact: fact.row))
    return msgspec.structs.replace(block, rows=moved, facts=facts), pairs


def opened_otherwise(path, block, dice):
    """Return what is read of a file with packets up to its last key exchange swapped, and how many pairs were."""
    data, at, heads, frames = gzip.decompress(path.read_bytes()), 24, [], []
    while at < len(data):
        head = struct.unpack_from("<4I", data, at)
        heads.append(head[:2])
        frames.append(data[at + 8:at + 16 + head[2]])
        at += 16 + head[2]
    assert len(frames) == len(block.rows), path
    order, pairs = swapped(block.rows, 0, keyed(block), dice)
    records = (struct.pack("<2I", *head) + frames[place] for head, place in zip(heads, order, strict=True))
    file = io.BytesIO(data[:24] + b"".join(records))
    return [one for one in read_capture(file) if isinstance(one, Packets)], pairs


@pytest.fixture(scope="module")
def sample():
    names = sorted({row["file"] for row in read_labels(SAMPLE) if row["client"] not in ("", "program")})
    return {name: [one for one in read_capture(SAMPLE / name) if isinstance(one, Packets)] for name in names}


def test_another_order_changes_no_verdict(sample):
    dice, pairs, changed = random.Random(7), 0, {}
    for name, blocks in sample.items():
        assert len(blocks) == 1, name
        plain = verdicts(blocks)
        other, swapped = reordered(blocks[0], dice)
        pairs += swapped
        if swapped and verdicts([other]) != plain:
            changed[name] = (plain[0], verdicts([other])[0])
    assert pairs > 300
    assert changed == {}


def test_another_order_of_the_opening_changes_no_verdict(sample):
    dice, pairs, changed = random.Random(7), 0, {}
    for name, blocks in sample.items():
        other, swaps = opened_otherwise(SAMPLE / name, blocks[0], dice)
        pairs += swaps
        if swaps and (told := verdicts(other)) != (plain := verdicts(blocks)):
            changed[name] = (plain[0], told[0])
    assert pairs > 100
    assert changed == {}
