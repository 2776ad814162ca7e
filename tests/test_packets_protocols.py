"""Proxies, VPNs, DNS over TCP, Stratum V2 and TLS records: what the parser names, what it does not, and parity."""

from __future__ import annotations

import itertools
import random
import struct
import sys
import zlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuguard._packets import Parser
from gpuguard.core.records import SPOKEN, DnsMessage, Fact, Spoken, SshBanner, Stratum, TlsClientHello, TlsRecords

sys.path.insert(0, str(Path(__file__).parent))
import reference_packets as reference
from test_packets import NEWKEYS, client_hello, exact, ipv4, kexinit, question, tcp, tls_record, udp

MS = 1_000_000
Sent = tuple[bytes, int]  # a segment, and how many milliseconds after the one before

NOISE = random.Random(7).randbytes(400)
GREETING = b"\5\2\0\1"
REQUEST = b"\5\1\0\3\x07example\0\x50"
SERVER_HELLO = tls_record(b"\2\0\0\x2c" + bytes(44))


def frames(segments: list[Sent], *, protocol: int = 6,
           flags: int = 2) -> tuple[list[tuple[int, bytes, int]], list[int]]:
    """One stream with its SYN, or datagrams of one conversation; and the times they come at."""
    if protocol == 17:
        packets = [udp(data, (40000, 4444)) for data, _ in segments]
        times = list(itertools.accumulate(after_ms * MS for _, after_ms in segments))
    else:
        starts = list(itertools.accumulate((len(data) for data, _ in segments), initial=5001))
        packets = [tcp(b"", 5000, flags), *(tcp(data, at) for (data, _), at in zip(segments, starts, strict=False))]
        times = list(itertools.accumulate((after_ms * MS for _, after_ms in segments), initial=0))
    whole = [ipv4(packet, protocol) for packet in packets]
    return [(101, one, len(one)) for one in whole], times


def facts_of(segments: list[Sent], *, protocol: int = 6, flags: int = 2) -> list[Fact]:
    """The parser's facts, which must be the reference's."""
    some, times = frames(segments, protocol=protocol, flags=flags)
    parser = Parser()
    for (link, data, wire_bytes), time_ns in zip(some, times, strict=True):
        parser.frame(link, exact(data), time_ns, wire_bytes=wire_bytes)
    _, facts = parser.take()
    assert list(facts) == reference.read_frames(some, times)[1]
    return list(facts)


def told(*segments: bytes, protocol: int = 6, flags: int = 2) -> list[str]:
    facts = facts_of([(data, 1) for data in segments], protocol=protocol, flags=flags)
    return [fact.what if isinstance(fact, Spoken) else type(fact).__name__ for fact in facts]


# -- what it is -------------------------------------------------------------------------------------------------------

DNS_QUERY = question(b"data", b"example")
RESET = b"\x38CLIENTID" + bytes(5)
RESET_ANSWER = b"\x40SERVERID\1" + bytes(4) + b"CLIENTID" + bytes(4)
RESET_HMAC = b"\x38CLIENTID" + NOISE[:20] + struct.pack(">II", 1, 7) + bytes(5)
RESET_CRYPT = b"\x38CLIENTID" + struct.pack(">II", 0x0F000001, 7) + NOISE[:37]
IKE = NOISE[:8] + bytes(8) + bytes([33, 0x20, 34, 8]) + bytes(4) + struct.pack(">I", 128) + bytes(100)


WEBSOCKET = b"GET /ws HTTP/1.1\r\nHost: a\r\nUPGRADE: WebSocket\r\n\r\n"
SWITCHED = b"HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\n\r\n"
POOL_JOB = b'{"type":"job","params":{"job_id":"7","blob":"%s","target":"ff0000"}}' % (b"0e" * 76)
OTHER_JOB = b'{"method":"job","input":"%s","difficulty":134217728,"height":25}' % (b"0e" * 32)
OTHER_SHARE = b'{"method":"solution","nonce":"0123456789abcdef","output":"%s"}' % (b"1f" * 104)


def ws(data: bytes, *, key: bytes = b"", opcode: int = 1, final: bool = True, deflated: bool = False) -> bytes:
    """One frame of RFC 6455, 5.2."""
    size = len(data)
    head = bytes([128 * final | 64 * deflated | opcode, 128 * bool(key) | min(126, size)])
    head += struct.pack(">H", size) if size >= 126 else b""
    return head + key + bytes(byte ^ key[i % 4] if key else byte for i, byte in enumerate(data))


