"""Recorded counters are read whatever their columns and rate; what is hostile ends in one named error."""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuguard.cli.commands import classify
from gpuguard.core.detectors.counters import Detector
from gpuguard.core.host import Host
from gpuguard.core.records import Device, DeviceSample
from gpuguard.counters import reading
from gpuguard.counters.reading import blocks_of, power_limit_w, read_csv
from gpuguard.counters.shipped import shipped_model
from gpuguard.counters.table import Table, Unreadable
from gpuguard.lab import telemetry

HEADER = ["timestamp", "gpu", "gpu_model", "power_w", "mem_used_mib", "mem_total_mib", "gpu_util_pct", "mem_util_pct",
          "sm_active", "tensor_active", "dram_active", "fp16_active", "pcie_tx_bytes_s", "pcie_rx_bytes_s",
          "nvlink_tx_bytes_s", "nvlink_rx_bytes_s"]
FULL = [*HEADER, "int_active", "fp32_active", "fp64_active", "sm_occupancy", "hmma_active", "imma_active"]


def row(gpu, sample, memory_bytes):
    gpm = sample.gpm
    return [sample.time_ns / 1e9, gpu, "NVIDIA H100 80GB HBM3", sample.power_w, sample.memory_used_bytes / 2**20,
            memory_bytes / 2**20, 100 * sample.gpu_ratio, 100 * sample.memory_ratio, gpm.sm_ratio, gpm.tensor_ratio,
            gpm.dram_ratio, gpm.fp16_ratio, sample.pcie_tx_bytes_per_s, sample.pcie_rx_bytes_per_s,
            sample.nvlink_tx_bytes_per_s, sample.nvlink_rx_bytes_per_s, gpm.integer_ratio, gpm.fp32_ratio,
            gpm.fp64_ratio, gpm.occupancy_ratio, gpm.tensor_hmma_ratio, gpm.tensor_imma_ratio]


def text_of(workloads, seconds, *, seed=1, columns=FULL, rate_hz=1.0):
    """Return CSV of one simulated device a workload."""
    out, random = io.StringIO(), np.random.default_rng(seed)
    writer = csv.writer(out)
    writer.writerow(columns)
    for gpu, workload in enumerate(workloads):
        trace = telemetry.simulate(workload, telemetry.BOARDS[0], seconds, random, rate_hz=rate_hz)
        for sample in telemetry.samples(trace, str(gpu), 1_775_000_000_000_000_000):
            writer.writerow(row(gpu, sample, trace.board.memory_bytes)[:len(columns)])
    return out.getvalue()


def run(path, *options):
    result = CliRunner().invoke(classify.command, [str(path), "-o", "json", *options])
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    return result.exit_code, lines[:-1], lines[-1]["summary"]


def workload(name):
    return next(one for one in telemetry.MINERS + telemetry.BENIGN if one.name == name)


def test_each_device_is_told_and_the_miner_is_found(tmp_path):
    path = tmp_path / "t.csv.gz"
    path.write_bytes(gzip.compress(text_of([workload("ddp"), workload("kheavyhash"), workload("idle")], 1800).encode()))
    status, lines, summary = run(path)
    assert status == 1
    by_device = {line["device"]: line for line in lines}
    assert set(by_device) == {"0", "1", "2"}
    assert (by_device["0"]["kind"], by_device["0"]["verdict"]) == ("training", "clear")
    assert (by_device["1"]["kind"], by_device["1"]["family"], by_device["1"]["verdict"]) == (
        "mining", "integer", "suspect")
    assert (by_device["2"]["kind"], by_device["2"]["verdict"]) == ("idle", "clear")
    assert (summary["verdict"], summary["label"]) == ("suspect", "mining")
    assert summary["evidence"]
    assert 0 < summary["probability"] < 1


def test_the_probability_of_honest_work_is_what_its_looks_have_and_not_how_many_there_are(tmp_path):
    text = text_of([workload("ddp")], 600, seed=2)
    (tmp_path / "t.csv").write_text(text)
    _, (line,), _ = run(tmp_path / "t.csv")
    assert (line["kind"], line["share"]) == ("training", 1.0)
    model, detector, host, likeness = shipped_model(), Detector(), Host(), []
    detector.judge_by(model, 10.0)
    for block in blocks_of(read_csv(Table(io.StringIO(text)))):
        host.receive(block)
        before = detector.looks.get("0")
        detector.receive(block, host)
        if detector.looks.get("0") is not before:
            likeness.append(detector.looks.get("0").probabilities[model.classes.index("training")])
    assert line["probability"] == pytest.approx(sum(likeness) / len(likeness), abs=1e-6)
    assert 0.5 < line["probability"] < 1


