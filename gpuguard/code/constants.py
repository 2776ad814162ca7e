"""The published constants of hash functions and ciphers, and the search for them.

A hash function that is compiled keeps the numbers of its standard, as immediates or as a table in the module's constant
data. The tables are computed from their definitions where these are short; the rest is quoted from the paper named
beside it. Words of 64 bits count as two words of 32.

What is counted is how many *distinct* words of one table occur, since single words prove nothing: Philox' second key
increment is also SHA-256's H1. Words that are ordinary as numbers (0, small ones, a sign bit with a small number) are
in no table. Which count is enough is for the classifier to say. The tables of what is no hash function of a miner
(philox, splitmix, xxhash, murmur, crc32, chacha, mt19937) serve to name what else integer-heavy code may be.
"""

from __future__ import annotations

import math
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from gpuguard import _sass

if TYPE_CHECKING:
    from numpy.typing import NDArray

MASK = 0xFFFFFFFF
MASK64 = 0xFFFFFFFFFFFFFFFF
# How much constant data of one module is searched: a whole module's tables are kilobytes, and a model's weights are not
# looked into to the end.
DATA_BYTES_MAX = 16 << 20


def primes(count: int) -> list[int]:
    """Return the first primes."""
    found: list[int] = []
    number = 2
    while len(found) < count:
        if all(number % prime for prime in found):
            found.append(number)
        number += 1
    return found


