"""Window features of kernel launches, one row a process.

The features are those that in-kernel aggregates can give exactly, so that live and recorded launches are judged alike:

===================  ==================================================================================================
launches             made in the window
kernels              distinct handles
geometries           distinct (grid, block, shared memory)
top_ratio            share of the commonest handle, 0..1
kernel_entropy_bits  Shannon entropy of handles, weighted by launches
geometry_entropy_bits  the same of geometries
cadence_ratio        share of gaps that fall in the two fullest neighbouring octaves of their own row's histogram,
                     0..1; 0 without gaps. 1 is a metronome
graph_ratio          share of launches that replay a graph, whose kernels cannot be seen
===================  ==================================================================================================

`reference` is written for the eye and decides what is right; `compiled` is the Numba CPU form for many processes. It
imports Numba when first called.
"""

from __future__ import annotations

import functools
import math
from collections import Counter, defaultdict
from typing import TYPE_CHECKING, Any

import numpy as np

from gpuguard.core.records import LAUNCH_APIS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

FEATURE = np.dtype([
    ("pid", "<u4"),
    ("start_ticks", "<u8"),
    ("first_ns", "<i8"),
    ("last_ns", "<i8"),
    ("launches", "<u8"),
    ("kernels", "<u4"),
    ("geometries", "<u4"),
    ("top_ratio", "<f8"),
    ("kernel_entropy_bits", "<f8"),
    ("geometry_entropy_bits", "<f8"),
    ("cadence_ratio", "<f8"),
    ("graph_ratio", "<f8"),
])

GRAPH_API = LAUNCH_APIS.index("cuGraphLaunch")

#: From this many rows on the compiled form is worth its compilation.
COMPILED_ROWS_MIN = 4_096


def features(rows: np.ndarray, backend: str = "auto") -> tuple[np.ndarray, str]:
    """Return FEATURE rows of these LAUNCH rows in order of (pid, start_ticks), and the name of the form that made them.

    ``backend`` is "reference", "numba" or "auto": the compiled form where there is much to do.
    """
    if backend == "numba" or (backend == "auto" and len(rows) >= COMPILED_ROWS_MIN):
        return compiled(rows), "numba"
    return reference(rows), "reference"


def reference(rows: np.ndarray) -> np.ndarray:
    """Return the features, the plain way."""
    by_process: dict[tuple[int, int], list[np.void]] = defaultdict(list)
    for row in rows:
        by_process[int(row["pid"]), int(row["start_ticks"])].append(row)
    out = np.zeros(len(by_process), FEATURE)
    for i, ((pid, start_ticks), group) in enumerate(sorted(by_process.items())):
        kernels: Counter[int] = Counter()
        geometries: Counter[tuple[int, ...]] = Counter()
        graphs = steady = gaps = 0
        for row in group:
            launches = int(row["launches"])
            kernels[int(row["kernel"])] += launches
            geometries[*row["grid"].tolist(), *row["block"].tolist(), int(row["shared_bytes"])] += launches
            graphs += launches if row["api"] == GRAPH_API else 0
            histogram = row["gaps_log2"].tolist()
            gaps += sum(histogram)
            steady += max(a + b for a, b in zip(histogram, [*histogram[1:], 0], strict=True))
        total = sum(kernels.values())
        out[i] = (
            pid, start_ticks, min(row["first_ns"] for row in group), max(row["last_ns"] for row in group), total,
            len(kernels), len(geometries), max(kernels.values()) / total if total else 0.0,
            entropy_bits(kernels.values()), entropy_bits(geometries.values()),
            steady / gaps if gaps else 0.0, graphs / total if total else 0.0,
        )
    return out


def entropy_bits(counts: Iterable[int]) -> float:
    """Return the Shannon entropy of a distribution given by counts; 0 for none."""
    counts = [count for count in counts if count]
    total = sum(counts)
    return -sum(count / total * math.log2(count / total) for count in counts)


