"""What the guard makes of the lab's captures, scenario by scenario, beside what was true.

Truth comes from the labels alone and reaches the guard in no way: it is given packets, and the node's address; or,
as on a live host, the node's sockets beside them.
"""

from __future__ import annotations

import csv
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from gpuguard.core.addresses import address_text
from gpuguard.core.events import Finding, FlowReport
from gpuguard.core.flows import FlowTable
from gpuguard.core.guard import Guard
from gpuguard.core.labels import LABELS, VERDICTS
from gpuguard.core.network import LISTEN_STATE
from gpuguard.core.observations import Exchange, FlowUse
from gpuguard.core.records import SCHEMA_VERSION, Gap, HostInfo, Packets, Socket, Sockets, Tick
from gpuguard.core.subjects import FlowId
from gpuguard.core.ticking import ticked
from gpuguard.lab import link, peers
from gpuguard.sensors.packets import read_capture

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

ACCUSING = ("suspect", "confirmed")
REVERSE = ("ssh-reverse-tunnel", "ssh-reverse-shell")
#: Uses of a tunnel that are a shell: someone types in it, or sends commands.
SHELLS = ("inner", "chaff", "pty", "line")

SHELL_EXCHANGES_MAX = 10

_TCP = 6
#: What listens on the node besides SSH: a shell on a terminal, one on a socket, files.
_TARGET_PORTS = (7001, 7002, 7003)


class Judged(NamedTuple):
    """One scenario: its line of the labels, and what was told of its flows."""

    truth: dict[str, str]
    label: str
    verdict: str
    worst: str
    #: What the grammar said.
    uses: tuple[str, ...]
    tunnel_ns: int | None
    confirmed_ns: int | None
    shell_ns: int | None
    #: When any label that accuses was first told.
    first_ns: int | None
    #: How often the far side had broken the silence when the shell was named, or in all where it was not.
    exchanges: int
    flows: tuple[str, ...]

    @property
    def name(self) -> str:
        """What to call it in a list."""
        one = self.truth
        return " ".join(filter(None, (one["family"], one["suite"], one["server"], one["through"])))

    @property
    def requested_in_time(self) -> bool:
        """Whether a reverse tunnel was named before it was used."""
        used_ns = int(self.truth["used_ns"])
        return self.tunnel_ns is not None and (not used_ns or self.tunnel_ns < used_ns)

    @property
    def right(self) -> bool:
        """Whether the label is the expected one and nobody is accused wrongly."""
        expected = self.truth["expected"].split("|")
        accused = self.worst in ACCUSING
        return self.label in expected and accused == LABELS[self.label].accuses


def read_labels(folder: Path) -> list[dict[str, str]]:
    """Return the lines of a corpus' labels that played without a problem."""
    with (folder / "LABELS.tsv").open(encoding="utf-8") as file:
        return [row for row in csv.DictReader(file, delimiter="\t") if not row["problem"]]


def judge_corpus(folder: Path, only: str = "", *, listed: bool = False) -> Iterator[Judged]:
    """Judge each scenario of a corpus, file by file; ``listed``: with the sockets that the node had."""
    by_file: dict[str, list[dict[str, str]]] = {}
    for row in read_labels(folder):
        if only in row["family"]:
            by_file.setdefault(row["file"], []).append(row)
    for name, rows in by_file.items():
        rtt_ms = float(rows[0].get("rtt_ms_median") or 2 * link.DELAY_NS / 1e6)
        sockets = _sockets(folder / name, round(1_000 * rtt_ms)) if listed else None
        findings, reports, seen = _watch(folder / name, sockets)
        for row in rows:
            address = row["address"]
            yield _judged(row, [one for one in findings if _of(one, address)],
                          [one for one in reports if address in (one.closed.flow.initiator, one.closed.flow.responder)],
                          [one for one in seen if address in (one.flow.initiator, one.flow.responder)])


def _of(finding: Finding, address: str) -> bool:
    flow = finding.subject
    return isinstance(flow, FlowId) and address in (flow.initiator, flow.responder)


def _sockets(path: Path, rtt_us: int) -> Sockets:
    """Return what INET_DIAG would have listed on the node: its end of every TCP connection, and what listens there."""
    ends: dict[tuple[int, str, int], None] = {}
    for block in read_capture(path):
        if isinstance(block, Packets):
            rows = block.rows[block.rows["protocol"] == _TCP]
            for row in rows[["source", "source_port", "destination", "destination_port"]].tolist():
                source, destination = address_text(bytes(row[0])), address_text(bytes(row[2]))
                if link.NODE in (source, destination):
                    ends[(row[1], destination, row[3]) if source == link.NODE else (row[3], source, row[1])] = None
    open_here = [Socket(_TCP, link.NODE, port, far, far_port, 1, number + 1, 0, min_rtt_us=rtt_us)
                 for number, (port, far, far_port) in enumerate(ends)]
    listen = [Socket(_TCP, "0.0.0.0", port, "0.0.0.0", 0, LISTEN_STATE, 0, 0)  # noqa: S104
              for port in (*peers.SERVER_PORTS.values(), *_TARGET_PORTS)]
    return Sockets(time_ns=0, netns=0, sockets=(*listen, *open_here))


