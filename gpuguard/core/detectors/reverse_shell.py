"""The role rule, on any carrier: this host dialled out, and then the far side asks and this host answers at once.

Whoever dials is the client of nearly every protocol, and a client speaks first. In a reverse shell the far side breaks
the silence with something small, a key or a command, and this host, which runs the shell, answers within the time that
a local program takes, not a round trip. Neither port nor cipher nor wrapping changes that order.

Benign look-alikes, and what keeps them out:

- servers that speak first (SMTP, FTP, SSH banners): the opening does not count, only silences broken later;
- pushes without an answer (``watch``, notifications, market data): answers are required;
- symmetric protocols (peers, NCCL, databases' replication, keepalives of VPNs): the near side asks as often;
- heartbeats (MQTT, IRC, AMQP, HTTP/2 PING, mtalk): one size, and as regular as a clock; lines of all lengths that are
  echoed are none, however regular;
- acknowledged pushes (VNC and RDP updates, event streams, events of chat services, HTTP/2's windows): most answers are
  of nearly one size, the questions are not;
- long polls (bots, CI runners, agents; in clear, in TLS): each word of the far side answers a request that this host
  has open, and what stands open is always the same request. Before a shell's next command stands the last one's output.
  Who puts a shell into such polls is not told by this rule;
- workers that wait for tasks (Redis' BLPOP and the like): after each answer the far side says one thing more, short and
  of one length, and lets this host wait again; a shell's far side has nothing to confirm. Or there was no task: that
  comes by the clock, and this host asks again after always the same time;
- services behind a message broker (NATS, AMQP, MQTT, Redis): whoever asks, this host answers at once, line by line.
  In clear the broker's protocol is known by its first bytes, and what looks like typed lines is then a request. Inside
  TLS requests come closer together than anybody types lines, or are all answered after the same time, as one function
  takes it; the commands of a shell are different programs. Or most are not answered at once: they are worked on;
- a debugger's steps, to a stub that dialled it: most are the same question and the same answer;
- clients of a slow server, in clear (mail handed in, rows inserted): each answer, half a second late, looks like a
  question. They say one thing at a time, and what they hear is mostly one confirmation;
- callbacks of a server, in clear (RPyC): again one thing at a time, and questions that nobody types as lines;
- clients in lockstep with a server that takes its time (requests, queries, a transfer): what stands before its answer
  is their next request, one like the other or all different. Before most keys stands the echo of the last, and before
  some what a command printed;
- prompts answered by a script (telnet, expect, FTP): there the far side sends the output, so that most bytes flow
  towards this host; in a shell that runs here most flow away from it, or as many as are echoed;
- steps of a simulator, or a transfer in a small window, in lockstep at the pace of keystroke chaff: this host began
  them, or speaks SSH without a tunnel, where the server types nothing;
- an administrator who logs in: the far side has dialled.

A guard that started later than the connection saw nobody dial. The host's sockets then say who did (`Host.dialler`),
and the standing is bounded by how far they can be trusted; where they do not say, nothing is concluded. Over UDP the
first packet and the ports do. A shell that is dialled again for each few commands is told from their sum.

Weights: see the constants. The flow's standing is computed anew at each exchange, and only its change is told, so that
a conversation that turns out otherwise takes its suspicion back.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left, bisect_right
from collections import Counter, deque
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from gpuguard.core.evidence import Evidence
from gpuguard.core.host import EPHEMERAL_PORT_MIN, BoundedTable
from gpuguard.core.observations import Exchange, FlowClosed, FlowUse
from gpuguard.core.turns import AT_ONCE_NS, LINE_GAP_NS, NO_PROGRAM_NS

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from gpuguard.core.host import Host
    from gpuguard.core.observations import Observation, Speaker
    from gpuguard.core.records import Block
    from gpuguard.core.subjects import FlowId

FLOWS_MAX = 8_192
PLACES_MAX = 1_024
RECENT_MAX = 64

# P(seen | shell) is near 1 for all of these. Of flows that a GPU server opens, those in which the far side leads 5,
# then 8 answered exchanges that pass every look-alike above are one in 700, then one in 8,000: counted as 0 in the
# flows with any exchange of the public captures (some 2,000), taken at the rule-of-three bound, and one nat more for
# each of the three exchanges that is asked for beyond the first five.
LED_NATS = ((5, 6.5), (8, 9.0), (16, 11.0))
# Typing: questions of one size, answered by one size (the echo), 80 ms to 1.5 s apart and irregular (a coefficient of
# variation of 0.25 or more; log-normal gaps of people have 0.5 to 1, timers below 0.05). A program that is not a remote
# terminal matches one exchange with 1/4 at best; exchanges are dependent, so only a third is granted for each of them:
# ln 4 / 3 = 0.46 nats an exchange, up to 11.
TYPED_NATS_EACH = 0.46
TYPED_NATS_MAX = 11.0
# Through a reverse forward that was itself seen to be asked for and opened, those weights count for the shell as well:
# it is the tunnel's use. They are kept below this, so that more talk can still be told.
TUNNEL_NATS_MAX = 33.0
# Chaff windows (core.flows.RHYTHM_NATS): the second to fourth confirm the first, later ones add nothing new.
CHAFF_NATS = (7.0, 12.0, 17.0, 21.0)

# Who dialled was read from the sockets: of connections that the far side leads and whose port was never seen to listen,
# one in a thousand was accepted all the same, by a listener that ended before it was looked at (nc -l, inetd's "nowait"
# turned round). No talk weighs more than ln 1000 then: enough to suspect, and never to confirm by this alone. Without a
# handshake the round trip is known by the kernel's least only, so that a client in lockstep with a slow server (SFTP on
# a busy machine) looks led by it for a while: three exchanges more are asked for.
UNSEEN_NATS_MAX = 6.9
UNSEEN_LED_MIN = 8

# UDP has no handshake: that this host called is read from the first packet that was seen and from the ports, as with
# sockets above, and the round trip is not known, so that a client in lockstep with a far server looks led by it. So
# more has to flow away from this host than to it, as from a shell and not to whoever acknowledges (QUIC does so with
# each packet) or asks again, and an echo is as long as its key. And what the far side says has to be too short for the
# keys of an administrator who comes through a VPN that nobody knows: an IP packet with a record of SSH has 68 bytes.
TCP, UDP = 6, 17
UDP_WORD_BYTES_MAX = 48
UDP_BYTES_RATIO_MIN = 1.2

# A shell may be dialled again for each few commands: what the far side led on the last connection to a place counts on
# the next one, if it began after the last word of that one and within an hour. Silences are those within a connection,
# so that nothing is read into when it is dialled. One exchange on a connection is none: a server that takes its time to
# answer seems to break the silence, and TLS takes leave of it with a word. Three exchanges more are asked for.
AGAIN_NS = 3_600_000_000_000
AGAIN_LED_MIN = 2
AGAIN_SUM_MIN = 8

#: Of nearly one length: numbers and offsets in a message differ by some digits.
ALIKE_BYTES = 4
#: What is said to a worker after its answer, and what stands open before the far side's word: nearly always so.
CONFIRMED_SHARE = 0.9
STANDING_SHARE = 0.9
STANDING_MIN = 3
#: A client that writes: its server confirms in one length but for a counter's digit. Of six promptless shells that were
#: played at most three of seven lines were so.
IN_TURN_SHARE = 0.9
CONFIRMATION_BYTES = 1
#: A call has a header, names and numbers; half of what somebody types is shorter than this. Known in clear only.
CALL_BYTES_MIN = 64
#: Acknowledgements: events now and then get an answer of their own instead (a bot's; 3 of 10 in Slack's socket mode).
#: Of shells on all sorts of carriers at most 43 % of the answers were alike where the questions were not.
ACKNOWLEDGED_SHARE = 0.75

# Who was echoed key by key for so long goes on typing in a program that fills the screen (vi, less, top): it answers
# one key by this and the next by that. And after so many, keys and echoes may be of nearly one length only, as they are
# where each is wrapped with a number or a time of its own (a terminal in a page, in JSON): seven of ten then.
TYPED_LONG = 16
NEARLY_TYPED_SHARE = 0.7
TYPED_LONG_NATS = TYPED_LONG * TYPED_NATS_EACH

# Lines (what is not typed key by key) are a shell's if they are echoed: questions of several lengths, and answers that
# differ from them by one number. Or if they lie as far apart as it takes a person to type one, and the answers take
# different times, as programs do: the 90th percentile at least three times the 10th. Services behind Redis, NATS and
# Mosquitto took 0.3 to 0.7 ms for all requests but the first; commands 0.2 to 30 ms. In clear it suffices that the
# lines and what they print differ, and that most take as long as it takes to start a program: brokers are known there,
# and short commands on a fast network mostly took 1.1 to 1.7 ms. At least a third of what the far side says is answered
# at once, and shortly: Meterpreter's own questions by the clock halve that, and of a service that works it is less.
ANSWERED_SHARE = 1 / 3
MOSTLY = 0.5
PROGRAM_NS = 800_000
ECHOED_SHARE = 0.8
ECHOED_LENGTHS_MIN = 3
HURRIED_MAX = 0.2
WORK_SPREAD_MIN = 3.0
MIDDLE_SPREAD_MIN = 1.5
POLLS_MIN = 2

#: What the grammar says where somebody asks through a tunnel (`core.ssh.visitor`).
VISITED = "ssh-reverse-channel-asked"

TOLD_NATS_MIN = 1.0
LEAD_MIN = 2.0
BYTES_RATIO_MIN = 0.7
PACE_NS = (80_000_000, 1_500_000_000)
IRREGULAR_MIN = 0.25
CLOCKWORK_MAX = 0.15
#: A beat lies so near to the usual one; nobody types half of all keys so evenly.
BEAT_RATIO = 0.02
BEATS_MIN = 3

_SPOTS = ("commands carried by a message broker in clear", "commands that answer polls",
          "shells in two one-way connections", "pasted scripts that answer with files only",
          "commands paced by a timer and not echoed",
          "padding of every record", "traffic merged with other channels of the same connection")
_UNSEEN_SPOT = "who dialled, where the listener of an accepted connection has gone"


#: Who dialled whom: namespace, protocol, initiator, responder, its port.
Place = tuple[int, int, str, str, int]


class _Turn(NamedTuple):
    """One question of the far side that was answered at once. Sizes are in bytes."""

    question: int
    answer: int
    delay_ns: int
    #: What this host had said last before the question; 0 where it had not, or that is not known.
    before: int
    #: Since the question before, and what the far side said in between; None where there was none on this connection.
    gap_ns: int | None
    more: int | None
    #: Whether this host had said one thing only since the exchange before, None where that is not known.
    in_turn: bool | None


class _Sums(NamedTuple):
    """What both sides said since the far side first led, in bytes, and how often the far side asked."""

    ours: int = 0
    theirs: int = 0
    asked: int = 0


class _Led:
    """What is known of one flow, and of those before it that it goes on from."""

    __slots__ = ("answered", "base_far", "base_near", "broken", "chaff", "connections", "earlier",
                 "far_bytes", "here", "key", "last_ns", "led", "led_ns", "near", "said", "slow", "sums", "told",
                 "tunnel", "turns", "typed", "undo", "visited")

    def __init__(self) -> None:
        self.led = 0
        self.near = 0
        self.answered = 0
        self.slow = 0
        self.chaff = 0
        self.tunnel = 0.0
        self.told = 0.0
        self.last_ns = 0
        self.base_near = -1
        self.base_far = -1
        #: Whether the far side broke the last silence.
        self.broken = False
        self.turns: deque[_Turn] = deque(maxlen=RECENT_MAX)
        self.led_ns = 0
        #: What typing weighed when keys were echoed last, and the size of a key.
        self.typed = 0.0
        self.key = 0
        self.far_bytes = -1
        #: What this host said in the last exchange, in bytes.
        self.said = 0
        self.undo = 0
        self.visited: FlowUse | None = None
        #: Exchanges that the far side led on this connection, and how many connections there were.
        self.here = 0
        self.connections = 1
        self.sums = _Sums()
        self.earlier = _Sums()

    def go_on_from(self, before: _Led) -> None:
        """Take over what is known of an earlier connection to the same place."""
        self.led, self.near, self.slow = before.led, before.near, before.slow
        self.typed, self.key = before.typed, before.key
        self.turns.extend(before.turns)
        self.connections = before.connections + 1
        self.earlier = before.sums


class Detector:
    """Weighs who leads each conversation that this host opened."""

    takes = (Exchange, FlowUse, FlowClosed)

    def __init__(self) -> None:
        self._flows: BoundedTable[FlowId, _Led] = BoundedTable(FLOWS_MAX)
        self._places: BoundedTable[Place, _Led] = BoundedTable(PLACES_MAX)

    def receive(self, item: Block | Observation, host: Host) -> list[Evidence]:
        """Return by how much an exchange, or what the grammar says of the flow, moves its standing."""
        match item:
            case Exchange():
                return self._exchange(item, host)
            case FlowUse():
                return self._use(item, host)
            case FlowClosed():
                self._flows.pop(item.flow)
            case _:
                pass
        return []

    def _of(self, flow: FlowId) -> _Led:
        led = self._flows.get(flow) or _Led()
        self._flows[flow] = led
        return led

    def _exchange(self, item: Exchange, host: Host) -> list[Evidence]:
        dialler = _dialler(item.flow, item.carrier, host)
        if dialler is None:
            return []
        item = _from_this_side(item, dialler, host)
        led = self._flows.get(item.flow) or self._dialled(item)
        # The table does not tell of each that this host leads before the far side does, but counts it.
        led.near += item.answered - led.answered - 1
        led.answered = item.answered
        led.broken = item.first == "responder"
        if item.first == "initiator":
            led.near += 1
        elif not self._at_once(item) or (item.flow.protocol == UDP and item.question_bytes > UDP_WORD_BYTES_MAX):
            led.slow += 1
        elif item.answer_delay_ns >= NO_PROGRAM_NS and not self._in_step(item, led):
            self._led(item, led)
            if led.here >= AGAIN_LED_MIN and item.flow.initiator_known:
                self._places[_place(item.flow)] = led
        led.last_ns = item.time_ns
        led.said = item.answer_bytes if item.first == "responder" else item.question_bytes
        if not led.here or led.led < _least(item.flow, led) or _spared(item.flow, dialler, host):
            return []
        return self._tell(item, led, item.carrier)

    def _dialled(self, item: Exchange) -> _Led:
        """Return what a connection begins with: nothing, or what is known of the last one to the same place."""
        led = self._of(item.flow)
        before = self._places.get(_place(item.flow)) if item.flow.initiator_known and item.carrier != "ssh" else None
        if before and 0 <= item.flow.start_ns - before.last_ns <= AGAIN_NS:
            led.go_on_from(before)
        return led

    @staticmethod
    def _in_step(item: Exchange, led: _Led) -> bool:
        """Return whether the far side may have answered what this host said last: silences last longer than that.

        The table sees to it where it knows the round trip, from the handshake.
        """
        if item.flow.initiator_known or item.rtt_ns is None:
            return False
        return item.time_ns - item.answer_delay_ns - led.last_ns <= 2 * item.rtt_ns

    @staticmethod
    def _led(item: Exchange, led: _Led) -> None:
        """Count an exchange in which the far side spoke first and this host answered at once."""
        first = led.far_bytes < 0
        led.led += 1
        led.here += 1
        led.turns.append(_Turn(
            item.question_bytes, item.answer_bytes, item.answer_delay_ns, item.before_bytes,
            None if first else item.time_ns - led.led_ns,
            None if first else item.payload_bytes_responder - led.far_bytes - item.question_bytes,
            item.before_bytes == led.said if item.before_bytes and led.said else None,
        ))
        led.led_ns = led.undo = item.time_ns
        led.far_bytes = item.payload_bytes_responder
        if first:
            led.base_near = item.payload_bytes_initiator - item.answer_bytes
            led.base_far = item.payload_bytes_responder - item.question_bytes
        led.sums = _sums(item, led)

    @staticmethod
    def _at_once(item: Exchange) -> bool:
        """Sooner than the far end could have had a part in it, where the round trip is long enough to say so."""
        limit = AT_ONCE_NS
        if item.rtt_ns is not None and item.rtt_ns > 10_000_000:
            limit = min(limit, item.rtt_ns // 2 + 4_000_000)
        return item.answer_delay_ns <= limit

    def _use(self, item: FlowUse, host: Host) -> list[Evidence]:
        dialler = host.dialler(item.flow)
        far = "initiator" if dialler == "responder" else "responder"
        if item.use.startswith("ssh-reverse") and item.use != VISITED:
            self._tunnel(item)
            return []
        if dialler is None or item.use not in (VISITED, f"keystrokes-from-{far}") or _spared(item.flow, dialler, host):
            return []
        led = self._of(item.flow)
        if item.use == VISITED:
            led.visited = item
        elif (item.carrier == "ssh" and not led.tunnel) or not led.broken:
            # An SSH server types no keys: a download in a small window goes at that pace. Nor does whoever answers
            # what this host began.
            return []
        else:
            led.chaff += 1
        return self._tell(item, led, item.carrier)

    def _tunnel(self, item: FlowUse) -> None:
        led = self._of(item.flow)
        led.tunnel = min(TUNNEL_NATS_MAX, led.tunnel + item.nats)
        if item.use == "ssh-reverse-channel-open" and led.undo == item.time_ns:
            # That exchange was the opening of a channel, not a line of talk.
            led.led -= 1
            led.here -= 1
            led.turns.pop()
            led.undo = 0

    def _tell(self, item: Exchange | FlowUse, led: _Led, carrier: str) -> list[Evidence]:
        nats, text = _standing(item, led)
        if not item.flow.initiator_known:
            nats = min(nats, UNSEEN_NATS_MAX)
            text += ("; UDP: that this host called is read from the first packet and the ports"
                     if item.flow.protocol == UDP else
                     "; the opening was not seen: that this host dialled is read from its sockets")
        change = nats - led.told
        if abs(change) < TOLD_NATS_MIN:
            return []
        led.told = nats
        return [Evidence(
            time_ns=item.time_ns,
            subject=item.flow,
            label="ssh-reverse-shell" if carrier == "ssh" else "reverse-shell",
            evidence_class="network",
            kind="far-side-leads" if change > 0 else "far-side-leads-no-more",
            nats=change,
            text=text,
            start_ns=item.flow.start_ns,
            carrier=carrier,
            blind_spots=_SPOTS if item.flow.initiator_known else (*_SPOTS, _UNSEEN_SPOT),
        )]


def _place(flow: FlowId) -> Place:
    return flow.netns, flow.protocol, flow.initiator, flow.responder, flow.responder_port


def _dialler(flow: FlowId, carrier: str, host: Host) -> Speaker | None:
    """Return which end of a flow this host dialled from, None if it was called, or that is not certain."""
    if flow.protocol == TCP:
        return host.dialler(flow)
    # The first packet that was seen went from a port that Linux gives to who calls, to one that it does not.
    called = flow.initiator_port >= EPHEMERAL_PORT_MIN > flow.responder_port and not host.is_inbound(flow)
    return "initiator" if called and flow.protocol == UDP and carrier == "udp" else None


def _least(flow: FlowId, led: _Led) -> int:
    """Return how many exchanges are asked for at least."""
    if not flow.initiator_known:
        return UNSEEN_LED_MIN
    return AGAIN_SUM_MIN if led.connections > 1 else LED_NATS[0][0]


def _sums(item: Exchange, led: _Led) -> _Sums:
    return _Sums(led.earlier.ours + item.payload_bytes_initiator - led.base_near,
                 led.earlier.theirs + item.payload_bytes_responder - led.base_far,
                 led.earlier.asked + item.responder_first)


def _spared(flow: FlowId, dialler: Speaker, host: Host) -> bool:
    """Return whether the flow never leaves the host: its far end is this host's own."""
    return host.is_local(flow.netns, flow.responder if dialler == "initiator" else flow.initiator)


