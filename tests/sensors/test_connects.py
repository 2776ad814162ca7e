"""Who dials, on this host for real: each way to dial, each outcome, and processes in other namespaces."""

from __future__ import annotations

import os
import select
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from gpuguard.config import Config, ProcessSettings
from gpuguard.core.records import CONNECT, Connects, Gap, ProcessStarted
from gpuguard.sensors import EyeClosed, processes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gpuguard.core.records import Block
    from gpuguard.sensors.processes import ProcessSensor

pytestmark = [
    pytest.mark.privileged,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: BPF is privileged"),
]
SOURCE = Path(__file__).parents[2] / "ext" / "bpf" / "processes.bpf.c"
LOOPBACK = socket.inet_pton(socket.AF_INET6, "::ffff:127.0.0.1")
MSG_FASTOPEN = 0x2000_0000
REFUSED, ESTABLISHED, CLOSE = 111, 1, 7


class Direct:
    """A broker without a process of its own."""

    def ask(self, request):  # type: ignore[no-untyped-def]
        return processes.grant(request)


@pytest.fixture
def sensor() -> Iterator[ProcessSensor]:
    try:
        opened = processes.open_sensor(Direct(), Config(processes=ProcessSettings(source="bpf")))
    except EyeClosed as closed:
        pytest.skip(f"bpf is not to be had here: {closed}")
    if opened._connects is None:
        pytest.skip(f"nobody hears dials here: {opened.mode}")
    opened.read(time.time_ns())
    yield opened
    opened.close()
    processes.release()


def rows_of(blocks: list[Block], pid: int) -> np.ndarray:
    rows = [block.rows for block in blocks if isinstance(block, Connects)]
    found = np.concatenate(rows) if rows else np.zeros(0, CONNECT)
    return found[found["pid"] == pid]


def read(sensor: ProcessSensor, pid: int) -> np.ndarray:
    return rows_of(sensor.read(time.time_ns()), pid)


def closed_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


def test_a_refused_connection_has_its_process_its_ends_and_its_error(sensor: ProcessSensor) -> None:
    port, before = closed_port(), time.time_ns()
    with socket.socket() as one:
        assert one.connect_ex(("127.0.0.1", port)) == REFUSED
        local_port = one.getsockname()[1]
    (row,) = read(sensor, os.getpid())
    own = processes.procfs.identify(os.getpid())
    assert own is not None
    assert (row["start_ticks"], row["netns"]) == (own.start_ticks, Path("/proc/self/ns/net").stat().st_ino)
    assert (row["local"].tobytes(), row["remote"].tobytes()) == (LOOPBACK, LOOPBACK)
    assert (row["local_port"], row["remote_port"], row["protocol"]) == (local_port, port, 6)
    assert (row["state"], row["error"]) == (CLOSE, REFUSED)
    assert before - 10_000_000 <= row["time_ns"] <= time.time_ns() + 10_000_000


def test_each_way_to_dial_is_heard_once(sensor: ProcessSensor) -> None:
    ports = []
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_server(
            ("::1", 0), family=socket.AF_INET6) as server6:
        there = server.getsockname()
        mapped = ("::ffff:127.0.0.1", there[1])
        for family, address, how in (
            (socket.AF_INET, there, "plain"), (socket.AF_INET6, server6.getsockname(), "plain"),
            (socket.AF_INET6, mapped, "plain"), (socket.AF_INET, there, "at once"),
            (socket.AF_INET, there, "fast open"), (socket.AF_INET, there, "bound"),
        ):
            with socket.socket(family) as one:
                one.setblocking(how != "at once")
                if how == "bound":
                    one.bind(("127.0.0.1", 0))
                if how == "fast open":
                    one.sendto(b"x", MSG_FASTOPEN, address)
                else:
                    one.connect_ex(address)
                    select.select([], [one], [], 100)
                ports.append(one.getsockname()[1])
    rows = read(sensor, os.getpid())
    assert rows["local_port"].tolist() == ports
    assert set(rows["state"].tolist()) == {ESTABLISHED}
    assert rows["remote"][1].tobytes() == socket.inet_pton(socket.AF_INET6, "::1")
    assert rows["remote"][2].tobytes() == LOOPBACK
    assert np.ptp(rows["dialled"].astype(int) - np.arange(len(rows))) == 0


def test_what_is_given_up_before_an_answer_came_to_nothing_without_an_error(sensor: ProcessSensor) -> None:
    """A full backlog does not answer: a SYN that nobody refuses."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        waiting = [socket.socket() for _ in range(4)]
        for one in waiting:
            one.setblocking(False)
            one.connect_ex(server.getsockname())
        last = waiting[-1].getsockname()[1]
        heard = read(sensor, os.getpid())
        assert last not in heard["local_port"].tolist()
        time.sleep(0.1)
        for one in waiting:
            one.close()
        rows = read(sensor, os.getpid())
    (row,) = rows[rows["local_port"] == last]
    assert (row["state"], row["error"]) == (CLOSE, 0)
    assert 100_000 <= row["waited_us"] < 20_000_000


CONTAINER = """
import os, socket
os.system("ip link set lo up")
child = os.fork()
if not child:
    socket.socket().connect_ex(("127.0.0.1", 77))
    os._exit(0)
