"""Try ports of addresses of an internal network, as an agent's script does: ``probe HOST... -- PORT...``.

Many connections at once, none longer than a moment, nothing sent. It runs in the lab's own network only.
"""

from __future__ import annotations

import select
import socket
import sys
import time

TIMEOUT_S = 0.04
GAP_S = 0.01


def main() -> int:
    """Print what answered."""
    cut = sys.argv.index("--")
    for host in sys.argv[1:cut]:
        for port in sys.argv[cut + 1:]:
            if _answers(host, int(port)):
                print(f"{host}:{port} open")  # noqa: T201
            time.sleep(GAP_S)
    return 0


def _answers(host: str, port: int) -> bool:
    with socket.socket() as attempt:
        attempt.setblocking(False)
        attempt.connect_ex((host, port))
        _, writable, _ = select.select([], [attempt], [], TIMEOUT_S)
        return bool(writable) and attempt.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0


if __name__ == "__main__":
    sys.exit(main())
