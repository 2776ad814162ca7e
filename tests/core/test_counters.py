"""Counters: looks are weighed by their mix, added up against a stated rate, and reach suspect at most."""

from __future__ import annotations

import itertools
import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuguard.core import counter_features as cf
from gpuguard.core.attribution import Tenant
from gpuguard.core.counter_jobs import JOBS_PER_GPU_YEAR, MEMORY, SHRINK, Honest
from gpuguard.core.detectors.counters import (
    AT_ODDS,
    CAP_NATS,
    DEVICES_MAX,
    FLOOR_NATS,
    NEAR_NATS,
    OWN_RATIO,
    Detector,
    Level,
    Look,
    Standing,
    Watch,
    _name,
    shared_out,
    standing_of,
)
from gpuguard.core.evidence import Evidence
from gpuguard.core.fusion import SUSPECT_NATS, Fusion
from gpuguard.core.host import Host
from gpuguard.core.records import LAUNCH, Device, DeviceSample, Gap, Gpm, Launches, ProcessExited, ProcessSample
from gpuguard.core.subjects import DeviceId, ProcessId
from gpuguard.counters.shipped import shipped_model
from gpuguard.kernels import sequential, windows
from gpuguard.lab import telemetry

SECOND = 1_000_000_000
WHO = ProcessId("boot", 7, 70)
OTHER = ProcessId("boot", 8, 80)
#: The shipped model, held against so many honest jobs that even the strictest rate here is counted.
MODEL = shipped_model()._replace(honest=Honest(np.linspace(0, 1, 50_000)))
H100 = telemetry.BOARDS[0]
KHEAVYHASH = next(one for one in telemetry.MINERS if one.name == "kheavyhash")
DDP = next(one for one in telemetry.TRAINING if one.name == "ddp")
IDLE = telemetry.IDLE[0]


def trace(workload, seconds, *, seed=1, evasion=telemetry.EVASIONS[0], visible="gpm", rate_hz=1.0):
    return telemetry.simulate(workload, H100, seconds, np.random.default_rng(seed), evasion=evasion, visible=visible,
                              rate_hz=rate_hz)


def play(traces, *, processes=(WHO,), detector=None, host=None, start=0, rate=0.1):
    """Feed traces, a device each, sample by sample with the shares of processes; return all evidence."""
    if detector is None:
        detector = Detector()
        detector.judge_by(MODEL, rate)
    host, evidence = host or Host(), []
    for i, one in enumerate(traces):
        host.receive(telemetry.device(one, f"GPU-{i}", start))
    for moment in zip(*(telemetry.samples(one, f"GPU-{i}", start) for i, one in enumerate(traces)), strict=True):
        for sample in moment:
            evidence += detector.receive(sample, host)
            for process in processes:
                share = 0.98 / len(processes)
                evidence += detector.receive(ProcessSample(sample.time_ns, process, sample.uuid, 1, share), host)
    return evidence


def nats(evidence, label="mining"):
    return sum(one.nats for one in evidence if one.label == label)


def test_a_search_is_suspect_in_the_end_and_never_more():
    evidence = play([trace(KHEAVYHASH, 3600)])
    assert {(one.subject, one.label, one.evidence_class) for one in evidence} == {(WHO, "mining", "counter")}
    assert nats(evidence) == pytest.approx(CAP_NATS)
    fusion = Fusion(0.1)
    verdicts = [fusion.receive(one)[0].verdict for one in evidence]
    assert verdicts[-1] == "suspect"
    assert "confirmed" not in verdicts
    assert "integer" in evidence[-1].text
    assert "mining:integer" in evidence[-1].text


def test_nothing_is_suspect_before_its_height_reaches_the_limit():
    limit = MODEL.honest.limit(0.1).height
    fewest = math.ceil(SHRINK * limit / (MODEL.nats_most - MODEL.allowance - limit))
    evidence = play([trace(KHEAVYHASH, (fewest - 1) * cf.LOOK_S)])
    assert nats(evidence) <= NEAR_NATS < SUSPECT_NATS


