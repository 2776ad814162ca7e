"""A real recording through the guard again: cut into other blocks, cut short, damaged, or made in several runs."""

from __future__ import annotations

import functools
import itertools
import os
import random
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import gpuguard.lab
from gpuguard.core.events import Event
from gpuguard.core.records import Block, Gap, HostInfo, Launches, Packets, Tick
from gpuguard.counters.shipped import shipped_model
from gpuguard.recording.codec import RecordingError, encode_header
from gpuguard.recording.reader import read_recording
from gpuguard.recording.writer import Recorder, recording_files
from gpuguard.replaying import guard_for, replay
from tests.core.builders import BOOT, SECOND, T0

RECORDING = Path(gpuguard.lab.__file__).parent / "recordings" / "incident"
INFO = HostInfo(time_ns=T0, schema_version=1, boot_id=BOOT, hostname="node", clock_ticks_per_s=100)


@functools.cache
def real() -> tuple[Block, ...]:
    return tuple(read_recording(RECORDING))


@functools.cache
def events_of_each() -> tuple[list[Event], ...]:
    guard = guard_for(real()[0])
    return tuple(guard.receive(block) for block in real())


@functools.cache
def expected() -> bytes:
    return judged(real())


def encoded(events: Iterable[Event]) -> bytes:
    return msgspec.json.encode(list(events))


def pieces(block: Block, cuts: list[int]) -> list[Block]:
    """Return a block cut before each of these rows, its facts with their packets."""
    if not isinstance(block, Packets | Launches):
        return [block]
    edges = sorted({0, *cuts, len(block.rows)})
    parts: list[Block] = []
    for start, end in itertools.pairwise(edges):
        rows = block.rows[start:end].copy()
        if isinstance(block, Launches):
            parts.append(Launches(block.time_ns, rows))
            continue
        facts = tuple(msgspec.structs.replace(fact, row=fact.row - start)
                      for fact in block.facts if start <= fact.row < end)
        parts.append(Packets(time_ns=block.time_ns, netns=block.netns, rows=rows, facts=facts))
    return parts or [block]


def cut_anywhere(block: Block, chance: random.Random) -> list[Block]:
    rows = len(block.rows) if isinstance(block, Packets | Launches) else 0
    return pieces(block, [row for row in range(1, rows) if chance.random() < 0.2])


def row_by_row(block: Block) -> list[Block]:
    rows = len(block.rows) if isinstance(block, Packets | Launches) else 0
    return pieces(block, list(range(rows)))


def judged(blocks: Iterable[Block]) -> bytes:
    guard, time_ns, events = None, 0, []
    for block in blocks:
        guard = guard or guard_for(block)
        time_ns = max(time_ns, block.time_ns)
        events += guard.receive(block)
    assert guard is not None
    return encoded(events + guard.close(time_ns))


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 2**32))
def test_cut_anywhere_it_gives_the_same_events(seed: int) -> None:
    chance = random.Random(seed)
    assert judged(part for block in real() for part in cut_anywhere(block, chance)) == expected()


def test_row_by_row_it_gives_the_same_events() -> None:
    assert judged(part for block in real() for part in row_by_row(block)) == expected()


def test_packets_that_follow_each_other_may_be_one_block() -> None:
    joined: list[Block] = []
    for block in real():
        last = joined[-1] if joined else None
        if not (isinstance(block, Packets) and isinstance(last, Packets) and block.netns == last.netns):
            joined.append(block)
            continue
        moved = tuple(msgspec.structs.replace(fact, row=fact.row + len(last.rows)) for fact in block.facts)
        joined[-1] = Packets(time_ns=block.time_ns, netns=block.netns, rows=np.concatenate([last.rows, block.rows]),
                             facts=(*last.facts, *moved))
    assert len(joined) < len(real())
    assert judged(joined) == expected()


@settings(max_examples=25, deadline=None)
@given(st.floats(0, 1))
@example(0.0)
@example(1.0)
def test_cut_at_any_byte_it_replays_up_to_the_cut_and_says_so(share: float) -> None:
    [file] = recording_files(RECORDING)
    whole = file.read_bytes()
    header = len(encode_header())
    cut = header + round(share * (len(whole) - header))
    with TemporaryDirectory() as folder:
        path = Path(folder) / file.name
        path.write_bytes(whole[:cut])
        read = list(read_recording(path))
        got = list(replay(path))
    lost = bool(read) and isinstance(read[-1], Gap) and read[-1].sensor == "recording"
    kept = len(read) - lost
    before = [event for told in events_of_each()[:kept] for event in told]
    assert encoded(got[: len(before)]) == encoded(before)
    assert (cut == len(whole)) == (kept == len(real()))
    gaps = [event for event in got[len(before):] if isinstance(event, Gap)]
    assert [gap.sensor for gap in gaps] == ["recording"] * lost


