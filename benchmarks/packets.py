"""What a packet costs from capture file to verdict, beside nDPI, nfstream and a plain C loop: one core, CPU time.

Two captures of its own making (`peers/traffic.py`): a million packets of 3,000 flows, and 1.8 million of 112,000.
In one run, in turns, so that a busy machine slows all alike:

    loop       peers/loop.c, the limit: parse, hash, running statistics, nothing else
    table      our parser and flow table, Python around them: what is told is dropped
    all        all that `gpuguard pcap` does, every detector on; its verdicts are checked against those of a guard that
               reports flow by flow
    command    `gpuguard pcap` as a process, start included
    ndpi       ndpiReader -q -n 1 (Debian: libndpi-bin)
    nfstream   NFStreamer with statistics and dissection, one meter (pip: nfstream, in .venv-peers/)

The floor, by the bytes: a capture's packet is some 250 here, read once out of the page cache; its row is 64, written
and read; its flow 128 and its bucket's line 64, read and written. At 10 GB/s that is 57 ns with every byte moved once,
25 of it the kernel's copy. Exit status 1 if a target is missed, 2 if a peer is absent. Run: make bench-packets.
"""

from __future__ import annotations

import itertools
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

HERE = Path(__file__).resolve().parent
RESULT = HERE / "results" / "packets.json"
#: The threads of NumPy's linear algebra, which nobody here uses, spin for a while after they start: 50 ms of CPU time.
ENVIRONMENT = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
PEERS = HERE.parent / ".venv-peers"
CAPTURES = {
    "3k": {"packets": 1_000_000, "flows": 3_000, "span_s": 60, "seed": 2},
    "100k": {"packets": 1_500_000, "flows": 112_000, "span_s": 1500, "seed": 1},
}
TABLE_LOG2 = {"3k": "13", "100k": "18"}
ROUNDS = {"loop": 7, "table": 7, "all": 7, "command": 3, "ndpi": 3, "nfstream": 1}
TABLE_PER_LOOP_MAX = {"3k": 1.5, "100k": 1.2}
ALL_PER_TABLE_LIMIT_MAX = 2.0
NDPI_PER_ALL_MIN, NFSTREAM_PER_ALL_MIN = 10.0, 50.0

_NFSTREAM = """
import sys
from nfstream import NFStreamer
if __name__ == "__main__":
    flows = NFStreamer(source=sys.argv[1], statistical_analysis=True, n_dissections=20, n_meters=1)
    print(sum(1 for _ in flows))
"""


def main() -> None:
    if len(sys.argv) == 4:
        worker(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
        return
    with tempfile.TemporaryDirectory() as folder:
        result = measured(Path(folder))
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))
    if result["missed"]:
        sys.exit(1)


def measured(folder: Path) -> dict[str, object]:
    from peers.traffic import SHARES, build

    loop = folder / "loop"
    subprocess.run(["cc", "-O3", "-march=native", "-o", str(loop), str(HERE / "peers" / "loop.c")], check=True)
    (folder / "meter.py").write_text(_NFSTREAM)
    captures: dict[str, object] = {}
    medians: dict[str, dict[str, float]] = {}
    for name, shape in CAPTURES.items():
        path = folder / f"{name}.pcap"
        about = build(path, **shape)  # type: ignore[arg-type]
        captures[name] = about
        verdicts = run([sys.executable, __file__, "check", str(path), "0"])[1].strip()
        captures[f"{name} verdicts"] = json.loads(verdicts)
        medians[name] = rounds(commands(loop, folder / "meter.py", path, name, about["packets"]), about["packets"])
    ratios, missed = judged(medians)
    return {"captures": captures, "shares_of_flows": SHARES, "cpu_ns_per_packet": medians, "ratios": ratios,
            "missed": missed, "rounds": ROUNDS, "load_average": os.getloadavg()[0], "cores": os.cpu_count()}


def commands(loop: Path, meter: Path, path: Path, name: str, packets: int) -> dict[str, list[str]]:
    """Return what is run for each row; a peer that is not there ends the benchmark."""
    ours = [sys.executable, __file__]
    ndpi = shutil.which("ndpiReader")
    if ndpi is None:
        absent("ndpiReader (libndpi-bin)")
    if not (PEERS / "bin" / "python").exists():
        subprocess.run([sys.executable, "-m", "venv", str(PEERS)], check=True)
        subprocess.run([str(PEERS / "bin" / "pip"), "install", "-q", "nfstream"], check=False)
    if subprocess.run([str(PEERS / "bin" / "python"), "-c", "import nfstream"], check=False).returncode:
        absent("nfstream")
    return {
        "loop": [str(loop), str(path), TABLE_LOG2[name]],
        "table": [*ours, "table", str(path), str(packets)],
        "all": [*ours, "all", str(path), str(packets)],
        "command": [sys.executable, "-m", "gpuguard", "pcap", str(path)],
        "ndpi": [str(ndpi), "-q", "-n", "1", "-i", str(path)],
        "nfstream": [str(PEERS / "bin" / "python"), str(meter), str(path)],
    }


