"""Keepalives of the client: ServerAliveInterval, ssh_config(5). It asks for what no server has, and is told so.

keepalive@openssh.com is a global request of one length, answered by REQUEST_FAILURE (RFC 4254 section 4), which is
shorter than data and the ends of channels can be in suites with 8-byte blocks. Elsewhere as much may be sent and
answered so, which is said. Those of a server (ClientAliveInterval) are a request on a channel, as long as a line of
output and answered by what a key costs: they are not told.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gpuguard.core.ssh.connection import OPENING_NS
from gpuguard.core.ssh.incoming import OPEN
from gpuguard.core.ssh.line import ANSWER_NS

if TYPE_CHECKING:
    from gpuguard.core.ssh.connection import Seen, Terms
    from gpuguard.core.ssh.line import Segment
    from gpuguard.core.ssh.uses import Use

#: A single one may be a request for a port, which costs as much in some suites.
TOLD_MIN = 2


class Keepalives:
    """Counts the keepalives of one connection that were answered."""

    def __init__(self, terms: Terms, seen: Seen) -> None:
        self._terms = terms
        self._seen = seen
        self._asked_ns: int | None = None
        self._answered = 0

    def segment(self, seg: Segment) -> list[Use]:
        """Take in what one side said; tell at the second that was answered, and whenever their number doubled."""
        sizes, peers = self._terms.sizes, self._terms.peers
        if seg.from_client:
            asks = seg.size == sizes.keepalive and peers.awaits_keepalives and self._due(seg.time_ns)
            self._asked_ns = seg.time_ns if asks else None
            return []
        if self._asked_ns is None:
            return []
        asked_ns, self._asked_ns = self._asked_ns, None
        if seg.size != sizes.reply or seg.time_ns - asked_ns > ANSWER_NS:
            return []
        self._answered += 1
        if self._answered < TOLD_MIN or self._answered & (self._answered - 1):
            return []
        data = self._seen.channel or OPEN in self._seen.told
        sent = data and sizes.reply >= sizes.reply_port
        text = (f"the client asked whether the server is there ({sizes.keepalive} bytes, answered by {sizes.reply}), "
                f"{self._answered} times by now")
        if sent:
            text += "; or as much was sent, and answered by a key or the end of a channel"
        return [self._seen.told.say("keepalive", 0.0, text)]

    def _due(self, time_ns: int) -> bool:
        """Return whether it is time for a keepalive: not in the opening, and after a silence where it may be data."""
        line, sizes = self._seen.line, self._terms.sizes
        silent = time_ns - max(line.client[0], line.server[0]) > OPENING_NS
        return time_ns - self._terms.since_ns > OPENING_NS and (silent or sizes.reply < sizes.reply_port)
