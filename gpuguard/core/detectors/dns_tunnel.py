"""Data in DNS: how much one client of a domain has told it in names, and was told by it in answers.

A name that is asked for the first time travels to the domain's own server, so every new name is a message to its owner
(iodine, dnscat2, dns2tcp, exfiltration), and every answer that holds free data is one back (commands in TXT). What
was asked before comes from a cache and carries nothing. So new information is counted for each (client, domain) in
constant memory, as in "information-based heavy hitters": Ozery, Nadler, Shabtai 2024 (NDSS), over windows of a day.
Every domain is treated alike: there is no list of good ones.

Benign look-alikes, and what keeps them out:

- content networks, clouds, telemetry: the same few hundred names again and again, and none long enough to count much;
- block lists and address look-ups (DNSBL, reverse DNS, origin of an address in TXT): an address has 16 bytes at most,
  and what fits into a host name or a line is not counted;
- mail (SPF, DKIM, DMARC): long answers, but few of any one domain;
- antivirus and reputation look-ups: hashes in names by the thousand, answered by an address or a short line. That is
  what exfiltration looks like too: what goes one way only counts an eighth.

Addresses are free data too where IANA has given them to nobody: whoever sends commands in AAAA (Cobalt Strike's dns6)
fills them with what he has, and five in six then lie there. They count by the prefix: a network whose addresses
somebody made up has one or two.

It goes both ways where answers hold more than a line, and where many of the new names are answered by other names (MX,
CNAME asked for by its type: dnscat2), however short. Those who ask for mail exchangers and aliases, mail servers and
the clients of ACME, ask for names that were there before: for few of any one domain, or short ones.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING
from zlib import crc32

from gpuguard.core.bounded import BoundedTable
from gpuguard.core.ends import FlowsByEnds
from gpuguard.core.evidence import Evidence
from gpuguard.core.names import HOST_TYPES
from gpuguard.core.observations import DnsSeen, FlowClosed, FlowOpened, Spoke

if TYPE_CHECKING:
    from gpuguard.core.host import Host
    from gpuguard.core.observations import Observation
    from gpuguard.core.records import Block
    from gpuguard.core.subjects import Subject

DOMAINS_MAX = 4_096
FLOWS_MAX = 16_384
WINDOW_NS = 86_400_000_000_000

#: Bits in which seen names are remembered: names that collide are taken as known, so that the count errs low.
SEEN_BITS = 8_192
#: What of a name or a free-form answer may be a host name, an address or a line about one.
NAME_BYTES_FREE = 16
ANSWER_BYTES_FREE = 64
ONE_WAY_SHARE = 0.125
#: New names that an alias or a mail exchanger answered: how many, what share of all new ones, and by how many bytes
#: those are longer than host names, on average.
NAMED_MIN = 8
NAMED_SHARE_MIN = 0.25
NAMED_BYTES_MIN = 16

# Amounts of new information between a client and a domain have a heavy tail. Taken as Pareto from 512 bytes a day on:
# each doubling makes it 1/e**3 as likely for what is no tunnel. So 2 kB is suspect, 48 kB alone confirms.
BASE_BYTES = 512
DOUBLING_NATS = 3.0
# NULL (experimental, RFC 1035 section 3.3.10) and private use (RFC 6895 section 3.1) are asked for by tunnels alone;
# a person who tries dig(1) asks a few times.
ODD_TYPE_NATS = 6.0
ODD_ASKED_MIN = 8
# No network has dozens of prefixes that nobody has: from so many on, an answer in another one is free data.
NOWHERE_MIN = 16
ADDRESS_BYTES = 16
TOLD_NATS_MIN = 1.0
SUSPECT_BYTES = 2_048

_CNAME, _NULL, _MX, _PRIVATE_FROM, _PRIVATE_TO = 5, 10, 15, 65_280, 65_534
_ESCAPED = re.compile(r"\\(\d{3}|.)")
_SPOTS = ("DNS inside TLS or HTTPS", "zone transfers", "names under arpa", "many domains used in turn",
          "less than 2 kB a day, 16 kB where answers are addresses or short lines",
          "names with 16 bytes or less before the domain", "data in addresses that somebody has",
          "a resolver of this host that asks for others")


class _Domain:
    """What one client exchanged with one domain in this window."""

    __slots__ = ("asked_odd", "down", "last", "named", "names", "nowhere", "seen", "start_ns", "told", "told_bytes",
                 "up")

    def __init__(self, start_ns: int) -> None:
        self.start_ns = start_ns
        #: A bit for each name, answer and prefix of addresses that was seen.
        self.seen = 0
        #: New names, and how many of them an alias or a mail exchanger answered.
        self.names = 0
        self.named = 0
        #: Questions of types that only tunnels ask for; new prefixes that are nobody's.
        self.asked_odd = 0
        self.nowhere = 0
        #: Bytes that new names told, and that answers brought.
        self.up = 0
        self.down = 0
        #: What was told of each subject; another one is told of only when the bytes have doubled, so these are few.
        self.told: dict[Subject, float] = {}
        self.told_bytes = 0.0
        self.last: Subject | None = None


class Detector:
    """Counts new information for each client and domain."""

    takes = (FlowOpened, Spoke, DnsSeen, FlowClosed)

    def __init__(self) -> None:
        self._domains: BoundedTable[tuple[int, str, str], _Domain] = BoundedTable(DOMAINS_MAX)
        self._flows = FlowsByEnds(FLOWS_MAX)

    def evicted(self) -> dict[str, int]:
        """Return how much was forgotten because a table was full, by what it was."""
        return {"domains asked about": self._domains.evicted, "DNS conversations": self._flows.evicted}

    def receive(self, item: Block | Observation, host: Host) -> list[Evidence]:
        """Return what a message adds to its domain's account."""
        match item:
            case FlowOpened() if item.flow.protocol == 17:
                self._flows.know(item.flow)
            case Spoke() if item.what == "dns-over-tcp":
                self._flows.know(item.flow)
            case DnsSeen():
                return self._message(item, host)
            case FlowClosed():
                self._flows.end(item.flow)
            case _:
                pass
        return []

    def _message(self, item: DnsSeen, host: Host) -> list[Evidence]:
        zone, data_bytes = _split(item.name)
        is_local = host.network.is_local
        if not zone or (is_local(item.netns, item.server) and not is_local(item.netns, item.client)):
            return []
        key = (item.netns, item.client, zone)
        domain = self._domains.get(key)
        if domain is None or item.time_ns - domain.start_ns > WINDOW_NS:
            domain = _Domain(item.time_ns)
            self._domains.make_room(lambda one: item.time_ns - one.start_ns > WINDOW_NS)
            self._domains[key] = domain
        if not _count(domain, item, data_bytes):
            return []
        flow = self._flows.find(item.netns, (item.client, item.client_port), (item.server, item.server_port))
        subject = (host.network.owner(flow) or flow) if flow else None
        return self._tell(item, zone, domain, subject) if subject else []

    @staticmethod
    def _tell(item: DnsSeen, zone: str, domain: _Domain, subject: Subject) -> list[Evidence]:
        """Tell what the whole account weighs; a client that asks from ever new ports, at each doubling only."""
        total, nats = _weigh(domain)
        same = subject == domain.last
        change = nats - domain.told.get(subject, 0.0)
        least = BASE_BYTES if domain.nowhere >= NOWHERE_MIN else SUSPECT_BYTES
        if total < least or change < TOLD_NATS_MIN or not (same or total >= 2 * domain.told_bytes):
            return []
        domain.told[subject], domain.told_bytes, domain.last = nats, total, subject
        told = [f"{domain.names} new names told it up to {domain.up} bytes"] if domain.up else []
        told += [f"its answers brought {domain.down} bytes of free data"] if domain.down else []
        told += [f"{domain.named} were answered by other names"] if domain.named and not domain.down else []
        if domain.nowhere >= NOWHERE_MIN:
            told.append(f"{domain.nowhere} prefixes of addresses that it answered are nobody's")
        if domain.asked_odd:
            told.append(f"{domain.asked_odd} questions were of a type that programs have no use for")
        text = f"{zone}, in {(item.time_ns - domain.start_ns) / 1e9:.0f} s: {', '.join(told)}"
        return [Evidence(
            time_ns=item.time_ns,
            subject=subject,
            label="dns-tunnel",
            evidence_class="network",
            kind="new-information-in-dns",
            nats=change,
            text=text,
            start_ns=domain.start_ns,
            carrier="dns",
            blind_spots=_SPOTS,
        )]


