"""Features of counters over windows of time, for many windows at once, and by the tick at several time scales.

A window is float32 of (ticks, channels): a row for each sampling moment, as a sensor yields it; at most CHANNELS_MAX
channels. NaN is a sample that is missing, and so is anything above VALUE_MAX in size, infinities included: no counter
is that large, and its square would leave float32. A pair is two neighbouring ticks of which neither is missing.

=================  ====================================================================================================
count              samples that are there
mean, std          of them; the standard deviation of exactly these, not an estimate (divided by n)
min, max           the smallest and the largest
slope              of the least-squares line, per tick; NaN with fewer than two samples
lag1               autocorrelation of neighbours, -1..1: mean product of a pair's deviations over the mean square
                   deviation; 0 where nothing deviates, NaN without pairs
below, above       share of the samples below `Levels.low`, and above `Levels.high`
roughness          mean absolute difference of a pair; NaN without pairs
flat_run           most ticks in a row whose neighbours differ by at most `Levels.flat`; 1 for a lone sample, 0 for none
=================  ====================================================================================================

Without any sample all but count and flat_run are NaN: absent, not 0. A constant signal has a deviation of exactly 0.

Everything but the plain form goes by summaries: centred moments, which two neighbouring stretches of time can merge
(Chan, Golub and LeVeque, 1983) without the samples being looked at again and without cancellation. A tick is put by;
eight ticks make a block of the first scale; eight blocks are its window, and also one block of the next scale:
64, 512 and 4,096 ticks, which at 10 Hz is 6.4 s, 51 s and 7 min. Nothing is ever subtracted, so nothing drifts.

The counter detector looks at 20 s at a time and wants four of these features: it takes them by itself
(`core.counter_features.summarised`; a test holds the two alike). The others, and windows by the tick, are for whoever
has thousands of raw series at once: fleets, recordings, studies of other features.

`reference` is written for the eye and decides what is right. The other forms sum in another order, and the compiled
ones in float32: they agree to TOLERANCE of the window's largest absolute value where a feature has the channel's unit,
and to TOLERANCE itself where it is a ratio; lag1 only as far as the deviation stands above that rounding, and slope to
sixteen times that, since of a few samples that lie close together late in a window the ticks' rounding counts as well.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import numpy as np

from gpuguard.kernels import chosen

FEATURES = ("count", "mean", "std", "min", "max", "slope", "lag1", "below", "above", "roughness", "flat_run")
CHANNELS_MAX = 16
VALUE_MAX = 1e15
TOLERANCE = 1e-5

#: Most ticks of one window: what one pass in float32 can take without losing the small beside the large.
TICKS_MAX = 64

#: Ticks of one block, and blocks of one window: each scale is so many times as long as the one before.
BLOCK = 8
#: Ticks of a window by scale.
SCALES = (64, 512, 4_096)


class Levels(NamedTuple):
    """What a channel's samples are held against: float32[channels] each, in the channel's own unit.

    Take them from the device's limits or the job's own baseline; mining has no absolute level.
    """

    low: np.ndarray
    high: np.ndarray
    flat: np.ndarray


def levels(channels: int, low: float = -math.inf, high: float = math.inf, flat: float = 0.0) -> Levels:
    """Return the same levels for each channel; without levels nothing is below or above, and flat is equal."""
    return Levels(*(np.full(channels, value, np.float32) for value in (low, high, flat)))


def features(windows: np.ndarray, held_against: Levels, backend: str = "auto",
             device: int | None = None) -> tuple[np.ndarray, str]:
    """Return float32[windows, FEATURES, channels] of float32[windows, ticks, channels], and the name of the form used.

    ``backend`` and ``device`` as `gpuguard.kernels` says; by default whole columns ("numpy"). Raises `ValueError` for
    other shapes, for more than CHANNELS_MAX channels, and for no or more than TICKS_MAX ticks.
    """
    _check(windows.shape, held_against)
    backend = chosen(backend, device, "numpy")
    if backend == "cuda":
        from gpuguard.kernels import windows_cuda

        made: np.ndarray = windows_cuda.features(windows, held_against, device)
        return made, backend
    windows = np.ascontiguousarray(windows, np.float32)
    if backend == "cpu":
        from gpuguard.kernels import windows_cpu

        return windows_cpu.features(windows, held_against), backend
    return {"reference": reference, "numpy": vectorised}[backend](windows, held_against), backend


def _check(shape: tuple[int, ...], held_against: Levels) -> None:
    if len(shape) != 3 or not (0 < shape[1] <= TICKS_MAX and 0 < shape[2] <= CHANNELS_MAX):
        raise ValueError(f"windows of shape {shape}: not (windows, 1..{TICKS_MAX} ticks, 1..{CHANNELS_MAX} channels)")
    if any(level.shape != shape[2:] for level in held_against):
        raise ValueError(f"levels of {[level.shape for level in held_against]} for {shape[2]} channels")


def reference(windows: np.ndarray, held_against: Levels) -> np.ndarray:
    """Return float32[windows, FEATURES, channels], the plain way."""
    count, _, channels = windows.shape
    out = np.zeros((count, len(FEATURES), channels), np.float32)
    for one, window in zip(out, windows, strict=True):
        for c in range(channels):
            low, high, flat = (float(level[c]) for level in held_against)
            one[:, c] = features_of_one(window[:, c].tolist(), low, high, flat)
    return out


def features_of_one(samples: list[float], low: float, high: float, flat: float) -> tuple[float, ...]:
    """Return FEATURES of one channel of one window."""
    there = [(t, x) for t, x in enumerate(samples) if abs(x) <= VALUE_MAX]
    if not there:
        return (0.0, *[math.nan] * (len(FEATURES) - 2), 0.0)
    n = len(there)
    values = [x for _, x in there]
    # About the first sample, so that a constant has a deviation of exactly 0.
    mean = values[0] + math.fsum(x - values[0] for x in values) / n
    square = math.fsum((x - mean) ** 2 for x in values)
    middle = math.fsum(t for t, _ in there) / n
    spread = math.fsum((t - middle) ** 2 for t, _ in there)
    slope = math.fsum((t - middle) * (x - mean) for t, x in there) / spread if spread else math.nan
    pairs = [(a, b) for a, b in itertools.pairwise(samples) if max(abs(a), abs(b)) <= VALUE_MAX]
    pairs = [(a, b) for a, b in pairs if a == a and b == b]  # noqa: PLR0124 -- NaN alone is not itself
    lag1 = roughness = math.nan
    if pairs:
        roughness = math.fsum(abs(b - a) for a, b in pairs) / len(pairs)
        together = math.fsum((a - mean) * (b - mean) for a, b in pairs) / len(pairs)
        lag1 = min(max(together / (square / n), -1.0), 1.0) if square else 0.0
    return (n, mean, math.sqrt(square / n), min(values), max(values), slope, lag1,
            sum(x < low for x in values) / n, sum(x > high for x in values) / n, roughness, flat_run(samples, flat))


def flat_run(samples: list[float], flat: float) -> int:
    """Return the most ticks in a row whose neighbours differ by at most ``flat``; a missing sample ends a run."""
    longest = run = 0
    before = math.nan
    for x in samples:
        if abs(x) <= VALUE_MAX:
            run = run + 1 if abs(x - before) <= flat else 1
            before = x
        else:
            run, before = 0, math.nan
        longest = max(longest, run)
    return longest


# -- summaries --------------------------------------------------------------------------------------------------------

#: A summary of a stretch of time: of the samples there (n, mean, sum of squared deviations, extremes, how many below
#: and above), of their ticks against the values, of pairs about the mean, of the flat runs at both ends and anywhere.
SUMMARY = ("ticks", "n", "mean", "m2", "min", "max", "tick_mean", "tick_m2", "tick_value", "pairs", "pair_sum",
           "pair_product", "below", "above", "rough", "first", "last", "run_first", "run_last", "run_max")
(TICKS, N, MEAN, M2, MIN, MAX, TICK_MEAN, TICK_M2, TICK_VALUE, PAIRS, PAIR_SUM, PAIR_PRODUCT, BELOW, ABOVE, ROUGH,
 FIRST, LAST, RUN_FIRST, RUN_LAST, RUN_MAX) = range(len(SUMMARY))


def nothing(*shape: int) -> np.ndarray:
    """Return summaries of no time at all: float64[SUMMARY, *shape]. Merged with one, a summary stays as it is."""
    out = np.zeros((len(SUMMARY), *shape))
    out[MIN], out[MAX] = np.inf, -np.inf
    out[FIRST] = out[LAST] = np.nan
    return out


def summarise(windows: np.ndarray, held_against: Levels) -> np.ndarray:
    """Return float64[SUMMARY, windows, channels] of float32[windows, ticks, channels], by whole columns."""
    ticks = windows.shape[1]
    out = nothing(windows.shape[0], windows.shape[2])
    there = np.abs(windows) <= VALUE_MAX
    x = np.where(there, windows, np.nan).astype(np.float64)
    n = there.sum(axis=1)
    out[TICKS], out[N] = ticks, n
    share = 1 / np.maximum(n, 1)
    begin = np.where(n > 0, np.take_along_axis(x, there.argmax(axis=1)[:, None], axis=1)[:, 0], 0.0)
    out[MEAN] = begin + np.where(there, x - begin[:, None], 0.0).sum(axis=1) * share
    c = np.where(there, x - out[MEAN][:, None], 0.0)
    out[M2] = (c * c).sum(axis=1)
    out[MIN], out[MAX] = np.where(there, x, np.inf).min(axis=1), np.where(there, x, -np.inf).max(axis=1)
    t = np.arange(ticks)[None, :, None] * there
    out[TICK_MEAN] = t.sum(axis=1) * share
    tc = np.where(there, t - out[TICK_MEAN][:, None], 0.0)
    out[TICK_M2], out[TICK_VALUE] = (tc * tc).sum(axis=1), (tc * c).sum(axis=1)
    pair = there[:, 1:] & there[:, :-1]
    step = np.where(pair, np.abs(x[:, 1:] - x[:, :-1]), np.nan)
    out[PAIRS], out[ROUGH] = pair.sum(axis=1), np.nansum(step, axis=1)
    out[PAIR_SUM] = ((c[:, 1:] + c[:, :-1]) * pair).sum(axis=1)
    out[PAIR_PRODUCT] = (c[:, 1:] * c[:, :-1] * pair).sum(axis=1)
    out[BELOW], out[ABOVE] = (x < held_against.low).sum(axis=1), (x > held_against.high).sum(axis=1)
    out[FIRST], out[LAST] = x[:, 0], x[:, -1]
    _runs(out, there, step <= held_against.flat)
    return out


def _runs(out: np.ndarray, there: np.ndarray, same: np.ndarray) -> None:
    """Fill in the flat runs: ``same`` says of each pair whether it is flat."""
    run = out[RUN_LAST]
    for t in range(there.shape[1]):
        run[:] = np.where(there[:, t], np.where(same[:, t - 1], run + 1, 1.0) if t else 1.0, 0.0)
        np.maximum(out[RUN_MAX], run, out=out[RUN_MAX])
        np.copyto(out[RUN_FIRST], run, where=run == t + 1)


def merge(a: np.ndarray, b: np.ndarray, flat: np.ndarray) -> np.ndarray:
    """Return the summaries of stretches of which ``b`` follows ``a`` at once: float64[SUMMARY, ..., channels]."""
    out: np.ndarray = a + b
    share = b[N] / np.maximum(out[N], 1)
    both = a[N] * share
    apart, ticks_apart = b[MEAN] - a[MEAN], b[TICK_MEAN] + a[TICKS] - a[TICK_MEAN]
    out[MEAN], out[TICK_MEAN] = a[MEAN] + apart * share, a[TICK_MEAN] + ticks_apart * share
    out[M2] += apart * apart * both
    out[TICK_M2] += ticks_apart * ticks_apart * both
    out[TICK_VALUE] += ticks_apart * apart * both
    for part in (a, b):
        moved = part[MEAN] - out[MEAN]
        out[PAIR_PRODUCT] += moved * (part[PAIR_SUM] + part[PAIRS] * moved)
        out[PAIR_SUM] += 2 * part[PAIRS] * moved
    out[MIN], out[MAX] = np.minimum(a[MIN], b[MIN]), np.maximum(a[MAX], b[MAX])
    _across(out, a, b, flat)
    return out


def _across(out: np.ndarray, a: np.ndarray, b: np.ndarray, flat: np.ndarray) -> None:
    """Add what neither part has: the pair, and the flat run, from the end of one to the beginning of the other."""
    step = np.abs(b[FIRST] - a[LAST])
    pair, same = step >= 0, step <= flat
    left, right = (np.where(pair, value - out[MEAN], 0.0) for value in (a[LAST], b[FIRST]))
    out[PAIRS] += pair
    out[PAIR_SUM] += left + right
    out[PAIR_PRODUCT] += left * right
    out[ROUGH] += np.where(pair, step, 0.0)
    no_a, no_b = a[TICKS] == 0, b[TICKS] == 0
    out[FIRST], out[LAST] = np.where(no_a, b[FIRST], a[FIRST]), np.where(no_b, a[LAST], b[LAST])
    out[RUN_MAX] = np.maximum(np.maximum(a[RUN_MAX], b[RUN_MAX]), np.where(same, a[RUN_LAST] + b[RUN_FIRST], 0.0))
    through_a, through_b = (same & (part[run] == part[TICKS]) for part, run in ((a, RUN_FIRST), (b, RUN_LAST)))
    out[RUN_FIRST] = np.where(no_a, b[RUN_FIRST], a[RUN_FIRST] + np.where(through_a, b[RUN_FIRST], 0.0))
    out[RUN_LAST] = np.where(no_b, a[RUN_LAST], b[RUN_LAST] + np.where(through_b, a[RUN_LAST], 0.0))


def finish(s: np.ndarray) -> np.ndarray:
    """Return float32[..., FEATURES, channels] of summaries."""
    n, pairs = np.where(s[N] > 0, s[N], np.nan), np.where(s[PAIRS] > 0, s[PAIRS], np.nan)
    square = s[M2] / n
    together = np.divide(s[PAIR_PRODUCT] / pairs, square, out=np.zeros_like(square), where=square > 0)
    slope = s[TICK_VALUE] / np.where(s[TICK_M2] > 0, s[TICK_M2], np.nan)
    lag1 = np.where(s[PAIRS] > 0, np.clip(together, -1, 1), np.nan)
    missing = np.where(s[N] > 0, 0.0, np.nan)
    columns = (s[N], s[MEAN] + missing, np.sqrt(square), s[MIN] + missing, s[MAX] + missing, slope, lag1,
               s[BELOW] / n, s[ABOVE] / n, s[ROUGH] / pairs, s[RUN_MAX])
    made: np.ndarray = np.stack(columns, axis=-2).astype(np.float32)
    return made


def vectorised(windows: np.ndarray, held_against: Levels) -> np.ndarray:
    """Return the features by whole columns."""
    return finish(summarise(windows, held_against))


# -- by the tick ------------------------------------------------------------------------------------------------------


class Scales:
    """Windows of many subjects (devices, processes) at every scale, kept by the tick without summing anything again.

    `features` is of the last eight whole blocks of each scale, fewer at the beginning: at the shortest it is that of
    the last 64 ticks whenever the ticks so far are a multiple of eight. All subjects tick together; what of a subject
    was not read is NaN.
    """

    def __init__(self, subjects: int, held_against: Levels, backend: str = "auto") -> None:
        """``backend`` is "auto", "numpy", "cpu" or "reference"; "auto" is "numpy" (`gpuguard.kernels`)."""
        self.ticks = 0
        self.backend = chosen(backend, None, "numpy")
        if self.backend == "cuda":
            raise ValueError("windows by the tick have no cuda form: a tick is too little to launch a kernel for")
        self._shape = (subjects, len(held_against.low))
        _check((subjects, 1, self._shape[1]), held_against)
        if self.backend == "cpu":
            from gpuguard.kernels import windows_cpu

            self._form: Any = windows_cpu.Rings(subjects, held_against)
        else:
            self._form = (History if self.backend == "reference" else Rings)(subjects, held_against)

    def run(self, samples: np.ndarray) -> None:
        """Add float32[ticks, subjects, channels], oldest first. Raises `ValueError` for another shape."""
        if samples.shape[1:] != self._shape:
            raise ValueError(f"samples of shape {samples.shape}, not (ticks, {self._shape[0]}, {self._shape[1]})")
        self._form.run(np.ascontiguousarray(samples, np.float32), self.ticks)
        self.ticks += len(samples)

    def features(self) -> np.ndarray:
        """Return float32[subjects, SCALES, FEATURES, channels]."""
        made: np.ndarray = self._form.features(self.ticks)
        return made


class History:
    """All samples of the longest scale, and the plain form over them: what the rings are held against."""

    def __init__(self, subjects: int, held_against: Levels) -> None:
        self.samples = np.zeros((0, subjects, len(held_against.low)), np.float32)
        self.held_against = held_against

    def run(self, samples: np.ndarray, _: int) -> None:
        """Add samples."""
        self.samples = np.concatenate([self.samples, samples])[-2 * SCALES[-1]:]

    def features(self, ticks: int) -> np.ndarray:
        """Return the features of each scale's last whole blocks."""
        made = []
        for length in SCALES:
            end = len(self.samples) - ticks % (length // BLOCK)
            window = self.samples[max(end - length, 0):end]
            made.append(reference(window.swapaxes(0, 1), self.held_against))
        return np.stack(made, axis=1)


class Rings:
    """The last eight blocks of each scale, as summaries of whole columns."""

    def __init__(self, subjects: int, held_against: Levels) -> None:
        channels = len(held_against.low)
        self.held_against = held_against
        self.open = np.zeros((subjects, BLOCK, channels), np.float32)
        self.blocks = [[nothing(subjects, channels)] * BLOCK for _ in SCALES]

    def run(self, samples: np.ndarray, ticks: int) -> None:
        """Add samples to the open block; close it at every eighth."""
        for now, sample in enumerate(samples, start=ticks + 1):
            self.open[:, (now - 1) % BLOCK] = sample
            if now % BLOCK == 0:
                self._close(now)

    def _close(self, now: int) -> None:
        summary = summarise(self.open, self.held_against)
        for blocks, length in zip(self.blocks, SCALES, strict=True):
            blocks[:] = [*blocks[1:], summary]
            if now % length:
                return
            summary = self._window(blocks)

    def _window(self, blocks: list[np.ndarray]) -> np.ndarray:
        """Return neighbours merged two by two."""
        parts = np.stack(blocks, axis=1)
        while parts.shape[1] > 1:
            parts = merge(parts[:, ::2], parts[:, 1::2], self.held_against.flat)
        whole: np.ndarray = parts[:, 0]
        return whole

    def features(self, _: int) -> np.ndarray:
        """Return the features of each scale's last blocks."""
        return np.stack([finish(self._window(blocks)) for blocks in self.blocks], axis=1)
