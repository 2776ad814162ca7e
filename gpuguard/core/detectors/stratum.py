"""Mining pools: in clear by their JSON-RPC, in Stratum V2 by its handshake, behind TLS by who says what when.

Stratum V1 (mining.subscribe, mining.authorize), the dialect of CryptoNote coins (login, then a job with its blob) and
ethproxy's (eth_submitLogin) are named by the first lines of a connection, or messages in a WebSocket; other dialects by
the form of what is said (`core.pools`), if the far side gives a job before this one hands in two shares. Who mines at a
node of its own is named by what it asks of it over HTTP: a block to find, or to take one (BIP 22 and 23, getwork,
Monero's and Ethereum's alike). The port says nothing, nor does the name of the pool: pools listen on 443, and proxies
of pools anywhere. Stratum V2 (sv2-spec, 4.5) begins with 64 random bytes, answered by 234, and the first message after
that is answered by 44.

Benign look-alikes in clear: JSON-RPC of other programs (language servers, Electrum and Lightning wallets, explorers and
wallets that ask a node for blocks and balances, a ``login`` of any service): other methods, or without the fields that
only a pool's have, and forms of one side only. A pool that runs on this host and is dialled from outside is somebody
else's mining.

Behind TLS the lengths of records are those of the lines in them, and a pool's talk has a form of its own:

- shares: messages of this host, all of one length (a nonce and counters in hexadecimal), found by chance: their
  intervals are no timer's. Each is answered by one short line, of one length too, that names it and says how it went;
- jobs: lines of the pool, of nearly one length, in between, answered by nothing and asked for by nothing. They say what
  the share only refers to, and are longer, but where a share is a whole solution;
- at most one more kind of message of this host, of another length, by the clock: a hash rate (eth_submitHashrate), a
  keepalive. It is left out with its answers, and so are pings of a WebSocket.

Benign look-alikes behind TLS, and what keeps them out:

- chats (who types, and what), dashboards, market data, Jupyter, event streams, watches (etcd, Kubernetes): lengths
  vary as their contents do, or this host says nothing;
- telemetry and heartbeats: a timer's intervals, or nothing is pushed;
- events as they happen, acknowledged, and settings or news pushed in between: MQTT acknowledges in 4 to 6 bytes, and
  what is pushed is as often as not shorter than the event;
- orders among ticks, results among notices: the same;
- long polls: each push is answered by the next question;
- work queues (a task is pushed, a result returned and acknowledged): tasks and results take turns, or each task comes
  right behind a result.

A sensor that reports rare events in records of one length, is acknowledged in a line, and hears longer news of one
length at their own pace, has the same form: this alone is never more than suspect. Together with launches of the same
process (`detectors.mining`) it is.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections import deque
from typing import TYPE_CHECKING, NamedTuple

from msgspec import Struct, field

from gpuguard.core import pools
from gpuguard.core.bounded import BoundedTable
from gpuguard.core.ends import FlowsByEnds
from gpuguard.core.evidence import Evidence
from gpuguard.core.observations import FlowClosed, FlowOpened, Spoke, StratumSeen, TlsTalk
from gpuguard.core.turns import variation

if TYPE_CHECKING:
    from gpuguard.core.host import Host
    from gpuguard.core.observations import Observation
    from gpuguard.core.records import Block
    from gpuguard.core.subjects import FlowId

FLOWS_MAX = 16_384
TALKS_MAX = 1_024

# The methods of Stratum V1 are nobody else's: a first line with one is a miner's, a pool's, or a test of either, and
# with tests and honeypots the odds are still those of a confirmed finding. Ethereum nodes know eth_getWork and
# eth_submitWork too, over HTTP. A login with a password, and a job with a blob, are each rare, and each of one side.
# Work of a node is also fetched by a pool's server, and by whoever watches fees by what a block would hold.
MINING_NATS = 21.0
ETHPROXY_NATS = 14.0
CRYPTONOTE_NATS = 11.0
WORK_NATS = 9.0

# A job and a share by their form alone: who else hands out something to be hashed to a difficulty, and takes nonces for
# it, are the challenges of web pages (one answer each), faucets and tests: suspect, no more.
FORM_NATS = 8.0
SHARES_MIN = 2

# Stratum V2. Of the flows that this host opens with 64 random bytes and nothing more (one in ten thousand), one in 200
# would be answered by just 234 random ones, and one in 50 of those by 44 next: 4 nats for the first, 9.2 for the answer
# (ln 200 + ln 50), which is told only where both its parts were seen. No capture of it was at hand: suspect, no more.
HELLO_NATS = 4.0
ANSWER_NATS = 9.2

# Behind TLS. Of slow connections with eight acknowledged messages, those that pass each of the tests below are few: one
# length of questions (1/4), one of answers (1/2), no timer (1/2), pushes that nobody answers (1/4), of one length and
# longer than answers (1/10), and not in turn with the questions (1/3): 1/1,900, 7.5 nats. More of the same adds little.
# That pushes are longer than questions too (1/2) is what fewer of them are worth.
TALK_NATS = ((8, 7.5), (16, 9.0))
LOGIN_NS = 5_000_000_000
ANSWER_NS = 2_000_000_000
#: Times of records are whole milliseconds after the first of their side, so that on a fast network an answer may seem
#: to come before its question.
CLOCK_NS = 1_000_000
JOBS_MIN = 3
ANSWERED_MIN = 0.85
ALIKE_MIN = 0.85
#: A share is always the same line with other digits; of a chat's messages about who types many are, but not all.
SHARES_ALIKE_MIN = 0.95
SHARE_BYTES = 6
#: The least that says to which share it belongs and how it went: 7 bytes if compressed in a WebSocket, in a record of
#: TLS, which alone has 17. A PUBACK has 4 to 6 (MQTT 5.0, 3.4).
ANSWER_BYTES_MIN = 24
#: {"id":4,"result":true,"error":null}. What is shorter is mostly compressed, where hexadecimal digits keep half their
#: length and names vanish: a job of CryptoNote's, with three hashes' worth, is then nearly twice its share.
ANSWER_IN_FULL_BYTES = 53
SHORT_ANSWER_JOB_RATIO_MIN = 1.5
#: A job holds a header, or hashes and a target; its share refers to it, and is the shorter one but where a whole
#: solution is handed in: 104 bytes in hexadecimal, with a nonce and names (Beam), or more (Equihash, cycles).
SOLUTION_BYTES_MIN = 300
#: No share and no job is as short in its record as the pings, pongs and the end of a WebSocket (RFC 6455, 5.5), and
#: TLS's alerts.
CONTROL_BYTES = 32
ANSWER_BYTES = 4
JOB_RATIO = 0.35
#: A job holds a header, or its hash, in a record of TLS, which alone has 22 bytes.
JOB_BYTES_MIN = 54
IRREGULAR_MIN = 0.45
SAME_AGAIN_MIN = 0.15
#: By chance one job in eight comes as soon as that after a share, and three of five once in 60 talks.
ASKED_RATIO = 0.2
REPORTS_MIN = 3
REPORTS_VARIATION_MAX = 0.2

_SPOTS = ("SSH and other wrappings", "a connection whose opening was not seen",
          "work that is asked of a node after 16 kB of other requests", "pools behind TLS that join jobs and answers",
          "fewer than eight shares in the first 64 records")

#: What is asked of a node over HTTP; Ethereum's methods, of nodes and pools alike, are ethproxy's.
WORK = frozenset(("getblocktemplate", "get_block_template", "getwork", "submitblock", "submit_block"))

#: When, and how long.
Said = tuple[int, int]


class Talk(NamedTuple):
    """What one side sent: when, and how long."""

    times_ns: tuple[int, ...]
    sizes: tuple[int, ...]


class Lines(Struct):
    """What was said in JSON: who spoke in known words, whether a job was given, and how many shares were since."""

    known: set[str] = field(default_factory=set)
    job: bool = False
    shares: int = 0


class Detector:
    """Tells of connections that speak to a pool."""

    takes = (FlowOpened, StratumSeen, Spoke, TlsTalk, FlowClosed)

    def __init__(self) -> None:
        self._flows = FlowsByEnds(FLOWS_MAX)
        self._talks: BoundedTable[FlowId, dict[str, Talk]] = BoundedTable(TALKS_MAX)
        self._told: BoundedTable[FlowId, float] = BoundedTable(TALKS_MAX)
        self._lines: BoundedTable[FlowId, Lines] = BoundedTable(TALKS_MAX)

    def evicted(self) -> dict[str, int]:
        """Return how much was forgotten because a table was full, by what it was."""
        talks = self._talks.evicted + self._told.evicted + self._lines.evicted
        return {"connections that pools may answer on": self._flows.evicted, "talks like a pool's": talks}

    def receive(self, item: Block | Observation, host: Host) -> list[Evidence]:
        """Return what a first line, a handshake or the talk so far weighs."""
        match item:
            case FlowOpened() if item.flow.protocol == 6:
                self._flows.know(item.flow)
            case StratumSeen():
                return self._line(item, host)
            case Spoke() if item.what.startswith("stratum2") and not host.network.is_inbound(item.flow):
                return self._handshake(item)
            case TlsTalk() if host.network.dialled_out(item.flow):
                return self._talk(item)
            case FlowClosed():
                self._flows.end(item.flow)
                self._talks.pop(item.flow)
                self._told.pop(item.flow)
                self._lines.pop(item.flow)
            case _:
                pass
        return []

    @staticmethod
    def _handshake(item: Spoke) -> list[Evidence]:
        if (item.what == "stratum2-hello") != (item.speaker == "initiator"):
            return []
        nats, text = HELLO_NATS, "64 random bytes, as Stratum V2 begins"
        if item.what == "stratum2-answer":
            nats, text = ANSWER_NATS, "234 random bytes and then 44, as a Stratum V2 pool answers"
        return [_evidence(item, item.flow, item.what, nats, text, "tcp")]

    def _talk(self, item: TlsTalk) -> list[Evidence]:
        """Weigh the talk anew whenever either side said more; tell the change."""
        talks = self._talks.get(item.flow) or {}
        talks[item.speaker] = Talk(item.times_ns, item.sizes)
        self._talks[item.flow] = talks
        if len(talks) < 2:
            return []
        nats, text = _weigh_talk(talks["initiator"], talks["responder"])
        change = nats - (self._told.get(item.flow) or 0.0)
        if abs(change) < 1.0:
            return []
        self._told[item.flow] = nats
        return [_evidence(item, item.flow, "pool-like-talk" if change > 0 else "pool-like-talk-no-more", change, text,
                          "tls")]

    def _line(self, item: StratumSeen, host: Host) -> list[Evidence]:
        near, far = (item.source, item.source_port), (item.destination, item.destination_port)
        flow = self._flows.find(item.netns, near, far)
        if flow is None or host.network.is_inbound(flow):
            return []
        by_far = near == (flow.responder, flow.responder_port)
        side = "far" if by_far else "near"
        lines = self._lines[flow] = self._lines.get(flow) or Lines()
        if item.method in (pools.JOB, pools.SHARE):
            return self._form(item, flow, lines, side)
        if side in lines.known:
            return []
        lines.known.add(side)
        text = (f"the {side} side asks a node for a block to find, or to take one: {item.method}"
                if item.method in WORK else
                f"the {side} side begins with a mining pool's JSON-RPC: {item.method}")
        return [_evidence(item, flow, "pool-answers" if by_far else "pool-is-asked", _weigh(item.method), text, "tcp")]

    def _form(self, item: StratumSeen, flow: FlowId, lines: Lines, side: str) -> list[Evidence]:
        """Count the shares of this side that come after a job of the far one."""
        lines.job |= (item.method, side) == (pools.JOB, "far")
        lines.shares += lines.job and (item.method, side) == (pools.SHARE, "near")
        if lines.shares < SHARES_MIN or lines.known:
            return []
        lines.known.add("form")
        text = (f"the far side gave out a header and how hard it is, and this one handed in {SHARES_MIN} nonces, all "
                "in JSON, as a pool and a miner do")
        return [_evidence(item, flow, "pool-like-lines", FORM_NATS, text, "tcp")]


def _weigh(method: str) -> float:
    if method.startswith("mining."):
        return MINING_NATS
    if method in WORK:
        return WORK_NATS
    return ETHPROXY_NATS if method.startswith("eth_") else CRYPTONOTE_NATS


def _evidence(item: StratumSeen | Spoke | TlsTalk, flow: FlowId, kind: str, nats: float, text: str,
              carrier: str) -> Evidence:
    return Evidence(
        time_ns=item.time_ns,
        subject=flow,
        label="mining-pool",
        evidence_class="network",
        kind=kind,
        nats=nats,
        text=text,
        start_ns=flow.start_ns,
        carrier=carrier,
        blind_spots=_SPOTS,
    )


def _weigh_talk(near: Talk, far: Talk) -> tuple[float, str]:
    """Return what is said for a pool by what both sides sent, as long as both are known, and its words."""
    start_ns = max(near.times_ns[0], far.times_ns[0]) + LOGIN_NS
    end_ns = min(near.times_ns[-1], far.times_ns[-1])
    sent = [(now, size) for now, size in zip(*near, strict=True)
            if start_ns - ANSWER_NS <= now <= end_ns and size > CONTROL_BYTES]
    said = [(now, size) for now, size in zip(*far, strict=True) if start_ns - ANSWER_NS <= now <= end_ns + ANSWER_NS]
    reports = _reports(sent)
    shares = [one for index, one in enumerate(sent) if index not in reports]
    answers, said = _answers([now for now, _ in shares], said)
    _, said = _answers([sent[index][0] for index in sorted(reports)], said)
    jobs = [(now, size) for now, size in said if start_ns <= now <= end_ns and size > CONTROL_BYTES]
    shares, answers = ([(now, size) for now, size in some if now >= start_ns] for some in (shares, answers))
    if len(shares) < TALK_NATS[0][0] or len(jobs) < JOBS_MIN or len(answers) < ANSWERED_MIN * len(shares):
        return 0.0, "too little, or too little answered alike, to be a pool's"
    share, answer, job = (_middle([size for _, size in some]) for some in (shares, answers, jobs))
    text = (f"{len(shares)} messages of {share} bytes went out at no timer's pace, {len(answers)} were answered by "
            f"{answer} bytes, and {len(jobs)} of about {job} bytes came unasked")
    alike = (_alike([size for _, size in shares], share, SHARE_BYTES, SHARES_ALIKE_MIN)
             and _alike([size for _, size in jobs], job, JOB_RATIO * job))
    if not alike or not _fit(share, answer, job):
        return 0.0, "sizes vary as contents do, or are no share's, answer's and job's"
    if _variation([now for now, _ in shares]) < IRREGULAR_MIN or _takes_turns(shares, jobs) or _asked(shares, jobs):
        return 0.0, "a timer's pace, or questions and answers in turn"
    return max(nats for count, nats in TALK_NATS if len(shares) >= count), text


def _fit(share: int, answer: int, job: int) -> bool:
    """Return whether a share, its answer and a job may be as long as that."""
    if not ANSWER_BYTES_MIN <= answer < min(share, job) or job < JOB_BYTES_MIN:
        return False
    if answer < ANSWER_IN_FULL_BYTES:
        return job >= SHORT_ANSWER_JOB_RATIO_MIN * share
    return job > share or share >= SOLUTION_BYTES_MIN


def _answers(asked_ns: list[int], said: list[Said]) -> tuple[list[Said], list[Said]]:
    """Part what the far side said: answers to these messages of this side, of their usual length, and the rest.

    Where two messages are under way at once their answers come in turn.
    """
    shortest = [min((size for now, size in said if 0 <= now - asked + CLOCK_NS <= ANSWER_NS), default=0)
                for asked in asked_ns]
    usual = _middle(shortest) if shortest else 0
    waiting = deque(asked_ns)
    answers, rest = [], []
    for now, size in said:
        while waiting and now - waiting[0] > ANSWER_NS:
            waiting.popleft()
        if waiting and waiting[0] <= now + CLOCK_NS and abs(size - usual) <= ANSWER_BYTES:
            waiting.popleft()
            answers.append((now, size))
        else:
            rest.append((now, size))
    return answers, rest


def _reports(sent: list[Said]) -> set[int]:
    """Return which messages are of another length than most, or most than others, and come by the clock."""
    usual = _middle([size for _, size in sent]) if sent else 0
    most = {index for index, (_, size) in enumerate(sent) if abs(size - usual) <= SHARE_BYTES}
    for part in (set(range(len(sent))) - most, most):
        times_ns, sizes = [sent[index][0] for index in sorted(part)], [sent[index][1] for index in part]
        if (REPORTS_MIN <= len(part) < len(sent) and _alike(sizes, _middle(sizes), SHARE_BYTES)
                and _variation(times_ns) <= REPORTS_VARIATION_MAX):
            return part
    return set()


def _middle(sizes: list[int]) -> int:
    return sorted(sizes)[len(sizes) // 2]


def _alike(sizes: list[int], middle: int, within: float, least: float = ALIKE_MIN) -> bool:
    return sum(abs(size - middle) <= within for size in sizes) >= least * len(sizes)


def _variation(times_ns: list[int]) -> float:
    """Return the coefficient of variation of the gaps: 0 of a clock, 1 of what comes by chance."""
    return variation([later - earlier for earlier, later in itertools.pairwise(times_ns)])


def _takes_turns(shares: list[Said], jobs: list[Said]) -> bool:
    """Return whether each push is followed by a message of this side, and each message by a push."""
    merged = sorted([(now, 0) for now, _ in shares] + [(now, 1) for now, _ in jobs])
    same = sum(one[1] == other[1] for one, other in itertools.pairwise(merged))
    return same < SAME_AGAIN_MIN * len(merged)


def _asked(shares: list[Said], jobs: list[Said]) -> bool:
    """Return whether pushes follow messages of this side far sooner than those follow each other: a queue's tasks."""
    times_ns = [now for now, _ in shares]
    usual_ns = _middle([later - earlier for earlier, later in itertools.pairwise(times_ns)])
    since_ns = [now - times_ns[place - 1] for now, _ in jobs if (place := bisect_right(times_ns, now))]
    return 2 * len(since_ns) > len(shares) and _middle(since_ns) < ASKED_RATIO * usual_ns
