"""From the code of one kernel to its row: names and meanings around the compiled decoder.

What the derived counts are was pinned down on 4,382 kernels of nvcomp, bitsandbytes and CuPy, whose counts are in the
table of kernels that models are trained on. All but `distinct_op` (which there counts a renamed opcode twice, in 4 % of
the kernels) come out the same, save for a dozen kernels in which that table takes HFMA2.BF16 for an integer addition.
Where it does not decide (truth tables and selectors that these libraries never use) the family is completed: a function
counts as chi in whichever order its operands stand. Peculiarities that the table has are kept, since models are trained
on it: a CALL to an absolute address ends no straight run, a BMOV from a register does.
"""

from __future__ import annotations

import hashlib
import itertools
import tomllib
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING

import numpy as np

from gpuguard import _sass
from gpuguard.code import constants as known
from gpuguard.code.rows import WINDOW_INSTRUCTIONS, WINDOW_STEP, KernelRow

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

# In the order of the columns that the compiled decoder writes.
DERIVED = {
    "lop_xor2": "LOP3 that is the exclusive or of two operands, or its complement",
    "lop_xor3": "LOP3 that is the exclusive or of all three, or its complement",
    "lop_chi": "LOP3 a ^ (b & c) with any operand negated: Keccak's chi, and what a ^ b & mask becomes",
    "lop_ch": "LOP3 that selects one operand by another: SHA-2's Ch",
    "lop_maj": "LOP3 that is the majority: SHA-2's Maj",
    "lop_and": "LOP3 that is the and of two operands, at most one negated",
    "lop_or": "LOP3 that is the or of two or three operands, or a | (b & c)",
    "rot": "SHF whose two sources are one register: a 32-bit rotation",
    "prmt_rot": "PRMT whose selector turns bytes",
    "prmt_swap": "PRMT with the selector 0x0123: the byte order changed",
    "imad_mov": "IMAD whose first factor is zero: a move",
    "imm_big": "32-bit immediates of integer instructions that are neither within 16 bits of 0 nor above 0xffff0000",
    "n_ctrl": "instructions that branch, call, return, exit, synchronise or sleep",
    "imm_big_distinct": "different values among imm_big",
    "maxrun": "longest run of instructions up to and with one of n_ctrl",
    "distinct_op": "different mnemonics",
}

SM_MIN, SM_MAX = 70, 199  # instructions of 16 bytes: Volta and later
SM_SPLIT_OFFSET = 90  # from Hopper on a branch's offset has eight bits more, which stand apart
FORMS_IMMEDIATE = (2, 4)
FORMS_CONSTANT = (3, 5)
BANK_VARIABLES = 3
_CONSTANT_LOADS = (0x182, 0x0B9, 0x1AC)  # LDC, ULDC, LDCU
_BLOCK_BYTES = 1 << 16
_A, _B, _C = 0xF0, 0xCC, 0xAA  # LOP3's truth table of each operand alone

# The 9-bit codes with a meaning of their own to the decoder. Forms (the three bits above) differ, meanings do not.
_CONTROL = frozenset({
    0x11D,  # BAR
    0x141, 0x142, 0x144, 0x145, 0x146, 0x147, 0x148, 0x149,  # BSYNC BREAK CALL BSSY YIELD BRA WARPSYNC BRX
    0x14D, 0x150, 0x155, 0x158, 0x15D,  # EXIT RET BMOV BRXU NANOSLEEP
})
_INTEGER = frozenset({
    "IADD", "IADD3", "IMAD", "IMNMX", "ISETP", "LEA", "LOP3", "MOV", "SEL", "UIADD3", "UISETP", "ULOP3", "UMOV",
    "VIADD", "VIMNMX",
})
_IMMEDIATE, _CTRL, _BRANCH, _LOGIC, _SHIFT, _PERMUTE, _MULTIPLY, _UNKNOWN = (1 << bit for bit in range(8))


@cache
def opcode_names(sm: int) -> dict[int, str]:
    """Return 12-bit opcode -> mnemonic for an architecture.

    A form that has not been met takes its name from the other forms of the code, where these agree: the upper three
    bits say where the second operand comes from, not what is done with it.
    """
    table = tomllib.loads(files("gpuguard.code").joinpath("opcodes.toml").read_text())
    names: dict[int, str] = {}
    for part in [table["all"], *(one["names"] for one in table.get("from", []) if one["sm"] <= sm)]:
        names.update({int(code, 16): name for name, codes in part.items() for code in codes.split()})
    bases: dict[int, set[str]] = {}
    for code, name in names.items():
        bases.setdefault(code & 0x1FF, set()).add(name)
    for code in range(4096):
        found = bases.get(code & 0x1FF, set())
        if code not in names and len(found) == 1:
            names[code] = next(iter(found))
    return names


