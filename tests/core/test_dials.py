"""Who dialled, as the kernel said at the dial: the owner of a flow before any list of sockets, and a scan's process."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from gpuguard.core import network
from gpuguard.core.addresses import address_bytes
from gpuguard.core.detectors import probing
from gpuguard.core.host import Host
from gpuguard.core.network import Dialled
from gpuguard.core.observations import FlowClosed
from gpuguard.core.records import CONNECT, Connects, HostInfo, ProcessExited, Sockets
from gpuguard.core.subjects import FlowId, ProcessId
from gpuguard.recording.reader import read_recording
from gpuguard.recording.writer import Recorder
from tests.core.builders import BOOT, SECOND, T0, flow, pid, socket_of, sockets, started

MS = SECOND // 1000
INFO = HostInfo(time_ns=0, schema_version=1, boot_id=BOOT, hostname="h", clock_ticks_per_s=100,
                addresses=("10.0.0.1",))
CONTAINER = 4_026_532_001


def dial(one: FlowId, who: ProcessId, *, netns: int | None = None, before_ns: int = 20_000, waited_us: int = 50,
         dialled: int = 1, in_vain: int = 1, withheld: int = 0, state: int = 7) -> np.ndarray:
    row = np.zeros(1, CONNECT)
    row["time_ns"], row["pid"], row["start_ticks"] = one.start_ns - before_ns, who.pid, who.start_ticks
    row["waited_us"] = waited_us
    row["netns"] = one.netns if netns is None else netns
    row["dialled"], row["in_vain"], row["withheld"], row["state"] = dialled, in_vain, withheld, state
    row["local"] = np.frombuffer(address_bytes(one.initiator), np.uint8)
    row["remote"] = np.frombuffer(address_bytes(one.responder), np.uint8)
    row["local_port"], row["remote_port"], row["protocol"] = one.initiator_port, one.responder_port, one.protocol
    return row


def told(*rows: np.ndarray, time_ns: int = T0) -> Connects:
    return Connects(time_ns, np.concatenate(rows))


def host_with(*records: object) -> Host:
    host = Host()
    for record in (INFO, *records):
        host.receive(record)  # type: ignore[arg-type]
    return host


def test_who_dialled_owns_the_flow_though_no_list_ever_had_its_socket() -> None:
    one = flow()
    assert host_with(told(dial(one, pid(5)))).network.owner(one) == pid(5)
    six = FlowId(netns=1, protocol=6, initiator="fe80::1", initiator_port=1, responder="2001:db8::2", responder_port=2,
                 start_ns=T0)
    assert host_with(told(dial(six, pid(5)))).network.owner(six) == pid(5)


def test_the_dial_is_asked_before_the_list_of_sockets() -> None:
    one = flow()
    listed = sockets(socket_of(one, pid(6)))
    assert host_with(listed, told(dial(one, pid(5)))).network.owner(one) == pid(5)
    assert host_with(listed, told(dial(flow(port=41_000), pid(5)))).network.owner(one) == pid(6)


def test_another_time_another_namespace_and_another_direction_are_another_dial() -> None:
    one = flow()
    for row in (
        dial(one, pid(5), before_ns=2 * SECOND),
        dial(one, pid(5), before_ns=-20 * MS),
        dial(one, pid(5), netns=CONTAINER),
    ):
        assert host_with(told(row)).network.owner(one) is None
    back = FlowId(1, 6, one.responder, 22, one.initiator, one.initiator_port, T0)
    assert host_with(told(dial(one, pid(5)))).network.owner(back) is None
    late = FlowId(1, 6, one.initiator, one.initiator_port, one.responder, 22, T0, initiator_known=False)
    assert host_with(told(dial(one, pid(5)))).network.owner(late) is None, "its first packet was not the dial's"


def test_two_that_may_have_dialled_are_nobody() -> None:
    one = flow()
    for who, owner in ((pid(6), None), (pid(5), pid(5))):
        both = told(dial(one, pid(5)), dial(one, who, before_ns=30 * MS, waited_us=30_000))
        assert host_with(both).network.owner(one) == owner
    apart = flow(start_ns=T0 + 5 * SECOND)
    both = host_with(told(dial(one, pid(5)), dial(apart, pid(6))))
    assert (both.network.owner(one), both.network.owner(apart)) == (pid(5), pid(6))


def test_what_begins_after_the_answer_was_dialled_by_another() -> None:
    """A dial is not told where its process dials too fast: then whoever had these ends shortly before is not blamed."""
    one = flow()
    for before_ns, waited_us in ((500 * MS, 300), (500 * MS, 400_000), (20 * MS, 0)):
        assert host_with(told(dial(one, pid(5), before_ns=before_ns, waited_us=waited_us))).network.owner(one) is None


def test_a_dial_waits_for_its_first_packet_until_it_is_answered() -> None:
    """A neighbour's address is asked for three times, a second apart; fast open may wait for the first byte."""
    one = flow()
    assert host_with(told(dial(one, pid(5), before_ns=40 * SECOND, waited_us=40_000_100))).network.owner(one) == pid(5)


