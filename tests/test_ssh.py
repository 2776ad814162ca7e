"""The SSH record grammar: sizes that were measured, and openings built from the RFCs in every suite."""

from __future__ import annotations

import sys
import zlib
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuguard.core.records import SshKexInit
from gpuguard.core.ssh.answering import ANSWERED_NATS
from gpuguard.core.ssh.global_requests import LATER_ALIKE_NATS, LATER_OFF_BEAT_NATS, LATER_REQUEST_NATS
from gpuguard.core.ssh.incoming import LATER_CLOSE_NATS, LATER_OPEN_NATS, UNASKED_OPEN_NATS
from gpuguard.core.ssh.key_exchange import SWAP_NATS, SWAP_ONE_NATS
from gpuguard.core.ssh.messages import (
    DATA,
    ENDING,
    KEEPALIVE,
    NO_MORE_SESSIONS,
    OPEN_CONFIRMATION,
    REPLY,
    REPLY_WITH_PORT,
    SESSION_OPEN,
    SHELL_REQUEST,
    TUN_OPEN,
    forwarded_tcpip,
    tcpip_forward,
)
from gpuguard.core.ssh.request import REQUEST_NATS, REQUEST_NATS_MAX
from gpuguard.core.ssh.session import SshSession
from gpuguard.core.ssh.sizes import sizes_of
from gpuguard.core.ssh.suites import negotiate, record_bytes, suite_of

sys.path.insert(0, str(Path(__file__).resolve().parent))
from ssh_talk import BENIGN, HOST_KEYS_BYTES, SUITES, Talk, kexinit, play

REQUEST = "ssh-reverse-forward-request"
OPEN = "ssh-reverse-channel-open"


@pytest.mark.parametrize(
    ("suite", "sizes"),
    [  # keystroke, nested, twice nested, keepalive, its reply, tcpip-forward of localhost: as measured on the wire
        ("chacha20", (36, 76, 116, 52, 28, 68)),
        ("gcm", (36, 84, 132, 52, 36, 68)),
        ("etm", (52, 116, 180, 68, 52, 84)),
        ("umac", (28, 60, 92, 44, 28, 60)),
        ("sha512", (96, 192, 288, 112, 80, 112)),
        ("sha1", (52, 100, 148, 68, 36, 68)),
    ],
)
def test_sizes_are_those_on_the_wire(suite, sizes):
    one = suite_of(*SUITES[suite])
    key = record_bytes(one, 10)
    nested = record_bytes(one, 9 + key)
    assert (
        key, nested, record_bytes(one, 9 + nested), record_bytes(one, KEEPALIVE),
        record_bytes(one, REPLY), record_bytes(one, tcpip_forward(9)),
    ) == sizes


@settings(derandomize=True)
@given(st.sampled_from(sorted(SUITES)), st.integers(0, 40_000))
def test_padding_is_legal(name, payload):
    """RFC 4253 section 6: at least four bytes of padding, the whole a multiple of the block, no more than needed."""
    suite = suite_of(*SUITES[name])
    total = record_bytes(suite, payload) - suite.mac_bytes
    padding = total - 5 - payload
    assert 4 <= padding < 4 + suite.block_bytes
    assert (total - (4 if suite.outside else 0)) % suite.block_bytes == 0


def test_unknown_names_give_no_suite():
    assert suite_of("rot13", "hmac-sha1", "none") is None
    assert suite_of("aes128-ctr", "crc32", "none") is None
    assert suite_of("aes128-ctr", "hmac-sha1", "lz4") is None


def test_names_of_one_cost_are_one_suite_whose_sizes_are_computed_once():
    usual, made_up = (suite_of(name, "hmac-sha1", "zlib") for name in ("aes128-ctr", "aes-of-somebody-ctr"))
    assert sizes_of(usual, usual) is sizes_of(made_up, made_up)


def test_the_clients_first_choice_that_the_server_has():
    def lists(ciphers):
        return SshKexInit(0, (), (), ciphers, ciphers, ("hmac-sha1",), ("hmac-sha1",), ("none",), ("none",))

    client = lists(("aes128-ctr", "chacha20-poly1305@openssh.com"))
    server = lists(("chacha20-poly1305@openssh.com", "aes128-ctr"))
    suite = suite_of("aes128-ctr", "hmac-sha1", "none")
    assert negotiate(client, server) == (suite, suite)
    assert negotiate(client, lists(("3des-cbc",))) == (None, None)


