"""GPU performance metrics: what the SMs did between two samples, on Hopper and later, for a device or a MIG instance.

nvml.h: allocate samples, take two "greater than 100ms" apart, ask for the metrics of the pair, free what was allocated.
Unlike the profiling counters of older boards GPM does not own the performance monitors, so it disturbs no profiler.
Which ids a driver knows cannot be told but by asking: at the first pair all are asked for, and what is refused is
left out from then on and named. Percentages become ratios, MiB become bytes; a number that cannot be is None.
"""

from __future__ import annotations

import ctypes
import math
from typing import TYPE_CHECKING, Any

from gpuguard._nvml import Metrics
from gpuguard.core.records import Gpm
from gpuguard.sensors.nvml.calls import (
    DEVICE_GONE,
    DRIVER_GONE,
    ID_ABSENT,
    INVALID_ARGUMENT,
    METRIC,
    METRICS_BYTES,
    METRICS_HEAD,
    METRICS_VERSION,
    NO_PERMISSION,
    SUCCESS,
    Asked,
    Library,
    address,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

PERIOD_MIN_NS = 100_000_000
#: Ticks that are apart by so much are never cut short of that by how long the calls before took.
TICK_MIN_NS = 101_000_000
#: Samples further apart are not of one moment: the guard slept, or the host did.
PERIOD_MAX_NS = 30_000_000_000
#: What a driver answers that is not there, whatever it was asked.
GONE = DEVICE_GONE | DRIVER_GONE

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
#: Counted since the machine started: in a full round is enough, nothing between is missed.
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

_METRICS = Metrics(
    [{one: (Gpm.__struct_fields__.index(name), HIGHEST[one]) for one, name in table.items()}
     for table in (RATIOS, RATES, REQUESTS, CYCLES)], len(Gpm.__struct_fields__))


def read(answer: bytes, period_ns: int) -> Gpm:
    """Return what an nvmlGpmMetricsGet_t tells of a window; what is no measurement is left out."""
    return Gpm(*_METRICS.read(answer, period_ns))


class Window:
    """Two samples of one device or GPU instance, taken in turn."""

    def __init__(self, library: Library, handle: Any, gpu_instance_id: int | None) -> None:
        self._library = library
        self._ids, self._means = tuple(NAMES), tuple(MEANS)
        self._probed = False
        #: Names of what the driver refused at the first pair, until they are taken.
        self.refused: list[str] = []
        self._taken_ns = 0
        self._metrics_get = library.function("nvmlGpmMetricsGet")
        self._free = library.function("nvmlGpmSampleFree")
        self._sample_get: Callable[..., int] = library.function("nvmlGpmSampleGet")
        self._whose: tuple[int, ...] = (address(handle),)
        if gpu_instance_id is not None:
            self._sample_get = library.function("nvmlGpmMigSampleGet")
            self._whose = (address(handle), gpu_instance_id)
        #: The one that was taken last, and the one that comes next.
        self._samples: list[int] = []
        try:
            for _ in range(2):
                sample = ctypes.c_void_p()
                library.check(library.function("nvmlGpmSampleAlloc")(ctypes.byref(sample)))
                self._samples.append(sample.value or 0)
            # Whether there is a right to take one shows here; and metrics are never asked of what was not taken.
            library.check(self._sample_get(*map(ctypes.c_uint64, (*self._whose, self._samples[0]))))
        except library.nvml.NVMLError:
            self.close()
            raise

    def asked(self, turn: int, *, full: bool) -> tuple[Asked, Asked]:
        """Return the calls of a round: take the next sample, ask what lies between it and the last."""
        before, after = self._samples if turn == 0 else reversed(self._samples)
        metrics = _request(self._ids if full else self._means, before, after)
        return (Asked(self._sample_get, (*self._whose, after)),
                Asked(self._metrics_get, (0,), metrics, place=0, needs_last=True))

    def take(self, codes: Sequence[int], raw: bytes, now_ns: int, *, full: bool) -> Gpm | None:
        """Return what the device did since the last sample, from what the calls of a round returned and answered.

        None before there are two samples, and where they are not 100 ms to 30 s apart. Raises NVMLError.
        """
        self._samples.reverse()
        sampled, code = codes
        before_ns, self._taken_ns = self._taken_ns, 0 if sampled else now_ns
        self._library.check(sampled)
        period_ns = now_ns - before_ns
        if not before_ns or not PERIOD_MIN_NS <= period_ns <= PERIOD_MAX_NS:
            return None
        if not self._probed and (not full or not self._probe(code, raw)):
            return None
        self._library.check(code)
        return read(raw, period_ns)

    def _probe(self, code: int, raw: bytes) -> bool:
        """Leave out the ids that this driver does not know: it may refuse one of them, or all for the sake of one.

        Return whether the answer can be used. Raises NVMLError where it says nothing of ids.
        """
        if not code:
            codes = {one: code for one, code, _ in METRIC.iter_unpack(raw[METRICS_HEAD.size :])}
        else:
            of_no_id = code in GONE or code == NO_PERMISSION
            codes = {} if of_no_id else {one: self._ask_one(one) for one in self._ids}
            if all(one in ID_ABSENT for one in codes.values()):
                self._library.check(code)
        if not any(one == SUCCESS or one in ID_ABSENT for one in codes.values()):
            return False  # it has nothing to tell yet, and that says nothing of ids
        self._ids = tuple(one for one in self._ids if codes[one] not in ID_ABSENT)
        self._means = tuple(one for one in self._ids if one in MEANS)
        self.refused = [NAMES[one] for one in codes if codes[one] in ID_ABSENT]
        self._probed = True
        return code == SUCCESS

    def _ask_one(self, one: int) -> int:
        """Return what the driver says of one id, of the two samples that were taken last; no call is no such id."""
        after, before = self._samples
        buffer = ctypes.create_string_buffer(_request((one,), before, after), METRICS_BYTES)
        code = self._metrics_get(buffer)
        if code:
            return INVALID_ARGUMENT
        said: int = METRIC.unpack_from(buffer.raw, METRICS_HEAD.size)[1]
        return said

    def close(self) -> None:
        """Free the samples."""
        for sample in self._samples:
            self._free(ctypes.c_void_p(sample))
        self._samples = []


def _request(ids: tuple[int, ...], before: int, after: int) -> bytes:
    """Return the nvmlGpmMetricsGet_t that asks for metrics between two samples."""
    return METRICS_HEAD.pack(METRICS_VERSION, len(ids), before, after) + _blank(ids)


def _blank(ids: tuple[int, ...]) -> bytes:
    """Return the metrics to ask for, as they are before they are answered."""
    return b"".join(METRIC.pack(one, INVALID_ARGUMENT, math.nan) for one in ids)
