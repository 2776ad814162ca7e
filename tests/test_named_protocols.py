"""Proxies, VPNs, Tor, regular calls, pools behind TLS and of Stratum V2: look-alikes first, from bytes to verdicts."""

from __future__ import annotations

import itertools
import random
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace

from gpuguard._packets import Parser
from gpuguard.core.detectors import (
    beacon,
    dns_tunnel,
    proxies,
    reverse_desktop,
    reverse_shell,
    ssh_use,
    stratum,
    tor,
    vpn,
)
from gpuguard.core.facts import observations_of
from gpuguard.core.flows import FlowTable
from gpuguard.core.fusion import SUSPECT_NATS, Fusion
from gpuguard.core.host import Host
from gpuguard.core.labels import LABELS, VERDICTS
from gpuguard.core.observations import CLOSED_FLOW, Exchange, FlowClosed, FlowOpened, FlowsClosed, Spoke, TlsTalk
from gpuguard.core.records import HostInfo, Packets
from gpuguard.core.subjects import FlowId

sys.path.insert(0, str(Path(__file__).parent))
import tls_talks
from test_packets import client_hello, question, tls_record
from test_packets_protocols import (
    REQUESTED,
    START_WORK,
    SWITCHED,
    WEBSOCKET,
    X_KEY,
    X_MAY,
    X_REPLY,
    X_SETUP,
    mux,
    ws,
)

S = 1_000_000_000
START = 10**18
NEAR, FAR = bytes((10, 0, 0, 2)), bytes((203, 0, 113, 9))
FLOW = FlowId(0, 6, "10.0.0.2", 40_000, "203.0.113.9", 443, START)
DETECTORS = (beacon, dns_tunnel, proxies, reverse_desktop, ssh_use, stratum, tor, vpn)
NOISE = random.Random(7).randbytes(400)


def verdicts(items, host=None, detectors=DETECTORS):
    """Return the worst verdict of each label, the clear ones too."""
    host, fusion, found = host or Host(), Fusion(0.1), {}
    alive = [module.Detector() for module in detectors]
    for item in items:
        host.receive(item)
        for one in itertools.chain.from_iterable(d.receive(item, host) for d in alive if type(item) in d.takes):
            assert one.text
            assert one.start_ns <= one.time_ns
            standing, _ = fusion.receive(one)
            found[one.label] = max(found.get(one.label, "unknown"), standing.verdict, key=VERDICTS.index)
    return {label: verdict for label, verdict in found.items() if verdict != "unknown"}


def conversation(said, *, protocol=6, opening=()):
    """The block of one conversation: (seconds, side, bytes), after segments of ``opening``, (side, bytes)."""
    parser = Parser(rows_max=100_000)
    sent, ends = [1, 1], ((NEAR, 40_000), (FAR, 443))
    some = [(0.0, 0, None), (0.03, 1, None), *((0.05, side, data) for side, data in opening), *said]
    for seconds, side, data in some if protocol == 6 else said:
        (near, near_port), (far, far_port) = ends[side], ends[1 - side]
        if protocol == 6:
            flags = (2, 18)[side] if data is None else 24
            head = struct.pack(">HHIIBBHHH", near_port, far_port, sent[side], 1, 80, flags, 0, 0, 0)
            sent[side] += len(data) if data is not None else 1
        else:
            head = struct.pack(">HHHH", near_port, far_port, 8 + len(data), 0)
        body = head + (data or b"")
        header = struct.pack(">BBHHHBBH4s4s", 69, 0, 20 + len(body), 0, 0, 64, protocol, 0, near, far)
        parser.frame(101, header + body, START + round(seconds * S))
    rows, facts = parser.take()
    return Packets(START, 0, rows, facts)


def judged(block, host=None):
    table = FlowTable()
    return verdicts([*observations_of(table, block), *table.close(START + 10**13)], host)


# -- proxies, VPNs, Tor -----------------------------------------------------------------------------------------------

