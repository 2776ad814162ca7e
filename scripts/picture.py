"""Draw docs/incident.svg: the incident of the recording in the package, as ``gpuguard explain`` shows it."""

from __future__ import annotations

import io
import re
from pathlib import Path

from rich.console import Console

from gpuguard.cli.asking import recorded_incidents
from gpuguard.cli.incident_view import print_story

ROOT = Path(__file__).parent.parent
RECORDING = ROOT / "gpuguard" / "lab" / "recordings" / "incident"
PICTURE = ROOT / "docs" / "incident.svg"

if __name__ == "__main__":
    incident = recorded_incidents(RECORDING)[-1]
    console = Console(record=True, width=128, file=io.StringIO(), force_terminal=True)
    print_story(incident, console)
    svg = console.export_svg(title=f"gpuguard explain {incident.id}")
    # Whoever opens it fetches nothing: it is set in the reader's own monospaced font.
    PICTURE.write_text(re.sub(r"@font-face \{[^}]*\}\s*", "", svg))
