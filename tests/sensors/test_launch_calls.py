"""Calls beside plain launches: graphs, old launch calls, code from files and linkers; and where a driver may hide."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from collections import Counter

import msgspec
import pytest

from gpuguard.core.records import LAUNCH_APIS, Gap, KernelName, ModuleImage
from gpuguard.core.subjects import ProcessId
from gpuguard.messages import Opened, ReadImage, Refused, ScanLaunches
from gpuguard.sensors import launches
from gpuguard.sensors.launches.maps import start_ticks_of
from tests.sensors.test_launches import (  # noqa: F401  fixtures are used by name
    Direct,
    cubin_header,
    eye,
    find,
    let_run,
    read_all,
    read_steps,
    records_of,
    rows_of,
    run,
    settings,
    standins,
    wait,
)

#: A program of the driver API in Python: the arguments are the library and the body to run with it.
PROGRAM = """
import ctypes, json, mmap, os, struct, sys, time
cuda = ctypes.CDLL(sys.argv[1])
pointer, u32, u64 = ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint64
made = []
def call(name, *arguments):
    assert getattr(cuda, name)(*arguments) == 0, name
def out(name, *arguments):
    handle = pointer()
    call(name, ctypes.byref(handle), *arguments)
    return handle
def kernel(module, name=b"work"):
    return out("cuModuleGetFunction", module, name)
def launch(function, name="cuLaunchKernel"):
    made.append(name)
    call(name, function, *map(u32, (3, 2, 1, 32, 1, 1, 64)), None, None, None)
image = bytes.fromhex(sys.argv[3])
held = ctypes.create_string_buffer(image, len(image))
def wait():
    print("waits", flush=True)
    sys.stdin.readline()
call("cuInit", 0)
exec(sys.argv[2])
wait()
print(json.dumps({"launches": made}))
"""
IMAGE = cubin_header(sections_at=64, section_count=2) + bytes(range(128))
DIGEST = hashlib.sha256(IMAGE).hexdigest()


def program(standins, body, *, cwd=None, before=()):  # noqa: F811  the fixture's value
    command = [*before, sys.executable, "-c", PROGRAM, str(standins["libcuda"]), body, IMAGE.hex()]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=cwd)


def read_whole(sensor, process, steps=1):
    """Read what a program of so many steps does; return the blocks and what it said."""
    blocks = read_steps(sensor, process, steps)
    more, said = read_all(sensor, [process])
    return blocks + more, said


def names_of(blocks, process):
    return {one.kernel: one.name for one in records_of(KernelName, blocks, process)}


def test_graphs_are_named_by_the_kernels_that_they_replay(eye, standins):  # noqa: F811
    process = program(standins, """
module = out("cuModuleLoadData", held)
one = kernel(module)
graph = out("cuGraphCreate", 0)
for _ in range(3):
    out("cuGraphAddKernelNode_v2", graph, None, u64(0), None)
stream = out("cuStreamCreate", 0)
call("cuStreamBeginCapture_v2", stream, 0)
for _ in range(5):
    launch(one)
captured = pointer()
call("cuStreamEndCapture", stream, ctypes.byref(captured))
out("cuGraphAddChildGraphNode", graph, None, u64(0), captured)
clone = out("cuGraphClone", graph)
for built, times in ((captured, 4), (clone, 2)):
    ready = out("cuGraphInstantiateWithFlags", built, u64(0))
    for _ in range(times):
        made.append("cuGraphLaunch")
        call("cuGraphLaunch", ready, stream)
launch(one)
""")
    blocks, said = read_whole(eye, process)
    rows, names = rows_of(blocks, process), names_of(blocks, process)
    assert rows["launches"].sum() == len(said[process.pid]["launches"])
    graph = rows[rows["api"] == LAUNCH_APIS.index("cuGraphLaunch")]
    by_name = Counter({names[int(row["kernel"])]: int(row["launches"]) for row in graph})
    assert by_name == {"graph of 5 kernels": 4, "graph of 8 kernels": 2}


def test_a_graph_at_the_place_of_one_that_was_destroyed_counts_from_nothing(eye, standins):  # noqa: F811
    process = program(standins, """
one = kernel(out("cuModuleLoadData", held))
stream = out("cuStreamCreate", 0)
places = set()
for _ in range(4):
    graph = out("cuGraphCreate", 0)
    places.add(graph.value)
    out("cuGraphAddKernelNode_v2", graph, None, u64(0), None)
    ready = out("cuGraphInstantiateWithFlags", graph, u64(0))
    call("cuGraphLaunch", ready, stream)
    call("cuGraphDestroy", graph)
