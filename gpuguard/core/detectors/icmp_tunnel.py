"""Data in ICMP: answers that hold what was not asked or that nobody asked for, and questions at no one's pace.

"The data received in the echo message must be returned in the echo reply message" (RFC 792, RFC 4443 section 4.2): an
echo answers with exactly as many bytes as it was sent. An answer that is longer or shorter than the question with its
sequence number is not an echo's, however little it holds and however much else went out, and whoever asked: where this
host answers so, a program of its own does. Answers whose own question was not seen (ptunnel sends several to one) are
compared in sum: at no time have echoes brought back more than had gone out by then, and the most that there ever was in
excess counts, so that a tunnel does not clear itself by what it uploads.
Timestamps hold 12 bytes, information requests none (RFC 792), address masks 4 (RFC 950): what is beyond is data.
ping sends one size, once a second or as fast as answers come. A tunnel (ptunnel, icmptunnel, Hans, a shell over ICMP)
sends what it has, when it has it; also to who never answers, and in answers to questions that were never asked.

Benign look-alikes, and what keeps them out:

- ping, smokeping, monitors, load balancers' health checks: one size, and the same both ways;
- lost answers: then less comes back than went out, never more;
- duplicated answers (DUP!): more comes back, in whole answers of the one size, and the first has ended its question;
- path MTU probes, sweeps of sizes (``ping -g``, mtr): many sizes, but as many bytes back as went out;
- the same where nobody answers: a sweep grows, a search for the MTU asks fewer than 24 sizes;
- fragments: a question or an answer of which a part was not seen is none (`core.records.PACKET`);
- a host that pads short answers or truncates long ones: to one length, so that there are no three of them;
- several processes that ask with one identifier and the same numbers: an answer shorter than one of two is let pass;
- dead hosts: one size, for ever;
- answers of others that nobody here asked for, as when somebody forges this host's address; and where only one
  direction is captured: what this host sends counts, which sees what it is asked;
- clockdiff, ``fping --icmp-timestamp``, ``hping3 --icmp-ts``: 12 bytes; ``nmap -PP --data-length``: a few packets a
  host;
- errors (types 3, 5, 11, 12: they quote, RFC 4884), neighbour and router discovery, MLD: never counted.

Who leads inside a tunnel shows as anywhere else: where the far side breaks silences and this host answers sooner than a
round trip, someone types there in a program that runs here, which is then said.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from typing import TYPE_CHECKING

from gpuguard.core.bounded import BoundedTable
from gpuguard.core.evidence import Evidence
from gpuguard.core.observations import Echoes, Exchange, FlowClosed, NotEchoes
from gpuguard.core.turns import variation

if TYPE_CHECKING:
    from gpuguard.core.host import Host
    from gpuguard.core.observations import Observation
    from gpuguard.core.records import Block
    from gpuguard.core.subjects import FlowId

FLOWS_MAX = 2_048
SIZES_MAX = 16
TIMES_MAX = 32

# Answers unlike their own questions, four or more of three lengths (`NotEchoes`), however little they held.
# Or more bytes back than sent, beyond what one repeated answer explains: duplicating hosts are one in some thousands,
# and duplicate whole answers of one size (SIZES tells those apart). Each doubling beyond makes it half as likely.
EXCESS_BYTES_MIN = 256
EXCESS_NATS = 8.0
EXCESS_DOUBLING_NATS = 0.7
EXCESS_DOUBLINGS_MAX = 8
# Three sizes or more in one conversation: sweeps and MTU probes do it, one in some hundred; and those return the same.
SIZES_MIN = 3
SIZES_NATS = 6.0
# Gaps that vary by more than a quarter: ping's are its timer's, or one round trip.
IRREGULAR_MIN = 0.25
IRREGULAR_NATS = 3.0
PACED_MIN = 8
# Echoes are never led by who is to answer: eight times and more (a key exchange is five), mostly answered at once by
# this host, is a shell's order. Over a long way a user's own echoes come back after a silence too, but what follows
# them is the next key, whenever it comes. Little weight: it says who uses the tunnel, and not that there is one.
LED_MIN = 8
LED_SHARE_MIN = 0.6
LED_NATS = 2.0
AT_ONCE_NS = 10_000_000
# What goes one way only: suspect, and never more, as it is one thing that is strange, however often it is done. A
# capture may lack one direction; ``mtr`` with a negative size asks sizes at random; nothing but a tunnel or a test of a
# firewall fills a timestamp.
ONE_WAY_NATS = 8.0
TOLD_NATS_MIN = 1.0

_PROTOCOLS = (1, 58)
_SPOTS = ("data in questions of one size, or answered alike", "data in ICMP errors or in header fields",
          "a tunnel that pads both ways alike")
_ONE_WAY = {
    "unasked": "{count} packets of echo answers that nobody asked for held {data} bytes",
    "unheard": "{count} echo requests that nobody answered, of many sizes in no order, held {data} bytes",
    "overlong": "{count} timestamps, information requests or address masks held {data} bytes more than those have",
}


class _Echo:
    """What is known of one conversation."""

    __slots__ = ("answers", "came", "excess", "far_first", "led", "one_way", "questions", "sent", "surplus",
                 "times_ns", "told", "unlike")

    def __init__(self) -> None:
        #: Bytes that went out and that came back, and by how many these were ahead at most.
        self.sent = 0
        self.came = 0
        self.excess = 0
        #: Answers unlike their own questions, and how much longer they were in all.
        self.unlike = 0
        self.surplus = 0
        #: Exchanges that the far side began, and how many of them this host answered at once.
        self.far_first = 0
        self.led = 0
        #: What goes one way, in words.
        self.one_way = ""
        #: Sizes, and the times of the last answers.
        self.questions: set[int] = set()
        self.answers: set[int] = set()
        self.times_ns: deque[int] = deque(maxlen=TIMES_MAX)
        self.told = 0.0


class Detector:
    """Weighs each conversation of echoes."""

    takes = (Echoes, NotEchoes, Exchange, FlowClosed)

    def __init__(self) -> None:
        self._flows: BoundedTable[FlowId, _Echo] = BoundedTable(FLOWS_MAX)

    def evicted(self) -> dict[str, int]:
        """Return how much was forgotten because a table was full, by what it was."""
        return {"conversations of echoes": self._flows.evicted}

    def receive(self, item: Block | Observation, host: Host) -> list[Evidence]:
        """Return by how much what was exchanged moves the conversation's standing."""
        if not isinstance(item, Echoes | NotEchoes | Exchange | FlowClosed) or item.flow.protocol not in _PROTOCOLS:
            return []
        flow = item.flow
        if isinstance(item, NotEchoes) and item.what != "unlike":
            return self._strange(item, host)
        asked = host.network.is_local(flow.netns, flow.responder)
        if not flow.initiator_known or (asked and not isinstance(item, NotEchoes)):
            if isinstance(item, FlowClosed):
                self._flows.pop(flow)
            return []
        echo = self._flows.get(flow) or _Echo()
        if isinstance(item, Echoes):
            echo.questions.update(item.questions)
            echo.answers.update(item.answers)
            echo.times_ns.extend(item.times_ns)
            self._flows[flow] = echo
            return []
        if isinstance(item, NotEchoes):
            self._flows[flow] = echo
            echo.unlike, echo.surplus = item.count, item.data_bytes
            return _tell(item, echo)
        return self._weigh_bytes(item, echo)

    def _weigh_bytes(self, item: Exchange | FlowClosed, echo: _Echo) -> list[Evidence]:
        echo.sent, echo.came = item.payload_bytes_initiator, item.payload_bytes_responder
        echo.excess = max(echo.excess, echo.came - echo.sent)
        if isinstance(item, Exchange):
            self._flows[item.flow] = echo
            if item.first == "initiator" and max(len(echo.questions), len(echo.answers)) < SIZES_MAX:
                echo.questions.add(item.question_bytes)
                echo.answers.add(item.answer_bytes)
            echo.far_first += item.first == "responder"
            echo.led += item.first == "responder" and item.answer_delay_ns <= AT_ONCE_NS
            echo.times_ns.append(item.time_ns)
        else:
            self._flows.pop(item.flow)
        return _tell(item, echo)

    def _strange(self, item: NotEchoes, host: Host) -> list[Evidence]:
        """Weigh what goes one way, where this host sends it."""
        flow = item.flow
        near = [host.network.is_local(flow.netns, end) or host.network.houses(end)
                for end in (flow.initiator, flow.responder)]
        sent = [item.payload_bytes_initiator, item.payload_bytes_responder]
        if item.what == "unasked":
            if not any(local and size for local, size in zip(near, sent, strict=True)):
                return []
        elif near[1]:
            return []
        echo = self._flows.get(flow) or _Echo()
        self._flows[flow] = echo
        echo.one_way = _ONE_WAY[item.what].format(count=item.count, data=item.data_bytes)
        return _tell(item, echo)


