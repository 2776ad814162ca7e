"""Modules of our own as training and evaluation take them: compiled sources, their families, and all their parts.

A table of kernels has no windows and no loops, so what these are worth is measured on code that we compile ourselves:
`make fixtures-matrix` compiles each source of tests/fixtures/cuda for several architectures, unrolled or not, with
other flags. families.csv beside the sources says of each source its family and label, and which of its kernels are
helpers that hash nothing. Modules of one family are trained on together or not at all.
"""

from __future__ import annotations

import csv
from typing import TYPE_CHECKING

import numpy as np

from gpuguard.code import decode
from gpuguard.code.classify import read
from gpuguard.code.containers import elf
from gpuguard.code.judge import in_constants
from gpuguard.code.train import HASHING, OWN, Kernels
from gpuguard.kernels import opcodes

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Any

    from gpuguard.code.rows import KernelRow


def families(path: Path) -> dict[str, dict[str, str]]:
    """Return source -> its line of families.csv."""
    with path.open(newline="") as file:
        return {line["source"]: line for line in csv.DictReader(file)}


def rows(content: bytes) -> list[KernelRow]:
    """Return the kernels of a cubin, with their parts: the plain way, where `judge_image` judges without rows."""
    image = elf.read_cubin(content)
    found = in_constants(image)
    return [decode.decode_kernel(image.sm, kernel.text, kernel=kernel.name, module=lambda _: found)
            for kernel in image.kernels]


def load(folder: Path, told: Path) -> Kernels:
    """Return the kernels of a folder of cubins, named SOURCE.VARIANT.sm_NN.cubin; ``told`` is families.csv.

    Kernels that `classify` would not judge are left out.
    """
    known_families = families(told)
    columns: dict[str, list[Any]] = {name: [] for name in ("facts", "group", "project", "module", "sm", "label")}
    for cubin in sorted(folder.glob("*.cubin")):
        family = known_families[cubin.name.split(".")[0]]
        for row in rows(cubin.read_bytes()):
            facts = read(row)
            if isinstance(facts, str):
                continue
            columns["facts"].append(facts)
            columns["group"].append(f"{OWN}-{family['family']}")
            columns["project"].append(OWN)
            columns["module"].append(cubin.stem)
            columns["sm"].append(f"sm_{row.sm}")
            columns["label"].append("benign" if row.kernel in family["helpers"].split() else family["label"])
    some = columns.pop("facts")
    table = opcodes.counts([(one.opcodes, one.derived) for one in some])
    arrays = {name: np.array(values, str) for name, values in columns.items()}
    return Kernels(table, some, np.isin(arrays["label"], HASHING), **arrays)


def parts(kernels: Kernels) -> tuple[np.ndarray, np.ndarray]:
    """Return (counts of all parts, which kernel each is of)."""
    some = [(counts, derived) for facts in kernels.facts for _, _, counts, derived in facts.parts]
    owner = np.repeat(np.arange(len(kernels.facts)), [len(facts.parts) for facts in kernels.facts])
    return opcodes.counts(some), owner
