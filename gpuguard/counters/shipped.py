"""The counter model that comes with the product: models/counter_forest.npz, its card beside it."""

from __future__ import annotations

import functools
from importlib.resources import files

import numpy as np

from gpuguard.core.counter_classes import Model, model_from


@functools.cache
def shipped_model() -> Model:
    """Read the model."""
    with files("gpuguard.models").joinpath("counter_forest.npz").open("rb") as file, np.load(file) as arrays:
        return model_from(dict(arrays))
