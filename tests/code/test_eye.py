"""The daemon's code eye: images in, records out, in the background and bounded."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from gpuguard.code import eye
from gpuguard.code.eye import CodeEye

CUBINS = Path(__file__).parent.parent / "fixtures" / "cubins"


def wait_for(one: CodeEye, count: int) -> list:
    found, deadline = [], time.monotonic() + 60
    while len(found) < count and time.monotonic() < deadline:
        found += one.take()
        time.sleep(0.05)
    return found


def give(one: CodeEye, name: str, content: bytes) -> None:
    descriptor = os.memfd_create(name)
    try:
        os.write(descriptor, content)
        os.lseek(descriptor, 0, os.SEEK_SET)
        one.give(name, descriptor)
    finally:
        os.close(descriptor)


@pytest.fixture
def code_eye():
    one = CodeEye()
    yield one
    one.close()
    if one._thread:
        one._thread.join(20)
        assert not one._thread.is_alive()


def test_hashing_is_accused_a_matrix_product_is_not_and_noise_is_no_verdict(code_eye):
    hashing, product = (next(CUBINS.glob(f"*{word}*sm_90*")) for word in ("sha256d", "gemm"))
    give(code_eye, "hash", hashing.read_bytes())
    give(code_eye, "gemm", product.read_bytes())
    give(code_eye, "hash", hashing.read_bytes())
    give(code_eye, "noise", os.urandom(5_000))
    said = {one.sha256: one for one in wait_for(code_eye, 3)}
    assert set(said) == {"hash", "gemm", "noise"}, "one verdict an image, however often it is loaded"
    assert any(kernel.label == "mining" and kernel.nats > 0 for kernel in said["hash"].accused)
    assert said["gemm"].accused == ()
    assert said["gemm"].judged > 0
    assert said["noise"].judged == 0


def test_what_does_not_fit_is_said_to_be_unjudged(code_eye, monkeypatch):
    monkeypatch.setattr(code_eye, "_work", lambda: None)
    for number in range(eye.WAITING_MAX + 5):
        give(code_eye, f"image-{number}", b"x")
    said = code_eye.take()
    assert len(said) == 5
    assert all("wait already" in one.reason for one in said)


def test_without_a_worker_the_eye_is_closed_and_says_so_of_every_image(code_eye, monkeypatch):
    monkeypatch.setattr("sys.executable", "/nowhere/python")
    give(code_eye, "first", b"x")
    give(code_eye, "second", b"x")
    said = wait_for(code_eye, 2)
    assert [one.sha256 for one in said] == ["first", "second"]
    give(code_eye, "third", b"x")
    said += wait_for(code_eye, 1)
    assert len(said) == 3
    assert all("code eye is closed" in one.reason for one in said)