GREETING, CHOICE, REQUEST = b"\5\1\0", b"\5\0", b"\5\1\0\3\x07example\0\x50"
REPLY = b"\5\0\0\1\n\0\0\1\1\xbb"


def test_socks_is_named_by_what_both_sides_say():
    assert judged(conversation([], opening=[(0, GREETING), (1, CHOICE), (0, REQUEST), (1, REPLY)])) == {
        "socks-proxy": "clear"}
    assert judged(conversation([], opening=[(0, b"\4\1\0\x50\x5d\xb8\xd8\x77\0"), (1, b"\0\x5a" + bytes(6))])) == {
        "socks-proxy": "clear"}
    assert judged(conversation([], opening=[(0, GREETING)])) == {}
    assert judged(conversation([], opening=[(1, CHOICE)])) == {}


@pytest.mark.parametrize("line", [b"CONNECT a.example:443 HTTP/1.1\r\n\r\n", b"GET http://a.example/ HTTP/1.1\r\n\r\n"])
def test_http_proxies_are_named(line):
    assert judged(conversation([], opening=[(0, line)])) == {"http-proxy": "clear"}


def test_who_dials_out_and_serves_as_a_proxy_is_seen():
    backwards = [(0, b"NZ\x8d\x08\x87N"), (1, GREETING), (0, CHOICE), (1, REQUEST), (0, REPLY)]
    assert judged(conversation([], opening=backwards)) == {"reverse-proxy": "suspect"}
    host = Host()
    host.receive(HostInfo(0, 1, "b", "h", 100, addresses=("203.0.113.9",)))
    assert judged(conversation([], opening=backwards), host) == {}


def test_what_is_asked_for_behind_the_first_request_confirms_nothing():
    connect, ok = b"CONNECT a.example:443 HTTP/1.1\r\n\r\n", b"HTTP/1.1 200 OK\r\n\r\n"
    socks = [(1, GREETING), (0, CHOICE), (1, REQUEST), (0, REPLY)]
    for opening in ([*socks, (1, connect), (0, ok)], [(1, connect), (0, ok)] * 3):
        assert judged(conversation([], opening=opening)) == {"reverse-proxy": "suspect"}


@pytest.mark.parametrize("first", [[], [(0, b"register me\n")]])
def test_who_dials_out_and_serves_as_a_web_server_is_seen(first):
    request, answer = b"GET /hosts HTTP/1.1\r\nHost: a.example\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
    assert judged(conversation([], opening=[*first, (1, request), (0, answer)])) == {"reverse-proxy": "suspect"}
    assert judged(conversation([], opening=[*first, (0, request), (1, answer)])) == {}
    switched = b"HTTP/1.1 101 Switching Protocols\r\n\r\n"
    assert judged(conversation([], opening=[(0, request), (1, switched), (1, request), (0, answer)])) == {}


def test_what_turns_round_behind_an_upgrade_or_in_a_quotation_is_no_reverse_proxy():
    head, preface = b"POST /session HTTP/1.1\r\nUpgrade: h2c\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    for upgraded in (b"HTTP/1.1 101 UPGRADED\r\nUpgrade: h2c\r\n\r\n", b"HTTP/1.1 101 OK\r\nUpgrade: PTTH/1.0\r\n\r\n"):
        assert judged(conversation([], opening=[(0, head), (1, upgraded), (1, preface), (1, REQUESTED)])) == {}
    icap = b"ICAP/1.0 200 OK\r\nEncapsulated: req-hdr=0, null-body=33\r\n\r\n"
    asked = b"REQMOD icap://a/b ICAP/1.0\r\n\r\n"
    assert judged(conversation([], opening=[(0, asked), (1, icap), (1, REQUESTED)])) == {}
    mail = [(1, b"+OK ready\r\n"), (0, b"RETR 1\r\n"), (1, b"+OK\r\n"), (1, b"From: a\r\n\r\n" + REQUESTED),
            (1, b">" + REQUESTED)]
    assert judged(conversation([], opening=mail)) == {}
    log = [(1, b"following\n"), (1, b"GET /a HTTP/1.1\r\nGET /b HTTP/1.1\r\n"), (1, b"GET /c HTTP/1.1 200\r\n")]
    assert judged(conversation([], opening=log)) == {}


