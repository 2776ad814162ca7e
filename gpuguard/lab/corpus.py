"""The scenarios of SSH in the lab's captures: who talks to whom, in which suite, what for, and what it is called.

`programs` adds what is not SSH, or has it inside.

A scenario's **family** is its client and its use; the corpus is split by family, before anything was developed on it:
held out are whole clients (`HELD_CLIENTS`) and whole uses (`HELD_USES`), each with everything else they are combined
with. Figures of the held-out part say how the guard does on implementations and uses that nobody looked at.
"""

from __future__ import annotations

from typing import NamedTuple

HELD_CLIENTS = ("openssh:bullseye", "openssh:trixie", "dropbear:bullseye", "dropbear:trixie", "libssh", "go")
HELD_USES = (
    "reverse-unix-shell", "reverse-exec", "reverse-x11", "reverse-and-local", "reverse-many-compressed",
    "reverse-late-typing", "reverse-autossh", "git", "ansible", "vscode", "exec-multiplexed", "rsync", "local-shell",
    "inbound-exec", "nested-shell",
    "redis-worker-varied", "nats-service-varied", "mqtt-service-varied", "terminal-in", "metrics-in", "git-clone",
    "dns2tcp-shell", "dns2tcp-reverse", "stale-key",
)

#: What is asked for with -c and -m.
SUITES = {
    "chacha": ("chacha20-poly1305@openssh.com", ""),
    "gcm128": ("aes128-gcm@openssh.com", ""),
    "gcm256": ("aes256-gcm@openssh.com", ""),
    "etm256": ("aes256-ctr", "hmac-sha2-256-etm@openssh.com"),
    "etm512": ("aes192-ctr", "hmac-sha2-512-etm@openssh.com"),
    "etm1": ("aes128-ctr", "hmac-sha1-etm@openssh.com"),
    "umac64etm": ("aes128-ctr", "umac-64-etm@openssh.com"),
    "umac128etm": ("aes128-ctr", "umac-128-etm@openssh.com"),
    "sha256": ("aes128-ctr", "hmac-sha2-256"),
    "sha512": ("aes256-ctr", "hmac-sha2-512"),
    "sha1": ("aes128-ctr", "hmac-sha1"),
    "umac64": ("aes128-ctr", "umac-64@openssh.com"),
    "umac128": ("aes128-ctr", "umac-128@openssh.com"),
    "cbc": ("aes256-cbc", "hmac-sha2-256"),
    "3des": ("3des-cbc", "hmac-sha1"),
}
#: Suites that every implementation of the lab has.
COMMON_SUITES = ("gcm128", "sha256", "sha1")


class Scenario(NamedTuple):
    """One connection of the lab.

    In arguments ``{f}``, ``{f1}``, ``{f2}`` are ports of its own on the far side, ``{l}`` one on this side, and ``{t}``
    the port that is led to.
    """

    use: str
    client: str
    server: str
    suite: str = ""
    arguments: tuple[str, ...] = ()
    #: What the connection does by itself: none, shell (typed in), idle-shell, or the words of a remote command.
    body: str = "none"
    #: What is asked for later, through the client's control socket.
    late: tuple[str, ...] = ()
    #: What the far side does with the tunnel: touch, inner, chaff, paste, paced, slow, pty, line, bulk; or nothing.
    through: str = ""
    expected: str = "ssh-reverse-tunnel"
    user: str = "outsider"

    @property
    def family(self) -> str:
        """Client and use."""
        return f"{self.client.replace(':', '-')}.{self.use}"

    @property
    def split(self) -> str:
        """Return "held-out" or "development"."""
        held = self.client in HELD_CLIENTS or self.use in HELD_USES
        return "held-out" if held else "development"