@pytest.mark.parametrize("suite", SUITES)
@pytest.mark.parametrize("bind", [0, 8, 9, 15])
def test_reverse_forward_without_a_session(suite, bind):
    talk = Talk(suite).login()
    talk.ours(tcpip_forward(bind))
    talk.ours(NO_MORE_SESSIONS, after_ns=100_000)
    talk.theirs(344)
    talk.theirs(REPLY)
    assert talk.nats(REQUEST) > 19.6
    talk.now += 5 * 10**9
    talk.theirs(forwarded_tcpip(18))
    assert talk.ours(OPEN_CONFIRMATION, after_ns=400_000) == ["ssh-reverse-channel-open"]
    talk.theirs(ENDING, ENDING)
    assert talk.ours(ENDING, after_ns=400_000) == ["ssh-reverse-channel-ended"]
    talk.theirs(DATA + 60)
    assert talk.ours(DATA + 300, after_ns=400_000) == []


@pytest.mark.parametrize("suite", SUITES)
@pytest.mark.parametrize("count", [1, 3])
def test_reverse_forward_with_a_shell(suite, count):
    talk = Talk(suite).login()
    for _ in range(count):
        talk.ours(tcpip_forward(9), after_ns=300_000)
    talk.ours(SESSION_OPEN, NO_MORE_SESSIONS, after_ns=300_000)
    talk.theirs(HOST_KEYS_BYTES)
    talk.theirs(*[REPLY] * count, OPEN_CONFIRMATION)
    assert "ssh-interactive" in talk.ours(350)
    assert talk.nats(REQUEST) > 19.6


@pytest.mark.parametrize("suite", SUITES)
def test_a_reverse_forward_for_any_port(suite):
    talk = Talk(suite).login()
    talk.ours(tcpip_forward(9))
    talk.ours(NO_MORE_SESSIONS, after_ns=300_000)
    talk.theirs(REPLY_WITH_PORT)
    sizes = sizes_of(talk.suite, talk.suite)
    known = sizes.reply == sizes.reply_port or record_bytes(talk.suite, 36) in sizes.forward_only
    assert talk.nats(REQUEST) >= (19.6 if known else 6)


@pytest.mark.parametrize("suite", SUITES)
@pytest.mark.parametrize("story", BENIGN)
def test_other_openings_are_named_and_not_accused(suite, story):
    steps, name = BENIGN[story]
    talk = Talk(suite).login()
    play(talk, steps)
    assert talk.nats(REQUEST) == 0
    assert "ssh-reverse-channel-open" not in talk.named()
    assert name is None or name in talk.named()


@pytest.mark.parametrize("suite", [one for one in SUITES if one not in ("sha256", "umac128")])
def test_a_jump_whose_far_side_speaks_at_once(suite):
    """In those two the open costs what a request for a long path costs, and only the confirmation alone would tell."""
    talk = Talk(suite).login()
    play(talk, "c63+34 s344 s17+50 c50 c1100")
    assert "ssh-jump" in talk.named()


def test_forward_on_a_running_session():
    talk = Talk().login()
    play(talk, BENIGN["shell"][0])
    talk.now += 10**10
    talk.ours(tcpip_forward(9))
    assert talk.theirs(REPLY) == [REQUEST]


@pytest.mark.parametrize("suite", ["chacha20", "gcm", "etm"])
def test_forward_on_a_connection_held_open(suite):
    """`ssh -M -N`, then `ssh -O forward`: no channel, so that even 16-byte blocks hide no data in the answer."""
    talk = Talk(suite).login()
    talk.now += 10**10
    talk.ours(tcpip_forward(9))
    assert talk.theirs(REPLY) == [REQUEST]


CLASSIC = ("sha1", "sha256", "sha512", "umac64")  # a request costs what a keepalive costs, and no data its answer


def running_shell(suite, banner="SSH-2.0-OpenSSH_9.2p1"):
    talk = Talk(suite, banner=banner).login()
    play(talk, BENIGN["shell"][0])
    talk.now += 2 * 10**9
    return talk


@pytest.mark.parametrize("suite", CLASSIC)
@pytest.mark.parametrize(("banner", "nats"), [
    ("SSH-2.0-OpenSSH_9.2p1", LATER_OFF_BEAT_NATS), ("SSH-2.0-AsyncSSH_2.24.1", LATER_OFF_BEAT_NATS),
    ("SSH-2.0-Go", 0), ("SSH-2.0-PuTTY_Release_0.81", 0),
])
def test_a_late_request_that_is_no_keepalive(suite, banner, nats):
    """A keepalive would have come in a longer silence before, where they are counted from the server's last word."""
    talk = running_shell(suite, banner)
    talk.theirs(60, after_ns=10 * 10**9)
    talk.ours(tcpip_forward(9), after_ns=4 * 10**9)
    talk.theirs(REPLY)
    assert talk.nats(REQUEST) == nats