def test_an_episode_ends_where_the_work_changes(tmp_path):
    first, then = (text_of([workload(name)], 900).splitlines() for name in ("ddp", "kheavyhash"))
    later = [line.replace("17750", "17751", 1) for line in then[1:]]
    (tmp_path / "t.csv").write_text("\n".join([*first, *later]))
    _, lines, _ = run(tmp_path / "t.csv")
    assert [line["kind"] for line in lines if line["looks"] > 5] == ["training", "mining"]
    assert lines[-1]["start_s"] > 800


def test_without_the_pipes_it_says_what_it_could_not_see(tmp_path):
    (tmp_path / "t.csv").write_text(text_of([workload("kheavyhash")], 300, columns=HEADER))
    _, _, summary = run(tmp_path / "t.csv")
    assert any("integer pipe" in gap for gap in summary["gaps"])


def test_too_little_for_one_look_is_unknown_and_said(tmp_path):
    (tmp_path / "t.csv").write_text(text_of([workload("ddp")], 5))
    status, lines, summary = run(tmp_path / "t.csv")
    assert (status, lines[0]["verdict"], summary["verdict"]) == (0, "unknown", "unknown")
    assert any("too few samples" in gap for gap in summary["gaps"])


@pytest.mark.parametrize(("text", "said"), [
    ("timestamp,foo,bar\n1,2,3\n", "neither launches nor counters"),
    ("power_w,sm_active\n1,0.5\n", "no column of times"),
    ("timestamp,power_w,sm_active\nx,1,2\n", "no row with a time"),
    ("timestamp,power_w,sm_active\n" + '"' + "x" * 200_000, "field larger"),
    ("", "neither launches nor counters"),
    ("timestamp,power_w,sm_active\n6.4e18,1,2\n1e19,1,2\n1e300,1,2\n", "no row with a time"),
    ("timestamp,power_w,sm_active" + ",x" * 5_000 + "\n1,2,3\n", "columns"),
])
def test_what_cannot_be_read_is_said(tmp_path, text, said):
    (tmp_path / "t.csv").write_text(text)
    result = CliRunner().invoke(classify.command, [str(tmp_path / "t.csv"), "-o", "json"])
    assert result.exit_code == 3
    assert said in result.stderr
    assert json.loads(result.stdout.splitlines()[-1])["summary"]["verdict"] == "unknown"


def test_parquet_is_read_or_asked_for_by_name(tmp_path):
    path = tmp_path / "t.parquet"
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError:
        path.write_bytes(b"PAR1" + bytes(100))
        result = CliRunner().invoke(classify.command, [str(path)])
        assert result.exit_code == 3
        assert "gpuguard[parquet]" in result.stderr
        return
    table = list(csv.reader(io.StringIO(text_of([workload("ddp")], 600))))
    columns = {name: [one if name == "gpu_model" else float(one) for one in column]
               for name, *column in zip(*table, strict=True)}
    parquet.write_table(pa.table(columns), path)
    status, lines, _ = run(path)
    assert (status, lines[0]["kind"]) == (0, "training")
    path.write_bytes(b"PAR1" + bytes(100))
    assert CliRunner().invoke(classify.command, [str(path)]).exit_code == 3


@pytest.mark.parametrize("written", [
    lambda text: text.replace(",", ";").encode(),
    lambda text: text.replace(",", "\t").replace("\r\n", "\n").encode(),
    lambda text: text.encode("utf-16"),
    lambda text: text.encode("utf-8-sig"),
    lambda text: gzip.compress(text.encode()),
    lambda text: gzip.compress(text[:999].encode()) + gzip.compress(text[999:].encode()) + bytes(99_999),
])
def test_however_it_was_written_the_same_is_read(tmp_path, written):
    text = text_of([workload("ddp")], 300)
    (tmp_path / "plain.csv").write_text(text)
    (tmp_path / "t.csv").write_bytes(written(text))
    assert run(tmp_path / "t.csv") == run(tmp_path / "plain.csv")


