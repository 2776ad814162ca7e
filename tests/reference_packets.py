"""What ext/packets.pyx does, written for the eye: no speed, no bounds on memory, everything from scratch each time.

A packet is a dict with the fields of `records.PACKET`. A stream is all its bytes in order, read again from the start
with each segment; a fact is new when there is one more than before. ``edges`` says how many bytes were there after
each segment, and when it came: some messages are known by being sent alone.
"""

from __future__ import annotations

import itertools
import re
import struct
import zlib
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from gpuguard.core import pools
from gpuguard.core.records import (
    DnsMessage,
    Fact,
    Spoken,
    SshBanner,
    SshKexInit,
    SshNewKeys,
    Stratum,
    TlsClientHello,
    TlsRecords,
)

MESSAGE_MAX = 16384
HELD_BYTES = 16384
ETHERTYPES = {0x0800, 0x86DD}
VLAN = {0x8100, 0x88A8, 0x9100}
EXTENSIONS = {0, 43, 44, 51, 60, 135, 139, 140}


def be(data: bytes) -> int:
    return int.from_bytes(data, "big")


# -- frames -----------------------------------------------------------------------------------------------------------


def packet(link: int, frame: bytes, wire_bytes: int, time_ns: int = 0) -> tuple[dict, bytes | None] | None:
    """One frame as a row and its transport payload (None where it cannot be told); None if it is not IP."""
    wire_bytes = max(wire_bytes, len(frame))
    packet_type = 255
    if link == 1:
        at, kind = 14, be(frame[12:14]) if len(frame) >= 14 else 0
    elif link == 113:
        at, kind = 16, be(frame[14:16]) if len(frame) >= 16 else 0
        packet_type = frame[1] if len(frame) >= 16 else 255
    elif link == 276:
        at, kind = 20, be(frame[:2]) if len(frame) >= 20 else 0
        packet_type = frame[10] if len(frame) >= 20 else 255
    else:
        at, kind = 4 if link in {0, 108} else 0, 0x0800
    for _ in range(4):
        if kind in VLAN and len(frame) >= at + 4:
            kind, at = be(frame[at + 2:at + 4]), at + 4
    data = frame[at:]
    if kind not in ETHERTYPES or not data:
        return None
    row = {
        "time_ns": time_ns, "source": b"", "destination": b"", "source_port": 0, "destination_port": 0, "sequence": 0,
        "acknowledgement": 0, "payload_bytes": 0, "frame_bytes": wire_bytes, "protocol": 0, "tcp_flags": 0,
        "ip_version": data[0] >> 4, "packet_type": packet_type,
    }
    if row["ip_version"] == 4:
        return ipv4(row, data, wire_bytes - at)
    if row["ip_version"] == 6:
        return ipv6(row, data, wire_bytes - at)
    return None


def ipv4(row: dict, data: bytes, wire_bytes: int) -> tuple[dict, bytes | None] | None:
    if len(data) < 20:
        return None
    header = (data[0] & 15) * 4
    total = be(data[2:4]) or wire_bytes
    if header < 20 or total < header:
        return None
    row["source"] = bytes(10) + b"\xff\xff" + data[12:16]
    row["destination"] = bytes(10) + b"\xff\xff" + data[16:20]
    row["protocol"] = data[9]
    place, rest, size = be(data[6:8]), data[header:total], total - header
    if place & 0x3FFF:
        row["fragment"] = Piece(data[9], be(data[4:6]), place % 0x2000 * 8, bool(place & 0x2000), 0, rest, size, False)
        return row, None
    return transport(row, rest, size, False)


def ipv6(row: dict, data: bytes, wire_bytes: int) -> tuple[dict, bytes | None] | None:
    if len(data) < 40:
        return None
    row["source"], row["destination"] = data[8:24], data[24:40]
    size, kind = be(data[4:6]), data[6]
    if size == 0 and kind != 59:
        size = max(wire_bytes - 40, 0)
    rest = data[40:40 + size]
    portless = False
    cut: tuple[int, int, int] | None = None
    for _ in range(16):
        if kind not in EXTENSIONS or portless:
            break
        length = 8 if kind == 44 else 0 if len(rest) < 8 else (rest[1] + 2) * 4 if kind == 51 else (rest[1] + 1) * 8
        if len(rest) < 8 or length > len(rest):
            portless = True
            break
        if kind == 44 and be(rest[2:4]) & 0xFFF9:
            portless = cut is not None or be(rest[2:4]) >> 3 != 0
            cut = cut or (be(rest[2:4]), be(rest[4:8]), size - 8)
        kind, rest, size = rest[0], rest[length:], size - length
    row["protocol"] = kind
    if cut:
        place, number, whole = cut
        row["fragment"] = Piece(44, number, place & 0xFFF8, bool(place & 1), whole - size, rest, size, portless)
        return row, None
    return transport(row, rest, size, portless)


def transport(row: dict, data: bytes, size: int, portless: bool) -> tuple[dict, bytes | None]:
    row["payload_bytes"] = size
    protocol = row["protocol"]
    if portless:
        return row, None
    if protocol in {6, 17} and len(data) >= 4:
        row["source_port"], row["destination_port"] = struct.unpack(">HH", data[:4])
    if protocol == 17:
        row["payload_bytes"] = max(size - 8, 0)
        return row, data[8:]
    if protocol in {1, 58}:
        row["payload_bytes"] = max(size - 8, 0)
        if len(data) >= 2:
            row["source_port"] = be(data[:2])
        if len(data) >= 8:
            row["destination_port"], row["sequence"] = struct.unpack(">HH", data[4:8])
    if protocol == 6:
        return tcp(row, data, size)
    return row, None


def tcp(row: dict, data: bytes, size: int) -> tuple[dict, bytes | None]:
    row["payload_bytes"] = max(size - 20, 0)
    if len(data) < 20:
        return row, None
    row["sequence"], row["acknowledgement"] = struct.unpack(">II", data[4:12])
    row["tcp_flags"] = data[13]
    header = (data[12] >> 4) * 4
    if header < 20 or header > size:
        row["payload_bytes"] = 0
        return row, None
    row["payload_bytes"] = size - header
    return row, data[header:]


# -- fragments --------------------------------------------------------------------------------------------------------


