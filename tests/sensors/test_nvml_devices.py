"""The counter eye on boards that differ: a Hopper with GPM, an Ampere without, MIG, a consumer board, a sick driver."""

from __future__ import annotations

import ctypes
import math
import os
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuguard._nvml import as_rate, decode_value
from gpuguard.core.records import Gpm
from gpuguard.sensors.nvml import calls, gpm
from gpuguard.sensors.nvml.asking import GPM_REFUSED
from gpuguard.sensors.nvml.calls import RunningProcess, UseSample
from gpuguard.sensors.nvml.fields import HIGHEST, RATES, UNITS, WANTED, implausible
from gpuguard.sensors.nvml.processes import AHEAD_US_MAX, held_by, shares_of
from tests.sensors.nvml_play import SWEEPS, library, of, play

__all__ = ["library", "play"]  # fixtures

HOPPER = """
driver 580.95.05
start 1760000000
device 0 uuid GPU-a gpm 1 nvlinks 18 sms 132 power_limit_w 500 part 900-21010 vbios 96.00.A5 name NVIDIA H100
at 0 device 0 gpu 98 power_w 430 power_now_w 510 capped 25 mem_temperature 70 encoder 3 decoder 4 nvtx_kibs 1000
at 0 device 0 sm 91 occupancy 24 integer 12 tensor 28 hmma 27 imma 1 dram 20 fp32 5 nvrx_kibs 2000 switches 40
process device 0 pid_env STANDIN_PID used_mib 512 sm 97 memory 20 encoder 3
"""

CLOSED = """
sensor.close()
import ctypes
print(json.dumps({"samples": ctypes.CDLL("libnvidia-ml.so.1").standin_gpm_samples()}))
"""


def reasons(records):
    return [gap["reason"] for gap in of(records, "gap")]


def test_a_hopper_tells_what_its_multiprocessors_do(play):
    records = play(HOPPER, SWEEPS.format(seconds=(1, 1.5, 2.5)) + CLOSED)
    first, *rest = of(records, "device_sample")
    assert first["gpm"] is None  # one sample is no window
    for sample in rest:
        one = sample["gpm"]
        assert one["period_ns"] == pytest.approx({rest[0]["time_ns"]: 5e8}.get(sample["time_ns"], 1e9), rel=0.2)
        ratios = {"sm": 0.91, "occupancy": 0.24, "integer": 0.12, "tensor": 0.28, "tensor_hmma": 0.27,
                  "tensor_imma": 0.01, "tensor_dfma": 0, "dram": 0.2, "fp32": 0.05, "fp64": 0, "graphics": 0.98}
        assert {name: one[f"{name}_ratio"] for name in ratios} == pytest.approx(ratios)
        assert one["nvlink_tx_bytes_per_s"] == pytest.approx(1000 * 1024, rel=1e-3)
        assert one["context_switches_per_s"] == pytest.approx(40, rel=0.2)
    # Cycles are counted on their own, and asked for once a second.
    assert rest[1]["gpm"]["tensor_hmma_active_cycles"] == pytest.approx(2.5 * 0.27e9)
    assert "tensor_dfma_active_cycles" in rest[1]["gpm"]
    assert (first["power_average_w"], first["power_instant_w"], first["memory_temperature_c"]) == (430, 510, 70)
    assert (first["encoder_ratio"], first["decoder_ratio"]) == (0.03, 0.04)
    assert first["power_capped_ratio"] is None
    assert rest[0]["power_capped_ratio"] == 0.25
    assert (rest[0]["nvlink_tx_bytes_per_s"], rest[0]["nvlink_rx_bytes_per_s"]) == (1024_000, 2048_000)
    assert of(records, "process_sample")[0]["encoder_ratio"] == 0.03
    assert reasons(records) == []
    assert records[-1] == {"samples": 0}  # all that was allocated is free again


def test_windows_are_never_shorter_than_the_driver_allows(play):
    records = play(HOPPER, SWEEPS.format(seconds=(1, 1.05, 1.09, 1.3, 1.32, 1.5)))
    found = [sample["gpm"] for sample in of(records, "device_sample")]
    assert [one is not None for one in found] == [False, False, False, True, False, True]
    assert all(one is None or one["period_ns"] >= gpm.PERIOD_MIN_NS for one in found)
    assert reasons(records) == []


