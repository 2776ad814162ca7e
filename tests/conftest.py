"""What all tests share: the same random input every time, and fresh input under ``make fuzz``; no terminal's width."""

from __future__ import annotations

import os

from hypothesis import settings

# A failure must be the change's, not the dice's: fixed input, and no deadline on a busy machine.
settings.register_profile("fixed", derandomize=True, deadline=None, database=None)
# `make fuzz` runs every property over and over; what it finds stays in .hypothesis/ and is tried first next time.
settings.register_profile("fuzz", derandomize=False, deadline=None, max_examples=1_000, print_blob=True)
settings.load_profile("fixed")

# Nor the terminal's: as where there is none, however wide it is and whatever its owner thinks of colours.
os.environ.update(COLUMNS="80", LINES="25")
for name in ("FORCE_COLOR", "NO_COLOR"):
    os.environ.pop(name, None)
