"""A simulator of GPU counters: what training, inference, other work and mining look like where nobody recorded them.

No time series of counters during mining can be had (miners publish hash rates and watts only), so this stands in for
recordings, and every figure that rests on it is *simulated*. It was written before the detector, and it knows more
than it shows: a job is drawn from ranges, its rhythm is laid out in time, and only then it is sampled the way a driver
would, with smoothing, jitter and fields that the board does not have.

Sources, named beside the numbers by these words:

- **h100**: DCGM at 10 Hz of 8 x H100 SXM (DDP training of a 136M model, speculative decoding of an 8B model, idle).
- **exporter**: H100 SXM training as reported in guilbaults/slurm-job-exporter#30.
- **dvfs**: summary of the NV-DVFS set, 20 CUDA programs on a V100: 19 keep SMACT >= 0.7, all have TENSO = 0; sorting
  networks SM .98, DRAM .1, FP32 .02-.04, occupancy .96; streaming programs DRAM .7-.87, FP32 .04-.08.
- **watts**: watts by algorithm on an RTX 4090 (450 W): Autolykos2 183, Verthash 187, CryptoNightGPU 214, Etchash 249,
  Cuckatoo32 273, Octopus and Skydoge 279, Kawpow 299, ZelHash 329, PyrinHash 347, Nexapow 410.
- **pearl**: figures of Pearl miners: IMMA only, one shape, within 2 % of the board's power at stock clocks.
- **quda**: lattice QCD's Dslash: few operations a byte, single precision at 79 % of what perfect reuse would give
  (Clark and Babich 2012).
- **gromacs**: molecular dynamics on A40, A100, L4, L40: small systems go with the clock, large ones with memory
  bandwidth (arXiv 2510.06902).
- **zkp**: zero-knowledge proofs run on the 32-bit integer pipe alone, few warps, transforms up to 90 % of the time
  (arXiv 2509.22684).
- **align**: Smith-Waterman at close to peak with DPX and half precision, memory accesses avoided (CUDASW++ 4.0).
- **spmv**: sparse linear algebra is bound by memory bandwidth on V100 and A100 (Tsai, Cojean and Anzt 2020).
- **nature**: the algorithm's own arithmetic: what it computes and fetches for each hash. Signatures of this kind are
  hypotheses: the ranges are kept wide, and overlap with those of honest programs wherever the arithmetic does.
- **assumed**: nothing better is known; the range is wide on purpose.
- **philly**: 93,451 jobs on Microsoft's cluster by minutes: of the GPUs that a job had to itself 49 % were idle in jobs
  of less than 6 hours, 25 % in jobs of more than a day; 65 % of the idle minutes lay amid a job (traces of Jeon et al.
  2019, as counted anew by affinode.io).
- **sheets**: data sheets of boards: watts, memory, clocks, operations a second, bytes over NVLink.
- **launches**: kernels of recorded training jobs (sample traces of HTA): between them the GPU is idle for 2.5 to 77 %
  of the time, under a profiler that slows the host down.
- **default**: defaults of PyTorch 1.12 and later (FP32 products without tensor cores) and of vLLM (.9 of the memory).
- **evasion**: options of public miners and malware (--low-load, --gpu-intensity, -i 8..25, idle-wait, "pauses the miner
  and clears the GPU memory"), and watts of deliberately down-clocked mining (118 W to 78 W, 142 W to 103 W).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from gpuguard.core.records import Device, DeviceSample, Gpm

if TYPE_CHECKING:
    from collections.abc import Iterator

SECOND_NS = 1_000_000_000
#: Everything is laid out at this step and then averaged to the rate that is asked for.
STEP_S = 0.1

Range = tuple[float, float]
Kind = Literal["mining", "training", "inference", "compute", "idle"]
Visible = Literal["gpm", "dcgm", "nvml"]

#: Shares of the device's limit, 0..1, in the order in which they are laid out.
SHARES = ("sm", "occupancy", "integer", "fp32", "fp64", "fp16", "hmma", "imma", "dram")


class Board(NamedTuple):
    """A GPU model: its limits, and what its driver tells."""

    name: str
    power_limit_w: float
    idle_w: float
    memory_bytes: float
    sm_clock_limit_hz: float
    visible: tuple[Visible, ...]
    strain: float = 1.0
    """How many times the FP32 operations a watt that a board of its generation with power to spare has: what would take
    half of that one's limit is more than this one has, and its clocks give way."""


#: Power and memory as on the vendor's data sheets; idle from h100 (68-123 W with a context), others scaled (assumed).
#: GPM exists from Hopper on; DCGM's profiling fields on data-centre boards from Volta on; consumer boards have neither.
#: Strain by TFLOPS a watt: H100 PCIe .146 and SXM .096, L40S .26 and L4 .42 beside RTX 4090 .18, A10 .21 beside RTX
#: 3090 .10, T4 .116 beside V100 .052 (sheets).
BOARDS = (
    Board("H100 SXM", 700.0, 75.0, 80e9, 1.98e9, ("gpm", "dcgm", "nvml")),
    Board("H200 SXM", 700.0, 80.0, 141e9, 1.98e9, ("gpm", "dcgm", "nvml")),
    Board("B200", 1000.0, 140.0, 180e9, 1.965e9, ("gpm", "dcgm", "nvml")),
    Board("A100 SXM", 400.0, 55.0, 80e9, 1.41e9, ("dcgm", "nvml")),
    Board("V100 SXM", 300.0, 40.0, 16e9, 1.53e9, ("dcgm", "nvml")),
    Board("L40S", 350.0, 35.0, 48e9, 2.52e9, ("dcgm", "nvml"), 1.4),
    Board("RTX 4090", 450.0, 20.0, 24e9, 2.52e9, ("nvml",)),
    Board("H100 PCIe", 350.0, 48.0, 80e9, 1.755e9, ("gpm", "dcgm", "nvml"), 1.5),
    Board("A10", 150.0, 17.0, 24e9, 1.695e9, ("dcgm", "nvml"), 2.0),
    Board("L4", 72.0, 16.0, 24e9, 2.04e9, ("dcgm", "nvml"), 2.3),
    Board("T4", 70.0, 10.0, 16e9, 1.59e9, ("dcgm", "nvml"), 2.2),
)


class Rhythm(NamedTuple):
    """How the work of a job is laid out in time.

    A step of ``step_s`` seconds is busy for all but ``wait`` of it, when the level falls to ``rest`` of the busy one. A
    break comes every ``break_s`` seconds on average and lasts ``break_length_s``: SMs idle, and ``copy`` bytes/s move
    over PCIe. A phase, where ``phases_s`` says so, changes the level of everything to something between ``phase_level``
    and 1. Zeros mean that there is none. By ``wander`` (of its logarithm) each pipe's share departs from its usual one
    over seconds to minutes.
    """

    step_s: Range = (0.05, 0.5)
    wait: Range = (0.0, 0.02)
    rest: Range = (0.0, 0.5)
    break_s: Range = (0.0, 0.0)
    break_length_s: Range = (0.1, 2.0)
    copy: Range = (0.0, 0.0)
    phases_s: Range = (0.0, 0.0)
    phase_level: float = 1.0
    wander: Range = (0.001, 0.01)


