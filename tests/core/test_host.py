from __future__ import annotations

import pytest

from gpuguard.core import host as host_module
from gpuguard.core.host import ANCESTORS_MAX, ELDEST_MAX, ENDED_MAX, BoundedTable, Host
from gpuguard.core.records import KernelName, ModuleImage, ProcessExited
from tests.core.builders import SPAN, T0, TRACE, flow, pid, socket_of, sockets, started


def host_with(*records: object) -> Host:
    host = Host()
    for record in records:
        host.receive(record)  # type: ignore[arg-type]
    return host


def test_a_full_table_forgets_its_oldest_and_counts() -> None:
    table: BoundedTable[int, int] = BoundedTable(2)
    for key in range(5):
        table[key] = key
    assert (len(table), table.evicted, table.get(4), table.get(0)) == (2, 3, 4, None)


def test_ancestry_stops_at_a_reused_pid() -> None:
    host = host_with(started(pid(10), pid(1)), started(pid(20), pid(10)), started(pid(30), pid(31, 99)))
    assert host.ancestors(pid(20)) == (pid(10), pid(1))
    assert host.ancestors(pid(30)) == ()


def test_who_forks_deep_stays_below_the_eldest_though_all_between_end() -> None:
    host = host_with(started(pid(1)), *(started(pid(one), pid(one - 1)) for one in range(2, 301)))
    nearest, eldest = range(299, 299 - ANCESTORS_MAX, -1), range(ELDEST_MAX, 0, -1)
    assert host.ancestors(pid(300)) == tuple(map(pid, [*nearest, *eldest]))
    for one in range(2, 300):
        host.receive(ProcessExited(time_ns=T0, process=pid(one)))
        host.forget(pid(one))
    host.receive(started(pid(400), pid(300)))
    host.receive(started(pid(401), pid(299)))
    for one in (400, 401):
        assert host.ancestors(pid(one))[-ELDEST_MAX:] == tuple(map(pid, eldest))
    for one in range(1000, 1000 + ENDED_MAX):
        host.forget(pid(one))
    assert host.ancestors(pid(400)) == tuple(map(pid, [300, 299, *eldest])), "what lay between was forgotten"


def test_a_long_line_ends_at_a_reused_pid() -> None:
    line = [started(pid(one, one), pid(one - 1, one - 1)) for one in range(2, 101)]
    again = started(pid(50, 500)), started(pid(201, 501), pid(50, 500))
    host = host_with(*line, started(pid(200, 50), pid(100, 100)), *again)
    assert host.ancestors(pid(200, 50)) == ()
    assert host.ancestors(pid(201, 501)) == (pid(50, 500),)
    assert host.ancestors(pid(100, 100))[-1] == pid(1, 1)


def test_of_records_that_go_round_in_a_circle_nobody_is_an_ancestor_twice() -> None:
    x, y, z, w, other = (pid(number, 1) for number in range(10, 15))
    born = ((x, None), (y, x), (x, y), (y, x), (z, y), (y, other), (w, z))
    assert host_with(*(started(process, parent) for process, parent in born)).ancestors(w) == (z, y, other, x)


def test_ancestry_survives_the_ancestors() -> None:
    environ = {"TRACEPARENT": f"00-{TRACE}-{SPAN}-01"}
    host = host_with(started(pid(10), pid(1)), started(pid(20), pid(10), environ=environ), started(pid(30), pid(20)))
    host.receive(ProcessExited(time_ns=T0, process=pid(20)))
    host.forget(pid(20))
    assert host.process(20) is None
    assert host.ancestors(pid(30)) == (pid(20), pid(10), pid(1))
    assert host.context(pid(30)).span_id == SPAN


def test_a_parent_loop_ends() -> None:
    host = host_with(started(pid(1, 5), pid(2, 5)), started(pid(2, 5), pid(1, 5)))
    assert len(host.ancestors(pid(1, 5))) <= 2


def test_an_exit_of_an_earlier_life_of_a_pid_does_not_end_the_later() -> None:
    host = host_with(started(pid(9, 1)), started(pid(9, 2)), ProcessExited(time_ns=T0, process=pid(9, 1)))
    assert host.process(9) == pid(9, 2)


def test_owner_is_certain_or_nobody() -> None:
    one = flow()
    assert host_with().owner(one) is None
    assert host_with(sockets(socket_of(one))).owner(one) is None
    assert host_with(sockets(socket_of(one, pid(5)))).owner(one) == pid(5)
    unrelated = host_with(started(pid(5)), started(pid(6)), sockets(socket_of(one, pid(5), pid(6))))
    assert unrelated.owner(one) is None
    related = host_with(started(pid(5)), started(pid(6), pid(5)), sockets(socket_of(one, pid(6), pid(5))))
    assert related.owner(one) == pid(5)


def test_a_socket_once_owned_keeps_its_owner_when_the_owner_becomes_unreadable() -> None:
    one = flow()
    host = host_with(sockets(socket_of(one, pid(5))), sockets(socket_of(one)))
    assert host.owner(one) == pid(5)


def test_a_reused_port_is_another_socket() -> None:
    first, second = flow(start_ns=T0), flow(start_ns=T0 + 10)
    host = host_with(sockets(socket_of(first, pid(5), inode=1)))
    assert host.owner(first) == pid(5)
    assert host.owner(second) is None, "who had these ends before is not who has them now"
    host.receive(sockets(socket_of(second, pid(6), inode=2), time_ns=T0 + 20))
    assert host.owner(second) == pid(6)
    assert host.owner(first) == pid(5)


def test_images_are_kept_in_order() -> None:
    images = [ModuleImage(time_ns=T0, process=pid(5), sha256=str(n), size_bytes=n, kind="cubin") for n in range(3)]
    assert [image.sha256 for image in host_with(*images).images(pid(5))] == ["0", "1", "2"]


def test_a_process_that_looks_up_names_without_end_pushes_out_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_module, "KERNELS_MAX", 8)
    host = host_with(*(KernelName(time_ns=T0, process=pid(5), kernel=n, name=f"k{n}") for n in range(3)),
                     *(KernelName(time_ns=T0, process=pid(6), kernel=n, name=f"k{n}") for n in range(20)))
    assert [host.kernel_name(pid(5), n) is not None for n in range(3)] == [True] * 3
    assert [n for n in range(20) if host.kernel_name(pid(6), n)] == [15, 16, 17, 18, 19]
    assert host.evicted()["kernel names"] == 15
    host.forget(pid(6))
    assert host.kernel_name(pid(6), 19) is None


def test_who_has_ended_stays_ended() -> None:
    host = host_with(started(pid(5)), started(pid(6)))
    assert not host.has_ended(pid(5))
    host.receive(ProcessExited(time_ns=T0, process=pid(5)))
    assert host.has_ended(pid(5))
    host.forget(pid(5))
    assert host.has_ended(pid(5))
    host.receive(started(pid(6, 99)))
    assert host.has_ended(pid(6)), "another process has its pid"
