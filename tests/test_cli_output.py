"""What every command does when its output cannot be written: no traceback, and a status that accuses nobody."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
INCIDENT = str(ROOT / "gpuguard/lab/recordings/incident")
COMMANDS = (["config", "show"], ["config", "schema"], ["incidents", "--recording", INCIDENT],
            ["incidents", "--recording", INCIDENT, "-o", "json"])


def run(words: list[str], stdout: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "gpuguard", *words], cwd=ROOT, stdout=stdout, stderr=subprocess.PIPE,
                          text=True, check=False)


@pytest.mark.parametrize("words", COMMANDS)
def test_a_full_disk_is_one_line(words: list[str]) -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    done = run(words, full)
    os.close(full)
    assert (done.returncode, done.stderr) == (3, "gpuguard: [Errno 28] No space left on device\n")


@pytest.mark.parametrize("words", COMMANDS)
def test_a_reader_that_left_is_no_finding(words: list[str]) -> None:
    read, write = os.pipe()
    os.close(read)
    done = run(words, write)
    os.close(write)
    assert (done.returncode, done.stderr) == (3, "")
