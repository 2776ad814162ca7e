"""The broker's loop: connections, what they ask, and what time brings.

It parses nothing but one small table of messages (`requests`). Each request is decoded strictly; what is malformed,
oversized or not in the table ends the connection, and with it the guard, and everything in force is undone. An
operator's commands come by a second socket, mode 0600, and only from root or our own uid (SO_PEERCRED).
"""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import struct
import time
from typing import TYPE_CHECKING

import msgspec
import structlog

from gpuguard import confine
from gpuguard.broker.audit import AuditFailed
from gpuguard.broker.requests import COSTS, HANDLERS, OPERATOR_HANDLERS
from gpuguard.messages import MESSAGE_BYTES_MAX, Act, Answer, Hello, Refused, Request

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gpuguard.broker.enforcement import Enforcement
    from gpuguard.broker.requests import Reply

COST_PER_S = 400.0
COST_MAX = 800.0
CONTROLS_MAX = 8
CONTROL_IDLE_S = 30.0

_log: structlog.stdlib.BoundLogger = structlog.get_logger("gpuguard.broker")


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
        self._budget -= COSTS.get(type(request), 1.0)
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
        handler = (OPERATOR_HANDLERS if connection.operator else HANDLERS).get(type(request))
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
