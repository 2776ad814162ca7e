"""What is said of a kernel, and of the file it lies in.

`of_file` is the one rule that makes a verdict of a file out of those of its kernels. A file is no worse than the worst
kernel in it, and that nothing was found in what could be read says nothing of the rest. The words of a hash are no
chance, so a kernel that has them makes its file suspect, however large that is. An instruction mix can be: the worst of
n kernels is as bad by chance up to n times as often as one kernel is, so ln n is taken off its weight, as it is of the
parts of a kernel, unless more of the file is accused than chance explains. And integer code of a kind that no training
had resembles hashing a little: what weighs little is noted, and makes no file suspect.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import msgspec

from gpuguard.core.labels import VERDICTS, Verdict

if TYPE_CHECKING:
    from collections.abc import Iterable

ACCUSED = ("mining", "cracking")
ALLOWED = "its code is on the allow list"
#: A file is confirmed only if this share of the instructions that were judged is accused: a library of ten thousand
#: kernels of which twenty compute SHA-256 is a library.
ACCUSED_RATIO_MIN = 0.25
#: Up to this share of the instructions is accused by chance: of NVIDIA's own libraries one kernel in a hundred is
#: (models/code_forest.md), and kernels of one library are alike, so that mistakes come together.
CHANCE_RATIO_MAX = 0.05
#: An instruction mix that weighs no more than this makes no file suspect: look-alikes of kinds that no training had
#: weigh so little a third of the time, mining one time in fifty (docs/code.md).
SUSPECT_NATS = 1.5


class KernelVerdict(msgspec.Struct, frozen=True, kw_only=True):
    """One kernel of one image. ``label``: mining, cracking, grey:<class>, benign, or unknown.

    ``verdict`` is confirmed where constants and instructions both say so, suspect where one of them does.
    """

    path: str
    container: str
    offset: int
    arch: str
    kernel: str
    instructions: int
    label: str
    probability: float
    nats: float
    verdict: Verdict
    words: tuple[str, ...] = ()  # the tables of a hash that it has the words of
    evidence: tuple[str, ...] = ()
    text_sha256: str = ""
    image_sha256: str = ""


class FileVerdict(msgspec.Struct, frozen=True, kw_only=True):
    """A file, with all that lies in it.

    ``malformed``: bytes that contradict themselves; ``gaps``: what was not read, and why; ``notes``: what no reader can
    look into.
    """

    path: str
    verdict: Verdict
    label: str
    probability: float
    images: int
    kernels: int
    labels: dict[str, int]
    evidence: tuple[str, ...] = ()
    malformed: tuple[str, ...] = ()
    gaps: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    size_bytes: int = 0
    code_bytes: int = 0


class Tally:
    """What the verdict of a file needs of its kernels, without keeping them."""

    def __init__(self) -> None:
        self.kernels = 0
        self.labels: dict[str, int] = {}
        self.worst: KernelVerdict | None = None
        self.judged = 0
        self.judged_instructions = 0
        self.accused_instructions = 0

    def add(self, kernels: Iterable[KernelVerdict]) -> None:
        """Count kernels."""
        for one in kernels:
            self.kernels += 1
            self.labels[one.label] = self.labels.get(one.label, 0) + 1
            if one.label != "unknown" and one.evidence != (ALLOWED,):
                self.judged += 1
                self.judged_instructions += one.instructions
                self.accused_instructions += one.instructions if one.label in ACCUSED else 0
            if self.worst is None or _worst_first(one) > _worst_first(self.worst):
                self.worst = one


    def chance_nats(self) -> float:
        """Return what is taken off a weight by mix: ln of how many chances there were for a kernel as bad."""
        if self.accused_instructions > CHANCE_RATIO_MAX * self.judged_instructions:
            return 0.0
        return math.log(self.judged)


def rank(one: KernelVerdict | FileVerdict) -> tuple[int, float]:
    """Order by what an operator should read first."""
    return VERDICTS.index(one.verdict), one.probability


def _worst_first(one: KernelVerdict) -> tuple[int, bool, float]:
    verdict, probability = rank(one)
    return verdict, bool(one.words), probability


def of_file(path: str, tally: Tally, *, images: int, malformed: tuple[str, ...], gaps: tuple[str, ...],
            notes: tuple[str, ...], size_bytes: int, code_bytes: int) -> FileVerdict:
    """Return the verdict of a file."""
    worst = tally.worst
    verdict: Verdict = worst.verdict if worst else "unknown" if malformed or gaps else "clear"
    if verdict == "confirmed" and tally.accused_instructions < ACCUSED_RATIO_MIN * tally.judged_instructions:
        verdict = "suspect"
    label, probability = (worst.label, worst.probability) if worst else ("", 0.0)
    if worst and worst.nats and not worst.words:
        chance_nats = tally.chance_nats()
        probability = _less(probability, chance_nats)
        if worst.nats <= max(chance_nats, SUSPECT_NATS):
            verdict, label = "clear", "benign"
            accused = sum(tally.labels.get(one, 0) for one in ACCUSED)
            by_chance = worst.nats <= chance_nats
            why = "as chance has it" if by_chance else f"{worst.nats:.1f} nats at most: too few to suspect"
            notes = (*notes, f"{accused} of {tally.judged} kernels look like hashing by mix alone, {why}")
    return FileVerdict(
        path=path, verdict=verdict, label=label, probability=probability, images=images, kernels=tally.kernels,
        labels=tally.labels, evidence=worst.evidence if worst else (), malformed=malformed, gaps=gaps, notes=notes,
        size_bytes=size_bytes, code_bytes=code_bytes)


def _less(probability: float, nats: float) -> float:
    """Return a probability with so many nats taken off its odds."""
    return probability / (probability + (1 - probability) * math.exp(nats))
