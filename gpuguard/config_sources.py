"""Where settings come from: flag before environment before drop-ins before file before default.

Files are TOML: ``gpuguard.toml`` and then ``conf.d/*.toml`` by name, in /etc/gpuguard and, for a user who is not root,
in the XDG folder after it. The environment is ``GPUGUARD_SECTION_KEY``. A key that nobody reads is an error: a control
that was set in vain is worse than one that was not set.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Struct

from gpuguard.config import Config

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

FILE_BYTES_MAX = 1024 * 1024

_UNITS = {
    "_ms": "milliseconds",
    "_s": "seconds",
    "_bytes": "bytes",
    "_bytes_max": "bytes",
    "_hz": "hertz",
    "_w": "watts",
    "_ratio": "a ratio from 0 to 1",
}


class ConfigError(Exception):
    """The settings cannot be used; the message names the file or variable, the key, and what to write instead."""


class Loaded(Struct, frozen=True):
    """Settings, and for every dotted key where its value comes from."""

    config: Config
    origins: dict[str, str]


class _Given(Struct, frozen=True):
    """One value as somebody gave it."""

    key: str
    value: object
    origin: str
    is_text: bool


def load_config(
    flags: Mapping[str, object] | None = None,
    environ: Mapping[str, str] | None = None,
    files: Sequence[Path] | None = None,
) -> Loaded:
    """Return the settings of this host.

    Parameters
    ----------
    flags
        Dotted keys and their values; text is read as a person typed it: ``{"guard.mode": "enforce"}``.
    environ
        The environment, ``os.environ`` if None. ``GPUGUARD_CONFIG`` names the one file to read instead of all others.
    files
        The files to read, weakest first; None: those of `config_files` that exist.

    Raises
    ------
    ConfigError
        A file cannot be read, a key is not known, or a value is not what the key takes.
    """
    environ = os.environ if environ is None else environ
    given: list[_Given] = []
    for path in config_files(environ) if files is None else files:
        given += _from_file(path)
    given += _from_environ(environ)
    given += [_Given(key, value, "flag", is_text=isinstance(value, str)) for key, value in (flags or {}).items()]
    return _settle(given)


def config_files(environ: Mapping[str, str], *, root: bool | None = None) -> list[Path]:
    """Return the files that hold settings on this host, weakest first. Raises `ConfigError`."""
    if environ.get("GPUGUARD_CONFIG"):
        return [Path(environ["GPUGUARD_CONFIG"])]
    found: list[Path] = []
    for folder in config_dirs(environ, root=root):
        beside = named(folder, ".toml")
        found += [path for name in ("gpuguard.toml", "config.toml") if (path := folder / name) in beside]
        found += named(folder / "conf.d", ".toml")
    return found


def named(folder: Path, *endings: str) -> list[Path]:
    """Return what ends so in a folder, by name; nothing if there is no folder.

    Raises `ConfigError` where it cannot be looked into, or is none: what stands there would be set in vain.
    """
    try:
        return sorted(path for path in folder.iterdir() if path.name.endswith(endings))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ConfigError(f"{folder}: {error.strerror}") from error


def config_dirs(environ: Mapping[str, str], *, root: bool | None = None) -> list[Path]:
    """Return the folders of settings and policies, weakest first: /etc for the host, then a user's own (XDG)."""
    system = Path("/etc/gpuguard")
    if os.geteuid() == 0 if root is None else root:
        return [system]
    given = environ.get("XDG_CONFIG_HOME", "")
    # "All paths set in these environment variables must be absolute", says the specification; others are ignored.
    home = Path(given) if given.startswith("/") else Path(environ.get("HOME") or Path.home()) / ".config"
    return [system, home / "gpuguard"]


def all_keys() -> dict[str, Any]:
    """Return every dotted key and its annotated type, in order of `Config`."""
    return {
        f"{section}.{name}": kind
        for section, group in get_type_hints(Config).items()
        for name, kind in get_type_hints(group, include_extras=True).items()
    }


