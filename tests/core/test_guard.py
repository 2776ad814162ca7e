from __future__ import annotations

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuguard.core import fusion
from gpuguard.core import guard as guard_module
from gpuguard.core.events import Decision, Finding, Incident
from gpuguard.core.evidence import Evidence
from gpuguard.core.guard import Guard
from gpuguard.core.host import Host
from gpuguard.core.policy import DEFAULT_POLICY
from gpuguard.core.records import (
    LAUNCH,
    ActionOutcome,
    Approval,
    Device,
    Gap,
    Launches,
    ProcessExited,
    ProcessSample,
    Tick,
)
from gpuguard.core.subjects import DeviceId
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
    decision = killing(guard)
    (incident,) = guard.receive(answer(decision, "reject"))
    assert isinstance(incident, Incident)
    assert [(o.decision_id, o.outcome, o.text) for o in incident.outcomes] == [
        (decision.id, "refused", "rejected by kim")]
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


def test_an_act_that_is_over_while_its_reason_stands_is_told() -> None:
    guard = guard_that_hears({1: MINING})
    guard.receive(started(pid(5)))
    paused = next(e for e in guard.receive(tick(1)) if isinstance(e, Decision) and e.rung == "pause")
    over = ActionOutcome(time_ns=T0 + 900 * SECOND, decision_id=paused.id, action="pause", outcome="expired", text="")
    told = [e for e in guard.receive(over) if isinstance(e, Decision)]
    assert [(d.rung, d.target == paused.target, d.needs_approval) for d in told] == [("notify", True, False)]
    assert "still stands" in told[0].reason
    guard.receive(ProcessExited(time_ns=T0 + 901 * SECOND, process=pid(5)))
    again = msgspec.structs.replace(over, time_ns=T0 + 902 * SECOND)
    assert not [e for e in guard.receive(again) if isinstance(e, Decision)], "who is gone holds nobody up"


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


class Reader:
    """A detector that finds something in every row of launches, as its number says."""

    def receive(self, item: object, host: Host) -> list[Evidence]:
        if not isinstance(item, Launches):
            return []
        return [evidence(7.0, subject=pid(int(row["pid"])), kind=f"kernel {row['kernel']}") for row in item.rows]


def launches(*rows: tuple[int, int]) -> Launches:
    block = Launches(T0, np.zeros(len(rows), LAUNCH))
    block.rows["pid"], block.rows["kernel"] = zip(*rows, strict=True)
    return block


@given(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 4)), min_size=1, max_size=8), st.integers(1, 7))
def test_where_a_block_of_launches_is_cut_changes_nothing(rows: list[tuple[int, int]], at: int) -> None:
    def told(*blocks: Launches) -> list[object]:
        guard = guard_that_hears({})
        guard._detectors = [Reader()]
        return [event for block in blocks for event in guard.receive(block)]

    parts = [launches(*part) for part in (rows[:at], rows[at:]) if part]
    assert told(*parts) == told(launches(*rows))


def test_what_was_known_of_a_process_stays_in_its_finding_after_it_is_forgotten() -> None:
    guard = guard_that_hears({1: MINING})
    guard.receive(started(pid(5), name="miner"))
    guard.receive(tick(1))
    guard.receive(ProcessExited(time_ns=T0 + 2 * SECOND, process=pid(5)))
    guard.receive(tick(100))
    guard.receive(started(pid(6)))
    guard.receive(call())
    guard.receive(tick(101))
    (incident,) = guard.incidents.all()
    assert [p.name for p in incident.processes] == ["miner"]


def test_an_approval_long_after_the_end_of_the_process_does_nothing() -> None:
    guard = guard_that_hears({1: MINING})
    guard.receive(started(pid(5)))
    guard.receive(tick(1))
    decision = killing(guard)
    guard.receive(ProcessExited(time_ns=T0 + 2 * SECOND, process=pid(5)))
    guard.receive(tick(100))
    (refused,) = guard.receive(answer(decision))
    assert isinstance(refused, Gap)


def test_a_process_that_executes_another_program_is_shown_as_that() -> None:
    guard = guard_that_hears({1: MINING})
    guard.receive(started(pid(5), name="sh"))
    guard.receive(tick(1))
    guard.receive(started(pid(5), name="miner"))
    assert [p.name for e in guard.receive(tick(2)) if isinstance(e, Incident) for p in e.processes] == ["miner"]


def test_full_tables_are_told_once_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fusion, "STANDINGS_MAX", 2)
    guard = guard_that_hears({n: evidence(1.0, subject=pid(n)) for n in range(1, 90)})
    gaps = [(n, e) for n in range(1, 90) for e in guard.receive(tick(n)) if isinstance(e, Gap)]
    assert [(n, gap.sensor, gap.lost) for n, gap in gaps] == [(4, "core", 1), (64, "core", 60)]
    assert "standings" in gaps[0][1].reason


