"""Metrics: the text that a scrape gets, and what must never be in it."""

from __future__ import annotations

import re
import urllib.request

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from gpuguard.core.events import Decision, Finding, Incident
from gpuguard.core.records import (
    PACKET,
    ActionOutcome,
    Approval,
    Device,
    DeviceSample,
    Gap,
    Gpm,
    Packets,
    ProcessExited,
    ProcessSample,
    ProcessStarted,
)
from gpuguard.core.subjects import ProcessId
from gpuguard.outputs import prometheus
from gpuguard.outputs.prometheus import Metrics, State, families, take

SECOND = 1_000_000_000
WHO = ProcessId("boot", 4242, 1)


def finding(identity, verdict, label="mining"):
    return Finding(
        time_ns=SECOND, id=identity, subject=WHO, verdict=verdict, label=label, carrier="", probability=0.5, nats=1.0,
        start_ns=0, decided_after_s=1.0, evidence=(), counter_evidence=(), process=None, tool_call=None, trace_id="")


def decision(identity, *, needs_approval):
    return Decision(
        time_ns=SECOND, id=identity, incident_id="i", finding_id="f", rung="kill", mode="enforce",
        needs_approval=needs_approval, target=None, ttl_s=1.0, reason="", rule="")


def incident(identity, state):
    return Incident(
        time_ns=SECOND, id=identity, state=state, start_ns=0, title="", story="", verdict="confirmed", findings=(),
        tool_calls=(), processes=(), decisions=())


def samples(metrics):
    text = metrics.render().decode()
    return {
        (one.name, tuple(sorted(one.labels.items()))): one.value
        for family in text_string_to_metric_families(text) for one in family.samples
    }


def value(metrics, name, **labels):
    return samples(metrics).get((name, tuple(sorted(labels.items()))))


def fed(*items):
    metrics = Metrics()
    for item in items:
        metrics.receive(item)
    return metrics


def test_a_finding_counts_once_for_each_verdict_that_it_comes_to():
    metrics = fed(finding("a", "suspect"), finding("a", "suspect"), finding("a", "confirmed"), finding("b", "suspect"))
    assert value(metrics, "gpuguard_findings_total", label="mining", verdict="suspect") == 2
    assert value(metrics, "gpuguard_findings_total", label="mining", verdict="confirmed") == 1


def test_actions_and_approvals():
    metrics = fed(decision("a", needs_approval=True), decision("b", needs_approval=True),
                  decision("c", needs_approval=False), decision("d", needs_approval=True))
    assert value(metrics, "gpuguard_approvals_pending") == 3
    metrics.receive(Approval(SECOND, "a", "reject", "me"))
    metrics.receive(ActionOutcome(SECOND, "b", "kill", "expired", ""))
    metrics.receive(ActionOutcome(SECOND, "c", "pause", "would_have", ""))
    assert value(metrics, "gpuguard_approvals_pending") == 1
    assert value(metrics, "gpuguard_actions_total", action="kill", outcome="expired", mode="enforce") == 1
    assert value(metrics, "gpuguard_actions_total", action="pause", outcome="would_have", mode="observe") == 1


def test_incidents_open_and_close():
    metrics = fed(incident("a", "open"), incident("b", "open"), incident("a", "closed"))
    assert value(metrics, "gpuguard_incidents_open", verdict="confirmed") == 1


def test_sensors_gaps_and_losses():
    full, unknown = Gap(SECOND, "packets", "full", lost=7), Gap(SECOND, "packets", "full", lost=None)
    metrics = fed(full, unknown, Gap(SECOND, "nvml", "x"))
    metrics.sensor("packets", up=True)
    metrics.sensor("nvml", up=False)
    assert value(metrics, "gpuguard_sensor_up", sensor="packets") == 1
    assert value(metrics, "gpuguard_sensor_up", sensor="nvml") == 0
    assert value(metrics, "gpuguard_gaps_total", sensor="packets") == 2
    assert value(metrics, "gpuguard_dropped_records_total", sensor="packets") == 7
    assert value(metrics, "gpuguard_last_record_timestamp_seconds") == 1.0


def test_packets_and_those_that_were_met_twice():
    rows = np.zeros(3, PACKET)
    metrics = fed(Packets(SECOND, 0, rows), Packets(SECOND, 0, rows[:2], met_again=4))
    assert value(metrics, "gpuguard_packets_total") == 5
    assert value(metrics, "gpuguard_packets_met_again_total") == 4


def started(process, *, user="alice", cgroup="/slurm/uid_1/job_77/step_0"):
    return ProcessStarted(SECOND, process, None, "train", ("train",), user=user, cgroup=cgroup)


def test_devices_and_processes_without_pids():
    other = ProcessId("boot", 4243, 1)
    metrics = fed(
        Device(SECOND, "GPU-a", 0, 'NVIDIA "H100"', driver_version="580"), started(WHO), started(other),
        DeviceSample(SECOND, "GPU-a", gpu_ratio=0.5, power_w=400.0, energy_j=12.0),
        ProcessSample(SECOND, WHO, "GPU-a", 100), ProcessSample(SECOND, other, "GPU-a", 23))
    assert value(metrics, "gpuguard_device_power_watts", gpu="0", UUID="GPU-a") == 400.0
    assert value(metrics, "gpuguard_device_energy_joules_total", gpu="0", UUID="GPU-a") == 12.0
    assert value(metrics, "gpuguard_device_temperature_celsius", gpu="0", UUID="GPU-a") is None
    whose = {"gpu": "0", "UUID": "GPU-a", "user": "alice", "slurm_job_id": "77", "pod_uid": ""}
    assert value(metrics, "gpuguard_process_gpu_memory_bytes", **whose) == 123
    assert value(metrics, "gpuguard_processes", **whose) == 2
    assert b"4242" not in metrics.render()
    metrics.receive(ProcessExited(SECOND, other))
    assert value(metrics, "gpuguard_process_gpu_memory_bytes", **whose) == 100


