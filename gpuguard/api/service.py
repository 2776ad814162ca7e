"""The service: what a running guard answers on its socket.

It reads the guard through a `GuardView` and holds nothing of its own but the ring of watchers. The socket's mode 0600
is the authentication; ``answered_by`` is what the caller says of itself. Every call and queue is bounded.
"""

from __future__ import annotations

import os
import secrets
import socket as sockets
import stat
import time
from concurrent import futures
from threading import BoundedSemaphore
from typing import TYPE_CHECKING, NoReturn, Protocol

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from gpuguard import paths
from gpuguard.api import INCIDENTS_MAX, MESSAGE_BYTES_MAX
from gpuguard.api.translate import enum_word, to_message
from gpuguard.api.v1 import gpuguard_pb2 as pb
from gpuguard.api.v1 import gpuguard_pb2_grpc
from gpuguard.api.watching import BadToken, Ring
from gpuguard.core.events import Incident

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from gpuguard.core.events import Event
    from gpuguard.core.guard import Explanation, ProcessVerdict

SERVICE = "gpuguard.v1.GuardService"

#: A watcher holds a thread for as long as it watches; the others answer everything else.
WATCHERS_MAX = 16
OTHER_THREADS = 4

WORD_CHARACTERS_MAX = 256
REASON_CHARACTERS_MAX = 2_000
SOCKET_MODE = 0o600
_WORDS = {"pid": "pid", "device_uuid": "GPU"}
_SOCKET_PATH_BYTES_MAX = 107  # sun_path of linux/un.h, less the final zero


class GuardView(Protocol):
    """What the service needs of a guard; every method may be called from any thread."""

    def processes(self) -> Sequence[ProcessVerdict]:
        """Return how every process stands."""
        ...

    def explain(self, of: int | str) -> Explanation | None:
        """Return how one process (by its pid) or GPU (by its UUID) stands, None if it is not known."""
        ...

    def incidents(self) -> Sequence[Incident]:
        """Return all incidents, the one that changed last at the end."""
        ...

    def incident(self, incident_id: str) -> Incident | None:
        """Return one incident, None if there is none."""
        ...

    def decide(self, decision_id: str, answer: str, by: str, reason: str) -> bool:
        """Take a person's answer; False if no such decision waits."""
        ...

    def subscribe(self, subscriber: Callable[[Event], None]) -> Callable[[], None]:
        """Call ``subscriber`` with every event from now on; return how to end that."""
        ...


class SocketTaken(Exception):
    """Another guard answers on this socket."""


class _Servicer(gpuguard_pb2_grpc.GuardServiceServicer):
    """One method a call, in the order of the .proto file."""

    def __init__(self, view: GuardView, ring: Ring) -> None:
        self._view = view
        self._ring = ring
        self._watchers = BoundedSemaphore(WATCHERS_MAX)

    def ListProcesses(  # noqa: N802 - the name of the call
        self, request: pb.ListProcessesRequest, context: grpc.ServicerContext
    ) -> pb.ListProcessesResponse:
        wanted = {enum_word("Verdict", number) for number in request.verdicts}
        if "unspecified" in wanted:
            _refuse(context, grpc.StatusCode.INVALID_ARGUMENT, "verdicts: no such verdict")
        response = pb.ListProcessesResponse()
        for standing in self._view.processes():
            if not wanted or standing.verdict in wanted:
                to_message(standing, response.processes.add())
        return response

    def Explain(  # noqa: N802
        self, request: pb.ExplainRequest, context: grpc.ServicerContext
    ) -> pb.ExplainResponse:
        asked = request.WhichOneof("asked")
        if asked is None:
            _refuse(context, grpc.StatusCode.INVALID_ARGUMENT, "pid or device_uuid: one of them must be said")
        _bound(context, "device_uuid", request.device_uuid, WORD_CHARACTERS_MAX)
        of: int | str = getattr(request, asked)
        found = self._view.explain(of)
        if found is None:
            _refuse(context, grpc.StatusCode.NOT_FOUND, f"nothing is known of {_WORDS[asked]} {of}")
        return to_message(found, pb.ExplainResponse())

    def ListIncidents(  # noqa: N802
        self, request: pb.ListIncidentsRequest, context: grpc.ServicerContext  # noqa: ARG002
    ) -> pb.ListIncidentsResponse:
        # The token first: an incident that changes in between is then both listed and watched, never neither.
        response = pb.ListIncidentsResponse(resume_token=self._ring.token())
        state = enum_word("IncidentState", request.state)
        matching = [one for one in self._view.incidents() if state in ("unspecified", one.state)]
        for incident in matching[-min(request.limit or INCIDENTS_MAX, INCIDENTS_MAX):]:
            to_message(incident, response.incidents.add())
        return response

    def GetIncident(  # noqa: N802
        self, request: pb.GetIncidentRequest, context: grpc.ServicerContext
    ) -> pb.GetIncidentResponse:
        _bound(context, "incident_id", request.incident_id, WORD_CHARACTERS_MAX)
        incident = self._view.incident(request.incident_id)
        if incident is None:
            _refuse(context, grpc.StatusCode.NOT_FOUND, f"no incident {request.incident_id!r}")
        return pb.GetIncidentResponse(incident=to_message(incident, pb.Incident()))

    def WatchIncidents(  # noqa: N802
        self, request: pb.WatchIncidentsRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.WatchIncidentsResponse]:
        if not self._watchers.acquire(blocking=False):
            _refuse(context, grpc.StatusCode.RESOURCE_EXHAUSTED, f"{WATCHERS_MAX} watch already")
        try:
            context.add_callback(self._ring.wake)
            yield from self._watch(request.resume_token, context)
        finally:
            self._watchers.release()

    def _watch(self, token: str, context: grpc.ServicerContext) -> Iterator[pb.WatchIncidentsResponse]:
        try:
            followed = self._ring.watch(token, context.is_active)
        except BadToken:
            _refuse(context, grpc.StatusCode.INVALID_ARGUMENT, "resume_token: not one that this service gave")
        for place, item in followed:
            response = pb.WatchIncidentsResponse(resume_token=place)
            to_message(item, response.incident if isinstance(item, Incident) else response.gap)
            yield response
        if self._ring.closed:
            _refuse(context, grpc.StatusCode.UNAVAILABLE, "the guard is stopping")

    def Decide(  # noqa: N802
        self, request: pb.DecideRequest, context: grpc.ServicerContext
    ) -> pb.DecideResponse:
        answer = enum_word("Answer", request.answer)
        if answer == "unspecified":
            _refuse(context, grpc.StatusCode.INVALID_ARGUMENT, "answer: approve or reject")
        if not request.answered_by.strip():
            _refuse(context, grpc.StatusCode.INVALID_ARGUMENT, "answered_by: who answers must be said")
        _bound(context, "decision_id", request.decision_id, WORD_CHARACTERS_MAX)
        _bound(context, "answered_by", request.answered_by, WORD_CHARACTERS_MAX)
        _bound(context, "reason", request.reason, REASON_CHARACTERS_MAX)
        if not self._view.decide(request.decision_id, answer, request.answered_by, request.reason):
            _refuse(context, grpc.StatusCode.NOT_FOUND, f"no decision {request.decision_id!r} waits for an answer")
        return pb.DecideResponse()


