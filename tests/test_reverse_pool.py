"""Connections that this host keeps ready in TLS for visitors from the far side: look-alikes first, then tunnels."""

from __future__ import annotations

import sys
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuguard._packets import Parser
from gpuguard.core.detectors.reverse_pool import Detector
from gpuguard.core.evidence import Evidence
from gpuguard.core.facts import observations_of
from gpuguard.core.flows import FlowTable
from gpuguard.core.fusion import SUSPECT_NATS, confirm_nats
from gpuguard.core.host import Host
from gpuguard.core.records import HostInfo, Packets, Spoken

sys.path.insert(0, str(Path(__file__).parent))
import reference_packets as reference
from conversation import frame
from test_packets import client_hello, tls_record
from test_packets_protocols import SERVER_HELLO, application

MS = 1_000_000
START = 10**18
NEAR, FAR = bytes((10, 0, 0, 2)), bytes((203, 0, 113, 9))
HERE, THERE = 0, 1
#: Milliseconds since what was said before, who says it, and what; None is its SYN.
Said = tuple[int, int, bytes | None]
FINISHED, ALERT = 53, 19
HELLO = tls_record(client_hello("tunnel.example"))


def records(*sizes: int) -> bytes:
    return b"".join(application(size) for size in sizes)


def handshake(*, finished: int = FINISHED, tickets: int = 2) -> list[Said]:
    return [(0, HERE, None), (5, THERE, None), (5, HERE, HELLO), (6, THERE, SERVER_HELLO + records(30, 600, 100, 53)),
            (1, HERE, records(finished)), (6, THERE, records(*[250] * tickets))]


def frames(said: list[Said], *, port: int = 40_000, begin_ms: int = 0) -> list[tuple[int, bytes]]:
    """When each packet comes, and the packet."""
    ends, sent, now_ms, packets = ((NEAR, port), (FAR, 443)), [7, 2**32 - 900], begin_ms, []
    for after_ms, side, data in said:
        now_ms += after_ms
        packets.append((START + now_ms * MS, frame(ends, sent, side, data)))
    return packets


def read(packets: list[tuple[int, bytes]]) -> Packets:
    """The parser's block, whose facts are the reference's; in whatever order are those of one packet."""
    parser = Parser(rows_max=len(packets) + 1)
    for time_ns, data in packets:
        parser.frame(101, data, time_ns)
    rows, facts = parser.take()
    _, expected = reference.read_frames([(101, data, len(data)) for _, data in packets], [at for at, _ in packets])
    assert sorted(facts, key=repr) == sorted(expected, key=repr)
    return Packets(START, 0, rows, facts)


def sizes(said: list[Said]) -> list[int]:
    """How long the first answers were to far sides that spoke first."""
    block = read(frames(said))
    return [one.size for one in block.facts if isinstance(one, Spoken) and one.what == "tls-answered-first"]


# -- one connection ---------------------------------------------------------------------------------------------------

ASKS, ANSWERS = (3000, THERE, records(90)), (4, HERE, records(2000))
LOOK_ALIKES: dict[str, list[Said]] = {
    "a client that asks": [*handshake(), (1, HERE, records(200)), (20, THERE, records(900))],
    "a client that asks late, on a connection kept ready": [*handshake(), (9000, HERE, records(200))],
    "a poll that is answered late": [*handshake(), (1, HERE, records(200)), ASKS, ANSWERS],
    "a server that greets": [*handshake(), (0, THERE, records(60)), (1, HERE, records(40)), ASKS, ANSWERS],
    "one that takes half a second": [*handshake(), (500, THERE, records(60)), (1, HERE, records(40))],
    "a greeting, and a person's word": [*handshake(), ASKS, (2000, HERE, records(40))],
    "late tickets": [*handshake(tickets=0), (800, THERE, records(250)), (1, HERE, records(200))],
    "a client that shows its certificate": [*handshake()[:4], (1, HERE, records(900, 300, FINISHED)), ASKS, ANSWERS],
    "TLS 1.2": [*handshake()[:3], (6, THERE, SERVER_HELLO), (9, THERE, records(60)), ASKS, (3, HERE, records(40))],
    "TLS 1.2, where a first question is as long as a Finished": [
        *handshake()[:3], (6, THERE, SERVER_HELLO), (1, HERE, records(FINISHED)), (20, THERE, records(90)), ASKS,
        ANSWERS],
    "nobody comes": handshake(),
}


