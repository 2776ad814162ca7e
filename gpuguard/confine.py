"""Start the guard with nothing: another uid, no groups, no capabilities, none to be gained, one socket.

The guard's process drops everything itself, once its code is loaded and before it has read a byte from anybody, as
OpenSSH's does: an interpreter below a home that only its owner may enter could not be executed by another uid.

Each step narrows, in the only order that works: capabilities leave the bounding set while we still may remove them,
then groups and uid go, then PR_SET_NO_NEW_PRIVS closes the way back through set-uid files. Sources: capabilities(7),
prctl(2), linux/capability.h.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import pwd
import signal
import struct
import subprocess
from typing import TYPE_CHECKING

from gpuguard import paths
from gpuguard.proctree import PROC, lines_of
from gpuguard.sealing import sealed

if TYPE_CHECKING:
    import socket
    from collections.abc import Sequence

#: Whom the guard runs as where there is such a user; else as nobody.
GUARD_USER = "gpuguard"
NOBODY = (65534, 65534)

_PR_SET_PDEATHSIG, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS = 1, 24, 38
_CAPABILITY_VERSION_3 = 0x2008_0522
_BITS = {"packets": (13, "CAP_NET_RAW"), "launches": (39, "CAP_BPF"), "processes": (12, "CAP_NET_ADMIN")}
_SYS_ADMIN = 21
_ENVIRON_KEPT = ("HOME", "LANG", "LANGUAGE", "NO_COLOR", "PATH", "TERM", "TMPDIR", "TZ", "VIRTUAL_ENV")
_ENVIRON_KEPT_PREFIXES = ("CUDA_", "GPUGUARD_", "GRPC_", "LC_", "LD_", "NUMBA_", "NVIDIA_", "PYTHON", "XDG_")


def guard_identity() -> tuple[int, int] | None:
    """Return uid and gid for the guard: the ``gpuguard`` user, else ``nobody``; None where we cannot change ours.

    A root of a user namespace that maps nobody else (user_namespaces(7)) cannot.
    """
    mapped = sum(int(line.split()[2]) for line in (PROC / "self/uid_map").read_text().splitlines())
    if os.geteuid() != 0 or mapped == 1:
        return None
    for name in (GUARD_USER, "nobody"):
        with contextlib.suppress(KeyError):
            entry = pwd.getpwnam(name)
            return entry.pw_uid, entry.pw_gid
    return NOBODY


def capabilities() -> int:
    """Return our effective capabilities as a mask."""
    status = (PROC / "self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("CapEff:")), 16)


def missing_capability(eye: str) -> str:
    """Return which capability an eye lacks here, "" if none."""
    bit, name = _BITS.get(eye, (0, ""))
    held = capabilities()
    return f"needs {name}" if name and not held & (1 << bit | (1 << _SYS_ADMIN if eye == "launches" else 0)) else ""


def drop(identity: tuple[int, int] | None, parent: int) -> None:
    """Give everything up, for good. Raises `OSError`: then there must be no guard. Ends where ``parent`` is gone."""
    libc = ctypes.CDLL(None, use_errno=True)
    last = int((PROC / "sys/kernel/cap_last_cap").read_text())
    if capabilities() & 1 << 8:  # CAP_SETPCAP
        for bit in range(last + 1):
            libc.prctl(_PR_CAPBSET_DROP, bit, 0, 0, 0)
    if identity is not None:
        os.setgroups([])
        os.setresgid(identity[1], identity[1], identity[1])
        os.setresuid(identity[0], identity[0], identity[0])
    header = struct.pack("=Ii", _CAPABILITY_VERSION_3, 0)
    if libc.capset(header, bytes(24)) != 0 or libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "privileges could not be dropped")
    # Changing uid clears it, so it comes last; a broker that died before it is noticed by its pid.
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def left_of(pid: int) -> str:
    """Return what privileges a process still has, "" if it gave up everything that `drop` takes."""
    fields = dict(line.split(":", 1) for line in lines_of(PROC / str(pid) / "status") if ":" in line)
    held = [name for name in ("CapInh", "CapPrm", "CapEff", "CapAmb") if int(fields[name], 16)]
    return ", ".join(held + ([] if fields["NoNewPrivs"].strip() == "1" else ["new privileges"]))


def kept_environ() -> dict[str, str]:
    """Return what the guard needs of our environment: who starts a daemon by hand may have secrets in his."""
    kept = {name: value for name, value in os.environ.items()
            if name in _ENVIRON_KEPT or name.startswith(_ENVIRON_KEPT_PREFIXES)}
    # As in the command line: no product of matrices here, and gRPC writes no lines of its own.
    return {"GRPC_VERBOSITY": "NONE", **kept, "OPENBLAS_NUM_THREADS": "1"}


def spawn(command: Sequence[str], peer: socket.socket, handover: bytes,
          identity: tuple[int, int] | None) -> subprocess.Popen[bytes]:
    """Start the guard with its end of the pair and what it needs to know."""
    start = sealed("gpuguard-start", handover)
    environ = {**kept_environ(), paths.STATE_VARIABLE: str(paths.state_dir()),
               paths.RUNTIME_VARIABLE: str(paths.runtime_dir()), paths.LOG_VARIABLE: str(paths.log_dir())}
    if identity is not None:
        home = str(paths.guard_state_dir())
        environ |= {"HOME": home, "XDG_CACHE_HOME": f"{home}/cache", "NUMBA_CACHE_DIR": f"{home}/cache/numba"}
    numbers = ["--broker-fd", str(peer.fileno()), "--start-fd", str(start), "--parent", str(os.getpid())]
    if identity is not None:
        numbers += ["--uid", str(identity[0]), "--gid", str(identity[1])]
    try:
        return subprocess.Popen([*command, *numbers], pass_fds=(peer.fileno(), start), env=environ,
                                stdin=subprocess.DEVNULL, start_new_session=True)
    finally:
        os.close(start)
