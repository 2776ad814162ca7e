"""What weighs nothing and is told with a connection whatever it is for: its channels one by one, keepalives, logins
refused before one was accepted, and X11 or the agent asked for."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuguard.cli import main
from gpuguard.core.ssh.channels import TOLD_MAX
from gpuguard.core.ssh.messages import (
    AGENT_REQUEST,
    DATA,
    KEEPALIVE,
    KEY,
    NO_MORE_SESSIONS,
    OPEN_CONFIRMATION,
    REPLY,
    SESSION_OPEN,
    SFTP_INIT,
    SHELL_REQUEST,
    X11_REQUEST,
    direct_tcpip,
)
from gpuguard.core.ssh.suites import record_bytes

sys.path.insert(0, str(Path(__file__).resolve().parent))
from ssh_openings import STRANGERS
from ssh_talk import HOST_KEYS_BYTES, SUITES, Talk

CAPTURES = Path(__file__).resolve().parent / "fixtures" / "captures"
OPENSSH = "SSH-2.0-OpenSSH_9.2p1"
PARAMIKO = "SSH-2.0-paramiko_5.1.0"
ANSWER, WINDOW = 5, 9
PTY, ENV, COMMAND, SUBSYSTEM = 320, 40, 30, 27
SECOND_NS = 10**9


def master(suite="chacha20", *, banner=OPENSSH, server=OPENSSH):
    """A login to a server that grants as OpenSSH's does."""
    return Talk(suite, banner=banner, server=server).login()


def session(talk, *asked, answers=1):
    talk.ours(SESSION_OPEN, after_ns=SECOND_NS)
    talk.theirs(OPEN_CONFIRMATION)
    talk.ours(*asked, after_ns=200_000)
    talk.theirs(*[ANSWER] * (answers - 1), WINDOW, ANSWER)


def command(talk):
    session(talk, COMMAND)
    talk.theirs(DATA + 80)
    talk.ours(ANSWER)


def notes(talk, prefix="ssh-channel"):
    """The last words of each kind, as evidence keeps them."""
    return {use.use: use.text for use in talk.uses if use.use.startswith(prefix)}


# -- channels ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suite", SUITES)
def test_each_session_of_a_control_master_is_told(suite):
    talk = master(suite)
    command(talk)
    session(talk, PTY, SHELL_REQUEST, answers=2)
    told = notes(talk)
    assert list(told) == ["ssh-channel-1", "ssh-channel-2"]
    assert told["ssh-channel-1"].startswith("channel 1: a command or a subsystem was asked for")
    assert told["ssh-channel-2"].startswith("channel 2: a terminal and a shell were asked for, or")
    assert "ssh-exec" in talk.named()


def test_a_connection_with_one_channel_is_not_told_twice():
    talk = master()
    command(talk)
    assert notes(talk) == {}


@pytest.mark.parametrize("suite", SUITES)
def test_sftp_is_known_by_its_opening(suite):
    talk = master(suite)
    command(talk)
    session(talk, SUBSYSTEM)
    talk.ours(SFTP_INIT)
    talk.theirs(330)
    # Where a window costs as much, it may have been one.
    alike = record_bytes(talk.suite, SFTP_INIT) == record_bytes(talk.suite, WINDOW)
    assert notes(talk)["ssh-channel-2"].endswith("SFTP was spoken") != alike


def test_what_other_channels_say_between_is_passed_over():
    talk = master()
    command(talk)
    talk.ours(SESSION_OPEN, after_ns=SECOND_NS)
    talk.theirs(OPEN_CONFIRMATION)
    talk.ours(PTY, SHELL_REQUEST, after_ns=200_000)
    talk.theirs(25, ANSWER)
    talk.theirs(ANSWER, WINDOW, ANSWER)
    assert "terminal" in notes(talk)["ssh-channel-2"]


def test_connections_onwards_beside_a_command():
    """As VS Code has: a server that is fed with a script, and a SOCKS port."""
    talk = master()
    command(talk)
    for name in (9, 14):
        talk.ours(direct_tcpip(name + 9), after_ns=SECOND_NS)
        talk.theirs(OPEN_CONFIRMATION)
        talk.ours(300)
        talk.theirs(2_000)
    assert [text.partition(": ")[2][:32] for text in notes(talk).values()] == [
        "a command or a subsystem was ask", *["a connection onwards was opened "] * 2]


@pytest.mark.parametrize("suite", SUITES)
def test_beside_a_channel_it_may_be_data(suite):
    talk = master(suite)
    talk.ours(SESSION_OPEN, NO_MORE_SESSIONS)
    talk.theirs(OPEN_CONFIRMATION)
    talk.ours(PTY, SHELL_REQUEST)
    talk.theirs(ANSWER, WINDOW, ANSWER)
    talk.ours(direct_tcpip(18), after_ns=SECOND_NS)
    talk.theirs(OPEN_CONFIRMATION)
    assert notes(talk)["ssh-channel-2"].endswith("; or as much was sent in another, and answered so")


