"""Every NVML call of the sensor, made on one thread: devices, what they lack, and what is lost and found again.

Each field is asked for by itself at first; those that the driver knows are asked for together from then on. What this
driver or board does not have is None in every sample (see `asking`).
"""

from __future__ import annotations

import functools
import logging
from typing import TYPE_CHECKING, Any

import msgspec

from gpuguard._nvml import Rounds
from gpuguard.core.records import Block, Device, DeviceSample, Gpm
from gpuguard.sensors import is_due
from gpuguard.sensors.nvml import describe
from gpuguard.sensors.nvml.asking import Asking, DeviceGone, DriverGone
from gpuguard.sensors.nvml.calls import (
    DEVICE_GONE,
    DRIVER_GONE,
    ID_ABSENT,
    NOT_FOUND,
    NOT_SUPPORTED,
    WIDE,
    Fields,
    Library,
    remedy,
)
from gpuguard.sensors.nvml.fields import (
    AVERAGE_POWER,
    FAST,
    FIELD_VALUES,
    HELD,
    PCIE,
    PCIE_RX,
    PCIE_TX,
    SLOW,
    WANTED,
    Call,
    FieldReader,
    Values,
    implausible,
    memory_info,
)
from gpuguard.sensors.nvml.gpm import Window
from gpuguard.sensors.nvml.gpu import BackOff, Gpu
from gpuguard.sensors.nvml.processes import ProcessCalls
from gpuguard.sensors.nvml.rounds import Plan
from gpuguard.sensors.nvml.sweep import SECOND_NS, Sweep, gap

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

log = logging.getLogger(__name__)

#: The driver itself measures a process every 1/6 s to 1 s, so asking more often learns nothing.
PROCESS_PERIOD_NS = SECOND_NS
#: Limits, modes and MIG instances are changed by people.
CONTEXT_PERIOD_NS = 10 * SECOND_NS
#: A call of nvmlDeviceGetPcieThroughput takes the 20 ms that it measures over: one direction of one device each time.
THROUGHPUT_PERIOD_NS = SECOND_NS
DEVICES_MAX = 64
FOREVER = 1 << 62


