"""Egress policy: who may speak to whom, by name, network and port; and the names that addresses were answered for.

Rules are read in order and the first that fits decides, then the section's default; so OpenSandbox reads its own
(components/egress, pkg/policy). ``*.example.org`` is every name below example.org and not itself. What a name allows it
never allows at loopback or link-local addresses: whoever owns the name decides what it points to.

Names come from DNS answers, each kept for the client that asked: an answer somebody else got clears nobody. Where the
client is one of several programs behind one address, they cannot be told apart.
"""

from __future__ import annotations

import ipaddress
import re
from functools import lru_cache
from typing import TYPE_CHECKING, Literal, NamedTuple

from msgspec import Struct

from gpuguard.core.bounded import BoundedTable

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

RULES_MAX = 4_096
ADDRESSES_MAX = 65_536
NAMES_PER_ADDRESS_MAX = 16

#: A program may go on with an answer when its time is up; after that the name is a hint for another day.
GRACE_NS = 600_000_000_000
HINT_NS = 86_400_000_000_000

PROTOCOLS = {"tcp": (6,), "udp": (17,), "icmp": (1, 58)}

_LABEL = r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?"
_HOST = re.compile(rf"(?:\*\.)?{_LABEL}(?:\.{_LABEL})*")

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Client = tuple[int, str]


class EgressMatch(Struct, frozen=True, forbid_unknown_fields=True):
    """Whose connections a section is about; an empty field asks nothing, ``*`` is anything that is there.

    ``cgroups`` are paths, with all below them. A sandbox may be named by the process's environment alone.
    """

    users: tuple[str, ...] = ()
    container_ids: tuple[str, ...] = ()
    pod_uids: tuple[str, ...] = ()
    slurm_job_ids: tuple[str, ...] = ()
    sandbox_ids: tuple[str, ...] = ()
    cgroups: tuple[str, ...] = ()


class EgressRule(Struct, frozen=True, forbid_unknown_fields=True):
    """One line: ``allow`` or ``deny`` of a name, ``*.`` and a name, an address, a network, or ``*``.

    ``ports`` are numbers and ranges ("8000-9000"), all if empty. From ``attempts`` on what is denied has this
    ``verdict``; with ``observe`` it is told and never acted on.
    """

    allow: str = ""
    deny: str = ""
    ports: tuple[int | str, ...] = ()
    protocol: Literal["", "tcp", "udp", "icmp"] = ""
    observe: bool = False
    verdict: Literal["suspect", "confirmed"] = "suspect"
    attempts: int = 3

    @property
    def target(self) -> str:
        """What it allows or denies, in the form that is compared."""
        return (self.allow or self.deny).lower().rstrip(".")

    def __str__(self) -> str:
        ports = f" port {', '.join(str(port) for port in self.ports)}" if self.ports else ""
        return f"{'allow' if self.allow else 'deny'} {self.target}{f' {self.protocol}' if self.protocol else ''}{ports}"


class EgressPolicy(Struct, frozen=True, forbid_unknown_fields=True):
    """One section: whom it is about, its rules, and what holds where none fits.

    ``observe``, ``verdict`` and ``attempts`` are those of the default. Where ``resolvers`` are named, only their
    answers name addresses, and DNS to any other server is judged like all else.
    """

    name: str
    default: Literal["allow", "deny"] = "allow"
    match: EgressMatch = EgressMatch()
    rules: tuple[EgressRule, ...] = ()
    resolvers: tuple[str, ...] = ()
    observe: bool = False
    verdict: Literal["suspect", "confirmed"] = "suspect"
    attempts: int = 3


def check(policy: EgressPolicy) -> Iterator[str]:
    """Yield what is wrong with a section, in words for its author."""
    place = f"egress {policy.name!r}"
    if len(policy.rules) > RULES_MAX:
        yield f"{place}: {len(policy.rules)} rules; at most {RULES_MAX}"
    if policy.attempts < 1:
        yield f"{place}: attempts must be at least 1"
    for address in policy.resolvers:
        if _network(address) is None or "/" in address:
            yield f"{place}: resolver {address!r} is no address"
    for number, rule in enumerate(policy.rules, start=1):
        yield from (f"{place}, rule {number} ({rule}): {wrong}" for wrong in _check_rule(rule))


def _check_rule(rule: EgressRule) -> Iterator[str]:
    if bool(rule.allow) == bool(rule.deny):
        yield "give either allow or deny"
    elif rule.target != "*" and _network(rule.target) is None:
        if "/" in rule.target:
            yield f"{rule.target!r} is no network; host bits must be zero"
        elif not rule.target.isascii():
            yield f"write {rule.target!r} as it is asked for, with xn-- (RFC 5891)"
        elif not _HOST.fullmatch(rule.target) or rule.target.rpartition(".")[2].isdigit():
            yield f"{rule.target!r} is no name; a star stands alone or first, as in *.example.org"
    if rule.allow and (rule.observe or rule.verdict != "suspect"):
        yield "observe and verdict are for what is denied"
    if rule.attempts < 1:
        yield "attempts must be at least 1"
    if rule.ports and rule.protocol == "icmp":
        yield "ICMP has no ports"
    for port in rule.ports:
        if _range(port) is None:
            yield f"{port!r} is no port; write 443, or '8000-9000'"


