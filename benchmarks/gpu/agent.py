"""The daemon as it is measured here: observing, only the GPU's eyes open, its state in a folder of our own."""

from __future__ import annotations

import contextlib
import ctypes
import json
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import psutil
from machine import PATIENCE, driver_library, environment

from gpuguard.sensors.launches import cooperative

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

OPEN_S = 40.0 * PATIENCE
STOP_S = 15.0 * PATIENCE

SETTINGS = """\
[nvml]
rate_hz = {rate_hz}
[launches]
libraries = {libraries}
[packets]
enabled = false
[sockets]
enabled = false
[toolcalls]
enabled = false
"""


@contextlib.contextmanager
def agent(
    folder: Path, *, rate_hz: float = 10.0, record: bool = False, rings: Path | None = None,
) -> Iterator[subprocess.Popen[bytes]]:
    """Run ``gpuguard run`` until the block ends; its records are below ``folder``/state/guard.

    With ``rings`` no probe is placed: launches are those that programs tell there of themselves. Those of root are for
    root alone to read, so the guard stays root, of a user namespace of its own in which it has no rights.

    Raises
    ------
    RuntimeError
        If it ended, or opened no eye in time; its log says why.
    """
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o755)
    settings = folder / "gpuguard.toml"
    libraries = json.dumps([library] if (library := driver_library()) else [])
    settings.write_text(SETTINGS.format(rate_hz=rate_hz, libraries=libraries))
    told = {**environment(), "GPUGUARD_STATE_DIR": str(folder / "state"), "GPUGUARD_RUNTIME_DIR": str(folder / "run"),
            "GPUGUARD_LOG_DIR": str(folder / "log")}
    command = [sys.executable, "-m", "gpuguard", "run", "--config", str(settings)]
    if rings is not None:
        told[cooperative.FOLDER_VARIABLE] = str(rings)
        command = ["unshare", "--user", "--map-root-user", *command]
    log = folder / "daemon.log"
    with log.open("wb") as stream:
        # Not from the checkout: the package that was built for this Python is meant.
        # And not with our output: whoever reads that waits for the last who holds it.
        daemon = subprocess.Popen([*command, *(["--record", "records"] if record else [])], env=told, cwd=folder,
                                  stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=stream,
                                  preexec_fn=_end_with_parent)  # noqa: PLW1509 one thread
    try:
        _opened(daemon, log)
        yield daemon
    finally:
        daemon.send_signal(signal.SIGTERM)
        try:
            daemon.wait(STOP_S)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()


def _end_with_parent() -> None:
    """Also where the measurement is killed, no daemon stays behind (PR_SET_PDEATHSIG of prctl(2))."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def _opened(daemon: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + OPEN_S
    while time.monotonic() < until:
        if daemon.poll() is not None:
            raise RuntimeError(f"the daemon ended at once: {log.read_text()[-2000:]}")
        if tried(log) >= {"nvml", "launches", "processes"}:
            return
        time.sleep(0.1)
    raise RuntimeError(f"no eye opened within {OPEN_S:g} s: {log.read_text()[-2000:]}")


def tried(log: Path) -> set[str]:
    """Return the eyes that the log says are open or closed."""
    lines = [one for one in log.read_text().splitlines() if '"eye ' in one and one.endswith("}")]
    return {str(json.loads(line).get("sensor")) for line in lines}


def cpu_s(pid: int) -> float:
    """Return the CPU time of a process and all below it, user and system."""
    process = psutil.Process(pid)
    times = [one.cpu_times() for one in (process, *process.children(recursive=True))]
    return sum(one.user + one.system for one in times)
