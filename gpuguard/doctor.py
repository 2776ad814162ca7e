"""What works on this host and what does not, each with its remedy: ``gpuguard doctor``.

Every check makes the attempt that the guard or the broker would make, and gives the handle straight back: a socket is
opened, a program is loaded, a port is bound. Nothing on the host is changed: no rule is added, no process touched, no
file left. The sick driver is asked in a child process that can be given up. Each check is one function of the settings
and returns a `Result`; it runs as root, as a user, and inside a namespace, and says what it may do there.
"""

from __future__ import annotations

import errno
import json
import os
import pwd
import select
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from msgspec import Struct

from gpuguard import confine, packet_filter, paths

if TYPE_CHECKING:
    from collections.abc import Callable

    from gpuguard._launches import Programs
    from gpuguard.config import Config

State = Literal["open", "degraded", "closed", "off"]
Kind = Literal["eye", "act", "store"]

EXIT_OPEN, EXIT_CLOSED, EXIT_CANNOT_RUN = 0, 1, 3

NVML_TIMEOUT_S = 15.0
FREE_BYTES_MIN = 256 * 1024 * 1024
PROBE_BYTES = 4096
#: Links of perf uprobes carry a cookie since Linux 5.15 (bpf_cookie of BPF_LINK_CREATE).
PERF_COOKIE_SINCE = (5, 15)
CGROUP_FREEZE_SINCE = (5, 2)
#: First drivers that run CUDA 12 and CUDA 13 programs.
CUDA_13_DRIVER, CUDA_12_DRIVER = 580, 525

TPACKET_V3, SOL_PACKET, PACKET_VERSION = 2, 263, 10
NETLINK_NETFILTER, NLMSG_ERROR, NLM_F_REQUEST, NLM_F_DUMP = 12, 2, 1, 0x300
NFNL_SUBSYS_NFTABLES, NFT_MSG_GETTABLE = 10, 1
CLONE_NEWUSER = 0x10000000
KERNEL_TYPES = Path("/sys/kernel/btf/vmlinux")


class Result(Struct, frozen=True):
    """How one attempt went. ``remedy`` is what would open it, "" where it is open."""

    state: State
    detail: str
    remedy: str = ""


class Check(Struct, frozen=True):
    """One thing that was tried, and how it went: an eye, an act, or a place to keep things."""

    name: str
    kind: Kind
    state: State
    detail: str
    remedy: str = ""


# -- eyes -------------------------------------------------------------------------------------------------------------

# Run in a child: a driver that hangs takes only the child with it, and a library that crashes too.
_NVML_CHILD = """
import json
from gpuguard.sensors.nvml import remedy
from gpuguard.sensors.nvml.survey import survey
try:
    import pynvml
except ImportError as error:
    print(json.dumps({"closed": f"NVIDIA's binding is not installed ({error}): pip install nvidia-ml-py"}))
    raise SystemExit
try:
    print(json.dumps(survey(pynvml)))
except pynvml.NVMLError as error:
    print(json.dumps({"closed": remedy(error)}))
"""


