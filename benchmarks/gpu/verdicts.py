"""What the guard says of a recorded board, kept beside the recording as ``expected.json``: tests hold it to that.

    verdicts.py FOLDER        FOLDER is benchmarks/data/BOARD-DRIVER-DATE: labels.jsonl and record/GROUP/*.ggrec
    verdicts.py --keep OUT    copy results there first, under the name that their machine.json gives

For each workload that was recorded: what counters alone say of the stretch in which it worked, as it is and played
over and over for half an hour (decisions take minutes, a stretch lasts seconds), and what the whole recording, with
launches, says of its process. An honest workload may be accused by none of them, whatever is written here; of a search
the file says whether it is accused or missed, so that neither a loss nor a gain goes unseen.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from gpuguard.core.events import Finding
from gpuguard.core.records import Device, DeviceSample
from gpuguard.counters.judging import judge
from gpuguard.counters.shipped import shipped_model
from gpuguard.recording.reader import read_recording
from gpuguard.replaying import replay

if TYPE_CHECKING:
    from collections.abc import Iterator

#: The rate that `gpuguard classify` accepts, too.
ALARMS_PER_GPU_YEAR = 10.0
PLAYED_NS = 1800 * 1_000_000_000
#: The driver's means reach this far back: before it, they speak of what was before.
SETTLING_NS = 1_000_000_000
TICK_NS = 100_000_000
DATA = Path(__file__).resolve().parents[1] / "data"
#: Of the results: recordings with the folders that hold them, and what was measured.
KEPT = re.compile(r"(^[a-z]+|\.ggrec|\.jsonl?)$")
ACCUSED = ("suspect", "confirmed")


class Stretch(NamedTuple):
    """One workload of a recording, and the samples of the device while it worked."""

    label: dict[str, Any]
    device: Device
    samples: tuple[DeviceSample, ...]


def labels_of(folder: Path) -> list[dict[str, Any]]:
    """Return the labels of what was recorded, without what failed and a line that was cut off."""
    lines = []
    for line in (folder / "labels.jsonl").read_text().splitlines():
        with contextlib.suppress(ValueError):
            lines.append(json.loads(line))
    return [line for line in lines if not line["gap"]]


def recordings_of(folder: Path) -> list[Path]:
    """Return the files of a recorded board, without those of a daemon that wrote none of it."""
    return sorted(path for path in (folder / "record").glob("*/*.ggrec") if path.stat().st_size)


def stretches(folder: Path) -> Iterator[Stretch]:
    """Give each workload with what its device showed meanwhile; one of which nothing was recorded is left out."""
    blocks = [block for path in recordings_of(folder) for block in read_recording(path)]
    devices = {block.uuid: block for block in blocks if isinstance(block, Device)}
    samples = sorted((block for block in blocks if isinstance(block, DeviceSample)), key=lambda one: one.time_ns)
    for label in labels_of(folder):
        meanwhile = [one for one in samples if label["begun_ns"] + SETTLING_NS <= one.time_ns <= label["ended_ns"]
                     and one.uuid in devices]
        # Where GPM is for root, root recorded it beside the daemon: that says more.
        meanwhile = [one for one in meanwhile if one.gpm] or meanwhile
        # A board of several devices: the workload ran on the first.
        uuid = min((one.uuid for one in meanwhile), key=lambda one: devices[one].index, default="")
        mine = tuple(one for one in meanwhile if one.uuid == uuid)
        if mine:
            yield Stretch(label, devices[uuid], mine)


def played(stretch: Stretch, until_ns: int) -> Iterator[Device | DeviceSample]:
    """Give a stretch over and over for so long; once if ``until_ns`` is 0."""
    begin_ns, length_ns = stretch.samples[0].time_ns, stretch.samples[-1].time_ns - stretch.samples[0].time_ns + TICK_NS
    yield msgspec.structs.replace(stretch.device, time_ns=begin_ns)
    for times in range(max(1, -(-until_ns // length_ns))):
        for one in stretch.samples:
            yield msgspec.structs.replace(one, time_ns=one.time_ns + times * length_ns)


def by_counters(stretch: Stretch) -> dict[str, Any]:
    """Return what counters alone say: of the stretch as it is, and played for half an hour."""
    model, uuid = shipped_model(), stretch.device.uuid
    once = judge(played(stretch, 0), model, ALARMS_PER_GPU_YEAR)
    longer = judge(played(stretch, PLAYED_NS), model, ALARMS_PER_GPU_YEAR)
    after_s = longer.suspect_after_s.get(uuid)
    kinds: dict[str, int] = {}
    for episode in longer.episodes:
        kinds[episode.kind] = kinds.get(episode.kind, 0) + episode.looks
    return {
        "accused_at_once": uuid in once.suspect_after_s,
        "accused_after_s": None if after_s is None else round(after_s),
        "kind": max(kinds, key=lambda kind: kinds[kind]) if kinds else "unknown",
    }


def by_all(folder: Path) -> dict[int, str]:
    """Return by pid the label under which a process is accused by everything that was recorded."""
    accused: dict[int, str] = {}
    for path in recordings_of(folder):
        for event in replay(path):
            if isinstance(event, Finding) and event.verdict in ACCUSED and event.process:
                accused[event.process.process.pid] = f"{event.verdict} {event.label}"
    return accused


def verdicts(folder: Path) -> dict[str, dict[str, Any]]:
    """Return of each workload by name: its label, and what is said of it."""
    accused = by_all(folder)
    return {one.label["name"]: {"label": one.label["label"], "counters": by_counters(one),
                                "all": accused.get(one.label["pid"], "")} for one in stretches(folder)}


def accused(said: dict[str, Any]) -> bool:
    """Say whether a workload is accused by anything."""
    counters = said["counters"]
    return bool(counters["accused_at_once"] or counters["accused_after_s"] is not None or said["all"])


def keep(results: Path) -> Path:
    """Copy what is worth committing to benchmarks/data; return the folder. Raises `ValueError` for stand-ins'."""
    machine = json.loads((results / "machine.json").read_text())
    if machine["device"] == "stand-in":
        raise ValueError("what the stand-ins showed is no measurement of a board")
    named = f"{machine['device']} {machine['gpu']['driver_version']} {machine['date']}"
    folder = DATA / re.sub(r"[^a-z0-9.]+", "-", named.lower())
    shutil.copytree(results, folder, dirs_exist_ok=True,
                    ignore=lambda _, names: [one for one in names if not KEPT.search(one)])
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--keep", action="store_true")
    arguments = parser.parse_args()
    folder = keep(arguments.folder) if arguments.keep else arguments.folder
    told = verdicts(folder)
    unseen = [label["name"] for label in labels_of(folder) if label["name"] not in told]
    if not told:
        nothing = ", ".join(unseen) or "anything"
        raise SystemExit(f"{folder}: no counters were recorded of {nothing}: this tests nothing")
    (folder / "expected.json").write_text(json.dumps(told, indent=1, sort_keys=True) + "\n")
    print(folder)
    for name, said in sorted(told.items()):
        after_s = said["counters"]["accused_after_s"]
        print(f"{name:28} {said['label']:10} {'clear' if after_s is None else f'accused after {after_s} s':22} "
              f"looks like {said['counters']['kind']:10} {said['all']}")
    if unseen:
        print(f"nothing recorded of: {', '.join(unseen)}")


if __name__ == "__main__":
    main()
