"""GPUGuard: names GPU mining and covert tunnels on a host, with evidence, and acts on them by policy.

What a scheduler or a training framework imports. Importing this loads nothing heavy: each name is fetched when it is
first used, and neither NVML, CUDA, Numba nor gRPC ever comes with a name that does not need it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gpuguard.api.client import Client, NoGuard, NotThere, Refused, connect
    from gpuguard.code.scanning import scan
    from gpuguard.core.events import Decision, Finding, Incident
    from gpuguard.core.evidence import Evidence
    from gpuguard.core.guard import Guard
    from gpuguard.core.labels import LABELS, Label, Verdict
    from gpuguard.core.policy import Policy
    from gpuguard.core.records import Gap
    from gpuguard.recording.codec import RecordingError
    from gpuguard.replaying import replay

_HOMES = {
    "Client": "gpuguard.api.client",
    "Decision": "gpuguard.core.events",
    "Evidence": "gpuguard.core.evidence",
    "Finding": "gpuguard.core.events",
    "Gap": "gpuguard.core.records",
    "Guard": "gpuguard.core.guard",
    "Incident": "gpuguard.core.events",
    "LABELS": "gpuguard.core.labels",
    "Label": "gpuguard.core.labels",
    "NoGuard": "gpuguard.api.client",
    "NotThere": "gpuguard.api.client",
    "Policy": "gpuguard.core.policy",
    "RecordingError": "gpuguard.recording.codec",
    "Refused": "gpuguard.api.client",
    "Verdict": "gpuguard.core.labels",
    "connect": "gpuguard.api.client",
    "replay": "gpuguard.replaying",
    "scan": "gpuguard.code.scanning",
}

__all__ = [  # noqa: RUF022 - by kind
    "Guard",
    "Policy",
    "replay",
    "scan",
    "Client",
    "connect",
    "Incident",
    "Finding",
    "Decision",
    "Evidence",
    "Gap",
    "Verdict",
    "Label",
    "LABELS",
    "NoGuard",
    "NotThere",
    "Refused",
    "RecordingError",
    "__version__",
]


def __getattr__(name: str) -> object:
    """Fetch a public name at its first use (PEP 562)."""
    if name == "__version__":
        from importlib.metadata import version

        return version("gpuguard")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
