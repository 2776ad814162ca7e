"""Write gpuguard/code/opcodes.toml from rows of (sm, 12-bit opcode, mnemonic).

The rows come from a table (a CSV with the columns sm, opcode12, mnemonic), from the file as it is, and from cubins
that NVIDIA's nvdisasm has read: it prints the mnemonic of each instruction next to its bytes. Only facts are taken, the
name that goes with a number; the disassembler is no part of the product.

usage: learn_opcodes.py [--table rows.csv] [--nvdisasm PATH] [CUBIN...]
"""

from __future__ import annotations

import argparse
import collections
import csv
import re
import struct
import subprocess
import sys
import tomllib
from pathlib import Path

TARGET = Path(__file__).resolve().parent.parent / "gpuguard" / "code" / "opcodes.toml"
HEAD = """\
# What the low 12 bits of an instruction mean: mnemonics without modifiers, each with its opcodes in hexadecimal. Learnt
# by reading the output of nvdisasm beside the bytes, on sm_75 to sm_121; scripts/learn_opcodes.py writes this file.
# [all] holds everywhere. In [[from]] an architecture, and those after it, mean something else by a code.
"""
LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:\{\s*)?(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)")
# One name for what releases of the disassembler name differently (RED), or tell apart by other bits than these twelve:
# Blackwell's matrix instruction is named by the kind of its operands.
SAME_NAME = {"RED": "REDG", "UTCIMMA": "UTCHMMA", "UTCQMMA": "UTCHMMA", "UTCOMMA": "UTCHMMA"}

Rows = dict[int, dict[int, str]]  # opcode -> sm -> mnemonic


def arch_of(cubin: bytes) -> int:
    """Return the architecture that an ELF cubin says it is for: e_flags, whose place changed with ABI version 8."""
    flags = struct.unpack_from("<I", cubin, 48)[0]
    return int(flags >> 8 & 0xFFFF if cubin[8] >= 8 else flags & 0xFF)


def texts(cubin: bytes) -> dict[str, bytes]:
    """Return the code sections of a cubin of our own making: nothing here is hostile."""
    table, = struct.unpack_from("<Q", cubin, 40)
    size, count, names_at = struct.unpack_from("<HHH", cubin, 58)
    rows = [struct.unpack_from("<IIQQQQ", cubin, table + i * size) for i in range(count)]
    names = rows[names_at][4]
    found = {cubin[names + row[0]:cubin.index(0, names + row[0])].decode(): cubin[row[4]:row[4] + row[5]]
             for row in rows if row[1] == 1}
    return {name[6:]: data for name, data in found.items() if name.startswith(".text.")}


def disassembled(nvdisasm: str, path: Path) -> dict[str, list[tuple[int, str]]]:
    """Return (address, mnemonic) of each instruction, by kernel."""
    shown = subprocess.run([nvdisasm, "-c", str(path)], capture_output=True, text=True, check=True).stdout
    kernels: dict[str, list[tuple[int, str]]] = {}
    current: list[tuple[int, str]] = []
    for line in shown.splitlines():
        if line.startswith(".section") or line.lstrip().startswith(".section\t"):
            name = re.search(r"\.text\.([^,\s\"]+)", line)
            current = kernels.setdefault(name.group(1), []) if name else []
        elif row := LINE.search(line):
            current.append((int(row.group(1), 16), row.group(2)))
    return kernels


def pairs(nvdisasm: str, path: Path) -> list[tuple[int, int, str]]:
    """Return (sm, opcode, mnemonic) of every instruction of a cubin."""
    data = path.read_bytes()
    code, sm = texts(data), arch_of(data)
    return [(sm, struct.unpack_from("<H", code[kernel], address)[0] & 0xFFF, name)
            for kernel, rows in disassembled(nvdisasm, path).items() for address, name in rows]


def known() -> Rows:
    """Return the table as it is, [all] as of the first architecture."""
    rows: Rows = collections.defaultdict(dict)
    if TARGET.exists():
        table = tomllib.loads(TARGET.read_text())
        for sm, names in [(75, table["all"]), *((one["sm"], one["names"]) for one in table.get("from", []))]:
            for name, codes in names.items():
                for code in codes.split():
                    rows[int(code, 16)][sm] = name
    return rows


def written(rows: Rows) -> str:
    """Return the file: a code's first name in [all], each later change under the architecture where it begins."""
    parts: dict[int, dict[str, list[int]]] = collections.defaultdict(lambda: collections.defaultdict(list))
    for code, names in sorted(rows.items()):
        last = ""
        for sm, name in sorted(names.items()):
            if name != last:
                parts[sm if last else 0][name].append(code)
            last = name
    lines = [HEAD]
    for sm, names in sorted(parts.items()):
        lines.append(f"\n[[from]]\nsm = {sm}\n[from.names]" if sm else "[all]")
        lines += [f'{name} = "{" ".join(f"{code:03x}" for code in codes)}"' for name, codes in sorted(names.items())]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Read what is known and what is given, and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--table", type=Path)
    parser.add_argument("--nvdisasm", default="nvdisasm")
    parser.add_argument("cubins", nargs="*", type=Path)
    options = parser.parse_args()
    rows = known()
    before = {code: dict(names) for code, names in rows.items()}
    if options.table:
        with options.table.open() as file:
            for row in csv.DictReader(file):
                rows[int(row["opcode12"], 16)][int(row["sm"])] = SAME_NAME.get(row["mnemonic"], row["mnemonic"])
    for path in options.cubins:
        for sm, code, name in pairs(options.nvdisasm, path):
            rows[code][sm] = SAME_NAME.get(name, name)
    TARGET.write_text(written(rows))
    new = sorted(f"{code:03x} {'/'.join(sorted(set(names.values())))}" for code, names in rows.items()
                 if set(names.values()) != set(before.get(code, {}).values()))
    sys.stdout.write(f"{len(rows)} opcodes, new or changed: {', '.join(new) or 'none'}\n")


if __name__ == "__main__":
    main()
