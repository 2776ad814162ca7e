"""Whose a flow is, as lists of sockets tell it; what the kernel says of who dialled is in `test_dials`."""

from __future__ import annotations

from gpuguard.core.host import Host
from gpuguard.core.network import Network
from gpuguard.core.records import Block
from tests.core.builders import T0, flow, pid, socket_of, sockets, started


def network_of(*records: Block) -> Network:
    host = Host()
    for record in records:
        host.receive(record)
    return host.network


def test_owner_is_certain_or_nobody() -> None:
    one = flow()
    assert network_of().owner(one) is None
    assert network_of(sockets(socket_of(one))).owner(one) is None
    assert network_of(sockets(socket_of(one, pid(5)))).owner(one) == pid(5)
    unrelated = network_of(started(pid(5)), started(pid(6)), sockets(socket_of(one, pid(5), pid(6))))
    assert unrelated.owner(one) is None
    related = network_of(started(pid(5)), started(pid(6), pid(5)), sockets(socket_of(one, pid(6), pid(5))))
    assert related.owner(one) == pid(5)


def test_a_socket_once_owned_keeps_its_owner_when_the_owner_becomes_unreadable() -> None:
    one = flow()
    known = network_of(sockets(socket_of(one, pid(5))), sockets(socket_of(one)))
    assert known.owner(one) == pid(5)


def test_a_reused_port_is_another_socket() -> None:
    first, second = flow(start_ns=T0), flow(start_ns=T0 + 10)
    known = network_of(sockets(socket_of(first, pid(5), inode=1)))
    assert known.owner(first) == pid(5)
    assert known.owner(second) is None, "who had these ends before is not who has them now"
    known.take_sockets(sockets(socket_of(second, pid(6), inode=2), time_ns=T0 + 20))
    assert known.owner(second) == pid(6)
    assert known.owner(first) == pid(5)
