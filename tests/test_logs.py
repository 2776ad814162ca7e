"""What the daemon says on standard error costs lines where nobody reads it, and nothing else."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from contextlib import suppress

import pytest

HOSTILE = "a\x1b[2J\u202eb"
SPEAK = f"""
import sys, structlog
from gpuguard import logs
logs.configure()
log = structlog.get_logger()
log.warning("one", name={HOSTILE!a})
sys.stdin.readline()
log.info("two")
log.info("three")
print("watching")
"""


def speaker(stderr: int, **environ: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", SPEAK], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                            stderr=stderr, text=True, env={**os.environ, **environ})


def test_lines_are_json_where_no_person_reads() -> None:
    read, write = os.pipe()
    with speaker(write) as speaking:
        os.close(write)
        assert speaking.communicate("\n") == ("watching\n", None)
    with os.fdopen(read) as stream:
        said = [json.loads(line) for line in stream]
    assert [(one["level"], one["event"], one.get("name")) for one in said] == [
        ("warning", "one", HOSTILE), ("info", "two", None), ("info", "three", None)]


def test_a_reader_that_goes_away_ends_nobody() -> None:
    read, write = os.pipe()
    with speaker(write) as speaking:
        os.close(write)
        assert b"one" in os.read(read, 4096)
        os.close(read)
        assert speaking.communicate("\n") == ("watching\n", None)
    assert speaking.returncode == 0


def test_a_reader_that_reads_no_further_is_not_waited_for() -> None:
    read, write = os.pipe()
    os.set_blocking(write, False)
    with speaker(write) as speaking:
        assert b"one" in os.read(read, 4096)
        with suppress(BlockingIOError):
            while True:
                os.write(write, bytes(4096))
        os.set_blocking(write, True)
        assert speaking.communicate("\n") == ("watching\n", None)
    os.close(write)
    os.close(read)
    assert speaking.returncode == 0


def test_a_long_line_waits_for_no_reader_either() -> None:
    read, write = os.pipe()
    script = SPEAK.replace('"two"', '"two", text="x" * 300_000')
    script = script.replace('log.info("three")', 'import os; os.read(int(sys.argv[2]), 1 << 20); log.info("three")')
    done = subprocess.run([sys.executable, "-c", script, "x", str(read)], input="\n", stderr=write, pass_fds=(read,),
                          stdout=subprocess.PIPE, text=True, timeout=60)
    os.close(write)
    with os.fdopen(read) as stream:
        ended, *said = stream
    assert done.stdout == "watching\n"
    assert ended == "\n", "what was cut is a line of its own"
    assert [(one["event"], one["lines_lost"]) for one in map(json.loads, said)] == [("three", 1)]


@pytest.mark.parametrize("device", ["/dev/full", "/dev/null"])
def test_a_full_disk_ends_nobody(device: str) -> None:
    write = os.open(device, os.O_WRONLY)
    with speaker(write) as speaking:
        os.close(write)
        assert speaking.communicate("\n") == ("watching\n", None)
    assert speaking.returncode == 0


def test_lost_lines_are_counted_by_the_next_one() -> None:
    read, write = os.pipe()
    script = SPEAK.replace("sys.stdin", "import os; kept = os.dup(2); os.dup2(os.open('/dev/full', 1), 2); sys.stdin")
    script = script.replace('print(', 'os.dup2(kept, 2); log.info("four"); log.info("five"); print(')
    done = subprocess.run([sys.executable, "-c", script], input="\n", stderr=write, stdout=subprocess.PIPE,
                          text=True)
    os.close(write)
    with os.fdopen(read) as stream:
        said = [json.loads(line) for line in stream]
    assert done.stdout == "watching\n"
    assert [(one["event"], one.get("lines_lost")) for one in said] == [("one", None), ("four", 2), ("five", None)]


@pytest.mark.parametrize("environ", [{"TERM": "xterm", "NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_on_a_terminal_names_are_inert_and_colours_can_be_refused(environ: dict[str, str]) -> None:
    ours, theirs = pty.openpty()
    with speaker(theirs, **environ) as speaking:
        os.close(theirs)
        assert speaking.communicate("\n") == ("watching\n", None)
    said = b""
    with os.fdopen(ours, "rb", buffering=0) as terminal, suppress(OSError):  # EIO: nobody holds the other end
        while piece := terminal.read(4096):
            said += piece
    assert b"\x1b" not in said
    assert b"name=a\\x1b[2J\\u202eb" in said


def test_on_a_terminal_the_message_of_an_exception_is_inert() -> None:
    ours, theirs = pty.openpty()
    script = SPEAK.replace('log.info("two")', 'log.info("two", exc_info=ValueError(sys.argv[1]))')
    done = subprocess.run([sys.executable, "-c", script, HOSTILE], input="\n", stdout=subprocess.PIPE, stderr=theirs,
                          text=True, env={**os.environ, "TERM": "dumb"})
    os.close(theirs)
    said = os.read(ours, 65536)
    os.close(ours)
    assert done.stdout == "watching\n"
    assert b"\x1b" not in said
    assert b"ValueError: a\\x1b[2J\\u202eb\r\n" in said


def test_a_terminal_that_nobody_reads_is_not_waited_for_and_stays_as_its_shell_has_it() -> None:
    ours, theirs = pty.openpty()
    script = SPEAK.replace('log.info("two")', 'for _ in range(2000): log.info("two", text="x" * 99)')
    script = script.replace('log.info("three")', 'print("said", flush=True)')
    script += 'while sys.stdin.readline(): log.info("three")\n'
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=theirs,
                          text=True, bufsize=1, env={**os.environ, "TERM": "dumb"}) as speaking:
        assert speaking.stdin
        assert speaking.stdout
        speaking.stdin.write("\n")
        assert speaking.stdout.readline() == "said\n", "with nobody to read the terminal"
        assert os.get_blocking(theirs)
        said = b""
        while b"lines_lost=" not in said:
            said = said[-100:] + os.read(ours, 65536)
            speaking.stdin.write("\n")
        speaking.stdin.close()
    os.close(theirs)
    os.close(ours)
    assert speaking.returncode == 0
