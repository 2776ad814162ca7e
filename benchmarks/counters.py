"""What the counter eye finds, how late, how often wrongly, and what it costs.

Claims: 24 hours of 8 GPUs at 1 Hz replay through the guard in under 60 s of CPU time with bounded memory; no H100
recording becomes suspect; jobs of the same kinds of work that were not in the count keep to the alarms a GPU-year that
were counted.
Everything but the recordings (GPUGUARD_DATA_DIR) is *simulated*: gpuguard/lab/telemetry.py.
Run: make bench-counters, or with names of parts (cost recordings programs detection unseen alarms)
"""

from __future__ import annotations

import csv
import gzip
import json
import math
import os
import resource
import sys
import time
from pathlib import Path

import msgspec
import numpy as np

from gpuguard.config import GuardSettings
from gpuguard.core import counter_features as cf
from gpuguard.core.detectors.counters import NEAR_NATS, Detector
from gpuguard.core.guard import Guard
from gpuguard.core.host import Host
from gpuguard.core.records import Device, DeviceSample, Gpm
from gpuguard.counters import evaluation, judging, reading, train
from gpuguard.counters.shipped import shipped_model
from gpuguard.counters.table import Table
from gpuguard.lab import telemetry

SECOND_NS = 1_000_000_000
HOUR_S = 3_600
GPUS, HOURS, REPLAY_S_MAX = 8, 24, 60.0
#: Alarms a GPU-year: the default, and what they are shown for beside it, from the most to the fewest.
DEFAULT, RATES = GuardSettings().counter_alarms_per_gpu_year, train.RATES
RESULT = Path(__file__).parent / "results" / "counters.json"
DATA = Path(os.environ.get("GPUGUARD_DATA_DIR", "/nonexistent")) / "telemetry"
PROGRAM_S = (600, 3600)


def an_hour(rate_hz: float, seconds: int = HOUR_S) -> list[DeviceSample]:
    """Return samples of eight busy GPUs in order of time, as the sensor would have made them."""
    random = np.random.default_rng(1)
    some = (*telemetry.TRAINING[:3], *telemetry.INFERENCE[:2], telemetry.COMPUTE[0], telemetry.MINERS[0],
            telemetry.IDLE[0])
    traces = [telemetry.simulate(one, telemetry.BOARDS[0], seconds, random, rate_hz=rate_hz) for one in some]
    every = [sample for i, trace in enumerate(traces) for sample in telemetry.samples(trace, f"GPU-{i}", 0)]
    return sorted(every, key=lambda one: one.time_ns)


def replay_s(samples: list[DeviceSample], hours: int, *, model: bool = True) -> tuple[float, int]:
    """Return CPU seconds that a guard needs for an hour of samples again and again, and how many it took."""
    guard = Guard(counter_model=shipped_model() if model else None)
    for i in range(GPUS):
        guard.receive(Device(0, f"GPU-{i}", i, "H100", memory_bytes=80 * 10**9, power_limit_w=700.0))
    spent, taken, length_ns = 0.0, 0, samples[-1].time_ns + SECOND_NS
    for hour in range(hours):
        later = [msgspec.structs.replace(one, time_ns=one.time_ns + hour * length_ns) for one in samples]
        begun = time.process_time()
        for one in later:
            guard.receive(one)
        spent += time.process_time() - begun
        taken += len(later)
    return spent, taken


