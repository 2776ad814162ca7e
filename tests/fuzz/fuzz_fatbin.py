"""Fatbins under mutation: nothing raises, nothing unpacks beyond its bound, offsets lie inside, shares add up."""

from __future__ import annotations

import sys
from pathlib import Path

from gpuguard.code.containers.finding import find_images
from gpuguard.code.containers.images import Budget, Image

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
import code_inputs  # noqa: E402
import code_samples as made  # noqa: E402


def check(data: bytes) -> None:
    found = list(find_images(data, "f"))
    for one in found:
        assert 0 <= one.offset <= len(data)
        if isinstance(one, Image):
            assert len(one.sha256) == 64
        else:
            assert one.reason
    shares = [list(find_images(data, "f", Budget(len(data), share=share, shares=2))) for share in (0, 1)]
    assert [shares[at % 2][at // 2] for at in range(len(found))] == found


if __name__ == "__main__":
    cubin = made.cubin(constants=bytes(64))
    entries = [made.entry(cubin, packing=packing, pad=pad) for packing in ("", "lz4", "zstd") for pad in (0, 5)]
    code_inputs.run("fuzz_fatbin", [
        made.fatbin(*entries), made.fatbin(entries[2]), made.fatbin(entries[4]),
        made.host_library(made.fatbin(*entries), made.fatbin(made.entry(made.PTX, kind=1, packing="zstd")))], check)