def value_of(config: Config, key: str) -> object:
    """Return the value of a dotted key."""
    section, name = key.split(".")
    return getattr(getattr(config, section), name)


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema (2020-12) of a settings file."""
    schema = msgspec.json.schema(Config)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "gpuguard.toml", **schema}


def _from_file(path: Path) -> list[_Given]:
    try:
        with path.open("rb") as stream:
            text = stream.read(FILE_BYTES_MAX + 1)
        if len(text) > FILE_BYTES_MAX:
            raise ConfigError(f"{path}: larger than {FILE_BYTES_MAX} bytes, so not a settings file")
        content = tomllib.loads(text.decode())
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 (byte {error.start})") from error
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError(f"{path}: not TOML: {error}") from error
    return [_Given(key, value, str(path), is_text=False) for key, value in _flatten(content, str(path))]


def _flatten(content: dict[str, Any], origin: str) -> Iterator[tuple[str, object]]:
    sections = get_type_hints(Config)
    for section, group in content.items():
        if section not in sections:
            raise ConfigError(f"{origin}: no such section [{section}]{_suggest(section, sections)}")
        if not isinstance(group, dict):
            raise ConfigError(f"{origin}: {section} is a section: write [{section}] and its keys below it")
        for name, value in group.items():
            yield f"{section}.{name}", value


def _from_environ(environ: Mapping[str, str]) -> list[_Given]:
    variables = {_variable(key): key for key in all_keys()}
    sections = tuple(f"GPUGUARD_{section.upper()}_" for section in get_type_hints(Config))
    given = []
    for name in sorted(one for one in environ if one.startswith("GPUGUARD_")):
        if name in variables:
            given.append(_Given(variables[name], environ[name], name, is_text=True))
        elif name.startswith(sections) or difflib.get_close_matches(name, variables, n=1, cutoff=0.85):
            raise ConfigError(f"environment: no such setting {name}{_suggest(name, variables)}")
        # Others begin like a setting and are none: folders, sandbox ids, what tests and labs pass on.
    return given


def _variable(key: str) -> str:
    return "GPUGUARD_" + key.replace(".", "_").upper()


def _settle(given: list[_Given]) -> Loaded:
    """Return the settings: of every key the last value that was given."""
    kinds = all_keys()
    origins = dict.fromkeys(kinds, "default")
    sections: dict[str, dict[str, object]] = {key.split(".")[0]: {} for key in kinds}
    for one in given:
        if one.key not in kinds:
            raise ConfigError(f"{one.origin}: no such setting {one.key}{_suggest(one.key, kinds)}")
        section, name = one.key.split(".")
        sections[section][name] = _checked(one, kinds[one.key])
        origins[one.key] = one.origin
    try:
        config = msgspec.convert(sections, Config)
    except msgspec.ValidationError as error:  # each value is good by itself, and what it says is not
        said = ", ".join(sorted({origin for origin in origins.values() if origin != "default"}))
        raise ConfigError(f"{said}: {error}") from error
    return Loaded(config=config, origins=origins)


def _checked(one: _Given, kind: object) -> object:
    """Return the value as its key takes it. Text of flags and variables is read as numbers, truths and lists."""
    value = one.value
    if one.is_text and get_origin(get_args(kind)[0]) is tuple:
        value = [part.strip() for part in str(value).split(",") if part.strip()]
    try:
        return msgspec.convert(value, kind, strict=not one.is_text)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{one.origin}: {one.key} = {one.value!r}: {_why(error, kind)}{_unit_hint(one)}") from error


def _why(error: msgspec.ValidationError, kind: object) -> str:
    """Return what is wrong with a value: what msgspec says, or what would do where it names a pattern or nothing."""
    bare, *limits = get_args(kind)
    if get_origin(bare) is Literal:
        return f"it is one of {', '.join(get_args(bare))}"
    if "regex" in str(error):
        return f"it is a {limits[0].description}"
    return str(error)


def _unit_hint(one: _Given) -> str:
    """Return what a value of this key is counted in, and for "250 ms" what to write instead."""
    name = one.key.rpartition(".")[2]
    unit = next((unit for suffix, unit in _UNITS.items() if name.endswith(suffix)), "")
    if not unit:
        return ""
    number = re.match(r"\s*([\d.]+)\s*[A-Za-z]+\s*$", one.value) if isinstance(one.value, str) else None
    return f" (a plain number of {unit}{', without its unit' if number else ''})"


def _suggest(word: str, known: Mapping[str, object]) -> str:
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""
