"""libnvidia-ml.so.1, called directly where it is called often: prepared arguments and buffers, no copies.

The binding (nvidia-ml-py) builds its structs anew at each call, which at 10 Hz and 8 GPUs costs more than the driver.
It still initialises the library, names the devices and words the errors; what is asked once a tick is asked here.
Layouts are those that nvidia-ml-py 13.615 declares for x86-64 and arm64 (both little-endian, 64 bits); a test compares
them with the binding's. Nothing is read that the driver did not say it wrote.
"""

from __future__ import annotations

import ctypes
import struct
from typing import TYPE_CHECKING, Any, NamedTuple

from gpuguard._nvml import decode_value

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

# nvmlReturn_t of nvml.h.
SUCCESS, UNINITIALIZED, INVALID_ARGUMENT, NOT_SUPPORTED, NO_PERMISSION = 0, 1, 2, 3, 4
NOT_FOUND, INSUFFICIENT_SIZE = 6, 7
DRIVER_NOT_LOADED, LIBRARY_NOT_FOUND, FUNCTION_NOT_FOUND, GPU_IS_LOST, RESET_REQUIRED = 9, 12, 13, 15, 16
LIB_RM_VERSION_MISMATCH, ARGUMENT_VERSION_MISMATCH, DEPRECATED = 18, 25, 26

ABSENT = frozenset({NOT_SUPPORTED, NO_PERMISSION, FUNCTION_NOT_FOUND, ARGUMENT_VERSION_MISMATCH, DEPRECATED})
#: INVALID_ARGUMENT is how a driver answers an id that is newer than itself.
ID_ABSENT = ABSENT | {INVALID_ARGUMENT}
DEVICE_GONE = frozenset({GPU_IS_LOST, RESET_REQUIRED})
DRIVER_GONE = frozenset({UNINITIALIZED, DRIVER_NOT_LOADED, LIB_RM_VERSION_MISMATCH})

REMEDIES = {
    LIBRARY_NOT_FOUND: "libnvidia-ml.so.1 is not here: install the NVIDIA driver, or start the container with --gpus",
    DRIVER_NOT_LOADED: "the NVIDIA kernel driver is not loaded: modprobe nvidia",
    LIB_RM_VERSION_MISMATCH: "library and kernel driver are of different versions: reboot, or reload the module",
    NO_PERMISSION: "no right to open /dev/nvidiactl and /dev/nvidia*: see the device's owner and mode",
}

#: nvmlFieldValue_t: id, scope, time us, latency us, type of the value, nvmlReturn, value (a union of 8 bytes).
FIELD = struct.Struct("<IIqqIIQ")
#: nvmlValueType_t of 64 bits: unsigned long, unsigned long long.
WIDE = frozenset({2, 3})
#: nvmlGpmMetric_t: id, nvmlReturn, value; three pointers to texts follow.
METRIC = struct.Struct("<IId24x")
#: nvmlGpmMetricsGet_t before its metrics: version, count, two samples.
METRICS_HEAD = struct.Struct("<IIQQ")
METRICS_VERSION = 1
#: NVML_GPM_METRIC_MAX is 98 in R525 and 477 in R615.
METRICS_MAX = 1_024
#: As large as any driver may take an nvmlGpmMetricsGet_t to be.
METRICS_BYTES = METRICS_HEAD.size + METRICS_MAX * METRIC.size
#: nvmlProcessInfo_v2_t, which is that of the calls v2 and v3: pid, memory, GPU instance, compute instance.
PROCESS = struct.Struct("<I4xQII")
#: nvmlProcessUtilizationSample_t: pid, time us, sm, memory, encoder, decoder, in percent.
USE = struct.Struct("<I4xQIIII")
#: nvmlAccountingStats_t: gpu, memory in percent, most memory, ms of context time, start in us of Unix time, running.
#: The binding's own reader fails where a driver says "not available".
ACCOUNT = struct.Struct("<IIQQQI20x")

INSTANCE_ANY = 2**32 - 1
#: All links together, where a field id takes a link as its scope.
SCOPE_ALL = 2**32 - 1


class RunningProcess(NamedTuple):
    """One nvmlProcessInfo_t."""

    pid: int
    used_bytes: int
    gpu_instance_id: int
    compute_instance_id: int


class UseSample(NamedTuple):
    """One nvmlProcessUtilizationSample_t."""

    pid: int
    time_us: int
    sm: int
    memory: int
    encoder: int
    decoder: int


