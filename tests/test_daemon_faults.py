"""What goes wrong around the guard costs what it must, is said, and costs no more."""

from __future__ import annotations

import io
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest

from gpuguard import daemon as daemon_module
from gpuguard import eyes as eyes_module
from gpuguard.broker_client import BrokerGone
from gpuguard.config import Config, MetricsSettings, RecordingSettings
from gpuguard.core.egress import EgressPolicy
from gpuguard.core.evidence import Evidence
from gpuguard.core.host import Host
from gpuguard.core.policy import DEFAULT_POLICY
from gpuguard.core.records import Block, Gap, HostInfo, ProcessStarted, Tick
from gpuguard.daemon import Daemon, Start
from gpuguard.messages import Answer, Done, Request, Watching, Welcome
from gpuguard.outputs import event_log
from gpuguard.outputs.event_log import EventLog
from gpuguard.recording.reader import read_recording
from gpuguard.sensors import EyeClosed, nvml, packets, processes
from tests.core.builders import BOOT, SECOND, T0, evidence, pid, started


class Broker:
    """A broker that says yes to everything, until it is gone."""

    def __init__(self) -> None:
        self.ours, self.theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.descriptor = self.ours.fileno()
        self.gone = False
        self.asked: list[Request] = []

    def ask(self, request: Request) -> tuple[Answer, tuple[int, ...]]:
        if self.gone:
            raise BrokerGone("it has ended")
        self.asked.append(request)
        if type(request).__name__ == "Hello":
            return Welcome(boot_id=BOOT, hostname="node", clock_ticks_per_s=100, enforcing=False, eyes={}), ()
        return Done(), ()


class Eye:
    """A sensor that gives what it was given to give, and raises what it was given to raise."""

    period_ns = SECOND
    descriptor = None

    def __init__(self, name: str, gives: list[Block | Exception]) -> None:
        self.name = name
        self.gives = gives
        self.closed = False

    def read(self, now_ns: int) -> list[Block]:
        one = self.gives.pop(0) if self.gives else None
        if isinstance(one, Exception):
            raise one
        return [one] if one else []

    def close(self) -> None:
        self.closed = True
        raise OSError("it would not close")


class Clock(SimpleNamespace):
    """Both clocks, in the hand of the test."""

    def __init__(self) -> None:
        super().__init__(wall=T0, boot=0)

    def time_ns(self) -> int:
        return self.wall

    def monotonic_ns(self) -> int:
        return self.boot

    def pass_s(self, seconds: float, *, wall_s: float | None = None) -> None:
        self.boot += int(seconds * SECOND)
        self.wall += int((seconds if wall_s is None else wall_s) * SECOND)


class Watched(Daemon):
    """Remembers what it was fed."""

    fed: list[Block]

    def feed(self, block: Block) -> None:
        self.fed = [*getattr(self, "fed", []), block]
        super().feed(block)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    one = Clock()
    monkeypatch.setattr(daemon_module, "time", one)
    monkeypatch.setattr(eyes_module, "time", one)
    return one


@pytest.fixture
def eyes(monkeypatch: pytest.MonkeyPatch) -> dict[str, Eye | Exception]:
    """Return what nvml and processes open as; there are no others."""
    table: dict[str, Eye | Exception] = {}

    def opening(name: str) -> object:
        def open_sensor(broker: object, config: object) -> Eye:
            one = table[name]
            if isinstance(one, Exception):
                raise one
            return one
        return open_sensor

    monkeypatch.setattr(eyes_module, "sensor_names", lambda: sorted(table))
    monkeypatch.setattr(nvml, "open_sensor", opening("nvml"))
    monkeypatch.setattr(processes, "open_sensor", opening("processes"))
    return table


@pytest.fixture
def broker() -> Iterator[Broker]:
    one = Broker()
    yield one
    one.ours.close()
    one.theirs.close()


def guard_process(broker: Broker, folder: Path, **settings: object) -> Watched:
    config = msgspec.structs.replace(Config(), recording=RecordingSettings(directory="rec"), **settings)
    one = Watched(broker, Start(config=config, policy=DEFAULT_POLICY), folder)  # type: ignore[arg-type]
    one._greet()
    return one


def fed(one: Watched, kind: type) -> list[Block]:
    return [block for block in one.fed if isinstance(block, kind)]


def test_an_eye_that_stumbles_is_closed_said_and_tried_again(
    broker: Broker, eyes: dict[str, Eye | Exception], clock: Clock, tmp_path: Path,
) -> None:
    bad = Eye("nvml", [KeyError("GPU 7")])
    good = Eye("processes", [started(pid(n)) for n in range(1, 9)])
    eyes |= {"nvml": bad, "processes": good}
    guard = guard_process(broker, tmp_path)
    for _ in range(3):
        guard._step()
        clock.pass_s(1)
    (gap,) = fed(guard, Gap)
    assert gap.sensor == "nvml"
    assert "KeyError" in gap.reason
    assert bad.closed
    assert len(fed(guard, ProcessStarted)) == 3, "the other eye goes on"
    eyes["nvml"] = again = Eye("nvml", [started(pid(77))])
    clock.pass_s(30)
    guard._step()
    assert again.gives == []
    guard._close()


