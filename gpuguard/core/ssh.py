"""SSH read from the sizes of its encrypted records: the size algebra, and a state machine over it.

Both KEXINITs travel in clear, so the cipher, the MAC and the compression of each direction are known (RFC 4253 section
7.1), and with them the size on the wire of every message (section 6; OpenSSH, dropbear, libssh, Paramiko, AsyncSSH and
Go all pad to the minimum). RFC 4254 then fixes what may follow what. Nothing here is learnt from captures, and nothing
hangs on ports or addresses; message lengths are of RFC 4252-4254 and of OpenSSH's PROTOCOL file.

Interactive messages travel one write a segment. Where a segment holds several records its size is split into the
messages that may stand there; what cannot be split is left unread, never guessed.
"""

from __future__ import annotations

import zlib
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from gpuguard.core.records import SshKexInit

# -- sizes ------------------------------------------------------------------------------------------------------------

_CIPHERS = {
    "chacha20-poly1305@openssh.com": (8, True),
    "aes128-gcm@openssh.com": (16, True),
    "aes256-gcm@openssh.com": (16, True),
    "AEAD_AES_128_GCM": (16, True),
    "AEAD_AES_256_GCM": (16, True),
    "3des-cbc": (8, False),
    "3des-ctr": (8, False),
    "blowfish-cbc": (8, False),
    "blowfish-ctr": (8, False),
    "cast128-cbc": (8, False),
    "cast128-ctr": (8, False),
    "arcfour": (8, False),
    "arcfour128": (8, False),
    "arcfour256": (8, False),
}
_WIDE_CIPHERS = ("aes", "rijndael", "camellia", "twofish", "serpent")
_MAC_BYTES = {
    "hmac-sha1": 20,
    "hmac-sha1-96": 12,
    "hmac-md5": 16,
    "hmac-md5-96": 12,
    "hmac-ripemd160": 20,
    "hmac-sha2-256": 32,
    "hmac-sha2-256-96": 12,
    "hmac-sha2-512": 64,
    "umac-64": 8,
    "umac-128": 16,
}


class Suite(NamedTuple):
    """What one direction was agreed to: ``outside`` says that the length field is not padded with the rest."""

    cipher: str
    block_bytes: int
    mac_bytes: int
    outside: bool
    compressed: bool


def suite_of(cipher: str, mac: str, compression: str) -> Suite | None:
    """Return the suite of these names, None if a name is not known: its sizes cannot be computed then."""
    known = _CIPHERS.get(cipher)
    if known is None and cipher.startswith(_WIDE_CIPHERS) and cipher.endswith(("-ctr", "-cbc", "@lysator.liu.se")):
        known = (16, False)
    if known is None or compression not in ("none", "zlib", "zlib@openssh.com"):
        return None
    block, aead = known
    if aead:
        return Suite(cipher, block, 16, True, compression != "none")
    base = mac.removesuffix("@openssh.com")
    mac_bytes = _MAC_BYTES.get(base.removesuffix("-etm"))
    if mac_bytes is None:
        return None
    return Suite(cipher, block, mac_bytes, base.endswith("-etm"), compression != "none")


def negotiate(client: SshKexInit, server: SshKexInit) -> tuple[Suite | None, Suite | None]:
    """Return the suites client to server and server to client: the client's first that the server has too."""

    def first(wanted: tuple[str, ...], offered: tuple[str, ...]) -> str:
        return next((name for name in wanted if name in offered), "")

    return (
        suite_of(
            first(client.encryption_client_to_server, server.encryption_client_to_server),
            first(client.mac_client_to_server, server.mac_client_to_server),
            first(client.compression_client_to_server, server.compression_client_to_server),
        ),
        suite_of(
            first(client.encryption_server_to_client, server.encryption_server_to_client),
            first(client.mac_server_to_client, server.mac_server_to_client),
            first(client.compression_server_to_client, server.compression_server_to_client),
        ),
    )


def record_bytes(suite: Suite, payload_bytes: int) -> int:
    """Return the size on the wire of a message of so many bytes, RFC 4253 section 6, with the least padding.

    The length field counts into the alignment for classic MACs, and not for AEAD and encrypt-then-MAC
    (OpenSSH's PROTOCOL.chacha20poly1305 and PROTOCOL section 1.5, RFC 5647 section 7.2).
    """
    body = 1 + payload_bytes
    aligned = body if suite.outside else body + 4
    padding = suite.block_bytes - aligned % suite.block_bytes
    if padding < 4:
        padding += suite.block_bytes
    return 4 + body + padding + suite.mac_bytes


# -- messages ---------------------------------------------------------------------------------------------------------

