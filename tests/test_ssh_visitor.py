"""Who asks through a reverse tunnel: what only looks like it first, then keys, chaff and lines."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuguard.core.ssh.visitor import TURNS_MAX, Visitor

MS = 1_000_000
RTT_MS = 26.0
OPEN, CONFIRM = 92, 44
NO_LINES = ((60, 36), (72, 36))
OWN_KEY, KEY = 36, 76


def hear(segments, *, rtt_ms=RTT_MS):
    """Return what is said of (ms, whether from the far side, bytes), in any order, and after how many segments."""
    visitor = Visitor(round(rtt_ms * MS), CONFIRM, NO_LINES)
    for number, (at_ms, far, size) in enumerate(sorted(segments), 1):
        time_ns = 10**18 + round(at_ms * MS)
        if far:
            visitor.far(time_ns, size)
        elif said := visitor.near(time_ns, size):
            return said, number
    return "", 0


def asked(times_ms, size, answer, delay_ms=0.3):
    return [one for at in times_ms for one in ((at, True, size), (at + delay_ms, False, answer))]


def typed(seed, count=60, start_ms=0.0):
    """Return when somebody presses keys."""
    rng, now, times = random.Random(seed), start_ms, []
    for _ in range(count):
        now += rng.lognormvariate(4.87, 0.45)
        times.append(now)
    return times


def own_shell(times_ms, rtt_ms=RTT_MS, size=OWN_KEY):
    """Return the keys that this side types, and their echoes."""
    return [one for at in times_ms for one in ((at, False, size), (at + rtt_ms, True, size))]


def chaff(count, start_ms=0.0, seed=1):
    rng = random.Random(seed)
    return [start_ms + 20 * i + rng.uniform(0, 2) for i in range(count)]


def opened(times_ms, question, answer):
    """Return a channel for each question, as a page's requests come."""
    return [one for at in times_ms for one in (*asked([at], OPEN, CONFIRM), *asked([at + RTT_MS], question, answer))]


LOOK_ALIKES = {
    "a shell of this side's own": own_shell(typed(1)),
    "the same over a long way": own_shell(typed(2), rtt_ms=92),
    "the same with chaff": own_shell(chaff(400)),
    "the same with chaff, half a record's time away": own_shell(chaff(400), rtt_ms=30),
    "output that nobody asked for, and keys": [*own_shell(typed(3)), *[(700.0 * i, True, 60 + i) for i in range(9)]],
    "a window that is opened again after each echo": [
        *own_shell(typed(4)), *[(at + RTT_MS + 0.1, False, OWN_KEY) for at in typed(4)]],
    "answers from far away": asked(typed(5), KEY, KEY, delay_ms=60),
    "what TCP held back": asked(typed(6), KEY, KEY, delay_ms=0.02),
    "requests of one channel each": opened([2_000.0 * i for i in range(30)], 120, 400),
    "ends of channels": asked([2_000.0 * i for i in range(30)], 72, 36),
    "pages asked for on one channel": asked([2_000.0 * i for i in range(30)], 460, 1_400),
    "steps of one program": asked([3.0 * i for i in range(90)], KEY, KEY),
    "two lines": asked([2_000.0 * i for i in range(3)], 60, 140),
    "news that nobody answers": [(130.0 * i, True, KEY) for i in range(90)],
}


@pytest.mark.parametrize("name", LOOK_ALIKES)
def test_look_alikes_are_nobodys_shell(name):
    assert hear(LOOK_ALIKES[name], rtt_ms=92 if "long way" in name else RTT_MS) == ("", 0)


def test_five_keys_are_a_shells():
    assert hear(asked(typed(1), KEY, KEY)) == (f"5 keys of {KEY} bytes echoed by {KEY}", 10)


@pytest.mark.parametrize("rtt_ms", [0.3, 20.0, 26.0, 92.0])
def test_chaff_from_the_far_side_is_told_at_any_distance(rtt_ms):
    """Where the round trip is as long as the grid, each record also looks like an answer to the one before it."""
    assert hear(asked(chaff(40), KEY, KEY, delay_ms=0.2), rtt_ms=rtt_ms)[0].startswith("5 keys")


def test_a_shell_of_this_sides_own_hides_no_visitor():
    said, heard = hear([*own_shell(typed(1, 200)), *asked(typed(2, 200), KEY, KEY)])
    assert said.endswith(f"keys of {KEY} bytes echoed by {KEY}")
    assert heard < 60


def test_lines_are_a_shells():
    lines = asked([2_000.0 * i for i in range(9)], 60, 140, delay_ms=30)
    assert hear([*opened([-500.0], 60, 140), *lines])[0] == "3 lines, 60 bytes the last,"


@settings(derandomize=True)
@given(st.lists(st.tuples(st.integers(0, 10**6), st.booleans(), st.integers(0, 2**31)), max_size=400))
def test_nothing_grows_and_nothing_fails(segments):
    visitor = Visitor(26 * MS, CONFIRM, NO_LINES)
    for at_us, far, size in sorted(segments):
        if far:
            visitor.far(at_us * 1_000, size)
        else:
            assert isinstance(visitor.near(at_us * 1_000, size), str)
    assert len(visitor._turns) <= TURNS_MAX
