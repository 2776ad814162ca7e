from __future__ import annotations

import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuguard.core.fusion import LOOKS_PER_YEAR, SUSPECT_NATS, Fusion, confirm_nats, probability
from tests.core.builders import evidence, flow, pid

RATE = 0.1
CONFIRM = confirm_nats(RATE)


def test_threshold_follows_from_the_stated_rate() -> None:
    assert confirm_nats(1.0) == pytest.approx(math.log(LOOKS_PER_YEAR))
    assert confirm_nats(0.001) - confirm_nats(1.0) == pytest.approx(math.log(1000))


@pytest.mark.parametrize("rate", [0.0, -1.0, 1e9, math.nan])
def test_senseless_rates_are_refused(rate: float) -> None:
    with pytest.raises(ValueError, match="alarms_per_gpu_year"):
        confirm_nats(rate)


def test_evidence_adds_up_through_suspect_to_confirmed() -> None:
    fusion = Fusion(RATE)
    verdicts = [fusion.receive(evidence(5.0))[0].verdict for _ in range(5)]
    assert verdicts == ["unknown", "suspect", "suspect", "confirmed", "confirmed"]


def test_counters_alone_never_confirm() -> None:
    fusion = Fusion(RATE)
    for _ in range(100):
        standing, _ = fusion.receive(evidence(5.0, evidence_class="counter"))
    assert standing.verdict == "suspect"
    standing, changed = fusion.receive(evidence(SUSPECT_NATS, evidence_class="launch"))
    assert standing.verdict == "confirmed"
    assert changed


def test_counter_evidence_brings_a_subject_back() -> None:
    fusion = Fusion(RATE)
    fusion.receive(evidence(CONFIRM))
    standing, _ = fusion.receive(evidence(-(CONFIRM - SUSPECT_NATS)))
    assert standing.verdict == "confirmed", "hysteresis: a confirmed subject is let go below suspect only"
    standing, changed = fusion.receive(evidence(-1.0))
    assert (standing.verdict, changed) == ("unknown", True)
    assert len(standing.counter_evidence) == 1


def test_a_new_kind_about_the_accused_is_told_and_a_repeated_one_is_not() -> None:
    fusion = Fusion(RATE)
    assert fusion.receive(evidence(CONFIRM, kind="request"))[1]
    assert not fusion.receive(evidence(1.0, kind="request"))[1]
    assert fusion.receive(evidence(1.0, kind="use"))[1]


def test_best_prefers_the_accusation() -> None:
    fusion = Fusion(RATE)
    fusion.receive(evidence(30.0, subject=flow(), label="ssh-interactive", evidence_class="network"))
    named = fusion.best(flow())
    assert named is not None
    assert (named.label, named.verdict) == ("ssh-interactive", "clear")
    fusion.receive(evidence(7.0, subject=flow(), label="ssh-reverse-tunnel", evidence_class="network"))
    accused = fusion.best(flow())
    assert accused is not None
    assert accused.label == "ssh-reverse-tunnel"
    fusion.forget(flow())
    assert fusion.best(flow()) is None


@given(st.lists(st.floats(-40, 40), max_size=60))
def test_the_sum_stays_in_bounds_and_the_verdict_within_reach(weights: list[float]) -> None:
    fusion = Fusion(RATE)
    for nats in weights:
        standing, _ = fusion.receive(evidence(nats, subject=pid(5)))
        assert 0.0 <= standing.nats <= 2 * CONFIRM
        assert all(held >= 0 for held in standing.by_class.values())
        if standing.nats < SUSPECT_NATS:
            assert standing.verdict == "unknown"


def test_probability_is_a_probability() -> None:
    assert 0.0 < probability(0.0) < 0.02
    assert probability(SUSPECT_NATS) > 0.5
    assert probability(CONFIRM) > 0.999_999


def test_what_is_noted_is_told_under_any_name_and_weighs_nothing() -> None:
    fusion = Fusion(RATE)
    for text in ("once", "twice"):
        fusion.note(msgspec.structs.replace(evidence(0.0), label="", kind="seen", text=text))
    assert fusion.best(evidence(0.0).subject) is None
    standing, _ = fusion.receive(evidence(5.0))
    (note,) = fusion.notes(standing.subject, standing.label)
    assert (note.label, note.text, note.nats) == (standing.label, "twice", 0.0)
    assert standing.nats == 5.0
    fusion.forget(standing.subject)
    assert fusion.notes(standing.subject, standing.label) == []
