"""``gpuguard pcap``: what the guard says of the conversations in capture files."""

from __future__ import annotations

import ipaddress
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gpuguard.cli.arguments import policy_of
from gpuguard.cli.output import Summary, complain, exit_status, worst, write_line, write_summary
from gpuguard.core.events import FlowReport, FlowReports
from gpuguard.core.labels import VERDICTS, Verdict
from gpuguard.core.policy import DEFAULT_POLICY
from gpuguard.core.records import SCHEMA_VERSION, Gap, HostInfo, Tick
from gpuguard.ui.markup import visible

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np

    from gpuguard.core.events import Event
    from gpuguard.core.policy import Policy

Line = dict[str, object]

#: Dull flows are told by the array. Ones that ended at once come in arrays of thousands, others one by one.
_HELD_ROWS = 16_384
_HELD_ARRAYS = 256
#: What a file may say of what was not seen in it: a hostile one must not make each of its lines grow.
_GAPS_MAX = 32
_MORE_GAPS = "and more that was not seen"
#: Datagrams and messages of ICMP have none.
_UNOPENED = "the opening of the flow was not captured"
_TCP = 6
_PROTOCOLS = {1: "icmp", _TCP: "tcp", 17: "udp", 58: "icmpv6"}


@click.command()
@click.argument("files", metavar="FILE...", nargs=-1, required=True, type=click.Path(readable=False, path_type=Path))
@click.option("-o", "--output", type=click.Choice(["table", "json"]), default="table", show_default=True,
              help="json: one flow a line and a summary; table: what was found, for people.")
@click.option("--policy", "policy_files", type=click.Path(exists=True, path_type=Path), multiple=True,
              help="Judge by this policy file, of which egress rules matter here. May be repeated.")
@click.option("--host", "hosts", metavar="ADDR", multiple=True,
              help="An address of the host that is judged: connections into it are not its own doing. May be repeated.")
def command(files: tuple[Path, ...], output: str, policy_files: tuple[Path, ...], hosts: tuple[str, ...]) -> None:
    """Judge every conversation in FILE... (pcap, pcapng, gzipped or not; - is standard input).

    \b
    Examples:
      gpuguard pcap capture.pcap
      gpuguard pcap *.pcapng.gz -o json | jq 'select(.verdict == "confirmed")'
      gpuguard pcap capture.pcap --host 10.0.0.7 --host 2001:db8::7
      gpuguard pcap capture.pcap --policy egress.yaml
      tcpdump -i any -w - -c 100000 | gpuguard pcap -

    Exit status: 0 clear, 1 found, 3 could not read all of it, 2 wrong usage.
    """
    addresses = tuple(_address(host) for host in hosts)
    policy = policy_of(policy_files) if policy_files else DEFAULT_POLICY
    tally = _Tally()
    for file in files:
        for line in judge(file, addresses, tally, dull=output == "json", policy=policy):
            if output == "json":
                write_line(line)
    if output == "json":
        write_summary(tally.summary())
    else:
        _print(tally)
    raise SystemExit(exit_status(tally.summary(), unreadable=bool(tally.unreadable)))


class _Tally:
    """What the summary needs of all lines; the lines themselves are not kept, but for what an operator must see."""

    def __init__(self) -> None:
        self.counts: dict[Verdict, int] = dict.fromkeys(VERDICTS, 0)
        self.labels: dict[tuple[str, str], int] = {}
        self.worst: list[Line] = []
        self.found: list[Line] = []
        self.gaps: set[str] = set()
        self.unreadable: list[str] = []

    def add_dull(self, verdict: Verdict, times: int) -> None:
        """Count flows in which nothing was seen."""
        from gpuguard.core.fusion import probability

        if times:
            self.add({"label": "other", "verdict": verdict, "probability": probability(0.0), "evidence": []}, verdict)
            self.counts[verdict] += times - 1
            self.labels["other", verdict] += times - 1

    def add(self, line: Line, verdict: Verdict) -> None:
        self.counts[verdict] += 1
        key = (str(line["label"]), verdict)
        self.labels[key] = self.labels.get(key, 0) + 1
        top = worst([*self.worst, line])
        self.worst = [dict(top)] if top else []
        if verdict in ("suspect", "confirmed") and len(self.found) < 1_000:
            self.found.append(line)

    def summary(self) -> Summary:
        top = self.worst[0] if self.worst else {"verdict": "unknown", "label": "", "probability": 0.0, "evidence": []}
        return Summary(
            verdict=top["verdict"],  # type: ignore[arg-type]
            label=str(top["label"]),
            probability=float(top["probability"]),  # type: ignore[arg-type]
            evidence=top["evidence"],  # type: ignore[arg-type]
            counts={str(verdict): count for verdict, count in self.counts.items()},
            gaps=sorted(self.gaps),
        )


