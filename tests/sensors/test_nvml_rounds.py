"""Rounds of driver calls: the compiled ones and those written for the eye agree, and ten a second reach the records."""

from __future__ import annotations

import ctypes
import itertools
import struct
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuguard import _nvml
from gpuguard.sensors.nvml import calls
from gpuguard.sensors.nvml.gpm import PERIOD_MIN_NS, TICK_MIN_NS
from tests.sensors.nvml_play import library, of, play

sys.path.insert(0, str(Path(__file__).parent.parent))
import reference_nvml as reference

__all__ = ["library", "play"]  # fixtures

GONE = (9, 15)
FOREVER = 1 << 62
ANSWER = struct.Struct("<QQ")


class Driver:
    """Functions that a round may call: each notes its arguments, and answers by them and by how often it was called."""

    def __init__(self):
        self.noted = []
        self.kept = [reference.FUNCTION(self.plain), reference.FUNCTION(self.answering)]
        self.plain_at, self.answering_at = (ctypes.cast(one, ctypes.c_void_p).value for one in self.kept)

    def plain(self, *arguments):
        self.noted.append(arguments)
        return (sum(arguments) + len(self.noted)) % 23 - 1

    def answering(self, first, pointer, third, _):
        before = ANSWER.unpack(ctypes.string_at(pointer, ANSWER.size))
        self.noted.append((first, before, third))
        ctypes.memmove(pointer, ANSWER.pack(before[0] ^ third, len(self.noted)), ANSWER.size)
        return (first + len(self.noted)) % 19


numbers = st.sampled_from((0, 1, 2**31, 2**64 - 1)) | st.integers(0, 2**64 - 1)
call = st.tuples(st.booleans(), st.lists(numbers, max_size=4), numbers, st.integers(-1, 20))


def turn_of(driver, wanted, turn):
    """Return one turn: the other differs in what it is given and in what the row holds before."""
    at = 8 * (1 + len(wanted))
    blank, made = struct.pack(f"<{1 + len(wanted)}q", 0, *[-1] * len(wanted)), []
    for index, (answers, arguments, number, other) in enumerate(wanted):
        needs = other if other < index else -1
        if answers:
            made.append((driver.answering_at, (number & 7, 0, number ^ turn), 1, at, ANSWER.size, needs))
            blank += ANSWER.pack(number, turn)
            at += ANSWER.size
        else:
            made.append((driver.plain_at, tuple(one ^ turn for one in arguments), -1, 0, 0, needs))
    return blank, made


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.lists(call, max_size=8), st.integers(0, 1)), max_size=4), st.integers(0, 5))
def test_rounds_are_those_written_for_the_eye(devices, rounds):
    found = []
    for module in (reference, _nvml):
        driver = Driver()
        asked = [module.Calls([turn_of(driver, wanted, turn) for turn in range(2)]) for wanted, _ in devices]
        made = module.Rounds(GONE).run(asked, [turn for _, turn in devices], rounds, 0, 0, FOREVER)
        assert all(struct.unpack_from("<q", row)[0] > 0 for rows in made for row in rows if row)
        found.append(([[row[8:] for row in rows] for rows in made], driver.noted))
    assert found[0] == found[1]
    assert len(found[0][0]) == rounds


@pytest.mark.parametrize("module", [reference, _nvml])
def test_rounds_keep_their_distance_and_end_in_time(module):
    driver = Driver()
    asked = [module.Calls([turn_of(driver, [], turn) for turn in range(2)])]
    first_ns = time.monotonic_ns() + 3_000_000
    made = module.Rounds(()).run(asked, [0], 5, first_ns, 2_000_000, FOREVER)
    times_ns = [struct.unpack_from("<q", row)[0] for row, in made]
    assert times_ns[0] >= first_ns
    assert all(after - before >= 2_000_000 for before, after in itertools.pairwise(times_ns))
    assert module.Rounds(()).run(asked, [0], 5, first_ns, 0, first_ns - 1) == []
    stopped = module.Rounds(())
    stopped.stop()
    assert stopped.run(asked, [0], 5, 0, 0, FOREVER) == []