def _tell(item: NotEchoes | Exchange | FlowClosed, echo: _Echo) -> list[Evidence]:
    nats, text = _weigh(echo)
    change = nats - echo.told
    if abs(change) < TOLD_NATS_MIN:
        return []
    echo.told = nats
    return [Evidence(
        time_ns=item.time_ns,
        subject=item.flow,
        label="icmp-tunnel",
        evidence_class="network",
        kind="not-an-echo",
        nats=change,
        text=text,
        start_ns=item.flow.start_ns,
        carrier="icmp",
        blind_spots=_SPOTS,
    )]


def _weigh(echo: _Echo) -> tuple[float, str]:
    """Return the weight of all that was seen so far, and its words."""
    parts = []
    if echo.unlike:
        more = f", {echo.surplus} bytes more in all" if echo.surplus else ""
        parts.append(f"{echo.unlike} answers were longer or shorter than the echoes that they answer{more}")
    if beyond := _beyond(echo):
        parts.append(f"{echo.sent} bytes of echo data went out and {echo.came} came back")
        if beyond > echo.came - echo.sent:
            parts.append(f"at one time {beyond} more than had gone out")
    if not parts:
        return (ONE_WAY_NATS, echo.one_way) if echo.one_way else (0.0, "")
    doublings = math.log2(max(1, echo.surplus / EXCESS_BYTES_MIN, beyond / EXCESS_BYTES_MIN))
    nats = EXCESS_NATS + EXCESS_DOUBLING_NATS * min(EXCESS_DOUBLINGS_MAX, doublings)
    if len(echo.questions) >= SIZES_MIN:
        nats += SIZES_NATS
        parts.append(f"in questions of {len(echo.questions)} sizes")
    spread = _spread(echo.times_ns)
    if spread >= IRREGULAR_MIN:
        nats += IRREGULAR_NATS
        parts.append(f"their pace varies by {spread:.2f}")
    if echo.led >= max(LED_MIN, LED_SHARE_MIN * echo.far_first):
        nats += LED_NATS
        parts.append(f"the far side broke the silence {echo.led} times and was answered at once, as someone is who "
                     f"types in a shell of this host")
    return nats, ", ".join(parts)


def _beyond(echo: _Echo) -> int:
    """Return by how much more came back than had gone out, 0 where that is what a host that duplicates does."""
    # One size, and whole answers of it repeated.
    size = max(echo.questions, default=0)
    duplicates = len(echo.questions) == 1 and size > 0 and not any(one % size for one in (echo.excess, *echo.answers))
    return 0 if echo.excess < EXCESS_BYTES_MIN or echo.sent == 0 or duplicates else echo.excess


def _spread(times_ns: deque[int]) -> float:
    """Return the coefficient of variation of the gaps, 0 where they are too few."""
    times = list(times_ns)
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    if len(gaps) < PACED_MIN:
        return 0.0
    return variation(gaps)