class Piece(NamedTuple):
    """A fragment: the last ``size`` bytes of it, and how many of extension headers lie before them."""

    kind: int
    number: int
    offset: int
    more: bool
    before: int
    data: bytes
    size: int
    headless: bool


@dataclass
class Datagram:
    since_ns: int
    whole_ns: int | None = None
    covered: set[int] = field(default_factory=set)  # by eights of bytes; the last one may be less
    size: int | None = None
    spoiled: bool = False
    pieces: list[Piece] = field(default_factory=list)
    frame_bytes: int = 0
    protocol: int = 0

    @property
    def first(self) -> Piece:
        return next(piece for piece in self.pieces if piece.offset == 0)

    @property
    def begins(self) -> bytes:
        return self.first.data[:8].ljust(8, b"\0")

    def read(self, row: dict) -> tuple[dict, bytes | None]:
        """The whole of it: its row and its payload."""
        data = b""
        for piece in sorted(self.pieces, key=lambda piece: piece.offset):
            if len(data) == max(piece.offset - self.first.before, 0):  # else the one before was not captured to its end
                data += piece.data
        row["protocol"], row["frame_bytes"] = self.protocol, self.frame_bytes
        return transport(row, data[:max(HELD_BYTES - self.first.before, 0)], self.size - self.first.before,
                         self.first.headless)


