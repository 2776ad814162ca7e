"""Which side of a key exchange is the client: each says so by what it offers."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gpuguard.core.records import SshKexInit

# RFC 8308 section 2.1, and OpenSSH's strict key exchange (PROTOCOL section 1.10): each side says which one it is.
_CLIENT_MARKS = ("ext-info-c", "kex-strict-c-v00@openssh.com")
_SERVER_MARKS = ("ext-info-s", "kex-strict-s-v00@openssh.com")


def role_of(kexinit: SshKexInit) -> str:
    """Return client, server, or "" where the sender does not say (old software) or says both."""
    client = any(mark in kexinit.kex for mark in _CLIENT_MARKS)
    server = any(mark in kexinit.kex for mark in _SERVER_MARKS)
    return "" if client == server else "client" if client else "server"