class Workload(NamedTuple):
    """One way to use a GPU. Ranges are of the busy part of a step; power is the share of the way from idle to limit.

    ``family`` is of mining, or for other work what kinds of one nature share, so that they can be left out together.
    """

    name: str
    kind: Kind
    family: str
    sm: Range
    occupancy: Range
    integer: Range
    fp32: Range
    fp64: Range
    fp16: Range
    hmma: Range
    imma: Range
    dram: Range
    power: Range
    pcie: Range
    nvlink: Range
    memory: Range
    rhythm: Rhythm


ZERO = (0.0, 0.0)
#: Counters of pipes that a program does not use still show a little: address arithmetic is integer work, loops compare.
TRACE = (0.0, 0.01)
#: An idle H100 with a monitor on it at 10 Hz moves 1.28-1.35 MB/s both ways, with a standard deviation of a third from
#: sample to sample; one in twenty is above 2, one in a hundred above 3, one in a thousand above 6, none above 8.7
#: (h100): so does whoever computes on it. A monitor that looks less often moves less, others more (assumed).
HUSH = (1e5, 3e6)
HUSH_SD, CHATTER, CHATTER_TIMES, CHATTER_TAIL = 0.25, 0.04, (1.5, 6.5), 3.0

#: A job is more than its kernels: a program computes on the host, waits for a person or a file, and goes on. Half of
#: the jobs (of all but miners) pause, by a tenth to twice as long as they work; that leaves a quarter of the time idle
#: (philly). How long they work at a stretch and how regularly is not known (assumed), nor what comes with the return.
PAUSING, WORKING_S, PAUSED, IRREGULAR = 0.5, (1.0, 600.0), (0.1, 2.0), (0.02, 1.0)
BRINGING, BROUGHT_S, BROUGHT = 0.5, (0.1, 2.0), (1e7, 1e10)
#: And not every job fills a board: eigenvalues SM .01, gaussian SM .58 (dvfs), decoding SM .14-.27 (h100). A third of
#: those of compute and inference have this share of the SMs at work (assumed); training is given batches that fill it.
SMALL, FILLED = 1 / 3, (0.05, 0.9)

#: A watch sees some jobs begin: what they work on is loaded and made, in 20 s by h100, and memory fills meanwhile.
#: Miners make their tables on the board (nature). How often it sees that is not known (assumed).
BEGINNING, BEGUN_S, LOADING = 0.3, (3.0, 120.0), (1e7, 1e10)
#: Memory that is held changes by 1-20 MiB once a minute or two, also of an idle board (h100: 4 times in 330 s); that of
#: a job that works by some hundred MiB besides, for a checkpoint or a larger batch (h100), if at all (assumed: half).
FIDGET_S, FIDGET_BYTES, GROWING, GROWN_S, GROWN = 80.0, 2e7, 0.5, (30.0, 1200.0), (0.001, 0.1)
#: How long a mix takes to become another (assumed).
WANDER_S = (5.0, 300.0)
#: Half-precision outside of tensor cores is mostly none at all (exporter 0.0; h100 0 and .0006).
NO_HALF = 0.5

#: A search kernel runs for 10 ms to 1 s and is launched again at once (nature): no break, no copy but a nonce.
SEARCH = Rhythm(step_s=(0.01, 1.0), wait=(0.0, 0.03), rest=(0.0, 0.9))
#: Rounds of sorting or trimming, each with its own shape, for tenths of seconds to seconds (nature).
ROUNDS = Rhythm(step_s=(0.2, 8.0), wait=(0.1, 0.5), rest=(0.4, 0.9), wander=(0.003, 0.05))

MINERS = (
    # Random reads of 64 x 128 B a hash: DRAM 80-95 %, no float (nature); watts .41 to .6 of the limit (watts).
    Workload("ethash", "mining", "memory", (.85, 1.0), (.3, .9), (.08, .4), (0., .05), ZERO, TRACE, ZERO, ZERO, (.75,
             .95), (.35, .75), HUSH, ZERO, (.03, .5), SEARCH),
    # Reads of 32 B of a table, one Blake2b: bound by sectors, the poorest in watts (nature, watts).
    Workload("autolykos", "mining", "memory", (.7, 1.0), (.3, .95), (.1, .45), (0., .05), ZERO, TRACE, ZERO, ZERO,
             (.4, .9), (.3, .6), HUSH, ZERO, (.03, .5), SEARCH),
    # Reads of a light table and of DRAM, then a random program of integer instructions, another one every few minutes,
    # near the cap (nature, watts).
    Workload("kawpow", "mining", "mixed", (.9, 1.0), (.3, .8), (.4, .85), (0., .12), ZERO, TRACE, ZERO, ZERO, (.45, .9),
             (.55, .98), HUSH, ZERO, (.04, .5), SEARCH._replace(wander=(.01, .1))),
    # DAG reads and polynomials over integers, high power (nature, watts).
    Workload("octopus", "mining", "mixed", (.85, 1.0), (.3, .8), (.3, .75), (0., .08), ZERO, TRACE, ZERO, ZERO, (.4,
             .85), (.5, .95), HUSH, ZERO, (.06, .5), SEARCH),
    # A 64 x 64 matrix of nibbles by dp4a between two Keccaks: integer at its most, hardly any DRAM (nature).
    Workload("kheavyhash", "mining", "integer", (.93, 1.0), (.3, .95), (.6, .97), (0., .06), ZERO, TRACE, ZERO, ZERO,
             (0., .03), (.5, .98), HUSH, ZERO, (.003, .03), SEARCH),
    # Registers only: integer near its most, DRAM below 2 %, less than 500 MB (nature); SHA-256, SHA-3 and Keccak alike.
    Workload("blake3", "mining", "integer", (.93, 1.0), (.25, .95), (.6, .98), (0., .05), ZERO, TRACE, ZERO, ZERO,
             (0., .02), (.45, .95), HUSH, ZERO, (.002, .03), SEARCH),
    # Lists are sorted and collided round by round: DRAM reads and writes, atomics (nature), .73 (watts).
    Workload("equihash", "mining", "lists", (.75, 1.0), (.3, .9), (.15, .6), (0., .05), ZERO, TRACE, ZERO, ZERO, (.3,
             .8), (.45, .9), HUSH, ZERO, (.02, .25), ROUNDS),
    # Edges of a graph are trimmed for seconds, 7-11 GB (nature), .6 (watts).
    Workload("cuckoo", "mining", "lists", (.75, 1.0), (.3, .9), (.1, .5), (0., .05), ZERO, TRACE, ZERO, ZERO, (.4, .9),
             (.4, .8), HUSH, ZERO, (.06, .5), ROUNDS),
    # A scratchpad of floats: FP32 high, as in simulation (nature), .48 (watts).
    Workload("cryptonight-gpu", "mining", "float", (.85, 1.0), (.2, .7), (.1, .4), (.4, .85), ZERO, TRACE, ZERO, ZERO,
             (.1, .6), (.4, .95), HUSH, ZERO, (.1, .9), SEARCH),
    # Made for CPUs; on a GPU few threads, scratchpads of 2 MB, odd occupancy (nature).
    Workload("randomx", "mining", "scratchpad", (.5, 1.0), (.03, .25), (.1, .5), (0., .2), (0., .15), TRACE, ZERO, ZERO,
             (.1, .6), (.25, .6), HUSH, ZERO, (.1, .95), ROUNDS),
    # INT8 matrix products of one shape: IMMA high, HMMA none, near the board's power (pearl); hash and noise beside it.
    Workload("matmul-pow", "mining", "matmul", (.9, 1.0), (.12, .4), (.05, .3), (0., .08), ZERO, TRACE, (0., .005),
             (.4, .95), (.05, .45), (.75, 1.0), HUSH, ZERO, (.005, .2), SEARCH),
)

