"""The cooperative tier: a program that was given the shim, and rings that are lies."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuguard.config import Config
from gpuguard.core.records import LAUNCH, LAUNCH_APIS, Gap, KernelName, Launches
from gpuguard.messages import Refused
from gpuguard.sensors import EyeClosed, launches
from gpuguard.sensors.launches import cooperative
from gpuguard.sensors.launches.cooperative import FILE_BYTES, HEADER_BYTES, MAGIC, RECORD, SLOTS, CooperativeSensor
from tests.standins.build import SHAPES, build


def standins_of(folder, driver):
    if shutil.which("cc") is None:
        pytest.skip("no C compiler: the stand-in driver cannot be built")
    if not cooperative.LIBRARY.exists():
        pytest.skip("this build lacks the shim")
    return build(folder, driver)


@pytest.fixture(scope="module")
def standins(tmp_path_factory):
    return standins_of(tmp_path_factory.mktemp("standins"), SHAPES[0])


@pytest.fixture(scope="module", params=SHAPES)
def driver_of_each_shape(request, tmp_path_factory):
    return standins_of(tmp_path_factory.mktemp("standins"), request.param)


@pytest.fixture
def rings(tmp_path):
    where = tmp_path / "rings"
    where.mkdir(mode=0o700)
    return where


@pytest.fixture
def sensor(rings):
    one = CooperativeSensor(rings, 250_000_000, "a test")
    yield one
    one.close()


def given_the_shim(rings, variable="CUDA_INJECTION64_PATH"):
    return {**os.environ, "GPUGUARD_CAPTURE_DIR": str(rings), variable: str(cooperative.LIBRARY)}


def read_all(sensor, *processes):
    """Let programs that go by steps begin once their rings are read; read until all have ended.

    A process that ended before anybody looked has left a ring that is nobody's.
    """
    for process in processes:
        assert process.stdout.readline() == b"waits\n"
    blocks = []
    end = time.monotonic() + 60
    while len(sensor._rings) < len(processes) and time.monotonic() < end:
        blocks += sensor.read(time.time_ns())
        time.sleep(0.01)
    for process in processes:
        process.stdin.close()
    while any(process.poll() is None for process in processes):
        blocks += sensor.read(time.time_ns())
        time.sleep(0.01)
    return blocks + sensor.read(time.time_ns())


def launches_made(process):
    """Return how many a program says that it made, in its last line."""
    with process.stdout as told:
        return json.loads(told.read().splitlines()[-1])["launches"]


def rows_of(blocks):
    return np.concatenate([np.zeros(0, LAUNCH), *(one.rows for one in blocks if isinstance(one, Launches))])


@pytest.mark.parametrize("variable", ["CUDA_INJECTION64_PATH", "LD_PRELOAD"])
@pytest.mark.parametrize("api", ["kernel", "ex", "coop", "ptsz"])
def test_every_launch_of_who_cooperates_is_counted(sensor, rings, driver_of_each_shape, variable, api):
    command = [driver_of_each_shape["hasher"], "--stepwise", "--launches", "3000", "--interval-us", "50",
               "--kernel", "one", "--kernel", "two", "--grid", "77", "--block", "64", "--shared", "512", "--api", api]
    process = subprocess.Popen(list(map(str, command)), env=given_the_shim(rings, variable), stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE)
    blocks = read_all(sensor, process)
    made = launches_made(process)
    rows = rows_of(blocks)
    lost = sum(one.lost or 0 for one in blocks if isinstance(one, Gap))
    assert rows["launches"].sum() + lost == made == 3000
    assert set(rows["pid"].tolist()) == {process.pid}
    names = {one.kernel: one.name for one in blocks if isinstance(one, KernelName)}
    assert {names[int(kernel)] for kernel in rows["kernel"]} == {"one", "two"}
    expected = {"kernel": 0, "ptsz": 0, "ex": 1, "coop": 2}[api]
    shapes = {(int(row["api"]), *row["grid"].tolist(), *row["block"].tolist(), int(row["shared_bytes"]))
              for row in rows}
    assert shapes == {(expected, 77, 1, 1, 64, 1, 1, 512)}
    if not lost:
        assert rows["gaps_log2"].sum() == 3000 - 2
    assert (rows["first_ns"] <= rows["last_ns"]).all()
    assert list(rings.iterdir()) == []


def test_four_processes_at_once_are_counted_exactly(sensor, rings, standins):
    command = [str(standins["hasher"]), "--interval-us", "80", "--stepwise"]
    processes = [subprocess.Popen([*command, "--launches", str(4000 + n)], env=given_the_shim(rings),
                                  stdin=subprocess.PIPE, stdout=subprocess.PIPE) for n in range(4)]
    blocks = read_all(sensor, *processes)
    made = {process.pid: launches_made(process) for process in processes}
    assert sorted(made.values()) == [4000, 4001, 4002, 4003]
    rows = rows_of(blocks)
    lost = {one.process.pid: one.lost for one in blocks if isinstance(one, Gap) and one.process and one.lost}
    counted = {pid: int(rows["launches"][rows["pid"] == pid].sum()) + lost.get(pid, 0) for pid in made}
    assert counted == made


@pytest.mark.skipif(os.geteuid() != 0, reason="pid namespaces need root here")
def test_two_containers_with_one_folder_and_one_pid_are_two_processes(sensor, rings, standins):
    apart = ["unshare", "--pid", "--fork", "--mount-proc"]
    tried = subprocess.run([*apart, "true"], capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"no pid namespaces here: {tried.stderr}")
    inside = [*apart, str(standins["hasher"]), "--stepwise", "--interval-us",
              "2000"]
    wrappers = [subprocess.Popen([*inside, "--launches", str(300 + n)], env=given_the_shim(rings),
                                 stdin=subprocess.PIPE, stdout=subprocess.PIPE) for n in range(2)]
    blocks = read_all(sensor, *wrappers)
    assert sorted(map(launches_made, wrappers)) == [300, 301]
    rows = rows_of(blocks)
    by_pid = {pid: int(rows["launches"][rows["pid"] == pid].sum()) for pid in set(rows["pid"].tolist())}
    assert sorted(by_pid.values()) == [300, 301]
    assert 1 not in by_pid
    assert list(rings.iterdir()) == []


def test_an_alias_has_the_name_of_its_kernel(sensor, rings, standins):
    command = [str(standins["hasher"]), "--stepwise", "--launches", "5", "--interval-us", "1000", "--library",
               "--kernel", "inside"]
    process = subprocess.Popen(command, env=given_the_shim(rings), stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    blocks = read_all(sensor, process)
    assert launches_made(process) == 5
    names = [one.name for one in blocks if isinstance(one, KernelName)]
    assert set(names) == {"inside"}


FORKING = """
import ctypes, os, sys
cuda = ctypes.CDLL("libcuda.so.1") if len(sys.argv) < 2 else ctypes.CDLL(sys.argv[1])
cuda.cuInit(0)
def launch(times):
    for _ in range(times):
        cuda.cuLaunch(ctypes.c_void_p(7))
