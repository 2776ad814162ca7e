"""Where state, sockets and logs live: the FHS for root, the XDG base directories for a user, or where told.

``GPUGUARD_STATE_DIR``, ``GPUGUARD_RUNTIME_DIR`` and ``GPUGUARD_LOG_DIR`` override. The broker sets all three for the
guard, which runs under another uid and would otherwise look elsewhere. Sources: FHS 3.0 sections 3.15, 5.8 and 5.10;
XDG Base Directory Specification 0.8.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

STATE_VARIABLE = "GPUGUARD_STATE_DIR"
RUNTIME_VARIABLE = "GPUGUARD_RUNTIME_DIR"
LOG_VARIABLE = "GPUGUARD_LOG_DIR"
HOST_RUNTIME_DIR = Path("/run/gpuguard")
_SOCKET_NAME_MAX = 108


def state_dir() -> Path:
    """Return where the journal and the kill switch live."""
    if told := os.environ.get(STATE_VARIABLE):
        return Path(told)
    if os.geteuid() == 0:
        return Path("/var/lib/gpuguard")
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "gpuguard"


def runtime_dir() -> Path:
    """Return where sockets live. Without XDG_RUNTIME_DIR a user's are kept with the state, never in a shared /tmp."""
    if told := os.environ.get(RUNTIME_VARIABLE):
        return Path(told)
    if os.geteuid() == 0:
        return HOST_RUNTIME_DIR
    if given := os.environ.get("XDG_RUNTIME_DIR"):
        return Path(given) / "gpuguard"
    return state_dir() / "run"


def log_dir() -> Path:
    """Return where the audit log lives."""
    if told := os.environ.get(LOG_VARIABLE):
        return Path(told)
    if os.environ.get(STATE_VARIABLE) or os.geteuid() != 0:
        return state_dir() / "log"
    return Path("/var/log/gpuguard")


def guard_state_dir() -> Path:
    """Return the one folder below `state_dir` that the unprivileged guard may write."""
    return state_dir() / "guard"


def guard_runtime_dir() -> Path:
    """Return the one folder below `runtime_dir` in which the unprivileged guard may make sockets."""
    return runtime_dir() / "guard"


def control_socket() -> Path:
    """Return the socket on which a running broker takes an operator's commands."""
    return runtime_dir() / "control.sock"


def guarded_by_another() -> bool:
    """Return whether root's guard watches this host while we, who are not root, would speak of one of our own.

    Nothing that we say then reaches the guard that matters, and "no guard is running" would be wrong.
    """
    if os.geteuid() == 0 or os.environ.get(RUNTIME_VARIABLE) or control_socket().exists():
        return False
    return (HOST_RUNTIME_DIR / "control.sock").is_socket()


def short(path: Path, folder: int) -> str:
    """Return a name for ``path`` through an open descriptor of its folder: unix(7) takes no more than 107 bytes."""
    return str(path) if len(os.fsencode(path)) < _SOCKET_NAME_MAX else f"/proc/self/fd/{folder}/{path.name}"


def make_dir(path: Path, *, mode: int = 0o711, uid: int | None = None, gid: int | None = None) -> Path:
    """Make the folder and return it.

    Raises `PermissionError` where it is a link or belongs to somebody else. That others may write to it is taken from
    them: whoever can swap a file in it could make the broker act on his word.
    """
    path.mkdir(mode=0o755, parents=True, exist_ok=True)
    status = path.lstat()
    if not stat.S_ISDIR(status.st_mode):
        raise PermissionError(f"{path} is not a folder")
    if uid is None and status.st_uid != os.geteuid():
        raise PermissionError(f"{path} belongs to uid {status.st_uid}, not to {os.geteuid()}")
    # While it is still ours: who lacks CAP_FOWNER, as under systemd, may not do so to what he handed on.
    if stat.S_IMODE(status.st_mode) != mode:
        path.chmod(mode)
    # A folder that was an earlier guard's is handed on: it lies in one of ours.
    if uid is not None and status.st_uid != uid:
        os.chown(path, uid, -1 if gid is None else gid, follow_symlinks=False)
    return path
