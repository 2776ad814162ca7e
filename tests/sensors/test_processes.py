"""The process eye: parsing over recorded trees and hostile text, the tables over scripted events, and the live host."""

from __future__ import annotations

import itertools
import mmap
import os
import select
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuguard.config import Config, ProcessSettings
from gpuguard.core.records import CONNECT, Connects, Gap, ProcessExited, ProcessStarted
from gpuguard.core.subjects import ENVIRON_LISTED, ProcessId, context_of
from gpuguard.messages import Found, ListProcesses, Opened, OpenProcesses, ReadProcess, Refused
from gpuguard.sensors import EyeClosed, processes
from gpuguard.sensors.processes.events import Event, Kind

ROOT = Path(__file__).parents[2]
HOSTS = ROOT / "tests" / "hosts"
POD = HOSTS / "pod-v2" / "proc"
HYBRID = HOSTS / "docker-hybrid" / "proc"
SECOND_NS = 1_000_000_000
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: BPF and the proc connector are privileged")


class Direct:
    """A broker without a process of its own."""

    def ask(self, request):
        return processes.grant(request)


# -- parsing ----------------------------------------------------------------------------------------------------------


def test_a_pod_process_is_read_whole_and_redacted():
    agent = processes.procfs.read_process(2140, POD, booted_ns=10 * SECOND_NS)
    assert agent.process == ProcessId("7d3f2c61-0000-4000-8000-5a1b6f0c9e11", 2140, 5100)
    assert agent.parent == ProcessId("7d3f2c61-0000-4000-8000-5a1b6f0c9e11", 2101, 5000)
    assert agent.argv == ("python3", "agent.py", "--api-key", "[redacted]")
    assert agent.environ == {"ROCK_SANDBOX_ID": "sb-17"}
    assert (agent.uid, agent.netns, agent.executable) == (1000, 4026532280, "/usr/bin/python3.11")
    assert agent.time_ns == 10 * SECOND_NS + 5100 * SECOND_NS // processes.procfs.ticks_per_s()
    context = context_of(agent.cgroup, agent.environ)
    assert context.container_id == "4f" * 32
    assert context.pod_uid == "0c2d9f6e-6a55-4b0e-9d37-1f4a7f0f2a11"


def test_a_hostile_name_does_not_shift_the_fields():
    tunnel = processes.procfs.read_process(2207, POD)
    assert tunnel.name == "ssh) S 1 (x"
    assert tunnel.parent.pid == 2140
    assert tunnel.process.start_ticks == 9000
    assert tunnel.executable == "/usr/bin/ssh (deleted)"
    assert tunnel.argv[-1] == "relay@203.0.113.9"
    assert set(tunnel.environ) == {"TRACEPARENT", "CUDA_VISIBLE_DEVICES"}


def test_zombies_are_gone_but_a_dead_first_thread_is_not_the_process():
    assert processes.procfs.read_process(2300, POD) is None
    assert processes.procfs.read_process(2301, POD).name == "leader"


def test_a_parent_younger_than_its_child_is_a_reused_pid():
    assert processes.procfs.read_process(2302, POD).parent is None


def test_no_such_process():
    assert processes.procfs.read_process(31337, POD) is None


def test_hybrid_hierarchies_give_the_container():
    miner = processes.procfs.read_process(900, HYBRID)
    assert miner.cgroup == "/docker/" + "4f" * 32
    assert processes.procfs.read_process(1, HYBRID).cgroup == "/init.scope"


def test_cgroup_id_is_the_inode_of_its_folder(tmp_path):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "cg/a/b").mkdir(parents=True)
    (tmp_path / "proc/self/mounts").write_text(f"cgroup2 {tmp_path}/cg cgroup2 rw 0 0\n")
    assert processes.procfs.cgroup_id("", "/a/b", tmp_path / "proc") == (tmp_path / "cg/a/b").stat().st_ino
    assert processes.procfs.cgroup_id("", "/a/none", tmp_path / "proc") == 0
    assert processes.procfs.cgroup_id("", "/../../etc", tmp_path / "proc") == 0


