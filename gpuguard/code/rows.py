"""One row per kernel: what is known of a kernel's machine code once its bytes are gone.

The decoder (`gpuguard._sass`) makes the rows, the container readers name them, the classifier judges them. A row has
the columns that a classifier may use, and none that it may not: no project, no file name. `opcodes` and `derived` keep
only what is not zero, as a table of kernels in text form does, and `as_columns` is that text form:
`NAME:count;NAME:count`, highest first.

Counts never tell mining from a model alone, and a whole kernel can be diluted with code that never runs. So a row
carries its parts as rows of their own: windows of 192 instructions, half overlapping, and the bodies of innermost
loops.
"""

from __future__ import annotations

import msgspec

WINDOW_INSTRUCTIONS = 192
WINDOW_STEP = 96
# Above this share of unknown opcodes nothing is said of a kernel: its code is of an architecture that is not known, or
# it is no code at all.
UNKNOWN_RATIO_MAX = 0.03


class KernelRow(msgspec.Struct, frozen=True, kw_only=True):
    """A kernel, or a part of one: its opcode counts and what was derived from the operands."""

    sm: int  # compute capability as one number: 90 is sm_90
    kernel: str = ""  # as the container names it; shown, never judged
    n_instr: int = 0  # without the padding behind the last branch
    opcodes: dict[str, int] = {}  # mnemonic without modifiers -> count; UNKxxx for 12 bits that no table has
    derived: dict[str, int] = {}  # `gpuguard.code.decode.DERIVED` says what each is
    known_const_imm: dict[str, int] = {}  # table -> distinct words of it in immediates of integer instructions
    known_const_module: dict[str, int] = {}  # table -> distinct words of it in the module's constants and globals
    unknown_instructions: int = 0
    text_sha256: str = ""  # of the code with its padding, as it lies in the module; "" for a part
    part: str = ""  # "" the whole kernel, "window", "loop"
    first_instruction: int = 0  # where a part begins in its kernel
    windows: tuple[KernelRow, ...] = ()  # parts; a part has none

    def unknown_ratio(self) -> float:
        """Return the share of instructions whose opcode is in no table."""
        return self.unknown_instructions / self.n_instr if self.n_instr else 0.0

    def is_judgeable(self) -> bool:
        """Return whether enough of the code is understood to say anything of it."""
        return self.n_instr > 0 and self.unknown_ratio() <= UNKNOWN_RATIO_MAX

    def as_columns(self) -> dict[str, str]:
        """Return the row as text columns, the form in which `gpuguard.code.classify` also takes rows."""
        return {
            "sm": f"sm_{self.sm}", "kernel": self.kernel, "n_instr": str(self.n_instr),
            "opcodes": counts_text(self.opcodes), "derived": counts_text(self.derived),
            "known_const_imm": counts_text(self.known_const_imm),
            "known_const_module": counts_text(self.known_const_module),
        }


def counts_text(counts: dict[str, int]) -> str:
    """Return `NAME:count;NAME:count`, highest count first, then by name."""
    return ";".join(f"{name}:{count}" for name, count in sorted(counts.items(), key=lambda one: (-one[1], one[0])))


def counts_of(text: str) -> dict[str, int]:
    """Read what `counts_text` writes. Raise ValueError when it is nothing of the kind."""
    return {name: int(count) for name, _, count in (one.rpartition(":") for one in text.split(";") if one)}
