"""What the broker tells the service manager that started it: sd_notify(3), one datagram of assignments at a time.

systemd names its socket in NOTIFY_SOCKET; who was started by anybody else has nobody to tell. Nothing is waited for: a
manager that has no room for a datagram is told with the next one.
"""

from __future__ import annotations

import contextlib
import os
import socket

from gpuguard.ui.markup import visible

VARIABLE = "NOTIFY_SOCKET"
STATUS_CHARACTERS_MAX = 200


class ServiceManager:
    """Who has to know whether the guard watches. It remembers which status arrived last."""

    def __init__(self) -> None:
        self._status = ""

    def watching(self, status: str) -> None:
        """Tell that the guard watches, which is what ready means, and still does; ``status`` may be anybody's words."""
        line = visible(status[:STATUS_CHARACTERS_MAX])
        news = () if line == self._status else ("READY=1", f"STATUS={line}")
        if _tell(*news, "WATCHDOG=1"):
            self._status = line

    def stopping(self) -> None:
        """Tell that the end has begun."""
        _tell("STOPPING=1")


def _tell(*assignments: str) -> bool:
    """Return whether it was sent. The socket's name is a path, or abstract: "@" is a zero byte then."""
    name = os.environ.get(VARIABLE, "")
    if not name:
        return False
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ours:
        ours.setblocking(False)
        ours.sendto("\n".join(assignments).encode(), "\0" + name[1:] if name.startswith("@") else name)
        return True
    return False


#: That of this process.
MANAGER = ServiceManager()
