"""A shell in clear on a connection that this host dialled: look-alikes first, then what is to be found, then parity."""

from __future__ import annotations

import sys
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuguard._packets import Parser
from gpuguard.core.detectors import reverse_console
from gpuguard.core.facts import observations_of
from gpuguard.core.flows import FlowTable
from gpuguard.core.fusion import SUSPECT_NATS, confirm_nats
from gpuguard.core.host import Host
from gpuguard.core.records import Fact, HostInfo, Packets, Spoken

sys.path.insert(0, str(Path(__file__).parent))
import reference_packets as reference
from conversation import frame

S = 1_000_000_000
START = 10**18
NEAR, FAR = bytes((10, 0, 0, 2)), bytes((203, 0, 113, 9))
HERE, THERE = 0, 1
Said = list[tuple[int, bytes]]

ID = b"uid=0(root) gid=0(root) groups=0(root)\n"
LS = b"total 8\ndrwxr-xr-x 2 root root 4096 Nov 21 18:59 .\n-rw-r--r-- 1 root root 12 Nov 21 18:59 a\n"
PS = b"USER         PID %CPU %MEM    VSZ   RSS TTY      STAT START   TIME COMMAND\nroot 1 0.1 0.0 93472 init\n"
UNAME = b"Linux node7 6.1.0-18-amd64 #1 SMP PREEMPT_DYNAMIC Debian 6.1.76-1 x86_64 GNU/Linux\n"
MOUNTS = b"sysfs on /sys type sysfs (rw,nosuid,nodev,noexec,relatime)\n"
DF = b"Filesystem     1K-blocks    Used Available Use% Mounted on\n/dev/vda1 1 1 1 1% /\n"
LINKS = b"1: lo: <LOOPBACK,UP,LOWER_UP> mtu 65536 qdisc noqueue state UNKNOWN\n"
PASSWD = b"root:x:0:0:root:/root:/bin/bash\n"
MISSING = b"sh: 3: nvidia-smi: not found\n"


def frames(said: Said, *, mtu: int = 1400) -> list[tuple[int, bytes, int]]:
    """The packets of a connection from here to there: each acknowledges what the other side said before it."""
    ends, sent = ((NEAR, 40_000), (FAR, 4455)), [7, 2**32 - 40]
    pieces: list[tuple[int, bytes | None]] = [(HERE, None), (THERE, None)]
    pieces += [(side, data[at:at + mtu]) for side, data in said for at in range(0, len(data), mtu)]
    packets = [frame(ends, sent, side, data) for side, data in pieces]
    return [(101, one, len(one)) for one in packets]


def read(packets: list[tuple[int, bytes, int]]) -> tuple[Packets, list[Fact]]:
    """The parser's block, and the reference's facts."""
    parser = Parser(rows_max=len(packets) + 1)
    for at, (link, data, _) in enumerate(packets):
        parser.frame(link, data, START + at * S)
    rows, facts = parser.take()
    _, expected = reference.read_frames(packets, [START + at * S for at in range(len(packets))])
    return Packets(START, 0, rows, facts), expected


def told(said: Said, **more: int) -> list[str]:
    block, expected = read(frames(said, **more))
    assert list(block.facts) == expected
    return [one.what for one in block.facts if isinstance(one, Spoken) and one.what.startswith("shell-")]


def asked(*answers: bytes, word: bytes = b"x\n") -> Said:
    return [one for answer in answers for one in ((THERE, word), (HERE, answer))]


def prompting(prompt: bytes, *answers: bytes) -> Said:
    return [(HERE, prompt), *asked(*(answer + prompt for answer in answers))]


# -- look-alikes ------------------------------------------------------------------------------------------------------

