"""Captures for benchmarks/packets.py: a GPU server's traffic by kinds of flows, made here, the same for every run.

The kinds and their shares are guesses of what such a host sees; what the table has to tell Python of is set by what
was counted in 12,000 flows of public captures: one to three exchanges after a silence in a hundred packets, one fact
read from a payload for each flow. Of a flow's first 12 packets all bytes are in the file, of later ones 54 of payload,
as a capture with a snap length has them. All addresses are made up.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from pathlib import Path

FIN, SYN, RST, PSH, ACK = 1, 2, 4, 8, 16
SHARES = {"tls": 0.62, "tcp": 0.10, "dns": 0.20, "udp": 0.05, "icmp": 0.01, "refused": 0.017, "ssh": 0.003}
WHOLE_PACKETS = 12
SNAPPED_BYTES = 54


class Packet(NamedTuple):
    """One packet of one flow; ``at_s`` is since its beginning."""

    at_s: float
    side: int
    size: int
    flags: int
    payload: bytes


def _string(*parts: bytes) -> bytes:
    text = b",".join(parts)
    return struct.pack(">I", len(text)) + text


def kexinit(noise: bytes) -> bytes:
    """RFC 4253, 7.1, with the lists of a common client."""
    cipher = (b"chacha20-poly1305@openssh.com", b"aes128-ctr", b"aes256-gcm@openssh.com")
    mac = (b"umac-64-etm@openssh.com", b"hmac-sha2-256-etm@openssh.com", b"hmac-sha2-256")
    lists = [(b"curve25519-sha256", b"ecdh-sha2-nistp256", b"ext-info-c"), (b"ssh-ed25519", b"rsa-sha2-512"), cipher,
             cipher, mac, mac, (b"none",), (b"none",), (b"",), (b"",)]
    return ssh_packet(b"\x14" + noise[:16] + b"".join(_string(*one) for one in lists) + bytes(5))


def ssh_packet(payload: bytes) -> bytes:
    """RFC 4253, 6, before encryption."""
    padding = 8 - (5 + len(payload)) % 8
    padding += 8 if padding < 4 else 0
    return struct.pack(">IB", 1 + len(payload) + padding, padding) + payload + bytes(padding)


def client_hello(name: bytes, noise: bytes) -> bytes:
    """RFC 8446, 4.1.2, with server name and ALPN."""
    sni = struct.pack(">HHHBH", 0, len(name) + 5, len(name) + 3, 0, len(name)) + name
    alpn = b"\0\x10\0\x0e\0\x0c\x02h2\x08http/1.1"
    rest = struct.pack(">HH", 21, 180) + bytes(180)
    extensions = sni + alpn + rest
    ciphers = struct.pack(">H4H", 8, 0x1301, 0x1302, 0x1303, 0xC02F)
    body = (b"\x03\x03" + noise[:32] + b"\x20" + noise[32:64] + ciphers + b"\x01\0"
            + struct.pack(">H", len(extensions)) + extensions)
    shake = b"\x01" + struct.pack(">I", len(body))[1:] + body
    return b"\x16\x03\x01" + struct.pack(">H", len(shake)) + shake


def dns(name: bytes, *, answer: bool) -> bytes:
    """RFC 1035, 4: a question for an address, or its answer."""
    labels = b"".join(bytes([len(one)]) + one for one in name.split(b".")) + b"\0"
    question = labels + b"\0\x01\0\x01"
    if not answer:
        return b"\x12\x34\x01\0\0\x01\0\0\0\0\0\0" + question
    return b"\x12\x34\x81\x80\0\x01\0\x01\0\0\0\0" + question + b"\xc0\x0c\0\x01\0\x01\0\0\0\x3c\0\x04\x0a\0\0\x09"


class _Flow:
    """Packets of one flow, with a clock."""

    def __init__(self, dice: np.random.Generator, noise: bytes) -> None:
        self.now_s = 0.0
        self.packets: list[Packet] = []
        self.rtt_s = float(dice.choice((0.0004, 0.002, 0.03)))
        self.dice, self.noise = dice, noise

    def say(self, side: int, payload: bytes | int, after_s: float = 0.0001, flags: int = ACK | PSH) -> None:
        self.now_s += after_s
        data = payload if isinstance(payload, bytes) else self.noise[:payload]
        self.packets.append(Packet(self.now_s, side, len(data), flags, data))

    def open(self) -> None:
        self.say(0, 0, 0, SYN)
        self.say(1, 0, self.rtt_s, SYN | ACK)
        self.say(0, 0, 0.0001, ACK)

    def bulk(self, side: int, count: int) -> None:
        for i in range(count):
            self.say(side, 1448, 0.00012, ACK)
            if i % 2:
                self.say(1 - side, 0, 0.00005, ACK)

    def pause(self) -> float:
        """Between requests: mostly at once, one in ten after a silence."""
        return 10 ** float(self.dice.uniform(-1, 0.7)) if self.dice.random() < 0.1 else 0.003

    def close(self) -> None:
        self.say(0, 0, 0.0005, ACK | FIN)
        self.say(1, 0, self.rtt_s, ACK | FIN)
        self.say(0, 0, 0.0001, ACK)


def _tls(flow: _Flow, name: bytes, count: int) -> None:
    flow.open()
    flow.say(0, client_hello(name, flow.noise[64:]))
    flow.say(1, b"\x16\x03\x03\x00\x7a" + flow.noise[:1400], flow.rtt_s)
    flow.say(0, b"\x14\x03\x03\0\x01\x01\x17\x03\x03\0\x35" + flow.noise[:53])
    while len(flow.packets) < count - 3:
        # One silence in eight is broken by the server, as notifications and long polls do.
        first = int(flow.dice.random() < 0.125)
        flow.say(first, int(flow.dice.integers(60, 700)), flow.pause())
        flow.say(1 - first, int(flow.dice.integers(60, 1448)), flow.rtt_s)
        flow.bulk(1, min(int(flow.dice.pareto(1.2) * 3), max(0, count - 5 - len(flow.packets))))
    if flow.dice.random() < 0.8:
        flow.close()


def _tcp(flow: _Flow, count: int) -> None:
    flow.open()
    while len(flow.packets) < count - 3:
        flow.say(0, int(flow.dice.integers(60, 400)), flow.pause())
        flow.say(1, 120, flow.rtt_s)
        flow.bulk(int(flow.dice.random() < 0.5), max(1, min(40, (count - len(flow.packets)) // 2)))
    flow.close()


def _ssh(flow: _Flow, count: int) -> None:
    flow.open()
    for side in (0, 1):
        flow.say(side, b"SSH-2.0-OpenSSH_9.2p1 Debian-2\r\n", flow.rtt_s)
    for side in (0, 1):
        flow.say(side, kexinit(flow.noise), flow.rtt_s)
    flow.say(0, ssh_packet(b"\x1e" + flow.noise[:36]), flow.rtt_s)
    flow.say(1, ssh_packet(b"\x1f" + flow.noise[:400]) + ssh_packet(b"\x15"), flow.rtt_s)
    flow.say(0, ssh_packet(b"\x15"), 0.001)
    for side, size in ((0, 44), (1, 44), (0, 60), (1, 52), (0, 368), (1, 28), (0, 112), (1, 364), (1, 44), (0, 380),
                       (1, 108)):
        flow.say(side, size, flow.rtt_s)
    while len(flow.packets) < count:
        flow.say(0, 36, max(0.03, float(flow.dice.lognormal(-1.8, 0.6))))
        flow.say(1, 36, flow.rtt_s)
        if flow.dice.random() < 0.1:
            flow.say(1, int(flow.dice.integers(100, 1400)), 0.002)


def packets_of(kind: str, dice: np.random.Generator, noise: bytes, count: int, number: int) -> list[Packet]:
    """Return one flow of a kind, about so many packets of it."""
    flow = _Flow(dice, noise)
    name = b"host-%d.example%d.org" % (number % 5000, number % 97)
    match kind:
        case "tls":
            _tls(flow, name, count)
        case "tcp":
            _tcp(flow, count)
        case "ssh":
            _ssh(flow, max(count, 60))
        case "dns":
            flow.say(0, dns(name, answer=False))
            flow.say(1, dns(name, answer=True), flow.rtt_s)
        case "udp":
            for _ in range(max(1, count // 3)):
                flow.say(0, b"\x40" + noise[:int(dice.integers(40, 1200))], flow.pause())
                flow.say(1, b"\x40" + noise[:int(dice.integers(40, 1200))], flow.rtt_s)
        case "icmp":
            for _ in range(4):
                flow.say(0, 56, 1.0)
                flow.say(1, 56, flow.rtt_s)
        case _:
            flow.say(0, 0, 0, SYN)
            flow.say(1, 0, flow.rtt_s, RST | ACK)
    return flow.packets


_PORTS = {"tls": 443, "tcp": 2049, "ssh": 22, "dns": 53, "udp": 4433, "icmp": 0, "refused": 8080}
_PROTOCOLS = {"dns": 17, "udp": 17, "icmp": 1}


def build(path: Path, *, packets: int, flows: int, span_s: float, seed: int) -> dict[str, int]:
    """Write a capture of at least so many packets and flows; return what is in it."""
    dice = np.random.default_rng(seed)
    noise = dice.bytes(4096)
    kinds = dice.choice(list(SHARES), size=flows, p=list(SHARES.values()))
    # Packets go to flows as a heavy-tailed law has it; what is left is taken up by the largest.
    weights = dice.pareto(1.4, size=flows) + 0.3
    counts = np.maximum(9, weights / weights.sum() * packets * 1.3).astype(int)
    starts = np.sort(dice.random(flows)) * span_s
    times: list[float] = []
    records: list[bytes] = []
    for number, kind in enumerate(kinds.tolist()):
        _flow(times, records, kind, packets_of(kind, dice, noise, int(counts[number]), number), number,
              float(starts[number]))
    order = np.argsort(times, kind="stable")
    with path.open("wb") as file:
        file.write(struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 65535, 1))
        for i in order.tolist():
            micros = int(times[i] * 1e6)
            file.write(struct.pack("<II", 1_700_000_000 + micros // 1_000_000, micros % 1_000_000))
            file.write(records[i])
    if len(records) < packets:
        raise ValueError(f"{len(records)} packets of {packets}: the law of sizes does not give enough")
    return {"packets": len(records), "flows": flows, "bytes": path.stat().st_size, "span_s": round(span_s)}


def _flow(times: list[float], records: list[bytes], kind: str, packets: list[Packet], number: int,
          start_s: float) -> None:
    """Add the frames of one flow."""
    ends = (struct.pack(">I", 0x0A000001 + number % 64), struct.pack(">I", 0x5DB80000 + number * 7919 % 60_000))
    ports = (10_000 + number % 50_000, _PORTS[kind])
    protocol = _PROTOCOLS.get(kind, 6)
    sent = [number * 977 & 0xFFFFFFF, number * 3571 & 0xFFFFFFF]
    for place, one in enumerate(packets):
        side = one.side
        payload = one.payload if place < WHOLE_PACKETS else one.payload[:SNAPPED_BYTES]
        near, far = ports[side], ports[1 - side]
        if protocol == 6:
            head = struct.pack(">HHIIBBHHH", near, far, sent[side], sent[1 - side], 0x50, one.flags, 1000, 0, 0)
        elif protocol == 17:
            head = struct.pack(">HHHH", near, far, 8 + one.size, 0)
        else:
            head = struct.pack(">BBHHH", 0 if side else 8, 0, 0, number & 0xFFFF, place // 2)
        total = 20 + len(head) + one.size
        ip = struct.pack(">HBBHHHBBH4s4s", 0x0800, 0x45, 0, total, 0, 0, 64, protocol, 0, ends[side], ends[1 - side])
        frame = bytes(12) + ip + head + payload
        times.append(start_s + one.at_s)
        records.append(struct.pack("<II", len(frame), total + 14) + frame)
        sent[side] = (sent[side] + one.size + bool(one.flags & (SYN | FIN))) & 0xFFFFFFFF