def test_who_greets_first_and_then_lets_a_visitor_speak_has_a_reverse_proxy_here():
    frp = [(0, b"w" + bytes(7) + b"\2{}"), (1, START_WORK), (1, REQUESTED), (0, b"HTTP/1.1 200 OK\r\n\r\n")]
    assert judged(conversation([], opening=frp)) == {"reverse-proxy": "suspect"}
    assert judged(conversation([], opening=[(1 - side, data) for side, data in frp])) == {}
    socks = [(0, b"key\n"), (1, b"fine\n"), (1, GREETING), (0, CHOICE), (1, REQUEST), (0, REPLY)]
    assert judged(conversation([], opening=socks)) == {"reverse-proxy": "suspect"}
    assert judged(conversation([], opening=socks[:3])) == {}


def test_streams_of_yamux_turned_round_accuse_by_what_is_asked_in_them():
    nomad = [(0, b"\4"), (1, mux(1, 1)), (0, mux(1, 2)), (1, mux(0, 0, 1, b"\1\x86\xa3Seq")), (1, mux(1, 1, 3))] * 3
    assert judged(conversation([], opening=nomad)) == {}
    socks = [(1, mux(1, 1)), (1, mux(0, 0, 1, GREETING)), (0, mux(0, 2, 1, CHOICE)), (1, mux(0, 0, 1, REQUEST))]
    assert judged(conversation([], opening=[(0, b"secret"), *socks])) == {"reverse-proxy": "suspect"}
    assert judged(conversation([], opening=[(1 - side, data) for side, data in socks])) == {}
    frp = [(0, mux(1, 1)), (1, mux(1, 2)), (1, mux(0, 0, 1, START_WORK)), (1, mux(0, 0, 1, REQUESTED))]
    assert judged(conversation([], opening=frp)) == {"reverse-proxy": "suspect"}


def test_ssh_in_a_websocket_is_named():
    banners = [(1, ws(b"SSH-2.0-OpenSSH_9.2\r\n", opcode=2)), (0, ws(b"SSH-2.0-x\r\n", key=b"abcd", opcode=2))]
    assert judged(conversation([], opening=[(0, WEBSOCKET), (1, SWITCHED), *banners])) == {"ssh": "clear"}
    text = [(1, ws(b"SSH-2.0-OpenSSH_9.2\r\n")), (0, ws(b"SSH-2.0-x\r\n", key=b"abcd"))]
    assert judged(conversation([], opening=[(0, WEBSOCKET), (1, SWITCHED), *text])) == {}


def test_a_visitor_in_messages_of_a_websocket_is_seen():
    visit = [(0, WEBSOCKET), (1, SWITCHED), (1, ws(REQUESTED, opcode=2)), (0, ws(b"HTTP/1.1 200 OK\r\n\r\n", opcode=2))]
    assert judged(conversation([], opening=visit)) == {"reverse-proxy": "suspect"}
    logs = [(0, WEBSOCKET), (1, SWITCHED), (1, ws(b"GET /a HTTP/1.1\r\n")), (1, ws(b"> " + REQUESTED))]
    assert judged(conversation([], opening=logs)) == {}


def test_what_is_said_tells_how_many_packets_came_until_then():
    lines = [(0, b"RFB 003.008\n"), (1, b"RFB 003.008\n")]
    said = [[one for one in observations_of(FlowTable(), conversation(talk, opening=lines)) if isinstance(one, Spoke)]
            for talk in ([], [(1.0 + i, i % 2, b"x") for i in range(20)])]
    assert said[0] == said[1]
    assert 0 < said[0][0].packets < said[0][1].packets


