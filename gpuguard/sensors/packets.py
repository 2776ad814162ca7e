"""Packets of this host, live from the kernel or from capture files, as headers and facts: payload never leaves here.

Live: the broker opens an AF_PACKET socket with a TPACKET_V3 ring (Documentation/networking/packet_mmap.rst), binds it,
and hands over three descriptors: the socket, an epoll that watches it, and the reading end of a pipe. A packet socket
can also send, and be bound anew; so the guard maps the ring, closes the socket at once, and waits on the epoll. What
it keeps can read packets and nothing else.

Without the socket the guard cannot ask how many packets were dropped (PACKET_STATISTICS). The flag TP_STATUS_LOSING of
a block says that there were some, not how many, and stays until somebody asks. So a thread of the broker asks each
second and writes the sum into the pipe. The pipe also tells each side that the other has gone: the thread then closes
its socket, and the guard says that drops are no longer counted.

The socket is of type SOCK_DGRAM: frames begin at the network header whatever the interface is, so that "all
interfaces" may mix Ethernet, tun and WireGuard, and hardware addresses are never read. On loopback each packet passes
twice, outgoing and incoming; the socket filter keeps the incoming one. It also drops what the operator does not want to
be looked at (`packet_filter`): a classic program cannot count, so nobody knows how much that is.

Several rings (`packets.rings`) share the packets as one PACKET_FANOUT group, so that not all processors wait for one
ring's lock. Both directions of a flow are in the same one, and all fragments of a datagram, though not always with the
whole datagrams of their flow, for they have no ports: but for these, order is kept within a flow. What is in different
rings is met in turn, by blocks, as what is on different interfaces: time goes back by as much as a block may wait. No
socket passes anything until all have joined; else each would get all packets for a while.

A packet that crosses several interfaces of one namespace (a container's veth, a bridge, the card) is met on each, and
counts where it was met first: on another interface within 10 ms, a packet with the same addresses, ports, numbers and
sizes is the same one; a block says how many of them there were.

Known limits: an address translated on the way, or a segment cut up for the card, makes another packet; two interfaces
used in turn for equal datagrams of IPv6 look like one packet on its way. Other network namespaces are not looked into.
"""

from __future__ import annotations

import ctypes
import errno
import gzip
import io
import os
import select
import socket
import struct
import threading
import zlib
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Protocol, cast

from gpuguard import packet_filter
from gpuguard._packets import CaptureFile, Parser, Ring
from gpuguard.core.records import Gap, Packets
from gpuguard.messages import Answer, Opened, OpenPackets, Refused
from gpuguard.sensors import EyeClosed

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gpuguard.config import Config
    from gpuguard.core.records import Block

ROWS_MAX = 8192
#: Live: what one block of a ring holds of short packets, so that it is judged at one go, or as many of several blocks.
LIVE_ROWS_MAX = 16_384
#: Blocks of rows that one read takes from all rings together: what follows a read, a signal to end too, waits for it.
BLOCKS_MAX = 8

# -- capture files ----------------------------------------------------------------------------------------------------

_READ_BYTES = 256 * 1024

# What the parser counts and a verdict may lack.
_MISSED = {
    "streams_lost": "SSH or TLS handshakes that could not be read to their end",
    "fragments_headless": "first IP fragments too short for their headers (RFC 7112)",
    "datagrams_spoiled": "datagrams in IP fragments that overlap or go too far, which nobody may take (RFC 5722)",
    "datagrams_unfinished": "datagrams in IP fragments that were not whole in 30 s, or when others took their place",
    "urgent": "TCP segments with urgent data, which programs are not given in its place: sizes may be wrong",
}


class CaptureError(Exception):
    """A capture file could not be read on. ``offset`` counts bytes from its start, unpacked if it is compressed."""

    def __init__(self, name: str, offset: int, reason: str) -> None:
        super().__init__(f"{name}: {reason} at byte {offset}" if offset else f"{name}: {reason}")
        self.name = name
        self.offset = offset
        self.reason = reason


