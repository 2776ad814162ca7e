"""What was said on a connection: a segment of encrypted bytes, and what is kept of the ones before it."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from gpuguard.core.ssh.peers import Peers
    from gpuguard.core.ssh.sizes import Sizes

#: A request is answered by then, or was none.
ANSWER_NS = 3_000_000_000
# Libraries ask for one thing after the other on a session, and wait for each answer; OpenSSH asks for all at once.
_SETUP_NS = 5_000_000_000
# Clients that count the server's silence in whole seconds send a keepalive after one at least, where the interval is
# longer than that; of one second, at any time: such are known once one was answered.
_BEAT_NS = 900_000_000
# What both sides said at the same time: two keepalives, whose clocks often run out together.
_CROSSED_NS = 50_000_000


class Segment(NamedTuple):
    """So many encrypted bytes that one side sent at once; ``total`` is all that it sent so far.

    ``whole``: nothing is missing of what was sent since the login.
    """

    time_ns: int
    size: int
    total: int
    from_client: bool
    whole: bool


class Line:
    """What the next segment is judged by: who spoke last, when and how much; and how long nobody did."""

    def __init__(self) -> None:
        #: (time, size) of the last segment of each side.
        self.client = (0, 0)
        self.server = (0, 0)
        #: The same of the client's last that was not as long as a key; keystroke chaff goes on beside it.
        self.asked = (0, 0)
        #: When the server spoke before its last word.
        self._before_ns = 0
        #: How long the server had been silent when the client spoke last, and the longest that nobody spoke.
        self.waited_ns = 0
        self.silence_ns = 0
        #: The client opened a session, and the server confirmed it: requests are to follow, which may be granted each.
        self.setting_up = False
        #: There is a session; and when another was confirmed.
        self._session = False
        self._further_ns: int | None = None
        #: The longest that the server said since `asked`; and of what could not be read, since the client's last word.
        self.heard = 0
        self.unread = 0
        #: When the client sent a keepalive that is still to be answered; and the server's last word was such an answer.
        self.owed_ns: int | None = None
        self.kept_alive = False
        #: Something as long as a keepalive was answered as one.
        self._keeps_alive = False

    def owes(self, time_ns: int) -> bool:
        """Return whether the next answer is a keepalive's: requests are answered in their order."""
        return self.owed_ns is not None and time_ns - self.owed_ns < ANSWER_NS

    def remember(self, seg: Segment, sizes: Sizes, peers: Peers, *, session: bool) -> None:
        """Keep of a segment what the next is judged by; ``session``: there is one, whose keepalives are answered."""
        if seg.from_client and seg.size == sizes.ignore != sizes.key and peers.client_ignores:
            return
        if self.server[0] and not (seg.from_client and seg.size == sizes.keepalive):
            self.silence_ns = max(self.silence_ns, seg.time_ns - max(self.client[0], self.server[0]))
        if seg.from_client:
            self._client_said(seg, sizes, peers, session=session)
        else:
            self._server_said(seg, sizes, session=session)

    def _client_said(self, seg: Segment, sizes: Sizes, peers: Peers, *, session: bool) -> None:
        crossed = seg.time_ns - self.server[0] < _CROSSED_NS
        self.waited_ns = seg.time_ns - (self._before_ns if crossed else self.server[0])
        confirmed = self.client[1] in sizes.session and self.server[1] in sizes.confirms
        granted = self.setting_up and self.server[1] == sizes.granted_each < sizes.key_echo
        further = self._further_ns is not None and seg.time_ns - self._further_ns < _SETUP_NS
        self.setting_up = confirmed or granted or (further and not peers.openssh_client)
        due = self._keeps_alive or self._silent(crossed=crossed) or not peers.counts_silence
        self.client = (seg.time_ns, seg.size)
        if session and seg.size == sizes.keepalive and peers.awaits_keepalives and due:
            self.owed_ns = seg.time_ns
        self.unread = 0
        if seg.size != sizes.key:
            self.asked = self.client
            self.heard = 0

    def _silent(self, *, crossed: bool) -> bool:
        """Return whether the server was silent for so long; its last word is none that crossed if it answered ours."""
        answered = self.server[0] - self.client[0] < _BEAT_NS
        return self.waited_ns > _BEAT_NS and not (crossed and answered)

    def _server_said(self, seg: Segment, sizes: Sizes, *, session: bool) -> None:
        if self._session and seg.size in sizes.confirms and self.asked[1] in sizes.session:
            self._further_ns = seg.time_ns
        self._session = session
        self._before_ns = self.server[0]
        self.server = (seg.time_ns, seg.size)
        self.kept_alive = seg.size == sizes.reply and self.owes(seg.time_ns)
        if seg.size == sizes.reply:
            self.owed_ns = None
            self._keeps_alive |= self.client[1] == sizes.keepalive
        self.heard = max(self.heard, seg.size)
