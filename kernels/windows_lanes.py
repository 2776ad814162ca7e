"""What the compiled forms of windows.py do for one channel: the same text for CPU and GPU, in float32.

State lies in an array ``s``: field k of a channel at ``at + k * by``, so that a CPU's loop over channels is a vector
operation on neighbours, and a GPU's thread keeps its own in registers. No function here calls another, for each
compiler wants callees of its own.

Nearly all channels are complete or wholly missing. So `begin` and `two_ticks` take every sample as there, counting
those that are, and `close` makes the summary; a channel whose count shows that some but not all were there goes
through `careful` instead. Sums are taken about the window's first sample, which keeps the cancellation in the squares
below the number of ticks, at most TICKS_MAX, times the rounding of one.
"""

# ruff: noqa: FURB136 -- `a if a < b else b` is one operation and ignores a NaN in a; min and max are more

from __future__ import annotations

import math
from typing import Any

import numpy as np

from gpuguard.kernels.windows import (
    ABOVE,
    BELOW,
    FIRST,
    LAST,
    M2,
    MAX,
    MEAN,
    MIN,
    PAIR_PRODUCT,
    PAIR_SUM,
    PAIRS,
    ROUGH,
    RUN_FIRST,
    RUN_LAST,
    RUN_MAX,
    TICK_M2,
    TICK_MEAN,
    TICK_VALUE,
    TICKS,
    VALUE_MAX,
    N,
)

ZERO, ONE, TWO = np.float32(0), np.float32(1), np.float32(2)
INFINITY, NAN, LARGEST = np.float32(np.inf), np.float32(np.nan), np.float32(VALUE_MAX)

# Fields of an open summary that a closed one lacks: sums about the first sample, and the sample before.
SUM, SQUARES, TICK_SUM, PRODUCTS, BEGIN, BEFORE = MEAN, M2, TICK_VALUE, PAIR_PRODUCT, FIRST, LAST


def begin(s: Any, at: Any, by: Any, first: Any) -> None:
    """Open a summary about its first sample."""
    s[at + N * by] = s[at + SUM * by] = s[at + SQUARES * by] = s[at + TICK_SUM * by] = s[at + PRODUCTS * by] = ZERO
    s[at + BELOW * by] = s[at + ABOVE * by] = s[at + ROUGH * by] = ZERO
    s[at + RUN_FIRST * by] = s[at + RUN_LAST * by] = s[at + RUN_MAX * by] = ZERO
    s[at + MIN * by], s[at + MAX * by] = INFINITY, -INFINITY
    s[at + BEGIN * by] = s[at + BEFORE * by] = first


def two_ticks(s: Any, at: Any, by: Any, v: Any, w: Any, when: Any, low: Any, high: Any, flat: Any) -> None:
    """Add two samples, ``v`` of tick ``when`` and ``w`` of the next. Two at once, for half the loads and stores."""
    about, before = s[at + BEGIN * by], s[at + BEFORE * by]
    c, d, e = before - about, v - about, w - about
    s[at + N * by] += (ONE if abs(v) <= LARGEST else ZERO) + (ONE if abs(w) <= LARGEST else ZERO)
    s[at + SUM * by] += d + e
    s[at + SQUARES * by] += d * d + e * e
    s[at + TICK_SUM * by] += when * d + (when + ONE) * e
    s[at + PRODUCTS * by] += c * d + d * e
    least, most = s[at + MIN * by], s[at + MAX * by]
    less, more = (v if v < w else w), (w if v < w else v)
    s[at + MIN * by], s[at + MAX * by] = (less if less < least else least), (more if more > most else most)
    s[at + BELOW * by] += (ONE if v < low else ZERO) + (ONE if w < low else ZERO)
    s[at + ABOVE * by] += (ONE if v > high else ZERO) + (ONE if w > high else ZERO)
    here, there = abs(v - before), abs(w - v)
    s[at + ROUGH * by] += here + there
    run = (s[at + RUN_LAST * by] if here <= flat else ZERO) + ONE
    after = (run if there <= flat else ZERO) + ONE
    longest, run_first = s[at + RUN_MAX * by], s[at + RUN_FIRST * by]
    longest = run if run > longest else longest
    run_first = run if run == when + ONE else run_first
    s[at + RUN_LAST * by], s[at + RUN_MAX * by] = after, after if after > longest else longest
    s[at + RUN_FIRST * by] = after if after == when + TWO else run_first
    s[at + BEFORE * by] = w