assert len(places) < 4
graph = out("cuGraphCreate", 0)
out("cuGraphAddKernelNode_v2", graph, None, u64(0), None)
call("cuStreamBeginCapture_v2", stream, 0)
launch(one)
call("cuStreamBeginCaptureToGraph", stream, graph, None, None, u64(0), 0)
launch(one)
launch(one)
ended = pointer()
call("cuStreamEndCapture", stream, ctypes.byref(ended))
assert ended.value == graph.value
call("cuGraphLaunch", out("cuGraphInstantiateWithFlags", graph, u64(0)), stream)
""")
    blocks, _ = read_whole(eye, process)
    said = Counter(one.name for one in records_of(KernelName, blocks, process) if one.name.startswith("graph"))
    # The capture that was begun anew was not ended: what it held is nobody's.
    assert said == {"graph of 1 kernels": 4, "graph of 3 kernels": 1}


def test_a_kernel_of_an_unloaded_module_keeps_no_name(eye, standins):  # noqa: F811
    process = program(standins, """
module = out("cuModuleLoadData", held)
one, other = kernel(module, b"gemm"), kernel(out("cuModuleLoadData", held), b"other")
launch(one)
wait()
call("cuModuleUnload", module)
for _ in range(3):
    launch(one)
    launch(other)
name = ctypes.c_char_p()
call("cuFuncGetName", ctypes.byref(name), other)
wait()
call("cuKernelGetName", ctypes.byref(name), one)
launch(one)
""")
    blocks, _ = read_whole(eye, process, 3)
    named = [(one.kernel, one.name) for one in records_of(KernelName, blocks, process)]
    handle = next(kernel for kernel, name in named if name == "gemm")
    assert [name for kernel, name in named if kernel == handle][-2:] == ["", "gemm"]
    assert "" not in [name for kernel, name in named if kernel != handle]


def test_code_that_was_changed_before_it_was_read_is_not_taken_for_what_was_loaded(eye, standins):  # noqa: F811
    other = cubin_header(sections_at=128, section_count=1) + bytes(200)
    process = program(standins, f"""
module = out("cuModuleLoadData", held)
ctypes.memmove(held, bytes.fromhex({other[:len(IMAGE)].hex()!r}), {len(IMAGE)})
launch(kernel(module))
""")
    blocks, _ = read_whole(eye, process)
    assert records_of(ModuleImage, blocks, process) == []
    assert "GPU code not read: other code lies in its place by now" in [
        one.reason for one in records_of(Gap, blocks, process)]


def test_old_and_rare_launch_calls_are_counted(eye, standins):  # noqa: F811
    process = program(standins, """
one = kernel(out("cuModuleLoadData", held))
for _ in range(3):
    call("cuLaunch", one)
for _ in range(2):
    call("cuLaunchGrid", one, 7, 5)
    call("cuLaunchGridAsync", one, 7, 5, None)
parameters = struct.pack("<Q7I", one.value, 4, 1, 1, 64, 1, 1, 128).ljust(56, bytes(1)) * 3
call("cuLaunchCooperativeKernelMultiDevice", ctypes.create_string_buffer(parameters), 3, 0)
launch(one, "cuLaunchCooperativeKernel")
launch(one, "cuLaunchKernel_ptsz")
""")
    blocks, _ = read_whole(eye, process)
    found = {LAUNCH_APIS[one["api"]]: (int(one["launches"]), one["grid"].tolist(), int(one["shared_bytes"]))
             for one in rows_of(blocks, process)}
    assert found == {
        "cuLaunch": (3, [0, 0, 0], 0), "cuLaunchGrid": (2, [7, 5, 1], 0), "cuLaunchGridAsync": (2, [7, 5, 1], 0),
        "cuLaunchCooperativeKernelMultiDevice": (3, [4, 1, 1], 128), "cuLaunchCooperativeKernel": (1, [3, 2, 1], 64),
        "cuLaunchKernel": (1, [3, 2, 1], 64)}
    assert set(names_of(blocks, process).values()) == {"work"}


@pytest.mark.parametrize("how", ["cuModuleLoad", "cuLibraryLoadFromFile", "relative"])
def test_code_from_a_file_is_read_through_the_process(eye, standins, tmp_path, how):  # noqa: F811
    file = tmp_path / "work.cubin"
    file.write_bytes(IMAGE)
    name = "cuModuleLoad" if how == "relative" else how
    path = "work.cubin" if how == "relative" else str(file)
    process = program(standins, f"""
open({path!r}).close()
module = out({name!r}, {path.encode()!r})
launch(kernel(module))
""", cwd=tmp_path)
    blocks, _ = read_whole(eye, process)
    assert [(one.sha256, one.size_bytes, one.kind) for one in records_of(ModuleImage, blocks, process)] == [
        (DIGEST, len(IMAGE), "cubin")]
    assert [one.code_sha256 for one in records_of(KernelName, blocks, process)][-1] == DIGEST


def test_linked_code_is_read_and_its_kernels_are_named_after_it(eye, standins):  # noqa: F811
    process = program(standins, """
