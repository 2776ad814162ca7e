"""Ordinary conversations of a host that dialled, by who asks and who works. Each takes its parameters at random."""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING

from conversations.dice import at_once, log_normal, sizes, thought, work

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from random import Random

    from conversations.wire import Wire

    #: Yields when it wants to go on.
    Part = Iterator[float]


def opening(rng: Random, wire: Wire) -> float:
    """Say how a connection begins: a greeting of the server, a handshake, a login; return when that is over."""
    now = 0.0
    if wire.carrier in {"tls", "ssh"}:
        now = wire.far(rng.randint(1500, 4500), wire.near(rng.randint(200, 1600), now) + 0.002)
        now = wire.near(rng.randint(50, 90), now + 0.001)
        if rng.random() < 0.5:
            wire.far(rng.choice((120, 480)), now)
        now += wire.rtt_s
    elif rng.random() < 0.3:
        now = wire.far(rng.randint(20, 110), 0.001)
    for _ in range(rng.choice((0, 0, 1, 2, 3))):
        now = wire.far(rng.randint(5, 120), wire.near(rng.randint(10, 200), now + 0.001) + 0.002)
    return now + rng.choice((0.001, 0.05, 0.5))


def together(wire: Wire, *parts: Part) -> None:
    """Let several parts of a conversation go on side by side, each at its own times."""
    waiting = [(next(part), index, part) for index, part in enumerate(parts)]
    heapq.heapify(waiting)
    while waiting:
        now, index, part = heapq.heappop(waiting)
        if wire.over(now):
            continue
        after = next(part, None)
        if after is not None:
            heapq.heappush(waiting, (after, index, part))


def say(rng: Random, speak: Callable[[int, float], float], size: float, now: float, parts: float) -> float:
    """Say something in one piece, or (``parts``: how often) its head first."""
    if rng.random() >= parts:
        return speak(round(size), now)
    head = rng.randint(9, 200)
    speak(head, now)
    return speak(max(1, round(size) - head), now + rng.choice((2e-5, 3e-4)))


# -- this host asks ---------------------------------------------------------------------------------------------------


def _asking(rng: Random, wire: Wire, start: float, pause: Callable[[], float], *, most: int = 2_000) -> Part:
    asked, answers, takes = sizes(rng, 10, most), sizes(rng, 2, most), work(rng)
    in_parts, out_parts = rng.choice((0, 0, 0.3, 1)), rng.choice((0, 0, 0.3, 1))
    now = start
    while True:
        yield now
        heard = say(rng, wire.near, asked(), now, out_parts)
        now = say(rng, wire.far, answers(), heard + takes(), in_parts) + rng.uniform(1e-4, 2e-3) + pause()


def client_in_lockstep(rng: Random, wire: Wire) -> None:
    """Requests, queries, a transfer: the next one as soon as the last is answered."""
    together(wire, _asking(rng, wire, opening(rng, wire), lambda: 0.0))


def client_that_thinks(rng: Random, wire: Wire) -> None:
    """People in front of a program, or a program that does something with each answer."""
    together(wire, _asking(rng, wire, opening(rng, wire), thought(rng)))


def clients_side_by_side(rng: Random, wire: Wire) -> None:
    """Several requests in flight: HTTP/2, a pool of threads on one connection, pipelines."""
    start = opening(rng, wire)
    pause = thought(rng)
    together(wire, *(_asking(rng, wire, start + 0.1 * rng.random(), pause) for _ in range(rng.randint(2, 6))))


def file_client(rng: Random, wire: Wire) -> None:
    """SFTP and the like: names, facts and blocks of a file, of a disk that takes its time now and then."""
    kinds = [(rng.randint(20, 90), rng.choice((17, 29, rng.randint(60, 130), 4_000, 32_000))) for _ in range(3)]
    takes, adjusts = work(rng, 0.0005, 0.8), rng.random() < 0.5

    def files(now: float) -> Part:
        while True:
            yield now
            asked, answer = rng.choice(kinds)
            now = wire.far(answer, wire.near(asked, now) + takes()) + rng.uniform(1e-4, 8e-3)
            if adjusts and rng.random() < 0.3:
                wire.near(9, now)

    together(wire, files(opening(rng, wire)))


