"""The guard process: waits on the sensors, hands blocks to the recorder and to `core.Guard`, carries out what follows.

It runs without privileges beside a broker that has them (ADR 0001). It owns time: every block passes through `feed`
once, in order of arrival, is recorded, and only then judged, so that a recording replays to the same events.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import selectors
import signal
import socket
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Protocol

import msgspec
import structlog

from gpuguard import confine, logs, paths
from gpuguard.broker_client import BrokerClient, BrokerGone
from gpuguard.config import Config
from gpuguard.core.bounded import BoundedTable
from gpuguard.core.detectors import new_detectors
from gpuguard.core.events import Decision, Event, Finding, FlowReport, FlowReports, Incident
from gpuguard.core.guard import Explanation, Guard, ProcessVerdict
from gpuguard.core.policy import Policy
from gpuguard.core.records import SCHEMA_VERSION, ActionOutcome, Approval, Block, Gap, HostInfo, Tick
from gpuguard.counters.shipped import shipped_model
from gpuguard.eyes import Eyes, sensor_names
from gpuguard.messages import Act, Acted, Audit, Hello, ListActions, Refused, Watching, Welcome
from gpuguard.outputs.event_log import EventLog
from gpuguard.recording.writer import Recorder
from gpuguard.sensors import is_due, next_ns
from gpuguard.signature_files import shipped, shipped_texts

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from gpuguard.api.service import ApiServer
    from gpuguard.outputs.prometheus import Metrics

log = structlog.get_logger("gpuguard")

PROTOCOL_VERSION = 1
NEWS_NS = 1_000_000_000
#: A service manager's WatchdogSec= has to be several times as long.
WATCHING_NS = 5_000_000_000
TEXTFILE_NS = 15_000_000_000
ANSWERS_MAX = 1_024
GAP_SAID_NS = 3_600_000_000_000
GAPS_SAID_MAX = 256

#: What sensors import when they open.
CODE_LATER = (
    "concurrent.futures.thread",
    "encodings.idna",
    "gpuguard._launches",
    "gpuguard._packets",
    "gpuguard._processes",
    "opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc",
    "psutil",
    "pynvml",
)


class Start(msgspec.Struct, frozen=True):
    """What the broker hands to the guard at its start: all that was read with privileges."""

    config: Config
    policy: Policy


class Subscriber(Protocol):
    """Takes events as they come, on the guard's thread: it must not block."""

    def __call__(self, event: Event) -> None:
        """Take one event."""
        ...


def host_info(welcome: Welcome, start: Start, seed: int, time_ns: int) -> HostInfo:
    """Return the first record: whose records these are, and the settings that replay needs to judge as we did."""
    return HostInfo(
        time_ns=time_ns,
        schema_version=SCHEMA_VERSION,
        boot_id=welcome.boot_id,
        hostname=welcome.hostname,
        clock_ticks_per_s=welcome.clock_ticks_per_s,
        addresses=_addresses(),
        settings={
            "guard": msgspec.json.encode(start.config.guard).decode(),
            "policy": msgspec.json.encode(start.policy).decode(),
            "signatures": msgspec.json.encode(shipped_texts()).decode(),
            "counter_model": shipped_model().digest,
            "seed": str(seed),
        },
    )


