"""Conversations behind TLS as (seconds, side, bytes of one record's contents), side 0 having dialled: pools and others.

Lines are written out as the programs would, so that lengths vary as their contents do. Times are drawn; a round trip
is 30 to 60 ms. Each takes a seeded random.Random and goes on for as long as it is asked to.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Iterator

Said = tuple[float, int, int]
Dice = random.Random

RTT_S = 0.04


def line(value: object) -> int:
    return len(json.dumps(value, separators=(",", ":"))) + 1


def digits(dice: Dice, count: int) -> str:
    return f"{dice.getrandbits(4 * count):0{count}x}"


def merged(until_s: float, *sources: Iterator[Said]) -> list[Said]:
    parts = [list(itertools.takewhile(lambda said: said[0] < until_s, source)) for source in sources]
    return sorted(itertools.chain.from_iterable(parts))


def by_chance(dice: Dice, mean_s: float, start_s: float = 0.0) -> Iterator[float]:
    now = start_s
    while True:
        now += dice.expovariate(1 / mean_s)
        yield now


def by_timer(dice: Dice, period_s: float, jitter: float = 0.01, start_s: float = 0.0) -> Iterator[float]:
    now = start_s
    while True:
        now += period_s * (1 + dice.uniform(-jitter, jitter))
        yield now


def answered(dice: Dice, times: Iterator[float], ask: Callable[[int], int], answer: Callable[[int], int], *,
             first: int = 0) -> Iterator[Said]:
    """Messages of one side and their answers."""
    for count, now in enumerate(times):
        yield now, first, ask(count)
        yield now + RTT_S * dice.uniform(0.8, 1.6), 1 - first, answer(count)


def pushed(times: Iterator[float], push: Callable[[int], int], side: int = 1) -> Iterator[Said]:
    for count, now in enumerate(times):
        yield now, side, push(count)


# -- pools ------------------------------------------------------------------------------------------------------------


def stratum_v1(dice: Dice, until_s: float, share_s: float, job_s: float) -> list[Said]:
    """mining.notify as for Bitcoin and its kin: the branch of the tree is as deep as the block has transactions."""
    def notify(_: int) -> int:
        branch = [digits(dice, 64) for _ in range(dice.choice((10, 11, 11, 11, 11, 12)))]
        return line({"id": None, "method": "mining.notify", "params": [
            digits(dice, 8), digits(dice, 64), digits(dice, 120), digits(dice, 220), branch, "20000000", "17034219",
            digits(dice, 8), dice.random() < 0.1]})

    def submit(count: int) -> int:
        return line({"params": ["wallet.rig0", digits(dice, 8), digits(dice, 16), digits(dice, 8), digits(dice, 8)],
                     "id": 4 + count, "method": "mining.submit"})

    login = [(0.1, 0, line({"id": 1, "method": "mining.subscribe", "params": ["miner/1.2"]})), (0.15, 1, 180),
             (0.2, 0, line({"id": 2, "method": "mining.authorize", "params": ["wallet.rig0", "x"]})), (0.25, 1, 38),
             (0.26, 1, 70), (0.27, 1, notify(0))]
    return login + merged(
        until_s, pushed(by_timer(dice, job_s, 0.3, 1), notify),
        answered(dice, by_chance(dice, share_s, 1), submit,
                 lambda count: line({"id": 4 + count, "result": dice.random() > 0.01, "error": None})))


def cryptonote(dice: Dice, until_s: float, share_s: float, job_s: float) -> list[Said]:
    """login, then jobs as blocks are found, and shares with a nonce and a hash."""
    def job(_: int) -> int:
        return line({"jsonrpc": "2.0", "method": "job", "params": {
            "blob": digits(dice, dice.choice((152, 152, 152, 154))), "job_id": digits(dice, 30),
            "target": digits(dice, 8), "height": 3_100_000, "seed_hash": digits(dice, 64), "algo": "rx/0"}})

    def submit(count: int) -> int:
        return line({"id": 2 + count, "jsonrpc": "2.0", "method": "submit", "params": {
            "id": digits(dice, 16), "job_id": digits(dice, 30), "nonce": digits(dice, 8), "result": digits(dice, 64)}})

    login = [(0.1, 0, 230), (0.15, 1, 520)]
    return login + merged(
        until_s, pushed(by_chance(dice, job_s, 1), job),
        answered(dice, by_chance(dice, share_s, 1), submit, lambda count: line(
            {"id": 2 + count, "jsonrpc": "2.0", "error": None, "result": {"status": "OK"}})))


def ethash(dice: Dice, until_s: float, share_s: float, job_s: float) -> list[Said]:
    """EthereumStratum/1.0.0 (NiceHash): short jobs, a job every few seconds."""
    def submit(count: int) -> int:
        return line({"id": 10 + count, "method": "mining.submit",
                     "params": ["wallet", digits(dice, 8), digits(dice, 12)]})

    login = [(0.1, 0, 90), (0.15, 1, 130), (0.2, 0, 80), (0.25, 1, 40)]
    return login + merged(
        until_s, pushed(by_chance(dice, job_s, 1), lambda _: line({"id": None, "method": "mining.notify", "params": [
            digits(dice, 8), digits(dice, 64), digits(dice, 64), dice.random() < 0.1]})),
        answered(dice, by_chance(dice, share_s, 1), submit,
                 lambda count: line({"id": 10 + count, "result": True, "error": None})))


def ethproxy(dice: Dice, until_s: float, share_s: float, job_s: float) -> list[Said]:
    """Ethash as by ethminer: shares, jobs, and the hash rate every 20 seconds, acknowledged like a share."""
    def accepted(count: int) -> int:
        return line({"id": 3, "jsonrpc": "2.0", "result": True})

    def submit(_: int) -> int:
        return line({"id": 4, "method": "eth_submitWork", "params": [
            "0x" + digits(dice, 16), "0x" + digits(dice, 64), "0x" + digits(dice, 64)], "worker": "rig0"})

    def rate(_: int) -> int:
        return line({"id": 6, "jsonrpc": "2.0", "method": "eth_submitHashrate",
                     "params": ["0x" + digits(dice, 64), "0x" + digits(dice, 64)]})

    login = [(0.1, 0, 120), (0.15, 1, 40), (0.2, 0, 60), (0.25, 1, 250)]
    return login + merged(
        until_s, pushed(by_chance(dice, job_s, 1), lambda _: line({"id": 0, "jsonrpc": "2.0", "result": [
            "0x" + digits(dice, 64), "0x" + digits(dice, 64), "0x" + digits(dice, 64)]})),
        answered(dice, by_chance(dice, share_s, 1), submit, accepted),
        answered(dice, by_timer(dice, 20, 0.02, 1), rate, accepted))


POOLS = {"stratum v1": stratum_v1, "cryptonote": cryptonote, "ethash": ethash, "ethproxy": ethproxy}


# -- others -----------------------------------------------------------------------------------------------------------


def words(dice: Dice) -> int:
    return max(8, round(dice.lognormvariate(4, 0.9)))


def chat(dice: Dice) -> list[Said]:
    return merged(4000, pushed(by_chance(dice, 20), lambda _: 90 + words(dice)),
                  answered(dice, by_chance(dice, 35), lambda _: 120 + words(dice), lambda _: 60))


def market_data(dice: Dice) -> list[Said]:
    return merged(900, pushed(by_chance(dice, 3), lambda _: 180 + dice.randrange(12)),
                  answered(dice, by_timer(dice, 20), lambda _: 6, lambda _: 6))


def orders_and_ticks(dice: Dice) -> list[Said]:
    """A trading robot: ticks of one length, orders by chance with a price and an id, each confirmed at length."""
    return merged(2000, pushed(by_chance(dice, 6), lambda _: 180 + dice.randrange(12)),
                  answered(dice, by_chance(dice, 15), lambda _: 150 + dice.randrange(8),
                           lambda _: 260 + dice.randrange(20)))


def mqtt_telemetry(dice: Dice) -> list[Said]:
    return merged(4000, answered(dice, by_timer(dice, 10, 0.05), lambda _: 130 + dice.randrange(4), lambda _: 4),
                  pushed(by_chance(dice, 60), lambda _: 60))


def mqtt_commands(dice: Dice) -> list[Said]:
    """Commands to a device at any time, acknowledged by it, and telemetry on a timer."""
    return merged(4000, answered(dice, by_chance(dice, 30), lambda _: 90, lambda _: 4, first=1),
                  answered(dice, by_timer(dice, 15), lambda _: 120, lambda _: 4))


def grpc_stream(dice: Dice) -> list[Said]:
    """A server's stream of updates; every few of them are credited by a WINDOW_UPDATE and timed by a PING."""
    return merged(3000, answered(dice, by_chance(dice, 8), lambda _: 200 + words(dice), lambda _: 30, first=1),
                  answered(dice, by_timer(dice, 30), lambda _: 17, lambda _: 17))


