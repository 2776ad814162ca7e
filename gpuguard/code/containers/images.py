"""What the readers yield: images of GPU code, and what kept them from reading more; and the bounds they keep.

A reader never fails as a whole. What it cannot read is a `Flaw` with a place and a reason: a length that does not fit
is a finding of its own, since the driver would refuse such a file too and an honest tool does not write it.
"""

from __future__ import annotations

from hashlib import sha256
from typing import Literal

import msgspec

#: No image larger than this is taken apart; the largest seen in a vendor's library (NCCL) has 159 MB.
IMAGE_BYTES_MAX = 192 << 20
#: PTX is text; the largest seen (cuDNN) has 46 MB.
PTX_BYTES_MAX = 64 << 20
#: An image of a container, in an archive of a release, in a wheel, in a tar: enough for anything honest.
DEPTH_MAX = 6
IMAGES_MAX = 1_000_000
#: What a file may unpack to: so much in any case, and beyond it so many times its own size.
EXPANDED_FREE_BYTES = 2 << 30
EXPANDED_RATIO_MAX = 100
NAME_CHARACTERS_MAX = 512

Kind = Literal["cubin", "ptx", "other"]


class Malformed(ValueError):
    """The bytes contradict themselves. The text says how."""


class Exhausted(Exception):
    """A file unpacks to more than any honest one does; nothing more is read of it."""


class Image(msgspec.Struct, frozen=True):
    """One piece of GPU code. ``data`` is unpacked; ``arch`` is "sm_90", or "compute_90" for PTX."""

    path: str  # the file, and "!/member" for each archive it lies in
    container: str  # what it lies in, from the outside in: "zip/fatbin/zstd"
    offset: int  # in the innermost file
    kind: Kind
    arch: str
    sha256: str
    data: bytes


class Flaw(msgspec.Struct, frozen=True):
    """What could not be read. ``malformed``: the bytes are wrong; ``unread``: a bound of ours, or encrypted."""

    path: str
    container: str
    offset: int
    kind: Literal["malformed", "unread"]
    reason: str


class Budget:
    """What reading one file may cost; shared by all that lies in it.

    A large file is read by several at once: each walks all of it, and unpacks every ``shares``-th image.
    """

    def __init__(self, size_bytes: int, *, share: int = 0, shares: int = 1, depth_max: int = DEPTH_MAX,
                 images_max: int = IMAGES_MAX) -> None:
        self.depth_max = depth_max
        self.images = 0
        self._images_max = images_max
        self._share = share
        self._shares = shares
        self.left_bytes = EXPANDED_FREE_BYTES + EXPANDED_RATIO_MAX * size_bytes

    def expand(self, count: int) -> None:
        """Count unpacked bytes. Raise `Exhausted` when they are too many."""
        self.left_bytes -= count
        if self.left_bytes < 0:
            raise Exhausted("unpacks to more than any honest file of its size")

    def image(self) -> None:
        """Count one image. Raise `Exhausted` when there are too many."""
        self.images += 1
        if self.images > self._images_max:
            raise Exhausted("holds more images than any honest file")

    def falls_to_us(self) -> bool:
        """Return whether the image that was counted last is of our share."""
        return (self.images - 1) % self._shares == self._share


def make_image(path: str, container: str, offset: int, kind: Kind, arch: str, data: bytes) -> Image:
    """Return the image of these bytes, hashed."""
    return Image(path, container, offset, kind, arch, sha256(data).hexdigest(), data)


def printable(name: bytes | str) -> str:
    """Return a name from a file so that it can be shown: control characters and broken UTF-8 escaped, cut."""
    text = name.decode("utf-8", "backslashreplace") if isinstance(name, bytes) else name
    shown = text[:NAME_CHARACTERS_MAX]
    if not shown.isprintable():  # a surrogate is not
        shown = _escaped(shown)
    return shown if len(text) <= NAME_CHARACTERS_MAX else f"{shown}..."


def shown_path(path: str) -> str:
    """Return the path of a file on this host as it can be shown: whole, what no terminal should get escaped."""
    return path if path.isprintable() else _escaped(path)


def _escaped(text: str) -> str:
    whole = text.encode("utf-8", "backslashreplace").decode()
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in whole)
