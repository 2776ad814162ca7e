"""How fast the kernels are, each beside what one would use instead, on one core; and on a GPU where there is one.

Claim, on one core: a forest of 200 trees, depth 6, 40 features scores a row within 5 us and many rows at least five
times as fast as LightGBM; features of a window of 16 channels and 64 ticks take 1 us, a tick of them 60 ns; launches
are aggregated at 100 million events a second. On an H200: 0.5 billion rows and 0.5 billion windows a second, of the
copy bandwidth and the rate of shared memory as measured in the same run.

The figures are medians of runs in turn, so that other load falls on all alike; CPU time on the CPU, CUDA events on the
GPU. Whatever fails is in the result under "failed", the rest beside it; every part is written as soon as it is
measured. Run: make bench-kernels. With an argument of "cuda" or "cpu" only that half; --out FILE writes elsewhere.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gpuguard.kernels import forest, launches, sequential, windows
from gpuguard.kernels.opcodes import Forest

if TYPE_CHECKING:
    from collections.abc import Callable

TREES, DEPTH, FEATURES = 200, 6, 40
ROUNDS, TICK_ROUNDS = 15, 500
RESULT = Path(__file__).parent / "results" / "kernels.json"

#: figure: at most (True) or at least (False) this.
TARGETS = {
    "forest_row_us": (5.0, True), "forest_batch_times_lightgbm": (5.0, False), "windows_us": (1.0, True),
    "tick_ns": (60.0, True), "launch_events_per_s": (100e6, False),
    "cuda_forest_rows_per_s": (0.5e9, False), "cuda_windows_per_s": (0.5e9, False),
}


#: What may be missing: it is beside what is measured here.
PEERS = {"lightgbm", "pandas", "cuda XGBoost", "cuda nvForest"}


class Results:
    """What was measured so far, on disk."""

    def __init__(self, found: dict[str, Any], path: Path) -> None:
        self.found, self.path = found, path
        self.failed: dict[str, str] = {}

    def add(self, **figures: float) -> None:
        """Print and keep figures."""
        for name, value in figures.items():
            target, most = TARGETS.get(name, (None, True))
            verdict = "" if target is None else "met" if (value <= target) == most or value == target else "MISSED"
            print(f"{name:36} {value:14.6g} {verdict}", flush=True)
            self.found[name] = float(f"{value:.4g}")
        self.path.write_text(json.dumps({**self.found, "failed": self.failed}, indent=1) + "\n")

    def part(self, name: str, work: Callable[[Results], None]) -> None:
        """Measure one part; keep what came of it if it fails."""
        try:
            work(self)
        except Exception as error:  # noqa: BLE001 -- a part that cannot run must not cost the others their figures
            traceback.print_exc()
            self.failed[name] = f"{type(error).__name__}: {error}"[:300]
            self.add()

    def missed(self) -> list[str]:
        """Return the targets that were measured and missed."""
        return [name for name, (target, most) in TARGETS.items()
                if name in self.found and (self.found[name] > target if most else self.found[name] < target)]


def medians_s(works: dict[str, Callable[[], object]], rounds: int = ROUNDS) -> dict[str, float]:
    """Return the median CPU seconds of each, taken in turn, after one run that compiles."""
    for work in works.values():
        work()
    taken: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            begun = time.process_time()
            work()
            taken[name].append(time.process_time() - begun)
    return {name: statistics.median(some) for name, some in taken.items()}


def full_forest(dice: np.random.Generator) -> Forest:
    """Return a forest of full trees over thresholds of 190 values, as LightGBM's have."""
    inner = 2**DEPTH - 1
    size = 2 * inner + 1
    at = np.arange(size)
    node = np.where(at < inner, dice.integers(0, FEATURES, (TREES, size)), -1)
    value = np.where(at < inner, 0.0, dice.normal(size=(TREES, size)) / 10)
    offset = np.arange(TREES)[:, None] * size
    left, right = (np.where(at < inner, 2 * at + side, -1) + np.where(at < inner, offset, 0) for side in (1, 2))
    threshold = (dice.integers(1, 190, (TREES, size)) / 190).astype(np.float32)
    return Forest(node.ravel().astype(np.int32), threshold.ravel(), left.ravel().astype(np.int32),
                  right.ravel().astype(np.int32), value.ravel(), offset.ravel().astype(np.int32), 0.0)


