"""Detectors turn records and observations into evidence, one behaviour a file; the list of files is the list.

Each file holds a class ``Detector`` whose instances answer ``receive(item, host) -> list[Evidence]`` for every block
(rows of `Packets` come as observations of the flow table) in order. A detector keeps its own bounded state and takes
time from records only.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING, Protocol, cast

if TYPE_CHECKING:
    from gpuguard.core.evidence import Evidence
    from gpuguard.core.host import Host
    from gpuguard.core.observations import Observation
    from gpuguard.core.records import Block


class Detector(Protocol):
    """What every file of this folder provides under this name."""

    def receive(self, item: Block | Observation, host: Host) -> list[Evidence]:
        """Return what this item adds; [] if nothing."""
        ...


def new_detectors() -> list[Detector]:
    """Return one fresh instance of every detector in this folder, in order of name."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    modules = [importlib.import_module(f"{__name__}.{name}") for name in names]
    return [cast("Detector", module.Detector()) for module in modules]