def compiled(rows: np.ndarray) -> np.ndarray:
    """Return the features by compiled loops over sorted rows."""
    if not len(rows):
        return np.zeros(0, FEATURE)
    process = _ids(rows[["pid", "start_ticks"]])
    kernel = _ids(rows["kernel"])
    geometry = _ids(rows[["grid", "block", "shared_bytes"]])
    out = np.zeros(int(process.max()) + 1, FEATURE)
    firsts = np.unique(process, return_index=True)[1]
    out["pid"], out["start_ticks"] = rows["pid"][firsts], rows["start_ticks"][firsts]
    launches = rows["launches"].astype(np.float64)
    for name, ids in (("kernel", kernel), ("geometry", geometry)):
        order = np.lexsort((ids, process))
        distinct, entropy, top = _loops()[0](process[order], ids[order], launches[order], len(out))
        out[f"{name}_entropy_bits"] = entropy
        out["kernels" if name == "kernel" else "geometries"] = distinct
        if name == "kernel":
            out["top_ratio"] = top
    graph = (rows["api"] == GRAPH_API).astype(np.float64)
    sums = _loops()[1](
        process, rows["launches"].astype(np.uint64), graph, np.ascontiguousarray(rows["gaps_log2"]), len(out))
    out["launches"], out["graph_ratio"], out["cadence_ratio"] = sums
    out["first_ns"] = np.iinfo(np.int64).max
    out["last_ns"] = np.iinfo(np.int64).min
    # Fields of a structured array are views, so ufunc.at writes through.
    np.minimum.at(out["first_ns"], process, rows["first_ns"])
    np.maximum.at(out["last_ns"], process, rows["last_ns"])
    return out


def _ids(column: np.ndarray) -> np.ndarray:
    """Return a small number for each distinct value, in order of value."""
    if column.dtype.names is None:
        return np.unique(column, return_inverse=True)[1].reshape(-1).astype(np.int64)
    fields = (np.ascontiguousarray(column[name]) for name in column.dtype.names)
    parts = [field.reshape(len(column), -1).astype(np.uint64) for field in fields]
    return np.unique(np.concatenate(parts, axis=1), axis=0, return_inverse=True)[1].reshape(-1).astype(np.int64)


@functools.cache
def _loops() -> tuple[Callable[..., Any], Callable[..., Any]]:
    import numba

    @numba.njit(cache=False)
    def spread(process: Any, ids: Any, launches: Any, count: Any) -> Any:
        """Distinct ids, entropy and top share of each process; rows are sorted by (process, id)."""
        totals = np.zeros(count)
        for i in range(len(process)):
            totals[process[i]] += launches[i]
        distinct = np.zeros(count, np.uint32)
        entropy = np.zeros(count)
        top = np.zeros(count)
        i = 0
        while i < len(process):
            j, weight = i, 0.0
            while j < len(process) and process[j] == process[i] and ids[j] == ids[i]:
                weight += launches[j]
                j += 1
            one = process[i]
            distinct[one] += 1
            if weight > 0:
                share = weight / totals[one]
                entropy[one] -= share * np.log2(share)
                top[one] = max(top[one], share)
            i = j
        return distinct, entropy, top

    @numba.njit(cache=False)
    def sums(process: Any, launches: Any, graph: Any, gaps: Any, count: Any) -> Any:
        """Launches, graph ratio and cadence ratio of each process."""
        total = np.zeros(count, np.uint64)
        graphs, steady, all_gaps = np.zeros(count), np.zeros(count), np.zeros(count)
        for i in range(len(process)):
            one = process[i]
            total[one] += launches[i]
            graphs[one] += graph[i] * launches[i]
            best = 0.0
            for b in range(gaps.shape[1]):
                following = float(gaps[i, b + 1]) if b + 1 < gaps.shape[1] else 0.0
                best = max(best, float(gaps[i, b]) + following)
                all_gaps[one] += float(gaps[i, b])
            steady[one] += best
        for one in range(count):
            graphs[one] = graphs[one] / float(total[one]) if total[one] else 0.0
            steady[one] = steady[one] / all_gaps[one] if all_gaps[one] else 0.0
        return total, graphs, steady

    return spread, sums
