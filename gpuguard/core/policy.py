"""From a verdict to a decision on the ladder: observe, notify, isolate, throttle, pause, kill, hand over.

Rules say what may be done, this file says what may never be: a kill without a person's approval, any act on a subject
whose process is not certain, any act by an egress rule that is only observed, an act on counters alone but to throttle
where a rule says so.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from msgspec import Struct
from msgspec.structs import replace

from gpuguard.core import egress
from gpuguard.core.egress import EgressPolicy
from gpuguard.core.events import Rung
from gpuguard.core.labels import LABELS, VERDICTS
from gpuguard.core.subjects import context_of

if TYPE_CHECKING:
    from gpuguard.core.events import Finding
    from gpuguard.core.subjects import Context

RUNGS: tuple[Rung, ...] = ("observe", "notify", "isolate", "throttle", "pause", "kill", "hand_over")

#: Rungs that change something for the process.
ACTING: frozenset[Rung] = frozenset({"isolate", "throttle", "pause", "kill", "hand_over"})


class Match(Struct, frozen=True, forbid_unknown_fields=True):
    """What a rule or an exemption asks of a finding; an empty field asks nothing. All that is given must hold.

    ``executables`` are what the kernel says was executed, never argv[0], which is the process's own word.
    """

    labels: tuple[str, ...] = ()
    users: tuple[str, ...] = ()
    slurm_job_ids: tuple[str, ...] = ()
    sandbox_ids: tuple[str, ...] = ()
    container_ids: tuple[str, ...] = ()
    executables: tuple[str, ...] = ()


class Rule(Struct, frozen=True, forbid_unknown_fields=True):
    """One line of policy. ``ttl_s`` bounds every reversible act; ``approval`` asks a person first.

    ``counters_alone`` lets it throttle whom nothing but counters accuses, which no other rung may.
    """

    name: str
    do: Literal["notify", "isolate", "throttle", "pause", "kill", "hand_over"]
    verdict: Literal["suspect", "confirmed"] = "confirmed"
    match: Match = Match()
    approval: bool = False
    ttl_s: float = 900.0
    counters_alone: bool = False


class Exemption(Struct, frozen=True, forbid_unknown_fields=True):
    """Whom policy leaves alone (findings are still made): always with a reason, an owner and an end.

    A process's own words clear nobody: of its environment nothing counts here, and an executable or a sandbox, which a
    user can bind-mount or set, only narrows whom the user, the job's or the container's cgroup names.
    """

    name: str
    match: Match
    reason: str
    owner: str
    expires_ns: int


class Policy(Struct, frozen=True, forbid_unknown_fields=True):
    """All rules; every rule that matches gives a decision, lowest rung first. Of ``egress``, every section holds."""

    rules: tuple[Rule, ...] = ()
    exemptions: tuple[Exemption, ...] = ()
    egress: tuple[EgressPolicy, ...] = ()


class Step(Struct, frozen=True):
    """One rule applied to one finding."""

    rung: Rung
    rule: str
    needs_approval: bool
    ttl_s: float
    reason: str


_TUNNELS = ("ssh-reverse-tunnel", "ssh-reverse-shell", "reverse-shell", "ssh-role-swap", "ssh-tun", "dns-tunnel",
            "icmp-tunnel", "reverse-proxy")
_MINING = ("mining", "mining-pool")

DEFAULT_POLICY = Policy(
    rules=(
        Rule(name="tell", do="notify", verdict="suspect"),
        Rule(name="cut-tunnels", do="isolate", match=Match(labels=_TUNNELS)),
        Rule(name="pause-mining", do="pause", match=Match(labels=_MINING)),
        Rule(name="kill-mining", do="kill", match=Match(labels=_MINING), approval=True),
    ),
)


def check(policy: Policy) -> list[str]:
    """Return what is wrong with a policy, in words for its author; [] if nothing."""
    wrong = []
    for rule in policy.rules:
        wrong += [f"rule {rule.name!r}: no such label {name!r}" for name in rule.match.labels if name not in LABELS]
        if rule.ttl_s <= 0:
            wrong.append(f"rule {rule.name!r}: ttl_s must be above 0, not {rule.ttl_s}")
        if rule.do == "kill" and not rule.approval:
            wrong.append(f"rule {rule.name!r}: kill needs approval = true")
        if rule.counters_alone and (rule.do, rule.verdict) != ("throttle", "suspect"):
            # A rule that could never apply would be taken for one that does.
            wrong.append(f"rule {rule.name!r}: counters alone make nobody more than suspect and lead to no more than "
                         "throttle: counters_alone needs do = throttle and verdict = suspect")
    wrong += [
        f"exemption {one.name!r}: executables and sandbox_ids are a process's own word: "
        "add users, slurm_job_ids or container_ids" for one in policy.exemptions if _trusts_own_word(one.match)
    ]
    names = [rule.name for rule in policy.rules]
    wrong += [f"two rules are named {name!r}" for name in sorted({n for n in names if names.count(n) > 1})]
    sections = [section.name for section in policy.egress]
    wrong += [f"two sections of egress are named {name!r}" for name in sorted({n for n in sections
                                                                               if sections.count(n) > 1})]
    wrong += [one for section in policy.egress for one in egress.check(section)]
    return wrong


def decide(policy: Policy, finding: Finding) -> list[Step]:
    """Return the steps for a finding, lowest rung first; [] for one that accuses nobody or is exempted."""
    if not LABELS[finding.label].accuses or finding.verdict not in ("suspect", "confirmed"):
        return []
    if any(_exempts(one, finding) for one in policy.exemptions):
        return []
    steps = [_step(rule, finding) for rule in policy.rules if _applies(rule, finding) and _permitted(rule, finding)]
    return sorted(steps, key=lambda s: RUNGS.index(s.rung))


def _applies(rule: Rule, finding: Finding) -> bool:
    return VERDICTS.index(finding.verdict) >= VERDICTS.index(rule.verdict) and _matches(
        rule.match, finding, finding.process.context if finding.process else None)


def _step(rule: Rule, finding: Finding) -> Step:
    strongest = max(finding.evidence, key=lambda e: e.nats, default=None)
    because = f": {strongest.text}" if strongest else ""
    return Step(
        rung=rule.do,
        rule=rule.name,
        needs_approval=rule.approval or rule.do == "kill",
        ttl_s=rule.ttl_s,
        reason=f"{finding.label} {finding.verdict}{because}",
    )


def _permitted(rule: Rule, finding: Finding) -> bool:
    """Return whether a rule that applies may be followed."""
    if rule.do not in ACTING:
        return True
    if finding.label == "egress-observed" or finding.process is None:
        return False
    # What weighs nothing is no second witness.
    beyond_counters = any(one.evidence_class != "counter" and one.nats > 0 for one in finding.evidence)
    return beyond_counters or (rule.counters_alone and rule.do == "throttle")


def _trusts_own_word(match: Match) -> bool:
    own_word = match.executables or match.sandbox_ids
    return bool(own_word) and not (match.users or match.slurm_job_ids or match.container_ids)


def _exempts(exemption: Exemption, finding: Finding) -> bool:
    process = finding.process
    if finding.time_ns >= exemption.expires_ns or _trusts_own_word(exemption.match):
        return False
    if process is None:
        return _matches(exemption.match, finding, None)
    # Below user.slice a user may name cgroups as he likes, cgroups(7), "Delegation".
    certain = context_of("" if process.cgroup.startswith("/user.slice/") else process.cgroup, {})
    return _matches(exemption.match, finding, replace(certain, sandbox_id=process.context.sandbox_id))


def _matches(match: Match, finding: Finding, context: Context | None) -> bool:
    process = finding.process
    asked = (
        (match.labels, finding.label),
        (match.users, process.user if process else ""),
        (match.slurm_job_ids, context.slurm_job_id if context else ""),
        (match.sandbox_ids, context.sandbox_id if context else ""),
        (match.container_ids, context.container_id if context else ""),
        (match.executables, process.executable if process else ""),
    )
    return all(not wanted or value in wanted for wanted, value in asked)
