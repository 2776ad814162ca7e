"""Features of GPU machine code from its opcode counts, and the scores of a forest of decision trees over them.

A kernel, a window or a loop comes as a row of COLUMNS: how often each mnemonic occurs, and what the decoder derived
from operands (rotates, truth tables of LOP3, wide immediates). FEATURES is a table: each feature is one of two forms
over two sums of columns, so one small loop computes all of them, whatever it runs on.

=========  ===========================================================================================================
RATIO      a / b, 0..1; 0 where b is 0
LESSER     min(a, b) / all instructions, 0..1: two things that must occur together
=========  ===========================================================================================================

What carries: xor, rotates and the truth tables of hash rounds among the integer work; how little is compared, branched
and addressed beside it. Shares are taken of all instructions and of arithmetic alone, since a compiler's moves and a
miner's dead float code both dilute the former. No feature grows with length, so they mean the same of a window, a loop
and a whole kernel; on kernels of projects unseen in training that was no loss but a gain (models/code_forest.md).

`features_reference` and `scores_reference` are written for the eye and decide what is right; ``_compiled`` are the
Numba CPU form, and opcodes_cuda.py the CUDA form of the same text. Numba is imported when one of these is first called.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from gpuguard.kernels import chosen

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence


def words(text: str) -> tuple[str, ...]:
    """Return the words of a text: a table of names reads better without quotes."""
    return tuple(text.split())


#: Mnemonics without modifiers, as the decoder names them. Any other is unknown.
MNEMONICS = words("""
    ACQBULK AL2P ATOM ATOMG ATOMS B2R BAR BGMMA BMMA BMOV BMSK BPT BRA BREAK BREV BRX BRXU BSSY BSYNC CALL CCTL
    CCTLL CCTLT CGAERRBAR CREDUX CS2R CS2UR DADD DEPBAR DFMA DMMA DMUL DSETP ELECT ENDCOLLECTIVE ERRBAR EXIT F2F
    F2FP F2I F2IP FADD FADD2 FCHK FENCE FFMA FFMA2 FLO FMNMX FMNMX3 FMUL FMUL2 FRND FSEL FSET FSETP HADD2 HFMA2
    HGMMA HMMA HMNMX2 HMUL2 HSET2 HSETP2 I2F I2FP I2I I2IP IABS IADD IADD3 IDP IGMMA IMAD IMMA IMNMX IMUL ISCADD
    ISETP KILL LD LDC LDCU LDG LDGDEPBAR LDGSTS LDL LDS LDSM LDT LDTM LEA LEPC LOP LOP3 MATCH MEMBAR MOV MOVM MUFU
    NANOSLEEP NOP OMMA P2R PIXLD PLOP3 POPC PREEXIT PRMT QGMMA QMMA QSPC R2B R2P R2UR RED REDG REDUX RET RPCMOV S2R
    S2UR SEL SGXT SHF SHFL SHL SHR ST STG STL STS STSM STT STTM SULD SURED SUST SYNCS TEX TLD TLD4 TXD TXQ UBLKCP
    UBLKRED UBMSK UBREV UCGABAR_ARV UCGABAR_WAIT UF2I UFADD UFFMA UFLO UFMNMX UFMUL UFSEL UFSETP UGETNEXTWORKID UI2F
    UI2FP UIADD3 UIMAD UIMNMX UISETP ULDC ULEA ULOP3 UMEMSETS UMOV UP2UR UPLOP3 UPOPC UPRMT UR2UP UREDGR USEL
    USETMAXREG USETSHMSZ USGXT USHF USTGR UTCATOMSWS UTCBAR UTCCP UTCHMMA UTCIMMA UTCOMMA UTCQMMA UTCSHIFT UTMACCTL
    UTMACMDFLUSH UTMALDG UTMAPF UTMAREDG UTMASTG UVIADD UVIMNMX UVIRTCOUNT VABSDIFF VABSDIFF4 VIADD VIADDMNMX VIMNMX
    VIMNMX3 VOTE VOTEU WARPGROUP WARPGROUPSET WARPSYNC YIELD
