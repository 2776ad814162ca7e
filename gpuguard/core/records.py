"""The records that sensors yield, the recorder writes and `Guard.receive` takes: one vocabulary for all three.

Times are ``time_ns``: nanoseconds since the Unix epoch, by the host's clock at the moment of the thing recorded. Rows
that come by the thousand are NumPy record arrays inside a block; all else is one small struct each. Payload is never
in a record: packets are headers plus the extracted facts that a verdict needs.

Order is the order of arrival. A `Guard` reads blocks row by row, so that cutting a block in two changes nothing.
"""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from msgspec import Meta, Struct, field

from gpuguard.core.subjects import ProcessId

SCHEMA_VERSION = 1

# -- packets ----------------------------------------------------------------------------------------------------------

#: One packet. Addresses are 16 bytes, IPv4 as ::ffff:a.b.c.d (RFC 4291, section 2.5.5.2). For ICMP ``source_port`` is
#: type << 8 | code, ``destination_port`` the identifier and ``sequence`` the sequence number. ``payload_bytes`` counts
#: transport payload as the IP header gives it, not as it was captured. ``packet_type`` is PACKET_HOST.. of
#: linux/if_packet.h (0 to us, 4 outgoing), 255 where the source does not say. Where only brief facts are asked for
#: (`sensors.packets.read_capture`), the upper four bits of ``ip_version`` number what the payload begins
#: (`flows.CARRIERS`): a fact that says no more than that is not made.
#: A datagram in IP fragments is one row, when the last of them came, with the ``frame_bytes`` of all.
PACKET = np.dtype([
    ("time_ns", "<i8"),
    ("source", "u1", (16,)),
    ("destination", "u1", (16,)),
    ("source_port", "<u2"),
    ("destination_port", "<u2"),
    ("sequence", "<u4"),
    ("acknowledgement", "<u4"),
    ("payload_bytes", "<u4"),
    ("frame_bytes", "<u4"),
    ("protocol", "u1"),
    ("tcp_flags", "u1"),
    ("ip_version", "u1"),
    ("packet_type", "u1"),
])

#: An address as it lies in a row.
Address = Annotated[bytes, Meta(min_length=16, max_length=16)]


class SshBanner(Struct, frozen=True, tag="ssh_banner"):
    """The identification string of one side, RFC 4253 section 4.2, without its line end; at most 255 bytes."""

    row: int
    text: str


class SshKexInit(Struct, frozen=True, tag="ssh_kexinit"):
    """The name-lists of SSH_MSG_KEXINIT, RFC 4253 section 7.1, of the sender of packet ``row``."""

    row: int
    kex: tuple[str, ...]
    host_key: tuple[str, ...]
    encryption_client_to_server: tuple[str, ...]
    encryption_server_to_client: tuple[str, ...]
    mac_client_to_server: tuple[str, ...]
    mac_server_to_client: tuple[str, ...]
    compression_client_to_server: tuple[str, ...]
    compression_server_to_client: tuple[str, ...]


class SshNewKeys(Struct, frozen=True, tag="ssh_newkeys"):
    """SSH_MSG_NEWKEYS was sent in packet ``row``; the sender's bytes from ``end_sequence`` on are encrypted."""

    row: int
    end_sequence: int


class TlsClientHello(Struct, frozen=True, tag="tls_client_hello"):
    """Server name (RFC 6066 section 3, "" if none) and ALPN names (RFC 7301) of a ClientHello.

    ``encrypted``: it holds another hello in its extension encrypted_client_hello (RFC 9849), or pretends to; the name
    may then be that of a whole content network.
    """

    row: int
    server_name: str
    alpn: tuple[str, ...]
    encrypted: bool = False


class DnsMessage(Struct, frozen=True, tag="dns"):
    """The question of a DNS message, RFC 1035 section 4, the sizes that tell a tunnel, and what was answered.

    ``addresses`` are the first 16 of the A and AAAA records that belong to the question, 16 bytes each as in `PACKET`;
    ``aliases`` the first four names that CNAME records made of it, in lower case; ``ttl_s`` is the least of all these.
    """

    row: int
    is_response: bool
    name: str
    query_type: int
    answer_bytes: int
    addresses: tuple[Address, ...] = ()
    aliases: tuple[str, ...] = ()
    ttl_s: int = 0


