"""Scenes of tests/test_packets_live.py, each in a process and network namespace of its own; prints one JSON object.

The broker is a forked child that answers requests over a socket pair, as the real one does; this process is the guard,
and makes the traffic on loopback as well. Exit status 77: this host does not allow it.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import errno
import fcntl
import itertools
import json
import os
import socket
import struct
import sys
import threading
import time
from pathlib import Path

import msgspec

from gpuguard.config import Config, PacketSettings
from gpuguard.core.records import Block, Gap, Packets
from gpuguard.messages import Answer, OpenPackets
from gpuguard.sensors.packets import PacketSensor, grant, open_sensor, rings

LOOPBACK = "127.0.0.1"
_libc = ctypes.CDLL(None, use_errno=True)


def own_namespace() -> None:
    if _libc.unshare(0x40000000) != 0:
        sys.stderr.write(f"unshare(CLONE_NEWNET): {os.strerror(ctypes.get_errno())}\n")
        raise SystemExit(77)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, 0x8914, struct.pack("16sH14x", b"lo", 0x1 | 0x40))  # SIOCSIFFLAGS: up, running


class Broker:
    """A broker's client, and the forked process at the other end."""

    def __init__(self) -> None:
        self.pair, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.pid = os.fork()
        if self.pid == 0:
            self.pair.close()
            with contextlib.suppress(ConnectionError):
                serve(far)
            os._exit(0)
        far.close()

    def ask(self, request: OpenPackets) -> tuple[Answer, tuple[int, ...]]:
        self.pair.send(msgspec.msgpack.encode(request))
        data, extra, _, _ = self.pair.recvmsg(65536, socket.CMSG_SPACE(64))
        descriptors = array.array("i")
        for _, _, part in extra:
            descriptors.frombytes(part)
        return msgspec.msgpack.decode(data, type=Answer), tuple(descriptors)

    def threads(self) -> int:
        self.pair.send(b"threads")
        return int(self.pair.recv(100))

    def end(self) -> None:
        self.pair.close()
        os.waitpid(self.pid, 0)


def serve(pair: socket.socket) -> None:
    while data := pair.recv(65536):
        if data == b"threads":
            pair.send(str(threading.active_count()).encode())
            continue
        answer, descriptors = grant(msgspec.msgpack.decode(data, type=OpenPackets))
        socket.send_fds(pair, [msgspec.msgpack.encode(answer)], list(descriptors))
        for descriptor in descriptors:
            os.close(descriptor)


def sensor_of(broker: Broker, **settings: object) -> PacketSensor:
    return open_sensor(broker, Config(packets=PacketSettings(**settings)))


def read_until(sensor: PacketSensor, enough: object, seconds: float = 100) -> list[Block]:
    """Read on until ``enough(blocks)``, or until it takes too long: the assertion then fails, not this."""
    blocks: list[Block] = []
    end = time.monotonic() + seconds
    while not enough(blocks) and time.monotonic() < end:
        blocks += sensor.read(time.time_ns())
        time.sleep(0.01)
    return blocks


def rows_in(blocks: list[Block]) -> int:
    return sum(len(block.rows) for block in blocks if isinstance(block, Packets))


def fins_in(blocks: list[Block]) -> int:
    return sum(int((block.rows["tcp_flags"] & 1).sum()) for block in blocks if isinstance(block, Packets))


def lost_in(blocks: list[Block]) -> int:
    return sum(block.lost or 0 for block in blocks if isinstance(block, Gap))


def converse(bulk_bytes: int) -> int:
    """A TCP conversation on loopback: a banner, then bulk. Returns the server's port."""
    with socket.create_server((LOOPBACK, 0)) as server, socket.create_connection(server.getsockname()) as client:
        port = server.getsockname()[1]
        far, _ = server.accept()
        with far:
            far.sendall(b"SSH-2.0-lab\r\n")
            client.recv(100)
            writer = threading.Thread(target=client.sendall, args=(bytes(bulk_bytes),))
            writer.start()
            left = bulk_bytes
            while left:
                left -= len(far.recv(65536))
            writer.join()
    return port