class Asked(NamedTuple):
    """One call.

    ``answer`` is what its place in the row holds before, and ``place`` the argument that is to be the address of that;
    one that ``needs_last`` is not made where the call before it failed.
    """

    function: Callable[..., int]
    arguments: tuple[int, ...]
    answer: bytes = b""
    place: int = -1
    needs_last: bool = False


def address(pointer: Any) -> int:
    """Return where a pointer or a function of ctypes points to."""
    return ctypes.cast(pointer, ctypes.c_void_p).value or 0


class Library:
    """The functions of the loaded driver library."""

    def __init__(self, nvml: Any) -> None:
        self.nvml = nvml
        self._library = ctypes.CDLL("libnvidia-ml.so.1")

    def function(self, *names: str) -> Callable[..., int]:
        """Return the first of these that the library has, newest name first; raises NVMLError."""
        for name in names:
            found: Callable[..., int] | None = getattr(self._library, name, None)
            if found is not None:
                return found
        raise self.nvml.NVMLError(FUNCTION_NOT_FOUND)

    def check(self, code: int) -> None:
        """Raise what a call answered, if it was not success."""
        if code:
            raise self.nvml.NVMLError(code)


class Fields:
    """A fixed list of field ids of one device, read by one call of nvmlDeviceGetFieldValues."""

    def __init__(self, library: Library, handle: Any, wanted: Sequence[tuple[int, int]]) -> None:
        self._check = library.check
        self._call = library.function("nvmlDeviceGetFieldValues")
        self._blank = blank_fields(wanted)
        self._buffer = ctypes.create_string_buffer(self._blank, len(self._blank))
        self._arguments = (handle, ctypes.c_int(len(wanted)), self._buffer)

    def read(self) -> list[tuple[int, int, int, int | float | None]]:
        """Ask, and return (time in us, nvmlValueType_t, nvmlReturn, value) of each, in order.

        The value is None where it is no number of a type that nvml.h knows. Raises NVMLError where the call fails.
        """
        ctypes.memmove(self._buffer, self._blank, len(self._blank))
        self._check(self._call(*self._arguments))
        return [(time_us, kind, code, decode_value(kind, bits))
                for _, _, time_us, _, kind, code, bits in FIELD.iter_unpack(self._buffer.raw)]


def blank_fields(wanted: Sequence[tuple[int, int]]) -> bytes:
    """Return the nvmlFieldValue_t of (id, scope) each, as they are before they are answered."""
    return b"".join(FIELD.pack(one, scope, 0, 0, 0, NOT_SUPPORTED, 0) for one, scope in wanted)


class Rows:
    """An array that the driver fills, asked for by one call: its buffer grows where the driver asks for more."""

    def __init__(self, library: Library, names: Sequence[str], row: struct.Struct, *, rows: int, rows_max: int) -> None:
        self._library = library
        self._calls = [call for name in names if (call := _or_none(library, name))]
        self._row = row
        self._rows_max = rows_max
        self._buffer = ctypes.create_string_buffer(rows * row.size)

    def read(self, handle: Any, *after: Any) -> bytes:
        """Return the rows as bytes. Raises NVMLError; more than ``rows_max`` is INSUFFICIENT_SIZE."""
        code = FUNCTION_NOT_FOUND
        for call in self._calls:
            code, rows = self._ask(call, handle, after)
            if code == SUCCESS:
                return ctypes.string_at(self._buffer, rows * self._row.size)
            if code != FUNCTION_NOT_FOUND:
                break
        self._library.check(code)
        return b""

    def _ask(self, call: Callable[..., int], handle: Any, after: Sequence[Any]) -> tuple[int, int]:
        while True:
            room = len(self._buffer) // self._row.size
            count = ctypes.c_uint(room)
            # nvmlDeviceGetProcessUtilization takes its buffer before the count, the process lists after it.
            order = (self._buffer, ctypes.byref(count)) if after else (ctypes.byref(count), self._buffer)
            code = call(handle, *order, *after)
            if code != INSUFFICIENT_SIZE or room >= self._rows_max:
                return code, min(count.value, room)
            self._buffer = ctypes.create_string_buffer(min(self._rows_max, max(2 * room, count.value)) * self._row.size)


def _or_none(library: Library, name: str) -> Callable[..., int] | None:
    try:
        return library.function(name)
    except library.nvml.NVMLError:
        return None


def remedy(error: Any) -> str:
    """Return what an NVMLError means for a person."""
    return REMEDIES.get(getattr(error, "value", -1), str(error))
