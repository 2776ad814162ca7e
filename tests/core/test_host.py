from __future__ import annotations

import pytest

from gpuguard.core import host as host_module
from gpuguard.core.host import Host
from gpuguard.core.records import KernelName
from tests.core.builders import T0, pid


def test_a_process_that_looks_up_names_without_end_pushes_out_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_module, "KERNELS_MAX", 8)
    host = Host()
    for who, names in ((5, 3), (6, 20)):
        for n in range(names):
            host.receive(KernelName(time_ns=T0, process=pid(who), kernel=n, name=f"k{n}"))
    assert [host.kernel_name(pid(5), n) is not None for n in range(3)] == [True] * 3
    assert [n for n in range(20) if host.kernel_name(pid(6), n)] == [15, 16, 17, 18, 19]
    assert host.evicted()["kernel names"] == 15
    host.forget(pid(6))
    assert host.kernel_name(pid(6), 19) is None
