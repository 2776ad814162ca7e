"""Many decoded kernels as the arrays that the classifier takes: no row of them ever becomes a Python object.

What one row at a time would say is `gpuguard.code.classify.classify` of `decode.Parts.row`; this gives the same
verdicts, some hundred times faster.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import numpy as np

from gpuguard.code import decode
from gpuguard.code.classify import PART_INSTRUCTIONS_MIN, Kernels, judge_kernels, model
from gpuguard.code.rows import UNKNOWN_RATIO_MAX, WINDOW_INSTRUCTIONS, WINDOW_STEP
from gpuguard.kernels import code_scores, opcodes

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from gpuguard.code.classify import CodeVerdict
    from gpuguard.code.decode import Parts
    from gpuguard.kernels.code_scores import Program


@functools.cache
def program() -> Program:
    """Return the shipped forest over the decoder's columns."""
    return code_scores.program(model().forest, decode.mnemonics(), tuple(decode.DERIVED))


def judge(kernels: Sequence[Parts], tables: Sequence[Mapping[str, int]], *, compiled: bool) -> list[CodeVerdict]:
    """Return a verdict for each kernel, in their order; ``tables``: the words found of each, by table.

    ``compiled``: score by the compiled loop, which takes seconds to compile once.
    """
    if not kernels:
        return []
    counts = np.stack([one.kernel for one in kernels])
    owners, firsts, lengths, loops, parts = _parts(kernels)
    unknown = parts[:, program().names - 1]
    kept = np.flatnonzero((lengths >= PART_INSTRUCTIONS_MIN) & (unknown / np.maximum(lengths, 1) <= UNKNOWN_RATIO_MAX))
    # Of each kernel its windows, then its loops.
    kept = kept[np.argsort(owners[kept], kind="stable")]
    table = code_scores.rows(counts, program())
    return judge_kernels(Kernels(
        counts=table, scores=_whole(kernels, counts, table, compiled=compiled), tables=tables,
        part_scores=_scores(parts[kept], compiled=compiled),
        part_ends=np.cumsum(np.bincount(owners[kept], minlength=len(kernels))), part_firsts=firsts[kept],
        part_loops=loops[kept]), model())


def _parts(kernels: Sequence[Parts]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return (kernel, first instruction, length, whether it is a loop, counts) of all windows, then of all loops."""
    windows = np.array([len(one.windows) for one in kernels])
    loops = np.array([len(one.loops) for one in kernels])
    spans = np.concatenate([one.spans for one in kernels]).astype(np.int64)
    numbers = np.arange(len(kernels))
    owners = np.concatenate([np.repeat(numbers, windows), np.repeat(numbers, loops)])
    begins = np.repeat(np.cumsum(windows) - windows, windows)
    firsts = (np.arange(windows.sum()) - begins) * WINDOW_STEP
    ends = np.repeat(np.array([one.n_instr for one in kernels]), windows)
    return (owners, np.concatenate([firsts, spans[:, 0]]),
            np.concatenate([np.minimum(WINDOW_INSTRUCTIONS, ends - firsts), spans[:, 1]]),
            np.arange(len(owners)) >= len(firsts),
            np.concatenate([*(one.windows for one in kernels), *(one.loops for one in kernels)]))


def _whole(kernels: Sequence[Parts], counts: np.ndarray, table: np.ndarray, *, compiled: bool) -> np.ndarray:
    """Return the score of each kernel as a whole.

    Codes without a name are one column, but opcodes of their own where the commonest are sought.
    """
    scores = _scores(counts, compiled=compiled)
    for at, one in enumerate(kernels):
        if len(one.unknown) > 1:
            row = one.row()
            table[at] = opcodes.counts([(row.opcodes, row.derived)])[0]
            features = opcodes.features_reference(table[at:at + 1])
            scores[at] = opcodes.scores_reference(features, model().forest)[0]
    return scores


def _scores(counts: np.ndarray, *, compiled: bool) -> np.ndarray:
    if compiled:
        return code_scores.scores(counts, program())
    return code_scores.scores_reference(counts, program(), model().forest)
