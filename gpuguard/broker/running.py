"""The privileged process from its start to its end: it undoes what was left, starts the guard, serves it, and undoes.

This one is root, single-threaded, and holds the journal. The guard has no capabilities, no new privileges (`confine`),
and shares one SOCK_SEQPACKET pair with it.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import stat
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import structlog

from gpuguard import confine, paths
from gpuguard.broker.enforcement import Enforcement
from gpuguard.broker.requests import EYES
from gpuguard.broker.service_manager import MANAGER
from gpuguard.broker.serving import CONTROLS_MAX, Broker

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from gpuguard.broker.protected import Limits
    from gpuguard.config import Config

STOP_S = 1.0
LEAVE_S = 0.3
# A closed terminal or Ctrl-C ends it as orderly as a service manager does.
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

_log: structlog.stdlib.BoundLogger = structlog.get_logger("gpuguard.broker")


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
    identity = confine.guard_identity()
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
    for name in ("code.reader", *(f"sensors.{one}" for one in EYES)):
        module = sys.modules.get(f"gpuguard.{name}")
        release = getattr(module, "release", None)
        if release is not None:
            release()
