"""Recorded counters, judged as the guard would have judged them live; told by device and episode.

An episode is a stretch of looks of one kind. One look is mostly not certain, and kinds flicker where a job is between
two: so a look is named together with those around it, by the product of what they are like, then goes by the commonest
kind around it, and an episode of less than `EPISODE_LOOKS` belongs to the one before.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from typing import TYPE_CHECKING

from msgspec import Struct
from msgspec.structs import replace

from gpuguard.core.counter_classes import MINING, PRIORS, Model
from gpuguard.core.detectors.counters import Detector, Look
from gpuguard.core.evidence import Evidence
from gpuguard.core.fusion import Fusion, probability
from gpuguard.core.host import Host
from gpuguard.core.labels import LABELS, VERDICTS, Verdict
from gpuguard.core.records import Device, DeviceSample, Gap
from gpuguard.core.subjects import DeviceId

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

SECOND_NS = 1_000_000_000
EPISODE_LOOKS = AROUND_LOOKS = 3
LOOKS_MAX = 2_000_000
CERTAIN = 0.5
#: Looks of one job resemble each other: single ones vary 2.3 times as much as jobs do (`counter_jobs.SHRINK`), so n of
#: them are worth n / (1 + (n - 1) / 3.3) that do not.
ALIKE = 1 / 3.3
#: No look rules a kind out.
LIKENESS_LEAST = 1e-4


class Step(Struct, frozen=True):
    """One look, its kind, what it is like by `PRIORS` (nothing where it was not at work), and how the device stood."""

    look: Look
    kind: str
    like: tuple[float, ...]
    verdict: Verdict
    label: str
    nats: float


class Episode(Struct):
    """One line: what a device did for a while. ``kind`` is mining, training, inference, compute, idle or unknown."""

    device: str
    gpu_model: str
    episode: int
    start_s: float
    end_s: float
    looks: int
    kind: str
    family: str
    share: float
    verdict: Verdict
    label: str
    probability: float
    evidence: list[dict[str, object]]


class Judged(Struct):
    """What became of a recording: episodes in order, evidence by device, when each became suspect, and its gaps."""

    episodes: list[Episode]
    evidence: dict[str, list[Evidence]]
    suspect_after_s: dict[str, float]
    looks: int
    gaps: list[str]


def judge(blocks: Iterable[Device | DeviceSample], model: Model, alarms_per_gpu_year: float) -> Judged:
    """Run the detector and the fusion layer over samples in order of time."""
    detector, fusion, host = Detector(), Fusion(alarms_per_gpu_year), Host()
    detector.judge_by(model, alarms_per_gpu_year)
    steps: dict[str, list[Step]] = {}
    models: dict[str, str] = {}
    first_ns: dict[str, int] = {}
    found = Judged([], {}, {}, 0, [])
    for block in blocks:
        host.receive(block)
        if isinstance(block, Device):
            models[block.uuid], first_ns[block.uuid] = block.name, block.time_ns
        before = detector.looks.get(block.uuid)
        for one in detector.receive(block, host):
            if isinstance(one, Gap):
                found.gaps.append(one.reason)
                continue
            standing, _ = fusion.receive(one)
            if not one.nats:
                continue  # words anew, of which here only the weighed ones are kept
            found.evidence.setdefault(block.uuid, []).append(one)
            if standing.verdict == "suspect":
                found.suspect_after_s.setdefault(block.uuid, (one.time_ns - first_ns[block.uuid]) / SECOND_NS)
        look = detector.looks.get(block.uuid)
        if look is not before and look is not None and found.looks < LOOKS_MAX:
            found.looks += 1
            steps.setdefault(block.uuid, []).append(_step(look, fusion, DeviceId(block.uuid), model))
    for uuid, first in first_ns.items():
        found.episodes += _episodes(uuid, models[uuid], first, steps.get(uuid, []), model,
                                    found.evidence.get(uuid, []))
    return found


def _step(look: Look, fusion: Fusion, subject: DeviceId, model: Model) -> Step:
    best = fusion.best(subject)
    kind = "idle" if look.tells("sm", "gpu") and not look.at_odds else "unknown"
    sums = dict.fromkeys(PRIORS, 0.0)
    for name, share in zip(model.classes, look.probabilities, strict=True):
        sums[name.partition(":")[0]] += share
    like = tuple(sums.values()) if look.at_work else ()
    if best is None:
        return Step(look, kind, like, "unknown", "", 0.0)
    return Step(look, kind, like, best.verdict, best.label, best.nats)


def _named(steps: Sequence[Step], allowance: float) -> list[Step]:
    """Return the same looks, those at work named together with those around them."""
    return [replace(step, kind=_kind([one for one in _around(steps, i) if one.like], allowance)) if step.like else step
            for i, step in enumerate(steps)]


def _around(steps: Sequence[Step], i: int) -> Sequence[Step]:
    return steps[max(0, i - AROUND_LOOKS):i + AROUND_LOOKS + 1]


def _kind(steps: Sequence[Step], allowance: float) -> str:
    """Return what looks at one job are of: whether it mines first, then which honest kind of those."""
    count = len(steps) / (1 + (len(steps) - 1) * ALIKE)
    odds = {}
    for kind, prior, *likes in zip(PRIORS, PRIORS.values(), *(step.like for step in steps), strict=True):
        nats = statistics.fmean(math.log(max(like, LIKENESS_LEAST) / prior) for like in likes)
        odds[kind] = prior * math.exp(count * nats)
    mines, rest = odds.pop("mining"), sum(odds.values())
    if mines >= rest:
        # What weighs no more than the allowance cannot be told from honest programs: it is no accusation.
        return "mining" if statistics.median(step.look.nats for step in steps) > allowance else "unknown"
    best = max(odds, key=odds.__getitem__)
    return best if odds[best] >= CERTAIN * rest else "unknown"


def _episodes(
    uuid: str, gpu_model: str, first_ns: int, steps: Sequence[Step], model: Model, evidence: Sequence[Evidence],
) -> list[Episode]:
    """Return what one device did, one after the other."""
    if not steps:
        return [Episode(uuid, gpu_model, 0, 0.0, 0.0, 0, "unknown", "", 0.0, "unknown", "", 0.0, [])]
    steps = _named(steps, model.allowance)
    kinds = [Counter(one.kind for one in _around(steps, i)).most_common(1)[0][0] for i in range(len(steps))]
    cuts = [0]
    for i in range(1, len(steps)):
        if kinds[i] != kinds[i - 1] and i - cuts[-1] >= EPISODE_LOOKS:
            cuts.append(i)
    bounds = zip(cuts, [*cuts[1:], len(steps)], strict=True)
    return [_episode(uuid, gpu_model, number, first_ns, steps[begin:end], model, evidence)
            for number, (begin, end) in enumerate(bounds)]


def _episode(
    uuid: str, gpu_model: str, number: int, first_ns: int, steps: Sequence[Step], model: Model,
    evidence: Sequence[Evidence],
) -> Episode:
    kind, count = Counter(one.kind for one in steps).most_common(1)[0]
    kind = kind if count > CERTAIN * len(steps) else "unknown"
    families: Counter[str] = Counter()
    for step in steps:
        for name, share in zip(model.classes, step.look.probabilities, strict=True):
            if name.startswith(MINING):
                families[name.removeprefix(MINING)] += share  # type: ignore[assignment]
    family, share = families.most_common(1)[0]
    worst = max(steps, key=lambda one: (_accused(one), one.nats))
    verdict, label = worst.verdict, worst.label
    certainty = probability(worst.nats) if label == "mining" else 0.0
    if not _accused(worst):
        verdict, label = ("clear", kind) if kind == "idle" or (verdict, label) == ("clear", kind) else ("unknown", kind)
        # Of honest work it is what a look has on the mean; that it mines, which nothing bears out yet, is not.
        if kind != "mining":
            certainty = _likeness(kind, steps)
    start_ns, end_ns = steps[0].look.start_ns, steps[-1].look.end_ns
    shown = [one for one in evidence if start_ns <= one.time_ns <= end_ns][-8:]
    return Episode(
        device=uuid, gpu_model=gpu_model, episode=number, start_s=(start_ns - first_ns) / SECOND_NS,
        end_s=(end_ns - first_ns) / SECOND_NS, looks=len(steps), kind=kind,
        family=family if kind == "mining" and share > CERTAIN * count else "", share=round(count / len(steps), 4),
        verdict=verdict, label="" if label == "unknown" else label, probability=round(certainty, 6),
        evidence=[told(one) for one in shown])


def _likeness(kind: str, steps: Sequence[Step]) -> float:
    """Return what a look of this kind has of it, on the mean."""
    if kind not in PRIORS:
        return float(kind == "idle")
    at = list(PRIORS).index(kind)
    return statistics.fmean(one.like[at] for one in steps if one.kind == kind)


def _accused(step: Step) -> int:
    """Return how grave a verdict is; one that accuses nobody is not."""
    return VERDICTS.index(step.verdict) if step.label in LABELS and LABELS[step.label].accuses else 0


def told(one: Evidence) -> dict[str, object]:
    """Return a piece of evidence for output."""
    return {"label": one.label, "class": one.evidence_class, "kind": one.kind, "nats": round(one.nats, 2),
            "text": one.text}
