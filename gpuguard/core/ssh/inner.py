"""What else runs inside an SSH connection: further sessions of SSH, and this side's agent and screen, used from afar.

A key that is typed in an inner session is the outer one's data: a record of 36 bytes becomes one of 76, and of 116 a
level further in (chacha20-poly1305). These sizes are computed for the usual inner suites; where question and answer
have them again and again there is an inner session, and which size tells how deep. Other messages of one small length
that go to and fro are taken for one too; so this accuses nobody, and weighs nothing.

Agent and X11 channels are opened by the server (RFC 4254 section 6.3.2, OpenSSH's PROTOCOL.agent). The open, its
confirmation and the first word have one length each: an agent is first asked for its keys, or told which session it is
used by, and a display is first shown the cookie. Typed keys and copies by SFTP may cost as much in blocks of 16 bytes;
so the answer has to be as long as it is at least, and that it may be data is said.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gpuguard.core.ssh.incoming import OPEN
from gpuguard.core.ssh.request import USE

if TYPE_CHECKING:
    from gpuguard.core.ssh.connection import Seen, Terms
    from gpuguard.core.ssh.line import Segment
    from gpuguard.core.ssh.sizes import ServerChannel
    from gpuguard.core.ssh.uses import Use

# What an inner session runs in, by what was said of the outer one; the first that fits.
_AROUND = (
    ("reverse-tunnel", {USE, OPEN}),
    ("jump", {"ssh-jump"}),
    ("dynamic-forward", {"ssh-dynamic-forward"}),
    ("local-forward", {"ssh-local-forward"}),
    ("exec", {"ssh-exec"}),
)
_SESSIONS = ("interactive", "transfer", "exec")

NESTED_MIN = 5
#: Of a question and its answer; inner sessions over longer ways are slower than anything that is typed.
ANSWERED_NS = 1_000_000_000


class Nested:
    """Counts questions and answers that have the length of a key and its echo within an inner session.

    ``pairs``: what the client's and the server's record cost, and how deep the session is whose key it is.
    """

    def __init__(self, pairs: dict[tuple[int, int], int]) -> None:
        self._pairs = pairs
        self._last = (0, False, 0)
        self._seen: dict[int, int] = {}
        self.told = 0

    def segment(self, time_ns: int, size: int, *, from_client: bool) -> int:
        """Return the depth of a session that is now seen, 0 if there is nothing new."""
        then_ns, client_before, before = self._last
        self._last = (time_ns, from_client, size)
        if client_before == from_client or time_ns - then_ns > ANSWERED_NS:
            return 0
        depth = self._pairs.get((size, before) if from_client else (before, size), 0)
        if depth <= self.told:
            return 0
        self._seen[depth] = self._seen.get(depth, 0) + 1
        # A question and its answer, and that answer and the next question: two for each key.
        if self._seen[depth] < 2 * NESTED_MIN:
            return 0
        self.told = depth
        return depth


class FromServer:
    """Watches for channels that a server opens; ``confirmed`` is what the client's confirmation costs."""

    def __init__(self, channels: tuple[ServerChannel, ...], confirmed: int) -> None:
        self._channels = channels
        self._confirmed = confirmed
        self._open: tuple[int, int] | None = None
        self._is_open = False
        #: What was asked there, and the least that answers it.
        self._asked: tuple[str, int] | None = None

    def segment(self, time_ns: int, size: int, *, from_client: bool) -> str:
        """Return what was opened and is used, or ""."""
        opened, is_open = self._open, self._is_open
        self._is_open = False
        if from_client:
            self._is_open = (not is_open and opened is not None and size == self._confirmed
                             and time_ns - opened[0] < ANSWERED_NS)
            asked, self._asked = self._asked, None
            return asked[0] if asked and size >= asked[1] else ""
        self._open = (time_ns, size)
        if opened is not None and is_open:
            self._asked = next(((one.kind, one.words[size]) for one in self._channels
                                if size in one.words and opened[1] in one.opens), None)
        return ""


class Inside:
    """Sessions of SSH inside this one, and the agent and the screen of this side in use from the far one."""

    def __init__(self, terms: Terms, seen: Seen) -> None:
        sizes = terms.sizes
        self._terms = terms
        self._seen = seen
        self._nested = Nested(sizes.nested)
        self._from_server = FromServer(sizes.server_channels, sizes.confirm_client)

    def segment(self, seg: Segment) -> list[Use]:
        """Take in a segment, and say what is new."""
        sizes, told = self._terms.sizes, self._seen.told
        if seg.size == sizes.ignore != sizes.key and self._terms.peers.ignores(from_client=seg.from_client):
            return []
        uses = []
        depth = self._nested.segment(seg.time_ns, seg.size, from_client=seg.from_client)
        around = depth and next((label for label, marks in _AROUND if told.names & marks), "")
        if around:
            text = (f"records of {seg.size} bytes, asked and answered, as keys are of an SSH session within {depth} "
                    "other(s)")
            uses.append(told.say(f"ssh-nested-in-{around}", 0.0, text))
        opened = self._from_server.segment(seg.time_ns, seg.size, from_client=seg.from_client)
        # Of OpenSSH's client nothing tells that the agent was asked for (`channels`), of others something does.
        asked = self._terms.peers.openssh_client or "ssh-forwarding-asked" in told
        session = opened and asked and next((label for label in _SESSIONS if f"ssh-{label}" in told), "")
        if session:
            text = (f"the far side used this side's {opened}: a channel was opened to it, and what was asked there was "
                    f"answered by {seg.size} bytes; or as much was sent in another, and answered so")
            uses += told.once(f"ssh-{opened}-used-in-{session}", 0.0, text)
        return uses
