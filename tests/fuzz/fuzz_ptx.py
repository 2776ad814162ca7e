"""PTX under mutation: counted or malformed, the counts add up, and no input is slow."""

from __future__ import annotations

import random
import sys
from pathlib import Path

from gpuguard.code.containers import ptx
from gpuguard.code.containers.images import Malformed

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
import code_inputs  # noqa: E402
import code_samples as made  # noqa: E402


def check(data: bytes) -> None:
    try:
        module = ptx.read_ptx(data)
    except Malformed as error:
        assert str(error)
        return
    for kernel in module.kernels:
        assert kernel.n_instr == sum(kernel.opcodes.values())
        assert kernel.longest_run <= kernel.n_instr
        assert all(0 <= word < 1 << 32 for word in kernel.immediates)
    assert sum(map(len, module.constants)) <= ptx.CONSTANT_BYTES_MAX


WORDS = (b"{", b"}", b";", b"/*", b"*/", b"//", b".func (.param .b32 r) f (", b".entry e", b"= {", b"[", b"]", b"0x",
         b"-", b"lop3.b32 %r1, %r2, %r3, %r4, 0x96;",
         b"shf.l.wrap.b32 %r1, %r2, %r2, 9;", b"mma.sync.aligned.m16n8k16.row",
         b"xor.b64 %rd1, %rd2, 18446744073709551615;", b"99999999999999999999999", b".const .b64 K[2] = {1, -1};",
         b"bra.uni", b"\xff", b".f16x2", b" " * 5000, b".version 8.0\n.target sm_75\n")


def shaped(seed: bytes, dice: random.Random) -> bytes:
    """Move, repeat, drop and insert whole words of the language."""
    words = seed.split(b" ")
    for _ in range(dice.choice((1, 2, 4, 12))):
        at = dice.randrange(len(words))
        kind = dice.randrange(4)
        if kind == 0:
            words[at:at] = [dice.choice(WORDS)] * dice.choice((1, 1, 3, 200))
        elif kind == 1 and len(words) > 1:
            del words[at]
        elif kind == 2:
            words[at:at] = words[at:at + dice.choice((1, 5, 50))]
        else:
            words[at] = words[dice.randrange(len(words))]
    return b" ".join(words)


if __name__ == "__main__":
    nested = made.PTX.replace(b"ret;", b"{ .reg .b32 t; shf.r.wrap.b32 t, %r1, %r1, 9; }\n\tret;")
    code_inputs.run("fuzz_ptx", [made.PTX, nested, made.PTX * 3, made.PTX + b"/*" * 50], check, shaped)
