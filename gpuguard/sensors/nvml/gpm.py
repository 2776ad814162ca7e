"""GPU performance metrics: what the SMs did between two samples, on Hopper and later, for a device or a MIG instance.

nvml.h: allocate samples, take two "greater than 100ms" apart, ask for the metrics of the pair, free what was allocated.
Unlike the profiling counters of older boards GPM does not own the performance monitors, so it disturbs no profiler.
Which ids a driver knows cannot be told but by asking: at the first pair all are asked for, and what is refused is
left out from then on and named. Percentages become ratios, MiB become bytes; a number that cannot be is None.
"""

from __future__ import annotations

import ctypes
import functools
import math
from typing import TYPE_CHECKING, Any

from gpuguard.core.records import Gpm
from gpuguard.sensors.nvml.calls import (
    ID_ABSENT,
    INVALID_ARGUMENT,
    METRIC,
    METRICS_HEAD,
    METRICS_VERSION,
    SUCCESS,
    Library,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

PERIOD_MIN_NS = 100_000_000
#: Samples further apart are not of one moment: the guard slept, or the host did.
PERIOD_MAX_NS = 30_000_000_000
SECOND_NS = 1_000_000_000
#: About once a second: a tick that comes a little early is not to wait for the next.
CYCLES_PERIOD_NS = 900_000_000
MIB = 1 << 20

#: nvmlGpmMetricId_t of every field of `Gpm`. What is the mean of a window is asked for at each tick.
RATIOS = {
    1: "graphics_ratio", 2: "sm_ratio", 3: "occupancy_ratio", 4: "integer_ratio", 5: "tensor_ratio",
    6: "tensor_dfma_ratio", 7: "tensor_hmma_ratio", 8: "tensor_dmma_ratio", 9: "tensor_imma_ratio", 10: "dram_ratio",
    11: "fp64_ratio", 12: "fp32_ratio", 13: "fp16_ratio", 174: "context_switch_ratio",
}
RATES = {
    20: "pcie_tx_bytes_per_s", 21: "pcie_rx_bytes_per_s", 60: "nvlink_rx_bytes_per_s", 61: "nvlink_tx_bytes_per_s",
}
#: Context switch requests of graphics engine 0 between the two samples.
REQUESTS = {172: "context_switches_per_s"}
#: Counted since the machine started: once a second is enough, nothing between is missed.
CYCLES = {
    248: "sm_elapsed_cycles", 249: "sm_active_cycles", 250: "tensor_active_cycles", 251: "tensor_dmma_active_cycles",
    252: "tensor_hmma_active_cycles", 253: "tensor_imma_active_cycles", 254: "tensor_dfma_active_cycles",
    257: "integer_active_cycles", 258: "fp64_active_cycles", 259: "fp32_active_cycles", 260: "fp16_active_cycles",
}
MEANS = {**RATIOS, **RATES, **REQUESTS}
NAMES = {**MEANS, **CYCLES}
#: More than this is no measurement. A percentage may come out a little above 100: two clocks.
HIGHEST = {
    **dict.fromkeys(RATIOS, 105.0), **dict.fromkeys(RATES, 1e8), **dict.fromkeys(REQUESTS, 1e9),
    **dict.fromkeys(CYCLES, 2.0**62),
}


def gpm(metrics: Sequence[tuple[int, int, float]], period_ns: int) -> Gpm:
    """Return the record of (metric id, nvmlReturn, value) of a window; what is no measurement is left out."""
    values: dict[str, Any] = {}
    for one, code, value in metrics:
        # NaN is neither above nor below anything.
        if code or one not in NAMES or not 0 <= value <= HIGHEST[one]:
            continue
        if one in RATIOS:
            values[RATIOS[one]] = value / 100 if value < 100 else 1.0
        elif one in REQUESTS:
            values[REQUESTS[one]] = value * SECOND_NS / period_ns
        else:
            values[NAMES[one]] = int(value * MIB) if one in RATES else int(value)
    return Gpm(period_ns, **values)


class Window:
    """Two samples of one device or GPU instance, taken in turn."""

    def __init__(self, library: Library, handle: Any, gpu_instance_id: int | None) -> None:
        self._library = library
        self._ids = self._means = tuple(NAMES)
        self._probed = False
        self._all_ns = 0
        #: Names of what the driver refused at the first pair, until they are taken.
        self.refused: list[str] = []
        self._taken_ns = 0
        self._last: Gpm | None = None
        self._metrics_get = library.function("nvmlGpmMetricsGet")
        self._free = library.function("nvmlGpmSampleFree")
        if gpu_instance_id is None:
            self._sample_get: Callable[..., int] = library.function("nvmlGpmSampleGet")
            self._whose: tuple[Any, ...] = (handle,)
        else:
            self._sample_get = library.function("nvmlGpmMigSampleGet")
            self._whose = (handle, ctypes.c_uint(gpu_instance_id))
        self._samples: list[ctypes.c_void_p] = []
        try:
            for _ in range(2):
                sample = ctypes.c_void_p()
                library.check(library.function("nvmlGpmSampleAlloc")(ctypes.byref(sample)))
                self._samples.append(sample)
        except library.nvml.NVMLError:
            self.close()
            raise

    def read(self, now_ns: int) -> Gpm | None:
        """Return what the device did since the last sample; None before there are two. Raises NVMLError.

        Asked again within 100 ms of a sample, it returns None: the window is not over. Instances that share a GPU
        instance ask at the same ``now_ns``, and get the same.
        """
        period_ns = now_ns - self._taken_ns
        if period_ns == 0:
            return self._last
        self._last = None
        if 0 < period_ns < PERIOD_MIN_NS:
            return None
        before, after = self._samples
        self._library.check(self._sample_get(*self._whose, after))
        self._samples = [after, before]
        self._taken_ns, had = now_ns, self._taken_ns
        if had and PERIOD_MIN_NS <= period_ns <= PERIOD_MAX_NS:
            self._last = gpm(self._metrics(before, after, now_ns), period_ns)
        return self._last

    def _metrics(self, before: ctypes.c_void_p, after: ctypes.c_void_p, now_ns: int) -> list[tuple[int, int, float]]:
        if not self._probed:
            self._probe(before, after)
        everything = now_ns - self._all_ns >= CYCLES_PERIOD_NS
        code, found = self._ask(self._ids if everything else self._means, before, after)
        self._library.check(code)
        self._all_ns = now_ns if everything else self._all_ns
        return found

    def _probe(self, before: ctypes.c_void_p, after: ctypes.c_void_p) -> None:
        """Leave out the ids that this driver does not know: it may refuse one of them, or all for the sake of one."""
        code, found = self._ask(self._ids, before, after)
        codes = {one: code for one, code, _ in found}
        if code == INVALID_ARGUMENT:
            for one in self._ids:
                code, found = self._ask((one,), before, after)
                codes[one] = code or found[0][1]
        else:
            self._library.check(code)
        self._ids = tuple(one for one in self._ids if codes[one] not in ID_ABSENT)
        self._means = tuple(one for one in self._ids if one in MEANS)
        self.refused = [NAMES[one] for one in codes if codes[one] in ID_ABSENT]
        self._probed = True

    def _ask(
        self, ids: tuple[int, ...], before: ctypes.c_void_p, after: ctypes.c_void_p,
    ) -> tuple[int, list[tuple[int, int, float]]]:
        """Return what nvmlGpmMetricsGet answers, and (id, nvmlReturn, value) of each metric."""
        if not ids:
            return SUCCESS, []
        head = METRICS_HEAD.pack(METRICS_VERSION, len(ids), before.value or 0, after.value or 0)
        asked = head + _blank(ids)
        buffer = self._library.metrics_buffer
        ctypes.memmove(buffer, asked, len(asked))
        code = self._metrics_get(buffer)
        return code, list(METRIC.iter_unpack(ctypes.string_at(buffer, len(asked))[len(head) :]))

    def close(self) -> None:
        """Free the samples."""
        for sample in self._samples:
            self._free(sample)
        self._samples = []


@functools.lru_cache(maxsize=256)
def _blank(ids: tuple[int, ...]) -> bytes:
    """Return the metrics to ask for, as they are before they are answered."""
    return b"".join(METRIC.pack(one, INVALID_ARGUMENT, math.nan) for one in ids)