def test_pages_cover_everybody_once():
    pids, after = [], 0
    while True:
        page = processes.procfs.list_processes(after, POD, page_bytes=1)
        pids += [found.process.pid for found in page.processes]
        if not page.more:
            break
        after = page.more
    assert pids == [1, 2, 2101, 2140, 2207, 2301, 2302, 2399]


@given(st.text(max_size=400))
def test_stat_parses_or_refuses(text):
    try:
        processes.procfs.parse_stat(text)
    except ValueError:
        return
    assert ")" in text


@given(st.text(alphabet=st.characters(blacklist_characters="\0"), max_size=64), st.integers(0, 2**40))
def test_stat_takes_any_name(name, start):
    fields = " ".join(["S", "7"] + ["0"] * 15 + ["3", "0", str(start), "0"])
    stat = processes.procfs.parse_stat(f"12 ({name}) {fields}")
    assert (stat.parent_pid, stat.threads, stat.start_ticks) == (7, 3, start)


VARIABLES = st.dictionaries(
    st.one_of(st.sampled_from(ENVIRON_LISTED), st.text("ABCDEFTRACEPARENT_", min_size=1, max_size=20)),
    st.text("abc=-0123456789TRACEPARENT", max_size=40), max_size=12)


@given(VARIABLES)
def test_environ_gives_the_listed_variables_and_wipes_the_rest(variables):
    raw = bytearray(b"".join(f"{name}={value}".encode() + b"\0" for name, value in variables.items()))
    assert processes.procfs.parse_environ(raw) == {n: v for n, v in variables.items() if n in ENVIRON_LISTED}
    assert not any(raw)


@given(st.binary(max_size=600))
def test_hostile_bytes_never_raise(raw):
    processes.procfs.parse_cmdline(raw)
    processes.procfs.parse_environ(bytearray(raw))
    text = raw.decode(errors="replace")
    processes.procfs.parse_cgroup(text)
    processes.procfs.parse_uid(text)
    processes.procfs.parse_namespace(text)
    processes.procfs.parse_users(text)
    processes.bpf.parse_ring([raw, raw[:88]], 0)
    processes.bpf.parse_ring_argv(raw)
    processes.connector.parse_connector(raw, 0)
    processes.connector.parse_acknowledgement(raw)


def test_arguments_of_the_ring_are_redacted_and_never_cut_in_two():
    whole = b"ssh\0--password\0hunter2\0"
    assert processes.bpf.parse_ring_argv(struct.pack("<II", len(whole), 0) + whole + b"old\0") == (
        "ssh", "--password", "[redacted]")
    cut = b"curl\0ghp_" + b"a1B2" * 3
    assert processes.bpf.parse_ring_argv(struct.pack("<II", 900, 0) + cut) == ("curl", "\u2026")
    assert processes.bpf.parse_ring_argv(struct.pack("<II", 900, 0) + b"x" * 50) == ("\u2026",)


def connect_bytes(fields):
    """Write one struct connect, field for field as ext/bpf/processes.bpf.c has them."""
    names = ["time_ns", "start_ns", "lost", "pid", "netns", "dialled", "in_vain", "withheld", "error", "state"]
    return struct.pack("<QQQIIIIIHH16s16sHHI", *(fields[name] for name in names), fields["local"], fields["remote"],
                       fields["local_port"], fields["remote_port"], 0xFFFF_FFFF)


U16, U32 = st.integers(0, 2**16 - 1), st.integers(0, 2**32 - 1)
ADDRESS = st.binary(min_size=16, max_size=16)
CONNECT_FIELDS = st.fixed_dictionaries({
    "time_ns": st.integers(0, 2**62), "start_ns": st.integers(0, 2**64 - 1), "lost": st.integers(0, 2**63 - 1),
    "pid": U32, "netns": U32, "dialled": U32, "in_vain": U32, "withheld": U32, "error": U16, "state": U16,
    "local": ADDRESS, "remote": ADDRESS, "local_port": U16, "remote_port": U16})


