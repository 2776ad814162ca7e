"""The counter eye through the real binding, against the stand-in driver.

What differs by board is in test_nvml_devices.py.
"""

from __future__ import annotations

import collections
import importlib.util
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuguard.config import Config, NvmlSettings
from gpuguard.core.records import ProcessStarted
from gpuguard.core.subjects import ProcessId
from gpuguard.messages import Found, ReadProcess, Refused
from gpuguard.sensors import EyeClosed
from gpuguard.sensors.nvml import open_sensor
from gpuguard.sensors.nvml.calls import UNINITIALIZED
from gpuguard.sensors.nvml.fields import ratio
from gpuguard.sensors.nvml.names import Names, parse_start_ticks, start_ticks
from tests.sensors.nvml_play import STANDIN, SWEEPS, library, of, play

__all__ = ["library", "play"]  # fixtures

ONE_GPU = """
driver 580.95.05
start 1760000000
device 0 uuid GPU-a memory_mib 1000 power_limit_w 700 sm_mhz_max 1980 gpm 1 nvlinks 18 name NVIDIA H100 80GB HBM3
at 0 device 0 gpu 98 memory 30 used_mib 900 power_w 430.5 temperature 51 sm_mhz 1755 mem_mhz 2619
at 0 device 0 tx_kbs 20 rx_kbs 10 throttle 4 mem_temperature 70
process device 0 pid_env STANDIN_PID used_mib 512 sm 97 memory 20
"""
OTHER = "device 1 uuid GPU-b gpm 1\nat 0 device 1 mem_temperature 60"


def test_the_binding_and_nvitop_read_the_stand_in(play):
    shown = play(ONE_GPU, """
        import nvitop, pynvml
        at(3)
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(b"GPU-a")
        rates = pynvml.nvmlDeviceGetUtilizationRates(handle)
        device = nvitop.Device.all()[0]
        samples = pynvml.nvmlDeviceGetProcessesUtilizationInfo(handle, 0)
        print(json.dumps([rates.gpu, device.name(), device.power_usage(), device.memory_used(), device.driver_version(),
                          list(device.processes()), samples[-1].smUtil,
                          pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)]))
        try:
            pynvml.nvmlDeviceGetSerial(handle)
        except pynvml.NVMLError as error:
            print(error.value)
    """)
    mib = 1024 * 1024
    name = "NVIDIA H100 80GB HBM3"
    assert shown[0] == [98, name, 430500, 900 * mib, "580.95.05", [os.getpid()], 97, 3 * 430500]
    assert shown[1] == 3  # NVML_ERROR_NOT_SUPPORTED for every other name


def test_every_name_of_the_binding_is_answered(library):
    spec = importlib.util.spec_from_file_location("standin_nvml_build", STANDIN)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    names = module.binding_names()
    symbols = library.read_bytes()
    assert len(names) > 300
    assert [name for name in names if name.encode() not in symbols] == []


def test_devices_processes_and_units(play):
    records = play(ONE_GPU, SWEEPS.format(seconds=(1, 2)))
    device = of(records, "device_info")[0]
    assert (device["uuid"], device["index"], device["power_limit_w"]) == ("GPU-a", 0, 700.0)
    assert device["sm_clock_limit_hz"] == 1_980_000_000
    assert device["memory_bytes"] == 1000 * 1024 * 1024
    assert device["driver_version"] == "580.95.05"
    sample = of(records, "device_sample")[1]
    assert sample["time_ns"] == 1760000002 * 10**9
    assert (sample["gpu_ratio"], sample["memory_ratio"], sample["power_w"]) == (0.98, 0.3, 430.5)
    assert (sample["energy_j"], sample["temperature_c"]) == (861.0, 51.0)
    assert (sample["sm_clock_hz"], sample["memory_clock_hz"]) == (1_755_000_000, 2_619_000_000)
    assert (sample["pcie_tx_bytes_per_s"], sample["pcie_rx_bytes_per_s"]) == (20_000, 10_000)
    assert sample["throttle_reasons"] == 4
    process = of(records, "process_sample")[1]
    assert process["process"]["pid"] == os.getpid()
    assert process["process"]["start_ticks"] == start_ticks(os.getpid())
    assert (process["sm_ratio"], process["memory_ratio"]) == (0.97, 0.2)
    assert process["memory_used_bytes"] == 512 * 1024 * 1024
    assert of(records, "gap") == []
    # The first sample has no rate yet: absent, not zero.
    assert of(records, "device_sample")[0]["pcie_tx_bytes_per_s"] is None


def test_processes_are_asked_for_once_a_second_at_most(play):
    records = play(ONE_GPU, SWEEPS.format(seconds=[1 + i / 10 for i in range(11)]))
    assert len(of(records, "device_sample")) == 11
    assert len(of(records, "process_sample")) == 2