def _range(port: int | str) -> tuple[int, int] | None:
    found = re.fullmatch(r"(\d{1,5})(?:-(\d{1,5}))?", str(port))
    if not found:
        return None
    low, high = int(found[1]), int(found[2] or found[1])
    return (low, high) if 0 < low <= high <= 65_535 else None


@lru_cache(maxsize=16_384)
def _network(text: str) -> Network | None:
    try:
        return ipaddress.ip_network(text)
    except ValueError:
        return None


@lru_cache(maxsize=16_384)
def parsed(address: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """Return an address to be asked what it is: to parse one costs more than to judge it."""
    return ipaddress.ip_address(address)


def is_near(address: str) -> bool:
    """Return whether an address is of this machine or this link alone."""
    one = parsed(address)
    return one.is_loopback or one.is_link_local or one.is_unspecified


class Rules:
    """A section's rules, found by hash: a name costs a look for each of its labels, an address one for each length.

    `tests/test_egress.py` has the same written for the eye.
    """

    def __init__(self, policy: EgressPolicy) -> None:
        self.policy = policy
        self._names: dict[str, list[int]] = {}
        self._networks: dict[tuple[int, int], dict[int, list[int]]] = {}
        self._all: list[int] = []
        self._ports: list[list[tuple[int, int]]] = []
        for index, rule in enumerate(policy.rules):
            network = _network(rule.target)
            if rule.target == "*":
                self._all.append(index)
            elif network:
                held = self._networks.setdefault((network.version, network.prefixlen), {})
                held.setdefault(int(network.network_address), []).append(index)
            else:
                self._names.setdefault(rule.target, []).append(index)
            self._ports.append([one for port in rule.ports if (one := _range(port))])

    @property
    def by_name(self) -> bool:
        """Whether any rule is about a name."""
        return bool(self._names)

    def first(self, name: str, address: str, port: int, protocol: int) -> EgressRule | None:
        """Return the first rule that fits a connection, None if none does. ``name`` is "" where it is not known."""
        fits = [index for index in self._of(name, address) if self._fits(index, address, port, protocol)]
        return self.policy.rules[min(fits)] if fits else None

    def first_of_name(self, name: str) -> EgressRule | None:
        """Return the first rule about a name by itself; a denial of some ports alone says nothing of it."""
        rules = self.policy.rules
        fits = [index for index in self._of(name, "") if rules[index].allow or not (
            rules[index].ports or rules[index].protocol)]
        return rules[min(fits)] if fits else None

    def denies(self, rule: EgressRule | None) -> bool:
        """Return whether this rule, or the default where there is none, denies."""
        return bool(rule.deny) if rule else self.policy.default == "deny"

    def allows_address(self, address: str) -> bool:
        """Return whether a network rule allows something at an address."""
        rules = self.policy.rules
        fits = [index for index in self._of("", address) if rules[index].allow or not rules[index].ports]
        return bool(fits) and bool(rules[min(fits)].allow)

    def _of(self, name: str, address: str) -> Iterator[int]:
        yield from self._all
        if name:
            yield from self._names.get(name, ())
            rest = name
            while "." in rest:
                rest = rest.partition(".")[2]
                yield from self._names.get(f"*.{rest}", ())
        if address and self._networks:
            one = parsed(address)
            bits, value = one.max_prefixlen, int(one)
            for (version, length), held in self._networks.items():
                if version == one.version:
                    yield from held.get(value >> (bits - length) << (bits - length), ())

    def _fits(self, index: int, address: str, port: int, protocol: int) -> bool:
        rule = self.policy.rules[index]
        if rule.protocol and protocol not in PROTOCOLS[rule.protocol]:
            return False
        if self._ports[index] and not any(low <= port <= high for low, high in self._ports[index]):
            return False
        return not (rule.allow and is_near(address) and is_name(rule))


def is_name(rule: EgressRule) -> bool:
    """Return whether a rule is about a name."""
    return rule.target != "*" and _network(rule.target) is None


# -- names ------------------------------------------------------------------------------------------------------------


class Names:
    """Which names each client was answered for which address; bounded, the longest unheard of leaves."""

    def __init__(self) -> None:
        self._of_client: BoundedTable[tuple[Client, str], dict[str, int]] = BoundedTable(ADDRESSES_MAX)
        self._of_all: BoundedTable[tuple[int, str], dict[str, int]] = BoundedTable(ADDRESSES_MAX)
        self._answered: BoundedTable[tuple[Client, str], int] = BoundedTable(ADDRESSES_MAX)
        self._crowded = 0

    @property
    def evicted(self) -> int:
        """How many addresses and names were forgotten because there were too many."""
        return self._of_client.evicted + self._of_all.evicted + self._answered.evicted + self._crowded

    def learn(self, client: Client, name: str, addresses: Iterable[str], ttl_s: int, now_ns: int) -> None:
        """Take in an answer; of a time to live no more than a day is believed."""
        until_ns = now_ns + min(ttl_s * 1_000_000_000, HINT_NS) + GRACE_NS
        for address in addresses:
            own, all_ = (client, address), (client[0], address)
            self._of_client[own] = self._with(self._of_client.get(own), name, until_ns, now_ns)
            self._of_all[all_] = self._with(self._of_all.get(all_), name, until_ns, now_ns)
            self._answered[client, name] = until_ns

    def _with(self, held: dict[str, int] | None, name: str, until_ns: int, now_ns: int) -> dict[str, int]:
        """Return these names with one more, the longest unheard of gone if they are too many."""
        held = held or {}
        held[name] = max(until_ns, held.pop(name, 0))
        if len(held) > NAMES_PER_ADDRESS_MAX:
            self._crowded += held.pop(next(iter(held))) >= now_ns
        return held

    def fresh(self, client: Client, address: str, now_ns: int) -> list[str]:
        """Return the names that this client was answered for an address, while that holds."""
        held = self._of_client.get((client, address)) or {}
        return [name for name, until_ns in held.items() if now_ns <= until_ns]

    def hints(self, client: Client, address: str, now_ns: int) -> list[str]:
        """Return the names that an address may have as well: it had them, or others were answered so."""
        held = self._of_all.get((client[0], address)) or {}
        return [name for name, until_ns in held.items() if now_ns <= until_ns + HINT_NS]

    def knows(self, client: Client, name: str, now_ns: int) -> bool:
        """Return whether this client was answered any address for a name, while that holds."""
        until_ns = self._answered.get((client, name))
        return until_ns is not None and now_ns <= until_ns


# -- judgement --------------------------------------------------------------------------------------------------------


class Ruling(NamedTuple):
    """What a section says of one connection. ``rule`` is None where its default decided; ``name`` is what was judged.

    ``unproven``: allowed by a name that only the TLS hello says, while DNS answered this client other addresses for it.
    ``unclear``: its name is not known, and might decide otherwise.
    """

    what: Literal["allowed", "denied", "unproven", "unclear"]
    rule: EgressRule | None = None
    name: str = ""


class End(NamedTuple):
    """The far end of a connection, and the name in its TLS hello: "" if there was none, or it may be another's."""

    address: str
    port: int
    protocol: int
    server_name: str = ""
    encrypted: bool = False


def judge(rules: Rules, names: Names, client: Client, end: End, now_ns: int) -> Ruling:
    """Return what a section says of a connection of this client.

    The name in the hello is the client's own word. It convicts at once; to clear, DNS must have answered this address
    for it. Without one, the names of the address clear if any is allowed: many share their addresses.
    """
    own = names.fresh(client, end.address, now_ns)
    at = (end.address, end.port, end.protocol)
    if end.server_name and not end.encrypted:
        said = rules.first(end.server_name, *at)
        if rules.denies(said):
            return Ruling("denied", said, end.server_name)
        if end.server_name in own or said is None or not is_name(said):
            return Ruling("allowed", said, end.server_name)
        if own:
            ruling = _by_names(rules, own, at)
            if ruling.what == "denied":
                return ruling
        return Ruling("unproven" if names.knows(client, end.server_name, now_ns) else "unclear", said, end.server_name)
    if own:
        return _by_names(rules, own, at)
    alone = rules.first("", *at)
    if not rules.denies(alone):
        return Ruling("unclear" if alone is None and rules.by_name else "allowed", alone)
    clearing = [name for name in names.hints(client, end.address, now_ns) if not rules.denies(rules.first(name, *at))]
    return Ruling("unclear" if clearing or end.encrypted else "denied", alone)


def _by_names(rules: Rules, names: list[str], at: tuple[str, int, int]) -> Ruling:
    rulings = [(rules.first(name, *at), name) for name in names]
    cleared = [one for one in rulings if not rules.denies(one[0])]
    return Ruling("allowed", *cleared[0]) if cleared else Ruling("denied", *rulings[0])


def forbidden_question(rules: Rules, name: str, aliases: Iterable[str], addresses: Iterable[str]) -> Ruling | None:
    """Return why a look-up is an attempt, None if it is none. ``addresses`` are what it was answered, if anything.

    A rule that names it decides at once. The default does not, where the addresses are allowed, where a search list
    made the name of an allowed one (resolv.conf(5)), or where one label alone was asked for and nobody knows it.
    """
    rule = rules.first_of_name(name)
    if rule and is_name(rule):
        return Ruling("denied", rule, name) if rule.deny else None
    for alias in aliases:
        other = rules.first_of_name(alias)
        if other and is_name(other) and other.deny:
            return Ruling("denied", other, alias)
    found = list(addresses)
    if not rules.denies(rule) or (found and all(rules.allows_address(one) for one in found)):
        return None
    if not found and ("." not in name or _made_of_allowed(rules, name)):
        return None
    return Ruling("denied", rule, name)


def _made_of_allowed(rules: Rules, name: str) -> bool:
    labels = name.split(".")
    for count in range(2, len(labels)):
        rule = rules.first_of_name(".".join(labels[:count]))
        if rule and rule.allow and is_name(rule):
            return True
    return False
