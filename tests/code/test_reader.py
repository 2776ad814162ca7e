"""The reader that the broker starts: without privileges, where only root may enter the interpreter's folder."""

from __future__ import annotations

import os
import socket
import sys
import time
from pathlib import Path

import pytest

from gpuguard import confine
from gpuguard.code import reader
from gpuguard.code.containers import elf
from gpuguard.code.eye import CodeEye
from gpuguard.code.worker import COMPILED_FROM_BYTES
from gpuguard.confine import NOBODY
from gpuguard.messages import Opened, Refused

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import code_samples as made

root = pytest.mark.skipif(os.geteuid() != 0, reason="only root has privileges to give up")


@pytest.fixture
def started(tmp_path, monkeypatch):
    """A reader whose interpreter nobody but root can reach, and the guard's end of its socket."""
    monkeypatch.setenv("GPUGUARD_STATE_DIR", str(tmp_path / "state"))
    hidden = tmp_path / "hidden"
    hidden.mkdir(mode=0o700)
    place = Path(sys.executable)
    (hidden / "venv").symlink_to(place.parent.parent)
    monkeypatch.setattr("sys.executable", str(hidden / "venv" / place.parent.name / place.name))
    answer, descriptors = reader.grant(NOBODY)
    assert isinstance(answer, Opened), answer
    peer = socket.socket(fileno=descriptors[0])
    yield peer, reader._running[0].pid
    peer.close()
    reader.release()
    assert reader._running == []


def judged(eye: CodeEye, images: dict[str, bytes]) -> dict:
    for name, content in images.items():
        descriptor = os.memfd_create(name)
        os.write(descriptor, content)
        eye.give(name, descriptor)
        os.close(descriptor)
    found, deadline = {}, time.monotonic() + 300
    while len(found) < len(images) and time.monotonic() < deadline:
        found |= {one.sha256: one for one in eye.take()}
        time.sleep(0.05)
    return found


@root
def test_a_reader_without_privileges_judges_small_and_large_images(started):
    peer, pid = started
    own = peer.dup()
    eye = CodeEye(lambda: own)
    hashing = next(path for path in made.CUBINS if path.name == "sha256d.sm_90.cubin").read_bytes()
    cubins = [path.read_bytes() for path in made.CUBINS[:60]]
    library = made.fatbin(*map(made.entry, cubins)) * 3
    assert len(library) > COMPILED_FROM_BYTES
    said = judged(eye, {"small": hashing, "large": library})
    assert {one.reason for one in said.values()} == {""}
    assert any(kernel.label == "mining" for kernel in said["small"].accused)
    assert said["large"].judged == 3 * sum(len(elf.read_cubin(one).kernels) for one in cubins)
    assert confine.left_of(pid) == ""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    assert set(status["Uid"].split()) == set(status["Gid"].split()) == {"65534"}
    assert status["Groups"].strip() == ""
    assert isinstance(reader.grant(NOBODY)[0], Refused), "one reader at a time"
    eye.close()
    eye._thread.join(300)


@root
def test_what_is_on_the_allow_list_of_the_host_is_not_accused(tmp_path, monkeypatch):
    from gpuguard.code import allow, judge
    from gpuguard.code.containers.finding import find_images

    monkeypatch.setenv("GPUGUARD_STATE_DIR", str(tmp_path))
    content = next(path for path in made.CUBINS if path.name == "sha256d.sm_90.cubin").read_bytes()
    kernels = [one for image in find_images(content, "") for some, _ in judge.judge_image(image) for one in some]
    allow.save(allow.default_path(), {one.text_sha256 for one in kernels})
    _, (descriptor,) = reader.grant(NOBODY)
    eye = CodeEye(lambda: socket.socket(fileno=descriptor))
    try:
        assert judged(eye, {"known": content})["known"].accused == ()
    finally:
        eye.close()
        eye._thread.join(300)
        reader.release()


@root
def test_a_reader_ends_with_the_guard(started):
    peer, pid = started
    peer.shutdown(socket.SHUT_RDWR)
    reader.release()
    assert not Path(f"/proc/{pid}").exists()
    reader._running.clear()
