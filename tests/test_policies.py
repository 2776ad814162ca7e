"""Policy files: what they mean, and that a wrong one is refused with the place and the way out."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuguard import policies
from gpuguard.core.policy import DEFAULT_POLICY, Policy
from gpuguard.policies import PolicyError, load_policy, parse_policy

EXAMPLE = Path(__file__).parent.parent / "deploy" / "policies.d" / "default.yaml"

EXEMPTION = """
exemptions:
  - name: bench
    match: {users: [bench], slurm_job_ids: ["4711"]}
    reason: agreed
    owner: infra
    expires: %s
"""


def test_the_shipped_example_is_the_built_in_policy():
    assert load_policy([EXAMPLE]) == DEFAULT_POLICY


def test_no_file_is_the_built_in_policy():
    assert load_policy([]) == DEFAULT_POLICY


def test_an_empty_file_is_a_policy_without_rules():
    assert parse_policy("", "x") == Policy()
    assert parse_policy("# nothing\n", "x") == Policy()


@pytest.mark.parametrize(("written", "seconds"), [
    ("30", 30), ("30 s", 30), ("15 min", 900), ("2h", 7200), ("1 d", 86400),
])
def test_durations_as_people_write_them(written, seconds):
    policy = parse_policy(f"rules: [{{name: a, do: pause, ttl_s: {written}}}]", "x")
    assert policy.rules[0].ttl_s == seconds


@pytest.mark.parametrize(("written", "end"), [
    ("2027-01-31", datetime(2027, 2, 1, tzinfo=UTC)),
    ("2027-01-31T12:00:00Z", datetime(2027, 1, 31, 12, tzinfo=UTC)),
    ("2027-01-31T12:00:00+02:00", datetime(2027, 1, 31, 10, tzinfo=UTC)),
    ("2027-01-31 12:00:00", datetime(2027, 1, 31, 12, tzinfo=UTC)),
])
def test_an_exemption_ends_when_it_says(written, end):
    exemption = parse_policy(EXEMPTION % written, "x").exemptions[0]
    assert exemption.expires_ns == int(end.timestamp()) * 10**9
    assert exemption.match.users == ("bench",)


@pytest.mark.parametrize(("text", "words"), [
    ("rules:\n  - name: a\n    doo: pause", ["rule 1 (a)", "'doo'", "did you mean 'do'"]),
    ("rules: [{name: a, do: puase}]", ["rule 1 (a)", "puase"]),
    ("rules: [{do: pause}]", ["rule 1", "name"]),
    ("rules: [{name: a, do: kill}]", ["'a'", "approval"]),
    ("rules: [{name: a, do: pause, ttl_s: soon}]", ["ttl_s", "'soon'", "15 min"]),
    ("rules: [{name: a, do: pause, ttl_s: 0}]", ["ttl_s", "above 0"]),
    ("rules: [{name: a, do: pause, match: {labels: [minning]}}]", ["no such label 'minning'"]),
    ("rules: [{name: a, do: pause, match: {lables: [mining]}}]", ["match", "did you mean 'labels'"]),
    ("rules: [{name: a, do: pause, match: mining}]", ["match must be a mapping"]),
    ("rules: [{name: a, do: pause}, {name: a, do: notify}]", ["two rules are named 'a'"]),
    ("rules: [pause]", ["rules must be a list"]),
    ("rules: pause", ["rules must be a list"]),
    ("rulez: []", ["the file", "did you mean 'rules'"]),
    ("- a\n- b", ["a policy is a mapping"]),
    ("rules:\n  - name: a\n   do: pause", ["x:3"]),
    ("rules: []\nrules: []", ["x:2", "given twice"]),
    ("rules: &r []\nexemptions: *r", ["x:2", "aliases"]),
    ("rules: !!python/object/apply:os.system [true]", ["x:1"]),
    (EXEMPTION % "soon", ["exemption 1", "expires", "2027-01-31"]),
    ("exemptions: [{name: a, reason: r, owner: o, expires: 2027-01-01, match: {}}]", ["exempt everybody"]),
    ("exemptions: [{name: a, reason: r, owner: o, expires: 2027-01-01}]", ["exempt everybody"]),
    ("exemptions: [{name: a, match: {users: [b]}, owner: o, expires: 2027-01-01}]", ["reason"]),
    ("rules: " + "[" * 20_000, ["x"]),
])
def test_a_wrong_policy_is_refused_in_words(text, words):
    with pytest.raises(PolicyError) as caught:
        parse_policy(text, "x")
    for word in words:
        assert word in str(caught.value)


def test_files_add_up_and_names_must_differ_across_them(tmp_path):
    one, two = tmp_path / "1.yaml", tmp_path / "2.yaml"
    one.write_text("rules: [{name: a, do: notify}]")
    two.write_text("rules: [{name: b, do: pause}]")
    assert [rule.name for rule in load_policy([one, two]).rules] == ["a", "b"]
    two.write_text("rules: [{name: a, do: pause}]")
    with pytest.raises(PolicyError, match="two rules are named 'a'"):
        load_policy([one, two])


def test_files_are_found_and_bounded(tmp_path):
    folder = tmp_path / "gpuguard" / "policies.d"
    folder.mkdir(parents=True)
    for name in ("b.yaml", "a.yml", "c.txt"):
        (folder / name).write_text("rules: []")
    found = policies.policy_files({"XDG_CONFIG_HOME": str(tmp_path)}, root=False)
    assert [path.name for path in found if folder in path.parents] == ["a.yml", "b.yaml"]
    (folder / "b.yaml").write_text("#" * (policies.FILE_BYTES_MAX + 1))
    with pytest.raises(PolicyError, match="larger than"):
        load_policy([folder / "b.yaml"])
    with pytest.raises(PolicyError, match="No such file"):
        load_policy([folder / "absent.yaml"])
    with pytest.raises(PolicyError, match="at most"):
        load_policy([folder / "a.yml"] * (policies.FILES_MAX + 1))


@given(st.text(max_size=120) | st.text(alphabet="rules:{}[]&*! \n-namedo", max_size=120))
def test_any_text_is_a_policy_or_a_policy_error(text):
    try:
        assert isinstance(parse_policy(text, "x"), Policy)
    except PolicyError as error:
        assert str(error).startswith("x")
