"""Metrics for Prometheus: what was found and done, which eyes are open, and what the GPUs do.

Names follow the Prometheus naming practice (base units, ``_total``, ``_ratio``, ``_info``) and join dcgm-exporter's by
the labels ``gpu`` and ``UUID``. There is no pid, command line, host name or address in a label: those are in the
events, and here they would make a series each. What is not known has no sample: never 0, never a sentinel.

`Metrics.receive` takes blocks and events as they pass through the guard; `families` turns what it kept into metrics.
They are read by another thread (the HTTP endpoint), hence the lock.
"""

from __future__ import annotations

import ipaddress
import os
import platform
import threading
import time
from collections import Counter
from importlib import metadata
from typing import TYPE_CHECKING

from msgspec import Struct, field
from prometheus_client import CollectorRegistry, generate_latest, start_http_server, write_to_textfile
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric

from gpuguard.core.bounded import BoundedTable
from gpuguard.core.events import Decision, Event, Finding, Incident
from gpuguard.core.host import Host
from gpuguard.core.records import (
    ActionOutcome,
    Approval,
    Block,
    Device,
    DeviceSample,
    Gap,
    HostInfo,
    Packets,
    ProcessExited,
    ProcessSample,
    ProcessStarted,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path
    from wsgiref.simple_server import WSGIServer

FINDINGS_MAX = 65_536
PENDING_MAX = 4_096
SERIES_MAX = 1_024
SENSORS_MAX = 64
DEVICES_MAX = 1_024
#: A device or process that was not sampled for so long is not there any more.
STALE_NS = 60_000_000_000

DEVICE_LABELS = ("gpu", "UUID")
PROCESS_LABELS = ("gpu", "UUID", "user", "slurm_job_id", "pod_uid")

#: Field of `DeviceSample`, metric, help.
DEVICE_GAUGES = (
    ("gpu_ratio", "gpuguard_device_utilization_ratio", "Share of time with at least one kernel running."),
    ("memory_ratio", "gpuguard_device_memory_utilization_ratio", "Share of time with device memory being accessed."),
    ("memory_used_bytes", "gpuguard_device_memory_used_bytes", "Device memory in use."),
    ("power_w", "gpuguard_device_power_watts", "Power draw of the board."),
    ("temperature_c", "gpuguard_device_temperature_celsius", "Temperature of the GPU die."),
    ("sm_clock_hz", "gpuguard_device_sm_clock_hertz", "Clock of the multiprocessors."),
    ("memory_clock_hz", "gpuguard_device_memory_clock_hertz", "Clock of the device memory."),
    ("pcie_tx_bytes_per_s", "gpuguard_device_pcie_transmit_bytes_per_second", "PCIe traffic from the device."),
    ("pcie_rx_bytes_per_s", "gpuguard_device_pcie_receive_bytes_per_second", "PCIe traffic to the device."),
    ("throttle_reasons", "gpuguard_device_clocks_event_reasons", "Bit mask of nvmlClocksEventReason*."),
    ("power_instant_w", "gpuguard_device_power_instant_watts", "Power of the board at this moment."),
    ("power_capped_ratio", "gpuguard_device_power_capped_ratio", "Share of time that the power cap held the clocks."),
    ("memory_temperature_c", "gpuguard_device_memory_temperature_celsius", "Temperature of the device memory."),
    ("nvlink_tx_bytes_per_s", "gpuguard_device_nvlink_transmit_bytes_per_second", "NVLink traffic from the device."),
    ("nvlink_rx_bytes_per_s", "gpuguard_device_nvlink_receive_bytes_per_second", "NVLink traffic to the device."),
    ("encoder_ratio", "gpuguard_device_encoder_ratio", "Use of the video encoders."),
    ("decoder_ratio", "gpuguard_device_decoder_ratio", "Use of the video decoders."),
)
#: Field of `Gpm`, metric, help: Hopper and later, as dcgm-exporter's DCGM_FI_PROF_*.
GPM_GAUGES = (
    ("sm_ratio", "gpuguard_device_sm_active_ratio", "Share of the multiprocessors that were busy."),
    ("occupancy_ratio", "gpuguard_device_sm_occupancy_ratio", "Warps that were resident, of those that can be."),
    ("tensor_ratio", "gpuguard_device_tensor_active_ratio", "Time that the tensor cores were active."),
    ("tensor_hmma_ratio", "gpuguard_device_tensor_hmma_active_ratio", "Tensor cores, half precision."),
    ("tensor_imma_ratio", "gpuguard_device_tensor_imma_active_ratio", "Tensor cores, integer."),
    ("tensor_dfma_ratio", "gpuguard_device_tensor_dfma_active_ratio", "Tensor cores, double precision."),
    ("integer_ratio", "gpuguard_device_integer_active_ratio", "Time that the integer pipes were active."),
    ("fp64_ratio", "gpuguard_device_fp64_active_ratio", "Time that the FP64 pipes were active."),
    ("fp32_ratio", "gpuguard_device_fp32_active_ratio", "Time that the FP32 pipes were active."),
    ("fp16_ratio", "gpuguard_device_fp16_active_ratio", "Time that the FP16 pipes were active."),
    ("dram_ratio", "gpuguard_device_dram_active_ratio", "Bandwidth of the device memory that was used."),
    ("context_switches_per_s", "gpuguard_device_context_switches_per_second", "Context switch requests, engine 0."),
)


class State(Struct):
    """Everything that the metrics are made of."""

    host: Host = field(default_factory=Host)
    findings: Counter[tuple[str, str]] = field(default_factory=Counter)
    actions: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    gaps: Counter[str] = field(default_factory=Counter)
    lost: Counter[str] = field(default_factory=Counter)
    #: Packets that count, and those that were met once more on their way through another interface.
    packets: int = 0
    packets_met_again: int = 0
    sensors: dict[str, bool] = field(default_factory=dict)
    verdicts: BoundedTable[str, str] = field(default_factory=lambda: BoundedTable(FINDINGS_MAX))
    pending: BoundedTable[str, str] = field(default_factory=lambda: BoundedTable(PENDING_MAX))
    incidents: BoundedTable[str, str] = field(default_factory=lambda: BoundedTable(PENDING_MAX))
    #: The newest sample of each device that had performance metrics: not every sample ends a window.
    gpm_samples: BoundedTable[str, DeviceSample] = field(default_factory=lambda: BoundedTable(DEVICES_MAX))


def take(state: State, item: Event | Block) -> None:
    """Add one block or event."""
    match item:
        case Finding():
            # A finding is told again when new evidence comes: it counts when its verdict is new.
            if state.verdicts.get(item.id) != item.verdict:
                state.findings[item.label, item.verdict] += 1
            state.verdicts[item.id] = item.verdict
        case Incident():
            if item.state == "open":
                state.incidents[item.id] = item.verdict
            else:
                state.incidents.pop(item.id)
        case Decision():
            if item.needs_approval:
                state.pending[item.id] = item.rung
        case Approval():
            state.pending.pop(item.decision_id)
        case ActionOutcome():
            state.pending.pop(item.decision_id)
            mode = "observe" if item.outcome == "would_have" else "enforce"
            state.actions[item.action, item.outcome, mode] += 1
        case Gap():
            sensor = item.sensor if item.sensor in state.gaps or len(state.gaps) < SENSORS_MAX else "other"
            state.gaps[sensor] += 1
            state.lost[sensor] += item.lost or 0
        case Packets():
            state.packets += len(item.rows)
            state.packets_met_again += item.met_again
        case Device() | DeviceSample() | ProcessSample() | ProcessStarted() | HostInfo():
            state.host.receive(item)
            if isinstance(item, DeviceSample) and item.gpm is not None:
                state.gpm_samples[item.uuid] = item
        case ProcessExited():
            state.host.receive(item)
            state.host.forget(item.process)
        case _:
            pass
    state.host.now_ns = max(state.host.now_ns, item.time_ns)


def families(state: State) -> list[Metric]:
    """Return the metrics of this state. Pure: the same state gives the same metrics."""
    findings = CounterMetricFamily(
        "gpuguard_findings", "Findings by the verdict that they came to.", labels=("label", "verdict"))
    for (label, verdict), count in sorted(state.findings.items()):
        findings.add_metric((label, verdict), count)
    actions = CounterMetricFamily(
        "gpuguard_actions", "What became of decisions.", labels=("action", "outcome", "mode"))
    for (action, outcome, mode), count in sorted(state.actions.items()):
        actions.add_metric((action, outcome, mode), count)
    pending = GaugeMetricFamily(
        "gpuguard_approvals_pending", "Decisions that wait for a person.", value=len(state.pending))
    incidents = GaugeMetricFamily("gpuguard_incidents_open", "Open incidents.", labels=("verdict",))
    for verdict, count in sorted(Counter(state.incidents.values()).items()):
        incidents.add_metric((verdict,), count)
    return [findings, actions, pending, incidents, *_sensor_families(state), *_gpu_families(state)]


def _sensor_families(state: State) -> Iterator[Metric]:
    up = GaugeMetricFamily("gpuguard_sensor_up", "1 where the eye is open, 0 where it is closed.", labels=("sensor",))
    for sensor, is_up in sorted(state.sensors.items()):
        up.add_metric((sensor,), float(is_up))
    gaps = CounterMetricFamily("gpuguard_gaps", "Times that a sensor could not look.", labels=("sensor",))
    lost = CounterMetricFamily(
        "gpuguard_dropped_records", "Records known to have been lost; more may be unknown.", labels=("sensor",))
    for sensor, count in sorted(state.gaps.items()):
        gaps.add_metric((_label(sensor),), count)
        lost.add_metric((_label(sensor),), state.lost[sensor])
    yield from (up, gaps, lost)
    yield CounterMetricFamily("gpuguard_packets", "Packets that were looked at.", value=state.packets)
    yield CounterMetricFamily(
        "gpuguard_packets_met_again",
        "Packets left out because they were met before on another interface of the same namespace.",
        value=state.packets_met_again)
    if state.host.now_ns:
        yield GaugeMetricFamily(
            "gpuguard_last_record_timestamp_seconds", "When the newest record was made.", state.host.now_ns / 1e9)


def _gpu_families(state: State) -> Iterator[Metric]:
    host = state.host
    info = InfoMetricFamily("gpuguard_device", "What each device is.", labels=DEVICE_LABELS)
    for device in host.devices.values():
        words = {"model": _label(device.name), "driver": _label(device.driver_version)}
        if device.parent_uuid:
            words |= {"parent": _label(device.parent_uuid), "gpu_instance": str(device.gpu_instance_id)}
        info.add_metric(_device(host, device.uuid), words)
    yield info
    fresh = [one for one in host.device_samples.values() if host.now_ns - one.time_ns <= STALE_NS]
    windows = [one for one in state.gpm_samples.values() if host.now_ns - one.time_ns <= STALE_NS]
    for name, metric, text in DEVICE_GAUGES:
        yield _gauge(host, metric, text, ((one.uuid, getattr(one, name)) for one in fresh))
    for name, metric, text in GPM_GAUGES:
        yield _gauge(host, metric, text, ((one.uuid, getattr(one.gpm, name)) for one in windows))
    energy = CounterMetricFamily(
        "gpuguard_device_energy_joules", "Energy since the driver was loaded.", labels=DEVICE_LABELS)
    for sample in fresh:
        if sample.energy_j is not None:
            energy.add_metric(_device(host, sample.uuid), sample.energy_j)
    yield energy
    yield from _process_families(host)


def _gauge(host: Host, metric: str, text: str, values: Iterable[tuple[str, float | None]]) -> Metric:
    """Return one gauge by device; what is not known has no sample."""
    gauge = GaugeMetricFamily(metric, text, labels=DEVICE_LABELS)
    for uuid, value in values:
        if value is not None:
            gauge.add_metric(_device(host, uuid), value)
    return gauge


def _process_families(host: Host) -> Iterator[Metric]:
    memory: Counter[tuple[str, ...]] = Counter()
    count: Counter[tuple[str, ...]] = Counter()
    for sample in host.process_samples.values():
        if host.now_ns - sample.time_ns > STALE_NS or host.processes.has_ended(sample.process):
            continue
        brief = host.processes.brief(sample.process)
        whose = (_label(brief.user), _label(brief.context.slurm_job_id), _label(brief.context.pod_uid))
        key: tuple[str, ...] = (*_device(host, sample.uuid), *whose)
        if key not in count and len(count) >= SERIES_MAX:
            key = (*_device(host, sample.uuid), "other", "", "")
        count[key] += 1
        if sample.memory_used_bytes is not None:
            memory[key] += sample.memory_used_bytes
    processes = GaugeMetricFamily(
        "gpuguard_processes", "Processes that hold the device.", labels=PROCESS_LABELS)
    used = GaugeMetricFamily(
        "gpuguard_process_gpu_memory_bytes", "Device memory that these processes hold.", labels=PROCESS_LABELS)
    for labels, number in sorted(count.items()):
        processes.add_metric(labels, number)
    for labels, held in sorted(memory.items()):
        used.add_metric(labels, held)
    yield from (processes, used)


def _device(host: Host, uuid: str) -> tuple[str, str]:
    device = host.devices.get(uuid)
    return (str(device.index) if device else "", _label(uuid))


def _label(text: str) -> str:
    """Return text that UTF-8 can hold: a process names itself in whatever bytes it likes."""
    return text.encode("utf-8", "replace").decode()[:256]


def _version() -> str:
    try:
        return metadata.version("gpuguard")
    except metadata.PackageNotFoundError:
        return ""  # run from a checkout that was never installed


class Metrics:
    """Takes what passes through the guard; gives it to a scrape, a file, or whoever asks."""

    def __init__(self) -> None:
        self._state = State()
        self._version = _version()
        self._lock = threading.Lock()
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)

    def receive(self, item: Event | Block) -> None:
        """Add one block or event; may be called from one thread while others read."""
        with self._lock:
            take(self._state, item)

    def sensor(self, name: str, *, up: bool) -> None:
        """Say that an eye was opened or closed."""
        with self._lock:
            if name in self._state.sensors or len(self._state.sensors) < SENSORS_MAX:
                self._state.sensors[name] = up

    def collect(self) -> list[Metric]:
        """Return all metrics, those of this process among them: prometheus_client calls it at each scrape."""
        with self._lock:
            found = families(self._state)
        build = InfoMetricFamily("gpuguard_build", "What runs.")
        build.add_metric((), {"version": self._version, "python": platform.python_version()})
        cpu = CounterMetricFamily("gpuguard_self_cpu_seconds", "CPU time of the guard process.", time.process_time())
        return [build, cpu, *found]

    def render(self) -> bytes:
        """Return the text exposition format, version 0.0.4."""
        return generate_latest(self._registry)

    def write_textfile(self, path: Path) -> None:
        """Write the metrics for node_exporter's textfile collector, in one rename; raises `OSError`."""
        write_to_textfile(os.fspath(path), self._registry)

    def serve(self, listen: str) -> tuple[WSGIServer, threading.Thread]:
        """Answer scrapes on ``address:port``; raises `ValueError` for an address that is not of this host alone."""
        address, _, port = listen.rpartition(":")
        if not ipaddress.ip_address(address.strip("[]")).is_loopback:
            raise ValueError(f"{listen}: metrics are served without a password, so on a loopback address only")
        return start_http_server(int(port), address.strip("[]"), self._registry)