def test_how_far_a_job_has_come_is_told_anew_with_every_look_and_weighs_nothing():
    evidence = play([trace(KHEAVYHASH, 600)])
    assert max(b.time_ns - a.time_ns for a, b in itertools.pairwise(evidence)) < (cf.LOOK_S + 2) * SECOND
    looks = [int(re.findall(r"of (\d+) looks over", one.text)[0]) for one in evidence]
    assert looks == list(range(looks[0], looks[-1] + 1))
    fusion = Fusion(0.1)
    heard = [(one.nats, *fusion.receive(one)) for one in evidence]
    assert sum(not weight for weight, _, _ in heard) > len(heard) / 2
    assert not any(changed for weight, _, changed in heard if not weight)
    assert heard[-1][1].evidence[0].text == evidence[-1].text


def test_a_job_that_looks_a_little_like_mining_is_not_suspect_however_long_it_goes_on():
    level, honest = Level(start_ns=0), MODEL.honest
    look = Look(0, 1, True, MODEL.allowance + 0.5, (), (), (), 0.0)
    for _ in range(20_000):
        level.take(look, MODEL.allowance)
    assert level.height < 0.5 < honest.limit(10.0).height
    assert level.told(honest, honest.limit(10.0).height) == pytest.approx(math.log(2), abs=0.1)


def test_a_job_that_becomes_another_is_judged_by_what_it_is_now():
    level = Level(start_ns=0)
    for weight, looks in ((0.1, 2000), (2.0, 2 * MEMORY)):
        for _ in range(looks):
            level.take(Look(0, 1, True, 3.0 + weight, (), (), (), 0.0), 3.0)
    assert level.height > 1.6
    assert level.looks == MEMORY


def test_what_is_told_says_how_many_honest_jobs_come_as_high_and_what_that_rests_on():
    evidence = play([trace(KHEAVYHASH, 1200)])
    assert "of 50000 honest jobs of unknown kinds came" in evidence[-1].text
    assert "alarms a GPU-year, counted; " in evidence[-1].text
    few = MODEL._replace(honest=Honest(np.linspace(0, 1, 100)))
    detector = Detector()
    detector.judge_by(few, 0.1)
    evidence = play([trace(KHEAVYHASH, 1200)], detector=detector)
    assert nats(evidence) <= NEAR_NATS
    assert "none is suspect: 100 jobs support 43 alarms a GPU-year" in evidence[-1].text


def test_what_is_told_after_long_is_of_the_last_looks():
    level, look = Level(start_ns=0), Look(0, 1, True, 4.0, (), (), (), 0.0)
    for looks in (20, 2 * MEMORY):
        for _ in range(looks):
            level.take(look, 3.0)
        told = standing_of(level, MODEL.honest, MODEL.honest.limit(10.0), 7200 * SECOND)
        span = f"{looks} looks over" if looks == 20 else f"the last {MEMORY} looks, after"
        assert f"so in {min(looks, MEMORY)} of {span} 7200 s: " in told


@pytest.mark.parametrize("nats", [0.7, NEAR_NATS])
def test_a_job_is_worth_so_much_from_the_height_on_that_so_few_come_to(nats):
    for honest in (MODEL.honest, shipped_model().honest):
        height = honest.limit(JOBS_PER_GPU_YEAR * math.exp(-nats)).height
        below = float(np.nextafter(height, 0))
        assert honest.nats(below) < nats <= honest.nats(height)
        looks = 10
        for one, reached in ((height * 1.000001, True), (below, False)):
            level = Level(0, nats=one * (looks + SHRINK), looks=looks)
            assert (level.told(honest, math.inf) >= nats) == reached


@pytest.mark.parametrize(("pace", "looks"), [(0.5, 20), (1.0, 5), (1.02, 20), (2.0, 3), (2.0, 300)])
def test_what_is_told_of_the_limit_is_when_a_job_of_that_pace_comes_there(pace, looks):
    level, honest = Level(start_ns=0), MODEL.honest._replace(heights=np.linspace(0, 1, 1000))
    limit = honest.limit(JOBS_PER_GPU_YEAR / 1001)
    look = Look(0, 1, True, 3.0 + pace, (), (), (), 0.0)
    for _ in range(looks):
        level.take(look, 3.0)
    told = standing_of(level, honest, limit, 0)
    when = re.search(r"is suspect, (reached|not to be expected|expected after (\d+) s)", told)
    if level.height >= limit.height:
        assert when[1] == "reached"
        return
    for more in range(looks, 3 * MEMORY):
        if level.height >= limit.height:
            assert int(when[2]) == pytest.approx(more * cf.LOOK_S, abs=cf.LOOK_S)
            return
        level.take(look, 3.0)
    assert when[1] == "not to be expected"


