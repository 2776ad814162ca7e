"""Recordings through the same guard: the events that were, or that another policy would have made of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from gpuguard.config import GuardSettings
from gpuguard.core.guard import Guard
from gpuguard.core.policy import DEFAULT_POLICY, Policy
from gpuguard.core.records import Block, Gap, HostInfo
from gpuguard.core.signatures import SignatureError, parse_signature
from gpuguard.counters.shipped import shipped_model
from gpuguard.recording.codec import RecordingError
from gpuguard.recording.reader import read_recording
from gpuguard.signature_files import shipped_texts

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gpuguard.core.events import Event


def replay(path: str | Path, *, policy: Policy | None = None) -> Iterator[Event]:
    """Yield the events of a recording, see `judged`."""
    for _, events in judged(path, policy=policy):
        yield from events


def judged(path: str | Path, *, policy: Policy | None = None) -> Iterator[tuple[Guard, list[Event]]]:
    """Yield the events of a recording (a file or a directory), block by block, each time with the guard that judged it.

    Judged by the settings and the policy that it was made under, unless ``policy`` is given; each run of a folder that
    holds several by a guard of its own. A recording that is cut or damaged yields everything up to there, and a `Gap`
    that says so. The model of counters is too large to be in it: where ours is another, a `Gap` says that too. Raises
    RecordingError if it is none at all or its settings cannot be used, OSError if it cannot be opened.
    """
    guard: Guard | None = None
    run: HostInfo | None = None
    time_ns = 0
    for block in read_recording(Path(path)):
        if isinstance(block, HostInfo):
            if block == run:
                continue  # each file of a run begins with it
            if guard:
                yield guard, guard.close(time_ns)
            guard, run, time_ns = guard_for(block, policy), block, 0
        guard = guard or guard_for(block, policy)
        time_ns = max(time_ns, block.time_ns)
        yield guard, guard.receive(block)
        if isinstance(block, HostInfo):
            yield guard, _other_model(block, guard)
    if guard:
        yield guard, guard.close(time_ns)


def _other_model(first: HostInfo, guard: Guard) -> list[Event]:
    """Tell the guard, and with it each finding, that counters were judged by another model than they are now."""
    said, here = first.settings.get("counter_model", ""), shipped_model().digest
    if said in ("", here):
        return []
    return guard.receive(Gap(
        time_ns=first.time_ns, sensor="replay",
        reason=f"counters were judged by model {said[:12]} and are by {here[:12]}: what they say may be another"))


def guard_for(first: Block, policy: Policy | None = None) -> Guard:
    """Return a guard with the settings that the first record of a recording names; raises RecordingError."""
    said = first.settings if isinstance(first, HostInfo) else {}
    try:
        settings = msgspec.json.decode(said["guard"], type=GuardSettings) if "guard" in said else GuardSettings()
        made_under = msgspec.json.decode(said["policy"], type=Policy) if "policy" in said else DEFAULT_POLICY
        texts = msgspec.json.decode(said["signatures"], type=dict[str, str]) if "signatures" in said else None
        return Guard(
            policy or made_under,
            mode=settings.mode,
            alarms_per_gpu_year=settings.alarms_per_gpu_year,
            counter_alarms_per_gpu_year=settings.counter_alarms_per_gpu_year,
            counter_model=shipped_model(),
            seed=int(said.get("seed", "0")),
            signatures=tuple(parse_signature(text, stem)
                             for stem, text in sorted((shipped_texts() if texts is None else texts).items())),
        )
    except (msgspec.MsgspecError, SignatureError, ValueError) as error:
        raise RecordingError(f"the settings that it was made under cannot be used: {error}") from error
