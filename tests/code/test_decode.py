"""The decoder against its reference, on code of our own, on random bytes, and on what an attacker would send."""

from __future__ import annotations

import struct
import sys
from functools import cache
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gpuguard.code import constants
from gpuguard.code.decode import (
    DERIVED,
    Parts,
    columns,
    constants_read,
    decode_counts,
    decode_kernel,
    decoder,
    lut_classes,
    mnemonics,
    opcode_names,
)
from gpuguard.code.rows import UNKNOWN_RATIO_MAX, KernelRow, counts_of, counts_text

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS), str(TESTS.parent / "scripts")]
import learn_opcodes  # noqa: E402
import reference_sass as reference  # noqa: E402

CUBINS = sorted((TESTS / "fixtures" / "cubins").glob("*.cubin"))
ARCHITECTURES = (75, 80, 86, 87, 89, 90, 100, 103, 120, 121)
NOP = (0x918).to_bytes(16, "little")


@cache
def kernels(name: str) -> dict[str, bytes]:
    return learn_opcodes.texts((TESTS / "fixtures" / "cubins" / name).read_bytes())


def split(counts, split_at=None) -> tuple[dict[str, int], dict[str, int]]:
    found = {name: int(count) for name, count in zip(columns(), counts, strict=True) if count}
    return {k: v for k, v in found.items() if k not in DERIVED}, {k: v for k, v in found.items() if k in DERIVED}


def pooled(part: reference.Counted) -> tuple[dict[str, int], dict[str, int]]:
    """A part has one column for all opcodes without a name."""
    opcodes: dict[str, int] = {}
    for name, count in part.opcodes.items():
        short = "UNK" if name.startswith("UNK") else name
        opcodes[short] = opcodes.get(short, 0) + count
    return opcodes, {**part.derived, "distinct_op": len(opcodes)}


def same_as_reference(sm: int, text: bytes) -> Parts:
    kernel, windows, loops, immediates = reference.decode(sm, text)
    parts = decode_counts(sm, text)
    row = parts.row()
    assert (row.n_instr, row.opcodes, row.derived) == (kernel.length, kernel.opcodes, kernel.derived)
    assert row.unknown_instructions == sum(n for name, n in kernel.opcodes.items() if name.startswith("UNK"))
    assert [split(one) for one in parts.windows] == [pooled(one) for one in windows]
    assert parts.spans.tolist() == [[one.first, one.length] for one in loops]
    assert [split(one) for one in parts.loops] == [pooled(one) for one in loops]
    large = {word for word in immediates if 0x10000 <= word < 0xFFFF0000}
    assert large <= set(parts.words.tolist()) <= immediates
    assert (immediates & constants.words()) <= set(parts.words.tolist())
    return parts


def instruction(opcode: int, *, lo: int = 0, hi: int = 0) -> bytes:
    return struct.pack("<QQ", lo & ~0xFFF | opcode, hi)


def branch(sm: int, at: int, to: int) -> bytes:
    units = 4 * (to - at - 1)
    if sm < 90:
        word = (units & (1 << 48) - 1) << 34 | 0x947
    else:
        word = (units >> 8 & (1 << 48) - 1) << 34 | (units & 255) << 16 | 0x947
    return word.to_bytes(16, "little")


some_sm = st.sampled_from(ARCHITECTURES)
some_word = st.one_of(
    st.binary(min_size=16, max_size=16),
    # Registers that are alike, and truth tables and selectors that mean something.
    st.builds(
        lambda opcode, imm, ra, rc, lut: instruction(opcode, lo=imm << 32 | ra << 24, hi=lut << 8 | rc),
        st.sampled_from(sorted(opcode_names(90))),
        st.one_of(st.sampled_from((0, 1, 0xFFFF, 0x10000, 0xFFFEFFFF, 0xFFFF0000, 0x123, 0x321, 0x5432, 0x8082,
                                   0x6A09E667, 0xBB67AE85, 0xFFFF5BB1)), st.integers(0, 2**32 - 1)),
        st.sampled_from((0, 4, 255)), st.sampled_from((0, 4, 255)), st.integers(0, 255)),
)


@st.composite
def code(draw) -> tuple[int, bytes]:
    """Instructions, many of them repeated, with branches back and forth in between."""
    sm = draw(some_sm)
    words: list[bytes] = []
    for _ in range(draw(st.integers(0, 12))):
        words += [draw(some_word)] * draw(st.sampled_from((1, 2, 15, 16, 40, 95, 96, 97)))
        if draw(st.booleans()):
            words.append(branch(sm, len(words), draw(st.integers(-2, len(words) + 2))))
    return sm, b"".join(words) + NOP * draw(st.integers(0, 3))