def test_another_process_with_other_hashes_gives_the_same_events() -> None:
    code = ("import sys, msgspec, gpuguard; "
            "sys.stdout.buffer.write(msgspec.json.encode(list(gpuguard.replay(sys.argv[1]))))")
    for seed in ("1", "2"):
        done = subprocess.run([sys.executable, "-c", code, str(RECORDING)], capture_output=True, check=True,
                              env={**os.environ, "PYTHONHASHSEED": seed})
        assert done.stdout == expected()


def recorded(directory: Path, blocks: list[Block], *, file_bytes_max: int = 1 << 20) -> None:
    recorder = Recorder(directory, file_bytes_max=file_bytes_max, total_bytes_max=1 << 24)
    assert [gap for block in blocks for gap in recorder.write(block)] == []
    assert recorder.close(blocks[-1].time_ns) == []


def test_in_many_files_it_gives_the_same_events(tmp_path: Path) -> None:
    recorded(tmp_path, list(real()), file_bytes_max=24_000)
    assert len(recording_files(tmp_path)) > 2
    assert encoded(replay(tmp_path)) == expected()


def test_each_run_of_a_folder_is_judged_by_its_own_guard_and_settings(tmp_path: Path) -> None:
    recorded(tmp_path, list(real()))
    first = real()[0]
    assert isinstance(first, HostInfo)
    enforcing = {**first.settings, "guard": first.settings["guard"].replace("observe", "enforce")}
    again = [msgspec.structs.replace(first, time_ns=first.time_ns + 1, settings=enforcing), *real()[1:]]
    recorded(tmp_path, again)
    assert encoded(replay(tmp_path)) == (expected()[:-1] + b"," + judged(again)[1:])


def test_a_file_whose_header_is_lost_costs_that_file_only(tmp_path: Path) -> None:
    recorded(tmp_path, [INFO, Tick(time_ns=T0 + SECOND)])
    (tmp_path / "00000002.ggrec").write_bytes(encode_header()[:10])
    (tmp_path / "00000003.ggrec").write_bytes(b"")
    read = list(read_recording(tmp_path))
    assert read[:2] == [INFO, Tick(time_ns=T0 + SECOND)]
    assert [(gap.sensor, gap.reason.split(":")[0]) for gap in read[2:] if isinstance(gap, Gap)] == [
        ("recording", "00000002.ggrec"), ("recording", "00000003.ggrec")]


def test_files_that_are_missing_in_between_are_said(tmp_path: Path) -> None:
    recorded(tmp_path, list(real()), file_bytes_max=24_000)
    recording_files(tmp_path)[1].unlink()
    gaps = [block for block in read_recording(tmp_path) if isinstance(block, Gap) and block.sensor == "recording"]
    assert [gap.reason for gap in gaps] == ["files 2 to 2 are missing"]


@pytest.mark.parametrize("said", [{"guard": "{}x"}, {"guard": '{"mode": "berserk"}'}, {"policy": "[]"},
                                  {"signatures": '{"a": "not a signature"}'}, {"signatures": "7"},
                                  {"guard": '{"alarms_per_gpu_year": -1}'}])
def test_settings_that_cannot_be_used_are_an_error_in_words(tmp_path: Path, said: dict[str, str]) -> None:
    recorded(tmp_path, [msgspec.structs.replace(INFO, settings=said)])
    with pytest.raises(RecordingError, match="settings"):
        list(replay(tmp_path))


def test_counters_judged_by_another_model_are_told_once_and_the_same_one_is_not(tmp_path: Path) -> None:
    def said(digest: str) -> list[str]:
        info = msgspec.structs.replace(INFO, settings={"counter_model": digest})
        recorded(tmp_path, [info, Tick(time_ns=T0 + SECOND), info, Tick(time_ns=T0 + 2 * SECOND)])
        found = [event.reason for event in replay(tmp_path) if isinstance(event, Gap)]
        for path in recording_files(tmp_path):
            path.unlink()
        return found

    assert said(shipped_model().digest) == []
    (reason,) = said("ab" * 32)
    assert "abababababab" in reason
    assert shipped_model().digest[:12] in reason