def long_polls(rng: Random, wire: Wire) -> None:
    """A request stands open until there is an event; then it is answered, perhaps worked on, and stands again."""
    asked, event, reply = sizes(rng, 40, 400), sizes(rng, 30, 480), sizes(rng, 60, 450)
    comes, takes = log_normal(rng, rng.choice((0.5, 3.0, 10.0)), 0.9), work(rng, 2e-4, 1.0)
    empty_s, empty, replies = rng.choice((2.0, 25.0, 50.0)), rng.randint(20, 200), rng.choice((0, 0, 0.3, 1))

    def polls(now: float) -> Part:
        while True:
            yield now
            heard = wire.near(asked(), now)
            wait = comes()
            if wait > empty_s:
                now = wire.far(empty, heard + empty_s) + 0.001
                continue
            now = wire.far(event(), heard + wait) + 3e-4
            if rng.random() < replies:
                now = wire.far(rng.randint(30, 300), wire.near(reply(), now + takes()) + 0.002) + 3e-4

    together(wire, polls(opening(rng, wire)))


def work_queue(rng: Random, wire: Wire) -> None:
    """A worker takes a task, works, hands the result in, hears that it is taken, and waits again."""
    asked, task, result = sizes(rng, 10, 200), sizes(rng, 30, 480), sizes(rng, 20, 480)
    comes, takes = work(rng, 0.001, 3.0), work(rng, 2e-4, 3.0)
    confirm, joint = rng.choice((0, rng.randint(2, 60))), rng.random() < 0.4

    def tasks(now: float) -> Part:
        heard = wire.near(asked(), now)
        while True:
            yield now
            now = wire.far(task(), heard + comes()) + takes()
            heard = wire.near(result(), now)
            if confirm:
                now = wire.far(confirm, heard + rng.uniform(2e-4, 2e-3))
            if not joint:
                heard = wire.near(asked(), now + rng.uniform(1e-4, 2e-3))

    together(wire, tasks(opening(rng, wire)))


def callbacks(rng: Random, wire: Wire) -> None:
    """What this host asks for takes the server several questions back."""
    asked, answers, back, said = (sizes(rng, 20, 400) for _ in range(4))
    takes, pause, ready = work(rng), thought(rng), at_once(rng)

    def calls(now: float) -> Part:
        while True:
            yield now
            heard = wire.near(asked(), now)
            for _ in range(rng.choice((0, 1, 1, 2, 5))):
                heard = wire.near(said(), wire.far(back(), heard + takes()) + ready())
            now = wire.far(answers(), heard + takes()) + rng.uniform(1e-4, 2e-3) + pause()

    together(wire, calls(opening(rng, wire)))


def keys_typed_here(rng: Random, wire: Wire) -> None:
    """A terminal of a far machine in which somebody of this host types: SSH, telnet, a shell in a page."""
    gap, line, output = log_normal(rng, rng.uniform(0.1, 0.35), 0.6), log_normal(rng, 2.0, 1.0), sizes(rng, 5, 3000)
    runs, wrap = work(rng, 0.001, 2.0), rng.choice((0, 0, 30))

    def keys(now: float) -> Part:
        while True:
            for _ in range(rng.randint(2, 25)):
                yield now
                wire.far(1 + wrap, wire.near(1 + wrap, now) + rng.uniform(2e-4, 4e-3))
                now += gap()
            wire.far(output(), wire.near(1 + wrap, now) + runs())
            now += line()

    together(wire, keys(opening(rng, wire)))


# -- the far side says something of its own ---------------------------------------------------------------------------


