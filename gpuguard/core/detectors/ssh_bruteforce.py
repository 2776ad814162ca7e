"""Guessing of SSH passwords: one source opens connection after connection to SSH servers, and none is let in.

A login is seen in the sizes of the encrypted records (`core.ssh`). A connection that came through the key exchange and
ended without one is a failed login. hydra, medusa, ncrack and an agent's own loop all open a new connection for every
few guesses, since servers end it after some (MaxAuthTries, sshd_config(5)).

Benign look-alikes, and what keeps them out:

- monitors that fetch a banner, ssh-keyscan, load balancers: they end before or within the key exchange;
- a cron job or deployment with a stale key: it fails for ever, but minutes apart, and forgetting is faster;
- automation that logs in a hundred times a minute (Ansible, rsync loops, CI): it is let in;
- whoever fails once beside a guesser: each process has its own count, where it is known. Those that failed a few times
  only are counted in common as well, for a loop may start one for each guess;
- guessing from outside at this host's own sshd: nothing that this host did; its sshd's log is the place for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gpuguard.core.bounded import BoundedTable
from gpuguard.core.evidence import Evidence
from gpuguard.core.fusion import SUSPECT_NATS
from gpuguard.core.observations import FlowClosed, FlowUse

if TYPE_CHECKING:
    from gpuguard.core.host import Host
    from gpuguard.core.observations import Observation
    from gpuguard.core.records import Block
    from gpuguard.core.subjects import FlowId, ProcessId, Subject

FLOWS_MAX = 8_192
SOURCES_MAX = 1_024
#: Of each source, and of each count: who guesses chooses both, so that tables in tables have to be small.
PROCESSES_MAX, SERVERS_MAX = 64, 32
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


class _Count:
    """What one process tried, or those together that tried a few times each."""

    __slots__ = ("failed", "last_ns", "servers", "start_ns", "told_failed")

    def __init__(self, start_ns: int) -> None:
        self.start_ns = start_ns
        self.last_ns = start_ns
        self.failed = 0
        self.told_failed = 0
        self.servers: BoundedTable[str, None] = BoundedTable(SERVERS_MAX)


class _Source:
    """What was tried from one address, and what was told of it; None is for all that failed rarely, or are not known.

    What is forgotten of a process that failed rarely is counted there.
    """

    def __init__(self) -> None:
        self.last_ns = 0
        self.counts: BoundedTable[ProcessId | None, _Count] = BoundedTable(PROCESSES_MAX)
        self.told: BoundedTable[Subject, float] = BoundedTable(PROCESSES_MAX)

    def fail(self, item: FlowClosed, process: ProcessId | None) -> _Count:
        """Count a failure; return the count that it belongs to."""
        count = self.counts.get(process)
        if count is None or item.time_ns - count.last_ns > FORGOTTEN_AFTER_NS:
            count = _Count(item.flow.start_ns)
            if process:
                self.told.pop(process)
        self.counts[process] = count
        self.last_ns = count.last_ns = max(count.last_ns, item.time_ns)
        count.failed += 1
        count.servers[item.flow.responder] = None
        return count if process is None or count.failed > FREE_FAILURES else self.fail(item, None)


class Detector:
    """Counts connections that were not let in, for each process and source."""

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
                # Whatever else the grammar says of a session, it says after the login.
                self._let_in[item.flow] = None
                self._clear(item.flow, host)
            case FlowClosed() if item.carrier == "ssh":
                return self._close(item, host)
            case _:
                pass
        return []

    def _clear(self, flow: FlowId, host: Host) -> None:
        """A login ends all suspicion of its process; where that is not known, of all behind its address."""
        key = (flow.netns, flow.initiator)
        source = self._sources.get(key)
        process = host.network.owner(flow) if source else None
        if source and process:
            source.counts.pop(process)
            source.counts.pop(None)
            source.told.pop(process)
        else:
            self._sources.pop(key)

    def _close(self, item: FlowClosed, host: Host) -> list[Evidence]:
        flow = item.flow
        let_in = flow in self._let_in
        self._let_in.pop(flow)
        sizes = (item.payload_bytes_initiator, item.payload_bytes_responder)
        guess = min(sizes) >= KEY_EXCHANGE_BYTES and max(sizes) <= GUESS_BYTES_MAX and item.reason == "closed"
        if let_in or not guess or not flow.initiator_known:
            return []
        if host.network.is_inbound(flow):
            return []
        key = (flow.netns, flow.initiator)
        source = self._sources.get(key)
        if source is None or item.time_ns - source.last_ns > FORGOTTEN_AFTER_NS:
            source = _Source()
            self._sources.make_room(lambda one: item.time_ns - one.last_ns > FORGOTTEN_AFTER_NS)
        self._sources[key] = source
        process = host.network.owner(flow)
        return self._tell(item, source, source.fail(item, process), process)

    @staticmethod
    def _tell(item: FlowClosed, source: _Source, count: _Count, process: ProcessId | None) -> list[Evidence]:
        """Tell of a count at each doubling, on its process; without one, what is at hand stands for all before."""
        nats = min(NATS_MAX, FAILED_NATS * (count.failed - FREE_FAILURES))
        if nats < SUSPECT_NATS or count.failed < 2 * count.told_failed:
            return []
        subject = process or item.flow
        told = source.told.get(subject) or 0.0
        count.told_failed, source.told[subject] = count.failed, max(told, nats)
        servers = f"{count.servers.counted()} SSH server{'s' if len(count.servers) > 1 else ''}"
        several = " of processes that tried a few times each," if process and count is source.counts.get(None) else ""
        text = (f"{count.failed} connections to {servers},{several} came through the key exchange within "
                f"{(count.last_ns - count.start_ns) / 1e9:.0f} s, and none was let in")
        return [Evidence(
            time_ns=item.time_ns,
            subject=subject,
            label="ssh-bruteforce",
            evidence_class="network",
            kind="logins-refused",
            nats=max(0.0, nats - told),
            text=text,
            start_ns=count.start_ns,
            carrier="ssh",
            blind_spots=_SPOTS,
        )]
