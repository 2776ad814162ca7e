"""What the two sides of a connection are known for, by the names that they give themselves (RFC 4253 section 4.2).

A name is believed only where lying makes the liar more readable, or less readable than he would be unnamed.
"""

from __future__ import annotations

from gpuguard.core.ssh.suites import IGNORING, PLAIN_CLIENTS

_OPENSSH = "SSH-2.0-OpenSSH_"
_DROPBEAR = "SSH-2.0-dropbear"
# Clients that were run, and of their own accord ask for nothing that wants an answer before a channel is open. Others
# may: Twisted's begins with a keepalive of its own, as long as a request for a port, and so may every tenth; one in
# five is as long.
_KNOWN = (*PLAIN_CLIENTS, _OPENSSH, "SSH-2.0-PuTTY_", "SSH-2.0-JSCH-", "SSH-2.0-Erlang/")
# They send a keepalive so long after the server was heard last (client_process_net_input in clientloop.c; _recv_data
# in AsyncSSH). dropbear counts from what it sent itself, and programs in Go by a clock of their own.
_SILENCE_COUNTING = (_OPENSSH, "SSH-2.0-AsyncSSH")
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
        self.plain = client.startswith(PLAIN_CLIENTS)
        self.openssh_client = client.startswith(_OPENSSH)
        #: Opens the window of a session when it grants what runs in it.
        self.openssh_server = server.startswith(_OPENSSH)
        self.counts_silence = client.startswith(_SILENCE_COUNTING)
        #: The client wants its keepalives answered.
        self.awaits_keepalives = not client.startswith(_UNANSWERED)
        #: The client sends an IGNORE before each message of RFC 4254, and before no other (send_packet in AsyncSSH).
        self.client_announces = client.startswith(IGNORING)
        #: An IGNORE may come from the client, and from the server: learnt in the login, too.
        self.client_ignores = client.startswith(IGNORING)
        self.server_ignores = server.startswith(IGNORING)

    def ignores(self, *, from_client: bool) -> bool:
        """Return whether this side sends IGNOREs."""
        return self.client_ignores if from_client else self.server_ignores
