"""How long the messages are by which the use of an SSH session is told, before they are encrypted.

Lengths are of RFC 4252 to 4254 and of OpenSSH's PROTOCOL file.
"""

from __future__ import annotations

SERVICE = 17  # SERVICE_REQUEST and SERVICE_ACCEPT of "ssh-userauth": the one pair of equal size, RFC 4253 section 10
SESSION_OPEN = 24  # RFC 4254 section 5.1: type, "session", channel, window, packet
NO_MORE_SESSIONS = 34  # OpenSSH PROTOCOL section 2.2, want_reply false
KEEPALIVE = 27  # keepalive@openssh.com, want_reply true
CHANNEL_KEEPALIVE = 31  # the same from a server, on a channel: client_alive_check in serverloop.c
KEX_REPLY_MIN = 179  # KEX_ECDH_REPLY, RFC 5656 section 4, with an Ed25519 key and curve25519
OPEN_CONFIRMATION = 17
IGNORE = 5  # RFC 4253 section 11.2, with no data: AsyncSSH sends one before every message
REPLY = 1  # REQUEST_SUCCESS and REQUEST_FAILURE; also USERAUTH_SUCCESS, RFC 4252 section 5.1
KEY_ACCEPTED = 71  # USERAUTH_PK_OK for an Ed25519 key, the shortest there is; RFC 4252 section 7, RFC 8709
ATTEMPT_MIN = 90  # a key is asked for, or a padded password; keyboard-interactive with a user's name is shorter
USERAUTH_NONE_MAX = 35 + 32  # RFC 4252 section 5.2: "ssh-connection", "none", and a user's name, useradd(8)
REPLY_WITH_PORT = 5  # to a request for port 0
CHANNEL_SUCCESS = 5  # or CHANNEL_FAILURE, RFC 4254 section 5.4
ENDING = 5  # EOF or CLOSE of a channel, section 5.3
WINDOW_ADJUST = 9
TUN_OPEN = 40  # tun@openssh.com, PROTOCOL section 2.3
NESTED_MAX = 3
DATA = 9  # channel data without the data, RFC 4254 section 5.2
X11_REQUEST = 80  # RFC 4254 section 6.3.1, MIT-MAGIC-COOKIE-1
AGENT_REQUEST = 36  # auth-agent-req@openssh.com
KEY = 10  # channel data of one byte, RFC 4254 section 5.2
SHELL_REQUEST = 15
SFTP_INIT = 18  # channel data with an SSH_FXP_INIT in it
SFTP_VERSION_MIN = 200  # on the wire: its answer names what OpenSSH's server can do beyond the standard


def tcpip_forward(bind_bytes: int) -> int:
    """Return the size of a tcpip-forward request with a bind name of so many letters, RFC 4254 section 7.1."""
    return 27 + bind_bytes


def direct_tcpip(names_bytes: int) -> int:
    """Return the size of a direct-tcpip open, RFC 4254 section 7.2; its two names have so many letters together."""
    return 45 + names_bytes


def forwarded_tcpip(names_bytes: int) -> int:
    """Return the size of a forwarded-tcpip open, RFC 4254 section 7.2; its two names have so many letters together."""
    return 48 + names_bytes
