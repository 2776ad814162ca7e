"""What may be done to the host; one file a rung, each with ``apply``, ``verify``, ``undo``. They run in the broker.

``apply(job)`` acts on a checked tree: it journals through ``job.record`` everything that its undo needs *before* it
does it, and returns an `Effect`. ``verify(effect)`` returns "" while the effect holds, else what does not.
``undo(plan, effect, keep)`` needs the journaled plan alone; the effect, where this process still has it, gives back
what dies with the process anyway. All raise `OSError` when the kernel says no.
"""

from __future__ import annotations

from collections.abc import Callable

from msgspec import Struct, field

from gpuguard.broker.journal import Plan
from gpuguard.netlink import Table
from gpuguard.proctree import Member


class Job(Struct):
    """One act on one checked tree.

    ``record`` raises `JournalFailed`, and then nothing may be done. ``keep`` holds the boxes of other acts in force.
    """

    root: Member
    boot_id: str
    grace_s: float
    keep: frozenset[str]
    record: Callable[[Plan], None]
    launches_per_s: float = 0.0


class Namespace(Struct):
    """Our table in one network namespace, and the five-tuples that it drops (where it cannot go by cgroup)."""

    inode: int
    table: Table
    flows: set[bytes] = field(default_factory=set)


class Effect(Struct):
    """What an act did: the text for people, and what lives only as long as this process.

    ``due_s`` (monotonic) is when a kill has its next step: the last blow, or, once ``struck``, giving up on it.
    ``quota`` is the key of its quotas at the launch boundary (0: none), ``launches_per_s`` their rate, and ``grow``
    journals what the act takes in later.
    """

    text: str
    plan: Plan
    members: list[Member] = field(default_factory=list)
    namespaces: list[Namespace] = field(default_factory=list)
    mark: int = 0
    due_s: float | None = None
    struck: bool = False
    quota: int = 0
    launches_per_s: float = 0.0
    grow: Callable[[Plan], None] | None = None
