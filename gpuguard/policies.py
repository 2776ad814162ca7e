"""Policies from ``policies.d/*.yaml``: read, checked, joined into one `Policy`.

All files together are one policy: rules and exemptions add up, names must differ. Where there is no file the built-in
policy holds. A file that is wrong stops the start: a rule that silently does not hold is worse than none. YAML is read
by the C safe loader only, without aliases (which can make a small file large).
"""

from __future__ import annotations

import difflib
import os
import re
from datetime import UTC, date, datetime
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
import yaml

from gpuguard.config_sources import ConfigError, config_dirs, named
from gpuguard.core.egress import EgressMatch, EgressPolicy, EgressRule
from gpuguard.core.policy import DEFAULT_POLICY, Exemption, Match, Policy, Rule, check

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

T = TypeVar("T", Rule, Exemption, EgressPolicy)

FILE_BYTES_MAX = 256 * 1024
FILES_MAX = 256


class PolicyError(Exception):
    """A policy cannot be used; the message names the file, the line where there is one, and what is wrong."""


class _Loader(yaml.CSafeLoader):
    """The safe loader; a key that is given twice in one mapping is an error here, which YAML leaves open."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:  # noqa: FBT001, FBT002
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is given twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


def load_policy(files: Sequence[Path] | None = None, environ: Mapping[str, str] | None = None) -> Policy:
    """Return the policy of this host.

    Parameters
    ----------
    files
        The files to read; None: `policy_files`. No file at all: the built-in policy.
    environ
        The environment, ``os.environ`` if None.

    Raises
    ------
    PolicyError
        A file cannot be read or says something that no rule can mean.
    """
    chosen = policy_files(os.environ if environ is None else environ) if files is None else list(files)
    if not chosen:
        return DEFAULT_POLICY
    if len(chosen) > FILES_MAX:
        raise PolicyError(f"{len(chosen)} policy files; at most {FILES_MAX} are read")
    parts = [parse_policy(_read(path), str(path)) for path in chosen]
    whole = Policy(
        rules=tuple(rule for part in parts for rule in part.rules),
        exemptions=tuple(exemption for part in parts for exemption in part.exemptions),
        egress=tuple(section for part in parts for section in part.egress),
    )
    wrong = check(whole)
    if wrong:
        raise PolicyError(f"{', '.join(str(path) for path in chosen)}: {'; '.join(wrong)}")
    return whole


def policy_files(environ: Mapping[str, str], *, root: bool | None = None) -> list[Path]:
    """Return the policy files of this host, the host's own before a user's, each in order of name."""
    folders = [folder / "policies.d" for folder in config_dirs(environ, root=root)]
    try:
        return [path for folder in folders for path in named(folder, ".yaml", ".yml")]
    except ConfigError as error:
        raise PolicyError(str(error)) from error


def parse_policy(text: str, name: str) -> Policy:
    """Return the policy that a file says; ``name`` is what errors call it. Raises PolicyError."""
    content = _decode(text, name)
    _only(content, ("rules", "exemptions", "egress"), name, "the file")
    rules = [_rule(item, f"rule {number}", name) for number, item in _items(content, "rules", name)]
    exemptions = [
        _exemption(item, f"exemption {number}", name) for number, item in _items(content, "exemptions", name)
    ]
    egress = [_egress(item, f"egress section {number}", name) for number, item in _items(content, "egress", name)]
    policy = Policy(rules=tuple(rules), exemptions=tuple(exemptions), egress=tuple(egress))
    wrong = check(policy)
    if wrong:
        raise PolicyError(f"{name}: {'; '.join(wrong)}")
    return policy


def _read(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            data = stream.read(FILE_BYTES_MAX + 1)
        if len(data) > FILE_BYTES_MAX:
            raise PolicyError(f"{path}: larger than {FILE_BYTES_MAX} bytes, so not a policy")
        return data.decode()
    except OSError as error:
        raise PolicyError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise PolicyError(f"{path}: not UTF-8 (byte {error.start})") from error


def _decode(text: str, name: str) -> dict[str, Any]:
    try:
        for token in yaml.scan(text, Loader=yaml.CSafeLoader):
            if isinstance(token, yaml.AliasToken):
                raise PolicyError(f"{name}:{token.start_mark.line + 1}: aliases (*{token.value}) are not read")
        content = yaml.load(text, Loader=_Loader)  # noqa: S506, TID251 - the safe loader, and stricter
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f":{mark.line + 1}" if mark else ""
        raise PolicyError(f"{name}{where}: {error.problem or error.context}") from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise PolicyError(f"{name}: not YAML: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise PolicyError(f"{name}: a policy is a mapping with rules:, exemptions: and egress:")
    return content


def _items(content: dict[str, Any], key: str, name: str) -> list[tuple[int, dict[str, Any]]]:
    listed = content.get(key) or []
    if not isinstance(listed, list) or not all(isinstance(item, dict) for item in listed):
        raise PolicyError(f"{name}: {key} must be a list of mappings, each beginning with a dash")
    return list(enumerate(listed, start=1))


def _rule(item: dict[str, Any], place: str, name: str) -> Rule:
    _check_keys(item, Rule, place, name)
    return _convert({**item, **_durations(item, place, name)}, Rule, place, name)


def _exemption(item: dict[str, Any], place: str, name: str) -> Exemption:
    given = dict(item)
    if "expires" in given:
        given["expires_ns"] = _moment_ns(given.pop("expires"), place, name)
    _check_keys(given, Exemption, place, name)
    if not given.get("match"):
        raise PolicyError(f"{name}: {place}: match is empty, which would exempt everybody")
    return _convert(given, Exemption, place, name)


def _egress(item: dict[str, Any], place: str, name: str) -> EgressPolicy:
    _check_keys(item, EgressPolicy, place, name, EgressMatch)
    for number, rule in _items(item, "rules", name):
        _only(rule, EgressRule.__struct_fields__, name, f"rule {number} of {place} ({item.get('name', '')})")
    return _convert(item, EgressPolicy, place, name)


def _check_keys(item: dict[str, Any], kind: type, place: str, name: str, match_kind: type = Match) -> None:
    said = f"{place} ({item['name']})" if item.get("name") else place
    _only(item, kind.__struct_fields__, name, said)  # type: ignore[attr-defined]
    match = item.get("match")
    if match is not None and not isinstance(match, dict):
        raise PolicyError(f"{name}: {said}: match must be a mapping, such as 'labels: [mining]'")
    _only(match or {}, match_kind.__struct_fields__, name, f"match of {said}")  # type: ignore[attr-defined]


def _only(item: Mapping[Any, Any], known: Sequence[str], name: str, place: str) -> None:
    for key in item:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"
            raise PolicyError(f"{name}: {place}: no such key {key!r}; {hint}")


def _durations(item: dict[str, Any], place: str, name: str) -> dict[str, float]:
    """Return ``ttl_s`` as seconds; "15 min" and the like are read, because people write them."""
    value = item.get("ttl_s")
    if not isinstance(value, str):
        return {}
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(s|min|h|d)?\s*", value)
    if not found:
        raise PolicyError(f"{name}: {place}: ttl_s {value!r} is no duration; write seconds, or 15 min, 2 h, 1 d")
    return {"ttl_s": float(found.group(1)) * {"s": 1, "min": 60, "h": 3600, "d": 86_400}[found.group(2) or "s"]}


def _moment_ns(value: object, place: str, name: str) -> int:
    """Return a moment as Unix nanoseconds. A time without a zone is UTC, a date is the end of that day in UTC."""
    if isinstance(value, datetime):
        aware = value if value.tzinfo else value.replace(tzinfo=UTC)
        return int(aware.timestamp()) * 1_000_000_000
    if isinstance(value, date):
        start = datetime(value.year, value.month, value.day, tzinfo=UTC)
        return (int(start.timestamp()) + 86_400) * 1_000_000_000
    raise PolicyError(f"{name}: {place}: expires must be a date such as 2027-01-31, not {value!r}")


def _convert(item: dict[str, Any], kind: type[T], place: str, name: str) -> T:
    try:
        return msgspec.convert(item, kind)
    except msgspec.ValidationError as error:
        said = f"{place} ({item['name']})" if item.get("name") else place
        raise PolicyError(f"{name}: {said}: {error}") from error
