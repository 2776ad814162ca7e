"""The counter eye: what NVML says of each GPU, MIG instance and process on it, and GPM on Hopper and later.

Names, units and limits are those of nvml.h as nvidia-ml-py declares them; `fields`, `gpm` and `processes` say of each
value its unit, when it is absent, and the call it comes from. `driver` makes the calls, `asking` says what
becomes of those that fail, `calls` is the library itself.

A sick driver answers late or never, so all calls are made on a thread of their own: `read` waits for it a moment, and
what comes later is handed out by a later `read`. A call that does not return is a `Gap`, not a guard that hangs. Who a
pid is (start time, boot) is asked of the broker, on the caller's thread.
"""

from __future__ import annotations

import importlib
import logging
import math
import queue
import threading
import time
from typing import TYPE_CHECKING, Any

from gpuguard.core.records import Block, Gap, ProcessAccounting, ProcessSample
from gpuguard.sensors import EyeClosed, next_ns
from gpuguard.sensors.nvml.calls import remedy
from gpuguard.sensors.nvml.driver import Driver
from gpuguard.sensors.nvml.gpm import TICK_MIN_NS
from gpuguard.sensors.nvml.names import Broker, Names
from gpuguard.sensors.nvml.sweep import NAME, SECOND_NS, Sweep
from gpuguard.sensors.nvml.sweep import gap as _gap

if TYPE_CHECKING:
    from collections.abc import Callable

    from gpuguard.config import Config
    from gpuguard.core.subjects import ProcessId
    from gpuguard.sensors.nvml.sweep import Account

log = logging.getLogger(__name__)

RATE_MIN_HZ, RATE_MAX_HZ = 0.1, 10.0
OPEN_TIMEOUT_S = 15.0
ANSWER_WAIT_S = 0.05
#: A thread between two rounds sees within a tick that it is to end.
CLOSE_WAIT_S = 0.15
HUNG_NS = 5 * SECOND_NS
#: Processes that accounting may tell of after their end.
REMEMBERED_MAX = 4_096


