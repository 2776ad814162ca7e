"""Sharing a device's counters out to the processes on it, with the uncertainty said.

Power, energy and GPM activity are the device's, or the MIG instance's; no counter of a process tells tensor work from
integer work. What is known of a process is the part of the time that its kernels ran (``sm_ratio`` of NVML) and how
many kernels it launched. This is what can be concluded from that, and no more:

- A process alone on its device did all of it.
- The *time share* s is a process's part of the SM time, the *launch share* l its part of the launches. Both measure
  one thing, each with its own error (NVML counts in whole percents, launches differ in length), so the likely share is
  their product under a square root: where they agree it is either, where they disagree less than 1 is shared out, and
  what is left (the Bhattacharyya distance of the two) belongs to nobody. The bounds hold both.
- Work of any one kind is not shared as time is: one tenant may do all the tensor work and the other none. Only this is
  certain: while a process is not running it does nothing, and no pipe is more than fully active. So with busy time b
  of each process, and X of the device, a process did at most min(X, b) and at least X minus the others' b (the
  Frechet bounds). They are what ``low`` and ``high`` say; ``likely`` assumes that all work with equal intensity.

The bounds hold where every process on the device is given, idle ones too, and ``sm_ratio`` covers the same span as
the counter. Nothing known is None, and never an even split.

    shares = time_shares({process: Tenant(sm_ratio=0.9, launches=120), other: Tenant(sm_ratio=0.05, launches=4)})
    imma = attribute(sample.gpm.tensor_imma_ratio, shares)                                 # a ratio: 0 to 1
    watts = attribute(sample.power_w, shares, floor=idle_w, ceiling=device.power_limit_w)  # above what idles
    joules = attribute(energy_used_j, shares, floor=idle_w * seconds, ceiling=device.power_limit_w * seconds)
"""

from __future__ import annotations

import math
from itertools import accumulate
from typing import TYPE_CHECKING, Literal, TypeVar

from msgspec import Struct

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

K = TypeVar("K")

#: NVML gives whole percents.
SM_ERROR = 0.01
#: Without a second witness: what NVML's samples of a process were seen to miss is not known, so this is a margin.
ALONE_ERROR = 0.05
#: Shares that differ by more are worth a word.
DISAGREEMENT = 0.1

Basis = Literal["sole", "sm_and_launches", "sm", "launches", "bounds"]


class Tenant(Struct, frozen=True):
    """One process on a device over a span: mean ``sm_ratio`` (0..1) and launches in it; None where not known."""

    sm_ratio: float | None = None
    launches: int | None = None


class Share(Struct, frozen=True):
    """One process's part of the SM time: ``busy_*`` of the span (0..1), ``low`` to ``high`` of what was used of it.

    ``likely`` is None where there are only bounds. ``note`` says what made the bounds wide, "" if nothing did.
    """

    low: float
    likely: float | None
    high: float
    busy_low: float
    busy_high: float
    basis: Basis
    note: str = ""


class Part(Struct, frozen=True):
    """What one process did of a counter, in the counter's unit; ``likely`` and ``note`` as in `Share`."""

    low: float
    likely: float | None
    high: float
    basis: Basis
    note: str = ""


def time_shares(tenants: Mapping[K, Tenant], *, gpu_ratio: float | None = None) -> dict[K, Share | None]:
    """Return each process's part of the SM time of one device; None where nothing is known.

    Parameters
    ----------
    tenants
        Every process that holds the device, idle ones too.
    gpu_ratio
        Time with any kernel at all: it bounds those whose own time is not told.
    """
    if len(tenants) == 1:
        (process, tenant), = tenants.items()
        busy = _ratio(tenant.sm_ratio)
        return {process: Share(1.0, 1.0, 1.0, busy or 0.0, 1.0 if busy is None else busy, "sole")}
    busy_by = {process: _ratio(tenant.sm_ratio) for process, tenant in tenants.items()}
    launch_shares = _launch_shares(tenants)
    told = sum(busy for busy in busy_by.values() if busy is not None)
    if not told:
        return _by_launches(tenants, launch_shares, _ratio(gpu_ratio))
    span = {process: _busy(busy, told, launch_shares.get(process), _ratio(gpu_ratio))
            for process, busy in busy_by.items()}
    whole = max(told, _ratio(gpu_ratio) or 0.0) if None in busy_by.values() else told
    others_low, others_high = (sums_of_others(ends) for ends in zip(*span.values(), strict=True))
    found: dict[K, Share | None] = {}
    for (process, busy), *others in zip(busy_by.items(), others_low, others_high, strict=True):
        low, high = _of_total(*span[process], *others)
        likely = _likely(busy, whole, launch_shares.get(process))
        found[process] = Share(low, likely, high, *span[process], *_said(busy, told, launch_shares.get(process)))
    return found


