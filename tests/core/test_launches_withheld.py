"""Who was given the capture library and shows nothing: the excuses first, then the finding, then its withdrawal."""

from __future__ import annotations

import numpy as np
import pytest

from gpuguard.core.detectors.launches_withheld import WITHHELD_NATS, Detector
from gpuguard.core.fusion import SUSPECT_NATS
from gpuguard.core.guard import Guard
from gpuguard.core.host import Host
from gpuguard.core.records import LAUNCH, Gap, Launches, ProcessExited, ProcessSample, ProcessStarted
from gpuguard.core.subjects import ProcessId

SECOND = 1_000_000_000
WHO = ProcessId("boot", 7, 70)
GIVEN = {"CUDA_INJECTION64_PATH": "/opt/gpuguard/libgpuguard_capture.so"}


def launches(second, count=0, pid=7):
    rows = np.zeros(count, LAUNCH)
    rows["pid"], rows["start_ticks"], rows["launches"] = pid, 70, 1
    return Launches(int(second * SECOND), rows)


def given(environ=GIVEN):
    return ProcessStarted(0, WHO, None, "worker", ("worker",), environ=environ)


def busy(start, end, sm_ratio=0.9, period=1.0, alive=10.0):
    blocks = [ProcessSample(int(t * SECOND), WHO, "GPU-a", 1, sm_ratio) for t in np.arange(start, end, period)]
    blocks += [launches(t) for t in np.arange(start, end, alive)] if alive else []
    return sorted(blocks, key=lambda block: block.time_ns)


def nats(*blocks):
    detector, host = Detector(), Host()
    return [one.nats for block in blocks for one in detector.receive(block, host)]


@pytest.mark.parametrize("blocks", [
    [given({}), *busy(0, 300)],
    [given({"CUDA_INJECTION64_PATH": "/opt/nsight/libToolsInjection64.so"}), *busy(0, 300)],
    [given(), *busy(0, 300, sm_ratio=0.02)],
    [given(), *busy(0, 55)],
    [given(), *busy(0, 300, period=30)],
    [given(), *busy(0, 300, alive=0)],
    [given(), *busy(0, 300, alive=100)],
    [given(), launches(1, 1), *busy(2, 300)],
    [given(), Gap(SECOND, "launches", "2 calls of its driver have an unknown shape", process=WHO), *busy(2, 300)],
    [given(), ProcessExited(SECOND, WHO), *busy(2, 300)],
    [*busy(0, 300)],
], ids=["not given", "another library", "idle", "short", "seldom sampled", "eye closed", "eye seldom open", "launches",
        "driver not understood", "ended", "start not seen"])
def test_who_has_an_excuse_is_left_alone(blocks):
    assert nats(*blocks) == []


def test_who_computes_and_shows_nothing_is_told_once():
    assert nats(given(), *busy(0, 300)) == [WITHHELD_NATS]


def test_it_is_taken_back_when_launches_come():
    assert nats(given(), *busy(0, 100), launches(101, 1)) == [WITHHELD_NATS, -WITHHELD_NATS]


def test_it_is_a_finding_and_never_confirmed():
    guard = Guard()
    events = [event for block in [given(), *busy(0, 600)] for event in guard.receive(block)]
    findings = [event for event in events if getattr(event, "label", "") == "launches-withheld"]
    assert [one.verdict for one in findings] == ["suspect"]
    assert findings[0].process.process == WHO
    assert SUSPECT_NATS <= WITHHELD_NATS