_TO = "{f}:127.0.0.1:{t}"
_MORE = ("-R", "{f1}:127.0.0.1:{t}", "-R", "localhost:{f2}:127.0.0.1:{t}")
#: By use: arguments, body and what is asked for later.
REVERSE: dict[str, tuple[tuple[str, ...], str, tuple[str, ...]]] = {
    "reverse": (("-N", "-R", _TO), "none", ()),
    "reverse-shell": (("-tt", "-R", _TO), "shell", ()),
    "reverse-idle-shell": (("-tt", "-R", _TO), "idle-shell", ()),
    "reverse-background": (("-f", "-N", "-o", "ExitOnForwardFailure=yes", "-R", _TO), "none", ()),
    "reverse-many": (("-N", "-R", _TO, *_MORE), "none", ()),
    "reverse-many-shell": (("-tt", "-R", _TO, *_MORE), "shell", ()),
    "reverse-unix": (("-N", "-R", "/tmp/lab-{f}.sock:127.0.0.1:{t}"), "none", ()),
    "reverse-unix-shell": (("-tt", "-R", "/tmp/lab-{f}.sock:127.0.0.1:{t}"), "shell", ()),
    "reverse-compressed": (("-N", "-C", "-R", _TO), "none", ()),
    "reverse-many-compressed": (("-N", "-C", "-R", _TO, *_MORE), "none", ()),
    "reverse-shell-compressed": (("-tt", "-C", "-R", _TO), "shell", ()),
    "reverse-unix-compressed": (("-N", "-C", "-R", "/tmp/lab-{f}.sock:127.0.0.1:{t}"), "none", ()),
    "reverse-alive": (("-N", "-o", "ServerAliveInterval=1", "-R", _TO), "none", ()),
    "reverse-any-port": (("-N", "-R", "0:127.0.0.1:{t}"), "none", ()),
    "reverse-wide": (("-N", "-R", "0.0.0.0:" + _TO), "none", ()),
    "reverse-star": (("-N", "-R", "*:" + _TO), "none", ()),
    "reverse-named": (("-N", "-R", "localhost:" + _TO), "none", ()),
    "reverse-socks": (("-N", "-R", "{f}"), "none", ()),
    "reverse-exec": (("-R", _TO), "sleep 6", ()),
    "reverse-agent": (("-tt", "-A", "-R", _TO), "shell", ()),
    "reverse-x11": (("-tt", "-X", "-R", _TO), "shell", ()),
    "reverse-and-local": (("-N", "-L", "{l}:127.0.0.1:22", "-R", _TO), "none", ()),
    "reverse-late": (("-tt",), "idle-shell", ("-R", _TO)),
    "reverse-late-none": (("-N",), "none", ("-R", _TO)),
    "reverse-late-typing": (("-tt",), "shell", ("-R", _TO)),
    "reverse-autossh": (("-N", "-o", "ServerAliveInterval=2", "-R", _TO), "none", ()),
}
_IN_EVERY_SUITE = ("reverse", "reverse-shell", "reverse-many", "reverse-unix", "reverse-compressed",
                   "reverse-many-compressed", "reverse-unix-compressed", "reverse-late", "reverse-late-none")

#: By use: arguments, body and the label.
BENIGN: dict[str, tuple[tuple[str, ...], str, str]] = {
    "shell": (("-tt",), "shell", "ssh-interactive"),
    "idle-shell": (("-tt",), "idle-shell", "ssh-interactive"),
    "shell-compressed": (("-tt", "-C"), "shell", "ssh-interactive"),
    "shell-agent": (("-tt", "-A"), "shell", "ssh-interactive"),
    "shell-x11": (("-tt", "-X"), "shell", "ssh-interactive"),
    "shell-x11-asked": (("-tt", "-Y"), "shell", "ssh-interactive"),
    "shell-alive": (("-tt", "-o", "ServerAliveInterval=1"), "shell", "ssh-interactive"),
    "paste": (("-tt",), "paste", "ssh-interactive"),
    "exec": ((), "uname -a", "ssh-exec"),
    "exec-slow": ((), "sleep 3; date", "ssh-exec"),
    "exec-alive": (("-o", "ServerAliveInterval=1"), "sleep 3; date", "ssh-exec"),
    "exec-compressed": (("-C",), "ls -la /etc", "ssh-exec"),
    "exec-output": ((), "ls -laR /etc/ssl | head -400", "ssh-exec|ssh-transfer"),
    "download": ((), "head -c 1500000 /dev/urandom", "ssh-transfer"),
    "upload": ((), "pipe", "ssh-transfer"),
    "local": (("-N", "-L", "{l}:127.0.0.1:7003"), "web", "ssh-local-forward"),
    "local-shell": (("-tt", "-L", "{l}:127.0.0.1:7003"), "shell", "ssh-interactive|ssh-local-forward"),
    "local-idle": (("-N", "-L", "{l}:127.0.0.1:7003", "-o", "ServerAliveInterval=1"), "none", "ssh-local-forward"),
    "dynamic": (("-N", "-D", "{l}"), "socks", "ssh-dynamic-forward"),
    "jump": (("-W", "127.0.0.1:22"), "jump", "ssh-jump"),
    "nested-shell": (("-W", "127.0.0.1:22"), "jump-shell", "ssh-jump"),
    "tun": (("-N", "-w", "any"), "none", "ssh-tun"),
}
_BENIGN_SUITES = ("shell", "exec", "local", "jump", "download")


