"""What the server answers before a channel is open, and what else it says there of its own accord.

A segment may hold several records. Its size is split into the answers that may stand there; OpenSSH's server also tells
of a key's options (DEBUG) and of its host keys, and TCP may join any of that with an answer. A segment is split beside
such a message only if that was said before, and no other split fits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gpuguard.core.ssh.asked import Asked, forwards, forwards_in, in_doubt, may_answer
from gpuguard.core.ssh.incoming import OPEN
from gpuguard.core.ssh.onwards import is_jump, jump, local
from gpuguard.core.ssh.request import REQUEST_FAMILIAR_NATS, REQUEST_NATS, USE
from gpuguard.core.ssh.uses import SPOTS

if TYPE_CHECKING:
    from gpuguard.core.ssh.connection import Seen, Terms
    from gpuguard.core.ssh.global_requests import GlobalRequests
    from gpuguard.core.ssh.host_keys import KeyRecords
    from gpuguard.core.ssh.line import Segment
    from gpuguard.core.ssh.uses import Use

# A request for a forward is answered by a message of at most three bytes while no channel is open. Whatever else could
# have had its size (an open of a session, a forward, a tun device) is answered by a confirmation or a failure, which
# are longer: only a global request is answered so. What is left is a private request that wants an answer, or records
# misread after a loss that fit twice by chance (1/20 * 1/20) in a session that H0 itself makes rare (1e-3): 2e-6.
ANSWERED_NATS = 13.0
# An answer beside a record of a length that the server said before, and no other answer fits beside one. OpenSSH's
# server says what it tells of a key twice; in one login of 20 the second differs, and then by just this in one of 20.
ANSWERED_BESIDE_NATS = 6.0
# Several answers in one segment cost what another record may cost: one segment in five has such, one in 20 of this
# size. That a channel was confirmed among them is sure when the client goes on, unless that was within a segment that
# was not read (1/20).
ANSWERED_SUM_NATS = 4.6
ANSWERED_SUM_UNREAD_NATS = 3.0
# The open of a tun device was confirmed by a record of that size: by chance 1/20.
TUN_CONFIRMED_NATS = 3.0

#: For so long something that was asked may wait.
_ASKED_NS = 30_000_000_000
_CHATTER_MAX = 12


class Answering:
    """The server's segments of the opening; ``keys`` is what it may say of its host keys."""

    def __init__(self, terms: Terms, seen: Seen, requests: GlobalRequests, keys: KeyRecords) -> None:
        self._terms = terms
        self._seen = seen
        self._requests = requests
        self._announced = keys.announced
        self._proofs = keys.proofs
        #: What answers the client that asked for proofs.
        self._proved: frozenset[int] = frozenset()
        self._heard_keys = False
        #: Lengths of what the server said of its own accord.
        self._chatter: set[int] = set()

    def about_keys(self, seg: Segment) -> bool:
        """Return whether this is about the host keys and nothing else: a client may ask at once to have them proved."""
        if seg.from_client:
            return self._asks_for_proofs(seg.size)
        if seg.size in self._proved:
            self._proved = frozenset()
            return True
        if seg.size not in self._announced or self._heard_keys or self._seen.requests:
            return False
        confirm = self._terms.sizes.confirm
        if any(seg.size - confirm - one in self._announced for one in (0, *self._chatter)):
            return False
        self._heard_keys = True
        if not self._terms.peers.openssh_client:
            # Others wait for answers: to one that goes on now this was fewer keys, and a confirmation beside them.
            self._seen.line.unread = max(self._seen.line.unread, seg.size)
        return True

    def _asks_for_proofs(self, size: int) -> bool:
        if size not in self._proofs or self._seen.requests or not self._heard_keys or not self._seen.asked:
            return False
        self._proved = self._proofs[size]
        self._proofs = {}
        self._chatter |= self._proved
        self._seen.request.doubted |= in_doubt(self._seen.asked, self._seen.line.unread, self._terms.sizes)
        return True

    def segment(self, seg: Segment) -> list[Use]:
        """Take in what the server said while no channel was open."""
        seen, sizes, request = self._seen, self._terms.sizes, self._seen.request
        replies, confirmed = (0, False) if seg.size in self._chatter else self._split(seg.size)
        beside = not replies and not confirmed and seg.size != sizes.reply
        if beside:
            replies, confirmed = self._split_beside(seg.size)
        uses: list[Use] = []
        if confirmed and not replies and request.beside and not may_answer(2, seen.asked, sizes):
            uses += request.take_back()
        asked = [one for one in seen.asked if seg.time_ns - one.time_ns < _ASKED_NS]
        if replies and asked and not request.answered and not seen.line.owes(seg.time_ns):
            request.beside |= beside
            uses += self._forward_answered(seg, asked, replies, confirmed=confirmed, beside=beside)
            if not beside:
                seen.line.unread = 0
        if replies == 0 and seg.size == sizes.reply:
            uses += self._requests.answered(seg) or self._requests.padded(seg, asked)
        if confirmed and asked and OPEN not in seen.told:
            uses += self._opened(seg, asked, answered=replies)
        return uses

    def before_a_command(self, seg: Segment) -> list[Use]:
        """Say a request that was answered on a session that was opened ahead of it, before a command was asked for."""
        if self._seen.requests or seg.from_client:
            return []
        seen, sizes, peers = self._seen, self._terms.sizes, self._terms.peers
        if not seg.whole or not sizes.exact or not peers.gathers:
            return []
        both = any(one.size - session in sizes.forward for one in seen.asked for session in sizes.session)
        if not both or not seg.size == sizes.reply < sizes.key_echo:
            return []
        return self._forward_answered(seg, seen.asked, 1)

    # -- what a segment holds -----------------------------------------------------------------------------------------

    def _split(self, size: int) -> tuple[int, bool]:
        """Return (answers to global requests, whether a channel was confirmed) that a server's segment holds.

        There are at most as many answers as there were requests: other messages can be multiples of them too.
        """
        sizes, asked = self._terms.sizes, self._seen.asked
        answers_max = self._answers_max()
        if answers_max and not sizes.exact and size == sizes.reply and asked[0].size not in sizes.openings:
            # Compressed, a confirmation may cost as much; requests are answered in their order.
            return 1, False
        sums = {0}
        for answers in range(answers_max + 1):
            if any(size - one in sizes.confirms for one in sums) and may_answer(answers + 1, asked, sizes):
                return answers, True
            if answers and size == answers * sizes.reply:
                return answers, False
            sums = {one + reply for one in sums for reply in sizes.replies}
        # Port 0 asked for: the answer carries the port. Or an IGNORE, where this server sends such.
        with_port = size == sizes.reply_port and USE in self._seen.told and not self._terms.peers.server_ignores
        return (1, False) if answers_max and with_port else (0, False)

    def _split_beside(self, size: int) -> tuple[int, bool]:
        """Read a segment that holds, beside its answers, what the server had said before; nothing if that is unsure."""
        sizes, asked, line = self._terms.sizes, self._seen.asked, self._seen.line
        if not sizes.exact:
            return 0, False
        fits = [(answers, confirmed) for answers in range(self._answers_max() + 1) for confirmed in (False, True)
                if (answers or confirmed) and may_answer(answers + confirmed, asked, sizes)
                and size - answers * sizes.reply - confirmed * sizes.confirm in self._chatter]
        if asked and len(fits) == 1:
            if not fits[0][1]:
                line.unread = max(line.unread, size)
            return fits[0]
        line.unread = max(line.unread, size)
        told = {one for one in (size, *(size - keys for keys in self._announced)) if one > sizes.confirm}
        self._heard_keys |= len(told) > 1
        if len(self._chatter) < _CHATTER_MAX:
            self._chatter |= told
        return 0, False

    def _answers_max(self) -> int:
        asked, sizes, peers = self._seen.asked, self._terms.sizes, self._terms.peers
        return sum(forwards_in(one, asked, sizes, peers) for one in forwards(asked, sizes, peers))

    # -- what it means ------------------------------------------------------------------------------------------------

    def _forward_answered(self, seg: Segment, asked: list[Asked], replies: int, *,
                          confirmed: bool = False, beside: bool = False) -> list[Use]:
        """A global request was answered, and no channel is open: a forward was asked for."""
        sizes, peers, request = self._terms.sizes, self._terms.peers, self._seen.request
        opening = [one for one in forwards(self._seen.asked, sizes, peers) if one in asked]
        # no-more-sessions wants no answer: alone it explains none. OpenSSH sends it to OpenSSH only.
        both = peers.openssh_client and peers.openssh_server
        if not opening or (both and len(opening) == 1 and opening[0].size == sizes.no_more):
            return []
        # A confirmation that was missed would have ended the time in which nothing else is answered so.
        if not seg.whole:
            return []
        request.answered = not peers.stranger and not beside
        known = USE in self._seen.told
        if not sizes.exact and (sizes.reply in sizes.confirms or (not known and seg.size != replies * sizes.reply)):
            # Compressed, an answer may cost what a confirmation costs, and both what two other messages cost.
            return []
        nats = ANSWERED_NATS if known else REQUEST_NATS + ANSWERED_NATS
        if not sizes.exact and not known:
            nats /= 2
        request.weak = request.nats < REQUEST_NATS and (beside or confirmed or replies > 1)
        if beside:
            nats = ANSWERED_BESIDE_NATS
        elif confirmed or replies > 1:
            due = ANSWERED_SUM_UNREAD_NATS if self._seen.line.unread else nats - ANSWERED_SUM_NATS
            request.due = due if confirmed else 0.0
            nats = ANSWERED_SUM_NATS
        one_bytes = sizes.reply if seg.size != sizes.reply_port else seg.size
        text = (f"{'the' if known else 'a'} request of {opening[0].size} bytes was answered by {replies} record(s) of "
                f"{one_bytes} bytes with no channel open: tcpip-forward")
        return request.say(nats, text)

    def _opened(self, seg: Segment, asked: list[Asked], *, answered: int) -> list[Use]:
        """The first channel is open; whose, follows from what was asked."""
        terms, seen, sizes = self._terms, self._seen, self._terms.sizes
        seen.channel = True
        seen.session = self._is_session(asked)
        if seen.line.owed_ns is not None and seen.line.owed_ns <= asked[-1].time_ns:
            # It was this open; or a keepalive that was answered before it, for that is the order of answers.
            seen.line.owed_ns = None
        seen.bytes_before = seg.total
        if seen.tun and not answered and not seen.request.nats and not terms.guessed:
            text = (f"the first record after the login has {asked[0].size} bytes, as the open of a network device has "
                    "in this cipher suite and no other open, and a channel was confirmed")
            seen.session = False
            return [seen.told.say("ssh-tun", REQUEST_FAMILIAR_NATS + TUN_CONFIRMED_NATS, text, SPOTS)]
        if seen.session:
            return []
        if is_jump(asked[0], terms, seen, answered=answered) and asked[-1].opening:
            return jump(asked[0], seen)
        return local(asked[-1].size, terms, seen) if asked[-1].size in sizes.direct else []

    def _is_session(self, asked: list[Asked]) -> bool:
        """Session, no-more-sessions and forward cost the same in some suites; what was asked last was confirmed."""
        sizes, peers = self._terms.sizes, self._terms.peers
        adds = {0, *sizes.forward} if peers.gathers or peers.stranger or not sizes.exact else {0}
        last = asked[-1]
        return last.size in sizes.session or (last.opening and any(
            one.size - add in sizes.opens_session for one in asked if one.opening for add in adds))
