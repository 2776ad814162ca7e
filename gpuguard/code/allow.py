"""The allow list: hashes of code that an operator vouches for, such as a vendor's libraries.

A text file, so that it can be read, compared and put under version control: a line that says what it is, then one
SHA-256 of a kernel's code a line, sorted. No code is in it, and none is shipped: what is trusted is learnt from the
files of the host (`gpuguard code learn`).
"""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path

from gpuguard import paths

HEADER = b"# gpuguard allow list 1: SHA-256 of the code of kernels, sorted\n"
_LINE_BYTES = 65
BYTES_MAX = 512 << 20
_LINES = re.compile(rb"(?:[0-9a-f]{64}\n)*")


class BadAllowList(ValueError):
    """The file is not an allow list."""


class AllowList:
    """Looks hashes up in the file's own bytes: half a million of them cost 33 MB."""

    def __init__(self, content: bytes = HEADER) -> None:
        if not content.startswith(HEADER):
            raise BadAllowList("not an allow list: its first line is another")
        self._lines = content[len(HEADER):]
        if not _LINES.fullmatch(self._lines):
            raise BadAllowList("an allow list with a line that is no SHA-256")

    def __len__(self) -> int:
        return len(self._lines) // _LINE_BYTES

    def __contains__(self, digest: object) -> bool:
        if not isinstance(digest, str):
            return False
        wanted, low, high = digest.encode(), 0, len(self)
        while low < high:
            middle = (low + high) // 2
            line = self._lines[middle * _LINE_BYTES:middle * _LINE_BYTES + 64]
            if line == wanted:
                return True
            low, high = (middle + 1, high) if line < wanted else (low, middle)
        return False

    def digests(self) -> set[str]:
        """Return all hashes."""
        return set(self._lines.decode().split())


def default_path() -> Path:
    """Return where the list of this host lies."""
    return paths.state_dir() / "allowed-code.txt"


def load(path: Path, *, may_lack: bool = True) -> AllowList:
    """Read a list; one that may lack and does is empty. Raise `BadAllowList`, which names the file, or OSError."""
    try:
        with path.open("rb") as file:
            content = file.read(BYTES_MAX + 1)
    except FileNotFoundError:
        if may_lack:
            return AllowList()
        raise
    if len(content) > BYTES_MAX:
        raise BadAllowList(f"{path}: an allow list of more than {BYTES_MAX >> 20} MB")
    try:
        return AllowList(content)
    except BadAllowList as error:
        raise BadAllowList(f"{path}: {error}") from error


def save(path: Path, digests: set[str]) -> None:
    """Write a list in place of the old one, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(HEADER + "".join(f"{one}\n" for one in sorted(digests)).encode())
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink()
        raise
