"""A tool call as it is said, in the dialects of OTLP spans and in JSON lines. Pure: bytes and messages in, calls out.

**OTLP/gRPC** (opentelemetry.proto.collector.trace.v1.TraceService): a span is a tool call in any of these dialects;
of several names the newest stands first in `_NAMES`.

- OpenTelemetry GenAI: ``gen_ai.operation.name`` is execute_tool (or execute_command), or, from before that attribute,
  the span is called ``execute_tool NAME``; MCP's ``mcp.method.name`` tools/call.
- OpenInference: ``openinference.span.kind`` is TOOL.
- Traceloop: ``traceloop.span.kind`` is tool.

**JSON lines**, one object a line, from followed files. Unknown keys are ignored, so that more may be written::

    {"start_ns": 1767225600000000000,      required, Unix nanoseconds
     "end_ns": 1767225600500000000,        absent or null while it runs
     "trace_id": "32 hex", "span_id": "16 hex",   required
     "parent_span_id": "16 hex",
     "tool_name": "bash",                  required
     "tool_call_id": "call_1", "agent_name": "...", "conversation_id": "...", "sandbox_id": "...",
     "arguments": "a string, or any JSON value",
     "process_pid": 4242}                  of the agent, as this host numbers it

Arguments are redacted before they are kept.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import msgspec

from gpuguard.core.records import ToolCall
from gpuguard.redaction import printable, redact_text

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

SPANS_MAX = 10_000
ATTRIBUTES_MAX = 128
NAME_CHARS_MAX = 128
ARGUMENTS_CHARS_MAX = 512
TIME_MAX_NS = 1 << 62

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


class Heard(msgspec.Struct, frozen=True):
    """A tool call as it was said, and the pid that it named; ``is_local``: who said it shares our network namespace."""

    call: ToolCall
    pid: int | None
    is_local: bool


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