#: A step with a wait for its gradients or its data; a checkpoint now and then goes over PCIe (h100, exporter, assumed).
STEPS = Rhythm(step_s=(0.05, 3.0), wait=(0.0, 0.4), rest=(0.0, 0.5), break_s=(120.0, 3600.0),
               break_length_s=(1.0, 40.0), copy=(2e8, 2e10), wander=(0.003, 0.1))
#: PCIe: text is 8 bytes a token, 10 thousand of them a second at most, which is less than a monitor moves; pictures are
#: 150 kB each, thousands a second (nature).
TRAINING = (
    # sm .58-.69, tensor .17-.21, DRAM .29-.35, PCIe 65-82 MB/s, NVLink 7.5-10 GB/s, 518-588 W (h100); sm .91-.93,
    # tensor .28, DRAM .18-.21, FP32 .05, occupancy .24, NVLink 5 GB/s, 572-602 W (exporter).
    Workload("ddp", "training", "", (.5, .95), (.15, .4), (.05, .25), (.02, .15), ZERO, (0., .02), (.12, .6), ZERO,
             (.15, .5), (.5, .95), (1e5, 1e9), (5e8, 3e10), (.05, .95), STEPS),
    Workload("one-gpu", "training", "", (.4, .98), (.15, .5), (.05, .3), (.02, .3), ZERO, (0., .05), (.05, .5), ZERO,
             (.15, .6), (.4, .95), (1e5, 1e9), ZERO, (.03, .9), STEPS),
    # Kernels are queued ahead, so that a job which is not short of data does not wait: idle 2.5 % (launches). Weights
    # are written every half hour or so (assumed).
    Workload("fine-tuning", "training", "", (.7, 1.0), (.12, .45), (.05, .3), (.02, .25), ZERO, (0., .05), (.1, .75),
             ZERO, (.15, .65), (.5, 1.0), (1e5, 1e7), ZERO, (.05, .95),
             STEPS._replace(step_s=(0.1, 20.0), wait=(0.0, 0.03), rest=(0.3, 0.9), break_s=(300.0, 2e4))),
    # Weights are gathered twice and gradients scattered once a step: 3 x 14 GB of a model of 7 G parameters in .5 to
    # 2 s (nature), of 900 GB/s both ways that NVLink has (sheets). Experts and tensors in parallel move as much.
    Workload("sharded", "training", "", (.5, .98), (.12, .4), (.05, .25), (.02, .2), ZERO, (0., .02), (.1, .6), ZERO,
             (.15, .6), (.45, .98), (1e5, 1e8), (1e10, 2e11), (.2, .95), STEPS),
    # Several small steps, then one for the optimizer, where tensor cores rest: below 1 s if offloaded (h100).
    Workload("accumulation", "training", "", (.6, .98), (.15, .45), (.05, .25), (.02, .2), ZERO, (0., .02), (.2, .6),
             ZERO, (.15, .5), (.5, .98), (1e5, 5e8), (0., 2e10), (.1, .95),
             STEPS._replace(step_s=(2.0, 20.0), wait=(0.0, 0.15), rest=(0.3, 0.8))),
    # Waits for its input most of the time (assumed).
    Workload("data-starved", "training", "", (.4, .95), (.15, .5), (.05, .3), (.02, .3), ZERO, (0., .05), (.05, .5),
             ZERO, (.1, .5), (.3, .8), (2e7, 3e9), ZERO, (.05, .9),
             STEPS._replace(step_s=(0.2, 5.0), wait=(.4, .9), rest=(0., .1))),
    # Waits for other ranks: NCCL spins on the SMs, next to no tensor work, one kernel for over 90 % (launch traces).
    Workload("nccl-wait", "training", "", (.3, .95), (.02, .2), (.02, .15), (.01, .1), ZERO, TRACE, (.01, .15), ZERO,
             (.02, .2), (.2, .5), (5e6, 5e8), (1e8, 3e10), (.3, .95),
             STEPS._replace(step_s=(1.0, 60.0), wait=(.3, .8), rest=(.5, 1.))),
    # Rollouts, updates, and idle while environments run (assumed): phases of tens of seconds.
    Workload("rl", "training", "", (.3, .95), (.1, .4), (.05, .25), (.02, .2), ZERO, (0., .05), (.05, .5), ZERO,
             (.15, .7), (.3, .9), (1e7, 2e9), (0., 2e10), (.3, .95),
             STEPS._replace(phases_s=(5.0, 120.0), phase_level=0.0, break_s=(60.0, 900.0))),
    # Single precision without tensor cores (default): what is left of them is FP32.
    Workload("fp32", "training", "", (.6, .99), (.2, .6), (.1, .35), (.25, .8), ZERO, TRACE, (0., .02), ZERO, (.1, .6),
             (.4, .98), (1e5, 5e8), (0., 1e10), (.03, .9), STEPS),
    # Embeddings and neighbours of nodes are fetched at random: DRAM, integer, little else (a named confuser).
    Workload("embedding", "training", "", (.5, .95), (.3, .8), (.15, .45), (.03, .2), ZERO, TRACE, (0., .15), ZERO,
             (.4, .85), (.3, .7), (2e7, 4e9), (0., 1e10), (.3, .95), STEPS),
)

#: Requests come and go; each brings its bytes (h100: 29-33 MB/s out, 272-306 MB/s in while decoding).
SERVING = Rhythm(step_s=(0.02, 1.0), wait=(0.05, 0.7), rest=(0.0, 0.3), break_s=(20.0, 600.0),
                 break_length_s=(0.2, 20.0), copy=(1e7, 3e9), phases_s=(10.0, 300.0), phase_level=0.3,
                 wander=(0.01, 0.4))
#: Prompts are tensor work and answers DRAM, so their mix goes with what is asked for (nature). Text is next to nothing
#: over PCIe, and a network for pictures or speech takes a gigabyte or two (nature).
INFERENCE = (
    # sm .2-.27, tensor .03-.05, DRAM .12-.2, 193-220 W (h100).
    Workload("batch-1", "inference", "", (.2, .8), (.1, .35), (.03, .2), (.02, .15), ZERO, (0., .1), (.02, .15), ZERO,
             (.15, .85), (.2, .7), (1e5, 5e8), ZERO, (.02, .95), SERVING),
    Workload("batched", "inference", "", (.5, .98), (.1, .4), (.05, .25), (.02, .2), ZERO, (0., .1), (.1, .6), ZERO,
             (.2, .8), (.4, .95), (1e5, 2e9), (0., 2e10), (.03, .95), SERVING._replace(wait=(0.0, 0.3))),
    # Answers without end to a queue that never runs dry, in memory that is taken at once (default).
    Workload("saturated", "inference", "", (.6, 1.0), (.1, .4), (.05, .25), (.02, .2), ZERO, (0., .1), (.03, .5), (0.,
             .2), (.3, .9), (.45, 1.0), (1e5, 1e8), (0., 5e10), (.3, .95), SERVING._replace(
                 wait=(0.0, 0.1), rest=(0.3, 0.9), break_s=(300.0, 2e4), phases_s=(0., 0.))),
    # W8A8 serving is IMMA, as matmul proof of work; attention stays HMMA (a named confuser).
    Workload("int8", "inference", "", (.5, .98), (.1, .4), (.08, .3), (.02, .2), ZERO, (0., .1), (.01, .2), (.1, .6),
             (.2, .8), (.4, .97), (1e5, 1e9), (0., 1e10), (.03, .95), SERVING._replace(wait=(0.0, 0.4))),
    # Embeddings of a corpus, offline: steadier than requests are, fed over PCIe (assumed).
    Workload("offline", "inference", "", (.6, .99), (.1, .4), (.05, .25), (.02, .2), ZERO, (0., .1), (.1, .7), (0., .3),
             (.1, .6), (.5, .98), (1e5, 1e9), ZERO, (.03, .95), SERVING._replace(wait=(0., .2), phases_s=(0., 0.))),
)

