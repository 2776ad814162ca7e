"""Running sessions that ask for no port are never confirmed to have asked for one, whatever goes on in them; and the
later life of sessions that were found misread, and of ports asked for late that were missed."""

from __future__ import annotations

import sys
from pathlib import Path
from random import Random

import pytest

from gpuguard.core.fusion import SUSPECT_NATS, confirm_nats
from gpuguard.core.ssh.global_requests import LATER_OFF_BEAT_NATS, LATER_REQUEST_NATS
from gpuguard.core.ssh.messages import (
    CHANNEL_KEEPALIVE,
    DATA,
    ENDING,
    IGNORE,
    KEEPALIVE,
    KEY,
    OPEN_CONFIRMATION,
    REPLY,
    SESSION_OPEN,
    SFTP_INIT,
    WINDOW_ADJUST,
    tcpip_forward,
)

sys.path.insert(0, str(Path(__file__).resolve().parent))
from ssh_running import CLIENTS, MS, NAMES, SECOND, play
from ssh_talk import Talk

REQUEST = "ssh-reverse-forward-request"
ACCUSING = (REQUEST, "ssh-reverse-channel-open", "ssh-reverse-channel-asked", "ssh-tun")
CONFIRMED = confirm_nats(0.1)
OPENSSH = "SSH-2.0-OpenSSH_9.2p1"
ASYNCSSH = "SSH-2.0-AsyncSSH_2.14.0"
#: No data is as short as the answer to a global request: all suites but 16-byte blocks under AEAD or encrypt-then-MAC.
SHORT = ("chacha20", "umac64", "cbc", "sha1", "sha256", "sha512", "umac128")
EIGHT = ("chacha20",)


def accused(talk):
    return sum(max(0.0, talk.nats(use)) for use in ACCUSING)


def shell(suite, banner=OPENSSH):
    talk = Talk(suite, banner=banner, server=OPENSSH).login()
    talk.ours(SESSION_OPEN, *((34,) if banner == OPENSSH else ()), after_ns=MS)
    talk.theirs(OPEN_CONFIRMATION)
    talk.ours(300, 15)
    talk.theirs(ENDING, WINDOW_ADJUST, ENDING)
    talk.theirs(DATA + 60)
    return talk


def type_keys(talk, count=6, *, after_ns=200 * MS):
    for _ in range(count):
        talk.ours(KEY, after_ns=after_ns)
        talk.theirs(KEY, after_ns=10 * MS)


def test_a_running_session_is_never_confirmed_to_be_a_tunnel():
    """One in 500 may be doubtful: up to four things go on in each, at the same time."""
    suspected = 0
    for seed in range(3_000):
        rng = Random(seed)
        suite, banner = rng.choice(NAMES), rng.choice(CLIENTS)
        nats = accused(play(rng, suite, banner))
        assert nats < CONFIRMED, (seed, suite, banner)
        suspected += nats >= SUSPECT_NATS
    assert suspected <= 6


@pytest.mark.parametrize("suite", NAMES)
def test_a_later_key_exchange_is_no_request(suite):
    """KEX_ECDH_INIT with curve25519 is as long as tcpip-forward, and NEWKEYS as an answer to it."""
    talk = shell(suite)
    type_keys(talk)
    talk.ours(1_300, after_ns=SECOND)
    talk.theirs(1_000)
    talk.ours(37)
    talk.theirs(37 + 51 + 83 + 9)
    talk.theirs(REPLY, after_ns=10_000)
    talk.ours(REPLY)
    assert accused(talk) == 0


@pytest.mark.parametrize("suite", NAMES)
def test_the_end_of_a_channel_is_no_answer(suite):
    """A connection onwards beside a shell: the server ends it by its EOF, and the client does."""
    talk = shell(suite)
    type_keys(talk)
    talk.ours(63, after_ns=SECOND)
    talk.theirs(OPEN_CONFIRMATION)
    talk.ours(tcpip_forward(12))
    talk.theirs(ENDING)
    talk.ours(ENDING, after_ns=MS)
    assert accused(talk) < SUSPECT_NATS


@pytest.mark.parametrize("suite", NAMES)
def test_what_a_library_asks_for_on_a_further_session(suite):
    """Each request waits for its answer, which is as short as that to a global request with classic MACs."""
    talk = shell(suite, "SSH-2.0-Go")
    for _ in range(3):
        talk.ours(SESSION_OPEN, after_ns=SECOND)
        talk.theirs(OPEN_CONFIRMATION)
        for asked in (33, 60, 15):
            talk.ours(asked, after_ns=MS)
            talk.theirs(ENDING)
    assert accused(talk) < SUSPECT_NATS


@pytest.mark.parametrize("suite", NAMES)
def test_keepalives_that_cross_come_no_sooner_than_others(suite):
    """Both clocks run out at once: the server is heard just before the client asks whether it is there."""
    talk = shell(suite)
    type_keys(talk)
    talk.theirs(DATA + 40, after_ns=14 * SECOND)
    for _ in range(3):
        talk.theirs(CHANNEL_KEEPALIVE, after_ns=15 * SECOND)
        talk.ours(KEEPALIVE, after_ns=30_000)
        talk.ours(ENDING, after_ns=100_000)
        talk.theirs(REPLY, after_ns=10 * MS)
    assert accused(talk) == 0


