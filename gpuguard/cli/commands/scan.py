"""``gpuguard scan``: is there hashing code in these files, this process, this image of a container."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gpuguard.cli.arguments import TO_READ
from gpuguard.cli.output import Summary, complain, exit_status, write_line, write_summary
from gpuguard.ui.markup import visible

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from gpuguard.code.scanning import Event, Target
    from gpuguard.code.verdicts import FileVerdict, KernelVerdict
    from gpuguard.ui.markup import Markup

_SHOWN_MAX = 1_000


@click.command()
@click.argument("paths", metavar="[PATH]...", nargs=-1, type=TO_READ)
@click.option("--pid", "pids", type=click.IntRange(min=1), multiple=True, help="Every file that this process maps.")
@click.option("--memory", is_flag=True, help="With --pid: also what it has in memory and in no file.")
@click.option("--image", "images", metavar="TAR", multiple=True, type=TO_READ,
              help="An image of a container, as `docker save` or an OCI layout in a tar.")
@click.option("--sm", type=click.IntRange(50, 999), help="Only code that a GPU of this compute capability runs: 90.")
@click.option("--allow", type=click.Path(path_type=Path),
              help="The allow list (see `gpuguard code learn`), if not the one of this host.")
@click.option("--workers", type=click.IntRange(1, 64), help="How many files are read at once.")
@click.option("-o", "--output", type=click.Choice(["table", "json", "html"]), default="table", show_default=True,
              help="json: one line a kernel, one a file, and a summary; html: a page on standard output.")
def command(paths: tuple[Path, ...], pids: tuple[int, ...], images: tuple[Path, ...], sm: int | None,
            allow: Path | None, workers: int | None, output: str, *, memory: bool) -> None:
    """Judge the GPU code in PATH...: libraries, programs, wheels, archives, folders, caches, memory dumps.

    Each kernel is decoded and judged by what it does, never by its name: mining, cracking, grey:<class>, benign or
    unknown. Files are read by workers that can do nothing else. Exit status: 0 clear, 1 found, 3 could not read all.

    \b
    Examples:
      gpuguard scan ./downloads
      gpuguard scan model.whl -o json | jq 'select(.label == "mining")'
      gpuguard scan --image app.tar -o html > report.html
      sudo gpuguard scan --pid 4711 --memory
    """
    from gpuguard.code import allow as lists
    from gpuguard.code.scanning import NoWorker, scan_targets

    if not (paths or pids or images):
        raise click.UsageError("nothing to scan: give a PATH, --pid or --image")
    if memory and not pids:
        raise click.UsageError("--memory needs --pid")
    gathered = Gathered()
    listed = allow or lists.default_path()
    write: Callable[[object], None] = write_line if output == "json" else gathered.keep
    try:
        lists.load(listed, may_lack=allow is None)
        targets = _targets(paths, pids, images, gathered, memory=memory)
        events = scan_targets(targets, workers=workers, allow=listed, sm=sm)
        for event in _shown(events, sys.stderr.isatty() and output != "json"):
            gathered.add(event)
            write(_line(event))
    except BrokenPipeError:
        raise  # nobody reads on; click ends quietly
    except (NoWorker, lists.BadAllowList, OSError) as error:
        complain(f"gpuguard: {error}")
        gathered.unreadable.append(str(error))
    summary = gathered.summary()
    {"json": lambda: write_summary(summary), "table": lambda: _print(gathered, summary),
     "html": lambda: click.echo(_page(gathered, summary), nl=False)}[output]()
    raise SystemExit(exit_status(summary, unreadable=bool(gathered.unreadable)))


def _targets(paths: Iterable[Path], pids: Iterable[int], images: Iterable[Path], gathered: Gathered, *,
             memory: bool) -> Iterator[Target]:
    from gpuguard.code.mapped import targets_of
    from gpuguard.code.scanning import Target, files_below

    for path in paths:
        yield from files_below(path)
    for image in images:
        yield Target(str(image))
    for pid in pids:
        try:
            yield from targets_of(pid, memory=memory)
        except OSError as error:
            gathered.unreadable.append(f"process {pid}: {error.strerror}")
            complain(f"gpuguard: process {pid}: {error.strerror}")


class Gathered:
    """What the end of a scan needs of all lines; only what an operator should see is kept."""

    def __init__(self) -> None:
        self.files: list[FileVerdict] = []
        self.found: list[KernelVerdict] = []
        self.labels: dict[str, int] = {}
        self.counts: dict[str, int] = {}
        self.read = self.kernels = self.code_bytes = 0
        self.worst: FileVerdict | None = None
        self.gaps: dict[str, None] = {}
        self.notes: list[str] = []
        self.unreadable: list[str] = []

    def keep(self, line: object) -> None:
        """Forget the line: `add` has kept what it needs."""

    def add(self, event: KernelVerdict | FileVerdict) -> None:
        """Take what came."""
        from gpuguard.code.verdicts import FileVerdict, rank

        if not isinstance(event, FileVerdict):
            if event.verdict in ("suspect", "confirmed") and len(self.found) < _SHOWN_MAX:
                self.found.append(event)
            return
        self.read += 1
        self.kernels += event.kernels
        self.code_bytes += event.code_bytes
        self.counts[event.verdict] = self.counts.get(event.verdict, 0) + 1
        for label, count in event.labels.items():
            self.labels[label] = self.labels.get(label, 0) + count
        wrong = [*(f"malformed: {one}" for one in event.malformed), *event.gaps]
        for text in wrong[:_SHOWN_MAX - len(self.gaps)]:
            self.gaps[f"{event.path}: {text}"] = None
        self.notes += [f"{event.path}: {note}" for note in event.notes[:_SHOWN_MAX - len(self.notes)]]
        if wrong and len(self.unreadable) < _SHOWN_MAX:
            self.unreadable.append(event.path)
        if (event.kernels or wrong) and len(self.files) < _SHOWN_MAX:
            self.files.append(event)
        if self.worst is None or rank(event) > rank(self.worst):
            self.worst = event

    def summary(self) -> Summary:
        """Return the last line: the worst file."""
        worst = self.worst
        gaps = [*self.gaps, *(text for text in self.unreadable if text not in {one.path for one in self.files})]
        return Summary(
            verdict=worst.verdict if worst else "unknown", label=worst.label if worst else "",
            probability=worst.probability if worst else 0.0,
            evidence=_evidence(worst.evidence if worst else ()),
            counts=self.counts, gaps=gaps)


def _evidence(texts: Iterable[str]) -> list[dict[str, object]]:
    return [{"class": "code", "text": text} for text in texts]


def _line(event: KernelVerdict | FileVerdict) -> dict[str, object]:
    from gpuguard.code.verdicts import FileVerdict

    if isinstance(event, FileVerdict):
        return {
            "file": event.path, "verdict": event.verdict, "label": event.label, "probability": event.probability,
            "images": event.images, "kernels": event.kernels, "labels": event.labels, "malformed": event.malformed,
            "gaps": event.gaps, "notes": event.notes, "size_bytes": event.size_bytes, "code_bytes": event.code_bytes,
        }
    return {
        "path": event.path, "container": event.container, "offset": event.offset, "arch": event.arch,
        "kernel": event.kernel, "instructions": event.instructions, "label": event.label, "verdict": event.verdict,
        "probability": event.probability, "nats": round(event.nats, 2), "evidence": _evidence(event.evidence),
        "words": event.words, "text_sha256": event.text_sha256,
    }


def _shown(events: Iterable[Event], bar: bool) -> Iterator[KernelVerdict | FileVerdict]:  # noqa: FBT001
    """Pass findings on; draw how far the file at hand is, where somebody looks."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

    from gpuguard.code.scanning import Progress as Far

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not bar) as drawing:
        task = drawing.add_task("reading", total=None)
        for event in events:
            if isinstance(event, Far):
                name = Path(event.path).name[-40:]
                drawing.update(task, description=name, completed=event.read_bytes, total=event.size_bytes)
            else:
                yield event


