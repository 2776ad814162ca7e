"""The tool-call eye: what agents say that they do, from OTLP spans and from JSON lines.

**OTLP/gRPC** (opentelemetry.proto.collector.trace.v1.TraceService): a span is a tool call in any of these dialects;
of several names the newest stands first in `_NAMES`.

- OpenTelemetry GenAI: ``gen_ai.operation.name`` is execute_tool (or execute_command), or, from before that attribute,
  the span is called ``execute_tool NAME``; MCP's ``mcp.method.name`` tools/call.
- OpenInference: ``openinference.span.kind`` is TOOL.
- Traceloop: ``traceloop.span.kind`` is tool.

**JSON lines**, one object a line, from files that are followed as ``tail -F`` does (what was there before is not
read; a rotated or truncated file is begun anew). Unknown keys are ignored, so that more may be written::

    {"start_ns": 1767225600000000000,      required, Unix nanoseconds
     "end_ns": 1767225600500000000,        absent or null while it runs
     "trace_id": "32 hex", "span_id": "16 hex",   required
     "parent_span_id": "16 hex",
     "tool_name": "bash",                  required
     "tool_call_id": "call_1", "agent_name": "...", "conversation_id": "...", "sandbox_id": "...",
     "arguments": "a string, or any JSON value",
     "process_pid": 4242}                  of the agent, as this host numbers it

All of this is the agent's word: it joins records, it clears nobody. A pid is believed only where the broker finds
such a process now, with a command line, older than the end of the call, and, if a span named it, in our own network
namespace (over loopback a span can have come from no other); a pid of a container's own namespace fails this or names
nobody. Arguments are redacted before they are kept.

gRPC is imported when the sensor opens.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
import threading
import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from gpuguard.core.records import Block, Gap, ToolCall
from gpuguard.messages import Answer, Found, ReadProcess, Request
from gpuguard.redaction import printable, redact_text
from gpuguard.sensors import EyeClosed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from gpuguard.config import Config
    from gpuguard.core.records import ProcessStarted
    from gpuguard.core.subjects import ProcessId

NAME = "toolcalls"
MESSAGE_BYTES_MAX = 4 * 1024 * 1024
SPANS_MAX = 10_000
ATTRIBUTES_MAX = 128
QUEUE_MAX = 8192
TAKEN_MAX = 1024
NAME_CHARS_MAX = 128
ARGUMENTS_CHARS_MAX = 512
LINE_BYTES_MAX = 64 * 1024
FILE_BYTES_PER_READ = 1024 * 1024
FILES_PERIOD_NS = 200_000_000
WORKERS = 2
STOP_S = 0.5
TIME_MAX_NS = 1 << 62

_SERVICE = "opentelemetry.proto.collector.trace.v1.TraceService"
_NAMES: Mapping[str, tuple[str, ...]] = {
    "tool_name": ("gen_ai.tool.name", "tool.name", "tool_call.function.name", "traceloop.entity.name"),
    "tool_call_id": ("gen_ai.tool.call.id", "tool_call.id", "tool.id"),
    "agent_name": ("gen_ai.agent.name", "agent.name"),
    "conversation_id": ("gen_ai.conversation.id", "session.id", "gen_ai.session.id"),
    "sandbox_id": ("sandbox.id", "opensandbox.sandbox.id", "rock.sandbox.id", "gpuguard.sandbox.id", "container.id"),
    "arguments": ("gen_ai.tool.call.arguments", "process.command_line", "process.command_args", "tool.parameters",
                  "tool_call.function.arguments", "traceloop.entity.input", "input.value"),
}
_OPERATIONS = ("execute_tool", "execute_command")
_SPAN_NAME = re.compile(r"execute_tool\s+(\S.*)")


class Broker(Protocol):
    """What this sensor needs of the broker's client."""

    def ask(self, request: Request) -> tuple[Answer, tuple[int, ...]]:
        """Send one request and return its answer with the descriptors beside it."""
        ...


class Heard(msgspec.Struct, frozen=True):
    """A tool call as it was said, and the pid that it named; ``is_local``: who said it shares our network namespace."""

    call: ToolCall
    pid: int | None
    is_local: bool


# -- parsing, pure ----------------------------------------------------------------------------------------------------


