"""PTX text: what the driver compiles at load time, when no machine code for the GPU comes with it.

A tokenizer, no parser: comments go, a function's body is cut into statements, and each instruction is counted under the
mnemonic of the machine instruction that ptxas makes of it, as far as that can be said without allocating registers
(64-bit integer work counts double; moves, which ptxas mostly removes, and address conversions do not count). Source:
PTX ISA 9.0, chapters 4 (syntax) and 9 (instruction set).
"""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING

import msgspec
import numpy as np
from numpy.typing import NDArray

from gpuguard import _sass
from gpuguard.code.containers.images import PTX_BYTES_MAX, Malformed, printable

if TYPE_CHECKING:
    from collections.abc import Iterator

NEEDLE = b".version "
STATEMENTS_MAX = 4_000_000
CONSTANT_BYTES_MAX = 16 << 20
_TEXT = re.compile(rb"[\t\n\r\x0b\x0c -~\x80-\xff]*")
_HEAD = re.compile(rb"\.version[ \t]+\d+\.\d+\s[^\0]{0,600}?\.target[ \t]+sm_(\d{2,3})")
_COMMENT = re.compile(r"//[^\n]*|/\*.*?(?:\*/|\Z)", re.DOTALL)
_FUNCTIONS = re.compile(r"\.entry|\.func")
_FUNCTION = re.compile(r"\.(entry|func)\b\s*+(?:\([^()]{0,4096}\)\s*+)?([A-Za-z_$%][\w$]*)")
# A body whose blocks and lists have none in them, as nearly all are. Nothing is tried twice.
_PLAIN_BODY = re.compile(r"\{[^{}]*+(?:\{[^{}]*+\}[^{}]*+)*+\}")
_BRACE = re.compile(r"[{}]")
_INSTRUCTION = re.compile(r"[;:{}]\s*(?:@!?%?[\w$]+\s+)?([a-z][a-z0-9_]*(?:[.:]+\w+)*)")
# None begins with \b: the engine then looks at every character instead of searching for the first word.
_SPECIAL = re.compile(r"mov\.[ub]\d+\s+%\w+,\s*%(?:n?tid|n?ctaid|laneid|warpid|clock|smid)")
_ROTATE = re.compile(r"shf\.[lr]\.\w+\.b32\s+%\w+,\s*(%\w+),\s*\1,")
_LOP3 = re.compile(r"lop3\.b32\s[^;]{0,200}?,\s*(0[xX][0-9A-Fa-f]{1,2}|\d{1,3})\s*;")
_WIDE = re.compile(r"[\s,](-?(?:0[xX][0-9A-Fa-f]{5,16}|\d{5,20})[uU]?)(?=\s*[,;])")
_NUMBER = re.compile(r"(?<![\w.%$])-?(?:0[xX][0-9A-Fa-f]+|\d+)[uU]?(?![\w.])")
_VALUES = re.compile(r"=\s*\{([^{};]*)\}")
_DECLARED = re.compile(
    r"\.(?:const|global)\b[^;={]{0,256}?\.([bsu](?:8|16|32|64))\s+[\w$]+\s*(?:\[[^\]]{0,32}\]\s*)*\Z")
_DECLARATION_CHARACTERS_MAX = 700
_TYPE = re.compile(r"\.(?:f|s|u|b|bf|tf|e)\d+(?:x\d)?")


class PtxKernel(msgspec.Struct, frozen=True):
    """The instructions of one function, under the mnemonics of machine code."""

    name: str
    opcodes: dict[str, int]
    immediates: tuple[int, ...]  # of integer instructions, as 32-bit words
    luts: dict[int, int]  # truth tables of lop3, and those that and, or and xor have
    rotates: int
    longest_run: int  # without a branch, a call or a barrier
    n_instr: int


class PtxModule(msgspec.Struct, frozen=True):
    """A module; ``constants`` are its initialised tables, as they lie in memory."""

    sm: int
    kernels: tuple[PtxKernel, ...]
    constants: tuple[bytes, ...]


