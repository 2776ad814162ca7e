"""Sessions within sessions, the agent and the screen used from afar, refused logins: told, and accusing nobody."""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuguard.core.detectors import ssh_use
from gpuguard.core.host import Host
from gpuguard.core.labels import LABELS
from gpuguard.core.observations import FlowUse
from gpuguard.core.ssh.inner import NESTED_MIN, FromServer, Nested
from gpuguard.core.ssh.login import NAME_REFUSED_NATS
from gpuguard.core.ssh.messages import DATA, ENDING, KEY, OPEN_CONFIRMATION, REPLY
from gpuguard.core.ssh.sizes import ServerChannel
from gpuguard.core.ssh.suites import record_bytes, suite_of
from gpuguard.core.subjects import FlowId

sys.path.insert(0, str(Path(__file__).resolve().parent))
from ssh_talk import BENIGN, SUITES, Talk, play

FLOW = FlowId(0, 6, "10.0.0.2", 40_000, "192.0.2.7", 22, 0, True)
USE = FlowUse(time_ns=1, flow=FLOW, use="", carrier="ssh", nats=0.0, text="seen", start_ns=0, packets=9)


def type_in(talk, key, times=NESTED_MIN + 2):
    for _ in range(times):
        talk.ours(DATA + key, after_ns=150_000_000)
        talk.theirs(DATA + key, after_ns=30_000_000)


@pytest.mark.parametrize("suite", SUITES)
@pytest.mark.parametrize("depth", [1, 2])
def test_how_deep_a_session_is_nested(suite, depth):
    talk = Talk(suite).login()
    play(talk, BENIGN["-W"][0])
    inner = suite_of("chacha20-poly1305@openssh.com", "", "none")
    key = record_bytes(inner, KEY)
    for _ in range(depth - 1):
        key = record_bytes(inner, DATA + key)
    type_in(talk, key)
    told = [use for use in talk.uses if use.use == "ssh-nested-in-jump"]
    assert told
    assert f"within {depth} other" in told[-1].text


@pytest.mark.parametrize("story", ["shell", "exec", "-N -L", "-W", "keepalives in a shell"])
def test_what_is_typed_at_the_outer_level_is_not_nested(story):
    talk = Talk().login()
    play(talk, BENIGN[story][0])
    for _ in range(40):
        talk.ours(KEY, after_ns=150_000_000)
        talk.theirs(KEY, after_ns=30_000_000)
    talk.ours(DATA + 36)
    talk.theirs(DATA + 36)
    assert not any("nested" in use for use in talk.named())


@pytest.mark.parametrize("suite", SUITES)
@pytest.mark.parametrize(("opened", "said", "answered", "use"), [
    (39, 9 + 5, 9 + 90, "ssh-agent-used-in-interactive"), (39, 9 + 212, 9 + 5, "ssh-agent-used-in-interactive"),
    (30, 9 + 244, 9 + 5, "ssh-agent-used-in-interactive"),
    (37, 9 + 48, 9 + 3_000, "ssh-x11-used-in-interactive"), (37, 9 + 30, 9 + 3_000, None),
    (66, 9 + 48, 9 + 3_000, None),
    # Keys, of which one is as long as a confirmation in blocks of 16 bytes; and a display that refuses.
    (39, 9 + 5, KEY, None), (37, 9 + 48, 2 * ENDING, None),
])
def test_the_agent_and_the_screen_of_this_side(suite, opened, said, answered, use):
    talk = Talk(suite).login()
    play(talk, BENIGN["shell"][0])
    talk.theirs(opened, after_ns=2 * 10**9)
    talk.ours(OPEN_CONFIRMATION, after_ns=500_000)
    talk.theirs(said, after_ns=30_000_000)
    assert not any("used" in one for one in talk.named())
    talk.ours(answered, after_ns=300_000)
    # In blocks of 16 bytes both opens cost the same, but not what is said first.
    assert [one for one in sorted(talk.named()) if "used" in one] == ([use] if use else [])