def jupyter(dice: Dice) -> list[Said]:
    """A cell is run: status busy, input echoed, outputs, status idle."""
    said: list[Said] = []
    for now in itertools.takewhile(lambda now: now < 4000, by_chance(dice, 40)):
        said += [(now, 0, 400 + words(dice)), (now + 0.04, 1, 380), (now + 0.05, 1, 420 + words(dice))]
        said += [(now + 0.1 + dice.random() * 5, 1, 350 + words(dice)) for _ in range(dice.randrange(3))]
        said += [(now + 6, 1, 380)]
    return sorted(said)


def long_poll(dice: Dice) -> list[Said]:
    said: list[Said] = []
    now = 0.0
    while now < 4000:
        said.append((now, 0, 310))
        now += min(30.0, dice.expovariate(1 / 20))
        said.append((now, 1, 260 + words(dice) if dice.random() < 0.6 else 140))
        now += RTT_S
    return said


def watch(dice: Dice) -> list[Said]:
    """etcd or the Kubernetes API: changes of objects, progress notices, a ping now and then."""
    return merged(4000, pushed(by_chance(dice, 12), lambda _: 700 + 9 * words(dice)),
                  pushed(by_timer(dice, 60), lambda _: 45),
                  answered(dice, by_timer(dice, 30), lambda _: 17, lambda _: 17))