def judge(file: Path, addresses: tuple[str, ...], tally: _Tally, *, dull: bool = True,
          policy: Policy = DEFAULT_POLICY) -> Iterator[Line]:
    """Yield one line for each flow of a file as it ends; say on stderr what could not be read, and go on.

    Where the ``dull`` ones are not asked for, they are counted only.
    """
    name = visible(str(file))
    gaps: list[str] = []
    held: list[FlowReports] = []
    rows = 0
    for event in _events(file, addresses, tally, gaps, policy):
        if isinstance(event, Gap):
            _add_gap(gaps, event)
        if isinstance(event, FlowReports):
            held.append(event)
            rows += len(event.closed.rows)
        full = rows >= _HELD_ROWS or len(held) >= _HELD_ARRAYS
        if held and (full or (dull and isinstance(event, FlowReport))):
            yield from _dull(name, held, tally, gaps, told=dull)
            held, rows = [], 0
        if isinstance(event, FlowReport):
            line = _line(name, event, gaps)
            tally.add(line, event.finding.verdict)
            yield line
    if held:
        yield from _dull(name, held, tally, gaps, told=dull)
    tally.gaps.update(gaps)


def _add_gap(gaps: list[str], gap: Gap) -> None:
    """Keep what a gap says, once, and not without end."""
    text = visible(f"{gap.sensor}: {gap.reason}") if len(gaps) < _GAPS_MAX else _MORE_GAPS
    if text not in gaps:
        gaps.append(text)


def _dull(name: str, held: list[FlowReports], tally: _Tally, gaps: list[str], *, told: bool) -> Iterator[Line]:
    """Count flows in which nothing was seen, and yield their lines if they are to be told."""
    import numpy as np

    from gpuguard.core.unspoken import unspoken_clear, unspoken_verdicts

    # By their bytes: concatenate() takes 100 microseconds for each array that has fields.
    rows = np.frombuffer(b"".join(one.closed.rows.tobytes() for one in held), held[0].closed.rows.dtype)
    clear = int(unspoken_clear(rows).sum())
    tally.add_dull("clear", clear)
    tally.add_dull("unknown", len(rows) - clear)
    if told:
        yield from _dull_lines(name, rows, unspoken_verdicts(rows), gaps)


def _events(file: Path, addresses: tuple[str, ...], tally: _Tally, gaps: list[str], policy: Policy) -> Iterator[Event]:
    """Drive one guard over one file. Ticks follow the packets' own time."""
    from gpuguard.core.guard import Guard
    from gpuguard.core.ticking import ticked
    from gpuguard.sensors.packets import CaptureError, read_capture

    guard = Guard(policy, quiet=True, together=_HELD_ROWS)
    now_ns = 0
    source = sys.stdin.buffer if file == Path("-") else file
    if addresses:
        guard.receive(HostInfo(time_ns=0, schema_version=SCHEMA_VERSION, boot_id="", hostname="", clock_ticks_per_s=100,
                               addresses=addresses))
    try:
        for block in ticked(read_capture(source, brief=not policy.egress)):
            if isinstance(block, Gap):
                _add_gap(gaps, block)
                continue
            now_ns = max(now_ns, block.time_ns)
            yield from guard.receive(block)
    except CaptureError as error:  # its text has already come as a gap
        complain(f"gpuguard: {error}")
        tally.unreadable.append(str(file))
    yield from guard.receive(Tick(time_ns=now_ns))
    yield from guard.close(now_ns)


