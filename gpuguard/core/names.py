"""Which DNS messages may hold data: nearly all are short host names, and carry nothing that a tunnel could live on."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gpuguard.core.records import DnsMessage

#: A name below this has no room for more than a host name beside its domain.
NAME_BYTES_MIN = 28
#: What answers name, number or delegate hosts (RFC 1035, 2782, 3596, 4034, 9460), or hold a whole zone of them (RFC
#: 1995, 5936); all other types hold free data.
HOST_TYPES = frozenset({1, 2, 6, 12, 28, 33, 43, 46, 48, 64, 65, 251, 252})


def may_carry(fact: DnsMessage) -> bool:
    """Return whether a message has room for data: a long name, or an answer of a type that holds anything."""
    if len(fact.name) >= NAME_BYTES_MIN:
        return True
    return fact.answer_bytes > 0 and fact.query_type not in HOST_TYPES
