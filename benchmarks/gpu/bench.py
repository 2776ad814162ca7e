"""Speed on a real GPU: the classification kernels, the cost of a launch, and what the agent costs a training loop.

    bench.py [--rounds N] [--seconds S] [--budget-s S]

Writes OUT/bench.json after every round. A training run without the agent and one with it follow each other in turn, in
an order that changes each round; the slowdown is the median of the rounds' ratios, with all rounds beside it. What does
not fit into the budget is left for the next call.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from agent import agent, cpu_s
from machine import (
    OUT,
    PROGRAMS,
    REAL,
    ROOT,
    STANDINS,
    WORK,
    context,
    end_in_order,
    environment,
    last_line,
    prepare_standins,
)
from workloads import python

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

RESULT = OUT / "bench.json"
LAUNCHES = 200_000
#: By then a daemon has looked at all that ran before it.
SETTLING_S = 3.0


def last_json(command: Sequence[str], limit_s: float, **changed: str) -> dict[str, Any]:
    """Run a program; return the JSON of its last line."""
    told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=limit_s,
                          stdin=subprocess.DEVNULL, env={**environment(), **changed})
    return last_line(told.stdout)


def kernels(half: str, limit_s: float) -> dict[str, Any]:
    """The classification kernels against their limits, by benchmarks/kernels.py; what it had by its limit counts."""
    written = OUT / f"kernels-{half}.json"
    written.unlink(missing_ok=True)
    command = [sys.executable, str(ROOT / "benchmarks" / "kernels.py"), half, "--out", str(written)]
    # Not from the checkout: the package that was built for this Python is meant.
    path = os.environ.get("PYTHONPATH") or str(ROOT)
    try:
        told = subprocess.run(command, capture_output=True, text=True, check=False, timeout=limit_s, cwd="/",
                              env={**environment(), "PYTHONPATH": path})
        ended = f"status {told.returncode}: {told.stdout[-3000:]} {told.stderr[-1500:]}"
    except subprocess.TimeoutExpired:
        ended = f"was ended after {limit_s:g} s"
    if not written.exists():
        raise RuntimeError(f"no result: {ended}")
    result = json.loads(written.read_text())
    if half == "cuda" and not any(name.startswith("cuda_") for name in result):
        raise RuntimeError(f"no figure of a GPU: {ended}")
    return {"result": result, "ended": ended}


def parity() -> dict[str, Any]:
    """Every CUDA form against the plain one, on arrays of the host, of Numba and of CuPy."""
    told = subprocess.run([sys.executable, str(ROOT / "tests" / "kernels" / "on_gpu.py")], capture_output=True,
                          text=True, check=False, timeout=120, cwd="/",
                          env={**environment(), "PYTHONPATH": os.environ.get("PYTHONPATH") or str(ROOT)})
    if told.stdout.strip() != "same":
        raise RuntimeError(f"{told.stderr[-5000:]} {told.stdout[-500:]}")
    return {"same": True, "warnings": told.stderr[-1500:]}


def launch_ns(**changed: str) -> float:
    """Return the nanoseconds that a launch takes its program."""
    rate = [str(PROGRAMS / "rate"), str(LAUNCHES)] if REAL else [str(STANDINS / "hasher"), "--interval-us", "0",
                                                                "--launches", str(LAUNCHES)]
    said = last_json(rate, 60, **changed)
    return float(said.get("ns_per_launch") or said["elapsed_ns"] / LAUNCHES)


def launch_cost(_: argparse.Namespace) -> dict[str, float]:
    """One round: nanoseconds that a launch takes its program alone, under the probes, with the shim."""
    from gpuguard.sensors.launches import cooperative

    with tempfile.TemporaryDirectory() as folder:
        loaded = {"CUDA_INJECTION64_PATH" if REAL else "LD_PRELOAD": str(cooperative.LIBRARY),
                  cooperative.FOLDER_VARIABLE: folder}
        alone = launch_ns()
        with agent(WORK / f"launches-{time.time_ns()}"):
            probed = launch_ns()
        return {"alone_ns": alone, "probed_ns": probed, "shim_ns": launch_ns(**loaded)}


def slowdown(arguments: argparse.Namespace, kind: str, turn: int) -> dict[str, float]:
    """One round: step time of a training loop without the agent and with it, in an order that changes each round."""
    command = [*python("training", kind), "--seconds", f"{arguments.seconds:g}"]
    figures: dict[str, float] = {}
    for way in ("without", "with") if turn % 2 == 0 else ("with", "without"):
        with agent(WORK / f"slowdown-{time.time_ns()}") if way == "with" else nullcontext() as daemon:
            if daemon:
                time.sleep(SETTLING_S)
            before, begun = (cpu_s(daemon.pid) if daemon else 0.0), time.monotonic()
            said = last_json(command, arguments.seconds + 60)
            figures[f"{way}_step_s"] = float(said.get("step_s") or 1.0 / max(said["launches"], 1))
            if daemon:
                figures["agent_cpu_ratio"] = (cpu_s(daemon.pid) - before) / (time.monotonic() - begun)
    figures["ratio"] = figures["with_step_s"] / figures["without_step_s"]
    return figures


#: What is measured round by round, and about how long a round takes.
ROUNDS: dict[str, tuple[Callable[[argparse.Namespace, int], dict[str, float]], float]] = {
    "training": (lambda arguments, turn: slowdown(arguments, "transformer-bf16", turn), 50.0),
    "launch_cost": (lambda arguments, _: launch_cost(arguments), 25.0),
    "reinforcement": (lambda arguments, turn: slowdown(arguments, "reinforcement", turn), 50.0),
}
#: In the order of worth. The half on one core needs no GPU and stands behind all that does.
PARTS = ("parity", "kernels_cuda", *ROUNDS, "kernels_cpu")


def measured(name: str, had: dict[str, Any], arguments: argparse.Namespace, until_s: float) -> dict[str, Any] | None:
    """Return what a part has measured by now; None where no time is left to begin or go on."""
    if not REAL and name in {"parity", "kernels_cuda"}:
        raise RuntimeError("the stand-in computes nothing")
    if name not in ROUNDS:
        left_s = until_s - time.monotonic()
        if name == "parity":
            return {"answer": parity()} if left_s > 60 else None
        return {"answer": kernels(name.removeprefix("kernels_"), min(left_s, 200.0))} if left_s > 60 else None
    part, round_s = ROUNDS[name]
    rounds: list[dict[str, float]] = had.get("answer", {}).get("rounds", [])
    if time.monotonic() + round_s > until_s:
        return None
    rounds = [*rounds, part(arguments, len(rounds))]
    medians = {figure: statistics.median(one[figure] for one in rounds) for figure in rounds[0]}
    return {"answer": {"median": medians, "rounds": rounds}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--only", choices=PARTS)
    parser.add_argument("--budget-s", type=float, default=450.0)
    arguments = parser.parse_args()
    end_in_order()
    until_s = time.monotonic() + arguments.budget_s
    prepare_standins()
    OUT.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    if result.get("machine", {}).get("device") != context()["device"]:
        result = {"machine": context()}
    # All parts have had a round before any has its second: the first round is worth most.
    for turn in range(arguments.rounds):
        for name in PARTS:
            had = result.get(name, {})
            wanted = turn + 1 if name in ROUNDS else 1
            if len(had.get("answer", {}).get("rounds", [0] if "answer" in had else [])) >= wanted:
                continue
            if (arguments.only and arguments.only != name) or (turn and "gap" in had):
                continue
            try:
                told = measured(name, had, arguments, until_s)
            except (OSError, RuntimeError, ValueError, KeyError, subprocess.SubprocessError) as error:
                told = {**had, "gap": f"{type(error).__name__}: {error} {getattr(error, 'stderr', '') or ''}"[-6000:]}
            if told is None:
                print(f"{name}, round {turn + 1}: left for the next call", flush=True)
                continue
            result[name] = told
            new = RESULT.with_suffix(".new")
            new.write_text(json.dumps(result, indent=1) + "\n")
            new.replace(RESULT)
            print(f"{name}, round {turn + 1}: {told.get('gap', '')[-1500:] or 'measured'}", flush=True)


if __name__ == "__main__":
    main()
