"""The cell in which hostile bytes are read: no file, no socket, no other program, so much memory, so much time.

A reader that is taken over by what it reads holds one file that it may read and one pipe that it may write. Nothing
else is left: limits (setrlimit(2)), another uid where we are root and no way back (prctl(2)), Landlock where the kernel
has it (landlock(7)), and last a table of system calls (seccomp(2)). Whatever is in no table kills the process at once;
the few calls that libraries make for themselves and can do without are refused with an error. Where the table cannot be
installed nothing is read: `close_cell` raises.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import resource
import struct
from pathlib import Path

from gpuguard import confine

MEMORY_BYTES = 420 << 20  # beyond what the process has when the cell closes
CPU_SECONDS = 120
CPU_BYTES_PER_SECOND = 1 << 20
_NOBODY = (65_534, 65_534)

_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 22, 2
_ALLOW, _KILL, _REFUSE = 0x7FFF_0000, 0x8000_0000, 0x0005_0000 | errno.EACCES
_LOAD, _JUMP_EQUAL, _JUMP_GREATER_EQUAL, _JUMP_ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER, _ARCHITECTURE, _PROTECTION = 0, 4, 32  # offsets in struct seccomp_data: nr, arch, low half of args[2]
_X32_BIT = 0x4000_0000
_PROT_EXEC = 4

# Numbers of x86_64 (asm/unistd_64.h) and of aarch64 (asm-generic/unistd.h).
_ALLOWED = {
    "read": (0, 63), "write": (1, 64), "close": (3, 57), "fstat": (5, 80), "lseek": (8, 62), "munmap": (11, 215),
    "brk": (12, 214), "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139),
    "pread64": (17, 67), "sched_yield": (24, 124), "mremap": (25, 216), "madvise": (28, 233), "getpid": (39, 172),
    "exit": (60, 93), "gettid": (186, 178), "futex": (202, 98), "restart_syscall": (219, 128),
    "clock_gettime": (228, 113), "exit_group": (231, 94), "getrandom": (318, 278),
}
# Memory that is never made executable.
_WITHOUT_EXEC = {"mmap": (9, 222), "mprotect": (10, 226)}
_REFUSED = {
    "ioctl": (16, 29), "dup": (32, 23), "fcntl": (72, 25), "getcwd": (79, 17), "openat": (257, 56),
    "newfstatat": (262, 79), "readlinkat": (267, 78), "faccessat": (269, 48), "sched_getaffinity": (204, 123),
    "getrusage": (98, 165),
}
_REFUSED_X86 = (2, 4, 6, 21, 89)  # open, stat, lstat, access, readlink: gone in newer tables
_MACHINES = {"x86_64": (0, 0xC000_003E), "aarch64": (1, 0xC000_00B7)}


class CellOpen(OSError):
    """The sandbox could not be closed here; nothing may be read."""


def close_cell(descriptors: tuple[int, ...], size_bytes: int, parent: int) -> None:
    """Give up everything but these descriptors. There is no way back; raises `CellOpen` where it cannot be done."""
    _keep_only(descriptors)
    try:
        held = _held_bytes()  # another uid may not read it
        _drop(parent)
        _landlock()
        _limits(held, size_bytes, max(descriptors) + 1)
        _seccomp()
    except OSError as error:
        raise CellOpen(error.errno, f"no sandbox here: {error.strerror}") from error


def _keep_only(descriptors: tuple[int, ...]) -> None:
    """Standard streams become /dev/null: no terminal is written to by who reads other people's bytes."""
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        if standard not in descriptors:
            os.dup2(null, standard)
    last = 2
    for descriptor in sorted({*descriptors} - {0, 1, 2}):
        os.closerange(last + 1, descriptor)
        last = descriptor
    os.closerange(last + 1, os.sysconf("SC_OPEN_MAX"))