def test_performance_metrics_are_kept_until_the_next_window():
    metrics = fed(
        Device(SECOND, "MIG-1", 0, "NVIDIA H100 MIG 1g.10gb", parent_uuid="GPU-a", gpu_instance_id=3),
        DeviceSample(SECOND, "MIG-1", nvlink_tx_bytes_per_s=7, gpm=Gpm(10**8, tensor_imma_ratio=0.8)),
        DeviceSample(SECOND + 1, "MIG-1", power_capped_ratio=0.25))
    assert value(metrics, "gpuguard_device_tensor_imma_active_ratio", gpu="0", UUID="MIG-1") == 0.8
    assert value(metrics, "gpuguard_device_tensor_hmma_active_ratio", gpu="0", UUID="MIG-1") is None
    assert value(metrics, "gpuguard_device_power_capped_ratio", gpu="0", UUID="MIG-1") == 0.25
    assert value(metrics, "gpuguard_device_nvlink_transmit_bytes_per_second", gpu="0", UUID="MIG-1") is None
    assert b'gpu_instance="3"' in metrics.render()
    assert b'parent="GPU-a"' in metrics.render()
    metrics.receive(DeviceSample(SECOND + prometheus.STALE_NS + 1, "MIG-1"))
    assert value(metrics, "gpuguard_device_tensor_imma_active_ratio", gpu="0", UUID="MIG-1") is None


def test_what_is_gone_has_no_sample():
    metrics = fed(DeviceSample(SECOND, "GPU-a", power_w=400.0), ProcessSample(SECOND, WHO, "GPU-a", 1))
    metrics.receive(DeviceSample(SECOND + prometheus.STALE_NS + 1, "GPU-b", power_w=1.0))
    assert value(metrics, "gpuguard_device_power_watts", gpu="", UUID="GPU-a") is None
    assert value(metrics, "gpuguard_device_power_watts", gpu="", UUID="GPU-b") == 1.0
    assert b"gpuguard_process_gpu_memory_bytes{" not in metrics.render()


def test_users_by_the_thousand_are_one_series(monkeypatch):
    monkeypatch.setattr(prometheus, "SERIES_MAX", 3)
    metrics = Metrics()
    for pid in range(10):
        process = ProcessId("boot", pid, 1)
        metrics.receive(started(process, user=f"user{pid}", cgroup=""))
        metrics.receive(ProcessSample(SECOND, process, "GPU-a", 1))
    text = metrics.render().decode()
    assert len(re.findall(r"^gpuguard_process_gpu_memory_bytes\{", text, re.MULTILINE)) == 4
    other = {"gpu": "", "UUID": "GPU-a", "user": "other", "slurm_job_id": "", "pod_uid": ""}
    assert value(metrics, "gpuguard_processes", **other) == 7


def test_the_text_keeps_the_rules_of_the_format():
    metrics = fed(finding("a", "suspect"), Gap(SECOND, "nvml", "x"), DeviceSample(SECOND, "GPU-a", power_w=1.0))
    text = metrics.render().decode()
    assert text.endswith("\n")
    for family in text_string_to_metric_families(text):
        assert family.name.startswith("gpuguard_")
        assert family.documentation.endswith(".")
        for one in family.samples:
            assert family.type != "counter" or one.name.endswith("_total")
            assert not set(one.labels) & {"pid", "cmdline", "hostname", "destination"}
    typed = re.findall(r"^# TYPE (\S+)", text, re.MULTILINE)
    assert len(typed) == len(set(typed)) > 20
    build = re.search(r"^gpuguard_build_info\{(.*)\} 1\.0$", text, re.MULTILINE)
    assert "version=" in build.group(1)


@given(st.text(st.characters(exclude_categories=())), st.text(st.characters(exclude_categories=())))
def test_hostile_names_never_break_the_text(user, sensor):
    metrics = fed(started(WHO, user=user), ProcessSample(SECOND, WHO, "GPU-a", 1), Gap(SECOND, sensor, "x"))
    list(text_string_to_metric_families(metrics.render().decode()))


def test_the_same_state_gives_the_same_metrics():
    def made():
        state = State()
        for item in (finding("a", "suspect"), Gap(SECOND, "nvml", "x"), DeviceSample(SECOND, "GPU-a", power_w=1.0)):
            take(state, item)
        return families(state)

    assert made() == made()


def test_the_textfile_appears_whole(tmp_path):
    path = tmp_path / "gpuguard.prom"
    fed(finding("a", "suspect")).write_textfile(path)
    assert 'gpuguard_findings_total{label="mining",verdict="suspect"} 1.0' in path.read_text()
    assert list(tmp_path.iterdir()) == [path]


def test_the_endpoint_is_of_this_host_alone():
    metrics = fed(finding("a", "suspect"))
    with pytest.raises(ValueError, match="loopback"):
        metrics.serve("0.0.0.0:0")
    server, thread = metrics.serve("127.0.0.1:0")
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{server.server_port}/metrics", timeout=100) as answer:
            assert answer.headers["Content-Type"].startswith("text/plain")
            assert b"gpuguard_findings_total" in answer.read()
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_processes_that_ended_take_no_room():
    state = State()
    for number in range(2_000):
        one = ProcessId(boot_id="b", pid=number, start_ticks=number)
        take(state, ProcessStarted(time_ns=number, process=one, parent=None, name="true", argv=("true",)))
        take(state, ProcessExited(time_ns=number, process=one))
    processes = state.host.processes
    assert len(processes.started) == len(processes.exited) == 0
