"""Archives and packed files under mutation: nothing raises, nothing unpacks beyond what a file may cost."""

from __future__ import annotations

import random
import sys
import tarfile
from pathlib import Path

from gpuguard.code.containers.finding import find_images
from gpuguard.code.containers.images import Budget

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
import code_inputs  # noqa: E402
import code_samples as made  # noqa: E402

EXPANDED_MAX = 4 << 20


def check(data: bytes) -> None:
    budget = Budget(0)
    budget.left_bytes = EXPANDED_MAX
    for one in find_images(data, "f", budget):
        assert one.path.startswith("f")
        assert one.path.isprintable()


TAR_FIELDS = ((0, 100), (100, 8), (124, 12), (148, 8), (156, 1), (257, 8), (345, 155))


def wrapped(kind: str, content: bytes, dice: random.Random) -> bytes:
    """Put a file into an archive, or pack it, and sometimes break that archive alone."""
    files = {"a": b"x" * dice.randrange(600), "n" * dice.choice((1, 90, 101, 300)): content}
    if kind == "tar":
        out = made.tar(files, dice.choice((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT)))
        return summed(out, dice) if dice.random() < 0.4 else out
    if kind == "oci":
        return made.image_of_container([files, {}])
    if kind == "zip":
        out = made.wheel(files, dice.choice((0, 8, 12, 14)))
        return out[:-80] + code_inputs.mutated(out[-80:], dice) if dice.random() < 0.4 else out
    out = made.ar(files) if kind == "ar" else made.packed(kind, content)
    return code_inputs.mutated(out, dice) if dice.random() < 0.3 else out


def summed(content: bytes, dice: random.Random) -> bytes:
    """Change a field of a tar header and make its sum right again, or nothing behind the sum would be reached."""
    data = bytearray(content)
    at, (field, size) = 512 * dice.randrange(len(data) // 512), dice.choice(TAR_FIELDS)
    data[at + field:at + field + size] = dice.choice((
        b"\xff" * size, bytes(size), b"7" * size, b"\x80" + b"\xff" * (size - 1), b"-1".ljust(size),
        dice.randbytes(size), bytes([dice.choice(b"0127LKxg5S")]).ljust(size, b"\0")))[:size]
    data[at + 148:at + 156] = b" " * 8
    data[at + 148:at + 156] = b"%06o\0 " % sum(data[at:at + 512])
    return bytes(data)


def shaped(seed: bytes, dice: random.Random) -> bytes:
    """Nest archives in archives, some of them broken in one place."""
    content = code_inputs.mutated(seed, dice) if dice.random() < 0.2 else seed[:20_000]
    for _ in range(dice.choice((1, 2, 3, 8))):
        content = wrapped(dice.choice(("tar", "zip", "ar", "gzip", "xz", "bzip2", "zstd", "oci")), content, dice)
    return content


if __name__ == "__main__":
    library = made.host_library(made.fatbin(made.entry(made.cubin(), packing="zstd")))
    files = {"a.so": library, "d/" + "n" * 120: library, "ptx": made.PTX}
    seeds = [made.tar(files, tarfile.PAX_FORMAT), made.tar(files), made.wheel(files), made.ar(files),
             made.image_of_container([files])]
    seeds += [made.packed(kind, made.tar(files)) for kind in ("gzip", "xz", "bzip2", "zstd")]
    code_inputs.run("fuzz_archives", seeds, check, shaped)
