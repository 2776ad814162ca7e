"""Opcode features and forest scores: what their names say, and every compiled form equal to the plain one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuguard.kernels import opcodes
from gpuguard.kernels.opcodes import COLUMN, COLUMNS, COUNT_MAX, DERIVED, FEATURE_NAMES, FEATURES, MNEMONICS, Forest

count = st.one_of(st.integers(0, 40), st.sampled_from([COUNT_MAX, 10**6]))
row = st.tuples(
    st.dictionaries(st.sampled_from([*MNEMONICS, "UNK1ab", "nonsense"]), count, max_size=12),
    st.dictionaries(st.sampled_from([*DERIVED, "invented"]), count, max_size=8))


def random_forest(dice, trees=7, depth=4):
    nodes = []

    def grow(level):
        at = len(nodes)
        nodes.append(None)
        if level == depth or dice.random() < 0.2:
            nodes[at] = (-1, 0.0, -1, -1, float(dice.normal()))
        else:
            left, right = grow(level + 1), grow(level + 1)
            nodes[at] = (int(dice.integers(len(FEATURES))), float(np.float32(dice.random())), left, right, 0.0)
        return at

    roots = [grow(0) for _ in range(trees)]
    columns = list(zip(*nodes, strict=True))
    kinds = (np.int32, np.float32, np.int32, np.int32, np.float64)
    return Forest(*(np.array(part, kind) for part, kind in zip(columns, kinds, strict=True)),
                  np.array(roots, np.int32), 0.25)


@settings(max_examples=80, deadline=None)
@given(st.lists(row, max_size=8), st.integers(0, 2**32))
def test_the_compiled_form_equals_the_plain_one(rows, seed):
    table = opcodes.counts(rows)
    plain = opcodes.features_reference(table)
    assert plain.dtype == np.float32
    assert plain.shape == (len(rows), len(FEATURES))
    assert np.isfinite(plain).all()
    assert ((plain >= 0) & (plain <= 1)).all()
    # Both sum doubles, in the same order, and round once.
    np.testing.assert_array_equal(opcodes.features(table, "cpu")[0], plain)
    forest = random_forest(np.random.default_rng(seed))
    forest.check(len(FEATURES))
    np.testing.assert_array_equal(opcodes.scores(plain, forest, "cpu")[0], opcodes.scores_reference(plain, forest))


SIMULATED = """
import sys
import numpy as np
sys.path[:0] = [{tests!r}]
from test_opcodes_parity import random_forest
from numba import cuda
from gpuguard.kernels import opcodes
assert type(cuda.current_context()).__module__.startswith("numba.cuda.simulator")
dice = np.random.default_rng(3)
rows = [({{name: int(dice.integers(0, 90)) for name in dice.choice(opcodes.MNEMONICS, 9)}},
         {{name: int(dice.integers(0, 30)) for name in opcodes.DERIVED}}) for _ in range(3)]
table = opcodes.counts([({{}}, {{}}), *rows])
forest = random_forest(dice)
plain = opcodes.features_reference(table)
np.testing.assert_array_equal(opcodes.features(table, "cuda")[0], plain)
np.testing.assert_array_equal(opcodes.scores(plain, forest, "cuda")[0], opcodes.scores_reference(plain, forest))
assert opcodes.features(table[:0], "cuda")[0].shape == (0, len(opcodes.FEATURES))
assert opcodes.scores(plain[:0], forest, "cuda")[0].shape == (0,)
print("same")
"""


def test_the_cuda_form_equals_the_plain_one_in_the_simulator():
    # Of its own process: the simulator is chosen when numba.cuda is first imported.
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SIMULATED.format(tests=str(Path(__file__).parent))],
        env={**os.environ, "NUMBA_ENABLE_CUDASIM": "1"}, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "same", done.stderr


@pytest.mark.gpu
def test_the_cuda_form_equals_the_plain_one_on_a_gpu():
    from numba import cuda

    if not cuda.is_available():
        pytest.skip("no CUDA device, or no driver that this numba can use")
    dice = np.random.default_rng(5)
    table = dice.integers(0, 1000, (300, len(COLUMNS))).astype(float)
    forest = random_forest(dice, trees=50, depth=7)
    plain = opcodes.features_reference(table)
    np.testing.assert_allclose(opcodes.features(table, "cuda")[0], plain, rtol=1e-6)
    np.testing.assert_array_equal(opcodes.scores(plain, forest, "cuda")[0], opcodes.scores_reference(plain, forest))


def test_features_say_what_their_names_say():
    table = opcodes.counts([({"LOP3": 40, "SHF": 20, "IMAD": 30, "FFMA": 10, "UNK123": 5, "sha256": 5},
                             {"rot": 10, "lop_xor3": 20, "imad_mov": 10, "n_ctrl": 0})])
    of = dict(zip(FEATURE_NAMES, opcodes.features(table)[0][0].tolist(), strict=True))
    assert table[0, COLUMN["total"]] == 110
    assert table[0, COLUMN["unknown"]] == 10
    assert of["logic_ratio"] == pytest.approx(60 / 110)
    assert of["unknown_ratio"] == pytest.approx(10 / 110)
    assert of["multiply_ratio"] == pytest.approx(20 / 110)  # the moves are none
    assert of["xor_of_lop3_ratio"] == pytest.approx(0.5)
    assert of["rot_of_shf_ratio"] == pytest.approx(0.5)
    assert of["float_ratio"] == pytest.approx(10 / 110)
    assert of["float_against_arithmetic_ratio"] == pytest.approx(10 / 90)
    assert of["shf_and_lop3_ratio"] == pytest.approx(20 / 110)
    assert of["top_ratio"] == pytest.approx(40 / 110)
    assert of["top3_ratio"] == pytest.approx(90 / 110)


def test_features_do_not_grow_with_length():
    one = {"LOP3": 40, "SHF": 20, "LDG": 3, "BRA": 2}
    ten = {name: 10 * count for name, count in one.items()}
    table = opcodes.counts([(one, {"rot": 7, "n_ctrl": 2}), (ten, {"rot": 70, "n_ctrl": 20})])
    first, second = opcodes.features(table)[0]
    np.testing.assert_allclose(first, second, rtol=1e-6)


@pytest.mark.parametrize("bad", [-1, COUNT_MAX + 1])
def test_counts_out_of_range_are_refused(bad):
    with pytest.raises(ValueError, match="a count of"):
        opcodes.counts([({"LOP3": bad}, {})])
    with pytest.raises(ValueError, match="a count of"):
        opcodes.counts([({}, {"rot": bad})])


@pytest.mark.parametrize(("part", "value", "why"), [
    ("left", 0, "behind their parents"), ("right", 10**6, "behind their parents"), ("feature", 10**6, "features"),
    ("root", -1, "roots"), ("value", np.nan, "no numbers")])
def test_a_forest_that_could_not_be_walked_is_refused(part, value, why):
    forest = random_forest(np.random.default_rng(1))
    array = getattr(forest, part).copy()
    array[int(np.argmax(forest.feature >= 0)) if part != "root" else 0] = value
    with pytest.raises(ValueError, match=why):
        forest._replace(**{part: array}).check(len(FEATURES))


def test_importing_it_loads_no_numba():
    code = "import sys, gpuguard.kernels.opcodes; print('numba' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
