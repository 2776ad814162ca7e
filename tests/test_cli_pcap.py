"""``gpuguard pcap``: the form of its lines, exit statuses, and files that break off."""

from __future__ import annotations

import gzip
import json
import struct

import pytest
from click.testing import CliRunner

from gpuguard.cli.commands.pcap import command

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


@pytest.mark.parametrize(("host", "status"), [("10.0.0.2", 1), ("203.0.113.9", 0)])
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
