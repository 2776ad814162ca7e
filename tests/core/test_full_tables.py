"""Every table of the core is bounded, and what it forgets is told in a gap, unless it is said why that is no loss."""

from __future__ import annotations

import numpy as np
import pytest

from gpuguard.core import correlation, guard, incidents, network
from gpuguard.core.bounded import BoundedTable
from gpuguard.core.detectors import egress, new_detectors, probing, relay
from gpuguard.core.detectors.counters import PROCESSES_PER_DEVICE_MAX
from gpuguard.core.detectors.mining import ROWS_PER_WINDOW_MAX
from gpuguard.core.ends import FlowsByEnds
from gpuguard.core.guard import Guard
from gpuguard.core.host import Host
from gpuguard.core.observations import OPENED_FLOW, FlowClosed, FlowsOpened
from gpuguard.core.policy import Policy, Rule
from gpuguard.core.records import LAUNCH, Gap, Launches, ProcessExited, ProcessSample, Sockets
from gpuguard.core.subjects import FlowId
from tests.core.builders import SECOND, T0, call, evidence, flow, pid, socket_of, sockets
from tests.core.test_guard import guard_that_hears, tick

#: Where it is made a comment says why nothing is lost.
NO_LOSS = {("beacon", "_calls"), ("counters", "looks"), ("egress", "_asked"),
           ("processes", "exited"), ("processes", "_current"), ("processes", "_ended"), ("processes", "_lines"),
           ("network", "_flow_owner")}


def tables():
    host = Host()
    for one in (*new_detectors(), host, host.processes, host.network):
        name = type(one).__module__.rpartition(".")[2]
        for attribute, table in vars(one).items():
            if isinstance(table, BoundedTable | FlowsByEnds):
                yield pytest.param(one, table, (name, attribute), id=f"{name}.{attribute}")


def counted(owner):
    return sum(owner.evicted().values()) if hasattr(owner, "evicted") else 0


@pytest.mark.parametrize(("owner", "table", "name"), [*tables()])
def test_what_a_table_forgets_is_counted(owner, table, name):
    before = counted(owner)
    (table._flows if isinstance(table, FlowsByEnds) else table).evicted += 7
    assert counted(owner) - before == (0 if name in NO_LOSS else 7)


def test_names_of_what_was_forgotten_are_nobody_elses():
    names = [name for one in (*new_detectors(), Host()) if hasattr(one, "evicted") for name in one.evicted()]
    assert len(set(names)) == len(names)


def lost(one):
    return {name: count for name, count in one._evictions().items() if count}


def test_decisions_incidents_and_tool_calls_that_are_too_many(monkeypatch):
    monkeypatch.setattr(guard, "PENDING_MAX", 2)
    monkeypatch.setattr(guard, "DECIDED_MAX", 4)
    monkeypatch.setattr(incidents, "INCIDENTS_MAX", 3)
    monkeypatch.setattr(correlation, "CALLS_OF_AGENT_MAX", 5)
    one = guard_that_hears({n: evidence(30.0, subject=pid(n)) for n in range(1, 8)})
    one._policy = Policy(rules=(Rule(name="ask", do="pause", verdict="suspect", approval=True),))
    for number in range(1, 8):
        one.receive(tick(number))
        one.receive(call(f"{number:016x}", process=pid(99)))
    found = one._evictions()
    assert found["tool calls"] == 2
    assert (found["questions to people"], found["decisions"], found["incidents"]) == (5, 3, 4)


def test_who_ends_among_too_many_is_missed_if_it_was_spoken_of(monkeypatch):
    monkeypatch.setattr(guard, "EXITED_MAX", 2)
    one = guard_that_hears({1: evidence(30.0, subject=pid(1))})
    one.receive(tick(1))
    for number in range(1, 6):
        one.receive(ProcessExited(time_ns=T0 + 2 * SECOND, process=pid(number)))
    one.receive(tick(2))
    assert lost(one) == {"processes that ended and were spoken of": 1}


