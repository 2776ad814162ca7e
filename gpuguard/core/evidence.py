"""What a detector says: one thing seen, about one subject, weighed in nats.

The weight is a log-likelihood ratio: ln P(seen | label) - ln P(seen | the benign alternatives). Negative weights are
counter-evidence. What was not seen weighs nothing: unknown is never innocence.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from msgspec import Struct

from gpuguard.core.subjects import Subject

if TYPE_CHECKING:
    from gpuguard.core.observations import FlowUse

EvidenceClass = Literal["network", "launch", "code", "counter", "process", "toolcall", "external"]


class Evidence(Struct, frozen=True):
    """One observation, weighed.

    ``kind`` is a short stable name of what was seen ("ssh-reverse-forward-request"); ``text`` says it for people, with
    the numbers; ``start_ns`` to ``time_ns`` is the span it rests on; ``blind_spots`` says what would fool it.
    ``evidence_class`` is the probe it came from: what comes from one probe is one class, however often it speaks.
    A ``label`` of "" is told with whatever the subject is called; such evidence weighs nothing.
    A detector emits increments: two pieces of evidence add up only if they rest on different records.
    """

    time_ns: int
    subject: Subject
    label: str
    evidence_class: EvidenceClass
    kind: str
    nats: float
    text: str
    start_ns: int
    carrier: str = ""
    blind_spots: tuple[str, ...] = ()


class Paced(Struct, frozen=True):
    """Evidence whose detector says whether it makes a finding; else it does where it changes how its subject stands."""

    evidence: Evidence
    told: bool


def of_use(use: FlowUse, label: str) -> Evidence:
    """Return what the protocol's own state says of a flow as evidence for a label, with the weight it was given."""
    return Evidence(
        time_ns=use.time_ns,
        subject=use.flow,
        label=label,
        evidence_class="network",
        kind=use.use,
        nats=use.nats,
        text=use.text,
        start_ns=use.start_ns,
        carrier=use.carrier,
        blind_spots=use.blind_spots,
    )
