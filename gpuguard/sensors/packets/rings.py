"""The broker's half: a packet socket is opened, bound and given a ring, and a thread says what that one dropped."""

from __future__ import annotations

import ctypes
import errno
import os
import select
import socket
import struct
import threading
from contextlib import ExitStack
from typing import TYPE_CHECKING

from gpuguard import packet_filter
from gpuguard.messages import Opened, Refused

if TYPE_CHECKING:
    from gpuguard.messages import OpenPackets

# linux/if_packet.h, asm-generic/socket.h; Python's socket module names few of them.
_SOL_PACKET = 263
_PACKET_RX_RING = 5
_PACKET_STATISTICS = 6
_PACKET_VERSION = 10
_PACKET_FANOUT = 18
_FANOUT_HASH, _FANOUT_UNIQUE = 0, 0x2000
_TPACKET_V3 = 2
_ETH_P_ALL = 3
_SO_ATTACH_FILTER = 26
_SO_LOCK_FILTER = 44

# A block is handed over when it is full or after _RETIRE_MS, and each costs a wake-up, whatever is in it: so they are
# large, but at least _BLOCKS_MIN of them, of which all but the one that is filled may wait.
_BLOCK_BYTES = range(64 * 1024, 2 * 1024 * 1024 + 1, 64 * 1024)
_BLOCKS_MIN = 16
_FRAME_BYTES = 2048
_RETIRE_MS = 40
_RING_BYTES = range(1024 * 1024, 256 * 1024 * 1024 + 1)
_SNAP_BYTES = range(96, 65536)
_RINGS = range(1, 9)
# A guard that was taken over must not be able to fill the host's memory.
HELD_BYTES_MAX = 4 * 1024**3
DESCRIPTORS = ("packet", "epoll", "drops")
STATISTICS_S = 1.0
COUNT = struct.Struct("=Q")

#: The rings that are open, with their bytes.
_held: dict[socket.socket, int] = {}


def grant(request: OpenPackets) -> tuple[Opened | Refused, tuple[int, ...]]:
    """Open bound, running packet rings; the descriptors, in the order of the answer, are the caller's to close."""
    try:
        _check(request)
        program = packet_filter.program([packet_filter.parse(rule) for rule in request.ignore], request.snap_bytes)
    except ValueError as error:
        return Refused(f"packets: {error}"), ()
    block_bytes = max(size for size in _BLOCK_BYTES
                      if size == _BLOCK_BYTES[0] or size * _BLOCKS_MIN <= request.ring_bytes)
    blocks = request.ring_bytes // block_bytes
    try:
        netns = os.stat("/proc/thread-self/ns/net").st_ino  # noqa: PTH116  a link to no path
        given = _open(request, program, block_bytes, blocks)
    except OSError as error:
        where = f"interface {request.interface}" if request.interface else "all interfaces"
        hint = "; it needs CAP_NET_RAW" if error.errno in {errno.EPERM, errno.EACCES} else ""
        return Refused(f"packets: {where}: {error.strerror or error}{hint}"), ()
    values = {"block_bytes": block_bytes, "blocks": blocks, "netns": netns}
    return Opened(DESCRIPTORS * request.rings, "tpacket_v3", values), given


def _check(request: OpenPackets) -> None:
    """Raise ValueError where more is asked for than the guard may have."""
    if request.snap_bytes not in _SNAP_BYTES or request.ring_bytes not in _RING_BYTES:
        raise ValueError(f"snap_bytes must be {_SNAP_BYTES.start} to {_SNAP_BYTES.stop - 1}, "
                         f"ring_bytes {_RING_BYTES.start} to {_RING_BYTES.stop - 1}")
    if request.rings not in _RINGS:
        raise ValueError(f"rings must be {_RINGS.start} to {_RINGS.stop - 1}")
    if sum(list(_held.values())) + request.rings * request.ring_bytes > HELD_BYTES_MAX:
        raise ValueError(f"the rings of all interfaces would have more than {HELD_BYTES_MAX >> 20} MiB; have "
                         "fewer (packets.rings) or smaller ones (packets.ring_bytes)")
    if len(request.interface.encode()) > 15 or "\0" in request.interface:
        raise ValueError("an interface name has at most 15 bytes")


