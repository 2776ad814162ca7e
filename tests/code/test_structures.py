"""Signatures of memory-hard proofs of work: borne by our own such modules, by none of their look-alikes."""

from __future__ import annotations

import csv
import gzip
import os
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuguard.code import modules, structures
from gpuguard.code.classify import STRUCTURE_NATS, classify, read
from gpuguard.kernels import opcodes

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
FAMILIES = modules.families(FIXTURES / "cuda" / "families.csv")
#: Those of cuda/more are compiled for the matrix alone; the model's card has what they bear.
LOOK_ALIKES = sorted(name for name, told in FAMILIES.items()
                     if told["label"] == "benign" and (FIXTURES / "cuda" / f"{name}.cu").is_file())
DATA = Path(os.environ.get("GPUGUARD_DATA_DIR", ""), "sass", "kernels.csv.gz")


@cache
def borne(source: str) -> dict[str, list[tuple[str, ...]]]:
    """Return kernel -> what it bears on each architecture."""
    out: dict[str, list[tuple[str, ...]]] = {}
    for path in sorted((FIXTURES / "cubins").glob(f"{source}.*.cubin")):
        for row in modules.rows(path.read_bytes()):
            counts = opcodes.counts([(row.opcodes, row.derived)])
            out.setdefault(row.kernel, []).append(tuple(one.name for one in structures.found(counts)[0]))
    return out


@pytest.mark.parametrize(("source", "kernel", "name"), [
    ("beamhash", "join", "join"), ("equiround", "digit", "join"), ("cryptonight", "walk", "cryptonight"),
    ("dagwalk", "search", "dag"),
])
def test_the_families_bear_their_structure(source, kernel, name):
    found = borne(source)[kernel]
    assert len(found) == 4
    assert sum(name in one for one in found) >= 3, found


@pytest.mark.parametrize("source", LOOK_ALIKES)
def test_no_look_alike_bears_one(source):
    found = borne(source)
    assert found
    assert {kernel: some for kernel, some in found.items() if any(some)} == {}


def test_a_matrix_product_that_sums_its_parts_by_atomics_is_no_join():
    products = [  # its layout swizzled by xors, 3 and 2 of 4 operands from shared memory; counts of a convolution
        {"LDG": 41, "STG": 10, "LDS": 66, "STS": 24, "ATOMG": 1, "FFMA": 528, "SHF": 31, "LOP3": 60, "IMAD": 31,
         "ISETP": 121, "IADD3": 300, "LEA": 200, "MOV": 229},
        {"LDG": 30, "STG": 32, "LDS": 160, "STS": 32, "ATOMG": 4, "HMMA": 64, "SHF": 44, "LOP3": 75, "IMAD": 235,
         "ISETP": 166, "IADD3": 300, "LDGSTS": 32, "MOV": 300},
    ]
    for own, xors in zip(products, (6, 40), strict=True):
        counts = opcodes.counts([(own, {"lop_xor2": xors, "imad_mov": 20})])
        assert structures.found(counts) == [()]


def test_a_generator_with_its_state_in_shared_memory_is_no_cryptonight():
    own = {"LDS": 31, "STS": 26, "LDG": 16, "STG": 21, "IMAD": 47, "LEA": 19, "LOP3": 46, "SHF": 5, "ISETP": 5,
           "MOV": 60, "BRA": 6, "EXIT": 2}
    derived = {"lop_xor2": 20, "lop_xor3": 20, "lop_and": 3, "imad_mov": 5}
    assert structures.found(opcodes.counts([(own, derived)])) == [()]
    (told,) = structures.found(opcodes.counts([(own | {"BAR": 1}, derived)]))
    assert [one.name for one in told] == ["cryptonight"]


def test_the_finishers_of_murmur_are_no_siphash():
    """Shifts, xors and products in equal parts, counted by atomics: minhash by one permutation."""
    own = {"LOP3": 257, "IMAD": 203, "SHF": 193, "IADD3": 67, "LDS": 64, "ISETP": 68, "BRA": 69, "LDG": 3, "ATOMS": 1}
    said = {"lop_xor2": 193, "lop_and": 64, "imad_mov": 6}
    edges, finishers = ({**said, "imm_big": big, "imm_big_distinct": distinct} for big, distinct in ((8, 8), (128, 2)))
    assert structures.found(opcodes.counts([(own, edges), (own, finishers)])) == [(structures.STRUCTURES[0],), ()]


def test_a_structure_is_named_in_the_verdict():
    cubin = (FIXTURES / "cubins" / "cryptonight.sm_90.cubin").read_bytes()
    row = next(row for row in modules.rows(cubin) if row.kernel == "walk")
    (one,) = classify([row.as_columns()])
    assert one.label == "mining"
    assert one.nats >= STRUCTURE_NATS
    assert any("CryptoNight" in text for text in one.evidence)


def test_every_source_has_a_family():
    assert set(FAMILIES) == {path.stem for path in (FIXTURES / "cuda").rglob("*.cu")}
    for name, told in FAMILIES.items():
        assert told["label"] in {"mining", "cracking", "benign"}, name


@pytest.mark.parametrize("share", [0.5, 2.0])
def test_dead_float_code_hides_none(share):
    for source in ("beamhash", "cryptonight", "dagwalk", "siptrim"):
        for row in modules.rows((FIXTURES / "cubins" / f"{source}.sm_90.cubin").read_bytes()):
            plain = opcodes.counts([(row.opcodes, row.derived)])
            mixed = opcodes.counts([({**row.opcodes, "FFMA": int(share * row.n_instr)}, row.derived)])
            assert structures.found(mixed) == structures.found(plain)


@given(st.lists(st.integers(0, 400), min_size=len(opcodes.COLUMNS), max_size=len(opcodes.COLUMNS)))
def test_any_counts_are_answered(counts):
    (one,) = structures.found(np.array([counts], float))
    assert set(one) <= set(structures.STRUCTURES)


def test_nothing_bears_nothing():
    assert structures.found(np.zeros((1, len(opcodes.COLUMNS)))) == [()]
    assert structures.found(np.zeros((0, len(opcodes.COLUMNS)))) == []


@pytest.mark.skipif(not DATA.is_file(), reason="no table of kernels: GPUGUARD_DATA_DIR is not set")
def test_no_benign_kernel_of_the_table_bears_one():
    labels, counts = [], []
    with gzip.open(DATA, "rt", newline="") as file:
        for row in csv.DictReader(file):
            facts = read(row)
            if not isinstance(facts, str):
                labels.append(row["label"])
                counts.append((facts.opcodes, facts.derived))
    found = structures.found(opcodes.counts(counts))
    bad = [label for label, some in zip(labels, found, strict=True) if some and label in {"benign", "hard-negative"}]
    assert bad == []
    assert sum(map(bool, found)) >= 10
