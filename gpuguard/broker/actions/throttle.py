"""Throttle: each process of a tree may make so many kernel launches a second, and stands still when it is ahead.

The quota is kept where the launch is made (`boundary`), so it needs the launch eye. A process that is ahead is stopped
by SIGSTOP before the launch reaches the GPU and continued as soon as it has earned it; a parent that waits with
WUNTRACED, and a shell, see that. Who stood still before is left alone. Children that are started meanwhile get
their quota at the next look, within about a second.
"""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

from gpuguard import proctree
from gpuguard.broker.actions import Effect, Job
from gpuguard.broker.boundary import MODE_RATE, Boundary, current
from gpuguard.broker.journal import Plan

if TYPE_CHECKING:
    from gpuguard.proctree import Member


def apply(job: Job) -> Effect:
    """Give the tree its quotas."""
    boundary = _boundary()
    effect = Effect(text="", plan=Plan(), grow=job.record, launches_per_s=job.launches_per_s)
    _take_in(boundary, effect, proctree.tree([job.root.pid]))
    effect.text = f"{len(effect.members)} processes may make {job.launches_per_s:g} launches a second each"
    return effect


def _boundary() -> Boundary:
    boundary = current()
    if boundary is None:
        raise OSError("throttle counts launches where they are made: the launch eye is not open")
    return boundary


def _take_in(boundary: Boundary, effect: Effect, new: list[Member]) -> None:
    moving = [one for one in new if one.state not in "Tt" or boundary.holds(one)]
    plan = Plan(stopped=tuple((one.pid, one.start_ticks) for one in moving))
    if effect.grow is not None and moving:
        effect.grow(plan)
    effect.plan = Plan(stopped=effect.plan.stopped + plan.stopped)
    effect.members += new
    effect.quota = boundary.hold(moving, MODE_RATE, effect.launches_per_s, effect.quota)


def verify(effect: Effect) -> str:
    """Return what does not hold; children that were started since get their quota."""
    boundary = _boundary()
    everybody = proctree.everybody()
    known = {(one.pid, one.start_ticks) for one in effect.members}
    alive = [one for one in everybody.values() if (one.pid, one.start_ticks) in known]
    problem = boundary.look()
    if alive and not boundary.has(effect.quota):
        effect.quota = boundary.hold(alive, MODE_RATE, effect.launches_per_s)
        problem = "the launch eye was opened anew: quotas given again"
    new = [one for one in proctree.tree([one.pid for one in alive], everybody)
           if (one.pid, one.start_ticks) not in known]
    if new:
        _take_in(boundary, effect, new)
    return problem


def undo(plan: Plan, effect: Effect | None, keep: frozenset[str]) -> str:
    """Take the quotas back, and continue whom they stopped."""
    del keep
    boundary = current()
    continued = boundary.let_go(effect.quota) if boundary is not None and effect is not None else 0
    boot = proctree.boot_id()
    for pid, ticks in plan.stopped:
        now = proctree.member(pid)
        if now is None or now.start_ticks != ticks or now.state != "T" or (boundary and boundary.holds(now)):
            continue
        continued += proctree.send(now, signal.SIGCONT, boot)
    return f"launches are free again, {continued} processes continued"
