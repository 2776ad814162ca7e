"""The tool-call eye: every dialect, hostile input, followed files, and the real OpenTelemetry SDK over real gRPC."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time

import grpc
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as service
from opentelemetry.proto.common.v1 import common_pb2 as common
from opentelemetry.proto.resource.v1 import resource_pb2
from opentelemetry.proto.trace.v1 import trace_pb2
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor

from gpuguard.config import Config, ToolCallSettings
from gpuguard.core.records import Gap, ToolCall
from gpuguard.messages import Found, ReadProcess
from gpuguard.sensors import EyeClosed, processes, toolcalls

EXPORT = "/opentelemetry.proto.collector.trace.v1.TraceService/Export"
TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Direct:
    def ask(self, request):
        assert isinstance(request, ReadProcess)
        return processes.grant(request)


def key_values(**attributes):
    found = []
    for name, value in attributes.items():
        kind = {"int_value": value} if isinstance(value, int) else {"string_value": value}
        found.append(common.KeyValue(key=name.replace("__", "."), value=common.AnyValue(**kind)))
    return found


def request_of(*spans, **resource):
    return service.ExportTraceServiceRequest(resource_spans=[trace_pb2.ResourceSpans(
        resource=resource_pb2.Resource(attributes=key_values(**resource)),
        scope_spans=[trace_pb2.ScopeSpans(spans=spans)])])


def span(name="execute_tool bash", start=1000, end=2000, trace=TRACE, own=SPAN, **attributes):
    return trace_pb2.Span(name=name, trace_id=bytes.fromhex(trace), span_id=bytes.fromhex(own),
                          start_time_unix_nano=start, end_time_unix_nano=end, attributes=key_values(**attributes))


# -- parsing ----------------------------------------------------------------------------------------------------------


def test_a_span_of_the_current_conventions():
    (heard,), refused = toolcalls.dialects.parse_spans(request_of(span(
        gen_ai__operation__name="execute_tool", gen_ai__tool__name="bash", gen_ai__tool__call__id="call_7",
        gen_ai__agent__name="coder", gen_ai__conversation__id="c1",
        gen_ai__tool__call__arguments='{"command": "ssh -R 1:h:2 x", "password": "hunter2"}'),
        service__name="svc", process__pid=77, container__id="f" * 64), 5000)
    assert refused == 0
    assert heard.pid == 77
    assert heard.call == ToolCall(
        time_ns=5000, start_ns=1000, end_ns=2000, trace_id=TRACE, span_id=SPAN, parent_span_id="", tool_name="bash",
        tool_call_id="call_7", agent_name="coder", conversation_id="c1", sandbox_id="f" * 64,
        arguments='{"command": "ssh -R 1:h:2 x", "password": [redacted]}')


@pytest.mark.parametrize(("name", "attributes", "tool"), [
    ("execute_tool read", {}, "read"),
    ("x", {"gen_ai.operation.name": "execute_tool", "gen_ai.tool.name": "read"}, "read"),
    ("run", {"gen_ai.operation.name": "execute_command"}, "run"),
    ("tools/call read", {"mcp.method.name": "tools/call", "gen_ai.tool.name": "read"}, "read"),
    ("whatever", {"openinference.span.kind": "TOOL", "tool.name": "read"}, "read"),
    ("read", {"openinference.span.kind": "TOOL"}, "read"),
    ("read.tool", {"traceloop.span.kind": "tool", "traceloop.entity.name": "read"}, "read"),
    ("chat gpt", {"gen_ai.operation.name": "chat"}, None),
    ("execute_tool x", {"gen_ai.operation.name": "chat"}, None),
    ("invoke_agent a", {"openinference.span.kind": "AGENT"}, None),
    ("x", {"traceloop.span.kind": "workflow"}, None),
    ("GET /", {}, None),
])
def test_dialects(name, attributes, tool):
    assert toolcalls.dialects.tool_span(name, attributes) == tool


def test_the_resources_own_command_line_is_not_the_tools_arguments():
    (heard,), _ = toolcalls.dialects.parse_spans(request_of(span(), process__command_line="python agent.py"), 1)
    assert heard.call.arguments == ""


@pytest.mark.parametrize("bad", [
    {"trace": "00" * 16}, {"trace": "ab" * 8}, {"own": "00" * 8}, {"own": ""}, {"start": 0}, {"start": 3000},
    {"start": 2**63, "end": 2**63 + 1},
])
def test_a_span_that_joins_nothing_is_refused_and_counted(bad):
    heard, refused = toolcalls.dialects.parse_spans(request_of(span(**bad), span()), 1)
    assert (len(heard), refused) == (1, 1)


def test_a_running_call_has_no_end():
    (heard,), _ = toolcalls.dialects.parse_spans(request_of(span(end=0)), 1)
    assert heard.call.end_ns is None


def test_everything_is_bounded(monkeypatch):
    monkeypatch.setattr(toolcalls.dialects, "SPANS_MAX", 3)
    many = {f"a{i}": "v" for i in range(1000)}
    long = span(gen_ai__tool__name="t" * 100_000, input__value="a b " * 100_000)
    heard, refused = toolcalls.dialects.parse_spans(request_of(span(**many), long, span(), span(), span()), 1)
    assert (len(heard), refused) == (3, 2)
    assert len(heard[1].call.tool_name) == toolcalls.dialects.NAME_CHARS_MAX
    assert len(heard[1].call.arguments) <= toolcalls.dialects.ARGUMENTS_CHARS_MAX


@given(st.binary(max_size=300))
def test_hostile_protobuf_parses_or_is_refused(raw):
    from google.protobuf.message import DecodeError

    try:
        request = service.ExportTraceServiceRequest.FromString(raw)
    except DecodeError:
        return
    toolcalls.dialects.parse_spans(request, 1)


GOOD = {"start_ns": 1000, "trace_id": TRACE, "span_id": SPAN, "tool_name": "bash"}


def test_a_json_line():
    line = {**GOOD, "end_ns": 2000, "arguments": {"cmd": "ls", "token": "hunter2"}, "process_pid": 9, "more": [1]}
    heard = toolcalls.dialects.parse_line(json.dumps(line).encode(), 7)
    assert (heard.pid, heard.call.tool_name, heard.call.start_ns, heard.call.end_ns) == (9, "bash", 1000, 2000)
    assert "ls" in heard.call.arguments
    assert "hunter2" not in heard.call.arguments


@pytest.mark.parametrize("bad", [
    b"{", b"[]", b"null", b"\xff", b'{"start_ns": 1}', json.dumps({**GOOD, "start_ns": -1}).encode(),
    json.dumps({**GOOD, "trace_id": "X" * 32}).encode(), json.dumps({**GOOD, "trace_id": "0" * 32}).encode(),
    json.dumps({**GOOD, "end_ns": 1}).encode(), json.dumps({**GOOD, "start_ns": "1"}).encode(), b"[" * 50_000,
])
def test_a_bad_line_is_refused(bad):
    with pytest.raises((ValueError, RecursionError)):
        toolcalls.dialects.parse_line(bad, 1)


@given(st.binary(max_size=200))
def test_hostile_lines(raw):
    try:
        toolcalls.dialects.parse_line(raw, 1)
    except (ValueError, RecursionError):
        return


@pytest.mark.parametrize("address", [
    "0.0.0.0:4317", "[::]:4317", "example.org:1", "127.0.0.1", "unix:", "", "127.0.0.1:x",
])
def test_only_this_host_may_speak(address):
    with pytest.raises(EyeClosed, match="otlp_listen"):
        toolcalls.receiver.listen_address(address)


# -- followed files ---------------------------------------------------------------------------------------------------


def test_following_a_file(tmp_path):
    path = tmp_path / "calls"
    path.write_bytes(b"before\n")
    follower = toolcalls.files.Follower(path)
    assert follower.lines() == ([], 0)
    with path.open("ab") as file:
        file.write(b"one\ntw")
        file.flush()
        assert follower.lines() == ([b"one"], 0)
        file.write(b"o\n\n  \nthree\n")
    assert follower.lines() == ([b"two", b"three"], 0)
    path.write_bytes(b"anew\n")
    assert follower.lines() == ([b"anew"], 0)
    (tmp_path / "next").write_bytes(b"replaced\n")
    (tmp_path / "next").rename(path)
    assert follower.lines() == ([b"replaced"], 0)
    path.unlink()
    assert follower.lines() == ([], 0)
    path.write_bytes(b"back\n")
    assert follower.lines() == ([b"back"], 0)
    follower.close()


def test_a_file_that_comes_later_is_read_from_its_start(tmp_path):
    follower = toolcalls.files.Follower(tmp_path / "calls")
    assert follower.lines() == ([], 0)
    assert "No such file" in follower.trouble
    (tmp_path / "calls").write_bytes(b"one\n")
    assert follower.lines() == ([b"one"], 0)
    assert follower.trouble == ""
    follower.close()


def test_an_endless_line_is_skipped_and_counted_once(tmp_path):
    path = tmp_path / "calls"
    path.touch()
    follower = toolcalls.files.Follower(path)
    with path.open("ab") as file:
        for _ in range(5):
            file.write(b"x" * toolcalls.files.LINE_BYTES_MAX)
            file.flush()
            follower.lines()
        file.write(b"tail\ngood\n")
    assert follower.lines() == ([b"good"], 0)
    follower.close()


@given(st.lists(st.integers(0, 40), max_size=12))
def test_where_a_file_is_cut_changes_nothing(tmp_path_factory, cuts):
    text = b"a\nbb\n\nccc\ndddd\nlast\n"
    path = tmp_path_factory.mktemp("cut") / "calls"
    path.touch()
    follower = toolcalls.files.Follower(path)
    got = []
    before = 0
    for cut in [*sorted(min(cut, len(text)) for cut in cuts), len(text)]:
        with path.open("ab") as file:
            file.write(text[before:cut])
        before = cut
        got += follower.lines()[0]
    follower.close()
    assert got == [b"a", b"bb", b"ccc", b"dddd", b"last"]


def test_a_fifo_is_trouble_and_no_wait(tmp_path):
    os.mkfifo(tmp_path / "calls")
    follower = toolcalls.files.Follower(tmp_path / "calls")
    assert follower.lines() == ([], 0)
    assert follower.trouble == "Not a regular file"


# -- the sensor -------------------------------------------------------------------------------------------------------


@pytest.fixture
def sensor():
    opened = toolcalls.open_sensor(Direct(), Config(toolcalls=ToolCallSettings(otlp_listen="127.0.0.1:0")))
    yield opened
    opened.close()


def wait(sensor):
    assert select.select([sensor.descriptor], [], [], 100)[0]
    return sensor.read(time.time_ns())


def export(sensor, data):
    with grpc.insecure_channel(f"127.0.0.1:{sensor.port}") as channel:
        return service.ExportTraceServiceResponse.FromString(channel.unary_unary(EXPORT)(data, timeout=100))


def test_the_real_sdk(sensor):
    resource = Resource.create({"service.name": "coder", "process.pid": os.getpid()})
    provider = TracerProvider(resource=resource)
    exporter = OTLPSpanExporter(endpoint=f"http://127.0.0.1:{sensor.port}", insecure=True)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracer = provider.get_tracer("t")
    start = tracer.start_as_current_span
    with start("invoke_agent coder") as outer, start("execute_tool bash") as inner:
        inner.set_attribute("gen_ai.operation.name", "execute_tool")
        inner.set_attribute("gen_ai.tool.name", "bash")
        inner.set_attribute("gen_ai.tool.call.arguments", "nohup ./run --api-key hunter2")
    provider.shutdown()
    (call,) = wait(sensor)
    assert call.trace_id == f"{inner.get_span_context().trace_id:032x}"
    assert call.span_id == f"{inner.get_span_context().span_id:016x}"
    assert call.parent_span_id == f"{outer.get_span_context().span_id:016x}"
    assert (call.tool_name, call.agent_name) == ("bash", "coder")
    assert call.arguments == "nohup ./run --api-key [redacted]"
    assert call.start_ns < call.end_ns <= call.time_ns
    assert call.process == processes.procfs.identify(os.getpid())


def test_malformed_requests_are_answered_and_counted(sensor):
    with pytest.raises(grpc.RpcError) as raised:
        export(sensor, b"\xff\xff\xff")
    assert raised.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert wait(sensor)[0].reason == "malformed OTLP requests"
    with pytest.raises(grpc.RpcError) as raised:
        export(sensor, b"\0" * (toolcalls.receiver.MESSAGE_BYTES_MAX + 1))
    assert raised.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    response = export(sensor, request_of(span(start=0), span()).SerializeToString())
    assert response.partial_success.rejected_spans == 1
    call, gap = wait(sensor)
    assert (call.tool_name, gap.lost) == ("bash", 1)


def test_a_flood_is_bounded_and_counted(sensor, monkeypatch):
    monkeypatch.setattr(toolcalls.receiver, "QUEUE_MAX", 10)
    monkeypatch.setattr(toolcalls, "TAKEN_MAX", 4)
    response = export(sensor, request_of(*[span() for _ in range(25)]).SerializeToString())
    assert response.partial_success.rejected_spans == 15
    blocks = wait(sensor)
    assert [type(block) for block in blocks] == [ToolCall] * 4 + [Gap]
    assert blocks[-1].lost == 15
    assert len(wait(sensor)) == 4, "still readable while something waits"
    assert len(wait(sensor)) == 2
    assert select.select([sensor.descriptor], [], [], 0)[0] == []


def heard(pid, now_ns, *, is_local=True):
    (one,), _ = toolcalls.dialects.parse_spans(request_of(span(start=now_ns, end=now_ns)), now_ns)
    return msgspec.structs.replace(one, pid=pid, is_local=is_local)


def test_a_named_process_must_be_one_that_it_can_be(sensor):
    now_ns = time.time_ns()
    assert sensor._process(heard(os.getpid(), now_ns), {}) == processes.procfs.identify(os.getpid())
    assert sensor._process(heard(None, now_ns), {}) is None
    assert sensor._process(heard(2**22 - 1, now_ns), {}) is None, "no such process"
    assert sensor._process(heard(os.getpid(), 1000), {}) is None, "the pid was reused: it began after the call's end"
    elsewhere = msgspec.structs.replace(processes.procfs.read_process(os.getpid()), netns=1)
    assert sensor._process(heard(os.getpid(), now_ns), {os.getpid(): elsewhere}) is None
    assert sensor._process(heard(os.getpid(), now_ns, is_local=False), {os.getpid(): elsewhere}) == elsewhere.process
    kernel = msgspec.structs.replace(elsewhere, argv=())
    assert sensor._process(heard(os.getpid(), now_ns, is_local=False), {os.getpid(): kernel}) is None


@pytest.mark.parametrize("text", ["", "0", "-1", "1.5", "99999999", "4194305", "\u0663", "x"])
def test_pids_that_cannot_be(text):
    assert toolcalls.dialects.parse_pid(text) is None


def test_lines_and_gaps_of_a_followed_file(tmp_path):
    path = tmp_path / "calls.jsonl"
    sensor = toolcalls.open_sensor(Direct(), Config(toolcalls=ToolCallSettings(otlp_listen="", files=(str(path),))))
    (gap,) = sensor.read(1)
    assert "No such file" in gap.reason
    assert sensor.read(2) == []
    path.write_text(json.dumps({**GOOD, "end_ns": time.time_ns(), "process_pid": os.getpid()}) + "\nnonsense\n")
    gap, call = sensor.read(3)
    assert (gap.lost, call.tool_name, call.time_ns) == (1, "bash", 3)
    assert call.process == processes.procfs.identify(os.getpid())
    assert sensor.period_ns is not None
    sensor.close()


def test_a_unix_socket(tmp_path):
    address = f"unix:{tmp_path}/otlp.sock"
    sensor = toolcalls.open_sensor(Direct(), Config(toolcalls=ToolCallSettings(otlp_listen=address)))
    with grpc.insecure_channel(address) as channel:
        channel.unary_unary(EXPORT)(request_of(span()).SerializeToString(), timeout=100)
    assert wait(sensor)[0].tool_name == "bash"
    sensor.close()


def test_a_port_in_use_closes_the_eye(sensor):
    taken = Config(toolcalls=ToolCallSettings(otlp_listen=f"127.0.0.1:{sensor.port}"))
    with pytest.raises(EyeClosed, match="cannot listen"):
        toolcalls.open_sensor(Direct(), taken)


def test_nothing_to_do_closes_the_eye():
    with pytest.raises(EyeClosed, match="neither"):
        toolcalls.open_sensor(Direct(), Config(toolcalls=ToolCallSettings(otlp_listen="", files=())))


def test_an_unwilling_broker_names_nobody():
    class Empty:
        def ask(self, request):
            return Found(()), ()

    sensor = toolcalls.ToolCallSensor(Empty(), "127.0.0.1:0", (), time.time_ns)
    assert sensor._process(heard(os.getpid(), time.time_ns()), {}) is None
    sensor.close()


def test_importing_it_imports_no_grpc():
    code = "import sys, gpuguard.sensors.toolcalls; sys.exit('grpc' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
