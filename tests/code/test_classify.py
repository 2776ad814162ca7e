"""Kernels named by their code: hand-made rows of each kind, hostile ones, and with data the stated figures."""

from __future__ import annotations

import csv
import gzip
import math
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuguard.code.classify import (
    MIX_NATS_MAX,
    PRIOR,
    TABLE_NATS_MAX,
    TABLES,
    classify,
    grey_class,
    model,
    table_hits,
)
from gpuguard.code.rows import KernelRow
from gpuguard.kernels import opcodes
from gpuguard.kernels.opcodes import FEATURES

DATA = Path(os.environ.get("GPUGUARD_DATA_DIR", ""), "sass", "kernels.csv.gz")


def columns(opcodes, derived="", imm="", module=""):
    total = sum(int(entry.rpartition(":")[2]) for entry in opcodes.split(";"))
    return {"n_instr": str(total), "sm": "sm_90", "opcodes": opcodes, "derived": derived, "known_const_imm": imm,
            "known_const_module": module}


def counts_of(row):
    sums = ({}, {})
    for out, column in zip(sums, ("opcodes", "derived"), strict=True):
        for name, number in (entry.split(":") for entry in row[column].split(";")):
            out[name] = out.get(name, 0) + int(number)
    return opcodes.counts([sums])[0]


# In the proportions that compilers give: round functions unrolled, hardly a branch.
SHA256 = columns("SHF:1200;LOP3:700;IADD3:430;IMAD:200;ULDC:30;LDC:8;ISETP:4;EXIT:4;STG:2;BRA:1;S2R:1",
                 "maxrun:2560;rot:1100;lop_xor3:420;lop_ch:128;lop_maj:128;imm_big:130;imm_big_distinct:90;n_ctrl:5;"
                 "imad_mov:15;distinct_op:11")
KECCAK = columns("LOP3:2700;SHF:1200;IMAD:20;ULDC:50;LDC:12;ISETP:4;EXIT:2;STG:4;BRA:1;S2R:1",
                 "maxrun:3970;lop_xor2:1250;lop_chi:880;lop_xor3:440;imm_big:40;n_ctrl:3;distinct_op:10")
GEMM = columns("HMMA:512;LDSM:192;LDGSTS:64;IADD3:90;IMAD:80;LEA:40;LOP3:60;SHF:30;ISETP:40;BRA:20;BAR:10;FFMA:64;"
               "FMUL:64;STG:64;S2R:6;EXIT:3;LDC:12;LDGDEPBAR:8;DEPBAR:8",
               "maxrun:210;lop_and:40;n_ctrl:24;imad_mov:30;distinct_op:19;imm_big:4")
SOFTMAX = columns("FADD:80;FMUL:70;MUFU:40;FSETP:30;FMNMX:40;SHFL:20;LDG:32;STG:32;IMAD:40;IADD3:30;ISETP:40;BRA:24;"
                  "EXIT:4;S2R:4;LDC:8;LOP3:10;SHF:10;BSSY:4;BSYNC:4;F2FP:16",
                  "maxrun:60;n_ctrl:36;lop_and:6;imad_mov:10;distinct_op:20")
SORT = columns("ISETP:120;SEL:60;IMAD:110;IADD3:90;LDS:80;STS:80;BAR:20;BRA:60;LOP3:40;SHF:30;LEA:30;ATOMS:16;VOTE:16;"
               "POPC:16;LDG:16;STG:16;S2R:5;EXIT:4;LDC:10;BSSY:12;BSYNC:12",
               "maxrun:50;n_ctrl:88;lop_and:30;imad_mov:30;distinct_op:21")
CRC = columns("LOP3:600;SHF:540;IMAD:300;USHF:100;BRA:40;LDG:30;ISETP:30;ULOP3:60;S2R:3;EXIT:3;LDC:10",
              "lop_chi:532;maxrun:190;n_ctrl:50;imm_big:40;lop_xor2:30;lop_and:20;distinct_op:11")
XORWOW = columns("IMAD:98;IADD3:42;ISETP:20;LOP3:20;STG:11;BRA:8;SEL:8;LDG:6;SHF:6;BSSY:5;BSYNC:5;LEA:4;F2I:2;I2F:2",
                 "maxrun:68;imad_mov:44;n_ctrl:21;lop_xor2:10;imm_big:7;lop_xor3:5;distinct_op:21")