class ApiServer:
    """The running service. Made started; `stop` ends it and removes the socket.

    Parameters
    ----------
    view
        The guard.
    path
        The socket; its folder is made if need be.

    Raises
    ------
    SocketTaken
        Another guard answers there.
    OSError
        The socket cannot be made there.
    """

    def __init__(self, view: GuardView, path: Path) -> None:
        self._path = path
        self._ring = Ring(secrets.token_hex(8), time.time_ns)
        self._health = health.HealthServicer()
        self._server = grpc.server(
            futures.ThreadPoolExecutor(WATCHERS_MAX + OTHER_THREADS, thread_name_prefix="api"),
            maximum_concurrent_rpcs=4 * (WATCHERS_MAX + OTHER_THREADS),
            options=[
                ("grpc.max_receive_message_length", 64 * 1024),
                ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
                ("grpc.so_reuseport", 0),
            ],
        )
        gpuguard_pb2_grpc.add_GuardServiceServicer_to_server(_Servicer(view, self._ring), self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server)
        self._listen()
        self._end_subscription = view.subscribe(self._ring.take)
        self._server.start()
        for name in ("", SERVICE):
            self._health.set(name, health_pb2.HealthCheckResponse.SERVING)

    def stop(self, grace_s: float = 0.5) -> None:
        """End every call, give the socket back, and return when that is done."""
        self._health.enter_graceful_shutdown()
        self._end_subscription()
        self._ring.close()
        self._server.stop(grace_s).wait()
        self._path.unlink(missing_ok=True)

    def _listen(self) -> None:
        _clear(self._path)
        paths.make_dir(self._path.parent)
        # Between bind and chmod the socket would be open to others: the mask closes that moment.
        before = os.umask(0o177)
        try:
            self._server.add_insecure_port(f"unix:{self._path}")
        except RuntimeError as error:
            raise OSError(f"cannot listen on {self._path}: {error}") from error
        finally:
            os.umask(before)
        self._path.chmod(SOCKET_MODE)


def _clear(path: Path) -> None:
    """Remove what a guard that died left there; raise if one that lives answers, or if it is something else."""
    if len(os.fsencode(path)) > _SOCKET_PATH_BYTES_MAX:
        raise OSError(f"cannot listen on {path}: a socket's path may have {_SOCKET_PATH_BYTES_MAX} bytes")
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise OSError(f"cannot listen on {path}: it is there and is no socket")
    except FileNotFoundError:
        return
    with sockets.socket(sockets.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
        else:
            raise SocketTaken(f"another guard answers on {path}")


def _bound(context: grpc.ServicerContext, name: str, value: str, characters_max: int) -> None:
    if len(value) > characters_max:
        _refuse(context, grpc.StatusCode.INVALID_ARGUMENT, f"{name}: longer than {characters_max} characters")


def _refuse(context: grpc.ServicerContext, status: grpc.StatusCode, text: str) -> NoReturn:
    context.abort(status, text)
    raise AssertionError("abort raises")
