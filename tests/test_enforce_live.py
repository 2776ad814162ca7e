"""Enforcement from end to end: a launching miner, paused by policy, killed on a person's word, all of it audited."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.standins.build import build

ROOT = Path(__file__).parent.parent


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: eBPF, and namespaces in which the daemon may act")
@pytest.mark.skipif(not all(map(shutil.which, ("cc", "ip", "setpriv", "unshare"))), reason="lacks a compiler or tools")
@pytest.mark.skipif(not (ROOT / "gpuguard" / "bpf" / "launches.bpf.o").exists(), reason="built without clang")
def test_a_miner_is_paused_and_after_approval_killed() -> None:
    folder = Path(tempfile.mkdtemp(prefix="gpuguard-miner-"))
    try:
        folder.chmod(0o755)
        paths = build(folder)
        run = subprocess.run(
            ["unshare", "--pid", "--net", "--mount-proc", "--fork", "--kill-child", sys.executable,
             str(ROOT / "tests" / "live_enforce.py"), str(paths["hasher"]), str(paths["libcuda"])],
            capture_output=True, text=True, check=False, timeout=800)
    finally:
        shutil.rmtree(folder)
    assert run.returncode == 0, run.stderr + run.stdout
    told = json.loads(run.stdout.splitlines()[-1])
    first, *later, last = told["notified"]
    ready, status, watchdog = first.split("\n")
    assert (ready, watchdog) == ("READY=1", "WATCHDOG=1")
    assert status.startswith("STATUS=enforce: launches, "), told["log"]
    assert all(one.endswith("WATCHDOG=1") for one in later)
    assert last == "STOPPING=1"
    assert told["paused"]["process"]["pid"] > 1, told["log"]
    assert told["stopped"]
    assert told["alive_before_approval"]
    assert told["approve"][0] == 0, told["approve"]
    assert told["miner_status"] in (-signal.SIGTERM, -signal.SIGKILL), told["log"]
    assert told["audit"] == 0
    assert told["daemon_status"] == 0