SESSION_OPEN = 24  # RFC 4254 section 5.1: type, "session", channel, window, packet
NO_MORE_SESSIONS = 34  # OpenSSH PROTOCOL section 2.2, want_reply false
KEEPALIVE = 27  # keepalive@openssh.com, want_reply true
OPEN_CONFIRMATION = 17
IGNORE = 5  # RFC 4253 section 11.2, with no data: AsyncSSH sends one before every message
REPLY = 1  # REQUEST_SUCCESS and REQUEST_FAILURE; also USERAUTH_SUCCESS, RFC 4252 section 5.1
REPLY_WITH_PORT = 5  # to a request for port 0
TUN_OPEN = 40  # tun@openssh.com, PROTOCOL section 2.3
SUBSYSTEM_SFTP = 27
KEY = 10  # channel data of one byte, RFC 4254 section 5.2
SFTP_INIT = 18  # channel data with an SSH_FXP_INIT in it


def tcpip_forward(bind_bytes: int) -> int:
    """Return the size of a tcpip-forward request with a bind name of so many letters, RFC 4254 section 7.1."""
    return 27 + bind_bytes


def direct_tcpip(host_bytes: int, originator_bytes: int) -> int:
    """Return the size of a direct-tcpip open, RFC 4254 section 7.2."""
    return 45 + host_bytes + originator_bytes


def forwarded_tcpip(bind_bytes: int, originator_bytes: int) -> int:
    """Return the size of a forwarded-tcpip open, RFC 4254 section 7.2."""
    return 48 + bind_bytes + originator_bytes


# "" and "*", localhost, and any IPv4 address or short host name; IPv6 addresses are longer and collide with -W.
_BIND_BYTES = range(16)
# From "::1" to a full IPv6 address, with names from one letter to the longest label.
_NAMES_BYTES = range(4, 103)
# A Unix-domain path, streamlocal-forward@openssh.com (PROTOCOL section 2.4), and the shortest path worth the name.
_STREAMLOCAL_BYTES = range(41 + 4, 41 + 108)


class Sizes(NamedTuple):
    """What the messages of a session cost in its two suites; sets where a name of unknown length is inside."""

    session: frozenset[int]
    no_more: int
    no_more_next: frozenset[int]
    session_next: frozenset[int]
    keepalive: int
    forward: frozenset[int]
    forward_only: frozenset[int]
    with_forward: frozenset[int]
    forward_path: frozenset[int]
    ignore: int
    direct: frozenset[int]
    confirm_client: int
    sftp: int
    sftp_init: int
    pty: int
    key: int
    key_echo: int
    reply: int
    reply_port: int
    confirm: int
    forwarded: frozenset[int]
    exact: bool


@lru_cache(maxsize=64)
def sizes_of(client: Suite, server: Suite, *, dropbear: bool = False) -> Sizes:
    """Return what each message costs, client and server each in its own suite."""

    def ours(payload_bytes: int) -> int:
        return record_bytes(client, payload_bytes)

    def theirs(payload_bytes: int) -> int:
        return record_bytes(server, payload_bytes)

    forward = frozenset(ours(tcpip_forward(size)) for size in _BIND_BYTES)
    session = frozenset([ours(SESSION_OPEN)])
    if client.compressed:
        forward = frozenset(_deflated(client, _forward_message(bind)) for bind in _BINDS)
        session = frozenset(_deflated(client, message) for message in _session_messages())
    no_more, no_more_next = ours(NO_MORE_SESSIONS), frozenset([ours(NO_MORE_SESSIONS)])
    session_next = frozenset(one + no_more for one in session)
    if client.compressed:
        session_next = frozenset(_deflated_pairs(client))
        no_more = _deflated(client, _NO_MORE)
        no_more_next = frozenset(_deflated(client, _NO_MORE, after=_forward_message(bind)) for bind in _BINDS)
    # dropbear sends no such request; who does, may open with it.
    plain = {*session} if dropbear else {no_more, ours(KEEPALIVE), *session}
    return Sizes(
        session=session,
        no_more=no_more,
        no_more_next=no_more_next,
        session_next=session_next,
        keepalive=ours(KEEPALIVE),
        forward=forward,
        # A tun device's open is of the same size as a request for localhost in some suites: its answer tells.
        forward_only=forward - plain,
        with_forward=frozenset(one + tail for one in forward for tail in _tails(session, no_more)),
        forward_path=frozenset(ours(size) for size in _STREAMLOCAL_BYTES),
        ignore=ours(IGNORE),
        direct=frozenset(ours(45 + size) for size in _NAMES_BYTES),
        confirm_client=ours(OPEN_CONFIRMATION),
        sftp=ours(SUBSYSTEM_SFTP),
        sftp_init=ours(SFTP_INIT),
        # pty-req with the terminal modes that OpenSSH, dropbear and libssh send: above 200 bytes. Paramiko and Go send
        # few or none, and are told by what is typed.
        pty=ours(200),
        key=ours(KEY),
        key_echo=theirs(KEY),
        reply=theirs(REPLY),
        reply_port=theirs(REPLY_WITH_PORT),
        confirm=theirs(OPEN_CONFIRMATION),
        forwarded=frozenset(theirs(48 + size) for size in _NAMES_BYTES),
        exact=not (client.compressed or server.compressed),
    )


