"""benchmarks/detection.py reads what other programs print: lines as those print them, and how they are counted."""

from __future__ import annotations

import gzip
import json
import struct
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import detection
from peers import detectors
from peers.detectors import Told

ENDS = frozenset({"10.0.0.1", "10.0.0.2"})


def test_ndpi_tells_categories_and_risks():
    printed = ("\t3\tTCP 10.0.0.1:47476 <-> 10.0.0.2:2204 [proto: 92/SSH][Encrypted][Confidence: DPI]"
               "[cat: RemoteAccess/12][24 pkts/4681 bytes <-> 93 pkts/10579 bytes]"
               "[Risk: ** Known Protocol on Non Standard Port **** SSH Obsolete Client Version/Cipher **]\n"
               "\t4\tUDP [fe80::1]:546 -> [ff02::1:2]:547 [proto: 103/DHCPV6][cat: Network/14]\n"
               "Risk stats [found 36 (100.0 %) flows with risks]:\n")
    assert list(detectors._read_ndpi(Path(), printed)) == [
        Told(ENDS, "category RemoteAccess", None), Told(ENDS, "risk Known Protocol on Non Standard Port", None),
        Told(ENDS, "risk SSH Obsolete Client Version/Cipher", None),
        Told(frozenset({"fe80::1", "ff02::1:2"}), "category Network", None)]


def test_suricata_tells_alerts_but_not_checksums(tmp_path):
    alert = {"event_type": "alert", "timestamp": "2026-01-01T00:00:01.500000+0000", "src_ip": "10.0.0.1",
             "dest_ip": "10.0.0.2", "alert": {"signature": "ET COINMINER Crypto Coin Miner Login"}}
    others = [alert | {"alert": {"signature": "SURICATA TCPv4 invalid checksum"}}, {"event_type": "flow"}]
    (tmp_path / "eve.json").write_text("".join(json.dumps(one) + "\n" for one in (alert, *others)))
    told, = detectors._read_suricata(tmp_path, "")
    assert told == Told(ENDS, "ET COINMINER Crypto Coin Miner Login", 1_767_225_601_500_000_000)


def test_packet_strider_tells_reverse_events():
    rows = (("1;36", "32        3.167     1.924     forward   keystroke        36              "),
            ("1;31", "72        5.707     0.22      reverse   session init     84    Delta (>2s)"),
            ("1;31", "17        1.5       0.1       reverse   -R used          84              "),
            ("1;31", "103       7.087     0.252     reverse   _\u2503 ENTER        252             "))
    printed = "".join(f"\u2503       \x1b[{colour};40m{text}\x1b[0m\n" for colour, text in rows)
    assert [(one.output, one.time_ns) for one in detectors.read_packet_strider(Path(), printed)] == [
        ("session init", 5_707_000_000), ("-R used", 1_500_000_000), ("keys", 7_087_000_000)]


def test_what_was_cut_off_is_filled(tmp_path):
    frame = bytes(range(60))
    path = tmp_path / "one.pcap.gz"
    path.write_bytes(gzip.compress(detection.PCAP_HEAD + struct.pack("=IIII", 5, 7, 60, 100) + frame))
    (time_us, record), = detection._whole(path)
    assert time_us == 5_000_007
    assert record[:76] == struct.pack("=IIII", 5, 7, 100, 100) + frame
    assert len(record) == 116
    assert list(detection._whole(path)) == [(time_us, record)]  # the same noise every time


@pytest.mark.parametrize(("who", "kind", "output", "named"), [
    ("nDPI", "mining-pool", "category Mining", True),
    ("nDPI", "mining-pool", "category Crypto_Currency", True),
    ("nDPI", "dns-tunnel", "risk Suspicious DNS Traffic", True),
    ("nDPI", "dns-tunnel", "category Network", False),
    ("nDPI", detection.REVERSE_KIND, "risk Known Protocol on Non Standard Port", False),
    ("nDPI", detection.ORDINARY, "category Mining", True),
    ("Suricata", "mining-pool", "ET COINMINER Crypto Coin Miner Login", True),
    ("packetStrider", detection.REVERSE_KIND, "session init", True),
    ("packetStrider", detection.SHELL_KIND, "-R used", False),
    ("GPUGuard", detection.REVERSE_KIND, "ssh-reverse-tunnel", True),
    ("GPUGuard", "dns-tunnel", "icmp-tunnel", False),
    ("GPUGuard", "scan|dns-tunnel", "dns-tunnel", True),
    ("GPUGuard", detection.ORDINARY, "reverse-shell", True),
])
def test_what_names_a_kind(who, kind, output, named):
    assert detection.names(who, kind, output) is named


def test_a_tally_tells_what_is_claimed_and_what_was_in_time():
    sessions = [detection.Session((detection.REVERSE_KIND,), "held-out", used_ns, told) for used_ns, told in (
        (10, (Told(ENDS, "-R used", 5),)), (10, (Told(ENDS, "session init", 15),)),
        (0, (Told(ENDS, "login success", 9),)), (10, ()))]
    strider = detection.tally(sessions, "packetStrider")
    assert strider[detection.REVERSE_KIND] == strider[f"{detection.REVERSE_KIND}, held-out"] == {
        "sessions": 4, "claims": True, "named": 3, "before_use": 2, "any_flag": 3,
        "outputs": {"-R used": 1, "session init": 1, "login success": 1}}
    assert not detection.tally(sessions, "nDPI")[detection.REVERSE_KIND]["claims"]