def test_packets_that_were_taken_are_recorded_though_the_broker_ends_before_it_says_who_dialled(
    broker: Broker, eyes: dict[str, Eye | Exception], clock: Clock, tmp_path: Path,
) -> None:
    guard = guard_process(broker, tmp_path)
    taken = Gap(T0, "packets", "and packets")
    ended = BrokerGone("it has ended")
    guard._eyes._open |= {"packets": Eye("packets", [taken]), "processes": Eye("processes", [ended])}
    with pytest.raises(BrokerGone):
        guard._read("packets")
    guard._close()
    assert taken in list(read_recording(tmp_path / "rec"))


def test_a_guard_that_is_asked_to_end_opens_no_further_eye(
    broker: Broker, eyes: dict[str, Eye | Exception], clock: Clock, tmp_path: Path,
) -> None:
    eyes |= {"nvml": Eye("nvml", []), "processes": Eye("processes", [])}
    guard = guard_process(broker, tmp_path)
    guard._on_signal(15, None)
    guard._step()
    assert guard._eyes.open == []
    guard._close()


@pytest.mark.parametrize(("recorded", "egress", "brief"), [
    ("", (), True), ("rec", (), False), ("", (EgressPolicy(name="jobs"),), False)])
def test_what_packets_name_is_read_where_policy_or_a_recording_may_ask_for_it(
    broker: Broker, clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recorded: str,
    egress: tuple[EgressPolicy, ...], brief: bool,
) -> None:
    asked: list[bool] = []

    def open_sensor(_broker: object, _config: object, *, brief: bool) -> Eye:
        asked.append(brief)
        return Eye("packets", [])

    monkeypatch.setattr(eyes_module, "sensor_names", lambda: ["packets"])
    monkeypatch.setattr(packets, "open_sensor", open_sensor)
    config = msgspec.structs.replace(Config(), recording=RecordingSettings(directory=recorded))
    policy = msgspec.structs.replace(DEFAULT_POLICY, egress=egress)
    guard = Watched(broker, Start(config=config, policy=policy), tmp_path)  # type: ignore[arg-type]
    guard._greet()
    guard._step()
    guard._close()
    assert asked == [brief]


def test_it_says_that_it_watches_once_all_eyes_were_tried_and_then_as_its_loop_turns(
    broker: Broker, eyes: dict[str, Eye | Exception], clock: Clock, tmp_path: Path,
) -> None:
    def told() -> list[str]:
        return [one.status for one in broker.asked if isinstance(one, Watching)]

    eyes |= {"nvml": EyeClosed("no driver"), "processes": Eye("processes", [])}
    guard = guard_process(broker, tmp_path)
    guard._open_eyes(clock.monotonic_ns())
    assert told() == []
    guard._say_watching()
    guard._step()
    assert told() == ["observe: processes; closed: nvml"]
    clock.pass_s(4.9)
    guard._step()
    assert len(told()) == 1
    clock.pass_s(0.1)
    guard._step()
    assert len(told()) == 2
    eyes["nvml"] = Eye("nvml", [])
    clock.pass_s(30)
    guard._step()
    assert told()[2:] == ["observe: nvml, processes"]
    guard._close()


