"""The launch boundary: rates, stops and kills at a launch on the stand-in driver, and what is left when a side dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from gpuguard import proctree
from gpuguard.broker import boundary
from gpuguard.broker.actions import kill, pause
from gpuguard.broker.boundary import MODE_KILL, MODE_RATE, MODE_STOP, SECOND_NS
from gpuguard.messages import OpenLaunches
from gpuguard.sensors import launches
from tests.acting.tools import act, goes_on, process_of, state, until
from tests.probing import standins_to_probe

AHEAD_NS, BEHIND_NS = 20_000_000, 60_000_000  # QUOTA_AHEAD_NS and QUOTA_BEHIND_NS of ext/bpf/launches.h


@pytest.fixture(scope="module")
def standins(tmp_path_factory):
    return standins_to_probe(tmp_path_factory.mktemp("standins"))


@pytest.fixture
def eye(standins):
    """Open the launch eye's privileged half in this process; return its boundary."""
    _, descriptors = launches.grant(OpenLaunches((str(standins["libcuda"]),)))
    for fd in descriptors:
        os.close(fd)
    yield boundary.current()
    launches.release()


@pytest.fixture
def launcher(spawn, standins):
    """Return a function that starts a program that launches as fast as it can."""

    def start(*options, **more):
        command = [str(standins["hasher"]), "--interval-us", "0", *map(str, options)]
        return spawn("", command=command, stdout=subprocess.PIPE, **more)

    return start


def row(eye, pid):
    return next((one for one in eye.rows() if one[0] == pid), None)


def made(eye, pid):
    found = row(eye, pid)
    return found[5] if found else 0


# -- rates ------------------------------------------------------------------------------------------------------------


def test_a_throttle_needs_the_launch_eye(enforcement, family):
    child, _ = family()
    one = enforcement()
    outcome = one.act(act(child.pid, "throttle"), "guard")
    assert outcome.outcome == "failed"
    assert "launch eye is not open" in outcome.text
    assert one.in_force() == []


@pytest.mark.parametrize("per_s", [1e3, 1e5])
def test_no_more_launches_than_the_rate_allows(eye, launcher, per_s):
    child = launcher()
    begun_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    key = eye.hold([proctree.member(child.pid)], MODE_RATE, per_s)
    until(lambda: row(eye, child.pid)[6] >= 10, "ten stops")
    launched = made(eye, child.pid)
    elapsed_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME) - begun_ns
    # The one that trips waits at the boundary, and is counted.
    assert launched <= (elapsed_ns + AHEAD_NS + BEHIND_NS) * per_s / SECOND_NS + 2
    assert launched > per_s * 10 * AHEAD_NS / SECOND_NS / 2
    eye.let_go(key)
    until(lambda: goes_on(child.pid))
    assert eye.rows() == []


def test_a_throttle_is_undone_when_its_time_is_over(enforcement, eye, launcher):
    child = launcher()
    ahead = [0]
    one = enforcement(ahead=ahead)
    done = one.act(act(child.pid, "throttle", ttl_s=60.0), "guard")
    assert (done.outcome, done.text) == ("done", "1 processes may make 100 launches a second each")
    until(lambda: row(eye, child.pid)[6] > 2, "stops")
    ahead[0] += 61 * SECOND_NS
    one.tick()
    [news] = one.take_news()
    assert (news.outcome, "launches are free again" in news.text) == ("expired", True)
    until(lambda: goes_on(child.pid))
    assert eye.rows() == []


def test_all_launches_are_made_in_the_end(eye, launcher):
    child = launcher("--launches", 400)
    eye.hold([proctree.member(child.pid)], MODE_RATE, 2000.0)
    assert json.loads(child.communicate()[0])["launches"] == 400
    assert eye.look() == ""
    assert eye.rows() == []


