"""Mining, from what a process launches: the names and the code of its kernels, and the shape of its launches.

Benign look-alikes first, as measured on the training traces of HTA, PARAM and Kineto, one-second windows: 13 to 194
distinct kernels in every window with more than three launches; the poorest (a linear layer alone) has 16, and runs them
at 9 sizes. A decoder that replays one graph shows one handle at a steady beat: what a graph holds cannot be seen, so it
weighs nothing. What keeps a GPU awake or probes it is steady too, and of a few threads: no search. A one-kernel
simulation or benchmark loop is, in launches, the same thing as a miner: launches alone therefore end at
`STRUCTURE_NATS`, below suspect, whatever they do and however long. What separates the two is the code, the network,
the counters and the tool call, each its own detector or class.

Evidence of class launch: a window of launches as `signatures/steady_search.toml` describes it, until the sum reaches
its bound; the bound is wider where the kernel that makes most of the launches bears a miner's name, since a miner's
test program has the name but not the beat. Windows of another kind take it back, and training-like ones (many kernels
at many sizes, or collectives of a collective's shape) take more, within `COUNTER_NATS`: a process that trains and
mines is not cleared by its training. Many kernels at one size are a chain of hashes, or a solver on one mesh: of no
known kind.

Evidence of class code: a launched kernel's name, and the digest of loaded code. All of it once each. Names and digests
of programs that search passwords or keys are told under a label of their own: they hash as miners do, and may be
lawful.

Windows are closed by the time of blocks, so a recording cut elsewhere is judged alike.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import numpy as np
from msgspec import Struct, field

from gpuguard.core.bounded import BoundedTable
from gpuguard.core.evidence import Evidence
from gpuguard.core.launching import launchers
from gpuguard.core.records import LAUNCH_APIS, KernelName, Launches, ModuleImage, ProcessExited, Tick
from gpuguard.core.signatures import MATURITY_NATS, Signature, Window
from gpuguard.core.subjects import ProcessId
from gpuguard.kernels import launches as kernels

if TYPE_CHECKING:
    from gpuguard.core.host import Host
    from gpuguard.core.observations import Observation
    from gpuguard.core.records import Block

SUBMISSION = LAUNCH_APIS.index("vkQueueSubmit")
ENQUEUE = LAUNCH_APIS.index("clEnqueueNDRangeKernel")

SECOND_NS = 1_000_000_000
WINDOW_NS = SECOND_NS
#: A window with fewer launches than this is kept open, to be judged with what follows, up to `WINDOW_MAX_NS`.
LAUNCHES_MIN = 8
WINDOW_MAX_NS = 16 * SECOND_NS
#: Rows come at most one interval after the launches in them.
LATE_NS = 300_000_000
ENDED_KEPT_NS = 60 * SECOND_NS

#: ln(250): one process in 250 that does not mine launches one kernel steadily, see signatures/steady_search.toml.
STRUCTURE_NATS = 5.5
#: With a miner's name on that kernel: a test program of a miner has the name, and in one case of twelve the beat too.
NAMED_STRUCTURE_NATS = 8.0
NAMED_FACTOR = NAMED_STRUCTURE_NATS / STRUCTURE_NATS
#: A second kernel name of the same family says little that the first did not.
FURTHER_NAME_NATS = 1.0
LABELS = ("mining", "cracking")

#: Miners seen so far launch at most a handful of kernels; training has at least 13 in every window measured.
TRAINING_KERNELS_MIN = 12
TRAINING_LAUNCHES_MIN = 40
#: A step is made again and again: of what is launched once each, nobody knows what it is.
TRAINING_REPEATS_MIN = 2
#: A step works on tensors of many sizes: 9 numbers of threads in the poorest window measured (a linear layer alone),
#: 27 and more in whole models. A chain of hashes (X11, X16R) hands one batch of nonces from kernel to kernel: one
#: number of threads, or two or three where a stage takes four lanes a nonce, and where the results are looked through.
TRAINING_SIZES_MIN = 5
#: NCCL gives a collective one block for each channel, and has this many at most (NVIDIA/nccl, src/include/device.h).
COLLECTIVE_BLOCKS_MAX = 64
COUNTER_WINDOW_NATS = -1.5
COUNTER_NATS = -6.0
OTHER_WINDOW_NATS = -0.6
#: One miner in twenty launches so many kernels of so many sizes at once, nearly all training does: ln(20) = 3, once.
FIRST_TRAINING_NATS = 3.0
TRAINING_NATS = 1.0
TRAINING_NATS_MAX = 6.0

PROCESSES_MAX = 8_192
ROWS_PER_WINDOW_MAX = 16_384
#: Of what signatures know: whoever has more of it weighs no more.
IMAGES_MAX = NAMES_MAX = 256

_LAUNCH_BLIND = (
    "graph replays hide their kernels",
    "a miner that launches many kernels beside its own, varies its grid, or launches at random times",
    "launches made before the probe was placed",
)
_CODE_BLIND = ("a renamed kernel or rebuilt code is not known", "a miner's own tests, or a copy under study")


class Standing(Struct):
    """One process: its open window, and what was said of it so far."""

    process: ProcessId
    window_start_ns: int = 0
    taken_ns: int = 0
    ended_ns: int = 0
    rows: list[np.ndarray] = field(default_factory=list)
    row_count: int = 0
    structure_nats: float = 0.0
    counter_nats: float = 0.0
    training_nats: float = 0.0
    code_nats: dict[str, float] = field(default_factory=dict)
    named: dict[int, str] = field(default_factory=dict)
    judged_names: set[str] = field(default_factory=set)
    images: set[str] = field(default_factory=set)


class Detector:
    """See the head of this file."""

    takes = (Launches, Tick, ModuleImage, KernelName, ProcessExited)

    def __init__(self) -> None:
        self._by_kind: dict[str, list[Signature]] = {}
        self._standings: BoundedTable[tuple[int, int], Standing] = BoundedTable(PROCESSES_MAX)
        self._cut = 0
        self.learn(())

    def learn(self, signatures: tuple[Signature, ...]) -> None:
        """Look for these from now on; without any, only what does not mine is told."""
        known = [one for one in signatures if one.label in LABELS]
        self._by_kind = {
            kind: [one for one in known if one.kind == kind]
            for kind in ("kernel-name", "code-sha256", "launch-structure")
        }

    def evicted(self) -> dict[str, int]:
        """Return how much was forgotten because a table was full, by what it was."""
        return {"processes whose launches are judged": self._standings.evicted, "rows of launches": self._cut}

    def receive(self, item: Block | Observation, host: Host) -> list[Evidence]:
        """Return what this item adds."""
        evidence = self._close_windows(item.time_ns, host) if isinstance(item, Launches | Tick) else []
        match item:
            case Launches():
                evidence += self._take(item, host)
            case ModuleImage():
                evidence += self._judge_image(item)
            case KernelName() if item.code_sha256:
                evidence += self._judge_image(item)
            case ProcessExited():
                # Its last rows may come after its end, and must not find a standing that begins anew.
                standing = self._standings.get((item.process.pid, item.process.start_ticks))
                if standing:
                    standing.ended_ns = item.time_ns
            case _:
                pass
        return evidence

    # -- launches -----------------------------------------------------------------------------------------------------

    def _take(self, block: Launches, host: Host) -> list[Evidence]:
        # A renderer submits frames through one queue at one beat: that is no kernel, and says nothing.
        rows = block.rows[block.rows["api"] != SUBMISSION]
        for pid, start_ticks in launchers(rows):
            own = rows[(rows["pid"] == pid) & (rows["start_ticks"] == start_ticks)]
            standing = self._standing(pid, start_ticks, host)
            first_ns = int(own["first_ns"].min())
            standing.window_start_ns = min(standing.window_start_ns, first_ns) if standing.rows else first_ns
            room = ROWS_PER_WINDOW_MAX - standing.row_count
            self._cut += max(0, len(own) - room)
            own = own[:room]
            standing.rows.append(own)
            standing.row_count += len(own)
            standing.taken_ns = block.time_ns
        # Row by row, so that a block cut in two gives the same evidence in the same order.
        evidence: list[Evidence] = []
        columns = (rows[name].tolist() for name in ("pid", "start_ticks", "kernel"))
        for pid, start_ticks, kernel in dict.fromkeys(zip(*columns, strict=True)):
            evidence += self._judge_name(self._standing(pid, start_ticks, host), kernel, block.time_ns, host)
        return evidence

    def _standing(self, pid: int, start_ticks: int, host: Host) -> Standing:
        standing = self._standings.get((pid, start_ticks))
        if standing is None:
            standing = Standing(process=host.processes.named(pid, start_ticks))
            self._standings[pid, start_ticks] = standing
        return standing

    def _close_windows(self, now_ns: int, host: Host) -> list[Evidence]:
        evidence: list[Evidence] = []
        for standing in self._standings.values():
            age_ns = now_ns - LATE_NS - standing.window_start_ns
            ended = bool(standing.ended_ns) and now_ns - standing.ended_ns > WINDOW_NS
            if ended and now_ns - standing.ended_ns > ENDED_KEPT_NS:
                self._standings.pop((standing.process.pid, standing.process.start_ticks))
            # A block may come in pieces: not before a later one is its window whole.
            if not standing.rows or now_ns <= standing.taken_ns or (age_ns < WINDOW_NS and not ended):
                continue
            launches = sum(int(rows["launches"].sum()) for rows in standing.rows)
            if launches >= LAUNCHES_MIN or age_ns >= WINDOW_MAX_NS or ended:
                evidence += self._judge(standing, now_ns, host)
        return evidence

    def _judge(self, standing: Standing, now_ns: int, host: Host) -> list[Evidence]:
        """Close the open window and weigh it."""
        rows = np.concatenate(standing.rows)
        standing.rows, standing.row_count = [], 0
        feature = kernels.features(rows)[0][0]
        threads = _threads(rows)
        window = msgspec.structs.replace(window_of(feature), threads=int(threads.max()) or None)
        names = self._names(standing.process, rows, host)
        start_ns = min(standing.window_start_ns, int(feature["first_ns"]))
        if window.graph_ratio > 0.5:
            return []
        matched = next((one for one in self._by_kind["launch-structure"] if one.matches_window(window)), None)
        collectives = _collectives(rows, names)
        # A collective now and then beside the beat of a search is somebody's fig leaf, or a solver's halo exchange.
        beside_a_search = matched is not None and _top_kernel(rows) not in collectives
        if (collectives and not beside_a_search) or _is_training(window, threads):
            return self._training(standing, window, len(collectives), start_ns, now_ns)
        if matched:
            return self._steady(standing, matched, window, rows, start_ns, now_ns)
        if window.launches < LAUNCHES_MIN:
            return []
        return self._take_back(standing, OTHER_WINDOW_NATS, "launch-other", start_ns, now_ns, (
            f"{window.launches} launches of {window.kernels} kernels at {window.geometries} geometries, "
            f"{window.cadence_ratio:.0%} of the gaps alike: not the beat of a search"))

    def _steady(
        self, standing: Standing, matched: Signature, window: Window, rows: np.ndarray, start_ns: int, now_ns: int,
    ) -> list[Evidence]:
        top = _top_kernel(rows)
        name = standing.named.get(top, "")
        bound = NAMED_STRUCTURE_NATS if name else STRUCTURE_NATS
        bound = min(bound, MATURITY_NATS[matched.maturity])
        nats = min(matched.nats * (NAMED_FACTOR if name else 1.0), bound - standing.structure_nats)
        if nats <= 1e-9:
            return []
        standing.structure_nats += nats
        grid = "x".join(str(n) for n in rows[rows["kernel"] == top][0]["grid"].tolist())
        text = (
            f"{window.launches_per_s:.1f} launches/s of {window.kernels} kernel{'s' if window.kernels > 1 else ''}"
            f"{f' ({name})' if name else ''}, grid {grid}, {window.cadence_ratio:.0%} of the gaps alike")
        return [Evidence(now_ns, standing.process, "mining", "launch", "launch-steady-search", nats, text, start_ns,
                         blind_spots=_LAUNCH_BLIND)]

    def _training(
        self, standing: Standing, window: Window, collectives: int, start_ns: int, now_ns: int,
    ) -> list[Evidence]:
        text = (f"{window.kernels} distinct kernels at {window.geometries} geometries in {window.launches} launches"
                f"{f', {collectives} of them collectives' if collectives else ''}")
        evidence = self._take_back(standing, COUNTER_WINDOW_NATS, "launch-training-like", start_ns, now_ns, text)
        once = TRAINING_NATS if standing.training_nats else FIRST_TRAINING_NATS
        nats = min(once, TRAINING_NATS_MAX - standing.training_nats)
        if nats > 0:
            standing.training_nats += nats
            evidence.append(Evidence(now_ns, standing.process, "training", "launch", "launch-training-like", nats, text,
                                     start_ns, blind_spots=("a miner that launches training kernels beside its own",)))
        return evidence

    def _take_back(
        self, standing: Standing, nats: float, kind: str, start_ns: int, now_ns: int, text: str,
    ) -> list[Evidence]:
        """Take back what the structure said before, and from a training-like window somewhat more, within a bound."""
        back = -min(-nats, standing.structure_nats)
        beyond = max(nats - back, COUNTER_NATS - standing.counter_nats) if kind == "launch-training-like" else 0.0
        if back + beyond > -1e-9:
            return []
        standing.structure_nats += back
        standing.counter_nats += beyond
        return [Evidence(now_ns, standing.process, "mining", "launch", kind, back + beyond, text, start_ns)]

    # -- code ---------------------------------------------------------------------------------------------------------

    def _judge_name(self, standing: Standing, kernel: int, now_ns: int, host: Host) -> list[Evidence]:
        """Weigh the name of a kernel that was launched; a name that was only looked up did nothing."""
        known = host.kernel_name(standing.process, kernel)
        if known is None or standing.named.get(kernel) == known.name:
            return []
        matched = next((one for one in self._by_kind["kernel-name"] if one.matches_name(known.name)), None)
        if matched is None:
            standing.named.pop(kernel, None)
            return []
        if len(standing.named) >= NAMES_MAX or len(standing.judged_names) >= NAMES_MAX:
            return []
        if matched.label == "mining":
            standing.named[kernel] = known.name
        if known.name in standing.judged_names:
            return []
        standing.judged_names.add(known.name)
        text = f"launches the kernel {known.name[:120]}, as in public programs of this kind: {matched.family}"
        nats = FURTHER_NAME_NATS if standing.code_nats.get(matched.label) else matched.nats
        return self._code(standing, matched, nats, "code-kernel-name", text, now_ns, known.time_ns)

    def _judge_image(self, item: ModuleImage | KernelName) -> list[Evidence]:
        digest = item.sha256 if isinstance(item, ModuleImage) else item.code_sha256
        matched = next((one for one in self._by_kind["code-sha256"] if digest in one.match.sha256), None)
        if matched is None:
            return []
        key = (item.process.pid, item.process.start_ticks)
        standing = self._standings.get(key) or Standing(process=item.process)
        self._standings[key] = standing
        if digest in standing.images or len(standing.images) >= IMAGES_MAX:
            return []
        standing.images.add(digest)
        text = f"loaded GPU code {digest[:16]}..., known as {matched.family}"
        return self._code(standing, matched, matched.nats, "code-known-image", text, item.time_ns, item.time_ns)

    def _code(
        self, standing: Standing, matched: Signature, nats: float, kind: str, text: str, now_ns: int, start_ns: int,
    ) -> list[Evidence]:
        held = standing.code_nats.get(matched.label, 0.0)
        nats = min(nats, MATURITY_NATS[matched.maturity] - held)
        if matched.maturity == "experimental":
            nats, text = 0.0, f"{text} (experimental: it weighs nothing)"
        elif nats <= 0:
            return []
        standing.code_nats[matched.label] = held + nats
        return [Evidence(now_ns, standing.process, matched.label, "code", kind, nats, text, min(start_ns, now_ns),
                         blind_spots=_CODE_BLIND)]

    def _names(self, process: ProcessId, rows: np.ndarray, host: Host) -> dict[int, str]:
        found = ((kernel, host.kernel_name(process, kernel)) for kernel in sorted(set(rows["kernel"].tolist())))
        return {kernel: known.name for kernel, known in found if known}


def window_of(feature: np.void) -> Window:
    """Return the features of one process as signatures read them; a window counts as a second at least."""
    span_s = max(int(feature["last_ns"]) - int(feature["first_ns"]), SECOND_NS) / SECOND_NS
    return Window(
        launches=int(feature["launches"]),
        launches_per_s=int(feature["launches"]) / span_s,
        kernels=int(feature["kernels"]),
        geometries=int(feature["geometries"]),
        cadence_ratio=float(feature["cadence_ratio"]),
        graph_ratio=float(feature["graph_ratio"]),
    )


def _threads(rows: np.ndarray) -> np.ndarray:
    """Return how many threads a launch of each row has, 0 where that was not told."""
    blocks = np.prod(rows["grid"], axis=1, dtype=np.float64)
    # OpenCL counts work-items where CUDA counts blocks, and may leave their grouping to the driver.
    of_a_block = np.where(rows["api"] == ENQUEUE, 1.0, np.prod(rows["block"], axis=1, dtype=np.float64))
    threads: np.ndarray = blocks * of_a_block
    return threads


def _is_training(window: Window, threads: np.ndarray) -> bool:
    """Return whether many kernels are launched again and again, at sizes as various as those of tensors."""
    return (
        window.launches >= TRAINING_LAUNCHES_MIN
        and window.kernels >= TRAINING_KERNELS_MIN
        and window.launches >= TRAINING_REPEATS_MIN * window.kernels
        and len(np.unique(threads)) >= TRAINING_SIZES_MIN)


def _collectives(rows: np.ndarray, names: dict[int, str]) -> set[int]:
    """Return which kernels are collectives, by name and by shape: whoever compiles chooses the name."""
    large = set(rows["kernel"][np.prod(rows["grid"], axis=1, dtype=np.float64) > COLLECTIVE_BLOCKS_MAX].tolist())
    return {kernel for kernel, name in names.items() if name.startswith("nccl") and kernel not in large}


def _top_kernel(rows: np.ndarray) -> int:
    """Return the handle with most launches, the lowest of equals."""
    handles, inverse = np.unique(rows["kernel"], return_inverse=True)
    return int(handles[np.argmax(np.bincount(inverse.reshape(-1), weights=rows["launches"].astype(np.float64)))])
