"""OpenCL and Vulkan, whose drivers do not launch through libcuda: counted at their loaders, with PoCL and lavapipe."""

from __future__ import annotations

import shutil
import subprocess
import time
from pathlib import Path

import msgspec
import numpy as np
import pytest

from gpuguard.config import Config
from gpuguard.core.guard import Guard
from gpuguard.core.records import LAUNCH, LAUNCH_APIS, Gap, KernelName, Launches, Tick
from gpuguard.sensors import EyeClosed, launches
from gpuguard.signature_files import shipped

PROGRAMS = Path(__file__).parent / "programs"
SECOND = 1_000_000_000


class Direct:
    """A broker without a process of its own."""

    def ask(self, request):
        return launches.grant(request)


@pytest.fixture
def eye():
    try:
        sensor = launches.open_sensor(Direct(), msgspec.convert({}, Config))
    except (EyeClosed, OSError) as error:
        pytest.skip(f"the launch eye is closed: {error}")
    yield sensor
    sensor.close()
    launches.release()


def built(folder, name, library):
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    target = folder / name
    told = subprocess.run([compiler, "-O1", "-Wall", "-o", str(target), str(PROGRAMS / f"{name}.c"), f"-l{library}"],
                          capture_output=True, text=True)
    if told.returncode:
        pytest.skip(f"no headers of {library} here")
    return target


def watch(eye, *command):
    """Let a program start, be noticed, and do its work; return what it said, its pid, and the blocks."""
    program = subprocess.Popen([str(one) for one in command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    pid = int(program.stdout.readline())
    blocks = eye.read(time.time_ns())
    output, _ = program.communicate("\n", timeout=30)
    if program.returncode == 3:
        pytest.skip("no device for it here")
    assert program.returncode == 0
    for _ in range(4):
        blocks += eye.read(time.time_ns())
        time.sleep(0.15)
    return output.split(), pid, blocks


def rows_of(blocks, pid):
    rows = [block.rows[block.rows["pid"] == pid] for block in blocks if isinstance(block, Launches)]
    return np.concatenate(rows) if rows else np.zeros(0, LAUNCH)


def test_opencl_launches_are_counted_with_name_and_geometry(eye, tmp_path):
    said, pid, blocks = watch(eye, built(tmp_path, "opencl", "OpenCL"), 37, 1024, 64)
    rows = rows_of(blocks, pid)
    assert rows["launches"].sum() == int(said[0]) == 37
    assert {LAUNCH_APIS[api] for api in rows["api"]} == {"clEnqueueNDRangeKernel"}
    assert rows["grid"].tolist() == [[16, 1, 1]]
    assert rows["block"].tolist() == [[64, 1, 0]]
    names = {block.kernel: block.name for block in blocks if isinstance(block, KernelName) and block.process.pid == pid}
    assert {names[int(kernel)] for kernel in rows["kernel"]} == {"search_nonce"} == set(names.values())


def test_a_local_size_left_to_the_driver_is_not_made_up(eye, tmp_path):
    _, pid, blocks = watch(eye, built(tmp_path, "opencl", "OpenCL"), 3, 96)
    rows = rows_of(blocks, pid)
    assert rows["grid"].tolist() == [[96, 1, 1]]
    assert rows["block"].tolist() == [[0, 0, 0]]


def test_vulkan_submissions_are_counted(eye, tmp_path):
    said, pid, blocks = watch(eye, built(tmp_path, "vulkan", "vulkan"), 21)
    rows = rows_of(blocks, pid)
    assert rows["launches"].sum() == int(said[0]) == 42
    assert {LAUNCH_APIS[api] for api in rows["api"]} == {"vkQueueSubmit"}
    assert not [block for block in blocks if isinstance(block, Gap) and block.process and block.process.pid == pid]


def test_that_a_program_can_submit_past_the_loader_is_a_gap_of_it(eye, tmp_path):
    _, pid, blocks = watch(eye, built(tmp_path, "vulkan", "vulkan"), 21, "pointer")
    assert not len(rows_of(blocks, pid))
    gaps = [block.reason for block in blocks if isinstance(block, Gap) and block.process and block.process.pid == pid]
    assert gaps == ["Vulkan work that it submits through pointers of the driver's own is not counted"]


def blocks_of(api, seconds, per_s, kernel=7):
    for second in range(seconds):
        row = np.zeros(1, LAUNCH)
        start_ns = second * SECOND
        row["first_ns"], row["last_ns"], row["launches"] = start_ns, start_ns + SECOND - SECOND // per_s, per_s
        row["pid"], row["start_ticks"], row["kernel"] = 42, 4200, kernel
        row["api"] = LAUNCH_APIS.index(api)
        row["grid"], row["block"] = (4096, 1, 1), (128, 1, 1)
        row["gaps_log2"][0, 23] = per_s - 1
        yield Launches(start_ns + SECOND, row)
        yield Tick(start_ns + SECOND)


def test_a_renderer_at_a_steady_frame_rate_is_nobody_who_mines():
    """One queue, one beat: by its submissions a game would be the steadiest miner of all."""
    nats = {}
    for api in ("vkQueueSubmit", "cuLaunchKernel"):
        guard = Guard(signatures=shipped())
        for block in blocks_of(api, 60, 60):
            guard.receive(block)
        nats[api] = [one.probability for one in guard.processes()]
    assert nats["vkQueueSubmit"] == []
    assert nats["cuLaunchKernel"] != []
