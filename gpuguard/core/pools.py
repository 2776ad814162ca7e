"""What a line of JSON, or a message in a WebSocket, says of mining, whatever the dialect calls it.

Every pool has to say the same things: *here is a header, and so hard it is* to the miner, *here is a nonce* to the pool
(Stratum V1 of slushpool.com; CryptoNote's as in xmrig's doc/STRATUM.md; Beam's wiki, "Beam mining protocol API"). So
what is not in known words is told by its form:

- a job: 16 bytes at least in hexadecimal, and beside them a difficulty, or a target with a height or a job;
- a share: a nonce, and beside it 16 bytes in hexadecimal or the job that it is for.

Neither accuses anybody: `detectors.stratum` asks for a job of the far side and shares of this one.

Benign look-alikes: task queues and CI (jobs and hashes, nothing to find), nodes that tell of blocks (newHeads: a
difficulty and its *nonce*: nothing is left to be found), wallets (a nonce with a transaction), signed requests of
exchanges and encrypted messages (a nonce, and a signature or a cipher), language servers, hubs and agents (targets that
are no numbers).
"""

from __future__ import annotations

import json
import string
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Objects of one message that are looked at, outermost first, and how deep.
OBJECTS_MAX = 64
DEPTH_MAX = 4
METHOD_MAX = 32
#: 16 bytes: no id, number or colour is as long, a hash or a header is at least.
DIGITS_MIN = 32
#: Stratum's shortest targets are of four bytes.
TARGET_DIGITS_MIN = 8

#: What says that a nonce is not sought: a block that was found, a signature, a cipher, a transaction.
NO_SHARE = ("sig", "cipher", "hash", "payload", "gas", "value", "hmac")
NO_JOB = ("nonce", "hash", "sig")

JOB, SHARE = "pool-job", "pool-share"


def said(line: bytes) -> str:
    """Return the method of a pool's known dialects, `JOB` or `SHARE` for what has their form, "" for all else."""
    try:
        whole = json.loads(line)
    except (ValueError, RecursionError):
        return ""
    if not isinstance(whole, dict):
        return ""
    about = whole.get("method", whole.get("type"))
    about = about if isinstance(about, str) else ""
    if about.startswith("mining.") and len(about) > len("mining."):
        return "".join(one if one in string.printable[:95] else "?" for one in about[:METHOD_MAX])
    for one in _objects(whole):
        if found := _cryptonote(one, about) or _job(one, about) or _share(one):
            return found
    return ""


def _objects(whole: dict[str, object]) -> Iterator[dict[str, object]]:
    """Yield an object and those within it, the outer ones first."""
    level: list[dict[str, object] | list[object]] = [whole]
    for _ in range(DEPTH_MAX):
        level = level[:OBJECTS_MAX]
        yield from (one for one in level if isinstance(one, dict))
        level = [value for one in level for value in (one.values() if isinstance(one, dict) else one)
                 if isinstance(value, dict | list)]


def _cryptonote(one: dict[str, object], about: str) -> str:
    if about == "login" and "login" in one and "pass" in one:
        return "login"
    if {"job_id", "blob", "target"} <= one.keys() and _digits(one["blob"]) >= DIGITS_MIN:
        return "job"
    if {"job_id", "nonce", "result"} <= one.keys() and _digits(one["result"]) >= DIGITS_MIN and _digits(one["nonce"]):
        return "submit"
    return ""


def _job(one: dict[str, object], about: str) -> str:
    if any(key in NO_JOB or "sign" in key.lower() for key in one):
        return ""
    hard = any(key.startswith("diff") and (_is_number(value) or _digits(value)) for key, value in one.items())
    target = any(key.startswith("target") and _digits(value) >= TARGET_DIGITS_MIN for key, value in one.items())
    placed = "job" in about or any(key == "height" or "job" in key.lower() for key in one)
    header = any(_digits(value) >= DIGITS_MIN for key, value in one.items() if not key.startswith(("diff", "target")))
    return JOB if header and (hard or (target and placed)) else ""


def _share(one: dict[str, object]) -> str:
    nonce = one.get("nonce")
    if not (_is_number(nonce) or _digits(nonce)) or any(word in key.lower() for key in one for word in NO_SHARE):
        return ""
    if any(key.startswith(("diff", "target")) for key in one):
        return ""
    proof = any(_digits(value) >= DIGITS_MIN for key, value in one.items() if key != "nonce")
    return SHARE if proof or any("job" in key.lower() for key in one) else ""


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _digits(value: object) -> int:
    """Return how many hexadecimal digits a text has, 0 if it has anything else."""
    text = value.removeprefix("0x") if isinstance(value, str) else ""
    return len(text) if text and all(one in string.hexdigits for one in text) else 0
