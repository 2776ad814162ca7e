"""What the broker checks by itself, whoever asks: mode, switch, approval, rate, time, identity, room to write."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpuguard import paths, proctree
from gpuguard.broker import audit, journal, protected
from gpuguard.broker.enforcement import DISARMED_NAME
from gpuguard.broker.protected import Limits
from gpuguard.messages import Act
from gpuguard.proctree import Member
from tests.acting.tools import ROOT, act, approved, goes_on, process_of, state, until

IDLE = "import time; time.sleep(600)"
NS_PER_S = 1_000_000_000


def altered(request, **changes):
    return msgspec.structs.replace(request, **changes)


def other_start(request):
    return altered(request, target=altered(request.target, start_ticks=request.target.start_ticks + 1))


def other_boot(request):
    return altered(request, target=altered(request.target, boot_id="another"))


def other_cgroup(request):
    return altered(request, cgroup="/another")


def other_cgroup_id(request):
    return altered(request, cgroup_id=request.cgroup_id + 1)


def no_cgroup(request):
    return altered(request, cgroup="")


def nobody(request):
    return altered(request, target=altered(request.target, pid=2**22 + 1))


def no_pid(request):
    return altered(request, target=altered(request.target, pid=2**63))


def negative(request):
    return altered(request, target=altered(request.target, pid=-1))


@pytest.mark.parametrize("action", ["pause", "isolate", "kill"])
@pytest.mark.parametrize("change", [other_start, other_boot, other_cgroup, other_cgroup_id, no_cgroup, nobody, no_pid,
                                    negative])
def test_anybody_but_the_one_that_was_meant_is_refused(enforcement, spawn, park, change, action):
    child = spawn(IDLE)
    home = park(child.pid)
    one = enforcement()
    request = act(child.pid, action)
    if action == "kill":
        approved(one, request)
    outcome = one.act(change(request), "guard")
    assert outcome.outcome == "refused", outcome.text
    assert goes_on(child.pid)
    assert proctree.cgroup_of(child.pid) == home
    assert one.in_force() == []
    assert [entry.kind for entry in audit.read(paths.log_dir())][-1] == "act.refused"


def test_a_process_that_ended_is_refused(enforcement, spawn):
    child = spawn(IDLE)
    request = act(child.pid)
    os.kill(child.pid, signal.SIGKILL)
    until(lambda: state(child.pid) == "Z")
    assert "ended" in enforcement().act(request, "guard").text


@pytest.mark.parametrize(("changes", "why"), [
    ({"ttl_s": 0.0}, "time to live"), ({"ttl_s": -1.0}, "time to live"), ({"ttl_s": float("nan")}, "time to live"),
    ({"ttl_s": float("inf")}, "time to live"), ({"ttl_s": 1e9}, "time to live"),
    ({"decision_id": ""}, "decision id"), ({"decision_id": "../x"}, "decision id"), ({"decision_id": "x" * 65}, "id"),
])
def test_what_makes_no_sense_is_refused(enforcement, spawn, changes, why):
    child = spawn(IDLE)
    outcome = enforcement().act(act(child.pid, **changes), "guard")
    assert (outcome.outcome, why in outcome.text) == ("refused", True), outcome.text
    assert goes_on(child.pid)


def test_in_observe_mode_nothing_is_done_but_everything_is_checked(enforcement, spawn):
    child = spawn(IDLE)
    one = enforcement(enforcing=False)
    assert one.act(act(child.pid), "guard").outcome == "would_have"
    assert one.act(other_start(act(child.pid)), "guard").outcome == "refused"
    assert goes_on(child.pid)


def test_the_kill_switch_holds_until_it_is_lifted(enforcement, spawn, no_boxes):
    child = spawn(IDLE)
    one = enforcement()
    one.act(act(child.pid), "guard")
    until(lambda: state(child.pid) == "T")
    outcomes = one.disarm("enough", "operator")
    assert [outcome.outcome for outcome in outcomes] == ["undone", "done"]
    until(lambda: goes_on(child.pid))
    assert one.act(act(child.pid), "guard").outcome == "would_have"
    one.close("next start")
    again = enforcement()
    assert again.act(act(child.pid), "guard").outcome == "would_have"
    assert again.act(act(child.pid), "operator").outcome == "done", "a person may still"
    (paths.state_dir() / DISARMED_NAME).unlink()
    assert again.enforcing


def test_the_guard_disarms_until_the_next_start_and_frees_only_its_own(enforcement, spawn, no_boxes):
    mine, theirs = spawn(IDLE), spawn(IDLE)
    one = enforcement()
    by_hand = one.act(act(theirs.pid), "operator")
    one.act(act(mine.pid), "guard")
    one.disarm("odd things", "guard")
    assert not one.enforcing
    assert not (paths.state_dir() / DISARMED_NAME).exists()
    assert [left.decision_id for left in one.in_force()] == [by_hand.decision_id]
    [refused] = one.undo(by_hand.decision_id, "", "guard")
    assert (refused.outcome, state(theirs.pid)) == ("refused", "T")


def test_what_is_over_expires(enforcement, spawn, no_boxes):
    child = spawn(IDLE)
    ahead = [0]
    one = enforcement(ahead=ahead)
    done = one.act(act(child.pid, ttl_s=60.0), "guard")
    assert done.expires_ns - done.time_ns == pytest.approx(60 * NS_PER_S, abs=5 * NS_PER_S)
    until(lambda: state(child.pid) == "T")
    ahead[0] = 59 * NS_PER_S
    one.tick()
    assert one.take_news() == []
    ahead[0] = 61 * NS_PER_S
    assert one.next_ns() == 0
    one.tick()
    assert [news.outcome for news in one.take_news()] == ["expired"]
    until(lambda: goes_on(child.pid))
    assert one.in_force() == []


def test_acts_per_hour_are_limited_across_restarts(enforcement, spawn, no_boxes):
    child = spawn(IDLE)
    ahead = [0]
    limits = Limits(acts_per_hour=2)
    one = enforcement(limits=limits, ahead=ahead)
    for _ in range(2):
        one.undo(one.act(act(child.pid), "guard").decision_id, "", "guard")
    one.close("next start")
    again = enforcement(limits=limits, ahead=ahead)
    again.recover()
    outcome = again.act(act(child.pid), "guard")
    assert (outcome.outcome, "last hour" in outcome.text) == ("refused", True)
    assert again.act(act(child.pid), "operator").outcome == "done", "a person is not counted"
    ahead[0] = 3601 * NS_PER_S
    again.tick()
    assert again.act(act(child.pid), "guard").outcome == "done"


def test_kills_per_hour_are_limited(enforcement, spawn):
    one = enforcement(limits=Limits(kills_per_hour=1, grace_s=0.0))
    first, second = spawn(IDLE), spawn(IDLE)
    assert one.act(approved(one, act(first.pid, "kill")), "guard").outcome == "done"
    assert "kills" in one.act(approved(one, act(second.pid, "kill")), "guard").text
    until(lambda: one.tick() or not one.in_force())
    assert second.poll() is None


def test_the_same_decision_is_carried_out_once(enforcement, spawn, no_boxes):
    child = spawn(IDLE)
    one = enforcement()
    request = act(child.pid)
    assert [one.act(request, "guard").outcome for _ in range(2)] == ["done", "refused"]


def test_we_and_whoever_holds_us_are_refused(enforcement, spawn):
    one = enforcement()
    assert "itself" in one.act(act(os.getpid()), "operator").text
    assert one.act(act(os.getppid()), "operator").outcome == "refused"
    guard = spawn(IDLE)
    one.ours = {guard.pid}
    assert "itself" in one.act(act(guard.pid), "guard").text


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: others' executables cannot be read without")
def test_init_and_kernel_threads_are_refused(enforcement):
    one = enforcement()
    for pid in filter(proctree.member, (1, 2)):
        assert one.act(act(pid, cgroup=proctree.cgroup_of(pid) or "/"), "guard").outcome == "refused"
    limits = Limits()
    assert "init" in protected.refusal([Member(1, 1, 0, "S", 0)], limits)
    assert "kernel" in protected.refusal([Member(77, 1, 2, "S", 0x0020_0000)], limits)
    assert "more than" in protected.refusal([Member(2**30, 1, 1, "S", 0)] * 3, Limits(tree_max=2))


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: a protected executable belongs to root")
def test_a_daemon_is_known_by_its_file_and_not_by_its_name(enforcement, spawn, tmp_path):
    for name in ("sshd", "slurmd"):
        shutil.copy(shutil.which("sleep"), tmp_path / name)
    (tmp_path / "sshd").chmod(0o755)
    (tmp_path / "slurmd").chmod(0o777)
    real, writable = (spawn("", command=[str(tmp_path / name), "600"]) for name in ("sshd", "slurmd"))
    renamed = spawn("", command=["bash", "-c", f"exec -a sshd {shutil.which('sleep')} 600"])
    until(lambda: Path(f"/proc/{renamed.pid}/exe").readlink().name == "sleep")
    one = enforcement(enforcing=False)
    assert "the host's sshd" in one.act(act(real.pid), "guard").text
    assert [one.act(act(child.pid), "guard").outcome for child in (writable, renamed)] == ["would_have"] * 2
    (tmp_path / "sshd").unlink()
    shutil.copy(shutil.which("sleep"), tmp_path / "sshd")
    assert one.act(act(real.pid), "guard").outcome == "would_have", "the file of that name is another one now"


def test_a_protected_cgroup_protects_what_is_in_it(enforcement, spawn, park):
    child = spawn(IDLE)
    home = park(child.pid)
    one = enforcement(limits=Limits(protected_cgroups=(home,)))
    assert "protected cgroup" in one.act(act(child.pid), "guard").text
    assert goes_on(child.pid)


def test_a_tree_with_a_protected_child_is_refused_as_a_whole(enforcement, family, monkeypatch):
    child, pids = family()
    monkeypatch.setattr(protected, "daemon_name", lambda pid, _: "kubelet" if pid == pids[2] else "")
    outcome = enforcement().act(act(child.pid), "guard")
    assert (outcome.outcome, outcome.text) == ("refused", f"process {pids[2]} is the host's kubelet")
    assert all(goes_on(pid) for pid in pids)


def test_everything_is_undone_at_the_end_but_what_a_person_paused(enforcement, spawn, no_boxes):
    mine, theirs = spawn(IDLE), spawn(IDLE)
    one = enforcement()
    one.act(act(mine.pid), "guard")
    by_hand = one.act(act(theirs.pid), "operator")
    left = one.close("the end")
    assert [outcome.decision_id for outcome in left] == [by_hand.decision_id]
    until(lambda: goes_on(mine.pid))
    assert state(theirs.pid) == "T"
    again = enforcement()
    assert again.recover() == []
    assert state(theirs.pid) == "T", "a new start does not free it either"
    again.undo("", "", "operator")
    until(lambda: goes_on(theirs.pid))


def test_an_undo_that_fails_stays_in_force(enforcement, spawn, no_boxes, monkeypatch):
    child = spawn(IDLE)
    one = enforcement()
    done = one.act(act(child.pid), "guard")

    def fail(*_):
        raise OSError(5, "input/output error")

    with monkeypatch.context() as patch:
        patch.setattr("gpuguard.broker.actions.pause.undo", fail)
        assert one.undo(done.decision_id, "", "guard")[0].outcome == "failed"
    assert len(one.in_force()) == 1
    assert one.undo(done.decision_id, "", "guard")[0].outcome == "undone"


@pytest.mark.parametrize("append", [1, 2, 3])
def test_no_act_without_a_journal(enforcement, spawn, no_boxes, monkeypatch, append):
    """The first append is the intent, the second the plan, the third that it was done: none may fail unnoticed."""
    child = spawn(IDLE)
    one = enforcement()
    real, count = journal.Journal.append, [0]

    def fail(self, line):
        count[0] += 1
        if count[0] == append:
            raise journal.JournalFailed("no space left on device")
        real(self, line)

    monkeypatch.setattr(journal.Journal, "append", fail)
    outcome = one.act(act(child.pid), "guard")
    assert outcome.outcome == ("refused" if append == 1 else "failed"), outcome.text
    assert "no space" in outcome.text
    until(lambda: goes_on(child.pid))
    assert one.in_force() == []


FULL_DISK = """
import os, subprocess, sys
from pathlib import Path
disk = Path(sys.argv[1])
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", disk], check=True)
from gpuguard.broker import audit, boxes, journal
from gpuguard.broker.enforcement import Enforcement
from tests.acting.tools import act, goes_on, state, until
boxes.mount = lambda: None
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
try:
    one = Enforcement(disk, disk, enforcing=True)
    first = one.act(act(child.pid), "guard")
    assert first.outcome == "done", first.text
    until(lambda: state(child.pid) == "T")
    filler = os.open(disk / "filler", os.O_WRONLY | os.O_CREAT)
    try:
        while True:
            os.write(filler, b"x" * 512)
    except OSError:
        pass
    os.close(filler)
    before = audit.verify(disk)
    outcomes = []
    second = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    try:
        for _ in range(60):
            outcomes.append(one.act(act(second.pid), "guard"))
            if outcomes[-1].outcome == "done":
                one.undo(outcomes[-1].decision_id, "", "operator")
        until(lambda: goes_on(second.pid))
    finally:
        second.kill(); second.wait()
    assert outcomes[-1].outcome == "refused" and "record" in outcomes[-1].text, outcomes[-1]
    after = audit.verify(disk)
    assert after.ok and after.entries >= before.entries, after
    state_now, damage = journal.replay((disk / journal.NAME).read_bytes())
    assert damage == [] and first.decision_id in state_now.in_force
    [undone] = one.undo(first.decision_id, "", "operator")
    assert undone.outcome == "undone" and "not" in undone.text, undone
    until(lambda: goes_on(child.pid))
    (disk / "filler").unlink()
    third = one.act(act(child.pid), "guard")
    assert third.outcome == "done", third.text
    one.undo("", "", "operator")
    one.close("")
    assert audit.verify(disk).ok
    print("proven")