class Stratum(Struct, frozen=True, tag="stratum"):
    """A first line of a TCP stream or message in a WebSocket, or the body of a first POST, speaks of mining in JSON.

    ``method`` is of a pool, or, in a body, one that fetches work from a node or hands it in; 32 bytes of it at most;
    or what a line of no known method has the form of, as `core.pools` names it.
    """

    row: int
    method: str


#: Messages that name their protocol by their grammar, in the order that ext/packets.pyx numbers them.
SPOKEN = (
    "socks4-request",
    "socks4-reply",
    "socks5-greeting",
    "socks5-choice",
    "socks5-request",
    "http-connect",
    "http-absolute",
    "tor",
    "wireguard",
    "openvpn",
    "ike",
    "dns-over-tcp",
    "stratum2-hello",
    "stratum2-answer",
    "message-broker",
    "http-backwards",
    "rfb-version",
    "x11-setup",
    "x11-keys",
    "ssh-in-websocket",
    "yamux-backwards",
    "shell-prompts",
    "shell-output",
    "tls-answered-first",
)


class Spoken(Struct, frozen=True, tag="spoken"):
    """The sender of packet ``row`` sent a message of `SPOKEN`; ``size``: in bytes, of "tls-answered-first" alone."""

    row: int
    what: str
    size: int = 0


class TlsRecords(Struct, frozen=True, tag="tls_records"):
    """Application data records (RFC 8446 section 5.1) of one side, all small and slowly sent, since its first.

    ``sizes`` are bytes of each record without its header; ``times_ns`` are exact to the millisecond.
    """

    row: int
    times_ns: tuple[int, ...]
    sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        """Raise ValueError for what a parser never makes, but a recording may hold."""
        if not 0 < len(self.times_ns) == len(self.sizes):
            raise ValueError("records without their times, or none at all")


Fact = SshBanner | SshKexInit | SshNewKeys | TlsClientHello | DnsMessage | Stratum | Spoken | TlsRecords


class Packets(Struct, tag="packets"):
    """Packets of one network namespace in order of capture, and the facts read from them, in order of ``row``.

    ``met_again`` counts packets that were met a second time since the last block, on another interface: no rows.
    """

    time_ns: int
    netns: int
    rows: np.ndarray
    facts: tuple[Fact, ...] = ()
    met_again: int = 0


# -- launches ---------------------------------------------------------------------------------------------------------

#: What one (process, kernel handle, grid, block, shared memory) launched since the last block: a count, the first and
#: last time, and how many gaps between launches fell in [2**i, 2**(i+1)) ns. ``api`` is an index into LAUNCH_APIS.
LAUNCH = np.dtype([
    ("first_ns", "<i8"),
    ("last_ns", "<i8"),
    ("launches", "<u8"),
    ("kernel", "<u8"),
    ("start_ticks", "<u8"),
    ("pid", "<u4"),
    ("api", "<u4"),
    ("grid", "<u4", (3,)),
    ("block", "<u4", (3,)),
    ("shared_bytes", "<u4"),
    ("gaps_log2", "<u4", (40,)),
])

LAUNCH_APIS = (
    "cuLaunchKernel",
    "cuLaunchKernelEx",
    "cuLaunchCooperativeKernel",
    "cuLaunchCooperativeKernelMultiDevice",
    "cuGraphLaunch",
    "cuLaunch",
    "cuLaunchGrid",
    "cuLaunchGridAsync",
    "clEnqueueNDRangeKernel",
    "vkQueueSubmit",
)


class Launches(Struct, tag="launches"):
    """Kernel launches seen since the block before."""

    time_ns: int
    rows: np.ndarray


class KernelName(Struct, frozen=True, tag="kernel_name"):
    """A process looked a kernel up by name and got this handle; ``code_sha256`` is its module's, "" if not read."""

    time_ns: int
    process: ProcessId
    kernel: int
    name: str
    code_sha256: str = ""