def read_capture(source: str | os.PathLike[str] | BinaryIO, rows_max: int = ROWS_MAX, *,
                 brief: bool = False) -> Iterator[Packets | Gap]:
    """Yield the packets of a pcap or pcapng file, gzipped or not, in blocks of at most ``rows_max`` rows.

    ``source`` is a path, or a binary file that need not seek. Memory stays bounded whatever the file claims. What was
    passed over is a `Gap` at the end. A file that breaks off or breaks the format yields all packets before that, a
    `Gap`, and then raises `CaptureError`. ``brief``: facts that nobody here reads are a mark in the row, see `Parser`.
    """
    parser = Parser(rows_max=rows_max, brief=brief)
    capture = CaptureFile(parser)
    name = getattr(source, "name", "capture") if hasattr(source, "read") else os.fspath(cast("str", source))
    time_ns = 0
    error: CaptureError | None = None
    try:
        for block in _blocks(str(name), source, parser, capture):
            time_ns = block.time_ns
            yield block
    except CaptureError as caught:
        error = caught
    if len(parser):
        block = _taken(parser, 0)
        time_ns = block.time_ns
        yield block
    if capture.unsupported:
        yield Gap(time_ns, "packets", "frames of a link type that is not read", lost=capture.unsupported)
    parser.finish()
    counts = parser.counts()
    for name, reason in _MISSED.items():
        if counts[name]:
            yield Gap(time_ns, "packets", reason, lost=counts[name])
    if error is not None:
        yield Gap(time_ns, "packets", str(error))
        raise error


def _blocks(name: str, source: str | os.PathLike[str] | BinaryIO, parser: Parser, capture: CaptureFile,
            ) -> Iterator[Packets]:
    """Yield full blocks; what remains is in ``parser``."""
    window = bytearray(_READ_BYTES)
    have = 0
    with _opened(name, source, capture) as file:
        while got := file.readinto1(memoryview(window)[have:]):  # what comes before a break is not lost
            have += got
            at = 0
            while True:
                at += _feed(name, capture, window, at, have)
                if not parser.full:
                    break
                yield _taken(parser, 0)
            if at:
                window[:have - at] = window[at:have]
                have -= at
            if have == len(window):
                window.extend(bytes(len(window)))
    if have or not capture.offset:
        raise CaptureError(name, capture.offset, "the file ends within a record" if have else "the file is empty")


def _feed(name: str, capture: CaptureFile, window: bytearray, start: int, end: int) -> int:
    try:
        return capture.feed(window, start, end)
    except ValueError as error:
        raise CaptureError(name, capture.offset, str(error)) from error


@contextmanager
def _opened(name: str, source: str | os.PathLike[str] | BinaryIO, capture: CaptureFile) -> Iterator[io.BufferedIOBase]:
    """Open ``source``, unpack it if need be, and turn every failure to read into a `CaptureError`."""
    with ExitStack() as stack:
        try:
            if hasattr(source, "read"):
                raw = io.BufferedReader(cast("io.RawIOBase", source))
                stack.callback(raw.detach)
            else:
                raw = io.BufferedReader(stack.enter_context(Path(source).open("rb", buffering=0)))
            packed = raw.peek(2)[:2] == b"\x1f\x8b"
            yield gzip.GzipFile(fileobj=raw) if packed else raw
        except EOFError as error:
            raise CaptureError(name, capture.offset, "the compressed file breaks off") from error
        except (OSError, zlib.error) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise CaptureError(name, capture.offset, reason) from error


def _taken(parser: Parser, netns: int, met_again: int = 0) -> Packets:
    """Return what the parser has, stamped with the time of its last row."""
    rows, facts = parser.take()
    return Packets(int(rows["time_ns"][-1]), netns, rows, facts, met_again)


# -- the broker's half ------------------------------------------------------------------------------------------------

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
_DESCRIPTORS = ("packet", "epoll", "drops")
_STATISTICS_S = 1.0
_COUNT = struct.Struct("=Q")

#: The rings that are open, with their bytes.
_held: dict[socket.socket, int] = {}


