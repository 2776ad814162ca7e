"""`gpuguard classify`: recorded launches, what is missing in them, and what they are not."""

from __future__ import annotations

import gzip
import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from gpuguard.cli.commands.classify import command, summarise
from gpuguard.core.records import Launches
from gpuguard.core.subjects import ProcessId
from gpuguard.counters import table, unpacking
from gpuguard.counters.table import Table, Unreadable
from gpuguard.launches import reading
from gpuguard.launches.judging import blocks_of, judge
from gpuguard.launches.reading import BEGIN_NS, read_launches

HEADER = "t_host_us,t_dev_us,dur_us,name,gx,gy,gz,bx,by,bz,shmem,regs,stream,device,launch_api"
DATA = os.environ.get("GPUGUARD_DATA_DIR", "")
TRACES = sorted(Path(DATA, "launches").glob("*.csv.gz")) if DATA else []


def search(name, seconds=6, per_s=50):
    return [f"{i * 1e6 / per_s},,,{name},8192,1,1,128,1,1,0,64,7,0,cudaLaunchKernel" for i in range(seconds * per_s)]


def run(text, tmp_path, *options, packed=False):
    file = tmp_path / ("trace.csv.gz" if packed else "trace.csv")
    raw = text if isinstance(text, bytes) else text.encode()
    file.write_bytes(gzip.compress(raw) if packed else raw)
    return CliRunner().invoke(command, [str(file), *options])


def objects(done):
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return lines[:-1], lines[-1]["summary"]


@pytest.mark.parametrize("packed", [False, True])
def test_a_recorded_search_is_confirmed(tmp_path, packed):
    done = run("\n".join([HEADER, *search("ethash_search")]), tmp_path, "-o", "json", packed=packed)
    windows, summary = objects(done)
    assert done.exit_code == 1
    assert [one["launches"] for one in windows] == [50] * 6
    assert windows[0]["kernels"] == 1
    assert windows[-1]["verdict"] == "confirmed"
    assert (summary["verdict"], summary["label"]) == ("confirmed", "mining")
    assert {one["class"] for one in summary["evidence"]} == {"code", "launch"}
    assert summary["counts"]["confirmed"] >= 3


def test_a_renamed_search_is_not_confirmed_by_its_beat(tmp_path):
    done = run("\n".join([HEADER, *search("step")]), tmp_path, "-o", "json")
    _, summary = objects(done)
    assert done.exit_code == 0
    assert summary["verdict"] == "unknown"


def test_kernels_launched_once_each_are_of_no_known_kind(tmp_path):
    rows = [f"{i * 1000},,,kernel {i},1,1,1,32,1,1,0,64,7,0,cudaLaunchKernel" for i in range(100)]
    windows, summary = objects(run("\n".join([HEADER, *rows]), tmp_path, "-o", "json"))
    assert windows[0]["kernels"] == 100
    assert (summary["verdict"], summary["label"], summary["probability"]) == ("unknown", "", 0.0)


def test_what_is_clear_is_likelier_than_not(tmp_path):
    rows = [f"{i * 1000},,,kernel {i % 20},{i % 20 + 1},1,1,32,1,1,0,64,7,0,cudaLaunchKernel" for i in range(1000)]
    _, summary = objects(run("\n".join([HEADER, *rows]), tmp_path, "-o", "json"))
    assert (summary["verdict"], summary["label"]) == ("clear", "training")
    assert summary["probability"] > 0.9


def test_one_kernel_alone_has_no_entropy_and_no_sign(tmp_path):
    done = run("\n".join([HEADER, *search("step")]), tmp_path, "-o", "json")
    assert '"kernel_entropy_bits":0.0' in done.stdout


def test_columns_may_be_missing(tmp_path):
    text = "t_dev_us,name\n" + "\n".join(f"{i * 20_000},ethash_search" for i in range(300))
    done = run(text, tmp_path, "-o", "json")
    _, summary = objects(done)
    assert summary["verdict"] == "confirmed"
    assert "device times" in summary["gaps"][0]
    nameless = "t_host_us,gx,bx\n" + "\n".join(f"{i * 20_000},8192,128" for i in range(300))
    assert objects(run(nameless, tmp_path, "-o", "json"))[1]["verdict"] == "unknown"


