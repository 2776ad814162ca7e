"""The state machine over the sizes of a session's records: what is it used for, and who may come through it.

RFC 4254 fixes what may follow what. Nothing here is learnt from captures, and nothing hangs on ports or addresses.

Interactive messages travel one write a segment. Where a segment holds several records its size is split into the
messages that may stand there; what cannot be split is left unread, never guessed.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, NamedTuple

from gpuguard.core.ssh.host_keys import host_keys
from gpuguard.core.ssh.inner import FromServer, Nested
from gpuguard.core.ssh.roles import role_of
from gpuguard.core.ssh.sizes import BY_SERVICE, Sizes, sizes_of
from gpuguard.core.ssh.suites import IGNORING, PLAIN_CLIENTS, Suite, negotiate, record_bytes
from gpuguard.core.ssh.visitor import Visitor

if TYPE_CHECKING:
    from gpuguard.core.records import SshKexInit

_GRANTING = "SSH-2.0-OpenSSH_"  # opens the window of a session when it grants what runs in it

# H1: the label is true; H0: any other use of SSH. P(seen | H1) is near 1 throughout: the sizes are computed.

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
_FAMILIAR = ("SSH-2.0-OpenSSH_", "SSH-2.0-dropbear")
# Clients that were run, and of their own accord ask for nothing that wants an answer before a channel is open. Others
# may: Twisted's begins with a keepalive of its own, as long as a request for a port, and so may every tenth; one in
# five is as long.
_KNOWN = (*PLAIN_CLIENTS, "SSH-2.0-OpenSSH_", "SSH-2.0-PuTTY_", "SSH-2.0-JSCH-", "SSH-2.0-Erlang/")
REQUEST_STRANGER_NATS_MAX = 3.9
# Where a segment was not read that may have held a confirmation, and the client went on, that may have been a command
# and its answer: what tells against it is that a channel's open has this size (1/20), and the command (1/20).
REQUEST_DOUBTED_NATS_MAX = 5.3
# The same of OpenSSH, which says no more after a session's open in one connection of 50 (ControlMaster) only: hidden in
# what was not read (1/20), and then a request of this size (1/10).
REQUEST_DOUBTED_OPENSSH_NATS = 9.2
# An answer beside a record of a length that the server said before, and no other answer fits beside one. OpenSSH's
# server says what it tells of a key twice; in one login of 20 the second differs, and then by just this in one of 20.
ANSWERED_BESIDE_NATS = 6.0
# Several answers in one segment cost what another record may cost: one segment in five has such, one in 20 of this
# size. That a channel was confirmed among them is sure when the client goes on, unless that was within a segment that
# was not read (1/20).
ANSWERED_SUM_NATS = 4.6
ANSWERED_SUM_UNREAD_NATS = 3.0
# OpenSSH writes a request for a forward out at once and queues opens until no-more-sessions is queued too: seen apart,
# another record of known size in its place (1/20). Where the first has the size of an open too, that the two were cut
# apart by TCP (one in a thousand: both fit any window).
PARTED_NATS = 3.0
PARTED_OPEN_NATS = 6.9
# Where the first costs what no-more-sessions does, and the second what an open onwards to a long name does (1/50), it
# may be a local port (-N -L) that was dialled as soon as it was there (1/200).
PARTED_ONWARDS_NATS = 9.2
REQUEST_NATS_MAX = 25.0
# Where segments before the login were missed and the suite was inferred, the login itself is misread once in ten times,
# and all that follows with it; by chance it fits then (1/20).
REQUEST_LOST_NATS_MAX = 5.3
# ... and is answered by a message of at most three bytes while no channel is open. Whatever else could have had that
# size (an open of a session, a forward, a tun device) is answered by a confirmation or a failure, which are longer:
# only a global request is answered so. What is left is a private request that wants an answer, or records misread
# after a loss that fit twice by chance (1/20 * 1/20) in a session that H0 itself makes rare (1e-3): 2e-6.
ANSWERED_NATS = 13.0
# The open of a tun device was confirmed by a record of that size: by chance 1/20.
TUN_CONFIRMED_NATS = 3.0
# A forward on a running session (`ssh -O forward`): the size may be typed data, the answer of three bytes or less may
# not (channel data costs more in 8-byte suites), keepalives are of another size. The rest as above, without "first".
LATER_REQUEST_NATS = 10.0
# In AEAD and encrypt-then-MAC suites with 16-byte blocks that answer is as long as two typed bytes' echo. What a person
# pastes is echoed at its length, but for passwords: one session with a terminal in twenty has that.
LATER_ALIKE_NATS = 3.0
# With classic MACs no data is as short as that answer, but a keepalive costs what the request costs. Where the line was
# silent for longer than before it, by more than the second that OpenSSH's clock is coarse, no keepalive was due: but a
# client that was held up (one session in a hundred, of the tenth that has keepalives).
LATER_OFF_BEAT_NATS = 7.0
# The far side opens a channel and this side confirms. Without a session channel nothing else is that long from the
# server first and that short in return; X11 and agent opens need a session and are shorter. By chance 1/20 * 1/20 * 1/8
# (server first).
CHANNEL_OPEN_NATS = 8.0
# Beside a terminal, when a request may have been made: out of a silence the far side sends as much as a prompt has, and
# the client what a cursor key has, or a terminal's answer to a question, in the time that programs take. Who does so
# before any request may have been made, does so again: that session is not judged. Once in fifty of the rest.
LATER_OPEN_NATS = 4.0
# ... and it ended as a channel does, with messages that are too short for data, and no exit status: 1/50.
LATER_CLOSE_NATS = 4.0
# The same where no request was seen but the whole opening was: only the reading of the request can have failed.
UNASKED_OPEN_NATS = 7.0
# In none of some 700 tunnels of the lab that were used for something else, or not at all, was it seen, counted at the
# rule-of-three bound: a service used line by line is asked so too.
VISITED_NATS = 5.4
# Each side says in its KEXINIT which it is, and only the server can send NEWKEYS first. With two of these three signs
# H0 is a SYN attributed to the wrong side (a forged or replayed packet), or a device that calls home (RFC 8071): 1e-10
# on a server. One sign alone may be an implementation's mistake: 1e-5.
SWAP_NATS = 23.0
SWAP_ONE_NATS = 11.5
# Benign labels accuse nobody: enough to name the flow (fusion.NAMED_NATS), more where the reading is exact.
NAME_NATS = 4.0
NAME_FIRM_NATS = 6.0
# No use could be told where nobody was let in: enough for that name, and less than any use has.
NAME_REFUSED_NATS = 3.0

# The opening is written in one go: what follows the record before it by more than this is not part of it. A keepalive
# comes after ServerAliveInterval, which OpenSSH counts in whole seconds of the clock.
_OPENING_NS = 900_000_000
_ONE_GO_NS = 20_000_000
# Where a keepalive costs what no-more-sessions costs, only the pace of one loop in one process tells them apart.
_ONE_GO_ALIKE_NS = 5_000_000
_ANSWER_NS = 30_000_000_000
# A port of this host is connected to at once; with other channels on the line no more time than that is given.
_CONFIRMED_NS = 40_000_000
_OWED_NS = 3_000_000_000
# What two sides do that wait for nothing from each other.
_SILENCE_NS = 300_000_000
_COARSE_NS = 1_100_000_000
# They send a keepalive so long after the server was heard last (client_process_net_input in clientloop.c; _recv_data
# in AsyncSSH). dropbear counts from what it sent itself, and programs in Go by a clock of their own.
_SILENCE_COUNTING = ("SSH-2.0-OpenSSH_", "SSH-2.0-AsyncSSH")
# Their keepalives want no answer: "keepalive@lag.net", and want_reply false.
_UNANSWERED = ("SSH-2.0-paramiko", "SSH-2.0-libssh_", "SSH-2.0-libssh-")
_TRANSFER_BYTES = 64 * 1024
_ASKED_MAX = 16
_HOSTKEYS_BYTES_MIN = 90
_CHATTER_MAX = 12
# What tells of a single key, or asks for its proof, may be anything else as well.
_HOSTKEYS_TOLD_MIN = 140
_KEYS_MIN = 5
# Banner, KEXINIT and the exchange itself come before the service request, from either side.
_KEY_EXCHANGE_SEGMENTS = 3
# A suite that was inferred from sizes is the wrong one once in 50 times, and must then fit by chance.
GUESSED_NATS = -4.0

# What an inner session runs in, by what was said of the outer one; the first that fits.
_AROUND = (
    ("reverse-tunnel", {"ssh-reverse-forward-request", "ssh-reverse-channel-open"}),
    ("jump", {"ssh-jump"}),
    ("dynamic-forward", {"ssh-dynamic-forward"}),
    ("local-forward", {"ssh-local-forward"}),
    ("exec", {"ssh-exec"}),
)
_SESSIONS = ("interactive", "transfer", "exec")

_SPOTS = ("padding beyond the minimum", "requests sent while records are read in part only")
_VISITOR_SPOTS = ("a database or another service used line by line through the tunnel",)


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
        self._auth_bytes = 0
        self._served = False
        self._failure_bytes = 0
        self._refusals = 0
        self._owed_ns: int | None = None
        self._early = False
        self._server_ns = 0
        self._client_ns = 0
        self._answer_ns = _OPENING_NS
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
        self._tun = False
        self._forward_asked = False
        self._may_be_asked = False
        self._request_nats = 0.0
        self._banners = ["", ""]
        self._holes = self._auth_holes = (0, 0)
        self._open_ns: int | None = None
        self._open_size = 0
        self._last_client = self._last_server = (0, 0)
        self._waited_ns = 0
        self._silence_ns = 0
        self._setting_up = False
        self._answers_at_once = False
        self._sftp_asked = False
        self._long_request = 0
        self._opened_later = False
        self._heard = 0
        #: The longest that the server said since the client's last word and that was not read; and whether it may have
        #: held what an open is answered by, so that what came after it is in doubt.
        self._unread = 0
        self._doubted = False
        #: An answer was read beside another record, or among several; what it weighs more when the client goes on.
        self._beside = self._weak = False
        self._due = 0.0
        #: Lengths of host keys, of proofs by what asks for them, and of what else the server said of its own accord.
        self._announced: frozenset[int] = frozenset()
        self._proofs: dict[int, frozenset[int]] = {}
        self._proved: frozenset[int] = frozenset()
        self._heard_keys = False
        self._chatter: set[int] = set()
        self._session_bytes = [0, 0]
        self._directs: set[int] = set()
        self._visitor: Visitor | None = None
        self._nested: Nested | None = None
        self._from_server: FromServer | None = None

    def banner(self, side: int, text: str) -> None:
        """Take the identification string of one side in."""
        self._banners[side] = text
        self._ignores[side] |= text.startswith(IGNORING)

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
        banners = (self._banners[self.client], self._banners[1 - self.client])
        suites = negotiate(*((two, one) if self.client else (one, two)), banners)
        no_more = not banners[0].startswith(PLAIN_CLIENTS)
        if suites[0] is None or suites[1] is None:
            self._sizes = None
        else:
            self._sizes = sizes_of(suites[0], suites[1], no_more_sessions=no_more)
            self._know_keys(suites[0], suites[1], (two if self.client == 0 else one).host_key)
        return self._swapped(sum(map(bool, roles)) + (client_by_order == self.client))

    def _know_keys(self, client: Suite, server: Suite, algorithms: tuple[str, ...]) -> None:
        """Compute what is said about the server's host keys after the login."""
        known = host_keys(algorithms) if not client.compressed and not server.compressed else []
        keys = [one for one in known if one.announced > _HOSTKEYS_TOLD_MIN]
        self._announced = frozenset(record_bytes(server, one.announced) for one in keys)
        self._proofs = {record_bytes(client, one.prove): frozenset(record_bytes(server, size) for size in one.proofs)
                        for one in keys}

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
        if self._about_keys(size, sizes, from_client=from_client):
            if from_client:
                self._doubt(sizes)
            return []
        uses, self._due, due = [], 0.0, self._due
        if due and from_client and size > sizes.ignore:
            self._weak = False
            uses += self._request(due, f"and this side went on ({size} bytes): a channel was confirmed there too")
        uses += self._forwarded(time_ns, size, sizes, from_client=from_client)
        uses += self._visited(time_ns, size, sizes, from_client=from_client)
        if sizes.exact:
            uses += self._inner(time_ns, size, sizes, from_client=from_client)
        if self._channel:
            uses += self._running(time_ns, size, total, sizes, from_client=from_client)
        elif from_client:
            uses += self._ask(time_ns, size, total, sizes)
        else:
            uses += self._answer(time_ns, size, total, sizes)
        self._remember(time_ns, size, sizes, from_client=from_client)
        return uses

    def _about_keys(self, size: int, sizes: Sizes, *, from_client: bool) -> bool:
        """Return whether this is about the host keys and nothing else: a client may ask at once to have them proved."""
        if not from_client:
            if size in self._proved:
                self._proved = frozenset()
                return True
            more = any(size - sizes.confirm - one in self._announced for one in (0, *self._chatter))
            alone = size in self._announced and not self._heard_keys and not more
            self._heard_keys |= alone
            if alone and not self._banners[self.client or 0].startswith(_GRANTING):
                # Who waits for its answers does not go on by this: then a confirmation beside fewer keys is as long.
                self._unread = max(self._unread, size)
            return alone
        if size not in self._proofs or self._requests or not self._heard_keys or not self._asked:
            return False
        self._proved = self._proofs[size]
        self._proofs = {}
        self._chatter |= self._proved
        return True

    def _remember(self, time_ns: int, size: int, sizes: Sizes, *, from_client: bool) -> None:
        """Keep what the next segment is judged by."""
        if from_client and size == sizes.ignore != sizes.key and self._ignores[self.client or 0]:
            return
        if self._last_server[0] and not (from_client and size == sizes.keepalive):
            self._silence_ns = max(self._silence_ns, time_ns - max(self._last_client[0], self._last_server[0]))
        if from_client:
            self._waited_ns = time_ns - self._last_server[0]
            self._setting_up = self._last_client[1] in sizes.session and self._last_server[1] in sizes.confirms
            self._last_client = (time_ns, size)
            if self._session and size == sizes.keepalive and self._awaits_keepalives():
                self._owed_ns = time_ns
        else:
            self._last_server = (time_ns, size)
            if size == sizes.reply:
                self._owed_ns = None
        self._heard = 0 if from_client else max(self._heard, size)
        if from_client:
            self._unread = 0

    def _guess(self, side: int, size: int) -> None:
        """Read the suite from the service request, where the key exchange was cut off or partly lost."""
        asker, asked = self._last_plain
        self._last_plain = (side, size)
        self._segments[side] += 1
        if all(self._kexinits) or min(self._segments) < _KEY_EXCHANGE_SEGMENTS:
            return
        suite = BY_SERVICE.get(size)
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
            if self._server_ns <= self._client_ns:
                self._answer_ns = min(self._answer_ns, time_ns - self._client_ns)
            self._server_ns = time_ns
        else:
            if self._server_ns:
                # How long the client takes from here: nothing on its own host, a round trip on the server's.
                self._turnaround_ns = max(self._turnaround_ns, min(time_ns - self._server_ns, _OPENING_NS))
            self._client_ns = time_ns
        if size == (sizes.ignore if from_client else sizes.reply_port) and sizes.accepted != sizes.reply_port:
            self._ignores[0 if from_client else 1] = True
            return []
        if not from_client:
            if size == sizes.service and not self._served:
                # What the client sent until now was its EXT_INFO (RFC 8308) and its request for this service.
                self._served, self._auth_records = True, 1
            confusable = self._ignores[1] and sizes.accepted == sizes.reply_port
            if self._auth_records >= 2 and size == sizes.accepted and not confusable:
                return self._accept(time_ns)
            # Nothing that short comes before the login was tried, but for an IGNORE: success cannot be told then.
            self._ignores[1] |= size == sizes.accepted and sizes.accepted == sizes.reply_port
            # Success and the host keys after it in one segment: only the client's next record can tell. To the first
            # attempt, which is mostly "none", an EXT_INFO or a banner may be answered as well, which are as long.
            self._merged = (self._auth_records >= 3 or self._auth_bytes > sizes.none_max
                            ) and size >= sizes.accepted + _HOSTKEYS_BYTES_MIN
            return self._refused(size, sizes)
        self._auth_records += 1
        self._auth_bytes = size
        opening = {sizes.no_more, *sizes.forward_only, *(one + sizes.no_more for one in sizes.session)}
        # What is missing may have been the answer that this record goes with.
        if self._merged and size in opening and self._holes == (0, 0):
            return [*self._accept(time_ns), *self._ask(time_ns, size, total, sizes)]
        self._merged = False
        return []

    def _refused(self, size: int, sizes: Sizes) -> list[Use]:
        """USERAUTH_FAILURE names what else may be tried, and is of one length throughout, RFC 4252 section 5.1.

        The first answers "none", by which a client asks for that list; an EXT_INFO may hide it. Keys and passwords make
        long requests, keyboard-interactive short ones, whose answers are prompts.
        """
        if not self._served or self._auth_records < 2 or size not in sizes.failures:
            return []
        first = self._auth_records == 2
        self._failure_bytes = self._failure_bytes or (size if self._auth_records <= 3 else 0)
        if first or size != self._failure_bytes or self._auth_bytes < sizes.attempt_min:
            return []
        self._refusals += 1
        nats = NAME_REFUSED_NATS if self._refusals == 1 else 0.0
        return [self._say("ssh-login-refused", nats, f"the server refused a login, {self._refusals} time(s) by now")]

    def _accept(self, time_ns: int) -> list[Use]:
        self._authenticated = True
        self._auth_ns = time_ns
        self._auth_holes = self._holes
        return [self._say("authenticated", 0.0, "the server accepted the login")]

    # -- before a channel is open -------------------------------------------------------------------------------------

    def _ask(self, time_ns: int, size: int, total: int, sizes: Sizes) -> list[Use]:
        self._doubt(sizes)
        if "ssh-reverse-channel-open" in self._said or (size == sizes.ignore and self._ignores[0]):
            return []
        first = not self._asked and not self._early
        opening = time_ns - self._auth_ns < _OPENING_NS
        if first and size == sizes.keepalive:
            opening = time_ns - self._auth_ns <= self._go_ns()
        keepalive = size == sizes.keepalive and not opening
        if keepalive:
            # On a busy client it may have been the opening all the same: what follows is then not the first record.
            self._owed_ns = time_ns
            self._early |= time_ns - self._auth_ns < _OPENING_NS
            if size in sizes.session and len(self._asked) < _ASKED_MAX:
                # ... or it opened a session: the answer tells.
                self._asked.append(_Asked(time_ns, size, False))
            uses = self._name("keepalive", 0.0, f"a keepalive of {size} bytes")
            only = {sizes.no_more, sizes.keepalive}
            if self._asked and self._asked[0].size == sizes.no_more and all(one.size in only for one in self._asked):
                uses += self._name("ssh-local-forward", NAME_NATS, "a session without a channel, held open (-N), and "
                                   "no port of the far side asked for")
            return uses
        if self._asked and (self._session_began(time_ns, size, sizes) or self._went_on(time_ns, size, sizes)):
            return self._taken_back() + self._running(time_ns, size, total, sizes, from_client=True)
        # What does not follow at once follows an answer: had forwards been asked for, that was read.
        late = bool(self._asked) and time_ns - self._asked[-1].time_ns > self._go_ns() and not self._forward_asked
        onwards = self._asked and self._onwards(self._asked[0], sizes, answered=0 if late else None)
        if onwards and size != sizes.no_more and not self._request_nats:
            self._channel = True
            return self._name("ssh-jump", NAME_FIRM_NATS, f"the first record, {self._asked[0].size} bytes, opens a "
                              "connection onwards and nothing else")
        before = self._asked[-1] if self._asked else None
        if before is not None:
            go_ns = _ONE_GO_ALIKE_NS if size == sizes.no_more == sizes.keepalive else self._go_ns()
            opening = before.opening and time_ns - before.time_ns <= go_ns
            opening = opening and (before.size != sizes.no_more or size != sizes.keepalive or size == sizes.no_more)
        # What is missing may be the session's open, or its confirmation: then this is not what follows the login.
        opening = opening and self._whole()
        if len(self._asked) < _ASKED_MAX:
            self._asked.append(_Asked(time_ns, size, opening))
        if size == sizes.keepalive and not opening:
            self._owed_ns = time_ns
        follows = size in sizes.no_more_next or size in sizes.session_next
        if before is not None and opening and follows and not self._gathers() and all(
                self._forwards_in(one, sizes) for one in self._asked[:-1]):
            return self._parted(self._asked[0], size, sizes)
        # A tun device's open costs what a request for localhost costs in some suites: the answer tells.
        self._tun |= first and opening and size in sizes.tun and self._familiar() and not self._gathers()
        at_once = time_ns - self._auth_ns <= self._go_ns()
        if first and at_once and opening and self._gathers() and size in sizes.gathered:
            text = (f"the first record after the login has {size} bytes, as tcpip-forward with what follows it has in "
                    "this cipher suite, and no other opening")
            return self._request(REQUEST_GATHERED_NATS, text)
        # Libraries may open a connection onwards first, which costs as much: the answer tells then.
        if first and opening and size in sizes.forward_only and (self._familiar() or size not in sizes.direct):
            text = (f"the first record after the login has {size} bytes, as tcpip-forward has in this cipher suite and "
                    f"no other opening")
            return self._request(REQUEST_FAMILIAR_NATS if self._familiar() else REQUEST_NATS, text)
        return []

    def _doubt(self, sizes: Sizes) -> None:
        """What is answered from here on may be a command, on what was opened and confirmed unread."""
        if not sizes.exact or self._unread < sizes.confirm:
            return
        opens = sizes.session | sizes.direct
        self._doubted |= any(one.size - tail in opens for one in self._asked for tail in (0, sizes.no_more))

    def _request(self, nats: float, text: str) -> list[Use]:
        """Say a request for a forward, as far as it was not yet said: what all its signs weigh together is bounded."""
        if self._guessed and not self._request_nats:
            nats += GUESSED_NATS
        most = REQUEST_LOST_NATS_MAX if self._guessed and any(self._auth_holes) else REQUEST_NATS_MAX
        if self._doubted:
            openssh = self._banners[self.client or 0].startswith(_GRANTING)
            most = min(most, REQUEST_DOUBTED_OPENSSH_NATS if openssh else REQUEST_DOUBTED_NATS_MAX)
        if self._stranger():
            most = min(most, REQUEST_STRANGER_NATS_MAX)
        nats = min(nats, most - self._request_nats)
        if nats <= 0:
            return []
        self._request_nats += nats
        return [self._say("ssh-reverse-forward-request", nats, text, _SPOTS)]

    def _go_ns(self) -> int:
        """Return how far apart may stand what a client writes in one go.

        TCP holds a small segment until the one before is acknowledged (RFC 896), a round trip later; what the path
        takes was seen in the login's questions and answers.
        """
        return _ONE_GO_NS + min(2 * (self._answer_ns + self._turnaround_ns), _OPENING_NS // 2)

    def _owes(self, time_ns: int) -> bool:
        """Return whether the next answer is a keepalive's: requests are answered in their order."""
        return self._owed_ns is not None and time_ns - self._owed_ns < _OWED_NS

    def _gathers(self) -> bool:
        """Return whether the client may write several requests of the opening out at once.

        OpenSSH does not with the first; libraries wait for each answer; dropbear does.
        """
        return self._banners[self.client or 0].startswith("SSH-2.0-dropbear")

    def _familiar(self) -> bool:
        return self.client is not None and self._banners[self.client].startswith(_FAMILIAR)

    def _stranger(self) -> bool:
        """Return whether the client says it is one that was never run; where nothing was heard, it may be any."""
        banner = self._banners[self.client or 0]
        return bool(banner) and not banner.startswith(_KNOWN)

    def _parted(self, first: _Asked, size: int, sizes: Sizes) -> list[Use]:
        """What came first was written out before the session's open or no-more-sessions was thought of.

        OpenSSH does so with requests for forwards only; opens are written together with no-more-sessions, and it opens
        one session at most.
        """
        fits = first.size in sizes.forward or first.size in sizes.forward_path
        if not fits or not self._familiar():
            return []
        if self._doubted:
            return self._request(REQUEST_DOUBTED_OPENSSH_NATS, f"a first record of {first.size} bytes was written out "
                                 "before the next, as a request for a forward is; or it was an open, confirmed within "
                                 "what was not read")
        opened = size in sizes.session_next
        alone = (opened or first.size not in sizes.session) and first.size not in sizes.direct
        if not sizes.exact:
            alone = first.size not in sizes.openings
        if opened and sizes.exact and first.size == sizes.no_more and size in sizes.direct:
            nats = PARTED_ONWARDS_NATS
        elif alone and self._request_nats == 0.0 and self._familiar():
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
        going_on = time_ns - last.time_ns <= self._go_ns() and (size in tails or size == sizes.no_more)
        began = (whole or (alone and not going_on)) and self._heard >= sizes.confirm
        if began:
            self._channel = self._session = True
        return began

    def _went_on(self, time_ns: int, size: int, sizes: Sizes) -> bool:
        """Return whether a client that waits goes on, and what it opened may have been confirmed unread.

        Sessions are opened thousands of times for each port that is asked for: where both fit, it was a session.
        """
        last = self._asked[-1].size
        if not sizes.exact or self._unread < sizes.confirm or self._forward_asked:
            return False
        in_one_go = time_ns - self._asked[-1].time_ns <= self._go_ns()
        if self._familiar() and (not self._gathers() or (in_one_go and size in sizes.with_forward)):
            return False
        self._session = last in sizes.session
        self._channel = self._session or last in sizes.direct
        return self._channel

    def _taken_back(self) -> list[Use]:
        """Take back what was said of an answer beside a record: this client goes on as after an open."""
        if not self._beside or not self._request_nats:
            return []
        nats, self._request_nats = self._request_nats, 0.0
        self._said.discard("ssh-reverse-forward-request")
        return [Use("ssh-reverse-forward-request", -nats, "this side went on as where a session was opened")]

    def _answer(self, time_ns: int, size: int, total: int, sizes: Sizes) -> list[Use]:
        replies, confirmed = (0, False) if size in self._chatter else self._split(size, sizes)
        beside = not replies and not confirmed and size != sizes.reply
        if beside:
            replies, confirmed = self._split_beside(size, sizes)
        uses: list[Use] = []
        if confirmed and not replies and self._beside and not self._may_answer(2, sizes):
            uses += self._taken_back()
        asked = [one for one in self._asked if time_ns - one.time_ns < _ANSWER_NS]
        if replies and asked and not self._forward_asked and not self._owes(time_ns):
            self._beside |= beside
            uses += self._forward_answered(asked, replies, size, sizes, confirmed=confirmed, beside=beside)
            self._unread *= beside
        if replies == 0 and size == sizes.reply:
            uses += self._later_request(time_ns, sizes) or self._padded_request(asked, sizes)
        if confirmed and asked and "ssh-reverse-channel-open" not in self._said:
            uses += self._opened(asked, sizes, total, answered=replies)
        return uses

    def _split(self, size: int, sizes: Sizes) -> tuple[int, bool]:
        """Return (answers to global requests, whether a channel was confirmed) that a server's segment holds.

        There are at most as many answers as there were requests: other messages can be multiples of them too.
        """
        answers_max = sum(self._forwards_in(one, sizes) for one in self._forwards(sizes))
        if answers_max and not sizes.exact and size == sizes.reply and self._asked[0].size not in sizes.openings:
            # Compressed, a confirmation may cost as much; requests are answered in their order.
            return 1, False
        for answers in range(answers_max + 1):
            sums = {sum(each) for each in itertools.combinations_with_replacement(sizes.replies, answers)}
            if any(size - one in sizes.confirms for one in sums) and self._may_answer(answers + 1, sizes):
                return answers, True
            if answers and size == answers * sizes.reply:
                return answers, False
        # Port 0 asked for: the answer carries the port. Or an IGNORE, where this server sends such.
        with_port = size == sizes.reply_port and "ssh-reverse-forward-request" in self._said and not self._ignores[1]
        return (1, False) if answers_max and with_port else (0, False)

    def _split_beside(self, size: int, sizes: Sizes) -> tuple[int, bool]:
        """Read a segment that holds, beside its answers, what the server had said before; nothing if that is unsure."""
        if not sizes.exact:
            return 0, False
        answers_max = sum(self._forwards_in(one, sizes) for one in self._forwards(sizes))
        fits = [(answers, confirmed) for answers in range(answers_max + 1) for confirmed in (False, True)
                if (answers or confirmed) and self._may_answer(answers + confirmed, sizes)
                and size - answers * sizes.reply - confirmed * sizes.confirm in self._chatter]
        if self._asked and len(fits) == 1:
            if not fits[0][1]:
                self._unread = max(self._unread, size)
            return fits[0]
        self._unread = max(self._unread, size)
        told = {one for one in (size, *(size - keys for keys in self._announced)) if one > sizes.confirm}
        self._heard_keys |= len(told) > 1
        if len(self._chatter) < _CHATTER_MAX:
            self._chatter |= told
        return 0, False

    def _may_answer(self, answers: int, sizes: Sizes) -> bool:
        """Return whether so much was asked for as is answered: some segments hold one request and no more."""
        if not sizes.exact:
            return True
        single = {*sizes.session, *sizes.forward}
        return any(one.size not in single for one in self._asked) or answers <= len(self._asked)

    def _forwards(self, sizes: Sizes) -> list[_Asked]:
        """Return the segments that the opening began with and that may hold requests for forwards."""
        return list(itertools.takewhile(lambda one: self._forwards_in(one, sizes), self._asked))

    def _forwards_in(self, one: _Asked, sizes: Sizes) -> int:
        """Return how many requests for forwards a segment may hold."""
        if not one.opening:
            return 0
        first = one is self._asked[0]
        if first and one.size in sizes.forward_path:
            return 1
        if first and not self._gathers():
            return int(sizes.with_forward.get(one.size) == 1)
        return sizes.with_forward.get(one.size, 0)

    def _forward_answered(self, asked: list[_Asked], replies: int, size: int, sizes: Sizes, *,
                          confirmed: bool = False, beside: bool = False) -> list[Use]:
        """A global request was answered, and no channel is open: a forward was asked for."""
        opening = [one for one in self._forwards(sizes) if one in asked]
        # no-more-sessions wants no answer: alone it explains none. OpenSSH sends it to OpenSSH only.
        both = all(banner.startswith("SSH-2.0-OpenSSH_") for banner in self._banners)
        if not opening or (both and len(opening) == 1 and opening[0].size == sizes.no_more):
            return []
        # A confirmation that was missed would have ended the time in which nothing else is answered so.
        if not self._whole():
            return []
        self._forward_asked = not self._stranger() and not beside
        known = "ssh-reverse-forward-request" in self._said
        if not sizes.exact and (sizes.reply in sizes.confirms or (not known and size != replies * sizes.reply)):
            # Compressed, an answer may cost what a confirmation costs, and both what two other messages cost.
            return []
        nats = ANSWERED_NATS if known else REQUEST_NATS + ANSWERED_NATS
        if not sizes.exact and not known:
            nats /= 2
        self._weak = self._request_nats < REQUEST_NATS and (beside or confirmed or replies > 1)
        if beside:
            nats = ANSWERED_BESIDE_NATS
        elif confirmed or replies > 1:
            self._due = ((ANSWERED_SUM_UNREAD_NATS if self._unread else nats - ANSWERED_SUM_NATS) if confirmed else 0.0)
            nats = ANSWERED_SUM_NATS
        text = (f"{'the' if known else 'a'} request of {opening[0].size} bytes was answered by {replies} record(s) of "
                f"{sizes.reply if size != sizes.reply_port else size} bytes with no channel open: tcpip-forward")
        return self._request(nats, text)

    def _opened(self, asked: list[_Asked], sizes: Sizes, total: int, *, answered: int) -> list[Use]:
        """The first channel is open; whose, follows from what was asked."""
        self._channel = True
        tails = {size + end for size in sizes.session for end in (0, sizes.no_more)}
        forwards = {0, *sizes.forward} if self._gathers() or self._stranger() or not sizes.exact else {0}
        opening = [one for one in asked if one.opening]
        # Session, no-more-sessions and forward cost the same in some suites; what was asked last was confirmed.
        self._session = asked[-1].size in sizes.session or (asked[-1] in opening and any(
            one.size - add in tails for one in opening for add in forwards))
        self._session_bytes = [total, total]
        if self._tun and not answered and not self._request_nats and not self._guessed:
            text = (f"the first record after the login has {asked[0].size} bytes, as the open of a network device has "
                    "in this cipher suite and no other open, and a channel was confirmed")
            self._session = False
            return [self._say("ssh-tun", REQUEST_FAMILIAR_NATS + TUN_CONFIRMED_NATS, text, _SPOTS)]
        if self._session:
            return []
        if self._onwards(asked[0], sizes, answered=answered) and asked[-1].opening:
            return self._name("ssh-jump", NAME_FIRM_NATS, f"the first record, {asked[0].size} bytes, opens a "
                              "connection onwards and nothing else")
        return self._local(asked[-1].size) if asked[-1].size in sizes.direct else []

    def _onwards(self, first: _Asked, sizes: Sizes, *, answered: int | None = None) -> bool:
        """Return whether a session opened with direct-tcpip (-W), alone or with no-more-sessions.

        Requests for forwards may cost as much, but are ``answered`` before anything is confirmed. Libraries open
        connections onwards for all sorts of uses.
        """
        at_once = first.time_ns - self._auth_ns <= self._go_ns()
        alone = at_once and (first.size in sizes.direct or first.size - sizes.no_more in sizes.direct)
        other = self._forwards_in(first, sizes) > 0 if answered is None else answered > 0
        return self._familiar() and sizes.exact and alone and not other and first.opening

    # -- forwards in use ----------------------------------------------------------------------------------------------

    def _forwarded(self, time_ns: int, size: int, sizes: Sizes, *, from_client: bool) -> list[Use]:
        """A channel that the far side opens into this host: server first, then the client's confirmation."""
        if not from_client:
            fits = size in sizes.forwarded or not sizes.exact
            self._open_ns = time_ns if fits and self._unasked(time_ns) and self._setup_over(time_ns) else None
            self._open_size = size
            return []
        if size == sizes.ignore and self._ignores[self.client or 0]:
            return []
        waiting, self._open_ns = self._open_ns, None
        if waiting is None or size != sizes.confirm_client:
            return []
        if self._session and time_ns - waiting > _CONFIRMED_NS + self._turnaround_ns:
            return []
        if self._session and not self._requests and self._familiar() and self._whole():
            # These clients ask for a shell or a command at once: what was confirmed was no session.
            self._session = self._channel = False
            text = (f"nothing was asked for on what was opened, and the far side opened a channel into this host "
                    f"({self._open_size} bytes)")
            return [self._say("ssh-reverse-channel-open", UNASKED_OPEN_NATS, text, _SPOTS)]
        if self._session and not self._forward_asked and not self._may_be_asked:
            self._answers_at_once = True
        asked = self._forward_asked or self._may_be_asked
        if not asked and ("ssh-reverse-forward-request" in self._said or self._channel):
            return []
        nats = CHANNEL_OPEN_NATS if asked else UNASKED_OPEN_NATS
        if self._session and not self._forward_asked:
            nats = LATER_OPEN_NATS
            self._opened_later = not self._request_nats
        if self._doubted or self._weak:
            nats = min(nats, LATER_OPEN_NATS)
        if not sizes.exact:
            # Compressed, a key and its echo may cost as much: the first is believed, that follows the request.
            if not asked or "ssh-reverse-channel-open" in self._said:
                return []
            nats /= 2
        if "ssh-reverse-channel-open" in self._said:
            nats = 0.0
        text = (f"the far side opened a channel into this host ({self._open_size} bytes) and it was confirmed "
                f"({size} bytes) {(time_ns - waiting) / 1e6:.1f} ms later")
        return [self._say("ssh-reverse-channel-open", nats, text, _SPOTS)]

    def _visited(self, time_ns: int, size: int, sizes: Sizes, *, from_client: bool) -> list[Use]:
        """Somebody asks through the port that the far side was given, and this host answers."""
        opened = "ssh-reverse-channel-open" in self._said and not self._opened_later
        sure = self._request_nats > LATER_ALIKE_NATS or opened
        ignored = size == sizes.ignore and self._ignores[(self.client or 0) ^ (not from_client)]
        if not sure or ignored or self._answer_ns >= _OPENING_NS or "ssh-reverse-channel-asked" in self._said:
            return []
        if self._visitor is None:
            self._visitor = Visitor(self._answer_ns, sizes.confirm_client)
        if not from_client:
            self._visitor.far(time_ns, size)
            return []
        seen = self._visitor.near(time_ns, size)
        text = f"the far side asked through the tunnel and this host answered at once: {seen} by now"
        return [self._say("ssh-reverse-channel-asked", VISITED_NATS, text, _VISITOR_SPOTS)] if seen else []

    def _unasked(self, time_ns: int) -> bool:
        """Return whether the server begins by itself now.

        Beside a terminal where a request is not certain, it has to break a silence.
        """
        quiet = time_ns - self._last_client[0] > 1_000_000
        if self._forward_asked or not self._session:
            return quiet
        silence_ns = time_ns - max(self._last_client[0], self._last_server[0])
        return quiet and silence_ns > _SILENCE_NS and not self._answers_at_once

    def _closed_later(self, size: int, sizes: Sizes) -> list[Use]:
        """The channel that may have been opened beside a terminal came to its end, and the session did not."""
        short = sizes.key_echo > sizes.reply_port == self._last_server[1]
        if not self._opened_later or not short or size not in (sizes.ending, 2 * sizes.ending):
            return []
        self._opened_later = False
        self._forward_asked = True
        text = (f"the channel was closed by {self._last_server[1]} bytes and {size}, too short for data, and nothing "
                "told how a command ended")
        return [self._say("ssh-reverse-channel-open", LATER_CLOSE_NATS, text)]

    def _inner(self, time_ns: int, size: int, sizes: Sizes, *, from_client: bool) -> list[Use]:
        """Sessions of SSH inside this one, and the agent and the screen of this side in use from the far one."""
        if size == sizes.ignore != sizes.key and self._ignores[(self.client or 0) ^ (not from_client)]:
            return []
        if self._nested is None or self._from_server is None:
            self._nested = Nested(sizes.nested)
            self._from_server = FromServer(sizes.server_opens, sizes.server_words, sizes.confirm_client)
        uses = []
        depth = self._nested.segment(time_ns, size, from_client=from_client)
        around = next((label for label, marks in _AROUND if self._said & marks), "")
        if depth and around:
            uses.append(self._say(f"ssh-nested-in-{around}", 0.0, f"keys of an SSH session within {depth} other(s): "
                                  f"records of {size} bytes, asked and answered"))
        opened = self._from_server.segment(time_ns, size, from_client=from_client)
        session = next((label for label in _SESSIONS if f"ssh-{label}" in self._said), "")
        if opened and session:
            uses += self._name(f"ssh-{opened}-used-in-{session}", 0.0, f"the far side used this side's {opened}: a "
                               f"channel was opened to it, and {size} bytes sent")
        return uses

    def _setup_over(self, time_ns: int) -> bool:
        """Host keys and banners come within the opening; a forwarded channel comes after the request was answered."""
        return self._forward_asked or time_ns - self._auth_ns > _OPENING_NS

    def _local(self, size: int) -> list[Use]:
        self._directs.add(size)
        uses = self._name("ssh-local-forward", NAME_NATS, f"this side opened a connection onwards ({size} bytes) and "
                          "it was confirmed")
        if len(self._directs) >= 2 and self._sizes is not None and self._sizes.exact:
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
        early = not from_client and not self._requests and self._whole() and sizes.exact
        both = any(one.size - session in sizes.forward for one in self._asked for session in sizes.session)
        if early and both and self._gathers() and size == sizes.reply < sizes.key_echo:
            # Before a command was asked for, on a session that was opened ahead of the request for a forward.
            uses += self._forward_answered(self._asked, 1, size, sizes)
        if from_client:
            uses += self._closed_later(size, sizes)
            self._requests += 1
            # EOF and WINDOW_ADJUST cost what a key costs; with commands between them nobody types.
            self._keys *= size == sizes.key or (size == sizes.ignore and self._ignores[self.client or 0])
        elif (self._last_client[1] == sizes.key and sizes.key_echo <= size <= 3 * sizes.key_echo
              and "ssh-exec" in self._said and not self._ignores[1 - (self.client or 0)]):
            self._keys += 1
            if self._keys == _KEYS_MIN:
                self._pty = True
                return self._name("ssh-interactive", NAME_FIRM_NATS, f"{_KEYS_MIN} keys were typed and echoed")
        if from_client and not self._said & {"ssh-interactive", "ssh-exec"}:
            if size >= sizes.pty and sizes.exact and self._banners[1 - (self.client or 0)].startswith(_GRANTING):
                self._long_request = size
                return uses
            if size >= sizes.pty:
                self._pty = True
                return self._name("ssh-interactive", NAME_FIRM_NATS, f"a terminal was asked for ({size} bytes)")
            return self._name("ssh-exec", NAME_NATS, f"a command or subsystem was asked for ({size} bytes)")
        if not from_client and self._long_request:
            return uses + self._granted(size, sizes)
        asked = self._last_client[1] in sizes.bare_pty
        granted = asked and size == sizes.granted and sizes.exact and not self._ignores[1 - (self.client or 0)]
        if not from_client and self._requests == 1 and not self._pty and granted:
            # A terminal and a shell were granted, and a window opened: pty-req without modes is as short as a command.
            self._pty = True
            return self._name("ssh-interactive", NAME_FIRM_NATS, f"a terminal and a shell were granted ({size} bytes)")
        if not self._pty and total - self._session_bytes[0] > _TRANSFER_BYTES:
            uses += self._name("ssh-transfer", NAME_FIRM_NATS, f"{total} bytes one way and no terminal")
        uses += self._sftp(size, sizes, from_client=from_client)
        if not from_client and size == sizes.reply:
            uses += self._later_request(time_ns, sizes)
        return uses

    def _granted(self, size: int, sizes: Sizes) -> list[Use]:
        """A terminal and a shell are granted by two answers, a long command (Ansible's, say) by one."""
        asked, self._long_request = self._long_request, 0
        if size == sizes.granted_one:
            return self._name("ssh-exec", NAME_NATS, f"a command was asked for ({asked} bytes)")
        self._pty = True
        return self._name("ssh-interactive", NAME_FIRM_NATS, f"a terminal was asked for ({asked} bytes)")

    def _sftp(self, size: int, sizes: Sizes, *, from_client: bool) -> list[Use]:
        """SSH_FXP_INIT, answered at length; where a WINDOW_ADJUST costs as much, what the client asks next tells."""
        if not from_client and size > 200 and self._last_client[1] == sizes.sftp_init and self._requests == 2:
            self._sftp_asked = True
        told = sizes.exact and sizes.sftp_init != sizes.adjust
        if not self._sftp_asked or not (told or (from_client and size > sizes.sftp_init)):
            return []
        self._sftp_asked = False
        return self._name("ssh-transfer", NAME_NATS + 1, "the opening of SFTP")

    def _later_request(self, time_ns: int, sizes: Sizes) -> list[Use]:
        """A global request later on, `ssh -O forward`: its answer is shorter than any data can be, or none may flow."""
        when, size = self._last_client
        # no-more-sessions is over by now, and another session is confirmed at greater length.
        if size not in sizes.forward or not sizes.exact or time_ns - when > 1_000_000_000 or self._forward_asked:
            return []
        # Without a channel, if none can have been opened unseen, even where a key's echo costs what an answer does.
        no_data = not self._channel and self._whole()
        short = self._channel and sizes.reply < sizes.reply_port
        beside = self._pty and not self._setting_up
        no_data_fits = no_data or (beside and sizes.key_echo > sizes.reply)
        keepalive = size == sizes.keepalive and self._awaits_keepalives()
        if not (no_data or short or beside) or (keepalive and (short or not no_data_fits)):
            return []
        # The ends of both directions of a channel, which are answered by one, may cost as much too.
        alike = not no_data and not short and not (no_data_fits and size % sizes.ending and self._whole())
        if not keepalive and self._owes(time_ns):
            return []
        if alike or (keepalive and not self._off_beat()):
            self._may_be_asked = True
            text = f"{size} bytes were answered by {sizes.reply}, as tcpip-forward is, or a pasted password"
            return [] if no_data_fits else self._request(LATER_ALIKE_NATS, text)
        self._forward_asked = True
        text = f"on the running session a request of {size} bytes was answered by {sizes.reply} bytes: tcpip-forward"
        if keepalive:
            return self._request(LATER_OFF_BEAT_NATS, text + ", and no keepalive, for none came in longer silences")
        return self._request(LATER_REQUEST_NATS, text)

    def _off_beat(self) -> bool:
        """Return whether what the client sent last comes too early for a keepalive: longer silences brought none."""
        if not self._banners[self.client or 0].startswith(_SILENCE_COUNTING):
            return False
        return self._silence_ns > self._waited_ns + _COARSE_NS and self._whole()

    def _whole(self) -> bool:
        """Return whether all that was sent since the login was seen."""
        return self._holes == self._auth_holes

    def _awaits_keepalives(self) -> bool:
        """Return whether this client wants its keepalives answered."""
        return not self._banners[self.client or 0].startswith(_UNANSWERED)

    def _padded_request(self, asked: list[_Asked], sizes: Sizes) -> list[Use]:
        """However a request was padded, its answer was not; of these clients nothing else is answered so early."""
        if not asked or not sizes.exact or self._forward_asked or self._awaits_keepalives() or not self._whole():
            return []
        self._forward_asked = True
        return self._request(LATER_REQUEST_NATS, f"a padded request of {asked[-1].size} bytes was answered by "
                             f"{sizes.reply} bytes with no channel open: tcpip-forward")