class Daemon:
    """One life of the guard. Other threads (the API) may call the methods that say so."""

    def __init__(self, broker: BrokerClient, start: Start, guard_dir: Path) -> None:
        self._broker = broker
        self._start = start
        config = start.config
        # A secret one: who chooses addresses must not choose what meets in a table. A recording has it for its replay.
        self._seed = int.from_bytes(os.urandom(8))
        self._guard = Guard(
            start.policy, mode=config.guard.mode, alarms_per_gpu_year=config.guard.alarms_per_gpu_year,
            counter_alarms_per_gpu_year=config.guard.counter_alarms_per_gpu_year,
            signatures=shipped(), counter_model=shipped_model(), quiet=True, seed=self._seed)
        self._events = EventLog(guard_dir / "events.jsonl")
        self._recorder = _recorder(config, guard_dir)
        self._due_ns: dict[str, int] = {}
        self._selector = selectors.DefaultSelector()
        self._lock = threading.RLock()
        self._answers: deque[Approval] = deque(maxlen=ANSWERS_MAX)
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._stop_signal = 0
        self._subscribers: list[Subscriber] = []
        self._gaps_said: BoundedTable[tuple[str, str], int] = BoundedTable(GAPS_SAID_MAX)
        self._known_outcomes: deque[tuple[str, str]] = deque(maxlen=ANSWERS_MAX)
        self._api: ApiServer | None = None
        self._metrics = _metrics(config)
        self._textfile = guard_dir / config.metrics.textfile if config.metrics.textfile else None
        # Only policy goes by the names that others ask for and call, and who replays a recording may want to.
        self._eyes = Eyes(broker, config, self._selector, self._metrics,
                          brief=not (start.policy.egress or self._recorder))

    # -- the loop -----------------------------------------------------------------------------------------------------

    def run(self) -> int:
        """Watch until a signal says stop or the broker is gone; return the exit status."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        self._selector.register(self._wake_read, selectors.EVENT_READ, "")
        self._selector.register(self._broker.descriptor, selectors.EVENT_READ, "broker")
        try:
            self._greet()
            self._listen()
            self._open_eyes(time.monotonic_ns())
            self._say_watching()
            while not self._stop_signal:
                self._step()
        except BrokerGone as gone:
            log.error("the broker is gone: what it undoes it undoes alone", reason=str(gone))
            return 1
        finally:
            self._close()
        return 0

    def _greet(self) -> None:
        answer, _ = self._broker.ask(Hello(version=PROTOCOL_VERSION))
        if not isinstance(answer, Welcome):
            message = f"the broker answered {answer}"
            raise BrokerGone(message)
        self.feed(host_info(answer, self._start, self._seed, time.time_ns()))
        self._audit("started", {"mode": self._start.config.guard.mode, "eyes": answer.eyes})

    def _listen(self) -> None:
        """Serve the API and the metrics; without them the guard still guards."""
        from gpuguard.api import socket_path
        from gpuguard.api.service import ApiServer, SocketTaken

        if self._textfile:
            self._due_ns["metrics"] = 0
        try:
            self._api = ApiServer(self, socket_path())
        except (OSError, SocketTaken) as error:
            log.error("no API", reason=str(error))
            self.feed(Gap(time_ns=time.time_ns(), sensor="api", reason=str(error)))
        if not (self._metrics and self._start.config.metrics.listen):
            return
        try:
            self._metrics.serve(self._start.config.metrics.listen)
        except (OSError, ValueError) as error:
            log.error("no metrics", reason=str(error))
            self.feed(Gap(time_ns=time.time_ns(), sensor="metrics", reason=str(error)))

    def _say_watching(self) -> None:
        """Tell whoever started us that this is all: every eye was tried. Why one is closed was told when it was."""
        log.info("watching", eyes=self._eyes.open, closed=self._eyes.closed, mode=self._start.config.guard.mode,
                 state=str(paths.state_dir()), audit=str(paths.log_dir()))
        self._due_ns["watching"] = 0

    def _tell_watching(self) -> None:
        """Have the service manager told that this loop turns, and what it looks through."""
        told = f"{self._start.config.guard.mode}: {', '.join(self._eyes.open) or 'no eye is open'}"
        closed = f"; closed: {', '.join(closed)}" if (closed := self._eyes.closed) else ""
        self._broker.ask(Watching(told + closed))

    def _step(self) -> None:
        # What is due goes by a clock that nobody can set; records carry the time of day.
        now_ns = time.monotonic_ns()
        self._open_eyes(now_ns)
        for key, _ in self._selector.select(self._timeout_s(now_ns)):
            if key.data == "broker":
                message = "it closed its end"
                raise BrokerGone(message)
            if key.data:
                self._read(key.data)
            else:
                self._drain_wake()
        now_ns = time.monotonic_ns()
        for name in self._eyes.due(now_ns):
            self._read(name)
        for name in [name for name, due_ns in self._due_ns.items() if due_ns <= now_ns]:
            self._on_timer(name, now_ns)

    def _on_timer(self, name: str, now_ns: int) -> None:
        if name == "tick":
            self._due_ns[name] = next_ns(now_ns, self._start.config.guard.tick_ms * 1_000_000)
            self.feed(Tick(time_ns=time.time_ns()))
            return
        if name == "news":
            self._due_ns[name] = next_ns(now_ns, NEWS_NS)
            self._hear_news()
            return
        if name == "watching":
            self._due_ns[name] = next_ns(now_ns, WATCHING_NS)
            self._tell_watching()
            return
        if name == "metrics" and self._metrics and self._textfile:
            self._due_ns[name] = next_ns(now_ns, TEXTFILE_NS)
            try:
                self._metrics.write_textfile(self._textfile)
            except OSError as error:
                log.error("metrics not written", path=str(self._textfile), reason=str(error))

    def _timeout_s(self, now_ns: int) -> float:
        self._due_ns.setdefault("tick", now_ns)
        eyes_ns = self._eyes.next_due_ns()
        due_ns = min(self._due_ns.values()) if eyes_ns is None else min(eyes_ns, *self._due_ns.values())
        return max(0.0, (due_ns - now_ns) / 1e9)

    def _open_eyes(self, now_ns: int) -> None:
        for name in self._eyes.to_open(now_ns):
            if self._stop_signal:
                return
            gap = self._eyes.try_open(name, now_ns)
            if gap:
                self.feed(gap)

    def _read(self, name: str) -> None:
        blocks = self._eyes.read(name)
        try:
            if name == "packets" and blocks:
                # Who dialled these is known by now, and is told before them: a refused connection ends as it began.
                self._read("processes")
        finally:
            # Though the broker be gone: what was taken from a ring is nowhere else.
            for block in blocks:
                self.feed(block)

    # -- one block ----------------------------------------------------------------------------------------------------

    def feed(self, block: Block) -> None:
        """Record one block, judge it, and carry out what follows."""
        with self._lock:
            waiting: deque[Block] = deque([block])
            while waiting:
                one = waiting.popleft()
                if self._recorder:
                    waiting.extend(self._recorder.write(one))
                if self._metrics:
                    self._metrics.receive(one)
                for event in self._guard.receive(one):
                    waiting.extend(self._handle(event))
        self._eyes.notice(block)

    def _handle(self, event: Event) -> list[Block]:
        """Write one event down, tell who listens, and return the records that it gives rise to."""
        if isinstance(event, FlowReports) or (isinstance(event, FlowReport) and event.finding.label == "other"):
            return []
        self._events.write(event)
        if self._metrics and not isinstance(event, Gap):
            self._metrics.receive(event)
        for subscriber in self._subscribers:
            subscriber(event)
        match event:
            case Finding():
                log.info("finding", label=event.label, verdict=event.verdict, subject=str(event.subject), id=event.id)
            case Gap():
                self._say_gap(event)
            case Decision():
                return self._decide(event)
            case _:
                pass
        return []

    def _say_gap(self, gap: Gap) -> None:
        """Say what could not be looked at: what goes on is said now and then, and each time in the events."""
        if is_due(gap.time_ns, self._gaps_said.get((gap.sensor, gap.reason)) or 0, GAP_SAID_NS):
            self._gaps_said[gap.sensor, gap.reason] = gap.time_ns
            log.warning("gap", sensor=gap.sensor, reason=gap.reason)

    # -- acting -------------------------------------------------------------------------------------------------------

    def _decide(self, decision: Decision) -> list[Block]:
        self._audit("decision", msgspec.to_builtins(decision))
        log.info("decision", rung=decision.rung, rule=decision.rule, mode=decision.mode, id=decision.id)
        if decision.rung in ("observe", "notify"):
            return [self._outcome(decision, "done", "written to the log")]
        if decision.mode == "observe":
            asked = ", after a person's approval" if decision.needs_approval else ""
            return [self._outcome(decision, "would_have", f"would {decision.rung}{asked}: mode is observe")]
        if decision.needs_approval:
            return []
        return self._act(decision)

    def _act(self, decision: Decision) -> list[Block]:
        target = decision.target
        if target is None or decision.rung not in ("isolate", "throttle", "pause", "kill"):
            return [self._outcome(decision, "refused", f"{decision.rung}: nobody to do it to, or no way to do it yet")]
        answer, _ = self._broker.ask(Act(
            decision_id=decision.id,
            action=decision.rung,
            target=target.process,
            cgroup=target.cgroup,
            cgroup_id=target.cgroup_id,
            ttl_s=decision.ttl_s,
            approved_by=decision.approved_by,
            reason=decision.reason,
        ))
        if isinstance(answer, Acted):
            self._due_ns.setdefault("news", 0)
            self._known_outcomes.extend((o.decision_id, o.outcome) for o in answer.outcomes)
            return list(answer.outcomes)
        reason = answer.reason if isinstance(answer, Refused) else f"the broker answered {type(answer).__name__}"
        return [self._outcome(decision, "refused", reason)]

    def _hear_news(self) -> None:
        """Hear what became of acts since: expired, undone by an operator, failed to hold."""
        answer, _ = self._broker.ask(ListActions())
        for outcome in answer.outcomes if isinstance(answer, Acted) else ():
            if (outcome.decision_id, outcome.outcome) not in self._known_outcomes:
                self._known_outcomes.append((outcome.decision_id, outcome.outcome))
                self.feed(outcome)

    def _outcome(self, decision: Decision, outcome: str, text: str) -> ActionOutcome:
        return ActionOutcome(
            time_ns=decision.time_ns,
            decision_id=decision.id,
            action=decision.rung,
            outcome=outcome,  # type: ignore[arg-type]
            text=text,
            process=decision.target.process if decision.target else None,
        )

    def _audit(self, kind: str, body: dict[str, object]) -> None:
        try:
            answer, _ = self._broker.ask(Audit(time_ns=time.time_ns(), kind=kind, body=body))
        except ValueError as error:
            answer = Refused(str(error))
        if isinstance(answer, Refused):
            log.error("the audit log refused an entry", kind=kind, reason=answer.reason)

    # -- for the API, from its threads --------------------------------------------------------------------------------

    def processes(self) -> list[ProcessVerdict]:
        """Return how every process stands. Any thread."""
        with self._lock:
            return self._guard.processes()

    def explain(self, of: int | str) -> Explanation | None:
        """Return how one process or GPU stands, None if it is not known. Any thread."""
        with self._lock:
            return self._guard.explain(of)

    def incidents(self) -> list[Incident]:
        """Return all incidents, newest touched last. Any thread."""
        with self._lock:
            return self._guard.incidents.all()

    def incident(self, incident_id: str) -> Incident | None:
        """Return one incident. Any thread."""
        with self._lock:
            return self._guard.incidents.get(incident_id)

    def subscribe(self, subscriber: Subscriber) -> Callable[[], None]:
        """Call ``subscriber`` with every event from now on; return how to end that. Any thread."""
        with self._lock:
            self._subscribers.append(subscriber)

        def end() -> None:
            with self._lock, contextlib.suppress(ValueError):
                self._subscribers.remove(subscriber)

        return end

    def decide(self, decision_id: str, answer: str, by: str, reason: str) -> bool:
        """Take a person's answer; False if no such decision waits. Any thread."""
        with self._lock:
            if decision_id not in {d.id for d in self._guard.pending()}:
                return False
            self._answers.append(Approval(
                time_ns=time.time_ns(),
                decision_id=decision_id,
                answer=answer,  # type: ignore[arg-type]
                by=by,
                reason=reason,
            ))
        self._wake()
        return True

    # -- signals and the end ------------------------------------------------------------------------------------------

    def _on_signal(self, number: int, _frame: object) -> None:
        self._stop_signal = number
        self._wake()

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.write(self._wake_write, b"\0")

    def _drain_wake(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._wake_read, 4_096)
        while self._answers:
            approval = self._answers.popleft()
            self._audit("approval", msgspec.to_builtins(approval))
            self.feed(approval)

    def _close(self) -> None:
        """Judge what is left, and write everything down, with or without a broker to ask."""
        if self._api:
            self._api.stop(grace_s=0.1)
        self._eyes.close()
        now_ns = time.time_ns()
        try:
            self.feed(Tick(time_ns=now_ns))
            with self._lock:
                for event in self._guard.close(now_ns):
                    self._handle(event)
        except BrokerGone as gone:
            log.error("the broker is gone: the last decisions are not carried out", reason=str(gone))
        finally:
            if self._recorder:
                for gap in self._recorder.close(now_ns):
                    self._events.write(gap)
            self._events.close()