def test_dials_are_known_when_the_clock_was_set_back() -> None:
    one, early = flow(), flow(port=41_000, start_ns=T0 - 3600 * SECOND)
    host = host_with(told(dial(one, pid(5))))
    host.receive(told(dial(early, pid(6)), time_ns=early.start_ns + MS))
    assert host.network.owner(early) == pid(6)
    assert host.network.owner(one) is None, "long over by the clock that holds now"
    assert host.evicted()["dials"] == 0


def test_a_dial_of_a_container_is_found_where_its_bridge_carries_it() -> None:
    inside = FlowId(1, 6, "172.17.0.4", 40_000, "10.9.9.9", 22, T0)
    assert host_with(told(dial(inside, pid(5), netns=CONTAINER))).network.owner(inside) == pid(5)
    twins = told(dial(inside, pid(5), netns=CONTAINER), dial(inside, pid(6), netns=CONTAINER + 1))
    assert host_with(twins).network.owner(inside) is None, "two containers have this address"
    calls_in = FlowId(1, 6, "172.17.0.4", 40_000, "10.0.0.1", 22, T0)
    assert host_with(told(dial(calls_in, pid(5), netns=CONTAINER))).network.owner(calls_in) == pid(5)
    out = flow()
    apart = host_with(told(dial(out, pid(5), netns=CONTAINER)))
    assert apart.network.owner(out) is None, "it has the address of the host"


def test_a_connection_goes_to_the_child_that_outlives_its_dialler_and_to_no_stranger() -> None:
    """``ssh -f`` forks when it is let in; and a port that is used again is on the list with its next process."""
    one = flow()
    begun = (started(pid(5), pid(1)), started(pid(6), pid(5)), started(pid(7), pid(1)), told(dial(one, pid(5))))
    host = host_with(*begun, sockets(socket_of(one, pid(6)), time_ns=T0 + MS))
    assert host.network.owner(one) == pid(5)
    host.receive(ProcessExited(T0 + SECOND, pid(5)))
    assert host.network.owner(one) == pid(6)
    host = host_with(*begun, ProcessExited(T0 + MS, pid(5)), sockets(socket_of(one, pid(7)), time_ns=T0 + SECOND))
    assert host.network.owner(one) == pid(5)


