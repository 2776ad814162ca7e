"""How fast `gpuguard scan` judges the GPU code of whole libraries, end to end, and what the same costs with nvdisasm.

Three figures a library or wheel. `read` is the containers alone, one process, no cell: find each fatbin, unpack and
hash every entry. `decode` is the machine code of a sample of its cubins to arrays: kernels, windows, loops. `scan` is
all of it, as the command does it: workers in their cells, every entry of every architecture decoded, windows and loops
counted, and classified. MB are 10^6 bytes of unpacked GPU code, seconds are of CPU, of all processes. The baseline
disassembles the same sample with nvdisasm (if it is in PATH or named by NVDISASM) and counts mnemonics per kernel in
Python, which is the least that anybody must do with its text.

The floor of `scan`, of a megabyte of machine code: unpacked at 450 MB/s with its hash 2.2 ms, decoded at 2 GB/s 0.5 ms,
and 700 windows and loops scored at 3 us (kernels/code_scores.py) 2.1 ms: 4.8 ms, 210 MB/s.

Libraries and wheels are found in the folder that GPUGUARD_WHEELS_DIR names; without it, a wheel is made of the cubins
of the tests, in which starting the workers and compiling are most of the time. Run: make bench-code-scan. Targets: no
entry that cannot be read, at most 500 MB of memory, at least 5 times the baseline; 150 MB/s of a large library.
"""

from __future__ import annotations

import io
import json
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import Counter
from pathlib import Path

from gpuguard.code.containers import elf
from gpuguard.code.containers.finding import find_images
from gpuguard.code.containers.images import Image
from gpuguard.code.decode import decode_counts
from gpuguard.code.scanning import Target, scan_targets
from gpuguard.code.verdicts import FileVerdict

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "code_scan.json"
MEMORY_MAX_MB = 500
FASTER_MIN = 5.0
SAMPLE_BYTES_MAX = 6_000_000
_FUNCTION = re.compile(r"^\s*\.text\.(\S+):")
_MNEMONIC = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)")


def wheels(folder: str) -> list[Path]:
    """Return the wheels of the folder, or one made of our own cubins."""
    place = Path(os.environ.get("GPUGUARD_WHEELS_DIR", folder))
    found = sorted([*place.glob("*.whl"), *place.glob("*.so*")])
    if found:
        return found
    made = Path(folder, "fixtures.whl")
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted((ROOT / "tests" / "fixtures" / "cubins").glob("*.cubin")):
            for copy in range(20):
                archive.writestr(f"{copy}/{path.name}", path.read_bytes())
    return [made]


def read(path: Path, sample: list[bytes]) -> dict[str, object]:
    """Read one wheel; keep some of its cubins as a sample."""
    kinds: Counter[str] = Counter()
    files: set[str] = set()
    flaws: list[str] = []
    code = largest = held = 0
    began = time.process_time()
    with path.open("rb") as file:
        for one in find_images(file, path.name):
            if not isinstance(one, Image):
                flaws.append(f"{one.path} at {one.offset}: {one.reason}")
                continue
            files.add(one.path)
            kinds[f"{one.container.partition('/')[2]} {one.kind}"] += 1
            code += len(one.data)
            largest = max(largest, len(one.data))
            if one.kind == "cubin" and sum(kinds.values()) % 97 == 1 and held + len(one.data) < SAMPLE_BYTES_MAX / 8:
                sample.append(one.data)
                held += len(one.data)
    seconds = time.process_time() - began
    return {"files": len(files), "entries": sum(kinds.values()), "kinds": dict(sorted(kinds.items())),
            "unreadable": flaws, "code_mb": round(code / 1e6, 1), "largest_mb": round(largest / 1e6, 1),
            "read_mb_per_s": round(code / 1e6 / seconds, 1)}


