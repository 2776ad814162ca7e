"""Attempts at what egress policy forbids: look-ups of names and connections, counted for each process and rule.

What is forbidden is the operator's word; all that is inferred is who tried, and what it was (`core.egress`). The first
attempt is told once and is nothing by itself; from the rule's ``attempts`` on it is suspect, and confirmed only where
the rule says so. Looked up, connected to and tried again within five seconds, by when resolvers repeat themselves
(resolv.conf(5)), is one attempt; so are the names that a search list makes of one, which begin alike.

A connection counts when it is opened, be it answered or not. It is judged when the name in its TLS hello is known, or
after three seconds, and on a live host once a list of sockets had its chance to say whose it is. What has no known
owner counts for its address and is judged by sections that are about everybody; it is never added to a process.
Programs that serve DNS ask for others: their look-ups are not counted as theirs.

Benign look-alikes, and what keeps them out:

- networks that serve many names from one address: any allowed name of it clears;
- DNS itself: judged by what is asked, and by address only where a rule or a list of resolvers says so;
- answers for others, or out of date: not known, which is no denial (a `Gap` counts them);
- groups, this machine itself, what comes in from outside: no egress.
"""

from __future__ import annotations

from collections import OrderedDict
from math import log2
from typing import TYPE_CHECKING, NamedTuple

from gpuguard.core.addresses import address_text
from gpuguard.core.bounded import BoundedTable
from gpuguard.core.egress import (
    Client,
    EgressPolicy,
    EgressRule,
    End,
    Names,
    Rules,
    Ruling,
    forbidden_question,
    is_name,
    judge,
    parsed,
)
from gpuguard.core.evidence import Evidence, Paced
from gpuguard.core.fusion import SUSPECT_NATS
from gpuguard.core.network import CLOSED_KEPT_NS
from gpuguard.core.observations import DnsRead, FlowClosed, FlowOpened, HelloRead
from gpuguard.core.records import Gap, Sockets, Tick

if TYPE_CHECKING:
    from gpuguard.core.host import Host
    from gpuguard.core.observations import Observation
    from gpuguard.core.records import Block
    from gpuguard.core.subjects import FlowId, ProcessId, Subject

WAITING_MAX = 16_384
TALLIES_MAX = 4_096
TARGETS_MAX = 64
NAMESPACES_MAX = 256

SAME_ATTEMPT_NS = 5_000_000_000
HELLO_WITHIN_NS = 3_000_000_000
LISTED_WITHIN_NS = 12_000_000_000
GAP_TOLD_NS = 60_000_000_000

# A first attempt may be a default setting or a typing error; one that is repeated is meant, or a program that nobody
# looks after: suspect. More of the same adds little. A rule that confirms does so past any threshold that can be set.
FIRST_NATS = 3.0
REPEATED_NATS_MAX = 9.0
CONFIRMED_NATS = 40.0

#: What is asked for to get an address: A, CNAME, AAAA, SVCB, HTTPS, ANY (RFC 1035, 3596, 9460).
ADDRESS_TYPES = frozenset({1, 5, 28, 64, 65, 255})
_TCP, _UDP = 6, 17
_PROTOCOLS = frozenset({1, 6, 17, 58})
_DNS_PORTS = frozenset({53, 853})

_SPOTS = ("names looked up over HTTPS or TLS, or before the guard looked", "a TLS name that another is served behind",
          "programs behind one address that look up names for each other", "what reaches another host through a proxy")


class _Unit(NamedTuple):
    """Who is counted: a process where it is known, else one client."""

    client: Client
    process: ProcessId | None


class _Waiting:
    """A connection that is not judged yet."""

    __slots__ = ("dns", "flow", "hello")

    def __init__(self, flow: FlowId) -> None:
        self.flow = flow
        self.hello: HelloRead | None = None
        self.dns = False


