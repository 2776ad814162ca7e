"""The eyes of the guard: every sensor of the folder that the settings turn on, and its life.

One that cannot be opened, or that stumbles, blinds no other: it is told as a `Gap`, and tried again after a while.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
import selectors
import time
from typing import TYPE_CHECKING, cast

import structlog

from gpuguard import sensors
from gpuguard.broker_client import BrokerGone
from gpuguard.core.records import Gap, Packets
from gpuguard.sensors import next_ns

if TYPE_CHECKING:
    from collections.abc import Callable

    from gpuguard.broker_client import BrokerClient
    from gpuguard.config import Config
    from gpuguard.core.records import Block
    from gpuguard.outputs.prometheus import Metrics
    from gpuguard.sensors import Sensor

TCP_SYN = 0x02
TCP_SYN_ACK = 0x12
REOPEN_NS = 30_000_000_000

log = structlog.get_logger("gpuguard")


@functools.cache
def sensor_names() -> list[str]:
    """Return what the folder of sensors has."""
    return sorted(module.name for module in pkgutil.iter_modules(sensors.__path__))


class Eyes:
    """What is open, and when each is to be read or tried again, by a clock that nobody can set.

    The descriptors of those that have one are in ``selector`` with their names. ``brief``: of packets, what only policy
    and who replays a recording go by is left out.
    """

    def __init__(self, broker: BrokerClient, config: Config, selector: selectors.BaseSelector, metrics: Metrics | None,
                 *, brief: bool) -> None:
        self._broker = broker
        self._config = config
        self._selector = selector
        self._metrics = metrics
        self._brief = brief
        self._open: dict[str, Sensor] = {}
        self._closed_until_ns: dict[str, int] = {}
        self._due_ns: dict[str, int] = {}

    @property
    def open(self) -> list[str]:
        """The names of those that look."""
        return sorted(self._open)

    @property
    def closed(self) -> list[str]:
        """The names of those that should be open and are not."""
        return [name for name in sensor_names() if name not in self._open and getattr(self._config, name).enabled]

    def to_open(self, now_ns: int) -> list[str]:
        """Return which to try now."""
        return [name for name in self.closed if self._closed_until_ns.get(name, 0) <= now_ns]

    def try_open(self, name: str, now_ns: int) -> Gap | None:
        """Open one; return why not, where that was not told before. Raises `BrokerGone`."""
        first = name not in self._closed_until_ns
        self._closed_until_ns[name] = now_ns + REOPEN_NS
        try:
            sensor = self._opened(name)
        except BrokerGone:
            raise
        except Exception as error:  # noqa: BLE001 whatever keeps one eye closed must not close the others
            self._count(name, up=False)
            reason = str(error) if isinstance(error, sensors.EyeClosed) else f"{type(error).__name__}: {error}"
            time_ns = time.time_ns()
            return Gap(time_ns=time_ns, sensor=name, reason=reason, since_ns=time_ns) if first else None
        log.info("eye open", sensor=name)
        self._count(name, up=True)
        self._open[name] = sensor
        if sensor.descriptor is not None:
            self._selector.register(sensor.descriptor, selectors.EVENT_READ, name)
        if sensor.period_ns is not None:
            self._due_ns[name] = now_ns
        return None

    def due(self, now_ns: int) -> list[str]:
        """Return which are to be read by now, whether anything made their descriptors ready or not."""
        return [name for name, due_ns in self._due_ns.items() if due_ns <= now_ns]

    def next_due_ns(self) -> int | None:
        """Return when the next is to be read, None where none has a period."""
        return min(self._due_ns.values(), default=None)

    def read(self, name: str) -> list[Block]:
        """Return what one saw; why it is closed from now on, where it stumbled. Raises `BrokerGone`."""
        sensor = self._open.get(name)
        if sensor is None:
            return []
        if sensor.period_ns is not None:
            self._due_ns[name] = next_ns(time.monotonic_ns(), sensor.period_ns)
        try:
            return sensor.read(time.time_ns())
        except BrokerGone:
            raise
        except Exception as error:  # noqa: BLE001 one sensor that stumbles must not blind the others; it is told
            return [self._drop(name, error)]

    def notice(self, block: Block) -> None:
        """Tell those that look on demand what they may want to look at."""
        opens = isinstance(block, Packets) and bool(((block.rows["tcp_flags"] & TCP_SYN_ACK) == TCP_SYN).any())
        for name, sensor in self._open.items():
            if opens and name == "sockets":
                sensor.wake()  # type: ignore[attr-defined]
            notice: Callable[[Block], None] | None = getattr(sensor, "notice", None)
            if notice:
                notice(block)

    def close(self) -> None:
        """Give everything back."""
        for name, sensor in self._open.items():
            _close(name, sensor)

    def _opened(self, name: str) -> Sensor:
        """Return a sensor of the folder; raises whatever keeps it from looking."""
        asked = {"brief": self._brief} if name == "packets" else {}
        module = importlib.import_module(f"gpuguard.sensors.{name}")
        return cast("Sensor", module.open_sensor(self._broker, self._config, **asked))

    def _drop(self, name: str, error: Exception) -> Gap:
        """Close an eye that failed where it should not; it is tried again like one that could not be opened."""
        sensor = self._open.pop(name)
        if sensor.descriptor is not None:
            self._selector.unregister(sensor.descriptor)
        self._due_ns.pop(name, None)
        self._closed_until_ns[name] = time.monotonic_ns() + REOPEN_NS
        reason = f"failed, and is tried again in {REOPEN_NS // 1_000_000_000} s: {type(error).__name__}: {error}"
        log.error("eye failed", sensor=name, reason=reason)
        _close(name, sensor)
        self._count(name, up=False)
        now_ns = time.time_ns()
        return Gap(time_ns=now_ns, sensor=name, reason=reason, since_ns=now_ns)

    def _count(self, name: str, *, up: bool) -> None:
        if self._metrics:
            self._metrics.sensor(name, up=up)


def _close(name: str, sensor: Sensor) -> None:
    try:
        sensor.close()
    except Exception as error:  # noqa: BLE001 what one sensor cannot give back must not keep the others from it
        log.error("eye not closed", sensor=name, reason=f"{type(error).__name__}: {error}")
