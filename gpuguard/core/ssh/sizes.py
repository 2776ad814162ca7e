"""What every message that is looked for costs in the two suites of a session."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from gpuguard.core.ssh.messages import (
    AGENT_REQUEST,
    ATTEMPT_MIN,
    CHANNEL_KEEPALIVE,
    CHANNEL_SUCCESS,
    DATA,
    ENDING,
    IGNORE,
    KEEPALIVE,
    KEX_REPLY_MIN,
    KEY,
    KEY_ACCEPTED,
    NESTED_MAX,
    OPEN_CONFIRMATION,
    REPLY,
    REPLY_WITH_PORT,
    SERVICE,
    SFTP_INIT,
    SHELL_REQUEST,
    TUN_OPEN,
    USERAUTH_NONE_MAX,
    WINDOW_ADJUST,
    X11_REQUEST,
    direct_tcpip,
    forwarded_tcpip,
)
from gpuguard.core.ssh.openings import answers, deflated_openings, plain_openings
from gpuguard.core.ssh.suites import Suite, record_bytes

_SESSION_BINDS = {DATA + 212: DATA + 5, DATA + 244: DATA + 5}
# What a server opens, the first that it says there, and the least that answers it. auth-agent@openssh.com (OpenSSH's
# PROTOCOL.agent): SSH_AGENTC_REQUEST_IDENTITIES, answered by an Ed25519 key at least, the shortest; or session-bind for
# such a key and an exchange hash of 32 or 64 bytes, answered by SSH_AGENT_SUCCESS. Its new name, agent-connect (OpenSSH
# 10.6; draft-ietf-sshm-ssh-agent), is as short as much data is, so that only the latter is looked for. x11 from ::1 or
# 127.0.0.1: the setup with MIT-MAGIC-COOKIE-1, answered by what the display has (X11 protocol, section 8).
_SERVER_CHANNELS = (("agent", (39,), {DATA + 5: DATA + 68, **_SESSION_BINDS}),
                    ("agent", (30,), _SESSION_BINDS),
                    ("x11", (31, 37), {DATA + 48: DATA + 200}))

# From "password" to four long names of methods.
_METHODS_BYTES = range(8, 61)
# From "::1" to a full IPv6 address, with names from one letter to the longest label.
_NAMES_BYTES = range(4, 103)

# pty-req without modes, RFC 4254 section 6.2, for terminals of 4 ("dumb") to 14 letters ("xterm-256color").
_BARE_PTY_BYTES = range(42 + 4, 42 + 20)


class ServerChannel(NamedTuple):
    """What a channel costs that a server opens: its open, and by the first that is said there the least in answer."""

    kind: str
    opens: frozenset[int]
    words: dict[int, int]


class Sizes(NamedTuple):
    """What the messages of a session cost in its two suites; sets where a name of unknown length is inside."""

    session: frozenset[int]
    #: The open of a session, and of a connection onwards, alone or with no-more-sessions behind it.
    opens_session: frozenset[int]
    opens_onwards: frozenset[int]
    no_more: int
    no_more_next: frozenset[int]
    session_next: frozenset[int]
    keepalive: int
    forward: frozenset[int]
    forward_only: frozenset[int]
    #: How many requests for forwards a segment of the opening holds, alone or with what follows them.
    with_forward: dict[int, int]
    #: Such segments as a client sends that writes several messages out together, and that nothing else is as long as.
    gathered: frozenset[int]
    forward_path: frozenset[int]
    openings: frozenset[int]
    tun: frozenset[int]
    ignore: int
    direct: frozenset[int]
    confirm_client: int
    sftp_init: int
    adjust: int
    pty: int
    bare_pty: frozenset[int]
    key: int
    key_echo: int
    reply: int
    replies: frozenset[int]
    reply_port: int
    #: EOF or CLOSE of a channel, RFC 4254 section 5.3, from the client.
    ending: int
    #: A request for agent forwarding, OpenSSH's PROTOCOL.agent; and one for X11 forwarding.
    agent: int
    x11: int
    #: CHANNEL_SUCCESS, WINDOW_ADJUST, CHANNEL_SUCCESS.
    granted: int
    #: WINDOW_ADJUST, CHANNEL_SUCCESS.
    granted_one: int
    #: CHANNEL_SUCCESS or CHANNEL_FAILURE, which answer a request on a channel.
    granted_each: int
    #: The least that a server says in a key exchange before its NEWKEYS.
    key_exchange: int
    #: A keepalive of the server's on a channel.
    alive: int
    confirm: int
    confirms: frozenset[int]
    forwarded: frozenset[int]
    accepted: int
    service: int
    none_max: int
    failures: frozenset[int]
    attempt_min: int
    #: What a key of an inner session and its echo cost, and how deep that session is; see `inner`.
    nested: dict[tuple[int, int], int]
    server_channels: tuple[ServerChannel, ...]
    exact: bool


@lru_cache(maxsize=64)
def sizes_of(client: Suite, server: Suite, *, no_more_sessions: bool = True) -> Sizes:
    """Return what each message costs, client and server each in its own suite.

    ``no_more_sessions``: the client may open with that request, or with a keepalive, as OpenSSH does.
    """

    def ours(payload_bytes: int) -> int:
        return record_bytes(client, payload_bytes)

    def theirs(payload_bytes: int) -> int:
        return record_bytes(server, payload_bytes)

    found = deflated_openings(client) if client.compressed else plain_openings(client)
    session, no_more = frozenset(found.session), min(found.no_more)
    plain = {*found.no_more, ours(KEEPALIVE), *session} if no_more_sessions else set(session)
    opens_session = session | {one + no_more for one in session}
    # A host's name and where the connection came from: "UNKNOWN" at least (OpenSSH's -W), and four letters or more.
    onwards = {ours(direct_tcpip(size)) + tail for size in range(11, 61) for tail in (0, no_more)}
    direct = found.direct or {ours(direct_tcpip(size)) for size in _NAMES_BYTES}
    openings = opens_session | plain
    replies, confirms = answers(server)
    return Sizes(
        session=session,
        opens_session=opens_session,
        opens_onwards=frozenset(one + tail for one in direct for tail in (0, no_more)),
        no_more=no_more,
        no_more_next=frozenset(found.no_more_next),
        session_next=frozenset(found.session_next),
        keepalive=ours(KEEPALIVE),
        forward=frozenset(found.forward),
        forward_only=frozenset(found.forward - plain),
        with_forward=found.with_forward,
        gathered=frozenset(found.gathered - found.forward - plain - direct),
        forward_path=frozenset(found.path),
        openings=openings,
        tun=frozenset(ours(TUN_OPEN) + tail for tail in {0, no_more, *opens_session}) - onwards - openings,
        ignore=ours(IGNORE),
        direct=frozenset(direct),
        confirm_client=ours(OPEN_CONFIRMATION),
        sftp_init=ours(SFTP_INIT),
        adjust=ours(WINDOW_ADJUST),
        # pty-req with the terminal modes that OpenSSH, dropbear and libssh send: above 200 bytes. Paramiko and Go send
        # few or none, and are told by what is typed.
        pty=ours(120 if client.compressed else 200),
        bare_pty=frozenset(ours(one) + ours(SHELL_REQUEST) for one in _BARE_PTY_BYTES),
        key=ours(KEY),
        key_echo=theirs(KEY),
        reply=replies[0],
        replies=frozenset(replies),
        reply_port=theirs(REPLY_WITH_PORT),
        ending=ours(ENDING),
        agent=ours(AGENT_REQUEST),
        x11=ours(X11_REQUEST),
        granted=2 * theirs(CHANNEL_SUCCESS) + theirs(WINDOW_ADJUST),
        granted_one=theirs(CHANNEL_SUCCESS) + theirs(WINDOW_ADJUST),
        granted_each=theirs(CHANNEL_SUCCESS),
        key_exchange=theirs(KEX_REPLY_MIN),
        alive=theirs(CHANNEL_KEEPALIVE),
        confirm=min(confirms),
        confirms=confirms,
        forwarded=frozenset(theirs(forwarded_tcpip(size)) for size in _NAMES_BYTES),
        accepted=theirs(REPLY),
        service=theirs(SERVICE),
        none_max=ours(USERAUTH_NONE_MAX),
        failures=frozenset(theirs(6 + size) for size in _METHODS_BYTES) - {theirs(KEY_ACCEPTED)},
        attempt_min=ours(ATTEMPT_MIN),
        nested=_nested(client, server),
        server_channels=_server_channels(client, server),
        exact=not (client.compressed or server.compressed),
    )


# Suites that a session may be read in when its key exchange was not captured whole, the usual one of each size first.
_USUAL = (
    Suite(8, 16, outside=True),  # chacha20-poly1305
    Suite(16, 16, outside=True),  # AES-GCM
    # AES-CTR with HMAC of SHA-2 (256 bits), SHA-1 and SHA-2 (512 bits), first encrypt-then-MAC.
    *(Suite(16, mac_bytes, outside=outside) for outside in (True, False) for mac_bytes in (32, 20, 64)),
)


def _server_channels(client: Suite, server: Suite) -> tuple[ServerChannel, ...]:
    def theirs(payload_bytes: int) -> int:
        return record_bytes(server, payload_bytes)

    return tuple(
        ServerChannel(kind, frozenset(map(theirs, opens)),
                      {theirs(word): record_bytes(client, least) for word, least in words.items()})
        for kind, opens, words in _SERVER_CHANNELS)


def _nested(client: Suite, server: Suite) -> dict[tuple[int, int], int]:
    """Return what a typed key and its echo cost, in these suites, that are of a session inside one of a usual suite."""
    found: dict[tuple[int, int], int] = {}
    for inner in _USUAL:
        key = record_bytes(inner, KEY)
        for depth in range(1, NESTED_MAX + 1):
            found.setdefault((record_bytes(client, DATA + key), record_bytes(server, DATA + key)), depth)
            key = record_bytes(inner, DATA + key)
    return found


BY_SERVICE: dict[int, Suite] = {record_bytes(suite, SERVICE): suite for suite in reversed(_USUAL)}
