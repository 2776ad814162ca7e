"""The SSH implementations of the lab: what is here, and how each is started as a client and as a server.

`scripts/lab_peers.sh` puts OpenSSH and dropbear of several Debian releases, each with its own C library, below
``<venv>/lab-peers``; AsyncSSH, Paramiko and libssh are Python packages, Go's client is compiled. A peer is named
``openssh:RELEASE``, ``dropbear:RELEASE``, or by its library. What is missing is left out, and said.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from gpuguard.lab.namespaces import ROOT, LabClosed, in_network_of, run

if TYPE_CHECKING:
    from gpuguard.lab.clients.plan import Plan

PEERS = Path(sys.prefix) / "lab-peers"
RELEASES = ("bullseye", "bookworm", "trixie", "sid")
KEYS = ROOT / "ssh"
#: Where each server listens, on every address of its machine.
SERVER_PORTS = {
    "openssh:bookworm": 22,
    "openssh:bullseye": 2201,
    "openssh:trixie": 2203,
    "openssh:sid": 2204,
    "dropbear:bullseye": 2211,
    "dropbear:bookworm": 2212,
    "dropbear:trixie": 2213,
    "dropbear:sid": 2214,
    "asyncssh": 2221,
}
_PYTHON_MODULES = {"asyncssh": "asyncssh", "paramiko": "paramiko", "libssh": "ssh"}
_CLIENTS = {
    "asyncssh": "gpuguard.lab.clients.asyncssh_client",
    "paramiko": "gpuguard.lab.clients.paramiko_client",
    "libssh": "gpuguard.lab.clients.libssh_client",
}
_START_S = 8.0

_SERVER_SETTINGS = """\
Port {port}
ListenAddress 0.0.0.0
HostKey {keys}/host
HostKey {keys}/host_ecdsa
HostKey {keys}/host_rsa
AuthorizedKeysFile {keys}/authorized
PidFile none
UsePAM no
StrictModes no
UseDNS no
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin yes
PermitTunnel yes
StreamLocalBindUnlink yes
GatewayPorts clientspecified
PrintLastLog no
PrintMotd no
MaxStartups 500
LogLevel ERROR
Ciphers +aes128-cbc,aes256-cbc,3des-cbc
MACs +hmac-md5,hmac-sha1-96
Subsystem sftp {root}/usr/lib/openssh/sftp-server
"""


def available(name: str) -> bool:
    """Return whether a peer can be run here."""
    kind, _, release = name.partition(":")
    if kind == "program":
        return True
    if kind == "openssh":
        return (PEERS / release / "usr/bin/ssh").exists()
    if kind == "dropbear":
        return (PEERS / release / "usr/bin/dbclient").exists()
    if kind == "go":
        return (PEERS / "go-client").exists()
    return importlib.util.find_spec(_PYTHON_MODULES[kind]) is not None


def make_keys() -> None:
    """Make the host key, the user's key in the formats of OpenSSH and dropbear, and every server's settings."""
    KEYS.mkdir(mode=0o755)
    for name in ("host", "user"):
        run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", str(KEYS / name))
    for kind in ("ecdsa", "rsa"):
        run("ssh-keygen", "-q", "-t", kind, "-N", "", "-C", "host", "-f", str(KEYS / f"host_{kind}"))
    (KEYS / "authorized").write_text((KEYS / "user.pub").read_text())
    (KEYS / "authorized").chmod(0o644)
    for release in RELEASES:
        port = SERVER_PORTS[f"openssh:{release}"]
        text = _SERVER_SETTINGS.format(port=port, keys=KEYS, root=PEERS / release)
        # OpenSSH 9.8 and 10.0 split the server; its parts must be of the same version.
        for keyword, part in (("SshdSessionPath", "sshd-session"), ("SshdAuthPath", "sshd-auth")):
            path = PEERS / release / "usr/lib/openssh" / part
            if path.exists():
                text += f"{keyword} {path}\n"
        (KEYS / f"sshd_config-{release}").write_text(text)
    converter = next((path for path in PEERS.glob("*/usr/*bin/dropbearconvert") if path.exists()), None)
    if converter:
        for name in ("user", "host"):
            run(str(converter), "openssh", "dropbear", str(KEYS / name), str(KEYS / f"{name}.dropbear"))
        # dropbear asks the home of each user only.
        for home in (Path("/root"), ROOT / "home/outsider"):
            (home / ".ssh").mkdir(mode=0o700, exist_ok=True)
            (home / ".ssh/authorized_keys").write_text((KEYS / "authorized").read_text())
        run("chown", "-R", "outsider:outsider", str(ROOT / "home/outsider"))


def start_servers(names: tuple[str, ...], pid: int | None) -> list[subprocess.Popen[bytes]]:
    """Start these servers in this network namespace, or in that of ``pid``, and wait until all listen."""
    prefix = [] if pid is None else in_network_of(pid)
    started = []
    for name in names:
        log = (ROOT / "log" / f"server-{name}-{pid or 0}").open("wb")
        started.append(subprocess.Popen([*prefix, *_server_command(name)], stdin=subprocess.DEVNULL, stdout=log,
                                        stderr=log))
    deadline = time.monotonic() + _START_S
    for name, server in zip(names, started, strict=True):
        while not listens(server.pid, SERVER_PORTS[name]):
            if server.poll() is not None or time.monotonic() > deadline:
                said = (ROOT / "log" / f"server-{name}-{pid or 0}").read_text(errors="replace")
                raise LabClosed(f"{name} does not listen: {said.strip() or 'it said nothing'}")
            time.sleep(0.02)
    return started


def listens(pid: int, port: int) -> bool:
    """Return whether anything listens on a TCP port in the network namespace of ``pid``."""
    wanted = f":{port:04X}"
    for table in ("tcp", "tcp6"):
        path = Path(f"/proc/{pid}/net/{table}")
        lines = path.read_text().splitlines()[1:] if path.exists() else []
        if any(line.split()[1].endswith(wanted) and line.split()[3] == "0A" for line in lines):
            return True
    return False


def _server_command(name: str) -> list[str]:
    kind, _, release = name.partition(":")
    port = SERVER_PORTS[name]
    if kind == "openssh":
        return [str(PEERS / release / "usr/sbin/sshd"), "-D", "-e", "-f", str(KEYS / f"sshd_config-{release}")]
    if kind == "dropbear":
        return [str(PEERS / release / "usr/sbin/dropbear"), "-F", "-E", "-s", "-a", "-p", str(port), "-r",
                str(KEYS / "host.dropbear")]
    return [sys.executable, "-m", "gpuguard.lab.clients.asyncssh_client", "serve", str(KEYS / "host"),
            str(KEYS / "authorized"), str(port)]


def openssh(release: str, host: str, server: str, *options: str, user: str = "outsider",
            port: int | None = None) -> list[str]:
    """Return the command line of an OpenSSH client without its remote command."""
    return [
        str(PEERS / release / "usr/bin/ssh"), "-F", "none", "-i", str(KEYS / "user"),
        "-p", str(port or SERVER_PORTS[server]),
        "-o", "UserKnownHostsFile=/dev/null", "-o", "GlobalKnownHostsFile=none", "-o", "StrictHostKeyChecking=no",
        "-o", "BatchMode=yes", "-o", "LogLevel=ERROR", "-o", "IdentitiesOnly=yes", *options, f"{user}@{host}",
    ]


def dropbear(release: str, host: str, server: str, *options: str) -> list[str]:
    """Return the command line of dropbear's client without its remote command."""
    return [str(PEERS / release / "usr/bin/dbclient"), "-y", "-y", "-i", str(KEYS / "user.dropbear"), "-p",
            str(SERVER_PORTS[server]), *options, f"outsider@{host}"]


def library(name: str, plan: Plan) -> list[str]:
    """Return the command line of a client that plays a plan."""
    text = msgspec.json.encode(plan).decode()
    if name == "go":
        return [str(PEERS / "go-client"), text]
    return [sys.executable, "-m", _CLIENTS[name], text]


def environment() -> dict[str, str]:
    """Return what clients run with: no agent, display or proxy of whoever started the lab."""
    return {name: value for name, value in os.environ.items()
            if name not in ("SSH_AUTH_SOCK", "DISPLAY") and not name.lower().endswith("_proxy")}
