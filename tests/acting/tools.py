"""What the tests of acting share: a clock that can be set, requests, and waiting."""

from __future__ import annotations

import itertools
import os
import time
from pathlib import Path

from gpuguard import proctree
from gpuguard.broker import boxes
from gpuguard.broker.enforcement import Clock
from gpuguard.core.subjects import ProcessId
from gpuguard.messages import Act, Approve

ROOT = Path(__file__).parents[2]
numbers = itertools.count()


def _maps_everybody() -> bool:
    first = Path("/proc/self/uid_map").read_text().split()
    return int(first[2]) > 65534


#: Root of the host, not of a user namespace in which there is nobody else to become.
HOST_ROOT = os.geteuid() == 0 and _maps_everybody()


class SetClock(Clock, frozen=True):
    """The host's clock, moved on by ``ahead``."""

    ahead: list[int]

    def wall_ns(self):
        return time.time_ns() + self.ahead[0]

    def boot_ns(self):
        return time.clock_gettime_ns(time.CLOCK_BOOTTIME) + self.ahead[0]


def until(condition, what="it"):
    """Wait for a condition; the limit is there for a broken build, not for a slow machine."""
    end = time.monotonic() + 200
    while not (found := condition()):
        assert time.monotonic() < end, f"{what} did not happen"
        time.sleep(0.005)
    return found


def state(pid):
    seen = proctree.member(pid)
    return seen.state if seen else "gone"


def goes_on(pid):
    """Return whether a process runs, or waits for what it asked for; of a disk or a lock, too, while it starts."""
    return state(pid) in {"R", "S", "D"}


def process_of(pid):
    return ProcessId(proctree.boot_id(), pid, proctree.member(pid).start_ticks)


def act(pid, action="pause", **changes):
    cgroup = changes.pop("cgroup", proctree.cgroup_of(pid) or "/")
    fields = {"decision_id": f"decision-{next(numbers)}", "action": action, "target": process_of(pid),
              "cgroup": cgroup, "cgroup_id": boxes.cgroup_id(cgroup), "ttl_s": 600.0, "approved_by": "",
              "reason": "a test"}
    return Act(**{**fields, **changes})


def approved(one, request, by="alice"):
    """Give a person's approval of a request to the enforcement, and return the request."""
    one.approve(Approve(request.decision_id, request.target, by, "a test"))
    return request
