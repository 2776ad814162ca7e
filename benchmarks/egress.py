"""What egress policy costs: the captures of benchmarks/packets.py judged without it, and with it.

In one run, in turns, CPU time of one thread, medians: `Guard` over read blocks without egress policy, with one that
denies a name, and with 4,096 rules and a default that denies. Given for each packet and for each flow. No peer reads
captures against such a policy. Run: .venv/bin/python benchmarks/egress.py
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from peers.traffic import build

from gpuguard.core.egress import EgressPolicy, EgressRule
from gpuguard.core.guard import Guard
from gpuguard.core.policy import Policy
from gpuguard.core.records import Packets, Tick
from gpuguard.sensors.packets import read_capture

RESULT = Path(__file__).resolve().parent / "results" / "egress.json"
CAPTURES = {
    "3k": {"packets": 1_000_000, "flows": 3_000, "span_s": 60, "seed": 2},
    "100k": {"packets": 1_500_000, "flows": 112_000, "span_s": 1500, "seed": 1},
}
MANY = tuple(EgressRule(allow=f"*.n{number}.example") for number in range(4_094))
POLICIES = {
    "none": Policy(),
    "one rule": Policy(egress=(EgressPolicy("a", rules=(EgressRule(deny="*.denied.example"),)),)),
    "4,096 rules, all else denied": Policy(egress=(EgressPolicy("a", default="deny", rules=(
        *MANY, EgressRule(allow="10.0.0.0/8"), EgressRule(allow="2001:db8::/32"))),)),
}
ROUNDS = 3


def main() -> None:
    medians = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, wanted in CAPTURES.items():
            path = Path(folder) / f"{name}.pcap"
            build(path, **wanted)  # type: ignore[arg-type]
            medians[name] = measure(path)
            print(name, medians[name])
    RESULT.write_text(json.dumps({"load": os.getloadavg(), "cpus": os.cpu_count(), "captures": CAPTURES,
                                  "cpu": medians}, indent=2) + "\n")


def measure(path: Path) -> dict[str, dict[str, float]]:
    """Return the medians of each policy, in ns a packet and microseconds a flow."""
    seconds: dict[str, list[float]] = {name: [] for name in POLICIES}
    for _ in range(ROUNDS):
        for name, policy in POLICIES.items():
            took_s, packets, flows = judge(path, policy)
            seconds[name].append(took_s)
    return {name: {"ns_a_packet": round(statistics.median(some) * 1e9 / packets, 1),
                   "us_a_flow": round(statistics.median(some) * 1e6 / flows, 2)} for name, some in seconds.items()}


def judge(path: Path, policy: Policy) -> tuple[float, int, int]:
    """Return the CPU seconds from file to verdicts, and how many packets and flows were judged."""
    gc.collect()
    guard = Guard(policy, quiet=True)
    packets = now_ns = flows = 0
    began_s = time.thread_time()
    for block in read_capture(path, brief=not policy.egress):
        if isinstance(block, Packets):
            packets += len(block.rows)
            now_ns = max(now_ns, int(block.rows["time_ns"].max()))
            flows += count(guard.receive(block)) + count(guard.receive(Tick(time_ns=now_ns)))
    flows += count(guard.close(now_ns))
    return time.thread_time() - began_s, packets, flows


def count(events: list[object]) -> int:
    """Return how many flows ended."""
    return sum(len(one.closed.rows) if kind == "FlowReports" else 1 for one in events
               if (kind := type(one).__name__) in ("FlowReport", "FlowReports"))


if __name__ == "__main__":
    main()
