"""``gpuguard classify``: judge recorded launches or counters as the running guard would have judged them live."""

from __future__ import annotations

import csv
import io
import itertools
import math
import sys
from array import array
from collections import Counter, defaultdict
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click
import numpy as np
from msgspec import Struct

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
from gpuguard.core.events import Finding
from gpuguard.core.evidence import Evidence
from gpuguard.core.guard import Guard
from gpuguard.core.records import LAUNCH, LAUNCH_APIS, SCHEMA_VERSION, HostInfo, KernelName, Launches, Tick
from gpuguard.core.subjects import ProcessId
from gpuguard.counters import judging, reading
from gpuguard.counters.judging import Episode
from gpuguard.counters.shipped import shipped_model
from gpuguard.counters.table import Table, Unreadable
from gpuguard.counters.unpacking import Unpacked
from gpuguard.kernels.launches import features
from gpuguard.signature_files import shipped
from gpuguard.ui.markup import visible

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from typing import BinaryIO

    from gpuguard.counters.reading import Telemetry

SECOND_NS = 1_000_000_000
INTERVAL_NS = 250_000_000
#: The recording is taken to begin here: its own times are offsets.
BEGIN_NS = SECOND_NS
SETTLE_NS = 2 * SECOND_NS
#: What is looked at to know what a file is.
PEEKED = 4096
LINE_BYTES_MAX = 64 * 1024
ROWS_MAX = 20_000_000
NAMES_MAX = 60_000
#: Different launches, by name, API and geometry.
KINDS_MAX = 1_000_000
EVIDENCE_SHOWN = 16
PARQUET = b"PAR1"
#: What begins a text that PowerShell wrote.
UTF_16 = (b"\xff\xfe", b"\xfe\xff")

TIMES = ("t_host_us", "t_dev_us")
GEOMETRY = ("gx", "gy", "gz", "bx", "by", "bz", "shmem")
COLUMNS = (*TIMES, "name", *GEOMETRY, "launch_api")
RUNTIME_APIS = {
    "cudaLaunchKernel": "cuLaunchKernel",
    "cudaLaunchKernelExC": "cuLaunchKernelEx",
    "cudaLaunchCooperativeKernel": "cuLaunchCooperativeKernel",
    "cudaGraphLaunch": "cuGraphLaunch",
}


class Recorded(Struct):
    """Launches read from a file: times in ns from `BEGIN_NS` on, in order, and what each launched."""

    times_ns: np.ndarray
    keys: np.ndarray
    table: list[tuple[str, str, tuple[int, ...]]]
    gaps: list[str]


def read_launches(table: Table) -> Recorded:
    """Read launches from CSV. Host times are preferred; a row without one has its device time.

    Raises
    ------
    Unreadable
        If the columns are not those of launches, or no row has a time.
    """
    _check_columns(table.header)
    told = {name: table.header.index(name) for name in COLUMNS if name in table.header}
    host_us, device_us, keys = array("d"), array("d"), array("I")
    known: dict[tuple[str, str, tuple[int, ...]], int] = {}
    skipped = beyond = 0
    for row in table.rows():
        found = {name: row[at] for name, at in told.items() if at < len(row)}
        times = [_number(found.get(name)) for name in TIMES]
        key = _key(found)
        if all(math.isnan(one) for one in times) or key is None:
            skipped += 1
            continue
        if len(keys) >= ROWS_MAX or (len(known) >= KINDS_MAX and key not in known):
            beyond += 1
            continue
        host_us.append(times[0])
        device_us.append(times[1])
        keys.append(known.setdefault(key, len(known)))
    if not keys:
        raise Unreadable(table.broken or f"no launch with a time and a geometry that can be, in {table.lines} lines")
    quoted = sum(text.count("\n") for name, api, _ in known for text in (name, api))
    placed_us, gap = _placed(np.array(host_us), np.array(device_us))
    gaps = [text for text, said in (
        (f"{table.broken}; what comes after is left out", table.broken),
        (f"{skipped} rows without a usable time or geometry were left out", skipped),
        (f"{quoted} lines lie within quotes, as text of a name: launches in them are not seen", quoted),
        (f"{beyond} rows beyond {ROWS_MAX} or {KINDS_MAX} different launches were left out", beyond),
        (f"{len(known)} different launches: names beyond {NAMES_MAX} may be forgotten", len(known) > NAMES_MAX),
        (gap, gap)) if said]
    order = np.argsort(placed_us, kind="stable")
    times_ns = ((placed_us[order] - placed_us[order[0]]) * 1e3).astype(np.int64) + BEGIN_NS
    return Recorded(times_ns, np.array(keys)[order], list(known), gaps)