def test_the_context_is_told_once_and_again_when_it_changes(play):
    records = play(HOPPER + "cc 1\n", """
        sensor = nvml.open_sensor(broker, Config(), now_ns=at(0))
        for second in range(1, 35):
            show(sensor.read(at(second)))
            if second == 15:
                old = Path(os.environ["GPUGUARD_STANDIN_NVML_SCRIPT"]).read_text()
                script(old.replace("power_limit_w 500", "power_limit_w 300"))
    """)
    before, after = of(records, "device_info")
    assert (before["power_limit_w"], after["power_limit_w"]) == (500, 300)
    assert (before["power_limit_default_w"], before["power_limit_max_w"]) == (700, 700)
    assert after["time_ns"] // 10**9 - 1760000000 in range(16, 27)
    expected = {"architecture": "hopper", "board_part_number": "900-21010", "vbios_version": "96.00.A5", "nvlinks": 18,
                "multiprocessors": 132, "mig_mode": False, "virtualization_mode": "none", "gpm_supported": True,
                "confidential_compute": True, "devtools_mode": False, "accounting_mode": False,
                "memory_clock_limit_hz": 2_619_000_000, "driver_version": "580.95.05"}
    assert {name: before[name] for name in expected} == expected


def test_an_ampere_has_no_gpm_and_says_so_once(play):
    ampere = HOPPER.replace("gpm 1", "gpm 0 architecture 7")
    records = play(ampere, SWEEPS.format(seconds=range(1, 5)))
    assert all(sample["gpm"] is None for sample in of(records, "device_sample"))
    assert reasons(records) == ["GPU 0 (GPU-a) has no GPM: only Hopper and later have it"]
    assert of(records, "device_info")[0]["gpm_supported"] is False


def test_profiling_for_root_only_is_one_gap_with_what_opens_it(play):
    refused = HOPPER + "refuse nvmlGpmSampleGet no_permission\n"
    records = play(refused, SWEEPS.format(seconds=range(1, 5)) + CLOSED)
    assert all(sample["gpm"] is None and sample["power_w"] == 430 for sample in of(records, "device_sample"))
    assert [reason for reason in reasons(records) if "GPM" in reason] == [
        f"GPU 0 (GPU-a) has no GPM: {GPM_REFUSED}"]
    assert records[-1] == {"samples": 0}


@pytest.mark.parametrize("how", [
    "not_supported gpm_{}\n", "refuse gpm_{} invalid_argument\n", "refuse gpm_call_{} invalid_argument\n",
    "not_supported gpm_call_{}\n", "refuse gpm_call_{} unknown\n"])
def test_metrics_that_a_driver_does_not_know_are_named_together(play, how):
    older = HOPPER + "".join(how.format(one) for one in (172, 253, 257))
    records = play(older, SWEEPS.format(seconds=(1, 2, 3)))
    last = of(records, "device_sample")[-1]["gpm"]
    assert "context_switches_per_s" not in last
    assert last["tensor_imma_ratio"] == pytest.approx(0.01)
    assert reasons(records) == [
        f"GPU 0 (GPU-a) has no GPM metrics of this kind: {', '.join(gpm.NAMES[one] for one in (172, 253, 257))}"]


def test_a_driver_that_refuses_every_metric_has_no_gpm(play):
    records = play(HOPPER + "not_supported nvmlGpmMetricsGet\n", SWEEPS.format(seconds=(1, 2, 3)) + CLOSED)
    assert all(sample["gpm"] is None and sample["power_w"] == 430 for sample in of(records, "device_sample"))
    assert [reason for reason in reasons(records) if "GPM" in reason] == ["GPU 0 (GPU-a) has no GPM: Not Supported"]
    assert records[-1] == {"samples": 0}