class ModuleImage(Struct, frozen=True, tag="module_image"):
    """A process loaded GPU code. The image itself stays where the code eye can read it, never in a record."""

    time_ns: int
    process: ProcessId
    sha256: str
    size_bytes: int
    kind: Literal["cubin", "fatbin", "ptx", "unknown"]


class KernelCode(Struct, frozen=True):
    """What the machine code of one kernel looks like; ``label`` and ``nats`` as `gpuguard.code.classify` says them."""

    name: str
    label: str
    probability: float
    nats: float
    text: str


class ModuleVerdict(Struct, frozen=True, tag="module_verdict"):
    """What was made of one image, whoever loads it: how many kernels were judged, and those that are accused.

    ``reason`` says why it could not be judged, "" if it was; no kernels then means nothing.
    """

    time_ns: int
    sha256: str
    judged: int
    accused: tuple[KernelCode, ...] = ()
    reason: str = ""


# -- counters ---------------------------------------------------------------------------------------------------------


class Device(Struct, frozen=True, tag="device_info"):
    """What a device is and under which limits it is read; told again whenever that changes. None: not said.

    A MIG instance is a device of its own, with its parent's uuid and index. ``virtualization_mode`` is NVML's
    (none, passthrough, vgpu, host_vgpu, host_vsga), "" if not told; ``confidential_compute`` means that performance
    counters are off unless ``devtools_mode`` is on.
    """

    time_ns: int
    uuid: str
    index: int
    name: str
    memory_bytes: int | None = None
    power_limit_w: float | None = None
    sm_clock_limit_hz: int | None = None
    driver_version: str = ""
    power_limit_default_w: float | None = None
    power_limit_max_w: float | None = None
    memory_clock_limit_hz: int | None = None
    architecture: str = ""
    board_part_number: str = ""
    vbios_version: str = ""
    multiprocessors: int | None = None
    nvlinks: int | None = None
    parent_uuid: str = ""
    gpu_instance_id: int | None = None
    compute_instance_id: int | None = None
    mig_mode: bool | None = None
    virtualization_mode: str = ""
    confidential_compute: bool | None = None
    devtools_mode: bool | None = None
    accounting_mode: bool | None = None
    gpm_supported: bool | None = None


class Gpm(Struct, frozen=True, omit_defaults=True):
    """GPU performance metrics (nvmlGpm*, Hopper and later), the mean over the ``period_ns`` before the sample.

    They are of the device or the MIG GPU instance, never of a process. Windows may overlap: the driver wants 100 ms
    between two samples. ``*_cycles`` count since the machine started, so that nothing between two samples is missed;
    the tensor types are those of the instructions: HMMA half precision, IMMA integer, DFMA and DMMA double.
    """

    period_ns: int
    graphics_ratio: float | None = None
    sm_ratio: float | None = None
    occupancy_ratio: float | None = None
    integer_ratio: float | None = None
    fp64_ratio: float | None = None
    fp32_ratio: float | None = None
    fp16_ratio: float | None = None
    tensor_ratio: float | None = None
    tensor_hmma_ratio: float | None = None
    tensor_imma_ratio: float | None = None
    tensor_dfma_ratio: float | None = None
    tensor_dmma_ratio: float | None = None
    dram_ratio: float | None = None
    pcie_tx_bytes_per_s: int | None = None
    pcie_rx_bytes_per_s: int | None = None
    nvlink_tx_bytes_per_s: int | None = None
    nvlink_rx_bytes_per_s: int | None = None
    context_switches_per_s: float | None = None
    context_switch_ratio: float | None = None
    sm_elapsed_cycles: int | None = None
    sm_active_cycles: int | None = None
    tensor_active_cycles: int | None = None
    tensor_hmma_active_cycles: int | None = None
    tensor_imma_active_cycles: int | None = None
    tensor_dfma_active_cycles: int | None = None
    tensor_dmma_active_cycles: int | None = None
    integer_active_cycles: int | None = None
    fp64_active_cycles: int | None = None
    fp32_active_cycles: int | None = None
    fp16_active_cycles: int | None = None