def _print(gathered: Gathered, summary: Summary) -> None:
    from rich.console import Console
    from rich.table import Table

    from gpuguard.cli.tables import STYLES, escape

    console = Console()
    if gathered.found:
        table = Table("verdict", "label", title="What an operator should see")
        for name in ("kernel", "where", "why"):
            table.add_column(name, overflow="fold")
        for one in gathered.found:
            why = "\n".join(map(escape, one.evidence))
            what = f"{escape(one.kernel)}\n{escape(one.arch)}"
            where = f"{escape(one.path)}\n{escape(_place(one))}"
            table.add_row(f"[{STYLES[one.verdict]}]{one.verdict}[/]", one.label, what, where, why)
        console.print(table)
    if gathered.files:
        table = Table("verdict", title="Files with GPU code")
        for name in ("file", "images", "kernels", "labels"):
            table.add_column(name, overflow="fold")
        for file in gathered.files:
            labels = ", ".join(f"{name} {count}" for name, count in sorted(file.labels.items()))
            table.add_row(f"[{STYLES[file.verdict]}]{file.verdict}[/]", escape(file.path), str(file.images),
                          str(file.kernels), labels)
        console.print(table)
    console.print(f"{_total(gathered)}: [{STYLES[summary.verdict]}]{summary.verdict}[/] {summary.label}")
    for note in gathered.notes:
        console.print(visible(note), markup=False, highlight=False)
    for gap in summary.gaps:
        console.print(visible(f"not read: {gap}"), markup=False, highlight=False)


