"""What kind of work the features of counters look like, by a forest whose arrays are given.

Classes are families of mining, as far as counters can tell them, training, inference and other compute; what is not at
work is idle and is not asked about. The forest adds a score for each class; the softmax of all but the last is the
probability of each under the priors that it was trained with (mining and the rest alike).

A family that it never saw is not found so: what the pipes do is what sets families apart. So the last class is mining
of *any* family, scored by trees that may ask about rhythm only: how steady, how unbroken, what crosses the host link,
whether tensor cores rest. The weight of a look in nats is a line through both log-odds. It is fitted where half of the
jobs are of kinds that the trees knew and half are not, mining and other work alike: so it leans on what the pipes do
as far as that holds beyond what was drawn.

The arrays are plain, and come from outside: the core opens no file. `gpuguard.counters.shipped` reads them.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from gpuguard.core.counter_features import FEATURES
from gpuguard.core.counter_jobs import NONE_SEEN, Honest, highest, honest_from
from gpuguard.kernels import forest as trees
from gpuguard.kernels.opcodes import Forest

if TYPE_CHECKING:
    from collections.abc import Mapping

MINING = "mining:"
OTHER = MINING + "other"
#: What the forest takes to be how common before it looks.
PRIORS = {"mining": 0.5, "training": 0.125, "inference": 0.125, "compute": 0.25}

Line = tuple[float, float, float]


class Model(NamedTuple):
    """A forest, the names of its classes, and how its log-odds become nats.

    ``classes`` ends with `OTHER`. ``line`` is two slopes, of the log-odds by family and by rhythm, and an offset. One
    look weighs between ``nats_least`` and ``nats_most``. ``allowance`` is what a sum of looks must beat to rise.
    ``honest`` are the jobs that say what a sum is worth.
    ``digest`` names the model: recordings carry it, so that a replay by another one is told.
    """

    forest: trees.Packed
    classes: tuple[str, ...]
    line: Line
    nats_least: float
    nats_most: float
    allowance: float
    honest: Honest = NONE_SEEN
    digest: str = ""

    def odds(self, features: np.ndarray, backend: str = "numpy") -> tuple[np.ndarray, np.ndarray]:
        """Return float64[rows, 2], log-odds of mining by family and by rhythm, and probabilities of all but the last.

        These are what the forest says; `judge` makes nats of them.
        """
        scores = trees.scores(features, self.forest, backend)[0].astype(np.float64)
        known, rhythm = scores[:, :-1], scores[:, -1]
        raised = np.exp(known - known.max(axis=1, keepdims=True))
        probabilities = raised / raised.sum(axis=1, keepdims=True)
        guilty = self._guilty(probabilities)
        return np.stack([np.log(guilty / (1 - guilty)), rhythm], axis=1), probabilities

    def judge(self, features: np.ndarray, backend: str = "numpy") -> tuple[np.ndarray, np.ndarray]:
        """Return the weight of each row in nats for mining, and float64[rows, classes] of probabilities."""
        odds, probabilities = self.odds(features, backend)
        nats = odds @ self.line[:2] + self.line[2]
        # What the families are not sure of is mining of another one.
        mining, guilty = 1 / (1 + np.exp(-nats)), self._guilty(probabilities)
        known = np.minimum(mining, guilty)
        scale = np.where(self._mining, (known / guilty)[:, None], ((1 - mining) / (1 - guilty))[:, None])
        return (np.clip(nats, self.nats_least, self.nats_most),
                np.column_stack([probabilities * scale, mining - known]))

    @property
    def _mining(self) -> np.ndarray:
        return np.array([name.startswith(MINING) for name in self.classes[:-1]])

    def _guilty(self, probabilities: np.ndarray) -> np.ndarray:
        guilty: np.ndarray = np.clip(probabilities[:, self._mining].sum(axis=1), 1e-12, 1 - 1e-12)
        return guilty


def model_from(arrays: Mapping[str, Any]) -> Model:
    """Return the model that these arrays are. Raises ValueError for arrays that are of another version or broken."""
    if tuple(arrays["feature_names"].tolist()) != FEATURES:
        raise ValueError("the model was trained on other features")
    forest = Forest(**{name: arrays[name] for name in Forest._fields if name != "base"}, base=0.0)
    packed = trees.pack(forest, len(FEATURES), arrays["class_of"])
    classes = tuple(arrays["classes"].tolist())
    if packed.classes != len(classes) or classes[-1] != OTHER:
        raise ValueError("the model's trees and its classes do not fit each other")
    known, rhythm, offset = arrays["line"].tolist()
    least, most, allowance = arrays["bounds"].tolist()
    return Model(packed, classes, (known, rhythm, offset), least, most, allowance,
                 honest_from(arrays, highest(most - allowance)), digest_of(arrays))


def digest_of(arrays: Mapping[str, Any]) -> str:
    """Return SHA-256, in hex, of what arrays hold, whatever file they came in."""
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype.str} {array.shape} ".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