def bench_forest(results: Results) -> None:
    dice = np.random.default_rng(1)
    packed = forest.pack(full_forest(dice), FEATURES)
    many, few = dice.random((50_000, FEATURES)).astype(np.float32), dice.random((500, FEATURES)).astype(np.float32)
    rows = [few[i:i + 1] for i in range(len(few))]
    works: dict[str, Callable[[], object]] = {
        "row": lambda: [forest.scores(row, packed, "cpu") for row in rows],
        "batch": lambda: forest.scores(many, packed, "cpu"),
        "numpy": lambda: forest.scores(few, packed, "numpy"),
        "plain": lambda: forest.scores(few[:5], packed, "reference"),
    }
    try:
        peer = lightgbm_forest(dice)
    except ImportError:
        results.failed["lightgbm"] = "not installed"
    else:
        works["lightgbm"] = lambda: peer.predict(many, num_threads=1, raw_score=True)
        works["lightgbm_row"] = lambda: [peer.predict(row, num_threads=1, raw_score=True) for row in rows[:100]]
    took = medians_s(works)
    results.add(forest_row_us=took["row"] / len(rows) * 1e6, forest_batch_row_us=took["batch"] / len(many) * 1e6,
                forest_numpy_row_us=took["numpy"] / len(few) * 1e6, forest_plain_row_us=took["plain"] / 5 * 1e6)
    if "lightgbm" in took:
        results.add(lightgbm_row_us=took["lightgbm_row"] / 100 * 1e6,
                    lightgbm_batch_row_us=took["lightgbm"] / len(many) * 1e6,
                    forest_batch_times_lightgbm=took["lightgbm"] / took["batch"])


def lightgbm_forest(dice: np.random.Generator) -> Any:
    """Return LightGBM's own forest of the same size, trained on noise with some signal so that its trees are full."""
    import lightgbm

    x = dice.random((20_000, FEATURES)).astype(np.float32)
    y = (x[:, :10].sum(axis=1) + dice.normal(size=len(x)) > 5).astype(int)
    return lightgbm.train({"objective": "binary", "num_leaves": 2**DEPTH, "max_depth": DEPTH, "max_bin": 191,
                           "min_data_in_leaf": 1, "verbosity": -1, "num_threads": 1, "deterministic": True},
                          lightgbm.Dataset(x, y), TREES)


def bench_windows(results: Results) -> None:
    dice = np.random.default_rng(2)
    x, held = dice.normal(size=(2_000, 64, 16)).astype(np.float32), windows.levels(16, -1.0, 1.0, 0.1)
    broken = x.copy()
    broken[:, :, 3], broken[:, ::7, 5] = np.nan, np.nan
    works: dict[str, Callable[[], object]] = {
        "cpu": lambda: windows.features(x, held, "cpu"), "gaps": lambda: windows.features(broken, held, "cpu"),
        "numpy": lambda: windows.features(x[:200], held, "numpy"),
        "plain": lambda: windows.features(x[:2], held, "reference"),
    }
    try:
        import pandas as pd
    except ImportError:
        results.failed["pandas"] = "not installed"
    else:
        frame = pd.DataFrame(x[0])
        works["pandas"] = lambda: [frame.mean(), frame.std(), frame.min(), frame.max(), frame.diff().abs().mean(),
                                   frame.corrwith(frame.shift(1)), (frame < -1).mean(), (frame > 1).mean()]
    took = medians_s(works)
    results.add(windows_us=took["cpu"] / len(x) * 1e6, windows_with_gaps_us=took["gaps"] / len(x) * 1e6,
                windows_numpy_us=took["numpy"] / 200 * 1e6, windows_plain_us=took["plain"] / 2 * 1e6)
    if "pandas" in took:
        results.add(windows_pandas_us=took["pandas"] * 1e6)
    bench_ticks(results, held)


def bench_ticks(results: Results, held: windows.Levels) -> None:
    """As they come, a few at a time and just written: of 2 MB at once the time to fetch them is measured too.

    A core of a shared host is half as fast again or slower for tenths of a second, though nothing else runs on it and
    no time is stolen: rounds over several seconds, where 15 would be over within one such spell.
    """
    ticks = np.random.default_rng(3).normal(size=(256, 8, 16)).astype(np.float32)
    fast, slow = windows.Scales(8, held, "cpu"), windows.Scales(8, held, "numpy")
    took = medians_s({"cpu": lambda: [fast.run(ticks) for _ in range(16)], "numpy": lambda: slow.run(ticks),
                      "features": lambda: [fast.features() for _ in range(100)]}, TICK_ROUNDS)
    a_tick = 1e9 / ticks[..., 0].size
    results.add(tick_ns=took["cpu"] / 16 * a_tick, tick_numpy_ns=took["numpy"] * a_tick,
                features_of_three_scales_ns=took["features"] / 100 / 8 * 1e9)


def bench_sequential(results: Results) -> None:
    subjects = 4_096
    x, zeros = np.random.default_rng(4).normal(size=(256, subjects)), np.zeros(subjects)
    tests = {"cusum": sequential.Cusum(zeros, zeros + 1, zeros + 0.5, 1.0, 20.0),
             "bets": sequential.Bets(zeros + 0.2, zeros + 0.5, np.array([0.2, 0.5, 1.0, 1.5]), 20.0)}
    for name, test in tests.items():
        state = sequential.start(test)
        took = medians_s({form: lambda form=form, test=test, state=state: sequential.run(x, test, state, form)
                          for form in ("cpu", "numpy")}, 5)
        results.add(**{f"{name}_{form}_ns": seconds / x.size * 1e9 for form, seconds in took.items()})