#: Programs compute for seconds to minutes, write what they found, and go on (assumed); some run long without a word.
RUNS = Rhythm(step_s=(0.01, 2.0), wait=(0.0, 0.2), rest=(0.0, 0.8), break_s=(3.0, 900.0), break_length_s=(0.1, 5.0),
              copy=(5e6, 1e10), wander=(0.003, 0.3))
#: The same without a break for hours: the hardest to tell from a search (dvfs played as a constant).
LONG = RUNS._replace(break_s=(900.0, 20_000.0), wait=(0.0, 0.05), wander=(0.001, 0.05))
COMPUTE = (
    # Sorting networks SM .98, DRAM .1, FP32 .02-.04, occupancy .96; merge sort FP32 .12-.18 (dvfs).
    Workload("sort", "compute", "sorting", (.85, 1.0), (.5, .97), (.2, .7), (.02, .2), ZERO, TRACE, ZERO, ZERO, (.03,
             .6), (.3, .8), (1e5, 1e9), ZERO, (.01, .6), RUNS),
    Workload("sort-loop", "compute", "sorting", (.9, 1.0), (.6, .97), (.25, .7), (.02, .08), ZERO, TRACE, ZERO, ZERO,
             (.03, .5), (.3, .8), (1e5, 1e7), ZERO, (.01, .3), LONG),
    # Streaming programs DRAM .7-.87, FP32 .04-.08 (dvfs): memory tests and bandwidth benchmarks among them.
    Workload("stream", "compute", "streaming", (.85, 1.0), (.2, .95), (.03, .3), (.03, .12), (0., .1), TRACE, ZERO,
             ZERO, (.5, .95), (.3, .7), (1e5, 1e8), ZERO, (.02, .8), LONG),
    Workload("fft", "compute", "transforms", (.8, 1.0), (.3, .8), (.08, .35), (.15, .6), (0., .1), TRACE, ZERO, ZERO,
             (.3, .9), (.4, .85), (1e5, 5e8), ZERO, (.02, .8), RUNS),
    Workload("stencil", "compute", "grids", (.85, 1.0), (.3, .9), (.08, .35), (.12, .5), (0., .3), TRACE, ZERO, ZERO,
             (.3, .9), (.4, .85), (1e5, 1e8), (0., 5e9), (.05, .9), LONG),
    Workload("n-body", "compute", "particles", (.9, 1.0), (.3, .9), (.03, .25), (.4, .95), (0., .1), TRACE, ZERO, ZERO,
             (0., .1), (.6, 1.0), (1e5, 1e7), ZERO, (.003, .2), LONG),
    # Molecular dynamics: FP32, one frame written every few seconds to minutes (assumed).
    Workload("folding", "compute", "particles", (.7, .99), (.2, .6), (.1, .35), (.25, .7), (0., .1), TRACE, (0., .02),
             ZERO, (.05, .4), (.4, .9), (5e5, 3e7), ZERO, (.01, .2), RUNS),
    Workload("fp64-solver", "compute", "matrices", (.7, 1.0), (.2, .8), (.05, .3), (.01, .1), (.15, .8), TRACE, ZERO,
             ZERO, (.02, .8), (.4, .98), (1e5, 1e9), (0., 2e10), (.05, .9), RUNS),
    Workload("rendering", "compute", "pictures", (.7, 1.0), (.15, .6), (.1, .4), (.15, .6), ZERO, (0., .05), (0., .1),
             ZERO, (.1, .5), (.5, .95), (1e6, 1e9), ZERO, (.05, .9), RUNS),
    Workload("transcoding", "compute", "pictures", (.02, .5), (.05, .5), (.02, .2), (.01, .2), ZERO, (0., .05), (0.,
             .05), (0., .1), (.05, .3), (.1, .4), (1e7, 3e9), ZERO, (.01, .2), SERVING),
    # Zero-knowledge provers, bigint: multiplies of long integers in bursts, witnesses over PCIe (a named confuser).
    Workload("prover", "compute", "integers", (.6, 1.0), (.1, .6), (.3, .9), (.01, .1), ZERO, TRACE, ZERO, ZERO, (.05,
             .6), (.4, .95), (5e6, 5e9), ZERO, (.05, .9), RUNS._replace(break_s=(2.0, 60.0), break_length_s=(0.5,
             20.0))),
    # Checksums, encryption and random numbers over data that comes from the host (a named confuser).
    Workload("cipher", "compute", "integers", (.5, 1.0), (.3, .95), (.3, .85), (.01, .08), ZERO, TRACE, ZERO, ZERO, (.1,
             .7), (.3, .8), (1e8, 2e10), ZERO, (.01, .3), RUNS),
    # Hash joins and aggregation: integer and random DRAM, query by query (a named confuser).
    Workload("database", "compute", "tables", (.4, .95), (.3, .9), (.15, .6), (.01, .12), (0., .1), TRACE, ZERO, ZERO,
             (.2, .8), (.25, .7), (1e7, 1e10), ZERO, (.1, .95), RUNS._replace(wait=(.1, .6))),
    Workload("graph", "compute", "graphs", (.4, .98), (.2, .8), (.1, .5), (.01, .1), (0., .05), TRACE, ZERO, ZERO, (.2,
             .85), (.25, .65), (1e5, 1e9), (0., 5e9), (.1, .95), RUNS._replace(wait=(.05, .5))),
    # gpu-burn and dcgmproftester: a matrix product for minutes, steadier than any miner (a named confuser).
    Workload("burn-in", "compute", "tests", (.95, 1.0), (.12, .5), (.02, .2), (0., .9), (0., .5), (0., .4), (0., .95),
             (0., .3), (.05, .6), (.85, 1.0), HUSH, ZERO, (.5, .95), RUNS._replace(break_s=(20.0, 300.0))),
    Workload("microbenchmark", "compute", "tests", (.8, 1.0), (.2, .95), (.03, .95), (0., .9), (0., .3), (0., .3), ZERO,
             ZERO, (0., .95), (.2, .9), HUSH, ZERO, (.002, .5), RUNS._replace(break_s=(1.0, 30.0))),
    # fastWalshTransform SM .99, DRAM .39-.90, FP32 .06-.15; transpose DRAM .17-.66, FP32 .06-.11 (dvfs): transforms in
    # a loop, as in searches for pulsars and spectral codes, that stay on the board for hours.
    Workload("fft-loop", "compute", "transforms", (.9, 1.0), (.3, .95), (.05, .3), (.06, .45), (0., .2), TRACE, ZERO,
             ZERO, (.35, .92), (.3, .8), (1e5, 1e7), (0., 5e9), (.02, .9), LONG),
    # Radix sort reads and writes everything some eight times (nature); mergeSort DRAM .10-.50, FP32 .12-.18 (dvfs).
    Workload("radix-sort", "compute", "sorting", (.8, 1.0), (.25, .9), (.15, .55), (0., .15), ZERO, TRACE, ZERO, ZERO,
             (.3, .9), (.3, .75), (1e5, 1e8), ZERO, (.05, .9), ROUNDS._replace(wait=(0., .3), break_s=(30., 6e3),
             copy=(1e7, 1e10))),
    # SobolQRNG DRAM .25-.89, FP32 .13-.23; quasirandomGenerator SM .78-.80, DRAM .01-.08, FP32 .03-.04, occupancy .25
    # (dvfs): numbers are made by shifts and XORs.
    Workload("random-numbers", "compute", "chance", (.75, 1.0), (.2, .95), (.15, .8), (.03, .25), (0., .05), TRACE,
             ZERO, ZERO, (.01, .9), (.2, .7), (1e5, 1e7), ZERO, (.005, .5), LONG),
    # Checksums, erasure codes and deduplication of what lies on the board: tables, shifts, XORs (nature).
    Workload("checksum-loop", "compute", "integers", (.8, 1.0), (.3, .95), (.3, .85), (0., .06), ZERO, TRACE, ZERO,
             ZERO, (.1, .85), (.3, .75), (1e5, 1e8), ZERO, (.02, .9), LONG._replace(break_s=(60., 2e4))),
    # BlackScholes FP32 .33-.59, DRAM .19-.73; binomialOptions FP64 .22-.25, FP32 .01, DRAM .01-.08 (dvfs): paths of
    # prices or of particles, seeds in registers.
    Workload("monte-carlo", "compute", "chance", (.75, 1.0), (.15, .9), (.1, .5), (.01, .7), (0., .5), TRACE, ZERO,
             ZERO, (0., .7), (.3, .9), (1e5, 1e7), ZERO, (.005, .5), LONG),
    # Long integers and transforms over primes without a host that feeds them: homomorphic encryption, factoring (zkp).
    Workload("bigint-loop", "compute", "integers", (.7, 1.0), (.1, .6), (.35, .95), (0., .06), (0., .05), TRACE, ZERO,
             ZERO, (.01, .7), (.35, .95), (1e5, 1e7), ZERO, (.005, .6), LONG),
    # Products with sparse matrices, and the reductions between them: DRAM, indices, FP32 or FP64 in little (spmv).
    Workload("sparse-solver", "compute", "matrices", (.7, 1.0), (.3, .9), (.08, .4), (0., .2), (0., .35), TRACE, ZERO,
             ZERO, (.4, .93), (.3, .75), (1e5, 1e8), (0., 1e10), (.05, .9), LONG._replace(wait=(0., .25))),
    # Level by level: a narrow frontier, a wide one, a narrow one (nature).
    Workload("bfs", "compute", "graphs", (.4, .98), (.2, .85), (.1, .5), (0., .06), ZERO, TRACE, ZERO, ZERO, (.2, .85),
             (.25, .65), (1e5, 1e8), (0., 5e9), (.1, .95), ROUNDS._replace(step_s=(.05, 5.), wait=(.1, .6),
                                                                          rest=(.1, .8))),
    # PageRank and the like: the same pass over all edges again and again (nature).
    Workload("graph-passes", "compute", "graphs", (.8, 1.0), (.3, .9), (.1, .45), (0., .1), (0., .1), TRACE, ZERO, ZERO,
             (.4, .9), (.3, .7), (1e5, 1e7), ZERO, (.1, .95), LONG),
    # Large systems are bound by memory, small ones by the clock; forces FP32, neighbour lists integer (gromacs).
    Workload("molecules-large", "compute", "particles", (.8, 1.0), (.2, .7), (.08, .3), (.15, .6), (0., .15), TRACE,
             ZERO, ZERO, (.2, .75), (.45, .95), (2e5, 5e7), (0., 1e10), (.01, .4), RUNS._replace(break_s=(60., 6e3))),
    # A stencil in four dimensions with halos over NVLink; DRAM decides (quda). A configuration is written each hour.
    Workload("lattice-qcd", "compute", "grids", (.85, 1.0), (.15, .6), (.04, .25), (.1, .5), (0., .35), (0., .2), ZERO,
             ZERO, (.5, .93), (.4, .9), (1e5, 1e7), (0., 2e10), (.1, .95), LONG._replace(wait=(0., .2), break_s=(600.,
             7e3))),
    # cfd SM .72-.85, FP32 .17-.28, DRAM .08-.34, occupancy .31-.36; hotspot FP32 .18-.25, FP64 .13-.18, DRAM 0 (dvfs).
    Workload("fluids", "compute", "grids", (.65, .98), (.25, .65), (.05, .3), (.1, .4), (0., .3), TRACE, ZERO, ZERO,
             (0., .6), (.3, .8), (1e5, 5e7), (0., 1e10), (.02, .9), LONG._replace(wait=(0., .15), break_s=(60., 2e4))),
    # histogram SM .96-.99, DRAM .07-.35, FP32 .05-.06; scalarProd SM .92-.95, DRAM .19-.87, FP32 .04-.07; reduction
    # FP32 .24-.27 (dvfs): statistics over tables on the board, query by query or without end.
    Workload("aggregation", "compute", "streaming", (.85, 1.0), (.18, .92), (.08, .45), (.03, .28), (0., .1), TRACE,
             ZERO, ZERO, (.07, .88), (.25, .7), (1e5, 1e9), ZERO, (.05, .95), RUNS._replace(break_s=(10., 2e4),
             wait=(0., .3))),
    # Joins of tables that fit: a hash table is built, then probed at random (nature, a named confuser).
    Workload("join-loop", "compute", "tables", (.75, 1.0), (.3, .95), (.15, .5), (0., .06), ZERO, TRACE, ZERO, ZERO,
             (.35, .9), (.3, .65), (1e5, 1e9), ZERO, (.1, .95), ROUNDS._replace(wait=(.05, .4))),
    # Sequences against a database: integer or half-precision minima in registers, the next batch now and then (align).
    Workload("alignment", "compute", "integers", (.85, 1.0), (.12, .7), (.3, .9), (0., .1), ZERO, (0., .5), ZERO, ZERO,
             (0., .15), (.45, .98), (1e5, 1e9), ZERO, (.005, .5), RUNS._replace(break_s=(20., 1e4), break_length_s=(.05,
             2.), wait=(0., .08))),
    # convolutionTexture SM .99, FP32 .08-.13, DRAM .03-.19; convolutionSeparable DRAM .14-.75, FP32 .16-.23 (dvfs): a
    # filter for each frame of a stream, frames over PCIe, or of a stack of images on the board.
    Workload("video-filter", "compute", "pictures", (.15, 1.0), (.3, .97), (.05, .4), (.05, .35), ZERO, (0., .2), ZERO,
             ZERO, (.03, .75), (.2, .75), (1e6, 5e9), ZERO, (.01, .4), RUNS._replace(step_s=(.016, .1), wait=(0., .7))),
    # A path tracer that refines one picture until it is written: divergent FP32, boxes by integers and RT cores that no
    # counter tells, for minutes to hours (nature).
    Workload("path-tracing", "compute", "pictures", (.8, 1.0), (.12, .5), (.1, .45), (.1, .5), ZERO, (0., .05), ZERO,
             ZERO, (.1, .6), (.5, .98), (1e5, 1e8), ZERO, (.05, .9), LONG._replace(break_s=(60., 2e4))),
    # Lists and trees of proofs, games, schedules and circuits: integer, divergent, low occupancy (nature).
    Workload("tree-search", "compute", "graphs", (.5, 1.0), (.05, .5), (.15, .6), (0., .15), ZERO, TRACE, ZERO, ZERO,
             (.02, .5), (.2, .65), (1e5, 1e8), ZERO, (.01, .6), LONG._replace(wait=(0., .3), break_s=(60., 2e4))),
)

