"""How many ordinary conversations are taken for a reverse shell, and how many shells are not: both played by chance.

`tests/conversations` draws programs, paths and carriers; packets go through the flow table and its observations through
the detector. What is generated is as faithful as the generator: real programs are judged by benchmarks/tunnels.py.
An ordinary class that is known not to be told from typing is counted apart.
Counts by class and carrier go to benchmarks/results/conversations.json, with seeds of the worst to be played again. It
fails if an ordinary one is ever confirmed more often than one in a thousand. No peer judges this.
Run: .venv/bin/python benchmarks/conversations.py [how many of each]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from random import Random

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from conversations.ordinary import ALIKE, ORDINARY  # noqa: E402
from conversations.shells import SHELLS  # noqa: E402
from conversations.wire import judge, talk  # noqa: E402

RESULT = Path(__file__).resolve().parent / "results" / "conversations.json"
EACH = 360
CONFIRMED_MAX = 1e-3
SEEDS_MAX = 8


def main() -> None:
    each = int(sys.argv[1]) if len(sys.argv) > 1 else EACH
    counts = {"ordinary": play(ORDINARY, each), "alike": play(ALIKE, each), "shells": play(SHELLS, each)}
    totals = {name: total(rows) for name, rows in counts.items()}
    print(totals)
    RESULT.write_text(json.dumps({"each": each, "totals": totals, "classes": counts}, indent=1) + "\n")
    one = totals["ordinary"]
    sys.exit(one["confirmed"] > CONFIRMED_MAX * one["played"])


def play(programs: dict, each: int) -> dict[str, dict]:  # type: ignore[type-arg]
    """Return the counts of each class on each of its carriers."""
    counts = {}
    for program, carriers in programs.items():
        for carrier in carriers:
            row = {"played": each, "suspect": 0, "at_the_end": 0, "confirmed": 0, "confirmed_seeds": []}
            for seed in range(each):
                one = judge(talk(program, Random(f"{program.__name__} {carrier} {seed}"), carrier))
                row["suspect"] += one.suspect
                row["at_the_end"] += one.stands
                row["confirmed"] += one.confirmed
                if one.confirmed and programs is ORDINARY:
                    row["confirmed_seeds"] = [*row["confirmed_seeds"], seed][:SEEDS_MAX]
            counts[f"{program.__name__} {carrier}"] = row
            print(f"{program.__name__} {carrier}", row, flush=True)
    return counts


def total(rows: dict[str, dict]) -> dict[str, int]:  # type: ignore[type-arg]
    """Return the sums of all classes."""
    return {name: sum(row[name] for row in rows.values()) for name in ("played", "suspect", "at_the_end", "confirmed")}


if __name__ == "__main__":
    main()