def conversation(snap_bytes: int) -> dict:
    broker = Broker()
    sensor = sensor_of(broker, snap_bytes=snap_bytes)
    before = time.time_ns()
    port = converse(1_000_000)
    blocks = read_until(sensor, lambda blocks: fins_in(blocks) >= 2)
    packets = [block for block in blocks if isinstance(block, Packets)]
    to_server = [row for block in packets for row in block.rows if row["destination_port"] == port]
    result = {
        "netns": {block.netns for block in packets} == {Path("/proc/self/ns/net").stat().st_ino},
        "syns": sum(int(row["tcp_flags"]) == 2 for row in to_server),
        "payload_bytes": sum(int(row["payload_bytes"]) for row in to_server),
        "packet_types": sorted({int(row["packet_type"]) for row in to_server}),
        "protocols": sorted({int(row["protocol"]) for row in to_server}),
        "times": all(before <= row["time_ns"] <= time.time_ns() for row in to_server),
        "in_order": all(a["time_ns"] <= b["time_ns"] for a, b in itertools.pairwise(to_server)),
        "banners": [fact.text for block in packets for fact in block.facts],
        "frame_less_payload": sorted({int(row["frame_bytes"]) - int(row["payload_bytes"]) for row in to_server
                                      if row["payload_bytes"]}),
        "gaps": [block.reason for block in blocks if isinstance(block, Gap)],
    }
    sensor.close()
    broker.end()
    return result


def flood() -> dict:
    """Far more than the ring holds while nobody reads: what was read and what was lost make up all that was sent."""
    broker = Broker()
    sensor = sensor_of(broker, ring_bytes=1024 * 1024)
    sent = 20_000
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as far, socket.socket(type=socket.SOCK_DGRAM) as near:
        far.bind((LOOPBACK, 0))
        for _ in range(sent):
            near.sendto(bytes(1000), far.getsockname())
    blocks = read_until(sensor, lambda blocks: rows_in(blocks) + lost_in(blocks) >= sent)
    sensor.close()
    broker.end()
    return {"sent": sent, "rows": rows_in(blocks), "lost": lost_in(blocks),
            "since": all(block.since_ns is not None for block in blocks if isinstance(block, Gap))}


def powers() -> dict:
    """Try to send a frame out of loopback by every descriptor that the guard has left once the sensor is open."""
    broker = Broker()
    _, handed = broker.ask(OpenPackets("", 2048, 1 << 23))
    control = send_frame(handed[0])
    for descriptor in handed:
        os.close(descriptor)
    sensor = sensor_of(broker)
    left = {int(name) for name in os.listdir("/proc/self/fd")} - {0, 1, 2, broker.pair.fileno()}
    links = {one: str(Path(f"/proc/self/fd/{one}").readlink()) for one in left if is_open(one)}
    result = {"control": control, "links": sorted(links.values()), "sendto": [send_frame(one) for one in links],
              "write": [write_frame(one) for one in links]}
    converse(1000)
    result["rows"] = rows_in(read_until(sensor, lambda blocks: rows_in(blocks) >= 10))
    sensor.close()
    broker.end()
    return result


def is_open(descriptor: int) -> bool:
    """Not so for the one that listed the folder."""
    return Path(f"/proc/self/fd/{descriptor}").is_symlink()


def send_frame(descriptor: int) -> str:
    """Return what sendto(2) says: "sent", or the name of its error."""
    address = struct.pack("=HHiHBB8s", socket.AF_PACKET, socket.htons(0x0800), 1, 0, 0, 6, bytes(8))
    if _libc.sendto(descriptor, bytes(64), 64, 0, address, len(address)) == 64:
        return "sent"
    return errno.errorcode[ctypes.get_errno()]


def write_frame(descriptor: int) -> str:
    try:
        os.write(descriptor, bytes(64))
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return "sent"


def endings() -> dict:
    """The guard closes: the broker's thread ends. The broker ends: the guard says that drops are not counted."""
    broker = Broker()
    descriptors = len(os.listdir("/proc/self/fd"))
    sensor = sensor_of(broker, interfaces=("lo",), rings=2)
    watching = broker.threads()
    sensor.close()
    end = time.monotonic() + 100
    while broker.threads() > 1 and time.monotonic() < end:
        time.sleep(0.05)
    left = broker.threads()
    leaked = len(os.listdir("/proc/self/fd")) - descriptors
    sensor = sensor_of(broker, interfaces=("lo",))
    broker.end()
    gone = read_until(sensor, lambda blocks: any(isinstance(block, Gap) for block in blocks))
    converse(1000)
    rows = rows_in(read_until(sensor, lambda blocks: rows_in(blocks) >= 10))
    sensor.close()
    return {"watching": watching, "left": left, "leaked": leaked, "rows_after": rows,
            "gone": [block.reason for block in gone if isinstance(block, Gap)]}


