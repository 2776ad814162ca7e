"""DNS and ICMP tunnels, scans, guessing of passwords, mining pools: look-alikes first, then what is to be found."""

from __future__ import annotations

import hashlib
import random
import struct
import sys
from collections import Counter
from pathlib import Path

import msgspec
import numpy as np
import pytest

from gpuguard._packets import Parser
from gpuguard.core import names
from gpuguard.core.addresses import address_bytes
from gpuguard.core.detectors import dns_tunnel, icmp_tunnel, probing, ssh_bruteforce, stratum
from gpuguard.core.facts import observations_of
from gpuguard.core.flows import FlowTable
from gpuguard.core.fusion import Fusion
from gpuguard.core.host import Host
from gpuguard.core.labels import VERDICTS
from gpuguard.core.observations import (
    CLOSED_FLOW,
    DnsSeen,
    Exchange,
    FlowClosed,
    FlowOpened,
    FlowsUnanswered,
    FlowUse,
    StratumSeen,
)
from gpuguard.core.records import PACKET, DnsMessage, HostInfo, Packets, Socket, Sockets, Tick
from gpuguard.core.subjects import FlowId, ProcessId

sys.path.insert(0, str(Path(__file__).parent))
import reference_packets

S = 1_000_000_000
START = 10**18
HERE = "10.0.0.2"
AGENT = ProcessId("boot", 77, 900)


def standings(items, detector, host=None):
    """Return the worst verdict that each subject reached, by label."""
    host, fusion, found = host or Host(), Fusion(0.1), {}
    for item in items:
        host.receive(item)
        for one in detector.receive(item, host):
            assert one.text
            assert one.start_ns <= one.time_ns
            standing, _ = fusion.receive(one)
            before = found.get((one.subject, one.label), "unknown")
            found[one.subject, one.label] = max(before, standing.verdict, key=VERDICTS.index)
    worst = {}
    for (_, label), verdict in found.items():
        if verdict != "unknown":
            worst[label] = max(verdict, worst.get(label, "unknown"), key=VERDICTS.index)
    return worst


# -- scans ------------------------------------------------------------------------------------------------------------