@pytest.mark.parametrize("suite", CLASSIC)
def test_keepalives_every_three_seconds(suite):
    """As OpenSSH 9.2 sent them beside a command with output: after 2.1 to 2.9 s, the clock being read in seconds."""
    talk = running_shell(suite)
    for silences in ((0.7, 0.7, 0.7), (2.9,), (0.9, 1.9, 0.3)):
        for silence_s in silences:
            talk.theirs(60, after_ns=round(silence_s * 10**9))
        for after_s in (2.05, 2.99):
            talk.ours(KEEPALIVE, after_ns=round(after_s * 10**9))
            talk.theirs(REPLY)
    assert talk.nats(REQUEST) == 0


@pytest.mark.parametrize("suite", CLASSIC)
def test_a_late_request_that_may_be_a_keepalive_is_told_when_it_is_used(suite):
    talk = running_shell(suite)
    talk.ours(tcpip_forward(9), after_ns=4 * 10**9)
    talk.theirs(REPLY)
    assert talk.nats(REQUEST) == 0
    talk.theirs(forwarded_tcpip(18), after_ns=3 * 10**9)
    assert talk.ours(OPEN_CONFIRMATION, after_ns=1_000_000) == [OPEN]
    talk.ours(50)
    talk.theirs(ENDING, after_ns=10**9)
    talk.raw(2 * talk.ours_bytes(ENDING), client=True)
    talk.theirs(ENDING)
    assert talk.nats(OPEN) == LATER_OPEN_NATS + LATER_CLOSE_NATS


@pytest.mark.parametrize("suite", [*CLASSIC, "gcm", "etm"])
@pytest.mark.parametrize("pasted", [KEEPALIVE, 9 + 25])
def test_what_looks_like_a_late_request_and_its_use(suite, pasted):
    """A keepalive or a pasted password; before and behind it a terminal that answers its prompt, and held keys."""
    talk = running_shell(suite)
    for after_ns in (3 * 10**9, 4 * 10**9):
        talk.theirs(60, after_ns=after_ns)
        talk.ours(9 + 8, after_ns=1_000_000)
    talk.ours(pasted, after_ns=5 * 10**9)
    talk.theirs(REPLY if pasted == KEEPALIVE else 11)
    talk.theirs(60, after_ns=3 * 10**9)
    talk.ours(9 + 8, after_ns=1_000_000)
    for _ in range(20):
        talk.ours(12, after_ns=30_000_000)
        talk.theirs(60, after_ns=20_000_000)
    assert OPEN not in talk.named()
    assert talk.nats(REQUEST) <= LATER_ALIKE_NATS


@pytest.mark.parametrize("suite", [*CLASSIC, "umac128"])
def test_connections_onwards_beside_a_shell_come_to_their_end(suite):
    talk = running_shell(suite)
    for _ in range(3):
        talk.ours(63, after_ns=10**9)
        talk.theirs(17)
        talk.ours(90)
        talk.theirs(200)
        talk.ours(ENDING, ENDING, after_ns=10**9)
        talk.theirs(ENDING)
    assert talk.nats(REQUEST) == talk.nats(OPEN) == 0


@pytest.mark.parametrize("suite", CLASSIC)
def test_another_session_beside_a_shell(suite):
    talk = running_shell(suite)
    talk.theirs(60, after_ns=20 * 10**9)
    talk.ours(SESSION_OPEN, after_ns=2 * 10**9)
    talk.theirs(OPEN_CONFIRMATION)
    talk.ours(27)
    talk.theirs(ENDING)
    assert talk.nats(REQUEST) == 0


@pytest.mark.parametrize("suite", CLASSIC)
def test_keepalives_of_paramiko_want_no_answer(suite):
    talk = running_shell(suite, "SSH-2.0-paramiko_5.1.0")
    talk.ours(tcpip_forward(9))
    talk.theirs(REPLY)
    assert talk.nats(REQUEST) == LATER_REQUEST_NATS


