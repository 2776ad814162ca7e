"""Channels that the far side opens in SSH inside TLS or a WebSocket: look-alikes first, then what is to be found."""

from __future__ import annotations

from itertools import pairwise
from random import Random

import pytest

from gpuguard.core.detectors import reverse_channels
from gpuguard.core.detectors.reverse_channels import Detector
from gpuguard.core.evidence import Evidence
from gpuguard.core.fusion import SUSPECT_NATS, confirm_nats
from gpuguard.core.host import Host
from gpuguard.core.observations import Exchange, FlowClosed, Speaker
from gpuguard.core.records import HostInfo
from gpuguard.core.subjects import FlowId

S = 1_000_000_000
START = 10**18
FLOW = FlowId(0, 6, "10.0.0.2", 40_000, "203.0.113.9", 443, START)
#: The far side's word, this host's answer, and what this host had said before, in bytes.
Turn = tuple[int, int, int]


def exchanges(turns: list[Turn], carrier: str = "tls", *, first: Speaker = "responder",
              flow: FlowId = FLOW) -> list[Exchange]:
    return [Exchange(
        time_ns=START + at * S, flow=flow, first=first, answer_delay_ns=300_000, question_bytes=question,
        answer_bytes=answer, initiator_first=0, responder_first=at + 1, answered=at + 1, rtt_ns=30_000_000,
        carrier=carrier, before_bytes=before,
    ) for at, (question, answer, before) in enumerate(turns)]


def told(some: list[Exchange], host: Host | None = None) -> list[Evidence]:
    detector = Detector()
    return [one for item in some for one in detector.receive(item, host or Host())]


