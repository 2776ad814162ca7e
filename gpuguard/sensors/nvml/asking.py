"""How a device is asked, and what is told of what it does not answer.

What this driver or board does not have is one `Gap` for that device and field, and is not asked for again until the
driver was reopened; what fails for a while is a `Gap` when it begins and another when it ends.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gpuguard.sensors.nvml.calls import ABSENT, DEVICE_GONE, DRIVER_GONE, NO_PERMISSION
from gpuguard.sensors.nvml.fields import FIELD_VALUES
from gpuguard.sensors.nvml.sweep import gap

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from gpuguard.sensors.nvml.gpu import Gpu
    from gpuguard.sensors.nvml.sweep import Sweep

GPM_REFUSED = "profiling counters are for root only: NVreg_RestrictProfilingToAdminUsers=0, or run the guard as root"


class DriverGone(Exception):
    """The driver answers nothing any more."""


class DeviceGone(Exception):
    """This device answers nothing any more."""


class Asking:
    """Makes calls for devices, and knows what was told of whom: nothing twice, over the life of the sensor."""

    def __init__(self, nvml: Any) -> None:
        self._nvml = nvml
        self._told: set[tuple[str, str]] = set()

    def ask(self, gpu: Gpu, sweep: Sweep, what: str, call: Callable[[], Any]) -> Any:
        """Return what the call returns; None with a `Gap` where it cannot be made."""
        if what in gpu.absent:
            return None
        try:
            answer = call()
        except self._nvml.NVMLError as error:
            self.failed(gpu, sweep, what, error)
            return None
        except AttributeError as error:
            self.absent(gpu, sweep, what, f"the installed nvidia-ml-py is too old: {error}")
            return None
        if gpu.failing and what in gpu.failing:
            self._recovered(gpu, sweep, what)
        return answer

    def failed(self, gpu: Gpu, sweep: Sweep, what: str, error: Any) -> None:
        """Take in that a call failed; raises `DriverGone` and `DeviceGone`."""
        if error.value in DRIVER_GONE:
            raise DriverGone(str(error))
        if error.value in DEVICE_GONE:
            raise DeviceGone(str(error))
        if error.value in ABSENT:
            refused = what == "GPM" and error.value == NO_PERMISSION
            self.absent(gpu, sweep, what, GPM_REFUSED if refused else error)
            return
        since_ns, lost = gpu.failing.get(what, (sweep.time_ns, 0))
        gpu.failing[what] = (since_ns, lost + 1)
        if not lost:
            sweep.blocks.append(gap(sweep.time_ns, f"{gpu}: {what} cannot be read: {error}"))

    def absent(self, gpu: Gpu, sweep: Sweep, what: str, error: object) -> None:
        """Ask for it no more."""
        gpu.absent.add(what)
        self.tell_absent(gpu, sweep, what, error)

    def tell_absent(self, gpu: Gpu, sweep: Sweep, what: str, error: object) -> None:
        """Tell what a device lacks, once."""
        self.tell_once(gpu, sweep, what, f"{gpu} has no {what}: {error}")

    def tell_once(self, gpu: Gpu, sweep: Sweep, what: str, reason: str) -> None:
        """Tell a reason unless it, or another of this name, was told of this device before."""
        if (gpu.uuid, what) not in self._told:
            self._told.add((gpu.uuid, what))
            sweep.blocks.append(gap(sweep.time_ns, reason))

    def settle(self, gpu: Gpu, sweep: Sweep, asked: Iterable[str], failed: Iterable[str]) -> None:
        """Tell of what can be read again, and ask no more for what is not there."""
        for what in gpu.failing.keys() & set(asked) - set(failed):
            self._recovered(gpu, sweep, what)
        for what in gpu.absent & set(failed):
            gpu.plan = None
            if what == FIELD_VALUES:
                gpu.fields = None

    def _recovered(self, gpu: Gpu, sweep: Sweep, what: str) -> None:
        since_ns, lost = gpu.failing.pop(what)
        reason = f"{gpu}: {what} can be read again"
        sweep.blocks.append(gap(sweep.time_ns, reason, since_ns=since_ns, lost=lost))
