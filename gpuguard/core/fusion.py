"""Adding evidence up: one cumulative-sum test for each subject and label.

S = max(0, S + w) over the weights w in nats (Page 1954; Lorden 1971 for its optimality). With weights that are
log-likelihood ratios, exp(S) is bounded by an e-detector, and a threshold h alarms on an innocent subject at most once
in exp(h) looks on average, without any assumption of independence between subjects (Shin, Ramdas, Rinaldo 2023,
"E-detectors", theorem 2.4). So the operator states alarms per GPU-year, and the threshold follows:

    h = ln(looks per year / alarms per year)

Looks are counted at one a second for each GPU: detectors that speak faster must share one weight out over the second.
"""

from __future__ import annotations

import math
from collections import OrderedDict

import msgspec
from msgspec import Struct, field

from gpuguard.core.evidence import Evidence, EvidenceClass
from gpuguard.core.labels import LABELS, Verdict
from gpuguard.core.subjects import Subject

LOOKS_PER_YEAR = 365.25 * 86_400

#: From here on an operator should look: odds of 400 to 1 by the evidence alone.
SUSPECT_NATS = 6.0

#: From here on a label that accuses nobody is taken as the name of what is seen.
NAMED_NATS = 3.0

#: One subject in a hundred of those that raise evidence at all is assumed guilty: ln(0.01 / 0.99). A label that accuses
#: nobody is no such rarity: as likely as not.
PRIOR_NATS = -4.6

STANDINGS_MAX = 65_536
EVIDENCE_MAX = 32


def confirm_nats(alarms_per_gpu_year: float) -> float:
    """Return the threshold for `confirmed` that keeps false alarms at or under the stated rate.

    Raises ValueError for a rate that is not positive or that is above one alarm in a hundred looks.
    """
    if not 0 < alarms_per_gpu_year <= LOOKS_PER_YEAR / 100:
        message = f"alarms_per_gpu_year must lie in (0, {LOOKS_PER_YEAR / 100:.0f}], not {alarms_per_gpu_year}"
        raise ValueError(message)
    return math.log(LOOKS_PER_YEAR / alarms_per_gpu_year)


def probability(nats: float) -> float:
    """Return the probability that the label is true, given the sum of the evidence."""
    return 1.0 / (1.0 + math.exp(-(nats + PRIOR_NATS)))


def likelihood(probability: float) -> str:
    """Return a probability for people: four digits, but never a certainty."""
    return "above 0.9999" if probability > 0.9999 else f"{probability:.4f}"


class Standing(Struct):
    """How one subject stands under one label. ``by_class`` is what each class added since S was last zero.

    ``decided_packets`` is for who drives this to fill in: how many packets of a flow had been seen by ``decided_ns``.
    """

    subject: Subject
    label: str
    start_ns: int
    nats: float = 0.0
    verdict: Verdict = "unknown"
    decided_ns: int = 0
    decided_packets: int | None = None
    carrier: str = ""
    by_class: dict[EvidenceClass, float] = field(default_factory=dict)
    evidence: list[Evidence] = field(default_factory=list)
    counter_evidence: list[Evidence] = field(default_factory=list)

    @property
    def probability(self) -> float:
        """The probability that the label is true."""
        return probability(self.nats if LABELS[self.label].accuses else self.nats - PRIOR_NATS)

    def classes(self, nats_min: float) -> list[EvidenceClass]:
        """Return the classes that each carry at least this weight."""
        return sorted(name for name, nats in self.by_class.items() if nats >= nats_min)


