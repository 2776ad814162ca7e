"""``gpuguard pcap``: the form of its lines, exit statuses, and files that break off."""

from __future__ import annotations

import contextlib
import errno
import functools
import gzip
import io
import json
import os
import struct

import pytest
from click.testing import CliRunner

from gpuguard.cli.commands import pcap as pcap_command
from gpuguard.cli.commands.pcap import _add_gap, _print, _Tally, command
from gpuguard.core.flows import FlowTable
from gpuguard.core.records import Gap

FIELDS = {
    "file", "proto", "initiator", "responder", "packets", "bytes", "start_ns", "duration_s", "label", "carrier",
    "verdict", "probability", "decided_after_s", "decided_after_packets", "evidence", "gaps",
}


def frame(side, flags, payload=b"", sequence=0, port=40_000):
    ends = [(bytes([10, 0, 0, 2]), port), (bytes([203, 0, 113, 9]), 443)]
    (source, source_port), (destination, destination_port) = ends[side], ends[1 - side]
    tcp = struct.pack(">HHIIBBHHH", source_port, destination_port, sequence, 0, 5 << 4, flags, 65535, 0, 0) + payload
    ip = struct.pack(">BBHHHBBH4s4s", 0x45, 0, 20 + len(tcp), 0, 0, 64, 6, 0, source, destination)
    return ip + tcp


def pcap(frames, linktype=101):
    data = struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 65535, linktype)
    for time_us, one in frames:
        seconds, rest = divmod(time_us, 1_000_000)
        data += struct.pack("<IIII", 1_700_000_000 + seconds, rest, len(one), len(one)) + one
    return data


def shell(keys=30, port=40_000):
    """A connection out of 10.0.0.2 in which the far side types and is echoed at once."""
    numbers, now, frames = [1, 1], 0, []

    def add(side, flags, payload=b"", after_us=100):
        nonlocal now
        now += after_us
        frames.append((now, frame(side, flags, payload, numbers[side] - (1 if flags & 2 else 0), port)))
        numbers[side] += len(payload)

    add(0, 2)
    add(1, 18, after_us=30_000)
    add(0, 16)
    add(0, 24, b"$ ")
    for key in range(keys):
        add(1, 24, b"x", after_us=120_000 + 9_700 * (key * key % 17))
        add(0, 24, b"x", after_us=300)
    return frames


def test_a_flow_lasts_from_its_first_packet_to_its_last(tmp_path):
    """It is given up later: a question without an answer after half a minute, a connection after longer."""
    lone = [(0, frame(0, 2, port=41_000))]
    talk = [(0, frame(0, 2)), (1_000, frame(1, 18)), (2_000, frame(0, 16)), (250_000, frame(0, 24, b"hello", 1))]
    path = tmp_path / "one.pcap"
    path.write_bytes(pcap(sorted(lone + talk)))
    told = CliRunner().invoke(command, [str(path), "-o", "json"]).stdout.splitlines()
    lasted = {one["initiator"]: one["duration_s"] for one in map(json.loads, told) if "initiator" in one}
    assert lasted == {"10.0.0.2:41000": 0, "10.0.0.2:40000": 0.25}


def run(*arguments):
    result = CliRunner().invoke(command, [str(one) for one in arguments])
    return result, [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]


def test_one_line_a_flow_and_a_summary(tmp_path):
    file = tmp_path / "a.pcap"
    file.write_bytes(pcap(shell()))
    result, lines = run(file, "-o", "json")
    assert result.exit_code == 1
    flow, summary = lines
    assert set(flow) == FIELDS
    assert (flow["proto"], flow["initiator"], flow["responder"]) == ("tcp", "10.0.0.2:40000", "203.0.113.9:443")
    assert (flow["label"], flow["carrier"], flow["verdict"]) == ("reverse-shell", "tcp", "confirmed")
    assert flow["packets"] == 64
    assert flow["bytes"] == 62
    assert 0 < flow["decided_after_packets"] < 64
    assert 0 < flow["decided_after_s"] < flow["duration_s"]
    assert {"class", "text", "nats"} == set(flow["evidence"][0])
    assert summary["summary"]["verdict"] == "confirmed"
    assert summary["summary"]["counts"] == {"unknown": 0, "clear": 0, "suspect": 0, "confirmed": 1}


@pytest.mark.parametrize(("host", "status"), [("10.0.0.2", 1), ("203.0.113.9", 0), ("::ffff:203.0.113.9", 0)])
def test_the_judged_host_decides_whose_doing_it_is(tmp_path, host, status):
    file = tmp_path / "a.pcap.gz"
    file.write_bytes(gzip.compress(pcap(shell())))
    result, lines = run(file, "-o", "json", "--host", host)
    assert result.exit_code == status
    assert lines[0]["verdict"] == ("confirmed" if status else "clear")


def test_a_broken_file_is_told_and_the_rest_is_read(tmp_path):
    cut, whole, empty = tmp_path / "cut.pcap", tmp_path / "whole.pcap", tmp_path / "empty.pcap"
    cut.write_bytes(pcap(shell(3))[:-10])
    whole.write_bytes(pcap(shell(3, port=41_000)))
    empty.write_bytes(b"")
    result, lines = run(cut, empty, whole, tmp_path / "missing.pcap", "-o", "json")
    assert result.exit_code == 3
    assert [one["initiator"] for one in lines[:-1]] == ["10.0.0.2:40000", "10.0.0.2:41000"]
    assert lines[0]["gaps"]
    assert lines[1]["gaps"] == []
    assert lines[-1]["summary"]["gaps"]
    for name in ("cut.pcap", "missing.pcap"):
        assert name in result.stderr


