"""The whole daemon, broker and guard, on this host: it starts, sees, answers, stops, and survives what it should."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from gpuguard.core.records import Gap, HostInfo, ProcessStarted
from gpuguard.recording.codec import RecordingError
from gpuguard.recording.reader import read_recording
from gpuguard.replaying import replay

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT_ONLY = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: process events of the whole host")


class Running:
    def __init__(self, folder: Path, *arguments: str, stderr: int | None = None) -> None:
        """Start it; with ``stderr`` it says there what else stands in ``log``."""
        folder.chmod(0o755)
        self.state = folder / "state"
        self.log = folder / "log"
        self.environ = {**os.environ, "GPUGUARD_STATE_DIR": str(self.state),
                        "GPUGUARD_RUNTIME_DIR": str(folder / "run"), "GPUGUARD_TOOLCALLS_OTLP_LISTEN": "127.0.0.1:0"}
        with self.log.open("w") as stream:
            self.broker = subprocess.Popen([sys.executable, "-m", "gpuguard", "run", *arguments], env=self.environ,
                                           stderr=stderr or stream, stdout=subprocess.DEVNULL)

    def guard_pid(self) -> int:
        children = Path(f"/proc/{self.broker.pid}/task/{self.broker.pid}/children").read_text().split()
        return int(children[0])

    def lines(self) -> list[dict]:
        whole, _, _ = self.log.read_text().rpartition("\n")  # the last may be half there
        return [json.loads(line) for line in whole.splitlines() if line.startswith("{")]

    def logged(self, event: str, sensor: str = "") -> bool:
        return any(line["event"] == event and sensor in ("", line.get("sensor")) for line in self.lines())

    def stop(self) -> int:
        if self.broker.poll() is None:
            self.broker.send_signal(signal.SIGTERM)
        return self.broker.wait(100)


def until(condition: Callable[[], bool], what: str, seconds: float = 200.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen within {seconds} s"
        time.sleep(0.05)


@pytest.fixture
def running() -> Iterator[Callable[..., Running]]:
    started: list[Running] = []
    folders: list[Path] = []

    def start(*arguments: str, stderr: int | None = None) -> Running:
        # Not tmp_path: the guard is another user, and must be able to get there.
        folders.append(Path(tempfile.mkdtemp(prefix="gpuguard-test-")))
        one = Running(folders[-1], *arguments, stderr=stderr)
        started.append(one)
        if stderr is None:
            until(lambda: one.logged("eye open") or one.broker.poll() is not None, "the first eye opening")
        assert one.broker.poll() is None, one.log.read_text()
        return one

    yield start
    for one in started:
        one.stop()
    for folder in folders:
        shutil.rmtree(folder)


@ROOT_ONLY
def test_it_sees_a_process_records_it_and_replays_to_the_same_events(running: Callable[..., Running]) -> None:
    one = running("--record", "rec")
    until(lambda: one.logged("eye open", "processes"), "the process eye opening")
    marker = f"marker-{os.getpid()}"

    def recorded() -> bool:
        with suppress(RecordingError, FileNotFoundError):  # it has just begun
            return any(isinstance(b, ProcessStarted) and any(marker in word for word in b.argv)
                       for b in read_recording(one.state / "guard" / "rec"))
        return False

    with subprocess.Popen(["/bin/sh", "-c", f": {marker}; read line"], stdin=subprocess.PIPE):
        until(recorded, "the process being recorded")
    assert one.stop() == 0
    assert isinstance(next(read_recording(one.state / "guard" / "rec")), HostInfo)
    lived = [json.loads(line) for line in (one.state / "guard" / "events.jsonl").read_text().splitlines()]
    from msgspec import to_builtins

    from gpuguard.core.events import FlowReport

    again = [to_builtins(e) for e in replay(one.state / "guard" / "rec")
             if not (isinstance(e, FlowReport) and e.finding.label == "other")]
    ends = [e for e in lived if e["type"] == "flow_report" and e["closed"]["reason"] == "end"]
    assert json.loads(json.dumps([e for e in again if e not in ends]))[: len(lived) - len(ends)] == [
        e for e in lived if e not in ends]


@ROOT_ONLY
def test_the_guard_has_no_privileges(running: Callable[..., Running]) -> None:
    one = running()
    status = dict(line.split(":\t", 1) for line in Path(f"/proc/{one.guard_pid()}/status").read_text().splitlines()
                  if ":\t" in line)
    assert set(status["Uid"].split()) != {"0"}
    assert "0" not in status["Uid"].split()
    assert int(status["CapEff"], 16) == int(status["CapPrm"], 16) == int(status["CapBnd"], 16) == 0
    assert status["NoNewPrivs"].strip() == "1"
    assert status["Groups"].strip() in ("", status["Gid"].split()[0])


def test_sigterm_ends_both(running: Callable[..., Running]) -> None:
    """How soon is measured by benchmarks/stop_time.py."""
    one = running()
    guard = one.guard_pid()
    assert one.stop() == 0
    assert not Path(f"/proc/{guard}").exists()


def test_a_guard_that_is_killed_ends_the_broker_cleanly(running: Callable[..., Running]) -> None:
    one = running()
    os.kill(one.guard_pid(), signal.SIGKILL)
    assert one.broker.wait(100) != 0


def test_a_broker_that_is_killed_takes_the_guard_with_it(running: Callable[..., Running]) -> None:
    one = running()
    guard = one.guard_pid()
    one.broker.kill()
    one.broker.wait(100)
    until(lambda: not Path(f"/proc/{guard}").exists(), "the end of the guard")
    assert any((one.state / "guard").iterdir())


def test_a_second_daemon_is_refused_in_words(running: Callable[..., Running]) -> None:
    one = running()
    second = subprocess.run([sys.executable, "-m", "gpuguard", "run"], env=one.environ, capture_output=True, text=True,
                            check=False, timeout=200)
    assert second.returncode == 3
    assert "cannot run here" in second.stderr


def test_it_says_once_that_it_watches_with_which_eyes_and_where_it_writes(running: Callable[..., Running]) -> None:
    one = running()
    until(lambda: one.logged("watching"), "all eyes being tried")
    [said] = [line for line in one.lines() if line["event"] == "watching"]
    assert {*said["eyes"], *said["closed"]} == {"launches", "nvml", "packets", "processes", "sockets", "toolcalls"}
    assert all(one.logged("eye open", name) for name in said["eyes"])
    assert all(one.logged("gap", name) for name in said["closed"])
    assert (said["mode"], said["state"], said["audit"]) == ("observe", str(one.state), str(one.state / "log"))
    assert list((one.state / "log").glob("audit-*"))


def test_it_watches_on_when_nobody_reads_what_it_says(running: Callable[..., Running]) -> None:
    read, write = os.pipe()
    one = running(stderr=write)
    os.close(write)
    with os.fdopen(read) as stream:
        assert any("watching" in line for line in stream)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as operator:
        operator.connect(str(one.state.parent / "run" / "control.sock"))
        operator.send(b"no message of the table")
        assert operator.recv(1) == b"", "the broker complains, and ends the connection"
    os.kill(one.guard_pid(), 0)
    assert one.broker.poll() is None
    assert one.stop() == 0


def test_closed_eyes_are_gaps(running: Callable[..., Running]) -> None:
    one = running("--record", "rec")
    until(lambda: one.logged("eye open", "toolcalls"), "all eyes being tried")
    one.stop()
    blocks = list(read_recording(one.state / "guard" / "rec"))
    if not Path("/dev/nvidiactl").exists():
        assert any(isinstance(b, Gap) and b.sensor == "nvml" for b in blocks)
