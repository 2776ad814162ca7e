"""What the grammar says of a session, and what it said already."""

from __future__ import annotations

from typing import NamedTuple

# Benign labels accuse nobody: enough to name the flow (fusion.NAMED_NATS), more where the reading is exact.
NAME_NATS = 4.0
NAME_FIRM_NATS = 6.0

SPOTS = ("padding beyond the minimum", "requests sent while records are read in part only")


class Use(NamedTuple):
    """One thing that the state machine found; `FlowUse` without what the flow table knows."""

    use: str
    nats: float
    text: str
    blind_spots: tuple[str, ...] = ()


class Told:
    """The names of the uses that were said of one session."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def __contains__(self, use: str) -> bool:
        return use in self.names

    def say(self, use: str, nats: float, text: str, blind_spots: tuple[str, ...] = ()) -> Use:
        """Say a use, as often as it is seen."""
        self.names.add(use)
        return Use(use, nats, text, blind_spots)

    def once(self, use: str, nats: float, text: str) -> list[Use]:
        """Say a benign use, once."""
        return [] if use in self.names else [self.say(use, nats, text)]