def test_a_stricter_rate_takes_longer():
    def first(rate):
        evidence, total = play([trace(KHEAVYHASH, 3600)], rate=rate), 0.0
        for one in evidence:
            total += one.nats
            if total >= SUSPECT_NATS:
                return one.time_ns
        return math.inf

    assert first(2000.0) < first(0.1) < math.inf
    assert first(0.001) == math.inf  # so many jobs were not seen


def test_with_the_code_of_a_miner_it_is_confirmed_and_with_a_beat_alone_it_is_not():
    evidence = play([trace(KHEAVYHASH, 3600)])
    for other, weight, verdict in (("code", 16.0, "confirmed"), ("launch", 5.5, "suspect")):
        fusion = Fusion(0.1)
        for one in evidence:
            fusion.receive(one)
        standing, _ = fusion.receive(Evidence(0, WHO, "mining", other, "x", weight, "", 0))
        assert standing.verdict == verdict


def test_what_is_below_the_limit_adds_up_with_launches_and_alone_accuses_nobody():
    detector = Detector()
    detector.judge_by(MODEL._replace(honest=Honest(np.linspace(0, 0.01, 100))), 0.1)
    evidence = play([trace(KHEAVYHASH, 1200)], detector=detector)
    fusion = Fusion(0.1)
    alone = [fusion.receive(one)[0].verdict for one in evidence]
    assert set(alone) == {"unknown"}
    assert nats(evidence) == pytest.approx(NEAR_NATS)
    together, _ = fusion.receive(Evidence(0, WHO, "mining", "launch", "x", 2.0, "", 0))
    assert together.verdict == "suspect"


def test_training_is_named_and_speaks_against_what_others_hold():
    evidence = play([trace(DDP, 1200)])
    assert FLOOR_NATS <= nats(evidence) < 0
    assert nats(evidence, "training") == pytest.approx(3.0)
    assert Fusion(0.1).receive(evidence[0])[0].verdict == "unknown"


@pytest.mark.parametrize(("told", "nats_before", "named"), [
    (("gpu", "sm", "dram"), 0.0, True),
    (("gpu", "power"), 0.0, False),
    (("gpu", "sm", "dram"), 1.0, False),
])
def test_a_job_computes_only_where_a_pipe_is_told_and_nothing_speaks_for_mining(told, nats_before, named):
    means = tuple(0.5 if name in told else math.nan for name in cf.CHANNELS)
    like = tuple(0.9 if name == "compute" else 0.1 / (len(MODEL.classes) - 1) for name in MODEL.classes)
    look = Look(0, 20 * SECOND, True, -2.0, like, means, means, 0.1)
    said = _name(WHO, Standing(), Level(0, nats_before), look, MODEL, "")
    assert [one.label for one in said] == (["compute"] if named else [])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(["ddp", "search", "little"]), min_size=1, max_size=6))
def test_what_spoke_for_a_job_is_not_given_back_as_guilt(parts):
    # The fusion layer holds nothing below 0: what was said for a job there must not add to what is said against it.
    detector, fusion = Detector(), Fusion(0.1)
    detector.judge_by(MODEL._replace(honest=Honest(np.linspace(0, 1, 100))), 0.1)  # so few make nobody suspect
    standing, level = Standing(), Level(0)
    standing.levels["GPU-0"] = level
    weights = {"ddp": -4.0, "search": 5.8, "little": 3.2}
    for i, part in enumerate(one for one in parts for _ in range(8)):
        look = Look(i, i + 1, True, weights[part], (), (), (), 0.0)
        level.take(look, MODEL.allowance)
        for one in detector._weigh(MODEL, WHO, standing, level, look, ""):
            assert fusion.receive(one)[0].nats <= NEAR_NATS


