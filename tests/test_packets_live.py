"""The live ring on loopback, in a network namespace of its own: what is seen, what is lost, and what is handed over."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gpuguard.config import Config, PacketSettings
from gpuguard.core.records import Packets
from gpuguard.messages import Done, Refused
from gpuguard.sensors import EyeClosed
from gpuguard.sensors.packets import PacketSensor, open_sensor

HERE = Path(__file__).parent


def scene(name: str) -> dict:
    if os.geteuid() != 0:
        pytest.skip("needs root for AF_PACKET and a network namespace")
    done = subprocess.run([sys.executable, HERE / "live_packets.py", name], cwd=HERE.parent, capture_output=True,
                          text=True, timeout=600, check=False, env={**os.environ, "PYTHONPATH": str(HERE.parent)})
    if done.returncode == 77:
        pytest.skip(f"this host allows no network namespace: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.privileged
@pytest.mark.parametrize("name", ["conversation", "snapped"])
def test_a_conversation_on_loopback_is_seen_once(name: str) -> None:
    seen = scene(name)
    assert seen["syns"] == 1
    assert seen["payload_bytes"] == 1_000_000
    assert seen["packet_types"] == [0]
    assert seen["protocols"] == [6]
    assert seen["banners"] == ["SSH-2.0-lab"]
    assert seen["frame_less_payload"] == [66]  # Ethernet 14, IPv4 20, TCP 20 with 12 of timestamps, as in a file
    assert seen["netns"]
    assert seen["times"]
    assert seen["in_order"]
    assert seen["gaps"] == []


@pytest.mark.privileged
def test_what_the_ring_could_not_hold_is_counted_exactly() -> None:
    seen = scene("flood")
    assert seen["rows"] > 500
    assert seen["lost"] > 500
    assert seen["rows"] + seen["lost"] == seen["sent"]


@pytest.mark.privileged
def test_the_guard_keeps_no_descriptor_that_can_send() -> None:
    seen = scene("powers")
    assert seen["control"] == "sent"  # the socket that was handed over could
    # Left: the sensor's own epoll, the broker's epoll, the reading end of the pipe.
    kinds = [link.partition(":")[0] for link in seen["links"]]
    assert kinds == ["anon_inode", "anon_inode", "pipe"]
    assert set(seen["sendto"]) == {"ENOTSOCK"}
    assert set(seen["write"]) == {"EINVAL", "EBADF"}
    assert seen["rows"] >= 10


@pytest.mark.privileged
def test_each_side_notices_that_the_other_has_gone() -> None:
    seen = scene("endings")
    assert seen["watching"] == 3
    assert seen["left"] == 1
    assert seen["leaked"] == 0
    assert seen["gone"] == ["the broker has gone: drops of lo are no longer counted"]
    assert seen["rows_after"] >= 10


@pytest.mark.privileged
def test_what_may_not_be_is_refused_with_a_reason() -> None:
    seen = scene("refusals")
    assert seen["descriptors"] == [0] * 10
    none, snap, ring, long, zero, rule, rules, nine, much, unprivileged = seen["reasons"]
    assert none.startswith("packets: interface none0: ")
    assert snap == ring
    assert "snap_bytes must be 96 to 65535" in snap
    assert long == zero == "packets: an interface name has at most 15 bytes"
    assert rule == "packets: 'tcp' is too much to be blind to; name a net or a port as well"
    assert rules == "packets: 33 rules; at most 32"
    assert nine == "packets: rings must be 1 to 8"
    assert much.startswith("packets: the rings of all interfaces would have more than 32 MiB; ")
    assert unprivileged == "packets: all interfaces: Operation not permitted; it needs CAP_NET_RAW"


@pytest.mark.privileged
def test_ignored_traffic_does_not_reach_the_guard_and_is_told_of_once() -> None:
    seen = scene("ignored")
    assert sorted(seen["none"]["ports"]) == [2000, 2001, 2002, 2003, 2004]
    assert seen["none"]["gaps"] == []
    assert seen["some"]["ports"] == [2004]
    assert seen["some"]["gaps"] == [
        "not looked at and not counted, by packets.ignore: net 10.9.9.0/24 udp port 2000-2003; port 1-9"]


@pytest.mark.privileged
def test_several_rings_share_the_packets_by_flows() -> None:
    seen = scene("shared")
    assert seen["rings"] == [0, 1, 2]  # none of 40 flows in one of them: once in three million times
    assert seen["split"] == 0
    assert seen["syns"] == seen["answers"] == 40
    assert seen["watching"] == 4
    assert seen["gaps"] == []


class Full:
    """A ring that always has more."""

    def __init__(self) -> None:
        self.ready = os.eventfd(0)
        self.asked = 0

    def read(self, _now_ns: int, blocks_max: int) -> list[Packets]:
        self.asked = blocks_max
        return []

    def close(self) -> None:
        os.close(self.ready)


@pytest.mark.parametrize(("rings", "blocks"), [(1, 8), (3, 2), (40, 1)])
def test_rings_share_what_one_read_takes_however_many_there_are(rings: int, blocks: int) -> None:
    sources = [Full() for _ in range(rings)]
    sensor = PacketSensor(sources)  # type: ignore[arg-type]
    sensor.read(0)
    assert {one.asked for one in sources} == {blocks}
    sensor.close()


class Saying:
    """A broker that gives one answer."""

    def __init__(self, answer: object, descriptors: tuple[int, ...] = ()) -> None:
        self.answer, self.descriptors = answer, descriptors

    def ask(self, request: object) -> tuple:
        return self.answer, self.descriptors


def test_a_refusal_closes_the_eye_and_every_descriptor() -> None:
    with pytest.raises(EyeClosed, match="no such luck"):
        open_sensor(Saying(Refused("no such luck")), Config())
    reading, writing = os.pipe()
    with pytest.raises(EyeClosed, match="does not know"):
        open_sensor(Saying(Done(), (reading, writing)), Config())
    for descriptor in (reading, writing):
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(descriptor)
    with pytest.raises(EyeClosed, match=r"packets\.enabled"):
        open_sensor(Saying(Refused("")), Config(packets=PacketSettings(enabled=False)))
