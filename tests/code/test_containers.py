"""The readers: everything comes out as it went in, and nothing that is broken gets further than a flaw."""

from __future__ import annotations

import contextlib
import io
import random
import re
import struct
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from gpuguard import _sass
from gpuguard.code.containers import archives, elf, fatbin, images, ptx
from gpuguard.code.containers.finding import find_images, holds_nothing
from gpuguard.code.containers.images import Budget, Flaw, Image, Malformed
from gpuguard.code.containers.stream import CHUNK_BYTES, Stream

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import code_samples as made

CUBIN = made.cubin(constants=bytes(range(64)))
MARKS = [fatbin.MAGIC, elf.MAGIC, ptx.NEEDLE, b"PK\x03\x04", b"!<arch>\n", b"\x1f\x8b\x08", b"ustar", b"BZh", b""]
OTHER = made.cubin(name=b"other", sm=100, abi=8)
MANY = made.fatbin(made.entry(CUBIN, packing="zstd", pad=5), made.entry(OTHER, packing="lz4", sm=100, pad=3),
                   made.entry(CUBIN, header=128), made.entry(made.PTX, kind=1, packing="zstd"))


def read(data: bytes, budget: Budget | None = None) -> tuple[list[Image], list[Flaw]]:
    found = list(find_images(data, "f", budget))
    return [one for one in found if isinstance(one, Image)], [one for one in found if isinstance(one, Flaw)]


# -- ELF --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("abi", "sm"), [(7, 75), (7, 90), (8, 90), (8, 121)])
def test_a_cubin_gives_its_kernels_architecture_and_constants(abi, sm):
    cubin = elf.read_cubin(made.cubin(b"\x01" * 32, name=b"_Z3fooPf", sm=sm, abi=abi, constants=b"abcd"))
    assert (cubin.sm, [one.name for one in cubin.kernels], bytes(cubin.kernels[0].text)) == (
        sm, ["_Z3fooPf"], b"\x01" * 32)
    # Bank 0 holds parameters, not tables.
    assert [bytes(one) for one in cubin.constants] == [b"abcd"]


@pytest.mark.parametrize(("variables", "found"), [
    (((16, 48), (0, 16), (0, 16)), ((0, 16), (16, 64))),  # in any order, one with two names
    (((0, 0), (8, 8), (1 << 63, 1 << 63), (60, 5)), ((8, 16),)),  # without a size, and beyond the bank's end
    (((0, 20), (16, 16)), ()),  # one in another: whose words they are is not clear
    ((), ()),
])
def test_the_variables_of_a_bank_are_where_the_symbols_say(variables, found):
    cubin = elf.read_cubin(made.cubin(constants=bytes(range(64)), variables=variables))
    assert (bytes(cubin.bank), cubin.variables) == (bytes(range(64)), found)
    assert elf.read_cubin(made.cubin(constants=bytes(1 << 17), variables=((0, 4),))).variables == ()  # no bank


@pytest.mark.parametrize(("relocations", "patched"), [(b"", False), (bytes(16), True)])
def test_a_kernel_that_is_filled_in_when_loaded_is_known(relocations, patched):
    (kernel,) = elf.read_cubin(made.cubin(relocations=relocations)).kernels
    assert kernel.patched is patched


@pytest.mark.parametrize("path", made.CUBINS[:8], ids=lambda path: path.name)
def test_what_a_compiler_wrote_is_read(path):
    data = path.read_bytes()
    cubin = elf.read_cubin(data)
    assert cubin.sm == int(path.name.split("sm_")[1].split(".")[0])
    assert cubin.kernels
    assert all(len(one.text) % 16 == 0 for one in cubin.kernels)
    assert elf.extent(data) == len(data)
    found, flaws = read(b"\0" * 13 + data + b"rest")
    assert [one.data for one in found] == [data]
    assert flaws == []


def test_sections_that_all_name_the_same_bytes_are_refused():
    data = bytearray(made.cubin(bytes(4096)))
    table = struct.unpack_from("<Q", data, 40)[0]
    rows = bytes(data[table:])
    grown = data[:table] + rows[:64] + rows[64:128] * 50 + rows[-64:]
    struct.pack_into("<HH", grown, 60, 52, 51)
    with pytest.raises(Malformed, match="overlap"):
        elf.read_cubin(bytes(grown))


def test_sections_have_names():
    assert [one.name for one in elf.sections(made.cubin())][1:3] == [".text.k", ".nv.constant3"]


