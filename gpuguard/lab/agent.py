"""An agent that runs its tool calls and reports them as an instrumented agent does: OTLP spans over gRPC.

Each call is a span ``execute_tool NAME`` with the attributes of the OpenTelemetry semantic conventions for generative
AI, exported when the call returns; its child process finds its own span in TRACEPARENT (W3C Trace Context). What the
agent does is a plan of its caller: ``agent OTLP-ADDRESS PLAN``, the plan being a JSON list of `Call`.

What it prints is the lab's truth, for measuring only: the guard learns of tool calls from the spans alone.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import msgspec
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.common.v1 import common_pb2
from opentelemetry.proto.resource.v1 import resource_pb2
from opentelemetry.proto.trace.v1 import trace_pb2

if TYPE_CHECKING:
    from collections.abc import Mapping

AGENT_NAME = "coder-rl"
EXPORT_TIMEOUT_S = 30.0


class Call(msgspec.Struct, frozen=True):
    """One tool call. A call in the background returns after ``settle_s`` and leaves its process running."""

    what: str
    tool: str
    arguments: str
    argv: tuple[str, ...]
    output: str = "/dev/null"
    background: bool = False
    before_s: float = 0.5
    settle_s: float = 1.0


def main() -> int:
    """Run the plan; end when every process of it has."""
    address, plan = sys.argv[1], msgspec.json.decode(sys.argv[2], type=list[Call])
    noise = random.Random()
    trace = noise.randbytes(16)
    root = noise.randbytes(8)
    running: list[subprocess.Popen[bytes]] = []
    with grpc.insecure_channel(address) as channel:
        export = trace_service_pb2_grpc.TraceServiceStub(channel).Export  # type: ignore[no-untyped-call]
        for number, call in enumerate(plan):
            time.sleep(call.before_s)
            span = noise.randbytes(8)
            start_ns = time.time_ns()
            child = _start(call, trace, span)
            running.append(child)
            _tell(call=call.what, pid=child.pid, trace_id=trace.hex(), span_id=span.hex(), start_ns=start_ns,
                  cgroup=_cgroups(child.pid))
            if call.background:
                time.sleep(call.settle_s)
            else:
                child.wait()
            _export(export, _span(call, number, (trace, span, root), start_ns))
    for child in running:
        child.wait()
    return 0


def _start(call: Call, trace: bytes, span: bytes) -> subprocess.Popen[bytes]:
    environ = dict(os.environ, TRACEPARENT=f"00-{trace.hex()}-{span.hex()}-01")
    with Path(call.output).open("wb") as output:
        return subprocess.Popen(call.argv, env=environ, stdin=subprocess.DEVNULL, stdout=output, stderr=output)


def _cgroups(pid: int) -> str:
    """Return the control groups of a process in every hierarchy, a path a word."""
    lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    return " ".join(line.split(":", 2)[2] for line in lines)


def _span(call: Call, number: int, ids: tuple[bytes, bytes, bytes], start_ns: int) -> trace_pb2.Span:
    trace, span, parent = ids
    return trace_pb2.Span(
        trace_id=trace, span_id=span, parent_span_id=parent, name=f"execute_tool {call.tool}",
        kind=trace_pb2.Span.SPAN_KIND_INTERNAL, start_time_unix_nano=start_ns, end_time_unix_nano=time.time_ns(),
        attributes=_attributes({
            "gen_ai.operation.name": "execute_tool",
            "gen_ai.tool.name": call.tool,
            "gen_ai.tool.type": "function",
            "gen_ai.tool.call.id": f"call_{number}",
            "gen_ai.tool.call.arguments": call.arguments,
            "gen_ai.agent.name": AGENT_NAME,
            "gen_ai.conversation.id": f"episode-{trace.hex()[:8]}",
        }),
    )


def _export(export: grpc.UnaryUnaryMultiCallable, span: trace_pb2.Span) -> None:
    resource = resource_pb2.Resource(attributes=_attributes({
        "service.name": AGENT_NAME, "process.pid": os.getpid(),
    }))
    request = trace_service_pb2.ExportTraceServiceRequest(resource_spans=[
        trace_pb2.ResourceSpans(resource=resource, scope_spans=[trace_pb2.ScopeSpans(spans=[span])]),
    ])
    try:
        export(request, timeout=EXPORT_TIMEOUT_S)
    except grpc.RpcError as lost:
        _tell(lost_span=span.name, reason=str(lost.code()))


def _attributes(values: Mapping[str, str | int]) -> list[common_pb2.KeyValue]:
    return [
        common_pb2.KeyValue(key=key, value=common_pb2.AnyValue(int_value=value) if isinstance(value, int)
                            else common_pb2.AnyValue(string_value=value))
        for key, value in values.items()
    ]


def _tell(**truth: object) -> None:
    print(json.dumps(truth), flush=True)  # noqa: T201


if __name__ == "__main__":
    sys.exit(main())