""")

#: Counts that the decoder derives from operands. ``maxrun`` is the longest run of instructions without a branch.
DERIVED = ("rot", "lop_xor2", "lop_xor3", "lop_ch", "lop_chi", "lop_maj", "lop_and", "lop_or", "imm_big",
           "imm_big_distinct", "imad_mov", "prmt_swap", "prmt_rot", "n_ctrl", "maxrun", "distinct_op")

#: ``top`` and ``top3`` are the counts of the commonest opcode and of the commonest three.
COLUMNS = ("total", "unknown", *MNEMONICS, *DERIVED, "top", "top3")
COLUMN = {name: i for i, name in enumerate(COLUMNS)}

#: No kernel has more of anything: a count above it is an attack on sums.
COUNT_MAX = 2**31 - 1

RATIO, LESSER = range(2)

# Groups of columns; a leading minus subtracts.
_LOGIC = "LOP3 SHF PRMT BREV POPC FLO SGXT BMSK PLOP3 ULOP3 USHF UPRMT UFLO UPOPC UBREV UBMSK UPLOP3 USGXT LOP SHL SHR"
_ADD = "IADD3 VIADD IADD UIADD3 UVIADD ISCADD"
_LEA = "LEA ULEA"
_MULTIPLY = "IMAD IDP UIMAD IMUL -imad_mov"
COMPARE = "ISETP IMNMX VIMNMX IABS SEL UISETP USEL VIADDMNMX VIMNMX3 UVIMNMX UIMNMX VABSDIFF VABSDIFF4"
_FLOAT32 = ("FFMA FADD FMUL FSETP FMNMX FSEL FCHK FSET UFADD UFMUL UFFMA UFSETP UFSEL FADD2 FFMA2 FMUL2 FMNMX3 UFMNMX")
_FLOAT16 = "HFMA2 HADD2 HMUL2 HSETP2 HSET2 HMNMX2"
_FLOAT64 = "DFMA DADD DMUL DSETP"
_CONVERT = "F2F F2I I2F FRND F2FP F2IP I2FP UI2F UF2I UI2FP I2IP I2I"
_TENSOR = ("HMMA IMMA DMMA QMMA BMMA OMMA LDSM STSM MOVM HGMMA IGMMA QGMMA BGMMA UTCHMMA UTCQMMA UTCIMMA UTCOMMA "
           "WARPGROUP LDTM STTM")
_GLOBAL_LOAD = "LDG LD LDGSTS UTMALDG TLD TEX TLD4 TXD UBLKCP SULD"
_GLOBAL_STORE = "STG ST UTMASTG SUST"
_LOCAL = "LDL STL"
_CONSTANT = "LDC ULDC LDCU"
_ATOMIC = "ATOMG ATOM ATOMS RED REDG REDUX SURED UTMAREDG UREDGR"
_WARP = "SHFL VOTE MATCH VOTEU ELECT"
_SYNC = "BAR DEPBAR MEMBAR SYNCS FENCE LDGDEPBAR ERRBAR CGAERRBAR"
_CONTROL = "BRA BRX CALL RET EXIT BSYNC BSSY WARPSYNC BREAK NANOSLEEP BRXU ENDCOLLECTIVE YIELD"
_MOVE = "MOV UMOV CS2R CS2UR P2R R2P R2UR S2R S2UR B2R UP2UR imad_mov"
_UNIFORM = " ".join(name for name in MNEMONICS if name.startswith("U"))

_FLOAT = f"{_FLOAT32} {_FLOAT16} {_FLOAT64} {_TENSOR} MUFU"
_ARITHMETIC = f"{_LOGIC} {_ADD} {_LEA} {_MULTIPLY}"
_MEMORY = f"{_GLOBAL_LOAD} {_GLOBAL_STORE} LDS STS {_LOCAL} {_ATOMIC}"
_LOADS = f"{_GLOBAL_LOAD} LDS {_CONSTANT}"
_XOR = "lop_xor2 lop_xor3"
_ROTATE = "rot prmt_swap prmt_rot"
_CHOOSE = "lop_ch lop_chi lop_maj"
_MIX = f"{_ROTATE} {_XOR} {_CHOOSE}"
_OTHER_LOGIC = "LOP3 -lop_xor2 -lop_xor3 -lop_and -lop_or -lop_ch -lop_chi -lop_maj"

_CLASSES = {
    "logic": _LOGIC, "add": _ADD, "lea": _LEA, "multiply": _MULTIPLY, "compare": COMPARE, "float32": _FLOAT32,
    "float16": _FLOAT16, "float64": _FLOAT64, "convert": _CONVERT, "tensor": _TENSOR, "global_load": _GLOBAL_LOAD,
    "global_store": _GLOBAL_STORE, "local": _LOCAL, "constant": _CONSTANT, "atomic": _ATOMIC, "warp": _WARP,
    "sync": _SYNC, "control": _CONTROL, "move": _MOVE, "uniform": _UNIFORM, "float": _FLOAT, "memory": _MEMORY,
    "arithmetic": _ARITHMETIC, "xor": _XOR, "rotate": _ROTATE, "choose": _CHOOSE, "mix": _MIX,
    "other_logic": _OTHER_LOGIC, "logic_add": f"{_LOGIC} {_ADD}", "unknown": "unknown",
}
_SINGLES = words("""
    LOP3 SHF PRMT IADD3 VIADD LEA IMAD ISETP SEL MOV UMOV BRA CALL RET LDG STG LDS STS LDL STL LDC ULDC SHFL BAR ATOMG
    ATOMS POPC FLO FFMA FADD FMUL MUFU HFMA2 CS2R S2R S2UR R2P USHF ULOP3 ULEA UIADD3 PLOP3 BSSY WARPSYNC I2F F2I BREV