def bench_launches(results: Results) -> None:
    dice, count, keys = np.random.default_rng(5), 4_000_000, 4_096
    times, of = np.cumsum(dice.integers(100, 100_000, count)), dice.integers(0, keys, count).astype(np.int32)
    took = medians_s({"cpu": lambda: launches.event_rows(times, of, keys, "cpu"),
                      "numpy": lambda: launches.event_rows(times, of, keys, "numpy")}, 5)
    results.add(launch_events_per_s=count / took["cpu"], launch_events_numpy_per_s=count / took["numpy"])


# -- on a GPU ---------------------------------------------------------------------------------------------------------


def on_device_s(work: Callable[[], object], times: int = 10) -> float:
    """Return the median seconds of a piece of work between two CUDA events, warmed up."""
    from gpuguard.kernels.device import cuda

    for _ in range(3):
        work()
    cuda.synchronize()
    taken = []
    for _ in range(times):
        before, after = cuda.event(timing=True), cuda.event(timing=True)
        before.record()
        work()
        after.record()
        after.synchronize()
        taken.append(cuda.event_elapsed_time(before, after) / 1e3)
    return statistics.median(taken)


def bench_copy(results: Results) -> None:
    """Copy on the device: each byte is read and written."""
    from gpuguard.kernels.device import cuda

    source = cuda.device_array(1 << 29, np.float32)
    target = cuda.device_array_like(source)
    results.add(cuda_copy_bytes_per_s=8 * source.size / on_device_s(lambda: target.copy_to_device(source)))


def bench_shared(results: Results) -> None:
    """Loads from shared memory that wait for each other, as a walk's do, by full multiprocessors: words a second."""
    from gpuguard.kernels.device import cuda

    steps, threads = 2_048, 512
    blocks = cuda.get_current_device().MULTIPROCESSOR_COUNT * 4

    @cuda.jit
    def chase(jumps: Any, out: Any) -> None:
        table = cuda.shared.array(4_096, np.uint32)
        for i in range(cuda.threadIdx.x, 4_096, cuda.blockDim.x):
            table[i] = jumps[i]
        cuda.syncthreads()
        at = np.uint32(cuda.threadIdx.x)
        for _ in range(steps):
            at = table[at]
        out[cuda.grid(1)] = at

    out = cuda.device_array(blocks * threads, np.uint32)
    own_banks = (np.arange(4_096) + 32) % 4_096
    for name, jumps in (("free_of_conflicts", own_banks), ("at_random", np.random.default_rng(6).permutation(4_096))):
        there = cuda.to_device(jumps.astype(np.uint32))
        took = on_device_s(lambda there=there: chase[blocks, threads](there, out))
        results.add(**{f"cuda_shared_words_{name}_per_s": blocks * threads * steps / took})


def bench_cuda_forest(results: Results) -> None:
    from gpuguard.kernels.device import cuda

    packed = forest.pack(full_forest(np.random.default_rng(1)), FEATURES)
    there = forest.on_gpu(packed, 0)
    host = np.random.default_rng(2).random((1 << 20, FEATURES), np.float32)
    np.testing.assert_allclose(forest.scores(cuda.to_device(host[:4_096]), there)[0].copy_to_host(),
                               forest.scores(host[:4_096], packed, "numpy")[0], rtol=1e-4, atol=1e-3)
    for power in (14, 18, 20, 23):
        rows = cuda.to_device(np.tile(host, (max(1, (1 << power) >> 20), 1))[:1 << power])
        took = on_device_s(lambda rows=rows: forest.scores(rows, there))
        results.add(**{f"cuda_forest_2_{power}_rows_per_s": (1 << power) / took})
    best = max(value for name, value in results.found.items() if name.startswith("cuda_forest_2_"))
    results.add(cuda_forest_rows_per_s=best)
    loads = 2 * TREES * DEPTH + 5 * TREES
    for name in ("free_of_conflicts", "at_random"):
        limit = results.found[f"cuda_shared_words_{name}_per_s"] / loads
        results.add(**{f"cuda_forest_of_shared_{name}_ratio": best / limit})


