"""The later life of SSH sessions that ask for no port, drawn at random: what runs in them, and what is said beside.

Each activity is written as the programs write it (RFC 4254, draft-ietf-secsh-filexfer-02, OpenSSH's PROTOCOL files):
a typed shell with keystroke chaff, copies by SFTP, connections onwards, X11 and the agent, further sessions and
commands, keepalives of both sides, new key exchanges, and the end. Several go on at once on one connection. What a
side writes is cut at the segment size, and what comes while a segment waits to be acknowledged is gathered (RFC 896).
The connection is seen on the client's host: the client answers at once, the server a round trip later.
"""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING, NamedTuple

from ssh_openings import BANNERS, OPENSSH, SERVERS
from ssh_talk import SUITES, Talk

from gpuguard.core.ssh.messages import DATA, IGNORE, KEEPALIVE, OPEN_CONFIRMATION, REPLY, SESSION_OPEN, WINDOW_ADJUST
from gpuguard.core.ssh.suites import record_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator
    from random import Random

MS = 1_000_000
SECOND = 1_000 * MS
#: What a message on a channel has that carries no data: EOF, CLOSE, SUCCESS and FAILURE (RFC 4254 section 5).
_BARE = 5
_KEY = DATA + 1
_EXIT_STATUS = 25
#: keepalive@openssh.com on a channel, by ClientAliveInterval (client_alive_check in serverloop.c).
_ALIVE = 31
_RECORD_MAX = 32_768
#: Keepalives that want no answer: "keepalive@lag.net" and, of libssh, keepalive@openssh.com.
_UNANSWERED = {"SSH-2.0-paramiko_3.4.0": 23, "SSH-2.0-libssh_0.11.0": KEEPALIVE}


class Write(NamedTuple):
    """What one side writes out at once, so long after the write before it of the same activity; message lengths."""

    after_ns: int
    from_client: bool
    messages: tuple[int, ...]


class World(NamedTuple):
    """What holds for the whole connection."""

    rng: Random
    rtt_ns: int
    banner: str

    def ours(self, *messages: int, after_ns: int | None = None) -> Write:
        """The client writes: as an answer at once, unless said otherwise."""
        if after_ns is None:
            after_ns = self.rng.choice((100_000, MS, 5 * MS))
        return Write(after_ns, True, messages)

    def theirs(self, *messages: int, more_ns: int = 0) -> Write:
        """The server answers, a round trip later or more."""
        return Write(self.rtt_ns + self.rng.randint(50_000, 2 * MS) + more_ns, False, messages)

    def data(self, size: int) -> tuple[int, ...]:
        """Channel data of so many bytes, in records as long as they may be."""
        full, rest = divmod(size, _RECORD_MAX)
        return (*[DATA + _RECORD_MAX] * full, DATA + rest)

    def pause(self, most_s: float) -> int:
        """Return a time that passes."""
        return int(self.rng.uniform(0.01, most_s) * SECOND)


def typed(world: World) -> Iterator[Write]:
    """Keys and echoes, with chaff or without; lines of output; pastes, a password, questions to the terminal."""
    rng = world.rng
    chaff = world.banner in OPENSSH and rng.random() < 0.5
    for _ in range(rng.randint(1, 4)):
        yield world.ours(_KEY, after_ns=world.pause(3))
        for _ in range(rng.randint(2, 12)):
            yield world.theirs(_KEY, *([_KEY] if chaff else []))
            yield world.ours(_KEY, after_ns=20 * MS if chaff else world.pause(0.3))
        kind = rng.choice(("output", "paste", "password", "question", "page", "none"))
        if kind == "output":
            yield world.theirs(DATA + 2, *world.data(rng.randint(5, 3_000)))
        elif kind == "page":
            yield world.theirs(*world.data(rng.randint(3_000, 90_000)))
            yield world.ours(WINDOW_ADJUST)
        elif kind in ("paste", "password"):
            length = rng.randint(2, 80)
            yield world.ours(DATA + length, after_ns=world.pause(2))
            yield world.theirs(DATA + (length if kind == "paste" else 2))
        elif kind == "question":
            yield world.theirs(DATA + rng.randint(3, 60), more_ns=world.pause(1))
            yield world.ours(DATA + rng.randint(3, 16))
        if rng.random() < 0.3:
            yield world.theirs(DATA + rng.randint(1, 120), more_ns=world.pause(2))


