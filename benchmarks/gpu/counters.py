"""Record the counters of all devices at 10 Hz as this very user sees them, until SIGTERM.

    counters.py FOLDER

For boards that give GPM to root only: the guard, which is not root, is refused it, and its recording lacks what tells
most. `record.py` then runs this beside the daemon; what both saw of a moment is told apart in `verdicts.py`.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pynvml
from machine import end_in_order

from gpuguard.core.records import SCHEMA_VERSION, HostInfo
from gpuguard.proctree import boot_id
from gpuguard.recording.writer import Recorder
from gpuguard.sensors.nvml.driver import Driver
from gpuguard.sensors.nvml.gpm import TICK_MIN_NS
from gpuguard.sensors.nvml.sweep import SECOND_NS

ROUNDS = 9


def main() -> None:
    end_in_order()
    driver, recorder = Driver(pynvml), Recorder(Path(sys.argv[1]), file_bytes_max=1 << 26, total_bytes_max=1 << 28)
    recorder.write(HostInfo(time.time_ns(), SCHEMA_VERSION, boot_id(), "", 100))
    try:
        for block in driver.open(time.time_ns()):
            recorder.write(block)
        while True:
            begun_s = time.monotonic()
            swept = driver.sweep(time.time_ns())
            streamed = driver.stream(ROUNDS, TICK_MIN_NS, time.monotonic_ns() + SECOND_NS - TICK_MIN_NS // 2)
            for block in (*swept.blocks, *streamed.blocks):
                recorder.write(block)
            time.sleep(max(0.0, begun_s + (ROUNDS + 1) * TICK_MIN_NS / SECOND_NS - time.monotonic()))
    finally:
        recorder.close(time.time_ns())
        driver.close()


if __name__ == "__main__":
    main()
