"""Signatures: what is known of GPU code that mines, as data. Text in, checked structures out; files are read outside.

A signature is one TOML document that carries its own proof: samples that it must match and samples that it must not.
One without both, or one that fails its own samples, is refused. Names of kernels are hints: renaming clears nobody, and
a name weighs little without the behaviour beside it.
"""

from __future__ import annotations

import functools
import hashlib
import re
import tomllib
from typing import TYPE_CHECKING, Literal

import msgspec
from msgspec import Struct

from gpuguard.core.labels import LABELS

if TYPE_CHECKING:
    from collections.abc import Mapping

NATS_MAX = 20.0
NAME_CHARS_MAX = 4_096
#: What all evidence by signatures of one maturity may add up to for one process. An experimental one is told and leads
#: to nothing; one under test leads to an action only with evidence of another class beside it; a stable one may alone.
MATURITY_NATS = {"experimental": 0.0, "test": 18.0, "stable": NATS_MAX}
Kind = Literal["kernel-name", "code-sha256", "launch-structure"]


class SignatureError(ValueError):
    """A signature that may not be used; the message names it and says why."""


class Match(Struct, frozen=True, forbid_unknown_fields=True):
    """What has to hold. Bounds are inclusive; one that is absent does not bind, nor does one on what was not told.

    ``names`` are whole base names, ``prefixes`` their beginnings (`base_name`); ``sha256`` digests of loaded images;
    the others bound the features of a window, see kernels/launches.py.
    """

    names: tuple[str, ...] = ()
    prefixes: tuple[str, ...] = ()
    sha256: tuple[str, ...] = ()
    launches_min: int | None = None
    launches_per_s_max: float | None = None
    kernels_max: int | None = None
    geometries_max: int | None = None
    threads_min: int | None = None
    cadence_ratio_min: float | None = None
    graph_ratio_max: float | None = None


class Window(Struct, frozen=True, forbid_unknown_fields=True):
    """Features of one window of launches of one process. ``threads`` of the largest launch; None: not told."""

    launches: int
    launches_per_s: float
    kernels: int
    geometries: int
    cadence_ratio: float
    graph_ratio: float = 0.0
    threads: int | None = None


class Sample(Struct, frozen=True, forbid_unknown_fields=True):
    """One thing seen, and whether the signature must match it. ``what`` says where it is from."""

    matches: bool
    what: str
    name: str = ""
    sha256: str = ""
    window: Window | None = None


class Signature(Struct, frozen=True, forbid_unknown_fields=True):
    """One signature. ``nats`` is what one match weighs, and ``why`` argues it."""

    id: str
    version: int
    kind: Kind
    label: str
    family: str
    maturity: Literal["experimental", "test", "stable"]
    nats: float
    why: str
    references: tuple[str, ...]
    match: Match
    samples: tuple[Sample, ...]

    def matches_name(self, name: str) -> bool:
        """Return whether a kernel of this name, mangled or not, is meant."""
        base = base_name(name)
        return base in self.match.names or base.startswith(self.match.prefixes)

    def matches_window(self, window: Window) -> bool:
        """Return whether the features of a window lie within all bounds."""
        match = self.match
        bounds = (
            (match.launches_min, window.launches, True),
            (match.cadence_ratio_min, window.cadence_ratio, True),
            (match.threads_min, window.threads, True),
            (match.launches_per_s_max, window.launches_per_s, False),
            (match.kernels_max, window.kernels, False),
            (match.geometries_max, window.geometries, False),
            (match.graph_ratio_max, window.graph_ratio, False),
        )
        return all(
            bound is None or value is None or (value >= bound if least else value <= bound)
            for bound, value, least in bounds)

    def matches(self, sample: Sample) -> bool:
        """Return whether the signature matches a sample of its kind."""
        match self.kind:
            case "kernel-name":
                return self.matches_name(sample.name)
            case "code-sha256":
                return sample.sha256 in self.match.sha256
            case "launch-structure":
                return sample.window is not None and self.matches_window(sample.window)


_NESTED = re.compile(r"_ZN?(?:K)?(?=\d)")
_TEMPLATE = re.compile(r"[<(].*", re.DOTALL)


