"""What decoding GPU machine code costs: bytes of code a second, one core, CPU time.

The floor. An instruction is 16 bytes, read once, in order: at 10 GB/s of one core 1.6 ns. What is counted lies in the
first-level cache (opcode table 16 kB, truth tables 4 kB, counts 1.3 kB). So the floor is arithmetic: some forty
operations an instruction, 10 to 15 cycles when nothing is mispredicted, 4 to 5 GB/s at 4 GHz. Windows add the writing
of 600 bytes for each 1536 read.

Figures, on the code of the committed cubins, each repeated until there are some megabytes. `kernel`: counts, truth
tables, rotations, immediates and runs of whole kernels. `parts`: the same, and windows and innermost loops as arrays.
`rows`: `decode_kernel`, which is that as Python objects, with the search for constants and the SHA-256 of the code.
`nvdisasm`: NVIDIA's disassembler on the same cubins, and a regular expression in Python that counts its mnemonics; left
out where there is none (GPUGUARD_NVDISASM or PATH). Run: make bench-code-decode. Target: parts at 2 GB/s.
"""

from __future__ import annotations

import collections
import json
import os
import re
import resource
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from peers.machine import machine

from gpuguard.code.decode import decode_kernel, decoder

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
import learn_opcodes  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "code_decode.json"
CUBINS = sorted((ROOT / "tests" / "fixtures" / "cubins").glob("*.cubin"))
NVDISASM = os.environ.get("GPUGUARD_NVDISASM") or shutil.which("nvdisasm")
ROUNDS = 9
REPEAT = 8  # so that a kernel is 40 to 400 kB: what a library's large kernels are
PARTS_MIN_GB_S = 2.0
MNEMONIC = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)")


def code() -> list[tuple[int, bytes]]:
    found = []
    for path in CUBINS:
        data = path.read_bytes()
        sm = learn_opcodes.arch_of(data)
        found += [(sm, text * REPEAT) for text in learn_opcodes.texts(data).values()]
    return found


def cpu_s(work: Callable[[], object], rounds: int = ROUNDS) -> list[float]:
    """Seconds of CPU, with those of children, of each round; one goes before to warm up."""
    figures = []
    for _ in range(rounds + 1):
        before = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        work()
        after = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        figures.append(sum(b.ru_utime + b.ru_stime - a.ru_utime - a.ru_stime
                           for a, b in zip(before, after, strict=True)))
    return figures[1:]


def disassemble() -> int:
    counts: collections.Counter[str] = collections.Counter()
    for path in CUBINS:
        shown = subprocess.run([str(NVDISASM), "-c", str(path)], capture_output=True, text=True, check=True).stdout
        counts.update(MNEMONIC.findall(shown))
    return counts.total()


def main() -> None:
    kernels = code()
    size = sum(len(text) for _, text in kernels)
    work: dict[str, Callable[[], object]] = {
        "kernel": lambda: [decoder(sm).decode(text, False) for sm, text in kernels],
        "parts": lambda: [decoder(sm).decode(text, True) for sm, text in kernels],
        "rows": lambda: [decode_kernel(sm, text) for sm, text in kernels],
    }
    times = {name: cpu_s(one) for name, one in work.items()}
    speeds = {name: sorted(size / seconds / 1e9 for seconds in some) for name, some in times.items()}
    result: dict[str, object] = {
        "code_bytes": size, "kernels": len(kernels), "rounds": ROUNDS,
        "gigabytes_per_cpu_second": {
            name: {"median": round(statistics.median(some), 3), "min": round(some[0], 3), "max": round(some[-1], 3)}
            for name, some in speeds.items()},
        "parts_min_gigabytes_per_cpu_second": PARTS_MIN_GB_S,
        "machine": {**machine(), "load_1_min": round(os.getloadavg()[0], 1),
                    "date": time.strftime("%Y-%m-%d", time.gmtime())},
    }
    if NVDISASM:
        seconds = statistics.median(cpu_s(disassemble, 1))
        speed = size / REPEAT / seconds / 1e9
        result["nvdisasm_gigabytes_per_cpu_second"] = round(speed, 6)
        result["times_nvdisasm"] = {name: round(statistics.median(some) / speed) for name, some in speeds.items()}
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))
    if statistics.median(speeds["parts"]) < PARTS_MIN_GB_S:
        sys.exit(f"missed: windows and loops below {PARTS_MIN_GB_S} GB/s")


if __name__ == "__main__":
    main()