def scenarios() -> list[Scenario]:
    """Return every scenario of SSH, in order."""
    found = [*_openssh_reverse(), *_openssh_benign(), *_dropbear(), *_libraries(), *_others(), *_evasions(),
             *_hostkeys()]
    return list(dict.fromkeys(found))


def _openssh_reverse() -> list[Scenario]:
    found = []
    for release in ("bookworm", "bullseye", "trixie", "sid"):
        client = f"openssh:{release}"
        for number, (use, (arguments, body, late)) in enumerate(REVERSE.items()):
            unix = use.startswith("reverse-unix") or use == "reverse-any-port"
            through = "" if unix else ("touch", "inner", "pty", "bulk", "chaff", "line")[number % 6]
            if use == "reverse-socks":
                through = "touch"
            found.append(Scenario(use, client, client, "", arguments, body, late, through))
        suites = SUITES if release in ("bookworm", "sid") else {"gcm256": (), "etm256": (), "sha512": (), "umac64": ()}
        for suite in suites:
            for use in _IN_EVERY_SUITE:
                arguments, body, late = REVERSE[use]
                through = "" if use.startswith("reverse-unix") else "touch"
                found.append(Scenario(use, client, client, suite, arguments, body, late, through))
        for through in ("inner", "chaff", "pty", "line", "bulk"):
            found += [Scenario("reverse", client, client, suite, REVERSE["reverse"][0], "none", (), through)
                      for suite in ("", "gcm256", "sha256")]
        for server in ("openssh:bullseye", "openssh:sid", "dropbear:bookworm", "dropbear:sid", "asyncssh"):
            for use in ("reverse", "reverse-shell"):
                arguments, body, late = REVERSE[use]
                found.append(Scenario(use, client, server, "", arguments, body, late, "touch"))
    return found


def _openssh_benign() -> list[Scenario]:
    found = []
    for release in ("bookworm", "bullseye", "trixie", "sid"):
        client = f"openssh:{release}"
        for use, (arguments, body, expected) in BENIGN.items():
            user = "root" if use == "tun" else "outsider"
            found.append(Scenario(use, client, client, "", arguments, body, (), "", expected, user))
        for suite in SUITES if release in ("bookworm", "sid") else ("gcm256", "etm256", "sha512", "umac64"):
            for use in (*_BENIGN_SUITES, "tun"):
                arguments, body, expected = BENIGN[use]
                user = "root" if use == "tun" else "outsider"
                found.append(Scenario(use, client, client, suite, arguments, body, (), "", expected, user))
        for server in ("dropbear:bookworm", "dropbear:sid", "asyncssh", "openssh:bullseye", "openssh:sid"):
            for use in ("shell", "exec", "local", "download"):
                arguments, body, expected = BENIGN[use]
                found.append(Scenario(use, client, server, "", arguments, body, (), "", expected))
    return found


def _dropbear() -> list[Scenario]:
    found = []
    for release in ("bookworm", "bullseye", "trixie", "sid"):
        client = f"dropbear:{release}"
        for server in (client, "openssh:sid", "openssh:bookworm"):
            for suite in ("", "sha256"):
                for use in ("reverse", "reverse-shell", "reverse-many", "reverse-many-shell", "reverse-wide"):
                    arguments, body, late = REVERSE[use]
                    arguments = tuple("-t" if one == "-tt" else one for one in arguments)
                    through = "inner" if server == client and use == "reverse" else "touch"
                    found.append(Scenario(use, client, server, suite, arguments, body, late, through))
                for use in ("shell", "exec", "exec-slow", "download", "upload", "local", "local-shell"):
                    arguments, body, expected = BENIGN[use]
                    arguments = tuple("-t" if one == "-tt" else one for one in arguments)
                    found.append(Scenario(use, client, server, suite, arguments, body, (), "", expected))
    return found


