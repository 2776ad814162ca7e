"""Children to act on, cgroups to put them in, folders for state. All is taken away again."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from gpuguard import paths, proctree
from gpuguard.broker import boxes
from gpuguard.broker.enforcement import Enforcement
from gpuguard.broker.protected import Limits
from tests.acting.tools import ROOT, SetClock, numbers, until


@pytest.fixture
def folders(monkeypatch):
    """State, runtime and log folders that an unprivileged guard can reach, too."""
    top = Path(tempfile.mkdtemp(prefix="acting-"))
    top.chmod(0o755)
    monkeypatch.setenv(paths.STATE_VARIABLE, str(top / "state"))
    monkeypatch.setenv(paths.RUNTIME_VARIABLE, str(top / "run"))
    monkeypatch.setenv(paths.LOG_VARIABLE, str(top / "log"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    yield top
    shutil.rmtree(top)


@pytest.fixture
def enforcement(folders, monkeypatch):
    """Return a function that makes an `Enforcement`; all are closed at the end."""
    monkeypatch.setattr(boxes, "FREEZE_WAIT_S", 100.0)  # a busy machine is slow to freeze, too
    made = []

    def make(*, enforcing=True, limits=None, ahead=None):
        one = Enforcement(paths.make_dir(paths.state_dir()), paths.make_dir(paths.log_dir()), enforcing=enforcing,
                          limits=limits or Limits(grace_s=0.2), clock=SetClock(ahead if ahead is not None else [0]))
        made.append(one)
        return one

    yield make
    for one in made:
        with contextlib.suppress(OSError):
            one.undo("", "the test is over", "operator")
            one.close("the test is over")


@pytest.fixture
def spawn():
    """Return a function that starts a child with a session of its own; everything it started is killed at the end."""
    made = []

    def start(code, *args, command=None, **options):
        argv = command or [sys.executable, "-c", code]
        options.setdefault("stdin", subprocess.DEVNULL)
        child = subprocess.Popen([*argv, *map(str, args)], start_new_session=True, **options)
        made.append(child)
        return child

    yield start
    for child in made:
        # By descent and by session: an orphan has lost the first, a guard has a session of its own.
        theirs = proctree.tree([child.pid]) if child.poll() is None else []
        for pid in {one.pid for one in theirs} | _session(child.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        child.wait()
        for pipe in filter(None, (child.stdin, child.stdout)):
            pipe.close()


def _session(leader):
    found = set()
    for pid in proctree.everybody():
        with contextlib.suppress(ProcessLookupError):
            found |= {pid} if os.getsid(pid) == leader else set()
    return found


FAMILY = """
import os, signal, sys, time
if os.fork() == 0:
    if os.fork() == 0:
        open(sys.argv[1], "w").write("ready")
    while True:
        time.sleep(0.01)
while True:
    time.sleep(0.01)
"""


@pytest.fixture
def family(spawn, tmp_path):
    """Return (child, its pids): a process, its child and its grandchild."""

    def make():
        ready = tmp_path / f"ready-{next(numbers)}"
        child = spawn(FAMILY, ready)
        until(lambda: ready.exists() and ready.read_text() == "ready" and len(proctree.tree([child.pid])) == 3)
        return child, [one.pid for one in proctree.tree([child.pid])]

    return make


@pytest.fixture
def park():
    """Return a function that puts processes into a fresh cgroup v2; skipped where none can be made."""
    if os.geteuid() != 0 or boxes.mount() is None:
        pytest.skip("needs root and a cgroup v2 hierarchy that can be written")
    made = []

    def into(*pids):
        path = boxes.mount() / f"acting-test-{os.getpid()}-{next(numbers)}"
        try:
            path.mkdir()
        except OSError as error:
            pytest.skip(f"no cgroup can be made here: {error}")
        made.append(path)
        for pid in pids:
            (path / "cgroup.procs").write_text(str(pid))
        return "/" + path.name

    yield into
    for path in made:
        (path / "cgroup.kill").write_text("1")
        inside = sorted((one for one in path.rglob("*") if one.is_dir()), key=lambda one: -len(one.parts))
        for one in [*inside, path]:
            until(lambda folder=one: not (folder / "cgroup.procs").read_text())
            until(lambda folder=one: _gone(folder))


def _gone(folder):
    try:
        folder.rmdir()
    except OSError:
        return False
    return True


@pytest.fixture
def no_boxes(monkeypatch):
    """Be on a host without cgroup v2."""
    monkeypatch.setattr(boxes, "mount", lambda: None)