def _from_this_side(item: Exchange, dialler: Speaker, host: Host) -> Exchange:
    """Return an exchange as if this host's end had been seen to dial: "initiator" is then this host's end."""
    flow = item.flow
    if flow.initiator_known:
        return item
    socket = host.socket(flow, initiator=dialler == "initiator")
    rtt_ns = socket.min_rtt_us * 1_000 if socket and socket.min_rtt_us is not None else None
    if dialler == "initiator":
        return msgspec.structs.replace(item, rtt_ns=rtt_ns)
    return msgspec.structs.replace(
        item,
        rtt_ns=rtt_ns,
        first="responder" if item.first == "initiator" else "initiator",
        initiator_first=item.responder_first,
        responder_first=item.initiator_first,
        payload_bytes_initiator=item.payload_bytes_responder,
        payload_bytes_responder=item.payload_bytes_initiator,
    )


def _standing(item: Exchange | FlowUse, led: _Led) -> tuple[float, str]:
    """Return the weight of all that was seen of the flow so far, and its words."""
    if led.chaff:
        nats = CHAFF_NATS[min(led.chaff, len(CHAFF_NATS)) - 1]
        text = f"{item.text} ({led.chaff} such windows)" if isinstance(item, FlowUse) else "keystroke chaff"
        return nats + led.tunnel, text
    nats, text = _led_talk(item, led) if isinstance(item, Exchange) else (0.0, "")
    if led.visited and led.visited.nats + led.tunnel > nats:
        return led.visited.nats + led.tunnel, led.visited.text
    return nats, text


