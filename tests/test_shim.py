"""How the cooperative shim reads an export: with a probe of the launch eye and without, and up to the end of a page."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from gpuguard.sensors.launches.libcuda import choose_site

ROOT = Path(__file__).parents[1]
#: Prints how far from its beginning each export's slot lies; the page behind the last byte of each cannot be read.
SOURCE = r"""
#include "shim.c"
int main(int count, char **hex) {
	for (int one = 1; one < count; one++) {
		size_t bytes = strlen(hex[one]) / 2, page = (size_t)sysconf(_SC_PAGESIZE);
		unsigned char *pages = mmap(NULL, 2 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		unsigned char *stub = pages + page - bytes;
		if (pages == MAP_FAILED || mprotect(pages + page, page, PROT_NONE))
			return 1;
		for (size_t at = 0; at < bytes; at++)
			sscanf(hex[one] + 2 * at, "%2hhx", stub + at);
		unsigned char *slot = (unsigned char *)slot_of(stub);
		printf("%ld\n", slot ? (long)(slot - stub) : -1L);
	}
}
"""
GATE = "813d3e938d0100ba1c32"
JUMP, CALL = "ff2500010000", "ff1500010000"
#: As of drivers up to 555, the same with a far `je`, and the shapes of 580 and 595; and where the slot's distance ends.
STUBS = {
    "near": (GATE + "740c" + JUMP, 18),
    "far": (GATE + "0f8486000000" + JUMP, 22),
    "580": ("554889e541544883ec08" + GATE + "0f8486000000" + "ff7518" + CALL, 35),
    "595": (GATE + "7444" + "554889e54883ec18" + "8b4518ff7530" + CALL, 32),
}


@pytest.fixture(scope="module")
def slots(tmp_path_factory):
    if shutil.which("cc") is None or platform.machine() != "x86_64":
        pytest.skip("no C compiler, or no x86-64: the shim is not built")
    folder = tmp_path_factory.mktemp("shim")
    (folder / "slots.c").write_text(SOURCE)
    subprocess.run(["cc", "-std=gnu11", "-O2", "-I", ROOT / "ext" / "inject", "-o", folder / "slots",
                    folder / "slots.c", "-ldl", "-lpthread"], check=True)

    def read(*stubs: str) -> list[int]:
        done = subprocess.run([folder / "slots", *stubs], check=True, stdout=subprocess.PIPE, text=True)
        return [int(line) for line in done.stdout.split()]

    return read


@pytest.mark.parametrize("name", STUBS)
def test_a_slot_is_found_whether_or_not_a_probe_sits_in_the_export(slots, name):
    text, end = STUBS[name]
    probed = bytearray.fromhex(text)
    site, _ = choose_site(bytes(probed))
    probed[site] = 0xCC
    at_first = "cc" + text[2:]
    assert slots(text, probed.hex(), at_first) == [end + 256] * 3


def test_other_exports_are_left_alone_and_nothing_behind_them_is_read(slots):
    others = ["c3", "55c3", GATE + "c3", JUMP, GATE + GATE + JUMP, GATE + "740cc3", "5055" * 8 + "c3"]
    assert slots(*others) == [-1] * len(others)
