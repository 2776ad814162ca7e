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
- devices that a person sets from afar: they confirm in the words of the request, which looks like an echo, or in one
  or two lengths, and say no more; what a command prints stands behind its echo, and is of many lengths;
- services behind a message broker (NATS, AMQP, MQTT, Redis): whoever asks, this host answers at once, line by line.
  In clear the broker's protocol is known by its first bytes, also in a WebSocket, or the server has chosen it for one,
  and what looks like typed lines is then a request. Inside TLS requests come closer together than anybody types lines,
  or are all answered after the same time, as one function takes it; the commands of a shell are different programs. Or
  most are not answered at once: they are worked on;
- a debugger's steps, to a stub that dialled it: most are the same question and the same answer;
- clients of a slow server, in clear (mail handed in, rows inserted): each answer, half a second late, looks like a
  question. They say one thing at a time, and what they hear is mostly one confirmation;
- callbacks of a server, in clear (RPyC): again one thing at a time, and questions that nobody types as lines;
- clients in lockstep with a slow server (requests, queries, a transfer): what this host said before each word of the
  far side is its next request, always alike or always another. Before most keys it is the echo of the last one, and
  before some what a command printed: of any length, after a key like any other (Enter), and read, so that the next key
  takes longer;
- events, heartbeats and calls beside other talk: where somebody types, nothing shorter than a key is said, and little
  else. A key and its echo are short with all their wrapping; lines are not all of one length, and few of them are much
  longer than the shortest;
- prompts answered by a script (telnet, expect, FTP): there the far side sends the output, so that most bytes flow
  towards this host; in a shell that runs here most flow away from it, or as many as are echoed;
- programs on the far side of an SSH session, or behind ``-L``, that ask for their next item or whether somebody is
  there: one small record each way, as a key and its echo. Where no tunnel was seen, keys are a shell's once they have
  printed more, which was read, and more goes out than comes in;
- steps of a simulator, or a transfer in a small window, in lockstep at the pace of keystroke chaff: this host began
  them, or speaks SSH without a tunnel, where the server types nothing;
- a device or node that the server it called reads over UDP (CoAP, LwM2M): it answers each question once, and what else
  it says is rare; a shell's prompt follows most answers;
- an administrator who logs in: the far side has dialled.

A guard that started later than the connection saw nobody dial. The host's sockets then say who did (`Network.dialler`),
and the standing is bounded by how far they can be trusted; where they do not say, nothing is concluded. Over UDP the
first packet and the ports do. A shell that is dialled again for each few commands is told from their sum.

Weights: see the constants, and for keys and lines `core.shell_talk`. The flow's standing is computed anew at each
exchange, and only its change is told, so that a conversation that turns out otherwise takes its suspicion back.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from gpuguard.core import shell_talk
from gpuguard.core.bounded import BoundedTable
from gpuguard.core.evidence import Evidence
from gpuguard.core.network import EPHEMERAL_PORT_MIN
from gpuguard.core.observations import Exchange, FlowClosed, FlowUse
from gpuguard.core.turns import AT_ONCE_NS, NO_PROGRAM_NS

if TYPE_CHECKING:
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
# The same of SSH without a tunnel: a key of a session within it costs some 84 bytes each way beside what it prints.
SSH_BYTES_RATIO_MIN = 1.1

# A shell may be dialled again for each few commands: what the far side led on the last connection to a place counts on
# the next one, if it began after the last word of that one and within an hour. Silences are those within a connection,
# so that nothing is read into when it is dialled. One exchange on a connection is none: a server that takes its time to
# answer seems to break the silence, and TLS takes leave of it with a word. Three exchanges more are asked for.
AGAIN_NS = 3_600_000_000_000
AGAIN_LED_MIN = 2
AGAIN_SUM_MIN = 8

# Who was echoed key by key for so long goes on typing in a program that fills the screen (vi, less, top): it answers
# one key by this and the next by that.
TYPED_LONG = 16
TYPED_LONG_NATS = TYPED_LONG * TYPED_NATS_EACH

# At least a third of what the far side says is answered at once, and shortly: Meterpreter's own questions by the clock
# halve that, and of a service that works it is less.
ANSWERED_SHARE = 1 / 3

#: What the grammar says where somebody asks through a tunnel (`core.ssh.visitor`).
VISITED = "ssh-reverse-channel-asked"
#: Where a port is asked for, and where channels are opened and ended.
REQUEST = "ssh-reverse-forward-request"
SET_UP = ("ssh-reverse-channel-open", "ssh-reverse-channel-ended")
SET_UP_MAX = 8

