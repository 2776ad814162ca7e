"""The CUDA forms equal the plain ones, in Numba's simulator everywhere and on a GPU where there is one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "on_gpu.py"


def run(**environment):
    return subprocess.run([sys.executable, "-W", "ignore", SCRIPT], env={**os.environ, **environment},
                          capture_output=True, text=True, check=False)


def test_in_the_simulator():
    # Of its own process: the simulator is chosen when numba.cuda is first imported.
    done = run(NUMBA_ENABLE_CUDASIM="1")
    assert done.stdout.strip() == "same", done.stderr


@pytest.mark.gpu
def test_on_a_gpu():
    from numba import cuda

    if not cuda.is_available():
        pytest.skip("no CUDA device, or no driver that this numba can use")
    done = run()
    assert done.stdout.strip() == "same", done.stderr


def test_measurements_take_numba_by_way_of_what_mends_it():
    """Up to 0.30 numba-cuda compiles nothing beside NumPy 2.5, unless `gpuguard.kernels.device` came first."""
    root = SCRIPT.parents[2]
    found = [path.name for path in (root / "benchmarks").rglob("*.py") if "from numba import cuda" in path.read_text()]
    assert found == []
