"""The wire between the two machines of the lab: two TAP devices joined by a delay, or a veth pair without one.

The kernel's own delay line (sch_netem) is missing from many kernels, so frames pass through this process: each waits
its turn and nothing is reordered. The delay makes round trips visible, as they are on a real network. TAP devices have
no segmentation offload, so that the guard sees what would be on a wire. tun(4), Documentation/networking/tuntap.rst.

Run as a program it is the bridge; it says when each TCP connection was opened, which is what delays are measured from.
"""

from __future__ import annotations

import fcntl
import json
import os
import random
import select
import struct
import sys
import time
from collections import deque
from ipaddress import IPv4Address

from gpuguard.lab.namespaces import in_network_of, run

NODE = "10.77.0.1"
FAR = "10.77.0.2"
#: Addresses behind the far side. It answers for two of them and is silent about the others.
INTERNAL_NETWORK = "10.80.0.0/24"
INTERNAL_ANSWERING = ("10.80.0.5", "10.80.0.9")

DELAY_NS = 12_000_000
JITTER_NS = 2_000_000
QUEUE_MAX = 4096

_TUNSETIFF = 0x400454CA
_IFF_TAP = 0x0002
_IFF_NO_PI = 0x1000


def can_delay() -> bool:
    """Return whether TAP devices may be made here; a user's lab mostly may not open /dev/net/tun."""
    return os.access("/dev/net/tun", os.R_OK | os.W_OK)


def join_directly(far_pid: int) -> None:
    """Join this network namespace and that of ``far_pid`` by a veth pair."""
    run("ip", "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", str(far_pid))
    _configure(far_pid)


def main() -> None:
    """Join this network namespace and that of the process named by the first argument, with a delay.

    The second argument, 0 if it is left out, is the share of frames to lose; the third the delay in milliseconds.
    """
    far_pid = int(sys.argv[1])
    lost_ratio = float(sys.argv[2]) if len(sys.argv) > 2 else 0.0
    delay_ns = round(float(sys.argv[3]) * 1e6) if len(sys.argv) > 3 else DELAY_NS
    near = _tap("eth0")
    far = _tap("far0")
    run("ip", "link", "set", "far0", "netns", str(far_pid))
    run(*in_network_of(far_pid), "ip", "link", "set", "far0", "name", "eth0")
    _configure(far_pid)
    print(json.dumps({"ready": True}), flush=True)  # noqa: T201
    _carry(near, far, lost_ratio, delay_ns)


def _tap(name: str) -> int:
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    fcntl.ioctl(descriptor, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TAP | _IFF_NO_PI))
    return descriptor


def _configure(far_pid: int) -> None:
    there = in_network_of(far_pid)
    for prefix, address in (([], NODE), (there, FAR)):
        run(*prefix, "ip", "link", "set", "lo", "up")
        run(*prefix, "ip", "address", "add", f"{address}/24", "dev", "eth0")
        run(*prefix, "ip", "link", "set", "eth0", "up")
        # sshd without root listens on port 22 as an ordinary user.
        run(*prefix, "sh", "-c", "echo 0 > /proc/sys/net/ipv4/ip_unprivileged_port_start")
    run("ip", "route", "add", INTERNAL_NETWORK, "via", FAR)
    for address in INTERNAL_ANSWERING:
        run(*there, "ip", "address", "add", f"{address}/32", "dev", "lo")


def _carry(near: int, far: int, lost_ratio: float, delay_ns: int) -> None:
    noise = random.Random(7)
    other = {near: far, far: near}
    waiting: dict[int, deque[tuple[int, bytes]]] = {near: deque(), far: deque()}
    while True:
        due = min((queue[0][0] for queue in waiting.values() if queue), default=None)
        timeout_s = None if due is None else max(0, due - time.monotonic_ns()) / 1e9
        ready, _, _ = select.select([near, far], [], [], timeout_s)
        for source in ready:
            _take(source, waiting[other[source]], noise, lost_ratio, delay_ns, tell=source == near)
        now = time.monotonic_ns()
        for target, queue in waiting.items():
            while queue and queue[0][0] <= now:
                _give(target, queue.popleft()[1])


def _take(source: int, queue: deque[tuple[int, bytes]], noise: random.Random, lost_ratio: float,
          delay_ns: int, *, tell: bool) -> None:
    for _ in range(64):
        try:
            frame = os.read(source, 65_536)
        except BlockingIOError:
            return
        if tell:
            _tell_syn(frame)
        if len(queue) < QUEUE_MAX and not (lost_ratio and noise.random() < lost_ratio):
            earliest = queue[-1][0] if queue else 0
            due = time.monotonic_ns() + delay_ns + int(noise.random() * JITTER_NS)
            queue.append((max(due, earliest), frame))


def _give(target: int, frame: bytes) -> None:
    try:
        os.write(target, frame)
    except BlockingIOError:
        return  # as a wire would: a full queue drops, and TCP repeats


def _tell_syn(frame: bytes) -> None:
    """Say when this side opens a connection to the far one: IPv4, TCP, SYN without ACK (RFC 9293, section 3.1)."""
    if len(frame) < 54 or frame[12:14] != b"\x08\x00" or frame[23] != 6:
        return
    tcp = 14 + (frame[14] & 15) * 4
    if len(frame) < tcp + 14 or frame[tcp + 13] & 0x12 != 0x02:
        return
    destination = str(IPv4Address(frame[30:34]))
    if destination != FAR:
        return
    source_port, destination_port = struct.unpack_from("!HH", frame, tcp)
    print(json.dumps({  # noqa: T201
        "syn_ns": time.time_ns(), "source_port": source_port,
        "destination": destination, "destination_port": destination_port,
    }), flush=True)


if __name__ == "__main__":
    main()