@cache
def mnemonics() -> tuple[str, ...]:
    """Return every mnemonic that is known, the columns of `decode_counts`; the last, "UNK", is what is not known."""
    table = tomllib.loads(files("gpuguard.code").joinpath("opcodes.toml").read_text())
    parts = [table["all"], *(one["names"] for one in table.get("from", []))]
    return (*sorted({name for part in parts for name in part}), "UNK")


@cache
def columns() -> tuple[str, ...]:
    """Return the names of the columns of `decode_counts`: mnemonics, then derived counts."""
    return (*mnemonics(), *DERIVED)


@cache
def lut_classes() -> dict[int, int]:
    """Return LOP3 truth table -> index of its class in DERIVED, for those that have one."""
    operands = list(itertools.permutations((_A, _B, _C)))
    signed = [tuple(value ^ flip for value, flip in zip(order, flips, strict=True))
              for order in operands for flips in itertools.product((0, 255), repeat=3)]
    families: list[set[int]] = [
        {a ^ b for a, b, _ in signed},
        {a ^ b ^ c for a, b, c in signed},
        {a ^ (b & c) for a, b, c in signed},
        {(a & b) | (~a & 255 & c) for a, b, c in operands},
        {(a & b) | (a & c) | (b & c) for a, b, c in operands},
        {a & b for a, b, _ in operands} | {a & ~b & 255 for a, b, _ in operands},
        {a | b for a, b, _ in operands} | {a | b | c for a, b, c in operands} | {a | (b & c) for a, b, c in operands},
    ]
    return {lut: index for index, family in enumerate(families) for lut in family}


def _flags(code: int, name: str) -> int:
    """Return what the decoder has to look at in an instruction of this opcode."""
    base, form = code & 0x1FF, code >> 9
    value = _CTRL if base in _CONTROL else 0
    if base == 0x147:
        value |= _BRANCH
    immediate = form in FORMS_IMMEDIATE
    if immediate and name in _INTEGER:
        value |= _IMMEDIATE
    value |= {"LOP3": _LOGIC, "SHF": _SHIFT, "IMAD": _MULTIPLY, "PRMT": _PERMUTE if immediate else 0}.get(name, 0)
    return value


@cache
def decoder(sm: int) -> _sass.Decoder:
    """Return the decoder of an architecture. Raise ValueError for those before Volta: their code has another shape."""
    if not SM_MIN <= sm <= SM_MAX:
        raise ValueError(f"sm_{sm}: only code of sm_{SM_MIN} and later is understood")
    names, index = opcode_names(sm), {name: i for i, name in enumerate(mnemonics())}
    codes = np.full(4096, index["UNK"], np.uint16)
    flags = np.full(4096, _UNKNOWN, np.uint8)
    for code, name in names.items():
        codes[code], flags[code] = index[name], _flags(code, name)
    luts = np.full(256, 255, np.uint8)
    for lut, number in lut_classes().items():
        luts[lut] = number
    near = {word & 0xFFFF for word in known.words() if word < 0x10000 or word >= 0xFFFF0000}
    small = np.array(sorted(near), np.uint16)
    return _sass.Decoder(codes, flags, luts, small, len(index), sm >= SM_SPLIT_OFFSET)


