"""What the counter eye would see here: the same calls, made for a moment, and put into words for `gpuguard doctor`."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from gpuguard.core.records import Device, DeviceSample, Gap
from gpuguard.sensors.nvml.asking import GPM_REFUSED
from gpuguard.sensors.nvml.driver import Driver
from gpuguard.sensors.nvml.gpm import PERIOD_MIN_NS

if TYPE_CHECKING:
    from collections.abc import Iterable

    from gpuguard.core.records import Block

ROUNDS = 3


def survey(nvml: Any) -> dict[str, object]:
    """Return names of the boards, how many do not answer, the driver, what limits the reading, and what would lift it.

    Raises NVMLError where the driver does not answer at all.
    """
    driver = Driver(nvml)
    blocks = driver.open(time.time_ns())
    for _ in range(ROUNDS):
        blocks += driver.sweep(time.time_ns()).blocks
        time.sleep(1.1 * PERIOD_MIN_NS / 1e9)
    lost = driver.unopened
    driver.close()
    boards = [one for one in blocks if isinstance(one, Device) and not one.parent_uuid]
    refused = any(isinstance(one, Gap) and GPM_REFUSED in one.reason for one in blocks)
    return {
        "names": [board.name for board in boards],
        "lost": lost,
        "driver": boards[0].driver_version if boards else str(nvml.nvmlSystemGetDriverVersion()),
        "notes": notes(blocks),
        "remedy": GPM_REFUSED if refused else "",
    }


def notes(blocks: Iterable[Block]) -> list[str]:
    """Return what limits the reading, or goes beyond the usual."""
    blocks = list(blocks)
    devices = [one for one in blocks if isinstance(one, Device)]
    boards = [one for one in devices if not one.parent_uuid]
    with_gpm = {one.uuid for one in blocks if isinstance(one, DeviceSample) and one.gpm is not None}
    said = [f"GPM on {len(with_gpm & {one.uuid for one in boards})} of {len(boards)}"]
    if instances := len(devices) - len(boards):
        said.append(f"{instances} MIG instances")
    said += sorted({f"{one.virtualization_mode}: some counters are the host's alone" for one in boards
                    if one.virtualization_mode in ("vgpu", "host_vgpu", "host_vsga")})
    if any(one.confidential_compute and not one.devtools_mode for one in boards):
        said.append("confidential computing: performance counters are off")
    if absent := sorted({one.reason.partition(" has no ")[2].partition(":")[0] for one in blocks
                         if isinstance(one, Gap) and " has no " in one.reason}):
        said.append(f"without {', '.join(absent)}")
    return said