def _count(domain: _Domain, item: DnsSeen, data_bytes: int) -> bool:
    """Add what is new in a message; return whether anything was."""
    name = item.name.lower().encode()
    free = item.query_type not in HOST_TYPES
    if not item.is_response:
        odd = item.query_type == _NULL or _PRIVATE_FROM <= item.query_type <= _PRIVATE_TO
        domain.asked_odd += odd
        if not _is_new(domain, crc32(name)):
            return False
        domain.names += 1
        domain.up += max(0, data_bytes - NAME_BYTES_FREE)
        return True
    nowhere = sum(_is_new(domain, crc32(prefix)) for prefix in item.nowhere)
    domain.nowhere += nowhere
    named = item.query_type in (_CNAME, _MX) and item.answer_bytes > 0 and data_bytes > NAME_BYTES_FREE
    if not free or (item.answer_bytes <= ANSWER_BYTES_FREE and not named):
        return nowhere > 0
    # The same answer to the same question is a cached one, or one asked again; another length is another answer.
    if not _is_new(domain, crc32(name, item.answer_bytes + 1)):
        return False
    domain.named += named
    domain.down += max(0, item.answer_bytes - ANSWER_BYTES_FREE)
    return True


def _is_new(domain: _Domain, value: int) -> bool:
    bit = 1 << value % SEEN_BITS
    known = domain.seen & bit
    domain.seen |= bit
    return not known


def _weigh(domain: _Domain) -> tuple[float, float]:
    """Return how many bytes count, and their weight."""
    named = domain.named >= max(NAMED_MIN, NAMED_SHARE_MIN * domain.names)
    nowhere = domain.nowhere >= NOWHERE_MIN
    down = domain.down + (ADDRESS_BYTES * domain.nowhere if nowhere else 0)
    both = domain.down or (named and domain.up >= NAMED_BYTES_MIN * domain.names)
    total = down + domain.up * (1.0 if both else ONE_WAY_SHARE)
    if total <= BASE_BYTES:
        return total, 0.0
    odd = ODD_TYPE_NATS if nowhere or domain.asked_odd >= ODD_ASKED_MIN else 0.0
    return total, DOUBLING_NATS * math.log2(total / BASE_BYTES) + odd


def _split(name: str) -> tuple[str, int]:
    """Return the domain that was registered, as far as labels tell, and how many bytes stand before it.

    Two labels, or three where the second is short under a country's (co.uk): a list of public suffixes would be more
    exact, and would go stale. Names under arpa are addresses and numbers (RFC 3172): "" for them.
    """
    labels = name.rstrip(".").split(".")
    if len(labels) < 3 or labels[-1].lower() == "arpa":
        return "", 0
    keep = 3 if len(labels[-1]) == 2 and len(labels[-2]) <= 3 and len(labels) > 3 else 2
    data = "".join(labels[:-keep])
    return ".".join(labels[-keep:]).lower(), len(_ESCAPED.sub(".", data) if "\\" in data else data)
