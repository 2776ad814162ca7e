"""Cubins: machine code for a GPU in ELF64.

A cubin is plain ELF64 with machine 190 (EM_CUDA): one ``.text.<kernel>`` a kernel, ``.nv.constant<bank>`` with literals
and tables (bank 0 holds parameters, one a kernel), ``.nv.global.init`` with initialised globals, ``.nv.info.<kernel>``.
The architecture is in e_flags: bits 0-7 up to ABI version 7 (CUDA 12), bits 8-15 from version 8 (CUDA 13); LLVM's
BinaryFormat/ELF.h names both. Layout: System V ABI, chapter 4 (ELF header, section header, symbol table).
"""

from __future__ import annotations

import itertools
import struct

import msgspec

from gpuguard.code.containers.images import Malformed, printable

MAGIC = b"\x7fELF\x02\x01\x01"  # 64 bits, little-endian, version 1
HEADER_BYTES = 64
SECTION_BYTES = 64
PROGRAM_BYTES = 56
MACHINE_CUDA = 190
SECTIONS_MAX = 400_000
#: What a constant bank holds at most: CUDA C++ Programming Guide, "Compute Capabilities".
BANK_BYTES_MAX = 1 << 16
# C++ kernels of template libraries have names of several thousand characters.
_NAME_BYTES_MAX = 1 << 16
_ABI_WIDE_SM = 8
_NO_BYTES = (8, 0x7000_000A)  # NOBITS, and NVIDIA's own for shared memory: a size, but no bytes in the file
_SHN_XINDEX = 0xFFFF
_SHT_SYMTAB = 2
_STT_OBJECT = 1
_VARIABLES = ".nv.constant3"
_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_SECTION = struct.Struct("<IIQQQQIIQQ")
_SYMBOL = struct.Struct("<IBBHQQ")


class Section(msgspec.Struct, frozen=True):
    """A section that has bytes in the file."""

    name: str
    kind: int
    offset: int
    size: int


class Kernel(msgspec.Struct, frozen=True):
    """The machine code of one kernel or device function, with its padding.

    ``patched``: addresses are written into it when it is loaded (a relocation table belongs to it), so that it may name
    any data of its module without a trace in its bytes.
    """

    name: str
    text: memoryview
    offset: int
    patched: bool = False


class Cubin(msgspec.Struct, frozen=True):
    """What of a cubin is judged.

    ``constants`` are all tables and literals. ``bank`` is the one of them that holds `__constant__` variables (bank 3),
    and ``variables`` says where in it each begins and ends, in order; none where the file does not say it clearly.
    """

    sm: int
    kernels: tuple[Kernel, ...]
    constants: tuple[memoryview, ...]
    bank: memoryview = memoryview(b"")
    variables: tuple[tuple[int, int], ...] = ()


class _Header(msgspec.Struct, frozen=True):
    machine: int
    abi: int
    flags: int
    program_end: int
    section_offset: int
    section_count: int
    names_index: int


def _header(data: bytes | memoryview) -> _Header:
    if len(data) < HEADER_BYTES or bytes(data[:7]) != MAGIC:
        raise Malformed("no ELF64 header")
    (ident, _, machine, _, _, program_offset, section_offset, flags, _, program_size, program_count, section_size,
     section_count, names_index) = _HEADER.unpack(data[:HEADER_BYTES])
    if section_count and section_size != SECTION_BYTES:
        raise Malformed(f"section headers of {section_size} bytes")
    if program_count and program_size != PROGRAM_BYTES:
        raise Malformed(f"program headers of {program_size} bytes")
    program_end = program_offset + program_count * PROGRAM_BYTES if program_count else 0
    return _Header(machine, ident[8], flags, program_end, section_offset, section_count, names_index)


def is_cubin(head: bytes) -> bool:
    """Return whether these first 64 bytes are the header of a cubin."""
    return len(head) >= 20 and head[:7] == MAGIC and int.from_bytes(head[18:20], "little") == MACHINE_CUDA


def tables_end(head: bytes) -> int:
    """Return how many bytes the file has at least, by its header: the end of its header tables."""
    header = _header(head)
    # With more than 65,279 sections the count is 0 here and stands in the first section header.
    count = max(header.section_count, 1)
    return max(HEADER_BYTES, header.program_end, header.section_offset + count * SECTION_BYTES)


def extent(data: bytes) -> int:
    """Return the size of an ELF file whose header tables are all in ``data``."""
    header = _header(data)
    ends = [offset + size for _, kind, offset, size in _entries(data, header) if kind not in _NO_BYTES]
    return max(tables_end(data), *ends, 0)


