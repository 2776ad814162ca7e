"""What is left after two hours of programs that come and go, each with a driver of its own, and of an agent restarted.

Claim: nothing. One round is what a busy node does in ten seconds: a container starts with its own copy of the driver,
its program looks kernels up, launches and exits, the copy goes; every tenth round the eye is closed and opened again.
After 720 rounds (two hours) there are no more descriptors than after the first twenty, the kernel has none of the
programs, maps and links that were made, and the memory has not grown by more than 4 MiB.
Run: make bench-launches-churn (root; some six minutes)
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from gpuguard.config import Config
from gpuguard.core.records import Launches
from gpuguard.messages import ScanLaunches
from gpuguard.sensors import EyeClosed, launches

sys.path.insert(0, str(Path(__file__).parent.parent))
from tests.standins.build import build

ROUNDS, WARM_ROUNDS, REOPEN_ROUNDS = 720, 20, 10
LAUNCHES = 20
GROWTH_BYTES_MAX = 4 * 1024 * 1024
RESULT = Path(__file__).parent / "results" / "launches_churn.json"

SYS_BPF = 321  # x86-64
#: What /proc/PID/fdinfo calls the id of an object, and BPF_PROG_GET_FD_BY_ID.. of linux/bpf.h.
GET_BY_ID = {"prog_id": 13, "map_id": 14, "link_id": 30}


class Direct:
    """The broker's half in this process, so that one process shows all that is held."""

    def ask(self, request: Any) -> Any:
        return launches.grant(request)


def own_ids() -> set[tuple[str, int]]:
    """Return every BPF object that this process holds: what it is, and its id."""
    found = set()
    for name in os.listdir("/proc/self/fdinfo"):
        try:
            fields = dict(line.split(":", 1) for line in Path(f"/proc/self/fdinfo/{name}").read_text().splitlines())
        except (OSError, ValueError):
            continue
        kind = next((kind for kind in ("link_id", "map_id", "prog_id") if kind in fields), None)
        if kind:
            found.add((kind, int(fields[kind])))
    return found


def exists(kind: str, number: int) -> bool:
    """Return whether the kernel still has the object, whoever holds it."""
    attribute = ctypes.create_string_buffer(struct.pack("<I", number).ljust(120, b"\0"), 120)
    fd = ctypes.CDLL(None, use_errno=True).syscall(SYS_BPF, GET_BY_ID[kind], attribute, 120)
    if fd < 0:
        return False
    os.close(fd)
    return True


def held() -> dict[str, int]:
    """Return what this process holds, after what nobody refers to any more is gone."""
    gc.collect()
    rss = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
    return {"descriptors": len(os.listdir("/proc/self/fd")), "rss_bytes": rss, "bpf_objects": len(own_ids())}


def one_round(eye: Any, standins: dict[str, Path], folder: Path) -> int:
    """Run one container's program to its end; return how many of its launches were seen."""
    own = folder / "container"
    own.mkdir()
    for name in ("libcuda", "hasher"):
        shutil.copy(standins[name], own / standins[name].name)
    program = subprocess.Popen([str(own / "hasher"), "--launches", str(LAUNCHES), "--interval-us", "1000", "--delay-ms",
                                "60"], stdout=subprocess.DEVNULL)
    eye.read(time.time_ns())
    time.sleep(0.03)
    launches.grant(ScanLaunches((program.pid,)))
    program.wait()
    shutil.rmtree(own)
    time.sleep(0.02)
    return sum(int(block.rows["launches"][block.rows["pid"] == program.pid].sum())
               for block in eye.read(time.time_ns()) if isinstance(block, Launches))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    arguments = parser.parse_args()
    try:
        eye = launches.open_sensor(Direct(), Config())
    except (EyeClosed, OSError) as error:
        print(f"not measured: {error}")
        return 1
    eye.close()
    launches.release()
    seen = 0
    before: dict[str, int] = {}
    used: set[tuple[str, int]] = set()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        standins = build(folder / "standins")
        for number in range(0, arguments.rounds, REOPEN_ROUNDS):
            eye = launches.open_sensor(Direct(), Config())
            eye.period_ns = None
            for _ in range(REOPEN_ROUNDS):
                seen += one_round(eye, standins, folder)
            used |= own_ids()
            eye.close()
            launches.release()
            del eye
            if number < WARM_ROUNDS:
                before = held()
        after = held()
    time.sleep(0.5)  # the kernel frees programs after a grace period
    growth = {name: after[name] - before[name] for name in after}
    growth["bpf_objects_left"] = sum(exists(*one) for one in used)
    result = {"rounds": arguments.rounds, "before": before, "after": after, "growth": growth,
              "bpf_objects_used": len(used), "launches_seen_ratio": seen / (LAUNCHES * arguments.rounds)}
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    left = any(growth[name] > 0 for name in growth if name != "rss_bytes")
    return 1 if left or growth["rss_bytes"] > GROWTH_BYTES_MAX else 0


if __name__ == "__main__":
    raise SystemExit(main())
