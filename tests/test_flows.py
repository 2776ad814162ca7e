"""Observations of the flow table: turn taking, carriers, eviction, and no difference however the packets are cut."""

from __future__ import annotations

import ipaddress
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuguard._flows import Table
from gpuguard.core.addresses import address_text
from gpuguard.core.flows import FlowTable
from gpuguard.core.observations import Exchange, FlowClosed, FlowOpened, FlowsUnanswered, FlowUse
from gpuguard.core.records import (
    PACKET,
    DnsMessage,
    Packets,
    SshBanner,
    SshKexInit,
    SshNewKeys,
    TlsClientHello,
)

sys.path.insert(0, str(Path(__file__).parent))
import itertools

from conversation import ACK, FIN, SYN, Conversation, kexinit

MS = 1_000_000


def observe(conversation, **options):
    table = FlowTable(**options)
    return table.receive(conversation.block()) + table.close(conversation.now_ns)


def of(kind, seen):
    return [one for one in seen if isinstance(one, kind)]


def test_who_breaks_the_silence_and_how_fast_the_answer_comes():
    talk = Conversation(rtt_ms=30)
    talk.say(0, 100)
    talk.say(1, 100)
    for _ in range(3):
        talk.say(1, 40, after_ms=300)
        talk.say(0, 41, after_ms=2)
    talk.say(0, 40, after_ms=500)
    talk.say(1, 50, after_ms=30)
    exchanges = of(Exchange, observe(talk))
    assert [one.first for one in exchanges] == ["responder"] * 3 + ["initiator"]
    assert [one.answer_delay_ns // MS for one in exchanges] == [2, 2, 2, 30]
    assert {one.rtt_ns // MS for one in exchanges} == {30}
    last = exchanges[-1]
    assert (last.initiator_first, last.responder_first, last.answered) == (1, 3, 4)
    assert (last.question_bytes, last.answer_bytes) == (40, 50)
    assert (last.payload_bytes_initiator, last.payload_bytes_responder) == (100 + 3 * 41 + 40, 100 + 3 * 40 + 50)


def test_what_stood_last_before_the_far_sides_word_is_told():
    """A shell's output, in however many segments; a poll that stands open; nothing where the far side spoke last."""
    talk = Conversation(rtt_ms=30)
    talk.say(0, 100)
    talk.say(1, 40, after_ms=300)
    for rest, more in ((700, 0), (60, 0), (0, 30), (0, 0)):
        talk.say(0, 41, after_ms=2)
        talk.say(0, rest)
        talk.say(1, more, after_ms=40)
        talk.say(1, 40, after_ms=300)
    talk.say(0, 41, after_ms=2)
    assert [one.before_bytes for one in of(Exchange, observe(talk))] == [0, 741, 101, 0, 41]


def test_what_stood_last_is_told_from_the_first_where_nobody_was_seen_to_dial():
    """A poll whose answer is the first that is seen: the far side is taken for the initiator."""
    talk = Conversation(rtt_ms=30, handshake=False)
    talk.say(1, 90)
    for _ in range(3):
        talk.say(0, 240, after_ms=2)
        talk.say(1, 90, after_ms=700)
    talk.say(0, 240, after_ms=2)
    assert [(one.first, one.before_bytes) for one in of(Exchange, observe(talk))] == [("initiator", 240)] * 3


def test_a_slow_echo_is_an_answer_not_a_question():
    """Over 150 ms of round trip a user's keys break the silence; their echoes do not, late as they come."""
    talk = Conversation(rtt_ms=150)
    talk.say(0, 100)
    for _ in range(5):
        talk.say(0, 36, after_ms=700)
        talk.say(1, 36, after_ms=150)
    exchanges = of(Exchange, observe(talk))
    assert [one.first for one in exchanges] == ["initiator"] * 5


def test_large_questions_and_answers_are_no_exchange():
    talk = Conversation()
    talk.say(0, 100)
    for question, answer in ((513, 10), (10, 513), (300, 10)):
        talk.say(1, question, after_ms=300)
        if question == 300:
            talk.say(1, 300, after_ms=1)
        talk.say(0, answer, after_ms=2)
    seen = observe(talk)
    assert of(Exchange, seen) == []
    assert of(FlowClosed, seen)[0].responder_first == 3


def test_what_is_sent_again_says_nothing_new():
    talk = Conversation()
    talk.say(0, 100)
    talk.say(1, 40, after_ms=300)
    talk.again(1, 40, after_ms=200)
    talk.keepalive(1, after_ms=5000)
    closed = of(FlowClosed, observe(talk))[0]
    assert (closed.payload_bytes_initiator, closed.payload_bytes_responder, closed.responder_first) == (100, 40, 1)


def test_the_opener_is_known_from_either_half_of_the_handshake():
    talk = Conversation(handshake=False)
    talk.packet(1, 0, SYN | ACK)
    talk.say(1, 20)
    (opened,) = of(FlowOpened, observe(talk))
    assert opened.flow.initiator == "10.0.0.2"
    assert opened.flow.initiator_known
    talk = Conversation(handshake=False)
    talk.say(1, 20)
    (opened,) = of(FlowOpened, observe(talk))
    assert opened.flow.initiator == "10.0.0.1"
    assert not opened.flow.initiator_known


def test_a_port_used_again_is_another_flow():
    talk = Conversation()
    talk.say(0, 10)
    talk.packet(0, 0, ACK | FIN)
    talk.packet(1, 0, ACK | FIN)
    talk.packet(0, 0, ACK)
    talk.packet(0, 0, SYN)
    talk.say(0, 33)
    seen = observe(talk)
    assert [type(one).__name__ for one in seen] == ["FlowOpened", "FlowClosed", "FlowOpened", "FlowClosed"]
    assert [one.reason for one in of(FlowClosed, seen)] == ["closed", "end"]
    assert of(FlowClosed, seen)[1].payload_bytes_initiator == 33


def test_a_full_table_lets_conversations_go_last():
    table = FlowTable(4)
    talk = Conversation()
    talk.say(0, 10)
    talk.say(1, 10)
    seen = table.receive(talk.block())
    for port in range(50):
        scan = Conversation(port=2000 + port, handshake=False, start_ns=talk.now_ns + port * MS)
        scan.packet(0, 0, SYN)
        seen += table.receive(scan.block())
    assert table.evicted == 47
    assert len(table) == 4
    assert {one.reason for one in of(FlowClosed, seen)} == {"evicted"}
    assert all(one.flow.initiator_port >= 2000 for one in of(FlowClosed, seen))


def test_idle_flows_end_on_ticks_conversations_after_a_day():
    table = FlowTable()
    talk = Conversation()
    talk.say(0, 10)
    talk.say(1, 10)
    half = Conversation(port=7, handshake=False)
    half.packet(0, 0, SYN)
    table.receive(talk.block())
    table.receive(half.block())
    end_ns = talk.now_ns
    missed, closed = table.tick(end_ns + 181_000 * MS)
    assert isinstance(missed, FlowsUnanswered)
    assert closed.flow.initiator_port == 7
    assert table.tick(end_ns + 86_000_000 * MS) == []
    (closed,) = table.tick(end_ns + 86_401_000 * MS)
    assert (closed.reason, closed.time_ns) == ("idle", end_ns + 86_401_000 * MS)


@pytest.mark.parametrize(
    ("fact", "carrier"),
    [
        (SshBanner(0, "SSH-2.0-x"), "ssh"),
        (TlsClientHello(0, "example.org", ()), "tls"),
        (DnsMessage(0, False, "example.org", 16, 0), "dns"),
        (None, "tcp"),
    ],
)
def test_carriers(fact, carrier):
    talk = Conversation()
    if fact is not None:
        talk.fact(fact)
    talk.say(0, 20)
    assert of(FlowClosed, observe(talk))[0].carrier == carrier


def test_icmp_echo_is_one_conversation():
    rows = np.zeros(2, PACKET)
    mapped = [np.frombuffer(b"\0" * 10 + b"\xff\xff" + bytes([10, 0, 0, one]), "u1") for one in (2, 1)]
    rows["protocol"] = 1
    rows["destination_port"] = 77
    rows["payload_bytes"] = 56
    rows["time_ns"] = [10**18, 10**18 + MS]
    rows["source_port"] = [8 << 8, 0]
    rows["source"] = mapped
    rows["destination"] = mapped[::-1]
    for order in ([0, 1], [1, 0]):
        table = FlowTable()
        seen = table.receive(Packets(time_ns=0, netns=3, rows=rows[order].copy())) + table.close(2 * 10**18)
        (opened,) = of(FlowOpened, seen)
        assert (opened.flow.initiator, opened.flow.initiator_known, opened.flow.netns) == ("10.0.0.2", True, 3)
        assert of(FlowClosed, seen)[0].packets == 2


@settings(max_examples=200, derandomize=True)
@given(st.binary(min_size=16, max_size=16))
def test_addresses(packed):
    assert ipaddress.ip_address(address_text(packed)) in (
        ipaddress.IPv6Address(packed), ipaddress.IPv6Address(packed).ipv4_mapped)


def ssh_session(steps):
    talk = Conversation(rtt_ms=20)
    for side in (0, 1):
        talk.fact(SshBanner(0, "SSH-2.0-OpenSSH_9.2p1"))
        talk.say(side, 41)
        talk.fact(kexinit("ext-info-c" if side == 0 else "ext-info-s"))
        talk.say(side, 1100)
    talk.newkeys(1, 500)
    talk.newkeys(0, 16)
    for side, size, after_ms in steps:
        talk.say(side, size, after_ms=after_ms)
    return talk


REVERSE = [(0, 44, 1), (1, 44, 20), (0, 60, 1), (1, 68, 20), (0, 308, 1), (1, 28, 20), (0, 68, 1), (0, 60, 1),
           (1, 364, 20), (1, 28, 5), (1, 92, 4000), (0, 44, 1), *[(1, 76, 170), (0, 76, 1)] * 12]


def test_a_reverse_tunnel_through_the_table():
    uses = [one.use for one in of(FlowUse, observe(ssh_session(REVERSE)))]
    assert uses[:3] == ["authenticated", "ssh-reverse-forward-request", "ssh-reverse-forward-request"]
    assert "ssh-reverse-channel-open" in uses


def test_newkeys_within_a_segment_starts_the_records_there():
    """The server's NEWKEYS and its first encrypted record may share a segment: only the record counts."""
    talk = Conversation()
    for side in (0, 1):
        talk.fact(kexinit())
        talk.say(side, 1100)
    talk.newkeys(1, 500)
    talk.newkeys(0, 16, more=44)
    for side, size in ((1, 44), (0, 60), (1, 68), (0, 308), (1, 28)):
        talk.say(side, size)
    assert [one.use for one in of(FlowUse, observe(talk))] == ["authenticated"]


steps = st.lists(
    st.tuples(st.integers(0, 1), st.sampled_from((28, 36, 44, 52, 60, 68, 76, 92, 364, 1448)),
              st.sampled_from((1, 20, 90, 300, 1200))),
    max_size=60,
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(steps, st.lists(st.integers(0, 120), max_size=6))
def test_blocks_may_be_cut_anywhere(extra, cuts):
    talk = ssh_session(REVERSE + extra)
    whole = observe(talk)
    table, seen = FlowTable(), []
    block = talk.block()
    edges = sorted({0, len(block.rows), *(min(cut, len(block.rows)) for cut in cuts)})
    for start, end in itertools.pairwise(edges):
        seen += table.receive(talk.block(start, end))
    assert seen + table.close(talk.now_ns) == whole


@pytest.mark.parametrize("rows", [np.zeros(8, PACKET)[::2], np.zeros((2, 2), PACKET), np.zeros(4, np.uint64)])
def test_what_are_no_rows_in_a_row_is_refused_and_changes_nothing(rows):
    table = Table(16)
    table.add(np.zeros(1, PACKET), 0, 1, 0)
    with pytest.raises(ValueError, match="contiguous"):
        table.add(rows, 0, 1, 0)
    assert table.size == 1


def test_facts_without_rows_or_flows_are_survived():
    table = FlowTable()
    facts = (SshBanner(5, "x"), SshNewKeys(9, 1), SshKexInit(-3, (), (), (), (), (), (), (), ()))
    assert table.receive(Packets(time_ns=0, netns=0, rows=np.zeros(0, PACKET), facts=facts)) == []
    seen = table.receive(Packets(time_ns=0, netns=0, rows=np.zeros(1, PACKET), facts=facts))
    assert [type(one) for one in seen] == [FlowOpened]
    with pytest.raises(ValueError, match="PACKET"):
        table.receive(Packets(time_ns=0, netns=0, rows=np.zeros(2, "u1")))