def refusals() -> dict:
    asked = [OpenPackets("none0", 2048, 1 << 23), OpenPackets("", 10, 1 << 23), OpenPackets("", 2048, 1 << 40),
             OpenPackets("x" * 16, 2048, 1 << 23), OpenPackets("lo\0", 2048, 1 << 23),
             OpenPackets("lo", 2048, 1 << 23, ("tcp",)), OpenPackets("lo", 2048, 1 << 23, ("port 1",) * 33),
             OpenPackets("lo", 2048, 1 << 23, rings=9)]
    answers = [grant(request) for request in asked]
    held = grant(OpenPackets("lo", 2048, 1 << 24))[1]
    rings.HELD_BYTES_MAX = 1 << 25
    answers.append(grant(OpenPackets("lo", 2048, 1 << 23, rings=3)))
    for descriptor in held:
        os.close(descriptor)
    while rings._held:
        time.sleep(0.01)
    os.setresuid(65534, 65534, 65534)
    answers.append(grant(OpenPackets("", 2048, 1 << 23)))
    return {"reasons": [answer.reason for answer, _ in answers], "descriptors": [len(given) for _, given in answers]}


def ignored() -> dict:
    """Datagrams below one to three tags, to ports of which a rule names all but the last."""
    broker = Broker()
    below = ((), (0x8100,), (0x88A8, 0x8100), (0x8100,) * 3, (0x88A8, 0x8100))
    seen = {}
    for rules in ((), ("net 10.9.9.0/24 udp port 2000-2003", "port 1-9")):
        sensor = sensor_of(broker, ignore=rules)
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as raw:
            raw.bind(("lo", 0))
            for port, tags in enumerate(below, start=2000):
                ahead = bytes(12) + b"".join(struct.pack(">HH", tag, 0x4005) for tag in tags)
                raw.send(ahead + b"\x08\0" + datagram(port))
        blocks = read_until(sensor, lambda blocks: rows_in(blocks) >= 5 or 2004 in ports_of(blocks))
        seen["some" if rules else "none"] = {
            "ports": ports_of(blocks), "gaps": [block.reason for block in blocks if isinstance(block, Gap)]}
        sensor.close()
    broker.end()
    return seen


def shared() -> dict:
    """Conversations over three rings: each packet is met once, and both directions of a flow in the same ring."""
    broker = Broker()
    sensor = sensor_of(broker, rings=3)
    ports = [converse(1000) for _ in range(40)]
    blocks = []
    rings: dict[int, set[int]] = {port: set() for port in ports}
    end = time.monotonic() + 100
    while fins_in(blocks) < 2 * len(ports) and time.monotonic() < end:
        for number, source in enumerate(sensor._sources):
            new = source.read(time.time_ns(), 16)
            for block in (block for block in new if isinstance(block, Packets)):
                for row in block.rows[["source_port", "destination_port"]].tolist():
                    rings[row[0] if row[0] in rings else row[1]].add(number)
            blocks += new
        time.sleep(0.01)
    watching = broker.threads()
    sensor.close()
    broker.end()
    flags = [int(row["tcp_flags"]) for block in blocks if isinstance(block, Packets) for row in block.rows]
    return {"rings": sorted({number for one in rings.values() for number in one}), "watching": watching,
            "split": sum(len(one) != 1 for one in rings.values()), "syns": flags.count(2), "answers": flags.count(18),
            "gaps": [block.reason for block in blocks if isinstance(block, Gap)]}


def datagram(port: int) -> bytes:
    """UDP in IPv4."""
    addresses = socket.inet_aton("10.9.9.1") + socket.inet_aton("10.9.9.2")
    return struct.pack(">BBHHHBBH", 0x45, 0, 38, 1, 0, 64, 17, 0) + addresses + struct.pack(
        ">HHHH10x", 1000, port, 18, 0)


def ports_of(blocks: list[Block]) -> list[int]:
    return [int(port) for block in blocks if isinstance(block, Packets) for port in block.rows["destination_port"]]


SCENES = {"conversation": lambda: conversation(2048), "snapped": lambda: conversation(96), "flood": flood,
          "powers": powers, "endings": endings, "refusals": refusals,
          "ignored": ignored, "shared": shared}

if __name__ == "__main__":
    own_namespace()
    print(json.dumps(SCENES[sys.argv[1]]()))
