"""Mining by counters alone: what a GPU does, look by look, added up until it is past chance; suspect at most.

Ordinary CUDA work looks like mining to counters. Of 20 common CUDA programs measured on a V100 (NV-DVFS set), 19 keep
the SMs at 0.7 and above and none uses a tensor core. So levels decide nothing here: a forest weighs the mix and the
rhythm of each look (`core.counter_features`, `core.counter_classes`), with whatever the board tells, and weighs little
where it tells little.

A sequential test adds the looks up, S = max(0, S + w - allowance), one sum for each job. Samples of one look are one
observation (real power at 10 Hz has a lag-1 autocorrelation of up to 0.99, worth one in 200 samples). Looks of one job
are alike because the job goes on, so their sum says no more than what the job is like: it is shrunk to the *height* of
the job, S / (n + shrinkage), which does not grow with time, and a height is worth what the share of honest jobs that
come as high says (`core.counter_jobs`). The job, not the look, is the unit: a job is suspect from the height on that so
few honest jobs of a year reach, by those replayed, as the stated rate allows.

That holds for programs like those that were replayed, and not for one that nobody measured and that looks just like a
search: why reaching the limit is told as `CAP_NATS`, which is suspect and no more, and what is below it as `NEAR_NATS`
at most. With the code or the name of a miner beside it that is enough to confirm; with launches that only beat like a
search it is not.

Grounds for innocence count as well: looks that are unlike mining (collectives over NVLink, half-precision tensor work
in steps, copies and checkpoints) take the sum down, then take from what other eyes hold, down to `FLOOR_NATS` and
once, and name the work. Idle looks say nothing either way: who pauses is not cleared, and who mines when idle is
still added up.

Whose look it is: the process's that has the device to itself. Where several hold it, the busiest pipe is shared out
with the bounds of `core.attribution`, by SM time and by launches where both are known; a process is the subject when
its lower bound alone is `OWN_RATIO` of that work, be it that the others did all that they had time for. Else, where
nobody is told of, and where the owner has exited, it is the device, and the evidence names the candidates with their
bounds: a miner that takes a third of the time beside a trainer is not told apart from it by counters, and a wrong name
is worse than none. So one that starts anew all the time is added up on the device.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from msgspec import Struct, field

from gpuguard.core import counter_features as cf
from gpuguard.core.attribution import ALONE_ERROR, Part, Tenant, attribute, time_shares
from gpuguard.core.bounded import BoundedTable
from gpuguard.core.counter_classes import MINING, Model
from gpuguard.core.counter_jobs import MEMORY, NONE_SEEN, SHRINK, Honest, Limit, highest
from gpuguard.core.evidence import Evidence
from gpuguard.core.records import DeviceSample, Gap, Launches, ProcessExited, ProcessSample
from gpuguard.core.subjects import DeviceId, ProcessId

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gpuguard.core.host import Host
    from gpuguard.core.observations import Observation
    from gpuguard.core.records import Block, Device

SECOND_NS = 1_000_000_000
LOOK_NS = int(cf.LOOK_S * SECOND_NS)
#: A look needs this many samples, be it that it takes longer; samples that come faster than 25 Hz are passed over.
SAMPLES_MIN, APART_MIN_NS = 8, SECOND_NS // 25
#: Samples further apart than this are no look at what was between them.
APART_MAX_NS = 120 * SECOND_NS

#: The fusion layer says suspect at 6 nats. Below its limit a job stays so low that a launch eye which sees nothing (1.5
#: nats) does not make a suspect of it.
CAP_NATS, NEAR_NATS, FLOOR_NATS = 6.25, 4.4, -2.0
#: One look unlike mining takes this share of its weight from what others hold.
INNOCENT_SHARE = 0.1
#: A look names what is no mining by this much, when the forest gives it this probability; `fusion.NAMED_NATS` is 3.
NAMED_NATS, NAMED_NATS_MAX, NAMED_PROBABILITY = 0.5, 3.0, 0.85
#: Less is not worth an event.
TOLD_NATS = 0.5
#: A process owns a look when so much of the busiest pipe is its own for certain.
OWN_RATIO = 0.75
#: The pipes, in words; where none is told, the time in which anything ran at all.
PIPES = {"integer": "integer work", "fp32": "FP32 work", "fp64": "FP64 work", "fp16": "FP16 work",
         "tensor": "tensor work", "dram": "DRAM traffic", "gpu": "busy time"}
#: The SM time of a process that was told of in fewer of its samples is not known.
TOLD_RATIO = 0.9
CANDIDATES_SHOWN = 4
#: A kernel runs on one SM at least, and no GPU has as many: where NVML saw kernels for this share of a look and less
#: than one SM in so many was active meanwhile, one of both does not look.
SMS_MAX, RAN_RATIO = 256, 0.5
AT_ODDS = "no SM was active while kernels ran: one of both counters does not look, and such looks are unknown"

DEVICES_MAX = 256
SUBJECTS_MAX = 4_096
PROCESSES_PER_DEVICE_MAX = 256

BLIND_SPOTS = (
    "ordinary CUDA programs can look the same; measured only on simulated mining",
    "mining at a small share of a busy GPU, or inside real tensor work, does not look like this",
)


class Look(Struct, frozen=True):
    """What became of one window of readings. ``means`` and ``most`` are by `counter_features.CHANNELS`.

    ``parts`` is what each process did of ``pipe``, the busiest; ``owner`` is the one that did it, if that is certain.
    """

    start_ns: int
    end_ns: int
    at_work: bool
    nats: float
    probabilities: tuple[float, ...]
    means: tuple[float, ...]
    most: tuple[float, ...]
    power_variation: float
    pipe: str = "gpu"
    parts: dict[ProcessId | None, Part | None] = {}
    owner: ProcessId | None = None

    def mean(self, name: str) -> float:
        """Return the mean of a channel, NaN where it was not told."""
        return self.means[cf.CHANNELS.index(name)]

    def tells(self, *names: str) -> bool:
        """Return whether any of these channels was told."""
        return not all(math.isnan(self.mean(name)) for name in names)

    @property
    def at_odds(self) -> bool:
        """Whether kernels ran, by NVML, and yet no SM was active: it is no idle look either."""
        return self.mean("gpu") >= RAN_RATIO and self.mean("sm") * SMS_MAX < self.mean("gpu")


class Held(Struct):
    """One process on one device since the last look: its samples, and what those that told of SM time add up to."""

    launched_before: int | None
    samples: int = 0
    told: int = 0
    sm: float = 0.0

    def take(self, sm_ratio: float | None) -> None:
        """Take one sample."""
        self.samples += 1
        if sm_ratio is not None:
            self.told += 1
            self.sm += sm_ratio

    def tenant(self, launched: int | None) -> Tenant:
        """Return what is known of it for the whole look, given its launches so far."""
        sm_ratio = self.sm / self.told if self.told and self.told >= TOLD_RATIO * self.samples else None
        if launched is None or self.launched_before is None or launched < self.launched_before:
            return Tenant(sm_ratio)  # not seen to launch before the look, or forgotten since
        return Tenant(sm_ratio, launched - self.launched_before)


class Watch:
    """Readings of one device since the last look, its past, and who used it."""

    def __init__(self) -> None:
        self.readings: list[tuple[float | None, ...]] = []
        self.start_ns = self.last_ns = 0
        self.held: dict[ProcessId, Held] = {}
        self.owner: ProcessId | None = None
        self.past = cf.no_history()
        self.told_at_odds = False

    def due(self, time_ns: int) -> bool:
        """Return whether the look is over when the next sample comes now."""
        return len(self.readings) >= SAMPLES_MIN and time_ns - self.start_ns >= LOOK_NS

    def add(self, time_ns: int, reading: tuple[float | None, ...]) -> None:
        """Take one reading. What was begun before a hole, or before the clock was set back, is dropped."""
        if self.readings and not 0 <= time_ns - self.last_ns <= APART_MAX_NS:
            self._begin_anew()
        if not self.readings:
            self.start_ns = time_ns
        elif time_ns - self.last_ns < APART_MIN_NS:
            return
        self.readings.append(reading)
        self.last_ns = time_ns

    def look(self, model: Model, device: Device | None, tenants: dict[ProcessId | None, Tenant]) -> Look:
        """Weigh what was read since the last look, by those who held the device."""
        statistics = cf.summarised(cf.channels(self.readings, device.memory_bytes if device else None)[None])
        mean, most = (statistics[cf.STATISTICS.index(name), 0].tolist() for name in ("mean", "max"))
        pipe, parts, owner = shared_out(dict(zip(cf.CHANNELS, mean, strict=True)), tenants)
        if owner is not None and owner != self.owner:
            self.owner, self.past = owner, cf.no_history()
        limit = np.array([device.power_limit_w if device and device.power_limit_w is not None else math.nan])
        features, at_work, self.past = cf.look(statistics, limit, self.past)
        nats, probabilities = model.judge(features) if at_work[0] else (np.zeros(1), np.zeros((1, len(model.classes))))
        power = float(features[0, cf.FEATURES.index("power_variation")])
        out = Look(self.start_ns, self.last_ns, bool(at_work[0]), float(nats[0]), tuple(probabilities[0].tolist()),
                   tuple(mean), tuple(most), power, pipe, parts, owner)
        self._begin_anew()
        return out

    def _begin_anew(self) -> None:
        self.readings = []
        self.held = {}


def shared_out(
    mean: dict[str, float], tenants: dict[ProcessId | None, Tenant],
) -> tuple[str, dict[ProcessId | None, Part | None], ProcessId | None]:
    """Return the busiest pipe of a look, what each process did of it, and whose it is, None where that is not certain.

    ``tenants`` is changed where the device was busier than all of them: somebody computes of whom nobody told.
    """
    pipe = max((name for name in PIPES if name != "gpu" and mean[name] > 0), key=mean.__getitem__, default="gpu")
    busy = None if math.isnan(mean["gpu"]) else mean["gpu"]
    told = [one.sm_ratio for one in tenants.values()]
    if len(told) > 1 and None not in told and (busy or 0.0) - sum(one or 0.0 for one in told) > ALONE_ERROR:
        tenants[None] = Tenant()
    parts = attribute(mean[pipe], time_shares(tenants, gpu_ratio=busy))
    for process, part in parts.items():
        if process is not None and (len(tenants) == 1 or (part and part.low >= OWN_RATIO * mean[pipe] > 0)):
            return pipe, parts, process
    return pipe, parts, None


class Level(Struct):
    """How one subject stands on one device: the sum, what speaks for it, and since when."""

    start_ns: int
    nats: float = 0.0
    innocent_nats: float = 0.0
    looks: int = 0
    like_mining: float = 0.0

    @property
    def height(self) -> float:
        """What the job's looks are worth in the long run, as far as seen: see `core.counter_jobs`."""
        return self.nats / (self.looks + SHRINK)

    def take(self, look: Look, allowance: float) -> None:
        """Add one look at work."""
        before = self.nats
        if self.looks == MEMORY:
            self.nats *= 1 - 1 / MEMORY
            self.like_mining *= 1 - 1 / MEMORY
        self.nats = max(0.0, self.nats + look.nats - allowance)
        if self.nats == 0.0 or before == 0.0:
            self.start_ns, self.looks, self.like_mining = look.start_ns, 0, 0.0
        self.looks = min(MEMORY, self.looks + 1)
        self.like_mining += look.nats > allowance
        shift = look.nats * (INNOCENT_SHARE if look.nats < 0 else 1.0)
        self.innocent_nats = min(0.0, max(FLOOR_NATS, self.innocent_nats + shift))

    def told(self, honest: Honest, limit: float) -> float:
        """Return what the fusion layer is to hold of this."""
        if self.nats == 0.0:
            return self.innocent_nats
        return CAP_NATS if self.height >= limit else min(NEAR_NATS, honest.nats(self.height))


