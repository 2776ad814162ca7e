"""Bytes between a channel and a port of this side, for the libraries that leave that to their user."""

from __future__ import annotations

import contextlib
import socket
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from gpuguard.lab.clients.plan import Reverse


def relay(receive: Callable[[int], bytes], send: Callable[[bytes], object], to: Reverse) -> None:
    """Connect to where a forward leads and carry bytes until either side is done."""
    with socket.create_connection((to.to_host, to.to_port)) as inner:
        def back() -> None:
            with contextlib.suppress(OSError):
                while data := inner.recv(32_768):
                    send(data)
        threading.Thread(target=back, daemon=True).start()
        with contextlib.suppress(OSError):
            while data := receive(32_768):
                inner.sendall(data)
