"""A connection after its login: what is settled by then, and what was seen of it since. Plain data of all phases."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from gpuguard.core.ssh.line import Line

if TYPE_CHECKING:
    from gpuguard.core.ssh.asked import Asked
    from gpuguard.core.ssh.peers import Peers
    from gpuguard.core.ssh.request import Request
    from gpuguard.core.ssh.sizes import Sizes
    from gpuguard.core.ssh.uses import Told

# The opening is written in one go: what follows the record before it by more than this is not part of it. A keepalive
# comes after ServerAliveInterval, which OpenSSH counts in whole seconds of the clock.
OPENING_NS = 900_000_000
_ONE_GO_NS = 20_000_000


class Terms(NamedTuple):
    """What is settled with the login, which was accepted at ``since_ns``.

    ``answer_ns`` is the shortest that the server took to answer, ``turnaround_ns`` the longest that the client did:
    nothing on its own host, a round trip on the server's.
    """

    sizes: Sizes
    peers: Peers
    since_ns: int
    answer_ns: int
    turnaround_ns: int
    #: The suite was inferred.
    guessed: bool
    #: The side that opened the connection is the server: what it opens goes to the far side.
    swapped: bool

    def go_ns(self) -> int:
        """Return how far apart may stand what a client writes in one go.

        TCP holds a small segment until the one before is acknowledged (RFC 896), a round trip later; what the path
        takes was seen in the login's questions and answers.
        """
        return _ONE_GO_NS + min(2 * (self.answer_ns + self.turnaround_ns), OPENING_NS // 2)


class Seen:
    """What was seen since the login."""

    def __init__(self, told: Told, request: Request) -> None:
        self.told = told
        self.request = request
        self.line = Line()
        #: What the client sent before a channel was open.
        self.asked: list[Asked] = []
        #: The first of it may have opened a network device.
        self.tun = False
        #: A channel is open; and it is a session.
        self.channel = self.session = False
        #: What the client asked for in the session, in segments; whether it has a terminal; what the server had sent
        #: when it began.
        self.requests = 0
        self.pty = False
        self.bytes_before = 0
        #: Sizes of the opens onwards that were confirmed.
        self.directs: set[int] = set()
