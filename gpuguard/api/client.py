"""Ask a running guard: for schedulers, scripts and the command line.

with gpuguard.connect() as guard:
for incident in guard.incidents(state="open"):
print(incident.title)
"""

from __future__ import annotations

import getpass
import os
from typing import TYPE_CHECKING, Literal, Self

import grpc

from gpuguard import paths
from gpuguard.api import MESSAGE_BYTES_MAX, socket_path
from gpuguard.api.translate import enum_value, from_message
from gpuguard.api.v1 import gpuguard_pb2 as pb
from gpuguard.api.v1 import gpuguard_pb2_grpc
from gpuguard.core.events import Incident
from gpuguard.core.guard import Explanation, ProcessVerdict
from gpuguard.core.records import Gap

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from gpuguard.core.labels import Verdict

TIMEOUT_S = 5.0


class NoGuard(Exception):
    """No guard answers there; the message says what to do."""


class NotThere(Exception):
    """The guard knows no such incident, decision, process or GPU."""


class Refused(Exception):
    """The guard answered, but not with what was asked for; the message is its own."""


class Client:
    """One connection to one guard. Made by `connect`; every call raises `NoGuard` where none answers in time."""

    def __init__(self, path: Path, timeout_s: float = TIMEOUT_S) -> None:
        self._path = path
        self._timeout_s = timeout_s
        self._closed = False
        self._channel = grpc.insecure_channel(
            f"unix:{path}", options=[("grpc.max_receive_message_length", MESSAGE_BYTES_MAX)])
        self._stub = gpuguard_pb2_grpc.GuardServiceStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; a watch in another thread ends."""
        self._closed = True
        self._channel.close()

    def processes(self, verdicts: Sequence[Verdict] = ()) -> list[ProcessVerdict]:
        """Return how processes stand, those of these verdicts only if any are given."""
        request = pb.ListProcessesRequest(verdicts=[enum_value("Verdict", word) for word in verdicts])  # type: ignore[misc]
        try:
            response = self._stub.ListProcesses(request, timeout=self._timeout_s)
        except grpc.RpcError as error:
            raise self._explained(error) from error
        return [from_message(one, ProcessVerdict) for one in response.processes]

    def explain(self, of: int | str) -> Explanation:
        """Return how a process (by its pid) or a GPU (by its UUID) stands. Raises NotThere if it is not known."""
        request = pb.ExplainRequest(pid=of) if isinstance(of, int) else pb.ExplainRequest(device_uuid=of)
        try:
            response = self._stub.Explain(request, timeout=self._timeout_s)
        except grpc.RpcError as error:
            raise self._explained(error) from error
        return from_message(response, Explanation)

    def incidents(self, state: Literal["", "open", "closed"] = "", limit: int = 0) -> list[Incident]:
        """Return incidents, the one that changed last at the end."""
        return self.incidents_and_token(state, limit)[0]

    def incidents_and_token(
        self, state: Literal["", "open", "closed"] = "", limit: int = 0
    ) -> tuple[list[Incident], str]:
        """Return incidents, and the token from which `watch` misses nothing after them."""
        request = pb.ListIncidentsRequest(limit=limit)
        if state:
            request.state = enum_value("IncidentState", state)  # type: ignore[assignment]
        try:
            response = self._stub.ListIncidents(request, timeout=self._timeout_s)
        except grpc.RpcError as error:
            raise self._explained(error) from error
        return [from_message(one, Incident) for one in response.incidents], response.resume_token

    def incident(self, incident_id: str) -> Incident:
        """Return one incident. Raises NotThere if there is none of that id."""
        try:
            response = self._stub.GetIncident(pb.GetIncidentRequest(incident_id=incident_id), timeout=self._timeout_s)
        except grpc.RpcError as error:
            raise self._explained(error) from error
        return from_message(response.incident, Incident)

    def watch(self, resume_token: str = "") -> Iterator[tuple[str, Incident | Gap]]:
        """Yield incidents as they change, each with the token to resume after it; a `Gap` stands for what was missed.

        Ends by raising NoGuard when the guard stops.
        """
        try:
            for one in self._stub.WatchIncidents(pb.WatchIncidentsRequest(resume_token=resume_token)):
                incident = one.WhichOneof("event") == "incident"
                item = from_message(one.incident, Incident) if incident else from_message(one.gap, Gap)
                yield one.resume_token, item
        except grpc.RpcError as error:
            if self._closed:
                return
            raise self._explained(error) from error

    def decide(self, decision_id: str, answer: Literal["approve", "reject"], reason: str = "", by: str = "") -> None:
        """Answer a decision that waits for a person. Raises NotThere if none of that id does."""
        request = pb.DecideRequest(
            decision_id=decision_id,
            answer=enum_value("Answer", answer),  # type: ignore[arg-type]
            answered_by=by or getpass.getuser(),
            reason=reason,
        )
        try:
            self._stub.Decide(request, timeout=self._timeout_s)
        except grpc.RpcError as error:
            raise self._explained(error) from error

    def _explained(self, error: grpc.RpcError) -> Exception:
        code, said = error.code(), error.details() or ""
        # CANCELLED: the guard stopped before it could say so.
        if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
            return NoGuard(_why_not(self._path))
        if code == grpc.StatusCode.DEADLINE_EXCEEDED:
            return NoGuard(f"the guard on {self._path} did not answer within {self._timeout_s:g} s")
        if code == grpc.StatusCode.NOT_FOUND:
            return NotThere(said)
        return Refused(f"{said} ({code.name})")


def connect(path: Path | None = None, timeout_s: float = TIMEOUT_S) -> Client:
    """Return a connection to the guard of this host (or of this user), or to the one on ``path``.

    Raises
    ------
    NoGuard
        No guard listens there.
    """
    chosen = path or socket_path()
    try:
        if not chosen.is_socket():
            raise NoGuard(_why_not(chosen))
    except PermissionError as error:
        raise NoGuard(_why_not(chosen)) from error
    return Client(chosen, timeout_s)


def _why_not(path: Path) -> str:
    """Return why nobody answers on this socket, and what to do."""
    try:
        there = path.is_socket()
    except PermissionError:
        return f"no permission for {path}: ask as the user who runs the guard, or as root"
    if not there and path == socket_path() and paths.guarded_by_another():
        return "the guard of this host is root's: ask as root (none of your own is running)"
    if not there:
        said = "is no socket" if path.exists() else "is not there"
        return f"no guard is running here ({path} {said}): start one with `gpuguard run`"
    if not os.access(path, os.W_OK):
        return f"no permission for {path}: ask as the user who runs the guard, or as root"
    return f"no guard answers on {path}: it is stopping, or has died; see `gpuguard doctor`"