class DeviceSample(Struct, frozen=True, tag="device_sample"):
    """NVML counters of one device at one moment. None: could not be read (a `Gap` says why, once).

    ``power_w`` is what the board calls its power: a 1 s mean on Ampere and later except GA100, where the two others
    tell the mean from the moment. Energy is the exact integral. Rates are means since the sample before.
    """

    time_ns: int
    uuid: str
    gpu_ratio: float | None = None
    memory_ratio: float | None = None
    memory_used_bytes: int | None = None
    power_w: float | None = None
    energy_j: float | None = None
    temperature_c: float | None = None
    sm_clock_hz: int | None = None
    memory_clock_hz: int | None = None
    pcie_tx_bytes_per_s: int | None = None
    pcie_rx_bytes_per_s: int | None = None
    throttle_reasons: int | None = None
    power_average_w: float | None = None
    power_instant_w: float | None = None
    power_capped_ratio: float | None = None
    memory_temperature_c: float | None = None
    nvlink_tx_bytes_per_s: int | None = None
    nvlink_rx_bytes_per_s: int | None = None
    encoder_ratio: float | None = None
    decoder_ratio: float | None = None
    gpm: Gpm | None = None


class ProcessSample(Struct, frozen=True, tag="process_sample"):
    """What one process used of one device. ``sm_ratio`` is the mean since its last sample.

    ``uuid`` is the MIG instance's where the process runs on one.
    """

    time_ns: int
    process: ProcessId
    uuid: str
    memory_used_bytes: int | None = None
    sm_ratio: float | None = None
    memory_ratio: float | None = None
    encoder_ratio: float | None = None
    decoder_ratio: float | None = None


class ProcessAccounting(Struct, frozen=True, tag="process_accounting"):
    """What the driver's accounting says of the whole life of a process on a device; kept after it has ended.

    ``process`` is None where nobody can say any more who had the pid; ``active_ns`` is the time that it held a context.
    """

    time_ns: int
    uuid: str
    pid: int
    started_ns: int
    running: bool
    process: ProcessId | None = None
    gpu_ratio: float | None = None
    memory_ratio: float | None = None
    memory_max_bytes: int | None = None
    active_ns: int | None = None


# -- processes --------------------------------------------------------------------------------------------------------


class ProcessStarted(Struct, frozen=True, tag="process_started"):
    """A process exists: it was executed, or was there when the sensor opened (``time_ns`` is then its start).

    ``argv`` is redacted before it gets here; ``environ`` holds listed variables only (`subjects.ENVIRON_LISTED`).
    """

    time_ns: int
    process: ProcessId
    parent: ProcessId | None
    name: str
    argv: tuple[str, ...]
    executable: str = ""
    uid: int = -1
    user: str = ""
    cgroup: str = ""
    cgroup_id: int = 0
    netns: int = 0
    environ: dict[str, str] = field(default_factory=dict)


class ProcessExited(Struct, frozen=True, tag="process_exited"):
    """A process ended. ``exit_status`` as wait(2) gives it, None where the sensor cannot know."""

    time_ns: int
    process: ProcessId
    exit_status: int | None = None


# -- sockets ----------------------------------------------------------------------------------------------------------


class Socket(Struct, frozen=True):
    """One INET_DIAG entry (linux/inet_diag.h). ``owners`` holds every process that has it open, () if unknown.

    ``state`` is the number of net/tcp_states.h (1 established, 10 listen). ``min_rtt_us`` is None before the first
    measurement; byte counts are tcpi_bytes_acked and tcpi_bytes_received.
    """

    protocol: int
    local: str
    local_port: int
    remote: str
    remote_port: int
    state: int
    inode: int
    uid: int
    owners: tuple[ProcessId, ...] = ()
    min_rtt_us: int | None = None
    sent_bytes: int = 0
    received_bytes: int = 0