class NvmlSensor:
    """Answers at the configured rate; the calls themselves run on ``self._thread``."""

    name = NAME
    descriptor: int | None = None

    def __init__(self, driver: Driver, broker: Broker, rate_hz: float) -> None:
        # Between one `read` and the next the thread makes the other rounds of that second by itself, and wakes nobody.
        rounds = math.ceil(max(1.0, rate_hz))
        self._more, self._tick_ns = rounds - 1, max(int(SECOND_NS / rate_hz), TICK_MIN_NS)
        self.period_ns = rounds * self._tick_ns
        self._driver = driver
        self._names = Names(broker)
        self._accounted: dict[tuple[int, int], ProcessId] = {}
        self._asked: queue.SimpleQueue[Callable[[], Any] | None] = queue.SimpleQueue()
        self._answered: queue.SimpleQueue[Any] = queue.SimpleQueue()
        #: How many answers are awaited, and since when.
        self._pending = self._pending_since_ns = 0
        self._waited = False
        self._told_hung = False
        self._told_error = ""
        self._first: list[Block] = []
        self._thread = threading.Thread(target=self._work, name="gpuguard-nvml", daemon=True)
        self._thread.start()

    def open(self, now_ns: int) -> None:
        """Initialise NVML; raises `EyeClosed`."""
        self._asked.put(lambda: self._driver.open(now_ns))
        try:
            answer = self._answered.get(timeout=OPEN_TIMEOUT_S)
        except queue.Empty:
            self.close()
            why = f"nvmlInit has not returned for {OPEN_TIMEOUT_S:.0f} s: see dmesg for Xid messages"
            raise EyeClosed(why) from None
        if isinstance(answer, BaseException):
            self.close()
            raise EyeClosed(remedy(answer)) from answer
        if not self._driver.devices:
            self.close()
            raise EyeClosed("the NVIDIA driver is loaded and lists no GPU that can be opened")
        self._first = answer

    def read(self, now_ns: int) -> list[Block]:
        """Return the records of every round that has ended since the last `read`, and of one at this moment."""
        blocks, self._first = self._first, []
        while self._pending:
            if not self._hear(now_ns, blocks):
                return blocks
        self._ask(now_ns, lambda: self._driver.sweep(now_ns))
        if self._more:
            # By the time of the next `read` it is over, also where this one comes late.
            until_ns = next_ns(time.monotonic_ns(), self.period_ns) - 3 * self._tick_ns // 4
            self._ask(now_ns, lambda: self._driver.stream(self._more, self._tick_ns, until_ns))
        self._hear(now_ns, blocks)
        return blocks

    def close(self) -> None:
        """Let go of the driver, as soon as it lets go of us."""
        self._driver.stop()
        self._asked.put(self._driver.close)
        self._asked.put(None)
        self._thread.join(timeout=CLOSE_WAIT_S)

    def _ask(self, now_ns: int, task: Callable[[], Sweep]) -> None:
        self._pending, self._pending_since_ns = self._pending + 1, now_ns
        self._asked.put(task)

    def _hear(self, now_ns: int, blocks: list[Block]) -> bool:
        """Return whether the next answer is there, with its records in ``blocks``; each is waited for once."""
        waited, self._waited = self._waited, True
        try:
            answer = self._answered.get(block=not waited, timeout=ANSWER_WAIT_S)
        except queue.Empty:
            blocks += self._late(now_ns)
            return False
        if self._told_hung:
            self._told_hung = False
            blocks.append(_gap(now_ns, "NVML answers again", since_ns=self._pending_since_ns))
        self._pending, self._waited = self._pending - 1, False
        if isinstance(answer, BaseException):
            blocks += self._broken(answer, now_ns)
        else:
            blocks += answer.blocks
            blocks += self._named(answer)
        return True

    def _late(self, now_ns: int) -> list[Block]:
        if self._told_hung or now_ns - self._pending_since_ns < HUNG_NS:
            return []
        self._told_hung = True
        reason = "a call of NVML has not returned for 5 s: the driver hangs, see dmesg for Xid messages"
        return [_gap(now_ns, reason, since_ns=self._pending_since_ns)]

    def _broken(self, error: BaseException, now_ns: int) -> list[Block]:
        """Return a `Gap` for what no driver should make happen, once for each kind of it in a row."""
        told, self._told_error = self._told_error, type(error).__name__
        if told == self._told_error:
            return []
        log.error("a round of NVML calls failed", exc_info=error)
        return [_gap(now_ns, f"a round of NVML calls failed: {type(error).__name__}: {error}")]

    def _named(self, sweep: Sweep) -> list[Block]:
        gaps: list[Gap] = []
        samples: list[Block] = [self._accounting(one, sweep.time_ns, gaps) for one in sweep.accounts]
        if sweep.uses is None:
            return [*gaps, *samples]
        # One job is on many devices: who it is is looked up once.
        named = {pid: self._names.process(pid, sweep.time_ns, gaps) for pid in dict.fromkeys(u.pid for u in sweep.uses)}
        for use in sweep.uses:
            if (process := named[use.pid]) is not None:
                used = (use.memory_used_bytes, use.sm_ratio, use.memory_ratio, use.encoder_ratio, use.decoder_ratio)
                samples.append(ProcessSample(sweep.time_ns, process, use.uuid, *used))
        self._names.keep(set(named))
        return [*gaps, *samples]

    def _accounting(self, one: Account, time_ns: int, gaps: list[Gap]) -> ProcessAccounting:
        """Return one account with who it is of: asked while it runs, remembered after it has ended."""
        key = (one.pid, one.started_ns)
        process = self._names.process(one.pid, time_ns, gaps) if one.running else self._accounted.pop(key, None)
        if one.running and process is not None:
            if len(self._accounted) >= REMEMBERED_MAX:
                del self._accounted[next(iter(self._accounted))]
            self._accounted[key] = process
        return ProcessAccounting(
            time_ns, one.uuid, one.pid, one.started_ns, one.running, process,
            one.gpu_ratio, one.memory_ratio, one.memory_max_bytes, one.active_ns)

    def _work(self) -> None:
        while (task := self._asked.get()) is not None:
            try:
                self._answered.put(task())
            except Exception as error:  # noqa: BLE001 - whoever asked is told
                self._answered.put(error)


def open_sensor(broker: Broker, config: Config, *, now_ns: int = 0) -> NvmlSensor:
    """Return the running sensor; raises `EyeClosed` with what would open it."""
    rate_hz = config.nvml.rate_hz
    if not RATE_MIN_HZ <= rate_hz <= RATE_MAX_HZ:
        raise EyeClosed(f"nvml.rate_hz = {rate_hz} is not in {RATE_MIN_HZ} to {RATE_MAX_HZ:.0f}")
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError as error:
        raise EyeClosed(f"NVIDIA's binding is not installed ({error}): pip install nvidia-ml-py") from error
    sensor = NvmlSensor(Driver(nvml), broker, rate_hz)
    sensor.open(now_ns or time.time_ns())
    return sensor