""")
_DERIVED_SHARES = [name for name in DERIVED if name not in {"maxrun", "distinct_op", "imm_big_distinct"}]
_OF_ARITHMETIC = {"xor": _XOR, "rotate": _ROTATE, "mix": _MIX, "logic": _LOGIC, "add": _ADD, "lea": _LEA,
                  "multiply": _MULTIPLY, "other_logic": _OTHER_LOGIC, "shf": "SHF", "choose": _CHOOSE}
_AGAINST_ARITHMETIC = {"compare": COMPARE, "float": _FLOAT, "memory": _MEMORY, "control": "n_ctrl"}
_OF_LOP3 = {"xor": _XOR, "xor3": "lop_xor3", "and": "lop_and", "or": "lop_or", "choose": _CHOOSE}

#: name, form, a, b.
FEATURES: tuple[tuple[str, int, str, str], ...] = (
    *((f"{name}_ratio", RATIO, group, "total") for name, group in _CLASSES.items()),
    *((f"{name.lower()}_op_ratio", RATIO, name, "total") for name in _SINGLES),
    *((f"{name}_derived_ratio", RATIO, name, "total") for name in _DERIVED_SHARES),
    *((f"{name}_of_lop3_ratio", RATIO, group, "LOP3") for name, group in _OF_LOP3.items()),
    *((f"{name}_of_arithmetic_ratio", RATIO, group, _ARITHMETIC) for name, group in _OF_ARITHMETIC.items()),
    *((f"{name}_against_arithmetic_ratio", RATIO, group, f"{group} {_ARITHMETIC}")
      for name, group in _AGAINST_ARITHMETIC.items()),
    ("rot_of_shf_ratio", RATIO, "rot", "SHF"),
    ("top_ratio", RATIO, "top", "total"),
    ("top3_ratio", RATIO, "top3", "total"),
    ("xor_and_loads_ratio", LESSER, f"{_XOR} PRMT", _LOADS),
    ("shf_and_lop3_ratio", LESSER, "SHF", "LOP3"),
    ("shared_loads_and_logic_ratio", LESSER, "LDS", _LOGIC),
)
FEATURE_NAMES = tuple(name for name, *_ in FEATURES)

#: From this many rows on the compiled form is worth its compilation.
COMPILED_ROWS_MIN = 2_048


class Forest(NamedTuple):
    """Decision trees, each node one entry of flat arrays; a row goes left where its feature is <= the threshold.

    ``feature`` is -1 at a leaf, whose ``value`` counts. Children stand behind their parent, so every walk ends.
    The score of a row is ``base`` plus the sum of one leaf of each tree, in nats.
    """

    feature: np.ndarray  # int32[nodes]
    threshold: np.ndarray  # float32[nodes]
    left: np.ndarray  # int32[nodes]
    right: np.ndarray  # int32[nodes]
    value: np.ndarray  # float64[nodes]
    root: np.ndarray  # int32[trees]
    base: float

    def check(self, features: int) -> None:
        """Raise ValueError unless every walk through these arrays stays inside them and ends."""
        nodes = len(self.feature)
        inner = self.feature >= 0
        at = np.arange(nodes)[inner]
        for children in (self.left[inner], self.right[inner]):
            if np.any(children <= at) or np.any(children >= nodes):
                raise ValueError("a forest whose children do not stand behind their parents")
        if {len(part) for part in self[:5]} != {nodes} or np.any(self.feature >= features):
            raise ValueError("a forest whose arrays do not fit each other or its features")
        if np.any(self.root < 0) or np.any(self.root >= nodes) or not np.all(np.isfinite(self.value)):
            raise ValueError("a forest with roots outside it, or with values that are no numbers")


def counts(rows: Sequence[tuple[Mapping[str, int], Mapping[str, int]]]) -> np.ndarray:
    """Return float64[rows, COLUMNS] of (opcode counts, derived counts).

    A mnemonic that no table has counts as unknown; a derived count that is not known is left out. Raises ValueError
    for a count below 0 or above COUNT_MAX.
    """
    out = np.zeros((len(rows), len(COLUMNS)))
    for row, (opcodes, derived) in zip(out, rows, strict=True):
        for name, count in opcodes.items():
            row[_MNEMONIC_COLUMN.get(name, 1)] += checked(count)
        row[0] = row[1:len(MNEMONICS) + 2].sum()
        for name in DERIVED:
            row[COLUMN[name]] = checked(derived.get(name, 0))
        commonest = sorted(opcodes.values())[-3:]
        row[-2:] = commonest[-1] if commonest else 0, sum(commonest)
    return out


def checked(count: int) -> int:
    """Return a count. Raise ValueError if none can be that."""
    if not 0 <= count <= COUNT_MAX:
        raise ValueError(f"a count of {count}")
    return count


_MNEMONIC_COLUMN = {name: COLUMN[name] for name in MNEMONICS}


def features(table: np.ndarray, backend: str = "auto", device: int | None = None) -> tuple[np.ndarray, str]:
    """Return float32[rows, FEATURES] of what `counts` returned, and the name of the form that was used.

    ``backend`` and ``device`` as `gpuguard.kernels` says.
    """
    backend = form(len(table), backend, device)
    if backend == "cuda":
        from gpuguard.kernels import opcodes_cuda

        return opcodes_cuda.features(table, device), backend
    return features_compiled(table) if backend == "cpu" else features_reference(table), backend


def scores(matrix: np.ndarray, forest: Forest, backend: str = "auto",
           device: int | None = None) -> tuple[np.ndarray, str]:
    """Return float64[rows] of a float32 feature matrix: the forest's score, in nats before calibration.

    ``backend`` and ``device`` as `gpuguard.kernels` says; the form that was used is named beside. Of a forest whose
    arrays are on the GPU "cuda" sends nothing there.
    """
    backend = form(len(matrix), backend, device)
    if backend == "cuda":
        from gpuguard.kernels import opcodes_cuda

        return opcodes_cuda.scores(matrix, forest, device), backend
    return scores_compiled(matrix, forest) if backend == "cpu" else scores_reference(matrix, forest), backend


def form(rows: int, backend: str = "auto", device: int | None = None) -> str:
    """Return the name of the form that is used for so many rows."""
    backend = chosen(backend, device, "cpu" if rows >= COMPILED_ROWS_MIN else "reference")
    return "reference" if backend == "numpy" else backend


def features_reference(table: np.ndarray) -> np.ndarray:
    """Return the features, the plain way."""
    out = np.zeros((len(table), len(FEATURES)), np.float32)
    for j, (_, form, first, second) in enumerate(FEATURES):
        a, b, total = _sums(table, first), _sums(table, second), table[:, 0]
        ratio = a / np.maximum(b, 1) if form == RATIO else np.minimum(a, b) / np.maximum(total, 1)
        out[:, j] = np.minimum(ratio, 1)
    return out


def _sums(table: np.ndarray, group: str) -> np.ndarray:
    """Return the sum of a group's columns, at least 0."""
    out = np.zeros(len(table))
    for column, weight in _terms(group):
        out += weight * table[:, column]
    return np.maximum(out, 0.0)


