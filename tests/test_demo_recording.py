"""The recording that comes with the package still tells the incident that it was made of.

It is replayed by `gpuguard demo` where there is no stand-in for the driver. To make it anew, as root:
``gpuguard demo --standins DIRECTORY --record gpuguard/lab/recordings/incident`` (after removing the old one).
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

import gpuguard.lab
from gpuguard import replaying
from gpuguard.cli.commands import demo, replay
from gpuguard.ui import story
from gpuguard.ui.report import render

RECORDING = Path(gpuguard.lab.__file__).parent / "recordings" / "incident"


@pytest.fixture(scope="module")
def events():
    return list(replaying.replay(RECORDING))


def test_it_is_small():
    assert sum(path.stat().st_size for path in RECORDING.iterdir()) < 512 * 1024


def test_it_gives_one_incident_with_the_scan_the_tunnel_its_shell_and_the_mining(events):
    [incident] = story.told_by(events).incidents
    found = {f.label: f for f in story.accused(incident)}
    assert {label for label, finding in found.items() if finding.verdict == "confirmed"} >= {
        "ssh-reverse-tunnel", "ssh-reverse-shell", "mining", "scan"}
    assert found["mining"].process.name == "hasher"
    assert found["scan"].tool_call.arguments == '{"command": "python scan.py 10.80.0.0/24"}'
    assert found["ssh-reverse-tunnel"].process.name == "ssh"
    assert all(f.tool_call and f.tool_call.tool_name == "shell" for f in found.values())
    assert len({f.trace_id for f in found.values()}) == 1


def test_what_policy_would_have_done_is_in_it(events):
    [incident] = story.told_by(events).incidents
    rungs = {decision.rung for decision in incident.decisions}
    assert rungs >= {"notify", "isolate", "pause", "kill"}
    assert all(decision.mode == "observe" for decision in incident.decisions)
    assert any("after a person's approval" in outcome.text for outcome in incident.outcomes)


def test_it_replays_to_the_same_events(events):
    assert list(replaying.replay(RECORDING)) == events


def test_the_demo_takes_the_gpu_half_from_it():
    replayed = demo._replayed()
    assert replayed
    [incident] = story.told_by(replayed).incidents
    assert {f.label for f in incident.findings} == {"mining"}
    assert [call.arguments for call in incident.tool_calls] == ['{"command": "./hasher &"}']
    assert {decision.rung for decision in incident.decisions} >= {"pause", "kill"}
    assert any("recording" in note for note in demo._notes(None, replayed))


def test_its_page_can_be_made(events):
    page = render(events)
    assert "hasher" in page
    assert "ssh-reverse-tunnel" in page


def test_a_policy_that_cannot_be_read_is_wrong_usage(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text("rules: [")
    result = CliRunner().invoke(replay.command, [str(RECORDING), "--policy", str(path)])
    assert result.exit_code == 2
    assert "bad.yaml:" in result.output
    assert "Traceback" not in result.output


def test_replay_has_the_common_form(events):
    result = CliRunner().invoke(replay.command, [str(RECORDING), "-o", "json"])
    lines = [json.loads(line) for line in result.output.splitlines()]
    assert result.exit_code == 1
    assert set(lines[-1]["summary"]) == {"verdict", "label", "probability", "evidence", "counts", "gaps"}
    assert lines[-1]["summary"]["verdict"] == "confirmed"
    assert len(lines) - 1 == sum(lines[-1]["summary"]["counts"].values())


def test_a_recording_that_was_cut_is_told_by_the_exit_status(tmp_path):
    [file] = RECORDING.glob("*.ggrec")
    whole = file.read_bytes()
    (tmp_path / file.name).write_bytes(whole[: len(whole) // 8])
    result = CliRunner().invoke(replay.command, [str(tmp_path), "-o", "json"])
    summary = json.loads(result.output.splitlines()[-1])["summary"]
    assert any("cut or damaged" in gap for gap in summary["gaps"])
    assert result.exit_code == (1 if summary["verdict"] == "confirmed" else 3)
