"""What the flow table tells the detectors: facts of a conversation, each once, in order of time.

The flow table reads every packet in compiled code; an observation is made only where something was decided, so a
detector may be plain Python. `Guard` hands each to every detector right after the packet that completed it.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from msgspec import Struct

from gpuguard.core.subjects import FlowId

Speaker = Literal["initiator", "responder"]


class FlowOpened(Struct, frozen=True, tag="flow_opened"):
    """First packet of a flow."""

    time_ns: int
    flow: FlowId


class FlowUse(Struct, frozen=True, tag="flow_use"):
    """The protocol's own state says what the flow is used for.

    ``use`` is a label of `labels.LABELS` or a step towards one ("authenticated", "ssh-reverse-forward-request",
    "ssh-reverse-channel-open", "ssh-reverse-channel-asked", "ssh-reverse-channel-ended"), or what is true whatever it
    is for ("keepalive", "ssh-channel-2", "ssh-channels", "ssh-forwarding-asked"); ``nats`` weighs this reading of the
    records against every other.
    """

    time_ns: int
    flow: FlowId
    use: str
    carrier: str
    nats: float
    text: str
    start_ns: int
    packets: int
    blind_spots: tuple[str, ...] = ()


class Exchange(Struct, frozen=True, tag="exchange"):
    """After a silence one side spoke in small records and the other answered; counts are of the flow so far.

    ``answer_delay_ns`` is from the last record of the question to the first of the answer, as seen here.
    ``rtt_ns`` is of the handshake, None if that was missed. Byte counts are all payload of each side so far.
    ``before_bytes`` is what the side that answered had said in a row when the question came; 0 where the side that
    asked had spoken last, and before the responder has led an exchange unless who dialled is not known.
    """

    time_ns: int
    flow: FlowId
    first: Speaker
    answer_delay_ns: int
    question_bytes: int
    answer_bytes: int
    initiator_first: int
    responder_first: int
    answered: int
    rtt_ns: int | None
    carrier: str
    payload_bytes_initiator: int = 0
    payload_bytes_responder: int = 0
    packets: int = 0
    before_bytes: int = 0


class Echoes(Struct, frozen=True, tag="echoes"):
    """What a flow of ICMP exchanged, asked by its initiator, before there was anything to tell of it.

    The sizes of questions, the first 16 there were, and of the answers to them; when the last 32 answers came.
    """

    time_ns: int
    flow: FlowId
    questions: tuple[int, ...]
    answers: tuple[int, ...]
    times_ns: tuple[int, ...]


class NotEchoes(Struct, frozen=True, tag="not_echoes"):
    """What a flow of ICMP held that RFC 792 has no room for, or nobody asked for; counts so far.

    - "unlike": answers to echoes of the initiator that held more or less than the questions with their sequence
      numbers; ``data_bytes`` is how much more. Told of the fourth, or later once there were three lengths of them.
    - "unasked": nothing but echo answers, 16 or more, with 2 kB or more; ``data_bytes`` is what all packets held.
    - "unheard": nothing but echo requests, of 24 sizes or more and in no order.
    - "overlong": nothing but queries whose length is laid down (types 13 to 18), and 256 bytes or more beyond it, which
      are ``data_bytes``.

    Each is told again whenever the count has doubled.
    """

    time_ns: int
    flow: FlowId
    what: Literal["unlike", "unasked", "unheard", "overlong"]
    count: int
    data_bytes: int
    payload_bytes_initiator: int
    payload_bytes_responder: int
    packets: int


class FlowClosed(Struct, frozen=True, tag="flow_closed"):
    """A flow ended (FIN, RST), fell idle, or was evicted to keep the table bounded. Totals of its whole life.

    ``last_ns`` is the time of its last packet, ``time_ns`` that at which it was given up.
    """

    time_ns: int
    flow: FlowId
    reason: Literal["closed", "idle", "evicted", "end"]
    packets: int
    payload_bytes_initiator: int
    payload_bytes_responder: int
    initiator_first: int
    responder_first: int
    answered: int
    carrier: str
    last_ns: int


class DnsSeen(Struct, frozen=True, tag="dns_seen"):
    """A DNS message that has room for data (`names.may_carry`); the client is who asks, whichever way this one went.

    ``name`` is in presentation form (RFC 1035 section 5.1), ``answer_bytes`` the sum of RDLENGTH, 0 in a question;
    ``nowhere`` are the prefixes (/32) of AAAA answers in which nobody has an address (`addresses.is_nowhere`).
    """

    time_ns: int
    netns: int
    client: str
    client_port: int
    server: str
    server_port: int
    is_response: bool
    name: str
    query_type: int
    answer_bytes: int
    nowhere: tuple[bytes, ...] = ()


class StratumSeen(Struct, frozen=True, tag="stratum_seen"):
    """What one side of a TCP connection sent among its first speaks of mining in JSON (`records.Stratum`)."""

    time_ns: int
    netns: int
    source: str
    source_port: int
    destination: str
    destination_port: int
    method: str


class DnsRead(Struct, frozen=True, tag="dns_read"):
    """A DNS message of a flow; told where egress policy goes by names. Fields as in `records.DnsMessage`."""

    time_ns: int
    flow: FlowId
    speaker: Speaker
    is_response: bool
    name: str
    query_type: int
    addresses: tuple[bytes, ...] = ()
    aliases: tuple[str, ...] = ()
    ttl_s: int = 0


class HelloRead(Struct, frozen=True, tag="hello_read"):
    """The ClientHello of a flow; told where egress policy goes by names. Fields as in `records.TlsClientHello`."""

    time_ns: int
    flow: FlowId
    speaker: Speaker
    server_name: str
    encrypted: bool = False


class Spoke(Struct, frozen=True, tag="spoke"):
    """One side of a flow sent a message that names its protocol: ``what`` and ``size`` are of `records.Spoken`."""

    time_ns: int
    flow: FlowId
    speaker: Speaker
    what: str
    packets: int = 0
    size: int = 0


class TlsTalk(Struct, frozen=True, tag="tls_talk"):
    """What one side of a TLS connection sent so far in small records, slowly: see `records.TlsRecords`."""

    time_ns: int
    flow: FlowId
    speaker: Speaker
    times_ns: tuple[int, ...]
    sizes: tuple[int, ...]
    packets: int = 0


#: The end of a dull flow: nothing was told of it while it lasted. Fields as in `FlowClosed`; addresses are 16
#: bytes as in `records.PACKET`, ``reason`` counts through those of `FlowClosed`, ``carrier`` through `flows.CARRIERS`;
#: ``missed``: it was among `FlowsUnanswered`.
CLOSED_FLOW = np.dtype([
    ("time_ns", "<i8"),
    ("start_ns", "<i8"),
    ("netns", "<i8"),
    ("initiator", "V16"),
    ("initiator_port", "<u2"),
    ("responder", "V16"),
    ("responder_port", "<u2"),
    ("protocol", "u1"),
    ("initiator_known", "u1"),
    ("reason", "u1"),
    ("carrier", "u1"),
    ("missed", "u1"),
    ("packets", "<u8"),
    ("payload_bytes_initiator", "<u8"),
    ("payload_bytes_responder", "<u8"),
    ("initiator_first", "<u4"),
    ("responder_first", "<u4"),
    ("answered", "<u4"),
    ("last_ns", "<i8"),
])


class FlowsClosed(Struct, tag="flows_closed"):
    """Dull flows that ended one after the other, rows of `CLOSED_FLOW`.

    In ``unanswered`` of them the responder said nothing, or was late.
    """

    time_ns: int
    rows: np.ndarray
    unanswered: int


class FlowsUnanswered(Struct, tag="flows_unanswered"):
    """Attempts that no packet answered within four seconds, rows of `CLOSED_FLOW`.

    A SYN, a segment that belongs to no connection, the first datagram of a flow, an ICMP echo.

    By then Linux has sent its SYN again twice. The end of each is told of as well.
    """

    time_ns: int
    rows: np.ndarray


#: The opening of a TCP connection, or the first packet seen of it.
OPENED_FLOW = np.dtype([
    ("start_ns", "<i8"),
    ("netns", "<i8"),
    ("initiator", "V16"),
    ("initiator_port", "<u2"),
    ("responder", "V16"),
    ("responder_port", "<u2"),
])


class FlowsOpened(Struct, tag="flows_opened"):
    """TCP connections opened, rows of `OPENED_FLOW`; told of where there are lists of sockets to join them with."""

    time_ns: int
    rows: np.ndarray


Observation = (
    FlowOpened
    | FlowUse
    | Exchange
    | Echoes
    | NotEchoes
    | FlowClosed
    | FlowsClosed
    | FlowsUnanswered
    | FlowsOpened
    | DnsSeen
    | DnsRead
    | HelloRead
    | StratumSeen
    | Spoke
    | TlsTalk
)
