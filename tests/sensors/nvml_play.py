"""Play a story of the stand-in driver: pynvml loads its library once in a process, so each runs in a child."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

STANDIN = Path(__file__).parent.parent / "standins" / "libnvidia_ml" / "build.py"

HEAD = """
import json, os, sys, time
from pathlib import Path
import msgspec
from gpuguard.config import Config, NvmlSettings
from gpuguard.core.records import Gap
from gpuguard.messages import Found, Refused
from gpuguard.core.records import ProcessStarted
from gpuguard.core.subjects import ProcessId
from gpuguard.sensors import EyeClosed, nvml
from gpuguard.sensors.nvml.names import start_ticks

nvml.ANSWER_WAIT_S = 20.0

class Broker:
    asked = []
    def ask(self, request):
        self.asked.append(request.pid)
        ticks = start_ticks(request.pid)
        if ticks is None:
            return Refused(reason="no such process"), ()
        who = ProcessId("boot", request.pid, ticks)
        return Found(processes=(ProcessStarted(0, who, None, "x", ()),)), ()

broker = Broker()
def at(second):
    Path(os.environ["GPUGUARD_STANDIN_NVML_CLOCK"]).write_text(str(second))
    return int((1760000000 + second) * 1e9)
def script(text):
    Path(os.environ["GPUGUARD_STANDIN_NVML_SCRIPT"]).write_text(text)
def show(blocks):
    for block in blocks:
        print(msgspec.json.encode(block).decode())
"""


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    if shutil.which("cc") is None:
        pytest.skip("no C compiler: the stand-in driver cannot be built")
    spec = importlib.util.spec_from_file_location("standin_nvml_build", STANDIN)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.build(tmp_path_factory.mktemp("nvml"))


@pytest.fixture
def play(library, tmp_path):
    """Run Python code against a script in a child; return the records that it shows."""

    def run(script: str | None, code: str, **environ: str) -> list[dict]:
        env = {**os.environ, "LD_LIBRARY_PATH": str(library.parent), "STANDIN_PID": str(os.getpid()), **environ}
        env["GPUGUARD_STANDIN_NVML_SCRIPT"] = str(tmp_path / "script")
        env["GPUGUARD_STANDIN_NVML_CLOCK"] = str(tmp_path / "clock")
        if script is not None:
            (tmp_path / "script").write_text(script)
        command = [sys.executable, "-c", HEAD + textwrap.dedent(code)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    return run


def of(records, kind):
    return [record for record in records if record.get("type") == kind]


SWEEPS = """
sensor = nvml.open_sensor(broker, Config(), now_ns=at(0))
for second in {seconds}:
    show(sensor.read(at(second)))
sensor.close()
"""
