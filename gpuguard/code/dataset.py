"""Kernels whose label is known, as training and evaluation take them: the table of kernels, and how it is dealt out."""

from __future__ import annotations

import csv
import gzip
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from gpuguard.code.classify import Facts, read
from gpuguard.kernels import opcodes

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

HASHING = ("mining", "cracking")
#: The project of our own modules.
OWN = "own"
#: NVIDIA's own libraries, as the table names them.
ALLOW_LISTED = ("lib_cublas", "lib_cublaslt", "lib_cudnn", "lib_cusolver", "lib_cusparse", "lib_dali", "lib_nccl",
                "lib_nvcomp", "lib_nvjpeg")


class Labelled(NamedTuple):
    """One kernel: what `classify` read of it, and what it must not read."""

    facts: Facts
    group: str
    project: str
    module: str
    sm: str
    label: str


class Kernels(NamedTuple):
    """Judgeable kernels only, in columns, and their counts."""

    table: np.ndarray
    facts: list[Facts]
    hashing: np.ndarray
    group: np.ndarray
    project: np.ndarray
    module: np.ndarray
    sm: np.ndarray
    label: np.ndarray

    def listed(self) -> np.ndarray:
        """Return which kernels are of allow-listed libraries."""
        return np.isin(self.project, ALLOW_LISTED)

    def own(self) -> np.ndarray:
        """Return which kernels are of our own modules."""
        out: np.ndarray = self.project == OWN
        return out

    def parts(self) -> tuple[np.ndarray, np.ndarray]:
        """Return (counts of all windows and loops, which kernel each is of)."""
        some = [(counts, derived) for facts in self.facts for _, _, counts, derived in facts.parts]
        owner = np.repeat(np.arange(len(self.facts)), [len(facts.parts) for facts in self.facts])
        return opcodes.counts(some), owner

    def joined(self, other: Kernels) -> Kernels:
        """Return both."""
        return Kernels(np.concatenate([self.table, other.table]), self.facts + other.facts,
                       *(np.concatenate(pair) for pair in zip(self[2:], other[2:], strict=True)))


def gathered(kernels: Iterable[Labelled]) -> Kernels:
    """Return the kernels in columns."""
    some = list(kernels)
    table = opcodes.counts([(one.facts.opcodes, one.facts.derived) for one in some])
    columns = {name: np.array([getattr(one, name) for one in some], str) for name in Labelled._fields[1:]}
    return Kernels(table, [one.facts for one in some], np.isin(columns["label"], HASHING), **columns)


def load(path: Path) -> Kernels:
    """Read a table of kernels; rows that `classify` would not judge are left out."""
    return gathered(_rows(path))


def _rows(path: Path) -> Iterator[Labelled]:
    with gzip.open(path, "rt", newline="") as file:
        for row in csv.DictReader(file):
            facts = read(row)
            if not isinstance(facts, str):
                module = f"{row['project']}/{row['source_unit']}"
                yield Labelled(facts, row["group"], row["project"], module, row["sm"], row["label"])


def folds(kernels: Kernels) -> np.ndarray:
    """Return the fold of each kernel: one hashing group in each, benign groups dealt by size, then families of ours."""
    out = np.zeros(len(kernels.group), int)
    own, hashing = kernels.own(), kernels.hashing
    count = len(set(kernels.group[hashing & ~own])) or len(set(kernels.group[hashing]))
    for side in (hashing & ~own, ~hashing & ~own, own):
        names = sorted(set(kernels.group[side]), key=lambda name: (-int((kernels.group == name).sum()), name))
        if side[hashing].any():
            names.sort()
        for i, name in enumerate(names):
            out[kernels.group == name] = i % count
    return out