def leases(dice: Dice) -> list[Said]:
    """A lease is renewed on a timer, and a watch of others' leases runs on the same connection."""
    return merged(3000, answered(dice, by_timer(dice, 10, 0.04), lambda _: 300, lambda _: 250),
                  pushed(by_timer(dice, 10, 0.04, 3), lambda _: 700 + dice.randrange(20)))


def work_queue(dice: Dice) -> list[Said]:
    """A task is pushed, its result returned and acknowledged, the next one pushed."""
    said: list[Said] = []
    now = 0.0
    while now < 4000:
        said.append((now, 1, 400 + dice.randrange(30)))
        now += dice.expovariate(1 / 15)
        said += [(now, 0, 150 + dice.randrange(5)), (now + RTT_S, 1, 40)]
        now += 0.2
    return said


def logs(dice: Dice) -> list[Said]:
    return merged(3000, answered(dice, by_chance(dice, 9), lambda _: 300 + 2 * words(dice), lambda _: 60),
                  answered(dice, by_timer(dice, 30), lambda _: 17, lambda _: 17))


def terminal(dice: Dice) -> list[Said]:
    """Somebody types in a terminal on a web page: keys echoed, output of what was run."""
    said: list[Said] = []
    now = 0.0
    while now < 900:
        now += min(60.0, dice.lognormvariate(0, 1.2))
        said += [(now, 0, 7), (now + RTT_S, 1, 3)]
        if dice.random() < 0.15:
            said.append((now + 2 * RTT_S, 1, 30 + 10 * words(dice)))
    return said


def games(dice: Dice) -> list[Said]:
    return merged(900, pushed(by_timer(dice, 1), lambda _: 220 + dice.randrange(30)),
                  pushed(by_chance(dice, 4), lambda _: 48, side=0))


def dashboard(dice: Dice) -> list[Said]:
    """A page of panels on a WebSocket: series pushed by a timer, clicks of a person that ask for another one."""
    return merged(2000, pushed(by_timer(dice, 5, 0.05), lambda _: 420 + dice.randrange(60)),
                  answered(dice, by_chance(dice, 12), lambda _: 90 + dice.randrange(30),
                           lambda _: 300 + 4 * words(dice)),
                  answered(dice, by_timer(dice, 25), lambda _: 6, lambda _: 6))


def push_notices(dice: Dice) -> list[Said]:
    """Notifications at any time, each acknowledged by this host with its number; a heartbeat."""
    return merged(4000, answered(dice, by_chance(dice, 25), lambda _: 180 + words(dice), lambda _: 28, first=1),
                  answered(dice, by_timer(dice, 60), lambda _: 12, lambda _: 12))


def watch_and_lease(dice: Dice) -> list[Said]:
    """A controller on one HTTP/2 connection: events of objects, its lease renewed, statuses written as they change."""
    return merged(3000, pushed(by_chance(dice, 9), lambda _: 800 + 3 * words(dice)),
                  answered(dice, by_timer(dice, 10, 0.04), lambda _: 330, lambda _: 290),
                  answered(dice, by_chance(dice, 20), lambda _: 500 + words(dice), lambda _: 600 + words(dice)),
                  answered(dice, by_timer(dice, 30), lambda _: 17, lambda _: 17, first=1))


def etcd_keys(dice: Dice) -> list[Said]:
    """A client of etcd that puts keys as work comes and watches those of others: lengths vary with the keys."""
    return merged(3000, answered(dice, by_chance(dice, 8), lambda _: 60 + dice.randrange(40), lambda _: 48),
                  pushed(by_chance(dice, 14), lambda _: 90 + dice.randrange(60)),
                  answered(dice, by_timer(dice, 20, 0.02), lambda _: 25, lambda _: 33))


def remote_write(dice: Dice) -> list[Said]:
    """Prometheus' remote write: batches of nearly one length by the clock, 204 each time."""
    return merged(3000, answered(dice, by_timer(dice, 15, 0.03), lambda _: 1500 + dice.randrange(200), lambda _: 70))