def packet(payload: int, block: int = 8) -> int:
    """How long a packet of SSH is: length, padding's length, at least four bytes of padding, whole blocks, a tag."""
    return 4 + -(-(1 + payload + 4) // block) * block + 16


def visits(count: int, *, kind: str = "forwarded-tcpip", listens: str = "localhost", comes: str = "127.0.0.1",
           block: int = 8, near: int = 22, far: int = 22) -> list[Turn]:
    """Channels that the far side opens: RFC 4254, 5.1, 7.2 and 5.3."""
    addresses = 16 + len(listens) + len(comes) if kind == "forwarded-tcpip" else 8 + len(comes) if kind == "x11" else 0
    opened = packet(1 + 4 + len(kind) + 12 + addresses, block) + far
    confirmed, closed = packet(17, block) + near, packet(5, block) + near
    return [(opened, confirmed, closed if at else 0) for at in range(count)]


# -- look-alikes ------------------------------------------------------------------------------------------------------

LOOK_ALIKES = {
    "the agent of this host, used from afar": visits(40, kind="auth-agent@openssh.com"),
    "the display of this host, used from afar": visits(40, kind="x11"),
    "the same by the cipher with larger blocks": visits(40, kind="x11", block=16, listens=""),
    "keys, typed in SSH": [(36 + 22, 36 + 22, 36 + 22)] * 200,
    "keepalives": [(60 + 22, 36 + 22, 36 + 22)] * 60,
    "a service with three constant lengths": [(130, 66, 66)] * 60,
    "a service behind MQTT": [(131, 71, 71)] * 60,
    "one whose question alone is in blocks": [(114, 60, 58)] * 60,
    "a worker that reports itself free in the length of a CLOSE": [(200, 90, 58)] * 60,
    "a tunnel with three visitors": visits(3),
    "channels of which none was closed before": [(114, 66, 0)] * 20,
}


@pytest.mark.parametrize("name", LOOK_ALIKES)
@pytest.mark.parametrize("carrier", ["tls", "tcp"])
def test_look_alikes_say_nothing(name: str, carrier: str) -> None:
    assert told(exchanges(LOOK_ALIKES[name], carrier)) == []


def test_services_with_constant_lengths_are_hardly_ever_taken_for_it() -> None:
    rng = Random(14)
    drawn = [(rng.randint(24, 300), rng.randint(24, 160), rng.randint(24, 160)) for _ in range(40_000)]
    found = sum(bool(told(exchanges([one] * 6))) for one in drawn)
    assert found <= 4


def test_services_with_several_constant_lengths_are_seldom_taken_for_it() -> None:
    rng, found = Random(16), 0
    for _ in range(600):
        kinds = [(rng.randint(42, 322), rng.randint(28, 142)) for _ in range(rng.randint(2, 5))]
        talk = [rng.choice(kinds) for _ in range(200)]
        said = [(*one, before[1]) for before, one in pairwise(talk)]
        found += bool(told(exchanges(said)))
    assert found <= 6


def test_services_with_varied_lengths_are_not_taken_for_it() -> None:
    rng = Random(15)
    for _ in range(400):
        least, most = rng.choice([(24, 90), (60, 130), (40, 400)])
        draw = [(rng.randint(least, 2 * most), rng.randint(least, most), rng.randint(least, most)) for _ in range(300)]
        assert told(exchanges(draw)) == []


@pytest.mark.parametrize("carrier", ["ssh", "broker", "dns", "udp"])
def test_other_carriers_are_left_to_others(carrier: str) -> None:
    assert told(exchanges(visits(20), carrier)) == []


def test_what_this_side_begins_or_was_called_for_is_no_visit() -> None:
    assert told(exchanges(visits(20), first="initiator")) == []
    host = Host()
    host.receive(HostInfo(START, 1, "b", "h", 100, addresses=("203.0.113.9",)))
    assert told(exchanges(visits(20)), host) == []
    unseen = FlowId(0, 6, "10.0.0.2", 40_000, "203.0.113.9", 443, START, initiator_known=False)
    assert told(exchanges(visits(20), flow=unseen)) == []


# -- tunnels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [8, 16])
@pytest.mark.parametrize(("near", "far", "carrier"), [
    (22, 22, "tls"), (29, 29, "tls"), (21, 21, "tls"),
    (22 + 6, 22 + 2, "tls"), (22 + 6 + 6, 22 + 2 + 6, "tls"), (6, 2, "tcp"), (6 + 6, 2 + 6, "tcp"),
])
@pytest.mark.parametrize(("listens", "comes"), [("localhost", "127.0.0.1"), ("", "10.0.0.12"), ("0.0.0.0", "::1")])
def test_the_fourth_visitor(block: int, near: int, far: int, carrier: str, listens: str, comes: str) -> None:
    turns = visits(8, block=block, near=near, far=far, listens=listens, comes=comes)
    found = told(exchanges(turns, carrier))
    assert [one.label for one in found] == ["ssh-reverse-tunnel"]
    assert found[0].time_ns == START + 3 * S
    assert SUSPECT_NATS <= found[0].nats < confirm_nats(1.0)
    assert f"{turns[1][0]} bytes or so" in found[0].text
    assert f"had said {turns[1][2]}:" in found[0].text


def test_a_visitor_from_a_long_name_in_a_longer_frame() -> None:
    turns = visits(6, listens="gateway.example.com", comes="2001:db8:1234:5678:9abc:def0:1234:5678", near=28, far=26)
    assert turns[0][0] - 26 > 125
    assert len(told(exchanges(turns))) == 1


def test_visits_among_pings_and_adjustments() -> None:
    rng = Random(3)
    turns = [one for visit in visits(6) for one in (visit, *[(28, 32, visit[2]), (94, 58, 13_132)] * rng.randint(0, 3))]
    assert len(told(exchanges(turns))) == 1


def test_a_closed_flow_is_forgotten() -> None:
    detector, host = Detector(), Host()
    for item in exchanges(visits(3)):
        assert detector.receive(item, host) == []
    detector.receive(FlowClosed(START, FLOW, "closed", 9, 9, 9, 0, 3, 3, "tls", START), host)
    assert [one for item in exchanges(visits(3)) for one in detector.receive(item, host)] == []
    assert reverse_channels.FLOWS_MAX >= 1_024