def deflated(*messages: bytes, key: bytes = b"") -> list[bytes]:
    """Messages of one side as RFC 7692, 7.2.1 has them, the window kept from one to the next."""
    one = zlib.compressobj(wbits=-15)
    return [ws((one.compress(data) + one.flush(zlib.Z_SYNC_FLUSH))[:-4], key=key, deflated=True) for data in messages]


REQUESTED = b"GET /a HTTP/1.1\r\nHost: x\r\n\r\n"
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


def mux(kind: int, flags: int, stream: int = 1, data: bytes = b"") -> bytes:
    """One frame of yamux."""
    return struct.pack(">BBHII", 0, kind, flags, stream, len(data)) + data


X_SETUP, X_MAY = b"l\0\x0b" + bytes(9), b"\1\0\x0b\0\0\0\2\0" + bytes(8)
X_REPLY, X_KEY = b"\1\0\7\0\1\0\0\0" + bytes(28), b"\2\x26" + bytes(30)


@pytest.mark.parametrize(("segments", "names"), [
    ([GREETING, REQUEST], ["socks5-greeting", "socks5-request"]),
    ([b"\5\3\0\1\2", b"\1\4user\4word", REQUEST], ["socks5-greeting", "socks5-request"]),
    ([b"\5\0", b"\5\0\0\1\n\0\0\1\1\xbb"], ["socks5-choice"]),
    ([b"\5\2", b"\1\0", b"\5\0\0\1\n\0\0\1\1\xbb"], ["socks5-choice"]),
    ([b"\5\xff"], ["socks5-choice"]),
    ([b"\4\1\0\x50\x5d\xb8\xd8\x77\0"], ["socks4-request"]),
    ([b"\4\1\0\x50\0\0\0\1me\0www.example.com\0"], ["socks4-request"]),
    ([b"\0\x5a\xdf\xb2\n\xb4\x9c\xf9"], ["socks4-reply"]),
    ([b"CONNECT a.example:443 HTTP/1.1\r\nHost: a.example:443\r\n\r\n"], ["http-connect"]),
    ([b"GET http://a.example/ HTTP/1.1\r\nHost: a.example\r\n\r\n"], ["http-absolute"]),
    ([b"RFB 003.008\n"], ["rfb-version"]), ([b"RFB 003.008\r\n"], []), ([b"RFB 1003.08\n"], []),
    ([b"\0\x0e" + RESET], ["openvpn"]),
    ([b"\0\x1a" + RESET_ANSWER], ["openvpn"]),
    ([b"*3\r\n$5\r\nBLPOP\r\n$1\r\nq\r\n$1\r\n0\r\n"], ["message-broker"]),
    ([b"*12\r\n$4\r\nMSET\r\n"], ["message-broker"]),
    ([b'INFO {"server_id":"N","version":"2.9"}\r\n'], ["message-broker"]),
    ([b"AMQP\0\0\x09\1"], ["message-broker"]),
    ([b"\x10\x1e\0\4MQTT\4\2\0\x3c\0\x12" + b"a" * 18], ["message-broker"]),
    ([b"\x10\x9e\1\0\4MQTT\4\2\0\x3c\0\x92" + b"a" * 146], ["message-broker"]),
    ([b"\xff" + bytes(8) + b"\x7f\3\0NULL" + bytes(20)], ["message-broker"]),
    ([b"\0SP\0\0\x63\0\0", bytes(8) + b"q"], ["message-broker"]),
    ([b"\0SP\0\0\0\0\0"], []), ([b"\0SP\1\0\x30\0\0"], []), ([b"\0SP\0\0\x30\0\1"], []),
    ([b"CONNECT\naccept-version:1.2\n\n\0"], ["message-broker"]),
    ([b"STOMP\naccept-version:1.2\n\n\0"], ["message-broker"]), ([b"CONNECTED\n"], []),
    ([NOISE[:64]], ["stratum2-hello"]),
    ([NOISE[:234], NOISE[234:278]], ["stratum2-answer"]),
    ([struct.pack(">H", len(DNS_QUERY)) + DNS_QUERY], ["dns-over-tcp", "DnsMessage"]),
    ([struct.pack(">H", len(DNS_QUERY)), DNS_QUERY], ["dns-over-tcp", "DnsMessage"]),
    ([(struct.pack(">H", len(DNS_QUERY)) + DNS_QUERY) * 3], ["dns-over-tcp"] + ["DnsMessage"] * 3),
])
def test_first_messages_of_streams(segments: list[bytes], names: list[str]) -> None:
    assert told(*segments) == names


@pytest.mark.parametrize("line", [b"GET / HTTP/1.1\r\n", b"POST /a HTTP/1.0\r\nHost: x\r\n\r\n",
                                  b"PROPFIND /f HTTP/1.1"])
