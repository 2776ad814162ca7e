"""Packets of one made-up conversation: side 0 opened it. For tests of the flow table and of what follows from it."""

from __future__ import annotations

import struct

import msgspec
import numpy as np

from gpuguard.core.records import PACKET, Packets, SshKexInit, SshNewKeys

FIN, SYN, ACK = 1, 2, 16
MAPPED = b"\0" * 10 + b"\xff\xff"
CHACHA = ("chacha20-poly1305@openssh.com",)


def kexinit(*marks):
    return SshKexInit(0, ("curve25519-sha256", *marks), ("ssh-ed25519",), CHACHA, CHACHA, ("hmac-sha2-256",),
                      ("hmac-sha2-256",), ("none",), ("none",))


def frame(ends, sent, side, data):
    """The IPv4 packet in which one side says this (None: its SYN) and acknowledges all that the other has ``sent``."""
    (source, source_port), (destination, destination_port) = ends[side], ends[1 - side]
    flags = (2, 18)[side] if data is None else 24
    body = struct.pack(">HHIIBBHHH", source_port, destination_port, sent[side], sent[1 - side], 80, flags, 0, 0, 0)
    body += data or b""
    sent[side] = (sent[side] + (1 if data is None else len(data))) % 2**32
    return struct.pack(">BBHHHBBH4s4s", 69, 0, 20 + len(body), 0, 0, 64, 6, 0, source, destination) + body


class Conversation:
    def __init__(self, *, rtt_ms=1, port=40_000, handshake=True, start_ns=10**18, near=(10, 0, 0, 2),
                 far=(10, 0, 0, 1)):
        self.now_ns = start_ns
        self.ends = ((MAPPED + bytes(near), port), (MAPPED + bytes(far), 22))
        self.sequence = [4_294_967_000, 77]  # the first one soon wraps
        self.rows, self.facts = [], []
        if handshake:
            self.packet(0, 0, SYN)
            self.packet(1, 0, SYN | ACK, after_ms=rtt_ms)
            self.packet(0, 0, ACK)

    def packet(self, side, size, flags=ACK, *, after_ms=0, sequence=None):
        self.now_ns += round(after_ms * 1_000_000)
        (source, source_port), (destination, destination_port) = self.ends[side], self.ends[1 - side]
        row = np.zeros(1, PACKET)[0]
        row["time_ns"] = self.now_ns
        row["source"], row["destination"] = np.frombuffer(source, "u1"), np.frombuffer(destination, "u1")
        row["source_port"], row["destination_port"] = source_port, destination_port
        row["sequence"] = self.sequence[side] if sequence is None else sequence % 2**32
        row["payload_bytes"], row["protocol"], row["tcp_flags"], row["ip_version"] = size, 6, flags, 4
        self.rows.append(row)
        if sequence is None:
            self.sequence[side] = (self.sequence[side] + size + bool(flags & (SYN | FIN))) % 2**32

    def say(self, side, size, *, after_ms=0.1):
        self.packet(side, size, ACK | 8, after_ms=after_ms)

    def again(self, side, size, *, after_ms):
        self.packet(side, size, after_ms=after_ms, sequence=self.sequence[side] - size)

    def keepalive(self, side, *, after_ms):
        self.packet(side, 1, after_ms=after_ms, sequence=self.sequence[side] - 1)

    def fact(self, fact):
        """Let a fact be read from the next packet."""
        self.facts.append(msgspec.structs.replace(fact, row=len(self.rows)))

    def newkeys(self, side, size, more=0):
        end = (self.sequence[side] + size) % 2**32
        self.fact(SshNewKeys(0, end))
        self.say(side, size + more)

    def block(self, start=0, end=None):
        end = len(self.rows) if end is None else end
        rows = np.array(self.rows[start:end], PACKET) if end > start else np.zeros(0, PACKET)
        facts = tuple(
            msgspec.structs.replace(fact, row=fact.row - start) for fact in self.facts if start <= fact.row < end)
        return Packets(time_ns=self.now_ns, netns=0, rows=rows, facts=facts)