def _beats(rng: Random, wire: Wire, start: float) -> Part:
    """A heartbeat of either side: by a timer, or by one that starts anew when something else was said."""
    period, size, answer = rng.choice((0.25, 1.0, 5.0, 15.0)), rng.randint(1, 60), rng.randint(1, 60)
    speak, reply = (wire.far, wire.near) if rng.random() < 0.6 else (wire.near, wire.far)
    anew, grows = rng.random() < 0.4, rng.random() < 0.3
    now = start
    for count in range(100_000):
        yield now
        digits = len(str(count)) if grows else 0
        reply(answer + digits, speak(size + digits, now) + rng.uniform(5e-5, 2e-3))
        now += period * rng.uniform(0.998, 1.003) + (period * rng.random() if anew and rng.random() < 0.3 else 0)


def heartbeats(rng: Random, wire: Wire) -> None:
    """Heartbeats, and now and then a request or an event beside them."""
    start = opening(rng, wire)
    parts = [_beats(rng, wire, start) for _ in range(rng.choice((1, 1, 2)))]
    if rng.random() < 0.6:
        parts.append(_asking(rng, wire, start, log_normal(rng, 5.0, 1.0)))
    if rng.random() < 0.4:
        parts.append(_pushed(rng, wire, start))
    together(wire, *parts)


def _pushed(rng: Random, wire: Wire, start: float) -> Part:
    event, comes = sizes(rng, 10, 1400), log_normal(rng, rng.choice((0.1, 0.5, 2.0, 8.0)), 1.0)
    often, size, counts = rng.choice((0, 0.1, 1, 1)), rng.randint(4, 80), rng.choice((0, 2))
    answers, answered, ready = sizes(rng, 30, 400), rng.choice((0, 0, 0.1, 0.3)), at_once(rng)
    now = start
    while True:
        yield now
        heard = wire.far(event(), now)
        if rng.random() < answered:
            wire.near(answers(), heard + ready())
        elif rng.random() < often:
            wire.near(size + rng.randint(0, counts), heard + ready())
        now += comes()


def pushes(rng: Random, wire: Wire) -> None:
    """A subscription: events, acknowledged all, some or never, now and then answered otherwise."""
    start = opening(rng, wire)
    wire.near(rng.randint(30, 300), start)
    parts = [_pushed(rng, wire, start + 0.3)]
    if rng.random() < 0.4:
        parts.append(_beats(rng, wire, start + 1))
    together(wire, *parts)


def chat_bot(rng: Random, wire: Wire) -> None:
    """What people write elsewhere, and a bot that answers some of it, at once or from a model."""
    human, reply, comes = log_normal(rng, 140, 0.4, 500), sizes(rng, 60, 480), log_normal(rng, rng.uniform(1, 8), 1.1)
    answered, takes, ack = rng.choice((0.2, 0.6, 1.0)), work(rng, 5e-4, 1.5), rng.choice((0, 0, 30))

    def room(now: float) -> Part:
        while True:
            yield now
            heard = wire.far(round(60 + human()), now)
            if ack:
                wire.near(ack, heard + 3e-4)
            if rng.random() < answered:
                wire.far(rng.randint(20, 90), wire.near(reply(), heard + takes()) + 0.003)
            now += comes()

    start = opening(rng, wire)
    together(wire, room(start), *([_beats(rng, wire, start)] if rng.random() < 0.6 else []))


def consumer(rng: Random, wire: Wire) -> None:
    """A broker delivers, this host works, acknowledges in one length, and publishes something now and then."""
    delivered, comes, takes = sizes(rng, 40, 900), work(rng, 0.005, 3.0), work(rng, 2e-4, 1.0)
    ack, result, publishes = rng.randint(10, 60), sizes(rng, 60, 480), rng.choice((0, 0.2, 1.0))

    def deliveries(now: float) -> Part:
        while True:
            yield now
            done = wire.far(delivered(), now) + takes()
            if rng.random() < publishes:
                wire.near(result(), done)
            wire.near(ack, done + 1e-4)
            now = max(now + comes(), done - wire.rtt_s)

    together(wire, deliveries(opening(rng, wire)))


