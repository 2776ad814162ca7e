"""The privileged process: it opens handles, acts, and undoes; it parses nothing but one small table of messages.

Processes: this one (root, single-threaded, holds the journal) starts the guard (unprivileged, no capabilities, no new
privileges) and shares one SOCK_SEQPACKET pair with it. Each request is decoded strictly and looked up in `_HANDLERS`;
what is malformed, oversized or not in the table ends the connection, and with it the guard, and everything in force is
undone. A handle is narrowed by the sensor's ``grant`` before it leaves; our own copy is closed once it is sent. An
operator's commands come by a second socket, mode 0600, and only from root or our own uid (SO_PEERCRED).
After OpenSSH's monitor: a static table from type to handler, death on anything else.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import pwd
import select
import selectors
import signal
import socket
import stat
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import structlog

from gpuguard import confine, paths, proctree
from gpuguard.broker.audit import AuditFailed
from gpuguard.broker.enforcement import Enforcement
from gpuguard.broker.service_manager import MANAGER
from gpuguard.messages import (
    MESSAGE_BYTES_MAX,
    Act,
    Acted,
    Answer,
    Approve,
    Audit,
    Disarm,
    Done,
    Hello,
    ListActions,
    ListProcesses,
    OpenLaunches,
    OpenPackets,
    OpenProcesses,
    OpenReader,
    ReadImage,
    ReadProcess,
    ReadSockets,
    Refused,
    Request,
    ScanLaunches,
    Undo,
    Watching,
    Welcome,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from gpuguard.broker.protected import Limits
    from gpuguard.config import Config

VERSION = 1
STOP_S = 1.0
LEAVE_S = 0.3
# A closed terminal or Ctrl-C ends it as orderly as a service manager does.
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
COST_PER_S = 400.0
COST_MAX = 800.0
CONTROLS_MAX = 8
CONTROL_IDLE_S = 30.0
#: Whom the guard runs as where there is such a user; else as nobody.
GUARD_USER = "gpuguard"
NOBODY = (65534, 65534)
_EYES = {"packets": "packets", "processes": "processes", "sockets": "sockets", "launches": "launches"}

#: Which sensor's ``grant`` answers a request.
_GRANTS: dict[type, str] = {
    OpenPackets: "packets",
    OpenProcesses: "processes",
    ListProcesses: "processes",
    ReadProcess: "processes",
    ReadSockets: "sockets",
    OpenLaunches: "launches",
    ScanLaunches: "launches",
    ReadImage: "launches",
}
#: What one request costs of the budget (`COST_PER_S`); a guard that asks faster is read more slowly, never refused.
_COSTS: dict[type, float] = {OpenPackets: 40, OpenProcesses: 40, OpenLaunches: 40, ScanLaunches: 20, ListProcesses: 10,
                             ReadSockets: 10, ReadImage: 20, OpenReader: 100, Act: 20, Undo: 20, Disarm: 20, Audit: 4}

_log: structlog.stdlib.BoundLogger = structlog.get_logger("gpuguard.broker")

Reply = tuple[Answer, tuple[int, ...]]


class Unpermitted(Exception):
    """The other side said something outside the table. The connection ends."""


class Connection:
    """One peer: its socket, who it is, and how much it may still ask."""

    def __init__(self, peer: socket.socket, *, operator: bool, pid: int = 0) -> None:
        self.peer = peer
        self.pid = pid
        self.operator = operator
        self.greeted = operator
        self._budget = COST_MAX
        self._paid_at_s = time.monotonic()
        self._decoder = msgspec.msgpack.Decoder(Request)

    def wait_s(self) -> float:
        """Return how long not to read from it: its budget is spent."""
        now = time.monotonic()
        self._budget = min(COST_MAX, self._budget + (now - self._paid_at_s) * COST_PER_S)
        self._paid_at_s = now
        return max(0.0, -self._budget / COST_PER_S)

    def receive(self) -> Request | None:
        """Return the next request, None at the end; raises `Unpermitted`."""
        # No room for control data: descriptors that are sent to us are discarded by the kernel, and reported.
        data, _, flags, _ = self.peer.recvmsg(MESSAGE_BYTES_MAX + 1, 0, socket.MSG_DONTWAIT)
        if not data and not flags & socket.MSG_CTRUNC:
            return None
        if flags & socket.MSG_CTRUNC:
            raise Unpermitted("descriptors were sent to the broker")
        if flags & socket.MSG_TRUNC or len(data) > MESSAGE_BYTES_MAX:
            raise Unpermitted(f"a message of more than {MESSAGE_BYTES_MAX} bytes")
        try:
            request: Request = self._decoder.decode(data)
        except (msgspec.MsgspecError, ValueError, OverflowError, RecursionError) as error:
            raise Unpermitted(f"not a message of the table: {error}") from error
        self._budget -= _COSTS.get(type(request), 1.0)
        return request

    def send(self, answer: Answer, descriptors: Sequence[int]) -> None:
        """Send one answer; raises `OSError` when the peer is gone."""
        try:
            data = msgspec.msgpack.encode(answer)
        except UnicodeEncodeError:  # a name that somebody gave, and that no sensor made printable
            data, descriptors = msgspec.msgpack.encode(Refused("the answer holds what is no text")), ()
        if len(data) > MESSAGE_BYTES_MAX:
            data = msgspec.msgpack.encode(Refused(f"the answer has {len(data)} bytes, more than fit into a message"))
            descriptors = ()
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"={len(descriptors)}i", *descriptors))]
        self.peer.sendmsg([data], rights if descriptors else [])


class Broker:
    """The loop: the guard's connection, operators' connections, signals, deadlines."""

    def __init__(self, enforcement: Enforcement, guard: socket.socket, control: socket.socket | None = None,
                 guard_pid: int = 0) -> None:
        """Serve the guard on its socket, and operators on the control socket. 0: the guard is in this process."""
        self._enforcement = enforcement
        self._guard_pid = guard_pid
        self._guard = Connection(guard, operator=False)
        self._control = control
        self._connections: dict[Connection, float] = {}
        self._selector = selectors.DefaultSelector()
        self.stopping = False
        self.guard_over = False
        self._watch(self._guard)
        if control:
            self._selector.register(control, selectors.EVENT_READ, self._accept)

    def watch(self, descriptor: int, then: Callable[[], None]) -> None:
        """Call ``then`` whenever the descriptor is readable."""
        self._selector.register(descriptor, selectors.EVENT_READ, then)

    def step(self, wait_s: float) -> None:
        """Wait for at most so long, and do what is due."""
        due_ns = self._enforcement.next_ns()
        wait_s = wait_s if due_ns is None else min(wait_s, due_ns / 1e9)
        resting = [wait for connection in self._connections if (wait := connection.wait_s()) > 0]
        for key, _ in self._selector.select(min([wait_s, *resting])):
            key.data()
        self._enforcement.tick()
        self._drop_idle()

    def _watch(self, connection: Connection) -> None:
        self._connections[connection] = time.monotonic()
        self._selector.register(connection.peer, selectors.EVENT_READ, lambda: self._serve(connection))

    def _drop_idle(self) -> None:
        now = time.monotonic()
        for connection, since in list(self._connections.items()):
            if connection.operator and now - since > CONTROL_IDLE_S:
                self._end(connection)

    def _accept(self) -> None:
        if self._control is None:
            return
        peer, _ = self._control.accept()
        pid, uid, _ = struct.unpack("=iII", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        if uid not in {0, os.geteuid()} or len(self._connections) > CONTROLS_MAX:
            _log.warning("operator connection refused", uid=uid)
            peer.close()
            return
        self._watch(Connection(peer, operator=True, pid=pid))

    def _end(self, connection: Connection) -> None:
        if connection not in self._connections:
            return
        del self._connections[connection]
        self._selector.unregister(connection.peer)
        connection.peer.close()
        if connection is self._guard:
            self.guard_over = True

    def _serve(self, connection: Connection) -> None:
        if connection.wait_s() > 0:
            # Its socket stays readable meanwhile; a short sleep is the price of one loop for all.
            time.sleep(min(connection.wait_s(), 0.02))
            return
        try:
            request = connection.receive()
            if request is None:
                self._end(connection)
                return
            self._connections[connection] = time.monotonic()
            answer, descriptors = self._answer(connection, request)
        except BlockingIOError:
            return
        except (Unpermitted, ConnectionError) as error:
            self._complain(connection, str(error))
            self._end(connection)
            return
        try:
            connection.send(answer, descriptors)
        except OSError as error:
            _log.warning("answer not sent", error=str(error))
            self._end(connection)
        finally:
            for one in descriptors:
                os.close(one)

    def _complain(self, connection: Connection, text: str) -> None:
        who = "operator" if connection.operator else "guard"
        _log.error("connection ended", peer=who, reason=text)
        with contextlib.suppress(AuditFailed):
            self._enforcement.enter(time.time_ns(), "operator" if connection.operator else "guard", "unpermitted",
                                    {"reason": text[:512]})

    def _answer(self, connection: Connection, request: Request) -> Reply:
        handler = (_OPERATOR_HANDLERS if connection.operator else _HANDLERS).get(type(request))
        if handler is None:
            raise Unpermitted(f"{type(request).__name__} is not for this connection to ask")
        if isinstance(request, Hello) == connection.greeted:
            raise Unpermitted("a connection begins with one Hello")
        if isinstance(request, Hello) and self._guard_pid and (left := confine.left_of(self._guard_pid)):
            raise Unpermitted(f"a guard that kept its privileges is not served: {left}")
        connection.greeted = True
        self._enforcement.asking = connection.pid
        if self.stopping and isinstance(request, Act):
            return Refused("the broker is ending"), ()
        return handler(self._enforcement, request)


# -- handlers ---------------------------------------------------------------------------------------------------------


def _hello(enforcement: Enforcement, request: Hello) -> Reply:
    if request.version != VERSION:
        return Refused(f"this broker speaks version {VERSION}, not {request.version}"), ()
    return Welcome(boot_id=proctree.boot_id(), hostname=socket.gethostname(),
                   clock_ticks_per_s=os.sysconf("SC_CLK_TCK"), enforcing=enforcement.enforcing,
                   eyes={eye: _closed(module) for eye, module in _EYES.items()}), ()


def _closed(module: str) -> str:
    """Return why a sensor's privileged half cannot be used at all, "" if it can be asked."""
    try:
        importlib.import_module(f"gpuguard.sensors.{module}").grant  # noqa: B018  only whether it is there
    except (ImportError, AttributeError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    return confine.missing_capability(module)


def _grant(_: Enforcement, request: Request) -> Reply:
    name = _GRANTS[type(request)]
    try:
        reply: Reply = importlib.import_module(f"gpuguard.sensors.{name}").grant(request)
    except Exception as error:  # noqa: BLE001  whatever a sensor stumbles over must not end the process that undoes
        _log.error("sensor failed in the broker", sensor=name, error=f"{type(error).__name__}: {error}")
        return Refused(f"{name}: {type(error).__name__}: {error}"), ()
    return reply


def _open_reader(_: Enforcement, __: OpenReader) -> Reply:
    from gpuguard.code import reader

    return reader.grant(NOBODY if guard_identity() else None)


def _act(enforcement: Enforcement, request: Act) -> Reply:
    return Acted((enforcement.act(request, "guard"),)), ()


def _stop(enforcement: Enforcement, request: Act) -> Reply:
    if request.action != "pause":
        return Refused("by hand a tree can be paused; anything else goes through a decision"), ()
    return Acted((enforcement.act(request, "operator"),)), ()


def _approve(enforcement: Enforcement, request: Approve) -> Reply:
    try:
        enforcement.approve(request)
    except (proctree.Refusal, AuditFailed, OSError) as error:
        return Refused(str(error)), ()
    return Done(), ()


def _undo(enforcement: Enforcement, request: Undo) -> Reply:
    return Acted(tuple(enforcement.undo(request.decision_id, request.reason[:512], by="guard"))), ()


def _undo_any(enforcement: Enforcement, request: Undo) -> Reply:
    return Acted(tuple(enforcement.undo(request.decision_id, request.reason[:512], by="operator"))), ()


def _list(enforcement: Enforcement, _: ListActions) -> Reply:
    return Acted((*enforcement.take_news(), *enforcement.in_force())), ()


def _list_only(enforcement: Enforcement, _: ListActions) -> Reply:
    return Acted(tuple(enforcement.in_force())), ()


def _disarm(enforcement: Enforcement, request: Disarm) -> Reply:
    return Acted(tuple(enforcement.disarm(request.reason, "guard"))), ()


def _disarm_for_good(enforcement: Enforcement, request: Disarm) -> Reply:
    return Acted(tuple(enforcement.disarm(request.reason, "operator"))), ()


def _enter(enforcement: Enforcement, request: Audit) -> Reply:
    try:
        enforcement.enter(request.time_ns, "guard", request.kind[:128], request.body)
    except AuditFailed as error:
        return Refused(str(error)), ()
    return Done(), ()


def _watching(_: Enforcement, request: Watching) -> Reply:
    # Told by nothing else here: a guard that hangs, and a broker that does, both fall silent.
    MANAGER.watching(request.status)
    return Done(), ()


#: Everything that the guard may ask.
_HANDLERS: dict[type, Callable[..., Reply]] = {
    Hello: _hello,
    Act: _act,
    Undo: _undo,
    ListActions: _list,
    Disarm: _disarm,
    Audit: _enter,
    Watching: _watching,
    OpenReader: _open_reader,
    **dict.fromkeys(_GRANTS, _grant),
}
#: Everything that an operator's command may ask.
_OPERATOR_HANDLERS: dict[type, Callable[..., Reply]] = {
    Act: _stop,
    Approve: _approve,
    Undo: _undo_any,
    ListActions: _list_only,
    Disarm: _disarm_for_good,
}


# -- life -------------------------------------------------------------------------------------------------------------


def guard_identity() -> tuple[int, int] | None:
    """Return uid and gid for the guard: the ``gpuguard`` user, else ``nobody``; None where we cannot change ours.

    A root of a user namespace that maps nobody else (user_namespaces(7)) cannot.
    """
    mapped = sum(int(line.split()[2]) for line in Path("/proc/self/uid_map").read_text().splitlines())
    if os.geteuid() != 0 or mapped == 1:
        return None
    for name in (GUARD_USER, "nobody"):
        with contextlib.suppress(KeyError):
            entry = pwd.getpwnam(name)
            return entry.pw_uid, entry.pw_gid
    return NOBODY


def listen_control() -> socket.socket:
    """Open the operator's socket, mode 0600. One left over by a broker that is gone is replaced."""
    path = paths.control_socket()
    paths.make_dir(path.parent)
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise FileExistsError(f"{path} is not a socket")
        path.unlink()
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    before = os.umask(0o177)
    try:
        listening.bind(paths.short(path, folder))
    finally:
        os.umask(before)
        os.close(folder)
    listening.listen(CONTROLS_MAX)
    return listening


def start(config: Config, *, handover: bytes = b"", argv: Sequence[str] | None = None,
          limits: Limits | None = None) -> int:
    """Be the broker: undo what is left over, start the guard, serve it until it ends, undo, and return its exit status.

    ``handover`` reaches the guard as a sealed, read-only memfd (``--start-fd``). ``argv`` is the guard's command, to
    which ``--broker-fd N --start-fd M`` are appended. Raises `JournalLocked` where a broker runs already, and
    `JournalFailed`, `AuditFailed` or `OSError` where there is no place to write down what would have to be undone.
    """
    identity = guard_identity()
    uid, gid = identity or (None, None)
    state, logs = paths.make_dir(paths.state_dir()), paths.make_dir(paths.log_dir(), mode=0o700)
    paths.make_dir(paths.runtime_dir())
    for folder in (paths.guard_state_dir(), paths.guard_runtime_dir()):
        paths.make_dir(folder, mode=0o700, uid=uid, gid=gid)
    enforcement = Enforcement(state, logs, enforcing=config.guard.mode == "enforce", limits=limits)
    for outcome in [*enforcement.unreadable(), *enforcement.recover()]:
        _log.warning("left by an earlier run", action=outcome.action, outcome=outcome.outcome, text=outcome.text)
    control = listen_control()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = list(argv or [sys.executable, "-P", "-m", "gpuguard.daemon"])
    try:
        guard = confine.spawn(command, theirs, handover, identity)
    except (OSError, subprocess.SubprocessError):
        enforcement.close("the guard could not be started")
        control.close()
        raise
    finally:
        theirs.close()
    enforcement.ours = {os.getpid(), guard.pid}
    try:
        return _supervise(Broker(enforcement, ours, control, guard.pid), guard, enforcement)
    finally:
        control.close()
        paths.control_socket().unlink(missing_ok=True)
        _release_sensors()


class _Ending:
    """How the guard comes to its end: whether it was asked to, until when it may take, and why it is over."""

    def __init__(self, broker: Broker, pidfd: int) -> None:
        self._broker = broker
        self._pidfd = pidfd
        self._lost_until_s: float | None = None
        self._asked_until_s: float | None = None
        self.reason = "the guard has ended"

    @property
    def was_asked(self) -> bool:
        """Whether we, or a signal, told it to end."""
        return self._asked_until_s is not None

    def ask(self) -> None:
        """Tell the guard to end, once."""
        if self._asked_until_s is None:
            self._asked_until_s = time.monotonic() + STOP_S
            self._broker.stopping = True
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGTERM)

    def time_is_up(self) -> bool:
        """Return whether it had its time; where it hung up and stays, it is asked to end first."""
        now_s = time.monotonic()
        if self._broker.guard_over and self._lost_until_s is None:
            # It may be on its way out: let it say its own exit status before it is asked to end.
            self._lost_until_s = now_s + LEAVE_S
        if self._lost_until_s is not None and not self.was_asked and now_s > self._lost_until_s:
            self.reason = "the guard's connection has ended"
            self.ask()
        if self._asked_until_s is None or now_s <= self._asked_until_s:
            return False
        self.reason = "the guard did not end in time"
        return True

    def timeout_s(self) -> float:
        """Return how long there is nothing to see to but the guard's requests."""
        until_s = self._lost_until_s if self._asked_until_s is None else self._asked_until_s
        return 60.0 if until_s is None else max(0.0, until_s - time.monotonic())