@given(st.lists(CONNECT_FIELDS, max_size=8), st.integers(0, 2**61), st.binary(max_size=120))
def test_rows_of_connections_are_read_field_by_field(wanted, booted_ns, odd):
    records = [connect_bytes(one) for one in wanted]
    assert {len(one) for one in records} <= {processes.connects.RING_ROW.itemsize}
    records += [odd] if len(odd) != processes.connects.RING_ROW.itemsize else []
    rows, lost = processes.connects.parse_connects(records, booted_ns)
    assert lost == max((one["lost"] for one in wanted), default=0)
    assert len(rows) == len(wanted)
    for row, one in zip(rows, wanted, strict=True):
        assert int(row["time_ns"]) == one["time_ns"] + booted_ns
        assert int(row["start_ticks"]) == one["start_ns"] // (SECOND_NS // processes.procfs.ticks_per_s())
        assert int(row["protocol"]) == 6
        assert (row["local"].tobytes(), row["remote"].tobytes()) == (one["local"], one["remote"])
        for name in ("pid", "netns", "dialled", "in_vain", "withheld", "error", "state", "local_port", "remote_port"):
            assert int(row[name]) == one[name]


def connector(what, *words):
    words = (*words, *[0] * (6 - len(words)))
    return struct.pack("=IHHIIIIIIHHIIQ6I", 76, 3, 0, 0, 0, 1, 1, 0, 0, 40, 0, what, 0, 5_000, *words)


def test_connector_messages():
    fork = processes.connector.parse_connector(connector(1, 10, 10, 11, 11), 100)
    assert (fork.kind, fork.pid, fork.parent_pid, fork.time_ns) == (Kind.FORK, 11, 10, 5_100)
    assert processes.connector.parse_connector(connector(1, 10, 10, 12, 10), 0) is None, "a new thread"
    assert processes.connector.parse_connector(connector(2, 11, 11), 0).kind == Kind.EXEC
    ended = processes.connector.parse_connector(connector(0x8000_0000, 11, 11, 256), 0)
    assert (ended.kind, ended.pid, ended.exit_status, ended.whole) == (Kind.EXIT, 11, 256, False)
    assert processes.connector.parse_connector(connector(0x8000_0000, 12, 11, 256), 0).exit_status is None
    assert processes.connector.parse_acknowledgement(connector(0, 1)) == 1
    assert processes.connector.parse_acknowledgement(connector(2, 1)) is None


# -- tables, over scripted events -------------------------------------------------------------------------------------

BOOT = "boot"


class Script:
    """A source and a broker at once: /proc is a dict."""

    descriptor = None

    def __init__(self):
        self.here = {}
        self.queue = []
        self.lost = 0

    def put(self, pid, start, parent=None, name="p"):
        identity = ProcessId(BOOT, pid, start)
        self.here[pid] = ProcessStarted(0, identity, parent, name, (name,), uid=5, user="five")
        return identity

    def events(self):
        events, self.queue = self.queue, []
        lost, self.lost = self.lost, 0
        return events, lost

    def close(self):
        pass

    def ask(self, request):
        match request:
            case ListProcesses():
                return Found(tuple(self.here.values())), ()
            case ReadProcess():
                return Found((self.here[request.pid],) if request.pid in self.here else ()), ()
        raise AssertionError(request)


class Dials:
    """A source of connections: rows of CONNECT put there."""

    def __init__(self):
        self.rows = np.zeros(0, CONNECT)
        self.lost = 0

    def put(self, pid, start, **fields):
        row = np.zeros(1, CONNECT)
        row["pid"], row["start_ticks"], row["state"] = pid, start, 7
        for name, value in fields.items():
            row[name] = value
        self.rows = np.concatenate([self.rows, row])

    def read(self):
        rows, self.rows = self.rows, np.zeros(0, CONNECT)
        lost, self.lost = self.lost, 0
        return rows, lost

    def close(self):
        pass


def sensor_of(script, mode="bpf", dials=None):
    sensor = processes.ProcessSensor(script, script, mode, SECOND_NS, dials or Dials())
    return sensor, sensor.read(SECOND_NS)


def fork(time_ns, pid, start, parent):
    return Event(Kind.FORK, time_ns, pid, start, parent.pid, parent.start_ticks, name="f")


def test_processes_that_were_there_are_listed_oldest_first():
    script = Script()
    younger, older = script.put(3, 30), script.put(9, 10)
    _, blocks = sensor_of(script)
    assert [block.process for block in blocks] == [older, younger]


