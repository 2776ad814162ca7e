"""The cell holds; what happens to one reader is the matter of one file; and all come out in order."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuguard.code import allow, judge, sandbox, scanning, verdicts, worker
from gpuguard.code.constants import tables
from gpuguard.code.containers.images import make_image
from gpuguard.code.scanning import NoWorker, Progress, Target, files_below, scan, scan_targets
from gpuguard.code.verdicts import FileVerdict, KernelVerdict

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import code_samples as made

CELL = """
import ctypes, mmap, os, socket, sys, threading
from gpuguard.code import sandbox
out = int(sys.argv[1])
import resource
libc = ctypes.CDLL(None)
own = os.open("/proc/self/status", os.O_RDONLY)
sandbox.close_cell((out,), 0, os.getppid())
try:
    {attempt}
    os.write(out, b"did it")
except BaseException as error:
    os.write(out, type(error).__name__.encode())
os._exit(0)
"""


def attempt(code: str) -> tuple[str, int]:
    """Return what somebody in the cell says after trying this, and how he ended."""
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as pipe:
        child = subprocess.Popen([sys.executable, "-c", CELL.format(attempt=code), str(writing)], pass_fds=(writing,),
                                 stderr=subprocess.DEVNULL)
        os.close(writing)
        said = pipe.read().decode()
    return said, child.wait()


def in_the_cell() -> bool:
    return attempt("pass") == ("did it", 0)


cell = pytest.mark.skipif(not in_the_cell(), reason="this host allows no seccomp filter")


@cell
@pytest.mark.parametrize("code", ["open('/etc/passwd')", "open('/tmp/x', 'w')", "os.listdir('/')", "import turtle",
                                  "os.read(own, 1)", "bytearray(800 << 20)", "os.stat('/')"])
def test_what_is_refused(code):
    said, status = attempt(code)
    assert status == 0
    assert said in ("PermissionError", "MemoryError", "OSError", "ModuleNotFoundError", "ImportError")


@cell
@pytest.mark.parametrize("code", [
    "socket.socket()", "socket.socketpair()", "os.fork()", "os.execv('/bin/true', ['true'])", "os.kill(1, 0)",
    "threading.Thread(target=print).start()", "mmap.mmap(-1, 4096, prot=mmap.PROT_EXEC | mmap.PROT_READ)", "os.pipe()",
    "libc.ptrace(0, 0, 0, 0)", "os.memfd_create('x')", "libc.syscall(425, 1, 0)", "os.unlink('/tmp/x')", "os.setuid(0)",
    "resource.setrlimit(resource.RLIMIT_CPU, (1, 1))", "libc.syscall(0x40000000 + 39)",
])
def test_what_kills(code):
    assert attempt(code) == ("", -31)


@cell
def test_what_a_reader_needs_is_there():
    assert attempt("bytearray(100 << 20); os.getpid()") == ("did it", 0)


def test_the_table_of_the_other_machine_is_well_formed():
    for machine in ("x86_64", "aarch64"):
        program = sandbox._program(machine)
        steps = [program[at:at + 8] for at in range(0, len(program), 8)]
        assert steps[-1][0] == steps[2][0] == 0x06
        # Every jump lands inside.
        for at, step in enumerate(steps):
            if step[0] & 0x07 == 0x05:
                assert at + 1 + max(step[2], step[3]) < len(steps)


def test_without_a_table_nothing_is_read(monkeypatch):
    monkeypatch.setattr(sandbox.platform, "machine", lambda: "riscv64")
    with pytest.raises(OSError, match="no table of system calls"):
        sandbox._seccomp()


# -- scanning ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "cache" / "ab12").mkdir(parents=True)
    (tmp_path / "cache" / "ab12" / "kernel.cubin").write_bytes(made.CUBINS[0].read_bytes())
    (tmp_path / "cache" / "ab12" / "kernel.ptx").write_bytes(made.PTX)
    (tmp_path / "broken.so").write_bytes(made.fatbin(made.entry(made.cubin(), packing="lz4", unpacked=7)))
    (tmp_path / "lib.whl").write_bytes(made.wheel({"a.so": made.host_library(made.fatbin(
        *(made.entry(path.read_bytes(), packing="zstd") for path in made.CUBINS[:6])))}))
    (tmp_path / "notes.txt").write_text("nothing")
    (tmp_path / "link").symlink_to("/etc")
    os.mkfifo(tmp_path / "pipe")
    return tmp_path


def test_a_folder_is_read_in_order_whatever_the_number_of_workers(folder):
    every = [[one for one in scan_targets(files_below(folder), workers=workers) if not isinstance(one, Progress)]
             for workers in (1, 2, 4)]
    assert every[0] == every[1] == every[2]
    files = {Path(one.path).name: one for one in every[0] if isinstance(one, FileVerdict)}
    assert sorted(files) == ["broken.so", "kernel.cubin", "kernel.ptx", "lib.whl", "notes.txt"]
    assert "LZ4" in files["broken.so"].malformed[0]
    assert (files["broken.so"].verdict, files["notes.txt"].verdict) == ("unknown", "clear")
    assert files["lib.whl"].images == 6
    assert files["kernel.cubin"].kernels == sum(
        isinstance(one, KernelVerdict) and one.path.endswith("kernel.cubin") for one in every[0])


def test_the_tables_of_a_text_are_read_in_the_cell_too(tmp_path):
    # As nvcc writes a table that rounds in a loop read. Nothing may be imported in the cell: it has no files.
    table = struct.pack("<64I", *(word for word, _ in sorted(tables()["sha256k"].items(), key=lambda one: one[1])))
    text = made.PTX.replace(b"K[4] = {1116352408, 0x71374491, 3049323471, 3921009573}",
                            b"K[256] = {" + ", ".join(map(str, table)).encode() + b"}").replace(b".b32 K", b".b8 K")
    (tmp_path / "kernel.ptx").write_bytes(text)
    kernel, file = [one for one in scan_targets(files_below(tmp_path)) if not isinstance(one, Progress)]
    assert kernel.words == ("sha256k",)
    assert (file.kernels, file.gaps) == (1, ())


def test_shares_of_a_large_file_come_together_in_order(folder, monkeypatch):
    alone = list(scan_targets([Target(str(folder / "lib.whl"))], workers=1))
    monkeypatch.setattr(scanning, "SHARED_FROM_BYTES", 1)
    shared = list(scan_targets([Target(str(folder / "lib.whl"))], workers=3))
    assert [one for one in alone if not isinstance(one, Progress)] == [
        one for one in shared if not isinstance(one, Progress)]


def test_many_files_without_code_are_read_in_order(folder):
    for number in range(3 * scanning.WAITING_FILES_MAX):
        (folder / f"n{number:04}.py").write_text("import torch")
    found = [one.path for one in scan_targets(files_below(folder), workers=2) if isinstance(one, FileVerdict)]
    assert len(found) == 3 * scanning.WAITING_FILES_MAX + 5
    assert found == [one.path for one in files_below(folder)]


def test_python_gets_all_of_it(folder):
    import gpuguard

    found = gpuguard.scan(folder / "cache", workers=1)
    assert len(found.files) == 2
    assert {one.label for one in found.kernels if one.container == "ptx"} == {"unknown"}
    assert scan is gpuguard.scan


def test_what_cannot_be_opened_is_a_gap(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    found = list(scan_targets([Target(str(tmp_path / "gone")), Target(str(tmp_path / "pipe")), Target("/dev/zero")],
                              workers=1))
    assert [one.gaps for one in found] == [
        ("could not be opened: No such file or directory",), ("no regular file",), ("no regular file",)]


def test_a_reader_that_dies_costs_one_file(tmp_path, monkeypatch):
    """A worker's program whose children die on a certain file."""
    for name in ("a", "b", "c"):
        (tmp_path / name).write_bytes(made.CUBINS[0].read_bytes())
    script = tmp_path / "program.py"
    script.write_text(
        "import os, signal\nfrom gpuguard.code import worker\nread = worker.read\n"
        "def reading(job, *rest, **more):\n"
        "    if job.path.endswith('b'):\n        libc.syscall(41, 1, 1, 0)\n    read(job, *rest, **more)\n"
        "import ctypes\nlibc = ctypes.CDLL(None)\nworker.read = reading\nworker.main()\n")
    spawn = subprocess.Popen
    monkeypatch.setattr(scanning.subprocess, "Popen", lambda command, **rest: spawn(
        [sys.executable, str(script), *command[4:]], **rest))
    files = [one for one in scan_targets(files_below(tmp_path), workers=2) if isinstance(one, FileVerdict)]
    found = {Path(one.path).name: one for one in files}
    assert found["b"].gaps == ("its reader did what a reader does not do, and was killed",)
    assert found["a"].gaps == found["c"].gaps == ()
    assert found["a"].kernels == found["c"].kernels > 0