def test_the_side_that_was_called_begins_as_a_client_of_http(line: bytes) -> None:
    syn, syn_ack = 2, 18
    assert told(line, flags=syn_ack) == ["http-backwards"]
    assert told(line, flags=syn) == []


@pytest.mark.parametrize("line", [b"HTTP/1.1 200 OK\r\n", b"GET /", b"GET index HTTP/1.1\r\n", b"GO / HTTP/1.1\r\n",
                                  b"220 GET / HTTP/1.1\r\n", b"\r\nGET / HTTP/1.1\r\n", b"GET /a\r\n HTTP/1.1"])
def test_other_first_lines_of_a_server_are_no_request(line: bytes) -> None:
    assert told(line, flags=18) == []


def test_the_preface_of_http2_is_a_clients() -> None:
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9)
    assert told(preface, flags=18) == ["http-backwards"]
    assert told(preface, flags=2) == told(b"PRI * HTTP/1.1\r\n", flags=18) == []


START_WORK = b"s" + struct.pack(">q", 25) + b'{"proxy_name":"web.staff"'[:24] + b"}"
GREETINGS = [START_WORK, b'{"Challenge":"8e0b6f60"}\0', b"OK\n", b"ready\r\n", b"\0\0\0\2ok", b"\1", bytes(500)]
NO_GREETINGS = [b"HTTP/1.1 101 Upgraded\r\nUpgrade: h2c\r\n\r\n", b"ICAP/1.0 200 OK\r\nEncapsulated: req-hdr=0\r\n\r\n",
                b"RTSP/1.0 200 OK\r\nCSeq: 2\r\n\r\n", bytes(600)]
BROWSED = [REQUESTED, b"GET /services HTTP/1.0\r\n\r\n", b"POST /a?b HTTP/1.1\r\nX_y-Z: 1\r\n"]


@pytest.mark.parametrize("greeting", GREETINGS)
def test_a_client_may_begin_behind_a_greeting_of_the_side_that_was_called(greeting: bytes) -> None:
    for first in BROWSED:
        assert told(greeting, first, flags=18) == ["http-backwards"]
        assert told(greeting, first, flags=2) == told(greeting + first, flags=18) == []
        assert told(greeting, *[greeting[:1]] * 5, first, flags=18) == ["http-backwards"]
    assert told(greeting, PREFACE, flags=18) == ["http-backwards"]
    assert told(greeting, b"CONNECT a:1 HTTP/1.1\r\nHost: a:1\r\n\r\n", flags=18) == ["http-connect"]
    assert told(greeting, GREETING, REQUEST, flags=18) == ["socks5-greeting", "socks5-request"]
    assert told(greeting, GREETING, REQUEST, flags=2) == []


@pytest.mark.parametrize("greeting", NO_GREETINGS)
@pytest.mark.parametrize("first", [*BROWSED, PREFACE, GREETING])
def test_behind_an_answer_or_much_else_nobody_begins_as_a_client(greeting: bytes, first: bytes) -> None:
    assert told(greeting, first, flags=18) == []


@pytest.mark.parametrize("text", [
    b"GET /a HTTP/1.1\nHost: x\n\n", b"GET /a HTTP/1.1 200 5\r\n", b"GET /a HTTP/1.1\r\nGET /b HTTP/1.1\r\n",
    b"GET /a HTTP/1.1\r\n> GET", b"OPTIONS rtsp://a/b RTSP/1.0\r\nCSeq: 1\r\n\r\n", b"GET /a HTTP/1.1\r\n",
    b"OPTIONS sip:a@b SIP/2.0\r\nVia: SIP/2.0/TCP a\r\n\r\n", b"\"GET /a HTTP/1.1\r\nHost: x\r\n\r\n",
    b"\5\1\4", b"\5\0", b"\5\0\0\1\n\0\0\1\1\xbb", b"\5\1\0\0", b"PRI * HTTP/2.0\r\n\r\n",
])
def test_text_behind_a_greeting_that_is_no_request(text: bytes) -> None:
    assert told(b"220 a ready\r\n", text, flags=18) == told(b"\1\2", text, flags=18) == []


def test_a_request_that_overtook_the_greeting_is_read() -> None:
    syn, greeting, request = frames([(START_WORK, 1), (REQUESTED, 1)], flags=18)[0]
    parser = Parser()
    for link, data, wire in (syn, request, greeting):
        parser.frame(link, exact(data), 0, wire_bytes=wire)
    assert parser.take()[1] == (Spoken(2, "http-backwards"),)


