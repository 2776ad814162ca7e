from __future__ import annotations

import pytest

from gpuguard.core.subjects import context_of
from tests.core.builders import SPAN, TRACE

CONTAINER = "3f" * 32
POD = "0a1b2c3d-1111-2222-3333-444455556666"


@pytest.mark.parametrize(
    ("cgroup", "field", "value"),
    [
        (f"/system.slice/docker-{CONTAINER}.scope", "container_id", CONTAINER),
        (f"/docker/{CONTAINER}", "container_id", CONTAINER),
        (f"/kubepods.slice/kubepods-pod{POD.replace('-', '_')}.slice/cri-containerd-{CONTAINER}.scope", "pod_uid", POD),
        (f"/kubepods/burstable/pod{POD}/{CONTAINER}", "pod_uid", POD),
        ("/system.slice/slurmstepd.scope/job_4711/step_0/user/task_0", "slurm_job_id", "4711"),
        ("/user.slice/user-1000.slice/session-3.scope", "container_id", ""),
        ("/system.slice/my-job_12x", "slurm_job_id", ""),
        ("", "pod_uid", ""),
    ],
)
def test_cgroup_paths(cgroup: str, field: str, value: str) -> None:
    assert getattr(context_of(cgroup, {}), field) == value


def test_traceparent() -> None:
    context = context_of("/", {"TRACEPARENT": f"00-{TRACE}-{SPAN}-01"})
    assert (context.trace_id, context.span_id) == (TRACE, SPAN)
    for wrong in ("", "00-xyz", f"00-{TRACE}-{SPAN}", f"00-{TRACE.upper()}-{SPAN}-01"):
        assert context_of("/", {"TRACEPARENT": wrong}).trace_id == ""


def test_sandbox() -> None:
    assert context_of("/", {"ROCK_SANDBOX_ID": "", "OPENSANDBOX_SANDBOX_ID": "s-1"}).sandbox_id == "s-1"
