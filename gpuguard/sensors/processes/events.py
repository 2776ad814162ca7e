"""What a source of process events says, whichever it is."""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple, Protocol

#: Events taken in one `read`; the rest wait in the kernel, where what does not fit is counted.
EVENTS_MAX = 256


class Kind(IntEnum):
    """As in ext/bpf/processes.bpf.c."""

    FORK = 1
    EXEC = 2
    EXIT = 3


class Event(NamedTuple):
    """What a source says of one moment. None: this source cannot say."""

    kind: Kind
    time_ns: int
    pid: int
    start_ticks: int | None = None
    parent_pid: int = 0
    parent_start_ticks: int | None = None
    exit_status: int | None = None
    #: False for an exit of the connector that may be of one thread only.
    whole: bool = True
    name: str = ""
    uid: int = -1
    netns: int = 0
    cgroup_id: int = 0
    #: Redacted.
    argv: tuple[str, ...] = ()


class Source(Protocol):
    """Where events come from."""

    descriptor: int | None

    def events(self) -> tuple[list[Event], int | None]:
        """Return some events, and how many were lost since the last call (None: some)."""
        ...

    def close(self) -> None:
        """Give the handles back."""
        ...
