"""The tool-call eye: what agents say that they do, from OTLP spans (`receiver`) and from JSON lines (`files`).

What a tool call looks like in either is in `dialects`. All of this is the agent's word: it joins records, it clears
nobody. A pid is believed only where the broker finds such a process now, with a command line, older than the end of the
call, and, if a span named it, in our own network namespace (over loopback a span can have come from no other); a pid of
a container's own namespace fails this or names nobody.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import msgspec

from gpuguard.core.records import Block, Gap
from gpuguard.messages import Answer, Found, ReadProcess, Request
from gpuguard.redaction import printable
from gpuguard.sensors import EyeClosed
from gpuguard.sensors.toolcalls.dialects import Heard, parse_line
from gpuguard.sensors.toolcalls.files import LINE_BYTES_MAX, Follower
from gpuguard.sensors.toolcalls.receiver import Queue, Receiver, listen_address

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from gpuguard.config import Config
    from gpuguard.core.records import ProcessStarted
    from gpuguard.core.subjects import ProcessId

NAME = "toolcalls"
TAKEN_MAX = 1024
FILES_PERIOD_NS = 200_000_000


class Broker(Protocol):
    """What this sensor needs of the broker's client."""

    def ask(self, request: Request) -> tuple[Answer, tuple[int, ...]]:
        """Send one request and return its answer with the descriptors beside it."""
        ...


class ToolCallSensor:
    """Hands out what agents reported, each with the process that it names if that is who it can be."""

    name = NAME

    def __init__(self, broker: Broker, listen: str, files: Iterable[str], clock_ns: Callable[[], int]) -> None:
        self._broker = broker
        self._queue = Queue()
        self.descriptor: int | None = self._queue.descriptor
        try:
            self._receiver = Receiver(listen_address(listen), self._queue, clock_ns) if listen else None
        except (EyeClosed, ImportError):
            self._queue.close()
            raise
        self.port = self._receiver.port if self._receiver else None
        self._followers = [Follower(Path(path)) for path in files]
        self.period_ns: int | None = FILES_PERIOD_NS if self._followers else None
        self._netns: int | None = None
        self._told: dict[Path, str] = {}

    def read(self, now_ns: int) -> list[Block]:
        """Return what was reported since the last call."""
        blocks: list[Block] = []
        for follower in self._followers:
            blocks += self._follow(follower, now_ns)
        taken, lost = self._queue.take(TAKEN_MAX)
        asked: dict[int, ProcessStarted | None] = {}
        for heard in taken:
            blocks.append(msgspec.structs.replace(heard.call, process=self._process(heard, asked)))
        blocks += [Gap(now_ns, NAME, reason, lost=count) for reason, count in lost.items()]
        return blocks

    def close(self) -> None:
        """Stop listening and close everything."""
        if self._receiver:
            self._receiver.close()
        for follower in self._followers:
            follower.close()
        self._queue.close()
        self.descriptor = None

    def _follow(self, follower: Follower, now_ns: int) -> list[Block]:
        blocks: list[Block] = []
        lines, too_long = follower.lines()
        if follower.trouble and follower.trouble != self._told.get(follower.path):
            blocks.append(Gap(now_ns, NAME, f"{follower.path}: {follower.trouble}", since_ns=now_ns))
        self._told[follower.path] = follower.trouble
        heard: list[Heard] = []
        wrong, why = 0, ""
        for line in lines:
            try:
                heard.append(parse_line(line, now_ns))
            except (ValueError, RecursionError) as error:
                wrong, why = wrong + 1, str(error)
        self._queue.put(heard)
        if wrong:
            blocks.append(Gap(now_ns, NAME, f"{follower.path}: not a tool call: {printable(why[:200])}", lost=wrong))
        if too_long:
            reason = f"{follower.path}: line of more than {LINE_BYTES_MAX} bytes"
            blocks.append(Gap(now_ns, NAME, reason, lost=too_long))
        return blocks

    def _process(self, heard: Heard, asked: dict[int, ProcessStarted | None]) -> ProcessId | None:
        if heard.pid is None:
            return None
        if heard.pid not in asked:
            asked[heard.pid] = self._ask(heard.pid)
        found = asked[heard.pid]
        if found is None or not found.argv or found.time_ns > (heard.call.end_ns or heard.call.time_ns):
            return None
        if not heard.is_local:
            return found.process
        if self._netns is None:
            own = self._ask(os.getpid())
            self._netns = own.netns if own else None
        return found.process if found.netns == self._netns else None

    def _ask(self, pid: int) -> ProcessStarted | None:
        answer, _ = self._broker.ask(ReadProcess(pid))
        return answer.processes[0] if isinstance(answer, Found) and answer.processes else None


def open_sensor(broker: Broker, config: Config) -> ToolCallSensor:
    """Listen and follow as the settings say; raises `EyeClosed`."""
    settings = config.toolcalls
    if not settings.otlp_listen and not settings.files:
        raise EyeClosed("neither toolcalls.otlp_listen nor toolcalls.files is set")
    try:
        return ToolCallSensor(broker, settings.otlp_listen, settings.files, time.time_ns)
    except ImportError as error:
        raise EyeClosed(f"OTLP needs grpcio and opentelemetry-proto, readable by the guard's user: {error}") from error
