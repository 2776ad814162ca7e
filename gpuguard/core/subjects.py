"""Who a record or a piece of evidence is about.

A pid alone names nobody: pids are reused within seconds on a busy host. A process is its pid, its start time and the
boot it lived in; a flow is its five-tuple in one network namespace and the time of its first packet.
"""

from __future__ import annotations

import functools
import re
from typing import TYPE_CHECKING

from msgspec import Struct

if TYPE_CHECKING:
    from collections.abc import Mapping


class ProcessId(Struct, frozen=True, order=True, tag="process"):
    """One process of one boot.

    ``start_ticks`` is field 22 (starttime) of ``/proc/PID/stat``, in clock ticks since boot, proc(5).
    ``pid`` is the pid in the initial pid namespace of the guard.
    """

    boot_id: str
    pid: int
    start_ticks: int

    def __str__(self) -> str:
        return f"pid {self.pid}"


class FlowId(Struct, frozen=True, order=True, cache_hash=True, tag="flow"):
    """One transport conversation, named from the side that opened it.

    Addresses are text (RFC 5952 for IPv6); ``netns`` is the inode of the network namespace it was seen in, 0 for a
    capture file. The initiator sent the SYN; where no SYN was seen, it is the sender of the first packet and
    ``initiator_known`` is False: nothing may then be concluded from the direction.
    """

    netns: int
    protocol: int
    initiator: str
    initiator_port: int
    responder: str
    responder_port: int
    start_ns: int
    initiator_known: bool = True

    def __str__(self) -> str:
        return f"{self.initiator}:{self.initiator_port} -> {self.responder}:{self.responder_port}"


class DeviceId(Struct, frozen=True, order=True, tag="device"):
    """One GPU or MIG instance, by its NVML UUID."""

    uuid: str

    def __str__(self) -> str:
        return self.uuid


Subject = ProcessId | FlowId | DeviceId


class Context(Struct, frozen=True):
    """What a process belongs to, read from its cgroup path and from the listed environment variables.

    An empty string means that the host says nothing about it.
    """

    container_id: str = ""
    pod_uid: str = ""
    slurm_job_id: str = ""
    sandbox_id: str = ""
    trace_id: str = ""
    span_id: str = ""


NO_CONTEXT = Context()

# The only environment variables that ever leave the buffer in which /proc/PID/environ was read.
ENVIRON_LISTED = (
    "TRACEPARENT",
    "ROCK_SANDBOX_ID",
    "OPENSANDBOX_SANDBOX_ID",
    "GPUGUARD_SANDBOX_ID",
    "SLURM_JOB_ID",
    "SLURM_STEP_ID",
    "RAY_JOB_ID",
    "CUDA_VISIBLE_DEVICES",
    "CUDA_INJECTION64_PATH",
)

_CONTAINER = re.compile(r"(?:^|[/:-])([0-9a-f]{64})(?:\.scope)?(?:/|$)")
_POD = re.compile(r"pod([0-9a-f]{8}[-_][0-9a-f]{4}[-_][0-9a-f]{4}[-_][0-9a-f]{4}[-_][0-9a-f]{12})")
_SLURM = re.compile(r"/job_(\d+)(?:/|$)")
# W3C Trace Context, section 3.2: version-traceid-parentid-flags.
_TRACEPARENT = re.compile(r"^[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-[0-9a-f]{2}$")
_SANDBOX_VARIABLES = ("ROCK_SANDBOX_ID", "OPENSANDBOX_SANDBOX_ID", "GPUGUARD_SANDBOX_ID")


def context_of(cgroup: str, environ: Mapping[str, str]) -> Context:
    """Return what a process belongs to.

    Parameters
    ----------
    cgroup
        Path of the process in the cgroup v2 hierarchy (or the systemd one on a v1 host), as ``/proc/PID/cgroup`` says.
    environ
        Its listed environment variables only, see `ENVIRON_LISTED`. They are the process's own words: they serve to
        join records, never to clear anybody.
    """
    container, pod, slurm = _of_cgroup(cgroup)
    if not environ and not (container or pod or slurm):
        return NO_CONTEXT
    trace = _TRACEPARENT.match(environ.get("TRACEPARENT", ""))
    sandbox = next((environ[name] for name in _SANDBOX_VARIABLES if environ.get(name)), "")
    return Context(
        container_id=container,
        pod_uid=pod,
        slurm_job_id=slurm or environ.get("SLURM_JOB_ID", ""),
        sandbox_id=sandbox,
        trace_id=trace.group(1) if trace else "",
        span_id=trace.group(2) if trace else "",
    )


@functools.lru_cache(1_024)
def _of_cgroup(cgroup: str) -> tuple[str, str, str]:
    """Return container, pod and job that a path names. A host has few, and asks for those of each process again."""
    container, pod, slurm = _CONTAINER.search(cgroup), _POD.search(cgroup), _SLURM.search(cgroup)
    return (container.group(1) if container else "", pod.group(1).replace("_", "-") if pod else "",
            slurm.group(1) if slurm else "")