#: Searches that are no mining: keys of passwords, primes, preimages for a test of strength. By its nature such a search
#: is what a miner's is, registers and a counter, and nothing that counters tell sets them apart: so it is neither
#: trained on nor counted among other work, but shown by itself.
SEARCHES = (
    Workload("password-audit", "compute", "searches", (.9, 1.0), (.25, .95), (.55, .97), (0., .06), ZERO, TRACE, ZERO,
             ZERO, (0., .05), (.45, .98), (1e5, 1e8), ZERO, (.003, .2), LONG._replace(break_s=(60., 2e4))),
    Workload("prime-search", "compute", "searches", (.9, 1.0), (.15, .95), (.3, .97), (0., .2), (0., .6), TRACE, ZERO,
             ZERO, (0., .6), (.45, .95), HUSH, ZERO, (.003, .2), LONG),
)

#: 68-123 W, nothing else moves, a context may hold memory (h100).
IDLE = (
    Workload("idle", "idle", "", (0., .002), (0., .01), ZERO, ZERO, ZERO, ZERO, ZERO, ZERO, (0., 1e-5), (0., .08),
             HUSH, ZERO, (0., .95), Rhythm()),
)

BENIGN = TRAINING + INFERENCE + COMPUTE + IDLE


class Evasion(NamedTuple):
    """What a miner does not to be seen. ``share`` of the GPU's time is the miner's, the rest is a training job's."""

    name: str = "none"
    intensity: float = 1.0
    duty_s: float = 0.0
    downclocked: bool = False
    share: float = 1.0
    idle_only: bool = False
    watched: bool = False


