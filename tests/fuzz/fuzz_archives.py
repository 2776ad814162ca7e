"""Archives and packed files under mutation: nothing raises, nothing unpacks beyond what a file may cost."""

from __future__ import annotations

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


if __name__ == "__main__":
    library = made.host_library(made.fatbin(made.entry(made.cubin(), packing="zstd")))
    files = {"a.so": library, "d/" + "n" * 120: library, "ptx": made.PTX}
    seeds = [made.tar(files, tarfile.PAX_FORMAT), made.tar(files), made.wheel(files), made.ar(files),
             made.image_of_container([files])]
    seeds += [made.packed(kind, made.tar(files)) for kind in ("gzip", "xz", "bzip2", "zstd")]
    code_inputs.run("fuzz_archives", seeds, check)
