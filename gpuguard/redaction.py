"""Take the secrets out of command lines and tool arguments, before anything records them.

What is taken out: values of names that say they are secret, credentials in headers and URLs, tokens of known issuers
(the prefixes that they publish for secret scanners), and long strings that look drawn at random. What stays, because a
reader of an incident needs it and it opens nothing: digests, ids, and wallet addresses. A wallet is told from a key by
its own form: Base58Check (checksum of two SHA-256 rounds), Bech32 (BIP 173) prefixes, Monero's length.

Blind spots: a password that looks like a word and stands where nothing says that it is one; a secret in plain
hexadecimal. A program may hide a harmless argument here by calling it ``--password``; it loses nothing but readability.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

MARK = "[redacted]"
ARGUMENTS_MAX = 64
ARGUMENT_CHARS_MAX = 512
TOTAL_CHARS_MAX = 4096
# Nothing longer is searched: the searches below are linear in this.
SEARCHED_CHARS_MAX = 4096

# "token" but not "tokenizer" or "max_tokens", "auth" but not "author": these programs train language models.
_NAME = (
    r"[A-Za-z0-9_.-]{0,40}(?:passw(?:or)?d|passwd|passphrase|passin|passout|secret|token(?![a-z])|api[_-]?key"
    r"|access[_-]?key|private[_-]?key|credential|auth(?:orization)?(?![a-z])|cookie|pwd(?![a-z]))[A-Za-z0-9_.-]{0,40}"
)
_QUOTED = r"\"[^\"]*\"?|'[^']*'?"
_VALUE = rf"(?:{_QUOTED}|[^\s;&|\"']+)"
_SECRET_FLAG = re.compile(rf"^-{{1,2}}{_NAME}$", re.IGNORECASE)
_RULES: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"-----BEGIN [A-Z ]{0,40}PRIVATE KEY-----.*", re.DOTALL), MARK),
    # HTTP fields, RFC 9110 section 11: scheme and credentials up to the end of the quoted argument or line.
    (re.compile(r"\b((?:proxy-)?authorization|(?:set-)?cookie|x-[a-z-]{0,40}(?:key|token|auth))(\s*:\s*)[^\"'\r\n]+",
                re.IGNORECASE), rf"\1\2{MARK}"),
    (re.compile(r"\b(bearer|basic)(\s+)[A-Za-z0-9._~+/=-]{6,}", re.IGNORECASE), rf"\1\2{MARK}"),
    # RFC 3986 section 3.2.1: userinfo. The user stays: pools take a wallet there.
    (re.compile(r"([A-Za-z][A-Za-z0-9+.-]{0,30}://[^\s/:@?#\"']{0,200}:)[^\s/@\"']+@"), rf"\1{MARK}@"),
    (re.compile(rf"(-{{1,2}}{_NAME}\s+){_VALUE}", re.IGNORECASE), rf"\1{MARK}"),
    (re.compile(rf"({_NAME}\\?[\"']?\s*[=:]\s*)(?:\\\"[^\"]*|{_VALUE})", re.IGNORECASE), rf"\1{MARK}"),
    (re.compile(r"\b((?:mysql\w{0,12}|mariadb[\w-]{0,12}|sshpass|7z[a-z]?)\b[^;|&]{0,200}?\s-p)\s?"
                + _VALUE), rf"\1{MARK}"),
    (re.compile(r"\b(redis-cli\b[^;|&]{0,200}?\s(?:-a|--pass)\s?)" + _VALUE), rf"\1{MARK}"),
    (re.compile(r"\b(curl\b[^;|&]{0,200}?\s(?:-[uU]|--(?:proxy-)?user)\s?[^\s:;&|]{0,100}:)" + _VALUE), rf"\1{MARK}"),
)
_TOKEN = re.compile(
    r"(?<![A-Za-z0-9])(?:"
    r"(?:AKIA|ASIA|ABIA|ACCA)[0-9A-Z]{16}"
    r"|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_[A-Za-z0-9_]{20,}|glpat-[A-Za-z0-9_-]{16,}"
    r"|sk-[A-Za-z0-9_-]{16,}|sk_(?:live|test)_[A-Za-z0-9]{10,}|rk_(?:live|test)_[A-Za-z0-9]{10,}"
    r"|xox[abeoprs]-[A-Za-z0-9-]{10,}|AIza[A-Za-z0-9_-]{30,}|ya29\.[A-Za-z0-9_-]{20,}"
    r"|hf_[A-Za-z0-9]{20,}|nvapi-[A-Za-z0-9_-]{20,}|npm_[A-Za-z0-9]{20,}|pypi-[A-Za-z0-9_-]{20,}"
    r"|dop_v1_[a-f0-9]{20,}|SG\.[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}|wandb_v1_[A-Za-z0-9_]{20,}"
    r"|eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{4,}(?:\.[A-Za-z0-9_-]*)?"
    r")"
)
_LONG = re.compile(r"[A-Za-z0-9+/_-]{24,}={0,2}")
_HEX = re.compile(r"^(?:0x)?[0-9A-Fa-f_=/+-]*$")
_MONERO = re.compile(r"^[48][1-9A-HJ-NP-Za-km-z]{94}(?:[1-9A-HJ-NP-Za-km-z]{11})?$")
_BECH32 = re.compile(r"^(?:bc1|tb1|ltc1|vtc1|grs1|addr1)[02-9ac-hj-np-z]{20,110}$")
_BASE58 = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
# Programs that take a secret in a short flag: the flag, and whether the secret may be the next argument.
_SHORT_FLAGS: dict[str, tuple[str, bool]] = {
    "mysql": ("-p", False),
    "mysqldump": ("-p", False),
    "mysqladmin": ("-p", False),
    "mariadb": ("-p", False),
    "mariadb-dump": ("-p", False),
    "sshpass": ("-p", True),
    "7z": ("-p", False),
    "zip": ("-P", True),
    "redis-cli": ("-a", True),
    "ldapsearch": ("-w", True),
    "curl": ("-u", True),
    "smbclient": ("-U", True),
}


def _base58check(text: str) -> bool:
    if not 26 <= len(text) <= 112 or any(character not in _BASE58 for character in text):
        return False
    number = 0
    for character in text:
        number = number * 58 + _BASE58.index(character)
    raw = b"\0" * (len(text) - len(text.lstrip("1"))) + number.to_bytes((number.bit_length() + 7) // 8, "big")
    return hashlib.sha256(hashlib.sha256(raw[:-4]).digest()).digest()[:4] == raw[-4:]


def is_wallet(text: str) -> bool:
    """Return whether the text has the form of a wallet address, which names a receiver and opens nothing.

    A private key in wallet import format is Base58Check too: it is told by its version byte, whose first letters are
    5, K or L in Bitcoin's encoding.
    """
    if _MONERO.match(text) or _BECH32.match(text):
        return True
    return not text.startswith(("5", "K", "L", "xprv", "yprv", "zprv")) and _base58check(text)


def _kind(character: str) -> int:
    if character.isdigit():
        return 0
    if character.islower():
        return 1
    return 2 if character.isupper() else 3


def looks_random(text: str) -> bool:
    """Return whether the characters change their kind as often as drawn ones do.

    Of uniform base62 two neighbours differ in kind (upper, lower, digit) with probability 0.62, of base36 with 0.40;
    in words, paths and identifiers with less than 0.3; a dash joins words and counts for nothing. Hexadecimal is never
    taken: digests and ids are made of it.
    """
    if len(text) < 24 or _HEX.match(text):
        return False
    kinds = [_kind(character) for character in text]
    present = set(kinds)
    changes = sum(a != b and 3 not in (a, b) for a, b in itertools.pairwise(kinds)) / (len(text) - 1)
    if {0, 1, 2} <= present:
        return changes >= 0.35
    return len(text) >= 32 and 0 in present and present <= {0, 1} and changes >= 0.28


def _long(match: re.Match[str]) -> str:
    """Hide a run that looks drawn. A slash may be of Base64 or of a path; Base64 has no dash beside it (RFC 4648)."""
    text = match.group()
    if "/" in text and (text.startswith("/") or "-" in text or "_" in text):
        return "/".join(_piece(piece, match.string[:match.start()]) for piece in text.split("/"))
    return _piece(text, match.string[:match.start()])


def _piece(text: str, before: str) -> str:
    if is_wallet(text) or before.endswith("kaspa:"):
        return text
    return MARK if looks_random(text.replace("/", "")) else text


def _hidden(text: str) -> str:
    for pattern, instead in _RULES:
        text = pattern.sub(instead, text)
    return _LONG.sub(_long, _TOKEN.sub(MARK, text))


def printable(text: str) -> str:
    """Return the text with its control characters made visible, so that it cannot speak to a terminal."""
    return _CONTROL.sub("\ufffd", text)


def redact_text(text: str, chars_max: int = ARGUMENT_CHARS_MAX) -> str:
    """Return the text without its secrets, its control characters and whatever exceeds ``chars_max``.

    It is searched before it is cut, so that a cut cannot make half a secret unrecognisable; of an overlong text the
    word that is cut in two goes too.
    """
    if len(text) > SEARCHED_CHARS_MAX:
        text = text[:SEARCHED_CHARS_MAX].rpartition(" ")[0] or MARK
    text = _hidden(printable(text))
    return text if len(text) <= chars_max else text[: chars_max - 1] + "\u2026"


def _redacted(argv: Iterable[str]) -> Iterable[str]:
    hide_next = False
    short: tuple[str, bool] | None = None
    for argument in argv:
        if hide_next:
            hide_next = False
            yield MARK
            continue
        short = _SHORT_FLAGS.get(argument.rpartition("/")[2], short)
        if short and argument.startswith(short[0]) and len(argument) > 2 and not argument.startswith("--"):
            yield short[0] + MARK
            continue
        hide_next = bool(_SECRET_FLAG.match(argument[:128])) or bool(short and short[1] and argument == short[0])
        yield redact_text(argument)


def redact_argv(argv: Sequence[str]) -> tuple[str, ...]:
    """Return the arguments without their secrets: at most 64 of them, 512 characters each and 4096 in all."""
    kept: list[str] = []
    chars = 0
    for argument in _redacted(argv[:ARGUMENTS_MAX]):
        chars += len(argument)
        if chars > TOTAL_CHARS_MAX:
            break
        kept.append(argument)
    left = len(argv) - len(kept)
    return (*kept, f"\u2026 {left} more") if left else tuple(kept)