#: (evasion): each is an option of a public miner or a habit of malware.
EVASIONS = (
    Evasion(),
    Evasion("intensity 50 %", intensity=0.5),
    Evasion("intensity 10 %", intensity=0.1),
    *(Evasion(f"duty {name}", duty_s=seconds) for name, seconds in
      (("1 s", 1.0), ("10 s", 10.0), ("1 min", 60.0), ("10 min", 600.0))),
    Evasion("down-clocked", downclocked=True),
    Evasion("mixed into training 30 %", share=0.3),
    Evasion("mixed into training 10 %", share=0.1),
    Evasion("mixed into training 5 %", share=0.05),
    Evasion("when idle only", idle_only=True),
    Evasion("pauses when watched", watched=True),
)


class Trace(NamedTuple):
    """What a driver would have told of one device: shares (n, 9) as in `SHARES`, and the rest a column each."""

    workload: Workload
    evasion: str
    board: Board
    visible: Visible
    time_s: np.ndarray
    shares: np.ndarray
    gpu: np.ndarray
    memory: np.ndarray
    power_w: np.ndarray
    clock_hz: np.ndarray
    pcie: np.ndarray
    nvlink: np.ndarray
    mining: np.ndarray
    """The miner's share of the device, 0..1: the truth, which no driver tells."""


class _Laid(NamedTuple):
    """Work laid out at `STEP_S`: shares, and columns gpu, power (0..1), PCIe, NVLink, memory."""

    shares: np.ndarray
    columns: np.ndarray


def simulate(
    workload: Workload,
    board: Board,
    seconds: float,
    random: np.random.Generator,
    *,
    rate_hz: float = 1.0,
    evasion: Evasion = EVASIONS[0],
    visible: Visible = "gpm",
) -> Trace:
    """Return one device's counters during a job, or during a miner that hides as ``evasion`` says."""
    steps = max(1, round(seconds / STEP_S))
    laid, mining = _lay_out(workload, steps, random), np.ones(steps)
    if workload.kind == "mining":
        laid, mining = _evade(laid, steps, evasion, random)
    else:
        mining = np.zeros(steps)
    clock = _clock(steps, downclocked=evasion.downclocked, random=random)
    power = laid.columns[:, 1] if board.strain == 1 else np.minimum(laid.columns[:, 1] * board.strain, 1.0)
    power_w = board.idle_w + (board.power_limit_w - board.idle_w) * power
    # NVML's power is a mean over a second, and of some boards a filter beyond: lag-1 0.1 to 0.99 at 10 Hz (h100).
    power_w = _smoothed(power_w, random.choice([0.1, 0.9, 0.95, 0.99])) + random.normal(0, 0.3, steps)
    clock_hz = clock * board.sm_clock_limit_hz
    columns = np.column_stack([laid.columns[:, :1], power_w, clock_hz, laid.columns[:, 2:], mining])
    every = max(1, round(1 / rate_hz / STEP_S))
    # Activities and bytes are means since the last sample (DCGM); what NVML tells is of the last second, however long
    # ago it was asked before: utilisation, power, clock and memory.
    shares, last = _averaged(laid.shares, every), _averaged(columns, every, round(1 / STEP_S))
    columns = _averaged(columns, every)
    columns[:, [0, 1, 2, 5]] = last[:, [0, 1, 2, 5]]
    # A loop that sleeps is late by some milliseconds, now and then by more (assumed).
    time_s = np.arange(1, len(shares) + 1) * every * STEP_S + random.gamma(1.0, 0.004, len(shares))
    gpu, power_w, clock_hz, pcie, nvlink, memory, mined = columns.T
    return Trace(workload, evasion.name, board, visible, time_s, shares, gpu, memory, power_w, clock_hz, pcie, nvlink,
                 mined)


#: A driver branch is updated about once a quarter.
UPDATE_WEEKS, YEAR_WEEKS = 13, 52.18
#: Columns of `SHARES` that an update may count otherwise; tensor types keep theirs: they are told by instruction.
_RECOUNTED = [SHARES.index(name) for name in ("sm", "occupancy", "integer", "fp32", "fp64", "fp16", "dram")]