class PtxOutline(msgspec.Struct, frozen=True):
    """What a module holds, without what its instructions are.

    ``functions``: name and number of statements. ``words``: at least those that an immediate or a table of 32 or 64
    bits may have; ``constants``: the tables of 8 and 16 bits, as they lie in memory.
    """

    functions: tuple[tuple[str, int], ...]
    words: NDArray[np.uint32]
    constants: tuple[bytes, ...]


def architecture(head: bytes) -> str:
    """Return "compute_90" if these bytes begin a PTX module, else ""."""
    found = _HEAD.match(head)
    return f"compute_{int(found[1])}" if found else ""


def text_extent(data: bytes) -> int:
    """Return how many of these bytes are text."""
    found = _TEXT.match(data)
    return found.end() if found else 0


def read_ptx(data: bytes) -> PtxModule:
    """Return the functions of a module. Raise `Malformed` where a body does not end or there is too much of it."""
    sm, text = _module(data)
    budget = [STATEMENTS_MAX]
    kernels = tuple(_kernel(name, body, budget) for name, body in _bodies(text))
    return PtxModule(sm, kernels, tuple(_tables(text)))


def outline(data: bytes) -> PtxOutline:
    """Return what a module holds, ten times as fast as `read_ptx`. Raise `Malformed` where that does."""
    _, text = _module(data)
    functions = tuple((name, body.count(";")) for name, body in _bodies(text))
    if sum(count for _, count in functions) > STATEMENTS_MAX:
        raise Malformed(f"more than {STATEMENTS_MAX} instructions")
    return PtxOutline(functions, _sass.literals(text.encode()), tuple(_tables(text, narrow=True)))


def _module(data: bytes) -> tuple[int, str]:
    """Return the architecture of a module, and its text without comments."""
    if len(data) > PTX_BYTES_MAX:
        raise Malformed(f"{len(data)} bytes of PTX")
    head = data.find(NEEDLE)
    found = _HEAD.match(data, head) if head >= 0 else None
    if not found:
        raise Malformed("PTX without .version and .target")
    # A view: each copy of the largest module is tens of megabytes.
    return int(found[1]), _COMMENT.sub(" ", str(memoryview(data)[head:text_extent(data)], "utf-8", "replace"))


def _bodies(text: str) -> Iterator[tuple[str, str]]:
    """Yield (name, body) of each function that has one."""
    after = 0
    for begins in _FUNCTIONS.finditer(text):
        found = _FUNCTION.match(text, begins.start())
        if begins.start() < after or not found:
            continue
        after = found.end()
        ends = text.find(";", after)
        opens = text.find("{", after, ends if ends >= 0 else len(text))
        if opens < 0:
            continue  # a declaration
        plain = _PLAIN_BODY.match(text, opens)
        close = plain.end() - 1 if plain else _closing(text, opens)
        if close < 0:
            raise Malformed(f"the body of {printable(found[2])} does not end")
        yield printable(found[2]), text[opens + 1:close]
        after = close + 1


def _closing(text: str, opens: int) -> int:
    """Return where the brace that opens there is closed, -1 if nowhere."""
    depth = 0
    for brace in _BRACE.finditer(text, opens):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return brace.start()
    return -1


