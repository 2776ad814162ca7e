"""The code eye of the daemon: an image that a process loaded goes to a cell, a verdict comes back as a record.

Each image is judged once, by its hash, whoever loads it. The worker's program starts with the first image, since most
hosts that run no GPU job never need it, and is fed by one thread; the daemon's own thread only hands in and takes out.
Everything is bounded: what does not fit is said to be unjudged, never taken for innocent.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from typing import TYPE_CHECKING

from gpuguard.code.allow import default_path
from gpuguard.code.scanning import Target, scan_as_they_come
from gpuguard.code.verdicts import ACCUSED, FileVerdict, KernelVerdict
from gpuguard.core.host import BoundedTable
from gpuguard.core.records import KernelCode, ModuleVerdict

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterator

WAITING_MAX = 64
KNOWN_MAX = 16_384
ACCUSED_MAX = 256
_STOP = -1


class CodeEye:
    """Judges images in the background; `take` returns what is finished."""

    def __init__(self, start: Callable[[], socket.socket | None] | None = None) -> None:
        """``start`` returns the socket of a worker's program, None where there is none and we start our own.

        It is called once, on the thread that gives the first image.
        """
        self._start = start
        self._peer: socket.socket | None = None
        self._waiting: queue.Queue[tuple[str, int]] = queue.Queue(WAITING_MAX)
        self._finished: queue.SimpleQueue[ModuleVerdict] = queue.SimpleQueue()
        self._known: BoundedTable[str, None] = BoundedTable(KNOWN_MAX)
        self._thread: threading.Thread | None = None
        self._at_hand = ""

    def give(self, sha256: str, descriptor: int) -> None:
        """Hand in an image by a descriptor that stays the caller's; one that was seen before is not judged again."""
        if sha256 in self._known:
            return
        self._known[sha256] = None
        own = os.dup(descriptor)
        os.lseek(own, 0, os.SEEK_SET)
        try:
            self._waiting.put_nowait((sha256, own))
        except queue.Full:
            os.close(own)
            self._finished.put(_unjudged(sha256, f"{WAITING_MAX} images wait already"))
            return
        if self._thread is None:
            self._peer = self._start() if self._start else None
            self._thread = threading.Thread(target=self._work, name="code", daemon=True)
            self._thread.start()

    def take(self) -> list[ModuleVerdict]:
        """Return the verdicts that were finished since the last call."""
        found = []
        while not self._finished.empty():
            found.append(self._finished.get())
        return found

    def close(self) -> None:
        """End the worker, without waiting for what it reads."""
        if self._thread is not None:
            while not self._waiting.empty():
                os.close(self._waiting.get()[1])
            self._waiting.put(("", _STOP))

    def _targets(self) -> Iterator[Target]:
        while True:
            sha256, descriptor = self._waiting.get()
            if descriptor == _STOP:
                return
            self._at_hand = sha256
            yield Target(sha256, descriptor=descriptor)

    def _work(self) -> None:
        accused: list[KernelCode] = []
        try:
            for said in scan_as_they_come(self._targets(), allow=default_path(), peer=self._peer):
                match said:
                    case KernelVerdict() if said.label in ACCUSED and len(accused) < ACCUSED_MAX:
                        accused.append(_kernel(said))
                    case FileVerdict():
                        self._finished.put(_verdict(said, accused))
                        accused = []
                    case _:
                        pass
        except Exception as error:  # noqa: BLE001 whatever ends the reading, each image without a verdict is told
            self._refuse(f"the code eye is closed: {error}")

    def _refuse(self, reason: str) -> None:
        """Say of the image at hand, and of every one that comes, that it was not judged."""
        sha256, descriptor = self._at_hand, -2
        while descriptor != _STOP:
            if sha256:
                self._finished.put(_unjudged(sha256, reason))
            sha256, descriptor = self._waiting.get()
            if descriptor != _STOP:
                os.close(descriptor)


def _kernel(said: KernelVerdict) -> KernelCode:
    return KernelCode(name=said.kernel, label=said.label, probability=said.probability, nats=said.nats,
                      text="; ".join(said.evidence)[:512])


def _verdict(said: FileVerdict, accused: list[KernelCode]) -> ModuleVerdict:
    return ModuleVerdict(time_ns=time.time_ns(), sha256=said.path, judged=said.kernels, accused=tuple(accused),
                         reason="; ".join([*said.malformed, *said.gaps])[:512])


def _unjudged(sha256: str, reason: str) -> ModuleVerdict:
    return ModuleVerdict(time_ns=time.time_ns(), sha256=sha256, judged=0, reason=reason)