def replica(rng: Random, wire: Wire) -> None:
    """A follower: the leader's heartbeats and entries, each acknowledged; it tells of itself by the clock."""
    beat, ack, entry = rng.randint(20, 60), rng.randint(15, 60), log_normal(rng, 120, 0.8, 1400)
    period, comes = rng.choice((0.1, 0.5, 1.0)), log_normal(rng, rng.choice((0.3, 2.0)), 1.0)

    def leads(size: Callable[[], float], after: Callable[[], float], now: float) -> Part:
        while True:
            yield now
            wire.near(ack, wire.far(size(), now) + rng.uniform(1e-4, 3e-3))
            now += after()

    start = opening(rng, wire)
    together(wire, leads(lambda: beat, lambda: period * rng.uniform(0.99, 1.02), start), leads(entry, comes, start))


def read_by_a_timer(rng: Random, wire: Wire) -> None:
    """A device or an agent whose values a far collector reads in turn, by the clock."""
    asked, answers = sizes(rng, 8, 120), sizes(rng, 8, 480)
    period, ready, each = rng.choice((0.5, 2.0, 10.0)), at_once(rng), rng.choice((1, 1, 3))
    jitter = rng.choice((0.002, 0.02, 0.1))

    def reads(now: float) -> Part:
        while True:
            yield now
            at = now
            for _ in range(each):
                at = wire.near(answers(), wire.far(asked(), at) + ready()) + 3e-4
            now += period * rng.uniform(1 - jitter, 1 + jitter)

    together(wire, reads(opening(rng, wire)))


def steps(rng: Random, wire: Wire) -> None:
    """A simulator, a game or a small window: a state and an action, some tens a second, either begins."""
    state, action, rate = rng.randint(20, 300), rng.randint(4, 60), rng.choice((10.0, 20.0, 50.0, 60.0))
    first, second = (wire.far, wire.near) if rng.random() < 0.5 else (wire.near, wire.far)

    def ticks(now: float) -> Part:
        while True:
            yield now
            second(action, first(state + rng.randint(0, 6), now) + rng.uniform(2e-4, 6e-3))
            now += rng.uniform(0.95, 1.05) / rate + (rng.uniform(0.1, 0.4) if rng.random() < 0.03 else 0)

    together(wire, ticks(opening(rng, wire)))


# -- the far side asks, and this host works ---------------------------------------------------------------------------


def _asked(rng: Random, wire: Wire, start: float, comes: Callable[[], float], least_s: float = 2e-4) -> Part:
    """Calls: of a few methods, each with arguments of its own size, work of its own length."""
    methods = [(sizes(rng, 30, 480), sizes(rng, 20, 480), work(rng, least_s, 1.0)) for _ in range(rng.randint(1, 5))]
    now = start
    while True:
        yield now
        call, result, takes = rng.choice(methods)
        answered = wire.near(result(), wire.far(call(), now) + takes())
        now = max(now, answered) + comes()


def tool_server(rng: Random, wire: Wire) -> None:
    """Tools of an agent that sits elsewhere: it thinks, calls one, reads what it says, thinks (JSON-RPC, WebSocket)."""
    start = opening(rng, wire)
    wire.near(rng.randint(60, 400), start)
    comes = log_normal(rng, rng.choice((0.3, 1.0, 3.0)), rng.uniform(0.3, 0.9))
    parts = [_asked(rng, wire, start + 1, comes)]
    if rng.random() < 0.5:
        parts.append(_beats(rng, wire, start))
    together(wire, *parts)


def service_called_back(rng: Random, wire: Wire) -> None:
    """Requests of many users by way of a hub to which this host dialled."""
    start = opening(rng, wire)
    comes = log_normal(rng, rng.choice((0.02, 0.2, 1.0)), 1.0)
    together(wire, *(_asked(rng, wire, start + rng.random(), comes) for _ in range(rng.choice((1, 1, 2, 4)))))


