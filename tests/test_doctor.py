"""The doctor tries for real, says what is missing, and leaves nothing behind."""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from gpuguard import confine, doctor
from gpuguard.cli import main
from gpuguard.config import (
    Config,
    LaunchSettings,
    NvmlSettings,
    PacketSettings,
    ProcessSettings,
    SocketSettings,
    ToolCallSettings,
)
from gpuguard.doctor import Check, Result, exit_status, fitting_extra
from tests.standins.libnvidia_ml.build import build

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def places(tmp_path, monkeypatch):
    for name in ("STATE", "RUNTIME", "LOG"):
        monkeypatch.setenv(f"GPUGUARD_{name}_DIR", str(tmp_path / name.lower()))
    monkeypatch.delenv("GPUGUARD_CONFIG", raising=False)


def in_namespaces(*flags):
    """Run the doctor inside new namespaces; return its checks by name, and its exit status."""
    command = ["unshare", *flags, sys.executable, "-m", "gpuguard", "doctor", "-o", "json"]
    if shutil.which("unshare") is None or subprocess.run(["unshare", *flags, "true"], check=False).returncode:
        pytest.skip(f"this host does not allow unshare {' '.join(flags)}")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.stderr == ""
    answer = json.loads(done.stdout)
    return {one["name"]: one for one in answer["checks"]}, done.returncode


@pytest.mark.parametrize(("rules", "state"), [
    (("net 10.8.0.0/16 tcp port 2049",), "open"),
    (("net 10.8.0.0/16 tcp port 2049", "port 4420"), "degraded"),
])
def test_what_the_packet_eye_is_blind_to_is_said(rules, state):
    found = doctor.packets(Config(packets=PacketSettings(ignore=rules)))
    if found.state == "closed":
        pytest.skip(f"no packet socket here: {found.detail}")
    assert found.state == state
    assert f"blind to {'; '.join(rules)}" in found.detail


def test_rings_that_the_broker_would_refuse_for_their_size_are_said():
    found = doctor.packets(Config(packets=PacketSettings(interfaces=("lo",), ring_bytes=1 << 30, rings=8)))
    assert found.state == "closed"
    if "lower packets.rings" not in found.remedy:
        pytest.skip(f"no packet socket here: {found.detail}")
    assert found.detail == "8 rings of 1024 MiB are more than the 4096 MiB they may have in all"


def test_every_check_comes_to_a_result_with_its_remedy():
    checks = doctor.examine()
    assert [check.name for check in checks] == ["settings", *(name for name, _, _ in doctor.CHECKS)]
    for check in checks:
        assert "check itself failed" not in check.detail, check
        assert check.detail
        assert check.remedy or check.state == "open", check


def test_nothing_is_left_behind(tmp_path):
    doctor.examine()  # what is imported once stays open
    before, files = sorted(os.listdir("/proc/self/fd")), sorted(tmp_path.rglob("*"))
    doctor.examine()
    assert sorted(os.listdir("/proc/self/fd")) == before
    assert sorted(tmp_path.rglob("*")) == files == []


def test_without_rights_it_says_which_are_missing():
    checks, status = in_namespaces("--user")
    assert checks["packets (AF_PACKET)"]["state"] == "closed"
    assert "CAP_NET_RAW" in checks["packets (AF_PACKET)"]["remedy"]
    assert checks["launches (eBPF)"]["state"] == "closed"
    assert checks["processes"]["state"] == "degraded"
    assert "polling" in checks["processes"]["detail"]
    assert checks["isolate (nf_tables)"]["state"] == "closed"
    assert checks["kill (pidfd)"]["state"] == "degraded"
    assert checks["state"]["state"] == "open"
    assert status == 1


def test_inside_the_namespaces_of_the_lab():
    checks, status = in_namespaces("--user", "--map-root-user", "--net", "--pid", "--fork", "--mount-proc")
    assert checks["packets (AF_PACKET)"]["state"] == "open"
    assert checks["isolate (nf_tables)"]["state"] in ("open", "closed")
    assert checks["sockets (INET_DIAG)"]["state"] == "open"
    assert checks["launches (eBPF)"]["state"] == "closed"
    assert status == 1


