"""What is run on the GPU and under which labels: hash searches, training, inference, hard negatives.

No pool, no network: a search looks for a nonce that cannot be found, and drops what it computes.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

from machine import HERE as GPU
from machine import PROGRAMS, REAL, STANDINS

#: Families of searches; each is a program, its kernels are tests/fixtures/cuda/FAMILY.cu.
FAMILIES = ("sha256d", "keccak", "blake3", "heavyhash", "dagwalk", "siptrim", "matmulpow")
TRAINING = ("transformer-bf16", "transformer-fp32", "resnet-amp", "graph-network", "reinforcement", "accumulation",
            "starved")
INFERENCE = ("single", "batched", "int8")
NEGATIVES = ("sort", "fft", "checksum", "random", "sparse", "bigint", "copies", "video", "idle")
MIXED = ("keccak", "heavyhash", "blake3")


@dataclass(frozen=True)
class Workload:
    """One labelled run."""

    name: str
    group: str
    label: str
    command: tuple[str, ...]
    family: str = ""
    intensity: float = 1.0
    evasion: str = ""


def python(program: str, *arguments: str) -> tuple[str, ...]:
    """Return the command of a PyTorch program; without a GPU, of the stand-in for a training job."""
    if not REAL:
        return (str(STANDINS / "trainer"),)
    return (sys.executable, str(GPU / "programs" / f"{program}.py"), *arguments)


def search(family: str, *arguments: str) -> tuple[str, ...]:
    """Return the command of a hash search; without a GPU, of the stand-in for a miner."""
    if not REAL:
        return (str(STANDINS / "hasher"), "--kernel", f"search_{family}")
    return (str(PROGRAMS / f"search_{family}"), *arguments)


def negative(kind: str) -> tuple[str, ...]:
    """Return the command of a hard negative."""
    if kind == "fft":
        return python("inference", kind)
    return (str(PROGRAMS / "negative"), kind) if REAL else (str(STANDINS / "trainer"),)


def workloads() -> list[Workload]:
    """Return every workload in the order in which it is worth most to have it, should time run out."""
    made = [Workload(f"{family}-full", "hash", "mining", search(family), family) for family in FAMILIES]
    made += [Workload(f"training-{kind}", "training", "training", python("training", kind)) for kind in TRAINING]
    made += [Workload(f"inference-{kind}", "inference", "inference", python("inference", kind)) for kind in INFERENCE]
    made += [Workload(f"negative-{kind}", "negative", "idle" if kind == "idle" else "other", negative(kind))
             for kind in NEGATIVES]
    for intensity in (0.5, 0.1):
        made += [Workload(f"{family}-{intensity:.0%}".replace("%", ""), "hash", "mining",
                          search(family, "--intensity", str(intensity)), family, intensity, "throttled")
                 for family in FAMILIES]
    made += [Workload(f"{family}-duty", "hash", "mining", search(family, "--on-s", "2", "--off-s", "2"), family, 0.5,
                      "duty cycle") for family in FAMILIES]
    made += [Workload(f"{family}-mixed-{share:.0%}".replace("%", ""), "mixed", "mining",
                      python("training", "transformer-bf16", "--mix", family, "--share", str(share)), family, share,
                      "mixed into training") for family in MIXED for share in (0.05, 0.3)]
    return made