class Driver:
    """The devices of one loaded driver."""

    def __init__(self, nvml: Any) -> None:
        self._nvml = nvml
        self._gpus: list[Gpu] = []
        self._unopened: dict[int, BackOff] = {}
        self._system: dict[str, Any] = {}
        self._library: Library
        self._processes: ProcessCalls
        self._asking = Asking(nvml)
        self._gone: BackOff | None = None
        self._gone_since_ns = 0
        self._processes_ns = 0
        self._throughput_ns = 0
        self._throughput_turn = 0
        self._rounds = Rounds(DEVICE_GONE | DRIVER_GONE)
        self._swept = Sweep(0)
        #: Of the last round, ns of CLOCK_MONOTONIC, and when after a stream the next may begin.
        self._round_ns = self._next_round_ns = 0

    @property
    def devices(self) -> int:
        """Return how many devices were opened."""
        return len(self._gpus)

    @property
    def unopened(self) -> int:
        """Return how many devices are listed and cannot be opened."""
        return len(self._unopened)

    def open(self, now_ns: int) -> list[Block]:
        """Initialise NVML and name its devices; raises NVMLError."""
        nvml = self._nvml
        nvml.nvmlInit()
        self._gpus = []
        sweep = Sweep(time_ns=now_ns)
        try:
            self._library = Library(nvml)
            self._processes = ProcessCalls(self._library, self._asking)
            self._system = describe.system(nvml)
            self._unopened = {index: BackOff() for index in range(min(nvml.nvmlDeviceGetCount(), DEVICES_MAX))}
            self._open_rest(sweep)
        except BaseException:
            # NVML counts who initialised it: while one has not shut it down, no other init looks for the driver anew.
            self._shutdown()
            raise
        return sweep.blocks

    def sweep(self, now_ns: int) -> Sweep:
        """Ask every device for everything once. Never raises: what fails is a `Gap`."""
        sweep = self._swept = Sweep(time_ns=now_ns)
        if self._gone and not self._reopen(self._gone, sweep):
            return sweep
        if is_due(now_ns, self._processes_ns, PROCESS_PERIOD_NS):
            self._processes_ns = now_ns
            sweep.uses = []
        try:
            self._open_rest(sweep)
            ready = [gpu for gpu in self._gpus if self._make_ready(gpu, sweep)]
            self._make_rounds(ready, sweep, full=True)
            for gpu in ready:
                self._look_for_uses(gpu, sweep)
        except DriverGone as gone:
            self._lose_driver(gone, sweep)
        return sweep

    def stream(self, rounds: int, period_ns: int, until_ns: int) -> Sweep:
        """Ask every device for what changes fast, in rounds that follow the last `sweep`. Never raises.

        None is nearer to the one before than ``period_ns``, and none begins after ``until_ns`` of CLOCK_MONOTONIC: what
        would come late is left out.
        """
        sweep = Sweep(self._swept.time_ns, self._swept.began_ns)
        try:
            ready = [gpu for gpu in self._gpus if not (gpu.lost or self._gone)]
            self._make_rounds(ready, sweep, full=False, rounds=rounds, period_ns=period_ns,
                              until_ns=until_ns)
        except DriverGone as gone:
            self._lose_driver(gone, sweep)
        return sweep

    def stop(self) -> None:
        """End a `stream` before its next round. Any thread."""
        self._rounds.stop()

    def close(self) -> None:
        """Let go of the driver."""
        if not self._gone:
            self._shutdown()

    # -- devices that come and go -------------------------------------------------------------------------------------

    def _open_rest(self, sweep: Sweep) -> None:
        """Open every device that is not open yet, and is not to be left alone for a while."""
        nvml = self._nvml
        for index, back_off in list(self._unopened.items()):
            if not back_off.is_over(sweep.time_ns):
                continue
            try:
                handle = nvml.nvmlDeviceGetHandleByIndex(index)
                gpu = Gpu(index, str(nvml.nvmlDeviceGetUUID(handle)), handle)
                self._prepare(gpu, sweep)
            except (nvml.NVMLError, DeviceGone) as error:
                sweep.blocks.append(gap(sweep.time_ns, f"GPU {index} cannot be opened: {error}"))
                back_off.failed(sweep.time_ns)
                continue
            self._gpus.append(gpu)
            del self._unopened[index]

    def _find_again(self, gpu: Gpu, lost: BackOff, sweep: Sweep) -> bool:
        """Return whether a lost device answers again, and take it back."""
        if not lost.is_over(sweep.time_ns):
            return False
        try:
            handle = self._nvml.nvmlDeviceGetHandleByIndex(gpu.index)
            if str(self._nvml.nvmlDeviceGetUUID(handle)) != gpu.uuid:
                raise self._nvml.NVMLError(NOT_FOUND)
            gpu.handle = handle
            self._prepare(gpu, sweep)
        except (self._nvml.NVMLError, DeviceGone) as error:
            if getattr(error, "value", 0) in DRIVER_GONE:
                raise DriverGone(str(error)) from error
            lost.failed(sweep.time_ns)
            reason = f"{gpu} still does not answer: {error}"
            sweep.blocks.append(gap(sweep.time_ns, reason, since_ns=gpu.lost_since_ns))
            return False
        gpu.lost = None
        sweep.blocks.append(gap(sweep.time_ns, f"{gpu} answers again", since_ns=gpu.lost_since_ns))
        return True

    def _reopen(self, gone: BackOff, sweep: Sweep) -> bool:
        """Return whether a driver that was gone answers again, and take it back."""
        if not gone.is_over(sweep.time_ns):
            return False
        try:
            blocks = self.open(sweep.time_ns)
        except (self._nvml.NVMLError, DriverGone) as error:
            gone.failed(sweep.time_ns)
            reason = f"the driver still does not answer: {remedy(error)}"
            sweep.blocks.append(gap(sweep.time_ns, reason, since_ns=self._gone_since_ns))
            return False
        self._gone = None
        sweep.blocks.append(gap(sweep.time_ns, "the driver answers again", since_ns=self._gone_since_ns))
        sweep.blocks += blocks
        return True

    def _shutdown(self) -> None:
        for gpu in self._gpus:
            self._close_windows(gpu)
        try:
            self._nvml.nvmlShutdown()
        except self._nvml.NVMLError as error:
            # It is being given up because it fails; every handle is dropped and init is tried afresh.
            log.debug("nvmlShutdown: %s", error)

    def _lose_driver(self, why: DriverGone, sweep: Sweep) -> None:
        sweep.blocks.append(gap(sweep.time_ns, f"the driver does not answer any more: {why}"))
        self._gone, self._gone_since_ns = BackOff(), sweep.time_ns
        self._gone.failed(sweep.time_ns)
        self._shutdown()

    def _lose(self, gpu: Gpu, sweep: Sweep, why: object) -> None:
        sweep.blocks.append(gap(sweep.time_ns, f"{gpu} does not answer any more: {why}"))
        self._close_windows(gpu)
        gpu.lost, gpu.lost_since_ns = BackOff(), sweep.time_ns
        gpu.lost.failed(sweep.time_ns)

    @staticmethod
    def _close_windows(gpu: Gpu) -> None:
        for window in gpu.windows.values():
            window.close()
        gpu.windows, gpu.plan = {}, None

    # -- what a device is ---------------------------------------------------------------------------------------------

    def _prepare(self, gpu: Gpu, sweep: Sweep) -> None:
        """Find out what a device is and what can be read of it; raises NVMLError, DeviceGone and DriverGone."""
        try:
            self._look(gpu, sweep)
        except (self._nvml.NVMLError, DeviceGone, DriverGone):
            self._close_windows(gpu)
            raise

    def _look(self, gpu: Gpu, sweep: Sweep) -> None:
        gpu.held, gpu.instances, gpu.absent, gpu.plan = {}, [], set(), None
        whole = gpu.parent is None
        gpu.memory = self._asking.ask(gpu, sweep, "memory", functools.partial(memory_info, self._library, gpu.handle))
        known = describe.fixed(functools.partial(self._asking.ask, gpu, sweep), self._nvml, self._library, gpu)
        gpu.device = Device(sweep.time_ns, gpu.uuid, gpu.index, **known, **self._system)
        if whole:
            self._prepare_fields(gpu, sweep)
        self._context(gpu, sweep, told=False)

    def _prepare_fields(self, gpu: Gpu, sweep: Sweep) -> None:
        """Ask for each field by itself."""
        kept = []
        for wanted in WANTED:
            what, one, scope, _ = wanted
            if "NVLink" in what and gpu.device.nvlinks == 0:
                continue  # no link: nothing is missing
            self._asking.ask(gpu, sweep, what, functools.partial(self._probe, gpu, one, scope))
            if what not in gpu.absent:
                kept.append(wanted)
        gpu.fields = FieldReader(self._library, kept) if kept else None
        gpu.pcie_counters = {one for _, one, _, _ in kept} >= PCIE

    def _probe(self, gpu: Gpu, one: int, scope: int) -> None:
        """Raise NVMLError for a field that this driver does not know; one may be known and have no value now."""
        _, kind, code, _ = Fields(self._library, gpu.handle, [(one, scope)]).read()[0]
        # 32 bits of PCIe bytes wrap within a tenth of a second on a busy link.
        if code in ID_ABSENT or (one in PCIE and not code and kind not in WIDE):
            raise self._nvml.NVMLError(NOT_SUPPORTED)

    def _open_window(self, gpu: Gpu, sweep: Sweep) -> None:
        """Allocate what GPM needs, where the board has it and that was not done yet."""
        owner = gpu.parent or gpu
        if not gpu.device.gpm_supported and gpu.parent is None:
            self._asking.tell_absent(gpu, sweep, "GPM", "only Hopper and later have it")
        if not gpu.device.gpm_supported or gpu.gpm_key in owner.windows:
            return
        window = self._asking.ask(gpu, sweep, "GPM", lambda: Window(self._library, owner.handle, gpu.gpm_key))
        if window is not None:
            owner.windows[gpu.gpm_key], owner.plan = window, None

    def _context(self, gpu: Gpu, sweep: Sweep, *, told: bool = True) -> None:
        """Tell of limits, modes and MIG instances where they are not what they were."""
        gpu.context_ns = sweep.time_ns
        now = describe.changing(functools.partial(self._asking.ask, gpu, sweep), self._nvml, gpu)
        device = msgspec.structs.replace(gpu.device, **now)
        if told and device.mig_mode != gpu.device.mig_mode:
            gpu.absent, gpu.plan = set(), None  # what a whole board tells, one in parts does not
        if not told or device != gpu.device:
            gpu.device = msgspec.structs.replace(device, time_ns=sweep.time_ns)
            sweep.blocks.append(gpu.device)
        for one in (gpu, *gpu.instances):
            self._open_window(one, sweep)
        if gpu.parent is None and gpu.device.mig_mode is not None:
            self._find_instances(gpu, sweep)

    def _find_instances(self, gpu: Gpu, sweep: Sweep) -> None:
        """Take in new MIG instances, and let go of those that were destroyed."""
        listed = functools.partial(describe.instances, self._nvml, gpu.handle)
        found = self._asking.ask(gpu, sweep, "MIG instances", listed) if gpu.device.mig_mode else {}
        if found is None:
            return
        known = {one.uuid for one in gpu.instances}
        for uuid, (handle, ids) in found.items():
            if uuid not in known:
                instance = Gpu(gpu.index, uuid, handle, gpu, ids)
                gpu.instances.append(instance)
                self._prepare(instance, sweep)
        gone = [one for one in gpu.instances if one.uuid not in found]
        gpu.instances = [one for one in gpu.instances if one.uuid in found]
        used = {one.gpm_key for one in gpu.instances} | {None}
        for instance in gone:
            sweep.blocks.append(gap(sweep.time_ns, f"{instance} is no more: the MIG instance was destroyed"))
            if instance.gpm_key not in used and (window := gpu.windows.pop(instance.gpm_key, None)):
                window.close()
                gpu.plan = None

    # -- what it does now ---------------------------------------------------------------------------------------------

    def _make_ready(self, gpu: Gpu, sweep: Sweep) -> bool:
        """Return whether a device is there to be asked; read what is slow to change."""
        if gpu.lost and not self._find_again(gpu, gpu.lost, sweep):
            return False
        try:
            if is_due(sweep.time_ns, gpu.context_ns, CONTEXT_PERIOD_NS):
                self._context(gpu, sweep)
                self._processes.accounts(gpu, sweep)
            for one in (gpu, *gpu.instances):
                info = one.memory and self._asking.ask(one, sweep, "memory", one.memory)
                one.held = {"memory_used_bytes": info[1]} if info else {}
                self._drop_implausible(one, sweep, one.held)
        except (self._nvml.NVMLError, DeviceGone) as gone:
            if getattr(gone, "value", 0) in DRIVER_GONE:
                raise DriverGone(str(gone)) from gone
            self._lose(gpu, sweep, gone)
            return False
        return True

    def _plan(self, gpu: Gpu, sweep: Sweep) -> Plan:
        """Return what a board is asked at each tick, and nothing twice; written down anew where that has changed."""
        if gpu.plan is not None:
            return gpu.plan
        averaged = gpu.fields is not None and any(what == AVERAGE_POWER for what, *_ in gpu.fields.kept)
        left_out = gpu.absent | ({"power"} if averaged else set())
        fast, slow = ([(one, function) for one in calls if one.what not in left_out
                       and (function := self._function(gpu, sweep, one))] for calls in (FAST, SLOW))
        gpu.plan = Plan(gpu.handle, gpu.windows, gpu.fields, fast, slow)
        return gpu.plan

    def _function(self, gpu: Gpu, sweep: Sweep, call: Call) -> Callable[..., int] | None:
        try:
            return self._library.function(*call.names)
        except self._nvml.NVMLError as error:
            self._asking.absent(gpu, sweep, call.what, error)
            return None

    def _make_rounds(
        self, ready: Sequence[Gpu], sweep: Sweep, *, full: bool, rounds: int = 1, period_ns: int = 0,
        until_ns: int = FOREVER,
    ) -> None:
        """Make rounds of calls, and tell what was answered; raises DriverGone."""
        plans = [self._plan(gpu, sweep) for gpu in ready]
        sheets = [plan.full if full else plan.short for plan in plans]
        first_ns = self._next_round_ns if full else self._round_ns + period_ns
        made = self._rounds.run([sheet.calls for sheet in sheets], [plan.turn for plan in plans], rounds, first_ns,
                                period_ns, until_ns)
        for rows in made:
            told = [sheet.calls.read(row) if row else None for sheet, row in zip(sheets, rows, strict=True)]
            began_ns = next((one[0] for one in told if one), sweep.began_ns)
            self._round_ns, self._next_round_ns = began_ns, began_ns + period_ns
            at = sweep if full else Sweep(sweep.time_ns + began_ns - sweep.began_ns, began_ns, sweep.blocks)
            for gpu, plan, one in zip(ready, plans, told, strict=True):
                if one and not gpu.lost:
                    self._take_round(gpu, at, plan, *one, full=full)

    def _take_round(
        self, gpu: Gpu, sweep: Sweep, plan: Plan, time_ns: int, codes: Sequence[int], answers: Sequence[bytes],
        *, full: bool,
    ) -> None:
        """Tell what a board answered in one round; raises DriverGone."""
        plan.turn ^= 1
        try:
            gpms = self._gpms(gpu, sweep, plan, codes, answers, time_ns, full=full)
            values = self._values(gpu, sweep, plan, codes, answers, full=full)
            if full and not gpu.pcie_counters:
                values.update(self._throughput(gpu, sweep))
        except DeviceGone as gone:
            self._lose(gpu, sweep, gone)
            return
        self._drop_implausible(gpu, sweep, values)
        if full:
            gpu.held.update((name, value) for name, value in values.items() if name in HELD)
        for one in (gpu, *gpu.instances):
            fresh = values if one is gpu else {}
            fresh["gpm"] = gpms.get(one.gpm_key)
            known = {**one.held, **fresh}
            # What is held makes no sample of a moment in which nothing was answered.
            if any(value is not None for value in (known if full else fresh).values()):
                sweep.blocks.append(DeviceSample(sweep.time_ns, one.uuid, **known))

    def _values(
        self, gpu: Gpu, sweep: Sweep, plan: Plan, codes: Sequence[int], answers: Sequence[bytes], *, full: bool,
    ) -> Values:
        """Return what was answered to the calls of each tick, GPM apart."""
        values: Values = {}
        failed: dict[str, int] = {}
        at = 2 * len(plan.windows)
        if plan.fields is not None:
            failed = {FIELD_VALUES: codes[at]} if codes[at] else plan.fields.take(answers[at], values)
            at += 1
        for one, code, answer in zip(plan.calls, codes[at:], answers[at:], strict=False):
            if code:
                failed[one.what] = code
            else:
                values.update(one.read(*one.answer.unpack(answer)))
        for what, code in failed.items():
            self._asking.failed(gpu, sweep, what, self._nvml.NVMLError(code))
        if failed or gpu.failing:
            self._asking.settle(gpu, sweep, plan.whats(full=full), failed)
        values.setdefault("power_w", values.get("power_average_w"))
        return values

    def _gpms(
        self, gpu: Gpu, sweep: Sweep, plan: Plan, codes: Sequence[int], answers: Sequence[bytes], at_ns: int,
        *, full: bool,
    ) -> dict[int | None, Gpm | None]:
        """Return what GPM says of a board and of its GPU instances, by `Gpu.gpm_key`."""
        found = {}
        now_ns = sweep.time_ns + at_ns - sweep.began_ns
        for index, (key, window) in enumerate(plan.windows.items()):
            if gpu.windows.get(key) is not window:
                continue  # given up since it was asked
            whose = gpu if key is None else next((one for one in gpu.instances if one.gpm_key == key), gpu)
            read = functools.partial(window.take, codes[2 * index : 2 * index + 2], answers[2 * index + 1], now_ns,
                                     full=full)
            found[key] = self._asking.ask(whose, sweep, "GPM", read)
            if window.refused:
                names, window.refused, gpu.plan = ", ".join(window.refused), [], None
                self._asking.tell_absent(whose, sweep, "GPM metrics of this kind", names)
            if "GPM" in whose.absent:
                gpu.windows.pop(key).close()
                gpu.plan = None
        return found

    def _look_for_uses(self, gpu: Gpu, sweep: Sweep) -> None:
        """Ask which processes are on a device, where this sweep is to."""
        if sweep.uses is None or gpu.lost:
            return
        try:
            sweep.uses += self._processes.uses(gpu, sweep)
        except DeviceGone as gone:
            self._lose(gpu, sweep, gone)

    def _drop_implausible(self, gpu: Gpu, sweep: Sweep, values: Values) -> None:
        for name in implausible(values):
            log.debug("%s: %s = %s is no measurement", gpu, name, values.pop(name))
            reason = f"{gpu}: the driver gives a {name} that is no measurement"
            self._asking.tell_once(gpu, sweep, f"!{name}", reason)

    def _throughput(self, gpu: Gpu, sweep: Sweep) -> Values:
        """Return bytes per second over PCIe, for a driver without byte counters (before R550).

        nvmlDeviceGetPcieThroughput, KB/s over the 20 ms that the call takes: one direction of one device is asked each
        second, in turn, and the other samples have None. Absent in vGPU guests.
        """
        answering = [one for one in self._gpus if not one.lost]
        turn = self._throughput_turn % (2 * max(1, len(answering)))
        if not is_due(sweep.time_ns, self._throughput_ns, THROUGHPUT_PERIOD_NS) or answering[turn // 2] is not gpu:
            return {}
        self._throughput_turn, self._throughput_ns = self._throughput_turn + 1, sweep.time_ns
        counter, name = ((PCIE_TX, "pcie_tx_bytes_per_s"), (PCIE_RX, "pcie_rx_bytes_per_s"))[turn % 2]
        read = self._nvml.nvmlDeviceGetPcieThroughput
        kbytes = self._asking.ask(gpu, sweep, "PCIe throughput", lambda: read(gpu.handle, counter))
        return {name: None if kbytes is None else kbytes * 1000}
