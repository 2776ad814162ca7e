"""Shares of a device: the bounds hold the truth of simulated mixtures, and nothing is made up."""

from __future__ import annotations

import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from gpuguard.core.attribution import ALONE_ERROR, Tenant, attribute, sums_of_others, time_shares

fractions = st.floats(0, 1, allow_nan=False)
tenants = st.builds(
    Tenant, sm_ratio=st.none() | st.floats(allow_nan=True), launches=st.none() | st.integers(-(2**40), 2**40))


@st.composite
def mixtures(draw):
    """Processes that take turns: (true busy time, intensity, launches, told sm_ratio) of each."""
    count = draw(st.integers(2, 6))
    weights = draw(st.lists(st.floats(0.01, 1), min_size=count, max_size=count))
    busy_whole = draw(st.floats(0.05, 1))
    busy = [busy_whole * weight / sum(weights) for weight in weights]
    intensities = draw(st.lists(fractions, min_size=count, max_size=count))
    launches = draw(st.lists(st.integers(1, 10**9), min_size=count, max_size=count))
    return list(zip(busy, intensities, launches, strict=True))


def told(busy):
    """As NVML tells it: whole percents."""
    return round(busy * 100) / 100


@given(st.lists(st.floats(0, 1e6) | st.just(math.inf), max_size=40))
def test_the_sum_of_others_is_that_of_all_but_one(values):
    for i, others in enumerate(sums_of_others(values)):
        assert others == pytest.approx(sum(values[:i] + values[i + 1:]), rel=1e-12)
    assert len(sums_of_others(values)) == len(values)


@given(mixtures(), st.booleans())
def test_the_bounds_hold_what_each_process_did(mixture, with_launches):
    seen = {i: Tenant(told(busy), launches if with_launches else None) for i, (busy, _, launches) in enumerate(mixture)}
    assume(sum(one.sm_ratio for one in seen.values()) > 0)
    shares = time_shares(seen)
    value = sum(busy * intensity for busy, intensity, _ in mixture)
    parts = attribute(value, shares)
    whole = sum(busy for busy, _, _ in mixture)
    for i, (busy, intensity, _) in enumerate(mixture):
        assert shares[i].busy_low - 1e-9 <= busy <= shares[i].busy_high + 1e-9
        assert shares[i].low - 1e-9 <= busy / whole <= shares[i].high + 1e-9
        assert parts[i].low - 1e-9 <= busy * intensity <= parts[i].high + 1e-9


@given(mixtures(), st.floats(20, 120), st.floats(200, 1200))
def test_power_above_idle_is_within_its_bounds(mixture, idle_w, limit_w):
    shares = time_shares({i: Tenant(told(busy), launches) for i, (busy, _, launches) in enumerate(mixture)})
    assume(all(shares.values()))
    dynamic = [busy * intensity * (limit_w - idle_w) for busy, intensity, _ in mixture]
    for i, part in attribute(idle_w + sum(dynamic), shares, floor=idle_w, ceiling=limit_w).items():
        assert part.low - 1e-6 <= dynamic[i] <= part.high + 1e-6
    # Without a limit of the board nothing bounds one process, and the bounds say so.
    for part in attribute(idle_w + sum(dynamic), shares, floor=idle_w, ceiling=None).values():
        assert part.low == 0
        assert part.high == pytest.approx(sum(dynamic))


@given(mixtures(), st.integers(0, 5))
def test_a_process_that_is_not_told_is_bounded_by_what_the_others_leave(mixture, hidden):
    hidden %= len(mixture)
    seen = {i: Tenant(None if i == hidden else told(busy)) for i, (busy, _, _) in enumerate(mixture)}
    assume(any(one.sm_ratio for one in seen.values()))
    whole = sum(busy for busy, _, _ in mixture)
    shares = time_shares(seen, gpu_ratio=whole)
    assert shares[hidden].likely is None
    assert shares[hidden].basis == "bounds"
    assert mixture[hidden][0] <= shares[hidden].busy_high + 1e-9
    assert sum(one.likely for one in shares.values() if one.likely is not None) <= 1 + 1e-9


@given(st.dictionaries(st.integers(), tenants, max_size=8), st.none() | fractions, st.none() | st.floats(),
       st.floats(0, 1e6), st.none() | st.floats(0, 1e6))
