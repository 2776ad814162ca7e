"""Names that a tenant gives do not forge a line of /proc: only a newline ends one, and the kernel lets none in."""

from __future__ import annotations

import mmap
import os
import re
import socket
import subprocess

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuguard import proctree
from gpuguard.broker import boxes
from gpuguard.broker.serving import Connection
from gpuguard.messages import Opened, Refused
from gpuguard.proctree import lines_of
from gpuguard.sensors.launches import cooperative, maps
from gpuguard.sensors.processes.procfs import parse_cgroup

#: All that `str.splitlines` and universal newlines take for an end of line, but for the newline itself.
ENDS = ("\r", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029")


@given(st.lists(st.text(st.characters(exclude_characters="\n", exclude_categories=["Cs"])), max_size=8))
def test_lines_are_what_lies_between_newlines(tmp_path_factory, lines):
    path = tmp_path_factory.getbasetemp() / "lines"
    path.write_bytes("".join(f"{line}\n" for line in lines).encode())
    assert lines_of(path) == lines


@pytest.mark.parametrize("end", ENDS)
def test_a_cgroup_cannot_say_that_it_is_another(monkeypatch, tmp_path, end):
    """A user may make cgroups below his own: `a<end>0::`, and below it the path of whomever he wants to be."""
    real = f"/user.slice/user-1000.slice/a{end}0::/system.slice/exempt.service"
    monkeypatch.setattr(proctree, "PROC", tmp_path)
    (tmp_path / "7").mkdir()
    (tmp_path / "7/cgroup").write_bytes(f"0::{real}\n".encode())
    assert proctree.cgroups_of(7) == (real, "")
    hierarchy, path = parse_cgroup(f"0::{real}\n")
    assert hierarchy == ""
    assert path.startswith("/user.slice/user-1000.slice/a")


def test_an_empty_list_of_cgroups_is_none(monkeypatch, tmp_path):
    monkeypatch.setattr(proctree, "PROC", tmp_path)
    (tmp_path / "7").mkdir()
    (tmp_path / "7/cgroup").write_bytes(b"")
    assert proctree.cgroups_of(7) == ("", "")
    assert parse_cgroup("") == ("name=systemd", "")


@pytest.mark.parametrize("end", ENDS)
def test_a_file_cannot_say_that_another_is_mapped(tmp_path, end):
    folder = tmp_path / f"a{end}.."  # what follows begins with "../"
    folder.mkdir()
    with (folder / "root r-xp 00000000 08:01 77 libcuda.so.1").open("w+b") as file:
        file.write(bytes(mmap.PAGESIZE))
        file.flush()
        with mmap.mmap(file.fileno(), mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_EXEC):
            found = list(maps.executable_maps(os.getpid(), maps.read_maps(os.getpid())))
    assert any(tmp_path.name in shown for _, (_, _, shown) in found)
    for path, _ in found:
        assert re.fullmatch(rf"/proc/{os.getpid()}/map_files/[0-9a-f]+-[0-9a-f]+", path), path


def test_a_mapped_file_whose_name_is_no_text_is_shown_as_text(tmp_path):
    with open(bytes(tmp_path) + b"/libcuda.so.1\xff\x1b[2J", "w+b") as file:
        file.write(bytes(mmap.PAGESIZE))
        file.flush()
        with mmap.mmap(file.fileno(), mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_EXEC):
            own = maps.executable_maps(os.getpid(), maps.read_maps(os.getpid()))
            shown = [one for _, (_, _, one) in own if "libcuda" in one]
    assert shown == [f"{tmp_path}/libcuda.so.1\ufffd\ufffd[2J"]


def test_an_answer_that_holds_no_text_does_not_end_the_broker():
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with near, far:
        Connection(near, operator=False).send(Opened(("file \udcff",), "", {}), ())
        assert isinstance(msgspec.msgpack.decode(far.recv(4096), type=Refused), Refused)


MOUNT = "36 35 0:50 / /home/user/a{end}99 rw,nosuid shared:1 - fuse.x x rw\n"
HIERARCHY = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw\n"


@pytest.mark.parametrize("end", [*ENDS, "\udcff"])
def test_whoever_may_mount_does_not_hide_the_hierarchy_of_cgroups(monkeypatch, tmp_path, end):
    (tmp_path / "self").mkdir()
    (tmp_path / "self/mountinfo").write_bytes((MOUNT.format(end=end) + HIERARCHY).encode(errors="surrogateescape"))
    monkeypatch.setattr(boxes, "PROC", tmp_path)
    assert str(boxes.mount()) == "/sys/fs/cgroup"


@pytest.mark.parametrize("end", ENDS)
def test_a_mount_cannot_say_what_another_lies_on(monkeypatch, tmp_path, end):
    """A file on FUSE must be known as such: whoever serves it could let us wait."""
    text = MOUNT.format(end=end).replace("fuse.x", "ext4") + "99 35 0:51 / /served rw - fuse.y y rw\n"
    (tmp_path / "mountinfo").write_bytes(text.encode())
    (tmp_path / "fdinfo").write_bytes(b"pos:\t0\nflags:\t02\nmnt_id:\t99\nino:\t5\n")
    monkeypatch.setattr(maps, "Path", lambda path: tmp_path / path.split("/")[3])
    assert maps.file_system(7, 0) == "fuse.y"
    assert maps.fuse_mounts(7) == {"00:33": "fuse.y"}


@pytest.mark.parametrize("name", [r"\rNSpid:\tx", r"\rNSpid:\t1", r"\034NSpid:\tx"])
def test_a_process_cannot_say_in_its_name_which_pid_it_has(name):
    command = f"printf '{name}' > /proc/$$/comm; echo named; read line"
    with subprocess.Popen(["/bin/sh", "-c", command], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as named:
        assert named.stdout.readline() == b"named\n"
        shown = cooperative._shown_pids()
        named.stdin.write(b"\n")
    assert shown[named.pid][0] == named.pid
    assert named.pid == 1 or named.pid not in shown.get(1, [])