def test_the_table_of_dials_is_bounded(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(network, "DIALS_MAX", 8)
    flows = [flow(port=40_000 + n) for n in range(20)]
    host = host_with(told(*(dial(one, pid(5)) for one in flows)))
    assert [host.network.owner(one) is not None for one in flows] == [False] * 12 + [True] * 8
    assert host.evicted()["dials"] == 12
    same = [flow(start_ns=T0 + 2 * n * SECOND) for n in range(9)]
    host = host_with(told(*(dial(one, pid(5)) for one in same)))
    assert sum(host.network.owner(one) is not None for one in same) == network.DIALS_OF_ENDS_MAX
    assert host.network.knows_diallers


def test_dials_that_are_long_over_leave_and_are_not_missed() -> None:
    early, late = flow(port=40_000), flow(port=40_001, start_ns=T0 + 61 * SECOND)
    host = host_with(told(dial(early, pid(5))), told(dial(late, pid(5)), time_ns=T0 + 61 * SECOND))
    assert (host.network.owner(early), host.network.owner(late)) == (None, pid(5))
    assert host.evicted()["dials"] == 0


def test_connections_are_counted_for_each_process() -> None:
    one = flow()
    last = dial(one, pid(5), dialled=900, in_vain=890, withheld=600, state=0)
    host = host_with(told(dial(one, pid(5)), dial(one, pid(6), in_vain=0)), told(last))
    assert (host.network.dialled(pid(5)), host.network.dialled(pid(6))) == (Dialled(900, 890, 600), Dialled(1, 0, 0))
    host.forget(pid(5))
    assert host.network.dialled(pid(5)) is None


NUMBERS = st.integers(0, 3)


@given(st.lists(st.tuples(NUMBERS, NUMBERS, st.integers(-1_500, 1_500), st.integers(1, 2)), max_size=10), NUMBERS)
def test_the_owner_is_who_alone_dialled_these_ends_shortly_before(dials, port) -> None:  # type: ignore[no-untyped-def]
    """The naive reference: look at every dial."""
    def near(before_ms: int) -> bool:
        return -1 <= before_ms <= 1001

    rows = [dial(flow(port=at), pid(who), before_ns=before_ms * MS, waited_us=1_000_000, netns=netns)
            for at, who, before_ms, netns in dials]
    host = host_with(*(told(row) for row in rows))
    kept = [one for one in dials if one[0] == port][-network.DIALS_OF_ENDS_MAX:]
    who = {one[1] for one in kept if near(one[2]) and one[3] == 1}
    assert host.network.owner(flow(port=port)) == (pid(who.pop()) if len(who) == 1 else None)


def test_any_rows_of_a_recording_are_taken(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    rows = np.frombuffer(rng.bytes(CONNECT.itemsize * 50), CONNECT)
    recorder = Recorder(tmp_path, file_bytes_max=1 << 20, total_bytes_max=1 << 22)
    for block in (INFO, Connects(T0, rows), Connects(T0 + 1, rows[:0])):
        assert recorder.write(block) == []
    recorder.close(T0 + 2)
    _, first, second = (one for one in read_recording(tmp_path) if isinstance(one, HostInfo | Connects))
    assert isinstance(first, Connects)
    assert first.rows.dtype == CONNECT
    assert first.rows.tobytes() == rows.tobytes()
    assert isinstance(second, Connects)
    assert len(second.rows) == 0
    assert host_with(first).network.owner(flow()) is None


# -- scans ------------------------------------------------------------------------------------------------------------


def refused(port: int, at: int = 0) -> FlowClosed:
    one = FlowId(1, 6, "10.0.0.1", 20_000 + at, "10.0.0.2", port, T0 + at * 10 * MS)
    return FlowClosed(one.start_ns + MS, one, "closed", 2, 0, 0, 0, 0, 0, "tcp", one.start_ns + MS)


def scanned(closed: list[FlowClosed], who: list[ProcessId]) -> list[object]:
    detector, host, found = probing.Detector(), host_with(), []
    host.receive(Sockets(T0 - SECOND, 1, ()))
    for at, (one, process) in enumerate(zip(closed, who, strict=True)):
        mine = who[:at + 1].count(process)
        host.receive(told(dial(one.flow, process, dialled=mine, in_vain=mine)))
        found += detector.receive(one, host)
    return found


def test_a_scan_of_refused_places_names_its_process_and_its_count() -> None:
    found = scanned([refused(port, port) for port in range(1, 101)], [pid(5)] * 100)
    assert {one.subject for one in found} == {pid(5)}
    assert sum(one.nats for one in found) > 20
    assert "pid 5 tried" in found[-1].text
    count = found[-1].text.rpartition("of all its ")[2].split()
    assert count[0] == count[2]
    assert int(count[0]) > 40


def test_two_processes_are_not_each_others_scan() -> None:
    found = scanned([refused(port, port) for port in range(1, 101)], [pid(5 + n % 2) for n in range(100)])
    assert {one.subject for one in found} == {pid(5), pid(6)}


def test_a_loop_that_starts_one_process_for_each_attempt_is_a_scan() -> None:
    closed = [refused(port, port) for port in range(1, 101)]
    found = scanned(closed, [pid(1000 + n) for n in range(100)])
    assert {one.subject for one in found} <= {one.flow for one in closed}
    assert 0 < len(found) < 12
    assert "once or twice each" in found[-1].text


def test_many_processes_that_know_their_services_are_no_scan() -> None:
    """Each fails at a place that is down, and is answered at another."""
    detector, host, found = probing.Detector(), host_with(Sockets(T0 - SECOND, 1, ())), []
    for n in range(200):
        down, up = refused(9000 + n % 40, 2 * n), refused(7000 + n, 2 * n + 1)
        answered = FlowClosed(up.time_ns, up.flow, "closed", 40, 900, 9000, 0, 0, 0, "tcp", up.time_ns)
        host.receive(told(dial(down.flow, pid(100 + n)), dial(up.flow, pid(100 + n), in_vain=0, state=1)))
        for one in (down, answered):
            found += detector.receive(one, host)
    assert found == []