def attribute(
    value: float | None, shares: Mapping[K, Share | None], *, floor: float = 0.0, ceiling: float | None = 1.0,
) -> dict[K, Part | None]:
    """Return what each process did of a device's counter; None where nothing is known of the counter or the process.

    Parameters
    ----------
    value
        The counter over the span of the shares.
    shares
        All processes of the device, as `time_shares` gave them.
    floor, ceiling
        What the counter shows while nothing runs, and the most that it can show; None, or not above the floor: no such
        limit is known.
    """
    if value is None or not math.isfinite(value):
        return dict.fromkeys(shares)
    used = max(0.0, value - floor)
    room = math.inf if ceiling is None or ceiling <= floor else ceiling - floor
    reaches = [0.0 if share is None else _reach(share, room) for share in shares.values()]
    reach = sum(reaches)
    # More than all of them can have done in their time: the counter and the busy time are not of one moment.
    stretch = used / reach if 0 < reach < used else 1.0
    found: dict[K, Part | None] = {}
    for (process, share), others in zip(shares.items(), sums_of_others(reaches), strict=True):
        if share is None:
            found[process] = None
            continue
        if share.basis == "sole":
            found[process] = Part(used, used, used, "sole")
            continue
        high = min(used, _reach(share, room) * stretch)
        low = min(max(0.0, used - others * stretch), high)
        likely = None if share.likely is None else min(max(share.likely * used, low), high)
        note = share.note if stretch == 1.0 else "more than the busy time explains"
        found[process] = Part(low, likely, high, share.basis, note)
    return found


def sums_of_others(values: Sequence[float]) -> list[float]:
    """Return for each value the sum of all others: not by subtraction, in which what is small or infinite is lost."""
    before = list(accumulate(values, initial=0.0))[:-1]
    after = list(accumulate(reversed(values), initial=0.0))[-2::-1]
    return [one + other for one, other in zip(before, after, strict=True)]


def _reach(share: Share, room: float) -> float:
    """Return the most that a process can have done in its time."""
    return share.busy_high * room if share.busy_high else 0.0


def _ratio(value: float | None) -> float | None:
    """Return a ratio in 0..1; None for what is none."""
    return None if value is None or not math.isfinite(value) else min(max(value, 0.0), 1.0)


def _launch_shares(tenants: Mapping[K, Tenant]) -> dict[K, float]:
    """Return each process's part of the launches; nothing where those of one are not known, or nobody launched."""
    launches = {process: tenant.launches for process, tenant in tenants.items() if tenant.launches is not None}
    total = sum(max(0, count) for count in launches.values())
    if len(launches) < len(tenants) or not total:
        return {}
    return {process: max(0, count) / total for process, count in launches.items()}


def _busy(busy: float | None, told: float, launch_share: float | None, gpu_ratio: float | None) -> tuple[float, float]:
    """Return the least and the most time that a process ran."""
    if busy is None:
        # Idle, or not sampled: at most what the others leave, if they take turns (more than all: they do not). Who
        # launched nothing either has two witnesses for being idle.
        left, error = 1.0 if gpu_ratio is None else gpu_ratio - told, SM_ERROR if launch_share == 0 else ALONE_ERROR
        return 0.0, min(1.0, max(left, 0.0) + error if left >= -ALONE_ERROR else gpu_ratio or 1.0)
    if launch_share is None:
        return max(0.0, busy - ALONE_ERROR), min(1.0, busy + ALONE_ERROR)
    by_launches = launch_share * told
    return max(0.0, min(busy, by_launches) - SM_ERROR), min(1.0, max(busy, by_launches) + SM_ERROR)


def _of_total(low: float, high: float, others_low: float, others_high: float) -> tuple[float, float]:
    """Return the least and the most share of a process, whatever the others did within their bounds."""
    return (low / (low + others_high) if low else 0.0), (high / (high + others_low) if high else 0.0)


def _likely(busy: float | None, whole: float, launch_share: float | None) -> float | None:
    if busy is None:
        return None
    return busy / whole if launch_share is None else math.sqrt(busy / whole * launch_share)


def _said(busy: float | None, told: float, launch_share: float | None) -> tuple[Basis, str]:
    """Return what a share rests on, and what is wrong with that."""
    if busy is None:
        return "bounds", "no SM time told: idle, or not looked at"
    if launch_share is None:
        return "sm", "launches not known for all processes of the device"
    share = busy / told
    if abs(share - launch_share) > DISAGREEMENT:
        return "sm_and_launches", f"SM share {share:.0%} and launch share {launch_share:.0%} disagree"
    return "sm_and_launches", ""


def _by_launches(
    tenants: Mapping[K, Tenant], launch_shares: Mapping[K, float], gpu_ratio: float | None,
) -> dict[K, Share | None]:
    """Return what launches alone say: who launched more, not who ran longer."""
    busy_high = 1.0 if gpu_ratio is None else gpu_ratio
    note = "SM time not told: launches say nothing of how long they ran"
    return {process: Share(0.0, launch_shares[process], 1.0, 0.0, busy_high, "launches", note)
            if launch_shares else None for process in tenants}