def test_a_consumer_board_lacks_half_and_each_is_named(play):
    lacking = ["nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetEncoderUtilization", "field_185", "field_186",
               "field_74", "field_82", "field_83", "field_197", "field_198", "nvmlDeviceGetArchitecture"]
    consumer = HOPPER.replace("gpm 1 nvlinks 18", "gpm 0 nvlinks 0 architecture 8") + "".join(
        f"not_supported {name}\n" for name in lacking)
    consumer += "refuse nvmlDeviceGetComputeRunningProcesses_v3 function_not_found\n"
    records = play(consumer, SWEEPS.format(seconds=range(1, 6)))
    sample = of(records, "device_sample")[-1]
    absent = ("throttle_reasons", "encoder_ratio", "energy_j", "power_average_w", "power_instant_w", "gpm",
              "power_capped_ratio", "memory_temperature_c", "nvlink_tx_bytes_per_s")
    assert [sample[name] for name in absent] == [None] * len(absent)
    assert (sample["power_w"], sample["decoder_ratio"]) == (430, 0.04)
    named = [reason.split(" has no ")[1].split(":")[0] for reason in reasons(records)]
    assert sorted(named) == sorted([
        "throttle reasons", "encoder", "energy", "average power", "instant power", "power cap counter",
        "memory temperature", "PCIe bytes sent", "PCIe bytes received", "GPM"])
    assert len(of(records, "process_sample")) == 5  # by the call's second version


MIG = HOPPER.replace("gpm 1", "gpm 1 mig 1").replace("process device 0", "process device 1") + """
device 1 parent 0 gi 1 ci 0 uuid MIG-1 memory_mib 9728 sms 16 name NVIDIA H100 MIG 1g.10gb
device 2 parent 0 gi 2 ci 0 uuid MIG-2 memory_mib 9728 sms 16 name NVIDIA H100 MIG 1g.10gb
at 0 device 1 sm 95 imma 80 tensor 80 used_mib 600
at 0 device 2 sm 10 hmma 5 tensor 5 used_mib 100
not_supported nvmlDeviceGetUtilizationRates
not_supported nvmlDeviceGetProcessUtilization
"""


def test_mig_instances_are_devices_of_their_own(play):
    records = play(MIG, SWEEPS.format(seconds=(1, 2, 3)) + CLOSED)
    board, one, two = of(records, "device_info")
    assert (board["mig_mode"], board["parent_uuid"]) == (True, "")
    assert [one[name] for name in ("uuid", "index", "parent_uuid", "gpu_instance_id", "compute_instance_id")] == [
        "MIG-1", 0, "GPU-a", 1, 0]
    assert (two["multiprocessors"], two["memory_bytes"], two["name"]) == (16, 9728 << 20, "NVIDIA H100 MIG 1g.10gb")
    last = {sample["uuid"]: sample for sample in of(records, "device_sample")[-3:]}
    assert last["MIG-1"]["gpm"]["tensor_imma_ratio"] == pytest.approx(0.8)
    assert last["MIG-2"]["gpm"]["tensor_hmma_ratio"] == pytest.approx(0.05)
    assert last["GPU-a"]["gpm"]["sm_ratio"] == pytest.approx(0.91)
    assert (last["MIG-1"]["memory_used_bytes"], last["MIG-1"]["power_w"]) == (600 << 20, None)
    assert last["GPU-a"]["power_w"] == 430
    assert {sample["uuid"] for sample in of(records, "process_sample")} == {"MIG-1"}
    assert [reason.split(" has no ")[1] for reason in reasons(records)] == [
        "utilization: Not Supported", "process utilization: Not Supported"]
    assert records[-1] == {"samples": 0}


def test_processes_of_instances_are_found_where_the_board_does_not_list_them(play):
    refused = MIG + "refuse nvmlDeviceGetComputeRunningProcesses_v3 no_permission device 0\n"
    records = play(refused, SWEEPS.format(seconds=(1, 2)))
    assert [(sample["uuid"], sample["process"]["pid"]) for sample in of(records, "process_sample")] == [
        ("MIG-1", os.getpid())] * 2


def test_a_board_that_is_whole_again_tells_what_it_did_before(play):
    records = play(MIG, f"""
sensor = nvml.open_sensor(broker, Config(), now_ns=at(0))
show(sensor.read(at(1)))
script({HOPPER!r})
for second in (11, 12):
    show(sensor.read(at(second)))
{CLOSED}""")
    assert [reason for reason in reasons(records) if "destroyed" in reason] == [
        f"GPU 0 (MIG-{one}) is no more: the MIG instance was destroyed" for one in (1, 2)]
    last = of(records, "device_sample")[-1]
    assert (last["uuid"], last["gpu_ratio"]) == ("GPU-a", 0.98)
    assert not any("cannot be read" in reason for reason in reasons(records))
    assert records[-1] == {"samples": 0}