def test_another_thread_ends_it():
    rounds = _nvml.Rounds(())
    driver = Driver()
    asked = [_nvml.Calls([turn_of(driver, [], turn) for turn in range(2)])]
    threading.Timer(0.05, rounds.stop).start()
    assert len(rounds.run(asked, [0], 64, 0, 200_000_000, FOREVER)) < 64


def turns(blank, *wanted):
    return [(blank, wanted)] * 2


@pytest.mark.parametrize("wanted", [
    [(bytes(8), ())],                                            # one turn
    [(bytes(8), ()), (bytes(16), ())],                           # of two shapes
    turns(bytes(7)),                                             # no room for the time
    turns(bytes(8), (1, (), -1, 0, 0, -1)),                      # no room for the code
    turns(bytes(1 << 17)),                                       # too long
    turns(bytes(16), (0, (), -1, 0, 0, -1)),                     # no function
    turns(bytes(16), (1, (0,) * 5, -1, 0, 0, -1)),               # too many arguments
    turns(bytes(24), (1, (0,), 1, 16, 8, -1)),                   # the answer is no argument
    turns(bytes(24), (1, (0,), 0, 8, 8, -1)),                    # the answer over the codes
    turns(bytes(24), (1, (0,), 0, 16, 9, -1)),                   # the answer past the end
    turns(bytes(24), (1, (0,), 0, 16, -1, -1)),                  # an answer of less than nothing
    turns(bytes(16), (1, (), -1, 0, 0, 0)),                      # needs itself
    turns(bytes(8 * 66), *[(1, (), -1, 0, 0, -1)] * 65),         # too many calls
])
def test_calls_that_do_not_fit_are_refused(wanted):
    with pytest.raises(ValueError, match=r"call|turn"):
        _nvml.Calls(wanted)


def test_numbers_that_do_not_fit_are_refused():
    with pytest.raises(OverflowError):
        _nvml.Calls(turns(bytes(16), (1, (-1,), -1, 0, 0, -1)))
    with pytest.raises(ValueError, match="64 is no code"):
        _nvml.Rounds([64])
    device = _nvml.Calls(turns(bytes(8)))
    for devices, first, rounds in (([device], [], 1), ([device], [0], 65), ([device], [0], -1),
                                   ([device] * 257, [0] * 257, 1)):
        with pytest.raises(ValueError, match="rounds of"):
            _nvml.Rounds(()).run(devices, first, rounds, 0, 0, FOREVER)
    assert calls.METRICS_BYTES <= _nvml.ANSWER_BYTES_MAX


TWO_GPUS = """
driver 580.95.05
device 0 uuid GPU-a gpm 1 nvlinks 18
device 1 uuid GPU-b gpm 1 nvlinks 18
at 0 device 0 gpu 98 power_w 430 sm 91 integer 40 tx_kbs 20 mem_temperature 70 temperature 51 sm_mhz 1755
at 0 device 1 gpu 5 power_w 100 sm 4 temperature 40 mem_temperature 50
process device 0 pid_env STANDIN_PID used_mib 512 sm 97
"""

#: By the real clock: a stream keeps its own time. Ahead of whatever else this host does, where that is allowed.
STREAM = """
import contextlib
from gpuguard.sensors import next_ns
with contextlib.suppress(PermissionError):
    os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
del os.environ["GPUGUARD_STANDIN_NVML_CLOCK"]
nvml.ANSWER_WAIT_S = 0.5
sensor = nvml.open_sensor(broker, Config(nvml=NvmlSettings(rate_hz=10.0)))
print(json.dumps({{"period_ns": sensor.period_ns}}))
for late_s in {late_s}:
    time.sleep(next_ns(time.monotonic_ns(), sensor.period_ns) / 1e9 - time.monotonic() + late_s)
    blocks = sensor.read(time.time_ns())
    print(json.dumps({{"read": len(blocks)}}))
    show(blocks)
sensor.close()
sensor._thread.join(100)
import ctypes
print(json.dumps({{"samples": ctypes.CDLL("libnvidia-ml.so.1").standin_gpm_samples()}}))
"""