def registered_node(rng: Random, wire: Wire) -> None:
    """A device or node that called its server, which reads values of it now and then (CoAP, LwM2M, an agent's words).

    It tells of itself as well: by a timer, of changes, and its registration anew.
    """
    start = opening(rng, wire)
    wire.near(rng.randint(40, 160), start)
    asked, answers, ready = sizes(rng, 8, rng.choice((30, 60, 140))), sizes(rng, 8, 480), work(rng, 5e-4, 0.05)
    comes, tells = log_normal(rng, rng.choice((0.7, 2.0, 5.0)), rng.uniform(0.3, 0.9)), sizes(rng, 8, 400)

    def reads(now: float) -> Part:
        while True:
            yield now
            now = wire.near(answers(), wire.far(asked(), now) + ready()) + comes()

    def own(now: float, after: Callable[[], float], confirm: int) -> Part:
        while True:
            yield now
            heard = wire.near(tells(), now)
            if confirm:
                wire.far(confirm, heard + rng.uniform(2e-4, 2e-3))
            now += after()

    changes = log_normal(rng, rng.choice((4.0, 15.0)), 0.9)
    parts = [reads(start + 1), own(start + 5, changes, rng.choice((0, 4)))]
    if rng.random() < 0.5:
        parts.append(own(start + 20, lambda: 20 * rng.uniform(0.99, 1.02), rng.randint(4, 40)))
    together(wire, *parts)


def set_from_afar(rng: Random, wire: Wire) -> None:
    """A device that a person sets from afar: it confirms its new state in the words of the request, or in one or two.

    It may report of its own as well, and be asked by a timer whether it is there.
    """
    start = opening(rng, wire)
    wire.near(rng.randint(40, 200), start)
    sets, around, short = sizes(rng, 12, rng.choice((24, 60))), rng.randint(0, 40), rng.randint(4, 40)
    comes = log_normal(rng, rng.choice((0.7, 1.5, 3.0)), rng.uniform(0.4, 1.0))
    ready, repeats = log_normal(rng, rng.choice((1e-3, 4e-3, 1e-2)), rng.uniform(0.3, 0.9)), rng.random() < 0.6

    def person(now: float) -> Part:
        while True:
            yield now
            said = sets()
            wire.near(round(said) + around if repeats else rng.choice((short, short, short + 8)),
                      wire.far(round(said), now) + ready())
            now += comes()

    def reports(now: float, after: Callable[[], float]) -> Part:
        tells = sizes(rng, 12, 200)
        while True:
            yield now
            wire.near(tells(), now)
            now += after()

    parts = [person(start + 1)]
    if rng.random() < 0.3:
        parts.append(reports(start + 3, log_normal(rng, 8.0, 0.7)))
    if rng.random() < 0.4:
        parts.append(_beats(rng, wire, start))
    together(wire, *parts)


def asked_in_one_length(rng: Random, wire: Wire) -> None:
    """Reads or commands of one length, several in a row, then a pause; now and then an answer is longer (a block)."""
    asked, answer, ready = rng.randint(4, 90), rng.randint(4, 90), at_once(rng)
    comes = log_normal(rng, rng.choice((0.03, 0.08, 0.2, 0.6)), rng.uniform(0.2, 0.9))
    rests, pause = rng.choice((0, 0.05, 0.2)), log_normal(rng, 2.0, 0.8)
    often, longer = rng.choice((0, 0.03, 0.1, 0.3)), sizes(rng, 100, 1_400)
    head, framed = rng.randint(4, 16), rng.choice((False, False, True))

    def said(speak: Callable[[float, float], float], size: float, now: float) -> float:
        if framed:
            speak(head, now)
        return speak(size, now + 2e-5)

    def reads(now: float) -> Part:
        while True:
            yield now
            size = longer() if rng.random() < often else answer
            now = said(wire.near, size, said(wire.far, asked, now) + ready()) + 1e-4 + comes()
            if rng.random() < rests:
                now += pause()

    together(wire, reads(opening(rng, wire)))


def peers(rng: Random, wire: Wire) -> None:
    """Both ask, both answer."""
    start = opening(rng, wire)
    comes = log_normal(rng, rng.choice((0.1, 0.5, 2.0)), 1.0)
    together(wire, _asked(rng, wire, start, comes), _asking(rng, wire, start + rng.random(), comes, most=480))