def tool_span(name: str, attributes: Mapping[str, str]) -> str | None:
    """Return the tool's name if a span of this name and with these attributes is a tool call, else None."""
    operation = attributes.get("gen_ai.operation.name", "")
    named = _SPAN_NAME.fullmatch(name)
    if not (
        operation in _OPERATIONS
        or attributes.get("mcp.method.name") == "tools/call"
        or attributes.get("openinference.span.kind", "").upper() == "TOOL"
        or attributes.get("traceloop.span.kind", "").lower() == "tool"
        or (not operation and named)
    ):
        return None
    tool = _first(attributes, "tool_name") or (named.group(1) if named else name)
    return _short(tool) or "unnamed"


def _first(attributes: Mapping[str, str], field: str) -> str:
    return next((attributes[name] for name in _NAMES[field] if attributes.get(name)), "")


def _short(text: str) -> str:
    return printable(text[:NAME_CHARS_MAX])


def attribute_texts(attributes: Iterable[Any]) -> dict[str, str]:
    """Return OTLP KeyValues as text, at most ATTRIBUTES_MAX of them; of nested values only lists of plain ones."""
    texts: dict[str, str] = {}
    for one in attributes:
        if len(texts) >= ATTRIBUTES_MAX:
            break
        texts[one.key[:NAME_CHARS_MAX]] = _value_text(one.value)
    return texts


def _value_text(value: Any) -> str:
    match value.WhichOneof("value"):
        case "string_value":
            text: str = value.string_value
            return text
        case "int_value":
            return str(value.int_value)
        case "array_value":
            return " ".join(one.string_value for one in value.array_value.values[:ATTRIBUTES_MAX])
        case "bool_value":
            return str(value.bool_value).lower()
        case "double_value":
            return str(value.double_value)
    return ""


def parse_pid(text: str) -> int | None:
    """Return a pid that could exist, None for anything else; pids end at 2**22, proc(5)."""
    return int(text) if text.isascii() and text.isdecimal() and len(text) <= 7 and 0 < int(text) <= 1 << 22 else None


def parse_spans(request: Any, now_ns: int) -> tuple[list[Heard], int]:
    """Return the tool calls of an ExportTraceServiceRequest, and how many spans were refused as malformed.

    A span without ids of the right length (W3C Trace Context: 16 and 8 bytes, not all zero) or with an end before its
    start joins nothing and is refused.
    """
    heard: list[Heard] = []
    refused = seen = 0
    for group in request.resource_spans:
        resource = attribute_texts(group.resource.attributes)
        for scope in group.scope_spans:
            for span in scope.spans:
                seen += 1
                if seen > SPANS_MAX:
                    refused += 1
                    continue
                attributes = attribute_texts(span.attributes)
                tool = tool_span(span.name, attributes)
                if tool is None:
                    continue
                one = _call_of_span(span, tool, attributes, resource, now_ns)
                if one:
                    heard.append(one)
                else:
                    refused += 1
    return heard, refused


def _call_of_span(span: Any, tool: str, attributes: dict[str, str], resource: dict[str, str],
                  now_ns: int) -> Heard | None:
    start_ns, end_ns = span.start_time_unix_nano, span.end_time_unix_nano
    if len(span.trace_id) != 16 or len(span.span_id) != 8 or not any(span.trace_id) or not any(span.span_id):
        return None
    if not 0 < start_ns < TIME_MAX_NS or (end_ns and not start_ns <= end_ns < TIME_MAX_NS):
        return None
    everything = {**resource, **attributes}
    return Heard(
        ToolCall(
            time_ns=now_ns,
            start_ns=start_ns,
            end_ns=end_ns or None,
            trace_id=span.trace_id.hex(),
            span_id=span.span_id.hex(),
            parent_span_id=span.parent_span_id.hex() if len(span.parent_span_id) == 8 else "",
            tool_name=tool,
            tool_call_id=_short(_first(attributes, "tool_call_id")),
            agent_name=_short(_first(everything, "agent_name") or resource.get("service.name", "")),
            conversation_id=_short(_first(everything, "conversation_id")),
            sandbox_id=_short(_first(everything, "sandbox_id")),
            arguments=redact_text(_first(attributes, "arguments"), ARGUMENTS_CHARS_MAX),
        ),
        # On the span itself process.pid is that of what the tool ran (the command span); on the resource, the agent's.
        parse_pid(resource.get("process.pid", "")),
        is_local=True,
    )


