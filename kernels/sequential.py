"""Tests that decide as soon as the evidence suffices, for thousands of subjects at once: CUSUM and betting e-processes.

`Cusum` is for a counter of about normal noise that shifts up by so many standard deviations. It adds up log-likelihood
ratios in nats and never falls below 0 (Page, 1954); among all tests of the same false-alarm rate it has the shortest
worst delay (Lorden, 1971; Moustakides, 1986).

`Bets` is for a score in 0..1 of which no more is known than its mean while nothing happens. Against each subject it
plays the game that a fair one could not win in the long run: capital is multiplied by 1 + stake * (score - mean), and
one unit is paid in at each tick. When the capital, a mixture over stakes, reaches 1/alpha it alarms; whatever else is
true of the score, that is after 1/alpha ticks on average at the earliest (the e-detectors of Shin, Ramdas and Rinaldo).

Samples of counters are not independent; NVML's power has a lag-1 autocorrelation of up to 0.99 at 10 Hz. Both tests
take what a first-order autoregression leaves: x[t] - mean - rho * (x[t-1] - mean). A shift by d standard deviations is
then worth only d * sqrt((1 - rho) / (1 + rho)), which is all the information there is. A missing sample (NaN, or
infinite) changes nothing, and neither does the one behind it, of which the predecessor is not known.

The counter detector's own sum is `Cusum` over weights of looks that are independent already (rho 0), a subject at a
time, until it is so old that it fades; a test holds the two alike. What stands here beside it is for whoever has
thousands of raw series at once: fleets, recordings, studies of other scores.

What a threshold means is computed, not tuned: `cusum_arl` and `cusum_delay` by Siegmund's corrected approximation,
`cusum_ticks` exactly by Page's integral equation, `cusum_threshold` the other way about; tests hold all of them
against simulation.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from gpuguard.kernels import chosen

#: Capital is kept below this: whoever has so much has alarmed long ago.
CAPITAL_MAX = 1e200

#: What Siegmund adds to the threshold, in standard deviations of a step, for the overshoot at both ends: 2 * 0.583.
OVERSHOOT = 1.166


class Cusum(NamedTuple):
    """A test for a shift up: of subjects' baselines, and what is looked for."""

    mean: np.ndarray  # float64[subjects]
    std: np.ndarray  # float64[subjects], above 0
    rho: np.ndarray  # float64[subjects], 0 <= rho < 1
    shift: float  # in standard deviations of a sample
    threshold_nats: float


class Bets(NamedTuple):
    """A test for a score whose mean rises above a bound."""

    mean: np.ndarray  # float64[subjects]: the most that a score's mean can be while nothing happens, 0..1
    rho: np.ndarray  # float64[subjects], 0 <= rho < 1
    stakes: np.ndarray  # float64[stakes], above 0, at most `stake_max` of every subject
    threshold_nats: float  # ln(1 / alpha): alpha alarms a tick at most


class State(NamedTuple):
    """Where a test stands; `run` writes into it."""

    value: np.ndarray  # float64[subjects, stakes]: nats of a CUSUM (one column), capital by stake
    before: np.ndarray  # float64[subjects]: the sample before, NaN where there is none
    ticks: np.ndarray  # int64[1]
    alarm: np.ndarray  # int64[subjects]: the tick, from 0, of the first alarm; -1 for none


def start(test: Cusum | Bets) -> State:
    """Return the state of subjects of whom nothing was seen. Raises `ValueError` for a test that cannot be run."""
    subjects = len(test.mean)
    if len(test.rho) != subjects or not np.all((test.rho >= 0) & (test.rho < 1)):
        raise ValueError("a test needs for each subject a mean, and a rho of 0 to below 1")
    if isinstance(test, Cusum):
        if len(test.std) != subjects or not np.all(test.std > 0) or not test.shift > 0:
            raise ValueError("a CUSUM needs deviations and a shift above 0")
        components = 1
    else:
        if not np.all((test.stakes > 0) & (test.stakes <= stake_max(test.mean, test.rho).min(initial=np.inf))):
            raise ValueError("stakes above 0 are needed, and at most what a subject can lose in one tick")
        components = len(test.stakes)
    return State(np.zeros((subjects, components)), np.full(subjects, np.nan), np.zeros(1, np.int64),
                 np.full(subjects, -1, np.int64))


