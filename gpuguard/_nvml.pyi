"""Types of the compiled rounds of driver calls, `ext/nvml.pyx`."""

from collections.abc import Iterable, Sequence
from typing import TypeAlias

#: Address, arguments, which of them is the address of the answer, where in the row that is, its size, the call needed.
Call: TypeAlias = tuple[int, Sequence[int], int, int, int, int]

ANSWER_BYTES_MAX: int

class Calls:
    """What one device is asked in a round, in two turns."""

    count: int
    row_bytes: int

    def __init__(self, turns: Sequence[tuple[bytes, Sequence[Call]]]) -> None: ...

class Rounds:
    """Makes rounds of calls."""

    def __init__(self, gone: Iterable[int]) -> None: ...
    def stop(self) -> None: ...
    def run(
        self, devices: Sequence[Calls], turns: Sequence[int], rounds: int, first_ns: int, period_ns: int, until_ns: int,
    ) -> list[list[bytes]]: ...
