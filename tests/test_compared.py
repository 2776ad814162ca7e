"""docs/compared.md says what the results of the benchmarks do: each figure of its tables is made again from them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/compared.md").read_text()
PEERS = ("GPUGuard", "nDPI", "nfstream", "Suricata")


def result(name: str) -> dict:
    return json.loads((ROOT / f"benchmarks/results/{name}.json").read_text())


DETECTION, RECIPE = result("detection"), result("smi_recipe")


def row(*cells: object) -> str:
    return f"| {' | '.join(str(cell) for cell in cells)} |"


def named(part: str, who: str, kind: str, count: str = "named") -> str:
    one = DETECTION[part][who].get(kind)
    return "-" if one is None or not one["claims"] else str(one[count])


def sessions(part: str, kind: str) -> int:
    found = {DETECTION[part][who][kind]["sessions"] for who in DETECTION[part]}
    assert len(found) == 1
    return found.pop()


LAB = {
    "`ssh -R`, told": ("reverse tunnels", "named"),
    "the same, before its first use": ("reverse tunnels", "before_use"),
    "shells through `-R`, told": ("shells through them", "named"),
    "`-R` and shells that evade, told": ("reverse tunnels that evade", "named"),
    "shells on connections dialled out, told": ("reverse-shell", "named"),
    "roles swapped, told": ("ssh-role-swap", "named"),
    "networks through SSH (`-w`), told": ("ssh-tun", "named"),
    "DNS tunnels, told": ("dns-tunnel", "named"),
    "ICMP tunnels, told": ("icmp-tunnel", "named"),
    "guessing of passwords, told": ("ssh-bruteforce", "named"),
    "ordinary sessions, told to be one of these": ("ordinary sessions", "named"),
}
FLAGS = {"`ssh -R` with any flag": "reverse tunnels", "ordinary sessions with any flag": "ordinary sessions"}


@pytest.mark.parametrize("asked", LAB)
def test_the_labs_sessions(asked):
    kind, count = LAB[asked]
    assert row(asked, sessions("lab", kind), *(named("lab", who, kind, count) for who in PEERS)) in PAGE


@pytest.mark.parametrize("asked", FLAGS)
def test_flags_of_the_labs_sessions(asked):
    kind = FLAGS[asked]
    flags = [DETECTION["lab"][who][kind]["any_flag"] for who in PEERS]
    assert row(asked, sessions("lab", kind), *flags) in PAGE


SAMPLED = {name: LAB[name] for name in ("`ssh -R`, told", "the same, before its first use", "shells through `-R`, told",
                                        "`-R` and shells that evade, told")}
SAMPLED["ordinary sessions, told to be one of these"] = ("ordinary sessions", "named")


@pytest.mark.parametrize("asked", SAMPLED)
def test_a_sample_for_packet_strider(asked):
    kind, count = SAMPLED[asked]
    told = [named("sampled", who, kind, count) for who in ("GPUGuard", "packetStrider")]
    assert row(asked, sessions("sampled", kind), *told) in PAGE


OTHERS = {
    "miners": "mining-pool", "shells and implants": "reverse-shell", "`ssh -R`": "ssh-reverse-tunnel|ssh-reverse-shell",
    "other reverse tunnels": "reverse-proxy|reverse-shell|reverse-tunnel|ssh-reverse-tunnel|ssh-reverse-shell|tunnel|"
                             "ssh-role-swap",
    "DNS tunnels": "dns-tunnel", "ICMP tunnels": "icmp-tunnel", "scans": "scan",
    "benign, told to be one of these": "ordinary sessions",
}


@pytest.mark.parametrize("half", ["held-out", "development"])
@pytest.mark.parametrize("asked", OTHERS)
def test_captures_of_others(asked, half):
    kind = f"{OTHERS[asked]}, {half}"
    assert row(f"{asked}, {half}", sessions("others", kind), *(named("others", who, kind) for who in PEERS)) in PAGE


def test_flags_of_captures_of_others():
    flags = [DETECTION["others"][who]["ordinary sessions"]["any_flag"] for who in PEERS]
    assert row("benign with any flag, both halves", sessions("others", "ordinary sessions"), *flags) in PAGE


def test_public_mining():
    told = [named("public", who, "mining-pool") for who in PEERS]
    assert row("public captures of mining", sessions("public", "mining-pool"), *told) in PAGE


def test_cost_of_packets():
    each, quick = DETECTION["cpu"]["each"], result("packets")["cpu_ns_per_packet"]
    costs = [f"{each[who]['ns_per_packet']:,}" for who in PEERS]
    assert row("the lab's captures", *costs, f"{DETECTION['sampled_cpu']['ns_per_packet']:,}") in PAGE
    for name in ("3k", "100k"):
        ours, ndpi, nfstream = (f"{quick[name][who]:,.0f}" for who in ("all", "ndpi", "nfstream"))
        assert row(f"a server's traffic, {name} flows", ours, ndpi, nfstream, "-", "-") in PAGE


def test_cost_of_launches():
    entry, eye = result("launches_entry"), result("launches")
    for what, theirs, ours in (
            ("`cudaLaunchKernel` at its first byte, bpftrace counting", entry["runtime_entry_added_ns"],
             entry["ours_added_ns"]),
            ("`cuLaunchKernel` at its first byte, bpftrace counting", entry["driver_entry_added_ns"],
             entry["ours_added_ns"]),
            ("the same, by kernel, of wall time", eye["bpftrace_added_ns"], eye["chosen_added_ns"]),
            ("the eye's own probe at the first byte, of wall time", eye["symbol_added_ns"], eye["chosen_added_ns"])):
        assert row(what, f"{theirs:,.0f}", f"{ours:,.0f}", f"{theirs / ours:.1f}") in PAGE
    assert f"{eye['daemon_ns_per_event']:.1f} ns of\nthe daemon's CPU time a launch" in PAGE


def test_code():
    decode, scan = result("code_decode"), result("code_scan")
    theirs, ours = decode["nvdisasm_gigabytes_per_cpu_second"], decode["gigabytes_per_cpu_second"]["parts"]["median"]
    assert row("decoding, GB of code a second", f"{theirs:.6f}", f"{ours:.2f}",
               f"{decode['times_nvdisasm']['parts']:,}") in PAGE
    ratio = f"{scan['faster']:.0f}"
    assert row("judging a library, MB a second", f"{scan['nvdisasm_and_python']['mb_per_s']:.2f}",
               f"{scan['scan_mb_per_s']:.0f}", ratio) in PAGE


def test_cost_of_counters():
    cores, kernels = result("nvml_sensor")["core_ratio"], result("kernels")
    for what, theirs, ours in (("nvitop, 1 Hz", "nvitop@0.98", "ours@1"), ("nvidia-ml-py, 1 Hz", "pynvml@1", "ours@1"),
                               ("nvidia-ml-py, 10 Hz", "pynvml@10", "ours@10")):
        assert row(f"reading 8 GPUs, {what}, % of a core", f"{100 * cores[theirs]:.2f}", f"{100 * cores[ours]:.2f}",
                   f"{cores[theirs] / cores[ours]:.1f}") in PAGE
    for what, theirs, ours in (("scoring a row of many, LightGBM, us", "lightgbm_batch_row_us", "forest_batch_row_us"),
                               ("scoring one row, LightGBM, us", "lightgbm_row_us", "forest_row_us"),
                               ("features of a window, pandas, us", "windows_pandas_us", "windows_us")):
        ratio = kernels[theirs] / kernels[ours]
        assert row(what, f"{kernels[theirs]:,.1f}", f"{kernels[ours]:.2f}", f"{ratio:,.0f}") in PAGE


KINDS = ("mining", "training", "inference", "compute")


def test_the_published_recipe():
    one = RECIPE["one board"]
    for what, found in (("the same board", one["the same board"]), ("other boards", one["other boards"]),
                        ("trained on all boards and kinds", RECIPE["all kinds"])):
        recipe = [f"{found['recipe'][kind]['accused']} of {found['recipe'][kind]['jobs']}" for kind in KINDS]
        ours = [f"{found['ours']['10'][kind]['suspect']} of {found['ours']['10'][kind]['jobs']}" for kind in KINDS]
        assert row(what, "recipe", *recipe) in PAGE
        assert row(what, "ours", *ours) in PAGE
    recipe = [f"{RECIPE['left out']['recipe'][kind]['accused']} of {RECIPE['left out']['recipe'][kind]['jobs']}"
              for kind in KINDS]
    assert row("kinds that it was not shown", "recipe", *recipe) in PAGE
    unseen = result("counters")["unseen"]
    assert row("kinds that it was not shown", "ours", *(f"{unseen[kind]['10']['nvml']:.0%}" for kind in KINDS)) in PAGE


def test_the_recipe_on_real_recordings():
    for name, found in RECIPE["one board"]["recordings"].items():
        every = RECIPE["all kinds"]["recordings"][name]
        cells = [f"{one[count]} of {one['each']}" for one in (found, every) for count in ("accused", "touched")]
        assert row(name.removesuffix(".csv.gz"), *cells, 0) in PAGE
    counters = result("counters")
    assert all(one["suspect"] == {"1": 0, "10": 0} for one in counters["recordings"].values())
    assert all(one["suspect at 10"] == {} for one in counters["programs"].values())