def test_ten_looks_a_second_in_one_read(play):
    # Only where the answer to each of the four reads is waited for are there as many looks at the processes.
    records = play(TWO_GPUS, STREAM.replace("WAIT_S = 0.5", "WAIT_S = 20.0").format(late_s=(0, 0, 0, 0)))
    assert records[0] == {"period_ns": 10 * TICK_MIN_NS}
    samples = [sample for sample in of(records, "device_sample") if sample["uuid"] == "GPU-a"]
    times_ns = [sample["time_ns"] for sample in samples]
    assert times_ns == sorted(times_ns)
    assert len(of(records, "device_sample")) == 2 * len(samples)
    # Of 31 some may be missing on a busy machine: a round that would come late is left out.
    assert 8 <= len(samples) <= 31
    later = [sample for sample in samples if sample["time_ns"] > times_ns[0] + 1.5e9]
    assert len(later) > 2
    for sample in later:
        assert (sample["gpu_ratio"], sample["power_w"], sample["power_average_w"]) == (0.98, 430, 430)
        assert (sample["sm_clock_hz"], sample["temperature_c"]) == (1755_000_000, 51)
        assert sample["memory_temperature_c"] == 70
        assert sample["pcie_tx_bytes_per_s"] == pytest.approx(20_000, rel=0.02)
    # A round held up for a millisecond or more is too near to the next: that one has no activities.
    with_gpm = [sample["gpm"] for sample in later if sample["gpm"]]
    assert with_gpm
    for gpm in with_gpm:
        assert (gpm["sm_ratio"], gpm["integer_ratio"]) == pytest.approx((0.91, 0.4))
        assert gpm["period_ns"] >= PERIOD_MIN_NS
    energy = [sample["energy_j"] for sample in samples]
    assert all(after > before for before, after in itertools.pairwise(energy))
    with_cycles = [gpm for gpm in with_gpm if gpm.get("sm_elapsed_cycles")]
    assert 1 <= len(with_cycles) <= 3  # once a second
    assert len(of(records, "process_sample")) == 4
    assert of(records, "gap") == []
    assert records[-1] == {"samples": 0}


def test_a_late_read_takes_nothing_from_the_next(play):
    """The next is no later for it: a stream that went on would be heard a whole period after that."""
    records = play(TWO_GPUS, STREAM.format(late_s=(0, 0.35, 0, 0)))
    reads = [index for index, record in enumerate(records) if "read" in record]
    samples = [sum(sample["uuid"] == "GPU-a" for sample in of(records[start:end], "device_sample"))
               for start, end in zip(reads, [*reads[1:], len(records)], strict=True)]
    assert samples[0] == 1
    assert all(2 <= read <= 10 for read in samples[1:])
    assert samples[2] <= 1 + 7  # from 0.35 s on


def test_a_driver_that_is_slow_once_a_second_is_looked_at_ten_times_all_the_same(play):
    slow = STREAM.replace("nvml.ANSWER_WAIT_S = 0.5", """nvml.ANSWER_WAIT_S = 0.05
from gpuguard.sensors.nvml.driver import Driver
sweep = Driver.sweep
Driver.sweep = lambda self, now_ns: (time.sleep(0.15), sweep(self, now_ns))[1]
""")
    records = play(TWO_GPUS, slow.format(late_s=(0, 0, 0, 0)))
    assert sum(sample["uuid"] == "GPU-a" for sample in of(records, "device_sample")) > 12


#: The script's clock stands still while rounds are made, so what becomes of them is the same each time.
ROUNDS = """
import pynvml
from gpuguard.sensors.nvml.driver import Driver
driver = Driver(pynvml)
driver.open(at(0))
show(driver.sweep(at(1)).blocks)
for second in (2, 3, 4):
    at(second)
    print(json.dumps(second))
    show(driver.stream(3, 1_000_000, 1 << 62).blocks)
show(driver.sweep(at(10)).blocks)
driver.close()
import ctypes
print(json.dumps({"samples": ctypes.CDLL("libnvidia-ml.so.1").standin_gpm_samples()}))
"""