PHILOX = columns("IMAD:44;LOP3:20;IADD3:25;ISETP:11;BRA:9;STG:6;LDG:5;BSSY:4;BSYNC:4;LEA:3;S2R:2;EXIT:1;SHF:1;ULDC:1",
                 "imm_big:40;imm_big_distinct:20;lop_xor3:20;imad_mov:19;n_ctrl:18;maxrun:45;distinct_op:14",
                 "philox:4;sha2iv:2;sha512iv:2")
# A matrix of bits times an index: a word is looked up, masked and added for each bit.
SOBOL = columns("LOP3:134;LDS:66;SHF:64;IMAD:22;ISETP:8;IADD3:7;UMOV:4;BRA:2;STG:1;LDG:1;BAR:1;EXIT:1",
                "lop_xor2:66;lop_and:67;lop_or:1;imad_mov:14;n_ctrl:5;maxrun:242")
# Words of a state are combined, tempered and stored one by one.
TWISTER = columns("LOP3:724;SHF:242;IMAD:263;STG:160;IADD3:83;LDG:80;ISETP:90;SHFL:23;LDS:4;BRA:7",
                  "lop_xor2:320;lop_chi:160;lop_and:163;lop_or:81;imad_mov:19;imm_big:401;n_ctrl:16;maxrun:900")
# Ten rounds of AES out of one table: 16 look-ups each, three of four turned by bytes.
AES_ROUNDS = columns("LDS:164;LOP3:252;SHF:230;IMAD:60;LDG:2;STG:1;ISETP:6;BRA:4;BAR:1;LDC:6;STS:4;S2R:3;EXIT:9",
                     "lop_and:160;lop_xor3:80;lop_xor2:8;lop_or:12;rot:120;imad_mov:20;n_ctrl:8;maxrun:640")
# FNV over a DAG: a product, a word that is read, and a sum by xor.
DAG = columns("IMAD:34;LOP3:22;LDG:10;STG:2;IADD3:3;ISETP:5;BRA:2;LEA:6;S2R:3;MOV:9;LDC:8;EXIT:1",
              "lop_xor2:20;lop_and:1;imad_mov:9;n_ctrl:3;maxrun:70")
# SplitMix64, eight numbers a thread: products of 64 bits, shifts and xors.
SPLITMIX = columns("IMAD:99;LOP3:55;SHF:56;STG:8;ISETP:8;LEA:4;S2R:2;EXIT:2;ULDC:1;IADD3:1;BRA:1",
                   "lop_xor2:48;lop_or:7;imad_mov:2;imm_big:65;imm_big_distinct:6;n_ctrl:3;maxrun:234",
                   "splitmix:6;philox:1")
DATABASE = columns("IMAD:540;SHF:220;LEA:175;BRA:172;ISETP:168;LD:163;LOP3:155;IADD3:93;SEL:44;BSSY:42;BSYNC:42",
                   "n_ctrl:260;imm_big:204;imad_mov:160;lop_xor2:90;lop_and:36;rot:34;lop_xor3:21;maxrun:159",
                   "murmur:5;philox:1")


def test_hashing_is_called_mining_and_models_are_not():
    sha, keccak, *benign = classify([SHA256, KECCAK, GEMM, SOFTMAX, SORT])
    for one in (sha, keccak):
        assert one.label == "mining"
        assert 0 < one.nats <= MIX_NATS_MAX
        assert one.probability > PRIOR
        assert "instruction mix" in one.evidence[0]
    for one in benign:
        assert one.label == "benign"
        assert one.nats == 0  # no innocence: a miner's code may be elsewhere
        assert one.probability < PRIOR


def test_a_shape_names_what_is_suspicious():
    def named(row):
        counts = counts_of(row)
        assert grey_class({}, counts, accused=False, suspicious=False) is None
        found = grey_class({}, counts, accused=True, suspicious=True)
        return found and found[0]
    assert named(CRC) == "crc"
    assert named(XORWOW) == "rng"
    assert named(SOBOL) == named(TWISTER) == "rng"
    assert named(SHA256) is named(KECCAK) is None
    for change in ("lop_xor3:20", "rot:6", "lop_maj:9"):  # what a round needs, and a linear generator does not
        assert named({**SOBOL, "derived": f"{SOBOL['derived']};{change}"}) != "rng"
    assert classify([CRC])[0].label in {"grey:crc", "benign"}


