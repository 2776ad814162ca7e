"""``gpuguard classify``: judge recorded launches or counters as the running guard would have judged them live."""

from __future__ import annotations

import csv
import io
import sys
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gpuguard.cli.arguments import finite
from gpuguard.cli.output import (
    EXIT_UNREADABLE,
    Summary,
    complain,
    exit_status,
    reason_of,
    worst,
    write_line,
    write_summary,
)
from gpuguard.counters import judging, reading
from gpuguard.counters.judging import Episode
from gpuguard.counters.shipped import shipped_model
from gpuguard.counters.table import Table, Unreadable
from gpuguard.counters.unpacking import Unpacked
from gpuguard.launches.judging import Line, judge
from gpuguard.launches.reading import Recorded, read_launches
from gpuguard.ui.markup import visible

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import BinaryIO

    from gpuguard.core.events import Finding
    from gpuguard.counters.reading import Telemetry

#: What is looked at to know what a file is.
PEEKED = 4096
LINE_BYTES_MAX = 64 * 1024
EVIDENCE_SHOWN = 16
PARQUET = b"PAR1"
#: What begins a text that PowerShell wrote.
UTF_16 = (b"\xff\xfe", b"\xfe\xff")


def summarise(lines: list[Line], finding: Finding | None, gaps: list[str]) -> Summary:
    """Return the last line: the worst that any window came to."""
    as_maps: list[dict[str, object]] = [
        {"verdict": line.verdict, "label": line.label, "probability": line.probability} for line in lines]
    top = worst(list(as_maps)) or {"verdict": "unknown", "label": "", "probability": 0.0}
    counts = Counter[str](line.verdict for line in lines)
    shown = [*finding.evidence, *finding.counter_evidence] if finding else []
    evidence = [
        {"class": one.evidence_class, "kind": one.kind, "nats": round(one.nats, 2), "text": one.text} for one in shown]
    return Summary(
        verdict=top["verdict"], label=str(top["label"]), probability=top["probability"],  # type: ignore[arg-type]
        evidence=evidence, counts=dict(counts), gaps=gaps)


def _read(file: BinaryIO) -> Recorded | Telemetry:
    """Return the launches or the counters of a file, gzipped or not. Raises Unreadable."""
    unpacked = Unpacked(file)
    source = io.BufferedReader(unpacked, PEEKED)
    begin = source.peek(PEEKED)
    if begin.startswith(PARQUET):
        return reading.read_parquet(source.read())
    if unpacked.cut and not begin:
        raise Unreadable("the gzip file ends before anything in it")
    utf_16 = begin.startswith(UTF_16)
    if b"\0" in begin and not utf_16:
        raise Unreadable("neither text nor Parquet")
    table = Table(io.TextIOWrapper(source, "utf-16" if utf_16 else "utf-8-sig", "replace", newline=""))
    recorded = reading.read_csv(table) if reading.is_telemetry(table.header) else read_launches(table)
    if unpacked.cut:
        recorded.gaps.append("the gzip file is cut short: what comes after its last whole block is lost")
    return recorded


def judge_counters(telemetry: Telemetry, alarms_per_gpu_year: float) -> tuple[list[Episode], Summary]:
    """Return what became of counters."""
    judged = judging.judge(reading.blocks_of(telemetry), shipped_model(), alarms_per_gpu_year)
    return judged.episodes, _summarise_counters(judged, [*telemetry.gaps, *judged.gaps])


def _summarise_counters(judged: judging.Judged, gaps: list[str]) -> Summary:
    """Return the last line: the worst episode, with what was found on its device."""
    lines: list[Mapping[str, object]] = [
        {"verdict": one.verdict, "probability": one.probability, "label": one.label, "device": one.device}
        for one in judged.episodes]
    top = worst([one for one in lines if one["verdict"] != "unknown"]) or worst(lines) or {}
    counts = Counter[str](one.verdict for one in judged.episodes)
    evidence = [judging.told(one) for one in judged.evidence.get(str(top.get("device")), [])][-EVIDENCE_SHOWN:]
    short = sum(not one.looks for one in judged.episodes)
    if short:
        gaps = [*gaps, f"{short} devices have too few samples for one look"]
    return Summary(top["verdict"], str(top["label"]), top["probability"], evidence,  # type: ignore[arg-type]
                   dict(counts), gaps)


@click.command()
@click.argument("file")
@click.option("-o", "--output", type=click.Choice(["table", "json"]), default="table", show_default=True)
@click.option("--alarms-per-gpu-year", type=click.FloatRange(1e-9, 1e4), callback=finite, default=10.0,
              show_default=True,
              help="Counters: false alarms to accept of a GPU that does nothing but compute of unknown kinds.")
def command(file: str, output: str, alarms_per_gpu_year: float) -> None:
    """Judge recorded kernel launches (one line a second) or counters (one line a device and episode), and sum up.

    FILE is CSV, plain or gzipped ("-": standard input). Launches: the columns t_host_us and t_dev_us (one is enough),
    name, gx gy gz bx by bz, shmem, launch_api. Counters, also as Parquet (extra `parquet`): timestamp, gpu, gpu_model,
    and any of power_w, gpu_util_pct, sm_active, tensor_active, dram_active, pcie_rx_bytes_s and so on, at any rate.
    What is missing weighs nothing. Exit status: 0 clear, 1 found, 3 could not read.

    \b
    gpuguard classify trace.csv.gz
    gpuguard classify trace.csv -o json | jq .summary.verdict
    """
    csv.field_size_limit(LINE_BYTES_MAX)
    try:
        with nullcontext(sys.stdin.buffer) if file == "-" else Path(file).open("rb") as opened:
            recorded = _read(opened)
    except (Unreadable, OSError) as error:
        complain(f"gpuguard: {reason_of(file, error)}")
        if output == "json":
            write_summary(Summary("unknown", "", 0.0, [], {}, [str(error)]))
        raise SystemExit(EXIT_UNREADABLE) from error
    lines: Sequence[Line | Episode]
    if isinstance(recorded, Recorded):
        lines, finding = judge(recorded)
        summary = summarise(lines, finding, recorded.gaps)
    else:
        lines, summary = judge_counters(recorded, alarms_per_gpu_year)
    if output == "json":
        for line in lines:
            write_line(line)
        write_summary(summary)
    else:
        _print_table(lines, summary)
    raise SystemExit(exit_status(summary, unreadable=False))


def _print_table(lines: Sequence[Line | Episode], summary: Summary) -> None:
    launches = [one for one in lines if isinstance(one, Line)]
    if launches:
        click.echo(f"{'second':>8} {'launches':>9} {'kernels':>8} {'top':>6} {'alike':>6}  verdict")
    for line in launches:
        click.echo(f"{line.start_s:8.0f} {line.launches:9d} {line.kernels:8d} {line.top_ratio:6.1%} "
                   f"{line.cadence_ratio:6.1%}  {line.verdict} {line.label}")
    for one in lines:
        if isinstance(one, Episode):
            click.echo(f"{visible(one.device):>8} {one.start_s:8.0f} s to {one.end_s:8.0f} s  {one.kind} {one.family} "
                       f"({one.share:.0%} of {one.looks} looks): {one.verdict} {one.label}")
    click.echo(f"\n{summary.verdict} {summary.label} (probability {summary.probability:.3f})")
    for shown in summary.evidence:
        click.echo(visible(f"  {shown['nats']:+} nats, {shown['class']}: {shown['text']}"))
    for gap in summary.gaps:
        click.echo(visible(f"  not seen: {gap}"))