finally:
    child.kill(); child.wait()
"""


@pytest.mark.privileged
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: it mounts a small tmpfs in a mount namespace of its own")
def test_a_full_disk_refuses_acts_keeps_records_and_still_undoes(tmp_path):
    done = subprocess.run(["unshare", "-m", sys.executable, "-c", FULL_DISK, tmp_path], cwd=ROOT, capture_output=True,
                          text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False)
    assert done.stdout.endswith("proven\n"), done.stderr


def test_the_guard_cannot_fill_the_disk_with_words(enforcement, monkeypatch):
    monkeypatch.setattr("gpuguard.broker.enforcement.AUDIT_BYTES_PER_HOUR", 10_000)
    ahead = [0]
    one = enforcement(ahead=ahead)
    with pytest.raises(audit.AuditFailed, match="in an hour"):
        list(map(lambda _: one.enter(1, "guard", "finding", {"text": "x" * 990}), range(11)))  # noqa: C417
    ahead[0] = 600 * NS_PER_S
    one.enter(1, "guard", "finding", {"text": "x" * 990})


TEXT = st.text(max_size=70)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_request_at_all_raises_or_acts_in_observe_mode(shared, data):
    one, child = shared
    target = data.draw(st.builds(type(process_of(child.pid)), TEXT, st.integers(-2**63, 2**64 - 1), st.integers()))
    request = data.draw(st.builds(
        Act, decision_id=TEXT, action=st.sampled_from(["isolate", "throttle", "pause", "kill"]),
        target=st.sampled_from([process_of(child.pid), target]), cgroup=TEXT, cgroup_id=st.integers(),
        ttl_s=st.floats(), approved_by=TEXT, reason=TEXT))
    assert one.act(request, "guard").outcome in {"refused", "would_have"}
    assert goes_on(child.pid)


@pytest.fixture
def shared(enforcement, spawn):
    return enforcement(enforcing=False), spawn(IDLE)