def test_a_gzip_file_that_is_still_written_to_is_read_as_far_as_it_goes(tmp_path):
    (tmp_path / "t.csv.gz").write_bytes(gzip.compress(text_of([workload("ddp")], 600).encode())[:-2000])
    status, lines, summary = run(tmp_path / "t.csv.gz")
    assert (status, lines[0]["kind"]) == (0, "training")
    assert any("gzip file is cut short" in gap for gap in summary["gaps"])


def test_a_gzip_file_of_which_a_byte_is_wrong_is_refused(tmp_path):
    raw = bytearray(gzip.compress(text_of([workload("ddp")], 100).encode()))
    raw[-6] ^= 1
    (tmp_path / "t.csv.gz").write_bytes(raw)
    assert run(tmp_path / "t.csv.gz")[0] == 3


def test_activities_as_per_cent_are_read_as_such():
    columns = ("sm_active", "fp32_active", "tensor_active")
    ratios = np.random.default_rng(1).uniform(0, [1, 0.009, 0], (50, 3))
    read = []
    for scale in (1, 100):
        rows = [",".join(map(str, [i, *(scale * row)])) for i, row in enumerate(ratios)]
        read.append(read_csv(Table(io.StringIO("\n".join([",".join(["timestamp", *columns]), *rows])))))
    for name, values in read[0].fields.items():
        np.testing.assert_allclose(read[1].fields[name], values)
    assert not any("per cent" in gap for gap in read[0].gaps)
    assert any("per cent" in gap for gap in read[1].gaps)


def test_one_activity_that_cannot_be_is_not_per_cent():
    rows = "".join(f"{i},{90 if i == 3 else 0.5}\n" for i in range(9))
    told = read_csv(Table(io.StringIO("timestamp,sm_active\n" + rows)))
    assert told.fields["sm_ratio"].max() == 90
    assert sum(one.gpm is None for one in blocks_of(told) if isinstance(one, DeviceSample)) == 1


def test_records_are_the_same_however_many_are_made_at_once(monkeypatch):
    told = read_csv(Table(io.StringIO(text_of([workload("ddp"), workload("ethash")], 30))))
    whole = list(blocks_of(told))
    monkeypatch.setattr(reading, "ROWS_AT_ONCE", 7)
    assert list(blocks_of(told)) == whole
    assert len(whole) == 62


def test_times_are_told_apart_by_their_size():
    for value, want in (("1775000000.5", 1_775_000_000_500_000_000), ("1775000000500", 1_775_000_000_500_000_000),
                        ("1775000000500000000", 1_775_000_000_500_000_000),
                        ("2026-04-01T00:00:00+00:00", 1_775_001_600_000_000_000), ("0.5", 500_000_000)):
        assert reading._time(value) == pytest.approx(want, abs=1000)
    assert reading._time("nan") is None
    assert reading._time("-5") is None
    for far in ("0001-01-01", "1969-12-31T23:59:59", "2400-01-01", "9999-12-31T23:59:59-14:00"):
        assert reading._time(far) is None


def test_devices_and_rows_are_bounded(monkeypatch):
    monkeypatch.setattr(reading, "ROWS_MAX", 50)
    text = "timestamp,gpu,power_w,sm_active\n" + "".join(f"{i},{i % 7},1,0.5\n" for i in range(90))
    assert len(read_csv(Table(io.StringIO(text))).time_ns) == 50
    monkeypatch.setattr(reading, "DEVICES_MAX", 3)
    told = read_csv(Table(io.StringIO(text)))
    assert told.names == ["0", "1", "2"]
    assert any("devices beyond" in gap for gap in told.gaps)
    monkeypatch.setattr(reading, "VALUES_MAX", 60)
    told = read_csv(Table(io.StringIO(text)))
    assert (len(told.time_ns), told.fields.keys()) == (30, {"power_w", "sm_ratio"}), "of two columns"
    assert any("rows beyond the first 30" in gap for gap in told.gaps)


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=400) | st.lists(
    st.lists(st.sampled_from(["timestamp", "gpu", "power_w", "sm_active", "pcie_rx_bytes_s", "1e309", "-1", "nan", "",
                              "99999999999999999999", "0.5", "1775000000", "2026-01-01", "x\0", '"']), max_size=6),
    max_size=12).map(lambda rows: "\n".join(",".join(row) for row in rows)))
