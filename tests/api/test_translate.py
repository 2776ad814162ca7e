"""Structs and messages say the same: any incident survives the way there and back."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuguard.api.translate import enum_value, enum_word, from_message, to_message
from gpuguard.api.v1 import gpuguard_pb2 as pb
from gpuguard.core.events import Decision, Finding, Incident, ProcessBrief
from gpuguard.core.evidence import Evidence
from gpuguard.core.guard import ProcessVerdict
from gpuguard.core.labels import VERDICTS
from gpuguard.core.records import ActionOutcome, Gap, ToolCall
from gpuguard.core.subjects import Context, DeviceId, FlowId, ProcessId

from .samples import INCIDENT, MINER_BRIEF, STANDING

TEXT = st.text(st.characters(codec="utf-8"), max_size=20)
TIMES = st.integers(0, 2**63 - 1)
WORDS32 = st.integers(0, 2**32 - 1)
NUMBERS = st.floats(allow_nan=False)
PROCESSES = st.builds(ProcessId, TEXT, WORDS32, st.integers(0, 2**64 - 1))
FLOWS = st.builds(FlowId, st.integers(0, 2**64 - 1), WORDS32, TEXT, WORDS32, TEXT, WORDS32, TIMES, st.booleans())
SUBJECTS = PROCESSES | FLOWS | st.builds(DeviceId, TEXT)
CONTEXTS = st.builds(Context, TEXT, TEXT, TEXT, TEXT, TEXT, TEXT)
BRIEFS = st.builds(
    ProcessBrief, process=PROCESSES, name=TEXT, argv=st.tuples(TEXT, TEXT) | st.just(()), user=TEXT, cgroup=TEXT,
    cgroup_id=st.integers(0, 2**64 - 1), context=CONTEXTS, ancestors=st.tuples(PROCESSES) | st.just(()))
CALLS = st.builds(
    ToolCall, time_ns=TIMES, start_ns=TIMES, end_ns=st.none() | TIMES, trace_id=TEXT, span_id=TEXT,
    parent_span_id=TEXT, tool_name=TEXT, arguments=TEXT, process=st.none() | PROCESSES)
GAPS = st.builds(Gap, time_ns=TIMES, sensor=TEXT, reason=TEXT, since_ns=st.none() | TIMES,
                 lost=st.none() | st.integers(0, 2**64 - 1), process=st.none() | PROCESSES)
EVIDENCE = st.builds(
    Evidence, time_ns=TIMES, subject=SUBJECTS, label=TEXT, evidence_class=st.sampled_from(["network", "external"]),
    kind=TEXT, nats=NUMBERS, text=TEXT, start_ns=TIMES, carrier=TEXT, blind_spots=st.tuples(TEXT) | st.just(()))
SOME_EVIDENCE = st.just(()) | st.tuples(EVIDENCE)
FINDINGS = st.builds(
    Finding, time_ns=TIMES, id=TEXT, subject=SUBJECTS, verdict=st.sampled_from(VERDICTS), label=TEXT, carrier=TEXT,
    probability=NUMBERS, nats=NUMBERS, start_ns=TIMES, decided_after_s=NUMBERS, evidence=SOME_EVIDENCE,
    counter_evidence=SOME_EVIDENCE, process=st.none() | BRIEFS, tool_call=st.none() | CALLS, trace_id=TEXT,
    gaps=st.just(()) | st.tuples(GAPS))
DECISIONS = st.builds(
    Decision, time_ns=TIMES, id=TEXT, incident_id=TEXT, finding_id=TEXT,
    rung=st.sampled_from(["observe", "hand_over", "kill"]), mode=st.sampled_from(["observe", "enforce"]),
    needs_approval=st.booleans(), target=st.none() | BRIEFS, ttl_s=NUMBERS, reason=TEXT, rule=TEXT, approved_by=TEXT)
OUTCOMES = st.builds(
    ActionOutcome, time_ns=TIMES, decision_id=TEXT, action=TEXT, outcome=st.sampled_from(["would_have", "expired"]),
    text=TEXT, process=st.none() | PROCESSES, expires_ns=st.none() | TIMES)
INCIDENTS = st.builds(
    Incident, time_ns=TIMES, id=TEXT, state=st.sampled_from(["open", "closed"]), start_ns=TIMES, title=TEXT,
    story=TEXT, verdict=st.sampled_from(VERDICTS), findings=st.just(()) | st.tuples(FINDINGS),
    tool_calls=st.just(()) | st.tuples(CALLS), processes=st.just(()) | st.tuples(BRIEFS),
    decisions=st.just(()) | st.tuples(DECISIONS), outcomes=st.just(()) | st.tuples(OUTCOMES))


@given(INCIDENTS)
def test_any_incident_comes_back(incident):
    sent = to_message(incident, pb.Incident()).SerializeToString()
    assert from_message(pb.Incident.FromString(sent), Incident) == incident


@given(GAPS)
def test_any_gap_comes_back(gap):
    assert from_message(to_message(gap, pb.Gap()), Gap) == gap


def test_samples_come_back():
    assert from_message(to_message(INCIDENT, pb.Incident()), Incident) == INCIDENT
    assert from_message(to_message(STANDING, pb.ProcessStanding()), ProcessVerdict) == STANDING


@pytest.mark.parametrize(("struct", "message", "renamed"), [
    (Incident, pb.Incident, {}), (Finding, pb.Finding, {}), (Decision, pb.Decision, {}), (Evidence, pb.Evidence, {}),
    (ActionOutcome, pb.Outcome, {}), (ToolCall, pb.ToolCall, {}), (Gap, pb.Gap, {}), (Context, pb.Context, {}),
    (ProcessBrief, pb.Process, {"process": "id"}), (ProcessVerdict, pb.ProcessStanding, {}),
    (ProcessId, pb.ProcessId, {}), (FlowId, pb.FlowId, {}),
])
def test_a_field_that_the_core_gains_must_be_added_to_the_proto(struct, message, renamed):
    fields = {renamed.get(name, name) for name in struct.__struct_fields__}
    assert fields == {field.name for field in message.DESCRIPTOR.fields}


def test_words_of_every_enum():
    for verdict in VERDICTS:
        assert enum_word("Verdict", enum_value("Verdict", verdict)) == verdict
    assert enum_word("Verdict", 0) == "unspecified"
    assert enum_word("Verdict", 99) == "unspecified"


def test_bytes_that_are_no_text_do_not_lose_the_incident():
    odd = msgspec.structs.replace(MINER_BRIEF, argv=("a\udcff",))
    assert from_message(to_message(odd, pb.Process()), ProcessBrief).argv == ("a?",)


def test_a_message_of_a_later_version_is_an_error_not_a_guess():
    with pytest.raises(msgspec.ValidationError):
        from_message(pb.Incident(), Incident)
    finding = pb.Finding(verdict=pb.VERDICT_CLEAR, subject=pb.Subject())
    with pytest.raises(msgspec.ValidationError, match="subject"):
        from_message(finding, Finding)
