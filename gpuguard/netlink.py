"""Just enough netlink to cut a tree off: one nftables table that lives as long as its socket, and SOCK_DESTROY.

Written out rather than left to ``nft`` because the table then needs no second process to hold it, and because the rule
takes the cgroup's id instead of a path that is looked up again. A table with NFT_TABLE_F_OWNER belongs to the netlink
socket that made it: when that closes, by undo or by the broker's death, the kernel removes it. Nobody else may change
it meanwhile. Sources: linux/netlink.h, linux/netfilter/nfnetlink.h, linux/netfilter/nf_tables.h, linux/inet_diag.h,
linux/sock_diag.h.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import struct
import threading
from typing import TYPE_CHECKING

from msgspec import Struct

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

CLONE_NEWNET = 0x4000_0000
NETLINK_SOCK_DIAG = 4
NETLINK_NETFILTER = 12
RECEIVE_BYTES = 256 * 1024
TIMEOUT_S = 1.0

_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_REQUEST, _ACK, _DUMP, _CREATE, _APPEND = 0x1, 0x4, 0x300, 0x400, 0x800
_NLA_F_NESTED = 0x8000
_HEADER = struct.Struct("=IHHII")


class Flow(Struct, frozen=True):
    """One INET_DIAG entry: the socket's names, raw as the kernel gave them, and its inode."""

    family: int
    protocol: int
    state: int
    id: bytes
    inode: int

    @property
    def ports(self) -> bytes:
        """Source and destination port as they stand in the transport header."""
        return self.id[:4]

    @property
    def addresses(self) -> bytes:
        """Source and destination address as they stand in the IP header."""
        size = 4 if self.family == socket.AF_INET else 16
        return self.id[4 : 4 + size] + self.id[20 : 20 + size]


def open_netlink(protocol: int, namespace: int | None = None) -> socket.socket:
    """Open a netlink socket in the network namespace of this descriptor (None: our own).

    setns(2) changes the calling thread only, so a thread of its own goes there, opens, and ends: no way back can fail.
    """
    if namespace is None:
        return _open(protocol)
    made: list[socket.socket] = []
    failed: list[OSError] = []

    def enter() -> None:
        try:
            if ctypes.CDLL(None, use_errno=True).setns(namespace, CLONE_NEWNET) != 0:
                number = ctypes.get_errno()
                raise OSError(number, f"setns: {os.strerror(number)}")
            made.append(_open(protocol))
        except OSError as error:
            failed.append(error)

    thread = threading.Thread(target=enter, name="netns")
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    return made[0]


def _open(protocol: int) -> socket.socket:
    opened = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)
    opened.settimeout(TIMEOUT_S)
    opened.bind((0, 0))
    return opened


def _message(kind: int, flags: int, sequence: int, body: bytes) -> bytes:
    padded = body + b"\0" * (-len(body) % 4)
    return _HEADER.pack(_HEADER.size + len(body), kind, flags, sequence, 0) + padded


def _answers(opened: socket.socket, wanted: Iterable[int]) -> Iterator[tuple[int, bytes]]:
    """Yield (kind, body) until each wanted sequence number was acknowledged, or a dump is done; raises `OSError`."""
    waiting = set(wanted)
    # An error of the batch as a whole names its begin, one before; what is older was given up on.
    oldest = min(waiting, default=0) - 1
    while waiting:
        data = opened.recv(RECEIVE_BYTES)
        offset = 0
        while offset + _HEADER.size <= len(data):
            length, kind, _, sequence, _ = _HEADER.unpack_from(data, offset)
            if length < _HEADER.size:
                raise OSError(errno.EBADMSG, "malformed netlink answer")
            body = data[offset + _HEADER.size : offset + length]
            offset += length + (-length % 4)
            if kind == _NLMSG_ERROR:
                number = -struct.unpack_from("=i", body)[0]
                if number and sequence >= oldest:
                    raise OSError(number, f"netlink: {os.strerror(number)}")
                waiting.discard(sequence)
            elif kind == _NLMSG_DONE:
                waiting.discard(sequence)
            elif sequence in waiting:
                yield kind, body