def tcp(responder, port, index=0, initiator=HERE):
    return FlowId(0, 6, initiator, 20_000 + index % 40_000, responder, port, START + index * S // 10)


def ended(flow, *, packets=2, out=0, into=0, reason="closed", after_s=0.1):
    end_ns = flow.start_ns + round(after_s * S)
    return FlowClosed(end_ns, flow, reason, packets, out, into, 0, 0, 0, "tcp", end_ns)


def addresses(count, prefix="10.80.0"):
    return [f"{prefix}.{last}" for last in range(1, count + 1)]


def swept(count):
    """What so many failures of one sweep weigh: the first is not known to be one's."""
    return probing.APART_NATS + (count - 1) * probing.FAILED_NATS


METADATA = ("169.254.169.254", "169.254.170.2", "169.254.170.23", "fd00:ec2::254", "168.63.129.16", "100.100.100.200",
            "169.254.0.23", "fd20:ce::254", "fd00:ec2::23")


def spoken(address, port, index):
    return ended(tcp(address, port, index), packets=40, out=900, into=9000)


def monitored(nodes):
    """Kubelets and exporters that answer; kube-proxies and what else listens on loopback alone do not."""
    return [spoken(a, port, i) if port in (10250, 9100) else ended(tcp(a, port, i))
            for i, a in enumerate(addresses(nodes))
            for port in (9100, 10249, 10250, *((10257, 10259, 2379) if i % 10 == 0 else ()))]


QUIET = {
    "boto3 where there is no cloud": [
        ended(tcp(address, 80, i), packets=4, reason="idle") for i, address in enumerate(METADATA[:4] * 5)],
    "google-auth where there is no cloud": [ended(tcp("169.254.169.254", 80, i), packets=3) for i in range(30)],
    "the libraries of all clouds in one program": [ended(tcp(a, 80, i)) for i, a in enumerate(METADATA * 3)],
    "an agent of a node, in a cloud": [
        spoken(a, port, i) for i, (a, port) in enumerate(
            [("169.254.169.254", 80), ("10.1.0.7", 10250), ("10.1.0.7", 10255), ("10.1.0.1", 6443)] * 50)],
    "an agent of a node that looks for its cloud and asks the kubelet's old port and a runtime": [
        *(ended(tcp(address, 80, i)) for i, address in enumerate(METADATA[:5])),
        spoken("10.1.0.7", 10250, 5), ended(tcp("10.1.0.7", 10255, 6)), ended(tcp("10.1.0.7", 2375, 7)),
        *(spoken("10.1.0.1", 6443, i) for i in range(8, 40))],
    "a control plane that starts": [
        *(ended(tcp(a, port, i)) for i, a in enumerate(addresses(3) * 40) for port in (2379, 2380, 6443)),
        *(spoken(a, port, 200 + i) for i, a in enumerate(addresses(3) * 40) for port in (2379, 2380, 6443))],
    "a cluster watched by its monitoring": monitored(60) * 3,
    "a rendezvous of hundreds of new places": [
        ended(tcp(f"10.1.{i % 64}.{i // 64 + 1}", 30_000 + i, i), packets=400, out=10**6, into=10**6)
        for i in range(500)],
    "a master that does not listen yet": [ended(tcp("10.0.0.9", 29_500, i)) for i in range(400)],
    "monitoring with half a rack down": [
        ended(tcp(address, 9100, i), **({"packets": 12, "out": 200, "into": 9000} if last % 2 else {}))
        for i, (last, address) in enumerate(list(enumerate(addresses(80))) * 6)],
    "health checks without a word": [ended(tcp(a, 80, i), packets=6) for i, a in enumerate(addresses(100))],
    "a few stale peers": [ended(tcp(f"93.184.{i}.7", 6881, i)) for i in range(20)],
    "workers of one machine that started anew": [
        ended(tcp("10.80.0.1", 10_000 + i * 331 % 9_000, i)) for i in range(50)],
    "a cluster of twelve nodes that is down": [
        ended(tcp(a, 7946, i), packets=1, reason="idle") for i, a in enumerate(addresses(12) * 5)],
    "peers that are gone, each on a port of its own": [
        ended(tcp(f"{i + 40}.17.{i}.3", 20_000 + i * 311 % 40_000, i), packets=1, reason="idle") for i in range(120)],
    "candidates of connections that nobody takes": [
        ended(tcp(f"{i + 40}.17.{i}.3", 30_000 + i * 7 + n * 900, i)) for i in range(20) for n in range(3)],
    "a queue of mail whose hosts nobody reaches": [
        ended(tcp(f"{i % 90 + 80}.{i}.9.25", 25, i), packets=3, reason="idle") for i in range(60)],
    "a scan from outside": [
        ended(tcp(HERE, port, port, initiator="203.0.113.9")) for port in range(1, 500)],
    "announcements to groups": [ended(tcp(f"224.0.0.{i}", 5353, i)) for i in range(1, 200)],
}


@pytest.mark.parametrize("name", QUIET)
def test_who_knows_where_its_services_are_does_not_scan(name):
    host = Host()
    host.receive(HostInfo(0, 1, "b", "h", 100, addresses=(HERE,)))
    assert standings(QUIET[name], probing.Detector(), host) == {}


@pytest.mark.parametrize(("items", "verdict"), [
    ([ended(tcp(a, 22, i)) for i, a in enumerate(addresses(100))], "confirmed"),
    ([ended(tcp("10.80.0.5", port, port)) for port in range(1, 120)], "confirmed"),
    ([ended(tcp("10.80.0.5", 30_000 + i, i)) for i in range(250)], "confirmed"),
    ([ended(tcp(f"93.184.216.{i}", 443, i), packets=1, reason="idle") for i in range(1, 40)], "suspect"),
    ([ended(tcp(f"10.{i * 37 % 200}.{i % 250}.9", 22, i)) for i in range(30)], "suspect"),
    ([ended(tcp(a, 22, i), packets=3, reason="idle") for i, a in enumerate(addresses(16))], "suspect"),
    ([ended(tcp("169.254.169.254", 80)), *(ended(tcp("10.80.0.1", port)) for port in (2375, 10250, 6443, 2379))],
     "suspect"),
    ([spoken("169.254.169.254", 80, 0), *(ended(tcp("10.80.0.1", 8000 + i, i)) for i in range(4)),
      spoken("10.80.0.1", 10250, 4), *(ended(tcp("10.80.0.1", port, 5)) for port in (2375, 2379, 6443))], "suspect"),
    ([ended(tcp(f"{i % 190 + 11}.7.{i % 250}.9", 23, i), packets=5, reason="idle") for i in range(320)], "confirmed"),
])
def test_many_first_contacts_in_vain_are_a_scan(items, verdict):
    assert standings(items, probing.Detector()) == {"scan": verdict}


def test_places_that_everybody_knows_are_named_and_weigh_by_their_kinds():
    """One kind is as good as any port; so are many of one kind, and what is answered late is taken back whole."""
    detector, host = probing.Detector(), Host()
    for i, (address, port) in enumerate([("10.80.0.1", 2379), ("10.80.0.2", 2379), ("10.80.0.1", 2380)]):
        detector.receive(ended(tcp(address, port, i)), host)
    (source,) = detector._sources.values()
    assert source.nats == 3 * probing.FAILED_NATS
    late = tcp("169.254.169.254", 80, 5)
    detector.receive(unanswered(late), host)
    assert source.nats == (3 + probing.FURTHER_KIND) * probing.FAILED_NATS
    detector.receive(ended(late, packets=40, out=900, into=9000, after_s=9), host)
    assert (source.failed, source.nats) == (3, pytest.approx(max(0.0, 1.5 + probing.ANSWERED_NATS)))
    found = [one for i, port in enumerate((*range(1, 9), 6443, 10250))
             for one in detector.receive(ended(tcp("10.80.0.1", port, 20 + i)), host)]
    assert found[-1].text.endswith(
        "; it tried cloud metadata (T1552.005), kubelet (T1613), etcd (T1613), Kubernetes control plane (T1613)")


def test_the_first_answer_of_a_kind_takes_nothing_away_and_others_do():
    detector, host = probing.Detector(), Host()
    for port in range(1, 9):
        detector.receive(ended(tcp("10.80.0.1", port, port)), host)
    (source,) = detector._sources.values()
    detector.receive(spoken("10.80.0.1", 10250, 20), host)
    detector.receive(spoken("169.254.169.254", 80, 21), host)
    assert source.nats == swept(8)
    detector.receive(spoken("10.80.0.2", 10250, 22), host)
    assert source.nats == pytest.approx(swept(8) + probing.ANSWERED_NATS)


def test_a_repeat_that_speaks_late_takes_no_other_failure_back():
    detector, host = probing.Detector(), Host()
    for port in range(1, 9):
        detector.receive(ended(tcp("10.80.0.1", port, port)), host)
    again = tcp("10.80.0.1", 1, 30)
    detector.receive(unanswered(again), host)
    detector.receive(ended(again, packets=40, out=900, into=900, after_s=9), host)
    (source,) = detector._sources.values()
    assert (source.failed, source.nats) == (8, swept(8) + 2 * probing.AGAIN_NATS)


def test_a_container_that_tries_the_ports_of_its_own_host_is_not_the_outside():
    """The bridge shows its packets to the namespace that it calls into, where they look like anybody's."""
    inside = Sockets(START - S, 4_026_532_001, (Socket(6, "172.17.0.4", 50_000, "10.9.9.9", 443, 1, 5, 0, (AGENT,)),))
    tries = [ended(tcp(HERE, port, port, initiator="172.17.0.4")) for port in (80, 81, 2375, 2379, 6443, 8080, 10_250)]
    tries += [ended(tcp("169.254.169.254", 80, 99, initiator="172.17.0.4"))]
    known = HostInfo(0, 1, "b", "h", 100, addresses=(HERE,))
    assert standings([known, *tries], probing.Detector()) == {}
    assert standings([known, inside, *tries], probing.Detector()) == {"scan": "suspect"}


def test_a_scan_of_ten_thousand_makes_few_findings():
    detector, host, subjects = probing.Detector(), Host(), set()
    for i in range(10_000):
        flow = tcp(f"10.{i >> 8 & 255}.{i & 255}.9", 22, i)
        subjects |= {one.subject for one in detector.receive(ended(flow), host)}
    assert 0 < len(subjects) < 12


def unanswered(flow):
    rows = np.zeros(1, CLOSED_FLOW)
    for name in ("netns", "start_ns", "protocol", "initiator_port", "responder_port", "initiator_known"):
        rows[name] = getattr(flow, name)
    for name in ("initiator", "responder"):
        rows[name] = np.void(address_bytes(getattr(flow, name)))
    rows["packets"] = 3
    return FlowsUnanswered(flow.start_ns + 4 * S, rows)


def live(outcome):
    """A process tries sixty addresses on a watched host; ``outcome`` says what becomes of each."""
    items = [HostInfo(0, 1, "b", "h", 100, addresses=(HERE,)), Sockets(START - S, 0, ())]
    for i, address in enumerate(addresses(60)):
        flow = tcp(address, 22, i)
        socket = Socket(6, HERE, flow.initiator_port, address, 22, 2, 100 + i, 0, (AGENT,))
        items += [Sockets(flow.start_ns + 1, 0, (socket,))]
        items += outcome(flow, i)
    return [*sorted(items, key=lambda item: item.time_ns), *(Tick(START + second * S) for second in range(5, 40))]


def test_a_process_is_named_long_before_its_attempts_run_out():
    host, detector, seen = Host(), probing.Detector(), []
    for item in live(lambda flow, i: [unanswered(flow)]):
        host.receive(item)
        seen += detector.receive(item, host)
    assert {one.subject for one in seen} == {AGENT}
    assert sum(one.nats for one in seen) > 20
    assert seen[0].time_ns - START < 6 * S
    assert "59 addresses" in seen[-1].text


def test_what_waits_for_a_list_of_sockets_and_speaks_is_no_failure():
    """The list is late: whose attempts they are is not known when they are missed, and then they are answered."""
    items = [HostInfo(0, 1, "b", "h", 100, addresses=(HERE,)), Sockets(START - S, 0, ())]
    for i, address in enumerate(addresses(60)):
        flow = tcp(address, 22, i)
        items += [unanswered(flow),
                  Exchange(flow.start_ns + 5 * S, flow, "initiator", 1000, 9, 9, 1, 0, 1, None, "tcp")]
    items.sort(key=lambda item: item.time_ns)
    assert standings([*items, Sockets(START + 60 * S, 0, ()), Tick(START + 90 * S)], probing.Detector()) == {}


def test_what_speaks_late_is_taken_back():
    detector, host = probing.Detector(), Host()
    for item in live(lambda flow, i: [unanswered(flow)]):
        host.receive(item)
        detector.receive(item, host)
    (source,) = (source for unit, source in detector._sources.entries.items() if getattr(unit, "process", None))
    assert source.failed == 60
    for i, address in enumerate(addresses(60)):
        detector.receive(ended(tcp(address, 22, i), packets=90, out=9, into=9, after_s=60), host)
    assert source.failed == 0
    assert source.nats == 0.0


def test_another_namespaces_attempts_wait_for_no_list():
    """The host sees a container's packets on the bridge, and not its sockets."""
    items = [Sockets(START - S, 0, (Socket(6, HERE, 22, "10.0.0.7", 999, 1, 5, 0, ()),))]
    items += [unanswered(tcp(a, 22, i, initiator="172.17.0.4")) for i, a in enumerate(addresses(90))]
    assert standings(items, probing.Detector()) == {"scan": "confirmed"}


def test_an_attempt_counts_once_however_it_is_told():
    detector, host = probing.Detector(), Host()
    for i, address in enumerate(addresses(8)):
        flow = tcp(address, 22, i)
        detector.receive(unanswered(flow), host)
        detector.receive(ended(flow, packets=3, reason="idle", after_s=200), host)
    (source,) = detector._sources.values()
    assert source.failed == 8
    assert source.nats == swept(8)


# -- DNS --------------------------------------------------------------------------------------------------------------


def dns(name, query_type=1, *, at_s=0.0, answer=0, port=5353, response=False, nowhere=()):
    return DnsSeen(START + round(at_s * S), 0, HERE, port, "10.0.0.53", 53, response, name, query_type, answer, nowhere)


def asked(questions, *, ports=1):
    """Questions (name, type, answer bytes), a second apart, each with its answer, from so many client ports in turn."""
    items = []
    for i, (name, query_type, answer) in enumerate(questions):
        port = 40_000 + i % ports
        if i < ports:
            flow = FlowId(0, 17, HERE, port, "10.0.0.53", 53, START + i * S)
            items.append(FlowOpened(flow.start_ns, flow))
        message = DnsMessage(0, True, name, query_type, answer)
        if names.may_carry(message):
            items += [dns(name, query_type, at_s=i, port=port),
                      dns(name, query_type, at_s=i + 0.03, port=port, answer=answer, response=True)]
    return items


def digest(i, size):
    return hashlib.sha256(str(i).encode()).hexdigest()[:size]


LOOKED_UP = {
    "a content network": [(f"{digest(i % 300, 14)}.edge.cdn-{i % 3}.example.net", 1, 90 + i % 60) for i in range(5000)],
    "a block list": [(f"{i % 200}.{i % 7}.113.203.zen.lists.example.org", 1, 4 * (i % 2)) for i in range(5000)],
    "reverse DNS": [(".".join(digest(i, 32)) + ".ip6.arpa", 12, 30) for i in range(3000)],
    "origins of addresses": [(f"{i % 250}.{i // 250}.0.8.origin.asn.example.com", 16, 48) for i in range(2000)],
    "mail": [(f"selector{i % 3}._domainkey.customer-{i}.example-{i}.com", 16, 420) for i in range(2000)],
    "antivirus": [(f"{digest(i, 32)}.files.av.example.com", 1, 4) for i in range(600)],
    "antivirus in TXT": [(f"{digest(i, 32)}.files.av.example.com", 16, 10 + i % 50) for i in range(600)],
    "reputation, some of it by alias": [(f"{digest(i, 32)}.list.example.com", (16, 16, 1, 1, 1, 5)[i % 6],
                                         (30, 0, 4, 0, 4, 12)[i % 6]) for i in range(600)],
    "mail exchangers": [(f"{digest(i % 300, 8 + i % 14)}.tenants.example.com", 15, 50) for i in range(2000)],
    "certificates": [(f"_acme-challenge.service-{i}.example.com", (5, 16)[i % 2], (0, 44)[i % 2]) for i in range(900)],
    "an inventory": [(f"{word}-{i}.internal-services.example.com", kind, 20 * (i % 40 == 0)) for i in range(200)
                     for word in ("api", "db") for kind in (1, 5, 15, 16)],
    "aliases of buckets": [(f"{digest(i % 40, 32)}.cdn.example.com", 5, 60) for i in range(3000)],
    "services by DNS-SD": [(f"printer-{i % 30}-{digest(i % 30, 6)}._ipp._tcp.example.com", (33, 16)[i % 2], 50)
                           for i in range(3000)],
    "telemetry": [(f"collector-eu-{i % 4}.telemetry.vendor-cloud.example.com", 1, 60) for i in range(5000)],
    "internal services": [(f"worker-{i % 400}.training-job.svc.cluster.local", 1, 4) for i in range(5000)],
}


def answered(addresses, name="host-{:08x}.v6.some-network.example.com"):
    """AAAA questions for ever new names, a second apart, through the parser's facts, with these addresses."""
    flow = FlowId(0, 17, HERE, 40_000, "10.0.0.53", 53, START)
    items, flows = [FlowOpened(START, flow)], FlowTable(4)
    for i, address in enumerate(addresses):
        asked_for = name.format(i * 2_654_435_761 % 2**32)
        rows = np.zeros(2, PACKET)
        rows["time_ns"], rows["protocol"] = START + i * S, 17
        ends = [list(address_bytes(one)) for one in (HERE, "10.0.0.53")]
        rows["source"], rows["destination"] = ends, ends[::-1]
        rows["source_port"], rows["destination_port"] = (40_000, 53), (53, 40_000)
        facts = (DnsMessage(0, False, asked_for, 28, 0), DnsMessage(1, True, asked_for, 28, 16, (address,)))
        seen = observations_of(flows, Packets(START, 0, rows, facts))
        items += [one for one in seen if isinstance(one, DnsSeen)]
    return items


def drawn(count, *, head=b""):
    rng = random.Random(8)
    return [head + rng.randbytes(16 - len(head)) for _ in range(count)]


GIVEN_OUT = {
    "a content network of IPv6": drawn(400, head=bytes.fromhex("26064700")),
    "homes, each with its provider's prefix": [bytes([0x20 | one[0] & 0x1F]) + one[1:] for one in drawn(400)],
    "local ones": drawn(200, head=b"\xfd"),
    "IPv4, mapped and translated": drawn(200, head=bytes(10) + b"\xff\xff") + drawn(200, head=b"\0\x64\xff\x9b"),
    "a mesh of its own": drawn(200, head=b"\x02"),
    "a network whose prefixes were made up": [one for part in (b"\xab\xcd\0", b"\x40\0\0") for net in range(4)
                                              for one in drawn(60, head=part + bytes([net]))],
    "made up ones, some": drawn(12),
}


@pytest.mark.parametrize("name", GIVEN_OUT)
def test_addresses_that_are_given_out_are_no_tunnel(name):
    assert standings(answered(GIVEN_OUT[name]), dns_tunnel.Detector()) == {}


def test_answers_that_point_nowhere_are_a_tunnel():
    assert standings(answered(drawn(60)), dns_tunnel.Detector()) == {"dns-tunnel": "suspect"}
    assert standings(answered(drawn(1500)), dns_tunnel.Detector()) == {"dns-tunnel": "confirmed"}


@pytest.mark.parametrize("name", LOOKED_UP)
@pytest.mark.parametrize("ports", [1, 1000])
def test_ordinary_look_ups_are_no_tunnel(name, ports):
    assert standings(asked(LOOKED_UP[name], ports=ports), dns_tunnel.Detector()) == {}


TUNNELS = {
    "names both ways": ([(f"{digest(i, 60)}.{digest(-i, 60)}.t.example.com", 5, 80 + i % 9) for i in range(800)],
                        "confirmed"),
    "NULL records": ([(f"{digest(i, 60)}.{digest(-i, 40)}.t.example.com", 10, 300 + i % 9) for i in range(200)],
                     "confirmed"),
    "a shell that polls, answered by short names": (
        [(f"{digest(i, 36)}.{digest(-i, (0, 0, 60)[i % 3])}".rstrip(".") + ".t.example.com", (5, 15, 16)[i * 7 % 3],
          22 + i % 5) for i in range(60)], "suspect"),
    "commands in TXT": ([(f"l.{i}.ns.example.com", 16, 255) for i in range(19)], "suspect"),
    "exfiltration one way": ([(f"{digest(i, 60)}.{digest(-i, 60)}.x.example.com", 1, 4) for i in range(1200)],
                             "suspect"),
    "slow exfiltration, 0.7 bytes a second": (
        [(f"{digest(i, 60)}.{digest(-i, 60)}.x.example.com", 1, 4) if i % 150 == 0 else ("a.b.c", 1, 4)
         for i in range(86_000)], "suspect"),
}


@pytest.mark.parametrize("name", TUNNELS)
@pytest.mark.parametrize("ports", [1, 100_000])
def test_new_information_is_a_tunnel(name, ports):
    questions, verdict = TUNNELS[name]
    assert standings(asked(questions, ports=ports), dns_tunnel.Detector()) == {"dns-tunnel": verdict}


def test_what_was_told_of_a_flow_is_not_told_of_it_again_after_another():
    """Two sockets that take turns: the account is that of both, and weighs once for each."""
    detector, host, told = dns_tunnel.Detector(), Host(), Counter()
    items = asked([(f"{digest(i, 60)}.t.example.com", 16, 150) for i in range(240)], ports=2)
    for item in items:
        turn = ((item.time_ns - START) // S).bit_length() // 2 % 2
        by_turns = isinstance(item, DnsSeen) and msgspec.structs.replace(item, client_port=40_000 + turn)
        for one in detector.receive(by_turns or item, host):
            told[one.subject.initiator_port] += one.nats
    (domain,) = detector._domains.values()
    assert set(told) == {40_000, 40_001}
    assert max(told.values()) <= dns_tunnel._weigh(domain)[1]


def test_a_resolver_that_is_asked_from_outside_is_left_alone():
    host = Host()
    host.receive(HostInfo(0, 1, "b", "h", 100, addresses=("10.0.0.53",)))
    assert standings(asked(TUNNELS["NULL records"][0]), dns_tunnel.Detector(), host) == {}


def test_the_memory_of_a_domain_is_constant():
    detector = dns_tunnel.Detector()
    for item in asked([(f"{digest(i, 60)}.t.example.com", 16, 90) for i in range(20_000)]):
        detector.receive(item, Host())
    (domain,) = detector._domains.values()
    assert domain.seen.bit_length() <= dns_tunnel.SEEN_BITS
    assert domain.names <= dns_tunnel.SEEN_BITS
    assert len(domain.told) == 1


@pytest.mark.parametrize(("name", "zone", "size"), [
    ("www.example.com", "example.com", 3), ("a.b.example.co.uk.", "example.co.uk", 2), ("example.com", "", 0),
    ("4.3.2.1.in-addr.arpa", "", 0), (r"a\190\046b.t.example.test", "example.test", 5), ("", "", 0),
])
def test_a_name_is_parted_at_its_domain(name, zone, size):
    assert dns_tunnel._split(name) == (zone, size)


def dns_block(seed, count=120):
    """Packets of a few flows, some of them DNS messages that may carry data, some that may not."""
    rng = random.Random(seed)
    rows = np.zeros(count, PACKET)
    rows["time_ns"] = START + np.arange(count) * 50_000_000
    rows["source"][:, 10:12] = rows["destination"][:, 10:12] = 255
    rows["protocol"], rows["ip_version"], rows["payload_bytes"] = 17, 4, 90
    facts = []
    for row in range(count):
        out = rng.random() < 0.5
        ends = ([10, 0, 0, 2], 40_000 + rng.randrange(4)), ([10, 0, 0, 53], 53)
        (near, near_port), (far, far_port) = ends if out else ends[::-1]
        rows["source"][row, 12:], rows["destination"][row, 12:] = near, far
        rows["source_port"][row], rows["destination_port"][row] = near_port, far_port
        if rng.random() < 0.6:
            name = digest(row, rng.choice((4, 40))) + ".t.example.com"
            facts.append(DnsMessage(row, not out, name, rng.choice((1, 16)), 0 if out else 200))
    return Packets(START, 0, rows, tuple(facts))


@pytest.mark.parametrize("seed", range(20))
def test_cutting_a_block_changes_nothing(seed):
    block = dns_block(seed)
    whole = list(observations_of(FlowTable(), block))
    assert sum(isinstance(one, DnsSeen) for one in whole) == sum(map(names.may_carry, block.facts)) > 10
    flows, parts, cut = FlowTable(), [], random.Random(seed).randrange(1, len(block.rows))
    for start, end in ((0, cut), (cut, len(block.rows))):
        facts = tuple(DnsMessage(f.row - start, f.is_response, f.name, f.query_type, f.answer_bytes)
                      for f in block.facts if start <= f.row < end)
        parts += observations_of(flows, Packets(START, 0, block.rows[start:end], facts))
    assert parts == whole
    assert [one for one in whole if not isinstance(one, DnsSeen)] == FlowTable().receive(block)
    assert all({one.client, one.server} == {HERE, "10.0.0.53"} for one in whole if isinstance(one, DnsSeen))


@pytest.mark.parametrize("row", [-5, 0, 10**6])
def test_facts_that_point_nowhere_break_nothing(row):
    fact = DnsMessage(row, False, "a" * 40 + ".example.com", 16, 9)
    empty = Packets(START, 0, np.zeros(0, PACKET), (fact,))
    assert list(observations_of(FlowTable(), empty)) == []
    block = Packets(START, 0, dns_block(1).rows[:3], (fact, fact))
    assert sum(isinstance(one, DnsSeen) for one in observations_of(FlowTable(), block)) >= 1


# -- ICMP -------------------------------------------------------------------------------------------------------------

ECHO = FlowId(0, 1, HERE, 7, "203.0.113.9", 7, START)


def echoes(rows, flow=ECHO):
    """Exchanges of (gap s, question, answer) in a conversation of echoes."""
    now, out, into, items = START, 0, 0, []
    for count, (gap_s, question, answer) in enumerate(rows, 1):
        now, out, into = now + round(gap_s * S), out + question, into + answer
        items.append(Exchange(now, flow, "initiator", 30_000_000, question, answer, count, 0, count, None, "icmp",
                              out, into))
    return [*items, FlowClosed(now + S, flow, "idle", 2 * len(items), out, into, 0, 0, 0, "icmp", now + S)]


PINGS = {
    "ping": [(1.0, 56, 56)] * 500,
    "lost answers": [(1.0, 56, 56 * (i % 3 > 0)) for i in range(500)],
    "duplicated answers": [(1.0, 56, 112)] * 500,
    "a sweep of sizes": [(1.0, size, size) for size in range(8, 1400, 8)],
    "monitors of several kinds": [(0.3 + i % 7, (32, 56, 64)[i % 3], (32, 56, 64)[i % 3]) for i in range(500)],
}


@pytest.mark.parametrize("name", PINGS)
def test_echoes_are_no_tunnel(name):
    assert standings(echoes(PINGS[name]), icmp_tunnel.Detector()) == {}


def tunnelled(count):
    rng = random.Random(4)
    return [(rng.lognormvariate(-1, 0.8), rng.choice((28, 64, 72, 152)), rng.choice((28, 64, 300, 900)))
            for _ in range(count)]


def test_answers_that_hold_more_than_was_asked_are_a_tunnel():
    assert standings(echoes(tunnelled(60)), icmp_tunnel.Detector()) == {"icmp-tunnel": "confirmed"}
    assert standings(echoes(tunnelled(8)), icmp_tunnel.Detector()) == {"icmp-tunnel": "suspect"}


def test_a_tunnel_through_echoes_does_not_clear_itself_by_what_it_sends_later():
    # IP packets in echoes: a key exchange comes in, then a file goes out in questions that are answered by less.
    uploads = [(0.05 * (1 + i % 5), 900, 28) for i in range(60)]
    assert standings(echoes(tunnelled(60) + uploads), icmp_tunnel.Detector()) == {"icmp-tunnel": "confirmed"}
    assert standings(echoes(uploads), icmp_tunnel.Detector()) == {}


def echo_rows(pairs, *, late=0):
    """The packets of (question, answers) once a second; of ``late`` the answers come so many questions later."""
    asked = [(number + 1.0, 0, number, question) for number, (question, _) in enumerate(pairs)]
    came = [(number + late + 1.03, 1, number, size) for number, (_, answers) in enumerate(pairs) for size in answers]
    rows = np.zeros(len(asked) + len(came), PACKET)
    for row, (at_s, back, number, size) in zip(rows, sorted(asked + came), strict=True):
        ends = [list(address_bytes(one)) for one in (HERE, "203.0.113.9")]
        row["source"], row["destination"] = ends[::-1] if back else ends
        row["time_ns"], row["source_port"], row["destination_port"] = START + round(at_s * S), 0 if back else 8 << 8, 7
        row["sequence"], row["payload_bytes"], row["protocol"], row["ip_version"] = number, size, 1, 4
    return rows


PAIRS = {
    "sweep": [(size, (size,)) for size in range(8, 1400, 8)],
    "truncated": [(size, (min(size, 64),)) for size in range(8, 1400, 8)],
    "lost": [(size, (size,) * (size % 3 > 0)) for size in range(8, 543, 5)],
    "duplicated": [(56, (56, 56))] * 200,
    "truncated by one of two": [(size, (min(size, (64, 512)[size % 3 > 0]),)) for size in range(8, 1400, 8)],
    "padded to one length": [(size, (46,)) for size in range(26, 56)][:20],
    "padded by one amount": [(56, (60,))] * 60,
}


@pytest.mark.parametrize("late", [0, 3])
@pytest.mark.parametrize("name", PAIRS)
def test_pairs_of_echoes_are_no_tunnel(name, late):
    flows = FlowTable(quiet=True)
    seen = flows.receive(Packets(START, 0, echo_rows(PAIRS[name], late=late)))
    assert standings([*seen, *flows.close(START + 10**12)], icmp_tunnel.Detector()) == {}


@pytest.mark.parametrize("late", [0, 3])
@pytest.mark.parametrize("quiet", [True, False])
def test_a_shell_whose_commands_come_in_answers_is_found_whatever_it_sends(quiet, late):
    # A client that asks with nothing; commands come back, and far more goes out in questions that nothing answers.
    commands = [(0, (len(one),)) for one in ("id", "uname -a", "ps aux", "ls -la /etc", "whoami", "df -h")]
    pairs = [one for command in commands for one in (*[(0, (0,))] * 7, command, *[(64, (0,))] * 20)]
    flows = FlowTable(quiet=quiet)
    seen = flows.receive(Packets(START, 0, echo_rows(pairs, late=late)))
    (text, *_) = [one.text for item in seen for one in (icmp_tunnel.Detector().receive(item, Host()))]
    assert text == "22 answers were longer or shorter than the echoes that they answer, 10 bytes more in all"
    assert standings([*seen, *flows.close(START + 10**12)], icmp_tunnel.Detector()) == {"icmp-tunnel": "suspect"}


def test_the_memory_of_a_conversation_of_echoes_is_bounded():
    detector = icmp_tunnel.Detector()
    for item in echoes([(1.0, 8, size) for size in range(1, 2_000)])[:-1]:
        detector.receive(item, Host())
    (echo,) = detector._flows.values()
    assert max(len(echo.questions), len(echo.answers), len(echo.times_ns)) <= icmp_tunnel.TIMES_MAX


def test_who_types_in_a_tunnel_through_echoes_is_said():
    def said(detector, **how):
        items = [msgspec.structs.replace(one, **how) if isinstance(one, Exchange) else one
                 for one in echoes(tunnelled(60))]
        return [one.text for item in items for one in detector.receive(item, Host())]

    for first, delay_ns, typed in (("responder", 400_000, True), ("responder", 30_000_000, False),
                                   ("initiator", 400_000, False)):
        texts = said(icmp_tunnel.Detector(), first=first, answer_delay_ns=delay_ns)
        assert any("broke the silence" in one for one in texts) == typed


HOME = Host()
HOME.receive(HostInfo(0, 1, "b", "h", 100, addresses=(HERE,)))
REQUEST, REPLY, TIME, TIME_REPLY, INFORMATION = 8, 0, 13, 14, 15


def icmp_rows(packets, *, protocol=1, gap_s=0.2):
    """Packets of (sent by the far side, type, size), all with one identifier."""
    rows = np.zeros(len(packets), PACKET)
    ends = [list(address_bytes(one)) for one in (HERE, "203.0.113.9")]
    for number, (row, (back, kind, size)) in enumerate(zip(rows, packets, strict=True)):
        row["source"], row["destination"] = ends[::-1] if back else ends
        row["time_ns"], row["source_port"], row["destination_port"] = START + round(number * gap_s * S), kind << 8, 7
        row["sequence"], row["payload_bytes"], row["protocol"], row["ip_version"] = number, size, protocol, 4
    return rows


def sizes_at_random(count):
    rng = random.Random(3)
    return [rng.randint(200, 900) for _ in range(count)]


def search(low, high):
    """What a search for the path MTU asks where the lower half is let through: each size three times."""
    while high - low > 1:
        size = (low + high) // 2
        yield from (size,) * 3
        low, high = (size, high) if size < 3000 else (low, size)


ONE_WAY = {
    "a dead host": [(0, REQUEST, 56)] * 500,
    "monitors of a dead host": [(0, REQUEST, (32, 56, 64, 1472)[number % 4]) for number in range(500)],
    "a search for the MTU, silent": [(0, REQUEST, size) for size in search(576, 65_000)],
    "a sweep of sizes, silent": [(0, REQUEST, size) for size in (*range(8, 1400, 8), *range(8, 1400, 8))],
    "timestamps": [(number % 2, TIME + number % 2, 12) for number in range(400)],
    "timestamps, one padded": [(0, TIME, 12 + 400 * (number == 3)) for number in range(10)],
    "a scan that pads": [(0, TIME, 400)] * 10,
    "information requests": [(0, INFORMATION, 0)] * 200,
    "errors that quote": [(0, (3, 11)[number % 2], 28 + number * 7 % 540) for number in range(400)],
    "answers of others": [(1, REPLY, size) for size in sizes_at_random(200)],
    "requests of which most were lost": [(0, REPLY, 56)] * 15 + [(1, REQUEST, 56)] + [(0, REPLY, 56)] * 200,
    "answers as small as ping's, a few": [(0, REPLY, 56)] * 30,
    "whom others fill timestamps for": [(1, TIME, 400)] * 100,
    "whom others ask in all sizes": [(1, REQUEST, size) for size in sizes_at_random(100)],
}


def told_of_icmp(rows, *, quiet=True):
    flows = FlowTable(quiet=quiet)
    seen = flows.receive(Packets(START, 0, rows))
    return standings([*seen, *flows.close(START + 10**12)], icmp_tunnel.Detector(), HOME)


@pytest.mark.parametrize("name", ONE_WAY)
def test_what_goes_one_way_need_not_be_a_tunnel(name):
    assert told_of_icmp(icmp_rows(ONE_WAY[name])) == {}


def test_neighbours_routers_and_listeners_of_ipv6_are_no_echoes():
    kinds = [(0, kind, 16 + number * 8 % 200) for number, kind in enumerate((133, 135, 136, 143) * 60)]
    assert told_of_icmp(icmp_rows(kinds, protocol=58)) == {}


FILLED = {
    "questions that nobody answers": [(0, REQUEST, size) for size in sizes_at_random(60)],
    "answers that nobody asked for": [(0, REPLY, 900)] * 60,
    "both in answers only, the far side first": [(number % 2 == 0, REPLY, 100 + number) for number in range(60)],
    "timestamps": [one for _ in range(60) for one in ((0, TIME, 400), (1, TIME_REPLY, 12))],
    "information requests": [(0, INFORMATION, 300)] * 60,
}


@pytest.mark.parametrize("quiet", [True, False])
@pytest.mark.parametrize("name", FILLED)
def test_what_nobody_would_send_is_a_tunnel(name, quiet):
    assert told_of_icmp(icmp_rows(FILLED[name]), quiet=quiet) == {"icmp-tunnel": "suspect"}


def test_what_goes_one_way_for_long_is_told_again_but_never_confirmed():
    rows = icmp_rows([(0, REQUEST, size) for size in sizes_at_random(2000)], gap_s=0.01)
    assert told_of_icmp(rows) == {"icmp-tunnel": "suspect"}


def test_answers_shorter_than_their_questions_are_a_tunnel():
    rng = random.Random(5)
    pairs = [(rng.choice((32, 32, rng.randint(60, 900))), (rng.choice((32, 40, 90)),)) for _ in range(60)]
    flows = FlowTable(quiet=True)
    seen = flows.receive(Packets(START, 0, echo_rows(pairs)))
    assert "icmp-tunnel" in standings([*seen, *flows.close(START + 10**12)], icmp_tunnel.Detector(), HOME)


def test_two_that_ask_with_one_identifier_are_no_tunnel():
    """Two processes (pid 7 of two containers on the host's network) ask at once, in sizes that vary."""
    rows = icmp_rows([one for number in range(100) for one in (
        (0, REQUEST, 56 + number % 5), (0, REQUEST, 1000 + number % 7), (1, REPLY, 56 + number % 5),
        (1, REPLY, 1000 + number % 7))], gap_s=0.1)
    rows["sequence"] //= 4
    assert told_of_icmp(rows) == {}


def test_who_is_pinged_did_nothing():
    host = Host()
    host.receive(HostInfo(0, 1, "b", "h", 100, addresses=("203.0.113.9",)))
    assert standings(echoes(tunnelled(60)), icmp_tunnel.Detector(), host) == {}
    for pairs in PAIRS.values():
        assert standings(FlowTable(quiet=True).receive(Packets(START, 0, echo_rows(pairs))), icmp_tunnel.Detector(),
                         host) == {}


def test_what_this_host_answers_otherwise_than_it_was_asked_is_a_tunnel():
    """Commands come in the far side's questions, what they print goes back in the answers of this host."""
    host, rng = Host(), random.Random(6)
    host.receive(HostInfo(0, 1, "b", "h", 100, addresses=("203.0.113.9",)))
    rows = echo_rows([(48, (rng.randint(3, 900),)) for _ in range(200)])
    seen = FlowTable(quiet=True).receive(Packets(START, 0, rows))
    assert standings(seen, icmp_tunnel.Detector(), host) == {"icmp-tunnel": "suspect"}


# -- guessing ---------------------------------------------------------------------------------------------------------


def logins(count, *, let_in=lambda i: False, gap_s=5, out=2700, into=2400, server="10.0.0.9", near=HERE):
    items = []
    for i in range(count):
        flow = FlowId(0, 6, near, 30_000 + i, server, 22, START + i * gap_s * S)
        if let_in(i):
            items.append(FlowUse(flow.start_ns + S, flow, "authenticated", "ssh", 0.0, "let in", flow.start_ns, 20))
        end_ns = flow.start_ns + 3 * S
        items.append(FlowClosed(end_ns, flow, "closed", 40, out, into, 2, 1, 2, "ssh", end_ns))
    return items


@pytest.mark.parametrize("items", [
    logins(500, let_in=lambda i: True, gap_s=1), logins(500, let_in=lambda i: i % 6 == 0), logins(500, gap_s=300),
    logins(500, out=30, into=45), logins(6), logins(60, out=90_000), logins(60, near="203.0.113.9", server=HERE),
])
def test_whoever_is_let_in_or_seldom_tries_is_no_guesser(items):
    host = Host()
    host.receive(HostInfo(0, 1, "b", "h", 100, addresses=(HERE,)))
    assert standings(items, ssh_bruteforce.Detector(), host) == {}


def test_refused_again_and_again_is_guessing():
    assert standings(logins(12), ssh_bruteforce.Detector()) == {"ssh-bruteforce": "suspect"}
    assert standings(logins(60), ssh_bruteforce.Detector()) == {"ssh-bruteforce": "confirmed"}


def test_a_process_that_guesses_is_weighed_once():
    host, detector, seen = Host(), ssh_bruteforce.Detector(), []
    for item in logins(19):
        near, far = (item.flow.initiator, item.flow.initiator_port), (item.flow.responder, item.flow.responder_port)
        host.receive(Sockets(item.time_ns - S, 0, (Socket(6, *near, *far, 1, 1, 0, (AGENT,)),)))
        seen += detector.receive(item, host)
    assert {one.subject for one in seen} == {AGENT}
    assert sum(one.nats for one in seen) == 18 - ssh_bruteforce.FREE_FAILURES


def owned(items, owner_of):
    """What the detector tells of these logins, whose sockets show them to be of owner_of(number)."""
    host, detector, seen = Host(), ssh_bruteforce.Detector(), []
    for number, item in enumerate(items):
        near, far = (item.flow.initiator, item.flow.initiator_port), (item.flow.responder, item.flow.responder_port)
        owner = owner_of(number)
        if owner:
            host.receive(Sockets(item.time_ns - S // 2, 0, (Socket(6, *near, *far, 1, number, 0, (owner,)),)))
        seen += detector.receive(item, host)
    return seen


OTHER = ProcessId("b", 78, 5)


@pytest.mark.parametrize("at", [0, 8, 17, 35, 59])
def test_who_fails_once_beside_a_guesser_is_not_blamed_for_it(at):
    seen = owned(logins(60), lambda number: OTHER if number == at else AGENT)
    assert {one.subject for one in seen} == {AGENT}
    assert sum(one.nats for one in seen) == ssh_bruteforce.NATS_MAX


def test_two_that_guess_in_turn_are_each_told_of_their_own():
    seen = owned(logins(24), lambda number: (AGENT, OTHER)[number % 2])
    for process in (AGENT, OTHER):
        told = [one for one in seen if one.subject == process]
        assert sum(one.nats for one in told) <= 12 - ssh_bruteforce.FREE_FAILURES
        assert [one.text[:14] for one in told] == ["9 connections "]


def test_a_loop_that_starts_a_process_for_each_guess_is_guessing():
    seen = owned(logins(40), lambda number: ProcessId("b", 1000 + number, 5))
    assert [one.text.split(" came")[0] for one in seen] == [
        f"{count} connections to 1 SSH server, of processes that tried a few times each," for count in (9, 18, 36)]


def test_who_guesses_at_many_servers_is_told_of_at_least_as_many_as_are_kept():
    items = [one for i in range(40) for one in logins(1, server=f"10.0.1.{i}")]
    told = owned(items, lambda _: AGENT)
    assert [one.text.split(" SSH")[0] for one in told] == [
        "9 connections to 9", "18 connections to 18", "36 connections to at least 32"]


def test_a_login_ends_the_suspicion_of_its_process_and_of_all_where_that_is_not_known():
    items = logins(12, let_in=lambda i: i == 8)  # the ninth is two items: its login, and its end
    mine, others = (lambda _: AGENT), (lambda number: OTHER if number in (8, 9) else AGENT)
    unknown = lambda number: None if number in (8, 9) else AGENT
    assert [len(owned(items, owner_of)) for owner_of in (mine, others, unknown)] == [0, 1, 0]


def test_no_table_grows_without_end():
    detector = ssh_bruteforce.Detector()
    for i in range(ssh_bruteforce.SOURCES_MAX + 50):
        for item in logins(1, near=f"10.3.{i >> 8}.{i & 255}"):
            detector.receive(item, Host())
    assert len(detector._sources) == ssh_bruteforce.SOURCES_MAX
    pings, scans = icmp_tunnel.Detector(), probing.Detector()
    for i in range(icmp_tunnel.FLOWS_MAX + 50):
        flow = FlowId(0, 1, HERE, i, "203.0.113.9", i, START + i)
        pings.receive(echoes([(1, 56, 56)], flow)[0], Host())
        scans.receive(ended(tcp("10.80.0.1", 22, i, initiator=f"10.3.{i >> 8}.{i & 255}")), Host())
    assert len(pings._flows) == icmp_tunnel.FLOWS_MAX
    assert len(scans._sources) == probing.SOURCES_MAX


# -- mining pools -----------------------------------------------------------------------------------------------------

SUBSCRIBE = b'{"id":1,"method":"mining.subscribe","params":["miner/1.0",null]}\n'
LOGIN = b'{"method":"login","params":{"login":"48x","pass":"x","agent":"m/1"},"id":1}\n'
JOB = b'{"id":1,"jsonrpc":"2.0","error":null,"result":{"id":"4","job":{"blob":"06","job_id":"7","target":"dc46"}}}\n'
ETHPROXY = b'{"id":1, "method": "eth_submitLogin", "params": ["0xabc"]}\n'

TALK_OF_OTHERS = [
    b'{"id":0,"method":"server.version","params":["electrum",["1.4","1.4.2"]]}\n',
    b'{"jsonrpc":"2.0","id":1,"method":"eth_getBalance","params":["0x0","latest"]}\n',
    b'{"method":"login","params":{"user":"anna","password":"x"},"id":1}\n',
    b'{"method":"login","params":{"user":"ci","pass":"x"},"id":1}\n',
    b'{"method":"submit","params":{"script":"train.sh"},"id":1}\n',
    b'{"level":"info","job":"train","message":"mining.subscribe is a method of Stratum"}\n',
    b'{"method":"mining."}\n', b'{"method":', b"{\n", b"{",
    b'{"method":' + b" " * 2100 + b'"mining.subscribe"}\n', b' {"method":"mining.subscribe"}\n',
]


POST = b"POST / HTTP/1.1\r\nHost: node\r\nContent-Type: application/json\r\n\r\n"
CALLS_OF_OTHERS = [
    POST + b'{"id":1,"method":"%s","params":[]}' % one for one in (
        b"getblockchaininfo", b"getblock", b"getrawmempool", b"getmininginfo", b"sendrawtransaction", b"eth_call",
        b"eth_sendRawTransaction", b"eth_submit", b"login", b"submit", b"getworkspace", b"get_info", b"mining.list")
] + [
    POST.replace(b"POST", b"PUT") + b'{"id":1,"method":"getblocktemplate"}',
    POST + b'x={"method":"getblocktemplate"}',
    POST + b'{"method":getblocktemplate}',
    POST + b'{"text":"' + b" " * 2100 + b'","method":"getblocktemplate"}',
    POST + b'\r\n{"method":"getblocktemplate"}',
    b"POST the method: getblocktemplate\n\n" + b'{"method":"getblocktemplate"}',
    b'HTTP/1.1 200 OK\r\n\r\n{"method":"getblocktemplate"}',
]


def opened_with(*lines, cut=10**6):
    """The rows and facts of a connection whose sides begin with these lines, in segments of at most ``cut`` bytes."""
    parser, time_ns = Parser(), START
    for side, line in enumerate(lines):
        ends = [(bytes((10, 0, 0, 2)), 40_000), (bytes((203, 0, 113, 9)), 443)][::1 if side == 0 else -1]
        segments = [(0, 2 if side == 0 else 18, b"")]
        segments += [(1 + at, 24, line[at:at + cut]) for at in range(0, len(line), cut)]
        for sequence, flags, data in segments:
            (near, near_port), (far, far_port) = ends
            header = struct.pack(">HHIIBBHHH", near_port, far_port, sequence, 1, 80, flags, 0, 0, 0)
            size = 20 + len(header) + len(data)
            time_ns += 1_000_000
            parser.frame(101, struct.pack(">BBHHHBBH4s4s", 69, 0, size, 0, 0, 64, 6, 0, near, far) + header + data,
                         time_ns)
    rows, facts = parser.take()
    return Packets(START, 0, rows, facts)


def told_of(block, host=None):
    return standings(observations_of(FlowTable(), block), stratum.Detector(), host)


@pytest.mark.parametrize("line", TALK_OF_OTHERS)
@pytest.mark.parametrize("cut", [1, 10**6])
def test_json_of_others_is_no_pools(line, cut):
    assert opened_with(line, cut=cut).facts == ()
    assert reference_packets.stream_facts(line, [(len(line), 0)], 1, 0) == []


@pytest.mark.parametrize(("lines", "methods", "verdict"), [
    ((SUBSCRIBE,), ["mining.subscribe"], "confirmed"), ((LOGIN, JOB), ["login", "job"], "confirmed"),
    ((LOGIN,), ["login"], "suspect"), ((ETHPROXY,), ["eth_submitLogin"], "suspect"),
])
@pytest.mark.parametrize("cut", [1, 7, 10**6])
def test_the_first_line_of_a_miner_names_it(lines, methods, verdict, cut):
    block = opened_with(*lines, cut=cut)
    assert [fact.method for fact in block.facts] == methods
    plain = [fact for line in lines for fact in reference_packets.stream_facts(line, [(len(line), 0)], 1, 0)]
    assert [fact.method for fact in plain] == methods
    assert told_of(block) == {"mining-pool": verdict}


@pytest.mark.parametrize("line", CALLS_OF_OTHERS)
def test_calls_of_others_over_http_are_no_miners(line):
    assert opened_with(line).facts == ()
    assert reference_packets.stream_facts(line, [(len(line), 0)], 1, 0) == []


@pytest.mark.parametrize("method", ["getblocktemplate", "get_block_template", "getwork", "submitblock", "submit_block",
                                    "eth_getWork", "eth_submitWork", "eth_submitHashrate"])
@pytest.mark.parametrize("body", ['{"jsonrpc": "2.0", "id": 0, "method": "%s", "params": []}', '[{"method":"%s"}]'])
def test_who_asks_a_node_for_work_over_http_mines(method, body):
    line = POST + (body % method).encode()
    for cut in (len(POST), 10**6):
        block = opened_with(line, cut=cut)
        assert [fact.method for fact in block.facts] == [method]
        assert told_of(block) == {"mining-pool": "suspect"}
    edges = [(len(POST), 0), (len(line), 0)]
    assert [fact.method for fact in reference_packets.stream_facts(line, edges, 1, 0)] == [method]


def test_a_pool_of_this_host_is_dialled_by_others():
    host = Host()
    host.receive(HostInfo(0, 1, "b", "h", 100, addresses=("203.0.113.9",)))
    assert told_of(opened_with(SUBSCRIBE), host) == {}


def test_a_pools_method_without_its_opening_is_nobodys():
    assert standings([StratumSeen(START, 0, HERE, 1, "203.0.113.9", 443, "mining.submit")], stratum.Detector()) == {}
