"""Who a pid is: a pid that NVML lists, named by the broker and remembered while its start time stays the same."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from gpuguard.core.records import Gap
from gpuguard.messages import Answer, Found, ReadProcess, Request
from gpuguard.sensors import is_due

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gpuguard.core.subjects import ProcessId

#: A pid that nobody could name is asked about again, in case it had only just begun.
UNNAMED_RETRY_NS = 10_000_000_000


class Broker(Protocol):
    """What this sensor needs of the broker's client."""

    def ask(self, request: Request) -> tuple[Answer, Sequence[int]]:
        """Send one request and return its answer."""
        ...


class Names:
    """Pid to process, remembered while NVML lists the pid and its start time stays the same."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._known: dict[int, ProcessId] = {}
        self._unnamed_ns: dict[int, int] = {}

    def process(self, pid: int, now_ns: int, gaps: list[Gap]) -> ProcessId | None:
        """Return who has this pid, None with one `Gap` if nobody can say."""
        known = self._known.get(pid)
        if known and start_ticks(pid) == known.start_ticks:
            return known
        asked_ns = self._unnamed_ns.get(pid)
        if asked_ns is not None and not is_due(now_ns, asked_ns, UNNAMED_RETRY_NS):
            return None
        answer, _ = self._broker.ask(ReadProcess(pid=pid))
        if isinstance(answer, Found) and answer.processes:
            self._unnamed_ns.pop(pid, None)
            self._known[pid] = answer.processes[0].process
            return self._known[pid]
        self._known.pop(pid, None)
        if pid not in self._unnamed_ns:
            why = getattr(answer, "reason", "") or "no such process here"
            gaps.append(Gap(now_ns, "nvml", f"NVML lists pid {pid}, and nobody can say who that is: {why}"))
        self._unnamed_ns[pid] = now_ns
        return None

    def keep(self, pids: set[int]) -> None:
        """Forget every pid that NVML does not list any more."""
        for table in (self._known, self._unnamed_ns):
            for pid in table.keys() - pids:
                table.pop(pid)


def start_ticks(pid: int) -> int | None:
    """Return field 22 of /proc/PID/stat, proc(5), None if it cannot be read."""
    try:
        with Path(f"/proc/{pid}/stat").open("rb") as file:
            return parse_start_ticks(file.read(4096))
    except OSError:
        return None


def parse_start_ticks(stat: bytes) -> int | None:
    """Return starttime of a line of /proc/PID/stat; the name is the process's own and may hold spaces and brackets."""
    fields = stat[stat.rfind(b")") + 1 :].split()
    return int(fields[19]) if len(fields) > 19 and fields[19].isdigit() else None
