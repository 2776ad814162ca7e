"""Scores in one pass over a decoder's counts, against features and forest one after the other."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuguard.code import decode
from gpuguard.code.classify import model
from gpuguard.kernels import code_scores, opcodes
from gpuguard.kernels.opcodes import FEATURES, Forest

NAMES, OTHERS = decode.mnemonics(), tuple(decode.DERIVED)


def a_forest(dice, trees=5, splits=20):
    """Trees grown at random: some of one leaf, some with a feature twice in a path, thresholds that counts do meet."""
    feature, threshold, left, right, value = [], [], [], [], []

    def grow(left_over):
        at = len(feature)
        leaf = left_over == 0
        feature.append(-1 if leaf else int(dice.integers(len(FEATURES))))
        threshold.append(float(np.float32(dice.choice([0.0, 0.25, 0.5, 1.0, 1 / 3, dice.random()]))))
        value.append(float(dice.normal()))
        left.append(0)
        right.append(0)
        if not leaf:
            share = int(dice.integers(left_over))
            left[at] = grow(share)
            right[at] = grow(left_over - 1 - share)
        return at

    root = [grow(int(dice.integers(splits + 1))) for _ in range(trees)]
    made = Forest(np.array(feature, np.int32), np.array(threshold, np.float32), np.array(left, np.int32),
                  np.array(right, np.int32), np.array(value), np.array(root, np.int32), 0.5)
    made.check(len(FEATURES))
    return made


@given(st.integers(0, 2**32), st.integers(0, 12), st.floats(0, 1), st.sampled_from([1, 3, 200, 70_000, 2**31 - 1]))
@settings(max_examples=30, deadline=None)
def test_both_forms_give_the_same_numbers(seed, count, share, most):
    dice = np.random.default_rng(seed)
    forest = model().forest if seed % 4 == 0 else a_forest(dice)
    made = code_scores.program(forest, NAMES, OTHERS)
    counts = (dice.integers(0, most, (count, len(made.columns)), endpoint=True)
              * (dice.random((count, len(made.columns))) < share)).astype(np.uint32)
    assert np.array_equal(code_scores.scores(counts, made), code_scores.scores_reference(counts, made, forest))


@given(st.integers(0, 2**32))
@settings(max_examples=30, deadline=None)
def test_rows_are_those_of_dicts(seed):
    dice = np.random.default_rng(seed)
    made = code_scores.program(model().forest, NAMES, OTHERS)
    counts = (dice.integers(0, 300, (4, len(made.columns))) * (dice.random((4, len(made.columns))) < 0.1)).astype(
        np.uint32)
    as_dicts = [({name: n for name, n in zip(NAMES, row, strict=False) if n},
                 dict(zip(OTHERS, row[len(NAMES):], strict=True))) for row in counts.tolist()]
    assert np.array_equal(code_scores.rows(counts, made), opcodes.counts(as_dicts))


def test_sixty_four_leaves_fit_and_one_more_does_not():
    dice = np.random.default_rng(1)

    def chain(leaves):
        inner = leaves - 1
        feature = [0] * inner + [-1] * leaves
        left = [inner + i for i in range(inner)] + [0] * leaves
        right = [i + 1 for i in range(inner - 1)] + [2 * inner] + [0] * leaves
        return Forest(np.array(feature, np.int32), np.linspace(0, 1, 2 * inner + 1, dtype=np.float32),
                      np.array(left, np.int32), np.array(right, np.int32), dice.normal(size=2 * inner + 1),
                      np.array([0], np.int32), 0.0)

    full = chain(64)
    made = code_scores.program(full, NAMES, OTHERS)
    counts = dice.integers(0, 50, (200, len(made.columns))).astype(np.uint32)
    assert np.array_equal(code_scores.scores(counts, made), code_scores.scores_reference(counts, made, full))
    with pytest.raises(ValueError, match="65 leaves"):
        code_scores.program(chain(65), NAMES, OTHERS)


def test_nothing_in_nothing_out():
    made = code_scores.program(model().forest, NAMES, OTHERS)
    assert code_scores.scores(np.zeros((0, len(made.columns)), np.uint32), made).shape == (0,)
