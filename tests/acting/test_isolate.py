"""Isolate: nothing of the tree leaves the host, its neighbours and its loopback are untouched, and it comes back."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest

from gpuguard import proctree
from gpuguard.broker import boxes
from gpuguard.broker.actions import isolate
from tests.acting.tools import act, until

pytestmark = [
    pytest.mark.privileged,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: network namespaces and nftables"),
    pytest.mark.skipif(not all(map(shutil.which, ("ip", "nft", "nsenter"))), reason="needs ip, nft and nsenter"),
]

ECHO = """
import selectors, socket, sys
chosen = selectors.DefaultSelector()
tcp = socket.create_server(("0.0.0.0", 7000))
udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); udp.bind(("0.0.0.0", 7000))
chosen.register(tcp, selectors.EVENT_READ); chosen.register(udp, selectors.EVENT_READ)
print("ready", flush=True)
while True:
    for key, _ in chosen.select():
        if key.fileobj is tcp:
            peer, _ = tcp.accept(); chosen.register(peer, selectors.EVENT_READ)
        elif key.fileobj is udp:
            data, address = udp.recvfrom(99)
            try: udp.sendto(data, address)
            except OSError: pass
        else:
            try: data = key.fileobj.recv(99)
            except OSError: data = b""
            if data: key.fileobj.send(data)
            else: chosen.unregister(key.fileobj); key.fileobj.close()
"""

#: Counts echoes: TCP to the far side on one long-lived connection, UDP on one long-lived socket, TCP over loopback.
CLIENT = """
import json, os, socket, sys, threading, time
counts = {"tcp": 0, "udp": 0, "lo": 0, "errors": 0, "opened": 0}
if len(sys.argv) > 2 and os.fork() != 0:
    time.sleep(600)
def tcp(name, address):
    peer = None
    while True:
        try:
            if peer is None:
                peer = socket.create_connection((address, 7000), timeout=0.3)
                peer.settimeout(100)
                counts["opened"] += name == "tcp"
            peer.send(b"x")
            if peer.recv(9): counts[name] += 1
        except OSError:
            counts["errors"] += 1
            if peer: peer.close()
            peer = None
        time.sleep(0.005)
def udp():
    one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    one.settimeout(0.1)
    while True:
        try:
            one.sendto(b"x", ("10.99.0.2", 7000))
            if one.recv(9): counts["udp"] += 1
        except OSError: pass
        time.sleep(0.005)
for work in (lambda: tcp("tcp", "10.99.0.2"), lambda: tcp("lo", "127.0.0.1"), udp):
    threading.Thread(target=work, daemon=True).start()
while True:
    open(sys.argv[1] + ".new", "w").write(json.dumps(counts)); os.rename(sys.argv[1] + ".new", sys.argv[1])
    time.sleep(0.005)