def test_a_program_that_does_not_start_is_an_error(monkeypatch):
    spawn = subprocess.Popen
    monkeypatch.setattr(scanning.subprocess, "Popen", lambda _, **rest: spawn([sys.executable, "-c", "1"], **rest))
    with pytest.raises(NoWorker, match=r"ended with status 0|is gone"):
        list(scan_targets([Target(str(made.CUBINS[0]))] * 3, workers=1))


@pytest.mark.parametrize("content", [b"\xff\xff\xff\xff", b"\x01\0\0\0\xc1", b"\x03\0\0\0\x81\xa1a"])
def test_a_reader_that_writes_nonsense_is_not_listened_to(content):
    reading, writing = os.pipe()
    os.write(writing, content)
    one = scanning._Reading(reading)
    one.receive()
    assert one.failure() == "its reader wrote nonsense"
    os.close(reading)
    os.close(writing)


def test_a_part_survives_the_wire():
    part = worker.Part(3, 4, kernels=(KernelVerdict(
        path="p", container="c", offset=1, arch="sm_90", kernel="k", instructions=2, label="benign", probability=0.5,
        nats=-1.0, verdict="clear", evidence=("because",)),))
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(part), type=worker.Part) == part


@pytest.mark.skipif(not Path("/proc/self/map_files").exists(), reason="this kernel has no map_files")
def test_files_of_a_process_and_its_memory_are_found(tmp_path):
    from gpuguard.code.mapped import targets_of

    mapped = tmp_path / "k.so"
    mapped.write_bytes(made.host_library(made.fatbin(made.entry(made.CUBINS[0].read_bytes()))))
    program = ("import mmap, sys; f = open(sys.argv[1], 'rb'); m = mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ); "
               "held = bytearray(open(sys.argv[2], 'rb').read()); import ctypes; "
               "print(ctypes.addressof(ctypes.c_char.from_buffer(held)), flush=True); sys.stdin.read()")
    child = subprocess.Popen([sys.executable, "-c", program, str(mapped), str(made.CUBINS[1])], stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE)
    try:
        address = int(child.stdout.readline())
        mapped.unlink()
        events = list(scan_targets(targets_of(child.pid, memory=True), workers=1))
    finally:
        child.communicate()
    files = {Path(one.path).name: one for one in events if isinstance(one, FileVerdict)}
    assert files["mem"].images >= 1
    assert address in [one.offset for one in events if isinstance(one, KernelVerdict)], "in a memory it is an address"
    deleted = files["k.so (deleted)"]
    assert deleted.images == 1 or "could not be opened" in deleted.gaps[0]


