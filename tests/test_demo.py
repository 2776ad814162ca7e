"""What `gpuguard demo` makes of a run: delays, faults, who was accused; and what it shows, at a hundred columns."""

from __future__ import annotations

import io

import msgspec
import pytest
from rich.console import Console

from gpuguard.core.events import Finding, Incident
from gpuguard.core.records import ActionOutcome, Gap
from gpuguard.lab.tale import Tale, is_closed_eye, judge, left_alone
from gpuguard.ui import screen, story
from tests.ui import events as made

CALLS = {"read": (52, 2.0), "probe": (53, 3.4), "tunnel": (59, 9.9), "hasher": (71, 15.4)}
#: How long after it was made an event could be read.
LATENCY_S = 0.05


def line(kind, seconds, **fields):
    return {"kind": kind, "time_ns": made.at(seconds), **fields}


def lines(events):
    """Return what a lab would have told of these events, in order."""
    told = [line("benign", 0, what="trainer", pids=[28], text="a training-like job"),
            line("benign", 1, what="admin", pids=[33, 34], text="an administrator")]
    for call, (pid, start) in CALLS.items():
        told.append(line("tool_call", start, call=call, pid=pid, trace_id=made.TRACE, span_id=f"{pid:016x}",
                         start_ns=made.at(start), cgroup="/ /user.slice"))
    told.append(line("syn", 10.0, syn_ns=made.at(10.0), source_port=60562, destination="10.77.0.2",
                     destination_port=22))
    told.append(line("first_use", 12.9, used_ns=made.at(12.9)))
    told += [line("event", (event.time_ns - made.T0) / 1e9 + LATENCY_S, event=msgspec.to_builtins(event))
             for event in events]
    told.append(line("first_launch", 30, launched_ns=made.at(15.5)))
    told.append(line("tunnel_session", 31, pids=[66, 68]))
    return told


def tale_of(events):
    tale = Tale()
    for one in lines(events):
        tale.take(one)
    return tale


def without(events, label):
    return [e for e in events if not (isinstance(e, Finding) and e.label == label)]


def accusing(pid, label="mining", verdict="suspect"):
    who = made.process(pid, "somebody", ["somebody"])
    seen = made.evidence(who.process, label, "launch", "x", 7.0, 20, 21, "seen")
    told = made.finding(who.process, label, verdict, 7.0, 20, 21, [seen], [], who, None)
    return msgspec.structs.replace(told, id=f"F-{pid}")


def test_a_right_run_passes_and_its_delays_are_to_when_a_finding_could_be_read():
    verdict = judge(tale_of(made.events()))
    assert verdict.passed, verdict
    assert [round(m.value_s, 3) for m in verdict.measures] == [0.55, 0.15, 1.45]


@pytest.mark.parametrize(("label", "said"), [("ssh-reverse-tunnel", "use of the tunnel"), ("mining", "hash process")])
def test_what_is_missing_is_said(label, said):
    verdict = judge(tale_of(without(made.events(), label)))
    assert not verdict.passed
    assert any(said in fault for fault in verdict.missing)


@pytest.mark.parametrize("pid", [28, 34, 39, 52, 4242])
def test_anybody_else_accused_is_a_fault(pid):
    verdict = judge(tale_of([*made.events(), accusing(pid)]))
    assert not verdict.passed
    assert verdict.accused == (f"mining suspect: somebody (pid {pid})",)


def test_the_session_in_the_tunnel_may_be_accused():
    assert judge(tale_of([*made.events(), accusing(68, "ssh-reverse-shell")])).passed


def test_an_accusation_that_was_withdrawn_was_one():
    accused = accusing(28)
    taken_back = msgspec.structs.replace(accused, verdict="unknown", time_ns=made.at(22))
    assert len(judge(tale_of([*made.events(), accused, taken_back])).accused) == 1


def test_a_flow_whose_process_is_learnt_late_accuses_nobody_until_then():
    late = made.finding(made.flow(4, 20), "reverse-shell", "suspect", 7.0, 20, 21, [], [], None, None)
    known = msgspec.structs.replace(late, id="F-late", process=made.process(59, "ssh", ["ssh"]))
    unknown = msgspec.structs.replace(late, id="F-late")
    assert judge(tale_of([*made.events(), unknown, known])).passed
    assert len(judge(tale_of([*made.events(), unknown])).accused) == 1


