"""What ext/packets.pyx does, written for the eye: no speed, no bounds on memory, everything from scratch each time.

A packet is a dict with the fields of `records.PACKET`. A stream is all its bytes in order, read again from the start
with each segment; a fact is new when there is one more than before.
"""

from __future__ import annotations

import struct

from gpuguard.core.records import DnsMessage, Fact, SshBanner, SshKexInit, SshNewKeys, Stratum, TlsClientHello

MESSAGE_MAX = 16384
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
    later_fragment = be(data[6:8]) & 0x1FFF != 0
    return transport(row, data[header:total], total - header, later_fragment)


def ipv6(row: dict, data: bytes, wire_bytes: int) -> tuple[dict, bytes | None] | None:
    if len(data) < 40:
        return None
    row["source"], row["destination"] = data[8:24], data[24:40]
    size, kind = be(data[4:6]), data[6]
    if size == 0 and kind != 59:
        size = max(wire_bytes - 40, 0)
    rest = data[40:40 + size]
    portless = False
    for _ in range(16):
        if kind not in EXTENSIONS or portless:
            break
        length = 8 if kind == 44 else 0 if len(rest) < 8 else (rest[1] + 2) * 4 if kind == 51 else (rest[1] + 1) * 8
        if len(rest) < 8 or length > len(rest):
            portless = True
            break
        portless = kind == 44 and be(rest[2:4]) >> 3 != 0
        kind, rest, size = rest[0], rest[length:], size - length
    row["protocol"] = kind
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


# -- facts ------------------------------------------------------------------------------------------------------------


def text(data: bytes) -> str:
    return "".join(chr(b) if 32 <= b < 127 else "?" for b in data)


def names(data: bytes) -> tuple[str, ...]:
    return tuple(text(data).split(",")) if data else ()


def stream_facts(data: bytes, first: int, row: int) -> list[Fact]:
    """The facts of a stream that begins with ``data``, whose first byte has sequence number ``first``."""
    if data[:1] == b"\x16":
        return tls(data, row)
    if data[:1] == b"{" and 0 < data.find(b"\n") < 2048 and (method := stratum(data[:data.find(b"\n")])):
        return [Stratum(row, method)]
    at = 0
    while not data[at:].startswith(b"SSH-"):
        if b"SSH-".startswith(data[at:]):
            return []
        end = data.find(b"\n", at)
        line = data[at:] if end < 0 else data[at:end + 1]
        if b"\0" in line or at + len(line) > 16384 or end < 0:
            return []
        at = end + 1
    end = data.find(b"\n", at)
    if end < 0 or end - at >= 8192:
        return []
    line = data[at:end]
    facts: list[Fact] = [SshBanner(row, text(line.removesuffix(b"\r")[:255]))]
    if line.startswith((b"SSH-2.0-", b"SSH-1.99-")):
        facts += ssh(data, end + 1, first, row)
    return facts


def stratum(line: bytes) -> str:
    """The method of a line of JSON-RPC, "" if it is none of a mining pool's."""
    if b'"method":' not in line:
        return "job" if all(word in line for word in (b'"job":', b'"blob":', b'"target":')) else ""
    value = line.partition(b'"method":')[2].lstrip(b" ")
    if not value.startswith(b'"'):
        return ""
    method = value[1:].partition(b'"')[0][:32]
    wants = {b"login": b'"pass":', b"submit": b'"nonce":', b"job": b'"blob":'}
    known = (
        (method.startswith(b"mining.") and len(method) > 7)
        or (method.startswith(b"eth_submit") and len(method) > 10)
        or method == b"eth_getWork"
        or (method in wants and wants[method] in line)
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


def tls(data: bytes, row: int) -> list[Fact]:
    at, joined = 0, b""
    while len(joined) < 4 or len(joined) < 4 + be(joined[1:4]):
        if len(data) - at < 5:
            return []
        size = be(data[at + 3:at + 5])
        if data[at] != 22 or data[at + 1] != 3 or not 0 < size <= 16640:
            return []
        joined += data[at + 5:at + 5 + size]
        if joined and joined[0] != 1:
            return []
        at += 5 + size
    total = 4 + be(joined[1:4])
    if total > MESSAGE_MAX:
        return []
    try:
        return [client_hello(joined[4:total], row)]
    except ValueError:
        return []


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
    server_name, alpn = "", b""
    while extensions.data:
        kind = be(extensions.take(2))
        value = extensions.vector(2)
        if kind == 0 and len(value) >= 5 and value[2] == 0:
            server_name = text(Cursor(value[3:]).vector(2))
        elif kind == 16 and len(value) >= 2:
            alpn = Cursor(value).vector(2)
    protocols = []
    while alpn:
        protocols.append(text(alpn[1:1 + alpn[0]]))
        alpn = alpn[1 + alpn[0]:]
    return TlsClientHello(row, server_name, tuple(protocols))


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
    return DnsMessage(row, response, ".".join(label_text(label) for label in labels), query_type, total)


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


def read_frames(frames: list[tuple[int, bytes, int]]) -> tuple[list[dict], list[Fact]]:
    """Rows and facts of (link type, frame, wire bytes); no segment may be cut by the snap length."""
    rows: list[dict] = []
    facts: list[Fact] = []
    streams: dict[tuple, dict] = {}
    for link, frame, wire_bytes in frames:
        seen = packet(link, frame, wire_bytes)
        if seen is None:
            continue
        row, payload = seen
        if row["protocol"] == 17 and payload:
            fact = dns(payload, row["payload_bytes"], (row["source_port"], row["destination_port"]), len(rows))
            facts += [fact] if fact else []
        elif row["protocol"] == 6 and payload is not None:
            facts += segment(streams, row, payload, len(rows))
        rows.append(row)
    return rows, facts


def segment(streams: dict[tuple, dict], row: dict, payload: bytes, index: int) -> list[Fact]:
    key = (row["source"], row["destination"], row["source_port"], row["destination_port"])
    sequence = row["sequence"]
    if row["tcp_flags"] & 2:
        sequence = (sequence + 1) % 2**32
        if key not in streams or streams[key]["first"] != sequence:
            streams[key] = {"first": sequence, "data": b"", "facts": 0}
    elif key not in streams:
        if not (payload.startswith(b"SSH-")
                or (payload[:2] == b"\x16\x03" and len(payload) >= 6 and payload[2] <= 4 and payload[5] == 1)):
            return []
        streams[key] = {"first": sequence, "data": b"", "facts": 0}
    stream = streams[key]
    at = (sequence - stream["first"]) % 2**32
    if at > len(stream["data"]) or at + len(payload) <= len(stream["data"]):
        return []
    stream["data"] += payload[len(stream["data"]) - at:]
    facts = stream_facts(stream["data"], stream["first"], index)
    new = facts[stream["facts"]:]
    stream["facts"] = len(facts)
    return new
