"""Short ways to make records for tests; every value that does not matter has a default."""

from __future__ import annotations

from gpuguard.core.events import Finding, ProcessBrief
from gpuguard.core.evidence import Evidence
from gpuguard.core.records import ProcessStarted, Socket, Sockets, ToolCall
from gpuguard.core.subjects import Context, FlowId, ProcessId, Subject

BOOT = "b0"
T0 = 1_700_000_000_000_000_000
SECOND = 1_000_000_000
TRACE = "0af7651916cd43dd8448eb211c80319c"
SPAN = "b7ad6b7169203331"


def pid(number: int, start_ticks: int | None = None) -> ProcessId:
    return ProcessId(boot_id=BOOT, pid=number, start_ticks=number if start_ticks is None else start_ticks)


def started(
    process: ProcessId,
    parent: ProcessId | None = None,
    *,
    time_ns: int = T0,
    name: str = "program",
    cgroup: str = "/",
    environ: dict[str, str] | None = None,
) -> ProcessStarted:
    return ProcessStarted(time_ns=time_ns, process=process, parent=parent, name=name, argv=(name,), cgroup=cgroup,
                          environ=environ or {})


def flow(port: int = 40_000, start_ns: int = T0) -> FlowId:
    return FlowId(netns=1, protocol=6, initiator="10.0.0.1", initiator_port=port, responder="10.0.0.2",
                  responder_port=22, start_ns=start_ns)


def socket_of(one: FlowId, *owners: ProcessId, inode: int = 7) -> Socket:
    return Socket(protocol=one.protocol, local=one.initiator, local_port=one.initiator_port, remote=one.responder,
                  remote_port=one.responder_port, state=1, inode=inode, uid=0, owners=owners)


def sockets(*seen: Socket, time_ns: int = T0) -> Sockets:
    return Sockets(time_ns=time_ns, netns=1, sockets=seen)


def call(span_id: str = SPAN, *, start_ns: int = T0, end_ns: int | None = None, trace_id: str = TRACE,
         process: ProcessId | None = None, name: str = "shell") -> ToolCall:
    return ToolCall(time_ns=start_ns, start_ns=start_ns, end_ns=end_ns, trace_id=trace_id, span_id=span_id,
                    parent_span_id="", tool_name=name, process=process)


def evidence(nats: float, *, subject: Subject | None = None, label: str = "mining",
             evidence_class: str = "launch", kind: str = "k", time_ns: int = T0) -> Evidence:
    return Evidence(time_ns=time_ns, subject=subject or pid(1), label=label,
                    evidence_class=evidence_class,  # type: ignore[arg-type]
                    kind=kind, nats=nats, text=kind, start_ns=time_ns)


def brief(process: ProcessId, *, cgroup: str = "/", context: Context | None = None, user: str = "",
          name: str = "program") -> ProcessBrief:
    return ProcessBrief(process=process, name=name, argv=(name,), user=user, cgroup=cgroup, cgroup_id=1,
                        context=context or Context())


def finding(
    identity: str = "F-1",
    *,
    label: str = "mining",
    verdict: str = "confirmed",
    process: ProcessBrief | None = None,
    trace_id: str = "",
    seen: tuple[Evidence, ...] = (),
    tool_call: ToolCall | None = None,
    time_ns: int = T0,
) -> Finding:
    return Finding(
        time_ns=time_ns,
        id=identity,
        subject=process.process if process else flow(),
        verdict=verdict,  # type: ignore[arg-type]
        label=label,
        carrier="",
        probability=1.0,
        nats=25.0,
        start_ns=time_ns,
        decided_after_s=0.0,
        evidence=seen or (evidence(25.0),),
        counter_evidence=(),
        process=process,
        tool_call=tool_call,
        trace_id=trace_id,
    )