def test_rows_without_use_are_told(tmp_path):
    lines = [HEADER, *search("ethash_search"), "nan,,,x", ",,,x", "5,,,x,wide,1,1", "1e400,,,x", "not,a,row"]
    summary = objects(run("\n".join(lines), tmp_path, "-o", "json"))[1]
    assert summary["gaps"] == ["5 rows without a usable time or geometry were left out"]
    assert summary["verdict"] == "confirmed"


@pytest.mark.parametrize(("text", "reason"), [
    ("a,b\n1,2\n", "neither launches nor counters"),
    ("", "neither launches nor counters"),
    (HEADER, "no launch with a time"),
    (HEADER + "\n,,,x", "no launch with a time"),
    (b"\x7fELF\x02\x01\x01\0\0\0\0", "neither text nor Parquet"),
    (b"\x1f\x8b\x08\0\0\0\0\0", "ends before anything"),
])
def test_what_is_no_recording_is_refused(tmp_path, text, reason):
    done = run(text, tmp_path, "-o", "json")
    assert done.exit_code == 3
    assert reason in done.stderr
    assert reason in json.loads(done.stdout)["summary"]["gaps"][0]


def test_a_file_that_is_not_there(tmp_path):
    done = CliRunner().invoke(command, [str(tmp_path / "none.csv")])
    assert done.exit_code == 3
    assert "No such file" in done.stderr


def test_the_table_is_for_people(tmp_path):
    done = run("\n".join([HEADER, *search("progpow_search")]), tmp_path)
    assert done.exit_code == 1
    assert "confirmed mining" in done.stdout
    assert "launches the kernel progpow_search" in done.stdout


def test_a_line_without_end_is_refused():
    with pytest.raises(Unreadable):
        read_launches(Table(io.StringIO(HEADER + "\n" + '1,,,"' + "x" * 1_000_000)))


@pytest.mark.skipif(not TRACES, reason="GPUGUARD_DATA_DIR is not set: no recorded training to judge")
@pytest.mark.parametrize("path", TRACES, ids=lambda path: path.name[:40])
def test_no_recorded_training_is_accused(path):
    with gzip.open(path, "rt") as lines:
        recorded = read_launches(Table(lines))
    windows, finding = judge(recorded)
    assert finding is None
    summary = summarise(windows, finding, recorded.gaps)
    assert summary.verdict == ("clear" if len(recorded.times_ns) > 1 else "unknown")
    assert all(one.verdict in ("clear", "unknown") for one in windows)


def launches(*rows):
    return "\n".join(["t_host_us,name,gx", *rows])


def test_a_line_that_cannot_be_read_ends_the_recording_and_loses_nothing_before_it(tmp_path):
    rows = [f"{i * 20_000},ethash_search,8192" for i in range(300)]
    for odd in ('7000000,"void f(' + "\n5,6,7" * 20_000, "," * (table.LINE_MAX + 1)):
        done = run(launches(*rows, odd, *rows), tmp_path, "-o", "json")
        windows, summary = objects(done)
        assert sum(one["launches"] for one in windows) == 300
        assert summary["verdict"] == "confirmed"
        assert "what comes after is left out" in summary["gaps"][0]


def test_empty_lines_are_no_rows_and_lines_are_bounded(tmp_path, monkeypatch):
    rows = [f"{i * 20_000},ethash_search,8192\n\n" for i in range(300)]
    windows, summary = objects(run(launches(*rows), tmp_path, "-o", "json"))
    assert (sum(one["launches"] for one in windows), summary["gaps"]) == (300, [])
    monkeypatch.setattr(table, "LINES_MAX", 100)
    windows, summary = objects(run(launches(*rows), tmp_path, "-o", "json"))
    assert sum(one["launches"] for one in windows) == 33
    assert summary["gaps"] == ["line 100: more than 100 lines are not read; what comes after is left out"]


def test_a_device_without_an_end_is_refused(monkeypatch):
    for most, reason in ((unpacking.BYTES_MAX, "neither text nor Parquet"), (1000, "more than 1000 bytes")):
        monkeypatch.setattr(unpacking, "BYTES_MAX", most)
        done = CliRunner().invoke(command, ["/dev/zero"])
        assert done.exit_code == 3
        assert reason in done.stderr


def test_a_line_without_end_in_a_gzip_file_is_refused_before_more_of_it_is_unpacked(tmp_path, monkeypatch):
    asked = []
    some = unpacking.Unpacked._some
    monkeypatch.setattr(unpacking.Unpacked, "_some", lambda self, most: asked.append(most) or some(self, most))
    done = run(HEADER + "\n" + "0" * 30_000_000, tmp_path, packed=True)
    assert done.exit_code == 3
    assert "longer than 1048576" in done.stderr
    assert len(asked) < 1000


