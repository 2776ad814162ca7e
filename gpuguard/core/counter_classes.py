"""What kind of work the features of counters look like, by a forest whose arrays are given.

Classes are families of mining, as far as counters can tell them, training, inference and other compute; what is not at
work is idle and is not asked about. The forest adds a score for each class; their softmax is the probability of each
under the priors that it was trained with (mining and the rest alike), so that the log-odds of mining are the weight of
one look in nats, before `Model.line` and the bounds make it one that may be added up.

The arrays are plain, and come from outside: the core opens no file. `gpuguard.counters.shipped` reads them.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from gpuguard.core.counter_features import FEATURES
from gpuguard.kernels import forest as trees
from gpuguard.kernels.opcodes import Forest

if TYPE_CHECKING:
    from collections.abc import Mapping

MINING = "mining:"


class Model(NamedTuple):
    """A forest, the names of its classes, and how its log-odds become nats.

    ``line`` is (slope, offset) from log-odds of mining to nats; one look weighs between ``nats_least`` and
    ``nats_most``. ``allowance`` is what a sum of looks must beat to rise. ``digest`` names the model: recordings carry
    it, so that a replay by another one is told.
    """

    forest: trees.Packed
    classes: tuple[str, ...]
    line: tuple[float, float]
    nats_least: float
    nats_most: float
    allowance: float
    digest: str = ""

    def judge(self, features: np.ndarray, backend: str = "numpy") -> tuple[np.ndarray, np.ndarray]:
        """Return the weight of each row in nats for mining, and float64[rows, classes] of probabilities."""
        scores = trees.scores(features, self.forest, backend)[0].astype(np.float64)
        raised = np.exp(scores - scores.max(axis=1, keepdims=True))
        probabilities = raised / raised.sum(axis=1, keepdims=True)
        mining = np.array([name.startswith(MINING) for name in self.classes])
        guilty = np.clip(probabilities[:, mining].sum(axis=1), 1e-12, 1 - 1e-12)
        nats = self.line[0] * np.log(guilty / (1 - guilty)) + self.line[1]
        return np.clip(nats, self.nats_least, self.nats_most), probabilities


def model_from(arrays: Mapping[str, Any]) -> Model:
    """Return the model that these arrays are. Raises ValueError for arrays that are of another version or broken."""
    if tuple(arrays["feature_names"].tolist()) != FEATURES:
        raise ValueError("the model was trained on other features")
    forest = Forest(**{name: arrays[name] for name in Forest._fields if name != "base"}, base=0.0)
    packed = trees.pack(forest, len(FEATURES), arrays["class_of"])
    classes = tuple(arrays["classes"].tolist())
    if packed.classes != len(classes):
        raise ValueError("the model's trees and its classes do not fit each other")
    slope, offset = arrays["line"].tolist()
    least, most, allowance = arrays["bounds"].tolist()
    return Model(packed, classes, (slope, offset), least, most, allowance, digest_of(arrays))


def digest_of(arrays: Mapping[str, Any]) -> str:
    """Return SHA-256, in hex, of what arrays hold, whatever file they came in."""
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype.str} {array.shape} ".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
