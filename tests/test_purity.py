"""The core is pure: nothing in it can look at the host, and with the host taken away it gives the same events."""

from __future__ import annotations

import ast
import builtins
import os
import random
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import msgspec
import pytest

from gpuguard.core.guard import Guard
from gpuguard.core.records import Gap, HostInfo, ProcessExited, ProcessStarted, Tick, ToolCall
from gpuguard.core.subjects import ProcessId

CORE = Path(__file__).parent.parent / "gpuguard" / "core"
FORBIDDEN = {
    "asyncio", "ctypes", "glob", "io", "logging", "multiprocessing", "os", "pathlib", "pickle", "random", "secrets",
    "selectors", "shutil", "signal", "socket", "ssl", "subprocess", "sys", "tempfile", "threading", "time", "urllib",
    "uuid", "psutil", "pynvml", "pyroute2", "grpc", "structlog", "yaml", "click",
}
FORBIDDEN_CALLS = {"open", "input", "print", "eval", "exec", "compile", "breakpoint"}
# importlib and pkgutil are how the folder of detectors is its own registry: that reads code, never data.
REGISTRY = CORE / "detectors" / "__init__.py"

MODULES = sorted(CORE.rglob("*.py"))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(CORE).as_posix())
def test_no_module_of_the_core_imports_the_world(path):
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        match node:
            case ast.Import():
                names = {alias.name for alias in node.names}
            case ast.ImportFrom():
                assert node.level == 0
                names = {node.module or ""}
            case ast.Call(func=ast.Name(id=called)):
                assert called not in FORBIDDEN_CALLS, f"line {node.lineno}: {called}()"
                continue
            case ast.Attribute(attr="now" | "utcnow" | "today" | "fromfile" | "tofile" | "memmap" | "loadtxt"):
                pytest.fail(f"line {node.lineno}: {ast.unparse(node)}")
            case _:
                continue
        for name in names:
            assert name.partition(".")[0] not in FORBIDDEN, f"line {node.lineno}: import {name}"
            if name.startswith("gpuguard."):
                pure = ("gpuguard.core", "gpuguard._", "gpuguard.kernels")
                assert name.startswith(pure), f"line {node.lineno}: {name}"
            if name in ("importlib", "pkgutil"):
                assert path == REGISTRY, f"line {node.lineno}: import {name}"


def records() -> list:
    """Return a little of everything that needs no array."""
    agent = ProcessId(boot_id="b", pid=10, start_ticks=1)
    child = ProcessId(boot_id="b", pid=11, start_ticks=2)
    call = ToolCall(time_ns=3, start_ns=3, end_ns=None, trace_id="a" * 32, span_id="b" * 16, parent_span_id="",
                    tool_name="shell", process=agent)
    return [
        HostInfo(time_ns=1, schema_version=1, boot_id="b", hostname="h", clock_ticks_per_s=100),
        ProcessStarted(time_ns=2, process=agent, parent=None, name="agent", argv=("agent",)),
        call,
        ProcessStarted(time_ns=4, process=child, parent=agent, name="ssh", argv=("ssh", "-R", "1:h:2", "far")),
        Gap(time_ns=5, sensor="nvml", reason="no driver"),
        Tick(time_ns=6_000_000_000),
        ProcessExited(time_ns=7_000_000_000, process=child, exit_status=0),
        Tick(time_ns=120_000_000_000),
    ]


def events(guard: Guard) -> bytes:
    out = [event for record in records() for event in guard.receive(record)]
    return msgspec.json.encode(out + guard.close(130_000_000_000))


def test_without_files_clock_sockets_and_chance_the_guard_gives_the_same_events(monkeypatch):
    expected = events(Guard())
    # Making one lists the folder of detectors; from then on it needs nothing.
    guard = Guard()

    def denied(*_: object, **__: object) -> None:
        raise AssertionError("the core reached for the world")

    # pytest itself reads the clock, so what is denied is put back before the assertion below.
    with monkeypatch.context() as world:
        world.setattr(builtins, "open", denied)
        for module, names in {
            os: ("open", "read", "write", "stat", "listdir", "scandir", "getpid", "urandom"),
            socket: ("socket", "create_connection", "getaddrinfo"),
            subprocess: ("Popen", "run"),
            time: ("time", "time_ns", "monotonic", "monotonic_ns", "perf_counter", "perf_counter_ns", "sleep"),
            random: ("random", "randint", "getrandbits"),
            threading.Thread: ("start",),
        }.items():
            for name in names:
                world.setattr(module, name, denied)
        got = events(guard)
    assert got == expected


def test_the_core_loads_neither_the_edge_nor_anything_that_talks():
    code = (
        "import sys, gpuguard.core.guard, gpuguard.core.detectors as d; d.new_detectors(); "
        "print(' '.join(sorted(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert not loaded & {"grpc", "pynvml", "pyroute2", "psutil", "structlog", "yaml", "rich", "google.protobuf"}
    edge = {name for name in loaded if name.startswith("gpuguard.") and not name.startswith("gpuguard.core")}
    assert {name for name in edge if not name.startswith(("gpuguard._", "gpuguard.kernels"))} == set()