# -- judging ----------------------------------------------------------------------------------------------------------


def test_what_is_allowed_is_not_judged(tmp_path):
    image = make_image("p", "cubin", 0, "cubin", "sm_90", made.CUBINS[0].read_bytes())
    before = [one for some, _ in judge.judge_image(image) for one in some]
    allow.save(tmp_path / "list", {before[0].text_sha256})
    after = [one for some, _ in judge.judge_image(image, allow.load(tmp_path / "list")) for one in some]
    assert (after[0].label, after[0].evidence) == ("benign", (verdicts.ALLOWED,))
    assert after[1:] == before[1:]


def test_the_list_finds_what_is_on_it_and_refuses_what_is_no_list(tmp_path):
    digests = {f"{number:064x}" for number in range(0, 400, 4)}
    allow.save(tmp_path / "list", digests)
    listed = allow.load(tmp_path / "list")
    assert (len(listed), listed.digests()) == (100, digests)
    assert [f"{number:064x}" in listed for number in range(400)] == [number % 4 == 0 for number in range(400)]
    assert len(allow.load(tmp_path / "none")) == 0
    for content in (b"", b"x" * 65, allow.HEADER + b"z" * 64 + b"\n", allow.HEADER + b"0" * 60 + b"\n"):
        with pytest.raises(allow.BadAllowList):
            allow.AllowList(content)


