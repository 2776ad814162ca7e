"""The demo, many times in a row: ``python -m gpuguard.lab.soak --times 20 [--standins DIR]``.

One line a run, then the spread of every delay. A run fails if anything was missed, late, left behind or wrongly
accused; as root it also fails if an eye was closed, since then all of them can be open.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from typing import TYPE_CHECKING

from gpuguard.lab.namespaces import LabClosed
from gpuguard.lab.performance import perform
from gpuguard.lab.scenario import Settings
from gpuguard.lab.tale import judge

if TYPE_CHECKING:
    from gpuguard.ui.report import Measure


def main() -> int:
    """Run, print, and return 1 if any run failed."""
    parser = argparse.ArgumentParser(prog="python -m gpuguard.lab.soak", description=__doc__)
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--standins", default=os.environ.get("GPUGUARD_STANDINS", ""))
    options = parser.parse_args()
    measured: dict[str, list[Measure]] = {}
    failed = 0
    for number in range(1, options.times + 1):
        faults, measures = _once(Settings(standins=options.standins))
        failed += bool(faults)
        for one in measures:
            measured.setdefault(one.what, []).append(one)
        delays = "  ".join("-" if m.value_s is None else f"{m.value_s:.2f} s" for m in measures)
        _say(f"run {number:2} of {options.times}  {'failed' if faults else 'ok':6}  {delays}")
        for fault in faults:
            _say(f"    {fault}")
    for what, ones in measured.items():
        values = sorted(m.value_s for m in ones if m.value_s is not None)
        if values:
            _say(f"{what}: median {statistics.median(values):.2f} s, worst {values[-1]:.2f} s, "
                 f"target {ones[0].target_s:g} s, in {len(values)} of {options.times} runs")
    _say(f"{options.times - failed} of {options.times} runs were right")
    return 1 if failed else 0


def _once(settings: Settings) -> tuple[list[str], tuple[Measure, ...]]:
    try:
        tale, left = perform(settings, lambda _line, _event: None)
    except LabClosed as closed:
        return [str(closed)], ()
    judgement = judge(tale)
    late = [f"late: {what}" for what in judgement.late]
    closed_eyes = list(judgement.excused) if os.geteuid() == 0 else []
    return [*judgement.missing, *judgement.accused, *late, *(f"left behind: {w}" for w in left), *closed_eyes], \
        judgement.measures


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