def run_log(dice: Dice) -> list[Said]:
    """An experiment's tracker: steps of uneven length in time and bytes, each confirmed alike; a stop asked for."""
    return merged(3000, answered(dice, by_chance(dice, 11), lambda _: 380 + dice.randrange(60), lambda _: 120),
                  answered(dice, by_timer(dice, 30), lambda _: 210, lambda _: 160))


def confirms_and_deliveries(dice: Dice) -> list[Said]:
    """AMQP: messages published with confirms, others delivered and acknowledged, on one connection."""
    return merged(3000, answered(dice, by_chance(dice, 15), lambda _: 150 + words(dice), lambda _: 21),
                  answered(dice, by_chance(dice, 18), lambda _: 170 + words(dice), lambda _: 21, first=1),
                  answered(dice, by_timer(dice, 30), lambda _: 8, lambda _: 8))


def presence(dice: Dice) -> list[Said]:
    """A chat: whoever types is told of every few seconds and acknowledged, then comes the message; so do others."""
    def typing(mean_s: float) -> Iterator[tuple[float, int]]:
        for start in by_chance(dice, mean_s):
            times = [start + 4.0 * count for count in range(dice.randrange(1, 4))]
            yield from ((now, 140) for now in times)
            if dice.random() < 0.9:
                yield times[-1] + 3 * dice.random(), 120 + words(dice)

    def own() -> Iterator[Said]:
        for now, size in typing(25):
            yield now, 0, size
            yield now + RTT_S, 1, 60

    return merged(3000, own(), ((now, 1, size + 40) for now, size in typing(30)))


def fleet(dice: Dice) -> list[Said]:
    """An agent of a fleet: its state by the clock, jobs now and then, and what came of each."""
    said: list[Said] = []
    for now in itertools.takewhile(lambda now: now < 4000, by_chance(dice, 40)):
        said += [(now, 1, 350 + words(dice)), (now + 0.02, 0, 60), (now + dice.expovariate(0.1), 0, 200 + words(dice))]
    return sorted(said + merged(4000, answered(dice, by_timer(dice, 10), lambda _: 180, lambda _: 40)))


def events(dice: Dice, answer: int, sizes: tuple[int, int], pushes: tuple[int, int]) -> list[Said]:
    """Events of one length at nobody's timer, each acknowledged, and pushes of one length that nobody asked for."""
    event, push = dice.randrange(*sizes), dice.randrange(*pushes)
    return merged(900, answered(dice, by_chance(dice, dice.choice((4, 8, 15))), lambda _: event, lambda _: answer),
                  pushed(by_chance(dice, dice.choice((3, 8, 12))), lambda _: push))


def mqtt_events(dice: Dice) -> list[Said]:
    """A sensor that publishes what happens with QoS 1 (PUBACK: 4 bytes, in MQTT 5.0 up to 6) and hears of settings."""
    return events(dice, dice.choice((4, 5, 6)), (60, 400), (40, 400))


def orders_of_one_length(dice: Dice) -> list[Said]:
    """Orders with fixed fields, each confirmed, among ticks, which say less."""
    return events(dice, 64, (140, 280), (60, 130))


def results_and_notices(dice: Dice) -> list[Said]:
    """Results with hashes and figures, {"id":10,"result":true} for each, and names of further work."""
    return events(dice, 24, (140, 280), (80, 180))


def tasks_at_once(dice: Dice) -> list[Said]:
    """A work queue with several tasks out: each result is acknowledged, and the next task pushed behind that."""
    said: list[Said] = []
    task, result, mean_s = dice.randrange(120, 450), dice.randrange(80, 300), dice.choice((10, 20, 40))
    for _ in range(dice.choice((2, 4))):
        now = 1.0
        while now < 900:
            done = now + 0.2 + dice.expovariate(1 / mean_s)
            told = done + RTT_S * dice.uniform(0.8, 1.6)
            said += [(now, 1, task), (done, 0, result), (told, 1, 38)]
            now = told + dice.uniform(0.0005, 0.1)
    return sorted(said)


OTHERS = {
    function.__name__: function
    for function in (chat, market_data, orders_and_ticks, mqtt_telemetry, mqtt_commands, grpc_stream, jupyter,
                     long_poll, watch, leases, work_queue, logs, terminal, games, dashboard, push_notices,
                     watch_and_lease, etcd_keys, remote_write, run_log, confirms_and_deliveries, fleet, mqtt_events,
                     orders_of_one_length, results_and_notices, tasks_at_once)
}


def known_look_alike(dice: Dice) -> list[Said]:
    """Events of one length, each acknowledged at a pool's length, and longer news of one length: see `stratum`."""
    return events(dice, 38, (100, 160), (180, 300))
