"""Kill: the tree ends, SIGTERM first, SIGKILL after the grace time. Irreversible, so only ever with an approval.

In a box of its own where the host has cgroup v2: children forked meanwhile are in it, and cgroup.kill (Linux 5.14)
takes all at once. Elsewhere by pidfds, stopping the tree before the last blow so that nothing forks past it. The
broker goes on meanwhile: ``apply`` only begins, `strike` comes when the grace time is over, and then it is watched
until the last one is gone: freeing pinned GPU memory takes its time. A process in uninterruptible sleep outlives
SIGKILL: it is reported as alive, never as killed. Where the launch eye is open, whoever launches another kernel in the
grace time ends at that launch, before it is made.
"""

from __future__ import annotations

import contextlib
import signal
import time
from typing import TYPE_CHECKING

from gpuguard import proctree
from gpuguard.broker import boxes
from gpuguard.broker.actions import Effect
from gpuguard.broker.boundary import MODE_KILL, current
from gpuguard.broker.journal import Plan

if TYPE_CHECKING:
    from gpuguard.broker.actions import Job
    from gpuguard.proctree import Member

GONE_S = 30.0


def apply(job: Job) -> Effect:
    """Ask the tree to end."""
    plan = Plan(boxes=boxes.plan(proctree.tree([job.root.pid])) if boxes.mount() is not None else ())
    job.record(plan)
    members, plan = _gather(job, plan)
    asked = sum(proctree.send(one, signal.SIGTERM, job.boot_id) for one in members)
    boundary = current()
    # It may use the grace time to save its work, not to go on with it.
    quota = boundary.hold(members, MODE_KILL) if boundary is not None else 0
    return Effect(text=f"SIGTERM to {asked} processes, SIGKILL to what is left in {job.grace_s:g} s", plan=plan,
                  members=members, due_s=time.monotonic() + job.grace_s, quota=quota)


def _gather(job: Job, plan: Plan) -> tuple[list[Member], Plan]:
    if plan.boxes:
        try:
            members = boxes.fill(job.root, plan.boxes)
            for box in plan.boxes:
                boxes.freeze(box, on=False)
        except OSError:
            boxes.empty_all(plan.boxes, job.keep)
        else:
            return members, plan
    return proctree.tree([job.root.pid]), Plan()


def alive(effect: Effect) -> list[Member]:
    """Return who of the tree lives, with children that came since."""
    now = proctree.everybody()
    known = [one.pid for one in effect.members if one.pid in now and now[one.pid].start_ticks == one.start_ticks]
    boxed = [pid for box in effect.plan.boxes for pid in boxes.pids(box)]
    return proctree.tree([*known, *boxed], now)


def strike(effect: Effect) -> None:
    """Kill what is left."""
    boot = proctree.boot_id()
    for box in effect.plan.boxes:
        # Before Linux 5.14 there is no such file; the signals below do it then.
        with contextlib.suppress(OSError):
            boxes.kill(box)
    for one in _stood_still(effect, boot):
        proctree.send(one, signal.SIGKILL, boot)
    _open_boundary(effect)
    effect.struck, effect.due_s = True, time.monotonic() + GONE_S


def _open_boundary(effect: Effect) -> None:
    boundary = current()
    if boundary is not None and effect.quota:
        boundary.let_go(effect.quota)
    effect.quota = 0


def _stood_still(effect: Effect, boot: str) -> list[Member]:
    """Stop the tree until no new child turns up; return all of it."""
    done: dict[int, Member] = {}
    for _ in range(proctree.PASSES_MAX):
        new = [one for one in alive(effect) if one.pid not in done]
        if not new:
            break
        for one in new:
            proctree.send(one, signal.SIGSTOP, boot)
            done[one.pid] = one
    return list(done.values())


def verify(effect: Effect) -> str:
    """Return "" when nobody of the tree is left."""
    left = alive(effect)
    return "still alive: " + ", ".join(f"pid {one.pid} (state {one.state})" for one in left[:8]) if left else ""


def undo(plan: Plan, effect: Effect | None, keep: frozenset[str]) -> str:
    """Open the box of those who live; the dead stay dead."""
    if effect is not None:
        _open_boundary(effect)
    return "; ".join(filter(None, ["a kill cannot be undone", boxes.empty_all(plan.boxes, keep)]))