def _led_talk(item: Exchange, led: _Led) -> tuple[float, str]:
    """Return the weight of the exchanges that the far side led, and its words."""
    nats = max((weight for count, weight in LED_NATS if led.led >= count), default=0.0)
    ours, theirs, asked = _sums(item, led)
    pace_ns, spread = _pace(led)
    pair, _ = _usual_pair(led)
    udp = item.flow.protocol == UDP
    # An SSH server asks for much: keepalives, channels to the agent and to X11. Keys are told from that by their echo.
    echo_only = udp or (item.carrier == "ssh" and not led.tunnel)
    typed = 0.0 if echo_only and abs(pair[1] - pair[0]) > ALIKE_BYTES else _typed(led, pace_ns, spread)
    lines = led.tunnel or (item.carrier != "ssh" and (_echoes(led) or _commands(led, item, asked)))
    ratio = UDP_BYTES_RATIO_MIN if udp else BYTES_RATIO_MIN
    if (led.led < LEAD_MIN * led.near or led.led < led.slow or ours < ratio * theirs
            or _ticks(led, spread) or item.carrier == "broker" or _acknowledges(led) or _confirms(led)
            or not (typed or lines)):
        return 0.0, (f"the far side led {led.led} exchanges, this side {led.near}; {ours} bytes out, {theirs} in; "
                     f"pace varies by {spread:.2f}: not as a shell on this host would have it")
    nats += typed
    nats += led.tunnel
    where = "the connection" if led.connections == 1 else f"{led.connections} connections, one after the other,"
    text = (f"on {where} that this host opened the far side broke the silence {led.led} times with "
            f"{'a key' if typed else 'something small'} (mostly {pair[0]} bytes) and was answered at once (mostly "
            f"{pair[1]} bytes), this host {led.near} times; {ours} bytes out, {theirs} in, "
            f"{pace_ns / 1e6:.0f} ms apart")
    return nats, text


