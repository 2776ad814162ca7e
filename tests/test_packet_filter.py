"""The kernel's filter: our programs against what a rule means and against what libpcap makes of the same words.

`run` is the classic BPF of Documentation/networking/filter.rst, for the eye. `means` says in Python what a rule is
about. Where tcpdump is to be had, its programs for the same words run in the same machine.
"""

from __future__ import annotations

import ipaddress
import shutil
import struct
import subprocess
from functools import lru_cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuguard.packet_filter import RULES_MAX, Rule, parse, program

SNAP = 2048
TAGS = (0x8100, 0x88A8, 0x9100)
MASK = 0xFFFFFFFF

Steps = list[tuple[int, int, int, int]]


class Beyond(Exception):
    """A load from beyond the packet's end: the kernel then drops the packet."""


def run(steps: Steps, data: bytes, ancillary: dict[int, int]) -> int:
    """Return what the program returns for a packet. Codes are those of linux/bpf_common.h."""

    def load(at: int, size: int) -> int:
        if at >= 0xFFFFF000:
            return ancillary[at - 0xFFFFF000]
        if at + size > len(data):
            raise Beyond
        return int.from_bytes(data[at:at + size], "big")

    def fetch(code: int, k: int) -> int:
        size = {0x00: 4, 0x08: 2, 0x10: 1}[code & 0x18]
        match code & 0xE0:
            case 0x00:
                return k
            case 0x20:
                return load(k, size)
            case 0x40:
                return load(x + k, size)
            case 0x60:
                return words[k]
            case 0x80:
                return len(data)
        return 4 * (load(k, 1) & 15)  # BPF_MSH

    a = x = at = 0
    words: dict[int, int] = {}
    while True:
        code, then, other, k = steps[at]
        at += 1
        by = x if code & 0x08 else k
        match code & 0x07:
            case 0:
                a = fetch(code, k)
            case 1:
                x = fetch(code, k)
            case 2:
                words[k] = a
            case 3:
                words[k] = x
            case 4:
                a = MASK & {0x00: a + by, 0x10: a - by, 0x50: a & by, 0x60: a << (by & 31), 0x70: a >> by}[code & 0xF0]
            case 5 if not code & 0xF0:
                at += k
            case 5:
                holds = {0x10: a == by, 0x20: a > by, 0x30: a >= by, 0x40: bool(a & by)}[code & 0xF0]
                at += then if holds else other
            case 6:
                return a if code & 0x18 == 0x10 else k
            case 7:
                a, x = (x, x) if code & 0x80 else (a, a)


def ours(rules: list[Rule]) -> Steps:
    return list(struct.iter_unpack("=HBBI", program(rules, SNAP)))


def dropped(rules: list[Rule], data: bytes, protocol: int, hardware: int = 1, packet_type: int = 0) -> bool:
    # A load beyond the end would drop what nobody named: it must not come to that.
    passed = run(ours(rules), data, {0: protocol, 4: packet_type, 28: hardware})
    assert passed in (0, SNAP)
    return not passed


def means(rule: Rule, data: bytes, protocol: int) -> bool:
    """Return whether a packet, from its network header on, is of the traffic that the rule names."""
    for _ in range(4):
        if protocol in TAGS and len(data) >= 4:
            protocol, data = int.from_bytes(data[2:4], "big"), data[4:]
    if protocol == 0x0800 and len(data) >= 20 and data[0] >> 4 == 4:
        number, ends, fragment = data[9], (data[12:16], data[16:20]), int.from_bytes(data[6:8], "big") & 0x1FFF
        header = 4 * (data[0] & 15)
        behind = b"" if fragment or header < 20 else data[header:]
    elif protocol == 0x86DD and len(data) >= 40 and data[0] >> 4 == 6:
        number, ends, behind = data[6], (data[8:24], data[24:40]), data[40:]
    else:
        return False
    ports = struct.unpack(">HH", behind[:4]) if len(behind) >= 4 else (-1, -1)
    numbers = {"tcp": (6,), "udp": (17,), "": (6, 17) if rule.ports else range(256)}[rule.protocol]
    return number in numbers and any(
        (not rule.network or ipaddress.ip_address(end) in rule.network)
        and (not rule.ports or rule.ports[0] <= port <= rule.ports[1])
        for end, port in zip(ends, ports, strict=True))