def test_any_text_is_read_or_refused_by_name(text):
    try:
        told = read_csv(Table(io.StringIO(text)))
    except Unreadable:
        return
    for block in blocks_of(told):
        assert block.time_ns >= 0
        for value in (getattr(block, "power_w", None), getattr(block, "gpu_ratio", None)):
            assert value is None or (value >= 0 and not math.isinf(value))


DATA = Path(os.environ.get("GPUGUARD_DATA_DIR", "/nonexistent")) / "telemetry"


@pytest.mark.skipif(not DATA.exists(), reason="GPUGUARD_DATA_DIR has no telemetry")
@pytest.mark.parametrize(("name", "kinds"), [
    ("t2", {"training"}), ("i4", {"inference", "training", "unknown"}), ("b1", {"idle"})])
def test_real_h100_work_is_not_suspect(name, kinds):
    status, lines, summary = run(DATA / f"h100-{name}.csv.gz")
    assert (status, summary["verdict"] in ("clear", "unknown")) == (0, True)
    assert {line["device"] for line in lines} == {str(i) for i in range(8)}
    assert all(line["verdict"] in ("clear", "unknown") for line in lines)
    assert {line["kind"] for line in lines} <= kinds


@pytest.mark.parametrize("values", ["nan,nan", "-300,-0.5", ",", "1e300,1e300", "N/A,[N/A]"])
def test_a_device_of_which_nothing_is_told_is_unknown_and_not_idle(tmp_path, values):
    rows = "".join(f"{1_700_000_000 + second},0,{values}\n" for second in range(120))
    (tmp_path / "t.csv").write_text("timestamp,gpu,power_w,sm_active\n" + rows)
    status, lines, summary = run(tmp_path / "t.csv")
    assert (status, summary["verdict"], summary["probability"]) == (0, "unknown", 0.0)
    assert {line["kind"] for line in lines} == {"unknown"}
    assert any("whether anything ran" in gap for gap in summary["gaps"])


def test_no_sm_at_work_beside_kernels_that_run_is_unknown_and_a_gap(tmp_path):
    path = tmp_path / "telemetry.csv"
    path.write_text("timestamp,gpu,sm_active,gpu_util_pct,power_w\n" + "".join(
        f"{t},{gpu},0,{100 * gpu},{400 if gpu else 75}\n" for t in range(300) for gpu in (0, 1)))
    status, lines, summary = run(path)
    assert [(line["device"], line["kind"], line["verdict"]) for line in lines] == [
        ("0", "idle", "clear"), ("1", "unknown", "unknown")]
    assert (status, [gap for gap in summary["gaps"] if gap.startswith("1: no SM was active")]) == (
        0, summary["gaps"][-1:])


def test_power_alone_does_not_clear_a_device(tmp_path):
    rows = "".join(f"{1_700_000_000 + second},0,650\n" for second in range(1200))
    (tmp_path / "t.csv").write_text("timestamp,gpu,power_w\n" + rows)
    result = CliRunner().invoke(classify.command, [str(tmp_path / "t.csv"), "-o", "json"])
    assert json.loads(result.stdout.splitlines()[-1])["summary"]["counts"] == {"unknown": 1}
    assert "clear" not in result.stdout


@pytest.mark.parametrize("header", [
    "timestamp, index, name, utilization.gpu [%], power.draw [W], memory.used [MiB], memory.total [MiB]",
    "\ufefftimestamp,gpu,modelName,DCGM_FI_DEV_GPU_UTIL,DCGM_FI_DEV_POWER_USAGE,DCGM_FI_DEV_FB_USED,mem_total_mib",
    "timestamp,gpu,modelName,DCGM_FI_DEV_GPU_UTIL_RATIO,DCGM_FI_DEV_BOARD_POWER_WATTS,DCGM_FI_DEV_FB_USED,mem_total_mib",
])
def test_what_the_vendors_tools_write_is_read_as_it_is(tmp_path, header):
    rows = "".join(f"2026/01/01 00:{second // 60:02d}:{second % 60:02d}.250, 3, NVIDIA H100, 99 %, 300.5 W, 1024 MiB, "
                   "81559 MiB\n" for second in range(120))
    samples = [one for one in blocks_of(read_csv(Table(io.StringIO(f"{header.lstrip(chr(0xfeff))}\n{rows}"))))
               if isinstance(one, DeviceSample)]
    assert (samples[0].uuid, samples[0].gpu_ratio, samples[0].power_w, samples[0].memory_used_bytes) == (
        "3", pytest.approx(0.99), 300.5, 2**30)
    (tmp_path / "t.csv").write_text(f"{header}\n{rows}")
    _, lines, _ = run(tmp_path / "t.csv")
    assert [line["looks"] for line in lines] == [5]


