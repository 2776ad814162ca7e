"""Modules of our own as training and evaluation take them: compiled sources and their families.

A table of kernels has no windows and no loops, so what these are worth is measured on code that we compile ourselves:
`make fixtures-matrix` compiles each source of tests/fixtures/cuda for several architectures, unrolled or not, with
other flags. families.csv beside the sources says of each source its family and label, and which of its kernels are
helpers that hash nothing. Modules of one family are trained on together or not at all.
"""

from __future__ import annotations

import csv
from typing import TYPE_CHECKING

from gpuguard.code import decode
from gpuguard.code.classify import read
from gpuguard.code.containers import elf
from gpuguard.code.dataset import OWN, Kernels, Labelled, gathered
from gpuguard.code.judge import in_constants

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from gpuguard.code.rows import KernelRow


def families(path: Path) -> dict[str, dict[str, str]]:
    """Return source -> its line of families.csv."""
    with path.open(newline="") as file:
        return {line["source"]: line for line in csv.DictReader(file)}


def rows(content: bytes) -> list[KernelRow]:
    """Return the kernels of a cubin, with their parts: the plain way, where `judge_image` judges without rows."""
    image = elf.read_cubin(content)
    return [decode.decode_kernel(image.sm, kernel.text, kernel=kernel.name, module=found)
            for kernel, found in zip(image.kernels, in_constants(image), strict=True)]


def load(folder: Path, told: Path) -> Kernels:
    """Return the kernels of a folder of cubins, named SOURCE.VARIANT.sm_NN.cubin; ``told`` is families.csv.

    Kernels that `classify` would not judge are left out.
    """
    return gathered(_kernels(folder, families(told)))


def _kernels(folder: Path, known_families: dict[str, dict[str, str]]) -> Iterator[Labelled]:
    for cubin in sorted(folder.glob("*.cubin")):
        family = known_families[cubin.name.split(".")[0]]
        helpers = family["helpers"].split()
        for row in rows(cubin.read_bytes()):
            facts = read(row)
            if not isinstance(facts, str):
                label = "benign" if row.kernel in helpers else family["label"]
                yield Labelled(facts, f"{OWN}-{family['family']}", OWN, cubin.stem, f"sm_{row.sm}", label)