def cost() -> dict[str, object]:
    """Return what replay and one sample cost."""
    hour = an_hour(1.0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    spent, taken = replay_s(hour, HOURS)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    bare, _ = replay_s(hour, 2, model=False)
    fast = an_hour(10.0, 600)
    fast_s, fast_taken = replay_s(fast, 1)
    host, alone = Host(), Detector()
    alone.judge_by(shipped_model(), DEFAULT)
    begun = time.process_time()
    for one in hour:
        alone.receive(one, host)
    own = (time.process_time() - begun) / len(hour) * 1e6
    begun = time.process_time()
    for one in fast:
        cf.reading(one)
    reading_us = (time.process_time() - begun) / len(fast) * 1e6
    return {
        "replay_24h_8_gpus_1_hz_cpu_s": round(spent, 2), "samples": taken, "target_s": REPLAY_S_MAX,
        "met": spent < REPLAY_S_MAX, "memory_grown_mib": round(grown / 1024, 1),
        "guard_us_per_sample_1_hz": round(spent / taken * 1e6, 1),
        "guard_us_per_sample_without_counters": round(bare / len(hour) / 2 * 1e6, 1),
        "detector_us_per_sample_1_hz": round(own, 1), "reading_us": round(reading_us, 2),
        "guard_us_per_sample_10_hz": round(fast_s / fast_taken * 1e6, 1),
        "replay_24h_8_gpus_10_hz_cpu_s_derived": round(fast_s / fast_taken * GPUS * HOURS * HOUR_S * 10, 1),
        "live_8_gpus_1_hz_share_of_a_core": round(own * GPUS / 1e6, 6),
        "live_8_gpus_10_hz_share_of_a_core": round(fast_s / fast_taken * 80, 6),
    }


def recordings() -> dict[str, object]:
    """Return what became of the H100 recordings: real, and not trained on."""
    out: dict[str, object] = {}
    for path in sorted(DATA.glob("h100-*.csv.gz")):
        with gzip.open(path, "rt", newline="") as file:
            told = reading.read_csv(Table(file))
        judged = {rate: judging.judge(reading.blocks_of(told), shipped_model(), rate) for rate in (DEFAULT, RATES[0])}
        out[path.name] = {
            "devices": len(told.names), "looks": judged[DEFAULT].looks,
            "suspect": {f"{rate:g}": len(one.suspect_after_s) for rate, one in judged.items()},
            "kinds": sorted({f"{one.kind} ({one.verdict})" for one in judged[DEFAULT].episodes})}
    return out


def program(row: dict[str, str], seconds: int, seed: int) -> list[Device | DeviceSample]:
    """Return one program of the NV-DVFS set, a steady average, played as a constant level with a simulator's noise."""
    random = np.random.default_rng(seed)
    share = {name: float(row[column]) for name, column in (
        ("sm_ratio", "SMACT"), ("occupancy_ratio", "SMOCC"), ("dram_ratio", "DRAMA"), ("fp32_ratio", "FP32A"),
        ("fp64_ratio", "FP64A"), ("fp16_ratio", "FP16A"), ("tensor_ratio", "TENSO"))}
    noise = np.clip(1 + 0.01 * random.normal(size=(seconds, len(share) + 1)), 0.9, 1.1)
    blocks: list[Device | DeviceSample] = [Device(0, "V100", 0, "V100-SXM2", power_limit_w=300.0)]
    for t in range(seconds):
        gpm = Gpm(SECOND_NS, **{name: min(1.0, value * noise[t, i]) for i, (name, value) in enumerate(share.items())})
        power_w = float(row["average_power"]) * noise[t, -1]
        blocks.append(DeviceSample(t * SECOND_NS, "V100", power_w=power_w, gpm=gpm))
    return blocks


def programs() -> dict[str, object]:
    """Return which of the 20 programs become suspect at any of 10 clocks, by how long each is played, and why."""
    with (DATA / "v100-dvfs-real-profile.csv").open() as file:
        rows = list(csv.DictReader(file))
    out: dict[str, object] = {}
    for seconds in PROGRAM_S:
        found: dict[str, dict[str, object]] = {}
        kinds: dict[str, set[str]] = {}
        for seed, row in enumerate(rows):
            # Who is not suspect at the most alarms is not at fewer.
            judged = judging.judge(program(row, seconds, seed), shipped_model(), RATES[0])
            kinds.setdefault(row["benchmark"], set()).update(one.kind for one in judged.episodes)
            after = judged.suspect_after_s.get("V100")
            if after is not None:
                why = next(one.text for one in judged.evidence["V100"] if one.time_ns >= after * SECOND_NS)
                strict = judging.judge(program(row, seconds, seed), shipped_model(), DEFAULT)
                found[f"{row['benchmark']} at {row['core_frequency']} MHz"] = {
                    "suspect_after_s": after, "why": why, f"at {DEFAULT:g} too": "V100" in strict.suspect_after_s}
        out[f"{seconds} s"] = {"programs": len(kinds), "played": len(rows), f"suspect at {RATES[0]:g}": found,
                               "kinds": {name: sorted(one) for name, one in kinds.items()}}
    return out


def unseen() -> dict[str, object]:
    """Return what is found of families, and wrongly of other work, that the forests were not shown: jobs of those.

    The jobs of other work are not those that the limits were counted from.
    """
    shipped, others = shipped_model(), [one for one in telemetry.BENIGN if one.kind != "idle"]
    evasions = [one for one in telemetry.EVASIONS if train.trained_on(one)]
    heights: dict[str, list[float]] = {name: [] for name in ("mining", *(one.kind for one in others))}
    sources: dict[str, list[str]] = {name: [] for name in heights}
    wrongly: dict[str, int] = {}
    table = train.drawn(train.collect(train.SEED, train.JOBS), train.FIT_ROWS)
    for group, forest in train.left_out(table).items():
        model = train.bounded(forest, shipped.line)
        of = [one for one in (*telemetry.MINERS, *others) if train.GROUPS[one.name] == group]
        for kinds, hidden, each, seconds in (
                ([one for one in of if one.kind == "mining"], evasions, 1, HOUR_S),
                ([one for one in of if one.kind != "mining"], telemetry.EVASIONS[:1], 4, 2 * HOUR_S)):
            some = evaluation.jobs_of(kinds, hidden, each, np.random.default_rng(17))
            highest = evaluation.play(model, some, seconds, 17).max(axis=1)
            for job, height in zip(some, highest.tolist(), strict=True):
                heights[job.workload.kind].append(height)
                sources[job.workload.kind].append(job.visible)
                if job.workload.kind != "mining" and height >= shipped.honest.limit(RATES[0]).height:
                    wrongly[job.workload.name] = wrongly.get(job.workload.name, 0) + 1
    return {"simulated": True, f"alarms at {RATES[0]:g} by workload": wrongly,
            **{kind: told_of(np.array(some), np.array(sources[kind])) for kind, some in heights.items()}}


def told_of(highest: np.ndarray, sources: np.ndarray) -> dict[str, object]:
    """Return how many jobs come to the limit of each rate, and how many to what adds up most with other eyes."""
    honest = shipped_model().honest
    near = np.array([honest.nats(one) >= NEAR_NATS for one in highest.tolist()])
    reached = {f"{rate:g}": highest >= honest.limit(rate).height for rate in RATES} | {f"{NEAR_NATS} nats": near}
    out: dict[str, object] = {"jobs": len(highest)}
    for name, one in reached.items():
        by_source = {source: round(float(one[sources == source].mean()), 3) for source in evaluation.VISIBLE}
        out[name] = {"all": int(one.sum()), **by_source}
    return out


PARTS = {
    "cost": cost,
    "recordings": recordings,
    "programs": programs,
    "detection": lambda: {"simulated": True, **evaluation.detections(shipped_model(), 2, 3600.0, RATES, 7)},
    "unseen": unseen,
    "alarms": lambda: {"simulated": True, **evaluation.alarms(shipped_model(), 6, 7200.0, RATES, 11)},
}


def main(wanted: list[str]) -> int:
    """Measure the parts that are asked for, and write them beside what was measured before."""
    result = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    limits = {rate: shipped_model().honest.limit(rate) for rate in RATES}
    result["limits"] = {f"{rate:g}": one._asdict() if math.isfinite(one.height) else None
                        for rate, one in limits.items()}
    for name in wanted or PARTS:
        if name in ("recordings", "programs") and not DATA.exists():
            print(f"{name}: GPUGUARD_DATA_DIR has no telemetry")
            continue
        begun = time.process_time()
        result[name] = PARTS[name]()
        print(f"{name}: {time.process_time() - begun:.0f} s of CPU time")
        RESULT.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if result.get("cost", {}).get("met", True) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
