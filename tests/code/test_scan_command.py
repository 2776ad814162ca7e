"""`gpuguard scan` and `gpuguard code`, as a person or a pipeline meets them."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

import gpuguard
from gpuguard.cli import main

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import code_samples as made

HASHING = next(path for path in made.CUBINS if path.name == "sha256d.sm_90.cubin")
BENIGN = next(path for path in made.CUBINS if path.name == "gemm.sm_90.cubin")
KERNEL_FIELDS = {"path", "container", "offset", "arch", "kernel", "instructions", "label", "verdict", "probability",
                 "nats", "words", "evidence", "text_sha256"}


@pytest.fixture(autouse=True)
def state(tmp_path, monkeypatch):
    monkeypatch.setenv("GPUGUARD_STATE_DIR", str(tmp_path / "state"))


def run(*arguments: object):
    return CliRunner().invoke(main, [str(one) for one in arguments])


def lines(result) -> list[dict]:
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_json_is_a_line_a_kernel_a_line_a_file_and_a_summary(tmp_path):
    library = tmp_path / "lib.so"
    library.write_bytes(made.host_library(made.fatbin(made.entry(BENIGN.read_bytes(), packing="zstd"))))
    result = run("scan", library, HASHING, "-o", "json")
    told = lines(result)
    kernels = [one for one in told if "kernel" in one]
    assert all(set(one) == KERNEL_FIELDS for one in kernels)
    assert {one["container"] for one in kernels} == {"fatbin/zstd", "cubin"}
    assert {one["arch"] for one in kernels} == {"sm_90"}
    accused = [one for one in kernels if one["path"] == str(HASHING)]
    assert [one["label"] for one in accused] == ["mining"]
    assert accused[0]["probability"] > 0.9
    assert any("SHA-256" in one["text"] for one in accused[0]["evidence"])
    assert [one["label"] for one in kernels if one["path"] == str(library)] == ["benign"] * (len(kernels) - 1)
    files = [one for one in told if "file" in one]
    assert [(one["file"], one["verdict"]) for one in files] == [(str(library), "clear"), (str(HASHING), "confirmed")]
    summary = told[-1]["summary"]
    assert (summary["verdict"], summary["label"], summary["counts"]) == ("confirmed", "mining",
                                                                       {"clear": 1, "confirmed": 1})
    assert summary["gaps"] == []
    assert result.exit_code == 1


def test_names_play_no_part(tmp_path):
    data = HASHING.read_bytes()
    start = data.index(b".text.") + len(b".text.")
    name = data[start:data.index(b"\0", start)]
    renamed = tmp_path / "renamed.cubin"
    renamed.write_bytes(data.replace(name, b"g" * len(name)))
    told = lines(run("scan", renamed, "-o", "json"))
    assert told[0]["kernel"].startswith("g")
    assert told[0]["label"] == "mining"


def test_what_is_clear_ends_with_0_and_what_is_broken_with_3(tmp_path):
    assert run("scan", BENIGN).exit_code == 0
    broken = tmp_path / "broken"
    broken.write_bytes(made.fatbin(made.entry(b"x" * 99, packing="lz4", unpacked=7)))
    result = run("scan", broken, "-o", "json")
    assert result.exit_code == 3
    assert "LZ4" in lines(result)[-1]["summary"]["gaps"][0]
    assert run("scan", tmp_path / "gone").exit_code == 3
    # A finding outweighs what could not be read.
    assert run("scan", broken, HASHING).exit_code == 1


def test_wrong_use_ends_with_2():
    assert run("scan").exit_code == 2
    assert run("scan", "--memory", BENIGN).exit_code == 2


def test_the_table_names_what_an_operator_should_see():
    result = run("scan", HASHING, BENIGN)
    assert "What an operator should see" in result.stdout
    assert "confirmed mining" in result.stdout
    assert "2 files" in result.stdout


def test_the_page_needs_nothing_and_shows_names_as_text(tmp_path):
    place = tmp_path / "<b>x.cubin"
    place.write_bytes(HASHING.read_bytes())
    page = run("scan", place, "-o", "html").stdout
    assert page.startswith("<!doctype html>")
    assert "default-src &#x27;none&#x27;" in page
    assert "&lt;b&gt;x.cubin" in page
    assert "<b>x" not in page
    assert "confirmed mining" in page


def test_an_image_of_a_container_is_scanned(tmp_path):
    image = tmp_path / "image.tar"
    image.write_bytes(made.image_of_container([{"opt/m": HASHING.read_bytes()}]))
    result = run("scan", "--image", image, "-o", "json")
    assert result.exit_code == 1
    assert lines(result)[0]["path"].endswith("!/opt/m")


def test_what_was_learnt_is_not_judged():
    assert run("scan", HASHING).exit_code == 1
    learnt = run("code", "learn", HASHING)
    assert learnt.exit_code == 0
    assert "1 kernels learnt" in learnt.stdout
    assert "1 of them look like hashing" in learnt.stdout
    result = run("scan", HASHING, "-o", "json")
    assert result.exit_code == 0
    assert lines(result)[0]["evidence"][0]["text"] == "its code is on the allow list"
    assert "1 kernels on" in run("code", "show").stdout
    assert json.loads(run("code", "show", "-o", "json").stdout)["kernels"] == 1
    assert "0 kernels learnt" in run("code", "learn", HASHING).stdout


def test_a_list_that_is_none_is_refused(tmp_path):
    bad = tmp_path / "bad"
    bad.write_text("hello")
    result = run("scan", BENIGN, "--allow", bad)
    assert result.exit_code == 3
    assert "not an allow list" in result.stderr


def test_a_process_that_is_gone_is_said():
    result = run("scan", "--pid", 2**22 - 1, "-o", "json")
    assert result.exit_code == 3
    assert "process" in result.stderr
    assert lines(result)[-1]["summary"]["gaps"]


def test_only_code_for_one_gpu():
    files = [path for path in made.CUBINS if path.name.startswith("gemm")]
    told = lines(run("scan", "--sm", "90", *files, "-o", "json"))
    assert {one["arch"] for one in told if "kernel" in one} == {"sm_90"}


def test_a_name_of_a_file_reaches_no_terminal_as_it_is(tmp_path):
    for name in (b"not\xffutf-8.cubin", b"two\nlines \x1b[31mred.cubin"):
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)).write_bytes(HASHING.read_bytes())
    told = lines(run("scan", tmp_path, "-o", "json"))
    assert {Path(one["file"]).name for one in told if "file" in one} == {
        r"not\udcffutf-8.cubin", r"two\nlines \x1b[31mred.cubin"}
    assert {one["path"] for one in told if "kernel" in one} == {one["file"] for one in told if "file" in one}
    assert "\x1b" not in run("scan", tmp_path).stdout


def test_a_folder_that_cannot_be_listed_is_a_gap(tmp_path, monkeypatch):
    (tmp_path / "closed").mkdir()
    (tmp_path / "a.cubin").write_bytes(BENIGN.read_bytes())
    listed = os.scandir

    def scandir(folder):
        if os.fspath(folder).endswith("closed"):
            raise PermissionError(13, "Permission denied", folder)
        return listed(folder)
    monkeypatch.setattr(os, "scandir", scandir)
    result = run("scan", tmp_path, "-o", "json")
    files = {Path(one["file"]).name: one["verdict"] for one in lines(result) if "file" in one}
    assert files == {"a.cubin": "clear", "closed": "unknown"}
    assert result.exit_code == 3


def test_the_accused_alone_are_those_that_are_confirmed_too():
    found = gpuguard.scan(HASHING, every_kernel=False)
    assert [(one.label, one.verdict) for one in found.kernels] == [("mining", "confirmed")]
    assert gpuguard.scan(BENIGN, every_kernel=False).kernels == ()
