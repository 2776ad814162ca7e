"""The audit log: every kind of edit is found, at its place; crashes and full disks cost nothing that was written."""

from __future__ import annotations

import json
import os
import stat

import msgspec
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuguard.broker import audit
from gpuguard.broker.audit import GENESIS, HEAD_NAME, AuditFailed, Log
from gpuguard.cli.commands.audit import command


def fill(folder, count=6, **options):
    log = Log(folder, **options)
    for number in range(count):
        log.append(1000 + number, "broker", "test", {"number": number, "text": 'é\u2028"\\'})
    log.close()
    return audit.files(folder)


def lines(path):
    return path.read_bytes().splitlines(keepends=True)


def reseal(raw, **changes):
    """Forge a line: change it and give it a hash that fits."""
    entry = {**json.loads(raw), **changes}
    del entry["sha256"]
    return audit.seal(entry)[1]


def test_a_log_is_whole_and_for_its_owner_alone(tmp_path):
    [path] = fill(tmp_path)
    report = audit.verify(tmp_path)
    assert (report.ok, report.entries, report.first_seq, report.last_seq) == (True, 6, 1, 6)
    assert json.loads((tmp_path / HEAD_NAME).read_text())["sha256"] == report.head_sha256
    assert {stat.S_IMODE(one.stat().st_mode) for one in (path, tmp_path / HEAD_NAME)} == {0o600}
    assert [entry.body["number"] for entry in audit.read(tmp_path)] == list(range(6))
    assert next(audit.read(tmp_path)).previous_sha256 == GENESIS


def changed_body(rows):
    rows[2] = rows[2].replace(b'"number":2', b'"number":9')


def changed_time(rows):
    rows[2] = rows[2].replace(b"1002", b"1001")


def changed_space(rows):
    rows[2] = rows[2].replace(b'":', b'": ', 1)


def doubled_key(rows):
    rows[2] = rows[2].replace(b'{"number":2', b'{"number":9,"number":2')


def removed(rows):
    del rows[2]


def doubled(rows):
    rows.insert(2, rows[1])


def swapped(rows):
    rows[2], rows[3] = rows[3], rows[2]


def forged_alone(rows):
    rows[1] = reseal(rows[1], kind="forged")


def garbage(rows):
    rows[2] = b"\xff\xfe garbage\n"


def blanked(rows):
    rows[2] = b"\n"


def first_removed(rows):
    del rows[0]


@pytest.mark.parametrize(("edit", "line"), [
    (changed_body, 3), (changed_time, 3), (changed_space, 3), (doubled_key, 3), (removed, 3), (doubled, 3),
    (swapped, 3), (forged_alone, 3), (garbage, 3), (blanked, 3), (first_removed, 1)])
def test_each_kind_of_edit_is_found_at_its_line(tmp_path, edit, line):
    [path] = fill(tmp_path)
    rows = lines(path)
    edit(rows)
    path.write_bytes(b"".join(rows))
    report = audit.verify(tmp_path)
    assert not report.ok
    assert (report.file, report.line) == (path.name, line)
    assert report.problem


def test_the_last_line_forged_is_found_by_the_head(tmp_path):
    [path] = fill(tmp_path)
    rows = lines(path)
    path.write_bytes(b"".join([*rows[:-1], reseal(rows[-1], kind="forged")]))
    report = audit.verify(tmp_path)
    assert (report.ok, report.line) == (False, 6)
    assert "head" in report.problem


@pytest.mark.parametrize("left", [0, 1, 5])
def test_lines_cut_off_the_end_are_found_and_stay_found(tmp_path, left):
    [path] = fill(tmp_path)
    path.write_bytes(b"".join(lines(path)[:left]))
    assert "truncated" in audit.verify(tmp_path).problem
    fill(tmp_path, 1)
    assert not audit.verify(tmp_path).ok, "going on with the log must not make it whole again"


