"""Mining by launches: look-alikes first, then miners, renamed and not."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuguard.core.detectors import mining
from gpuguard.core.events import Finding
from gpuguard.core.guard import Guard
from gpuguard.core.host import Host
from gpuguard.core.records import LAUNCH, LAUNCH_APIS, KernelName, Launches, ModuleImage, ProcessExited, Tick
from gpuguard.core.signatures import parse_signature
from gpuguard.signature_files import shipped
from tests.core.builders import SECOND, T0, pid, started

INTERVAL = SECOND // 4
P = pid(4000)
DIGEST = "c0" * 32
KNOWN_CODE = f"""
id = "known"
version = 1
kind = "code-sha256"
label = "mining"
family = "a known miner"
maturity = "test"
nats = 18.0
why = "a digest is chosen by nobody"
references = ["a test"]
[match]
sha256 = ["{DIGEST}"]
[[samples]]
matches = true
what = "itself"
sha256 = "{DIGEST}"
[[samples]]
matches = false
what = "another"
sha256 = "{"c1" * 32}"
"""


def row(kernel, at_ns, count, gap_ns, *, grid=8192, process=P, api="cuLaunchKernel", spread=0):
    one = np.zeros(1, LAUNCH)
    one["pid"], one["start_ticks"], one["kernel"], one["api"] = (
        process.pid, process.start_ticks, kernel, LAUNCH_APIS.index(api))
    one["launches"], one["first_ns"], one["last_ns"] = count, at_ns, at_ns + gap_ns * (count - 1)
    one["grid"], one["block"] = (grid, 1, 1), (128, 1, 1)
    bucket = int(np.log2(gap_ns))
    for i in range(count):
        one["gaps_log2"][0, bucket + (i % (spread + 1)) * 2] += 1
    return one


def steady(seconds, *, kernels=1, per_s=40, process=P, begin=T0, **more):
    """Yield what the sensor would of a steady search: ``per_s`` launches of each kernel."""
    for i in range(seconds * 4):
        at = begin + i * INTERVAL
        count = max(1, per_s // 4)
        rows = [row(k + 1, at, count, INTERVAL // count, process=process, **more) for k in range(kernels)]
        yield Launches(at + INTERVAL, np.concatenate(rows))
        yield Tick(at + INTERVAL + 1)


def training(seconds, *, kernels=30, process=P, begin=T0):
    rng = np.random.default_rng(1)
    for i in range(seconds * 4):
        at = begin + i * INTERVAL
        rows = [
            row(k + 100, at, int(rng.integers(1, 9)), 20_000, grid=int(rng.integers(1, 500)), process=process, spread=3)
            for k in range(kernels)
        ]
        yield Launches(at + INTERVAL, np.concatenate(rows))
        yield Tick(at + INTERVAL + 1)


def judge(blocks, *names, signatures=None, process=P):
    guard = Guard(signatures=shipped() if signatures is None else signatures)
    for one in (process, pid(4001)):
        guard.receive(started(one))
    for kernel, name in enumerate(names, 1):
        guard.receive(KernelName(T0, process, kernel, name))
    findings = []
    for block in blocks:
        findings += [event for event in guard.receive(block) if isinstance(event, Finding)]
    return guard, findings


def standing(guard, process=P):
    found = ((one.verdict, one.label) for one in guard.processes() if one.process.process == process)
    return next(found, ("unknown", ""))


# -- look-alikes ------------------------------------------------------------------------------------------------------


def test_a_simulation_loop_of_one_kernel_is_no_suspect_however_long():
    guard, findings = judge(steady(120), "lbm_step")
    assert findings == []
    assert standing(guard)[0] == "unknown"


def test_a_steady_inference_server_of_few_kernels_is_no_suspect():
    _, findings = judge(steady(60, kernels=4, per_s=100), "gemm", "softmax", "rms_norm", "sample")
    assert findings == []


def test_decoding_by_graph_replay_weighs_nothing():
    guard, findings = judge(steady(30, per_s=60, api="cuGraphLaunch"))
    assert findings == []
    assert standing(guard) == ("unknown", "")


def test_training_is_clear_and_named():
    guard, findings = judge(training(5))
    assert findings == []
    assert standing(guard) == ("clear", "training")


def several(seconds, grids, *, per_s=40, **more):
    """Yield what the sensor would of a process that launches one kernel of each of these grids in turn."""
    for i in range(seconds * 4):
        at = T0 + i * INTERVAL
        count = max(1, per_s // 4)
        rows = [row(k, at, count, INTERVAL // count, grid=grid, **more) for k, grid in enumerate(grids, 1)]
        yield Launches(at + INTERVAL, np.concatenate(rows))
        yield Tick(at + INTERVAL + 1)


@pytest.mark.parametrize("blocks", [1, 24, 64])
def test_a_window_of_collectives_alone_is_training(blocks):
    guard, findings = judge(steady(10, grid=blocks), "ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevComm*)")
    assert findings == []
    assert standing(guard) == ("clear", "training")


def test_training_as_poor_as_a_linear_layer_is_clear():
    """Sixteen kernels at nine sizes, as in the PARAM sample trace."""
    guard, findings = judge(several(5, [1, 2, 16, 64, 128, 256, 1024, 2048, 4096, *[64] * 7], per_s=400))
    assert findings == []
    assert standing(guard) == ("clear", "training")


def test_a_solver_of_many_kernels_on_one_mesh_is_no_suspect_and_no_training():
    guard, findings = judge(several(30, [4096] * 19 + [512]))
    assert findings == []
    assert standing(guard)[0] == "unknown"


def test_what_keeps_a_gpu_awake_is_no_search():
    """A warp each second, or a block forty times: no probability of mining comes of it."""
    blocks = [block for i in range(60) for block in (
        Launches(T0 + (i + 1) * SECOND, row(1, T0 + i * SECOND, 1, SECOND, grid=1)), Tick(T0 + (i + 1) * SECOND))]
    for process in (blocks, steady(60, grid=1)):
        guard, findings = judge(process, "probe")
        assert findings == []
        assert standing(guard) == ("unknown", "")


def test_a_name_that_is_looked_up_and_never_launched_is_nothing():
    guard, findings = judge(training(3))
    guard.receive(KernelName(T0, P, 7, "ethash_search"))
    assert findings == []
    assert guard.receive(Tick(T0 + 60 * SECOND)) == []


def test_a_miners_own_test_program_is_at_most_a_suspect():
    """It has the name, and launches it a few times."""
    guard, findings = judge([Launches(T0 + SECOND, row(1, T0, 3, 1000)), Tick(T0 + 30 * SECOND)], "ethash_search")
    assert [one.verdict for one in findings] == ["suspect"]
    assert standing(guard)[0] == "suspect"


# -- miners -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [
    "ethash_search", "_Z13ethash_searchPV14Search_resultsm", "progpow_search", "BlockMiningStep1", "FluffySeed2A",
    "void cryptonight_core_gpu_phase2<true>(int, unsigned long*)", "_Z23x11_echo512_gpu_hash_64jjPmPj",
    "blake3_hasher_mine", "_Z23sha256d_gpu_hash_sharedjjPj", "beamHashIII_R1", "_Z6digitHP4equi", "pearl_gen_noise",
    "void hashAes1Rx4<2097152ul, 192u, 2048u, 64u>(void const*, void*, unsigned int)",
])
def test_a_known_name_at_a_steady_beat_is_confirmed_in_time(name):
    _, findings = judge(steady(6), name)
    confirmed = next(one for one in findings if one.verdict == "confirmed")
    assert confirmed.label == "mining"
    assert confirmed.time_ns - T0 <= 5 * SECOND
    assert {one.evidence_class for one in confirmed.evidence} == {"launch", "code"}
    assert confirmed.subject == P


@pytest.mark.parametrize("api", ["cuLaunchKernel", "clEnqueueNDRangeKernel"])
def test_a_chain_of_renamed_hashes_is_not_cleared_as_training(api):
    """Sixteen hashes of one batch of nonces, in one of which four lanes take a nonce, and a look at the results."""
    guard, findings = judge(several(10, [4096] * 15 + [16384, 8192], api=api))
    assert findings == []
    assert standing(guard)[0] == "unknown"


def test_a_search_that_calls_itself_a_collective_is_not_cleared():
    guard, findings = judge(steady(10), "ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevComm*)")
    assert findings == []
    assert standing(guard) == ("unknown", "mining")


def beside_a_collective(seconds):
    """Yield a steady search, and a kernel of one block as each of its intervals begins."""
    for i in range(seconds * 4):
        at = T0 + i * INTERVAL
        yield Launches(at + INTERVAL, np.concatenate([row(1, at, 10, INTERVAL // 10), row(2, at, 1, INTERVAL, grid=1)]))
        yield Tick(at + INTERVAL + 1)


@pytest.mark.parametrize(("name", "stands"), [
    ("lbm_step", ("unknown", "mining")), ("ethash_search", ("confirmed", "mining"))])
def test_a_collective_now_and_then_clears_no_search(name, stands):
    guard, _ = judge(beside_a_collective(10), name, "ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevComm*)")
    assert standing(guard) == stands


def test_work_items_of_opencl_are_threads_however_they_are_grouped():
    one = np.concatenate([row(1, T0, 1, 1, grid=4096, api=api) for api in ("clEnqueueNDRangeKernel", "cuLaunchKernel")])
    one["block"][0] = 0
    assert mining._threads(one).tolist() == [4096, 4096 * 128]


@pytest.mark.parametrize("threads", [1024, 3584, 2**26])
def test_a_named_search_is_confirmed_however_few_threads_it_has_room_for(threads):
    _, findings = judge(steady(6, grid=threads // 128), "cryptonight_core_gpu_phase2_quad")
    assert findings[-1].verdict == "confirmed"


@pytest.mark.parametrize("name", ["m22000_loop", "_Z15keyFinderKernelii"])
def test_a_search_for_passwords_or_keys_is_told_as_that_and_is_no_miner(name):
    guard, findings = judge(steady(20), name)
    assert {(one.label, one.verdict) for one in findings} == {("cracking", "suspect")}
    assert standing(guard) == ("suspect", "cracking")


def test_an_experimental_signature_is_told_and_leads_to_nothing():
    signatures = tuple(msgspec.structs.replace(one, maturity="experimental") for one in shipped())
    guard, findings = judge(steady(20), "ethash_search", signatures=signatures)
    assert findings == []
    assert standing(guard)[0] == "unknown"
    detector = mining.Detector()
    detector.learn(signatures)
    host = Host()
    host.receive(started(P))
    host.receive(KernelName(T0, P, 1, "ethash_search"))
    told = [one for block in steady(3) for one in detector.receive(block, host)]
    assert [(one.kind, one.nats) for one in told] == [("code-kernel-name", 0.0)]
    assert "experimental" in told[0].text


def test_known_code_confirms_alone_once_it_is_stable_only():
    for maturity, verdict in (("test", "suspect"), ("stable", "confirmed")):
        text = KNOWN_CODE.replace('"test"', f'"{maturity}"').replace("nats = 18.0", "nats = 20.0")
        guard = Guard(signatures=(parse_signature(text, "known"),))
        guard.receive(started(P))
        found = [one for one in guard.receive(ModuleImage(T0, P, DIGEST, 4096, "cubin")) if isinstance(one, Finding)]
        assert [one.verdict for one in found] == [verdict]


def test_a_handle_without_a_name_any_more_is_no_miners():
    """Its module was unloaded: the beat that follows is of another kernel."""
    detector, host = mining.Detector(), Host()
    detector.learn(shipped())
    host.receive(started(P))
    blocks = [KernelName(T0, P, 1, "ethash_search"), Launches(T0 + SECOND, row(1, T0, 3, 1000)),
              Tick(T0 + 30 * SECOND), KernelName(T0 + 30 * SECOND, P, 1, ""), *steady(20, begin=T0 + 31 * SECOND)]
    evidence = []
    for block in blocks:
        host.receive(block)
        evidence += detector.receive(block, host)
    assert next(one.kind for one in evidence) == "code-kernel-name"
    assert sum(one.nats for one in evidence if one.kind == "launch-steady-search") == mining.STRUCTURE_NATS


def test_a_slow_miner_is_confirmed_from_longer_windows():
    """One heavy batch a second."""
    times = [T0 + i * SECOND for i in range(60)]
    blocks = [block for at in times for block in (Launches(at + SECOND, row(1, at, 1, SECOND)), Tick(at + SECOND))]
    _, findings = judge(blocks, "ethash_search")
    assert findings[-1].verdict == "confirmed"


def test_known_code_under_another_name_is_confirmed():
    guard = Guard(signatures=(*shipped(), parse_signature(KNOWN_CODE, "known")))
    guard.receive(ModuleImage(T0, P, DIGEST, 4096, "cubin"))
    guard.receive(KernelName(T0, P, 1, "matmul", DIGEST))
    events = [event for block in steady(6) for event in guard.receive(block)]
    findings = [event for event in events if isinstance(event, Finding)]
    assert findings[-1].verdict == "confirmed"
    assert {one.kind for one in findings[-1].evidence} == {"code-known-image", "launch-steady-search"}


def test_training_in_the_same_process_does_not_clear_a_miner():
    blocks = list(training(10)) + list(steady(10, begin=T0 + 10 * SECOND))
    guard, findings = judge(blocks, "ethash_search")
    assert findings[-1].verdict == "confirmed"
    assert standing(guard) == ("confirmed", "mining")


def test_structure_alone_never_goes_beyond_its_bound():
    blocks = [block for i in range(6) for block in (*steady(8, begin=T0 + i * 12 * SECOND),
                                                    *training(4, begin=T0 + (i * 12 + 8) * SECOND))]
    guard, findings = judge(blocks, "renamed")
    assert findings == []
    assert guard._fusion.best(P) is not None
    assert all(one.nats <= mining.STRUCTURE_NATS for (_, label), one in guard._fusion._standings.items()
               if label == "mining")


def test_two_processes_are_judged_apart():
    other = pid(4001)
    blocks = sorted([*steady(5), *training(5, process=other)], key=lambda block: block.time_ns)
    guard, findings = judge(blocks, "ethash_search")
    assert {one.subject for one in findings} == {P}
    assert standing(guard, other) == ("clear", "training")


def test_the_last_window_of_a_process_is_judged_at_its_end():
    detector = mining.Detector()
    detector.learn(shipped())
    guard = Guard(signatures=shipped())
    guard.receive(started(P))
    evidence = detector.receive(Launches(T0 + INTERVAL, row(1, T0, 40, 5_000_000)), guard.host)
    evidence += detector.receive(ProcessExited(T0 + INTERVAL, P), guard.host)
    assert evidence == []
    evidence += detector.receive(Tick(T0 + 2 * SECOND), guard.host)
    assert [one.kind for one in evidence] == ["launch-steady-search"]


def test_rows_that_come_after_the_end_of_a_process_do_not_begin_anew():
    blocks = [*steady(10), ProcessExited(T0 + 10 * SECOND, P), *steady(3, begin=T0 + 10 * SECOND)]
    guard, findings = judge([*blocks, Tick(T0 + 20 * SECOND), Tick(T0 + 90 * SECOND)], "lbm_step")
    assert findings == []
    assert len(next(one for one in guard._detectors if isinstance(one, mining.Detector))._standings) == 0


def test_without_signatures_only_what_does_not_mine_is_told():
    _, findings = judge(steady(5), "ethash_search", signatures=())
    assert findings == []
    guard, _ = judge(training(5), signatures=())
    assert standing(guard) == ("clear", "training")


# -- cutting ----------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_blocks_cut_anywhere_give_the_same_evidence(data):
    blocks = sorted([*steady(4, kernels=3), *training(3, process=pid(4001))], key=lambda block: block.time_ns)
    cut = []
    for block in blocks:
        if not isinstance(block, Launches):
            cut.append(block)
            continue
        at = data.draw(st.integers(0, len(block.rows)))
        cut += [Launches(block.time_ns, part) for part in (block.rows[:at], block.rows[at:]) if len(part)]
    assert judge(cut, "ethash_search")[1] == judge(blocks, "ethash_search")[1]
    assert evidence_of(cut) == evidence_of(blocks)


def evidence_of(blocks):
    detector = mining.Detector()
    detector.learn(shipped())
    guard = Guard()
    for process in (P, pid(4001)):
        guard.receive(started(process))
    guard.host.receive(KernelName(T0, P, 1, "ethash_search"))
    return [one for block in blocks for one in detector.receive(block, guard.host)]
