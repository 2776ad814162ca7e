"""One run of the lab from outside: start it, listen, make sure that nothing of it stays behind."""

from __future__ import annotations

import json
import os
import threading
from typing import TYPE_CHECKING, Any

import msgspec

from gpuguard.lab import leftovers, namespaces
from gpuguard.lab.tale import Tale

if TYPE_CHECKING:
    from collections.abc import Callable

    from gpuguard.core.events import Event
    from gpuguard.lab.scenario import Settings

TIMEOUT_S = 600.0


def perform(
    settings: Settings, listener: Callable[[dict[str, Any], Event | None], None],
) -> tuple[Tale, list[str]]:
    """Play the incident; hand each line and the event in it to ``listener``; return the tale and what was left behind.

    Raises
    ------
    LabClosed
        The lab could not be built or broke; the message says why.
    """
    lab = namespaces.start("gpuguard.lab.scenario", msgspec.to_builtins(settings), os.environ)
    timer = threading.Timer(TIMEOUT_S, lab.kill)
    timer.start()
    tale = Tale()
    before: leftovers.Footprint | None = None
    ended = False
    try:
        for text in lab.stdout or ():
            line = json.loads(text)
            listener(line, tale.take(line))
            if line["kind"] == "agent":
                before = leftovers.footprint(lab.pid, acts=settings.mode == "enforce")
            ended = ended or (line["kind"] == "stage" and line["name"] == "end")
        said = lab.stderr.read().decode(errors="replace").strip() if lab.stderr else ""
    finally:
        timer.cancel()
        lab.kill()
        lab.communicate()
    if not ended:
        raise namespaces.LabClosed(said or f"it ended in the middle, with status {lab.returncode}")
    return tale, leftovers.remaining(before) if before else []