@pytest.mark.parametrize("suite", SUITES)
def test_the_end_of_a_longer_record_answers_nothing(suite):
    """A window of an X11 program: what TCP could not put into one segment comes in the next."""
    talk = running_shell(suite)
    talk.ours(tcpip_forward(9))
    talk.raw(1448, client=False)
    talk.theirs(REPLY)
    assert talk.nats(REQUEST) == 0


@pytest.mark.parametrize("suite", SUITES)
@pytest.mark.parametrize("blocks", [1, 12])
def test_a_padded_request_of_paramiko(suite, blocks):
    talk = Talk(suite, banner="SSH-2.0-paramiko_5.1.0").login()
    talk.raw(talk.ours_bytes(tcpip_forward(9)) + 16 * blocks, client=True)
    talk.theirs(344)
    talk.theirs(REPLY)
    assert talk.nats(REQUEST) >= LATER_REQUEST_NATS


@pytest.mark.parametrize("suite", CLASSIC)
def test_a_session_opened_ahead_of_the_request(suite):
    """dropbear 2026.94: both in one segment, answered in two."""
    talk = Talk(suite, banner="SSH-2.0-dropbear_2026.94").login()
    talk.ours(SESSION_OPEN, tcpip_forward(9))
    talk.theirs(OPEN_CONFIRMATION)
    talk.theirs(REPLY)
    assert talk.nats(REQUEST) > 19.6


@pytest.mark.parametrize("banner", ["SSH-2.0-paramiko_5.1.0", "SSH-2.0-dropbear_2022.83"])
def test_a_compressed_answer_that_no_confirmation_is_as_short_as(banner, monkeypatch):
    monkeypatch.setitem(SUITES, "zipped", (*SUITES["sha256"][:2], "zlib@openssh.com"))
    talk = Talk("zipped", banner=banner, server="SSH-2.0-OpenSSH_9.2p1").login()
    talk.raw(80, client=True)
    talk.theirs(700)
    assert talk.theirs(4) == [REQUEST]
    assert talk.nats(REQUEST) == (REQUEST_NATS + ANSWERED_NATS) / 2


def test_a_compressed_confirmation_with_more_behind_it_is_no_answer(monkeypatch):
    monkeypatch.setitem(SUITES, "zipped", (*SUITES["chacha20"][:2], "zlib@openssh.com"))
    talk = Talk("zipped", banner="SSH-2.0-dropbear_2022.83", server="SSH-2.0-OpenSSH_9.2p1").login()
    talk.raw(52, client=True)
    talk.theirs(700)
    talk.raw(72, client=False)
    assert talk.nats(REQUEST) == 0


@pytest.mark.parametrize("suite", SUITES)
def test_what_nothing_was_asked_of_was_no_session(suite):
    """dropbear opens a session to run something in it, and says what, at once."""
    talk = Talk(suite, banner="SSH-2.0-dropbear_2022.83").login()
    talk.ours(SESSION_OPEN)
    talk.theirs(OPEN_CONFIRMATION)
    talk.theirs(forwarded_tcpip(18), after_ns=2 * 10**9)
    assert talk.ours(OPEN_CONFIRMATION, after_ns=1_000_000) == [OPEN]
    assert talk.nats(OPEN) == UNASKED_OPEN_NATS


@pytest.mark.parametrize("marks", [True, False])
def test_swapped_roles(marks):
    talk = Talk(swapped=True, marks=marks)
    assert [use.use for use in talk.uses] == ["ssh-role-swap"]
    assert talk.uses[0].nats == (SWAP_NATS if marks else SWAP_ONE_NATS)
    assert talk.session.client == 1


def test_swapped_roles_are_told_once_in_a_suite_of_unknown_sizes():
    session = SshSession(initiator_known=True)
    for side, mark in enumerate(("ext-info-s", "ext-info-c")):
        session.kexinit(side, msgspec.structs.replace(kexinit("gcm", mark), encryption_client_to_server=("rot13",)))
    told = [session.newkeys(side) for side in (0, 1, 0, 1)]
    assert [[use.use for use in uses] for uses in told] == [[], ["ssh-role-swap"], [], []]


def test_nothing_is_read_where_both_claim_the_same_role():
    session = SshSession(initiator_known=True)
    for side in (0, 1):
        session.kexinit(side, kexinit("chacha20", "ext-info-c"))
    assert session.newkeys(1) + session.newkeys(0) == []
    assert session.segment(1, 0, 68, 68) == []


