"""Conversations drawn at random: few ordinary ones are taken for a reverse shell, none for certain; most shells are.

Bounds are those of this draw, with room for a handful; benchmarks/conversations.py plays many more.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from random import Random

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
from conversations.ordinary import ORDINARY
from conversations.shells import SHELLS, lines_with_a_prompt, terminal
from conversations.wire import FAR, NEAR, Wire, judge, observed, talk

from gpuguard.core.observations import Exchange

ORDINARY_EACH, SHELLS_EACH = 8, 12
#: How many of the shells of a class are at least suspect at some time; over UDP two of three.
NAMED_MIN = {"implant_that_polls": 0.4, "slow_operator": 0.6}


def counted(program, carrier, each, start=10_000):
    counts = Counter()
    for seed in range(start, start + each):
        one = judge(talk(program, Random(f"{program.__name__} {carrier} {seed}"), carrier))
        counts.update(suspect=one.suspect, confirmed=one.confirmed, stands=one.stands)
    return counts


def test_few_ordinary_conversations_are_suspect_and_none_is_confirmed():
    total = Counter()
    for program, carriers in ORDINARY.items():
        for carrier in carriers:
            found = counted(program, carrier, ORDINARY_EACH)
            assert not found["confirmed"], (program.__name__, carrier)
            total += found
    played = ORDINARY_EACH * sum(map(len, ORDINARY.values()))
    assert total["suspect"] <= 0.06 * played
    assert total["stands"] <= 0.04 * played


@pytest.mark.parametrize("program", SHELLS, ids=lambda program: program.__name__)
def test_most_shells_are_suspect(program):
    for carrier in SHELLS[program]:
        least = 0.4 if carrier == "udp" else NAMED_MIN.get(program.__name__, 0.75)
        assert counted(program, carrier, SHELLS_EACH)["suspect"] >= least * SHELLS_EACH, carrier


def test_terminals_are_confirmed_and_lines_are_not():
    assert sum(counted(terminal, carrier, SHELLS_EACH)["confirmed"] for carrier in ("tcp", "tls")) >= SHELLS_EACH
    assert not counted(lines_with_a_prompt, "tls", SHELLS_EACH)["confirmed"]


def quiet(rtt_s=0.01):
    wire = Wire(Random(1), "tcp")
    wire.rtt_s, wire.loss, wire.late, wire.gathers, wire.delayed_ack_s = rtt_s, 0.0, 0.0, [False, False], 0.0
    return wire


def test_a_wire_shows_what_was_said_on_it():
    wire = quiet()
    wire.near(70, 0.1)
    for number in range(5):
        heard_s = wire.far(20, 1.0 + number)
        assert heard_s == pytest.approx(1.005 + number, abs=0.001)
        wire.near(30, heard_s + 0.002)
    led = [one for one in observed(wire) if isinstance(one, Exchange)]
    assert [(one.first, one.question_bytes, one.answer_bytes) for one in led] == [("responder", 20, 30)] * 5
    assert led[0].rtt_ns == pytest.approx(10_000_000, rel=0.01)
    assert all(one.answer_delay_ns == pytest.approx(2_000_000, abs=2) for one in led)


def test_small_words_are_gathered_until_the_last_is_acknowledged():
    wire = quiet()
    wire.gathers = [True, False]
    for at_s in (1.0, 1.001, 1.002):
        wire.near(10, at_s)
    sizes = wire.packets().rows["payload_bytes"]
    assert sizes[sizes > 0].tolist() == [10, 20]


@pytest.mark.parametrize("side", [NEAR, FAR])
def test_what_is_lost_comes_later_and_is_sent_again(side):
    wire = quiet()
    wire.loss = 1.0
    heard_s = (wire.near, wire.far)[side](10, 1.0)
    assert heard_s > 1.2
    rows = wire.packets().rows
    assert (rows["payload_bytes"] > 0).sum() == 2 - side
    assert len(set(rows["sequence"][rows["payload_bytes"] > 0])) == 1


@pytest.mark.parametrize(("carrier", "least", "most"),
                         [("tcp", 10, 10), ("tls", 32, 32), ("ssh", 36, 60), ("udp", 10, 10)])
def test_carriers_wrap(carrier, least, most):
    wire = Wire(Random(2), carrier)
    wire.near(10, 1.0)
    assert least <= wire.packets().rows["payload_bytes"].max() <= most
