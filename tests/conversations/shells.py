"""Reverse shells: a terminal that a far person types in, lines with and without a prompt, implants that poll."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from conversations.dice import log_normal
from conversations.ordinary import opening, together

if TYPE_CHECKING:
    from collections.abc import Callable
    from random import Random

    from conversations.ordinary import Part
    from conversations.wire import Wire


class _Frame:
    """How a shell's words are wrapped: not at all, in a frame, or as text with a number that grows (JSON, base64)."""

    def __init__(self, rng: Random) -> None:
        self.kind = rng.choice(("raw", "raw", "frame", "text"))
        self.more = rng.randint(2, 40)
        self.numbers = itertools.count(1)

    def __call__(self, size: int) -> int:
        match self.kind:
            case "raw":
                return size
            case "frame":
                return size + self.more
            case _:
                return self.more + 4 * -(-size // 3) + len(str(next(self.numbers)))


def _programs(rng: Random) -> Callable[[], tuple[float, int]]:
    """Return what commands take, in seconds, and print."""
    def one() -> tuple[float, int]:
        kind = rng.random()
        if kind < 0.15:
            return rng.uniform(1e-4, 4e-4), 0  # cd, an assignment
        if kind < 0.8:
            return log_normal(rng, 0.002, 0.7, 0.2)(), round(log_normal(rng, 90, 1.2, 6_000)())
        return log_normal(rng, 0.05, 1.2, 5)(), round(log_normal(rng, 600, 1.2, 30_000)())
    return one


def _command_length(rng: Random) -> int:
    return round(min(90, max(2, log_normal(rng, 9, 0.8)())))


def _pings(rng: Random, wire: Wire, start: float) -> Part:
    size, period = rng.randint(8, 16), rng.choice((5.0, 15.0, 30.0))
    speak, reply = (wire.far, wire.near) if rng.random() < 0.5 else (wire.near, wire.far)
    now = start
    while True:
        yield now
        reply(size, speak(size, now) + 2e-4)
        now += period * rng.uniform(0.999, 1.001)


class _Multiplexed:
    """One of several connections in a tunnel: a header of 12 bytes in a record of its own before each word (yamux)."""

    def __init__(self, wire: Wire, more: int) -> None:
        self.wire, self.more = wire, more

    def near(self, size: float, now_s: float) -> float:
        self.wire.near(12, now_s)
        return self.wire.near(size + self.more, now_s + 2e-5)

    def far(self, size: float, now_s: float) -> float:
        self.wire.far(12, now_s)
        return self.wire.far(size + self.more, now_s + 2e-5)


def terminal(rng: Random, wire: Wire) -> None:
    """A pty: each key is echoed; corrections, completion, pastes, and programs that fill the screen."""
    _typed(rng, wire, wire, _Frame(rng))


def multiplexed_terminal(rng: Random, wire: Wire) -> None:
    """A pty, or SSH to this host's own server, in a tunnel that carries several connections."""
    _typed(rng, wire, _Multiplexed(wire, rng.choice((0, 0, 35))), lambda size: size)


def _typed(rng: Random, path: Wire, wire: Wire | _Multiplexed, frame: Callable[[int], int]) -> None:
    program, prompt = _programs(rng), rng.randint(2, 60)
    gap, between = log_normal(rng, rng.uniform(0.11, 0.32), rng.uniform(0.4, 0.8)), log_normal(rng, 3.0, 0.9)
    soon, joined = rng.choice((2e-4, 1e-3)), rng.choice((0, 0, 0.2, 1))

    def echo() -> float:
        return soon * rng.uniform(0.6, 2.5)

    def screen(now: float) -> float:
        for _ in range(rng.randint(5, 25)):
            shown = rng.choice((1, 1, rng.randint(8, 60), rng.randint(60, 900)))
            wire.near(frame(shown), wire.far(frame(1), now) + echo())
            now += gap()
        return now

    def key(now: float) -> float:
        kind = rng.random()
        if kind < 0.05:
            asked, answer = 1, rng.choice((3, 4))  # erased
        elif kind < 0.09:
            asked, answer = 1, rng.choice((1, rng.randint(2, 12), rng.randint(40, 300)))  # completed, or rung
        elif kind < 0.12:
            asked = answer = rng.randint(5, 60)  # pasted
        elif kind < 0.14:
            asked, answer = 3, rng.randint(2, 40)  # an arrow: from the history
        else:
            asked = answer = 1
        wire.near(frame(answer), wire.far(frame(asked), now) + echo())
        return now + gap()

    def types(now: float) -> Part:
        wire.near(frame(prompt), now)
        now += between()
        while True:
            for _ in range(_command_length(rng)):
                yield now
                now = key(now)
            takes, prints = program()
            heard = wire.far(frame(1), now)
            if rng.random() >= joined:
                wire.near(frame(2), heard + echo())
            done = heard + max(echo(), takes)
            if prints:
                wire.near(frame(prints), done)
            now = wire.near(frame(prompt), done + rng.uniform(1e-5, 1e-3)) + between()
            if rng.random() < 0.05:
                now = screen(now)

    start = opening(rng, path)
    together(path, types(start), *([_pings(rng, path, start)] if rng.random() < 0.2 else []))


def _lines(rng: Random, wire: Wire, *, between: Callable[[], float], prompt: int, echoed: bool = False,
           delay: Callable[[], float] = lambda: 0.0) -> None:
    frame, program = _Frame(rng), _programs(rng)

    def types(now: float) -> Part:
        if prompt:
            wire.near(frame(prompt), now)
        now += between()
        while True:
            yield now
            length = _command_length(rng) + 1
            heard = wire.far(frame(length), now)
            takes, prints = program()
            if echoed:
                wire.near(frame(length), heard + 2e-4 * rng.uniform(0.7, 2))
            done = heard + takes + delay()
            if prints:
                done = wire.near(frame(prints), done)
            if prompt:
                wire.near(frame(prompt), done + rng.uniform(1e-5, 1e-3))
            now = max(done, heard) + between()

    start = opening(rng, wire)
    together(wire, types(start), *([_pings(rng, wire, start)] if rng.random() < 0.15 else []))


def _person(rng: Random) -> Callable[[], float]:
    return log_normal(rng, rng.uniform(2.0, 5.0), rng.uniform(0.5, 0.9))


def lines_with_a_prompt(rng: Random, wire: Wire) -> None:
    """A shell that was told to be interactive, without a terminal."""
    _lines(rng, wire, between=_person(rng), prompt=rng.randint(2, 50))


def lines_without_a_prompt(rng: Random, wire: Wire) -> None:
    """The bare `sh` of a one-liner."""
    _lines(rng, wire, between=_person(rng), prompt=0)


def lines_echoed(rng: Random, wire: Wire) -> None:
    """A terminal to which whole lines are sent."""
    _lines(rng, wire, between=_person(rng), prompt=rng.randint(2, 50), echoed=True)


def implant_that_polls(rng: Random, wire: Wire) -> None:
    """What a program copies each 20 to 100 ms between a socket and a shell."""
    period = rng.choice((0.02, 0.05, 0.1))
    _lines(rng, wire, between=_person(rng), prompt=rng.choice((0, rng.randint(2, 50))),
           delay=lambda: rng.uniform(0, period))


def slow_operator(rng: Random, wire: Wire) -> None:
    """A line a minute."""
    wire.seconds_max = 7_200
    _lines(rng, wire, between=log_normal(rng, rng.uniform(15, 60), 0.8), prompt=rng.choice((0, rng.randint(2, 50))))


SHELLS = {
    terminal: ("tcp", "tls", "ssh", "udp"),
    multiplexed_terminal: ("tcp", "tls"),
    lines_with_a_prompt: ("tcp", "tls", "udp"),
    lines_without_a_prompt: ("tcp", "tls"),
    lines_echoed: ("tcp", "tls"),
    implant_that_polls: ("tcp", "tls"),
    slow_operator: ("tcp", "tls"),
}
