"""Everything that may be asked of the broker, by whom, and who answers: a static table from type to handler.

After OpenSSH's monitor. A sensor's ``grant`` narrows a handle before it leaves; our own copy is closed once it is sent.
"""

from __future__ import annotations

import importlib
import os
import socket
from typing import TYPE_CHECKING

import structlog

from gpuguard import confine, proctree
from gpuguard.broker.audit import AuditFailed
from gpuguard.broker.service_manager import MANAGER
from gpuguard.messages import (
    Act,
    Acted,
    Answer,
    Approve,
    Audit,
    Disarm,
    Done,
    Hello,
    ListActions,
    ListProcesses,
    OpenLaunches,
    OpenPackets,
    OpenProcesses,
    OpenReader,
    ReadImage,
    ReadProcess,
    ReadSockets,
    Refused,
    Request,
    ScanLaunches,
    Undo,
    Watching,
    Welcome,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from gpuguard.broker.enforcement import Enforcement

VERSION = 1

#: Which sensor's ``grant`` answers a request.
GRANTS: dict[type, str] = {
    OpenPackets: "packets",
    OpenProcesses: "processes",
    ListProcesses: "processes",
    ReadProcess: "processes",
    ReadSockets: "sockets",
    OpenLaunches: "launches",
    ScanLaunches: "launches",
    ReadImage: "launches",
}
#: What one request costs of the budget in `serving`; a guard that asks faster is read more slowly, never refused.
COSTS: dict[type, float] = {OpenPackets: 40, OpenProcesses: 40, OpenLaunches: 40, ScanLaunches: 20, ListProcesses: 10,
                            ReadSockets: 10, ReadImage: 20, OpenReader: 100, Act: 20, Undo: 20, Disarm: 20, Audit: 4}
#: The sensors that have a privileged half.
EYES = tuple(dict.fromkeys(GRANTS.values()))

Reply = tuple[Answer, tuple[int, ...]]

_log: structlog.stdlib.BoundLogger = structlog.get_logger("gpuguard.broker")


def _hello(enforcement: Enforcement, request: Hello) -> Reply:
    if request.version != VERSION:
        return Refused(f"this broker speaks version {VERSION}, not {request.version}"), ()
    return Welcome(boot_id=proctree.boot_id(), hostname=socket.gethostname(),
                   clock_ticks_per_s=os.sysconf("SC_CLK_TCK"), enforcing=enforcement.enforcing,
                   eyes={eye: _closed(eye) for eye in EYES}), ()


def _closed(eye: str) -> str:
    """Return why a sensor's privileged half cannot be used at all, "" if it can be asked."""
    try:
        importlib.import_module(f"gpuguard.sensors.{eye}").grant  # noqa: B018  only whether it is there
    except (ImportError, AttributeError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    return confine.missing_capability(eye)


def _grant(_: Enforcement, request: Request) -> Reply:
    name = GRANTS[type(request)]
    try:
        reply: Reply = importlib.import_module(f"gpuguard.sensors.{name}").grant(request)
    except Exception as error:  # noqa: BLE001  whatever a sensor stumbles over must not end the process that undoes
        _log.error("sensor failed in the broker", sensor=name, error=f"{type(error).__name__}: {error}")
        return Refused(f"{name}: {type(error).__name__}: {error}"), ()
    return reply


def _open_reader(_: Enforcement, __: OpenReader) -> Reply:
    from gpuguard.code import reader

    return reader.grant(confine.NOBODY if confine.guard_identity() else None)


def _act(enforcement: Enforcement, request: Act) -> Reply:
    return Acted((enforcement.act(request, "guard"),)), ()


def _stop(enforcement: Enforcement, request: Act) -> Reply:
    if request.action != "pause":
        return Refused("by hand a tree can be paused; anything else goes through a decision"), ()
    return Acted((enforcement.act(request, "operator"),)), ()


def _approve(enforcement: Enforcement, request: Approve) -> Reply:
    try:
        enforcement.approve(request)
    except (proctree.Refusal, AuditFailed, OSError) as error:
        return Refused(str(error)), ()
    return Done(), ()


def _undo(enforcement: Enforcement, request: Undo) -> Reply:
    return Acted(tuple(enforcement.undo(request.decision_id, request.reason[:512], by="guard"))), ()


def _undo_any(enforcement: Enforcement, request: Undo) -> Reply:
    return Acted(tuple(enforcement.undo(request.decision_id, request.reason[:512], by="operator"))), ()


def _list(enforcement: Enforcement, _: ListActions) -> Reply:
    return Acted((*enforcement.take_news(), *enforcement.in_force())), ()


def _list_only(enforcement: Enforcement, _: ListActions) -> Reply:
    return Acted(tuple(enforcement.in_force())), ()


def _disarm(enforcement: Enforcement, request: Disarm) -> Reply:
    return Acted(tuple(enforcement.disarm(request.reason, "guard"))), ()


def _disarm_for_good(enforcement: Enforcement, request: Disarm) -> Reply:
    return Acted(tuple(enforcement.disarm(request.reason, "operator"))), ()


def _enter(enforcement: Enforcement, request: Audit) -> Reply:
    try:
        enforcement.enter(request.time_ns, "guard", request.kind[:128], request.body)
    except AuditFailed as error:
        return Refused(str(error)), ()
    return Done(), ()


def _watching(_: Enforcement, request: Watching) -> Reply:
    # Told by nothing else here: a guard that hangs, and a broker that does, both fall silent.
    MANAGER.watching(request.status)
    return Done(), ()


#: Everything that the guard may ask.
HANDLERS: dict[type, Callable[..., Reply]] = {
    Hello: _hello,
    Act: _act,
    Undo: _undo,
    ListActions: _list,
    Disarm: _disarm,
    Audit: _enter,
    Watching: _watching,
    OpenReader: _open_reader,
    **dict.fromkeys(GRANTS, _grant),
}
#: Everything that an operator's command may ask.
OPERATOR_HANDLERS: dict[type, Callable[..., Reply]] = {
    Act: _stop,
    Approve: _approve,
    Undo: _undo_any,
    ListActions: _list_only,
    Disarm: _disarm_for_good,
}
