"""Openings of SSH sessions that ask for no port, drawn at random: what servers say of their own accord, and how TCP
cuts and joins what was written.

Beside its answers OpenSSH's server sends DEBUG for the options of a key and of the environment (auth_debug_send in
auth.c), its host keys (hostkeys-00, PROTOCOL section 2.5) and, by ClientAliveInterval, keepalives. While a segment
waits to be acknowledged, what comes next is gathered (RFC 896): any of these may share a segment with any answer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from ssh_talk import SUITES, Talk

from gpuguard.core.ssh.messages import KEEPALIVE, REPLY

if TYPE_CHECKING:
    from random import Random

#: The algorithms of a key and the lengths that it may have, RFC 8709, RFC 5656 section 3.1 and RFC 4253 section 6.6.
KEYS = ((("ssh-ed25519",), (51,)), (("ecdsa-sha2-nistp256",), (104,)), (("ecdsa-sha2-nistp521",), (172,)),
        (("rsa-sha2-512", "rsa-sha2-256"), (279, 407, 535, 407 + 256)))
_NO_KEYS = 29

WAITING = ("SSH-2.0-PuTTY_Release_0.78", "SSH-2.0-libssh2_1.10.0", "SSH-2.0-JSCH-0.1.54", "SSH-2.0-ssh2js1.17.0",
           "SSH-2.0-Erlang/5.3", "SSH-2.0-paramiko_3.4.0", "SSH-2.0-libssh_0.11.0", "SSH-2.0-AsyncSSH_2.14.0",
           "SSH-2.0-Go", "SSH-2.0-dropbear_2022.83")
STRANGERS = ("SSH-2.0-Twisted_26.10.0", "SSH-2.0-Renci.SshNet.SshClient.0.0.1", "SSH-2.0-1.0")
OPENSSH = ("SSH-2.0-OpenSSH_9.2p1", "SSH-2.0-OpenSSH_10.0p2")
SERVERS = ("SSH-2.0-OpenSSH_9.2p1", "SSH-2.0-OpenSSH_8.4p1")


class Step(NamedTuple):
    """What the client writes at once, and what it is answered by; all in message lengths."""

    asked: tuple[int, ...]
    answers: tuple[int, ...]


def chatter(rng: Random) -> tuple[list[int], tuple[str, ...]]:
    """Return what a server says of its own accord after the login, and its host key algorithms."""
    length = rng.randint(20, 400)
    alike = rng.random() < 0.6
    found = [10 + (length if alike else rng.randint(20, 400)) for _ in range(rng.choice((0, 0, 1, 2, 2, 3)))]
    keys = rng.sample(KEYS, rng.randint(1, 4))
    # OpenSSH's tells of its keys since 6.8 (notify_hostkeys in sshd.c); others say neither.
    if found or rng.random() < 0.5:
        told = _NO_KEYS + sum(4 + rng.choice(lengths) for _, lengths in keys)
        found.insert(rng.randint(0, len(found)), told)
    return found, tuple(name for names, _ in keys for name in names)


def _requests(rng: Random) -> list[Step]:
    """Return what is asked on a session: a terminal and a shell, a command, or SFTP."""
    window = rng.choice(((), (9,)))
    kind = rng.choice(("shell", "shell at once", "exec", "sftp", "simple", "environment"))
    pty, command = rng.randint(46, 420), rng.randint(20, 200)
    granted = (*window, 5)
    return {
        "shell": [Step((pty,), (5,)), Step((15,), granted)],
        "shell at once": [Step((pty, 15), (5, *granted))],
        "exec": [Step((command,), granted)],
        "sftp": [Step((27,), granted), Step((18,), (300,))],
        "simple": [Step((44, command), granted)],
        "environment": [Step((rng.randint(30, 60),), ()), Step((pty,), (5,)), Step((15,), granted)],
    }[kind]


def _data(rng: Random) -> list[Step]:
    return [Step((9 + rng.randint(1, 60),), (9 + rng.randint(1, 120),)) for _ in range(rng.randint(0, 6))]


def story(rng: Random, banner: str) -> list[Step]:
    """Return a session that opens one channel, as the client of this banner may write it."""
    # OpenSSH and dropbear say where the connection came from, "UNKNOWN" or 127.0.0.1, and a host has a name.
    onwards = 45 + rng.randint(11 if banner in OPENSSH or "dropbear" in banner else 4, 60)
    steps: list[Step] = []
    if banner in OPENSSH:
        kind = rng.choice(("session", "jump", "forward"))
        if kind == "forward":
            steps = [Step((34,), ()), Step((onwards,), (17,))]
        else:
            tail = rng.choice(((), (34,)))
            steps = [Step((24 if kind == "session" else onwards, *tail), (17,))]
    else:
        kind = rng.choice(("session", "forward"))
        opened = Step((24 if kind == "session" else onwards,), (17,))
        if banner in STRANGERS and rng.random() < 0.6:
            private = rng.randint(20, 60)
            if rng.random() < 0.5:
                opened = Step((private, *opened.asked), (1, 17))
            else:
                steps.append(Step((private,), (1,)))
        steps.append(opened)
    if kind == "session":
        steps += _requests(rng)
    return steps + _data(rng)


def play(rng: Random, suite: str, banner: str) -> Talk:
    """Return the conversation of one such session, cut and joined at random."""
    waiting, keys = chatter(rng)
    talk = Talk(suite, banner=banner, server=rng.choice(SERVERS), keys=keys).login()
    rtt_ns = rng.choice((100_000, 2_000_000, 30_000_000))

    def speak(least: int) -> None:
        """The server's words in segments of any number of them, at least so many in all."""
        count = rng.randint(least, len(waiting))
        while count > 0:
            together = rng.randint(1, count)
            talk.theirs(*waiting[:together], after_ns=rng.choice((50_000, rtt_ns, 40_000_000)))
            del waiting[:together]
            count -= together

    for step in story(rng, banner):
        speak(0)
        talk.ours(*step.asked, after_ns=rng.choice((200_000, rtt_ns, 5_000_000)))
        if rng.random() < 0.5:
            speak(0)
        place = len(waiting)
        for answer in step.answers:
            place = rng.randint(place, len(waiting))
            waiting.insert(place, answer)
            place += 1
        # A client that waits goes on when it has its answers; the rest may come later.
        speak(place if step.answers else 0)
        if rng.random() < 0.05:
            talk.theirs(KEEPALIVE, after_ns=15 * 10**9)
            talk.ours(REPLY, after_ns=rtt_ns)
    return talk


BANNERS = (*WAITING, *STRANGERS, *OPENSSH)
NAMES = tuple(SUITES)
