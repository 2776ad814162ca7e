"""Reverse tunnel, reverse shell, relay and SSH use: look-alikes first, then what they are there to find."""

from __future__ import annotations

import itertools
import random

import msgspec
import numpy as np
import pytest

from gpuguard.core.addresses import address_bytes
from gpuguard.core.detectors import relay, reverse_shell, reverse_tunnel, ssh_use
from gpuguard.core.host import Host
from gpuguard.core.observations import OPENED_FLOW, Exchange, FlowClosed, FlowsOpened, FlowUse
from gpuguard.core.records import HostInfo, ProcessStarted, Socket, Sockets, Tick
from gpuguard.core.subjects import FlowId, ProcessId

MS = 1_000_000
START = 10**18
FLOW = FlowId(0, 6, "10.0.0.2", 40_000, "203.0.113.9", 443, START)
DATAGRAMS = FlowId(0, 17, "10.0.0.2", 40_000, "203.0.113.9", 443, START, initiator_known=False)
CONFIRMED = 19.6
SUSPECT = 6.0


def talk(rows, *, carrier="tls", flow=FLOW, rtt_ns=30 * MS, out=100, into=100):
    """Exchanges of (who spoke first, gap ms, question, answer, delay ms, what stood before); bytes grow by these."""
    now, counts, seen, said = START, [0, 0], [], 0
    for first, gap_ms, question, answer, delay_ms, *before in rows:
        now += round(gap_ms * MS)
        counts[first == "responder"] += 1
        near, far = (answer, question) if first == "responder" else (question, answer)
        out, into = out + near + max(0, sum(before) - said), into + far
        said = answer
        seen.append(Exchange(
            time_ns=now + round(delay_ms * MS), flow=flow, first=first, answer_delay_ns=round(delay_ms * MS),
            question_bytes=question, answer_bytes=answer, initiator_first=counts[0], responder_first=counts[1],
            answered=sum(counts), rtt_ns=rtt_ns, carrier=carrier, payload_bytes_initiator=out,
            payload_bytes_responder=into, before_bytes=sum(before),
        ))
    return seen


def judge(items, *, host=None, detector=None):
    """Return the standing weight by label, each as the guard would add it up: never below nothing."""
    host = host or Host()
    detector = detector or reverse_shell.Detector()
    totals = {}
    for item in items:
        for one in detector.receive(item, host):
            totals[one.label] = max(0.0, totals.get(one.label, 0.0) + one.nats)
            assert one.text
            assert one.start_ns <= one.time_ns
    return totals


def typing(count, size=98, seed=1):
    """Keys and their echoes; each sixth is Enter, and whoever typed it reads what it printed."""
    rng = random.Random(seed)
    return [("responder", min(1400, 90 + rng.lognormvariate(4.3, 0.8)) + 1500 * (i % 6 == 4), size, size, 0.4,
             size + (i % 6 == 4) * (300 + 9 * i)) for i in range(count)]


def polled(count, before=240, seed=5):
    """A bot's long polls: an event, at once a reply of any size or the next poll, which then stands open."""
    rng = random.Random(seed)
    return [("responder", rng.uniform(600, 4000), rng.choice((94, rng.randint(200, 260))),
             rng.choice((before, rng.randint(300, 480))), rng.choice((0.7, 1, 3, 13, 27)),
             before - 8 if i == 1 else before + rng.randint(-1, 1)) for i in range(count)]


def commands(count, seed=3, delays=(0.2, 1, 3, 20)):
    """Lines of a shell that is no terminal, each after the last one's output and prompt."""
    rng = random.Random(seed)
    return [("responder", rng.uniform(800, 4000), rng.randint(5, 25), rng.randint(5, 90), rng.choice(delays),
             rng.choice((2, rng.randint(20, 900)))) for _ in range(count)]


LOOK_ALIKES = {
    "heartbeat": [("responder", 5000 + 3 * (i % 2), 40, 40, 0.3) for i in range(200)],
    "fast heartbeat": [("responder", 250, 40, 40, 0.3) for _ in range(200)],
    "acknowledged pushes": [("responder", 100 + 37 * (i % 29), 60 + 13 * (i % 31), 10, 1) for i in range(200)],
    "peers": [(("responder", "initiator")[i % 2], 100 + 91 * (i % 17), 60, 60, 1) for i in range(200)],
    "a user far from the server": [("initiator", 130 + 31 * (i % 13), 36, 36, 33) for i in range(200)],
    "prompts answered by a script": [("responder", 150 + 41 * (i % 7), 90 + 29 * (i % 11), 9 + i % 8, 1)
                                     for i in range(200)],
    "words that TCP held back until the far side's came": [("responder", 130 + 31 * (i % 13), 74, 168, 0.02)
                                                          for i in range(200)],
    "answers from far away": [("responder", 130 + 31 * (i % 13), 36, 36, 31) for i in range(200)],
    "a few": typing(4),
    "a service: requests like lines, one function": [("responder", 600 + 487 * (i % 13), 95 + 7 * (i % 11),
                                                      80 + 41 * (i % 17), 0.4 + i % 5 / 20) for i in range(200)],
    "the same, held up once": [("responder", 600 + 487 * (i % 13), 95 + 7 * (i % 11), 80 + 41 * (i % 17),
                                9.0 if i == 3 else 0.4 + i % 5 / 20) for i in range(9)],
    "a worker whose poll is empty after two seconds": [
        ("responder", 300 + 217 * (i % 7), 90 + 11 * (i % 5), 240 + 31 * (i % 7), 1 + 7 * (i % 6)) if i % 3 == 1 else
        ("responder", 2_040 + i % 4, 25, 61, 0.3 + i % 3 / 20) for i in range(200)],
    "events of a chat, acknowledged, now and then by an answer": [
        ("responder", 700 + 487 * (i % 7), 62 + 7 * (i % 9), 66 + i % 5 if i % 7 else 100 + i % 40,
         0.4 + 4 * (i % 3 == 0)) for i in range(60)],
    "long polls": polled(60),
    "a stream of HTTP/2: windows grow before the answer comes": [
        ("responder", 700 + 487 * (i % 7), 59 + 13 * (i % 14), 65 if i % 5 else 90 + 31 * (i % 12),
         0.2 + 7 * (i % 3 == 0)) for i in range(60)],
    "a device that confirms in the words of the request": [
        ("responder", 700 + 487 * (i % 7), 45 + i % 5, 61 + i % 5, 0.7 + 4 * (i % 3), 61 + (i - 1) % 5)
        for i in range(200)],
    "a device that confirms in one of two lengths": [
        ("responder", 700 + 487 * (i % 7), 6 + 5 * (i % 5), 6 if i % 5 else 16, 0.7 + 4 * (i % 3), 58 if i % 4 else 6)
        for i in range(200)],
    "a busy service: nobody types that fast": [("responder", 90 + 131 * (i % 11), 95 + 7 * (i % 11), 80 + 41 * (i % 17),
                                                0.3 * (1 + i % 40)) for i in range(200)],
}


