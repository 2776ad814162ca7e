"""Guessing of SSH passwords: one source opens connection after connection to SSH servers, and none is let in.

A login is seen in the sizes of the encrypted records (`core.ssh`). A connection that came through the key exchange and
ended without one is a failed login. hydra, medusa, ncrack and an agent's own loop all open a new connection for every
few guesses, since servers end it after some (MaxAuthTries, sshd_config(5)).

Benign look-alikes, and what keeps them out:

- monitors that fetch a banner, ssh-keyscan, load balancers: they end before or within the key exchange;
- a cron job or deployment with a stale key: it fails for ever, but minutes apart, and forgetting is faster;
- automation that logs in a hundred times a minute (Ansible, rsync loops, CI): it is let in;
- guessing from outside at this host's own sshd: nothing that this host did; its sshd's log is the place for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gpuguard.core.evidence import Evidence
from gpuguard.core.fusion import SUSPECT_NATS
from gpuguard.core.host import BoundedTable
from gpuguard.core.observations import FlowClosed, FlowUse

if TYPE_CHECKING:
    from gpuguard.core.host import Host
    from gpuguard.core.observations import Observation
    from gpuguard.core.records import Block
    from gpuguard.core.subjects import FlowId, Subject

FLOWS_MAX = 8_192
SOURCES_MAX = 1_024
FORGOTTEN_AFTER_NS = 120_000_000_000

# People mistype, and keys are refused before others are tried: three failures in a row within two minutes are common.
# After that, each failure without any login in between is three times as likely of a guesser, dependence allowed for.
FREE_FAILURES = 3
FAILED_NATS = 1.0
NATS_MAX = 26.0
#: Both KEXINITs and the exchange's own messages are longer than this in every implementation (RFC 4253 section 7.1).
KEY_EXCHANGE_BYTES = 700
#: A session that was never let in is over soon and small; a longer one is a login that the sizes did not show.
GUESS_BYTES_MAX = 8_192

_SPOTS = ("a login within the free attempts of one connection", "less than one guess in two minutes",
          "guesses among many logins that succeed")


class _Source:
    """What one source tried."""

    __slots__ = ("failed", "last", "last_ns", "servers", "start_ns", "told", "told_failed")

    def __init__(self, start_ns: int) -> None:
        self.start_ns = start_ns
        self.last_ns = start_ns
        self.failed = 0
        self.told_failed = 0
        self.told = 0.0
        self.last: Subject | None = None
        self.servers: BoundedTable[str, None] = BoundedTable(SOURCES_MAX)


class Detector:
    """Counts connections that were not let in, for each source."""

    takes = (FlowUse, FlowClosed)

    def __init__(self) -> None:
        self._let_in: BoundedTable[FlowId, None] = BoundedTable(FLOWS_MAX)
        self._sources: BoundedTable[tuple[int, str], _Source] = BoundedTable(SOURCES_MAX)

    def evicted(self) -> dict[str, int]:
        """Return how much was forgotten because a table was full, by what it was."""
        return {"SSH connections that were let in": self._let_in.evicted,
                "sources of SSH logins": self._sources.evicted}

    def receive(self, item: Block | Observation, host: Host) -> list[Evidence]:
        """Return what a connection adds that ended without a login."""
        match item:
            case FlowUse() if item.carrier == "ssh" and item.use != "ssh-login-refused":
                # Whatever else the grammar says of a session, it says after the login; a login ends all suspicion.
                self._let_in[item.flow] = None
                self._sources.pop((item.flow.netns, item.flow.initiator))
            case FlowClosed() if item.carrier == "ssh":
                return self._close(item, host)
            case _:
                pass
        return []

    def _close(self, item: FlowClosed, host: Host) -> list[Evidence]:
        flow = item.flow
        let_in = flow in self._let_in
        self._let_in.pop(flow)
        sizes = (item.payload_bytes_initiator, item.payload_bytes_responder)
        guess = min(sizes) >= KEY_EXCHANGE_BYTES and max(sizes) <= GUESS_BYTES_MAX and item.reason == "closed"
        if let_in or not guess or not flow.initiator_known:
            return []
        if host.is_inbound(flow):
            return []
        key = (flow.netns, flow.initiator)
        source = self._sources.get(key)
        if source is None or item.time_ns - source.last_ns > FORGOTTEN_AFTER_NS:
            source = _Source(flow.start_ns)
            self._sources.make_room(lambda one: item.time_ns - one.last_ns > FORGOTTEN_AFTER_NS)
        self._sources[key] = source
        source.last_ns = max(source.last_ns, item.time_ns)
        source.failed += 1
        source.servers[flow.responder] = None
        return self._tell(item, source, host)

    @staticmethod
    def _tell(item: FlowClosed, source: _Source, host: Host) -> list[Evidence]:
        """Tell of it at each doubling, on the connection at hand or on its process: it stands for all before it."""
        nats = min(NATS_MAX, FAILED_NATS * (source.failed - FREE_FAILURES))
        if nats < SUSPECT_NATS or source.failed < 2 * source.told_failed:
            return []
        subject = host.owner(item.flow) or item.flow
        change = nats - source.told if subject == source.last else nats
        source.told_failed, source.told, source.last = source.failed, nats, subject
        servers = (f"{'at least ' if source.servers.evicted else ''}{len(source.servers)} SSH server"
                   f"{'s' if len(source.servers) > 1 else ''}")
        text = (f"{source.failed} connections to {servers} came through the key exchange within "
                f"{(source.last_ns - source.start_ns) / 1e9:.0f} s, and none was let in")
        return [Evidence(
            time_ns=item.time_ns,
            subject=subject,
            label="ssh-bruteforce",
            evidence_class="network",
            kind="logins-refused",
            nats=change,
            text=text,
            start_ns=source.start_ns,
            carrier="ssh",
            blind_spots=_SPOTS,
        )]
