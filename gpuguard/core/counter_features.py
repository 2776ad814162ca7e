"""What a job looks like to counters: its mix and its rhythm, never how much it takes.

Mining draws 38 to 98 % of a board's power and is throttled at will, so an absolute level tells nothing. What is kept
of a window is relative: each pipe's share of the time that the SMs were busy, how steady that was, what crossed the
host link beside it, and how it moved against the job's own past.

Three time scales. A *look* is what became of `LOOK_S` seconds of readings: real power at 10 Hz has a lag-1
autocorrelation of up to 0.99 (NVML smooths it), and a series with autocorrelation rho is worth (1 - rho) / (1 + rho) of
its samples, so at the worst one independent look takes 0.1 s * 1.99 / 0.01 = 20 s, whatever the sampling rate. Over
looks run two exponential means, of `FAST` and `SLOW` looks: the job's own baseline. Looks without work leave them as
they are, so that a pause does not wash a job's past away.

What a board does not tell is NaN in a reading and `ABSENT` in a feature: absent, never 0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from gpuguard.core.records import Gpm
from gpuguard.kernels.windows import VALUE_MAX

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gpuguard.core.records import DeviceSample

LOOK_S = 20.0
#: Looks: 3 minutes and 20.
FAST, SLOW = 8, 64
#: Below this busy ratio nothing is computed that could be told apart.
IDLE_RATIO = 0.02
#: All features are at or above 0.
ABSENT = -1.0

#: Of one sample: ratios of the device's limits as its driver tells them, ``power`` in watts, ``host`` (PCIe) and
#: ``link`` (NVLink) as log10 of both ways' bytes/s plus one, ``memory`` the used share of it, ``moving`` NVML's memory
#: ratio.
CHANNELS = ("gpu", "sm", "occupancy", "integer", "fp32", "fp64", "fp16", "tensor", "hmma", "imma", "dram", "moving",
            "power", "host", "link", "memory")
_AT = {name: i for i, name in enumerate(CHANNELS)}
STATISTICS = ("mean", "std", "min", "max")

#: Of these the share of busy time is a feature, and some of their running means.
MIXED = ("occupancy", "integer", "fp32", "fp64", "fp16", "tensor", "hmma", "imma", "dram")
STEADIED = ("gpu", "sm", "dram", "power")
KEPT = (*(f"mix_{name}" for name in ("integer", "fp32", "tensor", "hmma", "imma", "dram")), "sm_variation",
        "power_variation", "host_most", "host_mean", "link_most", "busy")
NOW = (*(f"mix_{name}" for name in MIXED), "mix_moving",
       *(f"{name}_{what}" for name in STEADIED for what in ("variation", "least", "most")),
       "host_mean", "host_most", "link_mean", "link_most", "memory", "memory_variation", "power_level", "power_of_busy",
       "busy")
#: "busy" is followed to see it change, and is no feature: what takes more is not more of a miner.
FEATURES = (*NOW[:-1], *(f"fast_{name}" for name in KEPT[:-1]), *(f"drift_{name}" for name in KEPT),
            "slow_host_most", "slow_tensor", "slow_power_variation", "unbroken")

#: What ends an unbroken stretch: a copy of this rate (log10 of bytes/s), or a fall of the SMs to this share of their
#: usual level.
COPY_HOST, FALL_RATIO = 8.0, 0.35
_UNBROKEN_MAX = 1 << 14


class History(NamedTuple):
    """The past of n jobs, one row each: running means and mean squared departures of `KEPT`, and looks unbroken."""

    fast: np.ndarray
    drift: np.ndarray
    slow: np.ndarray
    unbroken: np.ndarray


def no_history(count: int = 1) -> History:
    """Return the past of jobs of which nothing was seen."""
    unseen = np.full((count, len(KEPT)), np.nan)
    return History(unseen, unseen, unseen, np.zeros(count))


def reading(sample: DeviceSample) -> tuple[float | None, ...]:
    """Return one reading as it was told: `CHANNELS` to ``power``, PCIe and NVLink each way, and bytes of memory."""
    gpm = sample.gpm or _UNTOLD
    # NVML's own counters come before GPM's.
    host = gpm if sample.pcie_tx_bytes_per_s is sample.pcie_rx_bytes_per_s is None else sample
    link = gpm if sample.nvlink_tx_bytes_per_s is sample.nvlink_rx_bytes_per_s is None else sample
    return (
        sample.gpu_ratio, gpm.sm_ratio, gpm.occupancy_ratio, gpm.integer_ratio, gpm.fp32_ratio, gpm.fp64_ratio,
        gpm.fp16_ratio, gpm.tensor_ratio, gpm.tensor_hmma_ratio, gpm.tensor_imma_ratio, gpm.dram_ratio,
        sample.memory_ratio, sample.power_w, host.pcie_tx_bytes_per_s, host.pcie_rx_bytes_per_s,
        link.nvlink_tx_bytes_per_s, link.nvlink_rx_bytes_per_s, sample.memory_used_bytes,
    )


_UNTOLD = Gpm(period_ns=0)


def channels(readings: Sequence[tuple[float | None, ...]], memory_bytes: int | None) -> np.ndarray:
    """Return float32[ticks, CHANNELS] of readings, NaN for what was not told.

    Nothing that is no share of a limit gets past here. All at once: one by one it costs a third of all that is done
    with a sample.
    """
    told = np.array(readings, np.float64)  # None becomes NaN
    power = _AT["power"]
    out = np.full((len(told), len(CHANNELS)), np.nan, np.float32)
    out[:, :power] = _shares(told[:, :power])
    out[:, power] = told[:, power]
    ways = told[:, power + 1:-1].reshape(-1, 2, 2)
    both = np.log10(1 + np.maximum(np.nansum(ways, axis=2), 0.0))
    out[:, power + 1:-1] = np.where(np.isnan(ways).all(axis=2), np.nan, both)
    if memory_bytes:
        out[:, -1] = _shares(told[:, -1] / memory_bytes)
    return out


def _shares(values: np.ndarray) -> np.ndarray:
    return np.where(values >= 0, np.minimum(values, 1.0), np.nan)


def summarised(readings: np.ndarray) -> np.ndarray:
    """Return float64[STATISTICS, n, CHANNELS] of float32[n, ticks, CHANNELS], as `kernels.windows` defines them.

    Four of its eleven features are wanted, every twenty seconds: by themselves they cost a sixth of all.
    """
    there = np.abs(readings) <= VALUE_MAX
    count = there.sum(axis=1)
    x = np.where(there, readings, 0.0).astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = x.sum(axis=1) / count
        away = np.where(there, x - mean[:, None], 0.0)
        deviation = np.sqrt((away * away).sum(axis=1) / count)
    nothing = np.where(count > 0, 0.0, np.nan)
    least, most = np.where(there, x, np.inf).min(axis=1), np.where(there, x, -np.inf).max(axis=1)
    return np.stack([mean, deviation, least + nothing, most + nothing])


def look(statistics: np.ndarray, limit_w: np.ndarray, past: History) -> tuple[np.ndarray, np.ndarray, History]:
    """Return float32[n, FEATURES], which of n jobs were at work, and their past from now on.

    ``statistics`` is what `summarised` returns; ``limit_w`` is NaN where a board's limit is not known. The
    features of a job that was not at work mean nothing.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        now = _now(statistics, limit_w)
        at_work = now["busy"] > IDLE_RATIO
        least = now["sm_least"] * now["busy"]
        kept = np.stack([now[name] for name in KEPT], axis=1)
        usual = past.fast[:, KEPT.index("busy")]
        broken = (now["host_most"] > COPY_HOST) | (least < FALL_RATIO * usual) | ~at_work
        unbroken = np.where(broken, 0.0, np.minimum(past.unbroken + 1, _UNBROKEN_MAX))
        departed = (kept - past.fast) ** 2
        moved = History(
            _mean(past.fast, kept, FAST, at_work), _mean(past.drift, departed, FAST, at_work),
            _mean(past.slow, kept, SLOW, at_work), unbroken)
    slow = [moved.slow[:, KEPT.index(name)] for name in ("host_most", "mix_tensor", "power_variation")]
    columns = [*(now[name] for name in NOW[:-1]), *moved.fast.T[:-1], *np.sqrt(moved.drift).T, *slow,
               np.log2(1 + unbroken)]
    out = np.nan_to_num(np.stack(columns, axis=1), nan=ABSENT, posinf=ABSENT, neginf=ABSENT)
    return out.astype(np.float32), at_work, moved