def redialled(rows, count=3, *, every_s=6.0, carrier="tls"):
    """The same exchanges on one connection after the other to one place, ``count`` on each."""
    seen = []
    for index in range(0, len(rows), count):
        start_ns = seen[-1].time_ns + round(every_s * 1e9) if seen else START
        flow = msgspec.structs.replace(FLOW, initiator_port=40_000 + index, start_ns=start_ns)
        part = talk([(*row[:5], 0) if not i else row for i, row in enumerate(rows[index:index + count])],
                    flow=flow, carrier=carrier)
        seen += [msgspec.structs.replace(one, time_ns=one.time_ns + start_ns - START) for one in part]
    return seen


def test_lines_that_are_echoed_are_a_shells():
    rows = [("responder", 900 + 487 * (i % 13), 9 + 3 * (i % 5), 8 + 3 * (i % 5), 0.13) for i in range(10)]
    assert SUSPECT <= judge(talk(rows, carrier="tcp", rtt_ns=None))["reverse-shell"] < CONFIRMED


@pytest.mark.parametrize("name", LOOK_ALIKES)
def test_look_alikes_weigh_nothing(name):
    assert judge(talk(LOOK_ALIKES[name])).get("reverse-shell", 0.0) < SUSPECT


def in_turn(rows):
    """The same, this host saying nothing but its answers."""
    return [(*row[:5], rows[i - 1][3] if i else 0) for i, row in enumerate(rows)]


def test_a_client_that_writes_to_a_slow_server_is_left_alone():
    rng = random.Random(7)
    inserts = in_turn([("responder", rng.uniform(500, 1600), rng.choice((15, 15, 16)), rng.randint(60, 300),
                        rng.uniform(0.9, 6)) for _ in range(60)])
    mail = in_turn([("responder", rng.uniform(500, 1600), (24, 14, 14, 8, 31, 14)[i % 6],
                     (rng.randint(20, 40), rng.randint(20, 40), 6, rng.randint(40, 300), 6, 24)[i % 6],
                     rng.uniform(0.2, 9)) for i in range(60)])
    assert judge(talk(inserts, carrier="tcp")) == {}
    assert judge(talk(inserts)) == {}
    assert judge(talk(mail, carrier="tcp")).get("reverse-shell", 0.0) < SUSPECT
    for count in (2, 3, 4):
        assert judge(redialled(mail, count, carrier="tcp")) == {}
        assert judge(redialled(in_turn(commands(60)), count, carrier="tcp")) == {}


def test_calls_back_in_clear_are_left_alone():
    rng = random.Random(8)
    calls = in_turn([("responder", rng.uniform(500, 3000), rng.randint(70, 140), rng.randint(20, 300),
                      rng.uniform(1, 18)) for _ in range(60)])
    assert judge(talk(calls, carrier="tcp")) == {}
    assert judge(redialled(calls, 3, carrier="tcp")) == {}


def test_a_shell_without_a_prompt_is_suspect_by_lines_of_several_lengths():
    assert judge(talk(in_turn(commands(12)), carrier="tcp"))["reverse-shell"] >= SUSPECT


#: A client whose server takes 0.2 to 2 s for each answer, and which asks the next question at once.
SLOW_SERVERS = {
    "mail handed in": [("responder", rng.uniform(200, 2000), rng.randint(14, 60), rng.randint(6, 45),
                        rng.uniform(0.15, 0.35), rng.randint(6, 45))
                       for rng in [random.Random(4)] for _ in range(200)],
    "requests on one connection": [("responder", rng.uniform(200, 2000), rng.randint(200, 500), rng.randint(210, 213),
                                    rng.choice((0.2, 1, 4)), rng.randint(210, 213))
                                   for rng in [random.Random(5)] for _ in range(200)],
    "the same to places in turn": [("responder", rng.uniform(200, 2000), rng.randint(60, 500), rng.randint(180, 260),
                                    0.3, rng.randint(180, 260))
                                   for rng in [random.Random(6)] for _ in range(200)],
    "a probe of health": [("responder", 230 + 9 * (i % 3), 120, 24, 0.2, 70) for i in range(200)],
    "leave taken of TLS after each answer": [("responder", 200 + 300 * (i % 5), 300 + 41 * (i % 9), 24, 0.3 + i % 4)
                                             for i in range(200)],
}


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("name", sorted({*LOOK_ALIKES, *SLOW_SERVERS} - {"a few"}))
def test_look_alikes_that_are_dialled_again_weigh_nothing(name, count):
    rows = (LOOK_ALIKES.get(name) or SLOW_SERVERS[name])[:90]
    for carrier, every_s in (("tls", 0.5), ("tcp", 60.0)):
        assert judge(redialled(rows, count, every_s=every_s, carrier=carrier)).get("reverse-shell", 0.0) < SUSPECT