def drifted(trace: Trace, weeks: float) -> Trace:
    """Return the same job as it would have shown so many weeks later: another driver, another season, an older board.

    All of it is *assumed*, and alike for all jobs under one driver. Updates: counters by up to 5 % up or down, the
    bytes that a driver and its monitor move by up to a factor of 2. Season: leakage, power by up to 3 %, clocks against
    it. Age: 1 % more power for the same work and 0.5 % less clock in a year (dust, paste).
    """
    driver = np.random.default_rng([20_261_121, int(weeks // UPDATE_WEEKS)])
    shares = trace.shares.copy()
    shares[:, _RECOUNTED] *= 1 + driver.uniform(-0.05, 0.05, len(_RECOUNTED))
    season, age = np.sin(2 * np.pi * weeks / YEAR_WEEKS), weeks / YEAR_WEEKS
    ceiling = 1.02 * trace.board.power_limit_w
    return trace._replace(
        shares=np.minimum(shares, 1.0),
        power_w=np.minimum(trace.power_w * (1 + 0.03 * season + 0.01 * age), ceiling),
        clock_hz=trace.clock_hz * (1 - 0.01 * season - 0.005 * age),
        pcie=trace.pcie + HUSH[0] * 2 ** driver.uniform(-1, 1))


def _lay_out(workload: Workload, steps: int, random: np.random.Generator) -> _Laid:
    """Draw a job from its ranges and lay it out in time."""
    level, copying = _rhythm(workload.rhythm, steps, random)
    honest = workload.kind not in ("mining", "idle")
    if honest and random.random() < PAUSING:
        working, brought = _pauses(steps, random)
        level, copying = level * working, copying + brought
    begun = np.ones(steps)
    if workload.kind != "idle" and random.random() < BEGINNING:
        begun, loading = _beginning(steps, honest=honest, random=random)
        level, copying = level * np.where(begun < 1, random.uniform(0, 1), 1), copying + loading
    filled, sleeps = 1.0, False
    if workload.kind in ("compute", "inference") and random.random() < SMALL:
        filled, sleeps = random.uniform(*FILLED), random.random() < 0.5
    noise_sd, lag = float(np.exp(random.uniform(np.log(0.002), np.log(0.04)))), float(random.uniform(0.0, 0.95))
    drawn = filled * np.array([random.uniform(*getattr(workload, name)) for name in SHARES])
    # Pipes cannot be busier than the SMs that they are in, and those not than what occupies them.
    drawn[1:8] = np.minimum(drawn[1:8], max(drawn[0], 1e-6))
    drawn[SHARES.index("fp16")] *= random.random() >= NO_HALF
    wander = 10 ** random.uniform(*np.log10(workload.rhythm.wander))
    wobble = 1 + noise_sd * _correlated(steps, lag, random)
    shares = np.clip(drawn * (level * wobble)[:, None], 0, 1)
    for i in range(len(SHARES)):
        shares[:, i] *= np.clip(1 + noise_sd * _correlated(steps, lag, random), 0, 2)
    for i in range(1, len(SHARES)):
        shares[:, i] *= np.exp(wander * _wandering(steps, random))
    gpu = np.clip(np.where(level > 0.03, np.minimum(1.0, level / 0.6), level), 0, 1) * (drawn[0] > 0.01)
    if sleeps:  # between kernels; else one that is too small runs all the time
        gpu *= filled
    power = random.uniform(*workload.power) * filled * level**0.8 + 0.004 * _correlated(steps, lag, random)
    wavering = np.clip(level * (1 + 0.2 * random.normal(size=steps)), 0.05, None)
    pcie = 10 ** random.uniform(*np.log10(workload.pcie)) * wavering
    pcie = np.maximum(pcie, _hush(steps, random)) + copying
    nvlink = random.uniform(*workload.nvlink) * level * np.clip(1 + 0.1 * random.normal(size=steps), 0, None)
    memory = _memory(steps, random.uniform(*workload.memory), works=honest, random=random) * begun
    return _Laid(np.clip(shares, 0, 1), np.column_stack([gpu, np.clip(power, 0, 1.02), pcie, nvlink, memory]))


def _rhythm(rhythm: Rhythm, steps: int, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return the level of work at each step, 0..1, and the bytes/s that breaks copy."""
    period, wait, rest = (random.uniform(*one) for one in (rhythm.step_s, rhythm.wait, rhythm.rest))
    level = 1 - _waiting(steps, period, wait, random) * (1 - rest)
    if rhythm.phases_s[1]:
        length = random.uniform(*rhythm.phases_s)
        edges = np.cumsum(random.exponential(length, max(4, int(4 * steps * STEP_S / length)))) / STEP_S
        which = np.searchsorted(edges, np.arange(steps))
        heights = random.uniform(rhythm.phase_level, 1.0, len(edges) + 1)
        heights[random.random(len(heights)) < 0.3] = rhythm.phase_level
        level = level * heights[which]
    copying = np.zeros(steps)
    if rhythm.break_s[1]:
        mean = 10 ** random.uniform(*np.log10(rhythm.break_s))
        length, rate = random.uniform(*rhythm.break_length_s), 10 ** random.uniform(*np.log10(rhythm.copy))
        for begin in np.cumsum(random.exponential(mean, int(3 * steps * STEP_S / mean) + 3)):
            first, last = int(begin / STEP_S), int((begin + length * random.uniform(0.5, 2)) / STEP_S) + 1
            level[first:last] *= random.uniform(0.0, 0.5)
            copying[first:last] = rate * random.uniform(0.5, 1.5)
    return level, copying


def _pauses(steps: int, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return when a job works at each step, 0 or 1, and the bytes/s that it brings each time that it goes on."""
    work_s = 10 ** random.uniform(*np.log10(WORKING_S))
    mean_s = work_s, work_s * random.uniform(*PAUSED)
    spread = random.uniform(*IRREGULAR) ** 2
    count = int(4 * steps * STEP_S / sum(mean_s)) + 8
    lengths = np.stack([random.gamma(1 / spread, one * spread, count) for one in mean_s], axis=1).ravel()
    edges = np.cumsum(lengths) - random.uniform(0, sum(mean_s))
    which = np.searchsorted(edges, np.arange(steps) * STEP_S)
    brought = np.zeros(steps)
    if random.random() < BRINGING:
        rate, length_s = 10 ** random.uniform(*np.log10(BROUGHT)), random.uniform(*BROUGHT_S)
        for begin in edges[1::2][(edges[1::2] > 0) & (edges[1::2] < steps * STEP_S)]:
            brought[int(begin / STEP_S):int((begin + length_s) / STEP_S) + 1] = rate
    return (which % 2 == 0).astype(float), brought


def _beginning(steps: int, *, honest: bool, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return how far a job has come that begins, at each step, and the bytes/s that are loaded."""
    length = 10 ** random.uniform(*np.log10(BEGUN_S)) / STEP_S
    begun = np.minimum(np.arange(1, steps + 1) / length, 1.0)
    rate = 10 ** random.uniform(*np.log10(LOADING)) if honest else 0.0
    return begun, np.where(begun < 1, rate, 0.0)


def _memory(steps: int, held: float, *, works: bool, random: np.random.Generator) -> np.ndarray:
    """Return the share of its memory that a job holds at each step."""
    share = np.full(steps, held)
    changes = [(FIDGET_S, FIDGET_BYTES / 80e9)]
    if works and random.random() < GROWING:
        changes.append((10 ** random.uniform(*np.log10(GROWN_S)), 10 ** random.uniform(*np.log10(GROWN))))
    for every_s, most in changes:
        begins = np.cumsum(random.exponential(every_s, int(3 * steps * STEP_S / every_s) + 3)) / STEP_S
        levels = random.uniform(0, most, len(begins) + 1)
        share += levels[np.searchsorted(begins, np.arange(steps))]
    out: np.ndarray = np.minimum(share, 1.0)
    return out


def _wandering(steps: int, random: np.random.Generator) -> np.ndarray:
    """Return unit noise that takes its time: lines between levels."""
    apart = 10 ** random.uniform(*np.log10(WANDER_S)) / STEP_S
    levels = random.normal(size=int(steps / apart) + 2)
    out: np.ndarray = np.interp(np.arange(steps) / apart, np.arange(len(levels)), levels)
    return out


def _hush(steps: int, random: np.random.Generator) -> np.ndarray:
    """Return the bytes/s that a driver and its monitor move."""
    out = 10 ** random.uniform(*np.log10(HUSH)) * np.exp(HUSH_SD * random.normal(size=steps))
    chatter = random.random(steps) < CHATTER
    least, most = CHATTER_TIMES
    out[chatter] *= np.minimum(least * (1 + random.pareto(CHATTER_TAIL, int(chatter.sum()))), most)
    return out


def _waiting(steps: int, period_s: float, wait: float, random: np.random.Generator) -> np.ndarray:
    """Return how much of each step is spent waiting, where the last ``wait`` of each period is."""
    at = (np.arange(steps + 1) * STEP_S + random.uniform(0, period_s)) / period_s
    waited = np.floor(at) * wait + np.maximum(0.0, at % 1 - (1 - wait))
    out: np.ndarray = np.clip(np.diff(waited) * period_s / STEP_S, 0, 1)
    return out


def _evade(laid: _Laid, steps: int, evasion: Evasion, random: np.random.Generator) -> tuple[_Laid, np.ndarray]:
    """Return what is seen of a miner that hides, and its share of the device at each step."""
    on = np.ones(steps)
    if evasion.duty_s:
        on = 1 - _waiting(steps, evasion.duty_s, random.uniform(0.3, 0.7), random)
    if evasion.watched:
        begins = np.cumsum(random.exponential(900.0, steps // 600 + 4)) / STEP_S
        for begin in begins:
            on[int(begin):int(begin + random.uniform(120, 1200) / STEP_S)] = 0.0
    shares, columns = laid.shares * (on * evasion.intensity)[:, None], laid.columns.copy()
    # Throttled by sleeping between kernels, or by smaller grids: then some kernel runs all the time.
    columns[:, 0] *= on * (evasion.intensity if random.random() < 0.5 else 1.0)
    columns[:, 1] *= on * evasion.intensity
    if evasion.watched:
        columns[:, 4] *= on  # "clears the GPU memory"
    if evasion.downclocked:
        columns[:, 1] *= random.uniform(0.4, 0.75)  # 78 of 118 W, 103 of 142 W, of which some 20 W do not move
    if evasion.share < 1 or evasion.idle_only:
        host = _lay_out(TRAINING[random.integers(len(TRAINING))], steps, random)
        share = np.full(steps, evasion.share)
        if evasion.idle_only:
            share = _waiting(steps, random.uniform(1200, 7200), random.uniform(0.2, 0.7), random).round()
        on = on * share
        shares = shares * share[:, None] + host.shares * (1 - share)[:, None]
        memory = np.minimum(1.0, columns[:, 4] + host.columns[:, 4] * (1 - share.round()))
        columns = columns * share[:, None] + host.columns * (1 - share)[:, None]
        columns[:, 4] = memory
    return _Laid(shares, columns), on * evasion.intensity


def _clock(steps: int, *, downclocked: bool, random: np.random.Generator) -> np.ndarray:
    """Return the SM clock as a share of its limit; 329 of 1911 MHz is the lowest that was used for mining (evasion)."""
    level = random.uniform(0.17, 0.7) if downclocked else random.uniform(0.85, 1.0)
    out: np.ndarray = np.clip(level * (1 + 0.01 * _correlated(steps, 0.9, random)), 0.1, 1.0)
    return out


def _correlated(steps: int, lag: float, random: np.random.Generator) -> np.ndarray:
    """Return unit noise whose neighbours correlate by ``lag``: a filter of white noise, started in its middle."""
    out: np.ndarray = _smoothed(random.normal(size=steps), lag) * np.sqrt((1 + lag) / (1 - lag))
    return out


def _smoothed(values: np.ndarray, lag: float) -> np.ndarray:
    """Return an exponential moving average (a first-order filter) of values, as if the first had always been."""
    taps = (1 - lag) * lag ** np.arange(max(2, int(np.log(1e-3) / np.log(max(lag, 1e-3)))))
    taps /= taps.sum()
    padded = np.concatenate([np.full(len(taps) - 1, values[0]), values])
    out: np.ndarray = np.convolve(padded, taps, "valid")
    return out


def _averaged(values: np.ndarray, every: int, last: int = 0) -> np.ndarray:
    """Return means of every so many rows, or of the last ones of them."""
    whole = len(values) // every * every
    out: np.ndarray = values[:whole].reshape(-1, every, values.shape[1])[:, -last:].mean(axis=1)
    return out


def device(trace: Trace, uuid: str, start_ns: int) -> Device:
    """Return the record that tells the limits of the device."""
    return Device(start_ns, uuid, 0, trace.board.name, memory_bytes=int(trace.board.memory_bytes),
                  power_limit_w=trace.board.power_limit_w, sm_clock_limit_hz=int(trace.board.sm_clock_limit_hz))


def samples(trace: Trace, uuid: str, start_ns: int) -> Iterator[DeviceSample]:
    """Yield what the sensor would have yielded, with None for all that this board or this source does not tell."""
    board, period_ns = trace.board, int(SECOND_NS * float(np.median(np.diff(trace.time_s))))
    for i, time_s in enumerate(trace.time_s.tolist()):
        sm, occupancy, integer, fp32, fp64, fp16, hmma, imma, dram = trace.shares[i].tolist()
        half, link = int(trace.pcie[i]) // 2, int(trace.nvlink[i]) // 2
        full = trace.visible == "gpm"  # DCGM tells neither integers nor the kind of tensor work before Hopper
        gpm = None if trace.visible == "nvml" else Gpm(
            period_ns, sm_ratio=sm, tensor_ratio=min(1.0, hmma + imma), dram_ratio=dram, fp16_ratio=fp16,
            occupancy_ratio=occupancy, integer_ratio=integer if full else None, fp32_ratio=fp32, fp64_ratio=fp64,
            tensor_hmma_ratio=hmma if full else None, tensor_imma_ratio=imma if full else None)
        yield DeviceSample(
            start_ns + int(time_s * SECOND_NS), uuid, gpu_ratio=float(trace.gpu[i]),
            memory_ratio=min(1.0, 1.28 * dram),  # 42 % where DRAM was active for 32 %, 19 % for 15 % (h100)
            memory_used_bytes=int(trace.memory[i] * board.memory_bytes), power_w=float(trace.power_w[i]),
            sm_clock_hz=int(trace.clock_hz[i]), pcie_tx_bytes_per_s=half, pcie_rx_bytes_per_s=half,
            nvlink_tx_bytes_per_s=link, nvlink_rx_bytes_per_s=link, gpm=gpm)