def test_a_board_that_is_lost_while_its_limits_are_read_leaves_the_others_alone(play):
    """One that tells no power limit, as in a vGPU guest: the loss shows where nothing else is made of a refusal."""
    two = HOPPER + "device 1 uuid GPU-b\nnot_supported nvmlDeviceGetEnforcedPowerLimit\n"
    records = play(two + "fail 11 gpu_lost device 1 until 30\n", SWEEPS.format(seconds=(1, 11, 12)))
    sampled = [(s["uuid"], s["time_ns"] // 10**9 - 1760000000) for s in of(records, "device_sample")]
    assert sampled == [("GPU-a", 1), ("GPU-b", 1), ("GPU-a", 11), ("GPU-a", 12)]
    assert [reason for reason in reasons(records) if "failed" in reason] == []


def test_instances_come_and_go(play):
    records = play(MIG, """
        sensor = nvml.open_sensor(broker, Config(), now_ns=at(0))
        old = Path(os.environ["GPUGUARD_STANDIN_NVML_SCRIPT"]).read_text()
        for second in range(1, 31):
            show(sensor.read(at(second)))
            if second == 5:
                script(old.replace("device 2 parent 0 gi 2", "device 3 parent 0 gi 3").replace("MIG-2", "MIG-3"))
    """ + CLOSED.replace("\n", "\n        "))
    assert [device["uuid"] for device in of(records, "device_info")] == ["GPU-a", "MIG-1", "MIG-2", "MIG-3"]
    assert "GPU 0 (MIG-2) is no more: the MIG instance was destroyed" in reasons(records)
    assert of(records, "device_sample")[-1]["uuid"] == "MIG-3"
    assert records[-1] == {"samples": 0}


def test_a_gpu_that_is_lost_gives_its_samples_back_and_is_prepared_anew(play):
    records = play(HOPPER + "fail 3 gpu_lost until 4\n", SWEEPS.format(seconds=(1, 2, 3, 4.5, 6)) + CLOSED)
    samples = {sample["time_ns"] / 1e9 - 1760000000: sample for sample in of(records, "device_sample")}
    assert sorted(samples) == [1, 2, 4.5, 6]
    assert samples[2]["gpm"] is not None
    assert samples[4.5]["gpm"] is None  # no window reaches over the loss
    assert samples[4.5]["pcie_tx_bytes_per_s"] is None
    assert samples[6]["gpm"] is not None
    assert records[-1] == {"samples": 0}


def test_accounts_of_processes_outlive_them(play):
    accounted = HOPPER.replace("gpm 1", "gpm 1 accounting 1").replace("sm 97", "from 2 until 15 sm 97")
    records = play(accounted, SWEEPS.format(seconds=range(1, 45)))
    running, ended = of(records, "process_accounting")
    assert (running["running"], ended["running"]) == (True, False)
    assert running["process"]["pid"] == ended["process"]["pid"] == ended["pid"] == os.getpid()
    assert ended["started_ns"] == 1760000002 * 10**9
    assert (ended["gpu_ratio"], ended["memory_max_bytes"], ended["active_ns"]) == (0.97, 512 << 20, 13 * 10**9)


def test_numbers_that_no_device_has_are_gaps_and_no_measurements(play):
    names = ["nvmlDeviceGetPowerUsage", "nvmlDeviceGetProcessUtilization", "nvmlDeviceGetAccountingStats",
             "nvmlDeviceGetComputeRunningProcesses_v3", *(f"field_{one}" for _, one, _, _ in WANTED), "field_82",
             *(f"gpm_{one}" for one in gpm.NAMES)]
    sick = HOPPER.replace("gpm 1", "gpm 1 accounting 1") + "".join(f"garbage {name}\n" for name in names)
    records = play(sick, SWEEPS.format(seconds=range(1, 14)))
    sample = of(records, "device_sample")[-1]
    for name in ("power_w", "power_average_w", "energy_j", "nvlink_tx_bytes_per_s", "memory_temperature_c"):
        assert sample[name] is None, name
    assert set(sample["gpm"]) == {"period_ns"}
    assert sample["gpu_ratio"] == 0.98
    process = of(records, "process_sample")[-1]
    assert (process["memory_used_bytes"], process["sm_ratio"]) == (None, 0.97)
    account = of(records, "process_accounting")[-1]
    assert (account["gpu_ratio"], account["memory_max_bytes"], account["active_ns"]) == (None, None, None)
    told = [reason for reason in reasons(records) if "no measurement" in reason]
    assert len(told) == len(set(told)) >= 4


# -- pure parts -------------------------------------------------------------------------------------------------------


def test_layouts_are_those_of_the_binding():
    import pynvml

    assert calls.FIELD.size == ctypes.sizeof(pynvml.c_nvmlFieldValue_t)
    assert calls.METRIC.size == ctypes.sizeof(pynvml.c_nvmlGpmMetric_t)
    assert calls.METRICS_HEAD.size == pynvml.c_nvmlGpmMetricsGet_t.metrics.offset
    assert calls.METRICS_MAX >= pynvml.NVML_GPM_METRIC_MAX
    assert calls.ACCOUNT.size == ctypes.sizeof(pynvml.c_nvmlAccountingStats_t)
    stats = pynvml.c_nvmlAccountingStats_t(
        gpuUtilization=1, memoryUtilization=2, maxMemoryUsage=3, time=4, startTime=5, isRunning=6)
    assert calls.ACCOUNT.unpack(bytes(stats)) == (1, 2, 3, 4, 5, 6)
    assert calls.PROCESS.size == ctypes.sizeof(pynvml.c_nvmlProcessInfo_v3_t)
    assert calls.USE.size == ctypes.sizeof(pynvml.c_nvmlProcessUtilizationSample_t)
    field = pynvml.c_nvmlFieldValue_t(fieldId=1, scopeId=2, timestamp=-3, latencyUsec=4, valueType=5, nvmlReturn=6)
    field.value.ullVal = 7
    assert calls.FIELD.unpack(bytes(field)) == (1, 2, -3, 4, 5, 6, 7)
    process = pynvml.c_nvmlProcessInfo_v3_t(pid=1, usedGpuMemory=2, gpuInstanceId=3, computeInstanceId=4)
    assert calls.PROCESS.unpack(bytes(process)) == (1, 2, 3, 4)
    use = pynvml.c_nvmlProcessUtilizationSample_t(pid=1, timeStamp=2, smUtil=3, memUtil=4, encUtil=5, decUtil=6)
    assert calls.USE.unpack(bytes(use)) == (1, 2, 3, 4, 5, 6)
    metric = pynvml.c_nvmlGpmMetric_t(metricId=1, nvmlReturn=2, value=3.5)
    assert calls.METRIC.unpack(bytes(metric)) == (1, 2, 3.5)


def test_metric_and_field_ids_are_those_of_the_binding():
    import pynvml

    ids = {"sm_ratio": "SM_UTIL", "integer_ratio": "INTEGER_UTIL", "tensor_ratio": "ANY_TENSOR_UTIL",
           "tensor_hmma_ratio": "HMMA_TENSOR_UTIL", "tensor_imma_ratio": "IMMA_TENSOR_UTIL",
           "tensor_dfma_ratio": "DFMA_TENSOR_UTIL", "tensor_dmma_ratio": "DMMA_TENSOR_UTIL",
           "dram_ratio": "DRAM_BW_UTIL",
           "nvlink_tx_bytes_per_s": "NVLINK_TOTAL_TX_PER_SEC", "pcie_rx_bytes_per_s": "PCIE_RX_PER_SEC",
           "context_switches_per_s": "GR0_CTXSW_REQUESTS", "context_switch_ratio": "GR0_CTXSW_ACTIVE_PCT",
           "tensor_active_cycles": "MMA_CYCLES_ACTIVE", "integer_active_cycles": "INTEGER_CYCLES_ACTIVE",
           "sm_elapsed_cycles": "SM_CYCLES_ELAPSED", "fp16_active_cycles": "FP16_CYCLES_ACTIVE"}
    by_name = {name: one for one, name in gpm.NAMES.items()}
    assert {name: by_name[name] for name in ids} == {
        name: getattr(pynvml, f"NVML_GPM_METRIC_{theirs}") for name, theirs in ids.items()}
    assert set(by_name) == set(Gpm.__struct_fields__) - {"period_ns"}
    fields = {"energy": "TOTAL_ENERGY_CONSUMPTION", "average power": "POWER_AVERAGE", "instant power": "POWER_INSTANT",
              "power cap counter": "CLOCKS_EVENT_REASON_SW_POWER_CAP", "PCIe bytes sent": "PCIE_COUNT_TX_BYTES",
              "NVLink bytes received": "NVLINK_THROUGHPUT_DATA_RX"}
    ours = {what: one for what, one, _, _ in WANTED}
    assert {what: ours[what] for what in fields} == {
        what: getattr(pynvml, f"NVML_FI_DEV_{theirs}") for what, theirs in fields.items()}


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1))
def test_any_value_of_a_field_is_a_number_or_unknown(kind, bits):
    value = decode_value(kind, bits)
    assert value is None or math.isfinite(value)
    if kind == 4:
        assert value == struct.unpack("<q", struct.pack("<Q", bits))[0]
    if kind == 5:
        assert value == struct.unpack("<i", struct.pack("<I", bits & 0xFFFFFFFF))[0]


