"""An incident as a timeline in SVG: one lane for each kind of thing, time to the right, nothing that needs a script."""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec import Struct

from gpuguard.ui import story
from gpuguard.ui.markup import Markup, join, tag, visible

if TYPE_CHECKING:
    from collections.abc import Iterable

    from gpuguard.core.events import Finding, Incident
    from gpuguard.ui.story import Story

WIDTH = 1040
LEFT = 104
RIGHT = 16
ROW = 20
LANE_GAP = 9
AXIS = 26
LETTER = 6.1
LABEL_MAX = 44
TICKS_WANTED = 8


class Item(Struct, frozen=True):
    """One thing on the timeline; a point in time has no ``end_ns``. What is said of it at length stands elsewhere."""

    start_ns: int
    end_ns: int | None
    label: str
    tone: str


class _Scale(Struct, frozen=True):
    start_ns: int
    end_ns: int

    def x(self, time_ns: int) -> float:
        share = (time_ns - self.start_ns) / max(1, self.end_ns - self.start_ns)
        return LEFT + min(1.0, max(0.0, share)) * (WIDTH - LEFT - RIGHT)


def timeline(told: Story, incident: Incident) -> Markup:
    """Return one incident as an SVG element."""
    start_ns, end_ns = story.span_ns(incident)
    slack = max(200_000_000, (end_ns - start_ns) // 40)
    scale = _Scale(start_ns - slack, end_ns + 2 * slack)
    ground: list[Markup] = []
    drawn: list[Markup] = []
    y = float(AXIS)
    for name, items in lanes(told, incident):
        rows = _rows(items, scale)
        height = max(1, len(rows)) * ROW
        ground.append(_lane(name, y, height))
        for number, row in enumerate(rows):
            drawn += [_item(item, scale, y + number * ROW) for item in row]
        y += height + LANE_GAP
    grid = _grid(scale, start_ns, y - LANE_GAP)
    return tag("svg", *ground, grid, *drawn, viewBox=f"0 0 {WIDTH} {y:.0f}", role="img", class_="timeline",
               aria_label="Timeline: tool calls, processes, network, GPU, verdicts and policy")


def lanes(told: Story, incident: Incident) -> list[tuple[str, list[Item]]]:
    """Return the lanes from top to bottom, cause above effect."""
    found = story.accused(incident)
    network = [f for f in found if _on_network(f)]
    return [
        ("Tool calls", [
            Item(c.start_ns, c.end_ns or incident.time_ns, story.call_words(c), "call")
            for c in incident.tool_calls]),
        ("Processes", list(_processes(found))),
        ("Network", list(_spans(network))),
        ("GPU", list(_spans(f for f in found if not _on_network(f)))),
        ("Verdicts", [
            Item(t.time_ns, None, f"{t.label} {t.verdict}", t.verdict)
            for t in told.turns_of(incident)]),
        ("Policy", [
            Item(d.time_ns, None, d.rung.replace("_", " ") + (" ?" if d.needs_approval else ""), "policy")
            for d in incident.decisions]),
    ]


def _on_network(finding: Finding) -> bool:
    return any(evidence.evidence_class == "network" for evidence in finding.evidence)


def _processes(found: list[Finding]) -> Iterable[Item]:
    """A process is drawn from the first to the last thing held against it."""
    known: dict[str, list[Finding]] = {}
    for finding in found:
        if finding.process:
            known.setdefault(story.process_words(finding.process), []).append(finding)
    for words, findings in known.items():
        evidence = [one for finding in findings for one in finding.evidence]
        yield Item(min((e.start_ns for e in evidence), default=findings[0].start_ns),
                   max((e.time_ns for e in evidence), default=findings[0].time_ns), words, "process")


def _spans(found: Iterable[Finding]) -> Iterable[Item]:
    for finding in found:
        for evidence in sorted(finding.evidence, key=lambda e: e.start_ns):
            yield Item(evidence.start_ns, evidence.time_ns, evidence.kind, evidence.evidence_class)


def _rows(items: list[Item], scale: _Scale) -> list[list[Item]]:
    """Put items into as few rows as leave no two on top of each other, labels included."""
    rows: list[list[Item]] = []
    ends: list[float] = []
    for item in sorted(items, key=lambda i: i.start_ns):
        left, right = _extent(item, scale)
        free = next((n for n, end in enumerate(ends) if end <= left), None)
        if free is None:
            rows.append([])
            ends.append(0.0)
            free = len(rows) - 1
        rows[free].append(item)
        ends[free] = right
    return rows


def _extent(item: Item, scale: _Scale) -> tuple[float, float]:
    x0, x1, text_x, anchor = _place(item, scale)
    width = len(_short(item.label)) * LETTER
    text0 = text_x - width if anchor == "end" else text_x
    return min(x0, text0) - 5, max(x1, text0 + width) + 8


def _place(item: Item, scale: _Scale) -> tuple[float, float, float, str]:
    """Return left, right, where the label stands, and which of its ends stands there."""
    x0 = scale.x(item.start_ns)
    x1 = max(x0 + 4, scale.x(item.end_ns)) if item.end_ns is not None else x0 + 5
    width = len(_short(item.label)) * LETTER
    if item.end_ns is not None and width + 12 < x1 - x0:
        return x0, x1, x0 + 6, "start"
    if x1 + 5 + width < WIDTH - 2:
        return x0, x1, x1 + 5, "start"
    return x0, x1, x0 - (8 if item.end_ns is None else 5), "end"


def _item(item: Item, scale: _Scale, y: float) -> Markup:
    x0, x1, text_x, anchor = _place(item, scale)
    middle = y + ROW / 2
    if item.end_ns is None:
        shape = tag("path", d=f"M{x0:.1f} {middle - 5.5:.1f}l5.5 5.5l-5.5 5.5l-5.5 -5.5z")
    else:
        shape = tag("rect", x=x0, y=y + 2.5, width=x1 - x0, height=ROW - 5)
    inside = item.end_ns is not None and x0 < text_x < x1
    shown = _short(item.label)
    label = tag("text", shown, x=text_x, y=middle + 3.8, text_anchor=None if anchor == "start" else anchor,
                class_="in" if inside else None)
    whole = None if shown == visible(item.label) else tag("title", item.label)
    return tag("g", whole, shape, label, class_=f"tone-{item.tone}")


def _lane(name: str, y: float, height: float) -> Markup:
    return join(
        tag("rect", x=LEFT - 6, y=y - 3, width=WIDTH - LEFT + 6, height=height + 6, class_="lane"),
        tag("text", name, x=0, y=y + 14, class_="lane-name"),
    )


def _grid(scale: _Scale, zero_ns: int, bottom: float) -> Markup:
    step_ns = _step_ns(scale.end_ns - zero_ns)
    ticks = [number * step_ns for number in range((scale.end_ns - zero_ns) // step_ns + 1)]
    lines = "".join(f"M{scale.x(zero_ns + after_ns):.1f} {AXIS - 8}V{bottom:.0f}" for after_ns in ticks)
    return join(
        tag("path", d=lines, class_="grid"),
        *(tag("text", f"{after_ns / 1e9:g} s", x=scale.x(zero_ns + after_ns), y=12, class_="tick")
          for after_ns in ticks),
    )


def _step_ns(length_ns: int) -> int:
    """Return a round distance between ticks: 1, 2 or 5 times a power of ten of seconds (or of parts of one)."""
    wanted = max(1, length_ns) / TICKS_WANTED
    power = 1
    while power * 10 <= wanted:
        power *= 10
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= wanted)


def _short(label: str) -> str:
    shown = visible(label)
    return shown if len(shown) <= LABEL_MAX else shown[:LABEL_MAX - 1] + "…"