def test_block_ciphers_are_named_by_their_words_and_their_shape_together():
    assert classify([AES_ROUNDS])[0].label == "mining"
    assert classify([{**AES_ROUNDS, "known_const_module": "aes:256"}])[0].label == "grey:cipher"
    # A Groestl has the words too, and ten times the look-ups; rounds of rotates have more of these than look-ups; words
    # of 64 bits, as a Whirlpool's, take two shifts a turn.
    for opcodes_more, derived_more in (("LDS:1500;LOP3:2000", "lop_and:1500"), ("SHF:400", "rot:200"),
                                       ("SHF:150", "rot:0")):
        row = columns(f"{AES_ROUNDS['opcodes']};{opcodes_more}", f"{AES_ROUNDS['derived']};{derived_more}")
        assert grey_class({"aes": 256}, counts_of(row), accused=True, suspicious=False) is None


def test_products_are_not_linear():
    assert classify([DAG])[0].label != "grey:rng"


@pytest.mark.parametrize(("row", "label"), [(PHILOX, "grey:rng"), (SPLITMIX, "grey:rng"),
                                            (DATABASE, "grey:database")])
def test_look_alikes_are_named(row, label):
    (one,) = classify([row])
    assert one.label == label
    assert one.nats == 0
    assert one.probability <= PRIOR + 1e-12


def test_a_table_of_constants_is_named_whatever_the_mix():
    diluted = {**GEMM, "known_const_imm": "sha256k:40;philox:1"}
    (one,) = classify([diluted])
    assert (one.label, one.nats) == ("mining", TABLE_NATS_MAX)
    assert "40 distinct words of SHA-256 round constants" in one.evidence
    (one,) = classify([{**GEMM, "known_const_module": "md5:64;sha1:4"}])
    assert one.label == "cracking"


@pytest.mark.parametrize("name", sorted(TABLES))
def test_fewer_words_of_a_table_are_no_hit(name):
    words = TABLES[name].words_min
    assert words > 5
    assert table_hits({name: words}) == [name]
    assert table_hits({name: words - 1}) == []
    assert classify([{**GEMM, "known_const_imm": f"{name}:{words - 1}"}])[0].label == "benign"


def test_a_few_words_do_not_buy_a_grey_name():
    # SHA-256 with the words of Philox, murmur, CRC-32, ChaCha and AES thrown in: rotates and Ch are not theirs.
    words = "philox:4;splitmix:6;murmur:5;xxhash:5;crc32:200;mt19937:4;chacha:4;aes:200"
    assert classify([{**SHA256, "known_const_imm": words}])[0].label == "mining"
    assert classify([{**SHA256, "known_const_imm": f"sha256k:60;{words}"}])[0].label == "mining"


def test_code_that_is_not_understood_is_refused():
    strange = columns("LOP3:900;SHF:500;UNK123:50", "rot:400")
    (one,) = classify([strange])
    assert (one.label, one.nats, one.probability) == ("unknown", 0.0, PRIOR)
    assert "3.4% of its opcodes are unknown" in one.evidence[0]
    # What it carries is known all the same: PTX has no opcodes of ours at all.
    assert classify([{**strange, "known_const_imm": "sha256k:64"}])[0].label == "mining"
    assert classify([columns("LOP3:970;UNK123:29", "rot:400")])[0].label != "unknown"


def test_short_kernels_are_not_judged():
    (one,) = classify([columns("LOP3:40;SHF:23", "rot:20", "sha256k:30")])
    assert one.label == "unknown"
    assert "63 instructions" in one.evidence[0]


def test_names_are_not_read():
    plain = classify([SHA256, GEMM])
    named = classify([{**SHA256, "kernel": "softmax", "label": "benign", "project": "torch"},
                      {**GEMM, "kernel": "sha256d_mine", "label": "mining", "source_unit": "ethash.cu"}])
    assert plain == named


def test_structs_and_columns_are_judged_alike():
    def struct(row):
        def read(text):
            return {name: int(count) for name, count in (entry.split(":") for entry in text.split(";") if entry)}
        return KernelRow(sm=90, n_instr=int(row["n_instr"]), opcodes=read(row["opcodes"]), derived=read(row["derived"]),
                         known_const_imm=read(row["known_const_imm"]))
    rows = [SHA256, GEMM, PHILOX, CRC]
    assert classify([struct(row) for row in rows]) == classify(rows)


