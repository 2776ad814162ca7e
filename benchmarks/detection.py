"""What others tell of the same captures: nDPI, nfstream, Suricata and packetStrider beside GPUGuard.

Three sets, each with the truth beside it:

    lab      the SSH and other sessions of `make lab-captures` (GPUGUARD_LAB_CAPTURES names another folder)
    others   GPUGUARD_OTHERS_CAPTURES: a folder with LABELS.tsv (file, expected: a label or "benign", split, host)
    public   GPUGUARD_DATA_DIR/captures: what their INDEX.tsv calls mining

The lab keeps 96 bytes of a frame behind the 40th of a flow, which other programs take for a broken packet: what is
missing is filled with noise, as the encrypted bytes were. Its files are merged by time, so that each program starts
once. packetStrider takes seconds for a session: it is given one session each of 160 SSH families, drawn with a seed,
with the server on port 22, by which tshark knows SSH.

A peer *names* a thing if it says one of what stands here, taken widely; what is not here it does not claim to tell:

    nDPI           mining-pool: category Mining or Crypto...; dns-tunnel: a risk with DNS, DGA, Exfiltration or
                   Obfuscated in its name; icmp-tunnel: Malformed or Entropy
    nfstream       mining-pool: the same categories
    Suricata       mining-pool: an alert with COINMINER or Stratum; the packaged rules are about broken protocols
    packetStrider  -R: reverse events "-R used", "session init", "login ..."; shells through it: the latter two and keys

*Any flag* is more generous still: any risk, any alert, any reverse event, whatever it says. For both stand how many
ordinary sessions have one. Where a peer tells no time (nDPI), a name counts as told before the first use.

CPU: of the whole process on the merged lab captures, less that on one packet; medians of three. Ours is `gpuguard
pcap`. A peer that is not installed is left out with a line (peers/detectors.py says where each is looked for); Zeek is
in neither Debian nor PyPI. Result: benchmarks/results/detection.json.
Run: make bench-detection (half an hour), or with names of parts (lab sampled others public)
"""

from __future__ import annotations

import csv
import gzip
import heapq
import json
import operator
import os
import random
import resource
import struct
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent))
from peers import detectors
from peers.detectors import Peer, Told

from gpuguard.core.labels import LABELS
from gpuguard.lab.judging import ACCUSING, REVERSE, SHELLS, Judged, judge_corpus, read_labels
from gpuguard.lab.peers import SERVER_PORTS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

