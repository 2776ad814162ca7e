"""What the client asks for before a channel is open: the first segments after the login."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gpuguard.core.ssh.asked import ASKED_MAX, Asked, forwards_in, in_doubt
from gpuguard.core.ssh.connection import OPENING_NS
from gpuguard.core.ssh.incoming import OPEN
from gpuguard.core.ssh.onwards import is_jump, jump
from gpuguard.core.ssh.request import (
    REQUEST_DOUBTED_OPENSSH_NATS,
    REQUEST_FAMILIAR_NATS,
    REQUEST_GATHERED_NATS,
    REQUEST_NATS,
)
from gpuguard.core.ssh.uses import NAME_NATS

if TYPE_CHECKING:
    from collections.abc import Callable

    from gpuguard.core.ssh.connection import Seen, Terms
    from gpuguard.core.ssh.line import Segment
    from gpuguard.core.ssh.uses import Use

# OpenSSH writes a request for a forward out at once and queues opens until no-more-sessions is queued too: seen apart,
# another record of known size in its place (1/20). Where the first has the size of an open too, that the two were cut
# apart by TCP (one in a thousand: both fit any window).
PARTED_NATS = 3.0
PARTED_OPEN_NATS = 6.9
# Where the first costs what no-more-sessions does, and the second what an open onwards to a long name does (1/50), it
# may be a local port (-N -L) that was dialled as soon as it was there (1/200).
PARTED_ONWARDS_NATS = 9.2
# Where a keepalive costs what no-more-sessions costs, only the pace of one loop in one process tells them apart.
_ONE_GO_ALIKE_NS = 5_000_000


class Asking:
    """The client's segments of the opening; ``run`` takes one that goes on in a channel that was opened unread."""

    def __init__(self, terms: Terms, seen: Seen, run: Callable[[Segment], list[Use]]) -> None:
        self._terms = terms
        self._seen = seen
        self._run = run
        #: A keepalive came that may have been the opening.
        self._early = False
        #: The client's last word was an IGNORE.
        self._announced = False

    def segment(self, seg: Segment) -> list[Use]:
        """Take in what the client sent, and say what the opening tells by now."""
        terms, seen, sizes = self._terms, self._seen, self._terms.sizes
        seen.request.doubted |= in_doubt(seen.asked, seen.line.unread, sizes)
        ignored = seg.size == sizes.ignore and terms.peers.client_ignores
        announced, self._announced = self._announced, ignored
        if OPEN in seen.told or ignored:
            return []
        if seen.asked and terms.peers.client_announces and sizes.exact and seg.whole and not announced:
            # DISCONNECT, or a new key exchange.
            return []
        first = not seen.asked and not self._early
        least_ns = terms.go_ns() if first and seg.size == sizes.keepalive else OPENING_NS - 1
        early = seg.time_ns - terms.since_ns <= least_ns
        if seg.size == sizes.keepalive and not early:
            return self._keepalive(seg)
        if seen.asked and (self._session_began(seg) or self._went_on(seg)):
            return seen.request.take_back() + self._run(seg)
        # What does not follow at once follows an answer: had forwards been asked for, that was read.
        late = (bool(seen.asked) and seg.time_ns - seen.asked[-1].time_ns > terms.go_ns()
                and not seen.request.answered)
        onwards = seen.asked and is_jump(seen.asked[0], terms, seen, answered=0 if late else None)
        if onwards and seg.size != sizes.no_more and not seen.request.nats:
            seen.channel = True
            return jump(seen.asked[0], seen)
        return self._opening(seg, first=first, early=early)

    def _keepalive(self, seg: Segment) -> list[Use]:
        seen, sizes = self._seen, self._terms.sizes
        # On a busy client it may have been the opening all the same: what follows is then not the first record.
        seen.line.owed_ns = seg.time_ns
        self._early |= seg.time_ns - self._terms.since_ns < OPENING_NS
        if seg.size in sizes.session and len(seen.asked) < ASKED_MAX:
            # ... or it opened a session: the answer tells.
            seen.asked.append(Asked(seg.time_ns, seg.size, opening=False))
        only = {sizes.no_more, sizes.keepalive}
        if seen.asked and seen.asked[0].size == sizes.no_more and all(one.size in only for one in seen.asked):
            return seen.told.once("ssh-local-forward", NAME_NATS, "a session without a channel, held open (-N), and no "
                                  "port of the far side asked for")
        return []

    def _opening(self, seg: Segment, *, first: bool, early: bool) -> list[Use]:
        """Take in a segment that may be of the opening: ``first`` of all, ``early`` enough after the login."""
        seen, sizes, peers = self._seen, self._terms.sizes, self._terms.peers
        before = seen.asked[-1] if seen.asked else None
        # What is missing may be the session's open, or its confirmation: then this is not what follows the login.
        opening = (early if before is None else self._follows(seg, before)) and seg.whole
        if len(seen.asked) < ASKED_MAX:
            seen.asked.append(Asked(seg.time_ns, seg.size, opening))
        if seg.size == sizes.keepalive and not opening:
            seen.line.owed_ns = seg.time_ns
        follows = seg.size in sizes.no_more_next or seg.size in sizes.session_next
        if before is not None and opening and follows and not peers.gathers and all(
                forwards_in(one, seen.asked, sizes, peers) for one in seen.asked[:-1]):
            return self._parted(seen.asked[0], seg.size)
        # A tun device's open costs what a request for localhost costs in some suites: the answer tells.
        seen.tun |= first and opening and seg.size in sizes.tun and peers.familiar and not peers.gathers
        return self._first(seg) if first and opening else []

    def _follows(self, seg: Segment, before: Asked) -> bool:
        """Return whether this was written in one go with the segment before it, and is no keepalive."""
        sizes = self._terms.sizes
        go_ns = _ONE_GO_ALIKE_NS if seg.size == sizes.no_more == sizes.keepalive else self._terms.go_ns()
        apart = before.size == sizes.no_more and seg.size == sizes.keepalive != sizes.no_more
        return before.opening and seg.time_ns - before.time_ns <= go_ns and not apart

    def _first(self, seg: Segment) -> list[Use]:
        """Say whether the first record after the login asks for a port."""
        terms, sizes, peers = self._terms, self._terms.sizes, self._terms.peers
        text = f"the first record after the login has {seg.size} bytes, as tcpip-forward "
        at_once = seg.time_ns - terms.since_ns <= terms.go_ns()
        if at_once and peers.gathers and seg.size in sizes.gathered:
            return self._seen.request.say(REQUEST_GATHERED_NATS, text + "with what follows it has in this cipher "
                                          "suite, and no other opening")
        # Libraries may open a connection onwards first, which costs as much: the answer tells then.
        if seg.size in sizes.forward_only and (peers.familiar or seg.size not in sizes.direct):
            return self._seen.request.say(REQUEST_FAMILIAR_NATS if peers.familiar else REQUEST_NATS,
                                          text + "has in this cipher suite and no other opening")
        return []

    def _parted(self, first: Asked, size: int) -> list[Use]:
        """What came first was written out before the session's open or no-more-sessions was thought of.

        OpenSSH does so with requests for forwards only; opens are written together with no-more-sessions, and it opens
        one session at most.
        """
        sizes, request = self._terms.sizes, self._seen.request
        fits = first.size in sizes.forward or first.size in sizes.forward_path
        if not fits or not self._terms.peers.familiar:
            return []
        if request.doubted:
            return request.say(REQUEST_DOUBTED_OPENSSH_NATS, f"a first record of {first.size} bytes was written out "
                               "before the next, as a request for a forward is; or it was an open, confirmed within "
                               "what was not read")
        opened = size in sizes.session_next
        alone = (opened or first.size not in sizes.session) and first.size not in sizes.direct
        if not sizes.exact:
            alone = first.size not in sizes.openings
        if opened and sizes.exact and first.size == sizes.no_more and size in sizes.direct:
            nats = PARTED_ONWARDS_NATS
        elif alone and request.nats == 0.0:
            nats = REQUEST_FAMILIAR_NATS + PARTED_NATS
        elif alone:
            nats = PARTED_NATS
        else:
            nats = PARTED_OPEN_NATS
        text = (f"a first record of {first.size} bytes was written out before "
                f"{'a session was opened' if opened else 'no-more-sessions'}, as a request for a forward is and an "
                "open is not")
        return request.say(nats, text)

    # -- what was opened unread ---------------------------------------------------------------------------------------

    def _session_began(self, seg: Segment) -> bool:
        """The confirmation was missed, among other messages in one segment, if the client goes on after its open.

        Nothing but no-more-sessions follows a session open before that, and no forward follows no-more-sessions.
        """
        seen, sizes, last = self._seen, self._terms.sizes, self._seen.asked[-1]
        alone = last.size in sizes.session and last.size != sizes.no_more
        whole = last.size - sizes.no_more in sizes.session
        in_one_go = seg.time_ns - last.time_ns <= self._terms.go_ns()
        going_on = in_one_go and (seg.size in sizes.opens_session or seg.size == sizes.no_more)
        began = (whole or (alone and not going_on)) and seen.line.heard >= sizes.confirm
        if began:
            seen.channel = seen.session = True
        return began

    def _went_on(self, seg: Segment) -> bool:
        """Return whether a client that waits goes on, and what it opened may have been confirmed unread.

        Sessions are opened thousands of times for each port that is asked for: where both fit, it was a session.
        """
        seen, sizes, peers, last = self._seen, self._terms.sizes, self._terms.peers, self._seen.asked[-1]
        if not sizes.exact or seen.line.unread < sizes.confirm or seen.request.answered:
            return False
        in_one_go = seg.time_ns - last.time_ns <= self._terms.go_ns()
        if peers.familiar and (not peers.gathers or (in_one_go and seg.size in sizes.with_forward)):
            return False
        seen.session = last.size in sizes.session
        seen.channel = seen.session or last.size in sizes.direct
        return seen.channel