def test_a_shell_that_is_dialled_again_for_each_few_commands_is_suspect():
    echoed = [("responder", 900 + 487 * (i % 13), 9 + 3 * (i % 5), 8 + 3 * (i % 5), 0.13, 40) for i in range(12)]
    for rows in (echoed, commands(12)):
        for count in (3, 4):
            assert judge(redialled(rows, count, carrier="tcp"))["reverse-shell"] >= SUSPECT
            assert judge(redialled(rows, count, every_s=4000)) == {}
        assert judge(redialled(rows[:7])) == {}
    detector = reverse_shell.Detector()
    said = [one for item in redialled(commands(12)) for one in detector.receive(item, Host())]
    assert "4 connections, one after the other" in said[0].text


def test_connections_at_once_to_one_place_are_each_by_itself():
    items = redialled(commands(12))
    early = [msgspec.structs.replace(one, flow=msgspec.structs.replace(one.flow, start_ns=START)) for one in items]
    assert judge(early) == {}


def registered(count, seed=9):
    """A device that is read by the server it called (LwM2M), and tells of changes now and then."""
    rng = random.Random(seed)
    rows, said = [], 0
    for i in range(count):
        answer = rng.randint(10, 62)
        rows.append(("responder", rng.lognormvariate(7.3, 0.7), rng.randint(16, 26), answer, rng.uniform(1, 30),
                     said + 30 * (i % 5 == 4)))
        said = answer
    return rows


#: Played at round trips that are longer than the silence that is asked for, so that each answer seems to break it.
UDP_LOOK_ALIKES = {
    "a slow server, questions of one length": [("responder", 100 + 131 * (i % 7), 12, 40, 0.1) for i in range(200)],
    "the same, answers as long": [("responder", 100 + 131 * (i % 7), 36, 36, 0.1) for i in range(200)],
    "events, acknowledged by QUIC": [("responder", 100 + 131 * (i % 7), 33, 34, 0.8) for i in range(200)],
    "words of a game": [("responder", 100 + 131 * (i % 7), 6 + 7 * (i % 6), 6 if i % 3 else 20 + 9 * (i % 5), 0.1)
                        for i in range(200)],
    "keys of SSH in a VPN that nobody knows": typing(200, 96),
    "and of telnet": typing(200, 68),
    "a device that its server reads": registered(60),
}


@pytest.mark.parametrize("name", [*LOOK_ALIKES, *UDP_LOOK_ALIKES])
def test_look_alikes_over_udp_weigh_nothing(name):
    rows = LOOK_ALIKES.get(name) or UDP_LOOK_ALIKES[name]
    assert judge(talk(rows, carrier="udp", flow=DATAGRAMS, rtt_ns=None)) == {}