def by_stream(records):
    """Return who was sampled, and the gaps, of each of the three streams of `ROUNDS`; the sweep goes with the last."""
    cuts = [index for index, record in enumerate(records) if isinstance(record, int)]
    told = [records[start + 1 : end] for start, end in zip(cuts, [*cuts[1:], len(records) - 1], strict=True)]
    return [({sample["uuid"] for sample in of(part, "device_sample")}, [gap["reason"] for gap in of(part, "gap")])
            for part in told]


def test_a_device_that_is_lost_within_a_stream_leaves_the_others_alone(play):
    records = play(TWO_GPUS + "fail 3 gpu_lost device 1 until 9\n", ROUNDS)
    first, second, third = by_stream(records)
    assert first == ({"GPU-a", "GPU-b"}, [])
    assert second == ({"GPU-a"}, ["GPU 1 (GPU-b) does not answer any more: GPU is lost"])
    assert third == ({"GPU-a", "GPU-b"}, ["GPU 1 (GPU-b) answers again"])
    assert records[-1] == {"samples": 0}


def test_a_driver_that_dies_within_a_stream_is_one_gap(play):
    first, second, third = by_stream(play(TWO_GPUS + "fail 3 driver_dead until 9\n", ROUNDS))
    assert first == ({"GPU-a", "GPU-b"}, [])
    assert second == (set(), ["the driver does not answer any more: Driver Not Loaded"])
    assert third == ({"GPU-a", "GPU-b"}, ["the driver answers again"])


def test_what_fails_for_a_stream_is_told_when_it_begins_and_when_it_ends(play):
    records = play(TWO_GPUS + "fail 3 timeout device 1 until 4\n", ROUNDS)
    _, (sampled, began), (after, ended) = by_stream(records)
    assert (sampled, after) == ({"GPU-a"}, {"GPU-a", "GPU-b"})  # what is held makes no sample
    whats = [[reason.removeprefix("GPU 1 (GPU-b): ").partition(" can")[0] for reason in reasons]
             for reasons in (began, ended)]
    assert sorted(whats[0]) == sorted(whats[1]) == ["GPM", "field values", "sm clock", "utilization"]
    assert all("cannot be read" in reason for reason in began)
    assert all("can be read again" in reason for reason in ended)


def test_what_is_slow_is_held_over_a_stream_and_asked_for_no_more(play):
    records = play(TWO_GPUS + "at 2 device 0 gpu 50 temperature 60\n", ROUNDS)
    samples = [sample for sample in of([one for one in records if isinstance(one, dict)], "device_sample")
               if sample["uuid"] == "GPU-a"]
    assert [sample["gpu_ratio"] for sample in samples] == [0.98] + [0.5] * (len(samples) - 1)
    assert [sample["temperature_c"] for sample in samples] == [51] * (len(samples) - 1) + [60]
    assert len({sample["time_ns"] for sample in samples}) == len(samples) >= 5


def test_a_board_whose_calls_changed_is_streamed_all_the_same(play):
    """The first pair of GPM samples tells which metrics there are: from then on others are asked for."""
    records = play(TWO_GPUS + "not_supported gpm_257\nrefuse gpm_172 invalid_argument\n", """
        import pynvml
        from gpuguard.sensors.nvml.driver import Driver
        driver = Driver(pynvml)
        driver.open(at(0))
        for second in (1, 2):
            show(driver.sweep(at(second)).blocks)
        at(3)
        show(driver.stream(1, 1_000_000, 1 << 62).blocks)
    """)
    assert [gap["reason"].partition(": ")[2] for gap in of(records, "gap")] == [
        "context_switches_per_s, integer_active_cycles"] * 2
    a, b = of(records, "device_sample")[-2:]
    assert (a["uuid"], b["uuid"], a["gpu_ratio"], b["gpu_ratio"]) == ("GPU-a", "GPU-b", 0.98, 0.05)
    assert (a["gpm"], b["gpm"]) == (None, None)  # a millisecond is no window
