"""From the banners to NEWKEYS: who is the client, in which suites both sides write, and so what each message costs.

The client's side is known by its marks in the KEXINIT, else by the order of NEWKEYS. Where the exchange was captured
in part only, the suite is read from the service request, the first encrypted message of either side.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from gpuguard.core.ssh.host_keys import KeyRecords, key_records
from gpuguard.core.ssh.peers import Peers
from gpuguard.core.ssh.sizes import BY_SERVICE, Sizes, sizes_of
from gpuguard.core.ssh.suites import negotiate

if TYPE_CHECKING:
    from gpuguard.core.records import SshKexInit
    from gpuguard.core.ssh.uses import Told, Use

# Each side says in its KEXINIT which it is, and only the server can send NEWKEYS first. With two of these three signs
# H0 is a SYN attributed to the wrong side (a forged or replayed packet), or a device that calls home (RFC 8071): 1e-10
# on a server. One sign alone may be an implementation's mistake: 1e-5.
SWAP_NATS = 23.0
SWAP_ONE_NATS = 11.5
# RFC 8308 section 2.1, and OpenSSH's strict key exchange (PROTOCOL section 1.10): each side says which one it is.
_CLIENT_MARKS = ("ext-info-c", "kex-strict-c-v00@openssh.com")
_SERVER_MARKS = ("ext-info-s", "kex-strict-s-v00@openssh.com")
# Banner, KEXINIT and the exchange itself come before the service request, from either side.
_KEY_EXCHANGE_SEGMENTS = 3
_NO_KEYS = KeyRecords(frozenset(), {})


class Agreed(NamedTuple):
    """What the key exchange settled; ``client`` is the TCP side of that role.

    ``guessed``: the suite was inferred. ``swapped``: the side that opened the connection is the server.
    """

    client: int
    peers: Peers
    sizes: Sizes
    keys: KeyRecords
    guessed: bool
    swapped: bool


class KeyExchange:
    """The exchange in clear. Sides are 0 for the TCP initiator and 1 for the responder."""

    def __init__(self, told: Told, *, initiator_known: bool) -> None:
        self._told = told
        self._initiator_known = initiator_known
        self._banners = ["", ""]
        self._kexinits: list[SshKexInit | None] = [None, None]
        self._keyed: list[int] = []
        self._segments = [0, 0]
        self._last_plain = (0, 0)
        #: The side of the client, known before its suite is.
        self.client: int | None = None
        self.agreed: Agreed | None = None

    def banner(self, side: int, text: str) -> None:
        """Take the identification string of one side in."""
        self._banners[side] = text

    def kexinit(self, side: int, fact: SshKexInit) -> None:
        """Take the proposals of one side in; those of a later key exchange change nothing."""
        if self._kexinits[side] is None:
            self._kexinits[side] = fact

    def newkeys(self, side: int) -> list[Use]:
        """Take in that this side's records are encrypted from here on."""
        if side in self._keyed:
            return []
        self._keyed.append(side)
        one, two = self._kexinits
        if len(self._keyed) < 2 or one is None or two is None or (self.agreed and not self.agreed.guessed):
            return []
        roles = (_role(one), _role(two))
        if roles[0] and roles[0] == roles[1]:
            return []
        # The client cannot send NEWKEYS before it has the server's part of the exchange, RFC 4253 section 8.
        by_order = self._keyed[1]
        self.client = by_order if roles == ("", "") else int(roles[0] == "server" or roles[1] == "client")
        self.agreed = self._agree(self.client, *((two, one) if self.client else (one, two)))
        if self.client == 0 or not self._initiator_known:
            return []
        return [self._swap(sum(map(bool, roles)) + (by_order == self.client))]

    def _agree(self, client: int, ours: SshKexInit, theirs: SshKexInit) -> Agreed | None:
        banners = (self._banners[client], self._banners[1 - client])
        client_suite, server_suite = negotiate(ours, theirs, banners)
        if client_suite is None or server_suite is None:
            return None
        peers = Peers(*banners)
        sizes = sizes_of(client_suite, server_suite, no_more_sessions=not peers.plain)
        keys = key_records(client_suite, server_suite, theirs.host_key)
        swapped = client == 1 and self._initiator_known
        return Agreed(client, peers, sizes, keys, guessed=False, swapped=swapped)

    def segment(self, side: int, size: int) -> None:
        """Read the suite from the service request, where the key exchange was cut off or partly lost."""
        if all(self._kexinits):
            return
        asker, asked = self._last_plain
        self._last_plain = (side, size)
        self._segments[side] += 1
        if min(self._segments) < _KEY_EXCHANGE_SEGMENTS:
            return
        suite = BY_SERVICE.get(size)
        if suite is not None and asked == size and asker != side:
            self.client = asker
            peers = Peers(self._banners[asker], self._banners[side])
            self.agreed = Agreed(asker, peers, sizes_of(suite, suite), _NO_KEYS, guessed=True, swapped=False)

    def _swap(self, witnesses: int) -> Use:
        text = (f"the side that opened the connection is the SSH server, the side that was called is the client, by "
                f"{witnesses} of 3 signs in the key exchange")
        return self._told.say("ssh-role-swap", SWAP_NATS if witnesses > 1 else SWAP_ONE_NATS, text,
                              ("devices that call home by design, RFC 8071",))


def _role(kexinit: SshKexInit) -> str:
    """Return client, server, or "" where the sender does not say (old software) or says both."""
    client = any(mark in kexinit.kex for mark in _CLIENT_MARKS)
    server = any(mark in kexinit.kex for mark in _SERVER_MARKS)
    return "" if client == server else "client" if client else "server"
