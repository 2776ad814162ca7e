"""The privileged half of the code eye: starts the program that reads images (`gpuguard.code.worker`), and nothing else.

The guard cannot start it where the interpreter lies below a folder that only root may enter. So the broker does, as it
started the guard: the program loads its code and the allow list, gives up every privilege for good (`confine.drop`:
another uid than root's and no capability), and only then reads the first byte from the guard, who holds the other end
of its one socket. It ends when that end closes, and dies with the broker. The broker itself sees nothing of an image.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys

from gpuguard import confine
from gpuguard.code.allow import default_path
from gpuguard.messages import Opened, Refused

STOP_S = 1.0
_running: list[subprocess.Popen[bytes]] = []


def grant(identity: tuple[int, int] | None) -> tuple[Opened | Refused, tuple[int, ...]]:
    """Start one reader with this uid and gid; return the guard's end of its socket. One at a time."""
    for one in _running:
        try:
            one.wait(STOP_S)  # the guard has closed its end and may ask for the next before the last is gone
        except subprocess.TimeoutExpired:
            return Refused("a reader of images runs already"), ()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = [*worker_command(theirs.fileno()), "--allow", str(default_path()), "--confined"]
    if identity is not None:
        command += ["--uid", str(identity[0]), "--gid", str(identity[1])]
    try:
        _running[:] = [subprocess.Popen(command, pass_fds=(theirs.fileno(),), stdin=subprocess.DEVNULL,
                                        env=confine.kept_environ(), start_new_session=True)]
    except OSError as error:
        ours.close()
        return Refused(f"the reader cannot be started: {error}"), ()
    finally:
        theirs.close()
    return Opened(("reader",), f"process {_running[0].pid}"), (ours.detach(),)


def worker_command(descriptor: int) -> list[str]:
    """Return how the program is started. -P: no module is taken from the current folder, which may be a scanned one."""
    return [sys.executable, "-P", "-m", "gpuguard.code.worker", "--fd", str(descriptor), "--parent", str(os.getpid())]


def release() -> None:
    """See the reader off: the guard's end of its socket is closed by now."""
    for one in _running:
        try:
            one.wait(STOP_S)
        except subprocess.TimeoutExpired:
            one.kill()
            one.wait()
    _running.clear()
