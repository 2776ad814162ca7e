"""What is said of a kernel, and of the file it lies in.

`of_file` is the one rule that makes a verdict of a file out of those of its kernels: a file is no worse than the worst
kernel in it, and that nothing was found in what could be read says nothing of the rest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from gpuguard.core.labels import VERDICTS, Verdict

if TYPE_CHECKING:
    from collections.abc import Iterable

ACCUSED = ("mining", "cracking")
KNOWN_VENDOR = "allow-listed"


class Seen(msgspec.Struct, frozen=True):
    """One reason: what was seen in the code, its weight in nats, and the words for people."""

    kind: str
    nats: float
    text: str


class KernelVerdict(msgspec.Struct, frozen=True, kw_only=True):
    """One kernel of one image. ``label``: mining, cracking, grey:<class>, benign, or unknown."""

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
    evidence: tuple[Seen, ...] = ()
    text_sha256: str = ""
    image_sha256: str = ""


class FileVerdict(msgspec.Struct, frozen=True, kw_only=True):
    """A file, with all that lies in it. ``malformed`` and ``gaps`` say what could not be read, and why."""

    path: str
    verdict: Verdict
    label: str
    probability: float
    images: int
    kernels: int
    labels: dict[str, int]
    evidence: tuple[Seen, ...] = ()
    malformed: tuple[str, ...] = ()
    gaps: tuple[str, ...] = ()
    size_bytes: int = 0
    code_bytes: int = 0


class Tally:
    """What the verdict of a file needs of its kernels, without keeping them."""

    def __init__(self) -> None:
        self.kernels = 0
        self.labels: dict[str, int] = {}
        self.worst: KernelVerdict | None = None

    def add(self, kernels: Iterable[KernelVerdict]) -> None:
        """Count kernels."""
        for one in kernels:
            self.kernels += 1
            self.labels[one.label] = self.labels.get(one.label, 0) + 1
            if self.worst is None or rank(one) > rank(self.worst):
                self.worst = one


def rank(one: KernelVerdict | FileVerdict) -> tuple[int, float]:
    """Order by what an operator should read first."""
    return VERDICTS.index(one.verdict), one.probability


def of_file(path: str, tally: Tally, *, images: int, malformed: tuple[str, ...], gaps: tuple[str, ...],
            size_bytes: int, code_bytes: int) -> FileVerdict:
    """Return the verdict of a file."""
    worst = tally.worst
    return FileVerdict(
        path=path, verdict=worst.verdict if worst else "unknown" if malformed or gaps else "clear",
        label=worst.label if worst else "", probability=worst.probability if worst else 0.0, images=images,
        kernels=tally.kernels, labels=tally.labels, evidence=worst.evidence if worst else (), malformed=malformed,
        gaps=gaps, size_bytes=size_bytes, code_bytes=code_bytes)