def test_a_full_disk_means_that_the_guard_cannot_run(tmp_path):
    script = (
        'mount -t tmpfs -o size=8k none "$1" && { head -c 100k /dev/zero > "$1/fill" 2>/dev/null; '
        'GPUGUARD_STATE_DIR="$1" exec "$2" -m gpuguard doctor -o json; }')
    (tmp_path / "full").mkdir()
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, "sh"]
    done = subprocess.run(
        [*command, str(tmp_path / "full"), sys.executable], cwd=ROOT, capture_output=True, text=True, check=False)
    if not done.stdout:
        pytest.skip("this host does not allow a tmpfs in a user namespace")
    state = next(one for one in json.loads(done.stdout)["checks"] if one["name"] == "state")
    assert (state["state"], state["remedy"]) == ("closed", "free some space")
    assert done.returncode == 3


def test_a_folder_that_is_a_file(tmp_path):
    (tmp_path / "state").write_text("")
    assert doctor.state(Config()).state == "closed"


def test_a_broken_audit_chain_is_told(tmp_path):
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / "audit-000000000001.jsonl").write_text("{}\n")
    result = doctor.audit(Config())
    assert result.state == "degraded"
    assert "audit-000000000001.jsonl:1" in result.detail


def test_settings_that_cannot_be_used_stop_everything(tmp_path, monkeypatch):
    path = tmp_path / "gpuguard.toml"
    path.write_text("[nvml]\nrate = 1\n")
    monkeypatch.setenv("GPUGUARD_CONFIG", str(path))
    result = CliRunner().invoke(main, ["doctor", "-o", "json"])
    assert result.exit_code == 3
    assert json.loads(result.output)["summary"]["closed"] == ["settings"]


def test_a_table_for_people():
    result = CliRunner().invoke(main, ["doctor"])
    assert result.exit_code in (0, 1)
    for name, _, _ in doctor.CHECKS:
        assert name in result.output


@pytest.mark.parametrize(("name", "config"), [
    ("nvml", Config(nvml=NvmlSettings(enabled=False))),
    ("launches", Config(launches=LaunchSettings(enabled=False))),
    ("packets", Config(packets=PacketSettings(enabled=False))),
    ("processes", Config(processes=ProcessSettings(enabled=False))),
    ("sockets", Config(sockets=SocketSettings(enabled=False))),
    ("toolcalls", Config(toolcalls=ToolCallSettings(enabled=False))),
])
def test_what_is_turned_off_is_off(name, config):
    assert getattr(doctor, name)(config) == Result("off", f"{name}.enabled is false")


def test_a_port_that_somebody_holds():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen(1)
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        result = doctor.toolcalls(Config(toolcalls=ToolCallSettings(otlp_listen=listen)))
    assert result.state == "closed"
    assert os.strerror(errno.EADDRINUSE) in result.detail
    assert doctor.toolcalls(Config(toolcalls=ToolCallSettings(otlp_listen=listen))).state == "open"
    for listen in ("", "nonsense", "127.0.0.1:99999", "127.0.0.1:"):
        assert doctor.toolcalls(Config(toolcalls=ToolCallSettings(otlp_listen=listen))).state == "closed"


def test_an_old_kernel(monkeypatch):
    monkeypatch.setattr(doctor, "kernel", lambda: (5, 14))
    assert doctor.launches(Config()).remedy == "Linux 5.15, better 6.6"


def test_polling_by_choice_is_no_fault():
    assert doctor.processes(Config(processes=ProcessSettings(source="polling"))).state == "open"


@pytest.mark.parametrize(("driver", "extra"), [
    ("580.95.05", "cuda13"), ("570.1", "cuda12"), ("525.60.13", "cuda12"), ("470.1", ""), ("", ""), ("unknown", "")])
def test_the_extra_that_fits_the_driver(driver, extra):
    assert fitting_extra(driver).endswith(f"gpuguard[{extra}]" if extra else "")
    assert bool(fitting_extra(driver)) == bool(extra)


def checks(**states):
    return [Check(name, name.split("_")[0], state, "") for name, state in states.items()]


@pytest.mark.parametrize(("states", "enforcing", "status"), [
    ({"eye_a": "open", "eye_b": "off", "act_a": "closed", "store_a": "open"}, False, 0),
    ({"eye_a": "open", "act_a": "closed"}, True, 1),
    ({"eye_a": "degraded"}, False, 1),
    ({"eye_a": "closed"}, False, 1),
    ({"eye_a": "open", "store_a": "degraded"}, False, 0),
    ({"eye_a": "open", "store_a": "closed"}, False, 3),
])
def test_exit_status(states, enforcing, status):
    assert exit_status(checks(**states), enforcing=enforcing) == status


