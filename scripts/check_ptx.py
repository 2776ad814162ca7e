"""Compile every CUDA kernel without a GPU, and hold what it uses against a table: registers, spills, double precision.

Run by scripts/check_ptx.sh in a virtual environment of its own (numba-cuda and NVIDIA's compilers, about 1 GB):

    check_ptx.py            every kernel for every architecture of CC, against LIMITS; writes benchmarks/results
    check_ptx.py 9.0        for one, as JSON on stdout; in a process of its own, which compiles device functions once

A kernel that needs more than its row allows fails the check; so does one that is in no row. The table is raised only
with a reason.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

CC = ("8.0", "9.0", "10.0", "12.0")
ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "check_ptx.json"


class Limits(NamedTuple):
    """What a kernel may use on any architecture; ``f64`` counts instructions, ``why`` is the reason for any."""

    registers: int
    f64: int
    why: str
    spills: int = 0
    stack_bytes: int = 0


LIMITS = {
    "windows.features": Limits(64, 0, "a channel's state in registers: four blocks of 256 threads a multiprocessor"),
    "forest.bins": Limits(40, 0, "six blocks of 256 threads"),
    "forest.walk": Limits(40, 0, "up to 9.0 32: four blocks of 512 threads, all that there is room for; later 40"),
    "sequential.cusum": Limits(64, 80, "a sum of millions of small steps: float32 would drift"),
    "sequential.bets": Limits(64, 120, "a product of millions of factors: float32 would drift"),
    "launches.events": Limits(40, 0, "integers only"),
    "opcodes.features": Limits(64, 60, "counts up to 2**31 are summed exactly, as the plain form does"),
    "opcodes.scores": Limits(64, 8, "leaves are summed in double precision, as the plain form does"),
}


def kernels() -> Iterator[tuple[str, Any, tuple[Any, ...]]]:
    """Give the name, the kernel and the argument types of each, as its launcher passes them."""
    from numba import types as t

    from gpuguard.kernels import forest_cuda, launches_cuda, opcodes_cuda, sequential_cuda, windows_cuda

    def array(kind: Any, dimensions: int) -> Any:
        return t.Array(kind, dimensions, "C")

    one, two, longs = array(t.float64, 1), array(t.float64, 2), array(t.int64, 1)
    ints, words = array(t.int32, 1), array(t.uint32, 1)
    singles, matrix = array(t.float32, 1), array(t.float32, 2)
    yield "windows.features", windows_cuda._features, (array(t.float32, 3), singles, singles, singles, singles)  # noqa: SLF001
    yield "forest.bins", forest_cuda._bins, (matrix, ints, matrix, t.float32, array(t.uint32, 2), matrix)  # noqa: SLF001
    yield "forest.walk", forest_cuda.walk_of(512), (array(t.uint32, 2), words, singles, array(t.uint32, 2), matrix)
    yield "sequential.cusum", sequential_cuda._cusum, (  # noqa: SLF001
        matrix, one, one, one, t.float64, t.float64, two, one, longs, longs)
    yield "sequential.bets", sequential_cuda._bets, (matrix, one, one, one, t.float64, two, one, longs, longs)  # noqa: SLF001
    yield "launches.events", launches_cuda._kernel, (longs, ints, longs, longs, array(t.uint32, 2))  # noqa: SLF001
    yield "opcodes.features", opcodes_cuda._all_features, (two, ints, ints, ints, one, matrix)  # noqa: SLF001
    yield "opcodes.scores", opcodes_cuda._all_scores, (  # noqa: SLF001
        matrix, ints, singles, ints, ints, one, ints, t.float64, one)


def measure(cc: str) -> dict[str, dict[str, int]]:
    """Return what the kernels use on one architecture."""
    major, minor = map(int, cc.split("."))
    from numba import cuda
    from numba.cuda import dispatcher

    class Device:
        compute_capability = major, minor

    # Asked of device functions, which compile for the current device; there is none.
    dispatcher.get_current_device = Device
    found = {}
    for name, kernel, signature in kernels():
        ptx, _ = cuda.compile_ptx(kernel.py_func, signature, cc=(major, minor))
        found[name] = assemble(ptx, f"sm_{major}{minor}")
    return found


def assemble(ptx: str, architecture: str) -> dict[str, int]:
    """Return what ptxas says of a kernel, and how many instructions of its PTX are in double precision."""
    program = next(Path(sys.prefix).glob("lib/python*/site-packages/nvidia/**/bin/ptxas"))
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        done = subprocess.run([program, f"-arch={architecture}", "-v", "-o", Path(folder, "kernel.cubin"), source],
                              capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"ptxas for {architecture}: {done.stderr}")

    def number(pattern: str) -> int:
        match = re.search(pattern, done.stderr)
        if match is None:
            raise SystemExit(f"ptxas says nothing of {pattern!r}: {done.stderr}")
        return int(match[1])

    return {"registers": number(r"Used (\d+) registers"), "stack_bytes": number(r"(\d+) bytes stack frame"),
            "spills": number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads"),
            "f64": len(re.findall(r"^\s+(?!ld|st|mov)[a-z0-9.]+\.f64\b", ptx, re.MULTILINE))}


def over(name: str, used: dict[str, int]) -> list[str]:
    """Return what a kernel uses beyond its row."""
    if name not in LIMITS:
        return [f"{name}: in no row of the table"]
    row = LIMITS[name]._asdict()
    return [f"{name}: {count} {what}, {row[what]} allowed ({row['why']})"
            for what, count in used.items() if count > row[what]]


def main() -> int:
    """Check all kernels for all architectures, write what was found; return 1 where one is over its limits."""
    if len(sys.argv) > 1:
        print(json.dumps(measure(sys.argv[1])))  # noqa: T201
        return 0
    found = {}
    for cc in CC:
        command = [sys.executable, "-W", "ignore", __file__, cc]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"compute capability {cc}: {done.stderr}")
        found[cc] = json.loads(done.stdout)
    bad = [f"{cc} {line}" for cc, used in found.items() for name, one in used.items() for line in over(name, one)]
    bad += [f"{name}: in the table, but no such kernel" for name in LIMITS if name not in found[CC[0]]]
    for name, row in LIMITS.items():
        used = "  ".join(f"{cc}: {one[name]['registers']:3} registers {one[name]['f64']:3} f64"
                         for cc, one in found.items() if name in one)
        print(f"{name:18} {used}  of {row.registers}, {row.f64}")  # noqa: T201
    versions = {name: importlib.metadata.version(name) for name in ("numba-cuda", "numba", "cuda-toolkit")}
    RESULT.write_text(json.dumps({"versions": versions, "kernels": found}, indent=1) + "\n")
    for line in bad:
        print(f"check-ptx: {line}", file=sys.stderr)  # noqa: T201
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