def test_ssh_in_a_websocket() -> None:
    for head, key in ((WEBSOCKET, b"abcd"), (SWITCHED, b"")):
        for banner in (b"SSH-2.0-OpenSSH_9.2\r\n", b"SSH-chisel-v3-client\n", b"SSH-2.0-x\r\n" + kexinit(*["a"] * 8)):
            assert told(head, ws(banner, key=key, opcode=2)) == ["ssh-in-websocket"]
            assert told(head, *deflated(banner, key=key)) == []  # text
            binary = deflated(banner, b"more", key=key)
            assert told(head, *(bytes([one[0] + 1]) + one[1:] for one in binary)) == ["ssh-in-websocket"]
        for text in (b"SSH-2.0-x", b"I like SSH-2.0\n", b"SSH\n", b"SSH-" + b"x" * 260 + b"\n"):
            assert told(head, ws(text, key=key, opcode=2)) == []
        assert told(head, ws(b"SSH-2.0-x\r\n", key=key)) == []


@pytest.mark.parametrize("first", [b"\x10\x1e\0\4MQTT\4\2\0\x3c\0\x12" + b"a" * 18, b"CONNECT\nhost:a\n\n\0",
                                   b'INFO {"server_id":"N"}\r\n', b"AMQP\0\0\x09\1"])
def test_a_broker_within_a_websocket(first: bytes) -> None:
    for head, key in ((WEBSOCKET, b"abcd"), (SWITCHED, b"")):
        assert told(head, ws(b"", opcode=9, key=key), ws(first, opcode=2, key=key), ws(first, key=key)) == [
            "message-broker"]
        assert told(head, ws(b"{}", key=key), ws(first, opcode=2, key=key)) == []


@pytest.mark.parametrize(("header", "names"), [
    (b"Sec-WebSocket-Protocol: mqtt", ["message-broker"]), (b"sec-websocket-protocol: mqttv3.1", ["message-broker"]),
    (b"SEC-WEBSOCKET-PROTOCOL: v12.stomp", ["message-broker"]), (b"Sec-WebSocket-Protocol: amqp", ["message-broker"]),
    (b"Sec-WebSocket-Protocol: wamp.2.json", ["message-broker"]),
    (b"Sec-WebSocket-Protocol: chat", []), (b"Sec-WebSocket-Protocol: ", []), (b"X-WebSocket-Protocol: mqtt", []),
    (b"Sec-WebSocket-Accept: mqtt mqtt mqtt mqtt", [])])
def test_a_server_chooses_a_brokers_protocol_for_a_websocket(header: bytes, names: list[str]) -> None:
    for end in (b"\r\n", b"\n"):
        for head in (SWITCHED[:-2] + header + end + b"\r\n", SWITCHED.replace(b"upgrade", header + end + b"Upgrade")):
            assert told(head, flags=18) == names
            assert told(head, flags=2) == told(WEBSOCKET[:-2] + header + end + b"\r\n", flags=2) == []
    assert told(b"HTTP/1.1 200 OK\r\n" + header + b"\r\n\r\n", flags=18) == []


def test_a_client_within_a_websocket_of_the_side_that_was_called() -> None:
    for flags, names in ((18, ["http-backwards"]), (2, [])):
        assert told(SWITCHED, ws(REQUESTED, opcode=2), ws(REQUESTED, opcode=2), flags=flags) == names
    both = [ws(one, opcode=2) for one in (GREETING, REQUEST)]
    assert told(SWITCHED, *both, flags=18) == ["socks5-greeting", "socks5-request"]
    assert told(SWITCHED, ws(b"> " + REQUESTED), ws(REQUESTED[:20]), ws(b"\5\1\0\1"), flags=18) == []


def test_streams_of_yamux_that_the_side_opens_that_was_called() -> None:
    asked = [mux(1, 1), mux(0, 0, 1)[:8] + struct.pack(">I", 3), b"\5\1\0", mux(0, 0, 1, REQUEST)]
    assert told(*asked, flags=18) == ["yamux-backwards", "socks5-greeting", "socks5-request"]
    assert told(b"".join(asked), flags=18) == ["yamux-backwards", "socks5-greeting", "socks5-request"]
    assert told(*asked, flags=2) == []
    visit = mux(0, 0, 1, REQUESTED)
    assert told(mux(2, 1, 0), mux(1, 2, 1), mux(0, 0, 1, START_WORK), visit, flags=18) == ["http-backwards"]
    for frames_before, names in ((63, ["http-backwards"]), (64, [])):
        assert told(mux(2, 1, 0), *[mux(0, 0, 1, b"x" * 2100)] * (frames_before - 1), visit, flags=18) == names


