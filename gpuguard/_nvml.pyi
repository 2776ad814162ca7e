"""Types of the compiled rounds of driver calls and of what reads their answers, `ext/nvml.pyx`."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

#: Address, arguments, which of them is the address of the answer, where in the row that is, its size, the call needed.
Call: TypeAlias = tuple[int, Sequence[int], int, int, int, int]

ANSWER_BYTES_MAX: int

class Calls:
    """What one device is asked in a round, in two turns."""

    count: int
    row_bytes: int

    def __init__(self, turns: Sequence[tuple[bytes, Sequence[Call]]]) -> None: ...
    def read(self, row: bytes) -> tuple[int, list[int], list[bytes]]: ...

class Rounds:
    """Makes rounds of calls."""

    def __init__(self, gone: Iterable[int]) -> None: ...
    def stop(self) -> None: ...
    def run(
        self, devices: Sequence[Calls], turns: Sequence[int], rounds: int, first_ns: int, period_ns: int, until_ns: int,
    ) -> list[list[bytes]]: ...

class Metrics:
    """Reads the metrics of a GPM window into the fields of a record."""

    def __init__(self, tables: Sequence[Mapping[int, tuple[int, float]]], places: int) -> None: ...
    def read(self, answer: bytes, period_ns: int) -> list[Any]: ...

class FieldValues:
    """Reads the field values of one device."""

    def __init__(self, wanted: Iterable[tuple[str, str, float | None, float]]) -> None: ...
    def take(self, answer: bytes, values: dict[str, Any]) -> dict[str, int]: ...

def as_rate(per_us: float, unit: float) -> float: ...
def decode_value(kind: int, bits: int) -> float | None: ...
def beyond(values: dict[str, Any], highest: dict[str, float]) -> list[str]: ...