@given(st.lists(st.tuples(st.sampled_from([*gpm.NAMES, 0, 400]), st.integers(0, 999), st.floats())),
       st.integers(gpm.PERIOD_MIN_NS, gpm.PERIOD_MAX_NS))
def test_any_answer_makes_a_record_of_plausible_numbers(metrics, period_ns):
    answer = bytes(calls.METRICS_HEAD.size) + b"".join(calls.METRIC.pack(*metric) for metric in metrics)
    one = gpm.read(answer, period_ns)
    for name in Gpm.__struct_fields__:
        value = getattr(one, name)
        assert value is None or (math.isfinite(value) and 0 <= value < 2**63)
        assert value is None or not name.endswith("_ratio") or value <= 1
        assert value is None or not name.endswith(("_bytes_per_s", "_cycles")) or isinstance(value, int)


rows = st.lists(st.builds(RunningProcess, st.integers(0, 5), st.integers(0, 2**64 - 1), st.integers(0, 2), st.just(0)))


@given(rows)
def test_each_process_is_told_once_for_each_device(listed):
    held = held_by(listed, "GPU", {(1, 0): "MIG-1"})
    assert set(held) == {("MIG-1" if one.gpu_instance_id == 1 else "GPU", one.pid) for one in listed if one.pid}
    assert all(used is None or 0 <= used <= 2**50 for used in held.values())