class Fusion:
    """All standings, bounded: the one that was not spoken of for longest leaves, and is counted."""

    def __init__(self, alarms_per_gpu_year: float) -> None:
        self.confirm_nats = confirm_nats(alarms_per_gpu_year)
        self.evicted = 0
        self._standings: OrderedDict[tuple[Subject, str], Standing] = OrderedDict()
        self._labels: dict[Subject, list[str]] = {}
        self._notes: OrderedDict[Subject, list[Evidence]] = OrderedDict()

    def receive(self, evidence: Evidence) -> tuple[Standing, bool]:
        """Add one piece of evidence; return the standing, and whether there is something new to tell of it.

        New is a change of verdict, and for a subject that stands accused evidence of a kind not seen before.
        """
        standing = self._standing(evidence)
        before = standing.verdict
        new_kind = self._add(standing, evidence)
        standing.verdict = self._verdict(standing)
        changed = standing.verdict != before
        if changed:
            standing.decided_ns = evidence.time_ns
            standing.decided_packets = None
        return standing, changed or (new_kind and standing.verdict in ("suspect", "confirmed"))

    def note(self, evidence: Evidence) -> None:
        """Keep what weighs nothing and is told with whatever its subject is called."""
        _remember(self._notes.setdefault(evidence.subject, []), evidence)
        self._notes.move_to_end(evidence.subject)
        while len(self._notes) > STANDINGS_MAX:
            self._notes.popitem(last=False)
            self.evicted += 1

    def notes(self, subject: Subject, label: str) -> list[Evidence]:
        """Return what was noted of a subject, under the name that it has now."""
        return [msgspec.structs.replace(one, label=label) for one in self._notes.get(subject, ())]

    def best(self, subject: Subject) -> Standing | None:
        """Return the standing that names the subject: the strongest accusation, else the strongest other label."""
        standings = self.of(subject)
        accused = [s for s in standings if s.verdict in ("suspect", "confirmed")]
        ranked = accused or [s for s in standings if s.verdict == "clear"] or standings
        return max(ranked, key=lambda s: (s.verdict == "confirmed", s.nats), default=None)

    def of(self, subject: Subject) -> list[Standing]:
        """Return how a subject stands under every label that evidence was given for."""
        return [self._standings[subject, label] for label in self._labels.get(subject, ())]

    def subjects(self) -> list[Subject]:
        """Return every subject that evidence was given about."""
        return list(self._labels)

    def forget(self, subject: Subject) -> None:
        """Drop all standings of a subject that is gone, and what was noted of it."""
        self._notes.pop(subject, None)
        for label in self._labels.pop(subject, ()):
            del self._standings[subject, label]

    def _standing(self, evidence: Evidence) -> Standing:
        key = (evidence.subject, evidence.label)
        standing = self._standings.get(key)
        if standing is None:
            standing = Standing(subject=evidence.subject, label=evidence.label, start_ns=evidence.start_ns)
            self._standings[key] = standing
            self._labels.setdefault(evidence.subject, []).append(evidence.label)
        self._standings.move_to_end(key)
        while len(self._standings) > STANDINGS_MAX:
            subject, label = next(iter(self._standings))
            self._labels[subject].remove(label)
            if not self._labels[subject]:
                del self._labels[subject]
            del self._standings[subject, label]
            self.evicted += 1
        return standing

    def _add(self, standing: Standing, evidence: Evidence) -> bool:
        # The sum is kept within reach of its thresholds, so that a subject that stops can be seen to have stopped.
        standing.nats = min(max(0.0, standing.nats + evidence.nats), 2 * self.confirm_nats)
        if standing.nats == 0.0:
            standing.by_class.clear()
        else:
            held = standing.by_class.get(evidence.evidence_class, 0.0)
            standing.by_class[evidence.evidence_class] = max(0.0, held + evidence.nats)
        standing.start_ns = min(standing.start_ns, evidence.start_ns)
        standing.carrier = evidence.carrier or standing.carrier
        return _remember(standing.evidence if evidence.nats >= 0 else standing.counter_evidence, evidence)

    def _verdict(self, standing: Standing) -> Verdict:
        if not LABELS[standing.label].accuses:
            return "clear" if standing.nats >= NAMED_NATS or standing.verdict == "clear" else "unknown"
        beyond_counters = any(name != "counter" for name in standing.classes(SUSPECT_NATS))
        if standing.nats >= self.confirm_nats and beyond_counters:
            return "confirmed"
        if standing.verdict == "confirmed" and standing.nats >= SUSPECT_NATS:
            return "confirmed"
        if standing.nats >= SUSPECT_NATS:
            return "suspect"
        return "unknown"


def _remember(held: list[Evidence], evidence: Evidence) -> bool:
    """Keep the list bounded, increments of one kind added up in one line; return whether the kind is new."""
    for index, one in enumerate(held):
        if one.kind == evidence.kind and one.evidence_class == evidence.evidence_class:
            held[index] = _joined(one, evidence)
            return False
    if len(held) == EVIDENCE_MAX:
        return False
    held.append(evidence)
    return True


def _joined(earlier: Evidence, later: Evidence) -> Evidence:
    """Return the later words with the weight and the span of both."""
    return type(later)(
        time_ns=later.time_ns,
        subject=later.subject,
        label=later.label,
        evidence_class=later.evidence_class,
        kind=later.kind,
        nats=earlier.nats + later.nats,
        text=later.text,
        start_ns=min(earlier.start_ns, later.start_ns),
        carrier=later.carrier,
        blind_spots=later.blind_spots,
    )