def test_forks_are_told_though_the_clock_was_set_back():
    script = Script()
    parent = script.put(10, 1)
    sensor, _ = sensor_of(script)
    lasts, later = script.put(11, 2, parent), script.put(12, 3, parent)
    script.queue = [fork(3600 * SECOND_NS, 11, 2, parent)]
    assert sensor.read(3600 * SECOND_NS) == []
    script.queue = [fork(2 * SECOND_NS, 12, 3, parent)]
    assert [block.process for block in sensor.read(2 * SECOND_NS)] == [lasts]
    assert [block.process for block in sensor.read(3 * SECOND_NS)] == [later]


def test_ancestry_survives_the_parents_end():
    script = Script()
    agent = script.put(10, 1)
    sensor, _ = sensor_of(script)
    middle = ProcessId(BOOT, 11, 2)
    # agent forks 11, 11 forks 12 and ends, 12 is given to init and executes twice.
    init = script.put(1, 0)
    script.put(12, 3, init, "miner")
    script.queue = [fork(2, 11, 2, agent), fork(3, 12, 3, middle), Event(Kind.EXIT, 4, 11, 2, exit_status=0),
                    Event(Kind.EXEC, 5, 12, 3), Event(Kind.EXEC, 6, 12, 3)]
    blocks = sensor.read(2 * SECOND_NS)
    started = [block for block in blocks if isinstance(block, ProcessStarted)]
    assert [(block.process.pid, block.parent) for block in started] == [(11, agent), (12, middle), (12, middle)]
    assert [block.time_ns for block in started] == [2, 5, 6]
    assert [block for block in blocks if isinstance(block, ProcessExited)] == [ProcessExited(4, middle, 0)]


def test_however_deep_it_forked_all_above_are_told_eldest_first():
    script = Script()
    agent = script.put(10, 1)
    sensor, _ = sensor_of(script)
    line = [agent, *(ProcessId(BOOT, one, one) for one in range(11, 211))]
    script.put(210, 210, line[-2], "miner")
    forks = [fork(2, one.pid, one.start_ticks, parent) for parent, one in itertools.pairwise(line)]
    script.queue = [*forks, Event(Kind.EXEC, 5, 210, 210)]
    started = [block for block in sensor.read(2 * SECOND_NS) if isinstance(block, ProcessStarted)]
    assert [(block.parent, block.process) for block in started] == list(itertools.pairwise(line))


def test_a_fork_that_lasts_is_read_later_and_one_that_ends_is_not():
    script = Script()
    parent = script.put(10, 1)
    sensor, _ = sensor_of(script)
    script.put(11, 2)
    script.queue = [fork(SECOND_NS, 11, 2, parent), fork(SECOND_NS, 12, 2, parent),
                    Event(Kind.EXIT, SECOND_NS + 1, 12, 2, exit_status=0)]
    assert sensor.read(SECOND_NS + 1) == []
    blocks = sensor.read(2 * SECOND_NS)
    assert [(block.process.pid, block.parent) for block in blocks] == [(11, parent)]


def test_gone_before_it_was_read_is_named_by_its_event():
    script = Script()
    parent = script.put(10, 1)
    sensor, _ = sensor_of(script)
    script.queue = [Event(Kind.EXEC, 7, 11, 2, 10, 1, None, True, "true", 5, 99, 42),
                    Event(Kind.EXIT, 8, 11, 2, exit_status=256)]
    started, ended, gap = sensor.read(20 * SECOND_NS)
    assert (started.process, started.parent, started.name) == (ProcessId(BOOT, 11, 2), parent, "true")
    assert (started.user, started.netns, started.cgroup_id, started.argv) == ("five", 99, 42, ())
    assert ended == ProcessExited(8, ProcessId(BOOT, 11, 2), 256)
    assert (gap.lost, "environment" in gap.reason) == (1, True)


def test_without_a_start_time_nothing_is_invented():
    script = Script()
    sensor, _ = sensor_of(script, "connector")
    script.queue = [Event(Kind.EXEC, 7, 11), Event(Kind.EXEC, 8, 12)]
    (gap,) = sensor.read(20 * SECOND_NS)
    assert isinstance(gap, Gap)
    assert gap.lost == 2