HERE = Path(__file__).resolve().parent
RESULT = HERE / "results" / "detection.json"
CORPUS = Path(os.environ.get("GPUGUARD_LAB_CAPTURES", HERE.parent / "build" / "lab-captures"))
OTHERS = os.environ.get("GPUGUARD_OTHERS_CAPTURES", "")
PUBLIC = os.environ.get("GPUGUARD_DATA_DIR", "")
OURS, STRIDER = "GPUGuard", "packetStrider"
ROUNDS = 3
#: One SSH session in a capture that is made for packetStrider is at most this long; a longer one is bulk.
STRIDER_FRAMES_MAX = 2_000
STRIDER_FAMILIES = 160
PCAP_HEAD = struct.pack("=IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 65535, 1)

REVERSE_KIND, SHELL_KIND, HIDDEN_KIND = "reverse tunnels", "shells through them", "reverse tunnels that evade"
ORDINARY = "ordinary sessions"
#: Substrings, in any case, of what a peer says when it names a kind.
_MINING = ("category mining", "category crypto")
NAMES: dict[str, dict[str, tuple[str, ...]]] = {
    "nDPI": {"mining-pool": _MINING, "dns-tunnel": ("dns", "dga", "exfiltration", "obfuscated"),
             "icmp-tunnel": ("malformed", "entropy")},
    "nfstream": {"mining-pool": _MINING},
    "Suricata": {"mining-pool": ("coinminer", "stratum")},
    STRIDER: {REVERSE_KIND: ("-r used", "session init", "login"), HIDDEN_KIND: ("-r used", "session init", "login"),
              SHELL_KIND: ("keys", "session init", "login")},
}
#: The same of ours; another kind is the label itself.
_OURS = {REVERSE_KIND: ("ssh-reverse-tunnel",), SHELL_KIND: ("shell",), HIDDEN_KIND: ("",), ORDINARY: ("",)}
#: What is no flag: every flow has one.
_NO_FLAG = "category "


class Session(NamedTuple):
    """One labelled session: what it is, when a tunnel in it was first used, and what somebody told of it."""

    kinds: tuple[str, ...]
    split: str
    used_ns: int
    told: tuple[Told, ...]


def main(wanted: list[str]) -> None:
    """Measure the parts that are asked for, and write them beside what was measured before."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found = {"nDPI": detectors.ndpi(), "nfstream": detectors.nfstream(), "Suricata": detectors.suricata(folder),
                 STRIDER: detectors.packet_strider()}
        for absent in (name for name, peer in found.items() if peer is None):
            print(f"{absent} is not installed: left out", file=sys.stderr)
        peers = {name: peer for name, peer in found.items() if peer}
        versions = {"versions": {name: peer.version for name, peer in peers.items()}}
        for part in wanted or PARTS:
            measured = PARTS[part](peers, folder)
            before = json.loads(RESULT.read_text()) if RESULT.exists() else {}
            RESULT.write_text(json.dumps(before | versions | measured, indent=1) + "\n")
    _print(json.loads(RESULT.read_text()))


# -- the lab's captures -----------------------------------------------------------------------------------------------


def lab(peers: dict[str, Peer], folder: Path) -> dict[str, object]:
    """Return what each told of the lab's sessions, and its CPU time; packetStrider is asked apart."""
    rows = _rows()
    quick = {name: peer for name, peer in peers.items() if name != STRIDER}
    captures = merged(rows, folder)
    told = {OURS: [_ours(one) for one in judge_corpus(CORPUS)]}
    told |= {name: _by_row(rows, captures, peer, folder) for name, peer in quick.items()}
    return {"lab": {name: tally(sessions, name) for name, sessions in told.items()},
            "cpu": costs(quick, captures, folder)}


def _rows() -> list[dict[str, str]]:
    if not (CORPUS / "LABELS.tsv").exists():
        sys.exit(f"no corpus in {CORPUS}: make lab-captures")
    return read_labels(CORPUS)


def merged(rows: list[dict[str, str]], folder: Path) -> dict[Path, set[str]]:
    """Return captures of whole frames, in the order of time, and of which of the lab's files each one is made.

    In none of them is an address that of two sessions.
    """
    addresses: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        addresses[row["file"]].add(row["address"])
    groups: list[tuple[set[str], set[str]]] = []
    for file, own in addresses.items():
        group = next((one for one in groups if not one[1] & own), None)
        if group is None:
            groups.append(group := (set(), set()))
        group[0].add(file)
        group[1].update(own)
    made = {}
    for number, (files, _) in enumerate(groups):
        path = folder / f"lab-{number}.pcap"
        with path.open("wb") as out:
            out.write(PCAP_HEAD)
            for _, frame in heapq.merge(*(_whole(CORPUS / file) for file in sorted(files)), key=lambda one: one[0]):
                out.write(frame)
        made[path] = files
    return made


def _whole(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield the time and the record of each frame of a capture, what was cut off filled with noise."""
    raw, dice, at = gzip.decompress(path.read_bytes()), random.Random(path.name), 24
    while at + 16 <= len(raw):
        second, micros, kept, size = struct.unpack_from("=IIII", raw, at)
        frame = raw[at + 16:at + 16 + kept]
        at += 16 + kept
        yield second * 10**6 + micros, (struct.pack("=IIII", second, micros, size, size) + frame
                                        + dice.randbytes(size - kept))


def _kinds(row: dict[str, str]) -> tuple[str, ...]:
    if row["expected"] in REVERSE:
        hidden = "evasion" in row["family"] or row["client"] == "program"
        return (HIDDEN_KIND,) if hidden else (REVERSE_KIND, *([SHELL_KIND] if row["through"] in SHELLS else []))
    expected = row["expected"].split("|")
    return (expected[0],) if any(LABELS[label].accuses for label in expected) else (ORDINARY,)


def _ours(one: Judged) -> Session:
    times = [("ssh-reverse-tunnel", one.tunnel_ns), ("ssh-reverse-shell", one.shell_ns)]
    told = [Told(frozenset(), label, time_ns) for label, time_ns in times if time_ns is not None]
    if one.worst in ACCUSING:
        told.append(Told(frozenset(), one.label, one.first_ns))
    return Session(_kinds(one.truth), one.truth["split"], int(one.truth["used_ns"] or 0), tuple(told))


def _by_row(rows: list[dict[str, str]], captures: dict[Path, set[str]], peer: Peer, folder: Path) -> list[Session]:
    """Return each session with what a peer told of the flows of its address."""
    told: dict[tuple[str, str], list[Told]] = defaultdict(list)
    for path, files in captures.items():
        of = {row["address"]: row["file"] for row in rows if row["file"] in files}
        for one in run(peer, path, folder)[1]:
            for address in one.ends & of.keys():
                told[of[address], address].append(one)
    return [Session(_kinds(row), row["split"], int(row["used_ns"] or 0), tuple(told[row["file"], row["address"]]))
            for row in rows]


def run(peer: Peer, capture: Path, folder: Path, more: Iterable[Path] = ()) -> tuple[float, list[Told]]:
    """Return the CPU seconds of a peer on a capture, or on several, and what it told."""
    with tempfile.TemporaryDirectory(dir=folder) as out:
        seconds, printed = _spent([*peer.command(capture, Path(out)), *map(str, more)])
        return seconds, list(peer.read(Path(out), printed))


def _spent(command: list[str]) -> tuple[float, str]:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode and command[0] != sys.executable:
        sys.exit(f"{' '.join(command)}: {done.returncode}: {done.stderr[-2000:]}")
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime, done.stdout


def costs(peers: dict[str, Peer], captures: dict[Path, set[str]], folder: Path) -> dict[str, object]:
    """Return the CPU time a packet of each, less what it takes to start."""
    largest = max(captures, key=lambda path: path.stat().st_size)
    packets = sum(1 for _ in _records(largest))
    single = folder / "single.pcap"
    single.write_bytes(PCAP_HEAD + next(_records(largest)))
    commands: dict[str, Callable[[Path], list[str]]] = {
        OURS: lambda path: [sys.executable, "-m", "gpuguard", "pcap", "-o", "json", str(path)]}
    for name, peer in peers.items():
        commands[name] = lambda path, peer=peer: peer.command(path, folder)
    found = {}
    for name, command in commands.items():
        work = median(_spent(command(largest))[0] for _ in range(ROUNDS))
        start = median(_spent(command(single))[0] for _ in range(ROUNDS))
        found[name] = {"start_s": round(start, 3), "ns_per_packet": round((work - start) / packets * 1e9)}
    return {"packets": packets, "bytes": largest.stat().st_size, "each": found}


def _records(path: Path) -> Iterator[bytes]:
    raw, at = path.read_bytes(), 24
    while at + 16 <= len(raw):
        size = struct.unpack_from("=I", raw, at + 8)[0]
        yield raw[at:at + 16 + size]
        at += 16 + size


# -- packetStrider, by session ----------------------------------------------------------------------------------------


def sampled(peers: dict[str, Peer], folder: Path) -> dict[str, object]:
    """Return what packetStrider tells of one session each of some SSH families, ours of the same, and its CPU time."""
    if STRIDER not in peers:
        return {}
    families: dict[str, list[dict[str, str]]] = defaultdict(list)
    for row in _rows():
        if row["server"] in SERVER_PORTS and "ssh" in row["expected"]:
            families[row["family"]].append(row)
    dice = random.Random(1)
    some = dice.sample(sorted(families), min(STRIDER_FAMILIES, len(families)))
    drawn = [dice.choice(families[name]) for name in some]
    ours = {(one.truth["file"], one.truth["address"]): _ours(one) for one in judge_corpus(CORPUS)}
    theirs, beside, spent, packets = [], [], 0.0, 0
    for row in drawn:
        frames = _of_session(row)
        if not frames or len(frames) > STRIDER_FRAMES_MAX:
            continue
        path = folder / "session.pcap"
        path.write_bytes(PCAP_HEAD + b"".join(frames))
        seconds, told = run(peers[STRIDER], path, folder)
        began_ns = 1_000 * sum(map(operator.mul, struct.unpack_from("=II", frames[0]), (1_000_000, 1)))
        told = [one._replace(time_ns=began_ns + (one.time_ns or 0)) for one in told]
        theirs.append(Session(_kinds(row), row["split"], int(row["used_ns"] or 0), tuple(told)))
        beside.append(ours[row["file"], row["address"]])
        spent += seconds
        packets += len(frames)
    return {"sampled": {STRIDER: tally(theirs, STRIDER), OURS: tally(beside, OURS)},
            "sampled_cpu": {"sessions": len(theirs), "packets": packets, "ns_per_packet": round(spent / packets * 1e9),
                            "s_per_session": round(spent / len(theirs), 2)}}


def _of_session(row: dict[str, str]) -> list[bytes]:
    """Return the whole frames of one session, its server moved to port 22."""
    address = bytes(map(int, row["address"].split(".")))
    ports = {port.to_bytes(2) for port in SERVER_PORTS.values()}
    kept = []
    for _, record in _whole(CORPUS / row["file"]):
        frame = record[16:]
        if frame[12:14] == b"\x08\x00" and frame[23] == 6 and address in (frame[26:30], frame[30:34]):
            at = 14 + 4 * (frame[14] & 15)
            moved = [b"\x00\x16" if port in ports else port for port in (frame[at:at + 2], frame[at + 2:at + 4])]
            kept.append(record[:16 + at] + b"".join(moved) + record[16 + at + 4:])
    return kept


# -- captures of others -----------------------------------------------------------------------------------------------


class Labelled(NamedTuple):
    """A capture of one program."""

    path: Path
    kind: str
    split: str
    host: str


def others(peers: dict[str, Peer], folder: Path) -> dict[str, object]:
    """Return what each told of labelled captures of somebody else."""
    if not OTHERS:
        print("GPUGUARD_OTHERS_CAPTURES names no folder: captures of others are left out", file=sys.stderr)
        return {}
    return {"others": _told_of([Labelled(Path(OTHERS) / row["file"], ORDINARY if row["expected"] == "benign" else
                                         row["expected"], row["split"], row["host"])
                                for row in _table(Path(OTHERS) / "LABELS.tsv")], peers, folder)}


def public(peers: dict[str, Peer], folder: Path) -> dict[str, object]:
    """Return what each told of public captures of mining."""
    if not PUBLIC:
        print("GPUGUARD_DATA_DIR is not set: public captures are left out", file=sys.stderr)
        return {}
    captures = Path(PUBLIC) / "captures"
    return {"public": _told_of([Labelled(captures / row["file"], "mining-pool", "", "")
                                for row in _table(captures / "INDEX.tsv") if row["expected_verdict"] == "mining"],
                               peers, folder)}


def _told_of(labelled: list[Labelled], peers: dict[str, Peer], folder: Path) -> dict[str, object]:
    quick = {name: peer for name, peer in peers.items() if name != STRIDER}
    return {who: tally(_by_file(labelled, peer, folder), who) for who, peer in {OURS: None, **quick}.items()}


def _table(path: Path) -> Iterator[dict[str, str]]:
    with path.open(encoding="utf-8") as lines:
        yield from csv.DictReader(lines, delimiter="\t")


def _by_file(labelled: list[Labelled], peer: Peer | None, folder: Path) -> list[Session]:
    """Return each capture with what a peer told of any flow in it, or with ours."""
    if peer is None:
        told = _pcap(labelled)
    elif peer.takes_many:
        told = defaultdict(list)
        for one in run(peer, labelled[0].path, folder, [capture.path for capture in labelled[1:]])[1]:
            told[Path(one.capture)].append(one)
    else:
        told = {capture.path: run(peer, capture.path, folder)[1] for capture in labelled}
    return [Session((capture.kind,), capture.split, 0, tuple(told[capture.path])) for capture in labelled]


def _pcap(labelled: list[Labelled]) -> dict[Path, list[Told]]:
    hosts = sorted({host for one in labelled for host in one.host.split(",") if host})
    told: dict[Path, list[Told]] = {one.path: [] for one in labelled}
    options = [option for host in hosts for option in ("--host", host)]
    command = [sys.executable, "-m", "gpuguard", "pcap", "-o", "json", *options, *map(str, told)]
    for line in _spent(command)[1].splitlines():
        flow = json.loads(line)
        if flow.get("verdict") in ACCUSING:
            told[Path(flow["file"])].append(Told(frozenset(), flow["label"], flow["start_ns"]))
    return told


# -- counting ---------------------------------------------------------------------------------------------------------


def tally(sessions: list[Session], who: str) -> dict[str, dict[str, object]]:
    """Return, for each kind and half, how many sessions were named, in time, and had any flag, and which flags."""
    groups: dict[str, list[Session]] = defaultdict(list)
    for one in sessions:
        for kind in one.kinds:
            groups[kind].append(one)
            if one.split:
                groups[f"{kind}, {one.split}"].append(one)
    return {kind: _counted(some, kind.split(",")[0], who) for kind, some in sorted(groups.items())}


def _counted(sessions: list[Session], kind: str, who: str) -> dict[str, object]:
    named = [(one, [told for told in one.told if names(who, kind, told.output)]) for one in sessions]
    flags = Counter(output for one in sessions for output in {told.output for told in one.told})
    return {
        "sessions": len(sessions),
        "claims": who == OURS or kind == ORDINARY or any(kind_of in NAMES[who] for kind_of in kind.split("|")),
        "named": sum(bool(told) for _, told in named),
        "before_use": sum(any(told.time_ns is None or not one.used_ns or told.time_ns < one.used_ns for told in some)
                          for one, some in named),
        "any_flag": sum(any(not told.output.startswith(_NO_FLAG) for told in one.told) for one in sessions),
        "outputs": dict(flags.most_common(12)),
    }


def names(who: str, kind: str, output: str) -> bool:
    """Return whether what somebody said names this kind; for ordinary sessions: names any, and so falsely."""
    if who == OURS:
        wanted: Iterable[str] = _OURS.get(kind) or kind.split("|")
    elif kind == ORDINARY:
        wanted = [part for parts in NAMES[who].values() for part in parts]
    else:
        wanted = [part for kind_of in kind.split("|") for part in NAMES[who].get(kind_of, ())]
    return any(part in output.lower() for part in wanted)


PARTS: dict[str, Callable[[dict[str, Peer], Path], dict[str, object]]] = {
    "lab": lab, "sampled": sampled, "others": others, "public": public}


def _print(result: dict) -> None:
    for part in ("lab", "sampled", "others", "public"):
        for who, kinds in result.get(part, {}).items():
            for kind, one in kinds.items():
                said = f"named {one['named']}, before use {one['before_use']}" if one["claims"] else "does not claim to"
                print(f"{part:8} {who:14} {kind:44} {one['sessions']:5} sessions: {said}; any flag {one['any_flag']}")
    print(json.dumps({name: result.get(name) for name in ("versions", "cpu", "sampled_cpu")}, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
