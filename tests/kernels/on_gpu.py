"""What the CUDA forms must give, run in a process of its own: in Numba's simulator, or on a GPU. Prints "same"."""

from __future__ import annotations

import sys
import traceback
from pathlib import Path
from unittest import mock

import numpy as np
from numba import cuda

sys.path.insert(0, str(Path(__file__).parent))

from forests import random_forest

from gpuguard.kernels import forest, opcodes, sequential, windows
from gpuguard.kernels.launches import event_rows


def arrays_of(host):
    """Give an array on the host, and the same on the GPU by each of what is there: Numba, CuPy."""
    yield host
    yield cuda.to_device(host)
    try:
        import cupy
    except ImportError:
        return
    if cupy.cuda.is_available():
        yield cupy.asarray(host)


def back(made):
    """Return a result on the host."""
    return made.copy_to_host() if hasattr(made, "copy_to_host") else made.get() if hasattr(made, "get") else made


def check_windows(dice):
    for ticks, channels in ((64, 3), (8, 16), (7, 2), (1, 1)):
        x = (dice.normal(size=(3, ticks, channels)) * 10 + 50).astype(np.float32)
        x[0, :, 0], x[1, ::3, -1], x[2, 0, 0] = np.nan, np.inf, np.nan
        held = windows.levels(channels, 49, 51, 0.5)
        plain = windows.reference(x, held)
        for given in arrays_of(x):
            made, form = windows.features(given, held, "cuda")
            assert form == "cuda"
            assert isinstance(made, np.ndarray) == isinstance(given, np.ndarray) or "simulator" in type(made).__module__
            np.testing.assert_allclose(back(made), plain, rtol=1e-4, atol=100 * windows.TOLERANCE)


def check_forest(dice):
    for trees, depth, classes in ((9, 3, 1), (600, 4, 3), (4, 0, 2)):
        trained, owner = random_forest(dice, trees, depth), np.arange(trees) % classes
        packed = forest.pack(trained, 5, owner)
        x = dice.random((7, 5)).astype(np.float32)
        x[0, 0], x[1, :] = np.nan, np.inf
        plain, there = forest.reference(x, trained, owner), forest.on_gpu(packed, 0)
        assert (len(there.runs) > 1) == (trees == 600)
        for given in arrays_of(x):
            for made, form in (forest.scores(given, packed, device=0), forest.scores(given, there),
                               forest.scores(given, there, "cuda", 0)):
                assert form == "cuda"
                np.testing.assert_allclose(back(made), plain, rtol=forest.TOLERANCE, atol=trees * forest.TOLERANCE)
        for one in (packed, there):
            assert forest.scores(x[:0], one, "cuda")[0].shape == (0, classes)


def check_forest_stays(dice):
    there = forest.on_gpu(forest.pack(random_forest(dice), 5), 0)
    x, sent = dice.random((7, 5)).astype(np.float32), []
    for given in arrays_of(x):
        with mock.patch.object(cuda, "to_device", side_effect=cuda.to_device) as to_device:
            forest.scores(given, there)
        sent += [one.args[0] for one in to_device.call_args_list]
    assert len(sent) == 1
    assert sent[0] is x
    for backend, device in (("cpu", None), ("numpy", None), ("cuda", 1), ("auto", 1)):
        try:
            forest.scores(x, there, backend, device)
        except ValueError:
            continue
        raise AssertionError(f"a forest on GPU 0 was walked by {backend} on {device}")


def check_sequential(dice):
    subjects, rho = 3, np.array([0, 0.5, 0.9])
    tests = (sequential.Cusum(np.full(subjects, 0.4), np.full(subjects, 0.2), rho, 1.0, 2.0),
             sequential.Bets(np.full(subjects, 0.3), rho, np.array([0.2, 1.0]), 1.0))
    for test in tests:
        samples = dice.random((30, subjects))
        samples[4, 1] = np.nan
        plain, fast = sequential.start(test), sequential.start(test)
        there = sequential.State(*(cuda.to_device(part) for part in sequential.start(test)))
        for piece in (samples[:11], samples[11:]):
            sequential.run(piece, test, plain, "reference")
            assert sequential.run(piece, test, fast, "cuda") == "cuda"
            sequential.run(cuda.to_device(piece), test, there, "cuda")
        for one, other, third in zip(plain, fast, there, strict=True):
            np.testing.assert_allclose(other, one, rtol=1e-9)
            np.testing.assert_allclose(back(third), one, rtol=1e-9)


def check_events(dice):
    keys = dice.integers(0, 5, 300).astype(np.int32)
    times = np.cumsum(dice.integers(0, 9, 300) * dice.choice([0, 1, 2**39], 300))
    plain, _ = event_rows(times, keys, 6, "reference")
    # On the GPU it takes CuPy's arrays alone.
    pairs = [pair for pair in zip(arrays_of(times), arrays_of(keys), strict=True)
             if isinstance(pair[0], np.ndarray) or type(pair[0]).__module__.startswith("cupy")]
    for some_times, some_keys in pairs:
        made, form = event_rows(some_times, some_keys, 6, "cuda")
        assert form == "cuda"
        for one, other in zip(plain, made, strict=True):
            np.testing.assert_array_equal(back(other), one)


def check_opcodes(dice):
    table = opcodes.counts([({"IADD3": int(n), "LOP3": int(2 * n), "STG": 1}, {}) for n in dice.integers(1, 90, 7)])
    plain, trained = opcodes.features_reference(table), random_forest(dice, 9, 3, len(opcodes.FEATURES))
    for given in arrays_of(table):
        made, form = opcodes.features(given, "cuda")
        assert form == "cuda"
        np.testing.assert_allclose(back(made), plain, rtol=1e-6)
    there = opcodes.Forest(*(cuda.to_device(part) for part in trained[:6]), trained.base)
    for given in arrays_of(plain):
        for one in (trained, there):
            made, form = opcodes.scores(given, one, "cuda")
            assert form == "cuda"
            np.testing.assert_allclose(back(made), opcodes.scores_reference(plain, trained), rtol=1e-9)


def main():
    """Make every check, whatever came of the one before: who runs this on a borrowed GPU runs it once."""
    failed = []
    for check in (check_windows, check_forest, check_forest_stays, check_sequential, check_events, check_opcodes):
        try:
            check(np.random.default_rng(3))
        except Exception:  # noqa: BLE001
            traceback.print_exc(limit=-2)
            failed.append(check.__name__)
    print("not the same:" if failed else "same", *failed)


if __name__ == "__main__":
    main()