@pytest.mark.parametrize("frame", [
    mux(1, 0), mux(1, 3), mux(1, 1, 0), mux(1, 1, 3), mux(2, 1, 1), mux(3, 1, 0), mux(1, 1)[:11],
    struct.pack(">III", 1, 1, 5) + b"data.",                          # a call's number, status and length
    struct.pack(">II", 1, 65_536) + bytes(1440),                      # an answer's number and length
    b"\0\1\0\0\0\6\1\3\0\0\0\1",                             # Modbus
])
def test_other_first_bytes_of_the_side_that_was_called(frame: bytes) -> None:
    assert told(frame, mux(0, 1, 1, REQUESTED), flags=18) == []


@pytest.mark.parametrize(("head", "key"), [(WEBSOCKET, b"abcd"), (SWITCHED, b"")])
@pytest.mark.parametrize("cut", [1, 5, 10**6])
def test_messages_in_a_websocket_are_read(head: bytes, key: bytes, cut: int) -> None:
    plain = [ws(b"", opcode=9, key=key), ws(b"{}", key=key), ws(OTHER_JOB, key=key), ws(POOL_JOB, key=key)]
    pressed = deflated(b'{"id":1}', OTHER_JOB, OTHER_JOB, POOL_JOB, key=key)
    for frames_of, methods in ((plain, ["pool-job", "job"]), (pressed, ["pool-job", "pool-job", "job"]),
                               ([pressed[0], *pressed[2:]], []), ([ws(b"{}", key=key)] * 16 + plain, [])):
        whole = b"".join(frames_of)
        facts = facts_of([(head, 0), *((whole[at:at + cut], 0) for at in range(0, len(whole), cut))])
        assert [fact.method for fact in facts if isinstance(fact, Stratum)] == methods


def test_a_head_that_asks_for_no_websocket_is_followed_by_none() -> None:
    for head in (WEBSOCKET.replace(b"WebSocket", b"h2c"), WEBSOCKET.replace(b"GET", b"PUT"),
                 SWITCHED.replace(b"101", b"200")):
        assert told(head + ws(POOL_JOB)) == []


def test_keys_pressed_at_a_display_are_counted_up_to_twenty() -> None:
    assert told(X_SETUP) == told(b"B\0\0\x0b" + bytes(8)) == ["x11-setup"]
    assert told(b"l\0\0\x0b" + bytes(8)) == told(b"l\0\x0b\0\1" + bytes(7)) == told(X_SETUP, flags=18) == []
    some = X_MAY + (X_REPLY + X_KEY + b"\x82" + X_KEY[1:] + b"\3" + X_KEY[1:]) * 19
    assert told(some, flags=18) == []
    assert told(some, X_KEY, X_KEY * 30, flags=18) == ["x11-keys"]
    assert told(some + X_KEY, flags=2) == []


@pytest.mark.parametrize(("datagrams", "names"), [
    ([RESET], ["openvpn"]), ([RESET_ANSWER], ["openvpn"]), ([RESET_HMAC], ["openvpn"]), ([RESET_CRYPT], ["openvpn"]),
    ([b"\1\0\0\0" + NOISE[:144]], ["wireguard"]), ([b"\2\0\0\0" + NOISE[:88]], ["wireguard"]),
    ([b"\4\0\0\0abcd" + struct.pack("<Q", 7 + 3 * i) + bytes(32) for i in range(9)], ["wireguard"]),
    ([IKE], ["ike"]), ([bytes(4) + IKE], ["ike"]),
])
def test_handshakes_of_vpns(datagrams: list[bytes], names: list[str]) -> None:
    assert told(*datagrams, protocol=17) == names


@pytest.mark.parametrize("inner", [
    (b"SSH-2.0-x\r\n", SshBanner), (tls_record(client_hello("a.example")), TlsClientHello),
])
@pytest.mark.parametrize("outer", [
    [GREETING, REQUEST], [b"\4\1\0\x50\x5d\xb8\xd8\x77\0"],
    [b"CONNECT a.example:443 HTTP/1.1\r\nHost: a.example\r\n\r\n"], [b"CONNECT a:1 HTTP/1.0\r\n", b"\r", b"\n"],
])
def test_what_a_proxy_carries_is_read(outer: list[bytes], inner: tuple[bytes, type]) -> None:
    data, kind = inner
    for segments in ([*outer, data], [*outer[:-1], outer[-1] + data]):
        assert isinstance(facts_of([(one, 1) for one in segments])[-1], kind)