class _Line(msgspec.Struct, frozen=True):
    start_ns: int
    trace_id: str
    span_id: str
    tool_name: str
    end_ns: int | None = None
    parent_span_id: str = ""
    tool_call_id: str = ""
    agent_name: str = ""
    conversation_id: str = ""
    sandbox_id: str = ""
    arguments: msgspec.Raw = msgspec.Raw(b'""')
    process_pid: int | None = None


_LINE = msgspec.json.Decoder(_Line)
_TRACE_ID, _SPAN_ID = re.compile(r"(?!0{32})[0-9a-f]{32}"), re.compile(r"(?!0{16})[0-9a-f]{16}")


def parse_line(line: bytes, now_ns: int) -> Heard:
    """Return the tool call of one JSON line; raises `ValueError` with what is wrong with it."""
    said = _LINE.decode(line)
    if not _TRACE_ID.fullmatch(said.trace_id) or not _SPAN_ID.fullmatch(said.span_id):
        raise ValueError("trace_id and span_id must be 32 and 16 lower-case hexadecimal digits, not all zero")
    end_ns = said.start_ns if said.end_ns is None else said.end_ns
    if not 0 < said.start_ns <= end_ns < TIME_MAX_NS:
        raise ValueError("start_ns and end_ns must be Unix nanoseconds, in this order")
    raw = bytes(said.arguments)
    arguments = msgspec.json.decode(raw, type=str) if raw.startswith(b'"') else raw.decode(errors="replace")
    return Heard(
        ToolCall(
            time_ns=now_ns,
            start_ns=said.start_ns,
            end_ns=said.end_ns,
            trace_id=said.trace_id,
            span_id=said.span_id,
            parent_span_id=said.parent_span_id if _SPAN_ID.fullmatch(said.parent_span_id) else "",
            tool_name=_short(said.tool_name) or "unnamed",
            tool_call_id=_short(said.tool_call_id),
            agent_name=_short(said.agent_name),
            conversation_id=_short(said.conversation_id),
            sandbox_id=_short(said.sandbox_id),
            arguments=redact_text(arguments, ARGUMENTS_CHARS_MAX),
        ),
        parse_pid(str(said.process_pid)),
        is_local=False,
    )


def listen_address(text: str) -> str:
    """Return the address for gRPC; raises `EyeClosed` unless only this host can reach it."""
    if text.startswith("unix:") and len(text) > len("unix:"):
        return text
    host, separator, port = text.rpartition(":")
    if separator and port.isdecimal() and int(port) < 1 << 16 and host in ("127.0.0.1", "[::1]", "localhost"):
        return text
    raise EyeClosed(f"toolcalls.otlp_listen is {text!r}: spans are unauthenticated, so it must be unix:PATH, "
                    "127.0.0.1:PORT or [::1]:PORT")


# -- the queue between gRPC's threads and the guard -------------------------------------------------------------------


class _Queue:
    """Bounded; readable on ``descriptor`` while something waits."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: deque[Heard] = deque()
        self._lost: dict[str, int] = {}
        self.descriptor = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def put(self, heard: Iterable[Heard]) -> int:
        """Queue what there is room for; return how many there was none for. Any thread."""
        refused = 0
        with self._lock:
            for one in heard:
                if len(self._waiting) < QUEUE_MAX:
                    self._waiting.append(one)
                else:
                    refused += 1
            if refused:
                self._lost_now("tool calls came faster than they could be read", refused)
            self._signal()
        return refused

    def lose(self, reason: str, count: int) -> None:
        """Count what could not be taken. Any thread."""
        with self._lock:
            self._lost_now(reason, count)
            self._signal()

    def take(self, count: int) -> tuple[list[Heard], dict[str, int]]:
        """Return up to ``count`` calls and what was lost, by reason."""
        with self._lock:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self.descriptor)
            taken = [self._waiting.popleft() for _ in range(min(count, len(self._waiting)))]
            lost, self._lost = self._lost, {}
            if self._waiting:
                self._signal()
        return taken, lost

    def close(self) -> None:
        with self._lock:
            os.close(self.descriptor)
            self.descriptor = -1

    def _lost_now(self, reason: str, count: int) -> None:
        self._lost[reason] = self._lost.get(reason, 0) + count

    def _signal(self) -> None:
        if self.descriptor >= 0:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_write(self.descriptor, 1)


def export_handler(queue: _Queue, clock_ns: Callable[[], int]) -> Callable[[bytes, Any], Any]:
    """Return the service's one method. It takes bytes, so that what does not parse is answered INVALID_ARGUMENT."""
    import grpc
    from google.protobuf.message import DecodeError
    from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as service

    def export(data: bytes, context: grpc.ServicerContext) -> service.ExportTraceServiceResponse:
        try:
            request = service.ExportTraceServiceRequest.FromString(data)
            heard, malformed = parse_spans(request, clock_ns())
        except (DecodeError, UnicodeDecodeError) as error:
            queue.lose("malformed OTLP requests", 1)
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"not an ExportTraceServiceRequest: {error}")
            raise
        if malformed:
            queue.lose("malformed tool-call spans", malformed)
        rejected = malformed + queue.put(heard)
        response = service.ExportTraceServiceResponse()
        if rejected:
            response.partial_success.rejected_spans = rejected
            response.partial_success.error_message = "malformed (ids, times), or more than could be taken"
        return response

    return export