@pytest.mark.parametrize("name", LOOK_ALIKES)
def test_look_alikes_did_not_answer_first(name: str) -> None:
    assert sizes(LOOK_ALIKES[name]) == []


@pytest.mark.parametrize("finished", [53, 69])
@pytest.mark.parametrize("asks", [(90,), (90, 400), (90, 400, 19)])
def test_the_far_side_spoke_first(finished: int, asks: tuple[int, ...]) -> None:
    assert sizes([*handshake(finished=finished), (1000, THERE, records(*asks)), (4, HERE, records(700, 80))]) == [700]


# -- many -------------------------------------------------------------------------------------------------------------


def judged(waits_ms: list[int], answers: list[int], *, host: Host | None = None,
           apart_ms: int = 30_000) -> list[Evidence]:
    """What is told of connections that were dialled one after the other and answered after these times."""
    packets: list[tuple[int, bytes]] = []
    for at, (wait_ms, size) in enumerate(zip(waits_ms, answers, strict=True)):
        said = [*handshake(), (wait_ms, THERE, records(90)), (4, HERE, records(size))]
        packets += frames(said, port=40_000 + at, begin_ms=at * apart_ms)
    packets.sort(key=lambda one: one[0])
    block = read(packets)
    host, detector, found = host or Host(), Detector(), []
    for item in observations_of(FlowTable(), block):
        if type(item) in detector.takes:
            found += detector.receive(item, host)
    return found


def test_servers_that_make_their_callers_wait_are_none() -> None:
    rng = Random(5)
    timer, slow = [6000 + rng.randint(0, 20) for _ in range(12)], [rng.randint(1000, 9000) for _ in range(12)]
    mails, names = [45] * 12, [rng.choice((40, 40, 41, 43)) for _ in range(12)]
    pages = [rng.randint(200, 9000) for _ in range(12)]
    assert judged(slow, mails) == []
    assert judged(slow, names) == []
    assert judged(slow, [ALERT] * 12) == []
    assert judged(slow, [rng.choice((ALERT, 34)) for _ in range(12)]) == []
    assert judged(timer, pages) == []


def test_the_fifth_visitor_is_suspect_and_none_confirms() -> None:
    rng = Random(6)
    waits, pages = [rng.randint(1500, 9000) for _ in range(22)], [rng.randint(200, 9000) for _ in range(22)]
    assert judged(waits[:4], pages[:4]) == []
    found = judged(waits, pages)
    assert [one.label for one in found] == ["reverse-proxy"] * 3
    assert [one.subject.initiator_port for one in found] == [40_004, 40_009, 40_019]
    assert SUSPECT_NATS <= found[0].nats < confirm_nats(1.0)


def test_visitors_who_come_seldom_are_not_counted_together() -> None:
    assert judged([2000, 3000, 4500, 7000, 9000, 1500], [300, 500, 700, 900, 1100, 4000], apart_ms=1_000_000) == []


def test_what_others_dial_to_this_host_is_not_its_doing() -> None:
    host = Host()
    host.receive(HostInfo(START, 1, "b", "h", 100, addresses=("203.0.113.9",)))
    assert judged([2000, 3000, 4500, 7000, 9000, 1500], [300, 500, 700, 900, 1100, 4000], host=host) == []


# -- parity -----------------------------------------------------------------------------------------------------------

PIECES = st.sampled_from([
    HELLO, SERVER_HELLO, records(53), records(69), records(90), records(53, 90), records(53, 53, 53),
    records(5000, 5000), records(90)[:4], records(90)[4:], b"\x14\3\3\0\1\1", b"\x15\3\3\0\2\1\0",
    b"\x16\3\3\0\x10" + bytes(16), b"x",
])


@given(st.lists(st.tuples(st.sampled_from([0, 1, 39, 40, 41, 999, 1000, 1001, 1041, 5000]),
                          st.sampled_from([HERE, THERE]), PIECES), max_size=10), st.integers(2, 6))
@settings(max_examples=500, deadline=None)
def test_who_spoke_first_is_the_references(said: list[Said], shaken: int) -> None:
    read(frames([*handshake()[:shaken], *said]))