def _kernel(name: str, body: str, budget: list[int]) -> PtxKernel:
    instructions = _INSTRUCTION.findall(f";{body}")
    budget[0] -= len(instructions)
    if budget[0] < 0:
        raise Malformed(f"more than {STATEMENTS_MAX} instructions")
    meant = {one: _meaning(one) for one in set(instructions)}
    opcodes: Counter[str] = Counter()
    luts: Counter[int] = Counter(int(number, 16 if number[:2] in ("0x", "0X") else 10) & 0xFF
                                 for number in _LOP3.findall(body))
    for one, times in Counter(instructions).items():
        mnemonic, count = meant[one]
        if mnemonic:
            opcodes[mnemonic] += count * times
        if mnemonic == "LOP3" and (lut := _LUTS.get(one.partition(".")[0])):
            luts[lut] += count * times
    special = len(_SPECIAL.findall(body))
    if special:
        opcodes["S2R"] += special
    words = [word & 0xFFFF_FFFF for number in _numbers(_WIDE.findall(body)) for word in _halves(number)]
    return PtxKernel(name, dict(opcodes), tuple(words), dict(luts), len(_ROTATE.findall(body)),
                     _longest_run([meant[one] for one in instructions]), sum(opcodes.values()))


def _halves(number: int) -> tuple[int, ...]:
    return (number, number >> 32) if number >> 32 not in (0, -1) else (number,)


def _longest_run(meanings: list[tuple[str, int]]) -> int:
    longest = run = 0
    for mnemonic, count in meanings:
        run += count
        if mnemonic in CONTROL:
            longest, run = max(longest, run), 0
    return max(longest, run)


def _numbers(literals: list[str]) -> list[int]:
    return [int(one.rstrip("uU"), 16 if "x" in one or "X" in one else 10) for one in literals if len(one) <= 24]


def _meaning(instruction: str) -> tuple[str, int]:
    """Return the mnemonic of machine code and how many instructions of it; "" for what ptxas removes."""
    base, dot, rest = instruction.partition(".")
    return _mnemonic(base, dot + rest, _TYPE.findall(dot + rest))


_INTEGER = {
    "xor": "LOP3", "and": "LOP3", "or": "LOP3", "not": "LOP3", "lop3": "LOP3", "cnot": "LOP3",
    "shf": "SHF", "shl": "SHF", "shr": "SHF", "bfe": "SHF", "bfi": "LOP3", "szext": "SGXT", "bmsk": "BMSK",
    "prmt": "PRMT", "brev": "BREV", "popc": "POPC", "clz": "FLO", "bfind": "FLO", "fns": "FLO",
    "add": "IADD3", "sub": "IADD3", "addc": "IADD3", "subc": "IADD3", "neg": "IADD3", "sad": "IADD3", "abs": "IABS",
    "mul": "IMAD", "mad": "IMAD", "mad24": "IMAD", "mul24": "IMAD", "madc": "IMAD", "div": "IMAD", "rem": "IMAD",
    "dp4a": "IDP", "dp2a": "IDP", "setp": "ISETP", "set": "ISETP", "selp": "SEL", "slct": "SEL",
    "min": "IMNMX", "max": "IMNMX",
}
_FLOAT = {
    "add": "ADD", "sub": "ADD", "neg": "ADD", "abs": "ADD", "mul": "MUL", "fma": "FMA", "mad": "FMA",
    "setp": "SETP", "set": "SETP", "min": "MNMX", "max": "MNMX", "selp": "SEL", "slct": "SEL",
}
_OTHER = {
    "bra": "BRA", "brx": "BRX", "call": "CALL", "ret": "RET", "exit": "EXIT", "trap": "BPT", "nanosleep": "NANOSLEEP",
    "bar": "BAR", "barrier": "BAR", "membar": "MEMBAR", "fence": "MEMBAR", "mbarrier": "SYNCS", "shfl": "SHFL",
    "vote": "VOTE", "match": "MATCH", "redux": "REDUX", "activemask": "VOTE", "elect": "VOTE",
    "ldmatrix": "LDSM", "stmatrix": "STSM", "tex": "TEX", "tld4": "TEX", "suld": "SULD", "sust": "SUST",
    "red": "RED", "prefetch": "CCTL", "prefetchu": "CCTL", "ldu": "LDG", "copysign": "LOP3", "testp": "FSETP",
    "ex2": "MUFU", "lg2": "MUFU", "rcp": "MUFU", "sqrt": "MUFU", "rsqrt": "MUFU", "sin": "MUFU", "cos": "MUFU",
    "tanh": "MUFU",
}
_LUTS = {"xor": 0x3C, "and": 0xC0, "or": 0xFC}  # of the first two operands, as LOP3 writes them
CONTROL = frozenset({"BRA", "BRX", "CALL", "RET", "EXIT", "BAR", "NANOSLEEP"})
_STATES = {"global": "G", "shared": "S", "local": "L"}


