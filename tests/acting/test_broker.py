"""The broker as a process: what a guard may say, what becomes of what it did, and who undoes it when somebody dies."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys

import msgspec
import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpuguard import messages, paths, proctree
from gpuguard.broker import audit, boxes, control, journal
from gpuguard.broker.requests import GRANTS, HANDLERS, OPERATOR_HANDLERS, VERSION
from gpuguard.broker.running import STOP_S
from gpuguard.broker.service_manager import ServiceManager
from gpuguard.broker.serving import Broker
from gpuguard.broker_client import BrokerClient, BrokerGone
from gpuguard.cli.commands import disarm, release, stop
from gpuguard.messages import (
    MESSAGE_BYTES_MAX,
    Acted,
    Approve,
    Audit,
    Done,
    Hello,
    ListActions,
    OpenPackets,
    ReadSockets,
    Refused,
    Request,
    Undo,
    Watching,
    Welcome,
)
from tests.acting.tools import HOST_ROOT, ROOT, act, goes_on, state, until

IDLE = "import time; time.sleep(600)"


@pytest.fixture
def pair(enforcement):
    """Return (broker, the guard's raw end); the broker lives in this process and is stepped by hand."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    broker = Broker(enforcement(enforcing=False), ours)
    yield broker, theirs
    ours.close()
    theirs.close()
    broker._selector.close()


def say(broker, end, data):
    """Send raw bytes and let the broker answer; return the decoded answer, None where it ended the connection."""
    end.send(data)
    while not broker.guard_over:
        broker.step(0.01)
        with contextlib.suppress(BlockingIOError):
            answer = end.recv(MESSAGE_BYTES_MAX, socket.MSG_DONTWAIT)
            return msgspec.msgpack.decode(answer, type=messages.Answer) if answer else None
    return None


def ask(broker, end, request):
    return say(broker, end, msgspec.msgpack.encode(request))


def test_every_request_of_the_table_has_one_handler():
    assert set(HANDLERS) | set(OPERATOR_HANDLERS) == set(Request.__args__)
    assert Approve not in HANDLERS, "a guard cannot approve"
    assert set(OPERATOR_HANDLERS) - set(HANDLERS) == {Approve}
    assert not set(OPERATOR_HANDLERS) & set(GRANTS), "an operator's command opens nothing"


def test_a_conversation(pair):
    broker, end = pair
    welcome = ask(broker, end, Hello(VERSION))
    assert isinstance(welcome, Welcome)
    assert (welcome.boot_id, welcome.enforcing) == (proctree.boot_id(), False)
    assert set(welcome.eyes) == {"packets", "processes", "sockets", "launches"}
    assert ask(broker, end, ListActions()) == Acted(())
    assert ask(broker, end, Audit(5, "finding", {"text": "x"})) == Done()
    assert isinstance(ask(broker, end, Audit(5, "finding", {"text": msgspec.msgpack.Ext(1, b"")})), Refused)
    assert ask(broker, end, Undo("none", "")).outcomes[0].outcome == "refused"
    [entry] = [entry for entry in audit.read(paths.log_dir()) if entry.kind == "finding"]
    assert (entry.source, entry.time_ns) == ("guard", 5)


def test_the_guard_cannot_speak_as_the_broker(pair):
    broker, end = pair
    ask(broker, end, Hello(VERSION))
    ask(broker, end, Audit(5, "act.done", {"decision_id": "x", "source": "broker"}))
    assert [entry.source for entry in audit.read(paths.log_dir()) if entry.kind == "act.done"] == ["guard"]


@pytest.mark.parametrize("raw", [
    b"", b"\x00", b"\xc1", b"x" * (MESSAGE_BYTES_MAX + 1), msgspec.msgpack.encode({"type": "format_disk"}),
    msgspec.msgpack.encode({"type": "act"}), msgspec.msgpack.encode({"type": "read_process", "pid": "1"}),
    msgspec.msgpack.encode({"type": "welcome"}), msgspec.msgpack.encode(Hello(VERSION)),
    b"\x91" * 5000, msgspec.msgpack.encode(ListActions()) + b"\x00",
])
def test_anything_else_ends_the_connection(pair, raw):
    broker, end = pair
    ask(broker, end, Hello(VERSION))
    assert say(broker, end, raw) is None
    assert broker.guard_over


def test_a_connection_begins_with_hello(pair):
    broker, end = pair
    assert ask(broker, end, ListActions()) is None
    assert broker.guard_over
    assert [entry.kind for entry in audit.read(paths.log_dir())] == ["unpermitted"]


def test_descriptors_sent_to_the_broker_end_the_connection_and_do_not_stay(pair):
    broker, end = pair
    ask(broker, end, Hello(VERSION))
    ask(broker, end, Audit(1, "the log is open", {}))
    before = len(os.listdir("/proc/self/fd"))
    socket.send_fds(end, [msgspec.msgpack.encode(ListActions())], [0])
    while not broker.guard_over:
        broker.step(0.01)
    assert len(os.listdir("/proc/self/fd")) == before - 1, "only the connection itself is gone"


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(raw=st.one_of(
    st.binary(max_size=300),
    st.recursive(st.none() | st.booleans() | st.integers(-2**63, 2**64 - 1) | st.floats() | st.text() | st.binary(),
                 lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)).map(msgspec.msgpack.encode),
    st.fixed_dictionaries({"type": st.sampled_from(["act", "undo", "audit", "hello", "disarm", "list_actions"])},
                          optional={name: st.integers() | st.text() for name in ("version", "pid", "decision_id")})
    .map(lambda one: msgspec.msgpack.encode(one) if all(
        not isinstance(v, int) or -2**63 <= v < 2**64 for v in one.values()) else b"\xc1"),
))
def test_any_bytes_are_an_answer_or_an_end(enforcement_once, raw):
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    broker = Broker(enforcement_once, ours)
    try:
        assert isinstance(ask(broker, theirs, Hello(VERSION)), Welcome)
        answer = say(broker, theirs, raw)
        assert (answer is None) == broker.guard_over
    finally:
        theirs.close()
        ours.close()
        broker._selector.close()


