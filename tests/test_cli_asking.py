"""Commands that ask a running guard: what people see, what programs get, what happens when nobody answers."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import threading
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner
from rich.console import Console

from gpuguard.api.service import ApiServer
from gpuguard.cli import main
from gpuguard.cli.asking import matching, waiting
from gpuguard.cli.incident_view import incidents_table, moments, print_explanation, print_incident
from gpuguard.core.events import Incident
from gpuguard.core.guard import Explanation
from gpuguard.core.records import ActionOutcome
from gpuguard.core.subjects import DeviceId
from tests.api.samples import DECISION, EXPLANATION, INCIDENT, MINING, OUTCOME, WOULD

RECORDING = Path(__file__).parents[1] / "gpuguard/lab/recordings/incident"
ACCUSED_GPU = msgspec.structs.replace(EXPLANATION, subject=DeviceId("GPU-1"), process=None, findings=(MINING,),
                                      left_out=7)


class OneIncident:
    """A guard with one incident, whose decision D1 waits."""

    def __init__(self) -> None:
        self.answers: list[tuple[str, ...]] = []
        self.subscribers: list = []

    def processes(self):
        return []

    def explain(self, of):
        return {4712: EXPLANATION, "GPU-1": ACCUSED_GPU}.get(of)

    def incidents(self):
        return [INCIDENT]

    def incident(self, incident_id):
        return INCIDENT if incident_id == INCIDENT.id else None

    def decide(self, *answer):
        self.answers.append(answer)
        return True

    def subscribe(self, subscriber):
        self.subscribers.append(subscriber)
        return lambda: self.subscribers.remove(subscriber)


@pytest.fixture
def guard():
    return OneIncident()


@pytest.fixture
def socket(guard, tmp_path):
    server = ApiServer(guard, tmp_path / "g.sock")
    yield str(tmp_path / "g.sock")
    server.stop(0)


def run(*args: str):
    return CliRunner().invoke(main, list(args), env={"COLUMNS": "200"})


def test_incidents_for_people_and_for_programs(socket):
    shown = run("incidents", "--socket", socket)
    assert shown.exit_code == 0
    for word in ("I1", "open", "confirmed", "asked for by tool call shell", "kill D1"):
        assert word in shown.stdout
    line = run("incidents", "--socket", socket, "-o", "json").stdout
    assert msgspec.json.decode(line, type=Incident) == INCIDENT
    assert "no incidents" in run("incidents", "--socket", socket, "--state", "closed").stdout


def test_watch_prints_what_changes_until_the_guard_stops(guard, tmp_path):
    listed = threading.Event()
    guard.incidents = lambda: listed.set() or [INCIDENT]
    server = ApiServer(guard, tmp_path / "g.sock")
    code = "from gpuguard.cli import main; main()"
    args = [sys.executable, "-c", code, "incidents", "--socket", str(tmp_path / "g.sock"), "-w", "-o", "json"]
    with subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as watcher:
        assert listed.wait(100)
        # From here on the change is seen whenever the watch begins, for the list came with the token to begin from.
        guard.subscribers[0](msgspec.structs.replace(INCIDENT, title="changed"))
        titles = [json.loads(watcher.stdout.readline())["title"] for _ in range(2)]
        server.stop(1)
        _, said = watcher.communicate(timeout=100)
    assert titles == [INCIDENT.title, "changed"]
    assert watcher.returncode == 3
    assert said.startswith("gpuguard: no guard")


def test_explain_tells_the_whole_story(socket):
    shown = run("explain", "I1", "--socket", socket)
    assert shown.exit_code == 0
    for word in (
        "tool call", "shell", "by coder", "ssh (pid 4711)", "10.0.0.2:40000 -> 198.51.100.7:443", "ssh-reverse-tunnel",
        "0.9998", "+9.2", "against:", "somebody types", "-0.5", "blind spot:", "padding by a changed client",
        "gap launches: libbpf is missing", "kill-mining", "would isolate: mode is observe", "gpuguard approve D1",
    ):
        assert word in shown.stdout, word
    assert msgspec.json.decode(run("explain", "I1", "--socket", socket, "-o", "json").stdout, type=Incident) == INCIDENT


@pytest.mark.parametrize("wanted", ["I1", "F2", "D2", "I"])
def test_explain_takes_any_id_of_the_incident(socket, wanted):
    assert run("explain", wanted, "--socket", socket).exit_code == 0


def test_explain_of_nothing(socket):
    result = run("explain", "X9", "--socket", socket)
    assert result.exit_code == 3
    assert "no incident, finding or decision X9" in result.stderr


def test_explain_tells_why_a_process_is_not_accused(socket):
    shown = run("explain", "--pid", "4712", "--socket", socket)
    assert shown.exit_code == 0
    for word in ("trainer (pid 4712): user agent", "./trainer", "started 2100 clock ticks after boot",
                 "unknown mining, probability 0.97", "undecided after 2.00 s",
                 "+4.4  counter  expected after 1200 s of work like this",
                 "unknown compute of GPU GPU-1", "gap launches: libbpf is missing"):
        assert word in shown.stdout, word
    line = run("explain", "--pid", "4712", "--socket", socket, "-o", "json").stdout
    assert msgspec.json.decode(line, type=Explanation) == EXPLANATION


def test_explain_of_a_gpu_tells_who_is_accused_on_it(socket):
    shown = run("explain", "--gpu", "GPU-1", "--socket", socket)
    assert shown.exit_code == 1
    for word in ("GPU GPU-1", "suspect mining of trainer (pid 4712)", "and 7 more"):
        assert word in shown.stdout, word


@pytest.mark.parametrize("of", [("--pid", "9"), ("--gpu", "GPU-9\x1b[2J")])
def test_explain_of_nobody_known(socket, of):
    for where in (("--socket", socket), ("--recording", str(RECORDING))):
        result = run("explain", *of, *where)
        assert result.exit_code == 3
        assert "nothing is known of" in result.stderr
        assert "\x1b" not in result.stderr


def test_explain_asks_a_recording_of_its_end():
    accused = run("explain", "--pid", "167", "--recording", str(RECORDING))
    assert accused.exit_code == 1
    assert "hasher (pid 167)" in accused.stdout
    assert "confirmed mining, probability" in accused.stdout
    calm = run("explain", "--pid", "49", "--recording", str(RECORDING))
    assert calm.exit_code == 0
    assert "nothing is held for or against it" in calm.stdout


def test_explain_does_not_call_what_was_cut_clear(tmp_path):
    (tmp_path / "00000001.ggrec").write_bytes((RECORDING / "00000001.ggrec").read_bytes()[:-1000])
    assert run("explain", "--pid", "49", "--recording", str(tmp_path)).exit_code == 3


@pytest.mark.parametrize("args", [
    (), ("I1", "--pid", "1"), ("--pid", "1", "--gpu", "GPU-1"), ("--pid", "0"), ("--pid", "1", "-o", "html"),
])
def test_explain_takes_one_id_or_pid_or_gpu(args):
    assert run("explain", *args).exit_code == 2


def test_an_ambiguous_id_lists_what_it_could_be():
    other = msgspec.structs.replace(INCIDENT, id="I2", findings=(), decisions=())
    assert {one.id for one in matching([INCIDENT, other], "I")} == {"I1", "I2"}
    assert [one.id for one in matching([INCIDENT, other], "I2")] == ["I2"]


def test_approve_and_reject_say_what_was_answered(guard, socket, monkeypatch):
    told = []
    monkeypatch.setattr("gpuguard.broker.control.approve", lambda *words: told.append(words))
    approved = run("approve", "D1", "--reason", "seen", "--by", "ann", "--socket", socket)
    assert approved.exit_code == 0
    assert "approved D1: kill trainer (pid 4712): mining confirmed" in approved.stdout
    assert run("reject", "D1", "--socket", socket).stdout.startswith("rejected D1")
    assert guard.answers[0] == ("D1", "approve", "ann", "seen")
    assert guard.answers[1][1] == "reject"
    assert [(one[0], one[1].pid, one[2:]) for one in told] == [("D1", 4712, ("seen", "ann"))], "who acts is told first"


def test_an_approval_that_the_broker_does_not_take_reaches_nobody(guard, socket, tmp_path, monkeypatch):
    monkeypatch.setenv("GPUGUARD_RUNTIME_DIR", str(tmp_path))
    refused = run("approve", "D1", "--socket", socket)
    assert refused.exit_code == 3
    assert "the broker did not take the approval" in refused.stderr
    assert guard.answers == []


@pytest.mark.parametrize("wanted", ["I1", "D2", "D9"])
def test_only_a_decision_that_waits_can_be_answered(guard, socket, wanted):
    result = run("approve", wanted, "--socket", socket)
    assert result.exit_code == 3
    assert "D1  kill trainer (pid 4712)" in result.stderr
    assert guard.answers == []


@pytest.mark.parametrize("args", [
    ("incidents",), ("explain", "I1"), ("approve", "D1"), ("reject", "D1"), ("incidents", "--watch"),
    ("explain", "--pid", "1"),
])
def test_no_guard_is_one_clear_line(tmp_path, args):
    result = run(*args, "--socket", str(tmp_path / "none.sock"))
    assert result.exit_code == 3
    assert "start one with `gpuguard run`" in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


def test_wrong_usage_is_two(tmp_path):
    assert run("incidents", "--limit", "0").exit_code == 2
    assert run("incidents", "--watch", "--recording", str(tmp_path)).exit_code == 2


def test_a_folder_without_recording_is_said(tmp_path):
    result = run("incidents", "--recording", str(tmp_path))
    assert result.exit_code == 3
    assert "no recording" in result.stderr


@pytest.mark.parametrize("name", ["incidents", "explain", "approve", "reject", "config"])
def test_help_has_an_example(name):
    assert f"gpuguard {name}" in run(name, "--help").stdout.split("Example")[1]


def test_what_waits_is_what_nobody_answered():
    assert [one.id for one in waiting(INCIDENT)] == ["D1"]
    approved = msgspec.structs.replace(DECISION, needs_approval=False, approved_by="ann")
    assert waiting(msgspec.structs.replace(INCIDENT, decisions=(DECISION, approved))) == []
    outcome = ActionOutcome(time_ns=1, decision_id="D1", action="kill", outcome="refused", text="gone")
    assert waiting(msgspec.structs.replace(INCIDENT, outcomes=(outcome,))) == []


def test_the_timeline_is_in_order_and_holds_every_piece():
    found = moments(INCIDENT)
    assert [time_ns for time_ns, _, _ in found] == sorted(time_ns for time_ns, _, _ in found)
    kinds = {kind for _, kind, _ in found}
    wanted = {"tool call", "flow", "process", "GPU", "network", "launch", "counter", "verdict", "policy", "action"}
    assert wanted <= kinds
    assert sum(words.startswith("would isolate") or OUTCOME.text in words for _, _, words in found) == 1
    assert any(WOULD.rule in words for _, _, words in found)


def test_evidence_that_led_to_a_decision_stands_in_the_timeline_once():
    finding = INCIDENT.findings[0]
    text = finding.evidence[0].text
    decision = msgspec.structs.replace(DECISION, reason=f"{finding.label} {finding.verdict}: {text}")
    found = moments(msgspec.structs.replace(INCIDENT, findings=(finding,), decisions=(decision,), outcomes=()))
    assert sum(text in words for _, _, words in found) == 1
    assert any(kind == "policy" and f"{finding.label} {finding.verdict}" in words for _, kind, words in found)


def test_a_column_for_answers_is_there_when_one_is_asked_for():
    def headings(*incidents):
        return [column.header for column in incidents_table(incidents).columns]

    settled = msgspec.structs.replace(INCIDENT, decisions=())
    assert headings(settled)[-1] == "what"
    assert headings(settled, INCIDENT)[-1] == "waits for"


def test_markup_in_hostile_names_is_shown_as_it_is():
    brief = msgspec.structs.replace(INCIDENT.findings[0].process, name="[red]x[/]\x1b[2J", argv=("[bold]",))
    finding = msgspec.structs.replace(INCIDENT.findings[0], process=brief)
    hostile = msgspec.structs.replace(INCIDENT, title="[link=evil]t", findings=(finding,))
    out = io.StringIO()
    print_incident(hostile, Console(file=out, width=200))
    assert "[link=evil]t" in out.getvalue()
    assert "[red]x[/]\\x1b[2J (pid 4711)" in out.getvalue()
    assert "\x1b" not in out.getvalue()
    out.truncate(0)
    finding = msgspec.structs.replace(finding, subject=brief.process)
    told = msgspec.structs.replace(EXPLANATION, subject=DeviceId("[bold]\x1b]"), process=brief, findings=(finding,))
    print_explanation(told, Console(file=out, width=200))
    assert "[bold]" in out.getvalue()
    assert out.getvalue().count("[red]x[/]\\x1b[2J (pid 4711)") == 2
    assert "\x1b" not in out.getvalue()


def test_json_lines_hold_one_object_each(socket):
    lines = run("incidents", "--socket", socket, "-o", "json").stdout.splitlines()
    assert [json.loads(line)["id"] for line in lines] == ["I1"]
    assert not any(re.search(r"\x1b\[", line) for line in lines)