class _Question:
    """A look-up that is not judged yet."""

    __slots__ = ("addresses", "aliases", "client", "flow", "for_address", "name", "start_ns")

    def __init__(self, client: Client, name: str, flow: FlowId, start_ns: int) -> None:
        self.client = client
        self.name = name
        self.flow = flow
        self.start_ns = start_ns
        self.for_address = False
        self.addresses: OrderedDict[str, None] = OrderedDict()
        self.aliases: tuple[str, ...] = ()


class _Tally:
    """The attempts of one unit at what one rule forbids."""

    def __init__(self, start_ns: int) -> None:
        self.start_ns = self.last_ns = start_ns
        self.count = 0
        self.told = 0
        #: The last so many, to be shown.
        self.targets: BoundedTable[str, int] = BoundedTable(TARGETS_MAX)
        self.recent: OrderedDict[tuple[str, ...], int] = OrderedDict()

    def add(self, target: str, time_ns: int) -> bool:
        """Count an attempt, unless it belongs to one that was; return whether it was counted."""
        key = _alike(target)
        last_ns = self.recent.get(key)
        self.targets[target] = time_ns
        if last_ns is not None and abs(time_ns - last_ns) <= SAME_ATTEMPT_NS:
            return False
        self.start_ns, self.last_ns = min(self.start_ns, time_ns), max(self.last_ns, time_ns)
        self.recent[key] = time_ns
        self.recent.move_to_end(key)
        if len(self.recent) > TARGETS_MAX:
            self.recent.popitem(last=False)
        self.count += 1
        return True


class _Section:
    """One section of policy, ready to judge. ``names`` are of the resolvers that it trusts."""

    def __init__(self, policy: EgressPolicy, names: Names) -> None:
        self.policy = policy
        self.rules = Rules(policy)
        self.names = names

    def is_about(self, process: ProcessId | None, host: Host) -> bool:
        match = self.policy.match
        if process is None:
            return not any((match.users, match.container_ids, match.pod_uids, match.slurm_job_ids, match.sandbox_ids,
                            match.cgroups))
        started, context = host.processes.started.get(process), host.processes.context(process)
        asked = (
            (match.users, started.user if started else ""),
            (match.container_ids, context.container_id),
            (match.pod_uids, context.pod_uid),
            (match.slurm_job_ids, context.slurm_job_id),
            (match.sandbox_ids, context.sandbox_id),
        )
        cgroup = started.cgroup if started else ""
        below = any(cgroup == one or cgroup.startswith(one.rstrip("/") + "/") for one in match.cgroups)
        return (below or not match.cgroups) and all(
            not wanted or value in wanted or (value and "*" in wanted) for wanted, value in asked)