class _Receiver:
    """The OTLP/gRPC server."""

    def __init__(self, address: str, queue: _Queue, clock_ns: Callable[[], int]) -> None:
        import concurrent.futures

        import grpc

        self._server = grpc.server(
            concurrent.futures.ThreadPoolExecutor(WORKERS, thread_name_prefix="otlp"),
            maximum_concurrent_rpcs=4 * WORKERS,
            options=(
                ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
                ("grpc.max_concurrent_streams", 8),
                ("grpc.so_reuseport", 0),
            ),
        )
        method = grpc.unary_unary_rpc_method_handler(
            export_handler(queue, clock_ns),
            response_serializer=lambda response: response.SerializeToString(),
        )
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_SERVICE, {"Export": method}),))
        try:
            self.port: int = self._server.add_insecure_port(address)
        except RuntimeError as error:
            raise EyeClosed(f"OTLP cannot listen on {address}: {error}") from error
        if self.port == 0:
            raise EyeClosed(f"OTLP cannot listen on {address}: in use?")
        self._server.start()

    def close(self) -> None:
        self._server.stop(STOP_S).wait(2 * STOP_S)


# -- followed files ---------------------------------------------------------------------------------------------------


class Follower:
    """Reads the lines that are appended to a file, also when it is truncated, or replaced by another of its name.

    ``trouble`` says why it cannot be read now, "" if it can.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.trouble = ""
        self._rest = b""
        self._skips = False
        self._descriptor = self._open()
        if self._descriptor is not None:
            os.lseek(self._descriptor, 0, os.SEEK_END)

    def lines(self) -> tuple[list[bytes], int]:
        """Return the whole lines since the last call, and how many were too long to be kept."""
        if self._descriptor is None:
            self._descriptor = self._open()
        if self._descriptor is None:
            return [], 0
        try:
            return self._split(self._read(self._descriptor))
        except OSError as error:
            self.trouble = str(error.strerror)
            self.close()
            return [], 0

    def close(self) -> None:
        """Close the file."""
        if self._descriptor is not None:
            os.close(self._descriptor)
        self._descriptor = None

    def _read(self, descriptor: int) -> bytes:
        status = os.fstat(descriptor)
        if os.lseek(descriptor, 0, os.SEEK_CUR) > status.st_size:
            os.lseek(descriptor, 0, os.SEEK_SET)
            self._rest, self._skips = b"", False
        data = os.read(descriptor, FILE_BYTES_PER_READ)
        if data or not self._was_replaced(status):
            return data
        self.close()
        self._descriptor = self._open()
        self._rest, self._skips = b"", False
        return os.read(self._descriptor, FILE_BYTES_PER_READ) if self._descriptor is not None else b""

    def _split(self, data: bytes) -> tuple[list[bytes], int]:
        *whole, self._rest = (self._rest + data).split(b"\n")
        too_long = 0
        if whole and self._skips:
            whole, self._skips = whole[1:], False
        if len(self._rest) > LINE_BYTES_MAX:
            too_long += not self._skips
            self._rest, self._skips = b"", True
        kept = [line for line in whole if len(line) <= LINE_BYTES_MAX]
        too_long += len(whole) - len(kept)
        return [line for line in kept if line.strip()], too_long

    def _open(self) -> int | None:
        try:
            # O_NONBLOCK: a FIFO of this name must not hold the guard up.
            descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            self.trouble = str(error.strerror)
            return None
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            self.trouble = "Not a regular file"
            return None
        self.trouble = ""
        return descriptor

    def _was_replaced(self, open_status: os.stat_result) -> bool:
        try:
            there = self.path.stat()
        except OSError:
            return False
        return (there.st_dev, there.st_ino) != (open_status.st_dev, open_status.st_ino)


# -- the sensor -------------------------------------------------------------------------------------------------------


class ToolCallSensor:
    """Hands out what agents reported, each with the process that it names if that is who it can be."""

    name = NAME

    def __init__(self, broker: Broker, listen: str, files: Iterable[str], clock_ns: Callable[[], int]) -> None:
        self._broker = broker
        self._queue = _Queue()
        self.descriptor: int | None = self._queue.descriptor
        try:
            self._receiver = _Receiver(listen_address(listen), self._queue, clock_ns) if listen else None
        except (EyeClosed, ImportError):
            self._queue.close()
            raise
        self.port = self._receiver.port if self._receiver else None
        self._followers = [Follower(Path(path)) for path in files]
        self.period_ns: int | None = FILES_PERIOD_NS if self._followers else None
        self._netns: int | None = None
        self._told: dict[Path, str] = {}

    def read(self, now_ns: int) -> list[Block]:
        """Return what was reported since the last call."""
        blocks: list[Block] = []
        for follower in self._followers:
            blocks += self._follow(follower, now_ns)
        taken, lost = self._queue.take(TAKEN_MAX)
        asked: dict[int, ProcessStarted | None] = {}
        for heard in taken:
            blocks.append(msgspec.structs.replace(heard.call, process=self._process(heard, asked)))
        blocks += [Gap(now_ns, NAME, reason, lost=count) for reason, count in lost.items()]
        return blocks

    def close(self) -> None:
        """Stop listening and close everything."""
        if self._receiver:
            self._receiver.close()
        for follower in self._followers:
            follower.close()
        self._queue.close()
        self.descriptor = None

    def _follow(self, follower: Follower, now_ns: int) -> list[Block]:
        blocks: list[Block] = []
        lines, too_long = follower.lines()
        if follower.trouble and follower.trouble != self._told.get(follower.path):
            blocks.append(Gap(now_ns, NAME, f"{follower.path}: {follower.trouble}", since_ns=now_ns))
        self._told[follower.path] = follower.trouble
        heard: list[Heard] = []
        wrong, why = 0, ""
        for line in lines:
            try:
                heard.append(parse_line(line, now_ns))
            except (ValueError, RecursionError) as error:
                wrong, why = wrong + 1, str(error)
        self._queue.put(heard)
        if wrong:
            blocks.append(Gap(now_ns, NAME, f"{follower.path}: not a tool call: {printable(why[:200])}", lost=wrong))
        if too_long:
            reason = f"{follower.path}: line of more than {LINE_BYTES_MAX} bytes"
            blocks.append(Gap(now_ns, NAME, reason, lost=too_long))
        return blocks

    def _process(self, heard: Heard, asked: dict[int, ProcessStarted | None]) -> ProcessId | None:
        if heard.pid is None:
            return None
        if heard.pid not in asked:
            asked[heard.pid] = self._ask(heard.pid)
        found = asked[heard.pid]
        if found is None or not found.argv or found.time_ns > (heard.call.end_ns or heard.call.time_ns):
            return None
        if not heard.is_local:
            return found.process
        if self._netns is None:
            own = self._ask(os.getpid())
            self._netns = own.netns if own else None
        return found.process if found.netns == self._netns else None

    def _ask(self, pid: int) -> ProcessStarted | None:
        answer, _ = self._broker.ask(ReadProcess(pid))
        return answer.processes[0] if isinstance(answer, Found) and answer.processes else None


def open_sensor(broker: Broker, config: Config) -> ToolCallSensor:
    """Listen and follow as the settings say; raises `EyeClosed`."""
    settings = config.toolcalls
    if not settings.otlp_listen and not settings.files:
        raise EyeClosed("neither toolcalls.otlp_listen nor toolcalls.files is set")
    try:
        return ToolCallSensor(broker, settings.otlp_listen, settings.files, time.time_ns)
    except ImportError as error:
        raise EyeClosed(f"OTLP needs grpcio and opentelemetry-proto, readable by the guard's user: {error}") from error
