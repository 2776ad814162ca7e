"""Kill: approved or not at all; the whole tree, and said to be dead only when it is."""

from __future__ import annotations

import os
import signal
import time

import msgspec
import pytest

from gpuguard import paths, proctree
from gpuguard.broker import audit, boxes
from gpuguard.broker.actions import kill
from gpuguard.broker.enforcement import APPROVAL_NS
from tests.acting.tools import act, approved, goes_on, state, until

STUBBORN = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if os.fork() == 0:
    open(sys.argv[1], "w").write("ready")
while True:
    time.sleep(0.01)
"""


@pytest.fixture(params=["boxes", "signals"])
def way(request):
    """Be on a host with and without cgroup v2; return how to place pids."""
    if request.param == "boxes":
        return request.getfixturevalue("park")
    request.getfixturevalue("no_boxes")
    return lambda *_: None


@pytest.mark.parametrize("claimed", ["", "  ", "alice"])
def test_without_an_approval_nothing_happens_whatever_the_guard_claims(enforcement, family, claimed):
    child, pids = family()
    outcome = enforcement().act(act(child.pid, "kill", approved_by=claimed), "guard")
    assert (outcome.outcome, "approval" in outcome.text) == ("refused", True)
    assert all(goes_on(pid) for pid in pids)


def test_an_approval_is_for_one_decision_one_process_and_a_while(enforcement, family):
    child, pids = family()
    other, _ = family()
    ahead = [0]
    one = enforcement(ahead=ahead)
    request = approved(one, act(child.pid, "kill"))
    assert one.act(act(child.pid, "kill"), "guard").outcome == "refused", "another decision"
    swapped = msgspec.structs.replace(act(other.pid, "kill"), decision_id=request.decision_id)
    assert one.act(swapped, "guard").outcome == "refused", "another process"
    ahead[0] = APPROVAL_NS + 1
    assert one.act(request, "guard").outcome == "refused", "too late"
    assert all(goes_on(pid) for pid in pids)


def test_who_approved_is_what_the_broker_was_told(enforcement, family):
    child, _ = family()
    one = enforcement()
    request = approved(one, act(child.pid, "kill"), by="kim")
    one.act(msgspec.structs.replace(request, approved_by="the guard"), "guard")
    kinds = {entry.kind: entry.body for entry in audit.read(paths.log_dir())}
    assert kinds["act.approved"]["by"] == kinds["act.done"]["approved_by"] == "kim"


def test_a_tree_that_obeys_ends_at_sigterm(enforcement, family, way):
    child, pids = family()
    bystander, _ = family()
    way(*pids, bystander.pid)
    one = enforcement()
    outcome = one.act(approved(one, act(child.pid, "kill")), "guard")
    assert (outcome.outcome, outcome.text) == ("done", "SIGTERM to 3 processes, SIGKILL to what is left in 0.2 s")
    until(lambda: one.tick() or not one.in_force())
    assert [(news.outcome, news.text) for news in one.take_news()] == [("done", "all 3 processes have ended")]
    assert child.wait() == -signal.SIGTERM
    assert all(state(pid) in {"gone", "Z"} for pid in pids)
    assert bystander.poll() is None


def test_a_tree_that_does_not_is_killed_after_the_grace_time(enforcement, spawn, tmp_path, way):
    child = spawn(STUBBORN, tmp_path / "ready")
    until((tmp_path / "ready").exists)
    pids = [one.pid for one in proctree.tree([child.pid])]
    way(*pids)
    one = enforcement()
    one.act(approved(one, act(child.pid, "kill")), "guard")
    assert len(one.in_force()) == 1
    until(lambda: one.tick() or not one.in_force())
    assert one.take_news()[0].outcome == "done"
    assert child.wait() == -signal.SIGKILL
    until(lambda: all(state(pid) in {"gone", "Z"} for pid in pids))


def test_a_kernel_without_cgroup_kill_is_no_obstacle(enforcement, spawn, tmp_path, park, monkeypatch):
    child = spawn(STUBBORN, tmp_path / "ready")
    until((tmp_path / "ready").exists)
    park(*[one.pid for one in proctree.tree([child.pid])])

    def absent(_):
        raise FileNotFoundError(2, "no cgroup.kill")

    monkeypatch.setattr(boxes, "kill", absent)
    one = enforcement()
    one.act(approved(one, act(child.pid, "kill")), "guard")
    until(lambda: one.tick() or not one.in_force())
    assert child.wait() == -signal.SIGKILL


def test_a_paused_tree_can_be_killed(enforcement, family, park):
    child, pids = family()
    home = park(*pids)
    one = enforcement()
    pause = one.act(act(child.pid), "guard")
    one.act(approved(one, act(child.pid, "kill", cgroup=home)), "guard")
    until(lambda: one.tick() or len(one.in_force()) == 1)
    assert child.wait() in {-signal.SIGTERM, -signal.SIGKILL}, "a frozen task still takes a signal that ends it"
    one.undo(pause.decision_id, "", "guard")
    assert [entry for entry in boxes.folder(home).iterdir() if entry.is_dir()] == []


def test_what_lives_on_is_never_said_to_be_dead(enforcement, spawn, no_boxes, monkeypatch):
    child = spawn("import time; time.sleep(600)")
    one = enforcement()
    monkeypatch.setattr(proctree, "send", lambda *_: False)
    monkeypatch.setattr(kill, "GONE_S", 0.0)
    one.act(approved(one, act(child.pid, "kill")), "guard")
    until(lambda: one.tick() or not one.in_force())
    [news] = one.take_news()
    assert (news.outcome, f"still alive: pid {child.pid}" in news.text) == ("failed", True)
    assert child.poll() is None


def test_ending_in_the_grace_time_kills_nobody_later(enforcement, spawn, tmp_path, park):
    child = spawn(STUBBORN, tmp_path / "ready")
    until((tmp_path / "ready").exists)
    home = park(*[one.pid for one in proctree.tree([child.pid])])
    one = enforcement()
    outcome = one.act(approved(one, act(child.pid, "kill")), "guard")
    effect = one._effects[outcome.decision_id]
    effect.due_s = time.monotonic() + 600
    [undone] = one.undo("", "the broker ends", "operator")
    assert "cannot be undone" in undone.text
    assert one.next_ns() is None
    assert proctree.cgroup_of(child.pid) == home
    assert os.waitpid(child.pid, os.WNOHANG) == (0, 0)
