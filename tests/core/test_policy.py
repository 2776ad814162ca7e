from __future__ import annotations

from msgspec import structs

from gpuguard.core.policy import DEFAULT_POLICY, Exemption, Match, Policy, Rule, check, decide
from gpuguard.core.subjects import Context
from tests.core.builders import T0, brief, evidence, finding, pid

PROCESS = brief(pid(5), user="alice", cgroup="/system.slice/slurmstepd.scope/job_42/step_0",
                context=Context(slurm_job_id="42"))


def rungs(policy: Policy, one: object) -> list[str]:
    return [step.rung for step in decide(policy, one)]  # type: ignore[arg-type]


def test_the_default_policy_is_sound_and_climbs_reversible_first() -> None:
    assert check(DEFAULT_POLICY) == []
    steps = decide(DEFAULT_POLICY, finding(process=PROCESS))
    assert [(s.rung, s.needs_approval) for s in steps] == [("notify", False), ("pause", False), ("kill", True)]
    assert rungs(DEFAULT_POLICY, finding(label="ssh-reverse-tunnel", process=PROCESS)) == ["notify", "isolate"]


def test_suspicion_is_told_and_no_more() -> None:
    assert rungs(DEFAULT_POLICY, finding(verdict="suspect", process=PROCESS)) == ["notify"]


def test_labels_that_accuse_nobody_are_left_alone() -> None:
    everything = Policy(rules=(Rule(name="all", do="pause", verdict="suspect"),))
    assert rungs(everything, finding(label="ssh-interactive", verdict="clear", process=PROCESS)) == []
    assert rungs(everything, finding(verdict="unknown", process=PROCESS)) == []


def test_an_uncertain_process_is_never_acted_on() -> None:
    assert rungs(DEFAULT_POLICY, finding(process=None)) == ["notify"]


def test_counters_alone_never_lead_to_an_act() -> None:
    seen = (evidence(30.0, evidence_class="counter"),)
    assert rungs(DEFAULT_POLICY, finding(process=PROCESS, seen=seen)) == ["notify"]


def test_what_weighs_nothing_is_no_second_witness() -> None:
    seen = (evidence(30.0, evidence_class="counter"), evidence(0.0, evidence_class="launch"))
    assert rungs(DEFAULT_POLICY, finding(process=PROCESS, seen=seen)) == ["notify"]


def test_counters_alone_throttle_where_a_rule_says_so_and_do_nothing_else() -> None:
    seen = (evidence(6.25, evidence_class="counter"),)
    throttle = Rule(name="slow", do="throttle", verdict="suspect", counters_alone=True)
    policy = Policy(rules=(*DEFAULT_POLICY.rules, throttle))
    assert check(policy) == []
    assert rungs(policy, finding(verdict="suspect", process=PROCESS, seen=seen)) == ["notify", "throttle"]
    assert rungs(policy, finding(verdict="suspect", process=None, seen=seen)) == ["notify"]
    silent = structs.replace(throttle, counters_alone=False)
    assert rungs(Policy(rules=(silent,)), finding(verdict="suspect", process=PROCESS, seen=seen)) == []
    for wrong in (structs.replace(throttle, do="pause"), structs.replace(throttle, verdict="confirmed")):
        assert "counters alone make nobody more than suspect" in check(Policy(rules=(wrong,)))[0]
    paused = Policy(rules=(structs.replace(throttle, do="pause"),))
    assert rungs(paused, finding(verdict="suspect", process=PROCESS, seen=seen)) == []


def test_kill_asks_even_where_the_rule_forgot_to() -> None:
    policy = Policy(rules=(Rule(name="k", do="kill"),))
    assert check(policy) == ["rule 'k': kill needs approval = true"]
    assert [s.needs_approval for s in decide(policy, finding(process=PROCESS))] == [True]


def test_exemption_holds_for_whom_and_until_when_it_says() -> None:
    match = Match(slurm_job_ids=("42",))
    exemption = Exemption(name="audit", match=match, reason="password audit", owner="it", expires_ns=T0 + 1)
    policy = Policy(rules=DEFAULT_POLICY.rules, exemptions=(exemption,))
    assert rungs(policy, finding(process=PROCESS)) == []
    assert rungs(policy, finding(process=PROCESS, time_ns=T0 + 1)) == ["notify", "pause", "kill"]
    assert rungs(policy, finding(process=brief(pid(6)))) == ["notify", "pause", "kill"]


def exempting(**match: tuple[str, ...]) -> Policy:
    exemption = Exemption(name="x", match=Match(**match), reason="agreed", owner="it", expires_ns=T0 + 1)
    return Policy(rules=DEFAULT_POLICY.rules, exemptions=(exemption,))


def test_what_a_process_says_of_itself_exempts_it_from_nothing() -> None:
    """SLURM_JOB_ID and sandbox ids are environment; a user's own cgroups bear the names that the user likes."""
    everything = ["notify", "pause", "kill"]
    claims = Context(slurm_job_id="42", sandbox_id="lab")
    assert rungs(exempting(slurm_job_ids=("42",)), finding(process=brief(pid(5), context=claims))) == everything
    own = "/user.slice/user-1000.slice/user@1000.service/slurmstepd.scope/job_42"
    assert rungs(exempting(slurm_job_ids=("42",)), finding(process=brief(pid(5), cgroup=own))) == everything
    assert rungs(exempting(sandbox_ids=("lab",)), finding(process=brief(pid(5), context=claims))) == everything
    assert "own word" in check(exempting(sandbox_ids=("lab",)))[0]
    assert "own word" in check(exempting(executables=("/usr/bin/bench",)))[0]
    narrowed = exempting(users=("alice",), sandbox_ids=("lab",))
    assert check(narrowed) == []
    assert rungs(narrowed, finding(process=brief(pid(5), user="alice", context=claims))) == []


def test_an_executable_is_what_ran_and_not_argv() -> None:
    pretender = structs.replace(PROCESS, argv=("/opt/miner",), executable="/usr/bin/other")
    hidden = structs.replace(PROCESS, argv=("./trainer",), executable="/opt/miner")
    policy = Policy(rules=(Rule(name="r", do="pause", match=Match(executables=("/opt/miner",))),))
    assert rungs(policy, finding(process=pretender)) == []
    assert rungs(policy, finding(process=hidden)) == ["pause"]


def test_check_names_what_is_wrong() -> None:
    policy = Policy(rules=(Rule(name="a", do="pause", match=Match(labels=("minning",)), ttl_s=0),
                           Rule(name="a", do="notify")))
    assert check(policy) == [
        "rule 'a': no such label 'minning'",
        "rule 'a': ttl_s must be above 0, not 0",
        "two rules are named 'a'",
    ]
