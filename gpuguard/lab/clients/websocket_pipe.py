"""Standard input and output over a WebSocket, as a ProxyCommand: ``websocket_pipe URL``."""

from __future__ import annotations

import importlib
import os
import select
import sys


def main() -> None:
    """Carry bytes both ways, one message a read, until either side is done."""
    library = importlib.import_module("websockify.websocket")
    socket = library.WebSocket()
    socket.connect(sys.argv[1])
    while True:
        ready, _, _ = select.select([0, socket.socket], [], [])
        if 0 in ready:
            data = os.read(0, 16_384)
            if not data:
                return
            socket.sendmsg(data)
        while socket.socket in ready:
            try:
                data = socket.recvmsg()
            except library.WebSocketWantReadError:  # a message that is not here in full
                break
            if data is None:
                return
            os.write(1, data)
            if not socket.pending():
                break


if __name__ == "__main__":
    main()
