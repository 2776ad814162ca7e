"""What a DNS answer says of its question: addresses, aliases and their time to live, against the reference."""

from __future__ import annotations

import ipaddress
import struct
import sys
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from gpuguard._packets import Parser
from gpuguard.core.addresses import address_bytes
from gpuguard.core.records import DnsMessage

sys.path.insert(0, str(Path(__file__).parent))
import reference_packets

RAW = 101
QUESTION = 12  # where the name of the question stands


def name(text):
    return b"".join(bytes([len(label)]) + label.encode() for label in text.split(".") if label) + b"\0"


def pointer(at):
    return struct.pack(">H", 0xC000 | at)


def record(owner, kind, data, *, ttl=300, of_class=1):
    return owner + struct.pack(">HHIH", kind, of_class, ttl, len(data)) + data


def a(address, owner=None, **more):
    packed = ipaddress.ip_address(address).packed
    return record(pointer(QUESTION) if owner is None else owner, 1 if len(packed) == 4 else 28, packed, **more)


def answer(question, *records, kind=1):
    head = struct.pack(">HHHHHH", 7, 0x8180, 1, len(records), 0, 0)
    return head + name(question) + struct.pack(">HH", kind, 1) + b"".join(records)


def datagram(payload, port=53):
    udp = struct.pack(">HHHH", port, 40_000, 8 + len(payload), 0) + payload
    return struct.pack(">BBHHHBBH4s4s", 0x45, 0, 20 + len(udp), 0, 0, 64, 17, 0, b"\x0a\0\0\x35", b"\x0a\0\0\2") + udp


def read(payload, *, brief=False):
    parser = Parser(brief=brief)
    parser.frame(RAW, datagram(payload), 1)
    (fact,) = parser.take()[1] or (None,)
    return fact


def said(fact):
    return [str(ipaddress.ip_address(one).ipv4_mapped or ipaddress.ip_address(one)) for one in fact.addresses]


def test_the_addresses_of_a_question():
    fact = read(answer("Repo.Example", a("192.0.2.7", ttl=60), a("2001:db8::7", ttl=30)))
    both = (address_bytes("192.0.2.7"), address_bytes("2001:db8::7"))
    assert fact == DnsMessage(0, True, "Repo.Example", 1, 20, both, (), 30)


def test_aliases_lead_to_addresses_and_strangers_do_not():
    message = answer(
        "repo.example",
        record(pointer(QUESTION), 5, name("Edge.CDN.example"), ttl=900),
        a("192.0.2.1", name("edge.cdn.example")),
        a("192.0.2.2", name("bank.example")),
        a("192.0.2.3", name("REPO.example")),
        a("192.0.2.4", of_class=3),
    )
    fact = read(message)
    assert said(fact) == ["192.0.2.1", "192.0.2.3"]
    assert (fact.aliases, fact.ttl_s) == (("edge.cdn.example",), 300)


def test_an_answer_is_read_no_further_than_it_is_bounded():
    many = read(answer("repo.example", *(a(f"192.0.2.{last}") for last in range(40))))
    assert len(many.addresses) == 16
    strangers = [a("192.0.2.1", name("bank.example"))] * 64
    assert read(answer("repo.example", *strangers, a("192.0.2.9"))).addresses == ()
    chain = [record(name(f"n{i}.example"), 5, name(f"n{i + 1}.example")) for i in range(9)]
    deep = read(answer("n0.example", *chain, a("192.0.2.9", name("n9.example"))))
    assert (len(deep.aliases), deep.addresses) == (4, ())


def test_a_pointer_that_leads_to_itself_ends():
    message = answer("repo.example", a("192.0.2.1"))
    at = message.rindex(pointer(QUESTION))
    for target in (at, at + 1, 0x3FFF, 0):
        looped = message[:at] + pointer(target) + message[at + 2:]
        assert read(looped).addresses == ()


def test_a_time_to_live_with_its_highest_bit_is_zero():
    assert read(answer("repo.example", a("192.0.2.1", ttl=0x80000000))).ttl_s == 0


def test_brief_facts_say_nothing_of_answers():
    assert read(answer("repo.example", a("192.0.2.1")), brief=True) is None
    odd = read(answer("a-name-that-may-carry-some-data.example", a("192.0.2.1")), brief=True)
    assert (odd.addresses, odd.ttl_s) == ((), 0)


NAMES = ["a.example", "b.a.example", "EDGE.cdn.test", "x.test", ""]
owners = st.sampled_from(NAMES).map(name) | st.integers(0, 80).map(pointer) | st.binary(max_size=4)
records = st.builds(
    record, owners, st.sampled_from([1, 5, 28, 16]),
    st.binary(min_size=4, max_size=4) | st.binary(min_size=16, max_size=16) | owners,
    ttl=st.sampled_from([0, 60, 300, 2**31, 2**32 - 1]), of_class=st.sampled_from([1, 0x8001, 3]),
)


@settings(max_examples=500, deadline=None, derandomize=True)
@given(st.sampled_from(NAMES[:4]), st.lists(records, max_size=24), st.integers(0, 40), st.data())
def test_parity_with_the_reference(question, some, cut, data):
    message = bytearray(answer(question, *some))
    for _ in range(data.draw(st.integers(0, 3))):
        message[data.draw(st.integers(12, len(message) - 1))] = data.draw(st.integers(0, 255))
    payload = bytes(message[:max(17, len(message) - cut)])
    assert read(payload) == reference_packets.dns(payload, len(payload), (53, 40_000), 0)