def test_a_gap_that_goes_on_is_in_the_events_each_time_and_said_once_an_hour(
    broker: Broker, eyes: dict[str, Eye | Exception], clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    said: list[tuple[str, str]] = []
    monkeypatch.setattr(daemon_module, "log", SimpleNamespace(
        warning=lambda _event, *, sensor, reason: said.append((sensor, reason))))
    guard = guard_process(broker, tmp_path)
    for minute in range(121):
        guard.feed(Gap(T0 + minute * 60 * SECOND, "processes", "gone before they could be read"))
        guard.feed(Gap(T0 + minute * 60 * SECOND, "sockets", f"{minute} could not be read"))
    guard.feed(Gap(T0 - SECOND, "processes", "gone before they could be read"))
    guard._close()
    assert [sensor for sensor, _ in said].count("sockets") == 121
    assert [sensor for sensor, _ in said].count("processes") == 4, "at once, after 1 h, after 2 h, by a clock set back"
    written = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert len([one for one in written if one["type"] == "gap"]) == 243


def test_an_eye_that_cannot_even_be_opened_is_a_gap_once(
    broker: Broker, eyes: dict[str, Eye | Exception], clock: Clock, tmp_path: Path,
) -> None:
    eyes |= {"nvml": RuntimeError("no such symbol"), "processes": Eye("processes", [started(pid(1))])}
    guard = guard_process(broker, tmp_path)
    for _ in range(3):
        guard._step()
        clock.pass_s(40)
    assert [(gap.sensor, gap.reason) for gap in fed(guard, Gap)] == [("nvml", "RuntimeError: no such symbol")]
    assert len(fed(guard, ProcessStarted)) == 1
    guard._close()


def test_a_clock_that_is_set_back_stops_nothing(
    broker: Broker, eyes: dict[str, Eye | Exception], clock: Clock, tmp_path: Path,
) -> None:
    eyes["processes"] = Eye("processes", [started(pid(n)) for n in range(1, 99)])
    guard = guard_process(broker, tmp_path)
    guard._step()
    clock.pass_s(1, wall_s=-3_600)
    for _ in range(10):
        guard._step()
        clock.pass_s(1)
    assert len(fed(guard, Tick)) == 11
    assert len(fed(guard, ProcessStarted)) == 11
    guard._close()


class Always:
    """A detector that is certain of something at every tick."""

    def receive(self, item: object, host: Host) -> list[Evidence]:
        return [evidence(40.0, subject=pid(5), time_ns=item.time_ns)] if isinstance(item, Tick) else []


def test_what_was_seen_is_on_disk_when_the_broker_goes_with_a_decision_on_its_way(
    broker: Broker, eyes: dict[str, Eye | Exception], clock: Clock, tmp_path: Path,
) -> None:
    guard = guard_process(broker, tmp_path)
    guard.feed(started(pid(5)))
    guard._guard._detectors = [Always()]
    broker.gone = True
    guard._close()
    read = list(read_recording(tmp_path / "rec"))
    assert [type(block) for block in read] == [HostInfo, ProcessStarted, Tick]
    assert any(json.loads(line)["type"] == "decision" for line in (tmp_path / "events.jsonl").read_text().splitlines())


def test_metrics_that_cannot_be_written_or_served_stop_nothing(
    broker: Broker, eyes: dict[str, Eye | Exception], clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("GPUGUARD_RUNTIME_DIR", str(tmp_path / "run"))
    settings = MetricsSettings(textfile="no/such/folder/gpuguard.prom", listen="192.0.2.1:9400")
    guard = guard_process(broker, tmp_path, metrics=settings)
    guard._listen()
    assert any(gap.sensor == "metrics" and "loopback" in gap.reason for gap in fed(guard, Gap))
    for _ in range(3):
        guard._step()
        clock.pass_s(20)
    assert len(fed(guard, Tick)) == 3
    guard._close()


class Disk(io.FileIO):
    """A file on a disk that takes five bytes more when it is full."""

    full = False

    def write(self, data: bytes) -> int:
        return super().write(data[:5] if self.full else data)


def test_a_full_disk_tears_no_line_and_the_loss_is_the_next_one(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    log = EventLog(path)
    log._stream.close()
    log._stream = disk = Disk(path, "ab")
    said = [Gap(time_ns=T0 + n, sensor="nvml", reason=str(n)) for n in range(5)]
    log.write(said[0])
    disk.full = True
    log.write(said[1])
    log.write(said[2])
    disk.full = False
    log.write(said[3])
    log.write(said[4])
    log.close()
    lines = [json.loads(line) for line in path.read_bytes().splitlines()]
    assert [(line["sensor"], line["reason"], line["lost"]) for line in lines] == [
        ("nvml", "0", None), ("events", "events could not be written", 2), ("nvml", "3", None), ("nvml", "4", None)]


def test_a_loss_that_no_later_event_tells_is_the_last_line(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    log = EventLog(path)
    log._stream.close()
    log._stream = disk = Disk(path, "ab")
    disk.full = True
    log.write(Gap(time_ns=T0, sensor="nvml", reason="not written"))
    disk.full = False
    log.close()
    [line] = [json.loads(line) for line in path.read_bytes().splitlines()]
    assert (line["sensor"], line["lost"], line["time_ns"]) == ("events", 1, T0)


def test_a_full_log_is_turned_and_no_event_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_log, "FILE_BYTES_MAX", 400)
    log = EventLog(tmp_path / "events.jsonl")
    said = [Gap(time_ns=T0 + n, sensor="nvml", reason=str(n)) for n in range(5)]
    for one in said[:4]:
        log.write(one)
    (tmp_path / "events.jsonl.1").unlink()
    (tmp_path / "events.jsonl.1").mkdir()
    (tmp_path / "events.jsonl.1" / "in the way").touch()
    for one in said * 2:
        log.write(one)
    (tmp_path / "events.jsonl.1" / "in the way").unlink()
    (tmp_path / "events.jsonl.1").rmdir()
    log.write(said[0])
    log.close()
    lines = (tmp_path / "events.jsonl").read_text().splitlines()
    assert [json.loads(line)["sensor"] for line in lines] == ["events", "nvml"]
    assert (tmp_path / "events.jsonl.1").stat().st_size <= 400
