"""Looks at simulated jobs, many at once: what the counter eye is trained and measured on where nothing was recorded."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from gpuguard.core import counter_features as cf
from gpuguard.core.detectors.counters import SAMPLES_MIN
from gpuguard.lab import telemetry

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from gpuguard.lab.telemetry import Board, Evasion, Trace, Workload

_AT = {name: i for i, name in enumerate(cf.CHANNELS)}
#: What each source of counters does not tell.
_HIDDEN = {
    "gpm": (),
    "dcgm": ("integer", "hmma", "imma"),
    "nvml": ("sm", "occupancy", "integer", "fp32", "fp64", "fp16", "tensor", "hmma", "imma", "dram"),
}
#: Columns that a file or a board may lack beyond that.
_DROPPABLE = ("gpu", "occupancy", "integer", "fp32", "fp64", "fp16", "hmma", "imma", "moving", "power", "host", "link",
              "memory")
#: What the NV-DVFS set tells: activity of pipes, and power.
_ACTIVITY = ("gpu", "integer", "hmma", "imma", "moving", "host", "link", "memory")
#: What DCGM tells is chosen field by field: all, or none of these as in the H100 recordings, or what dcgm-exporter
#: ships (default-counters.csv: time of the engine, tensor, DRAM, PCIe), which lacks the activity of SMs.
_UNCHOSEN = ("occupancy", "fp32", "fp64")
_CHOICES = ((), _UNCHOSEN, ("sm", "fp16", *_UNCHOSEN))


class Job(NamedTuple):
    """One simulated job: what to draw, which columns are hidden of it, and how many weeks after the first it runs."""

    workload: Workload
    board: Board
    visible: telemetry.Visible
    evasion: Evasion = telemetry.EVASIONS[0]
    hidden: tuple[str, ...] = ()
    limit_known: bool = True
    weeks: float = 0.0


class Looks(NamedTuple):
    """Looks at jobs of equal length: (jobs, looks, ...) each. ``mining`` is the miner's true share of each look."""

    features: np.ndarray
    at_work: np.ndarray
    mining: np.ndarray


def readings(trace: Trace) -> np.ndarray:
    """Return float32[ticks, CHANNELS] of a trace, as `counter_features.channels` would of its samples."""
    sm, occupancy, integer, fp32, fp64, fp16, hmma, imma, dram = trace.shares.T
    both = np.minimum(hmma + imma, 1.0)
    columns = [trace.gpu, sm, occupancy, integer, fp32, fp64, fp16, both, hmma, imma, dram,
               np.minimum(1.28 * dram, 1.0), trace.power_w, np.log10(1 + trace.pcie.astype(np.int64) // 2 * 2),
               np.log10(1 + trace.nvlink.astype(np.int64) // 2 * 2), trace.memory]
    out = np.stack(columns, axis=1).astype(np.float32)
    out[:, [_AT[name] for name in _HIDDEN[trace.visible]]] = np.nan
    return out


def look_at(jobs: Sequence[Job], seconds: float, rate_hz: float, random: np.random.Generator) -> Looks:
    """Simulate jobs and look at them as the detector does, all in step: a look takes longer where samples are few."""
    ticks = max(SAMPLES_MIN, round(cf.LOOK_S * rate_hz))
    looks = max(1, int(seconds * rate_hz / ticks))
    table = np.full((len(jobs), looks * ticks, len(cf.CHANNELS)), np.nan, np.float32)
    mining = np.zeros((len(jobs), looks))
    limit_w = np.array([job.board.power_limit_w if job.limit_known else np.nan for job in jobs])
    for i, job in enumerate(jobs):
        trace = telemetry.simulate(job.workload, job.board, looks * ticks / rate_hz, random, rate_hz=rate_hz,
                                   evasion=job.evasion, visible=job.visible)
        if job.weeks:
            trace = telemetry.drifted(trace, job.weeks)
        table[i] = readings(trace)[:looks * ticks]
        table[i][:, [_AT[name] for name in job.hidden]] = np.nan
        mining[i] = trace.mining[:looks * ticks].reshape(looks, ticks).mean(axis=1)
    past, features, at_work = cf.no_history(len(jobs)), [], []
    for k in range(looks):
        now, busy, past = cf.look(cf.summarised(table[:, k * ticks:(k + 1) * ticks]), limit_w, past)
        features.append(now)
        at_work.append(busy)
    return Looks(np.stack(features, axis=1), np.stack(at_work, axis=1), mining)


def hidden_columns(random: np.random.Generator) -> tuple[str, ...]:
    """Draw what a file or a board lacks: mostly nothing, else some columns, or all but the activity of pipes."""
    dice = random.random()
    if dice < 0.5:
        return ()
    if dice < 0.6:
        return _ACTIVITY
    return tuple(name for name in _DROPPABLE if random.random() < 0.2)


def draw(workloads: Sequence[Workload], evasions: Sequence[Evasion], count: int,
         random: np.random.Generator, boards: Sequence[Board] = telemetry.BOARDS) -> Iterator[Job]:
    """Draw jobs, each workload and evasion as often as any other."""
    for i in range(count):
        board = boards[int(random.integers(len(boards)))]
        visible = board.visible[int(random.integers(len(board.visible)))]
        workload = workloads[i % len(workloads)]
        evasion = evasions[i // len(workloads) % len(evasions)] if workload.kind == "mining" else telemetry.EVASIONS[0]
        hidden = hidden_columns(random)
        if visible == "dcgm":
            hidden += _CHOICES[int(random.integers(len(_CHOICES)))]
        yield Job(workload, board, visible, evasion, hidden, bool(random.random() < 0.8))