def test_a_vnc_server_that_dials_is_seen():
    near, far = (0, b"RFB 003.008\n"), (1, b"RFB 003.008\n")
    assert judged(conversation([], opening=[near, far])) == {"reverse-shell": "suspect"}
    assert judged(conversation([], opening=[far, near])) == {}
    assert judged(conversation([], opening=[near])) == judged(conversation([], opening=[far])) == {}
    host = Host()
    host.receive(HostInfo(0, 1, "b", "h", 100, addresses=("203.0.113.9",)))
    assert judged(conversation([], opening=[near, far]), host) == {}


def test_a_window_that_is_typed_in_on_a_far_display_is_seen():
    setup, may, keys = (0, X_SETUP), (1, X_MAY), (1, (X_REPLY + X_KEY) * 20)
    assert judged(conversation([], opening=[setup, may, keys])) == {"reverse-shell": "suspect"}
    assert judged(conversation([], opening=[setup, may, (1, X_REPLY * 200)])) == {}
    assert judged(conversation([], opening=[setup, may, (1, (X_REPLY + X_KEY) * 19)])) == {}
    assert judged(conversation([], opening=[may, keys])) == {}
    host = Host()
    host.receive(HostInfo(0, 1, "b", "h", 100, addresses=("203.0.113.9",)))
    assert judged(conversation([], opening=[setup, may, keys]), host) == {}


def test_http2_turned_round_is_a_reverse_proxy():
    preface, settings = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + b"\4" + bytes(5), bytes(3) + b"\4" + bytes(5)
    assert judged(conversation([], opening=[(0, b"dial home\n"), (1, preface), (0, settings)])) == {
        "reverse-proxy": "suspect"}
    assert judged(conversation([], opening=[(0, preface), (1, settings)])) == {}


def test_a_tunnel_within_a_proxy_is_seen_through_it():
    mining = b'{"id":1,"method":"mining.subscribe","params":[]}\n'
    assert judged(conversation([], opening=[(0, b"CONNECT p:1 HTTP/1.1\r\n\r\n"), (0, mining)])) == {
        "http-proxy": "clear", "mining-pool": "confirmed"}
    assert judged(conversation([], opening=[(0, GREETING), (1, CHOICE), (0, REQUEST), (1, REPLY), (0, mining)])) == {
        "socks-proxy": "clear", "mining-pool": "confirmed"}


@pytest.mark.parametrize("data", [b"\1\0\0\0" + NOISE[:144], b"\x38CLIENTID" + bytes(5)])
def test_vpns_are_named(data):
    assert judged(conversation([(0.0, 0, data)], protocol=17)) == {"vpn": "clear"}


def test_esp_is_named():
    flow = FlowId(0, 50, "10.0.0.2", 0, "203.0.113.9", 0, START)
    assert verdicts([FlowOpened(START, flow)]) == {"vpn": "clear"}
    assert verdicts([FlowOpened(START, FLOW)]) == {}


def test_labels_that_accuse_nobody():
    assert not any(LABELS[name].accuses for name in ("socks-proxy", "http-proxy", "tor", "vpn", "beacon"))
    assert LABELS["reverse-proxy"].accuses


# -- TLS --------------------------------------------------------------------------------------------------------------

HELLOS = [(0, tls_record(client_hello("a.example"))), (1, tls_record(b"\2\0\0\x2c" + bytes(44)))]


def behind_tls(said):
    """Each message in one record of TLS 1.3, which adds 17 bytes (RFC 8446, 5.2)."""
    records = ((seconds + 0.1, side, b"\x17\3\3" + struct.pack(">H", size + 17) + bytes(size + 17))
               for seconds, side, size in said)
    return conversation(list(records), opening=HELLOS)


@pytest.mark.parametrize("name", tls_talks.OTHERS)
def test_other_talk_behind_tls_is_no_pools(name):
    for seed in range(10):
        found = judged(behind_tls(tls_talks.OTHERS[name](random.Random(seed))))
        assert set(found) <= {"beacon"}, (name, seed)