def test_a_process_that_exited_within_a_look_is_told_nothing_twice():
    detector, host, evidence = Detector(), Host(), []
    detector.judge_by(MODEL, 0.1)
    evidence += play([trace(KHEAVYHASH, 610)], detector=detector, host=host)
    before = nats(evidence)
    assert before > 1
    gone = ProcessExited(610 * SECOND, WHO)
    host.receive(gone)
    evidence += detector.receive(gone, host)
    evidence += play([trace(KHEAVYHASH, 60)], detector=detector, host=host, start=610 * SECOND, processes=())
    assert nats([one for one in evidence if one.subject == WHO]) == before


def test_who_starts_anew_in_every_look_is_added_up_on_the_device():
    detector, host, evidence = Detector(), Host(), []
    detector.judge_by(MODEL, 0.1)
    recorded = trace(KHEAVYHASH, 1200)
    host.receive(telemetry.device(recorded, "GPU-0", 0))
    for i, sample in enumerate(telemetry.samples(recorded, "GPU-0", 0)):
        process = ProcessId("boot", 100 + i // 15, i // 15)
        if i and i % 15 == 0:
            gone = ProcessExited(sample.time_ns, ProcessId("boot", 99 + i // 15, i // 15 - 1))
            host.receive(gone)
            evidence += detector.receive(gone, host)
        evidence += detector.receive(sample, host)
        evidence += detector.receive(ProcessSample(sample.time_ns, process, "GPU-0", 1, 0.98), host)
    assert nats([one for one in evidence if one.subject == DeviceId("GPU-0")]) > 2
    assert len({one.subject for one in evidence if one.label == "mining"}) == 1


def test_idle_says_nothing_and_takes_nothing_back():
    assert play([trace(IDLE, 1200)]) == []
    detector = Detector()
    detector.judge_by(MODEL, 0.1)
    before = nats(play([trace(KHEAVYHASH, 600)], detector=detector))
    assert before > 0
    assert play([trace(IDLE, 1200)], detector=detector, start=900 * SECOND) == []


def test_counters_that_contradict_each_other_are_a_gap_and_told_once():
    detector, host = Detector(), Host()
    detector.judge_by(MODEL, 0.1)

    def said(sm, gpu, seconds, begin):
        return [one for k in range(seconds) for one in detector.receive(DeviceSample(
            (begin + k) * SECOND, "GPU-0", gpu_ratio=gpu, power_w=690.0, gpm=Gpm(SECOND, sm_ratio=sm)), host)]

    # One kernel that fills one SM of 132, and nothing at all, are idle to all who look.
    assert said(1 / 132, 1.0, 61, 0) + said(0.0, 0.0, 60, 100) == []
    gaps = said(0.0, 1.0, 61, 200)
    assert [(type(one), one.sensor, one.reason) for one in gaps] == [(Gap, "counters", f"GPU-0: {AT_ODDS}")]
    assert detector.looks.get("GPU-0").at_odds
    assert said(0.0, 1.0, 61, 300) == []


def test_without_a_model_nothing_is_judged():
    assert play([trace(KHEAVYHASH, 600)], detector=Detector()) == []


def test_one_process_on_more_devices_than_there_are_takes_no_more_room_and_what_is_forgotten_is_told():
    detector, host = Detector(), Host()
    detector.judge_by(MODEL, 10.0)
    for device in range(DEVICES_MAX + 20):
        for second in range(0, 27, 3):
            time_ns = (27 * device + second) * SECOND
            detector.receive(DeviceSample(time_ns, f"GPU-{device}", gpu_ratio=1.0, power_w=300.0), host)
            detector.receive(ProcessSample(time_ns, WHO, f"GPU-{device}", 1, 0.98), host)
    standing = detector._standings.get(WHO)
    assert len(standing.levels) == DEVICES_MAX
    assert [count for count in detector.evicted().values() if count] == [20]


def test_the_rate_of_sampling_adds_nothing():
    found = []
    exponential = Honest(-0.5 * np.log(np.linspace(1, 1e-5, 50_000)))  # a height is worth twice as many nats
    for rate_hz in (1.0, 10.0):
        detector = Detector()
        detector.judge_by(MODEL._replace(honest=exponential), 0.1)
        found.append(nats(play([trace(KHEAVYHASH, 1200, rate_hz=rate_hz)], detector=detector)))
    assert min(found) > 0
    assert found[1] == pytest.approx(found[0], abs=1.0)


def test_samples_that_come_too_fast_are_passed_over():
    watch = Watch()
    for i in range(100_000):
        watch.add(i * 1_000_000, (math.nan,) * len(cf.CHANNELS))
    assert len(watch.readings) <= 2_500


def test_a_hole_and_a_clock_set_back_begin_a_new_look():
    for jump in (500, -50):
        watch = Watch()
        for second in (*range(10), 10 + jump):
            watch.add(second * SECOND, (math.nan,) * len(cf.CHANNELS))
        assert len(watch.readings) == 1
        assert watch.start_ns == (10 + jump) * SECOND


def shared(shares, *, seconds=1200, launches=None, others_devices=()):
    """Feed a search on a device that processes share: by process SM ratio (None: not told) and launches a second."""
    detector, host, evidence = Detector(), Host(), []
    detector.judge_by(MODEL, 0.1)
    one = trace(KHEAVYHASH, seconds, seed=2)
    host.receive(telemetry.device(one, "GPU-0", 0))
    for other, process in others_devices:
        host.receive(Device(0, other, 1, "x"))
        host.receive(ProcessSample(0, process, other))
    for sample in telemetry.samples(one, "GPU-0", 0):
        if launches:
            rows = np.zeros(len(launches), LAUNCH)
            for row, (process, count) in zip(rows, launches.items(), strict=True):
                row["pid"], row["start_ticks"], row["launches"] = process.pid, process.start_ticks, count
            evidence += detector.receive(Launches(sample.time_ns, rows), host)
        evidence += detector.receive(sample, host)
        for process, share in shares.items():
            evidence += detector.receive(ProcessSample(sample.time_ns, process, "GPU-0", 1, share), host)
    return evidence


def test_where_many_share_a_device_it_is_the_device_that_is_judged_and_the_candidates_are_named():
    evidence = play([trace(KHEAVYHASH, 1200)], processes=(WHO, OTHER))
    assert {one.subject for one in evidence} == {DeviceId("GPU-0")}
    assert "of the integer work, pid 7 " in evidence[-1].text
    assert "pid 8 " in evidence[-1].text
    assert {one.subject for one in play([trace(KHEAVYHASH, 1200)], processes=())} == {DeviceId("GPU-0")}


@pytest.mark.parametrize(("shares", "launches", "subject"), [
    ({WHO: 0.97, OTHER: 0.02}, None, WHO),  # the other had no time for more than a sliver
    ({WHO: 0.97, OTHER: None}, None, WHO),  # the other is idle, and what it may have done is bounded
    ({WHO: 0.65, OTHER: 0.34}, None, DeviceId("GPU-0")),  # twice the time is not twice the suspicion
    ({WHO: 0.88, OTHER: 0.10}, None, WHO),
    ({WHO: 0.95, OTHER: 0.05}, {WHO: 100, OTHER: 900}, DeviceId("GPU-0")),  # two witnesses disagree
    ({WHO: None, OTHER: None}, None, DeviceId("GPU-0")),
    ({WHO: 0.20, OTHER: 0.02}, None, DeviceId("GPU-0")),  # somebody of whom nobody told took the rest
])
def test_a_process_is_the_subject_only_where_the_work_is_its_own_for_certain(shares, launches, subject):
    evidence = shared(shares, launches=launches)
    assert nats(evidence) > 0
    assert {one.subject for one in evidence} == {subject}
    if isinstance(subject, ProcessId):
        assert "is its own, beside 1" in evidence[-1].text


def test_launches_of_a_process_that_uses_another_device_too_are_no_witness():
    assert {one.subject for one in shared({WHO: 0.95, OTHER: 0.05}, launches={WHO: 100, OTHER: 900})} == {
        DeviceId("GPU-0")}
    evidence = shared({WHO: 0.95, OTHER: 0.05}, launches={WHO: 100, OTHER: 900}, others_devices=[("GPU-1", OTHER)])
    assert {one.subject for one in evidence} == {WHO}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1), st.booleans()), min_size=2, max_size=5),
       st.floats(0.05, 1.0))