@given(code())
@example((75, b""))
@example((90, NOP))
@example((90, NOP * 500))
@example((90, instruction(0x812, lo=0x6A09E667 << 32)))
@example((120, branch(120, 0, 0)))
@example((90, instruction(0x212) * 20 + branch(90, 20, 0) + branch(90, 21, 3) + branch(90, 22, 21)))
@example((80, instruction(0x212) * 300 + branch(80, 300, -1) + branch(80, 301, 0)))
def test_agrees_with_the_reference(case):
    same_as_reference(*case)


@given(some_sm, st.binary(max_size=16 * 40))
def test_any_bytes_are_read(sm, data):
    if len(data) % 16:
        with pytest.raises(ValueError, match="whole number"):
            decode_counts(sm, data)
    else:
        same_as_reference(sm, data)


@pytest.mark.parametrize("name", [path.name for path in CUBINS])
def test_agrees_on_real_code(name):
    sm = learn_opcodes.arch_of((TESTS / "fixtures" / "cubins" / name).read_bytes())
    assert f"sm_{sm}." in name
    for text in kernels(name).values():
        assert not same_as_reference(sm, text).unknown


def test_overlapping_branches_cost_no_more():
    sm, n = 90, 20_000
    text = instruction(0x212) * n + b"".join(branch(sm, n + i, i) for i in range(n))
    parts = decode_counts(sm, text)
    assert parts.spans.tolist() == [[0, 2 * n]]
    nested = instruction(0x212) * n + b"".join(branch(sm, n + i, n - i - 1) for i in range(n))

    assert int(decode_counts(sm, nested).spans[:, 1].sum()) <= 2 * n


def test_a_tiny_loop_does_not_hide_the_one_around_it():
    body = [instruction(0x212)] * 40
    body.append(branch(90, 40, 38))
    body += [instruction(0x212)] * 9
    body.append(branch(90, 50, 4))
    assert decode_counts(90, b"".join(body)).spans.tolist() == [[4, 47]]


def test_many_different_immediates():
    text = b"".join(instruction(0x802, lo=(0x10000 + 7919 * i) << 32) for i in range(50_000))
    row = decode_counts(90, text, parts=False).row()
    assert row.derived["imm_big"] == row.derived["imm_big_distinct"] == 50_000


def test_counts_do_not_depend_on_what_was_decoded_before():
    text = kernels("sha256d.sm_90.cubin")["search"]
    before = decode_kernel(90, text)
    decode_counts(90, b"".join(instruction(0x802, lo=(0x20000 + i) << 32) for i in range(5000)))
    assert decode_kernel(90, text) == before


@pytest.mark.parametrize("sm", [0, 35, 61, 69, 200])
def test_other_machines_are_refused(sm):
    with pytest.raises(ValueError, match=f"sm_{sm}"):
        decode_counts(sm, bytes(16))


def test_more_code_than_a_kernel_has_is_refused():
    with pytest.raises(ValueError, match="more code"):
        decoder(90).decode(bytes((1 << 26) + 16))


