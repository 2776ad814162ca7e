"""What the place of a probe costs a launch: the runtime's entry, where others attach, and the driver's, where we do.

The public GPU probes of Datadog (pkg/gpu/probe.go) and Meta (strobelight, gpuevent_snoop) attach to `cudaLaunchKernel`
of libcudart, at its first byte. That is `push %rbp` in libcudart 12.9 and 13.5, which the kernel emulates, so it costs
a trap and no more; who asks the driver itself (Triton, CuPy, Numba, whoever hides) does not pass there. All pass the
driver's `cuLaunchKernel`, which begins with an instruction that is single-stepped, unless one goes past it, which is
what `sensors.launches.libcuda` does.

Here: bpftrace counting at a function that begins as libcudart's, and at the first byte of the driver's; beside them the
launch eye, which also keeps each launch's kernel, geometry and pace. The driver is the stand-in with the real stub
shape. What these agents do with the event that they then send to user space for each launch is not measured: they are
not here. CPU time of the launching process, added to a call; in turns, the least of each.
Result: benchmarks/results/launches_entry.json. Run: make bench-launches-entry (root, bpftrace, cc; one minute)
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from gpuguard.sensors import EyeClosed, launches

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent))
import launches_overhead as overhead

from tests.standins.build import build

if TYPE_CHECKING:
    from collections.abc import Iterator

CALLS, ROUNDS = 20_000, 5
RESULT = Path(__file__).parent / "results" / "launches_entry.json"
PUSH_RBP = 0x55
#: The entry keeps its frame pointer, as libcudart's does, and calls nothing, as little as a launch can do.
RUNTIME = """
__attribute__((noinline, optimize("no-omit-frame-pointer")))
int cudaLaunchKernel(void *f, long xy, long z, long bxy, long bz, void **args) {
    volatile long sum = xy + z + bxy + bz + (long)f + (long)args;
    return (int)(sum & 1);
}
"""
CALLER = r"""
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
typedef int (*launch)(void *, long, long, long, long, long, long, long, void *, void **, void **);
int main(int argc, char **argv) {
    void *library = dlopen(argv[1], RTLD_NOW);
    launch call = library ? (launch)dlsym(library, argv[2]) : 0;
    if (!call || argc < 4) { fprintf(stderr, "%s\n", dlerror()); return 1; }
    long count = atol(argv[3]);
    struct timespec a, b;
    int (*init)(unsigned) = (int (*)(unsigned))dlsym(library, "cuInit");
    if (init) init(0);
    for (int i = 0; i < 100; i++) call((void *)1, 1, 1, 1, 32, 1, 1, 0, 0, 0, 0);
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &a);
    for (long i = 0; i < count; i++) call((void *)1, 1, 1, 1, 32, 1, 1, 0, 0, 0, 0);
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &b);
    printf("%.1f\n", ((b.tv_sec - a.tv_sec) * 1e9 + (b.tv_nsec - a.tv_nsec)) / count);
    return 0;
}
"""


def compiled(folder: Path) -> tuple[Path, Path]:
    """Return the caller and the library that begins as libcudart does."""
    caller, runtime = folder / "caller", folder / "libruntime.so"
    (folder / "caller.c").write_text(CALLER)
    (folder / "runtime.c").write_text(RUNTIME)
    subprocess.run(["cc", "-O2", "-o", str(caller), str(folder / "caller.c"), "-ldl"], check=True)
    subprocess.run(["cc", "-O1", "-fno-omit-frame-pointer", "-fcf-protection=none", "-shared", "-fPIC", "-o",
                    str(runtime), str(folder / "runtime.c")], check=True)
    return caller, runtime


def first_byte(library: Path, symbol: str) -> int:
    """Return the first byte of a function."""
    listed = subprocess.run(["objdump", "-d", f"--disassemble={symbol}", str(library)], capture_output=True, text=True,
                            check=True).stdout
    return int(listed.split(f"<{symbol}>:\n")[1].split("\t")[1].split()[0], 16)


def ns_per_call(caller: Path, library: Path, symbol: str) -> float:
    """Return the CPU time of one call."""
    return float(subprocess.run([str(caller), str(library), symbol, str(CALLS)], capture_output=True, text=True,
                                check=True).stdout)


@contextlib.contextmanager
def counted_by_bpftrace(library: Path, symbol: str) -> Iterator[None]:
    """Count calls by process, as little as a probe can do."""
    text = f'uprobe:{library}:{symbol} {{ @[pid] = count(); }} BEGIN {{ printf("open\\n"); }}'
    tracer = subprocess.Popen(["bpftrace", "-e", text], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        while tracer.stdout and (line := tracer.stdout.readline()) and b"open" not in line:
            pass
        time.sleep(0.3)
        yield
    finally:
        tracer.send_signal(signal.SIGINT)
        try:
            tracer.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            tracer.kill()
            tracer.communicate()


@contextlib.contextmanager
def unwatched(*_: object) -> Iterator[None]:
    """Watch nothing."""
    yield


@contextlib.contextmanager
def watched(library: Path, _: str) -> Iterator[None]:
    """Watch a driver with the launch eye."""
    probe, _ = overhead.probed(library, lambda found: found)
    try:
        yield
    finally:
        probe.close()


def measure(folder: Path) -> dict[str, float]:
    """Return the least CPU time of a call in each form."""
    caller, runtime = compiled(folder)
    driver = build(folder)["libcuda"]
    entry, launch = (runtime, "cudaLaunchKernel"), (driver, "cuLaunchKernel")
    if first_byte(*entry) != PUSH_RBP:
        sys.exit("not measured: the compiler begins a function otherwise than libcudart")
    forms = {
        "runtime_bare_ns": (unwatched, entry), "driver_bare_ns": (unwatched, launch),
        "runtime_entry_ns": (counted_by_bpftrace, entry), "driver_entry_ns": (counted_by_bpftrace, launch),
        "ours_ns": (watched, launch),
    }
    least = dict.fromkeys(forms, math.inf)
    for _ in range(ROUNDS):
        for name, (how, (library, symbol)) in forms.items():
            with how(library, symbol):
                least[name] = min(least[name], ns_per_call(caller, library, symbol))
    return least


def main() -> int:
    """Measure, and write what each adds to a call."""
    if shutil.which("bpftrace") is None or shutil.which("cc") is None:
        print("not measured: bpftrace or cc is not installed")
        return 2
    try:
        launches.new_probe().close()
    except (EyeClosed, OSError) as error:
        print(f"not measured: {error}")
        return 2
    with tempfile.TemporaryDirectory() as folder:
        least = measure(Path(folder))
    added = {
        "runtime_entry_added_ns": least["runtime_entry_ns"] - least["runtime_bare_ns"],
        "driver_entry_added_ns": least["driver_entry_ns"] - least["driver_bare_ns"],
        "ours_added_ns": least["ours_ns"] - least["driver_bare_ns"],
    }
    result = {name: round(value, 1) for name, value in (least | added).items()}
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
