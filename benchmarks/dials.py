"""What it costs that the kernel says who dials: each connection of the host, and the guard that reads it.

Claim: a connection that is refused costs its program at most 1 us more, whether it is told or only counted, and a
whole one, with all its changes of state, 2 us; so 50,000 a second cost 5 % of a core. To read of one process that dials
as fast as it can costs the guard at most 2 % of a core, a read that finds nothing 20 us.
With the programs attached and without them, turn about in one run; CPU time, medians.
Run: make bench-dials (as root)
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gpuguard.config import Config, ProcessSettings
from gpuguard.core.host import Host
from gpuguard.core.records import CONNECT, Connects, HostInfo
from gpuguard.messages import Opened, OpenProcesses
from gpuguard.sensors import EyeClosed, processes

if TYPE_CHECKING:
    from collections.abc import Callable

RESULT = Path(__file__).parent / "results" / "dials.json"
ROUNDS = 41
COUNTED, TOLD, WHOLE = 4_000, 250, 1_000
REFUSED_MAX_NS, WHOLE_MAX_NS, GUARD_MAX_RATIO, EMPTY_MAX_NS = 1_000, 2_000, 0.02, 20_000
#: ext/bpf/processes.bpf.c: so many connections of one process are told in a slice.
TOLD_PER_S = 256 * 1e9 / 2**28


class Direct:
    """The broker's half in this process."""

    def ask(self, request: Any) -> Any:
        return processes.grant(request)


def refused(count: int) -> None:
    """Dial a port of loopback that nobody serves, again and again."""
    with socket.socket() as one:
        for _ in range(count):
            one.connect_ex(("127.0.0.1", 9))


def served(count: int) -> None:
    """Dial, accept and close: a whole short connection, with all its changes of state."""
    with socket.create_server(("127.0.0.1", 0), backlog=8) as server:
        for _ in range(count):
            with socket.create_connection(server.getsockname()):
                server.accept()[0].close()


def cpu_ns_per(work: Callable[[int], None], count: int) -> float:
    """Return the CPU time of one of ``count``, made by a process of its own."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        before = time.process_time_ns()
        with contextlib.suppress(OSError):
            work(count)
        os.write(writing, str((time.process_time_ns() - before) / count).encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(writing)
    with os.fdopen(reading) as stream:
        return float(stream.read())


def compared(work: Callable[[int], None], count: int) -> dict[str, float]:
    """Return the medians with the programs and without them, and the median of the differences of two that follow."""
    with_them, without = [], []
    for _ in range(ROUNDS):
        without.append(cpu_ns_per(work, count))
        answer, descriptors = processes.grant(OpenProcesses("bpf"))
        assert isinstance(answer, Opened), answer
        with_them.append(cpu_ns_per(work, count))
        for descriptor in descriptors:
            os.close(descriptor)
        processes.release()
    added = statistics.median(a - b for a, b in zip(with_them, without, strict=True))
    base = statistics.median(without)
    with_ns = statistics.median(with_them)
    return {"ns": base, "with_programs_ns": with_ns, "added_ns": added, "added_ratio": added / base}


def guard() -> dict[str, float]:
    """Return what the guard's reading costs: a row that was told, and a read that finds nothing."""
    sensor = processes.open_sensor(Direct(), Config(processes=ProcessSettings(source="bpf")))
    sensor.read(time.time_ns())
    empty, rows = [], []
    for _ in range(ROUNDS):
        host = Host()
        host.receive(HostInfo(0, 1, "boot", "host", 100))
        cpu_ns_per(refused, TOLD)
        before = time.process_time_ns()
        blocks = sensor.read(time.time_ns())
        read_ns = time.process_time_ns() - before
        mine = [block for block in blocks if isinstance(block, Connects)]
        before = time.process_time_ns()
        for block in mine:
            host.receive(block)
        read_ns += time.process_time_ns() - before
        told = sum(len(block.rows) for block in mine)
        if told >= TOLD:
            rows.append(read_ns / told)
        sensor.read(time.time_ns())
        before = time.process_time_ns()
        for _ in range(100):
            sensor.read(time.time_ns())
        empty.append((time.process_time_ns() - before) / 100)
    sensor.close()
    processes.release()
    row_ns = statistics.median(rows)
    return {"row_ns": row_ns, "one_scanner_ratio": row_ns * TOLD_PER_S / 1e9, "empty_read_ns": statistics.median(empty)}


def flood() -> dict[str, float]:
    """Return what many processes at once can cost: a ring full of rows, each of other ends."""
    rows = np.zeros(9_000, CONNECT)
    rows["state"], rows["pid"] = 7, np.arange(9_000) % 40
    rows["local_port"] = np.arange(9_000)
    times = []
    for _ in range(ROUNDS):
        host = Host()
        before = time.process_time_ns()
        host.receive(Connects(0, rows))
        times.append((time.process_time_ns() - before) / len(rows))
    return {"table_row_ns": statistics.median(times)}


def main() -> int:
    answer, descriptors = processes.grant(OpenProcesses("bpf"))
    for descriptor in descriptors:
        os.close(descriptor)
    processes.release()
    if not isinstance(answer, Opened) or "connects" not in answer.descriptors:
        print(f"not measured: {answer}")
        return 1
    try:
        result: dict[str, dict[str, float]] = {
            "refused_counted": compared(refused, COUNTED),
            "refused_told": compared(refused, TOLD),
            "whole_connection": compared(served, WHOLE),
            "guard": {**guard(), **flood()},
        }
    except EyeClosed as error:
        print(f"not measured: {error}")
        return 1
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    missed = any(result[name]["added_ns"] > REFUSED_MAX_NS for name in ("refused_counted", "refused_told"))
    missed |= result["whole_connection"]["added_ns"] > WHOLE_MAX_NS
    missed |= result["guard"]["one_scanner_ratio"] > GUARD_MAX_RATIO
    missed |= result["guard"]["empty_read_ns"] > EMPTY_MAX_NS
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