@given(st.data())
def test_a_broken_cubin_is_malformed_or_read(data):
    broken = bytearray(CUBIN)
    for _ in range(data.draw(st.integers(1, 6))):
        broken[data.draw(st.integers(0, len(broken) - 1))] = data.draw(st.integers(0, 255))
    broken = bytes(broken[:data.draw(st.integers(0, len(broken)))])
    try:
        cubin = elf.read_cubin(broken)
    except Malformed as error:
        assert str(error)
    else:
        assert sum(len(one.text) for one in cubin.kernels) <= len(broken)


# -- fatbins ----------------------------------------------------------------------------------------------------------


def test_every_packing_gives_the_code_back():
    found, flaws = read(MANY)
    assert flaws == []
    assert [(one.container, one.kind, one.arch) for one in found] == [
        ("fatbin/zstd", "cubin", "sm_90"), ("fatbin/lz4", "cubin", "sm_100"), ("fatbin", "cubin", "sm_90"),
        ("fatbin/zstd", "ptx", "compute_90")]
    assert [one.data for one in found] == [CUBIN, OTHER, CUBIN, made.PTX]
    assert found[0].sha256 == found[2].sha256 != found[1].sha256


def test_fatbins_are_found_wherever_they_lie():
    found, flaws = read(made.host_library(MANY, made.fatbin(made.entry(OTHER)), b"x" + MANY))
    assert (len(found), flaws) == (9, [])


@pytest.mark.parametrize(("entry", "reason"), [
    (made.entry(CUBIN, packing="zstd", unpacked=7), "not of 7"),
    (made.entry(CUBIN, packing="lz4", unpacked=7), "LZ4"),
    (made.entry(CUBIN, packing="lz4", unpacked=len(CUBIN) + 1), "unpacks to"),
    (made.entry(CUBIN, packing="zstd", unpacked=1 << 40), "unpacks to 1099511627776"),
    (made.entry(CUBIN, packing="zstd", packed=1 << 20), "packed bytes"),
    (made.entry(CUBIN, payload=1 << 30), "beyond its fatbin"),
    (made.entry(CUBIN, header=64, payload=len(CUBIN) + 1), "beyond its fatbin"),
])
def test_sizes_that_do_not_fit_are_flaws_and_what_follows_is_read(entry, reason):
    _, flaws = read(made.fatbin(entry))
    assert reason in flaws[0].reason
    found, _ = read(made.fatbin(entry) + made.fatbin(made.entry(OTHER)))
    assert OTHER in [one.data for one in found]


def test_a_frame_that_states_a_size_of_its_own_is_not_believed():
    bomb = zstandard.ZstdCompressor().compress(bytes(64 << 20))
    head = bytearray(made.entry(b"x", packing="zstd"))[:64]
    struct.pack_into("<QI", head, 8, len(bomb), len(bomb))
    struct.pack_into("<Q", head, 56, 4096)
    found, flaws = read(made.fatbin(bytes(head) + bomb))
    assert found == []
    assert "67108864" in flaws[0].reason


def test_code_behind_a_false_header_is_found():
    """An entry of no known kind, as long as the file, does not hide what lies in it."""
    hidden = made.fatbin(made.entry(OTHER, packing="zstd"))
    for cover in (made.fatbin(made.entry(b"????" + hidden, kind=99)),
                  made.fatbin(made.entry(b"????" + hidden, kind=2)),
                  struct.pack("<4sHHQ", fatbin.MAGIC, 1, 16, 1 << 60) + hidden):
        found, _ = read(cover)
        assert OTHER in [one.data for one in found], cover[:32]


def test_the_magic_as_a_constant_in_a_program_is_no_flaw():
    assert read(b"\x48\xb8" + struct.pack("<4sHH", fatbin.MAGIC, 1, 16) + b"\x48\x89\x07\xc3" * 40) == ([], [])
    assert read(fatbin.MAGIC * 1000) == ([], [])


@given(st.one_of(st.binary(max_size=600), st.sampled_from(MARKS)), st.sampled_from(MARKS), st.integers(0, 600))
def test_what_holds_nothing_is_read_to_be_nothing(content, mark, at):
    for one in (content, content[:at] + mark + content[at:], mark[:at] + content):
        if holds_nothing(one):
            assert read(one) == ([], [])


def test_no_kind_of_code_holds_nothing():
    library = made.host_library(made.fatbin(made.entry(made.cubin(), packing="zstd")))
    files = {"a": library}
    some = [library, made.cubin(), made.PTX, made.tar(files), made.wheel(files), made.ar(files)]
    some += [made.packed(kind, library) for kind in ("gzip", "xz", "bzip2", "zstd")]
    assert not any(map(holds_nothing, some))


