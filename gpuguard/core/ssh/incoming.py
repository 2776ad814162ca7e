"""Channels that the far side opens into this host (forwarded-tcpip, RFC 4254 section 7.2), and who asks through them.

The open comes from the server first, the client confirms, and in the end both close.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gpuguard.core.ssh.connection import OPENING_NS
from gpuguard.core.ssh.global_requests import LATER_ALIKE_NATS
from gpuguard.core.ssh.request import USE
from gpuguard.core.ssh.uses import SPOTS
from gpuguard.core.ssh.visitor import Visitor

if TYPE_CHECKING:
    from gpuguard.core.ssh.connection import Seen, Terms
    from gpuguard.core.ssh.line import Segment
    from gpuguard.core.ssh.uses import Use

OPEN = "ssh-reverse-channel-open"
ASKED = "ssh-reverse-channel-asked"
ENDED = "ssh-reverse-channel-ended"

# The far side opens a channel and this side confirms. Without a session channel nothing else is that long from the
# server first and that short in return; X11 and agent opens need a session and are shorter. By chance 1/20 * 1/20 * 1/8
# (server first).
CHANNEL_OPEN_NATS = 8.0
# Beside a terminal where a request may have been made: by chance the far side breaks a silence with a prompt of that
# length, and the client sends a cursor key, or the terminal's answer to a question, as soon as a program would. One
# session in fifty, those left out in which that was seen before any request may have been made: it happens again there.
LATER_OPEN_NATS = 4.0
# ... and it ended as a channel does, with messages that are too short for data, and no exit status: 1/50.
LATER_CLOSE_NATS = 4.0
# The same where no request was seen but the whole opening was: only the reading of the request can have failed.
UNASKED_OPEN_NATS = 7.0
# In none of some 700 tunnels of the lab that were used for something else, or not at all, was it seen, counted at the
# rule-of-three bound: a service used line by line is asked so too.
VISITED_NATS = 5.4

# A port of this host is connected to at once; with other channels on the line no more time than that is given.
_CONFIRMED_NS = 40_000_000
# Beside a terminal an open breaks a silence as long as this; and what comes so soon after the client's word was said at
# the same time.
_SILENCE_NS = 300_000_000
_QUIET_NS = 1_000_000

_VISITOR_SPOTS = ("a database or another service used line by line through the tunnel",)


class Incoming:
    """The far side's channels of one connection."""

    def __init__(self, terms: Terms, seen: Seen) -> None:
        self._terms = terms
        self._seen = seen
        sizes = terms.sizes
        no_lines = ((sizes.alive, sizes.ending), (2 * sizes.granted_each, sizes.ending))
        self._visitor = Visitor(terms.answer_ns, sizes.confirm_client, no_lines)
        #: When the server said what may be an open, and how long that was.
        self._open_ns: int | None = None
        self._open_size = 0
        #: This side confirmed something before any request may have been made; and one beside a terminal.
        self._answers_at_once = False
        self._opened_later = False

    def segment(self, seg: Segment) -> list[Use]:
        """Say what is opened, and that somebody asks through it."""
        if self._terms.swapped:
            return []
        if not seg.from_client:
            return self._offered(seg) + self._visited(seg)
        return self._confirmed(seg) + self._ended(seg) + self._visited(seg)

    def closed(self, seg: Segment) -> list[Use]:
        """The channel that may have been opened beside a terminal came to its end, and the session did not."""
        if not self._opened_later or not seg.from_client:
            return []
        sizes, line = self._terms.sizes, self._seen.line
        short = sizes.key_echo > sizes.reply_port == line.server[1]
        if not short or line.kept_alive or seg.size not in (sizes.ending, 2 * sizes.ending):
            return []
        self._opened_later = False
        self._seen.request.answered = True
        text = (f"the channel was closed by {line.server[1]} bytes and {seg.size}, too short for data, and nothing "
                "told how a command ended")
        return [self._seen.told.say(OPEN, LATER_CLOSE_NATS, text)]

    def _offered(self, seg: Segment) -> list[Use]:
        sizes = self._terms.sizes
        fits = seg.size in sizes.forwarded or not sizes.exact
        # Host keys and banners come within the opening; a forwarded channel comes after the request was answered.
        ready = self._seen.request.answered or seg.time_ns - self._terms.since_ns > OPENING_NS
        self._open_ns = seg.time_ns if fits and ready and self._unasked(seg.time_ns) else None
        self._open_size = seg.size
        return []

    def _unasked(self, time_ns: int) -> bool:
        """Return whether the server begins by itself now.

        Beside a terminal where a request is not certain, it has to break a silence.
        """
        line = self._seen.line
        quiet = time_ns - line.client[0] > _QUIET_NS
        if self._seen.request.answered or not self._seen.session:
            return quiet
        silence_ns = time_ns - max(line.client[0], line.server[0])
        return quiet and silence_ns > _SILENCE_NS and not self._answers_at_once

    def _confirmed(self, seg: Segment) -> list[Use]:
        seen, sizes, peers = self._seen, self._terms.sizes, self._terms.peers
        if seg.size == sizes.ignore and peers.client_ignores:
            return []
        waiting, self._open_ns = self._open_ns, None
        if waiting is None or seg.size != sizes.confirm_client:
            return []
        if seen.session and seg.time_ns - waiting > _CONFIRMED_NS + self._terms.turnaround_ns:
            return []
        if seen.session and not seen.requests and peers.familiar and seg.whole:
            # These clients ask for a shell or a command at once: what was confirmed was no session.
            seen.session = seen.channel = False
            text = (f"nothing was asked for on what was opened, and the far side opened a channel into this host "
                    f"({self._open_size} bytes)")
            return [seen.told.say(OPEN, UNASKED_OPEN_NATS, text, SPOTS)]
        asked = seen.request.answered or seen.request.possible
        self._answers_at_once |= seen.session and not asked
        if not asked and (USE in seen.told or seen.channel):
            return []
        nats = self._weight(asked=asked)
        if nats is None:
            return []
        text = (f"the far side opened a channel into this host ({self._open_size} bytes) and it was confirmed "
                f"({seg.size} bytes) {(seg.time_ns - waiting) / 1e6:.1f} ms later")
        return [seen.told.say(OPEN, nats, text, SPOTS)]

    def _ended(self, seg: Segment) -> list[Use]:
        """Say that a channel came to its end: to whoever listens for talk, that is none.

        The server says EOF and CLOSE, each as long as the answer to a request, and the client CLOSE. Where the client
        sends an EOF too, that may be a key and its echo.
        """
        sizes, told, (asked_ns, asked) = self._terms.sizes, self._seen.told, self._seen.line.server
        answers = OPEN in told and sizes.exact and asked_ns > self._seen.line.client[0]
        if not answers or (asked, seg.size) != (2 * sizes.granted_each, sizes.ending):
            return []
        return [told.say(ENDED, 0.0, f"a channel came to its end ({asked} bytes, and {seg.size})")]

    def _weight(self, *, asked: bool) -> float | None:
        """Return what a channel weighs that was opened now, None where it may be anything."""
        seen, request = self._seen, self._seen.request
        nats = CHANNEL_OPEN_NATS if asked else UNASKED_OPEN_NATS
        if seen.session and not request.answered:
            nats = LATER_OPEN_NATS
            self._opened_later = not request.nats
        if request.doubted or request.weak:
            nats = min(nats, LATER_OPEN_NATS)
        if not self._terms.sizes.exact:
            # Compressed, a key and its echo may cost as much: the first is believed, that follows the request.
            if not asked or OPEN in seen.told:
                return None
            nats /= 2
        return 0.0 if OPEN in seen.told else nats

    def _visited(self, seg: Segment) -> list[Use]:
        """Somebody asks through the port that the far side was given, and this host answers."""
        seen, terms = self._seen, self._terms
        if seen.request.nats <= LATER_ALIKE_NATS and (self._opened_later or OPEN not in seen.told):
            return []
        ignored = seg.size == terms.sizes.ignore and terms.peers.ignores(from_client=seg.from_client)
        if ignored or terms.answer_ns >= OPENING_NS or ASKED in seen.told:
            return []
        if not seg.from_client:
            self._visitor.far(seg.time_ns, seg.size)
            return []
        what = self._visitor.near(seg.time_ns, seg.size)
        text = f"the far side asked through the tunnel and this host answered at once: {what} by now"
        return [seen.told.say(ASKED, VISITED_NATS, text, _VISITOR_SPOTS)] if what else []
