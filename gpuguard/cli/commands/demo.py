"""``gpuguard demo``: the incident lab, watched by the real guard, told on screen and as a page."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gpuguard.ui.markup import visible

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table
    from rich.text import Text

    from gpuguard.core.events import Event
    from gpuguard.lab.tale import Judgement, Tale

EXIT_MISSED = 1
EXIT_CLOSED = 3
#: What a run takes, for the progress bar; it ends when the lab does.
USUAL_S = 36.0

REAL = "network namespaces, OpenSSH, processes, packets, OTLP spans; the guard, its broker and every sensor"
STANDIN = "the GPU: a scripted NVML library, and a libcuda with the call sites of the real driver's"
REPLAYED = "the GPU half: there is no stand-in here, so a recording made with one goes through the same guard"
REPLAYED_CLOSED = "the GPU half, from a recording made with the launch eye open: it is closed here"
NO_RECORDING = "the GPU half: there is no stand-in and no recording here"
WATCHES = "Mode: observe. Policy writes down what it would do, and does nothing."
ACTS = "Mode: enforce. Policy acts, on the processes of the lab; all of it is undone at the end."
ROOTLESS = (
    "Rootless: eBPF is closed, so processes are polled and launches are not seen. Isolate drops and aborts the "
    "connections of a tree, pause is SIGSTOP."
)

EXAMPLES = """\b
Examples:
  gpuguard demo                        the network half live, the GPU half replayed from a recording
  gpuguard demo --standins build/lab   both halves live, the GPU a stand-in (`make demo` builds it)
  gpuguard demo --enforce              policy acts: the tunnel is cut before it is used, the hash program paused
  gpuguard demo --record recording     keep the recording; see `gpuguard replay`
