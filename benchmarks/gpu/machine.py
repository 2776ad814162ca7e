"""Where the measurements run: a real GPU, or the stand-ins where there is none; and what is said of it beside each."""

from __future__ import annotations

import functools
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
#: Where `run.sh` puts what it builds and what it measured; both may be moved by the environment.
BUILD = Path(os.environ.get("GPUGUARD_GPU_BUILD", ROOT / "build" / "gpu"))
OUT = Path(os.environ.get("GPUGUARD_GPU_OUT", BUILD / "results"))
#: Where also the guard, which gives its rights up, may go: `run.sh` chooses it.
PLACE = Path(os.environ.get("GPUGUARD_GPU_WORK", BUILD))
#: What the daemons keep while they run.
WORK = PLACE / "work"
PROGRAMS = BUILD / "programs"
STANDINS = BUILD / "standins"
NVML_SCRIPT = STANDINS / "nvml.script"
#: The pid of the workload that runs, for the stand-in driver to show.
BUSY_PIDS = STANDINS / "busy.pids"

SCRIPT = f"""\
driver 580.95.05
device 0 uuid GPU-standin memory_mib 143771 power_limit_w 700 sm_mhz_max 1980 architecture 9 gpm 1 nvlinks 18 \
sms 132 name NVIDIA H200
at 0 device 0 gpu 96 memory 30 used_mib 4000 power_w 430 temperature 50 sm_mhz 1755 mem_mhz 3201 tx_kbs 10 rx_kbs 10 \
sm 97 occupancy 50 integer 80 tensor 0 dram 20 switches 3
process device 0 pid_file {BUSY_PIDS} used_mib 512 sm 97 memory 20 from 0 until 1000000
"""


def smi(*arguments: str) -> str:
    """Return what nvidia-smi prints; nothing where there is none or it does not answer."""
    found = shutil.which("nvidia-smi")
    if not found:
        return ""
    try:
        return subprocess.run([found, *arguments], capture_output=True, text=True, check=False, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


#: For images without nvidia-smi, or with one that does not answer.
ASK_NVML = """
import json, pynvml
pynvml.nvmlInit()
device = pynvml.nvmlDeviceGetHandleByIndex(0)
print(json.dumps({"name": pynvml.nvmlDeviceGetName(device), "driver_version": pynvml.nvmlSystemGetDriverVersion()}))
"""


@functools.cache
def told_by_nvml() -> dict[str, str]:
    """Return name and driver of the first device; nothing where there is none. A driver that hangs costs a minute."""
    if "GPUGUARD_STANDIN_NVML_SCRIPT" in os.environ:  # a part of a measurement against the stand-ins
        return {}
    try:
        told = subprocess.run([sys.executable, "-c", ASK_NVML], capture_output=True, text=True, check=True, timeout=60)
        found: dict[str, str] = json.loads(told.stdout)
    except (OSError, ValueError, subprocess.SubprocessError):
        return {}
    return found


def has_driver() -> bool:
    """Return whether the kernel has a driver. That the device file is there says nothing: libraries make it."""
    try:
        os.close(os.open("/dev/nvidiactl", os.O_RDWR | os.O_CLOEXEC))
    except OSError:
        return Path("/proc/driver/nvidia/version").exists()
    return True


def has_gpu() -> bool:
    """Return whether a driver answers here; raises `SystemExit` where there is one that does not."""
    answers = smi("-L").startswith("GPU ") or bool(told_by_nvml())
    if not answers and has_driver():
        raise SystemExit("a driver is here, but nvidia-smi and NVML name no GPU: no stand-in is measured instead")
    return answers


REAL = has_gpu()
#: A lent GPU is held for minutes, and what hangs there must end soon; stand-ins are played where much else goes on.
PATIENCE = 1 if REAL else 10


def environment() -> dict[str, str]:
    """Return the environment of everything that is run: our package, the libraries it brought, the stand-ins."""
    libraries = [str(PLACE / "lib"), os.environ.get("LD_LIBRARY_PATH", "")]
    changed = {**os.environ, "PYTHONUNBUFFERED": "1"}
    if not REAL:
        libraries.insert(0, str(STANDINS))
        changed["GPUGUARD_STANDIN_NVML_SCRIPT"] = str(NVML_SCRIPT)
    changed["LD_LIBRARY_PATH"] = ":".join(filter(None, libraries))
    return changed


def driver_library() -> str:
    """Return where the dynamic linker finds libcuda: images keep drivers where its cache does not look."""
    code = "import ctypes; ctypes.CDLL('libcuda.so.1'); print(open('/proc/self/maps').read())"
    maps = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False,
                          env=environment()).stdout
    return next((line.split()[-1] for line in maps.splitlines() if "libcuda.so" in line), "")


