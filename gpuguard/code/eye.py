"""The code eye of the daemon: an image that a process loaded goes to a cell, a verdict comes back as a record.

Each image is judged once, by its hash, whoever loads it. The worker's program is fed by one thread; the daemon's own
thread only hands in and takes out. Program and thread start with the first image, since most hosts that run no GPU job
never need them, and end when no image came for minutes, since they hold more memory than the rest of the daemon. If the
program dies, it is started again with the next image, later each time that fails. Everything is bounded: what does not
fit is said to be unjudged, never taken for innocent, and judged when it is loaded again.
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
from gpuguard.core.bounded import BoundedTable
from gpuguard.core.records import KernelCode, ModuleVerdict

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterator

WAITING_MAX = 64
KNOWN_MAX = 16_384
ACCUSED_MAX = 256
#: To start the program and compile costs five seconds of a core: after so long without an image, little.
IDLE_S = 300.0
AGAIN_FIRST_S, AGAIN_MAX_S = 1.0, 600.0
_STOP = -1


class CodeEye:
    """Judges images in the background; `take` returns what is finished."""

    def __init__(self, start: Callable[[], socket.socket | None] | None = None) -> None:
        """``start`` returns the socket of a worker's program, None where there is none and we start our own.

        It is called on the thread that gives an image, whenever a program is needed and none runs.
        """
        self._start = start
        self._waiting: queue.Queue[tuple[str, int]] = queue.Queue(WAITING_MAX)
        self._finished: queue.SimpleQueue[tuple[ModuleVerdict, bool]] = queue.SimpleQueue()  # and whether it was judged
        self._known: BoundedTable[str, None] = BoundedTable(KNOWN_MAX)
        self._running = threading.Lock()  # held to start the thread, and by the thread to end
        self._thread: threading.Thread | None = None
        self._at_hand = ""
        self._closed = ""  # why the program ended, until one gives a verdict again
        self._closed_until_s = 0.0
        self._again_s = AGAIN_FIRST_S

    def give(self, sha256: str, descriptor: int) -> None:
        """Hand in an image by a descriptor that stays the caller's; one that was seen before is not judged again."""
        if sha256 in self._known:
            return
        self._known[sha256] = None
        with self._running:
            if self._thread is None and time.monotonic() < self._closed_until_s:
                self._refuse(sha256, self._closed)
                return
            own = os.dup(descriptor)
            os.lseek(own, 0, os.SEEK_SET)
            try:
                self._waiting.put_nowait((sha256, own))
            except queue.Full:
                os.close(own)
                self._refuse(sha256, f"{WAITING_MAX} images wait already")
                return
            if self._thread is None:
                peer = self._start() if self._start else None
                self._thread = threading.Thread(target=self._work, args=(peer,), name="code", daemon=True)
                self._thread.start()

    def take(self) -> list[ModuleVerdict]:
        """Return the verdicts that were finished since the last call."""
        found = []
        while not self._finished.empty():
            said, judged = self._finished.get()
            if not judged:
                self._known.pop(said.sha256)
            found.append(said)
        return found

    def close(self) -> None:
        """End the worker, without waiting for what it reads."""
        with self._running:
            if self._thread is not None:
                while not self._waiting.empty():
                    os.close(self._waiting.get()[1])
                self._waiting.put(("", _STOP))

    def _targets(self) -> Iterator[Target]:
        """Yield images as they come, until there are none for long."""
        while True:
            try:
                sha256, descriptor = self._waiting.get(timeout=IDLE_S)
            except queue.Empty:
                with self._running:
                    if not self._waiting.empty():
                        continue
                    self._thread = None
                    return
            if descriptor == _STOP:
                return
            self._at_hand = sha256
            yield Target(sha256, descriptor=descriptor)
            self._at_hand = ""

    def _work(self, peer: socket.socket | None) -> None:
        try:
            self._read(peer)
        except Exception as error:  # noqa: BLE001 whatever ends the reading, each image without a verdict is told
            with self._running:
                if self._thread is threading.current_thread():
                    self._close(f"the code eye is closed: {error}")

    def _read(self, peer: socket.socket | None) -> None:
        accused: list[KernelCode] = []
        for said in scan_as_they_come(self._targets(), allow=default_path(), peer=peer):
            match said:
                case KernelVerdict() if said.label in ACCUSED and len(accused) < ACCUSED_MAX:
                    accused.append(_kernel(said))
                case FileVerdict():
                    self._finished.put((_verdict(said, accused), True))
                    accused = []
                    self._again_s = AGAIN_FIRST_S
                case _:
                    pass

    def _close(self, reason: str) -> None:
        """Say of the image at hand and of all that wait that they were not judged, and of those that come for a while.

        For twice as long each time, until there is a verdict again.
        """
        if self._at_hand:
            self._refuse(self._at_hand, reason)
        while not self._waiting.empty():
            sha256, descriptor = self._waiting.get()
            if descriptor != _STOP:
                os.close(descriptor)
                self._refuse(sha256, reason)
        self._closed, self._closed_until_s = reason, time.monotonic() + self._again_s
        self._again_s = min(2 * self._again_s, AGAIN_MAX_S)
        self._at_hand, self._thread = "", None

    def _refuse(self, sha256: str, reason: str) -> None:
        self._finished.put((_unjudged(sha256, reason), False))


def _kernel(said: KernelVerdict) -> KernelCode:
    return KernelCode(name=said.kernel, label=said.label, probability=said.probability, nats=said.nats,
                      text="; ".join(said.evidence)[:512])


def _verdict(said: FileVerdict, accused: list[KernelCode]) -> ModuleVerdict:
    return ModuleVerdict(time_ns=time.time_ns(), sha256=said.path, judged=said.kernels, accused=tuple(accused),
                         reason="; ".join([*said.malformed, *said.gaps])[:512])


def _unjudged(sha256: str, reason: str) -> ModuleVerdict:
    return ModuleVerdict(time_ns=time.time_ns(), sha256=sha256, judged=0, reason=reason)