def test_a_key_exchange_cut_off_by_the_snap_length_is_inferred():
    talk = Talk()
    talk.session = SshSession(initiator_known=True)
    talk.session.banner(0, "SSH-2.0-OpenSSH_9.2p1")
    for size, client in ((41, True), (41, False), (1448, True), (1088, False), (1208, True), (1448, False), (16, True)):
        talk.raw(size, client=client)
    talk.login()
    talk.ours(tcpip_forward(9))
    talk.ours(NO_MORE_SESSIONS)
    talk.theirs(REPLY)
    assert 19.6 <= talk.nats(REQUEST) <= REQUEST_NATS_MAX


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.sampled_from(sorted(SUITES)),
    st.lists(st.tuples(st.booleans(), st.integers(1, 70_000) | st.sampled_from((28, 36, 44, 52, 60, 68, 92, 112)),
                       st.integers(0, 2_000_000_000)), max_size=60),
)
def test_any_sizes_are_survived(suite, records):
    talk = Talk(suite).login()
    for client, size, after_ns in records:
        talk.raw(size, client=client, after_ns=after_ns)
    assert talk.nats(REQUEST) <= REQUEST_NATS_MAX
    assert len(talk.session._after._seen.asked) <= 16


def test_a_lost_open_makes_no_forward_of_what_follows():
    """The session's open is missing from the capture; the command after it has the size of a forward."""
    talk = Talk().login()
    talk.theirs(344)
    size = record_bytes(talk.suite, tcpip_forward(9))
    uses = talk.session.segment(talk.now + 10**6, talk.client, size, 9999, holes=(1, 0))
    uses += talk.session.segment(talk.now + 10**7, 1 - talk.client, 28, 9999, holes=(1, 0))
    assert REQUEST not in {one.use for one in uses}


def test_padding_of_implementations():
    """dropbear's MIN_PACKET_LEN and Go's packetSizeMultiple, as their sources have them and as they were seen."""
    chacha = "chacha20-poly1305@openssh.com"
    sizes = {banner: [record_bytes(suite_of(chacha, "", "none", banner), one) for one in (1, 5, 10, 17)]
             for banner in ("SSH-2.0-OpenSSH_9.2", "SSH-2.0-dropbear_2022.83", "SSH-2.0-Go")}
    assert sizes == {
        "SSH-2.0-OpenSSH_9.2": [28, 36, 36, 44],
        "SSH-2.0-dropbear_2022.83": [36, 36, 36, 44],
        "SSH-2.0-Go": [36, 36, 36, 52],
    }


@pytest.mark.parametrize("suite", SUITES)
@pytest.mark.parametrize("wait_ns", [100_000, 30_000_000])
def test_a_second_write_that_tcp_held_back(suite, wait_ns):
    """The session's open leaves when the request before it is acknowledged: RFC 896, with the path's round trip."""
    talk = Talk(suite, server="SSH-2.0-OpenSSH_9.2p1").login()
    talk.ours(tcpip_forward(9))
    talk.ours(SESSION_OPEN, NO_MORE_SESSIONS, after_ns=wait_ns)
    talk.theirs(344, after_ns=100_000)
    talk.theirs(REPLY)
    assert talk.nats(REQUEST) > 19.6


@pytest.mark.parametrize("suite", SUITES)
def test_forwards_in_one_segment(suite):
    """The second and third request wait for the first to be acknowledged, and leave together."""
    talk = Talk(suite, server="SSH-2.0-OpenSSH_9.2p1").login()
    talk.ours(tcpip_forward(9))
    talk.ours(tcpip_forward(9), tcpip_forward(9), after_ns=100_000)
    talk.ours(NO_MORE_SESSIONS, after_ns=100_000)
    talk.theirs(344)
    talk.theirs(REPLY, REPLY, REPLY)
    assert talk.nats(REQUEST) > 19.6


@pytest.mark.parametrize("suite", SUITES)
@pytest.mark.parametrize("server", ["SSH-2.0-dropbear_2022.83", "SSH-2.0-OpenSSH_9.2p1"])
def test_dropbear_writes_all_at_once(suite, server):
    talk = Talk(suite, banner="SSH-2.0-dropbear_2022.83", server=server).login()
    talk.ours(tcpip_forward(9), SESSION_OPEN, after_ns=300_000)
    talk.theirs(REPLY)
    talk.theirs(OPEN_CONFIRMATION)
    assert talk.nats(REQUEST) > 6