def test_the_driver_of_this_host_or_the_stand_in(tmp_path, monkeypatch):
    if shutil.which("cc") is None:
        pytest.skip("no C compiler: the stand-in driver cannot be built")
    library = build(tmp_path / "standin")
    script = tmp_path / "script"
    monkeypatch.setenv("LD_LIBRARY_PATH", str(library.parent))
    monkeypatch.setenv("GPUGUARD_STANDIN_NVML_SCRIPT", str(script))
    script.write_text("driver 580.95.05\ndevice 0 name NVIDIA H100\ndevice 1 name NVIDIA H100\n")
    result = doctor.nvml(Config())
    assert (result.state, result.detail.split(";")[0]) == ("open", "2 x NVIDIA H100, driver 580.95.05")
    assert "cuda13" in result.detail
    script.write_text("driver 535.1\ndevice 0 name A\ndevice 1 name B\nfail 0 gpu_lost device 1\n")
    result = doctor.nvml(Config())
    assert result.state == "degraded"
    assert result.detail.startswith("1 x A, driver 535.1")
    assert "1 GPUs do not answer" in result.detail
    script.write_text("""cc 1
device 0 gpm 1 mig 1 virtualization 3 name NVIDIA H100
at 0 device 0 mem_temperature 60
device 1 parent 0 gi 1 uuid MIG-1 name NVIDIA H100 MIG 1g.10gb
""")
    result = doctor.nvml(Config())
    assert result.state == "open"
    assert result.detail.split("; ")[2:] == [
        "GPM on 1 of 1", "1 MIG instances", "host_vgpu: some counters are the host's alone",
        "confidential computing: performance counters are off"]
    script.write_text("device 0 gpm 1 name NVIDIA H100\nrefuse nvmlGpmSampleGet no_permission\n")
    result = doctor.nvml(Config())
    assert result.state == "degraded"
    assert "GPM on 0 of 1; without GPM, memory temperature" in result.detail
    assert "NVreg_RestrictProfilingToAdminUsers=0" in result.remedy
    script.write_text("driver 535.1\nfail 0 mismatch\n")
    assert doctor.nvml(Config()) == Result(
        "closed", "library and kernel driver are of different versions", "reboot, or reload the module")
    script.unlink()
    assert "modprobe" in doctor.nvml(Config()).remedy


def test_a_driver_that_crashes_or_hangs_takes_nobody_with_it(monkeypatch):
    monkeypatch.setattr(doctor, "_NVML_CHILD", "import os; os.abort()")
    assert doctor.nvml(Config()).detail.startswith("the driver's library failed")
    monkeypatch.setattr(doctor, "_NVML_CHILD", "import time; time.sleep(600)")
    monkeypatch.setattr(doctor, "NVML_TIMEOUT_S", 0.2)
    assert "has not answered" in doctor.nvml(Config()).detail


def test_the_wrong_distribution_is_named(monkeypatch):
    monkeypatch.setattr(doctor.metadata, "version", lambda name: "12.0.0")
    assert "pip uninstall pynvml (12.0.0)" in doctor.pynvml_squatter()


@pytest.mark.parametrize(("ids", "state", "said"), [
    (None, "open", "as the broker"), ((990, 990), "open", "gpuguard (uid 990)"),
    ((65534, 65534), "degraded", "nobody: what else runs as nobody"), ((4711, 4711), "degraded", "uid 4711: what"),
])
def test_a_user_that_others_run_as_is_no_user_for_the_guard(monkeypatch, ids, state, said):
    users = {990: "gpuguard", 65534: "nobody"}

    def known(uid):
        return SimpleNamespace(pw_name=users[uid])

    monkeypatch.setattr(confine, "guard_identity", lambda: ids)
    monkeypatch.setattr(doctor.pwd, "getpwuid", known)
    found = doctor.identity(Config())
    assert found.state == state
    assert said in found.detail
    assert ("useradd --system" in found.remedy) == (state == "degraded")


def test_a_kernel_without_types_is_not_told_to_be_root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "KERNEL_TYPES", tmp_path / "vmlinux")
    assert "CONFIG_DEBUG_INFO_BTF" in doctor._what_bpf_needs()
    (tmp_path / "vmlinux").touch()
    assert doctor._what_bpf_needs() == "CAP_BPF and CAP_PERFMON, or root"