class Parts:
    """The counts of one kernel, its windows and its innermost loops, as arrays with the columns of `columns()`.

    `kernel` is uint32[columns]; `windows` and `loops` are uint16[rows, columns], saturated. Window i begins at
    instruction 96 i; `spans` is uint32[loops, 2], first instruction and length. `words` are the distinct immediates
    worth a look, uint32; `unknown` maps 12-bit opcodes without a name to their count in the kernel.
    """

    def __init__(self, sm: int, text: bytes | memoryview, *, parts: bool = True) -> None:
        self.sm = sm
        self.n_instr, self.kernel, self.windows, self.loops, self.spans, self.words, self.unknown = (
            decoder(sm).decode(text, parts))
        # One column stands for all codes without a name; in a kernel each of them is an opcode of its own.
        if len(self.unknown) > 1:
            self.kernel[-1] += len(self.unknown) - 1

    def row(self) -> KernelRow:
        """Return the kernel as a row, without name, constants and parts."""
        opcodes, derived = _named(self.kernel)
        count = opcodes.pop("UNK", 0)
        opcodes |= {f"UNK{code:03x}": number for code, number in self.unknown.items()}
        return KernelRow(
            sm=self.sm, n_instr=self.n_instr, opcodes=opcodes, derived=derived, unknown_instructions=count)

    def part_rows(self) -> tuple[KernelRow, ...]:
        """Return windows, then loops, as rows."""
        rows = []
        for i in range(len(self.windows)):
            first = i * WINDOW_STEP
            rows.append(self._part("window", first, min(WINDOW_INSTRUCTIONS, self.n_instr - first), self.windows[i]))
        for counts, (first, length) in zip(self.loops, self.spans.tolist(), strict=True):
            rows.append(self._part("loop", first, length, counts))
        return tuple(rows)

    def _part(self, part: str, first: int, length: int, counts: NDArray[np.uint16]) -> KernelRow:
        opcodes, derived = _named(counts)
        return KernelRow(
            sm=self.sm, n_instr=length, opcodes=opcodes, derived=derived, part=part, first_instruction=first,
            unknown_instructions=opcodes.get("UNK", 0))


def _named(counts: NDArray[np.uint16] | NDArray[np.uint32]) -> tuple[dict[str, int], dict[str, int]]:
    """Return (opcodes, derived) of a row of counts, without zeros."""
    names, split = columns(), len(mnemonics())
    at: list[int] = np.flatnonzero(counts).tolist()
    values: list[int] = counts[at].tolist()
    found = list(zip(at, values, strict=True))
    return {names[i]: n for i, n in found if i < split}, {names[i]: n for i, n in found if i >= split}


def decode_counts(sm: int, text: bytes | memoryview, *, parts: bool = True) -> Parts:
    """Decode the code of one kernel (a whole number of 16-byte instructions) to arrays.

    Raise ValueError for an architecture before Volta, for a broken instruction, and above 64 MiB of code.
    """
    return Parts(sm, text, parts=parts)


def constants_read(text: bytes | memoryview) -> frozenset[int] | None:
    """Return the offsets in constant bank 3, where `__constant__` variables lie, at which code reads. None: anywhere.

    In the forms that take such an operand (the third and fifth of an opcode) bits 54 to 58 are its bank and bits 38 to
    53 its offset: c[0x3][0x110], and in loads c[0x3][R2+0x110], where a register adds an index. A load at offset 0 may
    have the whole address in its register, and other banks have addresses too, so that the code may read anything.
    Bank 0 holds parameters. Some other instructions, BAR among them, keep something else there: what is read may be
    less than this says, never more.
    """
    offsets: set[int] = set()
    for first in range(0, len(text) // 16 * 16, _BLOCK_BYTES):
        words = np.frombuffer(text[first:min(first + _BLOCK_BYTES, len(text) // 16 * 16)], "<u8")[::2]
        form = words >> np.uint64(9) & np.uint64(7)
        words = words[(form == FORMS_CONSTANT[0]) | (form == FORMS_CONSTANT[1])]
        bank, offset = words >> np.uint64(54) & np.uint64(31), words >> np.uint64(38) & np.uint64(0xFFFF)
        loads = np.logical_or.reduce([words & np.uint64(0x1FF) == load for load in _CONSTANT_LOADS])
        if ((bank != 0) & (bank != BANK_VARIABLES) | (bank == BANK_VARIABLES) & (offset == 0) & loads).any():
            return None
        offsets.update(offset[bank == BANK_VARIABLES].tolist())
    return frozenset(offsets)


def decode_kernel(
    sm: int, text: bytes | memoryview, *, kernel: str = "", windows: bool = True, module: Mapping[str, int] = {},
) -> KernelRow:
    """Return the row of one kernel, `module` being the words found in what it can read of its module's data.

    `windows` adds rows for windows and innermost loops. Raise ValueError as `decode_counts` does.
    """
    parts = decode_counts(sm, text, parts=windows)
    row = parts.row()
    return KernelRow(
        sm=sm, kernel=kernel, n_instr=row.n_instr, opcodes=row.opcodes, derived=row.derived,
        known_const_imm=known.in_words(parts.words), known_const_module=dict(module),
        unknown_instructions=row.unknown_instructions, text_sha256=hashlib.sha256(text).hexdigest(),
        windows=parts.part_rows())
