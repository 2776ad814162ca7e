"""Egress policy of OpenSandbox, as a section of a policy file.

Its form (components/egress, pkg/policy/policy.go): ``{"defaultAction": "deny", "egress": [{"action": "allow", "target":
"*.example.org"}]}``, alone, as ``networkPolicy`` of a request that creates a sandbox, or as ``policy`` of what its
``/policy`` answers. A default that is not given denies, and so does a rule without an action. Names are matched in
order; but its packet filter drops a denied network before it looks at what is allowed, so those come first here.
"""

from __future__ import annotations

import ipaddress
import json
from typing import Any

import yaml

from gpuguard.policies import FILE_BYTES_MAX, PolicyError, parse_policy


def policy_text(text: str, name: str, sandbox_ids: tuple[str, ...] = ()) -> str:
    """Return the YAML of a policy file that says what OpenSandbox's JSON says.

    ``name`` is the section's; it is about these sandboxes, or about everybody if none is named. Raises PolicyError.
    """
    if len(text) > FILE_BYTES_MAX:
        raise PolicyError(f"larger than {FILE_BYTES_MAX} bytes, so no network policy")
    try:
        said = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PolicyError(f"no JSON: {error}") from error
    said = _inner(said)
    _only(said, {"defaultAction", "default_action", "egress"}, "the policy")
    listed = [] if said.get("egress") is None else said["egress"]
    if not isinstance(listed, list):
        raise PolicyError("egress must be a list of rules")
    rules = [_rule(one, f"egress rule {number}") for number, one in enumerate(listed, start=1)]
    section: dict[str, Any] = {"name": name}
    if sandbox_ids:
        section["match"] = {"sandbox_ids": list(sandbox_ids)}
    section["default"] = _action(said.get("defaultAction") or said.get("default_action"), "defaultAction")
    # A sort that keeps the order of all others.
    section["rules"] = sorted(rules, key=lambda rule: not ("deny" in rule and _is_network(rule["deny"])))
    written = yaml.safe_dump({"egress": [section]}, sort_keys=False, allow_unicode=True)
    parse_policy(written, "as a policy of GPUGuard")
    return written


def _inner(said: object) -> dict[str, Any]:
    """Return the policy itself; nothing at all is one, which denies."""
    for key in ("networkPolicy", "policy"):
        if isinstance(said, dict) and key in said:
            said = said[key]
    if said is None:
        return {}
    if not isinstance(said, dict):
        raise PolicyError("a network policy is an object with defaultAction and egress")
    return said


def _rule(one: object, place: str) -> dict[str, str]:
    if not isinstance(one, dict):
        raise PolicyError(f"{place}: a rule is an object with action and target")
    _only(one, {"action", "target"}, place)
    target = one.get("target")
    if not isinstance(target, str) or not target.strip():
        raise PolicyError(f"{place}: target must be a name, an address or a network")
    target = target.strip()
    if _is_network(target) and "/" in target:
        # Go reads a network whose host bits are set; what it means is the network.
        target = str(ipaddress.ip_network(target, strict=False))
    return {_action(one.get("action"), place): target}


def _action(value: object, place: str) -> str:
    said = "deny" if value in (None, "") else value.strip().lower() if isinstance(value, str) else value
    if said not in ("allow", "deny"):
        raise PolicyError(f"{place}: action {value!r} is neither allow nor deny")
    return str(said)


def _is_network(target: str) -> bool:
    try:
        ipaddress.ip_network(target, strict=False)
    except ValueError:
        return False
    return True


def _only(said: dict[str, Any], known: set[str], place: str) -> None:
    unknown = sorted(set(said) - known)
    if unknown:
        raise PolicyError(f"{place}: no such key {unknown[0]!r}; there are {', '.join(sorted(known))}")
