"""The measurements for a real GPU, end to end against the stand-ins: they may not fail where nobody can mend them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from gpuguard.core.records import Block, DeviceSample, Launches
from gpuguard.recording.reader import read_recording
from gpuguard.sensors.launches.cooperative import LIBRARY

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parent.parent
RUN = ROOT / "benchmarks" / "gpu" / "run.sh"

pytestmark = [
    pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler for the stand-ins"),
    pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="a GPU is here: measure on it instead"),
]


def run(folder: Path, *arguments: str, before: tuple[str, ...] = (), **changed: str) -> str:
    environment = {**os.environ, "GPUGUARD_GPU_BUILD": str(folder), "GPUGUARD_GPU_OUT": str(folder / "results"),
                   "GPUGUARD_GPU_WORK": str(folder), "GPUGUARD_GPU_CARRIED": str(folder), "PYTHON": sys.executable,
                   **changed}
    told = subprocess.run([*before, "sh", str(RUN), *arguments], capture_output=True, text=True, check=False,
                          env=environment, timeout=800)
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
    blocks = recorded(folder)
    samples = [block for block in blocks if isinstance(block, DeviceSample)
               and label["begun_ns"] <= block.time_ns <= label["ended_ns"]]
    assert len(samples) >= 5
    if os.geteuid() == 0 and any(isinstance(block, Launches) for block in blocks):
        pids = {int(row["pid"]) for block in blocks if isinstance(block, Launches) for row in block.rows}
        assert label["pid"] in pids


def recorded(folder: Path, part: str = "*") -> list[Block]:
    return [block for path in sorted((folder / "results" / "record" / "hash").glob(f"{part}.ggrec"))
            for block in read_recording(path)]


@pytest.mark.skipif(os.geteuid() != 0, reason="a user has no probes to lose")
@pytest.mark.skipif(not all(map(shutil.which, ("setpriv", "nsenter", "unshare"))), reason="no util-linux here")
def test_where_no_probe_may_be_placed_programs_tell_of_their_launches(folder):
    if not LIBRARY.exists():
        pytest.skip("this build lacks the shim")
    try:
        subprocess.run(["unshare", "--user", "--map-root-user", "true"], check=True, capture_output=True)
    except subprocess.CalledProcessError:
        pytest.skip("no user namespaces here")
    without = ("setpriv", "--bounding-set", "-bpf,-sys_admin,-perfmon", "--inh-caps", "-all")
    assert run(folder, "record", "--seconds", "4", "--only", "blake3-full", before=without) == "blake3-full: recorded\n"
    label = lines(folder / "results" / "labels.jsonl")[-1]
    rows = [row for block in recorded(folder) if isinstance(block, Launches) for row in block.rows
            if row["pid"] == label["pid"]]
    # The last of them may come when nobody reads any more.
    assert 0 < sum(int(row["launches"]) for row in rows) <= label["said"]["launches"]


def python(folder: Path, code: str) -> subprocess.CompletedProcess[str]:
    """Run some lines beside the scripts, with their environment."""
    told = {**os.environ, "GPUGUARD_GPU_BUILD": str(folder), "GPUGUARD_GPU_OUT": str(folder / "results")}
    return subprocess.run([sys.executable, "-c", code], cwd=RUN.parent, env={**told, "PYTHONPATH": str(ROOT)},
                          capture_output=True, text=True, check=True, timeout=800)


def test_a_workload_that_hangs_is_ended_and_its_label_says_so(folder):
    told = python(folder, """
import json, record
from workloads import Workload
record.SLACK_S = 0
print(json.dumps(record.run(Workload("hung", "hash", "mining", ("sh", "-c", "trap '' TERM; exec sleep 1000")), 0.5)))
""")
    label = json.loads(told.stdout)
    assert label["gap"] == "did not end within 0.5 s"
    assert not Path(f"/proc/{label['pid']}").exists()


def test_a_question_that_hangs_costs_no_other(folder):
    told = python(folder, """
import json, questions
print(json.dumps(questions.ask("stubs_after_start", 0.01)))
""")
    assert json.loads(told.stdout)["gap"] == "no answer within 0 s"


def test_counters_are_recorded_beside_the_daemon_with_gpm(folder):
    python(folder, """
import time, machine, record
from gpuguard.recording.codec import RecordingError
from gpuguard.recording.reader import read_recording

machine.prepare_standins()
where = machine.WORK / "record-hash-1" / "as-root"

def performance():
    try:
        return any(getattr(block, "gpm", None) for block in read_recording(where))
    except (OSError, RecordingError):  # it has just begun
        return False

with record.counters(where):
    until_s = time.monotonic() + 600
    while not performance() and time.monotonic() < until_s:
        time.sleep(0.2)
record.collect()
""")
    samples = [block for block in recorded(folder, "record-hash-1-root-*") if isinstance(block, DeviceSample)]
    assert any(sample.gpm and sample.gpm.integer_ratio == pytest.approx(0.8) for sample in samples)


def test_a_command_that_is_lent_packs_what_it_has_when_its_time_is_over(folder):
    run(folder, "lent", "2", str(folder / "home"), GPUGUARD_GPU_LENT_S="3")
    packed = sorted((folder / "home").iterdir())
    assert [path.name for path in packed] == ["results.tar.gz.00"]
    with tarfile.open(packed[0]) as archive:
        assert "./build.json" in archive.getnames()


def test_wrong_usage_says_what_there_is():
    told = subprocess.run(["sh", str(RUN)], capture_output=True, text=True, check=False)
    assert told.returncode == 2
    assert "questions" in told.stdout