"""


@click.command(epilog=EXAMPLES)
@click.option("--standins", type=click.Path(exists=True, file_okay=False, resolve_path=True, path_type=Path),
              envvar="GPUGUARD_STANDINS", help="Folder of built stand-ins for the NVIDIA driver.")
@click.option("--enforce", is_flag=True, help="Let policy act, on the lab's processes only. (A run that is killed "
              "by SIGKILL while it acts may leave an empty control group.)")
@click.option("--record", type=click.Path(file_okay=False, resolve_path=True, path_type=Path),
              help="Keep the recording in this folder.")
@click.option("--output", type=click.Path(file_okay=False, resolve_path=True, path_type=Path), default="demo-output",
              show_default=True, help="Where the report goes.")
def command(standins: Path | None, record: Path | None, output: Path, *, enforce: bool) -> None:
    """Play an incident in a lab on this machine, and watch the guard find it.

    An agent's tool calls probe a network, open a reverse SSH tunnel and start a program that hashes, beside a
    training-like job and an administrator's login. Everything happens in namespaces of its own: nothing leaves this
    machine, and nothing is left behind. Exit status: 0 all was found, 1 not, 3 the lab could not be built.
    """
    from rich.markup import escape

    from gpuguard.lab.namespaces import LabClosed
    from gpuguard.ui.screen import console_for_people

    console = console_for_people()
    output.mkdir(parents=True, exist_ok=True)  # now: a minute later, what was played would be lost
    try:
        status = _demo(console, standins, record, output, enforce=enforce)
    except LabClosed as closed:
        console.print(f"[bold red]The lab could not be built:[/] {escape(str(closed))}")
        status = EXIT_CLOSED
    sys.exit(status)


def _demo(console: Console, standins: Path | None, record: Path | None, output: Path, *, enforce: bool) -> int:
    from gpuguard.lab.performance import perform
    from gpuguard.lab.scenario import Settings
    from gpuguard.lab.tale import judge

    replayed: list[Event] = [] if standins else _replayed()
    notes = _notes(standins, replayed)
    notes.append(ACTS if enforce else WATCHES)
    if os.geteuid() != 0:
        notes.append(ROOTLESS)
    _opening(console, notes)
    mode = "enforce" if enforce else "observe"
    settings = Settings(standins=str(standins or ""), record=str(record or ""), mode=mode)
    with _progress(console) as progress:
        teller = _Teller(console, progress)
        tale, left = perform(settings, teller.take)
    judgement = judge(tale)
    if standins and "launches" in tale.closed_eyes():
        replayed = _replayed()
        notes.append(f"Replayed: {REPLAYED_CLOSED}.")
    _told(console, tale, replayed, judgement)
    kept = {"report": _report(tale, replayed, judgement, (output, notes))}
    if record:
        kept["recording"] = record
    return _closing(console, judgement, left, kept)


class _Teller:
    """Writes what happens as it happens, one line each."""

    def __init__(self, console: Console, progress: Progress) -> None:
        self._console = console
        self._progress = progress
        self._task = progress.add_task("", total=USUAL_S)
        self._zero_ns: int | None = None
        self._turns: dict[str, str] = {}
        self._gaps: set[tuple[str, str]] = set()

    def take(self, line: dict[str, Any], event: Event | None) -> None:
        """Take one line of the lab."""
        time_ns = line["time_ns"]
        self._zero_ns = time_ns if self._zero_ns is None else self._zero_ns
        self._progress.update(self._task, completed=(time_ns - self._zero_ns) / 1e9)
        said = self._of_event(event) if event else _of_lab(line)
        if said is None:
            return
        who, style, text = said
        from rich.table import Table
        from rich.text import Text

        row = Table.grid(padding=(0, 1))
        row.add_column(width=8, justify="right", style="dim")
        row.add_column(width=7)
        row.add_column(overflow="fold")
        row.add_row(f"{(time_ns - self._zero_ns) / 1e9:.2f} s", Text(who, style=style), text)
        self._console.print(row)

    def _of_event(self, event: Event) -> tuple[str, str, Text] | None:
        from rich.text import Text

        from gpuguard.core.events import Decision, Finding
        from gpuguard.core.records import Gap
        from gpuguard.lab.tale import is_closed_eye
        from gpuguard.ui import screen, story

        match event:
            case Finding() if story.accuses(event) and self._turns.get(event.id) != event.verdict:
                self._turns[event.id] = event.verdict
                who = f"  {story.process_words(event.process)}, after {event.decided_after_s:.2f} s"
                text = Text.assemble((event.label, "bold"), " ", screen.verdict(event.verdict), (visible(who), ""))
                return "guard", "bold red", text
            case Decision() if event.rung != "notify":
                would = "would " if event.mode == "observe" else ""
                asks = " after a person's approval" if event.needs_approval else ""
                target = story.process_words(event.target)
                return "policy", "blue", Text(visible(f"{would}{story.RUNG_WORDS[event.rung]}{asks}: {target}"))
            case Gap() if is_closed_eye(event) and (event.sensor, event.reason) not in self._gaps:
                self._gaps.add((event.sensor, event.reason))
                return "eye", "yellow", Text(visible(f"{event.sensor}: {event.reason}"))
            case _:
                return None


def _of_lab(line: dict[str, Any]) -> tuple[str, str, Text] | None:
    from rich.text import Text

    def said(who: str, style: str, text: str) -> tuple[str, str, Text]:
        return who, style, Text(visible(text))

    match line["kind"]:
        case "link":
            delay = f"a link of {line['delay_ms']:g} ms each way" if line["delayed"] else "a link without delay"
            return said("lab", "dim", f"two machines in namespaces of their own, joined by {delay}")
        case "stage" if line["name"] == "lab":
            nested = "" if line["root"] else "; without root: sshd runs in a user namespace of its own"
            return said("lab", "dim", f"sshd on both: {line['sshd']}{nested}")
        case "stage" if line["name"] == "guard":
            return said("guard", "bold", f"watching after {line['after_s']:.1f} s, mode {line['mode']}")
        case "benign":
            return said("benign", "green", f"{line['text']} (pid {', '.join(map(str, line['pids']))})")
        case "tool_call" if "call" in line:
            return said("agent", "magenta", f"tool call: {_CALLS[line['call']]} (pid {line['pid']})")
        case "first_use":
            return said("far", "magenta", "somebody comes to the tunnel's other end, to type in a shell of the node")
        case "guard_failed":
            return said("guard", "bold red", f"ended with status {line['status']}: {line['text']}")
        case _:
            return None


_CALLS = {
    "read": "reads a file", "probe": "probes internal addresses", "tunnel": "opens a reverse SSH tunnel",
    "hasher": "starts a program that launches hash kernels",
}


def _notes(standins: Path | None, replayed: Sequence[Event]) -> list[str]:
    if standins:
        return [f"Real: {REAL}.", f"Stand-in: {STANDIN}."]
    return [f"Real: {REAL}.", f"Replayed: {REPLAYED if replayed else NO_RECORDING}."]


def _replayed() -> list[Event]:
    """Return what the guard says of the GPU half of the recording in the package, [] where there is none."""
    from importlib.resources import as_file, files

    from gpuguard.replaying import replay

    folder = files("gpuguard.lab").joinpath("recordings", "incident")
    if not folder.is_dir():
        return []
    with as_file(folder) as path:
        return list(_gpu_half(replay(path)))


def _gpu_half(events: Iterable[Event]) -> Iterator[Event]:
    """Yield what is about the hash program only: the network half of the same story is played live."""
    import msgspec

    from gpuguard.core.events import Finding, Incident

    for event in events:
        if isinstance(event, Finding) and event.label == "mining":
            yield event
        if isinstance(event, Incident) and any(f.label == "mining" for f in event.findings):
            kept = tuple(f for f in event.findings if f.label == "mining")
            ids = {f.id for f in kept}
            calls = {f.tool_call.span_id for f in kept if f.tool_call}
            yield msgspec.structs.replace(
                event, findings=kept,
                tool_calls=tuple(c for c in event.tool_calls if c.span_id in calls),
                processes=tuple(f.process for f in kept if f.process),
                decisions=tuple(d for d in event.decisions if d.finding_id in ids),
            )


def _opening(console: Console, notes: Sequence[str]) -> None:
    console.print("[bold]GPUGuard demo[/]  an agent opens a tunnel and mines: the incident, played on this machine")
    console.print()
    console.print(_facts((note.partition(": ")[0].lower(), note.partition(": ")[2]) for note in notes))
    console.print()


def _progress(console: Console) -> Progress:
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    return Progress(TextColumn("  [dim]playing"), BarColumn(bar_width=60), TimeElapsedColumn(), console=console,
                    transient=True)


def _told(console: Console, tale: Tale, replayed: list[Event], judgement: Judgement) -> None:
    from gpuguard.lab.tale import left_alone
    from gpuguard.ui import screen, story

    for incident in story.told_by(tale.events()).incidents:
        screen.show_incident(console, incident)
    if replayed:
        screen.heading(console, "The GPU half", "replayed from a recording")
        for incident in story.told_by(replayed).incidents:
            screen.show_incident(console, incident)
    screen.show_left_alone(console, left_alone(tale))
    screen.show_measures(console, judgement.measures)


def _report(tale: Tale, replayed: list[Event], judgement: Judgement, where: tuple[Path, list[str]]) -> Path:
    """Write the page, and return where it is."""
    from gpuguard.core.events import Incident
    from gpuguard.lab.tale import left_alone
    from gpuguard.ui.report import render

    output, notes = where
    path = output / "incident.html"
    marks = {event.id: "replayed from a recording" for event in replayed if isinstance(event, Incident)}
    page = render([*tale.events(), *replayed], marks=marks, host=platform.node(), measures=judgement.measures,
                  left_alone=left_alone(tale), notes=[*notes, *judgement.excused])
    path.write_text(page, encoding="utf-8")
    return path


def _closing(console: Console, judgement: Judgement, left: list[str], kept: Mapping[str, Path]) -> int:
    from rich.text import Text

    passed = judgement.passed and not left
    clean = "no process, namespace, rule or file of the lab is left"
    rows = [("cleanup", f"left behind: {', '.join(left)}" if left else clean, "bold red" if left else "")]
    rows += [("closed", excuse, "yellow") for excuse in judgement.excused]
    rows += [("missed", fault, "bold red") for fault in judgement.missing]
    rows += [("accused", fault, "bold red") for fault in judgement.accused]
    rows += [("late", f"{what} (is this machine busy?)", "yellow") for what in judgement.late]
    rows.append(("result", "everything was found, and nobody else was accused" if passed else "failed",
                 "bold green" if passed else "bold red"))
    console.print()
    for name, path in kept.items():
        # Not folded, so that it can be copied whole.
        console.print(Text.assemble((f"{name:>10}  ", "dim"), visible(str(path))), soft_wrap=True)
    console.print(_facts((name, Text(visible(text), style=style)) for name, text, style in rows))
    return 0 if passed else EXIT_MISSED


def _facts(rows: Iterable[tuple[str, str | Text]]) -> Table:
    """Return names and what is to be said of each, aligned."""
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    table.add_column(width=10, justify="right", style="dim")
    table.add_column(overflow="fold")
    for name, text in rows:
        table.add_row(name, text)
    return table
