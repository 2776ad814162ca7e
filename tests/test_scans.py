"""Scans that open no connection: segments that belong to none, and datagrams. What looks like them comes first."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuguard.core.detectors import probing
from gpuguard.core.events import Finding, FlowReport, FlowReports
from gpuguard.core.guard import Guard
from gpuguard.core.records import PACKET, HostInfo, Packets, Tick
from gpuguard.core.ticking import ticked

S = 1_000_000_000
START = 1_700_000_000 * S
HERE, THERE = (10, 0, 0, 2), (10, 0, 0, 9)
TCP, UDP = 6, 17
FIN, SYN, RST, PSH, ACK, URG = 1, 2, 4, 8, 16, 32


def packet(at_s, source, destination, *, protocol=TCP, flags=0, size=0):
    return at_s, protocol, source, destination, flags, size


def rows_of(packets):
    rows = np.zeros(len(packets), PACKET)
    for row, (at_s, protocol, source, destination, flags, size) in zip(rows, sorted(packets), strict=True):
        row["time_ns"], row["protocol"], row["ip_version"] = START + round(at_s * S), protocol, 4
        row["tcp_flags"], row["payload_bytes"] = flags, size
        for name, (address, port) in (("source", source), ("destination", destination)):
            row[name] = np.frombuffer(b"\0" * 10 + b"\xff\xff" + bytes(address), "u1")
            row[f"{name}_port"] = port
    return rows


def told(packets):
    """Return the verdicts of a guard of HERE, which is watched for ten seconds more."""
    guard = Guard(quiet=True)
    guard.receive(HostInfo(0, 1, "b", "h", 100, addresses=(".".join(map(str, HERE)),)))
    events = [event for block in ticked([Packets(0, 0, rows_of(packets))]) for event in guard.receive(block)]
    end_ns = START + round((max(packets)[0] + 10) * S)
    events += [*guard.receive(Tick(end_ns)), *guard.close(end_ns)]
    assert any(isinstance(event, FlowReport | FlowReports) for event in events)
    found = [event for event in events if isinstance(event, Finding)]
    assert {one.label for one in found} <= {"scan"}
    return max((one.verdict for one in found), default="", key=("", "unknown", "suspect", "confirmed").index)


def probes(flags, *, answered, size=0):
    """One segment for each of 150 ports, as `nmap` sends it; answered by RST where a port is closed."""
    return [one for port in range(1, 151) for one in (
        packet(port / 100, (HERE, 44_681), (THERE, port), flags=flags, size=size),
        *([packet(port / 100 + 0.001, (THERE, port), (HERE, 44_681), flags=RST | ACK)] if answered else []))]


@pytest.mark.parametrize("answered", [True, False])
@pytest.mark.parametrize("flags", [FIN, 0, FIN | PSH | URG])
def test_segments_of_no_connection_are_a_scan(flags, answered):
    assert told(probes(flags, answered=answered)) == "confirmed"


@pytest.mark.parametrize("flags", [ACK, FIN | ACK, PSH | ACK, RST])
def test_segments_of_connections_that_are_older_are_none(flags):
    assert told(probes(flags, answered=flags != RST, size=20 if flags & PSH else 0)) == ""


def test_a_scan_from_outside_is_not_this_hosts():
    swapped = [(at_s, protocol, destination, source, flags, size)
               for at_s, protocol, source, destination, flags, size in probes(FIN, answered=True)]
    assert told(swapped) == ""


def test_who_sends_a_segment_of_no_connection_does_not_become_who_dialled():
    """The far side knows from which port it will be dialled, and speaks first."""
    near, far = (HERE, 40_000), (THERE, 443)
    packets = [packet(0, far, near, flags=FIN), packet(1, near, far, flags=SYN),
               packet(1.01, far, near, flags=SYN | ACK), packet(1.02, near, far, flags=ACK),
               packet(1.03, near, far, flags=ACK, size=9), packet(1.04, far, near, flags=ACK, size=9)]
    guard = Guard()
    guard.receive(Packets(0, 0, rows_of(packets)))
    reports = [event.closed for event in guard.close(START + 2 * S) if isinstance(event, FlowReport)]
    assert [(one.flow.initiator_port, one.flow.initiator_known, one.packets) for one in reports] == [(40_000, True, 5)]


def asked(at_s, far, port, near_port, *, times=1, size=40):
    return [packet(at_s + n, (HERE, near_port), (far, port), protocol=UDP, size=size) for n in range(times)]


def machines(count):
    return [(10, 0, 1, last) for last in range(1, count + 1)]


UNHEARD = {
    "names from two resolvers that are down": [
        one for i in range(200) for one in asked(i / 4, (10, 0, 0, 53 + i % 2), 53, 32_768 + i * 37 % 28_000, times=2)],
    "time, names, logs, figures and traps for a machine that is down": [
        one for i, port in enumerate((53, 123, 161, 514, 2055, 8125, 6343, 162))
        for one in asked(i, THERE, port, 40_000 + i)],
    "time from servers of a pool": [one for i in range(16) for one in asked(i, (93, i, 4, 9), 123, 41_000 + i)],
    "a tunnel whose peer is gone": [one for i in range(40) for one in asked(i * 5, THERE, 51_820, 51_820)],
    "an overlay of eighty nodes": [
        one for i, node in enumerate(machines(80)) for one in asked(i / 9, node, 4_789, 33_000 + i * 211 % 25_000)],
    "gossip in a cluster that is down": [
        one for i, node in enumerate(machines(60)) for one in asked(i, node, 7946, 7946)],
    "figures of machines that are down": [
        one for i, node in enumerate(machines(60)) for one in asked(i, node, 161, 33_000 + i * 211 % 25_000, times=3)],
    "a trace of a route": [asked(i / 10, THERE, 33_434 + i, 50_000 + i)[0] for i in range(90)],
    "announcements": [one for i in range(90) for one in asked(i, (239, 255, 255, 250), 1900, 40_000 + i)],
    "a stream to each of a wall of screens": [
        one for i, node in enumerate(machines(40)) for one in asked(i / 40, node, 5004, 40_000, times=9)],
    "answers to who asked before it was watched": [
        one for i in range(300) for one in asked(i / 20, THERE, 1_024 + i * 31, 53)],
    "peers of a hash table": [
        one for i in range(200) for one in asked(i / 9, (20 + i, 7, i, 9), 1_024 + i * 311 % 60_000, 6_881)],
}


@pytest.mark.parametrize("name", UNHEARD)
def test_datagrams_that_nobody_answers_are_ordinary(name):
    assert told(UNHEARD[name]) == ""


@pytest.mark.parametrize(("packets", "verdict"), [
    ([one for port in range(1, 200) for one in asked(port / 9, THERE, port, 53_646)], "confirmed"),
    ([one for port in range(1, 200) for one in asked(port / 9, THERE, port, 40_000 + port)], "confirmed"),
    ([one for i, far in enumerate(machines(120)) for one in asked(i / 9, far, 161, 53_646)], "confirmed"),
    ([one for i, far in enumerate(machines(20)) for one in asked(i / 9, far, 5060, 53_646)], "suspect"),
])
def test_datagrams_to_one_port_after_the_other_or_to_neighbours_are_a_scan(packets, verdict):
    assert told(packets) == verdict


def test_what_is_answered_is_no_scan():
    packets = [one for i, far in enumerate(machines(60)) for one in (
        *asked(i, far, 161, 53_646), packet(i + 0.01, (far, 161), (HERE, 53_646), protocol=UDP, size=90))]
    assert told(packets) == ""


def test_a_resolver_that_is_down_hides_no_scan():
    scan = [packet(i / 2, (HERE, 40_000 + i), (far, 22), flags=SYN) for i, far in enumerate(machines(60))]
    names = [one for i in range(400) for one in asked(i / 10, (10, 0, 0, 53), 53, 32_768 + i * 37 % 28_000)]
    assert told([*scan, *names]) == told(scan) == "confirmed"


@settings(max_examples=1000, deadline=None, derandomize=True)
@given(st.ip_addresses())
def test_a_first_byte_says_of_an_address_what_the_whole_address_does(address):
    assert probing._weight(str(address)) == probing._weight_of(str(address))