def nvml(config: Config) -> Result:
    """Counters: the driver answers through NVIDIA's binding, and which CUDA extra fits it."""
    if not config.nvml.enabled:
        return Result("off", "nvml.enabled is false")
    try:
        done = subprocess.run(
            [sys.executable, "-c", _NVML_CHILD], capture_output=True, timeout=NVML_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return Result("closed", f"the driver has not answered for {NVML_TIMEOUT_S:.0f} s", "see dmesg for Xid")
    try:
        answer = json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        said = done.stderr.decode(errors="replace").strip().splitlines()
        return Result("closed", f"the driver's library failed: {said[-1] if said else done.returncode}")
    if "closed" in answer:
        why, _, what = answer["closed"].partition(": ")
        return Result("closed", why, what or "install the NVIDIA driver")
    return _nvml_answered(answer)


def _nvml_answered(answer: dict[str, object]) -> Result:
    names, driver = answer["names"], str(answer["driver"])
    if not isinstance(names, list) or not names:
        return Result("closed", f"driver {driver} lists no GPU that can be opened", "see dmesg for Xid")
    notes = answer["notes"]
    limits = f"; {'; '.join(map(str, notes))}" if isinstance(notes, list) else ""
    detail = f"{len(names)} x {names[0]}, driver {driver}{fitting_extra(driver)}{limits}"
    if answer["lost"]:
        return Result("degraded", f"{detail}; {answer['lost']} GPUs do not answer", "see dmesg for Xid")
    if squatter := pynvml_squatter():
        return Result("degraded", detail, squatter)
    if answer["remedy"]:
        return Result("degraded", detail, str(answer["remedy"]))
    return Result("open", detail)


def fitting_extra(driver: str) -> str:
    """Return which extra of this package fits a driver version, "" if none does."""
    major = int(leading_digits(driver) or 0)
    if major >= CUDA_13_DRIVER:
        return "; for GPU classification: gpuguard[cuda13]"
    return "; for GPU classification: gpuguard[cuda12]" if major >= CUDA_12_DRIVER else ""


def pynvml_squatter() -> str:
    """Return what to do about the distribution ``pynvml``, which overwrites nvidia-ml-py's module; "" if absent."""
    try:
        version = metadata.version("pynvml")
    except metadata.PackageNotFoundError:
        return ""
    return f"pip uninstall pynvml ({version}) && pip install --force-reinstall nvidia-ml-py: both own the module pynvml"


def launches(config: Config) -> Result:
    """Launches: the eBPF programs load, and a probe can be placed (on a file of our own that nobody runs)."""
    if not config.launches.enabled:
        return Result("off", "launches.enabled is false")
    if kernel() < PERF_COOKIE_SINCE:
        return Result("closed", f"Linux {os.uname().release} cannot tell probes apart", "Linux 5.15, better 6.6")
    from gpuguard.sensors import EyeClosed

    try:
        programs = _launch_programs()
    except (EyeClosed, ImportError) as error:
        return Result("closed", str(error), "install clang and libbpf-dev, then build again")
    except OSError as error:
        return Result("closed", f"the kernel refuses the programs: {error}", _what_bpf_needs())
    try:
        with tempfile.NamedTemporaryFile(prefix="gpuguard-doctor-") as file:
            file.write(bytes(PROBE_BYTES))
            file.flush()
            for link in programs.attach("on_entry", os.fsencode(file.name), [64], [0]):
                os.close(link)
    except OSError as error:
        return Result("closed", f"no probe can be placed: {error}", "CAP_PERFMON, or root")
    finally:
        programs.close()
    if programs.single:
        slow = f"programs load; Linux {os.uname().release} takes seconds to detach probes that are placed one by one"
        return Result("open", slow, "Linux 6.6 or later")
    return Result("open", f"programs load, uprobe_multi works (Linux {os.uname().release})")


def _launch_programs() -> Programs:
    """Load the programs of the launch eye; raises `EyeClosed`, ImportError and OSError."""
    from gpuguard.sensors import EyeClosed
    from gpuguard.sensors.launches.probe import OBJECT

    if not OBJECT.is_file():
        raise EyeClosed(f"{OBJECT.name} is missing: this build was made without clang")
    from gpuguard import _launches

    programs = _launches.Programs(str(OBJECT), 0)
    if not programs.has_multi():
        programs.close()
        programs = _launches.Programs(str(OBJECT), 0, single=True)
    return programs


def _what_bpf_needs() -> str:
    """Return what eBPF lacks: types of the kernel, which libbpf misses with ESRCH, else the right to load."""
    return "CAP_BPF and CAP_PERFMON, or root" if KERNEL_TYPES.exists() else (
        f"{KERNEL_TYPES}: a kernel with CONFIG_DEBUG_INFO_BTF, and sysfs mounted")


def packets(config: Config) -> Result:
    """Packets: an AF_PACKET socket with a version 3 ring can be opened."""
    if not config.packets.enabled:
        return Result("off", "packets.enabled is false")
    try:
        from gpuguard.sensors.packets import HELD_BYTES_MAX
    except ImportError as error:
        return Result("closed", f"the packet parser is not built: {error}", "make setup")
    try:
        # Protocol 0: it hears nothing.
        with socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, 0) as opened:
            opened.setsockopt(SOL_PACKET, PACKET_VERSION, TPACKET_V3)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EACCES):
            return Result("closed", f"{error.strerror}", "a kernel with CONFIG_PACKET")
        lab = "; the lab can run in a user namespace" if user_namespace() else ""
        return Result("closed", "not permitted here", f"CAP_NET_RAW, or start the broker as root{lab}")
    present = {name for _, name in socket.if_nameindex()}
    missing = [one for one in config.packets.interfaces if one not in present]
    if missing:
        return Result("degraded", f"no interface {', '.join(missing)}", "correct packets.interfaces")
    rings = config.packets.rings * (len(config.packets.interfaces) or 1)
    if rings * config.packets.ring_bytes > HELD_BYTES_MAX:
        return Result("closed", f"{rings} rings of {config.packets.ring_bytes >> 20} MiB are more than the "
                      f"{HELD_BYTES_MAX >> 20} MiB they may have in all", "lower packets.rings or packets.ring_bytes")
    where = "TPACKET_V3 on " + (", ".join(config.packets.interfaces) or "all interfaces")
    if config.packets.ignore:
        where += f", blind to {'; '.join(config.packets.ignore)}"
        if not all(packet_filter.parse(rule).network for rule in config.packets.ignore):
            return Result("degraded", where, "name the net in packets.ignore: every program may use a port")
    return Result("open", where)


