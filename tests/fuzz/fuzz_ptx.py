"""PTX under mutation: counted or malformed, the counts add up, and no input is slow."""

from __future__ import annotations

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


if __name__ == "__main__":
    nested = made.PTX.replace(b"ret;", b"{ .reg .b32 t; shf.r.wrap.b32 t, %r1, %r1, 9; }\n\tret;")
    code_inputs.run("fuzz_ptx", [made.PTX, nested, made.PTX * 3, made.PTX + b"/*" * 50], check)