def root_fraction(number: int, degree: int, bits: int) -> int:
    """Return the first bits of the fractional part of a square (2) or cube (3) root."""
    scaled = number << degree * bits
    if degree == 2:
        return math.isqrt(scaled) & ((1 << bits) - 1)
    low, high = 0, 1 << (scaled.bit_length() // degree + 1)
    while low < high - 1:
        middle = (low + high) // 2
        low, high = (middle, high) if middle**degree <= scaled else (low, middle)
    return low & ((1 << bits) - 1)


def halves(words: list[int]) -> list[int]:
    """Return words of 64 bits as words of 32, high first."""
    return [half for word in words for half in (word >> 32, word & MASK)]


def swapped(word: int) -> int:
    """Return a 32-bit word in the other byte order."""
    return int.from_bytes(word.to_bytes(4, "little"), "big")


def keccak_words() -> list[int]:
    """FIPS 202, 3.2.5: round constants from a shift register, x^8 + x^6 + x^5 + x^4 + 1.

    Kept are the low halves whose own low half says something: 0x80000001 is what any program has.
    """
    state, words = 1, []
    for _ in range(24):
        constant = 0
        for j in range(7):
            constant |= (state & 1) << ((1 << j) - 1)
            state = state << 1 ^ (0x171 if state & 0x80 else 0)
        words.append(constant & MASK)
    return [word for word in words if word & 0xFFFF > 0xFF]


def pi_words(count: int) -> list[int]:
    """Return the fractional part of pi in 32-bit words: BLAKE, 2.1 and Blowfish. Machin's formula with integers."""
    bits = 32 * count + 64

    def arctan_inverse(x: int) -> int:
        term = (1 << bits) // x
        total, n, sign = term, 3, -1
        while term:
            term //= x * x
            total += sign * (term // n)
            n, sign = n + 2, -sign
        return total

    pi = 4 * (4 * arctan_inverse(5) - arctan_inverse(239))
    fraction = pi & ((1 << bits) - 1)
    return [fraction >> (bits - 32 * (i + 1)) & MASK for i in range(count)]


def aes_box() -> list[int]:
    """FIPS 197, 5.1.1: the inverse in GF(2^8), then the affine transformation."""
    box, p, q = [0] * 256, 1, 1
    while True:
        p = (p ^ p << 1 ^ (0x1B if p & 0x80 else 0)) & 0xFF
        q ^= q << 1
        q ^= q << 2
        q ^= q << 4
        q &= 0xFF
        q ^= 0x09 if q & 0x80 else 0
        box[p] = q ^ _rotl8(q, 1) ^ _rotl8(q, 2) ^ _rotl8(q, 3) ^ _rotl8(q, 4) ^ 0x63
        if p == 1:
            break
    box[0] = 0x63
    return box


def _rotl8(value: int, by: int) -> int:
    return (value << by | value >> (8 - by)) & 0xFF


def _rotl32(value: int, by: int) -> int:
    return (value << by | value >> (32 - by)) & MASK


def _rotl64(value: int, by: int) -> int:
    return (value << by | value >> (64 - by)) & MASK64


def aes_items() -> dict[int, int]:
    """Return word -> entry: a round's table (AES proposal, 5.2.1) in any rotation, and the box itself packed."""
    items: dict[int, int] = {}
    box = aes_box()
    for entry, s in enumerate(box):
        double = s << 1 ^ (0x11B if s & 0x80 else 0)
        word = double << 24 | s << 16 | s << 8 | double ^ s
        for turn in (0, 8, 16, 24):
            items[_rotl32(word, turn)] = items[swapped(_rotl32(word, turn))] = entry
    for at in range(0, 256, 4):
        items[int.from_bytes(bytes(box[at:at + 4]), "little")] = 256 + at // 4
    return items


def cubehash_words() -> list[int]:
    """CubeHash 16/32-512, the initial state: ten times sixteen rounds over (64, 32, 16, 0, ...)."""
    x = [64, 32, 16] + [0] * 29
    for _ in range(160):
        for turn, over, within in ((7, 8, 2), (11, 4, 1)):
            for j in range(16):
                x[16 + j] = (x[16 + j] + x[j]) & MASK
            x[:16] = [_rotl32(x[j ^ over], turn) ^ x[16 + j] for j in range(16)]
            x[16:] = [x[16 + (j ^ within)] for j in range(16)]
    return x


def skein_words() -> list[int]:
    """Return the key parity of Threefish (Skein 1.3, 3.3.2) and the initial chain of Skein-512-512 (4.7, B)."""
    parity = 0x1BD11BDAA9FC1A22
    turns = ((46, 36, 19, 37), (33, 27, 14, 42), (17, 49, 36, 39), (44, 9, 54, 56),
             (39, 30, 34, 24), (13, 50, 10, 17), (25, 29, 39, 43), (8, 35, 56, 22))
    plain = [int.from_bytes(b"SHA3" + (1).to_bytes(4, "little"), "little"), 512, 0, 0, 0, 0, 0, 0]
    tweak = [32, (0xC4 << 56)]
    tweak.append(tweak[0] ^ tweak[1])
    key = [0] * 8 + [parity]

    def keyed(state: list[int], step: int) -> list[int]:
        added = [key[(step + i) % 9] for i in range(8)]
        added[5] += tweak[step % 3]
        added[6] += tweak[(step + 1) % 3]
        added[7] += step
        return [(one + other) & MASK64 for one, other in zip(state, added, strict=True)]

    state = plain
    for number in range(72):
        if number % 4 == 0:
            state = keyed(state, number // 4)
        mixed = []
        for pair in range(4):
            a = (state[2 * pair] + state[2 * pair + 1]) & MASK64
            mixed += [a, _rotl64(state[2 * pair + 1], turns[number % 8][pair]) ^ a]
        state = [mixed[i] for i in (2, 1, 4, 7, 6, 5, 0, 3)]
    chain = [one ^ other for one, other in zip(keyed(state, 18), plain, strict=True)]
    return halves([parity, *chain])


def crc32_words() -> list[int]:
    """Return the table of the reflected CRC-32 (ISO 3309, 0xEDB88320)."""
    table = []
    for word in range(256):
        for _ in range(8):
            word = word >> 1 ^ (0xEDB88320 if word & 1 else 0)  # noqa: PLW2901 - a register is shifted in place
        table.append(word)
    return table


def philox_key_words() -> list[int]:
    """Return what Philox' two key increments come to in ten rounds: unrolled, a compiler adds each sum at once.

    They count as one word with the second increment, so that four words are both multipliers and two of the keys.
    """
    return [times * increment & MASK for increment in (0x9E3779B9, 0xBB67AE85) for times in range(2, 10)]


def _text_words(text: bytes) -> list[int]:
    """Return text as words in either byte order."""
    return [int.from_bytes(text[at:at + 4], order) for order in ("little", "big") for at in range(0, len(text), 4)]


@cache
def tables() -> dict[str, dict[int, int]]:
    """Return table -> word -> which entry of the table it is: entries are what is counted."""
    eighty_primes = primes(80)
    initial64 = [root_fraction(prime, 2, 64) for prime in eighty_primes[:8]]
    rounds64 = [root_fraction(prime, 3, 64) for prime in eighty_primes]
    md_chain = [0x67452301, 0xEFCDAB89, 0x98BADCFE, 0x10325476]  # RFC 1321, 3.3: the digits, counted up and down
    lists: dict[str, list[int]] = {
        "sha2iv": [word >> 32 for word in initial64],  # FIPS 180-4, 5.3.3
        "sha256k": [word >> 32 for word in rounds64[:64]],  # 4.2.2
        "sha512iv": halves(initial64),  # 5.3.5
        # 4.2.3, without the upper halves that are SHA-256's: the cube roots of the same primes.
        "sha512k": halves(rounds64[64:]) + [word & MASK for word in rounds64[:64]],
        # 4.2.1: 2^30 times the square roots of 2, 3, 5 and 10; 5.3.1.
        "sha1": [math.isqrt(n << 60) & MASK for n in (2, 3, 5, 10)] + [*md_chain, 0xC3D2E1F0],
        "md5": [int(2**32 * abs(math.sin(i + 1))) for i in range(64)],  # RFC 1321, 3.4
        # RIPEMD-160: the square root of 7 and the cube roots of 2, 3, 5 and 7; the others are SHA-1's.
        "rmd": [math.isqrt(7 << 60) & MASK] + [(root_fraction(n, 3, 30) | 1 << 30) & MASK for n in (2, 3, 5, 7)],
        "keccak": keccak_words(),
        "pi": pi_words(32),
        "skein": skein_words(),
        "cubehash": cubehash_words(),
        # Luffa v2, appendix B: the first of the starting values, no definition is given.
        "luffa": [0x6D251E69, 0x44B051E0, 0x4EAA6FB4, 0xDBF78465, 0x6E292011, 0x90152DF4, 0xEE058139, 0xDEF610BB],
        # JH, appendix: the first round constant, bits of the square root of 2 as they lie in bit slices.
        "jh": [0x72D5DEA2, 0xDF15F867, 0x7B84150A, 0xB7231557, 0x81ABD690, 0x4D5A87F6, 0x4E9F4FC5, 0xC3D12B40],
        "siphash": _text_words(b"uespemosmodnarodarenegylsetybdet"),  # SipHash, 2: four words of 64 bits
        "fnv": [0x01000193, 0x811C9DC5],  # RFC 9923, 32 bits; Ethash mixes with the prime
        "philox": [0xD2511F53, 0xCD9E8D57, 0x9E3779B9, 0xBB67AE85],  # Random123, table 2 and 4.2
        "splitmix": halves([0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB]),  # Steele et al. 2014, 5
        "xxhash": [0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D, 0x27D4EB2F, 0x165667B1,  # XXH32 and XXH64 specifications, 2
                   *halves([0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0x85EBCA77C2B2AE63,
                            0x27D4EB2F165667C5])],
        "murmur": [0xCC9E2D51, 0x1B873593, 0xE6546B64, 0x85EBCA6B, 0xC2B2AE35],  # MurmurHash3_x86_32
        "crc32": crc32_words(),
        "chacha": _text_words(b"expand 32-byte k"),  # RFC 8439, 2.3
        "mt19937": [0x9908B0DF, 0x9D2C5680, 0xEFC60000, 0x6C078965],  # Matsumoto and Nishimura, table II; 2002 seeding
    }
    found = {name: {word: entry for entry, word in reversed(list(enumerate(some)))} for name, some in lists.items()}
    for name in ("siphash", "chacha"):
        found[name] = {word: entry % (len(lists[name]) // 2) for word, entry in found[name].items()}
    found["philox"] |= dict.fromkeys(philox_key_words(), 3)
    found["jh"] |= {swapped(word): entry for word, entry in found["jh"].items()}
    found["aes"] = aes_items()
    return {name: {word: entry for word, entry in some.items() if is_telling(word)} for name, some in found.items()}


def is_telling(word: int) -> bool:
    """Return whether a word is not just a number that any program may have."""
    return (word > 0x1000 and word & 0xFFFF > 0xFF) or word == 0xEFC60000


@cache
def words() -> frozenset[int]:
    """Return every word of every table."""
    return frozenset(word for some in tables().values() for word in some)


@cache
def _index() -> tuple[NDArray[np.uint32], NDArray[np.uint8], tuple[tuple[tuple[str, int], ...], ...]]:
    """Return all words in order, a bit for the lower half of each, and the tables and entries each stands for."""
    every = np.array(sorted(words()), np.uint32)
    halves = np.zeros(1 << 16, bool)
    halves[every & 0xFFFF] = True
    meant = tuple(
        tuple((name, some[word]) for name, some in tables().items() if word in some) for word in every.tolist())
    return every, np.packbits(halves, bitorder="little"), meant


def in_words(some: NDArray[np.uint32]) -> dict[str, int]:
    """Return table -> number of its distinct entries among words of 32 bits."""
    every, low, meant = _index()
    entries: dict[str, set[int]] = {}
    for one in _sass.known_words(some, every, low).tolist():
        for name, entry in meant[one]:
            entries.setdefault(name, set()).add(entry)
    return {name: len(numbers) for name, numbers in entries.items()}


def in_data(data: bytes | memoryview) -> dict[str, int]:
    """Return table -> number of its distinct entries in constant data, read as aligned little-endian words."""
    data = memoryview(data)[:DATA_BYTES_MAX]
    return in_words(np.frombuffer(data[:len(data) // 4 * 4], "<u4")) if len(data) >= 4 else {}
