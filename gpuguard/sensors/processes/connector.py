"""Process events by the kernel's proc connector (linux/cn_proc.h): root in the first pid and network namespace only.

An event has no start time, so a process that is gone before its /proc was read is counted and not guessed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
import time
from pathlib import Path

from gpuguard.messages import Opened
from gpuguard.sensors.processes.events import EVENTS_MAX, Event, Kind

#: Inode of the first pid namespace, PROC_PID_INIT_INO of linux/proc_ns.h.
FIRST_PID_NAMESPACE = 0xEFFF_FFFC
RECEIVE_BYTES = 1024 * 1024
MESSAGE_BYTES_MAX = 4096
ANSWER_S = 0.5

# linux/connector.h, linux/cn_proc.h
_NETLINK_CONNECTOR, _CN_IDX_PROC, _CN_VAL_PROC, _NLMSG_DONE, _SO_RCVBUFFORCE = 11, 1, 1, 3, 33
_MESSAGE = struct.Struct("=IHHIIIIIIHHIIQ")
_LISTEN = struct.pack("=IHHIIIIIIHHI", 40, _NLMSG_DONE, 0, 0, 0, _CN_IDX_PROC, _CN_VAL_PROC, 0, 0, 4, 0, 1)
_NONE, _FORK, _EXEC, _EXIT = 0, 1, 2, 0x8000_0000


def listen() -> tuple[Opened, tuple[int, ...]]:
    """Ask the kernel for process events; return the socket that hears them. For the broker."""
    if Path("/proc/self/ns/pid").stat().st_ino != FIRST_PID_NAMESPACE:
        raise OSError(errno.EPERM, "only in the first pid namespace")
    opened = socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC, _NETLINK_CONNECTOR)
    try:
        opened.settimeout(ANSWER_S)
        with contextlib.suppress(PermissionError):
            opened.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, RECEIVE_BYTES)
        opened.bind((0, _CN_IDX_PROC))
        opened.send(_LISTEN)
        while True:
            acknowledged = parse_acknowledgement(opened.recv(MESSAGE_BYTES_MAX))
            if acknowledged is not None:
                break
        if acknowledged:
            raise OSError(acknowledged, os.strerror(acknowledged))
    except TimeoutError as error:
        opened.close()
        raise OSError(errno.ETIMEDOUT, "the kernel's proc connector does not answer") from error
    except OSError:
        opened.close()
        raise
    opened.setblocking(False)
    return Opened(("netlink",), "connector"), (opened.detach(),)


class ConnectorSource:
    """The socket as the guard reads it."""

    def __init__(self, descriptor: int) -> None:
        self._socket = socket.socket(fileno=descriptor)
        self._socket.setblocking(False)
        self.descriptor: int | None = descriptor

    def events(self) -> tuple[list[Event], int | None]:
        """Return some events, and how many were lost since the last call (None: some)."""
        zero_ns = time.time_ns() - time.monotonic_ns()
        events: list[Event] = []
        lost: int | None = 0
        while len(events) < EVENTS_MAX:
            try:
                event = parse_connector(self._socket.recv(MESSAGE_BYTES_MAX), zero_ns)
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                lost = None
                continue
            if event:
                events.append(event)
        return events, lost

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()
        self.descriptor = None


def _connector_head(datagram: bytes) -> tuple[int, int] | None:
    """Return (what, time) of a proc connector message, None if it is another's or cut."""
    if len(datagram) < _MESSAGE.size + 16:
        return None
    _, kind, _, _, _, index, value, _, _, _, _, what, _, at_ns = _MESSAGE.unpack_from(datagram)
    return (what, at_ns) if (kind, index, value) == (_NLMSG_DONE, _CN_IDX_PROC, _CN_VAL_PROC) else None


def parse_acknowledgement(datagram: bytes) -> int | None:
    """Return the error number with which the connector answered to listening, None if this is another message."""
    head = _connector_head(datagram)
    return int(struct.unpack_from("=I", datagram, _MESSAGE.size)[0]) if head and head[0] == _NONE else None


def parse_connector(datagram: bytes, monotonic_zero_ns: int) -> Event | None:
    """Return the event of one connector message, None for those of threads and those not asked for.

    ``monotonic_zero_ns`` is the Unix time at which CLOCK_MONOTONIC was 0.
    """
    head = _connector_head(datagram)
    if head is None:
        return None
    first, second, third, fourth = struct.unpack_from("=IIII", datagram, _MESSAGE.size)
    time_ns = monotonic_zero_ns + head[1]
    match head[0]:
        case 1:
            return Event(Kind.FORK, time_ns, third, parent_pid=second) if third == fourth else None
        case 2:
            return Event(Kind.EXEC, time_ns, second)
        case 0x8000_0000:
            return Event(Kind.EXIT, time_ns, second, exit_status=third if first == second else None, whole=False)
    return None