def processes(config: Config) -> Result:
    """Processes: the best source of events that this host allows."""
    if not config.processes.enabled:
        return Result("off", "processes.enabled is false")
    from gpuguard.messages import Opened, OpenProcesses
    from gpuguard.sensors import processes as sensor

    answer, descriptors = sensor.grant(OpenProcesses(source=config.processes.source))
    for descriptor in descriptors:
        os.close(descriptor)
    sensor.release()
    if not isinstance(answer, Opened):
        return Result("closed", str(getattr(answer, "reason", answer)), "processes.source = auto, or root")
    if answer.mode.startswith("polling"):
        chosen = config.processes.source == "polling"
        remedy = "" if chosen else f"{_what_bpf_needs()}, for exec and exit events"
        return Result("open" if chosen else "degraded", answer.mode, remedy)
    if "connects" not in answer.descriptors:
        return Result("degraded", f"events by {answer.mode}; who dialled what ended at once is not told",
                      "processes.source = auto, with CAP_BPF and CAP_PERFMON, or root")
    return Result("open", f"events by {answer.mode}, and who dials")


def sockets(config: Config) -> Result:
    """Sockets: INET_DIAG answers, and the owners of other users' sockets can be read."""
    if not config.sockets.enabled:
        return Result("off", "sockets.enabled is false")
    from gpuguard.netlink import Diagnosis

    try:
        diagnosis = Diagnosis()
        try:
            found = len(diagnosis.flows(socket.IPPROTO_TCP))
        finally:
            diagnosis.close()
    except OSError as error:
        return Result("closed", f"{error}", "a kernel with CONFIG_INET_DIAG")
    detail = f"{found} TCP sockets"
    try:
        os.listdir("/proc/1/fd")
    except OSError as error:
        reason = f"{detail}; owners of other users' sockets stay unknown ({error.strerror})"
        return Result("degraded", reason, "CAP_SYS_PTRACE and CAP_DAC_READ_SEARCH, or root")
    return Result("open", detail)


def toolcalls(config: Config) -> Result:
    """Tool calls: the address for OTLP is free, or taken by a guard that runs; the files can be read."""
    if not config.toolcalls.enabled:
        return Result("off", "toolcalls.enabled is false")
    listen = config.toolcalls.otlp_listen
    unreadable = [one for one in config.toolcalls.files if not os.access(one, os.R_OK)]
    if unreadable:
        return Result("degraded", f"cannot read {', '.join(unreadable)}", "correct toolcalls.files")
    try:
        host, _, port = listen.rpartition(":")
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as opened:
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            opened.bind((host.strip("[]"), int(port)))
            opened.listen(1)
    except (OSError, ValueError, OverflowError) as error:
        if getattr(error, "errno", 0) == errno.EADDRINUSE and guard_runs():
            return Result("open", f"{listen}, held by the guard that runs")
        return Result("closed", f"{listen}: {error}", "free the address, or set toolcalls.otlp_listen")
    return Result("open", f"{listen} is free")


# -- acts -------------------------------------------------------------------------------------------------------------


