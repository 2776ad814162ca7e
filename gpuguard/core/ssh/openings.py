"""What the first requests of a client cost, alone and together; compressed ones are computed with zlib.

A compressed message costs what its compressor makes of it after all that it saw before, so the usual openings are
played through: usual names, each client's order of messages, and how it flushes (RFC 4253 section 6.2, RFC 1951).
"""

from __future__ import annotations

import zlib
from functools import lru_cache
from typing import NamedTuple

from gpuguard.core.ssh.messages import NO_MORE_SESSIONS, OPEN_CONFIRMATION, REPLY, SESSION_OPEN, tcpip_forward
from gpuguard.core.ssh.suites import Suite, record_bytes

# "" and "*", localhost, and any IPv4 address or short host name; IPv6 addresses are longer and collide with -W.
_BIND_BYTES = range(16)
# A Unix-domain path, streamlocal-forward@openssh.com (PROTOCOL section 2.4), and the shortest path worth the name.
_STREAMLOCAL_BYTES = range(41 + 4, 41 + 108)
# So many requests for forwards are looked for in one segment.
FORWARDS_MAX = 4

# Usual names, for what zlib makes of them; and as many bytes as host keys are, with nothing to be found again.
_BINDS = (b"", b"localhost", b"127.0.0.1", b"0.0.0.0", b"10.10.10.10", b"192.168.100.100", b"*", b"::1")
_HOSTS = (b"db", b"localhost", b"127.0.0.1", b"10.10.10.10", b"192.168.100.100", b"node17.cluster",
          b"a.long-name.example.org")
_ORIGINS = (b"", b"127.0.0.1", b"::1", b"UNKNOWN")
_PATHS = (b"/tmp/s", b"/tmp/a.sock", b"/run/user/1000/x.sock", b"/var/run/docker.sock",
          b"/home/user/.cache/agent-7f3a.sock", b"/home/longer-name/.local/share/application/sockets/b41d88.sock")