@pytest.mark.parametrize("asked", [True, False])
def test_of_a_library_the_agent_is_told_where_it_was_asked_for(asked):
    talk = Talk("gcm", banner="SSH-2.0-paramiko_5.1.0", server="SSH-2.0-OpenSSH_9.2p1").login()
    play(talk, f"c24 s17 {'c36 ' if asked else ''}c27 s9+5 w s39 c17 s14 c100")
    assert ("ssh-agent-used-in-exec" in talk.named()) == asked


@pytest.mark.parametrize("suite", SUITES)
def test_refused_logins_are_counted(suite):
    talk = Talk(suite)
    talk.ours(17)
    talk.theirs(17)
    talk.ours(45)
    talk.theirs(6 + 18)  # the answer to "none"
    for _ in range(3):
        talk.ours(130)
        talk.theirs(6 + 18)
    told = [use for use in talk.uses if use.use == "ssh-login-refused"]
    assert [use.nats for use in told] == [NAME_REFUSED_NATS, 0.0, 0.0]
    assert "3 time(s)" in told[-1].text
    talk.ours(130)
    talk.theirs(71)  # this key may be used
    talk.ours(300)
    assert talk.theirs(REPLY) == ["authenticated"]


def test_prompts_are_no_refusals():
    """keyboard-interactive, RFC 4256: a short request, prompts of a refusal's length, and an empty one at the end."""
    talk = Talk()
    talk.ours(17)
    talk.theirs(17)
    talk.ours(45)
    talk.theirs(6 + 30)
    talk.ours(70)
    talk.theirs(37)
    talk.ours(128)
    talk.theirs(17)
    talk.ours(5)
    talk.theirs(REPLY)
    assert talk.named() == {"authenticated"}


@pytest.mark.parametrize("suite", SUITES)
def test_a_long_command_is_no_terminal(suite):
    talk = Talk(suite, server="SSH-2.0-OpenSSH_9.2p1").login()
    play(talk, "c24+34 s344 s17 c400 s9+5 s300")
    assert "ssh-exec" in talk.named()
    assert "ssh-interactive" not in talk.named()
    talk = Talk(suite, server="SSH-2.0-OpenSSH_9.2p1").login()
    play(talk, "c24+34 s344 s17 c400 s5+9+5 s300")
    assert "ssh-interactive" in talk.named()


@pytest.mark.parametrize(("use", "nats", "label"), [
    ("ssh-nested-in-jump", 0.0, "ssh-jump"), ("ssh-agent-used-in-exec", 0.0, "ssh-exec"),
    ("ssh-nested-in-reverse-tunnel", 0.0, "ssh-reverse-tunnel"), ("ssh-login-refused", 3.0, "ssh"),
    ("ssh-exec", 4.0, "ssh-exec"), ("ssh-exec", 0.0, None), ("keepalive", 0.0, ""), ("authenticated", 0.0, ""),
    ("ssh-channel-2", 0.0, ""), ("ssh-channels", 0.0, ""), ("ssh-forwarding-asked", 0.0, ""),
])
def test_what_is_seen_beside_a_use_is_told_with_it(use, nats, label):
    told = ssh_use.Detector().receive(msgspec.structs.replace(USE, use=use, nats=nats), Host())
    assert [one.label for one in told] == ([] if label is None else [label])
    assert all(one.nats == nats and (one.label in LABELS or one.label == "") for one in told)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.booleans(), st.sampled_from((36, 44, 68, 76, 116)), st.integers(0, 2 * 10**9)),
                max_size=120))
def test_nested_is_told_once_and_only_for_pairs_enough(records):
    nested = Nested({(76, 76): 1, (116, 116): 2})
    watch = FromServer((ServerChannel("x", frozenset({68}), {44: 116}),), 44)
    now, told, pairs = 0, [], {1: 0, 2: 0}
    before = (False, 0, -10**12)
    for client, size, after_ns in records:
        now += after_ns
        if before[0] != client and before[1] == size in (76, 116) and now - before[2] <= 10**9:
            pairs[1 if size == 76 else 2] += 1
        before = (client, size, now)
        depth = nested.segment(now, size, from_client=client)
        told += [depth] if depth else []
        assert watch.segment(now, size, from_client=client) in ("", "x")
    assert told == sorted(set(told))
    assert all(pairs[depth] >= 2 * NESTED_MIN for depth in told)