launch(3)
child = os.fork()
launch(4 if child else 5)
sys.stdin.read() if child else os.read(0, 1)
"""


def test_a_child_has_a_ring_of_its_own(sensor, rings, standins):
    process = subprocess.Popen([sys.executable, "-c", FORKING, str(standins["libcuda"])], stdin=subprocess.PIPE,
                               env=given_the_shim(rings))
    end = time.monotonic() + 100
    blocks = []
    while rows_of(blocks)["launches"].sum() < 12 and time.monotonic() < end:
        blocks += sensor.read(time.time_ns())
        time.sleep(0.01)
    process.stdin.close()
    process.wait()
    made = Counter()
    for row in rows_of(blocks):
        made[int(row["pid"])] += int(row["launches"])
        assert LAUNCH_APIS[row["api"]] == "cuLaunch"
    assert sorted(made.values()) == [5, 7]
    assert made[process.pid] == 7


def test_a_program_without_a_folder_runs_as_ever(standins, tmp_path):
    for where in (tmp_path / "none", "/proc"):
        process = subprocess.run([str(standins["hasher"]), "--launches", "50", "--interval-us", "0"],
                                 env=given_the_shim(where), capture_output=True, check=True)
        assert json.loads(process.stdout)["launches"] == 50
        assert process.stderr == b""


# -- what is refused --------------------------------------------------------------------------------------------------


def write_ring(path, *, head=0, records=b"", magic=MAGIC, size=FILE_BYTES):
    header = bytearray(HEADER_BYTES)
    struct.pack_into("<QQ", header, 0, magic, 1)
    struct.pack_into("<Q", header, 64, head)
    path.write_bytes((bytes(header) + records).ljust(size, b"\0")[:size])


def reasons(blocks):
    return [one.reason for one in blocks if isinstance(one, Gap)]


def test_files_that_are_no_rings_are_told_once(sensor, rings):
    write_ring(rings / "1.ring", magic=5)
    write_ring(rings / f"{os.getpid()}.ring")
    (rings / "x.ring").write_bytes(b"")
    os.mkfifo(rings / "2.ring")
    (rings / "1.bad.ring").symlink_to("/etc/passwd")
    write_ring(rings / "999999999.ring")
    first = reasons(sensor.read(time.time_ns()))
    assert "only launches of processes that were given" in first[0]
    assert len(first) == 7
    assert any("does not map it" in one for one in first)
    assert reasons(sensor.read(time.time_ns())) == []
    # What belongs to nobody alive is taken away, but never through a link.
    assert sorted(one.name for one in rings.iterdir()) == sorted(["1.ring", "2.ring", f"{os.getpid()}.ring"])


@pytest.fixture
def mapped(sensor, rings):
    """A ring of our own, as its file and open in the sensor."""
    import mmap

    path = rings / f"{os.getpid()}.ring"
    write_ring(path)
    with path.open("r+b") as file:
        held = mmap.mmap(file.fileno(), 0)
    sensor.read(time.time_ns())
    yield path
    held.close()


@settings(max_examples=80, deadline=None)
@given(content=st.binary(max_size=600), head=st.integers(0, 2**64 - 1) | st.integers(0, 8))
def test_whatever_a_ring_holds_is_read_or_dropped(tmp_path_factory, content, head):
    where = tmp_path_factory.mktemp("rings")
    path = where / "7.ring"
    write_ring(path, head=head, records=content)
    sensor = CooperativeSensor(where, 1, "a test")
    ring = cooperative.Ring(cooperative.ProcessId("b", 7, 8), os.open(path, os.O_RDWR))
    try:
        for block in sensor._drain(ring, time.time_ns()):
            assert isinstance(block, Launches | KernelName)
        assert ring.tail <= max(head, 0)
    finally:
        os.close(ring.descriptor)
        sensor.close()


def test_a_ring_that_was_cut_ends_nothing(sensor, mapped):
    os.truncate(mapped, 100)
    assert sensor.read(time.time_ns()) == []
    os.truncate(mapped, 0)
    assert sensor.read(time.time_ns()) == []
    with mapped.open("r+b") as file:
        file.seek(64)
        file.write(struct.pack("<Q", 50))
    assert rows_of(sensor.read(time.time_ns())).size == 0


def test_lies_about_time_api_and_place_are_held(sensor, mapped):
    records = np.zeros(4, RECORD)
    records["sequence"] = [1, 2, 3, 9]
    records["time_ns"] = [2**63, 5, 2**64 - 1, 0]
    records["api"] = [0, 99, 1, 0]
    with mapped.open("r+b") as file:
        file.seek(HEADER_BYTES)
        file.write(records.tobytes())
        file.seek(64)
        file.write(struct.pack("<Q", 4))
    now_ns = time.time_ns()
    blocks = sensor.read(now_ns)
    rows = rows_of(blocks)
    assert rows["api"].tolist() == [0, 1]
    assert (abs(rows["last_ns"] - now_ns) < 10**9).all()
    assert [(one.reason, one.lost) for one in blocks if isinstance(one, Gap)] == [("malformed records", 1)]
    assert int.from_bytes(mapped.read_bytes()[128:136], "little") == 3


def test_a_claim_of_more_than_fits_is_refused(sensor, mapped):
    with mapped.open("r+b") as file:
        file.seek(64)
        file.write(struct.pack("<Q", SLOTS + 1))
    assert "claims 16385 records" in reasons(sensor.read(time.time_ns()))[0]


def test_what_a_ring_says_of_itself_is_repeated_once_a_minute(sensor, mapped):
    said = []
    begun_ns = time.time_ns()
    for step in range(1, 100):
        with mapped.open("r+b") as file:
            file.seek(16)
            file.write(struct.pack("<QQ", 10 * step, step))
        said += [one for one in sensor.read(begun_ns + step * 10**9) if isinstance(one, Gap)]
    assert [(one.reason, one.lost) for one in said] == [
        ("launches lost: its ring was full", 10),
        ("calls of its driver have an unknown shape and are not seen", 1),
        ("launches lost: its ring was full", 600),
        ("calls of its driver have an unknown shape and are not seen", 60),
    ]


def test_a_second_ring_of_one_process_is_refused(sensor, mapped):
    import mmap

    second = mapped.with_name(f"{os.getpid()}-5.ring")
    write_ring(second)
    with second.open("r+b") as file, mmap.mmap(file.fileno(), 0):
        assert reasons(sensor.read(time.time_ns())) == [f"{second.name} is not read: its process has a ring already"]


def test_a_folder_full_of_anything_keeps_nobody_waiting(sensor, rings):
    import mmap

    for number in range(5_000):
        (rings / f"{os.getpid()}-{number}.ring").write_bytes(b"")
    path = rings / f"{os.getpid()}-a.ring"
    write_ring(path)
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0):
        now_ns = time.time_ns()
        told = [len(reasons(sensor.read(now_ns + i * 10**8))) for i in range(170)]
        assert max(told[1:]) <= cooperative.FILES_PER_LOOK
        assert path.name in sensor._rings


def test_more_rings_than_are_read_are_a_gap(sensor, mapped, rings, monkeypatch):
    monkeypatch.setattr(cooperative, "RINGS_MAX", 1)
    write_ring(rings / "1.ring")
    now_ns = time.time_ns()
    told = [one for i in range(9) for one in reasons(sensor.read(now_ns + i * 10**9))]
    assert told == ["1 rings are read already: what other processes launch is not seen"]


class Closed:
    def ask(self, request):
        del request
        return Refused("no root here"), []


def test_the_launch_eye_opens_by_this_tier_where_probes_are_refused(monkeypatch, tmp_path):
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    monkeypatch.delenv(cooperative.FOLDER_VARIABLE, raising=False)
    with pytest.raises(EyeClosed, match="GPUGUARD_CAPTURE_DIR"):
        launches.open_sensor(Closed(), Config())
    monkeypatch.setenv(cooperative.FOLDER_VARIABLE, str(tmp_path / "made"))
    sensor = launches.open_sensor(Closed(), Config())
    assert (tmp_path / "made").stat().st_mode & 0o777 == 0o700
    assert "no root here" in reasons(sensor.read(time.time_ns()))[0]
    sensor.close()
