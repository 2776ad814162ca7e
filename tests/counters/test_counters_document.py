"""docs/counters-measured.md says what benchmarks/results/counters.json does, and the guide what the limits are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gpuguard.config import GuardSettings
from gpuguard.counters.shipped import shipped_model
from gpuguard.lab import telemetry

ROOT = Path(__file__).parents[2]
MEASURED = (ROOT / "docs/counters-measured.md").read_text()
JUDGED = (ROOT / "docs/counters-judged.md").read_text()
RESULTS = json.loads((ROOT / "benchmarks/results/counters.json").read_text())
SOURCES = ("gpm", "dcgm", "nvml")
#: What the page calls each height.
HEIGHTS = {"10 alarms per GPU-year": "10", "1 alarms per GPU-year": "1", "0.1 alarms per GPU-year": "0.1",
           "4.4 nats for other eyes": "4.4 nats for other eyes"}


def row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def delay(found: dict[str, Any]) -> str:
    if found["delay_p50_s"] is None:
        return "-"
    return " / ".join(f"{found[name]:.0f}" for name in ("delay_p50_s", "delay_p95_s", "delay_p99_s"))


@pytest.mark.parametrize("height", HEIGHTS)
def test_what_a_rate_costs(height):
    own = [RESULTS["detection"][height][source]["with a GPU of its own"] for source in SOURCES]
    cells = [cell for one in own for cell in (f"{one['detected']:.0%}", delay(one))]
    assert row(HEIGHTS[height], *cells) in MEASURED


def found_of_each(height: str, by: str) -> list[str]:
    """Return a row for each name: how many are found by each source, and how late."""
    found = {source: RESULTS["detection"][height][source][by] for source in SOURCES}
    return [row(name, *(cell for source in SOURCES for cell in (
        str(round(found[source][name]["detected"] * found[source][name]["jobs"])), delay(found[source][name]))))
        for name in found["gpm"]]


@pytest.mark.parametrize("height", ["10 alarms per GPU-year", "4.4 nats for other eyes"])
def test_what_evasion_changes(height):
    assert "\n".join(found_of_each(height, "by evasion")) in MEASURED


def test_which_miners_are_found():
    families = {one.name: one.family for one in telemetry.MINERS}
    rows = [one.replace(f"| {name} |", f"| {name} ({families[name]}) |", 1)
            for name, one in zip(families, found_of_each("10 alarms per GPU-year", "by workload"), strict=True)]
    assert "\n".join(rows) in MEASURED


def test_kinds_that_no_forest_was_shown():
    unseen = RESULTS["unseen"]
    for height, name in HEIGHTS.items():
        told = "4.4 nats" if "nats" in height else name
        found = unseen["mining"][told]
        honest = f"{unseen['compute'][told]['all']} of {unseen['compute']['jobs']}"
        assert row(name, *(f"{found[source]:.0%}" for source in SOURCES), honest) in MEASURED
        assert unseen["training"][told]["all"] == unseen["inference"][told]["all"] == 0


def test_alarms_of_honest_jobs():
    for source in SOURCES:
        one = RESULTS["alarms"][f"{source}, compute"]
        counts = [str(one[rate]["alarms"]) for rate in ("10", "1", "0.1")]
        rates = [f"{one['10'][name]:.1f}" for name in ("counted_per_gpu_year", "at_most_per_gpu_year")]
        assert row(f"{source}, compute", str(one["jobs"]), f"{one['gpu_years']:.4f}", *counts, *rates) in MEASURED
    quiet = [RESULTS["alarms"][f"{source}, {kind}"] for source in SOURCES for kind in ("training", "inference", "idle")]
    assert sum(one["10"]["alarms"] for one in quiet) == 0
    assert f"Of {sum(one['jobs'] for one in quiet)} jobs of training, inference and idle 0" in MEASURED


def test_recordings_accuse_nobody():
    devices = [one["devices"] for one in RESULTS["recordings"].values()]
    assert all(set(one["suspect"].values()) == {0} for one in RESULTS["recordings"].values())
    assert f"({sum(devices)} H100s" in JUDGED
    assert all(one["suspect at 10"] == {} and one["programs"] == 20 for one in RESULTS["programs"].values())


def test_limits_are_those_of_the_shipped_model():
    honest = shipped_model().honest
    assert GuardSettings().counter_alarms_per_gpu_year == 1
    assert f"Counted from {len(honest.heights):,} honest jobs" in MEASURED
    assert f"{honest.reached(1e-9)} of them came above nothing" in MEASURED
    for rate in (10, 1):
        limit = honest.limit(rate)
        bounds = f"{limit.least:.1g} to {limit.most:.2g}"
        assert row(str(rate), f"{limit.height:.2f}", "counted", bounds) in MEASURED


def test_cost():
    cost = RESULTS["cost"]
    assert f"| {cost['replay_24h_8_gpus_1_hz_cpu_s']:.0f} s of CPU time" in MEASURED
    assert f"| {cost['guard_us_per_sample_1_hz']:.0f} us: {cost['reading_us']:.1f} the reading" in MEASURED
