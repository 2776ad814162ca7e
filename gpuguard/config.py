"""Settings: what may be set, with units in the names and the defaults that a careful operator would choose."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct, field


class GuardSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """How sure to be, and what to do about it."""

    mode: Literal["observe", "enforce"] = "observe"
    alarms_per_gpu_year: float = 0.1
    tick_ms: int = 250


class PacketSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """The packet sensor. No interface named: all of the guard's network namespace."""

    enabled: bool = True
    interfaces: tuple[str, ...] = ()
    snap_bytes: int = 2048
    ring_bytes: int = 8 * 1024 * 1024


class NvmlSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """The counter sensor."""

    enabled: bool = True
    rate_hz: float = 1.0


class LaunchSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """The launch sensor; ``libraries`` are watched from the start, others when a process maps them."""

    enabled: bool = True
    libraries: tuple[str, ...] = ()
    interval_ms: int = 250


class ProcessSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """The process sensor. ``source`` auto takes the best that this host allows."""

    enabled: bool = True
    source: Literal["auto", "bpf", "connector", "polling"] = "auto"
    poll_interval_ms: int = 1000


class SocketSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """The socket sensor."""

    enabled: bool = True
    interval_ms: int = 2000


class ToolCallSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """Where agents report their tool calls. ``files`` are JSON lines that are followed."""

    enabled: bool = True
    otlp_listen: str = "127.0.0.1:4317"
    files: tuple[str, ...] = ()


class RecordingSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """The recorder. No directory: nothing is recorded."""

    directory: str = ""
    file_bytes_max: int = 64 * 1024 * 1024
    total_bytes_max: int = 1024 * 1024 * 1024


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
