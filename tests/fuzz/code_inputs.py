"""What the fuzz targets of the readers share: mutation, and the loop that keeps an input that failed."""

from __future__ import annotations

import os
import random
import struct
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

INTERESTING = (0, 1, 2, 0x20, 0x40, 0x7F, 0x80, 0xFF, 0x10, 0x3F)
WORDS = (b"\0\0\0\0", b"\xff\xff\xff\xff", b"\0\0\0\x80", b"\x01\0\0\0", b"\0\0\1\0", b"\xff\xff\xff\x7f")
NUMBERS = (0, 1, 2, 15, 16, 63, 64, 65, 0xFF, 0xFFFF, 1 << 20, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32,
           (1 << 63) - 1, 1 << 63, (1 << 64) - 1)


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


def set_field(data: bytearray, at: int, form: str, dice: random.Random) -> None:
    """Overwrite the number at ``at``, of a form of `struct`, by one that readers stumble over."""
    old, = struct.unpack_from(form, data, at)
    near = (old + dice.choice((-16, -1, 1, 16)), old * 2, len(data), len(data) - at, at)
    bits = 8 * struct.calcsize(form)
    struct.pack_into(form, data, at, dice.choice((*NUMBERS, *near)) & ((1 << bits) - 1))


def run(name: str, seeds: list[bytes], check: Callable[[bytes], None],
        shaped: Callable[[bytes, random.Random], bytes] | None = None) -> None:
    """Check mutated seeds for as many seconds as the first argument says.

    ``shaped`` knows the format: it changes one thing and leaves the rest whole, so that what lies deeper is reached.
    Half of the inputs are its own.
    """
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 60
    number = int(os.environ.get("GPUGUARD_FUZZ_SEED", "1"))
    dice = random.Random(number)
    end, tried, slowest = time.monotonic() + seconds, 0, 0.0
    while time.monotonic() < end:
        seed = dice.choice(seeds)
        data = shaped(seed, dice) if shaped and dice.random() < 0.5 else mutated(seed, dice)
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