@given(st.lists(st.binary(max_size=300), max_size=5), st.booleans(), st.integers(0, 40), st.integers(1, 100))
def test_what_is_unpacked_piece_by_piece_is_the_whole(members, padded, lost, at_once):
    whole = b"".join(map(gzip.compress, [b"first", *members])) + b"\0" * 100 * padded
    held = b"first" + b"".join(members)
    unpacked = unpacking.Unpacked(io.BytesIO(whole[:max(2, len(whole) - lost)]))
    got = b"".join(iter(lambda: unpacked.read(at_once), b""))
    if padded or not lost:
        assert (got, unpacked.cut) == (held, False)
    else:
        assert held.startswith(got)


def test_gzip_that_goes_bad_is_refused_and_one_that_is_still_written_to_is_told():
    whole = gzip.compress(bytes(range(256)) * 100)
    with pytest.raises(Unreadable):
        unpacking.Unpacked(io.BytesIO(whole[:40] + b"bad" + whole[43:])).readall()
    with pytest.raises(Unreadable):
        unpacking.Unpacked(io.BytesIO(whole + b"no member")).readall()
    unpacked = unpacking.Unpacked(io.BytesIO(whole[:-4]))
    assert (unpacked.readall(), unpacked.cut) == (bytes(range(256)) * 100, True)


@pytest.mark.parametrize("number", ["-4", "12.5", "1e30", "4294967296", "nan", "wide"])
def test_a_geometry_that_no_launch_has_is_told(tmp_path, number):
    rows = [f"{i * 20_000},ethash_search,8192.0" for i in range(100)]
    windows, summary = objects(run(launches(*rows, f"5,ethash_search,{number}"), tmp_path, "-o", "json"))
    assert sum(one["launches"] for one in windows) == 100
    assert summary["gaps"] == ["1 rows without a usable time or geometry were left out"]


def test_a_quote_that_stays_open_is_told(tmp_path):
    rows = [f"{i * 20_000},ethash_search,8192" for i in range(100)]
    _, summary = objects(run(launches(*rows[:50], '7,"void f(', *rows[50:]), tmp_path, "-o", "json"))
    assert summary["gaps"] == ["50 lines lie within quotes, as text of a name: launches in them are not seen"]


def test_two_columns_of_one_name_are_refused(tmp_path):
    done = run("t_host_us,name,gx,name\n1,a,1,b", tmp_path)
    assert done.exit_code == 3
    assert "two columns are named name" in done.stderr


def test_different_launches_are_bounded_and_those_beyond_told(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "KINDS_MAX", 50)
    _, summary = objects(run(launches(*(f"{i},kernel {i % 80},1" for i in range(160))), tmp_path, "-o", "json"))
    assert summary["gaps"] == ["60 rows beyond 20000000 or 50 different launches were left out"]


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("coding", ["utf-8", "utf-8-sig", "utf-16"])
def test_launches_are_read_by_the_separator_and_the_coding_they_have(tmp_path, separator, coding):
    text = launches(*(f"{i * 20_000},ethash_search,8192" for i in range(300))).replace(",", separator)
    assert objects(run(text.encode(coding), tmp_path, "-o", "json"))[1]["verdict"] == "confirmed"


@given(st.lists(st.tuples(st.integers(0, 2_000_000), st.integers(0, 5)), min_size=1, max_size=60))
def test_rows_of_an_interval_are_those_of_each_launch_by_itself(launched):
    text = launches(*(f"{at},kernel {which},{which}" for at, which in launched))
    blocks = blocks_of(read_launches(Table(io.StringIO(text))), ProcessId("recorded", 1, 1))
    rows = np.concatenate([one.rows for one in blocks if isinstance(one, Launches)])
    origin = min(at for at, _ in launched)
    for which in {which for _, which in launched}:
        own = rows[rows["grid"][:, 0] == which]
        times = sorted(BEGIN_NS + (at - origin) * 1000 for at, one in launched if one == which)
        assert (own["first_ns"][0], own["last_ns"][-1]) == (times[0], times[-1])
        assert own["launches"].sum() == len(times)
        gaps = np.bincount([int(np.log2(max(gap, 1))) for gap in np.diff(times).tolist()], minlength=40)
        assert own["gaps_log2"].sum(axis=0).tolist() == gaps.tolist()