# -- nftables ---------------------------------------------------------------------------------------------------------

_SUBSYSTEM = 10 << 8
_BATCH_BEGIN, _BATCH_END = 16, 17
_NEWTABLE, _GETTABLE, _NEWCHAIN, _NEWRULE = 0, 1, 3, 6
_INET = 1
_TABLE_F_OWNER = 2
_HOOK_OUTPUT = 3
_META_OIFTYPE, _META_NFPROTO, _META_L4PROTO = 9, 15, 16
_SOCKET_MARK, _SOCKET_CGROUPV2 = 1, 3
_EQUAL, _NOT_EQUAL = 0, 1
_ARPHRD_LOOPBACK = 772
_NFPROTO: dict[int, int] = {socket.AF_INET: 2, socket.AF_INET6: 10}


def _attribute(kind: int, data: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(data), kind) + data + b"\0" * (-len(data) % 4)


def _nested(kind: int, *parts: bytes) -> bytes:
    return _attribute(kind | _NLA_F_NESTED, b"".join(parts))


def _word(kind: int, value: int) -> bytes:
    return _attribute(kind, struct.pack(">I", value))


def _text(kind: int, value: str) -> bytes:
    return _attribute(kind, value.encode() + b"\0")


def _expression(name: str, *parts: bytes) -> bytes:
    return _nested(1, _text(1, name), _nested(2, *parts))


def _meta(key: int) -> bytes:
    return _expression("meta", _word(1, 1), _word(2, key))


def _compare(value: bytes, operator: int = _EQUAL) -> bytes:
    return _expression("cmp", _word(1, 1), _word(2, operator), _nested(3, _attribute(1, value)))


def _payload(base: int, offset: int, length: int) -> bytes:
    return _expression("payload", _word(1, 1), _word(2, base), _word(3, offset), _word(4, length))


_NOT_LOOPBACK = _meta(_META_OIFTYPE) + _compare(struct.pack("=H", _ARPHRD_LOOPBACK), _NOT_EQUAL)
_DROP = _expression("counter") + _expression("immediate", _word(1, 0), _nested(2, _nested(2, _word(1, 0))))


def cgroup_rule(cgroup_id: int, level: int) -> bytes:
    """``socket cgroupv2 level N <id> oiftype != loopback counter drop``."""
    key = _expression("socket", _word(1, _SOCKET_CGROUPV2), _word(2, 1), _word(3, level))
    return key + _compare(struct.pack("=Q", cgroup_id)) + _NOT_LOOPBACK + _DROP


def mark_rule(mark: int) -> bytes:
    """``socket mark <mark> oiftype != loopback counter drop``."""
    key = _expression("socket", _word(1, _SOCKET_MARK), _word(2, 1))
    return key + _compare(struct.pack("=I", mark)) + _NOT_LOOPBACK + _DROP


def flow_rule(flow: Flow) -> bytes:
    """Drop exactly one five-tuple."""
    offset = 12 if flow.family == socket.AF_INET else 8
    return (_meta(_META_NFPROTO) + _compare(bytes([_NFPROTO[flow.family]]))
            + _meta(_META_L4PROTO) + _compare(bytes([flow.protocol]))
            + _payload(1, offset, len(flow.addresses)) + _compare(flow.addresses)
            + _payload(2, 0, 4) + _compare(flow.ports) + _NOT_LOOPBACK + _DROP)