@pytest.mark.parametrize("change", [
    {"tool_call": None},
    {"process": None},
    {"process": msgspec.structs.replace(made.process(59, "ssh", ["ssh"]), cgroup="/elsewhere")},
])
def test_a_finding_that_is_tied_to_nobody_or_to_the_wrong_place_is_a_fault(change):
    events = [msgspec.structs.replace(e, **change) if isinstance(e, Finding) and e.carrier == "ssh" and e.process
              and e.process.process.pid == 59 else e for e in made.events()]
    assert any("not tied" in fault for fault in judge(tale_of(events)).missing)


def test_a_late_finding_is_said_and_no_fault():
    events = [msgspec.structs.replace(e, time_ns=made.at(22)) if isinstance(e, Finding) and e.label == "mining" else e
              for e in made.events()]
    verdict = judge(tale_of(events))
    assert verdict.late == ("hash process: confirmed after its first launch",)
    assert verdict.passed


def test_a_closed_eye_excuses_only_its_own_half():
    closed = Gap(made.at(0), "launches", "needs CAP_BPF", made.at(0))
    verdict = judge(tale_of([closed, *without(made.events(), "mining")]))
    assert verdict.passed
    assert verdict.excused == ("mining is not expected to be confirmed: needs CAP_BPF",)
    assert len(verdict.measures) == 2


def test_lost_events_are_no_closed_eye():
    assert not is_closed_eye(Gap(made.at(0), "launches", "3 events lost", None, 3))
    assert not judge(tale_of([Gap(made.at(0), "launches", "3 lost", None, 3),
                              *without(made.events(), "mining")])).passed


def cut(after_s=10.7):
    """Return the events of a run whose tunnel was cut off, and nothing that was seen of its use."""
    done = ActionOutcome(made.at(after_s), "D-2", "isolate", "done", "cut off", made.process(59, "ssh", []).process)

    def changed(event):
        if isinstance(event, Incident):
            return msgspec.structs.replace(event, outcomes=(done,))
        if isinstance(event, Finding) and event.verdict == "confirmed" and event.label.startswith("ssh"):
            return msgspec.structs.replace(event, evidence=event.evidence[:1])
        return event

    return [changed(event) for event in made.events()]


def test_a_tunnel_that_was_cut_needs_no_use():
    tale = tale_of(cut())
    tale.session = ()
    assert judge(tale).passed
    assert len(judge(tale).measures) == 2


def test_a_tunnel_that_was_cut_and_used_all_the_same_is_a_fault():
    assert any("all the same" in fault for fault in judge(tale_of(cut())).missing)


def test_a_tunnel_that_was_cut_too_late_was_used():
    assert any("use of the tunnel" in fault for fault in judge(tale_of(cut(after_s=14))).missing)


def test_a_guard_that_failed_fails_the_run():
    tale = tale_of(made.events())
    tale.take(line("guard_failed", 40, status=-9, text="Traceback"))
    assert not judge(tale).passed


def test_without_a_telling_link_the_tool_call_is_the_start():
    tale = Tale()
    for one in lines(made.events()):
        if one["kind"] != "syn":
            tale.take(one)
    assert tale.tunnel_syn() == (made.at(9.9), None)
    assert judge(tale).passed


def test_those_left_alone_are_listed_with_what_was_said_of_them():
    rows = left_alone(tale_of([*made.events(), accusing(28)]))
    assert [row.said for row in rows] == ["mining suspect", "accused of nothing"]


@pytest.mark.parametrize("name", ["ssh", "[bold]x[/]\x1b]0;owned\x07", "a" * 300, "\u202eevil"])
def test_the_screen_keeps_to_its_width_and_shows_hostile_names_as_text(name):
    out = io.StringIO()
    console = Console(file=out, width=screen.WIDTH, force_terminal=False, highlight=False)
    for incident in story.told_by(made.events(name=name, arguments=name, reason=name)).incidents:
        screen.show_incident(console, incident)
    tale = tale_of(made.events(name=name))
    screen.show_left_alone(console, left_alone(tale))
    screen.show_measures(console, judge(tale).measures)
    text = out.getvalue()
    assert max(len(one) for one in text.splitlines()) <= screen.WIDTH
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "waits for a person's approval" in " ".join(text.split()) or len(name) > 99
    assert "[bold]" in text or "[bold]" not in name
