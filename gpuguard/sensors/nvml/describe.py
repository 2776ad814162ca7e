"""What a device is and under which limits it is read: driver, board, MIG, vGPU, confidential computing, accounting.

What a person would miss where it cannot be read (name, memory, limits) is asked through ``ask``, which tells a `Gap`;
the rest is context, and None or "" where the driver does not say.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gpuguard.sensors.nvml.calls import DEVICE_GONE, DRIVER_GONE, NOT_FOUND, Library
from gpuguard.sensors.nvml.fields import NVLINK_COUNT, memory_info

if TYPE_CHECKING:
    from collections.abc import Callable

    from gpuguard.sensors.nvml.gpu import Gpu

    Ask = Callable[[str, Callable[[], Any]], Any]

#: nvmlDeviceArchitecture_t.
ARCHITECTURES = {
    2: "kepler", 3: "maxwell", 4: "pascal", 5: "volta", 6: "turing", 7: "ampere", 8: "ada", 9: "hopper",
    10: "blackwell", 13: "rubin",
}
#: nvmlGpuVirtualizationMode_t.
VIRTUALIZATION_MODES = ("none", "passthrough", "vgpu", "host_vgpu", "host_vsga")
MHZ = 1_000_000
MIG_DEVICES_MAX = 64


def system(nvml: Any) -> dict[str, Any]:
    """Return the fields of `Device` that are the same for all devices; raises NVMLError."""
    known: dict[str, Any] = {"driver_version": str(nvml.nvmlSystemGetDriverVersion())}
    state = quiet(nvml, lambda: nvml.nvmlSystemGetConfComputeState())  # noqa: PLW0108 - an older binding lacks it
    if state is not None:
        known |= {"confidential_compute": bool(state.ccFeature), "devtools_mode": bool(state.devToolsMode)}
    return known


def fixed(ask: Ask, nvml: Any, library: Library, gpu: Gpu) -> dict[str, Any]:
    """Return the fields of `Device` that do not change while the driver is loaded."""
    handle = gpu.handle
    info = ask("memory total", lambda: memory_info(library, handle)())  # noqa: PLW0108 - the lookup may fail too
    known: dict[str, Any] = {
        "name": str(ask("name", lambda: nvml.nvmlDeviceGetName(handle)) or ""),
        "memory_bytes": info and info[0],
    }
    if gpu.parent is not None and gpu.instance is not None:
        attributes = quiet(nvml, lambda: nvml.nvmlDeviceGetAttributes_v2(handle))
        parent = gpu.parent.device
        return known | {
            "parent_uuid": gpu.parent.uuid,
            "gpu_instance_id": gpu.instance[0],
            "compute_instance_id": gpu.instance[1],
            "multiprocessors": attributes and int(attributes.multiprocessorCount),
            "architecture": parent.architecture,
            "gpm_supported": parent.gpm_supported,
        }
    sm_mhz = ask("sm clock limit", lambda: nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_SM))
    memory_mhz = ask("memory clock limit", lambda: nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_MEM))
    power_max = quiet(nvml, lambda: nvml.nvmlDeviceGetPowerManagementLimitConstraints(handle))
    power_default = quiet(nvml, lambda: nvml.nvmlDeviceGetPowerManagementDefaultLimit(handle))
    support = quiet(nvml, lambda: nvml.nvmlGpmQueryDeviceSupport(handle))
    return known | {
        "sm_clock_limit_hz": sm_mhz and sm_mhz * MHZ,
        "memory_clock_limit_hz": memory_mhz and memory_mhz * MHZ,
        "power_limit_max_w": power_max and power_max[1] / 1000,
        "power_limit_default_w": power_default and power_default / 1000,
        "architecture": ARCHITECTURES.get(quiet(nvml, lambda: nvml.nvmlDeviceGetArchitecture(handle)), ""),
        "board_part_number": str(quiet(nvml, lambda: nvml.nvmlDeviceGetBoardPartNumber(handle)) or ""),
        "vbios_version": str(quiet(nvml, lambda: nvml.nvmlDeviceGetVbiosVersion(handle)) or ""),
        "multiprocessors": _multiprocessors(nvml, handle),
        "nvlinks": _nvlinks(nvml, handle),
        "gpm_supported": support and bool(support.isSupportedDevice),
    }


def changing(ask: Ask, nvml: Any, gpu: Gpu) -> dict[str, Any]:
    """Return the fields of `Device` that people change."""
    if gpu.parent is not None:
        return {}
    handle = gpu.handle
    limit_mw = ask("power limit", lambda: nvml.nvmlDeviceGetEnforcedPowerLimit(handle))
    mig = quiet(nvml, lambda: nvml.nvmlDeviceGetMigMode(handle))
    mode = quiet(nvml, lambda: nvml.nvmlDeviceGetVirtualizationMode(handle))
    accounting = quiet(nvml, lambda: nvml.nvmlDeviceGetAccountingMode(handle))
    return {
        "power_limit_w": limit_mw and limit_mw / 1000,
        "mig_mode": mig and bool(mig[0]),
        "virtualization_mode": VIRTUALIZATION_MODES[mode] if mode in range(len(VIRTUALIZATION_MODES)) else "",
        "accounting_mode": None if accounting is None else bool(accounting),
    }


def instances(nvml: Any, handle: Any) -> dict[str, tuple[Any, tuple[int, int]]]:
    """Return (handle, (GPU instance, compute instance)) of every MIG device of a board, by uuid; raises NVMLError."""
    found = {}
    for index in range(min(nvml.nvmlDeviceGetMaxMigDeviceCount(handle), MIG_DEVICES_MAX)):
        try:
            one = nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, index)
            ids = int(nvml.nvmlDeviceGetGpuInstanceId(one)), int(nvml.nvmlDeviceGetComputeInstanceId(one))
            found[str(nvml.nvmlDeviceGetUUID(one))] = one, ids
        except nvml.NVMLError as error:
            if error.value != NOT_FOUND:
                raise
    return found


def quiet(nvml: Any, call: Callable[[], Any]) -> Any:
    """Return what the call returns, None where this driver, board or binding does not say."""
    try:
        return call()
    except nvml.NVMLError as error:
        if error.value in DEVICE_GONE | DRIVER_GONE:
            raise
        return None
    except AttributeError:
        return None  # newer than the installed binding


def _multiprocessors(nvml: Any, handle: Any) -> int | None:
    """Return how many multiprocessors a board has; NVML tells it of boards with MIG only."""
    attributes = quiet(nvml, lambda: nvml.nvmlDeviceGetAttributes_v2(handle))
    return int(attributes.multiprocessorCount) or None if attributes else None


def _nvlinks(nvml: Any, handle: Any) -> int | None:
    found = quiet(nvml, lambda: nvml.nvmlDeviceGetFieldValues(handle, [NVLINK_COUNT]))
    return int(found[0].value.uiVal) if found and not found[0].nvmlReturn else None