def sftp(world: World) -> Iterator[Write]:
    """SFTP both ways: names asked about one by one, a file read in requests ahead of their answers, a file written."""
    rng = world.rng
    handle = rng.choice((4, 4, 16))
    for _ in range(rng.randint(1, 3)):
        path = rng.randint(3, 60)
        yield world.ours(DATA + 13 + path, after_ns=world.pause(1))
        yield world.theirs(DATA + rng.choice((37, 24 + rng.randint(0, 30))), more_ns=world.pause(0.3))
        yield world.ours(DATA + 25 + path)
        yield world.theirs(DATA + 13 + handle)
        size = rng.choice((100, 5_000, 40_000, 150_000))
        if rng.random() < 0.5:
            ahead = rng.randint(1, 4)
            yield world.ours(*[DATA + 25 + handle] * ahead)
            for at in range(0, size, _RECORD_MAX):
                yield world.theirs(*world.data(13 + min(size - at, _RECORD_MAX)))
                yield world.ours(DATA + 25 + handle)
            yield world.theirs(DATA + 17 + rng.randint(3, 30))
        else:
            for at in range(0, size, _RECORD_MAX):
                yield world.ours(*world.data(25 + handle + min(size - at, _RECORD_MAX)))
                yield world.theirs(DATA + 17 + rng.randint(3, 30), *([WINDOW_ADJUST] if rng.random() < 0.5 else []))
        yield world.ours(DATA + 9 + handle)
        yield world.theirs(DATA + 17 + rng.randint(3, 30))


def onwards(world: World) -> Iterator[Write]:
    """Connections onwards (-L, -D), one for each request of a page."""
    rng = world.rng
    for _ in range(rng.randint(1, 4)):
        yield world.ours(45 + rng.randint(12, 60), after_ns=world.pause(1))
        yield world.theirs(OPEN_CONFIRMATION, more_ns=rng.choice((0, world.pause(0.3))))
        for _ in range(rng.randint(1, 3)):
            yield world.ours(DATA + rng.randint(1, 700))
            yield world.theirs(*world.data(rng.choice((rng.randint(1, 200), rng.randint(200, 30_000)))))
            if rng.random() < 0.3:
                yield world.ours(WINDOW_ADJUST)
        yield from _closed(world, rng.random() < 0.5)


def _closed(world: World, by_client: bool) -> Iterator[Write]:
    if by_client:
        yield world.ours(*world.rng.choice(((_BARE,), (_BARE, _BARE))))
        yield world.theirs(*world.rng.choice(((_BARE,), (_BARE, _BARE))))
    else:
        yield world.theirs(*world.rng.choice(((_BARE,), (_BARE, _BARE))))
        yield world.ours(*world.rng.choice(((_BARE,), (_BARE, _BARE))))


def used_from_afar(world: World) -> Iterator[Write]:
    """The agent or the display of this side, asked by the far one; channels are opened from there."""
    rng = world.rng
    agent = rng.random() < 0.5
    for _ in range(rng.randint(1, 4)):
        yield world.theirs(39 if agent else rng.choice((31, 37)), more_ns=world.pause(3))
        yield world.ours(OPEN_CONFIRMATION)
        yield world.theirs(DATA + (rng.choice((5, 212, 244)) if agent else 48))
        for _ in range(rng.randint(1, 4)):
            yield world.ours(DATA + (rng.randint(5, 800) if agent else 32 * rng.randint(1, 20)))
            yield world.theirs(DATA + rng.randint(4, 400))
        yield from _closed(world, rng.random() < 0.5)


def commands(world: World) -> Iterator[Write]:
    """Further sessions, of a ControlMaster or a library that runs one command after the other."""
    rng = world.rng
    for _ in range(rng.randint(1, 4)):
        yield world.ours(SESSION_OPEN, after_ns=world.pause(2))
        yield world.theirs(OPEN_CONFIRMATION)
        if rng.random() < 0.2:
            yield world.ours(rng.randint(46, 420), 15)
            yield world.theirs(_BARE, WINDOW_ADJUST, _BARE)
        elif rng.random() < 0.2:
            # A variable, a terminal and a shell, each of which waits for its answer (libraries).
            for asked in (rng.randint(30, 60), rng.randint(46, 80), 15):
                yield world.ours(asked)
                yield world.theirs(_BARE)
        else:
            yield world.ours(rng.randint(20, 200))
            yield world.theirs(WINDOW_ADJUST, _BARE)
        if rng.random() < 0.8:
            yield world.theirs(*world.data(rng.choice((rng.randint(1, 60), rng.randint(60, 9_000)))),
                               more_ns=world.pause(1))
        ends = rng.choice(((_BARE, _EXIT_STATUS, _BARE), (_EXIT_STATUS, _BARE, _BARE)))
        if rng.random() < 0.5:
            yield world.theirs(*ends)
        else:
            for end in ends:
                yield Write(rng.choice((20_000, MS)), False, (end,))
        yield world.ours(*rng.choice(((_BARE,), (_BARE, _BARE))))


