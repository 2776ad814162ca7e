from __future__ import annotations

from unittest.mock import patch

from hypothesis import given
from hypothesis import strategies as st

from gpuguard.core import incidents as module
from gpuguard.core.events import Decision, Incident
from gpuguard.core.incidents import FINDINGS_MAX, Incidents
from gpuguard.core.records import ActionOutcome
from gpuguard.core.subjects import Context
from tests.core.builders import T0, TRACE, brief, call, finding, pid


def test_findings_of_one_trace_are_one_incident() -> None:
    incidents = Incidents()
    tunnel = finding("F-1", label="ssh-reverse-tunnel", process=brief(pid(5), name="ssh"), trace_id=TRACE,
                     tool_call=call())
    mining = finding("F-2", process=brief(pid(6), name="hasher"), trace_id=TRACE)
    first = incidents.receive(tunnel)[-1]
    second = incidents.receive(mining)[-1]
    assert first.id == second.id
    assert {f.id for f in second.findings} == {"F-1", "F-2"}
    assert second.title == "mining, ssh-reverse-tunnel by hasher, ssh, asked for by tool call shell"
    assert [c.tool_name for c in second.tool_calls] == ["shell"]


def test_unrelated_processes_are_apart() -> None:
    incidents = Incidents()
    one = incidents.receive(finding("F-1", process=brief(pid(5))))[-1]
    two = incidents.receive(finding("F-2", process=brief(pid(6))))[-1]
    assert one.id != two.id


def test_a_shared_job_binds() -> None:
    incidents = Incidents()
    job = Context(slurm_job_id="42")
    one = incidents.receive(finding("F-1", process=brief(pid(5), context=job)))[-1]
    two = incidents.receive(finding("F-2", process=brief(pid(6), context=job)))[-1]
    assert one.id == two.id


def test_a_finding_whose_process_is_learnt_late_moves_to_its_story() -> None:
    incidents = Incidents()
    alone = incidents.receive(finding("F-1"))[-1]
    story = incidents.receive(finding("F-2", process=brief(pid(6)), trace_id=TRACE))[-1]
    left, joined = incidents.receive(finding("F-1", process=brief(pid(5)), trace_id=TRACE))
    assert (left.id, left.state, left.findings) == (alone.id, "closed", ())
    assert joined.id == story.id
    assert len(joined.findings) == 2


def test_a_lone_finding_keeps_its_incident_when_its_story_is_learnt() -> None:
    incidents = Incidents()
    alone = incidents.receive(finding("F-1"))[-1]
    named = incidents.receive(finding("F-1", process=brief(pid(5)), trace_id=TRACE))
    assert [i.id for i in named] == [alone.id]
    assert incidents.receive(finding("F-2", trace_id=TRACE))[-1].id == alone.id


def test_it_closes_when_nothing_stands() -> None:
    incidents = Incidents()
    incidents.receive(finding("F-1", process=brief(pid(5))))
    assert incidents.receive(finding("F-1", verdict="unknown", process=brief(pid(5))))[-1].state == "closed"
    assert incidents.findings() == []


def test_decisions_and_what_became_of_them_are_kept() -> None:
    incidents = Incidents()
    home = incidents.receive(finding("F-1", process=brief(pid(5))))[-1]
    decision = Decision(time_ns=T0, id="D-1", incident_id=home.id, finding_id="F-1", rung="pause", mode="enforce",
                        needs_approval=False, target=brief(pid(5)), ttl_s=1.0, reason="", rule="r")
    incidents.decide("F-1", decision)
    outcome = ActionOutcome(time_ns=T0, decision_id="D-1", action="pause", outcome="done", text="")
    kept = incidents.outcome(outcome)
    assert kept is not None
    assert (kept.decisions, kept.outcomes) == ((decision,), (outcome,))
    assert incidents.outcome(ActionOutcome(time_ns=T0, decision_id="?", action="", outcome="done", text="")) is None


def test_a_story_without_end_goes_on_in_another_incident() -> None:
    incidents = Incidents()
    for number in range(3 * FINDINGS_MAX):
        incidents.receive(finding(f"F-{number}", process=brief(pid(5)), trace_id=TRACE))
    assert [len(one.findings) for one in incidents.all()] == [FINDINGS_MAX] * 3
    assert all(incidents.of_finding(f"F-{number}") for number in range(3 * FINDINGS_MAX))
    again = incidents.receive(finding("F-0", process=brief(pid(5)), trace_id=TRACE))[-1]
    assert len(again.findings) == FINDINGS_MAX


class Plain(Incidents):
    """Forgets what an incident that leaves was known by, by looking through all that is known."""

    def _keep(self, incident: Incident) -> Incident:
        self._incidents[incident.id] = incident
        self._incidents.move_to_end(incident.id)
        while len(self._incidents) > module.INCIDENTS_MAX:
            gone, _ = self._incidents.popitem(last=False)
            self.evicted += 1
            self._by_story = {story: home for story, home in self._by_story.items() if home != gone}
            self._by_finding = {finding: home for finding, home in self._by_finding.items() if home != gone}
        return incident


@given(st.lists(st.tuples(st.integers(1, 12), st.integers(0, 8)), max_size=60))
def test_an_incident_that_leaves_is_forgotten_under_all_that_it_was_known_by(filed: list[tuple[int, int]]) -> None:
    with patch.object(module, "INCIDENTS_MAX", 3), patch.object(module, "FINDINGS_MAX", 2):
        plain, ours = Plain(), Incidents()
        for number, trace in filed:
            one = finding(f"F-{number}", process=brief(pid(number)) if trace % 2 else None,
                          trace_id=f"{trace:032x}" if trace > 1 else "")
            assert ours.receive(one) == plain.receive(one)
        assert (ours.all(), ours.evicted) == (plain.all(), plain.evicted)
        assert (ours._by_story, ours._by_finding) == (plain._by_story, plain._by_finding)
        assert {home: set(known) for home, known in ours._stories.items() if known} == {
            home: {story for story, at in ours._by_story.items() if at == home} for home in ours._by_story.values()}
