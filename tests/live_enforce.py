"""Run by tests/test_enforce_live.py in a pid, mount and network namespace of its own: the daemon enforces there.

It has no more capabilities than deploy/gpuguard.service leaves it. A stand-in miner starts, is paused by policy, and is
killed once a person approved. Prints one JSON object.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

WAIT_S = 200.0


def as_the_unit() -> list[str]:
    """Return how a command is run with the capabilities of the unit, and none to be gained."""
    unit = (Path(__file__).parent.parent / "deploy" / "gpuguard.service").read_text()
    words = next(line for line in unit.splitlines() if line.startswith("CapabilityBoundingSet=")).partition("=")[2]
    kept = ["+" + word.removeprefix("CAP_").lower() for word in words.split()]
    return ["setpriv", "--no-new-privs", "--bounding-set", ",".join(["-all", *kept])]


def until(condition: Callable[[], object], what: str) -> object:
    deadline = time.monotonic() + WAIT_S
    while not (answer := condition()):
        if time.monotonic() > deadline:
            sys.exit(f"{what} did not happen within {WAIT_S:g} s")
        time.sleep(0.1)
    return answer


def hear(path: str) -> list[str]:
    """Be the service manager on this socket: return what it is told, which grows."""
    manager, told = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM), []
    manager.bind(path)

    def read() -> None:
        while True:
            told.append(manager.recv(4096).decode())

    threading.Thread(target=read, daemon=True).start()
    return told


def incidents(state: Path) -> list[dict]:
    path = state / "guard" / "events.jsonl"
    whole = path.read_text().rpartition("\n")[0] if path.exists() else ""  # the last line may be half there
    return [one for one in map(json.loads, whole.splitlines()) if one["type"] == "incident"]


def outcome(state: Path, action: str, word: str) -> dict | None:
    found = [one for incident in incidents(state) for one in incident["outcomes"]
             if (one["action"], one["outcome"]) == (action, word)]
    return found[-1] if found else None


def kill_decision(state: Path) -> str | None:
    found = [d for incident in incidents(state) for d in incident["decisions"] if d["rung"] == "kill"]
    return found[0]["id"] if found else None


def stopped(pid: int) -> bool:
    """Return whether a process makes no progress: stopped, or in a frozen cgroup."""
    before = Path(f"/proc/{pid}/stat").read_text()
    time.sleep(0.5)
    return before == Path(f"/proc/{pid}/stat").read_text()


def main(hasher: str, library: str) -> None:
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    folder = Path(tempfile.mkdtemp(prefix="gpuguard-enforce-"))
    folder.chmod(0o755)
    state = folder / "state"
    environ = {**os.environ, "GPUGUARD_STATE_DIR": str(state), "GPUGUARD_RUNTIME_DIR": str(folder / "run"),
               "GPUGUARD_LAUNCHES_LIBRARIES": library, "NOTIFY_SOCKET": str(folder / "notify")}
    notified = hear(environ["NOTIFY_SOCKET"])
    gpuguard = [sys.executable, "-m", "gpuguard"]
    with (folder / "log").open("w") as log:
        daemon = subprocess.Popen([*as_the_unit(), *gpuguard, "run", "--mode", "enforce"], env=environ, stderr=log)
    told: dict[str, object] = {}
    try:
        until(lambda: notified, "the service manager being told that it watches")
        miner = subprocess.Popen([hasher], stdout=subprocess.DEVNULL, start_new_session=True)
        try:
            told["paused"] = until(lambda: outcome(state, "pause", "done"), "the pause")
            told["stopped"] = until(lambda: stopped(miner.pid), "the miner standing still")
            decision = str(until(lambda: kill_decision(state), "the decision to kill"))
            told["alive_before_approval"] = miner.poll() is None
            said = subprocess.run([*gpuguard, "approve", decision, "--reason", "a test", "--by", "kim"], env=environ,
                                  capture_output=True, text=True, check=False)
            told["approve"] = [said.returncode, said.stdout + said.stderr]
            told["miner_status"] = miner.wait(WAIT_S)
            told["audit"] = subprocess.run([*gpuguard, "audit", "verify"], env=environ, check=False,
                                           capture_output=True).returncode
        finally:
            miner.kill()
            miner.wait()
    finally:
        daemon.send_signal(signal.SIGTERM)
        told["daemon_status"] = daemon.wait(100)
        until(lambda: notified[-1] == "STOPPING=1", "the service manager being told of the end")
        told["notified"] = notified
        told["log"] = (folder / "log").read_text()[-4000:]
        print(json.dumps(told))
        subprocess.run(["rm", "-rf", str(folder)], check=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
