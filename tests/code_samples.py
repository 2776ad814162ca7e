"""Containers of GPU code, made by hand: what the readers must read, and what a test then breaks."""

from __future__ import annotations

import gzip
import io
import lzma
import struct
import tarfile
import zipfile
from pathlib import Path

import lz4.block
import zstandard

CUBINS = sorted((Path(__file__).parent / "fixtures" / "cubins").glob("*.cubin"))
PTX = b"""//
.version 8.4
.target sm_90
.address_size 64
.const .align 4 .b32 K[4] = {1116352408, 0x71374491, 3049323471, 3921009573};
.global .align 1 .b8 T[4] = {152, 47, 138, 66};
.visible .entry mix(.param .u64 p)
{
\t.reg .b32 %r<9>;
\tmov.u32 \t%r1, %tid.x;
\tshf.l.wrap.b32 %r2, %r1, %r1, 7;
\txor.b32  \t%r3, %r2, 1779033703;
\tadd.s64 \t%rd1, %rd2, -4942790177982912921;
$L__BB0_1:
\tlop3.b32 \t%r4, %r1, %r2, %r3, 150;
\t@%p1 bra \t$L__BB0_1;
\tld.global.v2.u32 \t{%r5, %r6}, [%rd1+123456];
\tfma.rn.f32 \t%f1, %f2, %f3, %f4;
\tst.global.u32 \t[%rd1], %r4;
\tret;
}
"""


def cubin(text: bytes = bytes.fromhex("4d790000000000000000800300ea0f00") * 64, *, name: bytes = b"k", sm: int = 90,
          abi: int = 7, constants: bytes = b"", flags: int | None = None, kind: int = 1,
          relocations: bytes = b"", variables: tuple[tuple[int, int], ...] = ()) -> bytes:
    """One kernel, one bank of constants with its variables (offset and size), relocations, a table of names."""
    names = (b"\0.text." + name + b"\0.nv.constant3\0.nv.constant0." + name + b"\0.shstrtab\0.rel.text." + name
             + b"\0.symtab\0")
    symbols = b"".join(struct.pack("<IBBHQQ", 0, 0x11, 0, 2, offset, size) for offset, size in variables)
    at = 64
    parts = [(1, kind, text), (names.index(b".nv.constant3"), 1, constants),
             (names.index(b".nv.constant0"), 1, b"\x67\xe6\x09\x6a"), (names.index(b".rel.text"), 9, relocations),
             (names.index(b".symtab"), 2, symbols), (names.index(b".shstrtab"), 3, names)]
    rows = [struct.pack("<IIQQQQIIQQ", *[0] * 10)]
    for where, kind_of, content in parts:
        rows.append(struct.pack("<IIQQQQIIQQ", where, kind_of, 0, 0, at, len(content), 0, 0, 1, 0))
        at += len(content)
    if flags is None:
        flags = sm << 8 | 4 if abi >= 8 else sm | sm << 16
    header = struct.pack("<16sHHIQQQIHHHHHH", b"\x7fELF\x02\x01\x01\x41" + bytes([abi]), 2, 190, 1, 0, 0, at, flags,
                         64, 56, 0, 64, len(rows), len(rows) - 1)
    return header + b"".join(content for _, _, content in parts) + b"".join(rows)


def entry(data: bytes, *, packing: str = "", kind: int = 2, sm: int = 90, pad: int = 0, header: int = 64,
          **wrong: int) -> bytes:
    """An entry of a fatbin; ``wrong`` overrides payload, packed or unpacked."""
    packed = {"": lambda: data, "lz4": lambda: lz4.block.compress(data, store_size=False),
              "zstd": lambda: zstandard.ZstdCompressor().compress(data)}[packing]()
    payload = packed + bytes(pad)
    head = bytearray(header)
    struct.pack_into("<HHIQII", head, 0, kind, 0x101, wrong.get("header", header), wrong.get("payload", len(payload)),
                     wrong.get("packed", len(packed) if packing else 0), 0)
    struct.pack_into("<HHI", head, 24, 8, 1, sm)
    struct.pack_into("<Q", head, 40, {"": 0x11, "lz4": 0x2011, "zstd": 0x8011}[packing])
    struct.pack_into("<Q", head, 56, wrong.get("unpacked", len(data) if packing else 0))
    return bytes(head) + payload


def fatbin(*entries: bytes, size: int | None = None) -> bytes:
    body = b"".join(entries)
    return struct.pack("<4sHHQ", b"\x50\xed\x55\xba", 1, 16, len(body) if size is None else size) + body


def host_library(*fatbins: bytes) -> bytes:
    """Some bytes of a program, and fatbins in it, one of them at an odd place."""
    return b"\x7fELF\x02\x01\x01" + bytes(300) + b"\0\0\0".join(fatbins) + b"the end" * 50


def tar(files: dict[str, bytes], form: int = tarfile.GNU_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return out.getvalue()


def wheel(files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return out.getvalue()


def ar(files: dict[str, bytes]) -> bytes:
    """A static library with the long names of SysV."""
    names = b"".join(name.encode() + b"/\n" for name in files)
    out = b"!<arch>\n" + _ar_header("//", len(names)) + names + b"\n" * (len(names) % 2)
    at = 0
    for name, content in files.items():
        out += _ar_header(f"/{at}", len(content)) + content + b"\n" * (len(content) % 2)
        at += len(name) + 2
    return out


def _ar_header(name: str, size: int) -> bytes:
    return f"{name:<16}{0:<12}{0:<6}{0:<6}{'644':<8}{size:<10}`\n".encode()


def packed(kind: str, data: bytes) -> bytes:
    return {"gzip": gzip.compress, "xz": lzma.compress, "bzip2": __import__("bz2").compress,
            "zstd": zstandard.ZstdCompressor().compress}[kind](data)


def image_of_container(layers: list[dict[str, bytes]]) -> bytes:
    """What `docker save` writes, in the OCI layout: layers are packed tars among others."""
    files = {"oci-layout": b'{"imageLayoutVersion":"1.0.0"}', "manifest.json": b"[]"}
    for number, layer in enumerate(layers):
        files[f"blobs/sha256/{number:064x}"] = gzip.compress(tar(layer))
    return tar(files)
