"""The flow table as the guard sees it: packets in, observations out.

The table itself is compiled (`ext/flows.pyx`) and touches Python only where something is told. Its constants, in words:

- A silence is 80 ms without payload either way, or two round trips where that is longer: nobody could have answered
  sooner. Who speaks after it has broken it. Up to 1 s what the other side then says is its answer.
- A record is small up to 512 bytes: keystrokes, echoes, prompts, commands; not the first data of a page or a file.
- OpenSSH since 9.5 hides keystrokes by sending on a grid of 20 ms (ObscureKeystrokeTiming, ssh_config(5)): of 64 small
  records more than a third must lie 16.5 to 23.5 ms apart. A record is answered at once if the next one comes from the
  other side within 5 ms.
- Encrypted SSH segments are told of one by one; of a run of segments of 1024 bytes or more only each 64 KiB.
- Idle times: 10 s after a close, 180 s where not both sides have spoken over TCP (half-open, UDP, ICMP), a day for TCP
  conversations: a tunnel without keepalives sends nothing for hours. When the table is full, the longest idle leaves,
  closed ones first and conversations last, so that a scan cannot push a tunnel out.
"""

from __future__ import annotations

import ipaddress
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

from gpuguard._flows import Table
from gpuguard.core.observations import Exchange, FlowClosed, FlowOpened, FlowUse, Observation, Speaker
from gpuguard.core.records import DnsMessage, Fact, Packets, SshBanner, SshKexInit, SshNewKeys, TlsClientHello
from gpuguard.core.ssh import SshSession, Use
from gpuguard.core.subjects import FlowId

if TYPE_CHECKING:
    from gpuguard._flows import Told

FLOWS_MAX = 65_536

_OPENED, _EXCHANGE, _CLOSED, _SEGMENT, _RHYTHM = range(5)
_SPEAKERS: tuple[Speaker, Speaker] = ("initiator", "responder")
_REASONS: tuple[Literal["closed", "idle", "evicted", "end"], ...] = ("closed", "idle", "evicted", "end")
_CARRIERS = {1: "icmp", 58: "icmp", 6: "tcp", 17: "udp"}

# Records answered at once are 0.96 of the typing side's and 0.25 of the other's (the answers of a far echo meet the
# next record of the grid by chance). 64 records at 0.8 or more against 0.25 would be worth 50 nats if they were
# independent; they share one path and one program, so that a window counts as one observation, and is bounded by
# how rare the grid itself is outside OpenSSH: media over TCP at 50 packets a second, one flow in a thousand.
RHYTHM_NATS = 7.0
RHYTHM_ANSWERED_MIN = 0.8


@lru_cache(maxsize=4096)
def address_text(address: bytes) -> str:
    """Return 16 bytes as text: IPv4 in dotted form where mapped (RFC 4291 section 2.5.5.2), IPv6 as RFC 5952 has it."""
    if address[:12] == b"\0" * 10 + b"\xff\xff":
        return str(ipaddress.IPv4Address(address[12:]))
    return str(ipaddress.IPv6Address(address))


class _Conversation:
    """What Python keeps of one flow."""

    __slots__ = ("carrier", "flow", "ssh")

    def __init__(self, flow: FlowId) -> None:
        self.flow = flow
        self.carrier = _CARRIERS.get(flow.protocol, "ip")
        self.ssh: SshSession | None = None


