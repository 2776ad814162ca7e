"""Who asks on an SSH connection whose far side was given a port into this host: somebody at a shell, or nobody.

Read from the order of its encrypted segments. `reverse_shell` goes by who breaks a silence, and there is none where the
connection has a shell of its own that is typed in at the same time, or where keystroke chaff sends a record each 20 ms
(ObscureKeystrokeTiming, ssh_config(5)). Here a segment of the far side's is a question that this host's next one
answers if it comes at once: sooner than a loaded host takes, and much sooner than this side's own pace explains. The
latter tells an echo from the next record of this side's chaff, whatever the round trip is.

Two things are a shell's. Keys: questions of one size that are mostly answered by one of nearly the same, as an echo is.
Lines: small questions as far apart as it takes to type one. What is no answer, and what keeps it out:

- the echo of what this side typed, after which it types on: seldom at once;
- messages that this side sends after whatever comes (Go opens its window again after each read, x/crypto/ssh): it says
  as much to its own echoes, so that others of that size stand alone;
- the far side's keepalives (ClientAliveInterval, sshd_config(5)), which have one length, as their answers have;
- the opening of channels, one for each request of a page: neither the opening nor the end is a line, nor is a channel's
  first question, which every protocol has;
- pages and files: their questions are longer than a line.

A database used by hand through the tunnel looks the same. The tunnel was named before any of this is looked at.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from gpuguard.core.turns import AT_ONCE_NS, LINE_GAP_NS, NO_PROGRAM_NS

if TYPE_CHECKING:
    from collections.abc import Collection

#: An answer comes at once, and within this part of the time for which this side was silent before it was asked: by
#: chance, one in four.
PACE_FACTOR = 4
#: Nobody types faster, nor does chaff come sooner; what follows within is more of the same question.
KEY_GAP_NS = 10_000_000

KEYS_MIN = 5
#: Of all questions of that size so many are answered so; of this side's messages of the answer's size at most a third
#: of the answers stand alone.
ECHOED_SHARE = 0.6
UNASKED_FACTOR = 3
#: An echo costs what the key did, but for a block of padding, or another cipher that way.
ECHO_BYTES = 16

LINES_MIN = 3
LINE_BYTES_MAX = 256
TURNS_MAX = 64


class Visitor:
    """Questions and answers of one connection.

    ``rtt_ns`` is the shortest that was seen; ``confirm`` what the message costs by which this host opens a channel,
    ``no_lines`` what the far side's keepalives and the ends of channels cost, and their answers.
    """

    def __init__(self, rtt_ns: int, confirm: int, no_lines: Collection[tuple[int, int]]) -> None:
        self._rtt_ns = rtt_ns
        self._confirm = confirm
        self._no_lines = no_lines
        self._near_ns = 0
        self._question: tuple[int, int] | None = None
        #: (question, answer) in bytes, 0 where there was none.
        self._turns: deque[tuple[int, int]] = deque(maxlen=TURNS_MAX)
        self._key_ns = 0
        self._line_ns = 0
        self._lines = 0
        self._first = True

    def far(self, time_ns: int, size: int) -> None:
        """Take in a segment of the far side's."""
        if self._question is not None:
            self._turns.append((self._question[1], 0))
        self._question = (time_ns, size)

    def near(self, time_ns: int, size: int) -> str:
        """Take in a segment of this host's; return what was asked by then, "" where that may be anything."""
        silent_since_ns, self._near_ns = self._near_ns, time_ns
        if self._question is None:
            self._turns.append((0, size))
            return ""
        (asked_ns, asked), self._question = self._question, None
        silent_ns = asked_ns - silent_since_ns
        if not NO_PROGRAM_NS <= time_ns - asked_ns <= min(AT_ONCE_NS, silent_ns // PACE_FACTOR):
            self._turns += (asked, 0), (0, size)
            return ""
        return self._key(asked_ns, asked, size) or self._line(asked_ns, asked, size, silent_ns)

    def _key(self, asked_ns: int, asked: int, size: int) -> str:
        apart, self._key_ns = asked_ns - self._key_ns, asked_ns
        if apart < KEY_GAP_NS or abs(asked - size) > ECHO_BYTES:
            return ""
        self._turns.append((asked, size))
        count = self._turns.count((asked, size))
        alike = sum(one == asked for one, _ in self._turns)
        unasked = self._turns.count((0, size))
        if count < max(KEYS_MIN, ECHOED_SHARE * alike, UNASKED_FACTOR * unasked):
            return ""
        return f"{count} keys of {asked} bytes echoed by {size}"

    def _line(self, asked_ns: int, asked: int, size: int, silent_ns: int) -> str:
        apart, self._line_ns = asked_ns - self._line_ns, asked_ns
        first, self._first = self._first, size == self._confirm
        # Whatever this side said last was answered by then; or it never says this of its own.
        of_its_own = silent_ns <= 2 * self._rtt_ns + AT_ONCE_NS and (0, size) in self._turns
        typed = apart >= LINE_GAP_NS and asked <= LINE_BYTES_MAX and (asked, size) not in self._no_lines
        if first or self._first or of_its_own or not typed:
            return ""
        self._lines += 1
        return f"{self._lines} lines, {asked} bytes the last," if self._lines >= LINES_MIN else ""
