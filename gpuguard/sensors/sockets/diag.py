"""The kernel's tables of sockets, by NETLINK_SOCK_DIAG: sock_diag(7), linux/inet_diag.h. Parsing is pure.

Not shown, because nobody can own them: TIME_WAIT, half-open requests, and closed sockets that the kernel still drains.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from typing import TYPE_CHECKING

from gpuguard.core.records import Socket

if TYPE_CHECKING:
    from collections.abc import Iterator

SOCKETS_MAX = 32_768
RECEIVE_BYTES = 256 * 1024

_TCPDIAG_GETSOCK, _SOCK_DIAG_BY_FAMILY, _NLMSG_ERROR, _NLMSG_DONE = 18, 20, 2, 3
_NLM_F_REQUEST_DUMP = 0x301
_INET_DIAG_INFO = 2
_HEADER = struct.Struct("=IHHII")
_DIAG = struct.Struct("=BBBB2s2s16s16sI8sIIIII")
_ATTRIBUTE = struct.Struct("=HH")
# struct tcp_info of linux/tcp.h: tcpi_bytes_acked, tcpi_bytes_received, and tcpi_min_rtt after three words more.
_BYTES_OFFSET, _BYTES = 120, struct.Struct("=QQ")
_RTT_OFFSET, _RTT = 148, struct.Struct("=I")
_NO_RTT = 0xFFFF_FFFF
# Numbers of net/tcp_states.h. UDP sockets without a peer are "closed" (7).
_TIME_WAIT, _CLOSED, _SYN_RECEIVED, _NEW_SYN_RECEIVED = 6, 7, 3, 12
_TCP_STATES = 0x1FFE & ~(1 << _TIME_WAIT | 1 << _CLOSED | 1 << _SYN_RECEIVED | 1 << _NEW_SYN_RECEIVED)
_UDP_STATES = 1 << 1 | 1 << _CLOSED
_MAPPED = bytes(10) + b"\xff\xff"


def tcp_request(states: int) -> bytes:
    """Return the message that asks for the sockets of TCP: struct inet_diag_req.

    Of the two that there are it is the older one, which asks for IPv4 and IPv6 at once. The kernel goes through every
    bucket of its table, half a million on a large host, whether there is anything in it: that is nearly all it costs.
    """
    body = struct.pack("=3xB48xI4x", 1 << (_INET_DIAG_INFO - 1), states)
    return _HEADER.pack(_HEADER.size + len(body), _TCPDIAG_GETSOCK, _NLM_F_REQUEST_DUMP, 1, 0) + body


def udp_request(family: int, states: int) -> bytes:
    """Return the message that asks for the sockets of UDP of one family: struct inet_diag_req_v2."""
    body = struct.pack("=BB2xI48x", family, socket.IPPROTO_UDP, states)
    return _HEADER.pack(_HEADER.size + len(body), _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST_DUMP, 1, 0) + body


TABLES = (
    (socket.IPPROTO_TCP, tcp_request(_TCP_STATES)),
    (socket.IPPROTO_UDP, udp_request(socket.AF_INET, _UDP_STATES)),
    (socket.IPPROTO_UDP, udp_request(socket.AF_INET6, _UDP_STATES)),
)


def split_messages(datagram: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield (type, body) of each netlink message; raises `OSError` for one that the kernel could not have sent."""
    offset = 0
    while offset + _HEADER.size <= len(datagram):
        length, kind, _, _, _ = _HEADER.unpack_from(datagram, offset)
        if length < _HEADER.size or offset + length > len(datagram):
            raise OSError(errno.EBADMSG, "malformed netlink message")
        yield kind, datagram[offset + _HEADER.size:offset + length]
        offset += length + (-length % 4)


def address_text(family: int, raw: bytes) -> str:
    """Return an address as a `FlowId` writes it: IPv4 in IPv6 (RFC 4291, section 2.5.5.2) as IPv4."""
    if family == socket.AF_INET:
        return socket.inet_ntop(socket.AF_INET, raw[:4])
    if raw.startswith(_MAPPED):
        return socket.inet_ntop(socket.AF_INET, raw[12:])
    return socket.inet_ntop(socket.AF_INET6, raw)


def parse_socket(protocol: int, body: bytes) -> Socket | None:
    """Return one struct inet_diag_msg with its attributes; None for what has no owner, or is cut short."""
    if len(body) < _DIAG.size:
        return None
    row = _DIAG.unpack_from(body)
    family, state, _, _, local_port, remote_port, local, remote, _, _, _, _, _, uid, inode = row
    if inode == 0 or family not in (socket.AF_INET, socket.AF_INET6):
        return None
    rtt_us, sent, received = _tcp_info(body) if protocol == socket.IPPROTO_TCP else (None, 0, 0)
    return Socket(
        protocol=protocol,
        local=address_text(family, local),
        local_port=int.from_bytes(local_port, "big"),
        remote=address_text(family, remote),
        remote_port=int.from_bytes(remote_port, "big"),
        state=state,
        inode=inode,
        uid=uid,
        min_rtt_us=rtt_us,
        sent_bytes=sent,
        received_bytes=received,
    )


def _tcp_info(body: bytes) -> tuple[int | None, int, int]:
    """Return (min RTT, bytes acknowledged, bytes received); an older kernel's shorter struct gives less."""
    offset = _DIAG.size
    while offset + _ATTRIBUTE.size <= len(body):
        length, kind = _ATTRIBUTE.unpack_from(body, offset)
        if length < _ATTRIBUTE.size:
            break
        if kind == _INET_DIAG_INFO:
            info = body[offset + _ATTRIBUTE.size:offset + length]
            sent, received = _BYTES.unpack_from(info, _BYTES_OFFSET) if len(info) >= _BYTES_OFFSET + 16 else (0, 0)
            rtt_us = _RTT.unpack_from(info, _RTT_OFFSET)[0] if len(info) >= _RTT_OFFSET + 4 else _NO_RTT
            return (None if rtt_us in (0, _NO_RTT) else rtt_us), sent, received
        offset += length + (-length % 4)
    return None, 0, 0


def _dump(opened: socket.socket, protocol: int, request: bytes) -> Iterator[Socket]:
    opened.send(request)
    while True:
        for kind, body in split_messages(opened.recv(RECEIVE_BYTES)):
            if kind == _NLMSG_DONE:
                return
            if kind == _NLMSG_ERROR:
                number = -struct.unpack_from("=i", body)[0]
                raise OSError(number, f"sock_diag: {os.strerror(number)}")
            found = parse_socket(protocol, body)
            if found:
                yield found


def read_tables(opened: socket.socket) -> tuple[list[Socket], bool]:
    """Return all sockets; not complete where there are too many, or where UDP cannot be asked for (CONFIG_UDP_DIAG)."""
    found: list[Socket] = []
    complete = True
    for protocol, request in TABLES:
        try:
            for one in _dump(opened, protocol, request):
                if len(found) < SOCKETS_MAX:
                    found.append(one)
                else:
                    complete = False
        except FileNotFoundError:
            if protocol == socket.IPPROTO_TCP:
                raise
            complete = False
    return found, complete
