"""The CUDA form of windows.py: a thread a channel of a window, the text of windows_lanes.py, all state in registers.

Neighbouring threads are neighbouring channels, so a warp reads two whole rows at a time. To import this is to import
Numba; a kernel finds `cuda` among its module's globals, and the simulator replaces it there.
"""

from __future__ import annotations

from typing import Any

import numba.cuda
import numpy as np

from gpuguard.kernels import device as gpu
from gpuguard.kernels import windows_lanes as lanes
from gpuguard.kernels.windows import FEATURES, SUMMARY, Levels, N

cuda: Any = numba.cuda
FIELDS = len(SUMMARY)
COUNT = len(FEATURES)

_begin, _two_ticks, _close, _careful, _finish = (
    cuda.jit(device=True)(text)
    for text in (lanes.begin, lanes.two_ticks, lanes.close, lanes.careful, lanes.finish))


def features(windows: Any, held_against: Levels, device: int | None) -> Any:
    """Return float32[windows, FEATURES, channels] of float32[windows, ticks, channels], where the windows were."""
    with gpu.chosen_device(device):
        stream = gpu.stream_of(windows)
        count, _, channels = windows.shape
        out = gpu.room((count, COUNT, channels), np.float32, stream)
        if count:
            own = [gpu.put(level, np.float32, stream) for level in held_against]
            _features[gpu.blocks_of(count * channels), gpu.THREADS, stream](
                gpu.put(windows, np.float32, stream), *own, out.reshape(count * COUNT * channels))
        return gpu.give(out, windows, stream)


@cuda.jit
def _features(windows: Any, low: Any, high: Any, flat: Any, out: Any) -> None:
    s = cuda.local.array(FIELDS, np.float32)
    thread = cuda.grid(1)
    ticks, channels = windows.shape[1], windows.shape[2]
    i, c = thread // channels, thread % channels
    if i >= windows.shape[0]:
        return
    x = windows[i]
    least, most, same = low[c], high[c], flat[c]
    _begin(s, 0, 1, x[0, c])
    for t in range(0, ticks - 3, 4):
        u, v, w, y = x[t, c], x[t + 1, c], x[t + 2, c], x[t + 3, c]
        _two_ticks(s, 0, 1, u, v, np.float32(t), least, most, same)
        _two_ticks(s, 0, 1, w, y, np.float32(t + 2), least, most, same)
    if ticks % 4 == 0 and s[N] == np.float32(ticks):
        _close(s, 0, 1, ticks)
    else:
        _careful(x, c, ticks, s, 0, 1, least, most, same)
    _finish(s, 0, 1, out, i * COUNT * channels + c, channels)