# -- PTX --------------------------------------------------------------------------------------------------------------


def test_ptx_is_counted_as_the_machine_code_it_becomes():
    module = ptx.read_ptx(made.PTX)
    kernel, = module.kernels
    assert (module.sm, kernel.name, kernel.rotates) == (90, "mix", 1)
    assert kernel.opcodes == {"S2R": 1, "SHF": 1, "LOP3": 2, "IADD3": 2, "BRA": 1, "LDG": 1, "FFMA": 1, "STG": 1,
                              "RET": 1}
    assert kernel.n_instr == sum(kernel.opcodes.values())
    assert kernel.luts == {150: 1, 0x3C: 1}
    assert 0x6A09E667 in kernel.immediates
    assert {-4942790177982912921 & 0xFFFFFFFF, -4942790177982912921 >> 32 & 0xFFFFFFFF} <= set(kernel.immediates)
    assert 123456 not in kernel.immediates
    assert module.constants == (struct.pack("<4I", 0x428A2F98, 0x71374491, 0xB5C0FBCF, 0xE9B5DBA5),
                                b"\x98\x2f\x8a\x42")


def test_ptx_is_found_in_any_file():
    found, flaws = read(b"\xff\0" + made.PTX + b"\0more")
    assert [(one.kind, one.arch, one.data) for one in found] == [
        ("ptx", "compute_90", made.PTX[made.PTX.index(b".version"):])]
    assert flaws == []


@pytest.mark.parametrize("text", [b"", b".version 8.0", b".version 8.0\n.target sm_90\n.entry k() { add.s32 %r, 1, 2;"])
def test_what_is_no_module_is_malformed(text):
    with pytest.raises(Malformed):
        ptx.read_ptx(text)


def test_white_space_does_not_make_a_module_slow():
    """A megabyte of it once took five seconds; the time is not measured, only that a hundred of them end."""
    blank = b" " * 1_000_000
    for word in (b"lop3.b32", b".func", b"mov.u32 %r1,", b"shf.l.wrap.b32 %r1,", b".const .b32 K[2] =", b"123456"):
        with contextlib.suppress(Malformed):
            ptx.read_ptx(made.PTX.replace(b"ret;", word + blank + b"ret;"))


def test_the_outline_has_every_function_and_every_word():
    module, outline = ptx.read_ptx(made.PTX), ptx.outline(made.PTX)
    assert [name for name, _ in outline.functions] == [one.name for one in module.kernels]
    assert set(module.kernels[0].immediates) <= set(outline.words.tolist())
    assert outline.constants == (b"\x98\x2f\x8a\x42",)
    assert {0x428A2F98, 0x71374491} <= set(outline.words.tolist())


@given(st.lists(st.integers(-2**64, 2**64)), st.sampled_from([",", " ", ", ", ";\n"]), st.booleans())
def test_literals_are_what_int_reads(numbers, between, hexadecimal):
    text = between.join(f"{'-' if one < 0 else ''}{abs(one):#x}" if hexadecimal else str(one) for one in numbers)
    wanted = []
    for one in numbers:
        if abs(one) & (1 << 64) - 1 > 0xFFF:
            value = one & (1 << 64) - 1 if one > 0 else -(abs(one) & (1 << 64) - 1) & (1 << 64) - 1
            wanted += [value & 0xFFFFFFFF, *([value >> 32] if value >> 32 not in (0, 0xFFFFFFFF) else [])]
    assert _sass.literals(text.encode()).tolist() == wanted


@given(st.binary(max_size=200), st.sampled_from([1, 2, 4, 8]))
def test_a_plain_table_is_that_or_nothing(text, width):
    found = _sass.plain_table(text, width)
    plain = all(one in b"0123456789, \t\n\r\x0b\x0c" for one in text)
    assert (found is not None) == plain
    if found is not None:
        mask = (1 << 8 * width) - 1
        assert found == b"".join((int(one) & mask).to_bytes(width, "little") for one in re.findall(rb"\d+", text))


@given(st.lists(st.integers(0, 60_000).map(str)), st.sampled_from([1, 2, 4, 8]))
def test_a_list_of_numbers_is_a_plain_table(numbers, width):
    mask = (1 << 8 * width) - 1
    assert _sass.plain_table(", ".join(numbers).encode(), width) == b"".join(
        (int(one) & mask).to_bytes(width, "little") for one in numbers)