def _drop(parent: int) -> None:
    """Where we are root become nobody; in a namespace that has no such uid root without powers must do."""
    if os.geteuid() == 0:
        try:
            confine.drop(_NOBODY, parent)
        except OSError:
            confine.drop(None, parent)
    else:
        confine.drop(None, parent)


def _limits(held: tuple[int, int], size_bytes: int, descriptors: int) -> None:
    held_data, held_all = held
    wanted = {
        resource.RLIMIT_DATA: held_data + MEMORY_BYTES,
        resource.RLIMIT_AS: held_all + 2 * MEMORY_BYTES,
        resource.RLIMIT_CPU: CPU_SECONDS + size_bytes // CPU_BYTES_PER_SECOND,
        resource.RLIMIT_NOFILE: descriptors,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_NPROC: 0,
        resource.RLIMIT_CORE: 0,
    }
    for which, limit in wanted.items():
        hard = resource.getrlimit(which)[1]
        lower = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(which, (lower, lower))


def _held_bytes() -> tuple[int, int]:
    """Return what of data and of address space is held now."""
    pages = Path("/proc/self/statm").read_text(encoding="ascii").split()
    page = resource.getpagesize()
    return int(pages[5]) * page, int(pages[0]) * page


def _landlock() -> None:
    """Handle every right that this kernel knows and grant none. Kernels before 5.13 have no such thing."""
    libc = ctypes.CDLL(None, use_errno=True)
    abi = libc.syscall(444, None, 0, 1)  # landlock_create_ruleset: the same number everywhere
    if abi < 1:
        return
    files = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(abi, 16)) - 1
    network = 0b11 if abi >= 4 else 0
    scoped = 0b11 if abi >= 6 else 0
    rights = struct.pack("=QQQ", files, network, scoped)[:8 if abi < 4 else 16 if abi < 6 else 24]
    ruleset = libc.syscall(444, rights, len(rights), 0)
    if ruleset < 0:
        raise OSError(ctypes.get_errno(), "landlock_create_ruleset")
    restricted = libc.syscall(446, ruleset, 0)
    os.close(ruleset)
    if restricted != 0:
        raise OSError(ctypes.get_errno(), "landlock_restrict_self")


def _program(machine: str) -> bytes:
    """Return the filter of classic BPF for a machine."""
    column, architecture = _MACHINES[machine]
    steps = [(_LOAD, 0, 0, _ARCHITECTURE), (_JUMP_EQUAL, 1, 0, architecture), (_RETURN, 0, 0, _KILL),
             (_LOAD, 0, 0, _NUMBER)]
    if machine == "x86_64":
        steps += [(_JUMP_GREATER_EQUAL, 0, 1, _X32_BIT), (_RETURN, 0, 0, _KILL)]
    for numbers in _ALLOWED.values():
        steps += [(_JUMP_EQUAL, 0, 1, numbers[column]), (_RETURN, 0, 0, _ALLOW)]
    for number in [one[column] for one in _REFUSED.values()] + list(_REFUSED_X86 if machine == "x86_64" else ()):
        steps += [(_JUMP_EQUAL, 0, 1, number), (_RETURN, 0, 0, _REFUSE)]
    for numbers in _WITHOUT_EXEC.values():
        steps += [(_JUMP_EQUAL, 0, 4, numbers[column]), (_LOAD, 0, 0, _PROTECTION),
                  (_JUMP_ANY_BIT, 0, 1, _PROT_EXEC), (_RETURN, 0, 0, _KILL), (_RETURN, 0, 0, _ALLOW)]
    steps.append((_RETURN, 0, 0, _KILL))
    return b"".join(struct.pack("=HBBI", *step) for step in steps)


def _seccomp() -> None:
    machine = platform.machine()
    if machine not in _MACHINES:
        raise OSError(errno.ENOSYS, f"no table of system calls for {machine}")
    program = _program(machine)
    held = ctypes.create_string_buffer(program, len(program))
    heading = struct.pack("=H6xQ", len(program) // 8, ctypes.addressof(held))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, heading, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "seccomp is refused")