def main() -> int:
    """Be the guard of the broker that started us; return the exit status."""
    parser = argparse.ArgumentParser(prog="gpuguard.daemon", description=main.__doc__)
    for name in ("--broker-fd", "--start-fd", "--parent"):
        parser.add_argument(name, type=int, required=True)
    for name in ("--uid", "--gid"):
        parser.add_argument(name, type=int)
    arguments = parser.parse_args()
    logs.configure()
    _load_code()
    confine.drop(None if arguments.uid is None else (arguments.uid, arguments.gid), arguments.parent)
    with os.fdopen(arguments.start_fd, "rb") as stream:
        start = msgspec.json.decode(stream.read(), type=Start)
    try:
        daemon = Daemon(BrokerClient(arguments.broker_fd), start, paths.guard_state_dir())
    except OSError as error:
        log.error("the guard cannot write its state: may its user enter every folder above?", reason=str(error))
        return 3
    return daemon.run()


def _load_code() -> None:
    """Import what will be needed while it can still be read: the code may lie where only root may look."""
    new_detectors()
    shipped()
    shipped_model()
    names = [f"gpuguard.sensors.{name}" for name in sensor_names()]
    for name in [*names, "gpuguard.api.service", *CODE_LATER]:
        try:
            importlib.import_module(name)
        except ImportError as error:
            log.warning("not loaded", module=name, reason=str(error))


def _addresses() -> tuple[str, ...]:
    """Return the addresses of this host, as far as its own network namespace shows them."""
    import psutil

    try:
        interfaces = psutil.net_if_addrs()
    except OSError as error:
        log.warning("this host's addresses cannot be listed: those of its sockets will do", reason=str(error))
        return ()
    families = (socket.AF_INET, socket.AF_INET6)
    return tuple(sorted({
        one.address.partition("%")[0] for each in interfaces.values() for one in each if one.family in families}))


def _metrics(config: Config) -> Metrics | None:
    if not (config.metrics.listen or config.metrics.textfile):
        return None
    from gpuguard.outputs.prometheus import Metrics

    return Metrics()


def _recorder(config: Config, guard_dir: Path) -> Recorder | None:
    settings = config.recording
    if not settings.directory:
        return None
    return Recorder(
        guard_dir / settings.directory,
        file_bytes_max=settings.file_bytes_max,
        total_bytes_max=settings.total_bytes_max,
    )


if __name__ == "__main__":
    # Without taking the interpreter apart: all is written and closed by now, and that alone is half a second of a
    # processor, which on a busy host is more than the broker waits before it kills.
    os._exit(main())
