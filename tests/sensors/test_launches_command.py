"""``gpuguard launches``: what it prints of a program that launches, and what it says where it cannot look."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from gpuguard.cli.commands import launches as shown
from gpuguard.sensors import launches
from gpuguard.sensors.launches import cooperative
from tests.sensors.test_launches import run, standins  # noqa: F401  a fixture


def command(*arguments, **options):
    return subprocess.run([sys.executable, "-m", "gpuguard", "launches", *map(str, arguments)], capture_output=True,
                          text=True, check=False, **options)


def test_json_has_every_launch_of_a_process(standins):  # noqa: F811
    process = run(standins["hasher"], "--interval-us", 2000, "--kernel", "kawpow", "--grid", 99)
    done = command("--pid", process.pid, "--seconds", 3, "--interval", 0.5, "-o", "json")
    process.terminate()
    process.communicate()
    assert done.returncode == 0, done.stderr
    *lines, last = [json.loads(line) for line in done.stdout.splitlines()]
    assert last["summary"]["launches"] == sum(line["launches"] for line in lines) > 0
    assert last["summary"]["pids"] == [process.pid]
    first = lines[0]
    assert (first["pid"], first["process"], first["api"]) == (process.pid, "hasher", "cuLaunchKernel")
    assert (first["grid"], first["block"]) == ([99, 1, 1], [128, 1, 1])
    assert {line["name"] for line in lines} <= {"kawpow", ""}


def test_the_table_is_for_people(standins):  # noqa: F811
    process = run(standins["hasher"], "--interval-us", 2000, "--grid", 98)
    # Long enough for two looks on a busy machine: at the first, a name may still come.
    done = command("--pid", process.pid, "--seconds", 5)
    process.terminate()
    process.communicate()
    assert "98x1x1" in done.stdout
    assert "launches of 1 processes" in done.stdout
    assert "gap: process" in done.stderr


def test_where_the_eye_is_closed_it_says_why(monkeypatch, tmp_path):
    from click.testing import CliRunner

    monkeypatch.setattr(launches.probe, "OBJECT", tmp_path / "none.o")
    for name in ("XDG_RUNTIME_DIR", cooperative.FOLDER_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    result = CliRunner().invoke(shown.command, ["--seconds", "1"])
    assert result.exit_code == 3
    assert "GPUGUARD_CAPTURE_DIR" in result.output


@pytest.mark.parametrize("wrong", [("--pid", "0"), ("--seconds", "0"), ("--interval", "0"), ("-o", "xml")])
def test_wrong_usage(wrong):
    assert command(*wrong).returncode == 2


def test_a_kernels_name_writes_nothing_to_the_terminal(capsys):
    line = shown.Line(0, 1, 2, "\x1b]0;x\x07", 3, "\x1b[2J[red]search", "cuLaunchKernel", [1], [1], 0, 5, 5.0)
    shown._show([line], "table", shown.Totals(gaps=["\x1b[31mall is well"]))
    text = "".join(capsys.readouterr())
    assert "\x1b" not in text
    assert "[red]search" in text.replace("\n", "")