def test_a_reused_pid_is_another_process():
    script = Script()
    first = script.put(11, 2)
    sensor, _ = sensor_of(script)
    second = script.put(11, 500)
    # Its exec event is of the first, whose /proc now shows the second: the event is believed, not /proc.
    script.queue = [Event(Kind.EXEC, 3, 11, 2, name="first"), Event(Kind.EXIT, 4, 11, 2, exit_status=9),
                    Event(Kind.EXEC, 5, 11, 500)]
    blocks = [block for block in sensor.read(20 * SECOND_NS) if not isinstance(block, Gap)]
    assert [(type(block), block.process) for block in blocks] == [
        (ProcessStarted, first), (ProcessExited, first), (ProcessStarted, second)]
    script.queue = [Event(Kind.EXIT, 9, 11, 2, exit_status=0)]
    assert sensor.read(21 * SECOND_NS) == [], "a late exit of the first ends nobody"


def test_lost_events_are_counted_and_the_host_listed_anew():
    script = Script()
    gone = script.put(11, 2)
    sensor, _ = sensor_of(script)
    del script.here[11]
    new = script.put(12, 3)
    script.lost = 7
    gap, ended, started = sensor.read(2 * SECOND_NS)
    assert (gap.lost, ended.process, ended.exit_status, started.process) == (7, gone, None, new)


def test_polling_says_so_once_and_compares_lists():
    script = Script()
    one = script.put(11, 2)
    sensor, blocks = sensor_of(script, "polling (bpf: no)")
    assert isinstance(blocks[0], Gap)
    assert "polling (bpf: no)" in blocks[0].reason
    del script.here[11]
    two = script.put(11, 9)
    assert [(type(block), block.process) for block in sensor.read(3 * SECOND_NS)] == [
        (ProcessExited, one), (ProcessStarted, two)]
    assert sensor.read(4 * SECOND_NS) == []


def test_what_a_source_cannot_see_is_told_though_its_first_read_fails():
    class Broken(Script):
        def events(self):
            raise OSError("no")

    _, blocks = sensor_of(Broken(), "polling (bpf: no)")
    assert [block.reason.partition(":")[0] for block in blocks] == ["polling (bpf", "process events"]


def test_connector_exit_of_one_thread_is_no_exit():
    script = Script()
    one = script.put(11, 2)
    sensor, _ = sensor_of(script, "connector")
    script.queue = [Event(Kind.EXIT, 5, 11, whole=False)]
    assert sensor.read(2 * SECOND_NS) == []
    script.queue = [Event(Kind.EXIT, 6, 11, exit_status=256, whole=False)]
    assert sensor.read(3 * SECOND_NS) == [], "the first thread ended, others run"
    del script.here[11]
    assert sensor.read(4 * SECOND_NS) == [ProcessExited(6, one, 256)]


def test_who_dialled_is_told_after_his_fork_and_before_his_end():
    script, dials = Script(), Dials()
    parent = script.put(10, 1)
    sensor, _ = sensor_of(script, dials=dials)
    here, gone = script.put(11, 2, parent), ProcessId(BOOT, 12, 3)
    script.queue = [fork(2, 11, 2, parent), fork(3, 12, 3, parent), Event(Kind.EXIT, 4, 12, 3, exit_status=0)]
    dials.put(11, 2, remote_port=22)
    dials.put(12, 3, remote_port=23)
    dials.put(12, 9, remote_port=24)
    dials.lost = 5
    one, other, ended, gap, connects = sensor.read(SECOND_NS)
    assert [(b.process, b.parent) for b in (one, other)] == [(here, parent), (gone, parent)]
    assert ended == ProcessExited(4, gone, 0), "nobody stays who is gone"
    assert gap.lost == 5
    assert isinstance(connects, Connects)
    assert connects.rows["remote_port"].tolist() == [22, 23, 24]
    dials.put(11, 2)
    assert [type(b) for b in sensor.read(SECOND_NS)] == [Connects], "named once"


