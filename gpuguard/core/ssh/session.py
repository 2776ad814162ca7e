"""One SSH connection, read from the sizes of its records: what is it used for, and who may come through it.

RFC 4254 fixes what may follow what. Nothing here is learnt from captures, and nothing hangs on ports or addresses.

Interactive messages travel one write a segment. Where a segment holds several records its size is split into the
messages that may stand there; what cannot be split is left unread, never guessed.

The phases follow each other, each in a file of its own: `key_exchange` settles who is who and what messages cost,
`login` waits for the server to accept, `asking` and `answering` read the opening until a channel is open, `running` and
`onwards` what is done there. Beside them `incoming` looks for channels of the far side, `global_requests` for ports
asked for later on, `inner` for what runs inside; `channels` and `keepalives` name what weighs nothing. What the phases
hand on to each other is in `connection`, `line` and `request`; what each weighs stands with it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gpuguard.core.ssh.answering import Answering
from gpuguard.core.ssh.asking import Asking
from gpuguard.core.ssh.channels import Channels
from gpuguard.core.ssh.connection import Seen, Terms
from gpuguard.core.ssh.global_requests import GlobalRequests
from gpuguard.core.ssh.incoming import Incoming
from gpuguard.core.ssh.inner import Inside
from gpuguard.core.ssh.keepalives import Keepalives
from gpuguard.core.ssh.key_exchange import KeyExchange
from gpuguard.core.ssh.line import Segment
from gpuguard.core.ssh.login import Login
from gpuguard.core.ssh.request import Request
from gpuguard.core.ssh.running import Running
from gpuguard.core.ssh.uses import Told

if TYPE_CHECKING:
    from gpuguard.core.records import SshKexInit
    from gpuguard.core.ssh.key_exchange import Agreed
    from gpuguard.core.ssh.uses import Use


class SshSession:
    """One connection from its key exchange on. Sides are 0 for the TCP initiator and 1 for the responder."""

    def __init__(self, *, initiator_known: bool) -> None:
        self._told = Told()
        self._exchange = KeyExchange(self._told, initiator_known=initiator_known)
        self._login: Login | None = None
        self._after: AfterLogin | None = None
        #: For each side, how often a segment came out of order or was missed by the time of the login.
        self._holes = (0, 0)

    @property
    def client(self) -> int | None:
        """The side that is the SSH client, once that is known."""
        return self._exchange.client

    def banner(self, side: int, text: str) -> None:
        """Take the identification string of one side in."""
        self._exchange.banner(side, text)

    def kexinit(self, side: int, fact: SshKexInit) -> None:
        """Take the proposals of one side in."""
        self._exchange.kexinit(side, fact)

    def newkeys(self, side: int) -> list[Use]:
        """Take in that this side's records are encrypted from here on."""
        before = self._exchange.agreed
        uses = self._exchange.newkeys(side)
        if self._exchange.agreed is not before:
            # What was read in a suite that was inferred is void.
            self._login = self._after = None
        return uses

    def segment(self, time_ns: int, side: int, size: int, total: int, *, holes: tuple[int, int] = (0, 0)) -> list[Use]:
        """Take in so many encrypted bytes that one side sent at once; ``total`` is all that it sent so far.

        ``holes`` counts for each side how often a segment came before the one ahead of it, or without it.
        """
        agreed = self._exchange.agreed
        if agreed is None:
            self._exchange.segment(side, size)
            return []
        seg = Segment(time_ns, size, total, side == agreed.client, holes == self._holes)
        if self._after is not None:
            return self._after.segment(seg)
        if self._login is None:
            self._login = Login(agreed, self._told)
        uses = self._login.segment(seg)
        if self._login.accepted:
            self._holes = holes
            self._after = AfterLogin(agreed, self._login, self._told, time_ns, lost=any(holes))
            if seg.from_client:
                uses += self._after.asking.segment(seg)
        return uses


class AfterLogin:
    """The phases of a connection whose login was accepted at ``since_ns``; ``lost``: not all before it was seen."""

    def __init__(self, agreed: Agreed, login: Login, told: Told, since_ns: int, *, lost: bool) -> None:
        terms = Terms(agreed.sizes, agreed.peers, since_ns, login.answer_ns, login.turnaround_ns, agreed.guessed,
                      agreed.swapped)
        seen = Seen(told, Request(agreed.peers, told, guessed=agreed.guessed, lost=lost))
        self._terms = terms
        self._seen = seen
        self._requests = GlobalRequests(terms, seen)
        self._answering = Answering(terms, seen, self._requests, agreed.keys)
        self._running = Running(terms, seen, self._requests)
        self._incoming = Incoming(terms, seen)
        self._inside = Inside(terms, seen)
        self._channels = Channels(terms, seen)
        self._keepalives = Keepalives(terms, seen)
        self.asking = Asking(terms, seen, self._run)

    def segment(self, seg: Segment) -> list[Use]:
        """Take in what one side said, and say what that tells."""
        if self._answering.about_keys(seg):
            return []
        seen, sizes = self._seen, self._terms.sizes
        opened = seen.channel
        uses = seen.request.settle(seg.size, went_on=seg.from_client and seg.size > sizes.ignore)
        uses += self._requests.segment(seg)
        uses += self._incoming.segment(seg)
        if sizes.exact:
            uses += self._inside.segment(seg)
        if seen.channel:
            uses += self._run(seg)
        elif seg.from_client:
            uses += self.asking.segment(seg)
        else:
            uses += self._answering.segment(seg)
        if sizes.exact:
            uses += self._keepalives.segment(seg)
            uses += self._channels.segment(seg, opened=seen.channel and not opened)
        seen.line.remember(seg, sizes, self._terms.peers, session=seen.session)
        return uses

    def _run(self, seg: Segment) -> list[Use]:
        """Take in a segment with a channel open."""
        if not self._seen.session:
            return self._running.onwards(seg)
        uses = self._answering.before_a_command(seg) + self._incoming.closed(seg)
        return uses + self._running.segment(seg)