# -- what it is not ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("segments", [
    [b"\5\0\x0b\3\x10\0\0\0\x48\0\0\0\1\0\0\0"],                    # a bind of DCE/RPC 5.0
    [b"\5\1\x0b\3\x10\0\0\0"],
    [b"\5\4\1\2\3\4"],
    [b"\4\1\0\x50\0\0\0\0\0"],                                      # SOCKS4 to nowhere
    [b"\4\1\0\x50\x5d\xb8\xd8\x77\xff\xfe\0"],
    [b"\0\x5a\xdf\xb2\n\xb4\x9c\xf9\1"],
    [b"CONNECT to the server"],
    [b"GET /http://a.example/ HTTP/1.1\r\n\r\n"],
    [b"\4\1\0\x50\0\0\0\1me\0www", b".example.com\0"],               # SOCKS4 in two parts, which nobody sends
    [b"*hello*\r\n$ \r\n"], [b"INFO: started\r\n"],
    [b"\0\0\0\x55\xffSMB" + bytes(81)],
    [b"\0\x0e\x38CLIENTID\0\0\0\0\1"],
    [bytes(64)], [b"{" + b"a" * 62 + b"\n"], [NOISE[:65]], [NOISE[:234], NOISE[:45]], [NOISE[:234], NOISE[:43]],
    [struct.pack(">H", 40) + bytes(40)],
    [struct.pack(">H", 40) + NOISE[:40]],
])
def test_streams_of_others(segments: list[bytes]) -> None:
    assert told(*segments) == []


@pytest.mark.parametrize("datagrams", [
    [b"\4\0\0\0abcd" + struct.pack("<Q", i * 2000) + bytes(32) for i in range(9)],
    [b"\4\0\0\0" + NOISE[i:i + 4] + struct.pack("<Q", i) + bytes(32) for i in range(9)],
    [b"\4\0\0\0abcd" + struct.pack("<Q", i) + bytes(33) for i in range(9)],
    [b"\1\0\0\0" + NOISE[:143]], [b"\1\0\0\1" + NOISE[:144]], [b"\x38" + bytes(41)], [b"\x40" + NOISE[:53]],
    [b"\x40" + NOISE[:25]], [IKE + b"\0"], [bytes(128)], [b"\x80\x60" + bytes(170)],
])
def test_datagrams_of_others(datagrams: list[bytes]) -> None:
    assert told(*datagrams, protocol=17) == []


def test_more_questions_than_a_packet_has_room_for_end_the_reading() -> None:
    one = struct.pack(">H", len(DNS_QUERY)) + DNS_QUERY
    parser = Parser()
    for link, data, wire in frames([(one * 40, 1)])[0]:
        parser.frame(link, exact(data), 0, wire_bytes=wire)
    facts = parser.take()[1]
    assert 10 < len(facts) <= 16
    assert {type(fact) for fact in facts} == {Spoken, DnsMessage}
    assert parser.counts()["streams_lost"] == 1


# -- records of TLS ---------------------------------------------------------------------------------------------------


def application(size: int) -> bytes:
    return b"\x17\3\3" + struct.pack(">H", size) + bytes(size)


def test_a_slow_side_is_told_with_times_and_sizes() -> None:
    sizes = [200 + i for i in range(24)]
    facts = facts_of([(SERVER_HELLO, 1), *((application(size), 2000 + 7 * i) for i, size in enumerate(sizes))])
    assert [type(fact) for fact in facts] == [TlsRecords] * 6
    assert facts[-1].sizes == tuple(sizes)
    assert facts[-1].times_ns[1] - facts[-1].times_ns[0] == 2007 * MS
    assert all(time_ns % MS == 0 for time_ns in facts[-1].times_ns)


@pytest.mark.parametrize(("sizes", "after_ms"), [([300] * 80, 100), ([300, 16384] * 40, 5000), ([3100] * 80, 5000)])
def test_quick_and_large_talk_is_not(sizes: list[int], after_ms: int) -> None:
    assert facts_of([(SERVER_HELLO, 1), *((application(size), after_ms) for size in sizes)]) == []


def test_no_more_than_the_first_records_are_read() -> None:
    facts = facts_of([(SERVER_HELLO, 1), *((application(300), 5000) for _ in range(100))])
    assert len(facts[-1].sizes) == 64


@pytest.mark.parametrize(("sizes", "tor"), [
    ([69, 28, 1045, 4065, 531, 531], True),                  # TLS 1.3
    ([35, 538, 538, 1052], True),                            # TLS 1.2 with GCM
    ([32, 1520] + [32, 544] * 12, True),                     # TLS 1.0 with CBC, one byte ahead of each
    ([32, 300, 544, 200, 544, 777] * 6, False),
    ([531, 532, 533, 700, 1400, 1045], False),
    ([1400] * 60, False),
])
def test_cells_of_tor(sizes: list[int], tor: bool) -> None:
    facts = facts_of([(SERVER_HELLO, 1), *((application(size), 5) for size in sizes)])
    assert [fact.what for fact in facts] == ["tor"] * tor