def prepare_standins() -> None:
    """Build the stand-in driver and programs, if there is no GPU and they are not there as their sources are now."""
    if REAL:
        return
    BUSY_PIDS.parent.mkdir(parents=True, exist_ok=True)
    BUSY_PIDS.write_text("")
    sources = [Path(__file__), *(one for one in (ROOT / "tests" / "standins").rglob("*.*") if one.suffix != ".pyc")]
    newest_s = max(one.stat().st_mtime for one in sources)
    if NVML_SCRIPT.exists() and NVML_SCRIPT.stat().st_mtime > newest_s:  # it is written last
        return
    sys.path.append(str(ROOT))
    from tests.standins import build as programs
    from tests.standins.libnvidia_ml import build as nvml

    programs.build(STANDINS)
    nvml.build(STANDINS)
    NVML_SCRIPT.write_text(SCRIPT)


#: What is asked of each board; a field that its driver does not know costs only itself.
FIELDS = ("name", "driver_version", "vbios_version", "power.limit", "clocks.max.sm", "clocks.max.mem",
          "clocks.applications.graphics", "persistence_mode", "mig.mode.current", "ecc.mode.current")


@functools.cache
def board() -> dict[str, str]:
    """Return what nvidia-smi says of the first device; where it says nothing, what NVML does."""
    listed = smi(f"--query-gpu={','.join(FIELDS)}", "--format=csv,noheader,nounits").strip().splitlines()
    values = [one.strip() for one in listed[0].split(",")] if listed else []
    if len(values) != len(FIELDS):  # a field that is unknown fails the whole question
        values = [smi(f"--query-gpu={field}", "--format=csv,noheader,nounits").strip().partition("\n")[0]
                  for field in FIELDS]
    return {**dict(zip(FIELDS, values, strict=True)), **(told_by_nvml() if not values[0] else {})}


def context() -> dict[str, object]:
    """Return what a reader must know of this machine to judge a figure."""
    said: dict[str, object] = {
        "date": time.strftime("%Y-%m-%d", time.gmtime()), "device": "stand-in", "kernel": platform.release(),
        "python": platform.python_version(), "processors": os.cpu_count(),
    }
    if REAL:
        values = dict(board())
        said |= {"device": values.pop("name") or "unknown", "gpu": values}
    return said


def end_in_order() -> None:
    """Let SIGTERM end this program as an error does: what it started is ended, what it measured is kept."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))


def last_line(output: str) -> dict[str, object]:
    """Return the JSON object in the last line of what a program printed; raises `ValueError` if there is none."""
    last = output.strip().rpartition("\n")[2]
    if not last.startswith("{"):
        raise ValueError(f"no JSON object in its last line: {last[:200]!r}")
    found: dict[str, object] = json.loads(last)
    return found


def write_line(path: Path, record: dict[str, object]) -> None:
    """Append one JSON line with its device, at once on disk: what was measured outlives whatever comes after."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as stream:
        stream.write(json.dumps({"device": context()["device"], **record}) + "\n")
        stream.flush()
        os.fsync(stream.fileno())


def read_lines(path: Path) -> list[dict[str, object]]:
    """Return what was written so far of this device; a line that was cut off is no line."""
    if not path.exists():
        return []
    found = []
    for line in path.read_text().splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return [line for line in found if line["device"] == context()["device"]]


if __name__ == "__main__":
    prepare_standins()
    print(json.dumps(context(), indent=2))