def bench_cuda_windows(results: Results) -> None:
    from gpuguard.kernels.device import cuda

    held = windows.Levels(*(cuda.to_device(level) for level in windows.levels(16, -1.0, 1.0, 0.1)))
    host = np.random.default_rng(3).normal(size=(1 << 14, 64, 16)).astype(np.float32)
    plain = windows.features(host[:256], windows.levels(16, -1.0, 1.0, 0.1), "numpy")[0]
    made = windows.features(cuda.to_device(host[:256]), held, "cuda")[0].copy_to_host()
    np.testing.assert_allclose(made, plain, rtol=1e-3, atol=1e-4)
    for power in (10, 14, 18, 20):
        some = cuda.to_device(np.tile(host, (max(1, (1 << power) >> 14), 1, 1))[:1 << power])
        took = on_device_s(lambda some=some: windows.features(some, held, "cuda"))
        results.add(**{f"cuda_windows_2_{power}_per_s": (1 << power) / took})
    best = max(value for name, value in results.found.items() if name.startswith("cuda_windows_2_"))
    moved = 64 * 16 * 4 + len(windows.FEATURES) * 16 * 4
    results.add(cuda_windows_per_s=best,
                cuda_windows_of_copy_ratio=best * moved / results.found["cuda_copy_bytes_per_s"])


def bench_cuda_sequential(results: Results) -> None:
    from gpuguard.kernels.device import cuda

    subjects = 1 << 20
    zeros = np.zeros(subjects)
    test = sequential.Cusum(*(cuda.to_device(part) for part in (zeros, zeros + 1, zeros + 0.5)), 1.0, 20.0)
    state = sequential.State(*(cuda.to_device(part) for part in (
        np.zeros((subjects, 1)), zeros, np.zeros(1, np.int64), np.full(subjects, -1))))
    samples = cuda.to_device(np.random.default_rng(4).normal(size=(64, subjects)).astype(np.float32))
    took = on_device_s(lambda: sequential.run(samples, test, state, "cuda"))
    results.add(cuda_cusum_samples_per_s=64 * subjects / took)


def bench_cuda_xgboost(results: Results) -> None:
    """XGBoost on the GPU on a forest of the same size, rows already there."""
    import cupy
    import xgboost

    dice = np.random.default_rng(1)
    x = dice.random((20_000, FEATURES)).astype(np.float32)
    y = (x[:, :10].sum(axis=1) + dice.normal(size=len(x)) > 5).astype(int)
    model = xgboost.train({"max_depth": DEPTH, "device": "cuda", "objective": "binary:logistic"},
                          xgboost.DMatrix(x, y), TREES)
    rows = cupy.asarray(dice.random((1 << 20, FEATURES), np.float32))
    took = on_device_s(lambda: model.inplace_predict(rows))
    results.add(cuda_xgboost_rows_per_s=len(rows) / took)


def bench_cuda_nvforest(results: Results) -> None:
    """LightGBM's own forest of the same size by nvForest, rows already there, in the fastest of its layouts."""
    import cupy

    dice = np.random.default_rng(1)
    rows = cupy.asarray(dice.random((1 << 20, FEATURES), np.float32))
    took = min(on_device_s(lambda model=model: model.predict(rows)) for model in nvforest_models(dice, "gpu"))
    results.add(cuda_nvforest_rows_per_s=len(rows) / took)


def nvforest_models(dice: np.random.Generator, device: str) -> list[Any]:
    """Return the same forest in each layout that nvForest has."""
    import nvforest

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "forest.txt"
        lightgbm_forest(dice).save_model(path)
        return [nvforest.load_model(path, device=device, model_type="lightgbm", layout=layout)
                for layout in ("depth_first", "breadth_first", "layered")]


def main() -> int:
    """Measure what is asked for and there; return 1 where a target is missed or a part failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", nargs="?", choices=["all", "cpu", "cuda"], default="all")
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    which, path = arguments.which, arguments.out
    path.parent.mkdir(parents=True, exist_ok=True)
    results = Results(json.loads(path.read_text()) if which != "all" and path.exists() else {}, path)
    results.found.pop("failed", None)
    results.add(load_average=os.getloadavg()[0])
    if which in {"all", "cpu"}:
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
        for name, work in (("forest", bench_forest), ("windows", bench_windows), ("sequential", bench_sequential),
                           ("launches", bench_launches)):
            results.part(name, work)
    if which in {"all", "cuda"}:
        from gpuguard.kernels.device import cuda

        if cuda.is_available():
            for name, work in (("cuda copy", bench_copy), ("cuda shared memory", bench_shared),
                               ("cuda windows", bench_cuda_windows), ("cuda forest", bench_cuda_forest),
                               ("cuda sequential", bench_cuda_sequential), ("cuda XGBoost", bench_cuda_xgboost),
                               ("cuda nvForest", bench_cuda_nvforest)):
                results.part(name, work)
        else:
            print("no CUDA device: the GPU half was not measured")
    missed = results.missed()
    print(f"missed: {', '.join(missed) or 'none'}; failed: {', '.join(results.failed) or 'none'}")
    return 1 if missed or set(results.failed) - PEERS else 0


if __name__ == "__main__":
    raise SystemExit(main())
