"""The searches that are recorded on a GPU hash what they say they hash: their very sources, compiled for the host.

A kernel tells only whether a digest is below its target, and for which nonce. So each is asked twice, with a target
just above the digest that the plain form gives and with one just below: only the right digest lies between.
"""

from __future__ import annotations

import ctypes
import hashlib
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

CUDA = Path(__file__).parent / "fixtures" / "cuda"

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")

#: What CUDA adds to C++, for a grid of one thread.
SHIM = """
#include <cstdint>
#define __global__
#define __device__
#define __constant__
#define __forceinline__ inline
static const struct { unsigned x; } blockIdx = {0}, blockDim = {1}, threadIdx = {0}, gridDim = {1};
struct uint2 { unsigned x, y; };
static uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
template <class T> static T atomicAdd(T *at, T more) { T was = *at; *at += more; return was; }
static unsigned atomicAdd(uint32_t *at, int more) { unsigned was = *at; *at += more; return was; }
static uint32_t __dp4a(uint32_t a, uint32_t b, uint32_t sum) {
  for (int i = 0; i < 32; i += 8) sum += (a >> i & 255) * (b >> i & 255);
  return sum;
}
#define __shared__ static
#define __syncthreads()
"""
M64 = (1 << 64) - 1


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("searches")

    def library(family: str) -> ctypes.CDLL:
        source, made = folder / f"{family}.cpp", folder / f"{family}.so"
        source.write_text(f'{SHIM}#include "{CUDA / family}.cu"\n')
        subprocess.run(["c++", "-x", "c++", "-std=c++17", "-O1", "-w", "-shared", "-fPIC", "-o", made, source],
                       check=True)
        return ctypes.CDLL(str(made))

    return library


def rol(x: int, n: int) -> int:
    return (x << n | x >> 64 - n) & M64 if n else x


