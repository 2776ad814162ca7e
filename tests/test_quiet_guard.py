"""A guard that reports dull flows by the row gives the same answers as one that reports each, on every input."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuguard._packets import Parser
from gpuguard.core.events import Finding, FlowReport, FlowReports
from gpuguard.core.flows import FlowTable
from gpuguard.core.guard import Guard
from gpuguard.core.names import may_carry
from gpuguard.core.observations import FlowsClosed, FlowsOpened, FlowsUnanswered
from gpuguard.core.records import PACKET, Gap, Packets, Sockets, Tick
from gpuguard.core.unspoken import reports, unspoken_verdicts
from gpuguard.sensors.packets import CaptureError, read_capture

sys.path.insert(0, str(Path(__file__).parent))
import test_flows_parity as parity
from conversation import ACK, FIN, SYN, Conversation

DATA = Path(os.environ.get("GPUGUARD_DATA_DIR", "")) / "captures"


def spread(events):
    """Every flow's report, in order of flows, and all other events in order."""
    flows, others = [], []
    for event in events:
        if isinstance(event, FlowReports):
            one_by_one = list(reports(event))
            assert [one.finding.verdict for one in one_by_one] == unspoken_verdicts(event.closed.rows)
            flows += one_by_one
        elif isinstance(event, FlowReport):
            flows.append(event)
        else:
            others.append(event)
    return sorted(flows, key=lambda one: (one.closed.flow, one.time_ns)), others


def judged(blocks, *, quiet, together=0):
    guard = Guard(quiet=quiet, together=together)
    if not quiet:
        guard._flows = FlowTable()  # which tells of every exchange as well
    events, now_ns = [], 0
    for block in blocks:
        if isinstance(block, Packets):
            now_ns = max(now_ns, int(block.rows["time_ns"].max()))
            events += guard.receive(block)
            events += guard.receive(Tick(time_ns=now_ns))
    return spread([*events, *guard.close(now_ns)])


def read(path, *, brief):
    try:
        yield from read_capture(path, brief=brief)
    except CaptureError:
        return


def captures():
    return sorted(path for path in DATA.glob("*/*") if path.is_file()) if os.environ.get("GPUGUARD_DATA_DIR") else []


@pytest.mark.skipif(not captures(), reason="GPUGUARD_DATA_DIR names no folder with captures/ in it")
def test_on_recorded_traffic():
    quiet_flows = 0
    for path in captures():
        each, quiet = judged(read(path, brief=False), quiet=False), judged(read(path, brief=True), quiet=True)
        assert quiet == each, path.name
        assert judged(read(path, brief=True), quiet=True, together=1000) == each, path.name
        quiet_flows += len(quiet[0])
    assert quiet_flows > 1000


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(parity.packet, min_size=1, max_size=80), st.integers(1, 79))
def test_on_random_packets_however_cut(packets, cut):
    rows = parity.rows_of([(*one[:-1], 4) for one in packets])
    whole = [Packets(time_ns=0, netns=0, rows=rows)]
    parts = [Packets(time_ns=0, netns=0, rows=one) for one in (rows[:cut], rows[cut:]) if len(one)]
    each = judged(whole, quiet=False)
    assert judged(whole, quiet=True) == each
    assert judged(parts, quiet=True, together=10) == judged(parts, quiet=True)
    assert judged(parts, quiet=True)[0] == judged(parts, quiet=False)[0]


def conversation(port, rounds, *, first):
    talk = Conversation(port=port)
    talk.say(0, 100)
    talk.say(1, 100)
    for _ in range(rounds):
        talk.say(first, 40, after_ms=300)
        talk.say(1 - first, 41, after_ms=2)
    talk.packet(0, 0, ACK | FIN)
    talk.packet(1, 0, ACK | FIN)
    return talk


def test_what_is_dull_makes_no_object_and_what_is_led_from_afar_does():
    guard = Guard(quiet=True)
    events = guard.receive(conversation(4000, 9, first=0).block())
    assert [type(one) for one in events] == [FlowReports]
    (one,) = reports(events[0])
    assert (one.closed.answered, one.closed.packets, one.finding.verdict) == (9, 25, "clear")
    events = guard.receive(conversation(4001, 9, first=1).block())
    assert FlowReports not in [type(one) for one in events]
    scan = Conversation(port=9, handshake=False)
    scan.packet(0, 0, SYN)
    assert [type(one) for one in [*guard.receive(scan.block()), *guard.close(scan.now_ns)]] == [FlowReports]


