"""The whole of it, live: the lab, the real broker, guard and sensors, and stand-ins only for the driver.

Delays are not judged here (`make soak` does that), only what was found, what it was tied to, and who was accused.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from gpuguard.core.events import FlowReport
from gpuguard.lab import namespaces, secure_shell
from gpuguard.lab.performance import perform
from gpuguard.lab.scenario import Settings
from gpuguard.lab.tale import judge
from gpuguard.replaying import replay
from gpuguard.ui import story

STANDINS = Path(__file__).parent / "standins"


def why_not() -> str:
    try:
        secure_shell.find_server()
        command = namespaces.unshare_command(["true"])
    except namespaces.LabClosed as closed:
        return str(closed)
    missing = [tool for tool in ("cc", "ssh", "ssh-keygen") if shutil.which(tool) is None]
    if missing:
        return f"missing: {', '.join(missing)}"
    tried = subprocess.run(command, capture_output=True, text=True, check=False)
    return f"namespaces are not allowed here: {tried.stderr.strip()}" if tried.returncode else ""


pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not() or "can run")


def build(path: Path, folder: Path) -> None:
    spec = importlib.util.spec_from_file_location(path.parent.name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.build(folder)


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    folder = tmp_path_factory.mktemp("standins")
    record = tmp_path_factory.mktemp("recording")
    build(STANDINS / "build.py", folder)
    build(STANDINS / "libnvidia_ml" / "build.py", folder)
    settings = Settings(standins=str(folder), record=str(record), probes=3, lines=3, tunnel_idle_s=1.5, hash_s=8.0)
    tale, left = perform(settings, lambda _line, _event: None)
    return tale, left, record


def test_everything_is_found_tied_to_its_cause_and_nobody_else_accused(played):
    verdict = judge(played[0])
    assert verdict.missing == ()
    assert verdict.accused == ()
    assert verdict.excused == () or os.geteuid() != 0


def test_nothing_is_left(played):
    assert played[1] == []


def test_policy_only_wrote_down_what_it_would_do(played):
    outcomes = [o for i in story.told_by(played[0].events()).incidents for o in i.outcomes]
    assert outcomes
    assert {o.outcome for o in outcomes} <= {"would_have", "done"}
    assert all(o.action in ("notify", "observe") for o in outcomes if o.outcome == "done")


def test_the_recording_gives_the_same_events_again(played):
    tale, _, record = played

    def told(event):
        # The log leaves out reports of flows that nothing can be said of; and how a flow stood when the input ended is
        # told at the time of the end, which a recording does not hold.
        return not (isinstance(event, FlowReport) and (event.finding.label == "other" or event.closed.reason == "end"))

    assert [e for e in replay(record) if told(e)] == [e for e in tale.events() if told(e)]
