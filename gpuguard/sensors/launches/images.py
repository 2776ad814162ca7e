"""GPU code as the broker hands it out: read from a process, or from a file that it named, into a sealed memfd.

Only what begins like GPU code is read, and no more of it than its own header says: this is no way to read memory or
files at large.
"""

from __future__ import annotations

import os
import stat
import struct
from typing import TYPE_CHECKING, Literal

from gpuguard.messages import Answer, Opened, ReadImage, Refused
from gpuguard.redaction import printable
from gpuguard.sealing import sealed
from gpuguard.sensors.launches.maps import file_system, start_ticks_of

if TYPE_CHECKING:
    from gpuguard.core.subjects import ProcessId

IMAGE_BYTES_MAX = 64 * 1024 * 1024
IMAGE_CHUNK_BYTES = 1024 * 1024
PTX_BYTES_MAX = 4 * 1024 * 1024
HEADER_BYTES = 64

ELF_MACHINE_CUDA = 190  # EM_CUDA of elf.h
FATBIN_MAGIC = 0xBA55ED50  # fatbinary_section.h: magic u32, version u16, header bytes u16, payload bytes u64
ImageKind = Literal["cubin", "fatbin", "ptx", "unknown"]


def image_extent(header: bytes) -> tuple[ImageKind, int]:
    """Return the kind of a GPU code image and its size in bytes as its first 64 bytes tell; 0 where they do not.

    An ELF file ends where its last table of headers ends, which is how NVIDIA's tools write cubins. PTX is text that
    ends with NUL, so its header says no size.
    """
    if header[:6] == b"\x7fELF\x02\x01" and len(header) >= HEADER_BYTES:
        machine, = struct.unpack_from("<H", header, 18)
        programs, sections = struct.unpack_from("<QQ", header, 32)
        _, program_bytes, program_count, section_bytes, section_count = struct.unpack_from("<5H", header, 52)
        size = max(HEADER_BYTES, programs + program_bytes * program_count, sections + section_bytes * section_count)
        return ("cubin", size) if machine == ELF_MACHINE_CUDA else ("unknown", 0)
    if len(header) >= 16 and struct.unpack_from("<I", header)[0] == FATBIN_MAGIC:
        header_bytes, payload_bytes = struct.unpack_from("<HQ", header, 6)
        return "fatbin", header_bytes + payload_bytes
    text = header.split(b"\0", 1)[0].lstrip()
    if text.startswith((b"//", b".version", b".target")) and all(32 <= c < 127 or c in b"\t\r\n" for c in text):
        return "ptx", 0
    return "unknown", 0


def read_image(request: ReadImage) -> tuple[Answer, list[int]]:
    """Read GPU code from a process into a sealed memfd.

    /proc/PID/mem is bound at open to the address space of one process: the start time is checked after it was opened
    and again at the end, so that no byte of another process can be handed out.
    """
    process = request.process
    if request.path:
        return _read_image_file(process, request.path)
    try:
        fd = os.open(f"/proc/{process.pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        return Refused(f"{process}: {error.strerror}"), []
    try:
        if start_ticks_of(process.pid) != process.start_ticks:
            return Refused(f"{process} is another process by now"), []
        kind, size = image_extent(os.pread(fd, HEADER_BYTES, request.address))
        if kind == "unknown":
            return Refused(f"no GPU code at {request.address:#x} of {process}"), []
        code = _read_memory(fd, request.address, min(size or PTX_BYTES_MAX, IMAGE_BYTES_MAX), text=kind == "ptx")
        if start_ticks_of(process.pid) != process.start_ticks:
            return Refused(f"{process} ended meanwhile"), []
    except (OSError, OverflowError) as error:
        return Refused(f"{process}: {error}"), []
    finally:
        os.close(fd)
    return Opened(("image",), kind, {"size_bytes": len(code), "claimed_bytes": size}), [sealed("gpu-code", code)]


def _read_image_file(process: ProcessId, named: bytes) -> tuple[Answer, list[int]]:
    """Read a file of GPU code as the process named it, by its own root and folder, into a sealed memfd.

    The path was written by the tenant: it may lead anywhere below the process's root and nowhere else, and to a file on
    whose contents nobody can let us wait. As with memory, only what is GPU code is handed out.
    """
    from gpuguard import _launches

    path = printable(os.fsdecode(named))
    try:
        root = os.open(f"/proc/{process.pid}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            where = os.path.join(os.readlink(f"/proc/{process.pid}/cwd".encode()), named)  # noqa: PTH115, PTH118 no text
            fd = _launches.open_in_root(root, where)
        finally:
            os.close(root)
    except (OSError, ValueError) as error:
        return Refused(printable(f"{process}: {path}: {error}")), []
    try:
        served = file_system(process.pid, fd)
        if served.startswith("fuse"):
            return Refused(f"{process}: {path} lies on {served}, whose server could let us wait"), []
        if start_ticks_of(process.pid) != process.start_ticks:
            return Refused(f"{process} is another process by now"), []
        content = _content(fd)
    except OSError as error:
        return Refused(printable(f"{process}: {path}: {error}")), []
    finally:
        os.close(fd)
    kind, size = image_extent(content[:HEADER_BYTES])
    if kind == "unknown" or (kind == "ptx" and (b".version" not in content or b".target" not in content)):
        return Refused(f"{path} of {process} is no GPU code"), []
    content = content[:size or PTX_BYTES_MAX]
    return Opened(("image",), kind, {"size_bytes": len(content), "claimed_bytes": size}), [sealed("gpu-code", content)]


def _content(fd: int) -> bytes:
    """Return the first IMAGE_BYTES_MAX bytes of a regular file."""
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        return b""
    with os.fdopen(os.dup(fd), "rb") as stream:
        return stream.read(IMAGE_BYTES_MAX)


def _read_memory(fd: int, address: int, size: int, *, text: bool) -> bytes:
    """Return up to ``size`` bytes; less where memory ends before, or the text does."""
    chunks: list[bytes] = []
    done = 0
    while done < size:
        # Chunks end on page bounds, so that an unmapped page costs no byte before it.
        wanted = min(IMAGE_CHUNK_BYTES if not text else 4096, size - done)
        wanted = min(wanted, IMAGE_CHUNK_BYTES - (address + done) % 4096)
        try:
            chunk = os.pread(fd, wanted, address + done)
        except OSError:
            break
        if text and b"\0" in chunk:
            chunks.append(chunk[:chunk.index(b"\0")])
            break
        if not chunk:
            break
        chunks.append(chunk)
        done += len(chunk)
    return b"".join(chunks)
