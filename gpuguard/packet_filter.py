"""What the kernel passes on to the packet ring: a classic BPF program, made here from the operator's rules.

A rule names traffic that is not to be looked at, in words of pcap-filter(7): ``net 10.8.0.0/16 tcp port 2049``. Each
part may be left out, but not both net and port; ``host`` is a net of one, ports may be a range (``6800-7568``). It
holds for a packet one of whose ends has this address and this port, whichever way it goes.

In doubt a packet is passed: of fragments only the first has ports, which an IPv6 packet has only where they follow its
fixed header; what is too short to have the fields that a rule asks for, is not what the rule means. Tags of VLANs that
the card has left in the frame are passed over as the parser does it.

The machine (Documentation/networking/filter.rst; McCanne and Jacobson 1993) has an accumulator, an index register and
16 words, and jumps forwards only. A load beyond the packet's end would drop it: so every one is preceded by a look at
the length. The fields are loaded once, into the words; each rule then compares what lies there.
"""

from __future__ import annotations

import ipaddress
import re
import struct
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

RULES_MAX = 32

# linux/filter.h, linux/bpf_common.h: the instructions used here; those with X add the index register to the place.
_LD, _LDH, _LD_LEN, _LD_MEM, _LD_X, _LDH_X, _LDB_X = 0x00, 0x28, 0x80, 0x60, 0x40, 0x48, 0x50
_LDX, _ST, _TAX, _TXA, _RET = 0x01, 0x02, 0x07, 0x87, 0x06
_ADD, _ADD_X, _SUB_X, _LSH, _AND = 0x04, 0x0C, 0x1C, 0x64, 0x54
_JA, _JEQ, _JGT, _JGE, _JGE_X, _JSET = 0x05, 0x15, 0x25, 0x35, 0x3D, 0x45
_PROTOCOL, _PACKET_TYPE, _HARDWARE_TYPE = 0xFFFFF000, 0xFFFFF000 + 4, 0xFFFFF000 + 28

_ARPHRD_LOOPBACK, _PACKET_OUTGOING = 772, 4
_IPV4, _IPV6, _TAGS, _TAGS_MAX = 0x0800, 0x86DD, (0x8100, 0x88A8, 0x9100), 4
_NUMBERS = {"tcp": 6, "udp": 17}

# What lies in the machine's words: the protocol's number, the ports, the addresses (one word each, or four).
_NUMBER, _PORTS, _ADDRESSES = 0, 1, 3
_NO_PORT = 0x10000

#: The program that passes no packet at all.
NOTHING = struct.pack("=HBBI", _RET, 0, 0, 0)


class Rule(NamedTuple):
    """Traffic that is not to be looked at."""

    network: ipaddress.IPv4Network | ipaddress.IPv6Network | None
    protocol: str
    ports: tuple[int, int] | None

    def __str__(self) -> str:
        parts = [f"net {self.network}" if self.network else "", self.protocol]
        if self.ports:
            low, high = self.ports
            parts.append(f"port {low}" if low == high else f"port {low}-{high}")
        return " ".join(part for part in parts if part)


_RULE = re.compile(r"(?:(?:net|host) (\S+))? ?(tcp|udp)? ?(?:port (\d{1,5})(?:-(\d{1,5}))?)?", re.ASCII)


def parse(text: str) -> Rule:
    """Return the rule that ``text`` says; `ValueError` says what to write instead."""
    found = _RULE.fullmatch(" ".join(text.split()))
    if not found or not found[0]:
        raise ValueError(f"{text!r} is no rule; write as in 'net 10.8.0.0/16 tcp port 2049', or a part of it")
    network, protocol, low, high = found.groups()
    if not network and not low:
        raise ValueError(f"{text!r} is too much to be blind to; name a net or a port as well")
    try:
        net = ipaddress.ip_network(network) if network else None
    except ValueError as error:
        raise ValueError(f"{text!r}: {error}") from error
    if net and not net.prefixlen:
        raise ValueError(f"{text!r} is too much to be blind to; name a smaller net")
    ports = (int(low), int(high or low)) if low else None
    if ports and not ports[0] <= ports[1] <= 0xFFFF:
        raise ValueError(f"{text!r}: a port is a number up to 65535, a range has the smaller one first")
    return Rule(net, protocol or "", ports)


def program(rules: Sequence[Rule], snap_bytes: int) -> bytes:
    """Return the array of struct sock_filter that passes ``snap_bytes`` of each packet that is to be looked at.

    It is for sockets of type SOCK_DGRAM: packets begin with their network header. On loopback each passes twice, and
    the outgoing one is dropped.
    """
    if len(rules) > RULES_MAX:
        raise ValueError(f"{len(rules)} rules; at most {RULES_MAX}")
    made = _Program(snap_bytes)
    made.add(_LDH, _HARDWARE_TYPE)
    made.add(_JEQ, _ARPHRD_LOOPBACK, other="not loopback")
    made.add(_LDH, _PACKET_TYPE)
    made.add(_JEQ, _PACKET_OUTGOING, other="not loopback")
    made.add(_RET, 0)
    made.label("not loopback")
    if rules:
        made.find_network_header()
        made.judge(rules, 4)
        made.judge(rules, 6)
    else:
        made.add(_RET, snap_bytes)
    return made.assembled()