def _place(one: KernelVerdict) -> str:
    """Say where in its file an image is; in a memory by its address."""
    offset = f"{one.offset:#x}" if one.path.startswith("/proc/") else str(one.offset)
    return f"{one.container} at {offset}"


def _total(gathered: Gathered) -> str:
    files = "1 file" if gathered.read == 1 else f"{gathered.read} files"
    kernels = "1 kernel" if gathered.kernels == 1 else f"{gathered.kernels} kernels"
    return f"{files}, {kernels}, {gathered.code_bytes / 1e6:.1f} MB of code"


def _page(gathered: Gathered, summary: Summary) -> str:
    from gpuguard.ui.markup import join, tag
    from gpuguard.ui.report import page

    def table(heads: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> Markup:
        return tag("table", tag("thead", tag("tr", *(tag("th", head) for head in heads))),
                   tag("tbody", *(tag("tr", *(tag("td", cell) for cell in row)) for row in rows)))

    found = [(tag("span", one.verdict, class_=f"badge {one.verdict}"), one.label, tag("code", one.kernel), one.arch,
              tag("code", f"{one.path} ({_place(one)})"),
              join(*(tag("div", text) for text in one.evidence)))
             for one in gathered.found]
    files = [(tag("span", one.verdict, class_=f"badge {one.verdict}"), tag("code", one.path), str(one.kernels),
              ", ".join(f"{name} {count}" for name, count in sorted(one.labels.items())))
             for one in gathered.files]
    parts = [tag("div", "GPU code", class_="eyebrow"),
             tag("h1", f"{summary.verdict} {summary.label}".strip()), tag("p", _total(gathered), class_="soft")]
    if found:
        parts += [tag("h2", "What an operator should see"), tag("div", table(
            ("verdict", "label", "kernel", "arch", "where", "why"), found), class_="card")]
    if files:
        parts += [tag("h2", "Files with GPU code"), tag("div", table(
            ("verdict", "file", "kernels", "labels"), files), class_="card")]
    if gathered.notes:
        parts += [tag("h2", "Notes"), tag("ul", *(tag("li", note) for note in gathered.notes))]
    if summary.gaps:
        parts += [tag("h2", "Not read"), tag("ul", *(tag("li", gap) for gap in summary.gaps))]
    return page(f"GPUGuard: scan, {summary.verdict}", tag("main", *parts))