def over_udp(rows, more=120, *, flow=DATAGRAMS, carrier="udp"):
    """Exchanges over UDP after each fourth of which this host goes on talking."""
    items = talk(rows, carrier=carrier, flow=flow, rtt_ns=None)
    return [msgspec.structs.replace(one, payload_bytes_initiator=one.payload_bytes_initiator + i // 4 * more)
            for i, one in enumerate(items)]


def test_a_shell_over_udp_is_suspect_and_no_more():
    for rows in (typing(40, 1), typing(40, 33), commands(12)):
        assert SUSPECT <= judge(over_udp(rows))["reverse-shell"] < CONFIRMED
    assert judge(over_udp(typing(7, 1))) == {}
    detector = reverse_shell.Detector()
    said = [one for item in over_udp(typing(40, 1)) for one in detector.receive(item, Host())]
    assert "read from the first packet and the ports" in said[0].text
    assert any("who dialled" in one for one in said[0].blind_spots)


def test_who_called_by_udp_is_read_from_the_ports():
    for ends in ({"initiator_port": 443}, {"responder_port": 50_000}):
        assert judge(over_udp(typing(40, 1), flow=msgspec.structs.replace(DATAGRAMS, **ends))) == {}
    host = Host()
    host.receive(HostInfo(0, 1, "b", "h", 100, addresses=("203.0.113.9",)))
    assert judge(over_udp(typing(40, 1)), host=host) == {}
    assert judge(over_udp(typing(40, 1), carrier="dns")) == {}
    assert judge(over_udp(typing(40, 1), flow=msgspec.structs.replace(DATAGRAMS, protocol=1), carrier="icmp")) == {}


def test_typing_from_the_far_side_is_confirmed():
    totals = judge(talk(typing(8)))
    assert totals["reverse-shell"] >= SUSPECT
    assert judge(talk(typing(30)))["reverse-shell"] >= CONFIRMED


@pytest.mark.parametrize("carrier", ["tcp", "tls"])
def test_a_line_shell_is_suspect(carrier):
    assert SUSPECT <= judge(talk(commands(10), carrier=carrier, rtt_ns=None))["reverse-shell"] < CONFIRMED


def test_in_clear_short_commands_need_not_take_different_times():
    """On a fast network each takes as long as it takes to start a program. So does a service's one function, in TLS."""
    rows = commands(10, delays=(1.1, 1.3, 1.6))
    assert judge(talk(rows, carrier="tcp", rtt_ns=None))["reverse-shell"] >= SUSPECT
    assert judge(talk(rows, carrier="tls", rtt_ns=None)) == {}
    assert judge(talk(commands(10, delays=(0.3, 0.5, 0.7)), carrier="tcp", rtt_ns=None)) == {}, "nothing was started"
    steps = [("responder", 1500 + 487 * (i % 7), 21, 6, 0.14) if i % 3 else
             ("responder", 1500, 12 + i % 9, 70 + 11 * i, 0.14) for i in range(60)]
    assert judge(talk(steps, carrier="tcp")) == {}, "a debugger that steps through a stub"


@pytest.mark.parametrize(("asked", "accused"), [(2, True), (4, False)])
def test_most_that_a_service_is_asked_it_works_on(asked, accused):
    """Of so many questions one was answered shortly and within a second."""
    items = [msgspec.structs.replace(one, responder_first=asked * one.responder_first) for one in talk(commands(12))]
    assert (judge(items).get("reverse-shell", 0.0) >= SUSPECT) == accused


def test_commands_are_not_polls_for_being_short_at_first():
    """The first few print nothing but the prompt; then it is seen that no request stands open."""
    quiet = [(*row[:5], 2) for row in commands(8)]
    assert judge(talk(quiet, rtt_ns=None)) == {}
    assert judge(talk([*quiet, *commands(8, seed=4)], rtt_ns=None))["reverse-shell"] >= SUSPECT


def test_keys_that_are_wrapped_with_a_time_of_their_own_are_typed():
    rng = random.Random(11)
    rows = [(*row[:2], 43 + rng.randint(0, 4), 33 + rng.randint(-1, 4), 0.4, row[5] - 64) for row in typing(40)]
    rows[9::10] = [(*row[:3], 170 + 9 * i, 2) for i, row in enumerate(rows[9::10])]
    assert judge(talk(rows[:12])) == {}, "so may requests to a service be"
    assert judge(talk(rows))["reverse-shell"] >= CONFIRMED
    mixed = [(*row[:2], row[2] + 40 * (i % 3), *row[3:]) for i, row in enumerate(rows)]
    assert judge(talk(mixed)) == {}


@pytest.mark.parametrize(("size", "more", "typed"), [(1, 0, True), (23, 0, True), (98, 0, True), (23, 11, False),
                                                     (98, 11, False)])
def test_who_types_faster_than_a_silence_lasts_says_whole_keys_in_between(size, more, typed):
    """Five to eight more after each of them."""
    items, keys = [], 0
    for i, one in enumerate(talk(typing(40, size), carrier="tcp" if size == 1 else "tls")):
        items.append(msgspec.structs.replace(
            one, payload_bytes_initiator=one.payload_bytes_initiator + keys * size,
            payload_bytes_responder=one.payload_bytes_responder + keys * size + i * more))
        keys += 5 + i % 4
    assert (judge(items).get("reverse-shell", 0.0) >= CONFIRMED) == typed


@pytest.mark.parametrize(("carrier", "size", "letter"), [("tcp", 1, True), ("tls", 22, True), ("tls", 23, True),
                                                         ("tls", 30, True), ("tcp", 2, False), ("tls", 27, False)])
def test_a_letter_alone_need_not_print_to_be_confirmed(carrier, size, letter):
    """In TLS 1.3 and 1.2; what is a few bytes longer may be a debugger's word."""
    quiet = [(*row[:5], size) for row in typing(40, size)]
    assert (judge(talk(quiet, carrier=carrier))["reverse-shell"] >= CONFIRMED) == letter


def test_keys_that_a_multiplexer_writes_with_a_head_of_its_own_are_typed():
    """A record of 34 bytes and one of 58 each way (yamux in TLS): the first is what answers."""
    def judged(gaps_ms):
        rows = [(row[0], gap_ms, 92, 34, row[4], row[5] - 6) for row, gap_ms in zip(typing(40), gaps_ms, strict=True)]
        bodies = itertools.accumulate(row[5] - 34 for row in rows)
        return judge([msgspec.structs.replace(one, payload_bytes_initiator=one.payload_bytes_initiator + said)
                      for one, said in zip(talk(rows), bodies, strict=True)])

    assert judged([row[1] for row in typing(40)])["reverse-shell"] >= CONFIRMED
    unread = judged([90 + 131 * (i % 7) for i in range(40)])
    assert unread.get("reverse-shell", 0.0) < CONFIRMED, "calls, some of which answer more"


def test_polls_that_come_back_empty_at_the_pace_of_keys_are_not_typed():
    """A busy room: most words are of one length and get the next poll at once, others a reply first."""
    rng = random.Random(7)
    rows = [("responder", min(1400, 90 + rng.lognormvariate(6, 0.8)), 116 if i % 3 else 250 + i % 20,
             245 if i % 3 else 300 + 37 * i % 180, 0.9 + i % 3, 245) for i in range(60)]
    assert judge(talk(rows)) == {}
    keys = [("responder", row[1] + 1500 * (i % 3 == 1), 76, row[3] - 165, 0.9, rows[i - 1][3] - 165)
            for i, row in enumerate(rows)]
    assert judge(talk(keys))["reverse-shell"] >= CONFIRMED, "before the next key stands what the last one printed"


def test_who_was_echoed_goes_on_typing_in_a_program_that_fills_the_screen():
    keys = typing(40, size=1)
    screen = [(*row[:3], 20 + 5 * (i % 13), row[4]) for i, row in enumerate(typing(80, size=1, seed=2))]
    assert judge(talk(keys + screen, carrier="tcp"))["reverse-shell"] >= CONFIRMED
    assert judge(talk(screen, carrier="tcp", rtt_ns=None)) == {}, "who was never echoed"
    away = [("initiator", 300, 60, 60, 30)] * 80
    assert judge(talk(keys + away, carrier="tcp"))["reverse-shell"] == pytest.approx(0.0, abs=1e-9)
    lines = [("responder", 90 + 31 * (i % 13), 90 + 29 * (i % 11), 200 + 8 * (i % 9), 1) for i in range(80)]
    assert judge(talk(keys + lines, carrier="tls"))["reverse-shell"] == pytest.approx(0.0, abs=1e-9)


def test_lines_that_are_echoed_are_a_shells_by_the_clock_too():
    rows = [("responder", 8_000 + 300 * (i % 3), 5 + 3 * (i % 7), 6 + 3 * (i % 7), 0.2) for i in range(10)]
    assert judge(talk(rows, carrier="tcp", rtt_ns=None))["reverse-shell"] >= SUSPECT
    beats = [("responder", 8_000 + 300 * (i % 3), 20 + len(str(i)), 20 + len(str(i)), 0.2) for i in range(200)]
    assert judge(talk(beats, carrier="tcp", rtt_ns=None)) == {}, "a number that grows"


def test_ssh_is_named_as_such_and_a_tunnel_adds_to_it():
    request = FlowUse(START, FLOW, "ssh-reverse-forward-request", "ssh", 25.0, "asked", START, 30)
    alone = judge(talk(typing(6), carrier="ssh"))
    assert list(alone) == ["ssh-reverse-shell"]
    assert SUSPECT <= alone["ssh-reverse-shell"] < 10
    assert judge([request, *talk(typing(6), carrier="ssh")])["ssh-reverse-shell"] > 25


@pytest.mark.parametrize("larger", [0, 9])
@pytest.mark.parametrize("size", [36, 44])
def test_programs_that_ask_from_the_far_side_of_ssh_type_nothing(size, larger):
    """execnet's workers, watchdogs, pings of a WebSocket through -L: one record each way, now and then a longer one."""
    rng = random.Random(size)
    said, rows = size, []
    for i in range(60):
        answer = size + 8 * (larger and i % larger == 4)
        rows.append(("responder", rng.lognormvariate(6.9, 0.7), size, answer, rng.uniform(0.2, 20), said))
        said = answer
    assert judge(talk(rows, carrier="ssh")) == {}
    assert judge(talk(typing(12, size=size), carrier="ssh"))["ssh-reverse-shell"] >= SUSPECT


def test_openings_of_channels_are_no_talk():
    items = []
    for one in talk([("responder", 300 + 91 * (i % 7), 92, 44, 0.3) for i in range(30)], carrier="ssh"):
        items += [one, FlowUse(one.time_ns, FLOW, "ssh-reverse-channel-open", "ssh", 0.0, "opened", START, 50)]
    assert judge(items) == {}


def test_several_openings_and_ends_of_channels_at_once_are_no_talk():
    """Pages through a tunnel, some at once: each channel is opened and ended, for as many bytes each time."""
    request = FlowUse(START, FLOW, "ssh-reverse-forward-request", "ssh", 25.0, "asked", START, 30)
    rows = [(*one, kind) for i in range(30) for one, kind in (
        (("responder", 300 + 91 * (i % 7), (1 + i % 4) * 92, (1 + i % 4) * 44, 0.3), "open"),
        (("responder", 400, (1 + i % 3) * 72, (1 + i % 3) * 36, 0.3), "ended"))]
    items = []
    for row, one in zip(rows, talk([row[:5] for row in rows], carrier="ssh"), strict=True):
        single = one.answer_bytes in (44, 36)
        use = FlowUse(one.time_ns, FLOW, f"ssh-reverse-channel-{row[5]}", "ssh", 0.0, "", START, 50)
        items += [one, use] if single else [one]
    assert judge([request, *items]) == {}
    lines = talk([("responder", 900 + 91 * (i % 7), 92, 92, 3) for i in range(30)], carrier="ssh")
    assert judge([request, *items[:2], *lines])["ssh-reverse-shell"] >= CONFIRMED, "what costs the same is no opening"


def test_what_was_said_before_a_port_was_asked_for_came_through_no_tunnel():
    request = FlowUse(START, FLOW, "ssh-reverse-forward-request", "ssh", 25.0, "asked", START, 30)
    copied = talk([("responder", 400 + 91 * (i * 5 % 7), 76 + 280 * (i % 3 == 0), 260 + 8 * (i % 2), 3)
                   for i in range(8)],
                  carrier="ssh")
    assert judge([*copied, request]) == {}
    pages = talk([("responder", 900, 124, 300, 3)] * 4, carrier="ssh")
    assert judge([*copied, request, *pages]) == {}
    assert judge([request, *copied])["ssh-reverse-shell"] >= CONFIRMED


def test_a_client_in_lockstep_with_a_slow_server_is_not_led():
    """SFTP, one question after the other, of a server that thinks for longer than a silence."""
    rows = [("responder", 90 + 131 * (i % 7), 68 + 56 * (i % 2), 36 + 8 * (i % 3), 0.3 + i % 4) for i in range(40)]
    assert judge(talk(rows, carrier="ssh", out=400_000)) == {}


@pytest.mark.parametrize(("question", "answer"), [(68, 44), (48, 32), (60, 36), (240, 36), (92, 52)])
@pytest.mark.parametrize("flow", [FLOW, msgspec.structs.replace(FLOW, initiator_known=False)])
def test_what_an_ssh_server_asks_for_is_no_typing(flow, question, answer):
    """A forwarded agent that is used again and again, programs on X11, keepalives, a slow answer in a transfer."""
    rng = random.Random(question)
    rows = [("responder", rng.lognormvariate(6.3, 0.8), question, answer, rng.uniform(0.1, 30)) for _ in range(40)]
    assert judge(talk(rows, carrier="ssh", flow=flow), host=late(flow)) == {}


@pytest.mark.parametrize("carrier", ["ssh", "tls", "tcp"])
def test_keepalives_that_start_anew_when_somebody_types_are_a_clock(carrier):
    rows = [("responder", 3_500 if i % 5 == 0 else 1_000 + i % 3, 60, 60, 0.1) for i in range(40)]
    assert judge(talk(rows, carrier=carrier)) == {}


@pytest.mark.parametrize("carrier", ["tls", "tcp"])
@pytest.mark.parametrize("body", [lambda rng: 0, lambda rng: rng.randint(80, 500)])
def test_a_client_in_lockstep_with_a_slow_server_types_nothing(carrier, body):
    """Each answer takes the server a while, and the next request follows: its head first, then what it posts."""
    rng = random.Random(7)
    said, rows = 0, []
    for _ in range(60):
        rows.append(("responder", rng.lognormvariate(6, 0.7), 46, 62, rng.uniform(0.2, 6), said))
        said = 62 + body(rng)
    assert judge(talk(rows, carrier=carrier, out=500)) == {}


@pytest.mark.parametrize("carrier", ["tls", "tcp"])
def test_keys_that_print_now_and_then_are_typed(carrier):
    rng = random.Random(7)
    rows = [("responder", rng.lognormvariate(5.3, 0.7) + 1500 * (i % 9 == 8), 46, 62, 0.2,
             400 + i if i % 9 == 8 else 62) for i in range(60)]
    assert judge(talk(rows, carrier=carrier, out=500))["reverse-shell"] >= CONFIRMED
    unread = [(*row[:1], rng.lognormvariate(5.3, 0.7), *row[2:]) for row in rows]
    assert judge(talk(unread, carrier=carrier, out=500)).get("reverse-shell", 0.0) < SUSPECT, "requests of two kinds"
    rests = [(*row[:1], row[1] + 1500 * (i % 3 == 0), *row[2:]) for i, row in enumerate(rows)]
    rested = judge(talk(rests, carrier=carrier, out=500)).get("reverse-shell", 0.0)
    assert rested < CONFIRMED, "who rests whatever was said"
    steps = [(*row[:2], 46 + 9 * (rows[(i + 1) % 60][5] > 62), *row[3:]) for i, row in enumerate(rows)]
    assert judge(talk(steps, carrier=carrier, out=500)) == {}, "what prints more is no key"
    requests = [(*row[:5], min(row[5], 400)) for row in rows]
    same = judge(talk(requests, carrier=carrier, out=500)).get("reverse-shell", 0.0)
    assert same < SUSPECT, "nor is what comes before always the same request"
    large = [(*row[:2], 146, *row[3:]) for row in rows]
    assert judge(talk(large, carrier=carrier, out=9_000)) == {}, "nor is what is so long"


def test_a_visitor_in_a_tunnel_is_a_shell_whatever_this_side_types_beside():
    request = FlowUse(START, FLOW, "ssh-reverse-forward-request", "ssh", 25.0, "asked", START, 30)
    visited = FlowUse(START, FLOW, "ssh-reverse-channel-asked", "ssh", 6.5, "typed", START, 60)
    own = [("initiator", 300, 36, 36, 30)] * 10
    mine = talk(own + typing(6) + own, carrier="ssh")
    assert judge([request, visited, *mine]) == {"ssh-reverse-shell": 31.5}
    inbound = Host()
    inbound.receive(HostInfo(START, 0, "", "", 100, addresses=(FLOW.responder,)))
    assert judge([request, visited], host=inbound) == {}


def chaff(side="responder", carrier="tls", flow=FLOW):
    return [FlowUse(START + i, flow, f"keystrokes-from-{side}", carrier, 7.0, "chaff", START, 99) for i in range(4)]


def test_chaff_tells_who_types():
    begun = talk(typing(1))
    assert judge([*begun, *chaff()[:1]])["reverse-shell"] >= SUSPECT
    assert judge([*begun, *chaff()])["reverse-shell"] >= CONFIRMED
    assert judge([*begun, *chaff("initiator")]) == {}


def test_steps_at_the_pace_of_chaff_that_this_side_began_are_not_typed():
    """A simulator asks a policy server for each step, fifty a second, and asks again as soon as it is answered."""
    assert judge(chaff()) == {}
    assert judge([*talk([("responder", 300, 60, 60, 0.4), ("initiator", 300, 60, 60, 18)]), *chaff()]) == {}


def test_an_ssh_server_types_in_a_tunnel_only():
    request = FlowUse(START, FLOW, "ssh-reverse-forward-request", "ssh", 25.0, "asked", START, 30)
    begun = talk(typing(1), carrier="ssh")
    assert judge([*begun, *chaff(carrier="ssh")]) == {}
    assert judge([request, *begun, *chaff(carrier="ssh")])["ssh-reverse-shell"] >= CONFIRMED


def test_what_turns_out_otherwise_is_taken_back():
    rows = typing(10) + [("initiator", 300, 60, 60, 30)] * 20
    assert judge(talk(typing(10)))["reverse-shell"] >= SUSPECT
    assert judge(talk(rows))["reverse-shell"] == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize(
    "flow",
    [
        FlowId(0, 6, "10.0.0.2", 40_000, "203.0.113.9", 443, START, initiator_known=False),
        FlowId(0, 17, "10.0.0.2", 40_000, "203.0.113.9", 443, START),
        FlowId(0, 6, "127.0.0.1", 40_000, "127.0.0.1", 443, START),
    ],
)
def test_nothing_is_concluded_where_the_direction_says_nothing(flow):
    assert judge(talk(typing(40), flow=flow)) == {}


UNSEEN = FlowId(0, 6, "10.0.0.2", 40_000, "203.0.113.9", 443, START, initiator_known=False)
TURNED = FlowId(0, 6, "203.0.113.9", 443, "10.0.0.2", 40_000, START, initiator_known=False)


def late(flow, *listening, port=40_000):
    """A host whose socket list shows its end of a connection, and what listens on it."""
    host = Host()
    listeners = [Socket(6, "0.0.0.0", one, "0.0.0.0", 0, 10, 2, 0) for one in listening]
    host.receive(Sockets(START, 0, (*listeners, Socket(6, "10.0.0.2", port, "203.0.113.9", 443, 1, 3, 0, (), 30_000))))
    return host


def turned(items):
    """The same talk where the far side's packet was seen first, and so is taken for the initiator."""
    return [msgspec.structs.replace(
        one, flow=TURNED, first="initiator" if one.first == "responder" else "responder",
        initiator_first=one.responder_first, responder_first=one.initiator_first,
        payload_bytes_initiator=one.payload_bytes_responder, payload_bytes_responder=one.payload_bytes_initiator)
        for one in items]


def test_sockets_tell_who_dialled_where_the_opening_was_not_seen():
    for items in (talk(typing(40), flow=UNSEEN, rtt_ns=None), turned(talk(typing(40), rtt_ns=None))):
        assert SUSPECT <= judge(items, host=late(UNSEEN, 22))["reverse-shell"] < CONFIRMED
        assert judge(items[:7], host=late(UNSEEN, 22)) == {}
    detector, host = reverse_shell.Detector(), late(UNSEEN)
    said = [one for item in items for one in detector.receive(item, host)]
    assert "the opening was not seen" in said[-1].text
    assert any("who dialled" in one for one in said[-1].blind_spots)


def test_what_was_accepted_or_may_have_been_is_left_alone():
    for items in (talk(typing(40), flow=UNSEEN, rtt_ns=None), turned(talk(typing(40), rtt_ns=None))):
        assert judge(items, host=late(UNSEEN, 40_000)) == {}
        assert judge(items) == {}
    low = msgspec.structs.replace(UNSEEN, initiator_port=2222)
    assert judge(talk(typing(40), flow=low), host=late(low, 22, port=2222)) == {}


def test_whether_what_was_begun_earlier_is_in_clear_is_not_known():
    host = late(UNSEEN, 22)
    differ = talk(commands(12), carrier="tcp", flow=UNSEEN, rtt_ns=None)
    alike = talk(commands(12, delays=(1.1, 1.3, 1.6)), carrier="tcp", flow=UNSEEN, rtt_ns=None)
    assert judge(differ, host=host)["reverse-shell"] >= SUSPECT
    assert judge(alike, host=host) == {}


def test_polls_that_began_earlier_are_left_alone_whoever_was_seen_first():
    for items in (talk(polled(60), flow=UNSEEN, rtt_ns=None), turned(talk(polled(60), rtt_ns=None))):
        assert judge(items, host=late(UNSEEN, 22)) == {}


def test_a_client_in_lockstep_with_a_far_server_is_not_led_by_it():
    rows = [("responder", 45 + i % 9, 80 + i % 60, 60, 0.4) for i in range(100)]
    assert judge(talk(rows, flow=UNSEEN, rtt_ns=None), host=late(UNSEEN, 22)) == {}


def test_chaff_of_a_connection_whose_opening_was_not_seen():
    begun = talk([("initiator", 300, 60, 60, 0.4)], flow=TURNED)
    typed = [*begun, *chaff("initiator", flow=TURNED)]
    assert SUSPECT <= judge(typed, host=late(UNSEEN))["reverse-shell"] < CONFIRMED
    assert judge([*begun, *chaff("responder", flow=TURNED)], host=late(UNSEEN)) == {}
    assert judge(typed, host=late(UNSEEN, 40_000)) == {}


def test_an_administrator_who_logs_in_is_left_alone():
    host = Host()
    host.receive(HostInfo(0, 1, "b", "h", 100, addresses=("203.0.113.9",)))
    assert judge(talk(typing(40)), host=host) == {}


def test_the_detector_stays_bounded_and_forgets_closed_flows():
    detector = reverse_shell.Detector()
    for port in range(reverse_shell.FLOWS_MAX + 100):
        flow = FlowId(0, 6, "10.0.0.2", port % 65536, "203.0.113.9", 443, START + port)
        detector.receive(talk(typing(1), flow=flow)[0], Host())
    assert len(detector._flows) == reverse_shell.FLOWS_MAX
    detector.receive(FlowClosed(START, flow, "closed", 9, 1, 1, 0, 1, 1, "tls", START), Host())
    assert len(detector._flows) == reverse_shell.FLOWS_MAX - 1
    for port in range(reverse_shell.PLACES_MAX + 100):
        flow = FlowId(0, 6, "10.0.0.2", 40_000, "203.0.113.9", port, START)
        for item in talk(typing(2), flow=flow):
            detector.receive(item, Host())
    assert len(detector._places) == reverse_shell.PLACES_MAX


def use(name, nats=25.0, flow=FLOW):
    return FlowUse(START + 5, flow, name, "ssh", nats, "seen", START, 30, ("padding",))


def test_a_request_and_its_use_are_evidence_of_a_tunnel():
    host, detector = Host(), reverse_tunnel.Detector()
    (request,) = detector.receive(use("ssh-reverse-forward-request"), host)
    assert (request.label, request.evidence_class, request.nats) == ("ssh-reverse-tunnel", "network", 25.0)
    assert request.blind_spots == ("padding",)
    assert detector.receive(use("ssh-reverse-channel-open", 0.0), host) == []
    assert detector.receive(use("authenticated", 0.0), host) == []
    assert detector.receive(Tick(START), host) == []
    host.receive(HostInfo(0, 1, "b", "h", 100, addresses=("203.0.113.9",)))
    assert detector.receive(use("ssh-reverse-forward-request"), host) == []


def test_uses_that_are_labels_are_named():
    host, detector = Host(), ssh_use.Detector()
    assert [one.label for one in detector.receive(use("ssh-jump", 6.0), host)] == ["ssh-jump"]
    assert [one.label for one in detector.receive(use("ssh-role-swap", 23.0), host)] == ["ssh-role-swap"]
    assert detector.receive(use("ssh-reverse-forward-request"), host) == []
    host.receive(HostInfo(0, 1, "b", "h", 100, addresses=("203.0.113.9",)))
    assert detector.receive(use("ssh-role-swap", 23.0), host) == []
    assert detector.receive(use("ssh-exec", 4.0), host) != []


TUNNEL = ProcessId("boot", 4170, 900)
OTHER = ProcessId("boot", 4180, 950)


def sockets(now_ns, inner_owner, sent=5000, received=6000):
    outer = Socket(6, FLOW.initiator, FLOW.initiator_port, FLOW.responder, FLOW.responder_port, 1, 11, 0, (TUNNEL,),
                   31_000, 7000, received)
    inner = Socket(6, "127.0.0.1", 44_314, "127.0.0.1", 22, 1, 12, 0, (inner_owner,), 30, sent, 100)
    return Sockets(now_ns, 0, (outer, inner))


def opened(flow):
    rows = np.zeros(1, OPENED_FLOW)
    for name in ("start_ns", "netns", "initiator_port", "responder_port"):
        rows[name] = getattr(flow, name)
    for name in ("initiator", "responder"):
        rows[name] = np.void(address_bytes(getattr(flow, name)))
    return FlowsOpened(flow.start_ns, rows)


def relayed(inner_owner, *, opened_after_ms, **counts):
    host, detector = Host(), relay.Detector()
    for process in (TUNNEL, OTHER):
        host.receive(ProcessStarted(START, process, None, "x", ("x",)))
    inner = FlowId(0, 6, "127.0.0.1", 44_314, "127.0.0.1", 22, START + opened_after_ms * MS)
    items = [
        use("ssh-reverse-forward-request"),
        opened(inner),
        FlowUse(START + 2 * MS, FLOW, "ssh-reverse-channel-open", "ssh", 8.0, "opened", START, 40),
        sockets(START + 900 * MS, inner_owner, **counts),
        sockets(START + 2900 * MS, inner_owner, **counts),
    ]
    seen = []
    for item in items:
        host.receive(item)
        seen += detector.receive(item, host)
    return seen


def test_one_process_that_holds_both_ends():
    seen = relayed(TUNNEL, opened_after_ms=1)
    assert [one.kind for one in seen] == ["one-process-both-ends", "like-amounts"]
    assert {(one.subject, one.label, one.evidence_class) for one in seen} == {(FLOW, "ssh-reverse-tunnel", "process")}
    assert "pid 4170" in seen[0].text
    assert "opened 1.0 ms before bytes from its far side" in seen[0].text
    assert seen[0].nats >= SUSPECT


def test_no_relay_where_another_process_time_or_amount_is_seen():
    assert relayed(OTHER, opened_after_ms=1) == []
    assert relayed(TUNNEL, opened_after_ms=-5000) == []
    assert [one.kind for one in relayed(TUNNEL, opened_after_ms=1, sent=50, received=9000)] == ["one-process-both-ends"]


@pytest.mark.parametrize(("port", "told"), [(40_000, ["one-process-both-ends"]), (8_022, [])])
def test_a_relay_whose_opening_was_missed_weighs_little(port, told):
    """This host's end has ``port``: below the range that Linux dials from, it may have been called."""
    unseen = FlowId(0, 6, FLOW.responder, 443, FLOW.initiator, port, START, False)
    host, detector = Host(), relay.Detector()
    host.receive(ProcessStarted(START, TUNNEL, None, "x", ("x",)))
    outer = Socket(6, unseen.responder, port, unseen.initiator, 443, 1, 11, 0, (TUNNEL,), 31_000, 7_000, 6_000)
    inner = Socket(6, "127.0.0.1", 44_314, "127.0.0.1", 22, 1, 12, 0, (TUNNEL,), 30, 5_000, 100)
    items = [Sockets(START + MS, 0, (outer, inner))]
    items += talk([("initiator", 300 + 91 * i, 60, 140, 1) for i in range(4)], flow=unseen)
    items += [opened(FlowId(0, 6, "127.0.0.1", 44_314, "127.0.0.1", 22, START + 1_175 * MS)),
              Sockets(START + 3_000 * MS, 0, (outer, inner))]
    seen = []
    for item in items:
        host.receive(item)
        seen += detector.receive(item, host)
    assert [one.kind for one in seen] == told
    assert sum(one.nats for one in seen) + reverse_shell.UNSEEN_NATS_MAX < CONFIRMED
