"""The stand-ins that probes are placed on, for tests of the launch eye; skips where none can be placed."""

from __future__ import annotations

import os
import shutil

import pytest

from gpuguard.sensors import EyeClosed, launches
from tests.standins.build import SHAPES, build


def standins_to_probe(folder, driver=SHAPES[0]):
    if os.geteuid() != 0:
        pytest.skip("needs root: uprobes and BPF are privileged")
    if shutil.which("cc") is None:
        pytest.skip("no C compiler: the stand-in driver cannot be built")
    try:
        launches.new_probe().close()
    except (EyeClosed, OSError) as error:
        pytest.skip(f"this host or build cannot probe: {error}")
    return build(folder, driver)