class Table:
    """An owned ``inet`` table with one chain on the output hook. It is gone when this closes, or dies with us."""

    def __init__(self, name: str, rules: Iterable[bytes], namespace: int | None = None) -> None:
        """Make it with its rules, in one transaction; raises `OSError`, and then there is none of it."""
        self.name = name
        self._socket = open_netlink(NETLINK_NETFILTER, namespace)
        self._sequence = 1
        hook = _nested(4, _word(1, _HOOK_OUTPUT), _word(2, 0))
        messages = [
            (_NEWTABLE, _CREATE, _text(1, name) + _word(2, _TABLE_F_OWNER)),
            (_NEWCHAIN, _CREATE, _text(1, name) + _text(3, "output") + hook + _word(5, 1) + _text(7, "filter")),
        ]
        try:
            self._commit(messages + [self._rule(rule) for rule in rules])
        except OSError:
            self.close()
            raise

    def add(self, rules: Iterable[bytes]) -> None:
        """Append rules, all or none; raises `OSError`."""
        messages = [self._rule(rule) for rule in rules]
        if messages:
            self._commit(messages)

    def is_there(self) -> bool:
        """Return whether the kernel still has the table."""
        body = struct.pack(">BBH", _INET, 0, 0) + _text(1, self.name)
        self._sequence += 1
        self._socket.send(_message(_SUBSYSTEM | _GETTABLE, _REQUEST | _ACK, self._sequence, body))
        try:
            return any(kind & 0xFF == _NEWTABLE for kind, _ in _answers(self._socket, [self._sequence]))
        except FileNotFoundError:
            return False

    def close(self) -> None:
        """Remove the table."""
        self._socket.close()

    def _rule(self, expressions: bytes) -> tuple[int, int, bytes]:
        return _NEWRULE, _CREATE | _APPEND, _text(1, self.name) + _text(2, "output") + _nested(4, expressions)

    def _commit(self, messages: list[tuple[int, int, bytes]]) -> None:
        first = self._sequence + 1
        batch = struct.pack(">BBH", 0, 0, 10)
        parts = [_message(_BATCH_BEGIN, _REQUEST, self._sequence, batch)]
        for self._sequence, (kind, flags, body) in enumerate(messages, first):
            head = struct.pack(">BBH", _INET, 0, 0)
            parts.append(_message(_SUBSYSTEM | kind, _REQUEST | _ACK | flags, self._sequence, head + body))
        parts.append(_message(_BATCH_END, _REQUEST, self._sequence + 1, batch))
        wanted = range(first, self._sequence + 1)
        self._sequence += 1
        self._socket.send(b"".join(parts))
        for _ in _answers(self._socket, wanted):
            pass


# -- socket diagnosis -------------------------------------------------------------------------------------------------

_BY_FAMILY, _DESTROY = 20, 21
_ALL_STATES = 0xFFFF_FFFF
_ID = slice(4, 52)


class Diagnosis:
    """INET_DIAG of one network namespace."""

    def __init__(self, namespace: int | None = None) -> None:
        self._socket = open_netlink(NETLINK_SOCK_DIAG, namespace)
        self._sequence = 0

    def flows(self, protocol: int) -> list[Flow]:
        """Return every socket of this protocol, IPv4 and IPv6."""
        return [flow for family in (socket.AF_INET, socket.AF_INET6) for flow in self._dump(family, protocol)]

    def destroy(self, flow: Flow) -> bool:
        """Abort one socket; its owner reads ECONNABORTED. Return whether it was there; raises `OSError`."""
        try:
            self._ask(_DESTROY, _REQUEST | _ACK, self._body(flow.family, flow.protocol, flow.id))
        except FileNotFoundError:
            return False
        return True

    def close(self) -> None:
        """Give the socket back."""
        self._socket.close()

    def _dump(self, family: int, protocol: int) -> list[Flow]:
        rows = self._ask(_BY_FAMILY, _REQUEST | _DUMP, self._body(family, protocol, bytes(48)))
        return [Flow(body[0], protocol, body[1], body[_ID], struct.unpack_from("=I", body, 68)[0])
                for _, body in rows if len(body) >= 72]

    def _ask(self, kind: int, flags: int, body: bytes) -> list[tuple[int, bytes]]:
        self._sequence += 1
        self._socket.send(_message(kind, flags, self._sequence, body))
        return list(_answers(self._socket, [self._sequence]))

    @staticmethod
    def _body(family: int, protocol: int, identity: bytes) -> bytes:
        return struct.pack("=BBBBI", family, protocol, 0, 0, _ALL_STATES) + identity
