"""Counters support, and never accuse alone."""

from __future__ import annotations

import csv
import gzip
import math
import os
import random
from collections import Counter, defaultdict
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuguard.core.detectors import counters
from gpuguard.core.detectors.counters import CAP_NATS, FLOOR_NATS, Detector, Series
from gpuguard.core.fusion import SUSPECT_NATS, Fusion
from gpuguard.core.host import Host
from gpuguard.core.records import DeviceSample, ProcessExited, ProcessSample
from gpuguard.core.subjects import ProcessId

SECOND = 1_000_000_000
WHO = ProcessId("boot", 7, 70)
OTHER = ProcessId("boot", 8, 80)


def play(rows, detector=None):
    """Feed (second, uuid, process, sm_ratio, power_w, pcie bytes/s) rows; return all evidence."""
    detector, host, evidence = detector or Detector(), Host(), []
    for second, uuid, process, sm, power_w, pcie in rows:
        time_ns = int(second * SECOND)
        sample = DeviceSample(time_ns, uuid, gpu_ratio=sm, power_w=power_w, pcie_tx_bytes_per_s=pcie)
        evidence += detector.receive(sample, host)
        evidence += detector.receive(ProcessSample(time_ns, process, uuid, 1, sm), host)
    return evidence


def flat(seconds, *, process=WHO, uuid="GPU-a", start=0, pcie=1000, rng=None):
    rng = rng or random.Random(1)
    return [(start + s, uuid, process, 0.98, 430 + rng.gauss(0, 3), pcie) for s in range(seconds)]


def nats(evidence):
    return sum(one.nats for one in evidence)


def test_flat_and_quiet_supports_mining_and_stays_below_suspect_for_ever():
    evidence = play(flat(86_400))
    assert {(one.subject, one.label, one.evidence_class, one.kind) for one in evidence} == {
        (WHO, "mining", "counter", "counters-steady")}
    assert CAP_NATS - counters.TOLD_NATS < nats(evidence) <= CAP_NATS
    assert "ordinary CUDA programs" in evidence[0].blind_spots[0]
    assert "98% busy" in evidence[0].text
    assert len(evidence) < 20


def test_nothing_is_said_before_one_window_is_over():
    assert play(flat(20)) == []
    assert len(play(flat(22))) == 1


def test_the_rate_of_sampling_adds_nothing():
    fast = [(second + i / 10, *row) for second, *row in flat(600) for i in range(10)]
    assert nats(play(fast)) == pytest.approx(nats(play(flat(600))), abs=0.01)


def test_copies_and_phases_speak_against():
    copies = play([(s, "a", WHO, 0.98, 430.0, 2e9 if s % 10 == 0 else 0) for s in range(300)])
    assert copies[-1].kind == "counters-phased"
    training = play([(s, "a", WHO, 0.95 if s % 5 else 0.1, 400.0 if s % 5 else 120.0, 1000) for s in range(600)])
    assert nats(training) == pytest.approx(FLOOR_NATS)
    assert all(one.nats < 0 for one in training)


def test_a_break_takes_the_support_away_again():
    evidence = play(flat(1200) + [(1200 + s, "GPU-a", WHO, 0.9, 400.0, 3e9) for s in range(60)])
    assert nats(evidence) < 0
    assert evidence[-1].kind == "counters-phased"


def test_a_shared_gpu_tells_of_nobody():
    rows = [row for pair in zip(flat(300), flat(300, process=OTHER), strict=True) for row in pair]
    assert play(rows) == []


def test_eight_gpus_are_one_job():
    rows = sorted(row for i in range(8) for row in flat(3600, uuid=f"GPU-{i}"))
    assert nats(play(rows)) <= CAP_NATS


def test_what_is_not_known_weighs_nothing_or_less():
    assert play([(s, "a", WHO, 0.98, None, 1000) for s in range(300)]) == []
    assert play([(s, "a", WHO, None, 430.0, 1000) for s in range(300)]) == []
    without_pcie = nats(play(flat(300, pcie=None)))
    assert 0 < without_pcie <= nats(play(flat(300))) / 2 + counters.TOLD_NATS
    assert play([(s, "a", WHO, 0.02, 80.0, 1000) for s in range(300)]) == []


def test_an_exit_forgets_the_process():
    detector = Detector()
    play(flat(100), detector)
    assert len(detector._standings) == 1
    detector.receive(ProcessExited(SECOND, WHO), Host())
    assert len(detector._standings) == 0


