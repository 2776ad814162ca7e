"""The asking side of the broker: one request, one answer, and the descriptors that come with it."""

from __future__ import annotations

import array
import os
import socket

import msgspec

from gpuguard.messages import MESSAGE_BYTES_MAX, Answer, Request

DESCRIPTORS_MAX = 128
TIMEOUT_S = 15.0


class BrokerGone(Exception):
    """The broker has ended, or ended this connection. There is no privilege left to ask for."""


class BrokerClient:
    """One connection to the broker. ``descriptor`` is readable when the broker is gone."""

    def __init__(self, descriptor: int, *, timeout_s: float = TIMEOUT_S) -> None:
        """Take over a connected SOCK_SEQPACKET descriptor."""
        self._socket = socket.socket(fileno=descriptor)
        self._socket.settimeout(timeout_s)
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(Answer)

    @property
    def descriptor(self) -> int:
        """The connection's descriptor, -1 once closed."""
        return self._socket.fileno()

    def ask(self, request: Request) -> tuple[Answer, tuple[int, ...]]:
        """Ask, and return the answer with its descriptors, which are the caller's to close.

        Raises `BrokerGone` when there is nobody to answer, `ValueError` for a request that is too large to be sent.
        """
        data = self._encoder.encode(request)
        if len(data) > MESSAGE_BYTES_MAX:
            raise ValueError(f"a request of {len(data)} bytes; at most {MESSAGE_BYTES_MAX} are taken")
        try:
            self._socket.send(data)
            answer, descriptors, flags = self._receive()
        except OSError as error:
            raise BrokerGone(f"the broker does not answer: {error}") from error
        if not answer:
            raise BrokerGone("the broker has ended, or ended this connection")
        try:
            if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
                raise BrokerGone("an answer of the broker was cut")
            return self._decoder.decode(answer), descriptors
        except (BrokerGone, msgspec.MsgspecError, ValueError) as error:
            for one in descriptors:
                os.close(one)
            raise BrokerGone(f"the broker and we do not speak the same table: {error}") from error

    def _receive(self) -> tuple[bytes, tuple[int, ...], int]:
        space = socket.CMSG_SPACE(DESCRIPTORS_MAX * array.array("i").itemsize)
        data, extra, flags, _ = self._socket.recvmsg(MESSAGE_BYTES_MAX, space, socket.MSG_CMSG_CLOEXEC)
        found = array.array("i")
        for level, kind, content in extra:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                found.frombytes(content[: len(content) - len(content) % found.itemsize])
        return data, tuple(found), flags

    def close(self) -> None:
        """Close the connection: the broker then undoes what it holds in force for the guard."""
        self._socket.close()