#: One TCP connection that a process of this host dialled, told when it was answered (``state`` ESTABLISHED, or
#: SYN_RECV where both ends dialled) or came to nothing (CLOSE; ``error`` as connect(2) gives it, 0 where the process
#: gave it up itself). ``time_ns`` is when it was dialled, ``waited_us`` how long until that answer or end, at most 71
#: minutes; ``start_ticks`` is the process's start. ``dialled``, ``in_vain`` and ``withheld`` count all connections of
#: this process since it was met first, this one too; those withheld came too fast to be told one by one. With ``state``
#: 0 there is no connection: the process ended, and this is its last count. Addresses as in `PACKET`; the ends lie in
#: one piece.
CONNECT = np.dtype([
    ("time_ns", "<i8"),
    ("start_ticks", "<u8"),
    ("pid", "<u4"),
    ("netns", "<u4"),
    ("waited_us", "<u4"),
    ("dialled", "<u4"),
    ("in_vain", "<u4"),
    ("withheld", "<u4"),
    ("error", "<u2"),
    ("state", "<u2"),
    ("local", "u1", (16,)),
    ("remote", "u1", (16,)),
    ("local_port", "<u2"),
    ("remote_port", "<u2"),
    ("protocol", "u1"),
])


class Connects(Struct, tag="connects"):
    """Who dialled which connections, in any network namespace of this host, however short they were."""

    time_ns: int
    rows: np.ndarray


class Sockets(Struct, frozen=True, tag="sockets"):
    """All sockets of one network namespace at one moment; ``complete`` is False where some owner was unreadable."""

    time_ns: int
    netns: int
    sockets: tuple[Socket, ...]
    complete: bool = True


# -- tool calls -------------------------------------------------------------------------------------------------------


class ToolCall(Struct, frozen=True, tag="tool_call"):
    """One tool call of an agent, from an OTLP span or a JSON line; ``time_ns`` is when it arrived.

    Ids are lower-case hex as in W3C Trace Context; ``end_ns`` is None while it runs. ``process`` is the agent's own.
    ``arguments`` are redacted and cut to 512 characters.
    """

    time_ns: int
    start_ns: int
    end_ns: int | None
    trace_id: str
    span_id: str
    parent_span_id: str
    tool_name: str
    tool_call_id: str = ""
    agent_name: str = ""
    conversation_id: str = ""
    sandbox_id: str = ""
    arguments: str = ""
    process: ProcessId | None = None


# -- the guard's own --------------------------------------------------------------------------------------------------


class HostInfo(Struct, frozen=True, tag="host_info"):
    """The first record of every recording: whose it is and under which settings it was made."""

    time_ns: int
    schema_version: int
    boot_id: str
    hostname: str
    clock_ticks_per_s: int
    addresses: tuple[str, ...] = ()
    settings: dict[str, str] = field(default_factory=dict)


class Tick(Struct, frozen=True, tag="tick"):
    """Time passed. Timeouts and sequential tests move on ticks, so that replay needs no clock."""

    time_ns: int


class Gap(Struct, frozen=True, tag="gap"):
    """A sensor could not look. Never zero, never innocence.

    ``since_ns`` is when it began; ``lost`` counts what is known to have been missed, None when that is unknown too.
    """

    time_ns: int
    sensor: str
    reason: str
    since_ns: int | None = None
    lost: int | None = None
    process: ProcessId | None = None


class Approval(Struct, frozen=True, tag="approval"):
    """A person's answer to a decision that asked for one. Words of Inspect's approver: approve, reject."""

    time_ns: int
    decision_id: str
    answer: Literal["approve", "reject"]
    by: str
    reason: str = ""


class ActionOutcome(Struct, frozen=True, tag="action_outcome"):
    """What became of a decision: the broker's report."""

    time_ns: int
    decision_id: str
    action: str
    outcome: Literal["would_have", "done", "refused", "failed", "undone", "expired"]
    text: str
    process: ProcessId | None = None
    expires_ns: int | None = None


Block = (
    Packets
    | Launches
    | KernelName
    | ModuleImage
    | ModuleVerdict
    | Device
    | DeviceSample
    | ProcessSample
    | ProcessAccounting
    | ProcessStarted
    | ProcessExited
    | Sockets
    | Connects
    | ToolCall
    | HostInfo
    | Tick
    | Gap
    | Approval
    | ActionOutcome
)
