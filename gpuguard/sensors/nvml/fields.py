"""What is read of a device, by which call, in which unit, and how often.

Every reader is made for one device (``handle``) and raises NVMLError where its call fails. Names, units and limits are
those of nvml.h. What changes within a second is read at each tick, by as few calls as there are; what does not
(`SLOW`), once a second, and is held in between.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from gpuguard.sensors.nvml.calls import ID_ABSENT, NOT_SUPPORTED, SCOPE_ALL, Fields, Library

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

Values = dict[str, Any]
#: Puts what one call says into a dict of values; raises NVMLError.
Reader = Callable[[Values], None]

CLOCK_SM, CLOCK_MEMORY = 1, 2
MEMORY_V2 = 0x02000028
PCIE_TX, PCIE_RX = 0, 1

NVLINK_COUNT, MEMORY_TEMPERATURE = 91, 82
#: NVML_FI_DEV_* that are wanted at each tick, in one call of nvmlDeviceGetFieldValues: what it is, id, scope, and the
#: name of the value. Levels, mJ and mW: energy since the driver was loaded (Volta and later), power. Counters, told as
#: rates since the tick before: ns that the power cap held the clocks, PCIe bytes and NVLink KiB from the device (sent)
#: and to it.
LEVELS = (
    ("energy", 83, 0, "energy_j"),
    ("average power", 185, 0, "power_average_w"),
    ("instant power", 186, 0, "power_instant_w"),
)
RATES = (
    ("power cap counter", 74, 0, "power_capped_ratio"),
    ("PCIe bytes sent", 197, 0, "pcie_tx_bytes_per_s"),
    ("PCIe bytes received", 198, 0, "pcie_rx_bytes_per_s"),
    ("NVLink bytes sent", 138, SCOPE_ALL, "nvlink_tx_bytes_per_s"),
    ("NVLink bytes received", 139, SCOPE_ALL, "nvlink_rx_bytes_per_s"),
)
WANTED = (*LEVELS, *RATES)
PCIE = frozenset({197, 198})

#: More than this is no measurement: a counter that wrapped, or a driver that answers nonsense.
HIGHEST = {
    "power_w": 100e3, "power_average_w": 100e3, "power_instant_w": 100e3, "energy_j": 1e15,
    "temperature_c": 250.0, "memory_temperature_c": 250.0, "sm_clock_hz": 20e9, "memory_clock_hz": 50e9,
    "memory_used_bytes": 2**50, "throttle_reasons": 2**63 - 1,
    "pcie_tx_bytes_per_s": 1e13, "pcie_rx_bytes_per_s": 1e13,
    "nvlink_tx_bytes_per_s": 1e14, "nvlink_rx_bytes_per_s": 1e14,
    "gpu_ratio": 1.0, "memory_ratio": 1.0, "encoder_ratio": 1.0, "decoder_ratio": 1.0, "power_capped_ratio": 1.0,
}


def implausible(values: Mapping[str, Any]) -> list[str]:
    """Return the names of values that are no measurement."""
    return [name for name, value in values.items() if value is not None and not 0 <= value <= HIGHEST[name]]


# -- at each tick ----------------------------------------------------------------------------------------------------


def utilization(library: Library, handle: Any) -> Reader:
    """Time with at least one kernel, and with memory traffic, 0..1.

    Absent with MIG. One tiny kernel is 1.0. Source: nvmlDeviceGetUtilizationRates, %; nvidia-smi utilization.gpu.
    """
    call, rates = library.function("nvmlDeviceGetUtilizationRates"), (ctypes.c_uint * 2)()

    def read(values: Values) -> None:
        library.check(call(handle, rates))
        values["gpu_ratio"], values["memory_ratio"] = ratio(rates[0]), ratio(rates[1])

    return read


def power(library: Library, handle: Any) -> Reader:
    """Power of the board, W; a 1 s mean on Ampere and later except GA100.

    Absent in most vGPU guests. Source: nvmlDeviceGetPowerUsage, mW; nvidia-smi power.draw.
    """
    number = library.number(handle, ctypes.c_uint, names=("nvmlDeviceGetPowerUsage",))
    return lambda values: values.update(power_w=number() / 1000)


def sm_clock(library: Library, handle: Any) -> Reader:
    """Clock of the multiprocessors, Hz. Source: nvmlDeviceGetClockInfo, NVML_CLOCK_SM, MHz; nvidia-smi clocks.sm."""
    number = library.number(handle, ctypes.c_uint, CLOCK_SM, names=("nvmlDeviceGetClockInfo",))
    return lambda values: values.update(sm_clock_hz=number() * 1_000_000)


def throttle_reasons(library: Library, handle: Any) -> Reader:
    """Why the clocks are where they are, as a bit mask of nvmlClocksEventReason* (4 SW power cap, 8 HW slowdown, ...).

    Source: nvmlDeviceGetCurrentClocksEventReasons, before R535 nvmlDeviceGetCurrentClocksThrottleReasons.
    """
    names = ("nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons")
    number = library.number(handle, ctypes.c_ulonglong, names=names)
    return lambda values: values.update(throttle_reasons=number())


FAST = (utilization, power, sm_clock, throttle_reasons)


# -- once a second ---------------------------------------------------------------------------------------------------


def memory(library: Library, handle: Any) -> Reader:
    """Memory in use, bytes, without what the driver keeps for itself where the driver tells the two apart.

    Source: nvmlDeviceGetMemoryInfo_v2, else nvmlDeviceGetMemoryInfo, bytes; nvidia-smi memory.used.
    """
    info = memory_info(library, handle)
    return lambda values: values.update(memory_used_bytes=info()[1])


def memory_info(library: Library, handle: Any) -> Callable[[], tuple[int, int]]:
    """Return a call that reads (total, used) bytes."""
    version_2, version_1 = (ctypes.c_ulonglong * 5)(), (ctypes.c_ulonglong * 3)()
    call_1 = library.function("nvmlDeviceGetMemoryInfo")
    try:
        call_2 = library.function("nvmlDeviceGetMemoryInfo_v2")
    except library.nvml.NVMLError:
        call_2 = None  # a driver before R510

    def read() -> tuple[int, int]:
        version_2[0] = MEMORY_V2
        if call_2 is not None and not (code := call_2(handle, version_2)):
            return version_2[1], version_2[4]
        if call_2 is not None and code not in ID_ABSENT:
            library.check(code)
        library.check(call_1(handle, version_1))
        return version_1[0], version_1[2]

    return read


def temperature(library: Library, handle: Any) -> Reader:
    """Temperature of the GPU die, degrees Celsius.

    Source: nvmlDeviceGetTemperature, sensor NVML_TEMPERATURE_GPU; nvidia-smi temperature.gpu.
    """
    number = library.number(handle, ctypes.c_uint, 0, names=("nvmlDeviceGetTemperature",))
    return lambda values: values.update(temperature_c=float(number()))


def memory_temperature(library: Library, handle: Any) -> Reader:
    """Temperature of the memory, degrees Celsius; absent on most consumer boards. Source: NVML_FI_DEV_MEMORY_TEMP."""
    fields = Fields(library, handle, [(MEMORY_TEMPERATURE, 0)])

    def read(values: Values) -> None:
        _, _, code, value = fields.read()[0]
        library.check(NOT_SUPPORTED if code in ID_ABSENT else code)
        values["memory_temperature_c"] = math.nan if value is None else float(value)

    return read


def memory_clock(library: Library, handle: Any) -> Reader:
    """Clock of the memory, Hz. Source: nvmlDeviceGetClockInfo, NVML_CLOCK_MEM, MHz; nvidia-smi clocks.mem."""
    number = library.number(handle, ctypes.c_uint, CLOCK_MEMORY, names=("nvmlDeviceGetClockInfo",))
    return lambda values: values.update(memory_clock_hz=number() * 1_000_000)


def encoder(library: Library, handle: Any) -> Reader:
    """Use of the video encoders, 0..1. Source: nvmlDeviceGetEncoderUtilization, %."""
    number = _engine(library, handle, "nvmlDeviceGetEncoderUtilization")
    return lambda values: values.update(encoder_ratio=ratio(number()))


def decoder(library: Library, handle: Any) -> Reader:
    """Use of the video decoders, 0..1. Source: nvmlDeviceGetDecoderUtilization, %."""
    number = _engine(library, handle, "nvmlDeviceGetDecoderUtilization")
    return lambda values: values.update(decoder_ratio=ratio(number()))


def _engine(library: Library, handle: Any, name: str) -> Callable[[], int]:
    call, use, period = library.function(name), ctypes.c_uint(), ctypes.c_uint()

    def read() -> int:
        library.check(call(handle, ctypes.byref(use), ctypes.byref(period)))
        return use.value

    return read


SLOW = (memory, temperature, memory_temperature, memory_clock, encoder, decoder)
#: What can be told of a MIG instance; all else is the whole board's.
OF_INSTANCE = (memory,)


def ratio(percent: int) -> float | None:
    """Return a percentage as 0..1; None where the driver gives a number that is none (seen with MPS)."""
    return percent / 100 if 0 <= percent <= 100 else None


# -- field values ----------------------------------------------------------------------------------------------------

#: What one count of a counter is: ns of a second, bytes, KiB.
UNITS = {
    "power_capped_ratio": 1e-9, "pcie_tx_bytes_per_s": 1, "pcie_rx_bytes_per_s": 1,
    "nvlink_tx_bytes_per_s": 1024, "nvlink_rx_bytes_per_s": 1024,
}
#: A share of time may come out a little above 1: two clocks.
CAPPED_RATIO_MAX = 1.05


class FieldReader:
    """The field values of one device, and what the counters among them showed before."""

    def __init__(self, library: Library, handle: Any, kept: Sequence[tuple[str, int, int, str]]) -> None:
        self.kept = kept
        self._fields = Fields(library, handle, [(one, scope) for _, one, scope, _ in kept])
        self._plan = [(what, name, UNITS.get(name)) for what, _, _, name in kept]
        self._before: list[tuple[int, float]] = [(0, 0)] * len(kept)

    def read(self, values: Values) -> dict[str, int]:
        """Put what can be told into ``values``; return the nvmlReturn of what cannot. Raises NVMLError."""
        failed = {}
        answers = self._fields.read()
        for index, (what, name, unit) in enumerate(self._plan):
            time_us, _, code, value = answers[index]
            if code:
                failed[what] = code
            elif value is None:
                values[name] = math.nan
            elif unit is None:
                values[name] = value / 1000
            else:
                before_us, before = self._before[index]
                self._before[index] = time_us, value
                # A counter that went back has wrapped or was reset: the difference says nothing.
                if 0 < before_us < time_us and value >= before:
                    values[name] = as_rate((value - before) / (time_us - before_us), unit)
        return failed


def as_rate(per_us: float, unit: float) -> float | int:
    """Return what a counter's counts per microsecond are, in `UNITS` a second: whole bytes, or a share of time."""
    if unit >= 1:
        return int(per_us * 1_000_000 * unit)
    share = per_us / 1_000
    return 1.0 if 1 < share <= CAPPED_RATIO_MAX else share