def test_what_this_host_led_before_counts_against_a_lead_of_the_far_side():
    talk = conversation(4000, 20, first=0)
    mixed = Conversation(port=4000)
    mixed.rows, mixed.sequence, mixed.now_ns = talk.rows[:-2], talk.sequence, talk.now_ns
    for _ in range(8):
        mixed.say(1, 40, after_ms=300)
        mixed.say(0, 41, after_ms=2)
    blocks = [mixed.block()]
    assert judged(blocks, quiet=True) == judged(blocks, quiet=False)


def test_from_the_first_list_of_sockets_on_openings_are_told_of_by_the_row():
    table = FlowTable(quiet=True, exchanges=False)
    talk, later = conversation(4000, 3, first=0), conversation(4001, 1, first=0)
    assert table.receive(talk.block(0, 5)) == []
    (before,) = table.listen()
    assert before.rows["initiator_port"].tolist() == [4000]
    seen = table.receive(later.block())
    assert [type(one) for one in seen] == [FlowsOpened, FlowsClosed]
    assert seen[0].rows["start_ns"].tolist() == [later.block().rows["time_ns"][0]]


def echoes(count, *, start_ns, answered=False):
    """Questions to so many neighbours, 10 ms apart, and their answers."""
    rows = np.zeros(count * (1 + answered), PACKET)
    for at in range(len(rows)):
        number, back = divmod(at, 2) if answered else (at, 0)
        ends = [bytes(10) + b"\xff\xff\x0a\0\0" + bytes([last]) for last in (1, 100 + number)]
        for name, end in zip(("source", "destination"), ends[::-1] if back else ends, strict=True):
            rows[name][at] = list(end)
        rows["time_ns"][at] = start_ns + number * 10_000_000 + back
        rows["source_port"][at] = 0 if back else 8 << 8
        rows["destination_port"][at] = 77
    rows["protocol"], rows["payload_bytes"], rows["ip_version"] = 1, 56, 4
    return Packets(int(rows["time_ns"][-1]), 0, rows)


exchange = st.tuples(st.sampled_from((20, 300, 1000, 5000)), st.integers(0, 1), st.sampled_from((36, 56, 300, 512)),
                     st.sampled_from((0, 36, 56, 57, 120, 500)), st.sampled_from((1, 1, 2, 9)))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(exchange, min_size=1, max_size=40), st.integers(1, 100))
def test_echoes_that_are_dull_for_a_while(exchanges, cut):
    """A tunnel's first echoes may be like ping's: what they were is not lost, whenever the first strange one comes."""
    rows, now_ns = np.zeros(2 * len(exchanges), PACKET), 10**18
    rows["protocol"], rows["ip_version"], rows["destination_port"] = 1, 4, 77
    for at, (gap_ms, led, asked, answered, delay_ms) in enumerate(exchanges):
        for number, (side, size, after_ms) in enumerate(((led, asked, gap_ms), (1 - led, answered, delay_ms))):
            one, now_ns = rows[2 * at + number], now_ns + after_ms * 1_000_000
            one["time_ns"], one["payload_bytes"], one["source_port"] = now_ns, size, 0 if side else 8 << 8
            one["source"][-1], one["destination"][-1] = 1 + side, 2 - side
    blocks = [Packets(time_ns=0, netns=0, rows=part) for part in (rows[:cut], rows[cut:]) if len(part)]
    assert judged(blocks, quiet=True) == judged(blocks, quiet=False)


@pytest.mark.parametrize("quiet", [True, False])
def test_a_sweep_of_echoes_is_told_when_the_answers_are_overdue_and_once(*, quiet):
    guard, start_ns = Guard(quiet=quiet), 10**18
    guard.receive(echoes(60, start_ns=start_ns))
    told = guard.receive(Tick(start_ns + 5 * 10**9))
    assert {one.label for one in told if isinstance(one, Finding)} == {"scan"}
    later = [*guard.receive(Tick(start_ns + 200 * 10**9)), *guard.close(start_ns + 201 * 10**9)]
    assert not [one for one in later if isinstance(one, Finding)]


