"""Fatbins under mutation: nothing raises, nothing unpacks beyond its bound, offsets lie inside, shares add up."""

from __future__ import annotations

import random
import sys
from pathlib import Path

from gpuguard.code.containers.finding import find_images
from gpuguard.code.containers.images import Budget, Image

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
import code_inputs  # noqa: E402
import code_samples as made  # noqa: E402


def check(data: bytes) -> None:
    found = list(find_images(data, "f"))
    for one in found:
        assert 0 <= one.offset <= len(data)
        if isinstance(one, Image):
            assert len(one.sha256) == 64
        else:
            assert one.reason
    shares = [list(find_images(data, "f", Budget(len(data), share=share, shares=2))) for share in (0, 1)]
    assert [shares[at % 2][at // 2] for at in range(len(found))] == found


def shaped(_: bytes, dice: random.Random) -> bytes:
    """Pack broken code in whole entries, whole code in entries whose sizes are wrong, or break what is packed."""
    entries = []
    for _ in range(dice.randrange(1, 5)):
        content = made.cubin(bytes(16 * dice.randrange(1, 90)), constants=bytes(64))
        if dice.random() < 0.3:
            content = code_inputs.mutated(content, dice)
        packing = dice.choice(("", "lz4", "zstd"))
        wrong = {name: dice.choice((*code_inputs.NUMBERS, len(content) - 1, len(content) + 1)) & mask
                 for name, mask in (("payload", (1 << 64) - 1), ("packed", (1 << 32) - 1), ("unpacked", (1 << 64) - 1))
                 if dice.random() < 0.15}
        one = made.entry(content, packing=packing, kind=dice.choice((1, 2, 2, 8)), pad=dice.randrange(20), **wrong)
        if dice.random() < 0.15:
            one = one[:4] + dice.choice(code_inputs.WORDS) + one[8:]
        if dice.random() < 0.3:
            one = one[:64] + code_inputs.mutated(one[64:], dice)
        entries.append(one)
    size = None if dice.random() < 0.8 else dice.choice(code_inputs.NUMBERS)
    return made.host_library(made.fatbin(*entries, size=size), made.fatbin(*entries[:1]))


if __name__ == "__main__":
    cubin = made.cubin(constants=bytes(64))
    entries = [made.entry(cubin, packing=packing, pad=pad) for packing in ("", "lz4", "zstd") for pad in (0, 5)]
    code_inputs.run("fuzz_fatbin", [
        made.fatbin(*entries), made.fatbin(entries[2]), made.fatbin(entries[4]),
        made.host_library(made.fatbin(*entries), made.fatbin(made.entry(made.PTX, kind=1, packing="zstd")))],
        check, shaped)
