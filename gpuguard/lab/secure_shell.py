"""Real OpenSSH on both sides of the lab: the system's sshd, or one unpacked for the lab alone.

The set-up unpacks Debian's openssh-server into ``<venv>/lab-root`` without installing it, since installing would start
a server. Keys are made anew each time. As root the server separates privileges as ever; in a user namespace it runs as
an ordinary user in a namespace nested once more, since sshd as a mapped root fails at setgroups(2).
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from gpuguard.lab.namespaces import ROOT, LabClosed, in_network_of, is_root, run, tool_path, user_id

LAB_ROOT = Path(sys.prefix) / "lab-root"
START_TIMEOUT_S = 30.0

_SERVER_SETTINGS = """\
Port 22
ListenAddress 0.0.0.0
HostKey {keys}/host
AuthorizedKeysFile {keys}/authorized
PidFile none
UsePAM no
StrictModes no
UseDNS no
PasswordAuthentication no
KbdInteractiveAuthentication no
PrintLastLog no
PrintMotd no
AllowTcpForwarding yes
LogLevel ERROR
"""


def find_server() -> Path:
    """Return the sshd to run.

    Raises
    ------
    LabClosed
        There is none; the message says how to get one without installing it.
    """
    for place in (Path("/usr/sbin/sshd"), LAB_ROOT / "usr/sbin/sshd"):
        if os.access(place, os.X_OK):
            return place
    raise LabClosed(f"no sshd: neither /usr/sbin/sshd nor {LAB_ROOT}/usr/sbin/sshd (make setup unpacks it there)")


def make_keys() -> Path:
    """Make a host key and a user key, and return the folder that holds them and the server's settings."""
    keys = ROOT / "ssh"
    keys.mkdir(mode=0o755)
    for name in ("host", "user"):
        run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", str(keys / name))
    public = (keys / "user.pub").read_text()
    (keys / "authorized").write_text(public)
    (keys / "authorized").chmod(0o644)
    (keys / "known").write_text(f"* {(keys / 'host.pub').read_text()}")
    (keys / "sshd_config").write_text(_server_settings(keys))
    return keys


def start_server(keys: Path, far_pid: int | None = None) -> subprocess.Popen[bytes]:
    """Start sshd in this network namespace, or in that of ``far_pid``, and wait until it listens."""
    prefix = [] if far_pid is None else in_network_of(far_pid)
    if not is_root():
        unshare = tool_path("unshare")
        number = user_id("agent")
        prefix += [str(unshare), "--user", f"--map-user={number}", f"--map-group={number}", "--"]
    environ = dict(os.environ, LD_LIBRARY_PATH=_private_libraries())
    log = (ROOT / "log" / ("sshd-far" if far_pid else "sshd-node")).open("wb")
    server = subprocess.Popen([*prefix, str(find_server()), "-D", "-e", "-f", str(keys / "sshd_config")], env=environ,
                              stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    deadline = time.monotonic() + START_TIMEOUT_S
    while not _listens(server.pid):
        if server.poll() is not None or time.monotonic() > deadline:
            said = Path(log.name).read_text(errors="replace").strip()
            raise LabClosed(f"sshd did not start: {said or 'it said nothing'}")
        time.sleep(0.02)
    return server


def client_command(user: str, host: str, *options: str, port: int = 22) -> list[str]:
    """Return an ssh command line without its remote command; ``options`` come before the destination."""
    keys = ROOT / "ssh"
    return [
        str(tool_path("ssh")), "-F", "none", "-i", str(keys / "user"), "-p", str(port),
        "-o", f"UserKnownHostsFile={keys / 'known'}", "-o", "GlobalKnownHostsFile=none",
        "-o", "BatchMode=yes", "-o", "LogLevel=ERROR", *options, f"{user}@{host}",
    ]


def _server_settings(keys: Path) -> str:
    settings = _SERVER_SETTINGS.format(keys=keys)
    # OpenSSH 9.8 and 10.0 split the server; its parts must come from the same place.
    parts = find_server().parent.parent / "lib/openssh"
    for keyword, name in (("SshdSessionPath", "sshd-session"), ("SshdAuthPath", "sshd-auth")):
        if LAB_ROOT in parts.parents and (parts / name).exists():
            settings += f"{keyword} {parts / name}\n"
    return settings


def _private_libraries() -> str:
    return ":".join(str(folder) for folder in sorted(LAB_ROOT.glob("usr/lib/*-linux-gnu")))


def _listens(pid: int) -> bool:
    """Return whether anything listens on port 22 (hexadecimal 0016, state 0A) in the namespace of ``pid``."""
    try:
        lines = Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]
    except FileNotFoundError:
        return False
    return any(line.split()[1].endswith(":0016") and line.split()[3] == "0A" for line in lines)

