"""Where a driver library is probed: the stub as drivers have it, other shapes, and hostile files."""

from __future__ import annotations

import contextlib
import os
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuguard.core.records import LAUNCH_APIS
from gpuguard.sensors.launches.libcuda import NotProbeable, choose_site
from gpuguard.sensors.launches.libcuda import read_library as read_library_by
from gpuguard.sensors.launches.maps import cached_libraries
from tests.standins.build import SHAPES, build

# cuLaunchKernel of drivers 535.261.03, 580.178.04 and 595.99.02.
STUB = bytes.fromhex("813d3e938d0100ba1c32 740c ff254e9e8101 660f1f440000")
STUB_580 = bytes.fromhex("55 4889e5 4154 4883ec08 813d5c61830500ba1c32 0f8486000000")
STUB_595 = bytes.fromhex("813dfef83d0500ba1c32 7444 55 4889e5 4883ec18 8b4518 ff7530")


def read_library(data):
    return read_library_by(lambda at, size: data[at:at + size])


@pytest.fixture(scope="module", params=SHAPES)
def library(request, tmp_path_factory):
    if shutil.which("cc") is None:
        pytest.skip("no C compiler: the stand-in driver cannot be built")
    return build(tmp_path_factory.mktemp("standins"), request.param)["libcuda"].read_bytes()


@pytest.mark.parametrize(("stub", "site"), [(STUB, 10), (STUB_580, 0), (STUB_595, 10)])
def test_a_stub_is_probed_at_an_emulated_instruction(stub, site):
    assert choose_site(stub) == (site, "emulated")


@pytest.mark.parametrize(("code", "site"), [
    ("55 4889e5 4157 4156 4155 4154 53 4883ec18 90909090", (0, "emulated")),
    ("4157 4156 4155 4154 53 4883ec18 90909090 90909090", (0, "emulated")),
    ("f30f1efa 55 4889e5 4157 4156 4155 4154 53 4883ec18 9090", (4, "emulated")),
    ("f30f1efa 4883ec18 31c0 c3 9090909090909090909090909090", (4, "single-step")),
    ("4883ec18 31c0 c3 9090909090909090909090909090", (0, "single-step")),
])
def test_other_shapes(code, site):
    assert choose_site(bytes.fromhex(code)) == site


@pytest.mark.parametrize("code", ["", "813d", "0f1f440000 4883ec18 31c0 c3 909090909090", "cccccccc" * 6])
def test_a_shape_that_is_not_safe_is_refused(code):
    with pytest.raises(NotProbeable):
        choose_site(bytes.fromhex(code))


def test_a_near_stub_is_not_taken_for_one():
    for at in (0, 1, 10):
        changed = bytearray(STUB)
        changed[at] ^= 0xFF
        delta, cost = choose_site(bytes(changed))
        assert (delta, cost) != (10, "emulated")


def test_every_export_of_the_stand_in_is_found(library):
    found = read_library(library)
    assert {site.symbol.removesuffix("_ptsz") for site in found.launches} == {
        api for api in LAUNCH_APIS if api.startswith("cu")}
    assert {"cuLaunchKernel_ptsz", "cuLaunchKernelEx_ptsz", "cuGraphLaunch_ptsz"} <= {s.symbol for s in found.launches}
    assert {"cuModuleGetFunction", "cuLibraryGetKernel", "cuKernelGetFunction"} <= {s.symbol for s in found.calls}
    assert {site.cost for site in (*found.launches, *found.calls)} == {"emulated"}
    assert found.refused == ()
    assert len(found.build_id) == 40
    for site in found.launches:
        assert LAUNCH_APIS[site.cookie & 0xFF] == site.symbol.removesuffix("_ptsz")
        assert library[site.offset] in (0x74, 0x55)


def test_another_machine_is_refused(library):
    arm = bytearray(library)
    struct.pack_into("<H", arm, 18, 183)
    with pytest.raises(NotProbeable, match="machine 183"):
        read_library(bytes(arm))


