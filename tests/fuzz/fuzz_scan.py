"""The whole way of a scan under mutation, from the bytes of a file to verdicts: nothing raises, every verdict is whole.

The files are what a cache of compiled kernels holds (cubins, PTX, descriptions in JSON) and libraries made of them.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

from gpuguard.code import judge
from gpuguard.code.containers.finding import find_images
from gpuguard.code.containers.images import Image

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
import code_inputs  # noqa: E402
import code_samples as made  # noqa: E402
import fuzz_elf  # noqa: E402

VERDICTS = ("unknown", "clear", "suspect", "confirmed")


def check(data: bytes) -> None:
    for one in find_images(data, "f"):
        if not isinstance(one, Image):
            assert one.reason
            continue
        for kernels, flaws in judge.judge_image(one):
            assert all(flaw.reason for flaw in flaws)
            for said in kernels:
                assert said.verdict in VERDICTS
                assert 0 <= said.probability <= 1
                assert 0 <= said.instructions <= len(one.data)
                assert said.kernel.isprintable()


def shaped(seed: bytes, dice: random.Random) -> bytes:
    """Change the tables of a cubin, on its own or packed into a library."""
    if not seed.startswith(b"\x7fELF"):
        return code_inputs.mutated(seed, dice)
    broken = fuzz_elf.shaped(seed, dice)
    packing = dice.choice(("none", "", "lz4", "zstd"))
    return broken if packing == "none" else made.host_library(made.fatbin(made.entry(broken, packing=packing)))


if __name__ == "__main__":
    small = sorted((path.read_bytes() for path in made.CUBINS), key=len)[:20]
    described = b'{"hash": "ab12", "name": "mix", "num_warps": 4, "target": {"arch": 90}}'
    code_inputs.run("fuzz_scan", [made.PTX, described, made.cubin(constants=bytes(64)), *small], check, shaped)
