"""What the four fuzz targets of the readers share: mutation, and the loop that keeps an input that failed."""

from __future__ import annotations

import os
import random
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

INTERESTING = (0, 1, 2, 0x20, 0x40, 0x7F, 0x80, 0xFF, 0x10, 0x3F)
WORDS = (b"\0\0\0\0", b"\xff\xff\xff\xff", b"\0\0\0\x80", b"\x01\0\0\0", b"\0\0\1\0", b"\xff\xff\xff\x7f")


def mutated(seed: bytes, dice: random.Random) -> bytes:
    """Return the seed with some bytes changed, words overwritten, parts cut out, doubled or moved."""
    data = bytearray(seed)
    for _ in range(dice.choice((1, 1, 2, 4, 16))):
        at, length = dice.randrange(len(data)), dice.choice((1, 4, 16, 64, 256))
        kind = dice.randrange(6)
        if kind == 0:
            data[at] = dice.choice(INTERESTING)
        elif kind == 1:
            data[at] ^= 1 << dice.randrange(8)
        elif kind == 2:
            del data[at:at + length]
        elif kind == 3:
            data[at:at] = data[at:at + length]
        elif kind == 4:
            data[at:at + 4] = dice.choice(WORDS)
        else:
            other = dice.randrange(len(data))
            data[at:at + length] = data[other:other + length]
        if not data:
            data = bytearray(seed)
    return bytes(data)


def run(name: str, seeds: list[bytes], check: Callable[[bytes], None]) -> None:
    """Check mutated seeds for as many seconds as the first argument says."""
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 60
    number = int(os.environ.get("GPUGUARD_FUZZ_SEED", "1"))
    dice = random.Random(number)
    end, tried, slowest = time.monotonic() + seconds, 0, 0.0
    while time.monotonic() < end:
        data = mutated(dice.choice(seeds), dice)
        began = time.process_time()
        try:
            check(data)
        except BaseException:
            Path(f"{name}.failed").write_bytes(data)
            print(f"input {tried} of seed {number} is in {name}.failed", file=sys.stderr)
            raise
        slowest = max(slowest, time.process_time() - began)
        tried += 1
    print(f"{tried} inputs, none failed; the slowest took {slowest:.3f} s")
