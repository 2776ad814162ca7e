"""The script of the stand-in NVML library: two devices, and which of the lab's processes use them.

A driver knows its processes; the scripted one is told. It says so in the devices' names, which reach every screen.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

_HEAD = """\
driver 580.95.05
cuda 13000
start {start:.3f}
device 0 uuid GPU-5ca1ab1e-0000-0000-0000-000000000000 memory_mib 81559 power_limit_w 700 sm_mhz_max 1980 \
name H100 (scripted stand-in)
device 1 uuid GPU-5ca1ab1e-0000-0000-0000-000000000001 memory_mib 81559 power_limit_w 700 sm_mhz_max 1980 \
name H100 (scripted stand-in)
"""
_TRAINING = """\
at 0 device 0 gpu 91 memory 46 used_mib 61440 power_w 612 temperature 61 sm_mhz 1740 mem_mhz 2619 tx_kbs 900000 \
rx_kbs 700000
process device 0 pid {pid} used_mib 61440 sm 88 memory 45 from 0 until 3600
"""
_HASHING = """\
at {at:.3f} device 1 gpu 99 memory 4 used_mib 640 power_w 431 temperature 58 sm_mhz 1965 mem_mhz 2619 tx_kbs 12 rx_kbs 9
process device 1 pid {pid} used_mib 640 sm 99 memory 3 from {at:.3f} until 3600
"""


class Script:
    """The file that the stand-in reads; each process is added when it has started."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._start = time.time()
        self._text = _HEAD.format(start=self._start)
        self._write()

    def training(self, pid: int) -> None:
        """Show ``pid`` at work on device 0, with a training job's counters."""
        self._text += _TRAINING.format(pid=pid)
        self._write()

    def hashing(self, pid: int) -> None:
        """Show ``pid`` at work on device 1, with a miner's counters."""
        self._text += _HASHING.format(pid=pid, at=time.time() - self._start)
        self._write()

    def _write(self) -> None:
        draft = self.path.with_suffix(".new")
        draft.write_text(self._text)
        draft.replace(self.path)
