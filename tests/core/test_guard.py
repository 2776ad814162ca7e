from __future__ import annotations

import msgspec
import numpy as np
import pytest

from gpuguard.core.events import Decision, Finding, Incident
from gpuguard.core.evidence import Evidence
from gpuguard.core.guard import Guard
from gpuguard.core.host import Host
from gpuguard.core.policy import DEFAULT_POLICY
from gpuguard.core.records import ActionOutcome, Approval, Gap, ProcessExited, Tick
from tests.core.builders import SECOND, SPAN, T0, TRACE, call, evidence, flow, pid, socket_of, sockets, started


class Scripted:
    """A detector that says what it was told to say at the tick of that second."""

    def __init__(self, script: dict[int, Evidence]) -> None:
        self._script = script

    def receive(self, item: object, host: Host) -> list[Evidence]:
        said = self._script.get((item.time_ns - T0) // SECOND) if isinstance(item, Tick) else None
        return [said] if said else []


class Stumbling:
    def receive(self, item: object, host: Host) -> list[Evidence]:
        raise KeyError("nothing here")


def guard_that_hears(script: dict[int, Evidence], *, mode: str = "enforce", **options: object) -> Guard:
    guard = Guard(DEFAULT_POLICY, mode=mode, **options)  # type: ignore[arg-type]
    guard._detectors = [Scripted(script)]
    return guard


def tick(second: int) -> Tick:
    return Tick(time_ns=T0 + second * SECOND)


def kinds(events: list[object]) -> list[str]:
    return [type(e).__name__ for e in events]


MINING = evidence(30.0, subject=pid(5))


def test_a_confirmed_process_becomes_finding_incident_and_decisions() -> None:
    guard = guard_that_hears({1: MINING})
    guard.receive(started(pid(5), environ={"TRACEPARENT": f"00-{TRACE}-{SPAN}-01"}))
    guard.receive(call())
    events = guard.receive(tick(1))
    assert kinds(events) == ["Finding", "Incident", "Decision", "Incident", "Decision", "Incident", "Decision",
                             "Incident"]
    assert [(d.rung, d.needs_approval) for d in events if isinstance(d, Decision)] == [
        ("notify", False), ("pause", False), ("kill", True)]
    last = events[-1]
    assert isinstance(last, Incident)
    assert last.tool_calls[0].span_id == SPAN
    assert last.story == f"trace {TRACE}"
    assert guard.receive(tick(1)) == [], "the same evidence again is nothing new"


def test_a_tool_call_that_is_reported_late_is_joined_then() -> None:
    guard = guard_that_hears({1: MINING})
    guard.receive(started(pid(5), environ={"TRACEPARENT": f"00-{TRACE}-{SPAN}-01"}))
    guard.receive(tick(1))
    events = guard.receive(call())
    finding = next(e for e in events if isinstance(e, Finding))
    assert finding.tool_call is not None
    assert not [e for e in events if isinstance(e, Decision)], "what was decided is not decided again"


def test_a_flow_whose_owner_is_learnt_late_is_decided_on_then() -> None:
    said = evidence(30.0, subject=flow(), label="ssh-reverse-tunnel", evidence_class="network")
    guard = guard_that_hears({1: said})
    first = guard.receive(tick(1))
    assert [d.rung for d in first if isinstance(d, Decision)] == ["notify"]
    guard.receive(started(pid(5)))
    later = guard.receive(sockets(socket_of(flow(), pid(5))))
    assert [d.rung for d in later if isinstance(d, Decision)] == ["isolate"]
    assert next(e for e in later if isinstance(e, Finding)).process.process == pid(5)  # type: ignore[union-attr]


def killing(guard: Guard) -> Decision:
    return next(d for d in guard.pending() if d.rung == "kill")


def answer(decision: Decision, word: str = "approve") -> Approval:
    return Approval(time_ns=T0 + 9 * SECOND, decision_id=decision.id, answer=word, by="kim")  # type: ignore[arg-type]


def test_approval_makes_the_decision_again_once() -> None:
    guard = guard_that_hears({1: MINING})
    guard.receive(started(pid(5)))
    guard.receive(tick(1))
    decision = killing(guard)
    approved = [e for e in guard.receive(answer(decision)) if isinstance(e, Decision)]
    assert [(d.id, d.needs_approval, d.approved_by) for d in approved] == [(decision.id, False, "kim")]
    assert guard.pending() == []
    (again,) = guard.receive(answer(decision))
    assert isinstance(again, Gap)


def test_rejection_ends_it() -> None:
    guard = guard_that_hears({1: MINING})
    guard.receive(started(pid(5)))
    guard.receive(tick(1))
    assert guard.receive(answer(killing(guard), "reject")) == []
    assert guard.pending() == []


@pytest.mark.parametrize("gone", [True, False])
def test_approval_of_what_no_longer_stands_does_nothing(gone: bool) -> None:
    guard = guard_that_hears({1: MINING, 2: evidence(-60.0, subject=pid(5))})
    guard.receive(started(pid(5)))
    guard.receive(tick(1))
    decision = killing(guard)
    guard.receive(ProcessExited(time_ns=T0 + 2 * SECOND, process=pid(5)) if gone else tick(2))
    (refused,) = guard.receive(answer(decision))
    assert isinstance(refused, Gap)
    assert "no longer stands" in refused.reason


def test_outcomes_reach_their_incident() -> None:
    guard = guard_that_hears({1: MINING})
    guard.receive(started(pid(5)))
    decision = next(e for e in guard.receive(tick(1)) if isinstance(e, Decision))
    outcome = ActionOutcome(time_ns=T0, decision_id=decision.id, action="notify", outcome="done", text="")
    (incident,) = guard.receive(outcome)
    assert isinstance(incident, Incident)
    assert incident.outcomes == (outcome,)


def test_a_detector_that_stumbles_is_told_of_and_the_others_go_on() -> None:
    guard = guard_that_hears({2: MINING})
    guard._detectors.insert(0, Stumbling())
    (gap,) = guard.receive(tick(1))
    assert isinstance(gap, Gap)
    assert "KeyError" in gap.reason
    assert "Finding" in kinds(guard.receive(tick(2)))


def test_an_exited_process_is_forgotten_after_a_while() -> None:
    guard = guard_that_hears({1: MINING})
    guard.receive(started(pid(5)))
    guard.receive(tick(1))
    guard.receive(ProcessExited(time_ns=T0 + 2 * SECOND, process=pid(5)))
    assert len(guard.processes()) == 1
    guard.receive(tick(100))
    assert guard.processes() == []


def test_events_are_json() -> None:
    guard = guard_that_hears({1: MINING})
    guard.receive(started(pid(5)))
    for event in guard.receive(tick(1)):
        assert msgspec.json.decode(msgspec.json.encode(event))["type"]


def test_a_silent_host_says_nothing() -> None:
    guard = Guard()
    assert [guard.receive(tick(n)) for n in range(5)] == [[]] * 5
    assert guard.close(T0) == []
    assert np.isclose(guard._fusion.confirm_nats, 19.57, atol=0.01)
