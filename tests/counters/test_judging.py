"""Looks at recorded work are named together: whether it mines first, then which honest kind."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuguard.core.counter_classes import PRIORS
from gpuguard.core.detectors.counters import Look
from gpuguard.counters.judging import ALIKE, Step, _kind, _named

ALLOWANCE = 3.0


def step(*like, nats=0.0, kind="unknown"):
    return Step(Look(0, 1, bool(like), nats, (), (), (), 0.0), kind, like, "unknown", "", 0.0)


def kinds(steps):
    return [one.kind for one in _named(steps, ALLOWANCE)]


def test_looks_of_which_none_is_certain_are_certain_together():
    unsure = (0.5, 0.24, 0.14, 0.12)
    assert _kind([step(*unsure)], ALLOWANCE) == "unknown"
    assert kinds([step(*unsure)] * 7) == ["training"] * 7


def test_which_honest_kind_is_asked_of_what_does_not_mine():
    # No kind has half of it, and yet it is plain that it is one of two and of which sooner.
    assert kinds([step(0.2, 0.42, 0.36, 0.02)] * 3) == ["training"] * 3
    assert kinds([step(0.1, 0.3, 0.3, 0.3)]) == ["unknown"]


def test_what_mines_is_named_so_only_where_it_could_be_an_accusation():
    assert kinds([step(0.9, 0.04, 0.03, 0.03, nats=2.0)] * 5) == ["unknown"] * 5
    assert kinds([step(0.9, 0.04, 0.03, 0.03, nats=4.0)] * 5) == ["mining"] * 5


def test_looks_at_rest_keep_their_kind_and_say_nothing_of_others():
    training = step(0.05, 0.9, 0.03, 0.02)
    assert kinds([training, step(kind="idle"), training]) == ["training", "idle", "training"]


@given(st.lists(st.floats(0.001, 1), min_size=4, max_size=4), st.integers(2, 7))
def test_many_looks_that_are_alike_are_worth_no_more_than_those_few_that_are_not(shares, count):
    like = [one / sum(shares) for one in shares]
    (one,) = kinds([step(*like, nats=4.0)])
    together = set(kinds([step(*like, nats=4.0)] * count))
    if one in together:
        return
    # Only what was in doubt is told anew, for the kind that was likelier than its prior.
    assert one == "unknown" or like[0] >= 0.5 or max(like[1:]) < 0.5
    assert all(name == "unknown" or like[list(PRIORS).index(name)] >= PRIORS[name] ** (1 / ALIKE) for name in together)


@pytest.mark.parametrize("likes", [[(1.0, 0.0, 0.0, 0.0)], [(0.0, 1.0, 0.0, 0.0), (0.0, 0.0, 1.0, 0.0)]])
def test_a_kind_that_a_look_rules_out_is_no_error(likes):
    assert set(kinds([step(*like, nats=5.0) for like in likes])) <= {"mining", "unknown", *PRIORS}
