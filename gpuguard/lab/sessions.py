"""SSH as people and programs use it, good and bad: how each scenario of `corpus` that is not of `programs` goes."""

from __future__ import annotations

import contextlib
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from gpuguard.lab import corpus, link, peers
from gpuguard.lab.clients.plan import Plan, Reverse
from gpuguard.lab.namespaces import tool_path
from gpuguard.lab.player import HOLD_S, LINES, SETTLE_S, Player, typing

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

#: Where SSH is wrapped for whom, on the far side.
CARRIER_PORTS = {(carrier, f"openssh:{release}"): first + number
                 for carrier, first in (("tls", 8440), ("websocket", 8450))
                 for number, release in enumerate(peers.RELEASES)}


def play(player: Player) -> None:
    """Play a scenario of SSH: by a way of its own where its use has one, else as its client does."""
    kind, _, release = player.scenario.client.partition(":")
    if player.scenario.use in _OWN_WAYS:
        _OWN_WAYS[player.scenario.use](player, release)
    elif kind in ("openssh", "dropbear"):
        _program(player, kind, release)
    else:
        _library(player, kind)


# -- clients ----------------------------------------------------------------------------------------------------------


def _program(player: Player, kind: str, release: str) -> None:
    one = player.scenario
    command = _command(player, kind, release)
    player.asked_ns = time.time_ns()
    client = _body(player, command, one.body)
    time.sleep(SETTLE_S)
    if one.late:
        player.until(lambda: Path(_socket(player)).exists())
        time.sleep(SETTLE_S / 2)
        player.asked_ns = time.time_ns()
        control = peers.openssh(release, player.host, one.server, "-S", _socket(player), "-O", "forward",
                                *_filled(player, one.late))
        player.run(control)
        time.sleep(SETTLE_S / 2)
    if one.through:
        _use(player)
    elif "unix" in one.use:
        player.until(lambda: Path(f"/tmp/lab-{player.ports['f']}.sock").exists())
        time.sleep(0.5)
    elif one.body == "none":
        time.sleep(2 * SETTLE_S)
    with contextlib.suppress(subprocess.TimeoutExpired):
        client.wait(HOLD_S if one.body not in ("none", "web", "socks", "idle-shell") else 0.5)
    status = client.poll()
    # 255: the typist hung up.
    if status not in (None, 0, 255 if "shell" in one.body else 0) and one.use != "refused":
        player.problem = player.problem or f"the client ended with {status}"


def _command(player: Player, kind: str, release: str, *more: str, server: str = "", host: str = "") -> list[str]:
    """Return the client's command line without a remote command."""
    one = player.scenario
    cipher, mac = corpus.SUITES.get(one.suite, ("", ""))
    options = [*(("-c", cipher) if cipher else ()), *(("-m", mac) if mac else ()), *_filled(player, one.arguments),
               *more]
    if kind == "dropbear":
        return peers.dropbear(release, host or player.host, server or one.server, *options)
    if one.late:
        options += ["-M", "-S", _socket(player)]
    if "hostkeys" in one.use:
        known = Path(f"/run/lab-known-{player.number}")
        known.write_text(f"[{player.host}]:{peers.SERVER_PORTS[one.server]} {(peers.KEYS / 'host.pub').read_text()}"
                         f"{player.host} {(peers.KEYS / 'host.pub').read_text()}")
        options += ["-o", f"UserKnownHostsFile={known}", "-o", "UpdateHostKeys=yes"]
    if one.use.startswith("evasion-tls"):
        options += ["-o", f"ProxyCommand=socat - OPENSSL:{player.host}:{CARRIER_PORTS['tls', one.server]},verify=0"]
    if one.use.startswith("evasion-websocket"):
        port = CARRIER_PORTS["websocket", one.server]
        options += ["-o", (f"ProxyCommand={sys.executable} -m gpuguard.lab.clients.websocket_pipe "
                          f"ws://{player.host}:{port}/")]
    command = peers.openssh(release, host or player.host, server or one.server, *options, user=one.user)
    # A display is asked for only where there is one; nobody draws on it.
    return ["/usr/bin/env", "DISPLAY=127.0.0.1:10", *command] if "x11-asked" in one.use else command


def _socket(player: Player) -> str:
    return f"/run/lab-{player.number}"


def _filled(player: Player, arguments: Sequence[str]) -> list[str]:
    """Return arguments with the scenario's own ports in them."""
    return [one.format(**player.ports) for one in arguments]