@pytest.mark.parametrize("suite", NAMES)
def test_keepalives_that_pause_are_a_clock_all_the_same(suite):
    """A client that was stopped for an hour, as by Ctrl-Z."""
    talk = shell(suite)
    type_keys(talk)
    for seconds in (15, 15, 3_600, 15, 15):
        talk.ours(KEEPALIVE, after_ns=seconds * SECOND)
        talk.theirs(REPLY)
    talk.ours(KEY, after_ns=60 * SECOND)
    assert accused(talk) == 0


@pytest.mark.parametrize("suite", SHORT)
@pytest.mark.parametrize("silence_ns", [1, 15 * SECOND])
def test_data_as_long_as_a_request_before_a_keepalive_is_answered(suite, silence_ns):
    """The keepalive of a silence; or of a client that sends one each second, whatever goes on, as was seen before."""
    talk = shell(suite)
    type_keys(talk)
    if silence_ns < SECOND:
        talk.ours(KEEPALIVE, after_ns=SECOND)
        talk.theirs(REPLY)
    talk.ours(KEEPALIVE, after_ns=silence_ns)
    talk.ours(tcpip_forward(9), after_ns=5 * MS)
    talk.theirs(REPLY)
    assert accused(talk) == 0


@pytest.mark.parametrize("suite", EIGHT)
@pytest.mark.parametrize("idle_ns", [MS, 2 * SECOND])
def test_a_port_asked_for_after_a_copy(suite, idle_ns):
    """The open of a session, and what SFTP asks for, may cost what a keepalive costs; none comes while the server is
    heard."""
    talk = Talk(suite, banner=OPENSSH, server=OPENSSH).login()
    if idle_ns > SECOND:
        talk.ours(34, after_ns=MS)
    talk.ours(SESSION_OPEN, after_ns=idle_ns)
    talk.theirs(OPEN_CONFIRMATION)
    talk.ours(27)
    talk.theirs(ENDING, WINDOW_ADJUST)
    talk.ours(SFTP_INIT)
    talk.theirs(300)
    for _ in range(4):
        talk.ours(KEEPALIVE)
        talk.theirs(DATA + 32)
    talk.ours(ENDING)
    talk.theirs(25, ENDING, ENDING)
    talk.ours(ENDING)
    talk.ours(tcpip_forward(9), after_ns=200 * MS)
    talk.theirs(REPLY)
    assert talk.nats(REQUEST) == LATER_REQUEST_NATS


@pytest.mark.parametrize("suite", EIGHT)
def test_a_port_asked_for_while_chaff_goes_on(suite):
    """ObscureKeystrokeTiming: a record of a key's length each 20 ms, so that the answer follows one of those."""
    talk = shell(suite)
    type_keys(talk, 40, after_ns=20 * MS)
    talk.ours(tcpip_forward(9), after_ns=3 * MS)
    talk.ours(KEY, after_ns=10 * MS)
    talk.theirs(KEY, after_ns=8 * MS)
    talk.ours(KEY, after_ns=10 * MS)
    talk.theirs(REPLY, after_ns=5 * MS)
    assert talk.nats(REQUEST) == LATER_REQUEST_NATS


@pytest.mark.parametrize("suite", [one for one in SHORT if one != "umac128"])  # there two ends are as long
def test_a_request_as_long_as_a_keepalive_that_stays_the_only_one(suite):
    """AsyncSSH's forward_remote_port("", ...) after some runs: no keepalive follows in a silence that is longer."""
    talk = shell(suite, ASYNCSSH)
    talk.ours(IGNORE, after_ns=600 * MS)
    talk.ours(KEEPALIVE, after_ns=100_000)
    talk.theirs(REPLY)
    assert talk.nats(REQUEST) == 0
    talk.ours(60, after_ns=14 * SECOND)
    assert talk.nats(REQUEST) == LATER_OFF_BEAT_NATS


@pytest.mark.parametrize("suite", NAMES)
@pytest.mark.parametrize("after_ns", [MS, 14 * SECOND])
def test_a_client_that_hangs_up_did_not_go_on(suite, after_ns):
    """AsyncSSH announces each message by an IGNORE, but for DISCONNECT: what it asked for was no channel."""
    debug = 120
    talk = Talk(suite, banner=ASYNCSSH, server=OPENSSH).login()
    talk.ours(IGNORE, after_ns=MS)
    talk.ours(70, after_ns=100_000)
    talk.theirs(600, debug)
    talk.theirs(debug, after_ns=MS)
    talk.theirs(debug, REPLY)
    before = talk.nats(REQUEST)
    talk.ours(45, after_ns=after_ns)
    assert talk.nats(REQUEST) == before > 0