def stake_max(mean: np.ndarray, rho: np.ndarray) -> np.ndarray:
    """Return the largest stake at which no score in 0..1, after no other, can make the capital negative."""
    most: np.ndarray = 1 / (mean + rho * (1 - mean))
    return most


def run(samples: np.ndarray, test: Cusum | Bets, state: State, backend: str = "auto",
        device: int | None = None) -> str:
    """Move on by float[ticks, subjects], oldest first, and return the name of the form used (`gpuguard.kernels`).

    Scores of `Bets` beyond 0..1 count as 0 or 1. Raises `ValueError` for another number of subjects.
    """
    if samples.ndim != 2 or samples.shape[1] != len(state.before):
        raise ValueError(f"samples of shape {samples.shape} for {len(state.before)} subjects")
    backend = chosen(backend, device, "numpy")
    if backend == "cuda":
        from gpuguard.kernels import sequential_cuda

        sequential_cuda.run(samples, test, state, device)
        return backend
    if backend == "cpu":
        from gpuguard.kernels import sequential_cpu

        sequential_cpu.run(samples, test, state)
    else:
        (reference if backend == "reference" else vectorised)(samples, test, state)
    state.ticks[0] += len(samples)
    return backend


def evidence_nats(test: Cusum | Bets, state: State) -> np.ndarray:
    """Return float64[subjects]: how far each test is, in nats; it alarms at the test's threshold."""
    if isinstance(test, Cusum):
        nats: np.ndarray = state.value[:, 0]
    else:
        capital = state.value.mean(axis=1)
        nats = np.log(capital, out=np.full(len(capital), -np.inf), where=capital > 0)
    return nats


def reference(samples: np.ndarray, test: Cusum | Bets, state: State) -> None:
    """Move on, one subject and one tick at a time."""
    for subject in range(samples.shape[1]):
        for tick, x in enumerate(samples[:, subject].tolist(), start=int(state.ticks[0])):
            before = float(state.before[subject])
            if not isinstance(test, Cusum) and math.isfinite(x):
                x = min(max(x, 0.0), 1.0)  # noqa: PLW2901
            state.before[subject] = x if math.isfinite(x) else math.nan
            if not (math.isfinite(x) and math.isfinite(before)):
                continue
            mean, rho = float(test.mean[subject]), float(test.rho[subject])
            new = x - mean - rho * (before - mean)
            if isinstance(test, Cusum):
                z = new / (float(test.std[subject]) * math.sqrt(1 - rho * rho))
                shift = test.shift * math.sqrt((1 - rho) / (1 + rho))
                state.value[subject] = evidence = max(float(state.value[subject, 0]) + shift * z - shift * shift / 2, 0)
            else:
                for k, stake in enumerate(test.stakes.tolist()):
                    capital = (float(state.value[subject, k]) + 1) * (1 + stake * new)
                    state.value[subject, k] = min(max(capital, 0.0), CAPITAL_MAX)
                capital = float(state.value[subject].mean())
                evidence = math.log(capital) if capital > 0 else -math.inf
            if evidence >= test.threshold_nats and state.alarm[subject] < 0:
                state.alarm[subject] = tick