def grant(request: OpenPackets) -> tuple[Opened | Refused, tuple[int, ...]]:
    """Open a bound, running packet ring; the descriptors, in the order of the answer, are the caller's to close."""
    if request.snap_bytes not in _SNAP_BYTES or request.ring_bytes not in _RING_BYTES:
        return Refused(f"packets: snap_bytes must be {_SNAP_BYTES.start} to {_SNAP_BYTES.stop - 1}, "
                       f"ring_bytes {_RING_BYTES.start} to {_RING_BYTES.stop - 1}"), ()
    if request.rings not in _RINGS:
        return Refused(f"packets: rings must be {_RINGS.start} to {_RINGS.stop - 1}"), ()
    if sum(list(_held.values())) + request.rings * request.ring_bytes > HELD_BYTES_MAX:
        return Refused(f"packets: the rings of all interfaces would have more than {HELD_BYTES_MAX >> 20} MiB; have "
                       "fewer (packets.rings) or smaller ones (packets.ring_bytes)"), ()
    if len(request.interface.encode()) > 15 or "\0" in request.interface:
        return Refused("packets: an interface name has at most 15 bytes"), ()
    try:
        program = packet_filter.program([packet_filter.parse(rule) for rule in request.ignore], request.snap_bytes)
    except ValueError as error:
        return Refused(f"packets: {error}"), ()
    where = f"interface {request.interface}" if request.interface else "all interfaces"
    block_bytes = max(size for size in _BLOCK_BYTES
                      if size == _BLOCK_BYTES[0] or size * _BLOCKS_MIN <= request.ring_bytes)
    blocks = request.ring_bytes // block_bytes
    with ExitStack() as stack:
        try:
            rings = [stack.enter_context(_running(request.interface, block_bytes, blocks))
                     for _ in range(request.rings)]
            _share(rings)
            for packets in rings:
                _attach(packets, program)
                packets.setsockopt(socket.SOL_SOCKET, _SO_LOCK_FILTER, 1)
            epolls = [stack.enter_context(_watching(packets)) for packets in rings]
            netns = os.stat("/proc/thread-self/ns/net").st_ino  # noqa: PTH116  a link to no path
            given: list[int] = []
            for packets, ready in zip(rings, epolls, strict=True):
                for own in (packets.fileno(), ready.fileno()):
                    given.append(os.dup(own))
                    stack.callback(os.close, given[-1])
                given.append(_count_drops(packets, blocks * block_bytes))
                stack.callback(os.close, given[-1])
        except OSError as error:
            hint = "; it needs CAP_NET_RAW" if error.errno in {errno.EPERM, errno.EACCES} else ""
            return Refused(f"packets: {where}: {error.strerror or error}{hint}"), ()
        stack.pop_all()
    for ready in epolls:
        ready.close()
    answer = Opened(_DESCRIPTORS * request.rings, "tpacket_v3",
                    {"block_bytes": block_bytes, "blocks": blocks, "netns": netns})
    return answer, tuple(given)


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
        while not poll.poll(_STATISTICS_S * 1000):
            _, drops, _ = struct.unpack("=3I", packets.getsockopt(_SOL_PACKET, _PACKET_STATISTICS, 12))
            total += drops
            if total == told:
                continue
            try:
                os.write(writing, _COUNT.pack(total))
                told = total
            except BlockingIOError:  # not read for long: the sum goes out with the next one
                continue
            except BrokenPipeError:
                break
    finally:
        os.close(writing)
        packets.close()
        del _held[packets]


# -- the guard's half -------------------------------------------------------------------------------------------------


class Broker(Protocol):
    """What this sensor needs of the broker's client."""

    def ask(self, request: OpenPackets) -> tuple[Answer, tuple[int, ...]]:
        """Send one request; return the answer and its descriptors."""
        ...


def open_sensor(broker: Broker, config: Config, *, brief: bool = False) -> PacketSensor:
    """Open every interface of the settings, or all at once where none is named. ``brief``: see `Parser`."""
    if not config.packets.enabled:
        raise EyeClosed("packets: turned off by packets.enabled in the settings")
    with ExitStack() as stack:
        sources = []
        for interface in config.packets.interfaces or ("",):
            for source in _open_sources(broker, interface, config, brief=brief):
                stack.callback(source.close)
                sources.append(source)
        sensor = PacketSensor(sources, config.packets.ignore)
        stack.pop_all()
    return sensor


def _open_sources(broker: Broker, interface: str, config: Config, *, brief: bool) -> list[_Source]:
    asked = config.packets
    answer, descriptors = broker.ask(
        OpenPackets(interface, asked.snap_bytes, asked.ring_bytes, asked.ignore, asked.rings))
    with ExitStack() as stack:
        for descriptor in descriptors:
            stack.callback(os.close, descriptor)
        if isinstance(answer, Refused):
            raise EyeClosed(answer.reason)
        if not isinstance(answer, Opened) or answer.descriptors != _DESCRIPTORS * asked.rings:
            raise EyeClosed("packets: the broker gave an answer that this version does not know")
        rings = [Ring(packet, answer.values["block_bytes"], answer.values["blocks"], many=not interface)
                 for packet in descriptors[::3]]
        stack.pop_all()
    for packet in descriptors[::3]:
        os.close(packet)
    return [_Source(interface, ring, answer.values, ready, drops, brief=brief)
            for ring, ready, drops in zip(rings, descriptors[1::3], descriptors[2::3], strict=True)]