def close(s: Any, at: Any, by: Any, ticks: Any) -> None:
    """Turn sums about the first sample of ``ticks`` into a summary, a true one if its N shows that all were there."""
    n = np.float32(ticks)
    about, total, last = s[at + BEGIN * by], s[at + SUM * by], s[at + BEFORE * by]
    mean, middle, pairs = total / n, (n - ONE) / TWO, n - ONE
    ends = TWO * total - (last - about)
    square = s[at + SQUARES * by] - total * mean
    s[at + TICKS * by] = n
    s[at + MEAN * by] = about + mean
    s[at + M2 * by] = square if square > ZERO else ZERO
    s[at + TICK_MEAN * by] = middle
    s[at + TICK_M2 * by] = n * (n * n - ONE) / np.float32(12)
    s[at + TICK_VALUE * by] -= middle * total
    s[at + PAIRS * by] = pairs
    s[at + PAIR_SUM * by] = ends - TWO * pairs * mean
    s[at + PAIR_PRODUCT * by] -= mean * (ends - pairs * mean)


def careful(x: Any, c: Any, ticks: Any, s: Any, at: Any, by: Any, low: Any, high: Any, flat: Any) -> None:
    """Summarise channel ``c`` of a window some of whose samples are missing."""
    n = ticks_sum = ticks_squares = total = squares = tick_value = pairs = pair_sum = products = ZERO
    below = above = rough = run = run_first = run_max = about = ZERO
    least, most, before = INFINITY, -INFINITY, NAN
    for t in range(ticks):
        v, when = x[t, c], np.float32(t)
        if abs(v) <= LARGEST:
            about = v if n == ZERO else about
            d, step = v - about, abs(v - before)
            n += ONE
            ticks_sum += when
            ticks_squares += when * when
            total += d
            squares += d * d
            tick_value += when * d
            least, most = min(least, v), max(most, v)
            below += ONE if v < low else ZERO
            above += ONE if v > high else ZERO
            run = run + ONE if step <= flat else ONE
            if step >= ZERO:
                pairs += ONE
                pair_sum += d + (before - about)
                products += d * (before - about)
                rough += step
            before = v
        else:
            run, before = ZERO, NAN
        run_max = max(run, run_max)
        run_first = run if run == when + ONE else run_first
    share = ONE / max(n, ONE)
    mean, middle = total * share, ticks_sum * share
    s[at + TICKS * by], s[at + N * by], s[at + MEAN * by] = np.float32(ticks), n, about + mean
    s[at + M2 * by], s[at + MIN * by], s[at + MAX * by] = max(squares - total * mean, ZERO), least, most
    s[at + TICK_MEAN * by], s[at + TICK_M2 * by] = middle, ticks_squares - ticks_sum * middle
    s[at + TICK_VALUE * by] = tick_value - ticks_sum * mean
    s[at + PAIRS * by], s[at + PAIR_SUM * by] = pairs, pair_sum - TWO * pairs * mean
    s[at + PAIR_PRODUCT * by] = products - mean * (pair_sum - pairs * mean)
    s[at + BELOW * by], s[at + ABOVE * by], s[at + ROUGH * by] = below, above, rough
    s[at + FIRST * by] = x[0, c] if abs(x[0, c]) <= LARGEST else NAN
    s[at + LAST * by] = before
    s[at + RUN_FIRST * by], s[at + RUN_LAST * by], s[at + RUN_MAX * by] = run_first, run, run_max