def _tails(session: frozenset[int], no_more: int) -> set[int]:
    """Return what may stand behind a forward in one segment."""
    return {0, no_more, *session, *(one + no_more for one in session)}


_BINDS = (b"", b"localhost", b"127.0.0.1", b"0.0.0.0", b"10.10.10.10", b"192.168.100.100", b"*", b"::1")


def _string(value: bytes) -> bytes:
    return len(value).to_bytes(4, "big") + value


def _forward_message(bind: bytes) -> bytes:
    return b"\x50" + _string(b"tcpip-forward") + b"\x01" + _string(bind) + (39_731).to_bytes(4, "big")


def _session_messages() -> list[bytes]:
    """Session opens as the implementations send them: they differ in window and packet size only."""
    sizes = ((24_576, 32_759), (2_097_152, 32_768), (64_000, 16_384), (1_048_576, 32_768))
    return [
        b"\x5a" + _string(b"session") + bytes(4) + window.to_bytes(4, "big") + packet.to_bytes(4, "big")
        for window, packet in sizes
    ]


_NO_MORE = b"\x50" + _string(b"no-more-sessions@openssh.com") + b"\x00"


def _deflated(suite: Suite, message: bytes, after: bytes = b"") -> int:
    """Return what the first message after authentication, or the one after it, costs: zlib@openssh.com starts there.

    RFC 4253 section 6.2: each message ends in a partial flush, which is 5 bytes less than a sync flush at most.
    """
    stream = zlib.compressobj()
    if after:
        stream.compress(after)
        stream.flush(zlib.Z_PARTIAL_FLUSH)
    return record_bytes(suite, len(stream.compress(message) + stream.flush(zlib.Z_PARTIAL_FLUSH)))


# Suites that a session may be read in when its key exchange was not captured whole, the usual one of each size first.
_USUAL = (
    Suite("chacha20-poly1305@openssh.com", 8, 16, True, False),
    Suite("aes256-gcm@openssh.com", 16, 16, True, False),
    Suite("aes256-ctr", 16, 32, True, False),
    Suite("aes256-ctr", 16, 20, True, False),
    Suite("aes256-ctr", 16, 64, True, False),
    Suite("aes256-ctr", 16, 32, False, False),
    Suite("aes256-ctr", 16, 20, False, False),
    Suite("aes256-ctr", 16, 64, False, False),
)
_SERVICE = 17  # SERVICE_REQUEST and SERVICE_ACCEPT of "ssh-userauth": the one pair of equal size, RFC 4253 section 10
_BY_SERVICE: dict[int, Suite] = {record_bytes(suite, _SERVICE): suite for suite in reversed(_USUAL)}


def _deflated_pairs(suite: Suite) -> set[int]:
    """Return what a session open and no-more-sessions in one segment cost after a request for a forward."""
    return {
        _deflated(suite, session, after=_forward_message(bind))
        + _deflated(suite, _NO_MORE, after=_forward_message(bind) + session)
        for bind in _BINDS
        for session in _session_messages()
    }


# -- roles ------------------------------------------------------------------------------------------------------------

# RFC 8308 section 2.1, and OpenSSH's strict key exchange (PROTOCOL section 1.10): each side says which one it is.
_CLIENT_MARKS = ("ext-info-c", "kex-strict-c-v00@openssh.com")
_SERVER_MARKS = ("ext-info-s", "kex-strict-s-v00@openssh.com")


def role_of(kexinit: SshKexInit) -> str:
    """Return client, server, or "" where the sender does not say (old software) or says both."""
    client = any(mark in kexinit.kex for mark in _CLIENT_MARKS)
    server = any(mark in kexinit.kex for mark in _SERVER_MARKS)
    return "" if client == server else "client" if client else "server"


# -- weights ----------------------------------------------------------------------------------------------------------
# H1: the label is true; H0: any other use of SSH. P(seen | H1) is near 1 throughout: the sizes are computed.

