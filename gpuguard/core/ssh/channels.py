"""The channels of a connection one by one, where there are several: sessions of a ControlMaster, and opens onwards.

A session is opened, confirmed, asked for something and granted it (RFC 4254 sections 5.1, 6.1 to 6.5). OpenSSH's server
grants in one segment: an answer to each request that wants one, and a window. One answer is a command's or a
subsystem's, two are a terminal's and a shell's; or the first words of a command that spoke at once were as long, which
is told too. Where a channel is open, all of that may be its data, and is told as either.

OpenSSH's client writes a request for its X11 display out before all others (x11_request_forwarding_with_spoofing in
channels.c), and its length is known. It asks for the agent in one segment with the rest and wants no answer, so that no
size tells that. Of other clients a third answer is for X11, the agent or a variable; and where a request of the agent's
length stands alone, it may be a variable's as well.

Said is what weighs nothing: which session the whole connection is called after is not decided here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from gpuguard.core.ssh.incoming import OPEN
from gpuguard.core.ssh.line import ANSWER_NS
from gpuguard.core.ssh.messages import SFTP_VERSION_MIN

if TYPE_CHECKING:
    from gpuguard.core.ssh.connection import Seen, Terms
    from gpuguard.core.ssh.line import Segment
    from gpuguard.core.ssh.uses import Use

#: So many are told by themselves, the others are counted.
TOLD_MAX = 8
_ANSWERS_MAX = 6
_ASKED_MAX = 6
_OTHERS_MAX = 2

_SESSION = "session"
_ONWARDS = "connection onwards"
_COMMAND = "a command or a subsystem was asked for"
_AT_ONCE = "a command that spoke at once"


class _Open(NamedTuple):
    """What the client sent that opens a channel of this kind."""

    time_ns: int
    size: int
    kind: str


class _Setup:
    """A session that was confirmed: what was asked for on it, in segments, and how often that was answered."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.answers = 0
        self.answered_first = False
        #: Segments of the server that belonged to other channels.
        self.others = 0