def test_answers_through_a_reverse_tunnel_open_nothing_onwards():
    talk = master()
    talk.ours(36, NO_MORE_SESSIONS)
    talk.theirs(REPLY)
    talk.now += SECOND_NS
    talk.theirs(66)
    talk.ours(OPEN_CONFIRMATION)
    for _ in range(3):
        talk.ours(direct_tcpip(18))
        talk.theirs(OPEN_CONFIRMATION)
    assert "ssh-reverse-channel-open" in talk.named()
    assert notes(talk) == {}


def test_of_many_channels_the_first_are_told_and_the_others_counted():
    talk = master()
    for _ in range(40):
        command(talk)
    told = notes(talk)
    assert list(told) == [*(f"ssh-channel-{number}" for number in range(1, TOLD_MAX + 1)), "ssh-channels"]
    assert told["ssh-channels"] == "32 channels by now: 32 session(s)"


# -- X11 and the agent, asked for -------------------------------------------------------------------------------------


@pytest.mark.parametrize("suite", SUITES)
@pytest.mark.parametrize(("asked", "answers", "label"), [((PTY, ENV, SHELL_REQUEST), 3, "ssh-interactive"),
                                                         ((ENV, COMMAND), 2, "ssh-exec")])
def test_openssh_asks_for_its_display_first(suite, asked, answers, label):
    """`ssh -X`, with a shell and with a command."""
    talk = master(suite)
    talk.ours(SESSION_OPEN)
    talk.theirs(OPEN_CONFIRMATION)
    talk.ours(X11_REQUEST, after_ns=200_000)
    talk.ours(*asked, after_ns=700_000)
    talk.theirs(*[ANSWER] * (answers - 1), WINDOW, ANSWER)
    assert notes(talk, "ssh-forwarding")["ssh-forwarding-asked"].startswith("X11 forwarding was asked for: ")
    assert talk.named() & {"ssh-interactive", "ssh-exec"} == {label}


@pytest.mark.parametrize("suite", SUITES)
def test_a_command_as_long_as_a_request_for_a_display(suite):
    talk = master(suite)
    session(talk, X11_REQUEST)
    assert notes(talk, "ssh-forwarding") == {}
    assert "ssh-exec" in talk.named()


@pytest.mark.parametrize("suite", SUITES)
def test_of_other_clients_it_may_be_the_agent_or_a_variable(suite):
    talk = master(suite, banner="SSH-2.0-PuTTY_Release_0.78")
    session(talk, AGENT_REQUEST, X11_REQUEST, PTY, SHELL_REQUEST, answers=4)
    assert notes(talk, "ssh-forwarding")["ssh-forwarding-asked"].startswith("X11 or agent forwarding was asked ")


@pytest.mark.parametrize("suite", SUITES)
@pytest.mark.parametrize(("asked", "answers"), [((PTY, ENV, SHELL_REQUEST), 2), ((COMMAND,), 1), ((COMMAND,), 3),
                                                ((AGENT_REQUEST, PTY, SHELL_REQUEST), 2), ((400,), 1)])
def test_what_asks_for_no_display(suite, asked, answers):
    """A command that spoke at once; and the agent asked for in one segment with the rest, which no size tells."""
    talk = master(suite)
    session(talk, *asked, answers=answers)
    assert notes(talk, "ssh-forwarding") == {}


@pytest.mark.parametrize("suite", SUITES)
def test_a_request_for_the_agent_by_itself_may_be_a_variable(suite):
    talk = master(suite, banner=PARAMIKO)
    talk.ours(SESSION_OPEN)
    talk.theirs(OPEN_CONFIRMATION)
    talk.ours(AGENT_REQUEST)
    talk.ours(50)
    talk.theirs(ANSWER)
    talk.ours(SHELL_REQUEST)
    talk.theirs(WINDOW, ANSWER)
    text = notes(talk, "ssh-forwarding")["ssh-forwarding-asked"]
    assert text.startswith("agent forwarding was asked for, or a variable")


def test_a_request_that_was_answered_first_is_none_for_the_agent():
    """A terminal with a name of such a length."""
    talk = master(banner=PARAMIKO)
    talk.ours(SESSION_OPEN)
    talk.theirs(OPEN_CONFIRMATION)
    talk.ours(AGENT_REQUEST)
    talk.theirs(ANSWER)
    talk.ours(SHELL_REQUEST)
    talk.theirs(WINDOW, ANSWER)
    assert notes(talk, "ssh-forwarding") == {}


