"""What all tests share: the same random input every time, and fresh input under ``make fuzz``."""

from __future__ import annotations

from hypothesis import settings

# A failure must be the change's, not the dice's: fixed input, and no deadline on a busy machine.
settings.register_profile("fixed", derandomize=True, deadline=None, database=None)
# `make fuzz` runs every property over and over; what it finds stays in .hypothesis/ and is tried first next time.
settings.register_profile("fuzz", derandomize=False, deadline=None, max_examples=1_000, print_blob=True)
settings.load_profile("fixed")