def test_whoever_owns_a_look_did_most_of_it_whatever_the_others_did(parts, whole):
    """Processes take turns: busy time and intensity of each; whom NVML tells of, and whom it does not."""
    total = sum(busy for busy, _, _ in parts) or 1.0
    busy = [whole * one[0] / total for one in parts]
    work = [share * one[1] for share, one in zip(busy, parts, strict=True)]
    tenants = {ProcessId("b", i, i): Tenant(round(share, 2) if one[2] else None)
               for i, (share, one) in enumerate(zip(busy, parts, strict=True))}
    mean = dict.fromkeys(cf.CHANNELS, math.nan) | {"gpu": sum(busy), "integer": sum(work)}
    pipe, found, owner = shared_out(mean, tenants)
    if pipe == "gpu":  # no pipe worked: the time of the device is what is shared out
        work = busy
    if owner is not None:
        assert work[owner.pid] >= OWN_RATIO * sum(work) - 1e-9
    for process, part in found.items():
        if process is not None and part is not None and not part.note.startswith("more than"):
            assert part.low - 1e-6 <= work[process.pid] <= part.high + 1e-6


def test_eight_gpus_are_one_job():
    alone = play([trace(KHEAVYHASH, 1200)])
    assert nats(play([trace(KHEAVYHASH, 1200)] * 8)) == pytest.approx(nats(alone))
    mixed = play([trace(KHEAVYHASH, 1200), *[trace(DDP, 1200)] * 7])
    assert nats(mixed) < NEAR_NATS


