"""What was recorded on a real GPU is judged as benchmarks/gpu/verdicts.py wrote it down: no honest workload accused."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from gpuguard.core.records import Device, DeviceSample, Gpm, HostInfo
from gpuguard.recording.writer import Recorder

ROOT = Path(__file__).parent.parent
BOARDS = sorted(path.parent for path in (ROOT / "benchmarks" / "data").glob("*/labels.jsonl"))

spec = importlib.util.spec_from_file_location("gpu_verdicts", ROOT / "benchmarks" / "gpu" / "verdicts.py")
assert spec is not None
assert spec.loader is not None
verdicts = sys.modules["gpu_verdicts"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(verdicts)

SECOND_NS = 1_000_000_000
BEGIN_NS = 1_790_000_000 * SECOND_NS


@pytest.mark.parametrize("board", BOARDS, ids=lambda board: board.name)
def test_a_recorded_board_is_judged_as_written_down(board):
    told = verdicts.verdicts(board)
    assert told
    accused = {name: said for name, said in told.items() if said["label"] != "mining" and verdicts.accused(said)}
    assert accused == {}
    expected = json.loads((board / "expected.json").read_text())
    assert told == expected, f"if this is meant: python benchmarks/gpu/verdicts.py {board}"


def label(name: str, kind: str, begin_s: int, end_s: int, **more: object) -> dict[str, object]:
    return {"name": name, "label": kind, "pid": 7, "begun_ns": BEGIN_NS + begin_s * SECOND_NS,
            "ended_ns": BEGIN_NS + end_s * SECOND_NS, "gap": "", **more}


@pytest.fixture
def board(tmp_path) -> Path:
    """A board that idles for 10 s, then for 10 s computes in integers at a level that never moves, at 10 Hz."""
    recorder = Recorder(tmp_path / "record" / "hash", file_bytes_max=1 << 20, total_bytes_max=1 << 22)
    recorder.write(HostInfo(time_ns=BEGIN_NS, schema_version=1, boot_id="b", hostname="h", clock_ticks_per_s=100))
    recorder.write(Device(time_ns=BEGIN_NS, uuid="GPU-1", index=0, name="NVIDIA H200", power_limit_w=700.0))
    for tick in range(200):
        busy = float(tick >= 100)
        recorder.write(DeviceSample(time_ns=BEGIN_NS + tick * SECOND_NS // 10, uuid="GPU-1", gpu_ratio=busy,
                                    memory_ratio=0.01 * busy, power_w=75 + 400 * busy))
    recorder.close(BEGIN_NS + 20 * SECOND_NS)
    lines = [label("nothing", "idle", 0, 10), label("search", "mining", 10, 20),
             label("failed", "mining", 0, 20, gap="status 1"), label("unseen", "mining", 50, 60)]
    (tmp_path / "labels.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def test_a_stretch_is_what_the_device_showed_while_the_workload_worked(board):
    idle, busy = verdicts.stretches(board)
    assert (idle.label["name"], busy.label["name"]) == ("nothing", "search")
    assert {one.gpu_ratio for one in idle.samples[:-1]} == {0.0}
    assert {one.gpu_ratio for one in busy.samples} == {1.0}
    assert 85 <= len(busy.samples) <= 91


def test_of_a_moment_that_was_seen_twice_what_has_gpm_counts(board):
    recorder = Recorder(board / "record" / "hash-as-root", file_bytes_max=1 << 20, total_bytes_max=1 << 22)
    for tick in range(100, 200):
        recorder.write(DeviceSample(time_ns=BEGIN_NS + tick * SECOND_NS // 10 + 50_000_000, uuid="GPU-1", gpu_ratio=1.0,
                                    gpm=Gpm(100_000_000, integer_ratio=0.9)))
    recorder.close(BEGIN_NS + 20 * SECOND_NS)
    idle, busy = verdicts.stretches(board)
    assert not any(one.gpm for one in idle.samples)
    assert all(one.gpm for one in busy.samples)
    assert 85 <= len(busy.samples) <= 91


def test_a_stretch_that_is_played_on_goes_on_evenly(board):
    _, busy = verdicts.stretches(board)
    device, *samples = verdicts.played(busy, 60 * SECOND_NS)
    assert device.time_ns == samples[0].time_ns
    assert samples[-1].time_ns - samples[0].time_ns >= 59 * SECOND_NS
    assert {after.time_ns - before.time_ns for before, after in pairwise(samples)} == {10**8}


def test_each_workload_has_a_verdict_of_its_own(board):
    told = verdicts.verdicts(board)
    assert set(told) == {"nothing", "search"}
    assert not verdicts.accused(told["nothing"])
    assert told["nothing"]["counters"]["kind"] == "idle"
    assert told["search"]["counters"]["kind"] != "idle"
    assert told["search"]["counters"]["accused_at_once"] is False  # nobody decides in nine seconds


def test_a_board_without_gpm_or_launches_or_with_files_cut_short_has_its_verdicts(board):
    """What the driver or the kernel refused, and what was killed while it wrote."""
    (board / "record" / "mixed").mkdir()
    (board / "record" / "mixed" / "empty.ggrec").touch()
    with (board / "labels.jsonl").open("a") as labels:
        labels.write('{"name": "cut of')
    assert set(verdicts.verdicts(board)) == {"nothing", "search"}
    recording, = (board / "record" / "hash").glob("*.ggrec")
    recording.write_bytes(recording.read_bytes()[:-40])
    assert "nothing" in verdicts.verdicts(board)


def test_a_board_of_which_no_counters_were_recorded_is_not_kept(board, monkeypatch):
    shutil.rmtree(board / "record")
    monkeypatch.setattr(sys, "argv", ["verdicts.py", str(board)])
    with pytest.raises(SystemExit, match="no counters were recorded of nothing, search, unseen"):
        verdicts.main()
    assert not (board / "expected.json").exists()


def test_results_of_a_board_are_kept_under_its_name(board, tmp_path, monkeypatch):
    monkeypatch.setattr(verdicts, "DATA", tmp_path / "data")
    results = tmp_path / "results"
    shutil.copytree(board / "record", results / "record")
    (results / "labels.jsonl").write_text("")
    (results / "results.tar.gz").write_bytes(b"packed")
    machine = {"device": "NVIDIA H200", "gpu": {"driver_version": "580.159.04"}, "date": "2026-11-22"}
    (results / "machine.json").write_text(json.dumps(machine))
    kept = verdicts.keep(results)
    assert kept.name == "nvidia-h200-580.159.04-2026-11-22"
    assert {path.name for path in kept.rglob("*") if path.is_file()} == {"labels.jsonl", "machine.json",
                                                                        "00000001.ggrec"}
    (results / "machine.json").write_text(json.dumps(machine | {"device": "stand-in"}))
    with pytest.raises(ValueError, match="stand-ins"):
        verdicts.keep(results)