@pytest.fixture
def enforcement_once(enforcement):
    return enforcement(enforcing=False)


def test_a_sensor_that_fails_is_a_refusal(pair, monkeypatch):
    broker, end = pair
    ask(broker, end, Hello(VERSION))
    monkeypatch.setitem(GRANTS, ReadSockets, "no_such_sensor")
    answer = ask(broker, end, ReadSockets(1))
    assert isinstance(answer, Refused)
    assert "no_such_sensor" in answer.reason
    assert not broker.guard_over


def test_descriptors_reach_the_guard_and_leave_the_broker(pair, monkeypatch):
    broker, end = pair
    ask(broker, end, Hello(VERSION))
    read, write = os.pipe()

    class Sensor:
        @staticmethod
        def grant(request):
            return messages.Opened(("pipe",), "test"), (os.dup(read),)

    monkeypatch.setitem(sys.modules, "gpuguard.sensors.acting_test", Sensor)
    monkeypatch.setitem(GRANTS, OpenPackets, "acting_test")
    client = BrokerClient(end.detach())
    client._socket.send(msgspec.msgpack.encode(OpenPackets("", 64, 4096)))
    before = len(os.listdir("/proc/self/fd"))
    broker.step(1.0)
    answer, descriptors, _ = client._receive()
    assert len(os.listdir("/proc/self/fd")) == before + len(descriptors) == before + 1
    assert msgspec.msgpack.decode(answer, type=messages.Answer).mode == "test"
    os.write(write, b"through")
    assert os.read(descriptors[0], 9) == b"through"
    for one in (*descriptors, read, write):
        os.close(one)
    client.close()


def test_a_greedy_guard_is_slowed_down_and_not_refused(pair):
    broker, end = pair
    ask(broker, end, Hello(VERSION))
    connection = broker._guard
    for _ in range(60):
        assert isinstance(ask(broker, end, Undo("none", "")), Acted)
        if connection.wait_s() > 0:
            break
    assert connection.wait_s() > 0
    assert isinstance(ask(broker, end, ListActions()), Acted)


