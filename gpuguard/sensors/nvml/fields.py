"""What is read of a device, by which call, in which unit, and how often.

Every reader is made for one device (``handle``) and raises NVMLError where its call fails. Names, units and limits are
those of nvml.h. What changes within a second is read at each tick, by as few calls as there are; what does not
(`SLOW`), once a second, and is held in between.
"""

from __future__ import annotations

import ctypes
import math
from typing import TYPE_CHECKING, Any

from gpuguard.sensors.nvml.calls import ID_ABSENT, NOT_SUPPORTED, SCOPE_ALL, Fields, Library

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from gpuguard.sensors.nvml.calls import FieldValue

Values = dict[str, Any]

CLOCK_SM, CLOCK_MEMORY = 1, 2
MEMORY_V2 = 0x02000028
PCIE_TX, PCIE_RX = 0, 1

#: NVML_FI_DEV_*: what is wanted of nvmlDeviceGetFieldValues at each tick, by name; id and scope.
ENERGY, POWER_AVERAGE, POWER_INSTANT, POWER_CAPPED = 83, 185, 186, 74
PCIE_TX_BYTES, PCIE_RX_BYTES, NVLINK_TX_KIB, NVLINK_RX_KIB = 197, 198, 138, 139
NVLINK_COUNT, MEMORY_TEMPERATURE = 91, 82
WANTED = {
    "energy": (ENERGY, 0),
    "average power": (POWER_AVERAGE, 0),
    "instant power": (POWER_INSTANT, 0),
    "power cap counter": (POWER_CAPPED, 0),
    "PCIe bytes sent": (PCIE_TX_BYTES, 0),
    "PCIe bytes received": (PCIE_RX_BYTES, 0),
    "NVLink bytes sent": (NVLINK_TX_KIB, SCOPE_ALL),
    "NVLink bytes received": (NVLINK_RX_KIB, SCOPE_ALL),
}

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
    return [name for name, value in values.items()
            if value is not None and not (math.isfinite(value) and 0 <= value <= HIGHEST[name])]


# -- at each tick ----------------------------------------------------------------------------------------------------


def utilization(library: Library, handle: Any) -> Callable[[], Values]:
    """Time with at least one kernel, and with memory traffic, 0..1.

    Absent with MIG. One tiny kernel is 1.0. Source: nvmlDeviceGetUtilizationRates, %; nvidia-smi utilization.gpu.
    """
    call, rates = library.function("nvmlDeviceGetUtilizationRates"), (ctypes.c_uint * 2)()

    def read() -> Values:
        library.check(call(handle, rates))
        return {"gpu_ratio": ratio(rates[0]), "memory_ratio": ratio(rates[1])}

    return read


def power(library: Library, handle: Any) -> Callable[[], Values]:
    """Power of the board, W; a 1 s mean on Ampere and later except GA100.

    Absent in most vGPU guests. Source: nvmlDeviceGetPowerUsage, mW; nvidia-smi power.draw.
    """
    number = library.number(handle, ctypes.c_uint, names=("nvmlDeviceGetPowerUsage",))
    return lambda: {"power_w": number() / 1000}


def sm_clock(library: Library, handle: Any) -> Callable[[], Values]:
    """Clock of the multiprocessors, Hz. Source: nvmlDeviceGetClockInfo, NVML_CLOCK_SM, MHz; nvidia-smi clocks.sm."""
    number = library.number(handle, ctypes.c_uint, CLOCK_SM, names=("nvmlDeviceGetClockInfo",))
    return lambda: {"sm_clock_hz": number() * 1_000_000}


def throttle_reasons(library: Library, handle: Any) -> Callable[[], Values]:
    """Why the clocks are where they are, as a bit mask of nvmlClocksEventReason* (4 SW power cap, 8 HW slowdown, ...).

    Source: nvmlDeviceGetCurrentClocksEventReasons, before R535 nvmlDeviceGetCurrentClocksThrottleReasons.
    """
    names = ("nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons")
    number = library.number(handle, ctypes.c_ulonglong, names=names)
    return lambda: {"throttle_reasons": number()}


FAST = (utilization, power, sm_clock, throttle_reasons)


# -- once a second ---------------------------------------------------------------------------------------------------


def memory(library: Library, handle: Any) -> Callable[[], Values]:
    """Memory in use, bytes, without what the driver keeps for itself where the driver tells the two apart.

    Source: nvmlDeviceGetMemoryInfo_v2, else nvmlDeviceGetMemoryInfo, bytes; nvidia-smi memory.used.
    """
    info = memory_info(library, handle)
    return lambda: {"memory_used_bytes": info()[1]}


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


