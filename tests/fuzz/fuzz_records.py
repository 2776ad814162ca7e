"""Recordings of any records, with checksums that fit: each is refused, or judged without an error by every detector.

A recording may come from anywhere, and a detector that stumbles looks no more.
"""

from __future__ import annotations

import os
import sys
import time
import types
import typing
from pathlib import Path

import hypothesis
import msgspec
import numpy as np
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from gpuguard.core import records
from gpuguard.core.guard import Guard
from gpuguard.core.records import CONNECT, LAUNCH, PACKET, Block, Connects, Gap, Launches, Packets
from gpuguard.core.subjects import ProcessId
from gpuguard.recording.codec import PREFIX, RecordingError, decode_frame, encode_frame
from gpuguard.signature_files import shipped

sys.path[:0] = [str(Path(__file__).resolve().parents[2])]
from tests.core.builders import BOOT, SECOND, T0  # noqa: E402

TEXTS = ("", "x", "10.0.0.1", "fe80::1", "::ffff:10.0.0.2", "203.0.113.9", "packets", "launches", "\x00\x85\u202e",
         "9" * 400)
EDGES = (0, 1, -1, 2, 6, 10, 17, 22, 2**31, 2**32, 2**53, 2**63 - 1, -(2**63), 2**64 - 1)
NUMBERS = st.sampled_from(EDGES) | st.integers(0, 9)
MOMENTS = (0, T0, T0 + 20 * SECOND, T0 + 3_600 * SECOND, 2**63 - 1, -(2**63))
TIMES = st.sampled_from(MOMENTS) | st.integers(T0, T0 + 99 * SECOND)
WHO = st.builds(ProcessId, st.sampled_from((BOOT, "")), st.integers(1, 4), st.integers(0, 2))
DTYPES = {Packets: PACKET, Launches: LAUNCH, Connects: CONNECT}


def anything(kind: object, name: str = "") -> st.SearchStrategy:
    """Values of a field's type."""
    if kind is ProcessId:
        return WHO
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        return records_of(kind)
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return st.one_of([st.none() if one is types.NoneType else anything(one, name) for one in inner])
    if origin is typing.Annotated:
        return st.binary(max_size=17) | st.binary(min_size=16, max_size=16)
    if origin is typing.Literal:
        return st.sampled_from(inner)
    if origin is tuple and inner[-1:] == (...,):
        return st.lists(anything(inner[0], name), max_size=3).map(tuple)
    if origin is tuple:
        return st.tuples(*(anything(one, name) for one in inner))
    if origin is list:
        return st.lists(anything(inner[0], name), max_size=3)
    if origin is dict:
        return st.dictionaries(anything(inner[0], name), anything(inner[1], name), max_size=2)
    if kind is int:
        return TIMES if name.endswith("_ns") else NUMBERS
    simple = {str: st.sampled_from(TEXTS), bool: st.booleans(), bytes: st.binary(max_size=20),
              float: st.floats(allow_nan=True) | st.floats(0, 1), type(None): st.none()}
    return simple[kind]


def records_of(kind: type) -> st.SearchStrategy:
    hints = typing.get_type_hints(kind, vars(records), include_extras=True)
    if kind in DTYPES:
        dtype = DTYPES[kind]
        raw = st.lists(st.binary(min_size=dtype.itemsize, max_size=dtype.itemsize), max_size=4)
        rows = raw.map(lambda some: np.frombuffer(b"".join(some), dtype).copy())
    fields = {name: rows if one is np.ndarray else anything(one, name) for name, one in hints.items()}
    if kind is records.TlsRecords:  # which refuses others itself
        pairs = st.lists(st.tuples(TIMES, NUMBERS), min_size=1, max_size=20)
        return st.builds(lambda row, some: kind(row, *zip(*some, strict=True)), NUMBERS, pairs)
    return st.builds(kind, **fields)


EXAMPLES = 500
ANY_RECORDS = st.lists(st.one_of([records_of(one) for one in typing.get_args(Block)]), max_size=14)


def check(blocks: list[Block]) -> None:
    frame = encode_frame(blocks)
    try:
        blocks = decode_frame(frame[PREFIX.size:], PREFIX.unpack(frame[:PREFIX.size])[1])
    except RecordingError:
        return
    guard, told = Guard(signatures=shipped()), []
    for block in blocks:
        told += guard.receive(block)
    told += guard.close(T0 + 4_000 * SECOND)
    assert [one.reason for one in told if isinstance(one, Gap) and one.sensor.startswith("detector ")] == []
    msgspec.json.encode(told)


def main(seconds: float) -> None:
    first = seed = int(os.environ.get("GPUGUARD_FUZZ_SEED", "0"))
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        hypothesis.seed(seed)(settings(
            max_examples=EXAMPLES, database=None, deadline=None, phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck), print_blob=True)(given(ANY_RECORDS)(check)))()
        seed += 1
    print(f"{(seed - first) * EXAMPLES} recordings, none failed")


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 60)
