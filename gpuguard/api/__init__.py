"""The gRPC API ``gpuguard.v1`` on a unix socket; proto/gpuguard/v1 says what it means, v1/ is generated from that."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gpuguard import paths

if TYPE_CHECKING:
    from pathlib import Path

#: Above this a message is refused on either side: an answer holds at most `INCIDENTS_MAX` incidents.
MESSAGE_BYTES_MAX = 64 * 1024 * 1024
INCIDENTS_MAX = 1_000


def socket_path() -> Path:
    """Return the socket on which the guard of this host (or of this user) is reached."""
    return paths.guard_runtime_dir() / "gpuguard.sock"
