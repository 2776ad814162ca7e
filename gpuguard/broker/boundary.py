"""The launch boundary: a process is slowed, stopped or ended at its next kernel launch, before that reaches the GPU.

In the broker, `Boundary` writes one row a process into the map `quotas` of ext/bpf/launches.bpf.c; the program at the
launch site does the rest. Nothing is pinned: the rows and the probes go with the process that holds them.

Somebody has to continue what a rate stopped, many times a second, and to continue it for good when the broker is
killed. That is `main`, a process of its own (``python -m gpuguard.broker.boundary``) that runs while there are rows: it
sleeps until the next stopped process has earned its launch, and the end of its pipe tells it that the broker is gone.
If it goes, the broker starts another within its next look; if both go, the journal has everybody who may stand still.
"""

from __future__ import annotations

import itertools
import os
import select
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

from msgspec import Struct

from gpuguard import proctree
from gpuguard.proctree import Member

if TYPE_CHECKING:
    from collections.abc import Iterable

# enum quota_mode of ext/bpf/launches.h; the greater one wins where several acts hold one process.
MODE_RATE, MODE_STOP, MODE_KILL = range(3)

SECOND_NS = 1_000_000_000
RATE_MAX = 1e7
#: A stop is noticed within this; when to wake is then known to the nanosecond.
LOOK_NS = 10_000_000
SETTLE_S = 0.02
_QUIT, _LOOK = b"q", b"n"

_keys = itertools.count(1)


class Quota(Struct, frozen=True):
    """What one act wants of one process."""

    process: tuple[int, int]
    mode: int
    interval_ns: int


class Boundary:
    """All quotas of the loaded launch programs, and the process that wakes."""

    def __init__(self, quotas_fd: int, held_fd: int) -> None:
        self._quotas_fd = quotas_fd
        self._held_fd = held_fd
        self._wanted: dict[int, dict[int, Quota]] = {}
        self._in_force: dict[int, Quota] = {}
        self._waker: subprocess.Popen[bytes] | None = None

    def hold(self, members: Iterable[Member], mode: int, per_s: float = 0.0, key: int = 0) -> int:
        """Give each process a quota; return the key by which `let_go` takes them back. Raises `OSError`.

        ``per_s`` is the rate for MODE_RATE. With the ``key`` of an earlier call the processes join those of that one.
        """
        if mode == MODE_RATE and not 0 < per_s <= RATE_MAX:
            raise OSError(f"{per_s} launches a second: it must lie in 0..{RATE_MAX:g}")
        key = key or next(_keys)
        interval_ns = max(1, round(SECOND_NS / per_s)) if mode == MODE_RATE else 0
        try:
            for one in members:
                wanted = self._wanted.setdefault(one.pid, {})
                wanted[key] = Quota((one.pid, one.start_ticks), mode, interval_ns)
                self._apply(one.pid)
            self._keep_waker()
        except OSError:
            self.let_go(key)
            raise
        return key

    def has(self, key: int) -> bool:
        """Return whether any process is held by this key."""
        return any(key in wanted for wanted in self._wanted.values())

    def holds(self, one: Member) -> bool:
        """Return whether this process has a quota, so that it may stand still because of us."""
        quota = self._in_force.get(one.pid)
        return quota is not None and quota.process == (one.pid, one.start_ticks)

    def let_go(self, key: int) -> int:
        """Take back what this key holds, and continue whom it stopped; return how many were continued."""
        pids = [pid for pid, wanted in self._wanted.items() if wanted.pop(key, None) is not None]
        rows = {row[0]: row for row in self.rows()}
        before = dict(self._in_force)
        for pid in pids:
            self._apply(pid)
        if not pids:
            return 0
        _settle()
        free = [before[pid].process for pid in pids if pid in before and pid not in self._in_force]
        boot = proctree.boot_id()
        continued = sum(_continue(process, boot, stopped=rows.get(process[0], (0,) * 7)[6] > 0) for process in free)
        self._keep_waker()
        return continued

    @property
    def waker_pid(self) -> int:
        """The process that wakes, 0 while nobody has a quota."""
        return self._waker.pid if self._waker else 0

    def rows(self) -> list[tuple[int, int, int, int, int, int, int]]:
        """Return (pid, start_ticks, mode, interval_ns, due_ns, launches, stops) of every row."""
        from gpuguard import _launches

        return _launches.read_quotas(self._quotas_fd)

    def look(self) -> str:
        """Drop rows of processes that ended; start the waker again if it is gone, and say so."""
        for pid, quota in list(self._in_force.items()):
            now = proctree.member(pid)
            if now is None or now.start_ticks != quota.process[1]:
                self._wanted.pop(pid, None)
                self._apply(pid)
        gone = self._waker is not None and self._waker.poll() is not None
        self._keep_waker()
        return "the process that wakes had ended: started again" if gone else ""

    def close(self, *, release: bool = True) -> None:
        """Take every row back; continue whom a rate stopped. Whom a pause stopped, its undo continues."""
        rated = [quota.process for quota in self._in_force.values() if quota.mode == MODE_RATE]
        held = bool(self._in_force)
        self._wanted.clear()
        for pid in list(self._in_force):
            self._apply(pid)
        self._keep_waker()
        if held:
            _settle()
        boot = proctree.boot_id() if rated and release else ""
        for process in rated if release else ():
            _continue(process, boot, stopped=True)

    def _apply(self, pid: int) -> None:
        """Bring the row of one process in line with what all acts want of it: the sternest."""
        from gpuguard import _launches

        wanted = self._wanted.get(pid) or {}
        if not wanted:
            self._wanted.pop(pid, None)
            if self._in_force.pop(pid, None) is not None:
                _launches.delete_quota(self._quotas_fd, pid)
                _launches.say_held(self._held_fd, len(self._in_force))
            return
        quota = max(wanted.values(), key=lambda one: (one.mode, one.interval_ns))
        if self._in_force.get(pid) == quota:
            return
        now_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        _launches.set_quota(self._quotas_fd, pid, quota.process[1], quota.mode, quota.interval_ns, now_ns)
        self._in_force[pid] = quota
        _launches.say_held(self._held_fd, len(self._in_force))

    def _keep_waker(self) -> None:
        if not self._in_force:
            self._stop_waker(_QUIT)
            return
        if self._waker is not None and self._waker.poll() is not None:
            self._stop_waker(b"")
        if self._waker is None:
            # A session of its own: what ends the broker's process group must not end the one that cleans up after it.
            self._waker = subprocess.Popen(
                [sys.executable, "-P", "-m", "gpuguard.broker.boundary", str(self._quotas_fd)], stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL, pass_fds=(self._quotas_fd,), start_new_session=True, bufsize=0)
        elif self._waker.stdin is not None:
            try:
                self._waker.stdin.write(_LOOK)
            except BrokenPipeError:
                self._stop_waker(b"")
                self._keep_waker()

    def _stop_waker(self, word: bytes) -> None:
        if self._waker is None:
            return
        if self._waker.stdin is not None:
            try:
                self._waker.stdin.write(word)
                self._waker.stdin.close()
            except BrokenPipeError:
                # It is gone already; what it would have done, `let_go` and the next waker do.
                self._waker.stdin.close()
        self._waker.wait()
        self._waker = None


