"""The process eye: who was started, by whom, and when it ended.

Three sources, best first. *bpf*: raw tracepoints at fork, exec and exit (ext/bpf/processes.bpf.c), which carry start
times and arguments, so that even a process that is gone at once is named. *connector*: the kernel's proc connector
(linux/cn_proc.h), root in the first pid and network namespace only; an event there has no start time, and a process
that is gone before its /proc was read is counted in a `Gap` and not guessed. *polling*: /proc is listed again and
again; what lives shorter than the interval is not seen, and a `Gap` says so from the start.

bpf also hears who dials: `connects`. The others do not, and say so in a `Gap`.

Pids are those of the broker's pid namespace: bpf translates, in the kernel; the connector refuses any but the first.
`procfs` reads a process, `bpf` and `connector` are the sources, and `sensor` makes records of their events.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from gpuguard.messages import Answer, Found, ListProcesses, Opened, OpenProcesses, ReadProcess, Refused
from gpuguard.sensors import EyeClosed
from gpuguard.sensors.processes import bpf, connector
from gpuguard.sensors.processes.connects import ConnectRing
from gpuguard.sensors.processes.procfs import list_processes, read_process
from gpuguard.sensors.processes.sensor import NAME, ProcessSensor, why

if TYPE_CHECKING:
    from collections.abc import Iterable

    from gpuguard.config import Config
    from gpuguard.sensors.processes.connects import Connections
    from gpuguard.sensors.processes.events import Event, Source
    from gpuguard.sensors.processes.sensor import Broker

__all__ = ["NAME", "ProcessSensor", "grant", "open_sensor", "release"]


def grant(request: OpenProcesses | ListProcesses | ReadProcess) -> tuple[Answer, tuple[int, ...]]:
    """Answer what the guard asks about processes. Whoever sends the answer closes the descriptors afterwards.

    The ring can only be read and the epoll descriptor only be waited on. The connector's socket hears process events
    and, like any netlink socket, may speak to the kernel with the rights of who holds it.
    """
    match request:
        case ReadProcess():
            found = read_process(request.pid)
            return Found((found,) if found else ()), ()
        case ListProcesses():
            return list_processes(request.after_pid), ()
        case OpenProcesses():
            return _open(request.source)


def release() -> None:
    """Detach the programs; they would also end with this process."""
    bpf.detach()


def _open(source: str) -> tuple[Answer, tuple[int, ...]]:
    reasons: list[str] = []
    for name, opened in (("bpf", bpf.attach), ("connector", connector.listen)):
        if source in ("auto", name):
            try:
                return opened()
            except (OSError, ImportError) as error:
                reasons.append(f"{name}: {error}")
    if source in ("auto", "polling"):
        return Opened((), f"polling ({'; '.join(reasons)})" if reasons else "polling"), ()
    return Refused("; ".join(reasons) or f"no such source of process events: {source}"), ()


class _PollingSource:
    descriptor: int | None = None

    def events(self) -> tuple[list[Event], int | None]:
        return [], 0

    def close(self) -> None:
        pass


def open_sensor(broker: Broker, config: Config) -> ProcessSensor:
    """Open the best source of process events that this host allows; raises `EyeClosed`."""
    settings = config.processes
    answer, descriptors = broker.ask(OpenProcesses(settings.source))
    if not isinstance(answer, Opened):
        _close_all(descriptors)
        raise EyeClosed(f"process events: {why(answer)}")
    source, connects = _source(answer, descriptors)
    return ProcessSensor(broker, source, answer.mode, settings.poll_interval_ms * 1_000_000, connects)


def _source(opened: Opened, descriptors: tuple[int, ...]) -> tuple[Source, Connections | None]:
    match opened.mode.partition(" ")[0], descriptors:
        case "bpf", (ring, waiting, *dials) if len(dials) <= 1:
            try:
                connects = ConnectRing(dials[0], opened.values["connects_bytes"]) if dials else None
                return bpf.BpfSource(ring, opened.values["ring_bytes"], waiting), connects
            except (ImportError, OSError, ValueError, KeyError) as error:
                os.close(waiting)
                raise EyeClosed(f"process events: {error}") from error
            finally:
                _close_all((ring, *dials))
        case "connector", (netlink,):
            return connector.ConnectorSource(netlink), None
        case "polling", ():
            return _PollingSource(), None
        case _:
            _close_all(descriptors)
            raise EyeClosed(f"process events: the broker answered {opened.mode} with {len(descriptors)} descriptors")


def _close_all(descriptors: Iterable[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