def merge(s: Any, a: Any, b: Any, by: Any, flat: Any) -> None:
    """Merge the summary at ``b`` into that at ``a``, which it follows at once. See `windows.merge`."""
    n_a, n_b, ticks_a, ticks_b = s[a + N * by], s[b + N * by], s[a + TICKS * by], s[b + TICKS * by]
    mean_a, mean_b, tick_a, tick_b = s[a + MEAN * by], s[b + MEAN * by], s[a + TICK_MEAN * by], s[b + TICK_MEAN * by]
    n = n_a + n_b
    share = n_b / (n if n > ONE else ONE)
    both, apart, ticks_apart = n_a * share, mean_b - mean_a, tick_b + ticks_a - tick_a
    mean = mean_a + apart * share
    last, first, first_a, last_b = s[a + LAST * by], s[b + FIRST * by], s[a + FIRST * by], s[b + LAST * by]
    step = abs(first - last)
    pair = ONE if step >= ZERO else ZERO
    left, right = (last - mean if step >= ZERO else ZERO), (first - mean if step >= ZERO else ZERO)
    moved_a, moved_b = mean_a - mean, mean_b - mean
    pairs_a, pairs_b, sum_a, sum_b = s[a + PAIRS * by], s[b + PAIRS * by], s[a + PAIR_SUM * by], s[b + PAIR_SUM * by]
    products = s[a + PAIR_PRODUCT * by] + s[b + PAIR_PRODUCT * by] + left * right
    products += moved_a * (sum_a + pairs_a * moved_a) + moved_b * (sum_b + pairs_b * moved_b)
    least, most, longest = s[a + MIN * by], s[a + MAX * by], s[a + RUN_MAX * by]
    least_b, most_b, longest_b = s[b + MIN * by], s[b + MAX * by], s[b + RUN_MAX * by]
    begin_a, end_a, begin_b, end_b = (
        s[a + RUN_FIRST * by], s[a + RUN_LAST * by], s[b + RUN_FIRST * by], s[b + RUN_LAST * by])
    joined = end_a + begin_b if step <= flat else ZERO
    longest = longest_b if longest_b > longest else longest
    s[a + N * by], s[a + MEAN * by], s[a + TICKS * by] = n, mean, ticks_a + ticks_b
    s[a + M2 * by] += s[b + M2 * by] + apart * apart * both
    s[a + TICK_MEAN * by] = tick_a + ticks_apart * share
    s[a + TICK_M2 * by] += s[b + TICK_M2 * by] + ticks_apart * ticks_apart * both
    s[a + TICK_VALUE * by] += s[b + TICK_VALUE * by] + ticks_apart * apart * both
    s[a + PAIRS * by] = pairs_a + pairs_b + pair
    s[a + PAIR_SUM * by] = sum_a + sum_b + TWO * (pairs_a * moved_a + pairs_b * moved_b) + left + right
    s[a + PAIR_PRODUCT * by] = products
    s[a + MIN * by], s[a + MAX * by] = (least_b if least_b < least else least), (most_b if most_b > most else most)
    s[a + BELOW * by] += s[b + BELOW * by]
    s[a + ABOVE * by] += s[b + ABOVE * by]
    s[a + ROUGH * by] += s[b + ROUGH * by] + (step if step >= ZERO else ZERO)
    s[a + FIRST * by] = first if ticks_a == ZERO else first_a
    s[a + LAST * by] = last if ticks_b == ZERO else last_b
    s[a + RUN_MAX * by] = joined if joined > longest else longest
    s[a + RUN_FIRST * by] = begin_b if ticks_a == ZERO else (
        joined if step <= flat and begin_a == ticks_a else begin_a)
    s[a + RUN_LAST * by] = end_a if ticks_b == ZERO else (joined if step <= flat and end_b == ticks_b else end_b)


def finish(s: Any, at: Any, by: Any, out: Any, to: Any, over: Any) -> None:
    """Write the eleven features of a summary to ``out[to + k * over]``. See `windows.finish`."""
    n, pairs, mean, square = s[at + N * by], s[at + PAIRS * by], s[at + MEAN * by], s[at + M2 * by]
    least, most, spread, tilt = s[at + MIN * by], s[at + MAX * by], s[at + TICK_M2 * by], s[at + TICK_VALUE * by]
    products, rough, longest = s[at + PAIR_PRODUCT * by], s[at + ROUGH * by], s[at + RUN_MAX * by]
    below, above = s[at + BELOW * by], s[at + ABOVE * by]
    share = ONE / n if n > ZERO else NAN
    pair_share = ONE / pairs if pairs > ZERO else NAN
    variance = square * share
    lag1 = products * pair_share / (variance if variance > ZERO else ONE)
    lag1 = lag1 if variance > ZERO else pair_share * ZERO
    lag1 = ONE if lag1 > ONE else lag1
    out[to] = n
    out[to + over] = mean if n > ZERO else NAN
    out[to + 2 * over] = math.sqrt(variance)
    out[to + 3 * over] = least if n > ZERO else NAN
    out[to + 4 * over] = most if n > ZERO else NAN
    out[to + 5 * over] = tilt / (spread if spread > ZERO else NAN)
    out[to + 6 * over] = -ONE if lag1 < -ONE else lag1
    out[to + 7 * over] = below * share
    out[to + 8 * over] = above * share
    out[to + 9 * over] = rough * pair_share
    out[to + 10 * over] = longest