def _placed(host_us: np.ndarray, device_us: np.ndarray) -> tuple[np.ndarray, str]:
    """Return the time of each launch by one clock, and which were placed by the other; absent times are NaN."""
    absent = np.isnan(host_us)
    if absent.all():
        return device_us, "no host times: launches are placed by their device times"
    if not absent.any():
        return host_us, ""
    both = ~absent & ~np.isnan(device_us)
    # A device time stands for the host time that was usual before it.
    shift_us = float(np.median((device_us - host_us)[both])) if both.any() else 0.0
    gap = f"{int(absent.sum())} launches without a host time are placed by their device time"
    return np.where(absent, device_us - shift_us, host_us), gap


def _check_columns(columns: Sequence[str]) -> None:
    if twice := [name for name in COLUMNS if columns.count(name) > 1]:
        raise Unreadable(f"two columns are named {twice[0]}")
    if any(name in columns for name in TIMES) and ("name" in columns or "gx" in columns):
        return
    shown = ", ".join(columns[:8]) or "none"
    raise Unreadable(f"neither launches nor counters: columns are {shown}; needed are {' or '.join(TIMES)}, and name "
                     "or gx; or timestamp and counters such as power_w and sm_active")


def _number(text: str | None) -> float:
    try:
        value = float(text or "nan")
    except ValueError:
        return math.nan
    return value if abs(value) < 1e15 else math.nan


def _key(row: dict[str, str]) -> tuple[str, str, tuple[int, ...]] | None:
    """Return (name, API, geometry); None for a number that no launch has. What is missing is 0 or ""."""
    try:
        numbers = [float(row.get(name) or 0) for name in GEOMETRY]
    except ValueError:
        return None
    if not all(0 <= one < 2**32 and one.is_integer() for one in numbers):
        return None
    geometry = tuple(map(int, numbers))
    api = row.get("launch_api") or ""
    return row.get("name") or "", RUNTIME_APIS.get(api, api), geometry


def blocks_of(recorded: Recorded, process: ProcessId) -> Iterator[KernelName | Launches]:
    """Yield what the launch sensor would have yielded: names before first use, and one block an interval."""
    handles: dict[str, int] = {}
    last_ns: dict[int, int] = {}
    interval = (recorded.times_ns - BEGIN_NS) // INTERVAL_NS
    bounds = [0, *(np.flatnonzero(np.diff(interval)) + 1).tolist(), len(interval)]
    for start, end in itertools.pairwise(bounds):
        times, keys = recorded.times_ns[start:end], recorded.keys[start:end]
        for key in dict.fromkeys(keys.tolist()):
            name = recorded.table[key][0]
            if name not in handles:
                handles[name] = len(handles) + 1
                yield KernelName(int(times[0]), process, handles[name], name)
        rows = _aggregate(times, keys, recorded, handles, last_ns)
        rows["pid"], rows["start_ticks"] = process.pid, process.start_ticks
        yield Launches(BEGIN_NS + (int(interval[start]) + 1) * INTERVAL_NS, rows)


