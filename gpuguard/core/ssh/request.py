"""The request for a port (tcpip-forward, RFC 4254 section 7.1): what its signs weigh, alone and together.

H1: the label is true; H0: any other use of SSH. P(seen | H1) is near 1 throughout: the sizes are computed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gpuguard.core.ssh.uses import SPOTS, Use

if TYPE_CHECKING:
    from gpuguard.core.ssh.peers import Peers
    from gpuguard.core.ssh.uses import Told

USE = "ssh-reverse-forward-request"

# Under H0 the first record after authentication is a session open, a direct-tcpip open or no-more-sessions: that is
# what OpenSSH, dropbear, libssh, Paramiko, AsyncSSH and Go send, and all but private requests that RFC 4254 offers. A
# client outside these (1e-2), which sends a private request first (1e-2), of just this of 20 usual sizes: 5e-6.
REQUEST_NATS = 12.0
# The same from a client that says it is OpenSSH or dropbear, whose sources show every opening there is. Who lies here
# only makes itself readable: a fork (1e-4), a private request (1e-2), of this size (1/20): 5e-8.
REQUEST_FAMILIAR_NATS = 16.8
# Several requests in one segment, from a client that writes them together: private requests as above, and names that
# make an open onwards (-B, one session in a hundred) as long in a compressed session (1/20): 5e-4.
REQUEST_GATHERED_NATS = 7.6
# Clients that were never run may begin with a request of their own, as Twisted's does: no reason for a suspicion alone.
REQUEST_STRANGER_NATS_MAX = 3.9
# Where a segment that was not read may have held a confirmation, and the client went on, this may be a command and its
# answer: what tells against it is that a channel's open has this size (1/20), and the command (1/20).
REQUEST_DOUBTED_NATS_MAX = 5.3
# The same of OpenSSH, which says no more after a session's open in one connection of 50 (ControlMaster) only: hidden in
# what was not read (1/20), and then a request of this size (1/10).
REQUEST_DOUBTED_OPENSSH_NATS = 9.2
REQUEST_NATS_MAX = 25.0
# Where segments before the login were missed and the suite was inferred, the login itself is misread once in ten times,
# and all that follows with it; by chance it fits then (1/20).
REQUEST_LOST_NATS_MAX = 5.3
# A suite that was inferred from sizes is the wrong one once in 50 times, and must then fit by chance.
GUESSED_NATS = -4.0


class Request:
    """What is known of a request for a port on one connection.

    ``guessed``: the suite was inferred; ``lost``: and segments before the login were missed.
    """

    def __init__(self, peers: Peers, told: Told, *, guessed: bool, lost: bool) -> None:
        self._peers = peers
        self._told = told
        self._guessed = guessed
        self._nats_max = REQUEST_LOST_NATS_MAX if guessed and lost else REQUEST_NATS_MAX
        #: What was said so far.
        self.nats = 0.0
        #: It was answered; or something was that may have been it.
        self.answered = self.possible = False
        #: What was not read may have held what an open is answered by: what came after it is in doubt.
        self.doubted = False
        #: An answer was read beside another record, or among several; what it weighs more when the client goes on.
        self.beside = self.weak = False
        self.due = 0.0

    def say(self, nats: float, text: str) -> list[Use]:
        """Say a request, as far as it was not yet said: what all its signs weigh together is bounded."""
        if self._guessed and not self.nats:
            nats += GUESSED_NATS
        most = self._nats_max
        if self.doubted:
            openssh = self._peers.openssh_client
            most = min(most, REQUEST_DOUBTED_OPENSSH_NATS if openssh else REQUEST_DOUBTED_NATS_MAX)
        if self._peers.stranger:
            most = min(most, REQUEST_STRANGER_NATS_MAX)
        nats = min(nats, most - self.nats)
        if nats <= 0:
            return []
        self.nats += nats
        return [self._told.say(USE, nats, text, SPOTS)]

    def take_back(self) -> list[Use]:
        """Take back what was said of an answer beside a record: this client goes on as after an open."""
        return self.withdraw(self.nats, "this side went on as where a session was opened") if self.beside else []

    def withdraw(self, nats: float, text: str) -> list[Use]:
        """Take back so much of what was said."""
        nats = min(nats, self.nats)
        if not nats:
            return []
        self.nats -= nats
        if not self.nats:
            self._told.names.discard(USE)
        return [Use(USE, -nats, text)]

    def settle(self, size: int, *, went_on: bool) -> list[Use]:
        """Say what was due until the client goes on, if it did so with these bytes; else it is due no more."""
        due, self.due = self.due, 0.0
        if not due or not went_on:
            return []
        self.weak = False
        return self.say(due, f"and this side went on ({size} bytes): a channel was confirmed there too")
