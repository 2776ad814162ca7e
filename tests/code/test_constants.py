"""The tables of constants: whole functions computed with them give the published digests."""

from __future__ import annotations

import hashlib
import struct
import zlib

import numpy as np

from gpuguard.code import constants

MASK = 0xFFFFFFFF


def in_order(name: str) -> list[int]:
    return [word for word, _ in sorted(constants.tables()[name].items(), key=lambda one: one[1])]


def rotr(x: int, n: int) -> int:
    return (x >> n | x << (32 - n)) & MASK


def test_sha256_of_the_tables():
    h, k = in_order("sha2iv"), in_order("sha256k")
    assert len(k) == 64
    w = list(struct.unpack(">16I", b"abc\x80" + bytes(52) + (24).to_bytes(8, "big")))
    for t in range(16, 64):
        x, y = w[t - 15], w[t - 2]
        w.append((w[t - 16] + (rotr(x, 7) ^ rotr(x, 18) ^ x >> 3) + w[t - 7]
                  + (rotr(y, 17) ^ rotr(y, 19) ^ y >> 10)) & MASK)
    a, b, c, d, e, f, g, i = h
    for t in range(64):
        one = i + (rotr(e, 6) ^ rotr(e, 11) ^ rotr(e, 25)) + (e & f ^ ~e & g) + k[t] + w[t]
        two = (rotr(a, 2) ^ rotr(a, 13) ^ rotr(a, 22)) + (a & b ^ a & c ^ b & c)
        a, b, c, d, e, f, g, i = (one + two) & MASK, a, b, c, (d + one) & MASK, e, f, g
    digest = struct.pack(">8I", *((x + y) & MASK for x, y in zip(h, (a, b, c, d, e, f, g, i), strict=True)))
    assert digest == hashlib.sha256(b"abc").digest()


def test_crc32_of_the_table():
    table = constants.crc32_words()
    value = MASK
    for byte in b"123456789":
        value = table[(value ^ byte) & 255] ^ value >> 8
    assert value ^ MASK == zlib.crc32(b"123456789") == 0xCBF43926


def test_aes_box():
    box = constants.aes_box()
    assert sorted(box) == list(range(256))
    assert (box[0x00], box[0x01], box[0x53], box[0xFF]) == (0x63, 0x7C, 0xED, 0x16)
    assert 0xC66363A5 in constants.tables()["aes"]


def test_first_words_are_the_published_ones():
    published = {
        "sha512k": 0xD728AE22, "sha512iv": 0x6A09E667, "sha1": 0x5A827999, "md5": 0xD76AA478, "rmd": 0x6D703EF3,
        "keccak": 0x8082, "pi": 0x243F6A88, "skein": 0x1BD11BDA, "cubehash": 0x2AEA2A61, "siphash": 0x736F6D65,
        "chacha": 0x61707865,
    }
    for name, word in published.items():
        assert word in constants.tables()[name], name
    assert {0x4903ADFF, 0x749C51CE} <= set(constants.tables()["skein"])
    assert len(in_order("keccak")) == 14
    assert constants.pi_words(18)[17] == 0x8979FB1B
    assert len(in_order("md5")) == 64
    assert len(in_order("sha512k")) == 96
    assert not set(in_order("sha512k")) & set(in_order("sha256k"))  # upper halves of the first 64 are SHA-256's


def test_ordinary_numbers_are_in_no_table():
    for word in (0, 1, 2, 255, 4096, 0x80000000, 0x80000001, 0x7FFFFFFF, 0xFFFFFFFF, 0xFFFF0000, 0x3F800000):
        assert word not in constants.words(), hex(word)


def test_entries_are_counted_once():
    words = np.array([0x6A09E667, 0x6A09E667, 0xBB67AE85, 12345], np.uint32)
    assert constants.in_words(words) == {"sha2iv": 2, "sha512iv": 2, "philox": 1}
    table = constants.tables()["aes"]
    turned = np.array([word for word, entry in table.items() if entry == 7], np.uint32)
    assert len(turned) > 1
    assert constants.in_words(turned) == {"aes": 1}


def test_the_key_of_philox_counts_however_its_sums_are_folded():
    multipliers, keys = [0xD2511F53, 0xCD9E8D57], [0x9E3779B9 * times & MASK for times in range(1, 10)]
    assert constants.in_words(np.array([*multipliers, *keys], np.uint32))["philox"] == 4
    assert constants.in_words(np.array(keys, np.uint32))["philox"] == 2  # without its multipliers it is none
    assert constants.in_words(np.array(list(constants.tables()["sha2iv"]), np.uint32))["philox"] == 1


def test_module_data():
    table = b"".join(struct.pack("<I", word) for word in in_order("sha256k"))
    assert constants.in_data(bytes(64) + table + b"xyz")["sha256k"] == 64
    assert constants.in_data(b"") == constants.in_data(b"abc") == {}
    assert constants.in_data(bytes(4096)) == {}
    assert constants.in_words(np.empty(0, np.uint32)) == {}


def test_luffa_and_jh_are_the_reference_implementations():
    # Luffa: IV[0..7] of its authors' luffa.c; JH: the round constant of round 0, even then odd, of sphlib's and the
    # authors' bit-sliced code. Looked up in four implementations each, that agree.
    assert in_order("luffa") == [
        0x6D251E69, 0x44B051E0, 0x4EAA6FB4, 0xDBF78465, 0x6E292011, 0x90152DF4, 0xEE058139, 0xDEF610BB]
    words = bytes.fromhex("72d5dea2df15f8677b84150ab723155781abd6904d5a87f64e9f4fc5c3d12b40")
    for at in range(0, 32, 4):
        for order in ("big", "little"):
            assert constants.tables()["jh"][int.from_bytes(words[at:at + 4], order)] == at // 4
