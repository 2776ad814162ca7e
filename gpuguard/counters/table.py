"""CSV as tools write it, and as nobody should: the separator is that which its header has most of.

A line is bounded, so that one without an end takes no memory, and so are lines, so that they take no time. What cannot
be read ends the table: the rows before it stand, and why there are no more is told.
"""

from __future__ import annotations

import csv
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import io
    from collections.abc import Iterator

HEADER_MAX = 64 * 1024
LINE_MAX = 1024 * 1024
#: A few kilobytes of gzip may hold two thousand million empty lines.
LINES_MAX = 40_000_000
COLUMNS_MAX = 4_096


class Unreadable(Exception):
    """This input cannot be judged; the message says why."""


class Table:
    """The rows of a text. ``broken`` says why they ended before it did, "" where they did not."""

    def __init__(self, text: io.TextIOBase) -> None:
        """Read the header; raises Unreadable."""
        begin = text.readline(HEADER_MAX)
        self._reader = csv.reader(_lines(begin, text), delimiter=max(",;\t", key=begin.count))
        self.broken = ""
        self.header = next(self.rows(), [])
        if self.broken or len(self.header) > COLUMNS_MAX:
            raise Unreadable(self.broken or f"{len(self.header)} columns")

    @property
    def lines(self) -> int:
        """Return how many lines were read."""
        return self._reader.line_num

    def rows(self) -> Iterator[list[str]]:
        """Yield the rows that are left, without empty ones."""
        try:
            yield from filter(None, self._reader)
        except (csv.Error, UnicodeDecodeError) as error:
            self.broken = f"line {self.lines}: {error}"


def _lines(begin: str, text: io.TextIOBase) -> Iterator[str]:
    """Yield the lines of a text of which so much was read, which ends within its first line or with it."""
    for _ in range(LINES_MAX):
        line = begin if begin.endswith(("\n", "\r")) else begin + text.readline(LINE_MAX + 1 - len(begin))
        begin = ""
        if len(line) > LINE_MAX:
            raise csv.Error(f"the next is longer than {LINE_MAX} characters")
        if not line:
            return
        yield line
    raise csv.Error(f"more than {LINES_MAX} lines are not read")
