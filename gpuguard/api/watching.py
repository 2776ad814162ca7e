"""The latest incidents in one bounded ring, read by any number of watchers at their own pace.

The guard's thread only appends. A watcher holds a place in the ring and nothing else, so a slow one costs no memory:
what has left the ring before it was read is told to it as a `Gap`. A resume token is a place and the life of the guard
that it is of.
"""

from __future__ import annotations

import threading
from collections import deque
from typing import TYPE_CHECKING

from gpuguard.core.events import Incident
from gpuguard.core.records import Gap

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from gpuguard.core.events import Event

RING_MAX = 1_024
IDLE_S = 0.5


class BadToken(Exception):
    """The resume token is none that this API has ever given."""


class Ring:
    """Incidents as they change. ``life`` names this run of the guard; ``now_ns`` is the clock, for gaps."""

    def __init__(self, life: str, now_ns: Callable[[], int], ring_max: int = RING_MAX) -> None:
        self.closed = False
        self._life = life
        self._now_ns = now_ns
        self._incidents: deque[Incident] = deque(maxlen=ring_max)
        self._next = 0
        self._changed = threading.Condition()

    def take(self, event: Event) -> None:
        """Keep an incident; every other event passes by. Never blocks for a watcher."""
        if not isinstance(event, Incident):
            return
        with self._changed:
            self._incidents.append(event)
            self._next += 1
            self._changed.notify_all()

    def close(self) -> None:
        """End every watch once it has told what is there."""
        with self._changed:
            self.closed = True
            self._changed.notify_all()

    def wake(self) -> None:
        """Make every watcher look again whether it is still wanted."""
        with self._changed:
            self._changed.notify_all()

    def token(self) -> str:
        """Return the token of now."""
        with self._changed:
            return self._token(self._next)

    def watch(self, token: str, wanted: Callable[[], bool]) -> Iterator[tuple[str, Incident | Gap]]:
        """Yield what follows the token ("": from now on), each with its own token, until not ``wanted`` any more.

        Raises
        ------
        BadToken
            At once, before the first item.
        """
        life, place = self._parse(token)
        if life == self._life:
            return self._follow(place, wanted, None)
        lost = Gap(time_ns=self._now_ns(), sensor="watch", reason="the guard was restarted since this token was given")
        return self._follow(0, wanted, lost)

    def _follow(self, place: int, wanted: Callable[[], bool], gap: Gap | None) -> Iterator[tuple[str, Incident | Gap]]:
        if gap:
            yield self._token(place), gap
        while wanted():
            with self._changed:
                if place >= self._next and self.closed:
                    return
                if place >= self._next:
                    self._changed.wait(IDLE_S)
                oldest = self._next - len(self._incidents)
                fresh = list(self._incidents)[max(0, place - oldest):]
            if place < oldest:
                reason = "this watcher was too slow, or was away too long: list the incidents to catch up"
                yield self._token(oldest), Gap(time_ns=self._now_ns(), sensor="watch", reason=reason,
                                               lost=oldest - place)
                place = oldest
            for incident in fresh:
                place += 1
                yield self._token(place), incident

    def _token(self, place: int) -> str:
        return f"{self._life}.{place}"

    def _parse(self, token: str) -> tuple[str, int]:
        if not token:
            return self._life, self._next
        life, _, place = token.partition(".")
        if not (life and len(token) <= 64 and place.isascii() and place.isdigit()):
            raise BadToken(token[:64])
        if life == self._life and int(place) > self._next:
            raise BadToken(token)
        return life, int(place)
