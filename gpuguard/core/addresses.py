"""Addresses as they lie in rows, 16 bytes each, and as text: RFC 5952, and dotted where they are IPv4."""

from __future__ import annotations

import ipaddress
from functools import lru_cache


@lru_cache(maxsize=16_384)
def address_text(address: bytes) -> str:
    """Return 16 bytes as text: IPv4 in dotted form where mapped (RFC 4291 section 2.5.5.2), IPv6 as RFC 5952 has it."""
    if address[:12] == b"\0" * 10 + b"\xff\xff":
        return f"{address[12]}.{address[13]}.{address[14]}.{address[15]}"  # a tenth of what ipaddress takes
    return str(ipaddress.IPv6Address(address))


@lru_cache(maxsize=16_384)
def address_bytes(address: str) -> bytes:
    """Return the 16 bytes of an address, IPv4 mapped."""
    parts = address.split(".")
    if len(parts) == 4 and ":" not in address:
        return b"\0" * 10 + b"\xff\xff" + bytes(map(int, parts))  # a third of what ipaddress takes
    one = ipaddress.ip_address(address)
    return one.packed if one.version == 6 else b"\0" * 10 + b"\xff\xff" + one.packed


def is_nowhere(address: bytes) -> bool:
    """Return whether IANA has given 16 bytes of address to nothing ("Internet Protocol Version 6 Address Space").

    What it has is below 0400::/6 (mapped and translated IPv4; Yggdrasil's), global unicast, SRv6, local and multicast.
    """
    return not (address[0] < 0x04 or 0x20 <= address[0] < 0x40 or address[0] == 0x5F or address[0] >= 0xFC)
