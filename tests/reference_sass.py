"""The decoder of GPU machine code, written for the eye: one instruction after the other, in Python.

`decode(sm, text)` says what `gpuguard._sass` must say of the same bytes. It takes names from the same table, and
nothing else from the product: every field, class and rule is stated here once more.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from gpuguard.code.decode import opcode_names

NOP = 0x918
CONTROL = {0x11D, 0x141, 0x142, 0x144, 0x145, 0x146, 0x147, 0x148, 0x149, 0x14D, 0x150, 0x155, 0x158, 0x15D}
INTEGER = {
    "IADD", "IADD3", "IMAD", "IMNMX", "ISETP", "LEA", "LOP3", "MOV", "SEL", "UIADD3", "UISETP", "ULOP3", "UMOV",
    "VIADD", "VIMNMX",
}
ROTATIONS = {0x0321, 0x1032, 0x2103, 0x4321, 0x5432, 0x6543}


def bit(lut: int, a: int, b: int, c: int) -> int:
    return lut >> (4 * a + 2 * b + c) & 1


def same(lut: int, function) -> bool:
    return all(bit(lut, a, b, c) == function(a, b, c) & 1 for a in (0, 1) for b in (0, 1) for c in (0, 1))


ORDERS = [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)]
SIGNS = [(x, y, z) for x in (0, 1) for y in (0, 1) for z in (0, 1)]


def in_some_order(lut: int, function, signs=((0, 0, 0),)) -> bool:
    def given(order, sign):
        return lambda *abc: function(*(abc[o] ^ s for o, s in zip(order, sign, strict=True)))
    return any(same(lut, given(order, sign)) for order in ORDERS for sign in signs)


def lut_class(lut: int) -> str | None:
    """Return the class of a truth table, of which bit 4a + 2b + c is the result for operands a, b, c."""
    if in_some_order(lut, lambda a, b, _: a ^ b, SIGNS):
        return "lop_xor2"
    if in_some_order(lut, lambda a, b, c: a ^ b ^ c, SIGNS):
        return "lop_xor3"
    if in_some_order(lut, lambda a, b, c: a ^ (b & c), SIGNS):
        return "lop_chi"
    if in_some_order(lut, lambda a, b, c: b if a else c):
        return "lop_ch"
    if in_some_order(lut, lambda a, b, c: a + b + c > 1):
        return "lop_maj"
    if in_some_order(lut, lambda a, b, _: a & b, [(0, 0, 0), (0, 1, 0)]):
        return "lop_and"
    functions = (lambda a, b, _: a | b, lambda a, b, c: a | b | c, lambda a, b, c: a | (b & c))
    return "lop_or" if any(in_some_order(lut, one) for one in functions) else None


LUTS = {lut: lut_class(lut) for lut in range(256)}


@dataclass
class Counted:
    """One stretch of code."""

    first: int
    length: int
    opcodes: dict[str, int] = field(default_factory=dict)
    derived: dict[str, int] = field(default_factory=dict)

    def one_more(self, name: str) -> None:
        self.derived[name] = self.derived.get(name, 0) + 1


def bits(value: int, low: int, high: int) -> int:
    return value >> low & ((1 << (high - low)) - 1)


def count(sm: int, code: list[int], first: int, end: int) -> Counted:
    """Count the instructions [first, end), each a number of 128 bits."""
    names = opcode_names(sm)
    part = Counted(first, end - first)
    large, run, longest = set(), 0, 0
    for word in code[first:end]:
        opcode = bits(word, 0, 12)
        name = names.get(opcode, f"UNK{opcode:03x}")
        part.opcodes[name] = part.opcodes.get(name, 0) + 1
        has_immediate = bits(word, 9, 12) in (2, 4)
        immediate = bits(word, 32, 64)
        ra, rc = bits(word, 24, 32), bits(word, 64, 72)
        if name == "LOP3" and LUTS[bits(word, 72, 80)]:
            part.one_more(LUTS[bits(word, 72, 80)])
        if name == "SHF" and ra == rc != 255:
            part.one_more("rot")
        if name == "IMAD" and ra == 255:
            part.one_more("imad_mov")
        if name == "PRMT" and has_immediate and immediate == 0x0123:
            part.one_more("prmt_swap")
        if name == "PRMT" and has_immediate and immediate in ROTATIONS:
            part.one_more("prmt_rot")
        if name in INTEGER and has_immediate and 0x10000 <= immediate < 0xFFFF0000:
            part.one_more("imm_big")
            large.add(immediate)
        run += 1
        longest = max(longest, run)
        if bits(word, 0, 9) in CONTROL:
            part.one_more("n_ctrl")
            run = 0
    part.derived |= {"imm_big_distinct": len(large), "maxrun": longest, "distinct_op": len(part.opcodes)}
    part.derived = {name: number for name, number in part.derived.items() if number}
    return part


def target(sm: int, code: list[int], at: int) -> int | None:
    """Return the instruction that a backward branch goes to."""
    offset = bits(code[at], 34, 82)
    if offset >= 1 << 47:
        offset -= 1 << 48
    if offset >= 0:
        return None
    if sm >= 90:
        offset = offset * 256 + bits(code[at], 16, 24)
    to, rest = divmod(16 * (at + 1) + 4 * offset, 16)
    return to if rest == 0 and to >= 0 else None


def loops(sm: int, code: list[int]) -> list[tuple[int, int]]:
    """Return [first, end) of innermost loops of at least 16 instructions; what overlaps is one."""
    found: list[tuple[int, int]] = []
    latest = -1
    for at, word in enumerate(code):
        if bits(word, 0, 9) != 0x147 or opcode_names(sm).get(bits(word, 0, 12)) != "BRA":
            continue
        to = target(sm, code, at)
        if to is None or at + 1 - to < 16 or to < latest:
            continue
        if found and to < found[-1][1]:
            found[-1] = (found[-1][0], at + 1)
        else:
            found.append((to, at + 1))
        latest = to
    return found


def decode(sm: int, text: bytes) -> tuple[Counted, list[Counted], list[Counted], set[int]]:
    """Return the kernel, its windows, its innermost loops, and all its integer immediates."""
    code = [int.from_bytes(text[at:at + 16], "little") for at in range(0, len(text), 16)]
    while code and bits(code[-1], 0, 12) == NOP:
        code.pop()
    n = len(code)
    starts = [96 * i for i in range(max(1, (n + 95) // 96 - 1))] if n else []
    names = opcode_names(sm)
    immediates = {bits(word, 32, 64) for word in code
                  if names.get(bits(word, 0, 12)) in INTEGER and bits(word, 9, 12) in (2, 4)}
    return (count(sm, code, 0, n), [count(sm, code, at, min(at + 192, n)) for at in starts],
            [count(sm, code, first, end) for first, end in loops(sm, code)], immediates)