@given(st.binary(max_size=300), st.integers(0, len(made.PTX)))
def test_broken_ptx_is_malformed_or_counted(rubbish, at):
    try:
        module = ptx.read_ptx(made.PTX[:at] + rubbish + made.PTX[at:])
    except Malformed as error:
        assert str(error)
    else:
        assert all(one.n_instr == sum(one.opcodes.values()) for one in module.kernels)


# -- archives ---------------------------------------------------------------------------------------------------------

LIBRARY = made.host_library(MANY)


@pytest.mark.parametrize("kind", ["gzip", "xz", "bzip2", "zstd"])
def test_packed_files_are_read(kind):
    found, flaws = read(made.packed(kind, LIBRARY) + made.packed(kind, OTHER))
    assert (len(found), flaws) == (5, [])
    assert found[0].container == f"{kind}/fatbin/zstd"


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_tar_gives_its_members_with_their_names(form):
    name = "a" * 60 + "/" + "b" * 60 + ".so"
    names = {"lib/x.so": LIBRARY, name: OTHER, "empty": b""}
    found, flaws = read(made.tar(names, form))
    assert ([one.path for one in found], flaws) == (["f!/lib/x.so"] * 4 + [f"f!/{name}"], [])


def test_a_tar_with_names_too_long_for_ustar():
    name = "n" * 300
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        found, flaws = read(made.tar({name: OTHER}, form))
        assert ([one.path for one in found], flaws) == ([f"f!/{name}"], [])


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2])
def test_a_wheel_is_read(method):
    found, flaws = read(made.wheel({"torch/lib/x.so": LIBRARY, "k.cubin": OTHER, "caf\xe9": b"1"}, method))
    assert ([one.path for one in found], flaws) == (["f!/torch/lib/x.so"] * 4 + ["f!/k.cubin"], [])


def test_a_static_library_is_read():
    found, flaws = read(made.ar({"one.o": LIBRARY, "a_rather_long_name_of_an_object.o": OTHER}))
    assert [one.path for one in found] == ["f!/one.o"] * 4 + ["f!/a_rather_long_name_of_an_object.o"]
    assert flaws == []


def test_an_image_of_a_container_is_read_layer_by_layer():
    wheel = made.wheel({"k.so": LIBRARY})
    found, flaws = read(made.image_of_container([{"etc/hosts": b"x"}, {"app/m.whl": wheel, "usr/k.so": OTHER}]))
    assert flaws == []
    assert len(found) == 5
    assert found[0].container == "tar/gzip/tar/zip/fatbin/zstd"
    assert found[0].path.endswith("!/app/m.whl!/k.so")
    assert found[4].path.endswith("!/usr/k.so")


def test_archives_in_one_another_end():
    data = LIBRARY
    for _ in range(images.DEPTH_MAX + 1):
        data = made.packed("gzip", data)
    found, flaws = read(data)
    assert found == []
    assert [(one.kind, "in one another" in one.reason) for one in flaws] == [("unread", True)]


def test_a_bomb_is_stopped():
    budget = Budget(0)
    budget.left_bytes = 8 << 20
    _, flaws = read(made.packed("gzip", made.packed("gzip", bytes(64 << 20))), budget)
    assert [one.kind for one in flaws] == ["malformed"]
    assert "honest" in flaws[0].reason
    budget.left_bytes = 8 << 20
    assert read(made.wheel({"zeros": bytes(64 << 20)}), budget)[1]


def test_a_name_is_shown_and_never_more():
    found, _ = read(made.tar({"../../etc/\x1b[31mpasswd\n": OTHER}))
    assert found[0].path == "f!/../../etc/\\x1b[31mpasswd\\n"


def test_a_member_without_a_name_is_read():
    data = made.wheel({"k": OTHER})
    at = data.rindex(b"PK\x01\x02")
    nameless = bytearray(data[:at + 46] + data[at + 47:])
    nameless[at + 28] = 0
    nameless[nameless.rindex(b"PK\x05\x06") + 12] -= 1
    _, flaws = read(bytes(nameless))
    assert [one.kind for one in flaws] == ["unread"]


def test_an_encrypted_member_is_a_gap():
    data = bytearray(made.wheel({"k.cubin": OTHER}))
    at = data.rindex(b"PK\x01\x02")
    data[6] |= 1
    data[at + 8] |= 1
    _, flaws = read(bytes(data))
    assert [(one.kind, one.reason) for one in flaws] == [("unread", "k.cubin is encrypted")]


