"""``gpuguard replay``: a recording through the guard again."""

from __future__ import annotations

from pathlib import Path

import click

from gpuguard.cli.arguments import TO_READ, policy_of
from gpuguard.cli.output import EXIT_UNREADABLE, Summary, complain, exit_status, reason_of, write_line, write_summary
from gpuguard.cli.tables import print_findings
from gpuguard.core.events import Event, Finding, FlowReport
from gpuguard.core.labels import VERDICTS
from gpuguard.core.records import Gap


@click.command()
@click.argument("recording", type=TO_READ)
@click.option("-o", "--output", type=click.Choice(["json", "table", "events"]), default="table", show_default=True,
              help="json: one finding a line; events: every event, as a running guard writes them.")
@click.option("--policy", "policy_files", type=click.Path(exists=True, path_type=Path), multiple=True,
              help="Judge by this policy instead of the recorded one.")
def command(recording: Path, output: str, policy_files: tuple[Path, ...]) -> None:
    """Replay RECORDING (a file or a directory): the same events as when it was made, bit for bit.

    \b
    Examples:
      gpuguard replay /var/lib/gpuguard/guard/recording
      gpuguard replay incident/ -o json | jq 'select(.verdict == "confirmed")'

    Exit status: 0 clear, 1 found, 3 could not read all of it, 2 wrong usage.
    """
    from gpuguard.recording.codec import RecordingError
    from gpuguard.replaying import replay

    policy = policy_of(policy_files) if policy_files else None
    standing: dict[str, Finding] = {}
    gaps: list[Gap] = []
    try:
        for event in replay(recording, policy=policy):
            _note(event, standing, gaps)
            if output == "events":
                write_line(event)
    except BrokenPipeError:
        raise  # nobody reads on; the recording is not to blame
    except (RecordingError, OSError) as error:
        complain(f"gpuguard: {reason_of(recording, error)}")
        raise SystemExit(EXIT_UNREADABLE) from error
    findings = sorted(standing.values(), key=lambda f: (f.start_ns, f.id))
    if output == "table":
        print_findings(findings, gaps)
    if output == "json":
        for finding in findings:
            write_line(finding)
    summary = _summary(findings, gaps)
    if output != "table":
        write_summary(summary)
    raise SystemExit(exit_status(summary, unreadable=any(gap.sensor == "recording" for gap in gaps)))


def _note(event: Event, standing: dict[str, Finding], gaps: list[Gap]) -> None:
    match event:
        case Finding():
            standing[event.id] = event
        case FlowReport():
            standing[event.finding.id] = event.finding
        case Gap():
            gaps.append(event)
        case _:
            pass


def _summary(findings: list[Finding], gaps: list[Gap]) -> Summary:
    worst = max(findings, key=lambda f: (VERDICTS.index(f.verdict), f.nats), default=None)
    return Summary(
        verdict=worst.verdict if worst else "unknown",
        label=worst.label if worst else "",
        probability=worst.probability if worst else 0.0,
        evidence=[{"class": e.evidence_class, "text": e.text, "nats": e.nats} for e in worst.evidence] if worst else [],
        counts={verdict: sum(f.verdict == verdict for f in findings) for verdict in VERDICTS},
        gaps=sorted({f"{gap.sensor}: {gap.reason}" for gap in gaps}),
    )