def temperature(library: Library, handle: Any) -> Callable[[], Values]:
    """Temperature of the GPU die, degrees Celsius.

    Source: nvmlDeviceGetTemperature, sensor NVML_TEMPERATURE_GPU; nvidia-smi temperature.gpu.
    """
    number = library.number(handle, ctypes.c_uint, 0, names=("nvmlDeviceGetTemperature",))
    return lambda: {"temperature_c": float(number())}


def memory_temperature(library: Library, handle: Any) -> Callable[[], Values]:
    """Temperature of the memory, degrees Celsius; absent on most consumer boards. Source: NVML_FI_DEV_MEMORY_TEMP."""
    fields = Fields(library, handle, [(MEMORY_TEMPERATURE, 0)])

    def read() -> Values:
        field = fields.read()[0]
        library.check(NOT_SUPPORTED if field.code in ID_ABSENT or field.value is None else field.code)
        return {"memory_temperature_c": float(field.value or 0)}

    return read


def memory_clock(library: Library, handle: Any) -> Callable[[], Values]:
    """Clock of the memory, Hz. Source: nvmlDeviceGetClockInfo, NVML_CLOCK_MEM, MHz; nvidia-smi clocks.mem."""
    number = library.number(handle, ctypes.c_uint, CLOCK_MEMORY, names=("nvmlDeviceGetClockInfo",))
    return lambda: {"memory_clock_hz": number() * 1_000_000}


def encoder(library: Library, handle: Any) -> Callable[[], Values]:
    """Use of the video encoders, 0..1. Source: nvmlDeviceGetEncoderUtilization, %."""
    number = _engine(library, handle, "nvmlDeviceGetEncoderUtilization")
    return lambda: {"encoder_ratio": ratio(number())}


def decoder(library: Library, handle: Any) -> Callable[[], Values]:
    """Use of the video decoders, 0..1. Source: nvmlDeviceGetDecoderUtilization, %."""
    number = _engine(library, handle, "nvmlDeviceGetDecoderUtilization")
    return lambda: {"decoder_ratio": ratio(number())}


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


# -- counters, whose difference is a rate ----------------------------------------------------------------------------

#: Field id, name of the rate, what one count is.
RATES = (
    (PCIE_TX_BYTES, "pcie_tx_bytes_per_s", 1), (PCIE_RX_BYTES, "pcie_rx_bytes_per_s", 1),
    (NVLINK_TX_KIB, "nvlink_tx_bytes_per_s", 1024), (NVLINK_RX_KIB, "nvlink_rx_bytes_per_s", 1024),
)
#: A share of time may come out a little above 1: two clocks.
CAPPED_RATIO_MAX = 1.05


class Counters:
    """The fields of one device, and what the counters among them showed before."""

    def __init__(self) -> None:
        self._before: dict[int, tuple[int, int]] = {}

    def values(self, fields: Iterable[FieldValue]) -> Values:
        """Return what one answer says: levels as they are, counters as rates since the answer before.

        Energy in J since the driver was loaded (mJ; Volta and later), power in W (mW), PCIe and NVLink bytes/s from
        the device (tx) and to it (rx), the share of time that the power cap held the clocks (ns).
        """
        found: Values = {}
        for one in fields:
            if one.code or one.value is None:
                continue
            if one.id == ENERGY:
                found["energy_j"] = one.value / 1000
            elif one.id == POWER_AVERAGE:
                found["power_average_w"] = one.value / 1000
            elif one.id == POWER_INSTANT:
                found["power_instant_w"] = one.value / 1000
            elif (per_us := self._per_us(one.id, one.time_us, int(one.value))) is not None:
                found.update(_rate(one.id, per_us))
        return found

    def _per_us(self, one: int, time_us: int, value: int) -> float | None:
        before_us, before = self._before.get(one, (time_us, value))
        self._before[one] = time_us, value
        # A counter that went back has wrapped or was reset: the difference says nothing.
        return (value - before) / (time_us - before_us) if time_us > before_us and value >= before else None


def _rate(one: int, per_us: float) -> Values:
    if one == POWER_CAPPED:
        share = per_us / 1000
        return {"power_capped_ratio": min(1.0, share) if share <= CAPPED_RATIO_MAX else share}
    return next({name: int(per_us * 1e6 * unit)} for counter, name, unit in RATES if counter == one)
