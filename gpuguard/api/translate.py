"""Between the core's structs and the messages of gpuguard.v1.

Both have the same fields under the same names, so one walk serves every type; what differs is in the tables below.
Enums drop their prefix and case, ``None`` is an unset field, a subject is a oneof.
"""

from __future__ import annotations

from collections.abc import MutableSequence
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from gpuguard.api.v1 import gpuguard_pb2 as pb
from gpuguard.core.subjects import DeviceId, FlowId, ProcessId

if TYPE_CHECKING:
    from google.protobuf.message import Message

    from gpuguard.core.subjects import Subject

S = TypeVar("S", bound=msgspec.Struct)
M = TypeVar("M", bound="Message")

#: A process in the core's words is ``process``; in a message of its own it is the id.
_RENAMED = {("Process", "process"): "id", ("Process", "id"): "process"}
_ENUM_PREFIXES = {"Verdict": "VERDICT_", "IncidentState": "INCIDENT_STATE_", "Mode": "MODE_", "Answer": "ANSWER_"}


def to_message(struct: msgspec.Struct, message: M) -> M:
    """Fill the message from the struct of the same meaning, and return it."""
    kind = message.DESCRIPTOR
    for name in struct.__struct_fields__:
        value = getattr(struct, name)
        if value is not None:
            _set(message, kind.fields_by_name[_RENAMED.get((kind.name, name), name)], value)
    return message


def from_message(message: Message, kind: type[S]) -> S:
    """Return the struct of a message.

    Raises
    ------
    msgspec.ValidationError
        The message comes from a service that says things this version does not know.
    """
    return msgspec.convert(_builtins(message), kind)


def enum_value(kind: str, word: str) -> int:
    """Return the number of a word of an enum: ``("Verdict", "clear")``."""
    number: int = pb.DESCRIPTOR.enum_types_by_name[kind].values_by_name[_ENUM_PREFIXES[kind] + word.upper()].number
    return number


def enum_word(kind: str, number: int) -> str:
    """Return the word of an enum's number, "unspecified" where none was given."""
    value = pb.DESCRIPTOR.enum_types_by_name[kind].values_by_number.get(number)
    return value.name.removeprefix(_ENUM_PREFIXES[kind]).lower() if value else "unspecified"


def _set(message: Message, field: Any, value: Any) -> None:
    repeated = isinstance(value, tuple)
    if field.message_type is None:
        if field.enum_type is not None:
            setattr(message, field.name, enum_value(field.enum_type.name, value))
        elif repeated:
            getattr(message, field.name).extend(_sound(item) for item in value)
        else:
            setattr(message, field.name, _sound(value))
    elif repeated:
        for item in value:
            to_message(item, getattr(message, field.name).add())
    elif field.message_type.name == "Subject":
        _set_subject(getattr(message, field.name), value)
    else:
        part = getattr(message, field.name)
        part.SetInParent()
        to_message(value, part)


def _set_subject(message: Any, subject: Subject) -> None:
    match subject:
        case ProcessId():
            to_message(subject, message.process)
        case FlowId():
            to_message(subject, message.flow)
        case DeviceId():
            message.device_uuid = subject.uuid


def _sound(value: Any) -> Any:
    """Return text that UTF-8 can carry: an argv may hold any bytes, which Python reads as lone surrogates."""
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value


def _builtins(message: Message) -> dict[str, Any]:
    kind = message.DESCRIPTOR
    return {_RENAMED.get((kind.name, field.name), field.name): _get(message, field) for field in kind.fields}


def _get(message: Message, field: Any) -> Any:
    value = getattr(message, field.name)
    if isinstance(value, MutableSequence):
        return [_builtins(item) for item in value] if field.message_type else list(value)
    if field.has_presence and not message.HasField(field.name):
        return None
    if field.message_type is None:
        return enum_word(field.enum_type.name, value) if field.enum_type else value
    return _get_subject(value) if field.message_type.name == "Subject" else _builtins(value)


def _get_subject(message: Any) -> dict[str, Any]:
    match message.WhichOneof("kind"):
        case "process":
            return {"type": "process", **_builtins(message.process)}
        case "flow":
            return {"type": "flow", **_builtins(message.flow)}
        case "device_uuid":
            return {"type": "device", "uuid": message.device_uuid}
        case _:
            raise msgspec.ValidationError("a subject of a kind that this version does not know")