def test_a_log_without_its_head_or_its_first_file_is_not_whole(tmp_path):
    paths = fill(tmp_path, 30, file_bytes_max=2_000)
    assert len(paths) > 3
    assert audit.verify(tmp_path).ok
    (tmp_path / HEAD_NAME).rename(tmp_path / "kept")
    assert HEAD_NAME in audit.verify(tmp_path).problem
    (tmp_path / "kept").rename(tmp_path / HEAD_NAME)
    paths[1].rename(tmp_path / "kept")
    assert audit.verify(tmp_path).file == paths[2].name
    (tmp_path / "kept").rename(paths[1])
    paths[0].unlink()
    assert "missing" in audit.verify(tmp_path).problem
    assert audit.verify(paths[2]).ok, "one file by itself is a piece of the chain"


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_changed_byte_is_found(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("log")
    [path] = fill(folder, 3)
    raw = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(raw) - 1))
    raw[at] ^= data.draw(st.integers(1, 255))
    path.write_bytes(raw)
    assert not audit.verify(folder).ok


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_line_cut_at_any_byte_is_taken_off_and_entered(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("log")
    [path] = fill(folder, 2)
    raw, head = path.read_bytes(), (folder / HEAD_NAME).read_bytes()
    fill(folder, 1)
    torn = path.read_bytes()[len(raw):]
    cut = data.draw(st.integers(1, len(torn) - 1))
    path.write_bytes(raw + torn[:cut])
    (folder / HEAD_NAME).write_bytes(head)
    fill(folder, 1)
    report = audit.verify(folder)
    assert (report.ok, report.entries) == (True, 4)
    assert [entry.kind for entry in audit.read(folder)][2] == "audit.recovered"


def test_a_crash_between_line_and_head_is_no_damage(tmp_path):
    fill(tmp_path, 2)
    head = (tmp_path / HEAD_NAME).read_bytes()
    fill(tmp_path, 1)
    (tmp_path / HEAD_NAME).write_bytes(head)
    assert audit.verify(tmp_path).ok
    fill(tmp_path, 1)
    assert audit.verify(tmp_path).entries == 4


@pytest.mark.parametrize("body", [{"x": float("nan")}, {"x": object()}, {"x": "y" * audit.ENTRY_BYTES_MAX}])
def test_what_cannot_be_said_is_refused_and_changes_nothing(tmp_path, body):
    log = Log(tmp_path)
    log.append(1, "broker", "test", {})
    with pytest.raises(AuditFailed):
        log.append(2, "guard", "test", body)
    log.append(3, "broker", "test", {})
    log.close()
    assert audit.verify(tmp_path).entries == 2


def test_a_write_that_fails_half_way_leaves_no_trace(tmp_path, monkeypatch):
    log = Log(tmp_path)
    log.append(1, "broker", "test", {})
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, data[:20]))
    with pytest.raises(AuditFailed, match="no space"):
        log.append(2, "broker", "test", {})
    monkeypatch.undo()
    log.append(3, "broker", "test", {})
    log.close()
    assert audit.verify(tmp_path).entries == 2


def test_one_writer_at_a_time(tmp_path):
    log = Log(tmp_path)
    with pytest.raises(AuditFailed, match="held"):
        Log(tmp_path)
    log.close()


@settings(max_examples=60, deadline=None)
@given(raw=st.binary(max_size=200))
def test_verify_takes_any_bytes(tmp_path_factory, raw):
    folder = tmp_path_factory.mktemp("log")
    (folder / "audit-000000000001.jsonl").write_bytes(raw)
    (folder / HEAD_NAME).write_bytes(b"")
    assert audit.verify(folder).ok == (raw == b"")
    assert list(audit.read(folder)) == []


def test_a_line_without_end_is_not_read_to_its_end(tmp_path):
    [path] = fill(tmp_path)
    with path.open("ab") as stream:
        stream.truncate(1 << 32)  # zeros, of which the disk holds none
    report = audit.verify(tmp_path)
    assert (report.ok, report.line, report.problem) == (False, 7, "longer than an entry can be")
    assert len(list(audit.read(tmp_path))) == 6
    assert CliRunner().invoke(command, ["show", str(path)]).exit_code == 1


def test_nothing_is_no_whole_log(tmp_path):
    """Who removes the folder's files would otherwise leave a log that is whole."""
    with pytest.raises(FileNotFoundError, match="no audit log"):
        audit.verify(tmp_path)
    (tmp_path / "audit-000000000001.jsonl").touch()
    with pytest.raises(FileNotFoundError, match="no audit log"):
        audit.verify(tmp_path)


def test_the_command_says_where(tmp_path):
    [path] = fill(tmp_path)
    whole = CliRunner().invoke(command, ["verify", str(tmp_path)])
    assert whole.exit_code == 0
    assert "6 entries" in whole.output
    shown = CliRunner().invoke(command, ["show", str(tmp_path), "-o", "json", "--last", "2"])
    assert [json.loads(line)["seq"] for line in shown.output.strip().split("\n")] == [5, 6]
    assert "test" in CliRunner().invoke(command, ["show", str(tmp_path)]).output
    rows = lines(path)
    removed(rows)
    path.write_bytes(b"".join(rows))
    shown = CliRunner().invoke(command, ["show", str(tmp_path)])
    assert (shown.exit_code, "broken" in shown.output) == (1, True), "an empty or short table must not look whole"
    broken = CliRunner().invoke(command, ["verify", str(tmp_path)])
    assert broken.exit_code == 1
    assert f"{path.name} line 3" in broken.output
    answer = CliRunner().invoke(command, ["verify", str(tmp_path), "-o", "json"])
    assert msgspec.json.decode(answer.output)["line"] == 3
    assert CliRunner().invoke(command, ["verify", str(tmp_path / "none")]).exit_code == 3