@pytest.mark.parametrize("data", [
    *(made.packed(kind, LIBRARY) for kind in ("gzip", "xz", "zstd", "bzip2")),
    made.tar({"x": LIBRARY}), made.wheel({"x": LIBRARY}), made.ar({"x": LIBRARY}), LIBRARY,
], ids=["gzip", "xz", "zstd", "bzip2", "tar", "zip", "ar", "library"])
def test_a_file_cut_anywhere_ends_in_flaws(data):
    whole = len(read(data)[0])
    assert whole == 4
    for at in range(0, len(data), max(1, len(data) // 60)):
        found, flaws = read(data[:at])
        assert len(found) <= whole
        assert all(one.reason for one in flaws)
    assert read(data[:len(data) // 4])[1]


SEEDS = [made.tar({"x": LIBRARY, "y": OTHER}, tarfile.PAX_FORMAT), made.wheel({"x": LIBRARY}), made.ar({"x": LIBRARY}),
         made.packed("gzip", made.tar({"x": LIBRARY})), LIBRARY, made.PTX]


@given(st.sampled_from(SEEDS), st.integers(0, 2**32))
def test_nothing_that_is_broken_raises(seed, number):
    dice = random.Random(number)
    data = bytearray(seed)
    for _ in range(dice.choice((1, 3, 10))):
        at = dice.randrange(len(data))
        data[at:at + dice.choice((0, 1, 4))] = dice.randbytes(dice.choice((0, 1, 4, 8)))
    found, flaws = read(bytes(data))
    assert all(one.sha256 for one in found)
    assert all(one.reason and one.kind in ("malformed", "unread") for one in flaws)


@given(st.integers(1, 5))
def test_shares_of_a_file_make_up_the_whole(shares):
    data = made.wheel({"x": LIBRARY, "broken": made.fatbin(made.entry(CUBIN, packing="lz4", unpacked=7)), "y": OTHER})
    whole = list(find_images(data, "f"))
    parts = [list(find_images(data, "f", Budget(len(data), share=one, shares=shares))) for one in range(shares)]
    assert sum(map(len, parts)) == len(whole)
    assert [parts[at % shares][at // shares] for at in range(len(whole))] == whole


# -- the stream -------------------------------------------------------------------------------------------------------


@given(st.binary(max_size=400), st.integers(1, 50), st.data())
def test_a_stream_gives_the_bytes_however_they_come(content, piece, data):
    source = io.BytesIO(content)
    stream = Stream(lambda count: source.read(min(count, piece)))
    out = b""
    while len(out) < len(content):
        count = data.draw(st.integers(1, 60))
        assert stream.peek(count) == content[len(out):len(out) + count]
        before = len(out)
        out += stream.read(count)
        assert stream.offset == len(out) > before
    assert (out, stream.read(1)) == (content, b"")
    with pytest.raises(Malformed, match="ends 5 bytes early"):
        stream.take(5)


@given(st.lists(st.sampled_from([b"ab", b"abc", b"x", b"b"]), max_size=60), st.integers(1, 9))
def test_needles_are_found_in_order_however_the_bytes_come(parts, piece):
    content, needles = b"".join(parts), (b"abc", b"xa", b"bb")
    source = io.BytesIO(content)
    stream = Stream(lambda count: source.read(min(count, piece)))
    expected = [(at, needle) for at in range(len(content)) for needle in needles if content.startswith(needle, at)]
    found = []
    while needle := stream.seek_to(needles):
        found.append((stream.offset, needle))
        stream.skip(1)
    assert found == expected
    assert stream.offset == len(content)


def test_a_file_of_nothing_but_needles_is_searched_in_linear_time():
    content = ptx.NEEDLE * (2 * CHUNK_BYTES // len(ptx.NEEDLE))
    reads = []
    source = io.BytesIO(content)
    stream = Stream(lambda count: reads.append(count) or source.read(count))
    count = 0
    while stream.seek_to((fatbin.MAGIC, elf.MAGIC, ptx.NEEDLE)):
        stream.skip(1)
        count += 1
    assert count == len(content) // len(ptx.NEEDLE)
    assert len(reads) < 10


def test_kinds_are_told_by_content():
    assert archives.kind_of(made.tar({"a": b"b"})[:265]) == "tar"
    assert [archives.kind_of(made.packed(kind, b"x")) for kind in ("gzip", "xz", "bzip2", "zstd")] == [
        "gzip", "xz", "bzip2", "zstd"]
    assert archives.kind_of(b"PK\x03\x04") == "zip"
    assert archives.kind_of(b"") == archives.kind_of(CUBIN[:265]) == ""
