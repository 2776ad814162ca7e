from __future__ import annotations

import numpy as np
import pytest

from gpuguard.core.detectors.code import LAUNCHES_MIN, Detector
from gpuguard.core.host import Host
from gpuguard.core.records import LAUNCH, HostInfo, KernelCode, KernelName, Launches, ModuleVerdict
from tests.core.builders import BOOT, SECOND, T0, pid

HASH = KernelCode(name="k0", label="mining", probability=0.99, nats=6.5, text="the mix of hashing")
SHA = "ab" * 32


def host() -> Host:
    one = Host()
    one.receive(HostInfo(time_ns=T0, schema_version=1, boot_id=BOOT, hostname="h", clock_ticks_per_s=100))
    one.receive(KernelName(time_ns=T0, process=pid(5), kernel=1, name="k0", code_sha256=SHA))
    one.receive(KernelName(time_ns=T0, process=pid(5), kernel=2, name="k1", code_sha256=SHA))
    return one


def launches(**counts: int) -> Launches:
    rows = np.zeros(len(counts), LAUNCH)
    rows["pid"], rows["start_ticks"] = 5, 5
    rows["kernel"] = [int(name[1:]) for name in counts]
    rows["launches"] = list(counts.values())
    rows["first_ns"], rows["last_ns"] = T0, T0 + SECOND
    return Launches(time_ns=T0 + SECOND, rows=rows)


def verdict(*accused: KernelCode) -> ModuleVerdict:
    return ModuleVerdict(time_ns=T0, sha256=SHA, judged=2, accused=accused)


def test_hashing_code_that_is_launched_weighs_once() -> None:
    detector = Detector()
    assert detector.receive(verdict(HASH), host()) == []
    (said,) = detector.receive(launches(k1=LAUNCHES_MIN), host())
    assert (said.subject, said.evidence_class, said.nats) == (pid(5), "code", 6.5)
    assert "100%" in said.text
    assert detector.receive(launches(k1=1000), host()) == []


def test_it_is_the_launches_that_count_not_the_loading() -> None:
    detector = Detector()
    detector.receive(verdict(HASH), host())
    assert detector.receive(launches(k2=10_000), host()) == []
    assert detector.receive(launches(k1=LAUNCHES_MIN - 1), host()) == [], "too few"
    assert detector.receive(launches(k1=500), host()) == [], "a twentieth of what it launches"
    assert len(detector.receive(launches(k1=10_000), host())) == 1


def test_a_heavier_kernel_adds_only_what_it_weighs_more() -> None:
    detector = Detector()
    heavier = KernelCode(name="k1", label="mining", probability=1.0, nats=9.0, text="SHA-256 round constants")
    detector.receive(verdict(HASH, heavier), host())
    assert [one.nats for one in detector.receive(launches(k1=100, k2=100), host())] == [6.5, 2.5]


@pytest.mark.parametrize("label", ["cracking", "grey:crc", "benign", "unknown"])
def test_other_labels_accuse_nobody_of_mining(label: str) -> None:
    detector = Detector()
    detector.receive(verdict(KernelCode(name="k0", label=label, probability=1.0, nats=7.0, text="")), host())
    assert detector.receive(launches(k1=1000), host()) == []


def test_a_kernel_without_a_known_name_is_not_guessed() -> None:
    detector = Detector()
    detector.receive(verdict(HASH), host())
    assert detector.receive(launches(k9=1000), host()) == []


def test_however_the_rows_are_cut_the_sum_is_the_same() -> None:
    whole, parts = Detector(), Detector()
    block = launches(k1=20, k2=30)
    for one in (whole, parts):
        one.receive(verdict(HASH), host())
    together = whole.receive(block, host())
    apart = [e for row in range(2) for e in parts.receive(
        Launches(time_ns=block.time_ns, rows=block.rows[row : row + 1]), host())]
    assert together == apart