def test_a_fork_that_was_read_before_is_named_when_it_dials():
    script, dials = Script(), Dials()
    parent = script.put(10, 1)
    sensor, _ = sensor_of(script, dials=dials)
    script.queue = [fork(SECOND_NS, 12, 3, parent)]
    assert sensor.read(SECOND_NS) == []
    dials.put(12, 3)
    assert [type(b) for b in sensor.read(SECOND_NS + 1)] == [ProcessStarted, Connects]


def test_who_ended_before_his_connection_is_told_has_his_end_too():
    """A fork dials without waiting and is gone; its parent has the socket too, and the answer comes a minute later."""
    script, dials = Script(), Dials()
    parent = script.put(10, 1)
    sensor, _ = sensor_of(script, dials=dials)
    script.queue = [fork(2, 12, 3, parent), Event(Kind.EXIT, 4, 12, 3, exit_status=0)]
    assert sensor.read(SECOND_NS) == []
    dials.put(12, 3)
    one, ended, connects = sensor.read(2 * SECOND_NS)
    assert (one.process, ended) == (ProcessId(BOOT, 12, 3), ProcessExited(4, one.process, 0))
    assert isinstance(connects, Connects)
    assert 12 not in sensor._known


def test_a_source_that_hears_no_dials_says_so_once():
    script = Script()
    sensor = processes.ProcessSensor(script, script, "connector", SECOND_NS)
    (gap,) = sensor.read(SECOND_NS)
    assert "connector: whose a connection was" in gap.reason
    assert sensor.read(2 * SECOND_NS) == []


def test_a_refusing_broker_closes_the_eye():
    class No:
        def ask(self, request):
            return Refused("may not"), ()

    with pytest.raises(EyeClosed, match="may not"):
        processes.open_sensor(No(), Config())


def test_an_unexpected_grant_is_closed_again():
    read_end, write_end = os.pipe()
    os.close(write_end)

    class Odd:
        def ask(self, request):
            return Opened(("x",), "magic"), (read_end,)

    with pytest.raises(EyeClosed, match="magic"):
        processes.open_sensor(Odd(), Config())
    with pytest.raises(OSError):
        os.fstat(read_end)


# -- live -------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["bpf", "connector"])
def live(request):
    try:
        sensor = processes.open_sensor(Direct(), Config(processes=ProcessSettings(source=request.param)))
    except EyeClosed as closed:
        pytest.skip(f"{request.param} is not to be had here: {closed}")
    sensor.read(time.time_ns())
    yield sensor
    sensor.close()
    processes.release()


def until(sensor, enough):
    """Read until ``enough(blocks)``; the limit is there for a broken sensor only."""
    blocks, limit = [], time.monotonic() + 100
    while not enough(blocks) and time.monotonic() < limit:
        select.select([sensor.descriptor], [], [], 0.02)
        blocks += sensor.read(time.time_ns())
    return blocks


@needs_root
def test_three_hundred_short_processes(live):
    pids, blocks = [], []
    for _ in range(300):
        child = subprocess.Popen(["/bin/true"])
        child.wait()
        pids.append(child.pid)
        blocks += live.read(time.time_ns())
    wanted = set(pids)

    def ended(blocks):
        return {b.process.pid for b in blocks if isinstance(b, ProcessExited)} & wanted

    blocks += until(live, lambda more: len(ended(blocks + more)) == 300 or live.mode == "connector")
    started = [b for b in blocks if isinstance(b, ProcessStarted) and b.process.pid in wanted and b.name == "true"]
    unread = sum(b.lost or 0 for b in blocks if isinstance(b, Gap)) + sum(live._unread.values())
    assert not any("more process events" in b.reason for b in blocks if isinstance(b, Gap))
    assert len({b.process for b in started}) == len(started)
    assert all(b.parent.pid == os.getpid() for b in started)
    assert all(b.argv == ("/bin/true",) for b in started)
    if live.mode == "bpf":
        assert len(started) == 300
        assert len(ended(blocks)) == 300
        assert all(b.exit_status == 0 for b in blocks if isinstance(b, ProcessExited) and b.process.pid in wanted)
    else:
        assert len(started) + unread >= 300


