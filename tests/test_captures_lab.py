"""The committed sample of the lab's captures: one session of each family, real programs on both sides, not only SSH.

Families are split into development and held-out ones (`gpuguard/lab/corpus.py`). What is not met stands here by family,
with its reason; anything else that is missed, or told wrongly, fails.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from gpuguard.core.labels import LABELS
from gpuguard.lab import corpus
from gpuguard.lab.judging import ACCUSING, SHELL_EXCHANGES_MAX, SHELLS, judge_corpus, read_labels

SAMPLE = Path(__file__).resolve().parent / "fixtures" / "captures"

# Named when it is used, or not at all, because before that its records cost what others cost.
NOT_BEFORE_USE = {
    # On a running session a request costs what a keepalive, an open or pasted text costs (blocks of 16 bytes).
    "reverse-late", "reverse-late-none", "reverse-late-typing",
}
# ... and of one client each: what AsyncSSH's compressed request costs, an open onwards may cost too, and its answer
# what a confirmation costs. Go's of a wide bind costs what no-more-sessions costs, and dropbear answers it with the
# size of its IGNORE.
NOT_BEFORE_USE_OF = {"asyncssh.reverse-compressed", "asyncssh.reverse-shell-compressed", "go.reverse-wide"}
# Accused, and should not be: seldom asked through a broker within TLS, and each answer takes another time to work out.
LIKE_A_LINE_SHELL = {"redis-worker-worked"}
# The lab's own loop around libssh answers some milliseconds late, so that fewer exchanges count as answered at once.
SLOW_TO_ANSWER = {"libssh.reverse"}


@pytest.fixture(scope="module")
def judged():
    return {one.truth["family"]: one for one in judge_corpus(SAMPLE)}


def families(*, reverse: bool) -> list[str]:
    rows = read_labels(SAMPLE)
    return sorted(row["family"] for row in rows if (row["expected"] == "ssh-reverse-tunnel") == reverse
                  and "evasion" not in row["family"])


def use_of(family: str) -> str:
    return family.split(".", 1)[1]


def test_the_sample_is_of_both_splits():
    rows = read_labels(SAMPLE)
    assert {row["split"] for row in rows} == {"development", "held-out"}
    assert {row["client"] for row in rows if row["split"] == "held-out"} >= set(corpus.HELD_CLIENTS)


@pytest.mark.parametrize("family", [one for one in families(reverse=True)
                                    if use_of(one) not in NOT_BEFORE_USE and one not in NOT_BEFORE_USE_OF])
def test_a_request_is_named_before_it_is_used(judged, family):
    one = judged[family]
    assert one.requested_in_time, (one.name, one.label, one.verdict, one.uses)


@pytest.mark.parametrize("family", [one for one in families(reverse=False) if use_of(one) not in LIKE_A_LINE_SHELL])
def test_what_is_no_reverse_tunnel_has_its_own_name(judged, family):
    one = judged[family]
    assert one.right, (one.name, one.truth["expected"], one.label, one.worst)


def test_shells_through_a_tunnel_are_named_within_ten_exchanges(judged):
    shells = [one for one in judged.values() if one.truth["through"] in SHELLS and "evasion" not in one.truth["family"]
              and one.truth["expected"] == "ssh-reverse-tunnel" and one.truth["family"] not in SLOW_TO_ANSWER]
    late = [one.name for one in shells if one.shell_ns is not None and one.exchanges > SHELL_EXCHANGES_MAX]
    assert shells
    assert not late


def test_a_session_that_goes_out_is_nobodys_reverse_shell(judged):
    accused = {one.name: one.label for one in judged.values()
               if one.worst in ACCUSING and not LABELS[one.truth["expected"].split("|")[0]].accuses
               and use_of(one.truth["family"]) not in LIKE_A_LINE_SHELL}
    assert accused == {}