def _now(statistics: np.ndarray, limit_w: np.ndarray) -> dict[str, np.ndarray]:
    """Return what one look says by itself."""
    mean, deviation, least, most = statistics.transpose(0, 2, 1)
    busy = np.where(np.isnan(mean[_AT["sm"]]), mean[_AT["gpu"]], mean[_AT["sm"]])
    now = {f"mix_{name}": np.minimum(mean[_AT[name]] / busy, 4.0) for name in MIXED}
    now["mix_moving"] = np.minimum(mean[_AT["moving"]] / mean[_AT["gpu"]], 4.0)
    for name in STEADIED:
        level = mean[_AT[name]]
        # Next to nothing is steady, whatever it does: ratios are of what there is.
        level = np.where(level > 1e-3, level, np.nan)
        now[f"{name}_variation"] = deviation[_AT[name]] / level
        now[f"{name}_least"], now[f"{name}_most"] = least[_AT[name]] / level, most[_AT[name]] / level
    for name in ("host", "link"):
        now[f"{name}_mean"], now[f"{name}_most"] = mean[_AT[name]], most[_AT[name]]
    now["memory"], now["memory_variation"] = mean[_AT["memory"]], deviation[_AT["memory"]]
    now["power_level"] = mean[_AT["power"]] / limit_w
    now["power_of_busy"] = np.minimum(now["power_level"] / busy, 8.0)
    now["busy"] = busy
    return now


def _mean(past: np.ndarray, now: np.ndarray, looks: int, at_work: np.ndarray) -> np.ndarray:
    """Return a running mean moved by one look, where there was one."""
    moved = np.where(np.isnan(past), now, past + (now - past) / looks)
    return np.where(at_work[:, None] & ~np.isnan(now), moved, past)