def test_pipes_are_read_under_the_old_and_the_new_names_of_dcgm():
    old = ("SM_ACTIVE", "PIPE_INT_ACTIVE", "PIPE_TENSOR_ACTIVE", "PIPE_TENSOR_IMMA_ACTIVE", "DRAM_ACTIVE")
    new = ("SM_UTIL_RATIO", "INT_UTIL_RATIO", "TENSOR_UTIL_RATIO", "IMMA_UTIL_RATIO", "DRAM_UTIL_RATIO")

    def fields(names):
        header = ",".join(("timestamp", "gpu", *(f"DCGM_FI_PROF_{name}" for name in names)))
        return read_csv(Table(io.StringIO(f"{header}\n1700000000,0,0.9,0.7,0.1,0.05,0.3\n"))).fields

    assert fields(old) == fields(new)
    assert {name: values.tolist() for name, values in fields(new).items()} == {
        "sm_ratio": [0.9], "integer_ratio": [0.7], "tensor_ratio": [0.1], "tensor_imma_ratio": [0.05],
        "dram_ratio": [0.3]}


def test_the_engines_time_stands_for_utilisation_where_that_is_not_told():
    header = "timestamp,gpu,DCGM_FI_PROF_GR_ENGINE_ACTIVE,power.draw.instant [W],enforced.power.limit [W]"
    fields = read_csv(Table(io.StringIO(f"{header}\n1700000000,0,0.93,301.5 W,700.00 W\n"))).fields
    assert {name: values.tolist() for name, values in fields.items()} == {
        "gpu_ratio": [0.93], "power_w": [301.5], "power_limit_w": [700.0]}


@pytest.mark.parametrize(("header", "values", "mib"), [
    ("DCGM_FI_DEV_FB_FREE,DCGM_FI_DEV_FB_USED", "15000,360", 15360),
    ("DCGM_FI_DEV_FB_FREE,DCGM_FI_DEV_FB_USED,DCGM_FI_DEV_FB_RESERVED", "15000,360,640", 16000),
    ("memory.used [MiB],memory.free [MiB],memory.reserved [MiB]", "360 MiB,15000 MiB,640 MiB", 16000),
    ("memory.used [MiB],memory.free [MiB],memory.total [MiB]", "360 MiB,15000 MiB,16384 MiB", 16384),
    ("DCGM_FI_DEV_FB_FREE,DCGM_FI_DEV_GPU_UTIL", "15000,90", None),
    ("DCGM_FI_DEV_FB_FREE,DCGM_FI_DEV_FB_USED", "1e18,360", None),
    ("DCGM_FI_DEV_FB_FREE,DCGM_FI_DEV_FB_USED", "nan,-1", None),
])
def test_a_boards_memory_is_what_is_used_free_and_kept_back_where_nothing_tells_it(header, values, mib):
    told = next(blocks_of(read_csv(Table(io.StringIO(f"timestamp,gpu,{header}\n1700000000,0,{values}\n")))))
    assert isinstance(told, Device)
    assert told.memory_bytes == (None if mib is None else mib * 2**20)


@pytest.mark.parametrize(("model", "watts"), [
    ("NVIDIA A100-SXM4-80GB", 400), ("A100-SXM-80GB", 400), ("NVIDIA A100-PCIE-40GB", 250),
    ("NVIDIA A100 80GB PCIe", 300), ("NVIDIA A10", 150), ("NVIDIA A10G", 300), ("NVIDIA L4", 72),
    ("NVIDIA L40S", 350), ("Tesla T4", 70), ("NVIDIA H100 PCIe", 350),
    ("NVIDIA H100 80GB HBM3", 700), ("NVIDIA H200 NVL", 600), ("Tesla V100-SXM2-16GB", 300),
    ("NVIDIA GeForce RTX 4090", 450), ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
    ("NVIDIA GeForce RTX 3090 Ti", None), ("NVIDIA A100X", None), ("", None),
])
def test_a_board_that_tells_no_limit_has_that_of_its_data_sheet(model, watts):
    assert power_limit_w(model) == watts


