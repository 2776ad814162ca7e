"""Where to probe a library that GPU work goes through: its exports, and the instruction of each that costs least.

That is the CUDA driver, and the loaders of OpenCL and Vulkan, whose drivers do not launch through libcuda.

Every launch export of a driver is a stub, as read from the libraries of Debian's and Ubuntu's packages. All look
whether the driver was torn down, and go on through a slot::

    470 to 555   81 3d rel32 00 ba 1c 32    cmpl $0x321cba00, gate(%rip)
                 74 xx                      je   torn-down
                 ff 25 rel32                jmp  *implementation(%rip)
    580          55 48 89 e5 41 54 ...      push %rbp; mov %rsp, %rbp; push %r12; sub $8, %rsp
                 81 3d ... 0f 84 rel32      cmpl, je as above
                 ... ff 15 rel32            push what lies on the stack again; call *implementation(%rip)
    595          81 3d ... 74 xx            cmpl, je as above
                 55 48 89 e5 ... ff 15      push %rbp; mov %rsp, %rbp; ...; call *implementation(%rip)

A uprobe at ``cmpl`` is single-stepped out of line; at ``push`` and ``je`` it is emulated by the kernel
(arch/x86/kernel/uprobes.c, branch_setup_xol_ops and push_setup_xol_ops), some fifteen times cheaper, and all arguments
and the stack are still intact there. Anything else that is no stub is probed at a safe place at the cost of a single
step, which is said. cuGetProcAddress gives out these exports, and no other way in (asked of 580 and 595).

The library's bytes are hostile: offsets are checked, tables are bounded, and nothing is executed or followed. They are
read as the dynamic linker reads them, by the dynamic segment: a copy without section headers works as well as any.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Literal

import numpy as np
from msgspec import Struct

from gpuguard.core.records import LAUNCH_APIS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    #: (where in the file, how many bytes) -> those bytes, fewer at its end.
    Read = Callable[[int, int], bytes]

EM_X86_64 = 62
PT_LOAD, PT_DYNAMIC, PT_NOTE = 1, 2, 4
DT_HASH, DT_STRTAB, DT_SYMTAB, DT_STRSZ, DT_GNU_HASH = 4, 5, 6, 10, 0x6FFFFEF5
NT_GNU_BUILD_ID = 3
SEGMENTS_MAX = 64
DYNAMIC_BYTES_MAX = 16_384
SYMBOLS_MAX = 65_536
#: The drivers' tables of names have some 40 kB.
NAMES_BYTES_MAX = 4 * 1024**2
NAME_BYTES_MAX = 128
SITES_MAX = 64

# Forms of ext/bpf/launches.h.
(FORM_REGISTERS, FORM_CONFIG, FORM_GRAPH, FORM_LIST, FORM_HANDLE, FORM_HANDLE_GRID, FORM_RANGE,
 FORM_SUBMIT) = range(8)
CALL_LOOKUP, CALL_ALIAS, CALL_IMAGE, CALL_FILE, CALL_LINK = range(5)
CALL_BEGIN, CALL_END, CALL_NODE, CALL_ANY_NODE, CALL_ANY_NODE_V2, CALL_CHILD, CALL_CLONE, CALL_GRAPH = range(5, 13)
CALL_CREATE, CALL_POINTER, CALL_UNLOAD, CALL_NAMED, CALL_EMPTY, CALL_BEGIN_INTO = range(13, 19)

COOKIE_CALL = 0x10000
LAUNCH_FORMS = {
    "cuLaunchKernel": FORM_REGISTERS,
    "cuLaunchKernelEx": FORM_CONFIG,
    "cuLaunchCooperativeKernel": FORM_REGISTERS,
    "cuLaunchCooperativeKernelMultiDevice": FORM_LIST,
    "cuGraphLaunch": FORM_GRAPH,
    "cuLaunch": FORM_HANDLE,
    "cuLaunchGrid": FORM_HANDLE_GRID,
    "cuLaunchGridAsync": FORM_HANDLE_GRID,
    "clEnqueueNDRangeKernel": FORM_RANGE,
    "vkQueueSubmit": FORM_SUBMIT,
}
#: Later forms of a call, counted as that call.
TWINS = {"vkQueueSubmit2": "vkQueueSubmit", "vkQueueSubmit2KHR": "vkQueueSubmit"}

CALL_FORMS = {
    "cuModuleGetFunction": CALL_LOOKUP,
    "cuLibraryGetKernel": CALL_LOOKUP,
    "cuFuncGetName": CALL_NAMED,
    "cuKernelGetName": CALL_NAMED,
    "cuKernelGetFunction": CALL_ALIAS,
    "cuLibraryGetModule": CALL_ALIAS,
    "cuModuleLoadData": CALL_IMAGE,
    "cuModuleLoadDataEx": CALL_IMAGE,
    "cuModuleLoadFatBinary": CALL_IMAGE,
    "cuLibraryLoadData": CALL_IMAGE,
    "cuModuleLoad": CALL_FILE,
    "cuLibraryLoadFromFile": CALL_FILE,
    "cuLinkComplete": CALL_LINK,
    "cuModuleUnload": CALL_UNLOAD,
    "cuLibraryUnload": CALL_UNLOAD,
    "cuStreamBeginCapture": CALL_BEGIN,
    "cuStreamBeginCapture_ptsz": CALL_BEGIN,
    "cuStreamBeginCapture_v2": CALL_BEGIN,
    "cuStreamBeginCapture_v2_ptsz": CALL_BEGIN,
    "cuStreamBeginCaptureToGraph": CALL_BEGIN_INTO,
    "cuStreamBeginCaptureToGraph_ptsz": CALL_BEGIN_INTO,
    "cuStreamEndCapture": CALL_END,
    "cuStreamEndCapture_ptsz": CALL_END,
    "cuGraphCreate": CALL_EMPTY,
    "cuGraphAddKernelNode": CALL_NODE,
    "cuGraphAddKernelNode_v2": CALL_NODE,
    "cuGraphAddNode": CALL_ANY_NODE,
    "cuGraphAddNode_v2": CALL_ANY_NODE_V2,
    "cuGraphAddChildGraphNode": CALL_CHILD,
    "cuGraphClone": CALL_CLONE,
    "cuGraphInstantiate": CALL_GRAPH,
    "cuGraphInstantiate_v2": CALL_GRAPH,
    "cuGraphInstantiateWithFlags": CALL_GRAPH,
    "cuGraphInstantiateWithParams": CALL_GRAPH,
    "cuGraphInstantiateWithParams_ptsz": CALL_GRAPH,
    "clCreateKernel": CALL_CREATE,
    "vkGetDeviceProcAddr": CALL_POINTER,
}
#: Layers of Vulkan export the calls of a device as well, and pass on what the loader counts. Only it exports this.
VULKAN_LOADER = "vkEnumerateInstanceVersion"
MARKS = (b"cuLaunch", b"clEnqueueNDRangeKernel", b"vkQueueSubmit")

Cost = Literal["emulated", "single-step"]


class NotProbeable(Exception):
    """This file is no library of launches, or not one that may be probed; the message says why."""


class Site(Struct, frozen=True):
    """One place to probe: ``offset`` in the file, ``cookie`` for the program (what | form << 8)."""

    symbol: str
    offset: int
    cookie: int
    cost: Cost


class Library(Struct, frozen=True):
    """What may be probed of one library; ``refused`` holds "symbol: why" of exports that may not."""

    build_id: str
    launches: tuple[Site, ...]
    calls: tuple[Site, ...]
    refused: tuple[str, ...] = ()


def read_library(read: Read) -> Library:
    """Find the sites of a driver library, by reading a few bounded pieces of its file.

    Raises
    ------
    NotProbeable
        If this is not an x86-64 ELF file that exports launches.
    """
    try:
        return _read_library(_File(read))
    except (struct.error, IndexError, ValueError, OverflowError) as error:
        message = f"malformed ELF file: {error}"
        raise NotProbeable(message) from error


def _read_library(file: _File) -> Library:
    wanted = _wanted()
    refused: list[str] = []
    sites: dict[bool, dict[int, Site]] = {True: {}, False: {}}
    exports = dict(file.exports({*wanted, VULKAN_LOADER}))
    for symbol, address in exports.items():
        if symbol not in wanted or (symbol.startswith("vk") and VULKAN_LOADER not in exports):
            continue
        offset = file.offset_of(address)
        is_launch, cookie = wanted[symbol]
        try:
            delta, cost = choose_site(file.read(offset, 24) if offset >= 0 else b"")
        except NotProbeable as error:
            refused.append(f"{symbol}: {error}")
            continue
        sites[is_launch].setdefault(offset + delta, Site(symbol, offset + delta, cookie, cost))
    if not sites[True]:
        raise NotProbeable(f"no launch export to probe ({'; '.join(refused) or 'none exported'})")
    return Library(
        build_id=file.build_id(),
        launches=tuple(sites[True].values())[:SITES_MAX],
        calls=tuple(sites[False].values())[:SITES_MAX],
        refused=tuple(refused),
    )


def choose_site(code: bytes) -> tuple[int, Cost]:
    """Return where to probe a function that begins with ``code``, and what a hit costs.

    Raises
    ------
    NotProbeable
        If no place is safe: a five-byte nop is rewritten into a call by kernel 6.18, which then writes below the stack
        pointer; too few bytes cannot be judged.
    """
    if code[:2] == b"\x81\x3d" and (code[10:11] == b"\x74" or code[10:12] == b"\x0f\x84"):
        return 10, "emulated"
    delta = 4 if code[:4] == b"\xf3\x0f\x1e\xfa" else 0
    rest = code[delta:]
    if len(rest) < 16:
        raise NotProbeable("outside the file")
    if _is_push(rest):
        return delta, "emulated"
    if _is_test(rest) and (0x70 <= rest[3] <= 0x7F or (rest[3] == 0x0F and 0x80 <= rest[4] <= 0x8F)):
        return delta + 3, "emulated"
    if rest[:4] in (b"\x0f\x1f\x44\x00", b"\xcc\xcc\xcc\xcc"):
        raise NotProbeable(f"unknown shape {rest[:5].hex(' ')}")
    return delta, "single-step"


def _is_push(code: bytes) -> bool:
    """Return whether this is ``push`` of a 64-bit register, which the kernel emulates."""
    return 0x50 <= code[0] <= 0x57 or (code[0] == 0x41 and 0x50 <= code[1] <= 0x57)


def _is_test(code: bytes) -> bool:
    """Return whether this is ``test`` of a 64-bit register with itself: it leaves all arguments where they are.

    Loaders begin so, with a jump that the kernel emulates behind it.
    """
    return code[0] in (0x48, 0x4D) and code[1] == 0x85 and code[2] >> 6 == 3 and (code[2] >> 3 & 7) == (code[2] & 7)


def _wanted() -> dict[str, tuple[bool, int]]:
    """Return (is a launch, cookie) by symbol; a ``_ptsz`` twin counts as its call."""
    found: dict[str, tuple[bool, int]] = {}
    for name, form in LAUNCH_FORMS.items():
        found[name] = found[f"{name}_ptsz"] = (True, LAUNCH_APIS.index(name) | form << 8)
    for twin, name in TWINS.items():
        found[twin] = found[name]
    for name, form in CALL_FORMS.items():
        found[name] = (False, COOKIE_CALL | form << 8)
    return found


class _File:
    """An x86-64 ELF file, as far as the dynamic linker looks at it."""

    def __init__(self, read: Read) -> None:
        self.read = read
        header = read(0, 64)
        if header[:6] != b"\x7fELF\x02\x01":
            raise NotProbeable("not a little-endian 64-bit ELF file")
        machine, = struct.unpack_from("<H", header, 18)
        if machine != EM_X86_64:
            message = f"machine {machine}: argument registers and emulated instructions are known for x86-64 only"
            raise NotProbeable(message)
        start, = struct.unpack_from("<Q", header, 32)
        size, count = struct.unpack_from("<HH", header, 54)
        if count > SEGMENTS_MAX:
            raise NotProbeable(f"{count} segments")
        #: (type, file offset, address, bytes in the file)
        self._segments = []
        for i in range(count):
            kind, _, offset, address, _, file_bytes = struct.unpack("<IIQQQQ", read(start + i * size, 40))
            self._segments.append((kind, offset, address, file_bytes))

    def offset_of(self, address: int) -> int:
        """Return where in the file the byte at this address comes from, -1 if it is from no file."""
        inside = (address - start + offset for kind, offset, start, size in self._segments
                  if kind == PT_LOAD and start <= address < start + size)
        return next(inside, -1)

    def build_id(self) -> str:
        """Return the GNU build id in hex, "" if the file has none."""
        for kind, offset, _, size in self._segments:
            if kind != PT_NOTE:
                continue
            note = self.read(offset, min(size, 4096))
            at = 0
            while at + 12 <= len(note):
                name_bytes, text_bytes, note_type = struct.unpack_from("<III", note, at)
                text_at = at + 12 + (name_bytes + 3 & ~3)
                if note_type == NT_GNU_BUILD_ID and note[at + 12:at + 16] == b"GNU\0":
                    return note[text_at:text_at + text_bytes].hex()
                at = text_at + (text_bytes + 3 & ~3)
        return ""

    def exports(self, wanted: set[str]) -> Iterator[tuple[str, int]]:
        """Yield (name, address) of the wanted symbols that the file defines."""
        tags = self._tags()
        names = self._at(tags.get(DT_STRTAB, 0), min(tags.get(DT_STRSZ, 0), NAMES_BYTES_MAX))
        if not any(mark in names for mark in MARKS):
            return
        table = self._at(tags.get(DT_SYMTAB, 0), self._symbols(tags) * 24)
        for at, _, _, section, address, _ in struct.iter_unpack("<IBBHQQ", table[:len(table) // 24 * 24]):
            name = names[at:at + NAME_BYTES_MAX].split(b"\0", 1)[0].decode("ascii", "replace") if section else ""
            if name in wanted:
                yield name, address

    def _at(self, address: int, size: int) -> bytes:
        offset = self.offset_of(address)
        return self.read(offset, size) if offset >= 0 else b""

    def _tags(self) -> dict[int, int]:
        place = next(((offset, size) for kind, offset, _, size in self._segments if kind == PT_DYNAMIC), (0, 0))
        data = self.read(place[0], min(place[1], DYNAMIC_BYTES_MAX))
        return dict(struct.iter_unpack("<QQ", data[:len(data) // 16 * 16]))

    def _symbols(self, tags: dict[int, int]) -> int:
        """Return how many symbols there are. No tag says it; the hash tables that they are found by do."""
        if DT_GNU_HASH not in tags:
            chains: int = struct.unpack("<II", self._at(tags[DT_HASH], 8))[1] if DT_HASH in tags else 0
            return min(chains, SYMBOLS_MAX)
        # Buckets hold the first symbol of each chain; a chain ends with an odd hash (do_lookup_x, elf/dl-lookup.c).
        at = tags[DT_GNU_HASH]
        buckets, first, bloom, _ = struct.unpack("<4I", self._at(at, 16))
        at += 16 + 8 * bloom
        firsts = np.frombuffer(self._at(at, 4 * min(buckets, SYMBOLS_MAX)), "<u4")
        last = int(firsts.max(initial=0))
        if not first <= last < SYMBOLS_MAX:
            return min(int(first), SYMBOLS_MAX)
        chain = self._at(at + 4 * (buckets + last - first), 4 * (SYMBOLS_MAX - last))
        ends = np.flatnonzero(np.frombuffer(chain[:len(chain) // 4 * 4], "<u4") & 1)
        return last + 1 + (int(ends[0]) if len(ends) else 0)