class Standing(Struct):
    """What was said of one subject so far, against it (``told_nats``) and for it, and how it stands on each device."""

    #: As many as there are watches, which are full before it is, and tell so.
    levels: BoundedTable[str, Level] = field(default_factory=lambda: BoundedTable(DEVICES_MAX))
    told_nats: float = 0.0
    spoken_for_nats: float = 0.0
    named_nats: dict[str, float] = field(default_factory=dict)


class Detector:
    """Looks by device, sums by subject. Without a model it judges nothing."""

    takes = frozenset({DeviceSample, ProcessSample, ProcessExited, Launches})

    def __init__(self) -> None:
        self._model: Model | None = None
        self._limit = NONE_SEEN.limit(1.0)
        self._watches: BoundedTable[str, Watch] = BoundedTable(DEVICES_MAX)
        self._standings: BoundedTable[ProcessId | DeviceId, Standing] = BoundedTable(SUBJECTS_MAX)
        #: Launches of each process so far, by pid and start.
        self._launched: BoundedTable[tuple[int, int], int] = BoundedTable(SUBJECTS_MAX)
        #: Samples of processes for which a device had no room.
        self._refused = 0
        #: The last look at each device, for whoever shows it.
        self.looks: BoundedTable[str, Look] = BoundedTable(DEVICES_MAX)

    def judge_by(self, model: Model, alarms_per_gpu_year: float) -> None:
        """Weigh looks by this model, and jobs against the honest ones that it knows, for this rate."""
        self._model, self._limit = model, model.honest.limit(alarms_per_gpu_year)

    def receive(self, item: Block | Observation, host: Host) -> Sequence[Evidence | Gap]:
        """Return what a look that this record ends says."""
        model = self._model
        match item:
            case DeviceSample() if model:
                watch = self._watch(item.uuid)
                said = self._judge(model, item.uuid, watch, host) if watch.due(item.time_ns) else []
                watch.add(item.time_ns, cf.reading(item))
                return said
            case ProcessSample() if model:
                held = self._watch(item.uuid).held
                if item.process not in held and len(held) < PROCESSES_PER_DEVICE_MAX:
                    held[item.process] = Held(self._launched.get(_key(item.process)))
                if item.process in held:
                    held[item.process].take(item.sm_ratio)
                else:
                    self._refused += 1
            case Launches() if model:
                self._count(item.rows)
            case ProcessExited():
                self._standings.pop(item.process)
                self._launched.pop(_key(item.process))
        return []

    def evicted(self) -> dict[str, int]:
        """Return how much was forgotten because a table was full, by what it was."""
        return {"devices whose counters are judged": self._watches.evicted,
                "jobs that counters were judged of": self._standings.evicted,
                "processes' launches beside counters": self._launched.evicted,
                "samples beside counters": self._refused}

    def _count(self, rows: np.ndarray) -> None:
        new: dict[tuple[int, int], int] = {}
        for pid, start_ticks, launches in zip(*(rows[name].tolist() for name in ("pid", "start_ticks", "launches")),
                                              strict=True):
            new[pid, start_ticks] = new.get((pid, start_ticks), 0) + launches
        for key, launches in new.items():
            self._launched[key] = (self._launched.get(key) or 0) + launches

    def _watch(self, uuid: str) -> Watch:
        watch = self._watches.get(uuid)
        if watch is None:
            watch = self._watches[uuid] = Watch()
        return watch

    def _judge(self, model: Model, uuid: str, watch: Watch, host: Host) -> Sequence[Evidence | Gap]:
        look = watch.look(model, host.devices.get(uuid), self._tenants(uuid, watch, host))
        self.looks[uuid] = look
        if look.at_odds and not watch.told_at_odds:
            watch.told_at_odds = True
            return [Gap(look.end_ns, "counters", f"{uuid}: {AT_ODDS}", since_ns=look.start_ns)]
        if not look.at_work:
            return []
        # What an exited process was told of is forgotten, and would be told of it again.
        subject = look.owner if look.owner and look.owner not in host.processes.exited else DeviceId(uuid)
        standing = self._standings.get(subject)
        if standing is None:
            standing = self._standings[subject] = Standing()
        level = standing.levels.get(uuid)
        if level is None:
            level = standing.levels[uuid] = Level(start_ns=look.start_ns)
        level.take(look, model.allowance)
        text = text_of(look, model) + _whose(look)
        return [*self._weigh(model, subject, standing, level, look, text),
                *_name(subject, standing, level, look, model, text)]

    def _tenants(self, uuid: str, watch: Watch, host: Host) -> dict[ProcessId | None, Tenant]:
        """Return who held the device. Launches are not told by device: of who uses another too, they say nothing."""
        others = [one.uuid for one in host.devices.values() if one.uuid != uuid] if len(watch.held) > 1 else []
        return {process: held.tenant(
            None if any((process, other) in host.process_samples for other in others)
            else self._launched.get(_key(process))) for process, held in watch.held.items()}

    def _weigh(
        self, model: Model, subject: ProcessId | DeviceId, standing: Standing, level: Level, look: Look, text: str,
    ) -> list[Evidence]:
        # One process on eight GPUs is one job: its devices do not add up.
        levels = [one.told(model.honest, self._limit.height) for one in standing.levels.values()]
        now = sum(levels) / len(levels)
        # What spoke for a job stays said. The fusion layer holds nothing below 0, so where it held nothing that took
        # nothing, and to give it back would accuse.
        guilt, spoken_for = max(0.0, now), min(standing.spoken_for_nats, now)
        change = guilt - standing.told_nats + spoken_for - standing.spoken_for_nats
        weighs = abs(change) >= TOLD_NATS or guilt >= CAP_NATS > standing.told_nats
        if weighs:
            standing.told_nats, standing.spoken_for_nats = guilt, spoken_for
        elif standing.told_nats:
            change = 0.0  # only words: who asks hears how far the job has come by now
        else:
            return []
        guilty = change > 0 or not weighs
        so_far = standing_of(level, model.honest, self._limit, look.end_ns) if level.nats else ""
        return [Evidence(
            time_ns=look.end_ns,
            subject=subject,
            label="mining",
            evidence_class="counter",
            kind="counters-like-mining" if guilty else "counters-unlike-mining",
            nats=change,
            text=text + so_far,
            start_ns=level.start_ns if guilty else look.start_ns,
            blind_spots=BLIND_SPOTS,
        )]


