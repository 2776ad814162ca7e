"""A busy GPU without launches: said with its innocent explanations, taken back when launches come, never accusing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuguard.core.detectors import counters
from gpuguard.core.detectors.launch_silent import BLIND_SPOTS, NEVER_NATS, PERSISTENT_NATS, Detector
from gpuguard.core.fusion import SUSPECT_NATS
from gpuguard.core.host import Host
from gpuguard.core.records import (
    LAUNCH,
    LAUNCH_APIS,
    Gap,
    Launches,
    ProcessExited,
    ProcessSample,
    ProcessStarted,
)
from gpuguard.core.subjects import ProcessId

SECOND = 1_000_000_000
WHO = ProcessId("boot", 7, 70)


def launch(second, *, api="cuLaunchKernel", pid=7, start_ticks=70):
    rows = np.zeros(1, LAUNCH)
    rows["pid"], rows["start_ticks"], rows["launches"], rows["api"] = pid, start_ticks, 1, LAUNCH_APIS.index(api)
    return Launches(int(second * SECOND), rows)


def started(second, name="worker"):
    return ProcessStarted(int(second * SECOND), WHO, None, name, (name,))


def busy(start, end, sm_ratio=0.95, period=1.0, alive=10.0):
    """Samples of the process, and blocks without rows from an eye that sees nothing."""
    times = np.arange(start, end, period)
    blocks = [ProcessSample(int(t * SECOND), WHO, "GPU-a", 1, sm_ratio) for t in times]
    blocks += [Launches(int(t * SECOND), np.zeros(0, LAUNCH)) for t in np.arange(start, end, alive)] if alive else []
    return sorted(blocks, key=lambda block: block.time_ns)


OPEN = Launches(1 * SECOND, np.zeros(0, LAUNCH))


def play(*blocks, detector=None):
    detector, host, evidence = detector or Detector(), Host(), []
    for block in [one for part in blocks for one in (part if isinstance(part, list) else [part])]:
        host.receive(block)
        evidence += detector.receive(block, host)
    return evidence


def test_a_process_that_was_watched_from_its_start_and_never_launched():
    one, = play(OPEN, started(2), busy(3, 120))
    assert (one.kind, one.evidence_class, one.label, one.nats) == (
        "launch-silent-activity", "launch", "mining", NEVER_NATS)
    assert one.subject == WHO
    assert "never launched a kernel since it began" in one.text
    assert one.blind_spots == BLIND_SPOTS
    assert one.time_ns - one.start_ns >= 60 * SECOND


@pytest.mark.parametrize("blocks", [
    (OPEN, started(2), launch(3), busy(4, 120)),
    (started(0), OPEN, busy(2, 120)),
    (OPEN, busy(2, 120)),
])
def test_where_a_persistent_kernel_would_explain_it_it_weighs_next_to_nothing(blocks):
    one, = play(*blocks)
    assert one.nats == PERSISTENT_NATS
    assert "a persistent kernel would explain it" in one.text


@pytest.mark.parametrize("why", {
    "replays of a graph are launches": [OPEN, started(2), *(
        block for second in range(3, 200, 20)
        for block in [launch(second, api="cuGraphLaunch"), *busy(second, second + 20)])],
    "no eye": [started(2), *busy(3, 200, alive=0)],
    "an eye that went quiet": [OPEN, started(2), *busy(32, 200, alive=0)],
    "not busy": [OPEN, started(2), *busy(3, 200, sm_ratio=0.1)],
    "not for long": [OPEN, started(2), *busy(3, 50)],
    "in pieces": [OPEN, started(2), *(block for at in range(0, 400, 50) for block in busy(at + 3, at + 33))],
    "looked at too seldom": [OPEN, started(2), *busy(3, 400, period=15.0)],
    "an MPS server": [OPEN, started(2, "nvidia-cuda-mps-server"), *busy(3, 200)],
    "a blind eye": [OPEN, started(2), Gap(3 * SECOND, "launches", "a library was refused"), *busy(4, 200)],
    "ended": [OPEN, started(2), *busy(3, 50), ProcessExited(50 * SECOND, WHO), *busy(50, 80)],
}.items(), ids=lambda one: one[0])
def test_what_is_explained_is_not_said(why):
    assert play(why[1]) == []


def test_the_gap_of_another_process_blinds_nobody():
    gap = Gap(3 * SECOND, "launches", "code not read", process=ProcessId("boot", 9, 9))
    assert len(play(OPEN, started(2), gap, busy(4, 120))) == 1


def test_it_is_taken_back_when_launches_come_and_may_be_said_again():
    said, back, again = play(OPEN, started(2), busy(3, 120), launch(121), busy(122, 240))
    assert said.nats + back.nats == 0
    assert "after all" in back.text
    assert again.nats == PERSISTENT_NATS


def test_launches_of_whoever_had_the_pid_before_are_not_its_own():
    assert len(play(OPEN, started(2), busy(3, 40), launch(41, start_ticks=69), busy(42, 120))) == 1


def test_by_itself_it_is_not_even_suspect_and_with_all_that_counters_can_say_far_from_confirmed():
    assert NEVER_NATS < SUSPECT_NATS
    assert NEVER_NATS + counters.CAP_NATS < 2 * SUSPECT_NATS


@given(st.lists(st.tuples(st.integers(0, 40), st.sampled_from(["busy", "idle", "launch", "alive", "gap", "exit"])),
                max_size=60))
def test_the_sum_is_never_more_than_one_saying(steps):
    detector, now, total = Detector(), 0, 0.0
    for seconds, what in [(1, "alive"), *steps]:
        now += seconds
        block = {"busy": ProcessSample(now * SECOND, WHO, "GPU-a", 1, 0.9),
                 "idle": ProcessSample(now * SECOND, WHO, "GPU-a", 1, 0.0), "launch": launch(now),
                 "alive": Launches(now * SECOND, np.zeros(0, LAUNCH)),
                 "gap": Gap(now * SECOND, "launches", "lost"), "exit": ProcessExited(now * SECOND, WHO)}[what]
        total = 0.0 if what == "exit" else total
        total += sum(one.nats for one in play(block, detector=detector))
        assert 0.0 <= total <= NEVER_NATS