def _open(request: OpenPackets, program: bytes, block_bytes: int, blocks: int) -> tuple[int, ...]:
    """Return what `DESCRIPTORS` names of each ring; where it raises `OSError`, nothing stays open."""
    given: list[int] = []
    with ExitStack() as stack:
        rings = [stack.enter_context(_running(request.interface, block_bytes, blocks)) for _ in range(request.rings)]
        _share(rings)
        for packets in rings:
            _attach(packets, program)
            packets.setsockopt(socket.SOL_SOCKET, _SO_LOCK_FILTER, 1)
        for packets in rings:
            with _watching(packets) as ready:
                for own in (packets.fileno(), ready.fileno()):
                    given.append(os.dup(own))
                    stack.callback(os.close, given[-1])
            given.append(_count_drops(packets, blocks * block_bytes))
            stack.callback(os.close, given[-1])
        stack.pop_all()
    return tuple(given)


def _running(interface: str, block_bytes: int, blocks: int) -> socket.socket:
    """Return a bound socket with a ring, whose filter passes nothing yet."""
    with ExitStack() as stack:
        packets = stack.enter_context(socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, 0))
        packets.setsockopt(_SOL_PACKET, _PACKET_VERSION, _TPACKET_V3)
        _attach(packets, packet_filter.NOTHING)
        ring = struct.pack("=7I", block_bytes, blocks, _FRAME_BYTES, blocks * (block_bytes // _FRAME_BYTES),
                           _RETIRE_MS, 0, 0)
        packets.setsockopt(_SOL_PACKET, _PACKET_RX_RING, ring)
        _bind(packets, interface)
        stack.pop_all()
    return packets


def _share(rings: list[socket.socket]) -> None:
    """Have several sockets share the packets by a hash of addresses and ports, the same for both directions."""
    if len(rings) == 1:
        return
    number, how = 0, _FANOUT_HASH | _FANOUT_UNIQUE
    for packets in rings:
        packets.setsockopt(_SOL_PACKET, _PACKET_FANOUT, struct.pack("=HH", number, how))
        number, how = packets.getsockopt(_SOL_PACKET, _PACKET_FANOUT) & 0xFFFF, _FANOUT_HASH


def _attach(packets: socket.socket, program: bytes) -> None:
    memory = ctypes.create_string_buffer(program, len(program))
    packets.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER,
                       struct.pack("@HP", len(program) // 8, ctypes.addressof(memory)))


def _watching(packets: socket.socket) -> select.epoll:
    ready = select.epoll()
    ready.register(packets.fileno(), select.EPOLLIN | select.EPOLLERR)
    return ready


def _count_drops(packets: socket.socket, ring_bytes: int) -> int:
    """Return the reading end of a pipe in which a thread says how many packets were dropped, as long as it is open."""
    reading, writing = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    _held[packets] = ring_bytes
    threading.Thread(target=_report_drops, args=(packets, writing), name="packet-drops", daemon=True).start()
    return reading


def _bind(packets: socket.socket, interface: str) -> None:
    """Bind to one interface, or to all, which is index 0 in struct sockaddr_ll and has no name for Python's bind."""
    index = socket.if_nametoindex(interface) if interface else 0
    address = struct.pack("=HHiHBB8x", socket.AF_PACKET, socket.htons(_ETH_P_ALL), index, 0, 0, 0)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.bind(packets.fileno(), address, len(address)) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _report_drops(packets: socket.socket, writing: int) -> None:
    """Write the sum of dropped packets whenever it has grown, until the guard closes its end of the pipe."""
    poll = select.poll()
    poll.register(writing, 0)
    total = told = 0
    try:
        while not poll.poll(STATISTICS_S * 1000):
            _, drops, _ = struct.unpack("=3I", packets.getsockopt(_SOL_PACKET, _PACKET_STATISTICS, 12))
            total += drops
            if total == told:
                continue
            try:
                os.write(writing, COUNT.pack(total))
                told = total
            except BlockingIOError:  # not read for long: the sum goes out with the next one
                continue
            except BrokenPipeError:
                break
    finally:
        os.close(writing)
        packets.close()
        del _held[packets]