def _gaps(led: _Led) -> list[int]:
    """Return how far apart the questions of one connection lay."""
    return [turn.gap_ns for turn in itertools.islice(led.turns, 1, None) if turn.gap_ns is not None]


def _pace(led: _Led) -> tuple[int, float]:
    """Return the median gap between questions, and the coefficient of variation of the gaps."""
    gaps = sorted(_gaps(led))
    return (gaps[len(gaps) // 2], _spread(gaps)) if len(gaps) > 1 else (0, 1.0)


def _spread(gaps: list[int]) -> float:
    """Return the coefficient of variation."""
    mean = sum(gaps) / len(gaps)
    variance = sum((gap - mean) ** 2 for gap in gaps) / len(gaps)
    return variance**0.5 / mean if mean > 0 else 0.0


def _usual_pair(led: _Led) -> tuple[tuple[int, int], float]:
    pairs = Counter((turn.question, turn.answer) for turn in led.turns)
    pair, count = max(pairs.items(), key=lambda one: (one[1], one[0]), default=((0, 0), 0))
    return pair, count / max(1, len(led.turns))


def _typed(led: _Led, pace_ns: int, spread: float) -> float:
    """Return what the keys weigh that somebody types on the far side, 0.0 where nobody does."""
    pair, share = _usual_pair(led)
    if share < MOSTLY and led.led >= TYPED_LONG:
        near = sum(max(abs(turn.question - pair[0]), abs(turn.answer - pair[1])) <= ALIKE_BYTES for turn in led.turns)
        share = near / len(led.turns) if near >= NEARLY_TYPED_SHARE * len(led.turns) else 0.0
    paced = PACE_NS[0] <= pace_ns <= PACE_NS[1] and spread >= IRREGULAR_MIN
    if share >= MOSTLY and paced and _prints(led) and not _polls_on(led):
        led.typed = min(TYPED_NATS_MAX, TYPED_NATS_EACH * led.led * share)
        led.key = pair[0]
        return led.typed
    keys = _alike((turn.question for turn in led.turns), led.key)
    return led.typed if led.typed >= TYPED_LONG_NATS and keys >= MOSTLY * len(led.turns) else 0.0


def _prints(led: _Led) -> bool:
    """Return whether before most questions stands what always does, an echo, and before some stands more: output.

    A client whose server takes its time has asked before each answer: always the same, or each time another request.
    """
    before = [turn.before for turn in led.turns if turn.before]
    if len(before) < STANDING_MIN:
        return True
    usual, _ = Counter(before).most_common(1)[0]
    printed = any(one > usual + ALIKE_BYTES for one in before)
    return printed and _alike(before, usual) >= MOSTLY * len(before)


def _ticks(led: _Led, spread: float) -> bool:
    """Return whether the far side speaks by the clock; what it says is not lines of all lengths that are echoed.

    A clock that starts anew whenever something else is said (keepalives) is one as well.
    """
    gaps = sorted(_gaps(led))
    beats = sum(abs(gap - gaps[len(gaps) // 2]) <= BEAT_RATIO * gap for gap in gaps)
    regular = spread < CLOCKWORK_MAX or beats >= max(BEATS_MIN, MOSTLY * len(gaps))
    return regular and not (_differ(led) and _echoes(led))


def _differ(led: _Led) -> bool:
    """Return whether no question with its answer makes up half of all."""
    return _usual_pair(led)[1] < MOSTLY


def _echoes(led: _Led) -> bool:
    """Return whether answers repeat the question, whatever its length, with the same framing; each pair counts once."""
    pairs = {(turn.question, turn.answer) for turn in led.turns}
    _, count = Counter(answer - question for question, answer in pairs).most_common(1)[0]
    return count >= ECHOED_SHARE * len(pairs) and len({question for question, _ in pairs}) >= ECHOED_LENGTHS_MIN


def _commands(led: _Led, item: Exchange, asked: int) -> bool:
    """Return whether lines come as somebody types them, and are answered as by programs that run one by one."""
    gaps = _gaps(led)
    hurried = sum(gap < LINE_GAP_NS for gap in gaps)
    delays = sorted(turn.delay_ns for turn in led.turns)
    # What is in clear, and no broker's, is known where the first bytes were seen.
    clear = item.carrier == "tcp" and item.flow.initiator_known
    started = clear and _differ(led) and delays[len(delays) // 2] >= PROGRAM_NS
    return (hurried <= HURRIED_MAX * len(gaps) and led.led >= ANSWERED_SHARE * asked and (started or _varies(delays))
            and not _polls(led) and not _stands(led) and not _in_turn(led, clear=clear))


def _varies(delays: list[int]) -> bool:
    """Return whether answers took different times: not one that was held up by chance, but the middle half of them."""
    tenth, quarter = len(delays) // 10, len(delays) // 4
    return (delays[-1 - tenth] >= WORK_SPREAD_MIN * delays[tenth]
            and delays[-1 - quarter] >= MIDDLE_SPREAD_MIN * delays[quarter])


def _polls(led: _Led) -> bool:
    """Return whether what the far side says most often comes by the clock where nothing was said in between.

    So comes the empty answer to a long poll, for which this host has the next question ready: that takes no work.
    """
    usual, _ = _usual_pair(led)
    same = [turn for turn in led.turns if (turn.question, turn.answer) == usual]
    empty = [turn.gap_ns for turn in same if turn.gap_ns is not None and turn.more == 0]
    delays = sorted(turn.delay_ns for turn in same)
    return len(empty) >= POLLS_MIN and _spread(empty) < CLOCKWORK_MAX and not _varies(delays)


def _stands(led: _Led) -> bool:
    """Return whether what this host had said last was always of one length: a request that it has open."""
    before = [turn.before for turn in led.turns if turn.before]
    alike = _most_alike(before)
    return len(before) >= STANDING_MIN and alike >= min(len(before) - 1, STANDING_SHARE * len(before))


def _in_turn(led: _Led, *, clear: bool) -> bool:
    """Return whether this host says one thing at a time, as clients and callbacks do, and the words are no shell's.

    A shell's prompt, or more output, follows what it answers at once; one without a prompt is told by lines of several
    lengths, short enough to be typed. Where connections are summed up it is not told.
    """
    known = [turn.in_turn for turn in led.turns if turn.in_turn is not None]
    questions = sorted(turn.question for turn in led.turns)
    confirmed = _most_alike(questions, CONFIRMATION_BYTES) >= MOSTLY * len(questions)
    called = clear and questions[len(questions) // 2] >= CALL_BYTES_MIN
    return sum(known) >= IN_TURN_SHARE * len(known) and (confirmed or called or led.connections > 1)


def _polls_on(led: _Led) -> bool:
    """Return whether after other answers than the usual one there stands what always does: the next poll.

    Before the next key stands what the last one had printed, be it an echo or something else.
    """
    (_, usual), _ = _usual_pair(led)
    standing = Counter(turn.before for turn in led.turns).most_common(1)[0][0]
    others = [after.before for turn, after in itertools.pairwise(led.turns)
              if after.gap_ns is not None and abs(turn.answer - usual) > ALIKE_BYTES]
    alike = _alike(others, standing) if standing else 0
    return len(others) >= POLLS_MIN and alike >= STANDING_SHARE * len(others)


def _confirms(led: _Led) -> bool:
    """Return whether the far side says one thing more after each answer, of one length, shorter than its questions."""
    more = [turn.more for turn in led.turns if turn.more is not None]
    usual, count = Counter(more).most_common(1)[0] if more else (0, 0)
    alike = _alike(more, usual) if usual > 0 else 0
    questions = sorted(turn.question for turn in led.turns)
    return count > 0 and alike >= CONFIRMED_SHARE * len(more) and usual < questions[len(questions) // 2]


def _acknowledges(led: _Led) -> bool:
    """Return whether all sorts of questions get nearly one and the same answer: a protocol's acknowledgement."""
    questions = [turn.question for turn in led.turns]
    answers = [turn.answer for turn in led.turns]
    size = len(led.turns)
    return _most_alike(answers) >= ACKNOWLEDGED_SHARE * size and _most_alike(questions) <= MOSTLY * size


def _most_alike(sizes: Sequence[int], within: int = ALIKE_BYTES) -> int:
    """Return how many of the sizes are nearly one of them, at most."""
    ordered = sorted(sizes)
    return max((bisect_right(ordered, one + within) - bisect_left(ordered, one - within) for one in set(sizes)),
               default=0)


def _alike(sizes: Iterable[int], usual: int) -> int:
    """Return how many of the sizes are nearly the usual one."""
    return sum(abs(one - usual) <= ALIKE_BYTES for one in sizes)
