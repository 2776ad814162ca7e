"""The login, RFC 4252: refused attempts, and the one that the server accepts; how fast both sides answer.

USERAUTH_SUCCESS is one byte long; nothing else that a server says before it is shorter than 14.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gpuguard.core.ssh.connection import OPENING_NS

if TYPE_CHECKING:
    from gpuguard.core.ssh.key_exchange import Agreed
    from gpuguard.core.ssh.line import Segment
    from gpuguard.core.ssh.uses import Told, Use

# No use could be told where nobody was let in: enough for that name, and less than any use has.
NAME_REFUSED_NATS = 3.0

_HOSTKEYS_BYTES_MIN = 90


class Login:
    """The encrypted records up to the answer that lets the client in."""

    def __init__(self, agreed: Agreed, told: Told) -> None:
        self._sizes = agreed.sizes
        self._peers = agreed.peers
        self._told = told
        self._served = False
        #: The client's records, from its request for this service on, and the size of the last.
        self._attempts = int(agreed.guessed)
        self._attempt_bytes = 0
        self._failure_bytes = 0
        self._refusals = 0
        self._merged = False
        self._server_ns = self._client_ns = 0
        #: The shortest that the server took to answer, the longest that the client did.
        self.answer_ns = OPENING_NS
        self.turnaround_ns = 0
        self.accepted = False

    def segment(self, seg: Segment) -> list[Use]:
        """Take in what one side said; ``seg.whole``: nothing was missing so far.

        Where success was hidden in a segment, the client's next record tells: it is the first of the opening then.
        """
        self._pace(seg)
        sizes, peers = self._sizes, self._peers
        if seg.size == (sizes.ignore if seg.from_client else sizes.reply_port) and sizes.accepted != sizes.reply_port:
            if seg.from_client:
                peers.client_ignores = True
            else:
                peers.server_ignores = True
            return []
        if not seg.from_client:
            return self._answer(seg.size)
        self._attempts += 1
        self._attempt_bytes = seg.size
        opening = (seg.size == sizes.no_more or seg.size in sizes.forward_only
                   or seg.size - sizes.no_more in sizes.session)
        # Where a segment is missing, the answer may have been in it.
        if self._merged and opening and seg.whole:
            return self._accept()
        self._merged = False
        return []

    def _pace(self, seg: Segment) -> None:
        if not seg.from_client:
            if self._server_ns <= self._client_ns:
                self.answer_ns = min(self.answer_ns, seg.time_ns - self._client_ns)
            self._server_ns = seg.time_ns
        else:
            if self._server_ns:
                self.turnaround_ns = max(self.turnaround_ns, min(seg.time_ns - self._server_ns, OPENING_NS))
            self._client_ns = seg.time_ns

    def _answer(self, size: int) -> list[Use]:
        sizes, peers = self._sizes, self._peers
        if size == sizes.service and not self._served:
            # What the client sent until now was its EXT_INFO (RFC 8308) and its request for this service.
            self._served, self._attempts = True, 1
        confusable = peers.server_ignores and sizes.accepted == sizes.reply_port
        if self._attempts >= 2 and size == sizes.accepted and not confusable:
            return self._accept()
        # Nothing that short comes before the login was tried, but for an IGNORE: success cannot be told then.
        peers.server_ignores |= size == sizes.accepted and sizes.accepted == sizes.reply_port
        # Success and the host keys after it in one segment: only the client's next record can tell. To the first
        # attempt, which is mostly "none", an EXT_INFO or a banner may be answered as well, which are as long.
        self._merged = (self._attempts >= 3 or self._attempt_bytes > sizes.none_max
                        ) and size >= sizes.accepted + _HOSTKEYS_BYTES_MIN
        return self._refused(size)

    def _refused(self, size: int) -> list[Use]:
        """USERAUTH_FAILURE names what else may be tried, and is of one length throughout, RFC 4252 section 5.1.

        The first answers "none", by which a client asks for that list; an EXT_INFO may hide it. Keys and passwords make
        long requests, keyboard-interactive short ones, whose answers are prompts.
        """
        if not self._served or self._attempts < 2 or size not in self._sizes.failures:
            return []
        first = self._attempts == 2
        self._failure_bytes = self._failure_bytes or (size if self._attempts <= 3 else 0)
        if first or size != self._failure_bytes or self._attempt_bytes < self._sizes.attempt_min:
            return []
        self._refusals += 1
        nats = NAME_REFUSED_NATS if self._refusals == 1 else 0.0
        return [self._told.say("ssh-login-refused", nats,
                               f"the server refused a login, {self._refusals} time(s) by now")]

    def _accept(self) -> list[Use]:
        self.accepted = True
        refused = f", {self._refusals} attempt(s) having been refused" if self._refusals else ""
        return [self._told.say("authenticated", 0.0, "the server accepted the login" + refused)]
