"""Whatever the size of a reader's blocks, the same packets give the same events."""

from __future__ import annotations

import itertools
import os
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from gpuguard.core.guard import Guard
from gpuguard.core.records import PACKET, DnsMessage, Gap, HostInfo, Packets, Tick
from gpuguard.core.ticking import ticked
from gpuguard.sensors.packets import CaptureError, read_capture

sys.path.insert(0, str(Path(__file__).parent))
import test_flows_parity as parity
from test_quiet_guard import spread

S = 1_000_000_000
START = 1_700_000_000 * S + 250_000_000
SAMPLE = Path(__file__).resolve().parent / "fixtures" / "captures"
DATA = Path(os.environ.get("GPUGUARD_DATA_DIR", "")) / "captures"
HERE, THERE = "10.0.0.2", "10.0.0.9"
FIN, SYN, RST, ACK = 1, 2, 4, 16


def judged(blocks, *, hosts=(), together=0):
    guard, now_ns = Guard(quiet=True, together=together), 0
    events = guard.receive(HostInfo(0, 1, "b", "h", 100, addresses=hosts)) if hosts else []
    for block in ticked(blocks):
        now_ns = max(now_ns, int(block.rows["time_ns"].max(initial=0)) if isinstance(block, Packets) else block.time_ns)
        events += guard.receive(block)
    return spread([*events, *guard.receive(Tick(time_ns=now_ns)), *guard.close(now_ns)])


def cut(rows, facts, cuts):
    """Return a block for each part of the rows, with the facts that were read from these."""
    bounds = [0, *sorted({one for one in cuts if 0 < one < len(rows)}), len(rows)]
    return [Packets(0, 0, rows[start:end], tuple(
        replace(fact, row=fact.row - start) for fact in facts if start <= fact.row < end))
        for start, end in itertools.pairwise(bounds)]


def packets_of(flows):
    """Return the rows of these attempts in order of time: each (start in ms, far address, port, outcome)."""
    packets = []
    for number, (start_ms, far, port, outcome) in enumerate(flows):
        at_ns, here, there = START + start_ms * 1_000_000, 2000 + number, 1 + far
        way = [(at_ns, here, there, port, 0, SYN, 0)]
        if outcome == "refused":
            way += [(at_ns + 1000, here, there, port, 1, RST | ACK, 0)]
        elif outcome == "spoke":
            way += [(at_ns + 1000, here, there, port, 1, SYN | ACK, 0), (at_ns + 2000, here, there, port, 0, ACK, 0),
                    (at_ns + 3000, here, there, port, 0, ACK, 40), (at_ns + 90_000, here, there, port, 1, ACK, 90),
                    (at_ns + 95_000, here, there, port, 0, ACK | FIN, 0),
                    (at_ns + 96_000, here, there, port, 1, ACK | FIN, 0)]
        packets += way
    packets.sort()
    rows, said = np.zeros(len(packets), PACKET), Counter()
    for row, (time_ns, here, there, port, side, flags, size) in zip(rows, packets, strict=True):
        ends = [(address(2), here), (address(there + 100), port)]
        (row["source"], row["source_port"]), (row["destination"], row["destination_port"]) = (
            ends[::-1] if side else ends)
        row["time_ns"], row["tcp_flags"], row["payload_bytes"] = time_ns, flags, size
        row["protocol"], row["ip_version"], row["sequence"] = 6, 4, said[here, side] + 1
        said[here, side] += size + bool(flags & (SYN | FIN))
    return rows


def address(last):
    return np.frombuffer(b"\0" * 10 + b"\xff\xff" + bytes([10, 0, 0, last]), "u1")


attempts = st.lists(st.tuples(st.integers(0, 30_000), st.integers(0, 60), st.sampled_from((22, 80, 2379, 9100)),
                              st.sampled_from(("refused", "lost", "lost", "spoke"))), min_size=20, max_size=90)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(attempts, st.lists(st.integers(1, 400), max_size=40))
def test_attempts_are_weighed_in_the_order_of_their_time(flows, cuts):
    rows = packets_of(flows)
    whole = judged(cut(rows, (), ()), hosts=(HERE,))
    assert judged(cut(rows, (), cuts), hosts=(HERE,)) == whole
    assert judged(cut(rows, (), range(len(rows))), hosts=(HERE,)) == whole
    assert judged(cut(rows, (), cuts), hosts=(HERE,), together=30) == whole


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(parity.packet, min_size=1, max_size=80), st.lists(st.integers(1, 79), max_size=20),
       st.sets(st.integers(0, 79), max_size=5))
def test_any_packets_and_names_however_cut(packets, cuts, named):
    rows = parity.rows_of([(*one[:-1], 4) for one in packets])
    facts = [DnsMessage(row, False, "a" * 40 + ".example.org", 16, 0) for row in sorted(named) if row < len(rows)]
    whole = judged(cut(rows, facts, ()))
    assert judged(cut(rows, facts, cuts)) == whole
    assert judged(cut(rows, facts, cuts), together=30) == whole


def test_who_answers_between_what_fails_is_heard_in_time():
    """Every third answers, and of two in a row nobody does: what fails never weighs enough, in whatever block it is."""
    flows = [(i * 500, i, 9100, "spoke" if i % 3 == 2 else "lost") for i in range(60)]
    _, others = judged(cut(packets_of(flows), (), ()), hosts=(HERE,))
    assert others == []
    _, others = judged(cut(packets_of([one for one in flows if one[3] == "lost"]), (), ()), hosts=(HERE,))
    assert {one.label for one in others if hasattr(one, "label")} == {"scan"}


def test_a_tick_comes_before_the_first_packet_of_a_second_and_none_where_there_are_no_packets():
    rows = np.zeros(6, PACKET)
    rows["time_ns"] = [START, START + 1, START + S, START + 9 * S, START + 2 * S, START + 9 * S]
    fact = DnsMessage(2, False, "x" * 30, 1, 0)
    out = list(ticked([Packets(0, 7, rows, (fact,), met_again=3), Gap(5, "packets", "lost")]))
    ticks = [START // S + 1, START // S + 9]
    assert [one.time_ns // S for one in out if isinstance(one, Tick)] == ticks
    parts = [one for one in out if isinstance(one, Packets)]
    assert [(len(one.rows), one.netns, one.met_again, [f.row for f in one.facts]) for one in parts] == [
        (2, 7, 3, []), (1, 7, 0, [0]), (3, 7, 0, [])]
    assert isinstance(out[-1], Gap)


def test_times_that_no_clock_shows_are_survived():
    rows = np.zeros(4, PACKET)
    rows["time_ns"] = [-(2**63), 2**63 - 1, -(2**63), 0]
    assert len(judged([Packets(0, 0, rows)])[0]) >= 1


def read(path, rows_max):
    try:
        yield from (block for block in read_capture(path, rows_max, brief=True) if isinstance(block, Packets))
    except CaptureError:
        return


def captures():
    found = [*SAMPLE.glob("*.pcap*")]
    if os.environ.get("GPUGUARD_DATA_DIR"):
        found += [path for path in DATA.glob("*/*") if path.is_file() and path.stat().st_size < 200_000]
    return sorted(found)


@pytest.mark.skipif(not captures(), reason="no captures: GPUGUARD_DATA_DIR names no folder with captures/ in it")
def test_on_recorded_traffic_in_small_blocks():
    flows = 0
    for path in captures():
        whole = judged(read(path, 1 << 20))
        assert judged(read(path, 8)) == whole, path.name
        flows += len(whole[0])
    assert flows > 100