NETS = ("10.8.0.0/16", "10.8.3.4/32", "10.0.0.0/9", "192.168.1.128/25", "fd00::/8", "fd00:1:2:3::/64",
        "fd00:1:2:3:8000::/69", "fd00:1:2:3::4/128")
ADDRESSES_4 = tuple(ipaddress.ip_address(one).packed for one in
                    ("10.8.3.4", "10.8.3.5", "10.9.0.1", "10.128.0.1", "192.168.1.129", "192.168.1.1"))
ADDRESSES_6 = tuple(ipaddress.ip_address(one).packed for one in
                    ("fd00:1:2:3::4", "fd00:1:2:3::5", "fd00:1:2:3:8765::", "fd00:1:2:4::4", "fe80::1"))
PORTS = (22, 2049, 4420, 6800, 7000, 7568, 7569, 65535)

rules_ = st.builds(
    Rule, st.sampled_from([None, *map(ipaddress.ip_network, NETS)]), st.sampled_from(["", "tcp", "udp"]),
    st.sampled_from([None, (2049, 2049), (6800, 7568), (0, 65535), (65535, 65535)])).filter(
        lambda rule: rule.network or rule.ports)


@st.composite
def packets_(draw: st.DrawFn, *, whole: bool = False) -> tuple[bytes, int]:
    """A packet of IP with the fields that rules ask for, cut off anywhere if not whole, and its protocol."""
    number = draw(st.sampled_from([6, 17, 1, 58, 0, 44]))
    behind = struct.pack(">HH", draw(st.sampled_from(PORTS)), draw(st.sampled_from(PORTS))) + bytes(16)
    if draw(st.booleans()):
        protocol = 0x0800
        options = draw(st.integers(0, 10))
        fragment = draw(st.sampled_from([0, 0, 0x4000, 0x2000, 185, 0x2001]))
        data = struct.pack(">BBHHHBBH", 0x45 + options, 0, 20 + 4 * options + len(behind), 7, fragment, 64, number, 0)
        data += draw(st.sampled_from(ADDRESSES_4)) + draw(st.sampled_from(ADDRESSES_4)) + bytes(4 * options) + behind
    else:
        protocol = 0x86DD
        data = struct.pack(">IHBB", 6 << 28, len(behind), number, 64)
        data += draw(st.sampled_from(ADDRESSES_6)) + draw(st.sampled_from(ADDRESSES_6)) + behind
    return (data if whole else data[:draw(st.one_of(st.just(len(data)), st.integers(0, len(data))))]), protocol


def tagged(packet: tuple[bytes, int], tags: list[int]) -> tuple[bytes, int]:
    data, protocol = packet
    for tag in reversed(tags):
        data, protocol = struct.pack(">HH", 0x2005, protocol) + data, tag
    return data, protocol


@settings(max_examples=600, deadline=None)
@given(st.lists(rules_, min_size=1, max_size=4), packets_(), st.lists(st.sampled_from(TAGS), max_size=5))
def test_what_a_rule_names_is_dropped_and_nothing_else(rules: list[Rule], packet: tuple, tags: list[int]) -> None:
    data, protocol = tagged(packet, tags)
    assert dropped(rules, data, protocol) == any(means(rule, data, protocol) for rule in rules)


@settings(max_examples=300, deadline=None)
@given(st.lists(rules_, min_size=1, max_size=3), st.binary(max_size=80),
       st.sampled_from([0x0800, 0x86DD, 0x0806, *TAGS]))
def test_noise_is_passed_unless_it_is_what_a_rule_names(rules: list[Rule], data: bytes, protocol: int) -> None:
    assert dropped(rules, data, protocol) == any(means(rule, data, protocol) for rule in rules)


def pcap_words(rule: Rule) -> str:
    """The same rule for tcpdump: either end has both, the net and the port."""
    low, high = rule.ports or (0, 0)
    ends = []
    for side in ("src", "dst"):
        parts = [f"{side} net {rule.network}"] if rule.network else []
        number = [rule.protocol] if rule.protocol else ["tcp", "udp"] if rule.ports else []
        whats = [f"{one} {side} portrange {low}-{high}" if rule.ports else one for one in number]
        parts += [f"({' or '.join(whats)})"] if whats else []
        ends.append(f"({' and '.join(parts)})")
    return " or ".join(ends)


