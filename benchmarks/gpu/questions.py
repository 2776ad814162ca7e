"""What only a real GPU and its driver can answer, each question by itself: an answer, or a gap that says why not.

    questions.py [--only NAME]

Writes one JSON line a question to OUT/questions.jsonl and skips what is answered there already. Each question runs in a
process of its own with a time limit, so that one that hangs or dies costs no other.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from machine import (
    BUSY_PIDS,
    HERE,
    OUT,
    PATIENCE,
    PROGRAMS,
    REAL,
    STANDINS,
    WORK,
    context,
    driver_library,
    end_in_order,
    environment,
    last_line,
    prepare_standins,
    read_lines,
    write_line,
)
from workloads import search

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

ANSWERS = OUT / "questions.jsonl"
LIMIT_S = 75.0 * PATIENCE
#: Most are answered within this; none is begun with less left.
SHORT_S = 25.0
COUNTED = 500


class Unanswered(Exception):
    """This cannot be answered here; the message says why."""


def nvml() -> Any:
    """Return the binding, initialised, or say that there is no driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        raise Unanswered(f"NVML does not start: {error}") from error
    return pynvml


def started(command: Sequence[str], *arguments: str, stdin: int = subprocess.DEVNULL,
            **changed: str) -> subprocess.Popen[str]:
    """Start a workload whose last line of output is JSON."""
    program = subprocess.Popen([*command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=stdin,
                               text=True, env={**environment(), **changed})
    if not REAL:
        BUSY_PIDS.write_text(str(program.pid))
    return program


def said(program: subprocess.Popen[str], limit_s: float = 60.0) -> dict[str, Any]:
    """Return what a program said at its end."""
    try:
        output, complaint = program.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        program.kill()
        raise Unanswered(f"{program.args} did not end within {limit_s:g} s") from None
    if program.returncode:
        raise Unanswered(f"{program.args}: status {program.returncode}: {complaint.strip()[-400:]}")
    return last_line(output)


# -- the launch eye ---------------------------------------------------------------------------------------------------


class Direct:
    """The broker's half of the launch eye in this very process, without the broker."""

    def ask(self, request: Any) -> Any:
        """Answer a request at once."""
        from gpuguard.sensors import launches

        return launches.grant(request)


def watched(command: Sequence[str]) -> dict[str, Any]:
    """Run a program under the launch eye; return launches by kernel name, and what it said."""
    from gpuguard.config import Config, LaunchSettings
    from gpuguard.core.records import Gap, KernelName, Launches
    from gpuguard.sensors import EyeClosed, launches

    try:
        eye = launches.open_sensor(Direct(), Config(launches=LaunchSettings(libraries=(driver_library(),))))
    except EyeClosed as error:
        raise Unanswered(f"the launch eye is closed: {error}") from error
    names: dict[tuple[int, int], str] = {}
    counts: dict[tuple[int, int], int] = {}
    gaps: list[str] = []
    try:
        program = started(command)
        begun_s, ended_s = time.monotonic(), None
        while ended_s is None or time.monotonic() < ended_s + 1.5:
            if ended_s is None and program.poll() is not None:
                ended_s = time.monotonic()
            elif ended_s is None and time.monotonic() > begun_s + 40:
                program.kill()
            for block in eye.read(time.time_ns()):
                match block:
                    case KernelName():
                        names[block.process.pid, block.kernel] = block.name
                    case Launches():
                        for row in block.rows:
                            key = int(row["pid"]), int(row["kernel"])
                            counts[key] = counts.get(key, 0) + int(row["launches"])
                    case Gap():
                        gaps.append(block.reason)
            time.sleep(0.05)
        answer = said(program)
    finally:
        eye.close()
        launches.release()
    mine = {key: count for key, count in counts.items() if key[0] == program.pid}
    wanted = answer.get("name", "")
    return {
        "said": answer, "mode": eye.mode, "seen_in_all": sum(mine.values()),
        "named": sum(count for key, count in mine.items() if key in names),
        "of_that_name": sum(count for key, count in mine.items() if wanted and wanted in names.get(key, "")),
        "names": sorted({names[key][:80] for key in mine if key in names})[:40], "gaps": sorted(set(gaps)),
    }


def launch_eye() -> dict[str, Any]:
    """Can probes be placed on this driver, and on how many of its calls?"""
    from gpuguard.config import Config, LaunchSettings
    from gpuguard.sensors import EyeClosed, launches

    try:
        eye = launches.open_sensor(Direct(), Config(launches=LaunchSettings(libraries=(driver_library(),))))
    except EyeClosed as error:
        raise Unanswered(f"the launch eye is closed: {error}") from error
    mode = eye.mode
    eye.close()
    launches.release()
    return {"mode": mode, "library": driver_library()}


#: Each way to the GPU and the program that goes it; the stand-in has one.
WAYS = ("runtime", "cupy", "numba", "triton", "torch", "graph") if REAL else ("hasher",)


def launches_by(way: str) -> dict[str, Any]:
    """Does the uprobe fire on this driver, is every launch counted, are names right, for this way to the GPU?"""
    if way == "hasher":
        return watched([str(STANDINS / "hasher"), "--launches", str(COUNTED), "--interval-us", "2000"])
    if way == "runtime":
        return watched([str(PROGRAMS / "rate"), str(COUNTED)])
    return watched([sys.executable, str(HERE / "programs" / "counted.py"), way, str(COUNTED)])


#: An export of the driver up to its slot: see gpuguard/sensors/launches/libcuda.py.
STUB = re.compile(
    rb"(?:\x55|\x48\x89\xe5|\x41[\x54-\x57]|\x48\x83\xec.)*\x81\x3d....\x00\xba\x1c\x32(?:\x74.|\x0f\x84....)"
    rb"(?:\x50|\x55|\x48\x89\xe5|\x48\x83\xec.|\x8b\x45.|\xff\x75.)*\xff[\x15\x25](....)", re.DOTALL)


def stubs_after_start() -> dict[str, Any]:
    """Is a launch export still the stub that the probe expects once the driver has started?"""
    library = ctypes.CDLL(str(STANDINS / "libcuda.so.1") if not REAL else "libcuda.so.1")
    told: dict[str, Any] = {}

    def look() -> dict[str, str]:
        found = {}
        for name in ("cuLaunchKernel", "cuLaunchKernelEx", "cuLaunchCooperativeKernel", "cuGraphLaunch",
                     "cuModuleGetFunction", "cuLibraryGetKernel"):
            if hasattr(library, name):
                address = ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0
                code = ctypes.string_at(address, 80)
                found[name] = code[:48].hex()
                if stub := STUB.match(code):
                    slot = address + stub.end() + int.from_bytes(stub[1], "little", signed=True)
                    target = int.from_bytes(ctypes.string_at(slot, 8), "little")
                    found[name] += " -> " + region(target)
        return found

    told["before"] = look()
    told["cuInit"] = library.cuInit(0)
    told["after"] = look()
    told["unchanged"] = told["before"] == told["after"]
    return told


def region(address: int) -> str:
    """Return which mapping of this process holds an address, and where in it."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(one, 16) for one in line.split()[0].split("-"))
        if start <= address < end:
            return f"{Path(line.split()[-1]).name}+{address - start:#x}"
    return "nowhere"


def shim_seen() -> dict[str, Any]:
    """Does the cooperative shim load through CUDA_INJECTION64_PATH, and is its count exact?"""
    from gpuguard.core.records import Launches
    from gpuguard.sensors.launches import cooperative

    if not cooperative.LIBRARY.exists():
        raise Unanswered("this build has no shim")
    with tempfile.TemporaryDirectory() as folder:
        os.environ[cooperative.FOLDER_VARIABLE] = folder
        eye = cooperative.open_sensor(250_000_000, "asked for")
        if eye is None:
            raise Unanswered("the cooperative tier does not open")
        command = [str(PROGRAMS / "rate"), str(COUNTED)] if REAL else [str(STANDINS / "hasher"), "--launches",
                                                                     str(COUNTED)]
        program = started(command, CUDA_INJECTION64_PATH=str(cooperative.LIBRARY), GPUGUARD_CAPTURE_DIR=folder,
                          **({} if REAL else {"LD_PRELOAD": str(cooperative.LIBRARY)}))
        seen = 0
        until_s = time.monotonic() + 30
        while time.monotonic() < until_s:
            ended = program.poll() is not None
            seen += sum(int(block.rows["launches"].sum()) for block in eye.read(time.time_ns())
                        if isinstance(block, Launches))
            if ended:
                break
            time.sleep(0.02)
        eye.close()
        return {"said": said(program), "seen": seen}


def opencl() -> dict[str, Any]:
    """Is there an OpenCL driver, and does it stand on libcuda?"""
    program = shutil.which("ldconfig", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if program is None:
        raise Unanswered("no ldconfig here, which says what libraries there are")
    listed = subprocess.run([program, "-p"], capture_output=True, text=True, check=False).stdout
    found = re.findall(r"(\S*(?:OpenCL|nvidia-opencl)\S*) .*=> (\S+)", listed)
    if not found:
        raise Unanswered("no OpenCL loader or driver here")
    return {"libraries": found}


# -- counters ---------------------------------------------------------------------------------------------------------

#: What a sensor may read of a device, without changing anything.
READINGS = (
    "nvmlDeviceGetUtilizationRates", "nvmlDeviceGetMemoryInfo", "nvmlDeviceGetPowerUsage",
    "nvmlDeviceGetTotalEnergyConsumption", "nvmlDeviceGetEnforcedPowerLimit", "nvmlDeviceGetCurrentClocksEventReasons",
    "nvmlDeviceGetComputeRunningProcesses", "nvmlDeviceGetMigMode",
    "nvmlDeviceGetAccountingMode", "nvmlDeviceGetEncoderUtilization", "nvmlDeviceGetPersistenceMode",
    "nvmlDeviceGetVirtualizationMode", "nvmlDeviceGetPerformanceState",
)


def cost_of(call: Callable[[], object], times: int = 60) -> dict[str, Any]:
    """Return how long a call takes in microseconds, or why it fails."""
    took: list[float] = []
    for _ in range(times):
        begun = time.perf_counter()
        try:
            call()
        except Exception as error:  # noqa: BLE001 the driver's refusal is the answer
            return {"error": str(error)}
        took.append((time.perf_counter() - begun) * 1e6)
        if sum(took) > 2e6:
            break
    return {"median_us": round(statistics.median(took), 1), "worst_us": round(max(took), 1), "calls": len(took)}


def readings() -> dict[str, Any]:
    """Which NVML readings does this board give, and what does each cost?"""
    binding = nvml()
    device = binding.nvmlDeviceGetHandleByIndex(0)
    told = {name: cost_of(lambda name=name: getattr(binding, name)(device)) for name in READINGS}
    told["nvmlDeviceGetRunningProcessDetailList"] = cost_of(
        lambda: binding.nvmlDeviceGetRunningProcessDetailList(device, binding.nvmlProcessDetailList_v1, 0))
    told["nvmlDeviceGetTemperature"] = cost_of(lambda: binding.nvmlDeviceGetTemperature(device, 0))
    told["nvmlDeviceGetClockInfo"] = cost_of(lambda: binding.nvmlDeviceGetClockInfo(device, 1))
    told["nvmlDeviceGetPcieThroughput"] = cost_of(lambda: binding.nvmlDeviceGetPcieThroughput(device, 0), 10)
    told["nvmlDeviceGetProcessUtilization"] = cost_of(lambda: binding.nvmlDeviceGetProcessUtilization(device, 0))
    fields = [getattr(binding, name) for name in (
        "NVML_FI_DEV_POWER_AVERAGE", "NVML_FI_DEV_POWER_INSTANT", "NVML_FI_DEV_TOTAL_ENERGY_CONSUMPTION",
        "NVML_FI_DEV_PCIE_COUNT_TX_BYTES", "NVML_FI_DEV_PCIE_COUNT_RX_BYTES") if hasattr(binding, name)]
    told["nvmlDeviceGetFieldValues"] = cost_of(lambda: binding.nvmlDeviceGetFieldValues(device, fields))
    try:
        told["field_returns"] = {one.fieldId: one.nvmlReturn
                                 for one in binding.nvmlDeviceGetFieldValues(device, list(range(1, 280)))}
    except binding.NVMLError as error:
        told["field_returns"] = {"error": str(error)}
    return told


#: The performance metrics that the guard looks at; ids above 332 are unknown to older headers.
GPM_IDS = (*range(1, 14), 20, 21, 60, 61, *range(160, 210), *range(248, 261))


def gpm_sample(binding: Any, device: Any, seconds: float) -> dict[int, float | str]:
    """Return the value of every metric over so long, or the words in which it was refused."""
    first, second = binding.nvmlGpmSampleAlloc(), binding.nvmlGpmSampleAlloc()
    try:
        binding.nvmlGpmSampleGet(device, first)
        time.sleep(seconds)
        binding.nvmlGpmSampleGet(device, second)
        values: dict[int, float | str] = {}
        for metric in GPM_IDS:
            asked = binding.c_nvmlGpmMetricsGet_t()
            asked.version = binding.NVML_GPM_METRICS_GET_VERSION
            asked.numMetrics, asked.sample1, asked.sample2 = 1, first, second
            asked.metrics[0].metricId = metric
            try:
                binding.nvmlGpmMetricsGet(asked)
                if asked.metrics[0].nvmlReturn != binding.NVML_SUCCESS:
                    raise binding.NVMLError(asked.metrics[0].nvmlReturn)
                values[metric] = round(asked.metrics[0].value, 4)
            except binding.NVMLError as error:
                values[metric] = str(error)
        return values
    finally:
        binding.nvmlGpmSampleFree(first)
        binding.nvmlGpmSampleFree(second)


def gpm_here() -> dict[str, Any]:
    """Which GPM metrics are to be had by this user, and what does a sample cost?"""
    binding = nvml()
    device = binding.nvmlDeviceGetHandleByIndex(0)
    try:
        if not binding.nvmlGpmQueryDeviceSupport(device).isSupportedDevice:
            raise Unanswered("this board has no GPM")
        values = gpm_sample(binding, device, 0.3)
    except binding.NVMLError as error:
        raise Unanswered(f"GPM: {error}") from error
    sample = binding.nvmlGpmSampleAlloc()
    cost = cost_of(lambda: binding.nvmlGpmSampleGet(device, sample))
    binding.nvmlGpmSampleFree(sample)
    return {"uid": os.geteuid(), "values": values, "sample": cost}


def gpm_without_root() -> dict[str, Any]:
    """Are GPM reads for root only?"""
    import ctypes.util  # noqa: F401 pynvml needs it, and this user may be unable to read it

    import pynvml  # noqa: F401 the same

    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
    return gpm_here()


#: One type of product after the other, each until its line is answered; what cannot be done says why.
PRODUCTS = """
import sys, threading, torch
n = 8192
one = torch.ones((), device="cuda")
def real(dtype):
    a = torch.rand(n, n, device="cuda").to(dtype)
    return lambda: a @ a
def int8():
    a = torch.randint(-9, 9, (n, n), dtype=torch.int8, device="cuda")
    return lambda: torch._int_mm(a, a.t())
def fp8():
    a = torch.rand(n, n, device="cuda").to(torch.float8_e4m3fn)
    return lambda: torch._scaled_mm(a, a.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)
def fp32(tf32):
    torch.backends.cuda.matmul.allow_tf32 = tf32
    return real(torch.float32)
kinds = {"bf16": lambda: real(torch.bfloat16), "fp16": lambda: real(torch.float16), "int8": int8, "fp8": fp8,
         "tf32": lambda: fp32(True), "fp32": lambda: fp32(False), "fp64": lambda: real(torch.float64)}
for kind, made in kinds.items():
    try:
        product = made()
        for _ in range(20):
            product()
        torch.cuda.synchronize()
    except Exception as error:
        print(kind, repr(error)[:300].replace(chr(10), " "), flush=True)
        sys.stdin.readline()
        continue
    print(kind, flush=True)
    answered = threading.Thread(target=sys.stdin.readline)
    answered.start()
    while answered.is_alive():
        product()
        torch.cuda.synchronize()
"""


def tensor_types() -> dict[str, Any]:
    """Which tensor counters rise with which type of matrix product?"""
    if not REAL:
        raise Unanswered("the stand-in multiplies nothing")
    binding = nvml()
    device = binding.nvmlDeviceGetHandleByIndex(0)
    told: dict[str, Any] = {}
    program = started([sys.executable, "-c", PRODUCTS], stdin=subprocess.PIPE)
    assert program.stdout is not None
    assert program.stdin is not None
    try:
        for line in program.stdout:
            kind, _, refused = line.strip().partition(" ")
            told[kind] = {"gap": refused} if refused else gpm_sample(binding, device, 1.0)
            program.stdin.write("next\n")
            program.stdin.flush()
    finally:
        program.kill()
        _, complaint = program.communicate()
    if not told:
        raise Unanswered(f"no product was made: {complaint.strip()[-400:]}")
    return told


def wait_busy(binding: Any, device: Any, limit_s: float = 25.0) -> None:
    """Return once the GPU works, a second after."""
    until_s = time.monotonic() + limit_s
    while time.monotonic() < until_s and binding.nvmlDeviceGetUtilizationRates(device).gpu < 20:
        time.sleep(0.1)
    time.sleep(1.0)


def context_switches() -> dict[str, Any]:
    """Do the context-switch counters rise with a second tenant?"""
    binding = nvml()
    device = binding.nvmlDeviceGetHandleByIndex(0)
    told: dict[str, Any] = {}
    programs: list[subprocess.Popen[str]] = []
    try:
        told["idle"] = switches(binding, device)
        for count in (1, 2):
            programs.append(started(search("keccak"), "--seconds", "12"))
            wait_busy(binding, device, 8.0)
            told[f"{count} tenants"] = switches(binding, device)
    except binding.NVMLError as error:
        raise Unanswered(f"GPM: {error}") from error
    finally:
        for program in programs:
            program.kill()
            program.wait()
    return told


def switches(binding: Any, device: Any) -> dict[int, float | str]:
    """Return the metrics of the graphics engine's context switches over a second."""
    return {metric: value for metric, value in gpm_sample(binding, device, 1.0).items() if 170 <= metric < 210}


def power_sensing() -> dict[str, Any]:
    """How do average, instant and energy readings show work that comes and goes every second?"""
    binding = nvml()
    device = binding.nvmlDeviceGetHandleByIndex(0)
    program = started(search("keccak", "--on-s", "1", "--off-s", "1"), "--seconds", "10")
    fields = [binding.NVML_FI_DEV_POWER_AVERAGE, binding.NVML_FI_DEV_POWER_INSTANT,
              binding.NVML_FI_DEV_TOTAL_ENERGY_CONSUMPTION]
    rows: list[list[float | None]] = []
    begun = time.monotonic()
    while program.poll() is None and time.monotonic() < begun + 15:
        row: list[float | None] = [round(time.monotonic() - begun, 3)]
        for one in binding.nvmlDeviceGetFieldValues(device, fields):
            kinds = {0: "dVal", 1: "uiVal", 2: "ulVal", 3: "ullVal", 4: "sllVal"}
            value = getattr(one.value, kinds.get(one.valueType, "ullVal"))
            row.append(None if one.nvmlReturn else value)
        row.append(binding.nvmlDeviceGetUtilizationRates(device).gpu)
        rows.append(row)
        time.sleep(0.05)
    said(program)
    return {"columns": ["time_s", "average_mw", "instant_mw", "energy_mj", "gpu_percent"], "rows": rows}


def sampling_cost() -> dict[str, Any]:
    """What share of a core does the whole agent take at 1 and at 10 Hz, with the GPU at work?"""
    from agent import agent, cpu_s

    told: dict[str, Any] = {}
    program = started(search("keccak"), "--seconds", "60")
    try:
        for rate_hz in (1.0, 10.0):
            with agent(WORK / f"cost-{rate_hz:g}-{time.time_ns()}", rate_hz=rate_hz) as daemon:
                time.sleep(3)
                before, begun = cpu_s(daemon.pid), time.monotonic()
                time.sleep(15)
                told[f"{rate_hz:g} Hz"] = round((cpu_s(daemon.pid) - before) / (time.monotonic() - begun), 5)
    finally:
        program.kill()
        program.wait()
    return told


# -- acting -----------------------------------------------------------------------------------------------------------

QUEUED = """
import sys, time, torch
a = torch.rand(8192, 8192, device="cuda")
a @ a
torch.cuda.synchronize()
begun = time.perf_counter()
a @ a
torch.cuda.synchronize()
for _ in range(int(float(sys.argv[1]) / (time.perf_counter() - begun))):
    torch.mm(a, a)
print("queued", flush=True)
torch.cuda.synchronize()
"""


def utilisation(binding: Any, device: Any, seconds: float) -> list[list[float]]:
    """Return (time, GPU percent, power) ten times a second."""
    rows, begun = [], time.monotonic()
    while time.monotonic() - begun < seconds:
        rows.append([round(time.monotonic() - begun, 2), binding.nvmlDeviceGetUtilizationRates(device).gpu,
                     round(binding.nvmlDeviceGetPowerUsage(device) / 1e3, 1)])
        time.sleep(0.1)
    return rows


def stopped_with_work_queued() -> dict[str, Any]:
    """Does the GPU go on with queued work after SIGSTOP, and for how long?"""
    if not REAL:
        raise Unanswered("the stand-in queues nothing")
    return with_queue(signal.SIGSTOP)


def killed_mid_kernel() -> dict[str, Any]:
    """Does utilisation come back to 0 after a process was killed while its kernels ran?"""
    if not REAL:
        raise Unanswered("the stand-in runs no kernel")
    return with_queue(signal.SIGKILL)


def with_queue(number: signal.Signals) -> dict[str, Any]:
    """Queue five seconds of work, send the signal, and watch the GPU for eight."""
    binding = nvml()
    device = binding.nvmlDeviceGetHandleByIndex(0)
    program = started([sys.executable, "-c", QUEUED, "5"])
    try:
        assert program.stdout is not None
        if program.stdout.readline() != "queued\n":
            raise Unanswered(f"nothing was queued: {program.communicate()[1].strip()[-400:]}")
        time.sleep(0.5)
        program.send_signal(number)
        return {"signal": number.name, "columns": ["time_s", "gpu_percent", "power_w"],
                "rows": utilisation(binding, device, 8.0)}
    finally:
        program.kill()
        program.wait()


def doctor() -> dict[str, Any]:
    """Which eyes does this host open?"""
    told = subprocess.run([sys.executable, "-m", "gpuguard", "doctor", "-o", "json"], capture_output=True, text=True,
                          check=False, env=environment(), cwd="/", timeout=60)
    if not told.stdout.strip():
        raise Unanswered(told.stderr[-400:])
    return {"checks": json.loads(told.stdout.strip().splitlines()[0])["checks"]}


def driver_settings() -> dict[str, Any]:
    """Does the driver keep its counters for administrators?"""
    path = Path("/proc/driver/nvidia/params")
    if not path.exists():
        raise Unanswered(f"{path} is not here")
    return {"params": [line for line in path.read_text().splitlines() if "Profiling" in line or "Admin" in line]}


#: What is worth most to know comes first.
QUESTIONS: dict[str, Callable[[], dict[str, Any]]] = {
    "launch_eye": launch_eye,
    **{f"launches_{way}": functools.partial(launches_by, way) for way in WAYS},
    **{one.__name__: one for one in (
        gpm_here, gpm_without_root, readings, doctor, tensor_types, context_switches, sampling_cost,
        stopped_with_work_queued, killed_mid_kernel, stubs_after_start, shim_seen, power_sensing, driver_settings,
        opencl)},
}


def text_of(name: str) -> str:
    """Return the question in words."""
    question = QUESTIONS[name]
    return ((question.func if isinstance(question, functools.partial) else question).__doc__ or "").strip()


def ask(name: str, limit_s: float) -> dict[str, Any]:
    """Ask one question in a process of its own; return its line."""
    line: dict[str, Any] = {"question": name, "text": text_of(name), **context()}
    # In a session of its own: what a question started ends with it, also where it hangs.
    asked = subprocess.Popen([sys.executable, __file__, "--answer", name], stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, text=True, env=environment(), start_new_session=True)
    try:
        told, complaint = asked.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        return line | {"gap": f"no answer within {limit_s:.0f} s"}
    finally:
        if asked.poll() is None:
            os.killpg(asked.pid, signal.SIGKILL)
            asked.communicate()
    try:
        return line | json.loads(told.strip().splitlines()[-1])
    except (ValueError, IndexError):
        return line | {"gap": f"status {asked.returncode}: {complaint.strip()[-600:]}"}


def answer(name: str) -> dict[str, Any]:
    """Answer one question here, or say why not."""
    try:
        return {"answer": QUESTIONS[name]()}
    except Unanswered as error:
        return {"gap": str(error)}
    except Exception as error:  # noqa: BLE001 a question that fails is a gap of that question, not the end of all
        return {"gap": f"{type(error).__name__}: {error}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=QUESTIONS)
    parser.add_argument("--answer", choices=QUESTIONS, help=argparse.SUPPRESS)
    parser.add_argument("--budget-s", type=float, default=450.0)
    arguments = parser.parse_args()
    if arguments.answer:
        print(json.dumps(answer(arguments.answer)))
        return
    end_in_order()
    prepare_standins()
    until_s = time.monotonic() + arguments.budget_s
    before = read_lines(ANSWERS)
    done = {one["question"] for one in before if "answer" in one}
    asked = {one["question"] for one in before}
    for name in sorted(QUESTIONS, key=asked.__contains__):  # what was a gap is asked again, but last
        if name in done or (arguments.only and name != arguments.only):
            continue
        begun_s = time.monotonic()
        if begun_s + SHORT_S > until_s:
            print(f"{name}: left for the next call", flush=True)
            continue
        line = ask(name, min(LIMIT_S, until_s - begun_s))
        write_line(ANSWERS, line | {"took_s": round(time.monotonic() - begun_s, 1)})
        print(f"{name}: {'gap: ' + line['gap'] if 'gap' in line else 'answered'}", flush=True)


if __name__ == "__main__":
    main()
