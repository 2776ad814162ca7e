"""Classification kernels: one file a family, each with a plain reference and its compiled forms side by side.

Every family takes ``backend`` and tells by the same words which form it used:

==========  ===========================================================================================================
reference   written for the eye, decides what is right
numpy       by whole columns, where a family has that form
cpu         Numba on one core: the fastest where there is much to do, after seconds of compiling
cuda        Numba on a GPU, see below
auto        of the first two the faster for the size at hand; "cuda" if a device is allotted. Not "cpu": loading Numba
            takes a second and compiling five more, in which a daemon would be blind, and a guard that gave its
            privileges up may be unable to read it. Only `opcodes` takes it, for thousands of rows, which scans have
==========  ===========================================================================================================

A GPU's memory and time are its tenant's. So nothing here touches one unless the caller names it, by ``backend="cuda"``
or by ``device``, the index of a GPU that the operator allotted. Arrays that are on a GPU already (CuPy's, or any with
``__cuda_array_interface__``) are read where they are, on the stream that they name, and the result stays there; no
other form fetches them. What every call reads, the nodes of a forest or the levels of windows, is taken there once by
whoever calls: nothing here keeps it in secret.

To import any of these files loads neither Numba nor CuPy.
"""

from __future__ import annotations

BACKENDS = ("auto", "reference", "numpy", "cpu", "cuda")


def chosen(backend: str, device: int | None, default: str) -> str:
    """Return the form to use. Raises `ValueError` for none of BACKENDS, and for a device that would not be used."""
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is none of {', '.join(BACKENDS)}")
    if backend == "auto":
        return default if device is None else "cuda"
    if device is not None and backend != "cuda":
        raise ValueError(f"device {device} for backend {backend!r}, which uses none")
    return backend