"""


class Network:
    """Two network namespaces joined by a veth, an echo server in each; `client` starts one in the near side."""

    def __init__(self, spawn, tmp_path):
        self._spawn, self._tmp_path = spawn, tmp_path
        hold = ["unshare", "-n", "sh", "-c", "ip link set lo up && echo ready && exec sleep 600"]
        self.near, self.far = (spawn("", command=hold, stdout=subprocess.PIPE) for _ in range(2))
        for one in (self.near, self.far):
            assert one.stdout.readline() == b"ready\n"
        pair = ("near", "type", "veth", "peer", "name", "far", "netns", self.far.pid)
        self.inside(self.near, "ip", "link", "add", *pair)
        for one, name, address in ((self.near, "near", "10.99.0.1/24"), (self.far, "far", "10.99.0.2/24")):
            self.inside(one, "ip", "addr", "add", address, "dev", name)
            self.inside(one, "ip", "link", "set", name, "up")
            server = spawn("", command=[*self._enter(one), sys.executable, "-c", ECHO], stdout=subprocess.PIPE)
            assert server.stdout.readline() == b"ready\n"

    @staticmethod
    def _enter(one):
        return ["nsenter", f"--net=/proc/{one.pid}/ns/net"]

    def inside(self, one, *command):
        command = [*self._enter(one), *map(str, command)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    def client(self, name, *, tree=False):
        path = self._tmp_path / name
        more = ["tree"] if tree else []
        child = self._spawn("", command=[*self._enter(self.near), sys.executable, "-c", CLIENT, str(path), *more])
        until(lambda: path.exists() and all(self.counts(path)[key] > 3 for key in ("tcp", "udp", "lo")), "traffic")
        return child, path

    @staticmethod
    def counts(path):
        return json.loads(path.read_text())


@pytest.fixture
def network(spawn, tmp_path):
    return Network(spawn, tmp_path)


def grows(path, keys, by=10):
    """Wait until each of these counters went on."""
    before = Network.counts(path)
    until(lambda: all(Network.counts(path)[key] >= before[key] + by for key in keys), f"{keys}")


def stands_still(path, keys, clock):
    """Return whether counters stand while another one goes on; what was in flight arrives first."""
    grows(clock, ["lo"], 40)
    before = Network.counts(path)
    grows(clock, ["lo"], 40)
    after = Network.counts(path)
    return all(after[key] == before[key] for key in keys)


def test_a_tree_is_cut_off_and_comes_back(enforcement, network, park):
    target, path = network.client("target", tree=True)
    bystander, free = network.client("bystander")
    pids = [one.pid for one in proctree.tree([target.pid])]
    home = park(*pids, bystander.pid)
    one = enforcement()
    done = one.act(act(target.pid, "isolate"), "guard")
    assert done.outcome == "done", done.text
    assert "1 connections aborted" in done.text
    assert stands_still(path, ["tcp", "udp"], path)
    assert Network.counts(path)["errors"] > 0
    assert Network.counts(free)["errors"] == 0
    grows(free, ["tcp", "udp", "lo"])
    ruleset = network.inside(network.near, "nft", "-s", "list", "ruleset")
    assert "flags owner" in ruleset
    network.inside(network.near, "nft", "flush", "ruleset")
    assert network.inside(network.near, "nft", "-s", "list", "ruleset") == ruleset, "nobody else can take it away"
    one.tick()
    assert one.take_news() == []
    one.undo(done.decision_id, "enough", "guard")
    grows(path, ["tcp", "udp", "lo"])
    assert {proctree.cgroup_of(pid) for pid in pids} == {home}
    assert network.inside(network.near, "nft", "list", "ruleset") == ""


def test_isolated_then_paused_then_released(enforcement, network, park):
    target, path = network.client("target")
    home = park(target.pid)
    one = enforcement()
    cut = one.act(act(target.pid, "isolate"), "guard")
    assert cut.outcome == "done", cut.text
    halt = one.act(act(target.pid, "pause", cgroup=home), "guard")
    assert halt.outcome == "done", halt.text
    one.undo(halt.decision_id, "", "guard")
    assert stands_still(path, ["tcp", "udp"], path), "still cut off"
    one.undo(cut.decision_id, "", "guard")
    grows(path, ["tcp", "udp"])
    assert proctree.cgroup_of(target.pid) == home


def test_without_cgroups_it_goes_by_five_tuple(enforcement, network, no_boxes):
    target, path = network.client("target")
    bystander, free = network.client("bystander")
    ahead = [0]
    one = enforcement(ahead=ahead)
    opened = Network.counts(path)["opened"]
    done = one.act(act(target.pid, "isolate"), "guard")
    assert done.outcome == "done", done.text
    assert "weaker" in done.text
    until(lambda: Network.counts(path)["opened"] > opened, "it comes back with a new connection")

    def cut_again():
        ahead[0] += 10**10
        one.tick()
        return any("new connections aborted" in news.text for news in one.take_news())

    until(cut_again, "the new connection is cut, too")
    assert Network.counts(free)["errors"] == 0
    grows(free, ["tcp", "udp"])
    assert bystander.poll() is None
    one.undo(done.decision_id, "", "guard")
    grows(path, ["tcp", "udp"])


SHARED = """
import os, socket, sys, time
one = socket.create_connection(("10.99.0.2", 7000))
pid = os.fork()
if pid == 0:
    time.sleep(600)
print(pid, flush=True)
while True:
    one.send(b"x"); one.recv(9); open(sys.argv[1], "a").write("x"); time.sleep(0.005)
"""


def test_a_socket_that_an_outsider_holds_too_is_left_alone(enforcement, network, park, spawn, tmp_path):
    path = tmp_path / "shared"
    parent = spawn("", command=[*network._enter(network.near), sys.executable, "-c", SHARED, str(path)],
                   stdout=subprocess.PIPE)
    child = int(parent.stdout.readline())
    park(child)
    done = enforcement().act(act(child, "isolate"), "guard")
    assert done.outcome == "done", done.text
    assert "1 sockets shared with processes outside the tree left alone" in done.text
    size = path.stat().st_size
    until(lambda: path.stat().st_size > size + 20, "the outsider goes on")


def test_a_failure_half_way_leaves_nothing(enforcement, network, park, monkeypatch):
    target, path = network.client("target")
    home = park(target.pid)

    def fail(*_, **__):
        raise OSError(95, "operation not supported")

    monkeypatch.setattr(isolate, "Diagnosis", fail)
    one = enforcement()
    outcome = one.act(act(target.pid, "isolate"), "guard")
    assert outcome.outcome == "failed"
    assert one.in_force() == []
    grows(path, ["tcp", "udp", "lo"])
    assert proctree.cgroup_of(target.pid) == home
    assert [entry for entry in boxes.folder(home).iterdir() if entry.is_dir()] == []
    assert Network.counts(path)["errors"] == 0