def test_who_types_in_a_chat_is_hardly_ever_a_pools_talk():
    """Eight times in a row that somebody types, and no message in between, happens: once in 360 drawings."""
    found = [judged(behind_tls(tls_talks.presence(random.Random(seed)))) for seed in range(40)]
    assert sum("mining-pool" in one for one in found) <= 1


@pytest.mark.parametrize(("share", "answer", "job", "pings"),
                         [(2834, 37, 298, False), (295, 124, 187, False), (96, 10, 250, True)])
def test_pools_in_other_clothes_are_seen_behind_tls(share, answer, job, pings):
    """Solutions of Equihash and Beam; a compressed WebSocket whose both sides ping by one clock."""
    for seed in range(6):
        dice = random.Random(seed)
        said = tls_talks.merged(
            300, tls_talks.pushed(tls_talks.by_chance(dice, 9, 6), lambda _: job),
            tls_talks.answered(dice, tls_talks.by_chance(dice, 9, 6), lambda _: share, lambda _: answer))
        for now in range(20, 300, 20) if pings else ():
            said += [(now, 0, 10), (now + 0.001, 1, 6), (now + 0.03, 1, 6), (now + 0.031, 0, 10)]
        assert judged(behind_tls(sorted(said))).get("mining-pool") == "suspect", seed