class Detector:
    """Counts what egress policy forbids; shown nothing where there is no such policy."""

    takes: tuple[type, ...] = ()

    def __init__(self) -> None:
        self._sections: list[_Section] = []
        self._names: dict[frozenset[str], Names] = {}
        self._listed: BoundedTable[int, int] = BoundedTable(NAMESPACES_MAX)
        self._waiting: BoundedTable[FlowId, _Waiting] = BoundedTable(WAITING_MAX)
        self._questions: BoundedTable[tuple[Client, str], _Question] = BoundedTable(WAITING_MAX)
        #: So that what was asked is judged when its flow ends; what is forgotten here waits until it is due.
        self._asked: BoundedTable[FlowId, list[_Question]] = BoundedTable(WAITING_MAX)
        self._tallies: BoundedTable[tuple[_Unit, str, str], _Tally] = BoundedTable(TALLIES_MAX)
        self._weights: BoundedTable[tuple[Subject, str], float] = BoundedTable(WAITING_MAX)
        self._unclear = 0
        self._told_ns: int | None = None

    def rule_by(self, egress: tuple[EgressPolicy, ...]) -> None:
        """Judge by these sections from now on."""
        for policy in egress:
            names = self._names.setdefault(frozenset(policy.resolvers), Names())
            self._sections.append(_Section(policy, names))
        self.takes = (FlowOpened, HelloRead, DnsRead, FlowClosed, Sockets, Tick) if egress else ()

    def evicted(self) -> dict[str, int]:
        """Return how much was forgotten because a table was full, by what it was."""
        waiting = self._waiting.evicted + self._questions.evicted
        counts = self._tallies.evicted + self._weights.evicted
        return {"names of addresses": sum(names.evicted for names in self._names.values()),
                "connections before egress policy judged them": waiting,
                "counts of forbidden attempts": counts,
                "namespaces that egress policy is about": self._listed.evicted}

    def receive(self, item: Block | Observation, host: Host) -> list[Paced | Gap]:
        """Return what this item decides."""
        found: list[Paced | Gap] = []
        match item:
            case FlowOpened():
                if _leaves(item.flow, host):
                    self._waiting[item.flow] = _Waiting(item.flow)
            case HelloRead():
                waiting = self._waiting.get(item.flow)
                if waiting and item.speaker == "initiator":
                    waiting.hello = item
            case DnsRead():
                self._look_up(item, host)
            case FlowClosed():
                found += self._ended(item, host)
            case Sockets():
                self._listed.make_room(lambda listed_ns: item.time_ns - listed_ns > CLOSED_KEPT_NS)
                self._listed[item.netns] = item.time_ns
                found += self._overdue(item.time_ns, host)
            case Tick():
                found += self._overdue(item.time_ns, host)
            case _:
                pass
        return [*found, *self._gap(item.time_ns)] if self._unclear else found

    # -- names --------------------------------------------------------------------------------------------------------

    def _look_up(self, item: DnsRead, host: Host) -> None:
        """Take in a question, or its answer: only what the side that was asked says is one."""
        flow = item.flow
        asked = item.speaker == "initiator"
        if item.is_response == asked or _is_group(flow.responder) or not _is_ours(flow, host):
            return
        waiting = self._waiting.get(flow)
        if waiting:
            waiting.dns = True
        name, client = item.name.lower(), _client(flow, host)
        question = self._questions.get((client, name))
        if question is None or item.time_ns - question.start_ns > LISTED_WITHIN_NS:
            if not asked:
                self._learn(item, client, name)
                return
            question = self._questions[client, name] = _Question(client, name, flow, item.time_ns)
            self._asked[flow] = [*(self._asked.get(flow) or ()), question]
        question.for_address |= item.query_type in ADDRESS_TYPES
        if item.is_response:
            question.addresses.update((address_text(one), None) for one in item.addresses)
            question.aliases = item.aliases or question.aliases
            self._learn(item, client, name)

    def _learn(self, item: DnsRead, client: Client, name: str) -> None:
        addresses = [address_text(one) for one in item.addresses]
        for resolvers, names in self._names.items():
            if not resolvers or item.flow.responder in resolvers:
                names.learn(client, name, addresses, item.ttl_s, item.time_ns)

    # -- when ---------------------------------------------------------------------------------------------------------

    def _ended(self, item: FlowClosed, host: Host) -> list[Paced]:
        """Judge what waits of a flow, which nobody speaks of any more."""
        flow = item.flow
        found = [one for question in tuple(self._asked.get(flow) or ())
                 for one in self._judge_question(question, item.time_ns, host)]
        waiting = self._waiting.get(flow)
        if waiting:
            found += self._judge_flow(waiting, item.time_ns, host)
        self._weights.pop((flow, "egress-denied"))
        self._weights.pop((flow, "egress-observed"))
        return found

    def _overdue(self, now_ns: int, host: Host) -> list[Paced]:
        found: list[Paced] = []
        for question in self._questions.values():
            if now_ns - question.start_ns >= SAME_ATTEMPT_NS and self._may_be_owned(question.flow, now_ns, host):
                found += self._judge_question(question, now_ns, host)
        for waiting in self._waiting.values():
            flow = waiting.flow
            told = waiting.hello or waiting.dns or flow.protocol != _TCP
            if (told or now_ns - flow.start_ns >= HELLO_WITHIN_NS) and self._may_be_owned(flow, now_ns, host):
                found += self._judge_flow(waiting, now_ns, host)
        return found

    def _may_be_owned(self, flow: FlowId, now_ns: int, host: Host) -> bool:
        """Return whether a list of sockets had its chance to name the owner of a flow, or there are none."""
        listed_ns = self._listed.get(flow.netns)
        if listed_ns is None or now_ns - flow.start_ns >= LISTED_WITHIN_NS:
            return True
        if host.network.is_local(flow.netns, flow.initiator):
            return listed_ns >= flow.start_ns
        return len(self._listed) == 1 or host.network.owner(flow) is not None

    # -- what ---------------------------------------------------------------------------------------------------------

    def _judge_question(self, question: _Question, now_ns: int, host: Host) -> list[Paced]:
        flow, client, name = question.flow, question.client, question.name
        self._questions.pop((client, name))
        left = [one for one in self._asked.pop(flow) or () if one is not question]
        if left:
            self._asked[flow] = left
        process = host.network.owner(flow)
        if process and any(socket.local_port in _DNS_PORTS for _, socket in host.network.sockets_of(process)):
            process = None  # it serves DNS: somebody else asked it
        found: list[Paced] = []
        for section in self._about(process, host):
            ruling = forbidden_question(section.rules, name, question.aliases, question.addresses)
            if ruling and (question.for_address or (ruling.rule and is_name(ruling.rule))):
                found += self._attempt(now_ns, flow, _Unit(client, process), section, ruling, question.start_ns)
        return found

    def _judge_flow(self, waiting: _Waiting, now_ns: int, host: Host) -> list[Paced]:
        flow = waiting.flow
        self._waiting.pop(flow)
        process, client = host.network.owner(flow), _client(flow, host)
        hello = waiting.hello
        end = End(flow.responder, 0 if flow.protocol not in (_TCP, _UDP) else flow.responder_port, flow.protocol,
                  hello.server_name.lower().rstrip(".") if hello else "", hello.encrypted if hello else False)
        found: list[Paced] = []
        for section in self._about(process, host):
            if end.address in section.policy.resolvers and end.port in _DNS_PORTS:
                continue
            ruling = judge(section.rules, section.names, client, end, flow.start_ns)
            by_address = ruling.what == "denied" and ruling.rule is not None and ruling.rule.target != "*"
            if waiting.dns and not section.policy.resolvers and not by_address:
                continue
            self._unclear += ruling.what == "unclear"
            if ruling.what in ("denied", "unproven"):
                found += self._attempt(now_ns, flow, _Unit(client, process), section, ruling, flow.start_ns)
        return found

    def _about(self, process: ProcessId | None, host: Host) -> list[_Section]:
        return [section for section in self._sections if section.is_about(process, host)]

    # -- counting -----------------------------------------------------------------------------------------------------

    def _attempt(self, now_ns: int, flow: FlowId, unit: _Unit, section: _Section, ruling: Ruling,
                 tried_ns: int) -> list[Paced]:
        """Count an attempt and weigh all of its rule; the rules of one subject do not add up."""
        rule = ruling.rule or section.policy
        said = f"{ruling.rule or 'default deny'}{', unproven' if ruling.what == 'unproven' else ''}"
        key = (unit, section.policy.name, said)
        tally = self._tallies.get(key) or _Tally(tried_ns)
        self._tallies[key] = tally
        target = ruling.name or (f"{flow.responder} port {flow.responder_port}" if flow.protocol in (_TCP, _UDP)
                                 else flow.responder)
        counted = tally.add(target, tried_ns)
        told = counted and (tally.count in (1, rule.attempts) or tally.count >= 2 * max(tally.told, rule.attempts))
        tally.told = tally.count if told else tally.told
        subject: Subject = unit.process or flow
        label = "egress-observed" if rule.observe else "egress-denied"
        nats = FIRST_NATS if ruling.what == "unproven" else _weight(rule, tally.count)
        before = self._weights.get((subject, label)) or 0.0
        if not told and nats <= before:
            return []
        self._weights[subject, label] = max(nats, before)
        evidence = Evidence(
            time_ns=now_ns,
            subject=subject,
            label=label,
            evidence_class="network",
            kind=f"{section.policy.name}: {said}",
            nats=max(0.0, nats - before),
            text=_text(unit, flow, section, ruling, tally, said, target),
            start_ns=min(tally.start_ns, now_ns),
            blind_spots=_SPOTS,
        )
        return [Paced(evidence, told)]

    def _gap(self, now_ns: int) -> list[Gap]:
        if self._told_ns is not None and now_ns < self._told_ns + GAP_TOLD_NS:
            return []
        since_ns, lost, self._told_ns, self._unclear = self._told_ns, self._unclear, now_ns, 0
        reason = "connections that egress policy would judge by a name, and whose name is not known"
        return [Gap(time_ns=now_ns, sensor="egress", reason=reason, since_ns=since_ns, lost=lost)]


