"""What the daemon costs while nothing happens: CPU and memory of all its processes, one stand-in GPU at 1 Hz.

Claim: <= 1 % of a core and <= 150 MB PSS; <= 300 MB with GPU processes active (the stand-in trainer launches then).
The host is idle because it is a pid and a network namespace of its own, in which nothing else runs.
Run: make bench-idle-daemon (as root, so that every eye is open)
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "idle_daemon.json"
CPU_MAX_RATIO = 0.01
PSS_MAX_BYTES = 150_000_000
PSS_ACTIVE_MAX_BYTES = 300_000_000
TICKS_PER_S = os.sysconf("SC_CLK_TCK")

NVML_SCRIPT = """\
driver 580.95.05
device 0 uuid GPU-0 memory_mib 143771 power_limit_w 700 sm_mhz_max 1980 name NVIDIA H200
at 0 device 0 gpu 0 memory 0 used_mib 4 power_w 75 temperature 30 sm_mhz 345 mem_mhz 3201
"""


def tree(pid: int) -> list[int]:
    """Return a process and all below it."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(one for child in children for one in tree(int(child)))]


def cpu_s(pids: list[int]) -> float:
    """Return the CPU time of the processes, user and system."""
    fields = [Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split() for pid in pids]
    return sum(int(f[11]) + int(f[12]) for f in fields) / TICKS_PER_S


def pss_bytes(pids: list[int]) -> dict[int, int]:
    """Return the proportional set size of each process."""
    return {pid: next(int(line.split()[1]) * 1024 for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
                      if line.startswith("Pss:")) for pid in pids}


def standins(folder: Path) -> dict[str, Path]:
    """Build the stand-in driver and programs; return where they are."""
    sys.path.insert(0, str(ROOT))
    from tests.standins import build as programs
    from tests.standins.libnvidia_ml import build as nvml

    paths = {name: Path(path) for name, path in programs.build(folder / "cuda").items()}
    paths["nvml"] = Path(nvml.build(folder / "nvml"))
    return paths


def measure(pids: list[int], seconds: float) -> float:
    """Return the share of one core that the processes took over that time."""
    before, start = cpu_s(pids), time.monotonic()
    time.sleep(seconds)
    return (cpu_s(pids) - before) / (time.monotonic() - start)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not arguments.inside:
        # Whatever else this machine does, its processes and packets are not of the host that is measured.
        alone = ["unshare", "--pid", "--net", "--mount-proc", "--fork", "--kill-child"]
        return subprocess.run([*alone, sys.executable, __file__, "--inside", "--seconds", str(arguments.seconds)],
                              check=False).returncode
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        built = standins(folder)
        script = folder / "nvml.script"
        script.write_text(NVML_SCRIPT)
        environment = {
            **os.environ,
            "GPUGUARD_STATE_DIR": str(folder / "state"),
            "GPUGUARD_RUNTIME_DIR": str(folder / "run"),
            "GPUGUARD_STANDIN_NVML_SCRIPT": str(script),
            "LD_LIBRARY_PATH": str(built["nvml"].parent),
        }
        folder.chmod(0o755)
        daemon = subprocess.Popen([sys.executable, "-m", "gpuguard", "run"], env=environment,
                                  stderr=(folder / "log").open("w"))
        try:
            time.sleep(8)
            if daemon.poll() is not None:
                print((folder / "log").read_text(), file=sys.stderr)
                return 1
            pids = tree(daemon.pid)
            ratio = measure(pids, arguments.seconds)
            idle = pss_bytes(tree(daemon.pid))
            trainer = subprocess.Popen([str(built["trainer"])], stdout=subprocess.DEVNULL,
                                       env={**os.environ, "LD_LIBRARY_PATH": str(built["libcuda"].parent)})
            time.sleep(20)
            active = pss_bytes(tree(daemon.pid))
            trainer.kill()
            trainer.wait()
        finally:
            daemon.send_signal(signal.SIGTERM)
            daemon.wait(10)
        result = {
            "cpu_ratio": ratio, "cpu_ratio_target": CPU_MAX_RATIO, "seconds": arguments.seconds,
            "pss_bytes": sum(idle.values()), "pss_bytes_target": PSS_MAX_BYTES, "pss_by_process": list(idle.values()),
            "pss_active_bytes": sum(active.values()), "pss_active_bytes_target": PSS_ACTIVE_MAX_BYTES,
        }
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(f"CPU  {ratio:.2%} of a core (target <= {CPU_MAX_RATIO:.0%})")
    print(f"PSS  {sum(idle.values()) / 1e6:.0f} MB idle (target <= 150), {sum(active.values()) / 1e6:.0f} MB with a "
          f"launching process (target <= 300)")
    missed = (ratio > CPU_MAX_RATIO or sum(idle.values()) > PSS_MAX_BYTES
              or sum(active.values()) > PSS_ACTIVE_MAX_BYTES)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
