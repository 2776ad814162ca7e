"""The recorder: blocks to rotating, size-capped files.

A frame is written once it is worth compressing or a second old, by one write(2). If the disk refuses, the file is cut
back to its last whole frame, the loss is a `Gap`, and the next frame tries again: what was recorded stays readable.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from gpuguard.core.records import Block, Connects, Gap, HostInfo, Launches, Packets
from gpuguard.recording.codec import FRAME_BYTES_MAX, encode_frame, encode_header

if TYPE_CHECKING:
    from pathlib import Path

FRAME_BLOCKS_MAX = 4_096
FRAME_ROWS_MAX = 16_384
FRAME_AGE_NS = 1_000_000_000
SUFFIX = ".ggrec"


def recording_files(directory: Path) -> list[Path]:
    """Return the files of a recording in order; their names are numbers."""
    return sorted(directory.glob(f"*{SUFFIX}"))


class Recorder:
    """Writes a recording into ``directory``, which it makes (mode 0700). OSError if it cannot be made."""

    def __init__(self, directory: Path, *, file_bytes_max: int, total_bytes_max: int) -> None:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._directory = directory
        self._file_bytes_max = file_bytes_max
        self._total_bytes_max = total_bytes_max
        self._blocks: list[Block] = []
        self._rows = 0
        self._oldest_ns = 0
        self._info: HostInfo | None = None
        self._descriptor = -1
        self._offset = 0
        self._lost = 0

    def write(self, block: Block) -> list[Gap]:
        """Record one block; return what could not be recorded."""
        if isinstance(block, HostInfo):
            self._info = block
        if not self._blocks:
            self._oldest_ns = block.time_ns
        self._blocks.append(block)
        self._rows += len(block.rows) if isinstance(block, Packets | Launches | Connects) else 0
        full = len(self._blocks) >= FRAME_BLOCKS_MAX or self._rows >= FRAME_ROWS_MAX
        if full or not 0 <= block.time_ns - self._oldest_ns < FRAME_AGE_NS:
            return self.flush(block.time_ns)
        return []

    def flush(self, time_ns: int) -> list[Gap]:
        """Write what is held back; return a Gap if the disk refused it."""
        if not self._blocks:
            return []
        blocks, self._blocks, self._rows = self._blocks, [], 0
        frame = encode_frame(blocks)
        try:
            if len(frame) > FRAME_BYTES_MAX:
                message = f"a frame of {len(frame)} bytes is above the limit"
                raise OSError(message)
            self._open(len(frame))
            self._append(frame)
        except OSError as error:
            self._lost += len(blocks)
            reason = f"{len(blocks)} records not recorded: {error}"
            return [Gap(time_ns=time_ns, sensor="recording", reason=reason, lost=len(blocks))]
        return []

    def close(self, time_ns: int) -> list[Gap]:
        """Write what is held back and close the file."""
        gaps = self.flush(time_ns)
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
        return gaps

    def _append(self, data: bytes) -> None:
        written = 0
        try:
            while written < len(data):
                written += os.write(self._descriptor, data[written:])
        except OSError:
            os.ftruncate(self._descriptor, self._offset)
            os.lseek(self._descriptor, self._offset, os.SEEK_SET)
            raise
        self._offset += len(data)

    def _open(self, upcoming: int) -> None:
        """Have a file open that takes the next frame; each begins with whose recording it is."""
        if self._descriptor >= 0 and self._offset + upcoming <= self._file_bytes_max:
            return
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
        files = recording_files(self._directory)
        number = int(files[-1].stem) + 1 if files else 1
        self._prune(files, upcoming)
        path = self._directory / f"{number:08d}{SUFFIX}"
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        self._offset = 0
        again = [self._info] if self._info and number > 1 else []
        try:
            self._append(encode_header() + (encode_frame(again) if again else b""))
        except OSError:
            # Without its header it would be no recording, whatever is written to it later.
            os.close(self._descriptor)
            self._descriptor = -1
            path.unlink()
            raise

    def _prune(self, files: list[Path], upcoming: int) -> None:
        """Remove the oldest files until another whole one fits under the cap."""
        sizes = {path: path.stat().st_size for path in files}
        total = sum(sizes.values()) + max(upcoming, min(self._file_bytes_max, self._total_bytes_max // 2))
        for path in files:
            if total <= self._total_bytes_max:
                return
            path.unlink()
            total -= sizes[path]
