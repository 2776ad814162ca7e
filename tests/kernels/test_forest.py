"""Scores of forests: every form equal to a walk through the trees, whatever the rows and the trees are."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))

from forests import random_forest

from gpuguard.kernels import forest


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 7), st.integers(1, 4), st.sampled_from([2, 20, 3_000]),
       st.sampled_from([0, 1, 5, 70, 300]))
def test_every_form_equals_a_walk(seed, depth, classes, kinds, rows):
    dice = np.random.default_rng(seed)
    trained, owner = random_forest(dice, 9, depth, kinds=kinds), np.arange(9) % classes
    packed = forest.pack(trained, 5, owner)
    x = dice.random((rows, 5))
    x = np.where(dice.random(x.shape) < 0.3, np.round(x * kinds) / kinds, x)
    x = np.where(dice.random(x.shape) < 0.1, dice.choice([np.nan, np.inf, -np.inf, -0.0, 1e38], x.shape), x)
    x = x.astype(np.float32)
    plain = forest.reference(x, trained, owner)
    for backend in ("reference", "numpy", "cpu"):
        made, form = forest.scores(x, packed, backend)
        assert form == backend
        assert made.shape == (rows, classes)
        np.testing.assert_allclose(made, plain, rtol=forest.TOLERANCE, atol=9 * forest.TOLERANCE)


def test_a_feature_with_many_thresholds_becomes_several_columns():
    trained = random_forest(np.random.default_rng(1), 40, 6, features=2, kinds=5_000, leaf_share=0)
    packed = forest.pack(trained, 2)
    thresholds = [len(np.unique(trained.threshold[trained.feature == feature])) for feature in (0, 1)]
    assert len(packed.source) == sum(-(-count // forest.EDGES) for count in thresholds) > 2
    x = np.random.default_rng(2).random((200, 2)).astype(np.float32)
    for backend in ("reference", "numpy", "cpu"):
        np.testing.assert_allclose(
            forest.scores(x, packed, backend)[0], forest.reference(x, trained), rtol=1e-5, atol=1e-4)


def test_what_cannot_be_walked_is_refused():
    trained = random_forest(np.random.default_rng(1), leaf_share=0)
    with pytest.raises(ValueError, match="no numbers"):
        forest.pack(trained._replace(threshold=np.full_like(trained.threshold, np.nan)), 5)
    with pytest.raises(ValueError, match="behind their parents"):
        forest.pack(trained._replace(left=np.zeros_like(trained.left)), 5)
    with pytest.raises(ValueError, match="features"):
        forest.pack(trained, 2)
    with pytest.raises(ValueError, match="leaves"):
        forest.pack(random_forest(np.random.default_rng(1), 1, 8, leaf_share=0), 5)
    with pytest.raises(ValueError, match="classes"):
        forest.pack(trained, 5, np.zeros(3, np.int32))
    with pytest.raises(ValueError, match="columns"):
        forest.pack(random_forest(np.random.default_rng(1), 600, 6, 300, leaf_share=0), 300)
    with pytest.raises(ValueError, match="over 5 features"):
        forest.scores(np.zeros((1, 4), np.float32), forest.pack(trained, 5))