def _line(name: str, report: FlowReport, gaps: list[str]) -> Line:
    closed, finding = report.closed, report.finding
    flow = closed.flow
    decided = finding.decided_after_s if finding.verdict != "unknown" and finding.evidence else None
    return {
        "file": name,
        "proto": _PROTOCOLS.get(flow.protocol, str(flow.protocol)),
        "initiator": _end(flow.initiator, flow.initiator_port),
        "responder": _end(flow.responder, flow.responder_port),
        "packets": closed.packets,
        "bytes": closed.payload_bytes_initiator + closed.payload_bytes_responder,
        "start_ns": flow.start_ns,
        "duration_s": max(0, closed.last_ns - flow.start_ns) / 1e9,
        "label": finding.label,
        "carrier": finding.carrier or closed.carrier,
        "verdict": finding.verdict,
        "probability": finding.probability,
        "decided_after_s": decided,
        "decided_after_packets": finding.decided_after_packets if decided is not None else None,
        "evidence": [
            {"class": one.evidence_class, "text": one.text, "nats": one.nats}
            for one in (*finding.evidence, *finding.counter_evidence)
        ],
        "gaps": [*gaps, *((_UNOPENED,) if flow.protocol == _TCP and not flow.initiator_known else ())],
    }


def _dull_lines(name: str, rows: np.ndarray, verdicts: list[Verdict], gaps: list[str]) -> Iterator[Line]:
    """Yield what `_line` makes of the reports of these flows, without making the reports: there may be millions."""
    from gpuguard.core.addresses import address_text
    from gpuguard.core.flows import carrier_of
    from gpuguard.core.fusion import probability

    odds = probability(0.0)
    opened, unopened = [*gaps], [*gaps, _UNOPENED]
    for row, verdict in zip(rows.tolist(), verdicts, strict=True):
        (_, start_ns, _, near, near_port, far, far_port, protocol, known, _, carrier, _, packets, near_bytes,
         far_bytes, _, _, _, last_ns) = row
        yield {
            "file": name,
            "proto": _PROTOCOLS.get(protocol) or str(protocol),
            "initiator": _end(address_text(near), near_port),
            "responder": _end(address_text(far), far_port),
            "packets": packets,
            "bytes": near_bytes + far_bytes,
            "start_ns": start_ns,
            "duration_s": max(0, last_ns - start_ns) / 1e9,
            "label": "other",
            "carrier": carrier_of(protocol, carrier),
            "verdict": verdict,
            "probability": odds,
            "decided_after_s": None,
            "decided_after_packets": None,
            "evidence": [],
            "gaps": unopened if protocol == _TCP and not known else opened,
        }


def _end(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def _address(text: str) -> str:
    """Return an address in the form that flows use, RFC 5952."""
    try:
        address = ipaddress.ip_address(text.partition("%")[0])  # no packet bears the scope of an address
    except ValueError as error:
        raise click.BadParameter(f"{text!r} is not an IPv4 or IPv6 address", param_hint="--host") from error
    return str(getattr(address, "ipv4_mapped", None) or address)


def _print(tally: _Tally) -> None:
    from rich.console import Console
    from rich.table import Table

    from gpuguard.cli.tables import escape

    console = Console()
    if tally.found:
        table = Table(title="What an operator should see")
        table.add_column("what", no_wrap=True)
        table.add_column("flow", overflow="fold")
        table.add_column("why", overflow="fold", ratio=1)
        for line in tally.found:
            reasons = "\n".join(escape(str(one["text"])) for one in line["evidence"])  # type: ignore[attr-defined]
            after = line["decided_after_s"]
            delay = f"\nafter {after:.1f} s" if isinstance(after, float) else ""
            what = f"{line['verdict']}\n{line['label']}\nover {line['carrier']}{delay}"
            ends = escape(str(line["initiator"])), escape(str(line["responder"]))
            flow = f"{ends[0]} ->\n{ends[1]}\n{escape(Path(str(line['file'])).name)}"
            table.add_row(what, flow, reasons)
        console.print(table)
    if tally.labels:
        counted = Table("label", "verdict", "flows", title="All flows")
        for (label, verdict), count in sorted(tally.labels.items()):
            counted.add_row(label, verdict, str(count))
        console.print(counted)
    else:
        console.print("no flow was read")
    for gap in sorted(tally.gaps):
        console.print(f"not seen: {gap}", markup=False, highlight=False)
