"""Random forests for the tests of every forest kernel."""

from __future__ import annotations

import numpy as np

from gpuguard.kernels.opcodes import Forest

KINDS = (np.int32, np.float32, np.int32, np.int32, np.float64)


def random_forest(dice, trees=7, depth=4, features=5, kinds=20, leaf_share=0.2):
    """Return a forest whose thresholds are of ``kinds`` values, so that rows often lie exactly on one."""
    nodes = []

    def grow(level):
        at = len(nodes)
        nodes.append(None)
        if level == depth or dice.random() < leaf_share:
            nodes[at] = (-1, 0.0, -1, -1, float(dice.normal()))
        else:
            left, right = grow(level + 1), grow(level + 1)
            threshold = float(np.float32(dice.integers(kinds) / kinds))
            nodes[at] = (int(dice.integers(features)), threshold, left, right, 0.0)
        return at

    roots = [grow(0) for _ in range(trees)]
    columns = list(zip(*nodes, strict=True))
    parts = (np.array(part, kind) for part, kind in
             zip(columns, KINDS, strict=True))
    return Forest(*parts, np.array(roots, np.int32), 0.25)