def test_a_name_in_a_file_cannot_write_to_the_terminal(tmp_path):
    rows = "".join(f"{1_700_000_000 + second},\x1b[2J\u202e,300,0.5\n" for second in range(120))
    (tmp_path / "t.csv").write_text("timestamp,gpu,power_w,sm_active\n" + rows)
    result = CliRunner().invoke(classify.command, [str(tmp_path / "t.csv")], color=True)
    assert "\x1b" not in result.stdout
    assert "\u202e" not in result.stdout


def test_odd_parquet_is_read_or_refused_in_words(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    def said(times, names=("timestamp", "power_w", "sm_active")):
        columns = [times, pa.array([300.0] * len(times)), pa.array([0.5] * len(times))]
        parquet.write_table(pa.Table.from_arrays(columns, names=list(names)), tmp_path / "t.parquet")
        return reading.read_parquet((tmp_path / "t.parquet").read_bytes())

    exact = [1_700_000_000_000_000_001 + second * 10**9 for second in range(60)]
    assert len(said(pa.array(exact, pa.timestamp("ns"))).time_ns) == 60
    assert len(said(pa.array(exact, pa.timestamp("ns", "Asia/Tokyo"))).time_ns) == 60
    with pytest.raises(Unreadable, match="out of range"):
        said(pa.array([2**52] * 60, pa.timestamp("ms")))
    with pytest.raises(Unreadable, match="two columns"):
        said(pa.array(exact), ("timestamp", "power_w", "power_w"))
    with pytest.raises(Unreadable, match="no row"):
        said(pa.array([], pa.int64()))


def test_a_text_that_many_rows_share_is_held_once(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = 4_096
    shared = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array(["x" * 100_000]))
    times = pa.array([1_700_000_000 + second for second in range(rows)])
    columns = {"timestamp": times, "gpu": shared, "power_w": [300.0] * rows, "sm_active": [0.5] * rows}
    parquet.write_table(pa.table(columns), tmp_path / "t.parquet", store_schema=False)
    tracemalloc.start()
    told = reading.read_parquet((tmp_path / "t.parquet").read_bytes())
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (told.names, len(told.time_ns)) == (["x" * reading.TEXT_MAX], rows)
    assert most < 20_000_000


def test_parquet_of_lists_and_of_too_large_groups_is_refused(tmp_path, monkeypatch):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    columns = {"timestamp": [1_700_000_000] * 9, "gpu": [[1, 2]] * 9, "power_w": [300.0] * 9}
    parquet.write_table(pa.table(columns), tmp_path / "t.parquet")
    with pytest.raises(Unreadable, match="the column gpu holds more than one value a row"):
        reading.read_parquet((tmp_path / "t.parquet").read_bytes())
    parquet.write_table(pa.table({**columns, "gpu": ["a"] * 9}), tmp_path / "t.parquet")
    assert reading.read_parquet((tmp_path / "t.parquet").read_bytes()).names == ["a"]
    monkeypatch.setattr(reading, "GROUP_BYTES_MAX", 100)
    with pytest.raises(Unreadable, match="a row group of"):
        reading.read_parquet((tmp_path / "t.parquet").read_bytes())


@given(st.lists(st.tuples(st.integers(0, 9), st.sampled_from("ab")), min_size=1, max_size=40))
def test_rows_that_share_a_device_and_a_time_are_counted_and_told(told):
    rows = "\n".join(f"{1_700_000_000 + second},{device},0.5" for second, device in told)
    read = read_csv(Table(io.StringIO(f"timestamp,gpu,sm_active\n{rows}\n")))
    twice = len(told) - len(set(told))
    said = [gap for gap in read.gaps if "of a device and a time" in gap]
    assert said == [f"{twice} rows are of a device and a time that another row has, and are passed over"][:twice]