def test_shares_add_up_to_no_more_than_there_is(seen, gpu_ratio, value, floor, ceiling):
    shares = time_shares(seen, gpu_ratio=gpu_ratio)
    parts = attribute(value, shares, floor=floor, ceiling=ceiling)
    assert list(shares) == list(parts) == list(seen)
    likely = [share.likely for share in shares.values() if share is not None and share.likely is not None]
    assert sum(likely) <= 1 + 1e-9
    for share in shares.values():
        if share is not None:
            assert 0 <= share.low <= share.high <= 1
            assert 0 <= share.busy_low <= share.busy_high <= 1
            assert share.likely is None or share.low - 1e-9 <= share.likely <= share.high + 1e-9
    used = max(0.0, value - floor) if value is not None and math.isfinite(value) else 0.0
    done = [part for part in parts.values() if part is not None]
    assert sum(part.likely for part in done if part.likely is not None) <= used * (1 + 1e-9) + 1e-9
    for part in done:
        assert 0 <= part.low <= part.high <= used or part.low == pytest.approx(part.high)
        assert part.likely is None or part.low <= part.likely <= part.high


@given(st.lists(tenants, min_size=2, max_size=6), st.randoms(use_true_random=False), fractions)
def test_the_order_of_the_processes_does_not_matter(seen, random, value):
    order = list(range(len(seen)))
    random.shuffle(order)
    straight = attribute(value, time_shares(dict(enumerate(seen)), gpu_ratio=0.9))
    shuffled = attribute(value, time_shares({i: seen[i] for i in order}, gpu_ratio=0.9))
    for i, part in straight.items():
        if part is None:
            assert shuffled[i] is None
        else:
            assert shuffled[i].low == pytest.approx(part.low)
            assert shuffled[i].high == pytest.approx(part.high)
            assert shuffled[i].likely == (None if part.likely is None else pytest.approx(part.likely))


def test_a_process_alone_did_all_of_it():
    for tenant in (Tenant(), Tenant(0.0), Tenant(0.7, 12)):
        part = attribute(0.5, time_shares({"a": tenant}))["a"]
        assert (part.low, part.likely, part.high, part.basis) == (0.5, 0.5, 0.5, "sole")


def test_nothing_known_is_none_and_not_an_even_split():
    assert time_shares({"a": Tenant(), "b": Tenant()}) == {"a": None, "b": None}
    assert attribute(0.5, time_shares({"a": Tenant(), "b": Tenant()})) == {"a": None, "b": None}
    assert time_shares({"a": Tenant(0.0), "b": Tenant(0.0)}) == {"a": None, "b": None}
    assert attribute(None, time_shares({"a": Tenant(0.5, 1)})) == {"a": None}
    assert time_shares({}) == {}


def test_what_agrees_is_narrow_and_what_disagrees_is_wide_and_says_so():
    agreed = time_shares({"a": Tenant(0.6, 600), "b": Tenant(0.2, 200)})
    assert agreed["a"].likely == pytest.approx(0.75)
    assert agreed["a"].high - agreed["a"].low < 0.05
    assert agreed["a"].note == ""
    apart = time_shares({"a": Tenant(0.6, 1), "b": Tenant(0.2, 799)})
    assert apart["a"].high - apart["a"].low > 0.7
    assert "disagree" in apart["a"].note
    assert apart["a"].likely + apart["b"].likely < 0.6  # most of it belongs to nobody


def test_a_missing_witness_widens_and_says_so():
    both = time_shares({"a": Tenant(0.6, 600), "b": Tenant(0.2, 200)})
    one = time_shares({"a": Tenant(0.6, 600), "b": Tenant(0.2, None)})
    assert one["a"].basis == "sm"
    assert "launches" in one["a"].note
    assert one["a"].high - one["a"].low > both["a"].high - both["a"].low
    assert one["a"].busy_high == pytest.approx(0.6 + ALONE_ERROR)
    launches = time_shares({"a": Tenant(None, 600), "b": Tenant(None, 200)}, gpu_ratio=0.4)
    assert (launches["a"].low, launches["a"].likely, launches["a"].high) == (0, 0.75, 1)
    assert launches["a"].busy_high == 0.4


def test_a_miner_beside_a_busy_trainer_cannot_hide_its_integer_work():
    # The trainer runs 70 % of the time on HMMA, the miner 25 % on IMMA: both show on the device.
    shares = time_shares({"trainer": Tenant(0.70, 7000), "miner": Tenant(0.25, 2500)})
    hmma = attribute(0.60, shares)
    assert hmma["trainer"].low > 0.3
    assert hmma["miner"].high == pytest.approx(0.26, abs=1e-6)
    assert hmma["miner"].low == 0


def test_a_counter_that_the_time_does_not_explain_is_said():
    parts = attribute(0.9, time_shares({"a": Tenant(0.2, 2), "b": Tenant(0.1, 1)}))
    assert all(part.note == "more than the busy time explains" for part in parts.values())
