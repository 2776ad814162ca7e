"""What an operator's commands speak through: a running broker, or, where none runs, the journal itself.

A broker that runs holds the journal's lock and listens on a socket; a command must not act beside it. Without one the
command takes the lock, acts by the very same code, and gives the lock back.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import secrets
import socket
from typing import TYPE_CHECKING, Protocol

from gpuguard import paths, proctree
from gpuguard.broker import boxes
from gpuguard.broker.enforcement import DISARMED_NAME, Enforcement
from gpuguard.broker.journal import JournalLocked
from gpuguard.broker_client import BrokerClient, BrokerGone
from gpuguard.core.records import ActionOutcome
from gpuguard.messages import Act, Acted, Approve, Disarm, Done, ListActions, Refused, Undo

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gpuguard.core.subjects import ProcessId

Outcomes = list[ActionOutcome]


class Control(Protocol):
    """What an operator can have done."""

    has_broker: bool

    def stop(self, request: Act) -> Outcomes:
        """Pause one tree."""
        ...

    def release(self, decision_id: str, reason: str) -> Outcomes:
        """Undo one act, or all ("")."""
        ...

    def disarm(self, reason: str) -> Outcomes:
        """Turn enforcement off and undo everything."""
        ...

    def recover(self) -> Outcomes:
        """Undo what a broker that is gone left in force; what a person paused stays."""
        ...

    def in_force(self) -> Outcomes:
        """Return what is in force."""
        ...


class _ByBroker:
    has_broker = True

    def __init__(self, client: BrokerClient) -> None:
        self._client = client

    def _ask(self, request: Act | Undo | Disarm | ListActions) -> Outcomes:
        answer, _ = self._client.ask(request)
        if isinstance(answer, Acted):
            return list(answer.outcomes)
        raise BrokerGone(answer.reason if isinstance(answer, Refused) else f"the broker answered {answer}")

    def stop(self, request: Act) -> Outcomes:
        return self._ask(request)

    def release(self, decision_id: str, reason: str) -> Outcomes:
        return self._ask(Undo(decision_id, reason))

    def disarm(self, reason: str) -> Outcomes:
        return self._ask(Disarm(reason))

    def recover(self) -> Outcomes:
        # A broker that runs has done so at its start.
        return []

    def in_force(self) -> Outcomes:
        return self._ask(ListActions())


class _ByHand:
    has_broker = False

    def __init__(self, enforcement: Enforcement) -> None:
        self._enforcement = enforcement

    def stop(self, request: Act) -> Outcomes:
        return [self._enforcement.act(request, "operator")]

    def release(self, decision_id: str, reason: str) -> Outcomes:
        return [*self._enforcement.unreadable(), *self._enforcement.undo(decision_id, reason, "operator")]

    def disarm(self, reason: str) -> Outcomes:
        return [*self._enforcement.unreadable(), *self._enforcement.disarm(reason, "operator")]

    def recover(self) -> Outcomes:
        return [*self._enforcement.unreadable(), *self._enforcement.recover()]

    def in_force(self) -> Outcomes:
        return [*self._enforcement.unreadable(), *self._enforcement.in_force()]


def _connect() -> BrokerClient | None:
    """Return a connection to a running broker, None where none listens."""
    opened = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        folder = os.open(paths.runtime_dir(), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            opened.connect(paths.short(paths.control_socket(), folder))
        finally:
            os.close(folder)
    except (FileNotFoundError, ConnectionRefusedError):
        opened.close()
        return None
    except OSError:
        opened.close()
        raise
    return BrokerClient(opened.detach())


@contextlib.contextmanager
def session() -> Iterator[Control]:
    """Return a way to act. Raises `OSError`, `BrokerGone`, `JournalLocked`, `JournalFailed` or `AuditFailed`.

    Without a broker nothing expires by itself; what is overdue is let go here, the rest is left to who was asked.
    """
    client = _connect()
    if client is not None:
        try:
            yield _ByBroker(client)
        finally:
            client.close()
        return
    state, logs = paths.make_dir(paths.state_dir()), paths.make_dir(paths.log_dir(), mode=0o700)
    try:
        enforcement = Enforcement(state, logs, enforcing=False)
    except JournalLocked as error:
        raise JournalLocked(f"{error}, which does not answer at {paths.control_socket()}; "
                            f"is {paths.RUNTIME_VARIABLE} the same for both?") from error
    try:
        enforcement.tick()
        yield _ByHand(enforcement)
    finally:
        enforcement.close("a command by hand has ended", undo=False)


def approve(decision_id: str, process: ProcessId, reason: str, by: str = "") -> None:
    """Tell the running broker that a person approves one decision about one process.

    Raises `BrokerGone` where none runs or it does not take the approval, `OSError` where it cannot be reached.
    """
    client = _connect()
    if client is None:
        raise BrokerGone("no broker runs here that could act on it")
    try:
        answer, _ = client.ask(Approve(decision_id, process, by or operator(), reason))
    finally:
        client.close()
    if not isinstance(answer, Done):
        raise BrokerGone(answer.reason if isinstance(answer, Refused) else f"the broker answered {answer}")


def request_for(process: ProcessId, ttl_s: float, reason: str) -> Act:
    """Return the request to pause one tree, as it stands now, in the name of whoever runs this command."""
    unified, systemd = proctree.cgroups_of(process.pid)
    cgroup = unified or systemd
    return Act(decision_id=f"stop-{secrets.token_hex(4)}", action="pause", target=process, cgroup=cgroup,
               cgroup_id=boxes.cgroup_id(unified), ttl_s=ttl_s, approved_by=operator(), reason=reason)


def operator() -> str:
    """Return the name of who runs this command (the login before sudo, if there was one)."""
    name = os.environ.get("SUDO_USER")
    if name:
        return name[:64]
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return f"uid {os.getuid()}"


def lift() -> bool:
    """Remove the kill switch; return whether it was set. A running broker sees it at its next act."""
    path = paths.state_dir() / DISARMED_NAME
    was = path.exists()
    path.unlink(missing_ok=True)
    return was
