"""The socket eye: every TCP and UDP socket with its owners, byte counts and lowest round-trip time.

The kernel's own tables are asked by NETLINK_SOCK_DIAG (`diag`). They do not say who has a socket open: that is read
from /proc (`owners`). `sensor` decides when to look.

The netlink socket of another network namespace is opened by a thread of its own that ends there
(`netlink.open_netlink`), so nothing else of the broker is ever in a foreign namespace.

A connection that came in has an owner from accept(2) on. What opens and closes between two looks is not seen; the
packet eye sees it, and the process eye who dialled it (`processes.connects`).
"""

from __future__ import annotations

import os
import time
from collections import OrderedDict
from typing import TYPE_CHECKING

import msgspec

from gpuguard.core.records import Sockets
from gpuguard.messages import MESSAGE_BYTES_MAX, Answer, ReadSockets, Refused, SocketsRead
from gpuguard.netlink import NETLINK_SOCK_DIAG, open_netlink
from gpuguard.sealing import sealed
from gpuguard.sensors.processes.procfs import PROC
from gpuguard.sensors.sockets.diag import read_tables
from gpuguard.sensors.sockets.owners import Owners
from gpuguard.sensors.sockets.sensor import SocketSensor

if TYPE_CHECKING:
    from pathlib import Path

    from gpuguard.config import Config
    from gpuguard.sensors.sockets.sensor import Broker

OWNERS_MAX = 64

_owners: OrderedDict[int, Owners] = OrderedDict()


def read_sockets(pid: int = 0, proc_root: Path = PROC) -> Sockets:
    """Return the sockets of the network namespace of ``pid`` (0: our own); raises `OSError`."""
    namespace = os.open(proc_root / (str(pid) if pid else "self") / "ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        netns = os.fstat(namespace).st_ino
        own = netns == (proc_root / "self/ns/net").stat().st_ino
        opened = open_netlink(NETLINK_SOCK_DIAG, None if own else namespace)
    finally:
        os.close(namespace)
    with opened:
        found, complete = read_tables(opened)
    owners = _owners.setdefault(netns, Owners(proc_root))
    _owners.move_to_end(netns)
    if len(_owners) > OWNERS_MAX:
        _owners.popitem(last=False)
    known, all_read = owners.of({one.inode for one in found}, time.monotonic_ns())
    return Sockets(
        time_ns=time.time_ns(),
        netns=netns,
        sockets=tuple(msgspec.structs.replace(one, owners=known[one.inode]) for one in found),
        complete=complete and all_read,
    )


def grant(request: ReadSockets) -> tuple[Answer, tuple[int, ...]]:
    """Answer with the sockets of a namespace; where they exceed a message, in a sealed memfd beside an empty list."""
    try:
        seen = read_sockets(request.pid)
    except OSError as error:
        return Refused(f"sockets: {error}"), ()
    answer = SocketsRead(seen)
    data = msgspec.msgpack.encode(answer)
    if len(data) <= MESSAGE_BYTES_MAX // 2:
        return answer, ()
    whole = sealed("gpuguard-sockets", msgspec.msgpack.encode(seen))
    return SocketsRead(msgspec.structs.replace(seen, sockets=())), (whole,)


def open_sensor(broker: Broker, config: Config) -> SocketSensor:
    """Return the socket eye. Whether the broker can look shows with the first look, as a `Gap` if not."""
    return SocketSensor(broker, config.sockets.interval_ms * 1_000_000)