def _text(unit: _Unit, flow: FlowId, section: _Section, ruling: Ruling, tally: _Tally, said: str, target: str) -> str:
    who = unit.process or flow.initiator
    what = f"{who} tried {target}"
    if ruling.what == "unproven":
        what = f"{who} named {target} to {flow.responder}, which DNS did not answer it for that name"
    within_s = (tally.last_ns - tally.start_ns) / 1e9
    times = f"attempt {tally.count}" if tally.count == 1 else f"{tally.count} attempts within {within_s:.0f} s"
    more = " or more" if tally.targets.evicted else ""
    many = f" on {len(tally.targets)}{more} targets" if len(tally.targets) > 1 else ""
    return f"{what}: {times}{many} against {said} of egress policy {section.policy.name!r}"


def _weight(rule: EgressRule | EgressPolicy, count: int) -> float:
    if count < rule.attempts:
        return FIRST_NATS
    if rule.verdict == "confirmed":
        return CONFIRMED_NATS
    return min(REPEATED_NATS_MAX, SUSPECT_NATS + log2(count / rule.attempts))


def _alike(target: str) -> tuple[str, ...]:
    """Return what two names have in common that a search list made of one; an address is itself."""
    labels = target.split(".")
    return (target,) if len(labels) < 3 or labels[-1][-1:].isdigit() or ":" in target else tuple(labels[:2])


def _client(flow: FlowId, host: Host) -> Client:
    """Return who is answered: all that this host is called are one."""
    return flow.netns, "" if host.network.is_local(flow.netns, flow.initiator) else flow.initiator


def _is_ours(flow: FlowId, host: Host) -> bool:
    """Return whether a flow was begun here, or by somebody this host carries traffic for, as far as can be known."""
    if host.network.is_local(flow.netns, flow.initiator):
        return True
    if host.network.is_local(flow.netns, flow.responder):
        return False
    return not (host.network.addresses and parsed(flow.initiator).is_global)


def _leaves(flow: FlowId, host: Host) -> bool:
    """Return whether a flow of ours goes to another host. Who sent UDP first need not have begun it."""
    far = parsed(flow.responder)
    if flow.protocol not in _PROTOCOLS or _is_group(flow.responder) or far.is_loopback or far.is_unspecified:
        return False
    if host.network.is_local(flow.netns, flow.responder) or not _is_ours(flow, host):
        return False
    if flow.protocol == _UDP:
        return host.network.is_local(flow.netns, flow.initiator) or flow.initiator_port > flow.responder_port
    return flow.initiator_known


def _is_group(address: str) -> bool:
    return parsed(address).is_multicast or address == "255.255.255.255"