def absent(what: str) -> None:
    print(f"not measured: {what} is not installed", file=sys.stderr)
    sys.exit(2)


def rounds(each: dict[str, list[str]], packets: int) -> dict[str, float]:
    """Return the median of the rounds, in ns of CPU a packet."""
    figures: dict[str, list[float]] = {name: [] for name in each}
    for number in range(max(ROUNDS.values())):
        for name, command in each.items():
            if number < ROUNDS[name]:
                cpu_s, out = run(command)
                own = name in ("table", "all")
                figures[name].append(float(out) if own else cpu_s * 1e9 / packets)
    return {name: round(statistics.median(some), 1) for name, some in figures.items()}


def run(command: list[str]) -> tuple[float, str]:
    """Return the CPU seconds of a process and its children, and what it printed."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=ENVIRONMENT)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        sys.exit(f"{command}: {done.returncode}: {done.stderr}")
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime, done.stdout


def judged(medians: dict[str, dict[str, float]]) -> tuple[dict[str, float], list[str]]:
    """Return the ratios that have targets, and which of them were missed."""
    ratios: dict[str, float] = {}
    missed: list[str] = []
    for name, row in medians.items():
        limit = TABLE_PER_LOOP_MAX[name]
        checks = [("table / loop", row["table"] / row["loop"], limit, 1),
                  ("all / loop", row["all"] / row["loop"], limit * ALL_PER_TABLE_LIMIT_MAX, 1)]
        if name == "100k":
            checks += [("ndpi / all", row["ndpi"] / row["all"], NDPI_PER_ALL_MIN, -1),
                       ("nfstream / all", row["nfstream"] / row["all"], NFSTREAM_PER_ALL_MIN, -1)]
        for what, ratio, target, sign in checks:
            ratios[f"{name}: {what}"] = round(ratio, 2)
            if sign * ratio > sign * target:
                missed.append(f"{name}: {what} is {ratio:.2f}, target {target:g}")
    return ratios, missed


# -- in a process of its own ------------------------------------------------------------------------------------------


def worker(what: str, path: Path, packets: int) -> None:
    import gpuguard.cli.commands.pcap
    import gpuguard.core.guard
    import gpuguard.sensors.packets

    gpuguard.core.guard.Guard()  # loads the detectors: start-up is the row "command"
    work = {"table": table, "all": every, "check": check}[what]
    if what == "check":
        print(json.dumps(work(path)))
        return
    before = time.process_time_ns()
    work(path)
    print((time.process_time_ns() - before) / packets)


def table(path: Path) -> None:
    from gpuguard._flows import Table
    from gpuguard.core.flows import FLOWS_MAX
    from gpuguard.core.records import Packets
    from gpuguard.sensors.packets import read_capture

    flows, now_ns = Table(FLOWS_MAX, quiet_flows=True, quiet_exchanges=True), 0
    for block in read_capture(path, brief=True):
        if isinstance(block, Packets):
            flows.run(block.rows, 0, len(block.rows), 0)
            now_ns = max(now_ns, block.time_ns)
            flows.tick(now_ns)
    flows.close(now_ns)


def every(path: Path) -> dict[str, int]:
    from gpuguard.cli.commands.pcap import _Tally, judge

    tally = _Tally()
    for _ in judge(path, (), tally, dull=False):
        pass
    return {f"{label} {verdict}": count for (label, verdict), count in sorted(tally.labels.items())}


def check(path: Path) -> dict[str, int]:
    """Return the verdicts by label, the same from a guard that reports flow by flow and reads every fact."""
    from gpuguard.core.events import FlowReport
    from gpuguard.core.guard import Guard
    from gpuguard.core.records import Gap, Packets, Tick
    from gpuguard.sensors.packets import read_capture

    guard, now_ns, counts = Guard(), 0, {}
    for block in itertools.chain(read_capture(path), (None,)):
        if isinstance(block, Gap):
            continue
        if isinstance(block, Packets):
            now_ns = max(now_ns, int(block.rows["time_ns"].max()))
        events = [*guard.receive(block), *guard.receive(Tick(time_ns=now_ns))] if block else guard.close(now_ns)
        for event in events:
            if isinstance(event, FlowReport):
                key = f"{event.finding.label} {event.finding.verdict}"
                counts[key] = counts.get(key, 0) + 1
    quick = every(path)
    if quick != dict(sorted(counts.items())):
        sys.exit(f"the verdicts differ: {quick} and {counts}")
    return quick


if __name__ == "__main__":
    main()
