"""Recorded launches from CSV, by columns of other tools' names, whatever else is in it."""

from __future__ import annotations

import math
from array import array
from typing import TYPE_CHECKING

import numpy as np
from msgspec import Struct

from gpuguard.counters.table import Unreadable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gpuguard.counters.table import Table

#: The recording is taken to begin here: its own times are offsets.
BEGIN_NS = 1_000_000_000
ROWS_MAX = 20_000_000
NAMES_MAX = 60_000
#: Different launches, by name, API and geometry.
KINDS_MAX = 1_000_000

TIMES = ("t_host_us", "t_dev_us")
GEOMETRY = ("gx", "gy", "gz", "bx", "by", "bz", "shmem")
COLUMNS = (*TIMES, "name", *GEOMETRY, "launch_api")
RUNTIME_APIS = {
    "cudaLaunchKernel": "cuLaunchKernel",
    "cudaLaunchKernelExC": "cuLaunchKernelEx",
    "cudaLaunchCooperativeKernel": "cuLaunchCooperativeKernel",
    "cudaGraphLaunch": "cuGraphLaunch",
}

#: What is launched: name, API, geometry.
Kind = tuple[str, str, tuple[int, ...]]


class Recorded(Struct):
    """Launches read from a file: times in ns from `BEGIN_NS` on, in order, and what each launched."""

    times_ns: np.ndarray
    keys: np.ndarray
    table: list[Kind]
    gaps: list[str]


def read_launches(table: Table) -> Recorded:
    """Read launches from CSV. Host times are preferred; a row without one has its device time.

    Raises
    ------
    Unreadable
        If the columns are not those of launches, or no row has a time.
    """
    _check_columns(table.header)
    told = {name: table.header.index(name) for name in COLUMNS if name in table.header}
    host_us, device_us, keys = array("d"), array("d"), array("I")
    known: dict[Kind, int] = {}
    skipped = beyond = 0
    for row in table.rows():
        found = {name: row[at] for name, at in told.items() if at < len(row)}
        times = [_number(found.get(name)) for name in TIMES]
        key = _key(found)
        if all(math.isnan(one) for one in times) or key is None:
            skipped += 1
            continue
        if len(keys) >= ROWS_MAX or (len(known) >= KINDS_MAX and key not in known):
            beyond += 1
            continue
        host_us.append(times[0])
        device_us.append(times[1])
        keys.append(known.setdefault(key, len(known)))
    if not keys:
        raise Unreadable(table.broken or f"no launch with a time and a geometry that can be, in {table.lines} lines")
    placed_us, gap = _placed(np.array(host_us), np.array(device_us))
    order = np.argsort(placed_us, kind="stable")
    times_ns = ((placed_us[order] - placed_us[order[0]]) * 1e3).astype(np.int64) + BEGIN_NS
    gaps = [*_gaps(table.broken, skipped, beyond, list(known)), *([gap] if gap else [])]
    return Recorded(times_ns, np.array(keys)[order], list(known), gaps)


def _gaps(broken: str, skipped: int, beyond: int, kinds: Sequence[Kind]) -> list[str]:
    """Return what was not taken, and why."""
    quoted = sum(text.count("\n") for name, api, _ in kinds for text in (name, api))
    return [text for text, said in (
        (f"{broken}; what comes after is left out", broken),
        (f"{skipped} rows without a usable time or geometry were left out", skipped),
        (f"{quoted} lines lie within quotes, as text of a name: launches in them are not seen", quoted),
        (f"{beyond} rows beyond {ROWS_MAX} or {KINDS_MAX} different launches were left out", beyond),
        (f"{len(kinds)} different launches: names beyond {NAMES_MAX} may be forgotten", len(kinds) > NAMES_MAX),
    ) if said]


def _placed(host_us: np.ndarray, device_us: np.ndarray) -> tuple[np.ndarray, str]:
    """Return the time of each launch by one clock, and which were placed by the other; absent times are NaN."""
    absent = np.isnan(host_us)
    if absent.all():
        return device_us, "no host times: launches are placed by their device times"
    if not absent.any():
        return host_us, ""
    both = ~absent & ~np.isnan(device_us)
    # A device time stands for the host time that was usual before it.
    shift_us = float(np.median((device_us - host_us)[both])) if both.any() else 0.0
    gap = f"{int(absent.sum())} launches without a host time are placed by their device time"
    return np.where(absent, device_us - shift_us, host_us), gap


def _check_columns(columns: Sequence[str]) -> None:
    if twice := [name for name in COLUMNS if columns.count(name) > 1]:
        raise Unreadable(f"two columns are named {twice[0]}")
    if any(name in columns for name in TIMES) and ("name" in columns or "gx" in columns):
        return
    shown = ", ".join(columns[:8]) or "none"
    raise Unreadable(f"neither launches nor counters: columns are {shown}; needed are {' or '.join(TIMES)}, and name "
                     "or gx; or timestamp and counters such as power_w and sm_active")


def _number(text: str | None) -> float:
    try:
        value = float(text or "nan")
    except ValueError:
        return math.nan
    return value if abs(value) < 1e15 else math.nan


def _key(row: dict[str, str]) -> Kind | None:
    """Return (name, API, geometry); None for a number that no launch has. What is missing is 0 or ""."""
    try:
        numbers = [float(row.get(name) or 0) for name in GEOMETRY]
    except ValueError:
        return None
    if not all(0 <= one < 2**32 and one.is_integer() for one in numbers):
        return None
    geometry = tuple(map(int, numbers))
    api = row.get("launch_api") or ""
    return row.get("name") or "", RUNTIME_APIS.get(api, api), geometry
