"""The recording that comes with the package still tells the incident that it was made of.

It is replayed by `gpuguard demo` where there is no stand-in for the driver. To make it anew, as root:
``gpuguard demo --standins DIRECTORY --record gpuguard/lab/recordings/incident`` (after removing the old one).
"""

from __future__ import annotations

from pathlib import Path

import pytest

import gpuguard.lab
from gpuguard.cli.commands import demo
from gpuguard.replaying import replay
from gpuguard.ui import story
from gpuguard.ui.report import render

RECORDING = Path(gpuguard.lab.__file__).parent / "recordings" / "incident"


@pytest.fixture(scope="module")
def events():
    return list(replay(RECORDING))


def test_it_is_small():
    assert sum(path.stat().st_size for path in RECORDING.iterdir()) < 512 * 1024


def test_it_gives_one_incident_with_the_tunnel_its_shell_and_the_mining(events):
    [incident] = story.told_by(events).incidents
    found = {f.label: f for f in story.accused(incident)}
    assert {label for label, finding in found.items() if finding.verdict == "confirmed"} >= {
        "ssh-reverse-tunnel", "ssh-reverse-shell", "mining"}
    assert found["mining"].process.name == "hasher"
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
    assert list(replay(RECORDING)) == events


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