def standing_of(level: Level, honest: Honest, limit: Limit, now_ns: int) -> str:
    """Return how far a job has come, how seldom honest ones do, and when it is to be expected at the limit."""
    seconds = (now_ns - level.start_ns) / SECOND_NS
    # Of what is older than the memory, only the time is known.
    looks = f"{level.looks} looks over" if level.looks < MEMORY else f"the last {MEMORY} looks, after"
    seen = (f"; so in {level.like_mining:.0f} of {looks} {seconds:.0f} s: height {level.height:.2f}, "
            f"to which {honest.reached(level.height)} of {len(honest.heights)} honest jobs of unknown kinds came")
    if not math.isfinite(limit.height):
        return f"{seen}; none is suspect: {len(honest.heights)} jobs support {honest.supported:.2g} alarms a GPU-year"
    basis = "counted" if limit.counted else f"extrapolated: counting supports {honest.supported:.2g}"
    return (f"{seen}; {limit.height:.2f} is suspect, {_when(level, limit)} ({limit.alarms:.2g} alarms a GPU-year, "
            f"{basis}; {limit.least:.2g} to {limit.most:.2g} for other mixes of these kinds)")


def _when(level: Level, limit: Limit) -> str:
    """Return after how long at this pace a job is to be expected at the limit."""
    if level.height >= limit.height:
        return "reached"
    pace = level.nats / level.looks
    if highest(pace) <= limit.height:
        return "not to be expected at this pace"
    # The height of n looks at this pace is n pace / (n + SHRINK).
    return f"expected after {SHRINK * limit.height / (pace - limit.height) * cf.LOOK_S:.0f} s of work like this"