# Under H0 the first record after authentication is a session open, a direct-tcpip open or no-more-sessions: that is
# what OpenSSH, dropbear, libssh, Paramiko, AsyncSSH and Go send, and all but private requests that RFC 4254 offers. A
# client outside these (1e-2), which sends a private request first (1e-2), of just this of 20 usual sizes: 5e-6.
REQUEST_NATS = 12.0
# The same from a client that says it is OpenSSH or dropbear, whose sources show every opening there is. Who lies here
# only makes itself readable: a fork (1e-4), a private request (1e-2), of this size (1/20): 5e-8.
REQUEST_FAMILIAR_NATS = 16.8
_FAMILIAR = ("SSH-2.0-OpenSSH_", "SSH-2.0-dropbear")
# OpenSSH writes a request for a forward out at once and queues opens until no-more-sessions is queued too: seen apart,
# another record of known size in its place (1/20). Where the first has the size of an open too, that the two were cut
# apart by TCP (one in a thousand: both fit any window).
PARTED_NATS = 3.0
PARTED_OPEN_NATS = 6.9
REQUEST_NATS_MAX = 25.0
# ... and is answered by a message of at most three bytes while no channel is open. Whatever else could have had that
# size (an open of a session, a forward, a tun device) is answered by a confirmation or a failure, which are longer:
# only a global request is answered so. What is left is a private request that wants an answer, or records misread
# after a loss that fit twice by chance (1/20 * 1/20) in a session that H0 itself makes rare (1e-3): 2e-6.
ANSWERED_NATS = 13.0
# A forward on a running session (`ssh -O forward`): the size may be typed data, the answer of three bytes or less may
# not (channel data costs more in 8-byte suites), keepalives are of another size. The rest as above, without "first".
LATER_REQUEST_NATS = 10.0
# The far side opens a channel and this side confirms. Without a session channel nothing else is that long from the
# server first and that short in return; X11 and agent opens need a session and are shorter. By chance 1/20 * 1/20 * 1/8
# (server first).
CHANNEL_OPEN_NATS = 8.0
# The same where no request was seen but the whole opening was: only the reading of the request can have failed.
UNASKED_OPEN_NATS = 7.0
# Each side says in its KEXINIT which it is, and only the server can send NEWKEYS first. With two of these three signs
# H0 is a SYN attributed to the wrong side (a forged or replayed packet), or a device that calls home (RFC 8071): 1e-10
# on a server. One sign alone may be an implementation's mistake: 1e-5.
SWAP_NATS = 23.0
SWAP_ONE_NATS = 11.5
# Benign labels accuse nobody: enough to name the flow (fusion.NAMED_NATS), more where the reading is exact.
NAME_NATS = 4.0
NAME_FIRM_NATS = 6.0

# The opening is written in one go: what follows the record before it by more than this is not part of it. A keepalive
# comes after ServerAliveInterval, which OpenSSH counts in whole seconds of the clock.
_OPENING_NS = 900_000_000
_ONE_GO_NS = 20_000_000
# Where a keepalive costs what the opening's records cost, only the pace of one loop in one process tells them apart.
_ONE_GO_ALIKE_NS = 5_000_000
_ANSWER_NS = 30_000_000_000
_TRANSFER_BYTES = 64 * 1024
_ASKED_MAX = 16
_HOSTKEYS_BYTES_MIN = 90
_KEYS_MIN = 5
# Banner, KEXINIT and the exchange itself come before the service request, from either side.
_KEY_EXCHANGE_SEGMENTS = 3
# A suite that was inferred from sizes is the wrong one once in 50 times, and must then fit by chance.
GUESSED_NATS = -4.0

_SPOTS = ("padding beyond the minimum", "requests sent while records are read in part only")


class Use(NamedTuple):
    """One thing that the state machine found; `FlowUse` without what the flow table knows."""

    use: str
    nats: float
    text: str
    blind_spots: tuple[str, ...] = ()


class _Asked(NamedTuple):
    """What the client sent before a channel was open."""

    time_ns: int
    size: int
    opening: bool


