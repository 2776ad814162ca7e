"""Proof of work that no instruction mix shows, by what its kernels must do: one signature a family.

Memory-hard miners spend their time on reads, sorting and gathering, so their main loops look like a database's. But
each must do things together that others do not: the joiner of an Equihash xors rows and shifts them while it appends
them to buckets; the trimmer of a Cuckoo runs SipHash on what it counts by atomics; CryptoNight does one or two AES
rounds and a long product between reads and writes at places that depend on them; a DAG's walk multiplies and xors many
words a read and writes none. Each signature is a statement on counts of a whole kernel, so it holds for a row without
parts; dead float code hides none, dead integer code does where a bound from above says so. Its look-alikes (hash join,
group-by, partition, gathers, AES, string hashing, an interpreter) are among tests/fixtures/cuda and were there first.

What is not seen this way: Autolykos' gathering of rows as long numbers (additions with carry and gathers, as of any
long-number code), RandomX' interpreter (its program is data; as a kernel it is an interpreter), matrix products whose
use is a proof, and what a miner keeps on the CPU. Of those the side kernels (Blake2b, Keccak, AES) are what is found.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from gpuguard.kernels.opcodes import COLUMN

if TYPE_CHECKING:
    from collections.abc import Callable


class Structure(NamedTuple):
    """A signature: its name, what it says, and the test of float64[rows, COLUMNS]."""

    name: str
    text: str
    test: Callable[[np.ndarray], np.ndarray]


def _sum(counts: np.ndarray, names: str) -> np.ndarray:
    out: np.ndarray = counts[:, [COLUMN[name] for name in names.split()]].sum(axis=1)
    return out


_FLOATS = "FFMA FADD FMUL MUFU DFMA DADD DMUL HFMA2 HADD2 HMUL2 HMMA IMMA"
#: A larger kernel has some of everything.
_JOIN_INSTRUCTIONS_MAX = 2_000
#: Two loads, a store, a shift, their addresses, and a share of the bucket's and the chain's bookkeeping.
_JOIN_WORK_PER_XOR = 40
_LOADS = "LDG LD"
_STORES = "STG ST"
_ATOMICS = "ATOMG ATOM RED REDG ATOMS"
_XOR = "lop_xor2 lop_xor3"


def _work(counts: np.ndarray) -> np.ndarray:
    """Return how many instructions are no float work: to add some costs the miner little."""
    out: np.ndarray = counts[:, 0] - _sum(counts, _FLOATS)
    return out


def _products(counts: np.ndarray) -> np.ndarray:
    out: np.ndarray = _sum(counts, "IMAD") - _sum(counts, "imad_mov")
    return out


def _siphash(counts: np.ndarray) -> np.ndarray:
    """64-bit additions, rotations and xors in equal parts make most of the kernel; counted or sorted by atomics.

    Products may be additions in disguise. Those by the two constants of a finisher of murmur (four words, of 64 bits)
    are none.
    """
    finishes = (_sum(counts, "imm_big") > 0.25 * _sum(counts, "lop_xor2")) & (_sum(counts, "imm_big_distinct") <= 4)
    shifts = _sum(counts, "SHF") - _sum(counts, "rot")
    xors, adds = _sum(counts, "lop_xor2"), _sum(counts, "IADD3 IADD VIADD") + _products(counts)
    found: np.ndarray = (
        (shifts >= 24) & (xors >= 0.6 * shifts) & (xors <= 2 * shifts) & (adds >= 0.5 * shifts)
        & (shifts + xors + adds >= 0.5 * _work(counts)) & (_sum(counts, "rot") <= 0.2 * shifts)
        & (_sum(counts, "lop_ch lop_maj lop_chi") <= 0.1 * shifts) & (_sum(counts, _ATOMICS) >= 1) & ~finishes)
    return found


def _join(counts: np.ndarray) -> np.ndarray:
    """Rows are xored word by word and shifted, and appended to buckets by atomics; chains of rows in shared memory.

    A word of the sum is two loads, an xor, a store and their addresses, so xors keep pace with loads and with all work;
    a matrix product whose layout is swizzled by xors, and whose parts are summed by atomics, loads and works far more.
    """
    xors, stores, loads = (_sum(counts, names) for names in ("lop_xor2", _STORES, _LOADS))
    found: np.ndarray = (
        (xors >= 5) & (_sum(counts, "SHF PRMT") >= 4) & (loads >= 6) & (stores >= 4)
        & (xors >= 0.6 * stores) & (loads + _sum(counts, "LDS LDGSTS") <= 4 * xors)
        & (_work(counts) <= _JOIN_WORK_PER_XOR * xors)
        & (_sum(counts, "ATOMG ATOM RED REDG") >= 1) & (_sum(counts, "ATOMS LDS") >= 2)
        & (_sum(counts, "SHFL MATCH") == 0) & (_products(counts) <= 10 * xors)
        & (_work(counts) <= _JOIN_INSTRUCTIONS_MAX))
    return found


def _cryptonight(counts: np.ndarray) -> np.ndarray:
    """One or two AES rounds by tables, a product of 64 bits, and as many reads as writes of memory.

    The tables are shared, so there is a barrier behind their filling: a generator whose state lies in shared memory, a
    column a thread, needs none.
    """
    lookups = _sum(counts, "LDS")
    found: np.ndarray = (
        (lookups >= 12) & (lookups <= 48) & (_sum(counts, _XOR) >= 12) & (_sum(counts, "lop_xor3") >= 4)
        & (_sum(counts, _LOADS) >= 2) & (_sum(counts, _STORES) >= 2) & (_products(counts) >= 6)
        & (_sum(counts, "lop_and LEA PRMT") >= 12) & (_sum(counts, "ISETP") <= 0.3 * lookups)
        & (_sum(counts, "BAR") >= 1) & (_sum(counts, "SHFL BAR") <= 2) & (_sum(counts, _ATOMICS) == 0))
    return found


def _dag(counts: np.ndarray) -> np.ndarray:
    """Xors and products by one same constant, many a read, hardly a shift, nothing written but a find."""
    xors, loads, different = _sum(counts, "lop_xor2"), _sum(counts, _LOADS), _sum(counts, "imm_big_distinct")
    found: np.ndarray = (
        (xors >= 16) & (loads >= 2) & (xors >= 3 * loads) & (_products(counts) >= xors)
        & (_sum(counts, "imm_big") >= np.maximum(8, 4 * different)) & (_sum(counts, "lop_xor3") <= 0.25 * xors)
        & (_sum(counts, "SHF POPC") <= 0.5 * xors) & (_sum(counts, _STORES) <= 1) & (_sum(counts, "LDS STS") == 0)
        & (_sum(counts, _ATOMICS) <= 2))
    return found


STRUCTURES = (
    Structure("siphash", "64-bit additions, rotations and xors, counted by atomics: SipHash of a Cuckoo's edges",
              _siphash),
    Structure("join", "rows xored, shifted and appended to buckets by atomics: a round of an Equihash", _join),
    Structure("cryptonight", "an AES round, a 64-bit product, as many reads as writes: CryptoNight", _cryptonight),
    Structure("dag", "xors and products by one constant, many a read, nothing written: FNV over a DAG", _dag),
)


def found(counts: np.ndarray) -> list[tuple[Structure, ...]]:
    """Return the signatures that each row of `opcodes.counts` bears."""
    out: list[tuple[Structure, ...]] = [()] * len(counts)
    for one in STRUCTURES:
        for row in np.flatnonzero(one.test(counts)).tolist():
            out[row] = (*out[row], one)
    return out