def _body(player: Player, command: list[str], body: str) -> subprocess.Popen[bytes]:
    match body:
        case "none":
            client = player.spawn(command)
        case "idle-shell":
            # A terminal of its own: without one, ssh asks for one without modes.
            client = player.spawn(["script", "-qfc", shlex.join(command), "/dev/null"], stdin=subprocess.PIPE)
        case "shell":
            client = player.spawn(typing(player.number, command))
        case "paste":
            client = player.spawn(command, stdin=subprocess.PIPE)
            time.sleep(SETTLE_S)
            for _ in range(3):
                player.write(client, ("\n".join(LINES) + "\n").encode())
                time.sleep(1)
            player.write(client, b"exit\n")
        case "pipe":
            text = shlex.join([*command, "cat >/dev/null"])
            client = player.spawn(["sh", "-c", f"head -c 1500000 /dev/urandom | {text}"])
        case "web" | "socks":
            client = player.spawn(command)
            time.sleep(SETTLE_S)
            for name in ("127.0.0.1", "localhost", player.host):
                _fetch(player, body, name)
        case "jump" | "jump-shell":
            inner = [*peers.openssh("bookworm", "127.0.0.1", "openssh:bookworm"), "-o",
                     "ProxyCommand=" + shlex.join(command)]
            client = player.spawn(typing(player.number, inner[:-3] + inner[-2:] + inner[-3:-2])
                                if body == "jump-shell" else [*inner[:-3], *inner[-2:], inner[-3], "uname -a"])
        case _:
            client = player.spawn([*command, body])
    return client


def _fetch(player: Player, body: str, name: str) -> None:
    port = player.ports["l"]
    if body == "web":
        player.run(["curl", "-s", "-o", "/dev/null", "--max-time", "8", f"http://127.0.0.1:{port}/"])
    else:
        player.run(["curl", "-s", "-o", "/dev/null", "--max-time", "8", "--socks5-hostname", f"127.0.0.1:{port}",
                  f"http://{name}:7003/"])


def _library(player: Player, kind: str) -> None:
    one = player.scenario
    cipher, mac = corpus.SUITES.get(one.suite, ("", ""))
    shell = LINES if "shell" in one.use else LINES[:1] if one.use == "reverse-late" else ()
    binds = {"reverse-wide": ("0.0.0.0",), "reverse-many": ("127.0.0.1", "localhost", "")}.get(  # noqa: S104
        one.use, ("127.0.0.1",))
    binds = tuple(bind or "127.0.0.1" for bind in binds)
    forwards = tuple(Reverse(bind, port, "127.0.0.1", player.ports["t"], f"/tmp/lab-{player.number}.sock"
                             if "unix" in one.use else "")
                     for bind, port in zip(binds, (player.ports["f"], player.ports["f1"], player.ports["f2"]),
                                           strict=False)) if one.expected == "ssh-reverse-tunnel" else ()
    long = one.through in ("inner", "pty") or bool(shell)
    plan = Plan(
        host=player.host, port=peers.SERVER_PORTS[one.server], user="outsider", key=str(peers.KEYS / "user"),
        seed=player.number, hold_s=HOLD_S + 4 if long else 5.0, cipher=cipher, mac=mac,
        compressed="compressed" in one.use, padded="padding" in one.use,
        reverse=forwards, reverse_after_s=2.5 if one.use == "reverse-late" else 0.0, shell=shell,
        commands=("uname -a",) if one.use == "exec" else (),
        put_bytes=400_000 if one.use == "sftp" else 0,
        local={"local": (("127.0.0.1", 7003),) * 2,
               "dynamic": (("127.0.0.1", 7003), ("localhost", 7003), (player.host, 7003))}.get(one.use, ()),
    )
    player.asked_ns = time.time_ns()
    client = player.spawn(peers.library(kind, plan))
    time.sleep(SETTLE_S + 1.0 + (2.5 if one.use == "reverse-late" else 0))
    if one.through:
        _use(player)
    with contextlib.suppress(subprocess.TimeoutExpired):
        client.wait(HOLD_S + 6)
    if client.poll() not in (None, 0):
        player.problem = player.problem or f"the client ended with {client.poll()}: {player.said()}"


# -- what the far side does with a tunnel -----------------------------------------------------------------------------


