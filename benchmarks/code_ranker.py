"""What the kernel classifier finds in projects it has not seen, against its targets (`gpuguard.code.evaluation`).

Trains the forest nine times, whole project groups and families of our own modules left out, so it needs the extra
`train` (LightGBM), the table of kernels under GPUGUARD_DATA_DIR, our modules (`make fixtures-matrix`), and some
minutes. Targets: AUC of the ranker, the share of hashing modules found at a
kernel false positive rate of 1e-3 with constants and with constants masked, projects missed, what dead float code
costs. On our own modules: what windows and loops find. Run: make bench-code-ranker.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path

from gpuguard.code import evaluation, train

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "code_ranker.json"
#: Targets that are bounds from above.
MOST = ("projects_missed", "dilution_points")


def main() -> None:
    data = Path(os.environ.get("GPUGUARD_DATA_DIR", ""), "sass", "kernels.csv.gz")
    if not data.is_file():
        print(f"not measured: no table of kernels at {data} (GPUGUARD_DATA_DIR)")
        return
    if importlib.util.find_spec("lightgbm") is None:
        print("not measured: LightGBM is missing (pip install gpuguard[train])")
        return
    if not any((ROOT / "build" / "matrix").glob("*.cubin")):
        print("not measured: our own modules are not compiled (make fixtures-matrix)")
        return
    *_, result = train.measured(data, ROOT / "build" / "matrix", ROOT / "tests" / "fixtures" / "cuda" / "families.csv")
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    figures = {name: one["value"] for name, one in result["figures"].items()}
    figures["projects_missed"] = len(result["projects_missed"])
    figures["dilution_points"] = round(100 * max(
        figures["masked_module_recall"] - figures[f"masked_module_recall_float_{share}"]
        for share in evaluation.DEAD_FLOAT_SHARES), 2)
    missed = []
    for name, target in evaluation.TARGETS.items():
        good = figures[name] <= target if name in MOST else figures[name] >= target
        interval = result["figures"].get(name, {})
        print(f"{name:24} {figures[name]:8} target {target:6} {'met' if good else 'MISSED'}  "
              f"{interval.get('low', '')} .. {interval.get('high', '')}")
        missed += [] if good else [name]
    for way, one in result["own"]["recall"].items():
        print(f"own modules, {way:18} {one['value']:8}  {one['low']} .. {one['high']}")
    if missed:
        sys.exit(f"missed: {', '.join(missed)}")


if __name__ == "__main__":
    main()
