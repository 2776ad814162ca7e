"""Global requests on a connection that is in use: a port asked for in mid-session (`ssh -O forward`), and keepalives.

The answer to a global request (RFC 4254 section 4) is shorter than any data can be in suites with 8-byte blocks, and
elsewhere where no data may flow. What else is as short, and is kept apart: the end of a record that TCP cut, NEWKEYS at
the end of a later key exchange, and the end of a channel, by what the client says to it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from gpuguard.core.ssh.asked import Asked
    from gpuguard.core.ssh.connection import Seen, Terms
    from gpuguard.core.ssh.line import Segment
    from gpuguard.core.ssh.uses import Use

# A forward on a running session (`ssh -O forward`): the size may be typed data, the answer of three bytes or less may
# not (channel data costs more in 8-byte suites), keepalives are of another size. The rest as for the first request of a
# session, without "first".
LATER_REQUEST_NATS = 10.0
# In AEAD and encrypt-then-MAC suites with 16-byte blocks that answer is as long as two typed bytes' echo. What a person
# pastes is echoed at its length, but for passwords: one session with a terminal in twenty has that, and as often again.
LATER_ALIKE_NATS = 3.0
# Where a request costs what a keepalive costs, and nothing but the pace tells: the line was silent for longer than
# before it, by more than the second that OpenSSH's clock is coarse, and no keepalive was due then. But a client that
# was held up (one session in a hundred, of the tenth that has keepalives).
LATER_OFF_BEAT_NATS = 7.0

#: What follows so much so soon, the least that TCP sends in one segment (RFC 1122, 4.2.2.6), may end a longer record.
_FULL_BYTES = 536
_CUT_NS = 500_000_000
_LATER_NS = 1_000_000_000
_COARSE_NS = 1_100_000_000


class _Answered(NamedTuple):
    """A request that was answered, and may have been something else: so long was the server silent before it."""

    waited_ns: int
    text: str


class GlobalRequests:
    """The answers to global requests of one connection after its opening."""

    def __init__(self, terms: Terms, seen: Seen) -> None:
        self._terms = terms
        self._seen = seen
        #: What was said of an answer that may have been the end of a channel.
        self._unsure_nats = 0.0
        #: What was a request or a keepalive; and how long the server was silent before the last that was answered.
        self._either: _Answered | None = None
        self._beat_ns: int | None = None

    def segment(self, seg: Segment) -> list[Use]:
        """Settle what the answers before left open."""
        uses = self._closed(seg) if self._unsure_nats and seg.from_client else []
        if self._either is not None:
            uses += self._outwaited(seg, self._either)
        return uses

    def answered(self, seg: Segment) -> list[Use]:
        """Say what an answer to a global request tells, which the server sent now."""
        terms, seen, sizes, request = self._terms, self._seen, self._terms.sizes, self._seen.request
        line = seen.line
        short = seen.channel and sizes.reply < sizes.reply_port
        when, size = line.asked if short else line.client
        if request.answered or not sizes.exact or size not in sizes.forward or seg.time_ns - when > _LATER_NS:
            return []
        if self._ends_longer(seg, short=short):
            return []
        # no-more-sessions is over by now, and another session is confirmed at greater length.
        # Without a channel, if none can have been opened unseen, even where a key's echo costs what an answer does.
        no_data = not seen.channel and seg.whole
        beside = seen.pty and not line.setting_up
        no_data_fits = no_data or (beside and sizes.key_echo > sizes.reply)
        keepalive = size == sizes.keepalive and terms.peers.awaits_keepalives
        if not (no_data or short or beside) or (keepalive and not (short or no_data_fits)):
            return []
        if not keepalive and line.owes(seg.time_ns):
            return []
        # The ends of both directions of a channel, which are answered by one, may cost as much too.
        if not no_data and not short and not (no_data_fits and size % sizes.ending and seg.whole):
            return self._may_be_data(size, say=not no_data_fits)
        text = f"on the running session a request of {size} bytes was answered by {sizes.reply} bytes: tcpip-forward"
        if keepalive:
            return self._may_be_keepalive(seg, text)
        request.answered = True
        uses = request.say(LATER_REQUEST_NATS, text)
        self._unsure_nats = 0.0 if short else sum(use.nats for use in uses)
        return uses

    def padded(self, seg: Segment, asked: list[Asked]) -> list[Use]:
        """However a request was padded, its answer was not; of these clients nothing else is answered so early."""
        seen, sizes, peers = self._seen, self._terms.sizes, self._terms.peers
        if not asked or not sizes.exact or seen.request.answered or peers.awaits_keepalives or not seg.whole:
            return []
        seen.request.answered = True
        return seen.request.say(LATER_REQUEST_NATS, f"a padded request of {asked[-1].size} bytes was answered by "
                                f"{sizes.reply} bytes with no channel open: tcpip-forward")

    # -- what it may be instead ---------------------------------------------------------------------------------------

    def _ends_longer(self, seg: Segment, *, short: bool) -> bool:
        """Return whether this may end a record that TCP cut, or a key exchange; or a channel, after its last words."""
        sizes, line = self._terms.sizes, self._seen.line
        cut = line.server[1] >= _FULL_BYTES and seg.time_ns - line.server[0] < _CUT_NS
        return cut or line.heard >= (sizes.key_exchange if short else 1)

    def _may_be_data(self, size: int, *, say: bool) -> list[Use]:
        request = self._seen.request
        again, request.possible = request.possible, True
        text = f"{size} bytes were answered by {self._terms.sizes.reply}, as tcpip-forward is, or a pasted password"
        return request.say(LATER_ALIKE_NATS, text) if say and not again else []

    def _may_be_keepalive(self, seg: Segment, text: str) -> list[Use]:
        """A keepalive comes after the same silence each time: one that comes sooner than a longer silence is none."""
        terms, request, waited_ns = self._terms, self._seen.request, self._seen.line.waited_ns
        beat_ns, self._beat_ns = self._beat_ns, waited_ns
        self._either = None
        request.possible = True
        beats = beat_ns is not None and abs(waited_ns - beat_ns) <= _COARSE_NS
        if beats or not terms.peers.counts_silence or not seg.whole:
            return []
        if self._seen.line.silence_ns > waited_ns + _COARSE_NS:
            return self._off_beat(text)
        self._either = _Answered(waited_ns, text)
        return []

    def _outwaited(self, seg: Segment, either: _Answered) -> list[Use]:
        """Say a request that was no keepalive, for the line was silent for longer since, and none came."""
        silence_ns = seg.time_ns - max(self._seen.line.client[0], self._seen.line.server[0])
        if silence_ns > either.waited_ns + _COARSE_NS and seg.whole:
            return self._off_beat(either.text)
        if seg.from_client and seg.size == self._terms.sizes.keepalive:
            self._either = None
        return []

    def _off_beat(self, text: str) -> list[Use]:
        self._either = None
        self._seen.request.answered = True
        text += ", and no keepalive, for none came in longer silences"
        return self._seen.request.say(LATER_OFF_BEAT_NATS, text)

    def _closed(self, seg: Segment) -> list[Use]:
        """Take back what was the end of a channel: the client closes it too, and this is its next word."""
        nats, self._unsure_nats = self._unsure_nats, 0.0
        sizes, line = self._terms.sizes, self._seen.line
        ends = seg.size in (sizes.ending, 2 * sizes.ending) and line.server[1] == sizes.reply
        if not ends or seg.time_ns - line.server[0] > _LATER_NS:
            return []
        self._seen.request.answered = False
        return self._seen.request.withdraw(nats, "the client closed a channel: that was not an answer, but its end")