@needs_root
def test_exit_status_threads_and_identity(live):
    code = "import threading, sys; t = threading.Thread(target=int); t.start(); t.join(); input(); sys.exit(3)"
    environ = {**os.environ, "TRACEPARENT": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "SECRET": "s3"}
    child = subprocess.Popen([sys.executable, "-c", code, "--token", "hunter2"], stdin=subprocess.PIPE, env=environ)
    first = until(live, lambda bs: any(isinstance(b, ProcessStarted) and b.process.pid == child.pid for b in bs))
    started = next(b for b in first if isinstance(b, ProcessStarted) and b.process.pid == child.pid)
    assert started.process == processes.procfs.identify(child.pid)
    assert started.argv[-1] == "[redacted]"
    assert "hunter2" not in repr(first)
    assert started.environ["TRACEPARENT"] == environ["TRACEPARENT"]
    assert "SECRET" not in started.environ
    assert started.netns == Path("/proc/self/ns/net").stat().st_ino
    assert not [b for b in first if isinstance(b, ProcessExited) and b.process == started.process]
    child.stdin.close()
    child.wait()
    blocks = until(live, lambda bs: any(isinstance(b, ProcessExited) and b.process == started.process for b in bs))
    ended = [b for b in blocks if isinstance(b, ProcessExited) and b.process == started.process]
    assert [os.waitstatus_to_exitcode(b.exit_status) for b in ended] == [1]


@needs_root
def test_a_killed_process_says_by_what(live):
    child = subprocess.Popen(["sleep", "60"])
    until(live, lambda bs: any(isinstance(b, ProcessStarted) and b.process.pid == child.pid for b in bs))
    child.send_signal(signal.SIGKILL)
    child.wait()
    blocks = until(live, lambda bs: any(isinstance(b, ProcessExited) and b.process.pid == child.pid for b in bs))
    ended = next(b for b in blocks if isinstance(b, ProcessExited) and b.process.pid == child.pid)
    assert os.waitstatus_to_exitcode(ended.exit_status) == -signal.SIGKILL


@needs_root
def test_a_forked_process_that_executes_nothing_is_found(live):
    code = "import os, sys; child = os.fork(); print(child, flush=True) if child else None; sys.stdin.read()"
    parent = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    child = int(parent.stdout.readline())
    blocks = until(live, lambda bs: any(isinstance(b, ProcessStarted) and b.process.pid == child for b in bs))
    found = next(b for b in blocks if isinstance(b, ProcessStarted) and b.process.pid == child)
    assert found.parent == processes.procfs.identify(parent.pid)
    parent.communicate(b"")


INSIDE = """
import os, subprocess, sys, time
from gpuguard.config import Config, ProcessSettings
from gpuguard.core.records import ProcessStarted
from gpuguard.sensors import processes
class Direct:
    def ask(self, request):
        return processes.grant(request)
sensor = processes.open_sensor(Direct(), Config(processes=ProcessSettings(source="bpf")))
sensor.read(time.time_ns())
child = subprocess.Popen(["sleep", "60"])
pids = set()
limit = time.monotonic() + 100
while child.pid not in pids and time.monotonic() < limit:
    blocks = sensor.read(time.time_ns())
    started = [b.process for b in blocks if isinstance(b, ProcessStarted)]
    pids |= {one.pid for one in started if one == processes.procfs.identify(one.pid)}
refused, _ = processes.grant(processes.OpenProcesses("connector"))
print(os.getpid(), child.pid in pids, max(pids) < 100, "first pid namespace" in refused.reason)
child.kill(); child.wait(); sensor.close(); processes.release()
"""


@needs_root
def test_pids_are_those_of_the_brokers_namespace(bpf):
    command = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", sys.executable, "-c", INSIDE]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT,
                          timeout=200)
    assert done.stdout.split() == ["1", "True", "True", "True"], done.stderr


@pytest.fixture
def bpf():
    answer, descriptors = processes.grant(OpenProcesses("bpf"))
    if isinstance(answer, Refused):
        pytest.skip(f"bpf is not to be had here: {answer.reason}")
    yield answer, descriptors
    for descriptor in descriptors:
        os.close(descriptor)
    processes.release()