def _libraries() -> list[Scenario]:
    found = []
    for client in ("asyncssh", "paramiko", "libssh", "go"):
        for server in ("openssh:bookworm", "openssh:sid", "dropbear:sid"):
            for suite in ("", *COMMON_SUITES):
                found += [Scenario(use, client, server, suite,
                                   through="inner" if use == "reverse" and not suite else "touch")
                          for use in ("reverse", "reverse-many", "reverse-shell", "reverse-late", "reverse-wide")]
                found += [Scenario(use, client, server, suite, expected=BENIGN[use][2]) for use in ("shell", "exec")]
                # A library opens connections onwards; whose they are is not its business.
                found += [Scenario(use, client, server, suite, expected="ssh-local-forward|ssh-dynamic-forward")
                          for use in ("local", "dynamic")]
        if client in ("asyncssh", "paramiko"):
            found += [Scenario(use, client, "openssh:bookworm", through="touch")
                      for use in ("reverse-compressed", "reverse-shell-compressed")]
            found.append(Scenario("sftp", client, "openssh:bookworm", expected="ssh-transfer"))
    found += [Scenario("reverse-unix", "asyncssh", "openssh:bookworm")]
    return found


def _others() -> list[Scenario]:
    found = [Scenario("role-swap", "asyncssh", "asyncssh", expected="ssh-role-swap")]
    for release in ("bookworm", "bullseye", "trixie", "sid"):
        client = f"openssh:{release}"
        for use, expected in (("scp-up", "ssh-transfer"), ("scp-down", "ssh-transfer"), ("sftp", "ssh-transfer"),
                              ("rsync", "ssh-transfer|ssh-exec"), ("git", "ssh-exec|ssh-transfer"),
                              ("ansible", "ssh-exec|ssh-transfer|ssh-interactive"),
                              ("vscode", "ssh-exec|ssh-dynamic-forward|ssh-local-forward|ssh-transfer"),
                              ("exec-multiplexed", "ssh-exec"), ("shell-multiplexed", "ssh-interactive"),
                              ("refused", "ssh"),
                              ("inbound-shell", "ssh-interactive"), ("inbound-exec", "ssh-exec")):
            found.append(Scenario(use, client, client, expected=expected))
        found.append(Scenario("inbound-reverse", client, client, arguments=("-N", "-R", "{f}:127.0.0.1:22"),
                              expected="ssh"))
    return found


def _evasions() -> list[Scenario]:
    """What somebody may do who knows this guard; `benchmarks/tunnels.py` adds what can be done to the capture."""
    found = []
    for client in ("openssh:bookworm", "openssh:sid", "openssh:trixie"):
        for through in ("inner", "chaff", "paste", "paced", "slow", "pty", "line"):
            found += [Scenario("evasion-" + through, client, client, "", REVERSE["reverse"][0], "none", (), through)]
            found += [Scenario(f"evasion-{carrier}-{through}", client, client, "", REVERSE["reverse"][0], "none", (),
                               through, "reverse-shell") for carrier in ("tls", "websocket")]
        found += [Scenario(f"evasion-{carrier}-out", client, client, "", ("-tt",), "shell", (), "", "other")
                  for carrier in ("tls", "websocket")]
    found += [Scenario("evasion-padding", "paramiko", "openssh:bookworm", suite, through=through)
              for suite in ("", *COMMON_SUITES) for through in ("touch", "inner")]
    return found


def _hostkeys() -> list[Scenario]:
    """A client that learns the server's other host keys after the login: UpdateHostKeys, ssh_config(5)."""
    found = []
    for release in ("bookworm", "bullseye", "trixie", "sid"):
        client = f"openssh:{release}"
        for use in ("shell", "exec", "local-idle"):
            arguments, body, expected = BENIGN[use]
            found.append(Scenario("hostkeys-" + use, client, client, "", arguments, body, (), "", expected))
        arguments, body, late = REVERSE["reverse"]
        found.append(Scenario("reverse-hostkeys", client, client, "", arguments, body, late, "touch"))
    return found
