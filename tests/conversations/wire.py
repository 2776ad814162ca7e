"""What a host that dialled sees of a conversation of two programs: messages in, packets out, and how it is judged.

A program is a function that says things on a `Wire`, either side, at times of its own; the wire wraps them as the
carrier does (TLS 1.3: RFC 8446 section 5.2; SSH: RFC 4253 section 6 with 16 bytes of authentication), cuts them into
segments, lets a path take its time, and gathers small ones until the last is acknowledged (RFC 896) where a program
left that on. It loses some (the sender's timer, RFC 6298) and lets some arrive late. Packets go through the real flow
table.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import msgspec
import numpy as np

from gpuguard.core.addresses import address_bytes
from gpuguard.core.detectors import reverse_shell
from gpuguard.core.flows import FlowTable
from gpuguard.core.fusion import SUSPECT_NATS, confirm_nats
from gpuguard.core.host import Host
from gpuguard.core.observations import Exchange, FlowUse
from gpuguard.core.records import PACKET, Packets

if TYPE_CHECKING:
    from collections.abc import Callable
    from random import Random

    from gpuguard.core.observations import Observation

    Program = Callable[[Random, "Wire"], None]

START_NS = 10**18
MSS = 1_448
NEAR, FAR = 0, 1
CONFIRM_NATS = confirm_nats(0.1)
LABELS = ("reverse-shell", "ssh-reverse-shell")
CARRIERS = ("tcp", "tls", "ssh", "udp")
_ACK, _SYN = 16, 2


class Judged(NamedTuple):
    """What became of one conversation."""

    suspect: bool
    confirmed: bool
    #: At the end.
    stands: bool
    led: int


class _Said:
    """One message: when its side wrote it, when this host saw it, and when the other side has it. All in seconds."""

    __slots__ = ("heard_s", "seen_s", "sent_s", "size")

    def __init__(self, sent_s: float, seen_s: float, heard_s: float, size: int) -> None:
        self.sent_s, self.seen_s, self.heard_s, self.size = sent_s, seen_s, heard_s, size


class Wire:
    """A path and a carrier, drawn at random, and what was said on it."""

    def __init__(self, rng: Random, carrier: str, messages_max: int = 400, seconds_max: float = 900.0) -> None:
        self.rng, self.carrier = rng, carrier
        self.messages_max, self.seconds_max = messages_max, seconds_max
        self.rtt_s = rng.choice((3e-5, 1e-4, 5e-4, rng.uniform(0.001, 0.02), rng.uniform(0.02, 0.15), 0.03))
        self.loss = rng.choice((0.0, 0.0, 0.0, 0.01))
        self.late = rng.choice((0.0, 0.0, 0.0, 0.02))
        self.gathers = [carrier != "udp" and rng.random() < 0.15 for _ in range(2)]
        self.delayed_ack_s = rng.choice((0.0, 0.04))
        self.said: tuple[list[_Said], list[_Said]] = ([], [])
        self.again: list[tuple[float, int, int]] = []
        self.count = 0

    def over(self, now_s: float) -> bool:
        """Return whether enough was said."""
        return self.count >= self.messages_max or now_s > self.seconds_max

    def near(self, size: float, now_s: float) -> float:
        """Say something from this host; return when the far side has it."""
        return self._say(NEAR, size, now_s)

    def far(self, size: float, now_s: float) -> float:
        """Say something from the far side; return when this host has it."""
        return self._say(FAR, size, now_s)

    def _say(self, side: int, words: float, now_s: float) -> float:
        self.count += 1
        size = max(1, round(words))
        said = self.said[side]
        last = said[-1] if said else None
        if last and last.sent_s > now_s and self.gathers[side]:
            last.size += self._wrapped(size)
            return last.heard_s
        one = _Said(now_s, now_s, now_s, self._wrapped(size))
        acknowledged_s = last.heard_s + self.rtt_s / 2 if last else 0.0
        if self.gathers[side] and last and now_s < acknowledged_s and one.size < MSS:
            one.sent_s = acknowledged_s + (self.delayed_ack_s if self.rng.random() < 0.5 else 0.0)
        self._travel(one, side)
        if last and self.carrier != "udp":
            one.heard_s = max(one.heard_s, last.heard_s)
        said.append(one)
        return one.heard_s

    def _travel(self, one: _Said, side: int) -> None:
        rng = self.rng
        way_s = self.rtt_s / 2 * rng.uniform(1, 1.05) + rng.uniform(2e-5, 6e-5)
        if rng.random() < self.late:
            way_s += rng.uniform(0.0005, 0.004)
        if self.carrier != "udp" and rng.random() < self.loss:
            timer_s = max(0.2, 2 * self.rtt_s)
            way_s += timer_s
            if side == NEAR:
                self.again.append((one.sent_s + timer_s, len(self.said[NEAR]), one.size))
        one.heard_s = one.sent_s + way_s
        one.seen_s = one.sent_s if side == NEAR else one.heard_s

    def _wrapped(self, size: int) -> int:
        match self.carrier:
            case "tls":
                return size + 22 * (1 + size // 16_384)
            case "ssh":
                return 20 + 8 * -(-(size + 14) // 8)
            case _:
                return size

    def packets(self) -> Packets:
        """Return the segments as this host sees them, the handshake before them."""
        rows: list[tuple[float, int, int, int, int]] = []
        if self.carrier != "udp":
            rows += [(-self.rtt_s - 1e-4, NEAR, 0, 0, _SYN), (-1e-4, FAR, 0, 0, _SYN | _ACK), (-5e-5, NEAR, 1, 0, _ACK)]
        begins: list[int] = []
        for side in (NEAR, FAR):
            sequence = 1
            for one in self.said[side]:
                if side == NEAR:
                    begins.append(sequence)
                for start in range(0, one.size, MSS):
                    rows.append((one.seen_s + start * 1e-8, side, sequence + start, min(MSS, one.size - start), _ACK))
                sequence += one.size
        rows += [(at_s, NEAR, begins[index], min(size, MSS), _ACK) for at_s, index, size in self.again]
        rows.sort(key=lambda row: row[0])
        return self._as_block(rows)

    def _as_block(self, rows: list[tuple[float, int, int, int, int]]) -> Packets:
        block = np.zeros(len(rows), PACKET)
        times, sides, sequences, sizes, flags = (np.array(column) for column in zip(*rows, strict=True))
        block["time_ns"] = START_NS + np.round((times + self.rtt_s + 1) * 1e9).astype("i8")
        ends = [np.frombuffer(address_bytes(one), "u1") for one in ("10.0.0.2", "203.0.113.9")]
        ports = np.array([40_000, 443], "u2")
        block["source"], block["destination"] = np.array(ends)[sides], np.array(ends)[1 - sides]
        block["source_port"], block["destination_port"] = ports[sides], ports[1 - sides]
        block["sequence"], block["payload_bytes"] = sequences, sizes
        block["protocol"], block["ip_version"] = 17 if self.carrier == "udp" else 6, 4
        block["tcp_flags"] = 0 if self.carrier == "udp" else flags
        return Packets(time_ns=int(block["time_ns"][-1]), netns=0, rows=block)


def observed(wire: Wire) -> list[Observation]:
    """Return what the flow table tells of it that a reverse shell is judged by."""
    table = FlowTable(8, exchanges=False)
    return [msgspec.structs.replace(one, carrier=wire.carrier)
            for one in table.receive(wire.packets()) if isinstance(one, Exchange | FlowUse)]


def judge(wire: Wire) -> Judged:
    """Return how it stood as a reverse shell, and how many exchanges the far side led."""
    detector, host = reverse_shell.Detector(), Host()
    nats = dict.fromkeys(LABELS, 0.0)
    peak, led = 0.0, 0
    for item in observed(wire):
        led += isinstance(item, Exchange) and item.first == "responder"
        for one in detector.receive(item, host):
            nats[one.label] = max(0.0, nats[one.label] + one.nats)
            peak = max(peak, nats[one.label])
    return Judged(peak >= SUSPECT_NATS, peak >= CONFIRM_NATS, max(nats.values()) >= SUSPECT_NATS, led)


def talk(program: Program, rng: Random, carrier: str) -> Wire:
    """Let a program talk on a path drawn at random."""
    wire = Wire(rng, carrier, rng.choice((60, 120, 250, 400)))
    program(rng, wire)
    return wire
