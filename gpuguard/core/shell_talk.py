"""Whether turns in which a far side leads are those of a shell: keys and their echo, or lines and what programs print.

A turn is a silence that the far side broke and that this host answered at once. Which ordinary conversations look like
it, and who looks at turns at all, says `detectors.reverse_shell`; `tests/conversations` plays both by chance.
"""

from __future__ import annotations

import itertools
import math
import statistics
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypeAlias

from gpuguard.core.turns import LINE_GAP_NS, variation

#: As one would say "mostly".
MOSTLY = 0.5

#: Of nearly one length: numbers and offsets in a message differ by some digits.
ALIKE_BYTES = 4
#: Nearly always a worker's answer is confirmed, and what stands open before the far side's word is of one length.
CONFIRMED_SHARE = 0.9
STANDING_SHARE = 0.9
STANDING_MIN = 3
#: A client that writes hears confirmations of one length, but for a counter's digit. In six shells without a prompt at
#: most three of seven lines were so.
IN_TURN_SHARE = 0.9
CONFIRMATION_BYTES = 1
#: A call has a header, names and numbers; half of what somebody types is shorter than this. Known in clear only.
CALL_BYTES_MIN = 64
#: Acknowledgements: events now and then get an answer of their own instead (a bot's; 3 of 10 in Slack's socket mode).
#: Of shells on all sorts of carriers at most 43 % of the answers were alike where the questions were not.
ACKNOWLEDGED_SHARE = 0.75

#: After many turns keys and echoes may be of nearly one length only, as they are where each is wrapped with a number or
#: a time of its own (a terminal in a page, in JSON): seven of ten then.
NEARLY_TYPED_SHARE = 0.7

# A key and its echo with their wrapping, of which two or three may come together (JSON in WebSocket in TLS, SSH in
# TLS): 98 bytes in what was played. Nothing is shorter than a key, and no answer than an echo, but one in seven at most
# (pings of a multiplexer). Enter may be escaped, as two letters.
KEY_BYTES_MAX = 128
KEYS_TOGETHER = 3
RARELY = 0.15
ENTER_BYTES = 2
#: An echo is as long as its key; a client masks what it says in a WebSocket (RFC 6455, 5.2).
ECHO_MORE_BYTES = (0, 4)
#: One letter in clear, and in a record of TLS (RFC 8446, 5.2; 1.2 with ChaCha20, RFC 7905, and with AES-GCM, RFC 5288).
#: Nobody asks or answers so shortly.
LETTER_BYTES = {"tcp": (1,), "tls": (22, 23, 30)}
# Whoever types a line reads what it printed before the next one: half of the gaps after output are more than twice the
# median of those between keys. By chance a quarter is (log-normal gaps with a sigma of 1), or as many as between keys
# where that is more: ln 2 for each that is, and ln 2/3 for each that is not. Keys whose echo is of another length need
# four that are, and one to be suspect at all. Typing that nobody reads is no more than suspect.
READ_RATIO = 2.0
READ_SHARE, READ_CHANCE = 0.5, 0.25
READ_MIN_NATS, READ_ONCE_NATS = 2.7, 0.69
PRINTED_NATS = 2.5
#: What programs print is seldom of one length; a request is that comes now and then.
PRINTED_ALIKE_SHARE = 0.75

# Lines (what is not typed key by key) are a shell's if they are echoed: questions of several lengths, and answers that
# differ from them by one number. Or if they lie as far apart as it takes a person to type one, and the answers take
# different times, as programs do: the 90th percentile at least three times the 10th. Services behind Redis, NATS and
# Mosquitto took 0.3 to 0.7 ms for all requests but the first; commands 0.2 to 30 ms. In clear it suffices that the
# lines and what they print differ, and that most take as long as it takes to start a program: brokers are known there,
# and short commands on a fast network mostly took 1.1 to 1.7 ms.
PROGRAM_NS = 800_000
ECHOED_SHARE = 0.8
ECHOED_LENGTHS_MIN = 3
HURRIED_MAX = 0.2
# Three of four lines that people type are little longer than the shortest, and no more than that are of one length (SSH
# inside rounds lengths up). A service's calls are all alike, or of all sizes.
LINE_BYTES = 64
SAME_LINES_MIN = 4
SAME_LINES_SHARE = 0.75
WORK_SPREAD_MIN = 3.0
MIDDLE_SPREAD_MIN = 1.5
POLLS_MIN = 2
#: Confirmations of a protocol come in one or two lengths; what five programs print does not.
KINDS_MAX = 2

