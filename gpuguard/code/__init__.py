"""GPU machine code: from the bytes that a process loads to a verdict per kernel.

`classify(rows)` judges kernels that are decoded already, as rows of `gpuguard.code.rows` or in their text form.
"""

from __future__ import annotations

from gpuguard.code.classify import CodeVerdict, classify

__all__ = ["CodeVerdict", "classify"]