def _aggregate(
    times: np.ndarray, keys: np.ndarray, recorded: Recorded, handles: dict[str, int], last_ns: dict[int, int],
) -> np.ndarray:
    """Return LAUNCH rows of one interval, as the kernel-side table would have them."""
    by_key = np.argsort(keys, kind="stable")
    present, starts = np.unique(keys[by_key], return_index=True)
    rows = np.zeros(len(present), LAUNCH)
    for row, key, own in zip(rows, present.tolist(), np.split(times[by_key], starts[1:]), strict=True):
        name, api, geometry = recorded.table[key]
        before = [last_ns[key]] if key in last_ns else []
        gaps = np.maximum(np.diff(np.concatenate([np.array(before, np.int64), own])), 1)
        row["gaps_log2"] = np.bincount(np.minimum(np.log2(gaps).astype(int), 39), minlength=40)
        row["first_ns"], row["last_ns"], row["launches"] = own[0], own[-1], len(own)
        row["kernel"] = handles[name]
        row["api"] = LAUNCH_APIS.index(api) if api in LAUNCH_APIS else 0
        row["grid"], row["block"], row["shared_bytes"] = geometry[:3], geometry[3:6], geometry[6]
        last_ns[key] = int(own[-1])
    return rows


class Line(Struct):
    """One window of one second, and the standing at its end."""

    window: int
    start_s: float
    launches: int
    kernels: int
    geometries: int
    top_ratio: float
    kernel_entropy_bits: float
    cadence_ratio: float
    verdict: Literal["unknown", "clear", "suspect", "confirmed"]
    label: str
    probability: float
    evidence: list[Evidence]


def judge(recorded: Recorded) -> tuple[list[Line], Finding | None]:
    """Run the recording through a `Guard`; return a line for each second with launches, and the last finding."""
    process = ProcessId("recorded", 1, 1)
    guard = Guard(signatures=shipped())
    guard.receive(HostInfo(BEGIN_NS, SCHEMA_VERSION, "recorded", "recorded", 100))
    by_second: dict[int, list[np.ndarray]] = defaultdict(list)
    findings: list[tuple[int, Finding]] = []
    standing: dict[int, tuple[str, str, float]] = {}
    end_ns = int(recorded.times_ns[-1]) + SETTLE_NS
    now_ns = BEGIN_NS

    def feed(block: KernelName | Launches | Tick, second: int) -> None:
        findings.extend((second, event) for event in guard.receive(block) if isinstance(event, Finding))
        for one in guard.processes():
            standing[second] = (one.verdict, one.label, one.probability)

    for block in blocks_of(recorded, process):
        second = (min(block.time_ns - 1, int(recorded.times_ns[-1])) - BEGIN_NS) // SECOND_NS
        if isinstance(block, Launches):
            by_second[second].append(block.rows)
            now_ns = block.time_ns
        feed(block, second)
    while now_ns < end_ns:
        now_ns += INTERVAL_NS
        feed(Tick(now_ns), max(by_second))
    return [_line(second, rows, standing, findings) for second, rows in sorted(by_second.items())], (
        findings[-1][1] if findings else None)


def _line(
    second: int, rows: list[np.ndarray], standing: dict[int, tuple[str, str, float]],
    findings: list[tuple[int, Finding]],
) -> Line:
    feature = features(np.concatenate(rows))[0][0]
    verdict, label, probability = standing.get(second, ("unknown", "", 0.0))
    return Line(
        window=second, start_s=float(second), launches=int(feature["launches"]), kernels=int(feature["kernels"]),
        geometries=int(feature["geometries"]), top_ratio=round(float(feature["top_ratio"]), 4),
        kernel_entropy_bits=round(float(feature["kernel_entropy_bits"]), 4),
        cadence_ratio=round(float(feature["cadence_ratio"]), 4), verdict=verdict, label=label,  # type: ignore[arg-type]
        probability=round(probability, 6),
        evidence=[one for at, finding in findings if at == second for one in finding.evidence],
    )


def summarise(lines: list[Line], finding: Finding | None, gaps: list[str]) -> Summary:
    """Return the last line: the worst that any window came to."""
    as_maps: list[dict[str, object]] = [
        {"verdict": line.verdict, "label": line.label, "probability": line.probability} for line in lines]
    top = worst(list(as_maps)) or {"verdict": "unknown", "label": "", "probability": 0.0}
    counts: dict[str, int] = defaultdict(int)
    for line in lines:
        counts[line.verdict] += 1
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
