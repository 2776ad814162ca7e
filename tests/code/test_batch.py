"""Kernels judged all in one call, against each of them judged alone, the plain way."""

from __future__ import annotations

import sys
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from gpuguard.code import judge
from gpuguard.code.classify import classify
from gpuguard.code.containers.finding import find_images

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import code_samples as made

ROWS = [row for path in made.CUBINS[::5] for image in find_images(path.read_bytes(), path.name)
        for rows, _ in judge.rows_of(image) for row in rows]


@given(st.lists(st.sampled_from(ROWS), max_size=12))
@settings(max_examples=15, deadline=None)
def test_a_kernel_is_judged_alike_in_company_and_alone(rows):
    assert classify(rows) == [classify([row], backend="reference")[0] for row in rows]