def test_garbage_is_not_judged():
    noise = bytes((i * i * 31 + i // 7) & 255 for i in range(16 * 500))
    assert decode_kernel(90, noise).unknown_ratio() > UNKNOWN_RATIO_MAX
    assert not decode_kernel(90, noise).is_judgeable()
    assert not decode_kernel(90, b"").is_judgeable()
    assert decode_kernel(90, kernels("gemm.sm_90.cubin")["sgemm"]).is_judgeable()


def test_truth_tables():
    named = dict(zip(range(7), DERIVED, strict=False))
    assert {lut: named[index] for lut, index in lut_classes().items()} == {
        lut: name for lut, name in reference.LUTS.items() if name}
    of = {name: {lut for lut, other in reference.LUTS.items() if other == name} for name in named.values()}
    assert {0x3C, 0xC3} < of["lop_xor2"]
    assert of["lop_xor3"] == {0x96, 0x69}
    assert {0x78, 0x6C, 0x1E, 0x36, 0xD2} < of["lop_chi"]
    assert of["lop_maj"] == {0xE8}
    assert of["lop_ch"] == {0xCA, 0xE4, 0xD8, 0xAC, 0xB8, 0xE2}


def test_what_the_fixtures_are_made_of():
    sha = decode_kernel(90, kernels("sha256d.sm_90.cubin")["search"])
    assert sha.known_const_imm["sha256k"] >= 48
    assert sha.derived["rot"] > 500
    assert sha.derived["lop_xor3"] > 200
    assert sha.derived["lop_maj"] > 50
    assert max(one.derived.get("rot", 0) for one in sha.windows) > 20
    assert {one.part for one in sha.windows} == {"window", "loop"}
    gemm = decode_kernel(90, kernels("gemm.sm_90.cubin")["sgemm"])
    assert gemm.opcodes["FFMA"] >= 256
    assert not gemm.known_const_imm
    loop = max((one for one in gemm.windows if one.part == "loop"), key=lambda one: one.opcodes.get("FFMA", 0))
    assert loop.opcodes["FFMA"] > loop.n_instr / 2
    assert "IMMA" in decode_kernel(80, kernels("matmulpow.sm_80.cubin")["search"]).opcodes
    assert "IDP" in decode_kernel(75, kernels("heavyhash.sm_75.cubin")["search"]).opcodes
    philox = decode_kernel(90, kernels("crcaesrng.sm_90.cubin")["philox"])
    assert philox.known_const_imm["philox"] >= 3
    assert philox.known_const_imm.get("sha2iv", 0) <= 2


@pytest.mark.parametrize(("word", "read"), [
    (0x00000A00FF017624, frozenset()),  # IMAD.MOV.U32 R1, RZ, RZ, c[0x0][0x28]
    (0x00C00000FF017624, frozenset({0})),  # the same from c[0x3][0x0]
    (0x00C04400FF017624, frozenset({0x110})),  # and from c[0x3][0x110]
    (0x00C0440003017B82, frozenset({0x110})),  # LDC R1, c[0x3][R3+0x110]: of the variable that is there
    (0x00C0000003017B82, None),  # LDC R1, c[0x3][R3]: where R3 says
    (0x00C0000008047AB9, None),  # ULDC UR4, c[0x3][0x0]
    (0x01000400FF017624, None),  # IMAD.MOV.U32 R1, RZ, RZ, c[0x4][0x10]: an address
    (0x0000460000047AB9, frozenset()),  # ULDC UR4, c[0x0][0x118]
    (0x00C00000FF017424, frozenset()),  # IMAD.MOV.U32 R1, RZ, RZ, 0xc00000: an immediate
])
def test_an_operand_in_a_bank_is_seen_wherever_it_stands(word, read):
    text = NOP * 5_000 + word.to_bytes(16, "little") + NOP
    assert constants_read(text) == constants_read(text + bytes(7)) == read


def test_rounds_in_a_loop_read_their_table_and_a_product_of_matrices_reads_none():
    for sm in (75, 80, 90, 120):
        assert constants_read(kernels(f"keccak.sm_{sm}.cubin")["search"]) != frozenset()
        assert constants_read(kernels(f"gemm.sm_{sm}.cubin")["sgemm"]) == frozenset()
    assert constants_read(b"") == frozenset()


def test_windows_are_parts_of_the_kernel():
    row = decode_kernel(120, kernels("blake3.sm_120.cubin")["search"])
    windows = [one for one in row.windows if one.part == "window"]
    assert [one.first_instruction for one in windows] == [96 * i for i in range(len(windows))]
    assert windows[-1].first_instruction + windows[-1].n_instr == row.n_instr
    assert all(one.n_instr == 192 for one in windows[:-1])
    assert decode_kernel(120, kernels("blake3.sm_120.cubin")["search"], windows=False).windows == ()


def test_text_columns():
    row = decode_kernel(80, kernels("keccak.sm_80.cubin")["search"], kernel="search")
    text = row.as_columns()
    assert text["sm"] == "sm_80"
    assert counts_of(text["opcodes"]) == row.opcodes
    assert counts_of(text["derived"]) == row.derived
    assert counts_text({"b": 1, "a": 1, "c": 5}) == "c:5;a:1;b:1"
    assert counts_of("") == {}
    assert KernelRow(sm=90).as_columns()["opcodes"] == ""
    with pytest.raises(ValueError, match="invalid literal"):
        counts_of("FFMA:many")


def test_every_name_has_one_column():
    assert len(set(columns())) == len(columns()) == decoder(90).columns
    assert mnemonics()[-1] == "UNK"
    for sm in ARCHITECTURES:
        assert set(opcode_names(sm).values()) <= set(mnemonics())
    assert opcode_names(90)[0x835] == "HFMA2"
    assert opcode_names(120)[0x835] == "IADD"
