"""What the counters of a whole job are worth: how seldom an honest job comes as high, by honest jobs that were seen.

What a job is, is drawn once. Its looks are alike because it goes on being what it is, so a sum of them grows for ever
in a job that looks a little like mining, and passes every threshold: that they are many is no evidence. So looks are
added up only as far as jobs differ from each other. The *height* of a job is its sum of looks, shrunk:

    height = S / (n + `SHRINK`)

for a sum S over n looks: the estimate of what the job's looks are worth in the long run, drawn to nothing while little
was seen (Buehlmann's credibility, 1967: the shrinkage is the variance within a job over that between jobs). It does not
grow with time.

What a height is worth is read off honest jobs, each judged by a forest that was shown no work of its nature, since an
unknown program is what a site has. Looks of a job are not exchangeable; jobs drawn from the same kinds of work are. So
the chance that one more of them ever comes as high is (1 + those that did) / (1 + all), whatever jobs are like
(conformal; Vovk, Gammerman and Shafer 2005), and never less than 1 / (1 + all): no more can be shown by counting.

That is the rate of the mix that was replayed. Jobs of one kind are alike, so how far it holds for another mix is told
by bounds for which kinds, and not jobs, are drawn anew, through a generalised Pareto tail over the highest jobs (McNeil
and Frey 2000; Coles 2001), since the few jobs at the top are too few to be drawn from. The same tail goes on, as an
assumption, where counting ends. For a kind that nobody replayed nothing of that holds: it is exchangeable with kinds at
best, and k kinds show no chance below 1 / (1 + k) (Dunn, Wasserman and Ramdas 2022).

Alarms a GPU-year are that chance times the jobs of a year, `JOBS_PER_GPU_YEAR`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping

#: Looks by which an estimate is shrunk. Within simulated jobs means of 20 looks vary as if single ones did 2.3 times as
#: much as jobs do among each other; more than twice that keeps short jobs low, of which a year has more.
SHRINK = 6.0
#: Looks that are remembered at full weight: of a job that becomes another, the past fades.
MEMORY = 180
#: A device does one job after the other, each as long as those that were replayed; a longer one counts as several.
JOB_HOURS, HOURS_PER_YEAR = 2.0, 365.25 * 24
JOBS_PER_GPU_YEAR = HOURS_PER_YEAR / JOB_HOURS
#: Bounds of a rate, as quantiles of the resampled tails.
BOUNDS = (0.025, 0.975)
#: Below this a shape is that of an exponential tail.
_NO_SHAPE = 1e-6


class Limit(NamedTuple):
    """The height that makes a job suspect, infinite where none does, and the alarms a GPU-year to expect of it.

    ``counted`` where as many jobs were seen as that takes, else the tail's. ``least`` and ``most`` bound it at 95 %, by
    kinds of work drawn anew; where no tail reaches down to the height they are the rate itself.
    """

    height: float
    alarms: float
    counted: bool
    least: float
    most: float


class Honest(NamedTuple):
    """Heights of honest jobs, ascending, none above ``most``, and a tail: what exceeds ``above`` is Pareto's.

    ``share`` of all, ``shape`` and ``scale`` are float64[1 + resamples]: as fitted, then to kinds of jobs drawn anew.
    """

    heights: np.ndarray
    most: float = math.inf
    above: float = math.inf
    share: np.ndarray = np.zeros(1)
    shape: np.ndarray = np.zeros(1)
    scale: np.ndarray = np.ones(1)

    @property
    def supported(self) -> float:
        """The lowest rate of alarms a GPU-year that can be shown by counting so many jobs."""
        return JOBS_PER_GPU_YEAR / (1 + len(self.heights))

    def reached(self, height: float) -> int:
        """Return how many of the jobs came as high."""
        return len(self.heights) - int(np.searchsorted(self.heights, height, "left"))

    def chance(self, height: float) -> float:
        """Return the chance that an honest job ever comes as high, as counted."""
        return (1 + self.reached(height)) / (1 + len(self.heights))

    def nats(self, height: float) -> float:
        """Return what a height is worth."""
        return -math.log(self.chance(height))

    def limit(self, alarms_per_gpu_year: float) -> Limit:
        """Return the height from which on there are so few alarms."""
        wanted = alarms_per_gpu_year / JOBS_PER_GPU_YEAR
        few = math.floor(wanted * (1 + len(self.heights)) - 1)
        height, counted = math.inf, few >= 0
        if counted:
            # So many jobs may come as high, and the next one must not.
            height = float(np.nextafter(self.heights[-1 - few], math.inf)) if few < len(self.heights) else 0.0
        elif math.isfinite(self.above):
            height = max(self._height(wanted), float(self.heights[-1]))
        if height > self.most or not math.isfinite(height):
            return Limit(math.inf, 0.0, False, 0.0, 0.0)
        tails = self._tail(height) if height > self.above else np.full(1, self.chance(height))
        chance = self.chance(height) if counted else float(tails[0])
        least, most = np.quantile(tails[1:] if len(tails) > 1 else tails, BOUNDS) * JOBS_PER_GPU_YEAR
        return Limit(height, chance * JOBS_PER_GPU_YEAR, counted, float(least), float(most))

    def _tail(self, height: float) -> np.ndarray:
        """Return float64[1 + resamples]: the chance of a height above ``above``, by each tail."""
        over = (height - self.above) / self.scale
        shape = np.where(np.abs(self.shape) < _NO_SHAPE, _NO_SHAPE, self.shape)
        chance: np.ndarray = self.share * np.maximum(1 + shape * over, 0.0) ** (-1 / shape)
        return chance

    def _height(self, chance: float) -> float:
        """Return the height of a chance, by the fitted tail: the other way about."""
        shape = self.shape[0] if abs(self.shape[0]) >= _NO_SHAPE else _NO_SHAPE
        ratio = chance / self.share[0]
        return float(self.above + self.scale[0] / shape * (ratio**-shape - 1))


NONE_SEEN = Honest(np.zeros(0))


def highest(step_nats: float) -> float:
    """Return how high a job can come of which each look raises the sum by so much at most."""
    return step_nats * MEMORY / (MEMORY + SHRINK)


def honest_from(arrays: Mapping[str, Any], most: float) -> Honest:
    """Return the honest jobs that these arrays hold, of a model by which no job comes higher than ``most``."""
    share, shape, scale = arrays["honest_tails"].astype(np.float64)
    return Honest(arrays["honest_heights"].astype(np.float64), most, float(arrays["honest_above"]), share, shape, scale)