def test_every_name_can_be_told() -> None:
    assert len(set(SPOKEN)) == len(SPOKEN) == 24


# -- parity -----------------------------------------------------------------------------------------------------------

LENGTHS = st.one_of(st.integers(1, 700), st.sampled_from([531, 538, 544, 560, 1045, 2048, 2049, 4097, 16640]))
PIECES = st.sampled_from([
    WEBSOCKET, SWITCHED, WEBSOCKET[:-2], b"Upgrade: websocket\r\n", ws(POOL_JOB), ws(POOL_JOB, key=b"abcd"), ws(b"{}"),
    ws(OTHER_JOB, final=False), ws(b"x" * 2100), ws(b"", opcode=9), *deflated(OTHER_JOB, OTHER_JOB),
    OTHER_JOB + b"\n", OTHER_SHARE + b"\n", b"PRI * HTTP/2.0\r\n", X_SETUP, X_MAY, X_REPLY, X_KEY * 11,
    b"B\0\0\x0b" + bytes(8), b"\1\0\0\x0b\0\0\0\1" + bytes(4),
    GREETING, b"\5\1\0", b"\5\0", b"\5\2", b"\1\0", b"\1\4user\4word", REQUEST, b"\5\0\0\1\n\0\0\1\1\xbb", b"\5", b"\4",
    b"\5\1\0\4" + bytes(18), b"\4\1\0\x50\x5d\xb8\xd8\x77\0", b"\4\1\0\x50\0\0\0\1me\0www.example.com\0",
    b"\0\x5a\xdf\xb2\n\xb4\x9c\xf9", b"CONNECT a:443 HTTP/1.1\r\n", b"CONNECT ", b"\r\n", b"\r", b"\n",
    b"GET http://a/ HTTP/1.1\r\n", b"GET ", b"\0\x0e" + RESET, b"\0\x1a" + RESET_ANSWER, b"\0\x2a" + RESET_HMAC,
    b"\0\x36" + RESET_CRYPT, NOISE[:64], NOISE[:234], NOISE[:44], struct.pack(">H", len(DNS_QUERY)), DNS_QUERY,
    struct.pack(">H", len(DNS_QUERY)) + DNS_QUERY, b"\0", b"SSH-2.0-x\r\n", b"SS", kexinit(*["a"] * 8), NEWKEYS,
    tls_record(client_hello("a.example", ("h2",))), SERVER_HELLO, SERVER_HELLO[:7], application(300), application(531),
    application(300)[:4], b'{"method":"mining.subscribe"}\n', b'{"method":', b"{", b"\x16\3\1", b"\x17\3\3",
    b"\x14\3\3\0\1\1", b"*3\r\n$5\r\nBLPOP\r\n", b'INFO {"a":1}\r\n', b"AMQP\0\0\x09\1\1\1",
    b"\xff" + bytes(8) + b"\x7f", b"\x10\x1e\0\4MQTT\4\2", b"POST / HTTP/1.1\r\n", b'{"method":"getwork"}',
    b"POST /json_rpc HTTP/1.0\r\nHost: a\r\n\r\n", b'[{"id":1, "method": "eth_submitWork","params":[]}]',
    REQUESTED, PREFACE, PREFACE[:20], b"s" + bytes(7) + b"\2{}", b"OK\n", b"ICAP/1.0 200 OK\r\n\r\n",
    ws(b"SSH-2.0-x\r\n", opcode=2), ws(REQUESTED, opcode=2), ws(REQUEST, opcode=2), *deflated(b"SSH-2.0-x\r\n"),
    mux(1, 1), mux(1, 2), mux(2, 1, 0), mux(0, 0, 7, GREETING), mux(0, 1, 2, REQUEST), mux(0, 4, 3, REQUESTED),
    mux(0, 0, 1, bytes(2100)), mux(0, 0, 1, REQUESTED)[:20],
    b"root@a:~# ", b"$ ", b"ls\n$ ", b"uid=0(root) gid=0(root)\n", b"total 8\n-rw-r--r-- 1 a a 0 x\n",
    b"sh: 1: w: not found\n",
    b"POST / HTTP/1.1\r\n\r\n{}", b"GET /getheight HTTP/1.1\r\n\r\n", b"POST ",
])


@given(st.lists(st.tuples(st.one_of(PIECES, st.binary(min_size=1, max_size=12)), st.sampled_from([0, 1, 600, 30_000])),
                min_size=1, max_size=8), st.lists(st.integers(1, 900), max_size=6), st.sampled_from([2, 18]))