def test_what_a_board_lacks_is_none_and_one_gap_for_each_field(play):
    lacking = ONE_GPU + "not_supported nvmlDeviceGetPowerUsage\nnot_supported field_185\n"
    lacking += "not_supported nvmlDeviceGetProcessUtilization device 0\n"
    records = play(lacking, SWEEPS.format(seconds=range(1, 6)))
    samples = of(records, "device_sample")
    assert len(samples) == 5
    assert all(sample["power_w"] is None and sample["energy_j"] is not None for sample in samples)
    assert all(sample["sm_ratio"] is None for sample in of(records, "process_sample"))
    reasons = [gap["reason"] for gap in of(records, "gap")]
    assert sum("has no power:" in reason for reason in reasons) == 1
    assert sum("has no process utilization:" in reason for reason in reasons) == 1


def test_without_byte_counters_one_direction_of_one_device_is_measured_in_a_turn(play):
    lacking = ONE_GPU + OTHER + " tx_kbs 7 rx_kbs 8\nnot_supported nvmlDeviceGetFieldValues\n"
    records = play(lacking, SWEEPS.format(seconds=range(1, 6)))
    fields = ("uuid", "pcie_tx_bytes_per_s", "pcie_rx_bytes_per_s")
    samples = [tuple(sample[name] for name in fields) for sample in of(records, "device_sample")]
    measured = [sample for sample in samples if sample[1:] != (None, None)]
    a, b = [("GPU-a", 20_000, None), ("GPU-a", None, 10_000)], [("GPU-b", 7_000, None), ("GPU-b", None, 8_000)]
    assert measured[:4] == a + b


