"""What `gpuguard scan` says of the GPU code that everybody installs, and how long it takes: whole wheels, every kernel.

Each wheel is fetched by pip (or NAME is a folder in which it is installed), unpacked, scanned without an allow list and
again with one that `gpuguard code learn` made of it, and deleted. MB are 10^6 bytes of unpacked GPU code, of all
architectures; seconds are of CPU, of all processes. All of this code is benign: a file that is confirmed is a miss, and
one that is suspect without an allow list is told with its kernels.
Run: python benchmarks/code_wheels.py [NAME...]; results are added to those that are there.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

from gpuguard.code import allow
from gpuguard.code.scanning import files_below, scan_targets
from gpuguard.code.verdicts import FileVerdict, KernelVerdict

RESULT = Path(__file__).resolve().parent / "results" / "code_wheels.json"
NAMES = ("nvidia-curand", "nvidia-npp", "nvidia-cufft", "nvidia-cusparse", "nvidia-nccl-cu13", "nvidia-cudnn-cu13",
         "nvidia-cublas", "cupy-cuda13x", "torch")
KERNELS_SHOWN_MAX = 40


def fetched(name: str, folder: Path) -> str:
    """Download and unpack one wheel below the folder; return its file name. What is installed is linked to."""
    if Path(name).is_dir():
        (folder / "unpacked").symlink_to(Path(name).resolve())
        return f"{Path(name).name} (installed)"
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:", "-d", str(folder)]
    subprocess.run([*command, name], check=True)
    wheel, = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "unpacked")
    wheel.unlink()
    return wheel.name


def cpu_s() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def scanned(folder: Path, listed: Path | None, digests: set[str]) -> dict[str, Any]:
    """Scan all that is below a folder; gather the hashes of its kernels."""
    files: dict[str, Any] = {}
    accused: Counter[str] = Counter()
    began_s, before_s = time.perf_counter(), cpu_s()
    code_bytes = kernels = 0
    for event in scan_targets(files_below(folder), allow=listed):
        if isinstance(event, KernelVerdict):
            digests.add(event.text_sha256)
            if event.verdict in ("suspect", "confirmed"):
                accused[f"{event.label} {event.kernel[:72]}"] += 1
        elif isinstance(event, FileVerdict) and (event.kernels or event.gaps or event.malformed):
            code_bytes, kernels = code_bytes + event.code_bytes, kernels + event.kernels
            files[str(Path(event.path).relative_to(folder))] = {
                "verdict": event.verdict, "kernels": event.kernels, "code_mb": round(event.code_bytes / 1e6, 1),
                "labels": event.labels, "evidence": event.evidence, "unread": [*event.malformed, *event.gaps]}
    used_s, took_s = cpu_s() - before_s, time.perf_counter() - began_s
    return {"kernels": kernels, "code_mb": round(code_bytes / 1e6, 1), "cpu_s": round(used_s, 1),
            "wall_s": round(took_s, 1), "mb_per_cpu_s": round(code_bytes / 1e6 / used_s, 1), "files": files,
            "accused": dict(accused.most_common(KERNELS_SHOWN_MAX)), "accused_kernels": accused.total()}


def main() -> None:
    result = json.loads(RESULT.read_text()) if RESULT.exists() else {"wheels": {}}
    for name in sys.argv[1:] or NAMES:
        with tempfile.TemporaryDirectory() as folder:  # which removes a link, not what it leads to
            wheel = fetched(name, Path(folder))
            unpacked, listed = Path(folder, "unpacked"), Path(folder, "allowed")
            digests: set[str] = set()
            row = {"wheel": wheel, **scanned(unpacked, None, digests)}
            allow.save(listed, digests - {""})
            learnt = scanned(unpacked, listed, set())
            row["with_allow_list"] = {key: learnt[key] for key in ("accused_kernels", "cpu_s", "mb_per_cpu_s")}
            row["with_allow_list"]["verdicts"] = Counter(one["verdict"] for one in learnt["files"].values())
        result["wheels"][Path(name).name] = row
        result["machine"] = {
            "cores": os.cpu_count(), "python": platform.python_version(), "load_1_min": round(os.getloadavg()[0], 1),
            "date": time.strftime("%Y-%m-%d", time.gmtime())}
        RESULT.write_text(json.dumps(result, indent=2) + "\n")
        verdicts = Counter(one["verdict"] for one in row["files"].values())
        print(f"{wheel[:48]:48} {row['kernels']:7} kernels {row['code_mb']:8} MB {row['mb_per_cpu_s']:6} MB/s of CPU  "
              f"{dict(verdicts)} accused {row['accused_kernels']}; learnt {dict(row['with_allow_list']['verdicts'])}",
              flush=True)
    confirmed = [f"{name}: {path}" for name, row in result["wheels"].items()
                 for path, file in row["files"].items() if file["verdict"] == "confirmed"]
    if confirmed:
        sys.exit(f"missed: confirmed though benign: {confirmed}")


if __name__ == "__main__":
    main()
