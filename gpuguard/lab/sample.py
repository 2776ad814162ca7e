"""Choose the small part of a corpus that is committed, and that drives the tests: ``sample CORPUS OUT BYTES``.

Of each family one scenario, the smallest, families of both splits in turn, as long as they fit. Nothing in the captures
is secret: keys are made for each run, addresses are the lab's, and what is kept of records is ciphertext.
"""

from __future__ import annotations

import csv
import gzip
import struct
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from gpuguard.lab.captures import COLUMNS, number_of
from gpuguard.lab.judging import read_labels

if TYPE_CHECKING:
    from collections.abc import Iterator


def main() -> None:
    """Write the sample."""
    corpus, out, bytes_max = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    out.mkdir(parents=True, exist_ok=True)
    chosen, room = [], bytes_max
    for row, capture in _smallest(corpus):
        if len(capture) <= room:
            room -= len(capture)
            name = f"{row['family']}.pcap.gz"
            (out / name).write_bytes(capture)
            chosen.append({**row, "file": name})
    with (out / "LABELS.tsv").open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, COLUMNS, delimiter="\t", lineterminator="\n")
        table.writeheader()
        table.writerows(chosen)


def _smallest(corpus: Path) -> Iterator[tuple[dict[str, str], bytes]]:
    """Yield the smallest scenario of each family with its packets, families of few bytes first."""
    by_file: dict[str, list[dict[str, str]]] = {}
    for row in read_labels(corpus):
        by_file.setdefault(row["file"], []).append(row)
    found = []
    for name, rows in by_file.items():
        parts = _parts(gzip.decompress((corpus / name).read_bytes()))
        sized = [(len(packed), row, packed) for row in rows if (packed := parts.get(row["address"]))]
        if sized:
            found.append(min(sized, key=lambda one: one[0]))
    for _, row, packed in sorted(found, key=lambda one: one[0]):
        yield row, packed


def _parts(raw: bytes) -> dict[str, bytes]:
    """Return the capture of each scenario in one file, by its address."""
    parts: dict[str, bytearray] = {}
    at = 24
    while at + 16 <= len(raw):
        size = struct.unpack_from("=I", raw, at + 8)[0]
        record = raw[at:at + 16 + size]
        address = number_of(record[16:])
        if address is not None:
            parts.setdefault(address[1], bytearray(raw[:24])).extend(record)
        at += 16 + size
    return {address: gzip.compress(bytes(data), 9, mtime=0) for address, data in parts.items()}


if __name__ == "__main__":
    main()