def test_findings_show_the_last_gap_of_full_tables_beside_others():
    class Silent:
        takes = ()

        def evicted(self):
            return {"things": self.count}

    silent = Silent()
    silent.count = 0
    one = Guard()
    one._telling.append(silent)
    one._evicted = one._evictions()
    one.receive(Gap(time_ns=T0, sensor="packets", reason="the ring was full"))
    for minute in range(40):
        silent.count += 1
        assert len(one.receive(tick(70 * minute))) == 1
    assert [gap.sensor for gap in one._gaps] == ["packets", "core"]


def test_lists_of_sockets_do_not_miss_what_closed(monkeypatch):
    monkeypatch.setattr(network, "SOCKETS_MAX", 4)
    one, second = Host(), 0
    for second in range(0, 900, 90):
        listed = [socket_of(flow(port)) for port in range(second, second + 3)]
        one.receive(sockets(*listed, time_ns=T0 + second * SECOND))
    assert one.evicted()["sockets"] == 0
    listed = [socket_of(flow(port)) for port in range(second, second + 6)]
    one.receive(sockets(*listed, time_ns=T0 + second * SECOND))
    assert one.evicted()["sockets"] == 2


@pytest.mark.parametrize("make", [Host, egress.Detector, probing.Detector])
def test_namespaces_of_containers_that_are_gone_are_not_missed(make):
    one, seen = make(), [Host()] if make is not Host else []
    for number in range(600):
        one.receive(Sockets(time_ns=T0 + number * SECOND, netns=number, sockets=()), *seen)
    assert counted(one) == 0
    for number in range(600, 900):
        one.receive(Sockets(time_ns=T0 + 600 * SECOND, netns=number, sockets=()), *seen)
    assert counted(one) > 0


def test_processes_for_which_a_device_has_no_room(monkeypatch):
    detector = next(one for one in new_detectors() if type(one).__module__.endswith("counters"))
    detector._model = object()
    for number in range(PROCESSES_PER_DEVICE_MAX + 3):
        detector.receive(ProcessSample(T0, pid(number), "GPU-0", 1, 0.5), Host())
    assert detector.evicted()["samples beside counters"] == 3


def test_rows_for_which_a_window_has_no_room():
    rows = np.zeros(ROWS_PER_WINDOW_MAX + 9, LAUNCH)
    rows["pid"], rows["launches"], rows["first_ns"], rows["last_ns"] = 5, 1, T0, T0
    detector = next(one for one in new_detectors() if type(one).__module__.endswith("mining"))
    detector.receive(Launches(T0, rows), Host())
    assert detector.evicted()["rows of launches"] == 9


def test_what_is_read_from_a_flows_last_packet_finds_it():
    flows = FlowsByEnds(8)
    first, later = flow(1), flow(1, T0 + 5)
    near, far = (first.initiator, 1), (first.responder, first.responder_port)
    flows.know(first)
    flows.end(first)
    assert flows.find(first.netns, far, near) == first
    flows.know(later)
    flows.end(flow(2))
    assert flows.find(first.netns, near, far) == later
    flows.end(later)
    flows.end(flow(3))
    assert flows.find(first.netns, near, far) is None


@pytest.mark.parametrize(("room", "lost"), [(10, 10 * 5), (40, 0)])
def test_openings_that_somebody_may_yet_look_for(monkeypatch, room, lost):
    monkeypatch.setattr(relay, "OPENED_MAX", room)
    detector = relay.Detector()
    for second in range(0, 60, 5):
        rows = np.zeros(5, OPENED_FLOW)
        rows["start_ns"] = T0 + second * SECOND
        detector.receive(FlowsOpened(T0 + second * SECOND, rows), Host())
    assert detector.evicted()["openings of connections"] == lost


def test_a_scan_of_more_than_is_remembered_is_told_as_such(monkeypatch):
    monkeypatch.setattr(probing, "TARGETS_MAX", 8)
    detector, texts = probing.Detector(), []
    for number in range(100):
        tried = FlowId(0, 6, "10.0.0.1", 40_000 + number, f"10.0.1.{number}", 22, T0 + number, True)
        closed = FlowClosed(T0 + number, tried, "closed", 2, 0, 0, 0, 0, 0, "tcp", T0 + number)
        texts += [one.text for one in detector.receive(closed, Host())]
    assert "on at least 8 addresses and 1 port," in texts[-1]