@needs_root
def test_a_container_is_seen_from_outside_by_its_outer_pid(bpf):
    from gpuguard._processes import Ring

    answer, (ring_fd, *_) = bpf
    ring = Ring(ring_fd, answer.values["ring_bytes"])
    outer = subprocess.Popen(["unshare", "--pid", "--fork", "--kill-child", "sleep", "60"])
    seen, limit = [], time.monotonic() + 100
    while not seen and time.monotonic() < limit:
        heard = processes.bpf.parse_ring(ring.read(64), 0)[0]
        seen = [one for one in heard if one.parent_pid == outer.pid and one.kind == Kind.EXEC]
    (inner,) = seen
    assert inner.name == "sleep"
    assert processes.procfs.identify(inner.pid).start_ticks == inner.start_ticks
    assert Path(f"/proc/{inner.pid}/comm").read_text() == "sleep\n"
    outer.kill()
    outer.wait()
    ring.close()


UNPRIVILEGED = """
import os, select, sys
from gpuguard._processes import Ring
ring_fd, ring_bytes, waiting = map(int, sys.argv[1:])
os.setgroups([])
os.setresgid(65534, 65534, 65534)
os.setresuid(65534, 65534, 65534)
ring = Ring(ring_fd, ring_bytes)
os.close(ring_fd)
ring.read(10_000)
print("mapped", flush=True)
ready = select.epoll.fromfd(waiting).poll(100)
print(bool(ready), len(ring.read(64)) > 0)
"""


@needs_root
def test_the_ring_is_read_without_privileges(bpf):
    ring_fd, waiting, _ = bpf[1]
    child = subprocess.Popen([sys.executable, "-c", UNPRIVILEGED, str(ring_fd), str(bpf[0].values["ring_bytes"]),
                              str(waiting)], pass_fds=(ring_fd, waiting), stdout=subprocess.PIPE, cwd=ROOT)
    assert child.stdout.readline() == b"mapped\n"
    subprocess.run(["/bin/true"], check=True)
    assert child.communicate()[0] == b"True True\n"


@needs_root
def test_a_full_ring_is_counted_and_the_host_listed_anew():
    try:
        sensor = processes.open_sensor(Direct(), Config(processes=ProcessSettings(source="bpf")))
    except EyeClosed as closed:
        pytest.skip(f"bpf is not to be had here: {closed}")
    sensor.read(time.time_ns())
    # 784 bytes each, in three events with their headers, into a ring of 1 MiB.
    subprocess.run(["/bin/sh", "-c", "i=0; while [ $i -lt 2100 ]; do /bin/true; i=$((i + 1)); done"], check=True)
    last = subprocess.Popen(["sleep", "60"])
    while b"sleep" not in Path(f"/proc/{last.pid}/comm").read_bytes():
        pass

    def told(blocks):
        # The first event that finds room again says how many did not.
        subprocess.run(["/bin/true"], check=True)
        return [b for b in blocks if isinstance(b, Gap) and "more process events" in b.reason]

    blocks = until(sensor, told)
    assert sum(gap.lost for gap in told(blocks)) > 0
    assert sensor._known[last.pid].process == processes.procfs.identify(last.pid)
    assert not [known for known in sensor._known.values() if known.process.pid not in (last.pid, os.getpid())
                and known.process in {b.process for b in blocks if isinstance(b, ProcessExited)}]
    last.kill()
    last.wait()
    sensor.close()
    processes.release()


@needs_root
def test_the_guard_cannot_write_to_the_ring(bpf):
    _, (ring_fd, _, connects_fd) = bpf
    for one in (ring_fd, connects_fd):
        with pytest.raises(PermissionError):
            mmap.mmap(one, mmap.PAGESIZE, mmap.MAP_SHARED, mmap.PROT_WRITE, offset=mmap.PAGESIZE)


def test_polling_works_without_privileges():
    sensor = processes.open_sensor(Direct(), Config(processes=ProcessSettings(source="polling")))
    blocks = sensor.read(time.time_ns())
    assert isinstance(blocks[0], Gap)
    own = [b for b in blocks if isinstance(b, ProcessStarted) and b.process.pid == os.getpid()]
    assert own[0].process == processes.procfs.identify(os.getpid())
    sensor.close()