@contextlib.contextmanager
def _stop_signals() -> Iterator[int]:
    """Yield a descriptor that can be read once a signal said stop."""
    read, write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    before = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    handlers = {number: signal.signal(number, lambda *_: None) for number in _STOP_SIGNALS}
    try:
        yield read
    finally:
        signal.set_wakeup_fd(before)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for descriptor in (read, write):
            os.close(descriptor)


def _supervise(broker: Broker, guard: subprocess.Popen[bytes], enforcement: Enforcement) -> int:
    """Serve until the guard has ended or a signal says stop; then undo everything."""
    pidfd = os.pidfd_open(guard.pid)
    ending = _Ending(broker, pidfd)
    with _stop_signals() as signalled:

        def stop() -> None:
            with contextlib.suppress(BlockingIOError):
                os.read(signalled, 64)
            ending.ask()

        broker.watch(signalled, stop)
        broker.watch(pidfd, lambda: None)
        try:
            while not select.select([pidfd], [], [], 0)[0] and not ending.time_is_up():
                broker.step(ending.timeout_s())
            return _finish(guard, enforcement, ending.reason, asked=ending.was_asked)
        except BaseException:
            # Whatever went wrong here, nobody's work stays stopped for it.
            _finish(guard, enforcement, "the broker failed", asked=True)
            raise
        finally:
            os.close(pidfd)


def _finish(guard: subprocess.Popen[bytes], enforcement: Enforcement, reason: str, *, asked: bool) -> int:
    """Undo first (that is what people wait for), then see the guard off."""
    MANAGER.stopping()
    left = enforcement.close(reason)
    for one in left:
        _log.warning("still in force", decision_id=one.decision_id, action=one.action, process=str(one.process),
                     text=one.text)
    try:
        status = guard.wait(timeout=0.05)
    except subprocess.TimeoutExpired:
        guard.kill()
        status = guard.wait()
    # As a shell says it: 128 and the signal.
    status = status if status >= 0 else 128 - status
    if not asked:
        _log.error("the guard has ended by itself: its acts are undone, and nobody watches now", status=status)
    return status


def _release_sensors() -> None:
    for name in ("code.reader", *(f"sensors.{one}" for one in set(_EYES.values()))):
        module = sys.modules.get(f"gpuguard.{name}")
        release = getattr(module, "release", None)
        if release is not None:
            release()