TOLD_NATS_MIN = 1.0
LEAD_MIN = 2.0
BYTES_RATIO_MIN = 0.7
_SPOTS = ("commands carried by a message broker in clear", "commands that answer polls",
          "shells in two one-way connections", "pasted scripts that answer with files only",
          "commands paced by a timer and not echoed",
          "padding of every record", "traffic merged with other channels of the same connection")
_UNSEEN_SPOT = "who dialled, where the listener of an accepted connection has gone"


#: Who dialled whom: namespace, protocol, initiator, responder, its port.
Place = tuple[int, int, str, str, int]


class _Sums(NamedTuple):
    """What both sides said since the far side first led, in bytes, and how often the far side asked."""

    ours: int = 0
    theirs: int = 0
    asked: int = 0


class _Led:
    """What is known of one flow, and of those before it that it goes on from."""

    __slots__ = ("answered", "base_far", "base_near", "broken", "chaff", "connections", "earlier",
                 "far_bytes", "followed", "here", "key", "last_ns", "led", "led_ns", "near", "said", "set_up",
                 "slow", "sums", "told", "tunnel", "turns", "typed", "undo", "visited")

    def __init__(self) -> None:
        #: Exchanges that the far side led and this host answered at once, or later; and those that this host led.
        self.led = 0
        self.slow = 0
        self.near = 0
        #: All that the table counted by the last that it told of, which ended then.
        self.answered = 0
        self.last_ns = 0
        #: Whether the far side led one: from then on the table tells of all.
        self.followed = False
        #: Whether the far side broke the last silence; what this host said in the last exchange, in bytes.
        self.broken = False
        self.said = 0
        #: The last ones that the far side led; when that was, and what it had said in all by then; -1 before the first.
        self.turns: deque[shell_talk.Turn] = deque(maxlen=RECENT_MAX)
        self.led_ns = 0
        self.far_bytes = -1
        #: When the last of them was told, as long as it may turn out to be the opening of a channel, or its end.
        self.undo = 0
        #: What opens and ends channels, in bytes: the far side's word and this host's.
        self.set_up: set[tuple[int, int]] = set()
        #: What both sides had said before the first.
        self.base_near = 0
        self.base_far = 0
        #: What typing weighed when keys were echoed last, and the size of a key.
        self.typed = 0.0
        self.key = 0
        #: Windows of keystroke chaff; what the grammar said of a tunnel, and of who asks through it.
        self.chaff = 0
        self.tunnel = 0.0
        self.visited: FlowUse | None = None
        #: Exchanges that the far side led on this connection, and how many connections there were.
        self.here = 0
        self.connections = 1
        self.sums = _Sums()
        self.earlier = _Sums()
        #: What was told so far.
        self.told = 0.0

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

    def evicted(self) -> dict[str, int]:
        """Return how much was forgotten because a table was full, by what it was."""
        return {"connections that may be led from afar": self._flows.evicted,
                "places that led before": self._places.evicted}

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
        led.followed |= led.broken
        if item.first == "initiator":
            led.near += 1
        elif not self._at_once(item) or (item.flow.protocol == UDP and item.question_bytes > UDP_WORD_BYTES_MAX):
            led.slow += 1
        elif item.answer_delay_ns >= NO_PROGRAM_NS and not self._in_step(item, led) and not _sets_up(item, led):
            self._led(item, led)
            if led.here >= AGAIN_LED_MIN and item.flow.initiator_known:
                self._places.make_room(lambda one: item.flow.start_ns - one.last_ns > AGAIN_NS)
                self._places[_place(item.flow)] = led
        led.last_ns = item.time_ns
        led.said = item.answer_bytes if item.first == "responder" else item.question_bytes
        if not led.here or led.led < _least(item.flow, led) or host.network.stays_inside(item.flow, dialler):
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
        led.turns.append(shell_talk.Turn(
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
        dialler = host.network.dialler(item.flow)
        far = "initiator" if dialler == "responder" else "responder"
        if item.use.startswith("ssh-reverse") and item.use != VISITED:
            self._tunnel(item)
            return []
        if dialler is None or item.use not in (VISITED, f"keystrokes-from-{far}"):
            return []
        if host.network.stays_inside(item.flow, dialler):
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
        if item.use == REQUEST and not led.tunnel and not led.told:
            # What was said before a port was asked for came through no tunnel.
            before, led = led, _Led()
            led.followed = before.followed
            led.answered = before.answered if before.followed else 0
            self._flows[item.flow] = led
        led.tunnel = min(TUNNEL_NATS_MAX, max(0.0, led.tunnel + item.nats))
        if item.use in SET_UP and led.undo == item.time_ns:
            # That exchange was the opening of a channel or its end, not a line of talk.
            turn = led.turns.pop()
            led.led -= 1
            led.here -= 1
            led.undo = 0
            if turn.question != turn.answer and len(led.set_up) < SET_UP_MAX:
                led.set_up.add((turn.question, turn.answer))

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


def _sets_up(item: Exchange, led: _Led) -> bool:
    """Return whether channels of a tunnel are opened or ended, one or several at once: they cost the same each time."""
    return any(not item.question_bytes % asked and item.question_bytes // asked * answer == item.answer_bytes
               for asked, answer in led.set_up)


def _place(flow: FlowId) -> Place:
    return flow.netns, flow.protocol, flow.initiator, flow.responder, flow.responder_port


def _dialler(flow: FlowId, carrier: str, host: Host) -> Speaker | None:
    """Return which end of a flow this host dialled from, None if it was called, or that is not certain."""
    if flow.protocol == TCP:
        return host.network.dialler(flow)
    # The first packet that was seen went from a port that Linux gives to who calls, to one that it does not.
    called = flow.initiator_port >= EPHEMERAL_PORT_MIN > flow.responder_port and not host.network.is_inbound(flow)
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


def _from_this_side(item: Exchange, dialler: Speaker, host: Host) -> Exchange:
    """Return an exchange as if this host's end had been seen to dial: "initiator" is then this host's end."""
    flow = item.flow
    if flow.initiator_known:
        return item
    socket = host.network.socket(flow, dialler)
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
    turns = led.turns
    pace_ns, spread = shell_talk.pace(turns)
    pair, _ = shell_talk.usual_pair(turns)
    udp = item.flow.protocol == UDP
    # An SSH server asks for much: keepalives, channels to the agent and to X11, what its programs want of this side's.
    # Keys are told from that by their echo, and by what they print beyond it.
    echo_only = udp or (item.carrier == "ssh" and not led.tunnel)
    typed = 0.0 if echo_only and abs(pair[1] - pair[0]) > shell_talk.ALIKE_BYTES else _typed(led, item.carrier, udp=udp)
    lines = _lines(item, led, asked)
    ratio = UDP_BYTES_RATIO_MIN if udp else SSH_BYTES_RATIO_MIN if echo_only else BYTES_RATIO_MIN
    if (led.led < LEAD_MIN * led.near or led.led < led.slow or ours < ratio * theirs
            or item.carrier == "broker" or shell_talk.ticks(turns) or shell_talk.acknowledges(turns)
            or shell_talk.confirms(turns) or not (typed or lines)):
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


def _typed(led: _Led, carrier: str, *, udp: bool) -> float:
    """Return what the keys weigh that somebody types on the far side, 0.0 where nobody does."""
    keys = shell_talk.keys(led.turns, carrier, long=led.led >= TYPED_LONG, udp=udp)
    if keys:
        unread = carrier == "ssh" and not led.tunnel and keys.nats_max <= shell_talk.PRINTED_NATS
        weight = 0.0 if unread else min(TYPED_NATS_MAX, keys.nats_max, TYPED_NATS_EACH * led.led * keys.share)
        # That somebody read what was printed is not forgotten with the turns in which it was.
        led.typed = max(weight, led.typed if led.typed >= TYPED_LONG_NATS and led.key == keys.size else 0.0)
        led.key = keys.size
        return led.typed
    same = shell_talk.alike((turn.question for turn in led.turns), led.key)
    return led.typed if led.typed >= TYPED_LONG_NATS and same >= shell_talk.MOSTLY * len(led.turns) else 0.0


def _lines(item: Exchange, led: _Led, asked: int) -> bool:
    """Return whether the far side says lines of a shell. In SSH only those in a tunnel are known."""
    if led.tunnel or item.carrier == "ssh":
        return led.tunnel > 0
    # What is in clear, and no broker's, is known where the first bytes were seen.
    clear = item.carrier == "tcp" and item.flow.initiator_known
    prompts = led.connections > 1 or item.flow.protocol == UDP
    return shell_talk.echoes(led.turns) or (
        led.led >= ANSWERED_SHARE * asked and shell_talk.commands(led.turns, clear=clear, prompts=prompts))
