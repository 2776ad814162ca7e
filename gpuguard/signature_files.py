"""Read the signatures that are shipped with this package, and write their lock.

``python -m gpuguard.signature_files FOLDER`` (``make lock``) checks every signature of the folder and writes its lock.
"""

from __future__ import annotations

import functools
import importlib.resources
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from gpuguard.core.signatures import Signature, SignatureError, lock_of, parse_signature, parse_signatures

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

LOCK = "signatures.lock"
FILE_BYTES_MAX = 256 * 1024


def read_texts(folder: Traversable) -> dict[str, str]:
    """Return the text of every signature file by its stem.

    Raises SignatureError for a file that is too long or is no text.
    """
    texts: dict[str, str] = {}
    for file in sorted(folder.iterdir(), key=lambda one: one.name):
        if not file.name.endswith(".toml"):
            continue
        raw = file.read_bytes()
        if len(raw) > FILE_BYTES_MAX:
            raise SignatureError(f"{file.name}: more than {FILE_BYTES_MAX} bytes")
        try:
            texts[file.name.removesuffix(".toml")] = raw.decode()
        except UnicodeDecodeError as error:
            raise SignatureError(f"{file.name}: {error}") from error
    return texts


@functools.cache
def shipped_texts() -> dict[str, str]:
    """Return the text of every signature of this package, after checking it against the lock. Raises SignatureError."""
    folder = importlib.resources.files("gpuguard") / "signatures"
    texts = read_texts(folder)
    parse_signatures(texts, (folder / LOCK).read_text())
    return texts


@functools.cache
def shipped() -> tuple[Signature, ...]:
    """Return the signatures of this package. Raises SignatureError."""
    return tuple(parse_signature(text, stem) for stem, text in sorted(shipped_texts().items()))


def main(folder: str) -> None:
    """Write the lock of a folder."""
    Path(folder, LOCK).write_text(lock_of(read_texts(Path(folder))))


if __name__ == "__main__":
    main(sys.argv[1])
