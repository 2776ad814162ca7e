"""What runs in the session that was opened: a shell, a command, a copy; and connections onwards beside none.

What is asked for on a session follows its confirmation (RFC 4254 sections 6.2 to 6.5); where a terminal's size is that
of a long command, what the server grants tells, and what is typed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gpuguard.core.ssh.incoming import OPEN
from gpuguard.core.ssh.messages import SFTP_VERSION_MIN
from gpuguard.core.ssh.onwards import local
from gpuguard.core.ssh.uses import NAME_FIRM_NATS, NAME_NATS

if TYPE_CHECKING:
    from gpuguard.core.ssh.connection import Seen, Terms
    from gpuguard.core.ssh.global_requests import GlobalRequests
    from gpuguard.core.ssh.line import Segment
    from gpuguard.core.ssh.uses import Use

_TRANSFER_BYTES = 64 * 1024
_KEYS_MIN = 5


class Running:
    """The segments of a connection with a channel open."""

    def __init__(self, terms: Terms, seen: Seen, global_requests: GlobalRequests) -> None:
        self._terms = terms
        self._seen = seen
        self._global_requests = global_requests
        self._keys = 0
        #: The size of a request that is a terminal's or a long command's.
        self._long_request = 0
        self._sftp_asked = False
        #: The size of a first request that is one for an X11 display, or a command of that length.
        self._display = 0

    def onwards(self, seg: Segment) -> list[Use]:
        """Take in a segment where no session is open: further connections onwards may be."""
        size = self._seen.line.client[1]
        confirmed = not seg.from_client and seg.size == self._terms.sizes.confirm and size in self._terms.sizes.direct
        if not confirmed or OPEN in self._seen.told:
            return []
        return local(size, self._terms, self._seen)

    def segment(self, seg: Segment) -> list[Use]:
        """Take in a segment of a session, and say what runs there."""
        seen, sizes, peers, told = self._seen, self._terms.sizes, self._terms.peers, self._seen.told
        if seg.from_client:
            seen.requests += 1
            # EOF and WINDOW_ADJUST cost what a key costs; with commands between them nobody types.
            self._keys *= seg.size == sizes.key or (seg.size == sizes.ignore and peers.client_ignores)
            if "ssh-interactive" not in told and "ssh-exec" not in told:
                return self._requested(seg.size)
        elif self._echoed(seg.size):
            self._keys += 1
            if self._keys == _KEYS_MIN:
                return self._terminal(f"{_KEYS_MIN} keys were typed and echoed")
        if not seg.from_client and self._display:
            return self._no_display()
        if not seg.from_client and self._long_request:
            return self._granted(seg.size)
        if not seg.from_client and self._bare_terminal(seg.size):
            # A terminal and a shell were granted, and a window opened: pty-req without modes is as short as a command.
            return self._terminal(f"a terminal and a shell were granted ({seg.size} bytes)")
        uses: list[Use] = []
        if not seen.pty and seg.total - seen.bytes_before > _TRANSFER_BYTES:
            uses += told.once("ssh-transfer", NAME_FIRM_NATS, f"{seg.total} bytes one way and no terminal")
        if seen.requests == 2 or self._sftp_asked:
            uses += self._sftp(seg)
        if not seg.from_client and seg.size == sizes.reply:
            uses += self._global_requests.answered(seg)
        return uses

    def _echoed(self, size: int) -> bool:
        """Return whether this may be the echo of a key, beside what is a command so far."""
        sizes = self._terms.sizes
        return (self._seen.line.client[1] == sizes.key and sizes.key_echo <= size <= 3 * sizes.key_echo
                and "ssh-exec" in self._seen.told and not self._terms.peers.server_ignores)

    def _requested(self, size: int) -> list[Use]:
        """Say what the first request of a session is for."""
        sizes = self._terms.sizes
        first, self._display = self._seen.requests == 1, 0
        if size == sizes.x11 and first and sizes.exact and self._terms.peers.openssh_client:
            self._display = size
            return []
        if size >= sizes.pty and sizes.exact and self._terms.peers.openssh_server:
            self._long_request = size
            return []
        if size >= sizes.pty:
            return self._terminal(f"a terminal was asked for ({size} bytes)")
        return self._seen.told.once("ssh-exec", NAME_NATS, f"a command or subsystem was asked for ({size} bytes)")

    def _no_display(self) -> list[Use]:
        """The server answers, so that what runs was asked for by then: it was a command as long as that request."""
        asked, self._display = self._display, 0
        return self._seen.told.once("ssh-exec", NAME_NATS, f"a command or subsystem was asked for ({asked} bytes)")

    def _granted(self, size: int) -> list[Use]:
        """A terminal and a shell are granted by two answers, a long command (Ansible's, say) by one."""
        asked, self._long_request = self._long_request, 0
        if size == self._terms.sizes.granted_one:
            return self._seen.told.once("ssh-exec", NAME_NATS, f"a command was asked for ({asked} bytes)")
        return self._terminal(f"a terminal was asked for ({asked} bytes)")

    def _bare_terminal(self, size: int) -> bool:
        seen, sizes = self._seen, self._terms.sizes
        asked = seen.line.client[1] in sizes.bare_pty
        granted = asked and size == sizes.granted and sizes.exact and not self._terms.peers.server_ignores
        return seen.requests == 1 and not seen.pty and granted

    def _terminal(self, text: str) -> list[Use]:
        self._seen.pty = True
        return self._seen.told.once("ssh-interactive", NAME_FIRM_NATS, text)

    def _sftp(self, seg: Segment) -> list[Use]:
        """SSH_FXP_INIT, answered at length; where a WINDOW_ADJUST costs as much, what the client asks next tells."""
        seen, sizes = self._seen, self._terms.sizes
        asked = seen.line.client[1] == sizes.sftp_init
        if not seg.from_client and seg.size > SFTP_VERSION_MIN and asked:
            self._sftp_asked = True
        told = sizes.exact and sizes.sftp_init != sizes.adjust
        if not self._sftp_asked or not (told or (seg.from_client and seg.size > sizes.sftp_init)):
            return []
        self._sftp_asked = False
        return seen.told.once("ssh-transfer", NAME_NATS + 1, "the opening of SFTP")
