"""Speed on a real GPU: the classification kernels, the cost of a launch, and what the agent costs a training loop.

    bench.py [--rounds N] [--seconds S]

Writes OUT/bench.json after every part. A training run without the agent and one with it follow each other in turn, in
an order that changes each round; the slowdown is the median of the rounds' ratios, with the whole range beside it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agent import agent, cpu_s
from machine import OUT, PROGRAMS, REAL, ROOT, STANDINS, context, environment, prepare_standins
from workloads import python

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

RESULT = OUT / "bench.json"
LAUNCHES = 200_000


def last_json(command: Sequence[str], limit_s: float, **changed: str) -> dict[str, Any]:
    """Run a program; return the JSON of its last line."""
    told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=limit_s,
                          env={**environment(), **changed})
    found: dict[str, Any] = json.loads(told.stdout.strip().splitlines()[-1])
    return found


def kernels(_: argparse.Namespace) -> dict[str, Any]:
    """The classification kernels against their limits, by benchmarks/kernels.py."""
    told = subprocess.run([sys.executable, str(ROOT / "benchmarks" / "kernels.py")], capture_output=True, text=True,
                          check=False, timeout=300, env=environment(), cwd="/")
    written = ROOT / "benchmarks" / "results" / "kernels.json"
    return {"status": told.returncode, "printed": told.stdout[-6000:], "complaint": told.stderr[-1000:],
            "result": json.loads(written.read_text()) if written.exists() else None}


def launch_cost(arguments: argparse.Namespace) -> dict[str, Any]:
    """Nanoseconds that a launch takes its program: alone, under the probes, with the shim."""
    from gpuguard import capture

    rate = [str(PROGRAMS / "rate"), str(LAUNCHES)] if REAL else [str(STANDINS / "hasher"), "--interval-us", "0",
                                                                "--launches", str(LAUNCHES)]

    def ns(**changed: str) -> float:
        said = last_json(rate, 60, **changed)
        return float(said.get("ns_per_launch") or said["elapsed_ns"] / LAUNCHES)

    rounds: dict[str, list[float]] = {"alone": [], "probed": [], "shim": []}
    with tempfile.TemporaryDirectory() as folder:
        loaded = {"CUDA_INJECTION64_PATH" if REAL else "LD_PRELOAD": str(capture.LIBRARY),
                  capture.FOLDER_VARIABLE: folder}
        for _ in range(arguments.rounds):
            rounds["alone"].append(ns())
            with agent(OUT / "work" / f"launches-{time.time_ns()}"):
                rounds["probed"].append(ns())
            rounds["shim"].append(ns(**loaded))
    return {"ns_per_launch": {name: statistics.median(values) for name, values in rounds.items()}, "rounds": rounds}


def slowdown(arguments: argparse.Namespace, kind: str) -> dict[str, Any]:
    """Step time of a training loop with the agent over the one without, round by round."""
    command = [*python("training", kind), "--seconds", f"{arguments.seconds:g}"]
    steps: dict[str, list[float]] = {"without": [], "with": []}
    shares: list[float] = []
    for turn in range(arguments.rounds):
        for way in ("without", "with") if turn % 2 == 0 else ("with", "without"):
            folder = OUT / "work" / f"slowdown-{time.time_ns()}"
            with agent(folder) if way == "with" else nullcontext() as daemon:
                before, begun = (cpu_s(daemon.pid) if daemon else 0.0), time.monotonic()
                said = last_json(command, arguments.seconds + 60)
                steps[way].append(float(said.get("step_s") or 0) or 1.0 / max(said["launches"], 1))
                if daemon:
                    shares.append((cpu_s(daemon.pid) - before) / (time.monotonic() - begun))
    ratios = [a / b for a, b in zip(steps["with"], steps["without"], strict=True)]
    return {"kind": kind, "ratio": statistics.median(ratios), "ratios": ratios, "step_s": steps,
            "agent_cpu_ratio": statistics.median(shares)}


PARTS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "kernels": kernels,
    "launch_cost": launch_cost,
    "training": lambda arguments: slowdown(arguments, "transformer-bf16"),
    "reinforcement": lambda arguments: slowdown(arguments, "reinforcement"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--only", choices=PARTS)
    arguments = parser.parse_args()
    prepare_standins()
    OUT.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = json.loads(RESULT.read_text()) if RESULT.exists() else {"machine": context()}
    for name, part in PARTS.items():
        if "answer" in result.get(name, {}) or (arguments.only and arguments.only != name):
            continue
        try:
            result[name] = {"answer": part(arguments)}
        except (OSError, RuntimeError, ValueError, KeyError, subprocess.SubprocessError) as error:
            result[name] = {"gap": f"{type(error).__name__}: {error} {getattr(error, 'stderr', '') or ''}"[:1500]}
        Path(RESULT).write_text(json.dumps(result, indent=1) + "\n")
        print(f"{name}: {'gap: ' + result[name]['gap'] if 'gap' in result[name] else 'measured'}")


if __name__ == "__main__":
    main()