class Fragments:
    """All datagrams that came in pieces, by their ends and number."""

    def __init__(self) -> None:
        self.datagrams: dict[tuple, Datagram] = {}
        self.counts = dict.fromkeys(("fragments_headless", "datagrams_spoiled", "datagrams_unfinished"), 0)

    def take(self, row: dict, piece: Piece) -> tuple[dict, bytes | None] | None:
        """Take one; return the row and the payload of the datagram if this was what it lacked."""
        key = (row["source"], row["destination"], piece.kind, piece.number)
        one = self.datagrams.get(key)
        if one is None or abs(row["time_ns"] - one.since_ns) > 30 * 10**9 or (
                one.whole_ns is not None and abs(row["time_ns"] - one.whole_ns) > 10**7):
            lacks = one is not None and one.covered and one.whole_ns is None and not one.spoiled
            self.counts["datagrams_unfinished"] += bool(lacks)
            one = self.datagrams[key] = Datagram(row["time_ns"])
        if piece.offset == 0 and one.whole_ns is not None and not one.begins.startswith(piece.data[:8]):
            one = self.datagrams[key] = Datagram(row["time_ns"])
        one, fresh = self.join(key, one, piece, row["time_ns"])
        if not fresh:
            return None
        one.pieces.append(piece)
        one.frame_bytes += row["frame_bytes"]
        if piece.offset == 0:
            one.protocol = row["protocol"]
            self.counts["fragments_headless"] += piece.headless
        return one.read(row) if one.whole_ns is not None else None

    def join(self, key: tuple, one: Datagram, piece: Piece, time_ns: int) -> tuple[Datagram, bool]:
        start, stop = piece.offset, piece.offset + piece.before + piece.size
        places = set(range(start // 8, -(-stop // 8)))
        if not places or one.spoiled:
            return one, False
        ends = one.size is not None and stop > one.size
        if places <= one.covered and not ends:
            return one, False
        if one.whole_ns is not None:
            one = self.datagrams[key] = Datagram(time_ns)
        beyond = one.size is not None and (stop > one.size or (not piece.more and stop != one.size))
        short = not piece.more and any(place * 8 >= stop for place in one.covered)
        joined = one.covered | places
        runs = sum(place - 1 not in joined for place in joined)
        if stop > 65535 or (piece.more and stop % 8) or beyond or short or places & one.covered or runs > 8:
            one.spoiled = True
            self.counts["datagrams_spoiled"] += 1
            return one, False
        one.covered = joined
        one.size = one.size if piece.more else stop
        if one.size is not None and len(joined) == -(-one.size // 8):
            one.whole_ns = time_ns
        return one, True


# -- facts ------------------------------------------------------------------------------------------------------------


def text(data: bytes) -> str:
    return "".join(chr(b) if 32 <= b < 127 else "?" for b in data)


def names(data: bytes) -> tuple[str, ...]:
    return tuple(text(data).split(",")) if data else ()


Edges = list[tuple[int, int]]


class Text(NamedTuple):
    """No fact: all from ``start`` on is text that belongs to no protocol so far, and is read on."""

    start: int


class Records(NamedTuple):
    """No fact: the application data records of TLS that were read, and whether more are."""

    first_ns: int
    times_ms: list[int]
    sizes: list[int]
    more: bool


def stream_facts(data: bytes, edges: Edges, first: int, row: int, *, called: bool = False) -> list[Fact]:
    """The facts of a stream that begins with ``data``, whose first byte has sequence number ``first``."""
    return [one for one in stream_read(data, edges, first, row, called=called) if not isinstance(one, Text | Records)]


def stream_read(data: bytes, edges: Edges, first: int, row: int, *,
                called: bool = False) -> list[Fact | Text | Records]:
    """The facts of a stream, and at last whether it is text, or which records it had."""
    facts: list[Fact | Text | Records] = []
    at: int | None = 0
    if called and yamux_begins(data[:edges[0][0]] if edges else b""):
        yamux(data, row, facts)
        return facts
    begins = behind_greeting(data, edges) if called else 0
    if begins:
        facts += stream_facts(data[:begins], [one for one in edges if one[0] <= begins], first, row, called=called)
        at = begins
    while at is not None:
        at = opening(data, edges, at, first, row, facts, called=called)
    return facts


def behind_greeting(data: bytes, edges: Edges) -> int:
    """Where a segment of the side that was called begins as a client does, within the first 512 bytes; 0: nowhere."""
    greeting = data[:edges[0][0]] if edges else b""
    if re.match(rb"[A-Z]{3,4}/", greeting):
        return 0
    pairs = itertools.pairwise(edge for edge, _ in edges)
    return next((start for start, end in pairs if start <= 512 and asks(data[start:end])), 0)


def asks(said: bytes) -> bool:
    """Whether these are a client's first words in HTTP/1, HTTP/2 or SOCKS 5."""
    if len(said) > 2 and said[0] == 5:
        exist = all((one <= 9 and one != 4) or 128 <= one < 255 for one in said[2:])
        return len(said) == 2 + said[1] <= 18 and exist
    head = rb"[A-Z]{3,8} [!-~]+ HTTP/1\.[01]\r\n(\r\n|[-_0-9A-Za-z]+:)"
    return said.startswith(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n") or bool(re.match(head, said[:2048]))


def asked_within(said: bytes, row: int, facts: list[Fact], told: set[str]) -> None:
    """What a client says in a message of another protocol, each kind once."""
    what = ""
    if asks(said):
        what = "socks5-greeting" if said[0] == 5 else "http-backwards"
    elif len(said) > 4 and said[0] == 5 and 1 <= said[1] <= 3 and said[2] == 0 and said[3] in {1, 3, 4}:
        what = "socks5-request" if len(said) == {1: 10, 3: 7 + said[4], 4: 22}[said[3]] else ""
    if what and what not in told:
        told.add(what)
        facts.append(Spoken(row, what))


def yamux_begins(seen: bytes) -> bool:
    """Whether a side begins with a window update of the first stream, or with a ping."""
    flags = (b"\0\1", b"\0\2")
    return len(seen) >= 12 and seen[2:4] in flags and (
        (seen[:2] == b"\0\1" and be(seen[4:8]) in {1, 2}) or (seen[:2] == b"\0\2" and be(seen[4:8]) == 0))


def yamux(data: bytes, row: int, facts: list[Fact]) -> None:
    """The first 64 frames; messages of more than 2048 bytes are not read."""
    at = 0
    told: set[str] = set()
    for _ in range(64):
        if len(data) - at < 12:
            return
        version, kind, flags, stream, size = struct.unpack(">BBHII", data[at:at + 12])
        size = 0 if kind else size
        if version or kind > 3 or flags > 15 or (stream == 0) != (kind > 1) or size > 0xFFFFFF:
            return
        said = data[at + 12:at + 12 + size]
        if len(said) < size <= 2048:
            return
        if flags & 1 and kind < 2 and "yamux-backwards" not in told:
            told.add("yamux-backwards")
            facts.append(Spoken(row, "yamux-backwards"))
        if size <= 2048:
            asked_within(said, row, facts, told)
        at += 12 + size


def opening(data: bytes, edges: Edges, at: int, first: int, row: int, facts: list[Fact], *,
            called: bool) -> int | None:
    """Read one protocol that begins at ``at``; return where another begins behind it, None if there is none (yet)."""
    for edge, _ in edges:
        seen = data[at:edge]
        if not seen or (b"SSH-".startswith(seen) and len(seen) < 4):
            continue
        if seen.startswith(b"SSH-"):
            return text_or_ssh(data, edges, at, first, row, facts, connects=False, posts=False, upgrade=False,
                               called=called)
        if broker(seen):
            facts.append(Spoken(row, "message-broker"))
        if len(seen) in {64, 234} and seen[:2] != b"\x16\3" and len(seen) < 4 * high(seen) < 3 * len(seen):
            return noise(data, edges, at, len(seen), row, facts)
        if seen[0] == 22:
            facts += tls(data, edges, at, row)
            return None
        if x11(data, edges, at, seen, row, facts, called=called):
            return None
        if seen[0] in {4, 5}:
            step = (socks5 if seen[0] == 5 else socks4)(data, edges, at, edge, row, facts)
            if step == "more":
                continue
            if step != "other":
                return step
        if len(seen) == 8 and seen[0] == 0 and 90 <= seen[1] <= 93:
            facts.append(Spoken(row, "socks4-reply"))
            return at + 8 if seen[1] == 90 else None
        size = be(seen[:2])
        if len(seen) >= 16 and 14 <= size <= len(seen) - 2 and openvpn(seen[2:2 + size]):
            facts.append(Spoken(row, "openvpn"))
            return None
        if (seen[0] < 9 or 13 < seen[0] < 32) and (seen[0] != 27 or called):
            if len(seen) == 2 and 17 <= size <= 512:
                continue
            facts += dns_stream(data, edges, at, edge, row)
            return None
        if seen[:1] == b"{" and b"\n" not in seen and len(seen) < 2048:
            continue
        line = seen[:seen.find(b"\n") + 1] or seen
        if what := proxy_request(line[:2048], called=called):
            facts.append(Spoken(row, what))
        posts = line.startswith(b"POST ") and b" HTTP/1." in line[:2048]
        upgrade = 12 < len(line) <= 2048 and line.endswith(b"\n") and line.startswith((b"GET ", b"HTTP/1.1 101"))
        return text_or_ssh(data, edges, at, first, row, facts, connects=what == "http-connect", posts=posts,
                           upgrade=upgrade, called=called)
    return None


def high(data: bytes) -> int:
    return sum(byte >= 128 for byte in data)


def noise(data: bytes, edges: Edges, at: int, size: int, row: int, facts: list[Fact]) -> None:
    if size == 64:
        facts.append(Spoken(row, "stratum2-hello"))
    elif next((edge for edge, _ in edges if edge > at + 234), 0) == at + 278:
        facts.append(Spoken(row, "stratum2-answer"))


def socks5(data: bytes, edges: Edges, at: int, edge: int, row: int, facts: list[Fact]) -> int | str | None:
    """Where what is carried begins; "more" or "other" where this is not, or not yet, a message of SOCKS."""
    seen = data[at:edge]
    if len(seen) < 2:
        return "more"
    client = not (len(seen) == 2 and seen[1] in {0, 2, 255})
    if client and not 1 <= seen[1] <= 16:
        return "other"
    methods = seen[2:2 + seen[1]]
    if client and len(methods) < seen[1]:
        return "more"
    if client and any(one == 4 or 9 < one < 128 or one == 255 for one in methods):
        return "other"
    facts.append(Spoken(row, "socks5-greeting" if client else "socks5-choice"))
    at += 2 + len(methods)
    rest = data[at:edges[-1][0]]
    if rest[:1] == b"\1":
        size = 2 if not client else 3 + rest[1] + rest[2 + rest[1]] if len(rest) > 1 and len(rest) > 2 + rest[1] else 0
        if not size or len(rest) < size:
            return None
        at, rest = at + size, rest[size:]
    if rest[:1] != b"\5" or len(rest) < 5 or rest[2] != 0 or rest[3] not in {1, 3, 4}:
        return None
    size = {1: 10, 3: 7 + rest[4], 4: 22}[rest[3]]
    if len(rest) < size:
        return None
    if client and 1 <= rest[1] <= 3:
        facts.append(Spoken(row, "socks5-request"))
    return at + size


def socks4(data: bytes, edges: Edges, at: int, edge: int, row: int, facts: list[Fact]) -> int | str:
    seen = data[at:edge]
    if len(seen) < 9 or seen[1] not in {1, 2} or seen[2:4] == b"\0\0" or seen[4:8] == bytes(4):
        return "other"
    end = 8
    for _ in range(2 if seen[4:7] == bytes(3) else 1):
        zero = seen.find(b"\0", end)
        if zero < 0 or zero > 520 or any(not 32 <= one < 127 for one in seen[end:zero]):
            return "other"
        end = zero + 1
    facts.append(Spoken(row, "socks4-request"))
    return at + end


def proxy_request(line: bytes, *, called: bool) -> str:
    if len(line) == 12 and line.startswith(b"RFB 00") and line.endswith(b"\n"):
        return "rfb-version"
    if line.startswith(b"CONNECT "):
        return "http-connect" if len(line) > 8 and b" HTTP/1." in line else ""
    if called and line == b"PRI * HTTP/2.0\r\n":
        return "http-backwards"
    method, space, rest = line.partition(b" ")
    upper = 3 <= len(method) <= 8 and all(65 <= one <= 90 for one in method)
    if upper and space and rest.startswith(b"http://") and len(rest) > 7:
        return "http-absolute"
    return "http-backwards" if called and upper and space and rest.startswith(b"/") and b" HTTP/1." in line else ""


def broker(seen: bytes) -> bool:
    if len(seen) < 8:
        return False
    if seen.startswith((b"INFO {", b"AMQP\0", b"STOMP\n", b"CONNECT\n")):
        return True
    if len(seen) >= 10 and seen[0] == 255 and seen[9] == 127:
        return True
    if re.match(rb"\*[1-9][0-9]?\r\n\$|\0SP\0\0[^\0]\0\0", seen):
        return True
    return bool(re.match(rb"\x10(?:[\x00-\x7f]|[\x80-\xff][\x00-\x7f]|[\x80-\xff]{2}.)\x00\x04MQTT", seen, re.DOTALL))


def openvpn(message: bytes) -> bool:
    numbers, size = {1, 0x0F000001}, len(message)
    crypt = be(message[9:13]) in numbers
    if message[0] == 0x50:
        return 54 <= size <= 2048 and crypt
    if message[0] == 0x38:
        plain = size in {14, 42, 54, 86} and message[-5:] == bytes(5)
        return (plain and (size == 14 or be(message[-13:-9]) in numbers)) or (size == 54 and crypt)
    if message[0] == 0x40:
        plain = size in {26, 54, 66, 98} and message[-17:-12] == b"\1" + bytes(4) and message[-4:] == bytes(4)
        return (plain and (size == 26 or be(message[-25:-21]) in numbers)) or (size == 66 and crypt)
    return False


def text_or_ssh(data: bytes, edges: Edges, at: int, first: int, row: int, facts: list[Fact], *, connects: bool,
                posts: bool, upgrade: bool, called: bool) -> int | None:
    """Lines up to a banner; of a request to a proxy, up to the empty one; of each POST, what came at once of its body.

    Of objects of JSON that come first the first 16 are judged; a head that asks for a WebSocket is followed by one.
    """
    start, objects, asked, gets = at, 0, False, False
    while not data[at:].startswith(b"SSH-"):
        if b"SSH-".startswith(data[at:]):
            facts += [Text(start)] * (at > start)
            return None
        end = data.find(b"\n", at)
        line = data[at:] if end < 0 else data[at:end + 1]
        if line.startswith(b"{") and (at == start or 0 < objects < 16) and 0 < end - at < 2048:
            objects += 1
            method = stratum(line[:-1]) if objects == 1 else ""
            known = bool(method)
            if method := method or json_text(line[:-1]):
                facts.append(Stratum(row, method))
            if known:
                return None
        if upgrade and line in {b"\n", b"\r\n"}:
            if asked:
                return websocket(data, end + 1, row, facts, called=called)
            upgrade, gets = False, not called
        wanted = bool(upgrade and line.lower() in {b"upgrade: websocket\n", b"upgrade: websocket\r\n"})
        asked = asked or wanted
        if (upgrade and called and not wanted and 28 <= len(line) <= 64
                and re.match(rb"(?i:sec-websocket-protocol:)(?s:.*)( mqtt| amqp| wamp|\.stomp)", line)):
            facts.append(Spoken(row, "message-broker"))
        if connects and line in {b"\n", b"\r\n"}:
            return end + 1
        if b"\0" in line or at - start + len(line) > 16384 or end < 0:
            facts += [Text(start)] * (b"\0" not in line and at - start + len(line) <= 16384)
            return None
        at = end + 1
        if (posts or gets) and line in {b"\n", b"\r\n"}:
            begin = next_post(data, edges, at, start, row, facts, body=posts)
            if begin is None:
                return None
            at, posts, gets = begin, True, False
    end = data.find(b"\n", at)
    if end < 0 or end - at >= 8192:
        facts += [Text(start)] * (at > start and b"\n" not in data[at:] and len(data) - at < 8192)
        return None
    line = data[at:end]
    facts.append(SshBanner(row, text(line.removesuffix(b"\r")[:255])))
    if line.startswith((b"SSH-2.0-", b"SSH-1.99-")):
        facts += ssh(data, end + 1, first, row)
    return None


def next_post(data: bytes, edges: Edges, at: int, start: int, row: int, facts: list[Fact], *,
              body: bool) -> int | None:
    """Where a segment begins with a POST, or a banner, if the body that came at once is no miner's."""
    for edge, _ in edges:
        seen = data[at:edge]
        if not seen or (b"SSH-".startswith(seen) and len(seen) < 4):
            continue
        if seen.startswith(b"SSH-"):
            return at
        if body and seen[:1] in {b"{", b"["} and (method := work(seen[:2048])):
            facts.append(Stratum(row, method))
            return None
        if seen.startswith(b"POST ") and len(seen) > 5:
            return at
        body, at = False, edge
        if at - start > 16384 or b"\0" in seen:
            return None
    facts.append(Text(start))
    return None


@dataclass
class Console:
    """What one side said in text, as a shell or not; ``heard``: what its last segment acknowledged."""

    start: int = -1
    heard: int | None = None
    pages: bool = False
    sign: bytes = b""
    prompted: bool = False
    prompts: int = 0
    printed: set[str] = field(default_factory=set)
    told: set[str] = field(default_factory=set)

    def say(self, said: bytes, start: int, acknowledged: int, first: int, row: int) -> list[Fact]:
        """One segment of text that begins at ``start``; the other side's first byte is ``first``."""
        if start != self.start:
            self.start, self.heard, self.pages = start, None, False
        if self.heard is None:
            self.heard, self.prompted, self.pages = first, False, b" HTTP/1." in said[:2048]
        if self.pages:
            return []
        if 0 < (acknowledged - self.heard) % 2**32 <= 256:
            self.prompts = self.prompts + 1 if self.prompted else max(0, self.prompts - 1)
            self.printed |= printed(said)
        what = ["shell-prompts"] * (self.prompts == 3) + ["shell-output"] * (len(self.printed) > 1)
        new = [one for one in what if one not in self.told]
        self.told.update(new)
        self.heard = acknowledged
        sign = prompt(said)
        self.prompts = 0 if sign and sign != self.sign else self.prompts
        self.prompted, self.sign = bool(sign), sign or self.sign
        return [Spoken(row, one) for one in new]


def prompt(said: bytes) -> bytes:
    """How the prompt begins, and its sign, with which a segment ends; nothing if there is none."""
    last = re.split(rb"[\r\n]", said)[-1]
    mine = re.fullmatch(rb"(.{0,62}[$#%]|PS .{0,59}>) ", last, re.DOTALL)
    amount = re.search(rb"(^| )[0-9.]+ *[$#%>] \Z", last)
    return last[:3] + last[-2:-1] if mine and not amount else b""


def printed(said: bytes) -> set[str]:
    """Which program's output begins so."""
    line = said.split(b"\n")[0][:256]
    forms = {
        "id": rb"(?=.* gid=)uid=\d", "ps": rb"(?=.{0,27} PID )(USER |UID |  )", "passwd": rb"root:x:0:0:",
        "uname": rb"(?=.* #)Linux ", "shell": rb"sh: \d|bash: |/bin/(ba)?sh: |zsh: ",
        "mounts": rb"Filesystem |(?=.* on /).* type ", "links": rb"1: lo: <"}
    some = {name for name, form in forms.items() if re.match(form, line, re.DOTALL)}
    return some | ({"ls"} if re.match(rb"total \d+\n|[-dlcbps][-rwxsStT]{9}[ .+@]", said) else set())


def json_text(line: bytes) -> str:
    words = (b'"nonce', b'"target', b'"diff', b'"mining.', b'"login"')
    return pools.said(line) if line.startswith(b"{") and any(word in line for word in words) else ""


def websocket(data: bytes, at: int, row: int, facts: list[Fact], *, called: bool) -> None:
    """The first 16 messages that are in one frame of at most 2048 bytes."""
    told: set[str] = set()
    inflater: zlib._Decompress | None = zlib.decompressobj(-15)
    count = 0
    while count < 16 and len(data) - at >= 2:
        first, second = data[at], data[at + 1]
        wide = {126: 2, 127: 8}.get(second & 127, 0)
        begin = at + 2 + wide + (4 if second & 128 else 0)
        if first & 0x30 or 2 < first & 15 < 8 or len(data) < begin:
            return
        size = be(data[at + 2:at + 2 + wide]) if wide else second & 127
        if size >= 2**30:
            return
        at = begin + size
        if first & 8:
            continue
        if size > 2048 or not first & 0x80 or first & 15 == 0:
            if first & 0x40:
                return
            continue
        if len(data) < at:
            return
        key = data[begin - 4:begin] if second & 128 else bytes(4)
        message = bytes(byte ^ key[i % 4] for i, byte in enumerate(data[begin:at]))
        count += 1
        if first & 0x40:
            try:
                said = inflater.decompress(message + b"\0\0\xff\xff", 16384) if inflater else b""
            except zlib.error:
                said, inflater = b"", None
            if inflater and (inflater.unconsumed_tail or inflater.eof):
                inflater = None
            said = said[:2048]
            method = pools.said(said)
        else:
            said = message
            method = json_text(message)
        if first & 15 == 2 and said.startswith(b"SSH-") and b"\n" in said[:255]:
            facts.append(Spoken(row, "ssh-in-websocket"))
        elif count == 1 and not first & 0x40 and broker(message):
            facts.append(Spoken(row, "message-broker"))
            continue
        elif called and not first & 0x40:
            asked_within(said, row, facts, told)
        if method:
            facts.append(Stratum(row, method))


def x11(data: bytes, edges: Edges, at: int, seen: bytes, row: int, facts: list[Fact], *, called: bool) -> bool:
    """What a client of X begins with; of a display, its twentieth key."""
    if len(seen) < (8 if called else 12) or seen[0] not in ({1} if called else {0x42, 0x6c}):
        return False
    little = seen[2] == 11
    if seen[2:6] != (b"\x0b\0\0\0" if little else b"\0\x0b\0\0"):
        return False
    if not called:
        if seen[1] or seen[0] != (0x6c if little else 0x42):
            return False
        facts.append(Spoken(row, "x11-setup"))
        return True
    order: Literal["little", "big"] = "little" if little else "big"
    at, keys, end = at + 8 + 4 * int.from_bytes(seen[6:8], order), 0, edges[-1][0]
    while end - at >= 8:
        more = int.from_bytes(data[at + 4:at + 8], order) if data[at] in {1, 35} else 0
        if more > 0x3FFFFFF:
            return True
        keys += data[at] == 2
        if keys == 20:
            facts.append(Spoken(row, "x11-keys"))
            return True
        at += 32 + 4 * more
    return True


def dns_stream(data: bytes, edges: Edges, at: int, edge: int, row: int) -> list[Fact]:
    """Messages behind their lengths. Of the first one the header must be there at once; ``edge``: how much was."""
    facts: list[Fact] = []
    if edge - at < 14:
        return facts
    end = edges[-1][0]
    while end - at >= 14:
        size = be(data[at:at + 2])
        if not 17 <= size <= MESSAGE_MAX - 2 or data[at + 6:at + 8] != b"\0\1" or end - at < 2 + size:
            break
        message = dns(data[at + 2:at + 2 + size], size, (0, 0), row)
        if message is None:
            break
        facts += [message] if facts else [Spoken(row, "dns-over-tcp"), message]
        at += 2 + size
    return facts


def work(body: bytes) -> str:
    """The method of JSON-RPC, "" if it is none by which blocks are mined."""
    value = body.partition(b'"method":')[2].lstrip(b" ")
    method = value[1:].partition(b'"')[0][:32] if value.startswith(b'"') else b""
    known = method in {b"getblocktemplate", b"get_block_template", b"submitblock", b"submit_block", b"getwork",
                       b"eth_getWork"} or (method.startswith(b"eth_submit") and len(method) > 10)
    return text(method) if known else ""


def stratum(line: bytes) -> str:
    """The method of a line of JSON-RPC, "" if it is none of a mining pool's."""
    if b'"method":' not in line:
        return "job" if all(word in line for word in (b'"job":', b'"blob":', b'"target":')) else ""
    value = line.partition(b'"method":')[2].lstrip(b" ")
    if not value.startswith(b'"'):
        return ""
    method = value[1:].partition(b'"')[0][:32]
    wants = {b"login": (b'"login":', b'"pass":'), b"submit": (b'"nonce":',), b"job": (b'"blob":',)}
    known = (
        (method.startswith(b"mining.") and len(method) > 7)
        or (method.startswith(b"eth_submit") and len(method) > 10)
        or method == b"eth_getWork"
        or (method in wants and all(word in line for word in wants[method]))
    )
    return text(method) if known else ""


def ssh(data: bytes, at: int, first: int, row: int) -> list[Fact]:
    facts: list[Fact] = []
    while len(data) - at >= 6:
        size, padding, number = struct.unpack(">IBB", data[at:at + 6])
        body = data[at + 6:at + 4 + size - padding]
        whole = len(data) >= at + 4 + size
        if not 6 <= size <= 262144 or padding + 2 > size:
            break
        if number == 20:
            if facts or size + 4 > MESSAGE_MAX or not whole:
                break
            try:
                facts.append(kexinit(body, row))
            except ValueError:
                break
        elif number == 21:
            if facts and size <= 512 and whole:
                facts.append(SshNewKeys(row, (first + at + 4 + size) % 2**32))
            break
        elif not (1 <= number <= 19 or 30 <= number <= 49):
            break
        at += 4 + size
    return facts


def kexinit(body: bytes, row: int) -> SshKexInit:
    at, lists = 16, []
    for _ in range(10):
        size = be(body[at:at + 4])
        if at + 4 + size > len(body):
            raise ValueError("name-list longer than its message")
        lists.append(names(body[at + 4:at + 4 + size]))
        at += 4 + size
    if at + 5 > len(body):
        raise ValueError("message too short")
    return SshKexInit(row, *lists[:8])


def tls(data: bytes, edges: Edges, start: int, row: int) -> list[Fact]:
    data, edges = data[start:], [(edge - start, time_ns) for edge, time_ns in edges]
    at, joined = 0, b""
    while len(joined) < 4 or len(joined) < 4 + be(joined[1:4]):
        if len(data) - at < 5:
            return []
        size = be(data[at + 3:at + 5])
        if data[at] != 22 or data[at + 1] != 3 or not 0 < size <= 16640:
            return []
        joined += data[at + 5:at + 5 + size]
        if joined and joined[0] == 2:
            return records(data, edges, 0, row)
        if joined and joined[0] != 1:
            return []
        at += 5 + size
    total = 4 + be(joined[1:4])
    if total > MESSAGE_MAX:
        return []
    try:
        return [client_hello(joined[4:total], row), *records(data, edges, at, row)]
    except ValueError:
        return []


def records(data: bytes, edges: Edges, at: int, row: int) -> list[Fact]:
    """What the headers of a TLS stream's records say; the time of a record is that of its header's last byte."""
    facts: list[Fact] = []
    times_ms: list[int] = []
    sizes: list[int] = []
    first_ns, more = 0, True
    while len(data) - at >= 5 and len(sizes) < 64:
        size = be(data[at + 3:at + 5])
        more = False
        if data[at] not in {20, 21, 22, 23} or data[at + 1] != 3 or not 0 < size <= 16640:
            break
        if data[at] == 23:
            now_ns = next(time_ns for edge, time_ns in edges if edge >= at + 5)
            first_ns = first_ns if sizes else now_ns
            if not 0 <= now_ns - first_ns < (2**32 - 1) * 10**6:
                break
            times_ms.append((now_ns - first_ns) // 10**6)
            sizes.append(size)
            cells = sum(any((one - more) % 514 == 0 and 1 <= (one - more) // 514 <= 4 for more in (16, 17, 24))
                        for one in sizes)
            padded, bodies = sum(one in {544, 560} for one in sizes), sum(one > 48 for one in sizes)
            if (cells >= 3 and cells * 4 >= bodies) or (padded >= 8 and padded * 2 >= bodies):
                facts.append(Spoken(row, "tor"))
                break
            if sum(one > 4096 for one in sizes) >= 2 and not cells:
                break
            talk = sum(one > 3072 for one in sizes) <= 2 and times_ms[-1] >= 500 * len(sizes)
            if len(sizes) % 4 == 0 and talk:
                facts.append(TlsRecords(row, tuple(first_ns + 10**6 * ms for ms in times_ms), tuple(sizes)))
        more = len(sizes) < 64
        at += 5 + size
    facts.append(Records(first_ns, times_ms, sizes, more))
    return facts


def answered_first(mine: Records, theirs: Records, now_ns: int) -> bool:
    """Whether what this side says now, first behind its Finished, answers what broke a silence of a second."""
    times, word = theirs.times_ms, len(theirs.times_ms) - 1
    if not theirs.more or word < 1 or mine.sizes[0] not in {53, 69} or theirs.first_ns > mine.first_ns:
        return False
    late = now_ns - theirs.first_ns - times[-1] * 10**6 > 40 * 10**6
    while word and (times[-1] - times[word - 1]) % 2**32 <= 40:
        word -= 1
    silent = word > 0 and (times[word] - times[word - 1]) % 2**32 >= 1000
    return not late and silent and theirs.first_ns + times[word] * 10**6 - mine.first_ns >= 10**9


class Cursor:
    """Reads lengths and bytes; a length that is not covered is a ValueError."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def take(self, n: int) -> bytes:
        if n > len(self.data):
            raise ValueError("too short")
        part, self.data = self.data[:n], self.data[n:]
        return part

    def vector(self, length_bytes: int) -> bytes:
        return self.take(be(self.take(length_bytes)))


def client_hello(body: bytes, row: int) -> TlsClientHello:
    hello = Cursor(body)
    hello.take(34)
    hello.vector(1)
    hello.vector(2)
    hello.vector(1)
    extensions = Cursor(hello.vector(2) if hello.data else b"")
    server_name, alpn, encrypted = "", b"", False
    while extensions.data:
        kind = be(extensions.take(2))
        value = extensions.vector(2)
        if kind == 0 and len(value) >= 5 and value[2] == 0:
            server_name = text(Cursor(value[3:]).vector(2))
        elif kind == 16 and len(value) >= 2:
            alpn = Cursor(value).vector(2)
        elif kind == 0xFE0D:
            encrypted = True
    protocols = []
    while alpn:
        protocols.append(text(alpn[1:1 + alpn[0]]))
        alpn = alpn[1 + alpn[0]:]
    return TlsClientHello(row, server_name, tuple(protocols), encrypted)


def dns(data: bytes, size: int, ports: tuple[int, int], row: int) -> DnsMessage | None:
    """``data`` is what was captured of a UDP payload of ``size`` bytes."""
    if len(data) < 17:
        return None
    flags, questions, answers, authority, additional = struct.unpack(">HHHHH", data[2:12])
    response = bool(flags & 0x8000)
    if questions != 1 or flags & 0x7800:
        return None
    labels, at = [], 12
    while at < len(data) and at - 12 < 255 and 0 < data[at] < 64:
        labels.append(data[at + 1:at + 1 + data[at]])
        at += 1 + data[at]
    if at >= len(data) or at - 12 >= 255 or data[at] != 0 or len(data) - at - 1 < 4:
        return None
    query_type, query_class = struct.unpack(">HH", data[at + 1:at + 5])
    if not {53, 5353} & set(ports):
        if query_class != 1 or flags & 0x0040:
            return None
        if not response and (answers or authority or additional > 2):
            return None
    total = answer_bytes(data, at + 5, answers, size) if response else 0
    said = addresses(data, at + 5, answers) if response and answers else ((), (), 0)
    return DnsMessage(row, response, ".".join(label_text(label) for label in labels), query_type, total, *said)


def whole_name(data: bytes, at: int) -> tuple[bytes, ...] | None:
    """Return the labels of the name at ``at``, in lower case; None if it is none. Pointers go back only."""
    labels: list[bytes] = []
    began = at
    while at < len(data):
        if data[at] >= 192:
            if len(data) - at < 2 or (be(data[at:at + 2]) & 0x3FFF) >= began:
                return None
            at = began = be(data[at:at + 2]) & 0x3FFF
        elif data[at] > 63:
            return None
        elif data[at] == 0:
            return tuple(labels)
        else:
            label = data[at + 1:at + 1 + data[at]]
            if len(label) < data[at] or sum(len(one) + 1 for one in [*labels, label]) > 254:
                return None
            labels.append(label.lower())
            at += 1 + data[at]
    return None


def addresses(data: bytes, at: int, answers: int) -> tuple[tuple[bytes, ...], tuple[str, ...], int]:
    """Return the addresses and aliases of the question in an answer, and their least TTL."""
    question = whole_name(data, 12)
    names, found, ttls = [question], [], []
    for _ in range(min(answers, 64) if question is not None else 0):
        owner = whole_name(data, at)
        while at < len(data) and 0 < data[at] < 64:
            at += 1 + data[at]
        if owner is None or at >= len(data):
            break
        at += 2 if data[at] >= 192 else 1
        if len(data) - at < 10:
            break
        kind, of_class, ttl, length = struct.unpack(">HHIH", data[at:at + 10])
        at += 10
        value = data[at:at + length]
        if len(value) < length:
            break
        if owner in names and of_class & 0x7FFF == 1:
            if (kind, length) in ((1, 4), (28, 16)) and len(found) < 16:
                found.append(bytes(10) + b"\xff\xff" + value if kind == 1 else value)
                ttls.append(ttl)
            elif kind == 5 and len(names) < 5 and (alias := whole_name(data, at)) is not None:
                names.append(alias)
                ttls.append(ttl)
        at += length
    ttl_s = min(ttls, default=2**32 - 1)
    aliases = tuple(".".join(label_text(label) for label in name) for name in names[1:] if name is not None)
    return tuple(found), aliases, 0 if ttl_s > 0x7FFFFFFF else ttl_s


def label_text(label: bytes) -> str:
    return "".join("\\" + chr(b) if b in b".\\" else chr(b) if 32 < b < 127 else f"\\{b:03d}" for b in label)


def answer_bytes(data: bytes, at: int, answers: int, size: int) -> int:
    total = 0
    for _ in range(answers):
        while at < len(data) and 0 < data[at] < 64:
            at += 1 + data[at]
        if at >= len(data):
            break
        at += 2 if data[at] >= 192 else 1
        if len(data) - at < 10:
            break
        length = min(be(data[at + 8:at + 10]), max(size - at - 10, 0))
        total += length
        at += 10 + length
    return total


def vpn(data: bytes, size: int) -> str:
    """What the handshakes of VPNs have in fixed places. WireGuard's data: see `Tunnels`."""
    if len(data) >= 16 and data[:4] in {b"\1\0\0\0", b"\2\0\0\0", b"\3\0\0\0", b"\4\0\0\0"}:
        return "wireguard" if (data[0], size) in {(1, 148), (2, 92)} else ""
    if len(data) == size >= 14 and openvpn(data):
        return "openvpn"
    return "ike" if ike(data, size) or (len(data) >= 32 and data[:4] == bytes(4) and ike(data[4:], size - 4)) else ""


def ike(data: bytes, size: int) -> bool:
    if len(data) < 28 or be(data[24:28]) != size or data[20:24] != bytes(4) or data[:8] == bytes(8):
        return False
    return (data[17], data[18]) in {(0x20, 34), (0x10, 2), (0x10, 4)}


class Tunnels:
    """Counts WireGuard's data messages (type 4) by their ends."""

    def __init__(self) -> None:
        self.seen: dict[tuple, list[tuple[bytes, int]]] = {}

    def told(self, row: dict, data: bytes, size: int) -> bool:
        if len(data) < 16 or data[:4] != b"\4\0\0\0" or data[12:16] != bytes(4) or size < 32 or size % 16:
            return False
        run = self.seen.setdefault(stream_key(row), [])
        if len(run) == 4:
            return False
        receiver, number = data[4:8], int.from_bytes(data[8:12], "little")
        if run and (run[-1][0] != receiver or not 1 <= (number - run[-1][1]) % 2**32 <= 1024):
            run.clear()
        run.append((receiver, number))
        return len(run) == 4


def read_frames(
    frames: list[tuple[int, bytes, int]], times_ns: list[int] | None = None, fragments: Fragments | None = None,
) -> tuple[list[dict], list[Fact]]:
    """Rows and facts of (link type, frame, wire bytes); no segment may be cut by the snap length."""
    rows: list[dict] = []
    facts: list[Fact] = []
    streams: dict[tuple, dict] = {}
    tunnels = Tunnels()
    fragments = fragments or Fragments()
    for number, (link, frame, wire_bytes) in enumerate(frames):
        seen = packet(link, frame, wire_bytes, times_ns[number] if times_ns else 0)
        if seen is None:
            continue
        row, payload = seen
        if piece := row.pop("fragment", None):
            whole = fragments.take(row, piece)
            if whole is None:
                continue
            row, payload = whole
        size = row["payload_bytes"]
        if row["protocol"] == 17 and payload:
            fact = dns(payload, size, (row["source_port"], row["destination_port"]), len(rows))
            what = "" if fact else vpn(payload, size)
            if not fact and not what and tunnels.told(row, payload, size):
                what = "wireguard"
            facts += [fact] if fact else [Spoken(len(rows), what)] if what else []
        elif row["protocol"] == 6 and payload is not None:
            facts += segment(streams, row, payload, len(rows))
        rows.append(row)
    return rows, facts


def stream_key(row: dict) -> tuple:
    return (row["source"], row["destination"], row["source_port"], row["destination_port"])


def segment(streams: dict[tuple, dict], row: dict, payload: bytes, index: int) -> list[Fact]:
    key = stream_key(row)
    sequence, syn = row["sequence"], bool(row["tcp_flags"] & 2)
    if row["tcp_flags"] & 4 or not row["tcp_flags"] & 18 or not (payload or syn):
        return []
    if syn:
        sequence = (sequence + 1) % 2**32
        if key not in streams or streams[key]["first"] != sequence:
            streams[key] = {"first": sequence, "data": b"", "facts": 0, "edges": [], "ahead": [], "syn": False,
                            "console": Console(), "records": None}
        streams[key]["called"] = bool(row["tcp_flags"] & 16)
        streams[key]["syn"] |= bool(payload and not streams[key]["data"])
    elif key not in streams:
        if not (payload.startswith(b"SSH-")
                or (payload[:2] == b"\x16\x03" and len(payload) >= 6 and payload[2] <= 4 and payload[5] == 1)):
            return []
        streams[key] = {"first": sequence, "data": b"", "facts": 0, "edges": [], "ahead": [], "called": False,
                        "syn": False, "console": Console(), "records": None}
    stream = streams[key]
    if stream["syn"] and not syn:
        if sequence == stream["first"]:  # the other side refused what the SYN brought
            stream.update(data=b"", facts=0, edges=[], syn=False, console=Console(), records=None)
        elif sequence == (stream["first"] + len(stream["data"])) % 2**32:
            stream["syn"] = False
    at = (sequence - stream["first"] + 2**31) % 2**32 - 2**31
    if at > len(stream["data"]):
        if len(stream["ahead"]) < 8 and (at, len(payload)) not in [(at, len(one)) for at, one in stream["ahead"]]:
            stream["ahead"].append((at, payload))
        return []
    some = [(at, payload)]
    more: list[Fact] = []
    while some:
        at, payload = some.pop()
        if at + len(payload) > len(stream["data"]):
            said = payload[len(stream["data"]) - at:]
            stream["data"] += said
            stream["edges"].append((len(stream["data"]), row["time_ns"]))
            read = stream_read(stream["data"], stream["edges"], stream["first"], index, called=stream["called"])
            back = (row["destination"], row["source"], row["destination_port"], row["source_port"])
            other = streams.get(back)
            if read and isinstance(read[-1], Text) and not stream["called"]:
                first = other["first"] if other else row["acknowledgement"]
                more += stream["console"].say(said, read[-1].start, row["acknowledgement"], first, index)
            if read and isinstance(read[-1], Records):
                before, stream["records"] = stream["records"], read[-1]
                if other and other["records"] and not stream["called"] and (
                        (len(before.sizes) if before else 0) < 2 <= len(read[-1].sizes)) and (
                        answered_first(read[-1], other["records"], row["time_ns"])):
                    more.append(Spoken(index, "tls-answered-first", read[-1].sizes[1]))
        stream["ahead"].sort(key=lambda one: one[0])
        if stream["ahead"] and stream["ahead"][0][0] <= len(stream["data"]):
            some = [stream["ahead"].pop(0)]
    facts = stream_facts(stream["data"], stream["edges"], stream["first"], index, called=stream["called"])
    new = facts[stream["facts"]:]
    stream["facts"] = len(facts)
    return new + more