@pytest.mark.parametrize(("label", "probability", "hits", "verdict"), [
    ("mining", 0.9999, True, "confirmed"), ("mining", 0.9, True, "suspect"), ("cracking", 0.9999, False, "suspect"),
    ("grey:crc", 0.9, False, "clear"), ("benign", 0.01, False, "clear"), ("unknown", 0.01, False, "unknown")])
def test_two_witnesses_confirm(label, probability, hits, verdict):
    assert judge.verdict_of(label, probability, hits=hits) == verdict


def test_a_little_hashing_does_not_confirm_a_library():
    def kernel(label, verdict, instructions):
        return KernelVerdict(path="p", container="", offset=0, arch="sm_90", kernel="k", instructions=instructions,
                             label=label, probability=0.9999, nats=7.0, verdict=verdict)

    def verdict(benign):
        tally = verdicts.Tally()
        tally.add([kernel("mining", "confirmed", 1000), kernel("benign", "clear", benign)])
        return verdicts.of_file("p", tally, images=1, malformed=(), gaps=(), notes=(), size_bytes=1,
                                code_bytes=1).verdict

    assert (verdict(100), verdict(100_000)) == ("confirmed", "suspect")


def file_of(*groups):
    """The verdict on a file of groups of kernels: how many, label, weight in nats, words of a hash."""
    tally = verdicts.Tally()
    for count, label, nats, words in groups:
        tally.add(KernelVerdict(
            path="p", container="", offset=0, arch="sm_90", kernel="k", instructions=300, label=label, nats=nats,
            probability=0.9 if label == "mining" else 0.001, words=words, evidence=("mix",),
            verdict="suspect" if label == "mining" else "clear") for _ in range(count))
    return verdicts.of_file("p", tally, images=1, malformed=(), gaps=(), notes=(), size_bytes=1, code_bytes=1)


def test_a_large_library_is_not_suspect_by_chance():
    one_in_a_hundred = file_of((4950, "benign", 0.0, ()), (50, "mining", 6.0, ()))
    assert (one_in_a_hundred.verdict, one_in_a_hundred.label) == ("clear", "benign")
    assert one_in_a_hundred.probability < 0.01
    assert "50 of 5000" in one_in_a_hundred.notes[0]


@pytest.mark.parametrize("groups", [
    [(1, "mining", 4.0, ())],
    [(20, "benign", 0.0, ()), (1, "mining", 4.0, ())],
    [(5000, "benign", 0.0, ()), (400, "mining", 4.0, ())],
    [(5000, "benign", 0.0, ()), (1, "mining", 7.0, ("sha256k",))],
    [(5000, "benign", 0.0, ()), (1, "mining", 7.0, ("sha256k",)), (30, "mining", 6.0, ())],
])
def test_what_chance_does_not_explain_is_suspect(groups):
    said = file_of(*groups)
    assert (said.verdict, said.label) == ("suspect", "mining")
    assert said.probability > 0.1


@pytest.mark.parametrize("groups", [
    [(1, "mining", 1.4, ())],
    [(5, "benign", 0.0, ()), (3, "mining", 1.4, ())],
])
def test_a_mix_that_weighs_little_is_noted_and_makes_no_file_suspect(groups):
    said = file_of(*groups)
    assert (said.verdict, said.label) == ("clear", "benign")
    assert "look like hashing by mix alone, 1.4 nats at most" in said.notes[0]


@given(st.integers(0, 2000), st.integers(1, 200), st.floats(0.1, 7))
@settings(max_examples=25, deadline=None)
def test_more_benign_kernels_never_make_a_file_worse(benign, accused, nats):
    one = file_of((benign, "benign", 0.0, ()), (accused, "mining", nats, ()))
    more = file_of((2 * benign + 1, "benign", 0.0, ()), (accused, "mining", nats, ()))
    assert (more.verdict == "suspect") <= (one.verdict == "suspect")
    assert more.probability <= one.probability + 1e-12


def test_sockets_are_left_to_nobody():
    """The other end of the clean process closes: it goes, and its children with it."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.close()
    with theirs:
        assert worker.serve(theirs, allow.AllowList()) is None
