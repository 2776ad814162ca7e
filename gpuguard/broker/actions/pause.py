"""Pause: a whole tree stands still, and goes on as if nothing had been.

In a box of its own with cgroup.freeze where the host has cgroup v2: the job cannot see it, nobody can SIGCONT out of
it. Elsewhere SIGSTOP by pidfd, parents first, until no new child turns up; who stood still before is left alone, by
the act and by its undo.
Where the launch eye is open, a launch made meanwhile is stopped before it is made. GPU work that is already queued runs
on, GPU memory stays allocated, peers may time out.
Source: Documentation/admin-guide/cgroup-v2.rst section 5.2.1; signal(7).
"""

from __future__ import annotations

import signal
import time
from typing import TYPE_CHECKING

from gpuguard import proctree
from gpuguard.broker import boxes
from gpuguard.broker.actions import Effect
from gpuguard.broker.boundary import MODE_STOP, current
from gpuguard.broker.journal import Plan

if TYPE_CHECKING:
    from gpuguard.broker.actions import Job
    from gpuguard.proctree import Member

STOP_WAIT_S = 0.5
_POLL_S = 0.002


def apply(job: Job) -> Effect:
    """Stop the tree: first whoever launches, at that launch, then everybody."""
    at_launch, quota = _stop_at_launch(job)
    effect = _freeze(job) if boxes.mount() is not None else None
    if effect is None:
        effect = _stop(job, at_launch)
    both = dict.fromkeys((*at_launch, *effect.plan.stopped))
    effect.plan = Plan(effect.plan.boxes, tuple(both))
    effect.quota = quota
    return effect


def _stop_at_launch(job: Job) -> tuple[tuple[tuple[int, int], ...], int]:
    """Close the launch boundary where there is one: from then on not one launch more reaches the GPU."""
    boundary = current()
    if boundary is None:
        return (), 0
    moving = [one for one in proctree.tree([job.root.pid]) if one.state not in "Tt" or boundary.holds(one)]
    stopped = tuple((one.pid, one.start_ticks) for one in moving)
    job.record(Plan(stopped=stopped))
    return stopped, boundary.hold(moving, MODE_STOP)


def _freeze(job: Job) -> Effect | None:
    """Freeze the tree in a box; None where this host does not let us make one."""
    plan = Plan(boxes=boxes.plan(proctree.tree([job.root.pid])))
    job.record(plan)
    try:
        members = boxes.fill(job.root, plan.boxes)
    except OSError:
        boxes.empty_all(plan.boxes, job.keep)
        return None
    still = boxes.wait_frozen(plan.boxes)
    text = "frozen" if still else "freezing, not all stand still yet"
    return Effect(text=f"{len(members)} processes {text}", plan=plan, members=members)


def _stop(job: Job, at_launch: tuple[tuple[int, int], ...]) -> Effect:
    stopped: list[Member] = []

    def put(new: list[Member]) -> None:
        moving = [one for one in new if one.state not in "Tt" or (one.pid, one.start_ticks) in at_launch]
        job.record(Plan(stopped=tuple((one.pid, one.start_ticks) for one in moving)))
        stopped.extend(one for one in moving if proctree.send(one, signal.SIGSTOP, job.boot_id))

    members = proctree.each_of_tree(job.root, put)
    plan = Plan(stopped=tuple((one.pid, one.start_ticks) for one in stopped))
    end = time.monotonic() + STOP_WAIT_S
    while _running(plan) and time.monotonic() < end:
        time.sleep(_POLL_S)
    before = len(members) - len(stopped)
    text = f"{len(stopped)} processes stopped by SIGSTOP" + (f", {before} stood still before" if before else "")
    return Effect(text=text, plan=plan, members=members)


def verify(effect: Effect) -> str:
    """Return what of the pause does not hold; processes that left their box are put back into it."""
    if effect.plan.boxes:
        out = boxes.strays(effect.members, effect.plan.boxes)
        if out:
            boxes.recapture(out, effect.plan.boxes)
            return f"{len(out)} processes had left the box and were put back"
        return "" if all(boxes.is_frozen(box) for box in effect.plan.boxes) else "not all processes stand still"
    running = _running(effect.plan)
    return f"{running} processes run again" if running else ""


def _running(plan: Plan) -> int:
    """Return how many of those that we stopped do not stand still."""
    seen = ((proctree.member(pid), ticks) for pid, ticks in plan.stopped)
    return sum(1 for now, ticks in seen if now and now.start_ticks == ticks and now.state not in "TtZX")


def undo(plan: Plan, effect: Effect | None, keep: frozenset[str]) -> str:
    """Let exactly those go on that we stopped."""
    boundary = current()
    continued = boundary.let_go(effect.quota) if boundary is not None and effect is not None else 0
    boot = proctree.boot_id()
    # Children first: a shell that wakes up should find its children running.
    for pid, ticks in reversed(plan.stopped):
        now = proctree.member(pid)
        if now is not None and now.start_ticks == ticks and now.state == "T" and not (boundary and boundary.holds(now)):
            continued += proctree.send(now, signal.SIGCONT, boot)
    text = f"{continued} processes continued" if plan.stopped else ""
    return "; ".join(filter(None, [text, boxes.empty_all(plan.boxes, keep)]))
