"""What is read of a device, by which call, in which unit, and how often.

Names, units and limits are those of nvml.h. What changes within a second is read at each tick, by as few calls as there
are; what does not (`SLOW`), once a second, and is held in between. `rounds` makes the calls; what is here says which,
and what their answers mean.
"""

from __future__ import annotations

import ctypes
import struct
from typing import TYPE_CHECKING, Any, NamedTuple

from gpuguard._nvml import FieldValues, beyond
from gpuguard.sensors.nvml.calls import (
    ID_ABSENT,
    SCOPE_ALL,
    Library,
    address,
    blank_fields,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

Values = dict[str, Any]

CLOCK_SM, CLOCK_MEMORY, TEMPERATURE_GPU = 1, 2, 0
MEMORY_V2 = 0x02000028
PCIE_TX, PCIE_RX = 0, 1

NVLINK_COUNT = 91
#: The call for all fields, and the field that takes the place of the call `power`.
FIELD_VALUES, AVERAGE_POWER = "field values", "average power"
#: NVML_FI_DEV_* that are wanted at each tick, in one call of nvmlDeviceGetFieldValues: what it is, id, scope, and the
#: name of the value. Levels, mJ and mW: energy since the driver was loaded (Volta and later), power. Counters, told as
#: rates since the tick before: ns that the power cap held the clocks, PCIe bytes and NVLink KiB from the device (sent)
#: and to it.
LEVELS = (
    ("energy", 83, 0, "energy_j"),
    (AVERAGE_POWER, 185, 0, "power_average_w"),
    ("instant power", 186, 0, "power_instant_w"),
)
RATES = (
    ("power cap counter", 74, 0, "power_capped_ratio"),
    ("PCIe bytes sent", 197, 0, "pcie_tx_bytes_per_s"),
    ("PCIe bytes received", 198, 0, "pcie_rx_bytes_per_s"),
    ("NVLink bytes sent", 138, SCOPE_ALL, "nvlink_tx_bytes_per_s"),
    ("NVLink bytes received", 139, SCOPE_ALL, "nvlink_rx_bytes_per_s"),
)
#: Once a second: the temperature of the memory, which most consumer boards do not tell.
SLOW_FIELDS = (("memory temperature", 82, 0, "memory_temperature_c"),)
WANTED = (*LEVELS, *RATES, *SLOW_FIELDS)
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


def implausible(values: Values) -> list[str]:
    """Return the names of values that are no measurement."""
    return beyond(values, HIGHEST)


# -- at each tick ----------------------------------------------------------------------------------------------------


def utilization(gpu: int, memory: int) -> Values:
    """Time with at least one kernel, and with memory traffic, 0..1.

    Absent with MIG. One tiny kernel is 1.0. Source: nvmlDeviceGetUtilizationRates, %; nvidia-smi utilization.gpu.
    """
    return {"gpu_ratio": ratio(gpu), "memory_ratio": ratio(memory)}


def power(power_mw: int) -> Values:
    """Power of the board, W; a 1 s mean on Ampere and later except GA100.

    Those boards tell the same as a field value (average power), and are asked for that alone. Absent in most vGPU
    guests. Source: nvmlDeviceGetPowerUsage, mW; nvidia-smi power.draw.
    """
    return {"power_w": power_mw / 1000}


def sm_clock(clock_mhz: int) -> Values:
    """Clock of the multiprocessors, Hz. Source: nvmlDeviceGetClockInfo, NVML_CLOCK_SM, MHz; nvidia-smi clocks.sm."""
    return {"sm_clock_hz": clock_mhz * 1_000_000}


# -- once a second ---------------------------------------------------------------------------------------------------


def throttle_reasons(mask: int) -> Values:
    """Why the clocks are where they are, as a bit mask of nvmlClocksEventReason* (4 SW power cap, 8 HW slowdown, ...).

    How long the power cap held them is counted (the field "power cap counter"), so nothing between is missed. Source:
    nvmlDeviceGetCurrentClocksEventReasons, before R535 nvmlDeviceGetCurrentClocksThrottleReasons.
    """
    return {"throttle_reasons": mask}


def temperature(celsius: int) -> Values:
    """Temperature of the GPU die, degrees Celsius.

    Source: nvmlDeviceGetTemperature, sensor NVML_TEMPERATURE_GPU; nvidia-smi temperature.gpu.
    """
    return {"temperature_c": float(celsius)}


def memory_clock(clock_mhz: int) -> Values:
    """Clock of the memory, Hz. Source: nvmlDeviceGetClockInfo, NVML_CLOCK_MEM, MHz; nvidia-smi clocks.mem."""
    return {"memory_clock_hz": clock_mhz * 1_000_000}


def encoder(percent: int) -> Values:
    """Use of the video encoders, 0..1. Source: nvmlDeviceGetEncoderUtilization, %."""
    return {"encoder_ratio": ratio(percent)}


def decoder(percent: int) -> Values:
    """Use of the video decoders, 0..1. Source: nvmlDeviceGetDecoderUtilization, %."""
    return {"decoder_ratio": ratio(percent)}


class Call(NamedTuple):
    """One call of a round, ``name(handle, before..., &answer, after...)``, and how its answer is read.

    Of ``names`` the first that the driver has is called.
    """

    names: tuple[str, ...]
    answer: struct.Struct
    read: Callable[..., Values]
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()

    @property
    def what(self) -> str:
        """Return what it reads, in words."""
        return self.read.__name__.replace("_", " ")


UINT, UINTS, ULONGLONG = struct.Struct("<I"), struct.Struct("<II"), struct.Struct("<Q")
#: Where the sampling period of the video engines goes: of no use here, and no call does without.
_PERIOD_US = ctypes.c_uint()
FAST = (
    Call(("nvmlDeviceGetUtilizationRates",), UINTS, utilization),
    Call(("nvmlDeviceGetPowerUsage",), UINT, power),
    Call(("nvmlDeviceGetClockInfo",), UINT, sm_clock, (CLOCK_SM,)),
)
SLOW = (
    Call(("nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons"), ULONGLONG,
         throttle_reasons),
    Call(("nvmlDeviceGetTemperature",), UINT, temperature, (TEMPERATURE_GPU,)),
    Call(("nvmlDeviceGetClockInfo",), UINT, memory_clock, (CLOCK_MEMORY,)),
    Call(("nvmlDeviceGetEncoderUtilization",), UINT, encoder, after=(address(ctypes.pointer(_PERIOD_US)),)),
    Call(("nvmlDeviceGetDecoderUtilization",), UINT, decoder, after=(address(ctypes.pointer(_PERIOD_US)),)),
)
#: What is held from one second to the next.
HELD = frozenset({"throttle_reasons", "temperature_c", "memory_temperature_c", "memory_clock_hz", "encoder_ratio",
                  "decoder_ratio"})


def memory_info(library: Library, handle: Any) -> Callable[[], tuple[int, int]]:
    """Return a call that reads memory, (total, used) bytes, without what the driver keeps for itself where it tells.

    Source: nvmlDeviceGetMemoryInfo_v2, else nvmlDeviceGetMemoryInfo, bytes; nvidia-smi memory.used.
    """
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


def ratio(percent: int) -> float | None:
    """Return a percentage as 0..1; None where the driver gives a number that is none (seen with MPS)."""
    return percent / 100 if 0 <= percent <= 100 else None


# -- field values ----------------------------------------------------------------------------------------------------

#: What one count of a counter is: ns of a second, bytes, KiB.
UNITS = {
    "power_capped_ratio": 1e-9, "pcie_tx_bytes_per_s": 1, "pcie_rx_bytes_per_s": 1,
    "nvlink_tx_bytes_per_s": 1024, "nvlink_rx_bytes_per_s": 1024,
}
#: What one unit of a level is in counts: mJ, mW.
DIVISORS = {"energy_j": 1000, "power_average_w": 1000, "power_instant_w": 1000, "memory_temperature_c": 1}


class FieldReader:
    """The field values of one device, and what the counters among them showed before."""

    def __init__(self, library: Library, kept: Sequence[tuple[str, int, int, str]]) -> None:
        self.kept = kept
        self.function = library.function("nvmlDeviceGetFieldValues")
        #: As they are before they are answered: all of them, and those of each tick.
        self.blank = blank_fields([(one, scope) for _, one, scope, _ in kept])
        self.blank_short = blank_fields([(one, scope) for _, one, scope, name in kept if name not in HELD])
        #: Puts what the answered ones tell into values; returns the nvmlReturn of what cannot be told, by its words.
        self.take = FieldValues(
            [(what, name, UNITS.get(name), DIVISORS.get(name, 1)) for what, _, _, name in kept]).take

    def whats(self, *, full: bool) -> list[str]:
        """Return what is asked for, in words."""
        return [what for what, _, _, name in self.kept if full or name not in HELD]
