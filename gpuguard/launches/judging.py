"""Recorded launches through a `Guard`, as blocks that the launch sensor would have yielded."""

from __future__ import annotations

import itertools
from collections import defaultdict
from typing import TYPE_CHECKING, Literal

import numpy as np
from msgspec import Struct

from gpuguard.core.events import Finding
from gpuguard.core.evidence import Evidence
from gpuguard.core.guard import Guard
from gpuguard.core.records import LAUNCH, LAUNCH_APIS, SCHEMA_VERSION, HostInfo, KernelName, Launches, Tick
from gpuguard.core.subjects import ProcessId
from gpuguard.kernels.launches import features
from gpuguard.launches.reading import BEGIN_NS
from gpuguard.signature_files import shipped

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gpuguard.launches.reading import Recorded

SECOND_NS = 1_000_000_000
INTERVAL_NS = 250_000_000
SETTLE_NS = 2 * SECOND_NS


def blocks_of(recorded: Recorded, process: ProcessId) -> Iterator[KernelName | Launches]:
    """Yield what the launch sensor would have yielded: names before first use, and one block an interval."""
    handles: dict[str, int] = {}
    last_ns: dict[int, int] = {}
    interval = (recorded.times_ns - BEGIN_NS) // INTERVAL_NS
    bounds = [0, *(np.flatnonzero(np.diff(interval)) + 1).tolist(), len(interval)]
    for start, end in itertools.pairwise(bounds):
        times, keys = recorded.times_ns[start:end], recorded.keys[start:end]
        for key in dict.fromkeys(keys.tolist()):
            name = recorded.table[key][0]
            if name not in handles:
                handles[name] = len(handles) + 1
                yield KernelName(int(times[0]), process, handles[name], name)
        rows = _aggregate(times, keys, recorded, handles, last_ns)
        rows["pid"], rows["start_ticks"] = process.pid, process.start_ticks
        yield Launches(BEGIN_NS + (int(interval[start]) + 1) * INTERVAL_NS, rows)


def _aggregate(
    times: np.ndarray, keys: np.ndarray, recorded: Recorded, handles: dict[str, int], last_ns: dict[int, int],
) -> np.ndarray:
    """Return LAUNCH rows of one interval, as the kernel-side table would have them."""
    by_key = np.argsort(keys, kind="stable")
    present, starts = np.unique(keys[by_key], return_index=True)
    rows = np.zeros(len(present), LAUNCH)
    for row, key, own in zip(rows, present.tolist(), np.split(times[by_key], starts[1:]), strict=True):
        name, api, geometry = recorded.table[key]
        before = [last_ns[key]] if key in last_ns else []
        gaps = np.maximum(np.diff(np.concatenate([np.array(before, np.int64), own])), 1)
        row["gaps_log2"] = np.bincount(np.minimum(np.log2(gaps).astype(int), 39), minlength=40)
        row["first_ns"], row["last_ns"], row["launches"] = own[0], own[-1], len(own)
        row["kernel"] = handles[name]
        row["api"] = LAUNCH_APIS.index(api) if api in LAUNCH_APIS else 0
        row["grid"], row["block"], row["shared_bytes"] = geometry[:3], geometry[3:6], geometry[6]
        last_ns[key] = int(own[-1])
    return rows


class Line(Struct):
    """One window of one second, and the standing at its end."""

    window: int
    start_s: float
    launches: int
    kernels: int
    geometries: int
    top_ratio: float
    kernel_entropy_bits: float
    cadence_ratio: float
    verdict: Literal["unknown", "clear", "suspect", "confirmed"]
    label: str
    probability: float
    evidence: list[Evidence]


def judge(recorded: Recorded) -> tuple[list[Line], Finding | None]:
    """Run the recording through a `Guard`; return a line for each second with launches, and the last finding."""
    process = ProcessId("recorded", 1, 1)
    guard = Guard(signatures=shipped())
    guard.receive(HostInfo(BEGIN_NS, SCHEMA_VERSION, "recorded", "recorded", 100))
    by_second: dict[int, list[np.ndarray]] = defaultdict(list)
    findings: list[tuple[int, Finding]] = []
    standing: dict[int, tuple[str, str, float]] = {}
    end_ns = int(recorded.times_ns[-1]) + SETTLE_NS
    now_ns = BEGIN_NS

    def feed(block: KernelName | Launches | Tick, second: int) -> None:
        findings.extend((second, event) for event in guard.receive(block) if isinstance(event, Finding))
        for one in guard.processes():
            standing[second] = (one.verdict, one.label, one.probability)

    for block in blocks_of(recorded, process):
        second = (min(block.time_ns - 1, int(recorded.times_ns[-1])) - BEGIN_NS) // SECOND_NS
        if isinstance(block, Launches):
            by_second[second].append(block.rows)
            now_ns = block.time_ns
        feed(block, second)
    while now_ns < end_ns:
        now_ns += INTERVAL_NS
        feed(Tick(now_ns), max(by_second))
    return [_line(second, rows, standing, findings) for second, rows in sorted(by_second.items())], (
        findings[-1][1] if findings else None)


def _line(
    second: int, rows: list[np.ndarray], standing: dict[int, tuple[str, str, float]],
    findings: list[tuple[int, Finding]],
) -> Line:
    feature = features(np.concatenate(rows))[0][0]
    verdict, label, probability = standing.get(second, ("unknown", "", 0.0))
    return Line(
        window=second, start_s=float(second), launches=int(feature["launches"]), kernels=int(feature["kernels"]),
        geometries=int(feature["geometries"]), top_ratio=round(float(feature["top_ratio"]), 4),
        kernel_entropy_bits=round(float(feature["kernel_entropy_bits"]), 4),
        cadence_ratio=round(float(feature["cadence_ratio"]), 4), verdict=verdict, label=label,  # type: ignore[arg-type]
        probability=round(probability, 6),
        evidence=[one for at, finding in findings if at == second for one in finding.evidence],
    )
