"""Settings: what may be set, with units in the names and the defaults that a careful operator would choose.

This table is all there is: `config_sources` fills it, ``gpuguard config schema`` and docs/configuration.md are made
from it. A description says what a reader of a settings file must know; the default stands beside it.
"""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct, field

from gpuguard import packet_filter

_KIB = 1024
_MIB = 1024 * 1024


#: A name of one file or folder: nobody is led elsewhere by it.
NAME = r"^([A-Za-z0-9_-][A-Za-z0-9._-]{0,127})?$"


class GuardSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """How sure to be, and what to do about it."""

    mode: Annotated[
        Literal["observe", "enforce"],
        Meta(description="observe writes down what policy would have done; enforce does it"),
    ] = "observe"
    alarms_per_gpu_year: Annotated[
        float,
        Meta(gt=0, le=1_000_000, description="false alarms to accept per GPU and year; the delay follows from it"),
    ] = 0.1
    counter_alarms_per_gpu_year: Annotated[
        float,
        Meta(gt=0, le=1_000_000, description="the same for what counters say alone, which makes a job suspect at most"),
    ] = 1.0
    tick_ms: Annotated[
        int, Meta(ge=10, le=60_000, description="how often time moves on when nothing happens, in milliseconds")
    ] = 250


class PacketSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """The packet sensor."""

    enabled: Annotated[bool, Meta(description="watch packets")] = True
    interfaces: Annotated[
        tuple[str, ...], Meta(description="interfaces to watch; none named: all of the guard's network namespace")
    ] = ()
    snap_bytes: Annotated[
        int, Meta(ge=64, le=65_535, description="how much of a packet to look at, in bytes; nothing of it is kept")
    ] = 2048
    ring_bytes: Annotated[
        int, Meta(ge=256 * _KIB, le=1024 * _MIB, description="size of the kernel's ring for packets, in bytes")
    ] = 32 * _MIB
    rings: Annotated[
        int, Meta(ge=1, le=8, description="so many rings of that size share the packets of an interface")
    ] = 1
    ignore: Annotated[
        tuple[str, ...],
        Meta(max_length=packet_filter.RULES_MAX,
             description="traffic that nobody looks at, a blind spot: rules as net 10.8.0.0/16 tcp port 2049"),
    ] = ()

    def __post_init__(self) -> None:
        twice = next((one for one in self.interfaces if self.interfaces.count(one) > 1), None)
        if twice is not None:
            raise ValueError(f"packets.interfaces names {twice} twice: its packets would count twice")
        for rule in self.ignore:
            try:
                packet_filter.parse(rule)
            except ValueError as error:
                raise ValueError(f"packets.ignore: {error}") from error


class NvmlSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """The counter sensor."""

    enabled: Annotated[bool, Meta(description="read the counters of the GPU driver")] = True
    rate_hz: Annotated[float, Meta(ge=0.1, le=10, description="samples per second, of every device")] = 1.0


class LaunchSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """The launch sensor."""

    enabled: Annotated[bool, Meta(description="watch kernel launches")] = True
    libraries: Annotated[
        tuple[str, ...],
        Meta(description="paths of libcuda to watch from the start; others are watched when a process maps them"),
    ] = ()
    interval_ms: Annotated[int, Meta(ge=10, le=60_000, description="how often counts are read, in milliseconds")] = 250


class ProcessSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """The process sensor."""

    enabled: Annotated[bool, Meta(description="watch processes start and end")] = True
    source: Annotated[
        Literal["auto", "bpf", "connector", "polling"],
        Meta(description="where process events come from; auto takes the best that this host allows"),
    ] = "auto"
    poll_interval_ms: Annotated[
        int, Meta(ge=50, le=60_000, description="how often /proc is read where it must be polled, in milliseconds")
    ] = 1000


class SocketSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """The socket sensor."""

    enabled: Annotated[bool, Meta(description="ask the kernel which process owns which socket")] = True
    interval_ms: Annotated[int, Meta(ge=100, le=60_000, description="how often to ask, in milliseconds")] = 2000


class ToolCallSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """Where agents report their tool calls."""

    enabled: Annotated[bool, Meta(description="take reports of tool calls")] = True
    otlp_listen: Annotated[
        str, Meta(max_length=255, pattern=r"^(unix:.+|(127\.0\.0\.1|localhost|\[::1\]):[0-9]{1,5})?$",
                  description="address of the OTLP/gRPC receiver, of this host alone: 127.0.0.1:PORT, [::1]:PORT or "
                              "unix:PATH; empty: none")
    ] = "127.0.0.1:4317"
    files: Annotated[tuple[str, ...], Meta(description="files of JSON lines to follow")] = ()


class RecordingSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """The recorder."""

    directory: Annotated[
        str, Meta(pattern=NAME, description="folder of recordings, a name in the guard's state folder; empty: none")
    ] = ""
    file_bytes_max: Annotated[
        int, Meta(ge=64 * _KIB, description="a file that would grow above this is closed and a new one begun, in bytes")
    ] = 64 * _MIB
    total_bytes_max: Annotated[
        int, Meta(ge=64 * _KIB, description="the oldest files go when all together are above this, in bytes")
    ] = 1024 * _MIB


class MetricsSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """Prometheus metrics of the guard itself and of what it sees."""

    listen: Annotated[
        str, Meta(max_length=255, pattern=r"^((127(\.[0-9]{1,3}){3}|\[::1\]):[0-9]{1,5})?$",
                  description="loopback address to serve them on, as 127.0.0.1:9400; empty: none")
    ] = ""
    textfile: Annotated[
        str, Meta(pattern=NAME, description="name of the file for node_exporter's textfile collector, in the guard's "
                                            "state folder; empty: none")
    ] = ""


class ActionSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """Bounds on acting, whatever policy says; the broker holds them. What is protected by default stays protected."""

    acts_per_hour: Annotated[int, Meta(ge=0, le=10_000, description="acts the guard may ask for in an hour")] = 12
    kills_per_hour: Annotated[int, Meta(ge=0, le=10_000, description="kills in an hour, each approved by a person")] = 4
    ttl_s_max: Annotated[
        float, Meta(gt=0, le=30 * 86_400.0, description="longest time that an act may stay in force, in seconds")
    ] = 86_400.0
    grace_s: Annotated[
        float, Meta(ge=0, le=600, description="time between SIGTERM and SIGKILL, in seconds")
    ] = 10.0
    launches_per_s: Annotated[
        float, Meta(gt=0, le=1e6, description="kernel launches a second that throttle leaves to each process")
    ] = 100.0
    protected_executables: Annotated[
        tuple[str, ...], Meta(description="names of host daemons never to act on, beside the built-in ones")
    ] = ()
    protected_cgroups: Annotated[
        tuple[str, ...], Meta(description="cgroup paths below which nobody is acted on")
    ] = ()


class Config(Struct, frozen=True, forbid_unknown_fields=True):
    """Everything that may be set in gpuguard.toml."""

    guard: GuardSettings = field(default_factory=GuardSettings)
    packets: PacketSettings = field(default_factory=PacketSettings)
    nvml: NvmlSettings = field(default_factory=NvmlSettings)
    launches: LaunchSettings = field(default_factory=LaunchSettings)
    processes: ProcessSettings = field(default_factory=ProcessSettings)
    sockets: SocketSettings = field(default_factory=SocketSettings)
    toolcalls: ToolCallSettings = field(default_factory=ToolCallSettings)
    recording: RecordingSettings = field(default_factory=RecordingSettings)
    metrics: MetricsSettings = field(default_factory=MetricsSettings)
    actions: ActionSettings = field(default_factory=ActionSettings)