def _watch(path: Path, sockets: Sockets | None = None,
           ) -> tuple[list[Finding], list[FlowReport], list[Exchange | FlowUse]]:
    """Drive one guard over one file, and a flow table beside it, whose exchanges and uses are kept."""
    guard, table = Guard(), FlowTable()
    events = guard.receive(HostInfo(time_ns=0, schema_version=SCHEMA_VERSION, boot_id="", hostname="",
                                    clock_ticks_per_s=100, addresses=(link.NODE,)))
    seen: list[Exchange | FlowUse] = []
    now_ns = 0
    for block in ticked(read_capture(path)):
        if isinstance(block, Gap):
            continue
        if isinstance(block, Packets):
            seen += [one for one in table.receive(block) if isinstance(one, Exchange | FlowUse)]
            now_ns = max(now_ns, int(block.rows["time_ns"].max()) if len(block.rows) else 0)
            if sockets:
                events += guard.receive(msgspec.structs.replace(sockets, time_ns=now_ns))
        events += guard.receive(block)
    events += guard.receive(Tick(time_ns=now_ns))
    events += guard.close(now_ns)
    return ([one for one in events if isinstance(one, Finding)],
            [one for one in events if isinstance(one, FlowReport)], seen)


def _judged(row: dict[str, str], findings: list[Finding], reports: list[FlowReport],
            seen: list[Exchange | FlowUse]) -> Judged:
    ends = sorted((one.finding for one in reports), key=lambda one: (VERDICTS.index(one.verdict), one.nats))
    biggest = max(reports, key=lambda one: one.closed.packets, default=None)
    main = ends[-1] if ends and ends[-1].verdict in ACCUSING else biggest.finding if biggest else None
    told = [one for one in findings if one.verdict in ACCUSING]

    def first(*labels: str, verdicts: tuple[str, ...] = ACCUSING) -> int | None:
        times = [one.time_ns for one in told if one.label in labels and one.verdict in verdicts]
        return min(times, default=None)

    shell_ns = first("ssh-reverse-shell", "reverse-shell")
    led = [one for one in seen if isinstance(one, Exchange) and one.first == "responder"
           and one.time_ns >= int(row["used_ns"] or 0)]
    return Judged(
        truth=row,
        label=main.label if main else "",
        verdict=main.verdict if main else "",
        worst=ends[-1].verdict if ends else "",
        uses=tuple(sorted({one.use for one in seen if isinstance(one, FlowUse)})),
        tunnel_ns=first(*REVERSE),
        confirmed_ns=first(*REVERSE, verdicts=("confirmed",)),
        shell_ns=shell_ns,
        first_ns=min((one.time_ns for one in told), default=None),
        exchanges=sum(shell_ns is None or one.time_ns <= shell_ns for one in led),
        flows=tuple(f"{end.label}:{end.verdict}" for end in ends),
    )


class Score(NamedTuple):
    """Counts of one part of the corpus."""

    reverse: int
    confirmed_before_use: int
    named_before_use: int
    unnamed: int
    shells: int
    shells_named: int
    shells_in_ten: int
    uses: int
    uses_seen: int
    benign: int
    benign_right: int
    accused: int


def score(judged: list[Judged]) -> Score:
    """Count requests named before use, uses, shells within ten exchanges, and the names of everything else."""
    reverse = [one for one in judged if one.truth["expected"] == "ssh-reverse-tunnel"]
    shells = [one for one in reverse if one.truth["through"] in SHELLS]
    uses = [one for one in reverse if one.truth["through"]]
    rest = [one for one in judged if one.truth["expected"] != "ssh-reverse-tunnel"]
    in_time = [one for one in reverse if one.requested_in_time]
    used = [(one, int(one.truth["used_ns"])) for one in in_time]
    innocent = [one for one in rest if not any(LABELS[label].accuses for label in one.truth["expected"].split("|"))]
    return Score(
        reverse=len(reverse),
        confirmed_before_use=sum(one.confirmed_ns is not None and (not used_ns or one.confirmed_ns < used_ns)
                                 for one, used_ns in used),
        named_before_use=len(in_time),
        unnamed=sum(one.tunnel_ns is None for one in reverse),
        shells=len(shells),
        shells_named=sum(one.shell_ns is not None for one in shells),
        shells_in_ten=sum(one.shell_ns is not None and one.exchanges <= SHELL_EXCHANGES_MAX for one in shells),
        uses=len(uses),
        uses_seen=sum("ssh-reverse-channel-open" in one.uses for one in uses),
        benign=len(rest),
        benign_right=sum(one.right for one in rest),
        accused=sum(one.worst in ACCUSING for one in innocent),
    )