@pytest.fixture(params=["path", "abstract"])
def manager(request, folders, monkeypatch):
    """The socket of a service manager; what was told can be read without waiting."""
    name = str(folders / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as hearing:
        hearing.setblocking(False)
        hearing.bind("\0" + name if request.param == "abstract" else name)
        monkeypatch.setenv("NOTIFY_SOCKET", "@" + name if request.param == "abstract" else name)
        monkeypatch.setattr("gpuguard.broker.requests.MANAGER", ServiceManager())
        yield hearing


def test_the_service_manager_hears_that_the_guard_watches_only_when_the_guard_says_so(pair, manager):
    broker, end = pair
    ask(broker, end, Hello(VERSION))
    ask(broker, end, ListActions())
    broker.step(0)
    with pytest.raises(BlockingIOError):
        manager.recv(4096)
    assert ask(broker, end, Watching("observe: packets")) == Done()
    assert manager.recv(4096) == b"READY=1\nSTATUS=observe: packets\nWATCHDOG=1"
    ask(broker, end, Watching("observe: packets"))
    assert manager.recv(4096) == b"WATCHDOG=1"
    ask(broker, end, Watching("observe: no eye is open"))
    assert manager.recv(4096) == b"READY=1\nSTATUS=observe: no eye is open\nWATCHDOG=1"


def test_a_guard_tells_the_service_manager_no_more_than_one_line(pair, manager):
    broker, end = pair
    ask(broker, end, Hello(VERSION))
    ask(broker, end, Watching("x\nMAINPID=1\x00\u202e" + "y" * 10_000))
    ready, status, watchdog = manager.recv(65_536).decode().split("\n")
    assert (ready, watchdog) == ("READY=1", "WATCHDOG=1")
    assert status.startswith("STATUS=x\\x0aMAINPID=1\\x00\\u202ey")
    assert len(status) < 300


def test_a_service_manager_without_room_is_not_waited_for_and_told_with_the_next(pair, manager):
    broker, end = pair
    ask(broker, end, Hello(VERSION))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as others, contextlib.suppress(BlockingIOError):
        others.setblocking(False)
        while True:
            others.sendto(b"X=1", manager.getsockname())
    assert ask(broker, end, Watching("observe: packets")) == Done()
    with contextlib.suppress(BlockingIOError):
        while manager.recv(4096) == b"X=1":
            pass
    ask(broker, end, Watching("observe: packets"))
    assert manager.recv(4096).startswith(b"READY=1\n")
    manager.close()
    assert ask(broker, end, Watching("observe: packets")) == Done(), "and one that is gone is nobody's end"


def test_a_gone_broker_is_said_clearly():
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    client = BrokerClient(theirs.detach())
    assert client.descriptor > 0
    ours.close()
    with pytest.raises(BrokerGone):
        client.ask(Hello(VERSION))
    with pytest.raises(ValueError, match="at most"):
        client.ask(Audit(1, "x", {"y": "z" * MESSAGE_BYTES_MAX}))
    client.close()


# -- as processes -----------------------------------------------------------------------------------------------------

BROKER = """
import json, sys
from gpuguard.broker import boxes, enforcement, running, serving
from gpuguard.config import Config, GuardSettings
from gpuguard.broker.protected import Limits
guard, more = sys.argv[1], sys.argv[2]
boxes.FREEZE_WAIT_S = 100.0
exec(more)
sys.exit(running.start(Config(guard=GuardSettings(mode="enforce")), handover=b"handed over",
                      argv=[sys.executable, "-c", guard], limits=Limits(grace_s=600)))
"""

GUARD = """
import json, os, signal, sys, time
from gpuguard import confine
from gpuguard.broker_client import BrokerClient
from gpuguard.messages import *
from gpuguard.core.subjects import ProcessId
def number(name): return int(sys.argv[sys.argv.index(name) + 1])
if "keep" not in globals():
    confine.drop((number("--uid"), number("--gid")) if "--uid" in sys.argv else None, number("--parent"))
broker = BrokerClient(int(sys.argv[sys.argv.index("--broker-fd") + 1]))
handed = os.read(int(sys.argv[sys.argv.index("--start-fd") + 1]), 99).decode()
welcome, _ = broker.ask(Hello(1))
def say(value): print(json.dumps(value), flush=True)
"""

STATUS = GUARD + """
text = open("/proc/self/status").read()
fields = dict(line.split(":\\t", 1) for line in text.splitlines() if ":\\t" in line)
try:
    os.setuid(0); regained = True
except OSError:
    regained = False
try:
    os.open(os.environ["GPUGUARD_STATE_DIR"] + "/journal.jsonl", os.O_RDONLY); read = True
except OSError:
    read = False
wrote = os.open(os.environ["GPUGUARD_STATE_DIR"] + "/guard/mine", os.O_CREAT | os.O_WRONLY) > 0
say({"handed": handed, "welcome": type(welcome).__name__, "uid": os.getuid(), "groups": os.getgroups(), "read": read,
     "caps": [fields[name] for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")], "regained": regained,
     "no_new_privs": fields["NoNewPrivs"], "wrote": wrote, "secret": "CLOUD_SECRET_KEY" in os.environ,
     "fds": sorted(int(x) for x in os.listdir("/proc/self/fd"))})
sys.exit(7)
"""

ACTING = GUARD + """
whom = ProcessId(**json.loads(os.environ["GPUGUARD_TEST_TARGET"]))
answer, _ = broker.ask(Act(**{**json.loads(os.environ["GPUGUARD_TEST_ACT"]), "target": whom}))
say(answer.outcomes[0].outcome + ": " + answer.outcomes[0].text)
"""

WAITING = ACTING + """
def end(*_): sys.exit(0)
signal.signal(signal.SIGTERM, end)
time.sleep(600)
"""

STUBBORN = ACTING + """
signal.signal(signal.SIGTERM, signal.SIG_IGN)
time.sleep(600)
"""


@pytest.fixture
def start(folders, spawn):
    """Return a function that starts a broker process with a stand-in for the guard."""

    def begin(guard, target=None, more="pass", **changes):
        environ = {**os.environ, "CLOUD_SECRET_KEY": "of who started it"}
        if target is not None:
            fields = msgspec.to_builtins(act(target, **changes))
            whom = fields.pop("target")
            whom.pop("type")
            fields.pop("type")
            environ |= {"GPUGUARD_TEST_ACT": json.dumps(fields), "GPUGUARD_TEST_TARGET": json.dumps(whom)}
        return spawn(BROKER, guard, more, env=environ, cwd=ROOT, stdout=subprocess.PIPE, text=True)

    return begin


def said(child):
    """Return the next thing the guard said; the broker's own log lines are passed over."""
    while line := child.stdout.readline():
        with contextlib.suppress(ValueError):
            return json.loads(line)
    raise AssertionError("nothing was said")


@pytest.fixture
def target(spawn, park):
    """Return a process in a cgroup of its own."""
    child = spawn(IDLE)
    park(child.pid)
    return child


def still(pid):
    cgroup = proctree.cgroup_of(pid)
    return proctree.without_boxes(cgroup) != cgroup and boxes.is_frozen(boxes.Box(cgroup, ""))


@pytest.mark.skipif(not HOST_ROOT, reason="needs the host's root: it has privileges to drop")
def test_the_guard_has_nothing(start):
    child = start(STATUS, more="running.LEAVE_S = 100.0")
    found = said(child)
    assert found["handed"] == "handed over"
    assert found["uid"] not in {0, None}
    assert set(found["caps"]) == {"0" * 16}
    assert (found["groups"], found["no_new_privs"], found["regained"]) == ([], "1", False)
    assert (found["read"], found["wrote"], found["secret"]) == (False, True, False)
    assert len(found["fds"]) <= 7, "standard streams, its socket, its start, its own file, the listing"
    assert child.wait() == 7, "the guard's exit status is the broker's"


@pytest.mark.skipif(HOST_ROOT, reason="the host's root drops more, which another test shows")
def test_the_guard_of_a_user_gains_nothing(start):
    found = said(start(STATUS))
    assert (found["caps"][2], found["no_new_privs"]) == ("0" * 16, "1")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: only root has privileges to keep")
def test_a_guard_that_kept_its_privileges_is_not_served(start):
    child = start("keep = True\n" + GUARD + "say('welcomed')")
    assert child.wait() == 1
    assert "welcomed" not in child.stdout.read()
    [entry] = [one for one in audit.read(paths.log_dir()) if one.kind == "unpermitted"]
    assert "kept its privileges" in entry.body["reason"]


def test_when_the_guard_ends_all_is_undone(start, target):
    child = start(ACTING + "sys.exit(3)", target.pid)
    assert said(child).startswith("done")
    assert child.wait() == 3
    assert not still(target.pid)
    assert goes_on(target.pid)
    assert audit.verify(paths.log_dir()).ok


def test_when_the_guard_is_killed_all_is_undone(start, target):
    child = start(WAITING, target.pid)
    assert said(child).startswith("done")
    assert still(target.pid)
    [guard] = [one.pid for one in proctree.tree([child.pid]) if one.pid != child.pid]
    os.kill(guard, signal.SIGKILL)
    assert child.wait() == 128 + signal.SIGKILL
    assert "the guard has ended by itself" in child.stdout.read()
    assert not still(target.pid)


@pytest.mark.parametrize("guard", [WAITING, STUBBORN])
def test_sigterm_undoes_all_and_ends_also_when_the_guard_does_not(start, target, guard):
    assert STOP_S + boxes.FREEZE_WAIT_S < 2.0, "what we wait for at most leaves room within the two seconds"
    child = start(guard, target.pid)
    assert said(child).startswith("done")
    assert still(target.pid)
    child.terminate()
    child.wait()
    assert not still(target.pid)
    assert not paths.control_socket().exists()


BUG = """
real = serving.Broker.step
def step(self, wait_s):
    real(self, wait_s)
    if self._enforcement.in_force():
        raise RuntimeError("a bug")
serving.Broker.step = step
"""


def test_a_bug_in_the_broker_undoes_all_and_ends_the_guard(start, target):
    child = start(WAITING, target.pid, BUG)
    assert child.wait() == 1
    assert not still(target.pid)
    assert goes_on(target.pid)
    assert CliRunner().invoke(release.command, ["--list"]).output == "nothing is in force\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_closed_terminal_undoes_all(start, target, number):
    child = start(WAITING, target.pid)
    assert said(child).startswith("done")
    child.send_signal(number)
    child.wait()
    assert not still(target.pid)


def test_a_guard_that_breaks_the_table_is_ended(start, target):
    child = start(ACTING + "broker._socket.send(b'nonsense'); time.sleep(600)", target.pid)
    assert said(child).startswith("done")
    assert child.wait() != 0
    assert not still(target.pid)
    assert "unpermitted" in [entry.kind for entry in audit.read(paths.log_dir())]


DIE = {
    "after the intent": "boxes.fill = lambda *_: os.kill(os.getpid(), 9)",
    "half way in": "boxes._enter = lambda *_: os.kill(os.getpid(), 9)",
    "before it was verified": "enforcement.ACTIONS['pause'].verify = lambda *_: os.kill(os.getpid(), 9)",
    "while in force": "pass",
}


@pytest.mark.parametrize("moment", DIE)
@pytest.mark.parametrize("who", ["next start", "--all", "--leftovers", "--all without a head"])
def test_sigkill_of_the_broker_at_any_moment_is_undone(start, target, park, monkeypatch, moment, who):
    child = start(WAITING, target.pid, "import os; " + DIE[moment])
    if moment == "while in force":
        assert said(child).startswith("done")
        child.kill()
    assert child.wait() == -signal.SIGKILL
    home = proctree.without_boxes(proctree.cgroup_of(target.pid))
    if who == "next start":
        again = start(GUARD + "say('up'); sys.exit(0)")
        assert said(again) == "up"
        assert again.wait() == 0
    else:
        if who.endswith("head"):
            (paths.log_dir() / audit.HEAD_NAME).write_bytes(b"")
        done = CliRunner().invoke(release.command, [who.split()[0]])
        assert done.exit_code == 0, done.output
    assert proctree.cgroup_of(target.pid) == home
    assert goes_on(target.pid)
    assert [entry for entry in boxes.folder(home).iterdir() if entry.is_dir()] == []
    assert CliRunner().invoke(release.command, ["--list"]).output == "nothing is in force\n"


def test_the_guard_dies_with_a_killed_broker(start, target):
    child = start(WAITING, target.pid)
    said(child)
    [guard] = [one.pid for one in proctree.tree([child.pid]) if one.pid != child.pid]
    child.kill()
    child.wait()
    until(lambda: state(guard) in {"gone", "Z"})
    CliRunner().invoke(release.command, ["--all"])


def test_commands_go_through_a_running_broker(start, spawn, park, target):
    child = start(GUARD + "say('up'); time.sleep(600)")
    assert said(child) == "up"
    done = CliRunner().invoke(stop.command, ["--pid", str(target.pid), "-o", "json"])
    assert done.exit_code == 0, done.output
    stopped = json.loads(done.output)
    assert still(target.pid)
    assert stopped["decision_id"] in CliRunner().invoke(release.command, ["--list"]).output
    freed = CliRunner().invoke(release.command, [stopped["decision_id"]])
    assert (freed.exit_code, "undone" in freed.output) == (0, True)
    assert not still(target.pid)
    CliRunner().invoke(stop.command, ["--pid", str(target.pid)])
    assert CliRunner().invoke(disarm.command, []).exit_code == 0
    assert not still(target.pid)
    assert (paths.state_dir() / "disarmed").exists()
    assert CliRunner().invoke(release.command, ["none"]).exit_code == 3
    assert CliRunner().invoke(stop.command, ["--pid", str(child.pid)]).exit_code == 3, "never the broker itself"
    child.terminate()
    child.wait()


def test_nobody_stops_the_shell_that_he_types_in(start, spawn):
    child = start(GUARD + "say('up'); time.sleep(600)")
    said(child)
    python = f"{sys.executable} -c 'from gpuguard.cli import main; main()'"
    shell = subprocess.run(["sh", "-c", f"{python} stop --pid $$; echo $?"], capture_output=True, text=True, check=True)
    assert shell.stdout.endswith("3\n")
    assert "the command that asks" in shell.stdout
    child.terminate()
    child.wait()


def test_a_long_name_of_the_runtime_folder_is_no_obstacle(start, monkeypatch, folders):
    monkeypatch.setenv(paths.RUNTIME_VARIABLE, str(folders / ("long" * 30)))
    child = start(GUARD + "say('up'); time.sleep(600)")
    assert said(child) == "up"
    assert CliRunner().invoke(release.command, ["--list"]).output == "nothing is in force\n"
    child.terminate()
    child.wait()


def test_what_a_person_paused_outlives_the_broker(start, target):
    child = start(GUARD + "say('up'); time.sleep(600)")
    assert said(child) == "up"
    CliRunner().invoke(stop.command, ["--pid", str(target.pid)])
    child.terminate()
    child.wait()
    assert still(target.pid)
    assert CliRunner().invoke(release.command, ["--leftovers"]).output == "nothing is in force\n"
    assert still(target.pid)
    assert "frozen" in CliRunner().invoke(release.command, ["--list"]).output
    CliRunner().invoke(release.command, ["--all"])
    assert not still(target.pid)


@pytest.mark.skipif(not HOST_ROOT, reason="needs the host's root: it becomes another user to knock")
def test_the_operators_socket_is_for_its_owner(start, spawn):
    child = start(GUARD + "say('up'); time.sleep(600)")
    said(child)
    assert paths.control_socket().stat().st_mode & 0o777 == 0o600
    knock = ("import os, socket, sys; os.setuid(65534); s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)\n"
             "try:\n    s.connect(sys.argv[1]); s.send(b'x'); print(s.recv(9))\n"
             "except OSError as e: print('closed', e.errno)")
    command = [sys.executable, "-c", knock, str(paths.control_socket())]
    assert "closed 13" in subprocess.run(command, capture_output=True, text=True, check=True).stdout
    paths.control_socket().chmod(0o666)
    answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert answer.strip() in {"b''", "closed 104", "closed 32"}, "let in by the file, turned away by its credentials"
    child.terminate()
    child.wait()


def test_an_operators_connection_may_ask_only_its_own_table(start):
    child = start(GUARD + "say('up'); time.sleep(600)")
    said(child)
    for request in (OpenPackets("", 64, 4096), Hello(1), Audit(1, "x", {})):
        client = control._connect()
        with pytest.raises(BrokerGone):
            client.ask(request)
        client.close()
    client = control._connect()
    answer, _ = client.ask(act(os.getppid(), "kill", approved_by="alice"))
    assert isinstance(answer, Refused)
    client.close()
    target = act(os.getppid()).target
    control.approve("D-1", target, "a test")
    with pytest.raises(BrokerGone):
        control.approve("D-1", msgspec.structs.replace(target, start_ticks=1), "nobody of that name")
    child.terminate()
    child.wait()


def test_one_broker_at_a_time(start):
    child = start(GUARD + "say('up'); time.sleep(600)")
    said(child)
    second = start(GUARD)
    assert second.wait() == 1
    client = control._connect()
    assert client.ask(ListActions())[0] == Acted(()), "the first one still answers"
    client.close()
    child.terminate()
    child.wait()


@pytest.mark.parametrize("how", ["agent", "job", "pid"])
def test_stop_finds_whom_it_is_told(folders, spawn, how, no_boxes):
    environ = {**os.environ, "ROCK_SANDBOX_ID": "box-77", "SLURM_JOB_ID": "88077"}
    child, other = spawn(IDLE, env=environ), spawn(IDLE)
    until(lambda: proctree.listed_environ(child.pid).get("SLURM_JOB_ID"))
    words = {"agent": "box-77", "job": "88077", "pid": str(child.pid)}
    done = CliRunner().invoke(stop.command, [f"--{how}", words[how], "--for", "30m", "--reason", "a test"])
    assert done.exit_code == 0, done.output
    assert "no guard is running" in done.output
    until(lambda: state(child.pid) == "T")
    assert goes_on(other.pid)
    assert CliRunner().invoke(release.command, ["--all"]).exit_code == 0
    until(lambda: goes_on(child.pid))
    [entry] = [one for one in audit.read(paths.log_dir()) if one.kind == "act.done"]
    assert (entry.body["by"], entry.body["reason"], bool(entry.body["approved_by"])) == ("operator", "a test", True)


@pytest.mark.parametrize(("words", "status"), [
    ([], 2), (["--agent", ""], 2), (["--pid", "5", "--job", "6"], 2), (["--pid", "1"], 2),
    (["--pid", "5", "--for", "soon"], 2),
    (["--agent", "nobody-of-this-name"], 3), (["--job", "no-such-job"], 3), (["--pid", str(2**22 + 1)], 3)])
def test_stop_says_what_is_wrong(folders, words, status):
    done = CliRunner().invoke(stop.command, words)
    assert done.exit_code == status
    assert done.output


def test_a_guard_of_disarm_lifts(folders):
    assert CliRunner().invoke(disarm.command, []).exit_code == 0
    assert "lifted" in CliRunner().invoke(disarm.command, ["--lift"]).output
    assert "not disarmed" in CliRunner().invoke(disarm.command, ["--lift"]).output
    assert json.loads(CliRunner().invoke(disarm.command, ["--lift", "-o", "json"]).output) == {"lifted": False}


@pytest.mark.parametrize("words", [["--all"], ["--list"], ["--leftovers"]])
def test_a_journal_that_cannot_be_read_is_not_nothing_in_force(folders, words):
    paths.make_dir(paths.state_dir())
    (paths.state_dir() / journal.NAME).write_bytes(b"garbage\n")
    done = CliRunner().invoke(release.command, [*words, "-o", "json"])
    assert done.exit_code == 3
    [said_of_it] = [json.loads(line) for line in done.output.splitlines()]
    assert (said_of_it["outcome"], "line 1" in said_of_it["text"]) == ("failed", True)