def _key(process: ProcessId) -> tuple[int, int]:
    return process.pid, process.start_ticks


def _whose(look: Look) -> str:
    """Return who did how much of a look at a device that several hold, "" where one has it alone."""
    whole = look.mean(look.pipe)
    if len(look.parts) < 2 or not whole > 0:
        return ""
    if look.owner is not None and (own := look.parts[look.owner]):
        return f"; at least {own.low / whole:.0%} of the {PIPES[look.pipe]} is its own, beside {len(look.parts) - 1}"
    told = sorted(((part.high, part.low, process) for process, part in look.parts.items() if process and part),
                  key=lambda one: (-one[0], -one[1], one[2]))
    shown = ", ".join(f"{process} {low / whole:.0%} to {high / whole:.0%}"
                      for high, low, process in told[:CANDIDATES_SHOWN])
    return f"; of the {PIPES[look.pipe]}, {shown}" if shown else f"; {len(look.parts)} processes, shares not told"


def _name(
    subject: ProcessId | DeviceId, standing: Standing, level: Level, look: Look, model: Model, text: str,
) -> list[Evidence]:
    """Say what it is that is not mining.

    Of a job whose looks still add up to something nothing is said. Nor is that it computes where no pipe is told: then
    it only means that nothing speaks for training or inference, and a miner that pauses has as much to show.
    """
    best = max(range(len(look.probabilities)), key=look.probabilities.__getitem__)
    name = model.classes[best]
    said = standing.named_nats.get(name, 0.0)
    if name.startswith(MINING) or look.probabilities[best] < NAMED_PROBABILITY or said >= NAMED_NATS_MAX:
        return []
    if level.nats > 0 or (name == "compute" and not look.tells(*(PIPES.keys() - {"gpu"}))):
        return []
    standing.named_nats[name] = said + NAMED_NATS
    return [Evidence(
        time_ns=look.end_ns,
        subject=subject,
        label=name,
        evidence_class="counter",
        kind=f"counters-{name}",
        nats=NAMED_NATS,
        text=text,
        start_ns=look.start_ns,
        blind_spots=BLIND_SPOTS[1:],
    )]


def text_of(look: Look, model: Model) -> str:
    """Return what was seen, in the words of the counters, and what that looks like."""
    mean = dict(zip(cf.CHANNELS, look.means, strict=True))
    most = dict(zip(cf.CHANNELS, look.most, strict=True))
    ratios = (("gpu", "GPU busy"), ("sm", "SMs"), ("integer", "integer"), ("fp32", "FP32"), ("tensor", "tensor"),
              ("hmma", "HMMA"), ("imma", "IMMA"), ("dram", "DRAM"))
    seen = [f"{words} {mean[name]:.0%}" for name, words in ratios if not math.isnan(mean[name])]
    if not math.isnan(mean["power"]):
        within = f" within {look.power_variation:.1%}" if look.power_variation >= 0 else ""
        seen.append(f"{mean['power']:.0f} W{within}")
    for name, words in (("host", "PCIe"), ("link", "NVLink")):
        if not math.isnan(most[name]):
            seen.append(f"{words} up to {10 ** most[name] / 1e6:.1f} MB/s")
    likeliest = sorted(zip(look.probabilities, model.classes, strict=True), reverse=True)[:2]
    like = ", ".join(f"{name} {probability:.2f}" for probability, name in likeliest)
    return f"{', '.join(seen)}: like {like}"
