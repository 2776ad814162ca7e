"""The measurements for a real GPU, end to end against the stand-ins: they may not fail where nobody can mend them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from gpuguard.core.records import DeviceSample, Launches
from gpuguard.recording.reader import read_recording

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parent.parent
RUN = ROOT / "benchmarks" / "gpu" / "run.sh"

pytestmark = [
    pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler for the stand-ins"),
    pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="a GPU is here: measure on it instead"),
]


def run(folder: Path, *arguments: str) -> str:
    environment = {**os.environ, "GPUGUARD_GPU_BUILD": str(folder), "GPUGUARD_GPU_OUT": str(folder / "results"),
                   "GPUGUARD_GPU_WORK": str(folder), "GPUGUARD_GPU_CARRIED": str(folder), "PYTHON": sys.executable}
    told = subprocess.run(["sh", str(RUN), *arguments], capture_output=True, text=True, check=False, env=environment,
                          timeout=800)
    assert told.returncode == 0, told.stdout + told.stderr
    return told.stdout


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    # Not below pytest's own folders: each pytest that starts closes them, and the guard, without rights, reads here.
    with tempfile.TemporaryDirectory(prefix="gpuguard-gpu-") as name:
        made = Path(name)
        made.chmod(0o755)
        assert json.loads(run(made, "build"))["device"] == "stand-in"
        yield made


def test_a_question_is_answered_once_and_says_on_what(folder):
    assert "stubs_after_start: answered" in run(folder, "questions", "--only", "stubs_after_start")
    assert run(folder, "questions", "--only", "stubs_after_start") == ""
    answered, = lines(folder / "results" / "questions.jsonl")
    assert answered["device"] == "stand-in"
    assert answered["answer"]["unchanged"] is True


def test_what_cannot_be_answered_here_is_a_gap(folder):
    run(folder, "questions", "--only", "tensor_types")
    gap = lines(folder / "results" / "questions.jsonl")[-1]
    assert gap["gap"] == "the stand-in multiplies nothing"


@pytest.mark.skipif(os.geteuid() != 0, reason="probes need root")
def test_every_launch_is_seen(folder):
    run(folder, "questions", "--only", "launches_hasher")
    told = lines(folder / "results" / "questions.jsonl")[-1]
    if "gap" in told:
        pytest.skip(told["gap"])
    assert told["answer"]["seen_in_all"] == told["answer"]["said"]["launches"] == 500


def test_a_recording_holds_what_its_labels_say(folder):
    assert run(folder, "record", "--seconds", "4", "--only", "keccak-full") == "keccak-full: recorded\n"
    label, = lines(folder / "results" / "labels.jsonl")
    assert (label["label"], label["family"], label["gap"]) == ("mining", "keccak", "")
    blocks = [block for path in (folder / "results" / "record" / "hash").glob("*.ggrec")
              for block in read_recording(path)]
    samples = [block for block in blocks if isinstance(block, DeviceSample)
               and label["begun_ns"] <= block.time_ns <= label["ended_ns"]]
    assert len(samples) >= 5
    if os.geteuid() == 0 and any(isinstance(block, Launches) for block in blocks):
        pids = {int(row["pid"]) for block in blocks if isinstance(block, Launches) for row in block.rows}
        assert label["pid"] in pids


def test_wrong_usage_says_what_there_is():
    told = subprocess.run(["sh", str(RUN)], capture_output=True, text=True, check=False)
    assert told.returncode == 2
    assert "questions" in told.stdout
