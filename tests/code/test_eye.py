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
    found, deadline = [], time.monotonic() + 300
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
    thread = one._thread
    if thread:
        thread.join(300)
        assert not thread.is_alive()


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
    monkeypatch.setattr(code_eye, "_work", lambda _: None)
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


def test_a_worker_that_ended_is_started_again_with_the_next_image(code_eye, monkeypatch):
    cubin = next(CUBINS.glob("gemm*sm_90*")).read_bytes()
    monkeypatch.setattr("gpuguard.code.scanning.worker_command", lambda _: ["/bin/false"])
    give(code_eye, "first", cubin)
    (said,) = wait_for(code_eye, 1)
    assert (said.judged, "code eye is closed" in said.reason) == (0, True)
    assert code_eye._again_s == 2 * eye.AGAIN_FIRST_S
    monkeypatch.undo()
    code_eye._closed_until_s += 600.0  # however long it took to come here
    give(code_eye, "second", cubin)
    (said,) = wait_for(code_eye, 1)
    assert said.judged == 0, "not at once again"
    code_eye._closed_until_s = 0.0
    for name in ("first", "second"):  # neither was judged
        give(code_eye, name, cubin)
    assert {one.sha256 for one in wait_for(code_eye, 2) if one.judged} == {"first", "second"}
    assert code_eye._again_s == eye.AGAIN_FIRST_S


def test_a_worker_that_nobody_needs_ends_and_comes_again(monkeypatch):
    monkeypatch.setattr(eye, "IDLE_S", 0.2)
    cubin = next(CUBINS.glob("gemm*sm_90*")).read_bytes()
    started = []
    one = CodeEye(lambda: started.append(1))
    for count in (1, 2):
        give(one, f"image-{count}", cubin)
        assert [said.judged > 0 for said in wait_for(one, 1)] == [True]
        deadline = time.monotonic() + 300
        while one._thread is not None and time.monotonic() < deadline:
            time.sleep(0.02)
        assert one._thread is None
        assert len(started) == count
    one.close()