class _Open:
    """Where launches can be stopped on this host: at most one place in a process."""

    boundary: Boundary | None = None


def opened(boundary: Boundary | None) -> None:
    """Tell the actions that the launch eye was opened, or closed (None)."""
    _Open.boundary = boundary


def current() -> Boundary | None:
    """Return the open boundary, None while the launch eye is not open in this process."""
    return _Open.boundary


def _settle() -> None:
    """Wait until no launch program that may have seen a deleted row is still running."""
    from gpuguard import _launches

    if not _launches.synchronise():
        time.sleep(SETTLE_S)


def _continue(process: tuple[int, int], boot: str, *, stopped: bool) -> bool:
    """Continue exactly this process if we stopped it, or if it stands still; return whether a signal was sent."""
    now = proctree.member(process[0])
    if now is None or now.start_ticks != process[1] or not (stopped or now.state == "T"):
        return False
    return proctree.send(now, signal.SIGCONT, boot)


# -- the process that wakes -------------------------------------------------------------------------------------------


def wake(quotas_fd: int, seen: dict[tuple[int, int, int], int], boot: str) -> int | None:
    """Continue every process that its rate stopped and that has earned its next launch.

    Returns in how many nanoseconds to look again, None while no process has a rate. ``seen`` holds, for each row, up to
    which stop it was continued; a row that is new here gets one signal in any case, because it may have taken the place
    of another under which it was stopped.
    """
    from gpuguard import _launches

    wait_ns = None
    rows = [row for row in _launches.read_quotas(quotas_fd) if row[2] == MODE_RATE]
    alive = {(row[0], row[1], row[3]) for row in rows}
    for key in seen.keys() - alive:
        del seen[key]
    for pid, start_ticks, _, interval_ns, due_ns, _, stops in rows:
        key = (pid, start_ticks, interval_ns)
        wait_ns = min(LOOK_NS, LOOK_NS if wait_ns is None else wait_ns)
        if seen.get(key) == stops:
            continue
        left_ns = due_ns - interval_ns - time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        if left_ns > 0:
            wait_ns = min(wait_ns, left_ns)
            continue
        seen[key] = stops
        proctree.send(Member(pid, start_ticks, 0, "T", 0), signal.SIGCONT, boot)
    return wait_ns


def release(quotas_fd: int, boot: str) -> None:
    """Take every row away and continue everybody who may stand still for it: the broker is gone."""
    from gpuguard import _launches

    rows = _launches.read_quotas(quotas_fd)
    for row in rows:
        _launches.delete_quota(quotas_fd, row[0])
    _settle()
    for row in rows:
        _continue((row[0], row[1]), boot, stopped=row[6] > 0)


def main() -> int:
    """Wake until told to stop; when the pipe ends, release. See the head of this file."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        # Whoever asks us all to end asks the broker too, and that one tells us when nobody needs us any more.
        signal.signal(number, signal.SIG_IGN)
    quotas_fd, boot = int(sys.argv[1]), proctree.boot_id()
    seen: dict[tuple[int, int, int], int] = {}
    while True:
        wait_ns = wake(quotas_fd, seen, boot)
        if not select.select([0], [], [], None if wait_ns is None else wait_ns / SECOND_NS)[0]:
            continue
        said = os.read(0, 4096)
        if _QUIT in said:
            return 0
        if not said:
            release(quotas_fd, boot)
            return 0


if __name__ == "__main__":
    sys.exit(main())