@functools.lru_cache(maxsize=8)  # each signature in turn asks for the same name
def base_name(name: str) -> str:
    """Return the function's own name: without return type, namespaces, template arguments and parameters.

    Takes Itanium-mangled names (C++ ABI, section 5.1: length-prefixed identifiers) and written-out ones; C names are
    their own base name.
    """
    name = name[:NAME_CHARS_MAX]
    start = _NESTED.match(name)
    if start:
        at, last = start.end(), ""
        while (length := re.match(r"[0-9]{1,4}", name[at:])) is not None:
            at += len(length.group())
            last = name[at:at + int(length.group())]
            at += int(length.group())
        return last
    written = _TEMPLATE.sub("", name.replace("(anonymous namespace)", "")).strip()
    return re.split(r"::|\s", written)[-1] if written else ""


def parse_signature(text: str, file_stem: str) -> Signature:
    """Return the checked signature of one TOML document.

    Raises
    ------
    SignatureError
        If it is no signature, not named like its file, lacks samples of either sort, or fails one of them.
    """
    try:
        signature = msgspec.convert(tomllib.loads(text), Signature)
    except (tomllib.TOMLDecodeError, msgspec.ValidationError, RecursionError) as error:
        raise SignatureError(f"{file_stem}: {error}") from error
    _check(signature, file_stem)
    return signature


def _check(signature: Signature, file_stem: str) -> None:
    match = signature.match
    windowed = any(
        bound is not None
        for bound in (match.launches_min, match.launches_per_s_max, match.kernels_max, match.geometries_max,
                      match.threads_min, match.cadence_ratio_min, match.graph_ratio_max))
    binds = {"kernel-name": match.names or match.prefixes, "code-sha256": match.sha256, "launch-structure": windowed}
    complaints = {
        "is not named like its file": signature.id != file_stem,
        f"has no label {signature.label} to give": signature.label not in LABELS,
        f"must weigh more than 0 and at most {NATS_MAX} nats": not 0 < signature.nats <= NATS_MAX,
        "is a name and cannot be stable: whoever compiles chooses it":
            signature.kind == "kernel-name" and signature.maturity == "stable",
        "argues no weight": not signature.why.strip(),
        "names no reference": not signature.references,
        "binds nothing": not binds[signature.kind],
        "has a digest that is not 64 lower-case hex digits":
            any(re.fullmatch(r"[0-9a-f]{64}", one) is None for one in match.sha256),
        "has an empty name": any(len(one) < 4 for one in (*match.names, *match.prefixes)),
        "lacks a sample that it must match": not any(sample.matches for sample in signature.samples),
        "lacks a sample that it must not match": all(sample.matches for sample in signature.samples),
    }
    for complaint, holds in complaints.items():
        if holds:
            raise SignatureError(f"{file_stem}: {complaint}")
    for sample in signature.samples:
        if signature.matches(sample) != sample.matches:
            fault = "misses" if sample.matches else "wrongly matches"
            raise SignatureError(f"{file_stem}: {fault} its sample {sample.what!r}")


class Locked(Struct, frozen=True, forbid_unknown_fields=True):
    """One line of the lock: the version and digest of a file."""

    version: int
    sha256: str


def lock_of(texts: Mapping[str, str]) -> str:
    """Return the lock of these documents, by file stem, as TOML text."""
    lines = ["# Made by `make lock`: the version and SHA-256 of every signature file."]
    for stem in sorted(texts):
        version = parse_signature(texts[stem], stem).version
        digest = hashlib.sha256(texts[stem].encode()).hexdigest()
        lines.append(f'{stem} = {{ version = {version}, sha256 = "{digest}" }}')
    return "\n".join(lines) + "\n"


def parse_signatures(texts: Mapping[str, str], lock: str) -> tuple[Signature, ...]:
    """Return all signatures in order of id, after checking each against the lock.

    Raises
    ------
    SignatureError
        If a file is not in the lock, the lock names one that is not there, or a digest or a version differs.
    """
    try:
        locked = msgspec.convert(tomllib.loads(lock), dict[str, Locked])
    except (tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        raise SignatureError(f"signatures.lock: {error}") from error
    if set(locked) != set(texts):
        differing = sorted(set(locked) ^ set(texts))
        raise SignatureError(f"signatures.lock and the files differ: {', '.join(differing)} (make lock)")
    found = []
    for stem in sorted(texts):
        if hashlib.sha256(texts[stem].encode()).hexdigest() != locked[stem].sha256:
            raise SignatureError(f"{stem}: not the file that was locked (make lock)")
        signature = parse_signature(texts[stem], stem)
        if signature.version != locked[stem].version:
            raise SignatureError(f"{stem}: version {signature.version}, locked {locked[stem].version}")
        found.append(signature)
    return tuple(found)
