"""Kernels judged all in one call, as arrays, against each of them as a row and judged alone, the plain way."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuguard.code import batch, constants, decode, judge, modules
from gpuguard.code.classify import classify
from gpuguard.code.containers import elf
from gpuguard.code.containers.finding import find_images

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import code_samples as made

IMAGES = [image for path in made.CUBINS for image in find_images(path.read_bytes(), path.name)]
ROWS = [row for image in IMAGES[::5] for row in modules.rows(image.data)]
CODE = [(cubin.sm, bytes(kernel.text)) for cubin in (elf.read_cubin(image.data) for image in IMAGES)
        for kernel in cubin.kernels]


def alike(one, other):
    """Sums of floats may be added in another order."""
    assert (one.label, one.evidence) == (other.label, other.evidence)
    assert (one.probability, one.nats) == pytest.approx((other.probability, other.nats), abs=1e-9)


@given(st.lists(st.sampled_from(ROWS), max_size=6))
@settings(max_examples=8, deadline=None)
def test_a_kernel_is_judged_alike_in_company_and_alone(rows):
    assert classify(rows) == [classify([row], backend="reference")[0] for row in rows]


@given(st.lists(st.tuples(st.sampled_from(CODE), st.integers(0, 2**32)), max_size=3), st.booleans())
@settings(max_examples=12, deadline=None)
def test_arrays_are_judged_as_rows_are(chosen, compiled):
    parts, rows = [], []
    for (sm, text), seed in chosen:
        code = changed(text, random.Random(seed))
        row = decode.decode_kernel(sm, code)
        parts.append(decode.decode_counts(sm, code))
        rows.append(row)
    tables = [row.known_const_imm for row in rows]
    for one, row in zip(batch.judge(parts, tables, compiled=compiled), rows, strict=True):
        alike(one, classify([row], backend="reference")[0])


def changed(text, dice):
    """Cut, repeat, and now and then put in what is no opcode."""
    at = 16 * dice.randrange(len(text) // 16)
    code = bytearray(dice.choice((text, text[:at], text[at:] * dice.choice((1, 4)), b"", text[:16 * 63])))
    for _ in range(dice.choice((0, 0, 1, 30))):
        if code:
            where = 16 * dice.randrange(len(code) // 16)
            code[where:where + 2] = dice.choice((b"\xff\xff", b"\xf3\x0f", b"\x18\x79"))
    return bytes(code)


@pytest.mark.parametrize("image", IMAGES[::17], ids=lambda image: image.path)
def test_an_image_is_judged_as_its_rows_are(image):
    said = [one for some, _ in judge.judge_image(image, compiled=True) for one in some]
    rows = modules.rows(image.data)
    assert [one.kernel for one in said] == [row.kernel for row in rows]
    for one, row in zip(said, rows, strict=True):
        alike(one, classify([row], backend="reference")[0])
        assert (one.instructions, one.text_sha256) == (row.n_instr, row.text_sha256)


@given(st.lists(st.one_of(st.integers(0, 2**32 - 1), st.sampled_from(sorted(constants.words())))))
def test_known_words_are_found_as_one_would_look_them_up(words):
    wanted = {name: len({some[word] for word in words if word in some}) for name, some in constants.tables().items()}
    found = constants.in_words(np.array(words, np.uint32))
    assert found == {name: count for name, count in wanted.items() if count}


def test_only_what_can_read_the_words_of_a_module_has_them():
    """One hash in a library's module accuses none of what was compiled beside it."""
    table = b"".join(word.to_bytes(4, "little") for word in constants.tables()["sha256k"])
    nop = (0x918).to_bytes(16, "little") * 80
    reading = nop + (0x00C00000FF017B82).to_bytes(16, "little")  # LDC R1, c[0x3][0x0]

    def words(*kernels):
        made = tuple(elf.Kernel("k", memoryview(text), 0, patched) for text, patched in kernels)
        return [bool(one) for one in judge.in_constants(elf.Cubin(90, made, (memoryview(table),)))]

    assert words((reading, False), (nop, False), (nop, True)) == [True, False, True]
    # Named by none, the table was handed over by the host, and may be anybody's.
    assert words((nop, False), (nop, False)) == [True, True]


def test_an_operand_says_which_variable_is_read():
    """A transform of pictures beside a hash reads its own table, and its operands say so."""
    table = b"".join(word.to_bytes(4, "little") for word in constants.tables()["sha256k"])
    bank = memoryview(bytes(512) + table)
    cosines, rounds = (0x00C0440003017B82, 0x00C0840003017B82)  # LDC R1, c[0x3][R3+0x110] and [R3+0x210]
    anything = 0x00C0000003017B82  # LDC R1, c[0x3][R3]

    def words(*operands, variables=((0, 512), (512, 768))):
        made = tuple(elf.Kernel("k", memoryview(one.to_bytes(16, "little")), 0) for one in operands)
        return [bool(one) for one in judge.in_constants(elf.Cubin(90, made, (bank,), bank, variables))]

    assert words(cosines, rounds) == [False, True]
    assert words(cosines, anything) == [False, True]
    # Read by none that was seen to, it may be anybody's; and so where the symbols do not say what is where.
    assert words(cosines, cosines) == [True, True]
    assert words(cosines, rounds, variables=()) == words(cosines, rounds, variables=((0, 16),)) == [True, True]
    assert words(cosines, rounds, variables=((0, 768),)) == [True, True]


def test_more_sets_of_variables_than_a_module_has_count_for_all(monkeypatch):
    """Each is looked through by itself: who makes a module with one a kernel shall not choose how long that takes."""
    table = b"".join(word.to_bytes(4, "little") for word in constants.tables()["sha256k"])
    variables = tuple((at, at + 4) for at in range(0, len(table), 4))
    texts = [(0x00C0000003017B82 | at << 38).to_bytes(16, "little") for at, _ in variables[1:]]
    made = tuple(elf.Kernel("k", memoryview(text), 0) for text in texts)
    bank = memoryview(table)
    cubin = elf.Cubin(90, made, (bank,), bank, variables)
    assert judge.in_constants(cubin) == [{"sha256k": 1}] * len(made)
    monkeypatch.setattr(judge, "_VARIABLE_SETS_MAX", len(made) - 1)
    assert judge.in_constants(cubin) == [{"sha256k": len(variables)}] * len(made)