def test_a_library_without_launches_is_refused(library):
    with pytest.raises(NotProbeable, match="no launch export"):
        read_library(library.replace(b"cuLaunch", b"xxLaunch").replace(b"cuGraphLaunch", b"xxGraphLaunch"))


def test_a_copy_without_section_headers_is_read_all_the_same(library):
    bare = bytearray(library)
    struct.pack_into("<Q", bare, 40, 0)
    struct.pack_into("<HHH", bare, 58, 0, 0, 0)
    assert read_library(bytes(bare)) == read_library(library)


def test_the_older_table_of_hashes_is_read_too(tmp_path):
    if shutil.which("cc") is None:
        pytest.skip("no C compiler")
    source = tmp_path / "driver.c"
    source.write_text("int cuLaunchKernel(int a) { return a + 1; } int cuLaunchKernels(int a) { return a; }")
    found = []
    for style in ("sysv", "gnu"):
        subprocess.run(["cc", "-shared", "-fPIC", "-O0", f"-Wl,--hash-style={style}", "-o", tmp_path / style, source],
                       check=True)
        found.append([site.symbol for site in read_library((tmp_path / style).read_bytes()).launches])
    assert found == [["cuLaunchKernel"]] * 2


def test_a_file_of_any_size_costs_a_few_bounded_reads(library):
    """Tables as large as they can be said to be, in a file that never ends."""
    start, = struct.unpack_from("<Q", library, 32)
    segments = [struct.unpack_from("<I", library, start + 56 * i)[0] for i in range(library[56])]
    bare = bytearray(library)
    for i, kind in enumerate(segments):
        if kind in (1, 2):
            struct.pack_into("<QQ", bare, start + 56 * i + 32, 2**62, 2**62)
    at = library.index(struct.pack("<Q", 10), struct.unpack_from("<Q", library, start + 56 * segments.index(2) + 8)[0])
    struct.pack_into("<Q", bare, at + 8, 2**62)
    asked = []

    def read(at, size):
        asked.append(size)
        return bytes(bare[at:at + size]).ljust(size, b"\1")

    with contextlib.suppress(NotProbeable):
        read_library_by(read)
    assert sum(asked) < 8 * 1024**2
    assert len(asked) < 200


def installed():
    """Return a real driver library: what GPUGUARD_LIBCUDA names, else what the linker finds."""
    named = os.environ.get("GPUGUARD_LIBCUDA", "")
    return Path(named) if named else next(map(Path, cached_libraries()), None)


@pytest.mark.skipif(installed() is None, reason="no NVIDIA driver library here (GPUGUARD_LIBCUDA may name one)")
def test_a_real_driver_is_probed_on_emulated_instructions_only():
    found = read_library(installed().read_bytes())
    assert {site.symbol.removesuffix("_ptsz") for site in found.launches} >= {
        "cuLaunchKernel", "cuLaunchKernelEx", "cuLaunchCooperativeKernel", "cuGraphLaunch"}
    assert {"cuModuleGetFunction", "cuLibraryGetKernel", "cuKernelGetFunction", "cuModuleLoadData"} <= {
        site.symbol for site in found.calls}
    assert {site.cost for site in (*found.launches, *found.calls)} == {"emulated"}
    assert found.refused == ()


@given(st.binary(max_size=512))
def test_bytes_that_are_no_library(data):
    with pytest.raises(NotProbeable):
        read_library(data)


@given(data=st.data())
def test_a_damaged_library_is_read_or_refused(library, data):
    damaged = bytearray(library)
    for _ in range(data.draw(st.integers(1, 8))):
        damaged[data.draw(st.integers(0, 63)) if data.draw(st.booleans()) else
                data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    damaged = damaged[:data.draw(st.integers(0, len(damaged)))]
    try:
        found = read_library(bytes(damaged))
    except NotProbeable:
        return
    for site in (*found.launches, *found.calls):
        assert 0 <= site.offset < len(damaged)
