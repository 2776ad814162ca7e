"""What the kernel classifier finds in projects it has not seen, against its targets (`gpuguard.code.evaluation`).

Trains the forest nine times, whole project groups left out, so it needs the extra `train` (LightGBM), the table of
kernels under GPUGUARD_DATA_DIR, and some minutes. Targets: AUC of the ranker, the share of hashing modules found at a
kernel false positive rate of 1e-3 with constants and with constants masked, projects missed. Run: make
bench-code-ranker.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path

from gpuguard.code import evaluation, train

RESULT = Path(__file__).resolve().parent / "results" / "code_ranker.json"


def main() -> None:
    data = Path(os.environ.get("GPUGUARD_DATA_DIR", ""), "sass", "kernels.csv.gz")
    if not data.is_file():
        print(f"not measured: no table of kernels at {data} (GPUGUARD_DATA_DIR)")
        return
    if importlib.util.find_spec("lightgbm") is None:
        print("not measured: LightGBM is missing (pip install gpuguard[train])")
        return
    kernels = train.load(data)
    scores = train.out_of_fold(kernels)
    curve = train.calibrate(kernels, scores["whole"], evaluation.pooled_threshold(kernels, scores["whole"]))
    result = evaluation.evaluate(kernels, scores, curve)
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    figures = {name: one["value"] for name, one in result["figures"].items()}
    figures["projects_missed"] = len(result["projects_missed"])
    missed = []
    for name, target in evaluation.TARGETS.items():
        good = figures[name] <= target if name == "projects_missed" else figures[name] >= target
        interval = result["figures"].get(name, {})
        print(f"{name:24} {figures[name]:8} target {target:6} {'met' if good else 'MISSED'}  "
              f"{interval.get('low', '')} .. {interval.get('high', '')}")
        missed += [] if good else [name]
    if missed:
        sys.exit(f"missed: {', '.join(missed)}")


if __name__ == "__main__":
    main()