def test_a_file_that_may_not_be_read_keeps_no_other_from_it(tmp_path, monkeypatch):
    """As root everything may be read: so the refusal is played, where the kernel would give it."""
    whole, secret = tmp_path / "whole.pcap", tmp_path / "secret.pcap"
    for file in (whole, secret):
        file.write_bytes(pcap(shell()))
    secret.chmod(0)
    monkeypatch.setattr(os, "access", lambda path, mode, **_: os.fspath(path) != str(secret) or mode == os.F_OK)
    opened = type(whole).open

    def refused(path, *rest, **options):
        if path == secret:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return opened(path, *rest, **options)

    monkeypatch.setattr(type(whole), "open", refused)
    result, lines = run(secret, whole, "-o", "json")
    assert result.exit_code == 1
    assert [one["file"] for one in lines[:-1]] == [str(whole)]
    assert "secret.pcap: Permission denied" in result.stderr


@pytest.mark.parametrize("packed", [bytes, gzip.compress])
def test_a_dash_is_standard_input(packed):
    result = CliRunner().invoke(command, ["-", "-o", "json"], input=packed(pcap(shell())))
    assert result.exit_code == 1
    flow = json.loads(result.stdout.splitlines()[0])
    assert (flow["file"], flow["label"]) == ("-", "reverse-shell")


def test_what_a_damaged_archive_still_holds_is_judged(tmp_path):
    """The packets before the break are read however little there is of them; the reason is said once."""
    packed = gzip.compress(pcap(shell()))
    for name, data in {"cut.gz": packed[:-9], "sum.gz": packed[:-8] + bytes(8), "tail.gz": packed + b"more"}.items():
        file = tmp_path / name
        file.write_bytes(data)
        result, lines = run(file, "-o", "json")
        assert result.exit_code == 1, name
        assert lines[0]["verdict"] == "confirmed", name
        assert len(lines[0]["gaps"]) == 1, name
        assert result.stderr.count(name) == 1, name


def test_names_are_shown_and_are_neither_escapes_nor_markup(tmp_path):
    """File names are bytes that somebody chose; an IPv6 address within brackets looks like Rich's markup."""
    file = tmp_path / os.fsdecode(b"a\xff\x1b[31m[red]b.pcap")
    file.write_bytes(pcap(shell()))
    result, lines = run(file, "-o", "json")
    assert result.exit_code == 1
    assert lines[0]["file"].endswith("a\\udcff\\x1b[31m[red]b.pcap")
    result, _ = run(file)
    assert "[red]" in result.output.replace("\n", "")
    file.write_bytes(b"")
    result, _ = run(file)
    assert result.exit_code == 3
    assert "\x1b" not in result.output + result.stderr


def test_the_ends_of_a_connection_are_shown_whole(tmp_path):
    """The table is for people, who need the address, of IPv6 too."""
    tally = _Tally()
    tally.add({"file": "a[/b].pcap", "initiator": "[fe80::1]:22", "responder": "[fe80::2]:443", "carrier": "tcp",
               "label": "reverse-shell", "verdict": "suspect", "probability": 0.9, "decided_after_s": 1.0,
               "evidence": [{"class": "network", "text": "its name is [/x] \x1b]0;y", "nats": 1.0}]}, "suspect")
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        _print(tally)
    text = shown.getvalue()
    assert "[fe80::1]:22" in text
    assert "[fe80::2]:443" in text
    assert "[/x]" in text
    assert "\x1b]0" not in text


def test_many_flows_are_told_in_bounded_pieces_and_what_was_forgotten_is_counted(tmp_path, monkeypatch):
    """A flood of connections that end at once: their rows are not held until the end of the file."""
    monkeypatch.setattr("gpuguard.core.guard.FlowTable", functools.partial(FlowTable, 64))
    monkeypatch.setattr(pcap_command, "_HELD_ROWS", 100)
    pieces = []

    def dull(name, held, *rest, **options):
        pieces.append(sum(len(one.closed.rows) for one in held))
        return told(name, held, *rest, **options)

    told = pcap_command._dull
    monkeypatch.setattr(pcap_command, "_dull", dull)
    file = tmp_path / "flood.pcap"
    file.write_bytes(pcap([(number * 500, frame(1, 2, port=1024 + number)) for number in range(20_000)]))
    result, lines = run(file, "-o", "json")
    assert result.exit_code == 1, "all ports of one address: a scan"
    assert len(lines) == 20_001
    assert len(pieces) > 2
    assert sum(lines[-1]["summary"]["counts"].values()) == 20_000
    counted = [int(one.split()[-2]) for one in lines[-1]["summary"]["gaps"]]
    assert sum(counted) == 20_000 - 64


def test_what_is_said_of_gaps_is_bounded():
    gaps = []
    for number in range(100):
        _add_gap(gaps, Gap(0, "core", f"lost {number}"))
    assert len(gaps) == pcap_command._GAPS_MAX + 1
    assert gaps[-1] == pcap_command._MORE_GAPS


def test_tables_are_for_people(tmp_path):
    file = tmp_path / "a.pcap"
    file.write_bytes(pcap(shell()))
    result, _ = run(file)
    assert result.exit_code == 1
    assert "reverse-shell" in result.output
    assert "All flows" in result.output


def test_wrong_usage(tmp_path):
    file = tmp_path / "a.pcap"
    file.write_bytes(pcap([]))
    assert run(file, "--host", "not-an-address")[0].exit_code == 2
    assert run()[0].exit_code == 2
    result, lines = run(file, "-o", "json")
    assert result.exit_code == 0
    assert lines == [{"summary": {"verdict": "unknown", "label": "", "probability": 0.0, "evidence": [],
                                  "counts": {"unknown": 0, "clear": 0, "suspect": 0, "confirmed": 0}, "gaps": []}}]