os.waitpid(child, 0)
print(os.stat("/proc/self/ns/net").st_ino, flush=True)
"""


def test_a_fork_in_a_container_that_dials_and_is_gone_is_named(sensor: ProcessSensor) -> None:
    done = subprocess.run(["unshare", "--net", "--pid", "--fork", sys.executable, "-c", CONTAINER],
                          capture_output=True, text=True, check=True)
    blocks = sensor.read(time.time_ns())
    while more := [block for block in sensor.read(time.time_ns()) if isinstance(block, ProcessStarted | Connects)]:
        blocks += more
    rows = np.concatenate([block.rows for block in blocks if isinstance(block, Connects)])
    (row,) = rows[rows["netns"] == int(done.stdout)]
    assert row["remote_port"] == 77
    started = {(b.process.pid, b.process.start_ticks): b for b in blocks if isinstance(b, ProcessStarted)}
    named = started[int(row["pid"]), int(row["start_ticks"])]
    assert named.netns == int(done.stdout)
    assert named.parent is not None
    assert (named.parent.pid, named.parent.start_ticks) in started


#: What is told goes by slices of time: a program that is kept waiting in between takes more of them.
AHEAD = """
import contextlib, os
with contextlib.suppress(PermissionError):
    os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
"""
MANY = AHEAD + """
import socket
one = socket.socket()
for _ in range(5000):
    one.connect_ex(("127.0.0.1", int({port})))
"""


def test_who_dials_without_end_is_told_in_part_and_counted_whole(sensor: ProcessSensor) -> None:
    scanner = subprocess.Popen([sys.executable, "-c", MANY.format(port=closed_port())])
    scanner.wait()
    blocks = sensor.read(time.time_ns())
    rows = rows_of(blocks, scanner.pid)
    last = rows[-1]
    assert (last["dialled"], last["in_vain"], last["state"]) == (5000, 5000, 0)
    assert last["withheld"] + len(rows) - 1 == 5000
    assert 256 <= len(rows) - 1 < 5000
    assert not [b for b in blocks if isinstance(b, Gap) and "connections" in b.reason]


GIVEN_UP = AHEAD + """
import resource, socket, time
resource.setrlimit(resource.RLIMIT_NOFILE, (1100, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
server = socket.socket()
server.bind(("127.0.0.1", 0))
server.listen(0)
early, late = [socket.socket() for _ in range(500)], [socket.socket() for _ in range(500)]
for some in early, late:
    time.sleep(0.3)
    for one in some:
        one.setblocking(False)
        one.connect_ex(server.getsockname())
for pair in zip(early, late):
    for one in pair:
        one.close()
"""


def test_what_was_dialled_at_two_times_and_ends_at_once_has_one_share(sensor: ProcessSensor) -> None:
    giver = subprocess.Popen([sys.executable, "-c", GIVEN_UP])
    giver.wait()
    rows = rows_of(sensor.read(time.time_ns()), giver.pid)
    assert (rows[-1]["dialled"], rows[-1]["state"]) == (1000, 0)
    assert rows[-1]["withheld"] >= 1000 - 3 * 256


SIXTY = """
import os, socket
for _ in range(60):
    if not os.fork():
        one = socket.socket()
        for _ in range(250):
            one.connect_ex(("127.0.0.1", {port}))
        os._exit(0)
for _ in range(60):
    os.wait()
"""


def test_a_full_ring_is_counted(sensor: ProcessSensor) -> None:
    """Sixty processes at once, each within its share, and nobody reads."""
    subprocess.run([sys.executable, "-c", SIXTY.format(port=closed_port())], check=True)
    blocks = sensor.read(time.time_ns())
    with socket.socket() as one:
        one.connect_ex(("127.0.0.1", closed_port()))
    blocks += sensor.read(time.time_ns())
    # Told with the first that finds room again: that may be another's, while the first read goes on.
    assert sum(b.lost or 0 for b in blocks if isinstance(b, Gap) and "connections" in b.reason) > 3000


def test_a_kernel_without_the_tracepoint_leaves_the_process_events(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:
    """The programs are built once more, for a tracepoint that no kernel has."""
    clang = shutil.which("clang")
    if clang is None or not SOURCE.exists():
        pytest.skip("needs clang and the source")
    changed = tmp_path / "changed.bpf.c"
    changed.write_text(SOURCE.read_text().replace("raw_tp/inet_sock_set_state", "raw_tp/no_such_tracepoint"))
    built = subprocess.run(
        [clang, "-O2", "-g", "-target", "bpf", f"-I/usr/include/{os.uname().machine}-linux-gnu", f"-I{SOURCE.parent}",
         "-c", changed, "-o", tmp_path / "changed.bpf.o"], capture_output=True, text=True, check=False)
    if built.returncode:
        pytest.skip(f"clang does not build it here: {built.stderr[:200]}")
    monkeypatch.setattr(processes.bpf, "OBJECT", tmp_path / "changed.bpf.o")
    try:
        opened = processes.open_sensor(Direct(), Config(processes=ProcessSettings(source="bpf")))
    except EyeClosed as closed:
        pytest.skip(f"bpf is not to be had here: {closed}")
    blocks = opened.read(time.time_ns())
    assert any("bpf (connections: attaching" in b.reason and "not told" in b.reason for b in blocks
               if isinstance(b, Gap))
    child = subprocess.Popen(["/bin/true"])
    child.wait()
    assert child.pid in {b.process.pid for b in opened.read(time.time_ns()) if isinstance(b, ProcessStarted)}
    opened.close()
    processes.release()
