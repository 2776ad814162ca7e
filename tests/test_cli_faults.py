"""What a newcomer does wrong, and what a hostile name does to his terminal: one line, the right status, no escape."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import click
import msgspec
import pytest
from click.testing import CliRunner, Result

import gpuguard
from gpuguard import paths
from gpuguard.broker import audit, running
from gpuguard.broker.journal import JournalLocked
from gpuguard.cli import main
from gpuguard.cli.tables import escape, print_findings
from gpuguard.code import allow

ROOT = Path(__file__).parent.parent
INCIDENT = str(ROOT / "gpuguard/lab/recordings/incident")
HOSTILE = "a\x1b]0;title\x07\x9b2J\u202egnp\u200b\r\nb[bold]"
SAFE = "a\\x1b]0;title\\x07\\x9b2J\\u202egnp\\u200b\\x0d\\x0ab"


def run(*words: str) -> Result:
    return CliRunner().invoke(main, list(words))


def test_the_list_of_commands_cuts_no_sentence() -> None:
    listed = run("--help").output.partition("Commands:")[2]
    assert " run  " in listed
    assert "with an eye of its own" in " ".join(listed.split())
    assert listed.rstrip().endswith(".")


# -- hostile names ----------------------------------------------------------------------------------------------------


def test_a_name_moves_no_cursor_and_is_no_markup() -> None:
    assert escape(HOSTILE) == f"{SAFE}\\[bold]"
    assert escape("[fe80::1]:22") == "\\[fe80::1]:22", "rich would take an address for a tag and drop it"


def test_findings_are_shown_without_the_escapes_of_their_process(capsys: pytest.CaptureFixture[str]) -> None:
    finding = next(e for e in gpuguard.replay(INCIDENT) if isinstance(e, gpuguard.Finding) and e.process and e.evidence)
    assert finding.process is not None
    evidence = tuple(msgspec.structs.replace(one, text=HOSTILE) for one in finding.evidence)
    process = msgspec.structs.replace(finding.process, name=HOSTILE)
    print_findings([msgspec.structs.replace(finding, process=process, evidence=evidence)],
                   [gpuguard.Gap(time_ns=0, sensor="packets", reason=HOSTILE)])
    assert_inert(capsys.readouterr().out)


def test_a_replay_counts_what_is_dull_and_tells_a_gap_once(capsys: pytest.CaptureFixture[str]) -> None:
    found = [e for e in gpuguard.replay(INCIDENT) if isinstance(e, gpuguard.Finding)]
    accused = next(e for e in found if e.label == "mining")
    dull = msgspec.structs.replace(accused, label="other", verdict="unknown")
    print_findings([dull, accused, dull], [gpuguard.Gap(time_ns=0, sensor="nvml", reason="away")] * 3)
    shown = capsys.readouterr().out
    assert "2 flows in which nothing was seen\n" in shown
    assert "gap nvml: away (3 times)\n" in shown
    assert "other" not in shown


@pytest.mark.parametrize("columns", [80, 200])
def test_findings_can_be_read_on_a_narrow_terminal(
    columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    found = {e.label: e for e in gpuguard.replay(INCIDENT) if isinstance(e, gpuguard.Finding)}
    print_findings([found["ssh-reverse-tunnel"]], [])
    header, *shown = capsys.readouterr().out.splitlines()
    assert header.split()[-1] == ("what" if columns == 80 else "because")
    assert any("ssh-reverse-tunnel" in line for line in shown), "in one piece"
    assert len(shown) < 6, "in lines, not in single words"


@pytest.mark.parametrize("words", [["replay"], ["incidents", "--recording"], ["classify"]])
def test_a_file_that_is_not_there_is_said_once(words: list[str]) -> None:
    result = run(*words, "/no/such/file")
    assert result.stderr == "gpuguard: /no/such/file: No such file or directory\n"
    assert result.exit_code == 3


def test_an_incident_is_a_page() -> None:
    incident = next(e for e in gpuguard.replay(INCIDENT) if isinstance(e, gpuguard.Incident))
    result = run("explain", incident.id, "--recording", INCIDENT, "-o", "html")
    assert result.exit_code == 0
    assert result.output.startswith("<!doctype html>")
    assert incident.id in result.output


def test_an_audit_log_in_which_nothing_stands_yet_is_whole(tmp_path: Path) -> None:
    audit.Log(tmp_path).close()
    result = run("audit", "verify", str(tmp_path))
    assert (result.exit_code, result.output) == (0, f"whole: no entry in {tmp_path}\n")


def test_the_audit_log_is_shown_without_escapes(tmp_path: Path) -> None:
    log = audit.Log(tmp_path)
    log.append(1_700_000_000_000_000_000, "operator", "act.intent", {"id": HOSTILE, "reason": HOSTILE})
    log.close()
    shown = run("audit", "show", str(tmp_path)).output
    assert_inert(shown)
    assert "2023-11-14" in shown, "of an old entry the hour is not enough"


def test_a_time_that_no_calendar_has_is_shown_as_it_is(tmp_path: Path) -> None:
    log = audit.Log(tmp_path)
    log.append(1_700_000_000_000_000_000, "operator", "act.intent", {"id": "x"})
    log.close()
    [file] = audit.files(tmp_path)
    file.write_text(file.read_text().replace("1700000000000000000", "1" + 30 * "0"))
    result = run("audit", "show", str(tmp_path))
    assert (result.exit_code, isinstance(result.exception, SystemExit)) == (1, True), "the log is broken"


@pytest.mark.parametrize("words", [("replay",), ("incidents", "--recording"), ("audit", "verify"), ("audit", "show"),
                                   ("pcap",), ("classify",)])
def test_the_name_of_a_file_is_shown_without_escapes(words: tuple[str, ...], tmp_path: Path) -> None:
    result = run(*words, str(tmp_path / "a\x1b[31m\u202eb"))
    assert result.exit_code == 3
    assert_inert(result.output)


@pytest.mark.parametrize(("words", "name"), [
    (("config", "validate"), "c.toml"), (("run", "--config"), "c.toml"), (("config", "validate"), "p.yaml"),
    (("replay", INCIDENT, "--policy"), "p.yaml"), (("pcap", "missing", "--policy"), "p.yaml"),
])
def test_what_a_settings_file_says_is_shown_without_escapes(words: tuple[str, ...], name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text('["a\\u001b[2J\\nb"]\n' if name == "c.toml" else '"a\\e[2J\\nb": 1\n')
    result = run(*words, str(tmp_path / name))
    assert (result.exit_code, result.output.count("\n")) == (2, 1)
    assert_inert(result.output)


def test_settings_are_shown_without_escapes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "a\x1b[31mb.toml"
    file.write_text('[recording]\ndirectory = "a\\u001b[2J\\u009b2Jb"\n')
    monkeypatch.setenv("GPUGUARD_CONFIG", str(file))
    assert_inert(run("config", "show", "--origin").output)


def assert_inert(text: str) -> None:
    assert text.replace("\n", "").isprintable()
    assert "\\x1b" in "".join(text.split())


# -- wrong arguments --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [
    ("launches", "--seconds", "nan"), ("launches", "--seconds", "inf"), ("launches", "--interval", "nan"),
    ("classify", "x", "--alarms-per-gpu-year", "nan"), ("run", "--record", ""),
])
def test_what_is_no_number_or_name_is_wrong_usage(words: tuple[str, ...]) -> None:
    assert run(*words).exit_code == 2


def test_a_command_that_was_meant_is_named() -> None:
    result = run("incident")
    assert result.exit_code == 2
    assert "No such command 'incident'. Did you mean 'incidents'?" in result.output
    assert "Did you mean" not in run("xyzzy").output


def test_a_demo_whose_page_could_not_be_written_is_not_played(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    words = [sys.executable, "-m", "gpuguard", "demo", "--output", str(tmp_path / "file" / "page")]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.startswith("gpuguard: [Errno 20] Not a directory")


def test_launches_of_nobody_are_not_waited_for() -> None:
    result = run("launches", "--pid", str(1 << 30))
    assert (result.exit_code, result.output) == (3, f"gpuguard: there is no process {1 << 30}\n")


@pytest.mark.parametrize("words", [("replay",), ("incidents", "--recording"), ("explain", "I-1", "--recording"),
                                   ("audit", "verify"), ("audit", "show"), ("pcap",), ("classify",), ("scan",)])
def test_a_missing_file_could_not_be_read_whoever_was_to_read_it(words: tuple[str, ...], tmp_path: Path) -> None:
    assert run(*words, str(tmp_path / "missing")).exit_code == 3


def test_an_allow_list_that_is_named_must_be_there(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"")
    missing = str(tmp_path / "list")
    result = run("scan", "--allow", missing, str(tmp_path / "x"))
    assert result.exit_code == 3
    assert missing in result.output
    assert len(allow.load(tmp_path / "list")) == 0, "the list of the host may lack"
    (tmp_path / "list").write_text("no list")
    with pytest.raises(allow.BadAllowList, match=f"^{missing}: "):
        allow.load(tmp_path / "list")


def test_learning_what_cannot_be_read_is_told(tmp_path: Path) -> None:
    result = run("code", "learn", str(tmp_path / "missing"), "--allow", str(tmp_path / "list"))
    assert result.exit_code == 3
    assert "not read" in result.output


def test_no_audit_log_is_no_whole_one(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_bytes(b"")
    for path in (tmp_path, tmp_path / "empty.jsonl"):
        result = run("audit", "verify", str(path))
        assert (result.exit_code, result.output) == (3, f"gpuguard: {path}: there is no audit log here\n")


def test_a_capture_without_a_flow_says_so(tmp_path: Path) -> None:
    empty = tmp_path / "empty.pcap"
    empty.write_bytes(bytes.fromhex("d4c3b2a1020004000000000000000000ffff000001000000"))
    result = run("pcap", str(empty))
    assert (result.exit_code, result.output) == (0, "no flow was read\n")


def test_a_second_guard_says_that_there_is_a_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in (paths.STATE_VARIABLE, paths.RUNTIME_VARIABLE, paths.LOG_VARIABLE):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setattr(running, "start", locked)
    result = run("run")
    assert (result.exit_code, result.output) == (
        3, "gpuguard cannot run here: a guard, or a command that acts, is at work already: the journal is held\n")


def locked(*_: object, **__: object) -> int:
    raise JournalLocked("the journal is held")


# -- no terminal, no reader, no patience ------------------------------------------------------------------------------


def test_a_closed_standard_output_is_no_finding() -> None:
    done = subprocess.run(["sh", "-c", 'exec "$@" >&-', "sh", sys.executable, "-m", "gpuguard", "config", "schema"],
                          cwd=ROOT, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_recording_is_not_to_blame_for_a_reader_that_left() -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-m", "gpuguard", "replay", INCIDENT, "-o", "events"], cwd=ROOT,
                          stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (3, "")


def test_an_interrupt_while_a_command_is_looked_up_is_no_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(click.Group, "parse_args", interrupted)
    assert run("doctor").exit_code == 130


# -- another's guard --------------------------------------------------------------------------------------------------


@pytest.fixture
def roots_guard(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A user who is not root on a host that root guards; his home."""
    monkeypatch.setattr(paths, "HOST_RUNTIME_DIR", tmp_path / "run")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    for name in (paths.STATE_VARIABLE, paths.RUNTIME_VARIABLE, paths.LOG_VARIABLE, "XDG_RUNTIME_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "home"))
    (tmp_path / "run").mkdir()
    with socket.socket(socket.AF_UNIX) as control:
        control.bind(str(tmp_path / "run" / "control.sock"))
    return tmp_path / "home"


def test_a_user_is_not_told_that_he_disarmed_roots_guard(roots_guard: Path) -> None:
    result = run("disarm", "--reason", "maintenance")
    assert (result.exit_code, result.output) == (3, "not disarmed: the guard of this host is root's: ask as root\n")
    assert not roots_guard.exists()


@pytest.mark.usefixtures("roots_guard")
def test_a_user_is_not_told_that_no_guard_runs_where_roots_does() -> None:
    with pytest.raises(gpuguard.NoGuard, match="root's: ask as root"):
        gpuguard.connect()


def test_a_guard_of_ones_own_is_asked_as_ever(roots_guard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert paths.guarded_by_another()
    paths.control_socket().parent.mkdir(parents=True)
    paths.control_socket().touch()
    assert not paths.guarded_by_another()
    paths.control_socket().unlink()
    monkeypatch.setenv(paths.RUNTIME_VARIABLE, str(roots_guard))
    assert not paths.guarded_by_another(), "who names a place means it"


def test_a_file_that_is_no_socket_is_called_so(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(gpuguard.NoGuard, match="is no socket"):
        gpuguard.connect(tmp_path / "file")
