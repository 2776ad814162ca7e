"""``gpuguard launches``: the kernel launches of this host as they are made."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec
from msgspec import Struct, field

from gpuguard.cli.arguments import finite
from gpuguard.cli.output import EXIT_UNREADABLE, complain, write_line
from gpuguard.core.records import LAUNCH_APIS, Gap, KernelName, Launches
from gpuguard.ui.markup import visible

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.table import Table

    from gpuguard.core.bounded import BoundedTable
    from gpuguard.core.records import Block
    from gpuguard.messages import Answer, Request
    from gpuguard.sensors.launches import LaunchSensor
    from gpuguard.sensors.launches.cooperative import CooperativeSensor

_LOOK_S = 0.25
_ROWS_SHOWN = 20
_NAMES_MAX = 65_536
_GAPS_MAX = 1_000


class Line(Struct):
    """What one process launched of one kernel and geometry in one interval."""

    time_ns: int
    pid: int
    start_ticks: int
    process: str
    kernel: int
    name: str
    api: str
    grid: list[int]
    block: list[int]
    shared_bytes: int
    launches: int
    launches_per_s: float


class Totals(Struct):
    """The last line."""

    launches: int = 0
    lines: int = 0
    pids: list[int] = field(default_factory=list)
    gaps: list[str] = field(default_factory=list)


class _Here:
    """The broker's half of the launch eye, in this process."""

    def ask(self, request: Request) -> tuple[Answer, list[int]]:
        """Answer as the broker would."""
        from gpuguard.sensors import launches

        return launches.grant(request)


@click.command()
@click.option("--pid", "pids", multiple=True, type=click.IntRange(1), help="Only this process. May be repeated.")
@click.option("--seconds", type=click.FloatRange(0.1), callback=finite, help="End after so long; else with Ctrl-C.")
@click.option("--interval", type=click.FloatRange(0.25, 60.0), callback=finite, default=1.0, show_default=True,
              help="Seconds between two reports.")
@click.option("-o", "--output", type=click.Choice(["table", "json"]), default="table", show_default=True,
              help="json: one kernel of one process a line and a summary.")
def command(*, pids: tuple[int, ...], seconds: float | None, interval: float, output: str) -> None:
    """Show kernel launches as they are made, with an eye of its own beside a running guard's. Needs root.

    Without root, launches of processes that were given libgpuguard_capture.so are shown (GPUGUARD_CAPTURE_DIR).

    \b
    Examples:
      gpuguard launches
      gpuguard launches --pid 4711 --seconds 10 -o json | jq 'select(.launches > 100)'

    Exit status: 0, 3 where the eye cannot be opened or a named process is not there.
    """
    from gpuguard.sensors import EyeClosed

    for pid in pids:
        if not Path(f"/proc/{pid}").exists():
            complain(f"gpuguard: there is no process {pid}")
            raise SystemExit(EXIT_UNREADABLE)
    try:
        sensor = _open()
    except EyeClosed as error:
        complain(f"gpuguard: {error}")
        raise SystemExit(EXIT_UNREADABLE) from error
    totals = Totals()
    try:
        for lines in _reports(sensor, frozenset(pids), seconds, interval, totals):
            _show(lines, output, totals)
    except KeyboardInterrupt:
        pass
    finally:
        _close(sensor)
    if output == "json":
        write_line({"summary": msgspec.to_builtins(totals)})
    else:
        click.echo(f"{totals.launches} launches of {len(totals.pids)} processes")


def _open() -> LaunchSensor | CooperativeSensor:
    from gpuguard.config import Config
    from gpuguard.sensors import launches

    config = msgspec.convert({"launches": {"interval_ms": int(_LOOK_S * 1000)}}, Config)
    return launches.open_sensor(_Here(), config)


def _close(sensor: LaunchSensor | CooperativeSensor) -> None:
    from gpuguard.sensors import launches

    launches.release()
    sensor.close()