state = ctypes.create_string_buffer(struct.pack("<Q", len(image)) + image, len(image) + 8)
linked, size = pointer(), u64()
call("cuLinkComplete", state, ctypes.byref(linked), ctypes.byref(size))
launch(kernel(out("cuModuleLoadData", linked)))
""")
    blocks, _ = read_whole(eye, process)
    assert {one.sha256 for one in records_of(ModuleImage, blocks, process)} == {DIGEST}
    assert [one.code_sha256 for one in records_of(KernelName, blocks, process)][-1] == DIGEST


def own():
    return ProcessId("b", os.getpid(), start_ticks_of(os.getpid()))


@pytest.mark.parametrize(("content", "why"), [
    (b"root:x:0:0:root:/root:/bin/bash\n", "no GPU code"), (b"// a program in C\nint main;\n", "no GPU code"),
    (cubin_header(machine=62), "no GPU code"), (b"", "no GPU code"),
])
def test_a_file_that_is_no_gpu_code_is_not_handed_out(tmp_path, content, why):
    pytest.importorskip("gpuguard._launches")
    path = tmp_path / "file"
    path.write_bytes(content)
    answer, descriptors = launches.grant(ReadImage(own(), 0, bytes(path)))
    assert isinstance(answer, Refused)
    assert why in answer.reason
    assert descriptors == []


def test_a_path_that_is_no_text_is_read_and_refused_like_any_other(tmp_path):
    pytest.importorskip("gpuguard._launches")
    path = bytes(tmp_path) + b"/\xff\x1b"
    refused, _ = launches.grant(ReadImage(own(), 0, path))
    assert isinstance(refused, Refused)
    assert "\x1b" not in refused.reason
    msgspec.msgpack.encode(refused)
    with open(path, "wb") as file:
        file.write(b"//\n.version 8.0\n.target sm_90\n.entry work() { ret; }\n")
    answer, (fd,) = launches.grant(ReadImage(own(), 0, path))
    os.close(fd)
    assert isinstance(answer, Opened)


def test_a_path_that_nobody_can_follow_is_refused(tmp_path):
    pytest.importorskip("gpuguard._launches")
    os.mkfifo(tmp_path / "pipe")
    for path in ("/proc/self/mem", "/nowhere/at/all", str(tmp_path), str(tmp_path / "pipe"), "a" * 5000):
        answer, descriptors = launches.grant(ReadImage(own(), 0, path.encode()))
        assert isinstance(answer, Refused), path
        assert descriptors == []


def test_ptx_ends_where_the_file_does(tmp_path):
    pytest.importorskip("gpuguard._launches")
    path = tmp_path / "work.ptx"
    path.write_bytes(b"//\n.version 8.0\n.target sm_90\n.entry work() { ret; }\n")
    answer, (fd,) = launches.grant(ReadImage(own(), 0, bytes(path)))
    try:
        assert isinstance(answer, Opened)
        assert (answer.mode, os.pread(fd, 4096, 0)) == ("ptx", path.read_bytes())
    finally:
        os.close(fd)


# -- where a driver may hide ------------------------------------------------------------------------------------------

WORK = """
one = kernel(out("cuModuleLoadData", held))
for _ in range(30):
    launch(one)
"""
MEMFD = """
import os, sys, time
fd = os.memfd_create("x")
os.write(fd, open(sys.argv[1], "rb").read())
sys.argv[1] = f"/proc/self/fd/{fd}"
source = sys.argv.pop(1 + 3)
exec(source.replace('call("cuInit", 0)', 'wait(); call("cuInit", 0)'))
"""


def found_by_looking(process):
    """Return what is seen of a program that waits until its driver was found."""
    sensor = launches.open_sensor(Direct(), settings())
    try:
        wait(process)
        find(sensor, process)
        let_run(process)
        return read_all(sensor, [process])[0]
    finally:
        launches.release()
        sensor.close()


def test_a_driver_that_is_no_file_at_all_is_found(standins):  # noqa: F811
    process = subprocess.Popen(
        [sys.executable, "-c", MEMFD, str(standins["libcuda"]), WORK, IMAGE.hex(), PROGRAM], stdin=subprocess.PIPE,
        stdout=subprocess.PIPE)
    blocks = found_by_looking(process)
    assert rows_of(blocks, process)["launches"].sum() == 30
    assert set(names_of(blocks, process).values()) == {"work"}


def test_a_driver_in_a_mount_namespace_of_its_own_is_found(standins, tmp_path):  # noqa: F811
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    copied = f"mount -t tmpfs none {hidden} && cp {standins['libcuda'].parent}/* {hidden}"
    script = f"{copied} && exec {hidden}/hasher --launches 20 --interval-us 1000 --stepwise"
    process = run("unshare", "-m", "sh", "-c", script)
    blocks = found_by_looking(process)
    assert list(hidden.iterdir()) == []
    assert rows_of(blocks, process)["launches"].sum() == 20


def test_a_look_round_comes_before_a_second_is_over(standins):  # noqa: F811
    broker = Direct()
    sensor = launches.open_sensor(broker, settings(standins["libcuda"]))
    try:
        now_ns = time.time_ns()
        asked = []
        for step in range(11):
            broker.asked.clear()
            sensor.read(now_ns + step * 100_000_000)
            asked += [step for one in broker.asked if isinstance(one, ScanLaunches)]
    finally:
        launches.release()
        sensor.close()
    assert asked == [0, 7]