class SshSession:
    """One connection from its key exchange on. Sides are 0 for the TCP initiator and 1 for the responder."""

    def __init__(self, *, initiator_known: bool) -> None:
        self.client: int | None = None
        self._initiator_known = initiator_known
        self._kexinits: list[SshKexInit | None] = [None, None]
        self._keyed: list[int] = []
        self._sizes: Sizes | None = None
        self._guessed = False
        self._segments = [0, 0]
        self._last_plain = (0, 0)
        self._authenticated = False
        self._auth_ns = 0
        self._auth_records = 0
        self._server_ns = 0
        self._turnaround_ns = 0
        self._merged = False
        self._ignores = [False, False]
        self._asked: list[_Asked] = []
        self._said: set[str] = set()
        self._channel = False
        self._session = False
        self._requests = 0
        self._keys = 0
        self._pty = False
        self._forward_asked = False
        self._request_nats = 0.0
        self._banners = ["", ""]
        self._holes = self._auth_holes = (0, 0)
        self._open_ns: int | None = None
        self._open_size = 0
        self._last_client = (0, 0)
        self._heard = 0
        self._session_bytes = [0, 0]
        self._directs: set[int] = set()

    def banner(self, side: int, text: str) -> None:
        """Take the identification string of one side in."""
        self._banners[side] = text

    def kexinit(self, side: int, fact: SshKexInit) -> None:
        """Take the proposals of one side in; those of a later key exchange change nothing."""
        if self._kexinits[side] is None:
            self._kexinits[side] = fact

    def newkeys(self, side: int) -> list[Use]:
        """Take in that this side's records are encrypted from here on."""
        if side not in self._keyed:
            self._keyed.append(side)
        one, two = self._kexinits
        if len(self._keyed) < 2 or one is None or two is None or (self._sizes is not None and not self._guessed):
            return []
        roles = (role_of(one), role_of(two))
        if roles[0] and roles[0] == roles[1]:
            return []
        self._guessed = self._authenticated = False
        # The client cannot send NEWKEYS before it has the server's part of the exchange, RFC 4253 section 8.
        client_by_order = self._keyed[1]
        self.client = client_by_order if roles == ("", "") else int(roles[0] == "server" or roles[1] == "client")
        suites = negotiate(*((two, one) if self.client else (one, two)))
        dropbear = self._banners[self.client].startswith("SSH-2.0-dropbear")
        self._sizes = sizes_of(suites[0], suites[1], dropbear=dropbear) if suites[0] and suites[1] else None
        return self._swapped(sum(map(bool, roles)) + (client_by_order == self.client))

    def segment(self, time_ns: int, side: int, size: int, total: int, *, holes: tuple[int, int] = (0, 0)) -> list[Use]:
        """Take in so many encrypted bytes that one side sent at once; ``total`` is all that it sent so far.

        ``holes`` counts for each side how often a segment came before the one ahead of it, or without it.
        """
        self._holes = holes
        sizes = self._sizes
        if sizes is None:
            self._guess(side, size)
            return []
        from_client = side == self.client
        if not self._authenticated:
            return self._authenticate(time_ns, size, total, sizes, from_client=from_client)
        uses = self._forwarded(time_ns, size, sizes, from_client=from_client)
        if self._channel:
            uses += self._running(time_ns, size, total, sizes, from_client=from_client)
        elif from_client:
            uses += self._ask(time_ns, size, total, sizes)
        else:
            uses += self._answer(time_ns, size, total, sizes)
        if from_client:
            self._last_client = (time_ns, size)
        self._heard = 0 if from_client else max(self._heard, size)
        return uses

    def _guess(self, side: int, size: int) -> None:
        """Read the suite from the service request, where the key exchange was cut off or partly lost."""
        asker, asked = self._last_plain
        self._last_plain = (side, size)
        self._segments[side] += 1
        if all(self._kexinits) or min(self._segments) < _KEY_EXCHANGE_SEGMENTS:
            return
        suite = _BY_SERVICE.get(size)
        if suite is not None and asked == size and asker != side:
            self.client = asker
            self._guessed = True
            self._auth_records = 1
            self._sizes = sizes_of(suite, suite)

    def _swapped(self, witnesses: int) -> list[Use]:
        if self.client == 0 or not self._initiator_known:
            return []
        text = (f"the side that opened the connection is the SSH server, the side that was called is the client, by "
                f"{witnesses} of 3 signs in the key exchange")
        return [self._say("ssh-role-swap", SWAP_NATS if witnesses > 1 else SWAP_ONE_NATS, text,
                          ("devices that call home by design, RFC 8071",))]

    def _say(self, use: str, nats: float, text: str, blind_spots: tuple[str, ...] = ()) -> Use:
        self._said.add(use)
        return Use(use, nats, text, blind_spots)

    def _name(self, use: str, nats: float, text: str) -> list[Use]:
        """Say a benign use, once."""
        return [] if use in self._said else [self._say(use, nats, text)]

    # -- authentication -----------------------------------------------------------------------------------------------

    def _authenticate(self, time_ns: int, size: int, total: int, sizes: Sizes, *, from_client: bool) -> list[Use]:
        """USERAUTH_SUCCESS is one byte long; nothing else that a server says before it is shorter than 14."""
        if not from_client:
            self._server_ns = time_ns
        elif self._server_ns:
            # How long the client takes from here: nothing on its own host, a round trip on the server's.
            self._turnaround_ns = max(self._turnaround_ns, min(time_ns - self._server_ns, _OPENING_NS))
        if size == (sizes.ignore if from_client else sizes.reply_port) and sizes.reply != sizes.reply_port:
            self._ignores[0 if from_client else 1] = True
            return []
        if not from_client:
            confusable = self._ignores[1] and sizes.reply == sizes.reply_port
            if self._auth_records >= 2 and size == sizes.reply and not confusable:
                return self._accept(time_ns)
            # Nothing that short comes before the login was tried, but for an IGNORE: success cannot be told then.
            self._ignores[1] |= size == sizes.reply and sizes.reply == sizes.reply_port
            # Success and the host keys after it in one segment: only the client's next record can tell.
            self._merged = self._auth_records >= 2 and size >= sizes.reply + _HOSTKEYS_BYTES_MIN
            return []
        self._auth_records += 1
        opening = {sizes.no_more, *sizes.forward_only, *(one + sizes.no_more for one in sizes.session)}
        if self._merged and size in opening:
            return [*self._accept(time_ns), *self._ask(time_ns, size, total, sizes)]
        self._merged = False
        return []

    def _accept(self, time_ns: int) -> list[Use]:
        self._authenticated = True
        self._auth_ns = time_ns
        self._auth_holes = self._holes
        return [self._say("authenticated", 0.0, "the server accepted the login")]

    # -- before a channel is open -------------------------------------------------------------------------------------

    def _ask(self, time_ns: int, size: int, total: int, sizes: Sizes) -> list[Use]:
        if "ssh-reverse-channel-open" in self._said or (size == sizes.ignore and self._ignores[0]):
            return []
        first = not self._asked
        opening = time_ns - self._auth_ns < _OPENING_NS
        if first and size == sizes.keepalive:
            opening = time_ns - self._auth_ns <= _ONE_GO_NS + self._turnaround_ns
        keepalive = size == sizes.keepalive and not opening
        if keepalive:
            uses = self._name("keepalive", 0.0, f"a keepalive of {size} bytes")
            if [one.size for one in self._asked] == [sizes.no_more]:
                uses += self._name("ssh-local-forward", NAME_NATS, "a session without a channel, held open (-N), and "
                                   "no port of the far side asked for")
            return uses
        if not first and self._session_began(time_ns, size, sizes):
            return self._running(time_ns, size, total, sizes, from_client=True)
        if not first and size != sizes.no_more and self._onwards(self._asked[0], sizes) and not self._request_nats:
            self._channel = True
            return self._name("ssh-jump", NAME_FIRM_NATS, f"the first record, {self._asked[0].size} bytes, opens a "
                              "connection onwards and nothing else")
        before = self._asked[-1] if self._asked else None
        if before is not None:
            go_ns = _ONE_GO_ALIKE_NS if sizes.no_more == sizes.keepalive else _ONE_GO_NS
            opening = before.opening and time_ns - before.time_ns <= go_ns
            opening = opening and (before.size != sizes.no_more or size != sizes.keepalive or size == sizes.no_more)
        # What is missing may be the session's open: then the first record that was seen is not the first that was sent.
        opening = opening and self._holes[self.client or 0] == self._auth_holes[self.client or 0]
        if len(self._asked) < _ASKED_MAX:
            self._asked.append(_Asked(time_ns, size, opening))
        follows = size in sizes.no_more_next or size in sizes.session_next
        if before is not None and opening and follows and all(
                self._is_forward(one, sizes) for one in self._asked[:-1]):
            return self._parted(self._asked[0], sizes, opened=size in sizes.session_next)
        if first and opening and size in sizes.forward_only:
            text = (f"the first record after the login has {size} bytes, as tcpip-forward has in this cipher suite and "
                    f"no other opening")
            return self._request(REQUEST_FAMILIAR_NATS if self._familiar() else REQUEST_NATS, text)
        return []

    def _request(self, nats: float, text: str) -> list[Use]:
        """Say a request for a forward, as far as it was not yet said: what all its signs weigh together is bounded."""
        if self._guessed and not self._request_nats:
            nats += GUESSED_NATS
        nats = min(nats, REQUEST_NATS_MAX - self._request_nats)
        if nats <= 0:
            return []
        self._request_nats += nats
        return [self._say("ssh-reverse-forward-request", nats, text, _SPOTS)]

    def _familiar(self) -> bool:
        return self.client is not None and self._banners[self.client].startswith(_FAMILIAR)

    def _parted(self, first: _Asked, sizes: Sizes, *, opened: bool) -> list[Use]:
        """What came first was written out before the session's open or no-more-sessions was thought of.

        OpenSSH does so with requests for forwards only; opens are written together with no-more-sessions, and it opens
        one session at most.
        """
        if first.size not in sizes.forward and first.size not in sizes.forward_path:
            return []
        alone = sizes.exact and (opened or first.size not in sizes.session) and first.size not in sizes.direct
        if alone and self._request_nats == 0.0 and self._familiar():
            nats = REQUEST_FAMILIAR_NATS + PARTED_NATS
        elif alone:
            nats = PARTED_NATS
        else:
            nats = PARTED_OPEN_NATS
        text = (f"a first record of {first.size} bytes was written out before "
                f"{'a session was opened' if opened else 'no-more-sessions'}, as a request for a forward is and an "
                "open is not")
        return self._request(nats, text)

    def _session_began(self, time_ns: int, size: int, sizes: Sizes) -> bool:
        """The confirmation was missed, among other messages in one segment, if the client goes on after its open.

        Nothing but no-more-sessions follows a session open before that, and no forward follows no-more-sessions.
        """
        last = self._asked[-1]
        alone = last.size in sizes.session and last.size != sizes.no_more
        whole = any(last.size == one + sizes.no_more for one in sizes.session)
        tails = {one + end for one in sizes.session for end in (0, sizes.no_more)}
        going_on = time_ns - last.time_ns <= _ONE_GO_NS and (size in tails or size == sizes.no_more)
        began = (whole or (alone and not going_on)) and self._heard >= sizes.confirm
        if began:
            self._channel = self._session = True
        return began

    def _answer(self, time_ns: int, size: int, total: int, sizes: Sizes) -> list[Use]:
        replies, confirmed = self._split(size, sizes)
        uses: list[Use] = []
        asked = [one for one in self._asked if time_ns - one.time_ns < _ANSWER_NS]
        if replies and asked and not self._forward_asked:
            uses += self._forward_answered(asked, replies, size, sizes)
        if replies == 0 and size == sizes.reply:
            uses += self._later_request(time_ns, sizes)
        if confirmed and asked and "ssh-reverse-channel-open" not in self._said:
            uses += self._opened(asked, sizes, total)
        return uses

    def _split(self, size: int, sizes: Sizes) -> tuple[int, bool]:
        """Return (answers to global requests, whether a channel was confirmed) that a server's segment holds.

        There are at most as many answers as there were requests: other messages can be multiples of them too.
        """
        answers_max = sum(self._is_forward(one, sizes) for one in self._asked)
        for answers in range(answers_max + 1):
            if size == answers * sizes.reply + sizes.confirm:
                return answers, True
            if answers and size == answers * sizes.reply:
                return answers, False
        # Port 0 asked for: the answer carries the port. Or an IGNORE, where this server sends such.
        with_port = size == sizes.reply_port and "ssh-reverse-forward-request" in self._said and not self._ignores[1]
        return (1, False) if answers_max and with_port else (0, False)

    def _is_forward(self, one: _Asked, sizes: Sizes) -> bool:
        first = one is self._asked[0]
        return one.opening and (one.size in sizes.with_forward or (first and one.size in sizes.forward_path))

    def _forward_answered(self, asked: list[_Asked], replies: int, size: int, sizes: Sizes) -> list[Use]:
        """A global request was answered, and no channel is open: a forward was asked for."""
        opening = [one for one in asked if self._is_forward(one, sizes)]
        # no-more-sessions wants no answer: alone it explains none.
        if not opening or (len(opening) == 1 and opening[0].size == sizes.no_more):
            return []
        self._forward_asked = True
        known = "ssh-reverse-forward-request" in self._said
        if not known and not sizes.exact:
            # Compressed, an answer is not told from the many other small messages by its size.
            return []
        nats = ANSWERED_NATS if known else REQUEST_NATS + ANSWERED_NATS
        text = (f"{'the' if known else 'a'} request of {opening[0].size} bytes was answered by {replies} record(s) of "
                f"{sizes.reply if size != sizes.reply_port else size} bytes with no channel open: tcpip-forward")
        return self._request(nats, text)

    def _opened(self, asked: list[_Asked], sizes: Sizes, total: int) -> list[Use]:
        """The first channel is open; whose, follows from what was asked."""
        self._channel = True
        tails = {size + end for size in sizes.session for end in (0, sizes.no_more)}
        forwards = {0, *sizes.forward}
        opening = [one for one in asked if one.opening]
        # Session, no-more-sessions and forward cost the same in some suites; what was asked last was confirmed.
        self._session = asked[-1] in opening and any(one.size - add in tails for one in opening for add in forwards)
        self._session_bytes = [total, total]
        if self._session:
            return []
        if self._onwards(asked[0], sizes) and asked[-1].opening:
            return self._name("ssh-jump", NAME_FIRM_NATS, f"the first record, {asked[0].size} bytes, opens a "
                              "connection onwards and nothing else")
        return self._local(asked[-1].size) if asked[-1].size in sizes.direct else []

    def _onwards(self, first: _Asked, sizes: Sizes) -> bool:
        """Return whether a session opened with direct-tcpip (-W), alone or with no-more-sessions."""
        alone = first.size in sizes.direct or first.size - sizes.no_more in sizes.direct
        return sizes.exact and alone and first.size not in sizes.with_forward and first.opening

    # -- forwards in use ----------------------------------------------------------------------------------------------

    def _forwarded(self, time_ns: int, size: int, sizes: Sizes, *, from_client: bool) -> list[Use]:
        """A channel that the far side opens into this host: server first, then the client's confirmation."""
        if not from_client:
            quiet = time_ns - self._last_client[0] > 1_000_000
            fits = size in sizes.forwarded or not sizes.exact
            may = self._forward_asked or not self._session
            self._open_ns = time_ns if fits and quiet and may and self._setup_over(time_ns) else None
            self._open_size = size
            return []
        waiting, self._open_ns = self._open_ns, None
        if waiting is None or size != sizes.confirm_client:
            return []
        if not self._forward_asked and ("ssh-reverse-forward-request" in self._said or self._channel):
            return []
        nats = CHANNEL_OPEN_NATS if self._forward_asked else UNASKED_OPEN_NATS
        if not sizes.exact:
            nats /= 2
        if "ssh-reverse-channel-open" in self._said:
            nats = 0.0
        text = (f"the far side opened a channel into this host ({self._open_size} bytes) and it was confirmed "
                f"({size} bytes) {(time_ns - waiting) / 1e6:.1f} ms later")
        return [self._say("ssh-reverse-channel-open", nats, text, _SPOTS)]

    def _setup_over(self, time_ns: int) -> bool:
        """Host keys and banners come within the opening; a forwarded channel comes after the request was answered."""
        return self._forward_asked or time_ns - self._auth_ns > _OPENING_NS

    def _local(self, size: int) -> list[Use]:
        self._directs.add(size)
        uses = self._name("ssh-local-forward", NAME_NATS, f"this side opened a connection onwards ({size} bytes) and "
                          "it was confirmed")
        if len(self._directs) >= 2:
            uses += self._name("ssh-dynamic-forward", NAME_NATS + 1, "connections onwards to names of several "
                               f"lengths: {sorted(self._directs)} bytes")
        return uses

    # -- with a channel open ------------------------------------------------------------------------------------------

    def _running(self, time_ns: int, size: int, total: int, sizes: Sizes, *, from_client: bool) -> list[Use]:
        if not self._session:
            if not from_client and size == sizes.confirm and self._last_client[1] in sizes.direct:
                return [] if "ssh-reverse-channel-open" in self._said else self._local(self._last_client[1])
            return []
        uses: list[Use] = []
        if from_client:
            self._requests += 1
        elif (self._last_client[1] == sizes.key and sizes.key_echo <= size <= 3 * sizes.key_echo
              and "ssh-exec" in self._said):
            self._keys += 1
            if self._keys == _KEYS_MIN:
                self._pty = True
                return self._name("ssh-interactive", NAME_FIRM_NATS, f"{_KEYS_MIN} keys were typed and echoed")
        if from_client and not self._said & {"ssh-interactive", "ssh-exec"}:
            if size >= sizes.pty:
                self._pty = True
                return self._name("ssh-interactive", NAME_FIRM_NATS, f"a terminal was asked for ({size} bytes)")
            return self._name("ssh-exec", NAME_NATS, f"a command or subsystem was asked for ({size} bytes)")
        if not self._pty and total - self._session_bytes[0] > _TRANSFER_BYTES:
            uses += self._name("ssh-transfer", NAME_FIRM_NATS, f"{total} bytes one way and no terminal")
        if not from_client and size > 200 and self._last_client[1] == sizes.sftp_init and self._requests == 2:
            uses += self._name("ssh-transfer", NAME_NATS + 1, "the opening of SFTP")
        if not from_client and size == sizes.reply:
            uses += self._later_request(time_ns, sizes)
        return uses

    def _later_request(self, time_ns: int, sizes: Sizes) -> list[Use]:
        """A global request later on, `ssh -O forward`: its answer is shorter than any data can be, or none may flow."""
        when, size = self._last_client
        # Without a channel, if none can have been opened unseen, even where a key's echo costs what an answer does.
        no_data = not self._channel and self._holes == self._auth_holes
        unmistakable = sizes.exact and (no_data or (self._channel and sizes.reply < sizes.reply_port))
        # no-more-sessions is over by now, whatever it costs; a keepalive or another session may come at any time.
        forward = size in sizes.forward and size != sizes.keepalive and size not in sizes.session
        if not unmistakable or not forward or time_ns - when > 1_000_000_000 or self._forward_asked:
            return []
        self._forward_asked = True
        text = f"on the running session a request of {size} bytes was answered by {sizes.reply} bytes: tcpip-forward"
        return self._request(LATER_REQUEST_NATS, text)
