"""What a board is asked at each tick, written down once: `gpuguard._nvml` makes these calls without the interpreter.

A round is: the GPM samples, the fast values, the field values. It has two turns, as GPM needs two samples in turn, and
two forms: in full once a second, and in short in between, without what loses nothing by waiting.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

from gpuguard._nvml import Calls
from gpuguard.sensors.nvml.calls import FIELD, Asked, address
from gpuguard.sensors.nvml.fields import FAST, FIELD_VALUES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from gpuguard._nvml import Call as Compiled
    from gpuguard.sensors.nvml.fields import Call, FieldReader
    from gpuguard.sensors.nvml.gpm import Window


class Sheet:
    """The calls of one form of a round."""

    def __init__(self, turns: Sequence[Sequence[Asked]]) -> None:
        sizes = [-len(one.answer) // 8 * -8 for one in turns[0]]
        self._head = struct.Struct(f"<{1 + len(sizes)}q")
        self._starts = [self._head.size + sum(sizes[:index]) for index in range(len(sizes))]
        self.calls = Calls([(self._blank(turn, sizes), list(self._listed(turn))) for turn in turns])

    def _blank(self, turn: Sequence[Asked], sizes: Sequence[int]) -> bytes:
        # A call that is not made leaves its code at -1, which is none of nvmlReturn_t.
        head = self._head.pack(0, *[-1] * len(turn))
        return head + b"".join(one.answer.ljust(size, b"\0") for one, size in zip(turn, sizes, strict=True))

    def _listed(self, turn: Sequence[Asked]) -> Iterator[Compiled]:
        for index, one in enumerate(turn):
            needs = index - 1 if one.needs_last else -1
            yield address(one.function), one.arguments, one.place, self._starts[index], len(one.answer), needs


class Plan:
    """What one board is asked: of each of ``windows`` two calls, then ``fields`` if it has any, then ``calls``."""

    def __init__(
        self, handle: Any, windows: Mapping[int | None, Window], fields: FieldReader | None,
        fast: Sequence[tuple[Call, Callable[..., int]]], slow: Sequence[tuple[Call, Callable[..., int]]],
    ) -> None:
        self._device = address(handle)
        self.windows = dict(windows)
        self.fields = fields
        #: Those of each tick come first.
        self.calls = [one for one, _ in (*fast, *slow)]
        #: Which turn comes next.
        self.turn = 0
        self.full = Sheet([[*self._begin(turn, full=True), *self._rest((*fast, *slow))] for turn in range(2)])
        self.short = Sheet([[*self._begin(turn, full=False), *self._rest(fast)] for turn in range(2)])

    def whats(self, *, full: bool) -> list[str]:
        """Return what is asked for, in words, GPM apart."""
        fields = [] if self.fields is None else [FIELD_VALUES, *(self.fields.whats(full=full))]
        return fields + [one.what for one in self.calls if full or one in FAST]

    def _begin(self, turn: int, *, full: bool) -> Iterator[Asked]:
        for window in self.windows.values():
            yield from window.asked(turn, full=full)
        if self.fields is not None:
            blank = self.fields.blank if full else self.fields.blank_short
            yield Asked(self.fields.function, (self._device, len(blank) // FIELD.size, 0), blank, place=2)

    def _rest(self, calls: Sequence[tuple[Call, Callable[..., int]]]) -> Iterator[Asked]:
        for one, function in calls:
            arguments = (self._device, *one.before, 0, *one.after)
            yield Asked(function, arguments, bytes(one.answer.size), place=1 + len(one.before))