class _Program:
    """Steps, whose jumps lead to names that are given to later places."""

    def __init__(self, snap_bytes: int) -> None:
        self._snap_bytes = snap_bytes
        self._steps: list[tuple[int, int, str, str]] = []
        self._places: dict[str, int] = {}

    def add(self, code: int, k: int = 0, then: str = "", other: str = "") -> None:
        """Add one step. A jump goes on with the next one where nothing else is named."""
        self._steps.append((code, k, then, other))

    def label(self, name: str) -> None:
        self._places[name] = len(self._steps)

    def assembled(self) -> bytes:
        def to(name: str, at: int) -> int:
            return self._places[name] - at - 1 if name else 0

        return b"".join(
            struct.pack("=HBBI", code, 0, 0, to(then, at)) if code == _JA
            else struct.pack("=HBBI", code, to(then, at), to(other, at), k)
            for at, (code, k, then, other) in enumerate(self._steps))

    def find_network_header(self) -> None:
        """Have the index register say where the IP header begins, and go on by its version."""
        self.add(_LDX, 0)
        self.add(_LDH, _PROTOCOL)
        for tag in range(_TAGS_MAX):
            for kind in _TAGS[:-1]:
                self.add(_JEQ, kind, then=f"tag {tag}")
            self.add(_JEQ, _TAGS[-1], other="no tag")
            self.label(f"tag {tag}")
            self._require(4, "passed")
            self.add(_LDH_X, 2)
            self.add(_ST, 0)
            self.add(_TXA)
            self.add(_ADD, 4)
            self.add(_TAX)
            self.add(_LD_MEM, 0)
        self.label("no tag")
        self.add(_JEQ, _IPV4, then="IPv4")
        self.add(_JEQ, _IPV6, other="passed")
        self.add(_JA, then="IPv6")
        self.label("passed")
        self.add(_RET, self._snap_bytes)

    def judge(self, rules: Sequence[Rule], version: int) -> None:
        """Load the fields of a packet of this version, and drop it if a rule names it."""
        self.label(f"IPv{version}")
        self._require(20 if version == 4 else 40, f"passed {version}")
        self.add(_LDB_X, 0)
        self.add(_AND, 0xF0)
        self.add(_JEQ, version << 4, then=f"fields {version}")
        self.label(f"passed {version}")
        self.add(_RET, self._snap_bytes)
        self.label(f"fields {version}")
        self.add(_LD, _NO_PORT)
        for side in (0, 1):
            self.add(_ST, _PORTS + side)
        if version == 4:
            self._load_4()
        else:
            self._load_6()
        self.label(f"rules {version}")
        for number, rule in enumerate(rules):
            if not rule.network or rule.network.version == version:
                self._rule(rule, f"rule {version}.{number}", 1 if version == 4 else 4)
        self.add(_RET, self._snap_bytes)

    def _load_4(self) -> None:
        """RFC 791 section 3.1. Ports are in the first fragment only, behind a header of a length of its own."""
        self._keep(_LDB_X, 9, _NUMBER)
        for side in (0, 1):
            self._keep(_LD_X, 12 + 4 * side, _ADDRESSES + side)
        self.add(_LDH_X, 6)
        self.add(_JSET, 0x1FFF, then="rules 4")
        self.add(_LDB_X, 0)
        self.add(_AND, 0x0F)
        self.add(_LSH, 2)
        self.add(_JGE, 20, other="rules 4")
        self.add(_ADD_X)
        self.add(_TAX)
        self.add(_LD_LEN)
        self.add(_JGE_X, other="rules 4")
        self._require(4, "rules 4")
        for side in (0, 1):
            self._keep(_LDH_X, 2 * side, _PORTS + side)

    def _load_6(self) -> None:
        """RFC 8200 section 3."""
        self._keep(_LDB_X, 6, _NUMBER)
        for word in range(8):
            self._keep(_LD_X, 8 + 4 * word, _ADDRESSES + word)
        self._require(44, "rules 6")
        for side in (0, 1):
            self._keep(_LDH_X, 40 + 2 * side, _PORTS + side)

    def _keep(self, load: int, k: int, word: int) -> None:
        self.add(load, k)
        self.add(_ST, word)

    def _require(self, length: int, other: str) -> None:
        """Go elsewhere if fewer bytes than ``length`` follow the index register, which is within the packet."""
        self.add(_LD_LEN)
        self.add(_SUB_X)
        self.add(_JGE, length, other=other)

    def _rule(self, rule: Rule, name: str, words: int) -> None:
        """Drop the packet if either end has the address and the port of the rule."""
        if rule.protocol or rule.ports:
            self.add(_LD_MEM, _NUMBER)
            if not rule.protocol:
                self.add(_JEQ, _NUMBERS["tcp"], then=name)
            self.add(_JEQ, _NUMBERS[rule.protocol or "udp"], other=f"{name} over")
        self.label(name)
        for side, other in enumerate((f"{name} other end", f"{name} over")):
            if rule.network:
                self._compare(rule.network, _ADDRESSES + words * side, other)
            if rule.ports:
                self.add(_LD_MEM, _PORTS + side)
                self.add(_JGE, rule.ports[0], other=other)
                self.add(_JGT, rule.ports[1], then=other)
            self.add(_RET, 0)
            self.label(other)

    def _compare(self, network: ipaddress.IPv4Network | ipaddress.IPv6Network, word: int, other: str) -> None:
        pairs = zip(*(struct.iter_unpack(">I", one.packed) for one in (network.network_address, network.netmask)),
                    strict=True)
        for at, ((wanted,), (mask,)) in enumerate(pairs):
            if mask:
                self.add(_LD_MEM, word + at)
                self.add(_AND, mask)
                self.add(_JEQ, wanted, other=other)
