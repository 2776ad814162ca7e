"""The scene of tests/test_dials_live.py: run in a network namespace of its own; prints one JSON object.

Exit status 77: this host does not allow it.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpuguard.core.events import Finding
from gpuguard.replaying import replay

if TYPE_CHECKING:
    from collections.abc import Callable

#: One process dials sixty places that nobody serves, and is gone.
SCAN = """
import socket, sys
for last in range(60):
    with socket.socket() as one:
        one.connect_ex((sys.argv[1] + str(1 + last % 3), 2000 + last))
"""
#: One process for each attempt.
LOOP = "for port in $(seq 3000 3059); do (exec 3<>/dev/tcp/{host}/$port) 2>/dev/null; done"


def run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.stderr.write(f"{' '.join(command)}: {done.stderr}")
        raise SystemExit(77)


class Scene:
    """The daemon, and what it found."""

    def __init__(self, folder: Path) -> None:
        folder.chmod(0o755)
        self.state, self.log = folder / "state", folder / "log"
        environ = {**os.environ, "GPUGUARD_STATE_DIR": str(self.state), "GPUGUARD_RUNTIME_DIR": str(folder / "run"),
                   "GPUGUARD_TOOLCALLS_ENABLED": "false"}
        with self.log.open("w") as stream:
            self.broker = subprocess.Popen([sys.executable, "-m", "gpuguard", "run", "--record", "rec"], env=environ,
                                           stderr=stream, stdout=subprocess.DEVNULL)

    def wait_open(self) -> None:
        limit = time.monotonic() + 100
        while not all(f'"{name}"' in self.opened() for name in ("packets", "processes", "sockets")):
            if time.monotonic() > limit or self.broker.poll() is not None:
                sys.stderr.write(self.log.read_text())
                raise SystemExit(77)
            time.sleep(0.05)
        time.sleep(0.5)

    def opened(self) -> str:
        return "\n".join(line for line in self.log.read_text().splitlines() if "eye open" in line)

    def stop(self) -> None:
        self.broker.send_signal(signal.SIGTERM)
        self.broker.wait(100)

    def findings(self) -> list[dict[str, Any]]:
        lines = (self.state / "guard" / "events.jsonl").read_text().splitlines()
        return [event for event in map(json.loads, lines) if event["type"] == "finding"]


def veth(container_pid: int) -> None:
    run("ip", "link", "add", "gg0", "type", "veth", "peer", "name", "gg1", "netns", str(container_pid))
    run("ip", "addr", "add", "10.81.1.1/24", "dev", "gg0")
    run("ip", "link", "set", "gg0", "up")
    for last in (2, 3):
        run("ip", "addr", "add", f"10.81.1.{last}/24", "dev", "gg0")
    inside = ("nsenter", "-t", str(container_pid), "--net", "ip")
    run(*inside, "addr", "add", "10.81.1.9/24", "dev", "gg1")
    run(*inside, "link", "set", "gg1", "up")


def wait(ready: Callable[[], bool]) -> None:
    """Wait, for as long as a busy machine may take: what is missing then is told by the test."""
    limit = time.monotonic() + 100
    while not ready() and time.monotonic() < limit:
        time.sleep(0.2)


def from_container(finding: dict[str, Any]) -> bool:
    return bool(finding["process"]) and "10.81.1." in finding["process"]["argv"]


def from_loop(loop: int, finding: dict[str, Any]) -> bool:
    return bool(finding["process"]) and [one["pid"] for one in finding["process"]["ancestors"][:1]] == [loop]


def scans_of(scene: Scene, here: int, loop: int) -> set[str]:
    """Return which of the three are told for certain by now."""
    named = [one for one in scene.findings() if one["verdict"] == "confirmed" and one["process"]]
    return {"here" if one["process"]["process"]["pid"] == here else "container" if from_container(one) else "loop"
            for one in named if one["process"]["process"]["pid"] == here or from_container(one) or from_loop(loop, one)}


def told(findings: list[dict[str, Any]], pids: set[int]) -> dict[str, Any]:
    mine = [one for one in findings if one["process"] and one["process"]["process"]["pid"] in pids]
    last = {one["id"]: one for one in mine}
    return {
        "labels": sorted({one["label"] for one in mine}),
        "verdicts": [one["verdict"] for one in last.values()],
        "named": sorted({one["process"]["process"]["pid"] for one in mine}),
        "argv_marked": all(word in one["process"]["argv"] for one in mine for word in ("-c", "gg-mark")),
        "text": mine[-1]["evidence"][-1]["text"] if mine else "",
    }


def play(folder: Path) -> dict[str, Any]:
    run("ip", "link", "set", "lo", "up")
    for last in (1, 2, 3):
        run("ip", "addr", "add", f"10.80.0.{last}/24", "dev", "lo")
    apart = ("unshare", "--net", "--pid", "--fork", "--kill-child", "--mount-proc")
    container = subprocess.Popen([*apart, "sleep", "1000"])
    scene = Scene(folder)
    try:
        children = Path(f"/proc/{container.pid}/task/{container.pid}/children")
        wait(lambda: bool(children.read_text()))
        inside = int(children.read_text())
        wait(lambda: "sleep" in Path(f"/proc/{inside}/comm").read_text())
        veth(inside)
        scene.wait_open()
        here = subprocess.Popen([sys.executable, "-c", SCAN, "10.80.0.", "gg-mark"])
        here.wait()
        subprocess.run(["nsenter", "-t", str(inside), "--net", "--pid", sys.executable, "-c", SCAN, "10.81.1.",
                        "gg-mark"], check=True)
        loop = subprocess.Popen(["bash", "-c", LOOP.format(host="10.80.0.2")])
        loop.wait()
        wait(lambda: len(scans_of(scene, here.pid, loop.pid)) == 3)
    finally:
        scene.stop()
        container.kill()
        container.wait()
    found = scene.findings()
    scans, children = ({one["process"]["process"]["pid"] for one in found if of(one)} for of in (
        from_container, partial(from_loop, loop.pid)))
    again = [[event.id, event.process.process.pid if event.process else 0, event.verdict]
             for event in replay(scene.state / "guard" / "rec") if isinstance(event, Finding)]
    lived = [[one["id"], one["process"]["process"]["pid"] if one["process"] else 0, one["verdict"]] for one in found]
    return {
        "here": {**told(found, {here.pid}), "pid": here.pid},
        "container": {**told(found, scans), "pid": min(scans, default=0)},
        "loop": {**told(found, children), "named_children": sorted(children)},
        "lived": lived,
        "replayed": again[:len(lived)],
    }


def main() -> None:
    folder = Path(tempfile.mkdtemp(prefix="gpuguard-test-"))
    try:
        print(json.dumps(play(folder)))
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