def rekey(world: World) -> Iterator[Write]:
    """A new key exchange (RFC 4253 section 9): curve25519, NIST curves, or with a post-quantum part."""
    rng = world.rng
    offers = [world.ours(rng.randint(500, 1_700), after_ns=world.pause(5)), world.theirs(rng.randint(350, 1_300))]
    if rng.random() < 0.5:
        offers = [world.theirs(offers[1].messages[0], more_ns=world.pause(5)), world.ours(*offers[0].messages)]
    yield from offers
    asked, answered = rng.choice(((37, 37), (70, 70), (102, 102), (138, 138), (1_195, 1_076), (1_221, 1_125)))
    yield world.ours(asked)
    rest = rng.choice((51, 104, 279, 407, 535)) + rng.choice((83, 101, 276, 404, 532)) + 9
    if rng.random() < 0.5:
        yield world.theirs(answered + rest, REPLY)
    else:
        yield world.theirs(answered + rest)
        yield Write(rng.choice((10_000, MS)), False, (REPLY,))
    yield world.ours(REPLY)


#: What goes on in a session; and on a connection that opened none (-N).
_ACTIVITIES = {"typed": typed, "sftp": sftp, "onwards": onwards, "used from afar": used_from_afar,
               "commands": commands, "rekey": rekey}
_WITHOUT_SESSION = ("onwards", "rekey")