def _use(player: Player) -> None:
    port = str(player.ports["f"])
    player.wait_for_port(player.ports["f"])
    time.sleep(SETTLE_S / 4)
    through = player.scenario.through
    player.used_ns = time.time_ns()
    if through == "touch":
        player.run([*player.far, str(tool_path("socat")), "-T1", "-u", f"TCP:127.0.0.1:{port}", "-"])
        time.sleep(0.3)
        return
    if through == "bulk":
        player.run([*player.far, "curl", "-s", "-o", "/dev/null", "--max-time", "8", f"http://127.0.0.1:{port}/"])
        return
    if through in ("inner", "chaff", "paste", "paced", "slow"):
        inner = peers.openssh("sid" if through == "chaff" else "bookworm", "127.0.0.1", "openssh:bookworm", "-tt",
                              port=player.ports["f"])
    else:
        inner = [str(tool_path("socat")), "-,raw,echo=0" if through == "pty" else "-", f"TCP:127.0.0.1:{port}"]
    if through == "slow":
        _use_slowly(player, inner)
        return
    visitor = player.spawn([*player.far, *typing(player.number, inner)], how=through)
    with contextlib.suppress(subprocess.TimeoutExpired):
        visitor.wait(HOLD_S + 4)


def _use_slowly(player: Player, inner: list[str]) -> None:
    """One line every few seconds, into a shell without a terminal: nothing is echoed."""
    visitor = player.spawn([*player.far, *(word for word in inner if word != "-tt")], stdin=subprocess.PIPE)
    for _ in range(12):
        time.sleep(4)
        player.write(visitor, b"id; hostname\n")
    player.write(visitor, b"exit\n")
    with contextlib.suppress(subprocess.TimeoutExpired):
        visitor.wait(HOLD_S)


# -- uses with a way of their own -------------------------------------------------------------------------------------


def _scp_up(player: Player, release: str) -> None:
    player.run([*_scp(player, release), "/usr/bin/git", f"outsider@{player.host}:/tmp/lab-{player.number}"])


def _scp_down(player: Player, release: str) -> None:
    player.run([*_scp(player, release), f"outsider@{player.host}:/usr/bin/socat", f"/run/lab-down-{player.number}"])


def _sftp(player: Player, release: str) -> None:
    if not release:
        _library(player, player.scenario.client)
        return
    _copy(player, release)


def _copy(player: Player, release: str, *options: str) -> None:
    """Put a file by SFTP."""
    programs = peers.PEERS / release / "usr/bin"
    command = [str(programs / "sftp"), "-S", str(programs / "ssh"), "-b", "-", *_scp(player, release)[3:], *options,
               f"outsider@{player.host}"]
    child = player.spawn(command, stdin=subprocess.PIPE)
    player.write(child, f"ls /\nput /usr/bin/socat /tmp/lab-{player.number}\nls /tmp\nbye\n".encode())
    child.wait(HOLD_S)


def _scp(player: Player, release: str) -> list[str]:
    options = peers.openssh(release, "x", player.scenario.server)[1:-1]
    options[options.index("-p")] = "-P"
    return [str(peers.PEERS / release / "usr/bin/scp"), "-S", str(peers.PEERS / release / "usr/bin/ssh"), *options]


def _rsync(player: Player, release: str) -> None:
    shell = shlex.join(peers.openssh(release, "x", player.scenario.server)[:-1])
    player.run(["rsync", "-a", "-e", shell, "/usr/share/doc/openssh-client", "/usr/bin/git",
              f"outsider@{player.host}:/tmp/lab-{player.number}/"])


def _git(player: Player, release: str) -> None:
    shell = shlex.join(peers.openssh(release, "x", player.scenario.server)[:-1])
    repository = f"/run/lab-repo-{player.number}"
    player.run(["git", "init", "-q", repository])
    player.run(["git", "-C", repository, "-c", "user.name=lab", "-c", "user.email=lab@lab", "commit", "-q",
              "--allow-empty", "-m", "empty"])
    player.run(["chmod", "-R", "a+rX", repository])
    player.run(["git", "-c", f"core.sshCommand={shell}", "-c", "protocol.version=2", "ls-remote",
              f"outsider@{player.host}:{repository}"], may_fail=True)


def _ansible(player: Player, release: str) -> None:
    """A control master that stays, then a command, a file by SFTP and a command on a terminal over it."""
    master = ("-o", "ControlMaster=auto", "-o", "ControlPersist=3", "-S", _socket(player))
    base = peers.openssh(release, player.host, player.scenario.server, *master)
    player.run([*base, "/bin/sh -c 'echo ~ && sleep 0'"])
    player.run([*base, "/bin/sh -c '( umask 77 && mkdir -p /tmp/a )'"])
    child = player.spawn([*base[:-1], "-s", base[-1], "sftp"], stdin=subprocess.PIPE)
    time.sleep(0.5)
    child.terminate()
    player.run([*base[:-1], "-tt", base[-1], "/bin/sh -c 'python3 -c 1; sleep 0'"])
    time.sleep(3.5)


