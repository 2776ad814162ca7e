"""The unit for systemd: it verifies, starts what there is, and forbids nothing that the daemon does.

That its capabilities are enough is shown by tests/test_enforce_live.py, which runs the daemon with no others.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from gpuguard import paths
from gpuguard.cli import main
from gpuguard.cli.output import EXIT_USAGE
from gpuguard.daemon import WATCHING_NS

UNIT = Path(__file__).parents[2] / "deploy" / "gpuguard.service"
PROGRAM = "/opt/gpuguard/bin/gpuguard"
SYSTEMD = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze here")

#: What is called beyond the calls of an ordinary service: by the eyes, by acts, and by the reader of GPU code.
CALLS = {"bpf", "perf_event_open", "setns", "pidfd_open", "pidfd_getfd", "pidfd_send_signal", "memfd_create", "capset",
         "landlock_create_ruleset", "landlock_restrict_self", "prctl", "setgroups", "setresuid", "prlimit64"}


def values(key: str) -> list[str]:
    return [value for line in UNIT.read_text().splitlines() for name, _, value in [line.partition("=")] if name == key]


def allowed() -> set[str]:
    """Every system call that SystemCallFilter= names, groups of them taken apart."""
    shown = subprocess.check_output(["systemd-analyze", "syscall-filter", "--no-pager"], text=True)
    groups: dict[str, list[str]] = {}
    for line in shown.splitlines():
        word = line.strip()
        if word.startswith("@") and line == word:
            members = groups.setdefault(word, [])
        elif word and not word.startswith("#"):
            members.append(word)
    left, found = " ".join(values("SystemCallFilter")).split(), set()
    while left:
        word = left.pop()
        if word in found:
            continue
        found.add(word)
        left += groups.get(word, [])
    return found


@SYSTEMD
def test_systemd_understands_it(tmp_path: Path) -> None:
    installed = tmp_path / UNIT.name
    installed.write_text(UNIT.read_text().replace(PROGRAM, sys.executable))
    done = subprocess.run(["systemd-analyze", "verify", str(installed)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert UNIT.name not in done.stderr, "of other units it may complain"


@SYSTEMD
def test_no_system_call_that_is_needed_is_forbidden() -> None:
    assert not CALLS - allowed()
    assert not {"mount", "init_module", "reboot"} & allowed()


def test_it_starts_commands_that_there_are() -> None:
    for key in ("ExecStart", "ExecStopPost"):
        [line] = values(key)
        program, *words = shlex.split(line.removeprefix("-"))
        assert program == PROGRAM
        assert CliRunner().invoke(main, [*words, "--help"]).exit_code == 0


def test_it_is_ready_when_it_watches_and_is_ended_when_it_hangs() -> None:
    assert (values("Type"), values("NotifyAccess")) == (["notify"], ["main"]), "the broker tells, nobody else"
    assert int(values("WatchdogSec")[0]) * 1_000_000_000 > 4 * WATCHING_NS
    assert values("WatchdogSignal") == ["SIGTERM"], "a broker that lives undoes what is in force"


def test_only_wrong_settings_end_it_for_good() -> None:
    assert (values("Restart"), values("StartLimitIntervalSec")) == (["always"], ["0"])
    assert values("RestartPreventExitStatus") == [str(EXIT_USAGE)]


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("setpriv") is None, reason="needs root and setpriv")
def test_a_folder_is_handed_to_the_guard_without_power_over_what_is_others(tmp_path: Path) -> None:
    """CAP_CHOWN is in the unit, CAP_FOWNER is not: twice, as at a second start."""
    script = f"""
from pathlib import Path
from gpuguard import paths
for _ in range(2):
    paths.make_dir(Path({str(tmp_path / "guard")!r}), mode=0o700, uid=65534, gid=65534)
"""
    done = subprocess.run(["setpriv", "--bounding-set", "-all,+chown", sys.executable, "-c", script],
                          capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    status = (tmp_path / "guard").stat()
    assert (status.st_uid, status.st_mode & 0o777) == (65534, 0o700)
    assert "CAP_FOWNER" not in " ".join(values("CapabilityBoundingSet")).split()
    assert paths.make_dir(tmp_path / "ours", mode=0o711).stat().st_mode & 0o777 == 0o711
