"""A table with a bound: whoever fills it pushes out the oldest, and how many were is known."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

K = TypeVar("K")
V = TypeVar("V")


class BoundedTable(Generic[K, V]):
    """A dict that forgets its oldest entry when full, and counts what it forgot."""

    def __init__(self, size_max: int) -> None:
        self._entries: OrderedDict[K, V] = OrderedDict()
        self._size_max = size_max
        self.evicted = 0

    def __setitem__(self, key: K, value: V) -> None:
        self._entries[key] = value
        self._entries.move_to_end(key)
        while len(self._entries) > self._size_max:
            self._entries.popitem(last=False)
            self.evicted += 1

    def __contains__(self, key: K) -> bool:
        return key in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def make_room(self, is_over: Callable[[V], bool]) -> None:
        """Remove the oldest entry of a full table if its time is over, and so nothing is lost that is to be counted."""
        if len(self._entries) == self._size_max and is_over(next(iter(self._entries.values()))):
            self._entries.popitem(last=False)

    def counted(self) -> str:
        """Return how many entries there were, in words: where some were forgotten, who knows how many came again."""
        return f"at least {len(self)}" if self.evicted else str(len(self))

    def get(self, key: K) -> V | None:
        """Return the entry, None if there is none."""
        return self._entries.get(key)

    def pop(self, key: K) -> V | None:
        """Remove the entry and return it, None if there was none."""
        return self._entries.pop(key, None)

    @property
    def entries(self) -> dict[K, V]:
        """All entries as they lie here, to be looked into by compiled code and changed by nobody."""
        return self._entries

    @property
    def oldest(self) -> tuple[K, V] | None:
        """The entry that would leave first, None if there is none."""
        return next(iter(self._entries.items()), None)

    def values(self) -> list[V]:
        """Return all entries, oldest first."""
        return list(self._entries.values())