levels = st.one_of(st.none(), st.floats(0, 1))
rows = st.lists(
    st.tuples(st.integers(0, 4000), st.sampled_from("ab"), st.sampled_from([WHO, OTHER]), levels,
              st.one_of(st.none(), st.floats(0, 1000)), st.one_of(st.none(), st.floats(0, 1e11))), max_size=200)


@given(rows, st.integers(1, 5))
@settings(deadline=None)
def test_no_records_make_counters_alone_suspect(random_rows, repeats):
    evidence = play([(second + k * 4000, *rest) for k in range(repeats) for second, *rest in random_rows])
    fusion = Fusion(0.1)
    for one in evidence:
        standing, _ = fusion.receive(one)
        assert standing.verdict == "unknown"
        assert standing.nats < SUSPECT_NATS
        assert math.isfinite(one.nats)


def test_the_worst_order_of_breaks_and_stretches_stays_below_suspect():
    rows, start = [], 0
    for _ in range(6):
        rows += flat(1400, start=start) + [(start + 1400 + s, "GPU-a", WHO, 0.9, 400.0, 3e9) for s in range(200)]
        start += 1600
    fusion = Fusion(0.1)
    assert max(fusion.receive(one)[0].nats for one in play(rows)) < SUSPECT_NATS


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=50))
def test_series_against_its_definition(values):
    series = Series()
    for value in values:
        series.add(value)
    mean = sum(values) / len(values)
    assert (series.lowest, series.highest) == (min(values), max(values))
    assert series.mean == pytest.approx(mean)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / len(values))
    if mean:
        assert series.variation == pytest.approx(deviation / mean, abs=1e-6)


# -- real telemetry ----------------------------------------------------------------------------------------------------


def data(name):
    folder = os.environ.get("GPUGUARD_DATA_DIR")
    if not folder:
        pytest.skip("GPUGUARD_DATA_DIR is not set: no evaluation data")
    return Path(folder) / "telemetry" / name


def number(text):
    return float(text) if text else None


@pytest.mark.parametrize("run", ["t2", "i4", "b1"])
def test_h100_training_and_inference_raise_no_suspicion(run):
    """8 H100s at 10 Hz, one process each; what NVML would say of it is taken from the device."""
    detector, host, fusion, looks = Detector(), Host(), Fusion(0.1), 0
    with gzip.open(data(f"h100-{run}.csv.gz"), "rt") as file:
        for row in csv.DictReader(file):
            time_ns, uuid = int(float(row["timestamp"]) * SECOND), row["gpu"]
            gpu = number(row["gpu_util_pct"])
            share = None if gpu is None else gpu / 100
            sample = DeviceSample(
                time_ns, uuid, gpu_ratio=share, power_w=number(row["power_w"]),
                pcie_tx_bytes_per_s=number(row["pcie_tx_bytes_s"]), pcie_rx_bytes_per_s=number(row["pcie_rx_bytes_s"]))
            process = ProcessId("boot", int(uuid) + 1, 1)
            evidence = detector.receive(sample, host)
            evidence += detector.receive(ProcessSample(time_ns, process, uuid, 1, share), host)
            looks += 1
            for one in evidence:
                standing, _ = fusion.receive(one)
                assert standing.verdict == "unknown"
                assert one.nats < 0, one.text
    assert looks > 20_000


def test_ordinary_cuda_programs_look_like_mining_to_counters():
    """One row of the set is a steady average: played as a constant level with 1 % noise and no traffic for an hour.

    This is the reason for the cap, kept as a test so that nobody raises it unknowing.
    """
    programs = defaultdict(list)
    with data("v100-dvfs-real-profile.csv").open() as file:
        for row in csv.DictReader(file):
            programs[row["benchmark"]].append((float(row["SMACT"]), float(row["average_power"])))
    rng, outcome = random.Random(7), Counter()
    for settings_of in programs.values():
        sm, power_w = settings_of[0]
        # smUtil is the time with a kernel, not SM activity: a program that launches back to back has 1.0 of it.
        for kind, share in (("activity", sm), ("time with a kernel", 0.99)):
            evidence = play([(s, "a", WHO, share, power_w * rng.gauss(1, 0.01), 0) for s in range(3600)])
            assert nats(evidence) <= CAP_NATS < SUSPECT_NATS
            outcome[kind] += nats(evidence) > 3
    print(f"of {len(programs)} ordinary programs counters support mining for {dict(outcome)}")
    assert len(programs) == 20
    assert outcome["time with a kernel"] == 20