@settings(max_examples=1000, deadline=None)
def test_streams_are_the_references(segments: list[Sent], cuts: list[int], flags: int) -> None:
    facts_of(segments, flags=flags)
    whole = b"".join(data for data, _ in segments)
    edges = [0, *sorted({cut for cut in cuts if cut < len(whole)}), len(whole)]
    facts_of([(whole[a:b], 700) for a, b in itertools.pairwise(edges)], flags=flags)


@given(st.sampled_from([b"", WEBSOCKET, SWITCHED, X_MAY, OTHER_JOB + b"\n"]), st.lists(PIECES, max_size=24),
       st.lists(st.integers(1, 4000), max_size=6), st.booleans())
@settings(max_examples=200, deadline=None)
def test_what_is_read_on_is_the_references(head: bytes, pieces: list[bytes], cuts: list[int], called: bool) -> None:
    whole = head + b"".join(pieces) or b"x"
    edges = [0, *sorted({cut for cut in cuts if cut < len(whole)}), len(whole)]
    facts_of([(whole[a:b], 700) for a, b in itertools.pairwise(edges)], flags=18 if called else 2)


@given(st.lists(st.tuples(LENGTHS, st.sampled_from([0, 400, 900, 5000])), max_size=90), st.booleans(),
       st.lists(st.integers(1, 9000), max_size=5))
@settings(max_examples=150, deadline=None)
def test_records_are_the_references(records: list[tuple[int, int]], client: bool, cuts: list[int]) -> None:
    hello = tls_record(client_hello("a.example")) if client else SERVER_HELLO
    facts_of([(hello, 0), *((application(size), after_ms) for size, after_ms in records)])
    whole = hello + b"".join(application(size) for size, _ in records)
    edges = [0, *sorted({cut for cut in cuts if cut < len(whole)}), len(whole)]
    facts_of([(whole[a:b], 90_000) for a, b in itertools.pairwise(edges)])


DATAGRAMS = st.one_of(
    st.sampled_from([RESET, RESET_ANSWER, RESET_HMAC, RESET_CRYPT, IKE, bytes(4) + IKE, b"\1\0\0\0" + NOISE[:144],
                     b"\2\0\0\0" + NOISE[:88], DNS_QUERY, b"\x50CLIENTID\0\0\0\1" + NOISE]),
    st.builds(lambda to, number, more: b"\4\0\0\0" + to + struct.pack("<Q", number) + bytes(more),
              st.sampled_from([b"abcd", b"efgh"]), st.integers(0, 9) | st.sampled_from([1024, 2**32 - 1, 2**32]),
              st.sampled_from([0, 16, 32, 33])),
    st.builds(lambda one, at, value: one[:at] + bytes([value]) + one[at + 1:],
              st.sampled_from([RESET, RESET_ANSWER, RESET_HMAC, RESET_CRYPT, IKE, bytes(4) + IKE]),
              st.integers(0, 60), st.integers(0, 255)),
    st.binary(min_size=1, max_size=40),
)


@given(st.lists(DATAGRAMS, min_size=1, max_size=14), st.integers(1, 200))
@settings(max_examples=600, deadline=None)
def test_datagrams_are_the_references(datagrams: list[bytes], snap: int) -> None:
    facts_of([(one, 1) for one in datagrams], protocol=17)
    some, times = frames([(one, 1) for one in datagrams], protocol=17)
    some = [(link, data[:28 + snap], wire) for link, data, wire in some]
    parser = Parser()
    for link, data, wire in some:
        parser.frame(link, exact(data), 0, wire_bytes=wire)
    assert list(parser.take()[1]) == reference.read_frames(some, times)[1]


@given(st.lists(st.tuples(st.sampled_from([6, 17]), st.one_of(PIECES, DATAGRAMS), st.integers(0, 255)), max_size=30))
@settings(max_examples=300, deadline=None)
def test_a_stream_and_datagrams_of_the_same_ends_do_not_meet(mixed: list[tuple[int, bytes, int]]) -> None:
    """The table of streams knows ends, not protocols; whatever comes, nothing is read that is not there."""
    parser = Parser()
    for at, (protocol, data, flags) in enumerate(mixed):
        body = udp(data, (40000, 22)) if protocol == 17 else tcp(data, 5000 + at, flags)
        parser.frame(101, exact(ipv4(body, protocol)), at)
    rows, facts = parser.take()
    assert len(rows) == len(mixed)
    assert all(0 <= fact.row < len(rows) for fact in facts)