def decode(sample: list[bytes]) -> float:
    """Return GB/s of machine code decoded to arrays, of the sample."""
    code = [(cubin.sm, bytes(kernel.text)) for cubin in map(elf.read_cubin, sample) for kernel in cubin.kernels]
    for sm in {sm for sm, _ in code}:
        decode_counts(sm, b"")
    began = time.process_time()
    for sm, text in code:
        decode_counts(sm, text)
    return round(sum(len(text) for _, text in code) / 1e9 / (time.process_time() - began), 2)


def cpu_s() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def scan(path: Path) -> dict[str, object]:
    """Scan one library or wheel as the command does."""
    began = cpu_s()
    verdict = next(one for one in scan_targets([Target(str(path))]) if isinstance(one, FileVerdict))
    seconds = cpu_s() - began
    return {"kernels": verdict.kernels, "labels": verdict.labels, "verdict": verdict.verdict,
            "gaps": [*verdict.malformed, *verdict.gaps], "notes": verdict.notes, "scan_cpu_s": round(seconds, 1),
            "scan_mb_per_s": round(verdict.code_bytes / 1e6 / seconds, 1),
            "kernels_per_s": round(verdict.kernels / seconds)}


def baseline(sample: list[bytes], program: str) -> dict[str, object]:
    """Disassemble the sample and count its mnemonics."""
    done, began = 0, cpu_s()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder, "one.cubin")
        for data in sample:
            if done > SAMPLE_BYTES_MAX:
                break
            place.write_bytes(data)
            told = subprocess.run([program, "-c", str(place)], capture_output=True, text=True, check=False)
            if told.returncode:
                continue
            done += len(data)
            counts: dict[str, Counter[str]] = {}
            kernel = ""
            for line in io.StringIO(told.stdout):
                if found := _FUNCTION.match(line):
                    kernel = found[1]
                elif found := _MNEMONIC.search(line):
                    counts.setdefault(kernel, Counter())[found[1]] += 1
    seconds = cpu_s() - began
    return {"sample_mb": round(done / 1e6, 2), "mb_per_s": round(done / 1e6 / seconds, 3)}


def main() -> None:
    sample: list[bytes] = []
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        for path in wheels(folder):
            rows[path.name] = {"wheel_mb": round(path.stat().st_size / 1e6, 1), **read(path, sample), **scan(path)}
            row = rows[path.name]
            print(f"{path.name[:44]:44} {row['files']:4} files {row['entries']:6} entries {row['kernels']:7} kernels "
                  f"{row['code_mb']:8} MB  read {row['read_mb_per_s']:6} MB/s  scan {row['scan_mb_per_s']:6} MB/s  "
                  f"{row['verdict']:9} unreadable {len(row['unreadable'])}", flush=True)
            print(f"    {row['kinds']} {row['labels']}", flush=True)
    memory_mb = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024
    code = sum(row["code_mb"] for row in rows.values())
    seconds = sum(row["scan_cpu_s"] for row in rows.values())
    result = {"libraries": rows, "decode_gb_per_s": decode(sample), "scan_mb_per_s": round(code / seconds, 1),
              "worker_memory_mb": memory_mb,
              "machine": {"cores": os.cpu_count(), "python": platform.python_version(),
                          "load_1_min": round(os.getloadavg()[0], 1)}}
    program = os.environ.get("NVDISASM") or shutil.which("nvdisasm")
    if program:
        result["nvdisasm_and_python"] = baseline(sample, program)
        result["faster"] = round(result["scan_mb_per_s"] / result["nvdisasm_and_python"]["mb_per_s"], 1)
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print({name: value for name, value in result.items() if name != "libraries"})
    missed = [f"{name}: {row['unreadable'] or row['gaps']}" for name, row in rows.items()
              if row["unreadable"] or row["gaps"]]
    if memory_mb > MEMORY_MAX_MB or result.get("faster", FASTER_MIN) < FASTER_MIN or missed:
        sys.exit(f"missed: {missed or result}")


if __name__ == "__main__":
    main()
