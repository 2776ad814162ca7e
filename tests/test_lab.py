"""The incident lab, played without a guard: it comes up, its tunnel is made and used, and nothing of it is left."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from gpuguard.lab import leftovers, namespaces, secure_shell

SETTINGS = {"guard": False, "probes": 3, "lines": 1, "tunnel_idle_s": 0.5}
TIMEOUT_S = 300


def why_not() -> str:
    try:
        secure_shell.find_server()
        command = namespaces.unshare_command(["true"])
    except namespaces.LabClosed as closed:
        return str(closed)
    if any(shutil.which(tool) is None for tool in ("ssh", "ssh-keygen")):
        return "no OpenSSH client"
    tried = subprocess.run(command, capture_output=True, text=True, check=False)
    return f"namespaces are not allowed here: {tried.stderr.strip()}" if tried.returncode else ""


pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not() or "can run")


@pytest.fixture
def lab():
    running = namespaces.start("gpuguard.lab.scenario", SETTINGS, os.environ)
    timer = threading.Timer(TIMEOUT_S, running.kill)
    timer.start()
    yield running
    timer.cancel()
    running.kill()
    running.wait()
    for pipe in (running.stdin, running.stdout, running.stderr):
        pipe.close()


def told(lab) -> list[dict]:
    return [json.loads(line) for line in lab.stdout]


def until(lab, kind: str) -> dict:
    for line in lab.stdout:
        said = json.loads(line)
        if said["kind"] == kind:
            return said
    pytest.fail(f"the lab never told {kind!r}: {lab.stderr.read().decode()}")


def test_the_tunnel_is_made_and_used_and_nothing_stays(lab):
    link = until(lab, "link")
    until(lab, "agent")
    footprint = leftovers.footprint(lab.pid)
    assert len(footprint.processes) > 5
    assert footprint.namespaces
    lines = told(lab)
    assert lab.wait() == 0, lab.stderr.read().decode()
    calls = {line["call"]: line for line in lines if line["kind"] == "tool_call" and "call" in line}
    assert list(calls) == ["read", "probe", "tunnel"]
    assert len({call["trace_id"] for call in calls.values()}) == 1
    assert len({call["span_id"] for call in calls.values()}) == 3
    # Somebody logged in on the node by way of the tunnel: sshd has a session that it did not have before.
    assert next(line for line in lines if line["kind"] == "tunnel_session")["pids"]
    assert lines[-1]["name"] == "end"
    # The delayed link tells when the tunnel was opened; a veth pair (no access to /dev/net/tun) tells nothing.
    syns = [line["syn_ns"] for line in lines if line["kind"] == "syn"]
    opened_ns = calls["tunnel"]["start_ns"]
    assert any(opened_ns <= syn_ns < opened_ns + 60e9 for syn_ns in syns) or not link["delayed"]
    assert leftovers.remaining(footprint) == []


@pytest.mark.parametrize("victim", ["unshare", "first", "starter"])
def test_sigkill_leaves_nothing(lab, victim):
    until(lab, "agent")
    footprint = leftovers.footprint(lab.pid)
    if victim == "unshare":
        lab.kill()
    elif victim == "first":
        first = int(Path(f"/proc/{lab.pid}/task/{lab.pid}/children").read_text().split()[0])
        os.kill(first, signal.SIGKILL)
    else:
        lab.stdin.close()  # what the kernel does when whoever started the lab is killed
    assert leftovers.remaining(footprint) == []


def test_a_lab_that_cannot_be_built_says_why(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(namespaces.LabClosed, match="unshare"):
        namespaces.unshare_command([sys.executable])


def test_no_sshd_says_how_to_get_one(monkeypatch):
    monkeypatch.setattr(secure_shell.os, "access", lambda *_: False)
    with pytest.raises(namespaces.LabClosed, match="make setup"):
        secure_shell.find_server()