def _terms(group: str) -> list[tuple[int, float]]:
    return [(COLUMN[name.removeprefix("-")], -1.0 if name.startswith("-") else 1.0) for name in group.split()]


def scores_reference(matrix: np.ndarray, forest: Forest) -> np.ndarray:
    """Return the scores, one row, one tree, one node at a time."""
    feature, threshold = forest.feature.tolist(), forest.threshold.tolist()
    left, right, value = forest.left.tolist(), forest.right.tolist(), forest.value.tolist()
    out = np.zeros(len(matrix))
    for i, row in enumerate(matrix.tolist()):
        score = forest.base
        for node in forest.root.tolist():
            while feature[node] >= 0:
                node = left[node] if row[feature[node]] <= threshold[node] else right[node]  # noqa: PLW2901
            score += value[node]
        out[i] = score
    return out


@functools.cache
def program() -> tuple[np.ndarray, ...]:
    """Return FEATURES as arrays: the form of each, and the columns and signs of both sums, one behind the other."""
    ends, columns, weights = [0], [], []
    for _, _, first, second in FEATURES:
        for group in (first, second):
            terms = _terms(group)
            columns += [column for column, _ in terms]
            weights += [weight for _, weight in terms]
            ends.append(len(columns))
    forms = np.array([form for _, form, *_ in FEATURES], np.int32)
    return forms, np.array(ends, np.int32), np.array(columns, np.int32), np.array(weights, np.float64)