def test_a_transient_error_is_told_when_it_begins_and_when_it_ends(play):
    records = play(ONE_GPU + "fail 2 timeout until 4\n", SWEEPS.format(seconds=(1, 2, 3, 4)))
    clock = [gap for gap in of(records, "gap") if " sm clock " in gap["reason"]]
    assert ["cannot be read" in clock[0]["reason"], "can be read again" in clock[1]["reason"]] == [True, True]
    assert clock[1]["lost"] == 2
    assert clock[1]["since_ns"] == 1760000002 * 10**9
    whats = {gap["reason"].removeprefix("GPU 0 (GPU-a): ").partition(" can")[0] for gap in of(records, "gap")}
    assert {"field values", "memory", "temperature", "GPM", "compute processes"} < whats
    assert all(gap["lost"] == 2 for gap in of(records, "gap") if "again" in gap["reason"])
    assert [sample["time_ns"] // 10**9 - 1760000000 for sample in of(records, "device_sample")] == [1, 4]


def test_a_lost_gpu_leaves_the_others_alone_and_is_taken_back(play):
    two = ONE_GPU + OTHER + " gpu 5\nfail 2 gpu_lost device 1 until 6\n"
    records = play(two, SWEEPS.format(seconds=range(1, 9)))
    seconds = {uuid: [s["time_ns"] // 10**9 - 1760000000 for s in of(records, "device_sample") if s["uuid"] == uuid]
               for uuid in ("GPU-a", "GPU-b")}
    assert seconds["GPU-a"] == list(range(1, 9))
    # Tried again after 1, 2 and 4 s: at 3, 5 (both in vain), and not before 9.
    assert seconds["GPU-b"] == [1]
    reasons = [gap["reason"] for gap in of(records, "gap") if "GPU-b" in gap["reason"] and "answer" in gap["reason"]]
    assert reasons[0] == "GPU 1 (GPU-b) does not answer any more: GPU is lost"
    assert len(reasons) == 3
    later = play(two, SWEEPS.format(seconds=(1, 2, 3, 5, 9)))
    assert [s["time_ns"] // 10**9 - 1760000000 for s in of(later, "device_sample") if s["uuid"] == "GPU-b"] == [1, 9]


def test_eight_lost_gpus_are_each_told_and_all_taken_back(play):
    eight = ONE_GPU + "".join(OTHER.replace("device 1", f"device {i}").replace("GPU-b", f"GPU-{i}") + f" gpu {i}\n"
                              for i in range(1, 8))
    lost = "".join(f"fail 2 gpu_lost device {i} until 4\n" for i in range(8))
    records = play(eight + lost, SWEEPS.format(seconds=(1, 2, 3, 5, 6)))
    by_second = collections.Counter(s["time_ns"] // 10**9 - 1760000000 for s in of(records, "device_sample"))
    assert by_second == {1: 8, 5: 8, 6: 8}
    reasons = [gap["reason"] for gap in of(records, "gap")]
    assert sum("does not answer any more" in reason for reason in reasons) == 8
    assert sum("answers again" in reason for reason in reasons) == 8


def test_a_clock_that_is_set_back_blinds_nobody(play):
    two = ONE_GPU + OTHER + " gpu 5\nfail 7201 gpu_lost device 1 until 7202\n"
    records = play(two, SWEEPS.format(seconds=(7200, 7201, 3600, 3601)))
    seconds = {uuid: [s["time_ns"] // 10**9 - 1760000000 for s in of(records, "device_sample") if s["uuid"] == uuid]
               for uuid in ("GPU-a", "GPU-b")}
    assert seconds == {"GPU-a": [7200, 7201, 3600, 3601], "GPU-b": [7200, 3600, 3601]}
    used = [s["time_ns"] // 10**9 - 1760000000 for s in of(records, "process_sample") if s["sm_ratio"] is not None]
    assert used == [7200, 7201, 3600, 3601]


DIES = """
import pynvml
from gpuguard.sensors.nvml.driver import Driver
story = Path(os.environ["GPUGUARD_STANDIN_NVML_SCRIPT"]).read_text()
driver = Driver(pynvml)
driver.open(at(0))
script(story + "refuse nvmlDeviceGetCount_v2 driver_dead\\nfail 1 driver_dead until 2\\n")
for second in (1, 3, 6):
    show(driver.sweep(at(second)).blocks)
script(story)
show(driver.sweep(at(20)).blocks)
driver.close()
import ctypes
print(json.dumps({"again": ctypes.CDLL("libnvidia-ml.so.1").nvmlShutdown()}))
"""


def test_a_driver_that_dies_while_it_is_reopened_is_let_go_of_each_time(play):
    records = play(ONE_GPU, DIES)
    assert [gap["reason"].partition(":")[0] for gap in of(records, "gap")] == [
        "the driver does not answer any more", *["the driver still does not answer"] * 2, "the driver answers again"]
    assert [sample["time_ns"] // 10**9 - 1760000000 for sample in of(records, "device_sample")] == [20]
    assert records[-1] == {"again": UNINITIALIZED}  # nobody is left who initialised it


def test_a_gpu_that_was_dead_at_the_start_is_taken_in_when_it_answers(play):
    two = ONE_GPU + OTHER + " gpu 5\nfail 0 gpu_lost device 1 until 2\n"
    records = play(two, SWEEPS.format(seconds=(1, 2, 3)))
    assert [device["uuid"] for device in of(records, "device_info")] == ["GPU-a", "GPU-b"]
    assert [gap["reason"] for gap in of(records, "gap")] == ["GPU 1 cannot be opened: GPU is lost"] * 2
    assert [sample["time_ns"] // 10**9 - 1760000000 for sample in of(records, "device_sample")] == [1, 2, 3, 3]


@pytest.mark.parametrize("how", ["driver_dead", "mismatch"])
def test_a_dead_driver_is_a_gap_and_is_reopened(play, how):
    records = play(ONE_GPU + f"fail 3 {how} until 5\n", SWEEPS.format(seconds=range(1, 10)))
    assert [s["time_ns"] // 10**9 - 1760000000 for s in of(records, "device_sample")] == [1, 2, 6, 7, 8, 9]
    gone, still, again = [gap for gap in of(records, "gap") if "driver" in gap["reason"]]
    assert gone["reason"].startswith("the driver does not answer any more")
    assert still["since_ns"] == again["since_ns"] == 1760000003 * 10**9
    assert len(of(records, "device_info")) == 2  # named afresh: it may be another driver


def test_no_driver_closes_the_eye_with_a_reason(play):
    opening = """
        try:
            nvml.open_sensor(broker, Config(), now_ns=at(0))
        except EyeClosed as closed:
            print(json.dumps(str(closed)))
    """
    assert "not loaded" in play(None, opening)[0]
    assert "different versions" in play(ONE_GPU + "fail 0 mismatch\n", opening)[0]
    assert "no right" in play(ONE_GPU + "fail 0 no_permission\n", opening)[0]
    assert "lists no GPU" in play("driver 1\n", opening)[0]


def test_a_rate_that_cannot_be_is_refused():
    with pytest.raises(EyeClosed, match="rate_hz"):
        open_sensor(None, Config(nvml=NvmlSettings(rate_hz=1000.0)))


def test_a_driver_that_hangs_does_not_hang_the_guard(play):
    records = play(ONE_GPU, """
        import threading
        sensor = nvml.open_sensor(broker, Config(), now_ns=at(0))
        show(sensor.read(at(1)))
        nvml.ANSWER_WAIT_S = 0.01
        release = threading.Event()
        answer = sensor._driver.sweep
        sensor._driver.sweep = lambda now_ns: (release.wait(), answer(now_ns))[1]
        for second in (2, 3, 8, 9):
            show(sensor.read(at(second)))
        release.set()
        nvml.ANSWER_WAIT_S = 20
        while sensor._answered.empty():
            time.sleep(0.01)
        show(sensor.read(at(10)))
    """)
    hung = [gap for gap in of(records, "gap") if "NVML" in gap["reason"]]
    assert ["has not returned" in hung[0]["reason"], "answers again" in hung[1]["reason"]] == [True, True]
    assert hung[0]["since_ns"] == hung[1]["since_ns"] == 1760000002 * 10**9
    # The late answer is told, and one of this moment: a driver that answers again is asked again.
    assert [sample["time_ns"] // 10**9 - 1760000000 for sample in of(records, "device_sample")] == [1, 2, 10]


def test_an_older_binding_lacks_names_and_the_rest_is_read(play):
    records = play(ONE_GPU, """
        import pynvml
        del pynvml.nvmlDeviceGetArchitecture, pynvml.NVML_CLOCK_MEM
    """ + SWEEPS.format(seconds=(1, 2, 3)).replace("\n", "\n        "))
    sample = of(records, "device_sample")[2]
    assert (sample["throttle_reasons"], sample["energy_j"], sample["power_w"]) == (4, 1291.5, 430.5)
    assert of(records, "device_info")[0]["architecture"] == ""
    assert [gap["reason"].split(":")[0] for gap in of(records, "gap")] == ["GPU 0 (GPU-a) has no memory clock limit"]


def test_what_no_driver_should_do_is_a_gap_and_not_the_end(play):
    records = play(ONE_GPU, """
        sensor = nvml.open_sensor(broker, Config(), now_ns=at(0))
        sweep = sensor._driver.sweep
        sensor._driver.sweep = lambda now_ns: 1 / 0
        for second in (1, 2, 3):
            show(sensor.read(at(second)))
        sensor._driver.sweep = sweep
        show(sensor.read(at(4)))
    """)
    assert [gap["reason"] for gap in of(records, "gap")] == [
        "a round of NVML calls failed: ZeroDivisionError: division by zero"]
    assert len(of(records, "device_sample")) == 1


def test_pids_join_while_the_driver_runs(play, tmp_path):
    pids = tmp_path / "pids"
    script = ONE_GPU.replace("pid_env STANDIN_PID", f"pid_file {pids}")
    records = play(script, f"""
        sensor = nvml.open_sensor(broker, Config(), now_ns=at(0))
        show(sensor.read(at(1)))
        Path({str(pids)!r}).write_text(f"{{os.getpid()}} 99999999")
        show(sensor.read(at(2)))
        show(sensor.read(at(3)))
        print(json.dumps(broker.asked.count(99999999)))
    """)
    assert len(of([r for r in records if isinstance(r, dict)], "process_sample")) == 2
    unnamed = [r for r in records if isinstance(r, dict) and "nobody can say" in r.get("reason", "")]
    assert len(unnamed) == 1
    assert records[-1] == 1


class OneProcess:
    """A broker that knows one pid, under the start time that it is told."""

    def __init__(self, ticks):
        self.ticks = ticks
        self.asked = 0

    def ask(self, request):
        assert isinstance(request, ReadProcess)
        self.asked += 1
        if self.ticks is None:
            return Refused(reason="gone"), ()
        return Found(processes=(ProcessStarted(0, ProcessId("b", request.pid, self.ticks), None, "x", ()),)), ()


def test_a_reused_pid_is_another_process(monkeypatch):
    now = {"ticks": 100}
    monkeypatch.setattr("gpuguard.sensors.nvml.names.start_ticks", lambda pid: now["ticks"])
    broker = OneProcess(100)
    names = Names(broker)
    gaps = []
    assert names.process(7, 0, gaps) == names.process(7, 1, gaps) == ProcessId("b", 7, 100)
    assert broker.asked == 1
    now["ticks"] = broker.ticks = 200
    assert names.process(7, 2, gaps) == ProcessId("b", 7, 200)
    now["ticks"] = broker.ticks = None
    assert names.process(7, 3, gaps) is None
    assert names.process(7, 4, gaps) is None
    assert len(gaps) == 1
    assert broker.asked == 3
    names.keep(set())
    assert (names._known, names._unnamed_ns) == ({}, {})


@given(st.binary(max_size=15), st.integers(0, 2**63 - 1))
def test_a_hostile_process_name_does_not_move_the_start_time(name, ticks):
    rest = b" ".join([b"S", *[b"1"] * 18, str(ticks).encode(), b"2", b"3"])
    assert parse_start_ticks(b"42 (" + name + b") " + rest) == ticks


@given(st.binary(max_size=200))
def test_any_stat_line_gives_a_number_or_nothing(stat):
    ticks = parse_start_ticks(stat)
    assert ticks is None or ticks >= 0


@given(st.integers(0, 2**32 - 1))
def test_a_percentage_is_a_ratio_or_unknown(percent):
    assert ratio(percent) == (percent / 100 if percent <= 100 else None)
