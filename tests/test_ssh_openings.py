"""Sessions that open one channel and ask for no port are never confirmed to have asked for one, whatever the server
says beside its answers and however TCP joins it; and openings of programs that were found misread."""

from __future__ import annotations

import sys
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuguard.core.fusion import SUSPECT_NATS, confirm_nats
from gpuguard.core.ssh.host_keys import host_keys
from gpuguard.core.ssh.messages import OPEN_CONFIRMATION, REPLY, SESSION_OPEN, tcpip_forward
from gpuguard.core.ssh.suites import record_bytes, suite_of

sys.path.insert(0, str(Path(__file__).resolve().parent))
from ssh_openings import BANNERS, NAMES, play
from ssh_talk import HOST_KEYS, HOST_KEYS_BYTES, Talk

REQUEST = "ssh-reverse-forward-request"
OPEN = "ssh-reverse-channel-open"
CONFIRMED = confirm_nats(0.1)
OPENSSH = "SSH-2.0-OpenSSH_9.2p1"
PUTTY = "SSH-2.0-PuTTY_Release_0.78"
CONCH = "SSH-2.0-Twisted_26.10.0"
DEBUG = 116  # "authorized:1: key options: agent-forwarding port-forwarding pty user-rc x11-forwarding", and its frame


def accused(talk):
    return max(talk.nats(REQUEST) + talk.nats(OPEN), talk.nats("ssh-tun"))


@settings(max_examples=1000, deadline=None, derandomize=True)
@given(st.sampled_from(NAMES), st.sampled_from(BANNERS), st.randoms(use_true_random=False))
def test_an_ordinary_session_is_never_confirmed_to_be_a_tunnel(suite, banner, rng):
    assert accused(play(rng, suite, banner)) < CONFIRMED


def test_few_ordinary_sessions_are_suspected():
    """These servers say more than any does: one session in a hundred may be doubtful among them."""
    suspected = 0
    for seed in range(3_000):
        rng = Random(seed)
        suite, banner = rng.choice(NAMES), rng.choice(BANNERS)
        suspected += accused(play(rng, suite, banner)) >= SUSPECT_NATS
    assert suspected <= 30


@pytest.mark.parametrize("suite", NAMES)
@pytest.mark.parametrize("banner", [PUTTY, "SSH-2.0-libssh2_1.10.0", CONCH])
def test_a_copy_whose_confirmation_came_beside_a_message(suite, banner):
    """PuTTY's and curl's copies, as they were seen: the second DEBUG in one segment with the confirmation."""
    talk = Talk(suite, banner=banner, server=OPENSSH).login()
    talk.ours(SESSION_OPEN, after_ns=1_000_000)
    talk.theirs(DEBUG, HOST_KEYS_BYTES, after_ns=300_000)
    talk.theirs(DEBUG, OPEN_CONFIRMATION, after_ns=40_000_000)
    talk.ours(44, 40, after_ns=100_000)
    talk.theirs(9, 5, after_ns=400_000)
    talk.ours(10)
    talk.theirs(300)
    assert accused(talk) == 0
    assert "ssh-exec" in talk.named()


@pytest.mark.parametrize("suite", NAMES)
def test_an_answer_beside_a_message_that_was_said_before(suite):
    """`plink -N -R`, which says no more: suspect by what the server said before, and with its use."""
    talk = Talk(suite, banner=PUTTY, server=OPENSSH).login()
    talk.ours(tcpip_forward(9), after_ns=1_000_000)
    talk.theirs(DEBUG, HOST_KEYS_BYTES, after_ns=300_000)
    talk.theirs(DEBUG, REPLY, after_ns=40_000_000)
    assert SUSPECT_NATS <= talk.nats(REQUEST) < CONFIRMED


@pytest.mark.parametrize("suite", NAMES)
def test_what_was_read_beside_a_message_is_taken_back(suite):
    """A message that is shorter than the one before by what a confirmation is longer than an answer."""
    talk = Talk(suite, banner=PUTTY, server=OPENSSH).login()
    talk.ours(SESSION_OPEN, after_ns=1_000_000)
    talk.theirs(DEBUG, HOST_KEYS_BYTES, after_ns=300_000)
    both = record_bytes(talk.server_suite, DEBUG) + record_bytes(talk.server_suite, REPLY)
    talk.raw(both, client=False, after_ns=40_000_000)
    talk.ours(300, after_ns=100_000)
    assert talk.nats(REQUEST) == 0


@pytest.mark.parametrize("suite", NAMES)
@pytest.mark.parametrize("together", [True, False])
def test_a_request_of_a_clients_own_before_its_session(suite, together):
    """Twisted's conch: conch-keep-alive@twistedmatrix.com, as long as tcpip-forward, and its session."""
    talk = Talk(suite, banner=CONCH, server=OPENSSH).login()
    talk.ours(41, SESSION_OPEN, after_ns=1_000_000)
    if together:
        talk.theirs(REPLY, OPEN_CONFIRMATION)
    else:
        talk.theirs(REPLY)
        talk.theirs(OPEN_CONFIRMATION)
    talk.ours(300)
    talk.theirs(5)
    assert accused(talk) < SUSPECT_NATS


@pytest.mark.parametrize("suite", NAMES)
def test_the_proof_of_the_host_keys_is_no_request_of_a_session(suite):
    """ssh2 for Node.js asks for it at once; what it asks for next is what the session is for."""
    talk = Talk(suite, banner="SSH-2.0-ssh2js1.17.0", server=OPENSSH).login()
    talk.ours(SESSION_OPEN, after_ns=1_000_000)
    talk.theirs(HOST_KEYS_BYTES)
    talk.ours(HOST_KEYS_BYTES + 6, after_ns=1_000_000)
    talk.theirs(OPEN_CONFIRMATION)
    talk.ours(40, after_ns=500_000)
    talk.theirs(host_keys(HOST_KEYS)[1].proofs[2])
    talk.theirs(9, 5)
    assert "ssh-interactive" not in talk.named()
    assert "ssh-exec" in talk.named()


def test_lengths_about_host_keys():
    """As they were seen on the wire of OpenSSH 9.2 with its three default keys, in AES-GCM: 628, 644 and 628."""
    suite = suite_of("aes256-gcm@openssh.com", "", "none")
    rsa_3072 = host_keys(HOST_KEYS)[1]
    assert rsa_3072.announced == HOST_KEYS_BYTES
    assert [record_bytes(suite, one) for one in (rsa_3072.announced, rsa_3072.prove)] == [628, 644]
    assert {record_bytes(suite, one) for one in rsa_3072.proofs} == {628}
    assert host_keys(()) == []
