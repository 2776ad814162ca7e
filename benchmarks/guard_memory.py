"""Is the guard flat? An hour's worth of records of a busy host, as fast as it takes them.

Claim: after the first fifteen minutes, in which the bounded tables fill, the rest adds less than 10 % to the memory.
Run: make bench-guard-memory
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gpuguard.core.guard import Guard
from gpuguard.core.records import (
    LAUNCH,
    PACKET,
    Block,
    DeviceSample,
    HostInfo,
    Launches,
    Packets,
    ProcessExited,
    ProcessSample,
    ProcessStarted,
    Socket,
    Sockets,
    Tick,
)
from gpuguard.core.subjects import ProcessId

if TYPE_CHECKING:
    from collections.abc import Iterator

T0 = 1_700_000_000_000_000_000
SECOND = 1_000_000_000
FLOWS_PER_S = 50
EXECS_PER_S = 10
GROWTH_MAX_RATIO = 0.10
RESULT = Path(__file__).parent / "results" / "guard_memory.json"
GPU_PROCESSES = [ProcessId(boot_id="b", pid=100 + n, start_ticks=n) for n in range(8)]


def flows(second: int) -> Packets:
    """Fifty short TLS-like conversations: SYN, SYN-ACK, ACK, six records, FIN both ways."""
    shape = [(0, 2, 0), (1, 18, 0), (0, 16, 0), (0, 24, 517), (1, 24, 2800), (0, 24, 90), (1, 24, 5200), (0, 24, 40),
             (1, 24, 31), (0, 17, 0), (1, 17, 0)]
    rows = np.zeros(FLOWS_PER_S * len(shape), PACKET)
    at = 0
    for number in range(FLOWS_PER_S):
        sent = [1_000, 5_000]
        for step, (side, flags, size) in enumerate(shape):
            row = rows[at]
            ends = [(b"\0" * 10 + b"\xff\xff\x0a\0\0\x01", 20_000 + (second * FLOWS_PER_S + number) % 40_000),
                    (b"\0" * 10 + b"\xff\xff\x0a\0\x01" + bytes([number]), 443)]
            near, far = ends[side], ends[1 - side]
            row["time_ns"] = T0 + second * SECOND + number * 15_000_000 + step * 1_000_000
            row["source"], row["destination"] = list(near[0]), list(far[0])
            row["source_port"], row["destination_port"] = near[1], far[1]
            row["sequence"], row["acknowledgement"] = sent[side], sent[1 - side]
            row["payload_bytes"], row["frame_bytes"] = size, size + 66
            row["protocol"], row["tcp_flags"], row["ip_version"], row["packet_type"] = 6, flags, 4, 0
            sent[side] += size + (1 if flags & 3 else 0)
            at += 1
    rows = rows[np.argsort(rows["time_ns"], kind="stable")]
    return Packets(time_ns=int(rows["time_ns"][-1]), netns=1, rows=rows)


def processes(second: int) -> Iterator[Block]:
    for number in range(EXECS_PER_S):
        start = second * EXECS_PER_S + number
        process = ProcessId(boot_id="b", pid=1_000 + start % 30_000, start_ticks=start)
        time_ns = T0 + second * SECOND
        yield ProcessStarted(time_ns=time_ns, process=process, parent=GPU_PROCESSES[0], name="true", argv=("true", "x"))
        yield ProcessExited(time_ns=time_ns + 1, process=process, exit_status=0)


def launches(second: int) -> Launches:
    rows = np.zeros(8 * 40, LAUNCH)
    rows["pid"] = np.repeat([p.pid for p in GPU_PROCESSES], 40)
    rows["start_ticks"] = np.repeat([p.start_ticks for p in GPU_PROCESSES], 40)
    rows["kernel"] = np.tile(np.arange(40), 8) + 1
    rows["launches"] = 25 + np.tile(np.arange(40), 8)
    rows["first_ns"], rows["last_ns"] = T0 + second * SECOND, T0 + second * SECOND + 900_000_000
    rows["grid"], rows["block"] = 128, 256
    rows["gaps_log2"][:, 18] = rows["launches"]
    return Launches(time_ns=T0 + (second + 1) * SECOND, rows=rows)


def one_second(second: int) -> Iterator[Block]:
    time_ns = T0 + second * SECOND
    yield flows(second)
    yield from processes(second)
    sockets = [Socket(protocol=6, local="10.0.0.1", local_port=20_000 + (second * 50 + n) % 40_000,
                      remote=f"10.0.1.{n}", remote_port=443, state=1, inode=second * 50 + n, uid=0,
                      owners=(GPU_PROCESSES[1],)) for n in range(50)]
    yield Sockets(time_ns=time_ns, netns=1, sockets=tuple(sockets))
    yield launches(second)
    for number, process in enumerate(GPU_PROCESSES):
        yield DeviceSample(time_ns=time_ns, uuid=f"GPU-{number}", gpu_ratio=0.9, power_w=500.0 + second % 30)
        yield ProcessSample(time_ns=time_ns, process=process, uuid=f"GPU-{number}", sm_ratio=0.9)
    for quarter in range(4):
        yield Tick(time_ns=time_ns + quarter * SECOND // 4)


def rss_bytes() -> int:
    """Return the resident memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def main() -> int:
    guard = Guard()
    guard.receive(HostInfo(time_ns=T0, schema_version=1, boot_id="b", hostname="h", clock_ticks_per_s=100))
    marks: dict[int, int] = {}
    accused = 0
    cpu_s = 0.0
    for second in range(3_601):
        blocks = list(one_second(second))
        start = time.process_time()
        for block in blocks:
            accused += sum(getattr(e, "verdict", "") in ("suspect", "confirmed") for e in guard.receive(block))
        cpu_s += time.process_time() - start
        if second in (900, 3_600):
            marks[second] = rss_bytes()
    growth_ratio = marks[3_600] / marks[900] - 1
    result = {
        "rss_after_15_min_bytes": marks[900],
        "rss_after_60_min_bytes": marks[3_600],
        "growth_ratio": growth_ratio,
        "growth_ratio_target": GROWTH_MAX_RATIO,
        "guard_cpu_s_per_hour_of_records": cpu_s,
        "packets": 3_601 * FLOWS_PER_S * 11,
        "accused_events": accused,
    }
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(f"memory after 15 min {marks[900] / 2**20:.1f} MiB, after 60 min {marks[3_600] / 2**20:.1f} MiB: "
          f"{growth_ratio:+.1%} (target <= {GROWTH_MAX_RATIO:.0%})")
    print(f"guard CPU for an hour of records {cpu_s:.1f} s = {cpu_s / 36:.2f} % of a core")
    return 0 if growth_ratio <= GROWTH_MAX_RATIO else 1


if __name__ == "__main__":
    sys.exit(main())
