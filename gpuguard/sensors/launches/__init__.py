"""The launch eye: every kernel launch on the host, seen without the process's cooperation.

In the broker, `LaunchProbe` places one uprobe_multi link of each kind (single perf uprobes on kernels before 6.6) on
every CUDA driver library (an inode) that it is told of, that the linker's cache names, or that any process maps. In the
guard, `LaunchSensor` reads what the probes left: a table with one row for each (process, kernel, geometry), and a ring
of names and images.

New libraries. A probe sits on an inode, so whoever maps a known library later is seen from the first launch. Only an
inode never seen before (a copy in a container image, a memfd) must be found: at every scan (0.7 s) the broker reads
/proc/PID/statm of each process, and only where the address space changed its maps; each file is examined once. The
guard also asks about processes that were just executed, at once and a few times more. What such a process launched
before it was found stays unseen, and kernels that it looked up before stay without a name: never guessed.

Who launched is told by the kernel (pid and start time), so no row can be given to a process that reused the pid.

The broker's half is `probe` (what is watched: `libraries`, found in `maps`, swept in `rows`) and `images`; the guard's
is `sensor`, with `rows` (what each gained), `names` (what a handle is called) and `modules` (the code that was loaded).
"""

from __future__ import annotations

import itertools
import os
from typing import TYPE_CHECKING

from gpuguard.broker import boundary
from gpuguard.messages import Answer, Opened, OpenLaunches, ReadImage, Refused, Request, ScanLaunches
from gpuguard.sensors import EyeClosed
from gpuguard.sensors.launches import cooperative
from gpuguard.sensors.launches.images import read_image
from gpuguard.sensors.launches.libraries import LIBRARIES_MAX
from gpuguard.sensors.launches.maps import cached_libraries
from gpuguard.sensors.launches.probe import LaunchProbe, new_probe
from gpuguard.sensors.launches.sensor import LaunchSensor

if TYPE_CHECKING:
    from gpuguard.config import Config
    from gpuguard.sensors.launches.cooperative import CooperativeSensor
    from gpuguard.sensors.launches.modules import Broker

__all__ = ["LaunchProbe", "LaunchSensor", "grant", "new_probe", "open_sensor", "release"]


class _Held:
    """What this process holds for the guard: at most one probe."""

    probe: LaunchProbe | None = None


def grant(request: Request) -> tuple[Answer, list[int]]:
    """Answer what the launch sensor asks of the broker; the descriptors are the caller's to send and close."""
    match request:
        case OpenLaunches():
            return _open(request)
        case ScanLaunches():
            if _Held.probe is None:
                return Refused("the launch eye is not open"), []
            return _Held.probe.scan(request.pids, request.rows_read_ns), []
        case ReadImage():
            return read_image(request)
        case _:
            return Refused(f"not for the launch eye: {type(request).__name__}"), []


def release() -> None:
    """Detach every probe: the guard is gone, or wants no more."""
    if _Held.probe:
        _Held.probe.close()
    _Held.probe = None
    boundary.opened(None)


def _open(request: OpenLaunches) -> tuple[Answer, list[int]]:
    release()
    try:
        probe = new_probe()
    except (EyeClosed, OSError) as error:
        hint = "; it needs CAP_BPF and CAP_PERFMON" if isinstance(error, PermissionError) else ""
        return Refused(f"{error}{hint}"), []
    for path in itertools.chain(request.libraries[:LIBRARIES_MAX], cached_libraries()):
        probe.libraries.add(path, kept=True)
    probe.scan(())
    _Held.probe = probe
    boundary.opened(probe.boundary)
    return probe.open_handles()


def open_sensor(broker: Broker, config: Config) -> LaunchSensor | CooperativeSensor:
    """Open the launch eye: by probes, else, where there is a folder for it, by what processes tell of themselves.

    Raises
    ------
    EyeClosed
        If the broker cannot place probes on this host, with what would be needed.
    """
    answer, descriptors = broker.ask(OpenLaunches(tuple(config.launches.libraries)))
    if not isinstance(answer, Opened):
        for fd in descriptors:
            os.close(fd)
        reason = answer.reason if isinstance(answer, Refused) else f"unexpected answer {answer}"
        sensor = cooperative.open_sensor(config.launches.interval_ms * 1_000_000, reason)
        if sensor is None:
            raise EyeClosed(f"{reason}; {cooperative.FOLDER_VARIABLE} would open it for processes that cooperate")
        return sensor
    return LaunchSensor(broker, answer, list(descriptors), config.launches.interval_ms * 1_000_000)
