"""What OpenSSH's server tells of its host keys after the login, and what a client asks and is answered about them.

hostkeys-00@openssh.com comes unasked and wants no answer; a client that does not know the keys may ask for a signature
by each, hostkeys-prove-00@openssh.com (OpenSSH's PROTOCOL, section 2.5). The algorithms in the server's KEXINIT say
which kinds of keys there are, so that all three are known in length but for RSA's, which has three usual ones.
Keys and signatures are written as in RFC 4253 section 6.6, RFC 5656 section 3.1 and RFC 8709.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, NamedTuple

from gpuguard.core.ssh.suites import record_bytes

if TYPE_CHECKING:
    from gpuguard.core.ssh.suites import Suite

_ANNOUNCED = 29  # type, name, want_reply
_PROVE = 35
# What tells of a single key, or asks for its proof, may be anything else as well.
_TOLD_MIN = 140
_ECDSA = "ecdsa-sha2-nistp"
# Curve: its key, and its shortest and longest signature, whose two integers may have a zero before them or bytes less.
_CURVES = {"256": (104, 97, 101), "384": (136, 129, 133), "521": (172, 161, 167)}
_RSA = tuple((bits // 8 + 23, bits // 8 + 20, bits // 8 + 20) for bits in (2_048, 3_072, 4_096))


class HostKeys(NamedTuple):
    """The lengths of the messages about one set of keys: those told, those asked about, and the answers."""

    announced: int
    prove: int
    proofs: range


def host_keys(algorithms: tuple[str, ...]) -> list[HostKeys]:
    """Return what a server with these host key algorithms may say of its keys, one for each length of an RSA key."""
    fixed: list[tuple[tuple[int, int, int], ...]] = []
    if "ssh-ed25519" in algorithms:
        fixed.append(((51, 83, 83),))
    fixed += [(_CURVES[curve],) for curve in _CURVES if _ECDSA + curve in algorithms]
    if {"rsa-sha2-512", "rsa-sha2-256", "ssh-rsa"} & set(algorithms):
        fixed.append(_RSA)
    if not fixed:
        return []
    found = []
    for keys in itertools.product(*fixed):
        blobs = sum(4 + key for key, _, _ in keys)
        shortest, longest = (1 + sum(4 + one[place] for one in keys) for place in (1, 2))
        found.append(HostKeys(_ANNOUNCED + blobs, _PROVE + blobs, range(shortest, longest + 1)))
    return found


class KeyRecords(NamedTuple):
    """What the records about the host keys cost: those told, and the proofs by what asks for them."""

    announced: frozenset[int]
    proofs: dict[int, frozenset[int]]


def key_records(client: Suite, server: Suite, algorithms: tuple[str, ...]) -> KeyRecords:
    """Return what may be said about the keys of a server with these algorithms, in the two suites of a session."""
    known = host_keys(algorithms) if not client.compressed and not server.compressed else []
    keys = [one for one in known if one.announced > _TOLD_MIN]
    return KeyRecords(frozenset(record_bytes(server, one.announced) for one in keys),
                      {record_bytes(client, one.prove): frozenset(record_bytes(server, size) for size in one.proofs)
                       for one in keys})