class Channels:
    """What was opened on one connection, in order."""

    def __init__(self, terms: Terms, seen: Seen) -> None:
        self._terms = terms
        self._seen = seen
        self._open: _Open | None = None
        self._setup: _Setup | None = None
        #: What each channel is for, of the first ones; and how many there are of each kind.
        self._texts: list[str] = []
        self._counts: dict[str, int] = {}
        #: The number of the last session, as long as it may turn out to be for SFTP, and whether that was asked.
        self._sftp: int | None = None
        self._sftp_asked = False

    def segment(self, seg: Segment, *, opened: bool) -> list[Use]:
        """Take in what one side said, which ``opened`` the first channel by what the other phases made of it."""
        sizes, peers = self._terms.sizes, self._terms.peers
        if seg.size == sizes.ignore and peers.ignores(from_client=seg.from_client):
            return []
        if seg.from_client:
            self._asked(seg)
            return []
        uses = self._opens_sftp(seg.size) if self._sftp_asked else []
        if self._setup is not None and self._setup.asked:
            return uses + self._granted(seg.size, self._setup)
        waiting = self._open
        if waiting is not None and seg.size == sizes.confirm and seg.time_ns - waiting.time_ns < ANSWER_NS:
            self._open = None
            if waiting.kind == _ONWARDS:
                return uses + self._tell(_ONWARDS, f"a connection onwards was opened ({waiting.size} bytes)")
            self._setup = _Setup()
        elif opened and self._seen.session:
            # Confirmed among other messages.
            self._setup = _Setup()
        return uses

    def _asked(self, seg: Segment) -> None:
        sizes = self._terms.sizes
        self._sftp_asked = self._sftp is not None and seg.size == sizes.sftp_init != sizes.adjust
        if self._setup is not None:
            self._setup.asked.append(seg.size)
            if len(self._setup.asked) > _ASKED_MAX:
                self._setup = None
            return
        self._open = None
        session = seg.size in sizes.opens_session
        # Answers through a tunnel are as long as opens onwards too.
        onwards = seg.size in sizes.opens_onwards and OPEN not in self._seen.told
        # What may be either is neither.
        if session != onwards:
            self._open = _Open(seg.time_ns, seg.size, _SESSION if session else _ONWARDS)

    def _granted(self, size: int, setup: _Setup) -> list[Use]:
        """Count answers until a window comes with them, which is what ends the requests to OpenSSH's server."""
        sizes = self._terms.sizes
        if size == sizes.granted_each and self._terms.peers.openssh_server:
            setup.answered_first |= not setup.answers and len(setup.asked) == 1
            setup.answers += 1
            return []
        window = sizes.granted_one - sizes.granted_each
        answers = next((count for count in range(1, _ANSWERS_MAX) if size == count * sizes.granted_each + window), 0)
        if not answers or not self._terms.peers.openssh_server:
            # Another server's, or data with the answer; or another channel's, where there is one.
            setup.others += 1
            if not self._counts or setup.others > _OTHERS_MAX:
                self._setup = None
            return []
        self._setup = None
        answers += setup.answers
        uses = self._tell(_SESSION, f"{self._purpose(setup, answers)} ({'+'.join(map(str, setup.asked))} bytes)")
        self._sftp = len(self._texts) if answers == 1 and len(self._texts) == sum(self._counts.values()) else None
        return uses + self._forwarding(setup, answers)

    def _x11_first(self, setup: _Setup) -> bool:
        """Return whether the first segment asks for an X11 display, as OpenSSH's client does by itself."""
        return self._terms.peers.openssh_client and len(setup.asked) > 1 and setup.asked[0] == self._terms.sizes.x11

    def _purpose(self, setup: _Setup, answers: int) -> str:
        """Return what a session is for, by how many answers it was granted with and whether so much was asked."""
        least = min(self._terms.sizes.bare_pty)
        first = self._x11_first(setup)
        if answers - first == 1 or sum(setup.asked[first:]) < least:
            return _COMMAND
        return f"a terminal and a shell were asked for, or {_AT_ONCE}"

    def _forwarding(self, setup: _Setup, answers: int) -> list[Use]:
        """Say that the agent or the display of this side was asked for, used or not."""
        sizes, size, asked = self._terms.sizes, setup.asked[0], sum(setup.asked)
        if self._x11_first(setup):
            text = f"X11 forwarding was asked for: a first request of {size} bytes, before that for what runs"
        elif answers > 2 and asked >= sizes.agent + min(sizes.bare_pty) and not self._terms.peers.openssh_client:
            text = (f"X11 or agent forwarding was asked for, or a variable, or it was {_AT_ONCE}: {answers} answers "
                    "where a terminal and a shell have two")
        elif len(setup.asked) > 1 and size == sizes.agent and not setup.answered_first:
            text = f"agent forwarding was asked for, or a variable: a first request of {size} bytes wanted no answer"
        else:
            return []
        return self._seen.told.once("ssh-forwarding-asked", 0.0, text)

    def _opens_sftp(self, size: int) -> list[Use]:
        """SSH_FXP_INIT is answered at length."""
        if self._sftp is None:
            return []
        number, self._sftp, self._sftp_asked = self._sftp, None, False
        if size <= SFTP_VERSION_MIN:
            return []
        self._texts[number - 1] += ", and SFTP was spoken"
        return self._said(number) if len(self._texts) > 1 else []

    def _tell(self, kind: str, text: str) -> list[Use]:
        """Count a channel, and tell of it where it is not the only one; of many, whenever their number doubled."""
        self._counts[kind] = self._counts.get(kind, 0) + 1
        number = sum(self._counts.values())
        if number > TOLD_MAX:
            if number & (number - 1):
                return []
            counts = ", ".join(f"{count} {kind}(s)" for kind, count in sorted(self._counts.items()))
            return [self._seen.told.say("ssh-channels", 0.0, f"{number} channels by now: {counts}")]
        self._texts.append(f"{text}; or as much was sent in another, and answered so" if number > 1 else text)
        if number == 1:
            return []
        return [*(self._said(1) if number == 2 else []), *self._said(number)]

    def _said(self, number: int) -> list[Use]:
        return [self._seen.told.say(f"ssh-channel-{number}", 0.0, f"channel {number}: {self._texts[number - 1]}")]