def isolate(config: Config) -> Result:  # noqa: ARG001
    """Isolate: nf_tables answers us (a list of tables is asked for, nothing is added)."""
    request = struct.pack(
        "=IHHIIBBH", 20, NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_GETTABLE, NLM_F_REQUEST | NLM_F_DUMP, 1, 0, 0, 0, 0)
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER) as opened:
            opened.settimeout(2.0)
            opened.bind((0, 0))
            opened.send(request)
            answer = opened.recv(65536)
    except OSError as error:
        return Result("closed", f"{error}", "a kernel with CONFIG_NF_TABLES: modprobe nf_tables")
    kind = struct.unpack_from("=H", answer, 4)[0]
    number = -struct.unpack_from("=i", answer, 16)[0] if kind == NLMSG_ERROR else 0
    if number == errno.EPERM:
        return Result("closed", "not permitted here", "CAP_NET_ADMIN, or start the broker as root")
    if number:
        return Result("closed", os.strerror(number), "a kernel with CONFIG_NF_TABLES: modprobe nf_tables")
    return Result("open", "nf_tables answers")


def pause(config: Config) -> Result:  # noqa: ARG001
    """Pause: cgroup v2 can freeze a tree; without it SIGSTOP does it, which the tree's owner can undo."""
    from gpuguard.broker import boxes

    mount = boxes.mount()
    if mount is None:
        return Result("degraded", "no cgroup v2 hierarchy to write to: SIGSTOP instead", "mount cgroup2")
    if not os.access(mount, os.W_OK | os.X_OK):
        return Result("degraded", f"{mount} is not ours to write: SIGSTOP instead", "start the broker as root")
    if not any(mount.glob("*/cgroup.freeze")) and kernel() < CGROUP_FREEZE_SINCE:
        return Result("degraded", "no cgroup.freeze here: SIGSTOP instead", "Linux 5.2 or later")
    return Result("open", f"cgroup.freeze below {mount}")


def kill(config: Config) -> Result:  # noqa: ARG001
    """Kill: a pidfd can be had and waited on, so that no reused pid is ever hit."""
    try:
        descriptor = os.pidfd_open(os.getpid())
        try:
            select.select([descriptor], [], [], 0)
        finally:
            os.close(descriptor)
    except OSError as error:
        return Result("closed", f"pidfd_open: {error.strerror}", "Linux 5.3 or later")
    if os.geteuid() != 0:
        return Result("degraded", "own processes only", "CAP_KILL, or start the broker as root")
    return Result("open", "pidfd_open works")


# -- stores -----------------------------------------------------------------------------------------------------------


def state(config: Config) -> Result:  # noqa: ARG001
    """State: the folder can be written, and its disk is not full."""
    return _folder(paths.state_dir())


def runtime(config: Config) -> Result:  # noqa: ARG001
    """Runtime: the folder of the sockets can be written."""
    return _folder(paths.runtime_dir())


def audit(config: Config) -> Result:  # noqa: ARG001
    """Audit: the folder can be written, and the chain in it is whole."""
    from gpuguard.broker import audit as log

    folder = paths.log_dir()
    written = _folder(folder)
    if written.state == "closed" or not folder.is_dir():
        return written
    try:
        report = log.verify(folder)
    except FileNotFoundError:
        return Result(written.state, f"{written.detail}, no entry yet", written.remedy)
    except OSError as error:
        return Result("closed", f"{folder}: {error.strerror}", "start as the user that runs the broker")
    if not report.ok:
        where = f"{report.file}:{report.line}" if report.line else report.file
        return Result("degraded", f"{where}: {report.problem}", "gpuguard audit verify; keep the files")
    return Result(written.state, f"{written.detail}, {report.entries} entries, chain whole", written.remedy)


def identity(config: Config) -> Result:  # noqa: ARG001
    """Guard's user: one as whom nothing else runs, for a user's programs may read his sockets and end each other."""
    ids = confine.guard_identity()
    if ids is None:
        return Result("open", f"uid {os.geteuid()}, as the broker: there is nothing to give up")
    try:
        name = pwd.getpwuid(ids[0]).pw_name
    except KeyError:
        name = f"uid {ids[0]}"
    if name == confine.GUARD_USER:
        return Result("open", f"{name} (uid {ids[0]})")
    return Result("degraded", f"{name}: what else runs as {name} may ask the guard what it found, and end it",
                  f"useradd --system --no-create-home --shell /usr/sbin/nologin {confine.GUARD_USER}")


