"""What the two sides of a connection are known for, by the names that they give themselves (RFC 4253 section 4.2).

A name is believed only where lying makes the liar more readable, or less readable than he would be unnamed.
"""

from __future__ import annotations

from gpuguard.core.ssh.suites import ASYNCSSH

_OPENSSH = "SSH-2.0-OpenSSH_"
_DROPBEAR = "SSH-2.0-dropbear"
# Clients that never send no-more-sessions, by their sources; nor do they open with a keepalive.
_PLAIN = (_DROPBEAR, ASYNCSSH, "SSH-2.0-paramiko", "SSH-2.0-libssh", "SSH-2.0-Go", "SSH-2.0-ssh2js")
# Clients that were run, and that of their own accord ask for nothing that wants an answer before a channel is open. Of
# others every tenth may, as Twisted's begins with a keepalive; and one in five of such requests is as long as one for a
# port.
_KNOWN = (*_PLAIN, _OPENSSH, "SSH-2.0-PuTTY_", "SSH-2.0-JSCH-", "SSH-2.0-Erlang/")
# They send a keepalive so long after the server was heard last (client_process_net_input in clientloop.c; _recv_data
# in AsyncSSH). dropbear counts from what it sent itself, and programs in Go by a clock of their own.
_SILENCE_COUNTING = (_OPENSSH, ASYNCSSH)
# Their keepalives want no answer: "keepalive@lag.net", and want_reply false.
_UNANSWERED = ("SSH-2.0-paramiko", "SSH-2.0-libssh_", "SSH-2.0-libssh-")


class Peers:
    """How the client and the server of these identification strings behave; "" where none was seen."""

    def __init__(self, client: str, server: str) -> None:
        #: The sources of OpenSSH and dropbear show every opening there is.
        self.familiar = client.startswith((_OPENSSH, _DROPBEAR))
        #: The client may write several requests of the opening out at once. OpenSSH does not with the first; libraries
        #: wait for each answer; dropbear does.
        self.gathers = client.startswith(_DROPBEAR)
        #: The client says it is one that was never run; where nothing was heard, it may be any.
        self.stranger = bool(client) and not client.startswith(_KNOWN)
        self.plain = client.startswith(_PLAIN)
        self.openssh_client = client.startswith(_OPENSSH)
        #: Opens the window of a session when it grants what runs in it.
        self.openssh_server = server.startswith(_OPENSSH)
        self.counts_silence = client.startswith(_SILENCE_COUNTING)
        #: The client wants its keepalives answered.
        self.awaits_keepalives = not client.startswith(_UNANSWERED)
        #: The client sends an IGNORE before each message of RFC 4254, and before no other (send_packet in AsyncSSH).
        self.client_announces = client.startswith(ASYNCSSH)
        #: An IGNORE may come from the client, and from the server: learnt in the login, too.
        self.client_ignores = client.startswith(ASYNCSSH)
        self.server_ignores = server.startswith(ASYNCSSH)

    def ignores(self, *, from_client: bool) -> bool:
        """Return whether this side sends IGNOREs."""
        return self.client_ignores if from_client else self.server_ignores
