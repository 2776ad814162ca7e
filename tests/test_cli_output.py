"""What every command does when its output cannot be written: no traceback, and a status that accuses nobody."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
INCIDENT = str(ROOT / "gpuguard/lab/recordings/incident")
COMMANDS = (["config", "show"], ["config", "schema"], ["incidents", "--recording", INCIDENT],
            ["incidents", "--recording", INCIDENT, "-o", "json"], ["--help"], ["run", "--help"], ["--version"])


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


@pytest.mark.parametrize("words", [["replay", INCIDENT, "-o", "events"], ["incidents", "--recording", INCIDENT]])
def test_a_file_is_utf8_whatever_the_terminal_is(words: list[str]) -> None:
    environ = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run([sys.executable, "-m", "gpuguard", *words], cwd=ROOT, env=environ, capture_output=True)
    assert done.returncode < 2
    assert done.stderr == b""
    shown = done.stdout.decode("utf-8")
    if "events" in words:
        assert any("\u2026" in line for line in shown.splitlines() if json.loads(line))


def test_a_terminal_without_these_letters_shows_them_written_out() -> None:
    ours, theirs = pty.openpty()
    environ = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "TERM": "dumb"}
    script = "from gpuguard import cli; cli._take_up_streams(); print(chr(0x2192))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environ, stdout=theirs, stderr=subprocess.PIPE)
    os.close(theirs)
    assert (done.returncode, done.stderr) == (0, b"")
    shown = b""
    with os.fdopen(ours, "rb", buffering=0) as terminal, suppress(OSError):  # EIO: nobody holds the other end
        while piece := terminal.read(4096):
            shown += piece
    assert shown == b"\\u2192\r\n"


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_who_closes_a_stream_gets_the_same_answer(closed: str) -> None:
    words = [sys.executable, "-m", "gpuguard", "replay", INCIDENT, "-o", "events"]
    done = subprocess.run(["sh", "-c", f'exec "$@" {closed}', "sh", *words], cwd=ROOT, capture_output=True)
    assert (done.returncode, done.stderr) == (1, b""), "found"