def _folder(folder: Path) -> Result:
    """Try to write a page where the folder is, or would be made, in a file that has no name and leaves nothing."""
    place = folder
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(bytes(PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "free some space" if full else "start as the user that runs the broker, or set GPUGUARD_STATE_DIR"
        return Result("closed", f"{folder}: {error.strerror}", remedy)
    free = shutil.disk_usage(place).free
    made = "" if place == folder else " (will be made)"
    if free < FREE_BYTES_MIN:
        return Result("degraded", f"{folder}{made}: {free // 2**20} MiB free", "free some space")
    return Result("open", f"{folder}{made}, {free / 2**30:.1f} GiB free")


# -- all together -----------------------------------------------------------------------------------------------------

CHECKS: tuple[tuple[str, Kind, Callable[[Config], Result]], ...] = (
    ("counters (nvml)", "eye", nvml),
    ("launches (eBPF)", "eye", launches),
    ("packets (AF_PACKET)", "eye", packets),
    ("processes", "eye", processes),
    ("sockets (INET_DIAG)", "eye", sockets),
    ("tool calls (OTLP)", "eye", toolcalls),
    ("isolate (nf_tables)", "act", isolate),
    ("pause (cgroup v2)", "act", pause),
    ("kill (pidfd)", "act", kill),
    ("guard's user", "store", identity),
    ("state", "store", state),
    ("sockets' folder", "store", runtime),
    ("audit log", "store", audit),
)


def examine() -> list[Check]:
    """Return every check of this host, the settings first: without settings there is nothing else to try."""
    from gpuguard.config_sources import ConfigError, load_config
    from gpuguard.policies import PolicyError, load_policy

    try:
        loaded = load_config()
        policy = load_policy()
    except (ConfigError, PolicyError) as error:
        return [Check("settings", "store", "closed", str(error), "gpuguard config validate")]
    changed = sum(origin != "default" for origin in loaded.origins.values())
    said = f"{changed} settings given, {len(policy.rules)} rules, mode {loaded.config.guard.mode}"
    return [Check("settings", "store", "open", said), *(_attempt(*one, loaded.config) for one in CHECKS)]


def _attempt(name: str, kind: Kind, check: Callable[[Config], Result], config: Config) -> Check:
    try:
        result = check(config)
    except Exception as error:  # noqa: BLE001 - a check that fails is a result, and the others must still be made
        result = Result("closed", f"the check itself failed: {type(error).__name__}: {error}", "please report this")
    return Check(name, kind, result.state, result.detail, result.remedy)


def exit_status(checks: list[Check], *, enforcing: bool) -> int:
    """Return 0: every eye that is not turned off is open; 1: some are not, or see less; 3: the guard cannot run.

    Acts count where the settings say enforce.
    """
    if any(check.kind == "store" and check.state == "closed" for check in checks):
        return EXIT_CANNOT_RUN
    counted = {"eye", "act"} if enforcing else {"eye"}
    closed = any(check.kind in counted and check.state in ("closed", "degraded") for check in checks)
    return EXIT_CLOSED if closed else EXIT_OPEN


def kernel() -> tuple[int, int]:
    """Return major and minor version of the running kernel."""
    major, minor = os.uname().release.split(".")[:2]
    return int(major), int(leading_digits(minor) or 0)


def leading_digits(text: str) -> str:
    """Return the digits that a text begins with."""
    return text[: len(text) - len(text.lstrip("0123456789"))]


def guard_runs() -> bool:
    """Return whether a broker answers on this host's control socket."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as opened:
            opened.connect(os.fspath(paths.control_socket()))
    except OSError:
        return False
    return True


def user_namespace() -> bool:
    """Return whether an unprivileged user may make a user namespace here; tried in a child, which ends at once."""
    child = f"import ctypes, sys; sys.exit(ctypes.CDLL(None).unshare({CLONE_NEWUSER:#x}) != 0)"
    return subprocess.run([sys.executable, "-S", "-c", child], check=False, capture_output=True).returncode == 0
