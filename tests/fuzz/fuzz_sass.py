"""Code under mutation, for as many seconds as the first argument says: the decoder agrees with its reference.

Seeds are our own cubins; a mutation changes bits, opcodes, branch offsets and immediates, repeats and cuts. For reads
out of bounds build the decoder as tests/asan_sass.sh does.
"""

from __future__ import annotations

import os
import random
import struct
import sys
import time
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS / "code"), str(TESTS), str(TESTS.parent / "scripts")]
import learn_opcodes  # noqa: E402
import test_decode  # noqa: E402

KERNEL_BYTES_MAX = 16 * 1200
WORDS = (0x6A09E667, 0xBB67AE85, 0x428A2F98, 0x8082, 0xFFFF5BB1, 0x10000, 0xFFFEFFFF, 0, 0xFFFFFFFF)


def corpus() -> list[tuple[int, bytes]]:
    """Every kernel of the fixtures, with its architecture."""
    seeds = []
    for path in test_decode.CUBINS:
        data = path.read_bytes()
        sm = learn_opcodes.arch_of(data)
        seeds += [(sm, text[:KERNEL_BYTES_MAX]) for text in learn_opcodes.texts(data).values()]
    return seeds


def mutated(seed: bytes, sm: int, dice: random.Random) -> bytes:
    data = bytearray(seed)
    for _ in range(dice.choice((1, 2, 8, 64))):
        count = len(data) // 16
        at = 16 * dice.randrange(count)
        kind = dice.randrange(7)
        if kind == 0:
            data[at + dice.randrange(16)] ^= 1 << dice.randrange(8)
        elif kind == 1:
            data[at:at + 16] = dice.randbytes(16)
        elif kind == 2:
            data[at:at + 16] = test_decode.branch(sm, at // 16, dice.randrange(-3, count + 3))
        elif kind == 3:
            struct.pack_into("<I", data, at + 4, dice.choice(WORDS))
        elif kind == 4:
            struct.pack_into("<H", data, at, dice.randrange(65536))
        elif kind == 5 and count > 1:
            del data[at:at + 16 * dice.choice((1, 16, 96))]
        else:
            data[at:at] = data[at:at + 16 * dice.choice((1, 16, 96))]
        data = data[:KERNEL_BYTES_MAX] or bytearray(seed)
    return bytes(data)


def main(seconds: float) -> None:
    seed_number = int(os.environ.get("GPUGUARD_FUZZ_SEED", "1"))
    dice = random.Random(seed_number)
    seeds = corpus()
    end = time.monotonic() + seconds
    tried = 0
    while time.monotonic() < end:
        sm, seed = dice.choice(seeds)
        sm = dice.choice((sm, sm, *test_decode.ARCHITECTURES))
        data = mutated(seed, sm, dice)
        try:
            test_decode.same_as_reference(sm, data)
        except BaseException:
            Path("fuzz_sass.failed").write_bytes(data)
            print(f"input {tried} of seed {seed_number}, sm_{sm}, is in fuzz_sass.failed", file=sys.stderr)
            raise
        tried += 1
    print(f"{tried} inputs, none failed")


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 60)
