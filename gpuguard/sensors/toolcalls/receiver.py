"""The OTLP/gRPC receiver, and the queue between its threads and the guard. gRPC is imported when it opens."""

from __future__ import annotations

import contextlib
import os
import threading
from collections import deque
from typing import TYPE_CHECKING, Any

from gpuguard.sensors import EyeClosed
from gpuguard.sensors.toolcalls.dialects import parse_spans

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from gpuguard.sensors.toolcalls.dialects import Heard

MESSAGE_BYTES_MAX = 4 * 1024 * 1024
QUEUE_MAX = 8192
WORKERS = 2
STOP_S = 0.5

_SERVICE = "opentelemetry.proto.collector.trace.v1.TraceService"


def listen_address(text: str) -> str:
    """Return the address for gRPC; raises `EyeClosed` unless only this host can reach it."""
    if text.startswith("unix:") and len(text) > len("unix:"):
        return text
    host, separator, port = text.rpartition(":")
    if separator and port.isdecimal() and int(port) < 1 << 16 and host in ("127.0.0.1", "[::1]", "localhost"):
        return text
    raise EyeClosed(f"toolcalls.otlp_listen is {text!r}: spans are unauthenticated, so it must be unix:PATH, "
                    "127.0.0.1:PORT or [::1]:PORT")


class Queue:
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
        """Wake nobody any more."""
        with self._lock:
            os.close(self.descriptor)
            self.descriptor = -1

    def _lost_now(self, reason: str, count: int) -> None:
        self._lost[reason] = self._lost.get(reason, 0) + count

    def _signal(self) -> None:
        if self.descriptor >= 0:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_write(self.descriptor, 1)


def export_handler(queue: Queue, clock_ns: Callable[[], int]) -> Callable[[bytes, Any], Any]:
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


class Receiver:
    """The OTLP/gRPC server."""

    def __init__(self, address: str, queue: Queue, clock_ns: Callable[[], int]) -> None:
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
            raise EyeClosed(f"OTLP cannot listen on {address}: it is in use, or not ours to bind") from error
        if self.port == 0:
            raise EyeClosed(f"OTLP cannot listen on {address}: it is in use, or not ours to bind")
        self._server.start()

    def close(self) -> None:
        """Stop listening."""
        self._server.stop(STOP_S).wait(2 * STOP_S)