def _vscode(player: Player, release: str) -> None:
    """One `bash` fed with a script, a SOCKS port beside it, and connections through that: Remote-SSH."""
    base = peers.openssh(release, player.host, player.scenario.server, "-T", "-D", str(player.ports["l"]))
    child = player.spawn([*base, "bash"], stdin=subprocess.PIPE)
    time.sleep(SETTLE_S)
    player.write(child, b"uname -rsv; ls -la ~ | head -3; echo listening\n" * 5)
    time.sleep(0.5)
    for name in ("localhost", "127.0.0.1", "localhost"):
        _fetch(player, "socks", name)
    player.write(child, b"exit\n")
    child.wait(HOLD_S)


def _exec_multiplexed(player: Player, release: str) -> None:
    base = peers.openssh(release, player.host, player.scenario.server, "-o", "ControlMaster=auto", "-o",
                         "ControlPersist=2", "-S", _socket(player))
    for _ in range(6):
        player.run([*base, "cat /proc/loadavg"])
        time.sleep(0.2)
    time.sleep(2.5)


def _shell_multiplexed(player: Player, release: str) -> None:
    """A shell stays open; beside it a command, a copy and a local port, all over its connection."""
    server, control = player.scenario.server, f"ControlPath={_socket(player)}"
    shell = _body(player, peers.openssh(release, player.host, server, "-tt", "-M", "-o", control), "idle-shell")
    player.until(lambda: Path(_socket(player)).exists())
    time.sleep(SETTLE_S)
    player.run([*peers.openssh(release, player.host, server, "-o", control), "cat /proc/loadavg"])
    time.sleep(0.5)
    _copy(player, release, "-o", control)
    player.run(peers.openssh(release, player.host, server, "-o", control, "-O", "forward", "-L",
                             f"{player.ports['l']}:127.0.0.1:7003"))
    _fetch(player, "web", "")
    player.write(shell, b"exit\n")
    shell.wait(HOLD_S)


def _refused(player: Player, release: str) -> None:
    player.run([*peers.openssh(release, player.host, player.scenario.server, user="stranger"), "true"], may_fail=True)


def _reverse_autossh(player: Player, release: str) -> None:
    command = _command(player, "openssh", release)
    environ = dict(peers.environment(), AUTOSSH_PATH=command[0], AUTOSSH_GATETIME="0")
    player.asked_ns = time.time_ns()
    player.children.append(subprocess.Popen([str(tool_path("autossh")), "-M", "0", *command[1:]], env=environ,
                                          stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
    time.sleep(SETTLE_S)
    if player.scenario.through:
        _use(player)


def _inbound(player: Player, release: str, *options: str) -> list[str]:
    """The far side logs in on the node from this scenario's address."""
    return [*player.far, *peers.openssh(release, link.NODE, player.scenario.server, "-b", player.host,
                                      *_filled(player, player.scenario.arguments), *options)]


def _inbound_shell(player: Player, release: str) -> None:
    child = player.spawn([*player.far, *typing(player.number, _inbound(player, release, "-tt")[len(player.far):])])
    child.wait(HOLD_S + 6)


def _inbound_exec(player: Player, release: str) -> None:
    player.run([*_inbound(player, release), "uname -a; ls -l /"])


def _inbound_reverse(player: Player, release: str) -> None:
    player.spawn(_inbound(player, release))
    time.sleep(SETTLE_S)


def _role_swap(player: Player, _release: str) -> None:
    module = [sys.executable, "-m", "gpuguard.lab.clients.asyncssh_client"]
    port = 17_000 + player.number % 1_000
    plan = Plan(host=player.host, port=port, user="outsider", key=str(peers.KEYS / "user"), seed=player.number,
                hold_s=HOLD_S + 4, shell=LINES)
    player.spawn([*player.far, *module, "called", msgspec.json.encode(plan).decode()])
    time.sleep(SETTLE_S)
    child = player.spawn([*module, "dial-out", str(peers.KEYS / "host"), str(peers.KEYS / "authorized"), player.host,
                        str(port)])
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(HOLD_S + 4)


_OWN_WAYS: dict[str, Callable[[Player, str], None]] = {
    "scp-up": _scp_up, "scp-down": _scp_down, "sftp": _sftp, "rsync": _rsync, "git": _git, "ansible": _ansible,
    "vscode": _vscode, "exec-multiplexed": _exec_multiplexed,
    "shell-multiplexed": _shell_multiplexed, "refused": _refused,
    "reverse-autossh": _reverse_autossh, "inbound-shell": _inbound_shell, "inbound-exec": _inbound_exec,
    "inbound-reverse": _inbound_reverse, "role-swap": _role_swap,
}