def test_a_new_process_begins_anew_and_one_that_ended_is_forgotten():
    detector = Detector()
    detector.judge_by(MODEL, 0.1)
    play([trace(KHEAVYHASH, 1800)], detector=detector)
    assert detector.receive(ProcessExited(1800 * SECOND, WHO), Host()) == []
    later = play([trace(KHEAVYHASH, 80)], detector=detector, start=2100 * SECOND, processes=(OTHER,))
    assert {one.subject for one in later} <= {OTHER}
    assert nats(later) <= NEAR_NATS


@pytest.mark.parametrize("field", ["gpm", "power_w", "pcie_tx_bytes_per_s", "memory_used_bytes", "gpu_ratio"])
def test_what_is_not_told_is_absent_and_not_zero(field):
    full = {"gpu_ratio": 0.9, "power_w": 400.0, "pcie_tx_bytes_per_s": 5, "memory_used_bytes": 4,
            "gpm": Gpm(1, sm_ratio=0.9, dram_ratio=0.5)}
    fewer = {name: one for name, one in full.items() if name != field}
    told, less = (cf.channels([cf.reading(DeviceSample(0, "a", **some))], 8)[0].tolist() for some in (full, fewer))
    missing = [name for name, a, b in zip(cf.CHANNELS, told, less, strict=True) if not math.isnan(a) and math.isnan(b)]
    assert missing
    assert all(a == b for a, b in zip(told, less, strict=True) if not math.isnan(b))


def plain_channels(reading, memory_bytes):
    """One reading as `counter_features.channels` has it, a channel at a time."""
    def share(value):
        return math.nan if value is None or not value >= 0 else min(value, 1.0)

    def both(sent, received):
        return math.nan if sent is received is None else math.log10(1 + max(0.0, (sent or 0) + (received or 0)))

    *ratios, power, host_tx, host_rx, link_tx, link_rx, memory = reading
    return [*map(share, ratios), math.nan if power is None else power, both(host_tx, host_rx), both(link_tx, link_rx),
            math.nan if memory is None or not memory_bytes else share(memory / memory_bytes)]


counted = st.none() | st.integers(-2**40, 2**62)
ratio = st.none() | st.floats(-2, 2) | st.just(math.inf)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(*[ratio] * 12, st.none() | st.floats(0, 1e4), *[counted] * 5), min_size=1, max_size=9),
       st.sampled_from([None, 0, 1, 80_000_000_000]))
def test_readings_at_once_are_those_one_by_one(readings, memory_bytes):
    plain = np.array([plain_channels(one, memory_bytes) for one in readings], np.float32)
    np.testing.assert_allclose(cf.channels(readings, memory_bytes), plain, rtol=1e-6)


