"""The walls of the lab: one `unshare` of network, mounts and process ids, and of users where we are not root.

Whatever is started or mounted behind them goes with the first process of the new process-id namespace, see
pid_namespaces(7): the kernel kills the rest, and namespaces, mounts and devices without a user vanish. That first
process ends when `unshare` dies (``--kill-child``), and when whoever started `unshare` lets go of its standard input:
so that nothing stays behind, even when any of them is killed by SIGKILL. No `ip netns`, which would leave a mount.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

#: All that the lab writes; a tmpfs of its own mount namespace.
ROOT = Path("/run/gpuguard-lab")

#: Users of the lab's own /etc/passwd. Without root only one id is mapped, and all three names stand for it.
USERS = ("agent", "admin", "outsider")
USER_ID_FIRST = 1001
PRIVSEP_ID = 999


class LabClosed(Exception):
    """The lab cannot be built here; the message says why and what would help."""


def unshare_command(program: Sequence[str]) -> list[str]:
    """Return the command that runs ``program`` as the first process of a new lab."""
    tool = shutil.which("unshare")
    if tool is None or tool_path("ip") is None:
        missing = "unshare (package util-linux)" if tool is None else "ip (package iproute2)"
        raise LabClosed(f"{missing} is missing")
    users = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    return [tool, *users, "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "--", *program]


def start(module: str, settings: Mapping[str, object], environ: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Start ``python -m module SETTINGS`` in a new lab. It ends when its standard input is closed.

    Settings go as one JSON argument. Standard output is the lab's; standard error is kept for when it fails.
    """
    program = [sys.executable, "-m", module, json.dumps(settings)]
    return subprocess.Popen(unshare_command(program), env=dict(environ), stdin=subprocess.PIPE,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)


def run_as_first(body: Callable[[], int]) -> NoReturn:
    """Run ``body`` in a child, and reap orphans until it is done, as the first process of a namespace has to.

    Must be called before any thread is started. Ends the process, and with it everything in the namespace.
    """
    driver = os.fork()
    if driver == 0:
        os._exit(_guarded(body))
    threading.Thread(target=_lifeline, daemon=True).start()
    while True:
        pid, status = os.wait()
        if pid == driver:
            os._exit(os.waitstatus_to_exitcode(status) & 0xFF)


def furnish() -> None:
    """Make this mount namespace the lab's: scratch space, run directory, users, and pseudo-terminals of its own."""
    mount("-t", "tmpfs", "-o", "mode=0755", "tmpfs", "/run")
    for folder in ("etc", "state", "run", "home", "log"):
        (ROOT / folder).mkdir(parents=True)
    Path("/run/sshd").mkdir(mode=0o755)
    _write_users()
    for name in ("passwd", "group", "nsswitch.conf"):
        if (Path("/etc") / name).exists():
            mount("--bind", str(ROOT / "etc" / name), f"/etc/{name}")
    # An instance of its own: sshd may then give out terminals in a user namespace too, devpts of
    # Documentation/filesystems/devpts.rst.
    mount("-t", "devpts", "-o", "newinstance,ptmxmode=0666,mode=0620", "devpts", "/dev/pts")
    mount("--bind", "/dev/pts/ptmx", "/dev/ptmx")
    _open_the_way((Path(sys.base_prefix), Path(sys.prefix), Path(__file__).parents[2]))


def is_root() -> bool:
    """Return whether the lab was built by root; otherwise user ids other than 0 exist only in nested namespaces."""
    return Path("/proc/self/uid_map").read_text().split()[2] == "4294967295"


def user_id(name: str) -> int:
    """Return the number of one of the lab's users, as the lab's own /etc/passwd has it."""
    return USER_ID_FIRST + (USERS.index(name) if is_root() else 0)


def home_of(name: str) -> Path:
    """Return the home of one of the lab's users."""
    return ROOT / "home" / name


def mount(*arguments: str) -> None:
    """Run mount(8)."""
    run("mount", *arguments)


def run(*command: str) -> str:
    """Run one of the system's programs and return what it printed.

    Raises
    ------
    LabClosed
        It is missing or failed; the message holds what it said.
    """
    path = tool_path(command[0])
    if path is None:
        raise LabClosed(f"{command[0]} is missing")
    done = subprocess.run([path, *command[1:]], capture_output=True, text=True, check=False)
    if done.returncode:
        raise LabClosed(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout


def tool_path(name: str) -> str | None:
    """Return where a program is; a user's PATH often lacks sbin."""
    return shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin:/usr/bin:/bin")


def in_network_of(pid: int) -> list[str]:
    """Return the prefix of a command that is to run in the network namespace of ``pid``."""
    path = tool_path("nsenter")
    if path is None:
        raise LabClosed("nsenter is missing (package util-linux)")
    return [path, f"--net=/proc/{pid}/ns/net", "--"]


def _write_users() -> None:
    lines = ["root:x:0:0:root:/root:/bin/sh", f"sshd:x:{PRIVSEP_ID}:{PRIVSEP_ID}::/run/sshd:/usr/sbin/nologin",
             "nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin"]
    groups = ["root:x:0:", f"sshd:x:{PRIVSEP_ID}:", "nogroup:x:65534:"]
    for name in USERS:
        number = user_id(name)
        lines.append(f"{name}:x:{number}:{number}:{name}:{home_of(name)}:/bin/sh")
        groups.append(f"{name}:x:{number}:")
        home_of(name).mkdir(mode=0o755)
        if is_root():
            os.chown(home_of(name), number, number)
    (ROOT / "etc/passwd").write_text("\n".join(lines) + "\n")
    # No group "tty": sshd would hand terminals to it, which a user namespace with one group forbids.
    (ROOT / "etc/group").write_text("\n".join(groups) + "\n")
    (ROOT / "etc/nsswitch.conf").write_text("passwd: files\ngroup: files\nshadow: files\nhosts: files\n")


def _open_the_way(needed: Sequence[Path]) -> None:
    """Let every user of the lab reach these folders, where one above them is closed to others (a home, mostly).

    In this mount namespace only, the closed folder is covered by an empty one that holds just the needed.
    """
    ways = [(path, closed) for path in dict.fromkeys(needed) if (closed := _closed_above(path))]
    for number, (path, _) in enumerate(ways):
        (ROOT / "way" / str(number)).mkdir(parents=True)
        mount("--bind", str(path), str(ROOT / "way" / str(number)))
    for closed in dict.fromkeys(closed for _, closed in ways):
        mount("-t", "tmpfs", "-o", "mode=0755", "tmpfs", str(closed))
    for number, (path, _) in enumerate(ways):
        path.mkdir(parents=True, exist_ok=True)
        mount("--bind", str(ROOT / "way" / str(number)), str(path))


def _closed_above(path: Path) -> Path | None:
    """Return the highest folder above ``path`` that others may not pass through."""
    return next((one for one in reversed(path.parents) if not one.stat().st_mode & 0o001), None)


def _guarded(body: Callable[[], int]) -> int:
    try:
        return body()
    except LabClosed as closed:
        print(f"lab: {closed}", file=sys.stderr)  # noqa: T201
        return 3


def _lifeline() -> None:
    while os.read(0, 4096):
        pass
    os._exit(1)
