"""The socket eye: parsing what the kernel might send, owners on live sockets, namespaces, and when it looks."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuguard.config import Config
from gpuguard.core.records import Gap, ProcessExited, ProcessStarted, Socket, Sockets
from gpuguard.core.subjects import ProcessId
from gpuguard.messages import ReadSockets, Refused, SocketsRead
from gpuguard.sensors import processes, sockets

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: a network namespace of its own")
OWN = Path("/proc/self/ns/net").stat().st_ino
#: A look comes no sooner than twenty times what the last one took, which on a busy machine is long.
LOOK_S = 200


# -- parsing ----------------------------------------------------------------------------------------------------------


def message(family, local, remote, inode, info=b""):
    head = struct.pack("=BBBB", family, 1, 0, 0) + struct.pack(">HH", 22, 40000)
    body = head + local.ljust(16, b"\0") + remote.ljust(16, b"\0") + struct.pack("=I8xIIIII", 0, 0, 0, 0, 7, inode)
    return body + (struct.pack("=HH", 4 + len(info), 2) + info if info else b"")


def test_an_entry_with_all_it_may_carry():
    info = bytearray(232)
    struct.pack_into("=QQ", info, 120, 1000, 2000)
    struct.pack_into("=I", info, 148, 31_300)
    body = message(socket.AF_INET, bytes([10, 0, 0, 1]), bytes([10, 0, 0, 2]), 99, bytes(info))
    one = sockets.diag.parse_socket(6, body)
    assert one == Socket(protocol=6, local="10.0.0.1", local_port=22, remote="10.0.0.2", remote_port=40000, state=1,
                         inode=99, uid=7, min_rtt_us=31_300, sent_bytes=1000, received_bytes=2000)


def test_what_an_older_kernel_does_not_say_is_none():
    one = sockets.diag.parse_socket(6, message(socket.AF_INET, bytes(4), bytes(4), 99, bytes(104)))
    assert (one.min_rtt_us, one.sent_bytes) == (None, 0)
    unmeasured = bytearray(232)
    struct.pack_into("=I", unmeasured, 148, 0xFFFF_FFFF)
    assert sockets.diag.parse_socket(6, message(2, bytes(4), bytes(4), 99, bytes(unmeasured))).min_rtt_us is None


def test_ipv4_in_ipv6_is_written_as_ipv4():
    mapped = bytes(10) + b"\xff\xff" + bytes([127, 0, 0, 1])
    remote = socket.inet_pton(socket.AF_INET6, "2001:db8::1")
    one = sockets.diag.parse_socket(6, message(socket.AF_INET6, mapped, remote, 9))
    assert (one.local, one.remote) == ("127.0.0.1", "2001:db8::1")


def test_nobodys_sockets_are_left_out():
    assert sockets.diag.parse_socket(6, message(socket.AF_INET, bytes(4), bytes(4), 0)) is None


@given(st.binary(max_size=400), st.sampled_from([6, 17]))
def test_hostile_entries_never_raise(raw, protocol):
    sockets.diag.parse_socket(protocol, raw)
    sockets.diag.parse_socket(protocol, message(2, bytes(4), bytes(4), 5) + raw)


@given(st.binary(max_size=400))
def test_hostile_messages_end_or_are_refused(raw):
    try:
        messages = list(sockets.diag.split_messages(raw))
    except OSError:
        return
    assert sum(len(body) for _, body in messages) <= len(raw)


# -- live -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def pair():
    listening = socket.create_server(("127.0.0.1", 0))
    dialled = socket.create_connection(listening.getsockname())
    accepted, _ = listening.accept()
    dialled.sendall(b"x" * 5000)
    while len(accepted.recv(5000, socket.MSG_PEEK)) < 5000:
        pass
    accepted.sendall(b"y")
    dialled.recv(1)
    yield listening, dialled, accepted
    for one in (listening, dialled, accepted):
        one.close()


def named(seen, one):
    port = one.getsockname()[1]
    peer = 0
    if one.family in (socket.AF_INET, socket.AF_INET6):
        try:
            peer = one.getpeername()[1]
        except OSError:
            peer = 0
    return next(s for s in seen.sockets if (s.local_port, s.remote_port) == (port, peer))


def test_a_pair_is_found_with_its_owner_and_rtt(pair):
    listening, dialled, accepted = pair
    seen = sockets.read_sockets()
    me = processes.procfs.identify(os.getpid())
    assert seen.netns == OWN
    for one in pair:
        assert named(seen, one).owners == (me,)
        assert named(seen, one).inode == os.fstat(one.fileno()).st_ino
    assert named(seen, listening).state == 10
    assert (named(seen, dialled).state, named(seen, dialled).local) == (1, "127.0.0.1")
    assert named(seen, dialled).min_rtt_us > 0
    assert named(seen, accepted).received_bytes == 5000
    assert named(seen, dialled).sent_bytes >= 5000


def test_tcp_of_both_families_is_seen_and_nothing_twice():
    with (socket.create_server(("127.0.0.1", 0)) as four,
          socket.create_server(("::1", 0), family=socket.AF_INET6) as six,
          socket.create_connection(six.getsockname()[:2]) as dialled):
        seen = sockets.read_sockets()
        assert [named(seen, one).local for one in (four, six, dialled)] == ["127.0.0.1", "::1", "::1"]
        assert (named(seen, six).state, named(seen, dialled).state) == (10, 1)
        inodes = [one.inode for one in seen.sockets]
        assert len(set(inodes)) == len(inodes)


def test_udp_with_and_without_a_peer():
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as one, socket.socket(type=socket.SOCK_DGRAM) as two:
        one.bind(("::1", 0))
        two.bind(("127.0.0.1", 0))
        two.connect(("127.0.0.1", 9))
        seen = sockets.read_sockets()
        assert named(seen, one).owners == named(seen, two).owners == (processes.procfs.identify(os.getpid()),)
        assert (named(seen, one).local, named(seen, one).protocol) == ("::1", 17)
        assert named(seen, two).remote_port == 9


def test_owners_follow_inheritance_and_exit(pair):
    _, dialled, _ = pair
    inode = os.fstat(dialled.fileno()).st_ino
    owners = sockets.Owners()
    me = processes.procfs.identify(os.getpid())
    assert owners.of({inode}, 0)[0] == {inode: (me,)}
    child = subprocess.Popen(["sleep", "60"], pass_fds=[dialled.fileno()])
    while b"sleep" not in Path(f"/proc/{child.pid}/comm").read_bytes():
        pass
    heir = processes.procfs.identify(child.pid)
    assert owners.of({inode}, 1)[0] == {inode: (me,)}, "not looked up again at once"
    assert set(owners.of({inode}, 10**9)[0][inode]) == {me, heir}
    child.kill()
    child.wait()
    assert owners.of({inode}, 10**9 + 1)[0] == {inode: (me,)}, "a dead owner is noticed at once"


def test_unreadable_owners_are_said():
    class Blind(sockets.Owners):
        def _look(self, inodes, now_ns):
            super()._look(inodes, now_ns)
            self._complete = False

    _, certain = Blind().of({2**31 - 1}, 0)
    assert not certain


NEIGHBOUR = """
import socket, sys, time
server = socket.create_server(("0.0.0.0", 7777))
print("ready", flush=True)
sys.stdin.read()
"""


def threads_elsewhere():
    spaces = set()
    for task in os.listdir("/proc/self/task"):
        with contextlib.suppress(FileNotFoundError):
            spaces.add(Path(f"/proc/self/task/{task}/ns/net").stat().st_ino)
    return spaces - {OWN}


@needs_root
def test_the_namespace_of_another_process():
    child = subprocess.Popen(["unshare", "--net", sys.executable, "-c", NEIGHBOUR], stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE)
    assert child.stdout.readline() == b"ready\n"
    there = Path(f"/proc/{child.pid}/ns/net").stat().st_ino
    seen = sockets.read_sockets(child.pid)
    assert seen.netns == there != OWN
    assert [(one.local_port, one.state, one.owners) for one in seen.sockets] == [
        (7777, 10, (processes.procfs.identify(child.pid),))]
    assert Path("/proc/self/ns/net").stat().st_ino == OWN
    deadline = time.monotonic() + 60  # a thread that was joined may take a moment to leave the kernel's list
    while threads_elsewhere() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not threads_elsewhere()

    sensor = sockets.open_sensor(Direct(), Config())
    started = processes.procfs.read_process(child.pid)
    sensor.notice(started)
    both = {block.netns for block in sensor.read(0) if isinstance(block, Sockets)}
    assert both == {OWN, there}
    child.communicate(b"")
    sensor.notice(ProcessExited(0, started.process))
    sensor._due_ns = 0
    assert {block.netns for block in sensor.read(0) if isinstance(block, Sockets)} <= {OWN}
    sensor.close()


def test_no_such_process_is_refused():
    answer, descriptors = sockets.grant(ReadSockets(2**22 + 5))
    assert isinstance(answer, Refused)
    assert descriptors == ()


# -- the sensor -------------------------------------------------------------------------------------------------------


class Direct:
    def ask(self, request):
        return sockets.grant(request)


def snapshot(netns, *inodes, complete=True, time_ns=0):
    rows = tuple(Socket(6, "10.0.0.1", inode, "10.0.0.2", 22, 1, inode, 0) for inode in inodes)
    return Sockets(time_ns, netns, rows, complete)


class Script:
    def __init__(self, answers):
        self.answers = answers
        self.asked = []

    def ask(self, request):
        self.asked.append(request.pid)
        answer = self.answers[request.pid]
        return (SocketsRead(answer) if isinstance(answer, Sockets) else Refused(answer)), ()


def look(sensor):
    sensor._due_ns = 0
    return sensor.read(5)


def test_what_did_not_change_is_not_told_again():
    broker = Script({0: snapshot(1, 7)})
    sensor = sockets.SocketSensor(broker, 10**9)
    assert sensor.read(5) == [broker.answers[0]]
    assert sensor.read(5) == [], "not due"
    assert look(sensor) == []
    broker.answers[0] = snapshot(1, 7, 8)
    assert look(sensor) == [broker.answers[0]]
    broker.answers[0] = snapshot(1, 7, 8, time_ns=sockets.sensor.UNCHANGED_MAX_NS)
    assert look(sensor) == [broker.answers[0]]
    sensor.close()


def test_failure_is_a_gap_once_for_each_reason():
    broker = Script({0: "may not"})
    sensor = sockets.SocketSensor(broker, 10**9)
    assert look(sensor) == [Gap(5, "sockets", "may not", since_ns=5)]
    assert look(sensor) == []
    broker.answers[0] = snapshot(1, 7, complete=False)
    gap, seen = look(sensor)
    assert "owners" in gap.reason
    assert not seen.complete
    broker.answers[0] = snapshot(1, 7)
    look(sensor)
    broker.answers[0] = "may not"
    assert len(look(sensor)) == 1
    sensor.close()


def started(pid, netns):
    return ProcessStarted(0, ProcessId("b", pid, 1), None, "x", (), netns=netns)


def test_a_namespace_is_seen_through_whoever_is_left_in_it():
    broker = Script({0: snapshot(1), 50: snapshot(2, 9), 51: snapshot(2, 9), 52: "gone"})
    sensor = sockets.SocketSensor(broker, 10**9)
    look(sensor)
    for pid in (50, 51):
        sensor.notice(started(pid, 2))
    sensor.notice(started(60, 1))
    assert look(sensor) == [broker.answers[50]]
    broker.answers[50] = snapshot(1)
    broker.answers[51] = snapshot(2, 9, 10)
    broker.asked.clear()
    assert look(sensor) == [broker.answers[51]], "50 moved away: never taken for the namespace that it left"
    assert broker.asked == [0, 50, 51]
    sensor.notice(ProcessExited(0, ProcessId("b", 51, 1)))
    broker.asked.clear()
    look(sensor)
    look(sensor)
    assert broker.asked == [0, 0]
    sensor.close()


def test_waking_makes_it_readable_soon_and_twice():
    broker = Script({0: snapshot(1)})
    sensor = sockets.SocketSensor(broker, 3600 * 10**9)
    sensor.read(5)
    assert select.select([sensor.descriptor], [], [], 0)[0] == []
    for _ in range(100):
        sensor.wake()
    for _ in range(2):
        assert select.select([sensor.descriptor], [], [], LOOK_S)[0], "due long before its interval"
        sensor.read(5)
    assert broker.asked == [0, 0, 0]
    assert select.select([sensor.descriptor], [], [], 0)[0] == []
    assert sensor._due_ns > time.monotonic_ns() + 3000 * 10**9
    sensor.close()


def test_a_new_connection_is_joined_before_its_interval():
    sensor = sockets.SocketSensor(Direct(), 3600 * 10**9)
    sensor.read(5)
    listening = socket.create_server(("127.0.0.1", 0))
    dialled = socket.create_connection(listening.getsockname())
    sensor.wake()
    assert select.select([sensor.descriptor], [], [], LOOK_S)[0]
    (seen,) = [block for block in sensor.read(5) if isinstance(block, Sockets)]
    assert named(seen, dialled).owners == (processes.procfs.identify(os.getpid()),)
    accepted, _ = listening.accept()
    assert select.select([sensor.descriptor], [], [], LOOK_S)[0]
    (seen,) = [block for block in sensor.read(5) if isinstance(block, Sockets)]
    assert named(seen, accepted).owners == (processes.procfs.identify(os.getpid()),)
    for one in (listening, dialled, accepted):
        one.close()
    sensor.close()


def test_many_sockets_travel_in_a_sealed_memfd(monkeypatch):
    many = snapshot(1, *range(1, 5001))
    monkeypatch.setattr(sockets, "read_sockets", lambda pid: many)
    answer, descriptors = sockets.grant(ReadSockets())
    assert len(msgspec.msgpack.encode(answer)) < 1000
    with pytest.raises(PermissionError):
        os.write(descriptors[0], b"x")
    assert sockets.sensor.unpack(answer, descriptors) == many
    with pytest.raises(OSError):
        os.fstat(descriptors[0])


def test_a_hostile_memfd_is_a_gap():
    class Odd:
        def ask(self, request):
            descriptor = os.memfd_create("odd")
            os.write(descriptor, b"\xc1garbage")
            return SocketsRead(snapshot(1)), (descriptor,)

    sensor = sockets.SocketSensor(Odd(), 10**9)
    (gap,) = sensor.read(5)
    assert isinstance(gap, Gap)
    sensor.close()
