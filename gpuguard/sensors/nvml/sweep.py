"""What a round of questions learnt: blocks, and who used what, by pids that have no name yet."""

from __future__ import annotations

import time

from msgspec import Struct, field

from gpuguard.core.records import Block, Gap

NAME = "nvml"
SECOND_NS = 1_000_000_000


class Use(Struct, frozen=True):
    """What one pid used of one device, before the pid has a name."""

    uuid: str
    pid: int
    memory_used_bytes: int | None = None
    sm_ratio: float | None = None
    memory_ratio: float | None = None
    encoder_ratio: float | None = None
    decoder_ratio: float | None = None


class Account(Struct, frozen=True):
    """nvmlAccountingStats_t of one pid, before it has a name."""

    uuid: str
    pid: int
    started_ns: int
    running: bool
    gpu_ratio: float | None
    memory_ratio: float | None
    memory_max_bytes: int | None
    active_ns: int | None


class Sweep(Struct):
    """All that was learnt at ``time_ns``, which is ``began_ns`` of the monotonic clock.

    ``uses`` is None where processes were not asked for.
    """

    time_ns: int
    began_ns: int = field(default_factory=time.monotonic_ns)
    blocks: list[Block] = field(default_factory=list)
    uses: list[Use] | None = None
    accounts: list[Account] = field(default_factory=list)


def gap(time_ns: int, reason: str, *, since_ns: int | None = None, lost: int | None = None) -> Gap:
    """Return a `Gap` of this sensor."""
    return Gap(time_ns=time_ns, sensor=NAME, reason=reason, since_ns=since_ns, lost=lost)
