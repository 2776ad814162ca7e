"""How well SSH is read from the outside: the lab's captures judged, development and held-out families apart.

The corpus is made by `make lab-captures` (in build/lab-captures; GPUGUARD_LAB_CAPTURES names another folder). Asked:
was every `-R` named before its first use, was every use seen, was every shell through a tunnel named within ten
exchanges, and has everything else its own name; likewise what other programs do (`lab/programs.py`). Then what an
evader may do: what the lab played (`evasion-*` in corpus.py), and what can be done to a capture afterwards, on the
plain `-R` families:

    late-start      the first 24 frames are missing: the guard was started after the key exchange
    late-listed     the same on a live host, where its sockets tell who dialled; and so for every other family, of which
                    none is to be accused
    lost-1-percent  each frame is missing with that chance: the guard, not TCP, lost it
    vlan, qinq      one and two tags in each frame (IEEE 802.1Q): the same verdicts are asked for

Result: benchmarks/results/tunnels.json. Exit status 1 if a target is missed on the held-out families.
Run: make bench-tunnels.
"""

from __future__ import annotations

import csv
import gzip
import json
import os
import random
import struct
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from gpuguard.core.labels import LABELS
from gpuguard.lab.judging import ACCUSING, SHELL_EXCHANGES_MAX, SHELLS, Judged, judge_corpus, read_labels, score

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

HERE = Path(__file__).resolve().parent
RESULT = HERE / "results" / "tunnels.json"
CORPUS = Path(os.environ.get("GPUGUARD_LAB_CAPTURES", HERE.parent / "build" / "lab-captures"))
LATE_FRAMES = 24
LOST_RATIO = 0.01
LABELS_RIGHT_MIN = 0.98
PLAIN = tuple(f"openssh-{release}.reverse.pcap.gz" for release in ("bookworm", "bullseye", "trixie", "sid"))

OF_THE_CORPUS = ("reverse-compressed", "reverse-alive", "reverse-late", "reverse-late-none", "role-swap")

Frames = list[tuple[bytes, bytes]]


