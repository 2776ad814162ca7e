"""How others that read captures are run, and what they said: benchmarks/detection.py.

Each is a program of its own, started as its documentation says and with its defaults, and its output is read from
outside. A peer that is not installed is None. What is where:

    ndpiReader     PATH                      Debian: libndpi-bin
    nfstream       .venv-peers/              pip: nfstream
    suricata       PATH, GPUGUARD_SURICATA   Debian: suricata (12: from bookworm-backports). Its rules are those that
                                             the package lays in /etc/suricata/rules, and the files and folders that
                                             GPUGUARD_SURICATA_RULES names, parted by colons
    packetStrider  GPUGUARD_PACKETSTRIDER    the path of packetStrider-ssh.py (GPL, github.com/benjeems/packetStrider);
                                             Debian: tshark; pip into .venv-peers: pyshark, pandas, matplotlib
"""

from __future__ import annotations

import ipaddress
import json
import os
import re
import shutil
import subprocess
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

VENV = Path(__file__).resolve().parents[2] / ".venv-peers"
PYTHON = VENV / "bin" / "python"
_NFSTREAM = """
import sys
from nfstream import NFStreamer
if __name__ == "__main__":
    for path in sys.argv[1:]:
        flows = NFStreamer(source=path, n_dissections=20, n_meters=1, idle_timeout=10**6, active_timeout=10**6)
        for one in flows:
            print(path, one.src_ip, one.dst_ip, one.application_category_name, sep="\\t")
"""
#: ndpiReader: "7  TCP 10.0.0.1:5000 <-> [2001:db8::1]:22 [proto: 92/SSH]...[cat: Web/5]...[Risk: ** A **** B **]".
_FLOW = re.compile(r"^\s+\d+\s+\S+ (\[[^]]+\]|[^:\s]+):\d+ <?->? (\[[^]]+\]|[^:\s]+):\d+ ")
_CATEGORY = re.compile(r"\[cat: ([^/\]]+)/")
_RISKS = re.compile(r"\[Risk: ([^]]+)\]")
_COLOUR = re.compile(r"\x1b\[[\d;]*m")
#: packetStrider, a row of its table of events: packet, seconds, seconds since the last, direction, indicator.
_EVENT = re.compile(r"^\S\s+\d+\s+([\d.e-]+)\s+[\d.e-]+\s+reverse\s+(\S.*?)(?:\s{2}|$)")
#: Suricata: what is captured on the host that sent it has none yet.
_NO_CHECKSUM = "invalid checksum"
_NAMED = ("-R used", "session init", "login prompt", "login failure", "login success")


class Told(NamedTuple):
    """One thing that was said of what went between two addresses, and when, where that was said too."""

    ends: frozenset[str]
    output: str
    time_ns: int | None
    #: Where several captures were given at once.
    capture: str = ""


class Peer(NamedTuple):
    """A program that reads captures."""

    version: str
    #: Of a capture and a folder that it may write into.
    command: Callable[[Path, Path], list[str]]
    #: From that folder, and what was printed.
    read: Callable[[Path, str], Iterator[Told]]
    #: Whether the command takes more captures behind the first.
    takes_many: bool = False