def test_children_get_their_quota_at_the_next_look(enforcement, eye, spawn, standins, tmp_path):
    go = tmp_path / "go"
    script = f"while [ ! -e {go} ]; do sleep 0.02; done; {standins['hasher']} --interval-us 0; true"
    child = spawn("", command=["sh", "-c", script], stdout=subprocess.DEVNULL)
    ahead = [0]
    one = enforcement(ahead=ahead)
    done = one.act(act(child.pid, "throttle"), "guard")
    go.touch()
    hasher = until(lambda: next((m.pid for m in proctree.tree([child.pid])
                                 if os.readlink(f"/proc/{m.pid}/exe") == str(standins["hasher"])), 0))
    ahead[0] += 2 * SECOND_NS
    one.tick()
    assert row(eye, hasher)[2] == MODE_RATE
    [intent] = one._journal.state.in_force.values()
    assert hasher in [pid for pid, _ in intent.plan.stopped]
    one.undo(done.decision_id, "", "guard")
    until(lambda: goes_on(hasher))


def test_whoever_took_the_pid_over_has_no_quota(eye, launcher):
    child = launcher("--launches", 2000)
    me = proctree.member(child.pid)
    eye.hold([proctree.Member(me.pid, me.start_ticks + 1, me.parent, me.state, me.flags)], MODE_KILL)
    assert json.loads(child.communicate()[0])["launches"] == 2000


def test_a_rate_must_be_one(eye, launcher):
    child = launcher()
    for per_s in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(OSError, match="launches a second"):
            eye.hold([proctree.member(child.pid)], MODE_RATE, per_s)
    assert eye.rows() == []


# -- stop and kill ----------------------------------------------------------------------------------------------------


def test_at_a_closed_boundary_not_one_launch_more_is_made(eye, launcher):
    child = launcher("--launches", 100, "--stepwise", stdin=subprocess.PIPE)
    assert child.stdout.readline() == b"waits\n"
    key = eye.hold([proctree.member(child.pid)], MODE_STOP)
    child.stdin.close()
    until(lambda: state(child.pid) == "T")
    assert made(eye, child.pid) == 1
    eye.let_go(key)
    assert json.loads(child.stdout.read().splitlines()[-1])["launches"] == 100


def test_whoever_is_continued_by_others_is_stopped_again(eye, launcher):
    child = launcher()
    eye.hold([proctree.member(child.pid)], MODE_STOP)
    for times in range(1, 4):
        until(lambda: state(child.pid) == "T")
        assert made(eye, child.pid) == times
        os.kill(child.pid, signal.SIGCONT)
        until(lambda: made(eye, child.pid) > times)  # noqa: B023  called at once


def test_a_kill_ends_it_before_the_launch(eye, launcher):
    child = launcher()
    eye.hold([proctree.member(child.pid)], MODE_KILL)
    assert child.wait() == -signal.SIGKILL
    assert made(eye, child.pid) == 1


@pytest.mark.parametrize("how", ["boxes", "signals"])
def test_a_pause_closes_the_boundary_and_its_undo_opens_it(enforcement, eye, launcher, request, how):
    child = launcher()
    if how == "boxes":
        request.getfixturevalue("park")(child.pid)
    else:
        request.getfixturevalue("no_boxes")
    one = enforcement()
    done = one.act(act(child.pid), "guard")
    assert done.outcome == "done"
    assert made(eye, child.pid) <= 1
    assert pause.verify(one._effects[done.decision_id]) == ""
    one.undo(done.decision_id, "", "guard")
    until(lambda: goes_on(child.pid))
    assert eye.rows() == []


@pytest.mark.parametrize("first", [0, 1])
def test_a_pause_upon_a_throttle_is_undone_in_any_order(enforcement, eye, launcher, no_boxes, first):
    child = launcher()
    one = enforcement()
    keys = [one.act(act(child.pid, "throttle"), "guard").decision_id]
    until(lambda: row(eye, child.pid)[6] > 1, "stops")
    keys.append(one.act(act(child.pid), "guard").decision_id)
    assert row(eye, child.pid)[2] == MODE_STOP
    one.undo(keys[first], "", "guard")
    if first == 0:
        until(lambda: state(child.pid) == "T")
    else:
        launched = made(eye, child.pid)
        until(lambda: made(eye, child.pid) > launched + 2, "launches at the rate")
    one.undo(keys[1 - first], "", "guard")
    until(lambda: goes_on(child.pid))
    assert eye.rows() == []