@pytest.mark.parametrize("suite", ["chacha20", "gcm", "etm", "umac"])
def test_a_network_device(suite):
    talk = Talk(suite, server="SSH-2.0-OpenSSH_9.2p1").login()
    talk.ours(TUN_OPEN, NO_MORE_SESSIONS, after_ns=300_000)
    talk.theirs(344)
    talk.theirs(OPEN_CONFIRMATION)
    assert talk.nats("ssh-tun") > 19.6
    assert talk.nats(REQUEST) == 0


@pytest.mark.parametrize("suite", SUITES)
def test_a_long_answer_to_the_first_attempt_is_no_login(suite):
    """OpenSSH 10 answers "none" with EXT_INFO and a failure; what offers a key then costs as much as an opening."""
    talk = Talk(suite, server="SSH-2.0-OpenSSH_10.6p1")
    talk.ours(17)
    talk.theirs(17)
    talk.ours(43)
    assert talk.theirs(230, 45) == []
    assert talk.ours(SESSION_AND_MORE) == []
    assert "authenticated" not in talk.named()


SESSION_AND_MORE = 122  # a key offered: as long as an open and no-more-sessions in classic suites


def test_the_answer_to_a_keepalive_is_not_the_answer_to_a_disconnect():
    """A command ends as a keepalive is out: DISCONNECT costs what a request costs; the answer is the keepalive's."""
    talk = Talk(server="SSH-2.0-OpenSSH_10.6p1").login()
    play(talk, BENIGN["exec"][0])
    talk.now += 10**9
    talk.ours(KEEPALIVE)
    talk.ours(5, after_ns=2_000_000)
    talk.ours(33, after_ns=100_000)
    assert talk.theirs(REPLY) == []


@pytest.mark.parametrize("suite", SUITES)
def test_a_terminal_without_modes(suite):
    """`ssh -tt` with nothing but a pipe on its standard input."""
    talk = Talk(suite, server="SSH-2.0-OpenSSH_9.2p1").login()
    talk.ours(SESSION_OPEN, NO_MORE_SESSIONS)
    talk.theirs(344)
    talk.theirs(OPEN_CONFIRMATION)
    talk.ours(42 + 5, SHELL_REQUEST)
    assert "ssh-interactive" in talk.theirs(5, 9, 5)


SUITES_COMPRESSED = {"chacha20": SUITES["chacha20"], "sha256": ("aes256-ctr", "hmac-sha2-256", "none")}


@pytest.mark.parametrize("name", SUITES_COMPRESSED)
@pytest.mark.parametrize("bind", [b"localhost", b"0.0.0.0"])
@pytest.mark.parametrize("count", [1, 3])
def test_compressed_openings_are_computed(name, bind, count, monkeypatch):
    """What zlib makes of an opening with these very bytes is among the sizes that are looked for."""
    monkeypatch.setitem(SUITES, "zipped", (*SUITES_COMPRESSED[name][:2], "zlib@openssh.com"))
    talk = Talk("zipped", server="SSH-2.0-OpenSSH_9.2p1").login()
    stream = zlib.compressobj()

    def cost(message):
        return record_bytes(talk.suite, len(stream.compress(message) + stream.flush(zlib.Z_PARTIAL_FLUSH)))

    for port in range(count):
        text = bind if port % 2 == 0 else b"localhost"
        request = b"\x50\0\0\0\x0dtcpip-forward\1" + len(text).to_bytes(4, "big")
        message = request + text + (2_222 + port).to_bytes(4, "big")
        talk.raw(cost(message), client=True, after_ns=100_000)
    talk.raw(cost(b"\x50\0\0\0\x1cno-more-sessions@openssh.com\0"), client=True, after_ns=100_000)
    assert talk.nats(REQUEST) >= 6


@pytest.mark.parametrize("lost", ["the confirmation", "the open", "the login's answer"])
@pytest.mark.parametrize("suite", SUITES)
def test_what_the_guard_missed_makes_no_request(suite, lost):
    """Each of these, taken for the whole, is how a request for a forward looks."""
    talk = Talk(suite, banner="SSH-2.0-Go")
    talk.ours(17)
    talk.theirs(17)
    talk.ours(60)
    talk.theirs(24)
    talk.ours(tcpip_forward(9) + 260)
    holes = {"the confirmation": (0, 1), "the open": (1, 0), "the login's answer": (0, 1)}[lost]
    if lost != "the login's answer":
        talk.theirs(1)
    if lost == "the confirmation":
        talk.ours(SESSION_OPEN)
    talk.holes = holes
    if lost == "the login's answer":
        talk.theirs(990)
    talk.ours(40)
    talk.theirs(ENDING)
    assert talk.nats(REQUEST) < 6
