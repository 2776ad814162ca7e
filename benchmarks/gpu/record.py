"""Record every workload of `workloads.py` with the daemon, at 10 Hz, beside a line of labels for each.

    record.py [--seconds S] [--budget-s S]

Writes OUT/record/GROUP/*.ggrec (replay them with ``gpuguard replay``) and OUT/labels.jsonl: name, label, family,
intensity, evasion, pid, start and end, what the program said, and a gap where it failed. A workload that is in the
labels already is not run again; what does not fit into the budget is left for the next call.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import time
from itertools import groupby
from typing import TYPE_CHECKING

from agent import agent
from machine import BUSY_PIDS, OUT, REAL, context, environment, prepare_standins, read_lines, write_line
from workloads import Workload, workloads

if TYPE_CHECKING:
    from collections.abc import Iterable

LABELS = OUT / "labels.jsonl"
#: What starting PyTorch, compiling its kernels and filling memory may take beside the seconds that are recorded.
SLACK_S = 45.0
#: Between two workloads the GPU comes to rest, so that no window holds both.
REST_S = 1.5


def run(workload: Workload, seconds: float) -> dict[str, object]:
    """Run one workload to its end; return its line of labels."""
    command = [*workload.command, "--seconds", f"{seconds:g}"]
    start_ns = time.time_ns()
    program = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment())
    if not REAL:
        BUSY_PIDS.write_text(str(program.pid))
    gap = ""
    try:
        said, complaint = program.communicate(timeout=seconds + SLACK_S)
        if program.returncode:
            gap = f"status {program.returncode}: {complaint.strip()[-500:]}"
    except subprocess.TimeoutExpired:
        program.kill()
        said, _ = program.communicate()
        gap = f"did not end within {seconds + SLACK_S:g} s"
    finally:
        if not REAL:
            BUSY_PIDS.write_text("")
    lines = said.strip().splitlines()
    return {
        "name": workload.name, "group": workload.group, "label": workload.label, "family": workload.family,
        "intensity": workload.intensity, "evasion": workload.evasion, "pid": program.pid, "start_ns": start_ns,
        "end_ns": time.time_ns(), "said": json.loads(lines[-1]) if lines and not gap else None, "gap": gap,
    }


def record_group(group: str, todo: Iterable[Workload], seconds: float, until_s: float) -> None:
    """Record what fits into the time; each group is a recording of its own."""
    folder = OUT / "work" / f"{group}-{time.time_ns()}"
    with agent(folder, record=True):
        for workload in todo:
            if time.monotonic() + seconds + 10 > until_s:
                print(f"{workload.name}: left for the next call")
                continue
            line = run(workload, seconds)
            write_line(LABELS, line)
            print(f"{workload.name}: {line['gap'] or 'recorded'}")
            time.sleep(REST_S)
    for part in sorted((folder / "state" / "guard" / "records").glob("*.ggrec")):
        target = OUT / "record" / group / f"{folder.name}-{part.name}"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(part, target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--budget-s", type=float, default=460.0)
    parser.add_argument("--only", help="workloads whose name holds this")
    arguments = parser.parse_args()
    until_s = time.monotonic() + arguments.budget_s
    prepare_standins()
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "machine.json").write_text(json.dumps(context(), indent=2) + "\n")
    done = {one["name"] for one in read_lines(LABELS) if not one["gap"]}
    todo = [one for one in workloads() if one.name not in done and (arguments.only or "") in one.name]
    for group, members in groupby(todo, lambda one: one.group):
        if time.monotonic() + arguments.seconds + 20 < until_s:
            record_group(group, list(members), arguments.seconds, until_s)


if __name__ == "__main__":
    main()
