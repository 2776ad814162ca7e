"""What ``import gpuguard`` costs a scheduler or a trainer that imports it, beside nvitop in the same run.

Claim: < 150 ms, and at most a quarter of ``import nvitop``. Each is the median over fresh interpreters, less that of an
interpreter that imports nothing; the three take turns, so that a busy moment hits all alike.
Run: make bench-import-time
"""

from __future__ import annotations

import importlib.util
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

RESULT = Path(__file__).parent / "results" / "import_time.json"
ROUNDS = 15
IMPORT_MAX_MS = 150.0
PEER_MAX_RATIO = 0.25

CASES = {"nothing": "pass", "gpuguard": "import gpuguard", "gpuguard.Guard": "import gpuguard; gpuguard.Guard()"}


def start_ms(code: str) -> float:
    """Return how long a fresh interpreter takes to run this."""
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, stdin=subprocess.DEVNULL)
    return (time.perf_counter() - begin) * 1e3


def main() -> int:
    """Measure, print, write, and return 1 if a target is missed."""
    cases = dict(CASES)
    if importlib.util.find_spec("nvitop"):
        cases["nvitop"] = "import nvitop"
    samples: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(ROUNDS + 1):
        for name, code in cases.items():
            samples[name].append(start_ms(code))
    # The first round fills the page cache and writes byte code.
    medians = {name: statistics.median(values[1:]) for name, values in samples.items()}
    costs = {name: median - medians["nothing"] for name, median in medians.items() if name != "nothing"}
    ratio = costs["gpuguard"] / costs["nvitop"] if "nvitop" in costs else None
    for name, cost in costs.items():
        print(f"import {name}: {cost:.1f} ms")
    print(f"gpuguard: {costs['gpuguard']:.1f} ms (target < {IMPORT_MAX_MS:.0f})")
    if ratio is None:
        print("nvitop is not installed: no ratio")
    else:
        print(f"gpuguard / nvitop: {ratio:.3f} (target <= {PEER_MAX_RATIO})")
    result = {"import_ms": costs, "import_ms_target": IMPORT_MAX_MS, "ratio_to_nvitop": ratio,
              "ratio_to_nvitop_target": PEER_MAX_RATIO, "rounds": ROUNDS}
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    missed = costs["gpuguard"] >= IMPORT_MAX_MS or (ratio is not None and ratio > PEER_MAX_RATIO)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
