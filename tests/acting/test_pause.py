"""Pause: a whole tree stands still, and only those go on that we stopped."""

from __future__ import annotations

import os
import signal

import pytest

from gpuguard import paths, proctree
from gpuguard.broker import boxes, journal
from gpuguard.broker.actions import pause
from tests.acting.tools import act, goes_on, process_of, state, until


def test_a_tree_is_frozen_in_a_box_and_put_back(enforcement, family, park):
    child, pids = family()
    outsider, _ = family()
    home = park(*pids, outsider.pid)
    one = enforcement()
    done = one.act(act(child.pid), "guard")
    assert (done.outcome, done.text) == ("done", "3 processes frozen")
    [box] = {proctree.cgroup_of(pid) for pid in pids}
    assert box.startswith(f"{home}/{proctree.BOX_PREFIX}")
    assert boxes.is_frozen(boxes.Box(box, home))
    assert proctree.cgroup_of(outsider.pid) == home
    [undone] = one.undo(done.decision_id, "enough", "guard")
    assert undone.outcome == "undone"
    assert {proctree.cgroup_of(pid) for pid in pids} == {home}
    assert not boxes.folder(box).exists()


def test_whoever_leaves_the_box_is_put_back(enforcement, family, park):
    child, pids = family()
    home = park(*pids)
    ahead = [0]
    one = enforcement(ahead=ahead)
    one.act(act(child.pid), "guard")
    box = proctree.cgroup_of(child.pid)
    (boxes.folder(home) / "cgroup.procs").write_text(str(pids[1]))
    ahead[0] += 10**10
    one.tick()
    assert proctree.cgroup_of(pids[1]) == box
    [news] = one.take_news()
    assert (news.outcome, "put back" in news.text) == ("failed", True)


def test_a_tree_in_two_cgroups_gets_two_boxes(enforcement, family, park):
    child, pids = family()
    first, second = park(*pids[:2]), park(*pids[2:])
    one = enforcement()
    done = one.act(act(child.pid), "guard")
    assert done.outcome == "done"
    assert [proctree.without_boxes(proctree.cgroup_of(pid)) for pid in pids] == [first, first, second]
    one.undo("", "", "operator")
    assert [proctree.cgroup_of(pid) for pid in pids] == [first, first, second]


def test_without_cgroups_the_tree_is_stopped_by_signals(enforcement, family, no_boxes):
    child, pids = family()
    one = enforcement()
    done = one.act(act(child.pid), "guard")
    assert (done.outcome, done.text) == ("done", "3 processes stopped by SIGSTOP")
    until(lambda: [state(pid) for pid in pids] == ["T"] * 3)
    one.undo(done.decision_id, "enough", "guard")
    until(lambda: all(goes_on(pid) for pid in pids))


def test_who_stood_still_before_is_not_continued(enforcement, family, no_boxes):
    child, pids = family()
    os.kill(pids[2], signal.SIGSTOP)
    until(lambda: state(pids[2]) == "T")
    one = enforcement()
    done = one.act(act(child.pid), "guard")
    assert done.text == "2 processes stopped by SIGSTOP, 1 stood still before"
    one.undo(done.decision_id, "enough", "guard")
    until(lambda: all(goes_on(pid) for pid in pids[:2]))
    assert state(pids[2]) == "T"


def test_who_died_meanwhile_is_nobody(enforcement, family, no_boxes):
    child, pids = family()
    one = enforcement()
    done = one.act(act(child.pid), "guard")
    os.kill(pids[2], signal.SIGKILL)
    until(lambda: state(pids[2]) in {"gone", "Z"})
    assert one.undo(done.decision_id, "enough", "guard")[0].text.endswith("2 processes continued")


def test_an_undo_never_continues_a_stranger_with_the_same_pid(spawn, no_boxes):
    child = spawn("import time; time.sleep(600)")
    os.kill(child.pid, signal.SIGSTOP)
    until(lambda: state(child.pid) == "T")
    ticks = process_of(child.pid).start_ticks
    text = pause.undo(journal.Plan(stopped=((child.pid, ticks + 1),)), None, frozenset())
    assert text == "0 processes continued"
    assert state(child.pid) == "T"


FORKER = """
import os, sys, time
while True:
    if os.fork() == 0:
        time.sleep(5.0)
        os._exit(0)
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass
    open(sys.argv[1], "w").write("ready")
    time.sleep(0.002)
"""


@pytest.mark.parametrize("how", ["boxes", "signals"])
def test_a_tree_that_keeps_forking_stands_still_as_a_whole(enforcement, spawn, tmp_path, request, how):
    child = spawn(FORKER, tmp_path / "ready")
    if how == "boxes":
        request.getfixturevalue("park")(child.pid)
    else:
        request.getfixturevalue("no_boxes")
    until(lambda: (tmp_path / "ready").exists() and len(proctree.tree([child.pid])) > 20)
    one = enforcement()
    assert one.act(act(child.pid), "guard").outcome == "done"
    if how == "boxes":
        found = {proctree.cgroup_of(m.pid) for m in proctree.tree([child.pid])}
        assert all(proctree.without_boxes(path) != path for path in found)
        until(lambda: all(boxes.is_frozen(boxes.Box(path, "")) for path in found))
    else:
        until(lambda: {m.state for m in proctree.tree([child.pid])} == {"T"})
    before = {m.pid for m in proctree.tree([child.pid])}
    one.tick()
    assert {m.pid for m in proctree.tree([child.pid])} == before


def test_one_box_inside_another_is_undone_in_any_order(enforcement, family, park):
    child, pids = family()
    home = park(*pids)
    one = enforcement()
    outer, inner = (one.act(act(child.pid, cgroup=home), "guard").decision_id for _ in range(2))
    assert len(one.in_force()) == 2
    one.undo(outer, "", "guard")
    assert boxes.is_frozen(boxes.Box(proctree.cgroup_of(child.pid), "")), "the inner pause still holds"
    one.undo(inner, "", "guard")
    assert {proctree.cgroup_of(pid) for pid in pids} == {home}
    assert [entry.name for entry in boxes.folder(home).iterdir() if entry.is_dir()] == []


def test_after_a_reboot_nothing_is_touched(enforcement, family, no_boxes):
    child, pids = family()
    one = enforcement()
    one.act(act(child.pid), "guard")
    until(lambda: state(child.pid) == "T")
    path = paths.state_dir() / journal.NAME
    one._journal.close()
    one._audit.close()
    path.write_text(path.read_text().replace(proctree.boot_id(), "another-boot"))
    again = enforcement()
    [outcome] = again.recover()
    assert "started again" in outcome.text
    assert state(child.pid) == "T"
    for pid in pids:
        os.kill(pid, signal.SIGCONT)
