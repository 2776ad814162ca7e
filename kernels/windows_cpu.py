"""The Numba CPU form of windows.py: loops over channels that the compiler turns into vector operations.

To import this is to import Numba; the first call of each loop compiles it, which takes seconds. Each scratch array has
room for sixteen channels side by side, at distances that the compiler knows: otherwise it must suspect that fields
overlap, and gives vectors up.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numba.extending import intrinsic

from gpuguard.kernels import windows_lanes as lanes
from gpuguard.kernels.windows import BLOCK, CHANNELS_MAX, FEATURES, SCALES, SUMMARY, Levels, N, nothing

WIDE = CHANNELS_MAX
SIZE = len(SUMMARY) * WIDE
COUNT = len(FEATURES)
SCALE_COUNT = len(SCALES)

_inline = numba.njit(error_model="numpy", inline="always")
_loop = numba.njit(error_model="numpy", nogil=True, cache=False)
_begin, _two_ticks, _close = _inline(lanes.begin), _inline(lanes.two_ticks), _inline(lanes.close)
_careful: Any = numba.njit(error_model="numpy")(lanes.careful)
_merge, _finish = _inline(lanes.merge), _inline(lanes.finish)


def _whole_registers(_: Any) -> Any:
    """Let the function that calls this use whole vector registers.

    LLVM takes half of AVX-512's for fear of lower clocks, which costs these loops a third. A processor without them
    is not asked for more than it has. llvmlite knows no attributes with a value, so its set is added to as a set.
    """
    def generate(context: Any, builder: Any, _signature: Any, _arguments: Any) -> Any:
        set.add(builder.function.attributes, '"prefer-vector-width"="512"')
        return context.get_dummy_value()

    return numba.types.void(), generate


_wide: Any = intrinsic(_whole_registers)


def features(windows: np.ndarray, held_against: Levels) -> np.ndarray:
    """Return float32[windows, FEATURES, channels] of float32[windows, ticks, channels] of at most TICKS_MAX ticks."""
    out = np.empty((len(windows), COUNT, windows.shape[2]), np.float32)
    _features(np.ascontiguousarray(windows), *held_against, out)
    return out


@_loop
def _features(windows: Any, low: Any, high: Any, flat: Any, out: Any) -> None:
    _wide()
    s, made = np.empty(SIZE, np.float32), np.empty(COUNT * WIDE, np.float32)
    channels = windows.shape[2]
    for i in range(len(windows)):
        _summarise(windows[i], low, high, flat, s)
        for c in range(channels):
            _finish(s, c, WIDE, made, c, WIDE)
        for k in range(COUNT):
            for c in range(channels):
                out[i, k, c] = made[k * WIDE + c]


@numba.njit(error_model="numpy")
def _summarise(x: Any, low: Any, high: Any, flat: Any, s: Any) -> None:
    """Summarise each channel of one window."""
    _wide()
    ticks, channels = x.shape
    for c in range(channels):
        _begin(s, c, WIDE, x[0, c])
    for t in range(0, ticks - 3, 4):
        when, then = np.float32(t), np.float32(t + 2)
        for c in range(channels):
            # Read before anything is written: so what the first call writes need never leave the registers.
            u, v, w, y, least, most, same = x[t, c], x[t + 1, c], x[t + 2, c], x[t + 3, c], low[c], high[c], flat[c]
            _two_ticks(s, c, WIDE, u, v, when, least, most, same)
            _two_ticks(s, c, WIDE, w, y, then, least, most, same)
    missing = ticks % 4 * channels
    for c in range(channels):
        missing += ticks != s[N * WIDE + c]
        _close(s, c, WIDE, ticks)
    if missing:
        for c in range(channels):
            if ticks % 4 or s[N * WIDE + c] != ticks:
                _careful(x, c, ticks, s, c, WIDE, low[c], high[c], flat[c])


class Rings:
    """The last eight blocks of each scale: see `gpuguard.kernels.windows.Scales`."""

    def __init__(self, subjects: int, held_against: Levels) -> None:
        self.levels = held_against
        self.open = np.zeros((subjects, BLOCK, len(held_against.low)), np.float32)
        self.blocks = np.empty((subjects, SCALE_COUNT, BLOCK, SIZE), np.float32)
        self.blocks[:] = np.repeat(nothing().astype(np.float32), WIDE)

    def run(self, samples: np.ndarray, ticks: int) -> None:
        """Add float32[ticks, subjects, channels] behind so many ticks."""
        _run(samples, ticks, self.open, self.blocks, *self.levels)

    def features(self, ticks: int) -> np.ndarray:
        """Return float32[subjects, SCALES, FEATURES, channels] of each scale's last blocks."""
        out = np.empty((len(self.blocks), SCALE_COUNT, COUNT, self.open.shape[2]), np.float32)
        _features_of_rings(ticks, self.blocks, self.levels.flat, out)
        return out


@_loop
def _run(samples: Any, ticks: Any, opened: Any, blocks: Any, low: Any, high: Any, flat: Any) -> None:
    _wide()
    s = np.empty(2 * SIZE + WIDE, np.float32)
    for i in range(len(samples)):
        now = ticks + i + 1
        for subject in range(len(opened)):
            for c in range(opened.shape[2]):
                opened[subject, (now - 1) % BLOCK, c] = samples[i, subject, c]
            if now % BLOCK == 0:
                _summarise(opened[subject], low, high, flat, s)
                length = BLOCK
                for scale in range(SCALE_COUNT):
                    blocks[subject, scale, (now // length - 1) % BLOCK] = s[:SIZE]
                    length *= BLOCK
                    if now % length or scale + 1 == SCALE_COUNT:
                        break
                    _window(blocks[subject, scale], 0, flat, s)


@numba.njit(error_model="numpy")
def _window(blocks: Any, oldest: Any, flat: Any, s: Any) -> None:
    """Merge eight blocks, of which one is the oldest, into the beginning of ``s``."""
    s[:SIZE], s[2 * SIZE:2 * SIZE + len(flat)] = blocks[oldest], flat
    for later in range(1, BLOCK):
        s[SIZE:2 * SIZE] = blocks[(oldest + later) % BLOCK]
        for c in range(len(flat)):
            _merge(s, c, SIZE + c, WIDE, s[2 * SIZE + c])


@_loop
def _features_of_rings(ticks: Any, blocks: Any, flat: Any, out: Any) -> None:
    s, made = np.empty(2 * SIZE + WIDE, np.float32), np.empty(COUNT * WIDE, np.float32)
    for subject in range(len(blocks)):
        length = BLOCK
        for scale in range(SCALE_COUNT):
            _window(blocks[subject, scale], ticks // length % BLOCK, flat, s)
            length *= BLOCK
            for c in range(len(flat)):
                _finish(s, c, WIDE, made, c, WIDE)
            for k in range(COUNT):
                for c in range(len(flat)):
                    out[subject, scale, k, c] = made[k * WIDE + c]
