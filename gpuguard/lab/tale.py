"""What a run of the lab told, and whether the guard said what it must and nothing it must not.

The truth (pids, times) is the lab's own and never reached the guard; here alone the two are laid side by side. Delays
are measured to the moment at which a finding could be read by another program, not to the time written in it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from gpuguard.core.events import Event, Finding, Incident
from gpuguard.core.records import Gap
from gpuguard.core.subjects import FlowId
from gpuguard.ui.report import LeftAlone, Measure
from gpuguard.ui.story import accuses, process_words

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from gpuguard.core.events import ProcessBrief

REQUESTED_S = 1.0
USED_S = 1.0
CONFIRMED_S = 5.0
#: The tunnel's SYN follows its tool call within this.
SYN_WITHIN_NS = 5_000_000_000

_TUNNEL = ("ssh-reverse-tunnel", "ssh-reverse-shell")
_USED = "ssh-reverse-channel-open"


class Heard(msgspec.Struct, frozen=True):
    """An event of the guard, and when it could be read."""

    time_ns: int
    event: Event


class Call(msgspec.Struct, frozen=True):
    """A tool call as the agent made it."""

    call: str
    pid: int
    trace_id: str
    span_id: str
    start_ns: int
    cgroup: str


class Benign(msgspec.Struct, frozen=True):
    """Somebody who must be left alone."""

    what: str
    pids: tuple[int, ...]
    text: str


class Judgement(msgspec.Struct, frozen=True):
    """How the guard did. ``excused``: what could not be expected, since an eye was closed."""

    measures: tuple[Measure, ...]
    missing: tuple[str, ...]
    accused: tuple[str, ...]
    excused: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Return whether everything expected was found and nobody was accused who must not be.

        Delays hang on what else the machine does, the SSH login's own among them: `late` says them, the soak fails by
        them.
        """
        return not (self.missing or self.accused)

    @property
    def late(self) -> tuple[str, ...]:
        """Return what was found later than aimed at."""
        return tuple(m.what for m in self.measures if m.value_s is not None and m.value_s > m.target_s)


class Tale:
    """Takes the lines of a lab as they come."""

    def __init__(self) -> None:
        self.heard: list[Heard] = []
        self.calls: dict[str, Call] = {}
        self.benign: list[Benign] = []
        self.session: tuple[int, ...] = ()
        self.first_use_ns: int | None = None
        self.first_launch_ns: int | None = None
        self.failures: list[str] = []
        self.recorded = ""
        self._syns: list[tuple[int, int]] = []

    def take(self, line: dict[str, Any]) -> Event | None:
        """Take one line; return the guard's event if it holds one."""
        match line["kind"]:
            case "event":
                event = msgspec.convert(line["event"], Event)
                self.heard.append(Heard(line["time_ns"], event))
                return event  # type: ignore[no-any-return]
            case "tool_call" if "call" in line:
                self.calls[line["call"]] = msgspec.convert(line, Call)
            case "tool_call":
                self.failures.append(f"a span was not taken: {line['lost_span']} ({line['reason']})")
            case "benign":
                self.benign.append(msgspec.convert(line, Benign))
            case "syn":
                self._syns.append((line["syn_ns"], line["source_port"]))
            case "first_use":
                self.first_use_ns = line["used_ns"]
            case "first_launch":
                self.first_launch_ns = line["launched_ns"]
            case "tunnel_session":
                self.session = tuple(line["pids"])
            case "guard_failed":
                self.failures.append(f"the guard ended with status {line['status']}: {line['text']}")
            case _:
                pass
        return None

    def events(self) -> list[Event]:
        """Return the guard's events in order."""
        return [one.event for one in self.heard]

    def tunnel_syn(self) -> tuple[int, int | None]:
        """Return when the tunnel's connection was opened and its source port.

        Where the link cannot tell, it is when the tool call began, which is earlier, and no port.
        """
        start_ns = self.calls["tunnel"].start_ns
        after = [syn for syn in self._syns if start_ns <= syn[0] < start_ns + SYN_WITHIN_NS]
        return min(after, default=(start_ns, None))

    def closed_eyes(self) -> dict[str, str]:
        """Return the sensors that could not be opened, and why."""
        return {gap.sensor: gap.reason for gap in self.events() if isinstance(gap, Gap) and is_closed_eye(gap)}


def was_cut(tale: Tale) -> bool:
    """Return whether the tunnel was cut off before anybody came to use it."""
    outcomes = [o for e in tale.events() if isinstance(e, Incident) for o in e.outcomes]
    before_ns = tale.first_use_ns or 1 << 63
    pid = tale.calls["tunnel"].pid
    return any(o.action == "isolate" and o.outcome == "done" and o.time_ns < before_ns
               and o.process is not None and o.process.pid == pid for o in outcomes)


def is_closed_eye(gap: Gap) -> bool:
    """Return whether a gap says that a sensor is not looking at all, from then on; others lack a part, or a while."""
    return gap.since_ns == gap.time_ns and gap.lost is None and gap.process is None