def explained(guard: Guard, of: int | str) -> list[tuple[str, str, float]]:
    told = guard.explain(of)
    assert told is not None
    return [(str(one.subject), f"{one.label} {one.verdict}", one.nats) for one in told.findings]


def on_gpu(number: int, uuid: str = "GPU-0") -> ProcessSample:
    return ProcessSample(time_ns=T0, process=pid(number), uuid=uuid)


def test_why_nobody_is_accused_yet_is_told_with_what_the_gpu_does() -> None:
    guard = guard_that_hears({
        1: evidence(4.0, subject=pid(5), evidence_class="counter"),
        2: evidence(3.5, subject=pid(5), label="compute"),
        3: evidence(2.0, subject=DeviceId("GPU-0")),
        4: evidence(5.0, subject=pid(6)),
    })
    for one in (started(pid(5), name="trainer"), on_gpu(5), on_gpu(6, "GPU-1"), *(tick(n) for n in range(1, 5))):
        assert guard.receive(one) == []
    told = guard.explain(5)
    assert told is not None
    assert (told.time_ns, told.subject, told.process and told.process.name) == (T0 + 4 * SECOND, pid(5), "trainer")
    assert explained(guard, 5) == [
        ("pid 5", "compute clear", 3.5), ("pid 5", "mining unknown", 4.0), ("GPU-0", "mining unknown", 2.0)]
    assert [one.process and one.process.name for one in told.findings] == ["trainer", "trainer", None]
    assert explained(guard, "GPU-1") == [("pid 6", "mining unknown", 5.0)]
    assert guard.explain(7) is None
    assert guard.explain("GPU-7") is None


def test_a_connection_that_is_accused_is_told_with_its_process() -> None:
    one = flow()
    guard = guard_that_hears({1: evidence(30.0, subject=one, label="ssh-reverse-tunnel", evidence_class="network")})
    for record in (started(pid(5)), sockets(socket_of(one, pid(5))), tick(1)):
        guard.receive(record)
    assert explained(guard, 5) == [(str(one), "ssh-reverse-tunnel confirmed", 30.0)]


def test_a_pid_means_who_has_it_now_else_who_had_it_last() -> None:
    def meant() -> object:
        told = guard.explain(5)
        return told and told.subject

    guard = guard_that_hears({n: evidence(1.0, subject=pid(5, n)) for n in (1, 3)})
    for one in (started(pid(5, 3)), tick(3), started(pid(5, 1)), tick(1)):
        guard.receive(one)
    assert meant() == pid(5, 1)
    assert explained(guard, 5) == [("pid 5", "mining unknown", 1.0)]
    guard.receive(ProcessExited(time_ns=T0 + 4 * SECOND, process=pid(5, 1)))
    assert meant() == pid(5, 3)
    guard.receive(tick(100))
    assert meant() == pid(5, 3), "its end was told by nobody"


@pytest.mark.parametrize("of", [5, "GPU-0", 99])
def test_an_explanation_changes_nothing(of: int | str) -> None:
    def told(*, asked: bool) -> list[object]:
        guard = guard_that_hears({1: evidence(4.0, subject=pid(5)), 2: evidence(30.0, subject=pid(5))})
        events: list[object] = []
        for record in (started(pid(5)), on_gpu(5), tick(1), tick(2), tick(3)):
            events += guard.receive(record)
            if asked:
                guard.explain(of)
        return events

    assert told(asked=True) == told(asked=False)


def test_of_too_many_findings_the_worst_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard_module, "EXPLAINED_MAX", 2)
    guard = guard_that_hears({n: evidence(float(n), subject=pid(n)) for n in range(1, 6)})
    for n in range(1, 6):
        guard.receive(on_gpu(n))
        guard.receive(tick(n))
    made = 0

    def finding(standing: fusion.Standing, time_ns: int) -> Finding:
        nonlocal made
        made += 1
        return Guard._finding(guard, standing, time_ns)

    monkeypatch.setattr(guard, "_finding", finding)
    told = guard.explain("GPU-0")
    assert told is not None
    assert [one.nats for one in told.findings] == [5.0, 4.0]
    assert told.left_out == 3
    assert made == 2, "what is not told is not put together while all wait"


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


def test_who_used_a_gpu_and_has_ended_is_not_listed_for_ever() -> None:
    guard = guard_that_hears({})
    guard.receive(Device(time_ns=T0, uuid="GPU-0", index=0, name="H200"))
    for number in range(3):
        guard.receive(started(pid(number)))
        guard.receive(ProcessSample(time_ns=T0, process=pid(number), uuid="GPU-0"))
    guard.receive(ProcessExited(time_ns=T0 + SECOND, process=pid(0)))
    assert [one.process.process for one in guard.processes()] == [pid(1), pid(2)]
    guard.receive(tick(100))
    assert len(guard.host.process_samples) == 2