samples = st.lists(st.builds(UseSample, *(st.integers(0, 2**32 - 1) for _ in range(6))))


@given(samples, st.integers(0, 2**32), st.integers(0, 2**32))
def test_samples_from_the_past_or_the_future_move_nothing(found, since_us, now_us):
    shares, newest_us = shares_of(found, since_us, now_us)
    fresh = [one for one in found if since_us < one.time_us <= now_us + AHEAD_US_MAX and one.pid]
    assert newest_us == max((one.time_us for one in fresh), default=since_us)
    assert set(shares) == {one.pid for one in fresh}
    assert all(value is None or 0 <= value <= 1 for one in shares.values() for value in one)


@given(st.sampled_from(sorted(HIGHEST)), st.floats())
def test_only_what_can_be_measured_is_taken(name, value):
    assert bool(implausible({name: value})) == (not 0 <= value <= HIGHEST[name])


def test_rates_have_the_unit_of_their_name():
    assert as_rate(2.5, UNITS["pcie_tx_bytes_per_s"]) == 2_500_000
    assert as_rate(1, UNITS["nvlink_rx_bytes_per_s"]) == 1_024_000_000
    assert as_rate(250, UNITS["power_capped_ratio"]) == 0.25
    assert as_rate(1_010, UNITS["power_capped_ratio"]) == 1
    assert implausible({"power_capped_ratio": as_rate(2_000, UNITS["power_capped_ratio"])}) == ["power_capped_ratio"]
    assert set(UNITS) == {name for _, _, _, name in RATES}