class _Source:
    """One ring, with the descriptors that came with it."""

    def __init__(self, interface: str, ring: Ring, values: dict[str, int], ready: int, drops: int, *,
                 brief: bool) -> None:
        self.interface = interface
        self.ready = ready
        self._drops: int | None = drops
        self._ring = ring
        self._blocks = values["blocks"]
        self._netns = values["netns"]
        # A secret seed: whoever sends packets must not be able to choose which streams share a set.
        self._parser = Parser(rows_max=LIVE_ROWS_MAX, seed=int.from_bytes(os.urandom(8)), brief=brief)
        self._told: dict[str, int] = dict.fromkeys(("dropped", "malformed_blocks", *_MISSED), 0)
        self._looked_ns: int | None = None
        self._met_again = 0

    def read(self, now_ns: int, blocks_max: int) -> list[Block]:
        """Parse what is ready, at most so many blocks; for the rest the descriptor stays ready."""
        blocks: list[Block] = []
        more = True
        while more and len(blocks) < blocks_max:
            more = self._ring.read(self._parser, self._blocks)
            if len(self._parser):
                blocks.append(_taken(self._parser, self._netns, self._ring.duplicates - self._met_again))
                self._met_again = self._ring.duplicates
        if self._looked_ns is None or now_ns - self._looked_ns >= _STATISTICS_S * 1e9:
            blocks += self._gaps(now_ns)
            self._looked_ns = now_ns
        return blocks

    def _gaps(self, now_ns: int) -> list[Block]:
        """Say what was lost since the last time."""
        where = self.interface or "all interfaces"
        parsed = self._parser.counts()
        counts = {
            "dropped": (self._dropped(), f"packets dropped by the kernel, the ring of {where} was full"),
            "malformed_blocks": (self._ring.malformed_blocks, f"ring blocks of {where} did not add up"),
            **{name: (parsed[name], f"{where}: {reason}") for name, reason in _MISSED.items()},
        }
        gaps: list[Block] = []
        for key, (count, reason) in counts.items():
            if count is not None and count > self._told[key]:
                gaps.append(Gap(now_ns, "packets", reason, self._looked_ns, count - self._told[key]))
                self._told[key] = count
        if counts["dropped"][0] is None and self._drops is not None:
            os.close(self._drops)
            self._drops = None
            gaps.append(Gap(now_ns, "packets", f"the broker has gone: drops of {where} are no longer counted",
                            self._looked_ns))
        return gaps

    def _dropped(self) -> int | None:
        """Return the sum that the broker wrote last, None once it has gone."""
        if self._drops is None:
            return None
        try:
            data = os.read(self._drops, 4096)
        except BlockingIOError:
            return self._told["dropped"]
        if len(data) < _COUNT.size:
            return None
        return int(_COUNT.unpack_from(data, len(data) // _COUNT.size * _COUNT.size - _COUNT.size)[0])

    def close(self) -> None:
        self._ring.close()
        os.close(self.ready)
        if self._drops is not None:
            os.close(self._drops)
            self._drops = None


class PacketSensor:
    """All rings of the settings as one sensor."""

    name = "packets"
    period_ns: int | None = 1_000_000_000

    def __init__(self, sources: list[_Source], ignored: tuple[str, ...] = ()) -> None:
        self._sources = sources
        self._untold = ignored
        self._epoll = select.epoll()
        for source in sources:
            self._epoll.register(source.ready, select.EPOLLIN)
        self.descriptor: int | None = self._epoll.fileno()

    def read(self, now_ns: int) -> list[Block]:
        """Return the packets since the last call, interface by interface, and a `Gap` for what was lost.

        What the settings keep from sight is a `Gap` of the first call.
        """
        blocks_max = max(1, BLOCKS_MAX // len(self._sources))
        blocks = [block for source in self._sources for block in source.read(now_ns, blocks_max)]
        if self._untold:
            reason = f"not looked at and not counted, by packets.ignore: {'; '.join(self._untold)}"
            blocks.append(Gap(now_ns, "packets", reason, now_ns))
            self._untold = ()
        return blocks

    def close(self) -> None:
        """Unmap the rings and close what was handed over; the broker's side follows by itself."""
        self.descriptor = None
        self._epoll.close()
        for source in self._sources:
            source.close()
        self._sources = []