MAIL = b"From: root@node7\r\nSubject: cron\r\n\r\n" + LS + ID + b"\r\n.\r\n"
LOOK_ALIKES: dict[str, Said] = {
    "a console that this host calls": [(1 - side, data) for side, data in prompting(b"root@a:~# ", LS, ID, PS, UNAME)],
    "telnet, whose login is answered": [
        (THERE, b"login: "), (HERE, b"root\n"), (THERE, b"Password: "), (HERE, b"# $ \n"), (THERE, b"# "),
        (HERE, b"ls -l\n"), (THERE, LS + b"# "), (HERE, b"id\n"), (THERE, ID + b"# "), (HERE, b"exit\n")],
    "mails that hold listings": [(THERE, b"220 mx ESMTP\r\n"), *(
        one for _ in range(4) for one in (
            (HERE, b"MAIL FROM:<a@b>\r\n"), (THERE, b"250 ok\r\n"), (HERE, b"DATA\r\n"), (THERE, b"354 go on\r\n"),
            (HERE, MAIL), (THERE, b"250 queued\r\n")))],
    "uploads of listings, asked for": [one for body in (LS, PS, ID, UNAME) for one in (
        (HERE, b"PUT /a HTTP/1.1\r\nHost: b\r\nExpect: 100-continue\r\n\r\n"),
        (THERE, b"HTTP/1.1 100 Continue\r\n\r\n"), (HERE, body), (THERE, b"HTTP/1.1 201 Created\r\n\r\n"))],
    "listings that nobody asked for (an FTP server's data, a log)": [(HERE, one) for one in (LS, ID, PS, UNAME, LS)],
    "listings, each behind a text of the far side": asked(LS, ID, PS, UNAME, word=b"w" * 300),
    "a quiz": asked(*[b"Right. Next question: how many $ ?\n"] * 8),
    "a game's prompt": prompting(b"> ", *[b"You are in a maze.\n"] * 8),
    "a debugger's prompt": prompting(b"(Pdb) ", *[b"x = 1\n"] * 8),
    "a database's monitor": prompting(b"mysql> ", *[b"1 row in set\n"] * 8),
    "a model's words": asked(*[b"Sure. ", b"# ", b"Title\n"] * 5) + [
        (HERE, one) for _ in range(6) for one in (b"# ", b"Title\n", b"- ", b"$ ", b"x\n")],
    "a model's words, a title in each answer": [
        one for _ in range(6) for one in ((THERE, b"go on\n"), (HERE, b"# "), (HERE, b"Title\n"), (HERE, b"text."))],
    "a gauge": [one for n in range(10) for one in ((THERE, b"load\n"), (HERE, b"%d %% \n" % (n * 7)))],
    "progress": asked(*[b"\r%3d %% " % (n * 11) for n in range(8)]),
    "progress without a space": asked(*[b"\rloading %3d%% " % (n * 11) for n in range(8)]),
    "a price": asked(*[b"12.%02d $ " % n for n in range(8)]),
    "one listing, again and again": asked(*[LS] * 8),
    "a file that begins as one listing, of many": asked(PASSWD, b"127.0.0.1 localhost\n", b"nameserver 10.0.0.1\n"),
    "chats that speak of shells": asked(b"mia: id?\n", b"tom: uid=0(root) gid=0(root)\n", b"mia: total 8\n", b"# \n"),
    "prompts that are all different": [(HERE, b"a $ "), *asked(b"b # ", b"c % ", b"d $ ", b"e # ", b"f $ ", b"g # ")],
    "a prompt now and then": [(HERE, b"$ "), *asked(*[b"ok\n", b"ok\n", b"$ "] * 4)],
}


@pytest.mark.parametrize("name", LOOK_ALIKES)
def test_look_alikes_say_nothing(name: str) -> None:
    said = LOOK_ALIKES[name]
    assert told(said) == []
    assert told(said, mtu=7) == []


# -- shells -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", [b"$ ", b"# ", b"sh-5.2$ ", b"root@node7:~# ", b"node7% ", b"node7 2 ~ % ",
                                    b"PS /root> ", b"\x1b[1m\x1b[7m%\x1b[27m \r \rnode7# ",
                                    b"\x1b[01;32mme@node7\x1b[00m:~$ "])
def test_a_prompt_before_three_lines(prompt: bytes) -> None:
    assert told(prompting(prompt, b"a\n", b"b\n", b"")) == ["shell-prompts"]
    assert told(prompting(prompt, b"a\n", b"b\n")) == []
    assert told(prompting(prompt, *[LS] * 9), mtu=500) == ["shell-prompts"]


def test_a_prompt_that_tells_the_directory() -> None:
    places = [b"root@node7:%s# " % place for place in (b"~", b"/tmp", b"/etc", b"~/.ssh", b"~")]
    assert told([(HERE, places[0]), *asked(*(b"\n" + place for place in places))]) == ["shell-prompts"]


def test_an_answer_without_prompt_counts_against_it() -> None:
    late = [(HERE, b"$ "), *asked(b"a\n$ ", b"b\n", b"c\n$ ", b"d\n$ ")]
    assert told(late) == []
    assert told([*late, *asked(b"e\n$ ", b"f\n$ ")]) == ["shell-prompts"]


@pytest.mark.parametrize("first", [ID, LS, PS, UNAME, MOUNTS, LINKS, PASSWD, MISSING])
@pytest.mark.parametrize("second", [b"uid=1000(me) gid=1000(me)\n", b"-rwsr-xr-x 1 root root 1 a\n", DF,
                                    b"    PID TTY          TIME CMD\n", b"bash: nvidia-smi: command not found\n"])
