"""Who plays a scenario of the lab's captures: its address, its ports, and the programs that end with it."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from gpuguard.lab import namespaces, peers
from gpuguard.lab.namespaces import LabClosed, in_network_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from gpuguard.lab.corpus import Scenario

ADDRESSES = "10.78"
LINES = ("id", "ls -l /", "uname -a", "cat /proc/loadavg", "date")
SETTLE_S = 1.6
HOLD_S = 9.0
#: Where connections through a tunnel end on the node.
_TARGETS = {"": 22, "touch": 22, "inner": 22, "paste": 22, "paced": 22, "slow": 22,
            "chaff": peers.SERVER_PORTS["openssh:sid"], "pty": 7001, "line": 7002,
            "bulk": 7003}
_ALONE = threading.Lock()


class Row(NamedTuple):
    """What became of one scenario."""

    number: int
    scenario: Scenario
    start_ns: int
    asked_ns: int
    used_ns: int
    problem: str
    end_ns: int


def address_of(number: int) -> str:
    """Return the far address of a scenario."""
    return f"{ADDRESSES}.{number // 250}.{number % 250 + 1}"


class Player:
    """Plays one scenario."""

    def __init__(self, number: int, scenario: Scenario, far: int) -> None:
        self.number = number
        self.scenario = scenario
        self.far_pid = far
        self.far = in_network_of(far)
        self.host = address_of(number)
        self.ports = {"f": 10_000 + number, "f1": 12_000 + number, "f2": 14_000 + number, "l": 16_000 + number,
                      "t": _TARGETS[scenario.through]}
        self.asked_ns = 0
        self.used_ns = 0
        self.problem = ""
        self._holds = False
        self.children: list[subprocess.Popen[bytes]] = []

    def play(self, scene: Callable[[Player], None]) -> Row:
        """Play, and return the scenario's line; what went wrong is part of it."""
        start_ns = time.time_ns()
        try:
            scene(self)
        except (OSError, subprocess.SubprocessError, LabClosed) as error:
            self.problem = str(error)[:200]
        for child in self.children:
            with contextlib.suppress(ProcessLookupError):
                child.terminate()
        for child in self.children:
            try:
                child.wait(3)
            except subprocess.TimeoutExpired:
                child.kill()
        if self._holds:
            _ALONE.release()
        return Row(self.number, self.scenario, start_ns, self.asked_ns, self.used_ns, self.problem, time.time_ns())

    def alone(self) -> None:
        """Wait until no other scenario plays that asked for this."""
        self._holds = _ALONE.acquire()

    def until(self, ready: Callable[[], bool]) -> None:
        """Wait for something that the client brings about: this machine may be slow."""
        deadline = time.monotonic() + HOLD_S
        while not ready() and time.monotonic() < deadline:
            time.sleep(0.1)

    def wait_for_port(self, port: int) -> None:
        """Wait until something listens on this port of the far side."""
        self.until(lambda: peers.listens(self.far_pid, port))

    def spawn(self, command: list[str], stdin: int = subprocess.DEVNULL, how: str = "") -> subprocess.Popen[bytes]:
        """Start a program that ends with the scenario; ``how`` is the typist's."""
        log = (namespaces.ROOT / "log" / f"{self.number}").open("ab")
        child = subprocess.Popen(command, env=peers.environment() | {"LAB_TYPIST": how}, stdin=stdin,
                                 stdout=subprocess.DEVNULL, stderr=log)
        self.children.append(child)
        return child

    def run(self, command: list[str], *, may_fail: bool = False) -> None:
        """Run a program to its end; that it failed is the scenario's problem."""
        child = self.spawn(command)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(2 * HOLD_S)
        if child.poll() != 0 and not may_fail:
            self.problem = f"{Path(command[0]).name} ended with {child.poll()}: {self.said()}"

    def said(self) -> str:
        """Return the last line that any of the scenario's programs complained with."""
        log = (namespaces.ROOT / "log" / f"{self.number}").read_text(errors="replace").strip().splitlines()
        return log[-1][:160] if log else ""

    @staticmethod
    def write(child: subprocess.Popen[bytes], data: bytes) -> None:
        """Write to a program's standard input, if it still reads."""
        with contextlib.suppress(BrokenPipeError):
            if child.stdin is not None:
                child.stdin.write(data)
                child.stdin.flush()


def typing(seed: int, command: list[str]) -> list[str]:
    """Return the command with a person at its terminal."""
    lines = LINES if seed % 2 else LINES[:4]
    return [sys.executable, "-m", "gpuguard.lab.typist", str(seed), str(HOLD_S + 3), *lines, "--", *command]