def vectorised(samples: np.ndarray, test: Cusum | Bets, state: State) -> None:
    """Move on, all subjects at a time."""
    for tick, row in enumerate(samples.astype(np.float64), start=int(state.ticks[0])):
        x = np.where(np.isfinite(row), row, np.nan)
        if isinstance(test, Cusum):
            shift = test.shift * np.sqrt((1 - test.rho) / (1 + test.rho))
            z = (x - test.mean - test.rho * (state.before - test.mean)) / (test.std * np.sqrt(1 - test.rho**2))
            new = np.maximum(state.value[:, 0] + shift * z - shift * shift / 2, 0)[:, None]
            evidence = new[:, 0] >= test.threshold_nats
        else:
            x = np.clip(x, 0, 1)
            gain = 1 + test.stakes * (x - test.mean - test.rho * (state.before - test.mean))[:, None]
            new = np.clip((state.value + 1) * gain, 0, CAPITAL_MAX)
            evidence = new.mean(axis=1) >= math.exp(test.threshold_nats)
        known = np.isfinite(x) & np.isfinite(state.before)
        np.copyto(state.value, new, where=known[:, None])
        state.alarm[known & evidence & (state.alarm < 0)] = tick
        state.before[:] = x


# -- what a threshold means -------------------------------------------------------------------------------------------


def whitened(shift: float, rho: float) -> float:
    """Return what a shift of autocorrelated samples is worth, in standard deviations of independent ones."""
    return shift * math.sqrt((1 - rho) / (1 + rho))


def cusum_arl(shift: float, threshold_nats: float) -> float:
    """Return the ticks between false alarms of independent samples, by Siegmund (1985)."""
    b = threshold_nats + OVERSHOOT * shift
    return 2 * (math.exp(b) - b - 1) / shift**2


def cusum_delay(shift: float, threshold_nats: float) -> float:
    """Return the mean delay in ticks of a shift as designed for, from evidence 0, the worst there is: Siegmund."""
    b = threshold_nats + OVERSHOOT * shift
    return 2 * (b - 1 + math.exp(-b)) / shift**2


def cusum_threshold(shift: float, ticks_between_alarms: float) -> float:
    """Return the threshold in nats at which false alarms are so far apart, at least 0: `cusum_arl` turned about."""
    low, high = 0.0, 2.0 + math.log1p(ticks_between_alarms) + math.log1p(shift**2)
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if cusum_arl(shift, middle) < ticks_between_alarms else (low, middle)
    return high


def cusum_ticks(shift: float, threshold_nats: float, true_shift: float) -> float:
    """Return the mean ticks to an alarm from evidence 0 where the samples' mean has moved by ``true_shift``.

    Page's integral equation of the mean at each height of evidence, at Gauss-Legendre nodes closer together than a
    step is wide. 0 gives the ticks between false alarms, ``shift`` the delay; anything else, what a weaker or stronger
    miner gets.
    """
    drift, wide = shift * (true_shift - shift / 2), shift
    count = min(max(int(6 * threshold_nats / wide), 40), 1_500)
    nodes, weights = np.polynomial.legendre.leggauss(count)
    nodes, weights = (nodes + 1) * threshold_nats / 2, weights * threshold_nats / 2
    heights = np.append(nodes, 0.0)
    step = (nodes[None, :] - heights[:, None] - drift) / wide
    reach = np.exp(-step * step / 2) / (wide * math.sqrt(2 * math.pi)) * weights
    to_zero = np.array([math.erfc((height + drift) / wide / math.sqrt(2)) / 2 for height in heights.tolist()])
    matrix = np.column_stack([reach, to_zero])
    ticks: float = float(np.linalg.solve(np.eye(count + 1) - matrix, np.ones(count + 1))[-1])
    return ticks


def bets_delay(scores: np.ndarray, mean: float, rho: float, stakes: np.ndarray, threshold_nats: float) -> float:
    """Return the ticks that bets need on scores like these, in that order: threshold over the best stake's growth."""
    new = scores[1:] - mean - rho * (scores[:-1] - mean)
    growth = np.log1p(stakes[:, None] * new).mean(axis=1).max()
    return float(threshold_nats / growth) if growth > 0 else math.inf


def ticks_between_alarms(alarms_per_gpu_year: float, ticks_per_s: float, tests_per_gpu: int = 1) -> float:
    """Return how far apart each test's false alarms must be, of so many tests that run beside each other on a GPU."""
    return ticks_per_s * 365.25 * 86_400 * tests_per_gpu / alarms_per_gpu_year