def test_what_two_programs_print(first: bytes, second: bytes) -> None:
    found = told(asked(first, b"vm\n", second))
    one_program = {first, second} <= {ID, b"uid=1000(me) gid=1000(me)\n"} or (first[:4], second[:4]) in {
        (b"tota", b"-rws"), (b"USER", b"    "), (b"sysf", b"File"), (b"sh: ", b"bash")}
    assert found == ([] if one_program else ["shell-output"])


def test_behind_a_socks_proxy() -> None:
    opening = [(HERE, b"\5\1\0"), (THERE, b"\5\0"), (HERE, b"\5\1\0\1\xcb\0\x71\x09\x11\x67"),
               (THERE, b"\5\0\0\1" + bytes(6))]
    assert told([*opening, *prompting(b"$ ", b"a\n", b"b\n", b"")]) == ["shell-prompts"]


def test_behind_much_text_nothing_is_read() -> None:
    assert told([(HERE, b"x" * 99 + b"\n")] * 170 + prompting(b"$ ", ID, LS, PS, UNAME)) == []


# -- who is accused ---------------------------------------------------------------------------------------------------


def judged(said: Said, *, host: Host | None = None) -> list[float]:
    block, _ = read(frames(said))
    host, detector = host or Host(), reverse_console.Detector()
    found = []
    for item in observations_of(FlowTable(), block):
        host.receive(item)
        if type(item) in detector.takes:
            found += detector.receive(item, host)
    assert all(one.label == "reverse-shell" and one.text and one.subject.responder_port == 4455 for one in found)
    return [one.nats for one in found]


def test_each_is_suspect_and_none_confirms_alone() -> None:
    both = judged(prompting(b"$ ", ID, LS, PS))
    assert len(both) == 2
    assert all(nats >= SUSPECT_NATS for nats in both)
    assert sum(both) < confirm_nats(1.0)


def test_what_others_dial_to_this_host_is_not_its_doing() -> None:
    host = Host()
    host.receive(HostInfo(START, 1, "b", "h", 100, addresses=("203.0.113.9",)))
    assert judged(prompting(b"$ ", ID, LS, PS), host=host) == []


# -- parity -----------------------------------------------------------------------------------------------------------

WORDS = st.sampled_from([
    b"$ ", b"# ", b"\n$ ", b"a\r$ ", b"PS > ", b"PS /> ", b"> ", b" $ ", b"x" * 62 + b"$ ", b"x" * 63 + b"$ ", b"$",
    b" ", ID, LS, PS, UNAME, MOUNTS, DF, LINKS, PASSWD, MISSING, b"total 1\n", b"total \n", b"total 1", b"-rw-r--r--.",
    b"drwx", b"uid=1 gid=", b"uid=x gid=\n", b"  PID TTY\n", b"Linux #\n", b"sh: x\n", b"/bin/bash: x\n", b"zsh: \n",
    b"\x1b[0m$ ", b"x on /y type z\n", b"GET / HTTP/1.1\r\n", b"\n", b"\r\n", b"{", b"}\n", b"S", b"SSH-2.0-x\r\n",
    b"7 % ", b"a 7.5% ", b"a7% ", b". $ ", b"  # ",
    b"\0", b"POST ", b"w" * 300, b"GET a b c d e f g\n", b"Upgrade: websocket\r\n",
    b"CONNECT a:1 HTTP/1.1\r\n\r\n", b"\5\1\0", b"\5\1\0\1\1\1\1\1\1\1", b"y\n", b"q" * 9000, bytes(64),
])


@given(st.lists(st.tuples(st.sampled_from([HERE, HERE, THERE]), WORDS), max_size=24), st.sampled_from([3, 7, 64, 1400]))
@settings(max_examples=600, deadline=None)
def test_what_a_console_says_is_the_references(said: Said, mtu: int) -> None:
    block, expected = read(frames([one for one in said if len(one[1]) < 400 * mtu], mtu=mtu))
    assert list(block.facts) == expected


@given(st.lists(st.tuples(st.sampled_from([HERE, THERE]), WORDS), max_size=16), st.randoms(use_true_random=False))
@settings(max_examples=300, deadline=None)
def test_late_and_repeated_segments_are_the_references(said: Said, random: Random) -> None:
    packets = frames(said)
    opening, rest = packets[:2], [one for one in packets[2:] for _ in range(random.choice((1, 1, 1, 2)))]
    for at in range(len(rest) - 1):
        if random.random() < 0.2:
            rest[at], rest[at + 1] = rest[at + 1], rest[at]
    block, expected = read(opening + rest)
    assert list(block.facts) == expected