PACE_NS = (80_000_000, 1_500_000_000)
IRREGULAR_MIN = 0.25
CLOCKWORK_MAX = 0.15
#: Beats lie so near to each other; nobody types half of all keys so evenly.
BEAT_RATIO = 1.04
BEATS_MIN = 3


class Turn(NamedTuple):
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


Turns: TypeAlias = Sequence[Turn]


class Keys(NamedTuple):
    """What looks like keys: the size of one, which share of all turns they are, and what they may weigh at most."""

    size: int
    share: float
    nats_max: float


def gaps(turns: Turns) -> list[int]:
    """Return how far apart the questions of one connection lay."""
    return [turn.gap_ns for turn in itertools.islice(turns, 1, None) if turn.gap_ns is not None]


def pace(turns: Turns) -> tuple[int, float]:
    """Return the median gap between questions, and the coefficient of variation of the gaps."""
    between = sorted(gaps(turns))
    return (between[len(between) // 2], variation(between)) if len(between) > 1 else (0, 1.0)


def usual_pair(turns: Turns) -> tuple[tuple[int, int], float]:
    """Return the commonest question with its answer, in bytes, and its share."""
    pairs = Counter((turn.question, turn.answer) for turn in turns)
    pair, count = max(pairs.items(), key=lambda one: (one[1], one[0]), default=((0, 0), 0))
    return pair, count / max(1, len(turns))


def keys(turns: Turns, carrier: str, *, long: bool, udp: bool) -> Keys | None:
    """Return what looks like keys that somebody types; ``long``: so many that they need be only nearly alike."""
    pair, share = usual_pair(turns)
    within = 0
    if share < MOSTLY and long:
        within = ALIKE_BYTES
        near = sum(max(abs(turn.question - pair[0]), abs(turn.answer - pair[1])) <= within for turn in turns)
        share = near / len(turns) if near >= NEARLY_TYPED_SHARE * len(turns) else 0.0
    pace_ns, spread = pace(turns)
    paced = PACE_NS[0] <= pace_ns <= PACE_NS[1] and spread >= IRREGULAR_MIN
    if share < MOSTLY or not paced or not _least(turns, pair) or _polls_on(turns):
        return None
    letter = pair[0] == pair[1] and pair[0] in LETTER_BYTES.get(carrier, ())
    return Keys(pair[0], share, math.inf if letter else _printed(turns, pair, max(ENTER_BYTES, within), udp=udp))


def _least(turns: Turns, pair: tuple[int, int]) -> bool:
    """Return whether nothing shorter is said than this question and its answer, and little else by the far side.

    Whoever types faster than a silence lasts says whole keys in between: many of them, each of the same length.
    """
    shorter = sum(turn.question < pair[0] - ALIKE_BYTES or turn.answer < pair[1] - ALIKE_BYTES for turn in turns)
    more = [turn.more for turn in turns if turn.more is not None]
    beside = sum(one > KEYS_TOGETHER * pair[0] and one % pair[0] > 0 for one in more)
    return (max(pair) <= KEY_BYTES_MAX and shorter <= max(1, RARELY * len(turns))
            and beside <= (1 - NEARLY_TYPED_SHARE) * len(more))


def _printed(turns: Turns, pair: tuple[int, int], within: int, *, udp: bool) -> float:
    """Return what keys may weigh: some print more than their echo, as Enter does, and that is read before the next.

    A client whose server takes its time has asked before each answer: always the same, or each time another request.
    """
    after = [(turn, follows.before, follows.gap_ns) for turn, follows in itertools.pairwise(turns)
             if follows.gap_ns is not None]
    before = [said for _, said, _ in after]
    usual = Counter(before).most_common(1)[0][0] if before else 0
    if not usual:
        # Of what QUIC acknowledges the far side had always spoken last.
        return math.inf if udp else 0.0
    if alike(before, usual) < MOSTLY * len(before):
        return 0.0
    # A multiplexer may write a head before each word: the echo is all that stood there, its head was the answer.
    echo = max(usual, pair[1])
    echoed = echo - pair[0] in ECHO_MORE_BYTES
    enters = [abs(turn.question - pair[0]) <= within and said > echo + ALIKE_BYTES for turn, said, _ in after]
    typed = [gap for (_, _, gap), enter in zip(after, enters, strict=True) if not enter]
    read_ns = READ_RATIO * statistics.median(typed) if typed else 0.0
    read = [gap > read_ns for (_, _, gap), enter in zip(after, enters, strict=True) if enter]
    if not read:
        return PRINTED_NATS if echoed and before.count(echo) == len(before) else 0.0
    lengths = [said for (_, said, _), enter in zip(after, enters, strict=True) if enter]
    if _most_alike(lengths) > max(2, PRINTED_ALIKE_SHARE * len(lengths)):
        return 0.0
    slow = sum(gap > read_ns for gap in typed)
    chance = min(READ_SHARE, max(READ_CHANCE, slow / max(1, len(typed))))
    nats = sum(math.log(READ_SHARE / chance if one else (1 - READ_SHARE) / (1 - chance)) for one in read)
    if not echoed and nats < READ_ONCE_NATS:
        return 0.0
    return math.inf if nats >= (READ_ONCE_NATS if echoed else READ_MIN_NATS) else PRINTED_NATS


def ticks(turns: Turns) -> bool:
    """Return whether the far side speaks by the clock; what it says is not lines of all lengths that are echoed.

    A clock that starts anew whenever something else is said (keepalives) is one as well.
    """
    between = sorted(gaps(turns))
    beats = max((bisect_right(between, gap * BEAT_RATIO) - index for index, gap in enumerate(between)), default=0)
    regular = pace(turns)[1] < CLOCKWORK_MAX or beats >= max(BEATS_MIN, MOSTLY * len(between))
    return regular and not (_differ(turns) and echoes(turns))


def _differ(turns: Turns) -> bool:
    """Return whether no question with its answer makes up half of all."""
    return usual_pair(turns)[1] < MOSTLY


def echoes(turns: Turns) -> bool:
    """Return whether answers repeat the question, and behind most of them comes what it printed."""
    return _repeats(turns) and not _said_all(turns)


def _repeats(turns: Turns) -> bool:
    """Return whether answers are as long as the question, whatever its length, with the same framing.

    Each pair counts once.
    """
    pairs = {(turn.question, turn.answer) for turn in turns}
    _, count = Counter(answer - question for question, answer in pairs).most_common(1)[0]
    return count >= ECHOED_SHARE * len(pairs) and len({question for question, _ in pairs}) >= ECHOED_LENGTHS_MIN


def _said_all(turns: Turns) -> bool:
    """Return whether this host mostly said nothing more after an answer, where that is known."""
    known = [turn.in_turn for turn in turns if turn.in_turn is not None]
    return len(known) > 0 and sum(known) >= MOSTLY * len(known)


def _confirms_state(turns: Turns) -> bool:
    """Return whether this host confirms: in one or two lengths, or in the words of each request, and says no more.

    So does a device that is set from afar. What programs print is of many lengths, and stands behind a line's echo.
    """
    return len({turn.answer for turn in turns}) <= KINDS_MAX or (_repeats(turns) and _said_all(turns))


def commands(turns: Turns, *, clear: bool, prompts: bool) -> bool:
    """Return whether lines come as somebody types them, and are answered as by programs that run one by one.

    ``clear``: what is said is known to be no broker's; ``prompts``: only a shell that prompts can be told.
    """
    between = gaps(turns)
    hurried = sum(gap < LINE_GAP_NS for gap in between)
    delays = sorted(turn.delay_ns for turn in turns)
    started = clear and _differ(turns) and delays[len(delays) // 2] >= PROGRAM_NS
    return (hurried <= HURRIED_MAX * len(between) and (started or _varies(delays)) and _as_lines(turns)
            and not _confirms_state(turns) and not _polls(turns) and not _stands(turns)
            and not _in_turn(turns, clear=clear, prompts=prompts))


def _as_lines(turns: Turns) -> bool:
    """Return whether what the far side says is as long as lines that people type, and little else.

    Few lines are as long as any one (SSH inside rounds up), and three of four are little longer than the shortest.
    """
    questions = sorted(turn.question for turn in turns)
    size = len(questions)
    alone = [turn.more <= turn.question for turn in turns if turn.more is not None]
    return (Counter(questions).most_common(1)[0][1] <= max(SAME_LINES_MIN, SAME_LINES_SHARE * size)
            and questions[3 * size // 4] - questions[0] <= LINE_BYTES
            and sum(alone) >= MOSTLY * len(alone))


def _varies(delays: list[int]) -> bool:
    """Return whether answers took different times: not one that was held up by chance, but the middle half of them."""
    tenth, quarter = len(delays) // 10, len(delays) // 4
    return (delays[-1 - tenth] >= WORK_SPREAD_MIN * delays[tenth]
            and delays[-1 - quarter] >= MIDDLE_SPREAD_MIN * delays[quarter])


def _polls(turns: Turns) -> bool:
    """Return whether what the far side says most often comes by the clock where nothing was said in between.

    So comes the empty answer to a long poll, for which this host has the next question ready: that takes no work.
    """
    usual, _ = usual_pair(turns)
    same = [turn for turn in turns if (turn.question, turn.answer) == usual]
    empty = [turn.gap_ns for turn in same if turn.gap_ns is not None and turn.more == 0]
    delays = sorted(turn.delay_ns for turn in same)
    return len(empty) >= POLLS_MIN and variation(empty) < CLOCKWORK_MAX and not _varies(delays)


def _stands(turns: Turns) -> bool:
    """Return whether what this host had said last was always of one length: a request that it has open."""
    before = [turn.before for turn in turns if turn.before]
    alike = _most_alike(before)
    return len(before) >= STANDING_MIN and alike >= min(len(before) - 1, STANDING_SHARE * len(before))


def _in_turn(turns: Turns, *, clear: bool, prompts: bool) -> bool:
    """Return whether this host says one thing at a time, as clients and callbacks do, and the words are no shell's.

    A shell's prompt, or more output, follows what it answers at once; one without a prompt is told by lines of several
    lengths, short enough to be typed. Where connections are summed up, and over UDP, it is not told: whoever is asked
    there answers each question once, and what it says beside that, of its own, leaves most of its answers alone.
    """
    known = [turn.in_turn for turn in turns if turn.in_turn is not None]
    questions = sorted(turn.question for turn in turns)
    confirmed = _most_alike(questions, CONFIRMATION_BYTES) >= MOSTLY * len(questions)
    called = clear and questions[len(questions) // 2] >= CALL_BYTES_MIN
    if prompts:
        return sum(known) >= MOSTLY * len(known)
    return sum(known) >= IN_TURN_SHARE * len(known) and (confirmed or called)


def _polls_on(turns: Turns) -> bool:
    """Return whether after other answers than the usual one there stands what always does: the next poll.

    Before the next key stands what the last one had printed, be it an echo or something else.
    """
    (_, usual), _ = usual_pair(turns)
    standing = Counter(turn.before for turn in turns).most_common(1)[0][0]
    others = [after.before for turn, after in itertools.pairwise(turns)
              if after.gap_ns is not None and abs(turn.answer - usual) > ALIKE_BYTES]
    next_polls = alike(others, standing) if standing else 0
    return len(others) >= POLLS_MIN and next_polls >= STANDING_SHARE * len(others)


def confirms(turns: Turns) -> bool:
    """Return whether the far side says one thing more after each answer, of one length, shorter than its questions."""
    more = [turn.more for turn in turns if turn.more is not None]
    usual, count = Counter(more).most_common(1)[0] if more else (0, 0)
    same = alike(more, usual) if usual > 0 else 0
    questions = sorted(turn.question for turn in turns)
    return count > 0 and same >= CONFIRMED_SHARE * len(more) and usual < questions[len(questions) // 2]


def acknowledges(turns: Turns) -> bool:
    """Return whether all sorts of questions get nearly one and the same answer: a protocol's acknowledgement."""
    questions = [turn.question for turn in turns]
    answers = [turn.answer for turn in turns]
    size = len(turns)
    return _most_alike(answers) >= ACKNOWLEDGED_SHARE * size and _most_alike(questions) <= MOSTLY * size


def _most_alike(sizes: Sequence[int], within: int = ALIKE_BYTES) -> int:
    """Return how many of the sizes are nearly one of them, at most."""
    ordered = sorted(sizes)
    return max((bisect_right(ordered, one + within) - bisect_left(ordered, one - within) for one in set(sizes)),
               default=0)


def alike(sizes: Iterable[int], usual: int) -> int:
    """Return how many of the sizes are nearly the usual one."""
    return sum(abs(one - usual) <= ALIKE_BYTES for one in sizes)