# -- keepalives and the login -----------------------------------------------------------------------------------------


def beat(talk, times, every_s=15):
    for _ in range(times):
        talk.ours(KEEPALIVE, after_ns=every_s * SECOND_NS)
        talk.theirs(REPLY)


@pytest.mark.parametrize("suite", SUITES)
@pytest.mark.parametrize("busy", [False, True])
def test_keepalives_are_counted(suite, busy):
    talk = master(suite)
    if busy:
        command(talk)
    beat(talk, 5)
    told = [use for use in talk.uses if use.use == "keepalive"]
    assert [("2 times" in use.text, "4 times" in use.text, use.nats) for use in told] == [
        (True, False, 0.0), (False, True, 0.0)]
    short = record_bytes(talk.server_suite, REPLY) < record_bytes(talk.server_suite, ANSWER)
    assert ("or as much was sent" in told[0].text) == (busy and not short)


@pytest.mark.parametrize("suite", SUITES)
def test_requests_of_the_opening_are_no_keepalives(suite):
    """A port on "" costs what a keepalive costs, and is answered as it is."""
    talk = master(suite, banner=PARAMIKO)
    for _ in range(4):
        talk.ours(27)
        talk.theirs(REPLY)
    assert notes(talk, "keepalive") == {}


def test_a_single_one_may_be_anything():
    talk = master()
    beat(talk, 1)
    assert notes(talk, "keepalive") == {}


def test_of_what_wants_no_answer_nothing_is_counted():
    talk = master(banner=PARAMIKO)
    beat(talk, 4)
    assert notes(talk, "keepalive") == {}


def test_a_login_after_refusals_says_how_many():
    talk = Talk()
    talk.ours(17)
    talk.theirs(17)
    talk.ours(35)
    talk.theirs(48)
    for _ in range(2):
        talk.ours(270)
        talk.theirs(48)
    talk.ours(270)
    talk.theirs(REPLY)
    assert notes(talk, "authenticated") == {
        "authenticated": "the server accepted the login, 2 attempt(s) having been refused"}


# -- together ---------------------------------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.sampled_from(list(SUITES)), st.sampled_from([OPENSSH, PARAMIKO, *STRANGERS]),
       st.lists(st.tuples(st.booleans(), st.sampled_from(
           [REPLY, ANSWER, WINDOW, KEY, SESSION_OPEN, OPEN_CONFIRMATION, KEEPALIVE, AGENT_REQUEST, SFTP_INIT, 63, 90,
            HOST_KEYS_BYTES]), st.sampled_from([100_000, 30_000_000, 2 * SECOND_NS])), max_size=80))
def test_whatever_is_sent_notes_weigh_nothing_and_are_few(suite, banner, records):
    talk = master(suite, banner=banner)
    for ours, size, after_ns in records:
        (talk.ours if ours else talk.theirs)(size, after_ns=after_ns)
    told = [use for use in talk.uses if use.use.startswith(("ssh-channel", "ssh-forwarding", "keepalive"))]
    assert all(use.nats == 0.0 for use in told)
    assert len({use.use for use in told}) <= TOLD_MAX + 3


def test_the_line_of_a_flow_has_its_channels():
    file = CAPTURES / "openssh-trixie.exec-multiplexed.pcap.gz"
    result = CliRunner().invoke(main, ["pcap", "-o", "json", str(file)])
    flows = [json.loads(line) for line in result.stdout.splitlines()]
    texts = next([one["text"] for one in flow["evidence"]] for flow in flows if flow.get("label") == "ssh-exec")
    assert texts[0].startswith("a command or subsystem was asked for")
    assert "the server accepted the login" in texts
    assert sum(text.startswith("channel ") for text in texts) == 6


@pytest.mark.parametrize(("family", "label", "expected"), [
    ("openssh-bullseye.shell-multiplexed", "ssh-interactive", [
        "the server accepted the login", "channel 1: a terminal and a shell", "channel 2: a command or a subsystem",
        "channel 3: a command or a subsystem", "channel 4: a connection onwards"]),
    ("openssh-bookworm.shell-x11-asked", "ssh-interactive", [
        "the server accepted the login", "X11 forwarding was asked"]),
])
def test_what_real_programs_do_beside_a_shell(family, label, expected):
    result = CliRunner().invoke(main, ["pcap", "-o", "json", str(CAPTURES / f"{family}.pcap.gz")])
    flows = [json.loads(line) for line in result.stdout.splitlines()]
    notes = next([one["text"] for one in flow["evidence"] if one["nats"] == 0.0] for flow in flows
                 if flow.get("label") == label)
    assert [text[:len(start)] for text, start in zip(notes, expected, strict=True)] == expected