def debugger_stub(rng: Random, wire: Wire) -> None:
    """Steps and reads of a debugger to which the stub has dialled: short, most of them alike, each confirmed."""
    kinds = [(rng.randint(5, 12), rng.randint(5, 30)) for _ in range(3)] + [(20, 300)]
    often = [8, 2, 1, 1]
    comes, plus, ready = log_normal(rng, 0.7, 0.8), rng.random() < 0.5, at_once(rng)

    def debugs(now: float) -> Part:
        while True:
            yield now
            asked, answer = rng.choices(kinds, often)[0]
            for _ in range(rng.choice((1, 1, 3))):
                heard = wire.far(asked, now) + ready()
                now = wire.near(answer, heard) + 2e-4
                if plus:
                    now = wire.far(1, now)
            now += comes()

    together(wire, debugs(opening(rng, wire)))


def ssh_server_asks(rng: Random, wire: Wire) -> None:
    """A session of SSH whose server asks for things: keepalives, a forwarded agent, X11; and windows grow."""
    kinds = [(rng.choice((40, 48, 25)), rng.choice((9, 17, 5))) for _ in range(rng.choice((1, 2, 3)))]
    comes, output = log_normal(rng, rng.choice((0.5, 2.0, 8.0)), rng.uniform(0.1, 1.0)), sizes(rng, 10, 3000)

    def asks(now: float) -> Part:
        while True:
            yield now
            asked, answer = rng.choice(kinds)
            wire.near(answer, wire.far(asked, now) + rng.uniform(1e-4, 0.03))
            now += comes()

    def runs(now: float) -> Part:
        while True:
            yield now
            wire.far(output(), now)
            if rng.random() < 0.2:
                wire.near(9, now + wire.rtt_s)
            now += comes()

    start = opening(rng, wire)
    parts = [asks(start)]
    if rng.random() < 0.6:
        parts.append(runs(start + rng.random()))
    if rng.random() < 0.4:
        parts.append(_asking(rng, wire, start, log_normal(rng, 3.0, 1.0)))
    together(wire, *parts)


def far_programs_ask(rng: Random, wire: Wire) -> None:
    """Programs on the far side that ask for their next item or whether somebody is there, and are answered."""
    start = opening(rng, wire)

    def asks(now: float) -> Part:
        asked, item = sizes(rng, 1, rng.choice((8, 40))), sizes(rng, 1, rng.choice((8, 60)))
        larger, more = rng.choice((0, 0, 0.03, 0.1, 0.3)), sizes(rng, 8, 400)
        comes = log_normal(rng, rng.choice((0.15, 0.3, 1.0, 3.0)), rng.uniform(0.3, 1.2))
        ready = log_normal(rng, rng.choice((3e-4, 1e-3, 5e-3)), rng.uniform(0.3, 1.2))
        while True:
            yield now
            heard = wire.far(asked(), now)
            wire.near(item() + more() * (rng.random() < larger), heard + ready())
            now += comes()

    together(wire, *(asks(start + rng.random()) for _ in range(rng.choice((1, 1, 1, 2, 3)))))


ANY = ("tcp", "tls")
#: Which carriers each may have.
ORDINARY = {
    client_in_lockstep: (*ANY, "udp"),
    client_that_thinks: (*ANY, "udp"),
    clients_side_by_side: (*ANY, "udp"),
    file_client: (*ANY, "ssh"),
    long_polls: ANY,
    work_queue: ANY,
    callbacks: (*ANY, "udp"),
    keys_typed_here: (*ANY, "ssh", "udp"),
    heartbeats: (*ANY, "ssh", "udp"),
    pushes: (*ANY, "udp"),
    chat_bot: ANY,
    consumer: ANY,
    replica: (*ANY, "udp"),
    read_by_a_timer: (*ANY, "udp"),
    steps: (*ANY, "ssh", "udp"),
    tool_server: (*ANY, "udp"),
    service_called_back: (*ANY, "udp"),
    registered_node: (*ANY, "udp"),
    set_from_afar: (*ANY, "udp"),
    peers: (*ANY, "udp"),
    debugger_stub: ANY,
    ssh_server_asks: ("ssh",),
    far_programs_ask: ("ssh",),
}
#: Those that times and lengths do not tell from typing; they are counted apart.
ALIKE = {asked_in_one_length: (*ANY, "udp")}
