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

`reference` is written for the eye and decides what is right; `vectorised` is the NumPy form, `compiled` that of "cpu".
`event_rows` makes the aggregates of the in-kernel table from single recorded launches, in the same forms and on CUDA.

"auto" never loads Numba: loading it takes a second and compiling five more, in which a daemon would be blind, and a
guard that gave its privileges up may be unable to read it. By `benchmarks/launch_features.py` the plain form is the
fastest below `VECTORISED_ROWS_MIN` rows, and compiling pays from some ten million events on, which only whoever asks
for it by name has. A form that cannot be had is replaced by the plain one, and the name of what was used says so.
"""

from __future__ import annotations

import functools
import math
from collections import Counter, defaultdict
from typing import TYPE_CHECKING, Any

import numpy as np

from gpuguard.core.records import LAUNCH_APIS
from gpuguard.kernels import chosen

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

#: From this many rows on the NumPy form is faster than the plain one.
VECTORISED_ROWS_MIN = 32
GAP_BUCKETS = 40
CHUNK = 4_096


def features(rows: np.ndarray, backend: str = "auto") -> tuple[np.ndarray, str]:
    """Return FEATURE rows of these LAUNCH rows in order of (pid, start_ticks), and the name of the form that made them.

    ``backend`` as `gpuguard.kernels` says; rows of so many fields have no CUDA form. The name tells where the one asked
    for could not be had.
    """
    backend = chosen(backend, None, "numpy" if len(rows) >= VECTORISED_ROWS_MIN else "reference")
    if backend == "reference":
        return reference(rows), backend
    try:
        return {"numpy": vectorised, "cpu": compiled}[backend](rows), backend
    except (ImportError, OSError, RuntimeError) as error:
        return reference(rows), f"reference ({backend}: {type(error).__name__})"


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
    return sum(count / total * math.log2(total / count) for count in counts)


def vectorised(rows: np.ndarray) -> np.ndarray:
    """Return the features by whole columns."""
    if not len(rows):
        return np.zeros(0, FEATURE)
    rows = rows[np.lexsort((rows["start_ticks"], rows["pid"]))]
    pid, ticks = rows["pid"], rows["start_ticks"]
    starts = np.flatnonzero(np.concatenate([[True], (pid[1:] != pid[:-1]) | (ticks[1:] != ticks[:-1])]))
    process = np.repeat(np.arange(len(starts)), np.diff(np.append(starts, len(rows))))
    out = np.zeros(len(starts), FEATURE)
    out["pid"], out["start_ticks"] = pid[starts], ticks[starts]
    out["first_ns"] = np.minimum.reduceat(rows["first_ns"], starts)
    out["last_ns"] = np.maximum.reduceat(rows["last_ns"], starts)
    out["launches"] = np.add.reduceat(rows["launches"], starts)
    launches = rows["launches"].astype(np.float64)
    totals = np.bincount(process, launches)
    for name, ids in (("kernel", rows["kernel"]), ("geometry", _geometries(rows))):
        distinct, entropy, top = _spread(process, ids, launches, totals)
        out[f"{name}_entropy_bits"] = entropy
        out["kernels" if name == "kernel" else "geometries"] = distinct
        if name == "kernel":
            out["top_ratio"] = top
    graphs = np.bincount(process, launches * (rows["api"] == GRAPH_API))
    np.divide(graphs, totals, out=out["graph_ratio"], where=totals > 0)
    gaps = rows["gaps_log2"].astype(np.float64)
    best = np.maximum((gaps[:, :-1] + gaps[:, 1:]).max(axis=1), gaps[:, -1])
    all_gaps = np.bincount(process, gaps.sum(axis=1))
    np.divide(np.bincount(process, best), all_gaps, out=out["cadence_ratio"], where=all_gaps > 0)
    return out


def _geometries(rows: np.ndarray) -> np.ndarray:
    """Return a number for each distinct geometry."""
    number = np.unique(rows["shared_bytes"], return_inverse=True)[1].reshape(-1)
    for column in (*rows["grid"].T, *rows["block"].T):
        if (column == column[0]).all():
            continue
        # Both are below the number of rows and 2**32, so the pair is one number.
        pair = number.astype(np.uint64) << np.uint64(32) | column
        number = np.unique(pair, return_inverse=True)[1].reshape(-1)
    return number


def _spread(
    process: np.ndarray, ids: np.ndarray, launches: np.ndarray, totals: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return distinct ids, their entropy in bits and the share of the commonest, a value for each process."""
    order = np.lexsort((ids, process))
    process, ids = process[order], ids[order]
    new = np.concatenate([[True], (process[1:] != process[:-1]) | (ids[1:] != ids[:-1])])
    starts = np.flatnonzero(new)
    weights, owner = np.add.reduceat(launches[order], starts), process[starts]
    share = np.divide(weights, totals[owner], out=np.zeros(len(weights)), where=weights > 0)
    bits = -share * np.log2(share, out=np.zeros(len(share)), where=share > 0)
    first = np.flatnonzero(np.concatenate([[True], owner[1:] != owner[:-1]]))
    return np.bincount(owner), np.bincount(owner, bits), np.maximum.reduceat(share, first)


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


# -- events -----------------------------------------------------------------------------------------------------------

