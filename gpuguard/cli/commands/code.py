"""``gpuguard code``: which GPU code this host's operator vouches for."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from gpuguard.cli.arguments import TO_READ
from gpuguard.cli.output import EXIT_CLEAR, EXIT_UNREADABLE, complain, write_line


@click.group()
def command() -> None:
    """Learn and show the GPU code that `gpuguard scan` does not judge.

    \b
    Examples:
      sudo gpuguard code learn /usr/local/cuda/lib64
      gpuguard code learn venv/lib/python3.12/site-packages/nvidia --allow ci/allowed-code.txt
      gpuguard code show
    """


@command.command()
@click.argument("paths", metavar="PATH...", nargs=-1, required=True, type=TO_READ)
@click.option("--allow", type=click.Path(path_type=Path), help="The list to extend, if not the one of this host.")
def learn(paths: tuple[Path, ...], allow: Path | None) -> None:
    """Put the code of every kernel below PATH... on the allow list, by its hash.

    Learn only what comes from a source you trust: nothing on the list is judged again. What would have been found
    suspect without it is counted, and listed on standard error. Exit status 3: something could not be read, or the
    list could not be written.
    """
    from gpuguard.code import allow as lists
    from gpuguard.code.scanning import NoWorker, files_below, scan_targets
    from gpuguard.code.verdicts import FileVerdict, KernelVerdict

    place = allow or lists.default_path()
    found: set[str] = set()
    suspect = unread = 0
    try:
        old = lists.load(place).digests()
        for event in scan_targets(target for path in paths for target in files_below(path)):
            if isinstance(event, KernelVerdict) and event.arch.startswith("sm_"):
                found.add(event.text_sha256)
                if event.verdict in ("suspect", "confirmed"):
                    suspect += 1
                    complain(f"{event.label}: {event.kernel} in {event.path}")
            elif isinstance(event, FileVerdict):
                unread += bool(event.gaps)
                for gap in (*event.malformed, *event.gaps):
                    complain(f"not read: {event.path}: {gap}")
        lists.save(place, old | found)
    except (lists.BadAllowList, NoWorker, OSError) as error:
        complain(f"gpuguard: {error}")
        sys.exit(EXIT_UNREADABLE)
    click.echo(f"{len(found - old)} kernels learnt, {len(old | found)} on {place}; {suspect} of them look like hashing")
    sys.exit(EXIT_UNREADABLE if unread else EXIT_CLEAR)


@command.command()
@click.option("--allow", type=click.Path(path_type=Path), help="The list to show, if not the one of this host.")
@click.option("-o", "--output", type=click.Choice(["table", "json"]), default="table", help="Form of the output.")
def show(allow: Path | None, output: str) -> None:
    """Say where the allow list is and how much is on it."""
    from gpuguard.code import allow as lists

    place = allow or lists.default_path()
    try:
        count = len(lists.load(place))
    except (lists.BadAllowList, OSError) as error:
        complain(f"gpuguard: {error}")
        sys.exit(EXIT_UNREADABLE)
    if output == "json":
        write_line({"path": str(place), "kernels": count})
    else:
        click.echo(f"{count} kernels on {place}")