def _first_line(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return (done.stdout.strip() or done.stderr.strip()).splitlines()[0] if done.returncode == 0 else ""


def _ends(*addresses: str) -> frozenset[str]:
    return frozenset(str(ipaddress.ip_address(one.strip("[]"))) for one in addresses)


# -- nDPI -------------------------------------------------------------------------------------------------------------


def ndpi() -> Peer | None:
    """Return ndpiReader: protocols, categories and risks of each flow."""
    path = shutil.which("ndpiReader")
    if path is None:
        return None
    said = subprocess.run([path, "-h"], capture_output=True, text=True, check=False).stdout
    version = re.search(r"nDPI ([\d.]+)", said)
    return Peer(f"nDPI {version[1] if version else '?'}, ndpiReader",
                lambda capture, _: [path, "-v", "2", "-n", "1", "-i", str(capture)], _read_ndpi)


def _read_ndpi(_: Path, printed: str) -> Iterator[Told]:
    for line in printed.splitlines():
        flow = _FLOW.match(line)
        if flow is None:
            continue
        ends = _ends(flow[1], flow[2])
        yield from (Told(ends, f"category {name}", None) for name in _CATEGORY.findall(line))
        for risks in _RISKS.findall(line):
            yield from (Told(ends, f"risk {name.strip()}", None) for name in risks.split("**") if name.strip())


def nfstream() -> Peer | None:
    """Return nfstream, which has a newer nDPI in it: protocols and categories, no risks."""
    version = _first_line(str(PYTHON), "-c", "import nfstream; print(nfstream.__version__)") if PYTHON.exists() else ""
    if not version:
        return None
    return Peer(f"nfstream {version}", lambda capture, _: [str(PYTHON), "-c", _NFSTREAM, str(capture)], _read_nfstream,
                takes_many=True)


def _read_nfstream(_: Path, printed: str) -> Iterator[Told]:
    for line in printed.splitlines():
        capture, source, destination, category = line.split("\t")
        yield Told(_ends(source, destination), f"category {category}", None, capture)


# -- Suricata ---------------------------------------------------------------------------------------------------------


def suricata(folder: Path) -> Peer | None:
    """Return Suricata with its packaged rules and those that are named; their file is written to ``folder``."""
    path = os.environ.get("GPUGUARD_SURICATA") or shutil.which("suricata")
    if path is None:
        return None
    named = os.environ.get("GPUGUARD_SURICATA_RULES", "")
    places = [Path(one) for one in ("/etc/suricata/rules", *filter(None, named.split(":")))]
    files = [file for place in places for file in (sorted(place.glob("*.rules")) if place.is_dir() else [place])
             if file.exists()]
    rules = folder / "all.rules"
    rules.write_text("\n".join(file.read_text(encoding="utf-8") for file in files) + "\n", encoding="utf-8")
    options = ["-S", str(rules), "--runmode", "single", "-k", "none",
               "--set", "vars.address-groups.HOME_NET=any", "--set", "vars.address-groups.EXTERNAL_NET=any"]
    version = _first_line(path, "-V").removeprefix("This is ").replace(" version", "").removesuffix(" RELEASE")
    return Peer(version, lambda capture, out: [path, "-r", str(capture), "-l", str(out), *options], _read_suricata)


def _read_suricata(folder: Path, _: str) -> Iterator[Told]:
    with (folder / "eve.json").open(encoding="utf-8") as lines:
        for line in lines:
            event = json.loads(line)
            if event["event_type"] == "alert" and "src_ip" in event and _NO_CHECKSUM not in event["alert"]["signature"]:
                time_ns = int(datetime.fromisoformat(event["timestamp"]).timestamp() * 1e9)
                yield Told(_ends(event["src_ip"], event["dest_ip"]), event["alert"]["signature"], time_ns)


# -- packetStrider ----------------------------------------------------------------------------------------------------


def packet_strider() -> Peer | None:
    """Return packetStrider, which claims to tell -R, reverse sessions and keys typed in them."""
    path = os.environ.get("GPUGUARD_PACKETSTRIDER", "")
    if not path or not PYTHON.exists() or shutil.which("tshark") is None:
        return None
    version = re.search(r"__version__ = '([^']+)'", Path(path).read_text(encoding="utf-8"))
    return Peer(f"packetStrider {version[1] if version else '?'}",
                lambda capture, _: [str(PYTHON), path, "-k", "-f", str(capture)], read_packet_strider)


def read_packet_strider(_: Path, printed: str) -> Iterator[Told]:
    """Yield its events of direction "reverse", with the time since the first packet of the stream."""
    for line in _COLOUR.sub("", printed).splitlines():
        event = _EVENT.match(line)
        if event:
            yield Told(frozenset(), event[2] if event[2] in _NAMED else "keys", int(float(event[1]) * 1e9))