def main() -> None:
    if not (CORPUS / "LABELS.tsv").exists():
        sys.exit(f"no corpus in {CORPUS}: make lab-captures")
    judged = list(judge_corpus(CORPUS))
    programs = [one for one in judged if one.truth["client"] == "program"]
    plain = [one for one in judged if "evasion" not in one.truth["family"] and one not in programs]
    result = {
        "corpus": {"scenarios": len(judged), "left_out": _left_out(CORPUS),
                   **json.loads((CORPUS / "LINK.json").read_text())},
        "split": {split: _rates([one for one in plain if one.truth["split"] == split])
                  for split in ("development", "held-out")},
        "clients": {name: _rates(some) for name, some in _by(plain, "client").items()},
        "suites": {name or "default": _rates(some) for name, some in _by(plain, "suite").items()},
        "missed": [f"{one.name}: {one.label} {one.verdict}" for one in plain if _missed(one)],
        "evasions": _evasions([one for one in judged if one not in programs]),
        "programs": {name: {"sessions": len(some), "right": sum(one.right for one in some),
                            "accused": sum(one.worst in ACCUSING for one in some),
                            "labels": sorted({one.label for one in some})}
                     for name, some in _by(programs, "family").items()},
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    _print(result)
    held = result["split"]["held-out"]
    good = held["named_before_use"] == held["reverse"] and held["shells_in_ten"] == held["shells"] and (
        held["benign_right"] >= LABELS_RIGHT_MIN * held["benign"]) and not held["accused"]
    sys.exit(0 if good else 1)


def _left_out(corpus: Path) -> int:
    """Return how many scenarios did not play: two implementations without a common cipher, mostly."""
    lines = (corpus / "LABELS.tsv").read_text(encoding="utf-8").splitlines()
    return len(lines) - 1 - len(read_labels(corpus))


def _by(judged: list[Judged], column: str) -> dict[str, list[Judged]]:
    groups = defaultdict(list)
    for one in judged:
        groups[one.truth[column]].append(one)
    return dict(sorted(groups.items()))


def _rates(judged: list[Judged]) -> dict[str, int]:
    return score(judged)._asdict()


def _missed(one: Judged) -> bool:
    if one.truth["expected"] != "ssh-reverse-tunnel":
        return not one.right
    shell_late = one.truth["through"] in SHELLS and (one.shell_ns is None or one.exchanges > SHELL_EXCHANGES_MAX)
    return shell_late or not one.requested_in_time


# -- evasions ---------------------------------------------------------------------------------------------------------


def _evasions(judged: list[Judged]) -> dict[str, dict[str, object]]:
    played = defaultdict(list)
    for one in judged:
        use = one.truth["family"].split(".")[1]
        if use.startswith("evasion-") or use in OF_THE_CORPUS:
            played[use.removeprefix("evasion-")].append(one)
    found = {name: _outcome(some) for name, some in sorted(played.items())}
    for name, change in (("late-start", _late), ("lost-1-percent", _lossy), ("vlan", _tagged(1)), ("qinq", _tagged(2))):
        found[name] = _outcome(_judge_changed(change))
    found["late-listed"] = _outcome(_judge_changed(_late, listed=True))
    found["late-listed-others"] = _outcome(_judge_changed(_late, _is_other, listed=True))
    return found


def _is_other(row: dict[str, str]) -> bool:
    return not any(LABELS[label].accuses for label in row["expected"].split("|"))


def _is_plain(row: dict[str, str]) -> bool:
    return row["file"].endswith(PLAIN)


def _outcome(judged: list[Judged]) -> dict[str, object]:
    """Say how many of these were accused, under which names, and how long after the tunnel's first use."""
    told = [one for one in judged if one.worst in ACCUSING]
    after = [(one.first_ns - int(one.truth["used_ns"])) / 1e9 for one in told
             if one.first_ns is not None and int(one.truth["used_ns"])]
    used = [one for one in judged if one.truth["through"] in (*SHELLS, "paste", "paced", "slow")]
    return {
        "sessions": len(judged),
        "accused": len(told),
        "confirmed": sum(one.worst == "confirmed" for one in judged),
        "before_use": sum(seconds < 0 for seconds in after),
        "shells": len(used),
        "shells_named": sum(one.shell_ns is not None for one in used),
        "named_after_use_median_s": round(median(after), 2) if after else None,
        "labels": sorted({one.label for one in judged}),
    }


def _judge_changed(change: Callable[[Frames], Frames], wanted: Callable[[dict[str, str]], bool] = _is_plain, *,
                   listed: bool = False) -> list[Judged]:
    """Judge the plain families, or those that are wanted, again with their captures changed."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        kept = [row for row in read_labels(CORPUS) if wanted(row)]
        with (copy / "LABELS.tsv").open("w", encoding="utf-8", newline="") as labels:
            table = csv.DictWriter(labels, kept[0].keys(), delimiter="\t")
            table.writeheader()
            table.writerows(kept)
        for name in {row["file"] for row in kept}:
            raw = gzip.decompress((CORPUS / name).read_bytes())
            (copy / name).parent.mkdir(exist_ok=True)
            changed = b"".join(head + frame for head, frame in change(list(_frames(raw))))
            (copy / name).write_bytes(gzip.compress(raw[:24] + changed, 1))
        return list(judge_corpus(copy, listed=listed))


def _frames(raw: bytes) -> Iterator[tuple[bytes, bytes]]:
    at = 24
    while at + 16 <= len(raw):
        size = struct.unpack_from("=I", raw, at + 8)[0]
        yield raw[at:at + 16], raw[at + 16:at + 16 + size]
        at += 16 + size


def _late(frames: Frames) -> Frames:
    seen: dict[bytes, int] = {}
    kept = []
    for head, frame in frames:
        flow = min(frame[26:30] + frame[34:36], frame[30:34] + frame[36:38])
        seen[flow] = seen.get(flow, 0) + 1
        if seen[flow] > LATE_FRAMES:
            kept.append((head, frame))
    return kept


def _lossy(frames: Frames) -> Frames:
    dice = random.Random(1)
    return [one for one in frames if dice.random() >= LOST_RATIO]


def _tagged(tags: int) -> Callable[[Frames], Frames]:
    # The outer tag of two is a service tag, IEEE 802.1ad.
    between = (b"\x88\xa8\x00\x07" if tags == 2 else b"") + b"\x81\x00\x00\x2a"

    def change(frames: Frames) -> Frames:
        return [(head[:8] + struct.pack("=II", *(size + len(between) for size in struct.unpack_from("=II", head, 8))),
                 frame[:12] + between + frame[12:]) for head, frame in frames]
    return change


def _print(result: dict[str, dict]) -> None:
    for name, rates in [*result["split"].items(), *result["clients"].items()]:
        print(f"{name:18} -R {rates['named_before_use']}/{rates['reverse']} named before use "
              f"({rates['confirmed_before_use']} confirmed), uses seen {rates['uses_seen']}/{rates['uses']}, shells "
              f"{rates['shells_in_ten']}/{rates['shells']} within ten, other labels {rates['benign_right']}/"
              f"{rates['benign']}, accused {rates['accused']}")
    for name, one in result["programs"].items():
        print(f"  {name:30} right {one['right']}/{one['sessions']}, accused {one['accused']}, {one['labels']}")
    for name, one in result["evasions"].items():
        print(f"  {name:22} accused {one['accused']}/{one['sessions']}, {one['confirmed']} confirmed, "
              f"{one['before_use']} before use, shells {one['shells_named']}/{one['shells']}, median "
              f"{one['named_after_use_median_s']} s after use")


if __name__ == "__main__":
    main()