def part(row, kind, first):
    text = dict(entry.split(":") for entry in row["derived"].split(";"))
    return KernelRow(sm=90, part=kind, first_instruction=first, n_instr=int(row["n_instr"]),
                     opcodes={name: int(n) for name, n in (e.split(":") for e in row["opcodes"].split(";"))},
                     derived={name: int(n) for name, n in text.items()})


def test_code_that_never_runs_does_not_hide_a_loop():
    float_code = part(SOFTMAX, "window", 0)
    loop = part(SHA256, "loop", 640)
    opcodes = {name: 400 * n for name, n in float_code.opcodes.items()}
    for name, n in loop.opcodes.items():
        opcodes[name] = opcodes.get(name, 0) + n
    diluted = KernelRow(sm=90, n_instr=sum(opcodes.values()), opcodes=opcodes, derived=loop.derived)
    parts = (float_code, loop, float_code)
    (whole, seen) = classify([diluted, KernelRow(
        sm=90, n_instr=diluted.n_instr, opcodes=opcodes, derived=loop.derived, windows=parts)])
    assert whole.label == "benign"
    assert seen.label == "mining"
    assert any("loop at instruction 640" in text for text in seen.evidence)


def test_many_parts_need_more():
    loop = part(SHA256, "loop", 1)
    benign = part(SOFTMAX, "window", 0)
    def judged(copies):
        row = KernelRow(sm=90, n_instr=benign.n_instr, opcodes=benign.opcodes, derived=benign.derived,
                        windows=(loop, *[benign] * copies))
        return classify([row])[0]
    assert judged(0).score - judged(99).score == pytest.approx(math.log(100), abs=1e-6)


def test_a_kernel_of_which_no_part_hashes_does_not():
    hashing, benign = part(SHA256, "window", 0), part(SOFTMAX, "window", 96)
    def judged(*windows):
        row = KernelRow(sm=90, n_instr=hashing.n_instr, opcodes=hashing.opcodes, derived=hashing.derived,
                        windows=windows)
        return classify([row])[0]
    assert judged().label == judged(*[benign] * 40, hashing).label == "mining"
    assert judged(*[benign] * 40).label == "benign"
    assert judged(*[benign] * 40).score < 0


HOSTILE = [
    {}, {"opcodes": "LOP3:90"}, {**GEMM, "opcodes": ""}, {**GEMM, "opcodes": "a:b;;"}, {**GEMM, "opcodes": ":;:;"},
    {**GEMM, "n_instr": "nan"}, {**GEMM, "n_instr": float("nan")}, {**GEMM, "n_instr": float("inf")},
    {**GEMM, "n_instr": None}, {**GEMM, "n_instr": "-5"}, {**GEMM, "n_instr": "9" * 400}, {**GEMM, "n_instr": "70"},
    {**GEMM, "opcodes": "LOP3:-4"}, {**GEMM, "opcodes": f"LOP3:{'9' * 300}"}, {**GEMM, "opcodes": "LOP3:\u0663"},
    {**GEMM, "opcodes": "LOP3:1e3"}, {**GEMM, "derived": "rot"}, {**GEMM, "derived": None},
    {**GEMM, "opcodes": {"LOP3": float("nan")}}, {**GEMM, "opcodes": {3: 4}}, {**GEMM, "opcodes": 7},
    {**GEMM, "known_const_imm": "sha256k"}, {**GEMM, "opcodes": "LOP3:1;" * 20_000}, None, 3, "LOP3:90", [],
    KernelRow(sm=90, n_instr=100, opcodes={"LOP3": -100}), KernelRow(sm=90),
]


@pytest.mark.parametrize("row", HOSTILE, ids=range(len(HOSTILE)))
def test_rows_that_make_no_sense_are_unknown_with_a_reason(row):
    before, one, after = classify([SHA256, row, GEMM])
    assert (one.label, one.nats, one.probability) == ("unknown", 0.0, PRIOR)
    assert one.evidence[0]
    assert (before.label, after.label) == ("mining", "benign")


