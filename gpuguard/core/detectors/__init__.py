"""Detectors turn records and observations into evidence, one behaviour a file; the list of files is the list.

Each file holds a class ``Detector`` whose instances answer ``receive(item, host) -> list[Evidence]`` for every item of
the types that it names in ``takes``, in order; it is not called for others. Items are blocks (rows of `Packets` come
as observations of the flow table). A detector keeps its own bounded state and takes time from records only.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING, Protocol, cast, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gpuguard.core.counter_classes import Model
    from gpuguard.core.egress import EgressPolicy
    from gpuguard.core.evidence import Evidence, Paced
    from gpuguard.core.host import Host
    from gpuguard.core.observations import Observation
    from gpuguard.core.records import Block, Gap
    from gpuguard.core.signatures import Signature


class Detector(Protocol):
    """What every file of this folder provides under this name."""

    #: What it wants to be shown.
    takes: tuple[type, ...]

    def receive(self, item: Block | Observation, host: Host) -> Sequence[Evidence | Paced | Gap]:
        """Return what this item adds, and what could not be judged; [] if nothing."""
        ...


@runtime_checkable
class Learner(Protocol):
    """A detector that knows what to look for by signatures."""

    def learn(self, signatures: tuple[Signature, ...]) -> None:
        """Look for these from now on."""
        ...


@runtime_checkable
class Judge(Protocol):
    """A detector that weighs counters by a trained model."""

    def judge_by(self, model: Model, alarms_per_gpu_year: float) -> None:
        """Weigh by this model, against the threshold of this rate."""
        ...


@runtime_checkable
class Ruled(Protocol):
    """A detector that goes by egress policy."""

    def rule_by(self, egress: tuple[EgressPolicy, ...]) -> None:
        """Judge by these sections from now on."""
        ...


@runtime_checkable
class Seeded(Protocol):
    """A detector with a table that who chooses addresses could crowd, if he knew how its keys are mixed."""

    def mix_by(self, seed: int) -> None:
        """Mix keys by this number from now on."""
        ...


@runtime_checkable
class Telling(Protocol):
    """A detector that tells what its tables had no room for."""

    def evicted(self) -> dict[str, int]:
        """Return how much was forgotten because a table was full, by what it was."""
        ...


def new_detectors(
    signatures: tuple[Signature, ...] = (), counter_model: Model | None = None,
    counter_alarms_per_gpu_year: float = 1.0, egress: tuple[EgressPolicy, ...] = (), seed: int = 0,
) -> list[Detector]:
    """Return one fresh instance of every detector in this folder, in order of name, knowing all this."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    modules = [importlib.import_module(f"{__name__}.{name}") for name in names]
    detectors = [cast("Detector", module.Detector()) for module in modules]
    for one in detectors:
        if isinstance(one, Learner):
            one.learn(signatures)
        if isinstance(one, Ruled):
            one.rule_by(egress)
        if isinstance(one, Seeded):
            one.mix_by(seed)
        if counter_model and isinstance(one, Judge):
            one.judge_by(counter_model, counter_alarms_per_gpu_year)
    return detectors