class Wire:
    """What both sides wrote, in segments as they pass the client's host, played to the grammar."""

    def __init__(self, talk: Talk, world: World) -> None:
        self._talk = talk
        self._world = world
        self._segment = world.rng.choice((536, 1_220, 1_448, 1_448, 8_948))
        self._gathers = world.rng.random() < 0.5
        #: For each side, (time, bytes) that wait for an acknowledgement, and when the last segment went.
        self._waiting: dict[bool, tuple[int, int]] = {}
        self._sent_ns = {True: 0, False: 0}

    def write(self, now_ns: int, *, from_client: bool, messages: tuple[int, ...]) -> None:
        """Take in what one side wrote."""
        self.flush(now_ns)
        talk = self._talk
        suite = talk.suite if from_client else talk.server_suite
        if suite.ignores:
            messages = tuple(one for message in messages for one in (IGNORE, message))
        size = sum(record_bytes(suite, one) for one in messages)
        due_ns, waiting = self._waiting.pop(from_client, (now_ns, 0))
        size += waiting
        while size >= self._segment:
            self._send(now_ns, from_client, self._segment)
            size -= self._segment
        unacknowledged = now_ns - self._sent_ns[from_client] < self._world.rtt_ns
        if size and self._gathers and unacknowledged and self._world.rng.random() < 0.5:
            self._waiting[from_client] = (max(due_ns, now_ns + self._world.rtt_ns // 2), size)
        elif size:
            self._send(now_ns, from_client, size)

    def flush(self, now_ns: int) -> None:
        """Send what was acknowledged by then."""
        for due_ns, from_client in sorted((due, side) for side, (due, _) in self._waiting.items()):
            if due_ns <= now_ns:
                self._send(due_ns, from_client, self._waiting.pop(from_client)[1])

    def _send(self, now_ns: int, from_client: bool, size: int) -> None:
        self._sent_ns[from_client] = now_ns
        self._talk.raw(size, client=from_client, after_ns=max(now_ns - self._talk.now, 1_000))


def _opened(wire: Wire, world: World, *, session: bool) -> int:
    """Play the opening of a session, or of a connection that is held open without one; return when it was done."""
    rng = world.rng
    now = SECOND
    steps: list[Write] = [Write(0, True, (SESSION_OPEN, 34) if world.banner in OPENSSH else (SESSION_OPEN,)),
                          world.theirs(OPEN_CONFIRMATION)]
    if not session:
        steps = [Write(0, True, (34,))]
    elif rng.random() < 0.5:
        steps += [world.ours(rng.randint(46, 420), 15), world.theirs(_BARE, WINDOW_ADJUST, _BARE)]
    else:
        steps += [world.ours(27), world.theirs(WINDOW_ADJUST, _BARE), world.ours(18), world.theirs(300)]
    for step in steps:
        now += step.after_ns
        wire.write(now, from_client=step.from_client, messages=step.messages)
    return now


class Keepalives:
    """Of both sides, each so long after it heard the other last, 0 for never; where they cross, both are answered.

    OpenSSH reads whole seconds of its clock (monotime in misc.c): an interval of one may be over at once.
    """

    def __init__(self, wire: Wire, world: World, since_ns: int) -> None:
        self._wire = wire
        self._world = world
        self._every = [world.rng.choice((0, 0, 1, 2, 15)) * SECOND, world.rng.choice((0, 0, 1, 2, 15)) * SECOND]
        self._second_ns = [SECOND if world.banner in OPENSSH else 1, 1]
        #: When the client heard the server, and the server the client; a round trip lies between both on this host.
        self._heard = [since_ns, since_ns + world.rtt_ns]

    def said(self, now_ns: int, *, from_client: bool) -> None:
        """Take in that one side said something."""
        self._heard[from_client] = now_ns + (self._world.rtt_ns if from_client else 0)

    def until(self, until_ns: int) -> None:
        """Play those that are due before that time."""
        while True:
            due = [self._due_ns(side) if self._every[side] else until_ns for side in (0, 1)]
            if min(due) >= until_ns:
                return
            both = abs(due[0] - due[1]) < MS // 2
            sides = self._world.rng.sample((0, 1), 2) if both else [due.index(min(due))]
            now_ns = min(due) + self._world.rng.randint(0, MS // 4)
            for side in sides:
                self._asks(now_ns, side)
                now_ns += 30_000
            for side in sides:
                self._answers(now_ns, side)

    def _due_ns(self, side: int) -> int:
        return self._heard[side] // self._second_ns[side] * self._second_ns[side] + self._every[side]

    def _asks(self, now_ns: int, side: int) -> None:
        asked = _UNANSWERED.get(self._world.banner, KEEPALIVE) if side == 0 else _ALIVE
        self._wire.write(now_ns, from_client=side == 0, messages=(asked,))
        self.said(now_ns, from_client=side == 0)
        self._heard[side] = max(now_ns, self._heard[side])

    def _answers(self, now_ns: int, side: int) -> None:
        if side == 0 and self._world.banner in _UNANSWERED:
            return
        back_ns = now_ns + (self._world.rtt_ns if side == 0 else 100_000)
        self._wire.write(back_ns, from_client=side == 1, messages=(REPLY if side == 0 else _BARE,))
        self.said(back_ns, from_client=side == 1)


def play(rng: Random, suite: str, banner: str) -> Talk:
    """Return one running session, in which up to four things go on at the same time."""
    talk = Talk(suite, banner=banner, server=rng.choice(SERVERS)).login()
    world = World(rng, rng.choice((200_000, 5 * MS, 30 * MS, 120 * MS)), banner)
    wire = Wire(talk, world)
    session = banner not in OPENSSH or rng.random() < 0.8
    opened_ns = _opened(wire, world, session=session)
    kinds = sorted(_ACTIVITIES if session else _WITHOUT_SESSION)
    keepalives = Keepalives(wire, world, opened_ns)
    queue: list[tuple[int, int, Write, Iterator[Write]]] = []

    def go_on(now_ns: int, number: int, activity: Iterator[Write]) -> None:
        write = next(activity, None)
        if write is not None:
            heapq.heappush(queue, (now_ns + write.after_ns, number, write, activity))

    for number in range(rng.randint(1, 4)):
        go_on(opened_ns, number, _ACTIVITIES[rng.choice(kinds)](world))
    while queue:
        now_ns, number, write, activity = heapq.heappop(queue)
        keepalives.until(now_ns)
        wire.write(now_ns, from_client=write.from_client, messages=write.messages)
        keepalives.said(now_ns, from_client=write.from_client)
        go_on(now_ns, number, activity)
    end_ns = talk.now + world.pause(20)
    keepalives.until(end_ns)
    wire.write(end_ns, from_client=True, messages=(rng.choice((_BARE, 13 + rng.randint(0, 40))),))
    wire.flush(end_ns + SECOND)
    return talk


NAMES = tuple(SUITES)
CLIENTS = BANNERS