def _reports(
    sensor: LaunchSensor | CooperativeSensor, pids: frozenset[int], seconds: float | None, interval: float,
    totals: Totals,
) -> Iterator[list[Line]]:
    """Yield what was launched in each interval."""
    from gpuguard.core.bounded import BoundedTable

    names: BoundedTable[tuple[int, int, int], str] = BoundedTable(_NAMES_MAX)
    end = time.monotonic() + seconds if seconds else float("inf")
    blocks: list[Block] = []
    begun = time.monotonic()
    while True:
        time.sleep(min(_LOOK_S, interval))
        blocks += sensor.read(time.time_ns())
        over = time.monotonic() >= end
        if time.monotonic() - begun >= interval or over:
            for block in blocks:
                if isinstance(block, KernelName):
                    names[block.process.pid, block.process.start_ticks, block.kernel] = block.name
            yield _lines(blocks, pids, names, time.monotonic() - begun, totals)
            blocks, begun = [], time.monotonic()
        if over:
            return


def _lines(
    blocks: list[Block], pids: frozenset[int], names: BoundedTable[tuple[int, int, int], str], took_s: float,
    totals: Totals,
) -> list[Line]:
    """Return one line for each process, kernel and geometry, the busiest first; add to the totals."""
    found: dict[tuple[object, ...], Line] = {}
    now_ns = time.time_ns()
    for block in blocks:
        if isinstance(block, Gap) and (not pids or block.process is None or block.process.pid in pids):
            totals.gaps = [*totals.gaps, _gap(block)][-_GAPS_MAX:]
        for row in block.rows if isinstance(block, Launches) else ():
            pid, ticks, kernel = int(row["pid"]), int(row["start_ticks"]), int(row["kernel"])
            if pids and pid not in pids:
                continue
            key = (pid, ticks, kernel, int(row["api"]), *row["grid"].tolist(), *row["block"].tolist(),
                   int(row["shared_bytes"]))
            line = found.get(key)
            if line is None:
                name = names.get((pid, ticks, kernel)) or ""
                line = found[key] = Line(
                    now_ns, pid, ticks, _process(pid), kernel, name, LAUNCH_APIS[row["api"]], row["grid"].tolist(),
                    row["block"].tolist(), int(row["shared_bytes"]), 0, 0.0)
            line.launches += int(row["launches"])
    for line in found.values():
        line.launches_per_s = round(line.launches / max(took_s, 1e-9), 1)
        totals.launches += line.launches
    totals.pids = sorted({*totals.pids, *(line.pid for line in found.values())})
    totals.lines += len(found)
    return sorted(found.values(), key=lambda line: -line.launches)


def _gap(block: Gap) -> str:
    who = f"process {block.process.pid}: " if block.process else ""
    return f"{who}{block.reason}" + (f" ({block.lost})" if block.lost else "")


def _process(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def _show(lines: list[Line], output: str, totals: Totals) -> None:
    if output == "json":
        for line in lines:
            write_line(line)
        sys.stdout.flush()
        return
    from rich.console import Console

    console = Console()
    console.print(_table(lines) if lines else "no launches")
    while totals.gaps:
        complain(f"gap: {totals.gaps.pop(0)}")


def _table(lines: list[Line]) -> Table:
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("pid", "process", "launches/s", "kernel", "grid", "block", "shared"):
        table.add_column(name, justify="right" if name in ("pid", "launches/s", "shared") else "left", overflow="fold")
    for line in lines[:_ROWS_SHOWN]:
        name = escape(visible(line.name)) if line.name else f"[dim]{line.kernel:#x}[/]"
        table.add_row(str(line.pid), escape(visible(line.process)), f"{line.launches_per_s:,.0f}", name,
                      "x".join(map(str, line.grid)), "x".join(map(str, line.block)),
                      str(line.shared_bytes))
    if len(lines) > _ROWS_SHOWN:
        table.caption = f"and {len(lines) - _ROWS_SHOWN} more"
    return table