def test_a_pool_that_hangs_up_was_one():
    """RFC 6455, 5.5.1 and RFC 8446, 6.1: the last two records are no shares."""
    jobs = stratum.Talk(tuple(range(0, 90 * S, 7 * S)), (250,) * 13)
    times = sorted((*range(0, 90 * S, 5 * S + 1), *(now * S for now in (11, 12, 14, 31, 33, 47))))
    answers = [(now + S // 100, 30) for now in times]
    far = stratum.Talk(*zip(*sorted([*zip(*jobs, strict=True), *answers]), strict=True))
    for end in ((), (8 + 17, 2 + 17)):
        near = stratum.Talk((*times, *(times[-1] for _ in end)), (116,) * len(times) + end)
        assert stratum._weigh_talk(near, far)[0] > SUSPECT_NATS


@pytest.mark.parametrize("name", tls_talks.POOLS)
def test_a_pool_behind_tls_is_suspect(name):
    found = [judged(behind_tls(tls_talks.POOLS[name](random.Random(seed), 3600, share_s, job_s))).get("mining-pool")
             for seed, (share_s, job_s) in enumerate(itertools.product((6, 15, 30), (10, 25, 45)))]
    assert set(found) <= {"suspect", None}
    assert found.count("suspect") >= 7


@pytest.mark.parametrize("name", tls_talks.POOLS)
def test_a_pool_on_a_fast_network_is_suspect(name, monkeypatch):
    """Its answers come within the millisecond in which the share went out."""
    monkeypatch.setattr(tls_talks, "RTT_S", 0.0003)
    found = [judged(behind_tls(tls_talks.POOLS[name](random.Random(seed), 1800, 10, 15))) for seed in range(4)]
    assert [one.get("mining-pool") for one in found] == ["suspect"] * 4


def test_two_shares_under_way_at_once_are_answered_in_turn():
    """The second share went out just before the answer to the first came."""
    dice = random.Random(5)
    shares = [now for when in itertools.islice(tls_talks.by_chance(dice, 12, 6), 16) for now in (when, when + 0.039)]
    said = tls_talks.merged(4000, tls_talks.answered(dice, iter(shares), lambda _: 230, lambda _: 60),
                            tls_talks.pushed(tls_talks.by_chance(dice, 14, 3), lambda _: 250))
    assert judged(behind_tls([(0.1, 0, 100), (0.2, 1, 130), *said])) == {"mining-pool": "suspect"}


def test_the_known_look_alike_is_never_more_than_suspect():
    assert judged(behind_tls(tls_talks.known_look_alike(random.Random(1)))).get("mining-pool") in {"suspect", None}


def test_a_pool_that_others_dial_is_left_alone():
    host = Host()
    host.receive(HostInfo(0, 1, "b", "h", 100, addresses=("203.0.113.9",)))
    talk = behind_tls(tls_talks.ethash(random.Random(1), 3600, 15, 20))
    assert judged(talk).get("mining-pool") == "suspect"
    assert "mining-pool" not in judged(talk, host)


def test_talk_that_turns_out_otherwise_is_taken_back():
    block = behind_tls(tls_talks.ethash(random.Random(1), 3600, 15, 20))
    talks = [one for one in observations_of(FlowTable(), block) if isinstance(one, TlsTalk)]
    ends = [TlsTalk(one.time_ns, one.flow, one.speaker, one.times_ns, tuple(range(40, 40 + 9 * len(one.sizes), 9)))
            for one in talks[-2:]]
    detector, nats = stratum.Detector(), 0.0
    for one in [*talks, *ends]:
        nats += sum(evidence.nats for evidence in detector.receive(one, Host()))
    assert nats == 0.0


def http(*requests):
    """Requests of the side that dialled, each answered: heads, and bodies in segments of their own."""
    answer = (1, b'HTTP/1.1 200 OK\r\nContent-Length: 16\r\n\r\n{"method":"work"}')
    return conversation([], opening=[one for head, body in requests for one in (
        (0, head + b" HTTP/1.1\r\nHost: node\r\n\r\n"), *([(0, body)] if body else []), answer)])


def rpc(*methods):
    return [(b"POST /json_rpc", b'{"id":"0","jsonrpc":"2.0","method":"%s","params":{}}' % one) for one in methods]


def test_work_that_is_fetched_after_other_requests_is_mining():
    """A daemon of Monero's is asked for its height between two templates, by GET or by JSON-RPC."""
    for before in ([(b"GET /getheight", b"")], rpc(b"get_info"), rpc(*[b"get_block_count"] * 40)):
        found = judged(http(*before, *rpc(b"get_block_template")))
        assert found == {"mining-pool": "suspect"}, before


@pytest.mark.parametrize("requests", [
    rpc(b"getblockchaininfo", b"getblock", b"estimatesmartfee", b"getmininginfo", b"eth_call", b"get_info"),
    [(b"GET /", b""), (b"POST /notes", b'{"text":"the \\"method\\":\\"getblocktemplate\\" of BIP 22"}')],
    [(b"POST /log", b"x" * 700 + b'{"method":"getwork"}'), (b"PUT /json_rpc", b'{"method":"getwork"}')],
    [(b"POST /upload", bytes(50)), *rpc(b"getwork")],
    [*rpc(*[b"get_info"] * 400), *rpc(b"get_block_template")],
])
def test_requests_of_others_are_no_mining(requests):
    """The last two are misses: who sent bytes that are no text, or 16 kB, is not read on."""
    assert judged(http(*requests)) == {}


def test_cells_name_tor():
    assert judged(behind_tls([(i / 10, 0, 514) for i in range(5)])) == {"tor": "clear"}


def test_stratum_v2_is_suspect_by_its_handshake():
    opening = [(0, NOISE[:64]), (1, NOISE[64:298]), (0, NOISE[:90]), (1, NOISE[300:344])]
    assert judged(conversation([], opening=opening)) == {"mining-pool": "suspect"}
    assert judged(conversation([], opening=opening[:1])) == {}
    assert judged(conversation([], opening=[(1 - side, data) for side, data in opening])) == {}


def test_the_tables_of_pools_stay_bounded():
    detector = stratum.Detector()
    for port in range(stratum.TALKS_MAX + 50):
        flow = FlowId(0, 6, "10.0.0.2", port, "203.0.113.9", 443, START)
        detector.receive(TlsTalk(START, flow, "initiator", (1,), (1,)), Host())
    assert len(detector._talks) == stratum.TALKS_MAX
    detector.receive(FlowClosed(START, flow, "closed", 1, 1, 1, 1, 1, 1, "tls", START), Host())
    assert len(detector._talks) == stratum.TALKS_MAX - 1


# -- DNS over TCP -----------------------------------------------------------------------------------------------------


def test_a_tunnel_in_dns_over_tcp_is_one():
    dice = random.Random(3)

    def message(side, *, answers):
        labels = [dice.randbytes(30).hex().encode(), dice.randbytes(30).hex().encode(), b"t", b"example"]
        record = b"\xc0\x0c" + struct.pack(">HHIH", 16, 1, 0, 400) + bytes(400)
        data = question(*labels, flags=0x8180 if side else 0x0100, answers=record if answers else b"", count=answers)
        return struct.pack(">H", len(data)) + data

    said = [(1 + i / 5, i % 2, message(i % 2, answers=i % 2)) for i in range(400)]
    assert judged(conversation(said)) == {"dns-tunnel": "confirmed"}


# -- regular calls ----------------------------------------------------------------------------------------------------


def calls(times_s, *, places=1, named=False):
    """Connections that begin at these times, as dull rows or one by one."""
    items = []
    for at, now in enumerate(times_s):
        rows = np.zeros(1, CLOSED_FLOW)
        rows["start_ns"], rows["time_ns"], rows["protocol"] = START + now * S, START + (now + 0.2) * S, 6
        rows["initiator"], rows["responder"] = NEAR.rjust(16, b"\0"), bytes((203, 0, 113, at % places)).rjust(16, b"\0")
        rows["initiator_known"], rows["responder_port"], rows["initiator_port"] = 1, 443, 20_000 + at % 40_000
        flow = FlowId(0, 6, "10.0.0.2", 20_000 + at, f"203.0.113.{at % places}", 443, int(rows["start_ns"][0]))
        end_ns = int(rows["time_ns"][0])
        closed = FlowClosed(end_ns, flow, "closed", 9, 100, 100, 1, 0, 1, "tls", end_ns)
        items.append(closed if named else FlowsClosed(int(rows["time_ns"][0]), rows, 0))
    return items


def steps(gaps):
    return list(itertools.accumulate(gaps))


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("jitter", [0.0, 0.1, 0.3, 0.5])
def test_a_timer_is_regular_whatever_its_jitter(named, jitter):
    dice = random.Random(5)
    found = 0
    for _ in range(20):
        gaps = [60 * (1 - dice.uniform(0, jitter)) for _ in range(40)]
        found += verdicts(calls(steps(gaps), named=named)) == {"beacon": "clear"}
    assert found >= 18


@pytest.mark.parametrize("named", [False, True])
def test_calls_by_chance_and_in_crowds_are_not_regular(named):
    for seed in range(20):
        dice = random.Random(seed)
        assert verdicts(calls(steps([dice.expovariate(1 / 30) for _ in range(200)]), named=named)) == {}
        assert verdicts(calls(steps([0.2] * 200), named=named)) == {}
        assert verdicts(calls(steps([dice.lognormvariate(3, 1) for _ in range(200)]), named=named)) == {}
    assert verdicts(calls(steps([30.0] * 14), named=named)) == {}


def test_rows_are_sieved_as_one_by_one():
    """Cutting blocks of dull flows otherwise changes nothing; many places are told apart."""
    dice = random.Random(8)
    one_by_one = calls(steps([dice.uniform(0.5, 1.5) for _ in range(3000)]), places=60)
    whole = FlowsClosed(one_by_one[-1].time_ns, np.concatenate([one.rows for one in one_by_one]), 0)
    single, joined = beacon.Detector(), beacon.Detector()
    apart = [one for item in one_by_one for one in single.receive(item, Host())]
    assert apart == joined.receive(whole, Host())
    assert len({one.subject.responder for one in apart}) == 60


def test_beats_within_one_connection():
    ticks = [Exchange(START + i * 30 * S, FLOW, "responder", 10**6, 20, 20, 0, i, i, None, "tcp") for i in range(20)]
    assert verdicts(ticks, detectors=(beacon,)) == {"beacon": "clear"}
    talk = TlsTalk(START + 999 * S, FLOW, "initiator", tuple(START + i * 30 * S for i in range(24)), (90,) * 24)
    assert verdicts([talk], detectors=(beacon,)) == {"beacon": "clear"}


@pytest.mark.parametrize(("late_s", "who"), [(0.05, "initiator"), (8, "responder")])
def test_a_poll_is_whose_who_asks(late_s, who):
    """Of a poll and its answers, which come as evenly, the answers may be told of first."""
    asked = [START + i * 20 * S for i in range(20)]
    polls = TlsTalk(START, FLOW, "initiator", tuple(asked[:16]), (90,) * 16)
    answers = TlsTalk(START, FLOW, "responder", tuple(now + round(late_s * S) for now in asked), (40,) * 20)
    detector = beacon.Detector()
    assert detector.receive(polls, Host()) == []
    (told,) = detector.receive(answers, Host())
    assert told.text == f"the {who} sends every 20.0 s"


def test_the_table_of_places_stays_bounded():
    detector = beacon.Detector()
    for port in range(beacon.PLACES_MAX + 50):
        flow = FlowId(0, 6, "10.0.0.2", 40_000, "203.0.113.9", port, START + port)
        for start_ns in (START + port, START + port + 2 * S):
            closed = FlowClosed(start_ns, replace(flow, start_ns=start_ns), "closed", 1, 1, 1, 1, 1, 1, "tcp", start_ns)
            detector.receive(closed, Host())
        detector.receive(Exchange(START, flow, "responder", 1, 1, 1, 1, 1, 1, None, "tcp"), Host())
    assert len(detector._calls) == len(detector._within) == beacon.PLACES_MAX


def test_what_is_said_twice_is_weighed_but_names_once():
    spoke = Spoke(START, FLOW, "initiator", "http-connect")
    assert verdicts([spoke, spoke]) == {"http-proxy": "clear"}


# -- workers, who answer at once on connections that they opened ------------------------------------------------------


def tasks(first, *, confirmed, seed=1, work_s=(0.0004, 0.0004)):
    """A worker's connection: it greets, waits, is given something, answers at once, and is told so or not."""
    dice, now, said = random.Random(seed), 1.0, []
    for _ in range(40):
        now += dice.lognormvariate(0, 0.8) + 0.2
        asked, now = now, now + dice.uniform(*work_s)
        said += [(asked, 1, b"$" * dice.randint(20, 30)), (now, 0, b"=" * dice.randint(20, 90))]
        if confirmed:
            said += [(now + 0.0005, 1, b":%d" % dice.randint(1, 999)), (now + 0.0008, 0, b"B" * 14)]
    return conversation(said, opening=first)


WORKER = [(0, b"hello, I can work\n"), (1, b"fine\n")]
BROKERS = [[(1, b'INFO {"server_id":"N"}\r\n'), (0, b"CONNECT {}\r\n")], [(0, b"AMQP\0\0\x09\1"), (1, b"\1\0\0")],
           [(side, b"\xff" + bytes(8) + b"\x7f\3\0NULL" + bytes(40)) for side in (0, 1)]]


def shells(block):
    return verdicts(observations_of(FlowTable(), block), detectors=(reverse_shell,))


@pytest.mark.parametrize("seed", range(5))
def test_workers_are_no_shells(seed):
    assert shells(tasks(WORKER, confirmed=True, seed=seed)) == {}
    for opening in BROKERS:
        assert shells(tasks(opening, confirmed=False, seed=seed)) == {}


@pytest.mark.parametrize("seed", range(5))
def test_a_worker_of_an_unknown_protocol_is_suspect_where_its_work_takes_time(seed):
    """By its turns it is a shell, and its times are those of programs: said here, so that it is known."""
    assert shells(tasks(WORKER, confirmed=False, seed=seed)) == {}
    assert shells(tasks(WORKER, confirmed=False, seed=seed, work_s=(0.002, 0.002))) == {"reverse-shell": "suspect"}
    assert shells(tasks(WORKER, confirmed=False, seed=seed, work_s=(0.001, 0.03))) == {"reverse-shell": "suspect"}
