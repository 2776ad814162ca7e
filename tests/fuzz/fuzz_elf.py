"""Cubins under mutation: read or malformed, every view inside the file, no more code than there are bytes.

What is read is decoded too, since the decoder is handed whatever a section says is code.
"""

from __future__ import annotations

import random
import struct
import sys
from pathlib import Path

from gpuguard.code import decode, judge
from gpuguard.code.containers import elf
from gpuguard.code.containers.images import Malformed

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
import code_inputs  # noqa: E402
import code_samples as made  # noqa: E402


def check(data: bytes) -> None:
    try:
        cubin = elf.read_cubin(data)
        size = elf.extent(data)
    except Malformed as error:
        assert str(error)
        return
    assert size >= elf.HEADER_BYTES
    assert sum(len(one.text) for one in cubin.kernels) <= len(data)
    assert all(0 <= first < end <= len(cubin.bank) for first, end in cubin.variables)
    assert len(judge.in_constants(cubin)) == len(cubin.kernels)
    for kernel in cubin.kernels:
        assert data[kernel.offset:kernel.offset + len(kernel.text)] == kernel.text
        try:
            row = decode.decode_kernel(cubin.sm, kernel.text)
        except ValueError as error:
            assert str(error)
        else:
            assert sum(row.opcodes.values()) == row.n_instr


HEADER = ((16, "<H"), (18, "<H"), (8, "<B"), (32, "<Q"), (40, "<Q"), (48, "<I"), (54, "<H"), (56, "<H"), (58, "<H"),
          (60, "<H"), (62, "<H"))
SECTION = ((0, "<I"), (4, "<I"), (24, "<Q"), (32, "<Q"), (40, "<I"))


def shaped(seed: bytes, dice: random.Random) -> bytes:
    """Change fields of the header and of section headers, which point at everything else."""
    data = bytearray(seed)
    sections, = struct.unpack_from("<Q", seed, 40)
    count, = struct.unpack_from("<H", seed, 60)
    for _ in range(dice.choice((1, 1, 2, 3))):
        if dice.random() < 0.3:
            at, form = dice.choice(HEADER)
        else:
            at, form = dice.choice(SECTION)
            at += sections + elf.SECTION_BYTES * dice.randrange(count)
        code_inputs.set_field(data, at, form, dice)
    return bytes(data)


if __name__ == "__main__":
    small = sorted((path.read_bytes() for path in made.CUBINS), key=len)[:12]
    code_inputs.run("fuzz_elf", [made.cubin(constants=bytes(64), variables=((0, 16), (16, 48))),
                                 made.cubin(abi=8, sm=120), *small], check, shaped)