_HOST_KEYS = bytes((one * 167 + one // 7 * 31) % 256 for one in range(380))
# OpenSSH opens no window for a session until a command runs in it.
_CONFIRMATIONS = tuple(b"\x5b" + bytes(8) + window.to_bytes(4, "big") + b"\0\0\x80\0" for window in (0, 2_097_152))


class _Openings(NamedTuple):
    """What the requests of an opening cost in each place that they may have."""

    forward: set[int]
    path: set[int]
    session: set[int]
    no_more: set[int]
    no_more_next: set[int]
    session_next: set[int]
    with_forward: dict[int, int]
    gathered: set[int]
    direct: set[int]


def plain_openings(suite: Suite) -> _Openings:
    """Return the sizes of an opening that is not compressed: each message costs the same wherever it stands."""
    forward = {record_bytes(suite, tcpip_forward(size)) for size in _BIND_BYTES}
    session, no_more = record_bytes(suite, SESSION_OPEN), record_bytes(suite, NO_MORE_SESSIONS)
    groups: dict[int, int] = {}
    sums = {0}
    for count in range(1, FORWARDS_MAX + 1):
        sums = {one + add for one in sums for add in forward}
        for tail in (0, no_more, session, session + no_more):
            for one in sums:
                groups.setdefault(one + tail, count)
    return _Openings(forward, {record_bytes(suite, size) for size in _STREAMLOCAL_BYTES}, {session}, {no_more},
                     {no_more}, {session + no_more}, groups, set(groups), set())


def _string(value: bytes) -> bytes:
    return len(value).to_bytes(4, "big") + value


def _forward_message(bind: bytes, port: int = 39_731) -> bytes:
    return b"\x50" + _string(b"tcpip-forward") + b"\x01" + _string(bind) + port.to_bytes(4, "big")


def _path_message(path: bytes) -> bytes:
    return b"\x50" + _string(b"streamlocal-forward@openssh.com") + b"\x01" + _string(path)


def _direct_message(host: bytes, origin: bytes) -> bytes:
    ports = (8_080).to_bytes(4, "big"), (51_734).to_bytes(4, "big")
    return (b"\x5a" + _string(b"direct-tcpip") + bytes(4) + (2_097_152).to_bytes(4, "big") + b"\0\0\x80\0"
            + _string(host) + ports[0] + _string(origin) + ports[1])


def _session_messages() -> list[bytes]:
    """Session opens as the implementations send them: they differ in window and packet size only."""
    sizes = ((24_576, 32_759), (2_097_152, 32_768), (64_000, 16_384), (1_048_576, 32_768))
    return [
        b"\x5a" + _string(b"session") + bytes(4) + window.to_bytes(4, "big") + packet.to_bytes(4, "big")
        for window, packet in sizes
    ]


_NO_MORE = b"\x50" + _string(b"no-more-sessions@openssh.com") + b"\x00"


class _Deflater:
    """One compressed direction: zlib@openssh.com starts after authentication, each message ends in a flush."""

    def __init__(self, suite: Suite, flush: int, stream: zlib._Compress) -> None:
        self._suite = suite
        self._flush = flush
        self._stream = stream

    def copy(self) -> _Deflater:
        return _Deflater(self._suite, self._flush, self._stream.copy())

    def cost(self, message: bytes) -> int:
        """Return the size on the wire of the next message, RFC 4253 section 6.2, without an IGNORE before it."""
        if self._suite.ignores:
            self.ignore()
        return self._cost(message)

    def ignore(self) -> int:
        """Return the size of an IGNORE that comes next."""
        return self._cost(b"\x02" + bytes(4))

    def _cost(self, message: bytes) -> int:
        return record_bytes(self._suite, len(self._stream.compress(message) + self._stream.flush(self._flush)))


@lru_cache(maxsize=256)
def deflated_openings(suite: Suite) -> _Openings:
    """Return the sizes of an opening that is compressed: what a message costs hangs on what went before it.

    Names and ports stand for all of their length: a byte of them costs 8 or 9 bits. Builds of zlib and versions of
    OpenSSH differ in the flush and in whether they look for repeats (10.6 costs what Huffman's code alone saves): all
    are looked for.
    """
    found = _Openings(set(), set(), set(), set(), set(), set(), {}, set(), set())
    for flush, strategy in sorted({(suite.flush, zlib.Z_DEFAULT_STRATEGY), (suite.flush, zlib.Z_HUFFMAN_ONLY),
                                   (zlib.Z_SYNC_FLUSH, zlib.Z_DEFAULT_STRATEGY)}):
        start = _Deflater(suite, flush, zlib.compressobj(strategy=strategy))
        found.no_more.add(start.copy().cost(_NO_MORE))
        found.session.update(start.copy().cost(one) for one in _session_messages())
        found.direct.update(start.copy().cost(_direct_message(host, origin)) for host in _HOSTS for origin in _ORIGINS)
        for bind in _BINDS:
            for other in _BINDS[:4]:
                asked = [_forward_message((bind, other)[port % 2], 30_000 + port) for port in range(FORWARDS_MAX)]
                _deflated_run(found, start, asked, found.forward)
        for path in _PATHS:
            _deflated_run(found, start, [_path_message(path)], found.path)
    return found


def _deflated_run(found: _Openings, start: _Deflater, requests: list[bytes], first: set[int]) -> None:
    """Add what so many requests one after the other cost, and what may follow each of them."""
    stream, costs = start.copy(), list[int]()
    for request in requests:
        costs.append(stream.cost(request))
        after = stream.copy()
        no_more = after.cost(_NO_MORE)
        found.no_more_next.add(no_more)
        pairs = set()
        for session in _session_messages()[:2]:
            behind = stream.copy()
            opened = behind.cost(session)
            pairs |= {opened, opened + behind.cost(_NO_MORE)}
            found.session_next.add(max(pairs))
        for begin in range(len(costs)):
            group = sum(costs[begin:])
            for tail in (0, no_more, *pairs):
                found.with_forward.setdefault(group + tail, len(costs) - begin)
                if begin == 0:
                    found.gathered.add(group + tail)
    first.add(costs[0])


def answers(suite: Suite) -> tuple[tuple[int, ...], frozenset[int]]:
    """Return what the answer to a global request, the likeliest first, and the confirmation of a channel may cost."""
    if not suite.compressed:
        return (record_bytes(suite, REPLY),), frozenset([record_bytes(suite, OPEN_CONFIRMATION)])
    replies, confirms = dict[int, None](), set[int]()
    partial = suite.flush == zlib.Z_PARTIAL_FLUSH
    for strategy in (zlib.Z_DEFAULT_STRATEGY, zlib.Z_HUFFMAN_ONLY):
        stream = _Deflater(suite, suite.flush, zlib.compressobj(strategy=strategy))
        if partial:
            # OpenSSH's first word after the login is its host keys.
            stream.cost(_HOST_KEYS)
        confirms.update(stream.copy().cost(one) for one in _CONFIRMATIONS)
        replies[stream.cost(b"\x51")] = None
        confirms.update(stream.copy().cost(one) for one in _CONFIRMATIONS)
    if partial:
        # 29 bits behind up to 7 that were left over: three bytes, or four.
        replies[record_bytes(suite, 4)] = None
    return tuple(replies), frozenset(confirms)
