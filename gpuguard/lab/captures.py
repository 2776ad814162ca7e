"""Make the corpus of labelled captures: every scenario of `corpus`, played by real programs over the lab's wire.

Each scenario has a far address of its own, so that one capture holds many and the address is the label's key. Packets
are those of the node's side of a TAP pair with 12 ms and up to 2 ms of jitter each way (`link`), to which the bridge
adds what the machine's load makes of it: that is measured by a ping throughout, and stated with the labels. Of each
connection all of the first frames is kept, for the key exchange, and of the rest the headers.

Usage: ``python -m gpuguard.lab.captures OUT [--only WORD] [--first N] [--jobs N] [--lost RATIO]``.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import csv
import gzip
import json
import os
import shlex
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from gpuguard.lab import corpus, link, namespaces, peers, programs
from gpuguard.lab.clients.plan import Plan, Reverse
from gpuguard.lab.namespaces import LabClosed, furnish, in_network_of, run, run_as_first, tool_path

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from gpuguard.lab.corpus import Scenario

ADDRESSES = "10.78"
LINES = ("id", "ls -l /", "uname -a", "cat /proc/loadavg", "date")
SETTLE_S = 1.6
HOLD_S = 9.0
WHOLE_FRAMES = 40
HEADERS_BYTES = 96
COLUMNS = ("file", "address", "family", "split", "client", "server", "suite", "arguments", "through", "expected",
           "start_ns", "asked_ns", "used_ns", "problem", "rtt_ms_median", "rtt_ms_p95")
#: Where connections through a tunnel end on the node.
_TARGETS = {"": 22, "touch": 22, "inner": 22, "paste": 22, "paced": 22, "slow": 22,
            "chaff": peers.SERVER_PORTS["openssh:sid"], "pty": 7001, "line": 7002,
            "bulk": 7003}


#: Where SSH is wrapped for whom, on the far side.
_CARRIER_PORTS = {(carrier, f"openssh:{release}"): first + number
                  for carrier, first in (("tls", 8440), ("websocket", 8450))
                  for number, release in enumerate(peers.RELEASES)}


class Settings(msgspec.Struct, frozen=True):
    """What the caller wants of the lab."""

    out: str
    only: str = ""
    first: int = 0
    jobs: int = 16
    lost_ratio: float = 0.0
    delay_ms: float = link.DELAY_NS / 1e6


class Row(NamedTuple):
    """One line of the labels; see `COLUMNS`."""

    number: int
    scenario: Scenario
    start_ns: int
    asked_ns: int
    used_ns: int
    problem: str
    end_ns: int


def address_of(number: int) -> str:
    """Return the far address of a scenario."""
    return f"{ADDRESSES}.{number // 250}.{number % 250 + 1}"


def main() -> None:
    """Start the lab and wait for it; or, inside it, play."""
    if sys.argv[1].startswith("{"):
        settings = msgspec.json.decode(sys.argv[1], type=Settings)
        run_as_first(lambda: play(settings))
    parser = argparse.ArgumentParser(description="Make labelled captures of SSH in namespaces.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", default="", help="families with this word in their name")
    parser.add_argument("--first", type=int, default=0, help="number of the first scenario, to go on after a break")
    parser.add_argument("--jobs", type=int, default=16)
    parser.add_argument("--lost", type=float, default=0.0, help="share of frames to lose on the wire")
    parser.add_argument("--delay-ms", type=float, default=link.DELAY_NS / 1e6, help="of the wire, each way")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    settings = Settings(str(arguments.out.resolve()), arguments.only, arguments.first, arguments.jobs, arguments.lost,
                        arguments.delay_ms)
    lab = subprocess.Popen(namespaces.unshare_command(
        [sys.executable, "-m", "gpuguard.lab.captures", msgspec.json.encode(settings).decode()]),
        stdin=subprocess.PIPE, start_new_session=True)
    sys.exit(lab.wait())


def play(settings: Settings) -> int:
    """Build the lab, play all scenarios while capturing, and write captures and labels."""
    if tool_path("ping") is None or tool_path("tcpdump") is None:
        raise LabClosed("ping or tcpdump is missing (packages iputils-ping, tcpdump)")
    furnish()
    peers.make_keys()
    far = _far_side(settings)
    wanted = [(number, one) for number, one in enumerate(corpus.scenarios())
              if number >= settings.first and settings.only in one.family
              and peers.available(one.client) and peers.available(one.server)]
    for number, _ in wanted:
        run(*in_network_of(far), "ip", "address", "add", f"{address_of(number)}/32", "dev", "lo")
    servers = tuple(name for name in peers.SERVER_PORTS if peers.available(name))
    peers.start_servers(servers, far)
    peers.start_servers(tuple(f"openssh:{release}" for release in peers.RELEASES), None)
    _targets(far)
    programs.start_services(far)
    raw = Path(settings.out) / "all.pcap"
    capture = subprocess.Popen([str(tool_path("tcpdump")), "-i", "eth0", "-s", "0", "-B", "65536", "-Z", "root", "-w",
                                str(raw), f"(tcp or udp or icmp) and not host {link.FAR}"], stderr=subprocess.PIPE)
    ping = subprocess.Popen([str(tool_path("ping")), "-n", "-D", "-i", "0.1", link.FAR], stdout=subprocess.PIPE)
    pings = _Pings(ping)
    time.sleep(1)
    with concurrent.futures.ThreadPoolExecutor(settings.jobs) as pool:
        rows = list(pool.map(lambda one: Player(one[0], one[1], far).play(), wanted))
    time.sleep(1)
    capture.send_signal(signal.SIGINT)
    said = capture.communicate()[1].decode()
    ping.send_signal(signal.SIGINT)
    pings.join()
    _write(settings, rows, raw, pings)
    problems = [row for row in rows if row.problem]
    print(f"{len(rows)} scenarios, {len(problems)} with a problem; {said.strip()}")  # noqa: T201
    for row in problems:
        print(f"  {row.scenario.family} {row.scenario.suite} {row.scenario.server}: {row.problem}")  # noqa: T201
    return 0


def _far_side(settings: Settings) -> int:
    holder = subprocess.Popen([str(tool_path("unshare")), "--net", "--", "sleep", "infinity"])
    ours = Path("/proc/self/ns/net").readlink()
    while Path(f"/proc/{holder.pid}/ns/net").readlink() == ours:
        time.sleep(0.01)
    bridge = subprocess.Popen([sys.executable, "-m", "gpuguard.lab.link", str(holder.pid),
                               str(settings.lost_ratio), str(settings.delay_ms)],
                              stdout=subprocess.PIPE)
    if bridge.stdout is None or not bridge.stdout.readline():
        raise LabClosed("the delay bridge did not come up")
    subprocess.Popen([str(tool_path("cat"))], stdin=bridge.stdout, stdout=subprocess.DEVNULL)
    run("ip", "route", "add", f"{ADDRESSES}.0.0/16", "via", link.FAR)
    return holder.pid


def _targets(far: int) -> None:
    """What tunnels lead to, on both sides: a shell on a terminal, a shell on a socket, and a file by HTTP."""
    folder = namespaces.ROOT / "web"
    folder.mkdir()
    (folder / "index.html").write_bytes(os.urandom(300_000))
    for prefix in ([], in_network_of(far)):
        for port, how in ((7001, "EXEC:/bin/bash,pty,stderr,setsid,sane,ctty"), (7002, "EXEC:/bin/bash,stderr")):
            subprocess.Popen([*prefix, str(tool_path("socat")), f"TCP-LISTEN:{port},fork,reuseaddr", how])
        subprocess.Popen([*prefix, sys.executable, "-m", "http.server", "7003", "--directory", str(folder)],
                         stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    certificate = namespaces.ROOT / "tls.pem"
    run("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout",
        str(certificate), "-out", str(certificate) + ".crt", "-subj", "/CN=lab")
    with certificate.open("a") as file:
        file.write((namespaces.ROOT / "tls.pem.crt").read_text())
    for (carrier, server), port in _CARRIER_PORTS.items():
        behind = peers.SERVER_PORTS[server]
        wrap = ["-m", "websockify", str(port), f"127.0.0.1:{behind}"]
        command = [sys.executable, *wrap] if carrier == "websocket" else [
            str(tool_path("socat")), f"OPENSSL-LISTEN:{port},fork,reuseaddr,cert={certificate},verify=0",
            f"TCP:127.0.0.1:{behind}"]
        subprocess.Popen([*in_network_of(far), *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    time.sleep(2)


class _Pings(threading.Thread):
    """Round trips over the wire as ping(8) measures them throughout, 10 a second."""

    def __init__(self, ping: subprocess.Popen[bytes]) -> None:
        super().__init__(daemon=True)
        self._ping = ping
        self._seen: list[tuple[float, float]] = []
        self.start()

    def run(self) -> None:
        """Read `[SECONDS] 64 bytes from ...: icmp_seq=1 ttl=64 time=25.1 ms` until ping ends."""
        for line in self._ping.stdout or ():
            words = line.decode().replace("=", " ").split()
            if words[:1] and words[0].startswith("[") and "time" in words:
                self._seen.append((float(words[0].strip("[]")), float(words[words.index("time") + 1])))

    def between(self, start_ns: int, end_ns: int) -> tuple[str, str]:
        """Return the median and the 95th percentile in milliseconds, "" where none came back."""
        times = sorted(rtt for seconds, rtt in self._seen if start_ns <= seconds * 1e9 <= end_ns)
        if not times:
            return "", ""
        return f"{times[len(times) // 2]:.1f}", f"{times[len(times) * 95 // 100]:.1f}"


_ALONE = threading.Lock()


class Player:
    """Plays one scenario."""

    def __init__(self, number: int, scenario: Scenario, far: int) -> None:
        self.number = number
        self.scenario = scenario
        self.far_pid = far
        self.far = in_network_of(far)
        self.host = address_of(number)
        self.ports = {"f": 10_000 + number, "f1": 12_000 + number, "f2": 14_000 + number, "l": 16_000 + number,
                      "t": _TARGETS[scenario.through]}
        self.asked_ns = 0
        self.used_ns = 0
        self.problem = ""
        self._holds = False
        self.children: list[subprocess.Popen[bytes]] = []

    def play(self) -> Row:
        """Play, and return the scenario's line; what went wrong is part of it."""
        start_ns = time.time_ns()
        try:
            self._play()
        except (OSError, subprocess.SubprocessError, LabClosed) as error:
            self.problem = str(error)[:200]
        for child in self.children:
            with contextlib.suppress(ProcessLookupError):
                child.terminate()
        for child in self.children:
            try:
                child.wait(3)
            except subprocess.TimeoutExpired:
                child.kill()
        if self._holds:
            _ALONE.release()
        return Row(self.number, self.scenario, start_ns, self.asked_ns, self.used_ns, self.problem, time.time_ns())

    def alone(self) -> None:
        """Wait until no other scenario plays that asked for this."""
        self._holds = _ALONE.acquire()

    def _play(self) -> None:
        kind, _, release = self.scenario.client.partition(":")
        special = getattr(self, "_" + self.scenario.use.replace("-", "_"), None)
        if kind == "program":
            programs.PLAYS[self.scenario.use].run(self)
        elif special is not None:
            special(release)
        elif kind in ("openssh", "dropbear"):
            self._program(kind, release)
        else:
            self._library(kind)

    # -- clients ------------------------------------------------------------------------------------------------------

    def _program(self, kind: str, release: str) -> None:
        one = self.scenario
        command = self.command(kind, release)
        self.asked_ns = time.time_ns()
        client = self._body(command, one.body)
        time.sleep(SETTLE_S)
        if one.late:
            self._until(lambda: Path(self._socket()).exists())
            time.sleep(SETTLE_S / 2)
            self.asked_ns = time.time_ns()
            control = peers.openssh(release, self.host, one.server, "-S", self._socket(), "-O", "forward",
                                    *self.filled(one.late))
            self.run(control)
            time.sleep(SETTLE_S / 2)
        if one.through:
            self._use()
        elif "unix" in one.use:
            self._until(lambda: Path(f"/tmp/lab-{self.ports['f']}.sock").exists())
            time.sleep(0.5)
        elif one.body == "none":
            time.sleep(2 * SETTLE_S)
        with contextlib.suppress(subprocess.TimeoutExpired):
            client.wait(HOLD_S if one.body not in ("none", "web", "socks", "idle-shell") else 0.5)
        status = client.poll()
        # 255: the typist hung up.
        if status not in (None, 0, 255 if "shell" in one.body else 0) and one.use != "refused":
            self.problem = self.problem or f"the client ended with {status}"

    def command(self, kind: str, release: str, *more: str, server: str = "", host: str = "") -> list[str]:
        """Return the client's command line without a remote command."""
        one = self.scenario
        cipher, mac = corpus.SUITES.get(one.suite, ("", ""))
        options = [*(("-c", cipher) if cipher else ()), *(("-m", mac) if mac else ()), *self.filled(one.arguments),
                   *more]
        if kind == "dropbear":
            return peers.dropbear(release, host or self.host, server or one.server, *options)
        if one.late:
            options += ["-M", "-S", self._socket()]
        if "hostkeys" in one.use:
            known = Path(f"/run/lab-known-{self.number}")
            known.write_text(f"[{self.host}]:{peers.SERVER_PORTS[one.server]} {(peers.KEYS / 'host.pub').read_text()}"
                             f"{self.host} {(peers.KEYS / 'host.pub').read_text()}")
            options += ["-o", f"UserKnownHostsFile={known}", "-o", "UpdateHostKeys=yes"]
        if one.use.startswith("evasion-tls"):
            options += ["-o", f"ProxyCommand=socat - OPENSSL:{self.host}:{_CARRIER_PORTS['tls', one.server]},verify=0"]
        if one.use.startswith("evasion-websocket"):
            port = _CARRIER_PORTS["websocket", one.server]
            options += ["-o", (f"ProxyCommand={sys.executable} -m gpuguard.lab.clients.websocket_pipe "
                              f"ws://{self.host}:{port}/")]
        return peers.openssh(release, host or self.host, server or one.server, *options, user=one.user)

    def _socket(self) -> str:
        return f"/run/lab-{self.number}"

    def filled(self, arguments: Sequence[str]) -> list[str]:
        """Return arguments with the scenario's own ports in them."""
        return [one.format(**self.ports) for one in arguments]

    def _body(self, command: list[str], body: str) -> subprocess.Popen[bytes]:
        match body:
            case "none":
                client = self.spawn(command)
            case "idle-shell":
                # A terminal of its own: without one, ssh asks for one without modes.
                client = self.spawn(["script", "-qfc", shlex.join(command), "/dev/null"], stdin=subprocess.PIPE)
            case "shell":
                client = self.spawn(typing(self.number, command))
            case "paste":
                client = self.spawn(command, stdin=subprocess.PIPE)
                time.sleep(SETTLE_S)
                for _ in range(3):
                    self.write(client, ("\n".join(LINES) + "\n").encode())
                    time.sleep(1)
                self.write(client, b"exit\n")
            case "pipe":
                text = shlex.join([*command, "cat >/dev/null"])
                client = self.spawn(["sh", "-c", f"head -c 1500000 /dev/urandom | {text}"])
            case "web" | "socks":
                client = self.spawn(command)
                time.sleep(SETTLE_S)
                for name in ("127.0.0.1", "localhost", self.host):
                    self._fetch(body, name)
            case "jump" | "jump-shell":
                inner = [*peers.openssh("bookworm", "127.0.0.1", "openssh:bookworm"), "-o",
                         "ProxyCommand=" + shlex.join(command)]
                client = self.spawn(typing(self.number, inner[:-3] + inner[-2:] + inner[-3:-2])
                                    if body == "jump-shell" else [*inner[:-3], *inner[-2:], inner[-3], "uname -a"])
            case _:
                client = self.spawn([*command, body])
        return client

    def _fetch(self, body: str, name: str) -> None:
        port = self.ports["l"]
        if body == "web":
            self.run(["curl", "-s", "-o", "/dev/null", "--max-time", "8", f"http://127.0.0.1:{port}/"])
        else:
            self.run(["curl", "-s", "-o", "/dev/null", "--max-time", "8", "--socks5-hostname", f"127.0.0.1:{port}",
                      f"http://{name}:7003/"])

    def _library(self, kind: str) -> None:
        one = self.scenario
        cipher, mac = corpus.SUITES.get(one.suite, ("", ""))
        shell = LINES if "shell" in one.use else LINES[:1] if one.use == "reverse-late" else ()
        binds = {"reverse-wide": ("0.0.0.0",), "reverse-many": ("127.0.0.1", "localhost", "")}.get(  # noqa: S104
            one.use, ("127.0.0.1",))
        binds = tuple(bind or "127.0.0.1" for bind in binds)
        forwards = tuple(Reverse(bind, port, "127.0.0.1", self.ports["t"], f"/tmp/lab-{self.number}.sock"
                                 if "unix" in one.use else "")
                         for bind, port in zip(binds, (self.ports["f"], self.ports["f1"], self.ports["f2"]),
                                               strict=False)) if one.expected == "ssh-reverse-tunnel" else ()
        long = one.through in ("inner", "pty") or bool(shell)
        plan = Plan(
            host=self.host, port=peers.SERVER_PORTS[one.server], user="outsider", key=str(peers.KEYS / "user"),
            seed=self.number, hold_s=HOLD_S + 4 if long else 5.0, cipher=cipher, mac=mac,
            compressed="compressed" in one.use, padded="padding" in one.use,
            reverse=forwards, reverse_after_s=2.5 if one.use == "reverse-late" else 0.0, shell=shell,
            commands=("uname -a",) if one.use == "exec" else (),
            put_bytes=400_000 if one.use == "sftp" else 0,
            local={"local": (("127.0.0.1", 7003),) * 2,
                   "dynamic": (("127.0.0.1", 7003), ("localhost", 7003), (self.host, 7003))}.get(one.use, ()),
        )
        self.asked_ns = time.time_ns()
        client = self.spawn(peers.library(kind, plan))
        time.sleep(SETTLE_S + 1.0 + (2.5 if one.use == "reverse-late" else 0))
        if one.through:
            self._use()
        with contextlib.suppress(subprocess.TimeoutExpired):
            client.wait(HOLD_S + 6)
        if client.poll() not in (None, 0):
            self.problem = self.problem or f"the client ended with {client.poll()}: {self._said()}"

    # -- what the far side does with a tunnel -------------------------------------------------------------------------

    def _until(self, ready: Callable[[], bool]) -> None:
        """Wait for something that the client brings about: this machine may be slow."""
        deadline = time.monotonic() + HOLD_S
        while not ready() and time.monotonic() < deadline:
            time.sleep(0.1)

    def wait_for_port(self, port: int) -> None:
        """Wait until something listens on this port of the far side."""
        self._until(lambda: peers.listens(self.far_pid, port))

    def _use(self) -> None:
        port = str(self.ports["f"])
        self.wait_for_port(self.ports["f"])
        time.sleep(SETTLE_S / 4)
        through = self.scenario.through
        self.used_ns = time.time_ns()
        if through == "touch":
            self.run([*self.far, str(tool_path("socat")), "-T1", "-u", f"TCP:127.0.0.1:{port}", "-"])
            time.sleep(0.3)
            return
        if through == "bulk":
            self.run([*self.far, "curl", "-s", "-o", "/dev/null", "--max-time", "8", f"http://127.0.0.1:{port}/"])
            return
        if through in ("inner", "chaff", "paste", "paced", "slow"):
            inner = peers.openssh("sid" if through == "chaff" else "bookworm", "127.0.0.1", "openssh:bookworm", "-tt",
                                  port=self.ports["f"])
        else:
            inner = [str(tool_path("socat")), "-,raw,echo=0" if through == "pty" else "-", f"TCP:127.0.0.1:{port}"]
        if through == "slow":
            self._use_slowly(inner)
            return
        visitor = self.spawn([*self.far, *typing(self.number, inner)], how=through)
        with contextlib.suppress(subprocess.TimeoutExpired):
            visitor.wait(HOLD_S + 4)

    def _use_slowly(self, inner: list[str]) -> None:
        """One line every few seconds, into a shell without a terminal: nothing is echoed."""
        visitor = self.spawn([*self.far, *(word for word in inner if word != "-tt")], stdin=subprocess.PIPE)
        for _ in range(12):
            time.sleep(4)
            self.write(visitor, b"id; hostname\n")
        self.write(visitor, b"exit\n")
        with contextlib.suppress(subprocess.TimeoutExpired):
            visitor.wait(HOLD_S)

    # -- uses with a way of their own ---------------------------------------------------------------------------------

    def _scp_up(self, release: str) -> None:
        self.run([*self._scp(release), "/usr/bin/git", f"outsider@{self.host}:/tmp/lab-{self.number}"])

    def _scp_down(self, release: str) -> None:
        self.run([*self._scp(release), f"outsider@{self.host}:/usr/bin/socat", f"/run/lab-down-{self.number}"])

    def _sftp(self, release: str) -> None:
        if not release:
            self._library(self.scenario.client)
            return
        programs = peers.PEERS / release / "usr/bin"
        command = [str(programs / "sftp"), "-S", str(programs / "ssh"), "-b", "-", *self._scp(release)[3:],
                   f"outsider@{self.host}"]
        child = self.spawn(command, stdin=subprocess.PIPE)
        self.write(child, f"ls /\nput /usr/bin/socat /tmp/lab-{self.number}\nls /tmp\nbye\n".encode())
        child.wait(HOLD_S)

    def _scp(self, release: str) -> list[str]:
        options = peers.openssh(release, "x", self.scenario.server)[1:-1]
        options[options.index("-p")] = "-P"
        return [str(peers.PEERS / release / "usr/bin/scp"), "-S", str(peers.PEERS / release / "usr/bin/ssh"), *options]

    def _rsync(self, release: str) -> None:
        shell = shlex.join(peers.openssh(release, "x", self.scenario.server)[:-1])
        self.run(["rsync", "-a", "-e", shell, "/usr/share/doc/openssh-client", "/usr/bin/git",
                  f"outsider@{self.host}:/tmp/lab-{self.number}/"])

    def _git(self, release: str) -> None:
        shell = shlex.join(peers.openssh(release, "x", self.scenario.server)[:-1])
        repository = f"/run/lab-repo-{self.number}"
        self.run(["git", "init", "-q", repository])
        self.run(["git", "-C", repository, "-c", "user.name=lab", "-c", "user.email=lab@lab", "commit", "-q",
                  "--allow-empty", "-m", "empty"])
        self.run(["chmod", "-R", "a+rX", repository])
        self.run(["git", "-c", f"core.sshCommand={shell}", "-c", "protocol.version=2", "ls-remote",
                  f"outsider@{self.host}:{repository}"], may_fail=True)

    def _ansible(self, release: str) -> None:
        """A control master that stays, then a command, a file by SFTP and a command on a terminal over it."""
        master = ("-o", "ControlMaster=auto", "-o", "ControlPersist=3", "-S", self._socket())
        base = peers.openssh(release, self.host, self.scenario.server, *master)
        self.run([*base, "/bin/sh -c 'echo ~ && sleep 0'"])
        self.run([*base, "/bin/sh -c '( umask 77 && mkdir -p /tmp/a )'"])
        child = self.spawn([*base[:-1], "-s", base[-1], "sftp"], stdin=subprocess.PIPE)
        time.sleep(0.5)
        child.terminate()
        self.run([*base[:-1], "-tt", base[-1], "/bin/sh -c 'python3 -c 1; sleep 0'"])
        time.sleep(3.5)

    def _vscode(self, release: str) -> None:
        """One `bash` fed with a script, a SOCKS port beside it, and connections through that: Remote-SSH."""
        base = peers.openssh(release, self.host, self.scenario.server, "-T", "-D", str(self.ports["l"]))
        child = self.spawn([*base, "bash"], stdin=subprocess.PIPE)
        time.sleep(SETTLE_S)
        self.write(child, b"uname -rsv; ls -la ~ | head -3; echo listening\n" * 5)
        time.sleep(0.5)
        for name in ("localhost", "127.0.0.1", "localhost"):
            self._fetch("socks", name)
        self.write(child, b"exit\n")
        child.wait(HOLD_S)

    def _exec_multiplexed(self, release: str) -> None:
        base = peers.openssh(release, self.host, self.scenario.server, "-o", "ControlMaster=auto", "-o",
                             "ControlPersist=2", "-S", self._socket())
        for _ in range(6):
            self.run([*base, "cat /proc/loadavg"])
            time.sleep(0.2)
        time.sleep(2.5)

    def _refused(self, release: str) -> None:
        self.run([*peers.openssh(release, self.host, self.scenario.server, user="stranger"), "true"], may_fail=True)

    def _reverse_autossh(self, release: str) -> None:
        command = self.command("openssh", release)
        environ = dict(peers.environment(), AUTOSSH_PATH=command[0], AUTOSSH_GATETIME="0")
        self.asked_ns = time.time_ns()
        self.children.append(subprocess.Popen([str(tool_path("autossh")), "-M", "0", *command[1:]], env=environ,
                                              stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        time.sleep(SETTLE_S)
        if self.scenario.through:
            self._use()

    def _inbound(self, release: str, *options: str) -> list[str]:
        """The far side logs in on the node from this scenario's address."""
        return [*self.far, *peers.openssh(release, link.NODE, self.scenario.server, "-b", self.host,
                                          *self.filled(self.scenario.arguments), *options)]

    def _inbound_shell(self, release: str) -> None:
        child = self.spawn([*self.far, *typing(self.number, self._inbound(release, "-tt")[len(self.far):])])
        child.wait(HOLD_S + 6)

    def _inbound_exec(self, release: str) -> None:
        self.run([*self._inbound(release), "uname -a; ls -l /"])

    def _inbound_reverse(self, release: str) -> None:
        self.spawn(self._inbound(release))
        time.sleep(SETTLE_S)

    def _role_swap(self, _release: str) -> None:
        module = [sys.executable, "-m", "gpuguard.lab.clients.asyncssh_client"]
        port = 17_000 + self.number % 1_000
        plan = Plan(host=self.host, port=port, user="outsider", key=str(peers.KEYS / "user"), seed=self.number,
                    hold_s=HOLD_S + 4, shell=LINES)
        self.spawn([*self.far, *module, "called", msgspec.json.encode(plan).decode()])
        time.sleep(SETTLE_S)
        child = self.spawn([*module, "dial-out", str(peers.KEYS / "host"), str(peers.KEYS / "authorized"), self.host,
                            str(port)])
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(HOLD_S + 4)

    # -- processes ----------------------------------------------------------------------------------------------------

    def spawn(self, command: list[str], stdin: int = subprocess.DEVNULL, how: str = "") -> subprocess.Popen[bytes]:
        """Start a program that ends with the scenario; ``how`` is the typist's."""
        log = (namespaces.ROOT / "log" / f"{self.number}").open("ab")
        child = subprocess.Popen(command, env=peers.environment() | {"LAB_TYPIST": how}, stdin=stdin,
                                 stdout=subprocess.DEVNULL, stderr=log)
        self.children.append(child)
        return child

    def run(self, command: list[str], *, may_fail: bool = False) -> None:
        """Run a program to its end; that it failed is the scenario's problem."""
        child = self.spawn(command)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(2 * HOLD_S)
        if child.poll() != 0 and not may_fail:
            self.problem = f"{Path(command[0]).name} ended with {child.poll()}: {self._said()}"

    def _said(self) -> str:
        """Return the last line that any of the scenario's programs complained with."""
        log = (namespaces.ROOT / "log" / f"{self.number}").read_text(errors="replace").strip().splitlines()
        return log[-1][:160] if log else ""

    @staticmethod
    def write(child: subprocess.Popen[bytes], data: bytes) -> None:
        """Write to a program's standard input, if it still reads."""
        with contextlib.suppress(BrokenPipeError):
            if child.stdin is not None:
                child.stdin.write(data)
                child.stdin.flush()


def typing(seed: int, command: list[str]) -> list[str]:
    """Return the command with a person at its terminal."""
    lines = LINES if seed % 2 else LINES[:4]
    return [sys.executable, "-m", "gpuguard.lab.typist", str(seed), str(HOLD_S + 3), *lines, "--", *command]


# -- files ------------------------------------------------------------------------------------------------------------

_ETHERNET, _IPV4, _TCP = 14, 0x0800, 6


def _frames(raw: Path) -> Iterator[tuple[bytes, bytes]]:
    """Yield (record header, frame) of a pcap file of this machine's byte order."""
    with raw.open("rb") as file:
        file.read(24)
        while len(head := file.read(16)) == 16:
            yield head, file.read(struct.unpack("=IIII", head)[2])


def number_of(frame: bytes) -> tuple[int, str] | None:
    """Return the scenario that a frame belongs to, by its far address, and the address."""
    if frame[12:14] != _IPV4.to_bytes(2, "big"):
        return None
    net = bytes(map(int, ADDRESSES.split(".")))
    for at in (26, 30):
        if frame[at:at + 2] == net:
            return frame[at + 2] * 250 + frame[at + 3] - 1, ".".join(map(str, frame[at:at + 4]))
    return None


def _write(settings: Settings, rows: list[Row], raw: Path, pings: _Pings) -> None:
    """Sort the frames into one file a family, and write the labels."""
    out = Path(settings.out)
    files = {row.number: f"{row.scenario.split}/{row.scenario.family}.pcap.gz" for row in rows}
    header = struct.pack("=IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 65_535, 1)
    kept: dict[str, bytearray] = {}
    seen: dict[tuple[int, bytes], int] = {}
    for head, frame in _frames(raw):
        scenario = number_of(frame)
        if scenario is None or scenario[0] not in files:
            continue
        number = scenario[0]
        ports = frame[34:38] if frame[26:28] < frame[30:32] else frame[36:38] + frame[34:36]
        ports = ports if frame[23] == _TCP else os.urandom(4)
        count = seen[number, ports] = seen.get((number, ports), 0) + 1
        seconds, micros, _, size = struct.unpack("=IIII", head)
        cut = frame if count <= WHOLE_FRAMES else frame[:HEADERS_BYTES]
        record = struct.pack("=IIII", seconds, micros, len(cut), size) + cut
        kept.setdefault(files[number], bytearray(header)).extend(record)
    for name, data in kept.items():
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_bytes(gzip.compress(bytes(data), 9, mtime=0))
    with (out / "LABELS.tsv").open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, delimiter="\t")
        table.writerow(COLUMNS)
        for row in rows:
            one = row.scenario
            table.writerow((files[row.number], address_of(row.number), one.family, one.split, one.client, one.server,
                            one.suite, " ".join(one.arguments), one.through, one.expected, row.start_ns, row.asked_ns,
                            row.used_ns, row.problem, *pings.between(row.start_ns, row.end_ns)))
    raw.unlink()
    (out / "LINK.json").write_text(json.dumps({
        "delay_ms": settings.delay_ms, "jitter_ms_max": link.JITTER_NS / 1e6, "lost_ratio": settings.lost_ratio,
        "host": socket.gethostname()}) + "\n")


if __name__ == "__main__":
    main()
