"""Record every workload of `workloads.py` with the daemon, at 10 Hz, beside a line of labels for each.

    record.py [--seconds S] [--budget-s S] [--only PART] [--collect]

Writes OUT/record/GROUP/*.ggrec (replay them with ``gpuguard replay``) and OUT/labels.jsonl: name, label, family,
intensity, evasion, pid, between which times it worked, what the program said, and a gap where it failed. A workload
that is in the labels already is not run again; what does not fit into the budget is left for the next call. What a
call that was cut off had recorded is collected by the next, or by ``--collect``.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import shutil
import subprocess
import sys
import time
from itertools import groupby
from typing import TYPE_CHECKING

from agent import agent
from machine import (
    BUSY_PIDS,
    HERE,
    OUT,
    PATIENCE,
    REAL,
    WORK,
    context,
    end_in_order,
    environment,
    last_line,
    prepare_standins,
    read_lines,
    write_line,
)
from questions import ask
from workloads import Workload, workloads

from gpuguard.sensors.launches import cooperative

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

LABELS = OUT / "labels.jsonl"
#: What starting PyTorch, compiling its kernels and filling memory may take beside the seconds that are recorded.
SLACK_S = 45.0 * PATIENCE
#: Between two workloads the GPU comes to rest, so that no window holds both.
REST_S = 1.5


def run(workload: Workload, seconds: float, before: Sequence[str] = (), **changed: str) -> dict[str, object]:
    """Run one workload to its end, by the command ``before`` if any; return its line of labels."""
    command = [*before, *workload.command, "--seconds", f"{seconds:g}"]
    start_ns = time.time_ns()
    told: dict[str, object] = {
        "name": workload.name, "group": workload.group, "label": workload.label, "family": workload.family,
        "intensity": workload.intensity, "evasion": workload.evasion, "start_ns": start_ns,
    }
    try:
        program = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL,
                                   text=True, env={**environment(), **changed})
    except OSError as error:
        return told | {"gap": str(error)}
    if not REAL:
        BUSY_PIDS.write_text(str(program.pid))
    gap, said = "", {}
    try:
        output, complaint = program.communicate(timeout=seconds + SLACK_S)
        if program.returncode:
            gap = f"status {program.returncode}: {complaint.strip()[-500:]}"
        else:
            said = last_line(output)
    except subprocess.TimeoutExpired:
        gap = f"did not end within {seconds + SLACK_S:g} s"
    except ValueError as error:
        gap = str(error)
    finally:
        program.kill()
        program.wait()
        if not REAL:
            BUSY_PIDS.write_text("")
    # Programs of our own say when they worked; before that they compile, start the driver and fill memory.
    begun_ns, ended_ns = (int(said[key] * 1e9) if isinstance(said.get(key), float) else other
                          for key, other in (("begun_s", start_ns), ("ended_s", time.time_ns())))
    return told | {"pid": program.pid, "begun_ns": begun_ns, "ended_ns": ended_ns, "said": said, "gap": gap}


def telling(rings: Path, guard: int) -> tuple[list[str], dict[str, str]]:
    """Return command and variables by which a program tells of its launches in a folder that this guard reads.

    The guard looks at whom a ring is of. That it may of one who has no more rights than itself, in its own namespace.
    """
    before = ["nsenter", f"--user=/proc/{guard}/ns/user", "--preserve-credentials",
              "setpriv", "--bounding-set=-all", "--inh-caps=-all"]
    return before, {cooperative.FOLDER_VARIABLE: str(rings), "CUDA_INJECTION64_PATH": str(cooperative.LIBRARY)}


@functools.cache
def probes_are_refused() -> bool:
    """Return whether launches can only be had of programs that tell them, and can be had so."""
    if not all(map(shutil.which, ("unshare", "nsenter", "setpriv"))) or "gap" not in ask("launch_eye", 40 * PATIENCE):
        return False
    own = subprocess.run(["unshare", "--user", "--map-root-user", "true"], capture_output=True, check=False)
    return own.returncode == 0


@functools.cache
def gpm_is_for_root_only() -> bool:
    """Return whether the guard, which is not root, is refused what root is given."""
    return REAL and "gap" in ask("gpm_without_root", 25) and "answer" in ask("gpm_here", 25)


@contextlib.contextmanager
def counters(folder: Path) -> Iterator[None]:
    """Record the counters as root sees them while the block runs; their log lies in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "counters.log").open("wb") as log:
        program = subprocess.Popen([sys.executable, str(HERE / "counters.py"), str(folder)], env=environment(),
                                   stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd="/")
    try:
        yield
    finally:
        program.terminate()
        try:
            program.wait(5 * PATIENCE)
        except subprocess.TimeoutExpired:
            program.kill()


def record_group(group: str, todo: Iterable[Workload], seconds: float, until_s: float) -> None:
    """Record what fits into the time; each group is a recording of its own."""
    folder = WORK / f"record-{group}-{time.time_ns()}"
    rings = folder / "rings" if probes_are_refused() else None
    beside = counters(folder / "as-root") if gpm_is_for_root_only() else contextlib.nullcontext()
    try:
        with agent(folder, record=True, rings=rings) as guard, beside:
            before, variables = telling(rings, guard.pid) if rings else ([], {})
            for workload in todo:
                if time.monotonic() + seconds + 10 > until_s:
                    print(f"{workload.name}: left for the next call", flush=True)
                    continue
                line = run(workload, seconds, before, **variables)
                write_line(LABELS, line)
                print(f"{workload.name}: {line['gap'] or 'recorded'}", flush=True)
                time.sleep(REST_S)
    finally:
        collect()


def collect() -> None:
    """Copy what daemons have recorded to the results, also those of a call that was cut off."""
    for part in sorted([*WORK.glob("record-*/state/guard/records/*.ggrec"), *WORK.glob("record-*/as-root/*.ggrec")]):
        run_of, by = part.relative_to(WORK).parts[0], "root-" if part.parent.name == "as-root" else ""
        target = OUT / "record" / run_of.split("-")[1] / f"{run_of}-{by}{part.name}"
        if not target.exists() or target.stat().st_size != part.stat().st_size:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(part, target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--budget-s", type=float, default=450.0)
    parser.add_argument("--only", help="workloads whose name holds this")
    parser.add_argument("--collect", action="store_true", help="only bring home what was recorded before")
    arguments = parser.parse_args()
    end_in_order()
    collect()
    if arguments.collect:
        return
    until_s = time.monotonic() + arguments.budget_s
    prepare_standins()
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "machine.json").write_text(json.dumps(context(), indent=2) + "\n")
    before = read_lines(LABELS)
    done = {one["name"] for one in before if not one["gap"]}
    failed = {one["name"] for one in before} - done
    todo = [one for one in workloads() if one.name not in done and (arguments.only or "") in one.name]
    todo.sort(key=lambda one: one.name in failed)  # what failed is tried again, but last
    for group, members in groupby(todo, lambda one: one.group):
        if time.monotonic() + arguments.seconds + 20 < until_s:
            try:
                record_group(group, list(members), arguments.seconds, until_s)
            except RuntimeError as error:  # the daemon: without it there is nothing to record
                write_line(OUT / "gaps.jsonl", {"group": group, "gap": str(error)})
                print(f"{group}: gap: {error}", flush=True)


if __name__ == "__main__":
    main()