def test_a_kill_leaves_no_quota(enforcement, eye, launcher, no_boxes):
    child = launcher()
    one = enforcement()
    assert one.act(act(child.pid, "kill", approved_by="somebody"), "operator").outcome == "done"
    assert child.wait() in (0, -signal.SIGKILL, -signal.SIGTERM)
    until(lambda: (one.tick(), one.in_force() == [])[1])
    assert eye.rows() == []
    assert kill.alive(kill.Effect(text="", plan=pause.Plan())) == []


# -- who dies ---------------------------------------------------------------------------------------------------------


def test_the_waker_is_started_again(enforcement, eye, launcher):
    child = launcher()
    ahead = [0]
    one = enforcement(ahead=ahead)
    one.act(act(child.pid, "throttle"), "guard")
    until(lambda: row(eye, child.pid)[6] > 2, "stops")
    os.kill(eye._waker.pid, signal.SIGKILL)
    eye._waker.wait()
    stops = row(eye, child.pid)[6]
    ahead[0] += 2 * SECOND_NS
    one.tick()
    [news] = one.take_news()
    assert "started again" in news.text
    until(lambda: row(eye, child.pid)[6] > stops + 2, "stops under the new waker")


def test_an_eye_that_is_opened_anew_stops_again(enforcement, eye, launcher, standins):
    child = launcher()
    ahead = [0]
    one = enforcement(ahead=ahead)
    one.act(act(child.pid, "throttle"), "guard")
    until(lambda: row(eye, child.pid)[6] > 1, "stops")
    _, descriptors = launches.grant(OpenLaunches((str(standins["libcuda"]),)))
    for fd in descriptors:
        os.close(fd)
    until(lambda: goes_on(child.pid))
    ahead[0] += 2 * SECOND_NS
    one.tick()
    assert row(boundary.current(), child.pid)[2] == MODE_RATE


BROKER = """
import os, sys, time
from gpuguard import paths
from gpuguard.broker import boundary
from gpuguard.broker.enforcement import Enforcement
from gpuguard.messages import OpenLaunches
from gpuguard.broker.protected import Limits
from gpuguard.sensors import launches
from tests.acting.tools import act
launches.grant(OpenLaunches((sys.argv[1],)))
one = Enforcement(paths.make_dir(paths.state_dir()), paths.make_dir(paths.log_dir()), enforcing=True,
                  limits=Limits(launches_per_s=3.0))
done = one.act(act(int(sys.argv[2]), sys.argv[3]), "guard")
print(done.outcome, boundary.current()._waker.pid, flush=True)
time.sleep(600)
"""


@pytest.fixture
def broker(spawn, standins, folders):
    def start(child, action):
        process = spawn(BROKER, standins["libcuda"], child.pid, action, stdout=subprocess.PIPE)
        outcome, waker = process.stdout.readline().split()
        assert outcome == b"done"
        # At three a second, and when paused, it stands still nearly always.
        until(lambda: state(child.pid) == "T")
        return process, int(waker)

    return start


def test_a_broker_that_is_killed_leaves_nobody_stopped(enforcement, broker, launcher):
    child = launcher()
    process, waker = broker(child, "throttle")
    process.kill()
    process.wait()
    until(lambda: state(waker) in ("gone", "Z"))
    assert goes_on(child.pid)
    one = enforcement()
    [outcome] = one.recover()
    assert (outcome.action, outcome.outcome) == ("throttle", "undone")
    assert goes_on(child.pid)


@pytest.mark.parametrize("action", ["throttle", "pause"])
def test_what_broker_and_waker_leave_behind_the_next_start_undoes(enforcement, broker, launcher, action):
    child = launcher()
    process, waker = broker(child, action)
    os.kill(process.pid, signal.SIGSTOP)
    os.kill(waker, signal.SIGKILL)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    one = enforcement()
    [outcome] = one.recover()
    assert (outcome.action, outcome.outcome) == (action, "undone")
    until(lambda: goes_on(child.pid))


def test_what_was_left_behind_can_be_released_by_hand(enforcement, broker, launcher, folders):
    child = launcher()
    process, waker = broker(child, "throttle")
    os.kill(process.pid, signal.SIGSTOP)
    os.kill(waker, signal.SIGKILL)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    subprocess.run([sys.executable, "-m", "gpuguard", "release", "--all"], check=True, capture_output=True)
    until(lambda: goes_on(child.pid))
    assert process_of(child.pid).pid == child.pid
