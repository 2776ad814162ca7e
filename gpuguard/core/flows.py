"""The flow table as the guard sees it: packets in, observations out.

The table itself is compiled (`ext/flows.pyx`) and touches Python only where something is told. Its constants, in words:

- A silence is 80 ms without payload either way, or two round trips where that is longer: nobody could have answered
  sooner. Who speaks after it has broken it. Up to 1 s what the other side then says is its answer.
- A record is small up to 512 bytes: keystrokes, echoes, prompts, commands; not the first data of a page or a file.
- OpenSSH since 9.5 hides keystrokes by sending on a grid of 20 ms (ObscureKeystrokeTiming, ssh_config(5)): of 64 small
  records more than a third must lie 16.5 to 23.5 ms apart. A record is answered at once if the next one comes from the
  other side within 5 ms.
- Encrypted SSH segments are told of one by one; of a run of segments of 1024 bytes or more only each 64 KiB.
  Those that came before the one ahead of them wait for it: eight a side, up to 1 s, in 1024 flows at once, and not once
  the other side has acknowledged what is missing, for then only the capture lacks it. What comes later still is counted
  and not told.
- Idle times: 10 s after a close, 180 s where not both sides have spoken over TCP (half-open, UDP, ICMP), a day for TCP
  conversations: a tunnel without keepalives sends nothing for hours. When the table is full, the longest idle leaves,
  closed ones first and conversations last, so that a scan cannot push a tunnel out. A flow that is in use moves to the
  back of its queue with its first packet of each 17 s (2**34 ns): its neighbours there cost a look into memory.

- An attempt (a SYN, a segment without SYN, ACK, RST and data, a first datagram, an echo request) is unanswered after
  4 s without a packet of the other side: by then Linux has sent its SYN again twice, and no path on Earth takes that
  long.
- Echoes are dull while 255 bytes at most came back beyond what was sent, fewer than four answers of three lengths held
  more or less than their own question, and nothing else is as in `NotEchoes` (see `detectors.icmp_tunnel`).

A quiet table tells of a flow when there is something to tell (see `ext/flows.pyx`); the others are rows of
`FlowsClosed` when they end.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from gpuguard._flows import Table
from gpuguard.core.addresses import address_bytes, address_text
from gpuguard.core.names import may_carry
from gpuguard.core.observations import (
    CLOSED_FLOW,
    OPENED_FLOW,
    DnsRead,
    Echoes,
    Exchange,
    FlowClosed,
    FlowOpened,
    FlowsClosed,
    FlowsOpened,
    FlowsUnanswered,
    FlowUse,
    HelloRead,
    NotEchoes,
    Observation,
    Speaker,
    Spoke,
    TlsTalk,
)
from gpuguard.core.records import (
    DnsMessage,
    Fact,
    Packets,
    Spoken,
    SshBanner,
    SshKexInit,
    SshNewKeys,
    TlsClientHello,
    TlsRecords,
)
from gpuguard.core.ssh.session import SshSession
from gpuguard.core.ssh.uses import Use
from gpuguard.core.subjects import FlowId

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from gpuguard._flows import Told

Seen = list[Observation]

#: What flows may carry, as numbered in the table; 0 is what the protocol says.
CARRIERS = ("", "ssh", "tls", "dns", "broker")

FLOWS_MAX = 131_072

_OPENED, _EXCHANGE, _CLOSED, _SEGMENT, _RHYTHM, _DULL, _CARRIES, _UNANSWERED, _BEGUN, _ECHOED, _NOT_ECHOES = range(11)
_SPEAKERS: tuple[Speaker, Speaker] = ("initiator", "responder")
REASONS: tuple[Literal["closed", "idle", "evicted", "end"], ...] = ("closed", "idle", "evicted", "end")
_STRANGE: tuple[Literal["unlike", "unasked", "unheard", "overlong"], ...] = (
    "unlike", "unasked", "unheard", "overlong")
_CARRIERS = {1: "icmp", 58: "icmp", 6: "tcp", 17: "udp"}
_TLS, _DNS, _BROKER = 2, 3, 4

# Records answered at once are 0.96 of the typing side's and 0.25 of the other's (the answers of a far echo meet the
# next record of the grid by chance). 64 records at 0.8 or more against 0.25 would be worth 50 nats if they were
# independent; they share one path and one program, so that a window counts as one observation, and is bounded by
# how rare the grid itself is outside OpenSSH: media over TCP at 50 packets a second, one flow in a thousand.
RHYTHM_NATS = 7.0
RHYTHM_ANSWERED_MIN = 0.8


def carrier_of(protocol: int, carrier: int) -> str:
    """Return what a flow carries in words, as far as its protocol and its payload say."""
    return CARRIERS[carrier] or _CARRIERS.get(protocol, "ip")


def closed_flows(rows: np.ndarray) -> Iterator[FlowClosed]:
    """Yield these `CLOSED_FLOW` one by one, as a table that is not quiet would have told of their ends."""
    for row in rows.tolist():
        (time_ns, start_ns, netns, near, near_port, far, far_port, protocol, known, reason, carrier,
         _, packets, near_bytes, far_bytes, near_first, far_first, answered, last_ns) = row
        ends = (address_text(near), near_port, address_text(far), far_port)
        flow = FlowId(netns, protocol, *ends, start_ns, bool(known))
        yield FlowClosed(time_ns, flow, REASONS[reason], packets, near_bytes, far_bytes, near_first, far_first,
                         answered, carrier_of(protocol, carrier), last_ns)


class _Conversation:
    """What Python keeps of one flow."""

    __slots__ = ("carrier", "flow", "ssh")

    def __init__(self, flow: FlowId, carrier: str) -> None:
        self.flow = flow
        self.carrier = carrier
        self.ssh: SshSession | None = None


class FlowTable:
    """All conversations seen, at most ``size_max``; the same packets give the same observations, however cut.

    ``quiet``: dull flows by the row. ``together``: those rows may wait for so many of them, but for none of what must
    not be told before them. ``exchanges``: those of TCP and UDP that the initiator leads are told before the responder
    led any; of TCP where it is not known who dialled, they are told in any case.
    ``names``: DNS messages and ClientHellos are told of.
    """

    def __init__(self, size_max: int = FLOWS_MAX, seed: int = 0, *, quiet: bool = False, together: int = 0,
                 exchanges: bool = True, names: bool = False) -> None:
        self._table = Table(size_max, seed, quiet_flows=quiet, quiet_exchanges=not exchanges)
        self._names = names
        self._together = together
        # Rows of dull flows that are yet to be told, and how many of them nobody answered.
        self._dull: list[Any] = []
        self._dull_bytes = 0
        self._dull_unanswered: Any = 0
        self._conversations: dict[int, _Conversation] = {}
        self._tellers: dict[int | bytes | bool, Callable[..., Seen]] = {
            _OPENED: self._open, _EXCHANGE: self._exchange, _CLOSED: self._close, _SEGMENT: self._segment,
            _RHYTHM: self._rhythm, _UNANSWERED: self._unanswered, _BEGUN: self._begun, _ECHOED: self._echoed,
            _NOT_ECHOES: self._not_echoes,
        }

    def __len__(self) -> int:
        return self._table.size

    @property
    def evicted(self) -> int:
        """How many flows left because the table was full."""
        return self._table.evicted

    def receive(self, packets: Packets) -> Seen:
        """Take a block of packets in and return what it tells, in order."""
        seen: Seen = []
        last, rows, table = 0, packets.rows, self._table
        for fact in packets.facts:
            row = min(max(fact.row, last), len(rows) - 1)
            if row < 0:
                break
            table.add(rows, last, row, packets.netns)
            last = row
            carrier = 0 if self._names else _mark_of(fact)
            if carrier and table.mark(rows, row, packets.netns, carrier) < 0:
                continue
            slot, side, count = table.touch(rows, row, packets.netns)
            seen += self._observe(table.tell())
            new = self._learn(slot, side, fact, int(rows["time_ns"][row]), int(rows["sequence"][row]), count)
            if new and self._dull_unanswered:
                seen += self._ended()
            seen += new
        table.add(rows, last, len(rows), packets.netns)
        return seen + self._observe(table.tell())

    def packets_of(self, flow: FlowId) -> int | None:
        """Return how many packets were seen of a flow so far, None if it is not here any more."""
        near, far = address_bytes(flow.initiator), address_bytes(flow.responder)
        return self._table.packets_of(flow.netns, flow.protocol, near, flow.initiator_port, far, flow.responder_port)

    def listen(self) -> Seen:
        """Tell by the row of each TCP connection that is opened from now on, and of those that are open."""
        return self._observe(self._table.listen())

    def tick(self, time_ns: int) -> Seen:
        """Return what idled out by this time."""
        return self._observe(self._table.tick(time_ns))

    def close(self, time_ns: int) -> Seen:
        """Return the end of every flow that is still open."""
        return [*self._observe(self._table.close(time_ns)), *self._ended()]

    def _observe(self, told: list[Told]) -> Seen:
        seen: Seen = []
        for one in told:
            kind = one[0]
            if kind == _DULL:
                data: Any = one[1]
                self._dull.append(data)
                self._dull_bytes += len(data)
                self._dull_unanswered += one[2]
            elif kind == _CARRIES:
                self._conversations[one[1]].carrier = CARRIERS[one[2]]  # type: ignore[index]
            elif new := self._tellers[kind](*one[1:]):
                # The more dull ones come at once, the cheaper they are; but ends keep their order among each other,
                # and of those that may be part of a scan there is something to tell in its place: before all but an
                # opening, which says nothing of others.
                if kind in (_CLOSED, _UNANSWERED) or (self._dull_unanswered and kind != _OPENED):
                    seen += self._ended()
                seen += new
        if self._dull_bytes >= self._together * CLOSED_FLOW.itemsize:
            seen += self._ended()
        return seen

    def _ended(self) -> Seen:
        """Return the ends of dull flows that are yet to be told."""
        if not self._dull:
            return []
        rows = np.frombuffer(b"".join(self._dull), CLOSED_FLOW)
        ended = FlowsClosed(int(rows["time_ns"][-1]), rows, self._dull_unanswered)
        self._dull, self._dull_bytes, self._dull_unanswered = [], 0, 0
        return [ended]

    def _open(self, time_ns: Any, slot: Any, netns: Any, protocol: Any, near: Any, near_port: Any, far: Any,
              far_port: Any, known: Any, carrier: Any) -> Seen:
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
        self._conversations[slot] = _Conversation(flow, carrier_of(protocol, carrier))
        return [FlowOpened(time_ns=time_ns, flow=flow)]

    def _exchange(self, time_ns: Any, slot: Any, first: Any, delay_ns: Any, question: Any, answer: Any,
                  initiator_first: Any, responder_first: Any, answered: Any, rtt_ns: Any, near_bytes: Any,
                  far_bytes: Any, packets: Any, before: Any) -> Seen:
        conversation = self._conversations[slot]
        return [Exchange(
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
            packets=packets,
            before_bytes=before,
        )]

    def _echoed(self, slot: Any, questions: Any, answers: Any, times_ns: Any) -> Seen:
        return [Echoes(times_ns[-1], self._conversations[slot].flow, questions, answers, times_ns)]

    def _not_echoes(self, time_ns: Any, slot: Any, what: Any, count: Any, data_bytes: Any, near_bytes: Any,
                    far_bytes: Any, packets: Any) -> Seen:
        flow = self._conversations[slot].flow
        return [NotEchoes(time_ns, flow, _STRANGE[what], count, data_bytes, near_bytes, far_bytes, packets)]

    @staticmethod
    def _unanswered(data: bytes) -> Seen:
        rows = np.frombuffer(data, CLOSED_FLOW)
        return [FlowsUnanswered(int(rows["time_ns"][-1]), rows)]

    @staticmethod
    def _begun(data: bytes) -> Seen:
        rows = np.frombuffer(data, OPENED_FLOW)
        return [FlowsOpened(int(rows["start_ns"][-1]), rows)]

    def _close(self, time_ns: Any, slot: Any, reason: Any, packets: Any, near_bytes: Any, far_bytes: Any,
               initiator_first: Any, responder_first: Any, answered: Any, last_ns: Any) -> Seen:
        conversation = self._conversations.pop(slot)
        return [FlowClosed(
            time_ns=time_ns,
            flow=conversation.flow,
            reason=REASONS[reason],
            packets=packets,
            payload_bytes_initiator=near_bytes,
            payload_bytes_responder=far_bytes,
            initiator_first=initiator_first,
            responder_first=responder_first,
            answered=answered,
            carrier=conversation.carrier,
            last_ns=last_ns,
        )]

    def _segment(self, time_ns: Any, slot: Any, side: Any, size: Any, total: Any, packets: Any, near_holes: Any,
                 far_holes: Any) -> Seen:
        conversation = self._conversations[slot]
        if conversation.ssh is None:
            return []
        uses = conversation.ssh.segment(time_ns, side, size, total, holes=(near_holes, far_holes))
        return [_use(conversation, time_ns, packets, use) for use in uses] if uses else []

    def _rhythm(self, time_ns: Any, slot: Any, side: Any, records: Any, grid: Any, quick: Any, packets: Any) -> Seen:
        """Records on OpenSSH's grid whose every one is answered at once: their sender types, the other side serves."""
        if quick < RHYTHM_ANSWERED_MIN * records:
            return []
        text = (f"{grid} of {records} small records of the {_SPEAKERS[side]} lie 20 ms apart (keystroke chaff) and "
                f"{quick} were answered within 5 ms; how many keys they hide is unknown")
        use = Use(f"keystrokes-from-{_SPEAKERS[side]}", RHYTHM_NATS, text, ("media sent 50 times a second over TCP",))
        return [_use(self._conversations[slot], time_ns, packets, use)]

    @staticmethod
    def _ssh(conversation: _Conversation) -> SshSession:
        conversation.carrier = "ssh"
        if conversation.ssh is None:
            conversation.ssh = SshSession(initiator_known=conversation.flow.initiator_known)
        return conversation.ssh

    def _learn(self, slot: int, side: int, fact: Fact, time_ns: int, sequence: int, packets: int) -> list[Observation]:
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
                if self._names:
                    return [HelloRead(time_ns, conversation.flow, _SPEAKERS[side], fact.server_name, fact.encrypted)]
            case DnsMessage():
                conversation.carrier = "dns"
                if self._names:
                    return [DnsRead(time_ns, conversation.flow, _SPEAKERS[side], fact.is_response, fact.name,
                                    fact.query_type, fact.addresses, fact.aliases, fact.ttl_s)]
            case Spoken(what="message-broker"):
                conversation.carrier = "broker"
            case Spoken():
                return [Spoke(time_ns, conversation.flow, _SPEAKERS[side], fact.what, packets, fact.size)]
            case TlsRecords():
                return [TlsTalk(time_ns, conversation.flow, _SPEAKERS[side], fact.times_ns, fact.sizes, packets)]
            case _:
                pass
        return [_use(conversation, time_ns, packets, use) for use in uses]


def _mark_of(fact: Fact) -> int:
    """Return what a fact says of its flow where that is all that it says, else 0: the flow is then to be named."""
    match fact:
        case TlsClientHello():
            return _TLS
        case DnsMessage():
            # What may hold data is told of (see `names`), and then of a flow that is known by name.
            return 0 if may_carry(fact) else _DNS
        case Spoken(what="message-broker"):
            return _BROKER
        case _:
            return 0


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
