"""What GPU servers do besides SSH, and tunnels in DNS, ICMP and TLS: plays for the lab's captures, by real programs.

Each is named in `PLAYS` with what it is to be called; `captures` plays it like those of SSH, between the node and a far
address of its own. Programs that are not installed make a scenario fail, which its label then says.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from gpuguard.lab import link, namespaces, peers
from gpuguard.lab.corpus import Scenario
from gpuguard.lab.namespaces import in_network_of, tool_path
from gpuguard.lab.player import Player, typing

if TYPE_CHECKING:
    from collections.abc import Callable


PLAY_S = 24.0
BROKER_PORTS = {"redis": 6390, "nats": 4222, "mqtt": 8883, "amqp": 5671}
_ANY = "0.0.0.0"  # noqa: S104 of namespaces that nothing else reaches
_STUNNEL_PORT = 8460
_FILES_PORT = 8461
_GIT_PORT = 9418


class Play(NamedTuple):
    """How a scenario goes, and its label."""

    run: Callable[[Player], None]
    expected: str


def scenarios() -> list[Scenario]:
    """Return every scenario that is not SSH, or has it inside; the argument tells the times that it is played apart."""
    return [Scenario(use, "program", "program", arguments=(str(time),), expected=play.expected)
            for use, play in PLAYS.items() for time in range(2)]


def start_services(far: int) -> None:
    """Start what the far side offers to all scenarios: brokers behind TLS, files over HTTPS, a repository, stunnel."""
    root = namespaces.ROOT
    pem = str(root / "tls.pem")
    (root / "mosquitto.conf").write_text(f"listener {BROKER_PORTS['mqtt']} 0.0.0.0\nallow_anonymous true\n"
                                         f"certfile {pem}\nkeyfile {pem}\nuser root\n")
    (root / "stunnel.conf").write_text(f"foreground = yes\npid =\n[ssh]\naccept = 0.0.0.0:{_STUNNEL_PORT}\n"
                                       f"connect = 127.0.0.1:22\ncert = {pem}\n")
    (root / "rabbit").mkdir()
    (root / "rabbit/rabbitmq.conf").write_text(
        f"listeners.tcp = none\nlisteners.ssl.default = {BROKER_PORTS['amqp']}\nloopback_users = none\n"
        f"ssl_options.cacertfile = {pem}\nssl_options.certfile = {pem}\nssl_options.keyfile = {pem}\n"
        "ssl_options.verify = verify_none\nssl_options.fail_if_no_peer_cert = false\n")
    (root / "repository").mkdir()
    namespaces.run("git", "init", "-q", "--bare", str(root / "repository/work.git"))
    commands = [
        ["redis-server", "--port", "0", "--tls-port", str(BROKER_PORTS["redis"]), "--tls-cert-file", pem,
         "--tls-key-file", pem, "--tls-ca-cert-file", pem, "--tls-auth-clients", "no", "--save", "", "--bind",
         _ANY, "--protected-mode", "no"],
        ["nats-server", "-a", _ANY, "-p", str(BROKER_PORTS["nats"]), "--tls", "--tlscert", pem, "--tlskey", pem],
        ["mosquitto", "-c", str(root / "mosquitto.conf")],
        ["stunnel", str(root / "stunnel.conf")],
        ["git", "daemon", "--export-all", f"--base-path={root}/repository", "--reuseaddr"],
        ["socat", f"OPENSSL-LISTEN:{_FILES_PORT},fork,reuseaddr,cert={pem},verify=0", "TCP:127.0.0.1:7003"],
    ]
    for command in commands:
        _start(far, command, {})
    rabbit = str(root / "rabbit")
    # Not the wrapper in PATH: that runs as a user whom the lab does not have.
    _start(far, ["/usr/lib/rabbitmq/bin/rabbitmq-server"], {
        "RABBITMQ_CONFIG_FILE": f"{rabbit}/rabbitmq.conf", "RABBITMQ_MNESIA_BASE": rabbit, "RABBITMQ_LOG_BASE": rabbit,
        "RABBITMQ_NODENAME": "lab@localhost", "RABBITMQ_ENABLED_PLUGINS_FILE": f"{rabbit}/plugins", "HOME": rabbit})
    time.sleep(2)


def _start(far: int, command: list[str], environ: dict[str, str]) -> None:
    path = tool_path(command[0])
    if path:
        log = (namespaces.ROOT / "log" / Path(path).name).open("wb")
        subprocess.Popen([*in_network_of(far), path, *command[1:]], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                         env=os.environ | environ)


def talker(player: Player, role: str, host: str, port: int, *, far: bool = False) -> subprocess.Popen[bytes]:
    """Start one end of a conversation."""
    # Whoever calls the node does so from the scenario's own address.
    command = ["env", f"LAB_SOURCE={player.host if far else ''}", sys.executable, "-m", "gpuguard.lab.clients.talkers",
               role, host, str(port), str(PLAY_S), str(player.number)]
    return player.spawn([*player.far, *command] if far else command)


def _served(broker: str, role: str) -> Callable[[Player], None]:
    """The node serves what is asked for through a broker far away."""
    def run(player: Player) -> None:
        port = BROKER_PORTS[broker]
        player.wait_for_port(port)
        service = talker(player, role, player.host, port)
        time.sleep(2)
        pace = "-slow" if role.endswith("-worked") else ""
        talker(player, f"{broker}-asker{pace}", "127.0.0.1", port, far=True)
        service.wait(PLAY_S + 12)
    return run


def _pair(far_role: str, near_role: str, first_port: int, *, inbound: bool = False) -> Callable[[Player], None]:
    """One program listens on the far side, or on the node, and another calls it."""
    def run(player: Player) -> None:
        port = first_port + player.number % 1_000
        talker(player, far_role, player.host, port, far=not inbound)
        time.sleep(1.5)
        caller = talker(player, near_role, link.NODE if inbound else player.host, port, far=inbound)
        caller.wait(PLAY_S + 12)
    return run


def _pulls(player: Player) -> None:
    """Layers by HTTPS, one connection each."""
    for _ in range(4):
        player.run(["curl", "-s", "-k", "-o", "/dev/null", "--max-time", "12",
                    f"https://{player.host}:{_FILES_PORT}/"])
        time.sleep(0.5)


def _clone(player: Player) -> None:
    for _ in range(3):
        player.run(["git", "ls-remote", f"git://{player.host}:{_GIT_PORT}/work.git"], may_fail=True)


# -- SSH in other carriers ---------------------------------------------------------------------------------------------


def _stunnel(player: Player, *more: str) -> list[str]:
    """Return an ssh command through a stunnel client of its own."""
    port = 18_000 + player.number % 1_000
    config = namespaces.ROOT / f"stunnel-{player.number}.conf"
    config.write_text(f"foreground = yes\npid =\n[ssh]\nclient = yes\naccept = 127.0.0.1:{port}\n"
                      f"connect = {player.host}:{_STUNNEL_PORT}\n")
    player.spawn([str(tool_path("stunnel")), str(config)])
    time.sleep(1)
    return peers.openssh("bookworm", "127.0.0.1", "openssh:bookworm", *more, port=port)


def _stunnel_shell(player: Player) -> None:
    _typed(player, _stunnel(player, "-tt"))


def _stunnel_reverse(player: Player) -> None:
    player.spawn(_stunnel(player, "-N", "-R", f"{player.ports['f']}:127.0.0.1:22"))
    _type_back(player)


def _typed(player: Player, command: list[str]) -> None:
    player.asked_ns = time.time_ns()
    player.spawn(typing(player.number, command)).wait(30)


def _type_back(player: Player) -> None:
    """Somebody far away types in a shell of the node, through its reverse tunnel."""
    player.wait_for_port(player.ports["f"])
    time.sleep(1)
    player.used_ns = time.time_ns()
    inner = peers.openssh("bookworm", "127.0.0.1", "openssh:bookworm", "-tt", port=player.ports["f"])
    player.spawn([*player.far, *typing(player.number, inner)]).wait(30)


def _tunnelled(opened: Callable[[Player], tuple[str, int]], *, reverse: bool) -> Callable[[Player], None]:
    """SSH within a tunnel: a shell on the far side, or a reverse one on the node."""
    def run(player: Player) -> None:
        host, port = opened(player)
        command = peers.openssh("bookworm", host, "openssh:bookworm", port=port)
        if reverse:
            player.spawn([*command[:-1], "-N", "-R", f"{player.ports['f']}:127.0.0.1:22", command[-1]])
            _type_back(player)
        else:
            _typed(player, [*command[:-1], "-tt", command[-1]])
    return run


def _iodine(player: Player) -> tuple[str, int]:
    net = f"10.66.{player.number % 250}"
    player.spawn([*player.far, str(tool_path("iodined")), "-f", "-c", "-P", "lab", "-l", player.host, f"{net}.1",
                  f"t.lab{player.number}.org"])
    time.sleep(1)
    player.spawn([str(tool_path("iodine")), "-f", "-r", "-P", "lab", player.host, f"t.lab{player.number}.org"])
    time.sleep(6)
    return f"{net}.1", 22


def _dns2tcp(player: Player) -> tuple[str, int]:
    config = namespaces.ROOT / f"dns2tcpd-{player.number}.conf"
    domain = f"d.lab{player.number}.org"
    config.write_text(f"listen = {player.host}\nport = 53\nuser = nobody\nchroot = /tmp\ndomain = {domain}\n"
                      "resources = ssh:127.0.0.1:22\n")
    player.spawn([*player.far, str(tool_path("dns2tcpd")), "-F", "-f", str(config)])
    port = 19_000 + player.number % 1_000
    time.sleep(1)
    player.spawn([str(tool_path("dns2tcpc")), "-z", domain, "-r", "ssh", "-l", str(port), player.host])
    time.sleep(2)
    return "127.0.0.1", port


def _ptunnel(program: str) -> Callable[[Player], tuple[str, int]]:
    def opened(player: Player) -> tuple[str, int]:
        port = str(20_000 + player.number % 1_000)
        path = str(tool_path(program))
        # Its server hears every echo of the far side, and answers from the address that the route to the node names.
        player.alone()
        namespaces.run(*player.far, "ip", "route", "replace", f"{link.NODE}/32", "dev", "eth0", "src", player.host)
        player.spawn([*player.far, path, "-v", "0"])
        time.sleep(1)
        to = ["-r127.0.0.1", "-R22"] if program == "ptunnel-ng" else ["-da", "127.0.0.1", "-dp", "22"]
        listen = ["-l", port] if program == "ptunnel-ng" else ["-lp", port]
        player.spawn([path, "-p", player.host, *listen, *to, "-v", "0"])
        time.sleep(2)
        return "127.0.0.1", int(port)
    return opened


# -- logins that fail --------------------------------------------------------------------------------------------------


def _guessing(player: Player) -> None:
    talker(player, "guesser", player.host, 22).wait(PLAY_S + 8)


def _login(player: Player, *options: str, user: str = "outsider") -> None:
    player.run([*peers.openssh("bookworm", player.host, "openssh:bookworm", *options, user=user), "true"],
               may_fail=True)


def _mistyped(player: Player) -> None:
    """The wrong name twice, then the right one."""
    for user in ("outsidre", "outsidre", "outsider"):
        _login(player, user=user)
        time.sleep(2)


def _stale_key(player: Player) -> None:
    """A job with a key that is accepted no more."""
    key = Path(f"/run/lab-stale-{player.number}")
    namespaces.run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key))
    for _ in range(3):
        player.run([word if word != str(peers.KEYS / "user") else str(key)
                    for word in peers.openssh("bookworm", player.host, "openssh:bookworm")] + ["true"], may_fail=True)
        time.sleep(9)


# -- SSH over a long way -----------------------------------------------------------------------------------------------


def _lockstep(player: Player) -> None:
    """SFTP, one question after the other: a listing of many folders, whose every answer is waited for."""
    programs = peers.PEERS / "bookworm/usr/bin"
    options = peers.openssh("bookworm", player.host, "openssh:bookworm")
    child = player.spawn([str(programs / "sftp"), "-S", str(programs / "ssh"), "-b", "-",
                          *[one if one != "-p" else "-P" for one in options[1:-1]], options[-1]],
                         stdin=subprocess.PIPE)
    player.write(child, "".join(f"ls {name}\n" for name in shlex.split("/etc /usr /var /opt /srv /home /tmp") * 3)
                 .encode() + b"bye\n")
    child.wait(60)


PLAYS: dict[str, Play] = {
    **{f"{broker}-{kind}{form}": Play(_served(broker, f"{broker}-{kind}{form}"), "other")
       for broker, kind in (("redis", "worker"), ("nats", "service"), ("mqtt", "service"), ("amqp", "worker"))
       for form in ("", "-varied", "-worked")},
    "file-calls": Play(_pair("file-server", "file-client", 30_000), "other"),
    "collectives": Play(_pair("ring-far", "ring-near", 31_000), "other"),
    "metrics-out": Play(_pair("metrics", "scraper", 28_000), "other|beacon"),
    "metrics-in": Play(_pair("metrics", "scraper", 27_000, inbound=True), "other|beacon"),
    "terminal-out": Play(_pair("terminal-server", "terminal-user", 26_000), "other"),
    "terminal-in": Play(_pair("terminal-server", "terminal-user", 25_000, inbound=True), "other"),
    "registry-pulls": Play(_pulls, "other"),
    "git-clone": Play(_clone, "other"),
    "sftp-lockstep": Play(_lockstep, "ssh-transfer"),
    "stunnel-shell": Play(_stunnel_shell, "other"),
    "stunnel-reverse": Play(_stunnel_reverse, "reverse-shell"),
    **{f"{name}-{'reverse' if reverse else 'shell'}": Play(_tunnelled(opened, reverse=reverse), label)
       for name, opened, label in (("iodine", _iodine, "dns-tunnel"), ("dns2tcp", _dns2tcp, "dns-tunnel"),
                                   ("ptunnel-ng", _ptunnel("ptunnel-ng"), "icmp-tunnel"))
       for reverse in (False, True)},
    "guessing": Play(_guessing, "ssh-bruteforce"),
    "mistyped": Play(_mistyped, "ssh|ssh-exec"),
    "stale-key": Play(_stale_key, "ssh"),
}
