"""Signatures: what is shipped holds, and what does not prove itself is refused."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuguard.core.signatures import SignatureError, base_name, lock_of, parse_signature, parse_signatures
from gpuguard.signature_files import LOCK, main, read_texts, shipped

FOLDER = Path(__file__).parents[2] / "signatures"
GOOD = """
id = "one"
version = 3
kind = "kernel-name"
label = "mining"
family = "test"
maturity = "test"
nats = 4.0
why = "because"
references = ["here"]
[match]
names = ["find_nonce"]
[[samples]]
matches = true
what = "mangled"
name = "_Z10find_noncePj"
[[samples]]
matches = false
what = "other"
name = "find_nonces"
"""


def test_every_shipped_signature_is_locked_and_proves_itself():
    texts = read_texts(FOLDER)
    signatures = parse_signatures(texts, (FOLDER / LOCK).read_text())
    assert [one.id for one in signatures] == sorted(texts)
    assert len(signatures) >= 17
    assert signatures == shipped()
    assert (FOLDER / LOCK).read_text() == lock_of(texts)


def test_no_name_confirms_alone():
    # The usual threshold is ln(31557600 / 0.1) = 19.6 nats.
    assert all(one.nats < 19 for one in shipped())


@pytest.mark.parametrize(("mangled", "base"), [
    ("_Z13ethash_searchPV14Search_resultsm", "ethash_search"),
    ("_ZN2at6native29vectorized_elementwise_kernelILi4EEEviT_", "vectorized_elementwise_kernel"),
    ("void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>>(int)",
     "vectorized_elementwise_kernel"),
    ("void at::native::(anonymous namespace)::CatArrayBatchedCopy<int>(int*)", "CatArrayBatchedCopy"),
    ("ncclDevKernel_AllReduce_RING_LL(ncclDevComm*, unsigned long)", "ncclDevKernel_AllReduce_RING_LL"),
    ("ethash_search", "ethash_search"),
    ("", ""),
    ("_Z", "_Z"),
    ("_Z9999x", "x"),
])
def test_base_names(mangled, base):
    assert base_name(mangled) == base


@given(st.text(max_size=200))
def test_any_text_has_a_base_name(name):
    assert len(base_name(name)) <= len(name)
    assert len(base_name("_ZN" + name)) <= len(name) + 3


@pytest.mark.parametrize(("change", "complaint"), [
    (('name = "_Z10find_noncePj"', 'name = "other"'), "misses its sample 'mangled'"),
    (('name = "find_nonces"', 'name = "find_nonce"'), "wrongly matches its sample 'other'"),
    (("matches = true", "matches = false"), "lacks a sample that it must match"),
    (("matches = false", "matches = true"), "lacks a sample that it must not match"),
    (('id = "one"', 'id = "two"'), "not named like its file"),
    (("nats = 4.0", "nats = 400.0"), "must weigh"),
    (("nats = 4.0", "nats = -1.0"), "must weigh"),
    (('label = "mining"', 'label = "evil"'), "no label evil"),
    (('maturity = "test"', 'maturity = "stable"'), "a name and cannot be stable"),
    (('names = ["find_nonce"]', ""), "binds nothing"),
    (('names = ["find_nonce"]', 'names = ["find_nonce", ""]'), "empty name"),
    (('references = ["here"]', "references = []"), "no reference"),
    (("version = 3", 'version = 3\nrun = "rm -rf"'), "unknown field"),
    (("version = 3", "version = "), "Invalid"),
])
def test_what_does_not_prove_itself_is_refused(change, complaint):
    assert parse_signature(GOOD, "one").version == 3
    with pytest.raises(SignatureError, match=complaint):
        parse_signature(GOOD.replace(*change), "one")


def test_a_digest_must_be_one():
    text = GOOD.replace("kernel-name", "code-sha256").replace('names = ["find_nonce"]', 'sha256 = ["AB"]')
    with pytest.raises(SignatureError, match="64 lower-case hex digits"):
        parse_signature(text, "one")


def test_the_lock_holds_every_file_to_its_bytes():
    lock = lock_of({"one": GOOD})
    assert hashlib.sha256(GOOD.encode()).hexdigest() in lock
    assert [one.id for one in parse_signatures({"one": GOOD}, lock)] == ["one"]
    with pytest.raises(SignatureError, match="not the file that was locked"):
        parse_signatures({"one": GOOD + "\n"}, lock)
    with pytest.raises(SignatureError, match="differ: two"):
        parse_signatures({"one": GOOD, "two": GOOD}, lock)
    with pytest.raises(SignatureError, match="locked 4"):
        parse_signatures({"one": GOOD}, lock.replace("version = 3", "version = 4"))
    with pytest.raises(SignatureError, match=r"signatures\.lock"):
        parse_signatures({"one": GOOD}, "one = 1")


def test_the_lock_is_written(tmp_path):
    (tmp_path / "one.toml").write_text(GOOD)
    main(str(tmp_path))
    assert parse_signatures(read_texts(tmp_path), (tmp_path / LOCK).read_text())[0].id == "one"
    (tmp_path / "two.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(SignatureError, match=r"two\.toml"):
        main(str(tmp_path))