@lru_cache(maxsize=512)
def tcpdump(link: str, words: str) -> Steps:
    done = subprocess.run(["tcpdump", "-y", link, "-ddd", "--", words], capture_output=True, text=True, check=True)
    steps = [tuple(map(int, line.split())) for line in done.stdout.splitlines()[1:]]
    return [(code & 0xFFFF, then, other, k) for code, then, other, k in steps]


@pytest.mark.skipif(shutil.which("tcpdump") is None, reason="needs tcpdump")
@settings(max_examples=40, deadline=None)
@given(rules_, st.lists(packets_(whole=True), min_size=20, max_size=20), st.integers(0, 2))
def test_libpcap_means_the_same_by_the_same_words(rule: Rule, packets: list, tags: int) -> None:
    words = pcap_words(rule)
    steps = tcpdump("EN10MB", "vlan and " * tags + f"({words})") if tags else tcpdump("RAW", words)
    for packet in packets:
        data, protocol = tagged(packet, [0x8100] * tags)
        frame = bytes(12) + protocol.to_bytes(2, "big") + data if tags else data
        try:
            theirs = bool(run(steps, frame, {}))
        except Beyond:
            theirs = False
        assert dropped([rule], data, protocol) == theirs


@pytest.mark.parametrize("rules", [[], [parse("port 1")]])
def test_of_loopback_the_incoming_half_is_passed(rules: list[Rule]) -> None:
    data = bytes(60)
    assert dropped(rules, data, 0x0806, hardware=772, packet_type=4)
    assert not dropped(rules, data, 0x0806, hardware=772, packet_type=0)
    assert not dropped(rules, data, 0x0806, hardware=1, packet_type=4)


def test_the_largest_program_is_one_that_the_kernel_takes() -> None:
    steps = ours([parse("net fd00:1:2:3:8000::/69 port 1-9"), *[parse("port 2-3")] * (RULES_MAX - 1)])
    assert len(steps) <= 4096  # BPF_MAXINSNS
    jumps = [(at, then, other) for at, (code, then, other, _) in enumerate(steps) if code & 7 == 5]
    assert all(at + 1 + max(then, other) < len(steps) for at, then, other in jumps)
    with pytest.raises(ValueError, match=f"{RULES_MAX + 1} rules; at most {RULES_MAX}"):
        program([parse("port 1")] * (RULES_MAX + 1), SNAP)


@pytest.mark.parametrize(("text", "said"), [
    ("net 10.8.0.0/16 tcp port 2049", "net 10.8.0.0/16 tcp port 2049"),
    ("host fd00::1", "net fd00::1/128"),
    (" udp  port 6800-7568 ", "udp port 6800-7568"),
    ("port 53", "port 53"),
    ("net 10.0.0.0/8 udp", "net 10.0.0.0/8 udp"),
])
def test_rules_are_said_as_they_are_read(text: str, said: str) -> None:
    assert str(parse(text)) == said
    assert parse(said) == parse(text)


@pytest.mark.parametrize(("text", "why"), [
    ("", "is no rule; write as in"),
    ("not port 22", "is no rule; write as in"),
    ("port http", "is no rule; write as in"),
    ("net 10.0.0.0/8tcp", "does not appear to be"),
    ("tcp", "is too much to be blind to; name a net or a port as well"),
    ("net 0.0.0.0/0 port 22", "is too much to be blind to; name a smaller net"),
    ("net 10.8.0.1/16", "has host bits set"),
    ("net example.org", "does not appear to be"),
    ("port 70000", "a port is a number up to 65535"),
    ("port 9-2", "the smaller one first"),
    ("port \u0661", "is no rule"),
])
def test_what_is_no_rule_says_what_to_write(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        parse(text)


@given(st.text(max_size=60))
def test_any_text_is_a_rule_or_an_error(text: str) -> None:
    try:
        rule = parse(text)
    except ValueError:
        return
    assert program([rule], SNAP)
