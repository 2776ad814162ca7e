"""Write the table of all settings into docs/configuration.md, between its heading and the next one."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec

from gpuguard.config import Config
from gpuguard.config_sources import all_keys, value_of

PAGE = Path(__file__).parent.parent / "docs" / "configuration.md"
HEAD = "| setting | default | meaning |\n|---|---|---|\n"


def rows() -> str:
    """Return one row a setting."""
    defaults = {key: msgspec.json.encode(value_of(Config(), key)).decode() for key in all_keys()}
    return "".join(
        f"| `{key}` | `{defaults[key]}` | {kind.__metadata__[0].description} |\n" for key, kind in all_keys().items())


if __name__ == "__main__":
    text = PAGE.read_text()
    table = re.compile(re.escape(HEAD) + r"(?:\|.*\n)*")
    PAGE.write_text(table.sub(lambda _: HEAD + rows(), text))