def _mnemonic(base: str, modifiers: str, types: list[str]) -> tuple[str, int]:
    if base in ("ld", "st", "atom", "cp"):
        return _memory(base, modifiers)
    if base in ("mma", "wmma", "wgmma", "tcgen05"):
        return _matrix(base, modifiers, types)
    if base == "cvt":
        return _conversion(types)
    if base in _OTHER:
        return _OTHER[base], 1
    last = types[-1] if types else ""
    if last.startswith((".f", ".bf")):
        if base == "div":
            return "MUFU", 1
        kind = "D" if last == ".f64" else "H" if last.startswith((".f16", ".bf16")) else "F"
        return (f"{kind}{_FLOAT[base]}{'2' if kind == 'H' else ''}", 1) if base in _FLOAT else ("", 0)
    count = 2 if last.endswith("64") else 1
    return (_INTEGER[base], count) if base in _INTEGER else ("", 0)


def _memory(base: str, modifiers: str) -> tuple[str, int]:
    if base == "cp":
        return ("LDGSTS", 1) if ".async" in modifiers and "group" not in modifiers else ("", 0)
    if ".param" in modifiers or ".const" in modifiers:
        return ("LDC", 1) if base == "ld" else ("", 0)
    state = next((letter for name, letter in _STATES.items() if f".{name}" in modifiers), "")
    return {"ld": "LD", "st": "ST", "atom": "ATOM"}[base] + state, 1


def _matrix(base: str, modifiers: str, types: list[str]) -> tuple[str, int]:
    if not re.search(r"\.(?:mma|mma_async|sync\.aligned\.m\d+)", modifiers):
        return ("LDSM", 1) if ".load" in modifiers else ("", 0)
    kind = "D" if ".f64" in types else "I" if set(types) & {".s8", ".u8", ".s4", ".u4", ".b1"} else "H"
    return f"{kind}{'G' if base == 'wgmma' else ''}MMA", 1


def _conversion(types: list[str]) -> tuple[str, int]:
    if len(types) < 2:
        return "", 0
    to_float, from_float = (one.startswith((".f", ".bf", ".tf", ".e")) for one in types[:2])
    if to_float and from_float:
        return "F2F", 1
    return ("I2F", 1) if to_float else ("F2I", 1) if from_float else ("", 0)


def _tables(text: str, *, narrow: bool = False) -> Iterator[bytes]:
    """Yield the initialised tables of a module, as they lie in memory; ``narrow``: only those of 8 and 16 bits."""
    left = CONSTANT_BYTES_MAX
    for found in _VALUES.finditer(text):
        before = text[max(0, found.start() - _DECLARATION_CHARACTERS_MAX):found.start()]
        declared = _DECLARED.search(before, max(map(before.rfind, ";{}=")) + 1)
        if not declared:
            continue
        width = int(declared[1][1:]) // 8
        left -= width * (found[1].count(",") + 1)
        if left < 0:
            raise Malformed(f"more than {CONSTANT_BYTES_MAX} bytes of tables")
        if width <= 2 or not narrow:
            yield _table(found[1], width)


def _table(text: str, width: int) -> bytes:
    """Return the numbers of a table; a generator's have a hundred thousand, all of them plain."""
    plain = _sass.plain_table(text.encode(), width)
    if plain is not None:
        return plain
    mask = (1 << 8 * width) - 1
    return b"".join((number & mask).to_bytes(width, "little") for number in _numbers(_NUMBER.findall(text)))