def test_echoes_that_were_answered_are_no_sweep():
    guard, start_ns = Guard(quiet=True), 10**18
    events = [*guard.receive(echoes(60, start_ns=start_ns, answered=True)), *guard.receive(Tick(start_ns + 10**11)),
              *guard.close(start_ns + 2 * 10**11)]
    assert not [one for one in events if isinstance(one, Finding)]


def test_an_attempt_is_missed_once_and_only_without_any_answer():
    table = FlowTable(quiet=True)
    for port, answered in ((1, False), (2, True)):
        one = Conversation(port=port, handshake=False)
        one.packet(0, 0, SYN)
        if answered:
            one.packet(1, 0, SYN | ACK)
        table.receive(one.block())
    assert table.tick(one.now_ns + 3_000_000_000) == []
    (missed,) = table.tick(one.now_ns + 5_000_000_000)
    assert isinstance(missed, FlowsUnanswered)
    assert missed.rows["initiator_port"].tolist() == [1]
    assert table.tick(one.now_ns + 9_000_000_000) == []
    (ended,) = table.close(one.now_ns + 10_000_000_000)
    assert ended.rows["missed"].tolist() == [1, 0]


@pytest.mark.parametrize("listed", [False, True])
def test_a_scan_is_told_of_within_seconds_of_its_start(listed):
    guard, events = Guard(quiet=True), []
    if listed:
        guard.receive(Sockets(1, 0, ()))
    now_ns = 0
    for number in range(40):
        one = Conversation(port=1000 + number, handshake=False, far=(10, 0, 1, number))
        one.packet(0, 0, SYN)
        now_ns = one.now_ns
        guard.receive(one.block())
    for second in range(6):
        events += guard.receive(Tick(now_ns + second * 1_000_000_000))
    assert [event.label for event in events if isinstance(event, Finding)][:1] == ["scan"]


def test_a_detector_that_stumbles_over_rows_is_off_and_told():
    class Bad:
        takes = (FlowsClosed,)

        def receive(self, item, host):
            raise ZeroDivisionError

    guard = Guard(quiet=True)
    guard._detectors.append(Bad())
    events = guard.receive(conversation(4000, 1, first=0).block())
    assert [type(one) for one in events] == [Gap, FlowReports]
    events = guard.receive(conversation(4001, 1, first=0).block())
    assert [type(one) for one in events] == [FlowReports]


label = st.binary(min_size=1, max_size=30)


@settings(max_examples=400, derandomize=True)
@given(st.lists(label, min_size=1, max_size=6), st.booleans(), st.sampled_from((1, 2, 16, 28, 10, 65_400)),
       st.integers(0, 40))
def test_brief_facts_leave_out_nothing_that_may_carry(labels, answer, kind, data):
    name = b"".join(bytes([len(one)]) + one for one in labels) + b"\0"
    message = (b"\x12\x34" + (b"\x81\x80" if answer else b"\x01\0") + b"\0\x01\0" + bytes([answer]) + bytes(4) + name
               + kind.to_bytes(2, "big") + b"\0\x01")
    if answer:
        message += b"\xc0\x0c" + kind.to_bytes(2, "big") + b"\0\x01" + bytes(4) + data.to_bytes(2, "big") + bytes(data)
    udp = b"\x10\0\0\x35" + (8 + len(message)).to_bytes(2, "big") + bytes(2) + message
    frame = bytes(12) + b"\x08\0\x45\0" + (20 + len(udp)).to_bytes(2, "big") + bytes(4) + b"\x40\x11" + bytes(10) + udp
    found = []
    for brief in (False, True):
        parser = Parser(brief=brief)
        parser.frame(1, frame, 0)
        found.append(parser.take())
    (rows, facts), (brief_rows, brief_facts) = found
    assert brief_facts in (facts, ())
    assert brief_facts == facts or not any(may_carry(fact) for fact in facts)
    assert brief_rows["ip_version"][0] >> 4 == (3 if facts and not brief_facts else 0)
    brief_rows["ip_version"] &= 15
    assert np.array_equal(rows, brief_rows)