def test_the_mix_does_not_depend_on_how_much_is_taken():
    readings = np.zeros((1, 20, len(cf.CHANNELS)), np.float32)
    readings[0, :, 0] = 1.0
    readings[0, :, 1:12] = np.linspace(0.2, 0.9, 11)
    features = {}
    for share in (1.0, 0.1):
        scaled = readings.copy()
        scaled[0, :, 1:12] *= share
        row = cf.look(cf.summarised(scaled), np.array([math.nan]), cf.no_history())[0][0]
        features[share] = dict(zip(cf.FEATURES, row.tolist(), strict=True))
    for name in ("mix_integer", "mix_dram", "mix_imma", "sm_variation", "dram_most"):
        assert features[0.1][name] == pytest.approx(features[1.0][name], rel=1e-3)


values = st.floats(width=32, allow_subnormal=False) | st.sampled_from([math.nan, math.inf, -math.inf, 0.0])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(values, min_size=16, max_size=16), min_size=1, max_size=12), st.integers(1, 3))
def test_no_reading_whatever_makes_a_feature_that_is_no_number(rows, looks):
    past = cf.no_history(2)
    readings = np.array([rows, rows[::-1]], np.float32)
    for _ in range(looks):
        with np.errstate(all="ignore"):
            features, at_work, past = cf.look(cf.summarised(readings), np.array([700.0, math.nan]), past)
        assert features.shape == (2, len(cf.FEATURES))
        assert not np.isnan(features).any()
        assert at_work.dtype == bool
        weights, probabilities = MODEL.judge(features)
        assert ((weights >= MODEL.nats_least) & (weights <= MODEL.nats_most)).all()
        assert probabilities.sum(axis=1) == pytest.approx(1)


def test_jobs_in_step_are_looked_at_as_one_by_one():
    readings = np.random.default_rng(3).random((5, 3, 20, len(cf.CHANNELS))).astype(np.float32)
    together, alone = cf.no_history(5), [cf.no_history() for _ in range(5)]
    limit = np.full(5, 700.0)
    for k in range(3):
        rows, _, together = cf.look(cf.summarised(readings[:, k]), limit, together)
        for i in range(5):
            row, _, alone[i] = cf.look(cf.summarised(readings[i:i + 1, k]), limit[:1], alone[i])
            np.testing.assert_allclose(row[0], rows[i], rtol=1e-5, atol=1e-6)


@given(st.lists(st.floats(-4, 5.8), min_size=1, max_size=80), st.floats(0, 4))
def test_the_sum_is_pages_cusum_as_the_kernels_have_it(weights, allowance):
    level = Level(start_ns=0)
    # With a shift of 1 a step is the sample, less the mean, less a half; the kernel's first sample has no predecessor.
    test = sequential.Cusum(np.array([allowance - 0.5]), np.ones(1), np.zeros(1), 1.0, 1e6)
    state = sequential.start(test)
    sequential.run(np.array([[0.0], *([one] for one in weights)]), test, state, "reference")
    for weight in weights:
        level.take(Look(0, 1, True, weight, (), (), (), 0.0), allowance)
    assert level.nats == pytest.approx(sequential.evidence_nats(test, state)[0], abs=1e-9)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([KHEAVYHASH, DDP, IDLE]), st.integers(0, 9)), min_size=1, max_size=4))
def test_the_sum_stays_within_its_bounds_whatever_comes(parts):
    detector = Detector()
    detector.judge_by(MODEL, 1.0)
    total, start = 0.0, 0
    for workload, seed in parts:
        for one in play([trace(workload, 300, seed=seed)], detector=detector, start=start):
            total += one.nats if one.label == "mining" else 0.0
            assert FLOOR_NATS - 1e-9 <= total <= CAP_NATS + 1e-9
        start += 310 * SECOND


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(values, min_size=16, max_size=16), min_size=1, max_size=20))
def test_the_statistics_of_a_look_are_those_of_the_kernels(rows):
    readings = np.array([rows], np.float32)
    with np.errstate(all="ignore"):
        plain = windows.reference(readings, windows.levels(len(cf.CHANNELS)))[0]
        ours = cf.summarised(readings)[:, 0]
    for i, name in enumerate(cf.STATISTICS):
        want, got = plain[windows.FEATURES.index(name)], ours[i]
        assert (np.isnan(want) == np.isnan(got)).all()
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * float(np.nanmax(np.abs(plain), initial=1.0)))