def test_counts_beyond_their_kernel_do_no_harm():
    # Derived counts that lie about a kernel are bounded by its length.
    (one,) = classify([columns("LOP3:100", "rot:2147483647;lop_xor3:2147483647;maxrun:2147483647")])
    assert math.isfinite(one.score)
    assert 0 <= one.probability <= 1


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.sampled_from(sorted(GEMM)), st.one_of(
    st.text(max_size=40), st.integers(), st.floats(), st.none(),
    st.lists(st.tuples(st.sampled_from(["LOP3", "SHF", "FFMA", "rot", "sha256k", "", "UNK1"]), st.integers(-3, 10**12)),
             max_size=6).map(lambda some: ";".join(f"{name}:{n}" for name, n in some)))))
def test_any_row_is_answered(changes):
    (one,) = classify([{**GEMM, **changes}])
    assert one.label in {"mining", "cracking", "benign", "unknown"} or one.label.startswith("grey:")
    assert 0 <= one.probability <= 1
    assert 0 <= one.nats <= TABLE_NATS_MAX
    assert one.evidence


def test_the_prior_is_the_callers():
    low, high = (classify([SHA256], prior=prior)[0] for prior in (1e-6, 0.5))
    assert low.probability < high.probability
    assert (low.nats, low.label) == (high.nats, high.label)
    for bad in (0.0, 1.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="a prior of"):
            classify([SHA256], prior=bad)


def test_nothing_in_nothing_out():
    assert classify([]) == []


def test_compiled_and_plain_forms_judge_alike():
    rows = [SHA256, KECCAK, GEMM, SOFTMAX, SORT, CRC, PHILOX, DATABASE]
    assert classify(rows, backend="cpu") == classify(rows, backend="reference")


def test_the_shipped_model_is_sound():
    trained = model()
    trained.forest.check(len(FEATURES))
    for curve in (trained.whole, trained.part):
        assert curve.slope > 0
        assert 0 < curve.accuse_nats < MIX_NATS_MAX


@pytest.mark.skipif(not DATA.is_file(), reason="no table of kernels: GPUGUARD_DATA_DIR is not set")
def test_on_real_kernels():
    # In sample: the figures out of sample are in models/code_forest.md. Here: that what is shipped does what it says.
    with gzip.open(DATA, "rt", newline="") as file:
        rows = [row for row in csv.DictReader(file) if int(row["n_instr"]) >= 64]
    verdicts = classify(rows)
    accused = [row["label"] for row, one in zip(rows, verdicts, strict=True) if one.label in {"mining", "cracking"}]
    hashing = sum(label in {"mining", "cracking"} for label in accused)
    every = sum(row["label"] in {"mining", "cracking"} for row in rows)
    assert hashing / every > 0.85
    assert (len(accused) - hashing) / (len(rows) - every) < 0.01
    grey = [row for row, one in zip(rows, verdicts, strict=True) if one.label.startswith("grey:")]
    assert sum(row["label"] in {"benign", "hard-negative"} for row in grey) > 100


def test_opcodes_named_since_are_not_unknown():
    # A Hopper matrix product of the table, whose maker had no names for these codes: HGMMA, WARPGROUP, HMNMX2.
    (one,) = classify([columns("UNK9f0:64;UNK9c5:40;UNK240:30;R2UR:40;SYNCS:30;BRA:20;FFMA:40;IMAD:30;STSM:16",
                               "n_ctrl:24;maxrun:120;distinct_op:10")])
    assert one.label == "benign"
    (one,) = classify([columns("UNK9f0:64;UNKfff:40;R2UR:40;SYNCS:30;BRA:20;FFMA:40;IMAD:30", "n_ctrl:24;maxrun:120")])
    assert one.label == "unknown"


@pytest.mark.parametrize("tensor", ["HGMMA", "IGMMA", "QGMMA", "UTCHMMA", "UTCQMMA"])
def test_matrix_products_of_later_architectures_are_benign(tensor):
    (one,) = classify([columns(f"{tensor}:64;WARPGROUP:40;LDTM:12;STTM:8;UBLKCP:6;HMNMX2:10;R2UR:40;SYNCS:30;UMOV:60;"
                               "UIADD3:30;BRA:20;BAR:6;FFMA:40;FMUL:30;MUFU:8;IMAD:30;STSM:16;UTMASTG:4;ELECT:4;EXIT:2",
                               "n_ctrl:30;maxrun:110;distinct_op:20;imad_mov:10")])
    assert one.label == "benign"
    assert one.nats == 0