def feature_of(row: Any, form: Any, ends: Any, columns: Any, weights: Any, j: Any) -> Any:
    """Return one feature of one row. The same text is compiled for CPU and GPU."""
    a = 0.0
    for k in range(ends[2 * j], ends[2 * j + 1]):
        a += weights[k] * row[columns[k]]
    b = 0.0
    for k in range(ends[2 * j + 1], ends[2 * j + 2]):
        b += weights[k] * row[columns[k]]
    a, b = max(a, 0.0), max(b, 0.0)
    if form == RATIO:
        return min(a / max(b, 1.0), 1.0)
    return min(min(a, b) / max(row[0], 1.0), 1.0)


def score_of(row: Any, feature: Any, threshold: Any, left: Any, right: Any, value: Any, root: Any, base: Any) -> Any:
    """Return the score of one row. The same text is compiled for CPU and GPU."""
    score = base
    for tree in range(len(root)):
        node = root[tree]
        while feature[node] >= 0:
            node = left[node] if row[feature[node]] <= threshold[node] else right[node]
        score += value[node]
    return score


def features_compiled(table: np.ndarray) -> np.ndarray:
    """Return the features by a compiled loop."""
    out = np.zeros((len(table), len(FEATURES)), np.float32)
    _cpu_loops()[0](np.ascontiguousarray(table), *program(), out)
    return out


def scores_compiled(matrix: np.ndarray, forest: Forest) -> np.ndarray:
    """Return the scores by a compiled loop."""
    out = np.zeros(len(matrix))
    _cpu_loops()[1](np.ascontiguousarray(matrix), *forest, out)
    return out


@functools.cache
def _cpu_loops() -> tuple[Callable[..., Any], Callable[..., Any]]:
    import numba

    feature, score = numba.njit(feature_of), numba.njit(score_of)

    @numba.njit(cache=False)
    def all_features(table: Any, forms: Any, ends: Any, columns: Any, weights: Any, out: Any) -> None:
        for i in range(len(table)):
            for j in range(len(forms)):
                out[i, j] = feature(table[i], forms[j], ends, columns, weights, j)

    @numba.njit(cache=False)
    def all_scores(matrix: Any, feature: Any, threshold: Any, left: Any, right: Any, value: Any, root: Any, base: Any,
                   out: Any) -> None:
        for i in range(len(matrix)):
            out[i] = score(matrix[i], feature, threshold, left, right, value, root, base)

    return all_features, all_scores