class FlowTable:
    """All conversations seen, at most ``size_max``; the same packets give the same observations, however cut."""

    def __init__(self, size_max: int = FLOWS_MAX, seed: int = 0) -> None:
        self._table = Table(size_max, seed)
        self._conversations: dict[int, _Conversation] = {}

    def __len__(self) -> int:
        return self._table.size

    @property
    def evicted(self) -> int:
        """How many flows left because the table was full."""
        return self._table.evicted

    def receive(self, packets: Packets) -> list[Observation]:
        """Take a block of packets in and return what it tells, in order."""
        seen: list[Observation] = []
        last, rows = 0, packets.rows
        for fact in packets.facts:
            row = min(max(fact.row, last), len(rows) - 1)
            if row < 0:
                break
            seen += self._observe(self._table.run(rows, last, row, packets.netns))
            slot, side = self._table.touch(rows, row, packets.netns)
            seen += self._observe(self._table.tell())
            seen += self._learn(slot, side, fact, int(rows["time_ns"][row]), int(rows["sequence"][row]))
            last = row
        return seen + self._observe(self._table.run(rows, last, len(rows), packets.netns))

    def tick(self, time_ns: int) -> list[Observation]:
        """Return what idled out by this time."""
        return self._observe(self._table.tick(time_ns))

    def close(self, time_ns: int) -> list[Observation]:
        """Return the end of every flow that is still open."""
        return self._observe(self._table.close(time_ns))

    def _observe(self, told: list[Told]) -> list[Observation]:
        seen: list[Observation] = []
        for one in told:
            kind = one[0]
            if kind == _SEGMENT:
                self._segment(seen, *one[1:])
            elif kind == _EXCHANGE:
                seen.append(self._exchange(*one[1:]))
            elif kind == _OPENED:
                seen.append(self._open(*one[1:]))
            elif kind == _CLOSED:
                seen.append(self._close(*one[1:]))
            else:
                self._rhythm(seen, *one[1:])
        return seen

    def _open(self, time_ns: Any, slot: Any, netns: Any, protocol: Any, near: Any, near_port: Any, far: Any,
              far_port: Any, known: Any) -> FlowOpened:
        flow = FlowId(
            netns=netns,
            protocol=protocol,
            initiator=address_text(near),
            initiator_port=near_port,
            responder=address_text(far),
            responder_port=far_port,
            start_ns=time_ns,
            initiator_known=known,
        )
        self._conversations[slot] = _Conversation(flow)
        return FlowOpened(time_ns=time_ns, flow=flow)

    def _exchange(self, time_ns: Any, slot: Any, first: Any, delay_ns: Any, question: Any, answer: Any,
                  initiator_first: Any, responder_first: Any, answered: Any, rtt_ns: Any, near_bytes: Any,
                  far_bytes: Any) -> Exchange:
        conversation = self._conversations[slot]
        return Exchange(
            time_ns=time_ns,
            flow=conversation.flow,
            first=_SPEAKERS[first],
            answer_delay_ns=delay_ns,
            question_bytes=question,
            answer_bytes=answer,
            initiator_first=initiator_first,
            responder_first=responder_first,
            answered=answered,
            rtt_ns=rtt_ns if rtt_ns >= 0 else None,
            carrier=conversation.carrier,
            payload_bytes_initiator=near_bytes,
            payload_bytes_responder=far_bytes,
        )

    def _close(self, time_ns: Any, slot: Any, reason: Any, packets: Any, near_bytes: Any, far_bytes: Any,
               initiator_first: Any, responder_first: Any, answered: Any) -> FlowClosed:
        conversation = self._conversations.pop(slot)
        return FlowClosed(
            time_ns=time_ns,
            flow=conversation.flow,
            reason=_REASONS[reason],
            packets=packets,
            payload_bytes_initiator=near_bytes,
            payload_bytes_responder=far_bytes,
            initiator_first=initiator_first,
            responder_first=responder_first,
            answered=answered,
            carrier=conversation.carrier,
        )

    def _segment(self, seen: list[Observation], time_ns: Any, slot: Any, side: Any, size: Any, total: Any,
                 packets: Any, near_holes: Any, far_holes: Any) -> None:
        conversation = self._conversations[slot]
        if conversation.ssh is not None:
            uses = conversation.ssh.segment(time_ns, side, size, total, holes=(near_holes, far_holes))
            seen.extend(_use(conversation, time_ns, packets, use) for use in uses)

    def _rhythm(self, seen: list[Observation], time_ns: Any, slot: Any, side: Any, records: Any, grid: Any,
                quick: Any, packets: Any) -> None:
        """Records on OpenSSH's grid whose every one is answered at once: their sender types, the other side serves."""
        if quick < RHYTHM_ANSWERED_MIN * records:
            return
        text = (f"{grid} of {records} small records of the {_SPEAKERS[side]} lie 20 ms apart (keystroke chaff) and "
                f"{quick} were answered within 5 ms; how many keys they hide is unknown")
        use = Use(f"keystrokes-from-{_SPEAKERS[side]}", RHYTHM_NATS, text, ("media sent 50 times a second over TCP",))
        seen.append(_use(self._conversations[slot], time_ns, packets, use))

    @staticmethod
    def _ssh(conversation: _Conversation) -> SshSession:
        conversation.carrier = "ssh"
        if conversation.ssh is None:
            conversation.ssh = SshSession(initiator_known=conversation.flow.initiator_known)
        return conversation.ssh

    def _learn(self, slot: int, side: int, fact: Fact, time_ns: int, sequence: int) -> list[Observation]:
        """Take in what was read from a payload."""
        conversation = self._conversations.get(slot)
        if conversation is None:
            return []
        uses: list[Use] = []
        match fact:
            case SshBanner():
                self._ssh(conversation).banner(side, fact.text)
                # Until NEWKEYS says where encryption begins, all is watched: the key exchange may be captured in part.
                self._table.watch(slot, side, sequence)
            case SshKexInit():
                self._ssh(conversation).kexinit(side, fact)
            case SshNewKeys() if conversation.ssh is not None:
                self._table.watch(slot, side, fact.end_sequence)
                uses = conversation.ssh.newkeys(side)
            case TlsClientHello():
                conversation.carrier = "tls"
            case DnsMessage():
                conversation.carrier = "dns"
            case _:
                pass
        return [_use(conversation, time_ns, 0, use) for use in uses]


def _use(conversation: _Conversation, time_ns: int, packets: int, use: Use) -> FlowUse:
    return FlowUse(
        time_ns=time_ns,
        flow=conversation.flow,
        use=use.use,
        carrier=conversation.carrier,
        nats=use.nats,
        text=use.text,
        start_ns=conversation.flow.start_ns,
        packets=packets,
        blind_spots=use.blind_spots,
    )