def _entries(data: bytes | memoryview, header: _Header) -> list[tuple[int, int, int, int]]:
    """Return (name, type, offset, size) of each section header."""
    count = header.section_count
    if not header.section_offset:
        return []
    end = header.section_offset + SECTION_BYTES
    if end > len(data):
        raise Malformed("the section headers lie outside the file")
    if count == 0:
        count = _SECTION.unpack(data[header.section_offset:end])[5]
    if count > SECTIONS_MAX:
        raise Malformed(f"{count} sections")
    end = header.section_offset + count * SECTION_BYTES
    if end > len(data):
        raise Malformed("the section headers lie outside the file")
    rows = _SECTION.iter_unpack(data[header.section_offset:end])
    return [(row[0], row[1], row[4], row[5]) for row in rows]


def sections(data: bytes | memoryview) -> list[Section]:
    """Return all sections. Raise `Malformed` where one lies outside the file."""
    header = _header(data)
    entries = _entries(data, header)
    if not entries:
        return []
    index = header.names_index
    if index == _SHN_XINDEX:
        index = _SECTION.unpack(data[header.section_offset:header.section_offset + SECTION_BYTES])[6]
    if index >= len(entries):
        raise Malformed("the section of names does not exist")
    _, _, names_offset, names_size = entries[index]
    if names_offset + names_size > len(data):
        raise Malformed("the names of the sections lie outside the file")
    names = bytes(data[names_offset:names_offset + names_size])
    return [_section(names, entry, len(data)) for entry in entries]


def _section(names: bytes, entry: tuple[int, int, int, int], size_bytes: int) -> Section:
    name, kind, offset, size = entry
    end = names.find(b"\0", name, name + _NAME_BYTES_MAX)
    if end < 0 and entry != (0, 0, 0, 0):
        raise Malformed("a section's name has no end")
    shown = printable(names[name:end])
    if kind in _NO_BYTES:
        return Section(shown, kind, offset, 0)
    if offset + size > size_bytes:
        raise Malformed(f"section {shown} lies outside the file")
    return Section(shown, kind, offset, size)


def read_cubin(data: bytes) -> Cubin:
    """Return kernels and constants of a cubin, as views into ``data``. Raise `Malformed` if it is none."""
    header = _header(data)
    if header.machine != MACHINE_CUDA:
        raise Malformed(f"machine {header.machine} is no GPU")
    view = memoryview(data)
    kernels, constants, bank = [], [], memoryview(b"")
    listed = list(sections(data))
    patched = {section.name.partition(".text.")[2] for section in listed if section.size and _relocates(section.name)}
    for section in listed:
        part = view[section.offset:section.offset + section.size]
        if section.name.startswith(".text."):
            name = section.name.removeprefix(".text.")
            kernels.append(Kernel(name, part, section.offset, name in patched))
        elif section.size and _holds_constants(section.name):
            constants.append(part)
            bank = part if section.name == _VARIABLES else bank
    if sum(len(kernel.text) for kernel in kernels) > len(data) or sum(map(len, constants)) > len(data):
        raise Malformed("sections overlap")
    sm = header.flags >> 8 & 0xFF if header.abi >= _ABI_WIDE_SM else header.flags & 0xFF
    return Cubin(sm, tuple(kernels), tuple(constants), bank, _variables(view, listed))


def _variables(view: memoryview, listed: list[Section]) -> tuple[tuple[int, int], ...]:
    """Return where the variables of bank 3 lie, by the symbol table; none where that is not clear."""
    banks = [index for index, section in enumerate(listed) if section.name == _VARIABLES]
    tables = [section for section in listed if section.kind == _SHT_SYMTAB]
    if len(banks) != 1 or len(tables) != 1 or listed[banks[0]].size > BANK_BYTES_MAX:
        return ()
    bank, (table,) = listed[banks[0]], tables
    end = table.offset + table.size // _SYMBOL.size * _SYMBOL.size
    spans = {(value, value + size) for _, info, _, index, value, size in _SYMBOL.iter_unpack(view[table.offset:end])
             if index == banks[0] and info & 15 == _STT_OBJECT and 0 < size <= bank.size - value}
    variables = sorted(spans)
    overlap = any(first < before for (_, before), (first, _) in itertools.pairwise(variables))
    return () if overlap else tuple(variables)


def _relocates(name: str) -> bool:
    return name.startswith((".rel.text.", ".rela.text."))


def _holds_constants(name: str) -> bool:
    """Return whether a section holds literals or tables: not the parameters, which are bank 0."""
    bank = name.removeprefix(".nv.constant")
    return name.startswith((".nv.global.init", ".rodata")) or (bank != name and not bank.startswith("0"))
