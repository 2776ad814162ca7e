"""The fixed table of what the guard may ask of the broker, and the answers.

Messages are msgpack over a SOCK_SEQPACKET pair, one message a packet; file descriptors travel beside their answer by
SCM_RIGHTS. A message outside this table ends the connection. Every power that is handed over is narrowed first: see
each answer.
"""

from __future__ import annotations

from typing import Literal

from msgspec import Struct, field

from gpuguard.core.records import ActionOutcome, ProcessStarted, Sockets
from gpuguard.core.subjects import ProcessId

MESSAGE_BYTES_MAX = 192 * 1024


class Hello(Struct, frozen=True, tag="hello"):
    """First message of a guard."""

    version: int


class OpenPackets(Struct, frozen=True, tag="open_packets"):
    """Ask for a bound, running AF_PACKET TPACKET_V3 socket on one interface (or all: "").

    ``ignore`` are rules of `packet_filter`: what they name is dropped by the kernel. ``rings``: so many sockets share
    the packets, and the descriptors of each follow one another.
    """

    interface: str
    snap_bytes: int
    ring_bytes: int
    ignore: tuple[str, ...] = ()
    rings: int = 1


class OpenProcesses(Struct, frozen=True, tag="open_processes"):
    """Ask for process events by the best source that works here, or by this one only."""

    source: Literal["auto", "bpf", "connector", "polling"] = "auto"


class OpenLaunches(Struct, frozen=True, tag="open_launches"):
    """Ask for launch events of every libcuda on this host, and of ``libraries`` before anyone maps them."""

    libraries: tuple[str, ...] = ()


class ScanLaunches(Struct, frozen=True, tag="scan_launches"):
    """Ask to look for a libcuda not yet probed in the maps of these processes (all, if empty).

    What was launched after ``rows_read_ns``, of CLOCK_BOOTTIME, the guard has not read yet: no such row is swept.
    """

    pids: tuple[int, ...] = ()
    rows_read_ns: int = 0


class OpenReader(Struct, frozen=True, tag="open_reader"):
    """Ask for a process that reads GPU code without privileges; answered by our end of its socket."""


class ListProcesses(Struct, frozen=True, tag="list_processes"):
    """Ask for processes that exist now, with a pid above ``after_pid`` in order of pid; answered in pages."""

    after_pid: int = 0


class ReadProcess(Struct, frozen=True, tag="read_process"):
    """Ask for one process: argv redacted, listed environ only."""

    pid: int


class ReadSockets(Struct, frozen=True, tag="read_sockets"):
    """Ask for the sockets of the network namespace that ``pid`` is in (0: the broker's own), with their owners."""

    pid: int = 0


class ReadImage(Struct, frozen=True, tag="read_image"):
    """Ask for GPU code that the launch eye saw a process load from its memory, or from the file that it named.

    Answered by a sealed memfd. ``path`` has the tenant's own bytes, which need be no text.
    """

    process: ProcessId
    address: int
    path: bytes = b""


class Act(Struct, frozen=True, tag="act"):
    """Ask for one permitted action. The broker checks the target again, journals, acts, verifies, and answers.

    ``approved_by`` counts from an operator only; of a guard's request the broker goes by the `Approve` that it holds.
    """

    decision_id: str
    action: Literal["isolate", "throttle", "pause", "kill"]
    target: ProcessId
    cgroup: str
    cgroup_id: int
    ttl_s: float
    approved_by: str
    reason: str


class Approve(Struct, frozen=True, tag="approve"):
    """Tell the broker that a person approves one decision about one process. For operators: a guard cannot approve."""

    decision_id: str
    target: ProcessId
    by: str
    reason: str


class Undo(Struct, frozen=True, tag="undo"):
    """Ask to undo one action, or everything (decision_id "")."""

    decision_id: str
    reason: str


class ListActions(Struct, frozen=True, tag="list_actions"):
    """Ask what is in force."""


class Disarm(Struct, frozen=True, tag="disarm"):
    """Turn enforcement off until the next start, and undo everything."""

    reason: str


class Watching(Struct, frozen=True, tag="watching"):
    """Tell, every few seconds, that the guard's loop turns; ``status`` is a line on what it sees, for people."""

    status: str


class Audit(Struct, frozen=True, tag="audit"):
    """Ask to append one entry to the audit log."""

    time_ns: int
    kind: str
    body: dict[str, object]


Request = (
    Hello
    | OpenPackets
    | OpenProcesses
    | OpenLaunches
    | ScanLaunches
    | OpenReader
    | ListProcesses
    | ReadProcess
    | ReadSockets
    | ReadImage
    | Act
    | Approve
    | Undo
    | ListActions
    | Disarm
    | Watching
    | Audit
)


class Welcome(Struct, frozen=True, tag="welcome"):
    """Answer to `Hello`: who the broker is and which eyes it can open ("" open, else why not)."""

    boot_id: str
    hostname: str
    clock_ticks_per_s: int
    enforcing: bool
    eyes: dict[str, str]


class Opened(Struct, frozen=True, tag="opened"):
    """A handle was opened; its descriptors come beside this answer, named in order by ``descriptors``."""

    descriptors: tuple[str, ...]
    mode: str
    values: dict[str, int] = field(default_factory=dict)


class Found(Struct, frozen=True, tag="found"):
    """One page of processes; ``more`` is the pid to go on after, 0 at the end."""

    processes: tuple[ProcessStarted, ...]
    more: int = 0


class SocketsRead(Struct, frozen=True, tag="sockets_read"):
    """Sockets of one namespace."""

    sockets: Sockets


class Acted(Struct, frozen=True, tag="acted"):
    """What became of an `Act`, `Undo` or `Disarm`, or the list of what is in force."""

    outcomes: tuple[ActionOutcome, ...]


class Done(Struct, frozen=True, tag="done"):
    """Done, and there is nothing to say."""


class Refused(Struct, frozen=True, tag="refused"):
    """It could not be, or may not be, done; ``reason`` is for people."""

    reason: str


Answer = Welcome | Opened | Found | SocketsRead | Acted | Done | Refused
