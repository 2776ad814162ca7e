"""A person at a keyboard: types lines into a program on a terminal of its own, with the gaps of human typing.

Gaps between keys are log-normal, median 130 ms, as measured for the sessions that the detectors were built on; a
person also stops to read before the next line. Usage: ``typist SEED SECONDS LINE... -- PROGRAM ARGUMENT...``.
In LAB_TYPIST may stand ``paste``, for lines that come whole, or ``paced``, for keys on a timer of half a second.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import pty
import random
import select
import sys
import time

GAP_MEDIAN_S = 0.13
GAP_SIGMA = 0.45
READ_S = (0.6, 1.4)
PACED_S = 0.5


def main() -> int:
    """Type the lines, wait for the program to end, and return its exit status."""
    cut = sys.argv.index("--")
    seed, seconds, *lines = sys.argv[1:cut]
    print(json.dumps({"started_ns": time.time_ns()}), file=sys.stderr, flush=True)  # noqa: T201
    child, terminal = pty.fork()
    if child == 0:
        os.execv(sys.argv[cut + 1], sys.argv[cut + 1:])  # noqa: S606
    noise = random.Random(int(seed))
    how = os.environ.get("LAB_TYPIST", "")
    deadline = time.monotonic() + float(seconds)
    _drain(terminal, 1.5, deadline)
    for line in [*lines, "exit"]:
        for key in [line + "\r"] if how == "paste" else line + "\r":
            if not _type(terminal, key):
                break
            gap_s = PACED_S if how == "paced" else GAP_MEDIAN_S * math.exp(noise.gauss(0, GAP_SIGMA))
            _drain(terminal, gap_s, deadline)
        _drain(terminal, noise.uniform(*READ_S), deadline)
    while time.monotonic() < deadline and _drain(terminal, 0.2, deadline):
        pass
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _type(terminal: int, key: str) -> bool:
    try:
        os.write(terminal, key.encode())
    except OSError:  # the program has ended
        return False
    return True


def _drain(terminal: int, seconds: float, deadline: float) -> bool:
    """Read what appears on the screen for a while; False once the program has closed its terminal."""
    until = min(time.monotonic() + seconds, deadline)
    while (left := until - time.monotonic()) > 0:
        if select.select([terminal], [], [], left)[0]:
            text = b""
            with contextlib.suppress(OSError):  # EIO: the other end is closed, pty(7)
                text = os.read(terminal, 4096)
            if not text:
                return False
            with contextlib.suppress(BrokenPipeError):
                os.write(1, text)
    return True


if __name__ == "__main__":
    sys.exit(main())