def keccak_f(a: list[int]) -> list[int]:
    """Keccak-f[1600] of FIPS 202, by its definition: lanes a[x + 5 y]."""
    lfsr = 1
    for _ in range(24):
        c = [a[x] ^ a[x + 5] ^ a[x + 10] ^ a[x + 15] ^ a[x + 20] for x in range(5)]
        a = [a[i] ^ c[(i + 4) % 5] ^ rol(c[(i + 1) % 5], 1) for i in range(25)]
        x, y, lane = 1, 0, a[1]
        for t in range(24):
            x, y = y, (2 * x + 3 * y) % 5
            lane, a[x + 5 * y] = a[x + 5 * y], rol(lane, (t + 1) * (t + 2) // 2 % 64)
        a = [a[i] ^ (~a[i - i % 5 + (i + 1) % 5] & a[i - i % 5 + (i + 2) % 5]) for i in range(25)]
        for j in range(7):
            if lfsr & 1:
                a[0] ^= 1 << (1 << j) - 1
            lfsr = lfsr << 1 ^ (lfsr >> 7) * 0x171
    return a


def words(seed: bytes, count: int, kind: str) -> list[int]:
    return list(struct.unpack(f"<{count}{kind}", hashlib.shake_128(seed).digest(count * struct.calcsize(kind))))


def found_between(search, digest: int, word: type, nonce: int, make) -> None:
    """Assert that a search finds its nonce below ``digest`` + 1 and not below ``digest``."""
    for target, hit in ((digest + 1, True), (digest, False)):
        found = (word * 16)()
        search(*make(word(target), found))
        assert (nonce in found) is hit


def test_the_plain_permutation_is_that_of_sha3():
    message = b"abc"
    block = bytearray(136)
    block[:3], block[3], block[135] = message, 6, 0x80
    lanes = [*struct.unpack("<17Q", block), *[0] * 8]
    assert struct.pack("<4Q", *keccak_f(lanes)[:4]) == hashlib.sha3_256(message).digest()


def test_keccak(compiled):
    header, nonce = words(b"header", 10, "Q"), 0x1234567890abcdef
    digest = keccak_f([*header, nonce, 1, 0, 0, 0, 0, 1 << 63, *[0] * 8])[3]
    block = (ctypes.c_uint64 * 10)(*header)
    found_between(compiled("keccak").search, digest, ctypes.c_uint64, nonce,
                  lambda target, found: (block, ctypes.c_uint64(nonce), target, found))


def test_heavyhash(compiled):
    library, header, nonce = compiled("heavyhash"), words(b"header", 32, "Q"), 77
    nibbles = [[byte & 15 for byte in hashlib.shake_128(bytes([row])).digest(64)] for row in range(64)]
    packed = [int.from_bytes(bytes(row[4 * i:4 * i + 4]), "little") for row in nibbles for i in range(16)]
    ctypes.memmove(ctypes.addressof((ctypes.c_uint32 * 1024).in_dll(library, "matrix")),
                   (ctypes.c_uint32 * 1024)(*packed), 4096)
    # The round constants that search.cu sets, from its very text.
    text = (CUDA.parents[2] / "benchmarks" / "gpu" / "programs" / "search.cu").read_text()
    body = text.split("keccak_rounds[24] = {")[1].split("}")[0]
    rounds = (ctypes.c_uint64 * 24)(*(int(one, 16) for one in body.replace(",", " ").split()))
    ctypes.memmove(ctypes.addressof((ctypes.c_uint64 * 24).in_dll(library, "RC")), rounds, 192)

    first = keccak_f([*header[:9], nonce, *[0] * 15])
    digits = [byte >> shift & 15 for byte in struct.pack("<4Q", *first[:4]) for shift in (4, 0)]
    product = [sum(a * b for a, b in zip(row, digits, strict=True)) >> 10 for row in nibbles]
    mixed = [0] * 8
    for row, value in enumerate(product):
        mixed[row >> 3] ^= value << 4 * (row & 7) & 0xffffffff
    second = [first[i] ^ (mixed[2 * i + 1] << 32 | mixed[2 * i]) if i < 4 else header[i % 9 + 9] for i in range(25)]
    block = (ctypes.c_uint64 * 32)(*header)
    found_between(library.search, keccak_f(second)[3], ctypes.c_uint64, nonce,
                  lambda target, found: (block, ctypes.c_uint64(nonce), target, found))


def test_sha256d(compiled):
    """The first block of a chain: 80 bytes, of which the first 64 are in the midstate."""
    library = compiled("sha256d")
    header = bytes.fromhex(
        "0100000000000000000000000000000000000000000000000000000000000000000000003ba3edfd7a7b12b27ac72c3e67768f617fc81b"
        "c3888a51323a9fb8aa4b1e5e4a29ab5f49ffff001d1dac2b7c")
    digest = hashlib.sha256(hashlib.sha256(header).digest()).digest()
    last = int.from_bytes(digest[28:], "big")
    assert last == 0  # its proof of work
    state = sha256_state(header[:64])
    ctypes.memmove(ctypes.addressof((ctypes.c_uint32 * 8).in_dll(library, "midstate")),
                   (ctypes.c_uint32 * 8)(*state), 32)
    tail = struct.unpack(">4I", header[64:])
    ctypes.memmove(ctypes.addressof((ctypes.c_uint32 * 3).in_dll(library, "tail")),
                   (ctypes.c_uint32 * 3)(*tail[:3]), 12)
    for nonce, hit in ((tail[3], True), (tail[3] + 1, False)):
        found = (ctypes.c_uint32 * 64)()
        library.search(ctypes.c_uint32(nonce), ctypes.c_uint32(0), found, 1)
        assert (nonce in found) is hit


def sha256_state(block: bytes) -> list[int]:
    """The state after one block (FIPS 180-4, 6.2.2), the constants from their definition."""
    primes = [n for n in range(2, 312) if all(n % d for d in range(2, n))]
    k = [int((p ** (1 / 3) % 1) * 2**32) for p in primes]
    h = [int((p ** 0.5 % 1) * 2**32) for p in primes[:8]]

    def turned(x: int, n: int) -> int:
        return (x >> n | x << 32 - n) & 0xffffffff

    w = list(struct.unpack(">16I", block))
    for t in range(16, 64):
        x, y = w[t - 15], w[t - 2]
        w.append((w[t - 16] + (turned(x, 7) ^ turned(x, 18) ^ x >> 3) + w[t - 7]
                  + (turned(y, 17) ^ turned(y, 19) ^ y >> 10)) & 0xffffffff)
    a, b, c, d, e, f, g, i = h
    for t in range(64):
        one = i + (turned(e, 6) ^ turned(e, 11) ^ turned(e, 25)) + (e & f ^ ~e & g) + k[t] + w[t]
        two = (turned(a, 2) ^ turned(a, 13) ^ turned(a, 22)) + (a & b ^ a & c ^ b & c)
        a, b, c, d, e, f, g, i = (one + two) & 0xffffffff, a, b, c, (d + one) & 0xffffffff, e, f, g
    return [(x + y) & 0xffffffff for x, y in zip(h, (a, b, c, d, e, f, g, i), strict=True)]


def test_blake3(compiled):
    """A message of 64 bytes is one block, its digest's last word is what the search looks at."""
    # b3sum of bytes(range(64)) is 4eed7141ea4a5cd4b788606bd23f46e212af9cacebacdc7d1f4c6dc7f2511b98.
    message, digest = bytes(range(64)), bytes.fromhex(
        "4eed7141ea4a5cd4b788606bd23f46e212af9cacebacdc7d1f4c6dc7f2511b98")
    block = (ctypes.c_uint32 * 16).from_buffer_copy(message)
    nonce = int.from_bytes(message[:4], "little")
    found_between(compiled("blake3").search, int.from_bytes(digest[28:], "little"), ctypes.c_uint32, nonce,
                  lambda target, found: (block, ctypes.c_uint32(nonce), target, found))


def test_siphash_of_edges(compiled):
    """Cuckoo Cycle's SipHash-2-4: no length block, the four words of the key as they are."""
    library, key, mask, edges = compiled("siptrim"), words(b"key", 4, "Q"), (1 << 12) - 1, 32
    degree = (ctypes.c_uint32 * 256)()
    alive = (ctypes.c_uint32 * 1)(0xffffffff)
    library.count((ctypes.c_uint64 * 4)(*key), alive, degree, ctypes.c_uint32(mask), ctypes.c_uint32(edges))
    expected = [0] * 256
    for edge in range(edges):
        node = siphash(key, 2 * edge) & mask
        expected[node >> 4] = (expected[node >> 4] + (1 << 2 * (node & 15))) & 0xffffffff
    assert list(degree) == expected


def siphash(key: list[int], nonce: int) -> int:
    v = [key[0], key[1], key[2], key[3] ^ nonce]

    def rounds(count: int) -> None:
        for _ in range(count):
            v[0], v[2] = (v[0] + v[1]) & M64, (v[2] + v[3]) & M64
            v[1], v[3] = rol(v[1], 13) ^ v[0], rol(v[3], 16) ^ v[2]
            v[0] = rol(v[0], 32)
            v[2], v[0] = (v[2] + v[1]) & M64, (v[0] + v[3]) & M64
            v[1], v[3] = rol(v[1], 17) ^ v[2], rol(v[3], 21) ^ v[0]
            v[2] = rol(v[2], 32)

    rounds(2)
    v[0] ^= nonce
    v[2] ^= 0xff
    rounds(4)
    return v[0] ^ v[1] ^ v[2] ^ v[3]
