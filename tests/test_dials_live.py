"""A real daemon in a network namespace of its own, and real scans that are refused at once: each names its process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def scans() -> dict[str, object]:
    if os.geteuid() != 0:
        pytest.skip("needs root for eBPF, AF_PACKET and network namespaces")
    done = subprocess.run(
        ["unshare", "--net", "--mount", "--", sys.executable, HERE / "live_dials.py"],
        cwd=HERE.parent, capture_output=True, text=True, timeout=600, check=False,
        env={**os.environ, "PYTHONPATH": str(HERE.parent)})
    if done.returncode == 77 or "unshare failed" in done.stderr:
        pytest.skip(f"this host allows no such scene: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    found: dict[str, object] = json.loads(done.stdout)
    return found


@pytest.mark.privileged
@pytest.mark.parametrize("name", ["here", "container"])
def test_a_scan_that_is_refused_at_once_names_its_process(scans: dict[str, dict[str, object]], name: str) -> None:
    """Sixty refused connections within milliseconds, in one process that ends with them."""
    one = scans[name]
    assert one["verdicts"] == ["confirmed"]
    assert one["named"] == [one["pid"]]
    assert one["argv_marked"]
    assert "60 connections 60 came to nothing" in str(one["text"])


@pytest.mark.privileged
def test_a_loop_of_single_attempts_is_a_scan_with_one_of_its_processes(scans: dict[str, dict[str, object]]) -> None:
    one = scans["loop"]
    assert one["labels"] == ["scan"]
    assert one["named_children"]


@pytest.mark.privileged
def test_the_recording_names_the_same(scans: dict[str, dict[str, object]]) -> None:
    assert scans["replayed"] == scans["lived"]