def judge(tale: Tale) -> Judgement:
    """Lay what the guard said beside what happened."""
    missing: list[str] = list(tale.failures)
    measures: list[Measure] = []
    excused: list[str] = []
    closed = tale.closed_eyes()
    if "packets" in closed:
        excused.append(f"the tunnel is not expected to be found: {closed['packets']}")
    elif "tunnel" in tale.calls:
        _judge_tunnel(tale, measures, missing)
    if "hasher" in tale.calls and "launches" in closed:
        excused.append(f"mining is not expected to be confirmed: {closed['launches']}")
    elif "hasher" in tale.calls:
        _judge_mining(tale, measures, missing)
    return Judgement(tuple(measures), tuple(missing), tuple(_accused(tale)), tuple(excused))


def left_alone(tale: Tale) -> list[LeftAlone]:
    """Return those who must be left alone, with what the guard last said of them."""
    rows = []
    for one in tale.benign:
        said = [f for f in _latest(tale) if f.process and f.process.process.pid in one.pids and accuses(f)]
        words = ", ".join(f"{f.label} {f.verdict}" for f in said) or "accused of nothing"
        rows.append(LeftAlone(f"{one.what} (pid {', '.join(map(str, one.pids))})", one.text, words))
    return rows


def _judge_tunnel(tale: Tale, measures: list[Measure], missing: list[str]) -> None:
    call = tale.calls["tunnel"]
    syn_ns, port = tale.tunnel_syn()

    def about(finding: Finding) -> bool:
        of_pid = finding.process is not None and finding.process.process.pid == call.pid
        return finding.label in _TUNNEL and accuses(finding) and (of_pid or _from_port(finding, port))

    named = _first(tale, about)
    measures.append(_measure("reverse tunnel requested: named after the SYN", named, syn_ns, REQUESTED_S))
    used = _first(tale, lambda f: about(f) and any(e.kind == _USED for e in f.evidence))
    if was_cut(tale):
        if tale.session:
            missing.append("the tunnel was cut off, and somebody came through all the same")
    elif tale.first_use_ns:
        measures.append(_measure("tunnel used: named after first use", used, tale.first_use_ns, USED_S))
        if named is None or named.time_ns > tale.first_use_ns:
            missing.append("the tunnel was not named before it was used")
        if used is None:
            missing.append("the use of the tunnel was not named")
    _judge_ties(tale, call, about, "the tunnel", missing)


def _judge_mining(tale: Tale, measures: list[Measure], missing: list[str]) -> None:
    call = tale.calls["hasher"]

    def about(finding: Finding) -> bool:
        of_pid = finding.process is not None and finding.process.process.pid == call.pid
        return finding.label == "mining" and finding.verdict == "confirmed" and of_pid

    confirmed = _first(tale, about)
    since_ns = tale.first_launch_ns or call.start_ns
    measures.append(_measure("hash process: confirmed after its first launch", confirmed, since_ns, CONFIRMED_S))
    _judge_ties(tale, call, about, "the hash process", missing)


def _judge_ties(
    tale: Tale, call: Call, about: Callable[[Finding], bool], what: str, missing: list[str],
) -> None:
    """Require the last finding to name the right process, control group and tool call."""
    last = next((f for f in reversed(_latest(tale)) if about(f)), None)
    if last is None:
        missing.append(f"{what} was not found")
        return
    process: ProcessBrief | None = last.process
    if process is None or process.process.pid != call.pid:
        missing.append(f"{what} was not tied to pid {call.pid}")
    elif process.cgroup not in call.cgroup.split():
        missing.append(f"{what} was not tied to its control group, but to {process.cgroup!r}")
    if last.tool_call is None or last.tool_call.span_id != call.span_id:
        missing.append(f"{what} was not tied to its tool call")


def _accused(tale: Tale) -> Iterator[str]:
    """Yield every accusation of somebody who did nothing wrong, one taken back included."""
    guilty = {call.pid for name, call in tale.calls.items() if name != "read"} | set(tale.session)
    _, port = tale.tunnel_syn() if "tunnel" in tale.calls else (0, None)
    told: set[str] = set()
    for finding in (one.event for one in tale.heard if isinstance(one.event, Finding)):
        if finding.process is None or finding.process.process.pid in guilty or finding.id in told:
            continue
        if accuses(finding):
            told.add(finding.id)
            yield f"{finding.label} {finding.verdict}: {process_words(finding.process)}"
    for finding in _latest(tale):
        if accuses(finding) and finding.process is None and not _from_port(finding, port):
            yield f"{finding.label} {finding.verdict}: {finding.subject}, process unknown"


def _latest(tale: Tale) -> list[Finding]:
    latest: dict[str, Finding] = {}
    for one in tale.heard:
        if isinstance(one.event, Finding):
            latest.pop(one.event.id, None)
            latest[one.event.id] = one.event
    return list(latest.values())


def _first(tale: Tale, wanted: Callable[[Finding], bool]) -> Heard | None:
    return next((h for h in tale.heard if isinstance(h.event, Finding) and wanted(h.event)), None)


def _from_port(finding: Finding, port: int | None) -> bool:
    return isinstance(finding.subject, FlowId) and finding.subject.initiator_port == port


def _measure(what: str, heard: Heard | None, since_ns: int, target_s: float) -> Measure:
    return Measure(what, (heard.time_ns - since_ns) / 1e9 if heard else None, target_s)
