"""The code that processes load: asked of the broker, a few modules at a time, and given to the code eye.

Whoever loads too much at once loses some of his own, and that is said; what others load meanwhile is read all the same.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import socket
import time
from collections import Counter
from typing import TYPE_CHECKING, Protocol, cast

from msgspec import Struct

from gpuguard.core.bounded import BoundedTable
from gpuguard.core.records import Block, ModuleImage
from gpuguard.core.subjects import ProcessId
from gpuguard.messages import Answer, Opened, OpenReader, ReadImage, Refused, Request
from gpuguard.sensors.launches.images import HEADER_BYTES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gpuguard.sensors.launches.gaps import Gaps
    from gpuguard.sensors.launches.images import ImageKind
    from gpuguard.sensors.launches.names import KernelNames

IMAGES_PER_READ = 8
IMAGES_WAITING_MAX, IMAGES_WAITING_EACH_MAX = 512, 256


class Broker(Protocol):
    """What this sensor needs of the broker's client."""

    def ask(self, request: Request) -> tuple[Answer, Sequence[int]]:
        """Send one request and return its answer and descriptors."""
        ...


class Image(Struct):
    """One image that is still to be read: at an address of the process, or at a path that it named."""

    time_ns: int
    process: ProcessId
    module: int
    address: int
    header: bytes
    path: bytes = b""


class Modules:
    """The images that wait to be read, and the code eye that judges those that were."""

    def __init__(self, broker: Broker, names: KernelNames, gaps: Gaps) -> None:
        from gpuguard.code.eye import CodeEye

        self._broker = broker
        self._names = names
        self._gaps = gaps
        self._code = CodeEye(self._open_reader)
        self._images: list[Image] = []
        self._waiting: Counter[ProcessId] = Counter()
        self._dropped: Counter[ProcessId] = Counter()
        self._unjudged: BoundedTable[str, bool] = BoundedTable(IMAGES_WAITING_MAX)

    def _open_reader(self) -> socket.socket | None:
        """Have the broker start who reads images; None: the code eye starts it itself, if it can."""
        answer, descriptors = self._broker.ask(OpenReader())
        return socket.socket(fileno=descriptors[0]) if isinstance(answer, Opened) else None

    def __len__(self) -> int:
        return len(self._images)

    def add(self, image: Image) -> None:
        """Have an image read, unless too many wait already."""
        # A flood of one process must not hide what another loads meanwhile.
        own = self._waiting[image.process]
        if len(self._images) >= IMAGES_WAITING_MAX or own >= IMAGES_WAITING_EACH_MAX:
            self._dropped[image.process] += 1
        else:
            self._images.append(image)
            self._waiting[image.process] += 1

    def read(self) -> list[Block]:
        """Return the next few images that could be read, and the kernels that this names."""
        for process, lost in self._dropped.items():
            self._gaps.tell(time.time_ns(), "GPU code not read: too many images at once", lost=lost, process=process)
        self._dropped.clear()
        now, self._images = self._images[:IMAGES_PER_READ], self._images[IMAGES_PER_READ:]
        for image in now:
            self._waiting -= Counter([image.process])
        return [block for image in now for block in self._read(image)]

    def _read(self, image: Image) -> list[Block]:
        answer, descriptors = self._broker.ask(ReadImage(image.process, image.address, image.path))
        if not isinstance(answer, Opened):
            self._lost(image, answer.reason if isinstance(answer, Refused) else str(answer))
            return []
        fd = descriptors[0]
        try:
            size = os.fstat(fd).st_size
            if not size:
                self._lost(image, "the memory was gone")
                return []
            if size < answer.values["claimed_bytes"]:
                reason = f"GPU code read in part: {size} of {answer.values['claimed_bytes']} bytes"
                self._gaps.tell(image.time_ns, reason, process=image.process)
            with mmap.mmap(fd, size, prot=mmap.PROT_READ) as code:
                if not code[:HEADER_BYTES].startswith(image.header[:size].rstrip(b"\0")):
                    self._lost(image, "other code lies in its place by now")
                    return []
                sha256 = hashlib.sha256(code).hexdigest()
            self._code.give(sha256, fd)
        finally:
            os.close(fd)
        names = self._names.read(image.time_ns, image.process, image.module, sha256)
        kind = cast("ImageKind", answer.mode)
        return [ModuleImage(image.time_ns, image.process, sha256, size, kind), *names]

    def _lost(self, image: Image, reason: str) -> None:
        self._gaps.tell(image.time_ns, f"GPU code not read: {reason}", lost=1, process=image.process)

    def judged(self) -> list[Block]:
        """Return what the code eye made of images; why one could not be judged is told once for all of that reason."""
        verdicts = self._code.take()
        for one in verdicts:
            if one.reason and one.reason not in self._unjudged:
                self._unjudged[one.reason] = True
                self._gaps.tell(one.time_ns, f"GPU code not judged, or in part: {one.reason}")
        return list(verdicts)

    def close(self) -> None:
        """End the code eye."""
        self._code.close()