#: Aggregates of one key: launches, first and last time (0 and 0 for none), and gaps by power of two.
Aggregates = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def event_rows(times_ns: np.ndarray, keys: np.ndarray, count: int, backend: str = "auto",
               device: int | None = None) -> tuple[Aggregates, str]:
    """Return the aggregates of each key 0..count-1 over events in order of time, and the name of the form used.

    A gap is that between an event and the one before of the same key, at least 1 ns; gaps of 2**40 ns and more fall in
    the last bucket. ``backend`` and ``device`` as `gpuguard.kernels` says; arrays on a GPU are int64 and int32, and
    sorting them there needs CuPy. Raises `ValueError` where a key lies outside, or the two arrays differ in length.
    """
    backend = chosen(backend, device, "numpy" if len(keys) >= VECTORISED_ROWS_MIN else "reference")
    if backend == "cuda" and hasattr(keys, "__cuda_array_interface__"):
        from gpuguard.kernels import launches_cuda

        return launches_cuda.event_rows_there(times_ns, keys, count, device), backend
    times_ns, keys = np.ascontiguousarray(times_ns, np.int64), np.ascontiguousarray(keys, np.int32)
    if len(times_ns) != len(keys) or (len(keys) and not 0 <= int(keys.min()) <= int(keys.max()) < count):
        raise ValueError(f"{len(times_ns)} times, {len(keys)} keys of 0..{count - 1}")
    forms: dict[str, Callable[..., Aggregates]] = {
        "reference": _events_reference, "numpy": _events_vectorised, "cpu": _events_compiled,
        "cuda": functools.partial(_events_cuda, device=device)}
    try:
        return forms[backend](times_ns, keys, count), backend
    except (ImportError, OSError, RuntimeError) as error:
        return _events_reference(times_ns, keys, count), f"reference ({backend}: {type(error).__name__})"


def empty(count: int) -> Aggregates:
    """Return room for the aggregates of so many keys."""
    return (np.zeros(count, np.uint64), np.zeros(count, np.int64), np.zeros(count, np.int64),
            np.zeros((count, GAP_BUCKETS), np.uint32))


def _events_reference(times_ns: np.ndarray, keys: np.ndarray, count: int) -> Aggregates:
    launches, first, last, gaps = out = empty(count)
    for time_ns, key in zip(times_ns.tolist(), keys.tolist(), strict=True):
        if launches[key]:
            gap = max(1, time_ns - int(last[key]))
            gaps[key, min(gap.bit_length() - 1, GAP_BUCKETS - 1)] += 1
        else:
            first[key] = time_ns
        last[key] = time_ns
        launches[key] += 1
    return out


def _events_vectorised(times_ns: np.ndarray, keys: np.ndarray, count: int) -> Aggregates:
    launches, first, last, _ = empty(count)
    if not len(keys):
        return empty(count)
    order = np.argsort(keys, kind="stable")
    times, keys = times_ns[order], keys[order]
    same = keys[1:] == keys[:-1]
    starts = np.flatnonzero(np.concatenate([[True], ~same]))
    present = keys[starts]
    launches[present] = np.diff(np.append(starts, len(keys)))
    first[present], last[present] = times[starts], times[np.append(starts[1:], len(keys)) - 1]
    bucket = _buckets(np.diff(times)[same])
    gaps = np.bincount(keys[1:][same].astype(np.int64) * GAP_BUCKETS + bucket, minlength=count * GAP_BUCKETS)
    return launches, first, last, gaps.reshape(count, GAP_BUCKETS).astype(np.uint32)


def _buckets(gaps_ns: np.ndarray) -> np.ndarray:
    """Return floor(log2(gap)), exactly: frexp of an integer below 2**53 is exact, and above all are in the last."""
    buckets: np.ndarray = np.minimum(np.frexp(np.maximum(gaps_ns, 1).astype(np.float64))[1] - 1, GAP_BUCKETS - 1)
    return buckets


def _events_compiled(times_ns: np.ndarray, keys: np.ndarray, count: int) -> Aggregates:
    launches, first, last, gaps = out = empty(count)
    _event_loop()(times_ns, keys, launches, first, last, gaps)
    return out


@functools.cache
def _event_loop() -> Callable[..., None]:
    import numba

    @numba.njit(cache=False, nogil=True)
    def loop(times_ns: Any, keys: Any, launches: Any, first: Any, last: Any, gaps: Any) -> None:
        """Two passes over a piece that stays in the cache: gaps as doubles, then their exponents as buckets."""
        gap = np.empty(CHUNK)
        bits = gap.view(np.int64)
        seen = np.zeros(len(launches), np.uint32)
        for start in range(0, len(keys), CHUNK):
            size = min(CHUNK, len(keys) - start)
            for i in range(size):
                key, time_ns = keys[start + i], times_ns[start + i]
                if not seen[key]:
                    first[key] = last[key] = time_ns
                    seen[key] = 1
                    gap[i] = 0.0
                else:
                    gap[i] = max(time_ns - last[key], 1)
                    last[key] = time_ns
            for i in range(size):
                bucket = (bits[i] >> 52) - 1023
                if bucket >= 0:
                    gaps[keys[start + i], min(bucket, GAP_BUCKETS - 1)] += np.uint32(1)
        for key in range(len(launches)):
            total = np.uint64(seen[key])
            for bucket in range(GAP_BUCKETS):
                total += np.uint64(gaps[key, bucket])
            launches[key] = total

    return loop


def _events_cuda(times_ns: np.ndarray, keys: np.ndarray, count: int, device: int | None) -> Aggregates:
    from gpuguard.kernels import launches_cuda

    return launches_cuda.event_rows(times_ns, keys, count, device)
